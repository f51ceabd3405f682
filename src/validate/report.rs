//! What a validation has found, in bounds.

use std::path::PathBuf;

use crate::catalog::health::Known;
use crate::catalog::{DamagedFile, Health, Reader, RunId, VersionId};
use crate::chunk::ChunkId;
use crate::error::{ErrorKind, Result};
use crate::sys::Time;
use crate::volume::BlockId;

/// What to do about a catalog that is damaged.
pub const CATALOG_REMEDY: &str = "the catalog is damaged: raidtape catalog-restore takes the \
    newest good copy of it from the volumes and adds the runs since";

/// Faults that are kept with their texts.
const FAULTS_MAX: usize = 1000;
/// Longest text of a fault, in bytes.
const TEXT_BYTES_MAX: usize = 2000;
/// Bad blocks that are kept.
const BAD_MAX: usize = 10_000;
/// Memory for the names of what is lost, and for chunks.
const NAMES_BYTES_MAX: usize = 16 << 20;
/// Runs that the catalog does not know and that are named.
pub(super) const STRANGERS_MAX: usize = 1000;
/// Files that are waste and named.
const WASTE_MAX: usize = 1000;

/// The first of many, and how many there were.
#[derive(Clone, Debug)]
pub struct Kept<T> {
    /// Those that are kept.
    pub items: Vec<T>,
    /// How many there were.
    pub count: u64,
}

impl<T> Default for Kept<T> {
    fn default() -> Kept<T> {
        Kept { items: Vec::new(), count: 0 }
    }
}

impl<T> Kept<T> {
    fn add(&mut self, item: T, most: usize) {
        self.count += 1;
        if self.items.len() < most {
            self.items.push(item);
        }
    }

    /// Whether there was none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many are not kept.
    pub fn left_out(&self) -> u64 {
        self.count.saturating_sub(self.items.len() as u64)
    }
}

/// The part of a store that a fault is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The catalog.
    Catalog,
    /// A volume as a whole: its manifest, what explains it.
    Volume,
    /// A volume's index.
    Index,
    /// A run's manifest.
    Manifest,
    /// A block's meta.
    Meta,
    /// A copy of the catalog.
    Copy,
}

impl Part {
    /// The word for it in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Part::Catalog => "catalog",
            Part::Volume => "volume",
            Part::Index => "index",
            Part::Manifest => "manifest",
            Part::Meta => "meta",
            Part::Copy => "copy",
        }
    }
}

/// Something that is not what it should be, and is no block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub part: Part,
    /// The volume; empty for the catalog.
    pub volume: PathBuf,
    /// What is wrong; names what it is about.
    pub message: String,
    /// [`ErrorKind::Corrupt`], or why it cannot be looked at.
    pub kind: ErrorKind,
}

impl Fault {
    /// A fault of the catalog.
    pub fn of_catalog(message: String) -> Fault {
        Fault::new(Part::Catalog, PathBuf::new(), message)
    }

    /// A fault of a part of a volume.
    pub fn new(part: Part, volume: PathBuf, message: String) -> Fault {
        Fault { part, volume, message, kind: ErrorKind::Corrupt }
    }
}

/// A run that is on a volume and not in the catalog, of which nobody can say whether it was ever
/// acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stranger {
    /// Its number.
    pub run: RunId,
    /// Its name.
    pub uuid: String,
    /// Name of its source.
    pub source: Vec<u8>,
    /// Its manifest.
    pub path: PathBuf,
}

/// A block copy that is not what it should be.
#[derive(Debug)]
pub struct BadBlock {
    /// The block's name.
    pub id: BlockId,
    /// Path of the volume; empty if no volume has a copy.
    pub volume: PathBuf,
    /// What is wrong.
    pub reason: String,
    /// [`ErrorKind::Corrupt`], or why its volume cannot be used.
    pub kind: ErrorKind,
    /// The chunks that have bytes in what this copy has lost.
    pub chunks: Kept<ChunkId>,
    /// The files whose bytes are lost, in all runs: those of which no other copy has them.
    pub files: Kept<DamagedFile>,
}

/// A file whose content is not what it was, though the blocks are there.
#[derive(Debug)]
pub struct BadFile {
    /// Its version.
    pub version: VersionId,
    /// What is wrong.
    pub reason: String,
    /// What kind of trouble it is.
    pub kind: ErrorKind,
    /// Its names, in all runs.
    pub files: Kept<DamagedFile>,
}

