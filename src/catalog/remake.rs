//! Metas and manifests made anew from what the catalog knows, long after the run that wrote them.
//!
//! A manifest that is made here leads whoever replays it to the same trees as the first one did;
//! its lines may stand in another order, and an emptied directory is told entry by entry. Nobody
//! may write the catalog meanwhile.

use std::io::Write;

use rusqlite::OptionalExtension;

use super::changes::{Change, ChangeKind};
use super::manifest::Previous;
use super::meta::{self, DirNames, Due};
use super::read::{Reader, in_order};
use super::run::{DirId, Run, RunId};
use super::{Spool, sql};
use crate::chunk::{Digest, HashAlgo};
use crate::entry::Kind;
use crate::error::Result;
use crate::volume::BlockIndex;

impl Reader {
    /// The blocks that a volume has copies of, in the order of their numbers, from the one after
    /// `after` on.
    pub fn copies_on(&self, volume: i64, after: u64, limit: u64) -> Result<Vec<Due>> {
        let query = "SELECT block, record_at FROM block_copies \
                     WHERE volume = ?1 AND block > ?2 ORDER BY block LIMIT ?3";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let rows = statement
            .query_map((volume, after, limit), |row| {
                Ok(Due { block: row.get(0)?, volume, record_at: row.get(1)? })
            })
            .map_err(sql)?;
        let due = rows.collect::<rusqlite::Result<Vec<Due>>>().map_err(sql)?;
        in_order(std::iter::once(after).chain(due.iter().map(|it| it.block)))?;
        Ok(due)
    }

    /// Writes the text of a block's meta.
    pub fn write_meta_text(
        &self,
        index: &BlockIndex,
        hash: HashAlgo,
        names: &mut DirNames,
        out: &mut dyn Write,
    ) -> Result<()> {
        meta::write_meta_text(self.conn(), index, hash, names, out)
    }

    /// Writes a block's meta, as it lies on a volume.
    pub fn write_meta(
        &self,
        index: &BlockIndex,
        hash: HashAlgo,
        names: &mut DirNames,
        out: &mut dyn Write,
    ) -> Result<()> {
        meta::write_meta(self.conn(), index, hash, names, out)
    }

    /// Writes the manifest of a finished run, which follows `previous`; gives its digest. `spool`
    /// is empty; `check` is asked with every change, and what it fails with ends the work.
    pub fn write_manifest(
        &self,
        (run, previous): (&Run, Option<Previous>),
        hash: HashAlgo,
        spool: &mut Spool,
        out: &mut dyn Write,
        check: &dyn Fn() -> Result<()>,
    ) -> Result<Digest> {
        self.changes(run, &mut |change| {
            check()?;
            self.spool_change(run.id, &change, spool)
        })?;
        let query = "SELECT kind, id, name FROM owners WHERE first_run = ?1 ORDER BY kind, id";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let mut rows = statement.query([run.id]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let kind: String = row.get(0).map_err(sql)?;
            let name: Vec<u8> = row.get(2).map_err(sql)?;
            spool.owner(&kind, row.get(1).map_err(sql)?, &name)?;
        }
        for (path, kind, message) in self.problems(run.id)? {
            spool.problem(&path, &kind, &message)?;
        }
        self.write_spooled(run, hash, previous, spool, out)
    }

    fn spool_change(&self, run: RunId, change: &Change, spool: &mut Spool) -> Result<()> {
        let (path, entry) = (&*change.path, &change.entry);
        if change.kind == ChangeKind::Deleted {
            // What is below something that is gone needs no line of its own.
            return match self.is_dir_in(run, entry.dir)? {
                true => spool.delete(path),
                false => Ok(()),
            };
        }
        if change.kind == ChangeKind::Modified
            && let Some(old) = self.dir_before(run, entry.dir, &entry.name)?
            && entry.child != Some(old)
        {
            // A directory has become something else.
            spool.delete(path)?;
        }
        match entry.meta.kind == Kind::Dir || self.is_first_name(entry)? {
            true => spool.put(path, entry.version, &entry.meta, &self.content(entry.version)?),
            false => spool.link(path, entry.version),
        }
    }

    /// Whether a run has the directory of this number; every run has what is above all sources.
    fn is_dir_in(&self, run: RunId, dir: DirId) -> Result<bool> {
        let query = "SELECT EXISTS (SELECT 1 FROM entries \
                     WHERE child = ?1 AND first_run <= ?2 AND last_run >= ?2)";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let is_there: bool = statement.query_row((dir, run), |row| row.get(0)).map_err(sql)?;
        Ok(dir == 0 || is_there)
    }

    /// The number of the directory that had this name in the run before.
    fn dir_before(&self, run: RunId, dir: DirId, name: &[u8]) -> Result<Option<DirId>> {
        let query = "SELECT child FROM entries WHERE dir = ?1 AND name = ?2 AND last_run = ?3";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let found = statement.query_row((dir, name, run - 1), |row| row.get(0));
        Ok(found.optional().map_err(sql)?.flatten())
    }

    /// Whether no name of this one's version is older, or before it in the order of the changes.
    fn is_first_name(&self, entry: &super::EntryRow) -> Result<bool> {
        let query = "SELECT dir, name, first_run FROM entries WHERE version = ?1 \
                     ORDER BY first_run, dir, name LIMIT 1";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let first: (DirId, Vec<u8>, RunId) = statement
            .query_row([entry.version], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
            .map_err(sql)?;
        Ok(first == (entry.dir, entry.name.clone(), entry.first_run))
    }
}
