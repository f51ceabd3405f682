//! Where a catalog is built: beside its place, under names of its own, while nobody writes the one
//! that may be there.
//!
//! It gets its name when it is whole and synced. What has the name by then is kept aside, with its
//! log, and nothing is removed but what a killed builder has left.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::Rebuild;
use crate::catalog::{Reader, WriteLock, copy, schema};
use crate::error::{Error, Result};
use crate::sys::{self, Time, quoted};

/// Names of what is built, after the name that it will have.
const BUILT: &str = ".rebuilding";
const SCRATCH: &str = ".rebuilding-scratch";
/// What the name of a catalog has that was replaced, before a number of seconds.
const REPLACED: &str = ".replaced-";
/// What SQLite has beside a database. It would take what is left of another one for its own.
const LOGS: [&str; 3] = ["-wal", "-shm", "-journal"];
/// Names that are tried for it.
const NAMES_MAX: u32 = 1000;

/// The place where a catalog is built. Holds the writer's lock.
pub struct Place {
    target: PathBuf,
    _lock: WriteLock,
}

impl Place {
    /// Takes the place beside `target`, and clears it of what a killed builder has left.
    pub fn take(target: &Path) -> Result<Place> {
        if let Some(dir) = target.parent() {
            sys::make_private_dirs(dir).map_err(|e| Error::io(quoted(dir).to_string(), e))?;
        }
        let place = Place { target: target.to_path_buf(), _lock: WriteLock::take(target)? };
        place.clear()?;
        Ok(place)
    }

    /// Begins with nothing.
    pub fn create(self) -> Result<Rebuild> {
        let conn = schema::create(&self.built(), |_| Ok(()))?;
        Rebuild::begin(self, conn, false)
    }

    /// Unpacks a copy of the catalog, and checks it; gives it for a look. What was unpacked here
    /// before is gone.
    pub fn unpack(&self, from: &Path, check: &dyn Fn() -> Result<()>) -> Result<Reader> {
        self.clear()?;
        copy::unpack(from, &self.built(), check)
    }

    /// Begins with the copy that was unpacked last, which nobody has open.
    pub fn resume(self) -> Result<Rebuild> {
        let conn = schema::open_to_write(&self.built())?;
        Rebuild::begin(self, conn, true)
    }

    pub(super) fn built(&self) -> PathBuf {
        beside(&self.target, BUILT)
    }

    pub(super) fn scratch(&self) -> PathBuf {
        beside(&self.target, SCRATCH)
    }

    /// Removes what is left of a building.
    fn clear(&self) -> Result<()> {
        for base in [BUILT, SCRATCH] {
            for suffix in ["", "-journal", "-wal", "-shm", ".new", ".new-journal"] {
                let path = beside(&self.target, &format!("{base}{suffix}"));
                match std::fs::remove_file(&path) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                        return Err(Error::io(format!("removing {}", quoted(&path)), e));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// The file beside a catalog that is built, or tried.
pub(crate) fn built_path(catalog: &Path) -> PathBuf {
    beside(catalog, BUILT)
}

/// The file beside a catalog in which is noted what was found of blocks.
pub(crate) fn scratch_path(catalog: &Path) -> PathBuf {
    beside(catalog, SCRATCH)
}

fn beside(target: &Path, suffix: &str) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_os_string();
    name.push(suffix);
    target.with_file_name(name)
}

/// A catalog that is whole but has not got its name.
pub struct Built {
    place: Place,
    /// What was found not to fit, and how much of it there was.
    pub faults: (Vec<String>, u64),
}

impl Built {
    pub(super) fn new(place: Place, faults: (Vec<String>, u64)) -> Built {
        Built { place, faults }
    }

    /// Opens it for reading.
    pub fn open(&self) -> Result<Reader> {
        Reader::open(&self.place.built())
    }

    /// Gives it its name, durably, where there is none. Nobody may have it open. A log that is left
    /// of a catalog that is gone is kept under another name.
    pub fn publish(self) -> Result<()> {
        self.sync()?;
        let target = &self.place.target;
        if target.symlink_metadata().is_ok() {
            let message = format!("{} has been made meanwhile", quoted(target));
            return Err(Error::usage(message));
        }
        self.keep_old(&LOGS)?;
        sys::rename_durable(&self.place.built(), target)?;
        self.place.clear()
    }

    /// The same; a catalog that is there already is kept under the name that this gives.
    pub fn replace(self) -> Result<Option<PathBuf>> {
        self.sync()?;
        let [wal, shm, journal] = LOGS;
        let kept = self.keep_old(&["", wal, shm, journal])?;
        sys::rename_durable(&self.place.built(), &self.place.target)?;
        self.place.clear()?;
        Ok(kept)
    }

    fn keep_old(&self, suffixes: &[&'static str]) -> Result<Option<PathBuf>> {
        let target = &self.place.target;
        let is_there = |suffix: &&&str| beside(target, suffix).symlink_metadata().is_ok();
        let old: Vec<&str> = suffixes.iter().filter(is_there).copied().collect();
        match old.is_empty() {
            true => Ok(None),
            false => keep(target, &old).map(Some),
        }
    }

    fn sync(&self) -> Result<()> {
        let path = self.place.built();
        let failed = |e| Error::io(format!("syncing {}", quoted(&path)), e);
        let file = sys::private_file().write(true).open(&path).map_err(failed)?;
        file.sync_all().map_err(failed)
    }
}

/// Gives the files of a catalog other names, under which nothing is yet. The log of the old one
/// must not be there any more when the new one has its name: SQLite would take it for its own. The
/// database itself has both names until the new one takes its own, as far as the file system can.
fn keep(target: &Path, old: &[&str]) -> Result<PathBuf> {
    let kept = free_name(target)?;
    let with = |base: &Path, suffix: &str| {
        let mut name = OsString::from(base);
        name.push(suffix);
        PathBuf::from(name)
    };
    for suffix in old {
        let (from, to) = (with(target, suffix), with(&kept, suffix));
        let is_linked = suffix.is_empty() && std::fs::hard_link(&from, &to).is_ok();
        if !is_linked {
            let failed = |e| Error::io(format!("keeping {}", quoted(&from)), e);
            std::fs::rename(&from, &to).map_err(failed)?;
        }
    }
    sys::sync_dir(target.parent().unwrap_or(Path::new("/")))?;
    Ok(kept)
}

fn free_name(target: &Path) -> Result<PathBuf> {
    let now = Time::now().secs;
    for n in 0..NAMES_MAX {
        let more = if n == 0 { String::new() } else { format!(".{n}") };
        let name = format!("{REPLACED}{now}{more}");
        let is_free = |it: &str| beside(target, &format!("{name}{it}")).symlink_metadata().is_err();
        if is_free("") && LOGS.into_iter().all(is_free) {
            return Ok(beside(target, &name));
        }
    }
    Err(Error::usage(format!("there is no free name to keep {} under", quoted(target))))
}
