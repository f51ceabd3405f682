//! The read-only part of the mount: the root, `/snapshots` and everything in the snapshots.
//!
//! What has been answered about a finished run holds for ever; only the list of runs and `latest`
//! change, and are asked for every time. No kernel types here.

use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lru::LruCache;
use parking_lot::Mutex;

use super::bare::Bare;
use super::disks::Disks;
use super::errno::{Errno, FsResult};
use super::kinds::Kinds;
use super::listing::{Listings, PAGE_ENTRIES};
use super::node::Node;
use super::spare::Disk;
use crate::catalog::{AttributeKind, DirId, EntryRow, Extent, Run, RunId, VersionId};
use crate::entry::{Kind, acl};
use crate::error::{Error, ErrorKind};
use crate::snapshot::{Data, FileMap, Snapshots, WholeBlock};
use crate::sys::{self, Space, Stat, Time, c};

/// Most blocks whose names an attribute tells.
const BLOCK_NAMES_MAX: usize = 1000;
/// Runs whose root directories are known.
const ROOTS_MAX: usize = 1024;
/// Attributes that are answered and not listed: they tell where a file comes from.
const OWN_XATTR: &[u8] = b"user.raidtape.";

/// What is known of an item of a directory.
pub enum ItemStat {
    /// `.` or `..`: an inode number.
    Dot(u64),
    /// Everything.
    Known(Stat),
    /// To be looked up, which counts a reference: its inode number and the bits of its type.
    Ingest { ino: u64, kind: u32 },
}

/// Takes an item of a directory: its name, the offset after it, and what is known of it. `true`
/// means that there was no room for it.
pub type Add<'a> = &'a mut dyn FnMut(&OsStr, u64, ItemStat) -> bool;

/// The snapshots as a tree.
pub struct Tree {
    snapshots: Arc<Snapshots>,
    disks: Arc<Disks>,
    listings: Listings,
    bare: Bare,
    kinds: Kinds,
    /// Whether a session with the kernel lets other users in and does not check ACLs.
    acls_unchecked: AtomicBool,
    roots: Mutex<LruCache<RunId, Stat>>,
    /// The list of runs as it was last seen, and since when it has been so.
    list: Mutex<(u64, Time)>,
    /// When the mount was made, for what has no time of its own.
    born: Time,
    uid: u32,
    gid: u32,
}

impl Tree {
    /// The tree of all runs.
    pub fn new(snapshots: Arc<Snapshots>) -> Tree {
        let (uid, gid) = (sys::effective_uid(), sys::effective_gid());
        let born = Time::now();
        Tree {
            listings: Listings::new(snapshots.clone()),
            bare: Bare::new(),
            kinds: Kinds::default(),
            acls_unchecked: AtomicBool::new(false),
            roots: Mutex::new(LruCache::new(
                NonZeroUsize::new(ROOTS_MAX).unwrap_or(NonZeroUsize::MIN),
            )),
            list: Mutex::new((0, born)),
            snapshots,
            disks: Arc::default(),
            born,
            uid,
            gid,
        }
    }

    /// The attributes of a directory that is not in any snapshot.
    pub fn own_dir(&self, node: Node) -> FsResult<Stat> {
        let mode = c::S_IFDIR | 0o755;
        Ok(Stat { size: 4096, ..self.own(node, mode)? })
    }

    /// The attributes of `/snapshots`. Its time changes with the list of runs, so that the kernel
    /// does not go on showing a list that it has kept.
    pub fn stat_snapshots(&self) -> FsResult<Stat> {
        let runs = self.run_numbers()?;
        let mut hasher = DefaultHasher::new();
        runs.hash(&mut hasher);
        let now = hasher.finish();
        let mut list = self.list.lock();
        if list.0 != now {
            let later = Time { nanos: (list.1.nanos + 1) % 1_000_000_000, ..list.1 };
            *list = (now, Time::now().max(later));
        }
        Ok(Stat { mtime: list.1, ctime: list.1, ..self.own_dir(Node::Snapshots)? })
    }

    fn run_numbers(&self) -> FsResult<Vec<RunId>> {
        self.snapshots.with_reader(|reader| reader.run_numbers(0)).map_err(log)
    }

