//! Which metas are due: what runs have changed of what metas say.
//!
//! A meta names the files that use its block, and the runs in which they do. So a run makes a meta
//! out of date that uses the block in a new version, gives a version a further name, or ends one.

use rusqlite::{Connection, OptionalExtension};

use super::extent::{self, Extent};
use super::meta::Due;
use super::number_set::NumberSet;
use super::read::Reader;
use super::run::{RunId, VersionId};
use super::write::RunWriter;
use super::{OPEN, sql};
use crate::chunk::Digest;
use crate::error::Result;
use crate::volume::{BlockId, Described};

impl Reader {
    /// The blocks whose metas runs after `since`, which is one, have made out of date.
    pub fn blocks_changed_since(&self, since: RunId) -> Result<NumberSet> {
        let mut blocks = NumberSet::default();
        // The conditions with numbers in them are those of the indexes.
        let begun = "SELECT version FROM entries WHERE first_run > 1 AND first_run > ?1";
        add_blocks(self.conn(), begun, since, &mut blocks)?;
        add_blocks(self.conn(), &ended_from(">="), since, &mut blocks)?;
        with_namesakes(self.conn(), &blocks)
    }

    /// The name of a block.
    pub fn block_id(&self, number: u64) -> Result<BlockId> {
        let query = "SELECT id FROM blocks WHERE number = ?1";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let id: Vec<u8> = statement.query_row([number], |row| row.get(0)).map_err(sql)?;
        Digest::from_slice(&id)
    }
}

impl RunWriter<'_> {
    /// Whether a note on a volume is about a run of this catalog; of nothing, it always is.
    pub fn knows(&self, described: &Described) -> Result<bool> {
        let query = "SELECT EXISTS (SELECT 1 FROM runs WHERE run = ?1 AND uuid = ?2)";
        let row = (described.run, &described.uuid);
        let is_run: bool = self.conn().query_row(query, row, |row| row.get(0)).map_err(sql)?;
        Ok(is_run || described.run == 0)
    }

    /// Whether no run after `since` and before this one has made a meta out of date.
    pub fn is_unchanged_from(&self, since: RunId) -> Result<bool> {
        let query = "SELECT EXISTS (SELECT 1 FROM entries WHERE first_run > 1 \
                     AND first_run > ?1 AND first_run < ?2) \
                     OR EXISTS (SELECT 1 FROM entries WHERE last_run < 9223372036854775807 \
                     AND last_run >= ?1 AND last_run < ?2 - 1)";
        let row = (since, self.run());
        let is_changed: bool = self.conn().query_row(query, row, |row| row.get(0)).map_err(sql)?;
        Ok(!is_changed)
    }

    /// The blocks whose metas this run makes out of date without a new version: it has ended names
    /// of versions that use them, or given further names to `linked`, which are older versions.
    pub fn blocks_touched(&self, linked: &NumberSet) -> Result<NumberSet> {
        let mut blocks = NumberSet::default();
        add_blocks(self.conn(), &ended_from("="), self.run() - 1, &mut blocks)?;
        for version in linked.iter() {
            add_blocks_of(self.conn(), version.cast_signed(), &mut blocks)?;
        }
        with_namesakes(self.conn(), &blocks)
    }

    /// All copies on a volume.
    pub fn each_copy_on(&self, volume: i64, each: &mut dyn FnMut(Due)) -> Result<()> {
        let query = "SELECT block, record_at FROM block_copies WHERE volume = ?1";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let mut rows = statement.query([volume]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let (block, record_at) = (row.get(0).map_err(sql)?, row.get(1).map_err(sql)?);
            each(Due { block, volume, record_at });
        }
        Ok(())
    }

    /// A block's copy on a volume, if it has one there.
    pub fn copy_on(&self, volume: i64, block: u64) -> Result<Option<Due>> {
        let query = "SELECT record_at FROM block_copies WHERE block = ?1 AND volume = ?2";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let found = statement.query_row((block, volume), |row| row.get(0)).optional();
        Ok(found.map_err(sql)?.map(|record_at| Due { block, volume, record_at }))
    }

    /// How many versions use a block.
    pub fn uses_of(&self, block: u64) -> Result<u64> {
        let query = "SELECT count(*) FROM uses WHERE block = ?1";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        statement.query_row([block], |row| row.get(0)).map_err(sql)
    }
}

/// Selects the versions of names that were ended: a run ends them at the number before its own.
fn ended_from(comparison: &str) -> String {
    format!("SELECT version FROM entries WHERE last_run < {OPEN} AND last_run {comparison} ?1")
}

/// Adds the blocks of the versions that a query gives.
fn add_blocks(conn: &Connection, query: &str, run: RunId, blocks: &mut NumberSet) -> Result<()> {
    let mut statement = conn.prepare(query).map_err(sql)?;
    let mut rows = statement.query([run]).map_err(sql)?;
    while let Some(row) = rows.next().map_err(sql)? {
        add_blocks_of(conn, row.get(0).map_err(sql)?, blocks)?;
    }
    Ok(())
}

fn add_blocks_of(conn: &Connection, version: VersionId, blocks: &mut NumberSet) -> Result<()> {
    let query = "SELECT extents FROM versions WHERE version = ?1 AND extents IS NOT NULL";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    let extents: Option<Vec<u8>> =
        statement.query_row([version], |row| row.get(0)).optional().map_err(sql)?;
    for extent in extent::decode(&extents.unwrap_or_default())? {
        if let Extent::Data { block, .. } = extent {
            blocks.insert(block);
        }
    }
    Ok(())
}

/// The same with all other numbers of these blocks: they share a meta.
fn with_namesakes(conn: &Connection, blocks: &NumberSet) -> Result<NumberSet> {
    let mut all = NumberSet::default();
    let query = "SELECT b.number FROM blocks a JOIN blocks b ON b.id = a.id WHERE a.number = ?1";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    for block in blocks.iter() {
        let mut rows = statement.query([block]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            all.insert(row.get(0).map_err(sql)?);
        }
    }
    Ok(all)
}
