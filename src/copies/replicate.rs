//! `replicate`: every block on as many volumes as the catalog asks for.
//!
//! In groups: copies are written, synced and named, their metas and records follow, and then their
//! rows. A kill leaves groups that are done, and copies that the next writer takes over.

use std::path::{Path, PathBuf};

use super::{GROUP_BLOCKS, GROUP_BYTES, Problems, Store, describe, tables_of};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::volume::{BlockIndex, CopyAt, CopyJob, Volumes, Writer as BlockWriter};

/// Blocks taken from the catalog at a time.
const PAGE_BLOCKS: u64 = 1024;

/// What came of it.
#[derive(Debug, Default)]
pub struct Replicated {
    /// On how many volumes each block is to be.
    pub wanted: u8,
    /// Copies that were made.
    pub copies: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blocks that still are on fewer volumes, because no other has room.
    pub blocks_lacking: u64,
    /// Their bytes.
    pub bytes_lacking: u64,
    /// Volumes on one file system.
    pub together: Vec<Vec<PathBuf>>,
    /// What could not be done, each named.
    pub problems: Problems,
}

impl Replicated {
    /// What came of it, in a line.
    pub fn line(&self) -> String {
        let mut line = match (self.copies, self.blocks_lacking) {
            (0, 0) if self.problems.count == 0 => {
                format!("every block is on {} volumes", self.wanted)
            }
            _ => format!("made {} copies, {} bytes", self.copies, self.bytes),
        };
        if self.blocks_lacking > 0 {
            line.push_str(&format!(
                "; {} blocks ({} bytes) are on fewer than {} volumes",
                self.blocks_lacking, self.bytes_lacking, self.wanted
            ));
            if self.failure().is_none() {
                line.push_str(", and no other has room: add one with add-volume");
            }
        }
        if self.problems.count > 0 {
            line.push_str(&format!("; {} problems", self.problems.count));
        }
        line
    }

    /// The kind of error that says most about what was not done; `None` when all was.
    pub fn worst(&self) -> Option<ErrorKind> {
        let has = |kind| self.problems.list.iter().any(|it| it.kind == kind);
        let kinds = [ErrorKind::Corrupt, ErrorKind::Offline];
        let found = kinds.into_iter().find(|it| has(*it));
        let lacks = (self.blocks_lacking > 0).then_some(ErrorKind::NoSpace);
        found.or(self.failure()).or(lacks).or(self.problems.list.first().map(|it| it.kind))
    }

    /// What went wrong other than that there was no room.
    fn failure(&self) -> Option<ErrorKind> {
        let mut kinds = self.problems.list.iter().map(|it| it.kind);
        kinds.find(|it| *it != ErrorKind::NoSpace)
    }
}

/// Copies every block to as many volumes as the catalog asks for.
pub fn replicate(catalog: &Path, progress: &Progress) -> Result<Replicated> {
    progress.set_phase("preparing");
    let (mut store, volumes) = Store::open(catalog)?;
    let result = replicate_in(&mut store, &volumes, progress);
    drop(store);
    let mut done = result?;
    if done.copies > 0 {
        // A volume that was added later has no manifests of the runs before.
        describe(catalog, &mut done.problems, progress)?;
    }
    progress.set_phase("done");
    Ok(done)
}

fn replicate_in(store: &mut Store, volumes: &Volumes, progress: &Progress) -> Result<Replicated> {
    let wanted = store.settings.copies;
    let mut done = Replicated { wanted, together: volumes.on_one_device(), ..Default::default() };
    std::mem::take(&mut store.problems).into_iter().for_each(|it| done.problems.add(it));
    let blocks = BlockWriter::new(
        volumes,
        store.settings.hash,
        store.settings.block_bytes,
        store.writer.next_block()?,
        store.index_lens.clone(),
    );
    let (count, bytes) = store.reader.lacking(wanted)?;
    Progress::add(&progress.entries_total, count);
    Progress::add(&progress.bytes_total, bytes);
    progress.set_phase("copying");
    let mut after = 0;
    let result = loop {
        let mut page = store.reader.blocks_lacking(wanted, after, PAGE_BLOCKS)?;
        let Some(last) = page.last() else { break Ok(()) };
        after = last.0;
        let mut result = Ok(());
        while !page.is_empty() && result.is_ok() {
            let group = take_group(&mut page);
            result = copy_group(store, volumes, &blocks, &group, &mut done, progress);
        }
        if result.is_err() {
            break result;
        }
    };
    store.seal(volumes, &blocks);
    let lacking = blocks.take_lacking();
    (done.blocks_lacking, done.bytes_lacking) = (lacking.blocks, lacking.bytes);
    for (path, error) in lacking.failed {
        done.problems.note_volume(progress, &path, error);
    }
    result.map(|()| done)
}

/// The first blocks of a page, as many as are made durable together.
fn take_group(page: &mut Vec<(u64, u64)>) -> Vec<u64> {
    let mut bytes = 0;
    let count = page.iter().take(GROUP_BLOCKS).take_while(|it| {
        let fits = bytes == 0 || bytes + it.1 <= GROUP_BYTES;
        bytes += it.1;
        fits
    });
    let count = count.count();
    page.drain(..count).map(|it| it.0).collect()
}

fn copy_group(
    store: &mut Store,
    volumes: &Volumes,
    blocks: &BlockWriter<'_>,
    group: &[u64],
    done: &mut Replicated,
    progress: &Progress,
) -> Result<()> {
    progress.check()?;
    let mut tables: Vec<(u64, BlockIndex, Vec<CopyAt>)> = Vec::new();
    for block in group {
        let copies = store.reader.copies_of(*block)?;
        let numbers: Vec<i64> = copies.iter().map(|it| it.volume).collect();
        let id = store.reader.block(*block)?.id;
        let found = match volumes.first_present(&numbers) {
            Some(_) => tables_of(&store.reader, volumes, store.settings.hash, *block, &copies),
            None => Err(volumes.why_none(&numbers, &id)),
        };
        match found {
            Ok(index) => tables.push((*block, index, copies)),
            Err(e) => done.problems.note(progress, format!("block {id}").as_bytes(), &e),
        }
    }
    let wanted = usize::from(done.wanted);
    let jobs = tables.iter().map(|(block, index, copies)| {
        let taken: Vec<i64> = copies.iter().map(|it| it.volume).collect();
        CopyJob {
            block: *block,
            index,
            sources: taken.iter().copied().filter(|it| volumes.get(*it).is_some()).collect(),
            missing: wanted.saturating_sub(taken.len()),
            taken,
            made: Vec::new(),
            bad: Vec::new(),
        }
    });
    let mut jobs: Vec<CopyJob<'_>> = jobs.collect();
    let result = store.copy(volumes, blocks, &mut jobs, progress);
    for job in jobs {
        Progress::add(&progress.entries, 1);
        done.copies += job.made.len() as u64;
        done.bytes += job.made.len() as u64 * job.index.stored_len();
        let is_lost = job.sources.is_empty();
        for (volume, error) in job.bad {
            let name = format!("block {}", job.index.id).into_bytes();
            let path = volumes.get(volume).map(|it| it.config.path.clone()).unwrap_or_default();
            let mut message = format!("on {}: {error}", crate::sys::quoted(&path));
            if is_lost {
                message.push_str("; no copy of it is good: run validate --repair");
            }
            done.problems.note(progress, &name, &Error::new(error.kind(), message));
        }
    }
    result
}
