//! Writing the catalog: the writer's lock, volumes, and the one transaction of a run.
//!
//! A run is invisible until [`RunWriter::commit`] ends its transaction with `synchronous=FULL`; if
//! the process dies before, SQLite takes everything back. Blocks enter only as [`Stored`] values,
//! and before the commit [`RunWriter::metas_due`] finds every block that the run's versions name,
//! or the run fails. (Deferred foreign keys would say the same, but make SQLite search all children
//! of each new row.)

use std::fs::File;
use std::io::{Read, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension};

use super::chain::{PROGRAM, setting_rows};
use super::numbers::{self, Numbered};
use super::read::{EntryRow, volumes};
use super::rows::{self, RunRow};
use super::run::{Counts, DirId, RunId, VersionId};
use super::{Content, Extent, OPEN, Settings, copies, extent, schema, sql};
use crate::chunk::frame::put_frames;
use crate::chunk::{ChunkId, Digest};
use crate::entry::{Extra, Kind, Metadata};
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::sys::lock::{LockedFile, PATIENCE, is_locked};
use crate::sys::{self, Time, quoted};
use crate::volume::{BlockId, Facts, Place, Status, Stored, Volume, VolumeConfig};

/// The right to write a catalog and its volumes. Held by one process at a time; the kernel takes it
/// back when the process ends, however it ends.
pub struct WriteLock {
    _file: LockedFile,
}

impl WriteLock {
    /// Takes the lock of the catalog at `catalog`, or says who has it.
    pub fn take(catalog: &Path) -> Result<WriteLock> {
        let path = lock_path(catalog);
        let failed = |e| Error::io(format!("locking {}", quoted(&path)), e);
        let mut options = sys::private_file();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).map_err(failed)?;
        let Some(file) = LockedFile::within(file, PATIENCE).map_err(failed)? else {
            // Only for the message; a lock file without text is as good.
            let owner = WriteLock::holder(catalog).unwrap_or_default();
            let message = format!(
                "{} is being written by another process ({}): wait for it or stop it",
                quoted(catalog),
                crate::error::Quoted(owner.as_bytes())
            );
            return Err(Error::new(ErrorKind::Locked, message));
        };
        file.set_len(0).map_err(failed)?;
        write!(&*file, "pid {}", std::process::id()).map_err(failed)?;
        Ok(WriteLock { _file: file })
    }

    /// Whether somebody has the lock of the catalog at `catalog`.
    pub fn is_held(catalog: &Path) -> Result<bool> {
        let path = lock_path(catalog);
        let failed = |e| Error::io(format!("opening {}", quoted(&path)), e);
        match File::open(&path) {
            Ok(file) => is_locked(&file).map_err(failed),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(failed(e)),
        }
    }

    /// What whoever has the lock of the catalog at `catalog` has written of itself: `pid N`. Of the
    /// last one, if nobody has it.
    pub fn holder(catalog: &Path) -> Option<String> {
        let mut text = String::new();
        File::open(lock_path(catalog)).ok()?.take(200).read_to_string(&mut text).ok()?;
        Some(text.trim().to_owned()).filter(|it| !it.is_empty())
    }
}

fn lock_path(catalog: &Path) -> PathBuf {
    let mut name = catalog.file_name().unwrap_or_default().to_os_string();
    name.push(".lock");
    catalog.with_file_name(name)
}

/// Writes a catalog. Holds the writer's lock.
pub struct Writer {
    conn: Connection,
    _lock: WriteLock,
}

impl Writer {
    /// Makes a catalog, which must not exist.
    pub fn create(path: &Path, settings: &Settings) -> Result<Writer> {
        settings.check()?;
        let lock = WriteLock::take(path)?;
        let conn = schema::create(path, |conn| settings.write(conn))?;
        Ok(Writer { conn, _lock: lock })
    }

    /// Opens a catalog for writing, or says who is writing it.
    pub fn open(path: &Path) -> Result<Writer> {
        if !path.exists() {
            let message = format!("there is no catalog at {}: make one with init", quoted(path));
            return Err(Error::new(ErrorKind::NoCatalog, message));
        }
        let lock = WriteLock::take(path)?;
        Ok(Writer { conn: schema::open_to_write(path)?, _lock: lock })
    }

