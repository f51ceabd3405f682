//! What is on tapes: which blocks and documents, in which tape file, and where in it. A small
//! database beside the catalog.
//!
//! Not in the catalog: an archive takes hours, and must not keep its one writer from anybody. A
//! tape file is noted when it is durable on its tape, as a whole or not at all, and again as often
//! as somebody reads it. So this never says of a tape what it does not hold; what it does not say,
//! the spool's results and the tapes themselves do, and it can be made anew from either. The format
//! is in FORMAT.md.

mod anew;
mod cover;
mod found;

use std::path::{Path, PathBuf};

pub use cover::{Cover, OfTape, Piece};

use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension, Row, Transaction};

use super::beside::Beside;
use super::sql;
use crate::chunk::Digest;
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::{self, Time, quoted};
use crate::volume::BlockId;

/// What the file is: marked "RTTP".
const TAPES: Beside = Beside {
    suffix: ".tapes",
    application_id: 0x5254_5450,
    version: 1,
    script: include_str!("tapes.sql"),
    cache_kib: 2048,
};

/// Longest label, and longest name of a document, in bytes.
const LABEL_BYTES_MAX: usize = 1024;
const NAME_BYTES_MAX: usize = 4096;

/// Places of a block that are named.
const NAMED_MAX: usize = 4;

/// A copy counts if its tape is not lost, and nothing is known to be wrong with it.
pub(super) const GOOD: &str = "members m JOIN tape_files f ON f.number = m.tape_file \
                    JOIN tapes t ON t.number = f.tape WHERE NOT m.is_bad AND NOT t.is_lost";

/// A tape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tape {
    /// Its label.
    pub label: Vec<u8>,
    /// SHA-256 of its label block: tells two tapes of one label apart.
    pub hash: [u8; 32],
    /// The pool that it belongs to.
    pub pool: String,
    /// Length of its blocks, in bytes.
    pub block_bytes: u32,
}

/// A tape, and how much is known to be on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownTape {
    /// The tape.
    pub tape: Tape,
    /// Whether somebody has said that it is gone: then nothing on it counts.
    pub is_lost: bool,
    /// Tape files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blocks of catalogs.
    pub blocks: u64,
    /// Members that were found bad.
    pub bad: u64,
}

/// An archive on a tape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapeFile {
    /// Its number on the tape; the label is 0.
    pub filenum: u64,
    /// Logical position of its first block.
    pub position: u64,
    /// Its length in bytes, padding included.
    pub bytes: u64,
    /// The job that wrote it.
    pub job: String,
    /// The number of the batch in that job.
    pub batch: u64,
    /// When it was complete.
    pub ended: Time,
    /// When it was last read whole and found right.
    pub verified: Option<Time>,
}

/// What a member of an archive is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A block.
    Block(BlockId),
    /// A meta, a manifest, a copy of the catalog or a guide, by its name on a volume, with the
    /// BLAKE3 digest of its bytes.
    Document(Vec<u8>, Digest),
}

/// A member of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Where its content begins, in bytes from the beginning of the archive.
    pub at: u64,
    /// Length of its content, in bytes.
    pub len: u64,
    /// What it is.
    pub item: Item,
}

/// Where a copy of something is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Label of the tape.
    pub label: Vec<u8>,
    /// The tape's pool.
    pub pool: String,
    /// Length of the tape's blocks, in bytes.
    pub block_bytes: u32,
    /// Number of the tape file.
    pub filenum: u64,
    /// Logical position of its first block.
    pub position: u64,
    /// Where its content begins, in bytes from the beginning of the tape file.
    pub at: u64,
    /// Length of its content, in bytes.
    pub len: u64,
}

/// What is known of the tapes that hold parts of a catalog.
pub struct Tapes {
    conn: Connection,
    path: PathBuf,
}

/// A tape file that is being noted: nothing is kept unless it is finished.
pub struct Noting<'a> {
    tx: Transaction<'a>,
    number: i64,
}

