//! What the bytes of a block say of themselves: whether they are those of its name.

use crate::chunk::HashAlgo;
use crate::chunk::frame::{Codec, FRAME_PLAIN_BYTES_MAX, Frame};
use crate::error::Result;
use crate::volume::{BlockId, BlockIndex, CopyFault, Volume, verify_block};

/// A table of raw frames over so many bytes, whose checks say nothing.
fn raw_frames(len: u64) -> Vec<Frame> {
    let max = u64::from(FRAME_PLAIN_BYTES_MAX);
    let starts = (0..len.div_ceil(max)).map(|it| it * max);
    let frame = |start: u64| {
        let len = u32::try_from(max.min(len - start)).unwrap_or(FRAME_PLAIN_BYTES_MAX);
        Frame { codec: Codec::Raw, stored_len: len, plain_len: len, check: 0 }
    };
    starts.map(frame).collect()
}

/// Whether the bytes of a block have the hash that is its name.
pub fn check_name(volume: &Volume, id: &BlockId, len: u64, hash: HashAlgo) -> Result<()> {
    // Of the tables only the length counts here.
    let index = BlockIndex { id: *id, frames: raw_frames(len), chunks: Vec::new() };
    match verify_block(volume, &index, hash, &|_| Ok(())) {
        Ok(()) => Ok(()),
        Err(CopyFault::Source(e) | CopyFault::Target(e) | CopyFault::Stopped(e)) => Err(e),
    }
}
