//! Finding files: which tapes hold them, by the logs and the results of all jobs.
//!
//! Invariant: what is told is on its tape still, as far as the spool knows: the tape has got no
//! label since.

use std::collections::HashSet;

use super::Spool;
use super::batch::{BatchStatus, Outcome};
use super::job::{Job, JobKind};
use super::log::{self, LogLine};
use crate::error::{Error, Result};
use crate::sys::{self, Time, quoted};

/// Files of tapes that are remembered for one job.
const FILES_MAX: usize = 1 << 20;

/// A file on a tape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The tape.
    pub tape: Vec<u8>,
    /// Number of the file on the tape.
    pub filenum: u64,
    /// The job.
    pub job: String,
    /// The batch's number within it.
    pub batch: u64,
    /// Where the file's header is in the archive, in bytes.
    pub position: u64,
    /// Its path, absolute if that is known.
    pub path: Vec<u8>,
    /// When the writing of the batch began, and, if it counts as written, when that was noted: of
    /// two places the later one has what is newer.
    pub written: (i64, Time),
}

/// Calls `each` with every file that `is_wanted`, oldest job first by name; one that has been
/// written twice is told twice.
pub(super) fn find(
    spool: &Spool,
    is_wanted: &dyn Fn(&[u8]) -> bool,
    each: &mut dyn FnMut(&Found) -> Result<()>,
) -> Result<()> {
    for uuid in spool.jobs(true)? {
        let job = spool.job(&uuid)?;
        // One that reads says what it has found, and has put nothing anywhere.
        if job.kind() == JobKind::Read {
            continue;
        }
        in_job(spool, &job, is_wanted, each).map_err(|e| e.context(format_args!("job {uuid}")))?;
    }
    Ok(())
}

fn in_job(
    spool: &Spool,
    job: &Job,
    is_wanted: &dyn Fn(&[u8]) -> bool,
    each: &mut dyn FnMut(&Found) -> Result<()>,
) -> Result<()> {
    let mut known: HashSet<(Vec<u8>, u64)> = HashSet::new();
    for id in job.batches()? {
        if id.status == BatchStatus::Pending {
            continue;
        }
        let mut batch = job.batch(id)?;
        let Some(summary) = batch.summary()? else { continue };
        let (Some(tape), Some(filenum)) = (summary.get("tape"), summary.number("filenum")) else {
            continue;
        };
        if known.len() == FILES_MAX {
            return Err(Error::corrupt(format!("more than {FILES_MAX} completed batches")));
        }
        known.insert((tape.to_vec(), filenum));
        let begun = summary.number("begin").unwrap_or(0);
        if is_gone(spool, tape, filenum, job, id.number, begun)? {
            continue;
        }
        let path = job.batch_path(id)?;
        let stat = sys::stat(&path);
        let stat = stat.map_err(|e| Error::io(format!("looking at {}", quoted(&path)), e))?;
        let written = (begun, stat.mtime);
        while let Some(result) = batch.next_result()? {
            let Outcome::Ok(position, path) = result else { continue };
            let path = absolute(job, path);
            if is_wanted(&path) {
                let tape = tape.to_vec();
                let (job, batch) = (job.uuid().to_owned(), id.number);
                each(&Found { tape, filenum, job, batch, position, path, written })?;
            }
        }
    }
    // What the original program wrote has no results, and what was done again has lost them.
    let (mut place, mut number, mut begun) = (None, 0, 0);
    log::each_line(&job.log_path(), &mut |line| {
        match LogLine::parse(line) {
            LogLine::Tape { tape, filenum, .. } => {
                let is_known = known.contains(&(tape.to_vec(), filenum));
                place = (!is_known).then(|| (tape.to_vec(), filenum));
            }
            LogLine::BatchBegin { number: next, time, .. } => {
                (number, begun) = (next, time);
                if let Some((tape, filenum)) = &place
                    && is_gone(spool, tape, *filenum, job, number, begun)?
                {
                    place = None;
                }
            }
            LogLine::File { position, path } => {
                let Some((tape, filenum)) = &place else { return Ok(()) };
                let path = absolute(job, path);
                if is_wanted(&path) && !is_own(job, &path) {
                    let (tape, filenum) = (tape.clone(), *filenum);
                    let (job, batch) = (job.uuid().to_owned(), number);
                    let written = (begun, Time::default());
                    each(&Found { tape, filenum, job, batch, position, path, written })?;
                }
            }
            _ => {}
        }
        Ok(())
    })
}

/// Whether a batch was on a tape that has got another label since it was written.
fn is_gone(
    spool: &Spool,
    tape: &[u8],
    filenum: u64,
    job: &Job,
    batch: u64,
    begun: i64,
) -> Result<bool> {
    spool.tape(tape)?.map_or(Ok(false), |it| it.has_lost(filenum, job.uuid(), batch, begun))
}

/// Whether this is the batch or the job itself, which begin every archive. The job may have been
/// moved since.
fn is_own(job: &Job, path: &[u8]) -> bool {
    let mut parts = path.rsplit(|it| *it == b'/');
    let (name, dir) = (parts.next().unwrap_or_default(), parts.next());
    let is_name = matches!(name, b"wjob" | b"rjob") || name.starts_with(b"@");
    is_name && dir == Some(job.uuid().as_bytes())
}

/// The path of a file of a job: absolute, if the job has a root.
pub fn absolute(job: &Job, path: &[u8]) -> Vec<u8> {
    match job.root() {
        Some(root) if !path.starts_with(b"/") => {
            let root = root.strip_suffix(b"/").unwrap_or(root);
            [root, b"/", path].concat()
        }
        _ => path.to_vec(),
    }
}
