//! The adapter to the kernel: requests in, replies out, and nothing decided in between.
//!
//! The only file that knows fuser's types. Every callback is guarded: a panic answers `EIO` instead
//! of ending the session. Attributes of snapshots hold for ever; those of everything else are asked
//! for each time, so that a new run and a finished job are seen at once.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    CopyFileRangeFlags, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;

use super::control::Control;
use super::errno::{Errno, FsResult};
use super::ingest::{Caller, Ingest, SetAttr, SetTime};
use super::node::Node;
use super::tree::{Item, Listing, Tree, stat_of};
use crate::sys::{Space, Stat, Time, c, flags};

/// How long the kernel may believe what it was told of a finished run.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Of anything that may change.
const NOT_AT_ALL: Duration = Duration::ZERO;
/// Of the ingest tree, which changes through this mount only.
const INGEST_TTL: Duration = Duration::from_secs(1);
/// Largest read or write, in bytes; the kernel's own limit is the same.
const TRANSFER_BYTES_MAX: u32 = 1 << 20;
/// Name of the ingest tree in the mount's root.
const INGEST_NAME: &str = "ingest";

/// The mounted file system.
pub struct Mounted {
    /// The snapshots.
    pub tree: Tree,
    /// The control files.
    pub control: Arc<Control>,
    /// The writable tree.
    pub ingest: Ingest,
    /// Whether other users are let in, so that the kernel checks permissions.
    pub allow_other: bool,
    /// Called when the session ends.
    pub on_end: Box<dyn Fn() + Send + Sync>,
    dirs: Mutex<HashMap<u64, Arc<Mutex<DirHandle>>>>,
    last_dir: AtomicU64,
}

/// An open directory.
enum DirHandle {
    /// Of a snapshot.
    Tree(Listing),
    /// Of the mount's own: read as a whole when it was opened.
    Items(Vec<Item>),
    /// Of the ingest tree.
    Ingest { node: u64, handle: u64 },
}

impl Mounted {
    /// A file system of these parts.
    pub fn new(
        tree: Tree,
        control: Arc<Control>,
        ingest: Ingest,
        allow_other: bool,
        on_end: Box<dyn Fn() + Send + Sync>,
    ) -> Mounted {
        let (dirs, last_dir) = (Mutex::default(), AtomicU64::new(0));
        Mounted { tree, control, ingest, allow_other, on_end, dirs, last_dir }
    }

