//! Removing from the target what the snapshot does not have.
//!
//! Only what lies below the target goes: no link is followed, no mount point is crossed, and what
//! belongs to the store stays. A name goes only after the catalog has said that the snapshot does
//! not have it, and never one that its run could not read: there it is the snapshot that has a gap.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use super::filter::Choice;
use super::shared::Shared;
use super::target::{TargetDir, belongs_to_store, temp_owner};
use crate::catalog::{DirId, Run};
use crate::entry::join;
use crate::error::{Error, ErrorKind, Result};
use crate::snapshot::Snapshots;
use crate::sys::process::is_alive;
use crate::sys::{Stat, at, c, target};

/// What a run could not read, of which nothing is deleted.
pub struct Gaps(HashSet<Vec<u8>>);

impl Gaps {
    /// The gaps of a run. If it does not know all of them, nothing may be deleted.
    pub fn of(snapshots: &Snapshots, run: &Run) -> Result<Gaps> {
        let paths = snapshots.with_reader(|reader| reader.unread_paths(run))?;
        paths.map(Gaps).ok_or_else(|| {
            Error::usage(format!(
                "run {} had more problems than it has noted, so it cannot be told what it lacks \
                 for that reason: restore without --delete",
                run.id
            ))
        })
    }
}

/// A directory of the snapshot, and its place in the target.
pub struct Place<'p> {
    pub id: DirId,
    pub path: &'p [u8],
    pub choice: Choice,
}

/// Removes from `dir` what the snapshot's directory does not have.
pub fn extras(
    shared: &Shared<'_>,
    gaps: &Gaps,
    place: &Place<'_>,
    dir: BorrowedFd<'_>,
) -> Result<()> {
    if gaps.0.contains(place.path) {
        return Ok(());
    }
    let mut names = match listing(dir) {
        Ok(names) => names,
        Err(e) => {
            let error = Error::io("listing it, so nothing in it is deleted", e);
            shared.problem(place.path, error);
            return Ok(());
        }
    };
    while let Some(name) = names.next_name() {
        shared.check()?;
        let name = match name {
            Ok(name) => name,
            Err(e) => {
                let error = Error::io("listing it, so nothing more in it is deleted", e);
                shared.problem(place.path, error);
                return Ok(());
            }
        };
        let path = join(place.path, name.as_bytes());
        if temp_owner(&name).is_some_and(is_alive) || gaps.0.contains(&path) {
            continue;
        }
        let snapshots = shared.work.snapshots;
        if snapshots.lookup(shared.run.id, place.id, name.as_bytes())?.is_some() {
            continue;
        }
        if let Err(e) = remove(shared, dir, &name, path.clone(), place.choice) {
            shared.problem(&path, e);
        }
    }
    Ok(())
}

/// Makes room for something that is complete under another name: removes a directory that has the
/// name, if it is empty or what is in it may be deleted.
pub fn make_room(
    shared: &Shared<'_>,
    dir: &TargetDir<'_>,
    name: &OsStr,
    path: &[u8],
) -> Result<()> {
    if !shared.work.options.delete || !dir.may_delete {
        return at::rmdir(&dir.fd, name).map_err(|e| match e.raw_os_error() {
            Some(c::ENOTEMPTY | c::EEXIST) if !dir.may_delete => Error::new(
                ErrorKind::Io,
                "a directory that is not empty is in the way: it lies in a mount, so it stays",
            ),
            Some(c::ENOTEMPTY | c::EEXIST) => Error::new(
                ErrorKind::Io,
                "a directory that is not empty is in the way: empty it, or use --delete",
            ),
            _ => Error::io("removing the directory in its way", e),
        });
    }
    remove_in_way(shared, dir, name, path)?;
    match at::stat(&dir.fd, name) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(Error::new(ErrorKind::Io, "a directory in its way holds what is not deleted")),
    }
}

/// Removes what has a name that is not listed, with what is below it, or tells of it.
fn remove_in_way(
    shared: &Shared<'_>,
    dir: &TargetDir<'_>,
    name: &OsStr,
    path: &[u8],
) -> Result<()> {
    let above = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    let choice = shared.filter.choose_deep(path.get(..above).unwrap_or_default());
    remove(shared, dir.fd.as_fd(), name, path.to_vec(), choice)
}

/// Tells what [`make_room`] would remove.
pub fn foretell_room(
    shared: &Shared<'_>,
    dir: &TargetDir<'_>,
    name: &OsStr,
    path: &[u8],
) -> Result<()> {
    if !shared.work.options.delete || !dir.may_delete {
        return Ok(());
    }
    remove_in_way(shared, dir, name, path)
}

/// A directory that is being emptied.
struct Level {
    /// Where it is listed; `None` for the directory that holds the first name.
    names: Names,
    fd: OwnedFd,
    name: OsString,
    path: Vec<u8>,
    choice: Choice,
    /// Whether something in it stays.
    stays: bool,
}

