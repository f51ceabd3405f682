//! Kept jobs and the modes of control files: a small database of its own beside the catalog.
//!
//! Not in the catalog, whose one writer may be a backup of another process for hours: a job has to
//! get its number, and its end kept, meanwhile. A number is durable before anybody hears of it. A
//! file that is damaged is set aside; then, and where nothing can be written, numbers go on from
//! the clock, so that none comes twice. The format is in FORMAT.md.

use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension, Transaction};

use super::beside::{self, Beside};
use super::sql;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, Time, quoted};

/// Number of a job, from 1 in each catalog, and never used twice.
pub type JobId = u64;

/// What the file is: marked "RTJB".
const JOBS: Beside = Beside {
    suffix: ".jobs",
    application_id: 0x5254_4a42,
    version: 1,
    script: include_str!("jobs.sql"),
    cache_kib: 256,
};
/// Ended jobs that are kept.
pub const KEPT_MAX: u64 = 1000;
/// Most bytes of a column that is read; none is written that is as long.
const COLUMN_BYTES_MAX: usize = 256 << 10;

/// What is asked for.
pub struct Asked<'a> {
    /// The verb.
    pub verb: &'a str,
    /// Its arguments.
    pub line: &'a [u8],
    /// Who asks.
    pub uid: u32,
}

/// A job that has ended, as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptJob {
    /// Its number.
    pub id: JobId,
    /// The verb.
    pub verb: String,
    /// Its arguments.
    pub line: Vec<u8>,
    /// The user who asked for it.
    pub uid: u32,
    /// When that was.
    pub asked: Time,
    /// `done`, `failed` or `cancelled`; `None` if it never came to its end, or another process is
    /// still at it.
    pub state: Option<String>,
    /// What it said of itself at its end, as JSON; empty if it had no end.
    pub status: String,
    /// Its log.
    pub log: String,
    /// Whether the process that had it is gone without having ended it.
    pub is_lost: bool,
}

/// How a control file's access differs from what is usual.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

/// The kept jobs of a catalog.
pub struct JobStore {
    path: PathBuf,
    conn: Mutex<Connection>,
    /// Tells this process from all others.
    process: String,
}

impl JobStore {
    /// Opens what is beside the catalog at `catalog`, or makes it. Where that is not possible, jobs
    /// are kept as long as this lives.
    pub fn open(catalog: &Path) -> Result<JobStore> {
        let path = JOBS.path(catalog);
        let conn = match JOBS.open(&path, &begin_with(None)) {
            Err(e) if e.kind() == ErrorKind::Corrupt => set_aside_and_open(&path, &e),
            other => other,
        };
        let conn = match conn {
            Ok(conn) => conn,
            Err(e) => {
                log::warn!("jobs are not kept over an unmount: {}: {e}", quoted(&path));
                JOBS.in_memory(&begin_with(Some(from_clock())))?
            }
        };
        let pid = std::process::id();
        let process = sys::process::mark(pid).unwrap_or_else(|| format!("- {pid} -"));
        Ok(JobStore { path, conn: Mutex::new(conn), process })
    }

