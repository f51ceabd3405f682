//! The hash of a whole file, computed as its chunks go by.
//!
//! A file without holes has the hash of its bytes (for a file of one chunk that is the chunk's
//! name, at no cost). A file with holes has the hash of its segments: for each stretch of data its
//! start and length (8 bytes each, little-endian) and its bytes, and last the file's size (8
//! bytes); so where the holes are is part of what is verified, and a hole of a tebibyte costs
//! nothing.

use super::{Digest, HashAlgo, Hasher};

/// A file's hash being computed.
#[derive(Clone)]
pub struct FileHash {
    algo: HashAlgo,
    only_chunk: Option<Digest>,
    hasher: Option<Hasher>,
    is_segments: bool,
}

impl FileHash {
    /// For a file without holes: the hash of its bytes.
    pub fn of_content(algo: HashAlgo) -> FileHash {
        FileHash { algo, only_chunk: None, hasher: None, is_segments: false }
    }

    /// For a file with holes: the hash of its segments.
    pub fn of_segments(algo: HashAlgo) -> FileHash {
        FileHash { algo, only_chunk: None, hasher: Some(algo.hasher()), is_segments: true }
    }

    /// A segment of `len` bytes at `start` of the file follows.
    pub fn begin_segment(&mut self, start: u64, len: u64) {
        self.add_bytes(&start.to_le_bytes());
        self.add_bytes(&len.to_le_bytes());
    }

    /// Adds a chunk, whose name is `id`; `is_last` when the content ends with it.
    pub fn add(&mut self, bytes: &[u8], id: &Digest, is_last: bool) {
        if self.hasher.is_none() && is_last && !self.is_segments {
            self.only_chunk = Some(*id);
        } else {
            self.add_bytes(bytes);
        }
    }

    /// Adds bytes.
    pub fn add_bytes(&mut self, bytes: &[u8]) {
        self.hasher.get_or_insert_with(|| self.algo.hasher()).update(bytes);
    }

    /// The hash of a file without holes.
    pub fn finish(self) -> Digest {
        match (self.hasher, self.only_chunk) {
            (Some(hasher), _) => hasher.finish(),
            (None, Some(id)) => id,
            (None, None) => self.algo.hash(b""),
        }
    }

    /// The hash of a file with holes, which is `size` bytes long.
    pub fn finish_segments(mut self, size: u64) -> Digest {
        self.add_bytes(&size.to_le_bytes());
        self.finish()
    }
}
