//! Jobs that read: files by their names, from whichever tapes have them.
//!
//! Invariant: of several places of a file the one that was written last is read. A tape that is not
//! to be had leaves its files out and no others. Names are held up to a number of bytes, and looked
//! for as many times as there are more.

use std::collections::{HashMap, HashSet};

use super::outcomes::{Outcomes, Sums};
use super::readback::{Reading, ends_all, errno_of, note};
use super::seek;
use super::spool::batch::{BatchId, BatchStatus, Summary};
use super::spool::find::{Found, absolute};
use super::spool::job::{Job, JobKind, JobStatus, OpenJob};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{Time, c};

/// Most bytes of names that are looked for at once.
const NAMES_BYTES_MAX: usize = 64 << 20;

impl Reading<'_> {
    /// Does a job that reads.
    pub fn job(&mut self, mut job: OpenJob) -> Result<()> {
        let refused = |why: &str| Err(Error::usage(format!("job {} {why}", job.uuid())));
        if job.kind() != JobKind::Read {
            return refused("is one that writes");
        }
        if let Some(status @ (JobStatus::Revoked | JobStatus::Cloned)) = job.status()? {
            return refused(&format!("is {}", status.as_str()));
        }
        job.set_status(Some(JobStatus::Busy))?;
        let mut failed: Option<Error> = None;
        for id in job.pending()? {
            match self.read_listed(&mut job, id) {
                Ok(()) => {}
                Err(e) if ends_all(&e) => {
                    failed = Some(e);
                    break;
                }
                // Other batches may be of tapes that are here.
                Err(e) if failed.is_some() => {
                    let path = format!("batch {} of job {}", id.number, job.uuid());
                    self.problem(path.as_bytes(), &e);
                }
                Err(e) => failed = Some(e),
            }
        }
        let Some(e) = failed else { return self.spool.finish(job) };
        let is_queued = self.spool.is_queued(job.uuid())?;
        job.set_status(is_queued.then_some(JobStatus::Ready))?;
        Err(e)
    }

    /// Reads the files that a batch of such a job lists, from wherever they are.
    fn read_listed(&mut self, job: &mut OpenJob, id: BatchId) -> Result<()> {
        let begin = Time::now().secs;
        let before = self.tally.errors;
        let mut results = job.begin_results()?;
        let (mut tape, mut filenum) = (Vec::new(), 0);
        let mut batch = job.batch(id)?;
        // Why nothing of a tape file could be read, and whether something of another could.
        let (mut failed, mut is_read) = (None, false);
        loop {
            let (mut names, mut bytes) = (Vec::new(), 0);
            while bytes < NAMES_BYTES_MAX
                && let Some(name) = batch.next_file()?
            {
                bytes += name.len() + 64;
                names.push(name.to_vec());
            }
            if names.is_empty() {
                break;
            }
            let mut files = self.look_up(job, &names)?;
            let here = self.taken.tape()?.map(|it| it.name());
            // What is in the drive comes first; each tape once, forwards.
            files.sort_by_cached_key(|it| {
                (Some(&it.tape) != here.as_ref(), it.tape.clone(), it.filenum, it.position)
            });
            let mut outcomes: HashMap<Vec<u8>, (u64, i32)> = HashMap::new();
            let is_same = |a: &Found, b: &Found| {
                (&a.tape, a.filenum, &a.job, a.batch) == (&b.tape, b.filenum, &b.job, b.batch)
            };
            for files in files.chunk_by(is_same) {
                match self.read_found(files) {
                    Ok(done) => {
                        is_read = true;
                        if let Some(it) = files.first() {
                            (tape, filenum) = (it.tape.clone(), it.filenum);
                        }
                        // What is bad was set aside when it was met.
                        done.merge(&mut |_| {}, &mut |at, errno, name| {
                            outcomes.insert(name.to_vec(), (at, errno));
                            Ok(())
                        })?;
                    }
                    Err(e) if ends_all(&e) => return Err(e),
                    Err(e) => {
                        let errno = errno_of(&e);
                        outcomes.extend(files.iter().map(|it| (it.path.clone(), (0, errno))));
                        if let Some(it) = files.first() {
                            let path = format!("batch {} of job {}", it.batch, it.job);
                            self.problem(path.as_bytes(), &e);
                        }
                        failed = Some(e);
                    }
                }
            }
            for name in names {
                let missing = Error::new(ErrorKind::NotFound, "no tape that is known has it");
                let path = absolute(job, &name);
                let (at, errno) = match outcomes.get(&path) {
                    Some(outcome) => *outcome,
                    None => {
                        self.problem(&name, &missing);
                        (0, c::ENOENT)
                    }
                };
                note(&mut results, at, errno, &name)?;
                match errno {
                    0 => self.tally.files += 1,
                    _ => self.tally.errors += 1,
                }
            }
        }
        // Whoever brings the tapes has it all still to do.
        if let Some(e) = failed.filter(|_| !is_read) {
            let what = format!("nothing of batch {} of job {} was read", id.number, job.uuid());
            return Err(Error::new(e.kind(), what));
        }
        self.sync()?;
        self.tally.batches += u64::from(self.tally.errors == before);
        let summary = Summary { begin, end: Time::now().secs, tape, filenum };
        job.complete(id, results, &summary, BatchStatus::Read)?;
        Ok(())
    }

    /// Reads files that are of one batch.
    fn read_found(&mut self, files: &[Found]) -> Result<Outcomes> {
        let Some(Found { tape, filenum, job, batch, .. }) = files.first() else {
            return Ok(Outcomes::default());
        };
        self.need(tape)?;
        let known = self.spool.tape(tape)?;
        let known = known.map(|it| seek::known_file(&it, *filenum)).transpose()?.flatten();
        let mut sums = Sums::open(&self.spool.job(job)?.sums_path(*batch));
        let mut left = files.iter();
        let mut give = || Ok(left.next().map(|it| (it.position, it.path.clone())));
        self.with_file(*filenum, known.map(|it| it.position), |this, file, _| {
            this.pick(file, &mut give, &mut sums)
        })
    }

    /// Where files are: of several places the one that was written last.
    fn look_up(&self, job: &Job, names: &[Vec<u8>]) -> Result<Vec<Found>> {
        let wanted: HashSet<Vec<u8>> = names.iter().map(|it| absolute(job, it)).collect();
        let mut found: HashMap<Vec<u8>, Found> = HashMap::new();
        self.spool.find(&|path| wanted.contains(path), &mut |it| {
            if found.get(&it.path).is_none_or(|known| it.written >= known.written) {
                found.insert(it.path.clone(), it.clone());
            }
            Ok(())
        })?;
        Ok(found.into_values().collect())
    }
}
