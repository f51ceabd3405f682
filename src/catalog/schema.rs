//! Opening the database: version, migrations, and distrust of what the file says.
//!
//! A catalog may come from a damaged disk or from somebody else, so nothing in its schema is
//! executed (`trusted_schema` off, defensive mode) and its pages are checked as they are read.
//! Version N of the schema is reached by running the migrations after the version found, in one
//! transaction each; a version that this program does not know is refused.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::sql;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, quoted};

/// Marks a SQLite file as a catalog of ours: "RTAP".
pub const APPLICATION_ID: i32 = 0x5254_4150;

/// One step each: the first makes version 1 of nothing. Steps that have landed never change.
const MIGRATIONS: &[&str] =
    &[include_str!("schema.sql"), include_str!("schema_2.sql"), include_str!("schema_3.sql")];

/// The schema version that this program writes.
pub const VERSION: i32 = 3;
/// The oldest schema version that can be read as it is: a catalog may lie where nothing can be
/// written, so what is older is not brought up to date for that.
const READABLE: i32 = 1;

/// Memory for pages of a writer, and of each reader, in KiB.
const WRITER_CACHE_KIB: i64 = 24 << 10;
const READER_CACHE_KIB: i64 = 4 << 10;

/// What SQLite needs for a log and its shared memory at least, in bytes.
const ROOM_BYTES: usize = 64 << 10;

/// Creates a catalog file, which must not exist, and has `fill` put into it what it begins with.
///
/// It is made under another name and gets its own when it is complete and synced: a crash leaves no
/// catalog or a whole one. The caller holds the lock.
pub fn create(path: &Path, fill: impl FnOnce(&Connection) -> Result<()>) -> Result<Connection> {
    if path.symlink_metadata().is_ok() {
        // Perhaps made by a process that died before it had synced that.
        let _ = sys::sync_dir(path.parent().unwrap_or(Path::new("/")));
        return Err(Error::usage(format!("{} exists already", quoted(path))));
    }
    // SQLite would take the log of a catalog that is gone for this one's.
    for suffix in ["-wal", "-journal"] {
        let mut log = path.as_os_str().to_os_string();
        log.push(suffix);
        if Path::new(&log).symlink_metadata().is_ok() {
            let message = format!(
                "{} is left of a catalog that is gone: move it away, or choose another name",
                quoted(Path::new(&log))
            );
            return Err(Error::usage(message));
        }
    }
    let new = sys::new_name(path);
    let result = create_at(&new, fill).and_then(|()| sys::rename_durable(&new, path));
    result.inspect_err(|_| {
        // If it cannot be removed, the next one who makes a catalog here does it.
        let _ = std::fs::remove_file(&new);
    })?;
    open_to_write(path)
}

fn create_at(new: &Path, fill: impl FnOnce(&Connection) -> Result<()>) -> Result<()> {
    let failed = |e| Error::io(format!("creating {}", quoted(new)), e);
    match std::fs::remove_file(new) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    // Made here, so that nobody else can read it; SQLite gives its log files the same mode.
    let file = sys::private_file().write(true).create_new(true).open(new).map_err(failed)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut conn = Connection::open_with_flags(new, flags)
        .map_err(|e| sql(e).context(format!("creating {}", quoted(new))))?;
    // Nobody sees it before it is synced as a whole.
    conn.pragma_update(None, "journal_mode", "MEMORY").map_err(sql)?;
    conn.pragma_update(None, "synchronous", "OFF").map_err(sql)?;
    conn.pragma_update(None, "application_id", APPLICATION_ID).map_err(sql)?;
    migrate(&mut conn, 0)?;
    fill(&conn)?;
    conn.close().map_err(|(_, e)| sql(e))?;
    file.sync_all().map_err(failed)
}

