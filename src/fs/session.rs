//! The sessions with the kernel that make up a mount, and how they are chosen.
//!
//! What a session may be told holds for the whole of it. So the snapshots, which never change, have
//! one of their own where that is possible: read-only, mounted over the `snapshots` directory of
//! the first. In it files and directories are opened without a message, which for small files is
//! most of the cost. Where a second mount is not possible, or not wished for, one session serves
//! all.
//!
//! | sessions | reads        | an open file of a snapshot                                        |
//! |----------|--------------|-------------------------------------------------------------------|
//! | 2        | zero-message | costs no message; read by this program                            |
//! | 1 or 2   | passthrough  | one that is a raw block as it lies there is read by the kernel     |
//! | 1        | ordinary     | costs two messages; read by this program                          |

use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use fuser::{BackgroundSession, Config, MountOption, Notifier, Session, SessionACL};

use super::Options;
use super::fuse::{Adapter, Part};
use super::kernel::Kernel;
use super::mounted::Mounted;
use super::point;
use crate::error::{Error, Result};
use crate::sys;

/// Fewest and most threads of each session. They are woken in turn, so more than there are
/// processors only cost wake-ups; one must be left for metadata while others wait for a disk.
const THREADS: (usize, usize) = (2, 4);
/// How far the kernel reads ahead, in KiB: as much as one request can ask for.
const READ_AHEAD_KIB: u32 = 1024;

/// How files of snapshots are opened and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// Each open and close is a message.
    Ordinary,
    /// No open is.
    ZeroMessage,
    /// Each open is, and files that are one raw block are then read by the kernel alone.
    Passthrough,
}

impl Reads {
    /// As options and status files write it.
    pub fn name(self) -> &'static str {
        match self {
            Reads::Ordinary => "ordinary",
            Reads::ZeroMessage => "zero-message",
            Reads::Passthrough => "passthrough",
        }
    }
}

/// How a mount came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// How many sessions there are.
    pub sessions: u8,
    /// How files of snapshots are read.
    pub reads: Reads,
}

/// Starts the sessions of a mount. They end when the file system is unmounted; `on_end` is called
/// for each of them then.
pub fn start(
    options: &Options,
    mountpoint: &Path,
    mounted: &Arc<Mounted>,
    kernel: &Arc<Kernel>,
    on_end: &Arc<dyn Fn() + Send + Sync>,
) -> Result<Mode> {
    let adapter = |part, reads| {
        let allow_other = options.allow_other;
        Adapter::new(mounted.clone(), part, reads, allow_other, kernel.clone(), on_end.clone())
    };
    let is_root = sys::effective_uid() == 0;
    let start = |part, ways: &[Reads]| {
        let point = match part {
            Part::Whole => mountpoint.to_path_buf(),
            Part::Snapshots => mountpoint.join("snapshots"),
        };
        let mut failed = Error::usage("no way to read is possible");
        for reads in ways.iter().copied().filter(|it| is_root || *it != Reads::Passthrough) {
            match open(adapter(part, reads), &point, &config(options, part)) {
                Ok(notifier) => {
                    if part == Part::Whole {
                        kernel.attach(notifier);
                    }
                    return Ok(reads);
                }
                Err(e) => failed = e,
            }
        }
        Err(failed)
    };
    let wants_passthrough = options.reads == Some(Reads::Passthrough);
    let reads = match wants_passthrough {
        true => start(Part::Whole, &[Reads::Passthrough, Reads::Ordinary])?,
        false => start(Part::Whole, &[Reads::Ordinary])?,
    };
    let mut mode = Mode { sessions: 1, reads };
    // Without the right to let others in, the helper that mounts for an ordinary user cannot see
    // the directory to mount on.
    if (is_root || options.allow_other) && !options.one_session {
        let second = match wants_passthrough {
            true => start(Part::Snapshots, &[Reads::Passthrough, Reads::ZeroMessage]),
            false => start(Part::Snapshots, &[Reads::ZeroMessage]),
        };
        match second {
            Ok(reads) => mode = Mode { sessions: 2, reads },
            Err(e) => log::warn!("one session serves the whole mount: {e}"),
        }
    }
    if options.reads.is_some_and(|it| it != mode.reads) {
        log::warn!("files of snapshots are read in the {} way", mode.reads.name());
    }
    Ok(mode)
}

fn open(adapter: Adapter, point: &Path, config: &Config) -> Result<Notifier> {
    let session =
        Session::new(adapter, point, config).map_err(|e| point::mount_failed(point, &e))?;
    let session = session.spawn().map_err(|e| Error::io("starting the mount's threads", e))?;
    // fuser unmounts by path when this is dropped, which after an unmount could hit the next mount
    // there. We unmount ourselves, and once.
    let session: ManuallyDrop<BackgroundSession> = ManuallyDrop::new(session);
    read_ahead(point);
    Ok(session.notifier())
}

/// Has the kernel read ahead further than fuser can ask for, where this process may.
fn read_ahead(point: &Path) {
    let set = || {
        let (major, minor) = sys::device_parts(sys::stat(point)?.dev);
        let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
        std::fs::write(path, READ_AHEAD_KIB.to_string())
    };
    if let Err(e) = set() {
        log::debug!("setting how far the kernel reads ahead: {e}");
    }
}

fn config(options: &Options, part: Part) -> Config {
    let mut config = Config::default();
    let name = options.catalog.to_str().filter(|it| !it.contains([',', '\\', '\n']));
    config.mount_options = vec![
        MountOption::FSName(name.unwrap_or("raidtape").to_owned()),
        // Not `Subtype`, which fuser leaves out when it mounts as root.
        MountOption::CUSTOM("subtype=raidtape".to_owned()),
        MountOption::NoAtime,
    ];
    // What a tree holds is shown and used as it is, if it is root who mounts it. Of others the
    // kernel takes neither.
    let is_root = sys::effective_uid() == 0;
    let flags = options.flags;
    let wanted = [
        (flags.read_only, MountOption::RO),
        (flags.no_exec, MountOption::NoExec),
        (is_root && !flags.no_suid, MountOption::Suid),
        (is_root && !flags.no_dev, MountOption::Dev),
        (options.allow_other || flags.default_permissions, MountOption::DefaultPermissions),
    ];
    config.mount_options.extend(wanted.into_iter().filter(|it| it.0).map(|it| it.1));
    if options.allow_other {
        config.acl = SessionACL::All;
    }
    if part == Part::Snapshots {
        config.mount_options.push(MountOption::RO);
    }
    config.n_threads = Some(threads());
    config.clone_fd = true;
    config
}

/// How many threads a session has.
pub fn threads() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    processors.clamp(THREADS.0, THREADS.1)
}
