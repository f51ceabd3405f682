//! One block: which of its copies are bad, and from where they are made good.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::{FILES_MAX, From, Healed, Unhealed, Work};
use crate::catalog::Damage;
use crate::chunk::frame::Frame;
use crate::copies::tables_of;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::sys::{Time, quoted};
use crate::volume::store::PendingBlock;
use crate::volume::{BlockId, BlockIndex, CopyAt, CopyFault, Volume, copy_block, verify_block};

/// Where a frame's good bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the copy on this volume.
    On(i64),
    /// In the file of what was brought back, at the frame's own place.
    Recovered,
    /// Nowhere.
    Lost,
}

/// A frame and where it begins.
#[derive(Clone, Copy, Debug)]
pub struct At {
    pub frame: Frame,
    pub stored_at: u64,
    pub plain_at: u64,
}

impl At {
    pub fn plain_end(&self) -> u64 {
        self.plain_at + u64::from(self.frame.plain_len)
    }
}

/// The frames of a block with their places.
pub fn frames_of(index: &BlockIndex) -> Vec<At> {
    let (mut stored_at, mut plain_at) = (0, 0);
    let place = |frame: &Frame| {
        let at = At { frame: *frame, stored_at, plain_at };
        stored_at += u64::from(frame.stored_len);
        plain_at += u64::from(frame.plain_len);
        at
    };
    index.frames.iter().map(place).collect()
}

/// A block that is being repaired.
pub struct Patient<'a> {
    pub index: BlockIndex,
    /// Its numbers in the catalog.
    pub numbers: Vec<u64>,
    /// The bad copies that can be written to.
    pub bad: Vec<&'a Volume>,
    /// Volumes that have copies and are not there.
    pub away: Vec<PathBuf>,
    pub frames: Vec<At>,
    pub places: Vec<Place>,
}

impl Patient<'_> {
    /// Parts of the plain content that are lost, as (start, end).
    pub fn lost(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (at, _) in self.frames.iter().zip(&self.places).filter(|it| *it.1 == Place::Lost) {
            match ranges.last_mut() {
                Some(last) if last.1 == at.plain_at => last.1 = at.plain_end(),
                _ => ranges.push((at.plain_at, at.plain_end())),
            }
        }
        ranges
    }
}

