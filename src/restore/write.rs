//! Writing entries out below one directory.

use std::collections::{HashMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::Sender;
use parking_lot::Mutex;

use super::Summary;
use crate::catalog::{EntryRow, Run, VersionId};
use crate::chunk::HashAlgo;
use crate::chunk::file_hash::FileHash;
use crate::entry::{self, Applied, Extra, Kind, Metadata};
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::progress::Progress;
use crate::snapshot::{FileMap, Snapshots};
use crate::sys::{at, c};

/// Entries read from the catalog at a time.
const PAGE_ENTRIES: usize = 512;
/// Bytes read and written at a time.
const PIECE_BYTES: usize = 1 << 20;

/// What all threads of a restore share.
pub struct Shared<'a> {
    snapshots: &'a Snapshots,
    progress: &'a Progress,
    hash: HashAlgo,
    problems: Mutex<Vec<Problem>>,
    entries: AtomicU64,
    dirs: AtomicU64,
    bytes: AtomicU64,
    owners_skipped: AtomicU64,
}

impl<'a> Shared<'a> {
    pub fn new(snapshots: &'a Snapshots, progress: &'a Progress) -> Result<Shared<'a>> {
        Ok(Shared {
            snapshots,
            progress,
            hash: snapshots.settings()?.hash,
            problems: Mutex::default(),
            entries: AtomicU64::new(0),
            dirs: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            owners_skipped: AtomicU64::new(0),
        })
    }

    pub fn into_summary(self) -> Summary {
        Summary {
            entries: self.entries.into_inner(),
            dirs: self.dirs.into_inner(),
            bytes: self.bytes.into_inner(),
            problems: self.problems.into_inner(),
            owners_skipped: self.owners_skipped.into_inner(),
        }
    }

    fn problem(&self, path: &[u8], error: &Error) {
        let problem = Problem::new(path, error);
        log::warn!("{problem}");
        Progress::add(&self.progress.problems, 1);
        self.problems.lock().push(problem);
    }

    fn note_applied(&self, path: &[u8], applied: Applied) {
        if applied.owner_not_permitted {
            self.owners_skipped.fetch_add(1, Ordering::Relaxed);
        }
        for (what, error) in applied.failed {
            self.problem(path, &Error::io(format!("setting its {what}"), error));
        }
    }

    /// Restores one entry that is not a directory, in this thread.
    pub fn restore_leaf(&self, dir: &Arc<TargetDir<'a>>, entry: &EntryRow, path: &[u8]) {
        match self.make_leaf(dir, entry, path) {
            Ok(Some((file, temp))) => {
                let (dir, entry) = (dir.clone(), entry.clone());
                self.fill(&Job { dir, file, temp, entry, path: path.to_vec() });
            }
            Ok(None) => {}
            Err(e) => self.problem(path, &e),
        }
    }

    /// Makes an entry that is not a directory. A regular file is made empty and handed back, to be
    /// filled, with the temporary name that it has where its own is taken; everything else is
    /// complete.
    fn make_leaf(
        &self,
        dir: &TargetDir<'_>,
        entry: &EntryRow,
        path: &[u8],
    ) -> Result<Option<(File, Option<OsString>)>> {
        let name = OsStr::from_bytes(&entry.name);
        let meta = &entry.meta;
        let failed = |e| Error::io("creating it", e);
        if meta.kind == Kind::File {
            let made = make_beside(name, |name| at::create_file(&dir.fd, name));
            return made.map(Some).map_err(failed);
        }
        let map = self.snapshots.file(entry.version)?;
        let extra = &map.content.extra;
        let made = make_beside(name, |name| match (&extra.target, meta.kind) {
            (Some(target), Kind::Symlink) => at::symlink(OsStr::from_bytes(target), &dir.fd, name),
            (None, Kind::Symlink) => Err(io::Error::other("the link has no target")),
            _ => at::mknod(&dir.fd, name, meta.kind.type_bits() | 0o600, meta.rdev),
        });
        let ((), temp) = made.map_err(failed)?;
        let made_as = temp.as_deref().unwrap_or(name);
        self.note_applied(path, entry::apply(dir.fd.as_fd(), made_as, meta, extra));
        put_in_place(dir, temp.as_deref(), name).map_err(failed)?;
        self.entries.fetch_add(1, Ordering::Relaxed);
        Progress::add(&self.progress.entries, 1);
        Ok(None)
    }

    /// Fills a file with its content and sets its metadata; removes it again if that fails, and
    /// says whether it is there.
    ///
    /// File flags close a file to renames and links, so they come last: here, or, for a file with
    /// further names, once those are made.
    pub fn fill(&self, job: &Job<'_>) -> bool {
        let name = OsStr::from_bytes(&job.entry.name);
        let result = self.progress.check().and_then(|()| self.fill_checked(job));
        let result = result.and_then(|extra| {
            let applied = entry::apply_fd(job.file.as_fd(), &job.entry.meta, &extra);
            self.note_applied(&job.path, applied);
            put_in_place(&job.dir, job.temp.as_deref(), name)
                .map_err(|e| Error::io("giving it its name", e))?;
            if job.entry.meta.nlink == 1 {
                self.note_applied(&job.path, entry::apply_flags(job.file.as_fd(), &extra));
            }
            Ok(())
        });
        match result {
            Ok(()) => {
                self.entries.fetch_add(1, Ordering::Relaxed);
                self.bytes.fetch_add(job.entry.meta.size, Ordering::Relaxed);
                Progress::add(&self.progress.entries, 1);
                true
            }
            Err(e) => {
                // What had the name before is still there, if anything had.
                let made_as = job.temp.as_deref().unwrap_or(name);
                if let Err(e) = at::unlink(&job.dir.fd, made_as)
                    && e.kind() != io::ErrorKind::NotFound
                {
                    log::warn!("{}: could not be removed: {e}", crate::error::Quoted(&job.path));
                }
                self.problem(&job.path, &e);
                false
            }
        }
    }

    fn fill_checked(&self, job: &Job<'_>) -> Result<Extra> {
        let map = self.snapshots.file(job.entry.version)?;
        if map.size() != job.entry.meta.size {
            return Err(Error::corrupt("its extents do not cover its size"));
        }
        entry::prepare(job.file.as_fd(), &map.content.extra);
        let has_holes = map.has_holes();
        let mut hash = match has_holes {
            true => FileHash::of_segments(self.hash),
            false => FileHash::of_content(self.hash),
        };
        let mut buffer =
            vec![0; PIECE_BYTES.min(usize::try_from(map.size()).unwrap_or(PIECE_BYTES))];
        for (start, end) in map.segments() {
            if has_holes {
                hash.begin_segment(start, end - start);
            }
            self.copy_segment(job, &map, start, end, &mut buffer, &mut hash)?;
        }
        if has_holes {
            job.file.set_len(map.size()).map_err(|e| Error::io("setting its size", e))?;
        }
        let found = match has_holes {
            true => hash.finish_segments(map.size()),
            false => hash.finish(),
        };
        if map.content.hash != Some(found) {
            return Err(Error::corrupt("its content does not match its hash"));
        }
        Ok(map.content.extra.clone())
    }

    fn copy_segment(
        &self,
        job: &Job<'_>,
        map: &FileMap,
        start: u64,
        end: u64,
        buffer: &mut [u8],
        hash: &mut FileHash,
    ) -> Result<()> {
        let mut at = start;
        while at < end {
            self.progress.check()?;
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let piece = buffer.get_mut(..len).unwrap_or_default();
            self.snapshots.read(map, at, piece)?;
            hash.add_bytes(piece);
            job.file.write_all_at(piece, at).map_err(|e| Error::io("writing it", e))?;
            at += len as u64;
            Progress::add(&self.progress.bytes, len as u64);
        }
        Ok(())
    }
}

