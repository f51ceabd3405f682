//! Jobs: pieces of work that somebody has asked for, and the queue that does them.
//!
//! One grammar serves the command line and the control files ([`grammar`]). The queue of a mount
//! does one job at a time, in the order in which they came, on its own thread; a job that panics
//! fails alone, and one that finds the catalog being written waits. What a job says and how far it
//! is can be read at any time; its number and its end are kept in the file of kept jobs.

mod archiving;
mod bell;
mod clear;
pub mod grammar;
mod known;
mod log;
mod queue;
mod restoring;
mod work;

use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::backup;
use crate::catalog::{Counts, RunId};
use crate::copies;
use crate::error::{Error, ErrorKind, Quoted};
use crate::genmeta;
use crate::progress::{Progress, Said};
use crate::restore;
use crate::sys::Time;
use crate::tape::runs::Archived;
use crate::{repair, validate};

pub use archiving::{Archiving, FirstTape};
pub use bell::Bell;
pub use clear::{Clear, Cleared, Prepare};
pub use grammar::{BackupArgs, Request, Site, VERBS, Verb};
pub use known::Known;
pub use queue::{Queue, Tallies};

use log::Log;

pub use crate::catalog::jobs::{Access, JobId};

/// Most of a command and of an error that a status shows, in bytes; the command has a file.
const SHOWN_BYTES_MAX: usize = 4 << 10;

/// Exit code of what has been done although some files had problems of their own.
const DONE_WITH_PROBLEMS: u8 = 3;

/// What a job came to.
#[derive(Debug)]
pub enum Outcome {
    /// A backup was made; some entries may have had problems.
    BackedUp(backup::Summary),
    /// It was restored from this run; some entries may have had problems.
    Restored(RunId, restore::Summary),
    /// Everything was looked at; damage may have been found.
    Validated(Box<validate::Report>),
    /// Everything was looked at, and what was damaged was repaired as far as it could be.
    Repaired(Box<validate::Report>, Box<repair::Repaired>),
    /// Metas and manifests were completed.
    Described(genmeta::Summary),
    /// Blocks were copied to further volumes.
    Replicated(copies::Replicated),
    /// This run is on tape; some members may not be.
    Archived(RunId, Box<Archived>),
    /// It failed, or was cancelled.
    Failed(Error),
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Waiting for its turn.
    Queued,
    /// Waiting for another process, which writes the catalog.
    Waiting,
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
            State::Waiting => "waiting",
            State::Running => "running",
            State::Done => "done",
            State::Failed => "failed",
            State::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more will happen to it.
    pub fn has_ended(self) -> bool {
        matches!(self, State::Done | State::Failed | State::Cancelled)
    }
}

/// A job. Shared by those who watch it.
pub struct Job {
    /// Its number.
    pub id: JobId,
    /// What was asked for.
    pub verb: Verb,
    /// The line that asked for it.
    pub line: Vec<u8>,
    /// The user who did.
    pub uid: u32,
    asked: Time,
    request: Request,
    progress: Progress,
    shared: Arc<Shared>,
}

/// What the work tells, and those who watch read.
struct Shared {
    status: Mutex<Status>,
    log: Log,
    bell: Arc<Bell>,
}

struct Status {
    state: State,
    /// What it waits for.
    waiting_for: Option<String>,
    /// The phase that the log has last.
    phase: &'static str,
    run: Option<RunId>,
    counts: Counts,
    cleared: Option<(u64, u64)>,
    /// What came of it, in a line.
    summary: Option<String>,
    error: Option<String>,
    exit_code: Option<u8>,
    /// Why it is to stop.
    reason: Option<&'static str>,
    /// Whether its end is kept.
    is_kept: bool,
}

impl Shared {
    /// What the work says goes into the log. The same phase again is a new try.
    fn hear(&self, said: &Said<'_>) {
        match said {
            Said::Problem(problem) => self.log.add(&format!("! {problem}")),
            Said::Phase(phase) => {
                let mut status = self.status.lock();
                if status.state == State::Waiting && *phase != PREPARING {
                    status.state = State::Running;
                    status.waiting_for = None;
                }
                if status.phase == *phase {
                    return;
                }
                status.phase = phase;
                if *phase != "done" {
                    // The last line says that, and what came of it.
                    self.log.add(phase);
                }
            }
        }
        self.bell.ring();
    }
}

/// The phase before a work has the right to write.
const PREPARING: &str = "preparing";

impl Job {
    fn new(
        id: JobId,
        verb: Verb,
        (line, uid): (Vec<u8>, u32),
        request: Request,
        bell: Arc<Bell>,
    ) -> Job {
        let status = Status {
            state: State::Queued,
            waiting_for: None,
            phase: "",
            run: None,
            counts: Counts::default(),
            cleared: None,
            summary: None,
            error: None,
            exit_code: None,
            reason: None,
            is_kept: false,
        };
        let shared = Arc::new(Shared { status: Mutex::new(status), log: Log::default(), bell });
        shared.log.add(&format!("asked for by user {uid}: {}", shown_command(verb, &line)));
        let progress = Progress::with_listener({
            let shared = shared.clone();
            Box::new(move |said| shared.hear(&said))
        });
        Job { id, verb, line, uid, asked: Time::now(), request, progress, shared }
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.shared.status.lock().state
    }

