//! `volumes --readopt`: a volume that is somewhere else now.
//!
//! It is known by the id in its own manifest, wherever it lies. Its index is looked through for
//! blocks and copies that the catalog does not have.

use std::path::{Path, PathBuf};

use super::Store;
use crate::catalog::Writer;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::sys::quoted;
use crate::volume::{Record, Status, Stored, Volume, VolumeManifest};

/// What came of it.
#[derive(Debug)]
pub struct Readopted {
    /// The volume's own name.
    pub uuid: String,
    /// Where it was.
    pub was: PathBuf,
    /// Where it is.
    pub path: PathBuf,
    /// Whether it takes new blocks.
    pub status: Status,
    /// Blocks and copies that the catalog did not have.
    pub found: u64,
    /// Records whose block is not there, or has another length.
    pub lost: u64,
}

/// Notes that the volume at `path` is there now.
pub fn readopt(catalog: &Path, path: &Path, progress: &Progress) -> Result<Readopted> {
    progress.set_phase("preparing");
    let failed = |e| Error::io(format!("volume {}", quoted(path)), e);
    let path = path.canonicalize().map_err(failed)?;
    let manifest = VolumeManifest::read(&path)?;
    let mut writer = Writer::open(catalog)?;
    let known = writer.volumes()?.into_iter().find(|it| it.uuid == manifest.uuid);
    let Some(config) = known else {
        let why = match manifest.other(super::retire::RETIRED_KEY) {
            Some(date) => format!("was retired on {date}"),
            None => "belongs to another catalog".to_owned(),
        };
        let message = format!("volume {} at {} {why}", manifest.uuid, quoted(&path));
        return Err(Error::new(ErrorKind::NotFound, message));
    };
    if config.path != path
        && VolumeManifest::read(&config.path).is_ok_and(|it| it.uuid == config.uuid)
    {
        let message = format!(
            "volume {} is at {} too: one of the two is a copy; take it away first",
            config.uuid,
            quoted(&config.path)
        );
        return Err(Error::usage(message));
    }
    if manifest.hash != writer.settings()?.hash {
        let message = format!("{} names blocks by another hash", quoted(&path));
        return Err(Error::corrupt(message));
    }
    writer.set_volume_path(config.number, &path, manifest.status)?;
    drop(writer);
    progress.set_phase("looking through its index");
    let (mut store, volumes) = Store::open(catalog)?;
    let mut done = Readopted {
        uuid: config.uuid,
        was: config.path,
        path,
        status: manifest.status,
        found: 0,
        lost: 0,
    };
    match volumes.get(config.number) {
        Some(volume) => look_through(&mut store, volume, &mut done, progress)?,
        None => return Err(Error::new(ErrorKind::Offline, "the volume has gone again")),
    }
    progress.set_phase("done");
    Ok(done)
}

fn look_through(
    store: &mut Store,
    volume: &Volume,
    done: &mut Readopted,
    progress: &Progress,
) -> Result<()> {
    let number = volume.config.number;
    let known_len = store.reader.index_len(number)?;
    let mut records = volume.index_from(0)?;
    loop {
        progress.check()?;
        let record_at = records.offset();
        let Some(Record { number: said, index }) = records.next_record()? else { break };
        if record_at >= known_len {
            break;
        }
        if store.reader.has_copy(&index.id, number)? {
            continue;
        }
        // Its own number, if no other block has it by now.
        let next = store.writer.next_block()?;
        let block = match said {
            Some(said) if said >= next => said,
            _ => next,
        };
        match Stored::adopt(volume, block, index, record_at)? {
            Some(it) => store.writer.adopt(&[it], number, known_len)?,
            None => {
                done.lost += 1;
                continue;
            }
        }
        done.found += 1;
    }
    if records.offset() < known_len {
        let message = format!(
            "the index of volume {} is damaged at byte {}: run validate --repair",
            quoted(&volume.config.path),
            records.offset()
        );
        return Err(Error::corrupt(message));
    }
    Ok(())
}
