//! Entries that are not directories: made anew, put in the place of what is there, or brought up to
//! date where they are.
//!
//! A new file is unreadable until it is complete, and a restore that finds one that was left so
//! begins it again. In place of another file, a small one is written beside it and renamed over
//! it. Of a long one only the parts that differ are written: into a copy that shares the others
//! where the file system can make one, else in place, while the file has a name that says so. In
//! every case the old name has the old file, the new one, or nothing, but never a mixture.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::content::{self, Difference, Scratch};
use super::shared::{Decision, Outcome, Shared, ends_all, state};
use super::target::{TargetDir, belongs_to_store, os, temp_name};
use crate::catalog::EntryRow;
use crate::entry::{self, Kind};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::snapshot::FileMap;
use crate::sys::{self, Stat, at, c, target};

/// Files below this length are written as a whole if anything in them differs.
const PATCH_FROM_BYTES: u64 = 128 << 10;

/// An entry to be made.
pub struct Job<'a> {
    pub dir: Arc<TargetDir<'a>>,
    pub entry: EntryRow,
    pub map: Arc<FileMap>,
    pub path: Vec<u8>,
}

impl<'a> Shared<'a> {
    /// Makes an entry; what went wrong is told. `None` if it is not there as it should be.
    pub fn leaf(&self, job: &Job<'a>, scratch: &mut Scratch) -> Option<Outcome> {
        let result = self.check().and_then(|()| match job.entry.meta.kind {
            Kind::File => self.file(job, scratch),
            _ => self.node(job),
        });
        match result {
            Ok(outcome) => {
                self.note(outcome, &job.entry);
                Some(outcome)
            }
            Err(e) => {
                self.problem(&job.path, e);
                None
            }
        }
    }

