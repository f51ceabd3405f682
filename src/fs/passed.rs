//! What the mount has to know of files whose bytes go to and from the kernel without being asked
//! for: mapped memory, and files that the kernel reads and writes by itself; and what has to be
//! waited for to give them.
//!
//! Invariant: what the kernel took for stored and was not is told to whoever closes the file.

use std::os::fd::OwnedFd;

use super::errno::{Errno, FsResult};
use super::mounted::{Mounted, node_of};
use super::node::Node;
use super::spare::Disk;
use crate::snapshot::WholeBlock;
use crate::sys::c;

impl Mounted {
    /// The block that is the content of a file of a snapshot as it lies there.
    pub fn whole_block(&self, ino: u64) -> Option<WholeBlock> {
        match node_of(ino) {
            Ok(Node::Version(version)) => self.tree.whole_block(version),
            _ => None,
        }
    }

    /// The disk that a read of anything but a control file waits for.
    pub fn disk(&self, ino: u64, offset: u64, len: u64) -> Disk {
        match node_of(ino) {
            Ok(Node::Version(version)) => self.tree.disk(version, offset, len),
            _ => Disk::Ingest,
        }
    }

    /// Whether an inode is a file of the writable tree.
    pub fn is_ingest(&self, ino: u64) -> bool {
        matches!(node_of(ino), Ok(Node::Ingest(_)))
    }

    /// What becomes of a write of mapped memory, of which nobody waits for the answer: the kernel
    /// takes a part for the whole, and whoever closes the file has to be told.
    pub fn written_back(&self, ino: u64, written: FsResult<usize>, len: usize) -> FsResult<usize> {
        let whole = match written {
            Ok(done) if done < len => Err(Errno(c::ENOSPC)),
            result => result,
        };
        if let (Err(e), Ok(Node::Ingest(number))) = (&whole, node_of(ino)) {
            self.ingest.lost(number, *e);
        }
        whole
    }

    /// Whether a handle is one by which a file of the writable tree is written to.
    pub fn is_ingest_writer(&self, ino: u64, handle: u64) -> bool {
        self.is_ingest(ino) && self.ingest.writes(handle)
    }

    /// Gives `take` a descriptor that stands for an open file of the writable tree.
    pub fn with_ingest_file<T>(
        &self,
        handle: u64,
        take: impl FnOnce(&OwnedFd) -> T,
    ) -> FsResult<T> {
        self.ingest.with_file(handle, take)
    }
}
