//! What is known of the health of each copy of a block: a small database beside the catalog.
//!
//! When a copy was last read whole and found right, and since when and why it is known to be bad.
//! Not in the catalog: who reads a block and finds it bad is a reader, and must not wait for the
//! catalog's one writer. It is knowledge about the store, never a part of it. So nothing here fails
//! the work that it is about: a damaged file is set aside and begun anew, where nothing can be
//! written the dates live as long as the process, and losing the file loses dates. It is made when
//! there is something to keep, and belongs to whom the catalog belongs. The format is in FORMAT.md.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension, Row};

use super::beside::{self, Beside};
use super::read::in_order;
use super::sql;
use crate::chunk::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, Time, quoted};
use crate::volume::BlockId;

/// What the file is: marked "RTHL".
const HEALTH: Beside = Beside {
    suffix: ".health",
    application_id: 0x5254_484c,
    version: 1,
    script: include_str!("health.sql"),
    cache_kib: 1024,
};

/// Stands for the catalog in the place of a volume's UUID, with a block of zeros.
const CATALOG: &str = "catalog";

/// Longest reason that is kept, in bytes.
const REASON_BYTES_MAX: usize = 1000;

/// A copy of a block that is known to be bad.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadCopy {
    /// UUID of its volume.
    pub volume: String,
    /// The block.
    pub block: BlockId,
    /// When that was first found.
    pub since: Time,
    /// What is wrong with it.
    pub reason: String,
}

/// A copy with the time at which it was last found right; in the order of [`Health::verified`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VerifiedCopy {
    /// When that was.
    pub at: Time,
    /// UUID of its volume.
    pub volume: String,
    /// The block.
    pub block: BlockId,
}

/// What is known of the copies on a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Copies that were found right at some time, and not found bad since.
    pub verified: u64,
    /// The oldest time at which one of them was last found right.
    pub oldest: Option<Time>,
    /// Copies that are known to be bad.
    pub bad: u64,
}

/// The health of the copies of a catalog's blocks. Threads may share it.
pub struct Health {
    path: PathBuf,
    /// Not there until there is something to keep.
    conn: Mutex<Option<Connection>>,
    /// Whether it was said that nothing can be kept.
    is_told: AtomicBool,
}

impl Health {
    /// What is known of the catalog at `catalog`. Never fails: what cannot be read is not known.
    pub fn open(catalog: &Path) -> Health {
        let path = HEALTH.path(catalog);
        Health { path, conn: Mutex::new(None), is_told: AtomicBool::new(false) }
    }

    /// Notes that these copies (UUID of the volume, block) were read whole at `now` and are right:
    /// they are not bad any more. All or, after a kill, none.
    pub fn note_good(&self, copies: &[(&str, BlockId)], now: Time) {
        self.write(|conn| {
            let tx = conn.transaction().map_err(sql)?;
            let query = "INSERT INTO copies (volume, block, verified_s) VALUES (?1, ?2, ?3) \
                         ON CONFLICT DO UPDATE SET verified_s = ?3, bad_s = NULL, reason = NULL";
            for (volume, block) in copies {
                let mut statement = tx.prepare_cached(query).map_err(sql)?;
                statement.execute((volume, block.0, now.secs)).map_err(sql)?;
            }
            tx.commit().map_err(sql)
        });
    }

    /// Notes that a copy was found bad at `now`. Of one that is bad already, the reason is new.
    pub fn note_bad(&self, volume: &str, block: &BlockId, reason: &str, now: Time) {
        let reason = reason.get(..reason.floor_char_boundary(REASON_BYTES_MAX)).unwrap_or_default();
        self.write(|conn| {
            let query = "INSERT INTO copies (volume, block, bad_s, reason) \
                         VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE \
                         SET verified_s = NULL, bad_s = coalesce(bad_s, ?3), reason = ?4";
            let row = (volume, block.0, now.secs, reason);
            conn.execute(query, row).map_err(sql).map(|_| ())
        });
    }

    /// Notes that a bad copy was replaced, without having been read whole again.
    pub fn note_healed(&self, volume: &str, block: &BlockId) {
        self.forget(&[(volume, *block)]);
    }

