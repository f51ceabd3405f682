//! Which blocks there are, and what is inside: from the volume indexes; where an index has lost its
//! records from metas, or from the catalog that is at hand; or, asked to, from the blocks.
//!
//! Where two say different things of a block, both are put to the proof of its bytes: only one of
//! them decodes to chunks of the names that it says.

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use super::{Notes, Source};
use crate::catalog::meta_read;
use crate::catalog::replay::{Fit, Found, FoundAt};
use crate::chunk::HashAlgo;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::volume::{BlockId, BlockIndex, IndexMender, Record, Volume, prove};

/// How blocks are read.
#[derive(Clone, Copy)]
pub struct How {
    pub hash: HashAlgo,
    /// Whether each block is put to the proof of its bytes.
    pub scan: bool,
    /// Whether indexes that have lost records are written anew.
    pub mend: bool,
}

/// Files that are taken from the list at a time.
const PAGE_FILES: u64 = 256;
/// Blocks that are put to the proof at a time, by as many threads as there are processors.
const PAGE_PROVED: u64 = 32;

/// What is to be done on the volumes when the catalog is whole.
pub struct Repairs {
    /// For each source the valid length of its index.
    pub index_lens: Vec<u64>,
    /// For each source the blocks that were put to the proof, and those that were found damaged.
    pub scanned: Vec<(u64, u64)>,
    menders: Vec<(usize, IndexMender)>,
}

impl Repairs {
    /// The sources whose indexes will be written anew, by their places in the list.
    pub fn mended(&self) -> impl Iterator<Item = usize> + '_ {
        self.menders.iter().map(|it| it.0)
    }

    /// Adds a record to the index of a source, which is written anew then; gives where it is and
    /// how long the index is with it. What fails is told.
    pub fn append(
        &mut self,
        (at, volume): (usize, &Volume),
        index: &BlockIndex,
        number: u64,
        notes: &mut Notes<'_>,
    ) -> Result<Option<(u64, u64)>> {
        if self.menders.iter().all(|it| it.0 != at) {
            let valid = self.index_lens.get(at).copied().unwrap_or_default();
            match IndexMender::new(volume, valid) {
                Ok(it) => self.menders.push((at, it)),
                Err(e) => {
                    notes.add(&volume.config.path, &e);
                    return Ok(None);
                }
            }
        }
        let Some((_, mender)) = self.menders.iter_mut().find(|it| it.0 == at) else {
            return Ok(None);
        };
        let record_at = mender.append(index, Some(number))?;
        if let Some(len) = self.index_lens.get_mut(at) {
            *len = mender.len();
        }
        Ok(Some((record_at, mender.len())))
    }

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
    found: Found<'_>,
    sources: &[Source],
    how: How,
    notes: &mut Notes<'_>,
    progress: &Progress,
) -> Result<Repairs> {
    let mut repairs = Repairs { index_lens: Vec::new(), scanned: Vec::new(), menders: Vec::new() };
    let mut work = Work { found, how, notes, progress };
    for (at, source) in sources.iter().enumerate() {
        if !source.is_used {
            repairs.index_lens.push(0);
            repairs.scanned.push((0, 0));
            continue;
        }
        let volume = &source.volume;
        let valid = work.index(volume)?;
        let mender = work.without_record(volume, valid)?;
        repairs.index_lens.push(mender.as_ref().map_or(valid, IndexMender::len));
        repairs.menders.extend(mender.map(|it| (at, it)));
        repairs.scanned.push(if how.scan { work.scan(volume)? } else { (0, 0) });
    }
    Ok(repairs)
}

