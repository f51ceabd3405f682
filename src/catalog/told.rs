//! What manifests tell of the runs, and what the catalog says of them, in a form that can be
//! compared: sums of hashes, for the order of lines and of rows says nothing.
//!
//! A run's sums are over the names it has given, over the states it has stored under new numbers
//! (metadata, content, attributes), over the names of owners, and over its problems. Whatever a
//! damaged row of the catalog says otherwise, its sum is another one. Nothing is kept of an entry,
//! so a manifest of any length takes no more memory.

use std::collections::BTreeMap;
use std::path::Path;

use xxhash_rust::xxh3::xxh3_128;

use super::history::Lines;
use super::line::{Line, Put, Said};
use super::read::Reader;
use super::run::{RunId, VersionId};
use super::sql;
use crate::chunk::Digest;
use crate::entry::{Extra, Kind, Metadata, join};
use crate::error::{Quoted, Result};
use crate::volume::BlockId;

/// Entries of a run that are named, where they are not what its manifest says.
const NAMED_MAX: usize = 10;
/// Lines between two questions whether to go on.
const LINES_PER_QUESTION: u64 = 1024;

/// A sum that does not depend on an order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    sum: u128,
    /// How many were added.
    pub count: u64,
}

impl Sum {
    /// Adds an item.
    pub fn add(&mut self, item: &[u8]) {
        self.sum = self.sum.wrapping_add(xxh3_128(item));
        self.count += 1;
    }
}

/// What is told of one run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    names: Sum,
    states: Sum,
    owners: Sum,
    problems: Sum,
}

/// What is told of each run.
pub type History = BTreeMap<RunId, Told>;

impl Told {
    /// Adds a name that a run has given to a version.
    pub fn add_name(&mut self, text: &mut Vec<u8>, path: &[u8], version: VersionId) {
        text.clear();
        text.extend_from_slice(path);
        text.extend_from_slice(&version.to_le_bytes());
        self.names.add(text);
    }

    /// Adds a version, as [`put_state`] describes it.
    pub fn add_state(&mut self, text: &[u8]) {
        self.states.add(text);
    }

    /// Adds a line of a manifest. What has gone is not told: other entries live then than the run
    /// has counted.
    pub(super) fn add_line(&mut self, line: &Line<'_>, text: &mut Vec<u8>) -> Result<()> {
        match line {
            Line::Put(put) => {
                let said = put.put_state(text)?;
                self.add_state(text);
                self.add_name(text, &said.path, said.version);
            }
            Line::Link(link) => self.add_name(text, &link.path()?, link.version()?),
            Line::Owner(owner) => self.add_owner(owner.kind()?, owner.id, &owner.name()?),
            Line::Problem(it) => self.add_problem(&it.path()?, it.kind, it.message()),
            Line::Delete(gone) | Line::Empty(gone) => drop(gone.path()?),
            Line::End => {}
        }
        Ok(())
    }

    fn add_owner(&mut self, kind: &str, id: u32, name: &[u8]) {
        self.owners.add(&[kind.as_bytes(), b"\0", &id.to_le_bytes(), name].concat());
    }

    fn add_problem(&mut self, path: &[u8], kind: &str, message: &str) {
        self.problems.add(&[path, b"\0", kind.as_bytes(), b"\0", message.as_bytes()].concat());
    }
}

/// Everything of a version but its names. Block, offset and length of each extent; no block for a
/// hole.
pub fn put_state(
    text: &mut Vec<u8>,
    (version, meta): (VersionId, &Metadata),
    hash: Option<&Digest>,
    extents: impl Iterator<Item = Result<(Option<BlockId>, u64, u64)>>,
    extra: &Extra,
) -> Result<()> {
    text.clear();
    text.extend_from_slice(&version.to_le_bytes());
    text.push(meta.kind as u8);
    for number in [meta.mode, meta.uid, meta.gid] {
        text.extend_from_slice(&number.to_le_bytes());
    }
    for time in [meta.mtime, meta.ctime] {
        text.extend_from_slice(&time.secs.to_le_bytes());
        text.extend_from_slice(&time.nanos.to_le_bytes());
    }
    for number in [meta.size, meta.ino, meta.nlink, meta.rdev] {
        text.extend_from_slice(&number.to_le_bytes());
    }
    text.push(u8::from(hash.is_some()));
    text.extend_from_slice(hash.map_or(&[], |it| &it.0[..]));
    for extent in extents {
        let (block, offset, len) = extent?;
        text.push(1 + u8::from(block.is_some()));
        text.extend_from_slice(block.as_ref().map_or(&[], |it| &it.0[..]));
        text.extend_from_slice(&offset.to_le_bytes());
        text.extend_from_slice(&len.to_le_bytes());
    }
    text.push(0);
    text.extend_from_slice(&extra.encode());
    Ok(())
}

