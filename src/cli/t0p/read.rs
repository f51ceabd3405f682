//! `t0read` and `t0ck`.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use clap::{ArgGroup, Args};

use super::jobs::name_of;
use super::{Device, noted};
use crate::cli::{bar, exit, show, terminal};
use crate::error::{Error, ErrorKind, Problem, Quoted, Result};
use crate::progress::{Progress, Said as ProgressSaid};
use crate::tape::check::{self, Said};
use crate::tape::cpio::Reader;
use crate::tape::drive::Access;
use crate::tape::extract::Target;
use crate::tape::load;
use crate::tape::read::{Head, Visit};
use crate::tape::readback::{IsWanted, Reading, Tally, ends_all};
use crate::tape::recorded::place_of;
use crate::tape::seek;
use crate::tape::spool::Spool;
use crate::tape::spool::batch::BatchStatus;
use crate::tape::spool::job::JobKind;

#[derive(Args)]
#[command(group = ArgGroup::new("which"))]
pub struct ReadArgs {
    /// All jobs of the queue that read
    #[arg(short = 'a', long, group = "which")]
    all: bool,
    /// A tape file by its number, of the tape that is in the drive
    #[arg(long, value_name = "N", group = "which")]
    file: Option<u64>,
    /// Write the files below this directory; otherwise they are only proved
    #[arg(short = 'C', long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Also over files that are there
    #[arg(short = 'f', long, requires = "directory")]
    force: bool,
    /// List the members of the tape file: position, size and name
    #[arg(short = 'l', long, requires = "file")]
    list: bool,
    /// A queue of the drive that has a name
    #[arg(short = 'q', value_name = "QUEUE", requires = "all")]
    queue: Option<OsString>,
    #[command(flatten)]
    device: Device,
    /// A job or JOB/BATCH, unless -a or --file says what is read; then the files that are wanted of
    /// it, directories with all that is in them, or patterns
    words: Vec<OsString>,
}

#[derive(Args)]
pub struct CkArgs {
    #[command(flatten)]
    device: Device,
}

/// Asks who sits at the terminal for a tape.
pub fn ask(tape: &[u8]) -> bool {
    let what = format_args!("put tape {} into the drive", Quoted(tape));
    terminal::ask(what, "type q to stop").unwrap_or(false)
}

/// The files that are wanted of a batch.
struct Files<'a>(Vec<File<'a>>);

struct File<'a> {
    word: &'a OsStr,
    pattern: Option<globset::GlobMatcher>,
    /// Whether there was one.
    is_met: Cell<bool>,
}

/// The pattern that a word is, if it is one. It may be meant as it stands, too: names may have
/// anything in them.
pub fn pattern(word: &OsStr) -> Option<globset::GlobMatcher> {
    let text = word.to_str().filter(|it| it.contains(['*', '?', '[']))?;
    globset::Glob::new(text).ok().map(|it| it.compile_matcher())
}

fn plain(name: &[u8]) -> &[u8] {
    let mut name = name;
    while let Some(rest) = name.strip_prefix(b"/").or_else(|| name.strip_prefix(b"./")) {
        name = rest;
    }
    name.strip_suffix(b"/").unwrap_or(name)
}

impl<'a> Files<'a> {
    fn parse(words: &'a [OsString]) -> Files<'a> {
        let parse = |word: &'a OsString| {
            let pattern = pattern(OsStr::from_bytes(plain(word.as_bytes())));
            File { word, pattern, is_met: Cell::new(false) }
        };
        Files(words.iter().map(parse).collect())
    }

    fn has(&self, name: &[u8]) -> bool {
        let name = plain(name);
        let mut has = false;
        for File { word, pattern, is_met } in &self.0 {
            let below = name.strip_prefix(plain(word.as_bytes()));
            let path = Path::new(OsStr::from_bytes(name));
            if below.is_some_and(|it| it.is_empty() || it.starts_with(b"/"))
                || pattern.as_ref().is_some_and(|it| it.is_match(path))
            {
                is_met.set(true);
                has = true;
            }
        }
        has
    }

    /// Names the words that no file was met for; whether there are any.
    fn tell_missing(&self) -> bool {
        let missing: Vec<&File<'_>> = self.0.iter().filter(|it| !it.is_met.get()).collect();
        let error = Error::new(ErrorKind::NotFound, "there is no such file in what was read");
        missing
            .iter()
            .for_each(|it| eprintln!("t0p: {}", Problem::new(it.word.as_bytes(), &error)));
        !missing.is_empty()
    }
}

fn say_problem(said: ProgressSaid<'_>) {
    if let ProgressSaid::Problem(problem) = said {
        eprintln!("t0p: {problem}");
    }
}

/// A job, and one of its batches if only that is meant.
fn job_and_batch(word: &OsStr) -> Result<(String, Option<u64>)> {
    let bytes = word.as_bytes();
    if let Some(at) = bytes.iter().rposition(|it| *it == b'/') {
        let (job, number) = bytes.split_at(at);
        let number = number.get(1..).and_then(|it| std::str::from_utf8(it).ok());
        let number = number.map(|it| it.trim_start_matches(['w', 'r', 'b']));
        if let Some(number) = number.and_then(|it| it.parse().ok()) {
            return Ok((name_of(OsStr::from_bytes(job))?.to_owned(), Some(number)));
        }
    }
    Ok((name_of(word)?.to_owned(), None))
}

