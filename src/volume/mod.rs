#![doc = include_str!("FORMAT.md")]

pub mod block;
mod copies;
mod described;
mod faults;
mod guide;
mod manifest;
mod mend;
pub mod store;
mod writer;

pub use block::{BlockId, BlockIndex, Record};
pub use copies::{CopyFault, CopyJob, Lacking, copy_block, verify_block};
pub use described::Described;
pub use faults::Faults;
pub use manifest::{Facts, VolumeManifest};
pub use mend::{IndexMender, prove};
pub use writer::{Batch, CopyAt, OpenBlock, Place, Stored, Writer};

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::RecordReader;
use store::{BlockStore, DirStore};

use crate::chunk::HashAlgo;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, c, quoted};

/// Whether a volume takes new blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Takes new blocks.
    Active,
    /// Reached its reserve: read only.
    Sealed,
    /// Not found where it should be.
    Missing,
}

impl Status {
    /// The word for it in manifest, catalog and listings.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Active => "active",
            Status::Sealed => "sealed",
            Status::Missing => "missing",
        }
    }
}

impl std::str::FromStr for Status {
    type Err = Error;

    fn from_str(word: &str) -> Result<Status> {
        match word {
            "active" => Ok(Status::Active),
            "sealed" => Ok(Status::Sealed),
            "missing" => Ok(Status::Missing),
            _ => Err(Error::corrupt(format!("unknown volume status {word:?}"))),
        }
    }
}

/// What the catalog knows of a volume.
#[derive(Clone, Debug)]
pub struct VolumeConfig {
    /// Its number in the catalog.
    pub number: i64,
    /// Its own name, which it keeps wherever it is mounted.
    pub uuid: String,
    /// Its directory.
    pub path: PathBuf,
    /// Whether it takes new blocks.
    pub status: Status,
    /// Part of its file system that is left free, in percent.
    pub reserve_percent: u8,
}

/// A volume that is there, with the store of its blocks.
#[derive(Clone)]
pub struct Volume {
    /// What the catalog knows of it.
    pub config: VolumeConfig,
    /// Its blocks.
    pub store: Arc<dyn BlockStore>,
}

/// Name of the volume index.
const INDEX_NAME: &str = ".rt_volume_index";

impl Volume {
    /// Makes a volume of directory `path` (created when missing), which must not be one yet.
    ///
    /// It is one when its manifest has its name, and that it gets after `register` has noted the
    /// volume for good: whoever opens a volume that is known and has only a prepared manifest
    /// finishes what was begun. So nothing is left that is neither in the catalog nor free.
    pub fn create(
        path: &Path,
        config: &VolumeConfig,
        hash: HashAlgo,
        facts: Facts,
        register: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let failed = |e| Error::io(format!("creating volume {}", quoted(path)), e);
        sys::make_private_dirs(path).map_err(failed)?;
        if manifest::path_in(path).exists() {
            let message = format!("{} is a volume already", quoted(path));
            return Err(Error::usage(message));
        }
        for dir in ["chunks", "meta", "manifests", "tmp"] {
            sys::make_private_dir(&path.join(dir)).map_err(failed)?;
        }
        guide::refresh(path)?;
        Described::nothing().write(path)?;
        sys::replace_file(&path.join(INDEX_NAME), b"")?;
        VolumeManifest { facts: Some(facts), ..VolumeManifest::of(config, hash) }.prepare(path)?;
        register()?;
        VolumeManifest::settle(path)
    }

    /// Finishes what [`Volume::create`] has begun for a volume that is known; `false` if there is
    /// nothing to finish.
    pub fn finish(config: &VolumeConfig) -> Result<bool> {
        let prepared = VolumeManifest::prepared(&config.path);
        let is_due = prepared.is_some_and(|it| it.uuid == config.uuid);
        if is_due {
            VolumeManifest::settle(&config.path)?;
        }
        Ok(is_due)
    }

