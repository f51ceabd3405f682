//! Reading the catalog: runs, directories at a run, content, blocks.
//!
//! Everything that comes out has been checked: kinds, times, names and lengths are possible ones,
//! whatever the file says. A reader sees the runs that were finished when its call began.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension, Row};

use super::numbers::{self, Numbered};
use super::run::{COMMENT_BYTES_MAX, Counts, DirId, Run, RunId, Tally, VersionId};
use super::{Content, Settings, extent, schema, sql};
use crate::chunk::Digest;
use crate::chunk::frame::{Frame, get_frames};
use crate::entry::{Extra, Kind, Metadata, check_name};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{Time, path_from};
use crate::volume::{BlockId, VolumeConfig};
use crate::wire::Reader as WireReader;

/// An entry as the catalog has it: a name in a directory, for a range of runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryRow {
    /// The directory it is in; 0 for the root of a source.
    pub dir: DirId,
    /// Its name; for the root of a source, the source's name.
    pub name: Vec<u8>,
    /// First run that has it.
    pub first_run: RunId,
    /// Last run that has it; [`i64::MAX`] while it lives.
    pub last_run: RunId,
    /// The state of the inode it names.
    pub version: VersionId,
    /// For a directory, its number.
    pub child: Option<DirId>,
    /// Its metadata.
    pub meta: Metadata,
    /// For a file with holes, the bytes of it that are not holes.
    pub data_len: Option<u64>,
}

/// The columns of [`EntryRow`], in the order in which [`entry_from`] reads them.
pub(super) const ENTRY_COLUMNS: &str = "dir, name, first_run, last_run, version, child, kind, \
     mode, uid, gid, size, mtime_s, mtime_n, ctime_s, ctime_n, ino, nlink, rdev, data_len";

/// A block as a reader needs it.
#[derive(Clone, Debug)]
pub struct BlockRow {
    /// Its number.
    pub number: u64,
    /// Its name.
    pub id: BlockId,
    /// Its length in bytes.
    pub stored_len: u64,
    /// Its frames in order.
    pub frames: Vec<Frame>,
    /// Numbers of the volumes it lies on.
    pub volumes: Vec<i64>,
}

/// The runs that can be read.
#[derive(Debug, Default)]
pub struct WholeRuns {
    /// Those whose rows are whole, oldest first.
    pub runs: Vec<Run>,
    /// The numbers of the others, and what is wrong with each.
    pub damaged: Vec<(RunId, Error)>,
}

impl WholeRuns {
    /// Fails if there is a damaged run between these two: who looks for the newest one may mean it.
    pub fn refuse_doubt(&self, between: std::ops::Range<RunId>) -> Result<()> {
        let mut damaged = self.damaged.iter();
        match damaged.find(|it| between.contains(&it.0)) {
            None => Ok(()),
            Some((number, e)) => Err(Error::corrupt(format!(
                "run {number} may be the one that is meant, and is damaged in the catalog ({e}): \
                 give a run by its number, or take the catalog back with raidtape catalog-restore"
            ))),
        }
    }
}

/// Sums over the whole catalog.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Number of blocks.
    pub blocks: u64,
    /// Their stored bytes.
    pub stored_bytes: u64,
}

/// Fails if keys that were asked for in order do not rise: pages of a damaged database may lead in
/// a circle, and who goes on from the last of them would never end.
pub(super) fn in_order<T: PartialOrd>(keys: impl Iterator<Item = T>) -> Result<()> {
    match keys.is_sorted_by(|a, b| a < b) {
        true => Ok(()),
        false => Err(Error::corrupt("catalog: rows that are out of order")),
    }
}

/// Reads a catalog. One thread at a time; open more for more.
pub struct Reader {
    conn: Connection,
}

impl Reader {
    /// Opens the catalog at `path`.
    pub fn open(path: &Path) -> Result<Reader> {
        Ok(Reader { conn: schema::open_to_read(path)? })
    }

    /// Opens the catalog at `path`, which stays as it is, byte for byte, and its log too.
    pub fn open_untouched(path: &Path) -> Result<Reader> {
        Ok(Reader { conn: schema::open_untouched(path)? })
    }

    /// Opens a catalog that may be damaged and must stay as it is; what its log has is seen, if it
    /// can be read.
    pub fn open_as_it_lies(path: &Path) -> Result<Reader> {
        Ok(Reader { conn: schema::open_as_it_lies(path)? })
    }

