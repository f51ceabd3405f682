//! What was found of blocks, put into a catalog that knows blocks already: a copy of an earlier
//! state, or one that is doubted.
//!
//! What it knows of volumes that were not read stays. A block that it knows keeps its number, for
//! files name it so; rows are corrected where what was read says otherwise, and none goes because a
//! file has vanished.

use std::os::unix::ffi::OsStrExt;

use rusqlite::Connection;

use super::scratch::{FOUND_CHUNKS, leave_out_void};
use crate::catalog::numbers::{self, Numbered};
use crate::catalog::sql;
use crate::error::Result;
use crate::volume::VolumeConfig;

/// What was changed in a catalog.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Blocks that it did not have, or of which it knew the name only.
    pub blocks_added: u64,
    /// Blocks of which it had other tables.
    pub blocks_changed: u64,
    /// Copies whose record is elsewhere than it had.
    pub copies_moved: u64,
    /// Chunks that it did not have.
    pub chunks_added: u64,
    /// Chunks that it had in another place.
    pub chunks_changed: u64,
    /// Chunks that are not where it had them, nor elsewhere.
    pub chunks_removed: u64,
}

impl Changed {
    /// Whether nothing was.
    pub fn is_nothing(&self) -> bool {
        *self == Changed::default()
    }
}

fn change(conn: &Connection, statement: &str) -> Result<u64> {
    conn.execute(statement, []).map(|it| it as u64).map_err(sql)
}

/// Leaves these volumes and no others, as they are now.
pub(crate) fn put_volumes(
    conn: &Connection,
    volumes: &[(VolumeConfig, Option<i64>, Option<u64>)],
) -> Result<()> {
    let mut known = conn.prepare("SELECT number, uuid FROM volumes").map_err(sql)?;
    let rows = known.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).map_err(sql)?;
    let known: Vec<(i64, String)> = rows.collect::<rusqlite::Result<_>>().map_err(sql)?;
    for (number, uuid) in known {
        // The number of one that was retired may have been given again.
        if volumes.iter().all(|it| (it.0.number, &it.0.uuid) != (number, &uuid)) {
            let query = "DELETE FROM block_copies WHERE volume = ?1";
            conn.execute(query, [number]).map_err(sql)?;
            conn.execute("DELETE FROM volumes WHERE number = ?1", [number]).map_err(sql)?;
        }
    }
    let query = "INSERT INTO volumes \
                 (number, uuid, path, status, reserve_percent, created_s, index_len) \
                 VALUES (?1, ?2, ?3, ?4, ?5, coalesce(?6, 0), coalesce(?7, 0)) \
                 ON CONFLICT (number) DO UPDATE SET path = excluded.path, \
                 status = excluded.status, reserve_percent = excluded.reserve_percent, \
                 created_s = coalesce(?6, created_s), index_len = coalesce(?7, index_len)";
    for (volume, created, index_len) in volumes {
        let path = volume.path.as_os_str().as_bytes();
        let (status, percent) = (volume.status.as_str(), volume.reserve_percent);
        let row = (volume.number, &volume.uuid, path, status, percent, created, index_len);
        conn.execute(query, row).map_err(sql)?;
    }
    Ok(())
}

/// Gives the blocks that were found their numbers and puts them into the catalog, with their copies
/// on volumes that it has; gives the number of the next block.
pub(crate) fn settle(conn: &Connection, changed: &mut Changed) -> Result<u64> {
    let statement = "INSERT INTO scratch.at SELECT b.number, f.form, 0 \
                     FROM scratch.forms f JOIN blocks b ON b.id = f.id";
    conn.execute_batch(statement).map_err(sql)?;
    let update = "UPDATE blocks SET stored_len = f.stored_len, plain_len = f.plain_len, \
                  frames = f.frames FROM scratch.forms f WHERE f.id = blocks.id AND \
                  (f.stored_len, f.plain_len, f.frames) <> \
                  (blocks.stored_len, blocks.plain_len, blocks.frames)";
    let learned = "SELECT count(*) FROM blocks b JOIN scratch.forms f ON f.id = b.id \
                   WHERE length(b.frames) <= 1";
    let learned: u64 = conn.query_row(learned, [], |row| row.get(0)).map_err(sql)?;
    changed.blocks_changed += change(conn, update)?.saturating_sub(learned);
    changed.blocks_added += learned;
    let next = number_new(conn)?;
    changed.blocks_added += change(
        conn,
        "INSERT INTO blocks (number, id, stored_len, plain_len, frames) \
         SELECT a.number, id, stored_len, plain_len, frames FROM scratch.at a \
         JOIN scratch.forms f ON f.form = a.form WHERE is_new ORDER BY a.number",
    )?;
    // A row that leads to a record of its block stays: a block may have two.
    changed.copies_moved += change(
        conn,
        "UPDATE block_copies SET record_at = (SELECT max(c.record_at) FROM scratch.copies c \
             JOIN scratch.at a ON a.form = c.form \
             WHERE a.number = block AND c.volume = block_copies.volume) \
         WHERE EXISTS (SELECT 1 FROM scratch.copies c JOIN scratch.at a ON a.form = c.form \
             WHERE a.number = block AND c.volume = block_copies.volume) \
         AND NOT EXISTS (SELECT 1 FROM scratch.copies c JOIN scratch.at a ON a.form = c.form \
             WHERE a.number = block AND c.volume = block_copies.volume \
             AND c.record_at = block_copies.record_at)",
    )?;
    change(
        conn,
        "INSERT OR IGNORE INTO block_copies (block, volume, record_at) \
         SELECT a.number, c.volume, max(c.record_at) FROM scratch.copies c \
         JOIN scratch.at a ON a.form = c.form GROUP BY a.number, c.volume",
    )?;
    Ok(next)
}

