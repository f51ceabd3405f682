//! What was found of blocks, until it is known which of them there are and what numbers they have.
//!
//! It lies in a file of its own beside the catalog that is built, so memory does not grow with the
//! store. The chunks enter the catalog last and in the order of their names.

use std::path::Path;

use rusqlite::{Connection, OptionalExtension};

use crate::catalog::sql;
use crate::chunk::frame::{get_frames, put_frames};
use crate::chunk::{ChunkRef, Digest, HashAlgo};
use crate::error::{Error, Result};
use crate::sys::quoted;
use crate::volume::{BlockId, BlockIndex};
use crate::wire::Reader as WireReader;

const TABLES: &str = "
    CREATE TABLE scratch.forms (
        form INTEGER PRIMARY KEY, id BLOB NOT NULL UNIQUE, stored_len INTEGER NOT NULL,
        plain_len INTEGER NOT NULL, frames BLOB NOT NULL, chunks BLOB NOT NULL);
    CREATE TABLE scratch.at (number INTEGER PRIMARY KEY, form INTEGER NOT NULL,
        is_new INTEGER NOT NULL);
    CREATE INDEX scratch.at_form ON at (form);
    CREATE TABLE scratch.copies (
        form INTEGER NOT NULL, volume INTEGER NOT NULL, record_at INTEGER NOT NULL,
        said INTEGER, is_there INTEGER NOT NULL, n INTEGER PRIMARY KEY);
    CREATE INDEX scratch.copies_form ON copies (form);
    CREATE TABLE scratch.chunks (form INTEGER NOT NULL, id BLOB NOT NULL, at INTEGER NOT NULL,
        len INTEGER NOT NULL);
    CREATE INDEX scratch.chunks_form ON chunks (form);
    CREATE TABLE scratch.files (volume INTEGER NOT NULL, id BLOB NOT NULL, len INTEGER NOT NULL,
        PRIMARY KEY (volume, id)) WITHOUT ROWID;
    CREATE TABLE scratch.problems (run INTEGER, n INTEGER, path BLOB, kind TEXT, message TEXT);";

/// How what is said of a block fits what was said before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Nothing was said, or the same.
    Fits,
    /// Something else was said; nothing has been changed.
    Differs,
}

/// Where a block was found.
#[derive(Clone, Copy, Debug)]
pub struct FoundAt {
    /// Number of the volume.
    pub volume: i64,
    /// Where its record begins in the volume's index, in bytes.
    pub record_at: u64,
    /// The number that the record says.
    pub number: Option<u64>,
    /// Whether the block's file is there, with its whole length.
    pub is_there: bool,
}

/// Makes the tables in a file of their own.
pub(crate) fn attach(conn: &Connection, path: &Path) -> Result<()> {
    let failed = |e| Error::io(format!("creating {}", quoted(path)), e);
    let mut options = crate::sys::private_file();
    options.write(true).create_new(true).open(path).map_err(failed)?;
    let name = path.to_str().map(str::to_owned);
    let name = name.ok_or_else(|| Error::usage("the name of the catalog has to be UTF-8"))?;
    conn.execute("ATTACH ?1 AS scratch", [name]).map_err(sql)?;
    for (pragma, value) in [("scratch.journal_mode", "DELETE"), ("scratch.synchronous", "OFF")] {
        let (schema, pragma) = pragma.split_once('.').unwrap_or(("scratch", pragma));
        conn.pragma_update(Some(schema), pragma, value).map_err(sql)?;
    }
    conn.execute_batch(TABLES).map_err(sql)
}

/// Frame table, and a hash of the chunks.
fn tables_of(index: &BlockIndex) -> (Vec<u8>, Vec<u8>) {
    let mut frames = Vec::new();
    put_frames(&mut frames, &index.frames);
    let mut hasher = HashAlgo::Blake3.hasher();
    for chunk in &index.chunks {
        hasher.update(&chunk.id.0);
        hasher.update(&chunk.len.to_le_bytes());
    }
    (frames, hasher.finish().0.to_vec())
}

