//! Doing a restore that was asked for, by command or by control file.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::grammar::Restoring;
use super::grammar::restore::What;
use crate::catalog::{Run, RunId};
use crate::error::{Error, Quoted, Result};
use crate::progress::Progress;
use crate::restore::{self, Step, Summary, Work};
use crate::snapshot::{Snapshots, Wish, choose_run, resolve_wish};
use crate::sys::{self, quoted};

impl Restoring {
    /// Opens the catalog that it restores from. A dry run leaves it as it is.
    pub fn open(&self, catalog: &Path, cache_bytes: u64) -> Result<Snapshots> {
        match self.options.dry_run {
            true => Snapshots::open_untouched(catalog, cache_bytes),
            false => Snapshots::open(catalog, cache_bytes),
        }
    }

    /// Restores; gives the run it was restored from. `tell` is told of each step of a dry run.
    pub fn run(
        &self,
        snapshots: &Snapshots,
        progress: &Progress,
        tell: &(dyn Fn(Step, &[u8]) + Sync),
    ) -> Result<(RunId, Summary)> {
        let work = Work { snapshots, options: &self.options, progress, tell };
        let deletes = self.options.delete && !self.options.dry_run;
        match &self.what {
            What::File(path, wish) => {
                let found = resolve_wish(snapshots, path.as_os_str().as_bytes(), wish.as_ref())?;
                Ok((found.run.id, restore::restore_file(&work, &found, &self.dest)?))
            }
            What::Folder(path, wish) => {
                let found = resolve_wish(snapshots, path.as_os_str().as_bytes(), wish.as_ref())?;
                if deletes && !found.with_source {
                    check_meant(snapshots, wish.as_ref(), &found.run)?;
                }
                Ok((found.run.id, restore::restore_folder(&work, &found, &self.dest)?))
            }
            What::Run(wish) => {
                let run = snapshots.with_reader(|reader| choose_run(reader, wish, b""))?;
                if deletes {
                    check_meant(snapshots, Some(wish), &run)?;
                }
                Ok((run.id, restore::revert_to_run(&work, &run, &self.dest)?))
            }
        }
    }

    /// Refuses a target in a mounted catalog, wherever links lead. For the process that serves it:
    /// not from a thread that the mount waits for.
    pub fn check_target(&self, mountpoint: &Path) -> Result<()> {
        // What is not there yet will be made below what is.
        let mut there = self.dest.ancestors().filter_map(|it| it.canonicalize().ok());
        let Some(there) = there.next() else { return Ok(()) };
        let mounts = sys::mount_points().map_err(|e| Error::io("listing mounts", e))?;
        let mut own = mounts.iter().filter(|it| it.fs_type == sys::OWN_FS_TYPE);
        if there.starts_with(mountpoint) || own.any(|it| there.starts_with(&it.path)) {
            let dest = quoted(&self.dest);
            return Err(Error::usage(format!("the target {dest} lies in a mounted catalog")));
        }
        Ok(())
    }
}

/// Refuses to delete by a run that may be of another source than the user has in mind.
fn check_meant(snapshots: &Snapshots, wish: Option<&Wish>, run: &Run) -> Result<()> {
    if matches!(wish, Some(Wish::Number(_))) {
        return Ok(());
    }
    let runs = snapshots.with_reader(|reader| reader.whole_runs())?.runs;
    if runs.iter().all(|it| it.source == run.source) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "--delete, and there are runs of several sources: this would be run {} of '{}'; name the \
         run by its number, or the path with its source",
        run.id,
        Quoted(&run.source)
    )))
}
