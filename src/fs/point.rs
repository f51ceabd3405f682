//! The place of a mount: checked before, taken away after.
//!
//! A mount may have parts, one mounted upon a directory of the other: they end together, the last
//! one first. Invariant: what is taken away is told by the kernel's number of the mount, so that
//! one that somebody else has put there, before or since, is never hit.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Options;
use crate::catalog::{Reader, ingest_dir};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::{self, MountPoint, quoted};

/// What all mounts of this kind go through.
const FUSE_DEVICE: &str = "/dev/fuse";

/// Checks that the mount point is a directory that overlaps nothing the mount is made of.
pub fn check(options: &Options) -> Result<PathBuf> {
    let given = &options.mountpoint;
    let failed = |e: std::io::Error| match e.raw_os_error() {
        Some(sys::c::ENOTCONN) => {
            let message = format!(
                "{} is the mount point of a mount whose process has died: run raidtape umount {}",
                quoted(given),
                quoted(given)
            );
            Error::new(ErrorKind::Io, message)
        }
        _ => Error::io(format!("mount point {}", quoted(given)), e),
    };
    let mountpoint = given.canonicalize().map_err(failed)?;
    // A dead mount can be named, but not looked at.
    if !std::fs::metadata(&mountpoint).map_err(failed)?.is_dir() {
        return Err(Error::usage(format!("mount point {} is not a directory", quoted(given))));
    }
    if is_mounted(&mountpoint)? {
        let message = format!("a catalog is mounted on {} already", quoted(given));
        return Err(Error::usage(message));
    }
    let mut inner: Vec<(&str, PathBuf)> = vec![("ingest directory", ingest_dir(&options.catalog))];
    for volume in Reader::open(&options.catalog)?.volumes()? {
        inner.push(("volume", volume.path));
    }
    for (what, path) in inner {
        let path = path.canonicalize().unwrap_or(path);
        if path.starts_with(&mountpoint) || mountpoint.starts_with(&path) {
            let message = format!(
                "mount point {} overlaps the {what} {}: choose another",
                quoted(&mountpoint),
                quoted(&path)
            );
            return Err(Error::usage(message));
        }
    }
    if options.catalog.starts_with(&mountpoint) {
        let message = format!(
            "mount point {} would hide the catalog {}: choose another",
            quoted(&mountpoint),
            quoted(&options.catalog)
        );
        return Err(Error::usage(message));
    }
    Ok(mountpoint)
}

fn table() -> Result<Vec<MountPoint>> {
    sys::mount_points().map_err(|e| Error::io("listing mounts", e))
}

/// Whether one of our mounts is on `mountpoint`, alive or dead.
pub fn is_mounted(mountpoint: &Path) -> Result<bool> {
    Ok(table()?.iter().any(|it| it.path == mountpoint && it.fs_type == sys::OWN_FS_TYPE))
}

/// The error of a mount that the kernel, or the program that mounts for ordinary users, refused.
pub fn mount_failed(mountpoint: &Path, error: &std::io::Error) -> Error {
    let device = File::options().read(true).write(true).open(FUSE_DEVICE);
    let advice = match (device, error.kind()) {
        (Err(e), _) => format!(
            "; {FUSE_DEVICE} cannot be opened ({e}): it needs the kernel's module fuse, and the \
             mode 666 for other users than root"
        ),
        (_, std::io::ErrorKind::NotFound | std::io::ErrorKind::PermissionDenied)
            if sys::effective_uid() != 0 =>
        {
            "; other users than root need the program fusermount3, of the package fuse3".to_owned()
        }
        _ => String::new(),
    };
    // What that program says ends with a line break.
    let said = error.to_string();
    let message = format!("mounting on {}: {}{advice}", quoted(mountpoint), said.trim_end());
    Error::new(ErrorKind::Io, message)
}

/// Our mounts on `mountpoint` with their parts, alive or dead, in the order in which they came.
///
/// A part is mounted on a directory of the other and has the same source. Whatever else is below is
/// somebody else's: it may have been there before, hidden by what is mounted now.
pub fn mounts_at(mountpoint: &Path) -> Result<Vec<MountPoint>> {
    let mut own = table()?;
    own.retain(|it| it.fs_type == sys::OWN_FS_TYPE);
    let whole: Vec<MountPoint> = own.iter().filter(|it| it.path == mountpoint).cloned().collect();
    let snapshots = mountpoint.join("snapshots");
    own.retain(|it| {
        let is_part = |of: &MountPoint| it.parent == of.id && it.source == of.source;
        it.path == mountpoint || it.path == snapshots && whole.iter().any(is_part)
    });
    Ok(own)
}

/// Leaves out what is not mounted any more.
pub fn forget_gone(mounts: &mut Vec<MountPoint>) -> Result<()> {
    let table = table()?;
    mounts.retain(|it| table.contains(it));
    Ok(())
}

/// Takes away all our mounts on `mountpoint`, dead or alive. Open files on them stay until they are
/// closed.
pub fn unmount(mountpoint: &Path) -> Result<()> {
    detach(&mounts_at(mountpoint)?)
}

/// Takes these mounts away, the last one first. That one of them is gone already is no error.
pub fn detach(mounts: &[MountPoint]) -> Result<()> {
    let mut first = None;
    for mount in mounts.iter().rev() {
        let table = table()?;
        // The one that a path leads to is the last one there.
        let result = match table.iter().rev().find(|it| it.path == mount.path) {
            Some(top) if top == mount => detach_top(&mount.path),
            Some(top) if table.contains(mount) => {
                let message = format!(
                    "unmounting {}: a mount of type {} covers it; unmount that first",
                    quoted(&mount.path),
                    Quoted(&top.fs_type)
                );
                Err(Error::new(ErrorKind::Io, message))
            }
            _ => Ok(()),
        };
        if let Err(e) = result {
            first.get_or_insert(e);
        }
    }
    // An inner one that cannot be reached goes with the outer one.
    let table = table()?;
    match first.filter(|_| mounts.iter().any(|it| table.contains(it))) {
        Some(e) => Err(e),
        None => Ok(()),
    }
}

/// Detaches what a path leads to.
fn detach_top(mountpoint: &Path) -> Result<()> {
    let what = || format!("unmounting {}", quoted(mountpoint));
    if sys::effective_uid() == 0 {
        return sys::unmount_lazy(mountpoint).map_err(|e| Error::io(what(), e));
    }
    let output = Command::new("fusermount3")
        .args(["-u", "-z", "--"])
        .arg(mountpoint)
        .output()
        .map_err(|e| Error::io(format!("{}: running fusermount3", what()), e))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let text = Quoted(output.stderr.trim_ascii()).to_string();
            Err(Error::new(ErrorKind::Io, format!("{}: {text}", what())))
        }
    }
}