    /// The right to write the catalog at `path`, with which only `copy`, a copy of it, is written.
    pub(super) fn on_copy(lock: WriteLock, copy: &Path) -> Result<Writer> {
        let conn = schema::open_to_write(copy)?;
        // It goes with its writer.
        for (pragma, value) in [("journal_mode", "DELETE"), ("synchronous", "OFF")] {
            conn.pragma_update(None, pragma, value).map_err(sql)?;
        }
        Ok(Writer { conn, _lock: lock })
    }

    pub(super) fn conn(&self) -> &Connection {
        &self.conn
    }

    pub(super) fn transact(&mut self, work: impl FnOnce(&Connection) -> Result<()>) -> Result<()> {
        // Taken back when it is dropped without its end.
        let transaction = self
            .conn
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
            .map_err(sql)?;
        work(&transaction)?;
        transaction.commit().map_err(sql)
    }

    /// The catalog's settings.
    pub fn settings(&self) -> Result<Settings> {
        Settings::read(&self.conn)
    }

    /// All volumes in order of their numbers.
    pub fn volumes(&self) -> Result<Vec<VolumeConfig>> {
        volumes(&self.conn)
    }

    /// Makes a volume of directory `path` and adds it.
    pub fn add_volume(&mut self, path: &Path, reserve_percent: u8) -> Result<VolumeConfig> {
        if reserve_percent > 99 {
            return Err(Error::usage("the reserve must be 0 to 99 percent"));
        }
        for config in self.volumes()?.into_iter().filter(|it| it.path == path) {
            // Begun by a process that died before it was done.
            if Volume::finish(&config)? {
                return Ok(config);
            }
        }
        let settings = self.settings()?;
        let next = numbers::next(&self.conn, Numbered::Volume)?;
        let config = VolumeConfig {
            number: next,
            uuid: uuid::Uuid::new_v4().to_string(),
            path: path.to_path_buf(),
            status: Status::Active,
            reserve_percent,
        };
        let created = Time::now().secs;
        let facts = Facts { number: next, created, settings: setting_rows(&self.conn)? };
        let query = "INSERT INTO volumes (number, uuid, path, status, reserve_percent, created_s) \
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
        let row = (
            config.number,
            &config.uuid,
            path.as_os_str().as_bytes(),
            config.status.as_str(),
            config.reserve_percent,
            created,
        );
        Volume::create(path, &config, settings.hash, facts, || {
            self.conn.execute(query, row).map_err(sql)?;
            Ok(())
        })?;
        Ok(config)
    }

    /// Notes a volume's status.
    pub fn set_volume_status(&mut self, number: i64, status: Status) -> Result<()> {
        let query = "UPDATE volumes SET status = ?2 WHERE number = ?1";
        self.conn.execute(query, (number, status.as_str())).map_err(sql)?;
        Ok(())
    }

    /// How much of a volume's index is in the catalog already, in bytes.
    pub fn index_len(&self, volume: i64) -> Result<u64> {
        let query = "SELECT index_len FROM volumes WHERE number = ?1";
        self.conn.query_row(query, [volume], |row| row.get(0)).map_err(sql)
    }

    /// Takes over blocks that a run which did not end has left, and how far the volume's index has
    /// been read.
    pub fn adopt(&mut self, stored: &[Stored], volume: i64, index_len: u64) -> Result<()> {
        self.conn.execute_batch("BEGIN IMMEDIATE").map_err(sql)?;
        let work = || -> Result<()> {
            stored.iter().try_for_each(|it| adopt_block(&self.conn, it))?;
            put_index_len(&self.conn, volume, index_len)
        };
        match work() {
            Ok(()) => self.conn.execute_batch("COMMIT").map_err(sql),
            Err(e) => {
                // The first error is the one to tell; SQLite rolls back by itself if this fails.
                let _ = self.conn.execute_batch("ROLLBACK");
                Err(e)
            }
        }
    }

    /// The number that the next block gets.
    pub fn next_block(&self) -> Result<u64> {
        numbers::next(&self.conn, Numbered::Block).map(i64::cast_unsigned)
    }

    /// Whether a block has this number.
    pub fn has_block(&self, number: u64) -> Result<bool> {
        let query = "SELECT EXISTS (SELECT 1 FROM blocks WHERE number = ?1)";
        self.conn.query_row(query, [number], |row| row.get(0)).map_err(sql)
    }

