//! Blocks and their metas: every copy of those that were chosen, several at a time.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Instant;

use parking_lot::Mutex;
use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::Work;
use super::choice::Choice;
use super::report::{BadBlock, Fault, Kept, Part};
use crate::catalog::meta::{DirNames, document_name, former_name};
use crate::catalog::{BlockRow, Damage, RunId};
use crate::chunk::Digest;
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::genmeta::{MetaState, compare};
use crate::progress::Progress;
use crate::sys::{self, Time, c, quoted};
use crate::volume::{BlockId, BlockIndex, CopyAt, Volume};

/// Bytes read at a time.
const PIECE_BYTES: usize = 1 << 20;
/// Good copies that wait to be noted at most, and how long at most in seconds.
const WAITING_MAX: usize = 256;
const WAITING_SECS_MAX: u64 = 5;

/// What one thread uses again and again.
struct Tools {
    names: DirNames,
    piece: Vec<u8>,
}

impl Tools {
    fn new() -> Tools {
        Tools { names: DirNames::default(), piece: Vec::new() }
    }
}

/// Copies that were found right and are to be noted.
struct Good {
    copies: Vec<(String, BlockId)>,
    since: Instant,
}

/// Parts of a block's plain content, as (start, end), in order.
type Ranges = Vec<(u64, u64)>;

/// What is wrong with a copy: why, and what of the plain content it has lost.
struct Bad {
    volume: PathBuf,
    error: Error,
    lost: Ranges,
}

