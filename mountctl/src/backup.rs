//! `mountctl backup`: a job from its start to the exit code.
//!
//! Invariant: once the daemon has taken the job, nothing done here ends it; whoever stops watching
//! leaves it running.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::{print, warn};
use crate::control;
use crate::failure::Failure;
use crate::jobs::{self, Job, Progress};
use crate::shown::{shown_bytes, shown_size};

/// The command line of `mountctl backup`.
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// The mount to use, if several catalogs are mounted
    #[arg(long, value_name = "MOUNTPOINT")]
    mount: Option<PathBuf>,
    /// Print the number of the job and do not wait for it
    #[arg(long)]
    detach: bool,
    /// No progress and no closing line
    #[arg(long)]
    quiet: bool,
    /// `ingest`, or the directory to back up and then the options of `raidtape backup`; any other
    /// path among them must be absolute
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGS"
    )]
    words: Vec<OsString>,
}

/// Starts the job; returns the exit code of the job.
pub fn run(arguments: &BackupArgs) -> Result<u8, Failure> {
    let directory = std::env::current_dir()
        .map_err(|error| Failure::on_path("find out the directory", Path::new("."), &error))?;
    let line = control::control_line(&arguments.words, &directory)?;
    let point = control::find_mount(arguments.mount.as_deref())?;
    let job = Job::new(&point, control::submit(&point, &line)?);
    if arguments.detach {
        print(&format!("job {}\n", job.number))?;
        return Ok(0);
    }
    let bar = (!arguments.quiet && io::stderr().is_terminal()).then(ProgressBar::new_spinner);
    let followed = job.follow(jobs::PAUSE, jobs::PATIENCE, &mut |progress| {
        if let Some(bar) = &bar {
            advance(bar, progress);
        }
    });
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    report(&job, &followed?, arguments.quiet)
}

fn report(job: &Job, end: &Progress, quiet: bool) -> Result<u8, Failure> {
    // The counts of a job that failed early say nothing.
    if !quiet && (end.state == "done" || end.run.is_some()) {
        print(&format!("{}\n", end.summary(job.number)))?;
    }
    if end.problems > 0 {
        match job.log_lines() {
            Ok(lines) => lines.iter().for_each(|line| warn(line)),
            Err(failure) => warn(&format!(
                "{} problems, but their list is lost: {}",
                end.problems, failure.message
            )),
        }
    }
    if let Some(error) = &end.error {
        warn(&format!("job {}: {}", job.number, shown_bytes(error.as_bytes())));
    } else if end.state != "done" {
        warn(&format!("job {} {}", job.number, end.state));
    }
    Ok(end.code())
}

fn advance(bar: &ProgressBar, progress: &Progress) {
    // Bytes tell more than files where the daemon knows how many there are.
    let (done, total) = match (progress.bytes_total, progress.files_total) {
        (Some(total), _) => (progress.bytes_done, Some(total)),
        (None, Some(total)) => (progress.files_done, Some(total)),
        (None, None) => (0, None),
    };
    let template = match total {
        Some(_) => "{spinner} [{bar:25}] {percent:>3}% {wide_msg}",
        None => "{spinner} {wide_msg}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    if let Some(total) = total {
        bar.set_length(total);
        bar.set_position(done);
    }
    bar.set_message(message(progress));
    bar.tick();
}

fn message(progress: &Progress) -> String {
    let phase = match progress.phase.as_deref() {
        Some(phase) if !phase.is_empty() => shown_bytes(phase.as_bytes()),
        _ => progress.state.clone(),
    };
    let files = match progress.files_total {
        Some(total) => format!("{} of {total} files", progress.files_done),
        None => format!("{} files", progress.files_done),
    };
    let problems = match progress.problems {
        0 => String::new(),
        count => format!(", {count} problems"),
    };
    format!("{phase}: {files}, {}{problems}", shown_size(progress.bytes_done))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_tells_what_is_known() {
        let mut progress = Progress { state: "queued".to_owned(), ..Progress::default() };
        assert_eq!(message(&progress), "queued: 0 files, 0 B");
        progress.phase = Some("scan\n".to_owned());
        progress.files_total = Some(5);
        progress.problems = 2;
        assert_eq!(message(&progress), "scan\\n: 0 of 5 files, 0 B, 2 problems");
    }

    #[test]
    fn the_bar_takes_bytes_before_files() {
        let bar = ProgressBar::hidden();
        let mut progress =
            Progress { files_done: 3, files_total: Some(4), bytes_done: 50, ..Progress::default() };
        advance(&bar, &progress);
        assert_eq!((bar.position(), bar.length()), (3, Some(4)));
        progress.bytes_total = Some(200);
        advance(&bar, &progress);
        assert_eq!((bar.position(), bar.length()), (50, Some(200)));
    }
}
