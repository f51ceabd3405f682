//! Which tapes have all of some blocks, and what is to be read of each.
//!
//! There may be as many places as a store has blocks: they are in a database without a name, which
//! is gone with whoever has it open. Invariant: of it no more is in memory than a cache of fixed
//! size and a page of pieces; what is sorted is sorted on disk.

use rusqlite::{Connection, OptionalExtension};

use super::super::{schema, sql};
use super::Place;
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::volume::BlockId;

/// Memory for pages, in KiB.
const CACHE_KIB: i64 = 4096;

/// A tape weighs as much as what is left to be read and would come from it: the bytes of each block
/// and one, so that one without bytes counts too. A block is on a tape once, at its first place.
const SCRIPT: &str = "
CREATE TABLE tapes (
    number INTEGER PRIMARY KEY, label BLOB NOT NULL UNIQUE, weight INTEGER NOT NULL
) STRICT;
CREATE TABLE blocks (
    number INTEGER PRIMARY KEY, id BLOB NOT NULL, weight INTEGER NOT NULL,
    tape INTEGER -- the one from which it comes, once that is known
) STRICT;
CREATE TABLE pieces (
    tape INTEGER NOT NULL, filenum INTEGER NOT NULL, at INTEGER NOT NULL, block INTEGER NOT NULL,
    position INTEGER NOT NULL, len INTEGER NOT NULL, PRIMARY KEY (tape, filenum, at, block)
) STRICT, WITHOUT ROWID;
CREATE INDEX pieces_block ON pieces (block);
";

/// A block on a tape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Number of the tape file.
    pub filenum: u64,
    /// Logical position of its first block.
    pub position: u64,
    /// Where its content begins, in bytes from the beginning of the tape file.
    pub at: u64,
    /// Length of its content, in bytes.
    pub len: u64,
    /// The block's number in the catalog.
    pub number: u64,
    /// Its name.
    pub id: BlockId,
}

/// What is to be read of a tape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfTape {
    /// Its label.
    pub label: Vec<u8>,
    /// Tape files that have something of it.
    pub files: u64,
    /// Blocks.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    number: i64,
}

/// Blocks, and the tapes they are to come from.
#[derive(Debug)]
pub struct Cover {
    conn: Connection,
}

impl Cover {
    /// One without blocks.
    pub fn new() -> Result<Cover> {
        Cover::with_cache(CACHE_KIB)
    }

    fn with_cache(cache_kib: i64) -> Result<Cover> {
        // Its name is empty: it is a file that has none, among the temporary ones.
        let conn = Connection::open("").map_err(fail)?;
        // Nobody will ever go back in it, or look for it after a crash.
        conn.pragma_update(None, "journal_mode", "OFF").map_err(fail)?;
        schema::configure(&conn, cache_kib)?;
        conn.pragma_update(None, "synchronous", "OFF").map_err(fail)?;
        conn.execute_batch(SCRIPT).map_err(fail)?;
        Ok(Cover { conn })
    }

    /// Adds a block, with its places in the order of [`super::Tapes::places`].
    pub fn add(&mut self, number: u64, id: &BlockId, places: &[Place]) -> Result<()> {
        let weight = places.first().map_or(0, |it| it.len).saturating_add(1);
        let query = "INSERT INTO blocks (number, id, weight) VALUES (?1, ?2, ?3)";
        let mut statement = self.conn.prepare_cached(query).map_err(fail)?;
        statement.execute((number, id.0, weight)).map_err(fail)?;
        let query = "INSERT INTO tapes (label, weight) VALUES (?1, ?2) ON CONFLICT (label) \
                     DO UPDATE SET weight = weight + ?2 RETURNING number";
        let mut weigh = self.conn.prepare_cached(query).map_err(fail)?;
        let query = "INSERT INTO pieces (tape, filenum, at, block, position, len) \
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
        let mut put = self.conn.prepare_cached(query).map_err(fail)?;
        let mut last = None;
        for place in places {
            // Those on one tape follow one another.
            if last.replace(&place.label) == Some(&place.label) {
                continue;
            }
            let row = (&place.label, weight);
            let tape: i64 = weigh.query_row(row, |row| row.get(0)).map_err(fail)?;
            let row = (tape, place.filenum, place.at, number, place.position, place.len);
            put.execute(row).map_err(fail)?;
        }
        Ok(())
    }