    pub(super) fn conn(&self) -> &Connection {
        &self.conn
    }

    /// The catalog's settings.
    pub fn settings(&self) -> Result<Settings> {
        Settings::read(&self.conn)
    }

    /// All volumes in order of their numbers.
    pub fn volumes(&self) -> Result<Vec<VolumeConfig>> {
        volumes(&self.conn)
    }

    /// How much of a volume's index the catalog counts on, in bytes.
    pub fn index_len(&self, volume: i64) -> Result<u64> {
        let query = "SELECT index_len FROM volumes WHERE number = ?1";
        self.conn.query_row(query, [volume], |row| row.get(0)).map_err(sql)
    }

    /// Stored bytes of each volume, by number.
    pub fn stored_bytes_of(&self, volume: i64) -> Result<Totals> {
        let query = "SELECT count(*), coalesce(sum(stored_len), 0) FROM block_copies \
                     JOIN blocks ON number = block WHERE volume = ?1";
        self.conn
            .query_row(query, [volume], |row| {
                Ok(Totals { blocks: row.get(0)?, stored_bytes: row.get(1)? })
            })
            .map_err(sql)
    }

    /// All runs, oldest first. For who has to know each: a damaged row is an error.
    pub fn runs(&self) -> Result<Vec<Run>> {
        let runs = self.runs_where("1 ORDER BY run", [])?;
        in_order(runs.iter().map(|it| it.id))?;
        Ok(runs)
    }

    /// The runs whose rows are whole, oldest first, and those whose are not: for who looks at runs
    /// one by one. One bad row costs its run.
    pub fn whole_runs(&self) -> Result<WholeRuns> {
        let numbers = self.run_numbers(0)?;
        // All at once, if that names each of them; else one by one, to see which are damaged.
        match self.runs() {
            Ok(runs) if runs.iter().map(|it| it.id).eq(numbers.iter().copied()) => {
                return Ok(WholeRuns { runs, damaged: Vec::new() });
            }
            Err(e) if e.kind() != ErrorKind::Corrupt => return Err(e),
            _ => {}
        }
        let mut all = WholeRuns::default();
        for number in numbers {
            match self.run(number) {
                Ok(run) => all.runs.push(run),
                Err(e) if matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => {
                    log::warn!("run {number} is left out: {e}");
                    all.damaged.push((number, e));
                }
                Err(e) => return Err(e),
            }
        }
        in_order(all.runs.iter().map(|it| it.id))?;
        Ok(all)
    }

    /// The run with this number.
    pub fn run(&self, run: RunId) -> Result<Run> {
        let found = self.runs_where("run = ?1", [run])?.pop();
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no run {run}")))
    }

    /// The newest run of all, or of one source.
    pub fn latest(&self, source: Option<&[u8]>) -> Result<Option<Run>> {
        match source {
            None => Ok(self.runs_where("1 ORDER BY run DESC LIMIT 1", [])?.pop()),
            Some(name) => Ok(self.runs_where("name = ?1 ORDER BY run DESC LIMIT 1", [name])?.pop()),
        }
    }

    fn runs_where(&self, condition: &str, params: impl rusqlite::Params) -> Result<Vec<Run>> {
        // Asked each time: a writer may bring the schema up to date under an open reader.
        let comment = match schema::version(&self.conn)? {
            1 => "''",
            _ => "comment",
        };
        let query = format!(
            "SELECT run, uuid, name, path, started_s, started_n, finished_s, finished_n, added, \
             modified, deleted, unchanged, dirs_added, dirs_modified, dirs_deleted, \
             dirs_unchanged, files, bytes, bytes_read, bytes_stored, problems, host, {comment} \
             FROM runs JOIN sources ON number = source WHERE {condition}"
        );
        let mut statement = self.conn.prepare_cached(&query).map_err(sql)?;
        let rows = statement.query_map(params, run_from).map_err(sql)?;
        let mut runs = rows.collect::<rusqlite::Result<Vec<Run>>>().map_err(sql)?;
        let last = numbers::kept(&self.conn, Numbered::Run)?.unwrap_or(RunId::MAX);
        for run in &mut runs {
            // It would show what another run had.
            if !(1..=last).contains(&run.id) {
                let message = format!("catalog: no run was ever given the number {}", run.id);
                return Err(Error::corrupt(message));
            }
            if run.comment.len() > COMMENT_BYTES_MAX {
                let message = format!("catalog: run {} has an impossible comment", run.id);
                return Err(Error::corrupt(message));
            }
            let mut tags = self
                .conn
                .prepare_cached("SELECT tag FROM run_tags WHERE run = ?1 ORDER BY tag")
                .map_err(sql)?;
            let rows = tags.query_map([run.id], |row| row.get(0)).map_err(sql)?;
            run.tags = rows.collect::<rusqlite::Result<_>>().map_err(sql)?;
        }
        Ok(runs)
    }

