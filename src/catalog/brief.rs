//! Short answers that a mount needs often: which runs there are, which versions have attributes.

use rusqlite::Connection;

use super::read::Reader;
use super::run::{RunId, VersionId};
use super::{schema, sql};
use crate::error::Result;

/// Kinds of extended attributes that programs ask every file for, and most stores have none of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttributeKind {
    /// POSIX ACLs.
    Acl,
    /// SELinux labels.
    Label,
}

impl AttributeKind {
    /// The kind that an attribute's key is of, if it is of one.
    pub fn of(key: &[u8]) -> Option<AttributeKind> {
        match key {
            b"security.selinux" => Some(AttributeKind::Label),
            _ if key.starts_with(b"system.posix_acl_") => Some(AttributeKind::Acl),
            _ => None,
        }
    }

    fn word(self) -> &'static str {
        match self {
            AttributeKind::Acl => "acl",
            AttributeKind::Label => "label",
        }
    }
}

/// Notes that a version has an attribute of this kind.
pub(super) fn note_attribute(conn: &Connection, kind: AttributeKind) -> Result<()> {
    let query = "INSERT OR IGNORE INTO attribute_kinds (kind) VALUES (?1)";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    statement.execute([kind.word()]).map_err(sql)?;
    Ok(())
}

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

    /// The highest version that any entry of a finished run has; 0 where there is none.
    pub fn last_version(&self) -> Result<VersionId> {
        let query = "SELECT coalesce(max(version), 0) FROM entries";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        statement.query_row([], |row| row.get(0)).map_err(sql)
    }

    /// Whether any version may have an attribute of this kind.
    pub fn may_have(&self, kind: AttributeKind) -> Result<bool> {
        // Asked each time: a writer may bring the schema up to date under an open reader.
        if schema::version(self.conn())? < 3 {
            return Ok(true);
        }
        let query = "SELECT EXISTS (SELECT 1 FROM attribute_kinds WHERE kind = ?1)";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        statement.query_row([kind.word()], |row| row.get(0)).map_err(sql)
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
