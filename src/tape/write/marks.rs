//! Places in an archive at which it can be cut: ends of members.
//!
//! One is kept about every block of the archive, as far back as it may be needed. The last one is
//! always exact, so a file that is as long as a tape is cut right before it.

use std::collections::VecDeque;

use crate::tape::spool::batch::ResultsMark;

/// The end of a member.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// Bytes of the archive before it.
    pub position: u64,
    /// The number that the next member gets.
    pub ids: u64,
    /// Files of the batch before it, those too that have failed.
    pub files: u64,
    /// Those that have not.
    pub oks: u64,
    /// Bytes that close the archive here: sums and trailer.
    pub closing: u64,
    /// The same place in the results.
    pub results: ResultsMark,
    /// And in the sums, in bytes.
    pub sums: u64,
}

/// The places of one archive.
pub struct Marks {
    block_bytes: u64,
    marks: VecDeque<Mark>,
}

impl Marks {
    /// None so far.
    pub fn new(block_bytes: u32) -> Marks {
        Marks { block_bytes: block_bytes.into(), marks: VecDeque::new() }
    }

    /// Adds a place behind all others. So many blocks are on the tape, and stay there.
    pub fn add(&mut self, mark: Mark, blocks: u64) {
        let safe = room(blocks, self.block_bytes);
        while let Some(second) = self.marks.get(1)
            && second.position + second.closing <= safe
        {
            self.marks.pop_front();
        }
        let before = self.marks.iter().rev().nth(1);
        let is_near = before.is_some_and(|it| mark.position < it.position + self.block_bytes);
        if is_near || self.marks.back().is_some_and(|it| it.position == mark.position) {
            self.marks.pop_back();
        }
        self.marks.push_back(mark);
    }

    /// The last place at which the archive can be closed within so many blocks, with one to spare
    /// for the filemark.
    pub fn last_closed_within(&self, blocks: u64) -> Option<Mark> {
        let room = room(blocks, self.block_bytes);
        self.marks.iter().rev().find(|it| it.position + it.closing <= room).copied()
    }

    /// The last place that is on the tape when that has so many blocks.
    pub fn last_within(&self, blocks: u64) -> Option<Mark> {
        let room = blocks * self.block_bytes;
        self.marks.iter().rev().find(|it| it.position <= room).copied()
    }
}

/// Bytes in which an archive has to be closed that has so many blocks.
fn room(blocks: u64, block_bytes: u64) -> u64 {
    blocks.saturating_sub(1) * block_bytes
}
