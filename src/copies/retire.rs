//! `volumes --retire`: a volume is emptied onto others, and then forgotten.
//!
//! It is sealed first. A block leaves it only when a copy elsewhere was read whole and found right;
//! the rows go in one transaction when that holds for all of them. Its files stay as they are.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{GROUP_BLOCKS, GROUP_BYTES, Problems, Store, describe, tables_of};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::sys::{Time, quoted};
use crate::volume::{
    BlockIndex, CopyAt, CopyFault, CopyJob, Status, Volume, VolumeConfig, VolumeManifest, Volumes,
    Writer as BlockWriter, verify_block,
};

/// The key of a volume's manifest that says when it was retired.
pub const RETIRED_KEY: &str = "retired";
/// Blocks taken from the catalog at a time.
const PAGE_BLOCKS: u64 = 1024;

/// What came of it.
#[derive(Debug)]
pub struct Retired {
    /// The volume's own name.
    pub uuid: String,
    /// Its directory.
    pub path: PathBuf,
    /// Blocks it had.
    pub blocks: u64,
    /// Copies that were made elsewhere.
    pub copies: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What could not be done beside that.
    pub problems: Problems,
}

/// What has to be copied before a volume can go.
#[derive(Default)]
struct Needed {
    blocks: u64,
    bytes: u64,
}

struct Work<'a> {
    store: &'a mut Store,
    volumes: &'a Volumes,
    blocks: &'a BlockWriter<'a>,
    config: &'a VolumeConfig,
    progress: &'a Progress,
    done: Retired,
}

/// Empties a volume onto the others and forgets it. `word` is its id or its path.
pub fn retire(catalog: &Path, word: &Path, progress: &Progress) -> Result<Retired> {
    progress.set_phase("preparing");
    let (mut store, volumes) = Store::open(catalog)?;
    let config = store.reader.find_volume(word)?;
    let blocks = BlockWriter::new(
        &volumes,
        store.settings.hash,
        store.settings.block_bytes,
        store.writer.next_block()?,
        store.index_lens.clone(),
    );
    check_room(&store, &volumes, &config)?;
    // From here on it takes nothing, also if this ends before its end.
    store.writer.set_volume_status(config.number, Status::Sealed)?;
    if let Some(volume) = volumes.get(config.number) {
        volume.set_status(Status::Sealed)?;
    }
    let mut problems = Problems::default();
    for problem in std::mem::take(&mut store.problems) {
        problems.add(problem);
    }
    let done = Retired {
        uuid: config.uuid.clone(),
        path: config.path.clone(),
        blocks: 0,
        copies: 0,
        bytes: 0,
        problems,
    };
    let (number, there) = (config.number, volumes.get(config.number));
    let mut work = Work {
        store: &mut store,
        volumes: &volumes,
        blocks: &blocks,
        config: &config,
        progress,
        done,
    };
    let result = work.empty();
    let Work { mut done, .. } = work;
    store.seal(&volumes, &blocks);
    result?;
    store.writer.forget_volume(number)?;
    store.health.forget_volume(&config.uuid);
    if let Some(volume) = there
        && let Err(e) = say_retired(volume)
    {
        done.problems.note(progress, volume.config.path.as_os_str().as_bytes(), &e);
    }
    drop(blocks);
    drop(store);
    // Manifests that only it had.
    describe(catalog, &mut done.problems, progress)?;
    progress.set_phase("done");
    Ok(done)
}

fn say_retired(volume: &Volume) -> Result<()> {
    let mut manifest = VolumeManifest::read(&volume.config.path)?;
    manifest.status = Status::Sealed;
    manifest.other.retain(|it| it.0 != RETIRED_KEY);
    let now = jiff::Timestamp::from_second(Time::now().secs);
    let now = now.map_err(|e| Error::with_source(ErrorKind::Io, "telling the time", e))?;
    manifest.other.push((RETIRED_KEY.to_owned(), now.to_string()));
    manifest.write(&volume.config.path)
}

/// The copies of a block on other volumes, and how many more it needs without this one.
fn others(
    store: &Store,
    volumes: &Volumes,
    config: &VolumeConfig,
    copies: &[CopyAt],
) -> (Vec<i64>, usize) {
    let others = copies.iter().map(|it| it.volume).filter(|it| *it != config.number);
    let others: Vec<i64> = others.collect();
    let wanted = usize::from(store.settings.copies);
    let is_here = others.iter().any(|it| volumes.get(*it).is_some());
    // What is only on volumes that are away is on none that anybody can look at.
    let missing = wanted.saturating_sub(others.len()).max(usize::from(!is_here));
    (others, missing)
}

