//! The disks of a test as directories of one mount.
//!
//! Invariant: every write reaches the disk at once (no write-back cache), so what a killed process
//! has written is there, and the order of operations is that of the program. A disk gets new inode
//! numbers each time that it is put in, so the kernel never shows one what it knew of another.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::disk::{Body, Disk, EIO, Ino, Node, ROOT, Result};
use super::fault::Op;

/// How long the kernel may remember what it is told: all changes come through it.
const LONG: Duration = Duration::from_secs(3600);
const BLOCK: u64 = 4096;
const ENODATA: i32 = 61;
const ENOTTY: i32 = 25;

/// Disks by the numbers that the kernel knows them by, and those numbers by the disks' names.
#[derive(Default)]
pub struct Disks {
    pub by_number: RwLock<HashMap<u64, Arc<Mutex<Disk>>>>,
    pub numbers: RwLock<HashMap<Vec<u8>, u64>>,
}

/// The file system: its root holds a directory for each disk.
pub struct Server {
    pub disks: Arc<Disks>,
    pub listings: Mutex<(u64, HashMap<u64, Listing>)>,
}

type Listing = Vec<(INodeNo, FileType, Vec<u8>)>;

fn errno(number: i32) -> Errno {
    Errno::from_i32(number)
}

fn lock(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap()
}

/// A node as the kernel knows it.
struct Place {
    disk: Arc<Mutex<Disk>>,
    number: u64,
    ino: Ino,
}

impl Place {
    fn attr(&self, ino: Ino) -> Result<FileAttr> {
        let disk = lock(&self.disk);
        let node = disk.node(ino)?;
        let size = match &node.body {
            Body::File(data) => data.len(),
            Body::Link(target) => target.len() as u64,
            _ => 0,
        };
        Ok(FileAttr {
            ino: self.name(ino),
            size,
            blocks: size.div_ceil(512),
            atime: node.atime,
            mtime: node.mtime,
            ctime: node.ctime,
            crtime: SystemTime::UNIX_EPOCH,
            kind: kind(node),
            perm: node.perm as u16,
            nlink: disk.links(ino),
            uid: node.uid,
            gid: node.gid,
            rdev: if let Body::Other(_, rdev) = node.body { rdev } else { 0 },
            blksize: BLOCK as u32,
            flags: 0,
        })
    }

    fn name(&self, ino: Ino) -> INodeNo {
        INodeNo(self.number << 32 | ino)
    }
}

fn kind(node: &Node) -> FileType {
    match &node.body {
        Body::File(_) => FileType::RegularFile,
        Body::Dir(_) => FileType::Directory,
        Body::Link(_) => FileType::Symlink,
        Body::Other(bits, _) => match bits {
            0o10000 => FileType::NamedPipe,
            0o20000 => FileType::CharDevice,
            0o60000 => FileType::BlockDevice,
            _ => FileType::Socket,
        },
    }
}

fn root_attr() -> FileAttr {
    let now = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino: INodeNo(ROOT),
        size: 0,
        blocks: 0,
        atime: now,
        mtime: now,
        ctime: now,
        crtime: now,
        kind: FileType::Directory,
        perm: 0o755,
        nlink: 2,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK as u32,
        flags: 0,
    }
}

impl Server {
    /// Where a node is; the root is nowhere, and so is what was on a disk that is gone.
    fn place(&self, ino: INodeNo) -> Result<Place> {
        let (number, ino) = (ino.0 >> 32, ino.0 & 0xffff_ffff);
        let disk = self.disks.by_number.read().unwrap().get(&number).cloned().ok_or(EIO)?;
        Ok(Place { disk, number, ino })
    }

    fn look(&self, parent: INodeNo, name: &OsStr) -> Result<(Duration, FileAttr)> {
        if parent.0 == ROOT {
            let numbers = self.disks.numbers.read().unwrap();
            let number = *numbers.get(name.as_bytes()).ok_or(2)?;
            let place = self.place(INodeNo(number << 32 | ROOT))?;
            return Ok((Duration::ZERO, place.attr(ROOT)?));
        }
        let place = self.place(parent)?;
        let ino = lock(&place.disk).lookup(place.ino, name.as_bytes())?;
        Ok((LONG, place.attr(ino)?))
    }

