//! The read-only part of the mount: the root, `/snapshots` and everything in the snapshots.
//!
//! What has been answered about a finished run holds for ever; only the list of runs and `latest`
//! change, and are asked for every time. No kernel types here.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::errno::{Errno, FsResult};
use super::node::Node;
use crate::catalog::{DirId, EntryRow, Run, RunId, VersionId};
use crate::entry::Kind;
use crate::error::Error;
use crate::snapshot::{FileMap, Snapshots};
use crate::sys::{self, Space, Stat, Time, c};

/// Entries of a directory that are read at a time.
const PAGE_ENTRIES: usize = 256;

/// A name in a directory, with the attributes of what it names.
pub struct Item {
    /// The name.
    pub name: OsString,
    /// Attributes; `ino` is the mount's inode number.
    pub stat: Stat,
}

/// The snapshots as a tree.
pub struct Tree {
    snapshots: Arc<Snapshots>,
    /// When the mount was made, for what has no time of its own.
    born: Time,
    uid: u32,
    gid: u32,
}

impl Tree {
    /// The tree of all runs.
    pub fn new(snapshots: Arc<Snapshots>) -> Tree {
        let (uid, gid) = (sys::effective_uid(), sys::effective_gid());
        Tree { snapshots, born: Time::now(), uid, gid }
    }

    /// The attributes of a directory that is not in any snapshot.
    pub fn own_dir(&self, node: Node) -> FsResult<Stat> {
        let mode = c::S_IFDIR | 0o755;
        Ok(Stat { nlink: 2, size: 4096, ..self.own(node, mode)? })
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
        let run = self.snapshots.run(run).map_err(|e| Errno::from(&e))?;
        self.run_root(&run)
    }

    fn latest(&self, run: RunId) -> FsResult<Stat> {
        let size = run.to_string().len() as u64;
        Ok(Stat { size, ..self.own(Node::Latest(run), c::S_IFLNK | 0o777)? })
    }

    fn run_root(&self, run: &Run) -> FsResult<Stat> {
        let root = self.snapshots.root(run).map_err(log)?;
        stat_of(run.id, &root)
    }

    /// What `/snapshots` holds: `latest`, and the runs.
    pub fn list_snapshots(&self) -> FsResult<Vec<Item>> {
        let mut items = Vec::new();
        let runs = self.snapshots.runs().map_err(log)?;
        if let Some(run) = runs.last() {
            items.push(Item { name: "latest".into(), stat: self.latest(run.id)? });
        }
        for run in &runs {
            items.push(Item { name: run.id.to_string().into(), stat: self.run_root(run)? });
        }
        Ok(items)
    }

    /// Looks `name` up in a directory of a snapshot.
    pub fn lookup(&self, run: RunId, dir: DirId, name: &OsStr) -> FsResult<Stat> {
        match self.snapshots.lookup(run, dir, name.as_bytes()).map_err(log)? {
            Some(entry) => stat_of(run, &entry),
            None => Err(Errno(c::ENOENT)),
        }
    }

    /// Attributes of a directory of a snapshot.
    pub fn stat_dir(&self, run: RunId, dir: DirId) -> FsResult<Stat> {
        let entry = self.snapshots.with_reader(|reader| reader.entry_of_dir(run, dir));
        stat_of(run, &entry.map_err(log)?.ok_or(Errno(c::ESTALE))?)
    }

    /// Attributes of anything else in a snapshot.
    pub fn stat_version(&self, version: VersionId) -> FsResult<Stat> {
        stat_of(0, &self.entry_of(version)?)
    }

    fn entry_of(&self, version: VersionId) -> FsResult<EntryRow> {
        let entry = self.snapshots.with_reader(|reader| reader.entry_of_version(version));
        entry.map_err(log)?.ok_or(Errno(c::ESTALE))
    }

    /// Starts a listing of a directory of a snapshot.
    pub fn list(&self, run: RunId, dir: DirId) -> FsResult<Listing> {
        let entry = self.snapshots.with_reader(|reader| reader.entry_of_dir(run, dir));
        let entry = entry.map_err(log)?.ok_or(Errno(c::ESTALE))?;
        let own = ino(Node::Dir(run, dir))?;
        let parent = match entry.dir {
            0 => ino(Node::Snapshots)?,
            parent => ino(Node::Dir(run, parent))?,
        };
        Ok(Listing {
            run,
            dir,
            dots: [own, parent],
            page: VecDeque::new(),
            page_start: 2,
            after: None,
            at_end: false,
        })
    }

