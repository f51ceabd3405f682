//! Jobs: pieces of work that somebody has asked for, and the queue that does them.
//!
//! One grammar serves the command line and the control files ([`grammar`]). The queue of a mount
//! does one job at a time, in the order in which they came, on its own thread; a job that panics
//! fails alone. What a job says and how far it is can be read at any time, also after its end.

pub mod grammar;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use serde_json::{Value, json};

use crate::backup;
use crate::catalog::{Counts, RunId};
use crate::error::{Error, ErrorKind, Problem, Quoted, Result};
use crate::progress::Progress;

pub use grammar::{BackupArgs, Request};

/// Number of a job, from 1 in each mount.
pub type JobId = u64;

/// Jobs that wait at most; one more is refused.
const WAITING_MAX: usize = 16;
/// Jobs that are remembered after their end.
const FINISHED_MAX: usize = 100;
/// Lines that a job's log keeps.
const LOG_LINES_MAX: usize = 10_000;

/// What a job came to.
#[derive(Debug)]
pub enum Outcome {
    /// It was done; some entries may have had problems.
    Done(backup::Summary),
    /// It failed, or was cancelled.
    Failed(Error),
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waiting for its turn.
    Queued,
    /// Being done.
    Running,
    /// Done.
    Done,
    /// Failed.
    Failed,
    /// Stopped on request.
    Cancelled,
}

impl State {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Queued => "queued",
            State::Running => "running",
            State::Done => "done",
            State::Failed => "failed",
            State::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more will happen to it.
    pub fn has_ended(self) -> bool {
        !matches!(self, State::Queued | State::Running)
    }
}

/// A job. Shared by those who watch it.
pub struct Job {
    /// Its number.
    pub id: JobId,
    /// The line that asked for it.
    pub line: Vec<u8>,
    request: Request,
    progress: Progress,
    status: Mutex<Status>,
    ended: Condvar,
}

struct Status {
    state: State,
    run: Option<RunId>,
    counts: Counts,
    error: Option<String>,
    exit_code: Option<u8>,
    log: Vec<String>,
}

impl Job {
    /// Where it stands.
    pub fn state(&self) -> State {
        self.status.lock().state
    }

    /// Asks it to stop. One that waits is cancelled at once.
    pub fn cancel(&self) {
        self.progress.cancel();
        let mut status = self.status.lock();
        if status.state == State::Queued {
            status.state = State::Cancelled;
            status.exit_code = Some(130);
            status.error = Some("cancelled before it began".to_owned());
            self.ended.notify_all();
        }
    }

    /// Waits for its end.
    pub fn wait(&self) -> State {
        let mut status = self.status.lock();
        self.ended.wait_while(&mut status, |status| !status.state.has_ended());
        status.state
    }

    /// What people read: `key value` lines, the first of which is `job N`.
    pub fn status_text(&self) -> String {
        let Value::Object(map) = self.progress_json() else { return String::new() };
        let mut text = String::new();
        for (key, value) in map {
            match value {
                Value::Null => {}
                Value::String(word) => text.push_str(&format!("{key} {word}\n")),
                other => text.push_str(&format!("{key} {other}\n")),
            }
        }
        text
    }

    /// What programs read.
    pub fn progress_json(&self) -> Value {
        let status = self.status.lock();
        let mut done = self.progress.counters();
        if status.state == State::Done {
            // Whatever the run before had, this is all there was.
            (done.entries_total, done.bytes_total) = (Some(done.entries), Some(done.bytes));
        }
        let (entries, counts) = (&status.counts.entries, &status.counts);
        json!({
            "job": self.id,
            "state": status.state.as_str(),
            "command": Quoted(&self.line).to_string(),
            "phase": self.progress.phase(),
            "files_done": done.entries,
            "files_total": done.entries_total,
            "bytes_done": done.bytes,
            "bytes_total": done.bytes_total,
            "run": status.run,
            "added": entries.added,
            "modified": entries.modified,
            "deleted": entries.deleted,
            "unchanged": entries.unchanged,
            "bytes_read": done.bytes_read,
            "bytes_new": done.bytes_new,
            "bytes_stored": if status.run.is_some() { counts.bytes_stored }
                else { done.bytes_stored },
            "problems": done.problems,
            "error": status.error,
            "exit_code": status.exit_code,
        })
    }

    /// The problems it met, a line each.
    pub fn log_text(&self) -> String {
        let mut text = self.status.lock().log.join("\n");
        if !text.is_empty() {
            text.push('\n');
        }
        text
    }

    fn begin(&self) -> bool {
        let mut status = self.status.lock();
        let is_due = status.state == State::Queued;
        if is_due {
            status.state = State::Running;
        }
        is_due
    }

