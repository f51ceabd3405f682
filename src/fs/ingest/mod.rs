//! The writable `/ingest` tree of the mount: everything the kernel asks is done to a backing
//! directory, at once, with the kernel's own answers.
//!
//! Invariants: node numbers are the backing inode numbers; nothing outside the backing directory
//! and its file system is ever reached, whoever swaps links into it meanwhile; no lock is held
//! during a disk call, but for the position of the one directory handle that is being listed, and
//! one that only `clear` ever waits for or keeps to itself. Who changes anything passes that one.
//! Permissions are the kernel's business (`default_permissions`), and so is the type of a node.

pub mod clear;
mod handles;
mod nodes;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::fs::errno::{Errno, FsResult};
use crate::sys::at::DirReader;
use crate::sys::user::{Rights, as_user};
use crate::sys::{self, Space, Stat, at, c};
use clear::{Changes, Pass};
use handles::{Handles, OpenDir, OpenFile};
use nodes::Nodes;

pub use crate::sys::at::{DirItem, SetTime};

/// Idle handles that are kept at most, however many files the process may open.
const MAX_IDLE_HANDLES: u64 = 4096;

/// The access list that a directory hands down, which takes the umask's place.
const DEFAULT_ACL: &str = "system.posix_acl_default";

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User, who comes to own what is created.
    pub uid: u32,
    /// Main group.
    pub gid: u32,
    /// Permission bits that the caller does not want to be set.
    pub umask: u32,
}

/// Changes to make to a file; `None` leaves a thing as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits; the file type in it does not matter.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of the content.
    pub mtime: Option<SetTime>,
}

/// The ingest tree.
pub struct Ingest {
    nodes: Arc<Nodes>,
    root: Arc<OwnedFd>,
    /// The user and group of this process, when it may act as others.
    superuser: Option<(u32, u32)>,
    files: Handles<OpenFile>,
    dirs: Handles<OpenDir>,
    changes: Changes,
    /// Files of which something was lost, until somebody who closes them has been told.
    lost: Mutex<HashMap<u64, Errno>>,
}

impl Ingest {
    /// Opens the tree that is kept in `dir`, which is created for its owner alone when missing.
    pub fn new(dir: &Path) -> Result<Ingest> {
        let limit = MAX_IDLE_HANDLES.min(sys::open_files_limit() / 2);
        Ingest::with_fd_limit(dir, usize::try_from(limit).unwrap_or(usize::MAX))
    }

