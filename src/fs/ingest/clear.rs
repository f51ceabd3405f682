//! Taking out of the ingest tree what a run has stored, and nothing else.
//!
//! Invariant: a name is removed only while no change can come through the mount, and only if since
//! before the run began nobody had its file open for writing or changed it, it is what the run
//! recorded to the nanosecond, and nobody else on the machine has it open for writing. What a run
//! recorded was synced before the run existed, so whatever ends this halfway loses nothing.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lru::LruCache;
use parking_lot::{Mutex, RwLock, RwLockReadGuard};

use super::{Ingest, remove_dir, remove_file};
use crate::backup::Summary;
use crate::catalog::{DirId, Listing, Reader, RunId};
use crate::entry::{Kind, Metadata, join};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::fs::errno::{Errno, FsResult};
use crate::job::Cleared;
use crate::progress::Progress;
use crate::sys::at::{self, DirReader};
use crate::sys::lease::Unwritten;
use crate::sys::{self, Time, c};

/// Nodes of which a change is remembered, at some bytes each; when there are more, all stays.
const CHANGED_MAX: usize = 1 << 18;
/// Files that are remembered to be removed, for as long as the kernel may still hold their names.
const TAKEN_MAX: usize = 1 << 14;
/// Files with several names whose remaining names are known to be as the run saw them.
const LINKED_MAX: usize = 1 << 16;
/// Lines that tell what stayed.
const LINES_MAX: usize = 1_000;
/// How long a file whose last descriptor was just closed may take to be reported as closed.
const SETTLE_STEP: Duration = Duration::from_millis(10);
const SETTLE_STEPS: u32 = 100;

/// Who changes what: nothing can while something is being cleared, and what does is noted from the
/// moment that somebody is going to clear.
pub(super) struct Changes {
    gate: RwLock<()>,
    seen: Mutex<Option<Seen>>,
    /// What was removed last.
    taken: Mutex<LruCache<u64, ()>>,
}

impl Default for Changes {
    fn default() -> Changes {
        let most = NonZeroUsize::new(TAKEN_MAX).unwrap_or(NonZeroUsize::MIN);
        let taken = Mutex::new(LruCache::new(most));
        Changes { gate: RwLock::default(), seen: Mutex::default(), taken }
    }
}

#[derive(Default)]
struct Seen {
    nodes: HashSet<u64>,
    is_full: bool,
}

impl Seen {
    fn note(&mut self, node: u64) {
        if self.nodes.len() >= CHANGED_MAX {
            self.is_full = true;
        } else {
            self.nodes.insert(node);
        }
    }

    fn has(&self, node: u64) -> bool {
        self.is_full || self.nodes.contains(&node)
    }
}

/// Held by whoever changes something, until that is done.
pub(super) struct Pass<'a> {
    _gate: RwLockReadGuard<'a, ()>,
    seen: &'a Mutex<Option<Seen>>,
}

impl Pass<'_> {
    /// A node that is changed, or that is opened for changes.
    pub(super) fn note(&self, node: u64) {
        if let Some(seen) = &mut *self.seen.lock() {
            seen.note(node);
        }
    }
}

impl Changes {
    /// To be held while these nodes are changed. Never two at once in one thread.
    pub(super) fn pass(&self, nodes: &[u64]) -> Pass<'_> {
        let pass = Pass { _gate: self.gate.read(), seen: &self.seen };
        nodes.iter().for_each(|node| pass.note(*node));
        pass
    }

    /// Notes that the last name of a node was cleared.
    pub(super) fn took(&self, node: u64) {
        self.taken.lock().put(node, ());
    }

    /// Whether this node was cleared lately.
    pub(super) fn has_taken(&self, node: u64) -> bool {
        self.taken.lock().contains(&node)
    }

    fn has_seen(&self, node: u64) -> bool {
        self.seen.lock().as_ref().is_none_or(|seen| seen.has(node))
    }
}

/// What is made of an entry of the run.
enum Fate {
    Removed,
    /// Somebody else has removed it.
    Gone,
    Stays(&'static str),
}

const CHANGED: &str = "it has changed since the run began";
const IN_USE: &str = "it is open for writing";

/// Changes are noted from before the run until this is dropped.
pub struct Clearing {
    ingest: Arc<Ingest>,
}

impl Drop for Clearing {
    fn drop(&mut self) {
        *self.ingest.changes.seen.lock() = None;
    }
}

impl Clearing {
    /// Starts to note changes. The run begins after this.
    pub fn begin(ingest: &Arc<Ingest>) -> Result<Clearing> {
        // Who has just closed a file and asks for this takes it to be closed; the kernel tells us
        // of it a moment later.
        for _ in 0..SETTLE_STEPS {
            if ingest.files.all().iter().all(|open| !open.writable) {
                break;
            }
            std::thread::sleep(SETTLE_STEP);
        }
        let _gate = ingest.changes.gate.write();
        let mut seen = ingest.changes.seen.lock();
        if seen.is_some() {
            return Err(Error::new(ErrorKind::Locked, "the ingest tree is being cleared already"));
        }
        let mut first = Seen::default();
        for open in ingest.files.all().iter().filter(|open| open.writable) {
            first.note(open.node());
        }
        *seen = Some(first);
        drop(seen);
        Ok(Clearing { ingest: Arc::clone(ingest) })
    }

