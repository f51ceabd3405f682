//! What writing a tree out needs of the kernel: files made and taken over, blocks shared, advice.
//!
//! As in `at`, one component at a time below an open directory, and no link is followed.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Advice, Mode, OFlags, ResolveFlags};

/// Permission bits of a file that is not complete: no reader but its owner's by force, and so odd
/// that nobody else gives a file just these.
pub const UNFINISHED_MODE: u32 = 0o200;

/// Creates regular file `name`, which must not exist, for reading and writing, with
/// [`UNFINISHED_MODE`].
pub fn create_unfinished(dir: impl AsFd, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(UNFINISHED_MODE))?))
}

/// Opens `name` for reading and writing in place. Neither follows a link nor waits on a FIFO; the
/// caller checks that it is the file it means.
pub fn open_in_place(dir: impl AsFd, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?))
}

/// Opens directory `name` if it lies in the same mount as `dir`: no link and no mount point is
/// crossed (`EXDEV`).
pub fn open_dir_in_mount(dir: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    Ok(rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve)?)
}

/// Makes a range of `dest` share the blocks of a range of `source`, which copies nothing. Offsets
/// are multiples of the file system's block, and so is `len` unless it reaches the source's end.
pub fn clone_range(
    source: &File,
    source_offset: u64,
    len: u64,
    dest: impl AsFd,
    dest_offset: u64,
) -> io::Result<()> {
    let range = libc::file_clone_range {
        src_fd: source.as_raw_fd().into(),
        src_offset: source_offset,
        src_length: len,
        dest_offset,
    };
    let dest = dest.as_fd();
    // SAFETY: both descriptors are open for the length of the call, and the kernel only reads the
    // structure, which is of the layout that this request has.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(dest.as_raw_fd(), libc::FICLONERANGE, &raw const range) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes all of `dest`, which is empty, share the blocks of `source`.
pub fn clone_file(source: &File, dest: impl AsFd) -> io::Result<()> {
    clone_range(source, 0, 0, dest, 0)
}

/// Tells the kernel to read a range ahead. Advice only.
pub fn will_need(file: &File, offset: u64, len: u64) {
    let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(len), Advice::WillNeed);
}

/// Asks the kernel to forget what it has cached of a file, so that the next read is the disk's
/// word. What has not been written out stays: sync first. Advice only.
pub fn drop_cached(file: &File) {
    let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
}

/// How many pages of a file the kernel has cached; `None` where it does not say.
pub fn cached_pages(file: &File) -> Option<u64> {
    /// `cachestat(2)`: the same number on all machines since it came with Linux 6.5.
    const CACHESTAT: libc::c_long = 451;
    // All of the file: an offset and no length.
    let range = [0u64; 2];
    let mut found = [0u64; 5];
    // SAFETY: the kernel reads a `struct cachestat_range` and writes a `struct cachestat`, which
    // are two and five numbers of 64 bits, and keeps neither. One without the call says so.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), found.as_mut_ptr(), 0)
    };
    (result == 0).then(|| found.first().copied().unwrap_or_default())
}

/// Writes out everything of the file system that holds `fd`.
pub fn sync_file_system(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::syncfs(fd)?)
}

/// Frees a range of a file within its size: it reads as zeros and takes no room.
pub fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, mode, offset, len)?)
}
