//! What a manifest says besides its changes: the state of the catalog around its run, and which
//! manifest came before.
//!
//! Each manifest names the one before it by digest, so that a chain of them can be told from one of
//! which a part was changed, lost or put in. The newest digest is kept in the setting
//! `last_manifest`: a run does not have to read the manifest before it.

use std::io::Write;

use rusqlite::{Connection, OptionalExtension};

use super::manifest::{End, Header, Previous};
use super::read::{Reader, volumes};
use super::run::{Counts, Run, RunId};
use super::write::{RunWriter, Writer};
use super::{Spool, meta, sql};
use crate::chunk::{Digest, HashAlgo};
use crate::error::{Error, Problem, Result};
use crate::sys::{self, Time};
use crate::volume::Facts;

/// The setting that keeps number, name and digest of the newest run's manifest.
pub(super) const LAST_MANIFEST: &str = "last_manifest";

/// What wrote the runs of this process.
pub(super) const PROGRAM: &str = concat!("raidtape ", env!("CARGO_PKG_VERSION"));

/// The end of a run, as its manifest and its row have it.
pub struct RunEnd<'a> {
    /// Tags and comment.
    pub words: (&'a [String], &'a str),
    /// What it counted.
    pub counts: &'a Counts,
    /// When it ended.
    pub finished: Time,
}

impl RunWriter<'_> {
    /// Notes in the spool what could not be read: the last before the manifest is written.
    pub fn spool_problems(&self, spool: &mut Spool, problems: &[Problem]) -> Result<()> {
        problems.iter().try_for_each(|it| spool.problem(&it.path, it.kind.as_str(), &it.message))
    }

    /// Writes the manifest of this run, as it stands in the spool; gives its digest.
    pub fn write_manifest(
        &self,
        spool: &mut Spool,
        hash: HashAlgo,
        end: &RunEnd<'_>,
        out: &mut dyn Write,
    ) -> Result<Digest> {
        let conn = self.conn();
        let host = sys::host_name();
        let header = Header {
            run: self.run(),
            uuid: self.uuid(),
            source: self.name(),
            started: self.started(),
            hash,
            tags: end.words.0,
            comment: end.words.1,
            path: self.path(),
            host: &host,
            program: PROGRAM,
            settings: setting_rows(conn)?,
            volumes: volumes(conn)?,
            previous: previous(conn, self.run())?,
            basis: basis(conn, self.run(), self.name())?,
        };
        let end = End { finished: end.finished, counts: end.counts };
        meta::write_manifest(conn, spool, (&header, &end), out)
    }

    /// Keeps the digest of this run's manifest for the next one.
    pub fn keep_manifest(&self, digest: &Digest) -> Result<()> {
        put_last_manifest(self.conn(), self.run(), self.uuid(), digest)
    }
}

impl Writer {
    /// What the catalog says of a volume, and of itself, for the volume's own manifest.
    pub fn facts_of(&self, volume: i64) -> Result<Facts> {
        facts_of(self.conn(), volume)
    }

    /// Number, name and digest of the newest run's manifest, if they are kept.
    pub fn last_manifest(&self) -> Result<Option<Previous>> {
        last_manifest(self.conn())
    }

    /// Keeps the digest of the newest run's manifest, which has been made anew.
    pub fn keep_manifest(&mut self, run: &Run, digest: &Digest) -> Result<()> {
        put_last_manifest(self.conn(), run.id, &run.uuid, digest)
    }
}

fn facts_of(conn: &Connection, volume: i64) -> Result<Facts> {
    let query = "SELECT created_s FROM volumes WHERE number = ?1";
    let created = conn.query_row(query, [volume], |row| row.get(0)).map_err(sql)?;
    Ok(Facts { number: volume, created, settings: setting_rows(conn)? })
}

impl Reader {
    /// What the catalog says of a volume, and of itself, for the volume's own manifest.
    pub fn facts_of(&self, volume: i64) -> Result<Facts> {
        facts_of(self.conn(), volume)
    }

    /// Number, name and digest of the newest run's manifest, if they are kept.
    pub fn last_manifest(&self) -> Result<Option<Previous>> {
        last_manifest(self.conn())
    }

