//! Tape images in the SIMH format: which objects a file is made of. See FORMAT.md, "Images".
//!
//! Invariant: whatever the bytes are, each object either ends behind the place where it began and
//! within the file, or is an error that names the place. Nothing is allocated for what a length
//! claims.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;

use crate::error::{Error, Result};
use crate::sys;

/// A filemark.
pub const FILEMARK: u32 = 0;
/// The tape ends here, whatever follows.
pub const END_OF_MEDIUM: u32 = 0xFFFF_FFFF;
/// Four bytes of nothing.
const GAP: u32 = 0xFFFF_FFFE;
/// The second half of one gap and the first of the next, where a block ends amid the first.
const HALF_GAP: u32 = 0xFFFE_FFFF;
/// Bytes of a marker, and of each of a block's two lengths.
pub const WORD: u64 = 4;
/// Longest block that is written: readers of the standard format know no longer ones.
pub const BLOCK_BYTES_MAX: u64 = (1 << 24) - 1;
/// Bytes of a gap that are read at once.
const GAP_PIECE: usize = 64 << 10;

/// An object of the tape: where its bytes begin, and where it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    /// What it is.
    pub kind: Kind,
    /// Where the next one begins.
    pub end: u64,
}

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A block of the tape.
    Block {
        /// Offset of its data.
        data: u64,
        /// Bytes.
        len: u32,
        /// Whoever read it from a tape could not read it well.
        is_bad: bool,
    },
    /// A filemark.
    Filemark,
    /// The end of data. It ends where it begins.
    EndOfData,
}

/// What a word stands for, without what follows it.
enum Word {
    Filemark,
    EndOfMedium,
    Gap,
    HalfGap,
    /// One that is passed over.
    Marker,
    Block {
        len: u32,
        is_bad: bool,
    },
    /// Data that is no block of the tape, and is passed over.
    Other {
        len: u32,
    },
    Illegal,
}

fn parse(word: u32) -> Word {
    let len = word & 0x0FFF_FFFF;
    match word >> 28 {
        0 if len == 0 => Word::Filemark,
        class @ (0 | 8) => Word::Block { len, is_bad: class == 8 },
        1..=6 | 9..=14 => Word::Other { len },
        7 => Word::Marker,
        _ => match word {
            END_OF_MEDIUM => Word::EndOfMedium,
            GAP => Word::Gap,
            HALF_GAP => Word::HalfGap,
            // Read backwards, these would be taken for a half gap.
            0xFFFE_0000.. => Word::Illegal,
            _ => Word::Marker,
        },
    }
}

/// Bytes that a block takes.
pub fn block_bytes(len: u64) -> u64 {
    2 * WORD + len + len % 2
}

/// The bytes after a block's data: a padding one if the length is odd, and the length again.
pub fn block_tail(len: u32) -> ([u8; 5], usize) {
    let [a, b, c, d] = len.to_le_bytes();
    if len % 2 == 1 { ([0, a, b, c, d], 5) } else { ([a, b, c, d, 0], 4) }
}

fn word_at(file: &File, offset: u64) -> Result<u32> {
    let mut bytes = [0; 4];
    read_at(file, &mut bytes, offset)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Fills `buffer`.
pub fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> Result<()> {
    file.read_exact_at(buffer, offset).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => {
            Error::corrupt(format!("byte {offset}: the file has become shorter while it was read"))
        }
        _ => Error::io(format!("reading at byte {offset}"), e),
    })
}