impl Tapes {
    /// Opens what is beside the catalog at `catalog`, or makes it.
    pub fn open(catalog: &Path) -> Result<Tapes> {
        let path = TAPES.path(catalog);
        let conn = TAPES.open(&path, &|_| Ok(())).map_err(|e| explain(e, &path))?;
        Ok(Tapes { conn, path })
    }

    /// Opens it to read, if it is there; nothing is made.
    pub fn look(catalog: &Path) -> Result<Option<Tapes>> {
        let path = TAPES.path(catalog);
        if path.symlink_metadata().is_err() {
            return Ok(None);
        }
        let conn = TAPES.look(&path).map_err(|e| explain(e, &path))?;
        Ok(Some(Tapes { conn, path }))
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Notes a tape. One that is known already keeps its files, and stays lost if it is, and of
    /// its pool if the other is `any`. The same label on a tape with another block is refused, or
    /// if the one that was known is lost takes its place.
    pub fn put_tape(&mut self, tape: &Tape) -> Result<()> {
        if tape.label.is_empty() || tape.label.len() > LABEL_BYTES_MAX {
            return Err(Error::usage(format!("a label has 1 to {LABEL_BYTES_MAX} bytes")));
        }
        let other = self.tape(&tape.label)?.filter(|it| it.tape.hash != tape.hash);
        if let Some(other) = other {
            if other.is_lost {
                self.forget(&tape.label)?;
                return self.put_tape(tape);
            }
            let label = Quoted(&tape.label);
            let message = format!(
                "another tape was known by the label {label}: if that one is gone or was \
                 labelled anew, say so with tape forget {label}"
            );
            return Err(Error::new(ErrorKind::WrongTape, message));
        }
        let query = "INSERT INTO tapes (label, hash, pool, block_bytes) VALUES (?1, ?2, ?3, ?4) \
                     ON CONFLICT (label) DO UPDATE SET block_bytes = ?4, \
                     pool = CASE ?3 WHEN 'any' THEN pool ELSE ?3 END";
        let row = (&tape.label, &tape.hash, &tape.pool, tape.block_bytes);
        self.conn.execute(query, row).map_err(|e| self.fail(e))?;
        Ok(())
    }

    /// Whether this tape file of a job's batch is noted.
    pub fn has_file(&self, label: &[u8], filenum: u64, job: &str, batch: u64) -> Result<bool> {
        let query = "SELECT EXISTS (SELECT 1 FROM tape_files f JOIN tapes t ON t.number = f.tape \
                     WHERE t.label = ?1 AND f.filenum = ?2 AND f.job = ?3 AND f.batch = ?4)";
        let row = (label, filenum, job, batch);
        self.conn.query_row(query, row, |row| row.get(0)).map_err(|e| self.fail(e))
    }

    /// Begins to note a tape file of a tape that is known; what was noted of a file of that number
    /// is replaced.
    pub fn begin(&mut self, label: &[u8], file: &TapeFile) -> Result<Noting<'_>> {
        let tx = self.conn.transaction().map_err(sql)?;
        let query = "SELECT number FROM tapes WHERE label = ?1";
        let tape: Option<i64> =
            tx.query_row(query, [label], |it| it.get(0)).optional().map_err(sql)?;
        let tape = tape.ok_or_else(|| unknown(label))?;
        let old = "SELECT number FROM tape_files WHERE tape = ?1 AND filenum = ?2";
        let query = format!("DELETE FROM members WHERE tape_file IN ({old})");
        tx.execute(&query, (tape, file.filenum)).map_err(sql)?;
        let query = "DELETE FROM tape_files WHERE tape = ?1 AND filenum = ?2";
        tx.execute(query, (tape, file.filenum)).map_err(sql)?;
        let query = "INSERT INTO tape_files \
                     (tape, filenum, position, bytes, job, batch, ended_s, verified_s) \
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) RETURNING number";
        let verified = file.verified.map(|it| it.secs);
        let row = (
            tape,
            file.filenum,
            file.position,
            file.bytes,
            &file.job,
            file.batch,
            file.ended.secs,
            verified,
        );
        let number = tx.query_row(query, row, |it| it.get(0)).map_err(sql)?;
        Ok(Noting { tx, number })
    }

