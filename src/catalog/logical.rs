//! The logical dump: what a rebuild from the volumes has to bring back, as JSON lines.
//!
//! Two catalogs that know the same have the same dump, byte for byte: the order of the lines
//! follows from what they say, and numbers that belong to one database (of blocks, directories,
//! sources) are not in it. What follows from the rest is not said but checked, and rows that
//! nothing leads to are an error: a dump is whole, or it has no last line. Lines go out as rows
//! come in; remembered are a page for each directory on the way down and a bounded number of block
//! names. The format is in FORMAT.md.

use std::collections::{BTreeSet, VecDeque};
use std::io::Write;
use std::num::NonZeroUsize;

use lru::LruCache;
use rusqlite::types::ValueRef;
use rusqlite::{OptionalExtension, Row};

use super::brief::AttributeKind;
use super::extent::{Content, Extent};
use super::json::{Object, put_plain};
use super::manifest::{put_extents, put_extra};
use super::numbers::{Numbered, last_given};
use super::read::{
    ENTRY_COLUMNS, EntryRow, Reader, content_columns, content_from, entry_from, in_order,
};
use super::run::{DirId, RunId, VersionId};
use super::{OPEN, schema, sql};
use crate::chunk::Digest;
use crate::chunk::frame::get_frames;
use crate::error::{Error, Quoted, Result};
use crate::sys::Time;
use crate::volume::BlockId;
use crate::wire::Reader as WireReader;

/// Version of the dump's format.
const VERSION: u32 = 1;
/// What lines there are between the first and the last, in their order.
const OPS: [&str; 10] =
    ["setting", "volume", "run", "tag", "problem", "owner", "entry", "version", "block", "chunk"];
/// Block names that are remembered.
const NAMES_MAX: usize = 1 << 14;
/// Rows of a page near the root of the walk, and further down.
const PAGE_ROWS: usize = 512;
const DEEP_PAGE_ROWS: usize = 16;
/// From how many directories down pages are short.
const DEEP: usize = 16;

impl Reader {
    /// Writes the logical dump of the catalog as it is when the first line is written, whatever is
    /// committed meanwhile.
    pub fn write_logical_dump(&self, out: &mut dyn Write) -> Result<()> {
        let transaction = self.conn().unchecked_transaction().map_err(sql)?;
        let names = NonZeroUsize::MIN.saturating_add(NAMES_MAX - 1);
        let mut dump = Dump {
            reader: self,
            lines: Lines { out, line: Vec::new(), counts: OPS.map(|op| (op, 0)) },
            blocks: Blocks { reader: self, names: LruCache::new(names) },
        };
        dump.whole()?;
        transaction.finish().map_err(sql)
    }

    /// Whether a directory also has another place than this.
    fn is_elsewhere(&self, child: DirId, entry: &EntryRow) -> Result<bool> {
        let query = "SELECT EXISTS (SELECT 1 FROM entries WHERE child = ?1 \
                     AND (dir, name) <> (?2, ?3))";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        statement.query_row((child, entry.dir, &entry.name), |row| row.get(0)).map_err(sql)
    }

    fn count_of(&self, table: &str) -> Result<u64> {
        let query = format!("SELECT count(*) FROM {table}");
        self.conn().query_row(&query, [], |row| row.get(0)).map_err(sql)
    }
}

/// The lines as they go out.
struct Lines<'a> {
    out: &'a mut dyn Write,
    line: Vec<u8>,
    counts: [(&'static str, u64); OPS.len()],
}

impl Lines<'_> {
    fn put(&mut self, op: &str, fill: impl FnOnce(&mut Object<'_>) -> Result<()>) -> Result<()> {
        self.line.clear();
        let mut object = Object::begin(&mut self.line);
        object.plain("op", op);
        fill(&mut object)?;
        object.end();
        self.line.push(b'\n');
        if let Some((_, count)) = self.counts.iter_mut().find(|it| it.0 == op) {
            *count += 1;
        }
        self.out.write_all(&self.line).map_err(|e| Error::io("writing the dump", e))
    }
}

/// Names of blocks by their numbers.
struct Blocks<'a> {
    reader: &'a Reader,
    names: LruCache<u64, BlockId>,
}

