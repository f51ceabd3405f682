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

pub use report::{BadBlock, BadFile, Coverage, Fault, Kept, Part, Report, Sample};

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

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
        // The catalog keeps one processor busy, and the disks wait for nobody.
        let (rest, blocks) = rayon::join(|| work.all_but_blocks(), || work.told(work.blocks()));
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
    fn all_but_blocks(&self) -> Result<()> {
        self.told(self.volume_files())?;
        self.told(self.snapshots.runs().and_then(|runs| self.manifests(&runs)))?;
        self.told(self.indexes())?;
        self.told(self.waste())?;
        self.told(self.catalog(Reader::check))
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

    /// Whether what was found still is so while nobody writes; `None` if somebody does now, or has
    /// the right to when this has not.
    fn settled<T>(&self, look: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        match WriteLock::take(self.snapshots.catalog()) {
            Ok(_lock) => look().map(Some),
            Err(e) if e.kind() == ErrorKind::Locked => Ok(None),
            // Who may not write has to believe what he sees.
            Err(_) => look().map(Some),
        }
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
