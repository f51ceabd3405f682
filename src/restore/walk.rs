//! The walk down a snapshot: directories and links are made by it, files are given out to threads.
//!
//! Files wait in a window until it is full. Then they are put in the order of their places on the
//! volumes and given out in groups of about a frame, so that each frame is read and decompressed
//! once, whatever order runs have left the data in. Window, pages and open directories are bounded,
//! and so is memory.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crossbeam_channel::Sender;

use super::content::Scratch;
use super::delete::{self, Gaps, Place};
use super::filter::Choice;
use super::leaf::Job;
use super::shared::{Decision, Outcome, Shared};
use super::target::{DirWish, TargetDir, belongs_to_store, open_there, os, temp_name};
use super::{Options, Step};
use crate::catalog::{DirId, EntryRow, VersionId};
use crate::entry::{Extra, Kind, Metadata, join};
use crate::error::{Error, ErrorKind, Result};
use crate::snapshot::FileMap;
use crate::sys::{self, at, c};

/// Entries read from the catalog at a time.
const PAGE_ENTRIES: usize = 512;
/// Files in a window, and different directories that they are in: each of those is kept open.
const WINDOW_FILES: usize = 2048;
const WINDOW_DIRS: usize = 192;
/// Files of a group, and bytes from which on it is full.
const GROUP_FILES: usize = 96;
const GROUP_BYTES: u64 = 1 << 20;

/// Files for one thread, in the order of their places.
pub type Group<'a> = Vec<Job<'a>>;

/// The walk of one restore.
pub struct Tree<'a> {
    shared: Arc<Shared<'a>>,
    groups: Sender<Group<'a>>,
    window: Vec<Job<'a>>,
    window_dirs: usize,
    scratch: Scratch,
    /// What the run could not read; only where something may be deleted.
    gaps: Option<Gaps>,
    /// The root of the target; in a dry run there may be none.
    base: Option<OwnedFd>,
    /// Length of the path of the root in the snapshot, with the slash after it.
    base_path_len: usize,
    /// Versions with several names, of which not all have been made: where the first one is.
    links: HashMap<VersionId, Linked>,
}

struct Linked {
    path: Vec<u8>,
    id: (u64, u64),
    names_left: u64,
    /// What it gets when it has all its names: file flags close a file to links.
    flags_of: Option<Arc<FileMap>>,
}

struct Level<'a> {
    dir: Dir<'a>,
    id: DirId,
    name: Vec<u8>,
    path: Vec<u8>,
    choice: Choice,
    meta: Metadata,
    extra: Option<Extra>,
    /// Entries still to come, and the name from which the next page begins.
    page: VecDeque<(EntryRow, Arc<FileMap>)>,
    after: Option<Vec<u8>>,
    /// Whether there is no page after this one.
    is_last: bool,
}

/// A directory on the way down.
enum Dir<'a> {
    Open(Arc<TargetDir<'a>>),
    /// Not made unless something in it is wanted.
    Perhaps,
    /// In a dry run: it would be made.
    Absent,
}

