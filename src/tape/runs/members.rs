//! The members of an archive, from the volumes of a catalog.
//!
//! A block is read whole and hashed before any of it goes to the tape; where a copy is bad, the
//! next one is taken. Its bytes are in memory then as the system has cached them, so reading it
//! twice costs little; it is hashed then too. Of metas and manifests, the first is taken that is
//! whole. A block without its meta could not be made sense of, and does not go.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use parking_lot::Mutex;

use super::{GUIDE, GUIDE_NAME, Kind};
use crate::catalog::health::Health;
use crate::catalog::history::survey;
use crate::catalog::meta_read::read_meta;
use crate::catalog::{Reader, Settings, manifest, meta};
use crate::chunk::{Digest, HashAlgo};
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::progress::Progress;
use crate::sys::{self, Time, c, quoted};
use crate::tape::cpio::{Added, Archive, Header};
use crate::tape::sums::{Sum, Summer};
use crate::volume::{BlockId, BlockIndex, CopyFault, Volume, Volumes, verify_block};

/// Metas of an archive that are remembered until their blocks come.
const METAS_MAX: usize = 1 << 16;
/// Documents of an archive whose digests are remembered until it is noted.
const DIGESTS_MAX: usize = 1 << 16;
/// How much of a document is hashed at once.
const PIECE_BYTES: usize = 1 << 16;

/// What can become members: blocks and documents.
pub struct Members {
    reader: Reader,
    volumes: Volumes,
    settings: Settings,
    health: Health,
    /// The digests and lengths of documents that have gone into an archive.
    digests: Mutex<BTreeMap<Vec<u8>, (Digest, u64)>>,
    /// Blocks whose metas have gone into an archive, and that have not.
    metas: Mutex<BTreeSet<BlockId>>,
}

impl Members {
    /// Opens the catalog and those of its volumes that are there.
    pub fn open(catalog: &Path) -> Result<Members> {
        let reader = Reader::open(catalog)?;
        let mut volumes = Volumes::open(reader.volumes()?);
        if let Some(e) = volumes.take_shortage() {
            return Err(e);
        }
        let (settings, health) = (reader.settings()?, Health::open(catalog));
        let (digests, metas) = (Mutex::default(), Mutex::default());
        Ok(Members { reader, volumes, settings, health, digests, metas })
    }

    pub(super) fn volumes(&self) -> &Volumes {
        &self.volumes
    }

    pub(super) fn reader(&self) -> &Reader {
        &self.reader
    }

    /// The first volume's document of this name that is as it should be.
    fn open_document(&self, name: &[u8]) -> Option<File> {
        let paths = self.volumes.present().iter().map(|it| &it.config.path);
        let mut paths = paths.map(|it| it.join(OsStr::from_bytes(name)));
        paths.find_map(|path| {
            let file = File::open(&path).ok()?;
            match self.prove(name, &path) {
                Ok(()) => Some(file),
                Err(e) => {
                    log::warn!("{} is not archived: {e}", quoted(&path));
                    None
                }
            }
        })
    }

    /// Fails if the document at `path` is one of those that tell of themselves, and is damaged.
    fn prove(&self, name: &[u8], path: &Path) -> Result<()> {
        let is_right = match Kind::of(name) {
            Kind::Meta(id) => read_meta(path, &mut |_| Ok(()))?.id == id,
            Kind::Manifest => {
                let head = survey(path, &|| Ok(()))?.head;
                manifest::document_name(head.run).as_bytes() == name
                    && self.reader.run(head.run)?.uuid == head.uuid
            }
            _ => true,
        };
        if is_right { Ok(()) } else { Err(Error::corrupt("it is another one's")) }
    }

    /// Whether a volume has this document.
    pub(super) fn has(&self, name: &[u8]) -> bool {
        name == GUIDE_NAME || self.open_document(name).is_some()
    }

