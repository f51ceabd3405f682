//! Reading runs: looking up, listing and reading the trees that finished runs have left.
//!
//! One [`Snapshots`] serves all runs of a catalog to any number of threads. Bytes come out of
//! frames; a frame is read and decompressed once for all who want it, checked, and kept in a cache
//! bounded in bytes. No lock is held while a disk is read. Who is reading is not known here.

mod ahead;
mod blocks;
mod buffers;
mod cache;
mod data;
mod due;
mod pieces;
mod pool;
mod resolve;
mod weighed;
mod whole;

pub use cache::CacheStats;
pub use data::Data;
pub use resolve::{Found, Wish, choose_run, resolve, resolve_wish};
pub use whole::{Checked, WholeBlock};

use std::path::Path;
use std::sync::Arc;

use ahead::Ahead;
use blocks::{Blocks, OpenReader};
use weighed::Weighed;
use whole::Findings;

use crate::catalog::tapes::OnTape;
use crate::catalog::{Content, DirId, EntryRow, Extent, Reader, Run, RunId, Settings, VersionId};
use crate::error::{Error, ErrorKind, Result};
use crate::volume::Volumes;

/// Memory for the contents of files: where their bytes lie, links, attributes. A small file's is
/// about 400 bytes.
const FILE_MAPS_BYTES_MAX: usize = 6 << 20;

/// The content of a version, ready for reading at any offset.
#[derive(Debug)]
pub struct FileMap {
    version: VersionId,
    /// Hash, extents, link target and extended attributes.
    pub content: Content,
    /// Where each extent begins in the file.
    starts: Vec<u64>,
    size: u64,
}

/// All snapshots of a catalog.
pub struct Snapshots {
    blocks: Arc<Blocks>,
    ahead: Ahead,
    file_maps: Weighed<VersionId, FileMap>,
    findings: Findings,
}

impl Snapshots {
    /// Opens the catalog at `path` with a frame cache of `cache_bytes`.
    pub fn open(path: &Path, cache_bytes: u64) -> Result<Snapshots> {
        Snapshots::open_by(path, cache_bytes, Reader::open)
    }

    /// The same, and the catalog and its log stay as they are, byte for byte.
    pub fn open_untouched(path: &Path, cache_bytes: u64) -> Result<Snapshots> {
        Snapshots::open_by(path, cache_bytes, Reader::open_untouched)
    }

    fn open_by(path: &Path, cache_bytes: u64, open: OpenReader) -> Result<Snapshots> {
        let blocks = Arc::new(Blocks::open(path, cache_bytes, open)?);
        Ok(Snapshots {
            ahead: Ahead::new(blocks.clone()),
            blocks,
            file_maps: Weighed::new(FILE_MAPS_BYTES_MAX),
            findings: Findings::new(),
        })
    }

    /// Calls `read` with a catalog reader that no other thread uses meanwhile.
    pub fn with_reader<T>(&self, read: impl FnOnce(&Reader) -> Result<T>) -> Result<T> {
        self.blocks.with_reader(read)
    }

    /// The catalog's file.
    pub fn catalog(&self) -> &Path {
        &self.blocks.path
    }

    /// Tells of blocks that are on tape alone.
    pub fn on_tape(&self) -> &OnTape {
        &self.blocks.on_tape
    }

    /// The catalog's settings.
    pub fn settings(&self) -> Result<Settings> {
        self.with_reader(Reader::settings)
    }

    /// The volumes, as they were when this was opened or when a block was last not found.
    pub fn volumes(&self) -> Arc<Volumes> {
        self.blocks.volumes()
    }

    /// How the frame cache fares.
    pub fn cache_stats(&self) -> CacheStats {
        self.blocks.frames.stats()
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
        if let Some(map) = self.file_maps.get(&version) {
            return Ok(map);
        }
        let content = self.with_reader(|reader| reader.content(version))?;
        let map = Arc::new(FileMap::new(version, content));
        self.file_maps.put(version, map.clone(), map.weight());
        Ok(map)
    }

    /// The volume that `len` bytes of a file from `offset` on are read from. `None` if it is not
    /// there, or if they are not all on one. No disk is asked but the catalog's.
    pub fn volume_of(&self, file: &FileMap, offset: u64, len: u64) -> Result<Option<i64>> {
        let end = offset.saturating_add(len);
        let mut found = None;
        let extents = file.content.extents.iter().zip(&file.starts);
        for (extent, start) in extents.skip(file.extent_at(offset)) {
            if *start >= end {
                break;
            }
            let Extent::Data { block, .. } = *extent else { continue };
            let map = self.blocks.map_in_catalog(block)?;
            let volumes = self.volumes();
            let volume = volumes.first_present(&map.volumes).map(|it| it.config.number);
            if volume.is_none() || found.is_some() && found != volume {
                return Ok(None);
            }
            found = volume;
        }
        Ok(found)
    }
}

impl FileMap {
    fn new(version: VersionId, content: Content) -> FileMap {
        let mut starts = Vec::with_capacity(content.extents.len());
        let mut size = 0;
        for extent in &content.extents {
            starts.push(size);
            size += extent.len();
        }
        FileMap { version, content, starts, size }
    }

    /// Length of the content in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of memory that it takes, about.
    fn weight(&self) -> usize {
        let extents = &self.content.extents;
        let extra = &self.content.extra;
        let xattrs = extra.xattrs.iter().map(|it| it.0.len() + it.1.len() + 2 * size_of_val(&it.0));
        size_of::<FileMap>()
            + extents.capacity() * size_of::<Extent>()
            + self.starts.capacity() * size_of::<u64>()
            + extra.target.as_ref().map_or(0, Vec::len)
            + xattrs.sum::<usize>()
    }

    /// How many of `wanted` bytes from `offset` on there are.
    fn len_at(&self, offset: u64, wanted: usize) -> usize {
        usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX).min(wanted)
    }

    /// The number of the extent that holds the byte at `offset`, or of the last one.
    fn extent_at(&self, offset: u64) -> usize {
        self.starts.partition_point(|start| *start <= offset).saturating_sub(1)
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
