//! What is known of tapes, made anew beside what is there, and put in its place.
//!
//! Invariant: whoever has the old one open goes on to read it whole, and then the new one. So it is
//! one transaction in the file that is there; only a damaged file is replaced, and put aside.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::super::{beside, sql};
use super::{TAPES, Tape, Tapes, explain};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, quoted};

/// What follows the name of one that is being made.
const NEW: &str = ".new";

/// What was said of tapes, and found out by reading them: it holds of those that are the same, and
/// so does what was noted of files of them that nothing is said of anew, for a tape is only ever
/// added to. What is on tapes in `kept` stays as it is.
const TAKE_OVER: &str = "
CREATE TEMP TABLE last AS SELECT coalesce(max(number), 0) AS file FROM new.tape_files;
INSERT INTO new.tape_files (tape, filenum, position, bytes, job, batch, ended_s)
    SELECT n.number, f.filenum, f.position, f.bytes, f.job, f.batch, f.ended_s
    FROM main.tape_files f JOIN main.tapes t ON t.number = f.tape
    JOIN new.tapes n ON n.label = t.label AND n.hash = t.hash
    WHERE NOT EXISTS (
        SELECT 1 FROM new.tape_files nf WHERE nf.tape = n.number AND nf.filenum = f.filenum);
INSERT INTO new.members (tape_file, at, len, block, name, digest)
    SELECT nf.number, m.at, m.len, m.block, m.name, m.digest
    FROM new.tape_files nf JOIN new.tapes n ON n.number = nf.tape
    JOIN main.tapes t ON t.label = n.label
    JOIN main.tape_files f ON f.tape = t.number AND f.filenum = nf.filenum
    JOIN main.members m ON m.tape_file = f.number
    WHERE nf.number > (SELECT file FROM temp.last);
UPDATE new.tapes AS n SET is_lost = 1 WHERE EXISTS (
    SELECT 1 FROM main.tapes t WHERE t.label = n.label AND t.hash = n.hash AND t.is_lost);
UPDATE new.tape_files AS n SET verified_s = (
    SELECT f.verified_s FROM main.tape_files f JOIN main.tapes t ON t.number = f.tape
    JOIN new.tapes nt ON nt.label = t.label AND nt.hash = t.hash
    WHERE nt.number = n.tape AND f.filenum = n.filenum AND f.job = n.job AND f.batch = n.batch);
UPDATE new.members AS n SET is_bad = 1 WHERE EXISTS (
    SELECT 1 FROM new.tape_files nf JOIN new.tapes nt ON nt.number = nf.tape
    JOIN main.tapes t ON t.label = nt.label AND t.hash = nt.hash
    JOIN main.tape_files f ON f.tape = t.number AND f.filenum = nf.filenum
        AND f.job = nf.job AND f.batch = nf.batch
    JOIN main.members m ON m.tape_file = f.number
    WHERE nf.number = n.tape_file AND m.at = n.at AND m.is_bad);
DELETE FROM main.members WHERE tape_file IN (
    SELECT f.number FROM main.tape_files f JOIN main.tapes t ON t.number = f.tape
    WHERE t.label NOT IN (SELECT label FROM temp.kept));
DELETE FROM main.tape_files WHERE tape IN (
    SELECT number FROM main.tapes WHERE label NOT IN (SELECT label FROM temp.kept));
DELETE FROM main.tapes WHERE label NOT IN (SELECT label FROM temp.kept);
CREATE TEMP TABLE first AS SELECT
    (SELECT coalesce(max(number), 0) FROM main.tapes) AS tape,
    (SELECT coalesce(max(number), 0) FROM main.tape_files) AS file;
INSERT INTO main.tapes (number, label, hash, pool, block_bytes, is_lost)
    SELECT number + (SELECT tape FROM temp.first), label, hash, pool, block_bytes, is_lost
    FROM new.tapes;