/// Opens a catalog for writing, bringing an older schema up to date. The caller holds the lock.
pub fn open_to_write(path: &Path) -> Result<Connection> {
    let open = || -> Result<Connection> {
        let mut conn = open(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        configure(&conn, WRITER_CACHE_KIB)?;
        let version = check_version(&conn, path)?;
        migrate(&mut conn, version)?;
        Ok(conn)
    };
    open().map_err(|e| full_disk(e, path))
}

/// What the first steps find on a disk that is full SQLite tells of in other words, such as that it
/// cannot open the file: asks the disk itself. Readers too need a little room, for their shared
/// memory.
pub fn full_disk(error: Error, path: &Path) -> Error {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let try_disk = || tempfile::tempfile_in(dir)?.write_all(&[1; ROOM_BYTES]);
    match (error.kind(), try_disk()) {
        (ErrorKind::Io, Err(e)) => {
            let full = Error::io(format!("opening {} ({error})", quoted(path)), e);
            if full.kind() == ErrorKind::NoSpace { full } else { error }
        }
        _ => error,
    }
}

/// Opens a catalog for reading only.
pub fn open_to_read(path: &Path) -> Result<Connection> {
    open_to_look(path).map_err(|e| full_disk(e, path))
}

/// Opens a catalog for reading only, and leaves it as it is, with its log, when it is closed.
pub fn open_untouched(path: &Path) -> Result<Connection> {
    let has_log = has_log(path);
    let conn = open_to_read(path)?;
    if has_log {
        // Who closes it last would put into it what the log has.
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map_err(sql)?;
    }
    Ok(conn)
}

/// Whether a log lies beside a catalog, with what a process that was killed may have committed.
fn has_log(path: &Path) -> bool {
    let mut log = path.as_os_str().to_os_string();
    log.push("-wal");
    std::fs::metadata(log).is_ok_and(|it| it.is_file() && it.len() > 0)
}

/// Opens a catalog that may be damaged, for reading, and changes nothing of it and of its log. What
/// only the log has is seen, if it can be read.
pub fn open_as_it_lies(path: &Path) -> Result<Connection> {
    if has_log(path)
        && let Ok(conn) = open_with_log(path)
    {
        return Ok(conn);
    }
    open_alone(path)
}

fn open_with_log(path: &Path) -> Result<Connection> {
    let conn = open(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map_err(sql)?;
    distrust(&conn)?;
    check_version(&conn, path)?;
    Ok(conn)
}

fn distrust(conn: &Connection) -> Result<()> {
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true).map_err(sql)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false).map_err(sql)?;
    conn.pragma_update(None, "cell_size_check", "ON").map_err(sql)
}

/// Opens the database without its log.
fn open_alone(path: &Path) -> Result<Connection> {
    use std::os::unix::ffi::OsStrExt;
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-".contains(byte);
    let mut uri = String::from("file:");
    for byte in path.as_os_str().as_bytes() {
        match plain(byte) {
            true => uri.push(char::from(*byte)),
            false => uri.push_str(&format!("%{byte:02x}")),
        }
    }
    uri.push_str("?immutable=1");
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
        | OpenFlags::SQLITE_OPEN_URI
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(uri, flags).map_err(sql)?;
    distrust(&conn)?;
    check_version(&conn, path)?;
    Ok(conn)
}

/// Opens a database that is there to read it, wherever it lies.
pub(super) fn look(path: &Path, more: OpenFlags, cache_kib: i64) -> Result<Connection> {
    let open = |mode| {
        let flags = mode | more | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        Connection::open_with_flags(path, flags).map_err(sql)
    };
    // The write-ahead log needs its shared memory file, which a reader may have to make.
    let conn = match open(OpenFlags::SQLITE_OPEN_READ_WRITE) {
        Err(e) if matches!(e.kind(), ErrorKind::Denied | ErrorKind::Io) => {
            open(OpenFlags::SQLITE_OPEN_READ_ONLY)?
        }
        other => other?,
    };
    configure(&conn, cache_kib)?;
    conn.pragma_update(None, "query_only", true).map_err(sql)?;
    Ok(conn)
}

fn open_to_look(path: &Path) -> Result<Connection> {
    expect_there(path)?;
    let conn = look(path, OpenFlags::empty(), READER_CACHE_KIB)
        .map_err(|e| e.context(format!("opening {}", quoted(path))))?;
    if check_version(&conn, path)? < READABLE {
        let message = format!("{} was never finished: remove it and run init again", quoted(path));
        return Err(Error::corrupt(message));
    }
    Ok(conn)
}

fn expect_there(path: &Path) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let message = format!("there is no catalog at {}: make one with init", quoted(path));
    Err(Error::new(ErrorKind::NoCatalog, message))
}

fn open(path: &Path, mode: OpenFlags) -> Result<Connection> {
    expect_there(path)?;
    let conn = Connection::open_with_flags(path, mode | OpenFlags::SQLITE_OPEN_NO_MUTEX)
        .map_err(|e| sql(e).context(format!("opening {}", quoted(path))))?;
    Ok(conn)
}

