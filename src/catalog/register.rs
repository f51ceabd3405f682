//! A catalog that is there and doubted, held against what was read of its volumes.
//!
//! What is read is noted in a file beside it. The catalog is changed in one transaction, in which
//! rows of blocks and chunks are added and corrected, and none goes because a block has vanished;
//! runs, entries and versions are not touched. An index that has to be written anew is doubted
//! first, so that whoever comes after a kill reads it from its beginning. A trial changes a copy,
//! and the catalog itself, with its log, stays as it is.

use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::copy::copy_to;
use super::numbers;
use super::read::Reader;
use super::replay::known::{put_chunks, put_volumes, settle};
use super::replay::place::{built_path, scratch_path};
use super::replay::scratch::attach;
use super::replay::{Changed, Found};
use super::sql;
use super::write::{WriteLock, Writer};
use crate::chunk::Digest;
use crate::error::Result;
use crate::volume::{BlockId, VolumeConfig};

/// A catalog that is being held against its volumes. Has the writer's lock.
pub struct Register {
    writer: Writer,
    /// The catalog itself, for whoever asks for runs and files.
    reader: Reader,
    /// Files that go with this.
    beside: [PathBuf; 2],
}

/// What came of a volume's copies.
#[derive(Clone, Copy, Debug, Default)]
pub struct CopiesOf {
    /// Copies that the catalog did not have.
    pub added: u64,
    /// Copies that it has, and whose file is not there with its whole length.
    pub missing: u64,
    /// Files of blocks of which neither it nor the volume knows what is inside.
    pub surplus: u64,
}

impl Register {
    /// Takes the right to write the catalog, and begins to note what is found. With `is_trial` the
    /// catalog stays as it is, and a copy of it is changed that goes with this; `check` is asked
    /// while it is made.
    pub fn open(
        catalog: &Path,
        is_trial: bool,
        check: &dyn Fn() -> Result<()>,
    ) -> Result<Register> {
        let beside = [scratch_path(catalog), built_path(catalog)];
        let (writer, reader) = match is_trial {
            false => {
                let writer = Writer::open(catalog)?;
                clear(&beside);
                (writer, Reader::open(catalog)?)
            }
            true => {
                let reader = Reader::open_untouched(catalog)?;
                let lock = WriteLock::take(catalog)?;
                clear(&beside);
                let [_, copy] = &beside;
                let writer = copy_to(&reader, copy, check)
                    .and_then(|()| Writer::on_copy(lock, copy))
                    .inspect_err(|_| clear(&beside))?;
                (writer, reader)
            }
        };
        let register = Register { writer, reader, beside };
        let conn = register.conn();
        // It may be wrong in this already; what is added is looked up.
        conn.pragma_update(None, "foreign_keys", "OFF").map_err(sql)?;
        let [scratch, _] = &register.beside;
        attach(conn, scratch)?;
        let statement = "CREATE TABLE scratch.read (volume INTEGER PRIMARY KEY)";
        conn.execute_batch(statement).map_err(sql)?;
        conn.execute_batch("BEGIN").map_err(sql)?;
        Ok(register)
    }

    fn conn(&self) -> &Connection {
        self.writer.conn()
    }

    /// The catalog's one writer.
    pub fn writer(&self) -> &Writer {
        &self.writer
    }

    /// The catalog as it was committed last.
    pub fn reader(&self) -> &Reader {
        &self.reader
    }