    /// The next item of a listing from position `offset` on, which is what [`Listing::position`]
    /// said before, or 0.
    pub fn next<'l>(
        &self,
        listing: &'l mut Listing,
        offset: u64,
    ) -> FsResult<Option<&'l EntryRow>> {
        if offset < listing.page_start {
            // Back to the start: names that were dropped have to be read again.
            (listing.page_start, listing.after, listing.at_end) = (2, None, false);
            listing.page.clear();
        }
        loop {
            let skip = usize::try_from(offset - listing.page_start).unwrap_or(usize::MAX);
            let dropped = skip.min(listing.page.len());
            listing.page.drain(..dropped);
            listing.page_start += dropped as u64;
            if !listing.page.is_empty() {
                return Ok(listing.page.front());
            }
            if listing.at_end {
                return Ok(None);
            }
            let after = listing.after.as_deref();
            let page = self.snapshots.list(listing.run, listing.dir, after, PAGE_ENTRIES);
            let page = page.map_err(log)?;
            listing.at_end = page.len() < PAGE_ENTRIES;
            listing.after = page.last().map(|it| it.name.clone());
            listing.page = page.into();
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

    /// Reads a file; fewer bytes than asked for only at its end.
    pub fn read(&self, version: VersionId, offset: u64, buf: &mut [u8]) -> FsResult<usize> {
        let file = self.snapshots.file(version).map_err(log)?;
        self.snapshots.read(&file, offset, buf).map_err(|e| {
            let path = self.name_of(version);
            log::error!("reading {path}: {e}");
            // Whatever was wrong with the store, the reader's file cannot be read.
            Errno(c::EIO)
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
            Node::Dir(run, dir) => {
                let entry = self.snapshots.with_reader(|reader| reader.entry_of_dir(run, dir));
                Ok(Some(entry.map_err(log)?.ok_or(Errno(c::ESTALE))?.version))
            }
            _ => Ok(None),
        }
    }

    /// One extended attribute.
    pub fn get_xattr(&self, node: Node, key: &OsStr) -> FsResult<Vec<u8>> {
        let Some(version) = self.version_of(node)? else { return Err(Errno(c::ENODATA)) };
        let file = self.snapshots.file(version).map_err(log)?;
        let found = file.content.extra.xattrs.iter().find(|it| it.0 == key.as_bytes());
        found.map(|it| it.1.clone()).ok_or(Errno(c::ENODATA))
    }

    /// File flags, as `lsattr` shows them.
    pub fn flags(&self, node: Node) -> FsResult<u32> {
        let Some(version) = self.version_of(node)? else { return Err(Errno(c::ENOTTY)) };
        Ok(self.snapshots.file(version).map_err(log)?.content.extra.flags)
    }

    /// The names of all extended attributes, each closed by a zero byte.
    pub fn list_xattrs(&self, node: Node) -> FsResult<Vec<u8>> {
        let Some(version) = self.version_of(node)? else { return Ok(Vec::new()) };
        let file = self.snapshots.file(version).map_err(log)?;
        let names = file.content.extra.xattrs.iter();
        Ok(names.flat_map(|(key, _)| [key.as_slice(), b"\0"].concat()).collect())
    }

    /// Space of the volumes that are there, each file system once.
    pub fn space(&self) -> Space {
        let mut seen = std::collections::HashSet::new();
        let mut sum = Space::default();
        for volume in self.snapshots.volumes().present() {
            let dev = sys::stat(&volume.config.path).map_or(0, |it| it.dev);
            if let (true, Ok(space)) = (seen.insert(dev), volume.store.space()) {
                sum.total_bytes += space.total_bytes;
                sum.free_bytes += space.free_bytes;
                sum.total_inodes += space.total_inodes;
                sum.free_inodes += space.free_inodes;
            }
        }
        sum
    }
}

/// A listing of a directory of a snapshot that goes on from call to call.
pub struct Listing {
    run: RunId,
    dir: DirId,
    /// Inode numbers of `.` and `..`.
    pub dots: [u64; 2],
    /// Entries that have been read from the catalog and not been passed.
    page: VecDeque<EntryRow>,
    /// Position of the first of them. Positions 0 and 1 are the dots.
    page_start: u64,
    /// Name from which the next page begins.
    after: Option<Vec<u8>>,
    at_end: bool,
}

impl Listing {
    /// The run that is listed.
    pub fn run(&self) -> RunId {
        self.run
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
pub fn stat_of(run: RunId, entry: &EntryRow) -> FsResult<Stat> {
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
        nlink: meta.nlink,
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
