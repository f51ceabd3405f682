//! What differs between two runs.
//!
//! Two runs of one source are compared by the ranges of their rows: what began or ended between
//! them, found by index, whatever the size of the tree. A directory that went and came back has
//! another number, so an entry is looked for in the other run by its place: the directory of the
//! same path there. Runs of two sources share no rows and are walked side by side. Either way
//! memory does not grow with the tree.
//!
//! What counts is what a restore would bring back. Inode number, time of inode change and number
//! of links are the source's file system's business and make no difference by themselves.

use std::cmp::Ordering;
use std::num::NonZeroUsize;

use lru::LruCache;
use rusqlite::OptionalExtension;

use super::changes::DirPaths;
use super::listing::Listing;
use super::read::{ENTRY_COLUMNS, EntryRow, Reader, entry_from};
use super::run::{DirId, Run, RunId, VersionId};
use super::sql;
use crate::chunk::Digest;
use crate::entry::{Extra, Kind};
use crate::error::{Error, ErrorKind, Quoted, Result};

/// Directories whose counterparts in the other run are remembered.
const COUNTERPARTS_MAX: usize = 4096;

/// In what way an entry differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DiffKind {
    /// Only the second run has it.
    Added,
    /// Only the first run has it.
    Deleted,
    /// It is another kind of thing.
    Type,
    /// Its content is another: bytes and holes of a file, target of a link, device number.
    Content,
    /// Only its metadata is another: mode, owner, time of change, extended attributes, file flags.
    Metadata,
}

/// An entry that two runs have differently.
#[derive(Clone, Debug)]
pub struct Difference {
    /// In what way.
    pub kind: DiffKind,
    /// Its path below the source's root; empty for the root itself.
    pub path: Vec<u8>,
    /// What the first run has.
    pub old: Option<EntryRow>,
    /// What the second run has.
    pub new: Option<EntryRow>,
}

type Sink<'a> = &'a mut dyn FnMut(Difference) -> Result<()>;

impl Reader {
    /// Calls `each` with everything at and below `path` that leads from one run to the other. For
    /// two runs of one source, directory by directory; else in order of the paths.
    pub fn diff(&self, from: &Run, to: &Run, path: &[u8], each: Sink<'_>) -> Result<()> {
        let (old, new) = (self.at_path(from, path)?, self.at_path(to, path)?);
        if old.is_none() && new.is_none() {
            let message =
                format!("neither run {} nor run {} has '{}'", from.id, to.id, Quoted(path));
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        let is_dir = |it: &Option<EntryRow>| it.as_ref().is_some_and(|it| it.child.is_some());
        if from.source == to.source && (is_dir(&old) || is_dir(&new)) {
            return self.diff_rows(from, to, path, each);
        }
        self.diff_walk(from.id, to.id, path, old, new, each)
    }

    /// The entry at `path` below a run's root.
    fn at_path(&self, run: &Run, path: &[u8]) -> Result<Option<EntryRow>> {
        let mut entry = self.root(run)?;
        for name in path.split(|byte| *byte == b'/').filter(|it| !it.is_empty()) {
            let Some(dir) = entry.child else { return Ok(None) };
            match self.lookup(run.id, dir, name)? {
                Some(next) => entry = next,
                None => return Ok(None),
            }
        }
        Ok(Some(entry))
    }

    fn diff_rows(&self, from: &Run, to: &Run, below: &[u8], each: Sink<'_>) -> Result<()> {
        let (first, second) = (from.id.min(to.id), from.id.max(to.id));
        let is_forward = from.id <= to.id;
        let mut report = |path: &[u8], old: Option<EntryRow>, new: Option<EntryRow>| {
            let (old, new) = if is_forward { (old, new) } else { (new, old) };
            self.report(path, old, new, each)
        };
        let ids = (&from.source, first, second);
        for (query, is_new) in [(begun_query(), true), (ended_query(), false)] {
            let other_run = if is_new { first } else { second };
            let mut paths = DirPaths { reader: self, last: None };
            let mut others = Counterparts::new(self, other_run);
            let mut statement = self.conn().prepare_cached(&query).map_err(sql)?;
            let mut rows = statement.query(ids).map_err(sql)?;
            while let Some(row) = rows.next().map_err(sql)? {
                let entry = entry_from(row)?;
                let path = paths.path_of(&entry)?;
                if !is_at_or_below(&path, below) {
                    continue;
                }
                let other = match others.of(entry.dir)? {
                    Some(dir) => self.lookup(other_run, dir, &entry.name)?,
                    None => None,
                };
                match (is_new, other) {
                    (true, other) => report(&path, other, Some(entry))?,
                    (false, None) => report(&path, Some(entry), None)?,
                    // Its counterpart has begun since, and was told of above.
                    (false, Some(_)) => {}
                }
            }
        }
        Ok(())
    }

    /// Compares two trees by their paths, in order.
    fn diff_walk(
        &self,
        from: RunId,
        to: RunId,
        path: &[u8],
        old: Option<EntryRow>,
        new: Option<EntryRow>,
        each: Sink<'_>,
    ) -> Result<()> {
        let mut path = path.to_vec();
        let mut levels = Vec::new();
        let mut next = Some((old, new));
        loop {
            if let Some((old, new)) = next.take() {
                let dirs = (child(&old), child(&new));
                self.report(&path, old, new, each)?;
                if dirs != (None, None) {
                    let depth = levels.len();
                    let (old, new) =
                        (Listing::new(from, dirs.0, depth), Listing::new(to, dirs.1, depth));
                    levels.push((path.len(), old, new));
                }
            }
            let Some((len, old, new)) = levels.last_mut() else { return Ok(()) };
            path.truncate(*len);
            let order = match (old.peek(self)?, new.peek(self)?) {
                (None, None) => {
                    levels.pop();
                    continue;
                }
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(old), Some(new)) => old.name.cmp(&new.name),
            };
            let old = if order.is_le() { old.next(self)? } else { None };
            let new = if order.is_ge() { new.next(self)? } else { None };
            if let Some(entry) = old.as_ref().or(new.as_ref()) {
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(&entry.name);
            }
            next = Some((old, new));
        }
    }