pub(super) fn configure(conn: &Connection, cache_kib: i64) -> Result<()> {
    conn.busy_timeout(Duration::from_secs(60)).map_err(sql)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true).map_err(sql)?;
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false).map_err(sql)?;
    // Plans must not depend on what is bound, or SQLite prepares a statement anew for each value.
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true).map_err(sql)?;
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

/// The schema version that the catalog has now.
pub fn version(conn: &Connection) -> Result<i32> {
    conn.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(sql)
}

fn check_version(conn: &Connection, path: &Path) -> Result<i32> {
    let found = conn.pragma_query_value(None, "application_id", |row| row.get::<_, i32>(0));
    let application_id = found.map_err(|e| sql(e).context(quoted(path)))?;
    if application_id != APPLICATION_ID {
        return Err(Error::corrupt(format!("{} is not a RaidTape catalog", quoted(path))));
    }
    let version = version(conn)?;
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

    /// A catalog as it was made before there were comments, with one run.
    fn catalog_of_version_1(path: &Path) {
        let conn = Connection::open(path).unwrap();
        conn.pragma_update(None, "application_id", APPLICATION_ID).unwrap();
        conn.pragma_update(None, "journal_mode", "WAL").unwrap();
        conn.execute_batch(MIGRATIONS[0]).unwrap();
        conn.pragma_update(None, "user_version", 1).unwrap();
        let rows = "INSERT INTO sources VALUES (1, x'2f73');
             INSERT INTO runs VALUES (1, 'u', 1, x'2f73', 1, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0, 0, 0,
                 0, 0, 0, 0, x'68', 'raidtape 0.1.0');
             INSERT INTO run_tags VALUES (1, 't')";
        conn.execute_batch(rows).unwrap();
    }

    #[test]
    fn a_catalog_without_comments_is_read_and_brought_up_to_date() {
        use crate::catalog::{AttributeKind, Reader};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        catalog_of_version_1(&path);
        let rows =
            "INSERT INTO versions VALUES (1, NULL, NULL, CAST('system.posix_acl_access' AS BLOB))";
        Connection::open(&path).unwrap().execute_batch(rows).unwrap();
        let check = |reader: &Reader| {
            let run = reader.run(1).unwrap();
            assert_eq!(
                (&*run.source, &*run.tags, &*run.comment),
                (&b"/s"[..], &["t".into()][..], "")
            );
        };
        let before = Reader::open(&path).unwrap();
        check(&before);
        assert_eq!(version(before.conn()).unwrap(), 1);
        assert!(before.may_have(AttributeKind::Label).unwrap());
        let conn = open_to_write(&path).unwrap();
        assert_eq!(version(&conn).unwrap(), VERSION);
        let query = "SELECT count(*) FROM sqlite_schema WHERE name = 'entries_begun'";
        assert_eq!(conn.query_row(query, [], |row| row.get::<_, i64>(0)), Ok(1));
        // What is there already is known, and what nobody can know is not denied.
        let may_have = |kind| before.may_have(kind).unwrap();
        assert!(may_have(AttributeKind::Acl) && !may_have(AttributeKind::Label));
        conn.execute("UPDATE runs SET comment = 'new'", []).unwrap();
        // One that is open meanwhile goes on, and sees what is new.
        assert_eq!(before.run(1).unwrap().comment, "new");
        let long = "x".repeat(crate::catalog::COMMENT_BYTES_MAX + 1);
        conn.execute("UPDATE runs SET comment = ?1", [long]).unwrap();
        assert_eq!(before.run(1).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn a_catalog_that_was_never_finished_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        let conn = Connection::open(&path).unwrap();
        conn.pragma_update(None, "application_id", APPLICATION_ID).unwrap();
        drop(conn);
        assert_eq!(open_to_read(&path).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn other_files_and_later_versions_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c");
        assert_eq!(open_to_read(&path).unwrap_err().kind(), ErrorKind::NoCatalog);
        std::fs::write(&path, b"hello, this is not a database at all").unwrap();
        assert_eq!(open_to_read(&path).unwrap_err().kind(), ErrorKind::Corrupt);
        std::fs::remove_file(&path).unwrap();
        let conn = create(&path, |_| Ok(())).unwrap();
        conn.pragma_update(None, "user_version", VERSION + 1).unwrap();
        drop(conn);
        assert_eq!(open_to_read(&path).unwrap_err().kind(), ErrorKind::Version);
        assert_eq!(open_to_write(&path).unwrap_err().kind(), ErrorKind::Version);
    }
}