    /// Begins a run of source `name`, which lies at `path`.
    pub fn begin_run(&mut self, name: &[u8], path: &Path, started: Time) -> Result<RunWriter<'_>> {
        let run = numbers::next(&self.conn, Numbered::Run)?;
        let next_version = numbers::next(&self.conn, Numbered::Version)?;
        let next_dir = numbers::next(&self.conn, Numbered::Dir)?;
        self.conn.execute_batch("BEGIN IMMEDIATE").map_err(sql)?;
        let writer = RunWriter {
            conn: &mut self.conn,
            run,
            next_version,
            next_dir,
            name: name.to_vec(),
            path: path.to_path_buf(),
            started,
            uuid: uuid::Uuid::new_v4().to_string(),
            ended: false,
        };
        writer
            .conn
            .execute("INSERT OR IGNORE INTO sources (name) VALUES (?1)", [name])
            .map_err(sql)?;
        Ok(writer)
    }
}

/// A name to be added to a directory.
#[derive(Debug)]
pub struct NewEntry<'a> {
    /// The directory; 0 for the root of a source.
    pub dir: DirId,
    /// The name.
    pub name: &'a [u8],
    /// The state of the inode it names.
    pub version: VersionId,
    /// For a directory, its number.
    pub child: Option<DirId>,
    /// Its metadata.
    pub meta: &'a Metadata,
    /// For a file with holes, the bytes of it that are not holes.
    pub data_len: Option<u64>,
}

/// The transaction of one run. Dropped before [`RunWriter::commit`], it leaves no trace.
pub struct RunWriter<'a> {
    conn: &'a mut Connection,
    run: RunId,
    next_version: VersionId,
    next_dir: DirId,
    name: Vec<u8>,
    path: PathBuf,
    started: Time,
    uuid: String,
    ended: bool,
}

