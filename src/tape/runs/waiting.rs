//! The jobs that archive runs of a catalog and are not done.

use std::path::Path;

use super::is_of;
use super::plan::is_begun;
use crate::catalog::{Reader, RunId};
use crate::error::Result;
use crate::tape::spool::Spool;
use crate::tape::spool::job::{JobKind, JobStatus};

/// A job that has not been written to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Its name.
    pub job: String,
    /// The run that it was made for.
    pub run: Option<RunId>,
    /// The pool of tapes.
    pub pool: Vec<u8>,
    /// Whether somebody writes it now.
    pub is_busy: bool,
    /// Batches that are not on tape.
    pub batches: u64,
    /// Files in them.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// The jobs of the catalog at `catalog` that wait, of all pools.
pub fn waiting(spool: &Spool, catalog: &Path) -> Result<Vec<Waiting>> {
    let reader = Reader::open(catalog)?;
    let mut found = Vec::new();
    for uuid in spool.jobs(false)? {
        let job = spool.job(&uuid)?;
        if job.kind() != JobKind::Write || !is_of(&job, catalog, &reader)? {
            continue;
        }
        let fields = job.fields();
        let status = spool.status_of(&job)?;
        if matches!(status, Some(JobStatus::Revoked | JobStatus::Cloned)) || is_begun(&job) {
            continue;
        }
        let mut waiting = Waiting {
            job: uuid.clone(),
            run: fields.number("run"),
            pool: fields.get("pool").unwrap_or(b"any").to_vec(),
            is_busy: status == Some(JobStatus::Busy),
            batches: 0,
            files: 0,
            bytes: 0,
        };
        for id in job.pending()? {
            let batch = job.batch(id)?;
            let number = |key| batch.fields().number(key).unwrap_or(0);
            waiting.batches += 1;
            waiting.files += number("count");
            waiting.bytes += number("size");
        }
        found.push(waiting);
    }
    Ok(found)
}
