//! Finding entries by name in all runs: one pass over the entries, no run at a time.
//!
//! A directory's number never moves, so the path of an entry's directory holds for every run in
//! which the entry lives: a path and a range of runs that come out together were really there. A
//! directory that was renamed has another number, and what is below it other rows.

use std::num::NonZeroUsize;
use std::sync::Arc;

use globset::{GlobBuilder, GlobMatcher};
use lru::LruCache;
use rusqlite::Row;

use super::read::{ENTRY_COLUMNS, EntryRow, Reader, entry_from};
use super::run::{DirId, Run, RunId};
use super::{OPEN, sql};
use crate::entry::{Kind, join};
use crate::error::{Error, Result};
use crate::sys::{Time, path_from};

/// Directories whose paths are remembered.
const PLACES_MAX: usize = 4096;
/// Sources whose runs are remembered.
const SOURCES_MAX: usize = 256;

/// What a name or a path has to look like.
pub struct Pattern {
    matcher: GlobMatcher,
    subject: Subject,
}

/// What a pattern is held against.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Subject {
    /// The name alone: the pattern has no slash.
    Name,
    /// The path below the source's root.
    Path,
    /// The source's name and the path: the pattern begins with a slash.
    WholePath,
}

impl Pattern {
    /// A shell pattern: `*`, `?`, `[a-z]`, `{a,b}`, and `**` for any number of directories.
    pub fn new(glob: &[u8], ignore_case: bool) -> Result<Pattern> {
        let Ok(glob) = std::str::from_utf8(glob) else {
            let message = "the pattern is not UTF-8: put ? for each byte that is not text";
            return Err(Error::usage(message));
        };
        let subject = match glob.find('/') {
            None => Subject::Name,
            Some(0) => Subject::WholePath,
            Some(_) => Subject::Path,
        };
        let mut builder = GlobBuilder::new(glob);
        builder.literal_separator(subject != Subject::Name).case_insensitive(ignore_case);
        let glob = builder.build().map_err(|e| Error::usage(e.to_string()))?;
        Ok(Pattern { matcher: glob.compile_matcher(), subject })
    }

    fn matches(&self, bytes: &[u8]) -> bool {
        self.matcher.is_match(path_from(bytes))
    }
}

/// What an entry has to be besides its name; `None` where that does not matter.
#[derive(Clone, Debug, Default)]
pub struct Conditions {
    /// In this run.
    pub run: Option<Run>,
    /// Of this source.
    pub source: Option<Vec<u8>>,
    /// Of this kind.
    pub kind: Option<Kind>,
    /// With more bytes.
    pub larger_than: Option<u64>,
    /// With fewer bytes.
    pub smaller_than: Option<u64>,
    /// Changed later.
    pub newer_than: Option<Time>,
    /// Changed earlier.
    pub older_than: Option<Time>,
}

