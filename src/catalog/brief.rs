//! Short answers that a mount needs often: which runs there are, which versions have attributes.

use super::read::Reader;
use super::run::{RunId, VersionId};
use super::sql;
use crate::error::Result;

impl Reader {
    /// Numbers of all finished runs after `after`, oldest first.
    pub fn run_numbers(&self, after: RunId) -> Result<Vec<RunId>> {
        let query = "SELECT run FROM runs WHERE run > ?1 ORDER BY run";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let numbers = statement.query_map([after], |row| row.get(0)).map_err(sql)?;
        numbers.collect::<rusqlite::Result<_>>().map_err(sql)
    }

    /// The first run that has this version, by any name.
    pub fn first_run_of(&self, version: VersionId) -> Result<Option<RunId>> {
        let query = "SELECT min(first_run) FROM entries WHERE version = ?1";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        statement.query_row([version], |row| row.get(0)).map_err(sql)
    }

    /// Those of the versions `from..to` that have anything beside content: attributes, a link's
    /// target, file flags.
    pub fn versions_with_extra(&self, from: VersionId, to: VersionId) -> Result<Vec<VersionId>> {
        let query = "SELECT version FROM versions \
                     WHERE version >= ?1 AND version < ?2 AND extra IS NOT NULL";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let numbers = statement.query_map([from, to], |row| row.get(0)).map_err(sql)?;
        numbers.collect::<rusqlite::Result<_>>().map_err(sql)
    }
}
