//! Writing blocks: placement, reserve, rotation to the next volume, and the barrier.
//!
//! Small chunks of many threads share one open block; a large file has blocks of its own. A frame
//! is in a block whole or not at all, and so is a chunk. When the active volume reaches its
//! reserve, or its disk is full before that, the block at hand is closed as it is, the volume is
//! sealed, and the work goes on in the next active volume; a caller notices nothing unless no
//! volume is left.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::block::{self, BlockIndex};
use super::copies::Lacking;
use super::store::PendingBlock;
use super::{Status, Volume, Volumes};
use crate::chunk::frame::Frame;
use crate::chunk::{ChunkRef, HashAlgo, Hasher};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::quoted;

/// What is left free beyond the reserve, in bytes: a block also needs its directories, its index
/// record and its meta, and without those it would not count.
pub(super) const ROOM_BYTES: u64 = 4 << 20;

/// A block is closed when it has this many chunks: tiny files would otherwise fill one with so many
/// that its table grew with the tree.
const BLOCK_CHUNKS_MAX: usize = 1 << 16;

/// Encoded frames and the chunks that end in them, to be appended together.
#[derive(Default)]
pub struct Batch {
    /// Rows of the frame table.
    pub frames: Vec<Frame>,
    /// The frames' stored bytes, one after another.
    pub stored: Vec<u8>,
    /// The chunks that are complete with the last of these frames.
    pub chunks: Vec<ChunkRef>,
}

impl Batch {
    /// Adds a frame.
    pub fn push(&mut self, frame: Frame, stored: &[u8]) {
        self.frames.push(frame);
        self.stored.extend_from_slice(stored);
    }

    /// Plain bytes of the frames.
    pub fn plain_len(&self) -> u64 {
        self.frames.iter().map(|it| u64::from(it.plain_len)).sum()
    }

    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        self.frames.clear();
        self.stored.clear();
        self.chunks.clear();
    }
}

/// Where plain bytes went: a block, by its number in the catalog, and an offset in its plain
/// content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The block's number.
    pub block: u64,
    /// Offset in its plain content, in bytes.
    pub offset: u64,
}

/// Where a copy of a block is: the volume, and where its record begins in that volume's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyAt {
    /// The number of the volume.
    pub volume: i64,
    /// Where the record begins, in bytes.
    pub record_at: u64,
}

/// A block that is durable: bytes, name and index record, of every copy it names. Only
/// [`Writer::barrier`] makes one.
pub struct Stored {
    pub(super) block: u64,
    pub(super) index: BlockIndex,
    pub(super) copies: Vec<CopyAt>,
}

impl Stored {
    /// The block's number.
    pub fn block(&self) -> u64 {
        self.block
    }

    /// What is inside.
    pub fn index(&self) -> &BlockIndex {
        &self.index
    }

    /// Where its copies are; never none.
    pub fn copies(&self) -> &[CopyAt] {
        &self.copies
    }

    /// A block that an index record and a file of the right length prove to be stored: what a run
    /// that did not end has left. `None` when the file is not there or not whole.
    pub fn adopt(
        volume: &Volume,
        block: u64,
        index: BlockIndex,
        record_at: u64,
    ) -> Result<Option<Stored>> {
        let len = volume.store.len_of(&index.id)?;
        let is_whole = len == Some(index.stored_len());
        let copies = vec![CopyAt { volume: volume.config.number, record_at }];
        Ok(is_whole.then_some(Stored { block, index, copies }))
    }
}

/// A block being written. Belongs to one thread, or to the writer for the shared one.
pub struct OpenBlock {
    volume: usize,
    number: u64,
    pending: Box<dyn PendingBlock>,
    hasher: Hasher,
    index: BlockIndex,
    stored_len: u64,
    plain_len: u64,
    chunked_len: u64,
}

struct Closed {
    volume: usize,
    number: u64,
    pending: Box<dyn PendingBlock>,
    index: BlockIndex,
}

