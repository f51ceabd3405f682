//! Walking the source, directory by directory, beside the run before.
//!
//! Names of a directory are sorted as bytes and merged with the catalog's listing of the same
//! directory, which comes in pages; so a scan holds the names of the directories on the way down
//! and nothing else of the tree. Nothing follows a link, and nothing but regular files is opened.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use super::ahead::{Ahead, Listing, Name};
use super::filter::{Filter, Verdict};
use super::index::ChunkIndex;
use super::look::{capture_steady, is_well_before};
use super::way::{Level, Way};
use super::{
    Change, EntryPlace, FileJob, Item, Options, Target, Unchanged, Unit, is_out_of_files,
    out_of_files,
};
use crate::catalog::{Content, DirId, EntryRow, Reader, Run, VersionId};
use crate::chunk::frame::FRAME_PLAIN_BYTES_MAX;
use crate::entry::{self, Kind, Metadata, join};
use crate::error::{Error, ErrorKind, Problem, Quoted, Result};
use crate::progress::Progress;
use crate::sys::{self, Stat, at, quoted};

/// Files of this size and more get blocks of their own.
pub const OWN_BLOCK_BYTES_MIN: u64 = 8 << 20;
/// Files that travel together at most.
const PACK_FILES_MAX: usize = 256;
/// Directories that the files of a pack lie in at most: each is held open until the pack is done,
/// and many a process may have no more than 1,024 files open.
const PACK_DIRS_MAX: usize = 32;
/// Unchanged entries that are told of together at most.
const UNCHANGED_MAX: u64 = 1024;
/// Entries that a page of the catalog's listing holds.
const PAGE_ENTRIES: usize = 512;
/// Directories of one directory that are listed ahead: topped up to the second number when no more
/// than the first are left.
const DIRS_AHEAD_MIN: usize = 8;
const DIRS_AHEAD_MAX: usize = 24;
/// Names that are gone through for them at a time.
const NAMES_AHEAD_MAX: usize = 4096;

/// Who is told what has to be done.
pub type Sink<'a> = &'a mut dyn FnMut(Item) -> Result<()>;

/// Where the numbers of new versions and directories come from.
pub enum Numbers<'a, 'c> {
    /// A run.
    Run(&'a ChunkIndex<'c>),
    /// Nowhere: nothing is written. The last number that was given, which no catalog has.
    Dry(i64),
}

impl Numbers<'_, '_> {
    /// Numbers for what is not written.
    pub fn dry() -> Self {
        Numbers::Dry(i64::MAX / 2)
    }

    /// A number for a new version.
    pub fn new_version(&mut self) -> VersionId {
        match self {
            Numbers::Run(chunks) => chunks.run().new_version(),
            Numbers::Dry(last) => {
                *last += 1;
                *last
            }
        }
    }

    /// A number for a new directory.
    pub fn new_dir(&mut self) -> DirId {
        match self {
            Numbers::Run(chunks) => chunks.run().new_dir(),
            Numbers::Dry(_) => self.new_version(),
        }
    }
}

/// What has been seen of a name ahead of its turn.
struct Seen {
    stat: Option<Stat>,
    listing: Option<Listing>,
}

/// Walks one source.
pub struct Scanner<'a, 'c> {
    ahead: &'a Ahead,
    reader: Reader,
    basis: Option<Run>,
    root: &'a Path,
    name: &'a [u8],
    filter: &'a Filter,
    options: &'a Options,
    numbers: Numbers<'a, 'c>,
    progress: &'a Progress,
    /// The device to stay on, if any.
    only_dev: Option<u64>,
    /// Device and inode number of what belongs to the store itself.
    own: HashSet<(u64, u64)>,
    /// Inodes with several names, of which not all have been met yet.
    links: HashMap<(u64, u64), Linked>,
    pack: Vec<FileJob>,
    pack_bytes: u64,
    pack_dirs: usize,
    /// Unchanged entries that have not been told of.
    unchanged: Unchanged,
}

/// The version of an inode whose further names are still to come.
struct Linked {
    version: VersionId,
    meta: Metadata,
    names_left: u64,
}

/// The catalog's entries of a directory in the run before, in order of their names.
#[derive(Default)]
pub struct BasisCursor {
    dir: Option<DirId>,
    page: std::collections::VecDeque<EntryRow>,
    last: Option<Vec<u8>>,
}

