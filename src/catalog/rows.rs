//! Rows as a run adds them: whether it is the run itself that adds them, or a rebuild that reads of
//! it in its manifest. So both write the same.

use rusqlite::Connection;

use super::brief::{AttributeKind, note_attribute};
use super::run::{Counts, RunId, VersionId};
use super::write::NewEntry;
use super::{Content, Extent, OPEN, extent, sql};
use crate::entry::Kind;
use crate::error::Result;
use crate::sys::Time;

/// What the row of a run says, and its tags.
pub struct RunRow<'a> {
    pub run: RunId,
    pub uuid: &'a str,
    /// Name of the source, which has its row.
    pub source: &'a [u8],
    pub path: &'a [u8],
    pub started: Time,
    pub finished: Time,
    pub counts: &'a Counts,
    pub host: &'a [u8],
    pub program: &'a str,
    pub tags: &'a [String],
    pub comment: &'a str,
}

/// Adds a run and its tags.
pub fn put_run(conn: &Connection, row: &RunRow<'_>) -> Result<()> {
    let query = "INSERT INTO runs (run, uuid, source, path, started_s, started_n, finished_s, \
         finished_n, added, modified, deleted, unchanged, dirs_added, dirs_modified, \
         dirs_deleted, dirs_unchanged, files, bytes, bytes_read, bytes_stored, problems, host, \
         program, comment) VALUES (?1, ?2, (SELECT number FROM sources WHERE name = ?3), ?4, \
         ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, \
         ?23, ?24)";
    let [added, modified, deleted, unchanged, a, m, d, u, files, bytes, read, stored, problems] =
        row.counts.columns();
    let values = rusqlite::params![
        row.run,
        row.uuid,
        row.source,
        row.path,
        row.started.secs,
        row.started.nanos,
        row.finished.secs,
        row.finished.nanos,
        added,
        modified,
        deleted,
        unchanged,
        a,
        m,
        d,
        u,
        files,
        bytes,
        read,
        stored,
        problems,
        row.host,
        row.program,
        row.comment,
    ];
    conn.execute(query, values).map_err(sql)?;
    for tag in row.tags {
        let query = "INSERT OR IGNORE INTO run_tags (run, tag) VALUES (?1, ?2)";
        conn.execute(query, (row.run, tag)).map_err(sql)?;
    }
    Ok(())
}

/// Adds a name, alive from `run` on. The error tells whether the run has the name already.
pub fn put_entry(conn: &Connection, run: RunId, entry: &NewEntry<'_>) -> rusqlite::Result<()> {
    let query = "INSERT INTO entries (dir, name, first_run, last_run, version, child, kind, \
         mode, uid, gid, size, mtime_s, mtime_n, ctime_s, ctime_n, ino, nlink, rdev, \
         data_len) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, \
         ?16, ?17, ?18, ?19)";
    let meta = entry.meta;
    conn.prepare_cached(query)?.execute(rusqlite::params![
        entry.dir,
        entry.name,
        run,
        OPEN,
        entry.version,
        entry.child,
        meta.kind as u8,
        meta.mode,
        meta.uid,
        meta.gid,
        meta.size,
        meta.mtime.secs,
        meta.mtime.nanos,
        meta.ctime.secs,
        meta.ctime.nanos,
        meta.ino.cast_signed(),
        meta.nlink,
        meta.rdev.cast_signed(),
        entry.data_len,
    ])?;
    Ok(())
}

/// Adds what a version has besides its metadata and which blocks it uses; nothing if neither.
pub fn put_content(
    conn: &Connection,
    version: VersionId,
    kind: Kind,
    content: &Content,
) -> Result<()> {
    if kind != Kind::File && content.extra.is_empty() {
        return Ok(());
    }
    let query = "INSERT INTO versions (version, hash, extents, extra) VALUES (?1, ?2, ?3, ?4)";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    let hash = content.hash.as_ref().map(|it| &it.0[..]);
    let extents = (kind == Kind::File).then(|| extent::encode(&content.extents));
    let extra = (!content.extra.is_empty()).then(|| content.extra.encode());
    statement.execute((version, hash, extents, extra)).map_err(sql)?;
    for kind in content.extra.xattrs.iter().filter_map(|it| AttributeKind::of(&it.0)) {
        note_attribute(conn, kind)?;
    }
    let query = "INSERT OR IGNORE INTO uses (block, version) VALUES (?1, ?2)";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    for extent in &content.extents {
        if let Extent::Data { block, .. } = extent {
            statement.execute((block, version)).map_err(sql)?;
        }
    }
    Ok(())
}
