//! What the catalog says of blocks, held against what lies on the volumes.

use rusqlite::OptionalExtension;

use super::read::Reader;
use super::run::RunId;
use super::told::Sum;
use super::{OPEN, sql};
use crate::chunk::Digest;
use crate::error::Result;
use crate::volume::{BlockId, BlockIndex};

impl Reader {
    /// The block of this name whose record is here in a volume's index, as the catalog has it.
    pub fn copy_at(&self, volume: i64, record_at: u64, id: &BlockId) -> Result<Option<u64>> {
        let query = "SELECT number FROM blocks JOIN block_copies ON block = number \
                     WHERE id = ?1 AND volume = ?2 AND record_at = ?3";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let row = statement.query_row((&id.0, volume, record_at), |row| row.get(0));
        row.optional().map_err(sql)
    }

    /// All places of chunks that the catalog has, summed up as [`add_chunks`] does. `check` is
    /// asked now and then; what it fails with ends the work.
    pub fn chunk_sum(&self, check: &dyn Fn() -> Result<()>) -> Result<Sum> {
        let mut statement =
            self.conn().prepare("SELECT id, block, at, len FROM chunks").map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        let (mut sum, mut item) = (Sum::default(), Vec::new());
        while let Some(row) = rows.next().map_err(sql)? {
            let id = row.get_ref(0).map_err(sql)?;
            let id = Digest::from_slice(id.as_blob().map_err(|e| sql(e.into()))?)?;
            let place = (row.get(2).map_err(sql)?, row.get(3).map_err(sql)?);
            put_chunk(&mut item, &id, row.get(1).map_err(sql)?, place);
            sum.add(&item);
            if sum.count.is_multiple_of(1 << 16) {
                check()?;
            }
        }
        Ok(sum)
    }

    /// How many chunks the catalog has.
    pub fn chunk_count(&self) -> Result<u64> {
        let query = "SELECT count(*) FROM chunks";
        self.conn().query_row(query, [], |row| row.get(0)).map_err(sql)
    }

    /// Holds a block's record in a volume index against the catalog; gives how many of its chunks
    /// the catalog has in this block. Faults are told in words that begin with the block.
    pub fn check_record(
        &self,
        number: u64,
        index: &BlockIndex,
        found: &mut dyn FnMut(String),
    ) -> Result<u64> {
        let id = index.id;
        if self.block(number)?.frames != index.frames {
            found(format!("block {id}: its frames are not those that the catalog has"));
        }
        let query = "SELECT block, at, len FROM chunks WHERE id = ?1";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let mut here = 0;
        for (at, chunk) in index.placed_chunks() {
            let row = statement.query_row([&chunk.id.0], |row| {
                Ok((row.get::<_, u64>(0)?, row.get::<_, u64>(1)?, row.get::<_, u64>(2)?))
            });
            match row.optional().map_err(sql)? {
                None => found(format!("block {id}: its chunk {} is not in the catalog", chunk.id)),
                Some((block, ..)) if block != number => {}
                Some((_, place, len)) if (place, len) == (at, u64::from(chunk.len)) => here += 1,
                Some((_, place, len)) => {
                    // A chunk may be in a block twice.
                    let is_there = |it: (u64, crate::chunk::ChunkRef)| {
                        (it.0, u64::from(it.1.len), it.1.id) == (place, len, chunk.id)
                    };
                    if !index.placed_chunks().any(is_there) {
                        found(format!(
                            "block {id}: the catalog has its chunk {} at {place}, it is at {at}",
                            chunk.id
                        ));
                    }
                }
            }
        }
        Ok(here)
    }

    /// The last run that has changed what a block's meta says: that began or ended a name of a
    /// version that uses the block. `None` if nothing uses it.
    pub fn last_change_of(&self, id: &BlockId) -> Result<Option<RunId>> {
        let query = "SELECT max(max(e.first_run, iif(e.last_run < ?2, e.last_run + 1, 0))) \
                     FROM blocks b JOIN uses u ON u.block = b.number \
                     JOIN entries e ON e.version = u.version WHERE b.id = ?1";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        statement.query_row((&id.0, OPEN), |row| row.get(0)).map_err(sql)
    }
}

/// Adds the places of all chunks of a block that has this number.
pub fn add_chunks(sum: &mut Sum, number: u64, index: &BlockIndex) {
    let mut item = Vec::new();
    for (at, chunk) in index.placed_chunks() {
        put_chunk(&mut item, &chunk.id, number, (at, u64::from(chunk.len)));
        sum.add(&item);
    }
}

fn put_chunk(item: &mut Vec<u8>, id: &Digest, block: u64, (at, len): (u64, u64)) {
    item.clear();
    item.extend_from_slice(&id.0);
    for number in [block, at, len] {
        item.extend_from_slice(&number.to_le_bytes());
    }
}