    /// Opens the volume, checking that what lies at its path is really it.
    pub fn open(config: VolumeConfig) -> Result<Volume> {
        Volume::finish(&config)?;
        let manifest = VolumeManifest::read(&config.path)?;
        if manifest.uuid != config.uuid {
            let message = format!(
                "{} holds another volume ({} instead of {})",
                quoted(&config.path),
                manifest.uuid,
                config.uuid
            );
            return Err(Error::new(ErrorKind::Offline, message));
        }
        let store = Arc::new(DirStore::new(config.path.clone()));
        Ok(Volume { config, store })
    }

    /// Writes the status into the volume's own manifest.
    pub fn set_status(&self, status: Status) -> Result<()> {
        let mut manifest = VolumeManifest::read(&self.config.path)?;
        manifest.status = status;
        manifest.write(&self.config.path)
    }

    /// Brings what explains the volume to people up to date. Only for who holds the writer's lock.
    /// A failure is told and no more: it costs no data, and the next writer tries again.
    pub fn refresh_guide(&self) {
        if let Err(e) = guide::refresh(&self.config.path) {
            log::warn!("{e}: how to restore without this program may not be said there");
        }
    }

    /// Brings up to date what the volume says of itself: what its catalog says. Only for who holds
    /// the writer's lock.
    pub fn refresh_manifest(&self, facts: Facts) -> Result<()> {
        let path = &self.config.path;
        let old = VolumeManifest::read(path)?;
        let mut new = old.clone();
        // It is here: that it was missed is the catalog's business.
        if self.config.status != Status::Missing {
            new.status = self.config.status;
        }
        new.reserve_percent = self.config.reserve_percent;
        new.facts = Some(facts);
        if new == old { Ok(()) } else { new.write(path) }
    }

    /// The files that explain the volume to people and are not what they should be, by name, and
    /// whether each is damaged rather than missing or older.
    pub fn guide_faults(&self) -> Vec<(&'static str, bool)> {
        guide::faults(&self.config.path)
    }

    /// Removes what a killed writer left half written. Only for who holds the writer's lock.
    pub fn clear_pending(&self) -> Result<()> {
        DirStore::new(self.config.path.clone()).clear_pending()
    }

    /// The index records from byte `offset` on.
    pub fn index_from(&self, offset: u64) -> Result<RecordReader<File>> {
        let path = self.config.path.join(INDEX_NAME);
        let failed = |e| self.index_failed("reading", e);
        let mut file = File::open(&path).map_err(failed)?;
        file.seek(SeekFrom::Start(offset)).map_err(failed)?;
        Ok(RecordReader::new(file, offset))
    }

    /// How long the index is, in bytes.
    pub fn index_len(&self) -> Result<u64> {
        let path = self.config.path.join(INDEX_NAME);
        let failed = |e| self.index_failed("looking at", e);
        Ok(path.metadata().map_err(failed)?.len())
    }

    /// Makes durable what the index holds now, and checks that it is not shorter than `known`
    /// bytes, which is what somebody has counted on.
    pub fn settle_index(&self, known: u64) -> Result<()> {
        let path = self.config.path.join(INDEX_NAME);
        let failed = |e| self.index_failed("opening", e);
        let file = File::open(&path).map_err(failed)?;
        let len = file.metadata().map_err(failed)?.len();
        if len < known {
            let message = format!(
                "volume index {} is {len} bytes long instead of {known}: it has lost records, \
                 which raidtape validate --repair gives it back",
                quoted(&path)
            );
            return Err(Error::corrupt(message));
        }
        file.sync_all().map_err(|e| {
            self.cut_index(known);
            failed(e)
        })
    }

    fn index_failed(&self, doing: &str, error: std::io::Error) -> Error {
        let path = self.config.path.join(INDEX_NAME);
        let is_gone = error.kind() == std::io::ErrorKind::NotFound
            && manifest::path_in(&self.config.path).exists();
        let hint = if is_gone { ", which raidtape validate --repair makes anew" } else { "" };
        Error::io(format!("{doing} the volume index {}{hint}", quoted(&path)), error)
    }

