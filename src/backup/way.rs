//! The directories on the way down to where a scan is.
//!
//! Only the root and the deepest few are held open, so a tree may be deeper than a process may have
//! files open. A directory that was closed is opened again on the way back, from its child or from
//! the root, and has to be the same one: device and inode number are compared.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::ahead::Name;
use super::filter::Verdict;
use super::scan::BasisCursor;
use crate::catalog::DirId;
use crate::sys::{self, Stat, at, path_from};

/// Directories that are held open besides the root.
const OPEN_MAX: usize = 32;

/// A directory being walked.
pub struct Level {
    fd: Option<Arc<OwnedFd>>,
    /// Device and inode number.
    id: (u64, u64),
    path_len: usize,
    pub dir: DirId,
    /// What the filter says of it.
    pub verdict: Verdict,
    /// Names still to come, last one first.
    pub names: Vec<Name>,
    /// How many of them, from the next one on, have been gone through for directories to list
    /// ahead; and how many of those there were.
    pub seen: usize,
    pub dirs_ahead: usize,
    pub basis: BasisCursor,
}

/// The way down.
#[derive(Default)]
pub struct Way {
    levels: Vec<Level>,
    /// Path of the deepest directory below the root.
    path: Vec<u8>,
}

impl Way {
    /// The deepest directory, and its path.
    pub fn deepest(&mut self) -> Option<(&mut Level, &[u8])> {
        self.levels.last_mut().map(|level| (level, &*self.path))
    }

    /// The open descriptor of the deepest directory.
    pub fn fd(&self) -> io::Result<Arc<OwnedFd>> {
        let fd = self.levels.last().and_then(|it| it.fd.clone());
        fd.ok_or_else(|| io::Error::other("its directory is not open"))
    }

    /// Goes into the directory at `path`, which is open as `fd`.
    pub fn enter(
        &mut self,
        path: &[u8],
        fd: Arc<OwnedFd>,
        stat: &Stat,
        dir: DirId,
        names: Vec<Name>,
        basis: BasisCursor,
    ) {
        self.path.clear();
        self.path.extend_from_slice(path);
        let (id, path_len) = ((stat.dev, stat.ino), path.len());
        let (verdict, seen, dirs_ahead, fd) = (Verdict::In, 0, 0, Some(fd));
        let level = Level { fd, id, path_len, dir, verdict, names, seen, dirs_ahead, basis };
        self.levels.push(level);
        let closed = self.levels.len().saturating_sub(OPEN_MAX + 1);
        if closed > 0
            && let Some(level) = self.levels.get_mut(closed)
        {
            level.fd = None;
        }
    }

    /// Goes back to the directory above, which fails if that is not there any more; it is the
    /// deepest one then nevertheless.
    pub fn leave(&mut self) -> io::Result<()> {
        let Some(left) = self.levels.pop() else { return Ok(()) };
        let Some(level) = self.levels.last() else { return Ok(()) };
        self.path.truncate(level.path_len);
        if level.fd.is_some() {
            return Ok(());
        }
        let above = left.fd.and_then(|fd| at::open_dir(&fd, OsStr::new("..")).ok());
        let fd = match above.filter(|fd| is_dir(fd, level.id)) {
            Some(fd) => fd,
            None => self.open_from_root(level)?,
        };
        if let Some(level) = self.levels.last_mut() {
            level.fd = Some(Arc::new(fd));
        }
        Ok(())
    }

    fn open_from_root(&self, level: &Level) -> io::Result<OwnedFd> {
        let root = self.levels.first().and_then(|it| it.fd.as_ref());
        let root = root.ok_or_else(|| io::Error::other("the source is not open"))?;
        let fd = open_below(root, &self.path)?;
        match is_dir(&fd, level.id) {
            true => Ok(fd),
            false => Err(io::Error::other("it was moved away while it was being read")),
        }
    }
}

fn is_dir(fd: &OwnedFd, id: (u64, u64)) -> bool {
    sys::fstat(fd).is_ok_and(|it| (it.dev, it.ino) == id)
}

/// Opens the directory at `path` below `root`, one component at a time.
pub fn open_below(root: &OwnedFd, path: &[u8]) -> io::Result<OwnedFd> {
    let mut fd = root.try_clone()?;
    for name in path.split(|byte| *byte == b'/').filter(|it| !it.is_empty()) {
        fd = at::open_dir(&fd, path_from(name).as_os_str())?;
    }
    Ok(fd)
}
