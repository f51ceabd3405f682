//! Who may do what with control files: modes and owners, as with any file, kept over remounts.
//!
//! A file's mode decides at every write, by the writing process's own user and groups: an open file
//! that is handed on carries no right. The files of a job follow the file that asked for it: who
//! may use that one may watch, and who may write to it may cancel.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::super::errno::{Errno, FsResult};
use super::super::ingest::SetAttr;
use crate::job::{Access, Queue, VERBS, Verb};
use crate::sys::{self, c, process};

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Who {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Thread; 0 where it cannot be seen.
    pub pid: u32,
}

impl Who {
    fn is_in(&self, gid: u32) -> bool {
        self.gid == gid
            || self.pid != 0 && process::status(self.pid).is_ok_and(|it| it.groups.contains(&gid))
    }
}

/// Mode and owners of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Rights {
    /// Checks that somebody may do what the bits of `want` say: 4 to read, 2 to write.
    pub fn check(&self, who: &Who, want: u32) -> FsResult<()> {
        let bits = match who.uid {
            0 => return Ok(()),
            uid if uid == self.uid => self.mode >> 6,
            _ if who.is_in(self.gid) => self.mode >> 3,
            _ => self.mode,
        };
        match bits & want == want {
            true => Ok(()),
            false => Err(Errno(c::EACCES)),
        }
    }

    /// Those of the files that tell of a job, where these are its verb's.
    pub fn to_watch(self) -> Rights {
        Rights { mode: self.mode & 0o444 | (self.mode & 0o222) << 1, ..self }
    }

    /// Those of the file that cancels it.
    pub fn to_cancel(self) -> Rights {
        Rights { mode: self.mode & 0o222, ..self }
    }
}

/// How many of something there may be at a time, so that nobody takes them from all others: root
/// and the mount's owner find some whatever other users have.
pub struct Shares {
    /// Of all users.
    pub all: usize,
    /// Of all that are neither root nor the owner.
    pub others: usize,
    /// Of each of these.
    pub each: usize,
}

impl Shares {
    /// Whether a user may have one more, where these users have one each.
    pub fn admit(&self, uid: u32, held: impl Iterator<Item = u32>) -> bool {
        let owner = sys::effective_uid();
        let is_first = |uid: u32| uid == 0 || uid == owner;
        let (mut all, mut others, mut own) = (0, 0, 0);
        for it in held {
            all += 1;
            others += usize::from(!is_first(it));
            own += usize::from(it == uid);
        }
        all < self.all && (is_first(uid) || others < self.others && own < self.each)
    }
}

/// A control file whose rights can be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum File {
    /// A verb's.
    Verb(Verb),
    /// `status`.
    Status,
    /// `version`.
    Version,
}

impl File {
    fn name(self) -> &'static str {
        match self {
            File::Verb(verb) => verb.as_str(),
            File::Status => "status",
            File::Version => "version",
        }
    }
}

/// The rights on all control files.
pub struct Guard {
    uid: u32,
    gid: u32,
    changed: Mutex<HashMap<&'static str, Access>>,
}

impl Guard {
    /// Usual rights of a mount that belongs to `uid` and `gid`, and what has been changed of them.
    pub fn new((uid, gid): (u32, u32), queue: &Queue) -> Guard {
        let kept = queue.access().unwrap_or_else(|e| {
            log::warn!("modes of control files are as usual, what was kept cannot be read: {e}");
            Vec::new()
        });
        let files = VERBS.into_iter().map(File::Verb).chain([File::Status, File::Version]);
        let changed = files.filter_map(|file| {
            let name = file.name();
            Some((name, kept.iter().find(|it| it.0 == name)?.1))
        });
        Guard { uid, gid, changed: Mutex::new(changed.collect()) }
    }

    /// The rights on a file.
    pub fn of(&self, file: File) -> Rights {
        let access = self.changed.lock().get(file.name()).copied().unwrap_or_default();
        let (usual, possible) = match file {
            File::Verb(_) => (0o600, 0o666),
            File::Status | File::Version => (0o444, 0o444),
        };
        Rights {
            mode: access.mode.unwrap_or(usual) & possible,
            uid: access.uid.unwrap_or(self.uid),
            gid: access.gid.unwrap_or(self.gid),
        }
    }

    /// The rights on what a verb of this name asks with; nobody but the owner where it is unknown.
    pub fn of_verb(&self, verb: &str) -> Rights {
        match VERBS.into_iter().find(|it| it.as_str() == verb) {
            Some(verb) => self.of(File::Verb(verb)),
            None => Rights { mode: 0o600, uid: self.uid, gid: self.gid },
        }
    }

    /// Changes mode and owners, as far as whoever asks may.
    pub fn change(&self, queue: &Queue, file: File, who: &Who, change: &SetAttr) -> FsResult<()> {
        let now = self.of(file);
        let is_owner = who.uid == 0 || who.uid == now.uid;
        let gives_away = change.uid.is_some_and(|it| it != now.uid);
        let leaves_group = change.gid.is_some_and(|it| it != now.gid && !who.is_in(it));
        if !is_owner || who.uid != 0 && (gives_away || leaves_group) {
            return Err(Errno(c::EPERM));
        }
        let mut changed = self.changed.lock();
        let mut access = changed.get(file.name()).copied().unwrap_or_default();
        access.mode = change.mode.map(|it| it & 0o666).or(access.mode);
        access.uid = change.uid.or(access.uid);
        access.gid = change.gid.or(access.gid);
        // First kept, then true: what has been answered lasts.
        queue.set_access(file.name(), access).map_err(|e| {
            log::warn!("changing the rights on .ctl/{}: {e}", file.name());
            Errno::from(&e)
        })?;
        changed.insert(file.name(), access);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(uid: u32, gid: u32) -> Who {
        Who { uid, gid, pid: 0 }
    }

    #[test]
    fn the_first_class_that_fits_decides() {
        let rights = Rights { mode: 0o062, uid: 10, gid: 20 };
        // An owner who has no right has none as a member of the group.
        assert!(rights.check(&who(10, 20), 2).is_err());
        assert!(rights.check(&who(11, 20), 6).is_ok());
        assert!(rights.check(&who(11, 21), 2).is_ok());
        assert!(rights.check(&who(11, 21), 4).is_err());
        assert!(rights.check(&who(0, 0), 6).is_ok());
    }

    #[test]
    fn groups_beside_the_main_one_count() {
        let own = process::status(std::process::id()).unwrap().groups;
        let who = Who { uid: 11, gid: 12, pid: std::process::id() };
        for gid in own {
            assert!(Rights { mode: 0o060, uid: 10, gid }.check(&who, 6).is_ok());
        }
        assert!(Rights { mode: 0o060, uid: 10, gid: 4_000_000 }.check(&who, 2).is_err());
    }

    #[test]
    fn a_jobs_files_follow_its_verbs() {
        let rights = |mode| Rights { mode, uid: 1, gid: 1 };
        assert_eq!(rights(0o600).to_watch().mode, 0o400);
        assert_eq!(rights(0o620).to_watch().mode, 0o440);
        assert_eq!(rights(0o640).to_cancel().mode, 0o200);
        assert_eq!(rights(0o660).to_cancel().mode, 0o220);
    }
}
