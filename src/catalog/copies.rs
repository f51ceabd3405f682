//! Copies of blocks, and the volumes that they are on as these come and go.
//!
//! A row of a copy is added when the copy is durable, and taken away only together with its whole
//! volume, by a transaction that finds another copy of each block.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rusqlite::Connection;

use super::numbers::{self, Numbered};
use super::read::{Reader, in_order};
use super::run::{RunId, VersionId};
use super::write::{Writer, put_index_len};
use super::{Settings, sql};
use crate::chunk::frame::put_frames;
use crate::chunk::{ChunkId, ChunkRef};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::quoted;
use crate::volume::{BlockId, BlockIndex, CopyAt, Status, VolumeConfig, VolumeManifest, Volumes};

/// Notes a copy, or that its record is elsewhere now.
pub(super) fn put(conn: &Connection, block: u64, at: CopyAt) -> Result<()> {
    let query = "INSERT INTO block_copies (block, volume, record_at) VALUES (?1, ?2, ?3) \
                 ON CONFLICT (block, volume) DO UPDATE SET record_at = excluded.record_at";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    statement.execute((block, at.volume, at.record_at)).map_err(sql)?;
    Ok(())
}

/// The newest number under which the catalog has this very block, cut into the same frames.
pub(super) fn known_as(conn: &Connection, index: &BlockIndex) -> Result<Option<u64>> {
    let mut frames = Vec::new();
    put_frames(&mut frames, &index.frames);
    let query = "SELECT max(number) FROM blocks WHERE id = ?1 AND frames = ?2";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    statement.query_row((&index.id.0[..], frames), |row| row.get(0)).map_err(sql)
}

fn has_copy(conn: &Connection, id: &BlockId, volume: i64) -> Result<bool> {
    let query = "SELECT EXISTS (SELECT 1 FROM blocks JOIN block_copies ON block = number \
                 WHERE id = ?1 AND volume = ?2)";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    statement.query_row((&id.0[..], volume), |row| row.get(0)).map_err(sql)
}

impl Writer {
    /// Settles on how many volumes each block is to be.
    pub fn set_copies(&mut self, copies: u8) -> Result<()> {
        Settings { copies, ..self.settings()? }.check()?;
        let query = "INSERT INTO settings (k, v) VALUES ('copies', ?1) \
                     ON CONFLICT (k) DO UPDATE SET v = excluded.v";
        self.conn().execute(query, [copies.to_string()]).map_err(sql)?;
        Ok(())
    }

    /// Opens the volumes, and notes which are not there now and which are there again.
    pub fn open_volumes(&mut self) -> Result<Volumes> {
        let mut configs = self.volumes()?;
        for config in configs.iter_mut().filter(|it| it.status == Status::Missing) {
            // What it says of itself holds.
            match VolumeManifest::read(&config.path) {
                Ok(it) if it.uuid == config.uuid && it.status != Status::Missing => {
                    log::info!("volume {} is there again", config.uuid);
                    config.status = it.status;
                    self.set_volume_status(config.number, it.status)?;
                }
                _ => {}
            }
        }
        let volumes = Volumes::open(configs);
        for (config, reason) in volumes.missing() {
            let is_away = reason.kind() == ErrorKind::Offline;
            if is_away && config.status != Status::Missing {
                self.set_volume_status(config.number, Status::Missing)?;
            }
        }
        Ok(volumes)
    }

    /// Notes copies that are durable, and how far the indexes of their volumes go.
    pub fn put_copies(
        &mut self,
        copies: &[(u64, CopyAt)],
        index_lens: &[(i64, u64)],
    ) -> Result<()> {
        self.transact(|conn| {
            copies.iter().try_for_each(|(block, at)| put(conn, *block, *at))?;
            index_lens.iter().try_for_each(|(volume, len)| put_index_len(conn, *volume, *len))
        })
    }

    /// Notes where a volume is now.
    pub fn set_volume_path(&mut self, number: i64, path: &Path, status: Status) -> Result<()> {
        let query = "UPDATE volumes SET path = ?2, status = ?3 WHERE number = ?1";
        let row = (number, path.as_os_str().as_bytes(), status.as_str());
        self.conn().execute(query, row).map_err(sql)?;
        Ok(())
    }