    /// Takes back what follows the first `valid` bytes of the index. A sync that failed may have
    /// forgotten it, though it can be read and a further sync says nothing: so nobody must count on
    /// it.
    fn cut_index(&self, valid: u64) {
        let file = File::options().write(true).open(self.config.path.join(INDEX_NAME));
        // A disk that does not do this either has its error told already.
        let _ = file.and_then(|it| it.set_len(valid));
    }

    /// The index record that begins at byte `record_at`.
    pub fn index_record(&self, record_at: u64) -> Result<BlockIndex> {
        let record = self.index_from(record_at)?.next_record()?;
        record.map(|it| it.index).ok_or_else(|| {
            let at = quoted(&self.config.path);
            Error::corrupt(format!("volume index of {at} has no record at byte {record_at}"))
        })
    }

    /// Bytes that it takes until its reserve is reached.
    pub fn room(&self) -> Result<u64> {
        let space = self.store.space()?;
        let reserve = space.total_bytes / 100 * u64::from(self.config.reserve_percent);
        let kept = reserve.saturating_add(writer::ROOM_BYTES);
        Ok(space.free_bytes.saturating_sub(kept))
    }

    /// The device of its file system; `None` if nobody can tell.
    pub fn device(&self) -> Option<u64> {
        sys::stat(&self.config.path).ok().map(|it| it.dev)
    }

    /// Starts writing documents (metas, manifests).
    pub fn documents(&self) -> Documents<'_> {
        Documents { volume: self, written: Vec::new() }
    }

    /// Where a document lies; `name` is relative to the volume.
    pub fn document_path(&self, name: &str) -> PathBuf {
        self.config.path.join(name)
    }

    /// Makes a folder for documents, if it is missing.
    pub fn make_folder(&self, name: &str) -> Result<()> {
        let path = self.config.path.join(name);
        let failed = |e| Error::io(format!("creating {}", quoted(&path)), e);
        match sys::make_private_dir(&path).map_err(failed)? {
            true => sys::sync_dir(&self.config.path),
            false => Ok(()),
        }
    }

    /// Removes a document, if it is there.
    pub fn remove_document(&self, name: &str) -> Result<()> {
        let path = self.document_path(name);
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("removing {}", quoted(&path)), e))
            }
            _ => Ok(()),
        }
    }

    /// Gives the file of a block a second name in `damaged/`, if it is there: what replaces it then
    /// takes nothing away.
    pub fn keep_damaged(&self, id: &BlockId) -> Result<()> {
        let path = DirStore::new(self.config.path.clone()).path_of(id);
        let dir = self.config.path.join("damaged");
        let failed = |e| Error::io(format!("keeping {} in {}", quoted(&path), quoted(&dir)), e);
        sys::make_private_dir(&dir).map_err(failed)?;
        let now = sys::Time::now();
        let kept = dir.join(format!("{id}-{}.{:09}", now.secs, now.nanos));
        match std::fs::hard_link(&path, &kept) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(failed(e)),
            Ok(()) => sys::sync_dir(&dir).and_then(|()| sys::sync_dir(&self.config.path)),
        }
    }

    /// Replaces the whole index by what `fill` writes.
    pub fn replace_index(&self, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
        let mut documents = self.documents();
        documents.add(INDEX_NAME, fill)?;
        documents.finish()
    }

    /// Appends records after the first `valid` bytes of the index (what follows them is a torn
    /// record) and makes them durable; gives the new length.
    fn append_index(&self, valid: u64, records: &[u8]) -> Result<u64> {
        self.settle_index(valid)?;
        let path = self.config.path.join(INDEX_NAME);
        let append = || -> std::io::Result<u64> {
            let mut file = File::options().write(true).open(&path)?;
            if file.metadata()?.len() != valid {
                file.set_len(valid)?;
            }
            file.seek(SeekFrom::Start(valid))?;
            file.write_all(records)?;
            file.sync_all()?;
            Ok(valid + records.len() as u64)
        };
        append().map_err(|e| {
            self.cut_index(valid);
            Error::io(format!("writing {}", quoted(&path)), e)
        })
    }
}

