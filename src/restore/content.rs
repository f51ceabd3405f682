//! Content of files: writing it anew, finding what differs from what is there, and reading it back.
//!
//! A new file is checked against its hash as it is written. A file that is there is compared piece
//! by piece first, without a change; only when all of the snapshot's bytes have been read and
//! checked is any of them written. Raw blocks are shared with the volume where the file system can
//! do that; their bytes are read and checked all the same.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::shared::Shared;
use crate::chunk::Digest;
use crate::chunk::file_hash::FileHash;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::snapshot::FileMap;
use crate::sys::{self, c, target};

/// Bytes that are compared, and read back, at a time.
const PIECE_BYTES: usize = 256 << 10;
/// What differs is found to this many bytes.
const GRAIN_BYTES: usize = 4 << 10;
/// At least the size of a file system's block.
const HOLE_ALIGN: u64 = 64 << 10;
/// Ranges that are kept apart; if more differ, all from there on is written.
const RANGES_MAX: usize = 1 << 16;
/// Files from this length on are worth the try to share their blocks.
const SHARE_FROM_BYTES: u64 = 64 << 10;
/// Files and bytes that are read back together, after one sync for all of them.
const VERIFY_FILES: usize = 256;
const VERIFY_BYTES: u64 = 256 << 20;

/// What a thread keeps from one file to the next.
#[derive(Default)]
pub struct Scratch {
    buffer: Vec<u8>,
    /// Files that have been written and are still to be read back.
    unverified: Vec<Unverified>,
    unverified_bytes: u64,
}

struct Unverified {
    file: File,
    map: Arc<FileMap>,
    path: Vec<u8>,
}

/// What of an existing file is not as in the snapshot.
pub struct Difference {
    /// Ranges as (start, end), in order.
    pub ranges: Vec<(u64, u64)>,
    /// Whether its length is another.
    pub resized: bool,
}

impl Difference {
    pub fn is_none(&self) -> bool {
        self.ranges.is_empty() && !self.resized
    }

    /// Adds a range that does not begin before the last one.
    fn add(&mut self, start: u64, end: u64) {
        let is_full = self.ranges.len() >= RANGES_MAX;
        match self.ranges.last_mut() {
            Some(last) if start <= last.1 || is_full => last.1 = last.1.max(end),
            _ => self.ranges.push((start, end)),
        }
    }
}

/// A file's hash as its segments go by.
struct Check<'m> {
    map: &'m FileMap,
    hash: FileHash,
    has_holes: bool,
}

impl<'m> Check<'m> {
    fn new(shared: &Shared<'_>, map: &'m FileMap) -> Check<'m> {
        let has_holes = map.has_holes();
        let hash = match has_holes {
            true => FileHash::of_segments(shared.hash),
            false => FileHash::of_content(shared.hash),
        };
        Check { map, hash, has_holes }
    }

    fn begin(&mut self, start: u64, end: u64) {
        if self.has_holes {
            self.hash.begin_segment(start, end - start);
        }
    }

    fn matches(self) -> bool {
        let found: Digest = match self.has_holes {
            true => self.hash.finish_segments(self.map.size()),
            false => self.hash.finish(),
        };
        self.map.content.hash == Some(found)
    }
}

fn wrong_hash() -> Error {
    Error::corrupt("its content does not match its hash")
}

/// Writes all of a file's content into the empty `file`.
pub fn write_new(shared: &Shared<'_>, map: &FileMap, file: &File) -> Result<()> {
    let shares = share(shared, map, file)?;
    let mut check = Check::new(shared, map);
    let mut written = 0;
    for (start, end) in map.segments() {
        check.begin(start, end);
        shared.work.snapshots.pieces(map, start, end, &mut |at, bytes| {
            shared.check()?;
            check.hash.add_bytes(bytes);
            written += write_unshared(file, at, bytes, &shares)?;
            Progress::add(&shared.work.progress.bytes, bytes.len() as u64);
            Ok(())
        })?;
    }
    if map.has_holes() {
        file.set_len(map.size()).map_err(|e| Error::io("setting its size", e))?;
    }
    shared.note_written(written);
    if check.matches() { Ok(()) } else { Err(wrong_hash()) }
}