    /// Does something with the database; once more with a new one, if it is damaged.
    fn with<T>(&self, mut work: impl FnMut(&mut Connection) -> Result<T>) -> Result<T> {
        let mut conn = self.conn.lock();
        match work(&mut conn) {
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                // The old one has to be closed before its file is renamed.
                *conn = Connection::open_in_memory().map_err(sql)?;
                *conn = match set_aside_and_open(&self.path, &e) {
                    Ok(conn) => conn,
                    Err(e) => {
                        log::warn!("jobs are not kept any more: {}: {e}", quoted(&self.path));
                        JOBS.in_memory(&begin_with(Some(from_clock())))?
                    }
                };
                work(&mut conn)
            }
            other => other,
        }
    }

    /// Gives numbers to jobs, all or none. They are durable when this returns.
    pub fn ask(&self, asked: &[Asked<'_>]) -> Result<Vec<JobId>> {
        self.with(|conn| {
            let tx = conn.transaction().map_err(sql)?;
            let mut ids = Vec::new();
            let query = "INSERT INTO jobs (verb, line, uid, asked_s, process) \
                         VALUES (?1, ?2, ?3, ?4, ?5)";
            for it in asked {
                let row = (it.verb, it.line, it.uid, Time::now().secs, &self.process);
                tx.prepare_cached(query).map_err(sql)?.execute(row).map_err(sql)?;
                ids.push(tx.last_insert_rowid().cast_unsigned());
            }
            tx.commit().map_err(sql)?;
            Ok(ids)
        })
    }

    /// Keeps the end of a job, and drops those that are too many.
    pub fn end(&self, id: JobId, state: &str, status: &str, log: &str) -> Result<()> {
        if status.len().max(log.len()) >= COLUMN_BYTES_MAX {
            return Err(Error::usage(format!("job {id} has too much to say to be kept")));
        }
        self.with(|conn| {
            let tx = conn.transaction().map_err(sql)?;
            let query = "UPDATE jobs SET state = ?2, status = ?3, log = ?4 WHERE id = ?1";
            tx.execute(query, (id, state, status, log)).map_err(sql)?;
            // A job that was lost counts as ended; one that another mount is at is left alone.
            let query = "DELETE FROM jobs WHERE id IN (SELECT id FROM jobs \
                         WHERE state IS NOT NULL OR process <> ?2 ORDER BY id DESC \
                         LIMIT -1 OFFSET ?1)";
            tx.execute(query, (KEPT_MAX, &self.process)).map_err(sql)?;
            tx.commit().map_err(sql)
        })
    }

    /// The numbers of the newest jobs, oldest first.
    pub fn ids(&self) -> Result<Vec<JobId>> {
        self.with(|conn| {
            let query = "SELECT id FROM jobs ORDER BY id DESC LIMIT ?1";
            let mut statement = conn.prepare_cached(query).map_err(sql)?;
            let rows = statement.query_map([KEPT_MAX], |row| row.get(0)).map_err(sql)?;
            let mut ids: Vec<JobId> = rows.collect::<rusqlite::Result<_>>().map_err(sql)?;
            ids.reverse();
            Ok(ids)
        })
    }

    /// A job, if it is kept.
    pub fn get(&self, id: JobId) -> Result<Option<KeptJob>> {
        self.with(|conn| {
            let query = "SELECT id, verb, line, uid, asked_s, state, status, log, process \
                         FROM jobs WHERE id = ?1";
            let mut statement = conn.prepare_cached(query).map_err(sql)?;
            statement.query_row([id], kept_from).optional().map_err(sql)
        })
    }

    /// The newest job of a verb.
    pub fn last(&self, verb: &str) -> Result<Option<JobId>> {
        self.with(|conn| {
            let query = "SELECT id FROM jobs WHERE verb = ?1 ORDER BY id DESC LIMIT 1";
            let mut statement = conn.prepare_cached(query).map_err(sql)?;
            statement.query_row([verb], |row| row.get(0)).optional().map_err(sql)
        })
    }

    /// How the access to control files has been changed.
    pub fn access(&self) -> Result<Vec<(String, Access)>> {
        self.with(|conn| {
            let query = "SELECT name, mode, uid, gid FROM access LIMIT 100";
            let mut statement = conn.prepare_cached(query).map_err(sql)?;
            let rows = statement
                .query_map([], |row| {
                    let (mode, uid, gid) = (row.get(1)?, row.get(2)?, row.get(3)?);
                    Ok((row.get(0)?, Access { mode, uid, gid }))
                })
                .map_err(sql)?;
            rows.collect::<rusqlite::Result<_>>().map_err(sql)
        })
    }

    /// Keeps how the access to a control file is changed.
    pub fn set_access(&self, name: &str, access: Access) -> Result<()> {
        self.with(|conn| {
            let query = "INSERT OR REPLACE INTO access (name, mode, uid, gid) \
                         VALUES (?1, ?2, ?3, ?4)";
            conn.execute(query, (name, access.mode, access.uid, access.gid)).map_err(sql)?;
            Ok(())
        })
    }
}

fn kept_from(row: &rusqlite::Row<'_>) -> rusqlite::Result<KeptJob> {
    let limited = |at: usize| -> rusqlite::Result<Vec<u8>> {
        let value = row.get_ref(at)?;
        let bytes = value.as_bytes_or_null()?.unwrap_or_default();
        match bytes.len() < COLUMN_BYTES_MAX {
            true => Ok(bytes.to_vec()),
            false => Err(rusqlite::Error::IntegralValueOutOfRange(at, i64::MAX)),
        }
    };
    let text = |at: usize| -> rusqlite::Result<String> {
        Ok(String::from_utf8_lossy(&limited(at)?).into_owned())
    };
    let state: Option<String> = row.get(5)?;
    let process: String = row.get(8)?;
    let is_alive = || {
        let pid = process.split(' ').nth(1).and_then(|it| it.parse().ok());
        pid.and_then(sys::process::mark).is_some_and(|it| it == process)
    };
    Ok(KeptJob {
        id: row.get(0)?,
        verb: text(1)?,
        line: limited(2)?,
        uid: row.get(3)?,
        asked: Time { secs: row.get(4)?, nanos: 0 },
        is_lost: state.is_none() && !is_alive(),
        state,
        status: text(6)?,
        log: text(7)?,
    })
}

/// A number for the first job where earlier ones are not known: seconds, of which more pass than
/// jobs come.
fn from_clock() -> JobId {
    Time::now().secs.unsigned_abs()
}

/// What a database gets when it is made, for its numbers to begin with `first`.
fn begin_with(first: Option<JobId>) -> impl Fn(&Transaction<'_>) -> Result<()> {
    move |tx| {
        if let Some(first) = first {
            // The number of a row that was there once is never given again.
            let query = "INSERT INTO jobs (id, verb, line, uid, asked_s, process) \
                         VALUES (?1, '', x'', 0, 0, '')";
            tx.execute(query, [first]).map_err(sql)?;
            tx.execute("DELETE FROM jobs", []).map_err(sql)?;
        }
        Ok(())
    }
}

