//! Backing up a tree: scan, pipeline, commit.
//!
//! ```text
//! scan ──units──▶ workers (read, split, hash, compress, append) ──changes──▶ committer ─▶ catalog
//!   └──────────────────────────── changes without content ────────────────────▶┘
//! ```
//!
//! One scanner walks the tree in order and compares each directory with the run before; workers
//! turn changed files into chunks in blocks; the committer, on the caller's thread, owns the
//! catalog's transaction. Every queue is bounded, so memory does not grow with the tree. One
//! entry's trouble is a [`Problem`] and the run goes on; trouble with the store ends the run, which
//! then leaves no trace but stored blocks, and those the next run takes over.

mod adopt;
mod again;
mod ahead;
pub mod catalog_copy;
mod commit;
mod describe;
mod dry;
mod filter;
mod index;
mod layout;
mod look;
mod overlap;
mod scan;
mod stream;
mod way;
mod worker;

use std::collections::HashSet;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::catalog::{
    COMMENT_BYTES_MAX, Content, Counts, DirId, EntryRow, Reader, Run, RunId, Settings, VersionId,
    Writer as CatalogWriter,
};
use crate::entry::Metadata;
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::progress::Progress;
use crate::sys::{self, Time, c, quoted};
use crate::volume::{Status, Volumes, Writer as BlockWriter};

pub use dry::{Plan, Planned, dry_run};
pub use filter::{Rule, Rules};
pub use stream::{Input, Stream};

pub(crate) use adopt::adopt_all;
use ahead::Ahead;
use commit::Committer;
use filter::Filter;
use index::ChunkIndex;
use scan::{Numbers, Scanner, Sink};
use stream::{StreamJob, StreamScan};
use worker::Worker;

/// What to back up and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// The directory; of no meaning if there is a stream.
    pub source: PathBuf,
    /// What to back up instead of a directory.
    pub stream: Option<Stream>,
    /// Name of the source; its absolute path, or that of a stream, when `None`.
    pub name: Option<Vec<u8>>,
    /// Threads that read, hash and compress; a choice by the number of cores when `None`.
    pub max_workers: Option<usize>,
    /// Threads that append to blocks at one time; no limit of its own when `None`.
    pub max_write_workers: Option<usize>,
    /// Bytes of memory that the workers may take together; of the machine's when `None`: a half, at
    /// most 16 GiB.
    pub memory_limit: Option<u64>,
    /// Everything in the calling thread.
    pub single_threaded: bool,
    /// What to leave out.
    pub rules: Rules,
    /// Whether to stay on the file system of the source.
    pub one_file_system: bool,
    /// Whether to read files that look unchanged.
    pub force_read: bool,
    /// Leave the metas to `genmeta`.
    pub no_meta: bool,
    /// Whether to do without a copy of the catalog on the volumes.
    pub no_catalog_copy: bool,
    /// Tags of the run.
    pub tags: Vec<String>,
    /// What somebody has to say about the run; at most [`COMMENT_BYTES_MAX`].
    pub comment: String,
}

/// What a finished run has to say.
#[derive(Debug)]
pub struct Summary {
    /// The run's number.
    pub run: RunId,
    /// Name of its source.
    pub source: Vec<u8>,
    /// What it counted.
    pub counts: Counts,
    /// The first problems, at most [`PROBLEMS_MAX`].
    pub problems: Vec<Problem>,
    /// Bytes of blocks that an earlier run had stored without coming to its end.
    pub bytes_adopted: u64,
    /// What could not be done beside it. It takes nothing from the run.
    pub warnings: Vec<Error>,
    /// What lacks of the copies that were wanted.
    pub copies: Copies,
}

/// How it stands with the copies of what a run has stored.
#[derive(Clone, Debug, Default)]
pub struct Copies {
    /// On how many volumes each block was to be.
    pub wanted: u8,
    /// Blocks that are on fewer, because no other volume had room.
    pub blocks_lacking: u64,
    /// Their bytes.
    pub bytes_lacking: u64,
    /// Volumes on one file system: its loss would be the loss of several copies.
    pub together: Vec<Vec<PathBuf>>,
}