    /// Takes the tape that has most of what is left, of two that have as much the one that comes
    /// first by name; `None` if nothing is left.
    pub fn take(&mut self) -> Result<Option<OfTape>> {
        let query = "SELECT number, label FROM tapes WHERE weight > 0 \
                     ORDER BY weight DESC, label LIMIT 1";
        let mut statement = self.conn.prepare_cached(query).map_err(fail)?;
        let heaviest = statement.query_row([], |row| Ok((row.get(0)?, row.get(1)?))).optional();
        let Some((number, label)) = heaviest.map_err(fail)? else { return Ok(None) };
        let tape: i64 = number;
        let mark = "UPDATE blocks SET tape = ?1 WHERE tape IS NULL \
                    AND number IN (SELECT block FROM pieces WHERE tape = ?1)";
        // Each block is taken off once, from all of its tapes: that is no more work than to add it.
        let weigh = "UPDATE tapes SET weight = weight - taken FROM ( \
                     SELECT p.tape AS tape, sum(b.weight) AS taken FROM pieces a \
                     CROSS JOIN blocks b ON b.number = a.block AND b.tape = ?1 \
                     CROSS JOIN pieces p ON p.block = b.number WHERE a.tape = ?1 GROUP BY p.tape \
                     ) it WHERE it.tape = tapes.number";
        for query in [mark, weigh] {
            self.conn.prepare_cached(query).map_err(fail)?.execute([tape]).map_err(fail)?;
        }
        let query = "SELECT count(DISTINCT a.filenum), count(*), sum(a.len) FROM pieces a \
                     CROSS JOIN blocks b ON b.number = a.block AND b.tape = ?1 WHERE a.tape = ?1";
        let mut statement = self.conn.prepare_cached(query).map_err(fail)?;
        let of = statement.query_row([tape], |row| {
            let (files, blocks, bytes) = (row.get(0)?, row.get(1)?, row.get(2)?);
            Ok(OfTape { label, files, blocks, bytes, number: tape })
        });
        of.map(Some).map_err(fail)
    }

    /// What is to be read of a tape that was taken, forwards: as many as `max` pieces, from the
    /// beginning or after one.
    pub fn pieces(&self, of: &OfTape, after: Option<&Piece>, max: u64) -> Result<Vec<Piece>> {
        let query = "SELECT a.filenum, a.position, a.at, a.len, a.block, b.id FROM pieces a \
                     CROSS JOIN blocks b ON b.number = a.block AND b.tape = ?1 \
                     WHERE a.tape = ?1 AND (a.filenum, a.at, a.block) > (?2, ?3, ?4) \
                     ORDER BY a.filenum, a.at, a.block LIMIT ?5";
        let mut statement = self.conn.prepare_cached(query).map_err(fail)?;
        let (filenum, at, number) = match after {
            Some(it) => (it.filenum.cast_signed(), it.at.cast_signed(), it.number.cast_signed()),
            None => (-1, -1, -1),
        };
        let rows = statement.query_map((of.number, filenum, at, number, max), |row| {
            Ok(Piece {
                filenum: row.get(0)?,
                position: row.get(1)?,
                at: row.get(2)?,
                len: row.get(3)?,
                number: row.get(4)?,
                id: Digest(row.get(5)?),
            })
        });
        rows.and_then(Iterator::collect).map_err(fail)
    }
}