fn set_aside_and_open(path: &Path, why: &Error) -> Result<Connection> {
    let now = from_clock();
    let aside = beside::set_aside(path)?;
    log::warn!(
        "kept jobs {}: {why}: set aside as {}, jobs are counted from {now} on",
        quoted(path),
        quoted(&aside)
    );
    JOBS.open(path, &begin_with(Some(now)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(line: &[u8]) -> Asked<'_> {
        Asked { verb: "backup", line, uid: 1000 }
    }

    #[test]
    fn numbers_are_never_used_twice_and_ends_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("c");
        let store = JobStore::open(&catalog).unwrap();
        assert_eq!(store.ask(&[asked(b"/a"), asked(b"/b\xff")]).unwrap(), [1, 2]);
        store.end(2, "done", "{}", "line\n").unwrap();
        // As after a kill: nothing is closed.
        std::mem::forget(store);
        let store = JobStore::open(&catalog).unwrap();
        assert_eq!(store.ids().unwrap(), [1, 2]);
        let kept = store.get(2).unwrap().unwrap();
        assert_eq!((&*kept.line, &*kept.log, kept.uid), (&b"/b\xff"[..], "line\n", 1000));
        assert_eq!((kept.state.as_deref(), kept.is_lost), (Some("done"), false));
        // This process lives, so its job is not lost.
        let open = store.get(1).unwrap().unwrap();
        assert_eq!((open.state, open.is_lost), (None, false));
        assert_eq!(store.get(3).unwrap(), None);
        store.with(|conn| Ok(conn.execute("DELETE FROM jobs", []).unwrap())).unwrap();
        assert_eq!(store.ask(&[asked(b"/a")]).unwrap(), [3]);
        assert_eq!(store.last("backup").unwrap(), Some(3));
        let query = "UPDATE jobs SET process = 'boot 1 1'";
        store.with(|conn| Ok(conn.execute(query, []).unwrap())).unwrap();
        assert!(store.get(3).unwrap().unwrap().is_lost);
    }

    #[test]
    fn the_newest_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let store = JobStore::open(&dir.path().join("c")).unwrap();
        let many: Vec<_> = (0..KEPT_MAX + 5).map(|_| asked(b"/a")).collect();
        let ids = store.ask(&many).unwrap();
        let query = "UPDATE jobs SET state = 'done', status = '{}', log = ''";
        store.with(|conn| Ok(conn.execute(query, []).unwrap())).unwrap();
        store.end(1, "failed", "{}", "").unwrap();
        assert_eq!(store.ids().unwrap(), ids[5..]);
    }

    #[test]
    fn what_is_no_file_of_jobs_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let (catalog, path) = (dir.path().join("c"), dir.path().join("c.jobs"));
        for text in [&b"not a database, and longer than a header of one"[..], &[7; 9000]] {
            std::fs::write(&path, text).unwrap();
            let store = JobStore::open(&catalog).unwrap();
            let id = store.ask(&[asked(b"/a")]).unwrap()[0];
            assert!(id > 1_700_000_000, "{id}");
            drop(store);
            let mut aside = std::fs::read_dir(dir.path()).unwrap().map(|it| it.unwrap().path());
            let aside = aside.find(|it| it.to_str().unwrap().contains("damaged")).unwrap();
            assert_eq!(std::fs::read(&aside).unwrap(), text);
            std::fs::remove_file(aside).unwrap();
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn one_that_is_damaged_later_is_set_aside_too() {
        let dir = tempfile::tempdir().unwrap();
        let (catalog, path) = (dir.path().join("c"), dir.path().join("c.jobs"));
        drop(JobStore::open(&catalog).unwrap());
        let len = std::fs::read(&path).unwrap().len();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        // The header stays, every page after it is lost.
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![0xff; len - 4096], 4096).unwrap();
        let store = JobStore::open(&catalog).unwrap();
        assert!(store.ask(&[asked(b"/a")]).unwrap()[0] > 1_700_000_000);
        assert_eq!(store.access().unwrap(), []);
    }

    #[test]
    fn a_later_version_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (catalog, path) = (dir.path().join("c"), dir.path().join("c.jobs"));
        drop(JobStore::open(&catalog).unwrap());
        let conn = Connection::open(&path).unwrap();
        conn.pragma_update(None, "user_version", JOBS.version + 1).unwrap();
        drop(conn);
        let store = JobStore::open(&catalog).unwrap();
        assert!(store.ask(&[asked(b"/a")]).unwrap()[0] > 1_700_000_000);
        drop(store);
        let conn = Connection::open(&path).unwrap();
        let rows = conn.query_row("SELECT count(*) FROM jobs", [], |row| row.get::<_, i64>(0));
        assert_eq!(rows, Ok(0));
    }

    #[test]
    fn access_is_kept_and_nobody_else_reads_the_file() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("c");
        let access = Access { mode: Some(0o660), uid: None, gid: Some(100) };
        JobStore::open(&catalog).unwrap().set_access("backup", access).unwrap();
        let store = JobStore::open(&catalog).unwrap();
        assert_eq!(store.access().unwrap(), [("backup".to_owned(), access)]);
        let mode = std::fs::metadata(dir.path().join("c.jobs")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
