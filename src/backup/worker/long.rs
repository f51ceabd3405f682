//! Reading in chunks that are too long for the splitter's buffer: fixed ones of many mebibytes.
//!
//! A chunk is never held in memory whole. The file's hash is of the bytes that count, and a chunk's
//! name is the hash of what was stored, however the file changes between two readings.

use std::io::Read;

use super::{CHUNK_IN_MEMORY_MAX, Stop, Target, Worker};
use crate::backup::layout::{Layout, Range};
use crate::chunk::file_hash::FileHash;
use crate::chunk::frame::FRAME_PLAIN_BYTES_MAX;
use crate::chunk::{ChunkId, ChunkRef};

impl Worker<'_, '_> {
    /// Reads what is small beside the longest chunk, or cannot be read twice: in chunks that memory
    /// can hold.
    pub(super) fn read_whole_chunks(
        &mut self,
        reader: &mut impl Read,
        content: &mut Layout,
        hash: &mut FileHash,
        target: &mut Target,
    ) -> Result<(), Stop> {
        loop {
            let mut bytes = Vec::new();
            let longest = CHUNK_IN_MEMORY_MAX.min(self.chunking.chunk_bytes_max());
            let read = reader.by_ref().take(longest).read_to_end(&mut bytes);
            read.map_err(|e| Stop::File("reading it", e))?;
            if bytes.is_empty() {
                return Ok(());
            }
            let id = self.hash.hash(&bytes);
            let is_last = (bytes.len() as u64) < longest;
            hash.add(&bytes, &id, is_last);
            self.add_chunk(&bytes, id, content, target)?;
            self.progress.check()?;
        }
    }

    /// Reads with chunks that are too long for memory: first to know a chunk's name, then, if it is
    /// new, to store it. The file's hash is of the bytes that count: those that the chunk's name
    /// stands for if it is known, those that were stored if not.
    pub(super) fn read_long_chunks(
        &mut self,
        reader: &mut Range<'_>,
        content: &mut Layout,
        hash: &mut FileHash,
        target: &mut Target,
    ) -> Result<(), Stop> {
        let mut buffer = vec![0; FRAME_PLAIN_BYTES_MAX as usize];
        loop {
            let start = reader.at;
            let end = start.saturating_add(self.chunking.chunk_bytes_max()).min(reader.end);
            let mut part = Range { file: reader.file, at: start, end };
            let mut hasher = self.hash.hasher();
            let mut hash_if_known = hash.clone();
            loop {
                let n = part.read_full(&mut buffer).map_err(|e| Stop::File("reading it", e))?;
                let bytes = buffer.get(..n).unwrap_or_default();
                if n == 0 {
                    break;
                }
                hasher.update(bytes);
                hash_if_known.add_bytes(bytes);
                self.count(n as u64);
                self.progress.check()?;
            }
            let (len, id) = (part.at - start, hasher.finish());
            if len == 0 {
                return Ok(());
            }
            if let Some(place) = self.find_chunk(&id, content, target)? {
                *hash = hash_if_known;
                content.add_at(place, len);
                reader.at = part.at;
                continue;
            }
            let mut part = Range { file: reader.file, at: start, end: part.at };
            self.store_long_chunk(&mut part, &mut buffer, id, content, hash, target)?;
            reader.at = part.at;
        }
    }

    /// Stores what is left of `part` as one chunk, which was claimed as `id`. If the file has
    /// become shorter or unreadable meanwhile, the chunk ends there: a block cannot end within one.
    fn store_long_chunk(
        &mut self,
        part: &mut Range<'_>,
        buffer: &mut [u8],
        id: ChunkId,
        content: &mut Layout,
        hash: &mut FileHash,
        target: &mut Target,
    ) -> Result<(), Stop> {
        if let Target::Own(block) = target {
            self.blocks.make_room_for_chunk(block, part.end - part.at)?;
        }
        let mut hasher = self.hash.hasher();
        let (mut first, mut failure, mut len) = (None, None, 0u64);
        while part.at < part.end {
            let n = match part.read_full(buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) => {
                    failure = Some(e);
                    break;
                }
            };
            let bytes = buffer.get(..n).unwrap_or_default();
            hasher.update(bytes);
            hash.add_bytes(bytes);
            self.batch.clear();
            let (frame, stored) = self.encoder.encode(bytes)?;
            self.batch.push(frame, stored);
            let place = self.append_batch(target)?;
            first.get_or_insert(place);
            len += n as u64;
            self.progress.check()?;
        }
        self.batch.clear();
        // What was written counts: if the file changed between the readings, its name is another
        // one. Placed before the claim is taken back, so that nobody who waits stores it again.
        let stored = hasher.finish();
        if let Some(place) = first {
            let len_in_block = u32::try_from(len).unwrap_or(u32::MAX);
            self.batch.chunks.push(ChunkRef { id: stored, len: len_in_block });
            self.append_batch(target)?;
            self.chunks.place(place, &self.batch.chunks)?;
            content.add_at(place, len);
        }
        if first.is_none() || stored != id {
            self.chunks.release(&id)?;
        }
        match failure {
            Some(e) => Err(Stop::File("reading it", e)),
            None => Ok(()),
        }
    }
}
