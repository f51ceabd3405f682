//! The errno table: what an [`ErrorKind`] becomes when the kernel has to be answered.
//!
//! The only place that decides it; the exit code table in `cli` is its twin.

use std::io;

use crate::error::{Error, ErrorKind};
use crate::sys::c;

/// An error number for the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

/// Result of a file system operation.
pub type FsResult<T> = Result<T, Errno>;

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Errno {
        match error.raw_os_error() {
            // It is this process that has too many files open, not the one that asked.
            Some(c::EMFILE) => Errno(c::ENFILE),
            number => Errno(number.unwrap_or(c::EIO)),
        }
    }
}

impl From<&Error> for Errno {
    fn from(error: &Error) -> Errno {
        match error.kind() {
            ErrorKind::Usage => Errno(c::EINVAL),
            ErrorKind::NotFound => Errno(c::ENOENT),
            ErrorKind::Locked => Errno(c::EBUSY),
            ErrorKind::Denied => Errno(c::EACCES),
            ErrorKind::NoSpace => Errno(c::ENOSPC),
            ErrorKind::Interrupted => Errno(c::EINTR),
            ErrorKind::OnTape => Errno(c::ENOMEDIUM),
            ErrorKind::NoCatalog
            | ErrorKind::Offline
            | ErrorKind::Corrupt
            | ErrorKind::WrongTape
            | ErrorKind::Version
            | ErrorKind::Io => Errno(c::EIO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_is_not_told_that_he_has_too_many_files_open() {
        let ours = io::Error::from_raw_os_error(c::EMFILE);
        assert_eq!(Errno::from(ours), Errno(c::ENFILE));
        assert_eq!(Errno::from(io::Error::from_raw_os_error(c::ENOSPC)), Errno(c::ENOSPC));
    }
}
