//! What the bytes of a block say of themselves, where no index and no meta says it.
//!
//! The name of a block is the hash of its bytes, so that those are right can be told; where its
//! frames begin cannot always. A frame of ours that is compressed has a header of one form, and
//! what lies between is raw; but a raw frame may hold what looks like one. So a layout counts when
//! the files that it makes have their hashes, by the manifests, and else the block stays unknown.

use std::collections::{BTreeMap, BTreeSet};

use super::blocks::Repairs;
use super::{Notes, Source};
use crate::catalog::replay::Rebuild;
use crate::catalog::{Content, Extent, NumberSet};
use crate::chunk::file_hash::FileHash;
use crate::chunk::frame::{self, Codec, FRAME_PLAIN_BYTES_MAX, Frame};
use crate::chunk::{ChunkRef, HashAlgo};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::volume::block::BLOCK_BYTES_MAX;
use crate::volume::{BlockId, BlockIndex, CopyFault, Volume, verify_block};

/// Blocks and versions that are asked for at a time.
const PAGE: u64 = 256;
/// Longest chunk that is made of a stretch of bytes.
const CHUNK_BYTES_MAX: u64 = 16 << 20;
/// Bytes of a block that are at hand while its frames are looked for: more than any frame has.
const WINDOW_BYTES: usize = 4 << 20;

/// A table of raw frames over so many bytes, whose checks say nothing.
pub fn raw_frames(len: u64) -> Vec<Frame> {
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
    if len > BLOCK_BYTES_MAX {
        return Err(Error::corrupt(format!("block {id} is longer than any block can be")));
    }
    // Of the tables only the length counts here.
    let index = BlockIndex { id: *id, frames: raw_frames(len), chunks: Vec::new() };
    match verify_block(volume, &index, hash, &|_| Ok(())) {
        Ok(()) => Ok(()),
        Err(CopyFault::Source(e) | CopyFault::Target(e) | CopyFault::Stopped(e)) => Err(e),
    }
}

/// The frames of a block, as far as its bytes say; with `all_raw`, as if none were compressed.
fn frames_of(volume: &Volume, id: &BlockId, len: u64, all_raw: bool) -> Result<Vec<Frame>> {
    let (mut frames, mut at) = (Vec::new(), 0u64);
    let (mut window, mut window_at) = (Vec::new(), 0u64);
    let mut raw = Vec::new();
    while at < len {
        let used = usize::try_from(at - window_at).unwrap_or(usize::MAX);
        let is_short = window.len().saturating_sub(used) < WINDOW_BYTES / 2;
        if window.is_empty() || is_short && window_at + (window.len() as u64) < len {
            let size = usize::try_from((len - at).min(WINDOW_BYTES as u64)).unwrap_or_default();
            window.resize(size, 0);
            volume.store.read_at(id, at, &mut window)?;
            window_at = at;
            continue;
        }
        let rest = window.get(used..).unwrap_or_default();
        if !all_raw && let Some(found) = frame::find_compressed(rest) {
            flush_raw(&mut raw, &mut frames);
            at += u64::from(found.stored_len);
            frames.push(found);
            continue;
        }
        // To where the next one may begin.
        let skip = rest.get(1..).unwrap_or_default();
        let next = if all_raw { None } else { skip.windows(4).position(frame::is_magic) };
        let room = FRAME_PLAIN_BYTES_MAX as usize - raw.len();
        // The last bytes of a window may be the first of a magic number.
        let end = if window_at + (window.len() as u64) < len { rest.len() - 4 } else { rest.len() };
        let take = next.map_or(end.max(1), |it| it + 1).min(room).min(rest.len());
        raw.extend_from_slice(rest.get(..take).unwrap_or_default());
        at += take as u64;
        if raw.len() == FRAME_PLAIN_BYTES_MAX as usize {
            flush_raw(&mut raw, &mut frames);
        }
    }
    flush_raw(&mut raw, &mut frames);
    Ok(frames)
}

fn flush_raw(raw: &mut Vec<u8>, frames: &mut Vec<Frame>) {
    if !raw.is_empty() {
        frames.push(Frame::raw(raw));
        raw.clear();
    }
}