impl<'a> Tree<'a> {
    pub fn new(shared: Arc<Shared<'a>>, groups: Sender<Group<'a>>) -> Result<Tree<'a>> {
        let options = shared.work.options;
        let gaps = match options.delete {
            true => Some(Gaps::of(shared.work.snapshots, shared.run)?),
            false => None,
        };
        Ok(Tree {
            shared,
            groups,
            window: Vec::new(),
            window_dirs: 0,
            scratch: Scratch::default(),
            gaps,
            base: None,
            base_path_len: 0,
            links: HashMap::new(),
        })
    }

    /// Restores directory `root`, which has `path` in the snapshot, into the open directory `fd`,
    /// which was there before if `is_old`. Only a dry run does without it.
    pub fn walk(
        &mut self,
        fd: Option<OwnedFd>,
        is_old: bool,
        root: &EntryRow,
        path: &[u8],
    ) -> Result<()> {
        let Some(id) = root.child else { return Ok(()) };
        let choice = self.shared.filter.choose_deep(path);
        if choice == Choice::Left {
            return Ok(());
        }
        let again = |fd: &OwnedFd| fd.try_clone().map_err(|e| Error::io("target", e));
        self.base = fd.as_ref().map(again).transpose()?;
        self.base_path_len = if path.is_empty() { 0 } else { path.len() + 1 };
        let extra = self.shared.work.snapshots.file(root.version)?.content.extra.clone();
        self.shared.note_dir();
        let dir = match fd {
            None => {
                (self.shared.work.tell)(Step::Create, path);
                Dir::Absent
            }
            Some(fd) if self.options().dry_run => Dir::Open(Arc::new(TargetDir::plain(fd))),
            Some(fd) => {
                let wish = DirWish { meta: &root.meta, extra, path };
                Dir::Open(Arc::new(TargetDir::new(&self.shared, fd, is_old, wish, None)?))
            }
        };
        let mut levels = vec![Level {
            dir,
            id,
            name: Vec::new(),
            path: path.to_vec(),
            choice,
            meta: root.meta,
            extra: None,
            page: VecDeque::new(),
            after: None,
            is_last: false,
        }];
        while let Some(level) = levels.last_mut() {
            self.shared.check()?;
            let Some((entry, map)) = self.next_entry(level)? else {
                let level = levels.pop();
                self.leave(level)?;
                continue;
            };
            let path = join(&level.path, &entry.name);
            let is_dir = entry.meta.kind == Kind::Dir;
            let choice = self.shared.filter.choose(&path, is_dir, level.choice);
            match choice {
                Choice::Left => {}
                Choice::Perhaps => levels.extend(level_of(entry, &map, path, choice)),
                Choice::Wanted => {
                    if is_dir {
                        levels.extend(level_of(entry, &map, path, choice));
                        self.open_levels(&mut levels)?;
                    } else if self.open_levels(&mut levels)? {
                        let dir = levels.last().map(|it| &it.dir);
                        self.leaf(dir, entry, map, path)?;
                    }
                }
            }
        }
        self.flush()?;
        // Names that are not below what is restored will not be made.
        let links = std::mem::take(&mut self.links);
        links.values().for_each(|it| self.close_file(it));
        self.scratch.verify(&self.shared);
        Ok(())
    }

    fn options(&self) -> &'a Options {
        self.shared.work.options
    }

    fn next_entry(&self, level: &mut Level<'a>) -> Result<Option<(EntryRow, Arc<FileMap>)>> {
        if level.page.is_empty() && !level.is_last {
            let snapshots = self.shared.work.snapshots;
            let after = level.after.as_deref();
            let page = snapshots.list(self.shared.run.id, level.id, after, PAGE_ENTRIES)?;
            level.is_last = page.len() < PAGE_ENTRIES;
            level.after = page.last().map(|it| it.name.clone());
            let versions: Vec<VersionId> = page.iter().map(|it| it.version).collect();
            let maps = snapshots.files(&versions)?;
            level.page = page.into_iter().zip(maps).collect();
        }
        Ok(level.page.pop_front())
    }

    /// Makes the directories of the levels that are not made yet. Where that fails, the levels from
    /// there on are dropped, and the problem has been told.
    fn open_levels(&mut self, levels: &mut Vec<Level<'a>>) -> Result<bool> {
        let closed = |it: &Level<'_>| matches!(it.dir, Dir::Perhaps);
        while let Some(first) = levels.iter().position(closed) {
            let (above, below) = levels.split_at_mut(first);
            let (Some(parent), Some(level)) = (above.last(), below.first_mut()) else {
                return Ok(false);
            };
            match self.open_level(&parent.dir, level) {
                Ok(dir) => level.dir = dir,
                Err(e) => {
                    self.shared.problem(&level.path, e);
                    levels.truncate(first);
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn open_level(&self, parent: &Dir<'a>, level: &mut Level<'a>) -> Result<Dir<'a>> {
        let name = os(&level.name);
        if !self.options().dry_run {
            let Dir::Open(parent) = parent else { return Ok(Dir::Absent) };
            let extra = level.extra.take().unwrap_or_default();
            let wish = DirWish { meta: &level.meta, extra, path: &level.path };
            let dir = parent.make_dir(&self.shared, name, wish)?;
            self.shared.note_dir();
            return Ok(Dir::Open(Arc::new(dir)));
        }
        self.shared.note_dir();
        let tell = self.shared.work.tell;
        let Dir::Open(parent) = parent else {
            tell(Step::Create, &level.path);
            return Ok(Dir::Absent);
        };
        match at::stat(&parent.fd, name) {
            Ok(stat) if self.shared.is_own(&stat) => Err(belongs_to_store()),
            Ok(stat) if stat.is_dir() => {
                let opened = open_there(&parent.fd, name);
                let (fd, is_in_mount) = opened.map_err(|e| Error::io("opening it", e))?;
                let mut dir = TargetDir::plain(fd);
                dir.may_delete = parent.may_delete && is_in_mount;
                Ok(Dir::Open(Arc::new(dir)))
            }
            Ok(stat) if self.shared.decide(&stat, &level.meta) == Decision::Keep => {
                let message = "something that is no directory is in the way and stays";
                Err(Error::new(ErrorKind::Io, message))
            }
            Ok(_) => {
                tell(Step::Replace, &level.path);
                Ok(Dir::Absent)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                tell(Step::Create, &level.path);
                Ok(Dir::Absent)
            }
            Err(e) => Err(Error::io("looking at what is there", e)),
        }
    }

    /// All of a directory has been seen.
    fn leave(&mut self, level: Option<Level<'a>>) -> Result<()> {
        let (Some(level), Some(gaps)) = (level, &self.gaps) else { return Ok(()) };
        match &level.dir {
            Dir::Open(dir) if dir.is_old && dir.may_delete => {
                let place = Place { id: level.id, path: &level.path, choice: level.choice };
                delete::extras(&self.shared, gaps, &place, dir.fd.as_fd())
            }
            // In a dry run nothing has been looked into that is only perhaps restored.
            _ => Ok(()),
        }
    }

    fn leaf(
        &mut self,
        dir: Option<&Dir<'a>>,
        entry: EntryRow,
        map: Arc<FileMap>,
        path: Vec<u8>,
    ) -> Result<()> {
        let dir = match dir {
            Some(Dir::Open(dir)) => dir.clone(),
            _ => {
                // Only a dry run has directories that are not there.
                (self.shared.work.tell)(Step::Create, &path);
                self.shared.note(Outcome::Restored, &entry);
                return Ok(());
            }
        };
        let job = Job { dir, entry, map, path };
        if self.options().dry_run {
            self.foretell(&job);
            return Ok(());
        }
        let nlink = job.entry.meta.nlink;
        if nlink > 1 {
            return self.linked(job);
        }
        if job.entry.meta.kind != Kind::File {
            self.shared.leaf(&job, &mut self.scratch);
            return Ok(());
        }
        if self.window.last().is_none_or(|it| !Arc::ptr_eq(&it.dir, &job.dir)) {
            self.window_dirs += 1;
        }
        self.window.push(job);
        if self.window.len() >= WINDOW_FILES || self.window_dirs >= WINDOW_DIRS {
            self.flush()?;
        }
        Ok(())
    }

    /// Gives the files of the window out, in the order of their places.
    fn flush(&mut self) -> Result<()> {
        let mut window = std::mem::take(&mut self.window);
        self.window_dirs = 0;
        window.sort_by_cached_key(|it| it.map.place());
        self.shared.work.snapshots.will_need(window.iter().map(|it| &*it.map));
        let mut group = Vec::new();
        let (mut bytes, mut block) = (0, None);
        for job in window {
            let here = job.map.place().map(|it| it.0);
            let is_full = bytes >= GROUP_BYTES || group.len() >= GROUP_FILES;
            if !group.is_empty() && (is_full || here != block) {
                self.give(std::mem::take(&mut group))?;
                bytes = 0;
            }
            block = here;
            bytes += job.map.size();
            group.push(job);
        }
        if group.is_empty() { Ok(()) } else { self.give(group) }
    }

    fn give(&self, group: Group<'a>) -> Result<()> {
        let gone = |_| Error::new(ErrorKind::Io, "the threads that write have ended");
        self.groups.send(group).map_err(gone)
    }

    /// Tells what would become of an entry.
    fn foretell(&self, job: &Job<'a>) {
        let shared = &self.shared;
        let outcome = match at::stat(&job.dir.fd, os(&job.entry.name)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                (shared.work.tell)(Step::Create, &job.path);
                Outcome::Restored
            }
            Err(e) => {
                shared.problem(&job.path, Error::io("looking at what is there", e));
                return;
            }
            Ok(stat) => match shared.decide(&stat, &job.entry.meta) {
                Decision::Keep => Outcome::Kept,
                Decision::Same => Outcome::Unchanged,
                Decision::Replace => {
                    let name = os(&job.entry.name);
                    if stat.is_dir()
                        && let Err(e) = delete::foretell_room(shared, &job.dir, name, &job.path)
                    {
                        shared.problem(&job.path, e);
                    }
                    (shared.work.tell)(Step::Replace, &job.path);
                    Outcome::Restored
                }
            },
        };
        shared.note(outcome, &job.entry);
    }

    /// An entry with several names: the first one is made at once, because before any other name
    /// is linked to it, it has to be known to be good.
    fn linked(&mut self, job: Job<'a>) -> Result<()> {
        let version = job.entry.version;
        if let Some(linked) = self.links.get_mut(&version) {
            linked.names_left = linked.names_left.saturating_sub(1);
            let base = self.base.as_ref();
            let below = linked.path.get(self.base_path_len..).unwrap_or_default();
            match make_link(&self.shared, base, below, linked.id, &job) {
                Ok(outcome) => self.shared.note(outcome, &job.entry),
                Err(e) => self.shared.problem(&job.path, e),
            }
            if linked.names_left == 0
                && let Some(linked) = self.links.remove(&version)
            {
                self.close_file(&linked);
            }
            return Ok(());
        }
        let outcome = self.shared.leaf(&job, &mut self.scratch);
        if matches!(outcome, Some(Outcome::Restored | Outcome::Unchanged)) {
            let stat = match at::stat(&job.dir.fd, os(&job.entry.name)) {
                Ok(stat) => stat,
                Err(e) => {
                    self.shared.problem(&job.path, Error::io("looking at it", e));
                    return Ok(());
                }
            };
            let names_left = job.entry.meta.nlink - 1;
            let id = (stat.dev, stat.ino);
            let flags_of = (job.map.content.extra.flags != 0).then_some(job.map);
            self.links.insert(version, Linked { path: job.path, id, names_left, flags_of });
        }
        Ok(())
    }

    /// Gives a file that has all its names its flags.
    fn close_file(&self, linked: &Linked) {
        let (Some(map), Some(base)) = (&linked.flags_of, &self.base) else { return };
        let below = linked.path.get(self.base_path_len..).unwrap_or_default();
        let opened = open_dir_of(base, below).and_then(|(dir, name)| {
            let file = at::open_read(&dir, name)?;
            let stat = sys::fstat(&file)?;
            match (stat.dev, stat.ino) == linked.id {
                true => Ok(file),
                false => Err(io::Error::other("it is another file by now")),
            }
        });
        match opened {
            Ok(file) => {
                self.shared.apply_flags(file.as_fd(), &map.content.extra, &linked.path);
            }
            Err(e) => self.shared.problem(&linked.path, Error::io("setting its file flags", e)),
        }
    }
}

fn level_of<'a>(
    entry: EntryRow,
    map: &FileMap,
    path: Vec<u8>,
    choice: Choice,
) -> Option<Level<'a>> {
    Some(Level {
        dir: Dir::Perhaps,
        id: entry.child?,
        name: entry.name,
        path,
        choice,
        meta: entry.meta,
        extra: Some(map.content.extra.clone()),
        page: VecDeque::new(),
        after: None,
        is_last: false,
    })
}

