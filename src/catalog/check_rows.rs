//! The catalog against itself: what SQLite does not know of its rows.
//!
//! Each pass goes through a table once, in an order in which what belongs together comes together,
//! so that it needs no more memory for a large catalog. All passes see one state of it. Faults are
//! told one by one, in words that name the row; whoever is told keeps as many as he likes.

use std::collections::{BTreeSet, HashMap, VecDeque};

use rusqlite::OptionalExtension;

use super::extent::{Content, Extent};
use super::number_set::NumberSet;
use super::numbers::{Numbered, last_given};
use super::read::{EntryRow, Reader, in_order};
use super::run::{DirId, Run, RunId, VersionId};
use super::sql;
use super::told::History;
use crate::chunk::Digest;
use crate::chunk::frame::get_frames;
use crate::entry::Kind;
use crate::error::{Quoted, Result};
use crate::volume::BlockId;
use crate::wire::Reader as WireReader;

/// Rows between two questions whether to go on.
const ROWS_PER_QUESTION: u64 = 1024;
/// Blocks that are remembered.
const BLOCKS_MAX: usize = 1 << 16;
/// Entries of a page of a walk near the root, and further down.
const PAGE_ENTRIES: usize = 512;
const DEEP_PAGE_ENTRIES: usize = 16;
/// From how many directories down pages are short.
const DEEP: usize = 16;

/// Who is told of faults, and asked whether to go on.
pub struct Checking<'a> {
    /// Takes a fault.
    pub found: &'a mut dyn FnMut(String),
    /// Fails when the work is to stop.
    pub go_on: &'a dyn Fn() -> Result<()>,
    rows: u64,
}

impl<'a> Checking<'a> {
    /// A check whose faults go to `found`.
    pub fn new(found: &'a mut dyn FnMut(String), go_on: &'a dyn Fn() -> Result<()>) -> Self {
        Checking { found, go_on, rows: 0 }
    }

    pub(super) fn row(&mut self) -> Result<()> {
        self.rows += 1;
        match self.rows % ROWS_PER_QUESTION {
            0 => (self.go_on)(),
            _ => Ok(()),
        }
    }

    pub(super) fn tell(&mut self, what: impl std::fmt::Display) {
        (self.found)(format!("catalog: {what}"));
    }
}

/// What a run needs.
#[derive(Default)]
pub struct Needed {
    /// Numbers of blocks.
    pub blocks: NumberSet,
    /// Versions that are files.
    pub files: NumberSet,
}

/// A directory on the way down a run's tree.
struct Level {
    dir: DirId,
    page: VecDeque<EntryRow>,
    after: Option<Vec<u8>>,
    is_read: bool,
}

impl Level {
    fn new(dir: DirId) -> Level {
        Level { dir, page: VecDeque::new(), after: None, is_read: false }
    }
}

impl Reader {
    /// Finds every fault of the catalog itself: pages and keys; entries out of reach, alive twice,
    /// or outside their directory's life; contents that do not cover their file or reach beyond
    /// their block; uses, kinds of attributes and tables of blocks that do not say what follows
    /// from the rest.
    pub fn check(&self, checking: &mut Checking<'_>) -> Result<()> {
        self.check_pages(checking)?;
        self.check_rows(checking).map(drop)
    }

    /// The rows alone. Gives what they say of each run, for comparison with its manifest.
    pub fn check_rows(&self, checking: &mut Checking<'_>) -> Result<History> {
        let transaction = self.conn().unchecked_transaction().map_err(sql)?;
        self.check_runs(checking)?;
        let history = self.check_entries(checking)?;
        self.check_blocks(checking)?;
        self.check_chunks(checking)?;
        transaction.finish().map_err(sql)?;
        Ok(history)
    }

    /// The same for the entries of one run; gives what the run needs.
    pub fn check_run(&self, run: &Run, checking: &mut Checking<'_>) -> Result<Needed> {
        let transaction = self.conn().unchecked_transaction().map_err(sql)?;
        let mut needed = Needed::default();
        let mut lens = Blocks::default();
        let root = self.root(run)?;
        let mut levels: Vec<Level> = root.child.into_iter().map(Level::new).collect();
        while let Some(entry) = self.next_of(run.id, &mut levels)? {
            checking.row()?;
            levels.extend(entry.child.map(Level::new));
            match self.content(entry.version) {
                Ok(content) => {
                    blocks_of(&content).into_iter().for_each(|it| needed.blocks.insert(it));
                    if content.hash.is_some() {
                        needed.files.insert(entry.version.cast_unsigned());
                    }
                    self.check_content(&entry, &content, &mut lens, checking)?;
                }
                Err(e) => checking.tell(format_args!("{}: {e}", Place(&entry))),
            }
        }
        transaction.finish().map_err(sql)?;
        Ok(needed)
    }