/// What was learned of a block, until it is known to be so.
struct Guess {
    number: u64,
    id: BlockId,
    len: u64,
    /// The sources that have it, by their places.
    at: Vec<usize>,
    frames: Vec<Frame>,
    is_all_raw: bool,
    plain_len_before: u64,
}

/// Learns what is in blocks that files need and nobody describes, if their files are there.
///
/// All of them are guessed first: a file may reach over several.
pub fn learn(
    rebuild: &Rebuild,
    sources: &[Source],
    repairs: &mut Repairs,
    hash: HashAlgo,
    notes: &mut Notes<'_>,
) -> Result<()> {
    let progress = notes.progress;
    let (mut guessed, mut after) = (NumberSet::default(), 0);
    loop {
        let page = rebuild.unknown_blocks(after, PAGE)?;
        let Some(last) = page.last() else { break };
        after = last.0;
        for (number, id) in page {
            progress.check()?;
            if guess(rebuild, sources, (number, id), hash, notes)? {
                guessed.insert(number);
            }
        }
    }
    for number in guessed.iter() {
        progress.check()?;
        let (id, frames, volumes) = rebuild.block(number)?;
        let has = |it: &(usize, &Source)| volumes.contains(&it.1.volume.config.number);
        let at = sources.iter().enumerate().filter(|it| it.1.is_used).filter(has).map(|it| it.0);
        let guess = Guess {
            number,
            id,
            len: frames.iter().map(|it| u64::from(it.stored_len)).sum(),
            at: at.collect(),
            is_all_raw: frames.iter().all(|it| it.codec == Codec::Raw),
            frames,
            plain_len_before: needed(rebuild, number)?.last().copied().unwrap_or(1),
        };
        settle(rebuild, sources, repairs, guess, hash, notes)?;
    }
    Ok(())
}

/// Takes in what the bytes of a block seem to say, if they are those of its name.
fn guess(
    rebuild: &Rebuild,
    sources: &[Source],
    (number, id): (u64, BlockId),
    hash: HashAlgo,
    notes: &mut Notes<'_>,
) -> Result<bool> {
    let (mut numbers, mut found) = (Vec::new(), None);
    for source in sources.iter().filter(|it| it.is_used) {
        let volume = &source.volume;
        let Some(len) = volume.store.len_of(&id).ok().flatten().filter(|it| *it > 0) else {
            continue;
        };
        match check_name(volume, &id, len, hash) {
            Ok(()) => {
                numbers.push(volume.config.number);
                found.get_or_insert((volume, len));
            }
            Err(e) => notes.add(&volume.config.path, &e),
        }
    }
    let Some((volume, len)) = found else { return Ok(false) };
    let frames = frames_of(volume, &id, len, false)?;
    rebuild.learn(number, &BlockIndex { id, frames, chunks: Vec::new() }, &numbers)?;
    Ok(true)
}