    /// On how many tapes of a pool, or of all, there is a good copy of a block.
    pub fn copies(&self, block: &BlockId, pool: Option<&str>) -> Result<u64> {
        let query = format!(
            "SELECT count(DISTINCT t.number) FROM {GOOD} AND m.block = ?1 \
             AND t.pool = coalesce(?2, t.pool)"
        );
        let mut statement = self.conn.prepare_cached(&query).map_err(sql)?;
        statement.query_row((block.0, pool), |row| row.get(0)).map_err(|e| self.fail(e))
    }

    /// Where the good copies of a document with these very bytes are, by label and tape file.
    pub fn places_of_document(&self, name: &[u8], digest: &Digest) -> Result<Vec<Place>> {
        self.places_where("m.name = ?1 AND m.digest = ?2", (name, digest.0))
    }

    /// Where the good copies of a block are, by label and tape file.
    pub fn places(&self, block: &BlockId) -> Result<Vec<Place>> {
        self.places_where("m.block = ?1", [block.0])
    }

    fn places_where(&self, condition: &str, values: impl rusqlite::Params) -> Result<Vec<Place>> {
        let query = format!(
            "SELECT t.label, t.pool, t.block_bytes, f.filenum, f.position, m.at, m.len \
             FROM {GOOD} AND {condition} ORDER BY t.label, f.filenum, m.at"
        );
        let mut statement = self.conn.prepare_cached(&query).map_err(sql)?;
        let rows = statement.query_map(values, place_from).map_err(sql)?;
        rows.collect::<rusqlite::Result<_>>().map_err(|e| self.fail(e))
    }

    /// The tapes that hold a block, as a person looks for them; `None` if none does.
    pub fn holding(&self, block: &BlockId) -> Result<Option<String>> {
        let places = self.places(block)?;
        let mut tapes: Vec<String> = Vec::new();
        for place in &places {
            let tape = format!("{} (file {})", Quoted(&place.label), place.filenum);
            tapes.push(tape);
        }
        let more = tapes.len().saturating_sub(NAMED_MAX);
        tapes.truncate(NAMED_MAX);
        let text = tapes.join(", ");
        Ok(match (places.is_empty(), more) {
            (true, _) => None,
            (false, 0) => Some(text),
            (false, more) => Some(format!("{text} and {more} more")),
        })
    }

