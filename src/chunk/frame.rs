//! Frames: the unit of compression in a block.
//!
//! A frame holds one stretch of at most [`FRAME_PLAIN_BYTES_MAX`] plain bytes: many small chunks,
//! or a part of a large one. Its stored form is the bytes themselves (raw) or one zstd frame as RFC
//! 8878 defines it, so a block of such frames is what `zstdcat` reads. Codec, lengths and an XXH3
//! check of the stored bytes are kept in the frame table, not in the frame.

use std::cell::RefCell;
use std::str::FromStr;

use xxhash_rust::xxh3::xxh3_64;
use zstd::stream::raw::{InBuffer, Operation, OutBuffer};

use crate::error::{Error, Result};
use crate::wire::{self, Reader};

/// The most plain bytes that one frame holds. Reading a byte never costs more than one frame.
pub const FRAME_PLAIN_BYTES_MAX: u32 = 1 << 20;

/// How a frame's stored bytes give its plain bytes. The numbers are part of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// The plain bytes themselves.
    Raw = 0,
    /// One zstd frame.
    Zstd = 1,
}

impl Codec {
    /// The word for it in metas.
    pub fn as_str(self) -> &'static str {
        match self {
            Codec::Raw => "raw",
            Codec::Zstd => "zstd",
        }
    }
}

impl FromStr for Codec {
    type Err = Error;

    fn from_str(word: &str) -> Result<Codec> {
        match word {
            "raw" => Ok(Codec::Raw),
            "zstd" => Ok(Codec::Zstd),
            _ => {
                Err(Error::new(crate::error::ErrorKind::Version, format!("unknown codec {word:?}")))
            }
        }
    }
}

/// What a frame table says of one frame. Where it lies follows from the frames before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// How it is stored.
    pub codec: Codec,
    /// Its length in the block file, in bytes.
    pub stored_len: u32,
    /// Its plain length, in bytes.
    pub plain_len: u32,
    /// XXH3 (64 bits) of the stored bytes.
    pub check: u64,
}

impl Frame {
    /// The plain bytes that `stored` stands for, appended to `plain`; damage is an error.
    pub fn decode(&self, stored: &[u8], plain: &mut Vec<u8>) -> Result<()> {
        let start = plain.len();
        plain.resize(start + self.plain_len as usize, 0);
        self.decode_to(stored, plain.get_mut(start..).unwrap_or_default())
    }

    /// Fills `plain`, which is as long as the frame's plain content, with what `stored` stands
    /// for. Damage is an error, and then `plain` holds nothing of worth.
    pub fn decode_to(&self, stored: &[u8], plain: &mut [u8]) -> Result<()> {
        self.verify(stored)?;
        if plain.len() != self.plain_len as usize {
            return Err(Error::usage("a buffer that does not fit a frame"));
        }
        match self.codec {
            Codec::Raw => plain.copy_from_slice(stored),
            Codec::Zstd => {
                let len = decompress(stored, plain)
                    .map_err(|e| Error::corrupt(format!("frame does not decompress: {e}")))?;
                if len != plain.len() {
                    return Err(Error::corrupt("frame has the wrong plain length"));
                }
            }
        }
        Ok(())
    }

    /// Fills `plain`, which is no longer than the frame's plain content, with how that begins. What
    /// comes later is not decompressed, at the price of a further copy.
    pub fn decode_start(&self, stored: &[u8], plain: &mut [u8]) -> Result<()> {
        self.verify(stored)?;
        let done = match self.codec {
            Codec::Raw => stored.get(..plain.len()).map(|start| plain.copy_from_slice(start)),
            Codec::Zstd => decompress_start(stored, plain)
                .map_err(|e| Error::corrupt(format!("frame does not decompress: {e}")))?,
        };
        done.ok_or_else(|| Error::corrupt("frame has the wrong plain length"))
    }

    /// Whether `stored` is what was written.
    pub fn verify(&self, stored: &[u8]) -> Result<()> {
        match stored.len() == self.stored_len as usize && xxh3_64(stored) == self.check {
            true => Ok(()),
            false => Err(Error::corrupt("frame does not match its check")),
        }
    }
}

impl Frame {
    /// The frame of plain bytes that are stored as they are.
    pub fn raw(plain: &[u8]) -> Frame {
        let len = u32::try_from(plain.len()).unwrap_or(u32::MAX);
        Frame { codec: Codec::Raw, stored_len: len, plain_len: len, check: xxh3_64(plain) }
    }
}

