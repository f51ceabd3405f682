//! The lines of a manifest, and what each does to the entries.
//!
//! A line is checked before anything is done: its names lead nowhere else, its numbers are possible
//! ones, and what it ends or continues is there.

use super::{
    Alive, Content, Digest, DirId, Error, Extent, Kind, KnownBlock, Live, Metadata, OPEN,
    OptionalExtension, Quoted, Rebuild, Result, RunId, VersionId, check_name, sql,
};
use crate::catalog::line::{Line, Link, Owner, Problem, Put, Said};
use crate::catalog::read::{ENTRY_COLUMNS, entry_from};
use crate::catalog::{NewEntry, rows};
use crate::entry::split_path;

fn bad(what: impl std::fmt::Display) -> Error {
    Error::corrupt(what.to_string())
}

impl Rebuild {
    /// Deals with a line of the current run, if it says that something goes, or is of a directory.
    pub fn take_first(&mut self, line: &[u8]) -> Result<()> {
        match Line::parse(line)? {
            Line::Put(put) if put.kind == Kind::Dir => self.put(&put),
            Line::Delete(gone) => self.delete(&gone.path()?),
            Line::Empty(gone) => self.empty(&gone.path()?),
            _ => Ok(()),
        }
    }

    /// Deals with a line of the current run, if [`Rebuild::take_first`] has not.
    pub fn take_second(&mut self, line: &[u8]) -> Result<()> {
        match Line::parse(line)? {
            Line::Put(put) if put.kind != Kind::Dir => self.put(&put),
            Line::Link(link) => self.link(&link),
            Line::Owner(owner) => self.owner(&owner),
            Line::Problem(problem) => self.problem(&problem),
            Line::Put(_) | Line::Delete(_) | Line::Empty(_) | Line::End => Ok(()),
        }
    }

    /// The greatest number of a version that a line says.
    pub fn version_in(line: &[u8]) -> Result<VersionId> {
        match Line::parse(line)? {
            Line::Put(put) => put.version(),
            Line::Link(link) => link.version(),
            _ => Ok(0),
        }
    }

