//! Blocks that are a file as they lie there, which the kernel can read without this program.

use std::fs::File;

use super::{FileMap, Snapshots};
use crate::catalog::Extent;
use crate::chunk::frame::Codec;
use crate::error::Result;

/// A block whose file is a file's whole content.
#[derive(Debug)]
pub struct WholeBlock {
    /// The block's number: files with the same one have the same content.
    pub number: u64,
    /// The block's file, open for reading.
    pub file: File,
}

impl Snapshots {
    /// The block that is this file's content byte for byte, if there is one.
    pub fn whole_block(&self, file: &FileMap) -> Result<Option<WholeBlock>> {
        let [Extent::Data { block, offset: 0, len }] = *file.content.extents.as_slice() else {
            return Ok(None);
        };
        let map = self.block_map(block)?;
        let stored: u64 = map.frames.iter().map(|it| u64::from(it.frame.stored_len)).sum();
        if stored != len || map.frames.iter().any(|it| it.frame.codec != Codec::Raw) {
            return Ok(None);
        }
        let volumes = self.volumes();
        for number in &map.volumes {
            if let Some(volume) = volumes.get(*number)
                && let Some(file) = volume.store.open(&map.id)?
            {
                return Ok(Some(WholeBlock { number: block, file }));
            }
        }
        Ok(None)
    }
}