/// Whether the other volumes can take what this one has.
fn check_room(store: &Store, volumes: &Volumes, config: &VolumeConfig) -> Result<()> {
    let is_target =
        |it: &&Volume| it.config.number != config.number && it.config.status == Status::Active;
    let mut needed = Needed::default();
    let mut after = 0;
    loop {
        let page = store.reader.copies_on(config.number, after, PAGE_BLOCKS)?;
        let Some(last) = page.last() else { break };
        after = last.block;
        for due in page {
            let copies = store.reader.copies_of(due.block)?;
            let (others, missing) = others(store, volumes, config, &copies);
            let row = store.reader.block(due.block)?;
            if others.iter().all(|it| volumes.get(*it).is_none())
                && volumes.get(config.number).is_none()
            {
                return Err(volumes
                    .why_none(&row.volumes, &row.id)
                    .context("what is on it cannot be copied"));
            }
            let free = volumes.present().iter().filter(is_target);
            let free = free.filter(|it| !others.contains(&it.config.number)).count();
            if free < missing {
                let have = others.len() + free;
                let message = format!(
                    "without volume {} there is only room for {have} of {} copies of block {}: \
                     add a volume with add-volume, or ask for fewer with set-copies",
                    quoted(&config.path),
                    store.settings.copies,
                    row.id
                );
                return Err(Error::new(ErrorKind::NoSpace, message));
            }
            if missing > 0 {
                needed.blocks += 1;
                needed.bytes += row.stored_len * missing as u64;
            }
        }
    }
    // Two volumes of one disk have its room together, not each.
    let mut disks: Vec<(Option<u64>, u64)> = Vec::new();
    for volume in volumes.present().iter().filter(is_target) {
        let (device, room) = (volume.device(), volume.room()?);
        match disks.iter_mut().find(|it| it.0.is_some() && it.0 == device) {
            Some(disk) => disk.1 = disk.1.max(room),
            None => disks.push((device, room)),
        }
    }
    let room: u64 = disks.iter().map(|it| it.1).sum();
    if needed.bytes > room {
        let message = format!(
            "{} blocks have to be copied first: that takes {} bytes, and the other volumes have \
             room for {room}; add one with add-volume",
            needed.blocks, needed.bytes
        );
        return Err(Error::new(ErrorKind::NoSpace, message));
    }
    Ok(())
}

impl Work<'_> {
    fn empty(&mut self) -> Result<()> {
        let totals = self.store.reader.stored_bytes_of(self.config.number)?;
        Progress::add(&self.progress.entries_total, totals.blocks);
        Progress::add(&self.progress.bytes_total, totals.stored_bytes);
        self.progress.set_phase("copying");
        let mut after = 0;
        loop {
            let page = self.store.reader.copies_on(self.config.number, after, PAGE_BLOCKS)?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.block;
            let (mut group, mut bytes) = (Vec::new(), 0);
            for due in page {
                let len = self.store.reader.block(due.block)?.stored_len;
                if group.len() >= GROUP_BLOCKS || bytes + len > GROUP_BYTES {
                    self.move_group(&std::mem::take(&mut group))?;
                    bytes = 0;
                }
                bytes += len;
                group.push(due.block);
            }
            self.move_group(&group)?;
        }
    }

    /// Sees to it that each block of a group is elsewhere, whole and as often as it should be.
    fn move_group(&mut self, group: &[u64]) -> Result<()> {
        let hash = self.store.settings.hash;
        let mut tables: Vec<(u64, BlockIndex, Vec<i64>, usize)> = Vec::new();
        for block in group {
            self.progress.check()?;
            self.done.blocks += 1;
            Progress::add(&self.progress.entries, 1);
            let copies = self.store.reader.copies_of(*block)?;
            let (others, missing) = others(self.store, self.volumes, self.config, &copies);
            let index = tables_of(&self.store.reader, self.volumes, hash, *block, &copies)?;
            if missing == 0 {
                self.find_good(&index, &others)?;
                continue;
            }
            tables.push((*block, index, others, missing));
        }
        let own = self.config.number;
        let jobs = tables.iter().map(|(block, index, others, missing)| {
            // Its own copy last: what stays is looked at while it is copied.
            let sources = others.iter().chain([&own]).copied();
            CopyJob {
                block: *block,
                index,
                sources: sources.filter(|it| self.volumes.get(*it).is_some()).collect(),
                taken: others.iter().chain([&own]).copied().collect(),
                missing: *missing,
                made: Vec::new(),
                bad: Vec::new(),
            }
        });
        let mut jobs: Vec<CopyJob<'_>> = jobs.collect();
        self.store.copy(self.volumes, self.blocks, &mut jobs, self.progress)?;
        for job in jobs {
            self.done.copies += job.made.len() as u64;
            self.done.bytes += job.made.len() as u64 * job.index.stored_len();
            if job.sources.is_empty() {
                let bad = job.bad.into_iter().next();
                let error = bad.map(|it| it.1).unwrap_or_else(|| Error::corrupt("no copy"));
                return Err(error.context("nothing was retired: run validate --repair first"));
            }
            if job.missing > 0 {
                let lacking = self.blocks.take_lacking();
                let mut failed = lacking.failed.into_iter();
                let full = || {
                    let message = "the other volumes are full: add one with add-volume, and run \
                                   this again";
                    Error::new(ErrorKind::NoSpace, message)
                };
                // A volume of which the index could not be read takes nothing either.
                let met = self.done.problems.list.first();
                let met = met.map(|it| Error::new(it.kind, it.to_string()));
                return Err(failed.next().map(|it| it.1).or(met).unwrap_or_else(full));
            }
        }
        Ok(())
    }

    /// Reads copies of a block whole until one is right.
    fn find_good(&self, index: &BlockIndex, others: &[i64]) -> Result<()> {
        let mut first = None;
        for volume in others.iter().filter_map(|it| self.volumes.get(*it)) {
            let count = |bytes| super::count(self.progress, bytes);
            match verify_block(volume, index, self.store.settings.hash, &count) {
                Ok(()) => return Ok(()),
                Err(CopyFault::Stopped(e)) => return Err(e),
                Err(CopyFault::Source(e) | CopyFault::Target(e)) => {
                    let (health, number) = (&self.store.health, volume.config.number);
                    super::note_bad(health, self.volumes, number, &index.id, &e);
                    first.get_or_insert(e);
                }
            }
        }
        let error = first.unwrap_or_else(|| Error::corrupt("no copy"));
        let what =
            "the copy that would stay is damaged, nothing was retired: run validate --repair";
        Err(error.context(what))
    }
}
