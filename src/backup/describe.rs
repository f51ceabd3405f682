//! Metas at the end of a run: those that are due are written, and how far they are complete is
//! noted on each volume.
//!
//! The note goes before the first meta is written, and comes back when the run is committed: what
//! a run that does not end has written is not taken for true. Blocks that new versions use get
//! their metas in any case. Those of which the run has only ended or linked names are written too,
//! as long as that is little work; else the note stays at the run before, and `genmeta` does them.

use std::collections::HashSet;
use std::path::PathBuf;

use crate::catalog::meta::{self, DirNames, Due};
use crate::catalog::{NumberSet, RunWriter, Settings, VersionId};
use crate::error::{Error, Result};
use crate::sys::quoted;
use crate::volume::{Described, Volume, Volumes};

/// Versions that blocks may have, of which only names were ended or added, for their metas to be
/// written at once: about a third of a second's work.
const USES_AT_ONCE: u64 = 100_000;

/// What a run makes out of date.
pub struct Touched {
    /// The first version that is its own.
    pub first_version: VersionId,
    /// Older versions that have got further names.
    pub linked: NumberSet,
}

/// What has to be noted when the run is committed.
#[derive(Default)]
pub struct Describing {
    /// Volumes, each with what its note says then.
    notes: Vec<(Volume, Described)>,
    /// Volumes that did not take their metas.
    pub failures: Vec<(PathBuf, Error)>,
}

impl Describing {
    /// Writes the notes; the run is committed. One that is missing costs time only.
    pub fn commit(self) {
        for (volume, described) in self.notes {
            if let Err(e) = volume.set_described(&described) {
                log::warn!("{}: {e}", quoted(&volume.config.path));
            }
        }
    }
}

/// Writes the metas that are due, volume by volume. Fails if a block of a new version is not
/// stored. With `is_left`, nothing is written, and everything stays due.
pub fn write_metas(
    run: &RunWriter<'_>,
    volumes: &Volumes,
    settings: &Settings,
    touched: &Touched,
    is_left: bool,
) -> Result<Describing> {
    let due = run.metas_due(touched.first_version)?;
    let mut describing = Describing::default();
    if is_left {
        return Ok(describing);
    }
    let mut work = Work { run, settings, names: DirNames::default(), touched: None };
    for volume in volumes.present() {
        let number = volume.config.number;
        let here = due.iter().filter(|it| it.volume == number).copied().collect();
        let path = &volume.config.path;
        let mut failed = |e| describing.failures.push((path.clone(), e));
        match work.volume(volume, here, &touched.linked, &mut failed) {
            Ok(note) => describing.notes.extend(note.map(|it| (volume.clone(), it))),
            Err(e) => failed(e),
        }
    }
    Ok(describing)
}

struct Work<'a, 'r> {
    run: &'a RunWriter<'r>,
    settings: &'a Settings,
    names: DirNames,
    /// Blocks that the run touches otherwise than by new versions, when they were looked for.
    touched: Option<NumberSet>,
}

impl Work<'_, '_> {
    /// Writes what is due on a volume; gives what is to be noted then.
    fn volume(
        &mut self,
        volume: &Volume,
        mut due: Vec<Due>,
        linked: &NumberSet,
        failed: &mut dyn FnMut(Error),
    ) -> Result<Option<Described>> {
        let since = volume.described();
        let since = match since {
            Some(it) if self.run.knows(&it)? => Some(it),
            _ => None,
        };
        let mut note = since.clone();
        if let Some(since) = &since
            && let Some(others) = self.others(volume, &due, since, linked)?
        {
            due.extend(others);
            note = Some(Described { run: self.run.run(), uuid: self.run.uuid().to_owned() });
        }
        if due.is_empty() {
            // What the note says still holds.
            return Ok(None);
        }
        volume.forget_described()?;
        let mut is_whole = true;
        let mut tell = |e| {
            is_whole = false;
            failed(e);
        };
        if let Err(e) = self.write(volume, &due, &mut tell) {
            tell(e);
        }
        // What was not written is as it was: what was said before still holds.
        Ok(if is_whole { note } else { since })
    }

    /// The copies on a volume whose metas are due beside those of new versions; `None` if that is
    /// not known, or more than can be done at once.
    fn others(
        &mut self,
        volume: &Volume,
        due: &[Due],
        since: &Described,
        linked: &NumberSet,
    ) -> Result<Option<Vec<Due>>> {
        let number = volume.config.number;
        let mut own = NumberSet::default();
        due.iter().for_each(|it| own.insert(it.block));
        let mut others = Vec::new();
        if since.run == 0 {
            self.run.each_copy_on(number, &mut |it| {
                // One more than can be done is enough to know that.
                if !own.contains(it.block) && others.len() as u64 <= USES_AT_ONCE {
                    others.push(it);
                }
            })?;
        } else if self.run.is_unchanged_from(since.run)? {
            let touched = match &self.touched {
                Some(touched) => touched,
                None => self.touched.insert(self.run.blocks_touched(linked)?),
            };
            for block in touched.iter().filter(|it| !own.contains(*it)) {
                others.extend(self.run.copy_on(number, block)?);
            }
        } else {
            return Ok(None);
        }
        let mut uses = 0;
        for it in &others {
            uses += 1 + self.run.uses_of(it.block)?;
            if uses > USES_AT_ONCE {
                return Ok(None);
            }
        }
        Ok(Some(others))
    }

    fn write(&mut self, volume: &Volume, due: &[Due], failed: &mut dyn FnMut(Error)) -> Result<()> {
        let mut documents = volume.documents();
        let mut written = HashSet::new();
        for it in due {
            let index = match volume.index_record(it.record_at) {
                Ok(index) => index,
                Err(e) => {
                    // One damaged record costs one meta.
                    failed(e);
                    continue;
                }
            };
            if !written.insert(index.id) {
                continue;
            }
            let name = meta::document_name(&index.id);
            let (run, hash, names) = (self.run, self.settings.hash, &mut self.names);
            documents.add(&name, |out| run.write_meta(&index, hash, names, out))?;
        }
        documents.finish()?;
        written.iter().try_for_each(|id| volume.remove_document(&meta::former_name(id)))
    }
}
