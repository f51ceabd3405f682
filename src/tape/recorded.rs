//! What the spool has recorded of a batch on tape: where it is, and where each file is in it.
//!
//! What was written by this program has results; what the original one wrote has lines of its job's
//! log instead.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use super::read::Own;
use super::spool::Spool;
use super::spool::batch::{Batch, BatchId, Outcome};
use super::spool::job::Job;
use super::spool::log::{self, LogLine};
use super::spool::text::Lines;
use crate::error::{Error, ErrorKind, Result};

/// Where a batch is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The label of the tape.
    pub tape: Vec<u8>,
    /// Number of the tape file.
    pub filenum: u64,
    /// The drive's number of its first block, where that was noted.
    pub position: Option<u64>,
}

/// Where a batch was written to; the last time, if it was more than once.
pub fn place_of(spool: &Spool, job: &Job, id: BatchId) -> Result<Place> {
    let mut found = None;
    let summary = job.batch(id)?.summary()?;
    if let Some(summary) = &summary
        && let (Some(tape), Some(filenum)) = (summary.get("tape"), summary.number("filenum"))
    {
        found = Some(Place { tape: tape.to_vec(), filenum, position: None });
    }
    let mut from_log: Option<Place> = None;
    let mut last: Option<Place> = None;
    log::each_line(&job.log_path(), &mut |line| {
        match LogLine::parse(line) {
            LogLine::Tape { tape, filenum, position } => {
                last = Some(Place { tape: tape.to_vec(), filenum, position: Some(position) });
            }
            LogLine::BatchBegin { number, .. } if number == id.number => from_log = last.clone(),
            _ => {}
        }
        Ok(())
    })?;
    match (found, from_log) {
        (Some(found), Some(log)) if (&found.tape, found.filenum) == (&log.tape, log.filenum) => {
            Ok(log)
        }
        (Some(mut found), _) => {
            if let Some(tape) = spool.tape(&found.tape)? {
                tape.files(&mut |it| {
                    let is_it = (&*it.job, it.batch) == (job.uuid(), id.number);
                    if is_it && it.filenum == found.filenum {
                        found.position = Some(it.position);
                    }
                    Ok(())
                })?;
            }
            Ok(found)
        }
        (None, Some(log)) => Ok(log),
        (None, None) => {
            let name = format!("batch {} of job {}", id.number, job.uuid());
            let message = format!("{name} has been written to no tape that is known");
            Err(Error::new(ErrorKind::NotFound, message))
        }
    }
}

/// Where an archive ends that could not be closed.
#[derive(Debug)]
pub struct Cut {
    /// Bytes of it that are good.
    pub at: u64,
    /// The spool's sums of its files: it has none itself.
    pub sums: PathBuf,
}

impl Cut {
    /// That of a batch, if it is such a one.
    pub fn of(job: &Job, id: BatchId) -> Result<Option<Cut>> {
        let at = job.batch(id)?.summary()?.and_then(|it| it.number("incomplete"));
        Ok(at.map(|at| Cut { at, sums: job.sums_path(id.number) }))
    }
}

/// Gives the positions and names of the files of a batch that are in its archive, in order.
pub enum Recorded {
    /// From the results.
    Results(Batch<BufReader<File>>),
    /// From the log, up to the next batch of the job.
    Log(Lines<BufReader<File>>, String),
    /// Nothing more.
    End,
}

impl Recorded {
    /// Those of a batch that is at this place; `None` if the spool knows nothing of them.
    pub fn open(job: &Job, id: BatchId, place: &Place) -> Result<Option<Recorded>> {
        if job.batch(id)?.summary()?.is_some() {
            return Ok(Some(Recorded::Results(job.batch(id)?)));
        }
        // The last time that it was written there counts.
        let begins = |line: &[u8]| match LogLine::parse(line) {
            LogLine::Tape { tape, filenum, .. } => {
                Some(tape == place.tape && filenum == place.filenum)
            }
            _ => None,
        };
        let Some(input) = log::open_to_read(&job.log_path())? else { return Ok(None) };
        let mut lines = Lines::new(input);
        let (mut count, mut last, mut is_here) = (0u64, None, false);
        while lines.advance()? {
            count += 1;
            is_here = begins(lines.line()).unwrap_or(is_here);
            if let LogLine::BatchBegin { number, .. } = LogLine::parse(lines.line())
                && is_here
                && number == id.number
            {
                last = Some(count);
            }
        }
        let Some(last) = last else { return Ok(None) };
        let Some(input) = log::open_to_read(&job.log_path())? else { return Ok(None) };
        let mut lines = Lines::new(input);
        for _ in 0..last {
            lines.advance()?;
        }
        Ok(Some(Recorded::Log(lines, job.uuid().to_owned())))
    }

    /// Whether every file that is right is among them. What the original program has logged is not
    /// known to be all.
    pub fn has_all(&self) -> bool {
        matches!(self, Recorded::Results(_))
    }

    /// The next file.
    pub fn next_file(&mut self) -> Result<Option<(u64, Vec<u8>)>> {
        match self {
            Recorded::Results(batch) => {
                while let Some(result) = batch.next_result()? {
                    if let Outcome::Ok(position, path) = result {
                        return Ok(Some((position, path.to_vec())));
                    }
                }
            }
            Recorded::Log(lines, uuid) => {
                while lines.advance()? {
                    if !lines.has_end() {
                        break;
                    }
                    match LogLine::parse(lines.line()) {
                        LogLine::File { position, path }
                            if Own::of(path).is_none_or(|it| it.job() != uuid) =>
                        {
                            return Ok(Some((position, path.to_vec())));
                        }
                        LogLine::BatchEnd { .. }
                        | LogLine::BatchBegin { .. }
                        | LogLine::Tape { .. } => break,
                        _ => {}
                    }
                }
            }
            Recorded::End => {}
        }
        *self = Recorded::End;
        Ok(None)
    }
}