    /// Where the good copies of documents are whose names begin with `prefix`, with the name of
    /// each.
    pub fn documents(
        &self,
        prefix: &[u8],
        each: &mut dyn FnMut(&[u8], Place) -> Result<()>,
    ) -> Result<()> {
        let query = format!(
            "SELECT t.label, t.pool, t.block_bytes, f.filenum, f.position, m.at, m.len, m.name \
             FROM {GOOD} AND m.name >= ?1 AND substr(m.name, 1, length(?1)) = ?1 \
             ORDER BY t.label, f.filenum, m.at"
        );
        let mut statement = self.conn.prepare_cached(&query).map_err(sql)?;
        let mut rows = statement.query([prefix]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(|e| self.fail(e))? {
            let name: Vec<u8> = row.get(7).map_err(sql)?;
            each(&name, place_from(row).map_err(sql)?)?;
        }
        Ok(())
    }

    /// The tape with this label.
    pub fn tape(&self, label: &[u8]) -> Result<Option<KnownTape>> {
        Ok(self.known(Some(label))?.pop())
    }

    /// All tapes, by label.
    pub fn tapes(&self) -> Result<Vec<KnownTape>> {
        self.known(None)
    }

    fn known(&self, label: Option<&[u8]>) -> Result<Vec<KnownTape>> {
        let query = "SELECT t.label, t.hash, t.pool, t.block_bytes, t.is_lost, \
                     (SELECT count(*) FROM tape_files WHERE tape = t.number), \
                     (SELECT coalesce(sum(bytes), 0) FROM tape_files WHERE tape = t.number), \
                     (SELECT count(m.block) FROM tape_files f JOIN members m \
                      ON m.tape_file = f.number WHERE f.tape = t.number), \
                     (SELECT count(*) FROM tape_files f JOIN members m \
                      ON m.tape_file = f.number WHERE f.tape = t.number AND m.is_bad) \
                     FROM tapes t WHERE t.label = coalesce(?1, t.label) ORDER BY t.label";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let rows = statement.query_map([label], |row| {
            let tape = Tape {
                label: row.get(0)?,
                hash: row.get(1)?,
                pool: row.get(2)?,
                block_bytes: row.get(3)?,
            };
            Ok(KnownTape {
                tape,
                is_lost: row.get(4)?,
                files: row.get(5)?,
                bytes: row.get(6)?,
                blocks: row.get(7)?,
                bad: row.get(8)?,
            })
        });
        rows.and_then(Iterator::collect).map_err(|e| self.fail(e))
    }

    /// The tape files of a tape, in order.
    pub fn files(&self, label: &[u8]) -> Result<Vec<TapeFile>> {
        let query = "SELECT filenum, position, bytes, job, batch, ended_s, verified_s \
                     FROM tape_files f JOIN tapes t ON t.number = f.tape WHERE t.label = ?1 \
                     ORDER BY filenum";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let seconds = |secs| Time { secs, nanos: 0 };
        let rows = statement.query_map([label], |row| {
            Ok(TapeFile {
                filenum: row.get(0)?,
                position: row.get(1)?,
                bytes: row.get(2)?,
                job: row.get(3)?,
                batch: row.get(4)?,
                ended: seconds(row.get(5)?),
                verified: row.get::<_, Option<i64>>(6)?.map(seconds),
            })
        });
        rows.and_then(Iterator::collect).map_err(|e| self.fail(e))
    }

    /// The members of a tape file, in their order on the tape.
    pub fn members(
        &self,
        (label, filenum): (&[u8], u64),
        each: &mut dyn FnMut(Member) -> Result<()>,
    ) -> Result<()> {
        let query = "SELECT m.at, m.len, m.block, m.name, m.digest FROM members m \
                     JOIN tape_files f ON f.number = m.tape_file JOIN tapes t ON t.number = f.tape \
                     WHERE t.label = ?1 AND f.filenum = ?2 ORDER BY m.at";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let mut rows = statement.query((label, filenum)).map_err(sql)?;
        while let Some(row) = rows.next().map_err(|e| self.fail(e))? {
            let block: Option<[u8; 32]> = row.get(2).map_err(|e| self.fail(e))?;
            let item = match block {
                Some(block) => Item::Block(Digest(block)),
                None => {
                    let name: Vec<u8> = row.get(3).map_err(|e| self.fail(e))?;
                    Item::Document(name, Digest(row.get(4).map_err(|e| self.fail(e))?))
                }
            };
            let (at, len) = (row.get(0).map_err(sql)?, row.get(1).map_err(sql)?);
            each(Member { at, len, item })?;
        }
        Ok(())
    }

    /// Says that a tape is gone, or is there again. Nothing on a lost tape counts.
    pub fn set_lost(&mut self, label: &[u8], is_lost: bool) -> Result<()> {
        let query = "UPDATE tapes SET is_lost = ?2 WHERE label = ?1";
        match self.conn.execute(query, (label, is_lost)).map_err(|e| self.fail(e))? {
            0 => Err(unknown(label)),
            _ => Ok(()),
        }
    }

    /// Forgets a tape file.
    pub fn forget_file(&mut self, label: &[u8], filenum: u64) -> Result<()> {
        let tx = self.conn.transaction().map_err(sql)?;
        let of = "SELECT f.number FROM tape_files f JOIN tapes t ON t.number = f.tape \
                  WHERE t.label = ?1 AND f.filenum = ?2";
        let queries = [("members", "tape_file"), ("tape_files", "number")];
        for query in queries.map(|it| format!("DELETE FROM {} WHERE {} IN ({of})", it.0, it.1)) {
            tx.execute(&query, (label, filenum)).map_err(sql)?;
        }
        tx.commit().map_err(sql)
    }

    /// Forgets a tape with all that was on it, because it is being written from its beginning.
    pub fn forget(&mut self, label: &[u8]) -> Result<()> {
        let tx = self.conn.transaction().map_err(sql)?;
        let of = "SELECT number FROM tapes WHERE label = ?1";
        for query in [
            format!(
                "DELETE FROM members WHERE tape_file IN \
                 (SELECT number FROM tape_files WHERE tape IN ({of}))"
            ),
            format!("DELETE FROM tape_files WHERE tape IN ({of})"),
            "DELETE FROM tapes WHERE label = ?1".to_owned(),
        ] {
            tx.execute(&query, [label]).map_err(sql)?;
        }
        tx.commit().map_err(sql)
    }

    fn fail(&self, error: rusqlite::Error) -> Error {
        explain(sql(error), &self.path)
    }
}

impl Noting<'_> {
    /// Notes a member.
    pub fn add(&mut self, member: &Member) -> Result<()> {
        let (block, name, digest) = match &member.item {
            Item::Block(id) => (Some(id.0), None, None),
            Item::Document(name, _) if name.is_empty() || name.len() > NAME_BYTES_MAX => {
                return Err(Error::corrupt("a document's name has no length that one can have"));
            }
            Item::Document(name, digest) => (None, Some(name), Some(digest.0)),
        };
        let query = "INSERT INTO members (tape_file, at, len, block, name, digest) \
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
        let mut statement = self.tx.prepare_cached(query).map_err(sql)?;
        let row = (self.number, member.at, member.len, block, name, digest);
        statement.execute(row).map_err(sql)?;
        Ok(())
    }