    /// The attributes of something that is not in any snapshot and belongs to the mount's owner.
    pub fn own(&self, node: Node, mode: u32) -> FsResult<Stat> {
        Ok(Stat {
            dev: 0,
            ino: ino(node)?,
            mode,
            nlink: 1,
            uid: self.uid,
            gid: self.gid,
            rdev: 0,
            size: 0,
            blocks: 0,
            atime: self.born,
            mtime: self.born,
            ctime: self.born,
        })
    }

    /// The user that the mount belongs to.
    pub fn owners(&self) -> (u32, u32) {
        (self.uid, self.gid)
    }

    /// Looks `name` up in `/snapshots`.
    pub fn lookup_snapshot(&self, name: &OsStr) -> FsResult<Stat> {
        if name == "latest" {
            return match self.snapshots.latest().map_err(log)? {
                Some(run) => self.latest(run.id),
                None => Err(Errno(c::ENOENT)),
            };
        }
        let run = run_named(name).ok_or(Errno(c::ENOENT))?;
        self.lookup_run(run)
    }

    fn latest(&self, run: RunId) -> FsResult<Stat> {
        let size = run.to_string().len() as u64;
        Ok(Stat { size, ..self.own(Node::Latest(run), c::S_IFLNK | 0o777)? })
    }

    fn run_root(&self, run: &Run) -> FsResult<Stat> {
        if let Some(stat) = self.roots.lock().get(&run.id) {
            return Ok(*stat);
        }
        let root = self.snapshots.root(run).map_err(log)?;
        let stat = self.shown(run.id, &root)?;
        self.roots.lock().put(run.id, stat);
        Ok(stat)
    }

    /// What `/snapshots` holds: `latest`, and the runs. The offset after a run is made of its
    /// number, so that it holds whatever runs come and go.
    pub fn read_snapshots(&self, offset: u64, add: Add<'_>) -> FsResult<()> {
        let dots = [(0, ".", Node::Snapshots), (1, "..", Node::Root)];
        for (position, name, node) in dots {
            if offset <= position && add(OsStr::new(name), position + 1, ItemStat::Dot(ino(node)?))
            {
                return Ok(());
            }
        }
        let runs = self.run_numbers()?;
        if offset <= 2
            && let Some(run) = runs.last()
            && add(OsStr::new("latest"), 3, ItemStat::Known(self.latest(*run)?))
        {
            return Ok(());
        }
        let after = offset.saturating_sub(3).cast_signed();
        for run in runs.into_iter().filter(|it| *it > after) {
            let known = self.roots.lock().get(&run).copied();
            let stat = match known.map_or_else(|| self.lookup_run(run), Ok) {
                // Gone since the list was made.
                Err(Errno(c::ENOENT)) => continue,
                // A row that is damaged costs its run: asked for by name, it says so.
                Err(Errno(c::EIO)) => {
                    log::warn!("run {run} is left out of the list: the catalog is damaged");
                    continue;
                }
                stat => stat?,
            };
            let name = run.to_string();
            if add(OsStr::new(&name), 3 + run.cast_unsigned(), ItemStat::Known(stat)) {
                break;
            }
        }
        Ok(())
    }

    fn lookup_run(&self, run: RunId) -> FsResult<Stat> {
        let run = self.snapshots.run(run).map_err(|e| Errno::from(&e))?;
        self.run_root(&run)
    }

    /// Looks `name` up in a directory of a snapshot.
    pub fn lookup(&self, run: RunId, dir: DirId, name: &OsStr) -> FsResult<Stat> {
        match self.listings.lookup(run, dir, name.as_bytes()).map_err(log)? {
            Some(entry) => self.shown(run, &entry),
            None => Err(Errno(c::ENOENT)),
        }
    }

    /// Attributes of a directory of a snapshot.
    pub fn stat_dir(&self, run: RunId, dir: DirId) -> FsResult<Stat> {
        let entry = self.entry_of_dir(run, dir)?;
        self.shown(run, &entry)
    }

    fn entry_of_dir(&self, run: RunId, dir: DirId) -> FsResult<Arc<EntryRow>> {
        self.listings.dir(run, dir).map_err(log)?.ok_or(Errno(c::ESTALE))
    }

    /// Attributes of anything else in a snapshot.
    pub fn stat_version(&self, version: VersionId) -> FsResult<Stat> {
        self.shown(0, &self.entry_of(version)?)
    }

