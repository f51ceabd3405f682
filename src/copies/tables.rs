//! What is inside a block, from whoever still knows: the index of a volume that has it, or else the
//! catalog and the block's own bytes.

use crate::catalog::Reader;
use crate::chunk::{ChunkRef, HashAlgo};
use crate::error::{Error, Result};
use crate::volume::{BlockIndex, CopyAt, Volumes};

/// The tables of a block. `copies` are where it is; its bytes are read only where no index has its
/// record and the catalog does not have all of its chunks.
pub fn tables_of(
    reader: &Reader,
    volumes: &Volumes,
    hash: HashAlgo,
    block: u64,
    copies: &[CopyAt],
) -> Result<BlockIndex> {
    let row = reader.block(block)?;
    for at in copies {
        let Some(volume) = volumes.get(at.volume) else { continue };
        match volume.index_record(at.record_at) {
            Ok(index) if index.id == row.id && index.frames == row.frames => return Ok(index),
            Ok(_) => log::warn!("volume {} has another record there", volume.config.uuid),
            Err(e) => log::warn!("{e}: taken from elsewhere"),
        }
    }
    let mut index = BlockIndex { id: row.id, frames: row.frames, chunks: Vec::new() };
    let mut at = 0;
    for (start, chunk) in reader.chunks_in(block)? {
        if start < at {
            return Err(Error::corrupt(format!("catalog: chunks of block {} overlap", index.id)));
        }
        if start > at {
            // Stored again elsewhere since; any cut is as good.
            let gap = gap(&index, volumes, copies, hash, at..start)?;
            index.chunks.push(gap);
        }
        index.chunks.push(chunk);
        at = start + u64::from(chunk.len);
    }
    let end = index.plain_len();
    if at < end {
        let gap = gap(&index, volumes, copies, hash, at..end)?;
        index.chunks.push(gap);
    }
    index.check()?;
    Ok(index)
}

/// A part of a block's plain content as one chunk.
fn gap(
    index: &BlockIndex,
    volumes: &Volumes,
    copies: &[CopyAt],
    hash: HashAlgo,
    range: std::ops::Range<u64>,
) -> Result<ChunkRef> {
    let numbers: Vec<i64> = copies.iter().map(|it| it.volume).collect();
    let mut hasher = hash.hasher();
    let (mut stored_at, mut plain_at) = (0u64, 0u64);
    for frame in &index.frames {
        let plain_end = plain_at + u64::from(frame.plain_len);
        if plain_at < range.end && plain_end > range.start {
            let mut stored = vec![0; frame.stored_len as usize];
            let plain = volumes.from_copies(&numbers, &index.id, |volume| {
                volume.store.read_at(&index.id, stored_at, &mut stored)?;
                let mut plain = Vec::new();
                frame.decode(&stored, &mut plain).map(|()| plain)
            })?;
            let cut = |at: u64| usize::try_from(at.saturating_sub(plain_at)).unwrap_or(usize::MAX);
            let (from, to) = (cut(range.start), cut(range.end).min(plain.len()));
            hasher.update(plain.get(from..to).unwrap_or_default());
        }
        stored_at += u64::from(frame.stored_len);
        plain_at = plain_end;
    }
    let len = u32::try_from(range.end - range.start);
    let len = len.map_err(|_| Error::corrupt("a block that is too long"))?;
    Ok(ChunkRef { id: hasher.finish(), len })
}
