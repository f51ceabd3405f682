//! Validation: every block's bytes against its name, and the catalog against itself.
//!
//! A block whose hash is right is what was written, frames and all. In one whose hash is wrong, or
//! that is missing or unreadable, the frames are checked one by one, so that the report names
//! exactly the files whose bytes are lost. Nothing is changed here.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rayon::iter::{IntoParallelIterator, ParallelIterator};

use crate::catalog::{BlockRow, Damage, DamagedFile, Reader};
use crate::chunk::{Digest, HashAlgo};
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::progress::Progress;
use crate::snapshot::Snapshots;
use crate::volume::{BlockId, Volume};

/// Bytes read at a time.
const PIECE_BYTES: u64 = 1 << 20;
/// Blocks taken from the catalog at a time.
const PAGE_BLOCKS: u64 = 1024;

/// A block copy that is not what it should be.
#[derive(Debug)]
pub struct BadBlock {
    /// The block's name.
    pub id: BlockId,
    /// Path of the volume.
    pub volume: std::path::PathBuf,
    /// What is wrong.
    pub reason: String,
    /// [`ErrorKind::Corrupt`], or why its volume cannot be used.
    pub kind: ErrorKind,
    /// The files whose bytes are lost, in all runs.
    pub files: Vec<DamagedFile>,
}

/// What a validation found.
#[derive(Debug, Default)]
pub struct Report {
    /// Blocks looked at.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Faults of the catalog itself and of the volume indexes.
    pub catalog_faults: Vec<String>,
    /// Blocks that are damaged, missing or out of reach.
    pub bad_blocks: Vec<BadBlock>,
}

impl Report {
    /// Whether nothing was found.
    pub fn is_clean(&self) -> bool {
        self.catalog_faults.is_empty() && self.bad_blocks.is_empty()
    }

    /// The kind that says most about what was found; `None` when nothing was. Damage outranks what
    /// is only out of reach.
    pub fn worst(&self) -> Option<ErrorKind> {
        let kinds = || self.bad_blocks.iter().map(|it| it.kind);
        if !self.catalog_faults.is_empty() || kinds().any(|it| it == ErrorKind::Corrupt) {
            return Some(ErrorKind::Corrupt);
        }
        kinds().next()
    }
}

