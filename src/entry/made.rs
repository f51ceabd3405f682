//! Putting metadata on what a restore has just made, or taken over.
//!
//! The order is that of `metadata.rs`; what is so already is left alone, for most of what a restore
//! makes belongs to who restores. Everything goes through an open handle, never by name: nobody who
//! may write in the directory can put something else in the place of what is meant.

use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;

use super::metadata::{note_xattr, permitted_mode};
use super::{Applied, Extra, Kind, Metadata, apply_fd};
use crate::sys::{Stat, at, c};

/// Puts metadata on the open file or directory `fd`, of which `now` is the state. The mode comes
/// last: until then a file is seen to be incomplete.
pub fn apply_made(fd: BorrowedFd<'_>, now: &Stat, meta: &Metadata, extra: &Extra) -> Applied {
    if !extra.xattrs.is_empty() {
        return apply_fd(fd, meta, extra);
    }
    let mut applied = Applied::default();
    let is_given = (now.uid, now.gid) != (meta.uid, meta.gid);
    if is_given {
        applied.note_owner(at::chown_fd(fd, Some(meta.uid), Some(meta.gid)));
    }
    applied.note("times", at::set_times_fd(fd, Some(meta.mtime), Some(meta.mtime)));
    let mode = permitted_mode(meta.mode, &applied);
    // Changing the owner clears these bits.
    let is_cleared = is_given && mode & (c::S_ISUID | c::S_ISGID) != 0;
    if now.mode & 0o7777 != mode || is_cleared {
        applied.note("mode", at::fchmod(fd, mode));
    }
    applied
}

/// Puts metadata on what the `O_PATH` handle `fd` stands for, of which `now` is the state: a link,
/// a node or a file.
pub fn apply_handle(fd: BorrowedFd<'_>, now: &Stat, meta: &Metadata, extra: &Extra) -> Applied {
    let mut applied = Applied::default();
    if (now.uid, now.gid) != (meta.uid, meta.gid) {
        applied.note_owner(at::chown_fd(fd, Some(meta.uid), Some(meta.gid)));
    }
    for (key, value) in &extra.xattrs {
        let key = OsStr::from_bytes(key);
        note_xattr(&mut applied, key, at::set_xattr_fd(fd, key, value, 0));
    }
    if meta.kind != Kind::Symlink {
        applied.note("mode", at::chmod_fd(fd, permitted_mode(meta.mode, &applied)));
    }
    applied.note("times", at::set_times_fd(fd, Some(meta.mtime), Some(meta.mtime)));
    applied
}

/// Attributes that belong to a file and not to the system it lies on.
const KEPT_NAMESPACES: [&[u8]; 3] = [b"user.", b"system.posix_acl_", b"security.capability"];

/// Removes from `fd` the extended attributes that `extra` does not have. Labels that the system
/// gives, as those of SELinux, stay.
pub fn remove_other_xattrs(fd: BorrowedFd<'_>, extra: &Extra) -> io::Result<()> {
    for key in at::list_xattrs_fd(fd)? {
        let bytes = key.as_bytes();
        let is_ours = KEPT_NAMESPACES.iter().any(|it| bytes.starts_with(it));
        if is_ours && !extra.xattrs.iter().any(|(it, _)| it == bytes) {
            match at::remove_xattr_fd(fd, &key) {
                Err(e) if e.raw_os_error() != Some(c::ENODATA) => return Err(e),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Whether `fd` has the extended attributes of `extra`, and no others that belong to a file.
pub fn has_xattrs(fd: BorrowedFd<'_>, extra: &Extra) -> io::Result<bool> {
    let there = at::list_xattrs_fd(fd)?;
    let is_ours = |key: &[u8]| KEPT_NAMESPACES.iter().any(|it| key.starts_with(it));
    let wanted = |key: &[u8]| extra.xattrs.iter().any(|(it, _)| it == key);
    if there.iter().any(|key| is_ours(key.as_bytes()) && !wanted(key.as_bytes())) {
        return Ok(false);
    }
    for (key, value) in &extra.xattrs {
        match at::get_xattr_fd(fd, OsStr::from_bytes(key)) {
            Ok(found) if found == *value => {}
            Ok(_) => return Ok(false),
            Err(e) if matches!(e.raw_os_error(), Some(c::ENODATA | c::EOPNOTSUPP)) => {
                return Ok(false);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}