/// Ranges of `file` that share blocks with the volume now.
fn share(shared: &Shared<'_>, map: &FileMap, file: &File) -> Result<Vec<(u64, u64)>> {
    if map.size() < SHARE_FROM_BYTES || !shared.can_share.load(Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let shares = shared.work.snapshots.share(map, file)?;
    if shares.refused {
        shared.can_share.store(false, Ordering::Relaxed);
    }
    let bytes: u64 = shares.ranges.iter().map(|it| it.1 - it.0).sum();
    shared.bytes_shared.fetch_add(bytes, Ordering::Relaxed);
    Ok(shares.ranges)
}

/// Writes what of `bytes`, which belong to offset `at`, lies in none of `shares`.
fn write_unshared(file: &File, at: u64, bytes: &[u8], shares: &[(u64, u64)]) -> Result<u64> {
    let mut written = 0;
    let mut write = |from: u64, to: u64| -> Result<()> {
        let index = |it: u64| usize::try_from(it - at).unwrap_or(usize::MAX);
        let part = bytes.get(index(from)..index(to)).unwrap_or_default();
        file.write_all_at(part, from).map_err(|e| Error::io("writing it", e))?;
        written += part.len() as u64;
        Ok(())
    };
    let end = at + bytes.len() as u64;
    let mut from = at;
    let first = shares.partition_point(|it| it.1 <= at);
    for (start, stop) in shares.iter().skip(first).take_while(|it| it.0 < end) {
        if from < *start {
            write(from, *start)?;
        }
        from = *stop;
    }
    if from < end {
        write(from, end)?;
    }
    Ok(written)
}

/// Finds what of `file`, which is `size` bytes long, is not as in the snapshot. All of the
/// snapshot's content is read and checked by that, and nothing is changed.
pub fn compare(
    shared: &Shared<'_>,
    map: &FileMap,
    file: &File,
    size: u64,
    scratch: &mut Scratch,
) -> Result<Difference> {
    let mut found = Difference { ranges: Vec::new(), resized: size != map.size() };
    let mut check = Check::new(shared, map);
    let buffer = &mut scratch.buffer;
    let mut hole_from = 0;
    for (start, end) in map.segments() {
        no_data(file, hole_from, start.min(size), &mut found)?;
        hole_from = end;
        check.begin(start, end);
        shared.work.snapshots.pieces(map, start, end, &mut |at, bytes| {
            check.hash.add_bytes(bytes);
            let mut at = at;
            for piece in bytes.chunks(PIECE_BYTES) {
                shared.check()?;
                buffer.resize(piece.len(), 0);
                // What cannot be read is not as wanted, and may well be written.
                let got = read_some(file, at, buffer).unwrap_or(0);
                let here = buffer.get(..got).unwrap_or_default();
                differ(at, piece, here, &mut found);
                at += piece.len() as u64;
            }
            Ok(())
        })?;
    }
    no_data(file, hole_from, map.size().min(size), &mut found)?;
    if check.matches() { Ok(found) } else { Err(wrong_hash()) }
}

/// Notes where `there` is not `wanted`; what it is shorter by differs.
fn differ(at: u64, wanted: &[u8], there: &[u8], found: &mut Difference) {
    if wanted == there {
        return;
    }
    let mut at = at;
    let mut there = there.chunks(GRAIN_BYTES);
    for grain in wanted.chunks(GRAIN_BYTES) {
        let end = at + grain.len() as u64;
        if there.next() != Some(grain) {
            found.add(at, end);
        }
        at = end;
    }
}

/// Notes data where the snapshot has a hole.
fn no_data(file: &File, from: u64, to: u64, found: &mut Difference) -> Result<()> {
    let mut at = from;
    while let Some((start, end)) =
        sys::next_data(file, at, to).map_err(|e| Error::io("looking for holes in it", e))?
    {
        if start >= to {
            break;
        }
        found.add(start, end.min(to));
        at = end;
    }
    Ok(())
}

/// Fills `buffer` from `at` as far as the file goes.
fn read_some(file: &File, at: u64, buffer: &mut [u8]) -> Result<usize> {
    let mut got = 0;
    while let Some(rest) = buffer.get_mut(got..).filter(|it| !it.is_empty()) {
        match file.read_at(rest, at + got as u64) {
            Ok(0) => break,
            Ok(len) => got += len,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("reading what is there", e)),
        }
    }
    Ok(got)
}

/// Writes the ranges that differ, and gives the file its length. [`compare`] has checked every byte
/// of the snapshot before; once begun, nothing but a failure ends it half way. What it has written
/// is on the disk when it is done, before the file gets its name.
pub fn patch(
    shared: &Shared<'_>,
    map: &FileMap,
    file: &File,
    difference: &Difference,
) -> Result<()> {
    if difference.resized {
        file.set_len(map.size()).map_err(|e| Error::io("setting its size", e))?;
    }
    let segments = map.segments();
    for (start, end) in &difference.ranges {
        let mut at = *start;
        let first = segments.partition_point(|it| it.1 <= *start);
        for (from, to) in segments.iter().skip(first).take_while(|it| it.0 < *end) {
            empty(file, at, *from, map.size())?;
            let (from, to) = ((*from).max(*start), (*to).min(*end));
            shared.work.snapshots.pieces(map, from, to, &mut |at, bytes| {
                file.write_all_at(bytes, at).map_err(|e| Error::io("writing it", e))?;
                shared.note_written(bytes.len() as u64);
                Ok(())
            })?;
            at = to;
        }
        empty(file, at, *end, map.size())?;
    }
    file.sync_data().map_err(|e| Error::io("writing it out", e))
}