impl RunWriter<'_> {
    /// The run's number.
    pub fn run(&self) -> RunId {
        self.run
    }

    /// The run's name, unlike any other run's anywhere.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// The number that the next new version gets.
    pub fn next_version(&self) -> VersionId {
        self.next_version
    }

    /// A number for a new version.
    pub fn new_version(&mut self) -> VersionId {
        self.next_version += 1;
        self.next_version - 1
    }

    /// A number for a new directory: greater than that of any directory made before.
    pub fn new_dir(&mut self) -> DirId {
        self.next_dir += 1;
        self.next_dir - 1
    }

    /// Name of its source.
    pub(super) fn name(&self) -> &[u8] {
        &self.name
    }

    /// Where the source lies.
    pub(super) fn path(&self) -> &[u8] {
        self.path.as_os_str().as_bytes()
    }

    /// When it began.
    pub(super) fn started(&self) -> Time {
        self.started
    }

    /// Whether any stored block has chunks.
    pub fn has_chunks(&self) -> Result<bool> {
        let query = "SELECT EXISTS (SELECT 1 FROM chunks)";
        self.conn.query_row(query, [], |row| row.get(0)).map_err(sql)
    }

    /// Where a chunk lies, if a stored block of an earlier run or of this one has it.
    pub fn find_chunk(&self, id: &ChunkId) -> Result<Option<(Place, u32)>> {
        let query = "SELECT block, at, len FROM chunks WHERE id = ?1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        statement
            .query_row([&id.0[..]], |row| {
                Ok((Place { block: row.get(0)?, offset: row.get(1)? }, row.get(2)?))
            })
            .optional()
            .map_err(sql)
    }

    /// Name, length and volumes of a block.
    pub fn block_place(&self, number: u64) -> Result<(BlockId, u64, Vec<i64>)> {
        let query = "SELECT id, stored_len FROM blocks WHERE number = ?1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let row = statement.query_row([number], |row| Ok((row.get(0)?, row.get(1)?)));
        let (id, stored_len): (Vec<u8>, u64) = row.map_err(sql)?;
        let query = "SELECT volume FROM block_copies WHERE block = ?1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let volumes = statement.query_map([number], |row| row.get(0)).map_err(sql)?;
        let volumes = volumes.collect::<rusqlite::Result<_>>().map_err(sql)?;
        Ok((Digest::from_slice(&id)?, stored_len, volumes))
    }

    /// Hash of a version's whole content, and the blocks that it has bytes in.
    pub fn hash_and_blocks(&self, version: VersionId) -> Result<(Option<Digest>, Vec<u64>)> {
        let query = "SELECT hash, extents FROM versions WHERE version = ?1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        type Columns = (Option<Vec<u8>>, Option<Vec<u8>>);
        let found: Option<Columns> = statement
            .query_row([version], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()
            .map_err(sql)?;
        let (hash, extents) = found.unwrap_or_default();
        let extents = extent::decode(&extents.unwrap_or_default())?;
        let blocks = extents.iter().filter_map(|it| match it {
            Extent::Data { block, .. } => Some(*block),
            Extent::Hole { .. } => None,
        });
        Ok((hash.map(|it| Digest::from_slice(&it)).transpose()?, blocks.collect()))
    }

    /// Link target, attributes and flags of a version.
    pub fn extra_of(&self, version: VersionId) -> Result<Extra> {
        let query = "SELECT extra FROM versions WHERE version = ?1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let found: Option<Option<Vec<u8>>> =
            statement.query_row([version], |row| row.get(0)).optional().map_err(sql)?;
        Extra::decode(&found.flatten().unwrap_or_default())
    }

    /// Bytes of a version that are not holes, if it has holes.
    pub fn data_len_of(&self, version: VersionId) -> Result<Option<u64>> {
        let query = "SELECT data_len FROM entries WHERE version = ?1 LIMIT 1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let found = statement.query_row([version], |row| row.get(0)).optional().map_err(sql)?;
        Ok(found.flatten())
    }

    /// Adds a stored block and its chunks.
    pub fn put_block(&self, stored: &Stored) -> Result<()> {
        put_block(self.conn, stored)
    }

    /// Notes how much of a volume's index the catalog has, in bytes.
    pub fn put_index_len(&self, volume: i64, index_len: u64) -> Result<()> {
        put_index_len(self.conn, volume, index_len)
    }

    /// Notes that a volume has been sealed.
    pub fn seal_volume(&self, volume: i64) -> Result<()> {
        let query = "UPDATE volumes SET status = 'sealed' WHERE number = ?1";
        self.conn.execute(query, [volume]).map_err(sql)?;
        Ok(())
    }

    /// Adds a name, alive from this run on.
    pub fn put_entry(&self, entry: &NewEntry<'_>) -> Result<()> {
        rows::put_entry(self.conn, self.run, entry).map_err(sql)
    }

    /// Adds what a version has besides its metadata. Versions with nothing need no call.
    pub fn put_content(&self, version: VersionId, kind: Kind, content: &Content) -> Result<()> {
        rows::put_content(self.conn, version, kind, content)
    }

    /// Ends the life of an entry with the run before this one.
    pub fn close_entry(&self, row: &EntryRow) -> Result<()> {
        let query = "UPDATE entries SET last_run = ?4 \
                     WHERE dir = ?1 AND name = ?2 AND first_run = ?3";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        statement.execute((row.dir, &row.name, row.first_run, self.run - 1)).map_err(sql)?;
        Ok(())
    }

    /// Ends the life of everything below a directory, calling `each` with the kind of every entry.
    pub fn close_below(&self, dir: DirId, mut each: impl FnMut(Kind)) -> Result<()> {
        let mut dirs = vec![dir];
        while let Some(dir) = dirs.pop() {
            let query = "SELECT kind, child FROM entries WHERE dir = ?1 AND last_run = ?2";
            let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
            let mut rows = statement.query((dir, OPEN)).map_err(sql)?;
            while let Some(row) = rows.next().map_err(sql)? {
                let kind = Kind::from_number(row.get(0).map_err(sql)?);
                each(kind.ok_or_else(|| Error::corrupt("catalog: unknown kind of entry"))?);
                dirs.extend(row.get::<_, Option<DirId>>(1).map_err(sql)?);
            }
            drop(rows);
            let query = "UPDATE entries SET last_run = ?2 WHERE dir = ?1 AND last_run = ?3";
            let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
            statement.execute((dir, self.run - 1, OPEN)).map_err(sql)?;
        }
        Ok(())
    }

    /// Notes the name that an owner (`user`) or group (`group`) number stands for, if it changed;
    /// says whether it did.
    pub fn put_owner(&self, kind: &str, id: u32, name: &[u8]) -> Result<bool> {
        let query = "SELECT name FROM owners WHERE kind = ?1 AND id = ?2 \
                     ORDER BY first_run DESC LIMIT 1";
        let known: Option<Vec<u8>> =
            self.conn.query_row(query, (kind, id), |row| row.get(0)).optional().map_err(sql)?;
        let is_new = known.as_deref() != Some(name);
        if is_new {
            let query = "INSERT OR REPLACE INTO owners (kind, id, first_run, name) \
                         VALUES (?1, ?2, ?3, ?4)";
            self.conn.execute(query, (kind, id, self.run, name)).map_err(sql)?;
        }
        Ok(is_new)
    }

    /// The connection, for what has to be read inside the transaction.
    pub(super) fn conn(&self) -> &Connection {
        self.conn
    }

    /// Makes the run visible, with its tags and its comment: the one moment in which it begins to
    /// exist.
    pub fn commit(
        &mut self,
        counts: &Counts,
        (tags, comment): (&[String], &str),
        problems: &[Problem],
        finished: Time,
    ) -> Result<RunId> {
        rows::put_run(
            self.conn,
            &RunRow {
                run: self.run,
                uuid: &self.uuid,
                source: &self.name,
                path: self.path(),
                started: self.started,
                finished,
                counts,
                host: &sys::host_name(),
                program: PROGRAM,
                tags,
                comment,
            },
        )?;
        for (n, problem) in (1i64..).zip(problems) {
            let query = "INSERT INTO run_problems (run, n, path, kind, message) \
                         VALUES (?1, ?2, ?3, ?4, ?5)";
            let row = (self.run, n, &problem.path, problem.kind.as_str(), &problem.message);
            self.conn.execute(query, row).map_err(sql)?;
        }
        numbers::keep(self.conn)?;
        self.conn.execute_batch("COMMIT").map_err(sql)?;
        self.ended = true;
        Ok(self.run)
    }
}

