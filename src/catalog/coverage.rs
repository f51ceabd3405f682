//! How many copies there are of what, and what the loss of a volume would mean.
//!
//! Rows go by and are counted; a run's blocks are remembered as one bit each, and what has to be
//! sorted is sorted by the database, which uses the disk for it.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;

use rusqlite::Statement;

use super::extent::{self, Extent};
use super::number_set::NumberSet;
use super::read::{EntryRow, Reader};
use super::run::{DirId, Run, RunId};
use super::sql;
use super::tapes::{self, Tapes};
use crate::catalog::DamagedFile;
use crate::chunk::Digest;
use crate::entry::join;
use crate::error::{Error, Result};
use crate::volume::BlockId;

/// Files that are named of those that would be lost.
const NAMES_MAX: usize = 5;
/// A block's number beyond this is none: no store has so many.
const BLOCKS_MAX: u64 = 1 << 36;

/// Blocks and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// How many blocks.
    pub blocks: u64,
    /// Their stored bytes.
    pub bytes: u64,
}

impl Amount {
    fn add(&mut self, bytes: u64) {
        self.blocks += 1;
        self.bytes += bytes;
    }
}

/// Copies that are not there, or are known to be bad: they do not count.
#[derive(Default)]
pub struct BadCopies(BTreeMap<i64, Bits>);

impl BadCopies {
    fn has(&self, volume: i64, block: u64) -> bool {
        self.0.get(&volume).is_some_and(|it| it.has(block))
    }
}

/// How many copies there are.
#[derive(Debug, Default)]
pub struct Coverage {
    /// By the number of good copies on volumes that are there.
    pub by_copies: BTreeMap<u64, Amount>,
    /// By volume the copies that are good, as far as is known.
    pub by_volume: BTreeMap<i64, Amount>,
    /// Blocks that have fewer rows than copies are wanted, and the copies they lack.
    pub lacking: Amount,
    /// By the number of tapes that have a good copy.
    pub by_tapes: BTreeMap<u64, Amount>,
}

/// What would be lost with some volumes.
#[derive(Debug, Default)]
pub struct Loss {
    /// Blocks that are on no other volume within reach, and on no tape.
    pub amount: Amount,
    /// Blocks that are on no other volume within reach, and on tape.
    pub on_tape: Amount,
    /// Files that need them, by path.
    pub files: u64,
    /// Runs that have such files.
    pub runs: u64,
    /// The first of the files.
    pub first: Vec<DamagedFile>,
}

impl Loss {
    /// Whether nothing would be lost; what is on tape would not.
    pub fn is_none(&self) -> bool {
        self.amount.blocks == 0
    }
}

/// Numbers as bits.
#[derive(Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn set(&mut self, number: u64) -> Result<()> {
        if number > BLOCKS_MAX {
            return Err(Error::corrupt(format!("catalog: there is no block {number}")));
        }
        let word = usize::try_from(number / 64).unwrap_or(usize::MAX);
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        if let Some(it) = self.0.get_mut(word) {
            *it |= 1 << (number % 64);
        }
        Ok(())
    }

    fn set_all(&mut self, extents: &[Extent]) -> Result<()> {
        for extent in extents {
            if let Extent::Data { block, .. } = extent {
                self.set(*block)?;
            }
        }
        Ok(())
    }

    fn has(&self, number: u64) -> bool {
        let word = usize::try_from(number / 64).unwrap_or(usize::MAX);
        self.0.get(word).is_some_and(|it| it >> (number % 64) & 1 == 1)
    }
}

/// The runs of a source in order, and how many files begin and end to be lost with each.
struct Marks {
    runs: Vec<RunId>,
    changes: Vec<i64>,
}

/// The blocks that a run needs.
pub struct RunBlocks(Bits);

impl RunBlocks {
    /// Whether it needs the block of this number.
    pub fn has(&self, block: u64) -> bool {
        self.0.has(block)
    }
}

