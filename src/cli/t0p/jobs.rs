//! `t0job` and `t0queue`.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use clap::{ArgGroup, Args};

use super::{Place, absolute};
use crate::cli::{exit, show};
use crate::error::{Error, Quoted, Result};
use crate::sys::Time;
use crate::tape::spool::Spool;
use crate::tape::spool::job::{JobKind, JobStatus};
use crate::tape::spool::log;
use crate::tape::spool::tape::names_of_files;
use crate::tape::spool::text::Fields;

/// Properties that are paths. Whoever works on a job may do so from another directory than who made
/// it.
const PATHS: [&str; 2] = ["root", "receipt"];
/// Lines that `--tail` shows.
const TAIL_LINES: usize = 20;

#[derive(Args)]
#[command(group = ArgGroup::new("what").multiple(false))]
pub struct JobArgs {
    /// Make a job, and print its name
    #[arg(short = 'c', long, group = "what")]
    create: bool,
    /// Add a batch of files to a job: those named here, or one a line from standard input
    #[arg(short = 'a', long, group = "what")]
    add: bool,
    /// List the jobs: `*` busy, `r` ready, `n` not queued; with -v also `x` done
    #[arg(short = 'l', long, group = "what")]
    list: bool,
    /// Make a job with the same batches, and print its name
    #[arg(long, group = "what")]
    clone: bool,
    /// Take a job out of its queue for good
    #[arg(long, group = "what")]
    revoke: bool,
    /// Make all of a job undone, so that it can be queued once more
    #[arg(long, group = "what")]
    redo: bool,
    /// Show the end of a job's log
    #[arg(long, group = "what")]
    tail: bool,
    /// The job is to read from tape
    #[arg(short = 'r', requires = "create")]
    read: bool,
    /// Set a property: of the new job, of the batch that is added, or of the job
    #[arg(short = 'p', value_name = "KEY=VALUE")]
    property: Vec<OsString>,
    /// Also those that are done
    #[arg(short = 'v', long)]
    verbose: bool,
    /// The job, then files
    words: Vec<OsString>,
}

#[derive(Args)]
pub struct QueueArgs {
    /// Add jobs
    #[arg(short = 'a', long)]
    add: bool,
    /// List the jobs in the queue
    #[arg(short = 'l', long, conflicts_with = "add")]
    list: bool,
    #[command(flatten)]
    place: Place,
    /// The jobs
    #[arg(requires = "add")]
    jobs: Vec<OsString>,
}

/// The name of a job, which may also be given as its directory.
pub fn name_of(word: &OsStr) -> Result<&str> {
    let name = Path::new(word).file_name().and_then(OsStr::to_str);
    name.ok_or_else(|| Error::usage(format!("{} is no job", Quoted(word.as_bytes()))))
}

/// Keys and values, in their order.
pub fn pairs(words: &[OsString]) -> Result<Vec<(&[u8], &[u8])>> {
    fn pair(word: &OsString) -> Result<(&[u8], &[u8])> {
        let bytes = word.as_bytes();
        let at = bytes.iter().position(|it| *it == b'=');
        let pair = at.and_then(|at| Some((bytes.get(..at)?, bytes.get(at + 1..)?)));
        pair.ok_or_else(|| Error::usage(format!("{} is not KEY=VALUE", Quoted(bytes))))
    }
    words.iter().map(pair).collect()
}

fn properties(words: &[OsString]) -> Result<Fields> {
    let mut fields = Fields::default();
    for (key, value) in pairs(words)? {
        let bad = || Error::usage(format!("{} cannot be a key", Quoted(key)));
        fields.set(std::str::from_utf8(key).map_err(|_| bad())?, value)?;
    }
    Ok(fields)
}

/// The same for a job.
fn job_properties(words: &[OsString]) -> Result<Fields> {
    let mut fields = properties(words)?;
    for key in PATHS {
        let Some(path) = fields.get(key).filter(|it| !it.is_empty()) else { continue };
        let path = Path::new(OsStr::from_bytes(path));
        if path.is_relative() {
            let path = absolute(path)?.into_os_string();
            fields.set(key, path.into_vec())?;
        }
    }
    Ok(fields)
}

fn new_name() -> String {
    uuid::Uuid::new_v4().to_string()
}

