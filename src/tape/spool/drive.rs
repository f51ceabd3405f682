//! Drives and their queues, as the spool has them.
//!
//! The link to the loaded tape is what counts; the tape's own marker follows it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::Spool;
use super::job::{JobKind, JobStatus, OpenJob, is_uuid};
use super::lock::{self, Lock};
use super::tape::{Tape, TapeStatus};
use super::text;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, Time, quoted};

/// The device of a drive that does not say which.
pub const DEVICE: &str = "/dev/nst0";

/// What a drive does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DriveStatus {
    /// Nothing.
    Idle,
    /// Somebody works with it.
    Busy,
}

const STATUSES: &[(&str, DriveStatus)] =
    &[("idle", DriveStatus::Idle), ("busy", DriveStatus::Busy)];

/// A drive.
#[derive(Clone, Debug)]
pub struct Drive {
    root: PathBuf,
    dir: PathBuf,
}

impl Drive {
    pub(super) fn new(root: &Path, dir: PathBuf) -> Drive {
        Drive { root: root.to_path_buf(), dir }
    }

    /// Its name.
    pub fn name(&self) -> &OsStr {
        self.dir.file_name().unwrap_or_default()
    }

    /// Where it is in the spool.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The device, or file, that it works with.
    pub fn device(&self) -> Result<PathBuf> {
        let path = self.dir.join("device");
        if !lock::exists(&path)? {
            return Ok(DEVICE.into());
        }
        let target = std::fs::read_link(&path);
        let target = target.map_err(|e| Error::io(format!("reading link {}", quoted(&path)), e))?;
        Ok(self.dir.join(target))
    }

    /// The changer that serves it, which is a device or a directory of images, and its number in
    /// there.
    pub fn changer(&self) -> Result<Option<(PathBuf, u32)>> {
        let path = self.dir.join("changer");
        if !lock::exists(&path)? {
            return Ok(None);
        }
        let target = std::fs::read_link(&path);
        let target = target.map_err(|e| Error::io(format!("reading link {}", quoted(&path)), e))?;
        let path = self.dir.join("changer-drive");
        let number = match lock::exists(&path)? {
            false => 0,
            true => {
                let mut lines = text::Lines::new(text::open(&path)?);
                lines.advance()?;
                text::parse_number(lines.line())
                    .ok_or_else(|| lines.error("is no number of a drive"))
                    .map_err(|e| e.context(quoted(&path)))?
            }
        };
        Ok(Some((self.dir.join(target), number)))
    }

    /// Says which changer serves it.
    pub fn set_changer(&self, changer: &Path, number: u32) -> Result<()> {
        let number = format!("{number}\n");
        sys::replace_file(&self.dir.join("changer-drive"), number.as_bytes())?;
        lock::set_link(&self.dir.join("changer"), changer)
    }

    /// What it does. Whoever is busy with it has its lock: who has died says nothing any more.
    pub fn status(&self) -> Result<DriveStatus> {
        let said = lock::marker(&self.dir, STATUSES)?;
        Ok(said.filter(|_| lock::is_believed(&self.dir)).unwrap_or(DriveStatus::Idle))
    }

    /// The tape that is in it, as far as the spool knows; one that it has forgotten is none.
    pub fn tape(&self) -> Result<Option<Tape>> {
        let path = self.dir.join("tape");
        let target = match std::fs::read_link(&path) {
            Ok(target) => target,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(format!("reading link {}", quoted(&path)), e)),
        };
        let name = target.file_name().unwrap_or_default();
        match Tape::in_dir(&self.root, self.root.join("tape").join(name)) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            tape => tape.map(Some),
        }
    }

    /// Takes the drive for one's own: it is busy until that is dropped.
    pub fn take(&self) -> Result<TakenDrive> {
        let lock = Lock::take(&self.dir)?;
        // Loaded by somebody who died before he could say so.
        if let Some(tape) = self.tape()? {
            tape.set_status(TapeStatus::Busy)?;
        }
        let taken = TakenDrive { drive: self.clone(), _lock: lock };
        taken.mark(DriveStatus::Busy)?;
        Ok(taken)
    }
}

/// A drive that nobody else works with.
pub struct TakenDrive {
    drive: Drive,
    _lock: Lock,
}

impl std::ops::Deref for TakenDrive {
    type Target = Drive;

    fn deref(&self) -> &Drive {
        &self.drive
    }
}

impl TakenDrive {
    fn mark(&self, status: DriveStatus) -> Result<()> {
        let name = STATUSES.iter().find(|it| it.1 == status).map(|it| it.0);
        lock::set_marker(&self.dir, STATUSES, name)
    }