    /// What went wrong in a run: path, kind and message of each problem.
    pub fn problems(&self, run: RunId) -> Result<Vec<(Vec<u8>, String, String)>> {
        let query = "SELECT path, kind, message FROM run_problems WHERE run = ?1 ORDER BY n";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let rows = statement
            .query_map([run], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
            .map_err(sql)?;
        rows.collect::<rusqlite::Result<_>>().map_err(sql)
    }

    /// The root directory of a run's snapshot.
    pub fn root(&self, run: &Run) -> Result<EntryRow> {
        self.lookup(run.id, 0, &run.source)?
            .ok_or_else(|| Error::corrupt(format!("catalog: run {} has no root directory", run.id)))
    }

    /// The entry `name` of directory `dir` at a run.
    pub fn lookup(&self, run: RunId, dir: DirId, name: &[u8]) -> Result<Option<EntryRow>> {
        let query = format!(
            "SELECT {ENTRY_COLUMNS} FROM entries \
             WHERE dir = ?1 AND name = ?2 AND first_run <= ?3 AND last_run >= ?3"
        );
        self.one_entry(&query, (dir, name, run))
    }

    /// At most `limit` entries of directory `dir` at a run, in order of their names, from the first
    /// name greater than `after`.
    pub fn list(
        &self,
        run: RunId,
        dir: DirId,
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<EntryRow>> {
        let query = format!(
            "SELECT {ENTRY_COLUMNS} FROM entries WHERE dir = ?1 AND name > ?2 \
             AND first_run <= ?3 AND last_run >= ?3 ORDER BY name LIMIT ?4"
        );
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        // No name is empty, so the empty name comes before all.
        let after = after.unwrap_or_default();
        let mut statement = self.conn.prepare_cached(&query).map_err(sql)?;
        let mut rows = statement.query((dir, after, run, limit)).map_err(sql)?;
        let mut entries = Vec::new();
        while let Some(row) = rows.next().map_err(sql)? {
            entries.push(entry_from(row)?);
        }
        in_order(std::iter::once(after).chain(entries.iter().map(|it| &*it.name)))?;
        Ok(entries)
    }

    /// An entry that names this version (all names of a version share their metadata).
    pub fn entry_of_version(&self, version: VersionId) -> Result<Option<EntryRow>> {
        let query = format!("SELECT {ENTRY_COLUMNS} FROM entries WHERE version = ?1 LIMIT 1");
        self.one_entry(&query, [version])
    }

    /// The entry of directory number `child` at a run.
    pub fn entry_of_dir(&self, run: RunId, child: DirId) -> Result<Option<EntryRow>> {
        let query = format!(
            "SELECT {ENTRY_COLUMNS} FROM entries \
             WHERE child = ?1 AND first_run <= ?2 AND last_run >= ?2"
        );
        self.one_entry(&query, (child, run))
    }

    fn one_entry(&self, query: &str, params: impl rusqlite::Params) -> Result<Option<EntryRow>> {
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let mut rows = statement.query(params).map_err(sql)?;
        rows.next().map_err(sql)?.map(entry_from).transpose()
    }

    /// Path of a directory below its source's root, without slashes at the ends, and the name of
    /// its source. Directory numbers never move, so this holds for every run.
    pub fn path_of_dir(&self, dir: DirId) -> Result<(Vec<u8>, Vec<u8>)> {
        let mut names: Vec<Vec<u8>> = Vec::new();
        let mut at = dir;
        loop {
            let (parent, name) = self.place_of_dir(at)?;
            if parent == 0 {
                names.reverse();
                return Ok((name, names.join(&b'/')));
            }
            names.push(name);
            at = parent;
        }
    }

    /// The directory that a directory is in, and its name there: the same in every run.
    pub(super) fn place_of_dir(&self, dir: DirId) -> Result<(DirId, Vec<u8>)> {
        let query = "SELECT dir, name FROM entries WHERE child = ?1 LIMIT 1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let found: Option<(DirId, Vec<u8>)> = statement
            .query_row([dir], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()
            .map_err(sql)?;
        match found {
            None => Err(Error::corrupt(format!("catalog: directory {dir} has no entry"))),
            // Numbers grow from parent to child, so a damaged catalog cannot make a walk loop.
            Some((parent, _)) if parent >= dir => {
                Err(Error::corrupt(format!("catalog: directory {dir} is below itself")))
            }
            Some(place) => Ok(place),
        }
    }

    /// Content, link target and extended attributes of a version.
    pub fn content(&self, version: VersionId) -> Result<Content> {
        let query = "SELECT hash, extents, extra FROM versions WHERE version = ?1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let found = statement.query_row([version], content_columns).optional().map_err(sql)?;
        found.map_or_else(|| Ok(Content::default()), content_from)
    }

    /// The block with this number.
    pub fn block(&self, number: u64) -> Result<BlockRow> {
        let query = "SELECT id, stored_len, frames FROM blocks WHERE number = ?1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let found: Option<(Vec<u8>, u64, Vec<u8>)> = statement
            .query_row([number], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))
            .optional()
            .map_err(sql)?;
        let Some((id, stored_len, frames)) = found else {
            return Err(Error::corrupt(format!("catalog: block {number} is missing")));
        };
        let mut reader = WireReader::new(&frames, "frame table");
        let frames = get_frames(&mut reader)?;
        reader.finish()?;
        let mut statement = self
            .conn
            .prepare_cached("SELECT volume FROM block_copies WHERE block = ?1")
            .map_err(sql)?;
        let volumes = statement.query_map([number], |row| row.get(0)).map_err(sql)?;
        let volumes = volumes.collect::<rusqlite::Result<_>>().map_err(sql)?;
        Ok(BlockRow { number, id: Digest::from_slice(&id)?, stored_len, frames, volumes })
    }

    /// Numbers of all blocks, at most `limit` of them, from the first greater than `after`.
    pub fn block_numbers(&self, after: u64, limit: u64) -> Result<Vec<u64>> {
        let query = "SELECT number FROM blocks WHERE number > ?1 ORDER BY number LIMIT ?2";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        let rows = statement.query_map((after, limit), |row| row.get(0)).map_err(sql)?;
        let numbers = rows.collect::<rusqlite::Result<Vec<u64>>>().map_err(sql)?;
        in_order(std::iter::once(after).chain(numbers.iter().copied()))?;
        Ok(numbers)
    }

    /// Sums over all blocks.
    pub fn totals(&self) -> Result<Totals> {
        let query = "SELECT count(*), coalesce(sum(stored_len), 0) FROM blocks";
        self.conn
            .query_row(query, [], |row| {
                Ok(Totals { blocks: row.get(0)?, stored_bytes: row.get(1)? })
            })
            .map_err(sql)
    }

    /// The name that an owner or group number had at a run; `kind` is `user` or `group`.
    pub fn owner_name(&self, kind: &str, id: u32, run: RunId) -> Result<Option<Vec<u8>>> {
        let query = "SELECT name FROM owners WHERE kind = ?1 AND id = ?2 AND first_run <= ?3 \
                     ORDER BY first_run DESC LIMIT 1";
        let mut statement = self.conn.prepare_cached(query).map_err(sql)?;
        statement.query_row((kind, id, run), |row| row.get(0)).optional().map_err(sql)
    }
}

/// All volumes in order of their numbers.
pub(super) fn volumes(conn: &Connection) -> Result<Vec<VolumeConfig>> {
    let query = "SELECT number, uuid, path, status, reserve_percent FROM volumes ORDER BY number";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    let mut rows = statement.query([]).map_err(sql)?;
    let mut volumes = Vec::new();
    while let Some(row) = rows.next().map_err(sql)? {
        let path: Vec<u8> = row.get(2).map_err(sql)?;
        let status: String = row.get(3).map_err(sql)?;
        volumes.push(VolumeConfig {
            number: row.get(0).map_err(sql)?,
            uuid: row.get(1).map_err(sql)?,
            path: path_from(&path).to_path_buf(),
            status: status.parse()?,
            reserve_percent: row.get(4).map_err(sql)?,
        });
    }
    Ok(volumes)
}

/// Reads the columns [`ENTRY_COLUMNS`].
pub(super) fn entry_from(row: &Row<'_>) -> Result<EntryRow> {
    let bad = |what: &str| Error::corrupt(format!("catalog: an entry has an impossible {what}"));
    let dir: DirId = row.get(0).map_err(sql)?;
    let name: Vec<u8> = row.get(1).map_err(sql)?;
    if dir != 0 {
        check_name(&name)?;
    }
    let kind: u8 = row.get(6).map_err(sql)?;
    let kind = Kind::from_number(kind).ok_or_else(|| bad("kind"))?;
    let child: Option<DirId> = row.get(5).map_err(sql)?;
    // Only a directory can be the root of a source, whose name is no component of a path.
    let is_dir = kind == Kind::Dir;
    if child.is_some() != is_dir || child.is_some_and(|child| child <= dir) || (dir == 0 && !is_dir)
    {
        return Err(bad("directory number"));
    }
    let time = |secs: usize| -> Result<Time> {
        let nanos: u32 = row.get(secs + 1).map_err(sql)?;
        match nanos < 1_000_000_000 {
            true => Ok(Time { secs: row.get(secs).map_err(sql)?, nanos }),
            false => Err(bad("time")),
        }
    };
    let mode: u32 = row.get(7).map_err(sql)?;
    if mode > 0o7777 {
        return Err(bad("mode"));
    }
    let meta = Metadata {
        kind,
        mode,
        uid: row.get(8).map_err(sql)?,
        gid: row.get(9).map_err(sql)?,
        size: row.get(10).map_err(sql)?,
        mtime: time(11)?,
        ctime: time(13)?,
        ino: row.get::<_, i64>(15).map_err(sql)?.cast_unsigned(),
        nlink: row.get(16).map_err(sql)?,
        rdev: row.get::<_, i64>(17).map_err(sql)?.cast_unsigned(),
    };
    Ok(EntryRow {
        dir,
        name,
        first_run: row.get(2).map_err(sql)?,
        last_run: row.get(3).map_err(sql)?,
        version: row.get(4).map_err(sql)?,
        child,
        meta,
        data_len: row.get(18).map_err(sql)?,
    })
}

pub(super) type ContentColumns = (Option<Vec<u8>>, Option<Vec<u8>>, Option<Vec<u8>>);

pub(super) fn content_columns(row: &Row<'_>) -> rusqlite::Result<ContentColumns> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?))
}

pub(super) fn content_from((hash, extents, extra): ContentColumns) -> Result<Content> {
    Ok(Content {
        hash: hash.map(|it| Digest::from_slice(&it)).transpose()?,
        extents: extents.map_or_else(|| Ok(Vec::new()), |it| extent::decode(&it))?,
        extra: extra.map_or_else(|| Ok(Extra::default()), |it| Extra::decode(&it))?,
    })
}

fn run_from(row: &Row<'_>) -> rusqlite::Result<Run> {
    let path: Vec<u8> = row.get(3)?;
    let tally = |at: usize| -> rusqlite::Result<Tally> {
        Ok(Tally {
            added: row.get(at)?,
            modified: row.get(at + 1)?,
            deleted: row.get(at + 2)?,
            unchanged: row.get(at + 3)?,
        })
    };
    Ok(Run {
        id: row.get(0)?,
        uuid: row.get(1)?,
        source: row.get(2)?,
        path: PathBuf::from(path_from(&path)),
        started: Time { secs: row.get(4)?, nanos: row.get(5)? },
        finished: Time { secs: row.get(6)?, nanos: row.get(7)? },
        counts: Counts {
            entries: tally(8)?,
            dirs: tally(12)?,
            files: row.get(16)?,
            bytes: row.get(17)?,
            bytes_read: row.get(18)?,
            bytes_stored: row.get(19)?,
            problems: row.get(20)?,
        },
        host: row.get(21)?,
        tags: Vec::new(),
        comment: row.get(22)?,
    })
}
