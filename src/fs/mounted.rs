//! What the mount does when it is asked: every operation of the kernel, in plain types.
//!
//! Snapshots refuse whatever would change them with `EROFS`; `/ingest` and the control files are
//! handed to their own parts. How requests come in and how answers go out is not known here, so
//! that the same operations serve any transport, and tests without one.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

use super::control::{Control, Reply, Wake, Who};
use super::errno::{Errno, FsResult};
use super::ingest::{Caller, Ingest, SetAttr};
use super::node::Node;
use super::own_dir;
use super::tree::{Add, ItemStat, Tree};
use crate::snapshot::Data;
use crate::sys::{Space, Stat, c};

/// How long the kernel may believe what it was told of a finished run.
pub const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Of anything that may change.
const NOT_AT_ALL: Duration = Duration::ZERO;
/// That there is a run.
const RUN_TTL: Duration = Duration::from_secs(1);
/// Of the ingest tree, which changes through this mount only.
const INGEST_TTL: Duration = Duration::from_secs(1);
/// Largest read or write, in bytes; the kernel's own limit is the same.
pub const TRANSFER_BYTES_MAX: u32 = 1 << 20;
/// Name of the ingest tree in the mount's root.
const INGEST_NAME: &str = "ingest";

/// The mounted file system.
pub struct Mounted {
    pub(super) tree: Tree,
    control: Arc<Control>,
    pub(super) ingest: Arc<Ingest>,
}

/// An open file.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    /// What later requests name it by.
    pub handle: u64,
    /// How its pages may be kept.
    pub pages: Pages,
}

/// What the kernel may do with the pages of a file that is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// Keep those of earlier opens: the content never changes.
    Keep,
    /// Have them while it is open.
    Cache,
    /// Have none: the size is not known before it is read.
    None,
}

impl Mounted {
    /// A file system of these parts.
    pub fn new(tree: Tree, control: Arc<Control>, ingest: Arc<Ingest>) -> Mounted {
        Mounted { tree, control, ingest }
    }