impl<'a, 'c> Scanner<'a, 'c> {
    /// A scanner for `target`.
    pub fn new(
        target: Target<'a>,
        options: &'a Options,
        numbers: Numbers<'a, 'c>,
        ahead: &'a Ahead,
        progress: &'a Progress,
    ) -> Result<Scanner<'a, 'c>> {
        let Target { catalog, source: root, name, basis, own, filter, .. } = target;
        Ok(Scanner {
            ahead,
            reader: Reader::open(catalog)?,
            basis,
            root,
            name,
            filter,
            options,
            numbers,
            progress,
            only_dev: None,
            own,
            links: HashMap::new(),
            pack: Vec::new(),
            pack_bytes: 0,
            pack_dirs: 0,
            unchanged: Unchanged::default(),
        })
    }

    /// Walks the whole source and gives out what has to be done.
    pub fn run(&mut self, sink: Sink<'_>) -> Result<()> {
        let failed = |e| Error::io(format!("source {}", quoted(self.root)), e);
        let root = Listing::of(sys::open_dir(self.root).map_err(failed)?, None).map_err(failed)?;
        if self.options.one_file_system {
            self.only_dev = Some(root.stat.dev);
            self.ahead.stay_on(root.stat.dev);
        }
        let old = match &self.basis {
            Some(run) => self.reader.lookup(run.id, 0, self.name)?,
            None => None,
        };
        let name = OsStr::from_bytes(self.name).to_os_string();
        let place = EntryPlace { dir: 0, name, path: Vec::new(), old };
        let mut way = Way::default();
        self.enter(place, root, Verdict::In, &mut way, sink)?;
        loop {
            self.want_ahead(&mut way).map_err(failed)?;
            let Some((level, dir_path)) = way.deepest() else { break };
            let Some(Name { name, is_dir, stat }) = level.names.pop() else {
                self.leave(level, dir_path, sink)?;
                self.leave_dir(&mut way, sink)?;
                continue;
            };
            self.progress.check()?;
            level.seen = level.seen.saturating_sub(1);
            let path = join(dir_path, name.as_bytes());
            let mut seen = Seen { stat, listing: None };
            if is_dir {
                level.dirs_ahead = level.dirs_ahead.saturating_sub(1);
                seen.listing = self.ahead.take(&path);
            }
            let old = self.take_basis(level, dir_path, name.as_bytes(), sink)?;
            let dir = level.dir;
            let place = EntryPlace { dir, name, path, old };
            let fd = way.fd().map_err(failed)?;
            self.visit(&fd, place, seen, &mut way, sink)?;
        }
        self.send_unchanged(sink)?;
        self.send_pack(sink)
    }

    /// Has the directories listed that come next.
    fn want_ahead(&self, way: &mut Way) -> std::io::Result<()> {
        let Some((level, path)) = way.deepest() else { return Ok(()) };
        if level.dirs_ahead > DIRS_AHEAD_MIN || level.seen == level.names.len() {
            return Ok(());
        }
        let mut wanted = Vec::new();
        let left = level.names.iter().rev().skip(level.seen);
        for it in left.take(NAMES_AHEAD_MAX) {
            level.seen += 1;
            let path = join(path, it.name.as_bytes());
            let judge = || self.filter.judge_path(sys::path_from(&path), true, level.verdict);
            if it.is_dir && judge() != Verdict::Out {
                level.dirs_ahead += 1;
                wanted.push((path, it.name.clone()));
                if level.dirs_ahead >= DIRS_AHEAD_MAX {
                    break;
                }
            }
        }
        if !wanted.is_empty() {
            self.ahead.want(&way.fd()?, wanted);
        }
        Ok(())
    }

    /// Goes back to the directory above. What is left of one that has gone meanwhile is left out.
    fn leave_dir(&self, way: &mut Way, sink: Sink<'_>) -> Result<()> {
        let Err(e) = way.leave() else { return Ok(()) };
        if is_out_of_files(&e) {
            return Err(out_of_files(e));
        }
        let Some((level, path)) = way.deepest() else { return Ok(()) };
        for it in level.names.drain(..).filter(|it| it.is_dir) {
            // What was listed ahead is let go of.
            self.ahead.take(&join(path, it.name.as_bytes()));
        }
        (level.seen, level.dirs_ahead) = (0, 0);
        tell(sink, Change::Noted(Problem::new(path, &Error::io("going back to it", e))))
    }

