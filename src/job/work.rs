//! Doing one job: the verb's call, waiting for whoever else writes, and what is said at the end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use super::{Job, Outcome, Prepare, Request, Site};
use crate::catalog::WriteLock;
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::snapshot::Snapshots;
use crate::sys::quoted;
use crate::tape::spool::{self, Spool};
use crate::tape::write::{NextTape, Wanted, Written};
use crate::{backup, copies, genmeta, repair, validate};

/// Memory for decompressed data of a job, beside the mount's own.
const CACHE_BYTES: u64 = 16 << 20;
/// How long a job that has to wait does so before it looks again.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// Does a job.
pub(super) fn run(catalog: &Path, site: &Site, prepare: Option<&Prepare>, job: &Job) -> Outcome {
    loop {
        let result = catch_unwind(AssertUnwindSafe(|| run_once(catalog, site, prepare, job)));
        let error = match result {
            Ok(Ok(outcome)) => return outcome,
            Ok(Err(e)) if e.kind() == ErrorKind::Locked => e,
            Ok(Err(e)) => return Outcome::Failed(e),
            Err(_) => return Outcome::Failed(Error::new(ErrorKind::Io, "the job has panicked")),
        };
        job.wait_for(match WriteLock::holder(catalog) {
            Some(holder) => format!("lock held by {}", Quoted(holder.as_bytes())),
            None => super::cut(&error.to_string()),
        });
        std::thread::sleep(TRY_AGAIN_AFTER);
        if let Err(e) = job.progress.check() {
            return Outcome::Failed(e);
        }
    }
}

fn run_once(catalog: &Path, site: &Site, prepare: Option<&Prepare>, job: &Job) -> Result<Outcome> {
    let progress = &job.progress;
    match &job.request {
        Request::Backup(options) => Ok(Outcome::BackedUp(backup::run(catalog, options, progress)?)),
        Request::BackupAndClear(options) => {
            let none = || Error::usage("there is no mount whose ingest tree could be cleared");
            let clear = prepare.ok_or_else(none)?()?;
            let summary = backup::run(catalog, options, progress)?;
            job.cleared(&clear(&summary, progress));
            Ok(Outcome::BackedUp(summary))
        }
        Request::Restore(restoring) => {
            restoring.check_target(&site.mountpoint)?;
            let snapshots = restoring.open(catalog, CACHE_BYTES)?;
            let (run, mut summary) = restoring.run(&snapshots, progress, &|_, _| {})?;
            match summary.ended_by.take() {
                Some(error) => Err(error),
                None => Ok(Outcome::Restored(run, summary)),
            }
        }
        Request::Validate(options, is_repair) => {
            let snapshots = Snapshots::open(catalog, CACHE_BYTES)?;
            let report = validate::run(&snapshots, options, progress)?;
            if !is_repair || report.is_clean() {
                return Ok(Outcome::Validated(Box::new(report)));
            }
            let done = repair::run(catalog, &report.suspects(), progress)?;
            Ok(Outcome::Repaired(Box::new(report), Box::new(done)))
        }
        Request::Genmeta(options) => {
            Ok(Outcome::Described(genmeta::run(catalog, options, progress)?))
        }
        Request::Replicate => Ok(Outcome::Replicated(copies::replicate(catalog, progress)?)),
        Request::Archive(archiving) => {
            let spool = Spool::open(&spool::root())?;
            let mut tell = |it: &Written| {
                let (filenum, tape) = (it.filenum, Quoted(&it.tape));
                job.say(&format!("file {filenum} of tape {tape}: {} bytes", it.bytes));
            };
            // Nobody to be asked: what is left waits for a tape.
            let mut ask: Box<NextTape<'_>> = Box::new(|loaded, _| loaded.close().map(|()| None));
            let mut first = |_: &Path, _: &Wanted| Ok(None);
            let (run, done) =
                archiving.run(catalog, &spool, progress, &mut tell, &mut first, &mut *ask)?;
            Ok(Outcome::Archived(run, Box::new(done)))
        }
    }
}