    fn entry_of(&self, version: VersionId) -> FsResult<EntryRow> {
        let entry = self.snapshots.with_reader(|reader| reader.entry_of_version(version));
        entry.map_err(log)?.ok_or(Errno(c::ESTALE))
    }

    /// Gives out what a directory of a snapshot holds, from `offset` on. Positions 0 and 1 are the
    /// dots, and the offset after an item is the position of the next.
    pub fn read_dir(&self, run: RunId, dir: DirId, offset: u64, add: Add<'_>) -> FsResult<()> {
        if offset < 2 {
            let parent = match self.entry_of_dir(run, dir)?.dir {
                0 => Node::Snapshots,
                parent => Node::Dir(run, parent),
            };
            for (position, name, node) in [(0, ".", Node::Dir(run, dir)), (1, "..", parent)] {
                let stat = ItemStat::Dot(ino(node)?);
                if offset <= position && add(OsStr::new(name), position + 1, stat) {
                    return Ok(());
                }
            }
        }
        let mut at = offset.saturating_sub(2);
        loop {
            let page = self.listings.page(run, dir, at / PAGE_ENTRIES as u64).map_err(log)?;
            let skip = usize::try_from(at % PAGE_ENTRIES as u64).unwrap_or(usize::MAX);
            for entry in page.entries.get(skip..).unwrap_or_default() {
                let stat = ItemStat::Known(self.shown(run, entry)?);
                if add(OsStr::from_bytes(&entry.name), at + 3, stat) {
                    return Ok(());
                }
                at += 1;
            }
            if page.at_end {
                return Ok(());
            }
        }
    }

    /// Target of a symbolic link, or of `latest`.
    pub fn read_link(&self, node: Node) -> FsResult<Vec<u8>> {
        match node {
            Node::Latest(run) => Ok(run.to_string().into_bytes()),
            Node::Version(version) => {
                let file = self.snapshots.file(version).map_err(log)?;
                file.content.extra.target.clone().ok_or(Errno(c::EINVAL))
            }
            _ => Err(Errno(c::EINVAL)),
        }
    }

    /// The content of a file.
    pub fn open(&self, version: VersionId) -> FsResult<Arc<FileMap>> {
        self.snapshots.file(version).map_err(log)
    }

    /// The block that is a file's content as it lies there, for the kernel to read.
    pub fn whole_block(&self, version: VersionId) -> Option<WholeBlock> {
        let whole = self.snapshots.file(version).and_then(|it| self.snapshots.whole_block(&it));
        // What is wrong with it is told to whoever reads it.
        whole.unwrap_or_default()
    }

    /// The disk that a read waits for.
    pub fn disk(&self, version: VersionId, offset: u64, len: u64) -> Disk {
        let file = self.snapshots.file(version);
        let volume = file.and_then(|it| self.snapshots.volume_of(&it, offset, len));
        // What is wrong is told to whoever reads.
        volume.ok().flatten().map_or(Disk::Any, Disk::Volume)
    }

    /// Reads a file; fewer bytes than asked for only at its end.
    pub fn read(&self, version: VersionId, offset: u64, len: usize) -> FsResult<Data> {
        let file = self.snapshots.file(version).map_err(log)?;
        self.snapshots.read_data(&file, offset, len).map_err(|e| {
            let path = self.name_of(version);
            log::error!("reading {path}: {e}");
            match e.kind() {
                ErrorKind::OnTape => Errno::from(&e),
                // Whatever was wrong with the store, the reader's file cannot be read.
                _ => Errno(c::EIO),
            }
        })
    }

    /// A name of a version, for a message.
    fn name_of(&self, version: VersionId) -> String {
        let name = self.snapshots.with_reader(|reader| {
            let Some(entry) = reader.entry_of_version(version)? else { return Ok(None) };
            let (source, dir) = reader.path_of_dir(entry.dir)?;
            Ok(Some([&*source, b"/", &*dir, b"/", &*entry.name].concat()))
        });
        match name {
            Ok(Some(name)) => crate::error::Quoted(&name).to_string(),
            _ => format!("version {version}"),
        }
    }