    /// Deals with one name of a directory.
    fn visit(
        &mut self,
        parent: &Arc<OwnedFd>,
        place: EntryPlace,
        seen: Seen,
        way: &mut Way,
        sink: Sink<'_>,
    ) -> Result<()> {
        let stat = match seen.stat.map_or_else(|| at::stat(parent, &place.name), Ok) {
            Ok(stat) => stat,
            // Removed since it was listed: as if it had never been there.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return gone(place, sink),
            Err(e) => return fail(place, "looking at it", e, sink),
        };
        if self.own.contains(&(stat.dev, stat.ino)) {
            log::info!("{}: left out, it belongs to the store", Quoted(&place.path));
            return gone(place, sink);
        }
        let parent_verdict = way.deepest().map_or(Verdict::In, |(level, _)| level.verdict);
        let verdict = self.filter.judge(&place.path, &stat, parent_verdict);
        if verdict == Verdict::Out {
            return gone(place, sink);
        }
        let Some(meta) = Metadata::from_stat(&stat) else {
            let message = format!("unknown file type {:o}", stat.mode);
            let error = Error::new(ErrorKind::Io, message);
            let problem = Problem::new(&*place.path, &error);
            return tell(sink, Change::Failed { place, version: None, problem });
        };
        match meta.kind {
            Kind::Dir => {
                let open = || Listing::open(parent, &place.name, self.only_dev);
                let opened = seen.listing.map_or_else(open, Ok);
                match opened {
                    Ok(listing) => self.enter(place, listing, verdict, way, sink),
                    Err(e) => self.closed_dir(parent, place, &stat, e, sink),
                }
            }
            _ => self.visit_leaf(parent, place, &stat, meta, sink),
        }
    }

    /// Deals with a directory that cannot be opened.
    fn closed_dir(
        &mut self,
        parent: &Arc<OwnedFd>,
        place: EntryPlace,
        stat: &Stat,
        error: std::io::Error,
        sink: Sink<'_>,
    ) -> Result<()> {
        if error.kind() == std::io::ErrorKind::NotFound {
            return gone(place, sink);
        }
        if is_out_of_files(&error) {
            return Err(out_of_files(error));
        }
        // It is there with its metadata, but what is in it is not known: left out, as everything
        // that cannot be read.
        let problem = Problem::new(&*place.path, &Error::io("listing it", error));
        tell(sink, Change::Noted(problem))?;
        if let Some(dir) = place.old.as_ref().and_then(|old| old.child) {
            tell(sink, Change::Emptied { dir, path: place.path.clone() })?;
        }
        self.put_dir(place, parent, stat, sink).map(|_| ())
    }

    /// Notes a directory and goes into it.
    fn enter(
        &mut self,
        place: EntryPlace,
        listing: Listing,
        verdict: Verdict,
        way: &mut Way,
        sink: Sink<'_>,
    ) -> Result<()> {
        let path = place.path.clone();
        let Listing { fd, stat, names } = listing;
        let mut names = match names {
            Ok(names) => names,
            Err(e) if is_out_of_files(&e) => return Err(out_of_files(e)),
            Err(e) => {
                let problem = Problem::new(&*path, &Error::io("listing it", e));
                tell(sink, Change::Noted(problem))?;
                Vec::new()
            }
        };
        self.filter.leave_marks(&fd, &mut names);
        let (dir, basis) = self.put_dir(place, &fd, &stat, sink)?;
        let basis = BasisCursor { dir: basis, ..BasisCursor::default() };
        way.enter(&path, fd, &stat, dir, names, basis);
        if let Some((level, _)) = way.deepest() {
            level.verdict = verdict;
        }
        Ok(())
    }

