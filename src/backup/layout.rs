//! What has been read of a file: its extents, as far as their places are known, and how a range of
//! a file is read.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use crate::catalog::Extent;
use crate::catalog::extent::push;
use crate::volume::Place;

/// A part of a file whose place may not be known yet.
pub enum Part {
    /// Placed, or a hole.
    At(Extent),
    /// In the frame being filled.
    InFrame {
        /// Where in the frame.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
}

/// What has been read of a file.
#[derive(Default)]
pub struct Layout {
    /// What is placed.
    pub extents: Vec<Extent>,
    /// What follows the extents and waits for the frame being filled.
    waiting: Vec<Part>,
    /// Bytes read, holes included.
    pub size: u64,
}

impl Layout {
    /// Adds a part.
    pub fn add(&mut self, part: Part) {
        match part {
            Part::At(extent) if self.waiting.is_empty() => push(&mut self.extents, extent),
            part => self.waiting.push(part),
        }
    }

    /// Adds what lies at a known place.
    pub fn add_at(&mut self, place: Place, len: u64) {
        self.size += len;
        let (block, offset) = (place.block, place.offset);
        self.add(Part::At(Extent::Data { block, offset, len }));
    }

    /// The frame has been appended at `frame`.
    pub fn resolve(&mut self, frame: Place) {
        for part in self.waiting.drain(..) {
            let extent = match part {
                Part::At(extent) => extent,
                Part::InFrame { offset, len } => {
                    let offset = frame.offset + offset;
                    Extent::Data { block: frame.block, offset, len }
                }
            };
            push(&mut self.extents, extent);
        }
    }
}

/// Reads a range of a file without moving its position.
pub struct Range<'a> {
    /// The file.
    pub file: &'a File,
    /// Where the next byte is.
    pub at: u64,
    /// Where the range ends.
    pub end: u64,
}

impl Range<'_> {
    /// Fills `buffer` unless the range or the file ends before; gives the number of bytes.
    pub fn read_full(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|it| !it.is_empty()) {
            match self.read(rest)? {
                0 => break,
                n => filled += n,
            }
        }
        Ok(filled)
    }
}

impl Read for Range<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(out.len());
        let out = out.get_mut(..left).unwrap_or_default();
        if out.is_empty() {
            return Ok(0);
        }
        let n = self.file.read_at(out, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}
