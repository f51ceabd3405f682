//! The catalog against itself: what SQLite does not know of its rows.
//!
//! Each pass goes through a table once, in an order in which what belongs together comes together,
//! so that it needs no more memory for a large catalog. All passes see one state of it. Faults are
//! told one by one, in words that name the row; whoever is told keeps as many as he likes.

use std::collections::{BTreeSet, HashMap, VecDeque};

use rusqlite::OptionalExtension;

use super::brief::AttributeKind;
use super::extent::{Content, Extent};
use super::number_set::NumberSet;
use super::numbers::{Numbered, last_given};
use super::read::{ENTRY_COLUMNS, EntryRow, Reader, content_from, entry_from};
use super::run::{DirId, Run, RunId, VersionId};
use super::{OPEN, sql};
use crate::chunk::Digest;
use crate::chunk::frame::get_frames;
use crate::entry::Kind;
use crate::error::{Quoted, Result};
use crate::wire::Reader as WireReader;

/// Rows between two questions whether to go on.
const ROWS_PER_QUESTION: u64 = 1024;
/// Lengths of blocks that are remembered.
const LENS_MAX: usize = 1 << 16;
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

    fn row(&mut self) -> Result<()> {
        self.rows += 1;
        match self.rows % ROWS_PER_QUESTION {
            0 => (self.go_on)(),
            _ => Ok(()),
        }
    }

    fn tell(&mut self, what: impl std::fmt::Display) {
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

/// The rows that one directory number has, as the runs in which it lives.
struct Parent {
    dir: DirId,
    /// Ranges of runs in order, joined where they touch; `None` for what is above all sources.
    ranges: Option<Vec<(RunId, RunId)>>,
}

impl Reader {
    /// Finds every fault of the catalog itself: pages and keys; entries out of reach, alive twice,
    /// or outside their directory's life; contents that do not cover their file or reach beyond
    /// their block; uses, kinds of attributes and tables of blocks that do not say what follows
    /// from the rest.
    pub fn check(&self, checking: &mut Checking<'_>) -> Result<()> {
        let transaction = self.conn().unchecked_transaction().map_err(sql)?;
        self.check_database(checking)?;
        self.check_runs(checking)?;
        self.check_entries(checking)?;
        self.check_versions(checking)?;
        self.check_blocks(checking)?;
        self.check_chunks(checking)?;
        transaction.finish().map_err(sql)
    }

    /// The same for the entries of one run; gives what the run needs.
    pub fn check_run(&self, run: &Run, checking: &mut Checking<'_>) -> Result<Needed> {
        let transaction = self.conn().unchecked_transaction().map_err(sql)?;
        let mut needed = Needed::default();
        let mut lens = Lens::default();
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
        rows.collect::<rusqlite::Result<_>>().map_err(sql)
    }

    fn check_database(&self, checking: &mut Checking<'_>) -> Result<()> {
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
        let mut statement = self.conn().prepare("PRAGMA foreign_key_check").map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let (table, other): (String, String) =
                (row.get(0).map_err(sql)?, row.get(2).map_err(sql)?);
            checking.tell(format_args!("a row of {table} names a row of {other} that is missing"));
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

    fn check_entries(&self, checking: &mut Checking<'_>) -> Result<()> {
        let last_run = last_given(self.conn(), Numbered::Run).unwrap_or(OPEN);
        let query = format!(
            "SELECT {ENTRY_COLUMNS}, of_hash, of_extents, of_extra FROM entries LEFT JOIN \
             (SELECT version AS of_version, hash AS of_hash, extents AS of_extents, \
             extra AS of_extra FROM versions) ON of_version = version ORDER BY dir, name, first_run"
        );
        let mut statement = self.conn().prepare(&query).map_err(sql)?;
        let first_of_content = ENTRY_COLUMNS.split(',').count();
        let mut rows = statement.query([]).map_err(sql)?;
        let (mut before, mut parent, mut lens) =
            (None::<EntryRow>, None::<Parent>, Lens::default());
        while let Some(row) = rows.next().map_err(sql)? {
            checking.row()?;
            let entry = match entry_from(row) {
                Ok(entry) => entry,
                Err(e) => {
                    let (dir, name): (DirId, Vec<u8>) =
                        (row.get(0).map_err(sql)?, row.get(1).map_err(sql)?);
                    (checking.found)(format!("{e}: '{}' in directory {dir}", Quoted(&name)));
                    continue;
                }
            };
            if parent.as_ref().is_none_or(|it| it.dir != entry.dir) {
                parent = Some(self.parent(entry.dir, checking)?);
            }
            let what = Place(&entry);
            let (first, last) = (entry.first_run, entry.last_run);
            if first > last_run || last != OPEN && last > last_run || first < 1 {
                checking.tell(format_args!("{what} lives in runs that there are not"));
            }
            let ranges = parent.as_ref().and_then(|it| it.ranges.as_ref());
            if ranges.is_some_and(|it| {
                !it.is_empty() && !it.iter().any(|it| it.0 <= first && last <= it.1)
            }) {
                checking.tell(format_args!("{what} lives when its directory does not"));
            }
            if before.is_some_and(|it| {
                it.dir == entry.dir && it.name == entry.name && it.last_run >= first
            }) {
                checking.tell(format_args!("{what} lives twice in run {first}"));
            }
            let column = |at: usize| row.get(first_of_content + at).map_err(sql);
            let content = (column(0)?, column(1)?, column(2)?);
            match content_from(content) {
                Ok(content) => self.check_content(&entry, &content, &mut lens, checking)?,
                Err(e) => checking.tell(format_args!("{what}: {e}")),
            }
            before = Some(entry);
        }
        Ok(())
    }

    /// When a directory lives. Tells if it is nowhere, or in two places.
    fn parent(&self, dir: DirId, checking: &mut Checking<'_>) -> Result<Parent> {
        if dir == 0 {
            return Ok(Parent { dir, ranges: None });
        }
        let query = "SELECT first_run, last_run, dir, name FROM entries WHERE child = ?1 \
                     ORDER BY first_run";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let mut rows = statement.query([dir]).map_err(sql)?;
        let mut ranges: Vec<(RunId, RunId)> = Vec::new();
        let mut place = None::<(DirId, Vec<u8>)>;
        while let Some(row) = rows.next().map_err(sql)? {
            checking.row()?;
            let range: (RunId, RunId) = (row.get(0).map_err(sql)?, row.get(1).map_err(sql)?);
            match ranges.last_mut() {
                Some(last) if range.0 <= last.1.saturating_add(1) => last.1 = last.1.max(range.1),
                _ => ranges.push(range),
            }
            let here = (row.get(2).map_err(sql)?, row.get(3).map_err(sql)?);
            if *place.get_or_insert_with(|| here.clone()) != here {
                checking.tell(format_args!("directory {dir} is in two places"));
            }
        }
        if ranges.is_empty() {
            checking.tell(format_args!("entries are in directory {dir}, which is not there"));
        }
        Ok(Parent { dir, ranges: Some(ranges) })
    }

    fn check_content(
        &self,
        entry: &EntryRow,
        content: &Content,
        lens: &mut Lens,
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
            let plain_len = lens.of(self, block)?;
            if plain_len.is_none_or(|it| offset.saturating_add(len) > it) {
                checking
                    .tell(format_args!("{what}, version {version}, reaches beyond block {block}"));
            }
        }
        Ok(())
    }

    /// What follows from the contents of versions and is kept apart.
    fn check_versions(&self, checking: &mut Checking<'_>) -> Result<()> {
        let query = "SELECT hash, extents, extra, version, EXISTS (SELECT 1 FROM entries \
                     WHERE entries.version = versions.version) FROM versions ORDER BY version";
        let mut statement = self.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        let query = "SELECT EXISTS (SELECT 1 FROM uses WHERE block = ?1 AND version = ?2)";
        let mut is_used = self.conn().prepare(query).map_err(sql)?;
        let mut uses = 0u64;
        while let Some(row) = rows.next().map_err(sql)? {
            checking.row()?;
            let version: VersionId = row.get(3).map_err(sql)?;
            if !row.get::<_, bool>(4).map_err(sql)? {
                checking.tell(format_args!("version {version} belongs to no entry"));
            }
            let columns =
                (row.get(0).map_err(sql)?, row.get(1).map_err(sql)?, row.get(2).map_err(sql)?);
            // One that cannot be read was told of with its entries.
            let Ok(content) = content_from(columns) else { continue };
            for block in blocks_of(&content) {
                match is_used.query_row((block, version), |row| row.get(0)).map_err(sql)? {
                    true => uses += 1,
                    false => checking.tell(format_args!(
                        "version {version}: its use of block {block} is not noted"
                    )),
                }
            }
            for kind in content.extra.xattrs.iter().filter_map(|it| AttributeKind::of(&it.0)) {
                if !self.may_have(kind)? {
                    let message = "it has an attribute of a kind that is said not to be there";
                    checking.tell(format_args!("version {version}: {message}"));
                }
            }
        }
        let query = "SELECT count(*) FROM uses";
        let count: u64 = self.conn().query_row(query, [], |row| row.get(0)).map_err(sql)?;
        match count == uses {
            true => Ok(()),
            false => self.check_uses(checking),
        }
    }

    /// Finds the uses that are none. Slow, and only where there are some.
    fn check_uses(&self, checking: &mut Checking<'_>) -> Result<()> {
        let query = "SELECT block, version FROM uses";
        let mut statement = self.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            checking.row()?;
            let (block, version): (u64, VersionId) =
                (row.get(0).map_err(sql)?, row.get(1).map_err(sql)?);
            let content = self.content(version);
            if !content.is_ok_and(|it| blocks_of(&it).contains(&block)) {
                checking.tell(format_args!(
                    "version {version} is said to use block {block}, and does not"
                ));
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
        let mut lens = Lens::default();
        while let Some(row) = rows.next().map_err(sql)? {
            checking.row()?;
            let block: u64 = row.get(1).map_err(sql)?;
            let (at, len): (u64, u64) = (row.get(2).map_err(sql)?, row.get(3).map_err(sql)?);
            let plain_len = lens.of(self, block)?;
            if len == 0 || plain_len.is_none_or(|it| at.saturating_add(len) > it) {
                let id: Vec<u8> = row.get(0).map_err(sql)?;
                let id = hex::encode(id);
                checking.tell(format_args!("chunk {id} reaches beyond block {block}"));
            }
        }
        Ok(())
    }
}

/// Plain lengths of blocks.
#[derive(Default)]
struct Lens(HashMap<u64, Option<u64>>);

impl Lens {
    fn of(&mut self, reader: &Reader, block: u64) -> Result<Option<u64>> {
        if let Some(len) = self.0.get(&block) {
            return Ok(*len);
        }
        if self.0.len() >= LENS_MAX {
            self.0.clear();
        }
        let query = "SELECT plain_len FROM blocks WHERE number = ?1";
        let mut statement = reader.conn().prepare_cached(query).map_err(sql)?;
        let len = statement.query_row([block], |row| row.get(0)).optional().map_err(sql)?;
        self.0.insert(block, len);
        Ok(len)
    }
}

/// The blocks that a content has bytes in.
fn blocks_of(content: &Content) -> BTreeSet<u64> {
    let blocks = content.extents.iter().filter_map(|it| match it {
        Extent::Data { block, .. } => Some(*block),
        Extent::Hole { .. } => None,
    });
    blocks.collect()
}

/// An entry's name and where it is, for a message.
struct Place<'a>(&'a EntryRow);

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let EntryRow { dir, name, first_run, .. } = self.0;
        write!(f, "'{}' in directory {dir} from run {first_run} on", Quoted(name))
    }
}
