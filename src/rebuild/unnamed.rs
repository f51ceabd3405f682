//! Volumes whose own manifest is damaged or gone: which ones they are, if runs leave no doubt.
//!
//! Each run manifest names all volumes of its catalog. A directory is taken for one of them if it
//! is the only one of those that were given without a name, the only one that is left of those that
//! are named (or lies where that one did), and has the manifest of a run that the others have too.
//! Nobody guesses otherwise.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Notes, Source, runs};
use crate::catalog::history::{self, Survey};
use crate::chunk::HashAlgo;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::sys::{self, Time, quoted};
use crate::volume::store::DirStore;
use crate::volume::{Facts, Status, Volume, VolumeConfig, VolumeManifest};

/// Name of the volume manifest.
const MANIFEST: &str = ".rt_volume_manifest";

/// Finds out which volume lies at `path`, whose manifest could not be read for the reason `why`.
pub fn identify(path: &Path, named: &[Source], why: Error, progress: &Progress) -> Result<Source> {
    let doubt = |what: &str| {
        Err(Error::corrupt(format!(
            "{why}; which volume this is cannot be told: {what}. Write its {MANIFEST} anew by \
             hand, with the volume_id that the others' run manifests say, or leave it out"
        )))
    };
    let Some(own) = newest(path, progress)? else {
        return doubt("it has no run manifest that can be read");
    };
    let mut best = own.clone();
    let mut is_kin = named.is_empty();
    for source in named {
        let other_path = &source.volume.config.path;
        let Some(other) = newest(other_path, progress)? else { continue };
        let run = own.head.run.min(other.head.run);
        let both = (survey_of(path, run, progress), survey_of(other_path, run, progress));
        if let (Some(one), Some(two)) = both {
            if one.head.uuid != two.head.uuid {
                return doubt("its runs are not those of the other volumes");
            }
            is_kin = true;
        }
        if other.head.run > best.head.run {
            best = other;
        }
    }
    if !is_kin {
        return doubt("it has no run that another volume has too");
    }
    let Some(around) = &best.head.around else {
        return doubt("its run manifests are of an earlier program, which did not name volumes");
    };
    let is_left = |it: &&VolumeConfig| named.iter().all(|source| source.manifest.uuid != it.uuid);
    let left: Vec<&VolumeConfig> = around.volumes.iter().filter(is_left).collect();
    let here: Vec<&VolumeConfig> = left.iter().copied().filter(|it| it.path == path).collect();
    let config = match (&*left, &*here) {
        ([one], _) | (_, [one]) => VolumeConfig { path: path.to_path_buf(), ..(*one).clone() },
        ([], _) => return doubt("all volumes that run manifests name were given"),
        _ => return doubt("run manifests name several that were not given, none of them here"),
    };
    let status = if config.status == Status::Sealed { Status::Sealed } else { Status::Active };
    let config = VolumeConfig { status, ..config };
    let hash: HashAlgo = best.head.hash;
    let facts = Facts { number: config.number, created: 0, settings: around.settings.clone() };
    let manifest = VolumeManifest { facts: Some(facts), ..VolumeManifest::of(&config, hash) };
    let store = Arc::new(DirStore::new(path.to_path_buf()));
    Ok(Source { volume: Volume { config, store }, manifest, is_used: true, is_unnamed: true })
}

/// The newest run manifest of a volume that can be read.
fn newest(volume: &Path, progress: &Progress) -> Result<Option<Survey>> {
    for (run, path) in runs::list(volume)?.into_iter().rev() {
        progress.check()?;
        match history::survey(&path, &|| progress.check()) {
            Ok(survey) if survey.head.run == run => return Ok(Some(survey)),
            _ => {}
        }
    }
    Ok(None)
}

fn survey_of(volume: &Path, run: i64, progress: &Progress) -> Option<Survey> {
    let path = volume.join(crate::catalog::manifest::document_name(run));
    history::survey(&path, &|| progress.check()).ok()
}

/// Gives volumes that were taken for what runs say their manifests again; what was there is kept
/// beside. What fails is told: the volume will be refused by its catalog until it has one.
pub fn name(sources: &[Source], notes: &mut Notes<'_>) {
    for source in sources.iter().filter(|it| it.is_unnamed && it.is_used) {
        let path = &source.volume.config.path;
        let message = format!(
            "its {MANIFEST} could not be read: by the run manifests it is volume {} ({}), and has \
             one that says so again",
            source.volume.config.number, source.manifest.uuid
        );
        notes.add(path, &Error::corrupt(message));
        let facts = source.manifest.facts.clone();
        let number = source.volume.config.number;
        let facts = facts.map(|it| Facts { number, ..it });
        let manifest = VolumeManifest { facts, ..source.manifest.clone() };
        if let Err(e) = keep(path).and_then(|()| manifest.write(path)) {
            notes.add(path, &e.context("it could not be given its manifest"));
        }
    }
}

/// Renames a manifest that is there.
fn keep(volume: &Path) -> Result<()> {
    let path = volume.join(MANIFEST);
    if path.symlink_metadata().is_err() {
        return Ok(());
    }
    let kept: PathBuf = volume.join(format!("{MANIFEST}.damaged-{}", Time::now().secs));
    match kept.symlink_metadata() {
        Ok(_) => Err(Error::usage(format!("{} is there already", quoted(&kept)))),
        Err(_) => sys::rename_durable(&path, &kept),
    }
}
