//! Small databases of their own beside a catalog: what must not wait for its one writer.
//!
//! Each has its own `application_id` and version. A file that is damaged, or something else, is
//! renamed aside, never removed; one of a later version is left alone. Like a catalog, it is not
//! trusted: nothing in its schema is executed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, Transaction};

use super::{schema, sql};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, Time, quoted};

/// A kind of database.
pub struct Beside {
    /// What its name has after the catalog's.
    pub suffix: &'static str,
    /// Marks its files.
    pub application_id: i32,
    /// The schema version that this program writes.
    pub version: i32,
    /// What makes one of nothing.
    pub script: &'static str,
    /// Memory for pages, in KiB.
    pub cache_kib: i64,
}

impl Beside {
    /// Where the one of `catalog` is.
    pub fn path(&self, catalog: &Path) -> PathBuf {
        let mut name = catalog.file_name().unwrap_or_default().to_os_string();
        name.push(self.suffix);
        catalog.with_file_name(name)
    }

    /// Opens the file at `path`, or makes it; what is new is filled by `first`.
    pub fn open(
        &self,
        path: &Path,
        first: &dyn Fn(&Transaction<'_>) -> Result<()>,
    ) -> Result<Connection> {
        let failed = |e| Error::io(format!("making {}", quoted(path)), e);
        match sys::private_file().write(true).create_new(true).open(path) {
            // Made here, so that nobody else can read it; SQLite gives its log files the same mode.
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed(e)),
            _ => {}
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX
            | OpenFlags::SQLITE_OPEN_NOFOLLOW;
        self.prepare(Connection::open_with_flags(path, flags).map_err(sql)?, first)
    }

    /// Opens the file at `path` to read, wherever it lies; it must be there.
    pub fn look(&self, path: &Path) -> Result<Connection> {
        let conn = schema::look(path, OpenFlags::SQLITE_OPEN_NOFOLLOW, self.cache_kib)?;
        match self.is_current(&conn)? {
            true => Ok(conn),
            false => Err(Error::corrupt("it is something else")),
        }
    }

    /// One that is gone with its connection, for where nothing can be written.
    pub fn in_memory(&self, first: &dyn Fn(&Transaction<'_>) -> Result<()>) -> Result<Connection> {
        self.prepare(Connection::open_in_memory().map_err(sql)?, first)
    }

    fn prepare(
        &self,
        mut conn: Connection,
        first: &dyn Fn(&Transaction<'_>) -> Result<()>,
    ) -> Result<Connection> {
        let is_current = self.is_current(&conn)?;
        schema::configure(&conn, self.cache_kib)?;
        if is_current {
            return Ok(conn);
        }
        let tx = conn.transaction().map_err(sql)?;
        tx.execute_batch(self.script).map_err(sql)?;
        first(&tx)?;
        tx.pragma_update(None, "application_id", self.application_id).map_err(sql)?;
        tx.pragma_update(None, "user_version", self.version).map_err(sql)?;
        tx.commit().map_err(sql)?;
        Ok(conn)
    }

    /// Whether a database is one of this kind, or one that is to be made; else it is an error.
    fn is_current(&self, conn: &Connection) -> Result<bool> {
        let id = conn.pragma_query_value(None, "application_id", |row| row.get::<_, i32>(0));
        match (id.map_err(sql)?, schema::version(conn)?) {
            (id, version) if id == self.application_id && version == self.version => Ok(true),
            (id, version) if id == self.application_id && version > self.version => {
                let known = self.version;
                let message = format!("it has version {version}, this program knows {known}");
                Err(Error::new(ErrorKind::Version, message))
            }
            (id, 0) if id == self.application_id || id == 0 => Ok(false),
            _ => Err(Error::corrupt("it is something else")),
        }
    }
}

/// Renames a damaged file, whose connection is closed, and says where it is then.
pub fn set_aside(path: &Path) -> Result<PathBuf> {
    let with = |suffix: &OsStr| {
        let mut name = path.as_os_str().to_os_string();
        name.push(suffix);
        PathBuf::from(name)
    };
    let aside = with(format!(".damaged-{}", Time::now().secs).as_ref());
    sys::rename_durable(path, &aside)?;
    for suffix in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(with(suffix.as_ref()));
    }
    Ok(aside)
}
