//! Calls relative to an open directory.
//!
//! Everything that walks or writes a tree goes through here, one component at a time, so paths may
//! be longer than `PATH_MAX` and a link swapped in by somebody else is never followed.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid, XattrFlags,
};

use super::{Stat, Time};

/// Stats `name` in `dir` without following a link.
pub fn stat(dir: impl AsFd, name: &OsStr) -> io::Result<Stat> {
    super::stat_at(dir.as_fd(), name)
}

/// Opens directory `name` in `dir`; a link is refused (`ENOTDIR` or `ELOOP`).
pub fn open_dir(dir: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

/// Opens directory `name` in `dir` for listing; its time of last access is left alone where the
/// kernel allows that.
pub fn open_dir_to_list(dir: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(&dir, name, flags | OFlags::NOATIME, Mode::empty()) {
        Err(rustix::io::Errno::PERM) => open_dir(dir, name),
        other => Ok(other?),
    }
}

/// Opens regular file `name` in `dir` for reading. Neither follows a link nor waits on a FIFO; the
/// caller compares the result with what it had seen before it reads.
///
/// The time of last access is left alone where the kernel allows that.
pub fn open_read(dir: impl AsFd, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::openat(&dir, name, flags | OFlags::NOATIME, Mode::empty()) {
        Err(rustix::io::Errno::PERM) => {}
        other => return Ok(File::from(other?)),
    }
    Ok(File::from(rustix::fs::openat(&dir, name, flags, Mode::empty())?))
}

/// Opens a handle on `name` that only stands for it (`O_PATH`), link or not.
pub fn open_path(dir: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

/// Opens `name` in `dir` with open(2) flags given as numbers; no link is followed.
pub fn open_flags(dir: impl AsFd, name: &OsStr, flags: i32, mode: u32) -> io::Result<OwnedFd> {
    let flags = OFlags::from_bits_retain(flags.cast_unsigned());
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(mode))?)
}

/// Opens anew, with open(2) flags, the file that `fd` (an `O_PATH` handle) stands for.
pub fn reopen(fd: impl AsFd, flags: i32) -> io::Result<OwnedFd> {
    let flags = OFlags::from_bits_retain(flags.cast_unsigned());
    let flags = flags.difference(OFlags::NOFOLLOW | OFlags::CREATE) | OFlags::CLOEXEC;
    Ok(rustix::fs::open(proc_path(&fd), flags, Mode::empty())?)
}

/// Creates regular file `name`, which must not exist, for writing; readable by its owner alone
/// until its metadata is set.
pub fn create_file(dir: impl AsFd, name: &OsStr) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)?))
}

/// Makes directory `name`.
pub fn mkdir(dir: impl AsFd, name: &OsStr, mode: u32) -> io::Result<()> {
    Ok(rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(mode))?)
}

/// Makes a node of any kind but a directory or a link; `mode` holds type and permissions.
pub fn mknod(dir: impl AsFd, name: &OsStr, mode: u32, rdev: u64) -> io::Result<()> {
    let kind = FileType::from_raw_mode(mode);
    Ok(rustix::fs::mknodat(dir, name, kind, Mode::from_raw_mode(mode), rdev)?)
}

/// Makes symbolic link `name` to `target`.
pub fn symlink(target: &OsStr, dir: impl AsFd, name: &OsStr) -> io::Result<()> {
    Ok(rustix::fs::symlinkat(target, dir, name)?)
}

/// Reads a symbolic link.
pub fn readlink(dir: impl AsFd, name: &OsStr) -> io::Result<OsString> {
    let target = rustix::fs::readlinkat(dir, name, Vec::new())?;
    Ok(OsString::from_vec(target.into_bytes()))
}

/// Reads the symbolic link that `fd` (an `O_PATH` handle) stands for.
pub fn readlink_fd(fd: impl AsFd) -> io::Result<OsString> {
    readlink(fd, OsStr::new(""))
}

/// Gives `name` in `dir` a further name; a symbolic link itself is linked, never its target.
pub fn link(dir: impl AsFd, name: &OsStr, new_dir: impl AsFd, new_name: &OsStr) -> io::Result<()> {
    Ok(rustix::fs::linkat(dir, name, new_dir, new_name, AtFlags::empty())?)
}

