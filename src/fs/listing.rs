//! Directories of snapshots as they were lately listed, by page.
//!
//! A page is answered from (run, directory, number of the page) alone: a position in a directory
//! means the same to every open directory and to none, because a finished run never changes. What
//! is kept is bounded in bytes; what was dropped is read again.

use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use crate::catalog::{DirId, EntryRow, RunId};
use crate::error::Result;
use crate::snapshot::Snapshots;

/// Entries of a page.
pub const PAGE_ENTRIES: usize = 256;
/// Memory for pages, in bytes.
const PAGES_BYTES_MAX: usize = 6 << 20;
/// Pages of which the last name is known; a name has at most 255 bytes.
const ENDS_MAX: usize = 4096;
/// Directories whose own entry is known.
const DIRS_MAX: usize = 8192;
/// Most pages of one directory that are searched for a name before the catalog is asked.
const SEARCHED_MAX: u64 = 16;

/// A run, a directory, and the number of a page of it.
type Key = (RunId, DirId, u64);

/// A part of a directory, in order of the names.
pub struct Page {
    /// Its entries.
    pub entries: Vec<EntryRow>,
    /// Whether it is the last one.
    pub at_end: bool,
}

/// The pages.
pub struct Listings {
    snapshots: Arc<Snapshots>,
    state: Mutex<State>,
}

struct State {
    pages: LruCache<Key, Arc<Page>>,
    bytes: usize,
    /// The last name of each page that is followed by another.
    ends: LruCache<Key, Vec<u8>>,
    /// The entries of directories, by run and their own number.
    dirs: LruCache<(RunId, DirId), Arc<EntryRow>>,
}

fn bounded<K: std::hash::Hash + Eq, V>(most: usize) -> LruCache<K, V> {
    LruCache::new(NonZeroUsize::new(most).unwrap_or(NonZeroUsize::MIN))
}

fn bytes_of(page: &Page) -> usize {
    let names: usize = page.entries.iter().map(|it| it.name.capacity()).sum();
    page.entries.capacity() * size_of::<EntryRow>() + names + size_of::<Page>()
}

impl Listings {
    /// No pages yet.
    pub fn new(snapshots: Arc<Snapshots>) -> Listings {
        let state = State {
            pages: LruCache::unbounded(),
            bytes: 0,
            ends: bounded(ENDS_MAX),
            dirs: bounded(DIRS_MAX),
        };
        Listings { snapshots, state: Mutex::new(state) }
    }

    /// Page `number` of a directory; an empty one after the end.
    pub fn page(&self, run: RunId, dir: DirId, number: u64) -> Result<Arc<Page>> {
        if let Some(page) = self.state.lock().pages.get(&(run, dir, number)) {
            return Ok(page.clone());
        }
        // From the nearest page before whose end is known.
        let (mut at, mut after) = (0, None);
        if let Some((before, name)) = self.state.lock().end_before(run, dir, number) {
            (at, after) = (before + 1, Some(name));
        }
        loop {
            let entries = self.snapshots.list(run, dir, after.as_deref(), PAGE_ENTRIES)?;
            let at_end = entries.len() < PAGE_ENTRIES;
            let page = Arc::new(Page { entries, at_end });
            after = page.entries.last().map(|it| it.name.clone());
            self.state.lock().keep((run, dir, at), &page);
            if at == number {
                return Ok(page);
            }
            if at_end {
                return Ok(Arc::new(Page { entries: Vec::new(), at_end }));
            }
            at += 1;
        }
    }

    /// The entry `name` of a directory; `None` if there is none.
    pub fn lookup(&self, run: RunId, dir: DirId, name: &[u8]) -> Result<Option<EntryRow>> {
        if let Some(found) = self.state.lock().find(run, dir, name) {
            return Ok(found);
        }
        let found = self.snapshots.lookup(run, dir, name)?;
        if let Some(entry) = &found {
            self.state.lock().keep_dir(run, entry);
        }
        Ok(found)
    }

    /// The entry of a directory by its own number.
    pub fn dir(&self, run: RunId, dir: DirId) -> Result<Option<Arc<EntryRow>>> {
        if let Some(entry) = self.state.lock().dirs.get(&(run, dir)) {
            return Ok(Some(entry.clone()));
        }
        let found = self.snapshots.with_reader(|reader| reader.entry_of_dir(run, dir))?;
        let Some(entry) = found.map(Arc::new) else { return Ok(None) };
        self.state.lock().dirs.put((run, dir), entry.clone());
        Ok(Some(entry))
    }
}

impl State {
    fn keep(&mut self, key: Key, page: &Arc<Page>) {
        for entry in &page.entries {
            self.keep_dir(key.0, entry);
        }
        if let Some(last) = page.entries.last().filter(|_| !page.at_end) {
            self.ends.put(key, last.name.clone());
        }
        self.bytes += bytes_of(page);
        if let Some(old) = self.pages.put(key, page.clone()) {
            self.bytes -= bytes_of(&old);
        }
        while self.bytes > PAGES_BYTES_MAX {
            let Some((_, old)) = self.pages.pop_lru() else { break };
            self.bytes -= bytes_of(&old);
        }
    }