/// Links the file `id` at `path`, below `base`, to the job's name.
fn make_link(
    shared: &Shared<'_>,
    base: Option<&OwnedFd>,
    path: &[u8],
    id: (u64, u64),
    job: &Job<'_>,
) -> Result<Outcome> {
    let failed = |e| Error::io("linking it", e);
    let base = base.ok_or_else(|| failed(io::Error::from_raw_os_error(c::ENOENT)))?;
    let (at_dir, last) = open_dir_of(base, path).map_err(failed)?;
    let name = os(&job.entry.name);
    let first = at::stat(&at_dir, last).map_err(failed)?;
    if (first.dev, first.ino) != id {
        let message = "linking it: somebody else changes what it is to be linked to";
        return Err(Error::new(ErrorKind::Io, message));
    }
    match at::link(&at_dir, last, &job.dir.fd, name) {
        Ok(()) => return Ok(Outcome::Restored),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(failed(e)),
    }
    let stat = at::stat(&job.dir.fd, name).map_err(failed)?;
    if (stat.dev, stat.ino) == id {
        return Ok(Outcome::Unchanged);
    }
    if shared.is_own(&stat) {
        return Err(belongs_to_store());
    }
    if shared.decide(&stat, &job.entry.meta) == Decision::Keep {
        return Ok(Outcome::Kept);
    }
    let temp = temp_name();
    at::link(&at_dir, last, &job.dir.fd, &temp).map_err(failed)?;
    let done = job.dir.put_in_place(shared, &temp, name, &job.path);
    if done.is_err() {
        // What has the name stays; the further name of the other goes.
        let _ = at::unlink(&job.dir.fd, &temp);
    }
    done.map(|()| Outcome::Restored)
}

/// Opens the directory of `path`, below `base`, going down without following any link; gives the
/// last name too.
fn open_dir_of<'p>(base: &OwnedFd, path: &'p [u8]) -> io::Result<(OwnedFd, &'p OsStr)> {
    let mut names = path.split(|byte| *byte == b'/');
    let last = names.next_back().unwrap_or_default();
    let mut dir = base.try_clone()?;
    for name in names {
        dir = at::open_dir(&dir, os(name))?;
    }
    Ok((dir, os(last)))
}

/// Opens the user's own path, which may lead over links; what lies below is walked without them.
pub fn open_target(path: &std::path::Path) -> io::Result<OwnedFd> {
    sys::open_dir(&path.canonicalize()?)
}