struct Work<'a, 'n> {
    found: Found<'a>,
    how: How,
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
            let place = FoundAt { volume: volume.config.number, record_at: at, number, is_there };
            self.take(volume, index, place)?;
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
        if !self.found.agrees(&index)? && prove(volume, &index, self.how.hash).is_err() {
            let message = "the catalog says something else of what is in it, and its bytes do not \
                           prove what is said here: this copy does not count";
            self.note(volume, &index.id, message);
            return Ok(());
        }
        if self.found.put(&index, at)? == Fit::Fits {
            return Ok(());
        }
        let is_proved = prove(volume, &index, self.how.hash).is_ok();
        let message = match is_proved {
            true => "another volume says something else of what is in it, which its bytes refute",
            false => {
                "it says something else of what is in it than another volume, and its bytes \
                      do not prove it: this copy does not count"
            }
        };
        self.note(volume, &index.id, message);
        if is_proved {
            self.found.correct(&index)?;
            self.found.put(&index, at)?;
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
        if prove(volume, &index, self.how.hash).is_ok() {
            self.note(volume, &id, "its meta is wrong about what is in it; the index is right");
            return Some(index);
        }
        if prove(volume, &meta, self.how.hash).is_ok() {
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

    /// Takes in the blocks of which the index has no record, and a meta or the catalog says what is
    /// inside. A run that did not end has left none with a meta but those that it was about to
    /// name.
    fn without_record(&mut self, volume: &Volume, valid: u64) -> Result<Option<IndexMender>> {
        let (found, number) = (self.found, volume.config.number);
        let mut failed = None;
        let listed = volume.store.list(&mut |id, len| {
            if let Err(e) = found.put_file(number, &id, len) {
                failed = Some(e);
            }
        });
        if let Some(e) = failed {
            return Err(e);
        }
        if let Err(e) = listed {
            self.notes.add(&volume.config.path, &e);
        }
        let mut mender: Option<IndexMender> = None;
        let (mut is_told, mut after) = (false, None);
        loop {
            let page = found.files(number, after.as_ref(), true, PAGE_FILES)?;
            let Some(last) = page.last() else { return Ok(mender) };
            after = Some(last.0);
            for (id, len) in page {
                self.progress.check()?;
                let Some((index, block)) = self.described(volume, &id, len)? else { continue };
                if !std::mem::replace(&mut is_told, true) {
                    let message = "its index has lost records: what is in its blocks is taken from \
                                   their metas, or from the catalog";
                    self.notes.add(&volume.config.path, &Error::corrupt(message));
                    if self.how.mend {
                        match IndexMender::new(volume, valid) {
                            Ok(it) => mender = Some(it),
                            Err(e) => self.notes.add(&volume.config.path, &e),
                        }
                    }
                }
                let record_at = match &mut mender {
                    Some(mender) => mender.append(&index, block)?,
                    // There is no record, and whoever asks for it is told so.
                    None => i64::MAX.cast_unsigned(),
                };
                let at = FoundAt { volume: number, record_at, number: block, is_there: true };
                self.take(volume, index, at)?;
            }
        }
    }

    /// What a meta says of a block, or else the catalog, if that is so; and its number there.
    fn described(
        &mut self,
        volume: &Volume,
        id: &BlockId,
        len: u64,
    ) -> Result<Option<(BlockIndex, Option<u64>)>> {
        let known = match self.found.known_index(id) {
            Ok(known) => known,
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                log::debug!("{e}");
                None
            }
            Err(e) => return Err(e),
        };
        let number = known.as_ref().map(|it| it.0);
        let meta = meta_read::read_head(volume, id).filter(|it| it.stored_len() == len);
        if let Some(index) = meta {
            return Ok(Some((index, number)));
        }
        let is_so = |it: &(u64, BlockIndex)| prove(volume, &it.1, self.how.hash).is_ok();
        Ok(known.filter(is_so).map(|it| (it.1, number)))
    }

    /// Puts each block to the proof of its bytes: how many, and how many are damaged.
    fn scan(&mut self, volume: &Volume) -> Result<(u64, u64)> {
        let number = volume.config.number;
        let (mut scanned, mut damaged, mut after) = (0, 0, None);
        loop {
            let page = self.found.files(number, after.as_ref(), false, PAGE_PROVED)?;
            let Some(last) = page.last() else { return Ok((scanned, damaged)) };
            after = Some(last.0);
            let mut said = Vec::with_capacity(page.len());
            for (id, len) in page {
                said.push((id, len, self.found.index_of(&id)?));
            }
            let (hash, progress) = (self.how.hash, self.progress);
            let prove_one = |(_, len, said): &(BlockId, u64, Option<BlockIndex>)| -> Result<bool> {
                progress.check()?;
                let is_so = said.as_ref().is_some_and(|it| prove(volume, it, hash).is_ok());
                Progress::add(&progress.bytes, *len);
                Ok(is_so)
            };
            // The tables of a page are all that is in memory besides a frame for each thread.
            let proved = said.par_iter().map(prove_one).collect::<Result<Vec<bool>>>()?;
            scanned += said.len() as u64;
            for ((id, _, said), _) in said.iter().zip(proved).filter(|it| !it.1) {
                self.progress.check()?;
                damaged += u64::from(!self.settle_damaged(volume, id, said.as_ref())?);
            }
        }
    }

    /// Looks into a block that is not as is said, or of which nothing is said: whether its bytes
    /// are those of its name. If they are, what else is said of it may be right.
    fn settle_damaged(
        &mut self,
        volume: &Volume,
        id: &BlockId,
        said: Option<&BlockIndex>,
    ) -> Result<bool> {
        let len = volume.store.len_of(id)?.unwrap_or_default();
        if let Err(e) = super::bytes::check_name(volume, id, len, self.how.hash) {
            self.progress.check()?;
            // What the machine lacks is no fault of the block.
            if e.is_shortage() {
                return Err(e);
            }
            self.notes.add(&volume.config.path, &e.context("damaged"));
            return Ok(false);
        }
        let Some(said) = said else {
            let message = "nothing says what is in it, though its bytes are those of its name";
            self.note(volume, id, message);
            return Ok(true);
        };
        let meta = meta_read::read_head(volume, id);
        let known = self.found.known_index(id).ok().flatten().map(|it| it.1);
        let mut others = [meta, known].into_iter().flatten().filter(|it| it != said);
        match others.find(|it| prove(volume, it, self.how.hash).is_ok()) {
            Some(right) => {
                self.note(volume, id, "the index is wrong about what is in it");
                self.found.correct(&right)?;
            }
            None => {
                let message = "its bytes are those of its name, and not what is said of them";
                self.note(volume, id, message);
            }
        }
        Ok(true)
    }
}