impl Drop for RunWriter<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // If this fails, SQLite takes the transaction back when the file is next opened.
            let _ = self.conn.execute_batch("ROLLBACK");
        }
    }
}

fn put_block(conn: &Connection, stored: &Stored) -> Result<()> {
    let index = stored.index();
    let mut frames = Vec::new();
    put_frames(&mut frames, &index.frames);
    let query = "INSERT INTO blocks (number, id, stored_len, plain_len, frames) \
                 VALUES (?1, ?2, ?3, ?4, ?5)";
    let row = (stored.block(), &index.id.0[..], index.stored_len(), index.plain_len(), frames);
    conn.prepare_cached(query).map_err(sql)?.execute(row).map_err(sql)?;
    stored.copies().iter().try_for_each(|it| copies::put(conn, stored.block(), *it))?;
    // The newest place counts: a chunk is stored again only where the block that had it is damaged.
    let query = "INSERT INTO chunks (id, block, at, len) VALUES (?1, ?2, ?3, ?4) \
                 ON CONFLICT (id) DO UPDATE SET block = excluded.block, at = excluded.at, \
                 len = excluded.len WHERE excluded.block >= block";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    // In the table's own order: pages are filled one after another, not here and there.
    let mut chunks: Vec<_> = index.placed_chunks().collect();
    chunks.sort_unstable_by_key(|(at, chunk)| (chunk.id, *at));
    for (at, chunk) in chunks {
        statement.execute((&chunk.id.0[..], stored.block(), at, chunk.len)).map_err(sql)?;
    }
    Ok(())
}

/// Adds a block that was left behind; if the catalog has it, only the copy is new.
fn adopt_block(conn: &Connection, stored: &Stored) -> Result<()> {
    match copies::known_as(conn, stored.index())? {
        Some(block) => stored.copies().iter().try_for_each(|it| copies::put(conn, block, *it)),
        None => put_block(conn, stored),
    }
}

pub(super) fn put_index_len(conn: &Connection, volume: i64, index_len: u64) -> Result<()> {
    let query = "UPDATE volumes SET index_len = ?2 WHERE number = ?1";
    conn.execute(query, (volume, index_len)).map_err(sql)?;
    Ok(())
}