    /// Removes what the run has stored and what is as the run has seen it. `forget` is told of each
    /// name that goes: the directory's node, and the name.
    pub fn clear(
        self,
        catalog: &Path,
        summary: &Summary,
        progress: &Progress,
        forget: &dyn Fn(u64, &OsStr),
    ) -> Cleared {
        let mut walk = Walk {
            ingest: &self.ingest,
            forget,
            progress,
            refused: summary.problems.iter().map(|it| it.path.as_slice()).collect(),
            linked: HashMap::new(),
            cleared: Cleared::default(),
        };
        let done = match summary.counts.problems > summary.problems.len() as u64 {
            true => Err(Error::new(ErrorKind::Io, "the run has had too many problems")),
            false => walk.run(catalog, summary.run),
        };
        if let Err(e) = done {
            walk.say(format!("clearing has stopped: {e}"));
        }
        walk.cleared
    }
}

struct Walk<'a> {
    ingest: &'a Ingest,
    forget: &'a dyn Fn(u64, &OsStr),
    progress: &'a Progress,
    /// What the run could not read, or not in one piece.
    refused: HashSet<&'a [u8]>,
    /// What a file looks like after we have removed a name of it.
    linked: HashMap<u64, (Time, u64)>,
    cleared: Cleared,
}

/// A directory on the way down.
struct Level {
    fd: Arc<OwnedFd>,
    node: u64,
    name: Vec<u8>,
    path: Vec<u8>,
    listing: Listing,
    /// Why the directory itself stays, if it does.
    stays: Option<&'static str>,
    /// Entries of the run in it that stay.
    left: u64,
}

