//! The pass through the entries, each with its content: what is wrong with one, and what has to add
//! up over all of them.
//!
//! What is kept elsewhere too is summed up without an order and compared at the end, in place of a
//! look-up for each row. Only where sums differ each row is looked for, so that it can be named.

use super::brief::AttributeKind;
use super::check_rows::{Blocks, Checking, Place, blocks_of};
use super::extent::{self, Content, Extent};
use super::meta::{DirNames, dir_name};
use super::number_set::NumberSet;
use super::numbers::{Numbered, last_given};
use super::read::{ENTRY_COLUMNS, EntryRow, Reader, content_from, entry_from};
use super::run::{DirId, RunId, VersionId};
use super::told::{Alive, History, Sum, path_in, put_state};
use super::{OPEN, sql};
use crate::chunk::Digest;
use crate::entry::{Extra, Kind};
use crate::error::{Quoted, Result};

/// The rows that one directory number has.
struct Parent {
    dir: DirId,
    /// Ranges of runs in which it lives, in order, joined where they touch; `None` for what is
    /// above all sources.
    ranges: Option<Vec<(RunId, RunId)>>,
    /// Its source and its path; `None` for what is above all sources, or is nowhere.
    place: Option<DirPlace>,
}

/// Source and path of a directory.
type DirPlace = (Vec<u8>, Vec<u8>);

/// What the pass through the entries has come to.
#[derive(Default)]
struct Pass {
    /// Versions that have entries, and those of several names that were summed up.
    versions: NumberSet,
    several: NumberSet,
    /// How many of the versions have a row of their own.
    with_content: u64,
    /// The uses of blocks that follow from the contents.
    uses: Sum,
    blocks: Blocks,
    alive: Alive,
    history: History,
    text: Vec<u8>,
    /// Kinds of attributes that were asked for.
    kinds: Vec<(AttributeKind, bool)>,
}