/// Makes something under its name, or, where that is taken, under a temporary one beside it, which
/// is given back: what has the name stays until the new thing is complete.
fn make_beside<T>(
    name: &OsStr,
    make: impl Fn(&OsStr) -> io::Result<T>,
) -> io::Result<(T, Option<OsString>)> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    match make(name) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        other => return other.map(|it| (it, None)),
    }
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let temp = OsString::from(format!(".raidtape-{}-{number}", std::process::id()));
    make(&temp).map(|it| (it, Some(temp)))
}

/// Gives what was made beside its name that name. A directory that has it is not replaced.
fn put_in_place(dir: &TargetDir<'_>, temp: Option<&OsStr>, name: &OsStr) -> io::Result<()> {
    let Some(temp) = temp else { return Ok(()) };
    let renamed = at::rename(&dir.fd, temp, &dir.fd, name, 0);
    // Two names of one file are not renamed over each other; the temporary one goes in any case.
    match at::unlink(&dir.fd, temp) {
        Err(e) if renamed.is_ok() && e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => renamed,
    }
}

/// A file to be filled.
pub struct Job<'a> {
    dir: Arc<TargetDir<'a>>,
    file: File,
    /// The name it has until it is complete, where its own is taken.
    temp: Option<OsString>,
    entry: EntryRow,
    path: Vec<u8>,
}

