//! Reading once more what was not found where the scan had seen it.
//!
//! A file with several names is read through the first one. When that has vanished meanwhile, or
//! names another file, every name of it is looked up anew at the end of the run, and the file is
//! read through the first that is still there: one name that goes does not take the others along.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::commit::Committer;
use super::scan::OWN_BLOCK_BYTES_MIN;
use super::way::open_below;
use super::worker::{Worker, vanished};
use super::{Change, EntryPlace, FileJob, Parts, Unit, is_out_of_files, out_of_files};
use crate::catalog::VersionId;
use crate::entry::{Kind, Metadata};
use crate::error::{Error, Problem, Result};
use crate::sys::{self, at, quoted};

/// Reads the names that the committer has been told to have read again.
pub fn read_again(
    root: &Path,
    committer: &mut Committer<'_, '_>,
    parts: &Parts<'_, '_>,
) -> Result<()> {
    let places = committer.take_astray();
    if places.is_empty() {
        return Ok(());
    }
    let root = sys::open_dir(root).map_err(|e| Error::io(format!("source {}", quoted(root)), e))?;
    let mut worker = Worker::new(parts.settings, parts.chunks, parts.blocks, parts.progress)?;
    let mut links: HashMap<(u64, u64), (VersionId, Metadata)> = HashMap::new();
    for place in places {
        let dir_len = place.path.len().saturating_sub(place.name.len());
        let dir = place.path.get(..dir_len).unwrap_or_default();
        let found = open_below(&root, dir).and_then(|dir| {
            let stat = at::stat(&dir, &place.name)?;
            Ok((dir, stat))
        });
        let (parent, stat) = match found {
            Ok(found) => found,
            Err(e) if is_out_of_files(&e) => return Err(out_of_files(e)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                committer.take(failed(place, None, &vanished()))?;
                continue;
            }
            Err(e) => {
                committer.take(failed(place, None, &Error::io("looking at it again", e)))?;
                continue;
            }
        };
        let Some(meta) = Metadata::from_stat(&stat).filter(|it| it.kind == Kind::File) else {
            let error = std::io::Error::other("replaced by something that is not a file");
            committer.take(failed(place, None, &Error::io("reading it", error)))?;
            continue;
        };
        let key = (stat.dev, stat.ino);
        if let Some((version, meta)) = links.get(&key) {
            let (meta, version) = (*meta, *version);
            committer.take(Change::Link { place, meta, version, is_last: false })?;
            continue;
        }
        let version = parts.chunks.run().new_version();
        if meta.nlink > 1 {
            links.insert(key, (version, meta));
        }
        let job = FileJob { place, parent: Arc::new(parent), meta, version };
        let unit = match meta.size >= OWN_BLOCK_BYTES_MIN {
            true => Unit::Large(Box::new(job)),
            false => Unit::Pack(vec![job]),
        };
        worker.work(unit, &mut |change| match change {
            // Once more is enough.
            Change::Astray { place, version } => {
                committer.take(failed(place, Some(version), &vanished()))
            }
            change => committer.take(change),
        })?;
    }
    Ok(())
}

fn failed(place: EntryPlace, version: Option<VersionId>, error: &Error) -> Change {
    let problem = Problem::new(&*place.path, error);
    Change::Failed { place, version, problem }
}
