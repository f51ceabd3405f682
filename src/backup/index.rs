//! Which chunks are stored already, and who is storing the others.
//!
//! A chunk is known when the catalog has it, or placed when a worker of this run has appended it to
//! a block that is not in the catalog yet, or claimed while a worker holds it in a frame that is
//! not appended yet. Exactly one worker claims a chunk. Locks are taken in one order: shard, then
//! run.
//!
//! A chunk whose block is not on its volume with its whole length counts as unknown and is stored
//! again: nothing that a run reads is built on what is not there. (Files that look unchanged are
//! not read; what they have lost, `validate` tells.)

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::catalog::{RunWriter, VersionId};
use crate::chunk::{ChunkId, ChunkRef, Digest};
use crate::entry::Extra;
use crate::error::{Error, ErrorKind, Result};
use crate::volume::{Place, Stored, Volumes};

const SHARDS: usize = 16;

/// What a worker may do about a chunk.
pub enum Claim {
    /// Nobody has it: the asker stores it and says where with [`ChunkIndex::place`].
    New,
    /// It is stored here.
    Known(Place),
    /// Another worker is storing it.
    Busy,
}

enum Slot {
    Claimed,
    Placed(Place),
}

/// The chunk index of one run.
pub struct ChunkIndex<'a> {
    run: Mutex<RunWriter<'a>>,
    volumes: &'a Volumes,
    /// Blocks that have been looked at, and whether they can be built on.
    sound: Mutex<HashMap<u64, bool>>,
    shards: Vec<Mutex<HashMap<ChunkId, Slot>>>,
    /// Whether the catalog has any chunk: a first backup need not ask it for each.
    any_stored: AtomicBool,
    /// Set when the run has failed and nobody must wait any more.
    failed: Mutex<bool>,
    placed: Condvar,
    write_permits: Option<Permits>,
}

impl<'a> ChunkIndex<'a> {
    /// An index over the catalog that `run` writes; at most `writers_max` workers append at a time.
    pub fn new(
        run: RunWriter<'a>,
        volumes: &'a Volumes,
        writers_max: Option<usize>,
    ) -> Result<ChunkIndex<'a>> {
        let any_stored = AtomicBool::new(run.has_chunks()?);
        Ok(ChunkIndex {
            any_stored,
            run: Mutex::new(run),
            volumes,
            sound: Mutex::default(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            failed: Mutex::new(false),
            placed: Condvar::new(),
            write_permits: writers_max.map(Permits::new),
        })
    }

    /// The run's transaction.
    pub fn run(&self) -> MutexGuard<'_, RunWriter<'a>> {
        self.run.lock()
    }

