//! Restoring: one file, a folder, or a whole run, written out by several threads.
//!
//! Every file's hash is checked before it gets its name; what does not match, or whose blocks are
//! damaged, is named and never put in the place of what is there. Nothing is written outside the
//! target: the walk goes down one open directory at a time and follows no link. A directory gets
//! its metadata when the last thing in it is done.

mod content;
mod delete;
mod filter;
mod leaf;
mod owners;
mod shared;
mod target;
mod walk;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use crossbeam_channel::bounded;

use crate::catalog::{EntryRow, Run};
use crate::entry::{Kind, check_name};
use crate::error::{Error, Problem, Result};
use crate::progress::Progress;
use crate::snapshot::{Found, Snapshots};
use crate::sys::{self, quoted};

use content::Scratch;
use leaf::Job;
pub use owners::Owners;
use shared::{Decision, Outcome, Shared};
use target::TargetDir;
use walk::{Tree, open_target};

/// When a restore replaces what is there under an entry's name. Directories are always merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overwrite {
    /// Whatever it is, down to the last byte; what is alike is not written.
    #[default]
    Always,
    /// Unless type, size and time of change agree.
    IfChanged,
    /// If what the snapshot has was changed later.
    IfNewer,
    /// Never: what is there stays as it is.
    Never,
}

/// What to restore, and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only what matches one of these, as in a .gitignore, on the path in the snapshot.
    pub include: Vec<String>,
    /// Not what matches one of these.
    pub exclude: Vec<String>,
    /// Only tell what would be done.
    pub dry_run: bool,
    /// What becomes of what is there.
    pub overwrite: Overwrite,
    /// Remove what the snapshot does not have.
    pub delete: bool,
    /// Read everything back that was written.
    pub verify: bool,
    /// Whose restored things are.
    pub owners: Owners,
}

/// What a dry run says would be done to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It would be made.
    Create,
    /// What is there would be brought up to date, or make room.
    Replace,
    /// It would be removed.
    Delete,
}

/// A restore to be done.
pub struct Work<'a> {
    /// Where from.
    pub snapshots: &'a Snapshots,
    /// How.
    pub options: &'a Options,
    /// Where it shows how far it is.
    pub progress: &'a Progress,
    /// Told of each step of a dry run, with the path in the snapshot.
    pub tell: &'a (dyn Fn(Step, &[u8]) + Sync),
}

/// What was restored; in a dry run, what would be.
#[derive(Debug, Default)]
pub struct Summary {
    /// Entries other than directories.
    pub entries: u64,
    /// Directories.
    pub dirs: u64,
    /// Bytes of these files.
    pub bytes: u64,
    /// Bytes of them that had to be written.
    pub bytes_written: u64,
    /// Bytes of them that share the volume's blocks.
    pub bytes_shared: u64,
    /// Files that were read back.
    pub verified: u64,
    /// Entries that were there already as they should be.
    pub unchanged: u64,
    /// Entries in whose place something else stays.
    pub kept: u64,
    /// Entries and directories that were removed.
    pub deleted: u64,
    /// What could not be restored, each named; at most a thousand, and one of each kind.
    pub problems: Vec<Problem>,
    /// How many could not.
    pub problem_count: u64,
    /// Entries whose owner could not be set because only root may do that.
    pub owners_skipped: u64,
    /// What ended it before all was done; the rest says how far it had come.
    pub ended_by: Option<Error>,
}

/// Groups of files that wait for a worker at most.
const QUEUE_GROUPS_MAX: usize = 4;

/// Restores one entry that is not a directory to the path `dest`, or into it if it is a directory.
pub fn restore_file(work: &Work<'_>, found: &Found, dest: &Path) -> Result<Summary> {
    if found.entry.meta.kind == Kind::Dir {
        let path = crate::error::Quoted(&found.path);
        return Err(Error::usage(format!("'{path}' is a directory: use restore-folder")));
    }
    check_name(&found.entry.name)?;
    let (parent, name) = match (dest.is_dir(), dest.parent(), dest.file_name()) {
        (true, ..) => (dest, OsStr::from_bytes(&found.entry.name)),
        (false, Some(parent), Some(name)) => (parent, name),
        _ => return Err(Error::usage(format!("cannot restore to {}", quoted(dest)))),
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let failed = |e| Error::io(format!("target {}", quoted(parent)), e);
    let shared = Shared::new(work, &found.run)?;
    keep_out_of_store(&shared, parent)?;
    work.progress.set_phase("restoring");
    Progress::add(&work.progress.bytes_total, found.entry.meta.size);
    if work.options.dry_run {
        foretell_file(&shared, found, &parent.join(name))?;
        return Ok(shared.into_summary());
    }
    sys::make_dirs(parent).map_err(failed)?;
    keep_out_of_store(&shared, parent)?;
    let dir = Arc::new(TargetDir::plain(open_target(parent).map_err(failed)?));
    let mut entry = found.entry.clone();
    entry.name = name.as_bytes().to_vec();
    // No further name will be made.
    entry.meta.nlink = 1;
    let map = work.snapshots.file(entry.version)?;
    let mut scratch = Scratch::default();
    shared.leaf(&Job { dir, entry, map, path: found.path.clone() }, &mut scratch);
    scratch.verify(&shared);
    Ok(shared.into_summary())
}

fn foretell_file(shared: &Shared<'_>, found: &Found, dest: &Path) -> Result<()> {
    let outcome = match sys::lstat(dest) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Step::Create),
        Err(e) => return Err(Error::io(format!("target {}", quoted(dest)), e)),
        Ok(stat) => match shared.decide(&stat, &found.entry.meta) {
            Decision::Keep => Err(Outcome::Kept),
            Decision::Same => Err(Outcome::Unchanged),
            Decision::Replace => Ok(Step::Replace),
        },
    };
    if let Ok(step) = outcome {
        (shared.work.tell)(step, &found.path);
    }
    shared.note(outcome.err().unwrap_or(Outcome::Restored), &found.entry);
    Ok(())
}

