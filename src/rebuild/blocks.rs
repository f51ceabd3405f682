//! Which blocks there are, and what is inside: from the volume indexes, and from metas where an
//! index has lost its records.
//!
//! An index and a meta that say different things of a block are both put to the proof of its bytes:
//! only one of them decodes to chunks of the names that it says.

use super::{Notes, Source};
use crate::catalog::meta_read;
use crate::catalog::replay::{Fit, FoundAt, Rebuild};
use crate::chunk::HashAlgo;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::volume::{BlockId, BlockIndex, IndexMender, Record, Volume, prove};

/// What is to be done on the volumes when the catalog is whole.
pub struct Repairs {
    /// For each source the valid length of its index.
    pub index_lens: Vec<u64>,
    menders: Vec<(usize, IndexMender)>,
}

impl Repairs {
    /// Gives indexes their records back. What fails is told: it costs metas, not data.
    pub fn commit(self, sources: &[Source], notes: &mut Notes<'_>) {
        for (at, mender) in self.menders {
            if let Err(e) = mender.commit()
                && let Some(source) = sources.get(at)
            {
                let e = e.context("its index has lost records, and could not be given them back");
                notes.add(&source.volume.config.path, &e);
            }
        }
    }
}

/// Reads what all volumes have.
pub fn read(
    rebuild: &Rebuild,
    sources: &[Source],
    hash: HashAlgo,
    notes: &mut Notes<'_>,
    progress: &Progress,
) -> Result<Repairs> {
    let mut repairs = Repairs { index_lens: Vec::new(), menders: Vec::new() };
    let mut work = Work { rebuild, hash, notes, progress };
    for (at, source) in sources.iter().enumerate() {
        if !source.is_used {
            repairs.index_lens.push(0);
            continue;
        }
        let volume = &source.volume;
        let valid = work.index(volume)?;
        let mender = work.without_record(volume, valid)?;
        repairs.index_lens.push(mender.as_ref().map_or(valid, IndexMender::len));
        repairs.menders.extend(mender.map(|it| (at, it)));
    }
    Ok(repairs)
}

struct Work<'a, 'n> {
    rebuild: &'a Rebuild,
    hash: HashAlgo,
    notes: &'a mut Notes<'n>,
    progress: &'a Progress,
}

impl Work<'_, '_> {
    /// Takes in the records of a volume's index; gives how far they can be read.
    fn index(&mut self, volume: &Volume) -> Result<u64> {
        let path = &volume.config.path;
        let mut records = match volume.index_from(0) {
            Ok(records) => records,
            Err(e) => {
                self.notes.add(path, &e);
                return Ok(0);
            }
        };
        loop {
            self.progress.check()?;
            let at = records.offset();
            let Record { number, index } = match records.next_record() {
                Ok(Some(record)) => record,
                Ok(None) => return Ok(at),
                Err(e) if e.kind() == ErrorKind::Version => return Err(e),
                Err(e) => {
                    self.notes.add(path, &e.context(format!("its index at byte {at}")));
                    return Ok(at);
                }
            };
            Progress::add(&self.progress.entries, 1);
            let len = volume.store.len_of(&index.id).unwrap_or_default();
            let is_there = len == Some(index.stored_len());
            let found = FoundAt { volume: volume.config.number, record_at: at, number, is_there };
            self.take(volume, index, found)?;
        }
    }

    /// Takes in a block, if nothing contradicts what is said of it or its bytes prove it.
    fn take(&mut self, volume: &Volume, index: BlockIndex, at: FoundAt) -> Result<()> {
        let index = match meta_read::read_head(volume, &index.id) {
            Some(meta) if meta != index => match self.settle(volume, index, meta) {
                Some(index) => index,
                None => return Ok(()),
            },
            _ => index,
        };
        if self.rebuild.found_block(&index, at)? == Fit::Fits {
            return Ok(());
        }
        let is_proved = prove(volume, &index, self.hash).is_ok();
        let message = match is_proved {
            true => "another volume says something else of what is in it, which its bytes refute",
            false => {
                "it says something else of what is in it than another volume, and its bytes \
                      do not prove it: this copy does not count"
            }
        };
        self.note(volume, &index.id, message);
        if is_proved {
            self.rebuild.correct_block(&index)?;
            self.rebuild.found_block(&index, at)?;
        }
        Ok(())
    }

    /// Which of two is right about a block, by its bytes.
    fn settle(
        &mut self,
        volume: &Volume,
        index: BlockIndex,
        meta: BlockIndex,
    ) -> Option<BlockIndex> {
        let id = index.id;
        if prove(volume, &index, self.hash).is_ok() {
            self.note(volume, &id, "its meta is wrong about what is in it; the index is right");
            return Some(index);
        }
        if prove(volume, &meta, self.hash).is_ok() {
            self.note(volume, &id, "the index is wrong about what is in it; its meta is right");
            return Some(meta);
        }
        let message = "index and meta say different things of what is in it, and its bytes prove \
                       neither: the index counts";
        self.note(volume, &id, message);
        Some(index)
    }

    fn note(&mut self, volume: &Volume, id: &BlockId, message: &str) {
        let error = Error::corrupt(format!("block {id}: {message}"));
        self.notes.add(&volume.config.path, &error);
    }

    /// Takes in the blocks of which the index has no record and a meta says what is inside. A run
    /// that did not end has left none with a meta but those that it was about to name.
    fn without_record(&mut self, volume: &Volume, valid: u64) -> Result<Option<IndexMender>> {
        let mut without: Vec<(BlockId, u64)> = Vec::new();
        let (rebuild, number) = (self.rebuild, volume.config.number);
        let mut failed = None;
        let listed = volume.store.list(&mut |id, len| match rebuild.has_found(&id, number) {
            Ok(true) => {}
            Ok(false) => without.push((id, len)),
            Err(e) => failed = Some(e),
        });
        if let Some(e) = failed {
            return Err(e);
        }
        if let Err(e) = listed {
            self.notes.add(&volume.config.path, &e);
        }
        let mut mender: Option<IndexMender> = None;
        for (id, len) in without {
            self.progress.check()?;
            let Some(index) = meta_read::read_head(volume, &id) else { continue };
            if index.stored_len() != len {
                continue;
            }
            if mender.is_none() {
                let message = "its index has lost records: what is in its blocks is taken from \
                               their metas";
                self.notes.add(&volume.config.path, &Error::corrupt(message));
                mender = IndexMender::new(volume, valid).map(Some).or_else(|e| {
                    self.notes.add(&volume.config.path, &e);
                    Ok::<_, Error>(None)
                })?;
            }
            let record_at = match &mut mender {
                Some(mender) => mender.append(&index)?,
                // There is no record, and whoever asks for it is told so.
                None => i64::MAX.cast_unsigned(),
            };
            let at = FoundAt { volume: number, record_at, number: None, is_there: true };
            if self.rebuild.found_block(&index, at)? == Fit::Differs {
                self.take(volume, index, at)?;
            }
        }
        Ok(mender)
    }
}