/// The next object at or after `offset` of a file that is `size` bytes long.
pub fn next(file: &File, size: u64, offset: u64) -> Result<Object> {
    let mut at = offset;
    loop {
        let left = size.saturating_sub(at);
        if left == 0 {
            return Ok(Object { kind: Kind::EndOfData, end: at });
        }
        if left < WORD {
            return Err(Error::corrupt(format!("byte {at}: the image ends within a length")));
        }
        let word = word_at(file, at)?;
        match parse(word) {
            Word::Filemark => return Ok(Object { kind: Kind::Filemark, end: at + WORD }),
            Word::EndOfMedium => return Ok(Object { kind: Kind::EndOfData, end: at }),
            Word::Gap => at = skip_gap(file, size, at)?,
            Word::HalfGap => at += WORD / 2,
            Word::Marker => at += WORD,
            Word::Block { len, is_bad } => {
                let end = end_of_block(file, size, at, word, len)?;
                return Ok(Object { kind: Kind::Block { data: at + WORD, len, is_bad }, end });
            }
            Word::Other { len } => at = end_of_block(file, size, at, word, len)?,
            Word::Illegal => {
                let what = "which stands for nothing";
                return Err(Error::corrupt(format!("byte {at}: the marker {word:#010x}, {what}")));
            }
        }
    }
}

/// A block that was read in one go.
pub struct Swift {
    /// Bytes.
    pub len: u32,
    /// Where the next object begins.
    pub end: u64,
    /// What it begins with, if it is in the file.
    pub ahead: Option<u32>,
}

/// Reads the block at `offset`, together with what follows it, if there is an ordinary one that
/// fits into `buffer`. `word` is its length, if that was read before. Everything else is for
/// [`next`].
pub fn read_swiftly(
    file: &File,
    size: u64,
    offset: u64,
    word: Option<u32>,
    buffer: &mut [u8],
) -> Result<Option<Swift>> {
    if size.saturating_sub(offset) < WORD {
        return Ok(None);
    }
    let word = word.map_or_else(|| word_at(file, offset), Ok)?;
    let Word::Block { len, is_bad: false } = parse(word) else { return Ok(None) };
    let end = offset + block_bytes(len.into());
    let part = usize::try_from(len).ok().and_then(|it| buffer.get_mut(..it));
    let Some(part) = part.filter(|_| end <= size) else { return Ok(None) };
    let wanted = part.len();
    // A padding byte, the length, and what the next object begins with.
    let mut behind = [0; 9];
    let (pad, tail) = behind.split_at_mut(wanted % 2);
    let tail = tail.get_mut(..8).unwrap_or_default();
    let mut pieces = [IoSliceMut::new(part), IoSliceMut::new(pad), IoSliceMut::new(tail)];
    let done = sys::tape::read_at(file, &mut pieces, offset + WORD)
        .map_err(|e| Error::io(format!("reading at byte {offset}"), e))?;
    // What is shorter or has another length behind it is told in words by the other way.
    let left = done.checked_sub(wanted + pad.len());
    let (Some(4..), Some((own, next))) = (left, tail.split_first_chunk::<4>()) else {
        return Ok(None);
    };
    if u32::from_le_bytes(*own) != word {
        return Ok(None);
    }
    let next = next.first_chunk::<4>().filter(|_| left == Some(8));
    let ahead = next.filter(|_| end + WORD <= size).map(|it| u32::from_le_bytes(*it));
    Ok(Some(Swift { len, end, ahead }))
}

/// Where the block ends that begins at `at`. Both of its lengths are there and the same.
fn end_of_block(file: &File, size: u64, at: u64, word: u32, len: u32) -> Result<u64> {
    let end = at + block_bytes(len.into());
    if end > size {
        return Err(Error::corrupt(format!(
            "byte {at}: a block of {len} bytes, of which the image has only {}",
            size.saturating_sub(at + WORD)
        )));
    }
    let behind = word_at(file, end - WORD)?;
    if behind != word {
        return Err(Error::corrupt(format!(
            "byte {at}: a block whose length is {word:#010x} before it and {behind:#010x} behind it"
        )));
    }
    Ok(end)
}

/// The end of the whole gap markers from `at` on. There is one.
fn skip_gap(file: &File, size: u64, at: u64) -> Result<u64> {
    let mut buffer = vec![0; GAP_PIECE];
    let mut at = at;
    loop {
        let left = size.saturating_sub(at) / WORD * WORD;
        let len = usize::try_from(left).unwrap_or(GAP_PIECE).min(GAP_PIECE);
        let Some(piece) = buffer.get_mut(..len).filter(|it| !it.is_empty()) else {
            return Ok(at);
        };
        read_at(file, piece, at)?;
        let words = piece.chunks_exact(4);
        let gaps = words.take_while(|it| **it == GAP.to_le_bytes()).count();
        at += gaps as u64 * WORD;
        if gaps as u64 * WORD < len as u64 {
            return Ok(at);
        }
    }
}

