//! Open control files: which inodes they are, what is known of each, and how many there may be.
//!
//! The kernel holds an inode's lock while it waits for `fsync`, and keeps everybody else who wants
//! it waiting, beyond the reach of any signal. So each open of a file that can be waited for is an
//! inode of its own, as far as that can be had.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;

use super::super::errno::{Errno, FsResult};
use super::super::node::Node;
use super::Answer;
use super::access::{Shares, Who};
use super::lines::Lines;
use super::waiters::Seen;
use crate::job::JobId;
use crate::sys::c;

/// Control files that may be open at once. Each holds half lines of 64 KiB at most.
const SHARES: Shares = Shares { all: 512, others: 384, each: 64 };
/// Threads that are remembered to have been told to look a name up again.
const TURNED_AWAY_MAX: usize = 64;

/// All open control files.
#[derive(Default)]
pub struct Handles {
    last: u64,
    open: HashMap<u64, Handle>,
    turned_away: VecDeque<u32>,
}

/// One of them.
pub struct Handle {
    node: Node,
    uid: u32,
    /// Lines that are being written.
    pub lines: Lines,
    /// What came of what was last written through this handle.
    pub answer: Option<Answer>,
    /// The jobs that `fsync` waits for; who asked finds them when the handle is closed too.
    pub asked: SharedAsked,
    /// What is being read, made at offset 0, so that a reader in pieces sees one text.
    pub text: Option<Arc<Vec<u8>>>,
    /// What was read of a job's progress.
    pub seen: Arc<Seen>,
    /// How far its log was read.
    pub log_read: Arc<AtomicU64>,
}

/// What a handle and whoever asked by it have of it.
pub type SharedAsked = Arc<Mutex<Asked>>;

/// Jobs that were asked for one after the other, up to a `fsync`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Their numbers, without those that are known to have ended.
    pub jobs: Vec<JobId>,
    /// Whether one that has ended was not done.
    pub has_failed: bool,
    /// Whether somebody has been told of these; what is asked for next is another matter.
    is_told: bool,
}

impl Asked {
    /// Adds jobs.
    pub fn add(&mut self, jobs: &[JobId]) {
        if self.is_told {
            *self = Asked::default();
        }
        self.jobs.extend_from_slice(jobs);
    }

    /// What somebody is told of.
    pub fn tell(&mut self) -> Asked {
        self.is_told = true;
        self.clone()
    }

    /// Leaves out a job that has ended.
    pub fn settle(&mut self, job: JobId, is_done: bool) {
        self.jobs.retain(|it| *it != job);
        self.has_failed |= !is_done;
    }
}

impl Handles {
    /// The inode that a name leads to: one that nobody has open.
    pub fn free(&self, node: Node) -> Node {
        let open: HashSet<Node> = self.open.values().map(|it| it.node).collect();
        let mut all = (0..=u16::MAX).map(|it| node.alias(it));
        match node.has_aliases() {
            true => all.find(|it| !open.contains(it)).unwrap_or(node),
            false => node,
        }
    }

    /// Opens a control file.
    pub fn open(&mut self, node: Node, who: &Who) -> FsResult<u64> {
        if node.has_aliases() {
            match self.open.values().any(|it| it.node == node) {
                // Another one was faster. By this answer the kernel looks the name up once more.
                true if self.turns_away(who.pid) => return Err(Errno(c::ESTALE)),
                true => {}
                false => self.turned_away.retain(|it| *it != who.pid),
            }
        }
        if !SHARES.admit(who.uid, self.open.values().map(|it| it.uid)) {
            return Err(Errno(c::ENFILE));
        }
        self.last += 1;
        let handle = Handle {
            node,
            uid: who.uid,
            lines: Lines::default(),
            answer: None,
            asked: Arc::default(),
            text: None,
            seen: Arc::default(),
            log_read: Arc::default(),
        };
        self.open.insert(self.last, handle);
        Ok(self.last)
    }

    /// Whether a thread is to look again: the first time it is. The kernel does so once, and what
    /// was not opened by its name leads to the same inode again.
    fn turns_away(&mut self, thread: u32) -> bool {
        if let Some(at) = self.turned_away.iter().position(|it| *it == thread) {
            self.turned_away.remove(at);
            return false;
        }
        self.turned_away.push_back(thread);
        if self.turned_away.len() > TURNED_AWAY_MAX {
            self.turned_away.pop_front();
        }
        thread != 0
    }

    /// Closes one.
    pub fn close(&mut self, handle: u64) {
        self.open.remove(&handle);
    }

    /// An open one.
    pub fn get(&mut self, handle: u64) -> FsResult<&mut Handle> {
        self.open.get_mut(&handle).ok_or(Errno(c::EBADF))
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::node::JobFile;
    use super::*;
    use crate::job::Verb;
    use crate::sys;

    fn who(uid: u32, pid: u32) -> Who {
        Who { uid, gid: uid, pid }
    }

    #[test]
    fn each_open_has_an_inode_of_its_own() {
        for name in [Node::Verb(Verb::Backup, 0), Node::JobFile(7, JobFile::Status, 0)] {
            let mut handles = Handles::default();
            let first = handles.open(name, &who(1, 10)).unwrap();
            let next = handles.free(name);
            assert_ne!(next, name);
            handles.open(next, &who(1, 10)).unwrap();
            assert!(![name, next].contains(&handles.free(name)));
            handles.close(first);
            assert_eq!(handles.free(name), name);
            // Two have looked it up, one was faster: the other is told to look again, once.
            handles.open(name, &who(1, 10)).unwrap();
            assert_eq!(handles.open(name, &who(1, 11)), Err(Errno(c::ESTALE)));
            assert!(handles.open(name, &who(1, 11)).is_ok());
            assert_eq!(handles.open(name, &who(1, 11)), Err(Errno(c::ESTALE)));
            // Who then found one is told so the next time too.
            assert!(handles.open(handles.free(name), &who(1, 11)).is_ok());
            assert_eq!(handles.open(name, &who(1, 11)), Err(Errno(c::ESTALE)));
        }
        // What nobody waits for needs none.
        let (mut handles, log) = (Handles::default(), Node::JobFile(7, JobFile::Log, 0));
        for _ in 0..2 {
            assert_eq!(handles.free(log), log);
            handles.open(log, &who(1, 10)).unwrap();
        }
    }

    #[test]
    fn no_user_can_have_all() {
        let mut handles = Handles::default();
        let mut fill = |uid| {
            let mut count = 0;
            while handles.open(Node::CtlVersion, &who(uid, 1)).is_ok() {
                count += 1;
            }
            count
        };
        let counts: Vec<usize> = (1000..1009).map(&mut fill).collect();
        assert_eq!(counts, [64, 64, 64, 64, 64, 64, 0, 0, 0]);
        assert_eq!(fill(sys::effective_uid()), 128);
        assert_eq!(fill(0), 0);
    }

    #[test]
    fn jobs_are_synced_together_until_somebody_is_told() {
        let mut asked = Asked::default();
        asked.add(&[1, 2]);
        asked.add(&[3]);
        asked.settle(1, true);
        assert_eq!((&asked.jobs[..], asked.has_failed), (&[2, 3][..], false));
        asked.settle(2, false);
        assert_eq!((&asked.jobs[..], asked.has_failed), (&[3][..], true));
        asked.tell();
        asked.add(&[4]);
        assert_eq!(asked, Asked { jobs: vec![4], ..Asked::default() });
    }
}
