//! Opening the database: version, migrations, and distrust of what the file says.
//!
//! A catalog may come from a damaged disk or from somebody else, so nothing in its schema is
//! executed (`trusted_schema` off, defensive mode) and its pages are checked as they are read.
//! Version N of the schema is reached by running the migrations after the version found, in one
//! transaction each; a version that this program does not know is refused.

use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::sql;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::quoted;

/// Marks a SQLite file as a catalog of ours: "RTAP".
const APPLICATION_ID: i32 = 0x5254_4150;

/// One step each: the first makes version 1 of nothing. Steps that have landed never change.
const MIGRATIONS: &[&str] = &[include_str!("schema.sql"), include_str!("schema2.sql")];

/// The schema version that this program writes.
pub const VERSION: i32 = 2;

/// The oldest schema version that can be read as it is: version 2 only adds an index.
const READ_VERSION_MIN: i32 = 1;

/// Memory for pages of a writer, and of each reader, in KiB.
const WRITER_CACHE_KIB: i64 = 24 << 10;
const READER_CACHE_KIB: i64 = 4 << 10;

/// Creates a catalog file, which must not exist.
pub fn create(path: &Path) -> Result<Connection> {
    if path.symlink_metadata().is_ok() {
        return Err(Error::usage(format!("{} exists already", quoted(path))));
    }
    // Made here, so that nobody else can read it; SQLite gives its log files the same mode.
    crate::sys::private_file()
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|e| Error::io(format!("creating {}", quoted(path)), e))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut conn = Connection::open_with_flags(path, flags)
        .map_err(|e| sql(e).context(format!("creating {}", quoted(path))))?;
    conn.pragma_update(None, "application_id", APPLICATION_ID).map_err(sql)?;
    configure(&conn, WRITER_CACHE_KIB)?;
    migrate(&mut conn, 0)?;
    Ok(conn)
}

/// Opens a catalog for writing, bringing an older schema up to date. The caller holds the lock.
pub fn open_to_write(path: &Path) -> Result<Connection> {
    let mut conn = open(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    configure(&conn, WRITER_CACHE_KIB)?;
    let version = check_version(&conn, path)?;
    migrate(&mut conn, version)?;
    Ok(conn)
}

/// Opens a catalog for reading only.
pub fn open_to_read(path: &Path) -> Result<Connection> {
    // The write-ahead log needs its shared memory file, which a reader may have to make.
    let conn = match open(path, OpenFlags::SQLITE_OPEN_READ_WRITE) {
        Err(e) if matches!(e.kind(), ErrorKind::Denied | ErrorKind::Io) => {
            open(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?
        }
        other => other?,
    };
    configure(&conn, READER_CACHE_KIB)?;
    conn.pragma_update(None, "query_only", true).map_err(sql)?;
    let version = check_version(&conn, path)?;
    if version < READ_VERSION_MIN {
        let message = format!(
            "{} has schema version {version}: run a backup to bring it to {VERSION}",
            quoted(path)
        );
        return Err(Error::new(ErrorKind::Version, message));
    }
    Ok(conn)
}

fn open(path: &Path, mode: OpenFlags) -> Result<Connection> {
    if !path.exists() {
        let message = format!("there is no catalog at {}: make one with init", quoted(path));
        return Err(Error::new(ErrorKind::NoCatalog, message));
    }
    let conn = Connection::open_with_flags(path, mode | OpenFlags::SQLITE_OPEN_NO_MUTEX)
        .map_err(|e| sql(e).context(format!("opening {}", quoted(path))))?;
    Ok(conn)
}

fn configure(conn: &Connection, cache_kib: i64) -> Result<()> {
    conn.busy_timeout(Duration::from_secs(60)).map_err(sql)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true).map_err(sql)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false).map_err(sql)?;
    for (pragma, value) in [
        ("journal_mode", "WAL"),
        ("synchronous", "FULL"),
        ("foreign_keys", "ON"),
        ("cell_size_check", "ON"),
        ("temp_store", "FILE"),
    ] {
        // Some answer with a row, some do not.
        match conn.pragma_update(None, pragma, value) {
            Ok(()) => {}
            // A catalog on a medium that cannot be written stays as it is.
            Err(_) if pragma == "journal_mode" => {}
            Err(e) => return Err(sql(e)),
        }
    }
    conn.pragma_update(None, "cache_size", -cache_kib).map_err(sql)?;
    conn.set_prepared_statement_cache_capacity(64);
    Ok(())
}

fn check_version(conn: &Connection, path: &Path) -> Result<i32> {
    let number = |pragma: &str| conn.pragma_query_value(None, pragma, |row| row.get::<_, i32>(0));
    let application_id = number("application_id").map_err(|e| sql(e).context(quoted(path)))?;
    if application_id != APPLICATION_ID {
        return Err(Error::corrupt(format!("{} is not a RaidTape catalog", quoted(path))));
    }
    let version = number("user_version").map_err(sql)?;
    if version > VERSION {
        let message = format!(
            "{} has schema version {version}, this program knows {VERSION}: use a newer one",
            quoted(path)
        );
        return Err(Error::new(ErrorKind::Version, message));
    }
    Ok(version)
}

fn migrate(conn: &mut Connection, from: i32) -> Result<()> {
    for (step, script) in (1..).zip(MIGRATIONS) {
        if step <= from {
            continue;
        }
        let tx = conn.transaction().map_err(sql)?;
        tx.execute_batch(script).map_err(sql)?;
        tx.pragma_update(None, "user_version", step).map_err(sql)?;
        tx.commit().map_err(sql)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_migration_to_every_version() {
        assert_eq!(i32::try_from(MIGRATIONS.len()), Ok(VERSION));
    }

    #[test]
    fn a_catalog_of_the_first_version_is_read_and_brought_up_to_date() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        let conn = create(&path).unwrap();
        conn.execute_batch("DROP INDEX entries_begun; PRAGMA user_version = 1").unwrap();
        drop(conn);
        let version = |conn: &Connection| -> i32 {
            conn.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap()
        };
        assert_eq!(version(&open_to_read(&path).unwrap()), 1);
        let conn = open_to_write(&path).unwrap();
        assert_eq!(version(&conn), VERSION);
        let query = "SELECT count(*) FROM sqlite_schema WHERE name = 'entries_begun'";
        assert_eq!(conn.query_row(query, [], |row| row.get::<_, i64>(0)), Ok(1));
    }

    #[test]
    fn other_files_and_later_versions_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        assert_eq!(open_to_read(&path).unwrap_err().kind(), ErrorKind::NoCatalog);
        std::fs::write(&path, b"hello, this is not a database at all").unwrap();
        assert_eq!(open_to_read(&path).unwrap_err().kind(), ErrorKind::Corrupt);
        std::fs::remove_file(&path).unwrap();
        let conn = create(&path).unwrap();
        conn.pragma_update(None, "user_version", VERSION + 1).unwrap();
        drop(conn);
        assert_eq!(open_to_read(&path).unwrap_err().kind(), ErrorKind::Version);
        assert_eq!(open_to_write(&path).unwrap_err().kind(), ErrorKind::Version);
    }
}
