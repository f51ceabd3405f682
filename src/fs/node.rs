//! Inode numbers: what they stand for, computed and never looked up.
//!
//! A directory of a snapshot is (run, directory number); everything else in a snapshot is its
//! version number, which is the same in every run in which the file is unchanged, so that the
//! kernel's caches see one file. Nothing has to be remembered for what the kernel has seen.

use crate::catalog::{DirId, RunId, VersionId};
use crate::job::{JobId, VERBS, Verb};

/// What an inode number stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// The root of the mount.
    Root,
    /// `/snapshots`.
    Snapshots,
    /// `/snapshots/latest`, while this run is the newest.
    Latest(RunId),
    /// `/.ctl`.
    Ctl,
    /// `/.ctl/<verb>`: each has many inodes, of which the name leads to one at a time.
    Verb(Verb, u16),
    /// `/.ctl/status`.
    CtlStatus,
    /// `/.ctl/version`.
    CtlVersion,
    /// `/.ctl/jobs`.
    Jobs,
    /// `/.ctl/jobs/<id>`.
    Job(JobId),
    /// A file of `/.ctl/jobs/<id>`; `status` has many inodes too.
    JobFile(JobId, JobFile, u16),
    /// A directory of a snapshot.
    Dir(RunId, DirId),
    /// Anything else in a snapshot.
    Version(VersionId),
    /// Anything in `/ingest`, by its inode number on disk.
    Ingest(u64),
}

/// The files that tell of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobFile {
    /// State, counts and error, for people.
    Status = 1,
    /// What happens, line by line.
    Log = 2,
    /// State, counts and error, for programs.
    Progress = 3,
    /// Writing anything stops the job.
    Cancel = 4,
    /// What was asked for.
    Command = 5,
}

/// Every job file with its name.
pub const JOB_FILES: [(JobFile, &str); 5] = [
    (JobFile::Command, "command"),
    (JobFile::Status, "status"),
    (JobFile::Log, "log"),
    (JobFile::Progress, "progress.json"),
    (JobFile::Cancel, "cancel"),
];

// The high bits tell the kinds apart; the rest is the number itself.
const DIR: u64 = 1 << 63;
const VERSION: u64 = 1 << 62;
const INGEST: u64 = 1 << 61;
const LATEST: u64 = 1 << 60;
const JOB: u64 = 1 << 59;
const VERB: u64 = 1 << 58;
const ALIAS_BITS: u32 = 16;
/// Bits of a job's number, beside an alias and three for the file.
const JOB_BITS: u32 = 40;
/// Bits of a directory number beside a run number.
const DIR_BITS: u32 = 38;
const RUN_BITS: u32 = 63 - DIR_BITS;

impl Node {
    /// The inode number. `None` where a number is too large to be told apart, which takes
    /// 33 million runs or 274 billion directories.
    pub fn ino(self) -> Option<u64> {
        let small = |n: i64, bits: u32| u64::try_from(n).ok().filter(|n| n >> bits == 0);
        Some(match self {
            Node::Root => 1,
            Node::Snapshots => 2,
            Node::Ctl => 3,
            Node::Verb(verb, alias) => VERB | (verb as u64) << ALIAS_BITS | u64::from(alias),
            Node::CtlVersion => 4,
            Node::CtlStatus => 5,
            Node::Jobs => 6,
            Node::Latest(run) => LATEST | small(run, RUN_BITS)?,
            Node::Job(id) => JOB | small(id.cast_signed(), JOB_BITS)? << (ALIAS_BITS + 3),
            Node::JobFile(id, file, alias) => {
                let id = small(id.cast_signed(), JOB_BITS)?;
                JOB | (id << ALIAS_BITS | u64::from(alias)) << 3 | file as u64
            }
            Node::Dir(run, dir) => DIR | small(run, RUN_BITS)? << DIR_BITS | small(dir, DIR_BITS)?,
            Node::Version(version) => VERSION | small(version, 60)?,
            Node::Ingest(node) => INGEST | Some(node).filter(|n| n >> 60 == 0)?,
        })
    }

