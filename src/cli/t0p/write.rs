//! `t0write`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};

use super::jobs::name_of;
use super::{Place, block_bytes, buffer_bytes};
use crate::cli::{bar, exit, show, terminal};
use crate::error::{ErrorKind, Quoted, Result};
use crate::progress::{Progress, Said};
use crate::sys::{Time, quoted};
use crate::tape::drive::Access;
use crate::tape::load;
use crate::tape::loaded::Loaded;
use crate::tape::spool::Spool;
use crate::tape::spool::drive::TakenDrive;
use crate::tape::spool::job::{Job, JobKind};
use crate::tape::spool::receipt;
use crate::tape::write::{
    Files, For, Settings, Tally, Wanted, Work, Writer, first_tape, next_tape,
};

#[derive(Args)]
#[command(group = ArgGroup::new("which").required(true))]
pub struct WriteArgs {
    /// All jobs of the queue
    #[arg(short = 'a', long, group = "which")]
    all: bool,
    /// These jobs, queued or not
    #[arg(group = "which")]
    jobs: Vec<OsString>,
    /// Only say what would be written
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// A file that gets a receipt of each batch
    #[arg(short = 'y', value_name = "RECEIPT")]
    receipt: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
    /// The label of the tape that has to be in the drive
    #[arg(short = 't', value_name = "TAPE")]
    tape: Option<OsString>,
    /// Length of blocks in bytes, as in 262144 or 256k; otherwise that of the tape, or 32768
    #[arg(short = 'b', value_name = "BYTES", value_parser = block_bytes)]
    block_bytes: Option<u32>,
    /// Most memory for what waits for the drive
    #[arg(long, value_name = "BYTES", default_value = "256M", value_parser = buffer_bytes)]
    buffer: u64,
    /// Say what is written where
    #[arg(short = 'v', long)]
    verbose: bool,
}

pub fn write(spool: &Spool, args: &WriteArgs) -> Result<u8> {
    let drive = args.place.drive(spool)?;
    let queue = spool.queue(&drive, args.place.queue.as_deref())?;
    if args.dry_run {
        return dry_run(spool, args, &queue.list()?);
    }
    if let Some(path) = &args.receipt {
        // Told only behind the first batch, it would be too late.
        receipt::try_open(path)?;
    }
    let taken = drive.take()?;
    let names = args.jobs.iter().map(|it| name_of(it).map(str::to_owned));
    let names = names.collect::<Result<Vec<_>>>()?;
    let first = match args.all {
        true => queue.next(JobKind::Write)?.map(|it| it.uuid().to_owned()),
        // The first that there is: what is wrong with another one is told when it is its turn.
        false => names.iter().find(|it| spool.job(it).is_ok()).or(names.first()).cloned(),
    };
    let Some(first) = first else { return Ok(exit::DONE) };
    let listener = |said: Said<'_>| {
        if let Said::Problem(problem) = said {
            eprintln!("t0p: {problem}");
        }
    };
    let progress = Progress::with_listener(Box::new(listener));
    let loaded = first_loaded(spool, args, &taken, &first)?;
    let mut files = Files::default();
    let is_verbose = args.verbose;
    let work = Work {
        spool,
        drive: &taken,
        settings: Settings {
            tape: args.tape.as_ref().map(|it| it.as_bytes().to_vec()),
            block_bytes: args.block_bytes,
            buffer_bytes: args.buffer,
            receipt: args.receipt.clone(),
        },
        progress: &progress,
        now: &|| Time::now().secs,
        add: &mut |job, archive, name| files.add(job, archive, name),
        tell: &mut |it| {
            if is_verbose {
                show::note(format_args!(
                    "{}/{} is file {} of tape {}, {}",
                    it.job,
                    it.batch,
                    it.filenum,
                    Quoted(&it.tape),
                    show::bytes(it.bytes)
                ));
            }
            Ok(())
        },
        next_tape: &mut |loaded, wanted| next_tape(spool, &taken, loaded, wanted, &mut ask),
    };
    let mut writer = Writer::new(work, loaded);
    progress.set_phase("writing");
    let mut failed = None;
    let written = bar::with_bar(&progress, || match args.all {
        true => {
            count(spool, &queue.list()?, &progress);
            writer.queue(&queue, &mut |e| {
                eprintln!("t0p: {e}; it stays in the queue");
                failed.get_or_insert(exit::of_kind(e.kind()));
            })
        }
        false => {
            count(spool, &names, &progress);
            writer.jobs(&names, &mut |e| {
                eprintln!("t0p: {e}");
                failed.get_or_insert(exit::of_kind(e.kind()));
            })
        }
    });
    let tally = writer.tally();
    let closed = writer.close();
    summarize(&tally, is_verbose);
    written.and(closed)?;
    Ok(match failed {
        Some(code) => code,
        None if tally.errors > 0 => exit::PROBLEMS,
        None => exit::DONE,
    })
}