    /// Writes a manifest of a finished run, whose changes are in the spool.
    pub(super) fn write_spooled(
        &self,
        run: &Run,
        hash: HashAlgo,
        previous: Option<Previous>,
        spool: &mut Spool,
        out: &mut dyn Write,
    ) -> Result<Digest> {
        let query = "SELECT program FROM runs WHERE run = ?1";
        let program: String =
            self.conn().query_row(query, [run.id], |row| row.get(0)).map_err(sql)?;
        let header = Header {
            run: run.id,
            uuid: &run.uuid,
            source: &run.source,
            started: run.started,
            hash,
            tags: &run.tags,
            comment: &run.comment,
            path: std::os::unix::ffi::OsStrExt::as_bytes(run.path.as_os_str()),
            host: &run.host,
            program: &program,
            settings: setting_rows(self.conn())?,
            volumes: self.volumes()?,
            previous,
            basis: basis(self.conn(), run.id, &run.source)?,
        };
        let end = End { finished: run.finished, counts: &run.counts };
        meta::write_manifest(self.conn(), spool, (&header, &end), out)
    }
}

/// Number, name and digest of the newest run's manifest, if they are kept.
pub(super) fn last_manifest(conn: &Connection) -> Result<Option<Previous>> {
    let query = "SELECT v FROM settings WHERE k = ?1";
    let kept = conn.query_row(query, [LAST_MANIFEST], |row| row.get::<_, String>(0));
    let Some(kept) = kept.optional().map_err(sql)? else { return Ok(None) };
    let mut words = kept.split(' ');
    let mut parse = || -> Option<Previous> {
        let (run, uuid) = (words.next()?.parse().ok()?, words.next()?.to_owned());
        Some(Previous { run, uuid, digest: Some(words.next()?.parse().ok()?) })
    };
    let bad = || Error::corrupt(format!("catalog: setting {LAST_MANIFEST} is {kept:?}"));
    parse().ok_or_else(bad).map(Some)
}

pub(super) fn put_last_manifest(
    conn: &Connection,
    run: RunId,
    uuid: &str,
    digest: &Digest,
) -> Result<()> {
    let query = "INSERT INTO settings (k, v) VALUES (?1, ?2) \
                 ON CONFLICT (k) DO UPDATE SET v = excluded.v";
    conn.execute(query, (LAST_MANIFEST, format!("{run} {uuid} {digest}"))).map_err(sql)?;
    Ok(())
}

/// All settings but those that belong to this one database.
pub(super) fn setting_rows(conn: &Connection) -> Result<Vec<(String, String)>> {
    let query = "SELECT k, v FROM settings WHERE k <> 'catalog_id' AND substr(k, 1, 5) <> 'last_' \
                 ORDER BY k";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).map_err(sql)?;
    rows.collect::<rusqlite::Result<_>>().map_err(sql)
}

/// The newest run before this one. Its digest is not known if the program that made it kept none.
fn previous(conn: &Connection, run: RunId) -> Result<Option<Previous>> {
    let query = "SELECT run, uuid FROM runs WHERE run < ?1 ORDER BY run DESC LIMIT 1";
    let found = conn.query_row(query, [run], |row| Ok((row.get(0)?, row.get(1)?)));
    let Some((run, uuid)) = found.optional().map_err(sql)? else { return Ok(None) };
    let kept = last_manifest(conn)?.filter(|it| (it.run, &it.uuid) == (run, &uuid));
    Ok(Some(Previous { run, uuid, digest: kept.and_then(|it| it.digest) }))
}

/// The newest run of the same source before this one.
fn basis(conn: &Connection, run: RunId, source: &[u8]) -> Result<Option<(RunId, String)>> {
    let query = "SELECT run, uuid FROM runs JOIN sources ON number = source \
                 WHERE name = ?1 AND run < ?2 ORDER BY run DESC LIMIT 1";
    let found = conn.query_row(query, (source, run), |row| Ok((row.get(0)?, row.get(1)?)));
    found.optional().map_err(sql)
}
