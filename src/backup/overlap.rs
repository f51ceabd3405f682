//! Keeping the store out of itself.
//!
//! A source that reached into a mount of this program would be read through itself, and one inside
//! a volume would grow while it is read: both are refused. A volume or a catalog that lies
//! somewhere inside the source is left out, as `--exclude` would.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::Options;
use super::filter::Filter;
use crate::catalog::own_files;
use crate::error::{Error, Result};
use crate::sys::{self, quoted};
use crate::volume::VolumeConfig;

/// Checks `source`, an absolute path without links; gives device and inode number of what has to be
/// left out.
pub fn check(
    source: &Path,
    catalog: &Path,
    volumes: &[VolumeConfig],
    options: &Options,
    filter: &Filter,
) -> Result<HashSet<(u64, u64)>> {
    for volume in volumes {
        let path = volume.path.canonicalize().unwrap_or_else(|_| volume.path.clone());
        if source.starts_with(&path) {
            let message = format!("{} lies in the volume {}", quoted(source), quoted(&path));
            return Err(Error::usage(message));
        }
    }
    let mounts = sys::mount_points().map_err(|e| Error::io("listing mounts", e))?;
    let mounts = mounts.into_iter().filter(|it| it.fs_type == sys::OWN_FS_TYPE);
    for mount in &mounts.map(|it| it.path).collect::<Vec<PathBuf>>() {
        if source.starts_with(mount) {
            let message =
                format!("{} lies in the mounted catalog {}", quoted(source), quoted(mount));
            return Err(Error::usage(message));
        }
        let Ok(below) = mount.strip_prefix(source) else { continue };
        if !options.one_file_system && !filter.covers(below) {
            let message = format!(
                "a catalog is mounted at {}, inside the source {}: unmount it, leave it out with \
                 --exclude, or use --one-file-system",
                quoted(mount),
                quoted(source)
            );
            return Err(Error::usage(message));
        }
    }
    let mut own: Vec<PathBuf> = volumes.iter().map(|it| it.path.clone()).collect();
    own.extend(own_files(catalog));
    let own = own.iter().filter_map(|it| sys::stat(it).ok());
    Ok(own.map(|it| (it.dev, it.ino)).collect())
}