/// Whether a compressed frame may begin with these bytes.
pub fn is_magic(bytes: &[u8]) -> bool {
    bytes == zstd::zstd_safe::MAGICNUMBER.to_le_bytes()
}

/// The compressed frame that `bytes` begin with, if it has the form of those that are made here: it
/// says its plain length, has no check of its own, names no dictionary, and saves what it has to.
pub fn find_compressed(bytes: &[u8]) -> Option<Frame> {
    let (magic, descriptor) = (bytes.get(..4)?, *bytes.get(4)?);
    // No check, no dictionary; see RFC 8878, 3.1.1.1.1.
    if !is_magic(magic) || descriptor & 0b0001_1111 != 0 {
        return None;
    }
    let plain_len = zstd::zstd_safe::get_frame_content_size(bytes).ok()??;
    let plain_len = u32::try_from(plain_len).ok()?;
    if plain_len == 0 || plain_len > FRAME_PLAIN_BYTES_MAX {
        return None;
    }
    let stored_len = zstd::zstd_safe::find_frame_compressed_size(bytes).ok()?;
    let stored = bytes.get(..stored_len)?;
    if stored_len >= plain_len as usize - plain_len as usize / SAVING_MIN {
        return None;
    }
    let stored_len = u32::try_from(stored_len).ok()?;
    let frame = Frame { codec: Codec::Zstd, stored_len, plain_len, check: xxh3_64(stored) };
    frame.decode(stored, &mut Vec::new()).ok().map(|()| frame)
}

thread_local! {
    /// Making the state for each frame anew takes longer than decompressing a small one.
    static DECOMPRESSOR: RefCell<zstd::bulk::Decompressor<'static>> = RefCell::default();
    static STREAM: RefCell<Option<zstd::stream::raw::Decoder<'static>>> =
        const { RefCell::new(None) };
}

/// Fills `plain` with the start of what `stored` stands for; `None` if that is shorter.
fn decompress_start(stored: &[u8], plain: &mut [u8]) -> std::io::Result<Option<()>> {
    STREAM.with_borrow_mut(|kept| {
        let mut decoder = match kept.take() {
            Some(decoder) => decoder,
            None => zstd::stream::raw::Decoder::new()?,
        };
        decoder.reinit()?;
        let len = plain.len();
        let mut input = InBuffer::around(stored);
        let mut output = OutBuffer::around(plain);
        while output.pos() < len {
            let before = (input.pos(), output.pos());
            let wants = decoder.run(&mut input, &mut output)?;
            if wants == 0 || before == (input.pos(), output.pos()) {
                break;
            }
        }
        let is_full = output.pos() == len;
        // One that has failed is not used again.
        *kept = Some(decoder);
        Ok(is_full.then_some(()))
    })
}

fn decompress(stored: &[u8], plain: &mut [u8]) -> std::io::Result<usize> {
    DECOMPRESSOR.with_borrow_mut(|it| it.decompress_to_buffer(stored, plain))
}

/// Appends a frame table: the number of frames, then codec, stored length, plain length and check
/// (8 bytes, little-endian) of each.
pub fn put_frames(out: &mut Vec<u8>, frames: &[Frame]) {
    wire::put_u64(out, frames.len() as u64);
    for frame in frames {
        out.push(frame.codec as u8);
        wire::put_u64(out, frame.stored_len.into());
        wire::put_u64(out, frame.plain_len.into());
        out.extend_from_slice(&frame.check.to_le_bytes());
    }
}

/// Reads what [`put_frames`] wrote.
pub fn get_frames(reader: &mut Reader<'_>) -> Result<Vec<Frame>> {
    let count = reader.count(11)?;
    let mut frames = Vec::with_capacity(count);
    for _ in 0..count {
        let codec = match reader.array::<1>()? {
            [0] => Codec::Raw,
            [1] => Codec::Zstd,
            [other] => {
                let message = format!("frame codec {other} is not known to this program");
                return Err(Error::new(crate::error::ErrorKind::Version, message));
            }
        };
        let stored_len = reader.u32()?;
        let plain_len = reader.u32()?;
        let check = u64::from_le_bytes(reader.array()?);
        let raw_lengths_differ = codec == Codec::Raw && stored_len != plain_len;
        if plain_len == 0 || plain_len > FRAME_PLAIN_BYTES_MAX || raw_lengths_differ {
            return Err(Error::corrupt("frame table: impossible length"));
        }
        frames.push(Frame { codec, stored_len, plain_len, check });
    }
    Ok(frames)
}