/// Writes blocks to the volumes of a catalog. One at a time: see the writer's lock.
pub struct Writer<'a> {
    pub(super) volumes: &'a Volumes,
    pub(super) hash: HashAlgo,
    block_bytes: u64,
    /// Volumes that each block is to be on.
    pub(super) copies: usize,
    next_number: AtomicU64,
    shared: Mutex<Option<OpenBlock>>,
    closed: Mutex<Vec<Closed>>,
    closed_bytes: AtomicU64,
    closed_chunks: AtomicU64,
    /// For each present volume: whether it takes blocks, and the valid length of its index.
    pub(super) full: Mutex<Vec<bool>>,
    pub(super) index_len: Mutex<Vec<Option<u64>>>,
    pub(super) lacking: Mutex<Lacking>,
}

impl<'a> Writer<'a> {
    /// A writer that numbers its blocks from `next_number`. `index_len` holds the valid length of
    /// each present volume's index, in the order of [`Volumes::present`]; a volume without one
    /// takes no blocks.
    pub fn new(
        volumes: &'a Volumes,
        hash: HashAlgo,
        block_bytes: u64,
        next_number: u64,
        index_len: Vec<Option<u64>>,
    ) -> Writer<'a> {
        let usable = volumes.present().iter().zip(&index_len);
        let full = usable
            .map(|(it, index)| it.config.status != Status::Active || index.is_none())
            .collect();
        Writer {
            volumes,
            hash,
            block_bytes,
            copies: 1,
            next_number: AtomicU64::new(next_number),
            shared: Mutex::new(None),
            closed: Mutex::new(Vec::new()),
            closed_bytes: AtomicU64::new(0),
            closed_chunks: AtomicU64::new(0),
            full: Mutex::new(full),
            index_len: Mutex::new(index_len),
            lacking: Mutex::default(),
        }
    }

    /// The same, but each block goes on this many volumes, or on as many as there are with room.
    #[must_use]
    pub fn with_copies(mut self, copies: u8) -> Writer<'a> {
        self.copies = usize::from(copies).max(1);
        self
    }

    /// Appends to the block that all threads share; gives the place of the batch's first byte.
    pub fn append_shared(&self, batch: &Batch) -> Result<Place> {
        let mut shared = self.shared.lock();
        self.append(&mut shared, batch)
    }

    /// Appends to the caller's own block, opening one where `own` is empty or has no room; gives
    /// the place of the batch's first byte.
    pub fn append(&self, own: &mut Option<OpenBlock>, batch: &Batch) -> Result<Place> {
        let plain: u64 = batch.frames.iter().map(|it| u64::from(it.plain_len)).sum();
        self.make_room(own, batch.stored.len() as u64, plain)?;
        loop {
            let Some(block) = own.as_mut() else {
                *own = Some(self.open_block(batch.stored.len() as u64)?);
                continue;
            };
            match block.append(batch) {
                Ok(place) => return Ok(place),
                Err(e) if e.kind() == ErrorKind::NoSpace && block.is_between_chunks() => {
                    // The disk is full although the reserve said otherwise.
                    self.mark_full(block.volume)?;
                    self.close(own)?;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Makes sure that a chunk of `len` plain bytes, which will come in several batches, can go
    /// into one block: goes on to another one if the own block has too little room left.
    pub fn make_room_for_chunk(&self, own: &mut Option<OpenBlock>, len: u64) -> Result<()> {
        self.make_room(own, len, len)?;
        if own.is_none() {
            *own = Some(self.open_block(len)?);
        }
        Ok(())
    }

    fn make_room(&self, own: &mut Option<OpenBlock>, stored: u64, plain: u64) -> Result<()> {
        let Some(block) = own.as_ref() else { return Ok(()) };
        if !block.is_between_chunks() {
            return Ok(());
        }
        let too_long = block.stored_len > 0 && block.stored_len + stored > self.block_bytes;
        // A block of very compressible data must not grow without bound in plain bytes either.
        let too_rich = block.plain_len > 0 && block.plain_len + plain > self.block_bytes * 16;
        // Its table is held until it is stored.
        let too_many = block.index.chunks.len() >= BLOCK_CHUNKS_MAX;
        let at_reserve = !self.has_room(block.volume, stored)?;
        if at_reserve {
            self.mark_full(block.volume)?;
        }
        if too_long || too_rich || too_many || at_reserve {
            self.close(own)?;
        }
        Ok(())
    }

    /// Closes a thread's own block, which ends a file.
    pub fn close(&self, own: &mut Option<OpenBlock>) -> Result<()> {
        let Some(block) = own.take() else { return Ok(()) };
        if block.index.frames.is_empty() {
            return Ok(());
        }
        let OpenBlock { volume, number, pending, hasher, mut index, stored_len, .. } = block;
        index.id = hasher.finish();
        index.check()?;
        self.closed_bytes.fetch_add(stored_len, Ordering::Relaxed);
        self.closed_chunks.fetch_add(index.chunks.len() as u64, Ordering::Relaxed);
        self.closed.lock().push(Closed { volume, number, pending, index });
        Ok(())
    }

    /// Closes the shared block if it holds at least `stored_min` bytes.
    pub fn close_shared_from(&self, stored_min: u64) -> Result<()> {
        let mut shared = self.shared.lock();
        match shared.as_ref() {
            Some(block) if block.stored_len >= stored_min => self.close(&mut shared),
            _ => Ok(()),
        }
    }

    /// Bytes in blocks that are closed but not yet durable.
    pub fn waiting_bytes(&self) -> u64 {
        self.closed_bytes.load(Ordering::Relaxed)
    }

    /// Chunks in those blocks.
    pub fn waiting_chunks(&self) -> u64 {
        self.closed_chunks.load(Ordering::Relaxed)
    }

    /// Number of those blocks.
    pub fn waiting_blocks(&self) -> usize {
        self.closed.lock().len()
    }

    /// Makes all closed blocks durable, and with `last` the shared block too.
    pub fn barrier(&self, last: bool) -> Result<Vec<Stored>> {
        if last {
            self.close(&mut self.shared.lock())?;
        }
        let closed = std::mem::take(&mut *self.closed.lock());
        let mut all = Vec::with_capacity(closed.len());
        let mut by_volume: Vec<Vec<Closed>> = Vec::new();
        by_volume.resize_with(self.volumes.present().len(), Vec::new);
        for it in closed {
            self.closed_bytes.fetch_sub(it.index.stored_len(), Ordering::Relaxed);
            self.closed_chunks.fetch_sub(it.index.chunks.len() as u64, Ordering::Relaxed);
            if let Some(list) = by_volume.get_mut(it.volume) {
                list.push(it);
            }
        }
        for (at, (volume, blocks)) in self.volumes.present().iter().zip(by_volume).enumerate() {
            if !blocks.is_empty() {
                all.append(&mut self.publish(at, volume, blocks)?);
            }
        }
        if self.copies > 1 {
            self.copy_stored(&mut all)?;
        }
        Ok(all)
    }

    fn publish(&self, at: usize, volume: &Volume, blocks: Vec<Closed>) -> Result<Vec<Stored>> {
        let (mut pending, mut indexes) = (Vec::new(), Vec::new());
        for it in blocks {
            pending.push((it.pending, it.index.id));
            indexes.push((it.number, it.index));
        }
        let published = volume.store.publish(pending);
        let records: Vec<_> = indexes.iter().map(|it| (it.0, &it.1)).collect();
        let places = published.and_then(|()| self.append_records(at, &records));
        if let Err(e) = &places
            && e.kind() == ErrorKind::NoSpace
        {
            // The next run goes on with another volume.
            self.mark_full(at)?;
        }
        let stored = indexes.into_iter().zip(places?);
        let stored = stored.map(|((block, index), at)| Stored { block, index, copies: vec![at] });
        Ok(stored.collect())
    }

    /// Appends the records of blocks, by number, to the index of the volume that is number `at` of
    /// those present; gives where they are. The blocks are durable already.
    pub(super) fn append_records(
        &self,
        at: usize,
        blocks: &[(u64, &BlockIndex)],
    ) -> Result<Vec<CopyAt>> {
        let mut lens = self.index_len.lock();
        let (Some(volume), Some(index_len)) = (self.volumes.present().get(at), lens.get_mut(at))
        else {
            return Err(Error::usage("a volume that this writer does not know"));
        };
        let Some(index_len) = index_len else {
            // A copy could not be written there, and this block was begun before.
            let path = quoted(&volume.config.path);
            let message = format!("volume {path} has failed in this run: look at its disk");
            return Err(Error::new(ErrorKind::Io, message));
        };
        let (mut records, mut places) = (Vec::new(), Vec::new());
        for (number, index) in blocks {
            let record_at = *index_len + records.len() as u64;
            places.push(CopyAt { volume: volume.config.number, record_at });
            records.extend(block::encode_record(*number, index));
        }
        *index_len = volume.append_index(*index_len, &records)?;
        Ok(places)
    }

    /// The valid length of each present volume's index, in the order of [`Volumes::present`].
    pub fn index_lens(&self) -> Vec<Option<u64>> {
        self.index_len.lock().clone()
    }

    /// The numbers of the volumes that this writer found full.
    pub fn sealed(&self) -> Vec<i64> {
        let (full, lens) = (self.full.lock(), self.index_len.lock());
        let found = self.volumes.present().iter().zip(full.iter().zip(lens.iter()));
        let found = found.filter(|(it, (full, index))| {
            **full && index.is_some() && it.config.status == Status::Active
        });
        found.map(|(it, _)| it.config.number).collect()
    }

    /// Opens a block in the first active volume that has room for `len` bytes.
    fn open_block(&self, len: u64) -> Result<OpenBlock> {
        loop {
            let Some(at) = self.full.lock().iter().position(|full| !full) else {
                return Err(Error::new(ErrorKind::NoSpace, self.no_room_message()));
            };
            if !self.has_room(at, len)? {
                self.mark_full(at)?;
                continue;
            }
            let Some(volume) = self.volumes.present().get(at) else {
                return Err(Error::new(ErrorKind::NoSpace, self.no_room_message()));
            };
            let pending = match volume.store.begin() {
                Ok(pending) => pending,
                Err(e) if e.kind() == ErrorKind::NoSpace => {
                    self.mark_full(at)?;
                    continue;
                }
                Err(e) => return Err(e),
            };
            let empty = BlockIndex {
                id: crate::chunk::Digest([0; 32]),
                frames: Vec::new(),
                chunks: Vec::new(),
            };
            return Ok(OpenBlock {
                volume: at,
                number: self.next_number.fetch_add(1, Ordering::Relaxed),
                pending,
                hasher: self.hash.hasher(),
                index: empty,
                stored_len: 0,
                plain_len: 0,
                chunked_len: 0,
            });
        }
    }

    fn no_room_message(&self) -> String {
        let active = self.volumes.present().iter().filter(|it| it.config.status == Status::Active);
        let mut missing = self.volumes.missing().iter();
        match (active.count(), missing.find(|it| it.0.status != Status::Sealed)) {
            (0, Some((_, reason))) => {
                format!(
                    "no active volume is there: {reason}; mount it, or make a new one with \
                         add-volume"
                )
            }
            (0, None) if self.volumes.present().is_empty() => {
                "there is no volume yet: make one with add-volume".to_owned()
            }
            (0, None) => "every volume is sealed: make a new one with add-volume".to_owned(),
            _ => "every active volume has reached its reserve: add one with add-volume, or make \
                  room and lower its reserve"
                .to_owned(),
        }
    }

    /// Whether `len` more bytes leave the volume's reserve untouched.
    pub(super) fn has_room(&self, at: usize, len: u64) -> Result<bool> {
        let Some(volume) = self.volumes.present().get(at) else { return Ok(false) };
        Ok(volume.room()? > len)
    }

    pub(super) fn mark_full(&self, at: usize) -> Result<()> {
        let mut full = self.full.lock();
        let Some(flag) = full.get_mut(at) else { return Ok(()) };
        if !std::mem::replace(flag, true)
            && let Some(volume) = self.volumes.present().get(at)
        {
            log::info!("volume {} has reached its reserve: sealed", volume.config.uuid);
        }
        Ok(())
    }
}

impl OpenBlock {
    /// Whether every plain byte so far belongs to a complete chunk: only then a block can end.
    fn is_between_chunks(&self) -> bool {
        self.chunked_len == self.plain_len
    }

    fn append(&mut self, batch: &Batch) -> Result<Place> {
        self.pending.append(&batch.stored)?;
        let place = Place { block: self.number, offset: self.plain_len };
        self.hasher.update(&batch.stored);
        self.stored_len += batch.stored.len() as u64;
        self.index.frames.extend_from_slice(&batch.frames);
        self.index.chunks.extend_from_slice(&batch.chunks);
        let plain = batch.frames.iter().map(|it| u64::from(it.plain_len)).sum::<u64>();
        self.plain_len += plain;
        self.chunked_len += batch.chunks.iter().map(|it| u64::from(it.len)).sum::<u64>();
        Ok(place)
    }
}
