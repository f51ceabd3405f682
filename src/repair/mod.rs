//! Repair: bad copies are made good again, from another copy, from what several bad ones still
//! have, or from the files that were backed up and are unchanged.
//!
//! What is bad is replaced only when what is good is durable: it is written beside, checked by its
//! hash, synced and renamed over. Where not everything can be brought back, the old file is kept in
//! `damaged/`. Nothing is believed of who says that a block is bad: it is read again.

mod anew;
mod block;
mod index;
mod source;

use std::path::{Path, PathBuf};

use crate::backup::catalog_copy;
use crate::catalog::DamagedFile;
use crate::catalog::tapes::OnTape;
use crate::copies::Store;
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::genmeta;
use crate::progress::Progress;
use crate::volume::{BlockId, Volumes};

/// Heals and losses that are kept with their names; more are counted.
const KEPT_MAX: usize = 1000;
/// Files that are named with a loss.
const FILES_MAX: usize = 1000;
/// Bad copies taken from what is remembered at a time.
const PAGE_COPIES: usize = 1000;

/// Where what is good came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// Another copy.
    Copy,
    /// The good frames of several bad copies.
    Frames,
    /// The files that were backed up.
    Source,
    /// The same content, stored in a block of another name.
    Anew,
}

impl From {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            From::Copy => "copy",
            From::Frames => "frames",
            From::Source => "source",
            From::Anew => "anew",
        }
    }

    /// How it is told.
    pub fn told(self) -> &'static str {
        match self {
            From::Copy => "from another copy",
            From::Frames => "from the good parts of several copies",
            From::Source => "from the files that were backed up",
            From::Anew => "from the files that were backed up, as a new block",
        }
    }
}

/// A copy that is good again.
#[derive(Clone, Debug)]
pub struct Healed {
    /// The block.
    pub block: BlockId,
    /// Path of the volume.
    pub volume: PathBuf,
    /// Where the bytes came from.
    pub from: From,
    /// The block's name now.
    pub now: BlockId,
}

/// A block that is not whole.
#[derive(Debug)]
pub struct Unhealed {
    /// The block.
    pub block: BlockId,
    /// Why.
    pub reason: String,
    /// [`ErrorKind::Corrupt`], or why it cannot be tried.
    pub kind: ErrorKind,
    /// Whether some of what was lost has been brought back.
    pub is_better: bool,
    /// The files whose bytes are lost; none if another copy has them.
    pub files: Vec<DamagedFile>,
    /// How many those are.
    pub file_count: u64,
}

/// What came of a repair.
#[derive(Debug, Default)]
pub struct Repaired {
    /// Blocks that were read again.
    pub blocks: u64,
    /// The copies that are good again.
    pub healed: Vec<Healed>,
    /// How many those are.
    pub healed_count: u64,
    /// The blocks that are not.
    pub unhealed: Vec<Unhealed>,
    /// How many those are.
    pub unhealed_count: u64,
    /// Volumes whose index was written anew, with the number of records that were damaged.
    pub indexes: Vec<(PathBuf, u64)>,
    /// Metas, manifests and copies of the catalog that were written.
    pub documents: u64,
    /// What else could not be done.
    pub problems: Vec<Problem>,
}

impl Repaired {
    /// The kind that says most about what is left; `None` when nothing is.
    pub fn worst(&self) -> Option<ErrorKind> {
        let kinds = || {
            let problems = self.problems.iter().map(|it| it.kind);
            self.unhealed.iter().map(|it| it.kind).chain(problems)
        };
        match kinds().any(|it| it == ErrorKind::Corrupt) {
            true => Some(ErrorKind::Corrupt),
            false => kinds().next(),
        }
    }

    fn heal(&mut self, healed: Healed) {
        log::info!("block {}: good again, {}", healed.block, healed.from.told());
        self.healed_count += 1;
        if self.healed.len() < KEPT_MAX {
            self.healed.push(healed);
        }
    }

