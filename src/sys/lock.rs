//! Locks on files: who has one, is alone until it is dropped or its process ends.
//!
//! Invariant: a lock that is dropped is free at once. It belongs to the open file, which a process
//! that another thread has just forked shares until it is another program; so it is given back, not
//! left to the closing of the file, and who finds it held looks again before he believes it.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// How long a lock is waited for that nobody should have: it may be a forked process's, as said
/// above, or that of one which is just ending.
pub const PATIENCE: Duration = Duration::from_millis(500);
/// How long after a look at a lock comes the next one.
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);

/// A file whose exclusive lock this has.
#[derive(Debug)]
pub struct LockedFile(File);

impl LockedFile {
    /// Takes the lock of a file, and tries again for as long as `patience`; `None` when somebody
    /// else had it all that time.
    pub fn within(file: File, patience: Duration) -> io::Result<Option<LockedFile>> {
        let deadline = Instant::now() + patience;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Some(LockedFile(file))),
                Err(Errno::INTR) => {}
                Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(BETWEEN_LOOKS);
                }
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl Deref for LockedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        // If it fails, the lock goes with the file.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Whether somebody has the lock of a file. Who asks keeps others who ask from nothing.
pub fn is_locked(file: &File) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => {
            flock(file, FlockOperation::Unlock)?;
            Ok(false)
        }
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &tempfile::TempDir) -> File {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        options.open(dir.path().join("lock")).unwrap()
    }

    #[test]
    fn one_has_it_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let take = || LockedFile::within(open(&dir), Duration::ZERO).unwrap();
        let first = take().unwrap();
        assert!(take().is_none() && is_locked(&open(&dir)).unwrap());
        // As a forked process has it.
        let shared = first.try_clone().unwrap();
        drop(first);
        assert!(!is_locked(&shared).unwrap());
        assert!(take().is_some());
        assert!(!is_locked(&open(&dir)).unwrap());
    }

    #[test]
    fn what_is_held_for_a_moment_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let first = LockedFile::within(open(&dir), Duration::ZERO).unwrap();
        let (begin, begun) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let second = scope.spawn(|| {
                begin.send(()).unwrap();
                LockedFile::within(open(&dir), Duration::from_secs(60)).unwrap()
            });
            begun.recv().unwrap();
            std::thread::sleep(3 * BETWEEN_LOOKS);
            drop(first);
            assert!(second.join().unwrap().is_some());
        });
    }

    #[test]
    fn who_only_asks_is_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let asked = open(&dir);
        flock(&asked, FlockOperation::NonBlockingLockShared).unwrap();
        assert!(!is_locked(&open(&dir)).unwrap());
    }
}