    /// What an inode number stands for.
    pub fn from_ino(ino: u64) -> Option<Node> {
        let signed = |n: u64| n.cast_signed();
        if ino & DIR != 0 {
            let run = (ino & !DIR) >> DIR_BITS;
            return Some(Node::Dir(signed(run), signed(ino & ((1 << DIR_BITS) - 1))));
        }
        if ino & VERSION != 0 {
            return Some(Node::Version(signed(ino & !VERSION)));
        }
        if ino & INGEST != 0 {
            return Some(Node::Ingest(ino & !INGEST));
        }
        if ino & LATEST != 0 {
            return Some(Node::Latest(signed(ino & !LATEST)));
        }
        if ino & JOB != 0 {
            let (number, file) = ((ino & !JOB) >> 3, ino & 7);
            let (id, alias) = (number >> ALIAS_BITS, alias_in(number));
            let file = JOB_FILES.iter().find(|it| it.0 as u64 == file);
            let node = file.map_or(Node::Job(id), |it| Node::JobFile(id, it.0, alias));
            // Only what it has, and not the rest of a number that is none.
            return Some(node).filter(|it| it.ino() == Some(ino));
        }
        if ino & VERB != 0 {
            let number = (ino & !VERB) >> ALIAS_BITS;
            let verb = VERBS.into_iter().find(|it| *it as u64 == number)?;
            return Some(Node::Verb(verb, alias_in(ino)));
        }
        Some(match ino {
            1 => Node::Root,
            2 => Node::Snapshots,
            3 => Node::Ctl,
            4 => Node::CtlVersion,
            5 => Node::CtlStatus,
            6 => Node::Jobs,
            _ => return None,
        })
    }

    /// The same file by another of its inodes, if it has many.
    pub fn alias(self, alias: u16) -> Node {
        match self {
            Node::Verb(verb, _) => Node::Verb(verb, alias),
            Node::JobFile(id, JobFile::Status, _) => Node::JobFile(id, JobFile::Status, alias),
            other => other,
        }
    }

    /// Whether it has many inodes.
    pub fn has_aliases(self) -> bool {
        self.alias(0) != self.alias(1)
    }
}

/// The alias in the lowest bits of a number.
fn alias_in(number: u64) -> u16 {
    let [.., high, low] = number.to_be_bytes();
    u16::from_be_bytes([high, low])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_number_that_fits_comes_back(n: u64, m: u64) {
            let cut = |n: u64, bits: u32| (n & ((1 << bits) - 1)).cast_signed();
            let job = cut(n, JOB_BITS).cast_unsigned();
            let file = JOB_FILES[usize::from(m.to_le_bytes()[0]) % 5].0;
            let alias = u16::from_le_bytes([m.to_le_bytes()[3], m.to_le_bytes()[4]]);
            for node in [
                Node::Dir(cut(n, RUN_BITS), cut(m, DIR_BITS)),
                Node::Version(cut(n, 60)),
                Node::Latest(cut(n, RUN_BITS)),
                Node::Ingest(cut(n, 60).cast_unsigned()),
                Node::Job(job),
                Node::JobFile(job, file, 0).alias(alias),
                {
                    let [_, verb, handle, ..] = m.to_le_bytes();
                    Node::Verb(VERBS[usize::from(verb) % VERBS.len()], handle.into())
                },
            ] {
                prop_assert_eq!(node.ino().and_then(Node::from_ino), Some(node));
            }
        }

        #[test]
        fn any_number_stands_for_one_thing_or_nothing(ino: u64, few in 0u64..100, bit in 0u32..64) {
            for ino in [ino, few, few | 1 << bit, ino >> bit] {
                let node = Node::from_ino(ino);
                if let Some(again) = node.and_then(Node::ino) {
                    prop_assert_eq!(Node::from_ino(again), node);
                }
            }
        }
    }

    #[test]
    fn numbers_come_back_and_are_unlike_each_other() {
        let nodes = [
            Node::Root,
            Node::Snapshots,
            Node::Ctl,
            Node::Verb(Verb::Backup, 0),
            Node::Verb(Verb::Backup, 1),
            Node::Verb(Verb::Genmeta, 0),
            Node::CtlVersion,
            Node::CtlStatus,
            Node::Jobs,
            Node::Latest(1),
            Node::Latest(2),
            Node::Job(1),
            Node::JobFile(1, JobFile::Status, 0),
            Node::JobFile(1, JobFile::Status, 1),
            Node::JobFile(1, JobFile::Cancel, 0),
            Node::Job(2),
            Node::Dir(1, 1),
            Node::Dir(2, 1),
            Node::Dir(1, 2),
            Node::Dir((1 << RUN_BITS) - 1, (1 << DIR_BITS) - 1),
            Node::Version(1),
            Node::Version((1 << 60) - 1),
            Node::Ingest(1),
            Node::Ingest((1 << 60) - 1),
        ];
        let mut seen = std::collections::HashSet::new();
        for node in nodes {
            let ino = node.ino().unwrap();
            assert!(seen.insert(ino), "{node:?}");
            assert_eq!(Node::from_ino(ino), Some(node));
        }
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        assert_eq!(Node::Dir(1 << RUN_BITS, 1).ino(), None);
        assert_eq!(Node::Dir(1, 1 << DIR_BITS).ino(), None);
        assert_eq!(Node::Ingest(1 << 60).ino(), None);
        assert_eq!(Node::from_ino(0), None);
        assert_eq!(Node::from_ino(77), None);
    }
}
