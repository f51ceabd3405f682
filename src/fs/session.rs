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
use std::path::Path;
use std::sync::Arc;

use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};

use super::Options;
use super::fuse::{Adapter, Part};
use super::mounted::Mounted;
use crate::error::{Error, Result};
use crate::sys::{self, quoted};

/// Threads of each session. They are woken in turn, so more of them only cost wake-ups; one must be
/// left for metadata while others wait for a disk.
pub const THREADS: usize = 4;
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
    on_end: &Arc<dyn Fn() + Send + Sync>,
) -> Result<Mode> {
    let adapter = |part, reads| {
        let allow_other = options.allow_other;
        Adapter::new(mounted.clone(), part, reads, allow_other, on_end.clone())
    };
    let wanted = options.reads;
    let for_one = match wanted {
        Some(Reads::Passthrough) => Reads::Passthrough,
        _ => Reads::Ordinary,
    };
    open(adapter(Part::Whole, for_one), mountpoint, &config(options))?;
    let point = mountpoint.join("snapshots");
    // Without the right to let others in, the helper that mounts for an ordinary user cannot see
    // the directory to mount on.
    let is_possible = options.allow_other || sys::effective_uid() == 0;
    let mut mode = Mode { sessions: 1, reads: for_one };
    if is_possible && !options.one_session {
        let reads = wanted.unwrap_or(Reads::ZeroMessage);
        let mut config = config(options);
        config.mount_options.push(MountOption::RO);
        match open(adapter(Part::Snapshots, reads), &point, &config) {
            Ok(()) => mode = Mode { sessions: 2, reads },
            Err(e) => log::warn!("one session serves the whole mount: {e}"),
        }
    }
    if wanted.is_some_and(|it| it != mode.reads) {
        log::warn!("files of snapshots are read in the {} way", mode.reads.name());
    }
    Ok(mode)
}

fn open(adapter: Adapter, point: &Path, config: &Config) -> Result<()> {
    let session = Session::new(adapter, point, config)
        .map_err(|e| Error::io(format!("mounting on {}", quoted(point)), e))?;
    let session = session.spawn().map_err(|e| Error::io("starting the mount's threads", e))?;
    // fuser unmounts by path when this is dropped, which after an unmount could hit the next mount
    // there. We unmount ourselves, and once.
    let _: ManuallyDrop<BackgroundSession> = ManuallyDrop::new(session);
    read_ahead(point);
    Ok(())
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

fn config(options: &Options) -> Config {
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
    config.n_threads = Some(threads());
    config.clone_fd = true;
    config
}

fn threads() -> usize {
    std::env::var("RT_THREADS").ok().and_then(|it| it.parse().ok()).unwrap_or(THREADS)
}
