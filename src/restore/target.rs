//! Directories of the target, and how a name in one changes hands.
//!
//! Walked one component at a time by open directories and never through a link, so whatever others
//! do to the names meanwhile, what is written goes into a directory that was reached without one.
//! What has a name keeps it until the new thing is complete.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Overwrite;
use super::delete;
use super::shared::{Decision, Shared, state};
use crate::entry::{self, Extra, Metadata, acl};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, Stat, at, c};

/// A directory of the target that is being filled. When the last user lets go of it, it gets its
/// metadata; its parent is kept until then, so times are set from the deepest directory up.
pub struct TargetDir<'a> {
    pub fd: OwnedFd,
    /// Whether it was there before this restore.
    pub is_old: bool,
    /// Whether what the snapshot lacks may go: not in or below what is mounted in the target.
    pub may_delete: bool,
    /// Whether files made in it get an access list from it.
    gives_acl: bool,
    finish: Option<Finish<'a>>,
}

/// What a directory gets at its end.
struct Finish<'a> {
    shared: Arc<Shared<'a>>,
    path: Vec<u8>,
    gets: Gets,
    _parent: Option<Arc<TargetDir<'a>>>,
}

enum Gets {
    /// The snapshot's metadata.
    Metadata(Box<(Metadata, Extra)>),
    /// The mode that it had before it was opened up.
    Mode(u32),
}

/// What a directory is to be.
pub struct DirWish<'w> {
    pub meta: &'w Metadata,
    pub extra: Extra,
    pub path: &'w [u8],
}

impl<'a> TargetDir<'a> {
    /// A directory whose metadata stays as it is.
    pub fn plain(fd: OwnedFd) -> TargetDir<'a> {
        let gives_acl = has_default_acl(&fd);
        TargetDir { fd, is_old: true, may_delete: true, gives_acl, finish: None }
    }

    /// The root of the target, or a directory in `parent`, opened as `fd`.
    pub fn new(
        shared: &Arc<Shared<'a>>,
        fd: OwnedFd,
        is_old: bool,
        wish: DirWish<'_>,
        parent: Option<Arc<TargetDir<'a>>>,
    ) -> Result<TargetDir<'a>> {
        if is_old && shared.is_own(&state(&fd)?) {
            return Err(belongs_to_store());
        }
        let keeps = is_old && shared.work.options.overwrite == Overwrite::Never;
        let mut finish = Finish {
            shared: shared.clone(),
            path: wish.path.to_vec(),
            gets: Gets::Metadata(Box::new((*wish.meta, wish.extra))),
            _parent: parent,
        };
        let mut gives_acl = false;
        let mut finish_needed = true;
        if is_old {
            gives_acl = has_default_acl(&fd);
            let now = state(&fd)?;
            let is_closed = !shared.is_root && now.mode & 0o700 != 0o700;
            if is_closed {
                // Who may not do this may perhaps write all the same, by other rights.
                let _ = at::fchmod(&fd, now.mode & 0o7777 | 0o700);
            }
            if keeps {
                finish.gets = Gets::Mode(now.mode & 0o7777);
                finish_needed = is_closed;
            }
            delete::sweep(&fd);
        } else if finish._parent.as_ref().is_some_and(|it| it.gives_acl) {
            remove_acl(&fd)?;
        }
        let finish = finish_needed.then_some(finish);
        Ok(TargetDir { fd, is_old, may_delete: true, gives_acl, finish })
    }

    /// Makes directory `name`, or takes the one that is there, and lets this process write into it.
    pub fn make_dir(
        self: &Arc<TargetDir<'a>>,
        shared: &Arc<Shared<'a>>,
        name: &OsStr,
        wish: DirWish<'_>,
    ) -> Result<TargetDir<'a>> {
        let failed = |e| Error::io("creating it", e);
        let mut is_old = false;
        match at::mkdir(&self.fd, name, 0o700) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let stat = at::stat(&self.fd, name).map_err(failed)?;
                if shared.is_own(&stat) {
                    return Err(belongs_to_store());
                }
                is_old = stat.is_dir();
                if !is_old {
                    if shared.decide(&stat, wish.meta) == Decision::Keep {
                        let message = "something that is no directory is in the way and stays";
                        return Err(Error::new(ErrorKind::Io, message));
                    }
                    at::unlink(&self.fd, name).map_err(failed)?;
                    at::mkdir(&self.fd, name, 0o700).map_err(failed)?;
                }
            }
            other => other.map_err(failed)?,
        }
        let opened = match open_there(&self.fd, name) {
            Err(e) if is_old && e.kind() == io::ErrorKind::PermissionDenied => {
                open_up(&self.fd, name)
            }
            other => other,
        };
        let (fd, is_in_mount) = opened.map_err(|e| Error::io("opening it", e))?;
        let mut dir = TargetDir::new(shared, fd, is_old, wish, Some(self.clone()))?;
        dir.may_delete = self.may_delete && is_in_mount;
        Ok(dir)
    }

    /// Creates a file that is not there yet; the second is its state.
    pub fn create(&self, name: &OsStr) -> io::Result<(File, Stat)> {
        let file = sys::target::create_unfinished(&self.fd, name)?;
        if self.gives_acl {
            remove_acl(file.as_fd()).map_err(|e| io::Error::other(e.to_string()))?;
        }
        let now = sys::fstat(&file)?;
        Ok((file, now))
    }

    /// Gives what was made beside `name` that name. A directory that has it gives way if it is
    /// empty, or may be deleted.
    pub fn put_in_place(
        &self,
        shared: &Shared<'_>,
        temp: &OsStr,
        name: &OsStr,
        path: &[u8],
    ) -> Result<()> {
        let failed = |e| Error::io("giving it its name", e);
        let mut renamed = at::rename(&self.fd, temp, &self.fd, name, 0);
        if let Err(e) = &renamed
            && matches!(e.raw_os_error(), Some(c::EISDIR | c::EEXIST | c::ENOTEMPTY))
        {
            delete::make_room(shared, self, name, path)?;
            renamed = at::rename(&self.fd, temp, &self.fd, name, 0);
        }
        renamed.map_err(failed)?;
        // Two names of one file are not renamed over each other; the temporary one goes then.
        match at::unlink(&self.fd, temp) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(e)),
            _ => Ok(()),
        }
    }
}

