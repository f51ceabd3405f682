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
//! puts them together; only `fuse`, `session`, `backing` and `kernel` know the kernel's side. SQL
//! and block files are not known in this room.

mod backing;
mod bare;
mod control;
mod disks;
mod errno;
mod fuse;
pub mod ingest;
mod kernel;
mod kinds;
mod listing;
#[cfg(test)]
mod model_tests;
mod mounted;
mod node;
mod own_dir;
mod passed;
mod point;
mod session;
mod spare;
mod tree;

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;

use crate::catalog::ingest_dir;
use crate::error::{Error, Result};
use crate::job::{Outcome, Prepare, Queue, Site};
use crate::snapshot::Snapshots;
use crate::sys::{self, MountPoint};

use control::{Control, Manner, Waiters};
use ingest::Ingest;
use ingest::clear::Clearing;
use kernel::Kernel;
use mounted::Mounted;
use node::Node;
pub use point::{is_mounted, unmount};
pub use session::{Mode, Reads};
use tree::Tree;

/// How long those who wait for a job are kept waiting for its end when the mount ends.
const TOLD_WITHIN: Duration = Duration::from_secs(2);

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
    /// What the kernel refuses or checks.
    pub flags: Flags,
    /// The exit code table of the command line, for jobs.
    pub exit_code: fn(&Outcome) -> u8,
    /// Called when the mount begins to end, before jobs are waited for.
    pub stopping: fn(),
}

/// What the kernel refuses or checks on a mount.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flags {
    /// Every change, in `/ingest` and by control files too.
    pub read_only: bool,
    /// Running programs.
    pub no_exec: bool,
    /// Set-user-ID and set-group-ID bits.
    pub no_suid: bool,
    /// Opening devices.
    pub no_dev: bool,
    /// Permissions, also where nobody else is let in.
    pub default_permissions: bool,
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
pub struct Stop {
    ends: mpsc::Sender<End>,
    mounts: Arc<Mutex<Vec<MountPoint>>>,
}

impl Stop {
    /// Asks the mount to end.
    pub fn ask(&self) {
        // A mount that has ended already needs no asking.
        let _ = self.ends.send(End::Asked);
    }

    /// Takes the mount away, whatever else still goes on.
    pub fn detach(&self) -> Result<()> {
        let mounts = self.mounts.lock().clone();
        point::detach(&mounts)
    }
}

/// Mounts a catalog and serves it until it is unmounted or asked to stop. `ready` is called once
/// the mount answers, and gets what can ask it to stop.
pub fn serve(options: &Options, ready: impl FnOnce(Stop) -> Result<()>) -> Result<End> {
    let mountpoint = point::check(options)?;
    sys::raise_open_files_limit();
    // The ingest tree applies its callers' masks; everything of our own is made private anyway.
    sys::set_umask(0);
    let snapshots = Arc::new(Snapshots::open(&options.catalog, options.cache_bytes)?);
    let ingest_dir = ingest_dir(&options.catalog);
    let ingest = Arc::new(Ingest::new(&ingest_dir)?);
    let site = Site { ingest_dir, mountpoint: mountpoint.clone() };
    let queue = Arc::new(Queue::open(&options.catalog, site, options.exit_code)?);
    let waiters = Arc::new(Waiters::new(queue.bell().clone()));
    let tree = Tree::new(snapshots.clone());
    let mode = Arc::new(OnceLock::new());
    let kernel = Arc::new(Kernel::default());
    let allow_other = options.allow_other;
    let manner = Manner { allow_other, mode: mode.clone(), kernel: kernel.clone() };
    let control = Control::new(queue.clone(), snapshots, waiters.clone(), &tree, manner);
    let (ends_out, ends_in) = mpsc::channel();
    let on_end: Arc<dyn Fn() + Send + Sync> = {
        let ends = ends_out.clone();
        Arc::new(move || {
            // Nobody listens any more if the end was asked for.
            let _ = ends.send(End::Unmounted);
        })
    };
    let mounted = Arc::new(Mounted::new(tree, Arc::new(control), ingest.clone()));
    // A mount of somebody else that ours covers is not ours to take away.
    let covered = point::mounts_at(&mountpoint)?;
    let started = session::start(options, &mountpoint, &mounted, &kernel, &on_end)?;
    queue.clear_with(clearing(&options.catalog, ingest, kernel));
    let _ = mode.set(started);
    let mut mounts = point::mounts_at(&mountpoint)?;
    mounts.retain(|it| !covered.contains(it));
    let mounts = Arc::new(Mutex::new(mounts));
    let (at_work, has_ended) = mpsc::channel::<()>();
    let worker = {
        let queue = queue.clone();
        std::thread::spawn(move || {
            let _at_work = at_work;
            queue.work();
        })
    };
    let usher = {
        let waiters = waiters.clone();
        std::thread::spawn(move || waiters.work())
    };
    let asked = [".ctl/status", "snapshots"].map(|it| std::fs::metadata(mountpoint.join(it)));
    let answers = asked.into_iter().collect::<std::io::Result<Vec<_>>>();
    let answers = answers.map_err(|e| Error::io("the mount does not answer", e));
    let stop = Stop { ends: ends_out, mounts: mounts.clone() };
    if let Err(e) = answers.and_then(|_| ready(stop.clone())) {
        stop.detach()?;
        return Err(e);
    }
    let end = wait_for_end(&ends_in, started.sessions, &mounts);
    (options.stopping)();
    let detached = stop.detach();
    queue.close();
    // Who waits is told how his job ended. But not for long: a job may need somebody who waits.
    let _ = has_ended.recv_timeout(TOLD_WITHIN);
    waiters.close();
    if worker.join().is_err() {
        log::error!("the thread that does jobs has panicked");
    }
    if usher.join().is_err() {
        log::error!("the thread that answers those who wait has panicked");
    }
    detached.map(|()| end)
}

/// What a job needs to clear the ingest tree. The kernel is told of each name that goes.
fn clearing(catalog: &Path, ingest: Arc<Ingest>, kernel: Arc<Kernel>) -> Prepare {
    let catalog = catalog.to_path_buf();
    Box::new(move || {
        let clearing = Clearing::begin(&ingest)?;
        let (catalog, kernel) = (catalog.clone(), kernel.clone());
        Ok(Box::new(move |summary, progress| {
            clearing.clear(&catalog, summary, progress, &|parent, name| {
                let parent = Node::Ingest(parent).ino().unwrap_or(1);
                kernel.forget_name(parent, name);
            })
        }))
    })
}

/// Waits until the mount is asked to end or all sessions have ended. What was taken away by others
/// is forgotten at once: the next mount there may have its device number.
///
/// While the first session lives, it serves the snapshots too: what somebody wants to unmount and
/// finds in use goes on as it is, though the other session is gone.
fn wait_for_end(ends: &mpsc::Receiver<End>, sessions: u8, mounts: &Mutex<Vec<MountPoint>>) -> End {
    for _ in 0..sessions {
        if ends.recv() != Ok(End::Unmounted) {
            return End::Asked;
        }
        let mut mounts = mounts.lock();
        let before = mounts.len();
        if let Err(e) = point::forget_gone(&mut mounts) {
            log::warn!("{e}");
        }
        // A session that ended and left its mount behind has failed.
        if before == mounts.len() && before > 0 {
            break;
        }
    }
    End::Unmounted
}