    /// The next entry of a walk, after those below the one before.
    fn next_of(&self, run: RunId, levels: &mut Vec<Level>) -> Result<Option<EntryRow>> {
        let limit = if levels.len() < DEEP { PAGE_ENTRIES } else { DEEP_PAGE_ENTRIES };
        while let Some(level) = levels.last_mut() {
            if level.page.is_empty() && !level.is_read {
                level.page = self.list(run, level.dir, level.after.as_deref(), limit)?.into();
                level.is_read = level.page.len() < limit;
                level.after = level.page.back().map(|it| it.name.clone());
            }
            match level.page.pop_front() {
                Some(entry) => return Ok(Some(entry)),
                None => levels.pop(),
            };
        }
        Ok(None)
    }

    /// At most `limit` versions that are files, from the first greater than `after`.
    pub fn file_versions(&self, after: VersionId, limit: usize) -> Result<Vec<VersionId>> {
        let query = "SELECT version FROM versions WHERE version > ?1 AND hash IS NOT NULL \
                     ORDER BY version LIMIT ?2";
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let rows = statement.query_map((after, limit), |row| row.get(0)).map_err(sql)?;
        let versions = rows.collect::<rusqlite::Result<Vec<VersionId>>>().map_err(sql)?;
        let numbers = std::iter::once(&after).chain(&versions);
        in_order(numbers.map(|it| it.cast_unsigned()))?;
        Ok(versions)
    }

    /// Pages, keys and constraints, as SQLite knows them.
    pub fn check_pages(&self, checking: &mut Checking<'_>) -> Result<()> {
        (checking.go_on)()?;
        let mut statement = self.conn().prepare("PRAGMA integrity_check").map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let line: String = row.get(0).map_err(sql)?;
            if line != "ok" {
                checking.tell(line);
            }
        }
        (checking.go_on)()?;
        // Of the rows of chunks the passes through the rows know it.
        for table in ["block_copies", "runs", "run_tags", "run_problems"] {
            let query = format!("PRAGMA foreign_key_check({table})");
            let mut statement = self.conn().prepare(&query).map_err(sql)?;
            let mut rows = statement.query([]).map_err(sql)?;
            while let Some(row) = rows.next().map_err(sql)? {
                let other: String = row.get(2).map_err(sql)?;
                checking
                    .tell(format_args!("a row of {table} names a row of {other} that is missing"));
            }
        }
        Ok(())
    }

    /// Settings can be read, and every run has a root directory.
    fn check_runs(&self, checking: &mut Checking<'_>) -> Result<()> {
        if let Err(e) = self.settings() {
            (checking.found)(e.to_string());
        }
        use Numbered::{Block, Dir, Run, Version, Volume};
        for what in [Run, Version, Dir, Block, Volume] {
            if let Err(e) = last_given(self.conn(), what) {
                (checking.found)(e.to_string());
            }
        }
        for run in self.run_numbers(0)? {
            checking.row()?;
            let root = self.run(run).and_then(|run| self.root(&run));
            if let Err(e) = root {
                (checking.found)(format!("run {run}: {e}"));
            }
        }
        Ok(())
    }

    pub(super) fn check_content(
        &self,
        entry: &EntryRow,
        content: &Content,
        blocks: &mut Blocks,
        checking: &mut Checking<'_>,
    ) -> Result<()> {
        let what = Place(entry);
        let version = entry.version;
        let is_file = entry.meta.kind == Kind::File;
        if is_file != content.hash.is_some() || !is_file && !content.extents.is_empty() {
            let word = if is_file { "no content" } else { "a content" };
            checking.tell(format_args!("{what}, version {version}, has {word}"));
            return Ok(());
        }
        if (entry.meta.kind == Kind::Symlink) != content.extra.target.is_some() {
            checking.tell(format_args!(
                "{what}, version {version}: a link without a target, or \
                                        a target without a link"
            ));
        }
        if !is_file {
            return Ok(());
        }
        if content.extents.iter().map(Extent::len).sum::<u64>() != entry.meta.size {
            checking
                .tell(format_args!("{what}, version {version}: its extents do not cover its size"));
        }
        if content.data_len() != entry.data_len {
            checking.tell(format_args!(
                "{what}, version {version}: its data_len is not that of its \
                                        extents"
            ));
        }
        for extent in &content.extents {
            let Extent::Data { block, offset, len } = *extent else { continue };
            let known = blocks.of(self, block)?;
            if known.is_none_or(|it| offset.saturating_add(len) > it.0) {
                checking
                    .tell(format_args!("{what}, version {version}, reaches beyond block {block}"));
            }
        }
        Ok(())
    }

    fn check_blocks(&self, checking: &mut Checking<'_>) -> Result<()> {
        let query = "SELECT number, id, stored_len, plain_len, frames FROM blocks ORDER BY number";
        let mut statement = self.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            checking.row()?;
            let number: u64 = row.get(0).map_err(sql)?;
            let id: Vec<u8> = row.get(1).map_err(sql)?;
            let lens: (u64, u64) = (row.get(2).map_err(sql)?, row.get(3).map_err(sql)?);
            let table: Vec<u8> = row.get(4).map_err(sql)?;
            let sums = || -> Result<(u64, u64)> {
                Digest::from_slice(&id)?;
                let mut reader = WireReader::new(&table, "frame table");
                let frames = get_frames(&mut reader)?;
                reader.finish()?;
                Ok((
                    frames.iter().map(|it| u64::from(it.stored_len)).sum(),
                    frames.iter().map(|it| u64::from(it.plain_len)).sum(),
                ))
            };
            match sums() {
                Ok(sums) if sums == lens => {}
                // Of a block that a rebuild has not found, nothing is known but its name.
                Ok((0, 0)) => {}
                Ok(_) => checking
                    .tell(format_args!("block {number}: its lengths are not those of its frames")),
                Err(e) => checking.tell(format_args!("block {number}: {e}")),
            }
        }
        Ok(())
    }

    fn check_chunks(&self, checking: &mut Checking<'_>) -> Result<()> {
        (checking.go_on)()?;
        let query = "SELECT id, block, at, len FROM chunks";
        let mut statement = self.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        let mut blocks = Blocks::default();
        while let Some(row) = rows.next().map_err(sql)? {
            checking.row()?;
            let block: u64 = row.get(1).map_err(sql)?;
            let (at, len): (u64, u64) = (row.get(2).map_err(sql)?, row.get(3).map_err(sql)?);
            let known = blocks.of(self, block)?;
            if len == 0 || known.is_none_or(|it| at.saturating_add(len) > it.0) {
                let id: Vec<u8> = row.get(0).map_err(sql)?;
                let id = hex::encode(id);
                checking.tell(format_args!("chunk {id} reaches beyond block {block}"));
            }
        }
        Ok(())
    }
}