    fn keep_dir(&mut self, run: RunId, entry: &EntryRow) {
        if let Some(dir) = entry.child {
            self.dirs.put((run, dir), Arc::new(entry.clone()));
        }
    }

    /// The nearest page before `number` whose last name is known, and that name. Any number may be
    /// asked for, so what is known is searched and not the numbers.
    fn end_before(&mut self, run: RunId, dir: DirId, number: u64) -> Option<(u64, Vec<u8>)> {
        let before = number.checked_sub(1)?;
        if let Some(name) = self.ends.get(&(run, dir, before)) {
            return Some((before, name.clone()));
        }
        let known = self.ends.iter().filter(|it| (it.0.0, it.0.1) == (run, dir));
        let nearest = known.filter(|it| it.0.2 < number).max_by_key(|it| it.0.2)?;
        Some((nearest.0.2, nearest.1.clone()))
    }

    /// The outer `None` means that the pages here do not tell.
    fn find(&mut self, run: RunId, dir: DirId, name: &[u8]) -> Option<Option<EntryRow>> {
        for number in 0..SEARCHED_MAX {
            let page = self.pages.get(&(run, dir, number))?;
            match page.entries.binary_search_by(|it| it.name.as_slice().cmp(name)) {
                Ok(at) => return page.entries.get(at).cloned().map(Some),
                Err(at) if at < page.entries.len() || page.at_end => return Some(None),
                Err(_) => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Kind, Metadata};
    use crate::sys::Time;

    fn page(names: &[&str], at_end: bool) -> Arc<Page> {
        let row = |name: &&str| EntryRow {
            dir: 1,
            name: name.as_bytes().to_vec(),
            first_run: 1,
            last_run: 9,
            version: 7,
            child: None,
            meta: Metadata {
                kind: Kind::File,
                mode: 0o644,
                uid: 0,
                gid: 0,
                size: 0,
                mtime: Time::default(),
                ctime: Time::default(),
                ino: 1,
                nlink: 1,
                rdev: 0,
            },
            data_len: None,
        };
        Arc::new(Page { entries: names.iter().map(row).collect(), at_end })
    }

    fn state() -> State {
        State {
            pages: LruCache::unbounded(),
            bytes: 0,
            ends: bounded(ENDS_MAX),
            dirs: bounded(DIRS_MAX),
        }
    }

    #[test]
    fn a_name_is_found_or_known_to_be_missing_where_the_pages_tell() {
        let mut state = state();
        state.keep((1, 1, 0), &page(&["b", "d"], false));
        let found = |it: Option<Option<EntryRow>>| it.map(|it| it.map(|it| it.name));
        assert_eq!(found(state.find(1, 1, b"d")), Some(Some(b"d".to_vec())));
        assert_eq!(found(state.find(1, 1, b"a")), Some(None));
        assert_eq!(found(state.find(1, 1, b"c")), Some(None));
        // What comes after the page is not told by it.
        assert_eq!(found(state.find(1, 1, b"e")), None);
        state.keep((1, 1, 1), &page(&["f"], true));
        assert_eq!(found(state.find(1, 1, b"e")), Some(None));
        assert_eq!(found(state.find(1, 1, b"f")), Some(Some(b"f".to_vec())));
        assert_eq!(found(state.find(1, 1, b"g")), Some(None));
        assert_eq!(found(state.find(2, 1, b"b")), None);
    }

    #[test]
    fn a_page_is_reached_from_the_nearest_one_before_it() {
        let mut state = state();
        for (number, last) in [(0, "b"), (1, "d"), (5, "x")] {
            state.keep((1, 1, number), &page(&["a", last], false));
        }
        state.keep((1, 2, 3), &page(&["z"], false));
        let reached = |state: &mut State, number| state.end_before(1, 1, number).map(|it| it.0);
        assert_eq!(reached(&mut state, 0), None);
        assert_eq!(reached(&mut state, 1), Some(0));
        assert_eq!(reached(&mut state, 4), Some(1));
        assert_eq!(reached(&mut state, u64::MAX), Some(5));
        assert_eq!(state.end_before(1, 3, 9), None);
    }

    #[test]
    fn pages_stay_within_their_bytes() {
        let mut state = state();
        for number in 0..PAGES_BYTES_MAX as u64 / 100 {
            state.keep((1, 1, number), &page(&["a", "b"], false));
            // The same page once more counts once.
            state.keep((1, 1, number), &page(&["a", "b"], false));
            assert!(state.bytes <= PAGES_BYTES_MAX);
        }
        let sum: usize = state.pages.iter().map(|it| bytes_of(it.1)).sum();
        assert_eq!(sum, state.bytes);
        assert!(state.pages.len() > 100 && state.ends.len() <= ENDS_MAX);
    }
}
