//! A catalog built anew from what volumes say: settings, volumes, blocks, and the history.
//!
//! It is built under another name beside its place, in one transaction, and gets its name when it
//! is whole. Runs come in the order of their numbers, each manifest twice: first what goes and what
//! directories there are, then all else, for lines of different paths come in no order. What does
//! not follow from what was before is refused: a history that has lost a part shows here.

mod lines;
mod scratch;

pub use scratch::{Fit, FoundAt};

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use lru::LruCache;
use rusqlite::{Connection, OptionalExtension};

use super::chain::put_last_manifest;
use super::history::{Head, Tail};
use super::manifest::Previous;
use super::numbers::{self, Numbered};
use super::rows::{self, RunRow};
use super::run::{Counts, DirId, RunId, Tally, VersionId};
use super::{Content, Extent, OPEN, Reader, Settings, WriteLock, schema, sql};
use crate::chunk::Digest;
use crate::entry::{Kind, Metadata, check_name};
use crate::error::{Error, Quoted, Result};
use crate::sys::{self, Time, quoted};
use crate::volume::{BlockId, VolumeConfig};

/// Memory for pages, in KiB.
const CACHE_KIB: i64 = 64 << 10;
/// Paths of directories that are remembered, in bytes.
const DIRS_BYTES_MAX: usize = 8 << 20;
/// Blocks whose numbers are remembered.
const BLOCKS_MAX: usize = 1 << 16;
/// Faults that are kept with their texts; more are counted.
const FAULTS_MAX: usize = 1000;
/// The frame table of a block of which no frame is known.
pub const NO_FRAMES: [u8; 1] = [0];

/// A catalog that is being built.
pub struct Rebuild {
    conn: Connection,
    target: PathBuf,
    lock: WriteLock,
    dirs: Dirs,
    blocks: LruCache<BlockId, KnownBlock>,
    next_dir: DirId,
    next_block: u64,
    last_version: VersionId,
    alive: HashMap<i64, Alive>,
    current: Option<Current>,
    faults: Vec<String>,
    fault_count: u64,
}

#[derive(Clone, Copy)]
struct KnownBlock {
    number: u64,
    plain_len: u64,
    /// Whether no volume that is here has it.
    is_lacking: bool,
}

/// What a source has after its last run.
#[derive(Clone, Copy, Default)]
struct Alive {
    entries: u64,
    dirs: u64,
    files: u64,
    bytes: u64,
}

/// The run that is being replayed.
struct Current {
    run: RunId,
    source: i64,
    name: Vec<u8>,
    /// Whether the source had a run before.
    has_basis: bool,
    /// Versions up to this one belong to earlier runs.
    versions_before: VersionId,
    counts: Counts,
    problems: i64,
}

/// Numbers of directories by their paths in the source at hand.
#[derive(Default)]
struct Dirs {
    known: HashMap<Vec<u8>, DirId>,
    bytes: usize,
}

impl Dirs {
    fn put(&mut self, path: &[u8], dir: DirId) {
        if self.bytes > DIRS_BYTES_MAX {
            self.clear();
        }
        self.bytes += path.len() + 100;
        self.known.insert(path.to_vec(), dir);
    }

    fn clear(&mut self) {
        self.known.clear();
        self.bytes = 0;
    }
}

/// A row that lives, as far as it matters to what ends it.
struct Live {
    first_run: RunId,
    child: Option<DirId>,
    kind: Kind,
    size: u64,
}

impl Rebuild {
    /// Begins a catalog that will be at `target`, where nothing may be.
    pub fn create(target: &Path) -> Result<Rebuild> {
        if target.symlink_metadata().is_ok() {
            // A rebuild that was killed may have made it, and not have come to this.
            let _ = sys::sync_dir(target.parent().unwrap_or(Path::new("/")));
            let message = format!("{} exists already: give a new name", quoted(target));
            return Err(Error::usage(message));
        }
        if let Some(dir) = target.parent() {
            sys::make_private_dirs(dir).map_err(|e| Error::io(quoted(dir).to_string(), e))?;
        }
        let lock = WriteLock::take(target)?;
        // What a killed one has left is of no use.
        remove_built(target)?;
        let conn = schema::create(&built_path(target), |_| Ok(()))?;
        // Nothing of it counts before it is whole and synced.
        for (pragma, value) in [("journal_mode", "DELETE"), ("synchronous", "OFF")] {
            conn.pragma_update(None, pragma, value).map_err(sql)?;
        }
        conn.pragma_update(None, "cache_size", -CACHE_KIB).map_err(sql)?;
        scratch::attach(&conn, &beside(target, SCRATCH))?;
        conn.execute_batch("BEGIN IMMEDIATE").map_err(sql)?;
        let blocks = NonZeroUsize::MIN.saturating_add(BLOCKS_MAX - 1);
        Ok(Rebuild {
            conn,
            target: target.to_path_buf(),
            lock,
            dirs: Dirs::default(),
            blocks: LruCache::new(blocks),
            next_dir: 1,
            next_block: 1,
            last_version: 0,
            alive: HashMap::new(),
            current: None,
            faults: Vec::new(),
            fault_count: 0,
        })
    }