    /// Notes a directory as new, changed or unchanged; gives its number, and the number of what it
    /// was in the run before. `fd` is the directory itself, or its parent where it cannot be
    /// opened.
    fn put_dir(
        &mut self,
        mut place: EntryPlace,
        fd: &Arc<OwnedFd>,
        stat: &Stat,
        sink: Sink<'_>,
    ) -> Result<(DirId, Option<DirId>)> {
        let meta = Metadata::from_stat(stat)
            .ok_or_else(|| Error::new(ErrorKind::Io, "a directory of unknown type"))?;
        let old_dir = place.old.as_ref().and_then(|old| old.child);
        let same = place.old.as_ref().filter(|old| meta.is_unchanged_since(&old.meta));
        if let Some(old) = same
            && let Some(dir) = old.child
            && self.is_settled(&meta)
        {
            self.note_unchanged(Kind::Dir, 0, sink)?;
            return Ok((dir, Some(dir)));
        }
        let is_self = sys::is_same_file(fd.as_fd(), stat).unwrap_or(false);
        let captured = match is_self {
            true => entry::capture_file(fd.as_fd()),
            false => entry::capture(fd.as_fd(), &place.name, Kind::Dir),
        };
        let extra = match captured {
            Ok(extra) => extra,
            Err(e) => {
                let error = Error::io("reading its attributes", e);
                tell(sink, Change::Noted(Problem::new(&*place.path, &error)))?;
                Default::default()
            }
        };
        if let Some(old) = same
            && let Some(dir) = old.child
            && self.reader.content(old.version)?.extra == extra
        {
            self.note_unchanged(Kind::Dir, 0, sink)?;
            return Ok((dir, Some(dir)));
        }
        let version = self.numbers.new_version();
        let dir = old_dir.unwrap_or_else(|| self.numbers.new_dir());
        let content = Content { extra, ..Content::default() };
        let old = place.old.take();
        let place = EntryPlace { old, ..place };
        tell(sink, Change::Put { place, meta, version, child: Some(dir), content, linked: false })?;
        Ok((dir, old_dir))
    }

    /// Deals with everything that is not a directory.
    fn visit_leaf(
        &mut self,
        parent: &Arc<OwnedFd>,
        place: EntryPlace,
        stat: &Stat,
        meta: Metadata,
        sink: Sink<'_>,
    ) -> Result<()> {
        let key = (stat.dev, stat.ino);
        // A number may have been given to another file since: then nothing agrees but the number.
        if self.links.get(&key).is_some_and(|linked| linked.meta != meta) {
            self.links.remove(&key);
        }
        if stat.nlink > 1
            && let Some(linked) = self.links.get_mut(&key)
        {
            let (version, first) = (linked.version, linked.meta);
            linked.names_left = linked.names_left.saturating_sub(1);
            let is_last = linked.names_left == 0;
            if is_last {
                self.links.remove(&key);
            }
            if let Some(old) = &place.old
                && old.version == version
            {
                return self.note_unchanged(meta.kind, meta.size, sink);
            }
            return tell(sink, Change::Link { place, meta: first, version, is_last });
        }
        let unchanged = place.old.as_ref().filter(|old| self.is_unchanged(&meta, old));
        if let Some(old) = unchanged {
            self.expect_links(key, old.version, meta);
            return self.note_unchanged(meta.kind, meta.size, sink);
        }
        let version = self.numbers.new_version();
        self.expect_links(key, version, meta);
        if meta.kind == Kind::File {
            let job = FileJob { place, parent: parent.clone(), meta, version };
            return self.send_file(job, sink);
        }
        match capture_steady(parent, &place.name, meta) {
            Ok((meta, extra)) => {
                if let Some(old) = place.old.as_ref().filter(|it| meta.is_unchanged_since(&it.meta))
                    && self.reader.content(old.version)?.extra == extra
                {
                    let linked = meta.nlink > 1;
                    return tell(sink, Change::Same { old: old.clone(), version, linked });
                }
                let content = Content { extra, ..Content::default() };
                let linked = meta.nlink > 1;
                tell(sink, Change::Put { place, meta, version, child: None, content, linked })
            }
            Err(e) => {
                // Its other names are looked at by themselves.
                self.links.remove(&key);
                match e.kind() {
                    std::io::ErrorKind::NotFound => gone(place, sink),
                    _ => fail(place, "reading its metadata", e, sink),
                }
            }
        }
    }

    /// Counts an entry that is as it was.
    fn note_unchanged(&mut self, kind: Kind, size: u64, sink: Sink<'_>) -> Result<()> {
        let unchanged = &mut self.unchanged;
        match kind {
            Kind::Dir => unchanged.dirs += 1,
            _ => unchanged.entries += 1,
        }
        if kind == Kind::File {
            unchanged.files += 1;
            unchanged.bytes += size;
        }
        match unchanged.dirs + unchanged.entries >= UNCHANGED_MAX {
            true => self.send_unchanged(sink),
            false => Ok(()),
        }
    }

    fn send_unchanged(&mut self, sink: Sink<'_>) -> Result<()> {
        tell(sink, Change::Unchanged(std::mem::take(&mut self.unchanged)))
    }

    fn is_unchanged(&self, meta: &Metadata, old: &EntryRow) -> bool {
        let forced = self.options.force_read && meta.kind == Kind::File;
        !forced && self.is_settled(meta) && meta.is_unchanged_since(&old.meta)
    }