    fn end(&self, outcome: &Outcome, exit_code: u8) {
        let mut status = self.status.lock();
        status.exit_code = Some(exit_code);
        match outcome {
            Outcome::Done(summary) => {
                status.state = State::Done;
                status.run = Some(summary.run);
                status.counts = summary.counts;
                status.log = log_lines(&summary.problems);
            }
            Outcome::Failed(error) => {
                status.state = match error.kind() {
                    ErrorKind::Interrupted => State::Cancelled,
                    _ => State::Failed,
                };
                status.error = Some(error.to_string());
                status.log = vec![error.to_string()];
            }
        }
        self.ended.notify_all();
    }
}

fn log_lines(problems: &[Problem]) -> Vec<String> {
    problems.iter().take(LOG_LINES_MAX).map(Problem::to_string).collect()
}

/// How many jobs there are, by where they stand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tallies {
    /// Waiting.
    pub queued: usize,
    /// Being done.
    pub running: usize,
    /// Ended, and still remembered.
    pub finished: usize,
}

/// The jobs of a mount.
pub struct Queue {
    catalog: PathBuf,
    /// The exit code table of the command line, so that there is one.
    exit_code: fn(&Outcome) -> u8,
    jobs: Mutex<Jobs>,
    came: Condvar,
}

#[derive(Default)]
struct Jobs {
    all: VecDeque<Arc<Job>>,
    last: JobId,
    closed: bool,
}

impl Queue {
    /// A queue that works on the catalog at `catalog`.
    pub fn new(catalog: &Path, exit_code: fn(&Outcome) -> u8) -> Queue {
        let catalog = catalog.to_path_buf();
        Queue { catalog, exit_code, jobs: Mutex::default(), came: Condvar::new() }
    }

    /// Takes a job, or refuses it: malformed ([`ErrorKind::Usage`]) or too many
    /// ([`ErrorKind::Locked`]).
    pub fn submit(&self, line: &[u8], request: Request) -> Result<Arc<Job>> {
        let mut jobs = self.jobs.lock();
        let waiting = jobs.all.iter().filter(|job| job.state() == State::Queued).count();
        if waiting >= WAITING_MAX || jobs.closed {
            let message = format!("{waiting} jobs are waiting already");
            return Err(Error::new(ErrorKind::Locked, message));
        }
        jobs.last += 1;
        let status = Status {
            state: State::Queued,
            run: None,
            counts: Counts::default(),
            error: None,
            exit_code: None,
            log: Vec::new(),
        };
        let job = Arc::new(Job {
            id: jobs.last,
            line: line.to_vec(),
            request,
            progress: Progress::default(),
            status: Mutex::new(status),
            ended: Condvar::new(),
        });
        jobs.all.push_back(job.clone());
        while jobs.all.len() > FINISHED_MAX
            && let Some(at) = jobs.all.iter().position(|job| job.state().has_ended())
        {
            jobs.all.remove(at);
        }
        self.came.notify_all();
        Ok(job)
    }

    /// The job with this number, if it is remembered.
    pub fn get(&self, id: JobId) -> Option<Arc<Job>> {
        self.jobs.lock().all.iter().find(|job| job.id == id).cloned()
    }

    /// The job that came last.
    pub fn last(&self) -> Option<Arc<Job>> {
        self.jobs.lock().all.back().cloned()
    }

    /// The numbers of all remembered jobs, oldest first.
    pub fn ids(&self) -> Vec<JobId> {
        self.jobs.lock().all.iter().map(|job| job.id).collect()
    }

    /// How many jobs there are.
    pub fn tallies(&self) -> Tallies {
        let mut tallies = Tallies::default();
        for job in &self.jobs.lock().all {
            match job.state() {
                State::Queued => tallies.queued += 1,
                State::Running => tallies.running += 1,
                _ => tallies.finished += 1,
            }
        }
        tallies
    }

    /// Does jobs until [`Queue::close`]. For a thread of its own.
    pub fn work(&self) {
        while let Some(job) = self.next() {
            if !job.begin() {
                continue;
            }
            let Request::Backup(options) = &job.request;
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                backup::run(&self.catalog, options, &job.progress)
            }));
            let outcome = match result {
                Ok(Ok(summary)) => Outcome::Done(summary),
                Ok(Err(error)) => Outcome::Failed(error),
                Err(_) => Outcome::Failed(Error::new(ErrorKind::Io, "the job has panicked")),
            };
            job.end(&outcome, (self.exit_code)(&outcome));
        }
    }

    fn next(&self) -> Option<Arc<Job>> {
        let mut jobs = self.jobs.lock();
        loop {
            if jobs.closed {
                return None;
            }
            if let Some(job) = jobs.all.iter().find(|job| job.state() == State::Queued) {
                return Some(job.clone());
            }
            self.came.wait(&mut jobs);
        }
    }

    /// Cancels all jobs and ends [`Queue::work`].
    pub fn close(&self) {
        let mut jobs = self.jobs.lock();
        jobs.closed = true;
        jobs.all.iter().for_each(|job| job.cancel());
        self.came.notify_all();
    }
}
