//! Which volumes there are: those that were given, and those that the newest run knew besides.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::{Notes, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::sys::quoted;
use crate::volume::{Status, Volume, VolumeConfig, VolumeManifest};

/// Opens the volumes in these directories. Each is one, and none comes twice. One of them may have
/// lost its manifest, if runs say which one it is.
pub fn open(dirs: &[PathBuf], progress: &Progress) -> Result<Vec<Source>> {
    let mut sources: Vec<Source> = Vec::new();
    let mut nameless: Option<(PathBuf, Error)> = None;
    for dir in dirs {
        let failed = |e| Error::io(format!("volume {}", quoted(dir)), e);
        let path = dir.canonicalize().map_err(failed)?;
        let manifest = match VolumeManifest::read(&path) {
            Ok(manifest) => manifest,
            Err(e) if path.join("chunks").is_dir() && e.kind() != ErrorKind::Version => {
                if let Some((other, _)) = &nameless {
                    let (one, two) = (quoted(other), quoted(&path));
                    let message = format!(
                        "neither {one} nor {two} has a volume manifest that can be read ({e}): \
                         which is which cannot be told"
                    );
                    return Err(Error::corrupt(message));
                }
                nameless = Some((path, e));
                continue;
            }
            Err(e) => return Err(e),
        };
        if let Some(other) = sources.iter().find(|it| it.manifest.uuid == manifest.uuid) {
            let message = format!(
                "{} and {} are the same volume, or one is a copy of the other: give one of them",
                quoted(&other.volume.config.path),
                quoted(&path)
            );
            return Err(Error::usage(message));
        }
        let config = VolumeConfig {
            number: 0,
            uuid: manifest.uuid.clone(),
            path,
            // It is here; what is full says so.
            status: if manifest.status == Status::Sealed { Status::Sealed } else { Status::Active },
            reserve_percent: manifest.reserve_percent,
        };
        let is_used = manifest.other("retired").is_none();
        let volume = Volume::open(config)?;
        sources.push(Source { volume, manifest, is_used, is_unnamed: false });
    }
    if let Some((path, e)) = nameless {
        let source = super::unnamed::identify(&path, &sources, e, progress)?;
        sources.push(source);
    }
    match sources.is_empty() {
        true => Err(Error::usage("give at least one volume")),
        false => Ok(sources),
    }
}

/// Gives the volumes their numbers, by what is known of them last; gives those that were not given.
pub fn settle(
    sources: &mut [Source],
    known: &[VolumeConfig],
    notes: &mut Notes<'_>,
) -> Vec<VolumeConfig> {
    for source in sources.iter_mut().filter(|it| !it.is_used) {
        // Put away, and yet the newest run had it.
        source.is_used = known.iter().any(|it| it.uuid == source.manifest.uuid);
    }
    let mut taken: BTreeSet<i64> = known.iter().map(|it| it.number).collect();
    let mut unsettled = Vec::new();
    for (at, source) in sources.iter_mut().enumerate().filter(|it| it.1.is_used) {
        let own = source.manifest.facts.as_ref().map(|it| it.number);
        let said = known.iter().find(|it| it.uuid == source.manifest.uuid).map(|it| it.number);
        let path = source.volume.config.path.clone();
        let number = match (said, own) {
            (Some(said), own) => {
                if let Some(own) = own.filter(|it| *it != said) {
                    let message = format!(
                        "it says that it is volume {own}, and the newest run that it is {said}, \
                         which counts"
                    );
                    notes.add(&path, &Error::corrupt(message));
                }
                said
            }
            (None, Some(own)) if taken.insert(own) => own,
            (None, own) => {
                if let Some(own) = own {
                    let message = format!("it says that it is volume {own}, but another one is");
                    notes.add(&path, &Error::corrupt(message));
                }
                unsettled.push(at);
                continue;
            }
        };
        source.volume.config.number = number;
    }
    for at in unsettled {
        // By an earlier program, which did not say the number: in the order they were given.
        let number = (1..).find(|it| !taken.contains(it)).unwrap_or(i64::MAX);
        taken.insert(number);
        if let Some(source) = sources.get_mut(at) {
            source.volume.config.number = number;
        }
    }
    let is_given = |it: &&VolumeConfig| sources.iter().all(|at| at.manifest.uuid != it.uuid);
    let missing = known.iter().filter(is_given);
    let missing: Vec<VolumeConfig> =
        missing.map(|it| VolumeConfig { status: Status::Missing, ..it.clone() }).collect();
    // In the order of their numbers, so that what is read does not depend on how they were given.
    sources.sort_by_key(|it| it.volume.config.number);
    missing
}

/// Says which volumes were not given.
pub fn note_missing(missing: &[VolumeConfig], notes: &mut Notes<'_>) {
    for volume in missing {
        let message = format!("volume {} ({}) was not given", volume.number, volume.uuid);
        notes.add(&volume.path, &Error::new(ErrorKind::Offline, message));
    }
}
