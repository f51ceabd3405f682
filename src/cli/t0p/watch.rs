//! `t0watch`.
//!
//! Invariant: what was said of a log is not said again, and of what was added to it since the last
//! look everything is read, but nothing before it.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;

use super::Device;
use crate::cli::{exit, show};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::tape::spool::Spool;
use crate::tape::spool::drive::{Drive, DriveStatus};
use crate::tape::spool::job::JobStatus;
use crate::tape::spool::log::{self, LogLine, TapeFile};

#[derive(Args)]
pub struct WatchArgs {
    #[command(flatten)]
    device: Device,
    /// Seconds between two looks
    #[arg(long, default_value_t = 1.0)]
    interval: f64,
}

/// How far the log of a job was read and said, in bytes.
#[derive(Default)]
struct Followed {
    read: u64,
    said: u64,
    /// Where the last batch in it went to.
    tape: Option<Vec<u8>>,
}

struct Watch<'a> {
    spool: &'a Spool,
    drive: &'a Drive,
    /// Tapes that were in the drive, and how far their logs were read.
    tapes: BTreeMap<Vec<u8>, u64>,
    jobs: BTreeMap<String, Followed>,
    /// What was said of the drive last.
    told: Option<String>,
}

/// Follows the logs of the jobs that a drive works on, until it is idle.
pub fn watch(spool: &Spool, args: &WatchArgs) -> Result<u8> {
    let drive = args.device.drive(spool)?;
    args.device.expect_noted(&drive)?;
    let interval = Duration::try_from_secs_f64(args.interval.max(0.01));
    let interval = interval.map_err(|_| Error::usage("that is no number of seconds"))?;
    let (tapes, jobs) = (BTreeMap::new(), BTreeMap::new());
    let mut watch = Watch { spool, drive: &drive, tapes, jobs, told: None };
    while watch.look()? && !args.device.is_dry {
        std::thread::sleep(interval);
    }
    Ok(exit::DONE)
}

impl Watch<'_> {
    /// Says what is new; whether the drive is still worked with.
    fn look(&mut self) -> Result<bool> {
        // First of all: whoever ends after this has written everything that is read below.
        let is_busy = self.drive.status()? == DriveStatus::Busy;
        let tape = self.drive.tape()?;
        let label = tape.as_ref().map(|it| Quoted(&it.name()).to_string());
        let word = if is_busy { "busy" } else { "idle" };
        let now = format!("{word} {}", label.as_deref().unwrap_or("no tape"));
        let mut jobs = self.working()?;
        if let Some(tape) = tape {
            let path = tape.log_path();
            // What came before is of no job that is worked on, or is in that one's log.
            let start = match self.tapes.get(&tape.name()) {
                Some(read) => *read,
                None => log::whole_bytes(&path)?,
            };
            let read = log::lines_from(&path, start, &mut |_, line| {
                // Also of one that was begun and ended between two looks.
                jobs.extend(TapeFile::parse(line).map(|it| it.job));
                Ok(())
            })?;
            self.tapes.insert(tape.name(), read);
        }
        jobs.extend(self.jobs.keys().cloned());
        jobs.sort();
        jobs.dedup();
        if is_busy {
            self.tell(&now);
        }
        jobs.iter().try_for_each(|it| self.follow(it))?;
        self.tell(&now);
        Ok(is_busy)
    }

    fn tell(&mut self, now: &str) {
        if self.told.as_deref() != Some(now) {
            show::say(format_args!("{now}"));
            self.told = Some(now.to_owned());
        }
    }

    /// Jobs that somebody works on, on whatever drive.
    fn working(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for uuid in self.spool.jobs(false)? {
            // It may be done, and somewhere else, by now.
            let Ok(job) = self.spool.job(&uuid) else { continue };
            if self.spool.status_of(&job)? == Some(JobStatus::Busy) {
                found.push(uuid);
            }
        }
        Ok(found)
    }

    /// Says what is new in the log of a job, if its last batch has gone to a tape of this drive.
    fn follow(&mut self, uuid: &str) -> Result<()> {
        let job = match self.spool.job(uuid) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            job => job?,
        };
        let path = job.log_path();
        let followed = self.jobs.entry(uuid.to_owned()).or_default();
        let is_first = followed.read == 0;
        let mut begin = followed.read;
        let Followed { read, said, tape } = followed;
        *read = log::lines_from(&path, *read, &mut |end, line| {
            match LogLine::parse(line) {
                // What it did at another time is of no interest.
                LogLine::Job { is_begin: true, .. } if is_first => *said = begin,
                LogLine::Tape { tape: it, .. } => *tape = Some(it.to_vec()),
                _ => {}
            }
            begin = end;
            Ok(())
        })?;
        if *said == *read || !tape.as_ref().is_some_and(|it| self.tapes.contains_key(it)) {
            return Ok(());
        }
        let end_of_read = *read;
        log::lines_from(&path, *said, &mut |end, line| {
            if end <= end_of_read {
                show::say(format_args!("{}", Quoted(line)));
            }
            Ok(())
        })?;
        *said = end_of_read;
        Ok(())
    }
}
