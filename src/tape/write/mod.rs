//! Writing jobs to tape.
//!
//! A batch becomes one tape file: an archive of the batch file, the job file, the files and their
//! sums. Nothing is acknowledged before the filemark behind it is on the tape; then the job's log,
//! the tape's log, the results and the receipt say so, in this order. Writing always goes on at the
//! end of data of a tape whose label has been read, and after any error in the drive both are done
//! again. Whatever ends it, a batch that is not acknowledged is pending, and is written again.
//!
//! At the end of a tape the archive is cut behind the last member that is whole, and closed there;
//! the batch is split, and what is left of it goes to the next tape.

mod archive;
mod cut;
mod marks;
mod tapes;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::cpio::{Added, Archive};
use super::drive::Drive;
use super::loaded::{Loaded, Start};
use super::spool::Spool;
use super::spool::batch::{BatchId, BatchStatus, Outcome, Results, Summary};
use super::spool::drive::{Queue, TakenDrive};
use super::spool::job::{Job, JobKind, JobStatus, OpenJob};
use super::spool::log::{self as job_log, LogLine, TapeFile};
use super::spool::receipt;
use super::spool::tape::Tape;
use super::spool::text::NewFile;
use crate::error::{Error, ErrorKind, Problem, Quoted, Result};
use crate::progress::Progress;
use crate::sys::{self, c, quoted};

pub use tapes::{For, first_tape, has_tape_for, next_tape};

/// Length of blocks, if neither the tape nor anybody else says otherwise.
pub const BLOCK_BYTES: u32 = 32_768;
/// Shortest block that is written.
const BLOCK_BYTES_MIN: u32 = 512;
/// Longest block that is written.
pub const BLOCK_BYTES_MAX: u32 = 8 << 20;
/// Tapes that are tried one after another for one batch.
const TAPES_MAX: u32 = 1000;

/// Refuses blocks of a length that is not written, by [`ErrorKind::Usage`].
pub fn check_block_bytes(bytes: u32) -> Result<()> {
    match bytes {
        BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX => Ok(()),
        _ => Err(Error::usage(format!(
            "blocks of {bytes} bytes: {BLOCK_BYTES_MIN} to {BLOCK_BYTES_MAX} are possible"
        ))),
    }
}

/// What can be chosen.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The label of the tape that has to be in the drive at first.
    pub tape: Option<Vec<u8>>,
    /// Length of blocks; otherwise what the tape has.
    pub block_bytes: Option<u32>,
    /// Most memory that holds what waits for the drive.
    pub buffer_bytes: u64,
    /// A file for receipts, beside the one that a job names.
    pub receipt: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Settings {
        let buffer_bytes = super::stream::BUFFER_BYTES;
        Settings { tape: None, block_bytes: None, buffer_bytes, receipt: None }
    }
}

/// Adds one file of a batch to its archive; [`Files::add`] for plain files.
pub type Add<'a> = dyn FnMut(&Job, &mut Archive<&mut dyn Write>, &[u8]) -> Result<Added> + 'a;
/// Is told of each tape file that lasts, its results written; after a crash perhaps once more.
pub type Tell<'a> = dyn FnMut(&Written) -> Result<()> + 'a;
/// Puts another tape into the drive of the one that is given. `None` if there is none: then the job
/// goes on some other time.
pub type NextTape<'a> = dyn FnMut(Loaded, &Wanted) -> Result<Option<Loaded>> + 'a;

/// What writes jobs, and what it needs of others.
pub struct Work<'a> {
    /// The spool.
    pub spool: &'a Spool,
    /// The drive in it.
    pub drive: &'a TakenDrive,
    /// What is chosen.
    pub settings: Settings,
    /// Bytes that go to the tape, files, problems of files; and the wish to stop.
    pub progress: &'a Progress,
    /// What time it is.
    pub now: &'a dyn Fn() -> i64,
    /// See there.
    pub add: &'a mut Add<'a>,
    /// See there.
    pub tell: &'a mut Tell<'a>,
    /// See there.
    pub next_tape: &'a mut NextTape<'a>,
}

