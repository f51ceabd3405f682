//! Reading runs: looking up, listing and reading the trees that finished runs have left.
//!
//! One [`Snapshots`] serves all runs of a catalog to any number of threads. Bytes come out of
//! frames; a frame is read and decompressed once for all who want it, checked, and kept in a cache
//! bounded in bytes. No lock is held while a disk is read. Who is reading is not known here.

mod cache;
mod pieces;
mod pool;
mod resolve;
mod whole;

pub use resolve::{Found, Wish, choose_run, resolve, resolve_wish};
pub use whole::WholeBlock;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lru::LruCache;
use parking_lot::{Mutex, RwLock};

pub use cache::CacheStats;
use cache::FrameCache;
use pool::Pool;

use crate::catalog::{Content, DirId, EntryRow, Extent, Reader, Run, RunId, Settings, VersionId};
use crate::chunk::frame::Frame;
use crate::error::{Error, ErrorKind, Result};
use crate::volume::{BlockId, Volumes};

/// Blocks whose frame tables are kept: at most 30 KiB each.
const BLOCK_MAPS_MAX: usize = 256;
/// Files whose extents are kept; joined extents make most lists one item long.
const FILE_MAPS_MAX: usize = 4096;

/// The content of a version, ready for reading at any offset.
#[derive(Debug)]
pub struct FileMap {
    /// Hash, extents, link target and extended attributes.
    pub content: Content,
    /// Where each extent begins in the file.
    starts: Vec<u64>,
    size: u64,
}

/// A block's frames with their positions.
struct BlockMap {
    id: BlockId,
    volumes: Vec<i64>,
    frames: Vec<FramePlace>,
}

#[derive(Clone, Copy)]
struct FramePlace {
    plain_at: u64,
    stored_at: u64,
    frame: Frame,
}

/// All snapshots of a catalog.
pub struct Snapshots {
    path: PathBuf,
    readers: Pool<Reader>,
    volumes: RwLock<Arc<Volumes>>,
    frames: FrameCache,
    block_maps: Mutex<LruCache<u64, Arc<BlockMap>>>,
    file_maps: Mutex<LruCache<VersionId, Arc<FileMap>>>,
}

impl Snapshots {
    /// Opens the catalog at `path` with a frame cache of `cache_bytes`.
    pub fn open(path: &Path, cache_bytes: u64) -> Result<Snapshots> {
        let reader = Reader::open(path)?;
        let volumes = Volumes::open(reader.volumes()?);
        let cache = |n| NonZeroUsize::new(n).map_or_else(LruCache::unbounded, LruCache::new);
        let readers = Pool::new();
        readers.put(reader);
        Ok(Snapshots {
            path: path.to_path_buf(),
            readers,
            volumes: RwLock::new(Arc::new(volumes)),
            frames: FrameCache::new(cache_bytes),
            block_maps: Mutex::new(cache(BLOCK_MAPS_MAX)),
            file_maps: Mutex::new(LruCache::new(
                NonZeroUsize::new(FILE_MAPS_MAX).unwrap_or(NonZeroUsize::MIN),
            )),
        })
    }

    /// Calls `read` with a catalog reader that no other thread uses meanwhile.
    pub fn with_reader<T>(&self, read: impl FnOnce(&Reader) -> Result<T>) -> Result<T> {
        let reader = match self.readers.take() {
            Some(reader) => reader,
            None => Reader::open(&self.path)?,
        };
        let result = read(&reader);
        self.readers.put(reader);
        result
    }

    /// The catalog's file.
    pub fn catalog(&self) -> &Path {
        &self.path
    }

    /// The catalog's settings.
    pub fn settings(&self) -> Result<Settings> {
        self.with_reader(Reader::settings)
    }

    /// The volumes, as they were when this was opened or when a block was last not found.
    pub fn volumes(&self) -> Arc<Volumes> {
        self.volumes.read().clone()
    }

    /// How the frame cache fares.
    pub fn cache_stats(&self) -> CacheStats {
        self.frames.stats()
    }

    /// All finished runs, oldest first.
    pub fn runs(&self) -> Result<Vec<Run>> {
        self.with_reader(Reader::runs)
    }

    /// A finished run.
    pub fn run(&self, run: RunId) -> Result<Run> {
        self.with_reader(|reader| reader.run(run))
    }

    /// The newest run.
    pub fn latest(&self) -> Result<Option<Run>> {
        self.with_reader(|reader| reader.latest(None))
    }

    /// The root directory of a run.
    pub fn root(&self, run: &Run) -> Result<EntryRow> {
        self.with_reader(|reader| reader.root(run))
    }

    /// The entry `name` of a directory at a run.
    pub fn lookup(&self, run: RunId, dir: DirId, name: &[u8]) -> Result<Option<EntryRow>> {
        self.with_reader(|reader| reader.lookup(run, dir, name))
    }

