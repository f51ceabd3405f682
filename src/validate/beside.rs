//! What lies beside the blocks of a volume: manifests, the index, and files that nobody knows.

use std::path::Path;

use super::Work;
use super::report::{Fault, Part};
use crate::catalog::history::{self, Survey};
use crate::catalog::{Reader, Run, manifest};
use crate::chunk::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::volume::{BlockId, BlockIndex, Facts, Volume, VolumeManifest};

/// Copies taken from the catalog at a time.
const PAGE_COPIES: u64 = 1024;

/// What the index of a volume has shown.
#[derive(Default)]
struct Seen {
    /// Copies of the catalog whose records are where it says.
    copies: u64,
    /// Chunks that the catalog has in blocks of which no volume before has a copy.
    chunks: u64,
    /// Whether something is wrong, so that sums mean nothing.
    has_faults: bool,
}

impl Work<'_> {
    /// Volumes that are not there, and what they say of themselves.
    pub(super) fn volume_files(&self) -> Result<()> {
        for (config, reason) in self.volumes.missing() {
            let mut fault = Fault::new(Part::Volume, config.path.clone(), reason.to_string());
            fault.kind = reason.kind();
            self.fault(fault);
        }
        for volume in self.volumes.present() {
            self.progress.check()?;
            let path = &volume.config.path;
            let tell = |message| {
                self.fault(Fault::new(Part::Volume, path.clone(), message));
            };
            match VolumeManifest::read(path) {
                Err(e) => tell(format!("its manifest: {e}")),
                Ok(it) => {
                    if it.hash != self.settings.hash {
                        tell("its manifest says another hash than the catalog".to_owned());
                    }
                    if it.reserve_percent != volume.config.reserve_percent {
                        tell("its manifest says another reserve than the catalog".to_owned());
                    }
                    let number = volume.config.number;
                    let facts = self.snapshots.with_reader(|reader| reader.facts_of(number))?;
                    let is_same = it.facts.as_ref() == Some(&facts);
                    match it.facts.filter(|_| !is_same) {
                        Some(said) if !may_be_older(&said, &facts) => {
                            tell("its manifest does not say what the catalog says".to_owned());
                        }
                        _ => self.report.lock().due += u64::from(!is_same),
                    }
                }
            }
            for (name, is_damaged) in volume.guide_faults() {
                match is_damaged {
                    true => tell(format!("{name} is not as it was written")),
                    false => self.report.lock().due += 1,
                }
            }
        }
        Ok(())
    }

    /// The manifests of runs, on every volume, from the newest on: each names the one before it.
    pub(super) fn manifests(&self, runs: &[Run]) -> Result<()> {
        let mut wanted = match self.options.run {
            Some(_) => None,
            None => self.snapshots.with_reader(Reader::last_manifest)?,
        };
        wanted = wanted.filter(|it| runs.last().is_some_and(|run| run.uuid == it.uuid));
        for run in runs.iter().rev() {
            let name = manifest::document_name(run.id);
            let digest = wanted.take().and_then(|it| it.digest);
            let (mut right, mut absent) = (None::<Survey>, Vec::new());
            for volume in self.volumes.present() {
                self.progress.check()?;
                self.report.lock().documents += 1;
                let path = volume.document_path(&name);
                if path.symlink_metadata().is_err() {
                    absent.push(volume.config.path.clone());
                    continue;
                }
                let digest = digest.or(right.as_ref().map(|it| it.digest));
                let look = || match self.manifest(&path, run, digest) {
                    Err(e) if e.kind() == ErrorKind::Interrupted => Err(e),
                    result => Ok(result),
                };
                let mut result = Some(look()?);
                if matches!(result, Some(Err(_))) {
                    // Whoever writes now may just have been at it.
                    result = self.settled(look)?;
                }
                match result {
                    None => self.report.lock().unjudged += 1,
                    Some(Ok(Some(survey))) => right = right.or(Some(survey)),
                    // A run that did not end has left it, and this one could not replace it.
                    Some(Ok(None)) => absent.push(volume.config.path.clone()),
                    Some(Err(e)) => {
                        let path = volume.config.path.clone();
                        self.fault(Fault::new(Part::Manifest, path, format!("{name}: {e}")));
                    }
                }
            }
            // A volume that came later gets them with the next genmeta.
            if right.is_some() || !self.volumes.missing().is_empty() {
                self.report.lock().due += absent.len() as u64;
            } else {
                for path in absent {
                    let message = format!("{name} is missing, or another run's");
                    self.fault(Fault::new(Part::Manifest, path, message));
                }
            }
            wanted = right.and_then(|it| it.head.around).and_then(|it| it.previous);
        }
        Ok(())
    }

    /// Reads the manifest of a run; `None` if it is another run's.
    fn manifest(&self, path: &Path, run: &Run, wanted: Option<Digest>) -> Result<Option<Survey>> {
        let survey = history::survey(path, &|| self.progress.check())?;
        if (survey.head.run, &*survey.head.uuid) != (run.id, &*run.uuid) {
            return Ok(None);
        }
        // Format 1 has no more to say.
        let Some(tail) = &survey.tail else { return Ok(Some(survey)) };
        if tail.counts != run.counts || tail.finished != run.finished {
            return Err(Error::corrupt("it does not say what the catalog says"));
        }
        match wanted.is_none_or(|it| it == survey.digest) {
            true => Ok(Some(survey)),
            false => Err(Error::corrupt("it is not the one that was written")),
        }
    }

    /// The indexes of all volumes, record by record against the catalog.
    pub(super) fn indexes(&self) -> Result<()> {
        let (mut chunks, mut has_faults) = (0, !self.volumes.missing().is_empty());
        let sums = |reader: &Reader| Ok((reader.chunk_count()?, reader.totals()?.blocks));
        let before = self.snapshots.with_reader(sums)?;
        for volume in self.volumes.present() {
            let seen = self.index(volume)?;
            chunks += seen.chunks;
            has_faults |= seen.has_faults;
        }
        // What a run has changed meanwhile was not all seen.
        let after = self.snapshots.with_reader(sums)?;
        if !has_faults && before == after && before.0 > chunks {
            let surplus = before.0 - chunks;
            let message = format!("catalog: {surplus} chunks are in no volume's index");
            self.fault(Fault::of_catalog(message));
        }
        Ok(())
    }

    fn index(&self, volume: &Volume) -> Result<Seen> {
        let mut seen = Seen::default();
        let (number, path) = (volume.config.number, &volume.config.path);
        let counts = self.snapshots.with_reader(|reader| {
            Ok((reader.index_len(number)?, reader.stored_bytes_of(number)?.blocks))
        })?;
        let (known, copies) = counts;
        let mut read = || -> Result<()> {
            let mut records = volume.index_from(0)?;
            loop {
                self.progress.check()?;
                let at = records.offset();
                // What comes later is not the catalog's yet.
                if at >= known {
                    return Ok(());
                }
                let record = records
                    .next_record()?
                    .ok_or_else(|| Error::corrupt(format!("it is damaged at byte {at}")))?;
                self.record(volume, &record.index, at, &mut seen)?;
            }
        };
        if let Err(e) = read() {
            if e.kind() == ErrorKind::Interrupted {
                return Err(e);
            }
            seen.has_faults = true;
            self.fault(Fault::new(Part::Index, path.clone(), e.to_string()));
        }
        if seen.copies < copies {
            seen.has_faults = true;
            self.copies_without_record(volume)?;
        }
        Ok(seen)
    }

    fn record(&self, volume: &Volume, index: &BlockIndex, at: u64, seen: &mut Seen) -> Result<()> {
        let (number, path) = (volume.config.number, &volume.config.path);
        let mut tell = |message: String| {
            seen.has_faults = true;
            self.fault(Fault::new(Part::Index, path.clone(), message));
        };
        self.snapshots.with_reader(|reader| {
            let Some(block) = reader.copy_at(number, at, &index.id)? else {
                let id = index.id;
                tell(format!("the record of block {id} at byte {at} is not in the catalog"));
                return Ok(());
            };
            let chunks = reader.check_record(block, index, &mut tell)?;
            seen.copies += 1;
            // Each block counts once, on the first volume that has it.
            let first = reader.copies_of(block)?.first().map(|it| it.volume);
            seen.chunks += if first == Some(number) { chunks } else { 0 };
            Ok(())
        })
    }

    /// Names the copies whose records are not where the catalog says.
    fn copies_without_record(&self, volume: &Volume) -> Result<()> {
        let mut after = 0;
        loop {
            let number = volume.config.number;
            let page = self
                .snapshots
                .with_reader(|reader| reader.copies_on(number, after, PAGE_COPIES))?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.block;
            for copy in page {
                self.progress.check()?;
                let id = self.snapshots.with_reader(|reader| Ok(reader.block(copy.block)?.id))?;
                let why = match volume.index_record(copy.record_at) {
                    Ok(record) if record.id == id => continue,
                    Ok(record) => format!("there is that of block {}", record.id),
                    Err(e) => e.to_string(),
                };
                let at = copy.record_at;
                let message = format!("block {id} has no record at byte {at}: {why}");
                self.fault(Fault::new(Part::Index, volume.config.path.clone(), message));
            }
        }
    }

    /// Block files that the catalog does not know. They are no fault: a run that was killed leaves
    /// some, and the next one takes over what it can.
    pub(super) fn waste(&self) -> Result<()> {
        for volume in self.volumes.present() {
            let path = &volume.config.path;
            let mut result = Ok(());
            let listed = volume.store.list(&mut |id, len| {
                if result.is_ok() {
                    result = self.is_waste(volume, &id).map(|is_waste| {
                        if is_waste {
                            let place = path.join(id.to_string());
                            self.report.lock().add_waste(place, len);
                        }
                    });
                }
            });
            result?;
            if let Err(e) = listed {
                self.fault(Fault::new(Part::Volume, path.clone(), e.to_string()));
            }
        }
        Ok(())
    }

    fn is_waste(&self, volume: &Volume, id: &BlockId) -> Result<bool> {
        self.progress.check()?;
        let number = volume.config.number;
        Ok(!self.snapshots.with_reader(|reader| reader.has_copy(id, number))?)
    }
}

/// Settings that a catalog keeps as it was made with them.
const FIXED: [&str; 6] =
    ["hash_algo", "chunking", "chunk_bytes", "compression", "block_bytes", "reserve_percent"];

/// Whether a volume may have said so before the catalog has come to say what it says now.
fn may_be_older(said: &Facts, now: &Facts) -> bool {
    let fixed = |it: &Facts| -> Vec<(String, String)> {
        let fixed = it.settings.iter().filter(|it| FIXED.contains(&&*it.0));
        fixed.cloned().collect()
    };
    (said.number, said.created) == (now.number, now.created) && fixed(said) == fixed(now)
}
