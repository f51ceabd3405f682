//! What a run changed: range queries over the entries, nothing else is kept for it.
//!
//! A row that begins with run R was added, or modified if another row of the same name ended with
//! run R-1. A row that ended with R-1 and has no successor was deleted. Only R's own source can end
//! rows with R-1, so no other source is looked at.

use super::read::{ENTRY_COLUMNS, EntryRow, Reader, entry_from};
use super::run::{DirId, Run};
use super::sql;
use crate::entry::join;
use crate::error::Result;

/// How an entry differs from the run before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// It was not there.
    Added,
    /// Its content or metadata is another.
    Modified,
    /// It is gone.
    Deleted,
}

impl ChangeKind {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            ChangeKind::Added => "added",
            ChangeKind::Modified => "modified",
            ChangeKind::Deleted => "deleted",
        }
    }
}

/// An entry that a run changed.
#[derive(Clone, Debug)]
pub struct Change {
    /// In what way.
    pub kind: ChangeKind,
    /// Its path below the source's root; empty for the root itself.
    pub path: Vec<u8>,
    /// The entry as it is now, or as it was before it was deleted.
    pub entry: EntryRow,
}

impl Reader {
    /// Calls `each` with everything that a run changed, directory by directory.
    pub fn changes(&self, run: &Run, each: &mut dyn FnMut(Change) -> Result<()>) -> Result<()> {
        let columns = ENTRY_COLUMNS.split(", ").map(|it| format!("n.{}", it.trim()));
        let columns = columns.collect::<Vec<_>>().join(", ");
        // Said once more in the words of the partial indexes, or SQLite reads every entry.
        let indexed = if run.id > 1 { " AND n.first_run > 1" } else { "" };
        let new = format!(
            "SELECT {columns}, EXISTS (SELECT 1 FROM entries p WHERE p.dir = n.dir \
             AND p.name = n.name AND p.last_run = ?1 - 1) \
             FROM entries n WHERE n.first_run = ?1{indexed} ORDER BY n.dir, n.name"
        );
        let gone = format!(
            "SELECT {columns}, 0 FROM entries n WHERE n.last_run = ?1 - 1 \
             AND n.last_run < 9223372036854775807 AND NOT EXISTS (SELECT 1 FROM entries s \
             WHERE s.dir = n.dir AND s.name = n.name AND s.first_run = ?1) ORDER BY n.dir, n.name"
        );
        let mut paths = DirPaths { reader: self, last: None };
        for (query, is_new) in [(new, true), (gone, false)] {
            let mut statement = self.conn().prepare_cached(&query).map_err(sql)?;
            let mut rows = statement.query([run.id]).map_err(sql)?;
            while let Some(row) = rows.next().map_err(sql)? {
                let entry = entry_from(row)?;
                let had_one: bool = row.get(19).map_err(sql)?;
                let kind = match (is_new, had_one) {
                    (true, false) => ChangeKind::Added,
                    (true, true) => ChangeKind::Modified,
                    (false, _) => ChangeKind::Deleted,
                };
                let path = paths.path_of(&entry)?;
                each(Change { kind, path, entry })?;
            }
        }
        Ok(())
    }
}

/// Paths of entries that come directory by directory: one directory's path is remembered.
pub(super) struct DirPaths<'a> {
    pub(super) reader: &'a Reader,
    pub(super) last: Option<(DirId, Vec<u8>)>,
}

impl DirPaths<'_> {
    pub(super) fn path_of(&mut self, entry: &EntryRow) -> Result<Vec<u8>> {
        if entry.dir == 0 {
            return Ok(Vec::new());
        }
        let path = match &self.last {
            Some((dir, path)) if *dir == entry.dir => path,
            _ => {
                let (_, path) = self.reader.path_of_dir(entry.dir)?;
                &self.last.insert((entry.dir, path)).1
            }
        };
        Ok(join(path, &entry.name))
    }
}