    /// Like [`Ingest::new`], keeping at most `limit` handles on nodes that nobody has open.
    pub fn with_fd_limit(dir: &Path, limit: usize) -> Result<Ingest> {
        let open = || -> io::Result<(OwnedFd, Stat)> {
            match DirBuilder::new().mode(0o700).create(dir) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                _ => {}
            }
            let root = sys::open_dir(dir)?;
            let stat = sys::fstat(&root)?;
            Ok((root, stat))
        };
        let what = || format!("opening ingest directory {}", sys::quoted(dir));
        let (root, stat) = open().map_err(|e| Error::io(what(), e))?;
        let root = Arc::new(root);
        let nodes = Nodes::new(Arc::clone(&root), &stat, limit)
            .map_err(|e| Error::io(what(), io::Error::from_raw_os_error(e.0)))?;
        let uid = sys::effective_uid();
        Ok(Ingest {
            nodes: Arc::new(nodes),
            root,
            superuser: (uid == 0).then(|| (uid, sys::effective_gid())),
            files: Handles::new(1),
            dirs: Handles::new(2),
            changes: Changes::default(),
            lost: Mutex::default(),
        })
    }

    /// The node number of the root.
    pub fn root(&self) -> u64 {
        self.nodes.root()
    }

    /// What `name` in `parent` is; its inode number is the node number. Counts one reference.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> FsResult<Stat> {
        let dir = self.dir(parent, name)?;
        let (fd, stat) = self.nodes.find(&dir, name)?;
        self.nodes.admit(parent, name, fd, &stat);
        Ok(stat)
    }

    /// Takes back `count` references.
    pub fn forget(&self, node: u64, count: u64) {
        self.nodes.forget(node, count);
    }

    /// The attributes of a node.
    pub fn getattr(&self, node: u64, handle: Option<u64>) -> FsResult<Stat> {
        match handle.and_then(|handle| self.files.get(handle).ok()) {
            Some(open) => Ok(sys::fstat(&open.file)?),
            None => Ok(sys::fstat(&*self.nodes.get(node)?)?),
        }
    }

    /// Changes attributes of a node: the size, the owner, the mode, the times. An error leaves what
    /// was done before it.
    pub fn setattr(&self, node: u64, handle: Option<u64>, change: &SetAttr) -> FsResult<Stat> {
        let _pass = self.pass_to(node, handle.is_none())?;
        let fd = self.nodes.get(node)?;
        if let Some(size) = change.size {
            self.truncate(&fd, handle, size)?;
        }
        if change.uid.is_some() || change.gid.is_some() {
            at::chown_fd(&fd, change.uid, change.gid)?;
        }
        if let Some(mode) = change.mode {
            // After the owner: a change of that takes the setuid bit away.
            at::chmod_fd(&fd, mode)?;
        }
        if change.atime.is_some() || change.mtime.is_some() {
            // Last: a change of the size sets them too.
            at::change_times_fd(&fd, change.atime, change.mtime)?;
        }
        Ok(sys::fstat(&fd)?)
    }

    /// To be held while a node is changed. By its name that is not possible any more if it was
    /// cleared: the kernel has kept the name for a moment, and what comes now would be in no run.
    fn pass_to(&self, node: u64, by_name: bool) -> FsResult<Pass<'_>> {
        let pass = self.changes.pass(&[node]);
        let is_taken = by_name && self.changes.has_taken(node);
        if is_taken && sys::fstat(&*self.nodes.get(node)?)?.nlink == 0 {
            // The kernel looks the name up once more.
            return Err(Errno(c::ESTALE));
        }
        Ok(pass)
    }

    /// Sets the size, through the handle if it is good for that: it may have been opened before the
    /// file's mode forbade it.
    fn truncate(&self, fd: &OwnedFd, handle: Option<u64>, size: u64) -> FsResult<()> {
        if i64::try_from(size).is_err() {
            return Err(Errno(c::EFBIG));
        }
        let open = handle.and_then(|handle| self.files.get(handle).ok());
        if let Some(open) = open.filter(|open| open.writable) {
            return Ok(open.file.set_len(size)?);
        }
        Ok(open_regular(fd, c::O_WRONLY, c::EINVAL)?.set_len(size)?)
    }

    /// The target of a symbolic link.
    pub fn readlink(&self, node: u64) -> FsResult<OsString> {
        match at::readlink_fd(&*self.nodes.get(node)?) {
            // What the kernel answers for a handle on something else.
            Err(e) if e.raw_os_error() == Some(c::ENOENT) => Err(Errno(c::EINVAL)),
            other => Ok(other?),
        }
    }

    /// Makes a regular file, FIFO, socket or device. Counts one reference.
    pub fn mknod(
        &self,
        caller: &Caller,
        parent: u64,
        name: &OsStr,
        mode: u32,
        rdev: u64,
    ) -> FsResult<Stat> {
        let _pass = self.changes.pass(&[parent]);
        let dir = self.dir(parent, name)?;
        let mode = masked(caller, &dir, mode);
        self.act_as(caller, Rights::Assumed, || at::mknod(&dir, name, mode, rdev))?;
        self.admit_new(parent, &dir, name, remove_file)
    }

    /// Makes a directory. Counts one reference.
    pub fn mkdir(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32) -> FsResult<Stat> {
        let _pass = self.changes.pass(&[parent]);
        let dir = self.dir(parent, name)?;
        let mode = masked(caller, &dir, mode);
        self.act_as(caller, Rights::Assumed, || at::mkdir(&dir, name, mode))?;
        self.admit_new(parent, &dir, name, remove_dir)
    }

    /// Makes a symbolic link. Counts one reference.
    pub fn symlink(
        &self,
        caller: &Caller,
        parent: u64,
        name: &OsStr,
        target: &OsStr,
    ) -> FsResult<Stat> {
        let _pass = self.changes.pass(&[parent]);
        let dir = self.dir(parent, name)?;
        self.act_as(caller, Rights::Assumed, || at::symlink(target, &dir, name))?;
        self.admit_new(parent, &dir, name, remove_file)
    }

    /// Gives a node a further name. Counts one reference.
    pub fn link(&self, node: u64, new_parent: u64, new_name: &OsStr) -> FsResult<Stat> {
        let _pass = self.changes.pass(&[node, new_parent]);
        let dir = self.dir(new_parent, new_name)?;
        let fd = self.nodes.get(node)?;
        at::link_fd(&fd, &dir, new_name)?;
        let stat = sys::fstat(&fd)?;
        self.nodes.admit(new_parent, new_name, fd, &stat);
        Ok(stat)
    }

    /// Removes the name of something that is not a directory.
    pub fn unlink(&self, parent: u64, name: &OsStr) -> FsResult<()> {
        self.remove(parent, name, remove_file)
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: u64, name: &OsStr) -> FsResult<()> {
        self.remove(parent, name, remove_dir)
    }

    fn remove(&self, parent: u64, name: &OsStr, how: Removal) -> FsResult<()> {
        let pass = self.changes.pass(&[parent]);
        let dir = self.dir(parent, name)?;
        let (fd, stat) = self.nodes.find(&dir, name)?;
        pass.note(stat.ino);
        self.remove_found(&dir, (&fd, &stat), (parent, name), how)
    }

    /// Removes a name of what was found there.
    fn remove_found(
        &self,
        dir: &OwnedFd,
        (fd, stat): (&Arc<OwnedFd>, &Stat),
        (parent, name): (u64, &OsStr),
        how: Removal,
    ) -> FsResult<()> {
        let known = self.nodes.pin_known(stat.ino, fd);
        how(dir, name)?;
        if known.is_some() {
            self.nodes.unnamed(stat.ino, parent, name, is_gone(fd, stat));
        }
        Ok(())
    }

    /// Renames, with `RENAME_NOREPLACE` or `RENAME_EXCHANGE` of renameat2(2).
    pub fn rename(
        &self,
        parent: u64,
        name: &OsStr,
        new_parent: u64,
        new_name: &OsStr,
        flags: u32,
    ) -> FsResult<()> {
        let pass = self.changes.pass(&[parent, new_parent]);
        // No RENAME_WHITEOUT: the object it leaves behind would be root's, not the caller's.
        if flags & !(c::RENAME_NOREPLACE | c::RENAME_EXCHANGE) != 0 {
            return Err(Errno(c::EINVAL));
        }
        let (dir, new_dir) = (self.dir(parent, name)?, self.dir(new_parent, new_name)?);
        let (fd, stat) = self.nodes.find(&dir, name)?;
        let other = match self.nodes.find(&new_dir, new_name) {
            // Whether something may or must be there is for the kernel to decide.
            Err(Errno(c::ENOENT)) => None,
            found => Some(found?),
        };
        pass.note(stat.ino);
        other.iter().for_each(|(_, it)| pass.note(it.ino));
        let known = self.nodes.pin_known(stat.ino, &fd);
        let other_known = other.as_ref().and_then(|(fd, it)| self.nodes.pin_known(it.ino, fd));
        at::rename(&dir, name, &new_dir, new_name, flags)?;
        if other.as_ref().is_some_and(|(_, it)| it.ino == stat.ino) {
            // Two names of one file: rename(2) does nothing, and says it did.
            return Ok(());
        }
        if known.is_some() {
            self.nodes.renamed(&stat, (parent, name), (new_parent, new_name));
        }
        if let (Some((fd, it)), true) = (other, other_known.is_some()) {
            if flags & c::RENAME_EXCHANGE != 0 {
                self.nodes.renamed(&it, (new_parent, new_name), (parent, name));
            } else {
                self.nodes.unnamed(it.ino, new_parent, new_name, is_gone(&fd, &it));
            }
        }
        Ok(())
    }

    /// Opens a regular file; the handle.
    pub fn open(&self, node: u64, flags: i32) -> FsResult<u64> {
        let writes = flags & c::O_ACCMODE != c::O_RDONLY || flags & c::O_TRUNC != 0;
        let _pass = if writes { Some(self.pass_to(node, true)?) } else { None };
        let pin = self.nodes.pin(node)?;
        let file = open_regular(pin.fd(), flags, c::EINVAL)?;
        Ok(self.files.add(OpenFile::new(file, flags, pin)))
    }

    /// Creates and opens a regular file, or opens the one that is there unless `O_EXCL` forbids it.
    /// Counts one reference.
    pub fn create(
        &self,
        caller: &Caller,
        parent: u64,
        name: &OsStr,
        mode: u32,
        flags: i32,
    ) -> FsResult<(Stat, u64)> {
        let pass = self.changes.pass(&[parent]);
        let dir = self.dir(parent, name)?;
        let mode = masked(caller, &dir, mode);
        let make = at::served_flags(flags) | c::O_CREAT | c::O_EXCL;
        let made = self.act_as(caller, Rights::Assumed, || at::open_flags(&dir, name, make, mode));
        let (file, fd, stat) = match made {
            Err(Errno(c::EEXIST)) if flags & c::O_EXCL == 0 => {
                let (fd, _) = self.nodes.find(&dir, name)?;
                // The kernel takes the name to be free and has not checked whether this caller may
                // open what appeared there. ESTALE makes it look again, and meet the link or FIFO.
                let file =
                    self.act_as(caller, Rights::Checked, || open_regular(&fd, flags, c::ESTALE))?;
                let stat = sys::fstat(&file)?;
                (file, fd, stat)
            }
            made => {
                let file = File::from(made?);
                let (fd, stat) = self.nodes.handle_of(&file).inspect_err(|_| {
                    let _ = at::unlink(&dir, name);
                })?;
                (file, fd, stat)
            }
        };
        pass.note(stat.ino);
        let pin = self.nodes.admit_pinned(parent, name, fd, &stat);
        Ok((stat, self.files.add(OpenFile::new(file, flags, pin))))
    }

    /// Whether a handle is good for writing.
    pub fn writes(&self, handle: u64) -> bool {
        self.files.get(handle).is_ok_and(|open| open.writable)
    }

    /// A descriptor that stands for an open file, good for nothing but that (`O_PATH`), so that who
    /// keeps it does not look like a writer.
    pub fn with_file<T>(&self, handle: u64, take: impl FnOnce(&OwnedFd) -> T) -> FsResult<T> {
        Ok(take(self.files.get(handle)?.path()))
    }

    /// Reads until `buf` is full or the file ends.
    pub fn read(&self, handle: u64, offset: u64, buf: &mut [u8]) -> FsResult<usize> {
        self.files.get(handle)?.read(offset, buf)
    }

    /// Writes all of `data`, or as much as there is room for.
    pub fn write(&self, handle: u64, offset: u64, data: &[u8]) -> FsResult<usize> {
        self.files.get(handle)?.write(offset, data)
    }

    /// Something that was written to mapped memory could not be stored.
    pub fn lost(&self, node: u64, error: Errno) {
        self.lost.lock().insert(node, error);
    }

    /// One of the caller's descriptors of a handle was closed. Nothing is held back here, but what
    /// the kernel held back may have failed since.
    pub fn flush(&self, handle: u64) -> FsResult<()> {
        let open = self.files.get(handle)?;
        if !open.writable {
            return Ok(());
        }
        self.lost.lock().remove(&open.node()).map_or(Ok(()), Err)
    }

    /// Makes the content durable, and the metadata unless `data_only`.
    pub fn fsync(&self, handle: u64, data_only: bool) -> FsResult<()> {
        let open = self.files.get(handle)?;
        let done = if data_only { open.file.sync_data() } else { open.file.sync_all() };
        Ok(done?)
    }

    /// Gives a file handle back.
    pub fn release(&self, handle: u64) -> FsResult<()> {
        let open = self.files.get(handle)?;
        if open.writable {
            // Nobody is left who could be told.
            self.lost.lock().remove(&open.node());
        }
        self.files.remove(handle)
    }

    /// Opens a directory for listing; the handle.
    pub fn opendir(&self, node: u64) -> FsResult<u64> {
        let pin = self.nodes.pin(node)?;
        let reader = match self.superuser {
            // Whom the kernel does not let list has not come here.
            Some(_) if sys::fstat(pin.fd())?.is_dir() => None,
            Some(_) => return Err(Errno(c::ENOTDIR)),
            None => Some(DirReader::new(at::open_dir(pin.fd(), OsStr::new("."))?)?),
        };
        Ok(self.dirs.add(OpenDir::new(reader, pin)))
    }

    /// Gives the names of a directory that come after `offset` (0: all, as they are now) to `take`
    /// until that answers that it has no room, or all have been given. `.` and `..` are among them.
    pub fn readdir(
        &self,
        handle: u64,
        offset: i64,
        take: &mut dyn FnMut(&DirItem) -> bool,
    ) -> FsResult<()> {
        self.dirs.get(handle)?.list(offset, take)
    }

    /// Gives a directory handle back.
    pub fn releasedir(&self, handle: u64) -> FsResult<()> {
        self.dirs.remove(handle)
    }

    /// Makes the names in a directory durable.
    pub fn fsyncdir(&self, handle: u64) -> FsResult<()> {
        let open = self.dirs.get(handle)?;
        let dir = at::open_dir(open.fd(), OsStr::new("."))?;
        Ok(File::from(dir).sync_all()?)
    }

    /// Space of the backing file system.
    pub fn statfs(&self) -> FsResult<Space> {
        Ok(at::space(&self.root)?)
    }

    /// The value of an extended attribute.
    pub fn getxattr(&self, node: u64, key: &OsStr) -> FsResult<Vec<u8>> {
        Ok(at::get_xattr_fd(&*self.nodes.get(node)?, key)?)
    }

    /// The names of all extended attributes.
    pub fn listxattr(&self, node: u64) -> FsResult<Vec<OsString>> {
        Ok(at::list_xattrs_fd(&*self.nodes.get(node)?)?)
    }

    /// Sets an extended attribute, with the flags of setxattr(2).
    pub fn setxattr(&self, node: u64, key: &OsStr, value: &[u8], flags: u32) -> FsResult<()> {
        let _pass = self.pass_to(node, true)?;
        Ok(at::set_xattr_fd(&*self.nodes.get(node)?, key, value, flags)?)
    }

    /// Removes an extended attribute.
    pub fn removexattr(&self, node: u64, key: &OsStr) -> FsResult<()> {
        let _pass = self.pass_to(node, true)?;
        Ok(at::remove_xattr_fd(&*self.nodes.get(node)?, key)?)
    }

    /// Allocates, frees or zeroes a range, with the mode bits of fallocate(2).
    pub fn fallocate(&self, handle: u64, mode: u32, offset: u64, len: u64) -> FsResult<()> {
        Ok(at::fallocate(&self.files.get(handle)?.file, mode, offset, len)?)
    }

    /// The next data (`SEEK_DATA`) or hole (`SEEK_HOLE`) at or after `offset`.
    pub fn seek(&self, handle: u64, offset: u64, whence: i32) -> FsResult<u64> {
        Ok(at::seek_hole_data(&self.files.get(handle)?.file, offset, whence)?)
    }

    /// Copies between two open files without moving the data through this process.
    pub fn copy_file_range(
        &self,
        source: u64,
        source_offset: u64,
        dest: u64,
        dest_offset: u64,
        len: usize,
    ) -> FsResult<usize> {
        let (source, dest) = (self.files.get(source)?, self.files.get(dest)?);
        let (from, to) = (source.file.as_fd(), dest.file.as_fd());
        Ok(at::copy_range(from, source_offset, to, dest_offset, len)?)
    }

    /// The handle on directory `node`, in which `name` is going to be used.
    fn dir(&self, node: u64, name: &OsStr) -> FsResult<Arc<OwnedFd>> {
        // The kernel keeps these to itself. Should one come through, `..` would lead outside.
        let name = name.as_bytes();
        if matches!(name, b"" | b"." | b"..") || name.contains(&b'/') {
            return Err(Errno(c::EINVAL));
        }
        self.nodes.get(node)
    }

    /// Answers for `name` that was just made, or undoes it.
    fn admit_new(&self, parent: u64, dir: &OwnedFd, name: &OsStr, undo: Removal) -> FsResult<Stat> {
        let (fd, stat) = self.nodes.find(dir, name).inspect_err(|_| {
            let _ = undo(dir, name);
        })?;
        self.nodes.admit(parent, name, fd, &stat);
        Ok(stat)
    }

    /// Does something as the caller, so that what it makes is the caller's from the start.
    fn act_as<T, E>(
        &self,
        caller: &Caller,
        rights: Rights,
        call: impl FnOnce() -> std::result::Result<T, E>,
    ) -> FsResult<T>
    where
        E: From<io::Error>,
        Errno: From<E>,
    {
        match self.superuser {
            Some(own) if own != (caller.uid, caller.gid) => {
                Ok(as_user(caller.uid, caller.gid, rights, call)?)
            }
            _ => Ok(call()?),
        }
    }
}

