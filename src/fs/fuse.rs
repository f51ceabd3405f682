//! The adapter to the kernel: requests in, replies out, and nothing decided in between.
//!
//! The only file that knows fuser's types. Every callback is guarded: a panic answers `EIO` instead
//! of ending the session. Attributes of snapshots hold for ever; those of everything else are asked
//! for each time, so that a new run and a finished job are seen at once.

use std::ffi::OsStr;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BackingId, CopyFileRangeFlags, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags, PollEvents,
    PollFlags, PollNotifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::backing::Backings;
use super::control::{Wake, Who};
use super::errno::{Errno, FsResult};
use super::ingest::{Caller, SetAttr, SetTime};
use super::kernel::Kernel;
use super::mounted::{FOR_EVER, Mounted, Opened, Pages, TRANSFER_BYTES_MAX, ttl, ttl_in};
use super::session::{Reads, threads};
use super::spare::Spare;
use super::tree::ItemStat;
use crate::sys::{Stat, Time, c, flags};

/// Which part of the mount a session serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// The snapshots, as the root of a mount of their own.
    Snapshots,
}

/// A session with the kernel over a mounted file system.
pub struct Adapter {
    mounted: Arc<Mounted>,
    part: Part,
    reads: Reads,
    allow_other: bool,
    kernel: Arc<Kernel>,
    on_end: Arc<dyn Fn() + Send + Sync>,
    /// Whether the kernel has agreed to how it is to be served.
    served: bool,
    backings: Arc<Backings>,
    spare: Spare,
}

impl Adapter {
    /// A session; `allow_other` lets other users in, so that the kernel checks permissions, and
    /// `on_end` is called when it ends.
    pub fn new(
        mounted: Arc<Mounted>,
        part: Part,
        reads: Reads,
        allow_other: bool,
        kernel: Arc<Kernel>,
        on_end: Arc<dyn Fn() + Send + Sync>,
    ) -> Adapter {
        let (backings, spare) = (Arc::new(Backings::new()), Spare::new(threads()));
        let served = false;
        Adapter { mounted, part, reads, allow_other, kernel, on_end, served, backings, spare }
    }

    /// The backing id of an open file, if it is one that the kernel reads and writes by itself.
    fn backing(
        &self,
        ino: u64,
        handle: u64,
        make: impl FnOnce(&OwnedFd) -> std::io::Result<BackingId>,
    ) -> Option<Arc<BackingId>> {
        if !self.mounted.is_ingest(ino) {
            return None;
        }
        self.kernel.opened(ino, || match self.mounted.with_ingest_file(handle, make) {
            Ok(made) => made,
            Err(e) => Err(std::io::Error::from_raw_os_error(e.0)),
        })
    }

    /// Opens a file of a snapshot so that the kernel reads it, if it can. Its block may have to be
    /// read as a whole before.
    fn open_past_us(&self, ino: u64, opened: Opened, reply: ReplyOpen) {
        let (mounted, backings) = (self.mounted.clone(), self.backings.clone());
        let work = move || {
            let find = || mounted.whole_block(ino);
            let handle = FileHandle(opened.handle);
            match backings.open(ino, &reply, find) {
                // The kernel takes no other flag with a backing id.
                Some(id) => reply.opened_passthrough(handle, FopenFlags::FOPEN_NOFLUSH, &id),
                None => reply.opened(handle, open_flags(opened)),
            }
        };
        self.spare.read(|| self.mounted.disk(ino, 0, 1), move || guard("open", work));
    }

    /// Has the kernel look at a file anew that a handle may have written to past us.
    fn tell_of_writes(&self, ino: u64, handle: u64) {
        if self.mounted.is_ingest_writer(ino, handle) {
            self.kernel.wrote(ino);
        }
    }

    /// The inode number that the kernel means.
    fn node(&self, ino: INodeNo) -> u64 {
        match self.part {
            Part::Snapshots if ino == INodeNo::ROOT => SNAPSHOTS_INO,
            _ => ino.0,
        }
    }

    /// The inode number as the kernel knows it.
    fn shown(&self, ino: u64) -> u64 {
        match self.part {
            Part::Snapshots if ino == SNAPSHOTS_INO => INodeNo::ROOT.0,
            _ => ino,
        }
    }
}

/// What `/snapshots` has in the whole mount.
const SNAPSHOTS_INO: u64 = 2;

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

