//! One tape file: the archive of a batch.

use std::collections::BTreeMap;
use std::io::{self, Write};

use super::marks::{Mark, Marks};
use super::{Attempt, Kept, Writer, add_own, own_name};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::sys::quoted;
use crate::tape::cpio::{Added, Archive, Header, TRAILER};
use crate::tape::drive::{Why, Wrote};
use crate::tape::loaded::Start;
use crate::tape::spool::batch::{BatchId, Results};
use crate::tape::spool::job::OpenJob;
use crate::tape::spool::text::{self, NewFile};
use crate::tape::stream::{Counter, Options, Stream};
use crate::tape::sums;

/// Length of an odc header; sums of more than it can say take a longer one.
const HEADER_BYTES: u64 = 116;

/// What goes to the tape, counted.
struct Counted<'a> {
    out: &'a mut Stream,
    progress: &'a Progress,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.progress.check().map_err(|e| io::Error::other(e.to_string()))?;
        let written = self.out.write(bytes)?;
        Progress::add(&self.progress.bytes, written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// What is noted of an archive while it is written.
struct Notes {
    results: Results,
    sums: NewFile,
    marks: Marks,
    counter: Counter,
    files: u64,
    /// These are all files of the batch.
    is_all: bool,
    oks: u64,
    closing: u64,
}

impl Notes {
    fn mark(&mut self, archive: &Archive<&mut dyn Write>) {
        let mark = Mark {
            position: archive.position(),
            ids: archive.ids(),
            files: self.files,
            oks: self.oks,
            closing: self.closing + self.sums.bytes(),
            results: self.results.mark(),
            sums: self.sums.bytes(),
        };
        self.marks.add(mark, self.counter.blocks());
    }

    fn add(&mut self, added: &Added, archive: &Archive<&mut dyn Write>, name: &[u8]) -> Result<()> {
        match added {
            Added::Whole { position, notes } => {
                self.results.ok(*position, name)?;
                notes.iter().try_for_each(|it| self.results.note(it.as_str(), name))?;
                if let Some(sum) = archive.sum() {
                    self.sums.put(&sums::line(&sum, name))?;
                }
                self.oks += 1;
            }
            Added::Failed { errno } => self.results.fail(*errno, name)?,
        }
        self.files += 1;
        Ok(())
    }
}

/// The name of the member that has the sums.
pub(super) fn sums_name(job: &OpenJob, id: BatchId) -> Vec<u8> {
    [&*job.member_name(id.number), b".sha256"].concat()
}

impl Writer<'_> {
    /// Writes a batch as one tape file. Files that are known to be too large are left out.
    pub(super) fn write_archive(
        &mut self,
        job: &OpenJob,
        id: BatchId,
        too_large: &BTreeMap<u64, i32>,
    ) -> Result<Attempt> {
        let (Some(place), Some(loaded)) = (&self.place, self.loaded.take()) else {
            return Err(Error::new(ErrorKind::WrongTape, "there is no tape in the drive"));
        };
        let Some(start) = place.start else {
            return Err(Error::new(ErrorKind::WrongTape, "the drive is not at the end of data"));
        };
        let block_bytes = place.block_bytes;
        let begin = (self.work.now)();
        let buffer_bytes = self.work.settings.buffer_bytes;
        let options = Options { block_bytes, buffer_bytes, is_past_warning: false };
        let mut stream = Stream::start(loaded, &options)?;
        let name_len = sums_name(job, id).len() as u64 + 1;
        let mut notes = Notes {
            results: job.begin_results()?,
            sums: NewFile::create(&job.sums_path(id.number))?,
            marks: Marks::new(block_bytes),
            counter: stream.counter(),
            files: 0,
            is_all: false,
            oks: 0,
            closing: 2 * HEADER_BYTES + name_len + TRAILER.len() as u64 + 1,
        };
        let filled = self.fill(&mut stream, job, id, too_large, &mut notes);
        let ended = if filled.is_ok() { stream.finish() } else { stream.stop() }?;
        self.loaded = Some(ended.loaded);
        self.tally.underruns += ended.underruns;
        // Nobody knows any more where the drive stands, until all is well.
        if let Some(place) = &mut self.place {
            place.start = None;
        }
        if let Some(error) = ended.error {
            return Ok(Attempt::Broken(error));
        }
        let mut why = ended.why;
        if why.is_none() {
            if filled.is_err() {
                self.work.progress.check()?;
            }
            let bytes = self.of_job(filled)?;
            match self.drive()?.write_filemarks(1) {
                Ok(Wrote::Whole) => {
                    let blocks = ended.blocks;
                    return Ok(match self.arrive(start, blocks) {
                        Ok(()) => Attempt::Kept(Kept {
                            start,
                            begin,
                            end: (self.work.now)(),
                            files: None,
                            bytes,
                            is_cut_off: false,
                            results: notes.results,
                            sums: notes.sums,
                        }),
                        Err(error) => Attempt::Broken(error),
                    });
                }
                Ok(Wrote::NotWritten(it)) => why = Some(it),
                Err(error) => return Ok(Attempt::Broken(error)),
            }
        }
        match (why, &self.loaded) {
            (Some(why @ (Why::Protected | Why::Worm)), Some(loaded)) => Err(loaded.refused(why)),
            _ => {
                let Notes { results, sums, marks, files, is_all, .. } = notes;
                let kept = Kept {
                    start,
                    begin,
                    end: begin,
                    files: is_all.then_some(files),
                    bytes: 0,
                    is_cut_off: false,
                    results,
                    sums,
                };
                self.cut(job, id, kept, &marks, ended.blocks)
            }
        }
    }

    /// The tape file that began at `start` is closed: the next one begins where the drive stands.
    pub(super) fn arrive(&mut self, start: Start, blocks: u64) -> Result<()> {
        let position = self.drive()?.position()?;
        let expected = start.position + blocks + 1;
        if position != expected {
            let what = format!("the drive stands at {position} and should be at {expected}");
            return Err(Error::new(ErrorKind::Io, what));
        }
        if let Some(place) = &mut self.place {
            place.start = Some(Start { filenum: start.filenum + 1, position });
        }
        Ok(())
    }

    /// Puts all of a batch into the stream; gives the length of the archive.
    fn fill(
        &mut self,
        stream: &mut Stream,
        job: &OpenJob,
        id: BatchId,
        too_large: &BTreeMap<u64, i32>,
        notes: &mut Notes,
    ) -> Result<u64> {
        let progress = self.work.progress;
        let mut out = Counted { out: stream, progress };
        let mut archive: Archive<&mut dyn Write> = Archive::with_sums(&mut out);
        let path = job.batch_path(id)?;
        add_own(&mut archive, &job.member_name(id.number), text::open(&path)?.get_mut())?;
        let path = job.path();
        add_own(&mut archive, own_name(&path), text::open(&path)?.get_mut())?;
        notes.mark(&archive);
        let mut batch = job.batch(id)?;
        while let Some(name) = batch.next_file()? {
            progress.check()?;
            let before = archive.position();
            let added = match too_large.get(&notes.files) {
                Some(errno) => Added::Failed { errno: *errno },
                None => (self.work.add)(job, &mut archive, name)?,
            };
            notes.add(&added, &archive, name)?;
            let is_partial = matches!(added, Added::Failed { .. }) && archive.position() > before;
            if is_partial {
                notes.results.note("partial", name)?;
            }
            notes.mark(&archive);
            Progress::add(&progress.entries, 1);
        }
        notes.is_all = true;
        finish(archive, job, id, &mut notes.sums)
    }
}

/// Adds the sums and ends an archive; gives its length. The stream fills up its last block.
pub(super) fn finish(
    mut archive: Archive<&mut dyn Write>,
    job: &OpenJob,
    id: BatchId,
    sums: &mut NewFile,
) -> Result<u64> {
    add_own(&mut archive, &sums_name(job, id), sums.look()?.get_mut())?;
    let trailer = Header::trailer()?.len() as u64;
    let bytes = archive.position() + trailer;
    archive.finish(1).map(|_| bytes).map_err(|e| e.context(quoted(job.dir())))
}