/// Removes `name` and all below it, but for what is excluded. In a dry run it only tells.
fn remove(
    shared: &Shared<'_>,
    dir: BorrowedFd<'_>,
    name: &OsStr,
    path: Vec<u8>,
    above: Choice,
) -> Result<()> {
    let mut levels: Vec<Level> = Vec::new();
    let mut next = Some((name.to_os_string(), path));
    loop {
        if let Some((name, path)) = next.take() {
            let (parent, above) = match levels.last() {
                Some(level) => (level.fd.as_fd(), level.choice),
                None => (dir, above),
            };
            match one(shared, parent, &name, &path, above) {
                Ok(Gone::Yes) => {}
                Ok(Gone::Dir(names, fd, choice)) => {
                    levels.push(Level { names, fd, name, path, choice, stays: false });
                }
                Ok(Gone::Stays) => {
                    if let Some(level) = levels.last_mut() {
                        level.stays = true;
                    }
                }
                Err(e) if levels.is_empty() => return Err(e),
                Err(e) => {
                    shared.problem(&path, e);
                    levels.iter_mut().for_each(|it| it.stays = true);
                }
            }
        }
        let Some(level) = levels.last_mut() else { return Ok(()) };
        shared.check()?;
        match level.names.next_name() {
            Some(Ok(name)) => {
                let path = join(&level.path, name.as_bytes());
                next = Some((name, path));
            }
            Some(Err(e)) => {
                shared.problem(&level.path, Error::io("listing it", e));
                levels.iter_mut().for_each(|it| it.stays = true);
                levels.pop();
            }
            None => {
                let Some(level) = levels.pop() else { return Ok(()) };
                let parent = levels.last().map_or(dir, |it| it.fd.as_fd());
                let result = match (level.stays, level.choice, shared.work.options.dry_run) {
                    (true, ..) | (_, Choice::Perhaps, _) => Err(None),
                    (false, _, true) => Ok(()),
                    (false, _, false) => at::rmdir(parent, &level.name).map_err(Some),
                };
                match result {
                    Ok(()) => shared.note_deleted(&level.path),
                    Err(e) => {
                        if let Some(e) = e {
                            shared.problem(&level.path, Error::io("deleting it", e));
                        }
                        if let Some(above) = levels.last_mut() {
                            above.stays = true;
                        }
                    }
                }
            }
        }
    }
}

enum Gone {
    Yes,
    /// A directory that has to be emptied first.
    Dir(Names, OwnedFd, Choice),
    /// It is excluded.
    Stays,
}

fn one(
    shared: &Shared<'_>,
    dir: BorrowedFd<'_>,
    name: &OsStr,
    path: &[u8],
    above: Choice,
) -> Result<Gone> {
    let failed = |e| Error::io("deleting it", e);
    let stat: Stat = match at::stat(dir, name) {
        Ok(stat) => stat,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Gone::Yes),
        Err(e) => return Err(failed(e)),
    };
    let choice = shared.filter.choose(path, stat.is_dir(), above);
    if choice == Choice::Left {
        return Ok(Gone::Stays);
    }
    if shared.is_own(&stat) {
        return Err(belongs_to_store());
    }
    if stat.is_dir() {
        let opened = target::open_dir_in_mount(dir, name).map_err(|e| match e.raw_os_error() {
            Some(c::EXDEV) => Error::new(ErrorKind::Io, "something is mounted there: it stays"),
            _ => failed(e),
        })?;
        let names = listing(opened.as_fd()).map_err(failed)?;
        return Ok(Gone::Dir(names, opened, choice));
    }
    if !shared.work.options.dry_run {
        at::unlink(dir, name).map_err(failed)?;
    }
    shared.note_deleted(path);
    Ok(Gone::Yes)
}

/// Removes what restores that are gone have left half made in `dir`.
pub fn sweep(dir: &OwnedFd) {
    let Ok(mut names) = listing(dir.as_fd()) else { return };
    while let Some(Ok(name)) = names.next_name() {
        if temp_owner(&name).is_some_and(|it| !is_alive(it)) {
            // Waste; what cannot be removed is in nobody's way.
            let _ = at::unlink(dir, &name);
        }
    }
}

/// The names in a directory, without `.` and `..`.
struct Names(at::DirReader);

fn listing(dir: BorrowedFd<'_>) -> io::Result<Names> {
    // Opened anew, for a position of its own.
    Ok(Names(at::DirReader::new(at::open_dir(dir, OsStr::new("."))?)?))
}

impl Names {
    fn next_name(&mut self) -> Option<io::Result<OsString>> {
        loop {
            match self.0.next_item()? {
                Ok(item) if item.name == "." || item.name == ".." => {}
                other => return Some(other.map(|item| item.name)),
            }
        }
    }
}
