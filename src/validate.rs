//! Validation: every stored byte against what it should be, and the catalog against itself.
//!
//! A block whose hash is right is what was written, frames and all. In one whose hash is wrong, or
//! that is missing or unreadable, the frames are checked one by one, so that the report names
//! exactly the chunks and files that are lost. Nothing of the store is changed here; when a copy
//! was found right, or bad, is remembered beside the catalog. Reports have bounds: what is too much
//! is counted. Others may write meanwhile: what does not agree is looked at again while nobody
//! does.

mod beside;
mod blocks;
mod choice;
mod files;
mod report;
mod runs;

pub use report::{
    BadBlock, BadFile, CATALOG_REMEDY, Coverage, Fault, Kept, Part, Report, Sample, Stranger,
};

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::catalog::told::{History, Told};
use crate::catalog::{Checking, Health, Needed, Reader, RunId, Settings, WriteLock};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::snapshot::Snapshots;
use crate::sys::Time;
use crate::volume::Volumes;

/// What to look at; everything by default.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Only this run: its entries, its manifest, and the blocks that it needs.
    pub run: Option<RunId>,
    /// Only a part of the blocks.
    pub sample: Option<Sample>,
    /// Begin with the blocks that were not verified for the longest time, and begin no further one
    /// when this time is over. The first is looked at however short it is.
    pub max_duration: Option<Duration>,
    /// Also read every file and compare its hash: that the catalog puts the right bytes together.
    pub files: bool,
}

impl Options {
    /// Checks that the options go together.
    pub fn check(&self) -> Result<()> {
        if self.max_duration.is_some()
            && (self.run.is_some() || self.sample.is_some() || self.files)
        {
            let message = "--max-duration goes on where the last one stopped, over all blocks: \
                           it does not go with --run, --sample or --files";
            return Err(Error::usage(message));
        }
        if self.files && self.sample.is_some() {
            return Err(Error::usage("--files reads every file: it does not go with --sample"));
        }
        match self.sample.is_none_or(|it| it.percent > 0.0 && it.percent <= 100.0) {
            true => Ok(()),
            false => Err(Error::usage("a sample is more than 0% and at most 100%")),
        }
    }
}

/// Everything that the parts of a validation share.
struct Work<'a> {
    snapshots: &'a Snapshots,
    volumes: &'a Volumes,
    settings: Settings,
    options: &'a Options,
    progress: &'a Progress,
    health: Health,
    report: Mutex<Report>,
    started: Time,
    deadline: Option<Instant>,
    /// Whether a block was begun.
    is_begun: AtomicBool,
    /// What the run needs, if it is about one.
    needed: Option<Needed>,
    /// What the manifests tell of their runs, and where they lie.
    told: Mutex<Vec<(RunId, PathBuf, Told)>>,
    /// What the catalog says of them, if it could be read to its end.
    history: Mutex<Option<History>>,
}

/// Validates what `options` say.
pub fn run(snapshots: &Snapshots, options: &Options, progress: &Progress) -> Result<Report> {
    options.check()?;
    progress.set_phase("checking");
    let settings = snapshots.settings()?;
    let volumes = Volumes::open(snapshots.with_reader(Reader::volumes)?);
    let mut work = Work {
        snapshots,
        volumes: &volumes,
        settings,
        options,
        progress,
        health: Health::open(snapshots.catalog()),
        report: Mutex::new(Report::of_sample(options.sample)),
        started: Time::now(),
        deadline: options.max_duration.and_then(|it| Instant::now().checked_add(it)),
        is_begun: AtomicBool::new(false),
        needed: None,
        told: Mutex::default(),
        history: Mutex::default(),
    };
    if let Some(run) = options.run {
        let run = snapshots.run(run)?;
        work.needed = Some(work.catalog(|reader, checking| reader.check_run(&run, checking))?);
        work.manifests(&[run])?;
        work.blocks()?;
    } else {
        let totals = snapshots.with_reader(Reader::totals)?;
        Progress::add(&progress.entries_total, totals.blocks);
        Progress::add(&progress.bytes_total, work.bytes_of_copies()?);
        let rest_due = work.is_catalog_due()?;
        // Each keeps one processor busy, and the disks wait for nobody.
        let rest = || if rest_due { work.all_but_blocks() } else { Ok(()) };
        let (rest, blocks) = rayon::join(rest, || work.told(work.blocks()));
        rest.and(blocks)?;
    }
    if options.files {
        progress.set_phase("checking files");
        work.files()?;
    }
    let coverage = work.coverage()?;
    let mut report = work.report.into_inner();
    report.coverage = coverage;
    if options.max_duration.is_some() {
        report.is_timed = true;
        report.known_bad = coverage.bad.saturating_sub(report.bad_now);
    }
    report.sort();
    progress.set_phase("done");
    Ok(report)
}

