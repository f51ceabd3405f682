//! Contents of many versions at a time, and what a run could not read.

use std::collections::HashSet;

use super::extent::Content;
use super::read::{Reader, content_columns, content_from};
use super::run::{Run, VersionId};
use super::sql;
use crate::error::Result;

/// Bytes of contents that are looked for ahead, as the catalog has them.
const NEAR_BYTES_MAX: usize = 1 << 20;

impl Reader {
    /// The contents of these versions, in their order. One transaction serves all of them, so the
    /// database's locks are taken once.
    pub fn contents(&self, versions: &[VersionId]) -> Result<Vec<Content>> {
        let transaction = self.conn().unchecked_transaction().map_err(sql)?;
        let contents = versions.iter().map(|version| self.content(*version)).collect();
        transaction.finish().map_err(sql)?;
        contents
    }

    /// The contents of versions from `first` on that have any, with their numbers: at most
    /// `limit`, fewer where they are large, and none from the first on that cannot be read.
    pub fn contents_from(
        &self,
        first: VersionId,
        limit: usize,
    ) -> Result<Vec<(VersionId, Content)>> {
        let query = "SELECT hash, extents, extra, version FROM versions \
                     WHERE version >= ?1 AND version < ?2 ORDER BY version";
        let end = first.saturating_add(i64::try_from(limit).unwrap_or(i64::MAX));
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let mut rows = statement.query((first, end)).map_err(sql)?;
        let (mut contents, mut bytes) = (Vec::with_capacity(limit), 0);
        while let Some(row) = rows.next().map_err(sql)? {
            let columns = content_columns(row).map_err(sql)?;
            bytes +=
                columns.1.as_ref().map_or(0, Vec::len) + columns.2.as_ref().map_or(0, Vec::len);
            // Whoever reads that one is told what is wrong with it.
            let Ok(content) = content_from(columns) else { break };
            contents.push((row.get(3).map_err(sql)?, content));
            if bytes > NEAR_BYTES_MAX {
                break;
            }
        }
        Ok(contents)
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