/// Restores the contents and the metadata of a directory to `dest`, which is made if it is missing.
pub fn restore_folder(work: &Work<'_>, found: &Found, dest: &Path) -> Result<Summary> {
    if found.entry.meta.kind != Kind::Dir {
        let path = crate::error::Quoted(&found.path);
        return Err(Error::usage(format!("'{path}' is not a directory: use restore")));
    }
    restore_tree(work, &found.run, &found.entry, &found.path, dest)
}

/// Restores a whole run to `dest`: the result is the run's tree and nothing else. So `dest` has to
/// be empty or missing, unless what else is in it may be deleted.
pub fn revert_to_run(work: &Work<'_>, run: &Run, dest: &Path) -> Result<Summary> {
    let is_empty = match std::fs::read_dir(dest) {
        Ok(mut entries) => entries.next().is_none(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => true,
        Err(e) => return Err(Error::io(format!("target {}", quoted(dest)), e)),
    };
    if !is_empty && !work.options.delete {
        let message = format!(
            "{} is not empty: choose an empty or a new directory, or use --delete",
            quoted(dest)
        );
        return Err(Error::usage(message));
    }
    let root = work.snapshots.root(run)?;
    Progress::add(&work.progress.entries_total, run.counts.files);
    Progress::add(&work.progress.bytes_total, run.counts.bytes);
    restore_tree(work, run, &root, b"", dest)
}

fn restore_tree(
    work: &Work<'_>,
    run: &Run,
    root: &EntryRow,
    path: &[u8],
    dest: &Path,
) -> Result<Summary> {
    let failed = |e| Error::io(format!("target {}", quoted(dest)), e);
    sys::raise_open_files_limit();
    let shared = Arc::new(Shared::new(work, run)?);
    keep_out_of_store(&shared, dest)?;
    let is_old = dest.is_dir();
    let fd = match work.options.dry_run {
        true if !is_old => None,
        true => Some(open_target(dest).map_err(failed)?),
        false => {
            sys::make_dirs(dest).map_err(failed)?;
            // By now every name on the way is there, and leads where it leads.
            keep_out_of_store(&shared, dest)?;
            Some(open_target(dest).map_err(failed)?)
        }
    };
    work.progress.set_phase("restoring");
    let workers = std::thread::available_parallelism().map_or(2, usize::from) + 1;
    let (groups_out, groups_in) = bounded(QUEUE_GROUPS_MAX);
    let result = std::thread::scope(|scope| {
        for _ in 0..workers {
            let (groups, shared) = (groups_in.clone(), shared.clone());
            scope.spawn(move || {
                let mut scratch = Scratch::default();
                for group in groups {
                    for job in group {
                        shared.leaf(&job, &mut scratch);
                    }
                }
                scratch.verify(&shared);
            });
        }
        // Threads that are gone must not leave the walk waiting for room in the queue.
        drop(groups_in);
        let mut tree = Tree::new(shared.clone(), groups_out)?;
        tree.walk(fd, is_old, root, path)
    });
    let shared = Arc::into_inner(shared).ok_or_else(|| Error::usage("restore is still at work"))?;
    let mut summary = shared.into_summary();
    if let Err(e) = result {
        // What ended the restore says more than that it has ended.
        summary.ended_by.get_or_insert(e);
    }
    Ok(summary)
}

/// Refuses a target in the store itself: what is there is neither to be merged nor deleted.
fn keep_out_of_store(shared: &Shared<'_>, dest: &Path) -> Result<()> {
    let failed = |e| Error::io(format!("target {}", quoted(dest)), e);
    let dest = std::path::absolute(dest).map_err(failed)?;
    // What is not there yet will be made below what is.
    let there = dest.ancestors().find_map(|it| it.canonicalize().ok()).unwrap_or_default();
    let is_own = |it: &&Path| sys::stat(it).is_ok_and(|stat| shared.is_own(&stat));
    match there.ancestors().find(is_own) {
        None => Ok(()),
        Some(own) => Err(Error::usage(format!(
            "cannot restore to {}: {} belongs to the store itself",
            quoted(&dest),
            quoted(own)
        ))),
    }
}
