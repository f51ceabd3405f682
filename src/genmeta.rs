//! Completing what stands beside the blocks: metas and manifests that are missing, damaged or out
//! of date are made anew from the catalog.
//!
//! A note on each volume says up to which run its metas were complete; then only what has changed
//! since, or is not there, is looked at. What is as it should be is left alone, so a second time
//! writes nothing. Each document is replaced as a whole. Holds the writer's lock: nothing may
//! change while it is described.

mod compare;
mod manifests;

pub use compare::{MetaState, compare};

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use compare::Stopping;

use crate::catalog::{Reader, RunId, Writer, meta};
use crate::chunk::HashAlgo;
use crate::error::{Error, Problem, Result};
use crate::progress::Progress;
use crate::sys::quoted;
use crate::volume::{Described, Volume, Volumes};

/// Blocks taken from the catalog at a time.
const PAGE_BLOCKS: u64 = 1024;
/// Problems that are kept with their texts; more are counted.
const PROBLEMS_MAX: usize = 1000;

/// What to look at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Everything is read and compared, whatever the notes on the volumes say.
    pub all: bool,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Summary {
    /// Metas that were looked at.
    pub metas: u64,
    /// Metas that were written.
    pub metas_written: u64,
    /// Manifests that were looked at.
    pub manifests: u64,
    /// Manifests that were written.
    pub manifests_written: u64,
    /// What could not be done, each named; at most a thousand.
    pub problems: Vec<Problem>,
    /// How much could not be done.
    pub problem_count: u64,
}

impl Summary {
    /// What came of it, in a line.
    pub fn line(&self) -> String {
        let mut line = format!(
            "wrote {} of {} metas, {} of {} manifests",
            self.metas_written, self.metas, self.manifests_written, self.manifests
        );
        if self.problem_count > 0 {
            line.push_str(&format!("; {} problems", self.problem_count));
        }
        line
    }
}

/// Completes the metas and manifests of every volume that is there.
pub fn run(catalog: &Path, options: &Options, progress: &Progress) -> Result<Summary> {
    progress.set_phase("preparing");
    let mut writer = Writer::open(catalog)?;
    let volumes = Volumes::open(writer.volumes()?);
    writer.refuse_lost_runs(&volumes)?;
    let mut work = Work {
        reader: Reader::open(catalog)?,
        hash: writer.settings()?.hash,
        progress,
        dir: catalog.parent().unwrap_or(Path::new("/")),
        summary: Summary::default(),
    };
    for (config, reason) in volumes.missing() {
        let message = format!("volume {}: {reason}", quoted(&config.path));
        work.note(config.path.as_os_str().as_bytes(), &Error::new(reason.kind(), message));
    }
    let runs = work.reader.runs()?;
    let totals = work.reader.totals()?;
    Progress::add(&progress.entries_total, totals.blocks + runs.len() as u64);
    // Up to which run a volume's documents are known to be right.
    let known = |volume: &Volume| match volume.described() {
        Some(note) if !options.all => {
            let run = runs.iter().find(|it| it.id == note.run && it.uuid == note.uuid);
            run.map_or(0, |it| it.id)
        }
        _ => 0,
    };
    let since: Vec<RunId> = volumes.present().iter().map(known).collect();
    progress.set_phase("writing metas");
    for (volume, since) in volumes.present().iter().zip(&since) {
        volume.refresh_guide();
        let problems = work.summary.problem_count;
        let facts = writer.facts_of(volume.config.number)?;
        let result = volume.refresh_manifest(facts).and_then(|()| work.metas(volume, *since));
        let result = result.and_then(|()| match runs.last() {
            Some(run) if work.summary.problem_count == problems => {
                volume.set_described(&Described { run: run.id, uuid: run.uuid.clone() })
            }
            _ => Ok(()),
        });
        work.settle(volume, result)?;
    }
    progress.set_phase("writing manifests");
    manifests::complete(&mut work, &mut writer, &runs, &volumes)?;
    progress.set_phase("done");
    Ok(work.summary)
}

struct Work<'a> {
    reader: Reader,
    hash: HashAlgo,
    progress: &'a Progress,
    /// Where temporary files go.
    dir: &'a Path,
    summary: Summary,
}

impl Work<'_> {
    fn note(&mut self, path: &[u8], error: &Error) {
        let problem = Problem::new(path, error);
        log::warn!("{problem}");
        self.progress.note(&problem);
        self.summary.problem_count += 1;
        if self.summary.problems.len() < PROBLEMS_MAX {
            self.summary.problems.push(problem);
        }
    }

    /// A volume's trouble is told, and the others go on; a wish to stop ends everything.
    fn settle(&mut self, volume: &Volume, result: Result<()>) -> Result<()> {
        self.progress.check()?;
        if let Err(e) = result {
            self.note(volume.config.path.as_os_str().as_bytes(), &e);
        }
        Ok(())
    }

    /// Writes the metas of a volume that are due, of which those up to run `since` are known to be
    /// right if they are there.
    fn metas(&mut self, volume: &Volume, since: RunId) -> Result<()> {
        let changed = match since {
            0 => None,
            run => Some(self.reader.blocks_changed_since(run)?),
        };
        let mut names = meta::DirNames::default();
        let mut after = 0;
        loop {
            let page = self.reader.copies_on(volume.config.number, after, PAGE_BLOCKS)?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.block;
            let mut documents = volume.documents();
            let mut written = Vec::new();
            for due in page {
                self.progress.check()?;
                Progress::add(&self.progress.entries, 1);
                self.summary.metas += 1;
                if changed.as_ref().is_some_and(|it| !it.contains(due.block)) {
                    let name = meta::document_name(&self.reader.block_id(due.block)?);
                    if volume.document_path(&name).exists() {
                        continue;
                    }
                }
                let index = match volume.index_record(due.record_at) {
                    Ok(index) => index,
                    Err(e) => {
                        // One damaged record costs one meta.
                        self.note(volume.config.path.as_os_str().as_bytes(), &e);
                        continue;
                    }
                };
                let (reader, hash, progress) = (&self.reader, self.hash, self.progress);
                let there = compare(reader, hash, (volume, &index), &mut names, progress)?;
                if there == MetaState::Current {
                    continue;
                }
                documents.add(&meta::document_name(&index.id), |out| {
                    let mut out = Stopping { out, progress };
                    reader.write_meta(&index, hash, &mut names, &mut out)
                })?;
                written.push(index.id);
            }
            documents.finish()?;
            self.summary.metas_written += written.len() as u64;
            for id in written {
                volume.remove_document(&meta::former_name(&id))?;
            }
        }
    }
}
