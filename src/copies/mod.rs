//! Copies of blocks on several volumes: made where they lack, and kept while volumes come and go.
//!
//! Nothing here takes a copy away: a volume that is retired keeps its files, and its rows leave the
//! catalog when each of its blocks was read, found right and is elsewhere. Whatever is killed can
//! be started again: what it has made is taken over.

mod readopt;
mod replicate;
mod retire;
mod tables;

pub use readopt::{Readopted, readopt};
pub use replicate::{Replicated, replicate};
pub use retire::{Retired, retire};
pub use tables::tables_of;

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::backup::adopt_all;
use crate::catalog::health::Health;
use crate::catalog::{Reader, Settings, Writer, meta};
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::genmeta;
use crate::progress::Progress;
use crate::sys::{self, Time, quoted};
use crate::volume::{BlockIndex, CopyJob, Status, Volume, Volumes, Writer as BlockWriter};

/// Problems that are kept with their texts; more are counted.
const PROBLEMS_MAX: usize = 1000;
/// Blocks that are made durable together, and their bytes: a sync costs about the same for one.
const GROUP_BLOCKS: usize = 16;
const GROUP_BYTES: u64 = 256 << 20;

/// Writes the metas and manifests that lack where copies have come to.
fn describe(catalog: &Path, problems: &mut Problems, progress: &Progress) -> Result<()> {
    let described = genmeta::run(catalog, &genmeta::Options::default(), progress)?;
    // A volume that is away is no matter here.
    let here = described.problems.into_iter().filter(|it| it.kind != ErrorKind::Offline);
    here.for_each(|it| problems.add(it));
    Ok(())
}

/// A catalog held for writing.
pub struct Store {
    /// The catalog's one writer.
    pub writer: Writer,
    /// A reader of the same.
    pub reader: Reader,
    /// The catalog's settings.
    pub settings: Settings,
    /// What is known of the health of copies.
    pub health: Health,
    /// The valid length of each present volume's index.
    index_lens: Vec<Option<u64>>,
    /// What was met on the way.
    problems: Vec<Problem>,
}

impl Store {
    /// Takes the right to write, and takes over what a dead run has left.
    pub fn open(catalog: &Path) -> Result<(Store, Volumes)> {
        sys::raise_open_files_limit();
        let mut writer = Writer::open(catalog)?;
        let mut volumes = writer.open_volumes()?;
        if let Some(reason) = volumes.take_shortage() {
            // That says nothing of where the volume is.
            return Err(reason);
        }
        let adopted = adopt_all(&mut writer, &volumes)?;
        let store = Store {
            reader: Reader::open(catalog)?,
            settings: writer.settings()?,
            writer,
            health: Health::open(catalog),
            index_lens: adopted.index_lens,
            problems: adopted.problems,
        };
        Ok((store, volumes))
    }

    /// The valid length of each present volume's index.
    pub fn index_lens(&self) -> &[Option<u64>] {
        &self.index_lens
    }

    /// Notes that indexes have been written to, or written anew.
    pub fn set_index_lens(&mut self, lens: Vec<Option<u64>>) {
        self.index_lens = lens;
    }

    /// Copies the blocks of a group as `jobs` say, and notes what was made.
    fn copy(
        &mut self,
        volumes: &Volumes,
        blocks: &BlockWriter<'_>,
        jobs: &mut [CopyJob<'_>],
        progress: &Progress,
    ) -> Result<()> {
        let mut names = meta::DirNames::default();
        let (reader, hash) = (&self.reader, self.settings.hash);
        let result = blocks.copy(jobs, &|bytes| count(progress, bytes), &mut |volume, indexes| {
            write_metas(reader, volume, indexes, hash, &mut names)
        });
        let mut made = Vec::new();
        for job in &*jobs {
            made.extend(job.made.iter().map(|at| (job.block, *at)));
            for (volume, error) in &job.bad {
                note_bad(&self.health, volumes, *volume, &job.index.id, error);
            }
        }
        // Also when it was stopped: what is durable needs no second time.
        let lens = volumes.present().iter().zip(blocks.index_lens());
        let lens: Vec<(i64, u64)> =
            lens.filter_map(|(it, len)| Some((it.config.number, len?))).collect();
        self.writer.put_copies(&made, &lens)?;
        result
    }

    /// Notes the volumes that were found full.
    fn seal(&mut self, volumes: &Volumes, blocks: &BlockWriter<'_>) {
        for number in blocks.sealed() {
            let noted = self.writer.set_volume_status(number, Status::Sealed);
            let volume = volumes.get(number);
            let said = volume.map_or(Ok(()), |it| it.set_status(Status::Sealed));
            if let Err(e) = noted.and(said) {
                log::warn!("could not note that volume {number} is sealed: {e}");
            }
        }
    }
}

/// Counts bytes that were copied; fails if the work is to stop.
fn count(progress: &Progress, bytes: u64) -> Result<()> {
    progress.check()?;
    Progress::add(&progress.bytes, bytes);
    Progress::add(&progress.bytes_read, bytes);
    Ok(())
}

/// Writes the metas of blocks on a volume.
pub fn write_metas(
    reader: &Reader,
    volume: &Volume,
    indexes: &[&BlockIndex],
    hash: crate::chunk::HashAlgo,
    names: &mut meta::DirNames,
) -> Result<()> {
    let mut documents = volume.documents();
    for index in indexes {
        let name = meta::document_name(&index.id);
        documents.add(&name, |out| reader.write_meta(index, hash, names, out))?;
    }
    documents.finish()
}

/// Notes a bad copy, for whoever repairs it.
fn note_bad(
    health: &Health,
    volumes: &Volumes,
    volume: i64,
    block: &crate::volume::BlockId,
    error: &Error,
) {
    if let Some(volume) = volumes.get(volume) {
        health.note_bad(&volume.config.uuid, block, &error.to_string(), Time::now());
    }
}

/// Problems as they are met.
#[derive(Debug, Default)]
pub struct Problems {
    /// The first thousand.
    pub list: Vec<Problem>,
    /// How many there are.
    pub count: u64,
}

impl Problems {
    fn note(&mut self, progress: &Progress, path: &[u8], error: &Error) {
        let problem = Problem::new(path, error);
        log::warn!("{problem}");
        progress.note(&problem);
        self.add(problem);
    }

    fn add(&mut self, problem: Problem) {
        self.count += 1;
        if self.list.len() < PROBLEMS_MAX {
            self.list.push(problem);
        }
    }

    /// A volume that failed, by its path.
    fn note_volume(&mut self, progress: &Progress, path: &Path, error: Error) {
        let error = error.context(format!("{} takes no more copies", quoted(path)));
        self.note(progress, path.as_os_str().as_bytes(), &error);
    }
}