    /// Keeps it.
    pub fn finish(self) -> Result<()> {
        self.tx.commit().map_err(sql)
    }
}

/// Who looks on tapes for blocks that no disk gives him. The file stays open for the next block:
/// there may be many.
pub struct OnTape {
    catalog: PathBuf,
    /// And which file that is: there may be another by now. Taken out while it is asked.
    open: Mutex<Option<(Tapes, FileId)>>,
}

/// Device and inode number.
type FileId = (u64, u64);

impl OnTape {
    /// For the blocks of the catalog at `catalog`. Nothing is opened yet.
    pub fn new(catalog: &Path) -> OnTape {
        OnTape { catalog: catalog.to_path_buf(), open: Mutex::new(None) }
    }

    /// The error for a block of which no disk has a good copy, as `error` says: where a tape has
    /// one, it names the tapes.
    pub fn explain(&self, block: &BlockId, error: Error) -> Error {
        let is_lost = matches!(error.kind(), ErrorKind::Offline | ErrorKind::Corrupt);
        if !is_lost && error.kind() != ErrorKind::Io || error.is_shortage() {
            return error;
        }
        match self.holding(block) {
            Ok(Some(tapes)) => {
                let message = format!(
                    "block {block} is only on tape, on {tapes}: bring it back with raidtape tape \
                     recall; {error}"
                );
                Error::new(ErrorKind::OnTape, message)
            }
            Ok(None) => error,
            Err(e) => {
                log::warn!("whether block {block} is on tape is not known: {e}");
                error
            }
        }
    }

