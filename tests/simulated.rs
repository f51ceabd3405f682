//! The writer of blocks over simulated stores: thousands of short lives, each with trouble, a crash
//! and a next run.
//!
//! Invariant: a block that was called stored is there after any crash, whole and in its volume's
//! index; and what a next run takes over is whole too.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use raidtape::chunk::frame::{Compression, Encoder};
use raidtape::chunk::{ChunkRef, HashAlgo};
use raidtape::error::{Error, ErrorKind, Result};
use raidtape::volume::block::encode_record;
use raidtape::volume::{
    Batch, BlockIndex, OpenBlock, Status, Stored, Volume, VolumeConfig, Volumes, Writer,
};

use crate::common::data::Seeded;
use crate::common::faultfs::fault::{EDQUOT, ENOSPC};
use crate::common::number_from_env;
use crate::common::simstore::{Op, SimStore, Trouble};

const EIO: i32 = 5;
const BLOCK_BYTES: u64 = 1 << 20;

/// A block that was called stored: on which volume, at which place of its index, with what.
type Known = (i64, u64, BlockIndex);

/// Each copy of a block.
fn known(it: &Stored) -> impl Iterator<Item = Known> + '_ {
    it.copies().iter().map(|copy| (copy.volume, copy.record_at, it.index().clone()))
}

struct World {
    volumes: Volumes,
    stores: Vec<SimStore>,
    /// The lengths of the indexes that the last barrier gave.
    lens: Vec<u64>,
    /// How far each index holds what was called stored: further, where a volume fell out later.
    synced: Vec<u64>,
    known: Vec<Known>,
    next: u64,
}

impl World {
    fn new(dir: &Path, seeded: &mut Seeded, lies: bool) -> World {
        let count = 1 + seeded.below(3) as usize;
        let stores: Vec<_> = (0..count)
            .map(|_| SimStore::new([1 << 14, 1 << 17, 1 << 30][seeded.below(3) as usize], lies))
            .collect();
        let volumes = stores.iter().enumerate().map(|(number, store)| {
            let path = dir.join(format!("v{number}"));
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join(".rt_volume_index"), "").unwrap();
            let config = VolumeConfig {
                number: number as i64 + 1,
                uuid: number.to_string(),
                path,
                status: Status::Active,
                reserve_percent: 0,
            };
            Volume { config, store: Arc::new(store.clone()) }
        });
        let volumes = Volumes::with_stores(volumes.collect());
        World {
            volumes,
            stores,
            lens: vec![0; count],
            synced: vec![0; count],
            known: Vec::new(),
            next: 1,
        }
    }

    /// One run: appends batches of chunks by the shared block and by blocks of its own, with
    /// barriers in between. Gives how many chunks were called stored.
    fn run(&mut self, batches: &[Batch], seeded: &mut Seeded) -> Result<u64> {
        let lens = self.lens.iter().map(|it| Some(*it)).collect();
        let writer = Writer::new(&self.volumes, HashAlgo::Blake3, BLOCK_BYTES, self.next, lens)
            .with_copies(1 + seeded.below(2) as u8);
        let mut stored = Vec::new();
        let mut own: Option<OpenBlock> = None;
        let mut work = || -> Result<()> {
            for batch in batches {
                match seeded.below(3) {
                    0 => writer.append(&mut own, batch)?,
                    _ => writer.append_shared(batch)?,
                };
                if seeded.below(4) == 0 {
                    writer.close(&mut own)?;
                    stored.extend(writer.barrier(seeded.below(2) == 0)?);
                }
            }
            writer.close(&mut own)?;
            stored.extend(writer.barrier(true)?);
            Ok(())
        };
        let result = work();
        let mut chunks = 0;
        for it in &stored {
            chunks += it.index().chunks.len() as u64;
            self.next = self.next.max(it.block() + 1);
            self.known.extend(known(it));
            let record = encode_record(it.block(), it.index()).len() as u64;
            for copy in it.copies() {
                let synced = &mut self.synced[copy.volume as usize - 1];
                *synced = (*synced).max(copy.record_at + record);
            }
        }
        for (len, new) in self.lens.iter_mut().zip(writer.index_lens()) {
            *len = new.unwrap_or(*len);
        }
        result.map(|()| chunks)
    }

    /// The power fails: of the indexes any part is left that was not synced, perhaps torn.
    fn crash(&self, seeded: &mut Seeded) {
        self.stores.iter().for_each(|it| it.crash(seeded));
        let known = self.lens.iter().zip(&self.synced).map(|(len, synced)| len.max(synced));
        for (volume, known) in self.volumes.present().iter().zip(known) {
            let path = volume.config.path.join(".rt_volume_index");
            let mut bytes = fs::read(&path).unwrap();
            let left = known + seeded.below(bytes.len() as u64 - known + 1);
            bytes.truncate(left as usize);
            if seeded.below(4) == 0 {
                bytes.extend(vec![0; seeded.below(600) as usize]);
            }
            fs::write(path, bytes).unwrap();
        }
    }

    /// What the next run does first: takes over what is there beyond what is known.
    fn adopt(&mut self) -> Result<u64> {
        let mut adopted = 0;
        for (volume, len) in self.volumes.present().iter().zip(&mut self.lens) {
            volume.settle_index(*len)?;
            let mut records = volume.index_from(*len)?;
            loop {
                let at = records.offset();
                let Some(record) = records.next_record()? else { break };
                if let Some(it) = Stored::adopt(volume, self.next, record.index, at)? {
                    adopted += 1;
                    self.next += 1;
                    self.known.extend(known(&it));
                }
            }
            *len = records.offset();
        }
        Ok(adopted)
    }

    /// All that is known is there.
    fn check(&self) -> Result<()> {
        for (number, record_at, index) in &self.known {
            let volume = self.volumes.get(*number).unwrap();
            let mut bytes = vec![0; index.stored_len() as usize];
            volume.store.read_at(&index.id, 0, &mut bytes)?;
            if HashAlgo::Blake3.hash(&bytes) != index.id {
                return Err(Error::corrupt(format!("block {} has other bytes", index.id)));
            }
            if volume.store.len_of(&index.id)? != Some(index.stored_len()) {
                return Err(Error::corrupt(format!("block {} is too long", index.id)));
            }
            if &volume.index_record(*record_at)? != index {
                return Err(Error::corrupt("another record"));
            }
        }
        Ok(())
    }
}

