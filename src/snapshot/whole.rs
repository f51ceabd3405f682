//! Blocks that are a file as they lie there, which the kernel can read without this program.
//!
//! What is read past this program is not checked while it is read. So a block's bytes are checked
//! against the checks of its frames before it is first handed out, and again when its file is not
//! the one, of the length and times, that was checked. That reads the block once, which leaves it
//! in the system's cache for the reader who asked. What was found is remembered either way: a block
//! that is not right is not read as a whole at each open. What goes bad on the disk later, while
//! the block is handed out, is left to `validate`, as for any file of that disk.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;

use lru::LruCache;
use parking_lot::Mutex;

use super::FileMap;
use super::Snapshots;
use super::blocks::{BlockMap, Blocks};
use crate::catalog::Extent;
use crate::chunk::frame::Codec;
use crate::error::{Error, Result};
use crate::sys::{self, Time};

/// Files of blocks of which it is remembered what their check has found.
const FINDINGS_MAX: usize = 1024;

/// A block whose file is a file's whole content.
#[derive(Debug)]
pub struct WholeBlock {
    /// The block's number: files with the same one have the same content.
    pub number: u64,
    /// The block's file, open for reading.
    pub file: File,
    /// That file as it was checked: while this is the same, so is what was found.
    pub checked: Checked,
}

/// A file that was checked, as it was then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Checked {
    dev: u64,
    ino: u64,
    mtime: Time,
    ctime: Time,
}

/// What the checks of blocks have found: by block and by file, whether it is as it was written.
pub(super) struct Findings(Mutex<LruCache<(u64, Checked), bool>>);

impl Findings {
    /// Nothing was checked yet.
    pub fn new() -> Findings {
        let most = NonZeroUsize::new(FINDINGS_MAX).unwrap_or(NonZeroUsize::MIN);
        Findings(Mutex::new(LruCache::new(most)))
    }
}

impl Snapshots {
    /// The block that is this file's content byte for byte, if there is one and a copy of it is as
    /// it was written. Where there is none, [`Snapshots::read_data`] gives what can be read.
    pub fn whole_block(&self, file: &FileMap) -> Result<Option<WholeBlock>> {
        let [Extent::Data { block, offset: 0, len }] = *file.content.extents.as_slice() else {
            return Ok(None);
        };
        let map = self.blocks.map(block)?;
        let is_raw = map.frames.iter().all(|it| it.frame.codec == Codec::Raw);
        if !is_raw || map.stored_len != len {
            return Ok(None);
        }
        let opened = self.blocks.read_copy(&map, |volume| match volume.store.open(&map.id)? {
            Some(file) => {
                let checked = self.check_whole(&map, &file)?;
                Ok(Some(WholeBlock { number: block, file, checked }))
            }
            None => Ok(None),
        });
        Ok(opened.unwrap_or_else(|e| {
            // Whoever reads it is told, and the log was when it was found.
            log::debug!("{e}");
            None
        }))
    }

    fn check_whole(&self, map: &BlockMap, file: &File) -> Result<Checked> {
        let failed = |e| Error::io(format!("reading block {}", map.id), e);
        let stat = sys::fstat(file).map_err(failed)?;
        if !stat.is_file() || stat.size != map.stored_len {
            return Err(Error::corrupt(format!("block {} has the wrong length", map.id)));
        }
        let (mtime, ctime) = (stat.mtime, stat.ctime);
        let now = Checked { dev: stat.dev, ino: stat.ino, mtime, ctime };
        let key = (map.number, now);
        let known = self.findings.0.lock().get(&key).copied();
        match known {
            Some(true) => return Ok(now),
            Some(false) => {
                let message = format!("block {} was found not to be as it was written", map.id);
                return Err(Error::corrupt(message));
            }
            None => {}
        }
        let found = check(&self.blocks, map, file);
        self.findings.0.lock().put(key, found.is_ok());
        if let Err(e) = &found {
            log::error!("{e}: the files that are this block are read frame by frame");
        }
        found.map(|()| now)
    }
}

fn check(blocks: &Blocks, map: &BlockMap, file: &File) -> Result<()> {
    sys::advise_sequential(file);
    for place in &map.frames {
        let mut bytes = blocks.buffers.take(place.frame.stored_len as usize);
        let read = file.read_exact_at(&mut bytes, place.stored_at);
        read.map_err(|e| Error::io(format!("reading block {}", map.id), e))?;
        place.frame.verify(&bytes).map_err(|e| e.context(place.name_in(map)))?;
    }
    Ok(())
}