    /// Finds data or a hole, as lseek(2) does.
    pub fn seek(&self, version: VersionId, offset: u64, whence: i32) -> FsResult<u64> {
        let file = self.snapshots.file(version).map_err(log)?;
        if offset >= file.size() {
            return Err(Errno(c::ENXIO));
        }
        let segments = file.segments();
        let segment = segments.iter().find(|it| it.1 > offset);
        match (whence, segment) {
            (c::SEEK_DATA, Some((start, _))) => Ok(offset.max(*start)),
            (c::SEEK_DATA, None) => Err(Errno(c::ENXIO)),
            (c::SEEK_HOLE, Some((start, end))) if *start <= offset => Ok(*end),
            (c::SEEK_HOLE, _) => Ok(offset),
            _ => Err(Errno(c::EINVAL)),
        }
    }

    fn version_of(&self, node: Node) -> FsResult<Option<VersionId>> {
        match node {
            Node::Version(version) => Ok(Some(version)),
            Node::Dir(run, dir) => Ok(Some(self.entry_of_dir(run, dir)?.version)),
            _ => Ok(None),
        }
    }

    /// The content of a version that has more than its content.
    fn laden(&self, version: VersionId) -> FsResult<Option<Arc<FileMap>>> {
        match self.bare.is_bare(&self.snapshots, version).map_err(log)? {
            true => Ok(None),
            false => self.snapshots.file(version).map(Some).map_err(log),
        }
    }

    /// One extended attribute.
    pub fn get_xattr(&self, node: Node, key: &OsStr) -> FsResult<Vec<u8>> {
        let key = key.as_bytes();
        let Some(version) = self.version_of(node)? else { return Err(self.lacks(0, key)) };
        if let Some(file) = self.laden(version)?
            && let Some(found) = file.content.extra.xattrs.iter().find(|it| it.0 == key)
        {
            if let Some(kind) = AttributeKind::of(key) {
                self.kinds.found(kind);
            }
            return Ok(found.1.clone());
        }
        match key.strip_prefix(OWN_XATTR) {
            Some(what) => self.own_xattr(node, version, what)?.ok_or(Errno(c::ENODATA)),
            None => Err(self.lacks(version, key)),
        }
    }

    /// What is said of an attribute that a file has not: whether any file has one like it.
    fn lacks(&self, version: VersionId, key: &[u8]) -> Errno {
        match AttributeKind::of(key) {
            Some(kind) if self.is_unused(kind, version) => Errno(c::EOPNOTSUPP),
            _ => Errno(c::ENODATA),
        }
    }

    fn is_unused(&self, kind: AttributeKind, version: VersionId) -> bool {
        self.kinds.is_unused(&self.snapshots, kind, version).map_err(log).unwrap_or(false)
    }

    /// Whether files may have ACLs, which a session that lets other users in has to check. Of a
    /// catalog without runs nothing is known. If they may, no file is told from now on that there
    /// are none: that would be an error to who checks.
    pub fn expects_acls(&self) -> bool {
        let has_runs = self.run_numbers().is_ok_and(|it| !it.is_empty());
        let expects = !has_runs || !self.is_unused(AttributeKind::Acl, 0);
        if expects {
            self.kinds.found(AttributeKind::Acl);
        }
        expects
    }

    /// Says that a session lets other users in and leaves ACLs unchecked.
    pub fn leave_acls_unchecked(&self) {
        self.acls_unchecked.store(true, Ordering::Relaxed);
    }

    /// The attributes of an entry. Where an ACL would limit what the mode allows, and the kernel
    /// does not check it, the mode is limited instead.
    fn shown(&self, run: RunId, entry: &EntryRow) -> FsResult<Stat> {
        let stat = stat_of(run, entry)?;
        if !self.acls_unchecked.load(Ordering::Relaxed)
            || self.is_unused(AttributeKind::Acl, entry.version)
        {
            return Ok(stat);
        }
        let mode = match self.laden(entry.version) {
            Ok(None) => stat.mode,
            Ok(Some(file)) => {
                let xattrs = &file.content.extra.xattrs;
                let acl = xattrs.iter().find(|it| it.0 == acl::ACCESS.as_bytes());
                acl.map_or(stat.mode, |it| acl::mode_without(stat.mode, &it.1))
            }
            // Its name is to be seen all the same.
            Err(_) => acl::mode_without(stat.mode, &[]),
        };
        Ok(Stat { mode, ..stat })
    }

