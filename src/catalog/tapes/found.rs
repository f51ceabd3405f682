//! What reading tapes has found: which copies are bad.
//!
//! Invariant: a copy that was found bad counts no more until it was read again and was right. Of
//! metas only bad ones are noted: a good one is wherever its block is.

use rusqlite::OptionalExtension;

use super::super::{meta, sql};
use super::{NAMED_MAX, Place, Tapes};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::Time;
use crate::volume::BlockId;

/// The names of metas begin with this, and sort before that.
const METAS: [&[u8]; 2] = [b"meta/", b"meta0"];

impl Tapes {
    /// Notes that the members of a tape file were read at `now`, and which of them were not right:
    /// the others are. `metas` are those of metas, with their places and blocks. Unless `is_whole`,
    /// nothing is said of other metas.
    pub fn note_read(
        &mut self,
        (label, filenum): (&[u8], u64),
        (bad, metas): (&[u64], &[(u64, BlockId)]),
        is_whole: bool,
        now: Time,
    ) -> Result<()> {
        let tx = self.conn.transaction().map_err(sql)?;
        let query = "SELECT f.number FROM tape_files f JOIN tapes t ON t.number = f.tape \
                     WHERE t.label = ?1 AND f.filenum = ?2";
        let number = tx.query_row(query, (label, filenum), |row| row.get::<_, i64>(0));
        let number = number.optional().map_err(sql)?.ok_or_else(|| {
            let message = format!("tape {}: file {filenum} is not known", Quoted(label));
            Error::new(ErrorKind::NotFound, message)
        })?;
        let is_right = is_whole && bad.is_empty() && metas.is_empty();
        let query = "UPDATE tape_files SET verified_s = ?2 WHERE number = ?1";
        tx.execute(query, (number, is_right.then_some(now.secs))).map_err(sql)?;
        let [from, to] = METAS;
        if is_whole {
            let query = "DELETE FROM members WHERE tape_file = ?1 AND name >= ?2 AND name < ?3";
            tx.execute(query, (number, from, to)).map_err(sql)?;
        }
        let query = "UPDATE members SET is_bad = 0 WHERE tape_file = ?1 \
                     AND (name IS NULL OR name < ?2 OR name >= ?3)";
        tx.execute(query, (number, from, to)).map_err(sql)?;
        for at in bad {
            let query = "UPDATE members SET is_bad = 1 WHERE tape_file = ?1 AND at = ?2";
            tx.execute(query, (number, at)).map_err(sql)?;
        }
        for (at, block) in metas {
            let query = "INSERT OR REPLACE INTO members (tape_file, at, len, name, digest, is_bad) \
                         VALUES (?1, ?2, 0, ?3, zeroblob(32), 1)";
            let name = meta::document_name(block).into_bytes();
            tx.execute(query, (number, at, name)).map_err(sql)?;
        }
        tx.commit().map_err(sql)
    }

    /// Notes that a member, whose content begins at `at`, was not right when it was read.
    pub fn note_bad(&mut self, (label, filenum): (&[u8], u64), at: u64) -> Result<()> {
        let query = "UPDATE members SET is_bad = 1 WHERE at = ?3 AND tape_file = \
                     (SELECT f.number FROM tape_files f JOIN tapes t ON t.number = f.tape \
                      WHERE t.label = ?1 AND f.filenum = ?2)";
        self.conn.execute(query, (label, filenum, at)).map_err(|e| self.fail(e))?;
        Ok(())
    }

    /// Where the good copies of a block are that can be made a store of again, by label and tape
    /// file: not those of a job whose meta of it was found bad.
    pub fn places_with_meta(&self, block: &BlockId) -> Result<Vec<Place>> {
        let condition = "m.block = ?1 AND NOT EXISTS (SELECT 1 FROM members d \
                         JOIN tape_files o ON o.number = d.tape_file \
                         WHERE d.name = ?2 AND d.is_bad AND o.job = f.job)";
        let name = meta::document_name(block).into_bytes();
        self.places_where(condition, (block.0, name))
    }

    /// The labels of the tapes that have a block, good or bad, if they are not lost.
    pub fn labels_with(&self, block: &BlockId) -> Result<Vec<Vec<u8>>> {
        self.labels_where("m.block = ?1", [block.0])
    }

    /// The labels of the tapes that have a document of this name, good or bad, if they are not
    /// lost.
    pub fn labels_with_document(&self, name: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.labels_where("m.name = ?1", [name])
    }

    /// The first of the tapes on which this block was found bad.
    pub fn labels_bad(&self, block: &BlockId) -> Result<Vec<Vec<u8>>> {
        let mut labels = self.labels_where("m.is_bad AND m.block = ?1", [block.0])?;
        labels.truncate(NAMED_MAX);
        Ok(labels)
    }

    fn labels_where(&self, condition: &str, values: impl rusqlite::Params) -> Result<Vec<Vec<u8>>> {
        let query = format!(
            "SELECT DISTINCT t.label FROM members m JOIN tape_files f ON f.number = m.tape_file \
             JOIN tapes t ON t.number = f.tape WHERE NOT t.is_lost AND {condition} ORDER BY t.label"
        );
        let mut statement = self.conn.prepare_cached(&query).map_err(sql)?;
        let rows = statement.query_map(values, |row| row.get(0)).map_err(sql)?;
        rows.collect::<rusqlite::Result<_>>().map_err(|e| self.fail(e))
    }
}