/// Whether and how hard a catalog compresses. Settled at `init`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Every frame is raw.
    None,
    /// zstd at this level, 1 to 19.
    Zstd(i32),
}

impl Compression {
    /// What an encoder takes of memory beyond its output, in bytes, for frames of the largest size.
    pub fn memory_bytes(self) -> u64 {
        match self {
            Compression::None => 0,
            Compression::Zstd(..=5) => 5 << 20,
            Compression::Zstd(6..=12) => 12 << 20,
            Compression::Zstd(_) => 32 << 20,
        }
    }

    /// The word for it in settings and on the command line.
    pub fn to_word(self) -> String {
        match self {
            Compression::None => "none".to_owned(),
            Compression::Zstd(level) => format!("zstd:{level}"),
        }
    }
}

impl FromStr for Compression {
    type Err = Error;

    fn from_str(word: &str) -> Result<Compression> {
        let level = match word.split_once(':') {
            None if word == "none" => return Ok(Compression::None),
            None if word == "zstd" => Some(3),
            Some(("zstd", level)) => level.parse().ok().filter(|it| (1..=19).contains(it)),
            _ => None,
        };
        level.map(Compression::Zstd).ok_or_else(|| {
            Error::usage(format!(
                "unknown compression {word:?}: use none, zstd or zstd:1 to zstd:19"
            ))
        })
    }
}

/// Encodes frames, keeping its buffers and the compressor's state from one to the next.
pub struct Encoder {
    compressor: Option<zstd::bulk::Compressor<'static>>,
    probe: Option<zstd::bulk::Compressor<'static>>,
    out: Vec<u8>,
}

/// A frame is stored compressed when that saves at least one part in this many.
const SAVING_MIN: usize = 32;
/// Frames from this length on are judged by a sample before the whole is compressed.
const PROBE_FROM_BYTES: usize = 64 << 10;
/// Length of the sample.
const PROBE_BYTES: usize = 16 << 10;

impl Encoder {
    /// An encoder for frames of one catalog.
    pub fn new(compression: Compression) -> Result<Encoder> {
        let make = |level| {
            zstd::bulk::Compressor::new(level)
                .map_err(|e| Error::io("setting up the compressor", e))
        };
        let (compressor, probe) = match compression {
            Compression::None => (None, None),
            Compression::Zstd(level) => (Some(make(level)?), Some(make(1)?)),
        };
        Ok(Encoder { compressor, probe, out: Vec::new() })
    }

