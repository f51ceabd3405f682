//! Whether the catalog has lost runs: its volumes know of some that were finished.
//!
//! A manifest is durable before its run is committed, so one that the catalog does not know may be
//! of a run that never was. Two things come after the commit only: the note up to which run the
//! metas of a volume are complete, and the copies of the catalog. Where one of them names a later
//! run than the catalog ever had, the catalog is an older one than it was: put back from a backup,
//! or SQLite has dropped the end of a damaged log. To write to it would give the numbers of the
//! lost runs to others, and overwrite their manifests.

use super::numbers::{Numbered, last_given};
use super::read::Reader;
use super::run::RunId;
use super::write::Writer;
use super::{copy, manifest};
use crate::error::{Error, Result};
use crate::sys::quoted;
use crate::volume::{Volume, Volumes};

/// The newest run that was finished, as far as a volume knows it; 0 where it knows of none.
pub fn finished_on(volume: &Volume) -> RunId {
    let noted = volume.described().map_or(0, |it| it.run);
    // What cannot be listed says nothing. A copy whose run has no manifest here is from before a
    // rebuild, or somebody has put it here.
    let has_manifest = |run: &RunId| volume.document_path(&manifest::document_name(*run)).exists();
    let copied = copy::list(&volume.config.path).unwrap_or_default();
    noted.max(copied.into_iter().find(has_manifest).unwrap_or_default())
}

impl Reader {
    /// The highest number that a run was ever given, as far as the catalog knows.
    pub fn last_run_given(&self) -> Result<RunId> {
        last_given(self.conn(), Numbered::Run)
    }
}

impl Writer {
    /// Fails if a volume knows of a finished run that the catalog does not know.
    pub fn refuse_lost_runs(&self, volumes: &Volumes) -> Result<()> {
        let last = last_given(self.conn(), Numbered::Run)?;
        for volume in volumes.present() {
            let finished = finished_on(volume);
            if finished > last {
                let path = quoted(&volume.config.path);
                return Err(Error::corrupt(format!(
                    "the catalog ends with run {last}, and volume {path} knows that run \
                     {finished} was finished: the catalog has lost it; raidtape catalog-restore \
                     brings it back"
                )));
            }
        }
        Ok(())
    }
}
