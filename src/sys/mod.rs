//! The kernel, as the rest of the program sees it: every `unsafe` line and every call of libc and
//! rustix is in this room.
//!
//! Names are bytes throughout. What this program did not create itself is opened with
//! `O_NOFOLLOW | O_NONBLOCK` and checked afterwards, so a planted link or FIFO can neither redirect
//! nor block it. A rename that has to last goes through [`rename_durable`], which syncs.

pub mod at;
pub mod flags;
pub mod lease;
pub mod lock;
pub mod process;
pub mod tape;
pub mod target;
pub mod user;

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};

use crate::error::{Error, Quoted, Result};

/// Error numbers and mode bits by their C names.
pub mod c {
    pub use libc::{
        E2BIG, EACCES, EAGAIN, EBADF, EBUSY, ECANCELED, ECONNABORTED, EDEADLK, EDQUOT, EEXIST,
        EFBIG, EINTR, EINVAL, EIO, EISDIR, ELOOP, EMFILE, EMLINK, ENAMETOOLONG, ENFILE, ENODATA,
        ENOENT, ENOMEDIUM, ENOMEM, ENOSPC, ENOSYS, ENOTCONN, ENOTDIR, ENOTEMPTY, ENOTTY, ENXIO,
        EOPNOTSUPP, EOVERFLOW, EPERM, ERANGE, EROFS, ESTALE, EXDEV, O_ACCMODE, O_APPEND, O_CREAT,
        O_DIRECT, O_EXCL, O_NOFOLLOW, O_NONBLOCK, O_RDONLY, O_RDWR, O_TRUNC, O_WRONLY,
        RENAME_EXCHANGE, RENAME_NOREPLACE, S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT,
        S_IFREG, S_IFSOCK, S_ISGID, S_ISUID, S_ISVTX, SEEK_DATA, SEEK_HOLE,
    };
}

/// A moment as the kernel keeps it: whole seconds since 1970 (negative before) and nanoseconds.
///
/// Not one number of nanoseconds: 64 bits of those end in 2262, file systems do not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time {
    /// Seconds since 1970-01-01 00:00 UTC.
    pub secs: i64,
    /// Nanoseconds after that, below 1,000,000,000.
    pub nanos: u32,
}

impl Time {
    /// The clock's time now.
    pub fn now() -> Time {
        Time::from(std::time::SystemTime::now())
    }
}

impl From<std::time::SystemTime> for Time {
    fn from(time: std::time::SystemTime) -> Time {
        match time.duration_since(std::time::UNIX_EPOCH) {
            Ok(after) => Time { secs: after.as_secs().cast_signed(), nanos: after.subsec_nanos() },
            Err(before) => {
                let before = before.duration();
                match before.subsec_nanos() {
                    0 => Time { secs: -before.as_secs().cast_signed(), nanos: 0 },
                    n => {
                        Time { secs: -before.as_secs().cast_signed() - 1, nanos: 1_000_000_000 - n }
                    }
                }
            }
        }
    }
}

/// What `stat(2)` says of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Device that holds the file.
    pub dev: u64,
    /// Inode number on that device.
    pub ino: u64,
    /// File type and permission bits.
    pub mode: u32,
    /// Number of names.
    pub nlink: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number, for device nodes.
    pub rdev: u64,
    /// Size in bytes.
    pub size: u64,
    /// Space used, in units of 512 bytes.
    pub blocks: u64,
    /// Last access.
    pub atime: Time,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of content or metadata.
    pub ctime: Time,
}

impl Stat {
    /// Whether this is a directory.
    pub fn is_dir(&self) -> bool {
        self.mode & c::S_IFMT == c::S_IFDIR
    }

    /// Whether this is a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & c::S_IFMT == c::S_IFREG
    }

    fn from_rustix(it: &rustix::fs::Stat) -> Stat {
        // The C types differ from one architecture to the next; `as` is what makes this portable.
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::unnecessary_cast,
            trivial_numeric_casts
        )]
        let stat = Stat {
            dev: it.st_dev as u64,
            ino: it.st_ino as u64,
            mode: it.st_mode as u32,
            nlink: it.st_nlink as u64,
            uid: it.st_uid as u32,
            gid: it.st_gid as u32,
            rdev: it.st_rdev as u64,
            size: it.st_size as u64,
            blocks: it.st_blocks as u64,
            atime: Time { secs: it.st_atime as i64, nanos: it.st_atime_nsec as u32 },
            mtime: Time { secs: it.st_mtime as i64, nanos: it.st_mtime_nsec as u32 },
            ctime: Time { secs: it.st_ctime as i64, nanos: it.st_ctime_nsec as u32 },
        };
        stat
    }
}