impl Work<'_> {
    /// Looks at all blocks that the options say.
    pub(super) fn blocks(&self) -> Result<()> {
        let good = Mutex::new(Good { copies: Vec::new(), since: Instant::now() });
        let mut choice = Choice::new(self);
        let done = loop {
            match choice.next_page() {
                Ok(Some(_)) if self.is_over() => {
                    self.report.lock().is_cut_short = true;
                    break Ok(());
                }
                Ok(Some(page)) => {
                    let block = |tools: &mut Tools, it| self.told(self.block(it, tools, &good));
                    let result = page.into_par_iter().try_for_each_init(Tools::new, block);
                    if result.is_err() {
                        break result;
                    }
                }
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        // What was found holds, whatever has ended the work.
        self.note_good(&mut good.lock());
        done
    }

    /// Whether the time is over, and something was done in it.
    fn is_over(&self) -> bool {
        let is_late = self.deadline.is_some_and(|it| Instant::now() >= it);
        is_late && self.is_begun.load(Ordering::Relaxed)
    }

    fn note_good(&self, good: &mut Good) {
        if !good.copies.is_empty() {
            let copies: Vec<_> = good.copies.iter().map(|it| (&*it.0, it.1)).collect();
            self.health.note_good(&copies, Time::now());
        }
        good.copies.clear();
        good.since = Instant::now();
    }

    /// Checks every copy of a block, and what lies beside it.
    fn block(&self, number: u64, tools: &mut Tools, good: &Mutex<Good>) -> Result<()> {
        self.progress.check()?;
        let is_first = !self.is_begun.swap(true, Ordering::Relaxed);
        if !is_first && self.deadline.is_some_and(|it| Instant::now() >= it) {
            self.report.lock().is_cut_short = true;
            return Ok(());
        }
        let row = self.snapshots.with_reader(|reader| reader.block(number))?;
        let places = self.snapshots.with_reader(|reader| reader.copies_of(number))?;
        let (mut copies, mut bad) = (0u64, Vec::new());
        for CopyAt { volume: number, record_at } in &places {
            copies += 1;
            let Some(volume) = self.volumes.get(*number) else {
                bad.push(self.out_of_reach(*number, &row));
                continue;
            };
            match self.copy(volume, &row, tools) {
                Ok(()) => {
                    // A repair that was killed may have made it good, and not have come to sync it.
                    if self.health.is_bad(&volume.config.uuid, &row.id)
                        && let Err(e) = volume.store.make_last(&row.id)
                    {
                        let message = format!("block {} is right, and may not last: {e}", row.id);
                        let path = volume.config.path.clone();
                        let fault = Fault::new(Part::Volume, path, message);
                        self.fault(Fault { kind: e.kind(), ..fault });
                        continue;
                    }
                    let mut good = good.lock();
                    good.copies.push((volume.config.uuid.clone(), row.id));
                    let is_due = good.copies.len() >= WAITING_MAX
                        || good.since.elapsed().as_secs() >= WAITING_SECS_MAX;
                    if is_due {
                        self.note_good(&mut good);
                    }
                }
                Err((error, _)) if is_of_this_process(&error) => return Err(error),
                Err((error, lost)) => {
                    if error.kind() == ErrorKind::Corrupt {
                        let (uuid, reason) = (&volume.config.uuid, error.to_string());
                        self.health.note_bad(uuid, &row.id, &reason, Time::now());
                        self.report.lock().bad_now += 1;
                    }
                    bad.push(Bad { volume: volume.config.path.clone(), error, lost });
                }
            }
            self.beside(volume, &row, *record_at, tools)?;
        }
        if copies == 0 {
            // One that was missed when the catalog was rebuilt may have it.
            let error = self.volumes.why_none(&[], &row.id);
            bad.push(Bad { volume: PathBuf::new(), error, lost: whole(&row) });
        }
        let mut report = self.report.lock();
        report.blocks += copies;
        report.bytes += row.stored_len * copies;
        drop(report);
        Progress::add(&self.progress.entries, 1);
        match bad.is_empty() {
            true => Ok(()),
            false => self.bad(&row, bad, &places),
        }
    }

    fn out_of_reach(&self, number: i64, row: &BlockRow) -> Bad {
        let missing = self.volumes.missing();
        let found = missing.iter().find(|it| it.0.number == number);
        let volume = found.map(|it| it.0.path.clone()).unwrap_or_default();
        let kind = found.map_or(ErrorKind::Offline, |it| it.1.kind());
        let why = found.map(|it| it.1.to_string()).unwrap_or_default();
        let error = Error::new(kind, format!("its volume is not there: {why}"));
        Bad { volume, error, lost: whole(row) }
    }

    /// Checks a copy's bytes; an error comes with the parts of the plain content that are lost.
    fn copy(
        &self,
        volume: &Volume,
        row: &BlockRow,
        tools: &mut Tools,
    ) -> std::result::Result<(), (Error, Ranges)> {
        let all = |e: Error| (e, whole(row));
        // What is open may be a file that somebody has replaced.
        volume.store.forget(&row.id);
        let len = match volume.store.len_of(&row.id) {
            Ok(Some(len)) => len,
            Ok(None) => return Err(all(Error::corrupt("it is missing"))),
            Err(e) => return Err(all(e)),
        };
        let id = self.hash(volume, row, len.min(row.stored_len), tools);
        let reason = match id {
            Ok(id) if id == row.id && len == row.stored_len => return Ok(()),
            Err(e) if !matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::Io) => {
                return Err(all(e));
            }
            Err(e) if is_of_this_process(&e) => return Err(all(e)),
            Ok(_) if len != row.stored_len => {
                format!("it is {len} bytes long instead of {}", row.stored_len)
            }
            Ok(id) => format!("its bytes have the hash {id}"),
            Err(e) => e.to_string(),
        };
        Err((Error::corrupt(reason), bad_frames(volume, row)))
    }

    fn hash(&self, volume: &Volume, row: &BlockRow, len: u64, tools: &mut Tools) -> Result<Digest> {
        let file = volume.store.open(&row.id)?;
        let cached = file.as_ref().and_then(sys::target::cached_pages);
        if let Some(file) = &file {
            sys::advise_sequential(file);
        }
        let mut hasher = self.settings.hash.hasher();
        let mut at = 0;
        tools.piece.resize(PIECE_BYTES, 0);
        while at < len {
            self.progress.check()?;
            let here = usize::try_from(len - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let piece = tools.piece.get_mut(..here).unwrap_or_default();
            match &file {
                Some(file) => read(file, at, piece, &row.id)?,
                None => volume.store.read_at(&row.id, at, piece)?,
            }
            hasher.update(piece);
            at += here as u64;
            Progress::add(&self.progress.bytes, here as u64);
            Progress::add(&self.progress.bytes_read, here as u64);
        }
        // Reading all of a store must not push out of memory what others use: what nobody had read
        // before goes again.
        if let (Some(file), Some(0)) = (&file, cached) {
            sys::target::drop_cached(file);
        }
        Ok(hasher.finish())
    }

    /// Reports a block of which some copies are bad.
    fn bad(&self, row: &BlockRow, bad: Vec<Bad>, places: &[CopyAt]) -> Result<()> {
        let has_good = bad.len() < places.len();
        // What every copy has lost. A reader takes each frame from a copy that has it.
        let mut lost = if has_good { Ranges::new() } else { whole(row) };
        bad.iter().for_each(|it| lost = common(&lost, &it.lost));
        let index = places.iter().find_map(|CopyAt { volume, record_at }| {
            let volume = self.volumes.get(*volume)?;
            volume.index_record(*record_at).ok().filter(|it| it.id == row.id)
        });
        // One copy names the files, or they would be named for each.
        let mut files = Some(Kept::default());
        if !lost.is_empty() {
            let damage = Damage { block: row.number, ranges: lost };
            self.snapshots.with_reader(|reader| {
                reader.damaged_files(&damage, &mut |file| {
                    self.progress.check()?;
                    if let Some(files) = &mut files {
                        self.report.lock().keep_file(files, file);
                    }
                    Ok(())
                })
            })?;
        }
        for Bad { volume, error, lost } in bad {
            let kind = error.kind();
            let error = match has_good {
                true => error,
                false => self.snapshots.on_tape().explain(&row.id, error),
            };
            let reason = error.to_string();
            let message = format!("on {}: {reason}", quoted(&volume));
            let name = format!("block {}", row.id).into_bytes();
            self.progress.note(&Problem { path: name, kind, message });
            let mut report = self.report.lock();
            let mut chunks = Kept::default();
            for (at, chunk) in index.iter().flat_map(BlockIndex::placed_chunks) {
                let end = at + u64::from(chunk.len);
                if lost.iter().any(|it| it.0 < end && at < it.1) {
                    report.keep_chunk(&mut chunks, chunk.id);
                }
            }
            report.add_bad_block(BadBlock {
                id: row.id,
                volume,
                reason,
                kind,
                chunks,
                files: files.take().unwrap_or_default(),
            });
        }
        Ok(())
    }

    /// What lies beside a block on a volume: its record, where not all are looked at, and its meta.
    fn beside(
        &self,
        volume: &Volume,
        row: &BlockRow,
        record_at: u64,
        tools: &mut Tools,
    ) -> Result<()> {
        let path = || volume.config.path.clone();
        let index = match volume.index_record(record_at) {
            Ok(index) if index.id == row.id => index,
            // Told of where all records are looked at.
            _ if self.needed.is_none() => return Ok(()),
            other => {
                let why = other.err().map_or("it is another block's".to_owned(), |e| e.to_string());
                let message = format!("the record of block {}: {why}", row.id);
                self.fault(Fault::new(Part::Index, path(), message));
                return Ok(());
            }
        };
        if self.needed.is_some() {
            let mut found = |it| self.fault(Fault::new(Part::Index, path(), it));
            self.snapshots
                .with_reader(|reader| reader.check_record(row.number, &index, &mut found))?;
        }
        self.report.lock().documents += 1;
        let mut fault = Some(self.meta_fault(volume, &index, &mut tools.names)?);
        if matches!(fault, Some(Some(MetaFault::Fault(_)))) {
            // Whoever writes now may just have been at it.
            fault = self.settled(|| self.meta_fault(volume, &index, &mut tools.names))?;
        }
        match fault {
            None => self.report.lock().unjudged += 1,
            Some(None) => {}
            Some(Some(MetaFault::Due)) => self.report.lock().due += 1,
            Some(Some(MetaFault::Fault(why))) => {
                let message = format!("the meta of block {}: {why}", index.id);
                self.fault(Fault::new(Part::Meta, path(), message));
            }
        }
        Ok(())
    }

    /// What is wrong with the meta of a block, if anything is.
    fn meta_fault(
        &self,
        volume: &Volume,
        index: &BlockIndex,
        names: &mut DirNames,
    ) -> Result<Option<MetaFault>> {
        let state = self.snapshots.with_reader(|reader| {
            compare(reader, self.settings.hash, (volume, index), names, self.progress)
        })?;
        let word = match state {
            MetaState::Current => return Ok(None),
            MetaState::Damaged(why) => return Ok(Some(MetaFault::Fault(why))),
            MetaState::Missing => "it is missing",
            MetaState::Differs => "it does not say what the catalog says",
        };
        let is_missing = state == MetaState::Missing;
        let former = volume.document_path(&former_name(&index.id));
        let changed = self.snapshots.with_reader(|reader| reader.last_change_of(&index.id))?;
        let is_due = match (changed, self.described(volume)?) {
            _ if is_missing && (former.exists() || self.is_elsewhere(volume, &index.id)) => true,
            (None, _) => true,
            (Some(changed), Some(run)) => changed > run,
            // Nobody says up to when they are: after a crash, or in a store of an earlier version.
            (Some(_), None) => !is_missing || volume.document_path("meta").is_dir(),
        };
        Ok(Some(match is_due {
            true => MetaFault::Due,
            false => MetaFault::Fault(word.to_owned()),
        }))
    }

    /// Whether another volume has the meta of a block: then nothing is lost with this one.
    fn is_elsewhere(&self, volume: &Volume, id: &BlockId) -> bool {
        let others = self.volumes.present().iter();
        let mut others = others.filter(|it| it.config.number != volume.config.number);
        others.any(|it| it.document_path(&document_name(id)).exists())
    }

    /// The run up to which a volume's metas say what there is, as far as that is known.
    fn described(&self, volume: &Volume) -> Result<Option<RunId>> {
        let Some(described) = volume.described() else { return Ok(None) };
        if described.run == 0 {
            return Ok(Some(0));
        }
        let run = self.snapshots.run(described.run);
        Ok(run.ok().filter(|it| it.uuid == described.uuid).map(|it| it.id))
    }
}

/// What is wrong with a meta.
enum MetaFault {
    /// It may be so until metas are brought up to date.
    Due,
    /// It is not what was written.
    Fault(String),
}

fn read(file: &File, at: u64, piece: &mut [u8], id: &BlockId) -> Result<()> {
    file.read_exact_at(piece, at).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::corrupt(format!("block {id} is too short")),
        _ => Error::with_source(ErrorKind::Corrupt, format!("reading block {id}"), e),
    })
}

