//! The seam between volumes and what holds their blocks: a directory, or in tests a simulated disk.
//!
//! The operations are those of an object store. A block appears under its name only by
//! [`BlockStore::publish`], which returns when bytes and name are durable; before that it is a
//! pending block that a crash may leave as a stray file in `tmp/`, nothing else.

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lru::LruCache;
use parking_lot::Mutex;

use super::block::BlockId;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, Space, c, quoted};

/// Holds blocks under their names.
pub trait BlockStore: Send + Sync {
    /// Starts a block whose name is not known yet.
    fn begin(&self) -> Result<Box<dyn PendingBlock>>;
    /// Makes finished blocks durable and gives them their names; on return all of them last.
    fn publish(&self, blocks: Vec<(Box<dyn PendingBlock>, BlockId)>) -> Result<()>;
    /// Fills `buf` from `offset` of a block; a short block is damage.
    fn read_at(&self, id: &BlockId, offset: u64, buf: &mut [u8]) -> Result<()>;
    /// Length of a block in bytes, or `None` when it is not there.
    fn len_of(&self, id: &BlockId) -> Result<Option<u64>>;
    /// Calls `each` with the name and length of every block.
    fn list(&self, each: &mut dyn FnMut(BlockId, u64)) -> Result<()>;
    /// Removes a block; one that is not there is fine.
    fn remove(&self, id: &BlockId) -> Result<()>;
    /// Free and total space.
    fn space(&self) -> Result<Space>;
    /// Makes a block durable that is there: who put it there may have died before he came to it.
    fn make_last(&self, id: &BlockId) -> Result<()>;
    /// What was read of a block was wrong: its file may since be another, put back by somebody.
    /// `true` if it is, so that reading it again is another matter.
    fn forget(&self, _id: &BlockId) -> bool {
        false
    }
    /// Says that a range of a block will be read soon. Advice only.
    fn will_need(&self, _id: &BlockId, _offset: u64, _len: u64) {}
    /// Opens a block for others to read on their own; `None` where that cannot be had.
    fn open(&self, _id: &BlockId) -> Result<Option<File>> {
        Ok(None)
    }
    /// Makes a range of `dest` share a range of a block's bytes instead of copying them; `false`
    /// where that cannot be had.
    fn clone_range(&self, _range: &BlockRange<'_>, _dest: &File, _dest_offset: u64) -> Cloned {
        Cloned::Never
    }
}

/// A range of a block's bytes.
pub struct BlockRange<'a> {
    /// The block.
    pub id: &'a BlockId,
    /// Where in it.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// What came of the wish to share a block's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cloned {
    /// They are shared.
    Done,
    /// Not these ones.
    NotHere,
    /// No others either: the file system cannot do it, or there are two of them.
    Never,
}

/// A block being written.
pub trait PendingBlock: Send {
    /// Appends all of `bytes`, or on failure none of them.
    fn append(&mut self, bytes: &[u8]) -> Result<()>;
    /// The place it is written at, for the store that made it.
    fn as_any(&mut self) -> &mut dyn std::any::Any;
}

/// Open block files that are kept for reading.
const OPEN_FILES_MAX: usize = 64;

/// A block store in a directory: `chunks/xx/yy/<hash>`, where xx and yy are the name's first four
/// hex digits, and `tmp/` for what is being written.
pub struct DirStore {
    root: PathBuf,
    next_tmp: AtomicU64,
    open: Mutex<LruCache<BlockId, Arc<File>>>,
    /// Directories of `chunks` whose names are known to last, by the digits that they stand for: at
    /// most 65,793 of two numbers each.
    lasting: Mutex<HashSet<(u8, u32)>>,
}

impl DirStore {
    /// The store below `root`, a volume's directory.
    pub fn new(root: PathBuf) -> DirStore {
        let capacity = std::num::NonZeroUsize::new(OPEN_FILES_MAX);
        let open = capacity.map_or_else(LruCache::unbounded, LruCache::new);
        let lasting = Mutex::default();
        DirStore { root, next_tmp: AtomicU64::new(0), open: Mutex::new(open), lasting }
    }