fn fail(error: rusqlite::Error) -> Error {
    let place = "the plan of the recall, in the directory for temporary files ($TMPDIR)";
    sql(error).context(place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    /// A block and its places: tape, tape file, offset, length.
    type Block = (u64, Vec<(u8, u64, u64, u64)>);

    fn id(number: u64) -> BlockId {
        let mut bytes = [7; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        Digest(bytes)
    }

    fn place(&(tape, filenum, at, len): &(u8, u64, u64, u64)) -> Place {
        Place {
            // One begins with another one.
            label: vec![b'T'; usize::from(tape)],
            pool: "any".to_owned(),
            block_bytes: 1,
            filenum,
            position: filenum * 10,
            at,
            len,
        }
    }

    /// The same, all in memory: the tapes in order, with their figures and their pieces.
    fn model(mut left: Vec<(u64, Vec<Place>)>) -> Vec<(OfTape, Vec<Piece>)> {
        let mut taken = Vec::new();
        loop {
            let mut weights: BTreeMap<&[u8], u64> = BTreeMap::new();
            for (_, places) in &left {
                let labels: BTreeSet<&[u8]> = places.iter().map(|it| &*it.label).collect();
                labels.iter().for_each(|it| *weights.entry(it).or_default() += places[0].len + 1);
            }
            let heaviest = weights.into_iter().rev().max_by_key(|it| it.1);
            let Some(label) = heaviest.map(|it| it.0.to_vec()) else { return taken };
            let mut pieces = Vec::new();
            left.retain(|(number, places)| {
                let place = places.iter().find(|it| it.label == label);
                pieces.extend(place.map(|it| Piece {
                    filenum: it.filenum,
                    position: it.position,
                    at: it.at,
                    len: it.len,
                    number: *number,
                    id: id(*number),
                }));
                place.is_none()
            });
            pieces.sort_by_key(|it| (it.filenum, it.at, it.number));
            let files: BTreeSet<u64> = pieces.iter().map(|it| it.filenum).collect();
            let of = OfTape {
                label,
                files: files.len() as u64,
                blocks: pieces.len() as u64,
                bytes: pieces.iter().map(|it| it.len).sum(),
                number: 0,
            };
            taken.push((of, pieces));
        }
    }

    fn blocks() -> impl Strategy<Value = Vec<Block>> {
        let place = (1u8..7, 1u64..5, 0u64..50, 0u64..20);
        let places = prop::collection::vec(place, 1..5);
        prop::collection::btree_map(1u64..1000, places, 0..60).prop_map(|it| {
            let sorted = |(number, mut places): Block| {
                places.sort_unstable();
                (number, places)
            };
            it.into_iter().map(sorted).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn it_takes_what_an_easy_one_in_memory_takes(all in blocks(), max in 1u64..9) {
            let all: Vec<(u64, Vec<Place>)> =
                all.iter().map(|(number, at)| (*number, at.iter().map(place).collect())).collect();
            let mut cover = Cover::new().unwrap();
            all.iter().for_each(|(number, places)| {
                cover.add(*number, &id(*number), places).unwrap();
            });
            let mut taken = Vec::new();
            while let Some(of) = cover.take().unwrap() {
                taken.push(of);
            }
            // Only now, as drives do it.
            let mut found = Vec::new();
            for of in taken {
                let mut pieces: Vec<Piece> = Vec::new();
                loop {
                    let page = cover.pieces(&of, pieces.last(), max).unwrap();
                    prop_assert!(page.len() as u64 <= max);
                    if page.is_empty() {
                        break;
                    }
                    pieces.extend(page);
                }
                found.push((OfTape { number: 0, ..of }, pieces));
            }
            prop_assert_eq!(found, model(all));
        }
    }

    #[test]
    fn what_is_more_than_its_cache_is_on_disk() {
        let mut cover = Cover::with_cache(64).unwrap();
        let mode = |name| cover.conn.pragma_query_value(None, name, |row| row.get::<_, String>(0));
        assert_eq!(mode("journal_mode").unwrap(), "off");
        for number in 1..8000 {
            let at = [(1, 1, number, 9), (2, 1, number, 9)];
            cover.add(number, &id(number), &at.each_ref().map(place)).unwrap();
        }
        let query = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size";
        let bytes: u64 = cover.conn.query_row(query, [], |row| row.get(0)).unwrap();
        assert!(bytes > 512 << 10, "{bytes}");
        // Files of this process that have no name: this one is among them.
        let fds = std::fs::read_dir("/proc/self/fd").unwrap().map(|it| it.unwrap().path());
        let is_nameless = |it: &std::path::PathBuf| {
            let link = std::fs::read_link(it).unwrap_or_default();
            link.to_string_lossy().ends_with("(deleted)")
        };
        let lens = fds.filter(is_nameless).map(|it| it.metadata().map_or(0, |it| it.len()));
        let lens: Vec<u64> = lens.collect();
        let on_disk = bytes - (128 << 10);
        assert!(lens.iter().any(|it| (on_disk..=bytes).contains(it)), "{lens:?}, {bytes}");
        let of = cover.take().unwrap().unwrap();
        assert_eq!((of.blocks, of.bytes, of.label), (7999, 7999 * 9, b"T".to_vec()));
        assert!(cover.take().unwrap().is_none());
    }
}
