//! What is inside a block, and its record in the volume index.
//!
//! A block is the plain concatenation of its stored frames. Its plain content is the concatenation
//! of the frames' plain contents, and that is cut into chunks without gap: so two lists, frames and
//! chunks in order, say everything, and every position follows from lengths.

use std::io::{BufReader, Read};

use xxhash_rust::xxh3::xxh3_64;

use crate::chunk::frame::{self, Frame};
use crate::chunk::{ChunkId, ChunkRef, Digest};
use crate::error::{Error, ErrorKind, Result};
use crate::wire::{self, Reader};

/// The name of a block: the hash of its bytes.
pub type BlockId = Digest;

/// Most bytes that a block may have; what is larger is not a block of ours.
pub const BLOCK_BYTES_MAX: u64 = 1 << 30;

/// Everything there is to know of a block but where it lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockIndex {
    /// Its name.
    pub id: BlockId,
    /// Its frames in order.
    pub frames: Vec<Frame>,
    /// Its chunks in order.
    pub chunks: Vec<ChunkRef>,
}

impl BlockIndex {
    /// Length of the block file in bytes.
    pub fn stored_len(&self) -> u64 {
        self.frames.iter().map(|it| u64::from(it.stored_len)).sum()
    }

    /// Length of its plain content in bytes.
    pub fn plain_len(&self) -> u64 {
        self.frames.iter().map(|it| u64::from(it.plain_len)).sum()
    }

    /// The chunks with the plain offset at which each begins.
    pub fn placed_chunks(&self) -> impl Iterator<Item = (u64, ChunkRef)> + '_ {
        self.chunks.iter().scan(0u64, |next, chunk| {
            let offset = *next;
            *next += u64::from(chunk.len);
            Some((offset, *chunk))
        })
    }

    /// Whether frames and chunks cover the same bytes, within the limits.
    pub fn check(&self) -> Result<()> {
        let chunked: u64 = self.chunks.iter().map(|it| u64::from(it.len)).sum();
        let stored = self.stored_len();
        if chunked != self.plain_len() || stored == 0 || stored > BLOCK_BYTES_MAX {
            return Err(Error::corrupt(format!("block {}: its tables do not agree", self.id)));
        }
        Ok(())
    }
}

/// Version of the index record; the first byte of each. Version 1 had no number.
const RECORD_VERSION: u8 = 2;
/// Largest record that a reader accepts, in bytes.
const RECORD_BYTES_MAX: u32 = 256 << 20;
/// Greatest number of a block that a reader accepts: others have to follow it.
pub const BLOCK_NUMBER_MAX: u64 = 1 << 48;

/// What a record of the volume index says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The number that the block got in its catalog; records of version 1 do not say it.
    pub number: Option<u64>,
    /// What is inside the block.
    pub index: BlockIndex,
}

/// One record of the volume index: length of the body and its XXH3 (4 and 8 bytes, little-endian),
/// then the body: version, number of the block, its id, frame table, number of chunks, and id and
/// length of each.
pub fn encode_record(number: u64, block: &BlockIndex) -> Vec<u8> {
    let mut body = vec![RECORD_VERSION];
    wire::put_u64(&mut body, number);
    finish_record(body, block)
}

/// A record of version 1, for a block whose number is not known.
pub fn encode_old_record(block: &BlockIndex) -> Vec<u8> {
    finish_record(vec![1], block)
}

fn finish_record(mut body: Vec<u8>, block: &BlockIndex) -> Vec<u8> {
    body.extend_from_slice(&block.id.0);
    frame::put_frames(&mut body, &block.frames);
    wire::put_u64(&mut body, block.chunks.len() as u64);
    for chunk in &block.chunks {
        body.extend_from_slice(&chunk.id.0);
        wire::put_u64(&mut body, chunk.len.into());
    }
    let mut record = Vec::with_capacity(body.len() + 12);
    record.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    record.extend_from_slice(&xxh3_64(&body).to_le_bytes());
    record.append(&mut body);
    record
}

