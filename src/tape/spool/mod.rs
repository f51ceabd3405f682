//! The spool: what is to be written to tape, what has been, and which tapes and drives there are.
//!
//! All of it is files under one directory that other programs may read and write too. A file is
//! replaced whole or only added to; a status is one marker that is renamed; what takes more than
//! one step is begun with the one that can be left alone. So whatever a crash leaves, the next
//! command understands, and whoever changes a job or a drive holds its lock.

pub mod batch;
pub mod drive;
pub mod find;
pub mod job;
pub mod lock;
pub mod log;
pub mod receipt;
mod split;
pub mod tape;
pub mod text;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::{self, quoted};
use crate::tape::label::Label;

use drive::{Drive, Queue};
use find::Found;
use job::{Job, JobKind, JobStatus, OpenJob, is_uuid};
use lock::Lock;
use tape::Tape;
use text::Fields;

/// Where the spool is if nobody says otherwise.
pub const ROOT: &str = "/var/local/t0p";
/// The variable that says where it is.
const ROOT_VARIABLE: &str = "T0P_ROOT";
/// The pools that a new spool has.
const POOLS: [&str; 3] = ["any", "full", "incr"];

/// Where the spool of this process is.
pub fn root() -> PathBuf {
    let root = std::env::var_os(ROOT_VARIABLE).filter(|it| !it.is_empty());
    root.map_or(ROOT.into(), PathBuf::from)
}

/// A spool.
#[derive(Debug)]
pub struct Spool {
    root: PathBuf,
}