    /// At most `limit` entries of a directory at a run, from the first name greater than `after`.
    pub fn list(
        &self,
        run: RunId,
        dir: DirId,
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<EntryRow>> {
        self.with_reader(|reader| reader.list(run, dir, after, limit))
    }

    /// The content of a version.
    pub fn file(&self, version: VersionId) -> Result<Arc<FileMap>> {
        if let Some(map) = self.file_maps.lock().get(&version) {
            return Ok(map.clone());
        }
        let content = self.with_reader(|reader| reader.content(version))?;
        let map = Arc::new(FileMap::new(content));
        self.file_maps.lock().put(version, map.clone());
        Ok(map)
    }

    /// Fills `buf` from `offset` of a file as far as the file goes; gives the number of bytes.
    pub fn read(&self, file: &FileMap, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let len = usize::try_from(file.size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let len = len.min(buf.len());
        let mut buf = buf.get_mut(..len).unwrap_or_default();
        let mut at = offset;
        let mut next = file.starts.partition_point(|start| *start <= offset).saturating_sub(1);
        while !buf.is_empty() {
            let (Some(extent), Some(start)) =
                (file.content.extents.get(next), file.starts.get(next))
            else {
                return Err(Error::corrupt("a file's extents end before the file"));
            };
            let skip = at - start;
            let here = usize::try_from(extent.len() - skip).unwrap_or(usize::MAX).min(buf.len());
            let (part, rest) = buf.split_at_mut(here);
            match *extent {
                Extent::Hole { .. } => part.fill(0),
                Extent::Data { block, offset, .. } => {
                    self.read_block(block, offset + skip, part)?;
                }
            }
            buf = rest;
            at += here as u64;
            next += 1;
        }
        Ok(len)
    }

    /// Fills `buf` from a block's plain content.
    fn read_block(&self, block: u64, offset: u64, buf: &mut [u8]) -> Result<()> {
        let map = self.block_map(block)?;
        let mut at = offset;
        let mut buf = buf;
        let mut next = map.frames.partition_point(|it| it.plain_at <= offset).saturating_sub(1);
        while !buf.is_empty() {
            let Some(place) = map.frames.get(next) else {
                return Err(Error::corrupt(format!("block {}: offset beyond its end", map.id)));
            };
            let plain = self.frame(block, next, &map, place)?;
            let from = usize::try_from(at - place.plain_at).unwrap_or(usize::MAX);
            let Some(source) = plain.get(from..).filter(|it| !it.is_empty()) else {
                return Err(Error::corrupt(format!("block {}: offset beyond its end", map.id)));
            };
            let here = source.len().min(buf.len());
            let (part, rest) = buf.split_at_mut(here);
            part.copy_from_slice(source.get(..here).unwrap_or_default());
            buf = rest;
            at += here as u64;
            next += 1;
        }
        Ok(())
    }

    /// One frame's plain bytes, from the cache or from the volume.
    fn frame(
        &self,
        block: u64,
        number: usize,
        map: &BlockMap,
        place: &FramePlace,
    ) -> Result<Arc<Vec<u8>>> {
        let load = || {
            let mut stored = vec![0; place.frame.stored_len as usize];
            self.volumes().read_at(&map.volumes, &map.id, place.stored_at, &mut stored)?;
            let mut plain = Vec::with_capacity(place.frame.plain_len as usize);
            place
                .frame
                .decode(&stored, &mut plain)
                .map_err(|e| e.context(format!("block {} at byte {}", map.id, place.stored_at)))?;
            Ok(plain)
        };
        self.frames.get_or_load((block, number), || {
            // The file that is open may be a damaged one that somebody has replaced.
            load().or_else(|_: Error| {
                self.volumes().forget(&map.volumes, &map.id);
                load()
            })
        })
    }

    fn block_map(&self, number: u64) -> Result<Arc<BlockMap>> {
        if let Some(map) = self.block_maps.lock().get(&number) {
            return Ok(map.clone());
        }
        let row = self.with_reader(|reader| reader.block(number))?;
        if !row.volumes.iter().any(|it| self.volumes().get(*it).is_some()) {
            // A volume may have been added, or mounted, since this was opened.
            let volumes = self.with_reader(Reader::volumes)?;
            *self.volumes.write() = Arc::new(Volumes::open(volumes));
        }
        let (mut plain_at, mut stored_at) = (0, 0);
        let frames = row.frames.into_iter().map(|frame| {
            let place = FramePlace { plain_at, stored_at, frame };
            plain_at += u64::from(frame.plain_len);
            stored_at += u64::from(frame.stored_len);
            place
        });
        let map = BlockMap { id: row.id, frames: frames.collect(), volumes: row.volumes };
        let map = Arc::new(map);
        if self.volumes().get(map.volumes.first().copied().unwrap_or(-1)).is_some() {
            self.block_maps.lock().put(number, map.clone());
        }
        Ok(map)
    }
}

impl FileMap {
    fn new(content: Content) -> FileMap {
        let mut starts = Vec::with_capacity(content.extents.len());
        let mut size = 0;
        for extent in &content.extents {
            starts.push(size);
            size += extent.len();
        }
        FileMap { content, starts, size }
    }

    /// Length of the content in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Stretches of data, as (start, end) in the file; what is between them are holes.
    pub fn segments(&self) -> Vec<(u64, u64)> {
        let mut segments: Vec<(u64, u64)> = Vec::new();
        for (extent, start) in self.content.extents.iter().zip(&self.starts) {
            let end = start + extent.len();
            match (extent, segments.last_mut()) {
                (Extent::Hole { .. }, _) => {}
                (Extent::Data { .. }, Some(last)) if last.1 == *start => last.1 = end,
                (Extent::Data { .. }, _) => segments.push((*start, end)),
            }
        }
        segments
    }

    /// Whether there are holes.
    pub fn has_holes(&self) -> bool {
        self.content.extents.iter().any(|it| matches!(it, Extent::Hole { .. }))
    }
}

/// The error for a path that a run does not have.
fn not_in_run(path: &[u8], run: &Run) -> Error {
    let path = crate::error::Quoted(path);
    Error::new(ErrorKind::NotFound, format!("run {} has no '{path}'", run.id))
}