/// Reads a record's body.
fn decode_body(body: &[u8]) -> Result<Record> {
    let mut reader = Reader::new(body, "volume index record");
    let number = match reader.array()? {
        [1] => None,
        [RECORD_VERSION] => Some(reader.u64()?),
        [other] => {
            let message =
                format!("volume index record of version {other}: this program knows 1 and 2");
            return Err(Error::new(ErrorKind::Version, message));
        }
    };
    if number.is_some_and(|it| it == 0 || it > BLOCK_NUMBER_MAX) {
        return Err(Error::corrupt("volume index record: impossible number of a block"));
    }
    let id = Digest(reader.array()?);
    let frames = frame::get_frames(&mut reader)?;
    let count = reader.count(33)?;
    let mut chunks = Vec::with_capacity(count);
    for _ in 0..count {
        chunks.push(ChunkRef { id: ChunkId::from_slice(reader.take(32)?)?, len: reader.u32()? });
    }
    reader.finish()?;
    let block = BlockIndex { id, frames, chunks };
    block.check()?;
    Ok(Record { number, index: block })
}

/// Reads index records one after another.
pub struct RecordReader<R> {
    input: BufReader<R>,
    offset: u64,
}

impl<R: Read> RecordReader<R> {
    /// A reader whose first byte lies at `offset` of the index.
    pub fn new(input: R, offset: u64) -> RecordReader<R> {
        RecordReader { input: BufReader::with_capacity(1 << 16, input), offset }
    }

    /// Where the next record begins: all before it has been read and was whole.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next record; `None` at the end, and also where a record is cut short or does not match
    /// its check, which is what a crash while appending leaves.
    pub fn next_record(&mut self) -> Result<Option<Record>> {
        let mut head = [0; 12];
        if !self.read_whole(&mut head)? {
            return Ok(None);
        }
        let (len, check) = head.split_at(4);
        let len = u32::from_le_bytes(len.try_into().unwrap_or_default());
        let check = u64::from_le_bytes(check.try_into().unwrap_or_default());
        if len > RECORD_BYTES_MAX {
            return Ok(None);
        }
        let mut body = Vec::new();
        let got = self.input.by_ref().take(len.into()).read_to_end(&mut body);
        let got = got.map_err(|e| Error::io("reading a volume index", e))?;
        if got != len as usize || xxh3_64(&body) != check {
            return Ok(None);
        }
        self.offset += 12 + u64::from(len);
        decode_body(&body).map(Some)
    }