/// A tape that is wanted.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Why it cannot be the one that is in the drive.
    pub why: String,
    /// The pool that it has to be of.
    pub pool: Option<Vec<u8>>,
    /// Labels of those that have room, as far as is known, and are at hand.
    pub labels: Vec<Vec<u8>>,
}

/// A tape file that lasts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// The job.
    pub job: String,
    /// The batch's number within it.
    pub batch: u64,
    /// Its file in the spool, with the results. It moves with its job when that is done.
    pub path: PathBuf,
    /// The label of the tape.
    pub tape: Vec<u8>,
    /// Number of the file on the tape.
    pub filenum: u64,
    /// The drive's number of its first block.
    pub position: u64,
    /// Length of its blocks.
    pub block_bytes: u64,
    /// Length of the archive, without what fills the last block.
    pub bytes: u64,
    /// When it ended, in seconds since 1970.
    pub end: i64,
}

impl Written {
    /// What the results of a batch say of its tape file. `None` of one that is pending, or that the
    /// original program has written: it has no summary.
    pub fn of(job: &Job, id: BatchId) -> Result<Option<Written>> {
        let Some(summary) = job.batch(id)?.summary()? else { return Ok(None) };
        let number = |key| summary.number(key).unwrap_or(0);
        Ok(Some(Written {
            job: job.uuid().to_owned(),
            batch: id.number,
            path: job.batch_path(id)?,
            tape: summary.get("tape").unwrap_or_default().to_vec(),
            filenum: number("filenum"),
            position: number("position"),
            block_bytes: number("blocksize"),
            bytes: number("bytes"),
            end: summary.number("end").unwrap_or(0),
        }))
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Jobs that have been finished.
    pub jobs: u64,
    /// Batches that have been written.
    pub batches: u64,
    /// Files on tape.
    pub files: u64,
    /// Files that have failed.
    pub errors: u64,
    /// Bytes of archives.
    pub bytes: u64,
    /// How often a drive has had to wait for data.
    pub underruns: u64,
}

/// Adds plain files, which are looked up from the root of their job.
#[derive(Default)]
pub struct Files {
    root: Option<(String, OwnedFd)>,
}

impl Files {
    /// See [`Add`].
    pub fn add(
        &mut self,
        job: &Job,
        archive: &mut Archive<&mut dyn Write>,
        name: &[u8],
    ) -> Result<Added> {
        let root = match self.root.take().filter(|it| it.0 == job.uuid()) {
            Some((_, root)) => root,
            None => {
                let path = job.lookup_root();
                if path.is_relative() {
                    let what = format!("its root {} is relative to nothing", quoted(&path));
                    return Err(Error::usage(format!("{what}: set it with t0job -p root=PATH")));
                }
                // It may be a link.
                let opened = path.canonicalize().and_then(|it| sys::open_dir(&it));
                opened.map_err(|e| Error::io(format!("opening the root {}", quoted(&path)), e))?
            }
        };
        let added = archive.add_file(&root, name);
        self.root = Some((job.uuid().to_owned(), root));
        added
    }
}

/// The tape that is being written.
struct Place {
    tape: Tape,
    label: Vec<u8>,
    block_bytes: u32,
    /// Whether it can only be appended to, if that is known.
    worm: Option<bool>,
    /// Where its next file begins, if that is known and the drive stands there.
    start: Option<Start>,
    /// It has no file that anybody was told of.
    is_empty: bool,
    /// It was too short for this file of the batch at hand.
    too_large: Option<u64>,
}

/// What became of writing a batch.
enum Attempt {
    /// This part of it is on the tape.
    Kept(Kept),
    /// This file of it is longer than a tape.
    TooLarge(u64),
    /// Nothing of it is on this tape, which may be full.
    Nothing,
    /// Something has gone wrong in the drive.
    Broken(Error),
}

/// What is on the tape of a batch.
struct Kept {
    start: Start,
    begin: i64,
    end: i64,
    /// Files, if not all of them.
    files: Option<u64>,
    /// Length of the archive.
    bytes: u64,
    /// It has no end, because what is on the tape cannot be overwritten.
    is_cut_off: bool,
    results: Results,
    sums: NewFile,
}

/// Writes jobs to the tape in a drive, and to those that follow it.
pub struct Writer<'a> {
    work: Work<'a>,
    loaded: Option<Loaded>,
    place: Option<Place>,
    is_first_tape: bool,
    /// Tapes that may not be written, whatever the spool says of them.
    refused: BTreeSet<Vec<u8>>,
    /// What the error was about is the job, and neither the drive nor the spool.
    is_of_job: bool,
    tally: Tally,
}

