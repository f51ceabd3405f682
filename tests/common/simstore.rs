//! A block store in memory that fails and loses power at a moment of the test's choice.
//!
//! Invariant: it keeps the promise of a store and no more. Blocks that `publish` has returned for
//! are durable, whole; of those that it was at, a crash leaves any part of their names, whole; of
//! pending blocks it leaves nothing. `lies` breaks the promise, to show that a test would notice.

use std::any::Any;
use std::collections::BTreeMap;
use std::io::Error as IoError;
use std::sync::{Arc, Mutex};

use raidtape::error::{Error, Result};
use raidtape::sys::Space;
use raidtape::volume::BlockId;
use raidtape::volume::store::{BlockStore, PendingBlock};

use super::data::Seeded;

/// What a store is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Begin,
    Append,
    Sync,
    Name,
    SyncNames,
    Read,
    Space,
}

/// What goes wrong: from which operation on, counted from 1, with which error, and how often.
#[derive(Clone, Copy, Debug)]
pub struct Trouble {
    pub at: u64,
    pub errno: i32,
    pub for_ever: bool,
}

#[derive(Default)]
struct State {
    ops: u64,
    hits: Vec<Op>,
    trouble: Option<Trouble>,
    /// What can be read, and what a crash leaves for sure.
    seen: BTreeMap<BlockId, Arc<Vec<u8>>>,
    durable: BTreeMap<BlockId, Arc<Vec<u8>>>,
    free: u64,
    lies: bool,
    /// The next reads find a bit that is another.
    flips: Option<u64>,
}

impl State {
    fn ask(&mut self, op: Op) -> Result<()> {
        self.ops += 1;
        let ops = self.ops;
        let due = |it: &&Trouble| it.at == ops || it.for_ever && it.at < ops;
        let Some(trouble) = self.trouble.as_ref().filter(due) else { return Ok(()) };
        // Only what takes room meets a full disk.
        let takes_room = matches!(op, Op::Begin | Op::Append | Op::Name);
        if trouble.errno == super::faultfs::fault::ENOSPC && !takes_room || op == Op::Space {
            return Ok(());
        }
        self.hits.push(op);
        Err(Error::io(format!("{op:?}"), IoError::from_raw_os_error(trouble.errno)))
    }
}

/// The store. A copy is the same one.
#[derive(Clone)]
pub struct SimStore(Arc<Mutex<State>>);

struct Pending {
    store: SimStore,
    bytes: Vec<u8>,
}

impl SimStore {
    /// A store with so many bytes of room.
    pub fn new(free: u64, lies: bool) -> SimStore {
        SimStore(Arc::new(Mutex::new(State { free, lies, ..State::default() })))
    }

    pub fn set_trouble(&self, trouble: Option<Trouble>) {
        self.0.lock().unwrap().trouble = trouble;
    }

    /// What has met trouble.
    pub fn hits(&self) -> Vec<Op> {
        self.0.lock().unwrap().hits.clone()
    }

    pub fn set_flips(&self, bit: Option<u64>) {
        self.0.lock().unwrap().flips = bit;
    }

    /// The power fails: of what is not durable, the seed decides.
    pub fn crash(&self, seeded: &mut Seeded) {
        let mut state = self.0.lock().unwrap();
        let mut left = state.durable.clone();
        for (id, bytes) in &state.seen {
            if left.contains_key(id) || seeded.below(2) == 0 {
                continue;
            }
            let mut bytes = bytes.clone();
            if state.lies {
                // The name is there before the bytes are.
                let len = seeded.below(bytes.len() as u64 + 1) as usize;
                Arc::make_mut(&mut bytes).truncate(len / 512 * 512);
            }
            left.insert(*id, bytes);
        }
        (state.seen, state.durable, state.trouble) = (left.clone(), left, None);
    }
}

impl PendingBlock for Pending {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let mut state = self.store.0.lock().unwrap();
        state.ask(Op::Append)?;
        if state.free < bytes.len() as u64 {
            let full = IoError::from_raw_os_error(super::faultfs::fault::ENOSPC);
            return Err(Error::io("append", full));
        }
        state.free -= bytes.len() as u64;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}

impl BlockStore for SimStore {
    fn begin(&self) -> Result<Box<dyn PendingBlock>> {
        self.0.lock().unwrap().ask(Op::Begin)?;
        Ok(Box::new(Pending { store: self.clone(), bytes: Vec::new() }))
    }

    fn publish(&self, mut blocks: Vec<(Box<dyn PendingBlock>, BlockId)>) -> Result<()> {
        let mut state = self.0.lock().unwrap();
        let mut named = Vec::new();
        for (block, id) in &mut blocks {
            let pending = block.as_any().downcast_mut::<Pending>().expect("a block of this kind");
            state.ask(Op::Sync)?;
            state.ask(Op::Name)?;
            let bytes = Arc::new(std::mem::take(&mut pending.bytes));
            state.seen.insert(*id, bytes.clone());
            named.push((*id, bytes));
        }
        state.ask(Op::SyncNames)?;
        if !state.lies {
            state.durable.extend(named);
        }
        Ok(())
    }

    fn read_at(&self, id: &BlockId, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut state = self.0.lock().unwrap();
        state.ask(Op::Read)?;
        let bytes = state.seen.get(id).ok_or_else(|| Error::corrupt("it is missing"))?;
        let range = offset as usize..offset as usize + buf.len();
        buf.copy_from_slice(bytes.get(range).ok_or_else(|| Error::corrupt("too short"))?);
        if let Some(bit) = state.flips
            && !buf.is_empty()
        {
            let at = (bit / 8) as usize % buf.len();
            buf[at] ^= 1 << (bit % 8);
        }
        Ok(())
    }

    fn len_of(&self, id: &BlockId) -> Result<Option<u64>> {
        Ok(self.0.lock().unwrap().seen.get(id).map(|it| it.len() as u64))
    }

    fn list(&self, each: &mut dyn FnMut(BlockId, u64)) -> Result<()> {
        let seen = self.0.lock().unwrap().seen.clone();
        seen.iter().for_each(|(id, bytes)| each(*id, bytes.len() as u64));
        Ok(())
    }

    fn remove(&self, id: &BlockId) -> Result<()> {
        self.0.lock().unwrap().seen.remove(id);
        Ok(())
    }

    fn space(&self) -> Result<Space> {
        let mut state = self.0.lock().unwrap();
        state.ask(Op::Space)?;
        // What a volume leaves free in any case is none of this store's business.
        let free_bytes = state.free + (16 << 20);
        Ok(Space { total_bytes: 1 << 30, free_bytes, ..Space::default() })
    }

    fn make_last(&self, id: &BlockId) -> Result<()> {
        let mut state = self.0.lock().unwrap();
        state.ask(Op::Sync)?;
        state.ask(Op::SyncNames)?;
        let bytes = state.seen.get(id).ok_or_else(|| Error::corrupt("it is missing"))?.clone();
        if !state.lies {
            state.durable.insert(*id, bytes);
        }
        Ok(())
    }
}
