//! Bytes of a file, copied only where they do not lie in one piece.

use std::ops::{Deref, Range};
use std::sync::Arc;

use super::blocks::Blocks;
use super::buffers::Buffer;
use super::{FileMap, Snapshots};
use crate::catalog::Extent;
use crate::error::{Error, Result};

/// Bytes that were read: a part of a frame in the cache, or a buffer of their own.
pub struct Data(Bytes);

enum Bytes {
    Frame(Arc<Buffer>, Range<usize>),
    Own(Buffer),
}

impl From<Vec<u8>> for Data {
    fn from(bytes: Vec<u8>) -> Data {
        Data(Bytes::Own(bytes.into()))
    }
}

impl Deref for Data {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Bytes::Frame(frame, range) => frame.get(range.clone()).unwrap_or_default(),
            Bytes::Own(buffer) => buffer,
        }
    }
}

impl Snapshots {
    /// Fills `buf` from `offset` of a file as far as the file goes; gives the number of bytes.
    pub fn read(&self, file: &FileMap, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let len = file.len_at(offset, buf.len());
        let in_row = self.ahead.note(file, offset, len as u64);
        fill(&self.blocks, file, offset, buf.get_mut(..len).unwrap_or_default(), in_row)?;
        Ok(len)
    }

    /// At most `len` bytes from `offset` of a file; fewer only at its end. They keep a frame, or
    /// as many bytes as they are, in memory until they are dropped.
    pub fn read_data(&self, file: &FileMap, offset: u64, len: usize) -> Result<Data> {
        let len = file.len_at(offset, len);
        let in_row = self.ahead.note(file, offset, len as u64);
        if let Some(data) = one_frame(&self.blocks, file, offset, len, in_row)? {
            return Ok(data);
        }
        let mut buffer = self.blocks.buffers.take(len);
        fill(&self.blocks, file, offset, &mut buffer, in_row)?;
        Ok(Data(Bytes::Own(buffer)))
    }
}

/// The bytes as a part of one frame, if they lie in one.
fn one_frame(
    blocks: &Blocks,
    file: &FileMap,
    offset: u64,
    len: usize,
    in_row: bool,
) -> Result<Option<Data>> {
    let number = file.extent_at(offset);
    let (Some(Extent::Data { block, offset: at, len: extent_len }), Some(start)) =
        (file.content.extents.get(number), file.starts.get(number))
    else {
        return Ok(None);
    };
    let skip = offset.saturating_sub(*start);
    if len == 0 || skip.saturating_add(len as u64) > *extent_len {
        return Ok(None);
    }
    let map = blocks.map(*block)?;
    let at = at + skip;
    let number = map.frame_at(at);
    let Some(place) = map.frames.get(number) else { return Err(map.ends()) };
    if at + len as u64 > place.plain_end() || place.is_whole_raw(len) {
        return Ok(None);
    }
    let from = place.index(at);
    let range = from..from + len;
    let needed = if in_row { place.len() } else { range.end };
    let frame = blocks.start_of_frame(&map, number, place, needed)?;
    if frame.get(range.clone()).is_none() {
        return Err(map.ends());
    }
    Ok(Some(Data(Bytes::Frame(frame, range))))
}

/// Fills all of `out` from `offset` of a file.
fn fill(blocks: &Blocks, file: &FileMap, offset: u64, out: &mut [u8], in_row: bool) -> Result<()> {
    let mut out = out;
    let mut at = offset;
    let mut next = file.extent_at(offset);
    while !out.is_empty() {
        let (Some(extent), Some(start)) = (file.content.extents.get(next), file.starts.get(next))
        else {
            return Err(Error::corrupt("a file's extents end before the file"));
        };
        let skip = at - start;
        let here = usize::try_from(extent.len() - skip).unwrap_or(usize::MAX).min(out.len());
        let (part, rest) = out.split_at_mut(here);
        match *extent {
            Extent::Hole { .. } => part.fill(0),
            Extent::Data { block, offset, .. } => {
                blocks.read(&*blocks.map(block)?, offset + skip, part, in_row)?;
            }
        }
        out = rest;
        at += here as u64;
        next += 1;
    }
    Ok(())
}