/// Problems that a run keeps with their texts; more are only counted.
pub const PROBLEMS_MAX: usize = 10_000;
/// Batches of changes that wait for the committer at most: what a unit has made of its files, or
/// [`BATCH_CHANGES_MAX`] changes of the scanner's.
const QUEUE_BATCHES_MAX: usize = 16;
/// Changes that the scanner hands over together: each hand-over may wake a thread.
const BATCH_CHANGES_MAX: usize = 128;
/// Units that wait for a worker at most. A unit is at most a frame's bytes, and holds the
/// directories of its files open.
const QUEUE_ITEMS_MAX: usize = 8;
/// Threads that list directories ahead of the scan: how many requests for metadata a disk has at a
/// time.
const LISTERS: usize = 4;
/// Closed blocks that wait to be made durable at most: each holds a file open.
const WAITING_BLOCKS_MAX: usize = 128;
/// Name of a stream's source where none is given, and the path under which a stream's run goes.
const STREAM_NAME: &str = "stdin";
const STREAM_PATH: &str = "-";
/// Closed blocks that wait to be made durable at most, in bytes.
const WAITING_BYTES_MAX: u64 = 256 << 20;
/// Chunks in them at most: each takes some memory until its block is in the catalog.
const WAITING_CHUNKS_MAX: u64 = 1 << 16;

/// A changed regular file on its way to a worker.
struct FileJob {
    place: EntryPlace,
    parent: Arc<OwnedFd>,
    meta: Metadata,
    version: VersionId,
}

/// Where an entry belongs, and what was there in the run before.
struct EntryPlace {
    dir: DirId,
    name: OsString,
    path: Vec<u8>,
    old: Option<EntryRow>,
}

/// Work for one worker.
enum Unit {
    /// Small files that share a frame.
    Pack(Vec<FileJob>),
    /// A file that gets blocks of its own.
    Large(Box<FileJob>),
    /// A stream, which gets blocks of its own too.
    Stream(Box<StreamJob>),
}

/// How many entries are as they were in the run before.
#[derive(Clone, Copy, Default)]
struct Unchanged {
    entries: u64,
    dirs: u64,
    files: u64,
    bytes: u64,
}

/// What the committer is told.
enum Change {
    /// An entry that is new or changed, with its content stored.
    Put {
        place: EntryPlace,
        meta: Metadata,
        version: VersionId,
        child: Option<DirId>,
        content: Content,
        /// Whether other names may come to be linked to it.
        linked: bool,
    },
    /// A further name of a version of this run or of an earlier one.
    Link {
        place: EntryPlace,
        meta: Metadata,
        version: VersionId,
        /// Whether no further name can follow.
        is_last: bool,
    },
    /// Entries as they were in the run before, many together: telling of each would cost more than
    /// finding it unchanged.
    Unchanged(Unchanged),
    /// A file that was read and turned out to be as it was; `version` is the number it would have
    /// got.
    Same { old: EntryRow, version: VersionId, linked: bool },
    /// An entry of the run before that is not there any more.
    Gone { row: EntryRow, path: Vec<u8> },
    /// A directory that cannot be listed any more: what was in it is not in the snapshot.
    Emptied { dir: DirId, path: Vec<u8> },
    /// A file with several names that is not there any more under the one it was to be read by.
    Astray { place: EntryPlace, version: VersionId },
    /// A file that could not be read; it is not in the snapshot.
    Failed { place: EntryPlace, version: Option<VersionId>, problem: Problem },
    /// Trouble that leaves no hole.
    Noted(Problem),
}

/// Whether an error is this process's own want of descriptors: that ends the run, for every file
/// that comes after would be left out just the same.
fn is_out_of_files(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(c::EMFILE | c::ENFILE))
}

/// The error for it.
fn out_of_files(error: std::io::Error) -> Error {
    Error::io("raise the limit of open files, as with ulimit -n", error)
}

/// What the scanner gives out.
#[allow(clippy::large_enum_variant, reason = "lives on the stack, between two calls")]
enum Item {
    Unit(Unit),
    Change(Change),
}

