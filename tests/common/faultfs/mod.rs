//! A file system in memory that fails, kills and loses power at an operation of the test's choice.
//!
//! Invariant: nothing is left to chance but what a seed decides, so a trial that failed can be
//! tried again. One mount holds any number of disks, each of them a directory.

pub mod data;
pub mod disk;
pub mod fault;
mod fuse;
pub mod image;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use fuser::{BackgroundSession, Config, MountOption};

use super::{mount, need_root};
use disk::Disk;
use fuse::{Disks, Server};

pub use fault::{Fault, Lasting, Op, Rules};
pub use image::{Cut, Image, Moment};

/// Numbers that the kernel knows disks by: none is used twice while it may remember.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// A mount with disks in it.
pub struct FaultFs {
    pub point: PathBuf,
    disks: Arc<Disks>,
    session: Option<BackgroundSession>,
}

impl FaultFs {
    /// Mounts one without disks at `point`, which is made.
    pub fn new(point: &Path) -> FaultFs {
        need_root("it mounts a file system that fails");
        std::fs::create_dir(point).unwrap();
        let disks = Arc::new(Disks::default());
        let server = Server { disks: disks.clone(), listings: Mutex::default() };
        let mut config = Config::default();
        config.mount_options =
            vec![MountOption::FSName("faultfs".to_owned()), MountOption::Suid, MountOption::Dev];
        let session = fuser::spawn_mount(server, point, &config).unwrap();
        FaultFs { point: point.to_path_buf(), disks, session: Some(session) }
    }

    /// Puts a disk in, in the place of the one that had this name; gives where it is.
    pub fn put(&self, name: &str, disk: Disk) -> (PathBuf, Arc<Mutex<Disk>>) {
        let (number, disk) = (NEXT.fetch_add(1, Ordering::Relaxed), Arc::new(Mutex::new(disk)));
        let old = self.disks.numbers.write().unwrap().insert(name.into(), number);
        let mut disks = self.disks.by_number.write().unwrap();
        disks.insert(number, disk.clone());
        old.map(|it| disks.remove(&it));
        (self.point.join(name), disk)
    }
}

impl Drop for FaultFs {
    fn drop(&mut self) {
        mount::detach(&self.point);
        if let Some(session) = self.session.take() {
            // It is unmounted already; only its thread has to end.
            std::mem::forget(session);
        }
    }
}
