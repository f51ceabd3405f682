//! Sums over the catalog: what is stored, and in how many pieces.
//!
//! What runs and blocks say of themselves is added up; entries, chunks and versions are counted by
//! the pages of their smallest tree, and not looked at.

use super::read::Reader;
use super::sql;
use crate::error::Result;

/// Sums over the whole catalog.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Number of blocks.
    pub blocks: u64,
    /// Bytes of different content in them, before compression.
    pub plain_bytes: u64,
    /// Bytes that they take.
    pub stored_bytes: u64,
    /// Number of different chunks.
    pub chunks: u64,
    /// States of files, and of other entries that have more than metadata.
    pub versions: u64,
    /// Rows of the tree: names with the range of runs in which they are the same.
    pub entries: u64,
    /// Bytes of the catalog's database.
    pub catalog_bytes: u64,
}

impl Reader {
    /// Sums over the whole catalog.
    pub fn stats(&self) -> Result<Stats> {
        let number = |query: &str| self.conn().query_row(query, [], |row| row.get(0)).map_err(sql);
        let pragma = |name: &str| {
            let value = self.conn().pragma_query_value(None, name, |row| row.get::<_, u64>(0));
            value.map_err(sql)
        };
        Ok(Stats {
            blocks: number("SELECT count(*) FROM blocks")?,
            plain_bytes: number("SELECT coalesce(sum(plain_len), 0) FROM blocks")?,
            stored_bytes: number("SELECT coalesce(sum(stored_len), 0) FROM blocks")?,
            chunks: number("SELECT count(*) FROM chunks")?,
            versions: number("SELECT count(*) FROM versions")?,
            entries: number("SELECT count(*) FROM entries")?,
            catalog_bytes: pragma("page_count")? * pragma("page_size")?,
        })
    }
}
