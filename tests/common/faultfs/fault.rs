//! Which operation goes wrong, and how.
//!
//! Invariant: operations are numbered from 1 in the order in which they reach the disk; what is not
//! one that changes its state has numbers of its own.

use rustix::process::{Pid, Signal, kill_process};

use super::disk::EIO;

pub const EMFILE: i32 = 24;
pub const ENOSPC: i32 = 28;
pub const EDQUOT: i32 = 122;

/// What is asked of the disk. All but `Open` change its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    Create,
    Mkdir,
    Symlink,
    Mknod,
    Link,
    Unlink,
    Rmdir,
    Rename,
    Write,
    Truncate,
    Setattr,
    Setxattr,
    Allocate,
    Fsync,
    FsyncDir,
    Open,
}

impl Op {
    /// Whether a disk can answer this operation so.
    pub fn can_fail(self, errno: i32) -> bool {
        match errno {
            EMFILE => matches!(self, Op::Open | Op::Create),
            ENOSPC | EDQUOT => {
                use Op::{Fsync, FsyncDir, Open, Rmdir, Setattr, Truncate, Unlink};
                !matches!(self, Fsync | FsyncDir | Open | Rmdir | Setattr | Truncate | Unlink)
            }
            _ => self != Op::Open,
        }
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails, and nothing is done.
    Errno(i32),
    /// Half of the bytes are written.
    Short,
    /// The process that asks is killed; whether that is done still.
    Kill(bool),
    /// This bit of what is read is another.
    Flip(u64),
}

/// Whether it is only this one, or all from this one on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lasting {
    Once,
    ForEver,
}

/// What is to be made of an operation.
pub enum Verdict {
    Do,
    Fail(i32),
    Short,
    DoAndDie,
}

/// What goes wrong on a disk, and what it has seen.
#[derive(Default)]
pub struct Rules {
    /// Operation, what goes wrong with it, and whether with all that follow.
    pub faults: Vec<(u64, Fault, Lasting)>,
    /// The same for reads.
    pub read_fault: Option<(u64, Fault)>,
    /// Syncs say that they are done, and do nothing.
    pub is_sync_off: bool,
    /// Operations that change the state so far; for EMFILE those count that open.
    pub changes: u64,
    pub opens: u64,
    pub reads: u64,
    /// How often something went wrong.
    pub hits: u64,
    /// Somebody was killed: nothing of what it still asks for is done.
    pub is_frozen: bool,
}

impl Rules {
    pub fn with(faults: &[(u64, Fault, Lasting)]) -> Rules {
        Rules { faults: faults.to_vec(), ..Rules::default() }
    }

    pub fn judge(&mut self, op: Op, pid: u32) -> Verdict {
        self.changes += u64::from(op != Op::Open);
        self.opens += u64::from(matches!(op, Op::Open | Op::Create));
        if self.is_frozen {
            return Verdict::Fail(EIO);
        }
        let (changes, opens) = (self.changes, self.opens);
        let due = |it: &&(u64, Fault, Lasting)| {
            let (at, fault, lasting) = **it;
            let is_opening = fault == Fault::Errno(EMFILE);
            let now = if is_opening { opens } else { changes };
            let fits = match fault {
                Fault::Errno(errno) => op.can_fail(errno),
                Fault::Short => op == Op::Write,
                _ => op != Op::Open,
            };
            fits && (now == at || lasting == Lasting::ForEver && now > at)
        };
        let Some((_, fault, _)) = self.faults.iter().find(due).copied() else {
            return Verdict::Do;
        };
        self.hits += 1;
        match fault {
            Fault::Errno(errno) => Verdict::Fail(errno),
            Fault::Short => Verdict::Short,
            Fault::Kill(done) => {
                self.is_frozen = true;
                let pid = Pid::from_raw(pid as i32).expect("a process that asks");
                kill_process(pid, Signal::KILL).expect("who asks is there");
                if done { Verdict::DoAndDie } else { Verdict::Fail(EIO) }
            }
            Fault::Flip(_) => Verdict::Do,
        }
    }
}