fn who(req: &Request) -> Who {
    Who { uid: req.uid(), gid: req.gid(), pid: req.pid() }
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
        Ok(stat) => {
            let ttl = ttl(stat.ino);
            reply.entry_with_ttls(&ttl.attr, &ttl.entry, &attr(&stat), Generation(0));
        }
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

fn reply_attr(result: FsResult<Stat>, reply: ReplyAttr) {
    match result {
        Ok(stat) => reply.attr(&ttl(stat.ino).attr, &attr(&stat)),
        Err(e) => reply.error(errno(e)),
    }
}

fn reply_data(result: FsResult<impl Deref<Target = [u8]>>, reply: ReplyData) {
    match result {
        Ok(data) => reply.data(&data),
        Err(e) => reply.error(errno(e)),
    }
}

fn reply_written(result: FsResult<usize>, reply: ReplyWrite) {
    match result {
        Ok(len) => reply.written(u32::try_from(len).unwrap_or(u32::MAX)),
        Err(e) => reply.error(errno(e)),
    }
}

fn open_flags(opened: Opened) -> FopenFlags {
    match opened.pages {
        Pages::Keep => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
        Pages::Cache => FopenFlags::empty(),
        Pages::None => FopenFlags::FOPEN_DIRECT_IO,
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let mut wanted = vec![
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_DONT_MASK,
            // For file flags.
            InitFlags::FUSE_HAS_IOCTL_DIR,
        ];
        if self.part == Part::Whole {
            // In snapshots what a name is costs nothing to say with it, and a question to ask.
            wanted.push(InitFlags::FUSE_READDIRPLUS_AUTO);
        }
        if self.allow_other {
            match self.part == Part::Whole || self.mounted.tree.expects_acls() {
                // Has the kernel check permissions with ACLs, and ask each file for one.
                true => wanted.push(InitFlags::FUSE_POSIX_ACL),
                false => self.mounted.tree.leave_acls_unchecked(),
            }
        }
        if self.reads == Reads::Passthrough {
            let asked = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok();
            if !asked || config.set_max_stack_depth(1).is_err() {
                return Err(std::io::Error::from_raw_os_error(c::ENOSYS));
            }
        }
        if self.part == Part::Snapshots {
            // The list of runs is kept for as long as its time does not change.
            wanted.push(InitFlags::FUSE_AUTO_INVAL_DATA);
            let mut needed = InitFlags::FUSE_NO_OPENDIR_SUPPORT;
            if self.reads == Reads::ZeroMessage {
                needed |= InitFlags::FUSE_NO_OPEN_SUPPORT;
            }
            if !config.capabilities().contains(needed) {
                return Err(std::io::Error::from_raw_os_error(c::ENOSYS));
            }
        }
        for flag in wanted {
            // One that the kernel does not know costs speed, not truth.
            let _ = config.add_capabilities(flag);
        }
        if self.part == Part::Whole {
            self.kernel.negotiate(config);
        }
        let _ = config.set_max_write(TRANSFER_BYTES_MAX);
        // What the kernel reads ahead counts: those who read from one disk must not fill it up.
        let _ = config.set_max_background(u16::MAX);
        self.served = true;
        Ok(())
    }

    /// Also called where `init` has refused; such a session has not begun, so it does not end.
    fn destroy(&mut self) {
        if self.served {
            (self.on_end)();
        }
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        guard("lookup", || match self.mounted.lookup(self.node(parent), name) {
            Ok(None) => {
                let nothing = Stat { ino: 0, ..EMPTY_STAT };
                reply.entry(&FOR_EVER, &attr(&nothing), Generation(0));
            }
            Ok(Some(stat)) => {
                let ttl = ttl_in(self.node(parent), stat.ino);
                reply.entry_with_ttls(&ttl.attr, &ttl.entry, &attr(&stat), Generation(0));
            }
            Err(e) => reply.error(errno(e)),
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        guard("forget", || self.mounted.forget(self.node(ino), nlookup));
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        guard("getattr", || match self.mounted.getattr(self.node(ino), fh.map(|it| it.0)) {
            Ok(stat) => {
                let shown = Stat { ino: self.shown(stat.ino), ..stat };
                reply.attr(&ttl(stat.ino).attr, &attr(&shown));
            }
            Err(e) => reply.error(errno(e)),
        });
    }

    fn setattr(
        &self,
        req: &Request,
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
            let fh = fh.map(|it| it.0);
            reply_attr(self.mounted.setattr(&who(req), self.node(ino), fh, &change), reply);
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        guard("readlink", || reply_data(self.mounted.readlink(self.node(ino)), reply));
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
            let (caller, rdev) = (caller(req, umask), device_from_kernel(rdev));
            reply_entry(self.mounted.mknod(&caller, self.node(parent), name, mode, rdev), reply);
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
            reply_entry(
                self.mounted.mkdir(&caller(req, umask), self.node(parent), name, mode),
                reply,
            );
        });
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guard("unlink", || reply_empty(self.mounted.unlink(self.node(parent), name), reply));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guard("rmdir", || reply_empty(self.mounted.rmdir(self.node(parent), name), reply));
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
            let (caller, target) = (caller(req, 0), target.as_os_str());
            reply_entry(self.mounted.symlink(&caller, self.node(parent), link_name, target), reply);
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
            let (from, to) = ((self.node(parent), name), (self.node(newparent), newname));
            reply_empty(self.mounted.rename(from, to, flags.bits()), reply);
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
            reply_entry(self.mounted.link(self.node(ino), self.node(newparent), newname), reply)
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if self.reads == Reads::ZeroMessage {
            // Asked once: from now on the kernel opens by itself, and keeps what it has read.
            return reply.error(errno(Errno(c::ENOSYS)));
        }
        guard("open", || match self.mounted.open(&who(req), self.node(ino), flags.0) {
            Ok(opened) if self.reads == Reads::Passthrough && opened.pages == Pages::Keep => {
                self.open_past_us(ino.0, opened, reply);
            }
            Ok(opened) => {
                let ino = self.node(ino);
                let backing = self.backing(ino, opened.handle, |fd| reply.open_backing(fd));
                let (handle, flags) = (FileHandle(opened.handle), open_flags(opened));
                match backing {
                    Some(backing) => reply.opened_passthrough(handle, flags, &backing),
                    None => reply.opened(handle, flags),
                }
            }
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
            let caller = caller(req, umask);
            match self.mounted.create(&caller, self.node(parent), name, mode, flags) {
                Ok((stat, opened)) => {
                    let backing = |fd: &OwnedFd| reply.open_backing(fd);
                    let backing = self.backing(stat.ino, opened.handle, backing);
                    let (ttl, attr) = (ttl(stat.ino).entry, attr(&stat));
                    let (handle, flags) = (FileHandle(opened.handle), open_flags(opened));
                    let first = Generation(0);
                    match &backing {
                        Some(id) => {
                            reply.created_passthrough(&ttl, &attr, first, handle, flags, id);
                        }
                        None => reply.created(&ttl, &attr, first, handle, flags),
                    }
                }
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let ino = self.node(ino);
        if self.mounted.is_control(ino) {
            guard("read", || {
                let (range, may_wait) = ((offset, size as usize), flags.0 & c::O_NONBLOCK == 0);
                let later = Box::new(|result| reply_data(result, reply));
                self.mounted.read_control(&who(req), ino, fh.0, range, may_wait, later);
            });
            return;
        }
        let mounted = self.mounted.clone();
        let work = move || reply_data(mounted.read(ino, fh.0, offset, size), reply);
        let disk = || self.mounted.disk(ino, offset, size.into());
        guard("read", || self.spare.read(disk, move || guard("read", work)));
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        guard("write", || {
            let writer = (&who(req), lock_owner.map_or(0, |it| it.0));
            let ino = self.node(ino);
            let written = self.mounted.write(writer, ino, fh.0, offset, data);
            let written = match write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
                true => self.mounted.written_back(ino, written, data.len()),
                false => written,
            };
            reply_written(written, reply);
        });
    }

    fn flush(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        if self.part == Part::Snapshots {
            // Nothing to write back, ever: not asked again.
            return reply.error(errno(Errno(c::ENOSYS)));
        }
        guard("flush", || {
            let writer = (&who(req), lock_owner.0);
            let ino = self.node(ino);
            self.tell_of_writes(ino, fh.0);
            reply_empty(self.mounted.flush(writer, ino, fh.0), reply);
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
            self.backings.release(ino.0);
            let ino = self.node(ino);
            self.tell_of_writes(ino, fh.0);
            let done = self.mounted.release(ino, fh.0);
            if self.mounted.is_ingest(ino) {
                self.kernel.closed(ino);
            }
            reply_empty(done, reply);
        });
    }

    fn fsync(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let ino = self.node(ino);
        guard("fsync", || match self.mounted.is_control(ino) {
            true => {
                let later = Box::new(|result: FsResult<_>| reply_empty(result.map(drop), reply));
                self.mounted.fsync_control(&who(req), ino, fh.0, later);
            }
            false => {
                self.tell_of_writes(ino, fh.0);
                reply_empty(self.mounted.fsync(ino, fh.0, datasync), reply);
            }
        });
    }

    fn poll(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        ph: PollNotifier,
        _events: PollEvents,
        flags: PollFlags,
        reply: ReplyPoll,
    ) {
        guard("poll", || {
            let wakes = flags.contains(PollFlags::FUSE_POLL_SCHEDULE_NOTIFY);
            let wake = move || {
                // One who has given up waiting need not be woken.
                let _ = ph.notify();
            };
            let wake: Option<Wake> = if wakes { Some(Box::new(wake)) } else { None };
            match self.mounted.poll(self.node(ino), fh.0, wake) {
                Ok(true) => reply.poll(READY),
                Ok(false) => reply.poll(PollEvents::empty()),
                Err(e) => reply.error(errno(e)),
            }
        });
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.part == Part::Snapshots {
            // Asked once, as for files; listings are kept too.
            return reply.error(errno(Errno(c::ENOSYS)));
        }
        guard("opendir", || match self.mounted.opendir(self.node(ino)) {
            Ok((handle, holds)) => {
                let flags = match holds {
                    true => FopenFlags::FOPEN_CACHE_DIR | FopenFlags::FOPEN_KEEP_CACHE,
                    false => FopenFlags::empty(),
                };
                reply.opened(FileHandle(handle), flags);
            }
            Err(e) => reply.error(errno(e)),
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
            let mut add = |name: &OsStr, next: u64, stat: ItemStat| {
                let (ino, kind) = match stat {
                    ItemStat::Dot(ino) => (self.shown(ino), FileType::Directory),
                    ItemStat::Known(stat) => (stat.ino, file_type(stat.mode)),
                    ItemStat::Ingest { ino, kind } => (ino, file_type(kind)),
                };
                reply.add(INodeNo(ino), next, kind, name)
            };
            match self.mounted.readdir(self.node(ino), fh.0, offset, &mut add) {
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
            let dir = self.node(ino);
            let mut add = |name: &OsStr, next: u64, stat: ItemStat| {
                let (stat, counts) = match stat {
                    ItemStat::Dot(ino) => (Stat { ino: self.shown(ino), ..EMPTY_STAT }, false),
                    ItemStat::Known(stat) => (stat, false),
                    ItemStat::Ingest { .. } => match self.mounted.lookup(self.node(ino), name) {
                        Ok(Some(stat)) => (stat, true),
                        // Removed meanwhile: as if it had not been listed.
                        _ => return false,
                    },
                };
                let (ttl, attr) = (ttl_in(dir, stat.ino), attr(&stat));
                let ttl = ttl.entry.min(ttl.attr);
                let full = reply.add(attr.ino, next, name, &ttl, &attr, Generation(0));
                if full && counts {
                    self.mounted.forget(stat.ino, 1);
                }
                full
            };
            match self.mounted.readdir(self.node(ino), fh.0, offset, &mut add) {
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
            self.mounted.releasedir(fh.0);
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
        guard("fsyncdir", || reply_empty(self.mounted.fsyncdir(fh.0), reply));
    }

    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        guard("statfs", || match self.mounted.statfs(self.node(ino)) {
            Ok(space) => {
                let (total, available) = (space.total_bytes / 4096, space.free_bytes / 4096);
                let free = space.free_bytes.saturating_add(space.root_bytes) / 4096;
                let (files, free_files) = (space.total_inodes, space.free_inodes);
                reply.statfs(total, free, available, files, free_files, 4096, 255, 4096);
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
            reply_empty(self.mounted.setxattr(self.node(ino), name, value, flags), reply);
        });
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        guard("getxattr", || {
            let (ino, is_whole) = (self.node(ino), self.part == Part::Whole);
            let result = match self.mounted.getxattr(ino, name) {
                // Would be taken to hold for the writable tree as well; and where the kernel looks
                // at ACLs, it takes anything but a lack of one for a refusal.
                Err(Errno(c::EOPNOTSUPP))
                    if is_whole && (self.allow_other || !self.mounted.is_ingest(ino)) =>
                {
                    Err(Errno(c::ENODATA))
                }
                result => result,
            };
            reply_xattr(result, size, reply);
        });
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        guard("listxattr", || reply_xattr(self.mounted.listxattr(self.node(ino)), size, reply));
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        guard("removexattr", || reply_empty(self.mounted.removexattr(self.node(ino), name), reply));
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
            reply_empty(self.mounted.fallocate(self.node(ino), fh.0, mode, offset, length), reply);
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
                flags::GET_FLAGS => self.mounted.flags(self.node(ino)),
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
        guard("lseek", || match self.mounted.lseek(self.node(ino), fh.0, offset, whence) {
            Ok(offset) => reply.offset(offset.cast_signed()),
            Err(e) => reply.error(errno(e)),
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
            let from = (self.node(ino_in), fh_in.0, offset_in);
            let to = (self.node(ino_out), fh_out.0, offset_out);
            reply_written(self.mounted.copy_file_range(from, to, len), reply);
        });
    }
}

/// What a file that has something to read tells a poller; nothing holds up writers.
const READY: PollEvents = PollEvents::POLLIN
    .union(PollEvents::POLLRDNORM)
    .union(PollEvents::POLLOUT)
    .union(PollEvents::POLLWRNORM);

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
