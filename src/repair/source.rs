//! What a block has lost, out of the files that were backed up.
//!
//! A chunk is believed when its bytes have its name, wherever they were found; so a file that has
//! changed since gives what is unchanged in it, and nothing else.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::Work;
use super::block::{Patient, Place};
use crate::catalog::{Extent, VersionId};
use crate::chunk::ChunkRef;
use crate::chunk::frame::Encoder;
use crate::error::{Error, Result};
use crate::sys;

/// Bytes read at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Stretches of the plain content that were brought back, as (start, end).
pub type Found = Vec<(u64, u64)>;

impl Work<'_> {
    /// Looks in the files that use the lost parts of a block for its chunks, and writes what is
    /// found at its place in the plain content to `out`.
    pub fn recover(&self, patient: &Patient<'_>, out: &File) -> Result<Found> {
        let lost = patient.lost();
        let touches = |at: u64, len: u64| lost.iter().any(|it| at < it.1 && it.0 < at + len);
        let placed = patient.index.placed_chunks();
        let placed = placed.filter(|(at, chunk)| touches(*at, chunk.len.into()));
        let mut wanted: Vec<(u64, ChunkRef)> = placed.collect();
        let mut found = Found::new();
        for number in patient.numbers.iter().rev() {
            let mut before = VersionId::MAX;
            while !wanted.is_empty() {
                // The newest first: what is there now is most likely that.
                let Some(version) = self.store.reader.user_before(*number, before)? else { break };
                before = version;
                self.progress.check()?;
                let places = self.places_in(version, *number, &wanted)?;
                if places.is_empty() {
                    continue;
                }
                for path in self.source_paths(version)? {
                    let Some(file) = open(&path) else { continue };
                    for (file_at, at, chunk) in &places {
                        if !wanted.iter().any(|it| it.0 == *at) {
                            continue;
                        }
                        if self.take_chunk(&file, *file_at, *at, chunk, out)? {
                            wanted.retain(|it| it.0 != *at);
                            found.push((*at, at + u64::from(chunk.len)));
                        }
                    }
                    break;
                }
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Where a version has wanted chunks: offset in the file, in the block, and the chunk.
    fn places_in(
        &self,
        version: VersionId,
        number: u64,
        wanted: &[(u64, ChunkRef)],
    ) -> Result<Vec<(u64, u64, ChunkRef)>> {
        let content = self.store.reader.content(version)?;
        let (mut file_at, mut places) = (0, Vec::new());
        for extent in &content.extents {
            if let Extent::Data { block, offset, len } = *extent
                && block == number
            {
                let end = offset + len;
                let here = wanted
                    .iter()
                    .filter(|(at, chunk)| *at >= offset && at + u64::from(chunk.len) <= end);
                places.extend(here.map(|(at, chunk)| (file_at + (at - offset), *at, *chunk)));
            }
            file_at += extent.len();
        }
        Ok(places)
    }

    /// Where the files of a version lay when they were backed up last.
    fn source_paths(&self, version: VersionId) -> Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        self.store.reader.names_of(version, &mut |file| {
            let Some(run) = file.runs.last() else { return Ok(()) };
            let root = self.store.reader.run(*run)?.path;
            // A stream has none.
            if root.is_absolute() {
                paths.push(root.join(sys::path_from(&file.path)));
            }
            Ok(())
        })?;
        Ok(paths)
    }

    /// Copies a chunk out of a file to its place in the plain content, if that is what lies there.
    fn take_chunk(
        &self,
        file: &File,
        file_at: u64,
        at: u64,
        chunk: &ChunkRef,
        out: &File,
    ) -> Result<bool> {
        let mut hasher = self.store.settings.hash.hasher();
        let len = u64::from(chunk.len);
        let mut buffer = vec![0; PIECE_BYTES.min(chunk.len as usize)];
        let mut done = 0;
        while done < len {
            self.progress.check()?;
            let piece = usize::try_from(len - done).unwrap_or(usize::MAX).min(buffer.len());
            let piece = buffer.get_mut(..piece).unwrap_or_default();
            if file.read_exact_at(piece, file_at + done).is_err() {
                return Ok(false);
            }
            hasher.update(piece);
            let failed = |e| Error::io("writing what was brought back", e);
            out.write_all_at(piece, at + done).map_err(failed)?;
            done += piece.len() as u64;
        }
        // What did not match is overwritten, or never read.
        Ok(hasher.finish() == chunk.id)
    }

    /// Makes the frames of what was brought back, and writes those that are the very ones that were
    /// lost to `out`. Gives whether all of the plain content is there.
    pub fn encode_again(
        &self,
        patient: &mut Patient<'_>,
        plain: &File,
        found: &Found,
        out: &File,
    ) -> Result<bool> {
        let mut encoder = Encoder::new(self.store.settings.compression)?;
        let mut is_all = true;
        let failed = |e| Error::io("what was brought back", e);
        for (at, place) in patient.frames.iter().zip(&mut patient.places) {
            if *place != Place::Lost {
                continue;
            }
            self.progress.check()?;
            if !covers(found, at.plain_at, at.plain_end()) {
                is_all = false;
                continue;
            }
            let mut bytes = vec![0; at.frame.plain_len as usize];
            plain.read_exact_at(&mut bytes, at.plain_at).map_err(failed)?;
            let (frame, stored) = encoder.encode(&bytes)?;
            if frame == at.frame {
                out.write_all_at(stored, at.stored_at).map_err(failed)?;
                *place = Place::Recovered;
            }
        }
        Ok(is_all)
    }
}

/// Whether sorted ranges that do not overlap cover all from `start` to `end`.
fn covers(ranges: &[(u64, u64)], start: u64, end: u64) -> bool {
    let mut at = start;
    for range in ranges.iter().skip_while(|it| it.1 <= start) {
        if range.0 > at || at >= end {
            break;
        }
        at = at.max(range.1);
    }
    at >= end
}

/// Opens a regular file. No link is followed at its end, and nothing is waited for.
fn open(path: &Path) -> Option<File> {
    let dir = sys::open_dir(path.parent()?).ok()?;
    let file = sys::at::open_read(dir, path.file_name()?).ok()?;
    sys::fstat(&file).ok().filter(sys::Stat::is_file)?;
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_not_covered() {
        let ranges = [(0, 10), (10, 20), (30, 40)];
        for (start, end, is) in
            [(0, 20, true), (5, 15, true), (5, 21, false), (30, 40, true), (20, 30, false)]
        {
            assert_eq!(covers(&ranges, start, end), is, "{start} to {end}");
        }
        assert!(!covers(&[], 0, 1));
    }
}
