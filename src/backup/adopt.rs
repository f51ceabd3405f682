//! What a run that did not end has left: its blocks are taken over, the rest is cleared.
//!
//! Only blocks with a record in their volume's index are known to be whole, and only those enter
//! the catalog.

use std::os::unix::ffi::OsStrExt;

use crate::catalog::Writer as CatalogWriter;
use crate::error::{Problem, Result};
use crate::volume::{Stored, Volume, Volumes};

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
    let mut adopted = Adopted::default();
    for volume in volumes.present() {
        volume.clear_pending()?;
        volume.refresh_guide();
        let known = writer.index_len(volume.config.number)?;
        // A run that was killed may have written records that are not synced; the catalog must not
        // know more than the disk.
        let len = match volume.settle_index(known) {
            Ok(()) => Some(adopt(writer, volume, known, &mut adopted.bytes)?),
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

/// Takes over the blocks whose records follow byte `known` of a volume's index; gives its length.
fn adopt(writer: &mut CatalogWriter, volume: &Volume, known: u64, bytes: &mut u64) -> Result<u64> {
    let number = volume.config.number;
    let mut records = volume.index_from(known)?;
    let mut next = writer.next_block()?;
    let mut stored = Vec::new();
    loop {
        let record_at = records.offset();
        let Some(index) = records.next_record()? else { break };
        if let Some(it) = Stored::adopt(volume, next, index, record_at)? {
            *bytes += it.index().stored_len();
            next += 1;
            stored.push(it);
        }
        // Chunk lists are long: hand over a few blocks' worth of memory at a time.
        if stored.len() >= 8 {
            writer.adopt(&std::mem::take(&mut stored), number, records.offset())?;
        }
    }
    writer.adopt(&stored, number, records.offset())?;
    Ok(records.offset())
}
