//! Blocks that files name and of which nothing else was found: what their bytes say of them.
//!
//! What is learned so counts only as long as the files that it makes have their hashes; what does
//! not is forgotten again, and the block is one that is lacking, as it was.

use rusqlite::OptionalExtension;

use super::{NO_FRAMES, Rebuild};
use crate::catalog::meta_read::unknown_blocks;
use crate::catalog::read::{content_columns, content_from};
use crate::catalog::{Content, VersionId, sql};
use crate::chunk::Digest;
use crate::chunk::frame::{Frame, get_frames, put_frames};
use crate::error::Result;
use crate::volume::{BlockId, BlockIndex};
use crate::wire::Reader as WireReader;

impl Rebuild {
    /// Blocks that are used and of which nothing is known but the name: numbers and names, at most
    /// `limit` of them, from the first number greater than `after`.
    pub fn unknown_blocks(&self, after: u64, limit: u64) -> Result<Vec<(u64, BlockId)>> {
        unknown_blocks(&self.conn, after, limit)
    }

    /// At most `limit` versions that use a block, from the first greater than `after`.
    pub fn users_of(&self, block: u64, after: VersionId, limit: u64) -> Result<Vec<VersionId>> {
        let query = "SELECT version FROM uses WHERE block = ?1 AND version > ?2 \
                     ORDER BY version LIMIT ?3";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let rows = statement.query_map((block, after, limit), |row| row.get(0)).map_err(sql)?;
        rows.collect::<rusqlite::Result<_>>().map_err(sql)
    }

    /// The content of a version.
    pub fn content_of(&self, version: VersionId) -> Result<Content> {
        let query = "SELECT hash, extents, extra FROM versions WHERE version = ?1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let found = statement.query_row([version], content_columns).optional().map_err(sql)?;
        found.map_or_else(|| Ok(Content::default()), content_from)
    }

    /// Name, frames and volumes of a block; no frames where nothing is known of it.
    pub fn block(&self, number: u64) -> Result<(BlockId, Vec<Frame>, Vec<i64>)> {
        let query = "SELECT id, frames FROM blocks WHERE number = ?1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let row = statement.query_row([number], |row| Ok((row.get(0)?, row.get(1)?)));
        let (id, frames): (Vec<u8>, Vec<u8>) = row.map_err(sql)?;
        let mut reader = WireReader::new(&frames, "frame table");
        let frames = get_frames(&mut reader)?;
        let query = "SELECT volume FROM block_copies WHERE block = ?1 ORDER BY volume";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let volumes = statement.query_map([number], |row| row.get(0)).map_err(sql)?;
        let volumes = volumes.collect::<rusqlite::Result<_>>().map_err(sql)?;
        Ok((Digest::from_slice(&id)?, frames, volumes))
    }

    /// Takes in what a block's bytes say, and the volumes that have it.
    pub fn learn(&self, number: u64, index: &BlockIndex, volumes: &[i64]) -> Result<()> {
        let mut frames = Vec::new();
        put_frames(&mut frames, &index.frames);
        let query = "UPDATE blocks SET stored_len = ?2, plain_len = ?3, frames = ?4 \
                     WHERE number = ?1";
        let row = (number, index.stored_len(), index.plain_len(), frames);
        self.conn.prepare_cached(query).map_err(sql)?.execute(row).map_err(sql)?;
        for volume in volumes {
            let query = "INSERT OR REPLACE INTO block_copies (block, volume, record_at) \
                         VALUES (?1, ?2, ?3)";
            // Until it has a record; whoever asks for it is told so.
            self.conn.execute(query, (number, volume, i64::MAX)).map_err(sql)?;
        }
        Ok(())
    }

    /// Forgets what was learned of a block.
    pub fn unlearn(&self, number: u64, plain_len: u64) -> Result<()> {
        let query = "UPDATE blocks SET stored_len = 1, plain_len = ?2, frames = ?3 \
                     WHERE number = ?1";
        self.conn.execute(query, (number, plain_len.max(1), &NO_FRAMES[..])).map_err(sql)?;
        self.conn.execute("DELETE FROM block_copies WHERE block = ?1", [number]).map_err(sql)?;
        Ok(())
    }

    /// Notes where the record of what was learned is, and the chunks that it says.
    pub fn put_learned(
        &self,
        number: u64,
        index: &BlockIndex,
        (volume, record_at): (i64, u64),
    ) -> Result<()> {
        let query = "UPDATE block_copies SET record_at = ?3 WHERE block = ?1 AND volume = ?2";
        self.conn.execute(query, (number, volume, record_at)).map_err(sql)?;
        let query = "INSERT INTO chunks (id, block, at, len) VALUES (?1, ?2, ?3, ?4) \
                     ON CONFLICT (id) DO NOTHING";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        for (at, chunk) in index.placed_chunks() {
            statement.execute((&chunk.id.0[..], number, at, chunk.len)).map_err(sql)?;
        }
        Ok(())
    }

    /// Notes how far a volume's index goes.
    pub fn put_index_len(&self, volume: i64, len: u64) -> Result<()> {
        let query = "UPDATE volumes SET index_len = ?2 WHERE number = ?1";
        self.conn.execute(query, (volume, len)).map_err(sql)?;
        Ok(())
    }
}