    /// Makes `chunks/xx/yy` for a block, and notes the directories that have to be synced for its
    /// name to last. Not only where one is new: a process that was killed may have made it, and
    /// not have come to sync it.
    fn make_dirs(&self, id: &BlockId, dirs: &mut BTreeSet<PathBuf>) -> Result<Vec<(u8, u32)>> {
        let (path, mut parent) = (self.path_of(id), self.root.clone());
        let below = path.parent().and_then(|it| it.strip_prefix(&self.root).ok());
        let [xx, yy, ..] = id.0;
        let keys = [(0, 0), (1, xx.into()), (2, u32::from(xx) << 8 | u32::from(yy))];
        let mut new = Vec::new();
        for (part, key) in below.into_iter().flatten().zip(keys) {
            let dir = parent.join(part);
            let made = sys::make_private_dir(&dir)
                .map_err(|e| Error::io(format!("creating {}", quoted(&dir)), e))?;
            if made || !self.lasting.lock().contains(&key) {
                dirs.insert(parent);
                new.push(key);
            }
            parent = dir;
        }
        dirs.insert(parent);
        Ok(new)
    }

    /// Where a block lies.
    pub fn path_of(&self, id: &BlockId) -> PathBuf {
        let hex = id.to_string();
        let (xx, yy) = (hex.get(..2).unwrap_or_default(), hex.get(2..4).unwrap_or_default());
        self.root.join("chunks").join(xx).join(yy).join(&hex)
    }

    /// Removes what a writer that was killed left half written. Only for who holds the lock.
    pub fn clear_pending(&self) -> Result<()> {
        let tmp = self.root.join("tmp");
        let failed = |e| Error::io(format!("clearing {}", quoted(&tmp)), e);
        let entries = match std::fs::read_dir(&tmp) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(failed(e)),
        };
        for entry in entries {
            std::fs::remove_file(entry.map_err(failed)?.path()).map_err(failed)?;
        }
        Ok(())
    }

    fn file(&self, id: &BlockId) -> Result<Arc<File>> {
        if let Some(file) = self.open.lock().get(id) {
            return Ok(file.clone());
        }
        let file = Arc::new(self.open_file(id)?);
        self.open.lock().put(*id, file.clone());
        Ok(file)
    }

    fn open_file(&self, id: &BlockId) -> Result<File> {
        let path = self.path_of(id);
        File::open(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => {
                Error::corrupt(format!("block {id} is missing from {}", quoted(&self.root)))
            }
            _ => Error::io(format!("opening block {}", quoted(&path)), e),
        })
    }
}

struct PendingFile {
    file: File,
    path: PathBuf,
    len: u64,
    kept: bool,
}

impl PendingBlock for PendingFile {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if let Err(e) = self.file.write_all_at(bytes, self.len) {
            // What was written of it must not count as part of the block.
            let error = Error::io(format!("writing {}", quoted(&self.path)), e);
            self.file
                .set_len(self.len)
                .map_err(|e| Error::io(format!("truncating {}", quoted(&self.path)), e))?;
            return Err(error);
        }
        sys::start_writeback(&self.file, self.len, bytes.len() as u64);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn as_any(&mut self) -> &mut dyn std::any::Any {
        self
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if !self.kept {
            // A run that fails leaves no strays; what cannot be removed goes at the next start.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl BlockStore for DirStore {
    fn begin(&self) -> Result<Box<dyn PendingBlock>> {
        let tmp = self.root.join("tmp");
        let number = self.next_tmp.fetch_add(1, Ordering::Relaxed);
        let path = tmp.join(format!("{}-{number}.part", std::process::id()));
        let create = || {
            sys::make_private_dir(&tmp)?;
            sys::private_file().read(true).write(true).create_new(true).open(&path)
        };
        let file = create().map_err(|e| Error::io(format!("creating {}", quoted(&path)), e))?;
        Ok(Box::new(PendingFile { file, path, len: 0, kept: false }))
    }

    fn publish(&self, mut blocks: Vec<(Box<dyn PendingBlock>, BlockId)>) -> Result<()> {
        let (mut dirs, mut lasting) = (BTreeSet::new(), Vec::new());
        for (block, id) in &mut blocks {
            let Some(pending) = block.as_any().downcast_mut::<PendingFile>() else {
                return Err(Error::usage("a pending block of another store"));
            };
            let what = |path: &Path| format!("storing block {}", quoted(path));
            pending.file.sync_all().map_err(|e| Error::io(what(&pending.path), e))?;
            lasting.extend(self.make_dirs(id, &mut dirs)?);
            let path = self.path_of(id);
            std::fs::rename(&pending.path, &path).map_err(|e| Error::io(what(&path), e))?;
            pending.kept = true;
        }
        // Deepest first is not needed: all are synced before anybody is told.
        dirs.iter().try_for_each(|dir| sys::sync_dir(dir))?;
        self.lasting.lock().extend(lasting);
        Ok(())
    }

    fn read_at(&self, id: &BlockId, offset: u64, buf: &mut [u8]) -> Result<()> {
        let file = self.file(id)?;
        file.read_exact_at(buf, offset).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => Error::corrupt(format!("block {id} is too short")),
            _ => Error::with_source(ErrorKind::Corrupt, format!("reading block {id}"), e),
        })
    }