    fn shard(&self, id: &ChunkId) -> Result<MutexGuard<'_, HashMap<ChunkId, Slot>>> {
        let [first, ..] = id.0;
        let shard = self.shards.get(usize::from(first) % SHARDS);
        Ok(shard.ok_or_else(|| Error::usage("no such shard"))?.lock())
    }

    /// Asks for a chunk.
    pub fn claim(&self, id: &ChunkId) -> Result<Claim> {
        self.check()?;
        let mut shard = self.shard(id)?;
        match shard.get(id) {
            Some(Slot::Placed(place)) => return Ok(Claim::Known(*place)),
            Some(Slot::Claimed) => return Ok(Claim::Busy),
            None => {}
        }
        if let Some(place) = self.find_sound(id)? {
            return Ok(Claim::Known(place));
        }
        shard.insert(*id, Slot::Claimed);
        Ok(Claim::New)
    }

    /// Where the catalog has a chunk, if its block is there.
    fn find_sound(&self, id: &ChunkId) -> Result<Option<Place>> {
        if !self.any_stored.load(Ordering::Acquire) {
            return Ok(None);
        }
        let found = self.run.lock().find_chunk(id)?;
        let Some((place, _)) = found else { return Ok(None) };
        Ok(self.is_sound(place.block)?.then_some(place))
    }

    /// Whether a version has this hash and these attributes, and every block that it has bytes in
    /// is there.
    pub fn has_sound(&self, version: VersionId, hash: &Digest, extra: &Extra) -> Result<bool> {
        let (found, blocks) = self.run.lock().hash_and_blocks(version)?;
        if found.as_ref() != Some(hash) || self.run.lock().extra_of(version)? != *extra {
            return Ok(false);
        }
        for block in blocks {
            if !self.is_sound(block)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn is_sound(&self, number: u64) -> Result<bool> {
        if let Some(sound) = self.sound.lock().get(&number) {
            return Ok(*sound);
        }
        let (block, len, volumes) = self.run.lock().block_place(number)?;
        // A volume that is away, say on a shelf, is trusted; one that is here has to have it.
        let is_there = |number: &i64| match self.volumes.get(*number) {
            Some(volume) => volume.store.len_of(&block).is_ok_and(|it| it == Some(len)),
            None => true,
        };
        let sound = volumes.iter().any(is_there);
        if !sound {
            log::error!("block {block} is missing or not whole: its content is stored again");
        }
        self.sound.lock().insert(number, sound);
        Ok(sound)
    }

    /// Says where claimed chunks, which lie one after another from `first` on, have been appended.
    pub fn place(&self, first: Place, chunks: &[ChunkRef]) -> Result<()> {
        let mut at = first;
        for chunk in chunks {
            self.shard(&chunk.id)?.insert(chunk.id, Slot::Placed(at));
            at.offset += u64::from(chunk.len);
        }
        self.placed.notify_all();
        Ok(())
    }

    /// Takes back a claim whose chunk will not be stored.
    pub fn release(&self, id: &ChunkId) -> Result<()> {
        self.shard(id)?.remove(id);
        self.placed.notify_all();
        Ok(())
    }

    /// Waits until a busy chunk is placed; `None` when its claim was taken back.
    ///
    /// The caller must hold no claim of its own that is not placed, or two workers would wait for
    /// each other.
    pub fn wait(&self, id: &ChunkId) -> Result<Option<Place>> {
        loop {
            match self.shard(id)?.get(id) {
                Some(Slot::Placed(place)) => return Ok(Some(*place)),
                Some(Slot::Claimed) => {}
                None => return self.find_sound(id),
            }
            self.check()?;
            let mut failed = self.failed.lock();
            // The limit covers a placing between the look and the wait.
            self.placed.wait_for(&mut failed, Duration::from_millis(5));
        }
    }

    /// Fails once the run has failed.
    pub fn check(&self) -> Result<()> {
        match *self.failed.lock() {
            true => {
                let message = "another part of the run has failed";
                Err(Error::new(ErrorKind::Interrupted, message))
            }
            false => Ok(()),
        }
    }

    /// Wakes everybody who waits: the run has failed.
    pub fn give_up(&self) {
        *self.failed.lock() = true;
        self.placed.notify_all();
    }

    /// Moves stored blocks into the catalog, and their chunks out of this index.
    pub fn store(&self, stored: &[Stored]) -> Result<()> {
        for block in stored {
            self.run.lock().put_block(block)?;
            self.any_stored.store(true, Ordering::Release);
            for chunk in &block.index().chunks {
                self.shard(&chunk.id)?.remove(&chunk.id);
            }
        }
        Ok(())
    }

    /// Runs `append` while not more than the permitted number of workers do.
    pub fn with_permit<T>(&self, append: impl FnOnce() -> T) -> T {
        match &self.write_permits {
            None => append(),
            Some(permits) => permits.with(append),
        }
    }
}

/// A counting semaphore.
struct Permits {
    free: Mutex<usize>,
    freed: Condvar,
}

impl Permits {
    fn new(count: usize) -> Permits {
        Permits { free: Mutex::new(count.max(1)), freed: Condvar::new() }
    }

    fn with<T>(&self, work: impl FnOnce() -> T) -> T {
        let mut free = self.free.lock();
        self.freed.wait_while(&mut free, |free| *free == 0);
        *free -= 1;
        drop(free);
        let result = work();
        *self.free.lock() += 1;
        self.freed.notify_one();
        result
    }
}