impl Conditions {
    /// Whether a row can be meant, by its numbers alone: most rows end here, uncopied.
    fn accept(&self, row: &Row<'_>) -> Result<bool> {
        let number = |column: usize| row.get::<_, i64>(column).map_err(sql);
        if let Some(run) = &self.run
            && !(number(2)?..=number(3)?).contains(&run.id)
        {
            return Ok(false);
        }
        if let Some(kind) = self.kind
            && number(6)? != kind as i64
        {
            return Ok(false);
        }
        let size = |column| row.get::<_, u64>(column).map_err(sql);
        if self.larger_than.is_some() || self.smaller_than.is_some() {
            let size = size(10)?;
            if self.larger_than.is_some_and(|it| size <= it)
                || self.smaller_than.is_some_and(|it| size >= it)
            {
                return Ok(false);
            }
        }
        if self.newer_than.is_some() || self.older_than.is_some() {
            let time = Time { secs: number(11)?, nanos: row.get(12).map_err(sql)? };
            if self.newer_than.is_some_and(|it| time <= it)
                || self.older_than.is_some_and(|it| time >= it)
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn accept_source(&self, source: &[u8]) -> bool {
        self.run.as_ref().is_none_or(|it| it.source == source)
            && self.source.as_ref().is_none_or(|it| it == source)
    }
}

/// An entry that was found, as it is in a range of runs.
#[derive(Clone, Debug)]
pub struct Hit {
    /// Name of its source.
    pub source: Vec<u8>,
    /// Its path below the source's root.
    pub path: Vec<u8>,
    /// The entry; its first run is a run of its source.
    pub entry: EntryRow,
    /// The last run of its source that has it.
    pub last_run: RunId,
    /// How many runs of its source have it.
    pub runs: usize,
    /// Whether the newest run of its source has it.
    pub lives: bool,
}

impl Reader {
    /// Calls `each` with every state of every entry that matches, directory by directory, until it
    /// says that it has had enough by giving `false`.
    pub fn find(
        &self,
        pattern: &Pattern,
        conditions: &Conditions,
        each: &mut dyn FnMut(Hit) -> Result<bool>,
    ) -> Result<()> {
        let mut places = Places::new(self);
        let query = format!(
            "SELECT {ENTRY_COLUMNS} FROM entries WHERE dir > 0 ORDER BY dir, name, first_run"
        );
        let mut statement = self.conn().prepare(&query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        let mut subject = Vec::new();
        while let Some(row) = rows.next().map_err(sql)? {
            if !conditions.accept(row)? {
                continue;
            }
            let name = row.get_ref(1).map_err(sql)?;
            let name = name.as_blob().map_err(|e| Error::corrupt(format!("catalog: {e}")))?;
            if pattern.subject == Subject::Name && !pattern.matches(name) {
                continue;
            }
            let place = places.of(row.get(0).map_err(sql)?)?;
            if !conditions.accept_source(&place.source) {
                continue;
            }
            subject.clear();
            if pattern.subject == Subject::WholePath {
                subject.extend_from_slice(&place.source);
                subject.push(b'/');
            }
            let below = subject.len();
            if !place.path.is_empty() {
                subject.extend_from_slice(&place.path);
                subject.push(b'/');
            }
            subject.extend_from_slice(name);
            if pattern.subject != Subject::Name && !pattern.matches(&subject) {
                continue;
            }
            let path = subject.get(below..).unwrap_or_default().to_vec();
            if !each(places.hit(entry_from(row)?, &place, path)?)? {
                break;
            }
        }
        Ok(())
    }

    /// Whether there is a source of this name.
    pub fn has_source(&self, name: &[u8]) -> Result<bool> {
        let query = "SELECT EXISTS (SELECT 1 FROM sources WHERE name = ?1)";
        self.conn().query_row(query, [name], |row| row.get(0)).map_err(sql)
    }

    /// Numbers of a source's runs, oldest first.
    fn runs_of(&self, source: &[u8]) -> Result<Vec<RunId>> {
        let query = "SELECT run FROM runs JOIN sources ON number = source \
                     WHERE name = ?1 ORDER BY run";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let rows = statement.query_map([source], |row| row.get(0)).map_err(sql)?;
        rows.collect::<rusqlite::Result<_>>().map_err(sql)
    }
}

/// Where a directory is.
struct Place {
    source: Arc<[u8]>,
    path: Vec<u8>,
}

/// Paths of directories and runs of sources, as far as they were needed last.
struct Places<'a> {
    reader: &'a Reader,
    last: Option<(DirId, Arc<Place>)>,
    known: LruCache<DirId, Arc<Place>>,
    runs: LruCache<Arc<[u8]>, Arc<[RunId]>>,
}

impl Places<'_> {
    fn new(reader: &Reader) -> Places<'_> {
        let size = |n| NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN);
        let (known, runs) = (LruCache::new(size(PLACES_MAX)), LruCache::new(size(SOURCES_MAX)));
        Places { reader, last: None, known, runs }
    }

    fn of(&mut self, dir: DirId) -> Result<Arc<Place>> {
        // Entries come directory by directory.
        match &self.last {
            Some((last, place)) if *last == dir => Ok(place.clone()),
            _ => {
                let place = self.look_up(dir)?;
                self.last = Some((dir, place.clone()));
                Ok(place)
            }
        }
    }

    fn look_up(&mut self, dir: DirId) -> Result<Arc<Place>> {
        let mut missing = Vec::new();
        let mut at = dir;
        let mut place = loop {
            if let Some(place) = self.known.get(&at) {
                break place.clone();
            }
            let (parent, name) = self.reader.place_of_dir(at)?;
            if parent == 0 {
                let place = Arc::new(Place { source: name.into(), path: Vec::new() });
                self.known.put(at, place.clone());
                break place;
            }
            missing.push((at, name));
            at = parent;
        };
        for (at, name) in missing.into_iter().rev() {
            let path = join(&place.path, &name);
            place = Arc::new(Place { source: place.source.clone(), path });
            self.known.put(at, place.clone());
        }
        Ok(place)
    }

    fn hit(&mut self, entry: EntryRow, place: &Place, path: Vec<u8>) -> Result<Hit> {
        let runs = match self.runs.get(&place.source) {
            Some(runs) => runs.clone(),
            None => {
                let runs: Arc<[RunId]> = self.reader.runs_of(&place.source)?.into();
                self.runs.put(place.source.clone(), runs.clone());
                runs
            }
        };
        let from = runs.partition_point(|run| *run < entry.first_run);
        let to = runs.partition_point(|run| *run <= entry.last_run);
        let last_run = to.checked_sub(1).and_then(|it| runs.get(it)).copied();
        Ok(Hit {
            source: place.source.to_vec(),
            path,
            last_run: last_run.unwrap_or(entry.first_run),
            runs: to.saturating_sub(from),
            lives: entry.last_run == OPEN,
            entry,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(glob: &str, subject: &[u8]) -> bool {
        Pattern::new(glob.as_bytes(), false).unwrap().matches(subject)
    }

    #[test]
    fn patterns_are_held_against_bytes() {
        assert!(matches("*.rs", b"lib.rs"));
        assert!(!matches("*.rs", b"lib.rs.orig"));
        assert!(matches("*", b".hidden"));
        assert!(matches("a?b", b"a\xffb"));
        assert!(matches("a*b", b"a\xff\xfe\nb"));
        assert!(matches("[!a]", b"\xff"));
        assert!(matches("{one,two}", b"two"));
        assert!(matches("\\*", b"*"));
        assert!(!matches("\\*", b"x"));
    }

    #[test]
    fn a_pattern_with_a_slash_is_held_against_the_path() {
        assert!(matches("src/*.rs", b"src/lib.rs"));
        assert!(!matches("src/*.rs", b"src/cli/mod.rs"));
        assert!(matches("src/**/*.rs", b"src/cli/mod.rs"));
        assert!(matches("**/mod.rs", b"mod.rs"));
        assert!(!matches("cli/mod.rs", b"src/cli/mod.rs"));
        let whole = Pattern::new(b"/home/*/x", false).unwrap();
        assert!(whole.subject == Subject::WholePath && whole.matches(b"/home/me/x"));
    }

    #[test]
    fn case_matters_unless_it_is_told_not_to() {
        assert!(!matches("readme*", b"README.md"));
        assert!(Pattern::new(b"readme*", true).unwrap().matches(b"README.md"));
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for bad in [&b"a["[..], b"{a", b"\xff"] {
            let error = Pattern::new(bad, false).err().unwrap();
            assert_eq!(error.kind(), crate::error::ErrorKind::Usage, "{bad:?}");
        }
    }
}