impl Put<'_> {
    fn put_state(&self, text: &mut Vec<u8>) -> Result<Said> {
        let said = self.read()?;
        let of = (said.version, &said.meta);
        put_state(text, of, said.hash.as_ref(), self.pieces(), &said.extra)?;
        Ok(said)
    }
}

/// What the lines of a manifest tell, which was surveyed and is whole. `check` is asked now and
/// then; what it fails with ends the work.
pub fn told_by(path: &Path, check: &dyn Fn() -> Result<()>) -> Result<Told> {
    let (mut told, mut text) = (Told::default(), Vec::new());
    each_line(path, check, &mut |line| told.add_line(line, &mut text))?;
    Ok(told)
}

fn each_line(
    path: &Path,
    check: &dyn Fn() -> Result<()>,
    each: &mut dyn FnMut(&Line<'_>) -> Result<()>,
) -> Result<()> {
    let mut lines = Lines::open(path)?;
    let mut count = 0u64;
    while let Some(line) = lines.next_line()? {
        let result = Line::parse(line).and_then(|it| each(&it));
        result.map_err(|e| lines.at(e))?;
        count += 1;
        if count.is_multiple_of(LINES_PER_QUESTION) {
            check()?;
        }
    }
    Ok(())
}

impl Reader {
    /// Adds what the catalog says of owners and problems.
    pub(super) fn put_told(&self, history: &mut History) -> Result<()> {
        let mut statement =
            self.conn().prepare("SELECT first_run, kind, id, name FROM owners").map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let kind: String = row.get(1).map_err(sql)?;
            let name: Vec<u8> = row.get(3).map_err(sql)?;
            let told = history.entry(row.get(0).map_err(sql)?).or_default();
            told.add_owner(&kind, row.get(2).map_err(sql)?, &name);
        }
        let query = "SELECT run, path, kind, message FROM run_problems";
        let mut statement = self.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let path: Vec<u8> = row.get(1).map_err(sql)?;
            let (kind, message): (String, String) =
                (row.get(2).map_err(sql)?, row.get(3).map_err(sql)?);
            let told = history.entry(row.get(0).map_err(sql)?).or_default();
            told.add_problem(&path, &kind, &message);
        }
        Ok(())
    }

    /// Says what the manifest of a run tells otherwise than the catalog; `None` if nothing.
    pub fn difference(
        &self,
        run: RunId,
        (said, here): (&Told, &Told),
        manifest: &Path,
        check: &dyn Fn() -> Result<()>,
    ) -> Result<Option<String>> {
        if said == here {
            return Ok(None);
        }
        let mut parts = Vec::new();
        for (word, said, here) in [
            ("names", said.names, here.names),
            ("metadata or contents", said.states, here.states),
            ("owners", said.owners, here.owners),
            ("problems", said.problems, here.problems),
        ] {
            if said != here {
                parts.push(word);
            }
        }
        let mut named = Vec::new();
        let mut left_out = 0u64;
        each_line(manifest, check, &mut |line| {
            let path = match line {
                Line::Put(put) => put.path()?,
                Line::Link(link) => link.path()?,
                _ => return Ok(()),
            };
            if !self.is_as_told(run, line, &path).unwrap_or(false) {
                match named.len() < NAMED_MAX {
                    true => named.push(format!("'{}'", Quoted(&path))),
                    false => left_out += 1,
                }
            }
            Ok(())
        })?;
        let more = if left_out > 0 { format!(" and {left_out} more") } else { String::new() };
        let of = if named.is_empty() { String::new() } else { format!(" of {}", named.join(", ")) };
        Ok(Some(format!(
            "catalog: run {run}: {}{of}{more} differ from its manifest",
            parts.join(", ")
        )))
    }

    /// Whether the catalog has an entry as a line says.
    fn is_as_told(&self, run: RunId, line: &Line<'_>, path: &[u8]) -> Result<bool> {
        let row = self.run(run)?;
        let mut entry = Some(self.root(&row)?);
        if !path.is_empty() {
            for name in path.split(|it| *it == b'/') {
                let dir = entry.and_then(|it| it.child);
                let Some(dir) = dir else { return Ok(false) };
                entry = self.lookup(run, dir, name)?;
            }
        }
        let Some(entry) = entry else { return Ok(false) };
        let (version, put) = match line {
            Line::Put(put) => (put.version()?, Some(put)),
            Line::Link(link) => (link.version()?, None),
            _ => return Ok(false),
        };
        if entry.version != version || entry.first_run != run {
            return Ok(false);
        }
        let Some(put) = put else { return Ok(true) };
        let (mut said, mut here) = (Vec::new(), Vec::new());
        put.put_state(&mut said)?;
        let content = self.content(entry.version)?;
        let extents = content.extents.iter().map(|it| self.named(it));
        let of = (entry.version, &entry.meta);
        put_state(&mut here, of, content.hash.as_ref(), extents, &content.extra)?;
        Ok(said == here)
    }

    fn named(&self, extent: &super::Extent) -> Result<(Option<BlockId>, u64, u64)> {
        Ok(match *extent {
            super::Extent::Hole { len } => (None, 0, len),
            super::Extent::Data { block, offset, len } => {
                (Some(self.block_id(block)?), offset, len)
            }
        })
    }
}