    /// Forgets copies that are not there any more.
    pub fn forget(&self, copies: &[(&str, BlockId)]) {
        self.change_known(|conn| {
            let tx = conn.transaction().map_err(sql)?;
            for (volume, block) in copies {
                let query = "DELETE FROM copies WHERE volume = ?1 AND block = ?2";
                let mut statement = tx.prepare_cached(query).map_err(sql)?;
                statement.execute((volume, block.0)).map_err(sql)?;
            }
            tx.commit().map_err(sql)
        });
    }

    /// Forgets all copies of a volume that is not there any more.
    pub fn forget_volume(&self, volume: &str) {
        self.change_known(|conn| {
            let query = "DELETE FROM copies WHERE volume = ?1";
            conn.execute(query, [volume]).map_err(sql).map(|_| ())
        });
    }

    /// When a copy was last read whole and found right; `None` if never, or if it is bad.
    pub fn verified_at(&self, volume: &str, block: &BlockId) -> Option<Time> {
        self.read(|conn| {
            let query = "SELECT verified_s FROM copies WHERE volume = ?1 AND block = ?2";
            let mut statement = conn.prepare_cached(query).map_err(sql)?;
            let row = statement.query_row((volume, block.0), |row| row.get(0));
            row.optional().map_err(sql).map(|it| it.flatten().map(whole_seconds))
        })
    }

    /// Whether anything is known of a copy: that it was found right, or bad.
    pub fn is_known(&self, volume: &str, block: &BlockId) -> bool {
        self.read(|conn| {
            let query = "SELECT EXISTS (SELECT 1 FROM copies WHERE volume = ?1 AND block = ?2)";
            let mut statement = conn.prepare_cached(query).map_err(sql)?;
            statement.query_row((volume, block.0), |row| row.get(0)).map_err(sql)
        })
    }

    /// Whether a copy is known to be bad.
    pub fn is_bad(&self, volume: &str, block: &BlockId) -> bool {
        self.read(|conn| {
            let query = "SELECT EXISTS (SELECT 1 FROM copies \
                         WHERE volume = ?1 AND block = ?2 AND bad_s IS NOT NULL)";
            let mut statement = conn.prepare_cached(query).map_err(sql)?;
            statement.query_row((volume, block.0), |row| row.get(0)).map_err(sql)
        })
    }

    /// At most `limit` copies that are known to be bad, by volume and block, from the first after
    /// `after`.
    pub fn bad(&self, after: Option<(&str, BlockId)>, limit: usize) -> Vec<BadCopy> {
        self.read(|conn| {
            let query = "SELECT volume, block, bad_s, reason FROM copies WHERE bad_s IS NOT NULL \
                         AND (volume, block) > (?1, ?2) ORDER BY volume, block LIMIT ?3";
            let (volume, block) = after.unwrap_or(("", Digest([0; 32])));
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let mut statement = conn.prepare_cached(query).map_err(sql)?;
            let mut rows = statement.query((volume, block.0, limit)).map_err(sql)?;
            let mut copies = Vec::new();
            while let Some(row) = rows.next().map_err(sql)? {
                let since = whole_seconds(row.get(2).map_err(sql)?);
                let mut reason: String = row.get(3).map_err(sql)?;
                reason.truncate(reason.floor_char_boundary(REASON_BYTES_MAX));
                let (volume, block) = copy_from(row, 0)?;
                copies.push(BadCopy { volume, block, since, reason });
            }
            let before = after.map(|it| (it.0, it.1.0));
            let keys = copies.iter().map(|it| (&*it.volume, it.block.0));
            in_order(before.into_iter().chain(keys))?;
            Ok(copies)
        })
    }

