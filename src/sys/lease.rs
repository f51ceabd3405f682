//! Making sure that nobody is writing to a file, and that nobody begins to.
//!
//! A lease of fcntl(2) is granted only while no process has the file open for writing, mapped
//! memory included, however it got at it. Who opens it for writing after that waits until the lease
//! is given back, at most the kernel's `lease-break-time`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Which signal a broken lease sends; the C library's crate does not name it.
const F_SETSIG: libc::c_int = 10;

/// Keeps writers away from a file until it is dropped.
pub struct Unwritten<'a>(#[allow(dead_code)] Option<&'a File>);

impl Unwritten<'_> {
    /// Keeps writers away from `file`, which is open for reading only. `None` if one has it open
    /// already. A file system that has no leases, or a file of somebody else's, is not guarded.
    pub fn guard(file: &File) -> io::Result<Option<Unwritten<'_>>> {
        // Who breaks the lease sends a signal, by default one that ends the process. This one does
        // nothing unless it is asked for.
        fcntl(file, F_SETSIG, libc::SIGURG)?;
        match fcntl(file, libc::F_SETLEASE, libc::F_RDLCK) {
            Ok(()) => Ok(Some(Unwritten(Some(file)))),
            Err(e) => match e.raw_os_error() {
                Some(libc::EAGAIN) => Ok(None),
                Some(libc::EINVAL | libc::EACCES | libc::EOPNOTSUPP) => Ok(Some(Unwritten(None))),
                _ => Err(e),
            },
        }
    }
}

impl Drop for Unwritten<'_> {
    fn drop(&mut self) {
        if let Some(file) = self.0 {
            // It ends with the descriptor at the latest.
            let _ = fcntl(file, libc::F_SETLEASE, libc::F_UNLCK);
        }
    }
}

fn fcntl(file: &File, command: libc::c_int, argument: libc::c_int) -> io::Result<()> {
    // SAFETY: these commands take a number and touch no memory; the descriptor is open.
    #[allow(unsafe_code)]
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::io::Write;

    #[test]
    fn a_writer_is_seen_and_one_that_comes_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "x").unwrap();
        let file = File::open(&path).unwrap();
        let writer = OpenOptions::new().append(true).open(&path).unwrap();
        assert!(Unwritten::guard(&file).unwrap().is_none());
        drop(writer);
        let lease = Unwritten::guard(&file).unwrap().unwrap();
        assert!(lease.0.is_some(), "no leases below {}", dir.path().display());
        let come = std::thread::spawn({
            let path = path.clone();
            move || OpenOptions::new().append(true).open(path).unwrap().write_all(b"y").unwrap()
        });
        std::fs::remove_file(&path).unwrap();
        drop(lease);
        // It opened the file before its name went, or finds none.
        let _ = come.join();
        assert!(!path.exists());
    }
}