impl Spool {
    /// Opens the spool at `root`.
    pub fn open(root: &Path) -> Result<Spool> {
        if !root.join("job").is_dir() {
            let message = format!(
                "there is no spool at {}: it has no directory job; set T0P_ROOT, or make one",
                quoted(root)
            );
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        let root = std::path::absolute(root);
        let root = root.map_err(|e| Error::io("finding the current directory", e))?;
        Ok(Spool { root })
    }

    /// Opens the spool at `root`, and makes what is missing of it.
    pub fn create(root: &Path) -> Result<Spool> {
        for name in ["drive", "job/archive", "pool", "tape"] {
            let dir = root.join(name);
            let made = sys::make_private_dirs(&dir);
            made.map_err(|e| Error::io(format!("creating {}", quoted(&dir)), e))?;
        }
        let _lock = Lock::wait(root)?;
        for name in POOLS {
            let path = root.join("pool").join(name);
            if !lock::exists(&path)? {
                sys::replace_file(&path, b"")?;
            }
        }
        Spool::open(root)
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn job_dirs(&self) -> [PathBuf; 2] {
        [self.root.join("job"), self.root.join("job/archive")]
    }

    /// The names of all jobs, in order; those that are finished too, if wanted.
    pub fn jobs(&self, with_archived: bool) -> Result<Vec<String>> {
        let mut found = Vec::new();
        let [dir, archive] = self.job_dirs();
        for dir in [Some(dir), with_archived.then_some(archive)].into_iter().flatten() {
            for name in lock::names_in(&dir)? {
                let dir = dir.join(&name);
                let has_file = |kind: &str| lock::exists(&dir.join(kind));
                if is_uuid(name.as_bytes()) && (has_file("wjob")? || has_file("rjob")?) {
                    found.push(name.to_string_lossy().into_owned());
                }
            }
        }
        found.sort();
        found.dedup();
        Ok(found)
    }

    fn job_dir(&self, uuid: &str) -> Result<PathBuf> {
        job::check_uuid(uuid)?;
        for dir in self.job_dirs() {
            let dir = dir.join(uuid);
            if dir.is_dir() {
                return Ok(dir);
            }
        }
        Err(Error::new(ErrorKind::NotFound, format!("there is no job {uuid}")))
    }

    /// A job, also a finished one.
    pub fn job(&self, uuid: &str) -> Result<Job> {
        Job::open(&self.job_dir(uuid)?)
    }

    /// A job, taken for one's own. If its worker has died, it is as it was before it.
    pub fn take_job(&self, uuid: &str) -> Result<OpenJob> {
        let mut job = OpenJob::take(&self.job_dir(uuid)?)?;
        if job.status()? == Some(JobStatus::Busy) {
            let is_queued = self.is_queued(uuid)?;
            job.set_status(is_queued.then_some(JobStatus::Ready))?;
        }
        Ok(job)
    }

    /// Makes a job without batches.
    pub fn create_job(
        &self,
        uuid: &str,
        kind: JobKind,
        created: i64,
        properties: &Fields,
    ) -> Result<Job> {
        let mut fields = properties.clone();
        fields.set("created", created.to_string())?;
        self.make_job(uuid, kind, &fields, None)
    }

    /// Makes another job with the same properties and the same batches, none of them done. If the
    /// first is not done, the other takes its place.
    pub fn clone_job(&self, uuid: &str, new: &str, created: i64) -> Result<Job> {
        let mut old = self.take_job(uuid)?;
        let mut fields = old.fields().clone();
        fields.remove("job");
        fields.set("created", created.to_string())?;
        fields.set("cloned-from", uuid)?;
        let job = self.make_job(new, old.kind(), &fields, Some(&old))?;
        if old.status()? != Some(JobStatus::Done) {
            old.set_status(Some(JobStatus::Cloned))?;
            self.unqueue(uuid)?;
        }
        Ok(job)
    }

    fn make_job(
        &self,
        uuid: &str,
        kind: JobKind,
        fields: &Fields,
        batches: Option<&Job>,
    ) -> Result<Job> {
        if self.job_dir(uuid).is_ok() {
            return Err(Error::usage(format!("there is a job {uuid} already")));
        }
        job::check_uuid(uuid)?;
        let _lock = Lock::wait(&self.root)?;
        let [jobs, _] = self.job_dirs();
        let (new, dir) = (jobs.join(".new"), jobs.join(uuid));
        tape::clear_new(&new)?;
        let failed = |e| Error::io(format!("creating {}", quoted(&new)), e);
        sys::make_private_dir(&new).map_err(failed)?;
        job::write_new(&new, uuid, kind, fields, batches)?;
        sys::rename_durable(&new, &dir)?;
        Job::open(&dir)
    }

    /// Takes a job out of its queue for good.
    pub fn revoke(&self, uuid: &str) -> Result<()> {
        let mut job = self.take_job(uuid)?;
        match job.status()? {
            None | Some(JobStatus::Ready | JobStatus::Revoked) => {}
            Some(status) => {
                return Err(Error::usage(format!("job {uuid} is {}", status.as_str())));
            }
        }
        job.set_status(Some(JobStatus::Revoked))?;
        self.unqueue(uuid)
    }

    /// Makes all of a job undone, so that it can be queued once more.
    pub fn redo(&self, uuid: &str) -> Result<()> {
        let mut job = self.take_job(uuid)?;
        self.unqueue(uuid)?;
        job.undo_all()?;
        job.set_status(None)?;
        let [jobs, _] = self.job_dirs();
        if job.is_archived() { job.move_to(&jobs.join(uuid)) } else { Ok(()) }
    }

    /// A job has been done: it leaves its queue and goes to the finished ones.
    pub fn finish(&self, mut job: OpenJob) -> Result<()> {
        if !job.pending()?.is_empty() {
            let message = format!("job {} has batches that are not done", job.uuid());
            return Err(Error::usage(message));
        }
        job.set_status(Some(JobStatus::Done))?;
        let uuid = job.uuid().to_owned();
        self.unqueue(&uuid)?;
        let [_, archive] = self.job_dirs();
        if job.is_archived() { Ok(()) } else { job.move_to(&archive.join(uuid)) }
    }

    /// Every queue of every drive, also those that have a name of their own.
    fn queues(&self) -> Result<Vec<Queue<'_>>> {
        let mut found = Vec::new();
        for drive in self.drives()? {
            let dir = drive.dir().join("queue");
            for name in lock::names_in(&dir)? {
                if !is_uuid(name.as_bytes()) && dir.join(&name).is_dir() {
                    found.push(Queue::new(self, dir.join(name)));
                }
            }
            found.push(Queue::new(self, dir));
        }
        Ok(found)
    }

    fn unqueue(&self, uuid: &str) -> Result<()> {
        self.queues()?.iter().try_for_each(|it| it.remove(uuid))
    }

    /// How far a job is. One whose worker has died is as it was before it, as for who takes it.
    pub fn status_of(&self, job: &Job) -> Result<Option<JobStatus>> {
        match job.status()? {
            Some(JobStatus::Busy) if !lock::is_believed(job.dir()) => {
                Ok(self.is_queued(job.uuid())?.then_some(JobStatus::Ready))
            }
            status => Ok(status),
        }
    }

    /// Whether a job waits in any queue.
    pub fn is_queued(&self, uuid: &str) -> Result<bool> {
        for queue in self.queues()? {
            if queue.has(uuid)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The queue of a drive, or one of its queues that has a name.
    pub fn queue(&self, drive: &Drive, name: Option<&OsStr>) -> Result<Queue<'_>> {
        let dir = drive.dir().join("queue");
        match name {
            Some(name) => Ok(Queue::new(self, dir.join(check_name(name)?))),
            None => Ok(Queue::new(self, dir)),
        }
    }

    /// Every drive, by name.
    pub fn drives(&self) -> Result<Vec<Drive>> {
        let dir = self.root.join("drive");
        let names = lock::names_in(&dir)?.into_iter();
        let dirs = names.filter(|it| *it != "default").map(|it| dir.join(it));
        let real = dirs.filter(|it| sys::lstat(it).is_ok_and(|it| it.is_dir()));
        Ok(real.map(|it| Drive::new(&self.root, it)).collect())
    }

    /// The drive with this name, or the default one.
    pub fn drive(&self, name: Option<&OsStr>) -> Result<Drive> {
        let drives = self.root.join("drive");
        let link = drives.join("default");
        let name = match name {
            Some(name) => name.to_os_string(),
            None => {
                let target = std::fs::read_link(&link).map_err(|e| match e.kind() {
                    std::io::ErrorKind::NotFound => Error::new(
                        ErrorKind::NotFound,
                        format!("there is no default drive: {} is missing", quoted(&link)),
                    ),
                    _ => Error::io(format!("reading link {}", quoted(&link)), e),
                })?;
                target.file_name().unwrap_or_default().to_os_string()
            }
        };
        let dir = drives.join(check_name(&name)?);
        match dir.is_dir() {
            true => Ok(Drive::new(&self.root, dir)),
            false => {
                let shown = Quoted(name.as_bytes()).to_string();
                Err(Error::new(ErrorKind::NotFound, format!("there is no drive {shown}")))
            }
        }
    }

    /// Makes a drive that works with `device`, or says so of one that is there. The first drive is
    /// the default one.
    pub fn add_drive(&self, name: &OsStr, device: &Path) -> Result<Drive> {
        let _lock = Lock::wait(&self.root)?;
        let dir = self.root.join("drive").join(check_name(name)?);
        let queue = dir.join("queue");
        let made = sys::make_private_dirs(&queue);
        made.map_err(|e| Error::io(format!("creating {}", quoted(&queue)), e))?;
        lock::set_link(&dir.join("device"), device)?;
        sys::sync_dir(&self.root.join("drive"))?;
        let default = self.root.join("drive/default");
        if !lock::exists(&default)? {
            lock::set_link(&default, Path::new(name))?;
        }
        Ok(Drive::new(&self.root, dir))
    }

    /// Makes a drive the default one.
    pub fn set_default_drive(&self, drive: &Drive) -> Result<()> {
        lock::set_link(&self.root.join("drive/default"), Path::new(drive.name()))
    }

    /// Every tape, by name.
    pub fn tapes(&self) -> Result<Vec<Tape>> {
        let dir = self.root.join("tape");
        let names = lock::names_in(&dir)?.into_iter();
        let names = names.filter(|it| !it.as_bytes().starts_with(b".") && dir.join(it).is_dir());
        names.map(|it| Tape::in_dir(&self.root, dir.join(it))).collect()
    }

    /// The tape with this label.
    pub fn tape(&self, label: &[u8]) -> Result<Option<Tape>> {
        tape::find(&self.root, label)
    }

    /// Notes a tape, with a copy of its label; one that is known gets this copy.
    pub fn add_tape(&self, label: &Label) -> Result<Tape> {
        let _lock = Lock::wait(&self.root)?;
        tape::register(&self.root, label)
    }

    /// The names of all pools.
    pub fn pools(&self) -> Result<Vec<Vec<u8>>> {
        let names = lock::names_in(&self.root.join("pool"))?;
        let is_pool = |it: &[u8]| !it.starts_with(b".") && !it.ends_with(b".new");
        Ok(names.iter().map(|it| it.as_bytes().to_vec()).filter(|it| is_pool(it)).collect())
    }

    fn pool_path(&self, pool: &[u8]) -> Result<PathBuf> {
        let path = self.root.join("pool").join(check_name(OsStr::from_bytes(pool))?);
        match lock::exists(&path)? {
            true => Ok(path),
            false => {
                let message = format!("there is no pool {}", Quoted(pool));
                Err(Error::new(ErrorKind::NotFound, message))
            }
        }
    }

    /// The labels of a pool. `any` has every tape, unless it lists some.
    pub fn pool(&self, pool: &[u8]) -> Result<Vec<Vec<u8>>> {
        let labels = tape::pool_labels(&self.pool_path(pool)?)?;
        if pool == b"any" && labels.is_empty() {
            return Ok(self.tapes()?.iter().map(Tape::name).collect());
        }
        Ok(labels)
    }

    /// Puts a tape into a pool, which is made if need be, or takes it out.
    pub fn set_in_pool(&self, pool: &[u8], label: &[u8], is_in: bool) -> Result<()> {
        let _lock = Lock::wait(&self.root)?;
        let path = self.root.join("pool").join(check_name(OsStr::from_bytes(pool))?);
        let mut labels = match lock::exists(&path)? {
            true => tape::pool_labels(&path)?,
            false => Vec::new(),
        };
        labels.retain(|it| it != label);
        if is_in {
            labels.push(label.to_vec());
        }
        let lines: Vec<u8> = labels.iter().flat_map(|it| [it, &b"\n"[..]].concat()).collect();
        sys::replace_file(&path, &lines)
    }

    /// Calls `each` with every file on every tape whose path `is_wanted`.
    pub fn find(
        &self,
        is_wanted: &dyn Fn(&[u8]) -> bool,
        each: &mut dyn FnMut(&Found) -> Result<()>,
    ) -> Result<()> {
        find::find(self, is_wanted, each)
    }
}

/// A name that somebody gave, which must be one of an entry in a directory, and of none of ours.
fn check_name(name: &OsStr) -> Result<&OsStr> {
    let bytes = name.as_bytes();
    let is_bad = bytes.is_empty()
        || bytes.starts_with(b".")
        || bytes.starts_with(b"@")
        || bytes.ends_with(b".new")
        || bytes.iter().any(|it| matches!(it, b'/' | b'\n' | 0))
        || bytes == b"default";
    match is_bad {
        true => Err(Error::usage(format!("{} is not a name that can be used here", Quoted(bytes)))),
        false => Ok(name),
    }
}