/// A directory of the target that is being filled. When the last user lets go of it, it gets its
/// metadata; its parent is kept until then, so times are set from the deepest directory up.
pub struct TargetDir<'a> {
    fd: OwnedFd,
    finish: Option<Finish<'a>>,
}

struct Finish<'a> {
    shared: Arc<Shared<'a>>,
    meta: Metadata,
    extra: Extra,
    path: Vec<u8>,
    _parent: Option<Arc<TargetDir<'a>>>,
}

impl TargetDir<'_> {
    /// A directory whose metadata stays as it is.
    pub fn plain(fd: OwnedFd) -> TargetDir<'static> {
        TargetDir { fd, finish: None }
    }
}

impl Drop for TargetDir<'_> {
    fn drop(&mut self) {
        if let Some(it) = &self.finish {
            let applied = entry::apply_fd(self.fd.as_fd(), &it.meta, &it.extra);
            it.shared.note_applied(&it.path, applied);
            let applied = entry::apply_flags(self.fd.as_fd(), &it.extra);
            it.shared.note_applied(&it.path, applied);
        }
    }
}

/// The walk of one restore.
pub struct Tree<'a> {
    snapshots: &'a Snapshots,
    run: &'a Run,
    shared: Arc<Shared<'a>>,
    jobs: Sender<Job<'a>>,
    /// Versions with several names, of which not all have been made: where the first one is.
    links: HashMap<VersionId, Linked>,
}

struct Linked {
    path: Vec<Vec<u8>>,
    names_left: u64,
}

struct Level<'a> {
    dir: Arc<TargetDir<'a>>,
    id: i64,
    names: Vec<Vec<u8>>,
    /// Entries still to come, and the name from which the next page begins.
    page: VecDeque<EntryRow>,
    after: Option<Vec<u8>>,
}