    /// What the store knows of a file or a directory, as text.
    fn own_xattr(&self, node: Node, version: VersionId, what: &[u8]) -> FsResult<Option<Vec<u8>>> {
        let text = match (what, node) {
            (b"version", _) => Some(version.to_string()),
            (b"run", Node::Dir(run, _)) => Some(run.to_string()),
            (b"run", _) => {
                let run = self.snapshots.with_reader(|reader| reader.first_run_of(version));
                run.map_err(log)?.map(|it| it.to_string())
            }
            (b"hash", Node::Version(_)) => {
                let file = self.snapshots.file(version).map_err(log)?;
                file.content.hash.map(|it| it.to_string())
            }
            (b"blocks", Node::Version(_)) => self.block_names(version)?,
            _ => None,
        };
        Ok(text.map(String::into_bytes))
    }

    /// The names of the blocks that hold a file's bytes, one a line, in the order of the file.
    fn block_names(&self, version: VersionId) -> FsResult<Option<String>> {
        let file = self.snapshots.file(version).map_err(log)?;
        let mut numbers = Vec::new();
        for extent in &file.content.extents {
            if let Extent::Data { block, .. } = extent
                && !numbers.contains(block)
            {
                numbers.push(*block);
                if numbers.len() > BLOCK_NAMES_MAX {
                    // An attribute has at most 64 KiB.
                    return Err(Errno(c::E2BIG));
                }
            }
        }
        if numbers.is_empty() {
            return Ok(None);
        }
        let names = self.snapshots.with_reader(|reader| {
            let name = |number: &u64| Ok(format!("{}\n", reader.block(*number)?.id));
            numbers.iter().map(name).collect::<crate::error::Result<String>>()
        });
        names.map(Some).map_err(log)
    }

    /// File flags, as `lsattr` shows them.
    pub fn flags(&self, node: Node) -> FsResult<u32> {
        let Some(version) = self.version_of(node)? else { return Err(Errno(c::ENOTTY)) };
        Ok(self.laden(version)?.map_or(0, |it| it.content.extra.flags))
    }

    /// The names of all extended attributes, each closed by a zero byte.
    pub fn list_xattrs(&self, node: Node) -> FsResult<Vec<u8>> {
        let Some(version) = self.version_of(node)? else { return Ok(Vec::new()) };
        let Some(file) = self.laden(version)? else { return Ok(Vec::new()) };
        let names = file.content.extra.xattrs.iter();
        Ok(names.flat_map(|(key, _)| [key.as_slice(), b"\0"].concat()).collect())
    }

    /// Space of the volumes that are there, each file system once.
    pub fn space(&self) -> FsResult<Space> {
        self.disks.space(&self.snapshots).map_err(log)
    }

    /// The volumes' disks.
    pub fn disks(&self) -> &Arc<Disks> {
        &self.disks
    }
}

fn ino(node: Node) -> FsResult<u64> {
    node.ino().ok_or(Errno(c::EIO))
}

/// A run's number, written as the listing writes it.
fn run_named(name: &OsStr) -> Option<RunId> {
    let text = name.to_str()?;
    let run: RunId = text.parse().ok()?;
    (run > 0 && run.to_string() == text).then_some(run)
}

/// The attributes of an entry at a run. A file's do not depend on the run.
fn stat_of(run: RunId, entry: &EntryRow) -> FsResult<Stat> {
    let meta = &entry.meta;
    let node = match entry.child {
        Some(dir) => Node::Dir(run, dir),
        None => Node::Version(entry.version),
    };
    let size = if meta.kind == Kind::Dir { 4096 } else { meta.size };
    let data_len = match meta.kind {
        Kind::File => entry.data_len.unwrap_or(size),
        _ => 0,
    };
    Ok(Stat {
        dev: 0,
        ino: ino(node)?,
        mode: meta.kind.type_bits() | meta.mode,
        // What a directory holds here need not be what it held there; 1 says that names are not
        // counted, and `find` does not conclude from it that there are no directories left.
        nlink: if meta.kind == Kind::Dir { 1 } else { meta.nlink },
        uid: meta.uid,
        gid: meta.gid,
        rdev: meta.rdev,
        size,
        blocks: data_len.div_ceil(4096) * 8,
        atime: meta.mtime,
        mtime: meta.mtime,
        ctime: meta.ctime,
    })
}

/// Tells the log what the kernel is not told.
fn log(error: Error) -> Errno {
    log::error!("{error}");
    Errno::from(&error)
}
