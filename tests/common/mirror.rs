//! A file system that shows a directory, and does something to it at a moment of the test's choice.
//!
//! Invariant: nothing is cached, so every request of the reader reaches the hook before it is
//! answered; what a test makes happen happens between two given calls of the program, every time.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyXattr, Request,
};

use super::{mount, need_root};

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    Lookup,
    Open,
    /// From this offset on.
    Read(u64),
    List,
    ReadLink,
    Xattrs,
}

/// Told of each request: what is asked, the path, and how often this was asked of it before. What
/// it gives, if anything, is the error that the reader gets.
pub type Hook = Box<dyn Fn(Op, &str, u32) -> Option<i32> + Send + Sync>;

/// A mirror that is mounted.
pub struct Mirror {
    pub point: PathBuf,
    session: Option<BackgroundSession>,
}

impl Mirror {
    /// Shows directory `behind` at `point`, which is made.
    pub fn new(behind: &Path, point: &Path, hook: Hook) -> Mirror {
        need_root("it mounts a file system that misbehaves");
        fs::create_dir(point).unwrap();
        let mut paths = HashMap::new();
        paths.insert(1, PathBuf::new());
        let files = Files {
            behind: behind.to_path_buf(),
            hook,
            counts: Mutex::default(),
            paths: Mutex::new(paths),
            open: Mutex::default(),
        };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("mirror".to_owned()), MountOption::RO];
        let session = fuser::spawn_mount(files, point, &config).unwrap();
        Mirror { point: point.to_path_buf(), session: Some(session) }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        mount::detach(&self.point);
        if let Some(session) = self.session.take() {
            // It is unmounted already; only its thread has to end.
            std::mem::forget(session);
        }
    }
}

struct Files {
    behind: PathBuf,
    hook: Hook,
    counts: Mutex<HashMap<(Op, PathBuf), u32>>,
    paths: Mutex<HashMap<u64, PathBuf>>,
    open: Mutex<HashMap<u64, File>>,
}

impl Files {
    fn path(&self, ino: INodeNo) -> PathBuf {
        self.paths.lock().unwrap().get(&ino.0).cloned().unwrap_or_default()
    }

    /// Asks the hook; what offset is read from does not count.
    fn ask(&self, op: Op, path: &Path) -> Result<(), Errno> {
        let key = match op {
            Op::Read(_) => Op::Read(0),
            other => other,
        };
        let before = {
            let mut counts = self.counts.lock().unwrap();
            let count = counts.entry((key, path.to_path_buf())).or_default();
            *count += 1;
            *count - 1
        };
        match (self.hook)(op, path.to_str().unwrap(), before) {
            Some(errno) => Err(Errno::from_i32(errno)),
            None => Ok(()),
        }
    }

    fn attr(&self, path: &Path, stat: &Metadata) -> FileAttr {
        let time = |secs: i64, nanos: i64| {
            let whole = Duration::from_secs(secs as u64);
            UNIX_EPOCH + whole + Duration::from_nanos(nanos as u64)
        };
        let ino = if path.as_os_str().is_empty() { 1 } else { stat.ino() };
        FileAttr {
            ino: INodeNo(ino),
            size: stat.size(),
            // There are file systems that do not count the room that a file takes.
            blocks: if path.extension() == Some(OsStr::new("uncounted")) {
                0
            } else {
                stat.blocks()
            },
            atime: time(stat.atime(), stat.atime_nsec()),
            mtime: time(stat.mtime(), stat.mtime_nsec()),
            ctime: time(stat.ctime(), stat.ctime_nsec()),
            crtime: UNIX_EPOCH,
            kind: kind(stat),
            perm: (stat.mode() & 0o7777) as u16,
            nlink: stat.nlink() as u32,
            uid: stat.uid(),
            gid: stat.gid(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn look(&self, path: &Path) -> Result<FileAttr, Errno> {
        let stat = fs::symlink_metadata(self.behind.join(path)).map_err(errno)?;
        Ok(self.attr(path, &stat))
    }

    fn lookup_at(&self, path: &Path) -> Result<FileAttr, Errno> {
        self.ask(Op::Lookup, path)?;
        let attr = self.look(path)?;
        self.paths.lock().unwrap().insert(attr.ino.0, path.to_path_buf());
        Ok(attr)
    }

    fn open_at(&self, path: &Path) -> Result<u64, Errno> {
        self.ask(Op::Open, path)?;
        let file = File::open(self.behind.join(path)).map_err(errno)?;
        let mut open = self.open.lock().unwrap();
        let handle = open.len() as u64 + 1;
        open.insert(handle, file);
        Ok(handle)
    }

    fn read_at(&self, path: &Path, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        self.ask(Op::Read(offset), path)?;
        let open = self.open.lock().unwrap();
        let mut bytes = vec![0; size as usize];
        let len = open[&fh].read_at(&mut bytes, offset).map_err(errno)?;
        bytes.truncate(len);
        Ok(bytes)
    }

    fn list_at(&self, path: &Path) -> Result<Vec<(OsString, FileAttr)>, Errno> {
        self.ask(Op::List, path)?;
        let mut items = Vec::new();
        for entry in fs::read_dir(self.behind.join(path)).map_err(errno)? {
            let entry = entry.map_err(errno)?;
            let stat = entry.metadata().map_err(errno)?;
            items.push((entry.file_name(), self.attr(&path.join(entry.file_name()), &stat)));
        }
        items.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(items)
    }
}

fn kind(stat: &Metadata) -> FileType {
    match stat.file_type() {
        it if it.is_dir() => FileType::Directory,
        it if it.is_symlink() => FileType::Symlink,
        it if it.is_fifo() => FileType::NamedPipe,
        it if it.is_socket() => FileType::Socket,
        it if it.is_char_device() => FileType::CharDevice,
        it if it.is_block_device() => FileType::BlockDevice,
        _ => FileType::RegularFile,
    }
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(5))
}

impl Filesystem for Files {
    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.lookup_at(&self.path(parent).join(name)) {
            Ok(attr) => reply.entry(&Duration::ZERO, &attr, Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let path = self.path(ino);
        let open = self.open.lock().unwrap();
        let attr = match fh.and_then(|fh| open.get(&fh.0)) {
            Some(file) => file.metadata().map_err(errno).map(|it| self.attr(&path, &it)),
            None => self.look(&path),
        };
        match attr {
            Ok(attr) => reply.attr(&Duration::ZERO, &FileAttr { ino, ..attr }),
            Err(e) => reply.error(e),
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let path = self.path(ino);
        let target = self.ask(Op::ReadLink, &path).and_then(|()| {
            let target = fs::read_link(self.behind.join(&path)).map_err(errno)?;
            Ok(target.as_os_str().as_bytes().to_vec())
        });
        match target {
            Ok(target) => reply.data(&target),
            Err(e) => reply.error(e),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.open_at(&self.path(ino)) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO),
            Err(e) => reply.error(e),
        }
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
        match self.read_at(&self.path(ino), fh.0, offset, size) {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(e),
        }
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        match self.list_at(&self.path(ino)) {
            Ok(items) => {
                let next = (1..).zip(items).skip(offset as usize);
                for (number, (name, attr)) in next {
                    if reply.add(attr.ino, number, attr.kind, &name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(e) => reply.error(e),
        }
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        match (self.ask(Op::Xattrs, &self.path(ino)), size) {
            (Err(e), _) => reply.error(e),
            (Ok(()), 0) => reply.size(0),
            (Ok(()), _) => reply.data(&[]),
        }
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // Handles stay: a test has few, and their numbers must not be given out twice.
        reply.ok();
    }
}
