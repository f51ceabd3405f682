//! Volume indexes: where a record is damaged, the whole index is written anew beside it and renamed
//! over.
//!
//! If all records keep their places, the catalog need not know. If not, it is told before that
//! nothing of the volume's index is to be counted on. After a kill the next writer reads it from
//! its beginning: the new one is taken up, and with the old one the volume takes no blocks until a
//! repair comes to its end.

use std::path::Path;

use super::Work;
use crate::copies::tables_of;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::quoted;
use crate::volume::block::encode_record;
use crate::volume::{BlockIndex, CopyAt, Volume};

impl Work<'_> {
    /// Looks at the index of every volume, and writes those anew that are damaged.
    pub fn indexes(&mut self) -> Result<()> {
        for (number, volume) in self.volumes.present().iter().enumerate() {
            let result = self.index(number, volume);
            match result {
                Err(e) if e.kind() == ErrorKind::Interrupted => return Err(e),
                Err(e) => self.note(&volume.config.path, &e.context("its index")),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn index(&mut self, at: usize, volume: &Volume) -> Result<()> {
        let number = volume.config.number;
        let known = self.store.reader.index_len(number)?;
        let rows = self.store.reader.records_on(number)?;
        let mut damaged = 0;
        for (record_at, block) in &rows {
            self.progress.check()?;
            damaged += u64::from(self.record(volume, *record_at, *block)?.is_none());
        }
        let is_doubted = known == 0 && !rows.is_empty();
        if damaged == 0 && !is_doubted && self.reads_to(volume, known).is_ok() {
            return Ok(());
        }
        self.write_index(at, volume)?;
        self.done.indexes.push((volume.config.path.clone(), damaged));
        Ok(())
    }

    /// Writes the index of a volume anew: the records of the blocks that it has, and no others.
    pub fn write_index(&mut self, at: usize, volume: &Volume) -> Result<()> {
        let number = volume.config.number;
        let known = self.store.reader.index_len(number)?;
        let rows = self.store.reader.records_on(number)?;
        let new_places = self.plan(volume, &rows)?;
        let len = new_places.last().map_or(0, |it| it.1);
        let keeps = rows.iter().zip(&new_places).all(|(row, new)| row.0 == new.0);
        let stays = keeps && len == known;
        if !stays {
            self.store.writer.doubt_index(number)?;
        }
        volume.replace_index(|out| {
            for (record_at, block) in &rows {
                self.progress.check()?;
                let record = encode_record(*block, &self.tables(volume, *record_at, *block)?);
                out.write_all(&record).map_err(|e| Error::io("writing an index", e))?;
            }
            Ok(())
        })?;
        if !stays {
            let places = rows
                .iter()
                .zip(&new_places)
                .map(|(row, new)| (row.1, CopyAt { volume: number, record_at: new.0 }));
            let places: Vec<(u64, CopyAt)> = places.collect();
            self.store.writer.trust_index(number, &places, len)?;
        }
        let mut lens = self.store.index_lens().to_vec();
        if let Some(it) = lens.get_mut(at) {
            *it = Some(len);
        }
        self.store.set_index_lens(lens);
        log::info!("index of {}: written anew", quoted(&volume.config.path));
        Ok(())
    }

    /// Where each record will begin and end.
    fn plan(&self, volume: &Volume, rows: &[(u64, u64)]) -> Result<Vec<(u64, u64)>> {
        let mut at = 0;
        let mut places = Vec::with_capacity(rows.len());
        for (record_at, block) in rows {
            self.progress.check()?;
            let len = encode_record(*block, &self.tables(volume, *record_at, *block)?).len() as u64;
            places.push((at, at + len));
            at += len;
        }
        Ok(places)
    }

    /// What is inside a block, from its record if that is good.
    fn tables(&self, volume: &Volume, record_at: u64, block: u64) -> Result<BlockIndex> {
        if let Some(index) = self.record(volume, record_at, block)? {
            return Ok(index);
        }
        let copies = self.store.reader.copies_of(block)?;
        let hash = self.store.settings.hash;
        tables_of(&self.store.reader, self.volumes, hash, block, &copies)
    }

    /// The record of a block, if it is good.
    fn record(&self, volume: &Volume, record_at: u64, block: u64) -> Result<Option<BlockIndex>> {
        let row = self.store.reader.block(block)?;
        let found = volume.index_record(record_at).ok();
        Ok(found.filter(|it| it.id == row.id && it.frames == row.frames))
    }

    /// Whether the records can be read one after another as far as the catalog counts on them.
    fn reads_to(&self, volume: &Volume, known: u64) -> Result<()> {
        let mut records = volume.index_from(0)?;
        while records.offset() < known && records.next_record()?.is_some() {
            self.progress.check()?;
        }
        match records.offset() == known {
            true => Ok(()),
            false => Err(damaged(&volume.config.path)),
        }
    }
}

fn damaged(path: &Path) -> Error {
    Error::corrupt(format!("the index of {} is damaged", quoted(path)))
}