    /// At most `limit` copies that were last found right before `before`, the longest ago first,
    /// from the first after `after`.
    pub fn verified(
        &self,
        before: Time,
        after: Option<&VerifiedCopy>,
        limit: usize,
    ) -> Vec<VerifiedCopy> {
        self.read(|conn| {
            let query = "SELECT verified_s, volume, block FROM copies WHERE verified_s < ?1 \
                         AND volume <> 'catalog' AND (verified_s, volume, block) > (?2, ?3, ?4) \
                         ORDER BY verified_s, volume, block LIMIT ?5";
            let first = (i64::MIN, "", Digest([0; 32]));
            let (at, volume, block) = after.map_or(first, |it| (it.at.secs, &it.volume, it.block));
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let mut statement = conn.prepare_cached(query).map_err(sql)?;
            let params = (before.secs, at, volume, block.0, limit);
            let mut rows = statement.query(params).map_err(sql)?;
            let mut copies = Vec::new();
            while let Some(row) = rows.next().map_err(sql)? {
                let at = whole_seconds(row.get(0).map_err(sql)?);
                let (volume, block) = copy_from(row, 1)?;
                copies.push(VerifiedCopy { at, volume, block });
            }
            let keys = after.into_iter().chain(&copies);
            in_order(keys.map(|it| (it.at.secs, &*it.volume, it.block.0)))?;
            Ok(copies)
        })
    }

    /// When the catalog itself was last found right, with what lies beside the blocks.
    pub fn catalog_verified_at(&self) -> Option<Time> {
        self.verified_at(CATALOG, &Digest([0; 32]))
    }

    /// Notes that the catalog was found right by a check that began at `then`.
    pub fn note_good_catalog(&self, then: Time) {
        self.note_good(&[(CATALOG, Digest([0; 32]))], then);
    }

    /// Notes that the catalog was not found right.
    pub fn forget_catalog(&self) {
        self.forget(&[(CATALOG, Digest([0; 32]))]);
    }

    /// What is known of the copies on a volume.
    pub fn known(&self, volume: &str) -> Known {
        self.read(|conn| {
            let query = "SELECT count(verified_s), min(verified_s), count(bad_s) FROM copies \
                         WHERE volume = ?1";
            let row = conn.query_row(query, [volume], |row| {
                let oldest = row.get::<_, Option<i64>>(1)?.map(whole_seconds);
                Ok(Known { verified: row.get(0)?, oldest, bad: row.get(2)? })
            });
            row.map_err(sql)
        })
    }

    /// Reads, if anything is kept.
    fn read<T: Default>(&self, mut work: impl FnMut(&mut Connection) -> Result<T>) -> T {
        self.with(false, &mut |conn| work(conn)).unwrap_or_default()
    }

    /// Changes what is kept, if anything is.
    fn change_known(&self, mut work: impl FnMut(&mut Connection) -> Result<()>) {
        self.with(false, &mut |conn| work(conn));
    }

    fn write(&self, mut work: impl FnMut(&mut Connection) -> Result<()>) {
        self.with(true, &mut |conn| work(conn));
    }

    /// Does something with the database; once more with a new one, if it is damaged.
    fn with<T>(
        &self,
        is_made: bool,
        work: &mut dyn FnMut(&mut Connection) -> Result<T>,
    ) -> Option<T> {
        let mut slot = self.conn.lock();
        let mut attempt = |slot: &mut Option<Connection>| -> Result<Option<T>> {
            if slot.is_none() {
                if !is_made && self.path.symlink_metadata().is_err() {
                    return Ok(None);
                }
                *slot = Some(self.open_file()?);
            }
            slot.as_mut().map(&mut *work).transpose()
        };
        let result = match attempt(&mut slot) {
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                // The old one has to be closed before its file is renamed.
                *slot = None;
                self.set_aside(&e).and_then(|()| attempt(&mut slot))
            }
            other => other,
        };
        let result = match result {
            Err(e) if slot.is_none() => {
                self.tell(&e);
                *slot = HEALTH.in_memory(&|_| Ok(())).ok();
                attempt(&mut slot)
            }
            other => other,
        };
        result.unwrap_or_else(|e| {
            self.tell(&e);
            None
        })
    }

    fn open_file(&self) -> Result<Connection> {
        let is_new = self.path.symlink_metadata().is_err();
        let conn = HEALTH.open(&self.path, &|_| Ok(()))?;
        // Dates may be lost at a power cut; the file stays whole.
        conn.pragma_update(None, "synchronous", "NORMAL").map_err(sql)?;
        if is_new {
            self.give_to_owner();
        }
        Ok(conn)
    }

    /// What root makes belongs to whom the catalog belongs, or its owner could not write it.
    fn give_to_owner(&self) {
        let catalog = self.path.with_extension("");
        for suffix in ["", "-wal", "-shm"] {
            let mut name = self.path.as_os_str().to_os_string();
            name.push(suffix);
            let Ok(owner) = sys::stat(&catalog) else { return };
            let Ok(file) = sys::private_file().write(true).open(&name) else { continue };
            // Others than root cannot, and need not.
            let _ = sys::at::chown_fd(&file, Some(owner.uid), Some(owner.gid));
        }
    }

    fn set_aside(&self, why: &Error) -> Result<()> {
        let aside = beside::set_aside(&self.path)?;
        log::warn!(
            "health of blocks {}: {why}: set aside as {}, a new one is begun",
            quoted(&self.path),
            quoted(&aside)
        );
        Ok(())
    }

    /// Says once that nothing can be kept.
    fn tell(&self, why: &Error) {
        if !self.is_told.swap(true, Ordering::Relaxed) {
            log::warn!("the health of blocks is not kept: {}: {why}", quoted(&self.path));
        }
    }
}