/// Documents being written to a volume together: they get their names when all are synced.
pub struct Documents<'a> {
    volume: &'a Volume,
    written: Vec<(PathBuf, PathBuf)>,
}

/// Documents that wait for their names at most: each costs a path or two of memory.
const DOCUMENTS_WAITING_MAX: usize = 1024;

impl Documents<'_> {
    /// Writes a document; `name` is relative to the volume, as in `meta/x.json`. Makes its folder,
    /// should somebody have removed it.
    pub fn add(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut dyn Write) -> Result<()>,
    ) -> Result<()> {
        let path = self.volume.document_path(name);
        let mut new = path.clone().into_os_string();
        new.push(".new");
        let new = PathBuf::from(new);
        let failed = |e| Error::io(format!("writing {}", quoted(&new)), e);
        let mut options = sys::private_file();
        options.write(true).create(true).truncate(true);
        let file = match (options.open(&new), name.rsplit_once('/')) {
            (Err(e), Some((folder, _))) if e.kind() == std::io::ErrorKind::NotFound => {
                self.volume.make_folder(folder)?;
                options.open(&new)
            }
            (result, _) => result,
        };
        let file = file.map_err(failed)?;
        self.written.push((new.clone(), path));
        let mut out = std::io::BufWriter::with_capacity(1 << 16, file);
        fill(&mut out)?;
        let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
        sys::start_writeback(&file, 0, 0);
        match self.written.len() {
            DOCUMENTS_WAITING_MAX => self.name_all(),
            _ => Ok(()),
        }
    }

    /// Makes all documents durable under their names.
    pub fn finish(mut self) -> Result<()> {
        self.name_all()
    }

    fn name_all(&mut self) -> Result<()> {
        let mut dirs = std::collections::BTreeSet::new();
        // A folder may have been made by a process that died before it had synced that.
        dirs.extend(self.written.first().map(|_| self.volume.config.path.clone()));
        for (new, path) in &self.written {
            let sync = || File::open(new)?.sync_all();
            sync().map_err(|e| Error::io(format!("syncing {}", quoted(new)), e))?;
            dirs.extend(path.parent().map(Path::to_path_buf));
        }
        for (new, path) in self.written.drain(..) {
            std::fs::rename(&new, &path)
                .map_err(|e| Error::io(format!("renaming {}", quoted(&new)), e))?;
        }
        dirs.iter().try_for_each(|dir| sys::sync_dir(dir))
    }
}

impl Drop for Documents<'_> {
    fn drop(&mut self) {
        for (new, _) in &self.written {
            // Not finished, so never named; a stray that stays is overwritten by the next writer.
            let _ = std::fs::remove_file(new);
        }
    }
}

/// All volumes of a catalog: those that are there and those that are not.
pub struct Volumes {
    present: Vec<Volume>,
    missing: Vec<(VolumeConfig, Error)>,
    faults: Option<Arc<Faults>>,
}

impl Volumes {
    /// Opens what can be opened; a volume that is not there is noted, not an error.
    pub fn open(configs: Vec<VolumeConfig>) -> Volumes {
        Volumes::with_stores(Vec::new()).open_missing(configs)
    }

    /// The same, but what is open already stays as it is, and its disk is not asked.
    pub fn open_missing(&self, configs: Vec<VolumeConfig>) -> Volumes {
        let mut volumes = Volumes::with_stores(Vec::new());
        volumes.faults.clone_from(&self.faults);
        for config in configs {
            let open = self.get(config.number).filter(|it| it.config.uuid == config.uuid);
            match open.map_or_else(|| Volume::open(config.clone()), |it| Ok(it.clone())) {
                Ok(volume) => volumes.present.push(volume),
                Err(error) => volumes.missing.push((config, error)),
            }
        }
        volumes
    }

    /// Volumes with stores of the caller's making.
    pub fn with_stores(present: Vec<Volume>) -> Volumes {
        Volumes { present, missing: Vec::new(), faults: None }
    }