impl<'a> Tree<'a> {
    pub fn new(
        snapshots: &'a Snapshots,
        run: &'a Run,
        shared: Arc<Shared<'a>>,
        jobs: Sender<Job<'a>>,
    ) -> Tree<'a> {
        Tree { snapshots, run, shared, jobs, links: HashMap::new() }
    }

    /// Restores directory `root` into the open directory `fd`.
    pub fn walk(&mut self, fd: OwnedFd, root: &EntryRow) -> Result<()> {
        let base = fd.try_clone().map_err(|e| Error::io("target", e))?;
        let mut levels = Vec::new();
        levels.extend(self.level(fd, root, Vec::new(), None)?);
        while let Some(level) = levels.last_mut() {
            self.shared.progress.check()?;
            let Some(entry) = self.next_entry(level)? else {
                levels.pop();
                continue;
            };
            let dir = level.dir.clone();
            let mut names = level.names.clone();
            names.push(entry.name.clone());
            if entry.meta.kind != Kind::Dir {
                self.leaf(&base, &dir, entry, names)?;
                continue;
            }
            match self.make_dir(&dir, &entry.name) {
                Ok(fd) => levels.extend(self.level(fd, &entry, names, Some(dir))?),
                Err(e) => {
                    self.shared.problem(&names.join(&b'/'), &Error::io("creating it", e));
                }
            }
        }
        // Names that are not below what is restored will not be made.
        let links = std::mem::take(&mut self.links);
        links.into_iter().try_for_each(|(version, it)| self.close_file(&base, version, &it.path))
    }

    /// Gives a file that has all its names its flags.
    fn close_file(&self, base: &OwnedFd, version: VersionId, path: &[Vec<u8>]) -> Result<()> {
        let map = self.snapshots.file(version)?;
        if map.content.extra.flags == 0 {
            return Ok(());
        }
        let applied = open_dir_of(base, path).and_then(|(dir, name)| {
            let file = at::open_read(&dir, name)?;
            Ok(entry::apply_flags(file.as_fd(), &map.content.extra))
        });
        let path = path.join(&b'/');
        match applied {
            Ok(applied) => self.shared.note_applied(&path, applied),
            Err(e) => self.shared.problem(&path, &Error::io("setting its file flags", e)),
        }
        Ok(())
    }

    fn next_entry(&self, level: &mut Level<'a>) -> Result<Option<EntryRow>> {
        if level.page.is_empty() {
            let after = level.after.as_deref();
            let page = self.snapshots.list(self.run.id, level.id, after, PAGE_ENTRIES)?;
            level.after = page.last().map(|it| it.name.clone());
            level.page = page.into();
        }
        Ok(level.page.pop_front())
    }

    fn level(
        &self,
        fd: OwnedFd,
        entry: &EntryRow,
        names: Vec<Vec<u8>>,
        parent: Option<Arc<TargetDir<'a>>>,
    ) -> Result<Option<Level<'a>>> {
        let Some(id) = entry.child else { return Ok(None) };
        // Or what is made in it would inherit what the snapshot does not have. Mostly there is
        // none.
        let _ = at::fremove_xattr(&fd, OsStr::new("system.posix_acl_default"));
        let extra = self.snapshots.file(entry.version)?.content.extra.clone();
        let finish = Finish {
            shared: self.shared.clone(),
            meta: entry.meta,
            extra,
            path: names.join(&b'/'),
            _parent: parent,
        };
        self.shared.dirs.fetch_add(1, Ordering::Relaxed);
        let dir = Arc::new(TargetDir { fd, finish: Some(finish) });
        Ok(Some(Level { dir, id, names, page: VecDeque::new(), after: None }))
    }

    /// Makes a directory, or takes the one that is there, and lets this process write into it.
    fn make_dir(&self, dir: &TargetDir<'_>, name: &[u8]) -> io::Result<OwnedFd> {
        let name = OsStr::from_bytes(name);
        match at::mkdir(&dir.fd, name, 0o700) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                if !at::stat(&dir.fd, name)?.is_dir() {
                    at::unlink(&dir.fd, name)?;
                    at::mkdir(&dir.fd, name, 0o700)?;
                }
            }
            other => other?,
        }
        at::open_dir(&dir.fd, name)
    }

    fn expect_links(&mut self, version: VersionId, nlink: u64, path: Vec<Vec<u8>>) {
        if nlink > 1 {
            self.links.insert(version, Linked { path, names_left: nlink - 1 });
        }
    }

    fn leaf(
        &mut self,
        base: &OwnedFd,
        dir: &Arc<TargetDir<'a>>,
        entry: EntryRow,
        names: Vec<Vec<u8>>,
    ) -> Result<()> {
        let path = names.join(&b'/');
        if entry.meta.nlink > 1
            && let Some(linked) = self.links.get_mut(&entry.version)
        {
            linked.names_left = linked.names_left.saturating_sub(1);
            let result = make_link(base, &linked.path, dir, &entry.name);
            if linked.names_left == 0
                && let Some(linked) = self.links.remove(&entry.version)
            {
                self.close_file(base, entry.version, &linked.path)?;
            }
            match result {
                Ok(()) => {
                    self.shared.entries.fetch_add(1, Ordering::Relaxed);
                    Progress::add(&self.shared.progress.entries, 1);
                }
                Err(e) => self.shared.problem(&path, &Error::io("linking it", e)),
            }
            return Ok(());
        }
        let (version, nlink) = (entry.version, entry.meta.nlink);
        match self.shared.make_leaf(dir, &entry, &path) {
            Ok(None) => {
                self.expect_links(version, nlink, names);
                Ok(())
            }
            Ok(Some((file, temp))) if nlink > 1 => {
                // Before any other name is linked to it, it has to be known to be good.
                if self.shared.fill(&Job { dir: dir.clone(), file, temp, entry, path }) {
                    self.expect_links(version, nlink, names);
                }
                Ok(())
            }
            Ok(Some((file, temp))) => {
                let job = Job { dir: dir.clone(), file, temp, entry, path };
                let gone = |_| Error::new(ErrorKind::Io, "the threads that write have ended");
                self.jobs.send(job).map_err(gone)
            }
            Err(e) => {
                self.shared.problem(&path, &e);
                Ok(())
            }
        }
    }
}

/// Opens the directory of `path`, below `base`, going down without following any link; gives the
/// last name too.
fn open_dir_of<'p>(base: &OwnedFd, path: &'p [Vec<u8>]) -> io::Result<(OwnedFd, &'p OsStr)> {
    let Some((last, dirs)) = path.split_last() else {
        return Err(io::Error::from_raw_os_error(c::ENOENT));
    };
    let mut dir = base.try_clone()?;
    for name in dirs {
        dir = at::open_dir(&dir, OsStr::from_bytes(name))?;
    }
    Ok((dir, OsStr::from_bytes(last)))
}

/// Links `path`, below `base`, to `name` in `dir`.
fn make_link(base: &OwnedFd, path: &[Vec<u8>], dir: &TargetDir<'_>, name: &[u8]) -> io::Result<()> {
    let (at_dir, last) = open_dir_of(base, path)?;
    let name = OsStr::from_bytes(name);
    at::stat(&at_dir, last)?;
    let ((), temp) = make_beside(name, |name| at::link(&at_dir, last, &dir.fd, name))?;
    put_in_place(dir, temp.as_deref(), name)
}