/// Numbers the blocks that the catalog does not have.
///
/// One that it has lost gets the number again that files name it by: chunks are still said to be in
/// a block of that number, and its record says it. A number counts only if it has every chunk that
/// is said to be in the block of that number: with another block's, files would show its bytes.
fn number_new(conn: &Connection) -> Result<u64> {
    let mut next = numbers::next(conn, Numbered::Block)?.cast_unsigned();
    let statement = "CREATE TABLE scratch.new AS \
                     SELECT c.form, max(said) AS said, min(n) AS first FROM scratch.copies c \
                     WHERE c.form NOT IN (SELECT form FROM scratch.at) \
                     GROUP BY c.form ORDER BY said IS NOT NULL, said, first;
                     CREATE TABLE scratch.orphans AS SELECT block, id, at, len FROM chunks
                     WHERE block NOT IN (SELECT number FROM blocks);
                     CREATE INDEX scratch.orphans_block ON orphans (block);
                     CREATE INDEX scratch.orphans_id ON orphans (id);";
    conn.execute_batch(statement).map_err(sql)?;
    let query = "SELECT form, said FROM scratch.new ORDER BY rowid";
    let mut statement = conn.prepare(query).map_err(sql)?;
    let mut new = statement.query([]).map_err(sql)?;
    // Those that it may have by its chunks, the one of which most chunks speak first.
    let query = "SELECT k.block FROM scratch.chunks s JOIN scratch.orphans k \
                 ON (k.id, k.at, k.len) = (s.id, s.at, s.len) WHERE s.form = ?1 \
                 GROUP BY k.block ORDER BY k.block IS NOT ?2, count(*) DESC LIMIT 16";
    let mut named = conn.prepare(query).map_err(sql)?;
    let query = "SELECT EXISTS (SELECT 1 FROM blocks WHERE number = ?1) \
                 OR EXISTS (SELECT 1 FROM scratch.at WHERE number = ?1) \
                 OR EXISTS (SELECT 1 FROM scratch.orphans k WHERE block = ?1 AND NOT EXISTS \
                     (SELECT 1 FROM scratch.chunks s WHERE s.form = ?2 \
                      AND (s.id, s.at, s.len) = (k.id, k.at, k.len)))";
    let mut is_anothers = conn.prepare(query).map_err(sql)?;
    let mut put = conn.prepare("INSERT INTO scratch.at VALUES (?1, ?2, 1)").map_err(sql)?;
    while let Some(row) = new.next().map_err(sql)? {
        let (form, said): (i64, Option<u64>) = (row.get(0).map_err(sql)?, row.get(1).map_err(sql)?);
        let numbers = named.query_map((form, said), |row| row.get(0)).map_err(sql)?;
        let mut numbers: Vec<u64> = numbers.collect::<rusqlite::Result<_>>().map_err(sql)?;
        numbers.extend(said);
        let mut number = next;
        for candidate in numbers {
            let row = is_anothers.query_row((candidate, form), |row| row.get::<_, bool>(0));
            if !row.map_err(sql)? {
                number = candidate;
                break;
            }
        }
        next = next.max(number + 1);
        put.execute((number, form)).map_err(sql)?;
    }
    Ok(next)
}

/// Puts the chunks of the blocks that were found into the catalog, and takes out those that these
/// blocks do not have. What a killed run may have lost is left out, as in a catalog made anew.
pub(crate) fn put_chunks(conn: &Connection, changed: &mut Changed) -> Result<()> {
    let void = leave_out_void(conn)?;
    changed.blocks_added = changed.blocks_added.saturating_sub(void);
    let statements = format!(
        "CREATE TABLE scratch.want (id BLOB PRIMARY KEY, block INTEGER NOT NULL, \
             at INTEGER NOT NULL, len INTEGER NOT NULL) WITHOUT ROWID; \
         INSERT OR REPLACE INTO scratch.want (id, block, at, len) {FOUND_CHUNKS}"
    );
    conn.execute_batch(&statements).map_err(sql)?;
    // The block was read, or there is none: then nothing speaks for the row.
    let is_refuted = "(chunks.block IN (SELECT number FROM scratch.at) \
                      OR chunks.block NOT IN (SELECT number FROM blocks))";
    let delete = format!(
        "DELETE FROM chunks WHERE {is_refuted} \
         AND NOT EXISTS (SELECT 1 FROM scratch.want w WHERE w.id = chunks.id)"
    );
    changed.chunks_removed += change(conn, &delete)?;
    let update = format!(
        "UPDATE chunks SET block = w.block, at = w.at, len = w.len FROM scratch.want w \
         WHERE w.id = chunks.id AND (w.block, w.at, w.len) <> \
         (chunks.block, chunks.at, chunks.len) AND (w.block > chunks.block OR {is_refuted})"
    );
    changed.chunks_changed += change(conn, &update)?;
    let insert = "INSERT INTO chunks (id, block, at, len) SELECT id, block, at, len \
                  FROM scratch.want w \
                  WHERE NOT EXISTS (SELECT 1 FROM chunks k WHERE k.id = w.id) ORDER BY id";
    changed.chunks_added += change(conn, insert)?;
    Ok(())
}