impl Reader {
    pub(super) fn check_entries(&self, checking: &mut Checking<'_>) -> Result<History> {
        let last_run = last_given(self.conn(), Numbered::Run).unwrap_or(OPEN);
        let query = format!(
            "SELECT {ENTRY_COLUMNS}, of_hash, of_extents, of_extra, of_version FROM entries \
             LEFT JOIN (SELECT version AS of_version, hash AS of_hash, extents AS of_extents, \
             extra AS of_extra FROM versions) ON of_version = version ORDER BY dir, name, first_run"
        );
        let mut statement = self.conn().prepare(&query).map_err(sql)?;
        let first_of_content = ENTRY_COLUMNS.split(',').count();
        let mut rows = statement.query([]).map_err(sql)?;
        let mut pass = Pass { alive: Alive::read(self)?, ..Pass::default() };
        let (mut before, mut parent) = (None::<EntryRow>, None::<Parent>);
        let mut names = DirNames::default();
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
                parent = Some(self.parent(entry.dir, &mut names, checking)?);
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
            let column = |at: usize| -> Result<Option<&[u8]>> {
                let value = row.get_ref(first_of_content + at).map_err(sql)?;
                value.as_blob_or_null().map_err(|e| sql(e.into()))
            };
            let has_row =
                row.get::<_, Option<VersionId>>(first_of_content + 3).map_err(sql)?.is_some();
            match content_of([column(0)?, column(1)?, column(2)?]) {
                Ok(content) => {
                    self.check_content(&entry, &content, &mut pass.blocks, checking)?;
                    let place = parent.as_ref().and_then(|it| it.place.as_ref());
                    self.sum_up(&mut pass, (&entry, place), (&content, has_row), checking)?;
                }
                Err(e) => {
                    checking.tell(format_args!("{what}: {e}"));
                    pass.versions.insert(entry.version.cast_unsigned());
                }
            }
            before = Some(entry);
        }
        pass.alive.finish(&mut |it| checking.tell(it));
        self.check_versions(&pass, checking)?;
        let mut history = pass.history;
        self.put_told(&mut history)?;
        Ok(history)
    }

    /// Adds an entry to what is compared when all have been seen.
    fn sum_up(
        &self,
        pass: &mut Pass,
        (entry, place): (&EntryRow, Option<&DirPlace>),
        (content, has_row): (&Content, bool),
        checking: &mut Checking<'_>,
    ) -> Result<()> {
        let version = entry.version;
        let is_new = !pass.versions.contains(version.cast_unsigned());
        pass.versions.insert(version.cast_unsigned());
        if is_new {
            pass.with_content += u64::from(has_row);
            for block in blocks_of(content) {
                pass.uses.add(&use_of(block, version));
            }
            for kind in content.extra.xattrs.iter().filter_map(|it| AttributeKind::of(&it.0)) {
                let known = pass.kinds.iter().find(|it| it.0 == kind).map(|it| it.1);
                let may_have = known.map_or_else(|| self.may_have(kind), Ok)?;
                if known.is_none() {
                    pass.kinds.push((kind, may_have));
                }
                if !may_have {
                    let message = "it has an attribute of a kind that is said not to be there";
                    checking.tell(format_args!("version {version}: {message}"));
                }
            }
        }
        let has_several = entry.meta.kind != Kind::Dir && entry.meta.nlink > 1;
        if !is_new && self.entry_of_version(version)?.is_some_and(|it| it.meta != entry.meta) {
            let what = Place(entry);
            checking
                .tell(format_args!("{what}: other names of version {version} have other metadata"));
        }
        let source = if entry.dir == 0 { Some(&entry.name) } else { place.map(|it| &it.0) };
        let Some(source) = source else { return Ok(()) };
        let runs = (entry.first_run, entry.last_run);
        if !pass.alive.add(source, runs, &entry.meta) {
            let (what, run) = (Place(entry), entry.first_run);
            checking.tell(format_args!("{what}: there is no run {run} of its source"));
        }
        let told = pass.history.entry(entry.first_run).or_default();
        let path = path_in(place.map(|it| &*it.1), &entry.name);
        told.add_name(&mut pass.text, &path, version);
        // A version of several names is told where it was first seen, and once.
        let is_told = match has_several {
            false => is_new,
            true => {
                let is_first = self.first_run_of(version)? == Some(entry.first_run);
                let is_told = is_first && !pass.several.contains(version.cast_unsigned());
                if is_told {
                    pass.several.insert(version.cast_unsigned());
                }
                is_told
            }
        };
        if is_told {
            let blocks = &mut pass.blocks;
            let extents = content.extents.iter().map(|it| match *it {
                Extent::Hole { len } => Ok((None, 0, len)),
                Extent::Data { block, offset, len } => {
                    Ok((blocks.of(self, block)?.map(|it| it.1), offset, len))
                }
            });
            let of = (version, &entry.meta);
            put_state(&mut pass.text, of, content.hash.as_ref(), extents, &content.extra)?;
            told.add_state(&pass.text);
        }
        Ok(())
    }

    /// When a directory lives. Tells if it is nowhere, or in two places.
    fn parent(
        &self,
        dir: DirId,
        names: &mut DirNames,
        checking: &mut Checking<'_>,
    ) -> Result<Parent> {
        if dir == 0 {
            return Ok(Parent { dir, ranges: None, place: None });
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
        let place = dir_name(self.conn(), dir, names);
        let place = place.ok().map(|it| (it.0.to_vec(), it.1.to_vec()));
        Ok(Parent { dir, ranges: Some(ranges), place })
    }

    /// What follows from the contents of versions and is kept apart. Sums say whether all is right;
    /// only where they differ each row is looked for.
    fn check_versions(&self, pass: &Pass, checking: &mut Checking<'_>) -> Result<()> {
        let query = "SELECT count(*) FROM versions";
        let count: u64 = self.conn().query_row(query, [], |row| row.get(0)).map_err(sql)?;
        let mut uses = Sum::default();
        let mut statement = self.conn().prepare("SELECT block, version FROM uses").map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            checking.row()?;
            uses.add(&use_of(row.get(0).map_err(sql)?, row.get(1).map_err(sql)?));
        }
        drop(rows);
        if (count, uses) == (pass.with_content, pass.uses) {
            return Ok(());
        }
        let query = "SELECT hash, extents, extra, version FROM versions";
        let mut statement = self.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        let query = "SELECT EXISTS (SELECT 1 FROM uses WHERE block = ?1 AND version = ?2)";
        let mut is_used = self.conn().prepare(query).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            checking.row()?;
            let version: VersionId = row.get(3).map_err(sql)?;
            if !pass.versions.contains(version.cast_unsigned()) {
                checking.tell(format_args!("version {version} belongs to no entry"));
            }
            let columns =
                (row.get(0).map_err(sql)?, row.get(1).map_err(sql)?, row.get(2).map_err(sql)?);
            // One that cannot be read was told of with its entries.
            let Ok(content) = content_from(columns) else { continue };
            for block in blocks_of(&content) {
                let is_used = is_used.query_row((block, version), |row| row.get(0));
                if !is_used.map_err(sql)? {
                    checking.tell(format_args!(
                        "version {version}: its use of block {block} is not noted"
                    ));
                }
            }
        }
        self.check_uses(checking)
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
}

/// A use of a block, as it is summed up.
fn use_of(block: u64, version: VersionId) -> [u8; 16] {
    (u128::from(block) << 64 | u128::from(version.cast_unsigned())).to_le_bytes()
}

/// A content from its columns.
fn content_of([hash, extents, extra]: [Option<&[u8]>; 3]) -> Result<Content> {
    Ok(Content {
        hash: hash.map(Digest::from_slice).transpose()?,
        extents: extents.map_or_else(|| Ok(Vec::new()), extent::decode)?,
        extra: extra.map_or_else(|| Ok(Extra::default()), Extra::decode)?,
    })
}
