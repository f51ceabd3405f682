//! A catalog built anew from what volumes say: settings, volumes, blocks, and the history.
//!
//! It is begun from nothing, or from a copy of the catalog of after an earlier run; built under
//! another name beside its place, in one transaction, it gets its name when it is whole. Runs come
//! in the order of their numbers, each manifest twice: first what goes and what directories there
//! are, then all else, for lines of different paths come in no order. What does not follow from
//! what was before is refused: a history that has lost a part shows here.

pub(super) mod known;
mod learn;
mod lines;
pub(super) mod place;
pub(super) mod scratch;

pub use known::Changed;
pub use place::{Built, Place};
pub use scratch::{Fit, Found, FoundAt};

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::Path;

use lru::LruCache;
use rusqlite::{Connection, OptionalExtension};

use super::chain::put_last_manifest;
use super::history::{Head, Tail};
use super::manifest::Previous;
use super::numbers::{self, Numbered};
use super::rows::{self, RunRow};
use super::run::{Counts, DirId, RunId, Tally, VersionId};
use super::{Content, Extent, OPEN, Settings, sql};
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
    place: Place,
    /// Whether it has begun from a copy, and knows blocks and runs already.
    is_resumed: bool,
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
        Place::take(target)?.create()
    }

    /// Begins with what the database has.
    fn begin(place: Place, conn: Connection, is_resumed: bool) -> Result<Rebuild> {
        // Nothing of it counts before it is whole and synced.
        for (pragma, value) in [("journal_mode", "DELETE"), ("synchronous", "OFF")] {
            conn.pragma_update(None, pragma, value).map_err(sql)?;
        }
        conn.pragma_update(None, "cache_size", -CACHE_KIB).map_err(sql)?;
        scratch::attach(&conn, &place.scratch())?;
        conn.execute_batch("BEGIN IMMEDIATE").map_err(sql)?;
        let blocks = NonZeroUsize::MIN.saturating_add(BLOCKS_MAX - 1);
        Ok(Rebuild {
            next_dir: numbers::next(&conn, Numbered::Dir)?,
            next_block: numbers::next(&conn, Numbered::Block)?.cast_unsigned(),
            last_version: numbers::last_given(&conn, Numbered::Version)?,
            alive: alive(&conn)?,
            conn,
            place,
            is_resumed,
            dirs: Dirs::default(),
            blocks: LruCache::new(blocks),
            current: None,
            faults: Vec::new(),
            fault_count: 0,
        })
    }

    /// What was found of blocks.
    pub fn found(&self) -> Found<'_> {
        Found::new(&self.conn)
    }

    /// Gives all blocks that were found their numbers, and puts them into the catalog.
    pub fn settle_blocks(&mut self) -> Result<()> {
        self.next_block = match self.is_resumed {
            true => known::settle(&self.conn, &mut Changed::default())?,
            false => scratch::settle(&self.conn)?,
        };
        Ok(())
    }

    /// Settles the settings: those of `usual`, where `rows` do not say otherwise.
    pub fn put_settings(&self, usual: &Settings, rows: &[(String, String)]) -> Result<Settings> {
        usual.write(&self.conn)?;
        self.change_settings(rows)
    }

    /// Settles what `rows` say of settings that are there already.
    pub fn change_settings(&self, rows: &[(String, String)]) -> Result<Settings> {
        let query = "INSERT INTO settings (k, v) VALUES (?1, ?2) \
                     ON CONFLICT (k) DO UPDATE SET v = excluded.v";
        for (key, value) in rows {
            if key != "catalog_id" && !key.starts_with("last_") {
                self.conn.execute(query, (key, value)).map_err(sql)?;
            }
        }
        Settings::read(&self.conn)
    }

    /// Leaves these volumes in the catalog and no others, as they are now. Of each is said when it
    /// was made and how far its index has been read, where that is known.
    pub fn put_volumes(&self, volumes: &[(VolumeConfig, Option<i64>, Option<u64>)]) -> Result<()> {
        known::put_volumes(&self.conn, volumes)
    }

    /// Forgets the copies of blocks on these volumes, but for blocks that have no other.
    pub fn forget_copies_on(&self, volumes: &[i64]) -> Result<()> {
        // Numbers only, which are this program's own.
        let list = volumes.iter().map(i64::to_string).collect::<Vec<_>>().join(", ");
        let query = format!(
            "DELETE FROM block_copies WHERE volume IN ({list}) AND EXISTS \
             (SELECT 1 FROM block_copies o WHERE o.block = block_copies.block \
             AND o.volume NOT IN ({list}))"
        );
        self.conn.execute(&query, []).map_err(sql).map(|_| ())
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
        match self.is_resumed {
            true => known::put_chunks(&self.conn, &mut Changed::default())?,
            false => scratch::put_chunks(&self.conn)?,
        }
        if let Some(Previous { run, uuid, digest: Some(digest) }) = newest {
            put_last_manifest(&self.conn, *run, uuid, digest)?;
        }
        numbers::keep(&self.conn)?;
        self.conn.execute_batch("COMMIT").map_err(sql)?;
        self.conn.execute_batch("DETACH scratch").map_err(sql)?;
        self.conn.pragma_update(None, "journal_mode", "WAL").map_err(sql)?;
        let faults = self.take_faults();
        self.conn.close().map_err(|(_, e)| sql(e))?;
        Ok(Built::new(self.place, faults))
    }
}

/// What each source has, as its newest run has counted it.
fn alive(conn: &Connection) -> Result<HashMap<i64, Alive>> {
    let query = "SELECT source, added + modified + unchanged, \
                 dirs_added + dirs_modified + dirs_unchanged, files, bytes FROM runs \
                 WHERE run IN (SELECT max(run) FROM runs GROUP BY source)";
    let mut statement = conn.prepare(query).map_err(sql)?;
    let rows = statement.query_map([], |row| {
        let (entries, dirs) = (row.get(1)?, row.get(2)?);
        let alive = Alive { entries, dirs, files: row.get(3)?, bytes: row.get(4)? };
        Ok((row.get(0)?, alive))
    });
    rows.map_err(sql)?.collect::<rusqlite::Result<_>>().map_err(sql)
}