impl Walk<'_> {
    fn run(&mut self, catalog: &Path, run: RunId) -> Result<()> {
        let reader = Reader::open(catalog)?;
        let root = reader.root(&reader.run(run)?)?;
        let mut levels = vec![Level {
            fd: Arc::clone(&self.ingest.root),
            node: self.ingest.root(),
            name: Vec::new(),
            path: Vec::new(),
            listing: Listing::new(run, root.child, 0),
            stays: Some("it is the root"),
            left: 0,
        }];
        let depth_max = usize::try_from(sys::open_files_limit() / 4).unwrap_or(usize::MAX);
        while let Some(level) = levels.last_mut() {
            self.progress.check()?;
            let Some(entry) = level.listing.next(&reader)? else {
                if let Some(level) = levels.pop() {
                    self.leave(level, levels.last_mut());
                }
                continue;
            };
            let path = join(&level.path, &entry.name);
            if self.refused.contains(path.as_slice()) {
                level.left += 1;
                self.stays(&path, "the run has had a problem with it");
                continue;
            }
            let name = OsStr::from_bytes(&entry.name);
            if entry.meta.kind == Kind::Dir {
                let child = (run, entry.child, levels.len());
                let Some(level) = levels.last_mut() else { break };
                let next = match child.2 < depth_max {
                    true => self.enter(level, name, &entry.meta, child),
                    false => Err(Errno(c::ENFILE)),
                };
                match next {
                    Ok(mut next) => {
                        next.path = path;
                        levels.push(next);
                    }
                    Err(Errno(c::ENOENT)) => {}
                    Err(e) => {
                        level.left += 1;
                        self.stays(&path, reason(e));
                    }
                }
                continue;
            }
            let fate = self.remove(level, name, &entry.meta);
            match fate.unwrap_or_else(|e| Fate::Stays(reason(e))) {
                Fate::Removed => {
                    self.cleared.files += 1;
                    (self.forget)(level.node, name);
                }
                Fate::Gone => {}
                Fate::Stays(why) => {
                    level.left += 1;
                    self.stays(&path, why);
                }
            }
        }
        Ok(())
    }

    fn enter(
        &self,
        level: &Level,
        name: &OsStr,
        was: &Metadata,
        (run, child, depth): (RunId, Option<DirId>, usize),
    ) -> FsResult<Level> {
        let (fd, stat) = self.ingest.nodes.find(&level.fd, name)?;
        if !stat.is_dir() || stat.ino != was.ino {
            return Err(Errno(c::ESTALE));
        }
        // Only now: what we are going to remove from it changes it.
        let is_as_it_was = Metadata::from_stat(&stat).is_some_and(|now| now == *was);
        Ok(Level {
            fd,
            node: stat.ino,
            name: name.as_bytes().to_vec(),
            path: Vec::new(),
            listing: Listing::new(run, child, depth),
            stays: (!is_as_it_was).then_some(CHANGED),
            left: 0,
        })
    }

    /// Removes a name of anything but a directory.
    fn remove(&mut self, level: &Level, name: &OsStr, was: &Metadata) -> FsResult<Fate> {
        let changes = &self.ingest.changes;
        let file = match was.kind {
            Kind::File => match at::open_read(&level.fd, name) {
                Err(e) if e.raw_os_error() == Some(c::ENOENT) => return Ok(Fate::Gone),
                file => Some(file?),
            },
            _ => None,
        };
        // Dropped last: closing a removed file frees it, which takes long if it is large.
        let (_file, _fd);
        let gate = changes.gate.write();
        let (fd, stat) = match self.ingest.nodes.find(&level.fd, name) {
            Err(Errno(c::ENOENT)) => return Ok(Fate::Gone),
            found => found?,
        };
        let lease = match &file {
            Some(file) if sys::fstat(file)?.ino != stat.ino => return Ok(Fate::Stays(CHANGED)),
            Some(file) => match Unwritten::guard(file)? {
                Some(lease) => Some(lease),
                None => return Ok(Fate::Stays(IN_USE)),
            },
            None => None,
        };
        // Looked at anew: writers are kept away only now.
        let stat = sys::fstat(&fd)?;
        if changes.has_seen(stat.ino) || !self.is_as_it_was(&stat, was) {
            return Ok(Fate::Stays(CHANGED));
        }
        self.ingest.remove_found(&level.fd, (&fd, &stat), (level.node, name), remove_file)?;
        let now = sys::fstat(&fd)?;
        if now.nlink == 0 {
            changes.took(now.ino);
        } else if self.linked.len() < LINKED_MAX {
            self.linked.insert(now.ino, (now.ctime, now.nlink));
        }
        drop((lease, gate));
        (_file, _fd) = (file, fd);
        Ok(Fate::Removed)
    }

    /// Whether an inode is what the run recorded, but for what we have done to its names.
    fn is_as_it_was(&self, stat: &sys::Stat, was: &Metadata) -> bool {
        let Some(now) = Metadata::from_stat(stat) else { return false };
        match self.linked.get(&stat.ino) {
            Some(&(ctime, nlink)) => {
                (now.ctime, now.nlink) == (ctime, nlink)
                    && Metadata { ctime: was.ctime, nlink: was.nlink, ..now } == *was
            }
            None => now == *was,
        }
    }

    /// Removes a directory after all that is in it, if nothing is left.
    fn leave(&mut self, level: Level, parent: Option<&mut Level>) {
        let Some(parent) = parent else {
            self.count_new(&level);
            return;
        };
        let name = OsStr::from_bytes(&level.name);
        let fate = match level.stays {
            Some(why) => Ok(Fate::Stays(why)),
            None => self.remove_empty(parent, &level, name),
        };
        let why = match fate {
            Ok(Fate::Removed) => {
                self.cleared.dirs += 1;
                (self.forget)(parent.node, name);
                return;
            }
            Ok(Fate::Gone) => return,
            Ok(Fate::Stays(why)) => Some(why),
            // What is in it is told of by itself.
            Err(Errno(c::ENOTEMPTY | c::EEXIST)) => None,
            Err(e) => Some(reason(e)),
        };
        self.count_new(&level);
        if let Some(why) = why {
            self.stays(&level.path, why);
        }
        parent.left += 1;
    }

    fn remove_empty(&self, parent: &Level, level: &Level, name: &OsStr) -> FsResult<Fate> {
        let changes = &self.ingest.changes;
        let _gate = changes.gate.write();
        let (fd, stat) = match self.ingest.nodes.find(&parent.fd, name) {
            Err(Errno(c::ENOENT)) => return Ok(Fate::Gone),
            found => found?,
        };
        if stat.ino != level.node || changes.has_seen(stat.ino) {
            return Ok(Fate::Stays(CHANGED));
        }
        self.ingest.remove_found(&parent.fd, (&fd, &stat), (parent.node, name), remove_dir)?;
        Ok(Fate::Removed)
    }

    /// Counts what is in a directory that the run does not have.
    fn count_new(&mut self, level: &Level) {
        let names = at::open_dir(&level.fd, OsStr::new("."))
            .and_then(DirReader::new)
            .map_or(0, |mut dir| std::iter::from_fn(|| dir.next_item()).count());
        let new = (names as u64).saturating_sub(2).saturating_sub(level.left);
        if new > 0 {
            self.cleared.stayed += new;
            let what = if new == 1 { "entry that is" } else { "entries that are" };
            let path = if level.path.is_empty() { b".".as_slice() } else { &level.path };
            self.say(format!("{}: {new} {what} not in the run stay", Quoted(path)));
        }
    }

    fn stays(&mut self, path: &[u8], why: &str) {
        self.cleared.stayed += 1;
        self.say(format!("{} stays: {why}", Quoted(path)));
    }

    fn say(&mut self, line: String) {
        if self.cleared.lines.len() < LINES_MAX {
            self.cleared.lines.push(line);
        }
    }
}

fn reason(error: Errno) -> &'static str {
    match error.0 {
        c::ENOENT | c::ESTALE | c::ENOTDIR | c::ELOOP | c::EISDIR => CHANGED,
        c::EACCES | c::EPERM => "removing it is not allowed",
        c::ENFILE => "too many files are open",
        _ => "the disk refuses",
    }
}