    fn len_of(&self, id: &BlockId) -> Result<Option<u64>> {
        let path = self.path_of(id);
        match std::fs::symlink_metadata(&path) {
            Ok(it) if it.is_file() => Ok(Some(it.len())),
            Ok(_) => Err(Error::corrupt(format!("{} is not a file", quoted(&path)))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(format!("looking at {}", quoted(&path)), e)),
        }
    }

    fn list(&self, each: &mut dyn FnMut(BlockId, u64)) -> Result<()> {
        let chunks = self.root.join("chunks");
        let failed = |e| Error::io(format!("listing {}", quoted(&chunks)), e);
        for xx in std::fs::read_dir(&chunks).map_err(failed)? {
            let xx = xx.map_err(failed)?.path();
            for yy in std::fs::read_dir(xx).map_err(failed)? {
                for file in std::fs::read_dir(yy.map_err(failed)?.path()).map_err(failed)? {
                    let file = file.map_err(failed)?;
                    let name = file.file_name();
                    if let Some(Ok(id)) = name.to_str().map(str::parse) {
                        each(id, file.metadata().map_err(failed)?.len());
                    }
                }
            }
        }
        Ok(())
    }

    fn remove(&self, id: &BlockId) -> Result<()> {
        self.open.lock().pop(id);
        match std::fs::remove_file(self.path_of(id)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io(format!("removing block {id}"), e))
            }
            _ => Ok(()),
        }
    }

    fn make_last(&self, id: &BlockId) -> Result<()> {
        let path = self.path_of(id);
        let failed = |e| Error::io(format!("syncing {}", quoted(&path)), e);
        self.open_file(id)?.sync_all().map_err(failed)?;
        let mut dirs = path.ancestors().skip(1).take_while(|it| it.starts_with(&self.root));
        dirs.try_for_each(sys::sync_dir)
    }

    fn forget(&self, id: &BlockId) -> bool {
        let Some(open) = self.open.lock().pop(id) else { return false };
        let (was, is) = (sys::fstat(&*open), sys::stat(&self.path_of(id)));
        let place = |it: sys::Stat| (it.dev, it.ino);
        match (was, is) {
            (Ok(was), Ok(is)) => place(was) != place(is),
            // A disk that has come back: what was open on it is not any more.
            (Err(_), _) => true,
            (Ok(_), Err(_)) => false,
        }
    }

    fn will_need(&self, id: &BlockId, offset: u64, len: u64) {
        if let Ok(file) = self.file(id) {
            sys::target::will_need(&file, offset, len);
        }
    }

    fn open(&self, id: &BlockId) -> Result<Option<File>> {
        self.open_file(id).map(Some)
    }

    fn clone_range(&self, range: &BlockRange<'_>, dest: &File, dest_offset: u64) -> Cloned {
        let Ok(file) = self.file(range.id) else { return Cloned::NotHere };
        let cloned = sys::target::clone_range(&file, range.offset, range.len, dest, dest_offset);
        match cloned.map_err(|e| e.raw_os_error()) {
            Ok(()) => Cloned::Done,
            // A place that is not a multiple of the file system's block.
            Err(Some(c::EINVAL)) => Cloned::NotHere,
            Err(_) => Cloned::Never,
        }
    }

    fn space(&self) -> Result<Space> {
        sys::space(&self.root).map_err(|e| Error::io(format!("asking {}", quoted(&self.root)), e))
    }
}