/// On how many tapes the block of a name is.
fn count_tapes(on_tapes: Option<&mut Statement<'_>>, id: [u8; 32]) -> Result<u64> {
    on_tapes.map_or(Ok(0), |it| it.query_row([id], |row| row.get(0)).map_err(sql))
}

/// Numbers as an array of arrays: of those that follow one another the first and the last.
fn ranges_of(numbers: &NumberSet) -> String {
    let mut ranges: Vec<[u64; 2]> = Vec::new();
    for number in numbers.iter() {
        match ranges.last_mut() {
            Some([_, last]) if *last + 1 == number => *last = number,
            _ => ranges.push([number, number]),
        }
    }
    let ranges = ranges.iter().map(|it| it.to_vec());
    ranges.collect::<serde_json::Value>().to_string()
}

impl Reader {
    /// The blocks that the files of a run lie in.
    pub fn blocks_of_run(&self, run: &Run) -> Result<RunBlocks> {
        self.blocks_of_entry(run.id, &self.root(run)?)
    }

    /// The blocks that a file lies in, or all files below a directory, as they are in a run.
    pub fn blocks_of_entry(&self, run: RunId, entry: &EntryRow) -> Result<RunBlocks> {
        let mut blocks = Bits::default();
        let Some(dir) = entry.child else {
            blocks.set_all(&self.content(entry.version)?.extents)?;
            return Ok(RunBlocks(blocks));
        };
        let query = "WITH RECURSIVE dirs (dir) AS ( \
                 VALUES (?2) \
                 UNION ALL SELECT e.child FROM dirs d CROSS JOIN entries e ON e.dir = d.dir \
                     WHERE e.child IS NOT NULL AND e.first_run <= ?1 AND e.last_run >= ?1) \
             SELECT v.extents FROM dirs d CROSS JOIN entries e ON e.dir = d.dir \
                 CROSS JOIN versions v ON v.version = e.version \
                 WHERE e.first_run <= ?1 AND e.last_run >= ?1 AND v.extents IS NOT NULL";
        let mut statement = self.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query((run, dir)).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let extents: Vec<u8> = row.get(0).map_err(sql)?;
            blocks.set_all(&extent::decode(&extents)?)?;
        }
        Ok(RunBlocks(blocks))
    }

    /// The copies that `is_bad` says are so, by volume, block and stored length, of those on the
    /// volumes that are there.
    pub fn bad_copies(
        &self,
        here: &[i64],
        is_bad: &mut dyn FnMut(i64, &BlockId, u64) -> Result<bool>,
    ) -> Result<BadCopies> {
        let query = "SELECT c.volume, b.number, b.id, b.stored_len FROM blocks b \
                     JOIN block_copies c ON c.block = b.number ORDER BY b.number";
        let mut statement = self.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        let mut bad = BadCopies::default();
        while let Some(row) = rows.next().map_err(sql)? {
            let volume: i64 = row.get(0).map_err(sql)?;
            let id = Digest(row.get(2).map_err(sql)?);
            if here.contains(&volume) && is_bad(volume, &id, row.get(3).map_err(sql)?)? {
                bad.0.entry(volume).or_default().set(row.get(1).map_err(sql)?)?;
            }
        }
        Ok(bad)
    }

    /// How many copies there are of all blocks, or of those of a run; `here` are the volumes that
    /// are there, of whose copies those in `bad` do not count, `wanted` is how many copies there
    /// should be, and `tapes` count beside them.
    pub fn coverage(
        &self,
        of: Option<&RunBlocks>,
        (here, bad, wanted): (&[i64], &BadCopies, u8),
        tapes: Option<&Tapes>,
    ) -> Result<Coverage> {
        let mut on_tapes = self.tapes_of_blocks(tapes)?;
        let query = "SELECT blocks.number, stored_len, volume, blocks.id FROM blocks \
                     LEFT JOIN block_copies c ON c.block = blocks.number ORDER BY blocks.number";
        let mut statement = self.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        let mut coverage = Coverage::default();
        // Number, bytes, copies, copies within reach.
        let mut block: Option<(u64, u64, u64, u64)> = None;
        let end = |block: Option<(u64, u64, u64, u64)>, coverage: &mut Coverage| {
            let Some((_, bytes, copies, within)) = block else { return };
            coverage.by_copies.entry(within).or_default().add(bytes);
            let lacking = u64::from(wanted).saturating_sub(copies);
            if lacking > 0 {
                coverage.lacking.blocks += 1;
                coverage.lacking.bytes += lacking * bytes;
            }
        };
        while let Some(row) = rows.next().map_err(sql)? {
            let number: u64 = row.get(0).map_err(sql)?;
            if of.is_some_and(|it| !it.0.has(number)) {
                continue;
            }
            let bytes: u64 = row.get(1).map_err(sql)?;
            if block.is_none_or(|it| it.0 != number) {
                end(block.replace((number, bytes, 0, 0)), &mut coverage);
                let count = count_tapes(on_tapes.as_mut(), row.get(3).map_err(sql)?)?;
                coverage.by_tapes.entry(count).or_default().add(bytes);
            }
            if let (Some(volume), Some(block)) = (row.get(2).map_err(sql)?, block.as_mut()) {
                block.2 += 1;
                if !bad.has(volume, number) {
                    block.3 += u64::from(here.contains(&volume));
                    coverage.by_volume.entry(volume).or_default().add(bytes);
                }
            }
        }
        end(block, &mut coverage);
        Ok(coverage)
    }

    /// What would be lost with the volumes `lost`, of everything or of a run, while of the others
    /// just `here` are there, without the copies in `bad`.
    pub fn loss(
        &self,
        lost: &[i64],
        (here, bad): (&[i64], &BadCopies),
        run: Option<(&Run, &RunBlocks)>,
        tapes: Option<&Tapes>,
    ) -> Result<Loss> {
        let mut on_tapes = self.tapes_of_blocks(tapes)?;
        let list = |numbers: &mut dyn Iterator<Item = &i64>| {
            numbers.map(i64::to_string).collect::<Vec<_>>().join(", ")
        };
        let stay = list(&mut here.iter().filter(|it| !lost.contains(it)));
        let lost = list(&mut lost.iter());
        // Numbers only, which are this program's own.
        let query = format!(
            "SELECT b.number, b.stored_len, b.id, o.volume FROM blocks b \
             LEFT JOIN block_copies o ON o.block = b.number AND o.volume IN ({stay}) \
             WHERE b.number IN (SELECT block FROM block_copies WHERE volume IN ({lost})) \
             ORDER BY b.number"
        );
        let (mut loss, mut only) = (Loss::default(), NumberSet::default());
        let mut statement = self.conn().prepare(&query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        // Of the block at hand: its number, bytes and name, and whether it is elsewhere too.
        let mut block: Option<(u64, u64, [u8; 32], bool)> = None;
        let mut end = |block: Option<(u64, u64, [u8; 32], bool)>| {
            let Some((number, bytes, id, false)) = block else { return Ok(()) };
            if run.is_some_and(|it| !it.1.has(number)) {
                return Ok(());
            }
            if count_tapes(on_tapes.as_mut(), id)? > 0 {
                loss.on_tape.add(bytes);
            } else {
                loss.amount.add(bytes);
                only.insert(number);
            }
            Ok::<_, Error>(())
        };
        while let Some(row) = rows.next().map_err(sql)? {
            let number: u64 = row.get(0).map_err(sql)?;
            if block.is_none_or(|it| it.0 != number) {
                let new = (number, row.get(1).map_err(sql)?, row.get(2).map_err(sql)?, false);
                end(block.replace(new))?;
            }
            let other: Option<i64> = row.get(3).map_err(sql)?;
            if let Some(block) = &mut block {
                block.3 |= other.is_some_and(|it| !bad.has(it, number));
            }
        }
        end(block)?;
        if loss.is_none() {
            return Ok(loss);
        }
        self.lost_files(&only, run.map(|it| it.0), &mut loss)?;
        Ok(loss)
    }

    /// Asks on how many tapes a block is, by its name; nothing to ask if there are no tapes.
    fn tapes_of_blocks(&self, tapes: Option<&Tapes>) -> Result<Option<Statement<'_>>> {
        let Some(tapes) = tapes else { return Ok(None) };
        let query = "SELECT EXISTS (SELECT 1 FROM pragma_database_list WHERE name = 'tapes')";
        let is_attached: bool = self.conn().query_row(query, [], |row| row.get(0)).map_err(sql)?;
        if !is_attached {
            let path = tapes.path().as_os_str().as_bytes();
            self.conn().execute("ATTACH ?1 AS tapes", [path]).map_err(sql)?;
        }
        let query =
            format!("SELECT count(DISTINCT t.number) FROM {} AND m.block = ?1", tapes::GOOD);
        self.conn().prepare(&query).map(Some).map_err(sql)
    }

    fn lost_files(&self, only: &NumberSet, run: Option<&Run>, loss: &mut Loss) -> Result<()> {
        let mut marks: BTreeMap<Vec<u8>, Marks> = BTreeMap::new();
        for it in self.runs()? {
            if run.is_none_or(|run| run.id == it.id) {
                let empty = Marks { runs: Vec::new(), changes: vec![0] };
                let marks = marks.entry(it.source).or_insert(empty);
                marks.runs.push(it.id);
                marks.changes.push(0);
            }
        }
        let query = "SELECT dir, name, first_run, last_run FROM entries \
                     WHERE kind = 1 AND version IN (SELECT version FROM json_each(?1) r \
                     CROSS JOIN uses ON block BETWEEN r.value ->> 0 AND r.value ->> 1) \
                     ORDER BY dir, name, first_run";
        let mut statement = self.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([ranges_of(only)]).map_err(sql)?;
        let mut dir: Option<(DirId, Vec<u8>, Vec<u8>)> = None;
        let mut before: Option<(DirId, Vec<u8>)> = None;
        while let Some(row) = rows.next().map_err(sql)? {
            let number: DirId = row.get(0).map_err(sql)?;
            let name: Vec<u8> = row.get(1).map_err(sql)?;
            if dir.as_ref().is_none_or(|it| it.0 != number) {
                let (source, path) = self.path_of_dir(number)?;
                dir = Some((number, source, path));
            }
            let Some((_, source, path)) = &dir else { continue };
            let Some(marks) = marks.get_mut(source) else { continue };
            let (first, last): (RunId, RunId) =
                (row.get(2).map_err(sql)?, row.get(3).map_err(sql)?);
            let from = marks.runs.partition_point(|it| *it < first);
            let to = marks.runs.partition_point(|it| *it <= last);
            if from >= to {
                continue;
            }
            for (at, change) in [(from, 1), (to, -1)] {
                if let Some(it) = marks.changes.get_mut(at) {
                    *it += change;
                }
            }
            let runs = || marks.runs.get(from..to).unwrap_or_default().iter().copied();
            let this = (number, name);
            if before.as_ref() == Some(&this) {
                let is_named = loss.files == loss.first.len() as u64;
                if let Some(it) = loss.first.last_mut().filter(|_| is_named) {
                    it.runs.extend(runs());
                }
                continue;
            }
            loss.files += 1;
            if loss.first.len() < NAMES_MAX {
                let (source, path) = (source.clone(), join(path, &this.1));
                loss.first.push(DamagedFile { source, path, runs: runs().collect() });
            }
            before = Some(this);
        }
        for marks in marks.values() {
            let mut open = 0;
            for change in &marks.changes {
                open += change;
                loss.runs += u64::from(open > 0);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_follow_one_another_are_one_range() {
        let mut numbers = NumberSet::default();
        assert_eq!(ranges_of(&numbers), "[]");
        [7, 1, 2, 3, 9, 10, 600].into_iter().for_each(|it| numbers.insert(it));
        assert_eq!(ranges_of(&numbers), "[[1,3],[7,7],[9,10],[600,600]]");
    }
}