    fn stat(&self, node: Node, handle: Option<u64>) -> FsResult<Stat> {
        match node {
            Node::Root | Node::Snapshots => self.tree.own_dir(node),
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

    fn open_dir(&self, node: Node) -> FsResult<DirHandle> {
        Ok(match node {
            Node::Dir(run, dir) => DirHandle::Tree(self.tree.list(run, dir)?),
            Node::Ingest(number) => {
                DirHandle::Ingest { node: number, handle: self.ingest.opendir(number)? }
            }
            Node::Root => DirHandle::Items(
                ["snapshots", INGEST_NAME, ".ctl"]
                    .into_iter()
                    .map(|name| {
                        let stat = self.lookup_in_root(OsStr::new(name))?;
                        Ok(Item { name: name.into(), stat })
                    })
                    .collect::<FsResult<_>>()?,
            ),
            Node::Snapshots => DirHandle::Items(self.tree.list_snapshots()?),
            _ => DirHandle::Items(self.control.list(&self.tree, node)?),
        })
    }

    fn dir_handle(&self, handle: FileHandle) -> FsResult<Arc<Mutex<DirHandle>>> {
        self.dirs.lock().get(&handle.0).cloned().ok_or(Errno(c::EBADF))
    }

    /// Gives out the items of a directory from `offset` on until `add` says that it is full. `add`
    /// gets inode number, offset after the item, name, and the attributes where they are known.
    fn read_dir(
        &self,
        node: Node,
        handle: FileHandle,
        offset: u64,
        add: &mut dyn FnMut(&OsStr, u64, ItemStat) -> bool,
    ) -> FsResult<()> {
        let handle = self.dir_handle(handle)?;
        let mut handle = handle.lock();
        match &mut *handle {
            DirHandle::Tree(listing) => {
                let [own, parent] = listing.dots;
                let mut at = offset;
                for (position, name, ino) in [(0, ".", own), (1, "..", parent)] {
                    if at == position {
                        if add(OsStr::new(name), at + 1, ItemStat::Dot(ino)) {
                            return Ok(());
                        }
                        at += 1;
                    }
                }
                let run = listing.run();
                while let Some(entry) = self.tree.next(listing, at)? {
                    let stat = stat_of(run, entry)?;
                    if add(OsStr::from_bytes(&entry.name), at + 1, ItemStat::Known(stat)) {
                        break;
                    }
                    at += 1;
                }
                Ok(())
            }
            DirHandle::Items(items) => {
                let own = node.ino().unwrap_or(1);
                let dots = [(".", own), ("..", 1)].into_iter();
                let dots = dots.map(|(name, ino)| (OsStr::new(name), ItemStat::Dot(ino)));
                let items = items.iter().map(|it| (&*it.name, ItemStat::Known(it.stat)));
                let skip = usize::try_from(offset).unwrap_or(usize::MAX);
                for (at, (name, stat)) in (1..).zip(dots.chain(items)).skip(skip) {
                    if add(name, at, stat) {
                        break;
                    }
                }
                Ok(())
            }
            DirHandle::Ingest { node, handle } => self.read_ingest_dir(*node, *handle, offset, add),
        }
    }

    fn read_ingest_dir(
        &self,
        dir: u64,
        handle: u64,
        offset: u64,
        add: &mut dyn FnMut(&OsStr, u64, ItemStat) -> bool,
    ) -> FsResult<()> {
        let root = self.ingest.root();
        let offset = i64::try_from(offset).map_err(|_| Errno(c::EINVAL))?;
        self.ingest.readdir(handle, offset, &mut |item| {
            let next = item.offset.cast_unsigned();
            let stat = match item.name.as_bytes() {
                b"." => ItemStat::Dot(Node::Ingest(dir).ino().unwrap_or(1)),
                b".." if dir == root => ItemStat::Dot(1),
                b".." => ItemStat::Dot(Node::Ingest(item.ino).ino().unwrap_or(1)),
                _ => ItemStat::Ingest { dir, ino: item.ino, kind: item.kind },
            };
            !add(&item.name, next, stat)
        })
    }

    fn open_file(&self, req: &Request, node: Node, flags: i32) -> FsResult<(u64, FopenFlags)> {
        let writes = flags & c::O_ACCMODE != c::O_RDONLY;
        match node {
            Node::Version(_) if writes => Err(Errno(c::EROFS)),
            Node::Version(version) => {
                self.tree.open(version)?;
                Ok((0, FopenFlags::FOPEN_KEEP_CACHE))
            }
            Node::Ingest(number) => Ok((self.ingest.open(number, flags)?, FopenFlags::empty())),
            Node::CtlBackup | Node::CtlStatus | Node::JobFile(..) => {
                let handle = self.control.open(&self.tree, node, flags, req.uid())?;
                Ok((handle, FopenFlags::FOPEN_DIRECT_IO))
            }
            _ => Err(Errno(c::EISDIR)),
        }
    }

    fn read_file(&self, node: Node, handle: u64, offset: u64, size: u32) -> FsResult<Vec<u8>> {
        let size = size.min(TRANSFER_BYTES_MAX * 16) as usize;
        let mut buf = match node {
            Node::Version(_) | Node::Ingest(_) => vec![0; size],
            _ => return self.control.read(node, handle, offset, size),
        };
        let len = match node {
            Node::Version(version) => self.tree.read(version, offset, &mut buf)?,
            _ => self.ingest.read(handle, offset, &mut buf)?,
        };
        buf.truncate(len);
        Ok(buf)
    }

    fn set_attr(&self, node: Node, handle: Option<u64>, change: &SetAttr) -> FsResult<Stat> {
        match node {
            Node::Ingest(number) => ingest_stat(self.ingest.setattr(number, handle, change)?),
            // `echo line > file` truncates first; times may be "set" by the kernel after a write.
            Node::CtlBackup | Node::JobFile(..) => {
                let wants = change.mode.is_some() || change.uid.is_some() || change.gid.is_some();
                match wants {
                    true => Err(Errno(c::EPERM)),
                    false => self.stat(node, None),
                }
            }
            _ => Err(Errno(c::EROFS)),
        }
    }

    /// The ingest directory in which something is to be made or removed.
    fn writable(&self, parent: INodeNo) -> FsResult<u64> {
        match node_of(parent)? {
            Node::Ingest(number) => Ok(number),
            _ => Err(Errno(c::EROFS)),
        }
    }

    fn space(&self, node: Node) -> FsResult<Space> {
        match node {
            Node::Ingest(_) => self.ingest.statfs(),
            _ => Ok(self.tree.space()),
        }
    }
}

/// What is known of an item of a directory.
enum ItemStat {
    /// `.` or `..`: an inode number.
    Dot(u64),
    /// Everything.
    Known(Stat),
    /// To be looked up, which counts a reference.
    Ingest { dir: u64, ino: u64, kind: u32 },
}

fn node_of(ino: INodeNo) -> FsResult<Node> {
    Node::from_ino(ino.0).ok_or(Errno(c::ESTALE))
}

/// The ingest tree numbers its nodes by itself; the mount puts its mark on them.
fn ingest_stat(stat: Stat) -> FsResult<Stat> {
    let ino = Node::Ingest(stat.ino).ino().ok_or(Errno(c::EIO))?;
    Ok(Stat { ino, ..stat })
}

fn ttl(ino: u64) -> Duration {
    match Node::from_ino(ino) {
        Some(Node::Dir(..) | Node::Version(_) | Node::Root | Node::Snapshots | Node::Ctl) => {
            FOR_EVER
        }
        Some(Node::Ingest(_)) => INGEST_TTL,
        _ => NOT_AT_ALL,
    }
}

fn errno(error: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(error.0)
}

fn file_type(mode: u32) -> FileType {
    match mode & c::S_IFMT {
        c::S_IFDIR => FileType::Directory,
        c::S_IFLNK => FileType::Symlink,
        c::S_IFIFO => FileType::NamedPipe,
        c::S_IFSOCK => FileType::Socket,
        c::S_IFCHR => FileType::CharDevice,
        c::S_IFBLK => FileType::BlockDevice,
        _ => FileType::RegularFile,
    }
}

fn attr(stat: &Stat) -> FileAttr {
    FileAttr {
        ino: INodeNo(stat.ino),
        size: stat.size,
        blocks: stat.blocks,
        atime: system_time(stat.atime),
        mtime: system_time(stat.mtime),
        ctime: system_time(stat.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(stat.mode),
        perm: (stat.mode & 0o7777) as u16,
        nlink: u32::try_from(stat.nlink).unwrap_or(u32::MAX),
        uid: stat.uid,
        gid: stat.gid,
        rdev: kernel_rdev(stat.rdev),
        blksize: 4096,
        flags: 0,
    }
}

/// The kernel's 32-bit form of a device number: 12 bits major, 20 bits minor.
fn kernel_rdev(rdev: u64) -> u32 {
    let (major, minor) = crate::sys::device_parts(rdev);
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The device number that [`kernel_rdev`] stands for.
fn device_from_kernel(rdev: u32) -> u64 {
    let (major, minor) = ((rdev & 0x000f_ff00) >> 8, (rdev & 0xff) | ((rdev >> 12) & 0x000f_ff00));
    crate::sys::device_number(major, minor)
}

fn system_time(time: Time) -> SystemTime {
    let nanos = Duration::from_nanos(time.nanos.into());
    let whole = Duration::from_secs(time.secs.unsigned_abs());
    let base = match time.secs < 0 {
        true => UNIX_EPOCH.checked_sub(whole),
        false => UNIX_EPOCH.checked_add(whole),
    };
    base.and_then(|it| it.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

/// A time that the kernel asks to be set. fuser 0.18 makes `UNIX_EPOCH - (secs + nanos)` of times
/// before 1970, where nanoseconds should count forward; this undoes it.
fn time_from_kernel(time: SystemTime) -> Time {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Time { secs: after.as_secs().cast_signed(), nanos: after.subsec_nanos() },
        Err(before) => {
            let before = before.duration();
            Time { secs: -before.as_secs().cast_signed(), nanos: before.subsec_nanos() }
        }
    }
}

fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::SpecificTime(time) => SetTime::At(time_from_kernel(time)),
        TimeOrNow::Now => SetTime::Now,
    }
}

fn caller(req: &Request, umask: u32) -> Caller {
    Caller { uid: req.uid(), gid: req.gid(), umask }
}

/// Runs a callback; a panic in it becomes `EIO`, because the reply is dropped unsent.
fn guard(what: &str, work: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(work)).is_err() {
        log::error!("{what} has panicked: this is a bug, please report it");
    }
}

fn reply_entry(result: FsResult<Stat>, reply: ReplyEntry) {
    match result {
        Ok(stat) => reply.entry(&ttl(stat.ino), &attr(&stat), Generation(0)),
        Err(e) => reply.error(errno(e)),
    }
}

fn reply_empty(result: FsResult<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(e)),
    }
}

