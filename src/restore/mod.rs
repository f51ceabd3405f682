//! Restoring: one file, a folder, or a whole run, written out by several threads.
//!
//! Every file's hash is checked as it is written; a file that does not match, or whose blocks are
//! damaged, is removed again and named. Nothing is written outside the target: the walk goes down
//! one open directory at a time, follows no link, and makes every file anew. A directory gets its
//! metadata when the last thing in it is done.

mod write;

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

use write::{Shared, TargetDir, Tree};

/// What was restored.
#[derive(Debug, Default)]
pub struct Summary {
    /// Entries other than directories.
    pub entries: u64,
    /// Directories.
    pub dirs: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// What could not be restored, each named.
    pub problems: Vec<Problem>,
    /// Entries whose owner could not be set because only root may do that.
    pub owners_skipped: u64,
}

/// Files that wait for a worker at most.
const QUEUE_FILES_MAX: usize = 64;

/// Restores one entry that is not a directory to the path `dest`, or into it if it is a directory.
pub fn restore_file(
    snapshots: &Snapshots,
    found: &Found,
    dest: &Path,
    progress: &Progress,
) -> Result<Summary> {
    if found.entry.meta.kind == Kind::Dir {
        let path = crate::error::Quoted(&found.path);
        return Err(Error::usage(format!("'{path}' is a directory: use restore-folder")));
    }
    check_name(&found.entry.name)?;
    let into_dir = dest.is_dir();
    let (parent, name) = match (into_dir, dest.parent(), dest.file_name()) {
        (true, ..) => (dest, OsStr::from_bytes(&found.entry.name)),
        (false, Some(parent), Some(name)) => (parent, name),
        _ => return Err(Error::usage(format!("cannot restore to {}", quoted(dest)))),
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let failed = |e| Error::io(format!("target {}", quoted(parent)), e);
    std::fs::create_dir_all(parent).map_err(failed)?;
    // The user's own path may lead over links; only what lies below is walked without them.
    let parent = parent.canonicalize().map_err(failed)?;
    let fd = sys::open_dir(&parent).map_err(failed)?;
    let shared = Shared::new(snapshots, progress)?;
    let dir = Arc::new(TargetDir::plain(fd));
    let mut entry = found.entry.clone();
    entry.name = name.as_bytes().to_vec();
    // No further name will be made.
    entry.meta.nlink = 1;
    shared.restore_leaf(&dir, &entry, &found.path);
    Ok(shared.into_summary())
}

/// Restores the contents and the metadata of a directory to `dest`, which is made if it is missing.
pub fn restore_folder(
    snapshots: &Snapshots,
    found: &Found,
    dest: &Path,
    progress: &Progress,
) -> Result<Summary> {
    if found.entry.meta.kind != Kind::Dir {
        let path = crate::error::Quoted(&found.path);
        return Err(Error::usage(format!("'{path}' is not a directory: use restore")));
    }
    restore_tree(snapshots, &found.run, &found.entry, dest, progress)
}

/// Restores a whole run to `dest`, which must be empty or missing: the result is the run's tree and
/// nothing else.
pub fn revert_to_run(
    snapshots: &Snapshots,
    run: &Run,
    dest: &Path,
    progress: &Progress,
) -> Result<Summary> {
    let is_empty = match std::fs::read_dir(dest) {
        Ok(mut entries) => entries.next().is_none(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => true,
        Err(e) => return Err(Error::io(format!("target {}", quoted(dest)), e)),
    };
    if !is_empty {
        let message = format!("{} is not empty: choose an empty or a new directory", quoted(dest));
        return Err(Error::usage(message));
    }
    let root = snapshots.root(run)?;
    Progress::add(&progress.entries_total, run.counts.files);
    Progress::add(&progress.bytes_total, run.counts.bytes);
    restore_tree(snapshots, run, &root, dest, progress)
}

fn restore_tree(
    snapshots: &Snapshots,
    run: &Run,
    root: &EntryRow,
    dest: &Path,
    progress: &Progress,
) -> Result<Summary> {
    let failed = |e| Error::io(format!("target {}", quoted(dest)), e);
    std::fs::create_dir_all(dest).map_err(failed)?;
    let fd = sys::open_dir(&dest.canonicalize().map_err(failed)?).map_err(failed)?;
    progress.set_phase("restoring");
    let shared = Arc::new(Shared::new(snapshots, progress)?);
    let workers = std::thread::available_parallelism().map_or(2, usize::from) + 1;
    let (jobs_out, jobs_in) = bounded(QUEUE_FILES_MAX);
    let result = std::thread::scope(|scope| {
        for _ in 0..workers {
            let (jobs, shared) = (jobs_in.clone(), shared.clone());
            scope.spawn(move || {
                for job in jobs {
                    shared.fill(&job);
                }
            });
        }
        let mut tree = Tree::new(snapshots, run, shared.clone(), jobs_out);
        tree.walk(fd, root)
    });
    result?;
    let shared = Arc::into_inner(shared).ok_or_else(|| Error::usage("restore is still at work"))?;
    Ok(shared.into_summary())
}