/// Removes a name of one kind.
type Removal = fn(&OwnedFd, &OsStr) -> io::Result<()>;

fn remove_file(dir: &OwnedFd, name: &OsStr) -> io::Result<()> {
    at::unlink(dir, name)
}

fn remove_dir(dir: &OwnedFd, name: &OsStr) -> io::Result<()> {
    at::rmdir(dir, name)
}

/// Whether the last name of a file went away with the one that was just removed.
fn is_gone(fd: &OwnedFd, before: &Stat) -> bool {
    before.is_dir() || sys::fstat(fd).is_ok_and(|now| now.nlink == 0)
}

/// The permissions that a new object in `dir` gets for `mode`. Where the directory hands down an
/// access list, that limits them, and the kernel sees to it.
fn masked(caller: &Caller, dir: &OwnedFd, mode: u32) -> u32 {
    match at::get_xattr_fd(dir, OsStr::new(DEFAULT_ACL)) {
        Ok(_) => mode,
        Err(_) => mode & !(caller.umask & 0o777),
    }
}

/// Opens the regular file that `fd` stands for. What is no file is refused unopened, since opening
/// may wait for a partner or start a machine: `EISDIR`, or `other`.
fn open_regular(fd: &OwnedFd, flags: i32, other: i32) -> FsResult<File> {
    let stat = sys::fstat(fd)?;
    if !stat.is_file() {
        return Err(Errno(if stat.is_dir() { c::EISDIR } else { other }));
    }
    Ok(File::from(at::reopen(fd, at::served_flags(flags))?))
}
