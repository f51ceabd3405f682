//! What a run that did not end has left: its blocks are taken over, the rest is cleared.
//!
//! Only blocks with a record in their volume's index are known to be whole, and only those enter
//! the catalog.

use std::os::unix::ffi::OsStrExt;

use crate::catalog::Writer as CatalogWriter;
use crate::error::{Error, Problem, Result};
use crate::sys::quoted;
use crate::volume::{Record, Stored, Volume, Volumes};

/// What an earlier run has left on the volumes.
#[derive(Default)]
pub struct Adopted {
    pub bytes: u64,
    /// The valid length of each present volume's index; `None` for one that cannot be used.
    pub index_lens: Vec<Option<u64>>,
    pub problems: Vec<Problem>,
}

/// Takes over what a run that did not end has stored, and clears what it left half written. A
/// volume whose index is damaged takes no blocks in this run; the others do.
pub fn adopt_all(writer: &mut CatalogWriter, volumes: &Volumes) -> Result<Adopted> {
    // Before anything is written.
    writer.refuse_lost_runs(volumes)?;
    let mut adopted = Adopted::default();
    // Asked once: what one volume has left may be numbered between what another one has.
    let first_free = writer.next_block()?;
    for volume in volumes.present() {
        volume.clear_pending()?;
        volume.refresh_guide();
        if let Err(e) = volume.refresh_manifest(writer.facts_of(volume.config.number)?) {
            // It costs a rebuild some words, and no run: the next writer tries again.
            log::warn!("{e}: the volume's own manifest is not up to date");
        }
        let number = volume.config.number;
        let known = writer.index_len(number)?;
        let doubted = writer.doubted(number)?;
        let settle = || match doubted {
            Some(blocks) => expect_whole(writer, volume, blocks),
            None => Ok(()),
        };
        // A run that was killed may have written records that are not synced; the catalog must not
        // know more than the disk.
        let len = match volume.settle_index(known).and_then(|()| settle()) {
            Ok(()) => Some(adopt(writer, volume, known, first_free, &mut adopted.bytes)?),
            Err(e) => {
                let path = volume.config.path.as_os_str().as_bytes();
                let error = e.context("it takes no blocks in this run");
                adopted.problems.push(Problem::new(path, &error));
                None
            }
        };
        adopted.index_lens.push(len);
    }
    if adopted.bytes > 0 {
        log::info!("took over {} bytes from a run that did not end", adopted.bytes);
    }
    Ok(adopted)
}

/// Fails if the index of a volume, which a repair that was killed was to write anew, is still the
/// old one.
fn expect_whole(writer: &CatalogWriter, volume: &Volume, blocks: u64) -> Result<()> {
    let (mut records, mut found) = (volume.index_from(0)?, 0);
    while let Some(Record { index, .. }) = records.next_record()? {
        found += u64::from(writer.has_copy(&index.id, volume.config.number)?);
    }
    match found >= blocks && records.offset() == volume.index_len()? {
        true => Ok(()),
        false => {
            let path = quoted(&volume.config.path);
            let message = format!("the index of {path} is damaged: run validate --repair");
            Err(Error::corrupt(message))
        }
    }
}

/// Takes over the blocks whose records follow byte `known` of a volume's index; gives its length.
///
/// A block keeps the number that its record says, unless that is below `first_free` or belongs to
/// another block by now: so the index goes on saying which of two places of a chunk is the newer.
fn adopt(
    writer: &mut CatalogWriter,
    volume: &Volume,
    known: u64,
    first_free: u64,
    bytes: &mut u64,
) -> Result<u64> {
    let volume_number = volume.config.number;
    let mut records = volume.index_from(known)?;
    let mut stored: Vec<Stored> = Vec::new();
    loop {
        let record_at = records.offset();
        let Some(Record { number, index }) = records.next_record()? else { break };
        let is_free = |number: &u64| -> Result<bool> {
            let is_waiting = stored.iter().any(|it| it.block() == *number);
            Ok(*number >= first_free && !is_waiting && !writer.has_block(*number)?)
        };
        let number = match number {
            Some(number) if is_free(&number)? => number,
            _ => {
                let waiting = stored.iter().map(|it| it.block() + 1).max();
                writer.next_block()?.max(waiting.unwrap_or_default())
            }
        };
        if let Some(it) = Stored::adopt(volume, number, index, record_at)? {
            *bytes += it.index().stored_len();
            stored.push(it);
        }
        // Chunk lists are long: hand over a few blocks' worth of memory at a time.
        if stored.len() >= 8 {
            writer.adopt(&std::mem::take(&mut stored), volume_number, records.offset())?;
        }
    }
    writer.adopt(&stored, volume_number, records.offset())?;
    Ok(records.offset())
}