    /// Asks it to stop, and says why; whether it has ended by that, because it had not begun.
    fn cancel(&self, reason: &'static str) -> bool {
        self.progress.cancel();
        let mut status = self.shared.status.lock();
        status.reason.get_or_insert(reason);
        if status.state != State::Queued {
            return false;
        }
        status.state = State::Cancelled;
        status.exit_code = Some(130);
        let error = format!("{reason} before it began");
        self.shared.log.end(&[format!("cancelled: {error}")]);
        status.error = Some(error);
        true
    }

    /// What programs read.
    fn progress_json(&self) -> Value {
        let status = self.shared.status.lock();
        let mut done = self.progress.counters();
        if status.state == State::Done {
            // Whatever the run before had, this is all there was.
            (done.entries_total, done.bytes_total) = (Some(done.entries), Some(done.bytes));
        }
        let (entries, counts) = (&status.counts.entries, &status.counts);
        json!({
            "job": self.id,
            "state": status.state.as_str(),
            "waiting_for": status.waiting_for,
            "verb": self.verb.as_str(),
            "command": shown_command(self.verb, &self.line),
            "asked": log::clock(self.asked),
            "asked_by": self.uid,
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
            "bytes_stored": if status.run.is_some() && self.verb == Verb::Backup {
                counts.bytes_stored
            } else {
                done.bytes_stored
            },
            "problems": done.problems,
            "cleared": status.cleared.map(|it| it.0),
            "stayed": status.cleared.map(|it| it.1),
            "summary": status.summary,
            "error": status.error,
            "exit_code": status.exit_code,
        })
    }

    fn begin(&self) -> bool {
        let mut status = self.shared.status.lock();
        let is_due = status.state == State::Queued;
        if is_due {
            status.state = State::Running;
        }
        is_due
    }

    /// Adds a line to its log.
    fn say(&self, line: &str) {
        self.shared.log.add(line);
        self.shared.bell.ring();
    }

    /// Notes what was taken out of the source after the run.
    fn cleared(&self, cleared: &Cleared) {
        cleared.lines.iter().for_each(|line| self.shared.log.add(line));
        let counts = (cleared.files + cleared.dirs, cleared.stayed);
        self.shared.status.lock().cleared = Some(counts);
    }

    /// Notes that it has to wait for another process.
    fn wait_for(&self, what: String) {
        let mut status = self.shared.status.lock();
        if status.waiting_for.as_ref() != Some(&what) {
            self.shared.log.add(&format!("waiting for {what}"));
            status.state = State::Waiting;
            status.waiting_for = Some(what);
            drop(status);
            self.shared.bell.ring();
        }
    }

    fn end(&self, outcome: &Outcome, exit_code: u8) {
        let mut last = Vec::new();
        let mut status = self.shared.status.lock();
        match outcome {
            Outcome::BackedUp(summary) => {
                (status.run, status.counts) = (Some(summary.run), summary.counts);
            }
            Outcome::Restored(run, _) | Outcome::Archived(run, _) => status.run = Some(*run),
            Outcome::Validated(report) => last.extend(work::damage_lines(report)),
            Outcome::Repaired(report, done) => {
                last.extend(work::damage_lines(report));
                last.extend(work::repair_lines(done));
            }
            Outcome::Described(_) | Outcome::Replicated(_) | Outcome::Failed(_) => {}
        }
        let state = match outcome {
            Outcome::Failed(error) if error.kind() == ErrorKind::Interrupted => State::Cancelled,
            Outcome::Failed(_) => State::Failed,
            // Also what went on to its end: data was damaged or out of reach.
            _ if !matches!(exit_code, 0 | DONE_WITH_PROBLEMS) => State::Failed,
            _ => State::Done,
        };
        status.summary = work::summary_line(outcome);
        status.error = match outcome {
            Outcome::Failed(error) => {
                let reason = status.reason.filter(|_| state == State::Cancelled);
                Some(reason.map_or_else(|| cut(&error.to_string()), str::to_owned))
            }
            _ if state == State::Failed => status.summary.clone(),
            _ => None,
        };
        status.exit_code = Some(exit_code);
        let what = status.error.as_ref().or(status.summary.as_ref()).cloned();
        last.push(format!("{}: {}", state.as_str(), what.unwrap_or_default()));
        self.shared.log.end(&last);
        status.waiting_for = None;
        status.state = state;
    }
}

/// A command as it is shown on one line, cut where it is long.
fn shown_command(verb: Verb, line: &[u8]) -> String {
    let shown = Quoted(line).to_string();
    cut(format!("{} {shown}", verb.as_str()).trim_end())
}

/// The beginning of a text that may be long.
fn cut(text: &str) -> String {
    match text.char_indices().map(|it| it.0).find(|at| *at >= SHOWN_BYTES_MAX) {
        Some(at) => format!("{}...", text.get(..at).unwrap_or_default()),
        None => text.to_owned(),
    }
}