    fn make(
        &self,
        (req, op): (&Request, Op),
        parent: INodeNo,
        name: &OsStr,
        (body, perm): (Body, u32),
    ) -> Result<FileAttr> {
        let place = self.place(parent)?;
        let mut node = Node::new(body, perm);
        (node.uid, node.gid) = (req.uid(), req.gid());
        let by = (op, req.pid());
        let ino = lock(&place.disk).make(by, place.ino, name.as_bytes(), node)?;
        place.attr(ino)
    }

    fn edit(
        &self,
        (req, op): (&Request, Op),
        ino: INodeNo,
        work: impl FnOnce(&mut Node) -> Result<()>,
    ) -> Result<()> {
        let place = self.place(ino)?;
        lock(&place.disk).edit((op, req.pid()), place.ino, work)
    }
}

fn answer(reply: ReplyEmpty, result: Result<()>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(e)),
    }
}

fn entry(reply: ReplyEntry, result: Result<FileAttr>) {
    match result {
        Ok(attr) => reply.entry(&LONG, &attr, Generation(0)),
        Err(e) => reply.error(errno(e)),
    }
}

fn time(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

impl Filesystem for Server {
    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.look(parent, name) {
            Ok((ttl, attr)) => reply.entry(&ttl, &attr, Generation(0)),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let attr = match ino.0 {
            ROOT => Ok(root_attr()),
            _ => self.place(ino).and_then(|it| it.attr(it.ino)),
        };
        match attr {
            Ok(attr) => reply.attr(&LONG, &attr),
            Err(e) => reply.error(errno(e)),
        }
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
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let op = if size.is_some() { Op::Truncate } else { Op::Setattr };
        let done = self.edit((req, op), ino, |node| {
            if let (Some(size), Body::File(data)) = (size, &mut node.body) {
                Arc::make_mut(data).set_len(size);
                node.mtime = SystemTime::now();
            }
            node.perm = mode.map_or(node.perm, |it| it & 0o7777);
            (node.uid, node.gid) = (uid.unwrap_or(node.uid), gid.unwrap_or(node.gid));
            node.atime = atime.map_or(node.atime, time);
            node.mtime = mtime.map_or(node.mtime, time);
            Ok(())
        });
        match done.and_then(|()| self.place(ino)).and_then(|it| it.attr(it.ino)) {
            Ok(attr) => reply.attr(&LONG, &attr),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let target = self.place(ino).and_then(|it| match &lock(&it.disk).node(it.ino)?.body {
            Body::Link(target) => Ok(target.clone()),
            _ => Err(22),
        });
        match target {
            Ok(target) => reply.data(&target),
            Err(e) => reply.error(errno(e)),
        }
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
        let (op, body) = match mode & 0o170000 {
            0 | 0o100000 => (Op::Create, Body::File(Arc::default())),
            bits => (Op::Mknod, Body::Other(bits, rdev)),
        };
        entry(reply, self.make((req, op), parent, name, (body, mode & !umask & 0o7777)));
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
        let body = Body::Dir(Arc::default());
        entry(reply, self.make((req, Op::Mkdir), parent, name, (body, mode & !umask & 0o7777)));
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let by = (Op::Unlink, req.pid());
        let place = self.place(parent);
        answer(reply, place.and_then(|it| lock(&it.disk).remove(by, it.ino, name.as_bytes())));
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let by = (Op::Rmdir, req.pid());
        let place = self.place(parent);
        answer(reply, place.and_then(|it| lock(&it.disk).remove(by, it.ino, name.as_bytes())));
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let body = Body::Link(target.as_os_str().as_bytes().to_vec());
        entry(reply, self.make((req, Op::Symlink), parent, name, (body, 0o777)));
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let how = (
            flags.contains(RenameFlags::RENAME_NOREPLACE),
            flags.contains(RenameFlags::RENAME_EXCHANGE),
        );
        let result = self.place(parent).and_then(|from| {
            let to = (self.place(newparent)?.ino, newname.as_bytes());
            lock(&from.disk).rename(req.pid(), (from.ino, name.as_bytes()), to, how)
        });
        answer(reply, result);
    }

    fn link(
        &self,
        req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let result = self.place(ino).and_then(|it| {
            let dir = self.place(newparent)?.ino;
            lock(&it.disk).link(req.pid(), it.ino, dir, newname.as_bytes())?;
            it.attr(it.ino)
        });
        entry(reply, result);
    }

    fn open(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.place(ino).and_then(|it| lock(&it.disk).open(req.pid())) {
            Ok(()) => reply.opened(FileHandle(0), FopenFlags::FOPEN_NOFLUSH),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let file = (Body::File(Arc::default()), mode & !umask & 0o7777);
        match self.make((req, Op::Create), parent, name, file) {
            Ok(attr) => {
                let flags = FopenFlags::FOPEN_NOFLUSH;
                reply.created(&LONG, &attr, Generation(0), FileHandle(0), flags);
            }
            Err(e) => reply.error(errno(e)),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = |it: Place| lock(&it.disk).read(it.ino, offset, size as usize);
        match self.place(ino).and_then(read) {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let is_mapped = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let written = self.place(ino).and_then(|it| match is_mapped {
            true => lock(&it.disk).write_back(it.ino, offset, data).map(|()| data.len()),
            false => lock(&it.disk).write(req.pid(), it.ino, offset, data),
        });
        match written {
            Ok(len) => reply.written(len as u32),
            Err(e) => reply.error(errno(e)),
        }
    }

    fn fsync(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let place = self.place(ino);
        answer(reply, place.and_then(|it| lock(&it.disk).sync_file(req.pid(), it.ino)));
    }

    fn fsyncdir(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let place = self.place(ino);
        answer(reply, place.and_then(|it| lock(&it.disk).sync_dir(req.pid(), it.ino)));
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let list = self.place(ino).and_then(|it| {
            let disk = lock(&it.disk);
            let names = disk.node(it.ino)?.names()?;
            let known = names.iter().filter_map(|(name, ino)| {
                Some((it.name(*ino), kind(disk.node(*ino).ok()?), name.clone()))
            });
            Ok(known.collect())
        });
        let mut listings = self.listings.lock().unwrap();
        listings.0 += 1;
        let handle = listings.0;
        listings.1.insert(handle, list.unwrap_or_default());
        reply.opened(FileHandle(handle), FopenFlags::empty());
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listings = self.listings.lock().unwrap();
        let items = listings.1.get(&fh.0).into_iter().flatten();
        for (next, (ino, kind, name)) in (1..).zip(items).skip(offset as usize) {
            if reply.add(*ino, next, *kind, OsStr::from_bytes(name)) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.listings.lock().unwrap().1.remove(&fh.0);
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let (all, free) = (1 << 20, 1 << 19);
        reply.statfs(all, free, free, 1 << 20, 1 << 19, BLOCK as u32, 255, BLOCK as u32);
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let done = self.edit((req, Op::Setxattr), ino, |node| {
            node.xattrs.insert(name.as_bytes().to_vec(), value.to_vec());
            Ok(())
        });
        answer(reply, done);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let value = self.place(ino).and_then(|it| {
            let disk = lock(&it.disk);
            disk.node(it.ino)?.xattrs.get(name.as_bytes()).cloned().ok_or(ENODATA)
        });
        give(reply, size, value);
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let names = self.place(ino).and_then(|it| {
            let disk = lock(&it.disk);
            let names = disk.node(it.ino)?.xattrs.keys();
            Ok(names.flat_map(|it| it.iter().copied().chain([0])).collect::<Vec<u8>>())
        });
        give(reply, size, names);
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.edit((req, Op::Setxattr), ino, |node| {
            node.xattrs.remove(name.as_bytes()).map(drop).ok_or(ENODATA)
        });
        answer(reply, done);
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let done = self.edit((req, Op::Allocate), ino, |node| {
            let Body::File(data) = &mut node.body else { return Err(ENOTTY) };
            let (data, end) = (Arc::make_mut(data), offset + length);
            match mode {
                0 if end > data.len() => data.set_len(end),
                // Keep the size; punch a hole.
                0 | 1 => {}
                3 => data.clear(offset, end),
                _ => return Err(95),
            }
            Ok(())
        });
        answer(reply, done);
    }
}

fn give(reply: ReplyXattr, size: u32, value: Result<Vec<u8>>) {
    match value {
        Err(e) => reply.error(errno(e)),
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(errno(34)),
        Ok(value) => reply.data(&value),
    }
}
