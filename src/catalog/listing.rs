//! A directory at a run, entry by entry in order of their names, read in pages.
//!
//! Holds one page, so that a walk over any tree needs memory for its depth only. A walk that is
//! deep asks for short pages.

use std::collections::VecDeque;

use super::read::{EntryRow, Reader};
use super::run::{DirId, RunId};
use crate::error::Result;

/// Entries of a page near the root of a walk, and further down.
const PAGE_ENTRIES: usize = 512;
const DEEP_PAGE_ENTRIES: usize = 16;
/// From how many directories down pages are short.
const DEEP: usize = 16;

/// The entries of one directory that are still to come.
pub struct Listing {
    run: RunId,
    /// `None` for a directory that is not there: it has no entries.
    dir: Option<DirId>,
    page: VecDeque<EntryRow>,
    after: Option<Vec<u8>>,
    limit: usize,
}

impl Listing {
    /// All entries of `dir` at `run`, for a walk that is `depth` directories down.
    pub fn new(run: RunId, dir: Option<DirId>, depth: usize) -> Listing {
        let limit = if depth < DEEP { PAGE_ENTRIES } else { DEEP_PAGE_ENTRIES };
        Listing { run, dir, page: VecDeque::new(), after: None, limit }
    }

    /// The next entry, which stays the next one.
    pub fn peek(&mut self, reader: &Reader) -> Result<Option<&EntryRow>> {
        if self.page.is_empty()
            && let Some(dir) = self.dir
        {
            let page = reader.list(self.run, dir, self.after.as_deref(), self.limit)?;
            if page.len() < self.limit {
                self.dir = None;
            }
            self.after = page.last().map(|it| it.name.clone());
            self.page = page.into();
        }
        Ok(self.page.front())
    }

    /// Takes the next entry.
    pub fn next(&mut self, reader: &Reader) -> Result<Option<EntryRow>> {
        self.peek(reader)?;
        Ok(self.page.pop_front())
    }
}
