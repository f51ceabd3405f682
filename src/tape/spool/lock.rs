//! Locks and markers: who works on something of the spool, and what state it is in.
//!
//! A lock belongs to a process and goes with it, whatever ends it. A marker is one empty entry
//! `@status` in a directory; it changes by a rename, so there is never none between two.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::lock::{LockedFile, PATIENCE, is_locked};
use crate::sys::{self, quoted};

/// The name of a lock file.
const NAME: &str = ".lock";
/// How long a lock is waited for that nobody has for long.
pub(super) const LONG_PATIENCE: Duration = Duration::from_secs(30);

/// The right to work on what is in a directory.
#[derive(Debug)]
pub struct Lock {
    _file: LockedFile,
}

impl Lock {
    /// Takes the lock of a job or a drive, or says who has it.
    pub fn take(dir: &Path) -> Result<Lock> {
        Lock::within(dir, PATIENCE)
    }

    /// Takes the lock of something that nobody works on for long, and waits for it, half a minute.
    pub fn wait(dir: &Path) -> Result<Lock> {
        Lock::within(dir, LONG_PATIENCE)
    }

    fn within(dir: &Path, patience: Duration) -> Result<Lock> {
        let path = dir.join(NAME);
        let failed = |e| Error::io(format!("locking {}", quoted(&path)), e);
        let mut options = sys::private_file();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).map_err(failed)?;
        if let Some(file) = LockedFile::within(file, patience).map_err(failed)? {
            file.set_len(0).map_err(failed)?;
            write!(&*file, "pid {}", std::process::id()).map_err(failed)?;
            return Ok(Lock { _file: file });
        }
        let mut owner = String::new();
        // Only for the message; a lock file without text is as good.
        let _ = File::open(&path).and_then(|it| it.take(200).read_to_string(&mut owner));
        let message = format!(
            "{} is in use by another process ({}): wait for it or stop it",
            quoted(dir),
            Quoted(owner.trim().as_bytes())
        );
        Err(Error::new(ErrorKind::Locked, message))
    }

    /// Whether somebody has the lock of a directory.
    pub fn is_held(dir: &Path) -> Result<bool> {
        let path = dir.join(NAME);
        let failed = |e| Error::io(format!("opening {}", quoted(&path)), e);
        match File::open(&path) {
            Ok(file) => is_locked(&file).map_err(failed),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(failed(e)),
        }
    }
}

/// Whether somebody works on what is in a directory, as far as can be seen: who must not look at
/// its lock believes what a marker says.
pub fn is_believed(dir: &Path) -> bool {
    Lock::is_held(dir).unwrap_or(true)
}

/// The first of the `known` states whose marker is in `dir`: where a crash has left two, the one
/// listed first counts.
pub fn marker<S: Copy>(dir: &Path, known: &[(&str, S)]) -> Result<Option<S>> {
    for (name, state) in known {
        if exists(&dir.join(format!("@{name}")))? {
            return Ok(Some(*state));
        }
    }
    Ok(None)
}

/// Puts the marker `name` in the place of any other of those `known`; with `None` there is none.
pub fn set_marker<S: Copy>(dir: &Path, known: &[(&str, S)], name: Option<&str>) -> Result<()> {
    let path_of = |name: &str| dir.join(format!("@{name}"));
    let mut others: Vec<PathBuf> = Vec::new();
    for (other, _) in known.iter().filter(|it| Some(it.0) != name) {
        if exists(&path_of(other))? {
            others.push(path_of(other));
        }
    }
    if let Some(name) = name
        && !exists(&path_of(name))?
    {
        let new = path_of(name);
        let failed = |e| Error::io(format!("marking {}", quoted(&new)), e);
        match others.pop() {
            Some(old) => std::fs::rename(&old, &new).map_err(failed)?,
            None => sys::make_private_dir(&new).map(|_| ()).map_err(failed)?,
        }
    }
    for other in others {
        remove_entry(&other)?;
    }
    sys::sync_dir(dir)
}

/// Whether there is anything at `path`, also a link that leads nowhere.
pub fn exists(path: &Path) -> Result<bool> {
    match sys::lstat(path) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::io(format!("looking at {}", quoted(path)), e)),
    }
}

/// Removes a file, a link or an empty directory; none is as good.
pub fn remove_entry(path: &Path) -> Result<()> {
    let removed = match sys::lstat(path) {
        Ok(it) if it.is_dir() => std::fs::remove_dir(path),
        Ok(_) => std::fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("removing {}", quoted(path)), e))
        }
        _ => Ok(()),
    }
}

/// Makes or replaces a symbolic link; it lasts.
pub fn set_link(path: &Path, target: &Path) -> Result<()> {
    let new = sys::new_name(path);
    remove_entry(&new)?;
    std::os::unix::fs::symlink(target, &new)
        .map_err(|e| Error::io(format!("linking {}", quoted(&new)), e))?;
    sys::rename_durable(&new, path)
}

/// The names in a directory, in order; none if it is not there.
pub fn names_in(dir: &Path) -> Result<Vec<std::ffi::OsString>> {
    let failed = |e| Error::io(format!("listing {}", quoted(dir)), e);
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let names = entries.map(|it| it.map(|it| it.file_name()));
    let mut names = names.collect::<std::io::Result<Vec<_>>>().map_err(failed)?;
    names.sort();
    Ok(names)
}