/// A random part of the blocks, the same for the same seed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// How much, in percent.
    pub percent: f64,
    /// Which part.
    pub seed: u64,
}

/// How much of a store was verified since when, in copies of blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Copies there are, on whatever volume.
    pub copies: u64,
    /// Those that were found right at some time, and not found bad since.
    pub verified: u64,
    /// The oldest time at which one of these was last found right.
    pub oldest: Option<Time>,
    /// Those that are known to be bad.
    pub bad: u64,
}

impl Coverage {
    /// What is known of the copies on all volumes of a catalog.
    pub fn of(reader: &Reader, health: &Health) -> Result<Coverage> {
        let mut all = Coverage::default();
        for volume in reader.volumes()? {
            let copies = reader.stored_bytes_of(volume.number)?.blocks;
            let Known { verified, oldest, bad } = health.known(&volume.uuid);
            all.copies += copies;
            // Copies that are gone from the catalog may still be known.
            all.verified += verified.min(copies);
            all.bad += bad.min(copies);
            all.oldest = all.oldest.into_iter().chain(oldest).min();
        }
        Ok(all)
    }

    /// Those that were never verified.
    pub fn never(&self) -> u64 {
        self.copies.saturating_sub(self.verified).saturating_sub(self.bad)
    }
}

/// What a validation found.
#[derive(Debug, Default)]
pub struct Report {
    /// Copies of blocks that were looked at.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Metas and manifests that were looked at.
    pub documents: u64,
    /// Contents of files that were read and compared.
    pub files: u64,
    /// Faults of the catalog and of what lies beside the blocks.
    pub faults: Kept<Fault>,
    /// Blocks that are damaged, missing or out of reach.
    pub bad_blocks: Kept<BadBlock>,
    /// Files whose hash is wrong, where files were read.
    pub bad_files: Kept<BadFile>,
    /// Copies that were found bad before and not looked at again.
    pub known_bad: u64,
    /// Metas, manifests and files that explain a volume which are not up to date, as may be.
    pub due: u64,
    /// What could not be judged, because another process was writing.
    pub unjudged: u64,
    /// Runs that the catalog does not know.
    pub strangers: Kept<Stranger>,
    /// Copies of the catalog of another one: nothing takes them.
    pub foreign_copies: Kept<PathBuf>,
    /// When the catalog was checked last, if its turn had not come again.
    pub catalog_checked: Option<Time>,
    /// Block files that nobody knows, with their lengths.
    pub waste: Kept<(PathBuf, u64)>,
    /// Their bytes.
    pub waste_bytes: u64,
    /// The sample that was taken.
    pub sample: Option<Sample>,
    /// Whether the oldest blocks were looked at first, for a time.
    pub is_timed: bool,
    /// Whether the time was over before everything was looked at.
    pub is_cut_short: bool,
    /// How much was verified since when.
    pub coverage: Coverage,
    /// Copies that were found bad now and noted as that.
    pub(super) bad_now: u64,
    /// Memory that names and chunks take.
    names_bytes: usize,
}

impl Report {
    pub(super) fn of_sample(sample: Option<Sample>) -> Report {
        Report { sample, ..Report::default() }
    }

    /// Whether nothing was found.
    pub fn is_clean(&self) -> bool {
        self.faults.is_empty()
            && self.bad_blocks.is_empty()
            && self.bad_files.is_empty()
            && self.known_bad == 0
    }

    /// The kind that says most about what was found; `None` when nothing was. Damage outranks what
    /// is only out of reach.
    pub fn worst(&self) -> Option<ErrorKind> {
        let kinds = || {
            let blocks = self.bad_blocks.items.iter().map(|it| it.kind);
            let faults = self.faults.items.iter().map(|it| it.kind);
            blocks.chain(faults).chain(self.bad_files.items.iter().map(|it| it.kind))
        };
        if self.known_bad > 0 || kinds().any(|it| it == ErrorKind::Corrupt) {
            return Some(ErrorKind::Corrupt);
        }
        kinds().next()
    }

    /// The blocks that a repair has to look at, each once.
    pub fn suspects(&self) -> Vec<BlockId> {
        let mut suspects: Vec<BlockId> = self.bad_blocks.items.iter().map(|it| it.id).collect();
        suspects.sort_unstable();
        suspects.dedup();
        suspects
    }