    fn holding(&self, block: &BlockId) -> Result<Option<String>> {
        let Ok(stat) = sys::lstat(&TAPES.path(&self.catalog)) else { return Ok(None) };
        let id = (stat.dev, stat.ino);
        let open = self.open.lock().take().filter(|it| it.1 == id).map(|it| it.0);
        let tapes = match open {
            Some(tapes) => tapes,
            None => match Tapes::look(&self.catalog)? {
                Some(tapes) => tapes,
                None => return Ok(None),
            },
        };
        let holding = tapes.holding(block)?;
        *self.open.lock() = Some((tapes, id));
        Ok(holding)
    }
}

fn unknown(label: &[u8]) -> Error {
    let message = format!("there is no tape {}: see raidtape tape list", Quoted(label));
    Error::new(ErrorKind::NotFound, message)
}

/// What is wrong with the file at `path`, and what to do.
fn explain(error: Error, path: &Path) -> Error {
    match error.kind() {
        ErrorKind::Corrupt => Error::corrupt(format!(
            "what is known of tapes, {}, is damaged ({error}): move it away, and make it anew \
             with raidtape tape index",
            quoted(path)
        )),
        _ => error.context(quoted(path)),
    }
}

/// A place of a row whose first columns are those of one.
fn place_from(row: &Row<'_>) -> rusqlite::Result<Place> {
    Ok(Place {
        label: row.get(0)?,
        pool: row.get(1)?,
        block_bytes: row.get(2)?,
        filenum: row.get(3)?,
        position: row.get(4)?,
        at: row.get(5)?,
        len: row.get(6)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> BlockId {
        Digest([n; 32])
    }

    fn tape(label: &[u8], pool: &str) -> Tape {
        let hash = [label[label.len() - 1]; 32];
        Tape { label: label.to_vec(), hash, pool: pool.to_owned(), block_bytes: 1 << 18 }
    }

    fn file(filenum: u64) -> TapeFile {
        TapeFile {
            filenum,
            position: filenum * 10,
            bytes: 1000 * filenum,
            job: "j".to_owned(),
            batch: filenum - 1,
            ended: Time { secs: 7, nanos: 0 },
            verified: None,
        }
    }

    fn block(at: u64, n: u8) -> Member {
        Member { at, len: 5, item: Item::Block(id(n)) }
    }

    fn put(tapes: &mut Tapes, label: &[u8], filenum: u64, members: &[Member]) {
        let mut noting = tapes.begin(label, &file(filenum)).unwrap();
        members.iter().for_each(|it| noting.add(it).unwrap());
        noting.finish().unwrap();
    }

    #[test]
    fn copies_are_counted_by_tapes_that_can_be_had() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("c");
        assert!(Tapes::look(&catalog).unwrap().is_none());
        let mut tapes = Tapes::open(&catalog).unwrap();
        for (label, pool) in [(&b"T0"[..], "full"), (b"T1", "full"), (b"T\xff", "incr")] {
            tapes.put_tape(&tape(label, pool)).unwrap();
            let manifest = Item::Document(b"manifests/run-1".to_vec(), id(9));
            let manifest = Member { at: 700, len: 3, item: manifest };
            put(&mut tapes, label, 1, &[block(100, 1), block(300, 2), manifest]);
        }
        // Twice on one tape is one copy.
        put(&mut tapes, b"T0", 2, &[block(50, 1)]);
        assert_eq!(tapes.copies(&id(1), None).unwrap(), 3);
        assert_eq!(tapes.copies(&id(1), Some("full")).unwrap(), 2);
        assert_eq!(tapes.copies(&id(3), None).unwrap(), 0);
        let documents = |digest| {
            let places = tapes.places_of_document(b"manifests/run-1", &id(digest)).unwrap();
            places.into_iter().map(|it| (it.label, it.pool)).collect::<Vec<_>>()
        };
        let expected = [(&b"T0"[..], "full"), (b"T1", "full"), (b"T\xff", "incr")];
        let expected = expected.map(|it| (it.0.to_vec(), it.1.to_owned()));
        assert_eq!((documents(9), documents(8)), (expected.to_vec(), Vec::new()));
        let places = |tapes: &Tapes, n| -> Vec<(Vec<u8>, u64, u64)> {
            let all = tapes.places(&id(n)).unwrap().into_iter();
            all.map(|it| (it.label, it.filenum, it.at)).collect()
        };
        let at = |label: &[u8], filenum, at| (label.to_vec(), filenum, at);
        let expected =
            [at(b"T0", 1, 100), at(b"T0", 2, 50), at(b"T1", 1, 100), at(b"T\xff", 1, 100)];
        assert_eq!(places(&tapes, 1), expected);
        tapes.note_read((b"T0", 1), (&[100], &[]), true, Time { secs: 9, nanos: 0 }).unwrap();
        tapes.set_lost(b"T1", true).unwrap();
        assert_eq!(places(&tapes, 1), [at(b"T0", 2, 50), at(b"T\xff", 1, 100)]);
        assert_eq!(tapes.copies(&id(2), Some("full")).unwrap(), 1);
        let known = tapes.tape(b"T0").unwrap().unwrap();
        assert_eq!((known.files, known.bytes, known.blocks, known.bad), (2, 3000, 3, 1));
        assert_eq!(tapes.files(b"T0").unwrap()[0].verified, None);
        // It was read again, and is right.
        tapes.note_read((b"T0", 1), (&[], &[]), true, Time { secs: 10, nanos: 0 }).unwrap();
        assert_eq!(tapes.files(b"T0").unwrap()[0].verified.unwrap().secs, 10);
        assert_eq!(tapes.copies(&id(1), Some("full")).unwrap(), 1);
        drop(tapes);
        let mut names = Vec::new();
        let tapes = Tapes::look(&catalog).unwrap().unwrap();
        let mut each = |name: &[u8], place: Place| {
            names.push((name.to_vec(), place.label));
            Ok(())
        };
        tapes.documents(b"manifests/", &mut each).unwrap();
        let name = b"manifests/run-1".to_vec();
        assert_eq!(names, [(name.clone(), b"T0".to_vec()), (name, b"T\xff".to_vec())]);
    }

    #[test]
    fn who_asks_often_keeps_it_open_and_sees_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("c");
        let on_tape = OnTape::new(&catalog);
        let ask = || on_tape.explain(&id(1), Error::corrupt("bad"));
        assert_eq!(ask().kind(), ErrorKind::Corrupt);
        for label in [b"T0", b"T1"] {
            // What was there is moved away, as somebody is told to do.
            let _ = std::fs::rename(TAPES.path(&catalog), dir.path().join("aside"));
            let mut tapes = Tapes::open(&catalog).unwrap();
            tapes.put_tape(&tape(label, "full")).unwrap();
            put(&mut tapes, label, 1, &[block(100, 1)]);
            drop(tapes);
            for _ in 0..3 {
                let error = ask();
                assert_eq!(error.kind(), ErrorKind::OnTape);
                let place = format!("on {} (file 1)", Quoted(label));
                assert!(error.to_string().contains(&place), "{error}");
                assert!(on_tape.open.lock().is_some());
            }
            let other = on_tape.explain(&id(1), Error::usage("no loss"));
            assert_eq!(other.kind(), ErrorKind::Usage);
        }
    }

    #[test]
    fn a_tape_file_is_noted_whole_or_not_and_replaced_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut tapes = Tapes::open(&dir.path().join("c")).unwrap();
        tapes.put_tape(&tape(b"T0", "full")).unwrap();
        put(&mut tapes, b"T0", 1, &[block(1, 1), block(2, 2)]);
        let mut noting = tapes.begin(b"T0", &file(1)).unwrap();
        noting.add(&block(1, 3)).unwrap();
        drop(noting);
        let members = |tapes: &Tapes| {
            let mut all = Vec::new();
            let mut each = |it| {
                all.push(it);
                Ok(())
            };
            tapes.members((b"T0", 1), &mut each).unwrap();
            all
        };
        assert_eq!(members(&tapes), [block(1, 1), block(2, 2)]);
        put(&mut tapes, b"T0", 1, &[block(4, 4)]);
        assert_eq!(members(&tapes), [block(4, 4)]);
        assert_eq!(tapes.copies(&id(1), None).unwrap(), 0);
        tapes.forget(b"T0").unwrap();
        assert_eq!(tapes.tapes().unwrap(), []);
        assert_eq!(tapes.copies(&id(4), None).unwrap(), 0);
        assert_eq!(tapes.begin(b"T0", &file(1)).err().unwrap().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn two_tapes_of_one_label_are_not_taken_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut tapes = Tapes::open(&dir.path().join("c")).unwrap();
        tapes.put_tape(&tape(b"T0", "full")).unwrap();
        put(&mut tapes, b"T0", 1, &[block(1, 1)]);
        let other = Tape { hash: [77; 32], ..tape(b"T0", "full") };
        assert_eq!(tapes.put_tape(&other).unwrap_err().kind(), ErrorKind::WrongTape);
        tapes.put_tape(&tape(b"T0", "incr")).unwrap();
        assert_eq!(tapes.copies(&id(1), Some("incr")).unwrap(), 1);
        tapes.put_tape(&tape(b"T0", "any")).unwrap();
        assert_eq!(tapes.copies(&id(1), Some("incr")).unwrap(), 1);
        tapes.set_lost(b"T0", true).unwrap();
        tapes.put_tape(&other).unwrap();
        let known = tapes.tape(b"T0").unwrap().unwrap();
        assert_eq!((known.tape, known.is_lost, known.files), (other, false, 0));
    }

    #[test]
    fn a_meta_that_was_found_bad_costs_a_copy_until_it_is_right() {
        let dir = tempfile::tempdir().unwrap();
        let mut tapes = Tapes::open(&dir.path().join("c")).unwrap();
        tapes.put_tape(&tape(b"T0", "full")).unwrap();
        put(&mut tapes, b"T0", 1, &[block(100, 1), block(200, 2)]);
        let now = Time { secs: 9, nanos: 0 };
        let with_meta = |tapes: &Tapes, n| tapes.places_with_meta(&id(n)).unwrap().len();
        tapes.note_read((b"T0", 1), (&[], &[(50, id(1))]), true, now).unwrap();
        assert_eq!((with_meta(&tapes, 1), with_meta(&tapes, 2)), (0, 1));
        assert_eq!(tapes.files(b"T0").unwrap()[0].verified, None);
        // The block itself can be had.
        assert_eq!(tapes.places(&id(1)).unwrap().len(), 1);
        // Reading what does not tell of metas does not make it good.
        tapes.note_read((b"T0", 1), (&[], &[]), false, now).unwrap();
        assert_eq!(with_meta(&tapes, 1), 0);
        assert_eq!(tapes.files(b"T0").unwrap()[0].verified, None);
        tapes.note_read((b"T0", 1), (&[], &[]), true, now).unwrap();
        assert_eq!(with_meta(&tapes, 1), 1);
        assert_eq!(tapes.files(b"T0").unwrap()[0].verified, Some(now));
    }

    #[test]
    fn a_damaged_file_is_named_with_the_way_to_make_it_anew() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("c");
        std::fs::write(dir.path().join("c.tapes"), [7; 9000]).unwrap();
        for error in [Tapes::open(&catalog).err(), Tapes::look(&catalog).err()] {
            let error = error.unwrap();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.to_string().contains("tape index"), "{error}");
        }
    }
}