impl<'a> Writer<'a> {
    /// Begins with the tape that is in the drive.
    pub fn new(work: Work<'a>, loaded: Loaded) -> Writer<'a> {
        Writer {
            work,
            loaded: Some(loaded),
            place: None,
            is_first_tape: true,
            refused: BTreeSet::new(),
            is_of_job: false,
            tally: Tally::default(),
        }
    }

    /// What was done so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Closes the drive. What was acknowledged is safe without it.
    pub fn close(mut self) -> Result<()> {
        self.loaded.take().map_or(Ok(()), Loaded::close)
    }

    /// Writes all jobs of a queue, those too that come into it meanwhile. One that cannot be
    /// written stays in it, `tell` is told why, and the next one is taken; but where no other job
    /// would fare better, for want of a tape, of room on a disk or of a drive that works, all ends.
    pub fn queue(&mut self, queue: &Queue<'_>, tell: &mut dyn FnMut(Error)) -> Result<()> {
        let mut failed = BTreeSet::new();
        while let Some(job) = queue.next_but(JobKind::Write, &failed)? {
            let uuid = job.uuid().to_owned();
            if let Err(e) = self.one(job)? {
                failed.insert(uuid);
                tell(e);
            }
        }
        Ok(())
    }

    /// Writes these jobs, queued or not, as [`Writer::queue`] does those of a queue.
    pub fn jobs(&mut self, uuids: &[String], tell: &mut dyn FnMut(Error)) -> Result<()> {
        for uuid in uuids {
            let done = match self.work.spool.take_job(uuid) {
                Ok(job) => self.one(job)?,
                Err(e) => Err(e.context(format_args!("job {uuid}"))),
            };
            if let Err(e) = done {
                tell(e);
            }
        }
        Ok(())
    }

    /// Writes one job of several. Inside, what is wrong with this one alone.
    fn one(&mut self, job: OpenJob) -> Result<std::result::Result<(), Error>> {
        self.is_of_job = false;
        match self.job(job) {
            Err(e) if self.is_of_job && is_of_job(e.kind()) => Ok(Err(e)),
            done => done.map(Ok),
        }
    }

    /// Notes that an error is the job's own.
    fn of_job<T>(&mut self, result: Result<T>) -> Result<T> {
        self.is_of_job = result.is_err();
        result
    }

    /// Writes what is left to write of a job.
    pub fn job(&mut self, mut job: OpenJob) -> Result<()> {
        let uuid = job.uuid().to_owned();
        let refused = |why: &str| Err(Error::usage(format!("job {uuid} {why}")));
        if job.kind() != JobKind::Write {
            return self.of_job(refused("is one that reads"));
        }
        if let Some(status @ (JobStatus::Revoked | JobStatus::Cloned)) = job.status()? {
            return self.of_job(refused(&format!("is {}", status.as_str())));
        }
        match self.batches(&mut job) {
            Ok(()) => {
                self.tally.jobs += 1;
                self.work.spool.finish(job)
            }
            Err(e) => {
                let is_queued = self.work.spool.is_queued(&uuid);
                // Whoever takes it next puts right what cannot be written now.
                if let Ok(is_queued) = is_queued {
                    let _ = job.set_status(is_queued.then_some(JobStatus::Ready));
                }
                Err(e.context(format_args!("job {uuid}")))
            }
        }
    }

    fn batches(&mut self, job: &mut OpenJob) -> Result<()> {
        let told = self.tell_last(job);
        self.of_job(told)?;
        let mut left = self.of_job(job.pending())?;
        if left.is_empty() {
            return Ok(());
        }
        job.set_status(Some(JobStatus::Busy))?;
        self.log_job(job, true)?;
        left.reverse();
        while let Some(id) = left.pop() {
            left.extend(self.batch(job, id)?);
        }
        self.log_job(job, false)
    }

    fn log_job(&self, job: &OpenJob, is_begin: bool) -> Result<()> {
        let mut log = job.log()?;
        let time = (self.work.now)();
        log.put(&LogLine::Job { job: job.uuid().as_bytes(), is_begin, time }.to_line())?;
        log.sync()
    }

    /// Writes a batch; gives what is left of it as a new one.
    fn batch(&mut self, job: &mut OpenJob, id: BatchId) -> Result<Option<BatchId>> {
        let mut too_large = BTreeMap::new();
        let mut has_failed = false;
        if let Some(place) = &mut self.place {
            place.too_large = None;
        }
        for _ in 0..TAPES_MAX {
            self.work.progress.check()?;
            self.ready(job)?;
            match self.write_archive(job, id, &too_large)? {
                Attempt::Kept(kept) => return self.acknowledge(job, id, kept),
                Attempt::TooLarge(number) => {
                    too_large.insert(number, c::EFBIG);
                }
                Attempt::Nothing => {}
                // It would be the same again.
                Attempt::Broken(error) if error.kind() == ErrorKind::Usage => return Err(error),
                Attempt::Broken(error) => {
                    self.look_again(&error)?;
                    if std::mem::replace(&mut has_failed, true) {
                        return Err(error);
                    }
                    log::warn!("{error}: it is the same tape still, and is tried once more");
                }
            }
        }
        Err(Error::new(ErrorKind::WrongTape, format!("{TAPES_MAX} tapes have taken nothing")))
    }

    /// After an error in the drive: it is the same tape, or nothing more is written.
    fn look_again(&mut self, error: &Error) -> Result<()> {
        if let Some(place) = &mut self.place {
            place.start = None;
        }
        let Some(loaded) = &mut self.loaded else {
            return Err(Error::new(ErrorKind::Io, error.to_string()));
        };
        loaded.again().map_err(|e| e.context(error))
    }

    fn drive(&mut self) -> Result<&mut dyn Drive> {
        match &mut self.loaded {
            Some(loaded) => Ok(loaded.drive()),
            None => Err(Error::new(ErrorKind::WrongTape, "there is no tape in the drive")),
        }
    }

    /// Says of a batch, or the first part of it, that it is on tape. Gives what is left.
    fn acknowledge(
        &mut self,
        job: &mut OpenJob,
        id: BatchId,
        kept: Kept,
    ) -> Result<Option<BatchId>> {
        let Kept { start, begin, end, files, bytes, is_cut_off, mut results, sums } = kept;
        let Some(place) = &mut self.place else {
            return Err(Error::new(ErrorKind::WrongTape, "the tape is gone"));
        };
        place.is_empty = false;
        let (tape, block_bytes) = (place.label.clone(), place.block_bytes);
        let known = place.tape.clone();
        let Start { filenum, position } = start;
        sums.commit(&job.sums_path(id.number))?;
        let rest = match files {
            Some(files) => Some(job.split(id, files, end)?),
            None => None,
        };
        let mut log = job.log()?;
        log.put(&LogLine::Tape { tape: &tape, filenum, position }.to_line())?;
        let (number, count) = (id.number, results.count());
        log.put(&LogLine::BatchBegin { number, time: begin, files: count }.to_line())?;
        let progress = self.work.progress;
        results.each(&mut |it| match it {
            Outcome::Ok(position, path) => log.put(&LogLine::File { position, path }.to_line()),
            Outcome::Fail(errno, path) => {
                progress.note(&problem(errno, path));
                log.put(&LogLine::Failed { path }.to_line())
            }
            Outcome::Note(..) | Outcome::Other(_) => Ok(()),
        })?;
        if is_cut_off {
            let line = b"* the archive has no end: what is on this tape cannot be overwritten";
            log.put(&LogLine::Other(line).to_line())?;
            results.set("incomplete", bytes.to_string())?;
        }
        let errors = results.errors();
        log.put(&LogLine::BatchEnd { number, time: end, errors }.to_line())?;
        log.sync()?;
        known.add_file(&TapeFile { filenum, position, job: job.uuid().into(), batch: number })?;
        results.set("position", position.to_string())?;
        results.set("blocksize", block_bytes.to_string())?;
        results.set("bytes", bytes.to_string())?;
        let summary = Summary { begin, end, tape, filenum };
        let done = job.complete(id, results, &summary, BatchStatus::Written)?;
        // Not before: the drive may take no blocks of this length.
        if known.metrics()?.get("blocksize").is_none() {
            tapes::set_metric(&known, "blocksize", u64::from(block_bytes))?;
        }
        self.tally.batches += 1;
        self.tally.files += count - errors;
        self.tally.errors += errors;
        self.tally.bytes += bytes;
        let told = self.tell(job, done);
        self.of_job(told)?;
        Ok(rest)
    }

    /// Tells of a batch that has been written.
    fn tell(&mut self, job: &Job, id: BatchId) -> Result<()> {
        let name = format!("{}/{}", job.uuid(), id.number);
        let of_job = job.fields().get("receipt").filter(|it| !it.is_empty());
        let of_job = of_job.map(|it| sys::path_from(it).to_path_buf());
        for path in [of_job, self.work.settings.receipt.clone()].into_iter().flatten() {
            receipt::append(&path, &name, &mut || job.batch(id))?;
        }
        Written::of(job, id)?.map_or(Ok(()), |it| (self.work.tell)(&it))
    }

    /// Tells of the batch that was written last, perhaps once more: whoever wrote it may have died
    /// before he could.
    fn tell_last(&mut self, job: &OpenJob) -> Result<()> {
        let mut last = None;
        job_log::each_line(&job.log_path(), &mut |line| {
            if let LogLine::BatchEnd { number, .. } = LogLine::parse(line) {
                last = Some(number);
            }
            Ok(())
        })?;
        // It may have been read back meanwhile. One that was never acknowledged is pending.
        let is_last = |it: &BatchId| last == Some(it.number) && it.status != BatchStatus::Pending;
        match job.batches()?.into_iter().find(is_last) {
            // What the original program wrote says nothing of itself.
            Some(id) if job.batch(id)?.summary()?.is_some() => self.tell(job, id),
            _ => Ok(()),
        }
    }
}

/// Whether an error of this kind may be one of a job alone.
fn is_of_job(kind: ErrorKind) -> bool {
    !matches!(kind, ErrorKind::Interrupted | ErrorKind::NoSpace | ErrorKind::WrongTape)
}

/// What to say of a file that has failed.
fn problem(errno: i32, path: &[u8]) -> Problem {
    let error = match errno {
        c::ESTALE => Error::new(ErrorKind::Io, "it changed while it was read"),
        c::EFBIG => Error::new(ErrorKind::NoSpace, "it is longer than a tape"),
        c::EINVAL => Error::usage("its name cannot be in an archive"),
        errno => Error::io("reading it", std::io::Error::from_raw_os_error(errno)),
    };
    Problem::new(path, &error)
}

/// Adds a file of the spool to an archive, under this name.
fn add_own(archive: &mut Archive<&mut dyn Write>, name: &[u8], file: &mut File) -> Result<()> {
    let failed = |e| Error::io(format!("reading {}", Quoted(name)), e);
    let stat = sys::fstat(&*file).map_err(failed)?;
    match archive.add(&super::cpio::Header::of(&stat), name, file)? {
        Added::Whole { .. } => Ok(()),
        Added::Failed { errno } => Err(failed(std::io::Error::from_raw_os_error(errno))),
    }
}

/// The name of the file `path` as one of a member.
fn own_name(path: &std::path::Path) -> &[u8] {
    path.as_os_str().as_bytes()
}