impl Work<'_> {
    /// The catalog has its turn among the blocks: with a limit of time it is checked again when
    /// each copy has been verified since.
    fn is_catalog_due(&self) -> Result<bool> {
        if self.options.max_duration.is_none() {
            return Ok(true);
        }
        let (last, oldest) = (self.health.catalog_verified_at(), self.coverage()?.oldest);
        let is_due = last.is_none_or(|last| oldest.is_none_or(|it| last.secs < it.secs));
        if !is_due {
            self.report.lock().catalog_checked = last;
        }
        Ok(is_due)
    }

    /// The catalog and what lies beside the blocks, in parts that need not wait for each other.
    fn all_but_blocks(&self) -> Result<()> {
        let rows = || self.told(self.rows());
        let pages = || self.told(self.catalog(Reader::check_pages));
        let beside = || {
            self.told(self.volume_files())?;
            self.told(self.snapshots.runs().and_then(|runs| self.manifests(&runs)))?;
            self.told(self.strangers())?;
            self.told(self.copies_of_catalog())?;
            self.told(self.indexes())?;
            self.told(self.waste())
        };
        let (beside, (rows, pages)) = rayon::join(beside, || rayon::join(rows, pages));
        beside.and(rows).and(pages)?;
        if let Some(history) = self.history.lock().take() {
            self.told(self.compare(&history))?;
        }
        match self.report.lock().faults.is_empty() {
            true => self.health.note_good_catalog(self.started),
            false => self.health.forget_catalog(),
        }
        Ok(())
    }

    fn rows(&self) -> Result<()> {
        let history = self.catalog(Reader::check_rows)?;
        *self.history.lock() = Some(history);
        Ok(())
    }

    /// Damage of the catalog that has ended a part of the work is a fault like others.
    fn told(&self, result: Result<()>) -> Result<()> {
        match result {
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                self.fault(Fault::of_catalog(e.to_string()));
                Ok(())
            }
            other => other,
        }
    }

    fn fault(&self, fault: Fault) {
        self.report.lock().add_fault(fault);
    }

    /// Checks the catalog; what is damaged so that SQLite cannot go on ends the work.
    fn catalog<T>(&self, check: impl FnOnce(&Reader, &mut Checking<'_>) -> Result<T>) -> Result<T> {
        let mut found = |message| self.fault(Fault::of_catalog(message));
        let go_on = || self.progress.check();
        let mut checking = Checking::new(&mut found, &go_on);
        self.snapshots.with_reader(|reader| check(reader, &mut checking))
    }

    /// Looks again at what was found; `None` if somebody writes, so that it says nothing. The
    /// writer's lock is not kept: a backup that begins meanwhile is not to be refused.
    fn settled<T>(&self, look: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        // Who may not ask has to believe what he sees.
        let is_written = || WriteLock::is_held(self.snapshots.catalog()).unwrap_or(false);
        let newest = || self.snapshots.with_reader(Reader::last_run_given).ok();
        let before = newest();
        if is_written() {
            return Ok(None);
        }
        let found = look()?;
        Ok((!is_written() && newest() == before).then_some(found))
    }

    fn bytes_of_copies(&self) -> Result<u64> {
        let mut bytes = 0;
        for volume in self.volumes.present() {
            let number = volume.config.number;
            let totals = self.snapshots.with_reader(|reader| reader.stored_bytes_of(number))?;
            bytes += totals.stored_bytes;
        }
        Ok(bytes)
    }

    /// How much of the store was verified since when.
    fn coverage(&self) -> Result<Coverage> {
        self.snapshots.with_reader(|reader| Coverage::of(reader, &self.health))
    }
}
