//! Further copies of blocks: read from a copy that is there, checked on the way, and written to
//! volumes that have none.
//!
//! A copy counts when all of the block's bytes have had the hash that is its name, its file and its
//! record are durable. A volume that is full, or fails, costs copies that it would have had, never
//! the ones that exist: what lacks is counted, and what failed is told.

use std::collections::BTreeMap;

use super::block::BlockIndex;
use super::store::PendingBlock;
use super::{CopyAt, Stored, Volume, Writer};
use crate::chunk::HashAlgo;
use crate::error::{Error, ErrorKind, Result};

/// Bytes read and written at a time.
const PIECE_BYTES: u64 = 1 << 20;

/// What a writer could not do of the copies that were wanted.
#[derive(Default)]
pub struct Lacking {
    /// Blocks that have fewer copies than wanted, because no other volume has room.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Volumes that failed while they were written, with what happened.
    pub failed: Vec<(std::path::PathBuf, Error)>,
}

/// A block that needs further copies, and what came of it.
pub struct CopyJob<'a> {
    /// The block's number.
    pub block: u64,
    /// What is inside.
    pub index: &'a BlockIndex,
    /// Volumes that have it, in the order in which they are asked.
    pub sources: Vec<i64>,
    /// Volumes that take no copy of it.
    pub taken: Vec<i64>,
    /// How many further copies it needs.
    pub missing: usize,
    /// The copies that were made; they are durable.
    pub made: Vec<CopyAt>,
    /// Copies that were found bad.
    pub bad: Vec<(i64, Error)>,
}

/// Why a copy was not made.
pub enum CopyFault {
    /// The copy that was read is not as it was written, or cannot be read.
    Source(Error),
    /// It could not be written.
    Target(Error),
    /// The work is to stop.
    Stopped(Error),
}

/// Writes what to do between the publishing of blocks on a volume and their records.
pub type Describe<'a> = &'a mut dyn FnMut(&Volume, &[&BlockIndex]) -> Result<()>;

/// Told of bytes that were read; what it fails with ends the work.
pub type Each<'a> = &'a (dyn Fn(u64) -> Result<()> + Sync);

/// Copies a block from one volume to another, up to its publishing.
pub fn copy_block(
    from: &Volume,
    to: &Volume,
    index: &BlockIndex,
    hash: HashAlgo,
    each: Each<'_>,
) -> std::result::Result<Box<dyn PendingBlock>, CopyFault> {
    let mut pending = to.store.begin().map_err(CopyFault::Target)?;
    read_block(from, index, hash, each, &mut |piece| pending.append(piece))?;
    Ok(pending)
}

/// Reads a copy of a block whole, and fails if it is not as it was written.
pub fn verify_block(
    volume: &Volume,
    index: &BlockIndex,
    hash: HashAlgo,
    each: Each<'_>,
) -> std::result::Result<(), CopyFault> {
    read_block(volume, index, hash, each, &mut |_| Ok(()))
}

fn read_block(
    from: &Volume,
    index: &BlockIndex,
    hash: HashAlgo,
    each: Each<'_>,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> std::result::Result<(), CopyFault> {
    let len = index.stored_len();
    // What the machine lacks is no fault of the copy.
    let fault = |e: Error| match e.is_shortage() {
        true => CopyFault::Stopped(e),
        false => CopyFault::Source(e),
    };
    let found = from.store.len_of(&index.id).map_err(fault)?;
    if found != Some(len) {
        let message = match found {
            Some(found) => format!("block {} is {found} bytes long instead of {len}", index.id),
            None => format!("block {} is missing", index.id),
        };
        return Err(CopyFault::Source(Error::corrupt(message)));
    }
    let mut hasher = hash.hasher();
    let mut buffer = vec![0; usize::try_from(PIECE_BYTES.min(len)).unwrap_or_default()];
    let mut at = 0;
    while at < len {
        let piece = usize::try_from(PIECE_BYTES.min(len - at)).unwrap_or_default();
        each(piece as u64).map_err(CopyFault::Stopped)?;
        let piece = buffer.get_mut(..piece).unwrap_or_default();
        from.store.read_at(&index.id, at, piece).map_err(fault)?;
        hasher.update(piece);
        take(piece).map_err(CopyFault::Target)?;
        at += piece.len() as u64;
    }
    let found = hasher.finish();
    if found != index.id {
        let message = format!("the bytes of block {} have the hash {found}", index.id);
        return Err(CopyFault::Source(Error::corrupt(message)));
    }
    Ok(())
}

/// A copy that is written and waits for its name.
struct Copied {
    job: usize,
    pending: Box<dyn PendingBlock>,
}

/// What came of trying to copy one block.
type Tried = (usize, i64, std::result::Result<Box<dyn PendingBlock>, CopyFault>);

