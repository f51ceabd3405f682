//! The committer: what becomes of each change, and the end of a run.
//!
//! Runs on one thread and is alone in writing entries. The end has a fixed order: blocks durable,
//! then metas and the manifest on the volumes, then the catalog's commit, and only then the answer.

use std::collections::{HashMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::describe::{Touched, write_metas};
use super::index::ChunkIndex;
use super::{
    Change, Copies, EntryPlace, Options, PROBLEMS_MAX, Summary, Unchanged, WAITING_BLOCKS_MAX,
    WAITING_BYTES_MAX, WAITING_CHUNKS_MAX,
};
use crate::catalog::chain::RunEnd;
use crate::catalog::manifest;
use crate::catalog::{
    Content, Counts, DirId, EntryRow, NewEntry, NumberSet, RunWriter, Settings, Spool, Tally,
    VersionId,
};
use crate::chunk::{Digest, HashAlgo};
use crate::entry::{Kind, Metadata};
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::progress::Progress;
use crate::sys::{Time, quoted};
use crate::volume::{Volumes, Writer};

/// How long a run goes on at most before what it has stored is made durable.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(20);
/// The shared block is not closed early for less than this, in stored bytes: blocks cost files.
const CHECKPOINT_BYTES_MIN: u64 = 16 << 20;

/// What became of a version that names may wait for.
#[derive(Clone, Copy)]
enum Fate {
    /// It is in the catalog under this number, with this metadata.
    Kept(VersionId, Metadata),
    /// It was not where it was to be read; its names are looked up again at the end.
    Astray,
    /// It could not be read.
    Failed,
}

/// Names that wait for a version.
#[derive(Default)]
struct Waiting {
    names: Vec<EntryPlace>,
    /// Whether no further one can follow.
    is_all: bool,
}

/// Writes the entries of one run.
pub struct Committer<'a, 'c> {
    chunks: &'a ChunkIndex<'c>,
    blocks: &'a Writer<'a>,
    volumes: &'a Volumes,
    settings: &'a Settings,
    progress: &'a Progress,
    spool: Spool,
    counts: Counts,
    problems: Vec<Problem>,
    first_version: VersionId,
    /// Versions of this run with several names: what became of them.
    fates: HashMap<VersionId, Fate>,
    /// Names whose version is still with a worker.
    waiting: HashMap<VersionId, Waiting>,
    /// Names of files that have to be looked up again.
    astray: Vec<EntryPlace>,
    /// Older versions that have got further names.
    linked: NumberSet,
    users: HashSet<u32>,
    groups: HashSet<u32>,
    last_checkpoint: Instant,
}

impl<'a, 'c> Committer<'a, 'c> {
    /// A committer whose temporary file lies in `dir`.
    pub fn new(
        chunks: &'a ChunkIndex<'c>,
        blocks: &'a Writer<'a>,
        volumes: &'a Volumes,
        settings: &'a Settings,
        progress: &'a Progress,
        dir: &Path,
    ) -> Result<Committer<'a, 'c>> {
        let first_version = chunks.run().next_version();
        Ok(Committer {
            chunks,
            blocks,
            volumes,
            settings,
            progress,
            spool: Spool::new(dir)?,
            counts: Counts::default(),
            problems: Vec::new(),
            first_version,
            fates: HashMap::new(),
            waiting: HashMap::new(),
            astray: Vec::new(),
            linked: NumberSet::default(),
            users: HashSet::new(),
            groups: HashSet::new(),
            last_checkpoint: Instant::now(),
        })
    }

    /// Takes problems that were met before the first change.
    pub fn note_all(&mut self, problems: Vec<Problem>) {
        problems.into_iter().for_each(|it| self.note(it));
    }

    /// Takes one change.
    pub fn take(&mut self, change: Change) -> Result<()> {
        self.progress.check()?;
        match change {
            Change::Unchanged(unchanged) => {
                unchanged.count(&mut self.counts, self.progress);
            }
            Change::Put { place, meta, version, child, content, linked } => {
                self.put(&place, &meta, version, child, &content)?;
                self.settle(version, linked, Fate::Kept(version, meta))?;
            }
            Change::Same { old, version, linked } => {
                self.tally(old.meta.kind).unchanged += 1;
                self.count_file(old.meta.kind, old.meta.size);
                self.settle(version, linked, Fate::Kept(old.version, old.meta))?;
            }
            Change::Link { place, meta, version, is_last } => {
                self.link(place, meta, version, is_last)?;
            }
            Change::Gone { row, path } => self.gone(&row, &path)?,
            Change::Emptied { dir, path } => {
                // If the directory itself is unchanged, it has no line of its own in the manifest.
                self.spool.empty(&path)?;
                self.close_below(dir)?;
            }
            Change::Astray { place, version } => {
                self.astray.push(place);
                self.settle(version, true, Fate::Astray)?;
            }
            Change::Failed { place, version, problem } => {
                self.failed(&place, problem)?;
                if let Some(version) = version {
                    self.settle(version, true, Fate::Failed)?;
                }
            }
            Change::Noted(problem) => self.note(problem),
        }
        self.checkpoint_if_due()
    }

    /// Makes durable what is closed, when that is much or when the last time is long ago: what a
    /// run that is killed has stored by then, the next one takes over.
    fn checkpoint_if_due(&mut self) -> Result<()> {
        let is_late = self.last_checkpoint.elapsed() > CHECKPOINT_EVERY;
        let is_much = self.blocks.waiting_bytes() > WAITING_BYTES_MAX
            || self.blocks.waiting_chunks() > WAITING_CHUNKS_MAX
            || self.blocks.waiting_blocks() > WAITING_BLOCKS_MAX;
        if !is_late && !is_much {
            return Ok(());
        }
        if is_late {
            self.blocks.close_shared_from(CHECKPOINT_BYTES_MIN)?;
        }
        let stored = self.blocks.barrier(false)?;
        self.store(&stored)?;
        self.last_checkpoint = Instant::now();
        Ok(())
    }

    fn tally(&mut self, kind: Kind) -> &mut Tally {
        Progress::add(&self.progress.entries, u64::from(kind != Kind::Dir));
        self.counts.tally(kind)
    }

    fn count_file(&mut self, kind: Kind, size: u64) {
        if kind == Kind::File {
            self.counts.files += 1;
            self.counts.bytes += size;
        }
    }

    fn note(&mut self, problem: Problem) {
        log::warn!("{problem}");
        self.counts.problems += 1;
        self.progress.note(&problem);
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }

    fn put(
        &mut self,
        place: &EntryPlace,
        meta: &Metadata,
        version: VersionId,
        child: Option<DirId>,
        content: &Content,
    ) -> Result<()> {
        let data_len = content.data_len();
        self.put_name(place, meta, version, child, data_len)?;
        self.chunks.run().put_content(version, meta.kind, content)?;
        self.spool.put(&place.path, version, meta, content)
    }

    /// Adds a name and ends the life of what had it before.
    fn put_name(
        &mut self,
        place: &EntryPlace,
        meta: &Metadata,
        version: VersionId,
        child: Option<DirId>,
        data_len: Option<u64>,
    ) -> Result<()> {
        self.note_owners(meta)?;
        match &place.old {
            Some(old) => {
                self.tally(meta.kind).modified += 1;
                self.chunks.run().close_entry(old)?;
                if let Some(dir) = old.child.filter(|_| child.is_none()) {
                    // A directory has become something else: a new name for the manifest.
                    self.spool.delete(&place.path)?;
                    self.close_below(dir)?;
                }
            }
            None => self.tally(meta.kind).added += 1,
        }
        self.count_file(meta.kind, meta.size);
        let name = place.name.as_bytes();
        let entry = NewEntry { dir: place.dir, name, version, child, meta, data_len };
        self.chunks.run().put_entry(&entry)
    }

    /// A further name of a version.
    fn link(
        &mut self,
        place: EntryPlace,
        meta: Metadata,
        version: VersionId,
        is_last: bool,
    ) -> Result<()> {
        if version < self.first_version {
            return self.link_to(place, Fate::Kept(version, meta));
        }
        let Some(fate) = self.fates.get(&version).copied() else {
            let waiting = self.waiting.entry(version).or_default();
            waiting.names.push(place);
            waiting.is_all |= is_last;
            return Ok(());
        };
        if is_last {
            // Nobody will ask again: memory must not grow with every link of a tree.
            self.fates.remove(&version);
        }
        self.link_to(place, fate)
    }

    fn link_to(&mut self, place: EntryPlace, fate: Fate) -> Result<()> {
        let (version, meta) = match fate {
            Fate::Kept(version, meta) => (version, meta),
            Fate::Astray => {
                self.astray.push(place);
                return Ok(());
            }
            Fate::Failed => {
                let message = "another name of the same file could not be read";
                let error = Error::new(ErrorKind::Io, message);
                let problem = Problem::new(&*place.path, &error);
                return self.failed(&place, problem);
            }
        };
        if place.old.as_ref().is_some_and(|old| old.version == version) {
            self.tally(meta.kind).unchanged += 1;
            self.count_file(meta.kind, meta.size);
            return Ok(());
        }
        if version < self.first_version {
            self.linked.insert(version.cast_unsigned());
        }
        let data_len = self.chunks.run().data_len_of(version)?;
        self.put_name(&place, &meta, version, None, data_len)?;
        self.spool.link(&place.path, version)
    }

    /// Notes what became of a version, and deals with the names that waited for it.
    fn settle(&mut self, version: VersionId, linked: bool, fate: Fate) -> Result<()> {
        let waiting = self.waiting.remove(&version).unwrap_or_default();
        if linked && !waiting.is_all {
            self.fates.insert(version, fate);
        }
        waiting.names.into_iter().try_for_each(|place| self.link_to(place, fate))
    }

    /// The names that have to be looked up again.
    pub fn take_astray(&mut self) -> Vec<EntryPlace> {
        std::mem::take(&mut self.astray)
    }

    fn gone(&mut self, row: &EntryRow, path: &[u8]) -> Result<()> {
        self.tally(row.meta.kind).deleted += 1;
        self.spool.delete(path)?;
        self.chunks.run().close_entry(row)?;
        match row.child {
            Some(dir) => self.close_below(dir),
            None => Ok(()),
        }
    }

    fn close_below(&mut self, dir: DirId) -> Result<()> {
        let counts = &mut self.counts;
        self.chunks.run().close_below(dir, |kind| counts.tally(kind).deleted += 1)
    }

    /// An entry that could not be read is not in the snapshot: what it was before has ended.
    fn failed(&mut self, place: &EntryPlace, problem: Problem) -> Result<()> {
        self.note(problem);
        if let Some(old) = &place.old {
            self.spool.delete(&place.path)?;
            self.chunks.run().close_entry(old)?;
            if let Some(dir) = old.child {
                self.close_below(dir)?;
            }
        }
        Ok(())
    }

    fn note_owners(&mut self, meta: &Metadata) -> Result<()> {
        if self.users.insert(meta.uid)
            && let Some(user) = uzers::get_user_by_uid(meta.uid)
        {
            self.put_owner("user", meta.uid, user.name().as_bytes())?;
        }
        if self.groups.insert(meta.gid)
            && let Some(group) = uzers::get_group_by_gid(meta.gid)
        {
            self.put_owner("group", meta.gid, group.name().as_bytes())?;
        }
        Ok(())
    }

    fn put_owner(&mut self, kind: &str, id: u32, name: &[u8]) -> Result<()> {
        match self.chunks.run().put_owner(kind, id, name)? {
            true => self.spool.owner(kind, id, name),
            false => Ok(()),
        }
    }

    fn store(&mut self, stored: &[crate::volume::Stored]) -> Result<()> {
        let bytes: u64 = stored.iter().map(|it| it.index().stored_len()).sum();
        self.counts.bytes_stored += bytes;
        self.chunks.store(stored)
    }

    /// Names volumes that failed while copies were written, and says how many copies there are not.
    fn note_lacking(&mut self) -> Copies {
        let lacking = self.blocks.take_lacking();
        for (volume, error) in lacking.failed {
            let error = error.context("it took no more copies");
            self.note(Problem::new(volume.as_os_str().as_bytes(), &error));
        }
        let wanted = self.settings.copies;
        if lacking.blocks > 0 {
            let (blocks, bytes) = (lacking.blocks, lacking.bytes);
            let message = format!(
                "{blocks} blocks ({bytes} bytes) of this run are on fewer than {wanted} volumes: \
                 add a volume with room, then run raidtape replicate"
            );
            let error = Error::new(ErrorKind::NoSpace, message);
            self.note(Problem::new("copies", &error));
        }
        let together = if wanted > 1 { self.volumes.on_one_device() } else { Vec::new() };
        Copies { wanted, blocks_lacking: lacking.blocks, bytes_lacking: lacking.bytes, together }
    }

    /// Ends the run: everything durable in its order, and the run visible last.
    pub fn finish(mut self, options: &Options, source: &[u8]) -> Result<Summary> {
        // Every version has been settled by now; a name that still waits is told, not dropped.
        let waiting = std::mem::take(&mut self.waiting);
        for place in waiting.into_values().flat_map(|it| it.names) {
            self.link_to(place, Fate::Failed)?;
        }
        self.progress.set_phase("storing");
        let stored = self.blocks.barrier(true)?;
        self.store(&stored)?;
        drop(stored);
        let run = self.chunks.run();
        for (volume, len) in self.volumes.present().iter().zip(self.blocks.index_lens()) {
            if let Some(len) = len {
                run.put_index_len(volume.config.number, len)?;
            }
        }
        for number in self.blocks.sealed() {
            run.seal_volume(number)?;
        }
        self.progress.set_phase("writing metas");
        let touched =
            Touched { first_version: self.first_version, linked: std::mem::take(&mut self.linked) };
        let mut describing =
            write_metas(&run, self.volumes, self.settings, &touched, options.no_meta)?;
        drop(run);
        // Metas are a further copy of what the catalog, the manifest and the volume index say. A
        // disk that does not take them does not undo a run whose data is stored, but it is told.
        for (volume, error) in std::mem::take(&mut describing.failures) {
            let error = error.context("its metas were not written");
            self.note(Problem::new(volume.as_os_str().as_bytes(), &error));
        }
        let copies = self.note_lacking();
        self.counts.bytes_read = Progress::get(&self.progress.bytes_read);
        // From here on nothing is counted any more: the manifest says what the catalog will say.
        let words = (&*options.tags, &*options.comment);
        let end = RunEnd { words, counts: &self.counts, finished: Time::now() };
        let mut run = self.chunks.run();
        run.spool_problems(&mut self.spool, &self.problems)?;
        let digest =
            write_manifests(&run, self.volumes, &mut self.spool, self.settings.hash, &end)?;
        self.progress.set_phase("committing");
        if let Some(digest) = digest {
            run.keep_manifest(&digest)?;
        }
        let number = run.commit(&self.counts, words, &self.problems, end.finished)?;
        let summary = Summary {
            run: number,
            source: source.to_vec(),
            counts: self.counts,
            problems: self.problems,
            bytes_adopted: 0,
            warnings: Vec::new(),
            copies,
        };
        drop(run);
        describing.commit();
        self.progress.set_phase("done");
        Ok(summary)
    }
}

impl Unchanged {
    /// Counts them.
    pub fn count(self, counts: &mut Counts, progress: &Progress) {
        counts.entries.unchanged += self.entries;
        counts.dirs.unchanged += self.dirs;
        counts.files += self.files;
        counts.bytes += self.bytes;
        Progress::add(&progress.entries, self.entries);
        Progress::add(&progress.bytes, self.bytes);
    }
}

/// Writes the run's manifest to every volume that is there: each alone is enough to know the run.
/// Gives its digest; `None` if there is no volume at all.
fn write_manifests(
    run: &RunWriter<'_>,
    volumes: &Volumes,
    spool: &mut Spool,
    hash: HashAlgo,
    end: &RunEnd<'_>,
) -> Result<Option<Digest>> {
    let name = manifest::document_name(run.run());
    let mut written = None;
    let mut last_error = None;
    for volume in volumes.present() {
        let (mut documents, mut digest) = (volume.documents(), None);
        let result = documents
            .add(&name, |out| {
                digest = Some(run.write_manifest(spool, hash, end, out)?);
                Ok(())
            })
            .and_then(|()| documents.finish());
        match result {
            Ok(()) => written = digest,
            Err(e) => {
                log::warn!("no manifest on volume {}: {e}", quoted(&volume.config.path));
                last_error = Some(e);
            }
        }
    }
    match last_error {
        Some(e) if written.is_none() => Err(e),
        _ => Ok(written),
    }
}