/// Makes a range of a file a hole, or zeros where there are no holes.
fn empty(file: &File, from: u64, to: u64, size: u64) -> Result<()> {
    if from >= to {
        return Ok(());
    }
    let failed = |e| Error::io("making a hole in it", e);
    // Only whole blocks are freed, and the last one ends after the file.
    let block_end = if to == size { to.next_multiple_of(HOLE_ALIGN) } else { to };
    match target::punch_hole(file, from, block_end - from) {
        Err(e) if e.raw_os_error() == Some(c::EOPNOTSUPP) => {
            let zeros = [0; 8 << 10];
            let mut at = from;
            while at < to {
                let len = usize::try_from(to - at).unwrap_or(usize::MAX).min(zeros.len());
                file.write_all_at(zeros.get(..len).unwrap_or_default(), at).map_err(failed)?;
                at += len as u64;
            }
            Ok(())
        }
        other => other.map_err(failed),
    }
}

impl Scratch {
    /// Notes a file to be read back; many are synced and read together.
    pub fn verify_later(
        &mut self,
        shared: &Shared<'_>,
        file: File,
        map: &Arc<FileMap>,
        path: &[u8],
    ) {
        self.unverified_bytes += map.size();
        self.unverified.push(Unverified { file, map: map.clone(), path: path.to_vec() });
        if self.unverified.len() >= VERIFY_FILES || self.unverified_bytes >= VERIFY_BYTES {
            self.verify(shared);
        }
    }

    /// Reads back what has been noted.
    pub fn verify(&mut self, shared: &Shared<'_>) {
        self.unverified_bytes = 0;
        let list = std::mem::take(&mut self.unverified);
        let Some(first) = list.first() else { return };
        // What is still to be written out cannot be dropped, and would be read from memory.
        if let Err(e) = target::sync_file_system(&first.file) {
            shared.problem(&first.path, Error::io("writing it out", e));
        }
        for it in &list {
            let result = shared.check().and_then(|()| self.read_back(shared, it));
            match result {
                Ok(()) => {
                    shared.verified.fetch_add(1, Ordering::Relaxed);
                }
                Err(e) => shared.problem(&it.path, e),
            }
        }
    }

    fn read_back(&mut self, shared: &Shared<'_>, it: &Unverified) -> Result<()> {
        let lost = || Error::new(ErrorKind::Io, "reads back other than it was written");
        target::drop_cached(&it.file);
        let len = sys::fstat(&it.file).map_err(|e| Error::io("looking at it", e))?.size;
        if len != it.map.size() {
            return Err(lost());
        }
        let mut check = Check::new(shared, &it.map);
        for (start, end) in it.map.segments() {
            check.begin(start, end);
            let mut at = start;
            while at < end {
                shared.check()?;
                let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(PIECE_BYTES);
                self.buffer.resize(len, 0);
                let got = read_some(&it.file, at, &mut self.buffer)?;
                if got < len {
                    return Err(lost());
                }
                check.hash.add_bytes(&self.buffer);
                at += len as u64;
            }
        }
        if check.matches() { Ok(()) } else { Err(lost()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_found_grain_by_grain() {
        let wanted = vec![1; 5 * GRAIN_BYTES + 10];
        let ranges = |there: &[u8]| {
            let mut found = Difference { ranges: Vec::new(), resized: false };
            differ(1000, &wanted, there, &mut found);
            found.ranges
        };
        let grain = GRAIN_BYTES as u64;
        assert_eq!(ranges(&wanted), []);
        let mut there = wanted.clone();
        there[GRAIN_BYTES] = 2;
        assert_eq!(ranges(&there), [(1000 + grain, 1000 + 2 * grain)]);
        there[2 * GRAIN_BYTES] = 2;
        there[5 * GRAIN_BYTES + 9] = 2;
        let last = (1000 + 5 * grain, 1010 + 5 * grain);
        assert_eq!(ranges(&there), [(1000 + grain, 1000 + 3 * grain), last]);
        assert_eq!(ranges(&[]), [(1000, 1010 + 5 * grain)]);
        assert_eq!(ranges(&wanted[..wanted.len() - 1]), [last]);
    }

    #[test]
    fn too_many_ranges_become_one() {
        let mut found = Difference { ranges: Vec::new(), resized: false };
        for number in 0..RANGES_MAX as u64 + 10 {
            found.add(number * 3, number * 3 + 1);
        }
        assert_eq!(found.ranges.len(), RANGES_MAX);
        let end = (RANGES_MAX as u64 + 9) * 3 + 1;
        assert_eq!(found.ranges.last().unwrap().1, end);
    }

    #[test]
    fn only_what_is_not_shared_is_written() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        let shares = [(0, 10), (20, 30), (45, 200)];
        let bytes = [7; 50];
        assert_eq!(write_unshared(&file, 5, &bytes, &shares).unwrap(), 25);
        let mut found = [0; 100];
        file.read_exact_at(&mut found, 0).unwrap();
        let expected: Vec<u8> = (0..100)
            .map(|at| if (10..20).contains(&at) || (30..45).contains(&at) { 7 } else { 0 })
            .collect();
        assert_eq!(found.to_vec(), expected);
        assert_eq!(write_unshared(&file, 0, &bytes, &[]).unwrap(), 50);
    }
}