    /// Whether the times of change of an entry prove anything. What changed well before the run
    /// before began was read, or judged, by that run after its last change; what changed later may
    /// have changed again unseen.
    fn is_settled(&self, meta: &Metadata) -> bool {
        self.basis.as_ref().is_some_and(|basis| is_well_before(meta.ctime, basis.started))
    }

    fn expect_links(&mut self, key: (u64, u64), version: VersionId, meta: Metadata) {
        if meta.nlink > 1 {
            let names_left = meta.nlink - 1;
            self.links.insert(key, Linked { version, meta, names_left });
        }
    }

    fn send_file(&mut self, job: FileJob, sink: Sink<'_>) -> Result<()> {
        if job.meta.size >= OWN_BLOCK_BYTES_MIN {
            return sink(Item::Unit(Unit::Large(Box::new(job))));
        }
        // A pack is what fits one frame, so that its files need one read when they come back.
        let full = self.pack_bytes + job.meta.size > u64::from(FRAME_PLAIN_BYTES_MAX);
        let is_new_dir = self.pack.last().is_none_or(|it| !Arc::ptr_eq(&it.parent, &job.parent));
        let many = self.pack_dirs + usize::from(is_new_dir) > PACK_DIRS_MAX;
        if full || many || self.pack.len() >= PACK_FILES_MAX {
            self.send_pack(sink)?;
        }
        self.pack_bytes += job.meta.size;
        self.pack_dirs += usize::from(is_new_dir || self.pack.is_empty());
        self.pack.push(job);
        Ok(())
    }

    fn send_pack(&mut self, sink: Sink<'_>) -> Result<()> {
        if self.pack.is_empty() {
            return Ok(());
        }
        (self.pack_bytes, self.pack_dirs) = (0, 0);
        sink(Item::Unit(Unit::Pack(std::mem::take(&mut self.pack))))
    }

    /// The entry `name` of the run before; those that come before it are gone.
    fn take_basis(
        &mut self,
        level: &mut Level,
        dir_path: &[u8],
        name: &[u8],
        sink: Sink<'_>,
    ) -> Result<Option<EntryRow>> {
        loop {
            let Some(row) = self.next_basis(&mut level.basis)? else { return Ok(None) };
            match row.name.as_slice().cmp(name) {
                std::cmp::Ordering::Less => send_gone(dir_path, row, sink)?,
                std::cmp::Ordering::Equal => return Ok(Some(row)),
                std::cmp::Ordering::Greater => {
                    level.basis.page.push_front(row);
                    return Ok(None);
                }
            }
        }
    }

    /// What is left of the run before at the end of a directory is gone.
    fn leave(&mut self, level: &mut Level, path: &[u8], sink: Sink<'_>) -> Result<()> {
        while let Some(row) = self.next_basis(&mut level.basis)? {
            send_gone(path, row, sink)?;
        }
        Ok(())
    }

    fn next_basis(&self, cursor: &mut BasisCursor) -> Result<Option<EntryRow>> {
        if let Some(row) = cursor.page.pop_front() {
            return Ok(Some(row));
        }
        let (Some(dir), Some(basis)) = (cursor.dir, &self.basis) else { return Ok(None) };
        let page = self.reader.list(basis.id, dir, cursor.last.as_deref(), PAGE_ENTRIES)?;
        if page.len() < PAGE_ENTRIES {
            cursor.dir = None;
        }
        cursor.last = page.last().map(|row| row.name.clone());
        cursor.page = page.into();
        Ok(cursor.page.pop_front())
    }
}

/// Tells of a change.
pub fn tell(sink: Sink<'_>, change: Change) -> Result<()> {
    sink(Item::Change(change))
}

fn gone(place: EntryPlace, sink: Sink<'_>) -> Result<()> {
    match place.old {
        Some(row) => tell(sink, Change::Gone { row, path: place.path }),
        None => Ok(()),
    }
}

fn send_gone(dir: &[u8], row: EntryRow, sink: Sink<'_>) -> Result<()> {
    let path = join(dir, &row.name);
    tell(sink, Change::Gone { row, path })
}

fn fail(place: EntryPlace, what: &str, error: std::io::Error, sink: Sink<'_>) -> Result<()> {
    if is_out_of_files(&error) {
        return Err(out_of_files(error));
    }
    let problem = Problem::new(&*place.path, &Error::io(what, error));
    tell(sink, Change::Failed { place, version: None, problem })
}
