//! What is open in the ingest tree, by handle number.
//!
//! Invariant: a handle pins its node, so that the node stays usable when its last name goes. Both
//! end with the last use of the handle, which may be after its release.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use super::nodes::Pinned;
use crate::fs::errno::{Errno, FsResult};
use crate::sys::at::{self, DirItem, DirReader};
use crate::sys::c;

/// The open ones of a kind.
pub(super) struct Handles<T> {
    next: AtomicU64,
    open: RwLock<HashMap<u64, Arc<T>>>,
}

impl<T> Handles<T> {
    /// None open; the first gets number `first`, and from there every second number is used, so
    /// that one of another kind can take those between.
    pub(super) fn new(first: u64) -> Handles<T> {
        Handles { next: AtomicU64::new(first), open: RwLock::default() }
    }

    pub(super) fn add(&self, it: T) -> u64 {
        let handle = self.next.fetch_add(2, Ordering::Relaxed);
        self.open.write().insert(handle, Arc::new(it));
        handle
    }

    pub(super) fn get(&self, handle: u64) -> FsResult<Arc<T>> {
        self.open.read().get(&handle).map(Arc::clone).ok_or(Errno(c::EBADF))
    }

    /// All that are open now.
    pub(super) fn all(&self) -> Vec<Arc<T>> {
        self.open.read().values().map(Arc::clone).collect()
    }

    /// Closes `handle`, once nobody is using it any more.
    pub(super) fn remove(&self, handle: u64) -> FsResult<()> {
        // Two statements: the lock must be free again before the file is closed.
        let gone = self.open.write().remove(&handle);
        gone.map(drop).ok_or(Errno(c::EBADF))
    }
}

/// An open file.
pub(super) struct OpenFile {
    pub(super) file: File,
    pub(super) writable: bool,
    pin: Pinned,
}

impl OpenFile {
    /// The handle that is `file`, opened with `flags`.
    pub(super) fn new(file: File, flags: i32, pin: Pinned) -> OpenFile {
        OpenFile { file, writable: flags & c::O_ACCMODE != c::O_RDONLY, pin }
    }

    /// A descriptor that only stands for it.
    pub(super) fn path(&self) -> &OwnedFd {
        self.pin.fd()
    }

    /// The node that it is open on.
    pub(super) fn node(&self) -> u64 {
        self.pin.node()
    }

    /// Reads until `buf` is full or the file ends.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> FsResult<usize> {
        in_steps(buf.len(), |done| {
            let rest = buf.get_mut(done..).unwrap_or_default();
            self.file.read_at(rest, offset.saturating_add(done as u64))
        })
    }

    /// Writes all of `data`, or as much as there is room for.
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> FsResult<usize> {
        in_steps(data.len(), |done| {
            let rest = data.get(done..).unwrap_or_default();
            self.file.write_at(rest, offset.saturating_add(done as u64))
        })
    }
}

/// Calls `step` with how many bytes are done until all are, or no more go; gives how many. An error
/// counts only before the first byte.
fn in_steps(len: usize, mut step: impl FnMut(usize) -> io::Result<usize>) -> FsResult<usize> {
    let mut done = 0;
    while done < len {
        match step(done) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) if done > 0 => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(done)
}

/// An open directory.
pub(super) struct OpenDir {
    pin: Pinned,
    listing: Mutex<Listing>,
}

/// How far a directory has been listed.
struct Listing {
    /// Opened by the first request: many open a directory only to have it, and a descriptor less
    /// for each is one more for everybody.
    reader: Option<DirReader>,
    /// What the reader gave last, when there was no room for it in the reply.
    ahead: Option<DirItem>,
    /// The offset of the last name that was taken.
    offset: i64,
}

impl OpenDir {
    /// A handle on the directory that `pin` keeps, which lists with `reader` if that is open.
    pub(super) fn new(reader: Option<DirReader>, pin: Pinned) -> OpenDir {
        OpenDir { pin, listing: Mutex::new(Listing { reader, ahead: None, offset: 0 }) }
    }

    /// A handle on the directory that is good for calls relative to it.
    pub(super) fn fd(&self) -> &OwnedFd {
        self.pin.fd()
    }

    /// Gives the names after `offset` to `take`, until that says it has no room.
    pub(super) fn list(&self, offset: i64, take: &mut dyn FnMut(&DirItem) -> bool) -> FsResult<()> {
        let mut listing = self.listing.lock();
        let listing = &mut *listing;
        let reader = match &mut listing.reader {
            Some(reader) => reader,
            none => {
                let dir = at::open_dir(self.pin.fd(), OsStr::new("."))?;
                none.insert(DirReader::new(dir)?)
            }
        };
        if offset == 0 || offset != listing.offset {
            listing.ahead = None;
            reader.seek(offset)?;
            listing.offset = offset;
        }
        loop {
            let item = match listing.ahead.take() {
                Some(item) => item,
                None => match reader.next_item() {
                    Some(item) => item?,
                    None => return Ok(()),
                },
            };
            if !take(&item) {
                listing.ahead = Some(item);
                return Ok(());
            }
            listing.offset = item.offset;
        }
    }
}
