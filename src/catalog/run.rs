//! Runs and the numbers by which the catalog knows things.

use std::path::PathBuf;

use crate::entry::Kind;
use crate::sys::Time;

/// Number of a run, from 1 across the catalog.
pub type RunId = i64;
/// Number of a directory: the same in every run in which the directory lives.
pub type DirId = i64;
/// Number of a version: one state of one inode. Names of one inode share it.
pub type VersionId = i64;

/// Longest comment of a run, in bytes.
pub const COMMENT_BYTES_MAX: usize = 64 << 10;

/// How entries compare with the run before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Were not there.
    pub added: u64,
    /// Changed in content or metadata.
    pub modified: u64,
    /// Are gone.
    pub deleted: u64,
    /// Are as they were.
    pub unchanged: u64,
}

/// What a run counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Entries other than directories.
    pub entries: Tally,
    /// Directories. Apart, because every change below one modifies its times.
    pub dirs: Tally,
    /// Regular files in the snapshot.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes read from the source.
    pub bytes_read: u64,
    /// Bytes that the new blocks of this run take.
    pub bytes_stored: u64,
    /// Entries that could not be read, or changed while they were read.
    pub problems: u64,
}

impl Counts {
    /// The tally that an entry of this kind is counted in.
    pub fn tally(&mut self, kind: Kind) -> &mut Tally {
        match kind {
            Kind::Dir => &mut self.dirs,
            _ => &mut self.entries,
        }
    }

    /// Whether the run found anything other than it was.
    pub fn has_changes(&self) -> bool {
        let changes = |it: &Tally| it.added + it.modified + it.deleted;
        changes(&self.entries) + changes(&self.dirs) + self.problems > 0
    }

    /// In the order of the columns of `runs`.
    pub(super) fn columns(&self) -> [u64; 13] {
        let (entries, dirs) = (&self.entries, &self.dirs);
        [
            entries.added,
            entries.modified,
            entries.deleted,
            entries.unchanged,
            dirs.added,
            dirs.modified,
            dirs.deleted,
            dirs.unchanged,
            self.files,
            self.bytes,
            self.bytes_read,
            self.bytes_stored,
            self.problems,
        ]
    }
}

/// A finished run.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its number.
    pub id: RunId,
    /// Its name, unlike any other run's anywhere.
    pub uuid: String,
    /// Name of its source.
    pub source: Vec<u8>,
    /// Where the source lay.
    pub path: PathBuf,
    /// When it began.
    pub started: Time,
    /// When it ended.
    pub finished: Time,
    /// What it counted.
    pub counts: Counts,
    /// Name of the machine.
    pub host: Vec<u8>,
    /// Its tags, sorted.
    pub tags: Vec<String>,
    /// What somebody had to say about it; empty for most.
    pub comment: String,
}