/// The tape that is in the drive, or the one that has to be; if there is none, one for the first
/// job.
fn first_loaded(
    spool: &Spool,
    args: &WriteArgs,
    taken: &TakenDrive,
    first: &str,
) -> Result<Loaded> {
    let wanted = args.tape.as_ref().map(|it| it.as_bytes());
    if let Some(tape) = wanted.filter(|_| taken.changer().is_ok_and(|it| it.is_some())) {
        return load::load(spool, taken, tape, None, Access::Write);
    }
    let device = taken.device()?;
    match Loaded::open(&device, Access::Write) {
        Err(e) if e.kind() == ErrorKind::WrongTape => {
            let job = spool.job(first)?;
            let whose = wanted.map_or(For::Job(&job), For::Label);
            first_tape(spool, taken, &whose, &mut |wanted| ask_for(&device, wanted))
        }
        opened => opened,
    }
}

fn summarize(tally: &Tally, is_verbose: bool) {
    if is_verbose {
        let Tally { files, batches, jobs, errors, underruns, .. } = tally;
        show::note(format_args!(
            "{files} files in {batches} batches, {}; {jobs} jobs are done, {errors} files have \
             failed; the drive has waited {underruns} times",
            show::bytes(tally.bytes)
        ));
    }
}

/// What is left to be written of a job: files and bytes of each batch.
fn pending(job: &Job) -> Result<Vec<(String, u64, u64)>> {
    let mut found = Vec::new();
    for id in job.pending()? {
        let batch = job.batch(id)?;
        let number = |key| batch.fields().number(key).unwrap_or(0);
        found.push((id.file_name(), number("count"), number("size")));
    }
    Ok(found)
}

/// Says how much there is to do. What cannot be read of a job is told when it is its turn.
fn count(spool: &Spool, names: &[String], progress: &Progress) {
    for name in names {
        let left = spool.job(name).and_then(|it| pending(&it)).unwrap_or_default();
        for (_, files, bytes) in left {
            Progress::add(&progress.entries_total, files);
            // Headers, names and sums.
            Progress::add(&progress.bytes_total, bytes.saturating_add(files.saturating_mul(256)));
        }
    }
}

fn dry_run(spool: &Spool, args: &WriteArgs, queued: &[String]) -> Result<u8> {
    let names = match args.all {
        true => queued.to_vec(),
        false => {
            args.jobs.iter().map(|it| name_of(it).map(str::to_owned)).collect::<Result<Vec<_>>>()?
        }
    };
    let mut out = show::Out::new();
    for name in names {
        let job = spool.job(&name)?;
        if job.kind() != JobKind::Write {
            continue;
        }
        for (batch, files, bytes) in pending(&job)? {
            out.line(&format!("{name} {batch} count {files} size {bytes}"))?;
        }
    }
    out.finish()?;
    Ok(exit::DONE)
}

/// Asks who sits at the terminal for another tape.
pub(in crate::cli) fn ask(mut loaded: Loaded, wanted: &Wanted) -> Result<Option<Loaded>> {
    if !terminal::is_there() {
        loaded.close()?;
        return Ok(None);
    }
    let device = loaded.name().to_path_buf();
    loaded.drive().unload()?;
    loaded.close()?;
    ask_for(&device, wanted)
}

/// The same for a drive that is empty.
pub(in crate::cli) fn ask_for(device: &Path, wanted: &Wanted) -> Result<Option<Loaded>> {
    if !terminal::is_there() {
        return Ok(None);
    }
    let mut why = wanted.why.clone();
    loop {
        let such = wanted.labels.first().map_or(String::new(), |it| format!(" ({})", Quoted(it)));
        let device_name = quoted(device);
        let what = format_args!("{why}\nput another tape{such} into {device_name}");
        if !terminal::ask(what, "type q to stop")? {
            return Ok(None);
        }
        match Loaded::open(device, Access::Write) {
            Ok(loaded) => return Ok(Some(loaded)),
            Err(e) => why = e.to_string(),
        }
    }
}