/// What came of a job, in a line.
pub(super) fn summary_line(outcome: &Outcome) -> Option<String> {
    let problems = |count: u64| match count {
        0 => String::new(),
        n => format!("; {n} problems"),
    };
    Some(match outcome {
        Outcome::Failed(_) => return None,
        Outcome::BackedUp(it) => {
            let (entries, counts) = (&it.counts.entries, &it.counts);
            format!(
                "run {} of {}: added {}, modified {}, deleted {}, unchanged {}; read {} bytes, \
                 stored {} new{}",
                it.run,
                Quoted(&it.source),
                entries.added,
                entries.modified,
                entries.deleted,
                entries.unchanged,
                counts.bytes_read,
                counts.bytes_stored,
                problems(counts.problems)
            )
        }
        Outcome::Restored(run, it) => format!(
            "restored {} entries, {} directories, {} bytes from run {run}; {} as they should be, \
             {} kept, {} deleted, {} bytes shared{}",
            it.entries,
            it.dirs,
            it.bytes,
            it.unchanged,
            it.kept,
            it.deleted,
            it.bytes_shared,
            problems(it.problem_count)
        ),
        Outcome::Validated(it) if it.is_clean() => {
            let cut = if it.is_cut_short { "; the time was over" } else { "" };
            format!("solid: {} blocks, {} bytes, all as written{cut}", it.blocks, it.bytes)
        }
        Outcome::Validated(it) => format!(
            "damage: {} of {} blocks, {} files, {} other faults",
            it.bad_blocks.count + it.known_bad,
            it.blocks + it.known_bad,
            it.bad_files.count,
            it.faults.count
        ),
        Outcome::Repaired(_, it) => format!(
            "repair: {} copies and {} indexes healed, {} documents written, {} blocks \
             not healed",
            it.healed_count,
            it.indexes.len(),
            it.documents,
            it.unhealed_count
        ),
        Outcome::Described(it) => it.line(),
        Outcome::Replicated(it) => it.line(),
        Outcome::Archived(run, it) => format!("run {run}: {}", it.line()),
    })
}

/// What a repair could not heal, in lines.
pub(super) fn repair_lines(done: &repair::Repaired) -> Vec<String> {
    let unhealed = done.unhealed.iter().take(1000);
    let unhealed = unhealed.map(|it| format!("not healed: block {}: {}", it.block, it.reason));
    unhealed.chain(done.problems.iter().take(1000).map(|it| format!("! {it}"))).collect()
}

/// What a validation has found, in lines. At most a thousand files are named.
pub(super) fn damage_lines(report: &validate::Report) -> Vec<String> {
    let on = |volume: &Path| match volume.as_os_str().is_empty() {
        true => String::new(),
        false => format!(" on {}", quoted(volume)),
    };
    let fault = |it: &validate::Fault| format!("{}{}", it.message, on(&it.volume));
    let mut lines: Vec<String> = report.faults.items.iter().map(fault).collect();
    lines.truncate(1000);
    if report.faults_of(validate::Part::Catalog).next().is_some() {
        lines.push(validate::CATALOG_REMEDY.to_owned());
    }
    let blocks = report.bad_blocks.items.iter().flat_map(|block| {
        let place = format!("in block {}{}", block.id, on(&block.volume));
        block.files.items.iter().map(move |it| (it, place.clone()))
    });
    let files = report.bad_files.items.iter().flat_map(|bad| {
        let place = format!("version {}", bad.version);
        bad.files.items.iter().map(move |it| (it, place.clone()))
    });
    for (file, place) in blocks.chain(files) {
        if lines.len() >= 2000 {
            lines.push("and more: run raidtape validate".to_owned());
            return lines;
        }
        let (path, source) = (Quoted(&file.path), Quoted(&file.source));
        lines.push(format!("damaged: {path} of {source}, {place}"));
    }
    lines
}
