//! The end of a tape: the archive is cut behind a member and closed there.
//!
//! What is overwritten was never acknowledged, and is of the tape file at hand.

use std::io::Write;

use super::archive::finish;
use super::marks::{Mark, Marks};
use super::{Attempt, Kept, Writer};
use crate::error::{Error, ErrorKind, Result};
use crate::tape::cpio::Archive;
use crate::tape::drive::{Moved, Read, Wrote};
use crate::tape::loaded::Start;
use crate::tape::spool::batch::BatchId;
use crate::tape::spool::job::OpenJob;
use crate::tape::stream::{Options, Stream};

/// What became of closing an archive.
enum Closed {
    /// It ends behind its last member, and has so many bytes.
    Whole(u64),
    /// There was no room.
    Not,
    /// What is on the tape could not be overwritten, and is as it was.
    Refused(Error),
}

impl Writer<'_> {
    /// The tape has ended after so many blocks of an archive. `kept.files` is how many files have
    /// gone into it, if it was all of them.
    pub(super) fn cut(
        &mut self,
        job: &OpenJob,
        id: BatchId,
        mut kept: Kept,
        marks: &Marks,
        blocks: u64,
    ) -> Result<Attempt> {
        let worm = self.place.as_ref().and_then(|it| it.worm);
        let is_worm = worm == Some(true);
        let place = match is_worm {
            true => marks.last_within(blocks),
            false => marks.last_closed_within(blocks),
        };
        let Some(place) = place else {
            // Not even its head. What there is of it stays, and nobody is told of it.
            self.set_full()?;
            return match blocks {
                0 => Ok(Attempt::Nothing),
                _ => {
                    let marked = self.drive()?.write_filemarks(1);
                    Ok(marked.map_or_else(Attempt::Broken, |_| Attempt::Nothing))
                }
            };
        };
        kept.results.cut(place.results)?;
        kept.sums.cut(place.sums)?;
        let closed = match is_worm {
            true => self.leave_open(kept.start, place, blocks),
            false => self.close_at(job, id, &mut kept, place),
        };
        let (closed, is_cut_off) = match closed {
            // Not every drive tells everybody that a tape can only be appended to.
            Ok(Closed::Refused(error)) if worm.is_none() => {
                (self.leave_untouched(kept.start, place, blocks, error), true)
            }
            closed => (closed, is_worm),
        };
        match closed {
            Ok(Closed::Whole(bytes)) => kept.bytes = bytes,
            Ok(Closed::Not) => {
                self.set_full()?;
                return Ok(Attempt::Nothing);
            }
            Ok(Closed::Refused(error)) | Err(error) => return Ok(Attempt::Broken(error)),
        }
        if place.oks == 0 && kept.files != Some(place.files) {
            return self.too_large(place.files, is_cut_off);
        }
        self.set_full()?;
        kept.end = (self.work.now)();
        kept.is_cut_off = is_cut_off;
        kept.files = (kept.files != Some(place.files)).then_some(place.files);
        Ok(Attempt::Kept(kept))
    }

    /// Not one file has fitted. On a tape that has none else this one is longer than a tape, if the
    /// same comes of a second try.
    fn too_large(&mut self, number: u64, is_cut_off: bool) -> Result<Attempt> {
        let seen = match &mut self.place {
            Some(place) if place.is_empty => place.too_large.replace(number),
            _ => {
                self.set_full()?;
                return Ok(Attempt::Nothing);
            }
        };
        if is_cut_off {
            // There is no second try.
            self.set_full()?;
            return Ok(Attempt::TooLarge(number));
        }
        // There is room behind it for what is shorter.
        Ok(if seen == Some(number) { Attempt::TooLarge(number) } else { Attempt::Nothing })
    }

    /// Closes an archive behind one of its members.
    fn close_at(
        &mut self,
        job: &OpenJob,
        id: BatchId,
        kept: &mut Kept,
        place: Mark,
    ) -> Result<Closed> {
        let block_bytes = self.place.as_ref().map_or(1, |it| it.block_bytes);
        let block = u64::from(block_bytes);
        let at = kept.start.position + place.position / block;
        let head = usize::try_from(place.position % block).unwrap_or(0);
        let mut buffer = vec![0; usize::try_from(block).unwrap_or(0)];
        self.go_to(at)?;
        if head > 0 {
            let read = self.drive()?.read(&mut buffer)?;
            if read != Read::Block(buffer.len()) {
                let what = format!("the block at position {at} is not the one that was written");
                return Err(Error::corrupt(what));
            }
            self.go_to(at)?;
        }
        let Some(loaded) = self.loaded.take() else {
            return Err(Error::new(ErrorKind::WrongTape, "there is no tape in the drive"));
        };
        let buffer_bytes = self.work.settings.buffer_bytes;
        let options = Options { block_bytes, buffer_bytes, is_past_warning: true };
        let mut stream = Stream::start(loaded, &options)?;
        let filled = stream
            .write_all(buffer.get(..head).unwrap_or_default())
            .map_err(|e| Error::io("writing to the tape", e))
            .and_then(|()| {
                let out: &mut dyn Write = &mut stream;
                let archive = Archive::resume(out, place.position, place.ids);
                finish(archive, job, id, &mut kept.sums)
            });
        let ended = if filled.is_ok() { stream.finish() } else { stream.stop() }?;
        self.loaded = Some(ended.loaded);
        match ended.error {
            Some(error) if ended.blocks == 0 && error.kind() == ErrorKind::Io => {
                return Ok(Closed::Refused(error));
            }
            Some(error) => return Err(error),
            None => {}
        }
        // Also after a part of it: no tape file stays open.
        let marked = self.drive()?.write_filemarks(1)?;
        if ended.why.is_some() || marked != Wrote::Whole {
            return Ok(Closed::Not);
        }
        let blocks = place.position / block + ended.blocks;
        self.arrive(kept.start, blocks)?;
        Ok(Closed::Whole(filled?))
    }

    /// Leaves an archive as it is, in the middle of a member.
    fn leave_open(&mut self, start: Start, place: Mark, blocks: u64) -> Result<Closed> {
        match self.drive()?.write_filemarks(1)? {
            Wrote::Whole => {
                self.arrive(start, blocks)?;
                Ok(Closed::Whole(place.position))
            }
            Wrote::NotWritten(_) => Ok(Closed::Not),
        }
    }

    /// The same after an error, if it is the same tape and has all that was written to it.
    fn leave_untouched(
        &mut self,
        start: Start,
        place: Mark,
        blocks: u64,
        error: Error,
    ) -> Result<Closed> {
        if self.drive()?.state()?.lost {
            return Err(error);
        }
        self.look_again(&error)?;
        let drive = self.drive()?;
        drive.to_end_of_data()?;
        let end = start.position + blocks;
        match drive.position()? {
            at if at == end => self.leave_open(start, place, blocks),
            // It has its filemark since the drive was moved.
            at if at == end + 1 => {
                self.arrive(start, blocks)?;
                Ok(Closed::Whole(place.position))
            }
            _ => Err(error),
        }
    }

    fn go_to(&mut self, position: u64) -> Result<()> {
        match self.drive()?.locate(position)? {
            Moved::There => Ok(()),
            _ => {
                let what = format!("the drive does not find position {position} again");
                Err(Error::new(ErrorKind::Io, what))
            }
        }
    }
}