INSERT INTO main.tape_files
    (number, tape, filenum, position, bytes, job, batch, ended_s, verified_s)
    SELECT number + (SELECT file FROM temp.first), tape + (SELECT tape FROM temp.first),
        filenum, position, bytes, job, batch, ended_s, verified_s
    FROM new.tape_files;
INSERT INTO main.members (tape_file, at, len, block, name, digest, is_bad)
    SELECT tape_file + (SELECT file FROM temp.first), at, len, block, name, digest, is_bad
    FROM new.members;
";

fn with(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(OsStr::new(suffix));
    PathBuf::from(name)
}

/// Removes a database that nobody has open.
fn remove(path: &Path) -> Result<()> {
    for suffix in ["", "-wal", "-shm"] {
        let path = with(path, suffix);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("removing {}", quoted(&path)), e));
            }
            _ => {}
        }
    }
    Ok(())
}

impl Tapes {
    /// An empty one, beside the one of the catalog at `catalog`: see [`Tapes::replace`]. One that
    /// was being made before is gone.
    pub fn anew(catalog: &Path) -> Result<Tapes> {
        let path = with(&TAPES.path(catalog), NEW);
        remove(&path)?;
        let conn = TAPES.open(&path, &|_| Ok(())).map_err(|e| explain(e, &path))?;
        Ok(Tapes { conn, path })
    }

    /// Puts this, which was made by [`Tapes::anew`], in the place of what is known of the tapes of
    /// the catalog at `catalog`. What was known of tapes of which this knows nothing is kept, if
    /// they are not `gone`; gives their number. Which tapes are lost, and what reading them has
    /// told, stays too.
    pub fn replace(self, catalog: &Path, is_gone: &dyn Fn(&Tape) -> Result<bool>) -> Result<u64> {
        let Tapes { conn, path: new } = self;
        conn.close().map_err(|(_, e)| sql(e))?;
        let taken = Tapes::open(catalog).and_then(|mut old| old.take_over(&new, is_gone));
        match taken {
            Ok(kept) => {
                remove(&new)?;
                Ok(kept)
            }
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                let path = TAPES.path(catalog);
                let failed = |e| Error::io(format!("replacing {}", quoted(&path)), e);
                let aside = beside::set_aside(&path).map_err(|e| e.context(quoted(&path)))?;
                log::warn!("{e}; it is {} now", quoted(&aside));
                std::fs::File::open(&new).and_then(|it| it.sync_all()).map_err(failed)?;
                sys::rename_durable(&new, &path)?;
                Ok(0)
            }
            Err(e) => Err(e),
        }
    }

    fn take_over(&mut self, new: &Path, is_gone: &dyn Fn(&Tape) -> Result<bool>) -> Result<u64> {
        let mut left = Vec::new();
        for it in self.tapes()? {
            if !is_gone(&it.tape)? {
                left.push(it.tape.label);
            }
        }
        self.take_over_but(new, &left).map_err(|e| explain(e, &self.path))
    }

    fn take_over_but(&mut self, new: &Path, left: &[Vec<u8>]) -> Result<u64> {
        let conn: &mut Connection = &mut self.conn;
        conn.execute("ATTACH ?1 AS new", [new.as_os_str().as_bytes()]).map_err(sql)?;
        let tx = conn.transaction().map_err(sql)?;
        tx.execute_batch("CREATE TEMP TABLE kept (label BLOB)").map_err(sql)?;
        let mut kept = 0;
        for label in left {
            let query = "INSERT INTO temp.kept SELECT ?1 \
                         WHERE NOT EXISTS (SELECT 1 FROM new.tapes WHERE label = ?1)";
            kept += tx.execute(query, [label]).map_err(sql)? as u64;
        }
        tx.execute_batch(TAKE_OVER).map_err(sql)?;
        tx.commit().map_err(sql)?;
        let tables = "DROP TABLE temp.kept; DROP TABLE temp.first; DROP TABLE temp.last";
        conn.execute_batch(&format!("{tables}; DETACH new")).map_err(sql)?;
        Ok(kept)
    }
}