    /// The digest of a document; `None` if no volume has it as it should be.
    pub(super) fn digest(&self, name: &[u8]) -> Result<Option<Digest>> {
        let Some(mut file) = self.open_document(name) else { return Ok(None) };
        let mut input = Hashed::new(&mut file);
        std::io::copy(&mut input, &mut std::io::sink())
            .map_err(|e| Error::io(format!("reading {}", crate::error::Quoted(name)), e))?;
        Ok(Some(input.finish()))
    }

    /// The digest and the length of the document with this name, if it has this sum.
    pub(super) fn digest_of(&self, name: &[u8], sum: &Sum) -> Result<Option<(Digest, u64)>> {
        let failed = |e| Error::io(format!("reading {}", crate::error::Quoted(name)), e);
        let is_own = name == GUIDE_NAME;
        let paths = self.volumes.present().iter().map(|it| &it.config.path);
        let files = paths.filter_map(|it| File::open(it.join(OsStr::from_bytes(name))).ok());
        let files = files.filter(|_| !is_own).map(|it| Box::new(it) as Box<dyn Read>);
        let own = is_own.then(|| Box::new(GUIDE.as_bytes()) as Box<dyn Read>);
        for mut file in own.into_iter().chain(files) {
            let mut input = Hashed::new(&mut *file);
            let mut summer = Summer::default();
            let (mut buffer, mut len) = (vec![0; PIECE_BYTES], 0);
            loop {
                let read = input.read(&mut buffer).map_err(failed)?;
                if read == 0 {
                    break;
                }
                summer.add(buffer.get(..read).unwrap_or_default());
                len += read as u64;
            }
            if summer.sum() == *sum {
                return Ok(Some((input.finish(), len)));
            }
        }
        Ok(None)
    }

    /// Digests and lengths of the documents that have been added since this was asked last.
    pub(super) fn take_digests(&self) -> BTreeMap<Vec<u8>, (Digest, u64)> {
        std::mem::take(&mut self.digests.lock())
    }

    /// Adds a member to an archive by its name on a volume.
    pub fn add(
        &self,
        archive: &mut Archive<&mut dyn Write>,
        name: &[u8],
        progress: &Progress,
    ) -> Result<Added> {
        match Kind::of(name) {
            Kind::Block(id) => self.add_block(archive, name, &id, progress),
            Kind::Other => Ok(Added::Failed { errno: c::EINVAL }),
            Kind::Guide if name == GUIDE_NAME => {
                let header = Header {
                    mode: c::S_IFREG | 0o600,
                    nlink: 1,
                    size: GUIDE.len() as u64,
                    mtime: Time::now().secs,
                    ..Header::default()
                };
                archive.add(&header, name, &mut GUIDE.as_bytes())
            }
            _ => self.add_document(archive, name, progress),
        }
    }

    fn add_document(
        &self,
        archive: &mut Archive<&mut dyn Write>,
        name: &[u8],
        progress: &Progress,
    ) -> Result<Added> {
        let Some(mut file) = self.open_document(name) else {
            if Kind::of(name) == Kind::Manifest {
                progress.note(&Problem::new(name, &lacks("of this name")));
            }
            return Ok(Added::Failed { errno: c::ENOENT });
        };
        let stat = match sys::fstat(&file) {
            Ok(stat) if stat.is_file() => stat,
            Ok(_) => return Ok(Added::Failed { errno: c::ESTALE }),
            Err(e) => return Ok(Added::Failed { errno: e.raw_os_error().unwrap_or(c::EIO) }),
        };
        let mut input = Hashed::new(&mut file);
        let added = archive.add(&Header::of(&stat), name, &mut input)?;
        match (&added, Kind::of(name)) {
            (Added::Failed { .. }, _) => {}
            (_, Kind::Meta(id)) => {
                let mut metas = self.metas.lock();
                if metas.len() < METAS_MAX {
                    metas.insert(id);
                }
            }
            _ => {
                let mut digests = self.digests.lock();
                if digests.len() < DIGESTS_MAX {
                    digests.insert(name.to_vec(), (input.finish(), stat.size));
                }
            }
        }
        Ok(added)
    }