/// Backs up `options.source` into the catalog at `catalog`.
pub fn run(catalog: &Path, options: &Options, progress: &Progress) -> Result<Summary> {
    progress.set_phase("preparing");
    sys::raise_open_files_limit();
    let started = Time::now();
    let (source, name) = source_and_name(options)?;
    check_options(options)?;
    let filter = Filter::new(&options.rules)?;
    let mut writer = CatalogWriter::open(catalog)?;
    let settings = writer.settings()?;
    let configs = writer.volumes()?;
    let own = match options.stream {
        None => overlap::check(&source, catalog, &configs, options, &filter)?,
        Some(_) => HashSet::new(),
    };
    let volumes = writer.open_volumes()?;
    for (config, reason) in volumes.missing() {
        if reason.kind() == ErrorKind::Version {
            // Whoever wrote it knows more than this program: nothing is written beside it.
            return Err(Error::new(ErrorKind::Version, reason.to_string()));
        }
        log::warn!("volume {} is not there: {reason}", quoted(&config.path));
    }
    if volumes.present().is_empty()
        && let Some((config, reason)) = volumes.missing().first()
    {
        if let Some(errno @ (c::EMFILE | c::ENFILE)) = reason.errno() {
            return Err(out_of_files(std::io::Error::from_raw_os_error(errno)));
        }
        // Even a run that stores nothing new leaves its manifest on a volume.
        let path = quoted(&config.path);
        let message = format!("no volume is there, not {path}: connect one, or add-volume another");
        return Err(Error::new(ErrorKind::Offline, message));
    }
    let adopted = adopt_all(&mut writer, &volumes)?;
    let basis = Reader::open(catalog)?.latest(Some(&name))?;
    expect_as_much(basis.as_ref(), progress);
    let blocks = BlockWriter::new(
        &volumes,
        settings.hash,
        settings.block_bytes,
        writer.next_block()?,
        adopted.index_lens,
    )
    .with_copies(settings.copies);
    let problems = adopted.problems;
    let (source, name) = (&*source, &*name);
    let target = Target { catalog, source, name, basis, own, filter: &filter, started, problems };
    let result = run_into(&mut writer, target, &settings, &volumes, &blocks, options, progress);
    for number in blocks.sealed() {
        set_sealed(&volumes, number);
    }
    match result {
        Ok(mut summary) => {
            log::info!("run {} is complete", summary.run);
            summary.bytes_adopted = adopted.bytes;
            // What a run says that has found nothing new is in its manifest.
            if !options.no_catalog_copy && summary.counts.has_changes() {
                let warnings = &mut summary.warnings;
                catalog_copy::write(catalog, &volumes, summary.run, progress, &mut |e| {
                    log::warn!("{e}");
                    warnings.push(e);
                });
                progress.set_phase("done");
            }
            Ok(summary)
        }
        Err(e) => {
            // What is full stays full, or the next run would fail the same way.
            for number in blocks.sealed() {
                if let Err(e) = writer.set_volume_status(number, Status::Sealed) {
                    log::warn!("could not note that volume {number} is sealed: {e}");
                }
            }
            Err(e)
        }
    }
}

/// The source's absolute path without links, and its name.
fn source_and_name(options: &Options) -> Result<(PathBuf, Vec<u8>)> {
    if options.stream.is_some() {
        let name = options.name.clone().unwrap_or_else(|| STREAM_NAME.into());
        return Ok((STREAM_PATH.into(), name));
    }
    let source = options
        .source
        .canonicalize()
        .map_err(|e| Error::io(format!("source {}", quoted(&options.source)), e))?;
    let name = options.name.clone().unwrap_or_else(|| source.as_os_str().as_bytes().to_vec());
    Ok((source, name))
}

fn check_options(options: &Options) -> Result<()> {
    if options.comment.len() > COMMENT_BYTES_MAX {
        let message = format!("the comment is longer than {COMMENT_BYTES_MAX} bytes");
        return Err(Error::usage(message));
    }
    options.stream.as_ref().map_or(Ok(()), Stream::check)
}

/// The run before is the best guess of how much there is to do.
fn expect_as_much(basis: Option<&Run>, progress: &Progress) {
    let Some(counts) = basis.map(|it| &it.counts) else { return };
    let entries = &counts.entries;
    let total = entries.added + entries.modified + entries.unchanged;
    Progress::add(&progress.entries_total, total);
    Progress::add(&progress.bytes_total, counts.bytes);
}

