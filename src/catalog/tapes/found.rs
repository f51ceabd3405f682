//! What reading tapes has found: which copies are bad.
//!
//! Invariant: a copy that was found bad counts no more until it was read again and was right. Of
//! metas only bad ones are noted: a good one is wherever its block is.

use rusqlite::OptionalExtension;

use super::super::{meta, sql};
use super::{NAMED_MAX, Tapes};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::Time;
use crate::volume::BlockId;

/// The names of metas begin with this, and sort before that.
const METAS: [&[u8]; 2] = [b"meta/", b"meta0"];

impl Tapes {
    /// Notes that a tape file was read whole at `now`, and which of its members were not right: the
    /// others are. `metas` are those of metas, with their places and blocks.
    pub fn note_read(
        &mut self,
        (label, filenum): (&[u8], u64),
        bad: &[u64],
        metas: &[(u64, BlockId)],
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
        let verified = Some(now.secs).filter(|_| bad.is_empty() && metas.is_empty());
        let query = "UPDATE tape_files SET verified_s = ?2 WHERE number = ?1";
        tx.execute(query, (number, verified)).map_err(sql)?;
        let query = "DELETE FROM members WHERE tape_file = ?1 AND name >= ?2 AND name < ?3";
        let [from, to] = METAS;
        tx.execute(query, (number, from, to)).map_err(sql)?;
        tx.execute("UPDATE members SET is_bad = 0 WHERE tape_file = ?1", [number]).map_err(sql)?;
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

    /// On how many tapes the meta of a block was found bad: each has a copy of the block less that
    /// can be made a store of again.
    pub fn bad_metas(&self, block: &BlockId) -> Result<u64> {
        let query = "SELECT count(DISTINCT t.number) FROM members m \
                     JOIN tape_files f ON f.number = m.tape_file JOIN tapes t ON t.number = f.tape \
                     WHERE m.name = ?1 AND m.is_bad AND NOT t.is_lost";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let name = meta::document_name(block).into_bytes();
        statement.query_row([name], |row| row.get(0)).map_err(|e| self.fail(e))
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