/// Batches of one to three chunks.
fn batches(seeded: &mut Seeded) -> Vec<Batch> {
    let mut encoder = Encoder::new(Compression::None).unwrap();
    let mut one = |_| {
        let mut batch = Batch::default();
        for _ in 0..1 + seeded.below(3) {
            let len = [50, 3_000, 9_000][seeded.below(3) as usize];
            let plain = seeded.noise(len);
            let (frame, bytes) = encoder.encode(&plain).unwrap();
            batch.push(frame, bytes);
            let (id, len) = (HashAlgo::Blake3.hash(&plain), plain.len() as u32);
            batch.chunks.push(ChunkRef { id, len });
        }
        batch
    };
    (0..12).map(&mut one).collect()
}

/// One life; gives what met trouble.
fn live(dir: &Path, seed: u64, lies: bool) -> Result<Vec<Op>> {
    let mut seeded = Seeded::new(seed);
    let mut world = World::new(dir, &mut seeded, lies);
    let wanted = batches(&mut seeded);
    let chunks: u64 = wanted.iter().map(|it| it.chunks.len() as u64).sum();
    let victim = seeded.below(world.stores.len() as u64) as usize;
    let trouble = Trouble {
        at: 1 + seeded.below(45),
        errno: [ENOSPC, EIO, EDQUOT][seeded.below(3) as usize],
        for_ever: seeded.below(2) == 0,
    };
    world.stores[victim].set_trouble(Some(trouble));
    match world.run(&wanted, &mut seeded) {
        // It says that it is done: then nothing is missing.
        Ok(stored) if stored != chunks => {
            return Err(Error::usage(format!("{stored} of {chunks} chunks are called stored")));
        }
        Ok(_) => {}
        Err(e) => assert!(matches!(e.kind(), ErrorKind::NoSpace | ErrorKind::Io), "{e}"),
    }
    let hits = world.stores[victim].hits();
    world.stores[victim].set_trouble(None);
    world.check()?;
    world.crash(&mut seeded);
    world.adopt()?;
    world.check()?;
    // The next run finds its way, if there is room for it.
    match world.run(&wanted, &mut seeded) {
        Err(e) if e.kind() != ErrorKind::NoSpace => return Err(e),
        _ => {}
    }
    world.check()?;
    world.crash(&mut seeded);
    world.check()?;
    // What is read is right, or it is an error.
    for (number, _, index) in &world.known {
        world.stores[*number as usize - 1].set_flips(Some(seeded.next() >> 3));
        let volume = world.volumes.get(*number).unwrap();
        let mut at = 0;
        for frame in &index.frames {
            let mut bytes = vec![0; frame.stored_len as usize];
            volume.store.read_at(&index.id, at, &mut bytes)?;
            if frame.decode(&bytes, &mut Vec::new()).is_ok() {
                return Err(Error::usage("a frame with another bit is read"));
            }
            at += u64::from(frame.stored_len);
        }
    }
    Ok(hits)
}

fn place() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("raidtape-simulated-").tempdir_in(parent).unwrap()
}

#[test]
fn what_is_called_stored_survives_every_trouble_and_crash() {
    let dir = place();
    let from = number_from_env("RAIDTAPE_FAULT_FROM", 0);
    let first = (number_from_env("RAIDTAPE_FAULT_SEED", 1) << 32) + from;
    let count = number_from_env("RAIDTAPE_FAULT_LIVES", 3_000);
    let mut met = std::collections::BTreeMap::new();
    for seed in first..first + count {
        match live(dir.path(), seed, false) {
            Ok(hits) => hits.iter().for_each(|it| *met.entry(format!("{it:?}")).or_insert(0) += 1),
            Err(e) => panic!("life of seed {seed}: {e}"),
        }
    }
    // Every step has had its share of trouble.
    for op in [Op::Begin, Op::Append, Op::Sync, Op::Name, Op::SyncNames] {
        assert!(met.get(&format!("{op:?}")).is_some_and(|it| *it > 20), "{met:?}");
    }
    use std::io::Write;
    let line = format!("lives: {count} from {from}, 0 lost, trouble met: {met:?}");
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[test]
fn a_store_that_does_not_sync_is_noticed() {
    let dir = place();
    let noticed = (0..100).filter(|seed| live(dir.path(), *seed, true).is_err()).count();
    assert!(noticed > 50, "{noticed} of 100");
}