    fn file(&self, job: &Job<'a>, scratch: &mut Scratch) -> Result<Outcome> {
        if job.map.size() != job.entry.meta.size {
            return Err(Error::corrupt("its extents do not cover its size"));
        }
        let name = os(&job.entry.name);
        match job.dir.create(name) {
            Ok((file, now)) => {
                let done = self.fill(job, &file, &now);
                if done.is_err() {
                    remove_made(job, name);
                } else {
                    self.complete(job, file, scratch);
                }
                return done.map(|()| Outcome::Restored);
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(creating(e)),
        }
        let stat = match at::stat(&job.dir.fd, name) {
            Ok(stat) => stat,
            Err(e) => return Err(Error::io("looking at what is there", e)),
        };
        if self.is_own(&stat) {
            return Err(belongs_to_store());
        }
        match self.decide(&stat, &job.entry.meta) {
            Decision::Keep => {
                Progress::add(&self.work.progress.bytes, job.map.size());
                return Ok(Outcome::Kept);
            }
            Decision::Same => {
                Progress::add(&self.work.progress.bytes, job.map.size());
                self.touch_up(job, &stat)?;
                return Ok(Outcome::Unchanged);
            }
            Decision::Replace => {}
        }
        match self.update(job, &stat, scratch)? {
            Some(outcome) => Ok(outcome),
            None => self.replace(job, scratch, |file, now| self.fill(job, file, now)),
        }
    }

    /// Writes content and metadata of a file that is empty and `now` what it is.
    fn fill(&self, job: &Job<'a>, file: &File, now: &Stat) -> Result<()> {
        entry::prepare(file.as_fd(), &job.map.content.extra);
        content::write_new(self, &job.map, file)?;
        self.apply(file.as_fd(), now, &job.entry.meta, &job.map.content.extra, &job.path);
        Ok(())
    }

    /// Makes a file beside what has its name, and gives it the name when `fill` has made it
    /// complete.
    fn replace(
        &self,
        job: &Job<'a>,
        scratch: &mut Scratch,
        fill: impl FnOnce(&File, &Stat) -> Result<()>,
    ) -> Result<Outcome> {
        let temp = temp_name();
        let (file, now) = job.dir.create(&temp).map_err(creating)?;
        let name = os(&job.entry.name);
        let done =
            fill(&file, &now).and_then(|()| job.dir.put_in_place(self, &temp, name, &job.path));
        match done {
            Ok(()) => {
                self.complete(job, file, scratch);
                Ok(Outcome::Restored)
            }
            Err(e) => {
                remove_made(job, &temp);
                Err(e)
            }
        }
    }

    /// Brings a file that is there up to date, writing only what differs; `None` if it has to be
    /// written anew.
    fn update(&self, job: &Job<'a>, stat: &Stat, scratch: &mut Scratch) -> Result<Option<Outcome>> {
        let meta = &job.entry.meta;
        // With another name, or another's right to write, it would not be this file alone.
        if !stat.is_file() || stat.nlink != 1 || !self.may_stay(stat, meta)? {
            return Ok(None);
        }
        let name = os(&job.entry.name);
        let (file, may_write) = match target::open_in_place(&job.dir.fd, name) {
            Ok(file) => (file, true),
            // What nobody may write may still be as it should be.
            Err(_) => match at::open_read(&job.dir.fd, name) {
                Ok(file) => (file, false),
                Err(_) => return Ok(None),
            },
        };
        let now = state(&file)?;
        if !now.is_file() || (now.dev, now.ino, now.nlink) != (stat.dev, stat.ino, 1) {
            return Ok(None);
        }
        let difference = content::compare(self, &job.map, &file, now.size, scratch)?;
        if difference.is_none() {
            Progress::add(&self.work.progress.bytes, job.map.size());
            let changed = self.bring_metadata(job, &file, &now)?;
            self.complete(job, file, scratch);
            return Ok(Some(if changed { Outcome::Restored } else { Outcome::Unchanged }));
        }
        if !may_write || job.map.size() < PATCH_FROM_BYTES {
            return Ok(None);
        }
        let outcome = match self.copy_and_patch(job, &file, &difference, scratch)? {
            Some(outcome) => outcome,
            None => match self.patch_in_place(job, file, &now, &difference, scratch)? {
                Some(outcome) => outcome,
                None => return Ok(None),
            },
        };
        Progress::add(&self.work.progress.bytes, job.map.size());
        Ok(Some(outcome))
    }

    /// Patches a copy that shares what is alike; `None` where such copies cannot be made.
    fn copy_and_patch(
        &self,
        job: &Job<'a>,
        old: &File,
        difference: &Difference,
        scratch: &mut Scratch,
    ) -> Result<Option<Outcome>> {
        let temp = temp_name();
        let (file, _) = job.dir.create(&temp).map_err(creating)?;
        let remove = || remove_made(job, &temp);
        if target::clone_file(old, &file).is_err() {
            remove();
            return Ok(None);
        }
        let done = content::patch(self, &job.map, &file, difference).and_then(|()| {
            let (meta, extra) = (&job.entry.meta, &job.map.content.extra);
            self.apply(file.as_fd(), &state(&file)?, meta, extra, &job.path);
            job.dir.put_in_place(self, &temp, os(&job.entry.name), &job.path)
        });
        match done {
            Ok(()) => {
                self.complete(job, file, scratch);
                Ok(Some(Outcome::Restored))
            }
            Err(e) => {
                remove();
                Err(e)
            }
        }
    }

    /// Patches the file itself, under another name; `None` where it cannot be moved aside safely.
    fn patch_in_place(
        &self,
        job: &Job<'a>,
        file: File,
        now: &Stat,
        difference: &Difference,
        scratch: &mut Scratch,
    ) -> Result<Option<Outcome>> {
        let (name, temp) = (os(&job.entry.name), temp_name());
        let dir = &job.dir.fd;
        let failed = |e| Error::io("moving it aside", e);
        match at::rename(dir, name, dir, &temp, c::RENAME_NOREPLACE) {
            // Not every file system can do that: NFS cannot.
            Err(e) if matches!(e.raw_os_error(), Some(c::EINVAL | c::ENOSYS)) => return Ok(None),
            other => other.map_err(failed)?,
        }
        let moved = at::stat(dir, &temp).map_err(failed)?;
        if (moved.dev, moved.ino) != (now.dev, now.ino) {
            // Somebody has put another file there since it was opened: that one stays.
            at::rename(dir, &temp, dir, name, c::RENAME_NOREPLACE).map_err(failed)?;
            let message = "somebody else changes it: what is there now stays";
            return Err(Error::new(ErrorKind::Io, message));
        }
        // Else after a loss of power the old name might have what is written from here on.
        let done = sync_dir(dir).map_err(failed).and_then(|()| {
            content::patch(self, &job.map, &file, difference)?;
            // By that it has got another time.
            self.bring_metadata(job, &file, &state(&file)?)?;
            job.dir.put_in_place(self, &temp, name, &job.path)
        });
        match done {
            Ok(()) => {
                self.complete(job, file, scratch);
                Ok(Some(Outcome::Restored))
            }
            Err(e) => {
                let temp = sys::quoted(temp.as_ref());
                let left = format!("partly brought up to date, and now named {temp}");
                if ends_all(&e) {
                    // Of several errors that end the restore one is told, but this in any case.
                    self.problem(&job.path, Error::new(ErrorKind::Io, left));
                    return Err(e);
                }
                Err(e.context(left))
            }
        }
    }

    /// Puts metadata on a file that was there, if any of it differs.
    fn bring_metadata(&self, job: &Job<'a>, file: &File, was: &Stat) -> Result<bool> {
        let (meta, extra) = (&job.entry.meta, &job.map.content.extra);
        let wanted = self.wanted(meta, was)?;
        let fd = file.as_fd();
        let failed = |e| Error::io("looking at its attributes", e);
        let has = |mode| (was.mode & 0o7777, was.mtime) == (mode, meta.mtime);
        let is_owned = !self.is_root || (was.uid, was.gid) == (wanted.uid, wanted.gid);
        if has(wanted.mode) && is_owned && entry::has_xattrs(fd, extra).map_err(failed)? {
            return Ok(false);
        }
        // Some of them only root may remove.
        let removed = entry::remove_other_xattrs(fd, extra);
        if let Err(e) = removed.or_else(|e| if self.is_root { Err(e) } else { Ok(()) }) {
            self.problem(&job.path, Error::io("removing its attributes", e));
        }
        self.apply(fd, &state(file)?, meta, extra, &job.path);
        Ok(true)
    }

    /// Gives a file whose content is taken for right its owner and mode, if it has others.
    fn touch_up(&self, job: &Job<'a>, stat: &Stat) -> Result<()> {
        let meta = &job.entry.meta;
        let wanted = self.wanted(meta, stat)?;
        let is_owned = !self.is_root || (stat.uid, stat.gid) == (wanted.uid, wanted.gid);
        let has_mode = meta.kind == Kind::Symlink || stat.mode & 0o7777 == wanted.mode;
        if is_owned && has_mode {
            return Ok(());
        }
        let Some((handle, now)) = self.handle(job, os(&job.entry.name))? else { return Ok(()) };
        if (now.dev, now.ino) == (stat.dev, stat.ino) {
            let extra = &job.map.content.extra;
            self.apply_handle(handle.as_fd(), &now, meta, extra, &job.path);
        }
        Ok(())
    }

    /// Makes a link, a FIFO, a socket or a device.
    fn node(&self, job: &Job<'a>) -> Result<Outcome> {
        let (dir, name) = (&job.dir.fd, os(&job.entry.name));
        let meta = &job.entry.meta;
        let extra = &job.map.content.extra;
        let make = |name: &OsStr| match (&extra.target, meta.kind) {
            (Some(target), Kind::Symlink) => at::symlink(os(target), dir, name),
            (None, Kind::Symlink) => Err(io::Error::other("the link has no target")),
            _ => at::mknod(dir, name, meta.kind.type_bits() | 0o600, meta.rdev),
        };
        match make(name) {
            Ok(()) => {
                self.finish_node(job, name)?;
                return Ok(Outcome::Restored);
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(creating(e)),
        }
        let stat = at::stat(dir, name).map_err(|e| Error::io("looking at what is there", e))?;
        if self.is_own(&stat) {
            return Err(belongs_to_store());
        }
        match self.decide(&stat, meta) {
            Decision::Keep => return Ok(Outcome::Kept),
            Decision::Same if self.has_target(job) => {
                self.touch_up(job, &stat)?;
                return Ok(Outcome::Unchanged);
            }
            _ => {}
        }
        let temp = temp_name();
        make(&temp).map_err(creating)?;
        let done = self.finish_node(job, &temp);
        let done = done.and_then(|()| job.dir.put_in_place(self, &temp, name, &job.path));
        if done.is_err() {
            remove_made(job, &temp);
        }
        done.map(|()| Outcome::Restored)
    }

    /// Whether a link that is there leads where it should.
    fn has_target(&self, job: &Job<'a>) -> bool {
        let Some(target) = &job.map.content.extra.target else { return true };
        at::readlink(&job.dir.fd, os(&job.entry.name)).is_ok_and(|it| it == os(target))
    }

    /// Puts metadata on what was just made as `name`.
    fn finish_node(&self, job: &Job<'a>, name: &OsStr) -> Result<()> {
        let Some((handle, now)) = self.handle(job, name)? else {
            let message = "somebody else changes the directory: it has no metadata";
            return Err(Error::new(ErrorKind::Io, message));
        };
        let (meta, extra) = (&job.entry.meta, &job.map.content.extra);
        self.apply_handle(handle.as_fd(), &now, meta, extra, &job.path);
        Ok(())
    }

    /// A handle on `name` and its state, if that is a thing of the right kind with no other name:
    /// what else may have got there meanwhile is not to be touched.
    fn handle(&self, job: &Job<'a>, name: &OsStr) -> Result<Option<(OwnedFd, Stat)>> {
        let failed = |e| Error::io("opening it", e);
        let handle = at::open_path(&job.dir.fd, name).map_err(failed)?;
        let now = state(&handle)?;
        let is_it = Kind::from_mode(now.mode) == Some(job.entry.meta.kind) && now.nlink == 1;
        Ok(is_it.then_some((handle, now)))
    }

    /// What comes last, under the final name. File flags close a file to renames and links, so one
    /// with further names gets them when those are made.
    fn complete(&self, job: &Job<'a>, file: File, scratch: &mut Scratch) {
        if job.entry.meta.nlink == 1 {
            self.apply_flags(file.as_fd(), &job.map.content.extra, &job.path);
        }
        if self.work.options.verify {
            scratch.verify_later(self, file, &job.map, &job.path);
        }
    }
}

fn creating(e: io::Error) -> Error {
    Error::io("creating it", e)
}

/// Waits until the names in a directory are on the disk.
fn sync_dir(dir: &OwnedFd) -> io::Result<()> {
    match File::from(dir.try_clone()?).sync_all() {
        // Some file systems know nothing of the kind.
        Err(e) if e.raw_os_error() == Some(c::EINVAL) => Ok(()),
        other => other,
    }
}

/// Removes what could not be completed. What had the entry's name before is still there.
fn remove_made(job: &Job<'_>, name: &OsStr) {
    if let Err(e) = at::unlink(&job.dir.fd, name)
        && e.kind() != io::ErrorKind::NotFound
    {
        log::warn!("{}: could not be removed: {e}", crate::error::Quoted(&job.path));
    }
}