/// Gives the file that `fd` (an `O_PATH` handle) stands for a further name.
pub fn link_fd(fd: impl AsFd, new_dir: impl AsFd, new_name: &OsStr) -> io::Result<()> {
    let flags = AtFlags::SYMLINK_FOLLOW;
    Ok(rustix::fs::linkat(rustix::fs::CWD, proc_path(&fd), new_dir, new_name, flags)?)
}

/// Removes `name`, which is not a directory.
pub fn unlink(dir: impl AsFd, name: &OsStr) -> io::Result<()> {
    Ok(rustix::fs::unlinkat(dir, name, AtFlags::empty())?)
}

/// Removes empty directory `name`.
pub fn rmdir(dir: impl AsFd, name: &OsStr) -> io::Result<()> {
    Ok(rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)?)
}

/// Renames, with the flags of renameat2(2).
pub fn rename(
    dir: impl AsFd,
    name: &OsStr,
    new_dir: impl AsFd,
    new_name: &OsStr,
    flags: u32,
) -> io::Result<()> {
    let flags = RenameFlags::from_bits_retain(flags);
    Ok(rustix::fs::renameat_with(dir, name, new_dir, new_name, flags)?)
}

/// Changes owner and group of `name` itself; `None` leaves one as it is.
pub fn chown(dir: impl AsFd, name: &OsStr, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
    let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
    Ok(rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Changes owner and group of the file that `fd` (an `O_PATH` handle will do) stands for.
pub fn chown_fd(fd: impl AsFd, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
    let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
    Ok(rustix::fs::chownat(fd, "", uid, gid, AtFlags::EMPTY_PATH)?)
}

/// Sets the permission bits of `name`, which must not be a link.
pub fn chmod(dir: impl AsFd, name: &OsStr, mode: u32) -> io::Result<()> {
    // There is no chmod that refuses links on every kernel we run on; an O_PATH handle that is
    // known not to be a link, reached through /proc, is the portable way.
    let handle = open_path(dir, name)?;
    chmod_fd(&handle, mode)
}

/// Sets the permission bits of the file that `fd` stands for (an `O_PATH` handle will do, but not
/// one of a link).
pub fn chmod_fd(fd: impl AsFd, mode: u32) -> io::Result<()> {
    if super::fstat(&fd)?.mode & super::c::S_IFMT == super::c::S_IFLNK {
        return Err(io::Error::from_raw_os_error(super::c::EOPNOTSUPP));
    }
    Ok(rustix::fs::chmod(proc_path(&fd), Mode::from_raw_mode(mode & 0o7777))?)
}

/// Sets times of last access and change of `name` itself; `None` leaves one as it is.
pub fn set_times(
    dir: impl AsFd,
    name: &OsStr,
    atime: Option<Time>,
    mtime: Option<Time>,
) -> io::Result<()> {
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    Ok(rustix::fs::utimensat(dir, name, &timestamps(atime, mtime), flags)?)
}

/// Sets times of the file that `fd` stands for (an `O_PATH` handle will do).
pub fn set_times_fd(fd: impl AsFd, atime: Option<Time>, mtime: Option<Time>) -> io::Result<()> {
    Ok(rustix::fs::utimensat(fd, "", &timestamps(atime, mtime), AtFlags::EMPTY_PATH)?)
}

fn timestamps(atime: Option<Time>, mtime: Option<Time>) -> Timestamps {
    let spec = |time: Option<Time>| match time {
        Some(time) => Timespec { tv_sec: time.secs, tv_nsec: time.nanos.into() },
        None => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
    };
    Timestamps { last_access: spec(atime), last_modification: spec(mtime) }
}

/// The names of all extended attributes of `name` itself. Empty where the file system has none.
pub fn list_xattrs(dir: impl AsFd, name: &OsStr) -> io::Result<Vec<OsString>> {
    let path = proc_child(&dir, name);
    split_names(grow(|buf| rustix::fs::llistxattr(&path, buf)))
}

/// The names of all extended attributes of the file that `fd` stands for.
pub fn list_xattrs_fd(fd: impl AsFd) -> io::Result<Vec<OsString>> {
    let path = proc_path(&fd);
    split_names(grow(|buf| rustix::fs::listxattr(&path, buf)))
}

/// One extended attribute of `name` itself.
pub fn get_xattr(dir: impl AsFd, name: &OsStr, key: &OsStr) -> io::Result<Vec<u8>> {
    let path = proc_child(&dir, name);
    Ok(grow(|buf| rustix::fs::lgetxattr(&path, key, buf))?)
}

/// One extended attribute of the file that `fd` stands for.
pub fn get_xattr_fd(fd: impl AsFd, key: &OsStr) -> io::Result<Vec<u8>> {
    let path = proc_path(&fd);
    Ok(grow(|buf| rustix::fs::getxattr(&path, key, buf))?)
}

/// Sets an extended attribute of `name` itself.
pub fn set_xattr(dir: impl AsFd, name: &OsStr, key: &OsStr, value: &[u8]) -> io::Result<()> {
    Ok(rustix::fs::lsetxattr(proc_child(&dir, name), key, value, XattrFlags::empty())?)
}

/// Sets an extended attribute of the file that `fd` stands for, with the flags of setxattr(2).
pub fn set_xattr_fd(fd: impl AsFd, key: &OsStr, value: &[u8], flags: u32) -> io::Result<()> {
    let flags = XattrFlags::from_bits_retain(flags);
    Ok(rustix::fs::setxattr(proc_path(&fd), key, value, flags)?)
}

/// Removes an extended attribute of the file that `fd` stands for.
pub fn remove_xattr_fd(fd: impl AsFd, key: &OsStr) -> io::Result<()> {
    Ok(rustix::fs::removexattr(proc_path(&fd), key)?)
}

/// One name in a directory, as getdents(2) reports it.
pub struct DirItem {
    /// The name.
    pub name: OsString,
    /// Inode number.
    pub ino: u64,
    /// File type bits of a mode, 0 where the file system does not tell.
    pub kind: u32,
    /// Where a listing that resumes after this name has to start.
    pub offset: i64,
}

/// A directory being listed. `.` and `..` are included.
pub struct DirReader(rustix::fs::Dir);

impl DirReader {
    /// Starts a listing; takes the directory's descriptor over.
    pub fn new(dir: OwnedFd) -> io::Result<DirReader> {
        Ok(DirReader(rustix::fs::Dir::new(dir)?))
    }

    /// Goes back to where `offset`, taken from a [`DirItem`] of this directory, says; 0 is the
    /// start.
    pub fn seek(&mut self, offset: i64) -> io::Result<()> {
        match offset {
            0 => self.0.rewind(),
            _ => self.0.seek(offset)?,
        }
        Ok(())
    }

    /// The next name, or `None` at the end.
    pub fn next_item(&mut self) -> Option<io::Result<DirItem>> {
        let item = match self.0.read()? {
            Ok(item) => item,
            Err(e) => return Some(Err(e.into())),
        };
        Some(Ok(DirItem {
            name: OsStr::from_bytes(item.file_name().to_bytes()).to_os_string(),
            ino: item.ino(),
            kind: match item.file_type() {
                FileType::Unknown => 0,
                known => known.as_raw_mode(),
            },
            offset: item.offset(),
        }))
    }
}

/// The way through /proc to the very file that `fd` stands for: works for `O_PATH` handles, on
/// which most calls on descriptors do not. Pass a reference: the path is good while `fd` is open.
fn proc_path(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

fn proc_child(dir: impl AsFd, name: &OsStr) -> PathBuf {
    proc_path(dir).join(name)
}

fn split_names(list: rustix::io::Result<Vec<u8>>) -> io::Result<Vec<OsString>> {
    let list = match list {
        Ok(list) => list,
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(e) => return Err(e.into()),
    };
    let names = list.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(|name| OsString::from_vec(name.to_vec())).collect())
}

/// Calls a function that fills a buffer, with larger buffers until its answer fits. The kernel's
/// own limit on attribute values and lists is 64 KiB.
fn grow<F>(mut call: F) -> rustix::io::Result<Vec<u8>>
where
    F: FnMut(&mut [u8]) -> rustix::io::Result<usize>,
{
    let mut buf = vec![0; 1 << 10];
    loop {
        match call(&mut buf) {
            Ok(len) => {
                buf.truncate(len);
                return Ok(buf);
            }
            Err(rustix::io::Errno::RANGE) if buf.len() < 1 << 17 => buf.resize(buf.len() * 4, 0),
            Err(e) => return Err(e),
        }
    }
}

/// Copies between two open files inside the kernel; the number of bytes copied.
pub fn copy_range(
    source: BorrowedFd<'_>,
    source_offset: u64,
    dest: BorrowedFd<'_>,
    dest_offset: u64,
    len: usize,
) -> io::Result<usize> {
    let (mut from, mut to) = (source_offset, dest_offset);
    Ok(rustix::fs::copy_file_range(source, Some(&mut from), dest, Some(&mut to), len)?)
}

/// Allocates, frees or zeroes a range, with the mode bits of fallocate(2).
pub fn fallocate(fd: impl AsFd, mode: u32, offset: u64, len: u64) -> io::Result<()> {
    let mode = rustix::fs::FallocateFlags::from_bits_retain(mode);
    Ok(rustix::fs::fallocate(fd, mode, offset, len)?)
}

/// Seeks to data or to a hole, with `SEEK_DATA` or `SEEK_HOLE`.
pub fn seek_hole_data(fd: impl AsFd, offset: u64, whence: i32) -> io::Result<u64> {
    let to = match whence {
        super::c::SEEK_DATA => rustix::fs::SeekFrom::Data(offset),
        super::c::SEEK_HOLE => rustix::fs::SeekFrom::Hole(offset),
        _ => return Err(io::Error::from_raw_os_error(super::c::EINVAL)),
    };
    Ok(rustix::fs::seek(fd, to)?)
}

/// Sets the permission bits of an open file (not an `O_PATH` handle).
pub fn fchmod(fd: impl AsFd, mode: u32) -> io::Result<()> {
    Ok(rustix::fs::fchmod(fd, Mode::from_raw_mode(mode & 0o7777))?)
}

/// The names of all extended attributes of an open file (not an `O_PATH` handle).
pub fn flist_xattrs(fd: impl AsFd) -> io::Result<Vec<OsString>> {
    split_names(grow(|buf| rustix::fs::flistxattr(&fd, buf)))
}

/// One extended attribute of an open file (not an `O_PATH` handle).
pub fn fget_xattr(fd: impl AsFd, key: &OsStr) -> io::Result<Vec<u8>> {
    Ok(grow(|buf| rustix::fs::fgetxattr(&fd, key, buf))?)
}

/// Removes an extended attribute of an open file (not an `O_PATH` handle).
pub fn fremove_xattr(fd: impl AsFd, key: &OsStr) -> io::Result<()> {
    Ok(rustix::fs::fremovexattr(fd, key)?)
}

/// Sets an extended attribute of an open file (not an `O_PATH` handle).
pub fn fset_xattr(fd: impl AsFd, key: &OsStr, value: &[u8]) -> io::Result<()> {
    Ok(rustix::fs::fsetxattr(fd, key, value, XattrFlags::empty())?)
}

/// Of the flags that a program gave to open(2), those that hold for a descriptor which serves it
/// by offset. Not `O_APPEND`: Linux lets pwrite(2) on such a descriptor ignore the offset. Not
/// `O_DIRECT`: the buffers in between are not aligned.
pub fn served_flags(flags: i32) -> i32 {
    flags & (libc::O_ACCMODE | libc::O_TRUNC | libc::O_SYNC | libc::O_DSYNC | libc::O_NOATIME)
}

/// Opens a handle that only stands for the file (`O_PATH`) which `fd` is open on.
pub fn path_handle(fd: impl AsFd) -> io::Result<OwnedFd> {
    reopen(fd, libc::O_PATH)
}

/// Space of the file system that holds `fd`.
pub fn space(fd: impl AsFd) -> io::Result<super::Space> {
    Ok(super::Space::of(&rustix::fs::fstatvfs(fd)?))
}

/// What a time of a file is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The kernel's own idea of now, which agrees with the times it sets itself.
    Now,
    /// A given moment.
    At(Time),
}

/// Sets times of the file that `fd` stands for (an `O_PATH` handle will do); `None` leaves one as
/// it is.
pub fn change_times_fd(
    fd: impl AsFd,
    atime: Option<SetTime>,
    mtime: Option<SetTime>,
) -> io::Result<()> {
    let spec = |time| match time {
        Some(SetTime::At(time)) => Timespec { tv_sec: time.secs, tv_nsec: time.nanos.into() },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
        None => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
    };
    let times = Timestamps { last_access: spec(atime), last_modification: spec(mtime) };
    Ok(rustix::fs::utimensat(fd, "", &times, AtFlags::EMPTY_PATH)?)
}