    /// Looks a name up. `None` is a name that is not there and never will be.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> FsResult<Option<Stat>> {
        let parent = node_of(parent)?;
        match self.lookup_in(parent, name) {
            Err(Errno(c::ENOENT)) if matches!(parent, Node::Dir(..)) => Ok(None),
            result => result.map(Some),
        }
    }

    /// Takes back references to a node.
    pub fn forget(&self, ino: u64, count: u64) {
        if let Ok(Node::Ingest(number)) = node_of(ino) {
            self.ingest.forget(number, count);
        }
    }

    /// Attributes.
    pub fn getattr(&self, ino: u64, handle: Option<u64>) -> FsResult<Stat> {
        self.stat(node_of(ino)?, handle)
    }

    /// Changes attributes.
    pub fn setattr(
        &self,
        who: &Who,
        ino: u64,
        handle: Option<u64>,
        change: &SetAttr,
    ) -> FsResult<Stat> {
        let node = node_of(ino)?;
        match node {
            Node::Ingest(number) => ingest_stat(self.ingest.setattr(number, handle, change)?),
            Node::Verb(..) | Node::CtlStatus | Node::CtlVersion | Node::JobFile(..) => {
                self.control.setattr(node, who, change)?;
                self.stat(node, None)
            }
            _ => Err(Errno(c::EROFS)),
        }
    }

    /// Where a link leads.
    pub fn readlink(&self, ino: u64) -> FsResult<Vec<u8>> {
        match node_of(ino)? {
            Node::Ingest(number) => Ok(self.ingest.readlink(number)?.as_bytes().to_vec()),
            node => self.tree.read_link(node),
        }
    }

    /// Makes a file, a device, a fifo or a socket.
    pub fn mknod(
        &self,
        caller: &Caller,
        parent: u64,
        name: &OsStr,
        mode: u32,
        rdev: u64,
    ) -> FsResult<Stat> {
        ingest_stat(self.ingest.mknod(caller, writable(parent)?, name, mode, rdev)?)
    }

    /// Makes a directory.
    pub fn mkdir(&self, caller: &Caller, parent: u64, name: &OsStr, mode: u32) -> FsResult<Stat> {
        ingest_stat(self.ingest.mkdir(caller, writable(parent)?, name, mode)?)
    }

    /// Makes a symbolic link.
    pub fn symlink(
        &self,
        caller: &Caller,
        parent: u64,
        name: &OsStr,
        target: &OsStr,
    ) -> FsResult<Stat> {
        ingest_stat(self.ingest.symlink(caller, writable(parent)?, name, target)?)
    }

    /// Gives a file another name.
    pub fn link(&self, ino: u64, parent: u64, name: &OsStr) -> FsResult<Stat> {
        let parent = writable(parent)?;
        match node_of(ino)? {
            Node::Ingest(number) => ingest_stat(self.ingest.link(number, parent, name)?),
            _ => Err(Errno(c::EXDEV)),
        }
    }

    /// Removes a name that is not a directory's.
    pub fn unlink(&self, parent: u64, name: &OsStr) -> FsResult<()> {
        self.ingest.unlink(writable(parent)?, name)
    }

    /// Removes an empty directory.
    pub fn rmdir(&self, parent: u64, name: &OsStr) -> FsResult<()> {
        self.ingest.rmdir(writable(parent)?, name)
    }

    /// Renames; `flags` as renameat2(2) takes them.
    pub fn rename(&self, from: (u64, &OsStr), to: (u64, &OsStr), flags: u32) -> FsResult<()> {
        let (from_dir, to_dir) = (writable(from.0)?, writable(to.0)?);
        self.ingest.rename(from_dir, from.1, to_dir, to.1, flags)
    }

    /// Opens a file.
    pub fn open(&self, who: &Who, ino: u64, flags: i32) -> FsResult<Opened> {
        let writes = flags & c::O_ACCMODE != c::O_RDONLY;
        let node = node_of(ino)?;
        match node {
            Node::Version(_) if writes => Err(Errno(c::EROFS)),
            Node::Version(version) => {
                self.tree.open(version)?;
                Ok(Opened { handle: 0, pages: Pages::Keep })
            }
            Node::Ingest(number) => {
                Ok(Opened { handle: self.ingest.open(number, flags)?, pages: Pages::Cache })
            }
            Node::Verb(..) | Node::CtlStatus | Node::CtlVersion | Node::JobFile(..) => {
                let handle = self.control.open(node, flags, who)?;
                Ok(Opened { handle, pages: Pages::None })
            }
            _ => Err(Errno(c::EISDIR)),
        }
    }

    /// Makes a file and opens it: its attributes and the handle.
    pub fn create(
        &self,
        caller: &Caller,
        parent: u64,
        name: &OsStr,
        mode: u32,
        flags: i32,
    ) -> FsResult<(Stat, Opened)> {
        let parent = writable(parent)?;
        let (stat, handle) = self.ingest.create(caller, parent, name, mode, flags)?;
        Ok((ingest_stat(stat)?, Opened { handle, pages: Pages::Cache }))
    }

    /// Whether a node is a control file, whose requests may be answered later.
    pub fn is_control(&self, ino: u64) -> bool {
        let files = |it| {
            matches!(it, Node::Verb(..) | Node::CtlStatus | Node::CtlVersion | Node::JobFile(..))
        };
        Node::from_ino(ino).is_some_and(files)
    }

    /// Reads a control file: answers at once, or as soon as there is something to read.
    pub fn read_control(
        &self,
        who: &Who,
        ino: u64,
        handle: u64,
        range: (u64, usize),
        may_wait: bool,
        reply: Reply,
    ) {
        match node_of(ino) {
            Ok(node) => self.control.read(node, handle, who, range, may_wait, reply),
            Err(errno) => reply(Err(errno)),
        }
    }

    /// Waits for the jobs of a control file: answers at once or when they have ended.
    pub fn fsync_control(&self, who: &Who, ino: u64, handle: u64, reply: Reply) {
        match node_of(ino) {
            Ok(node) => self.control.fsync(node, handle, who, reply),
            Err(errno) => reply(Err(errno)),
        }
    }

    /// Whether there is something to read. If not, `wake` is called when there is.
    pub fn poll(&self, ino: u64, handle: u64, wake: Option<Wake>) -> FsResult<bool> {
        match self.is_control(ino) {
            true => self.control.poll(node_of(ino)?, handle, wake),
            false => Ok(true),
        }
    }

    /// Reads at most `size` bytes from `offset` of anything but a control file.
    pub fn read(&self, ino: u64, handle: u64, offset: u64, size: u32) -> FsResult<Data> {
        let node = node_of(ino)?;
        let size = size.min(TRANSFER_BYTES_MAX * 16) as usize;
        match node {
            Node::Version(version) => self.tree.read(version, offset, size),
            Node::Ingest(_) => {
                let mut buf = vec![0; size];
                let len = self.ingest.read(handle, offset, &mut buf)?;
                buf.truncate(len);
                Ok(Data::from(buf))
            }
            _ => Err(Errno(c::EBADF)),
        }
    }

    /// Writes for process `owner`; gives how many bytes were taken.
    pub fn write(
        &self,
        (who, owner): (&Who, u64),
        ino: u64,
        handle: u64,
        offset: u64,
        data: &[u8],
    ) -> FsResult<usize> {
        match node_of(ino)? {
            Node::Ingest(_) => self.ingest.write(handle, offset, data),
            Node::Root | Node::Snapshots | Node::Latest(_) | Node::Dir(..) | Node::Version(_) => {
                Err(Errno(c::EROFS))
            }
            node => {
                self.control.write(node, handle, (who, owner), data)?;
                Ok(data.len())
            }
        }
    }

    /// Process `owner` closes one of its descriptors of an open file.
    pub fn flush(&self, (who, owner): (&Who, u64), ino: u64, handle: u64) -> FsResult<()> {
        match node_of(ino)? {
            Node::Ingest(_) => self.ingest.flush(handle),
            node => self.control.flush(node, handle, (who, owner)),
        }
    }

    /// The last of the descriptors of an open file is closed.
    pub fn release(&self, ino: u64, handle: u64) -> FsResult<()> {
        match node_of(ino)? {
            Node::Ingest(_) => self.ingest.release(handle),
            Node::Version(_) => Ok(()),
            _ => {
                self.control.release(handle);
                Ok(())
            }
        }
    }

    /// Makes a file durable that is no control file.
    pub fn fsync(&self, ino: u64, handle: u64, datasync: bool) -> FsResult<()> {
        match node_of(ino)? {
            Node::Ingest(_) => self.ingest.fsync(handle, datasync),
            _ => Ok(()),
        }
    }

    /// Opens a directory: its handle, and whether the kernel may keep its listing for ever. What
    /// can be read without having been opened has the handle 0.
    pub fn opendir(&self, ino: u64) -> FsResult<(u64, bool)> {
        match node_of(ino)? {
            Node::Dir(..) => Ok((0, true)),
            Node::Ingest(number) => Ok((self.ingest.opendir(number)?, false)),
            Node::Root | Node::Snapshots | Node::Ctl | Node::Jobs | Node::Job(_) => Ok((0, false)),
            _ => Err(Errno(c::ENOTDIR)),
        }
    }

    /// Closes a directory.
    pub fn releasedir(&self, handle: u64) {
        if handle != 0 {
            // The descriptor is gone either way.
            let _ = self.ingest.releasedir(handle);
        }
    }

    /// Makes the names of a directory durable.
    pub fn fsyncdir(&self, handle: u64) -> FsResult<()> {
        match handle {
            0 => Ok(()),
            handle => self.ingest.fsyncdir(handle),
        }
    }

    /// Space of the file systems behind a node.
    pub fn statfs(&self, ino: u64) -> FsResult<Space> {
        match node_of(ino)? {
            Node::Ingest(_) => self.ingest.statfs(),
            _ => self.tree.space(),
        }
    }

    /// Sets an extended attribute; `flags` as setxattr(2) takes them.
    pub fn setxattr(&self, ino: u64, name: &OsStr, value: &[u8], flags: u32) -> FsResult<()> {
        self.ingest.setxattr(writable(ino)?, name, value, flags)
    }

    /// One extended attribute.
    pub fn getxattr(&self, ino: u64, name: &OsStr) -> FsResult<Vec<u8>> {
        match node_of(ino)? {
            Node::Ingest(number) => self.ingest.getxattr(number, name),
            node => self.tree.get_xattr(node, name),
        }
    }

    /// The names of all extended attributes, each closed by a zero byte.
    pub fn listxattr(&self, ino: u64) -> FsResult<Vec<u8>> {
        match node_of(ino)? {
            Node::Ingest(number) => {
                let names = self.ingest.listxattr(number)?.into_iter();
                Ok(names.flat_map(|it| [it.as_bytes(), b"\0"].concat()).collect())
            }
            node => self.tree.list_xattrs(node),
        }
    }

    /// Removes an extended attribute.
    pub fn removexattr(&self, ino: u64, name: &OsStr) -> FsResult<()> {
        self.ingest.removexattr(writable(ino)?, name)
    }

    /// Gets or gives back room for a file, as fallocate(2) does.
    pub fn fallocate(
        &self,
        ino: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> FsResult<()> {
        writable(ino)?;
        self.ingest.fallocate(handle, mode, offset, len)
    }

    /// File flags, as lsattr(1) shows them.
    pub fn flags(&self, ino: u64) -> FsResult<u32> {
        self.tree.flags(node_of(ino)?)
    }

    /// Finds data or a hole, as lseek(2) does.
    pub fn lseek(&self, ino: u64, handle: u64, offset: i64, whence: i32) -> FsResult<u64> {
        let node = node_of(ino)?;
        let offset = u64::try_from(offset).map_err(|_| Errno(c::ENXIO))?;
        match node {
            Node::Version(version) => self.tree.seek(version, offset, whence),
            Node::Ingest(_) => self.ingest.seek(handle, offset, whence),
            _ => Err(Errno(c::EINVAL)),
        }
    }

    /// Copies from one open file of `/ingest` to another: (inode, handle, offset) each. For
    /// anything else the kernel copies by reading and writing.
    pub fn copy_file_range(
        &self,
        from: (u64, u64, u64),
        to: (u64, u64, u64),
        len: u64,
    ) -> FsResult<usize> {
        match (node_of(from.0)?, node_of(to.0)?) {
            (Node::Ingest(_), Node::Ingest(_)) => {
                // A reply has 32 bits for the length.
                let len = usize::try_from(len.min(1 << 30)).unwrap_or(1 << 30);
                self.ingest.copy_file_range(from.1, from.2, to.1, to.2, len)
            }
            _ => Err(Errno(c::EXDEV)),
        }
    }

    fn stat(&self, node: Node, handle: Option<u64>) -> FsResult<Stat> {
        match node {
            Node::Root => self.tree.own_dir(node),
            Node::Snapshots => self.tree.stat_snapshots(),
            Node::Latest(run) => {
                let size = run.to_string().len() as u64;
                Ok(Stat { size, ..self.tree.own(node, c::S_IFLNK | 0o777)? })
            }
            Node::Dir(run, dir) => self.tree.stat_dir(run, dir),
            Node::Version(version) => self.tree.stat_version(version),
            Node::Ingest(number) => ingest_stat(self.ingest.getattr(number, handle)?),
            _ => self.control.stat(&self.tree, node),
        }
    }

    fn lookup_in(&self, parent: Node, name: &OsStr) -> FsResult<Stat> {
        match parent {
            Node::Root => self.lookup_in_root(name),
            Node::Snapshots => self.tree.lookup_snapshot(name),
            Node::Dir(run, dir) => self.tree.lookup(run, dir, name),
            Node::Ingest(number) => ingest_stat(self.ingest.lookup(number, name)?),
            Node::Ctl | Node::Jobs | Node::Job(_) => self.control.lookup(&self.tree, parent, name),
            _ => Err(Errno(c::ENOTDIR)),
        }
    }

    fn lookup_in_root(&self, name: &OsStr) -> FsResult<Stat> {
        match name.as_bytes() {
            b"snapshots" => self.stat(Node::Snapshots, None),
            b".ctl" => self.stat(Node::Ctl, None),
            it if it == INGEST_NAME.as_bytes() => self.stat(Node::Ingest(self.ingest.root()), None),
            _ => Err(Errno(c::ENOENT)),
        }
    }

    /// Gives out the items of a directory from `offset` on until `add` says that it is full. `add`
    /// gets inode number, offset after the item, name, and the attributes where they are known.
    pub fn readdir(&self, ino: u64, handle: u64, offset: u64, add: Add<'_>) -> FsResult<()> {
        match node_of(ino)? {
            Node::Dir(run, dir) => self.tree.read_dir(run, dir, offset, add),
            Node::Snapshots => self.tree.read_snapshots(offset, add),
            Node::Ingest(number) => self.read_ingest_dir(number, handle, offset, add),
            Node::Root => {
                let names = (1..).zip(["snapshots", INGEST_NAME, ".ctl"]);
                let items = names.map(|(key, name)| {
                    Ok((key, name.to_owned(), self.lookup_in_root(OsStr::new(name))?))
                });
                own_dir::give_out(Node::Root, items, offset, add)
            }
            node => self.control.read_dir(&self.tree, node, offset, add),
        }
    }

    fn read_ingest_dir(&self, dir: u64, handle: u64, offset: u64, add: Add<'_>) -> FsResult<()> {
        let root = self.ingest.root();
        let offset = i64::try_from(offset).map_err(|_| Errno(c::EINVAL))?;
        self.ingest.readdir(handle, offset, &mut |item| {
            let next = item.offset.cast_unsigned();
            let stat = match item.name.as_bytes() {
                b"." => ItemStat::Dot(Node::Ingest(dir).ino().unwrap_or(1)),
                b".." if dir == root => ItemStat::Dot(1),
                b".." => ItemStat::Dot(Node::Ingest(item.ino).ino().unwrap_or(1)),
                _ => ItemStat::Ingest {
                    ino: Node::Ingest(item.ino).ino().unwrap_or(1),
                    kind: item.kind,
                },
            };
            !add(&item.name, next, stat)
        })
    }
}