impl Blocks<'_> {
    fn name(&mut self, number: u64) -> Result<BlockId> {
        if let Some(name) = self.names.get(&number) {
            return Ok(*name);
        }
        let query = "SELECT id FROM blocks WHERE number = ?1";
        let mut statement = self.reader.conn().prepare_cached(query).map_err(sql)?;
        let id: Option<Vec<u8>> =
            statement.query_row([number], |row| row.get(0)).optional().map_err(sql)?;
        let missing = || Error::corrupt(format!("block {number} is missing"));
        let name = Digest::from_slice(&id.ok_or_else(missing)?)?;
        self.names.put(number, name);
        Ok(name)
    }
}

struct Dump<'a> {
    reader: &'a Reader,
    lines: Lines<'a>,
    blocks: Blocks<'a>,
}

impl Dump<'_> {
    fn whole(&mut self) -> Result<()> {
        self.lines.put("dump", |line| {
            line.plain("format", "raidtape-catalog");
            line.number("version", VERSION);
            Ok(())
        })?;
        self.settings()?;
        let query = "SELECT number, uuid, path, status, reserve_percent FROM volumes \
                     ORDER BY number";
        self.rows("volume", query)?;
        self.runs()?;
        self.rows("tag", "SELECT run, tag FROM run_tags ORDER BY run, tag")?;
        let query = "SELECT run, n, path, kind, message FROM run_problems ORDER BY run, n";
        self.rows("problem", query)?;
        let query = "SELECT kind, id, first_run, name FROM owners ORDER BY kind, id, first_run";
        self.rows("owner", query)?;
        self.entries()?;
        self.versions()?;
        self.all_blocks()?;
        self.chunks()?;
        let counts = self.lines.counts;
        self.lines.put("end", |line| {
            counts.iter().for_each(|(op, count)| line.number(op, count));
            Ok(())
        })
    }

    /// A line for each row, a key for each column: a blob is a name, and what is null is left out.
    fn rows(&mut self, op: &str, query: &str) -> Result<()> {
        let mut statement = self.reader.conn().prepare(query).map_err(sql)?;
        let keys: Vec<String> = statement.column_names().map(str::to_owned).collect();
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            self.lines.put(op, |line| put_columns(line, row, &keys, 0))?;
        }
        Ok(())
    }

    fn settings(&mut self) -> Result<()> {
        // Not the name of this one database, and not the numbers that are not said below.
        let query = "SELECT k AS key, v AS value FROM settings WHERE k NOT IN ('catalog_id', \
                     'last_run', 'last_version', 'last_dir', 'last_block', 'last_manifest') \
                     ORDER BY k";
        self.rows("setting", query)?;
        // As they count: a catalog that keeps none has those in use.
        for (key, what) in [("last_run", Numbered::Run), ("last_version", Numbered::Version)] {
            let last = last_given(self.reader.conn(), what)?;
            self.lines.put("setting", |line| {
                line.plain("key", key);
                line.plain("value", last);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn runs(&mut self) -> Result<()> {
        let comment = match schema::version(self.reader.conn())? {
            1 => "''",
            _ => "comment",
        };
        let query = format!(
            "SELECT started_s, started_n, finished_s, finished_n, run, uuid, name AS source, path, \
             host, program, {comment} AS comment, added, modified, deleted, unchanged, dirs_added, \
             dirs_modified, dirs_deleted, dirs_unchanged, files, bytes, bytes_read, bytes_stored, \
             problems FROM runs LEFT JOIN sources ON number = source ORDER BY run"
        );
        let mut statement = self.reader.conn().prepare(&query).map_err(sql)?;
        let keys: Vec<String> = statement.column_names().map(str::to_owned).collect();
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let (run, source): (RunId, Option<Vec<u8>>) =
                (row.get(4).map_err(sql)?, row.get(6).map_err(sql)?);
            if source.is_none() {
                return Err(Error::corrupt(format!("catalog: the source of run {run} is missing")));
            }
            self.lines.put("run", |line| {
                for (key, at) in [("started", 0), ("finished", 2)] {
                    let (secs, nanos) = (row.get(at).map_err(sql)?, row.get(at + 1).map_err(sql)?);
                    line.time(key, Time { secs, nanos });
                }
                put_columns(line, row, &keys, 4)
            })?;
        }
        Ok(())
    }

    /// Entries by source and path, each name's in order of the runs; below a directory come the
    /// entries that it had, before the next directory of the same name.
    fn entries(&mut self) -> Result<()> {
        let count = self.reader.count_of("entries")?;
        let (mut seen, mut source, mut path) = (0, Vec::new(), Vec::new());
        let mut levels = vec![Level::new(0, 0, 0)];
        while let Some(level) = levels.last_mut() {
            path.truncate(level.path_len);
            let place = |e: Error| {
                let (path, source) = (Quoted(&path), Quoted(&source));
                e.context(format!("catalog: directory '{path}' of source '{source}'"))
            };
            let Some((entry, since)) = level.next(self.reader).map_err(place)? else {
                levels.pop();
                continue;
            };
            seen += 1;
            let is_elsewhere = match entry.child {
                Some(child) => self.reader.is_elsewhere(child, &entry).map_err(place)?,
                None => false,
            };
            // Of a name that is one directory, another, and the first again, rows come twice.
            if is_elsewhere || seen > count {
                let name = Quoted(&entry.name);
                return Err(place(Error::corrupt(format!("'{name}' in it is elsewhere too"))));
            }
            if entry.dir == 0 {
                source.clone_from(&entry.name);
            } else {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(&entry.name);
            }
            self.lines.put("entry", |line| {
                put_entry(line, &source, &path, &entry, since);
                Ok(())
            })?;
            // Not once more where only its metadata is another.
            if let Some(child) = entry.child.filter(|_| since == Some(entry.first_run)) {
                let depth = levels.len();
                levels.push(Level::new(child, path.len(), depth));
            }
        }
        match count - seen {
            0 => Ok(()),
            lost => Err(Error::corrupt(format!(
                "catalog: {lost} entries are in directories that are not there"
            ))),
        }
    }

    fn versions(&mut self) -> Result<()> {
        let mut used = 0;
        let query = "SELECT hash, extents, extra, version, extents IS NOT NULL FROM versions \
                     ORDER BY version";
        let mut statement = self.reader.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let version: VersionId = row.get(3).map_err(sql)?;
            let has_extents: bool = row.get(4).map_err(sql)?;
            let context = |e: Error| e.context(format!("catalog: version {version}"));
            let content = content_columns(row).map_err(sql).and_then(content_from);
            let content = content.map_err(context)?;
            used += self.check_version(version, &content).map_err(context)?;
            let blocks = &mut self.blocks;
            let put = self.lines.put("version", |line| {
                line.number("version", version);
                if let Some(hash) = &content.hash {
                    line.plain("hash", hash);
                }
                if has_extents {
                    put_extents(line.key("extents"), &content.extents, &mut |it| blocks.name(it))?;
                }
                put_extra(line, &content.extra);
                Ok(())
            });
            put.map_err(context)?;
        }
        self.check_count("uses", used)
    }

    /// Checks what follows from a version's content and is kept apart; gives in how many blocks it
    /// has bytes.
    fn check_version(&self, version: VersionId, content: &Content) -> Result<u64> {
        let blocks = content.extents.iter().filter_map(|it| match it {
            Extent::Data { block, .. } => Some(*block),
            Extent::Hole { .. } => None,
        });
        let blocks: BTreeSet<u64> = blocks.collect();
        let query = "SELECT EXISTS (SELECT 1 FROM uses WHERE block = ?1 AND version = ?2)";
        let mut statement = self.reader.conn().prepare_cached(query).map_err(sql)?;
        for block in &blocks {
            if !statement.query_row((block, version), |row| row.get(0)).map_err(sql)? {
                let message = format!("its use of block {block} is not noted");
                return Err(Error::corrupt(message));
            }
        }
        for kind in content.extra.xattrs.iter().filter_map(|it| AttributeKind::of(&it.0)) {
            if !self.reader.may_have(kind)? {
                let message = "it has an attribute of a kind that is said not to be there";
                return Err(Error::corrupt(message));
            }
        }
        Ok(blocks.len() as u64)
    }

    /// Checks that a table has no rows that nothing leads to.
    fn check_count(&self, table: &str, seen: u64) -> Result<()> {
        let count = self.reader.count_of(table)?;
        match count == seen {
            true => Ok(()),
            false => Err(Error::corrupt(format!(
                "catalog: {count} rows of {table}, of which {seen} belong to something"
            ))),
        }
    }

    fn all_blocks(&mut self) -> Result<()> {
        let (mut copies, mut current) = (0, None::<Block>);
        let query = "SELECT id, stored_len, plain_len, frames, number FROM blocks ORDER BY id";
        let mut statement = self.reader.conn().prepare(query).map_err(sql)?;
        let query = "SELECT uuid FROM block_copies LEFT JOIN volumes ON number = volume \
                     WHERE block = ?1";
        let mut copies_of = self.reader.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let id: Vec<u8> = row.get(0).map_err(sql)?;
            let id = Digest::from_slice(&id)?;
            if let Some(done) = current.take_if(|it| it.id != id) {
                done.put(&mut self.lines)?;
            }
            let block = current.get_or_insert_with(|| Block::new(id));
            let columns = (row.get(1), row.get(2), row.get(3));
            block.forms.insert((
                columns.0.map_err(sql)?,
                columns.1.map_err(sql)?,
                columns.2.map_err(sql)?,
            ));
            let number: u64 = row.get(4).map_err(sql)?;
            let mut volumes = copies_of.query([number]).map_err(sql)?;
            while let Some(row) = volumes.next().map_err(sql)? {
                copies += 1;
                let missing = || Error::corrupt(format!("catalog: a volume of {id} is missing"));
                let volume: Option<String> = row.get(0).map_err(sql)?;
                block.volumes.insert(volume.ok_or_else(missing)?);
            }
        }
        if let Some(done) = current {
            done.put(&mut self.lines)?;
        }
        self.check_count("block_copies", copies)
    }

    fn chunks(&mut self) -> Result<()> {
        let query = "SELECT id, block, at, len FROM chunks ORDER BY id";
        let mut statement = self.reader.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let id: Vec<u8> = row.get(0).map_err(sql)?;
            let id = Digest::from_slice(&id)?;
            let block = self.blocks.name(row.get(1).map_err(sql)?);
            let block = block.map_err(|e| e.context(format!("catalog: chunk {id}")))?;
            let (at, len): (u64, u64) = (row.get(2).map_err(sql)?, row.get(3).map_err(sql)?);
            self.lines.put("chunk", |line| {
                line.plain("id", id);
                line.plain("block", block);
                line.number("at", at);
                line.number("len", len);
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// A block by its name: what is stored again after damage has a further number, and is the same.
struct Block {
    id: BlockId,
    /// Lengths and frame table; one for all numbers, unless something is wrong.
    forms: BTreeSet<(u64, u64, Vec<u8>)>,
    volumes: BTreeSet<String>,
}

impl Block {
    fn new(id: BlockId) -> Block {
        Block { id, forms: BTreeSet::new(), volumes: BTreeSet::new() }
    }

    fn put(&self, lines: &mut Lines<'_>) -> Result<()> {
        let context = |e: Error| e.context(format!("catalog: block {}", self.id));
        for (stored_len, plain_len, frames) in &self.forms {
            let put = lines.put("block", |line| {
                line.plain("id", self.id);
                line.number("stored_len", stored_len);
                line.number("plain_len", plain_len);
                put_frames(line, frames)?;
                put_list(line.key("volumes"), &self.volumes, put_plain);
                Ok(())
            });
            put.map_err(context)?;
        }
        Ok(())
    }
}

fn put_frames(line: &mut Object<'_>, table: &[u8]) -> Result<()> {
    let mut reader = WireReader::new(table, "frame table");
    let frames = get_frames(&mut reader)?;
    reader.finish()?;
    put_list(line.key("frames"), &frames, |out, it| {
        let (codec, stored, plain, check) =
            (it.codec.as_str(), it.stored_len, it.plain_len, it.check);
        // A buffer in memory takes everything.
        let _ = write!(out, "[\"{codec}\",{stored},{plain},\"{check:016x}\"]");
    });
    Ok(())
}

fn put_list<T>(
    out: &mut Vec<u8>,
    list: impl IntoIterator<Item = T>,
    one: impl Fn(&mut Vec<u8>, T),
) {
    out.push(b'[');
    for (n, it) in list.into_iter().enumerate() {
        if n > 0 {
            out.push(b',');
        }
        one(out, it);
    }
    out.push(b']');
}

/// Adds the columns of a row from the one at `from` on.
fn put_columns(line: &mut Object<'_>, row: &Row<'_>, keys: &[String], from: usize) -> Result<()> {
    for (at, key) in keys.iter().enumerate().skip(from) {
        match row.get_ref(at).map_err(sql)? {
            ValueRef::Null => {}
            ValueRef::Integer(number) => line.number(key, number),
            ValueRef::Blob(name) => line.name(key, name),
            ValueRef::Text(text) => match std::str::from_utf8(text) {
                Ok(text) => line.text(key, text),
                Err(_) => return Err(Error::corrupt(format!("catalog: {key} is no text"))),
            },
            ValueRef::Real(_) => {
                return Err(Error::corrupt(format!("catalog: {key} is no whole number")));
            }
        }
    }
    Ok(())
}

fn put_entry(
    line: &mut Object<'_>,
    source: &[u8],
    path: &[u8],
    entry: &EntryRow,
    since: Option<RunId>,
) {
    let meta = &entry.meta;
    line.name("source", source);
    line.name("path", path);
    match entry.last_run {
        OPEN => line.number("runs", format_args!("[{},null]", entry.first_run)),
        last => line.number("runs", format_args!("[{},{last}]", entry.first_run)),
    }
    if let Some(since) = since {
        line.number("since", since);
    }
    line.plain("kind", meta.kind.as_str());
    line.number("version", entry.version);
    line.number("mode", meta.mode);
    line.number("uid", meta.uid);
    line.number("gid", meta.gid);
    line.number("size", meta.size);
    line.time("mtime", meta.mtime);
    line.time("ctime", meta.ctime);
    line.number("ino", meta.ino);
    line.number("nlink", meta.nlink);
    line.number("rdev", meta.rdev);
    if let Some(data_len) = entry.data_len {
        line.number("data_len", data_len);
    }
}

/// A directory on the way down: its entries of all runs in order of name and run, read in pages.
struct Level {
    dir: DirId,
    /// Length of its path.
    path_len: usize,
    page: VecDeque<EntryRow>,
    limit: usize,
    /// Name and first run of the last entry that was read.
    after: (Vec<u8>, RunId),
    is_read: bool,
    /// The directory that was told of last: its name, its number, and since when it is there.
    last: Option<(Vec<u8>, DirId, RunId)>,
}

impl Level {
    fn new(dir: DirId, path_len: usize, depth: usize) -> Level {
        let limit = if depth < DEEP { PAGE_ROWS } else { DEEP_PAGE_ROWS };
        let after = (Vec::new(), RunId::MIN);
        Level { dir, path_len, page: VecDeque::new(), limit, after, is_read: false, last: None }
    }

    /// The next entry; of a directory also the run since which it is this one.
    fn next(&mut self, reader: &Reader) -> Result<Option<(EntryRow, Option<RunId>)>> {
        if self.page.is_empty() && !self.is_read {
            self.read(reader)?;
        }
        let Some(entry) = self.page.pop_front() else { return Ok(None) };
        let since = entry.child.map(|child| match &self.last {
            Some((name, dir, since)) if *name == entry.name && *dir == child => *since,
            _ => {
                self.last = Some((entry.name.clone(), child, entry.first_run));
                entry.first_run
            }
        });
        Ok(Some((entry, since)))
    }

    fn read(&mut self, reader: &Reader) -> Result<()> {
        let query = format!(
            "SELECT {ENTRY_COLUMNS} FROM entries \
             WHERE dir = ?1 AND (name, first_run) > (?2, ?3) ORDER BY name, first_run LIMIT ?4"
        );
        let mut statement = reader.conn().prepare_cached(&query).map_err(sql)?;
        let limit = i64::try_from(self.limit).unwrap_or(i64::MAX);
        let params = (self.dir, &self.after.0, self.after.1, limit);
        let mut rows = statement.query(params).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            self.page.push_back(entry_from(row)?);
        }
        let before = (&*self.after.0, self.after.1);
        let keys = self.page.iter().map(|it| (&*it.name, it.first_run));
        in_order(std::iter::once(before).chain(keys))?;
        self.is_read = self.page.len() < self.limit;
        if let Some(last) = self.page.back() {
            self.after = (last.name.clone(), last.first_run);
        }
        Ok(())
    }
}
