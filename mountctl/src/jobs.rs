//! Follows a job of the daemon until it has ended.
//!
//! Invariant: only the daemon's own word ends the waiting with success. A progress file that
//! cannot be read for some seconds is an error, since a vanished mount must not look like a job
//! that is merely slow.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::failure::Failure;
use crate::shown::{shown, shown_bytes, shown_size};

/// How often the progress is read.
pub const PAUSE: Duration = Duration::from_millis(200);

/// How long the progress may stay unreadable.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// What a job says about itself. Fields of other versions may be missing or be unknown here.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Progress {
    pub state: String,
    pub phase: Option<String>,
    pub files_done: u64,
    pub files_total: Option<u64>,
    pub bytes_done: u64,
    pub bytes_total: Option<u64>,
    pub run: Option<u64>,
    pub added: u64,
    pub modified: u64,
    pub deleted: u64,
    pub unchanged: u64,
    pub bytes_read: u64,
    pub bytes_stored: u64,
    pub problems: u64,
    pub error: Option<String>,
    pub exit_code: Option<i64>,
}

impl Progress {
    fn has_ended(&self) -> bool {
        matches!(self.state.as_str(), "done" | "failed" | "cancelled")
    }

    /// The exit code for this end; nothing but `done` can ever be success.
    pub fn code(&self) -> u8 {
        let told = self.exit_code.and_then(|code| u8::try_from(code).ok());
        match (self.state.as_str(), told) {
            ("done", None) if self.exit_code.is_none() => 0,
            ("done", Some(code)) => code,
            (_, Some(code)) => code.max(1),
            (_, None) => 1,
        }
    }

    /// The closing line for the user.
    pub fn summary(&self, job: u64) -> String {
        let name = match self.run {
            Some(run) => format!("run {run}"),
            None => format!("job {job}"),
        };
        format!(
            "{name}: added {}, modified {}, deleted {}, unchanged {}; read {}, stored {} new",
            self.added,
            self.modified,
            self.deleted,
            self.unchanged,
            shown_size(self.bytes_read),
            shown_size(self.bytes_stored)
        )
    }
}

/// One job of one mount.
#[derive(Debug)]
pub struct Job {
    pub number: u64,
    directory: PathBuf,
}

impl Job {
    pub fn new(point: &Path, number: u64) -> Self {
        Self { number, directory: point.join(".ctl/jobs").join(number.to_string()) }
    }

    /// Waits for the end, showing every progress read on the way.
    pub fn follow(
        &self,
        pause: Duration,
        patience: Duration,
        show: &mut dyn FnMut(&Progress),
    ) -> Result<Progress, Failure> {
        let mut readable = Instant::now();
        loop {
            match self.progress() {
                Ok(progress) => {
                    readable = Instant::now();
                    show(&progress);
                    if progress.has_ended() {
                        return Ok(progress);
                    }
                }
                Err(error) if is_final(&error) || readable.elapsed() >= patience => {
                    return Err(self.lost(&error));
                }
                Err(_) => {}
            }
            thread::sleep(pause);
        }
    }

    fn progress(&self) -> io::Result<Progress> {
        let bytes = fs::read(self.directory.join("progress.json"))?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    fn lost(&self, error: &io::Error) -> Failure {
        Failure::failed(format!(
            "lost sight of job {} in {}: {error}; see `mountctl status` and the list of runs for \
             what became of it",
            self.number,
            shown(&self.directory)
        ))
    }

    /// The lines of its log in which the job names its problems.
    pub fn log_lines(&self) -> Result<Vec<String>, Failure> {
        let path = self.directory.join("log");
        let bytes = fs::read(&path).map_err(|error| Failure::on_path("read", &path, &error))?;
        Ok(bytes.split(|byte| *byte == b'\n').filter_map(problem).map(shown_bytes).collect())
    }
}

/// The problem that a line of a log tells of, without the time before it.
fn problem(line: &[u8]) -> Option<&[u8]> {
    let text = line.splitn(2, |byte| *byte == b' ').nth(1)?;
    text.strip_prefix(b"! ")
}

/// A daemon that has ended does not come back to the same mount.
fn is_final(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotConnected | io::ErrorKind::ConnectionAborted)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