pub fn read(spool: &Spool, args: &ReadArgs) -> Result<u8> {
    let drive = args.device.drive(spool)?;
    let by_job = !args.all && args.file.is_none();
    let (job, words) = match args.words.split_first() {
        Some((first, rest)) if by_job => (Some(job_and_batch(first)?), rest),
        None if by_job => return Err(Error::usage("name a job, or use -a or --file")),
        _ => (None, &*args.words),
    };
    if args.all && !words.is_empty() {
        return Err(Error::usage("-a reads whole jobs: name no files"));
    }
    let files = Files::parse(words);
    if args.device.is_dry {
        args.device.expect_noted(&drive)?;
        return dry_run(spool, args, job.as_ref());
    }
    let taken = drive.take()?;
    if args.list {
        return list(spool, args, &taken, &files);
    }
    let target = match &args.directory {
        Some(dir) => Some(Target::open(dir, args.force)?),
        None => None,
    };
    let code = Arc::new(AtomicU8::new(exit::PROBLEMS));
    let progress = Progress::with_listener(Box::new({
        let code = code.clone();
        move |said: ProgressSaid<'_>| {
            if let ProgressSaid::Problem(it) = &said {
                let was = code.load(Ordering::Relaxed);
                // Damage outranks a tape that is not here, and that outranks the rest.
                match it.kind {
                    ErrorKind::Corrupt => code.store(exit::DAMAGED, Ordering::Relaxed),
                    kind @ ErrorKind::WrongTape if was != exit::DAMAGED => {
                        code.store(exit::of_kind(kind), Ordering::Relaxed);
                    }
                    _ => {}
                }
            }
            say_problem(said);
        }
    }));
    let mut ask = ask;
    let mut reading = Reading {
        spool,
        taken: &taken,
        loaded: None,
        ask: if terminal::is_there() { Some(&mut ask) } else { None },
        target,
        progress: &progress,
        tally: Tally::default(),
    };
    if args.device.tape.is_some() {
        let loaded = load::open_noted(spool, &taken, Access::Read)?;
        args.device.expect(&loaded)?;
        reading.loaded = Some(loaded);
    }
    progress.set_phase("reading");
    let is_wanted = |name: &[u8]| files.has(name);
    let is_wanted = (!words.is_empty()).then_some(&is_wanted as &IsWanted<'_>);
    let mut failed = None;
    let done = bar::with_bar(&progress, || match (&job, args.file) {
        (Some((job, number)), _) => read_job(spool, &mut reading, job, *number, is_wanted),
        (None, Some(filenum)) => reading.tape_file(filenum, is_wanted),
        (None, None) => {
            let queue = spool.queue(&drive, args.queue.as_deref())?;
            let mut left = BTreeSet::new();
            while let Some(job) = queue.next_but(JobKind::Read, &left)? {
                let uuid = job.uuid().to_owned();
                match reading.job(job) {
                    Err(e) if !ends_all(&e) => {
                        eprintln!("t0p: {e}; it stays in the queue");
                        failed.get_or_insert(exit::of_kind(e.kind()));
                        left.insert(uuid);
                    }
                    done => done?,
                }
            }
            Ok(())
        }
    });
    let finished = reading.finish();
    let tally = reading.tally;
    if let Some(loaded) = reading.loaded.take() {
        loaded.close()?;
    }
    if args.device.verbose {
        let Tally { files, errors, unsummed, batches, .. } = tally;
        show::say(format_args!(
            "{files} files, {}; {unsummed} without sums; {errors} errors; {batches} whole batches",
            show::bytes(tally.bytes)
        ));
    }
    done.and(finished)?;
    let is_missing = files.tell_missing();
    Ok(match (failed, tally.errors) {
        (Some(code), _) => code,
        (None, 0) if is_missing => exit::FAILED,
        (None, 0) => exit::DONE,
        (None, _) => code.load(Ordering::Relaxed),
    })
}

fn read_job(
    spool: &Spool,
    reading: &mut Reading<'_>,
    name: &str,
    number: Option<u64>,
    is_wanted: Option<&IsWanted<'_>>,
) -> Result<()> {
    let mut job = spool.take_job(name)?;
    if job.kind() == JobKind::Read {
        if is_wanted.is_some() || number.is_some() {
            return Err(Error::usage(format!("job {name} says itself which files it reads")));
        }
        return reading.job(job);
    }
    let mut batches = job.batches()?;
    batches.retain(|it| number.is_none_or(|number| it.number == number));
    if batches.is_empty() {
        return Err(Error::new(ErrorKind::NotFound, format!("job {name} has no such batch")));
    }
    // What is in the drive comes first: to get another tape is to give it out.
    let here = reading.taken.tape()?.map(|it| it.name());
    batches.sort_by_cached_key(|it| {
        let place = place_of(spool, &job, *it);
        place.is_ok_and(|place| Some(&place.tape) != here.as_ref())
    });
    for id in batches {
        let done = match id.status {
            BatchStatus::Pending => Err(Error::usage("it has not been written")),
            _ => reading.batch(&mut job, id, is_wanted),
        };
        match done {
            Err(e) if !ends_all(&e) => {
                let path = format!("batch {} of job {name}", id.number);
                reading.progress.note(&Problem::new(path, &e));
                reading.tally.errors += 1;
            }
            done => done?,
        }
    }
    Ok(())
}