    /// The same, but copies that are found bad are told to `faults`, and asked last from then on.
    #[must_use]
    pub fn with_faults(mut self, faults: Arc<Faults>) -> Volumes {
        self.faults = Some(faults);
        self
    }

    /// The volumes that are there, in the catalog's order.
    pub fn present(&self) -> &[Volume] {
        &self.present
    }

    /// The volumes that are not there, each with the reason.
    pub fn missing(&self) -> &[(VolumeConfig, Error)] {
        &self.missing
    }

    /// Why a volume could not be looked at, where that is no fault of it: this machine had no room
    /// in its memory, or for another open file.
    pub fn take_shortage(&mut self) -> Option<Error> {
        let at = self.missing.iter().position(|it| it.1.is_shortage())?;
        Some(self.missing.swap_remove(at).1)
    }

    /// The volume with this number in the catalog.
    pub fn get(&self, number: i64) -> Option<&Volume> {
        self.present.iter().find(|it| it.config.number == number)
    }

    /// Calls `read` with the volumes of `numbers` that are there, until one of them gives what is
    /// wanted of block `id`. The error names the block, and the volume that is not there.
    pub fn from_copies<T>(
        &self,
        numbers: &[i64],
        id: &BlockId,
        mut read: impl FnMut(&Volume) -> Result<T>,
    ) -> Result<T> {
        let mut failed: Option<Error> = None;
        let mut offline = None;
        let is_bad = |it: &i64| self.faults.as_ref().is_some_and(|all| all.has(*it, id));
        // A copy that is known to be bad in one place may be the one that is good in another.
        let good = numbers.iter().filter(|it| !is_bad(it));
        for number in good.chain(numbers.iter().filter(|it| is_bad(it))) {
            let Some(volume) = self.get(*number) else {
                offline = offline.or_else(|| self.why_missing(*number, id));
                continue;
            };
            if let Some(e) = &failed {
                log::debug!("{e}: reading the copy at {}", quoted(&volume.config.path));
            }
            let mut result = read(volume);
            if let Err(e) = &result {
                // The file that is open may be a damaged one that somebody has replaced. What the
                // disk cannot read it is not asked for twice: each time may take it minutes.
                let is_another = volume.store.forget(id);
                if is_another || e.errno() != Some(c::EIO) {
                    result = read(volume);
                }
            }
            match result {
                Ok(it) => return Ok(it),
                // No copy is any worse for that, and the next one could not be read either.
                Err(e) if e.is_shortage() => return Err(e.context(quoted(&volume.config.path))),
                Err(e) => {
                    let e = e.context(quoted(&volume.config.path));
                    if let Some(faults) = &self.faults {
                        faults.found(volume, id, &e);
                    }
                    failed = Some(e);
                }
            }
        }
        Err(failed.or(offline).unwrap_or_else(|| self.why_none(&[], id)))
    }

    /// The error for a block of which no volume of `numbers` is there.
    pub fn why_none(&self, numbers: &[i64], id: &BlockId) -> Error {
        let offline = numbers.iter().find_map(|it| self.why_missing(*it, id));
        let unknown = || match self.missing.first() {
            None => Error::corrupt(format!("block {id} is on no known volume")),
            Some((config, _)) => {
                let path = quoted(&config.path);
                let message = format!("block {id} is on no volume that is here; {path} is missing");
                Error::new(ErrorKind::Offline, message)
            }
        };
        offline.unwrap_or_else(unknown)
    }

    /// The first volume of `numbers` that is there.
    pub fn first_present(&self, numbers: &[i64]) -> Option<&Volume> {
        numbers.iter().find_map(|number| self.get(*number))
    }

    /// The paths of volumes that share a file system, which fails as a whole; each group has two at
    /// least.
    pub fn on_one_device(&self) -> Vec<Vec<PathBuf>> {
        let mut devices: std::collections::BTreeMap<u64, Vec<PathBuf>> = Default::default();
        for volume in &self.present {
            if let Some(device) = volume.device() {
                devices.entry(device).or_default().push(volume.config.path.clone());
            }
        }
        devices.into_values().filter(|it| it.len() > 1).collect()
    }