    /// What says most about what is still wrong after a repair that has left this. The catalog is
    /// not repaired so.
    pub fn worst_after(&self, left: Option<ErrorKind>) -> Option<ErrorKind> {
        if self.faults_of(Part::Catalog).next().is_some() {
            return Some(ErrorKind::Corrupt);
        }
        let mut away = self.bad_blocks.items.iter().map(|it| it.kind);
        left.or_else(|| away.find(|it| *it != ErrorKind::Corrupt))
    }

    /// The faults of one part.
    pub fn faults_of(&self, part: Part) -> impl Iterator<Item = &Fault> {
        self.faults.items.iter().filter(move |it| it.part == part)
    }

    pub(super) fn add_fault(&mut self, mut fault: Fault) {
        fault.message.truncate(fault.message.floor_char_boundary(TEXT_BYTES_MAX));
        // What is damaged says more than what is out of reach: it must not be crowded out.
        let is_damage = |it: &Fault| it.kind == ErrorKind::Corrupt;
        let is_first_damage = is_damage(&fault) && !self.faults.items.iter().any(is_damage);
        let most = FAULTS_MAX + usize::from(is_first_damage);
        self.faults.add(fault, most);
    }

    pub(super) fn add_bad_block(&mut self, block: BadBlock) {
        let is_damage = |it: &BadBlock| it.kind == ErrorKind::Corrupt;
        let is_first_damage = is_damage(&block) && !self.bad_blocks.items.iter().any(is_damage);
        self.bad_blocks.add(block, BAD_MAX + usize::from(is_first_damage));
    }

    pub(super) fn add_bad_file(&mut self, file: BadFile) {
        self.bad_files.add(file, BAD_MAX);
    }

    pub(super) fn add_stranger(&mut self, stranger: Stranger) {
        self.strangers.add(stranger, STRANGERS_MAX);
    }

    pub(super) fn add_foreign_copy(&mut self, path: PathBuf) {
        self.foreign_copies.add(path, STRANGERS_MAX);
    }

    pub(super) fn add_waste(&mut self, path: PathBuf, bytes: u64) {
        self.waste_bytes += bytes;
        self.waste.add((path, bytes), WASTE_MAX);
    }

    /// Keeps a file if there is room for its names.
    pub(super) fn keep_file(&mut self, kept: &mut Kept<DamagedFile>, file: DamagedFile) {
        let bytes = file.source.len() + file.path.len() + file.runs.len() * 8 + 100;
        self.keep(kept, file, bytes);
    }

    /// Keeps a chunk if there is room for it.
    pub(super) fn keep_chunk(&mut self, kept: &mut Kept<ChunkId>, chunk: ChunkId) {
        self.keep(kept, chunk, size_of::<ChunkId>());
    }

    fn keep<T>(&mut self, kept: &mut Kept<T>, item: T, bytes: usize) {
        let is_room = self.names_bytes + bytes <= NAMES_BYTES_MAX;
        self.names_bytes += if is_room { bytes } else { 0 };
        kept.add(item, if is_room { usize::MAX } else { 0 });
    }

    pub(super) fn sort(&mut self) {
        let key = |it: &Fault| (it.part, it.volume.clone(), it.message.clone());
        self.faults.items.sort_by_cached_key(key);
        self.bad_blocks.items.sort_by(|a, b| (a.id, &a.volume).cmp(&(b.id, &b.volume)));
        self.bad_blocks.items.iter_mut().for_each(|it| it.files.items.sort());
        self.bad_files.items.sort_by_key(|it| it.version);
        self.waste.items.sort();
        self.foreign_copies.items.sort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_counted() {
        let mut report = Report::default();
        let mut files = Kept::default();
        let file = |n: u8| DamagedFile { source: vec![], path: vec![n; 1 << 20], runs: vec![1] };
        (0..20).for_each(|n| report.keep_file(&mut files, file(n)));
        assert_eq!((files.items.len(), files.count, files.left_out()), (15, 20, 5));
        for _ in 0..FAULTS_MAX + 7 {
            let mut fault = Fault::of_catalog("x".repeat(TEXT_BYTES_MAX + 1));
            fault.kind = ErrorKind::Offline;
            report.add_fault(fault);
        }
        assert_eq!(report.worst(), Some(ErrorKind::Offline));
        report.add_fault(Fault::of_catalog("damage".to_owned()));
        assert_eq!(report.worst(), Some(ErrorKind::Corrupt));
        assert_eq!(report.faults.count, FAULTS_MAX as u64 + 8);
        assert_eq!(report.faults.items.len(), FAULTS_MAX + 1);
    }
}
