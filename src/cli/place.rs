//! Making way for a mount: one at a time on a directory, and none on top of another.
//!
//! Invariant: only a mount of ours that the kernel itself calls dead is taken away. A mount that
//! merely does not answer has a process behind it that may be busy, and is left alone.

use std::fs::{File, TryLockError};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::chunk::HashAlgo;
use crate::error::{Error, ErrorKind, Result};
use crate::fs;
use crate::sys::{self, quoted};

/// The name by which a process knows that it is to ask a mount.
pub const PROBE: &str = "raidtape-probe";
/// How long a mount may take to answer before it counts as slow.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How long another program may have the turn.
const TURN_WITHIN: Duration = Duration::from_secs(30);
/// How often is looked again.
const PAUSE: Duration = Duration::from_millis(10);
/// What the asking process ends with if the mount is dead.
const DEAD: u8 = 11;
/// What it ends with if it learned nothing.
const UNKNOWN: u8 = 12;

/// The mount point's real path. A mount on it may be dead, so in that case only what is above it is
/// asked.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    let failed = |e| Error::io(format!("mount point {}", quoted(path)), e);
    let path = std::path::absolute(path).map_err(failed)?;
    if let (Some(parent), Some(name)) = (path.parent(), path.file_name()) {
        let candidate = parent.canonicalize().map_err(failed)?.join(name);
        if fs::is_mounted(&candidate)? {
            return Ok(candidate);
        }
    }
    path.canonicalize().map_err(failed)
}

/// A turn to mount or unmount on a directory, until it is dropped.
///
/// It is the lock of a file that nobody else can open, or anybody could hold up root's mounts for
/// ever. So root and others do not wait for each other. A user without such a place (no session of
/// logind) takes the directory above, which anybody may hold: it is waited for, and then gone on
/// without. Where that cannot be opened there is no turn.
pub fn turn(mountpoint: &Path) -> Result<Option<File>> {
    let own = own_lock(mountpoint)?;
    let is_own = own.is_some();
    let above = || File::open(mountpoint.parent().unwrap_or(mountpoint)).ok();
    let Some(lock) = own.or_else(above) else { return Ok(None) };
    let deadline = Instant::now() + TURN_WITHIN;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(Some(lock)),
            Err(TryLockError::Error(e)) => {
                log::debug!("no lock for {}: {e}", quoted(mountpoint));
                return Ok(None);
            }
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            Err(TryLockError::WouldBlock) if !is_own => {
                log::warn!("{} is locked by somebody: going on", quoted(mountpoint));
                return Ok(None);
            }
            Err(TryLockError::WouldBlock) => {
                let message = format!(
                    "another program has been mounting or unmounting {} for {} s: try again later",
                    quoted(mountpoint),
                    TURN_WITHIN.as_secs()
                );
                return Err(Error::new(ErrorKind::Locked, message));
            }
        }
    }
}

/// The file of a mount point's turn in this user's own directory below `/run`, if there can be one.
fn own_lock(mountpoint: &Path) -> Result<Option<File>> {
    let user = sys::effective_uid();
    let dir = match user {
        0 => PathBuf::from("/run/raidtape"),
        // Not $XDG_RUNTIME_DIR, which not all processes of a user have.
        user => PathBuf::from(format!("/run/user/{user}/raidtape")),
    };
    let failed = |e| Error::io(format!("lock of mount points in {}", quoted(&dir)), e);
    match sys::make_private_dir(&dir) {
        Ok(_) => {}
        // Root's mounts wait for nobody else.
        Err(e) if user == 0 => return Err(failed(e)),
        Err(_) => return Ok(None),
    }
    let found = std::fs::symlink_metadata(&dir).map_err(failed)?;
    if found.uid() != user {
        // Root of a user namespace, who is somebody else here.
        return Ok(None);
    }
    if !found.is_dir() || found.mode() & 0o077 != 0 {
        let message = format!(
            "{} must be a directory that only user {user} can enter: remove it",
            quoted(&dir)
        );
        return Err(Error::new(ErrorKind::Io, message));
    }
    let name = HashAlgo::Blake3.hash(mountpoint.as_os_str().as_bytes()).to_string();
    let mut options = sys::private_file();
    options.write(true).create(true).open(dir.join(name)).map(Some).map_err(failed)
}

/// Takes dead mounts of ours away from `mountpoint`; says whether there was one. A live one is an
/// error.
pub fn make_way(mountpoint: &Path) -> Result<bool> {
    let mut found = false;
    while fs::is_mounted(mountpoint)? {
        let is_dead = ask(mountpoint)
            .map_err(|e| Error::io(format!("asking the mount on {}", quoted(mountpoint)), e))?;
        let trouble = match is_dead {
            Some(true) => {
                fs::unmount(mountpoint)?;
                found = true;
                continue;
            }
            Some(false) => String::new(),
            None => format!(
                ", and does not answer now: if it never will, end its process or run raidtape \
                 umount {}",
                quoted(mountpoint)
            ),
        };
        let message = format!("a catalog is mounted on {} already{trouble}", quoted(mountpoint));
        return Err(Error::usage(message));
    }
    Ok(found)
}

/// Asks a mount whether it is dead; nothing if it does not say.
///
/// A process of its own does it: a request that the daemon has taken and does not answer holds its
/// caller beyond the reach of any signal, and that must not be us.
fn ask(mountpoint: &Path) -> std::io::Result<Option<bool>> {
    let mut child = Command::new("/proc/self/exe")
        .arg0(PROBE)
        .arg(mountpoint)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + ANSWER_WITHIN;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(match status.code() {
                Some(0) => Some(false),
                Some(code) if code == i32::from(DEAD) => Some(true),
                _ => None,
            });
        }
        if Instant::now() >= deadline {
            // It may be beyond reach, so it is not waited for.
            let _ = child.kill();
            return Ok(None);
        }
        std::thread::sleep(PAUSE);
    }
}

/// The asking process: gives its exit code.
pub fn probe(mountpoint: &Path) -> u8 {
    // The root's attributes may be known to the kernel still; an open has to be answered.
    match File::open(mountpoint.join(".ctl/status")) {
        Ok(_) => 0,
        // The second is what a request gets that was under way when the daemon died.
        Err(e) => match e.raw_os_error() {
            Some(sys::c::ENOTCONN | sys::c::ECONNABORTED) => DEAD,
            _ => UNKNOWN,
        },
    }
}