/// Says what would be read from where.
fn dry_run(spool: &Spool, args: &ReadArgs, job: Option<&(String, Option<u64>)>) -> Result<u8> {
    let mut out = show::Out::new();
    match job {
        Some((name, number)) => {
            let job = spool.job(name)?;
            for id in job.batches()? {
                if job.kind() == JobKind::Write
                    && number.is_none_or(|it| it == id.number)
                    && id.status != BatchStatus::Pending
                {
                    let place = place_of(spool, &job, id)?;
                    let (tape, file) = (Quoted(&place.tape), place.filenum);
                    out.line(&format!("{name}/{} {tape} {file}", id.number))?;
                } else if job.kind() == JobKind::Read && id.status == BatchStatus::Pending {
                    out.line(&format!("{name}/{}", id.number))?;
                }
            }
        }
        None if args.file.is_some() => {
            let tape = noted(&args.device.drive(spool)?)?;
            out.line(&format!("file {} of {tape}", args.file.unwrap_or_default()))?;
        }
        None => {
            let drive = args.device.drive(spool)?;
            for name in spool.queue(&drive, args.queue.as_deref())?.list()? {
                if args.all && spool.job(&name)?.kind() == JobKind::Read {
                    out.line(&name)?;
                }
            }
        }
    }
    out.finish()?;
    Ok(exit::DONE)
}

fn list(
    spool: &Spool,
    args: &ReadArgs,
    taken: &crate::tape::spool::drive::TakenDrive,
    files: &Files<'_>,
) -> Result<u8> {
    let mut loaded = load::open_noted(spool, taken, Access::Read)?;
    args.device.expect(&loaded)?;
    let filenum = args.file.unwrap_or_default();
    seek::to_file(loaded.drive(), filenum, None)?;
    let mut visit = Visit::new(loaded.drive(), filenum);
    let missing = || Error::new(ErrorKind::NotFound, "the tape ends before it");
    let mut file = visit.next_file()?.ok_or_else(missing)?;
    let mut members = Reader::new(&mut file);
    let mut next = Head::read(&mut members)?.member;
    let mut out = show::Out::new();
    loop {
        let member = match next.take() {
            Some(member) => Some(member),
            None => members.next_member()?,
        };
        let Some(member) = member else { break };
        if files.0.is_empty() || files.has(&member.name) {
            let (at, size) = (member.position, member.header.size);
            out.line(&format!("{at} {size} {}", Quoted(&member.name)))?;
        }
    }
    out.finish()?;
    Ok(if files.tell_missing() { exit::FAILED } else { exit::DONE })
}

pub fn ck(spool: &Spool, args: &CkArgs) -> Result<u8> {
    let drive = args.device.drive(spool)?;
    if args.device.is_dry {
        args.device.expect_noted(&drive)?;
        let tape = noted(&drive)?;
        show::say(format_args!("{tape} would be read from its beginning to its end"));
        return Ok(exit::DONE);
    }
    let taken = drive.take()?;
    let mut loaded = load::open_noted(spool, &taken, Access::Read)?;
    args.device.expect(&loaded)?;
    let progress = Progress::with_listener(Box::new(say_problem));
    let is_verbose = args.device.verbose;
    progress.set_phase("checking");
    let mut out = show::Out::new();
    let mut say = |said: Said<'_>| match said {
        Said::Tape(what) => out.line(&what),
        Said::File(..) if !is_verbose => Ok(()),
        Said::File(filenum, position, None) => {
            out.line(&format!("file {filenum} position {position}: empty"))
        }
        Said::File(filenum, position, Some(it)) => {
            let whose = match &it.job {
                Some((job, batch)) => format!("{job}/{batch}"),
                None => "of no job".to_owned(),
            };
            let sums = if it.has_sums { "with sums" } else { "without sums" };
            let (files, bytes) = (it.files, it.bytes);
            out.line(&format!(
                "file {filenum} position {position}: {whose}, {files} files, {bytes} bytes, {sums}"
            ))
        }
        Said::Wrong(Some(filenum), what) | Said::Note(filenum, what) => {
            out.line(&format!("file {filenum}: {what}"))
        }
        Said::Wrong(None, what) => out.line(&what),
    };
    let checked =
        bar::with_bar(&progress, || check::check(&mut loaded, Some(spool), &progress, &mut say));
    let checked = checked?;
    let check::Checked { tape_files, files, summed, findings, .. } = checked;
    out.line(&format!(
        "{tape_files} tape files, {files} files, {summed} of them by their sums: {findings} errors"
    ))?;
    out.finish()?;
    loaded.close()?;
    Ok(if findings > 0 { exit::DAMAGED } else { exit::DONE })
}