    fn read_whole(&mut self, out: &mut [u8]) -> Result<bool> {
        match self.input.read_exact(out) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(Error::io("reading a volume index", e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::HashAlgo;
    use crate::chunk::frame::{Codec, Compression, Encoder, FRAME_PLAIN_BYTES_MAX};
    use proptest::prelude::*;

    /// Any block whose two tables agree.
    fn any_block() -> impl Strategy<Value = BlockIndex> {
        let frame = (any::<bool>(), 1..=FRAME_PLAIN_BYTES_MAX, 1u32..1 << 20, any::<u64>());
        let frames = prop::collection::vec(frame, 1..40);
        (any::<[u8; 32]>(), frames, prop::collection::vec(1u32..1 << 22, 0..60)).prop_map(
            |(id, frames, cuts)| {
                let frames = frames.into_iter().map(|(raw, plain_len, stored_len, check)| {
                    let (codec, stored_len) = match raw {
                        true => (Codec::Raw, plain_len),
                        false => (Codec::Zstd, stored_len),
                    };
                    Frame { codec, stored_len, plain_len, check }
                });
                let mut block =
                    BlockIndex { id: Digest(id), frames: frames.collect(), chunks: Vec::new() };
                let mut left = block.plain_len();
                for cut in cuts.into_iter().chain([u32::MAX]) {
                    let len = u64::from(cut).min(left);
                    left -= len;
                    if len > 0 {
                        let id = HashAlgo::Blake3.hash(&len.to_le_bytes());
                        block.chunks.push(ChunkRef { id, len: u32::try_from(len).unwrap() });
                    }
                }
                block
            },
        )
    }

    proptest! {
        #[test]
        fn any_record_comes_back(blocks in prop::collection::vec(any_block(), 0..4)) {
            let log = log_of(&blocks);
            let mut reader = RecordReader::new(&log[..], 7);
            for (number, block) in (1..).zip(&blocks) {
                let got = reader.next_record()?.unwrap();
                prop_assert_eq!((got.number, &got.index), (Some(number), block));
            }
            prop_assert!(reader.next_record()?.is_none());
            prop_assert_eq!(reader.offset(), 7 + log.len() as u64);
        }

        #[test]
        fn any_log_is_read_or_refused(bytes: Vec<u8>) {
            let mut reader = RecordReader::new(&bytes[..], 0);
            while let Ok(Some(_)) = reader.next_record() {}
            prop_assert!(reader.offset() <= bytes.len() as u64);
        }

        #[test]
        fn any_body_is_read_or_refused(
            bytes: Vec<u8>,
            block in any_block(),
            at: prop::sample::Index,
        ) {
            let _ = decode_body(&bytes);
            // Nearly right is worse than nonsense.
            let mut body = encode_record(70, &block).split_off(12);
            let at = at.index(body.len());
            body[at] = body[at].wrapping_add(1);
            let _ = decode_body(&body);
            body.truncate(at);
            prop_assert!(decode_body(&body).is_err());
        }
    }

    /// Records of these blocks, which have the numbers from 1 on.
    fn log_of(blocks: &[BlockIndex]) -> Vec<u8> {
        (1..).zip(blocks).flat_map(|(number, it)| encode_record(number, it)).collect()
    }

    fn block(seed: u8) -> BlockIndex {
        let plain = vec![seed; 5000];
        let (frame, stored) = {
            let mut encoder = Encoder::new(Compression::Zstd(3)).unwrap();
            let (frame, stored) = encoder.encode(&plain).unwrap();
            (frame, stored.to_vec())
        };
        let id = HashAlgo::Blake3.hash(&stored);
        let chunk = |part: &[u8]| ChunkRef {
            id: HashAlgo::Blake3.hash(part),
            len: u32::try_from(part.len()).unwrap(),
        };
        let (one, two) = plain.split_at(1234);
        BlockIndex { id, frames: vec![frame], chunks: vec![chunk(one), chunk(two)] }
    }

    #[test]
    fn records_come_back_and_a_torn_tail_ends_the_reading() {
        let blocks = [block(1), block(2), block(3)];
        let log = log_of(&blocks);
        let ends: Vec<usize> = blocks
            .iter()
            .scan(0, |end, it| {
                *end += encode_record(1, it).len();
                Some(*end)
            })
            .collect();
        for cut in 0..=log.len() {
            let mut reader = RecordReader::new(&log[..cut], 0);
            let mut got = Vec::new();
            while let Some(it) = reader.next_record().unwrap() {
                got.push(it.index);
            }
            let whole = ends.iter().filter(|end| **end <= cut).count();
            assert_eq!(got, blocks[..whole]);
            let end = if whole == 0 { 0 } else { ends[whole - 1] };
            assert_eq!(reader.offset(), end as u64);
        }
    }

    #[test]
    fn a_changed_byte_is_never_read_as_a_record() {
        let good = block(1);
        let record = encode_record(9, &good);
        let good = Record { number: Some(9), index: good };
        for at in 0..record.len() {
            let mut bad = record.clone();
            bad[at] ^= 0x10;
            let got = RecordReader::new(&bad[..], 0).next_record();
            assert!(!matches!(got, Ok(Some(it)) if it != good));
        }
    }

    /// A record's length and check before its body.
    fn framed(body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(body.len()).unwrap().to_le_bytes();
        [&len[..], &xxh3_64(body).to_le_bytes(), body].concat()
    }

    #[test]
    fn records_of_before_have_no_number_and_impossible_numbers_are_refused() {
        let good = block(1);
        let body = encode_record(5, &good).split_off(12);
        let read = |body: &[u8]| RecordReader::new(&framed(body)[..], 0).next_record();
        let old = read(&[&[1], &body[2..]].concat()).unwrap().unwrap();
        assert_eq!(old, Record { number: None, index: good.clone() });
        for number in [0, BLOCK_NUMBER_MAX + 1, u64::MAX] {
            let body = encode_record(number, &good).split_off(12);
            assert_eq!(read(&body).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        let later = read(&[&[3], &body[1..]].concat());
        assert_eq!(later.unwrap_err().kind(), ErrorKind::Version);
    }
}