    /// Forgets a volume whose blocks are all on other volumes too; fails if one is not.
    pub fn forget_volume(&mut self, number: i64) -> Result<()> {
        self.transact(|conn| {
            let query = "SELECT count(*) FROM block_copies c WHERE volume = ?1 AND NOT EXISTS \
                         (SELECT 1 FROM block_copies o WHERE o.block = c.block AND o.volume <> ?1)";
            let alone: u64 = conn.query_row(query, [number], |row| row.get(0)).map_err(sql)?;
            if alone > 0 {
                let message = format!("{alone} blocks are on no other volume: nothing is retired");
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
            // Manifests of runs go on naming it.
            numbers::keep_one(conn, Numbered::Volume)?;
            let query = "DELETE FROM block_copies WHERE volume = ?1";
            conn.execute(query, [number]).map_err(sql)?;
            conn.execute("DELETE FROM volumes WHERE number = ?1", [number]).map_err(sql)?;
            Ok(())
        })
    }

    /// Gives a block, under all of its numbers, another name, the frames and the copies that go
    /// with it, and notes how far the indexes of the volumes go. Its plain content is the same.
    pub fn rename_block(
        &mut self,
        numbers: &[u64],
        index: &BlockIndex,
        copies: &[CopyAt],
        index_lens: &[(i64, u64)],
    ) -> Result<()> {
        let mut frames = Vec::new();
        put_frames(&mut frames, &index.frames);
        self.transact(|conn| {
            for number in numbers {
                let query = "UPDATE blocks SET id = ?2, stored_len = ?3, frames = ?4 \
                             WHERE number = ?1 AND plain_len = ?5";
                let (stored, plain) = (index.stored_len(), index.plain_len());
                let row = (number, &index.id.0[..], stored, &frames, plain);
                if conn.execute(query, row).map_err(sql)? != 1 {
                    let message = format!("block {number} has another content than {}", index.id);
                    return Err(Error::corrupt(message));
                }
                let query = "DELETE FROM block_copies WHERE block = ?1";
                conn.execute(query, [number]).map_err(sql)?;
                copies.iter().try_for_each(|at| put(conn, *number, *at))?;
            }
            index_lens.iter().try_for_each(|(volume, len)| put_index_len(conn, *volume, *len))
        })
    }

    /// Notes that nothing of a volume's index is to be counted on: see [`Writer::doubted`].
    pub fn doubt_index(&mut self, volume: i64) -> Result<()> {
        let query = "UPDATE volumes SET index_len = 0 WHERE number = ?1";
        self.conn().execute(query, [volume]).map_err(sql)?;
        Ok(())
    }

    /// How many blocks a volume has, if nothing of its index is counted on all the same: a repair
    /// was to write it anew, and has not come to its end.
    pub fn doubted(&self, volume: i64) -> Result<Option<u64>> {
        let query = "SELECT count(*) FROM block_copies JOIN volumes ON number = volume \
                     WHERE volume = ?1 AND index_len = 0";
        let count: u64 = self.conn().query_row(query, [volume], |row| row.get(0)).map_err(sql)?;
        Ok(Some(count).filter(|it| *it > 0))
    }

    /// Whether a volume is said to have a block of this name.
    pub fn has_copy(&self, id: &BlockId, volume: i64) -> Result<bool> {
        has_copy(self.conn(), id, volume)
    }

    /// Notes where the records of a volume's index are now.
    pub fn trust_index(
        &mut self,
        volume: i64,
        places: &[(u64, CopyAt)],
        index_len: u64,
    ) -> Result<()> {
        self.transact(|conn| {
            places.iter().try_for_each(|(block, at)| put(conn, *block, *at))?;
            put_index_len(conn, volume, index_len)
        })
    }
}

impl Reader {
    /// Where the copies of a block are.
    pub fn copies_of(&self, block: u64) -> Result<Vec<CopyAt>> {
        let query = "SELECT volume, record_at FROM block_copies WHERE block = ?1 ORDER BY volume";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let rows = statement
            .query_map([block], |row| Ok(CopyAt { volume: row.get(0)?, record_at: row.get(1)? }));
        rows.map_err(sql)?.collect::<rusqlite::Result<_>>().map_err(sql)
    }

