//! What all threads of a restore share: counters, problems, and what is asked for.
//!
//! A want of room ends a restore: every file after it would fail just the same.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::filter::Filter;
use super::owners::{OwnerMap, Owners};
use super::{Overwrite, Step, Summary, Work};
use crate::catalog::{EntryRow, Run};
use crate::chunk::HashAlgo;
use crate::entry::{self, Applied, Extra, Kind, Metadata};
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::progress::Progress;
use crate::sys::{self, Stat, at};

/// Problems that are kept for the summary; more are counted.
const PROBLEMS_MAX: usize = 1000;

/// What becomes of what is there under an entry's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It stays.
    Keep,
    /// It is taken for what the snapshot has.
    Same,
    /// It makes room.
    Replace,
}

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is there now.
    Restored,
    /// It was there already.
    Unchanged,
    /// Something else is there and stays.
    Kept,
}

#[derive(Default)]
struct Problems {
    kept: Vec<Problem>,
    count: u64,
    kinds: HashSet<ErrorKind>,
}

/// What all threads of a restore share.
pub struct Shared<'a> {
    pub work: &'a Work<'a>,
    pub run: &'a Run,
    pub hash: HashAlgo,
    pub filter: Filter,
    pub is_root: bool,
    uid: u32,
    owners: OwnerMap<'a>,
    /// Device and inode number of what belongs to the store.
    own: HashSet<(u64, u64)>,
    /// Whether raw blocks may come to be shared: true until a target refuses.
    pub can_share: AtomicBool,
    problems: Mutex<Problems>,
    fatal: Mutex<Option<Error>>,
    is_over: AtomicBool,
    entries: AtomicU64,
    dirs: AtomicU64,
    bytes: AtomicU64,
    pub bytes_written: AtomicU64,
    pub bytes_shared: AtomicU64,
    pub verified: AtomicU64,
    unchanged: AtomicU64,
    kept: AtomicU64,
    deleted: AtomicU64,
    owners_skipped: AtomicU64,
}