pub(super) fn node_of(ino: u64) -> FsResult<Node> {
    Node::from_ino(ino).ok_or(Errno(c::ESTALE))
}

/// The node of the ingest tree that is to be changed, or in which something is.
fn writable(ino: u64) -> FsResult<u64> {
    match node_of(ino)? {
        Node::Ingest(number) => Ok(number),
        _ => Err(Errno(c::EROFS)),
    }
}

/// The ingest tree numbers its nodes by itself; the mount puts its mark on them.
fn ingest_stat(stat: Stat) -> FsResult<Stat> {
    let ino = Node::Ingest(stat.ino).ino().ok_or(Errno(c::EIO))?;
    Ok(Stat { ino, ..stat })
}

/// How long the kernel may believe what it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ttl {
    /// That a name means a node.
    pub entry: Duration,
    /// The attributes of a node.
    pub attr: Duration,
}

/// How long the kernel may believe what it was told of a node.
pub fn ttl(ino: u64) -> Ttl {
    let same = |time| Ttl { entry: time, attr: time };
    match Node::from_ino(ino) {
        Some(Node::Dir(..) | Node::Version(_) | Node::Root | Node::Ctl) => same(FOR_EVER),
        // Its time tells of the list of runs.
        Some(Node::Snapshots) => Ttl { entry: FOR_EVER, attr: NOT_AT_ALL },
        Some(Node::Ingest(_)) => same(INGEST_TTL),
        _ => same(NOT_AT_ALL),
    }
}

/// The same for a name in a directory.
pub fn ttl_in(parent: u64, ino: u64) -> Ttl {
    match Node::from_ino(parent) {
        // A run may be removed; what is in it never changes.
        Some(Node::Snapshots) => Ttl { entry: RUN_TTL.min(ttl(ino).entry), ..ttl(ino) },
        _ => ttl(ino),
    }
}