    /// Notes that this tape is in the drive now.
    pub fn load(&self, tape: &Tape) -> Result<()> {
        self.unload()?;
        // Whoever noted the tape may have died before its name lasted.
        sys::sync_dir(&self.root.join("tape"))?;
        let name = tape.dir().file_name().unwrap_or_default();
        tape.set_status(TapeStatus::Busy)?;
        lock::set_link(&self.dir.join("tape"), &Path::new("../../tape").join(name))
    }

    /// Notes that no tape is in the drive.
    pub fn unload(&self) -> Result<()> {
        let (tape, link) = (self.tape()?, self.dir.join("tape"));
        // Also one that leads nowhere goes.
        if !lock::exists(&link)? {
            return Ok(());
        }
        lock::remove_entry(&link)?;
        sys::sync_dir(&self.dir)?;
        tape.map_or(Ok(()), |it| it.set_status(TapeStatus::Offline))
    }
}

impl Drop for TakenDrive {
    fn drop(&mut self) {
        // Whoever takes the drive next puts right what cannot be written now.
        let _ = self.mark(DriveStatus::Idle);
        if let Ok(Some(tape)) = self.tape() {
            let _ = tape.set_status(TapeStatus::Loaded);
        }
    }
}

/// The jobs that wait for a drive.
#[derive(Clone, Debug)]
pub struct Queue<'a> {
    spool: &'a Spool,
    dir: PathBuf,
}

impl<'a> Queue<'a> {
    pub(super) fn new(spool: &'a Spool, dir: PathBuf) -> Queue<'a> {
        Queue { spool, dir }
    }

    /// Adds a job, which must have something left to do.
    pub fn add(&self, uuid: &str) -> Result<()> {
        let mut job = self.spool.take_job(uuid)?;
        let refused = |why: &str| Err(Error::usage(format!("job {uuid} {why}")));
        match job.status()? {
            None | Some(JobStatus::Ready) => {}
            Some(status) => return refused(&format!("is {}", status.as_str())),
        }
        if job.pending()?.is_empty() {
            return refused("has no batch that is not done: add one, or use --redo");
        }
        sys::make_private_dirs(&self.dir)
            .map_err(|e| Error::io(format!("creating {}", quoted(&self.dir)), e))?;
        // From `drive/D/queue`, and from a named queue in there.
        let depth = self.dir.strip_prefix(self.spool.root()).map_or(3, |it| it.iter().count());
        let target = PathBuf::from("../".repeat(depth)).join("job").join(uuid);
        let link = self.dir.join(uuid);
        match lock::exists(&link)? {
            // Who made it may have died before it lasted.
            true => sys::sync_dir(&self.dir)?,
            false => lock::set_link(&link, &target)?,
        }
        job.set_status(Some(JobStatus::Ready))
    }

    /// The jobs in it, those added first first.
    pub fn list(&self) -> Result<Vec<String>> {
        let mut found: Vec<(Time, String)> = Vec::new();
        for name in lock::names_in(&self.dir)? {
            if !is_uuid(name.as_bytes()) {
                continue;
            }
            let Ok(stat) = sys::lstat(&self.dir.join(&name)) else { continue };
            found.push((stat.mtime, name.to_string_lossy().into_owned()));
        }
        found.sort();
        Ok(found.into_iter().map(|it| it.1).collect())
    }

    /// The first job of this kind that can be worked on, taken for one's own. Perhaps all of it is
    /// done, and it has only to be finished.
    pub fn next(&self, kind: JobKind) -> Result<Option<OpenJob>> {
        self.next_but(kind, &BTreeSet::new())
    }

    /// The same without these.
    pub fn next_but(&self, kind: JobKind, but: &BTreeSet<String>) -> Result<Option<OpenJob>> {
        for uuid in self.list()?.into_iter().filter(|it| !but.contains(it)) {
            let job = match self.spool.take_job(&uuid) {
                Ok(job) => job,
                Err(e) if matches!(e.kind(), ErrorKind::Locked | ErrorKind::NotFound) => continue,
                Err(e) => return Err(e.context(format_args!("job {uuid}"))),
            };
            let has_work = match job.status()? {
                // Without a marker: linked by somebody who died before he could set it.
                None | Some(JobStatus::Ready) => !job.batches()?.is_empty(),
                // Its worker died before he could take it out: what is left is to finish it.
                Some(JobStatus::Done) => self.has(&uuid)? && job.pending()?.is_empty(),
                Some(_) => false,
            };
            if has_work && job.kind() == kind {
                return Ok(Some(job));
            }
        }
        Ok(None)
    }

    /// Takes a job out; that lasts, also if somebody has done it before who died then.
    pub(super) fn remove(&self, uuid: &str) -> Result<()> {
        if !lock::exists(&self.dir)? {
            return Ok(());
        }
        lock::remove_entry(&self.dir.join(uuid))?;
        sys::sync_dir(&self.dir)
    }

    pub(super) fn has(&self, uuid: &str) -> Result<bool> {
        lock::exists(&self.dir.join(uuid))
    }
}
