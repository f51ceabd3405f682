//! The metas beside the blocks, compared with what the manifests have come to.
//!
//! They are a further witness: one that says more than the manifests is out of date, was left by a
//! run that did not end, or is forged. None of it enters the catalog.

use std::path::Path;

use super::{Notes, Source};
use crate::catalog::Reader;
use crate::catalog::meta_read::{self, Lookups};
use crate::chunk::HashAlgo;
use crate::error::{Error, Quoted, Result};
use crate::progress::Progress;
use crate::sys::quoted;
use crate::volume::BlockId;

/// Compares all metas of all volumes; names those that differ.
pub fn compare(
    reader: &Reader,
    sources: &[Source],
    _hash: HashAlgo,
    notes: &mut Notes<'_>,
    progress: &Progress,
) -> Result<()> {
    let mut known = Lookups::default();
    for source in sources {
        let dir = source.volume.config.path.join("meta");
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) => {
                notes.add(&dir, &Error::io("listing it", e));
                continue;
            }
        };
        for entry in entries {
            progress.check()?;
            let path = entry.map_err(|e| Error::io(quoted(&dir).to_string(), e))?.path();
            let Some(block) = block_of(&path) else { continue };
            if let Err(e) = compare_one(reader, &path, &block, &mut known, progress) {
                progress.check()?;
                notes.add(&path, &e);
            }
            Progress::add(&progress.entries, 1);
        }
    }
    Ok(())
}

/// The block that a meta is of, by its name.
fn block_of(path: &Path) -> Option<BlockId> {
    let name = path.file_name()?.to_str()?;
    let id = name.strip_suffix(".meta.json.zst").or_else(|| name.strip_suffix(".meta.json"))?;
    id.parse().ok()
}

fn compare_one(
    reader: &Reader,
    path: &Path,
    block: &BlockId,
    known: &mut Lookups,
    progress: &Progress,
) -> Result<()> {
    let index = meta_read::read_meta(path, &mut |said| {
        progress.check()?;
        if reader.has_mapping(block, &said, known)? {
            return Ok(());
        }
        let place = (Quoted(&said.place.1), Quoted(&said.place.0));
        Err(Error::corrupt(format!(
            "it says that '{}' of '{}' has bytes in its block from run {} on, which no manifest \
             says: it is left by a run that did not end, or forged, and does not count; genmeta \
             makes it anew",
            place.0, place.1, said.runs.0
        )))
    })?;
    match index.id == *block {
        true => Ok(()),
        false => Err(Error::corrupt(format!("it is the meta of block {}", index.id))),
    }
}
