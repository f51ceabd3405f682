//! Taking metadata off a tree and putting it on one.
//!
//! Order of application: owner, then extended attributes, then mode, then times, and file flags
//! last of all ([`super::apply_flags`]); changing the owner clears setuid bits and capabilities,
//! and everything touches the times. Nothing follows a link.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::{Extra, Kind, Metadata, flags};
use crate::sys::{at, c};

/// Reads link target and extended attributes of `name` in `dir`, which is not opened.
pub fn capture(dir: BorrowedFd<'_>, name: &OsStr, kind: Kind) -> io::Result<Extra> {
    let mut extra = Extra::default();
    if kind == Kind::Symlink {
        extra.target = Some(at::readlink(dir, name)?.into_vec());
    }
    for key in at::list_xattrs(dir, name)? {
        let value = at::get_xattr(dir, name, &key);
        add_xattr(&mut extra, key, value)?;
    }
    extra.xattrs.sort();
    Ok(extra)
}

/// Reads extended attributes and flags of a regular file or a directory that is open for reading:
/// of the very one that is read, whatever has its name by now.
pub fn capture_file(file: BorrowedFd<'_>) -> io::Result<Extra> {
    let mut extra = Extra { flags: flags::capture(file)?, ..Extra::default() };
    for key in at::flist_xattrs(file)? {
        let value = at::fget_xattr(file, &key);
        add_xattr(&mut extra, key, value)?;
    }
    extra.xattrs.sort();
    Ok(extra)
}

fn add_xattr(extra: &mut Extra, key: OsString, value: io::Result<Vec<u8>>) -> io::Result<()> {
    match value {
        Ok(value) => extra.xattrs.push((key.into_vec(), value)),
        // Removed since it was listed, or listed but not for us to read: not part of the file.
        Err(e) if matches!(e.raw_os_error(), Some(c::ENODATA | c::EOPNOTSUPP)) => {}
        Err(e) => return Err(e),
    }
    Ok(())
}

/// What of an entry's metadata could not be put on, in words; empty when all was.
#[derive(Debug, Default)]
pub struct Applied {
    /// The owner could not be set because only root may do that. Not an error for other users.
    pub owner_not_permitted: bool,
    /// Everything else that failed.
    pub failed: Vec<(&'static str, io::Error)>,
}

impl Applied {
    pub(super) fn note(&mut self, what: &'static str, result: io::Result<()>) {
        if let Err(error) = result {
            self.failed.push((what, error));
        }
    }

    pub(super) fn note_owner(&mut self, result: io::Result<()>) {
        match result {
            Err(e) if e.raw_os_error() == Some(c::EPERM) => self.owner_not_permitted = true,
            other => self.note("owner", other),
        }
    }
}

/// Puts metadata on `name` in `dir`, whatever kind of entry it is.
pub fn apply(dir: BorrowedFd<'_>, name: &OsStr, meta: &Metadata, extra: &Extra) -> Applied {
    let mut applied = Applied::default();
    applied.note_owner(at::chown(dir, name, Some(meta.uid), Some(meta.gid)));
    for (key, value) in &extra.xattrs {
        let key = OsStr::from_bytes(key);
        let result = at::set_xattr(dir, name, key, value);
        note_xattr(&mut applied, key, result);
    }
    if meta.kind != Kind::Symlink {
        let mode = permitted_mode(meta.mode, &applied);
        applied.note("mode", at::chmod(dir, name, mode));
    }
    applied.note("times", at::set_times(dir, name, Some(meta.mtime), Some(meta.mtime)));
    applied
}

/// Puts metadata on an open file or directory.
pub fn apply_fd(fd: BorrowedFd<'_>, meta: &Metadata, extra: &Extra) -> Applied {
    let mut applied = Applied::default();
    applied.note_owner(at::chown_fd(fd, Some(meta.uid), Some(meta.gid)));
    for (key, value) in &extra.xattrs {
        let key = OsStr::from_bytes(key);
        let result = at::fset_xattr(fd, key, value);
        note_xattr(&mut applied, key, result);
    }
    applied.note("mode", at::fchmod(fd, permitted_mode(meta.mode, &applied)));
    applied.note("times", at::set_times_fd(fd, Some(meta.mtime), Some(meta.mtime)));
    applied
}

/// Setuid and setgid belong to an owner: without the owner they would give away somebody else's.
pub(super) fn permitted_mode(mode: u32, applied: &Applied) -> u32 {
    match applied.owner_not_permitted {
        true => mode & !(c::S_ISUID | c::S_ISGID),
        false => mode,
    }
}

/// `security.` and `trusted.` attributes are root's business: for others they count with the owner.
pub(super) fn note_xattr(applied: &mut Applied, key: &OsStr, result: io::Result<()>) {
    let is_roots = [&b"security."[..], b"trusted."].iter().any(|it| key.as_bytes().starts_with(it));
    match result {
        Err(e) if is_roots && e.raw_os_error() == Some(c::EPERM) => {
            applied.owner_not_permitted = true;
        }
        Err(e) => {
            let text = format!("{}: {e}", OsString::from(key).display());
            applied.failed.push(("extended attribute", io::Error::new(e.kind(), text)));
        }
        Ok(()) => {}
    }
}