impl<'a> Shared<'a> {
    pub fn new(work: &'a Work<'a>, run: &'a Run) -> Result<Shared<'a>> {
        let snapshots = work.snapshots;
        let options = work.options;
        let uid = sys::effective_uid();
        let is_root = uid == 0;
        let owners = match options.owners {
            // Who is not root can give nothing away, whatever the number is.
            Owners::ByName if !is_root => Owners::ByNumber,
            other => other,
        };
        Ok(Shared {
            work,
            run,
            hash: snapshots.settings()?.hash,
            filter: Filter::new(&options.include, &options.exclude)?,
            is_root,
            uid,
            owners: OwnerMap::new(snapshots, run.id, owners),
            own: own_files(work),
            can_share: AtomicBool::new(true),
            problems: Mutex::default(),
            fatal: Mutex::default(),
            is_over: AtomicBool::new(false),
            entries: AtomicU64::new(0),
            dirs: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            bytes_shared: AtomicU64::new(0),
            verified: AtomicU64::new(0),
            unchanged: AtomicU64::new(0),
            kept: AtomicU64::new(0),
            deleted: AtomicU64::new(0),
            owners_skipped: AtomicU64::new(0),
        })
    }

    /// What the restore came to.
    pub fn into_summary(self) -> Summary {
        let problems = self.problems.into_inner();
        Summary {
            entries: self.entries.into_inner(),
            dirs: self.dirs.into_inner(),
            bytes: self.bytes.into_inner(),
            bytes_written: self.bytes_written.into_inner(),
            bytes_shared: self.bytes_shared.into_inner(),
            verified: self.verified.into_inner(),
            unchanged: self.unchanged.into_inner(),
            kept: self.kept.into_inner(),
            deleted: self.deleted.into_inner(),
            problems: problems.kept,
            problem_count: problems.count,
            owners_skipped: self.owners_skipped.into_inner(),
            ended_by: self.fatal.into_inner(),
        }
    }

    /// Fails once the restore is to end.
    pub fn check(&self) -> Result<()> {
        self.work.progress.check()?;
        match self.is_over.load(Ordering::Relaxed) {
            true => Err(Error::new(ErrorKind::NoSpace, "the restore has ended")),
            false => Ok(()),
        }
    }

    pub fn problem(&self, path: &[u8], error: Error) {
        let problem = Problem::new(path, &error);
        log::warn!("{problem}");
        if ends_all(&error) {
            let error = match error.kind() {
                ErrorKind::NoSpace => error.context(crate::error::Quoted(path)),
                _ => error,
            };
            if !self.is_over.swap(true, Ordering::Relaxed) {
                *self.fatal.lock() = Some(error);
            }
            return;
        }
        self.work.progress.note(&problem);
        let mut problems = self.problems.lock();
        problems.count += 1;
        // One of each kind is kept in any case, for the exit code.
        if problems.kinds.insert(problem.kind) || problems.kept.len() < PROBLEMS_MAX {
            problems.kept.push(problem);
        }
    }

    /// What becomes of what is there, seen as `stat`, when `entry` goes to its name.
    pub fn decide(&self, stat: &Stat, meta: &Metadata) -> Decision {
        let is_kind = Kind::from_mode(stat.mode) == Some(meta.kind);
        // Where the snapshot's own file has that mode, the mode says nothing.
        let has_odd_mode = meta.mode & 0o7777 == sys::target::UNFINISHED_MODE;
        if is_kind && !has_odd_mode && self.is_unfinished(stat) {
            return Decision::Replace;
        }
        let has_size = matches!(meta.kind, Kind::File | Kind::Symlink);
        let is_device = matches!(meta.kind, Kind::CharDevice | Kind::BlockDevice);
        let is_same = is_kind
            && stat.mtime == meta.mtime
            && (!has_size || stat.size == meta.size)
            && (!is_device || stat.rdev == meta.rdev);
        match self.work.options.overwrite {
            Overwrite::Never => Decision::Keep,
            Overwrite::IfNewer if meta.mtime <= stat.mtime => Decision::Keep,
            Overwrite::IfChanged if is_same => Decision::Same,
            _ => Decision::Replace,
        }
    }

    /// Whether this is a file that a restore was killed at: no other has just this mode.
    pub fn is_unfinished(&self, stat: &Stat) -> bool {
        stat.is_file()
            && stat.mode & 0o7777 == sys::target::UNFINISHED_MODE
            && stat.uid == self.uid
            && stat.nlink == 1
    }

    /// The metadata for something that is `now` what it is.
    pub fn wanted(&self, meta: &Metadata, now: &Stat) -> Result<Metadata> {
        self.owners.of(meta, now)
    }

    /// Whether a file may be written in place: nobody who could write to it before has less to say
    /// over what it becomes.
    pub fn may_stay(&self, now: &Stat, meta: &Metadata) -> Result<bool> {
        let wanted = self.wanted(meta, now)?;
        let uid = if self.is_root { wanted.uid } else { self.uid };
        let others_may_write = now.mode & 0o022 & !wanted.mode != 0;
        Ok(now.uid == uid && !others_may_write)
    }

    pub fn is_own(&self, stat: &Stat) -> bool {
        self.own.contains(&(stat.dev, stat.ino))
    }

    /// Puts metadata on an open file or directory that is `now` what it is.
    pub fn apply(
        &self,
        fd: BorrowedFd<'_>,
        now: &Stat,
        meta: &Metadata,
        extra: &Extra,
        path: &[u8],
    ) {
        self.apply_with(fd, now, meta, path, |meta| entry::apply_made(fd, now, meta, extra));
    }

    /// The same through a handle that only stands for it.
    pub fn apply_handle(
        &self,
        fd: BorrowedFd<'_>,
        now: &Stat,
        meta: &Metadata,
        extra: &Extra,
        path: &[u8],
    ) {
        self.apply_with(fd, now, meta, path, |meta| entry::apply_handle(fd, now, meta, extra));
    }

    fn apply_with(
        &self,
        fd: BorrowedFd<'_>,
        now: &Stat,
        meta: &Metadata,
        path: &[u8],
        apply: impl FnOnce(&Metadata) -> Applied,
    ) {
        let wanted = match self.wanted(meta, now) {
            Ok(wanted) => wanted,
            Err(e) => return self.problem(path, e),
        };
        if !self.is_root && wanted.uid != now.uid && wanted.gid != now.gid {
            // The owner will be refused, but the group may be one that this user is in.
            let _ = at::chown_fd(fd, None, Some(wanted.gid));
        }
        self.note_applied(apply(&wanted), path);
    }

    /// Gives an open file or directory its file flags, after everything else.
    pub fn apply_flags(&self, fd: BorrowedFd<'_>, extra: &Extra, path: &[u8]) {
        self.note_applied(entry::apply_flags(fd, extra), path);
    }

    fn note_applied(&self, applied: Applied, path: &[u8]) {
        if applied.owner_not_permitted {
            self.owners_skipped.fetch_add(1, Ordering::Relaxed);
        }
        for (what, error) in applied.failed {
            self.problem(path, Error::io(format!("setting its {what}"), error));
        }
    }

    pub fn note(&self, outcome: Outcome, entry: &EntryRow) {
        let counter = match outcome {
            Outcome::Restored => &self.entries,
            Outcome::Unchanged => &self.unchanged,
            Outcome::Kept => &self.kept,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        Progress::add(&self.work.progress.entries, 1);
        if entry.meta.kind == Kind::File && outcome == Outcome::Restored {
            self.bytes.fetch_add(entry.meta.size, Ordering::Relaxed);
        }
    }

    pub fn note_dir(&self) {
        self.dirs.fetch_add(1, Ordering::Relaxed);
    }

    pub fn note_deleted(&self, path: &[u8]) {
        self.deleted.fetch_add(1, Ordering::Relaxed);
        if self.work.options.dry_run {
            (self.work.tell)(Step::Delete, path);
        }
    }

    pub fn note_written(&self, len: u64) {
        self.bytes_written.fetch_add(len, Ordering::Relaxed);
    }
}

/// Whether an error ends the restore: the next file would meet it too.
pub fn ends_all(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Interrupted)
}

/// Device and inode number of volumes and of the catalog's files.
fn own_files(work: &Work<'_>) -> HashSet<(u64, u64)> {
    let mut own = HashSet::new();
    let mut add = |path: &std::path::Path| {
        own.extend(sys::stat(path).ok().map(|it| (it.dev, it.ino)));
    };
    for volume in work.snapshots.volumes().present() {
        add(&volume.config.path);
    }
    // What cannot be read today may still hold the blocks.
    for (config, _) in work.snapshots.volumes().missing() {
        add(&config.path);
    }
    let catalog = work.snapshots.catalog();
    crate::catalog::own_files(catalog).iter().for_each(|it| add(it));
    add(&crate::catalog::ingest_dir(catalog));
    own
}

/// The state of an open file or directory.
pub fn state(fd: impl AsFd) -> Result<Stat> {
    sys::fstat(fd).map_err(|e| Error::io("looking at it", e))
}
