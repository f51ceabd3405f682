//! Runs on tape: archived as jobs of the spool, recalled to volumes, and found again without a
//! catalog.
//!
//! What goes to tape has the names that it has on a volume, so that whoever unpacks all archives of
//! all tapes into one directory has a volume, and `restore.sh` works there. Invariant: of a block
//! only those bytes go to a tape, and come back from one, that have the hash which is its name; and
//! what is known of tapes never claims more than the spool's results, which are there first.

pub mod gather;
mod index;
mod members;
mod note;
mod plan;
pub mod recall;
pub mod shelf;
mod targets;
pub mod verify;
mod waiting;
pub mod walk;
mod work;

pub use index::{Indexed, index};
pub use members::Members;
pub use note::Noter;
pub use plan::{BATCH_BYTES, Options, Planned, count, lacks_any, plan, unfinished};
pub use waiting::{Waiting, waiting};
pub use work::{Archived, Means, archive};

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::catalog::{Reader, Tapes, copy, manifest, meta};
use crate::error::{ErrorKind, Quoted, Result};
use crate::tape::spool::Spool;
use crate::tape::spool::job::Job;
use crate::tape::spool::log::TapeFile as LogFile;
use crate::volume::BlockId;

/// How to get data out with nothing but `mt`, `dd` and `cpio`: in each archive job.
pub const GUIDE: &str = include_str!("TAPES.txt");
/// Its name.
pub const GUIDE_NAME: &[u8] = b"TAPES.txt";

/// Problems that are kept with their texts; more are counted.
const PROBLEMS_MAX: usize = 1000;

/// What a member of an archive is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A block.
    Block(BlockId),
    /// What is in a block.
    Meta(BlockId),
    /// What a run has changed.
    Manifest,
    /// A copy of the catalog.
    Catalog,
    /// What a volume is, or a text that explains it to people.
    Guide,
    /// Nothing of ours.
    Other,
}

impl Kind {
    /// What the member with this name is.
    pub fn of(name: &[u8]) -> Kind {
        let Ok(text) = std::str::from_utf8(name) else { return Kind::Other };
        if let Some(rest) = text.strip_prefix("chunks/") {
            let id = rest.rsplit('/').next().and_then(|it| it.parse::<BlockId>().ok());
            return id.filter(|it| block_name(it) == text).map_or(Kind::Other, Kind::Block);
        }
        if let Some(rest) = text.strip_prefix("meta/") {
            let id = rest.strip_suffix(".meta.json.zst").and_then(|it| it.parse::<BlockId>().ok());
            let id = id.filter(|it| meta::document_name(it) == text);
            return id.map_or(Kind::Other, Kind::Meta);
        }
        let (dir, file) = text.split_once('/').unwrap_or(("", text));
        match dir {
            manifest::DIR if manifest::run_of(file).is_some() => Kind::Manifest,
            copy::DIR if copy::run_of(file).is_some() => Kind::Catalog,
            "" if GUIDES.contains(&file) => Kind::Guide,
            _ => Kind::Other,
        }
    }
}

/// The files at the top of a volume that go to tape.
const GUIDES: [&str; 4] = ["TAPES.txt", "RESTORE.txt", "restore.sh", ".rt_volume_manifest"];

/// Whether a job archives runs of the catalog that is at `catalog` now: it has the name of one.
fn is_of(job: &Job, catalog: &Path, reader: &Reader) -> Result<bool> {
    let fields = job.fields();
    if let (Some(run), Some(uuid)) = (fields.number("run"), fields.get("run-uuid")) {
        match reader.run(run) {
            Ok(run) => return Ok(run.uuid.as_bytes() == uuid),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    // One that was made before jobs had such names has only the path.
    Ok(fields.get("catalog") == Some(catalog.as_os_str().as_bytes()))
}

/// The tapes that hold something of a catalog as far as it knows, and were labelled anew since: the
/// spool has put aside the log that tells of their files, or knows that they are gone.
fn written_over(spool: &Spool, tapes: &Tapes) -> Result<Vec<Vec<u8>>> {
    let mut gone = Vec::new();
    for known in tapes.tapes()?.into_iter().filter(|it| !it.is_lost) {
        let label = known.tape.label;
        let Some(tape) = spool.tape(&label)? else { continue };
        let files = tapes.files(&label)?;
        let is_known = |it: &LogFile| {
            files.iter().any(|file| {
                let noted = (file.filenum, file.position, &*file.job, file.batch);
                noted == (it.filenum, it.position, &*it.job, it.batch)
            })
        };
        if tape.is_gone()? || tape.has_put_aside(&is_known)? {
            gone.push(label);
        }
    }
    Ok(gone)
}

/// Notes that those are lost. What they had goes to other tapes.
pub fn note_written_over(spool: &Spool, catalog: &Path) -> Result<()> {
    let Some(tapes) = Tapes::look(catalog)? else { return Ok(()) };
    let gone = written_over(spool, &tapes)?;
    if gone.is_empty() {
        return Ok(());
    }
    drop(tapes);
    let mut tapes = Tapes::open(catalog)?;
    for label in gone {
        let shown = Quoted(&label);
        log::warn!("tape {shown} was labelled anew: what it had of this catalog counts no more");
        tapes.set_lost(&label, true)?;
    }
    Ok(())
}

/// The name of a block on a volume.
pub fn block_name(id: &BlockId) -> String {
    let hex = id.to_string();
    let (xx, yy) = (hex.get(..2).unwrap_or_default(), hex.get(2..4).unwrap_or_default());
    format!("chunks/{xx}/{yy}/{hex}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::Digest;

    #[test]
    fn members_are_known_by_names_that_a_volume_has() {
        let id = Digest([0xab; 32]);
        assert_eq!(Kind::of(block_name(&id).as_bytes()), Kind::Block(id));
        assert_eq!(Kind::of(meta::document_name(&id).as_bytes()), Kind::Meta(id));
        assert_eq!(Kind::of(manifest::document_name(7).as_bytes()), Kind::Manifest);
        assert_eq!(Kind::of(copy::document_name(7).as_bytes()), Kind::Catalog);
        assert_eq!(Kind::of(b"restore.sh"), Kind::Guide);
        let other = [
            format!("chunks/aa/ab/{id}"),
            format!("chunks/ab/ab/../{id}"),
            format!("/chunks/ab/ab/{id}"),
            format!("meta/{id}.meta.json.zst/"),
            "manifests/run-1.jsonl".to_owned(),
            "catalog/../catalog".to_owned(),
            "x/restore.sh".to_owned(),
            String::new(),
        ];
        for name in other {
            assert_eq!(Kind::of(name.as_bytes()), Kind::Other, "{name}");
        }
    }
}