/// What is backed up, resolved.
struct Target<'a> {
    catalog: &'a Path,
    source: &'a Path,
    name: &'a [u8],
    basis: Option<Run>,
    own: HashSet<(u64, u64)>,
    filter: &'a Filter,
    started: Time,
    /// What was met before the run began.
    problems: Vec<Problem>,
}

/// The run itself: one transaction of the catalog.
fn run_into(
    writer: &mut CatalogWriter,
    mut target: Target<'_>,
    settings: &Settings,
    volumes: &Volumes,
    blocks: &BlockWriter<'_>,
    options: &Options,
    progress: &Progress,
) -> Result<Summary> {
    let problems = std::mem::take(&mut target.problems);
    let Target { catalog, source, name, started, .. } = target;
    let run = writer.begin_run(name, source, started)?;
    let chunks = ChunkIndex::new(run, volumes, options.max_write_workers)?;
    let dir = catalog.parent().unwrap_or(Path::new("/"));
    let mut committer = Committer::new(&chunks, blocks, volumes, settings, progress, dir)?;
    committer.note_all(problems);
    let ahead = Ahead::new(!options.single_threaded);
    let numbers = Numbers::Run(&chunks);
    let mut walk = match &options.stream {
        None => Walk::Tree(Box::new(Scanner::new(target, options, numbers, &ahead, progress)?)),
        Some(stream) => {
            let (basis, reader) = (target.basis, Reader::open(catalog)?);
            let scan = StreamScan { stream, name, basis, reader, numbers, started };
            Walk::Stream(Box::new(scan))
        }
    };
    let parts = Parts { settings, chunks: &chunks, blocks, ahead: &ahead, progress };
    progress.set_phase("backing up");
    match options.single_threaded {
        true => run_alone(&mut walk, &mut committer, &parts)?,
        false => {
            let workers = options.max_workers.unwrap_or_else(default_workers).clamp(1, 64);
            let workers = workers.min(workers_within(options.memory_limit, settings));
            run_together(&mut walk, &mut committer, &parts, workers)?;
        }
    }
    again::read_again(source, &mut committer, &parts)?;
    committer.finish(options, name)
}

/// Where the entries of a run come from.
enum Walk<'a, 'c> {
    Tree(Box<Scanner<'a, 'c>>),
    Stream(Box<StreamScan<'a, 'c>>),
}

impl Walk<'_, '_> {
    fn run(&mut self, sink: Sink<'_>) -> Result<()> {
        match self {
            Walk::Tree(scanner) => scanner.run(sink),
            Walk::Stream(scan) => scan.run(sink),
        }
    }
}

/// One more than there are cores, for while one waits for a disk. Files are read ahead of their
/// turn, so more would only drive each other's tables out of the processor's caches.
fn default_workers() -> usize {
    (std::thread::available_parallelism().map_or(2, usize::from) + 1).min(8)
}

/// What a run takes besides its workers, in bytes: pages of the catalog, queues, tables of blocks.
const OTHER_BYTES: u64 = 48 << 20;
/// The most that is taken of a machine that nobody has set a limit for, in bytes.
const MEMORY_BYTES_MAX: u64 = 16 << 30;

/// How many workers fit the memory; one in any case: a run is slowed down, not refused.
fn workers_within(limit: Option<u64>, settings: &Settings) -> usize {
    let limit = limit.unwrap_or_else(|| (sys::memory_bytes() / 2).min(MEMORY_BYTES_MAX));
    let fit = limit.saturating_sub(OTHER_BYTES) / Worker::memory_bytes(settings);
    usize::try_from(fit).unwrap_or(usize::MAX).max(1)
}

fn set_sealed(volumes: &Volumes, number: i64) {
    let Some(volume) = volumes.get(number) else { return };
    if let Err(e) = volume.set_status(Status::Sealed) {
        log::warn!("could not mark volume {} as sealed: {e}", quoted(&volume.config.path));
    }
}

