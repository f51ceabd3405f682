//! Reading for a restore: contents of many files at a time, bytes without a copy in between, and
//! raw blocks shared instead of copied.
//!
//! Every byte that is handed out, or shared, has been checked: a frame against its own check when
//! it is loaded. Whoever shares a block's bytes still reads the same frames for the file's hash.

use std::fs::File;
use std::sync::Arc;

use super::blocks::BlockMap;
use super::{FileMap, Snapshots};
use crate::catalog::{Extent, VersionId};
use crate::chunk::frame::Codec;
use crate::error::Result;
use crate::volume::store::{BlockRange, Cloned};

/// Bytes of a block that are asked for ahead of their reading.
const AHEAD_BYTES: u64 = 8 << 20;
/// What offsets of shared ranges are multiples of. A file system with larger blocks refuses, and
/// the bytes are written.
const SHARED_ALIGN: u64 = 4096;

/// Ranges of a file, as (start, end) in order, that share a block's bytes now.
#[derive(Debug, Default)]
pub struct Shared {
    /// The ranges.
    pub ranges: Vec<(u64, u64)>,
    /// Whether this target cannot share at all.
    pub refused: bool,
}

/// Raw frames that lie one after another, in the file and in the block.
struct RawRun {
    file_at: u64,
    stored_at: u64,
    len: u64,
}

impl Snapshots {
    /// The contents of these versions, in their order. They are not kept for others.
    pub fn files(&self, versions: &[VersionId]) -> Result<Vec<Arc<FileMap>>> {
        if versions.is_empty() {
            return Ok(Vec::new());
        }
        let contents = self.with_reader(|reader| reader.contents(versions))?;
        let maps = versions.iter().zip(contents);
        Ok(maps.map(|(version, it)| Arc::new(FileMap::new(*version, it))).collect())
    }

    /// Calls `each` with the bytes of a file from `start` to `end`, holes left out, in order: the
    /// offset in the file, and the bytes as they lie in a frame.
    pub fn pieces(
        &self,
        file: &FileMap,
        start: u64,
        end: u64,
        each: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let first = file.extent_at(start);
        for (extent, extent_at) in file.content.extents.iter().zip(&file.starts).skip(first) {
            if *extent_at >= end {
                break;
            }
            let Extent::Data { block, offset, len } = *extent else { continue };
            let from = start.max(*extent_at);
            let to = end.min(extent_at + len);
            let mut at = from;
            self.block_pieces(block, offset + (from - extent_at), to - from, &mut |bytes| {
                each(at, bytes)?;
                at += bytes.len() as u64;
                Ok(())
            })?;
        }
        Ok(())
    }

    fn block_pieces(
        &self,
        block: u64,
        offset: u64,
        len: u64,
        each: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let map = self.blocks.map(block)?;
        let (mut at, end) = (offset, offset + len);
        let mut next = map.frame_at(offset);
        let mut asked_to = 0;
        while at < end {
            let place = map.frames.get(next).ok_or_else(|| map.ends())?;
            let plain_end = place.plain_end();
            if end > plain_end && place.stored_at + AHEAD_BYTES / 2 > asked_to {
                self.blocks.ask_for(&map, place.stored_at.max(asked_to), AHEAD_BYTES);
                asked_to = place.stored_at.max(asked_to) + AHEAD_BYTES;
            }
            let plain = self.blocks.frame(&map, next, place)?;
            let to = end.min(plain_end);
            let index = |at: u64| usize::try_from(at - place.plain_at).unwrap_or(usize::MAX);
            let Some(bytes) = plain.get(index(at)..index(to)).filter(|it| !it.is_empty()) else {
                return Err(map.ends());
            };
            each(bytes)?;
            at = to;
            next += 1;
        }
        Ok(())
    }

