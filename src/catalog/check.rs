//! The catalog's own check, and what damage to a block means for files and runs.

use std::collections::HashMap;

use super::extent::{self, Extent};
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
    /// Calls `found` with every fault of the catalog itself: pages, keys, and extents that do not
    /// cover their file or reach beyond their block.
    pub fn check(&self, found: &mut dyn FnMut(String)) -> Result<()> {
        self.check_database(found)?;
        self.check_extents(found)
    }

    fn check_database(&self, found: &mut dyn FnMut(String)) -> Result<()> {
        let mut statement = self.conn().prepare("PRAGMA integrity_check").map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let line: String = row.get(0).map_err(sql)?;
            if line != "ok" {
                found(format!("catalog: {line}"));
            }
        }
        let mut statement = self.conn().prepare("PRAGMA foreign_key_check").map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let (table, other): (String, String) =
                (row.get(0).map_err(sql)?, row.get(2).map_err(sql)?);
            found(format!("catalog: a row of {table} names a row of {other} that is missing"));
        }
        Ok(())
    }

    fn check_extents(&self, found: &mut dyn FnMut(String)) -> Result<()> {
        let query = "SELECT e.version, e.size, v.extents, v.hash IS NOT NULL FROM entries e \
                     LEFT JOIN versions v ON v.version = e.version WHERE e.kind = 1";
        let mut statement = self.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([]).map_err(sql)?;
        let mut plain_lens: HashMap<u64, Option<u64>> = HashMap::new();
        while let Some(row) = rows.next().map_err(sql)? {
            let version: VersionId = row.get(0).map_err(sql)?;
            let size: u64 = row.get(1).map_err(sql)?;
            let bytes: Option<Vec<u8>> = row.get(2).map_err(sql)?;
            let has_hash: bool = row.get(3).map_err(sql)?;
            let what = format!("catalog: version {version}");
            let Some(extents) = bytes.filter(|_| has_hash).map(|it| extent::decode(&it)) else {
                found(format!("{what} has no content"));
                continue;
            };
            let extents = match extents {
                Ok(extents) => extents,
                Err(e) => {
                    found(format!("{what}: {e}"));
                    continue;
                }
            };
            if extents.iter().map(Extent::len).sum::<u64>() != size {
                found(format!("{what}: its extents do not cover its size"));
            }
            for extent in extents {
                let Extent::Data { block, offset, len } = extent else { continue };
                if plain_lens.len() > 1 << 16 {
                    plain_lens.clear();
                }
                let plain_len = match plain_lens.get(&block) {
                    Some(len) => *len,
                    None => *plain_lens.entry(block).or_insert(self.plain_len(block)?),
                };
                if plain_len.is_none_or(|it| offset.saturating_add(len) > it) {
                    found(format!("{what} reaches beyond block {block}"));
                }
            }
        }
        Ok(())
    }

    fn plain_len(&self, block: u64) -> Result<Option<u64>> {
        let query = "SELECT plain_len FROM blocks WHERE number = ?1";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let mut rows = statement.query([block]).map_err(sql)?;
        rows.next().map_err(sql)?.map(|row| row.get(0).map_err(sql)).transpose()
    }

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

    fn names_of(
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