fn reply_xattr(result: FsResult<Vec<u8>>, size: u32, reply: ReplyXattr) {
    match result {
        Err(e) => reply.error(errno(e)),
        Ok(value) => match u32::try_from(value.len()) {
            Ok(len) if size == 0 => reply.size(len),
            Ok(len) if len <= size => reply.data(&value),
            _ => reply.error(errno(Errno(c::ERANGE))),
        },
    }
}

impl Filesystem for Mounted {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let mut wanted = vec![
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_DONT_MASK,
            // For file flags.
            InitFlags::FUSE_HAS_IOCTL_DIR,
        ];
        if self.allow_other {
            // Makes the kernel check permissions with ACLs.
            wanted.push(InitFlags::FUSE_POSIX_ACL);
        }
        for flag in wanted {
            // One that the kernel does not know costs speed, not truth.
            let _ = config.add_capabilities(flag);
        }
        let _ = config.set_max_write(TRANSFER_BYTES_MAX);
        let _ = config.set_max_background(64);
        Ok(())
    }

    fn destroy(&mut self) {
        (self.on_end)();
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        guard("lookup", || {
            let parent = node_of(parent);
            match parent.and_then(|parent| self.lookup_in(parent, name)) {
                // A name that a finished run does not have, it will never have.
                Err(Errno(c::ENOENT)) if matches!(parent, Ok(Node::Dir(..))) => {
                    let nothing = Stat { ino: 0, ..EMPTY_STAT };
                    reply.entry(&FOR_EVER, &attr(&nothing), Generation(0));
                }
                result => reply_entry(result, reply),
            }
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        guard("forget", || {
            if let Ok(Node::Ingest(number)) = node_of(ino) {
                self.ingest.forget(number, nlookup);
            }
        });
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        guard("getattr", || {
            match node_of(ino).and_then(|node| self.stat(node, fh.map(|it| it.0))) {
                Ok(stat) => reply.attr(&ttl(stat.ino), &attr(&stat)),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        guard("setattr", || {
            let (atime, mtime) = (atime.map(set_time), mtime.map(set_time));
            let change = SetAttr { mode, uid, gid, size, atime, mtime };
            let handle = fh.map(|it| it.0);
            match node_of(ino).and_then(|node| self.set_attr(node, handle, &change)) {
                Ok(stat) => reply.attr(&ttl(stat.ino), &attr(&stat)),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        guard("readlink", || {
            let target = node_of(ino).and_then(|node| match node {
                Node::Ingest(number) => Ok(self.ingest.readlink(number)?.as_bytes().to_vec()),
                node => self.tree.read_link(node),
            });
            match target {
                Ok(target) => reply.data(&target),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        guard("mknod", || {
            let made = self.writable(parent).and_then(|parent| {
                let rdev = device_from_kernel(rdev);
                ingest_stat(self.ingest.mknod(&caller(req, umask), parent, name, mode, rdev)?)
            });
            reply_entry(made, reply);
        });
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        guard("mkdir", || {
            let made = self.writable(parent).and_then(|parent| {
                ingest_stat(self.ingest.mkdir(&caller(req, umask), parent, name, mode)?)
            });
            reply_entry(made, reply);
        });
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guard("unlink", || {
            let done = self.writable(parent).and_then(|it| self.ingest.unlink(it, name));
            reply_empty(done, reply);
        });
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guard("rmdir", || {
            let done = self.writable(parent).and_then(|it| self.ingest.rmdir(it, name));
            reply_empty(done, reply);
        });
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        guard("symlink", || {
            let made = self.writable(parent).and_then(|parent| {
                let target = target.as_os_str();
                ingest_stat(self.ingest.symlink(&caller(req, 0), parent, link_name, target)?)
            });
            reply_entry(made, reply);
        });
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        guard("rename", || {
            let done = self.writable(parent).and_then(|from| {
                let to = self.writable(newparent)?;
                self.ingest.rename(from, name, to, newname, flags.bits())
            });
            reply_empty(done, reply);
        });
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        guard("link", || {
            let made = self.writable(newparent).and_then(|parent| match node_of(ino)? {
                Node::Ingest(number) => ingest_stat(self.ingest.link(number, parent, newname)?),
                _ => Err(Errno(c::EXDEV)),
            });
            reply_entry(made, reply);
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        guard("open", || match node_of(ino).and_then(|node| self.open_file(req, node, flags.0)) {
            Ok((handle, flags)) => reply.opened(FileHandle(handle), flags),
            Err(e) => reply.error(errno(e)),
        });
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        guard("create", || {
            let made = self.writable(parent).and_then(|parent| {
                let caller = caller(req, umask);
                let (stat, handle) = self.ingest.create(&caller, parent, name, mode, flags)?;
                Ok((ingest_stat(stat)?, handle))
            });
            match made {
                Ok((stat, handle)) => reply.created(
                    &ttl(stat.ino),
                    &attr(&stat),
                    Generation(0),
                    FileHandle(handle),
                    FopenFlags::empty(),
                ),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        guard("read", || {
            match node_of(ino).and_then(|node| self.read_file(node, fh.0, offset, size)) {
                Ok(data) => reply.data(&data),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        guard("write", || {
            let written = node_of(ino).and_then(|node| match node {
                Node::Ingest(_) => self.ingest.write(fh.0, offset, data),
                node => {
                    self.control.write(&self.tree, node, fh.0, req.uid(), data)?;
                    Ok(data.len())
                }
            });
            match written {
                Ok(len) => reply.written(u32::try_from(len).unwrap_or(u32::MAX)),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn flush(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        guard("flush", || {
            let done = node_of(ino).and_then(|node| match node {
                Node::Ingest(_) => self.ingest.flush(fh.0),
                _ => Ok(()),
            });
            reply_empty(done, reply);
        });
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        guard("release", || {
            let done = node_of(ino).and_then(|node| match node {
                Node::Ingest(_) => self.ingest.release(fh.0),
                Node::Version(_) => Ok(()),
                _ => {
                    self.control.release(fh.0);
                    Ok(())
                }
            });
            reply_empty(done, reply);
        });
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        guard("fsync", || match node_of(ino) {
            Ok(Node::Ingest(_)) => reply_empty(self.ingest.fsync(fh.0, datasync), reply),
            Ok(node) => match self.control.job_of(node, fh.0) {
                // A job may take hours: nobody else waits for it.
                Some(job) => {
                    std::thread::spawn(move || {
                        job.wait();
                        reply.ok();
                    });
                }
                None => reply.ok(),
            },
            Err(e) => reply.error(errno(e)),
        });
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        guard("opendir", || {
            let opened = node_of(ino).and_then(|node| Ok((node, self.open_dir(node)?)));
            match opened {
                Ok((node, dir)) => {
                    let handle = self.last_dir.fetch_add(1, Ordering::Relaxed) + 1;
                    self.dirs.lock().insert(handle, Arc::new(Mutex::new(dir)));
                    let flags = match node {
                        Node::Dir(..) => FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE,
                        _ => FopenFlags::empty(),
                    };
                    reply.opened(FileHandle(handle), flags);
                }
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        guard("readdir", || {
            let mut add = |name: &OsStr, next: u64, stat: ItemStat| match stat {
                ItemStat::Dot(ino) => reply.add(INodeNo(ino), next, FileType::Directory, name),
                ItemStat::Known(stat) => {
                    reply.add(INodeNo(stat.ino), next, file_type(stat.mode), name)
                }
                ItemStat::Ingest { ino, kind, .. } => {
                    let ino = Node::Ingest(ino).ino().unwrap_or(1);
                    reply.add(INodeNo(ino), next, file_type(kind), name)
                }
            };
            match node_of(ino).and_then(|node| self.read_dir(node, fh, offset, &mut add)) {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        guard("readdirplus", || {
            let mut add = |name: &OsStr, next: u64, stat: ItemStat| {
                let (stat, reference) = match stat {
                    ItemStat::Dot(ino) => (Stat { ino, ..EMPTY_STAT }, None),
                    ItemStat::Known(stat) => (stat, None),
                    ItemStat::Ingest { dir, .. } => match self.ingest.lookup(dir, name) {
                        Ok(stat) => match ingest_stat(stat) {
                            Ok(mounted) => (mounted, Some(stat.ino)),
                            Err(_) => return false,
                        },
                        // Removed meanwhile: as if it had not been listed.
                        Err(_) => return false,
                    },
                };
                let ttl = ttl(stat.ino);
                let attr = attr(&stat);
                let full = reply.add(attr.ino, next, name, &ttl, &attr, Generation(0));
                if let (true, Some(node)) = (full, reference) {
                    self.ingest.forget(node, 1);
                }
                full
            };
            match node_of(ino).and_then(|node| self.read_dir(node, fh, offset, &mut add)) {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        guard("releasedir", || {
            let removed = self.dirs.lock().remove(&fh.0);
            if let Some(dir) = removed
                && let DirHandle::Ingest { handle, .. } = &*dir.lock()
            {
                // The descriptor is gone either way.
                let _ = self.ingest.releasedir(*handle);
            }
            reply.ok();
        });
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        guard("fsyncdir", || {
            let done = self.dir_handle(fh).and_then(|dir| match &*dir.lock() {
                DirHandle::Ingest { handle, .. } => self.ingest.fsyncdir(*handle),
                _ => Ok(()),
            });
            reply_empty(done, reply);
        });
    }

    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        guard("statfs", || match node_of(ino).and_then(|node| self.space(node)) {
            Ok(space) => {
                let (total, free) = (space.total_bytes / 4096, space.free_bytes / 4096);
                let (files, free_files) = (space.total_inodes, space.free_inodes);
                reply.statfs(total, free, free, files, free_files, 4096, 255, 4096);
            }
            Err(e) => reply.error(errno(e)),
        });
    }

    fn setxattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        guard("setxattr", || {
            let flags = flags.cast_unsigned();
            let done = self.writable(ino);
            reply_empty(done.and_then(|it| self.ingest.setxattr(it, name, value, flags)), reply);
        });
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        guard("getxattr", || {
            let value = node_of(ino).and_then(|node| match node {
                Node::Ingest(number) => self.ingest.getxattr(number, name),
                node => self.tree.get_xattr(node, name),
            });
            reply_xattr(value, size, reply);
        });
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        guard("listxattr", || {
            let names = node_of(ino).and_then(|node| match node {
                Node::Ingest(number) => {
                    let names = self.ingest.listxattr(number)?.into_iter();
                    Ok(names.flat_map(|it| [it.as_bytes(), b"\0"].concat()).collect())
                }
                node => self.tree.list_xattrs(node),
            });
            reply_xattr(names, size, reply);
        });
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guard("removexattr", || {
            let done = self.writable(ino).and_then(|it| self.ingest.removexattr(it, name));
            reply_empty(done, reply);
        });
    }

    /// Asked only where the kernel does not check permissions: everything is allowed then, and
    /// with this answer it does not ask again.
    fn access(&self, _req: &Request, _ino: INodeNo, _mask: fuser::AccessFlags, reply: ReplyEmpty) {
        reply.error(errno(Errno(c::ENOSYS)));
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        guard("fallocate", || {
            let mode = mode.cast_unsigned();
            let done = self.writable(ino);
            let done = done.and_then(|_| self.ingest.fallocate(fh.0, mode, offset, length));
            reply_empty(done, reply);
        });
    }

    fn ioctl(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        guard("ioctl", || {
            let asked = match cmd {
                flags::GET_FLAGS => node_of(ino).and_then(|node| self.tree.flags(node)),
                _ => Err(Errno(c::ENOTTY)),
            };
            match asked {
                Ok(flags) => reply.ioctl(0, &flags::answer(flags)),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        guard("lseek", || {
            let found = node_of(ino).and_then(|node| {
                let offset = u64::try_from(offset).map_err(|_| Errno(c::ENXIO))?;
                match node {
                    Node::Version(version) => self.tree.seek(version, offset, whence),
                    Node::Ingest(_) => self.ingest.seek(fh.0, offset, whence),
                    _ => Err(Errno(c::EINVAL)),
                }
            });
            match found {
                Ok(offset) => reply.offset(offset.cast_signed()),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        guard("copy_file_range", || {
            let copied = match (node_of(ino_in), node_of(ino_out)) {
                (Ok(Node::Ingest(_)), Ok(Node::Ingest(_))) => {
                    // A reply has 32 bits for the length.
                    let len = usize::try_from(len.min(1 << 30)).unwrap_or(1 << 30);
                    self.ingest.copy_file_range(fh_in.0, offset_in, fh_out.0, offset_out, len)
                }
                // The kernel then copies by reading and writing.
                _ => Err(Errno(c::EXDEV)),
            };
            match copied {
                Ok(len) => reply.written(u32::try_from(len).unwrap_or(u32::MAX)),
                Err(e) => reply.error(errno(e)),
            }
        });
    }
}

const EMPTY_STAT: Stat = Stat {
    dev: 0,
    ino: 0,
    mode: c::S_IFDIR,
    nlink: 1,
    uid: 0,
    gid: 0,
    rdev: 0,
    size: 0,
    blocks: 0,
    atime: Time { secs: 0, nanos: 0 },
    mtime: Time { secs: 0, nanos: 0 },
    ctime: Time { secs: 0, nanos: 0 },
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_the_kernels_form() {
        for (major, minor) in [(1, 3), (8, 17), (259, 300), (4095, 0xf_ffff)] {
            let rdev = crate::sys::device_number(major, minor);
            assert_eq!(device_from_kernel(kernel_rdev(rdev)), rdev);
        }
    }

    #[test]
    fn times_before_1970_are_given_to_fuser_as_they_are() {
        let half = system_time(Time { secs: -1, nanos: 500_000_000 });
        assert_eq!(half, UNIX_EPOCH - Duration::from_millis(500));
        let odd = UNIX_EPOCH - Duration::new(1, 500_000_000);
        assert_eq!(time_from_kernel(odd), Time { secs: -1, nanos: 500_000_000 });
    }
}