    /// Says that these files will be read soon, so that their blocks are read ahead. `files` are
    /// in the order of their places.
    pub fn will_need<'a>(&self, files: impl Iterator<Item = &'a FileMap>) {
        let mut asked: Option<(u64, u64, u64)> = None;
        for file in files {
            let Some((block, offset)) = file.place() else { continue };
            let end = offset + file.size.min(AHEAD_BYTES);
            asked = match asked {
                Some((last, from, to)) if last == block && offset <= to + (64 << 10) => {
                    Some((block, from, to.max(end)))
                }
                other => {
                    self.ask_for_plain(other);
                    Some((block, offset, end))
                }
            };
        }
        self.ask_for_plain(asked);
    }

    fn ask_for_plain(&self, range: Option<(u64, u64, u64)>) {
        // What is wrong with the block is told by who reads it.
        if let Some((block, from, to)) = range
            && let Ok(map) = self.blocks.map(block)
        {
            let frames = &map.frames;
            let last = frames.partition_point(|it| it.plain_at < to).saturating_sub(1);
            if let (Some(first), Some(last)) = (frames.get(map.frame_at(from)), frames.get(last)) {
                let end = last.stored_end();
                self.blocks.ask_for(&map, first.stored_at, end.saturating_sub(first.stored_at));
            }
        }
    }

    /// Makes what can be shared of `file` with raw blocks a part of `dest`, which has nothing
    /// there, at the same offsets.
    pub fn share(&self, file: &FileMap, dest: &File) -> Result<Shared> {
        let mut shared = Shared::default();
        for (extent, extent_at) in file.content.extents.iter().zip(&file.starts) {
            let Extent::Data { block, offset, len } = *extent else { continue };
            let map = self.blocks.map(block)?;
            let volumes = self.volumes();
            let Some(volume) = volumes.first_present(&map.volumes) else { continue };
            // Of several copies, what is read may come from another than what is shared.
            if map.volumes.len() > 1 && !self.blocks.is_sound(&map, volume, offset, len) {
                continue;
            }
            for run in raw_runs(&map, *extent_at, offset, len) {
                let Some((skip, len)) = aligned(&run, map.stored_len, file.size) else { continue };
                let range = BlockRange { id: &map.id, offset: run.stored_at + skip, len };
                let start = run.file_at + skip;
                match volume.store.clone_range(&range, dest, start) {
                    Cloned::Done => shared.ranges.push((start, start + len)),
                    Cloned::NotHere => {}
                    Cloned::Never => {
                        shared.refused = true;
                        return Ok(shared);
                    }
                }
            }
        }
        Ok(shared)
    }
}

/// The raw frames of a stretch of a block, joined where they touch.
fn raw_runs(map: &BlockMap, file_at: u64, offset: u64, len: u64) -> Vec<RawRun> {
    let end = offset + len;
    let first = map.frame_at(offset);
    let mut runs: Vec<RawRun> = Vec::new();
    for place in map.frames.iter().skip(first).take_while(|it| it.plain_at < end) {
        if place.frame.codec != Codec::Raw {
            continue;
        }
        let from = offset.max(place.plain_at);
        let to = end.min(place.plain_at + u64::from(place.frame.plain_len));
        let next = RawRun {
            file_at: file_at + (from - offset),
            stored_at: place.stored_at + (from - place.plain_at),
            len: to - from,
        };
        match runs.last_mut() {
            Some(last)
                if last.file_at + last.len == next.file_at
                    && last.stored_at + last.len == next.stored_at =>
            {
                last.len += next.len;
            }
            _ => runs.push(next),
        }
    }
    runs
}

/// The part of a run that a file system can share, as bytes to skip and length: whole blocks of the
/// file system on both sides, or up to the end of both files.
fn aligned(run: &RawRun, block_end: u64, file_end: u64) -> Option<(u64, u64)> {
    if run.file_at % SHARED_ALIGN != run.stored_at % SHARED_ALIGN {
        return None;
    }
    let skip = run.file_at.next_multiple_of(SHARED_ALIGN) - run.file_at;
    let len = run.len.checked_sub(skip)?;
    let is_end = run.stored_at + run.len == block_end && run.file_at + run.len == file_end;
    let len = if is_end { len } else { len - len % SHARED_ALIGN };
    (len > 0).then_some((skip, len))
}

impl FileMap {
    /// Where the first of its data lies: block and offset. Files in this order are in the order of
    /// the disk.
    pub fn place(&self) -> Option<(u64, u64)> {
        self.content.extents.iter().find_map(|it| match *it {
            Extent::Data { block, offset, .. } => Some((block, offset)),
            Extent::Hole { .. } => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_of_a_file_system_are_shared() {
        let run = |file_at, stored_at, len| RawRun { file_at, stored_at, len };
        let far = u64::MAX;
        assert_eq!(aligned(&run(0, 0, 8192), far, far), Some((0, 8192)));
        assert_eq!(aligned(&run(0, 0, 8193), far, far), Some((0, 8192)));
        assert_eq!(aligned(&run(100, 4196, 9000), far, far), Some((3996, 4096)));
        assert_eq!(aligned(&run(100, 4197, 90_000), far, far), None);
        assert_eq!(aligned(&run(0, 0, 100), far, far), None);
        assert_eq!(aligned(&run(5, 5, 100), far, far), None);
        assert_eq!(aligned(&run(0, 0, 8193), 8193, 8193), Some((0, 8193)));
        assert_eq!(aligned(&run(0, 0, 8193), 8193, 9000), Some((0, 8192)));
        assert_eq!(aligned(&run(4096, 0, 100), 100, 4196), Some((0, 100)));
    }
}