/// Whether an error says nothing of the store: a wish to stop, or that this process has no more
/// files.
fn is_of_this_process(error: &Error) -> bool {
    error.kind() == ErrorKind::Interrupted || matches!(error.errno(), Some(c::EMFILE | c::ENFILE))
}

fn whole(row: &BlockRow) -> Ranges {
    if row.frames.is_empty() {
        // Nothing is known of it: all that uses it is lost.
        return vec![(0, u64::MAX)];
    }
    vec![(0, row.frames.iter().map(|it| u64::from(it.plain_len)).sum())]
}

/// What two lists of ranges have in common.
fn common(a: &[(u64, u64)], b: &[(u64, u64)]) -> Ranges {
    let mut both = Ranges::new();
    for a in a {
        for b in b {
            let (start, end) = (a.0.max(b.0), a.1.min(b.1));
            if start < end {
                both.push((start, end));
            }
        }
    }
    both
}

/// The parts of a block's plain content whose frames are damaged.
fn bad_frames(volume: &Volume, row: &BlockRow) -> Ranges {
    let (mut stored_at, mut plain_at) = (0u64, 0u64);
    let mut ranges = Ranges::new();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_copy_has_lost_is_lost() {
        let (a, b) = ([(0, 10), (20, 30)], [(5, 22), (29, 40)]);
        assert_eq!(common(&a, &b), [(5, 10), (20, 22), (29, 30)]);
        assert_eq!(common(&a, &[]), []);
        assert_eq!(common(&[(0, 50)], &a), a);
    }
}
