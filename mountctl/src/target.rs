//! What is to be mounted where, checked before anything is started.
//!
//! Invariant: both paths are absolute, and nothing live is ever covered by a new mount.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::failure::{Class, Failure};
use crate::mounts::MountTable;
use crate::probe::{self, Answer};
use crate::shown::shown;

/// The daemon's own exit code for this, so that a script sees one code from either.
const NO_SUCH_CATALOG: u8 = 10;

/// A catalog and the directory it is to be mounted on.
#[derive(Debug)]
pub struct Target {
    pub catalog: PathBuf,
    pub mountpoint: PathBuf,
}

impl Target {
    pub fn resolve(catalog: &Path, mountpoint: &Path) -> Result<Self, Failure> {
        let catalog = fs::canonicalize(catalog).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Failure::new(
                Class::Daemon(NO_SUCH_CATALOG),
                format!("no such catalog: {}; check the path", shown(catalog)),
            ),
            _ => Failure::on_path("resolve the catalog", catalog, &error),
        })?;
        let table = MountTable::current()?;
        let resolved = table.resolve(mountpoint)?;
        // What is mounted is not looked at here: it may be dead, or an automount waiting for us.
        if table.top(&resolved).is_none() {
            let found = fs::metadata(&resolved)
                .map_err(|error| Failure::on_path("mount on", &resolved, &error))?;
            if !found.is_dir() {
                return Err(Failure::failed(format!(
                    "cannot mount on {}: not a directory",
                    shown(&resolved)
                )));
            }
        }
        Ok(Self { catalog, mountpoint: resolved })
    }

    /// Sees whether something is mounted there already, and says whether that is a dead mount of
    /// ours. It is no obstacle: the daemon takes it away itself, and no other one comes between.
    pub fn has_dead_mount(&self) -> Result<bool, Failure> {
        let point = &self.mountpoint;
        let table = MountTable::current()?;
        // An automount point stays below the mount it has asked for.
        let Some(mount) = table.top(point).filter(|it| it.kind != "autofs") else {
            return Ok(false);
        };
        if !mount.is_ours() {
            return Err(Failure::failed(format!(
                "{} already holds a mount of type {}; unmount it or choose another directory",
                shown(point),
                shown(&mount.kind)
            )));
        }
        match probe::ask(point, probe::LIMIT) {
            Answer::Dead => Ok(true),
            Answer::Status(_) => Err(Failure::failed(format!(
                "{} is already mounted at {}",
                shown(&mount.source),
                shown(point)
            ))),
            other => {
                let advice = match other {
                    Answer::Denied => "choose another directory",
                    _ => "`mountctl umount --lazy` takes it away",
                };
                Err(Failure::failed(format!(
                    "{} already holds a raidtape mount which {}; {advice}",
                    shown(point),
                    other.clause()
                )))
            }
        }
    }
}
