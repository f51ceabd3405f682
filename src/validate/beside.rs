//! What lies beside the blocks of a volume: its manifest, the index, and files that nobody knows.

use super::Work;
use super::report::{Fault, Part};
use crate::catalog::told::Sum;
use crate::catalog::{Reader, add_chunks, manifest};
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
                    // Who writes manifests that are kept in mind writes this too.
                    let newest = self.snapshots.with_reader(Reader::last_manifest)?;
                    let newest = newest.map(|it| manifest::document_name(it.run));
                    if it.facts.is_none()
                        && newest.is_some_and(|it| volume.document_path(&it).exists())
                    {
                        tell("its manifest is cut short".to_owned());
                    }
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

    /// The indexes of all volumes, record by record against the catalog.
    pub(super) fn indexes(&self) -> Result<()> {
        if self.volumes.missing().is_empty() && self.agree_in_sum()? {
            return Ok(());
        }
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

    /// Whether all indexes together say what the catalog says, no more and no less. A chunk that
    /// lies in two places is not judged so.
    fn agree_in_sum(&self) -> Result<bool> {
        let mut sum = Sum::default();
        for volume in self.volumes.present() {
            let number = volume.config.number;
            let (known, copies) = self.snapshots.with_reader(|reader| {
                Ok((reader.index_len(number)?, reader.stored_bytes_of(number)?.blocks))
            })?;
            let Ok(mut records) = volume.index_from(0) else { return Ok(false) };
            let mut seen = 0;
            while records.offset() < known {
                self.progress.check()?;
                let at = records.offset();
                let Ok(Some(record)) = records.next_record() else { return Ok(false) };
                let index = &record.index;
                let agrees = self.snapshots.with_reader(|reader| {
                    let Some(block) = reader.copy_at(number, at, &index.id)? else {
                        return Ok(false);
                    };
                    let row = reader.block(block)?;
                    if row.volumes.iter().min() == Some(&number) {
                        add_chunks(&mut sum, block, index);
                    }
                    Ok(row.frames == index.frames)
                })?;
                if !agrees {
                    return Ok(false);
                }
                seen += 1;
            }
            if (records.offset(), seen) != (known, copies) {
                return Ok(false);
            }
        }
        let check = || self.progress.check();
        Ok(self.snapshots.with_reader(|reader| reader.chunk_sum(&check))? == sum)
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
