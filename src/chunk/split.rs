//! Splitting a stream into chunks.
//!
//! FastCDC (the 2020 variant, gear table and normalisation of the `fastcdc` crate) cuts where the
//! content says so: an insertion changes the chunks around it and no others. Fixed splitting cuts
//! every N bytes. Memory is bounded by the largest chunk, whatever the stream's length.

use std::io::{self, Read};
use std::ops::RangeInclusive;

use crate::error::{Error, Result};

/// Sizes that `--chunk-size` may have with FastCDC, in bytes.
pub const FASTCDC_SIZES: RangeInclusive<u64> = (4 << 10)..=(4 << 20);
/// Sizes that `--chunk-size` may have with fixed splitting, in bytes.
pub const FIXED_SIZES: RangeInclusive<u64> = (4 << 10)..=(1 << 30);

/// How a catalog splits content. Settled at `init`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunking {
    /// Content-defined, with this average; the minimum is a quarter of it, the maximum four times.
    FastCdc {
        /// Average chunk size in bytes, within [`FASTCDC_SIZES`].
        average: u32,
    },
    /// Every `size` bytes.
    Fixed {
        /// Chunk size in bytes, within [`FIXED_SIZES`].
        size: u32,
    },
}

impl Chunking {
    /// Checks the words and the size that a user or a catalog gives.
    pub fn new(word: &str, size: u64) -> Result<Chunking> {
        let sizes = match word {
            "fastcdc" => FASTCDC_SIZES,
            "fixed" => FIXED_SIZES,
            _ => {
                let message = format!("unknown chunking {word:?}: use fastcdc or fixed");
                return Err(Error::usage(message));
            }
        };
        let fits = u32::try_from(size).ok().filter(|_| sizes.contains(&size));
        let Some(size) = fits else {
            return Err(Error::usage(format!(
                "chunk size {size} is out of range for {word}: {} to {} bytes",
                sizes.start(),
                sizes.end()
            )));
        };
        Ok(match word {
            "fixed" => Chunking::Fixed { size },
            _ => Chunking::FastCdc { average: size },
        })
    }

    /// The word for it in settings and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Chunking::FastCdc { .. } => "fastcdc",
            Chunking::Fixed { .. } => "fixed",
        }
    }

    /// The size it was made with, in bytes.
    pub fn size(self) -> u64 {
        match self {
            Chunking::FastCdc { average } => average.into(),
            Chunking::Fixed { size } => size.into(),
        }
    }

    /// The longest chunk it makes, in bytes.
    pub fn chunk_bytes_max(self) -> u64 {
        match self {
            Chunking::FastCdc { average } => u64::from(average) * 4,
            Chunking::Fixed { size } => size.into(),
        }
    }

    /// Length of the first chunk of `data`, which is not empty and is either as long as the longest
    /// chunk or ends where the content ends.
    fn cut(self, data: &[u8]) -> usize {
        match self {
            Chunking::Fixed { size } => data.len().min(size as usize),
            Chunking::FastCdc { average } => {
                let average = average as usize;
                let cdc = fastcdc::v2020::FastCDC::new(data, average / 4, average, average * 4);
                let (_, end) = cdc.cut(0, data.len());
                end.clamp(1, data.len())
            }
        }
    }
}

/// A chunk as it comes out of a stream.
pub struct Piece<'a> {
    /// Its bytes.
    pub bytes: &'a [u8],
    /// Whether the stream ends with it. May be `false` for the last chunk of a stream that is
    /// longer than the longest chunk.
    pub is_last: bool,
}

/// Cuts one stream after another into chunks, in a buffer of its own that it keeps.
pub struct Splitter {
    chunking: Chunking,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    at_eof: bool,
}

/// Smallest buffer: short reads cost more than the memory.
const BUFFER_BYTES_MIN: usize = 1 << 20;

impl Splitter {
    /// A splitter for any number of streams.
    pub fn new(chunking: Chunking) -> Splitter {
        Splitter { chunking, buffer: Vec::new(), start: 0, end: 0, at_eof: false }
    }

    /// Forgets what is left of the stream before; the next call of [`Splitter::next`] starts one.
    pub fn restart(&mut self) {
        (self.start, self.end, self.at_eof) = (0, 0, false);
    }