    /// Numbers of blocks with fewer than `copies` copies, at most `limit` of them, from the first
    /// greater than `after`, each with its length.
    pub fn blocks_lacking(&self, copies: u8, after: u64, limit: u64) -> Result<Vec<(u64, u64)>> {
        let query = "SELECT number, stored_len FROM blocks WHERE number > ?1 AND \
                     (SELECT count(*) FROM block_copies WHERE block = number) < ?2 \
                     ORDER BY number LIMIT ?3";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let rows = statement
            .query_map((after, copies, limit), |row| Ok((row.get(0)?, row.get(1)?)))
            .map_err(sql)?;
        let blocks = rows.collect::<rusqlite::Result<Vec<(u64, u64)>>>().map_err(sql)?;
        in_order(std::iter::once(after).chain(blocks.iter().map(|it| it.0)))?;
        Ok(blocks)
    }

    /// How many blocks have fewer than `copies` copies, and the bytes of the copies they lack.
    pub fn lacking(&self, copies: u8) -> Result<(u64, u64)> {
        let query = "SELECT count(*), coalesce(sum(stored_len * (?1 - copies)), 0) FROM \
                     (SELECT stored_len, (SELECT count(*) FROM block_copies \
                      WHERE block = number) AS copies FROM blocks) WHERE copies < ?1";
        let row = self.conn().query_row(query, [copies], |row| Ok((row.get(0)?, row.get(1)?)));
        row.map_err(sql)
    }

    /// The numbers of all blocks of this name: one that was lost and stored again has two.
    pub fn numbers_of(&self, id: &BlockId) -> Result<Vec<u64>> {
        let query = "SELECT number FROM blocks WHERE id = ?1 ORDER BY number";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let rows = statement.query_map([&id.0[..]], |row| row.get(0)).map_err(sql)?;
        rows.collect::<rusqlite::Result<_>>().map_err(sql)
    }

    /// The blocks of a volume, each with where its record begins, in the order of the index.
    pub fn records_on(&self, volume: i64) -> Result<Vec<(u64, u64)>> {
        let query = "SELECT record_at, block FROM block_copies WHERE volume = ?1 \
                     ORDER BY record_at, block";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let rows = statement.query_map([volume], |row| Ok((row.get(0)?, row.get(1)?)));
        rows.map_err(sql)?.collect::<rusqlite::Result<_>>().map_err(sql)
    }

    /// The newest version before `before` that has bytes in a block.
    pub fn user_before(&self, block: u64, before: VersionId) -> Result<Option<VersionId>> {
        let query = "SELECT max(version) FROM uses WHERE block = ?1 AND version < ?2";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        statement.query_row((block, before), |row| row.get(0)).map_err(sql)
    }

    /// The runs whose manifests name a block.
    pub fn runs_that_name(&self, block: u64) -> Result<Vec<RunId>> {
        let query = "SELECT DISTINCT first_run FROM entries WHERE version IN \
                     (SELECT version FROM uses WHERE block = ?1) ORDER BY first_run";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let rows = statement.query_map([block], |row| row.get(0)).map_err(sql)?;
        rows.collect::<rusqlite::Result<_>>().map_err(sql)
    }

    /// Whether the catalog has a copy of a block of this name on a volume.
    pub fn has_copy(&self, id: &BlockId, volume: i64) -> Result<bool> {
        has_copy(self.conn(), id, volume)
    }

    /// The chunks that the catalog finds in a block, with their offsets, in order. Chunks that were
    /// stored again elsewhere are not among them. Looks through all chunks there are.
    pub fn chunks_in(&self, block: u64) -> Result<Vec<(u64, ChunkRef)>> {
        let query = "SELECT at, id, len FROM chunks WHERE block = ?1 ORDER BY at";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        let mut rows = statement.query([block]).map_err(sql)?;
        let mut found = Vec::new();
        while let Some(row) = rows.next().map_err(sql)? {
            let id: Vec<u8> = row.get(1).map_err(sql)?;
            let id = ChunkId::from_slice(&id)?;
            let len = row.get(2).map_err(sql)?;
            found.push((row.get(0).map_err(sql)?, ChunkRef { id, len }));
        }
        Ok(found)
    }

    /// The volume with this name, number or path.
    pub fn find_volume(&self, word: &Path) -> Result<VolumeConfig> {
        let bytes = word.as_os_str().as_bytes();
        let full = word.canonicalize().ok();
        let found = self.volumes()?.into_iter().find(|it| {
            it.uuid.as_bytes() == bytes || it.path == word || full.as_ref() == Some(&it.path)
        });
        found.ok_or_else(|| {
            let message = format!("there is no volume {}: see raidtape volumes", quoted(word));
            Error::new(ErrorKind::NotFound, message)
        })
    }
}
