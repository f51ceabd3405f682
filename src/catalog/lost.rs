//! Whether the catalog has lost runs: its volumes know of some that were finished.
//!
//! A manifest is durable before its run is committed, so one that the catalog does not know may be
//! of a run that never was. Two things come after the commit only: the note up to which run the
//! metas of a volume are complete, and the copies of the catalog. Where one of them names a later
//! run than the catalog ever had, the catalog is an older one than it was: put back from a backup,
//! or SQLite has dropped the end of a damaged log. To write to it would give the numbers of the
//! lost runs to others, and overwrite their manifests.

use rusqlite::{Connection, OptionalExtension};

use super::numbers::{Numbered, last_given};
use super::read::Reader;
use super::run::RunId;
use super::write::Writer;
use super::{copy, manifest, sql};
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

    /// What a volume knows of finished runs that the catalog cannot know, in words.
    pub fn lost_on(&self, volume: &Volume) -> Result<Option<String>> {
        lost_on(self.conn(), volume)
    }
}

impl Writer {
    /// Fails if a volume knows of a finished run that the catalog does not know.
    pub fn refuse_lost_runs(&self, volumes: &Volumes) -> Result<()> {
        for volume in volumes.present() {
            if let Some(lost) = lost_on(self.conn(), volume)? {
                return Err(Error::corrupt(format!("the catalog: {lost}")));
            }
        }
        Ok(())
    }
}

fn lost_on(conn: &Connection, volume: &Volume) -> Result<Option<String>> {
    let path = quoted(&volume.config.path);
    let (last, finished) = (last_given(conn, Numbered::Run)?, finished_on(volume));
    if finished > last {
        return Ok(Some(format!(
            "it ends with run {last}, and volume {path} knows that run {finished} was finished: \
             the catalog has lost it; raidtape catalog-restore brings it back (without a copy of \
             the catalog, raidtape rebuildmeta does)"
        )));
    }
    let Some(noted) = volume.described() else { return Ok(None) };
    let query = "SELECT uuid FROM runs WHERE run = ?1";
    let known = conn.query_row(query, [noted.run], |row| row.get::<_, String>(0));
    Ok(known.optional().map_err(sql)?.filter(|it| *it != noted.uuid).map(|uuid| {
        format!(
            "its run {} is {uuid}, and volume {path} knows that number as {}, which was finished \
             too: two histories of one catalog. Nothing is written to either while both are here: \
             raidtape rebuildmeta, with a new --catalog and only that volume, shows what it has",
            noted.run, noted.uuid
        )
    }))
}
