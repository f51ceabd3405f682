//! A volume, and a catalog, of what tapes had.
//!
//! Runs are replayed from their manifests. Where one of those is lost, so are all later changes of
//! its source; then the copy of the catalog is taken that a tape has, and only what came after it
//! is replayed.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::Gathered;
use super::lot::Lot;
use crate::catalog::{RunId, copy, history, manifest, meta_read};
use crate::chunk::HashAlgo;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::rebuild::{self, from_copy};
use crate::sys::{self, Time, quoted};
use crate::tape::runs::Kind;
use crate::volume::{Facts, IndexMender, Status, Volume, VolumeConfig};

/// Part of the file system that the new volume leaves free, in percent, if no tape says.
const RESERVE_PERCENT: u8 = 10;

/// Makes the volume `into` and the catalog of what tapes have of one.
pub fn make(
    (catalog, into, allow_gaps): (&Path, &Path, bool),
    mut lot: Lot,
    (done, progress): (&mut Gathered, &Progress),
    lacking: &mut rebuild::Lacking<'_>,
) -> Result<rebuild::Summary> {
    lot.move_to(into, progress)?;
    let copied = match look_at_copy(into, &lot, progress) {
        Err(e) if super::is_of_disk(&e) => return Err(e),
        Err(e) => {
            done.note(progress, "the copy of the catalog".to_owned(), &e);
            None
        }
        Ok(copied) => copied,
    };
    make_volume(into, &mut lot, copied.as_ref(), progress)?;
    let volumes = vec![into.to_path_buf()];
    let Some(Copied { run, .. }) = copied else {
        let options = rebuild::Options { volumes, allow_gaps };
        return rebuild::run(catalog, &options, progress, lacking).map_err(|e| without(into, e));
    };
    let path = into.join(copy::document_name(run));
    let known = lot.runs.into_iter().collect();
    let options = from_copy::Options { volumes, allow_gaps, known };
    match from_copy::run(catalog, &options, progress, lacking) {
        Ok(restored) => {
            done.copy = Some(run);
            // It does not know the volume that it lies on.
            let removed = std::fs::remove_file(&path);
            removed.map_err(|e| Error::io(format!("removing {}", quoted(&path)), e))?;
            Ok(restored.summary)
        }
        Err(e) => {
            let hint = format!(
                "with the copy of the catalog of after run {run}, which is on it, raidtape \
                 catalog-restore --volumes {} goes on, with the same --catalog",
                quoted(into)
            );
            Err(without(into, e.context(hint)))
        }
    }
}

/// The tapes need not be read once more for that.
fn without(into: &Path, error: Error) -> Error {
    error.context(format!("the volume {} is made, but no catalog of it", quoted(into)))
}

/// A copy of the catalog that is used.
struct Copied {
    run: RunId,
    /// The highest number of a volume that it knows.
    volume: i64,
}

/// Looks whether the copy of the catalog has runs whose manifests are lost. Then it is put onto
/// what becomes the volume.
fn look_at_copy(into: &Path, lot: &Lot, progress: &Progress) -> Result<Option<Copied>> {
    let Some(run) = lot.copy else { return Ok(None) };
    let is_lost = |run| !into.join(manifest::document_name(run)).exists();
    let path = lot.copy_path();
    if run <= newest_manifest(into)?.unwrap_or(0) && lot.runs.keys().all(|it| !is_lost(*it)) {
        return Ok(None);
    }
    progress.set_phase("unpacking the catalog");
    let unpacked = path.with_extension("sqlite");
    let reader = copy::unpack(&path, &unpacked, &|| progress.check())?;
    let mut has_lost = false;
    for it in reader.runs()? {
        match lot.runs.get(&it.id) {
            Some(known) if *known != it.uuid => {
                let what = format!("the run {} that it has is another one", it.id);
                return Err(Error::corrupt(what));
            }
            _ => has_lost |= is_lost(it.id),
        }
    }
    let volume = reader.volumes()?.iter().map(|it| it.number).max().unwrap_or(0);
    drop(reader);
    if !has_lost {
        return Ok(None);
    }
    let to = into.join(copy::document_name(run));
    let failed = |e| Error::io(format!("writing {}", quoted(&to)), e);
    sys::make_private_dirs(&into.join(copy::DIR)).map_err(failed)?;
    std::fs::rename(&path, &to).map_err(failed)?;
    Ok(Some(Copied { run, volume }))
}

/// Makes a volume of what has been gathered.
fn make_volume(
    into: &Path,
    lot: &mut Lot,
    copied: Option<&Copied>,
    progress: &Progress,
) -> Result<()> {
    progress.set_phase("making a volume");
    let said = lot.said.take();
    let settings = said.as_ref().and_then(|it| it.facts.clone()).map(|it| it.settings);
    let free = free_number(into, progress)?;
    let config = VolumeConfig {
        number: copied.map_or(free, |it| free.max(it.volume.saturating_add(1))),
        uuid: uuid::Uuid::new_v4().to_string(),
        path: into.to_path_buf(),
        status: Status::Active,
        reserve_percent: said.as_ref().map_or(RESERVE_PERCENT, |it| it.reserve_percent),
    };
    let facts = Facts {
        number: config.number,
        created: Time::now().secs,
        settings: settings.unwrap_or_default(),
    };
    let hash = said.map(|it| it.hash).or(lot.hash).unwrap_or(HashAlgo::Blake3);
    // All documents at once, before they are a volume's.
    let synced = File::open(into).and_then(sys::target::sync_file_system);
    synced.map_err(|e| Error::io(format!("syncing {}", quoted(into)), e))?;
    Volume::create(into, &config, hash, facts, || make_index(into, &config, progress))
}

/// The newest run that has a manifest.
fn newest_manifest(into: &Path) -> Result<Option<RunId>> {
    let dir = into.join(manifest::DIR);
    let failed = |e| Error::io(format!("listing {}", quoted(&dir)), e);
    let mut newest = None;
    for entry in std::fs::read_dir(&dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        newest = newest.max(name.to_str().and_then(manifest::run_of));
    }
    Ok(newest)
}

/// A number that none of the catalog's volumes has, as the newest run knows them.
fn free_number(into: &Path, progress: &Progress) -> Result<i64> {
    let Some(run) = newest_manifest(into)? else { return Ok(1) };
    // A damaged one is named when the catalog is made.
    let survey = history::survey(&into.join(manifest::document_name(run)), &|| progress.check());
    let around = survey.ok().and_then(|it| it.head.around);
    let numbers = around.iter().flat_map(|it| &it.volumes).map(|it| it.number);
    Ok(numbers.max().unwrap_or(0).saturating_add(1))
}

/// Writes the index of a volume as its metas have it.
fn make_index(into: &Path, config: &VolumeConfig, progress: &Progress) -> Result<()> {
    let store = std::sync::Arc::new(crate::volume::store::DirStore::new(into.to_path_buf()));
    let volume = Volume { config: config.clone(), store };
    let mut mender = IndexMender::new(&volume, 0)?;
    let dir = into.join("meta");
    let failed = |e| Error::io(format!("listing {}", quoted(&dir)), e);
    for entry in std::fs::read_dir(&dir).map_err(failed)? {
        progress.check()?;
        let name = entry.map_err(failed)?.file_name();
        let name = [b"meta/", name.as_bytes()].concat();
        if let Kind::Meta(id) = Kind::of(&name)
            && let Some(index) = meta_read::read_head(&volume, &id)
        {
            mender.append(&index, None)?;
        }
    }
    mender.commit()
}