    /// Settles the settings: those of `usual`, where `rows` do not say otherwise.
    pub fn put_settings(&self, usual: &Settings, rows: &[(String, String)]) -> Result<Settings> {
        usual.write(&self.conn)?;
        let query = "INSERT INTO settings (k, v) VALUES (?1, ?2) \
                     ON CONFLICT (k) DO UPDATE SET v = excluded.v";
        for (key, value) in rows {
            if key != "catalog_id" && !key.starts_with("last_") {
                self.conn.execute(query, (key, value)).map_err(sql)?;
            }
        }
        Settings::read(&self.conn)
    }

    /// Adds a volume.
    pub fn put_volume(&self, volume: &VolumeConfig, created: i64, index_len: u64) -> Result<()> {
        let query = "INSERT INTO volumes \
                     (number, uuid, path, status, reserve_percent, created_s, index_len) \
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
        let path = std::os::unix::ffi::OsStrExt::as_bytes(volume.path.as_os_str());
        let status = volume.status.as_str();
        let percent = volume.reserve_percent;
        let row = (volume.number, &volume.uuid, path, status, percent, created, index_len);
        self.conn.execute(query, row).map_err(sql)?;
        Ok(())
    }

    fn fault(&mut self, fault: String) {
        self.fault_count += 1;
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(fault);
        }
    }

    /// Takes what was found not to fit, and how much of it there was.
    pub fn take_faults(&mut self) -> (Vec<String>, u64) {
        (std::mem::take(&mut self.faults), std::mem::take(&mut self.fault_count))
    }

    /// Begins a run, of which all lines have to follow twice.
    pub fn begin_run(&mut self, head: &Head) -> Result<()> {
        let query = "INSERT OR IGNORE INTO sources (name) VALUES (?1)";
        self.conn.execute(query, [&head.source]).map_err(sql)?;
        let query = "SELECT number, EXISTS (SELECT 1 FROM runs WHERE source = number) \
                     FROM sources WHERE name = ?1";
        let found =
            self.conn.query_row(query, [&head.source], |row| Ok((row.get(0)?, row.get(1)?)));
        let (source, has_basis) = found.map_err(sql)?;
        self.dirs.clear();
        self.current = Some(Current {
            run: head.run,
            source,
            name: head.source.clone(),
            has_basis,
            versions_before: self.last_version,
            counts: Counts::default(),
            problems: 0,
        });
        Ok(())
    }

    fn current(&mut self) -> Result<&mut Current> {
        self.current.as_mut().ok_or_else(|| Error::usage("no run has begun"))
    }

    /// Ends the run: what its manifest says of it, or what its lines have come to.
    pub fn end_run(&mut self, head: &Head, tail: Option<&Tail>) -> Result<()> {
        let Some(current) = self.current.take() else { return Ok(()) };
        let alive = self.alive.entry(current.source).or_default();
        let mut counts = current.counts;
        let unchanged = |all: u64, tally: Tally| all.saturating_sub(tally.added + tally.modified);
        counts.entries.unchanged = unchanged(alive.entries, counts.entries);
        counts.dirs.unchanged = unchanged(alive.dirs, counts.dirs);
        (counts.files, counts.bytes) = (alive.files, alive.bytes);
        let finished = tail.map_or(head.started, |it| it.finished);
        if let Some(said) = tail {
            if (said.counts.files, said.counts.bytes) != (counts.files, counts.bytes) {
                let (files, bytes) = (counts.files, counts.bytes);
                let (said_files, said_bytes) = (said.counts.files, said.counts.bytes);
                self.fault(format!(
                    "run {}: the manifests lead to {files} files of {bytes} bytes, and the run \
                     counted {said_files} of {said_bytes}",
                    head.run
                ));
            }
            counts = said.counts;
        }
        self.put_run(head, &counts, finished)
    }

    fn put_run(&self, head: &Head, counts: &Counts, finished: Time) -> Result<()> {
        let (path, host, program) = match &head.around {
            Some(it) => (&*it.path, &*it.host, &*it.program),
            // The name of most sources is their path.
            None if head.source.starts_with(b"/") => (&*head.source, &b""[..], "unknown"),
            None => (&b"-"[..], &b""[..], "unknown"),
        };
        rows::put_run(
            &self.conn,
            &RunRow {
                run: head.run,
                uuid: &head.uuid,
                source: &head.source,
                path,
                started: head.started,
                finished,
                counts,
                host,
                program,
                tags: &head.tags,
                comment: &head.comment,
            },
        )?;
        // Deferred to here, for they name the run.
        let query = "INSERT INTO run_problems SELECT * FROM scratch.problems";
        self.conn.execute(query, []).map_err(sql)?;
        self.conn.execute("DELETE FROM scratch.problems", []).map_err(sql)?;
        Ok(())
    }

    /// Sees to it that no number up to these is given again: they belong to runs that are left out.
    pub fn keep_numbers(&mut self, run: RunId, version: VersionId) -> Result<()> {
        self.last_version = self.last_version.max(version);
        let query = "INSERT INTO settings (k, v) VALUES (?1, ?2) \
                     ON CONFLICT (k) DO UPDATE SET v = excluded.v";
        for (what, number) in [(Numbered::Run, run), (Numbered::Version, version)] {
            let last = numbers::last_given(&self.conn, what)?.max(number);
            self.conn.execute(query, (what.setting(), last.to_string())).map_err(sql)?;
        }
        Ok(())
    }

    /// Ends the building: a catalog that is whole, under its temporary name.
    pub fn finish(mut self, newest: Option<&Previous>) -> Result<Built> {
        scratch::put_chunks(&self.conn)?;
        if let Some(Previous { run, uuid, digest: Some(digest) }) = newest {
            put_last_manifest(&self.conn, *run, uuid, digest)?;
        }
        numbers::keep(&self.conn)?;
        self.conn.execute_batch("COMMIT").map_err(sql)?;
        self.conn.execute_batch("DETACH scratch").map_err(sql)?;
        self.conn.pragma_update(None, "journal_mode", "WAL").map_err(sql)?;
        let faults = self.take_faults();
        self.conn.close().map_err(|(_, e)| sql(e))?;
        Ok(Built { target: self.target, _lock: self.lock, faults })
    }
}

