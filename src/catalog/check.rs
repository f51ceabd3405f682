//! What damage to a block means for files and runs.

use super::extent::Extent;
use super::read::Reader;
use super::run::{DirId, RunId, VersionId};
use super::sql;
use crate::entry::join;
use crate::error::Result;

/// A damaged block, with the parts of its plain content that are lost.
#[derive(Clone, Debug)]
pub struct Damage {
    /// The block's number.
    pub block: u64,
    /// Lost parts of its plain content, as (start, end).
    pub ranges: Vec<(u64, u64)>,
}

/// A file that damage reaches.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DamagedFile {
    /// Name of its source.
    pub source: Vec<u8>,
    /// Its path below the source's root.
    pub path: Vec<u8>,
    /// The runs in which it is damaged.
    pub runs: Vec<RunId>,
}

impl Reader {
    /// Calls `each` with every file that `damage` reaches, in every run that has it.
    pub fn damaged_files(
        &self,
        damage: &Damage,
        each: &mut dyn FnMut(DamagedFile) -> Result<()>,
    ) -> Result<()> {
        let mut statement =
            self.conn().prepare("SELECT version FROM uses WHERE block = ?1").map_err(sql)?;
        let mut rows = statement.query([damage.block]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let version: VersionId = row.get(0).map_err(sql)?;
            let content = self.content(version)?;
            if content.extents.iter().any(|it| touches(it, damage)) {
                self.names_of(version, each)?;
            }
        }
        Ok(())
    }

    /// Calls `each` with every name of a version, in every run that has it.
    pub fn names_of(
        &self,
        version: VersionId,
        each: &mut dyn FnMut(DamagedFile) -> Result<()>,
    ) -> Result<()> {
        let query = "SELECT dir, name, first_run, last_run FROM entries WHERE version = ?1";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let mut rows = statement.query([version]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let dir: DirId = row.get(0).map_err(sql)?;
            let name: Vec<u8> = row.get(1).map_err(sql)?;
            let (source, dir_path) = self.path_of_dir(dir)?;
            let query = "SELECT run FROM runs JOIN sources ON number = source \
                         WHERE name = ?1 AND run BETWEEN ?2 AND ?3 ORDER BY run";
            let mut runs = self.conn().prepare_cached(query).map_err(sql)?;
            let range: (RunId, RunId) = (row.get(2).map_err(sql)?, row.get(3).map_err(sql)?);
            let runs = runs
                .query_map((&source, range.0, range.1), |row| row.get(0))
                .map_err(sql)?
                .collect::<rusqlite::Result<Vec<RunId>>>()
                .map_err(sql)?;
            each(DamagedFile { source, path: join(&dir_path, &name), runs })?;
        }
        Ok(())
    }
}

fn touches(extent: &Extent, damage: &Damage) -> bool {
    let Extent::Data { block, offset, len } = *extent else { return false };
    let end = offset.saturating_add(len);
    block == damage.block && damage.ranges.iter().any(|it| it.0 < end && offset < it.1)
}