/// Where the pieces of files in a block begin and end.
fn needed(rebuild: &Rebuild, number: u64) -> Result<BTreeSet<u64>> {
    let (mut cuts, mut after) = (BTreeSet::new(), 0);
    loop {
        let page = rebuild.users_of(number, after, PAGE)?;
        let Some(last) = page.last() else { return Ok(cuts) };
        after = *last;
        for version in page {
            for extent in rebuild.content_of(version)?.extents {
                match extent {
                    Extent::Data { block, offset, len } if block == number => {
                        cuts.extend([offset, offset + len]);
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Keeps a layout that makes files of their hashes, or forgets it.
fn settle(
    rebuild: &Rebuild,
    sources: &[Source],
    repairs: &mut Repairs,
    mut guess: Guess,
    hash: HashAlgo,
    notes: &mut Notes<'_>,
) -> Result<()> {
    let Some(first) = guess.at.first().and_then(|it| sources.get(*it)) else { return Ok(()) };
    let numbers: Vec<i64> = guess
        .at
        .iter()
        .filter_map(|it| sources.get(*it))
        .map(|it| it.volume.config.number)
        .collect();
    let mut is_proved = false;
    for all_raw in [guess.is_all_raw, true] {
        if all_raw && !guess.is_all_raw {
            guess.frames = frames_of(&first.volume, &guess.id, guess.len, true)?;
        }
        let frames = guess.frames.clone();
        let index = BlockIndex { id: guess.id, frames, chunks: Vec::new() };
        if index.plain_len() < guess.plain_len_before {
            continue;
        }
        rebuild.learn(guess.number, &index, &numbers)?;
        is_proved = match makes_files(rebuild, sources, guess.number, hash, notes.progress)? {
            Some(is_so) => is_so,
            // Of files that reach into blocks which are not there; but there is nothing to doubt.
            None => guess.is_all_raw,
        };
        if is_proved || guess.is_all_raw {
            break;
        }
    }
    let path = &first.volume.config.path;
    if !is_proved {
        rebuild.unlearn(guess.number, guess.plain_len_before)?;
        let message = format!(
            "block {} is there, but neither index nor meta says how it is to be read, and its \
             bytes do not prove it",
            guess.id
        );
        notes.add(path, &Error::corrupt(message));
        return Ok(());
    }
    let chunks = chunks_of(rebuild, &first.volume, &guess, hash)?;
    let index = BlockIndex { id: guess.id, frames: guess.frames, chunks };
    index.check()?;
    for (at, volume) in guess.at.iter().zip(numbers) {
        let Some(source) = sources.get(*at) else { continue };
        let record = repairs.append((*at, &source.volume), &index, guess.number, notes)?;
        let Some((record_at, len)) = record else { continue };
        rebuild.put_learned(guess.number, &index, (volume, record_at))?;
        rebuild.put_index_len(volume, len)?;
    }
    let message = format!(
        "neither index nor meta says what is in block {}: its bytes say it, and the files that \
         they make have their hashes",
        guess.id
    );
    notes.add(path, &Error::new(ErrorKind::NotFound, message));
    Ok(())
}

/// Whether all files that use a block, and no other block of which nothing is known, have their
/// hashes; nothing if there are none.
fn makes_files(
    rebuild: &Rebuild,
    sources: &[Source],
    number: u64,
    hash: HashAlgo,
    progress: &Progress,
) -> Result<Option<bool>> {
    let (mut found, mut after) = (None, 0);
    let mut plain = Plain { rebuild, sources, blocks: BTreeMap::new(), frame: None };
    loop {
        let page = rebuild.users_of(number, after, PAGE)?;
        let Some(last) = page.last() else { return Ok(found) };
        after = *last;
        for version in page {
            progress.check()?;
            let content = rebuild.content_of(version)?;
            match plain.hash(&content, hash) {
                Ok(Some(it)) if Some(it) == content.hash => found = Some(true),
                Ok(Some(_)) => return Ok(Some(false)),
                Ok(None) => {}
                Err(e) if e.kind() == ErrorKind::Corrupt => return Ok(Some(false)),
                Err(e) => return Err(e),
            }
        }
    }
}

/// The chunks of a block: cut where pieces of files begin and end. Chunks of before, which were cut
/// by content, are not found again in longer pieces.
fn chunks_of(
    rebuild: &Rebuild,
    volume: &Volume,
    guess: &Guess,
    hash: HashAlgo,
) -> Result<Vec<ChunkRef>> {
    let mut cuts = needed(rebuild, guess.number)?;
    let end: u64 = guess.frames.iter().map(|it| u64::from(it.plain_len)).sum();
    cuts.extend((1..).map(|it| it * CHUNK_BYTES_MAX).take_while(|it| *it < end));
    cuts.insert(end);
    let mut cuts = cuts.into_iter().filter(|it| *it > 0 && *it <= end).peekable();
    let (mut chunks, mut hasher) = (Vec::new(), hash.hasher());
    let (mut stored_at, mut at, mut began) = (0u64, 0u64, 0u64);
    let (mut stored, mut plain) = (Vec::new(), Vec::new());
    for frame in &guess.frames {
        stored.resize(frame.stored_len as usize, 0);
        volume.store.read_at(&guess.id, stored_at, &mut stored)?;
        stored_at += u64::from(frame.stored_len);
        plain.clear();
        frame.decode(&stored, &mut plain)?;
        let mut rest = &*plain;
        while let Some(cut) = cuts.peek().copied() {
            let take = usize::try_from(cut - at).unwrap_or(usize::MAX).min(rest.len());
            let (part, later) = rest.split_at(take);
            hasher.update(part);
            at += take as u64;
            rest = later;
            if at < cut {
                break;
            }
            cuts.next();
            let id = std::mem::replace(&mut hasher, hash.hasher()).finish();
            let len = u32::try_from(at - began);
            let len = len.map_err(|_| Error::corrupt("a chunk that is too long"))?;
            chunks.push(ChunkRef { id, len });
            began = at;
        }
    }
    Ok(chunks)
}

/// Bytes of blocks' plain contents, a frame at a time.
struct Plain<'a> {
    rebuild: &'a Rebuild,
    sources: &'a [Source],
    blocks: BTreeMap<u64, (BlockId, Vec<Frame>, Vec<i64>)>,
    frame: Option<(u64, u64, Vec<u8>)>,
}

/// Blocks whose frames are remembered.
const BLOCKS_MAX: usize = 8;

impl Plain<'_> {
    /// The hash of a content; nothing if it needs a block of which nothing is known.
    fn hash(&mut self, content: &Content, hash: HashAlgo) -> Result<Option<crate::chunk::Digest>> {
        let has_holes = content.extents.iter().any(|it| matches!(it, Extent::Hole { .. }));
        let mut file = match has_holes {
            true => FileHash::of_segments(hash),
            false => FileHash::of_content(hash),
        };
        let (mut at, mut was_hole) = (0u64, true);
        for (n, extent) in content.extents.iter().enumerate() {
            if let Extent::Data { block, offset, len } = *extent {
                if has_holes && was_hole {
                    let later = content.extents.get(n..).unwrap_or_default();
                    let segment = later
                        .iter()
                        .take_while(|it| matches!(it, Extent::Data { .. }))
                        .map(Extent::len)
                        .sum();
                    file.begin_segment(at, segment);
                }
                if !self.add(&mut file, block, offset..offset + len)? {
                    return Ok(None);
                }
            }
            was_hole = matches!(extent, Extent::Hole { .. });
            at += extent.len();
        }
        Ok(Some(if has_holes { file.finish_segments(at) } else { file.finish() }))
    }

    fn add(
        &mut self,
        file: &mut FileHash,
        number: u64,
        range: std::ops::Range<u64>,
    ) -> Result<bool> {
        if !self.blocks.contains_key(&number) {
            if self.blocks.len() >= BLOCKS_MAX {
                self.blocks.clear();
            }
            self.blocks.insert(number, self.rebuild.block(number)?);
        }
        let Some((id, frames, volumes)) = self.blocks.get(&number) else { return Ok(false) };
        let has = |it: &&Source| volumes.contains(&it.volume.config.number);
        let Some(source) = self.sources.iter().filter(|it| it.is_used).find(has) else {
            return Ok(false);
        };
        let (mut stored_at, mut at) = (0u64, 0u64);
        for frame in frames {
            let end = at + u64::from(frame.plain_len);
            if at < range.end && end > range.start {
                let is_it = |it: &(u64, u64, Vec<u8>)| (it.0, it.1) == (number, stored_at);
                if !self.frame.as_ref().is_some_and(is_it) {
                    let mut stored = vec![0; frame.stored_len as usize];
                    source.volume.store.read_at(id, stored_at, &mut stored)?;
                    let mut plain = Vec::new();
                    frame.decode(&stored, &mut plain)?;
                    self.frame = Some((number, stored_at, plain));
                }
                let plain = self.frame.as_ref().map(|it| &*it.2).unwrap_or_default();
                let cut = |it: u64| usize::try_from(it.saturating_sub(at)).unwrap_or(usize::MAX);
                let part = plain.get(cut(range.start)..cut(range.end).min(plain.len()));
                file.add_bytes(part.unwrap_or_default());
            }
            stored_at += u64::from(frame.stored_len);
            at = end;
        }
        match at >= range.end {
            true => Ok(!frames.is_empty()),
            false if frames.is_empty() => Ok(false),
            false => Err(Error::corrupt("a file reaches beyond its block")),
        }
    }
}