    use super::*;

    const SOON: Duration = Duration::from_millis(5);
    const SHORT: Duration = Duration::from_millis(100);

    fn tree() -> (tempfile::TempDir, Job) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join(".ctl/jobs/3")).unwrap();
        let job = Job::new(directory.path(), 3);
        (directory, job)
    }

    fn put(job: &Job, text: &str) {
        let path = job.directory.join("progress.json");
        let draft = job.directory.join("draft");
        fs::write(&draft, text).unwrap();
        fs::rename(draft, path).unwrap();
    }

    #[test]
    fn a_job_is_followed_to_its_end() {
        let (_directory, job) = tree();
        put(&job, r#"{"job":3,"state":"queued","files_total":null}"#);
        let mut seen = Vec::new();
        let end = job
            .follow(SOON, SHORT, &mut |progress| {
                seen.push(progress.state.clone());
                match progress.state.as_str() {
                    "queued" => put(&job, r#"{"state":"running","files_done":2}"#),
                    "running" => put(
                        &job,
                        r#"{"state":"done","run":4,"added":10,"modified":2,"deleted":1,
                        "unchanged":300,"bytes_read":12897485,"bytes_stored":1258291,
                        "exit_code":0,"error":null}"#,
                    ),
                    _ => {}
                }
            })
            .unwrap();
        assert_eq!(seen, ["queued", "running", "done"]);
        assert_eq!(end.code(), 0);
        assert_eq!(
            end.summary(3),
            "run 4: added 10, modified 2, deleted 1, unchanged 300; \
             read 12.3 MiB, stored 1.2 MiB new"
        );
    }

    #[test]
    fn a_file_unreadable_for_a_moment_is_borne() {
        let (_directory, job) = tree();
        let path = job.directory.join("progress.json");
        fs::write(&path, "{\"sta").unwrap();
        let late = path.clone();
        let writer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(30));
            fs::write(late, r#"{"state":"failed","error":"no space","exit_code":5}"#).unwrap();
        });
        let end = job.follow(SOON, Duration::from_secs(20), &mut |_| {}).unwrap();
        writer.join().unwrap();
        assert_eq!(end.code(), 5);
        assert_eq!(end.error.as_deref(), Some("no space"));
    }

    #[test]
    fn a_vanished_job_is_an_error() {
        let (_directory, job) = tree();
        let failure = job.follow(SOON, SHORT, &mut |_| {}).unwrap_err();
        assert!(failure.message.contains("job 3"), "{failure:?}");
    }

    #[test]
    fn only_done_can_be_success() {
        let end = |state: &str, exit_code: Option<i64>| Progress {
            state: state.to_owned(),
            exit_code,
            ..Progress::default()
        };
        assert_eq!(end("done", None).code(), 0);
        assert_eq!(end("done", Some(3)).code(), 3);
        assert_eq!(end("done", Some(-1)).code(), 1);
        assert_eq!(end("failed", Some(0)).code(), 1);
        assert_eq!(end("failed", Some(300)).code(), 1);
        assert_eq!(end("cancelled", None).code(), 1);
        assert_eq!(end("cancelled", Some(9)).code(), 9);
    }

    #[test]
    fn a_job_without_a_run_is_named_by_its_number() {
        assert!(Progress::default().summary(8).starts_with("job 8: added 0"));
    }

    #[test]
    fn log_lines_hold_no_control_characters() {
        let (_directory, job) = tree();
        let log = b"T asked for\nT ! cannot read a\xff\x1b\n\nT ! second\nT done: run 1\n";
        fs::write(job.directory.join("log"), log).unwrap();
        assert_eq!(job.log_lines().unwrap(), ["cannot read a\\xff\\u{1b}", "second"]);
    }
}