/// Stats an open file.
pub fn fstat(fd: impl AsFd) -> io::Result<Stat> {
    Ok(Stat::from_rustix(&rustix::fs::fstat(fd)?))
}

/// Stats a path, following a link in its last component.
pub fn stat(path: &Path) -> io::Result<Stat> {
    Ok(Stat::from_rustix(&rustix::fs::stat(path)?))
}

/// Stats a path without following a link in its last component.
pub fn lstat(path: &Path) -> io::Result<Stat> {
    Ok(Stat::from_rustix(&rustix::fs::lstat(path)?))
}

/// Opens a directory for listing and for calls relative to it; a link as last component is refused.
pub fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Makes the names in directory `path` durable.
pub fn sync_dir(path: &Path) -> Result<()> {
    let what = || format!("syncing directory {}", quoted(path));
    let dir = File::open(path).map_err(|e| Error::io(what(), e))?;
    dir.sync_all().map_err(|e| Error::io(what(), e))
}

/// Renames within one file system so that a crash leaves the old or the new name, never neither.
/// The content must have been synced before; both directories are synced after.
pub fn rename_durable(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to)
        .map_err(|e| Error::io(format!("renaming {} to {}", quoted(from), quoted(to)), e))?;
    let parent = |it: &Path| it.parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf);
    sync_dir(&parent(to))?;
    if parent(from) != parent(to) {
        sync_dir(&parent(from))?;
    }
    Ok(())
}

/// Options for files that are nobody else's business: a store holds everybody's data.
pub fn private_file() -> std::fs::OpenOptions {
    let mut options = File::options();
    options.mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options
}

/// Makes a directory that only its owner may enter; one that is there already stays as it is.
pub fn make_private_dir(path: &Path) -> io::Result<bool> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e),
    }
}

/// Makes a directory as [`make_private_dir`], and what is missing above it; all of it lasts.
pub fn make_private_dirs(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|it| !it.as_os_str().is_empty());
    let sync = || File::open(parent.unwrap_or(Path::new(".")))?.sync_all();
    if path.is_dir() {
        // Perhaps made by a process that died before this: then it can be synced. What cannot be
        // was there before.
        let _ = sync();
        return Ok(());
    }
    parent.map_or(Ok(()), make_private_dirs)?;
    make_private_dir(path)?;
    sync()
}

/// Makes a directory that others may enter too, and what is missing above it. The mask of a mount's
/// process is open, so the mode is said.
pub fn make_dirs(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(path)
}

/// The name under which a file is written before it gets its own.
pub fn new_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    path.with_file_name(name)
}

/// Replaces file `path` by `content`: a reader or a crash sees the old or the new one, whole.
pub fn replace_file(path: &Path, content: &[u8]) -> Result<()> {
    rename_durable(&prepare_file(path, content)?, path)
}

/// Reads a file that is not meant to be long. One that is longer than `max` bytes is refused.
pub fn read_small(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(File::open(path)?, max + 1), &mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("over {max} bytes long")));
    }
    Ok(bytes)
}

/// Writes what file `path` is to become, under the name that this gives, and syncs it.
pub fn prepare_file(path: &Path, content: &[u8]) -> Result<PathBuf> {
    let new = new_name(path);
    let what = || format!("writing {}", quoted(&new));
    let write = || -> io::Result<()> {
        let mut file = private_file().write(true).create(true).truncate(true).open(&new)?;
        io::Write::write_all(&mut file, content)?;
        file.sync_all()
    };
    write().map_err(|e| Error::io(what(), e))?;
    Ok(new)
}

/// Free and total space of a file system, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Size of the file system.
    pub total_bytes: u64,
    /// Free for an ordinary user.
    pub free_bytes: u64,
    /// Free beside that, for root alone.
    pub root_bytes: u64,
    /// Inodes in all.
    pub total_inodes: u64,
    /// Inodes free.
    pub free_inodes: u64,
}

impl Space {
    fn of(it: &rustix::fs::StatVfs) -> Space {
        Space {
            total_bytes: it.f_blocks.saturating_mul(it.f_frsize),
            free_bytes: it.f_bavail.saturating_mul(it.f_frsize),
            root_bytes: it.f_bfree.saturating_sub(it.f_bavail).saturating_mul(it.f_frsize),
            total_inodes: it.f_files,
            free_inodes: it.f_favail,
        }
    }
}