/// A place on a tape: how many objects and filemarks are before it, and where it is in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Blocks and filemarks before it.
    pub position: u64,
    /// Filemarks before it.
    pub files: u64,
    /// Byte in the file.
    pub offset: u64,
}

impl Place {
    /// The place behind an object that begins here.
    pub fn behind(self, object: &Object) -> Place {
        let (position, files) = match object.kind {
            Kind::Block { .. } => (1, 0),
            Kind::Filemark => (1, 1),
            Kind::EndOfData => (0, 0),
        };
        Place {
            position: self.position + position,
            files: self.files + files,
            // What the end of data ends with is where the next object goes.
            offset: object.end,
        }
    }
}

/// Places on a tape that are known, evenly spread over what was passed. Always as many as a budget
/// allows or fewer, whatever the length of the tape.
pub struct Index {
    /// Every so many objects one is kept.
    every: u64,
    places: Vec<Place>,
}

impl Index {
    /// Places that are kept: 24 bytes each.
    const PLACES_MAX: usize = 1 << 16;

    /// That of a tape of which nothing is known.
    pub fn new() -> Index {
        Index { every: 1, places: Vec::new() }
    }

    /// Takes note of a place that was reached from the one before it.
    pub fn note(&mut self, place: Place) {
        let last = self.places.last().map_or(0, |it| it.position);
        if place.position <= last || !place.position.is_multiple_of(self.every) {
            return;
        }
        self.places.push(place);
        if self.places.len() > Self::PLACES_MAX {
            self.every *= 2;
            let every = self.every;
            self.places.retain(|it| it.position.is_multiple_of(every));
        }
    }

    /// The last known place of which this holds; it must hold for all places before one of which it
    /// holds. The beginning if there is none.
    pub fn last(&self, holds: impl Fn(&Place) -> bool) -> Place {
        let count = self.places.partition_point(holds);
        let found = count.checked_sub(1).and_then(|it| self.places.get(it));
        found.copied().unwrap_or_default()
    }

    /// Forgets what is behind a position.
    pub fn cut(&mut self, position: u64) {
        let count = self.places.partition_point(|it| it.position <= position);
        self.places.truncate(count);
    }
}

impl Default for Index {
    fn default() -> Index {
        Index::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(position: u64) -> Place {
        Place { position, files: position / 10, offset: position * 100 }
    }

    #[test]
    fn known_places_are_few_and_near() {
        let mut index = Index::new();
        assert_eq!(index.last(|_| true), Place::default());
        let count = Index::PLACES_MAX as u64 * 5;
        for position in 1..=count {
            index.note(place(position));
            assert!(index.places.len() <= Index::PLACES_MAX);
        }
        for wanted in [0, 1, 7, 8, 100, count / 2, count - 1, count] {
            let found = index.last(|it| it.position <= wanted);
            assert_eq!(found, place(wanted / 8 * 8));
            let found = index.last(|it| it.files < wanted / 10);
            assert!(found.position <= wanted && wanted - found.position < 10 + 16);
        }
        // What is passed again is known already.
        let before = index.places.len();
        index.note(place(800));
        assert_eq!(index.places.len(), before);
        index.cut(805);
        assert_eq!(index.last(|_| true), place(800));
        index.note(place(808));
        assert_eq!(index.last(|_| true), place(808));
    }

    #[test]
    fn lengths_are_even_and_told_twice() {
        assert_eq!((block_bytes(1), block_bytes(2), block_bytes(3)), (10, 10, 12));
        for len in [1u32, 2, 0x0012_3457] {
            let (tail, count) = block_tail(len);
            assert_eq!(block_bytes(len.into()), 4 + u64::from(len) + count as u64);
            assert_eq!(tail[count - 4..count], len.to_le_bytes());
        }
    }
}