    /// What was found of blocks.
    pub fn found(&self) -> Found<'_> {
        Found::new(self.conn())
    }

    /// Ends the reading. The indexes of these volumes are to be written anew: until that is done,
    /// whoever comes reads them from their beginnings.
    pub fn doubt(&mut self, volumes: &[i64]) -> Result<()> {
        self.conn().execute_batch("COMMIT").map_err(sql)?;
        volumes.iter().try_for_each(|it| self.writer.doubt_index(*it))
    }

    /// Changes the catalog to what was found. `volumes` are all that there are, each with when it
    /// was made and how far its index has been read, where that is known.
    ///
    /// `look` is called when all is changed and before that counts; with `is_trial` it never does.
    pub fn change(
        &mut self,
        volumes: &[(VolumeConfig, Option<i64>, Option<u64>)],
        is_trial: bool,
        look: impl FnOnce(&Register, &Changed) -> Result<()>,
    ) -> Result<()> {
        self.conn().execute_batch("BEGIN IMMEDIATE").map_err(sql)?;
        let mut changed = Changed::default();
        let work = || -> Result<()> {
            let conn = self.conn();
            let before = "CREATE TABLE scratch.before AS SELECT block, volume FROM block_copies; \
                          CREATE INDEX scratch.before_index ON before (volume, block)";
            conn.execute_batch(before).map_err(sql)?;
            put_volumes(conn, volumes)?;
            settle(conn, &mut changed)?;
            put_chunks(conn, &mut changed)?;
            numbers::keep(conn)?;
            look(self, &changed)
        };
        match work() {
            Ok(()) if !is_trial => self.conn().execute_batch("COMMIT").map_err(sql),
            result => {
                // The first error is the one to tell; SQLite rolls back by itself if this fails.
                let _ = self.conn().execute_batch("ROLLBACK");
                result
            }
        }
    }

    /// What became of the copies on a volume that was read.
    pub fn copies_of(&self, volume: i64) -> Result<CopiesOf> {
        let count = |query: &str| -> Result<u64> {
            self.conn().query_row(query, [volume], |row| row.get(0)).map_err(sql)
        };
        Ok(CopiesOf {
            added: count(
                "SELECT count(*) FROM block_copies c WHERE volume = ?1 AND NOT EXISTS \
                 (SELECT 1 FROM scratch.before b WHERE b.volume = ?1 AND b.block = c.block)",
            )?,
            missing: count(&format!("SELECT count(*) {MISSING}"))?,
            surplus: count(
                "SELECT count(*) FROM scratch.files s WHERE volume = ?1 AND NOT EXISTS \
                 (SELECT 1 FROM blocks b JOIN block_copies c ON c.block = b.number \
                  WHERE b.id = s.id AND c.volume = ?1)",
            )?,
        })
    }

    /// At most `limit` blocks that a volume that was read should have and has not, by number from
    /// the first after `after`; of each whether another volume that was read has it, or one that
    /// was not is said to.
    pub fn missing_on(
        &self,
        volume: i64,
        after: u64,
        limit: u64,
    ) -> Result<Vec<(u64, BlockId, bool)>> {
        let query = format!(
            "SELECT b.number, b.id, EXISTS (SELECT 1 FROM scratch.files s \
                 WHERE s.id = b.id AND s.len = b.stored_len) \
             OR EXISTS (SELECT 1 FROM block_copies o WHERE o.block = b.number \
                 AND o.volume NOT IN (SELECT volume FROM scratch.read)) \
             {MISSING} AND b.number > ?2 ORDER BY b.number LIMIT ?3"
        );
        let mut statement = self.conn().prepare_cached(&query).map_err(sql)?;
        let mut rows = statement.query((volume, after, limit)).map_err(sql)?;
        let mut found = Vec::new();
        while let Some(row) = rows.next().map_err(sql)? {
            let id: Vec<u8> = row.get(1).map_err(sql)?;
            let id = Digest::from_slice(&id)?;
            found.push((row.get(0).map_err(sql)?, id, row.get(2).map_err(sql)?));
        }
        Ok(found)
    }

    /// Notes that all files of a volume are noted.
    pub fn put_read(&self, volume: i64) -> Result<()> {
        let query = "INSERT OR IGNORE INTO scratch.read VALUES (?1)";
        self.conn().execute(query, [volume]).map_err(sql)?;
        Ok(())
    }
}

fn clear(beside: &[PathBuf; 2]) {
    for path in beside {
        for suffix in ["", "-journal", "-wal", "-shm"] {
            let mut name = path.clone().into_os_string();
            name.push(suffix);
            // Overwritten by the next one; one that cannot be made says so.
            let _ = std::fs::remove_file(name);
        }
    }
}

/// The copies of blocks that a volume should have, and has no file of.
const MISSING: &str = "FROM block_copies c JOIN blocks b ON b.number = c.block \
                       WHERE c.volume = ?1 AND NOT EXISTS (SELECT 1 FROM scratch.files s \
                       WHERE s.volume = ?1 AND s.id = b.id AND s.len = b.stored_len)";

impl Drop for Register {
    fn drop(&mut self) {
        clear(&self.beside);
    }
}