fn whole_seconds(secs: i64) -> Time {
    Time { secs, nanos: 0 }
}

/// Volume and block of a row, from column `at` on.
fn copy_from(row: &Row<'_>, at: usize) -> Result<(String, BlockId)> {
    let block: Vec<u8> = row.get(at + 1).map_err(sql)?;
    Ok((row.get(at).map_err(sql)?, Digest::from_slice(&block)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "aaaa";
    const B: &str = "bbbb";

    fn id(n: u8) -> BlockId {
        Digest([n; 32])
    }

    fn at(secs: i64) -> Time {
        whole_seconds(secs)
    }

    #[test]
    fn dates_and_faults_are_kept_for_each_copy() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("c");
        let health = Health::open(&catalog);
        assert_eq!(health.verified_at(A, &id(1)), None);
        health.forget(&[(A, id(1))]);
        // Who only asks leaves nothing behind.
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        health.note_good(&[(A, id(1)), (A, id(2)), (B, id(1))], at(100));
        health.note_bad(A, &id(2), "torn", at(150));
        health.note_bad(A, &id(2), "gone", at(170));
        health.note_bad(B, &id(3), "gone", at(180));
        drop(health);
        let health = Health::open(&catalog);
        assert_eq!(health.verified_at(A, &id(1)), Some(at(100)));
        assert_eq!(health.verified_at(A, &id(2)), None);
        assert!(health.is_known(A, &id(2)) && !health.is_known(B, &id(2)));
        let bad = |volume: &str, n, since| BadCopy {
            volume: volume.into(),
            block: id(n),
            since: at(since),
            reason: "gone".into(),
        };
        assert_eq!(health.bad(None, 9), [bad(A, 2, 150), bad(B, 3, 180)]);
        assert_eq!(health.bad(None, 1), [bad(A, 2, 150)]);
        assert_eq!(health.bad(Some((A, id(2))), 9), [bad(B, 3, 180)]);
        let known = Known { verified: 1, oldest: Some(at(100)), bad: 1 };
        assert_eq!(health.known(A), known);
        health.note_good(&[(A, id(2))], at(200));
        health.note_healed(B, &id(3));
        assert_eq!(health.bad(None, 9), []);
        assert_eq!(health.known(A).verified, 2);
        health.forget_volume(A);
        assert_eq!(health.known(A), Known::default());
        assert_eq!(health.known(B).verified, 1);
    }

    #[test]
    fn the_longest_unverified_come_first_in_pages() {
        let dir = tempfile::tempdir().unwrap();
        let health = Health::open(&dir.path().join("c"));
        for (n, secs) in [(1, 300), (2, 100), (3, 200), (4, 100)] {
            health.note_good(&[(A, id(n))], at(secs));
        }
        health.note_bad(A, &id(9), "gone", at(50));
        let first = health.verified(at(300), None, 2);
        let numbers = |copies: &[VerifiedCopy]| -> Vec<BlockId> {
            copies.iter().map(|it| it.block).collect()
        };
        assert_eq!(numbers(&first), [id(2), id(4)]);
        // What is found right meanwhile is not met again.
        health.note_good(&[(A, id(2)), (A, id(4))], at(400));
        assert_eq!(numbers(&health.verified(at(300), first.last(), 2)), [id(3)]);
        assert_eq!(numbers(&health.verified(at(300), None, 9)), [id(3)]);
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_a_new_one_begun() {
        let dir = tempfile::tempdir().unwrap();
        let (catalog, path) = (dir.path().join("c"), dir.path().join("c.health"));
        let other = b"not a database, and longer than the header of one".to_vec();
        for text in [other, vec![7; 9000]] {
            std::fs::write(&path, &text).unwrap();
            let health = Health::open(&catalog);
            assert_eq!(health.known(A), Known::default());
            health.note_good(&[(A, id(1))], at(5));
            drop(health);
            assert_eq!(Health::open(&catalog).verified_at(A, &id(1)), Some(at(5)));
            let mut aside = std::fs::read_dir(dir.path()).unwrap().map(|it| it.unwrap().path());
            let aside = aside.find(|it| it.to_str().unwrap().contains("damaged")).unwrap();
            assert_eq!(std::fs::read(&aside).unwrap(), text);
            std::fs::remove_file(aside).unwrap();
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn impossible_rows_are_damage() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("c");
        Health::open(&catalog).note_good(&[(A, id(1))], at(5));
        let conn = Connection::open(dir.path().join("c.health")).unwrap();
        conn.execute_batch(
            "PRAGMA ignore_check_constraints = ON;
             INSERT INTO copies VALUES ('a', x'0102', 3, NULL, NULL)",
        )
        .unwrap();
        drop(conn);
        let health = Health::open(&catalog);
        assert_eq!(health.verified(at(10), None, 9), []);
        assert_eq!(health.known(A), Known::default());
        let names = std::fs::read_dir(dir.path()).unwrap().map(|it| it.unwrap().file_name());
        assert!(names.into_iter().any(|it| it.to_str().unwrap().contains("damaged")));
    }

    #[test]
    fn where_nothing_can_be_written_it_is_remembered_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        // Nobody, not even root, makes a file in a directory that is not there.
        let health = Health::open(&dir.path().join("gone/c"));
        health.note_good(&[(A, id(1))], at(5));
        health.note_bad(A, &id(2), &"\u{e4}".repeat(REASON_BYTES_MAX), at(5));
        assert_eq!(health.verified_at(A, &id(1)), Some(at(5)));
        assert_eq!(health.bad(None, 9)[0].reason.len(), REASON_BYTES_MAX);
    }

    #[test]
    fn a_later_version_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (catalog, path) = (dir.path().join("c"), dir.path().join("c.health"));
        Health::open(&catalog).note_good(&[(A, id(1))], at(5));
        let conn = Connection::open(&path).unwrap();
        conn.pragma_update(None, "user_version", HEALTH.version + 1).unwrap();
        drop(conn);
        let before = std::fs::read(&path).unwrap();
        let health = Health::open(&catalog);
        health.note_good(&[(A, id(2))], at(6));
        assert_eq!(health.verified_at(A, &id(2)), Some(at(6)));
        drop(health);
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    #[test]
    fn it_belongs_to_whom_the_catalog_belongs() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("c.db");
        std::fs::write(&catalog, b"").unwrap();
        std::os::unix::fs::chown(&catalog, Some(65534), Some(65534)).unwrap();
        let health = Health::open(&catalog);
        health.note_good(&[(A, id(1))], at(5));
        for suffix in ["", "-wal", "-shm"] {
            let file = dir.path().join(format!("c.db.health{suffix}"));
            let file = std::fs::metadata(file).unwrap();
            assert_eq!((file.uid(), file.gid()), (65534, 65534), "{suffix}");
            assert_eq!(file.permissions().mode() & 0o777, 0o600);
        }
    }
}