    fn why_missing(&self, number: i64, id: &BlockId) -> Option<Error> {
        let (config, reason) = self.missing.iter().find(|it| it.0.number == number)?;
        let message = format!(
            "block {id} is on volume {} at {}, which is not there ({reason}): mount it, or say \
             where it is now with volumes --readopt PATH",
            config.uuid,
            quoted(&config.path)
        );
        let kind = if reason.is_shortage() { ErrorKind::Io } else { ErrorKind::Offline };
        Some(Error::new(kind, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{Space, c};

    /// A store of which is known only whether a block's file has been replaced.
    struct Replaced(bool);

    impl BlockStore for Replaced {
        fn begin(&self) -> Result<Box<dyn store::PendingBlock>> {
            unreachable!()
        }
        fn publish(&self, _: Vec<(Box<dyn store::PendingBlock>, BlockId)>) -> Result<()> {
            unreachable!()
        }
        fn read_at(&self, _: &BlockId, _: u64, _: &mut [u8]) -> Result<()> {
            unreachable!()
        }
        fn len_of(&self, _: &BlockId) -> Result<Option<u64>> {
            unreachable!()
        }
        fn list(&self, _: &mut dyn FnMut(BlockId, u64)) -> Result<()> {
            unreachable!()
        }
        fn remove(&self, _: &BlockId) -> Result<()> {
            unreachable!()
        }
        fn space(&self) -> Result<Space> {
            unreachable!()
        }
        fn make_last(&self, _: &BlockId) -> Result<()> {
            unreachable!()
        }
        fn forget(&self, _: &BlockId) -> bool {
            self.0
        }
    }

    #[test]
    fn a_disk_that_cannot_read_is_asked_once_and_the_next_copy_then() {
        let eio = || {
            let e = std::io::Error::from_raw_os_error(c::EIO);
            Error::with_source(ErrorKind::Corrupt, "reading", e).context("a block")
        };
        let mismatch = || Error::corrupt("frame does not match its check");
        let id = crate::chunk::Digest([7; 32]);
        for (is_eio, replaced, asked) in [
            (true, false, &[1, 2][..]),
            (true, true, &[1, 1, 2, 2]),
            (false, false, &[1, 1, 2, 2]),
            (false, true, &[1, 1, 2, 2]),
        ] {
            let volume = |number: i64| {
                let config = VolumeConfig {
                    number,
                    uuid: number.to_string(),
                    path: format!("/volume {number}").into(),
                    status: Status::Active,
                    reserve_percent: 0,
                };
                Volume { config, store: Arc::new(Replaced(replaced)) }
            };
            let volumes = Volumes::with_stores(vec![volume(1), volume(2)]);
            let mut order = Vec::new();
            let result: Result<()> = volumes.from_copies(&[1, 2], &id, |it| {
                order.push(it.config.number);
                Err(if is_eio { eio() } else { mismatch() })
            });
            assert_eq!(order, asked);
            assert!(result.unwrap_err().to_string().contains("/volume 2"));
        }
    }

    #[test]
    fn a_store_knows_a_block_that_was_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirStore::new(dir.path().to_path_buf());
        let id = crate::chunk::Digest([7; 32]);
        let path = store.path_of(&id);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let read = || {
            let mut byte = [0];
            store.read_at(&id, 0, &mut byte).map(|()| byte[0])
        };
        std::fs::write(&path, b"1").unwrap();
        assert!(!store.forget(&id));
        assert_eq!(read().unwrap(), b'1');
        assert!(!store.forget(&id));
        assert_eq!(read().unwrap(), b'1');
        let new = dir.path().join("new");
        std::fs::write(&new, b"2").unwrap();
        std::fs::rename(&new, &path).unwrap();
        assert!(store.forget(&id) && !store.forget(&id));
        assert_eq!(read().unwrap(), b'2');
        std::fs::remove_file(&path).unwrap();
        assert!(!store.forget(&id));
    }
}
