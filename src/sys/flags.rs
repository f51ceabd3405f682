//! File flags: what `chattr` sets and `lsattr` shows, as the numbers of `FS_IOC_GETFLAGS`.
//!
//! Only for descriptors of regular files and directories that are open, not `O_PATH` handles: other
//! kinds have no flags, and asking a device would be a command to the device.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::IFlags;
use rustix::io::Errno;

/// The request of ioctl(2) that asks for a file's flags. Its number carries the size of a C `long`,
/// though four bytes are read.
pub const GET_FLAGS: u32 = rustix::ioctl::opcode::read::<std::ffi::c_long>(b'f', 1);

/// The flags of an open file, or `None` where the file system has no flags.
pub fn file_flags(fd: impl AsFd) -> io::Result<Option<u32>> {
    match rustix::fs::ioctl_getflags(fd) {
        Ok(flags) => Ok(Some(flags.bits())),
        Err(Errno::NOTTY | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Sets all flags of an open file.
pub fn set_file_flags(fd: impl AsFd, flags: u32) -> io::Result<()> {
    Ok(rustix::fs::ioctl_setflags(fd, IFlags::from_bits_retain(flags))?)
}

/// Flags as the kernel expects them in an answer to [`GET_FLAGS`].
pub fn answer(flags: u32) -> [u8; 4] {
    // For this machine's kernel, and nothing that is kept.
    #[allow(clippy::disallowed_methods)]
    flags.to_ne_bytes()
}