    /// Encodes `plain` (1 to [`FRAME_PLAIN_BYTES_MAX`] bytes); gives the table's row and the bytes
    /// to store.
    pub fn encode<'a>(&'a mut self, plain: &'a [u8]) -> Result<(Frame, &'a [u8])> {
        let plain_len = u32::try_from(plain.len()).unwrap_or(u32::MAX);
        if plain_len == 0 || plain_len > FRAME_PLAIN_BYTES_MAX {
            return Err(Error::usage(format!("a frame of {} bytes", plain.len())));
        }
        let (codec, stored) = match self.compress(plain)? {
            Some(len) => (Codec::Zstd, self.out.get(..len).unwrap_or_default()),
            None => (Codec::Raw, plain),
        };
        let stored_len = u32::try_from(stored.len()).unwrap_or(u32::MAX);
        Ok((Frame { codec, stored_len, plain_len, check: xxh3_64(stored) }, stored))
    }

    /// Compresses into `self.out` and gives the length, or `None` when that does not pay.
    fn compress(&mut self, plain: &[u8]) -> Result<Option<usize>> {
        let (Some(compressor), Some(probe)) = (&mut self.compressor, &mut self.probe) else {
            return Ok(None);
        };
        let failed = |e| Error::io("compressing a frame", e);
        self.out.resize(zstd::zstd_safe::compress_bound(plain.len()), 0);
        if plain.len() >= PROBE_FROM_BYTES {
            // The middle says more about the whole than the start, where headers are.
            let middle = (plain.len() - PROBE_BYTES) / 2;
            let sample = plain.get(middle..middle + PROBE_BYTES).unwrap_or_default();
            let first = plain.get(..PROBE_BYTES).unwrap_or_default();
            let mut saved = false;
            for part in [sample, first] {
                let len = probe.compress_to_buffer(part, &mut self.out[..]).map_err(failed)?;
                saved |= len < part.len() - part.len() / SAVING_MIN;
            }
            if !saved {
                return Ok(None);
            }
        }
        let len = compressor.compress_to_buffer(plain, &mut self.out[..]).map_err(failed)?;
        Ok((len < plain.len() - plain.len() / SAVING_MIN).then_some(len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(compression: Compression, plain: &[u8]) -> (Frame, Vec<u8>) {
        let mut encoder = Encoder::new(compression).unwrap();
        let (frame, stored) = encoder.encode(plain).unwrap();
        (frame, stored.to_vec())
    }

    fn bytes(len_max: usize) -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 1..len_max)
    }

    proptest! {
        #[test]
        fn frames_come_back(part in bytes(5000), copies in 1usize..50) {
            let plain = part.repeat(copies);
            for compression in [Compression::None, Compression::Zstd(3)] {
                let (frame, stored) = encode(compression, &plain);
                let mut out = Vec::new();
                frame.decode(&stored, &mut out)?;
                prop_assert_eq!(&out, &plain);
                let mut start = vec![0; plain.len() * part.len() / 5000];
                frame.decode_start(&stored, &mut start)?;
                prop_assert_eq!(&start[..], &plain[..start.len()]);
                let mut more = vec![0; plain.len() + 1];
                prop_assert!(frame.decode_start(&stored, &mut more).is_err());
                let mut table = Vec::new();
                put_frames(&mut table, &[frame, frame]);
                let mut reader = Reader::new(&table, "test");
                prop_assert_eq!(get_frames(&mut reader)?, vec![frame, frame]);
                reader.finish()?;
            }
        }

        #[test]
        fn a_flipped_bit_is_found(plain in bytes(2000), at: prop::sample::Index) {
            for compression in [Compression::None, Compression::Zstd(3)] {
                let (frame, mut stored) = encode(compression, &plain.repeat(10));
                let at = at.index(stored.len());
                stored[at] ^= 1;
                prop_assert!(frame.decode(&stored, &mut Vec::new()).is_err());
                prop_assert!(frame.decode_start(&stored, &mut [0; 1]).is_err());
            }
        }

        #[test]
        fn any_table_is_read_or_refused(bytes: Vec<u8>) {
            let _ = get_frames(&mut Reader::new(&bytes, "test"));
        }

        #[test]
        fn any_frame_is_decoded_or_refused(
            stored in prop::collection::vec(any::<u8>(), 0..300),
            plain_len in 1..=FRAME_PLAIN_BYTES_MAX,
            at: prop::sample::Index,
        ) {
            // Nonsense and what is nearly right, both with a check that matches.
            let text = [&stored[..], b"so that it is not empty"].concat().repeat(100);
            let (_, mut near) = encode(Compression::Zstd(3), &text);
            if let Some(byte) = near.get_mut(at.index(stored.len().max(1))) {
                *byte ^= 0x40;
            }
            for stored in [&stored, &near] {
                let stored_len = u32::try_from(stored.len()).unwrap();
                let frame =
                    Frame { codec: Codec::Zstd, stored_len, plain_len, check: xxh3_64(stored) };
                let mut plain = vec![1, 2, 3];
                if frame.decode(stored, &mut plain).is_ok() {
                    prop_assert_eq!(plain.len(), 3 + plain_len as usize);
                }
            }
        }
    }

    #[test]
    fn every_codec_and_compression_has_its_word() {
        for codec in [Codec::Raw, Codec::Zstd] {
            assert_eq!(codec.as_str().parse::<Codec>().unwrap(), codec);
        }
        for compression in (1..=19).map(Compression::Zstd).chain([Compression::None]) {
            assert_eq!(compression.to_word().parse::<Compression>().unwrap(), compression);
        }
        for word in ["", "zstd:", "zstd:0", "zstd:20", "zstd:-1", "none:1", "lz4"] {
            assert!(word.parse::<Compression>().is_err(), "{word}");
        }
    }

    #[test]
    fn text_is_compressed_and_noise_is_not() {
        let text = b"all work and no play makes jack a dull boy\n".repeat(10_000);
        assert_eq!(encode(Compression::Zstd(3), &text).0.codec, Codec::Zstd);
        let mut noise = vec![0; 200_000];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        assert_eq!(encode(Compression::Zstd(3), &noise).0.codec, Codec::Raw);
        assert_eq!(encode(Compression::None, &text).0.codec, Codec::Raw);
    }
}
