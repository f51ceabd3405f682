//! The exit code table: what an [`ErrorKind`] and a result become when the process ends.
//!
//! The only place that decides it; the errno table in `fs` is its twin, and README prints it.

use crate::copies::Replicated;
use crate::error::{ErrorKind, Problem};
use crate::job::Outcome;
use crate::repair::Repaired;
use crate::tape::runs::Archived;
use crate::validate::Report;

/// All went well.
pub const DONE: u8 = 0;
/// Something failed that no other code names.
pub const FAILED: u8 = 1;
/// The command line is wrong.
pub const USAGE: u8 = 2;
/// Done, but some files could not be read or restored; each has been named.
pub const PROBLEMS: u8 = 3;
/// Data is not on a disk that is reachable now; it may be on tape.
pub const OFFLINE: u8 = 4;
/// Stored data is damaged.
pub const DAMAGED: u8 = 5;

/// The exit code of an error.
pub fn of_kind(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Usage => USAGE,
        ErrorKind::Offline | ErrorKind::OnTape => OFFLINE,
        ErrorKind::Corrupt => DAMAGED,
        ErrorKind::NoSpace => 6,
        ErrorKind::WrongTape => 7,
        ErrorKind::Version => 8,
        ErrorKind::NoCatalog => 10,
        ErrorKind::Locked => 11,
        ErrorKind::Interrupted => 130,
        ErrorKind::NotFound | ErrorKind::Denied | ErrorKind::Io => FAILED,
    }
}

/// The exit code of something done with these problems: damage outranks absence outranks the rest.
pub fn of_problems(problems: &[Problem], count: u64) -> u8 {
    let has = |kind| problems.iter().any(|it| it.kind == kind);
    match count {
        0 => DONE,
        _ if has(ErrorKind::Corrupt) => DAMAGED,
        _ if has(ErrorKind::Offline) || has(ErrorKind::OnTape) => OFFLINE,
        _ => PROBLEMS,
    }
}

/// The exit code of a repair: what is still wrong.
pub fn of_repaired(report: &Report, done: &Repaired) -> u8 {
    report.worst_after(done.worst()).map_or(DONE, of_kind)
}

/// The exit code of a replication.
pub fn of_replicated(done: &Replicated) -> u8 {
    match done.worst() {
        None => DONE,
        Some(
            kind @ (ErrorKind::Corrupt
            | ErrorKind::Offline
            | ErrorKind::OnTape
            | ErrorKind::NoSpace),
        ) => of_kind(kind),
        Some(_) => PROBLEMS,
    }
}

/// The exit code of an archive to tape: what could not be read is not there.
pub fn of_archived(done: &Archived) -> u8 {
    if done.tally.errors > 0 { PROBLEMS } else { DONE }
}

/// The exit code that the job's command would have had.
pub fn exit_code_of_job(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::BackedUp(summary) => of_problems(&summary.problems, summary.counts.problems),
        Outcome::Restored(_, summary) => of_problems(&summary.problems, summary.problem_count),
        Outcome::Validated(report) => report.worst().map_or(DONE, of_kind),
        Outcome::Repaired(report, done) => of_repaired(report, done),
        Outcome::Described(summary) => of_problems(&summary.problems, summary.problem_count),
        Outcome::Replicated(done) => of_replicated(done),
        Outcome::Archived(_, done) => of_archived(done),
        Outcome::Failed(error) => of_kind(error.kind()),
    }
}