/// Space of the file system that holds `path`.
pub fn space(path: &Path) -> io::Result<Space> {
    Ok(Space::of(&rustix::fs::statvfs(path)?))
}

/// Tells the kernel to start writing out the dirty pages of a range, without waiting for it, so
/// that a later sync finds little left to do. Advice only: errors do not matter.
pub fn start_writeback(file: &File, offset: u64, len: u64) {
    use std::os::fd::AsRawFd;
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else { return };
    // SAFETY: the descriptor is open for the length of the call and no memory is passed.
    #[allow(unsafe_code)]
    unsafe {
        libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE);
    }
}

/// Tells the kernel that `file` will be read from start to end.
pub fn advise_sequential(file: impl AsFd) {
    // Advice only: a file system that does not know it reads just as right.
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Sequential);
}

/// Bytes of memory that the machine has.
pub fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(info.mem_unit.into())
}

/// Has the kernel start reading a file into its cache, without waiting for it.
pub fn advise_will_need(file: impl AsFd) {
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::WillNeed);
}

/// Waits until reading `fd` would not block, or has nothing to wait for; `false` after `limit`.
pub fn wait_readable(fd: impl AsFd, limit: std::time::Duration) -> io::Result<bool> {
    use std::os::fd::AsRawFd;
    let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    let mut poll = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd is passed and its count is one; it outlives the call, and so does `fd`.
    #[allow(unsafe_code)]
    let ready = unsafe { libc::poll(&raw mut poll, 1, limit) };
    match ready {
        0 => Ok(false),
        1.. => Ok(true),
        _ => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(false),
            e => Err(e),
        },
    }
}

/// The next part of `file` at or after `from` that holds data, as (start, end); `None` when only a
/// hole is left. A file system without holes answers one part up to `size`.
pub fn next_data(file: &File, from: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    use rustix::fs::SeekFrom;
    use rustix::io::Errno;
    if from >= size {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((from, size))),
        Err(e) => return Err(e.into()),
    };
    let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
        Ok(end) => end.min(size),
        Err(Errno::NXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    Ok((start < end).then_some((start, end)))
}

/// Whether an open file is one of procfs, whose sizes are inventions. If it cannot be asked, it is
/// not.
pub fn is_proc(file: impl AsFd) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|it| it.f_type == rustix::fs::PROC_SUPER_MAGIC)
}

/// Raises the number of files this process may have open to the most it is allowed.
pub fn raise_open_files_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = |to| setrlimit(Resource::Nofile, Rlimit { current: to, maximum: to });
    // Only root may have more than the session that started us.
    let more = Some(OPEN_FILES_WANTED).filter(|it| limit.maximum.is_some_and(|max| max < *it));
    if more.is_none_or(|more| raised(Some(more)).is_err()) {
        // A refusal leaves the old limit, which is enough for ordinary trees.
        let _ = raised(limit.maximum);
    }
}

/// What Linux allows a process at most, unless it is told otherwise: a mount has a file open for
/// each that somebody has open in it.
const OPEN_FILES_WANTED: u64 = 1 << 20;

/// The number of files this process may have open at once.
pub fn open_files_limit() -> u64 {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The user this process acts as.
pub fn effective_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// The group this process acts as.
pub fn effective_gid() -> u32 {
    rustix::process::getegid().as_raw()
}

/// Sets the mask of permission bits that are cleared in what this process creates.
///
/// For the whole process: call it once, before threads create files.
pub fn set_umask(mask: u32) {
    rustix::process::umask(Mode::from_raw_mode(mask));
}

/// Detaches a mount; open files on it stay usable until they are closed.
pub fn unmount_lazy(path: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH)?)
}

/// The number that device node numbers are made of: (major, minor).
pub fn device_parts(rdev: u64) -> (u32, u32) {
    (rustix::fs::major(rdev), rustix::fs::minor(rdev))
}

/// The device number of (major, minor).
pub fn device_number(major: u32, minor: u32) -> u64 {
    rustix::fs::makedev(major, minor)
}

