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
        Errno(error.raw_os_error().unwrap_or(c::EIO))
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
            ErrorKind::NoCatalog
            | ErrorKind::Offline
            | ErrorKind::Corrupt
            | ErrorKind::WrongTape
            | ErrorKind::Version
            | ErrorKind::Io => Errno(c::EIO),
        }
    }
}