/// Validates everything.
pub fn run(snapshots: &Snapshots, progress: &Progress) -> Result<Report> {
    let mut report = Report::default();
    progress.set_phase("checking the catalog");
    snapshots.with_reader(|reader| reader.check(&mut |fault| report.catalog_faults.push(fault)))?;
    check_indexes(snapshots, &mut report)?;
    progress.set_phase("checking blocks");
    let hash = snapshots.settings()?.hash;
    let totals = snapshots.with_reader(Reader::totals)?;
    Progress::add(&progress.bytes_total, totals.stored_bytes);
    Progress::add(&progress.entries_total, totals.blocks);
    let (blocks, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
    let bad = Mutex::new(Vec::new());
    let mut after = 0;
    loop {
        let page = snapshots.with_reader(|reader| reader.block_numbers(after, PAGE_BLOCKS))?;
        let Some(last) = page.last() else { break };
        after = *last;
        page.into_par_iter().try_for_each(|number| -> Result<()> {
            let found = check_block(snapshots, number, hash, progress)?;
            blocks.fetch_add(1, Ordering::Relaxed);
            bytes.fetch_add(found.stored_len, Ordering::Relaxed);
            bad.lock().extend(found.bad);
            Ok(())
        })?;
    }
    (report.blocks, report.bytes) = (blocks.into_inner(), bytes.into_inner());
    report.bad_blocks = bad.into_inner();
    report.bad_blocks.sort_by_key(|it| it.id);
    Ok(report)
}

/// Checks that every volume's index can be read as far as the catalog counts on it.
fn check_indexes(snapshots: &Snapshots, report: &mut Report) -> Result<()> {
    for volume in snapshots.volumes().present() {
        let known = snapshots.with_reader(|reader| reader.index_len(volume.config.number))?;
        let read = || -> Result<()> {
            let mut records = volume.index_from(0)?;
            while records.next_record()?.is_some() {}
            match records.offset() < known {
                true => Err(Error::corrupt(format!("it is damaged at byte {}", records.offset()))),
                false => Ok(()),
            }
        };
        if let Err(e) = read() {
            let path = crate::sys::quoted(&volume.config.path);
            report.catalog_faults.push(format!("volume index of {path}: {e}"));
        }
    }
    Ok(())
}

struct Checked {
    stored_len: u64,
    bad: Vec<BadBlock>,
}

/// Checks every copy of a block.
fn check_block(
    snapshots: &Snapshots,
    number: u64,
    hash: HashAlgo,
    progress: &Progress,
) -> Result<Checked> {
    let row = snapshots.with_reader(|reader| reader.block(number))?;
    let volumes = snapshots.volumes();
    let mut bad = Vec::new();
    let mut good_copies = 0;
    let mut lost = Vec::new();
    for volume_number in &row.volumes {
        let (path, result) = match volumes.get(*volume_number) {
            Some(volume) => (volume.config.path.clone(), check_copy(volume, &row, hash, progress)),
            None => {
                let missing = volumes.missing();
                let found = missing.iter().find(|it| it.0.number == *volume_number);
                let path = found.map(|it| it.0.path.clone()).unwrap_or_default();
                let kind = found.map_or(ErrorKind::Offline, |it| it.1.kind());
                let why = found.map(|it| it.1.to_string()).unwrap_or_default();
                let error = Error::new(kind, format!("its volume is not there: {why}"));
                (path, Err((error, whole(&row))))
            }
        };
        match result {
            Ok(()) => good_copies += 1,
            Err((error, ranges)) => {
                if error.kind() == ErrorKind::Interrupted {
                    return Err(error);
                }
                let (kind, reason) = (error.kind(), error.to_string());
                let message = format!("on {}: {reason}", crate::sys::quoted(&path));
                let name = format!("block {}", row.id).into_bytes();
                progress.note(&Problem { path: name, kind, message });
                bad.push(BadBlock { id: row.id, volume: path, reason, kind, files: Vec::new() });
                lost.push(ranges);
            }
        }
    }
    // With another good copy no file has lost anything.
    if good_copies == 0 {
        for (block, ranges) in bad.iter_mut().zip(lost) {
            let damage = Damage { block: number, ranges };
            snapshots.with_reader(|reader| {
                reader.damaged_files(&damage, &mut |file| {
                    block.files.push(file);
                    Ok(())
                })
            })?;
            block.files.sort();
        }
    }
    Ok(Checked { stored_len: row.stored_len, bad })
}

fn whole(row: &BlockRow) -> Vec<(u64, u64)> {
    vec![(0, row.frames.iter().map(|it| u64::from(it.plain_len)).sum())]
}

type Lost = (Error, Vec<(u64, u64)>);

fn check_copy(
    volume: &Volume,
    row: &BlockRow,
    hash: HashAlgo,
    progress: &Progress,
) -> std::result::Result<(), Lost> {
    let all = |e: Error| (e, whole(row));
    let found = volume.store.len_of(&row.id).map_err(all)?;
    let len = match found {
        Some(len) => len,
        None => return Err(all(Error::corrupt("it is missing"))),
    };
    let id = hash_block(volume, row, len.min(row.stored_len), hash, progress);
    let reason = match id {
        Ok(id) if id == row.id && len == row.stored_len => return Ok(()),
        Err(e) if e.kind() == ErrorKind::Interrupted => return Err(all(e)),
        Ok(_) if len != row.stored_len => {
            format!("it is {len} bytes long instead of {}", row.stored_len)
        }
        Ok(id) => format!("its bytes have the hash {id}"),
        Err(e) => e.to_string(),
    };
    let ranges = bad_frames(volume, row);
    Err((Error::corrupt(reason), ranges))
}

fn hash_block(
    volume: &Volume,
    row: &BlockRow,
    len: u64,
    hash: HashAlgo,
    progress: &Progress,
) -> Result<Digest> {
    let mut hasher = hash.hasher();
    let mut buffer = vec![0; usize::try_from(PIECE_BYTES.min(len)).unwrap_or_default()];
    let mut at = 0;
    while at < len {
        progress.check()?;
        let piece = usize::try_from(PIECE_BYTES.min(len - at)).unwrap_or_default();
        let piece = buffer.get_mut(..piece).unwrap_or_default();
        volume.store.read_at(&row.id, at, piece)?;
        hasher.update(piece);
        at += piece.len() as u64;
        Progress::add(&progress.bytes, piece.len() as u64);
        Progress::add(&progress.bytes_read, piece.len() as u64);
    }
    Progress::add(&progress.entries, 1);
    Ok(hasher.finish())
}

/// The parts of a block's plain content whose frames are damaged.
fn bad_frames(volume: &Volume, row: &BlockRow) -> Vec<(u64, u64)> {
    let (mut stored_at, mut plain_at) = (0u64, 0u64);
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for frame in &row.frames {
        let mut stored = vec![0; frame.stored_len as usize];
        let read = volume.store.read_at(&row.id, stored_at, &mut stored);
        let end = plain_at + u64::from(frame.plain_len);
        if read.and_then(|()| frame.decode(&stored, &mut Vec::new())).is_err() {
            match ranges.last_mut() {
                Some(last) if last.1 == plain_at => last.1 = end,
                _ => ranges.push((plain_at, end)),
            }
        }
        stored_at += u64::from(frame.stored_len);
        plain_at = end;
    }
    ranges
}