/// Whether `fd` is still the file that `stat` describes.
pub fn is_same_file(fd: BorrowedFd<'_>, stat: &Stat) -> io::Result<bool> {
    let now = fstat(fd)?;
    Ok(now.dev == stat.dev && now.ino == stat.ino)
}

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountPoint {
    /// Number of the mount, which no other one has now.
    pub id: u64,
    /// Number of the mount that it is mounted in.
    pub parent: u64,
    /// Device number of the file system, which nothing else has as long as that is in use.
    pub device: u64,
    /// Where.
    pub path: PathBuf,
    /// Its type, as in `fuse.raidtape`.
    pub fs_type: Vec<u8>,
    /// What is mounted: for a mount of this program its catalog.
    pub source: Vec<u8>,
}

/// The type under which the kernel lists the mounts of this program.
pub const OWN_FS_TYPE: &[u8] = b"fuse.raidtape";

/// All mounts that this process sees.
pub fn mount_points() -> io::Result<Vec<MountPoint>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(parse_mount).collect())
}

/// A line of mountinfo: six fields, optional ones, a dash, then type, source and options.
fn parse_mount(line: &[u8]) -> Option<MountPoint> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let (id, parent) = (text()?.parse().ok()?, text()?.parse().ok()?);
    let device = text()?.split_once(':')?;
    let device = device_number(device.0.parse().ok()?, device.1.parse().ok()?);
    let path = fields.nth(1)?;
    let path = PathBuf::from(path_from(&unescape_octal(path)));
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let (fs_type, source) = (fields.next()?.to_vec(), unescape_octal(fields.next()?));
    Some(MountPoint { id, parent, device, path, fs_type, source })
}

/// Undoes the `\040` of mountinfo.
fn unescape_octal(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|it| std::str::from_utf8(it).ok());
        let code = digits.and_then(|it| u8::from_str_radix(it, 8).ok());
        match code.filter(|_| byte == b'\\') {
            Some(code) => {
                out.push(code);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    out
}

/// A path for a message.
pub fn quoted(path: &Path) -> Quoted<'_> {
    Quoted(path.as_os_str().as_bytes())
}

/// A path from bytes.
pub fn path_from(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// The name of this machine, as bytes.
pub fn host_name() -> Vec<u8> {
    rustix::system::uname().nodename().to_bytes().to_vec()
}

/// An unopened look at a name relative to a directory, without following a link.
pub(crate) fn stat_at(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<Stat> {
    Ok(Stat::from_rustix(&rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, UNIX_EPOCH};

    proptest! {
        #[test]
        fn mount_points_come_back(path in prop::collection::vec(1u8.., 1..60), plain in "/[a-z]+") {
            // As the kernel writes them.
            let escape = |byte: &u8| match byte {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
                other => vec![*other],
            };
            let escaped: Vec<u8> = path.iter().flat_map(escape).collect();
            prop_assert_eq!(&unescape_octal(&escaped), &path);
            let line = [b"1 2 0:3 / ", &escaped[..], b" rw - ext4 ", plain.as_bytes(), b" rw"];
            let mount = parse_mount(&line.concat()).unwrap();
            prop_assert_eq!(mount.path.as_os_str().as_bytes(), &path);
            prop_assert_eq!(mount.fs_type, b"ext4");
        }

        #[test]
        fn any_mount_line_is_read_or_refused(line: Vec<u8>, text in "[ a-z0-7\\\\-]{0,60}") {
            let _ = parse_mount(&line);
            let _ = parse_mount(text.as_bytes());
        }
    }

    #[test]
    fn files_of_procfs_are_told_apart() {
        assert!(is_proc(File::open("/proc/version").unwrap()));
        assert!(!is_proc(tempfile::tempfile().unwrap()));
    }

    #[test]
    fn mounts_with_strange_names_are_read() {
        let line =
            b"36 35 98:0 / /mnt/a\\040b\\134c rw,noatime shared:1 - fuse.raidtape /c\\040d rw";
        let mount = parse_mount(line).unwrap();
        assert_eq!(mount.path, Path::new("/mnt/a b\\c"));
        assert_eq!((mount.id, mount.parent), (36, 35));
        assert_eq!((&*mount.fs_type, &*mount.source), (&b"fuse.raidtape"[..], &b"/c d"[..]));
        assert_eq!(device_parts(mount.device), (98, 0));
        assert_eq!(parse_mount(b"nonsense"), None);
    }

    #[test]
    fn times_before_1970_count_forward_from_the_whole_second() {
        let time = Time::from(UNIX_EPOCH - Duration::from_millis(500));
        assert_eq!(time, Time { secs: -1, nanos: 500_000_000 });
        assert_eq!(Time::from(UNIX_EPOCH - Duration::from_secs(2)), Time { secs: -2, nanos: 0 });
    }
}