/// Plain lengths and names of blocks.
#[derive(Default)]
pub(super) struct Blocks {
    known: HashMap<u64, Option<(u64, BlockId)>>,
    /// The one that was asked for last: the next is mostly the same.
    last: Option<(u64, Option<(u64, BlockId)>)>,
}

impl Blocks {
    pub(super) fn of(&mut self, reader: &Reader, block: u64) -> Result<Option<(u64, BlockId)>> {
        if let Some(last) = self.last.filter(|it| it.0 == block) {
            return Ok(last.1);
        }
        let found = match self.known.get(&block) {
            Some(found) => *found,
            None => {
                if self.known.len() >= BLOCKS_MAX {
                    self.known.clear();
                }
                let query = "SELECT plain_len, id FROM blocks WHERE number = ?1";
                let mut statement = reader.conn().prepare_cached(query).map_err(sql)?;
                let row = statement.query_row([block], |row| Ok((row.get(0)?, row.get(1)?)));
                let row: Option<(u64, Vec<u8>)> = row.optional().map_err(sql)?;
                let found = row.and_then(|it| Some((it.0, Digest::from_slice(&it.1).ok()?)));
                self.known.insert(block, found);
                found
            }
        };
        self.last = Some((block, found));
        Ok(found)
    }
}

/// The blocks that a content has bytes in.
pub(super) fn blocks_of(content: &Content) -> BTreeSet<u64> {
    let blocks = content.extents.iter().filter_map(|it| match it {
        Extent::Data { block, .. } => Some(*block),
        Extent::Hole { .. } => None,
    });
    blocks.collect()
}

/// An entry's name and where it is, for a message.
pub(super) struct Place<'a>(pub(super) &'a EntryRow);

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let EntryRow { dir, name, first_run, .. } = self.0;
        write!(f, "'{}' in directory {dir} from run {first_run} on", Quoted(name))
    }
}
