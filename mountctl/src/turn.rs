//! The turn to mount or unmount on a directory.
//!
//! Invariant: who has it, this program or a daemon on its way up, is alone with the mount point.
//! It is the lock of the directory above, which all users have in common; where that cannot be had
//! there is none.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::shown::shown;

const PAUSE: Duration = Duration::from_millis(10);

/// Waits for the turn, which lasts until the file is dropped.
pub fn wait(point: &Path, deadline: Instant) -> Result<Option<File>, Failure> {
    let Ok(above) = File::open(point.parent().unwrap_or(point)) else {
        return Ok(None);
    };
    loop {
        match above.try_lock() {
            Ok(()) => return Ok(Some(above)),
            Err(TryLockError::Error(_)) => return Ok(None),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => thread::sleep(PAUSE),
            Err(TryLockError::WouldBlock) => {
                return Err(Failure::failed(format!(
                    "another program is mounting on {} or beside it: try again later",
                    shown(point)
                )));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

    use super::*;

    #[test]
    fn one_has_the_turn_and_the_next_gets_it_after_that() {
        let directory = tempfile::tempdir().unwrap();
        let point = directory.path().join("point");
        let first = wait(&point, Instant::now()).unwrap();
        assert!(first.is_some());
        let failure = wait(&point, Instant::now()).unwrap_err();
        assert!(failure.message.contains("another program"), "{failure:?}");
        drop(first);
        assert!(wait(&point, Instant::now()).unwrap().is_some());
        assert!(wait(&point.join("absent/x"), Instant::now()).unwrap().is_none());
    }
}
