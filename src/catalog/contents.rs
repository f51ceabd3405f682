//! Contents of many versions at a time, and what a run could not read.

use std::collections::HashSet;

use super::extent::Content;
use super::read::Reader;
use super::run::{Run, VersionId};
use super::sql;
use crate::error::Result;

impl Reader {
    /// The contents of these versions, in their order. One transaction serves all of them, so the
    /// database's locks are taken once.
    pub fn contents(&self, versions: &[VersionId]) -> Result<Vec<Content>> {
        let transaction = self.conn().unchecked_transaction().map_err(sql)?;
        let contents = versions.iter().map(|version| self.content(*version)).collect();
        transaction.finish().map_err(sql)?;
        contents
    }

    /// Paths that a run could not read, and that its snapshot may lack for that reason; `None` if
    /// it did not note all of them.
    pub fn unread_paths(&self, run: &Run) -> Result<Option<HashSet<Vec<u8>>>> {
        if run.counts.problems == 0 {
            return Ok(Some(HashSet::new()));
        }
        let noted = self.problems(run.id)?;
        let is_whole = noted.len() as u64 >= run.counts.problems;
        Ok(is_whole.then(|| noted.into_iter().map(|it| it.0).collect()))
    }
}
