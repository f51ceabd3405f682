//! Numbers of runs, versions, directories, blocks and volumes, none of which is given twice.
//!
//! A mount and the kernel remember what they have seen under a number for as long as the mount
//! lives, and manifests of runs know volumes by theirs. So the highest number that was given of
//! each kind is kept, and holds when its row is gone.

use rusqlite::{Connection, OptionalExtension};

use super::sql;
use crate::error::{Error, Result};

/// What has numbers.
#[derive(Clone, Copy, Debug)]
pub enum Numbered {
    /// A run.
    Run,
    /// A state of an inode.
    Version,
    /// A directory.
    Dir,
    /// A block.
    Block,
    /// A volume.
    Volume,
}

impl Numbered {
    /// What every run gives numbers of.
    const OF_RUNS: [Numbered; 4] =
        [Numbered::Run, Numbered::Version, Numbered::Dir, Numbered::Block];

    /// The setting that keeps the highest that was given.
    pub(super) fn setting(self) -> &'static str {
        match self {
            Numbered::Run => "last_run",
            Numbered::Version => "last_version",
            Numbered::Dir => "last_dir",
            Numbered::Block => "last_block",
            // Kept when one is retired. Manifests say all settings but those that begin with
            // `last_`; this one they must say: they are all that a rebuilt catalog has.
            Numbered::Volume => "highest_volume",
        }
    }

    /// The highest in use.
    fn highest(self) -> &'static str {
        match self {
            Numbered::Run => "SELECT coalesce(max(run), 0) FROM runs",
            Numbered::Version => "SELECT coalesce(max(version), 0) FROM entries",
            Numbered::Dir => "SELECT coalesce(max(child), 0) FROM entries WHERE child > 0",
            Numbered::Block => "SELECT coalesce(max(number), 0) FROM blocks",
            Numbered::Volume => "SELECT coalesce(max(number), 0) FROM volumes",
        }
    }
}

/// The highest that was ever given. A catalog that keeps none has never given up any.
pub fn last_given(conn: &Connection, what: Numbered) -> Result<i64> {
    let in_use: i64 = conn.query_row(what.highest(), [], |row| row.get(0)).map_err(sql)?;
    Ok(kept(conn, what)?.map_or(in_use, |it| in_use.max(it)))
}

/// The highest that was given, as it is kept; `None` in a catalog of before that keeps none.
pub fn kept(conn: &Connection, what: Numbered) -> Result<Option<i64>> {
    let query = "SELECT v FROM settings WHERE k = ?1";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    let kept = statement.query_row([what.setting()], |row| row.get::<_, String>(0));
    let Some(kept) = kept.optional().map_err(sql)? else { return Ok(None) };
    let bad = |_| Error::corrupt(format!("catalog: setting {} is {kept:?}", what.setting()));
    kept.parse().map(Some).map_err(bad)
}

/// The number that the next one gets.
pub fn next(conn: &Connection, what: Numbered) -> Result<i64> {
    let next = last_given(conn, what)?.checked_add(1);
    next.ok_or_else(|| Error::corrupt(format!("catalog: setting {} is too large", what.setting())))
}

/// Keeps the highest numbers of a run that are in use. Belongs to the transaction that has given
/// them, and to any that gives some up.
pub fn keep(conn: &Connection) -> Result<()> {
    Numbered::OF_RUNS.into_iter().try_for_each(|it| keep_one(conn, it))
}

/// The same of one kind.
pub fn keep_one(conn: &Connection, what: Numbered) -> Result<()> {
    let query = "INSERT INTO settings (k, v) VALUES (?1, ?2) \
                 ON CONFLICT (k) DO UPDATE SET v = excluded.v WHERE v <> excluded.v";
    let last = last_given(conn, what)?.to_string();
    conn.execute(query, (what.setting(), last)).map_err(sql)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::schema;
    use crate::error::ErrorKind;

    fn nexts(conn: &Connection) -> [i64; 4] {
        Numbered::OF_RUNS.map(|it| next(conn, it).unwrap())
    }

    #[test]
    fn a_number_whose_row_is_gone_is_not_given_again() {
        let dir = tempfile::tempdir().unwrap();
        let conn = schema::create(&dir.path().join("c"), |_| Ok(())).unwrap();
        assert_eq!(nexts(&conn), [1; 4]);
        keep(&conn).unwrap();
        assert_eq!(nexts(&conn), [1; 4]);
        conn.execute("INSERT INTO blocks VALUES (7, zeroblob(32), 1, 1, x'00')", []).unwrap();
        assert_eq!(nexts(&conn), [1, 1, 1, 8]);
        // As in a catalog of before, that keeps none.
        conn.execute("DELETE FROM settings", []).unwrap();
        assert_eq!(nexts(&conn), [1, 1, 1, 8]);
        keep(&conn).unwrap();
        conn.execute("DELETE FROM blocks", []).unwrap();
        assert_eq!(nexts(&conn), [1, 1, 1, 8]);
        keep(&conn).unwrap();
        assert_eq!(nexts(&conn), [1, 1, 1, 8]);
    }

    #[test]
    fn what_is_no_number_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let conn = schema::create(&dir.path().join("c"), |_| Ok(())).unwrap();
        for bad in ["", "x", "9223372036854775807", "9223372036854775808"] {
            let query = "INSERT OR REPLACE INTO settings VALUES ('last_run', ?1)";
            conn.execute(query, [bad]).unwrap();
            assert_eq!(next(&conn, Numbered::Run).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }
}