pub fn job(spool: &Spool, args: &JobArgs) -> Result<u8> {
    let fields = match args.add {
        true => properties(&args.property)?,
        false => job_properties(&args.property)?,
    };
    let now = Time::now().secs;
    if args.create || args.list {
        if let Some(word) = args.words.first() {
            let shown = Quoted(word.as_bytes());
            return Err(Error::usage(format!("{shown} is one word too many")));
        }
        if args.list {
            return list(spool, args.verbose);
        }
        let kind = if args.read { JobKind::Read } else { JobKind::Write };
        let job = spool.create_job(&new_name(), kind, now, &fields)?;
        show::say(format_args!("{}", job.uuid()));
        return Ok(exit::DONE);
    }
    let (first, files) =
        args.words.split_first().ok_or_else(|| Error::usage("name a job, or list them with -l"))?;
    let uuid = name_of(first)?;
    if args.add {
        let mut job = spool.take_job(uuid)?;
        match files {
            [] => job.add_batch(now, &fields, names_of_files(std::io::stdin().lock()))?,
            _ => {
                let files = files.iter().map(|it| Ok(it.clone().into_vec()));
                job.add_batch(now, &fields, files)?
            }
        };
        return Ok(exit::DONE);
    }
    if let Some(word) = files.first() {
        return Err(Error::usage(format!("{} is one word too many", Quoted(word.as_bytes()))));
    }
    if args.clone {
        let job = spool.clone_job(uuid, &new_name(), now)?;
        show::say(format_args!("{}", job.uuid()));
    } else if args.revoke {
        spool.revoke(uuid)?;
    } else if args.redo {
        spool.redo(uuid)?;
    } else if args.tail {
        tail(spool, uuid)?;
    } else if args.property.is_empty() {
        show_job(spool, uuid)?;
    } else {
        let mut job = spool.take_job(uuid)?;
        for (key, value) in fields.iter() {
            job.set(&String::from_utf8_lossy(key), value)?;
        }
    }
    Ok(exit::DONE)
}

fn list(spool: &Spool, with_done: bool) -> Result<u8> {
    let mut out = show::Out::new();
    for uuid in spool.jobs(with_done)? {
        let job = spool.job(&uuid)?;
        let mark = match spool.status_of(&job)? {
            Some(JobStatus::Busy) => "*",
            Some(JobStatus::Ready) => "r",
            Some(JobStatus::Done) if !with_done => continue,
            Some(JobStatus::Done) => "x",
            Some(JobStatus::Revoked | JobStatus::Cloned) | None => "n",
        };
        out.line(&format!("{mark} {} {uuid}", job.kind().letter()))?;
    }
    out.finish()?;
    Ok(exit::DONE)
}

fn show_job(spool: &Spool, uuid: &str) -> Result<()> {
    let job = spool.job(uuid)?;
    let mut out = show::Out::new();
    for (key, value) in job.fields().iter() {
        out.line(&format!("{} {}", Quoted(key), Quoted(value)))?;
    }
    if let Some(status) = spool.status_of(&job)? {
        out.line(&format!("status {}", status.as_str()))?;
    }
    for id in job.batches()? {
        let batch = job.batch(id)?;
        let number = |key| batch.fields().number(key).unwrap_or(0u64);
        let name = id.file_name();
        out.line(&format!("{name} count {} size {}", number("count"), number("size")))?;
    }
    out.finish()
}

fn tail(spool: &Spool, uuid: &str) -> Result<()> {
    let mut last = VecDeque::new();
    log::each_line(&spool.job(uuid)?.log_path(), &mut |line| {
        if last.len() == TAIL_LINES {
            last.pop_front();
        }
        last.push_back(line.to_vec());
        Ok(())
    })?;
    let mut out = show::Out::new();
    last.iter().try_for_each(|it| out.line(&Quoted(it).to_string()))?;
    out.finish()
}

pub fn queue(spool: &Spool, args: &QueueArgs) -> Result<u8> {
    let drive = args.place.drive(spool)?;
    let queue = spool.queue(&drive, args.place.queue.as_deref())?;
    if args.add {
        if args.jobs.is_empty() {
            return Err(Error::usage("name the jobs that are to be added"));
        }
        args.jobs.iter().try_for_each(|it| queue.add(name_of(it)?))?;
        return Ok(exit::DONE);
    }
    let mut out = show::Out::new();
    queue.list()?.iter().try_for_each(|it| out.line(it))?;
    out.finish()?;
    Ok(exit::DONE)
}