/// What runs counted, held against the entries that live in them.
#[derive(Default)]
pub(super) struct Alive(BTreeMap<Vec<u8>, Vec<RunCounts>>);

/// A run, what it counted, and how what lives changes with it: entries, directories, files, bytes.
type RunCounts = (RunId, [i64; 4], [i64; 4]);

impl Alive {
    /// The runs of each source, with what they counted.
    pub fn read(reader: &Reader) -> Result<Alive> {
        let query = "SELECT name, run, added + modified + unchanged, \
                     dirs_added + dirs_modified + dirs_unchanged, files, bytes \
                     FROM runs JOIN sources ON number = source ORDER BY run";
        let mut statement = reader.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        let mut alive = Alive::default();
        while let Some(row) = rows.next().map_err(sql)? {
            let mut counts = [0; 4];
            for (at, count) in (2..).zip(&mut counts) {
                *count = row.get(at).map_err(sql)?;
            }
            let source: Vec<u8> = row.get(0).map_err(sql)?;
            let runs = alive.0.entry(source).or_default();
            runs.push((row.get(1).map_err(sql)?, counts, [0; 4]));
        }
        Ok(alive)
    }

    /// Takes an entry that lives from one run to another. Says whether the first is a run.
    pub fn add(&mut self, source: &[u8], (first, last): (RunId, RunId), meta: &Metadata) -> bool {
        let Some(runs) = self.0.get_mut(source) else { return false };
        let is_file = i64::from(meta.kind == Kind::File);
        let is_dir = i64::from(meta.kind == Kind::Dir);
        let bytes = meta.size.cast_signed().wrapping_mul(is_file);
        let here = [1 - is_dir, is_dir, is_file, bytes];
        let (from, to) =
            (runs.partition_point(|it| it.0 < first), runs.partition_point(|it| it.0 <= last));
        let is_run = runs.get(from).is_some_and(|it| it.0 == first);
        let mut change = |at: usize, sign: i64| {
            for (all, one) in runs.get_mut(at).iter_mut().flat_map(|it| it.2.iter_mut()).zip(here) {
                *all = all.wrapping_add(one.wrapping_mul(sign));
            }
        };
        change(from, 1);
        change(to, -1);
        is_run
    }

    /// Tells of runs in which other entries live than they counted.
    pub fn finish(&self, tell: &mut dyn FnMut(String)) {
        for runs in self.0.values() {
            let mut here = [0i64; 4];
            for (run, said, change) in runs {
                here.iter_mut().zip(change).for_each(|(all, it)| *all = all.wrapping_add(*it));
                if here != *said {
                    let [entries, dirs, files, bytes] = here;
                    let [said_entries, said_dirs, said_files, said_bytes] = *said;
                    tell(format!(
                        "run {run} has {entries} entries in {dirs} directories, with {files} files \
                         of {bytes} bytes, and has counted {said_entries} in {said_dirs}, \
                         {said_files} of {said_bytes}"
                    ));
                }
            }
        }
    }
}

/// The path of an entry of a directory, or of a root.
pub(super) fn path_in(dir: Option<&[u8]>, name: &[u8]) -> Vec<u8> {
    dir.map_or_else(Vec::new, |dir| join(dir, name))
}