    /// The next chunk of the stream that `reader` gives, or `None` at its end.
    pub fn next(&mut self, reader: &mut impl Read) -> io::Result<Option<Piece<'_>>> {
        let longest = usize::try_from(self.chunking.chunk_bytes_max()).unwrap_or(usize::MAX);
        if !self.at_eof && self.end - self.start < longest {
            self.fill(reader, longest)?;
        }
        let data = self.buffer.get(self.start..self.end).unwrap_or_default();
        if data.is_empty() {
            return Ok(None);
        }
        let len = self.chunking.cut(data);
        self.start += len;
        let is_last = self.at_eof && self.start == self.end;
        let bytes = self.buffer.get(self.start - len..self.start).unwrap_or_default();
        Ok(Some(Piece { bytes, is_last }))
    }

    /// Moves what is left to the front and reads until the longest chunk is there or the end.
    fn fill(&mut self, reader: &mut impl Read, longest: usize) -> io::Result<()> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let capacity = BUFFER_BYTES_MIN.max(longest * 2);
        if self.buffer.len() < capacity {
            self.buffer.resize(capacity, 0);
        }
        while self.end < capacity {
            let free = self.buffer.get_mut(self.end..).unwrap_or_default();
            match reader.read(free) {
                Ok(0) => {
                    self.at_eof = true;
                    break;
                }
                Ok(n) => self.end += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            if self.end >= longest {
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(chunking: Chunking, data: &[u8]) -> Vec<Vec<u8>> {
        let mut splitter = Splitter::new(chunking);
        let mut reader = data;
        let mut chunks = Vec::new();
        while let Some(chunk) = splitter.next(&mut reader).unwrap() {
            chunks.push(chunk.bytes.to_vec());
        }
        chunks
    }

    fn noise(len: usize, mut seed: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let [.., top] = seed.to_le_bytes();
            bytes.push(top);
        }
        bytes
    }

    proptest! {
        #[test]
        fn every_chunking_has_its_word_and_size(size: u64, small in 0u64..=1 << 30) {
            for word in ["fastcdc", "fixed"] {
                for size in [size, small] {
                    if let Ok(chunking) = Chunking::new(word, size) {
                        prop_assert_eq!((chunking.as_str(), chunking.size()), (word, size));
                    }
                }
            }
        }

        #[test]
        fn chunks_put_together_are_the_content(len in 0usize..300_000, seed: u64) {
            let data = noise(len, seed);
            for chunking in [
                Chunking::FastCdc { average: 4096 },
                Chunking::Fixed { size: 4096 },
            ] {
                let chunks = split(chunking, &data);
                prop_assert!(chunks.iter().all(|it| it.len() as u64 <= chunking.chunk_bytes_max()));
                prop_assert_eq!(chunks.concat(), data.clone());
            }
        }
    }

    #[test]
    fn an_insertion_changes_few_chunks() {
        let data = noise(4 << 20, 7);
        let mut edited = data.clone();
        edited.splice(1_000_000..1_000_000, *b"inserted");
        let chunking = Chunking::FastCdc { average: 16 << 10 };
        let before: std::collections::HashSet<_> = split(chunking, &data).into_iter().collect();
        let after = split(chunking, &edited);
        let new = after.iter().filter(|it| !before.contains(*it)).count();
        assert!(new <= 3, "{new} new chunks of {}", after.len());
    }

    #[test]
    fn the_way_a_reader_cuts_its_answers_does_not_matter() {
        struct Dribble<'a>(&'a [u8]);
        impl Read for Dribble<'_> {
            fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
                let n = out.len().min(self.0.len()).min(777);
                self.0.read(&mut out[..n])
            }
        }
        let data = noise(3 << 20, 3);
        let chunking = Chunking::FastCdc { average: 64 << 10 };
        let mut splitter = Splitter::new(chunking);
        let mut reader = Dribble(&data);
        let mut chunks = Vec::new();
        while let Some(chunk) = splitter.next(&mut reader).unwrap() {
            chunks.push(chunk.bytes.to_vec());
        }
        assert_eq!(chunks, split(chunking, &data));
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert!(Chunking::new("fastcdc", 1 << 30).is_err());
        assert!(Chunking::new("fixed", 128 << 20).is_ok());
        assert!(Chunking::new("rabin", 1 << 20).is_err());
    }
}