impl Writer<'_> {
    /// Gives blocks that were just stored their further copies.
    pub(super) fn copy_stored(&self, stored: &mut [Stored]) -> Result<()> {
        let jobs = stored.iter().map(|it| {
            let have: Vec<i64> = it.copies.iter().map(|copy| copy.volume).collect();
            CopyJob {
                block: it.block,
                index: &it.index,
                sources: have.clone(),
                taken: have,
                missing: self.copies.saturating_sub(it.copies.len()),
                made: Vec::new(),
                bad: Vec::new(),
            }
        });
        let mut jobs: Vec<CopyJob<'_>> = jobs.collect();
        self.copy(&mut jobs, &|_| Ok(()), &mut |_, _| Ok(()))?;
        let mut made = Vec::with_capacity(jobs.len());
        for job in jobs {
            if let Some((_, e)) = job.bad.into_iter().next() {
                // What was written a moment ago does not come back as it was: no ground for a run.
                return Err(e);
            }
            made.push(job.made);
        }
        for (it, made) in stored.iter_mut().zip(made) {
            it.copies.extend(made);
        }
        Ok(())
    }

    /// Makes the copies that blocks need, as far as there are volumes with room. On return those
    /// that were made are durable. `describe` may write what belongs beside them before their
    /// records.
    pub fn copy(
        &self,
        jobs: &mut [CopyJob<'_>],
        each: Each<'_>,
        describe: Describe<'_>,
    ) -> Result<()> {
        loop {
            // By source and target: two disks that copy to each other do so at the same time, and
            // none is read at two places.
            let mut ways: BTreeMap<(i64, usize), Vec<usize>> = BTreeMap::new();
            let mut planned = vec![0; self.volumes.present().len()];
            for (number, job) in jobs.iter().enumerate().filter(|it| it.1.missing > 0) {
                let Some(source) = job.sources.iter().find(|it| self.volumes.get(**it).is_some())
                else {
                    continue;
                };
                let len = job.index.stored_len();
                if let Some(target) = self.place_for_copy(&job.taken, len, &mut planned)? {
                    ways.entry((*source, target)).or_default().push(number);
                }
            }
            if ways.is_empty() {
                break;
            }
            self.copy_once(jobs, &ways, each, describe)?;
        }
        let mut lacking = self.lacking.lock();
        for job in jobs.iter().filter(|it| it.missing > 0 && !it.sources.is_empty()) {
            lacking.blocks += 1;
            lacking.bytes += job.index.stored_len();
        }
        Ok(())
    }

    fn copy_once(
        &self,
        jobs: &mut [CopyJob<'_>],
        ways: &BTreeMap<(i64, usize), Vec<usize>>,
        each: Each<'_>,
        describe: Describe<'_>,
    ) -> Result<()> {
        let seen: &[CopyJob<'_>] = jobs;
        let tried = std::thread::scope(|scope| {
            let threads: Vec<_> = ways
                .iter()
                .map(|((source, target), numbers)| {
                    scope.spawn(move || self.copy_way(seen, *source, *target, numbers, each))
                })
                .collect();
            let ended = threads.into_iter().zip(ways).map(|(thread, (way, _))| {
                let panicked = |_| Error::new(ErrorKind::Io, "a thread that copies has panicked");
                Ok((way.1, thread.join().map_err(panicked)?))
            });
            ended.collect::<Result<Vec<(usize, Vec<Tried>)>>>()
        })?;
        let mut by_target: BTreeMap<usize, Vec<Copied>> = BTreeMap::new();
        for (target, tried) in tried {
            for (number, source, result) in tried {
                let Some(job) = jobs.get_mut(number) else { continue };
                match result {
                    Ok(pending) => {
                        by_target.entry(target).or_default().push(Copied { job: number, pending });
                    }
                    Err(CopyFault::Stopped(e)) => return Err(e),
                    Err(CopyFault::Source(e)) => {
                        job.sources.retain(|it| *it != source);
                        job.bad.push((source, e));
                    }
                    Err(CopyFault::Target(e)) => self.give_up(target, e)?,
                }
            }
        }
        self.publish_copies(jobs, by_target, describe)
    }

    /// Copies blocks one after another from one volume to another; ends at the first that cannot be
    /// written.
    fn copy_way(
        &self,
        jobs: &[CopyJob<'_>],
        source: i64,
        target: usize,
        numbers: &[usize],
        each: Each<'_>,
    ) -> Vec<Tried> {
        let mut tried = Vec::new();
        let (Some(from), Some(to)) = (self.volumes.get(source), self.volumes.present().get(target))
        else {
            return tried;
        };
        for number in numbers {
            let Some(job) = jobs.get(*number) else { continue };
            let result = copy_block(from, to, job.index, self.hash, each);
            let goes_on = matches!(result, Ok(_) | Err(CopyFault::Source(_)));
            tried.push((*number, source, result));
            if !goes_on {
                break;
            }
        }
        tried
    }

    fn publish_copies(
        &self,
        jobs: &mut [CopyJob<'_>],
        by_target: BTreeMap<usize, Vec<Copied>>,
        describe: Describe<'_>,
    ) -> Result<()> {
        let present = self.volumes.present();
        let mut todo = Vec::new();
        for (target, copied) in by_target {
            let numbers: Vec<usize> = copied.iter().map(|it| it.job).collect();
            let blocks: Vec<_> = copied
                .into_iter()
                .filter_map(|it| Some((it.pending, jobs.get(it.job)?.index.id)))
                .collect();
            todo.push((target, numbers, blocks));
        }
        let published = std::thread::scope(|scope| {
            let threads: Vec<_> = todo
                .into_iter()
                .map(|(target, numbers, blocks)| {
                    let publish = move || match present.get(target) {
                        Some(volume) => volume.store.publish(blocks),
                        None => Err(Error::usage("a volume that this writer does not know")),
                    };
                    (target, numbers, scope.spawn(publish))
                })
                .collect();
            let ended = threads.into_iter().map(|(target, numbers, thread)| {
                let panicked =
                    |_| Err(Error::new(ErrorKind::Io, "a thread that publishes has panicked"));
                (target, numbers, thread.join().unwrap_or_else(panicked))
            });
            ended.collect::<Vec<(usize, Vec<usize>, Result<()>)>>()
        });
        for (target, numbers, result) in published {
            let Some(volume) = present.get(target) else { continue };
            let here = || numbers.iter().filter_map(|it| jobs.get(*it));
            let indexes: Vec<&BlockIndex> = here().map(|it| it.index).collect();
            let records: Vec<_> = here().map(|it| (it.block, it.index)).collect();
            let result = result
                .and_then(|()| describe(volume, &indexes))
                .and_then(|()| self.append_records(target, &records));
            match result {
                Ok(places) => {
                    for (number, at) in numbers.iter().zip(places) {
                        let Some(job) = jobs.get_mut(*number) else { continue };
                        job.made.push(at);
                        job.taken.push(at.volume);
                        job.missing -= 1;
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => return Err(e),
                Err(e) => self.give_up(target, e)?,
            }
        }
        Ok(())
    }

    /// A volume that cannot be written takes nothing more: a full one is sealed, of any other it is
    /// told what happened.
    fn give_up(&self, at: usize, error: Error) -> Result<()> {
        if error.kind() == ErrorKind::NoSpace {
            return self.mark_full(at);
        }
        let Some(volume) = self.volumes.present().get(at) else { return Err(error) };
        log::error!("{error}: {} takes no more copies", volume.config.uuid);
        if let Some(full) = self.full.lock().get_mut(at) {
            *full = true;
        }
        // What its index holds is not certain: the next writer looks.
        if let Some(len) = self.index_len.lock().get_mut(at) {
            *len = None;
        }
        self.lacking.lock().failed.push((volume.config.path.clone(), error));
        Ok(())
    }

    /// The volume on which a block of `len` bytes gets a further copy: none of `taken`, and one of
    /// another disk than those if there is any. `planned` is what they are to get already, in
    /// bytes. `None` if none has room.
    fn place_for_copy(
        &self,
        taken: &[i64],
        len: u64,
        planned: &mut [u64],
    ) -> Result<Option<usize>> {
        let present = self.volumes.present();
        let devices: Vec<Option<u64>> =
            taken.iter().filter_map(|it| self.volumes.get(*it)).map(Volume::device).collect();
        let mut second_best = None;
        for (at, volume) in present.iter().enumerate() {
            let is_full = self.full.lock().get(at).copied().unwrap_or(true);
            if is_full || taken.contains(&volume.config.number) {
                continue;
            }
            let Some(planned) = planned.get(at) else { continue };
            let room = match volume.room() {
                Ok(room) => room,
                Err(e) => {
                    self.give_up(at, e)?;
                    continue;
                }
            };
            if room <= *planned + len {
                if room <= len {
                    self.mark_full(at)?;
                }
                continue;
            }
            let device = volume.device();
            if device.is_none() || !devices.contains(&device) {
                second_best = Some(at);
                break;
            }
            second_best = second_best.or(Some(at));
        }
        if let Some(planned) = second_best.and_then(|at| planned.get_mut(at)) {
            *planned += len;
        }
        Ok(second_best)
    }

    /// Appends the record of a block that is durable on a volume; gives where it is.
    pub fn add_record(&self, volume: i64, block: u64, index: &BlockIndex) -> Result<CopyAt> {
        let at = self.volumes.present().iter().position(|it| it.config.number == volume);
        let places = at.map(|at| self.append_records(at, &[(block, index)])).transpose()?;
        let unknown = || Error::usage("a volume that this writer does not know");
        places.and_then(|it| it.first().copied()).ok_or_else(unknown)
    }

    /// What could not be done since this was asked last.
    pub fn take_lacking(&self) -> Lacking {
        std::mem::take(&mut self.lacking.lock())
    }
}