    fn give_up(&mut self, unhealed: Unhealed, progress: &Progress) {
        let name = format!("block {}", unhealed.block).into_bytes();
        let (kind, message) = (unhealed.kind, unhealed.reason.clone());
        progress.note(&Problem { path: name, kind, message });
        self.unhealed_count += 1;
        if self.unhealed.len() < KEPT_MAX {
            self.unhealed.push(unhealed);
        }
    }
}

/// What all parts of a repair share.
struct Work<'a> {
    store: Store,
    volumes: &'a Volumes,
    /// Temporary files go beside it.
    catalog: &'a Path,
    on_tape: OnTape,
    progress: &'a Progress,
    done: Repaired,
    /// Runs whose manifests name a block that has another name now.
    renamed_in: std::collections::BTreeSet<i64>,
}

/// Repairs the blocks `suspects` and those that are remembered as bad, the indexes of the volumes,
/// metas, manifests and copies of the catalog.
pub fn run(catalog: &Path, suspects: &[BlockId], progress: &Progress) -> Result<Repaired> {
    progress.set_phase("preparing");
    let (store, volumes) = Store::open(catalog)?;
    let done = Repaired::default();
    let renamed_in = std::collections::BTreeSet::new();
    let on_tape = OnTape::new(catalog);
    let mut work = Work { store, volumes: &volumes, catalog, on_tape, progress, done, renamed_in };
    progress.set_phase("repairing indexes");
    work.indexes()?;
    progress.set_phase("repairing blocks");
    Progress::add(&progress.entries_total, suspects.len() as u64);
    for id in suspects {
        work.block(id)?;
    }
    work.remembered(suspects)?;
    work.manifests()?;
    work.copies_of_catalog()?;
    let Work { mut done, store, .. } = work;
    drop(store);
    // What is damaged is found by looking at each.
    let options = genmeta::Options { all: true };
    let described = genmeta::run(catalog, &options, progress)?;
    done.documents += described.metas_written + described.manifests_written;
    // A volume that is away is told of with its blocks.
    let here = described.problems.into_iter().filter(|it| it.kind != ErrorKind::Offline);
    done.problems.extend(here);
    // What a repair that was killed has put in its place, and was found right now, is to last too.
    for volume in volumes.present() {
        if let Err(e) = volume.sync_folders() {
            let path = std::os::unix::ffi::OsStrExt::as_bytes(volume.config.path.as_os_str());
            done.problems.push(Problem::new(path, &e));
        }
    }
    progress.set_phase("done");
    Ok(done)
}

impl Work<'_> {
    /// Where temporary files go.
    fn dir(&self) -> &Path {
        self.catalog.parent().unwrap_or(Path::new("/"))
    }

    /// Repairs what readers and earlier validations have found bad.
    fn remembered(&mut self, suspects: &[BlockId]) -> Result<()> {
        let mut after: Option<(String, BlockId)> = None;
        loop {
            let from = after.as_ref().map(|it| (&*it.0, it.1));
            let page = self.store.health.bad(from, PAGE_COPIES);
            let Some(last) = page.last() else { return Ok(()) };
            after = Some((last.volume.clone(), last.block));
            for bad in page {
                if suspects.contains(&bad.block) {
                    continue;
                }
                // Of a volume that is gone, or a block that has another name now.
                match self.store.reader.numbers_of(&bad.block)?.is_empty() {
                    true => self.store.health.forget(&[(&bad.volume, bad.block)]),
                    false => self.block(&bad.block)?,
                }
            }
        }
    }

    /// Makes a good copy of the catalog where there is a damaged one.
    fn copies_of_catalog(&mut self) -> Result<()> {
        let mut failed = Vec::new();
        let made = catalog_copy::mend(
            (self.catalog, &self.store.reader),
            self.volumes,
            self.progress,
            &mut |volume, e| failed.push((volume.config.path.clone(), e)),
        )?;
        self.done.documents += made;
        failed.into_iter().for_each(|(path, e)| self.note(&path, &e));
        Ok(())
    }

    fn note(&mut self, path: &Path, error: &Error) {
        let path = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str());
        let problem = Problem::new(path, error);
        log::warn!("{problem}");
        self.progress.note(&problem);
        self.done.problems.push(problem);
    }
}