impl Work<'_> {
    /// Looks at all copies of a block again, and makes the bad ones good.
    pub fn block(&mut self, id: &BlockId) -> Result<()> {
        self.progress.check()?;
        Progress::add(&self.progress.entries, 1);
        self.done.blocks += 1;
        let numbers = self.store.reader.numbers_of(id)?;
        let mut copies: Vec<CopyAt> = Vec::new();
        for number in &numbers {
            for at in self.store.reader.copies_of(*number)? {
                if !copies.iter().any(|it| it.volume == at.volume) {
                    copies.push(at);
                }
            }
        }
        let (Some(number), false) = (numbers.last(), copies.is_empty()) else {
            let error = Error::corrupt("no volume has it");
            return self.lose(id, &numbers, None, error, false);
        };
        let hash = self.store.settings.hash;
        let index = match tables_of(&self.store.reader, self.volumes, hash, *number, &copies) {
            Ok(index) => index,
            // Its chunks cannot all be told: its frames can, and are enough where a copy is good.
            Err(e) if e.kind() == ErrorKind::Interrupted => return Err(e),
            Err(e) => {
                log::warn!("{e}");
                let row = self.store.reader.block(*number)?;
                BlockIndex { id: row.id, frames: row.frames, chunks: Vec::new() }
            }
        };
        let (mut good, mut bad, mut away) = (Vec::new(), Vec::new(), Vec::new());
        for at in &copies {
            let Some(volume) = self.volumes.get(at.volume) else {
                let all = self.volumes.missing();
                let config = all.iter().find(|it| it.0.number == at.volume);
                away.extend(config.map(|it| it.0.path.clone()));
                continue;
            };
            let count = |bytes| count(self.progress, bytes);
            match verify_block(volume, &index, hash, &count) {
                Ok(()) => good.push(volume),
                Err(CopyFault::Stopped(e)) => return Err(e),
                Err(CopyFault::Source(_) | CopyFault::Target(_)) => bad.push(volume),
            }
        }
        for volume in &good {
            // A repair that was killed may have made it good, and not have come to sync it.
            if let Err(e) = volume.store.make_last(id) {
                self.note(&volume.config.path, &e);
                continue;
            }
            self.store.health.note_good(&[(&volume.config.uuid, *id)], Time::now());
        }
        if bad.is_empty() {
            return match (good.is_empty(), away.first()) {
                (true, Some(path)) => {
                    let message = format!("it is on {}, which is not there", quoted(path));
                    let error = Error::new(ErrorKind::Offline, message);
                    self.lose(id, &[], None, error, false)
                }
                _ => Ok(()),
            };
        }
        if let Some(from) = good.first() {
            return self.copy_to_all(from, &index, &bad, From::Copy);
        }
        let frames = frames_of(&index);
        let places = vec![Place::Lost; frames.len()];
        let mut patient = Patient { index, numbers, bad, away, frames, places };
        self.assemble(&mut patient)
    }

    /// Copies a good copy over bad ones.
    fn copy_to_all(
        &mut self,
        from: &Volume,
        index: &BlockIndex,
        bad: &[&Volume],
        how: From,
    ) -> Result<()> {
        let mut failed = None;
        for to in bad {
            let count = |bytes| count(self.progress, bytes);
            match self.copy(from, to, index, &count)? {
                Ok(()) => self.healed(&index.id, to, how),
                Err(e) => failed = Some(e.context(quoted(&to.config.path))),
            }
        }
        match failed {
            Some(e) => self.lose(&index.id, &[], None, e, false),
            None => Ok(()),
        }
    }

    /// Copies a block onto a volume; the inner error is of one of the two volumes, the outer one
    /// ends the work.
    pub fn copy(
        &self,
        from: &Volume,
        to: &Volume,
        index: &BlockIndex,
        each: &(dyn Fn(u64) -> Result<()> + Sync),
    ) -> Result<Result<()>> {
        match copy_block(from, to, index, self.store.settings.hash, each) {
            Ok(pending) => Ok(self.publish(to, pending, &index.id)),
            Err(CopyFault::Stopped(e)) => Err(e),
            Err(CopyFault::Source(e) | CopyFault::Target(e)) => Ok(Err(e)),
        }
    }

    pub fn publish(
        &self,
        volume: &Volume,
        pending: Box<dyn PendingBlock>,
        id: &BlockId,
    ) -> Result<()> {
        volume.store.publish(vec![(pending, *id)])?;
        volume.store.forget(id);
        Ok(())
    }

    fn healed(&mut self, id: &BlockId, volume: &Volume, from: From) {
        self.store.health.note_healed(&volume.config.uuid, id);
        let volume = volume.config.path.clone();
        self.done.heal(Healed { block: *id, volume, from, now: *id });
    }

    /// Says that a block is not whole, and what that means. `ranges` are the lost parts of its
    /// plain content, all of it if `None`; no file is named where `numbers` is empty.
    pub fn lose(
        &mut self,
        id: &BlockId,
        numbers: &[u64],
        ranges: Option<&[(u64, u64)]>,
        error: Error,
        is_better: bool,
    ) -> Result<()> {
        let (mut files, mut file_count) = (Vec::new(), 0);
        for number in numbers {
            let ranges = ranges.map_or_else(|| vec![(0, u64::MAX)], <[_]>::to_vec);
            let damage = Damage { block: *number, ranges };
            self.store.reader.damaged_files(&damage, &mut |file| {
                file_count += 1;
                if files.len() < FILES_MAX {
                    files.push(file);
                }
                Ok(())
            })?;
        }
        files.sort();
        let error = self.on_tape.explain(id, error);
        let (reason, kind) = (error.to_string(), error.kind());
        let unhealed = Unhealed { block: *id, reason, kind, is_better, files, file_count };
        self.done.give_up(unhealed, self.progress);
        Ok(())
    }

    /// Makes a good block of bad copies and of what the source still has.
    fn assemble(&mut self, patient: &mut Patient<'_>) -> Result<()> {
        for (at, place) in patient.frames.iter().zip(&mut patient.places) {
            self.progress.check()?;
            let has = |it: &&&Volume| read_frame(it, &patient.index.id, at).is_ok();
            if let Some(volume) = patient.bad.iter().find(has) {
                *place = Place::On(volume.config.number);
            }
        }
        let needs_source = patient.places.contains(&Place::Lost);
        let recovered = tempfile_in(self.dir())?;
        let mut is_all_plain = true;
        let mut plain = None;
        if needs_source {
            let file = tempfile_in(self.dir())?;
            let found = self.recover(patient, &file)?;
            is_all_plain = self.encode_again(patient, &file, &found, &recovered)?;
            plain = Some(file);
        }
        let (Some(first), rest) = (patient.bad.first().copied(), patient.bad.get(1..)) else {
            return Ok(());
        };
        let id = patient.index.id;
        if !patient.places.contains(&Place::Lost) {
            let how = if needs_source { From::Source } else { From::Frames };
            let pending = self.write(patient, first, &recovered)?;
            let Some(pending) = pending else {
                let error = Error::corrupt("its frames are good and make another block");
                return self.lose(&id, &patient.numbers, None, error, false);
            };
            self.publish(first, pending, &id)?;
            self.healed(&id, first, how);
            return self.copy_to_all(first, &patient.index, rest.unwrap_or_default(), how);
        }
        if let (true, Some(plain), true) = (is_all_plain, &plain, patient.away.is_empty()) {
            return self.store_anew(patient, plain);
        }
        // As much as there is: what has been brought back can be read again.
        let mut is_better = false;
        for volume in patient.bad.clone() {
            is_better |= self.improve(patient, volume, &recovered)?;
        }
        let error = match patient.away.first() {
            Some(path) => {
                let message = format!(
                    "no copy that is there is good; it is also on {}, which is not: mount it, \
                     then repair again",
                    quoted(path)
                );
                Error::corrupt(message)
            }
            None => Error::corrupt("no copy is good, and the source does not have its bytes"),
        };
        let lost = patient.lost();
        self.lose(&id, &patient.numbers, Some(&lost), error, is_better)
    }

    /// Writes the block that its frames make, up to its publishing; nothing if it has another name.
    fn write(
        &self,
        patient: &Patient<'_>,
        to: &Volume,
        recovered: &File,
    ) -> Result<Option<Box<dyn PendingBlock>>> {
        let mut pending = to.store.begin()?;
        let mut hasher = self.store.settings.hash.hasher();
        for (at, place) in patient.frames.iter().zip(&patient.places) {
            self.progress.check()?;
            let bytes = self.frame_bytes(patient, at, *place, recovered)?;
            hasher.update(&bytes);
            pending.append(&bytes)?;
        }
        Ok((hasher.finish() == patient.index.id).then_some(pending))
    }

    /// The stored bytes of a frame that is not lost.
    pub fn frame_bytes(
        &self,
        patient: &Patient<'_>,
        at: &At,
        place: Place,
        recovered: &File,
    ) -> Result<Vec<u8>> {
        match place {
            Place::On(number) => match self.volumes.get(number) {
                Some(volume) => read_frame(volume, &patient.index.id, at),
                None => Err(Error::new(ErrorKind::Offline, "a volume has gone meanwhile")),
            },
            Place::Recovered => {
                let mut bytes = vec![0; at.frame.stored_len as usize];
                let failed = |e| Error::io("reading what was brought back", e);
                recovered.read_exact_at(&mut bytes, at.stored_at).map_err(failed)?;
                at.frame.verify(&bytes).map(|()| bytes)
            }
            Place::Lost => Err(Error::corrupt("a frame that is lost")),
        }
    }

    /// Gives a bad copy the good frames that it does not have; says whether there were any. The
    /// old file is kept.
    fn improve(
        &mut self,
        patient: &Patient<'_>,
        volume: &Volume,
        recovered: &File,
    ) -> Result<bool> {
        let own = Place::On(volume.config.number);
        let has_own = |at: &At| read_frame(volume, &patient.index.id, at).is_ok();
        let all = || patient.frames.iter().zip(&patient.places);
        let is_new =
            |(at, place): (&At, &Place)| *place != Place::Lost && *place != own && !has_own(at);
        if !all().any(is_new) {
            return Ok(false);
        }
        let mut pending = volume.store.begin()?;
        for (at, place) in all() {
            self.progress.check()?;
            let bytes = match place {
                // What lies there, right or wrong; it has no other use than its length.
                Place::Lost => {
                    let mut bytes = vec![0; at.frame.stored_len as usize];
                    if volume.store.read_at(&patient.index.id, at.stored_at, &mut bytes).is_err() {
                        bytes.fill(0);
                    }
                    bytes
                }
                place => self.frame_bytes(patient, at, *place, recovered)?,
            };
            pending.append(&bytes)?;
        }
        volume.keep_damaged(&patient.index.id)?;
        self.publish(volume, pending, &patient.index.id)?;
        Ok(true)
    }
}

/// Counts bytes that were read; fails if the work is to stop.
fn count(progress: &Progress, bytes: u64) -> Result<()> {
    progress.check()?;
    Progress::add(&progress.bytes_read, bytes);
    Ok(())
}

/// The stored bytes of a frame in one copy, if they are good.
fn read_frame(volume: &Volume, id: &BlockId, at: &At) -> Result<Vec<u8>> {
    let mut bytes = vec![0; at.frame.stored_len as usize];
    volume.store.read_at(id, at.stored_at, &mut bytes)?;
    at.frame.verify(&bytes).map(|()| bytes)
}

fn tempfile_in(dir: &std::path::Path) -> Result<File> {
    let failed = |e| Error::io(format!("making a temporary file in {}", quoted(dir)), e);
    tempfile::tempfile_in(dir).map_err(failed)
}