/// A catalog that is whole but has not got its name.
pub struct Built {
    target: PathBuf,
    _lock: WriteLock,
    /// What was found not to fit, and how much of it there was.
    pub faults: (Vec<String>, u64),
}

impl Built {
    /// Opens it for reading.
    pub fn open(&self) -> Result<Reader> {
        Reader::open(&built_path(&self.target))
    }

    /// Gives it its name, durably. Nobody may have it open.
    pub fn publish(self) -> Result<()> {
        let path = built_path(&self.target);
        let failed = |e| Error::io(format!("syncing {}", quoted(&path)), e);
        let file = sys::private_file().write(true).open(&path).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        if self.target.symlink_metadata().is_ok() {
            let message = format!("{} has been made meanwhile", quoted(&self.target));
            return Err(Error::usage(message));
        }
        sys::rename_durable(&path, &self.target)?;
        remove_built(&self.target)
    }
}

/// Names of what is built, after the name that it will have.
const BUILT: &str = ".rebuilding";
const SCRATCH: &str = ".rebuilding-scratch";

fn beside(target: &Path, suffix: &str) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_os_string();
    name.push(suffix);
    target.with_file_name(name)
}

fn built_path(target: &Path) -> PathBuf {
    beside(target, BUILT)
}

/// Removes what is left of a building.
fn remove_built(target: &Path) -> Result<()> {
    for base in [BUILT, SCRATCH] {
        for suffix in ["", "-journal", "-wal", "-shm", ".new", ".new-journal"] {
            let path = beside(target, &format!("{base}{suffix}"));
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io(format!("removing {}", quoted(&path)), e));
                }
                _ => {}
            }
        }
    }
    Ok(())
}