impl Drop for TargetDir<'_> {
    fn drop(&mut self) {
        let Some(it) = &self.finish else { return };
        let fd = self.fd.as_fd();
        match &it.gets {
            Gets::Mode(mode) => {
                if let Err(e) = at::fchmod(fd, *mode) {
                    it.shared.problem(&it.path, Error::io("setting its mode back", e));
                }
            }
            Gets::Metadata(wish) => {
                let (meta, extra) = &**wish;
                if self.is_old && entry::remove_other_xattrs(fd, extra).is_err() {
                    log::info!("attributes of an older directory stay");
                }
                match state(fd) {
                    Ok(now) => it.shared.apply(fd, &now, meta, extra, &it.path),
                    Err(e) => it.shared.problem(&it.path, e),
                }
                it.shared.apply_flags(fd, extra, &it.path);
            }
        }
    }
}

/// The error for what may not be written over.
pub fn belongs_to_store() -> Error {
    Error::new(ErrorKind::Denied, "what is there belongs to the store itself: it stays")
}

/// Opens a directory; the second is whether it is known to lie in the same mount as `dir`.
pub fn open_there(dir: &OwnedFd, name: &OsStr) -> io::Result<(OwnedFd, bool)> {
    match sys::target::open_dir_in_mount(dir, name) {
        Ok(fd) => Ok((fd, true)),
        // Restoring into a mount is fine, and so it is where the kernel cannot tell.
        Err(_) => Ok((at::open_dir(dir, name)?, false)),
    }
}

/// Opens a directory that is closed to its own owner, who opens it up for that.
fn open_up(dir: &OwnedFd, name: &OsStr) -> io::Result<(OwnedFd, bool)> {
    let handle = at::open_path(dir, name)?;
    let now = sys::fstat(&handle)?;
    if !now.is_dir() {
        return Err(io::Error::from_raw_os_error(c::ENOTDIR));
    }
    at::chmod_fd(&handle, now.mode & 0o7777 | 0o700)?;
    open_there(dir, name)
}

fn has_default_acl(fd: &OwnedFd) -> bool {
    at::get_xattr_fd(fd, OsStr::new(acl::DEFAULT)).is_ok()
}

/// Takes off what a directory has given to what was made in it.
fn remove_acl(fd: impl AsFd) -> Result<()> {
    for key in [acl::ACCESS, acl::DEFAULT] {
        let Err(e) = at::remove_xattr_fd(&fd, OsStr::new(key)) else { continue };
        let is_absent = matches!(e.raw_os_error(), Some(c::ENODATA | c::EOPNOTSUPP));
        // A file has no default list, and says that it may not have one.
        let is_file = key == acl::DEFAULT && e.raw_os_error() == Some(c::EACCES);
        if !is_absent && !is_file {
            return Err(Error::io("removing an inherited access list", e));
        }
    }
    Ok(())
}

/// Begins the names of what is being made beside its own name.
const TEMP_PREFIX: &str = ".raidtape-restoring-";

/// A name for something that is to get another one: this process's, for the time being.
pub fn temp_name() -> OsString {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    OsString::from(format!("{TEMP_PREFIX}{}-{number}", std::process::id()))
}

/// The process that uses a temporary name, if it is one.
pub fn temp_owner(name: &OsStr) -> Option<u32> {
    let rest = name.to_str()?.strip_prefix(TEMP_PREFIX)?;
    let (process, number) = rest.split_once('-')?;
    number.parse::<u64>().ok()?;
    process.parse().ok()
}

/// The name of an entry.
pub fn os(name: &[u8]) -> &OsStr {
    OsStr::from_bytes(name)
}
