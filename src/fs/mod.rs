//! The mount: every run as an ordinary read-only tree, a writable `/ingest`, and control files.
//!
//! ```text
//! /snapshots/<run>/…       the tree of a finished run;  latest -> newest run
//! /ingest/…                writable; the source named "ingest"
//! /.ctl/backup, …          a written line is the command of that name
//! /.ctl/jobs/<id>/…        command, status, log, progress.json, cancel
//! /.ctl/status, version    what this mount is
//! ```
//!
//! `node` gives inode numbers, `tree` the snapshots, `ingest` and `control` the rest, and `mounted`
//! puts them together; only `fuse` and `session` know the kernel's side. SQL and block files are not
//! known in this room.

mod backing;
mod bare;
mod control;
mod errno;
mod fuse;
pub mod ingest;
mod listing;
#[cfg(test)]
mod model_tests;
mod mounted;
mod node;
mod session;
mod spare;
mod tree;

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};

use crate::catalog::{Reader, ingest_dir};
use crate::error::{Error, ErrorKind, Result};
use crate::job::{Outcome, Queue, Site};
use crate::snapshot::Snapshots;
use crate::sys::{self, quoted};

use control::{Control, Manner, Waiters};
use ingest::Ingest;
use mounted::Mounted;
pub use session::{Mode, Reads};
use tree::Tree;

/// What to mount and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The catalog.
    pub catalog: PathBuf,
    /// Where; an existing directory.
    pub mountpoint: PathBuf,
    /// Whether other users are let in; the kernel then checks permissions.
    pub allow_other: bool,
    /// Memory for decompressed data, in bytes.
    pub cache_bytes: u64,
    /// How files of snapshots are to be read; `None` chooses.
    pub reads: Option<Reads>,
    /// Whether one session is to serve all, where there could be two.
    pub one_session: bool,
    /// The exit code table of the command line, for jobs.
    pub exit_code: fn(&Outcome) -> u8,
}

/// Why a mount ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Somebody unmounted it.
    Unmounted,
    /// The process was asked to stop.
    Asked,
}

/// Something that asks a mount to end.
#[derive(Clone)]
pub struct Stop(mpsc::Sender<End>);

impl Stop {
    /// Asks the mount to end.
    pub fn ask(&self) {
        // A mount that has ended already needs no asking.
        let _ = self.0.send(End::Asked);
    }
}

/// Mounts a catalog and serves it until it is unmounted or asked to stop. `ready` is called once
/// the mount answers, and gets what can ask it to stop.
pub fn serve(options: &Options, ready: impl FnOnce(Stop) -> Result<()>) -> Result<End> {
    let mountpoint = check_mountpoint(options)?;
    sys::raise_open_files_limit();
    // The ingest tree applies its callers' masks; everything of our own is made private anyway.
    sys::set_umask(0);
    let snapshots = Arc::new(Snapshots::open(&options.catalog, options.cache_bytes)?);
    let ingest_dir = ingest_dir(&options.catalog);
    let ingest = Ingest::new(&ingest_dir)?;
    let site = Site { ingest_dir, mountpoint: mountpoint.clone() };
    let queue = Arc::new(Queue::open(&options.catalog, site, options.exit_code)?);
    let waiters = Arc::new(Waiters::new(queue.bell().clone()));
    let tree = Tree::new(snapshots.clone());
    let mode = Arc::new(OnceLock::new());
    let manner = Manner { allow_other: options.allow_other, mode: mode.clone() };
    let control = Control::new(queue.clone(), snapshots, waiters.clone(), &tree, manner);
    let (ends_out, ends_in) = mpsc::channel();
    let on_end: Arc<dyn Fn() + Send + Sync> = {
        let ends = ends_out.clone();
        Arc::new(move || {
            // Nobody listens any more if the end was asked for.
            let _ = ends.send(End::Unmounted);
        })
    };
    let mounted = Arc::new(Mounted::new(tree, Arc::new(control), ingest));
    let started = session::start(options, &mountpoint, &mounted, &on_end)?;
    let _ = mode.set(started);
    let worker = {
        let queue = queue.clone();
        std::thread::spawn(move || queue.work())
    };
    let usher = {
        let waiters = waiters.clone();
        std::thread::spawn(move || waiters.work())
    };
    let asked = [".ctl/status", "snapshots"].map(|it| std::fs::metadata(mountpoint.join(it)));
    let answers = asked.into_iter().collect::<std::io::Result<Vec<_>>>();
    let answers = answers.map_err(|e| Error::io("the mount does not answer", e));
    if let Err(e) = answers.and_then(|_| ready(Stop(ends_out))) {
        unmount(&mountpoint)?;
        return Err(e);
    }
    let end = ends_in.recv().unwrap_or(End::Unmounted);
    if end == End::Asked {
        unmount(&mountpoint)?;
    } else if started.sessions > 1 {
        // Half a mount is none.
        take_away_rest(&mountpoint);
    }
    queue.close();
    if worker.join().is_err() {
        log::error!("the thread that does jobs has panicked");
    }
    waiters.close();
    if usher.join().is_err() {
        log::error!("the thread that answers those who wait has panicked");
    }
    Ok(end)
}

/// One of the two sessions has ended: the other must not stay.
fn take_away_rest(mountpoint: &Path) {
    for path in [mountpoint.join("snapshots"), mountpoint.to_path_buf()] {
        if is_mounted(&path).unwrap_or(false)
            && let Err(e) = unmount(&path)
        {
            log::warn!("{e}");
        }
    }
}

/// Checks that the mount point is a directory that overlaps nothing the mount is made of.
fn check_mountpoint(options: &Options) -> Result<PathBuf> {
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
    let mounts = sys::mount_points().map_err(|e| Error::io("listing mounts", e))?;
    if mounts.iter().any(|it| it.path == mountpoint && it.fs_type == sys::OWN_FS_TYPE) {
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

/// Detaches the mount on `mountpoint`, which may be dead. Open files on it stay until closed.
pub fn unmount(mountpoint: &Path) -> Result<()> {
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
            let text = crate::error::Quoted(output.stderr.trim_ascii()).to_string();
            Err(Error::new(ErrorKind::Io, format!("{}: {text}", what())))
        }
    }
}

/// Whether one of our mounts is on `mountpoint`, alive or dead.
pub fn is_mounted(mountpoint: &Path) -> Result<bool> {
    let mounts = sys::mount_points().map_err(|e| Error::io("listing mounts", e))?;
    let bytes = mountpoint.as_os_str().as_bytes();
    let same = |it: &sys::MountPoint| it.path.as_os_str().as_bytes() == bytes;
    Ok(mounts.iter().any(|it| same(it) && it.fs_type == sys::OWN_FS_TYPE))
}