    fn report(
        &self,
        path: &[u8],
        old: Option<EntryRow>,
        new: Option<EntryRow>,
        each: Sink<'_>,
    ) -> Result<()> {
        let kind = match (&old, &new) {
            (None, None) => return Ok(()),
            (None, Some(_)) => DiffKind::Added,
            (Some(_), None) => DiffKind::Deleted,
            (Some(old), Some(new)) => match self.compare(old, new)? {
                Some(kind) => kind,
                None => return Ok(()),
            },
        };
        each(Difference { kind, path: path.to_vec(), old, new })
    }

    fn compare(&self, old: &EntryRow, new: &EntryRow) -> Result<Option<DiffKind>> {
        if old.version == new.version {
            return Ok(None);
        }
        let (was, is) = (&old.meta, &new.meta);
        if was.kind != is.kind {
            return Ok(Some(DiffKind::Type));
        }
        let (old_hash, old_extra) = self.hash_and_extra(old.version)?;
        let (new_hash, new_extra) = self.hash_and_extra(new.version)?;
        let is_same_content = match was.kind {
            Kind::File => was.size == is.size && old_hash == new_hash,
            Kind::Symlink => old_extra.target == new_extra.target,
            Kind::CharDevice | Kind::BlockDevice => was.rdev == is.rdev,
            Kind::Dir | Kind::Fifo | Kind::Socket => true,
        };
        let is_same_metadata = (was.mode, was.uid, was.gid, was.mtime)
            == (is.mode, is.uid, is.gid, is.mtime)
            && old_extra.xattrs == new_extra.xattrs
            && old_extra.flags == new_extra.flags;
        Ok(match (is_same_content, is_same_metadata) {
            (false, _) => Some(DiffKind::Content),
            (true, false) => Some(DiffKind::Metadata),
            (true, true) => None,
        })
    }