/// What was found of blocks, noted in the tables of a database that is built or doubted.
#[derive(Clone, Copy)]
pub struct Found<'a> {
    pub(super) conn: &'a Connection,
}

impl<'a> Found<'a> {
    /// What is noted in the tables that [`attach`] has made.
    pub(crate) fn new(conn: &'a Connection) -> Found<'a> {
        Found { conn }
    }

    /// Notes a block that a volume has.
    pub fn put(&self, index: &BlockIndex, at: FoundAt) -> Result<Fit> {
        let (frames, chunks) = tables_of(index);
        let query = "SELECT form, frames = ?2 AND chunks = ?3 FROM scratch.forms WHERE id = ?1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let params = (&index.id.0[..], &frames, &chunks);
        let found = statement.query_row(params, |row| Ok((row.get(0)?, row.get(1)?)));
        let form: i64 = match found.optional().map_err(sql)? {
            Some((_, false)) => return Ok(Fit::Differs),
            Some((form, true)) => form,
            None => {
                let query = "INSERT INTO scratch.forms (id, stored_len, plain_len, frames, chunks) \
                             VALUES (?1, ?2, ?3, ?4, ?5)";
                let lens = (index.stored_len(), index.plain_len());
                let row = (&index.id.0[..], lens.0, lens.1, &frames, &chunks);
                self.conn.prepare_cached(query).map_err(sql)?.execute(row).map_err(sql)?;
                let form = self.conn.last_insert_rowid();
                self.put_scratch_chunks(form, index)?;
                form
            }
        };
        let query = "INSERT INTO scratch.copies (form, volume, record_at, said, is_there) \
                     VALUES (?1, ?2, ?3, ?4, ?5)";
        let row = (form, at.volume, at.record_at, at.number, at.is_there);
        self.conn.prepare_cached(query).map_err(sql)?.execute(row).map_err(sql)?;
        Ok(Fit::Fits)
    }

    fn put_scratch_chunks(&self, form: i64, index: &BlockIndex) -> Result<()> {
        let query = "INSERT INTO scratch.chunks VALUES (?1, ?2, ?3, ?4)";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        for (at, chunk) in index.placed_chunks() {
            statement.execute((form, &chunk.id.0[..], at, chunk.len)).map_err(sql)?;
        }
        Ok(())
    }

    /// What is said of a block now is what its bytes have proved, whatever was said before.
    pub fn correct(&self, index: &BlockIndex) -> Result<()> {
        let (frames, chunks) = tables_of(index);
        let query = "UPDATE scratch.forms SET stored_len = ?2, plain_len = ?3, frames = ?4, \
                     chunks = ?5 WHERE id = ?1 RETURNING form";
        let row = (&index.id.0[..], index.stored_len(), index.plain_len(), frames, chunks);
        let form: i64 = self.conn.query_row(query, row, |row| row.get(0)).map_err(sql)?;
        self.conn.execute("DELETE FROM scratch.chunks WHERE form = ?1", [form]).map_err(sql)?;
        self.put_scratch_chunks(form, index)
    }

    /// Notes a block's file on a volume.
    pub fn put_file(&self, volume: i64, id: &BlockId, len: u64) -> Result<()> {
        let query = "INSERT OR REPLACE INTO scratch.files VALUES (?1, ?2, ?3)";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        statement.execute((volume, &id.0[..], len)).map_err(sql)?;
        Ok(())
    }

    /// At most `limit` files of a volume, in the order of their names, from the first after
    /// `after`, each with its length; with `without`, only those of which nothing was found.
    pub fn files(
        &self,
        volume: i64,
        after: Option<&BlockId>,
        without: bool,
        limit: u64,
    ) -> Result<Vec<(BlockId, u64)>> {
        let query = "SELECT id, len FROM scratch.files s WHERE volume = ?1 AND id > ?2 \
                     AND NOT (?3 AND EXISTS (SELECT 1 FROM scratch.forms f \
                     JOIN scratch.copies c ON c.form = f.form \
                     WHERE f.id = s.id AND c.volume = ?1)) ORDER BY id LIMIT ?4";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let after = after.map_or(&[][..], |it| &it.0[..]);
        let mut rows = statement.query((volume, after, without, limit)).map_err(sql)?;
        let mut found = Vec::new();
        while let Some(row) = rows.next().map_err(sql)? {
            let id: Vec<u8> = row.get(0).map_err(sql)?;
            found.push((Digest::from_slice(&id)?, row.get(1).map_err(sql)?));
        }
        Ok(found)
    }

    /// What was found to be in a block.
    pub fn index_of(&self, id: &BlockId) -> Result<Option<BlockIndex>> {
        let query = "SELECT frames, form FROM scratch.forms WHERE id = ?1";
        let found = self.conn.query_row(query, [&id.0[..]], |row| Ok((row.get(0)?, row.get(1)?)));
        let Some((frames, form)) = found.optional().map_err(sql)? else { return Ok(None) };
        let query = "SELECT at, id, len FROM scratch.chunks WHERE form = ?1 ORDER BY at";
        self.assemble(id, frames, query, form).map(Some)
    }

    /// What the catalog itself says is in a block, and the number by which it knows it, as far as
    /// it knows all of its chunks.
    pub fn known_index(&self, id: &BlockId) -> Result<Option<(u64, BlockIndex)>> {
        let query = "SELECT frames, number FROM blocks WHERE id = ?1 AND length(frames) > 1 \
                     ORDER BY number DESC LIMIT 1";
        let found = self.conn.query_row(query, [&id.0[..]], |row| Ok((row.get(0)?, row.get(1)?)));
        let Some((frames, number)) = found.optional().map_err(sql)? else { return Ok(None) };
        // Each block's chunks are asked for, and the table has them by their names.
        let statement = "CREATE TABLE IF NOT EXISTS scratch.by_block AS \
                         SELECT block, at, id, len FROM chunks ORDER BY block, at; \
                         CREATE INDEX IF NOT EXISTS scratch.by_block_index ON by_block (block);";
        self.conn.execute_batch(statement).map_err(sql)?;
        let query = "SELECT at, id, len FROM scratch.by_block WHERE block = ?1 ORDER BY at";
        let index = self.assemble(id, frames, query, number)?;
        Ok(Some((number.cast_unsigned(), index)))
    }

    fn assemble(&self, id: &BlockId, frames: Vec<u8>, query: &str, key: i64) -> Result<BlockIndex> {
        let mut reader = WireReader::new(&frames, "frame table");
        let frames = get_frames(&mut reader)?;
        reader.finish()?;
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let mut rows = statement.query([key]).map_err(sql)?;
        let (mut chunks, mut end) = (Vec::new(), 0u64);
        while let Some(row) = rows.next().map_err(sql)? {
            let at: u64 = row.get(0).map_err(sql)?;
            let chunk: Vec<u8> = row.get(1).map_err(sql)?;
            let chunk = ChunkRef { id: Digest::from_slice(&chunk)?, len: row.get(2).map_err(sql)? };
            if at != end {
                return Err(Error::corrupt(format!("not all chunks of block {id} are known")));
            }
            end = end.saturating_add(chunk.len.into());
            chunks.push(chunk);
        }
        let index = BlockIndex { id: *id, frames, chunks };
        index.check()?;
        Ok(index)
    }

    /// Whether the catalog says nothing of what is in a block, or the same.
    pub fn agrees(&self, index: &BlockIndex) -> Result<bool> {
        let (frames, _) = tables_of(index);
        let query = "SELECT NOT EXISTS (SELECT 1 FROM blocks WHERE id = ?1) \
                     OR EXISTS (SELECT 1 FROM blocks WHERE id = ?1 AND frames = ?2)";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        statement.query_row((&index.id.0[..], frames), |row| row.get(0)).map_err(sql)
    }

    /// Whether a block was found on this volume.
    pub fn has_on(&self, id: &BlockId, volume: i64) -> Result<bool> {
        let query = "SELECT EXISTS (SELECT 1 FROM scratch.forms f JOIN scratch.copies c \
                     ON c.form = f.form WHERE id = ?1 AND volume = ?2)";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        statement.query_row((&id.0[..], volume), |row| row.get(0)).map_err(sql)
    }
}

/// Gives all blocks that were found their numbers, and puts them into a catalog that has none;
/// gives the number of the next block.
///
/// The numbers are those that records say. Blocks without one are older, and come before them in
/// the order in which they were found; two with one number come one after the other.
pub(super) fn settle(conn: &Connection) -> Result<u64> {
    let query = "SELECT form, max(said) AS said, min(n) AS first FROM scratch.copies \
                 GROUP BY form ORDER BY said IS NOT NULL, said, first";
    let mut statement = conn.prepare(query).map_err(sql)?;
    let mut rows = statement.query([]).map_err(sql)?;
    let mut last = 0u64;
    let mut put = conn.prepare("INSERT INTO scratch.at VALUES (?1, ?2, 1)").map_err(sql)?;
    while let Some(row) = rows.next().map_err(sql)? {
        let (form, said): (i64, Option<u64>) = (row.get(0).map_err(sql)?, row.get(1).map_err(sql)?);
        last = said.unwrap_or_default().max(last + 1);
        put.execute((last, form)).map_err(sql)?;
    }
    drop(rows);
    drop((statement, put));
    let statements = "
        INSERT INTO blocks (number, id, stored_len, plain_len, frames)
            SELECT a.number, id, stored_len, plain_len, frames FROM scratch.at a
            JOIN scratch.forms f ON f.form = a.form ORDER BY a.number;
        INSERT INTO block_copies (block, volume, record_at)
            SELECT a.number, c.volume, max(c.record_at) FROM scratch.copies c
            JOIN scratch.at a ON a.form = c.form GROUP BY a.number, c.volume;";
    conn.execute_batch(statements).map_err(sql)?;
    Ok(last + 1)
}

/// Takes out blocks that are said to have been written, but are on no disk and in no file: a run
/// that did not end may have lost them. Only such as the catalog did not have are; gives how many.
pub(super) fn leave_out_void(conn: &Connection) -> Result<u64> {
    let statements = "
        CREATE TABLE scratch.void AS SELECT number FROM scratch.at a WHERE is_new
            AND NOT EXISTS (SELECT 1 FROM scratch.copies c WHERE c.form = a.form AND is_there)
            AND NOT EXISTS (SELECT 1 FROM uses WHERE block = a.number);
        DELETE FROM block_copies WHERE block IN (SELECT number FROM scratch.void);
        DELETE FROM blocks WHERE number IN (SELECT number FROM scratch.void);
        DELETE FROM scratch.at WHERE number IN (SELECT number FROM scratch.void);";
    conn.execute_batch(statements).map_err(sql)?;
    conn.query_row("SELECT count(*) FROM scratch.void", [], |row| row.get(0)).map_err(sql)
}

/// The chunks of the blocks that were found: of one that is in two, the last is the one of the
/// highest number.
pub(super) const FOUND_CHUNKS: &str = "SELECT c.id, a.number, c.at, c.len FROM scratch.chunks c \
                                       JOIN scratch.at a ON a.form = c.form \
                                       ORDER BY c.id, a.number, c.at";

/// Puts the chunks into the catalog.
pub(super) fn put_chunks(conn: &Connection) -> Result<()> {
    leave_out_void(conn)?;
    let query = format!("INSERT OR REPLACE INTO chunks (id, block, at, len) {FOUND_CHUNKS}");
    conn.execute_batch(&query).map_err(sql)
}