    fn live(&self, dir: DirId, name: &[u8]) -> Result<Option<Live>> {
        let query = "SELECT first_run, child, kind, size, last_run FROM entries \
                     WHERE dir = ?1 AND name = ?2 ORDER BY first_run DESC LIMIT 1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let found = statement.query_row((dir, name), |row| {
            let kind: u8 = row.get(2)?;
            let last_run: RunId = row.get(4)?;
            Ok((row.get(0)?, row.get(1)?, kind, row.get(3)?, last_run))
        });
        let Some((first_run, child, kind, size, OPEN)) = found.optional().map_err(sql)? else {
            return Ok(None);
        };
        let kind = Kind::from_number(kind).ok_or_else(|| bad("unknown kind of entry"))?;
        Ok(Some(Live { first_run, child, kind, size }))
    }

    /// The number of a directory that is there now.
    fn dir_at(&mut self, path: &[u8]) -> Result<DirId> {
        if let Some(dir) = self.dirs.known.get(path) {
            return Ok(*dir);
        }
        let none = || bad(format!("there is no directory '{}'", Quoted(path)));
        let source = self.current()?.name.clone();
        let root = self.live(0, &source)?.and_then(|it| it.child);
        let mut dir = root.ok_or_else(none)?;
        if !path.is_empty() {
            for name in path.split(|it| *it == b'/') {
                dir = self.live(dir, name)?.and_then(|it| it.child).ok_or_else(none)?;
            }
        }
        self.dirs.put(path, dir);
        Ok(dir)
    }

    /// The directory that an entry is in, and its name there.
    fn place_of(&mut self, path: &[u8]) -> Result<(DirId, Vec<u8>)> {
        if path.is_empty() {
            return Ok((0, self.current()?.name.clone()));
        }
        let (dir, name) = split_path(path);
        check_name(name)?;
        Ok((self.dir_at(dir)?, name.to_vec()))
    }

    fn put(&mut self, put: &Put<'_>) -> Result<()> {
        let Said { path, version, meta, hash, extra } = put.read()?;
        let current = self.current()?;
        if version <= current.versions_before {
            return Err(bad(format!("version {version} belongs to an earlier run")));
        }
        let query = "SELECT EXISTS (SELECT 1 FROM entries WHERE version = ?1)";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        if statement.query_row([version], |row| row.get(0)).map_err(sql)? {
            return Err(bad(format!("version {version} is put twice")));
        }
        drop(statement);
        if path.is_empty() && meta.kind != Kind::Dir {
            return Err(bad("the root is no directory"));
        }
        let mut extents = Vec::with_capacity(put.piece_count());
        for piece in put.pieces() {
            extents.push(match piece? {
                (None, _, len) => Extent::Hole { len },
                (Some(id), offset, len) => {
                    Extent::Data { block: self.block_number(id, offset + len)?, offset, len }
                }
            });
        }
        let content = Content { hash, extents, extra };
        self.put_entry(&path, version, &meta, content.data_len())?;
        rows::put_content(&self.conn, version, meta.kind, &content)?;
        self.last_version = self.last_version.max(version);
        Ok(())
    }

    /// The number of a block that has at least `end` plain bytes. One that no volume has gets a row
    /// all the same: what is known of it is its name, and that it is missed.
    fn block_number(&mut self, id: Digest, end: u64) -> Result<u64> {
        let known = match self.blocks.get(&id) {
            Some(known) => *known,
            None => self.look_up_block(&id)?,
        };
        if known.is_lacking && end > known.plain_len {
            let query = "UPDATE blocks SET plain_len = ?2 WHERE number = ?1";
            let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
            statement.execute((known.number, end)).map_err(sql)?;
            drop(statement);
            self.blocks.put(id, KnownBlock { plain_len: end, ..known });
        } else if end > known.plain_len {
            let run = self.current()?.run;
            self.fault(format!(
                "run {run}: a file reaches beyond block {id}, which has {} bytes",
                known.plain_len
            ));
        }
        Ok(known.number)
    }

    fn look_up_block(&mut self, id: &Digest) -> Result<KnownBlock> {
        let query = "SELECT number, plain_len, length(frames) FROM blocks WHERE id = ?1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let found = statement.query_row([&id.0[..]], |row| {
            let is_lacking = row.get::<_, i64>(2)? <= 1;
            Ok(KnownBlock { number: row.get(0)?, plain_len: row.get(1)?, is_lacking })
        });
        let known = match found.optional().map_err(sql)? {
            Some(known) => known,
            None => {
                let number = self.next_block;
                self.next_block += 1;
                let query = "INSERT INTO blocks (number, id, stored_len, plain_len, frames) \
                             VALUES (?1, ?2, 1, 1, ?3)";
                let row = (number, &id.0[..], &super::NO_FRAMES[..]);
                self.conn.execute(query, row).map_err(sql)?;
                KnownBlock { number, plain_len: 1, is_lacking: true }
            }
        };
        drop(statement);
        self.blocks.put(*id, known);
        Ok(known)
    }

    /// Adds a name, and ends the life of what had it before.
    fn put_entry(
        &mut self,
        path: &[u8],
        version: VersionId,
        meta: &Metadata,
        data_len: Option<u64>,
    ) -> Result<()> {
        let (dir, name) = self.place_of(path)?;
        let has_basis = self.current()?.has_basis;
        // Of a first run each name is new; one that comes twice violates the table's key.
        let old = if has_basis { self.live(dir, &name)? } else { None };
        let is_dir = meta.kind == Kind::Dir;
        let mut child = old.as_ref().and_then(|it| it.child).filter(|_| is_dir);
        match &old {
            None => self.tally(meta.kind, |it| it.added += 1)?,
            Some(old) => {
                self.close(dir, &name, old)?;
                if let Some(below) = old.child.filter(|_| !is_dir) {
                    self.close_below(below)?;
                }
                self.tally(meta.kind, |it| it.modified += 1)?;
            }
        }
        if is_dir && child.is_none() {
            child = Some(self.next_dir);
            self.next_dir += 1;
        }
        if let Some(child) = child {
            self.dirs.put(path, child);
        }
        let run = self.current()?.run;
        let entry = NewEntry { dir, name: &name, version, child, meta, data_len };
        rows::put_entry(&self.conn, run, &entry).map_err(|e| match e.sqlite_error_code() {
            Some(rusqlite::ErrorCode::ConstraintViolation) => bad("a path is said twice"),
            _ => sql(e),
        })?;
        self.count(meta.kind, meta.size, true)
    }

    fn link(&mut self, link: &Link<'_>) -> Result<()> {
        let (path, version) = (link.path()?, link.version()?);
        let query = format!("SELECT {ENTRY_COLUMNS} FROM entries WHERE version = ?1 LIMIT 1");
        let mut statement = self.conn.prepare_cached(&query).map_err(sql)?;
        let mut rows = statement.query([version]).map_err(sql)?;
        let first = rows.next().map_err(sql)?.map(entry_from).transpose()?;
        drop(rows);
        drop(statement);
        match first.filter(|it| it.meta.kind != Kind::Dir) {
            Some(first) => self.put_entry(&path, version, &first.meta, first.data_len),
            None => Err(bad(format!("a further name of version {version}, which is not there"))),
        }
    }

    fn delete(&mut self, path: &[u8]) -> Result<()> {
        let (dir, name) = self.place_of(path)?;
        let gone = self.live(dir, &name)?.ok_or_else(|| {
            bad(format!("it says that '{}' is gone, which was not there", Quoted(path)))
        })?;
        self.close(dir, &name, &gone)?;
        self.tally(gone.kind, |it| it.deleted += 1)?;
        gone.child.map_or(Ok(()), |it| self.close_below(it))
    }

    fn empty(&mut self, path: &[u8]) -> Result<()> {
        let dir = self.dir_at(path)?;
        self.close_below(dir)
    }

    /// Ends the life of an entry with the run before.
    fn close(&mut self, dir: DirId, name: &[u8], live: &Live) -> Result<()> {
        let run = self.current()?.run;
        if live.first_run >= run {
            return Err(bad("a path is said twice"));
        }
        let query = "UPDATE entries SET last_run = ?4 \
                     WHERE dir = ?1 AND name = ?2 AND first_run = ?3";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        statement.execute((dir, name, live.first_run, run - 1)).map_err(sql)?;
        drop(statement);
        self.count(live.kind, live.size, false)
    }

    /// Ends the life of everything below a directory.
    fn close_below(&mut self, dir: DirId) -> Result<()> {
        self.dirs.clear();
        let run = self.current()?.run;
        let mut dirs = vec![dir];
        while let Some(dir) = dirs.pop() {
            let query = "SELECT kind, child, size, first_run FROM entries \
                         WHERE dir = ?1 AND last_run = ?2";
            let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
            let mut rows = statement.query((dir, OPEN)).map_err(sql)?;
            let mut ended = Vec::new();
            while let Some(row) = rows.next().map_err(sql)? {
                let kind = Kind::from_number(row.get(0).map_err(sql)?);
                let kind = kind.ok_or_else(|| bad("unknown kind of entry"))?;
                dirs.extend(row.get::<_, Option<DirId>>(1).map_err(sql)?);
                if row.get::<_, RunId>(3).map_err(sql)? >= run {
                    return Err(bad("what is new is in a directory that is gone"));
                }
                ended.push((kind, row.get::<_, u64>(2).map_err(sql)?));
            }
            drop(rows);
            let query = "UPDATE entries SET last_run = ?2 WHERE dir = ?1 AND last_run = ?3";
            let mut update = self.conn.prepare_cached(query).map_err(sql)?;
            update.execute((dir, run - 1, OPEN)).map_err(sql)?;
            drop((update, statement));
            for (kind, size) in ended {
                self.count(kind, size, false)?;
                self.tally(kind, |it| it.deleted += 1)?;
            }
        }
        Ok(())
    }

    fn owner(&mut self, owner: &Owner<'_>) -> Result<()> {
        let (kind, id, name) = (owner.kind()?, owner.id, owner.name()?);
        let run = self.current()?.run;
        let query = "INSERT OR REPLACE INTO owners (kind, id, first_run, name) \
                     VALUES (?1, ?2, ?3, ?4)";
        self.conn.execute(query, (kind, id, run, name)).map_err(sql)?;
        Ok(())
    }

    fn problem(&mut self, problem: &Problem<'_>) -> Result<()> {
        let path = problem.path()?;
        let current = self.current()?;
        current.problems += 1;
        let (run, n) = (current.run, current.problems);
        let query = "INSERT INTO scratch.problems VALUES (?1, ?2, ?3, ?4, ?5)";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let row = (run, n, path, problem.kind, problem.message());
        statement.execute(row).map_err(sql)?;
        Ok(())
    }

    fn tally(&mut self, kind: Kind, change: impl FnOnce(&mut super::Tally)) -> Result<()> {
        change(self.current()?.counts.tally(kind));
        Ok(())
    }

    /// Counts an entry that lives now, or does not any more.
    fn count(&mut self, kind: Kind, size: u64, lives: bool) -> Result<()> {
        let source = self.current()?.source;
        let Alive { entries, dirs, files, bytes } = self.alive.entry(source).or_default();
        let add = |sum: &mut u64, n: u64| {
            *sum = if lives { sum.saturating_add(n) } else { sum.saturating_sub(n) };
        };
        add(if kind == Kind::Dir { dirs } else { entries }, 1);
        if kind == Kind::File {
            add(files, 1);
            add(bytes, size);
        }
        Ok(())
    }
}