    /// What of a version's content tells it from another, without its extents.
    fn hash_and_extra(&self, version: VersionId) -> Result<(Option<Digest>, Extra)> {
        let query = "SELECT hash, extra FROM versions WHERE version = ?1";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        type Columns = (Option<Vec<u8>>, Option<Vec<u8>>);
        let found: Option<Columns> = statement
            .query_row([version], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()
            .map_err(sql)?;
        let (hash, extra) = found.unwrap_or_default();
        let hash = hash.map(|it| Digest::from_slice(&it)).transpose()?;
        Ok((hash, extra.map_or_else(|| Ok(Extra::default()), |it| Extra::decode(&it))?))
    }
}

/// Rows that runs of source ?1 after ?2 have begun and that live at ?3. Only a source's own runs
/// begin its rows.
fn begun_query() -> String {
    // The comparison with 1 lets SQLite use the index, which has no rows of the first run.
    format!(
        "SELECT {ENTRY_COLUMNS} FROM entries WHERE first_run IN \
         (SELECT run FROM runs JOIN sources ON number = source \
         WHERE name = ?1 AND run > ?2 AND run <= ?3) \
         AND first_run > 1 AND last_run >= ?3 ORDER BY dir, name"
    )
}

/// Rows that live at ?2 and that runs of source ?1 up to ?3 have ended.
fn ended_query() -> String {
    format!(
        "SELECT {ENTRY_COLUMNS} FROM entries WHERE last_run IN \
         (SELECT run - 1 FROM runs JOIN sources ON number = source \
         WHERE name = ?1 AND run > ?2 AND run <= ?3) \
         AND last_run < 9223372036854775807 AND first_run <= ?2 ORDER BY dir, name"
    )
}

fn child(entry: &Option<EntryRow>) -> Option<DirId> {
    entry.as_ref().and_then(|it| it.child)
}

fn is_at_or_below(path: &[u8], dir: &[u8]) -> bool {
    match path.strip_prefix(dir) {
        Some(rest) => dir.is_empty() || rest.is_empty() || rest.starts_with(b"/"),
        None => false,
    }
}

/// For directories of one run, the directories of the same paths at another run.
struct Counterparts<'a> {
    reader: &'a Reader,
    run: RunId,
    known: LruCache<DirId, Option<DirId>>,
}

impl Counterparts<'_> {
    fn new(reader: &Reader, run: RunId) -> Counterparts<'_> {
        let size = NonZeroUsize::new(COUNTERPARTS_MAX).unwrap_or(NonZeroUsize::MIN);
        Counterparts { reader, run, known: LruCache::new(size) }
    }

    /// The directory at this run that has the path of directory `dir`; `None` if there is none.
    fn of(&mut self, dir: DirId) -> Result<Option<DirId>> {
        // Up to a directory whose counterpart is known, then down again by the names.
        let mut names: Vec<(DirId, Vec<u8>)> = Vec::new();
        let mut at = dir;
        let mut found = loop {
            if at == 0 {
                break Some(0);
            }
            if let Some(known) = self.known.get(&at) {
                break *known;
            }
            if self.reader.entry_of_dir(self.run, at)?.is_some() {
                break Some(at);
            }
            let (parent, name) = self.reader.place_of_dir(at)?;
            names.push((at, name));
            at = parent;
        };
        self.known.put(at, found);
        for (at, name) in names.into_iter().rev() {
            found = match found {
                Some(dir) => self.reader.lookup(self.run, dir, &name)?.and_then(|it| it.child),
                None => None,
            };
            self.known.put(at, found);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Writer;
    use crate::catalog::settings::Settings;
    use crate::chunk::split::Chunking;

    #[test]
    fn runs_of_one_source_are_compared_by_index() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        let settings = Settings {
            hash: "blake3".parse().unwrap(),
            chunking: Chunking::new("fastcdc", 64 << 10).unwrap(),
            compression: "none".parse().unwrap(),
            block_bytes: 128 << 20,
            reserve_percent: 0,
            copies: 1,
        };
        drop(Writer::create(&path, &settings).unwrap());
        let reader = Reader::open(&path).unwrap();
        for (query, index) in [(begun_query(), "entries_begun"), (ended_query(), "entries_closed")]
        {
            let mut statement =
                reader.conn().prepare(&format!("EXPLAIN QUERY PLAN {query}")).unwrap();
            let plan: Vec<String> = statement
                .query_map((b"s", 1, 2), |row| row.get(3))
                .unwrap()
                .collect::<rusqlite::Result<_>>()
                .unwrap();
            let searched = format!("SEARCH entries USING INDEX {index}");
            assert!(plan.iter().any(|it| it.starts_with(&searched)), "{plan:?}");
            assert!(!plan.iter().any(|it| it.starts_with("SCAN entries")), "{plan:?}");
        }
    }

    #[test]
    fn a_name_that_begins_like_a_folder_is_not_below_it() {
        for (path, dir, is_below) in [
            (&b"a/b"[..], &b"a"[..], true),
            (b"a", b"a", true),
            (b"ab", b"a", false),
            (b"b", b"", true),
            (b"", b"", true),
            (b"", b"a", false),
        ] {
            assert_eq!(is_at_or_below(path, dir), is_below, "{path:?} below {dir:?}");
        }
    }
}