    fn add_block(
        &self,
        archive: &mut Archive<&mut dyn Write>,
        name: &[u8],
        id: &BlockId,
        progress: &Progress,
    ) -> Result<Added> {
        let failed = |error: Error| -> Result<Added> {
            progress.check()?;
            let problem = Problem::new(format!("block {id}"), &error);
            log::warn!("{problem}");
            progress.note(&problem);
            Ok(Added::Failed { errno: error.errno().unwrap_or(c::EIO) })
        };
        let has_meta = self.metas.lock().remove(id);
        if !has_meta && self.open_document(meta::document_name(id).as_bytes()).is_none() {
            return failed(lacks("for it"));
        }
        let found = self.sound_file(id, progress);
        let (mut file, len) = match found {
            Ok(found) => found,
            Err(e) if e.is_shortage() || e.kind() == ErrorKind::Interrupted => return Err(e),
            Err(e) => return failed(e),
        };
        let mut header = match sys::fstat(&file) {
            Ok(stat) => Header::of(&stat),
            Err(e) => return failed(Error::io(format!("block {id}"), e)),
        };
        header.size = len;
        let mut input = Hashed::with(&mut file, self.settings.hash);
        match archive.add(&header, name, &mut input)? {
            Added::Whole { .. } if input.finish() != *id => failed(Error::corrupt(
                "it was right at first, and is not as it was read for the tape: archive again",
            )),
            added => Ok(added),
        }
    }

    /// A copy of a block that has just been read and is right, and its length.
    fn sound_file(&self, id: &BlockId, progress: &Progress) -> Result<(File, u64)> {
        let number = self.reader.numbers_of(id)?.first().copied().ok_or_else(|| {
            Error::corrupt(format!("block {id} is in the job and not in the catalog"))
        })?;
        let row = self.reader.block(number)?;
        let index = BlockIndex { id: *id, frames: row.frames, chunks: Vec::new() };
        self.volumes.from_copies(&row.volumes, id, |volume| {
            self.check(volume, &index, self.settings.hash, progress)?;
            match volume.store.open(id)? {
                Some(file) => Ok((file, index.stored_len())),
                None => Err(Error::corrupt(format!("block {id} has no file"))),
            }
        })
    }

    fn check(
        &self,
        volume: &Volume,
        index: &BlockIndex,
        hash: HashAlgo,
        progress: &Progress,
    ) -> Result<()> {
        match verify_block(volume, index, hash, &|_| progress.check()) {
            Ok(()) => Ok(()),
            Err(CopyFault::Stopped(e)) => Err(e),
            Err(CopyFault::Source(e) | CopyFault::Target(e)) => {
                let said = e.to_string();
                log::warn!("{}: {said}", quoted(&volume.config.path));
                self.health.note_bad(&volume.config.uuid, &index.id, &said, Time::now());
                Err(e)
            }
        }
    }
}

/// The error for what `of` says, of which no volume has a document as it should be.
fn lacks(of: &str) -> Error {
    let message = format!("no volume has a right meta or manifest {of}");
    Error::corrupt(format!("{message}: make it anew with raidtape genmeta, and archive again"))
}

/// What is read, hashed.
struct Hashed<'a> {
    input: &'a mut dyn Read,
    hasher: crate::chunk::Hasher,
}

impl<'a> Hashed<'a> {
    fn new(input: &'a mut dyn Read) -> Hashed<'a> {
        Hashed::with(input, HashAlgo::Blake3)
    }

    fn with(input: &'a mut dyn Read, hash: HashAlgo) -> Hashed<'a> {
        Hashed { input, hasher: hash.hasher() }
    }

    fn finish(self) -> Digest {
        self.hasher.finish()
    }
}

impl Read for Hashed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = buffer.len().min(PIECE_BYTES);
        let buffer = buffer.get_mut(..len).unwrap_or_default();
        let read = self.input.read(buffer)?;
        self.hasher.update(buffer.get(..read).unwrap_or_default());
        Ok(read)
    }
}
