//! The volumes that blocks of tapes come to.
//!
//! Invariant: a block counts when its file is durable, and then it has its meta, its record and its
//! row, as any further copy does. Blocks become durable in groups.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use super::recall::Recalled;
use crate::catalog::meta;
use crate::copies::{Store, tables_of, write_metas};
use crate::error::{Error, ErrorKind, Problem, Quoted, Result};
use crate::sys::{Time, quoted};
use crate::volume::store::PendingBlock;
use crate::volume::{BlockId, BlockIndex, CopyAt, Status, Volume, Volumes, Writer as BlockWriter};

/// Blocks that are made durable together, and their bytes.
const GROUP_BLOCKS: usize = 16;
const GROUP_BYTES: u64 = 256 << 20;

/// A block that has been read and is right, and waits for its name.
pub struct Fetched {
    pub number: u64,
    pub id: BlockId,
    pub len: u64,
    pub volume: Volume,
    pub pending: Box<dyn PendingBlock>,
}

/// The volumes that blocks come to.
pub struct Targets<'a> {
    volumes: &'a Volumes,
    /// Bytes that are still to be written to each, of the blocks at hand.
    coming: Mutex<BTreeMap<i64, u64>>,
}

/// What is still to be written of a block. It is no longer expected when this is dropped.
pub struct Coming<'a> {
    all: &'a Mutex<BTreeMap<i64, u64>>,
    volume: i64,
    left: u64,
}

impl Coming<'_> {
    /// So much of it is written: from now on the file system counts it.
    pub fn written(&mut self, len: u64) {
        let len = len.min(self.left);
        self.left -= len;
        if let Some(it) = self.all.lock().get_mut(&self.volume) {
            *it = it.saturating_sub(len);
        }
    }
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        self.written(u64::MAX);
    }
}

impl<'a> Targets<'a> {
    /// These ones.
    pub fn new(volumes: &'a Volumes) -> Targets<'a> {
        Targets { volumes, coming: Mutex::new(BTreeMap::new()) }
    }

    /// Where a block goes: to where the catalog has it, if that is there and has room, or where
    /// there is most room.
    pub fn choose(&self, copies: &[CopyAt], len: u64) -> Result<(Volume, Coming<'_>)> {
        let mut coming = self.coming.lock();
        let mut best = None;
        // A volume that is known to have it before any other, and then the one with most room.
        for volume in self.volumes.present() {
            let is_known = copies.iter().any(|it| it.volume == volume.config.number);
            if !is_known && volume.config.status != Status::Active {
                continue;
            }
            let taken = coming.get(&volume.config.number).copied().unwrap_or(0);
            let room = volume.room()?.saturating_sub(taken);
            let rank = (is_known, room);
            if room >= len && best.is_none_or(|it: ((bool, u64), _)| it.0 < rank) {
                best = Some((rank, volume));
            }
        }
        // What is known to have it may use what it keeps free, before nobody gets it.
        let known = || copies.iter().find_map(|it| self.volumes.get(it.volume));
        let Some(volume) = best.map(|it| it.1).or_else(known) else {
            let message = format!("no volume has room for {len} bytes: add one with add-volume");
            return Err(Error::new(ErrorKind::NoSpace, message));
        };
        // Only an estimate: a full disk says so itself.
        *coming.entry(volume.config.number).or_default() += len;
        let number = volume.config.number;
        Ok((volume.clone(), Coming { all: &self.coming, volume: number, left: len }))
    }
}

/// What takes blocks in.
pub struct Into<'a> {
    store: Store,
    volumes: &'a Volumes,
    group: Vec<Fetched>,
    bytes: u64,
    done: &'a mut Recalled,
}

impl<'a> Into<'a> {
    pub fn new(store: Store, volumes: &'a Volumes, done: &'a mut Recalled) -> Into<'a> {
        Into { store, volumes, group: Vec::new(), bytes: 0, done }
    }

    pub fn note(&mut self, name: String, error: &Error) {
        self.done.note(Problem::new(name, error));
    }

    /// A tape that could not be had, or read any further.
    pub fn note_tape(&mut self, label: &[u8], error: &Error) {
        self.done.is_tape_missing |= error.kind() == ErrorKind::WrongTape;
        self.note(format!("tape {}", Quoted(label)), error);
    }

    pub fn take(&mut self, block: Fetched) -> Result<()> {
        self.bytes += block.len;
        self.group.push(block);
        if self.group.len() < GROUP_BLOCKS && self.bytes < GROUP_BYTES {
            return Ok(());
        }
        self.settle()
    }

    /// Makes a group durable and known.
    pub fn settle(&mut self) -> Result<()> {
        self.bytes = 0;
        let mut by_volume: BTreeMap<i64, Vec<Fetched>> = BTreeMap::new();
        for block in self.group.drain(..) {
            by_volume.entry(block.volume.config.number).or_default().push(block);
        }
        for (number, blocks) in by_volume {
            let Some(volume) = self.volumes.get(number) else { continue };
            let mut pending = Vec::new();
            let mut known = Vec::new();
            for block in blocks {
                known.push((block.number, block.id, block.len));
                pending.push((block.pending, block.id));
            }
            volume.store.publish(pending)?;
            for (block, id, len) in known {
                volume.store.forget(&id);
                match self.register(volume, block, &id) {
                    // Its bytes are there, and `rebuildmeta` and the next recall find them.
                    Err(e) if e.kind() == ErrorKind::Corrupt => {
                        self.note(format!("block {id}"), &e);
                        continue;
                    }
                    registered => registered?,
                }
                self.done.blocks += 1;
                self.done.bytes += len;
            }
        }
        Ok(())
    }

    /// Notes a block that is durable on a volume.
    fn register(&mut self, volume: &Volume, block: u64, id: &BlockId) -> Result<()> {
        let uuid = &volume.config.uuid;
        let copies = self.store.reader.copies_of(block)?;
        if copies.iter().any(|it| it.volume == volume.config.number) {
            self.store.health.note_healed(uuid, id);
            return Ok(());
        }
        let hash = self.store.settings.hash;
        let index: BlockIndex = tables_of(&self.store.reader, self.volumes, hash, block, &copies)
            .or_else(|_| {
            let mut all = copies.clone();
            // Its record comes only now; its bytes are there.
            let at = i64::MAX.cast_unsigned();
            all.push(CopyAt { volume: volume.config.number, record_at: at });
            tables_of(&self.store.reader, self.volumes, hash, block, &all)
        })?;
        let mut names = meta::DirNames::default();
        write_metas(&self.store.reader, volume, &[&index], hash, &mut names)?;
        let blocks = BlockWriter::new(
            self.volumes,
            hash,
            self.store.settings.block_bytes,
            self.store.writer.next_block()?,
            self.store.index_lens().to_vec(),
        );
        let at = blocks.add_record(volume.config.number, block, &index)?;
        let lens = blocks.index_lens();
        let known: Vec<(i64, u64)> = self
            .volumes
            .present()
            .iter()
            .zip(&lens)
            .filter_map(|(it, len)| Some((it.config.number, (*len)?)))
            .collect();
        self.store.set_index_lens(lens);
        self.store.writer.put_copies(&[(block, at)], &known)?;
        self.store.health.note_good(&[(uuid, *id)], Time::now());
        log::debug!("block {id} is back on {}", quoted(&volume.config.path));
        Ok(())
    }
}