fn run_alone(
    walk: &mut Walk<'_, '_>,
    committer: &mut Committer<'_, '_>,
    parts: &Parts<'_, '_>,
) -> Result<()> {
    let mut worker = Worker::new(parts.settings, parts.chunks, parts.blocks, parts.progress)?;
    walk.run(&mut |item| match item {
        Item::Change(change) => committer.take(change),
        Item::Unit(unit) => worker.work(unit, &mut |change| committer.take(change)),
    })
}

/// What every worker shares.
struct Parts<'a, 'c> {
    settings: &'a Settings,
    chunks: &'a ChunkIndex<'c>,
    blocks: &'a BlockWriter<'a>,
    ahead: &'a Ahead,
    progress: &'a Progress,
}

/// A thread that ended because another one did: the other one's error is the one to tell.
fn hung_up() -> Error {
    Error::new(ErrorKind::Interrupted, "another part of the run has failed")
}

fn run_together(
    walk: &mut Walk<'_, '_>,
    committer: &mut Committer<'_, '_>,
    parts: &Parts<'_, '_>,
    workers: usize,
) -> Result<()> {
    let (unit_out, unit_in) = bounded::<Unit>(QUEUE_ITEMS_MAX);
    let (change_out, change_in) = bounded::<Vec<Change>>(QUEUE_BATCHES_MAX);
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for _ in 0..workers {
            let (units, changes) = (unit_in.clone(), change_out.clone());
            threads.push(scope.spawn(move || work(parts, &units, &changes)));
        }
        drop(unit_in);
        // However this ends, nobody waits for the threads ahead for ever.
        let _closing = Closing(parts.ahead);
        for _ in 0..LISTERS {
            scope.spawn(|| parts.ahead.work());
        }
        threads.push(scope.spawn(move || {
            // The threads ahead end with the scan, however it ends.
            let _closing = Closing(parts.ahead);
            let mut batch = Vec::new();
            walk.run(&mut |item| {
                parts.chunks.check()?;
                match item {
                    Item::Unit(unit) => unit_out.send(unit).map_err(|_| hung_up()),
                    Item::Change(change) => {
                        batch.push(change);
                        match batch.len() < BATCH_CHANGES_MAX {
                            true => Ok(()),
                            false => send(&change_out, &mut batch),
                        }
                    }
                }
            })?;
            send(&change_out, &mut batch)
        }));
        let mut result = commit_all(committer, &change_in);
        if result.is_err() {
            parts.chunks.give_up();
        }
        drop(change_in);
        for thread in threads {
            let ended = thread.join().unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Io, "a thread of the run has panicked"))
            });
            // The first cause counts, not what followed from it.
            if let Err(e) = ended
                && (result.is_ok() || e.kind() != ErrorKind::Interrupted)
            {
                result = Err(e);
            }
        }
        result
    })
}

fn commit_all(committer: &mut Committer<'_, '_>, changes: &Receiver<Vec<Change>>) -> Result<()> {
    changes.iter().flatten().try_for_each(|change| committer.take(change))
}

fn send(changes: &Sender<Vec<Change>>, batch: &mut Vec<Change>) -> Result<()> {
    changes.send(std::mem::take(batch)).map_err(|_| hung_up())
}

struct Closing<'a>(&'a Ahead);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

struct GiveUpOnPanic<'a, 'c>(&'a ChunkIndex<'c>);

impl Drop for GiveUpOnPanic<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.give_up();
        }
    }
}

fn work(
    parts: &Parts<'_, '_>,
    units: &Receiver<Unit>,
    changes: &Sender<Vec<Change>>,
) -> Result<()> {
    // A worker that panics must not leave others waiting for its chunks.
    let _guard = GiveUpOnPanic(parts.chunks);
    let mut worker = Worker::new(parts.settings, parts.chunks, parts.blocks, parts.progress)?;
    let result = units.iter().try_for_each(|unit| {
        let mut batch = Vec::new();
        worker.work(unit, &mut |change| {
            batch.push(change);
            Ok(())
        })?;
        send(changes, &mut batch)
    });
    if result.is_err() {
        // Others may wait for chunks of this worker, which will not come.
        parts.chunks.give_up();
    }
    result
}
