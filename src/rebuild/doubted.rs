//! `rebuild-catalog`: a catalog that is there, but doubtful, held against its volumes.
//!
//! Volumes, blocks, copies and chunks are registered anew from the volumes' own indexes, metas and,
//! asked to, bytes. Runs and files stay as they are. What has vanished is reported with all that it
//! reaches, and keeps its rows: who repairs it needs them.

use std::path::{Path, PathBuf};

use super::blocks::{self, How};
use super::runs::newest_known;
use super::{Lacking, Notes, Source, noting, tell_files, volume_rows};
use crate::catalog::register::{CopiesOf, Register};
use crate::catalog::replay::Changed;
use crate::catalog::{NumberSet, Reader};
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::progress::Progress;
use crate::sys::quoted;
use crate::volume::{Status, Volume, VolumeConfig, VolumeManifest};

/// How to look.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Directories of volumes that are elsewhere than the catalog says, or that it has lost.
    pub volumes: Vec<PathBuf>,
    /// Whether every block is read and put to the proof of its bytes.
    pub scan: bool,
    /// Whether nothing is changed, and only told what would be.
    pub is_trial: bool,
}

/// What came of a volume.
#[derive(Debug)]
pub struct OfVolume {
    /// Its name.
    pub uuid: String,
    /// Where it is.
    pub path: PathBuf,
    /// Where the catalog had it, if that is another place.
    pub was: Option<PathBuf>,
    /// Whether the catalog did not have it.
    pub is_new: bool,
    /// Whether its index has lost records, and is written anew.
    pub is_mended: bool,
    /// What became of its copies.
    pub copies: CopiesOf,
    /// Blocks that were put to the proof of their bytes, and those of them that are damaged.
    pub scanned: (u64, u64),
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Summary {
    /// Each volume that is there.
    pub volumes: Vec<OfVolume>,
    /// Volumes that are not there.
    pub volumes_missing: u64,
    /// What was changed in the catalog's tables.
    pub changed: Changed,
    /// Blocks that are on no volume, with files that need them.
    pub blocks_lost: u64,
    /// Files that need them, each once a block.
    pub files_lost: u64,
    /// What did not fit or could not be read; at most a thousand.
    pub problems: Vec<Problem>,
    /// How much of it there was.
    pub problem_count: u64,
}

/// Blocks that are asked for at a time.
const PAGE_BLOCKS: u64 = 256;

/// Holds the catalog `catalog` against its volumes. `lost` is called with every file that needs a
/// block that has vanished.
pub fn run(
    catalog: &Path,
    options: &Options,
    progress: &Progress,
    lost: &mut Lacking<'_>,
) -> Result<Summary> {
    let work = |notes: &mut Notes<'_>| register(catalog, options, notes, lost);
    let (summary, (problems, problem_count)) = noting(catalog, progress, work)?;
    Ok(Summary { problems, problem_count, ..summary })
}

fn register(
    catalog: &Path,
    options: &Options,
    notes: &mut Notes<'_>,
    lost: &mut Lacking<'_>,
) -> Result<Summary> {
    let progress = notes.progress;
    progress.set_phase("preparing");
    let mut register = Register::open(catalog, options.is_trial, &|| progress.check())?;
    let hash = register.writer().settings()?.hash;
    let known = register.writer().volumes()?;
    let given = given(options, &known, register.reader())?;
    let (sources, away) = open(&known, &given, options.is_trial, notes)?;
    if let Some(other) = sources.iter().find(|it| it.manifest.hash != hash) {
        let path = quoted(&other.volume.config.path);
        return Err(Error::corrupt(format!("volume {path} names blocks by another hash")));
    }
    progress.set_phase("reading volumes");
    let how = How { hash, scan: options.scan, mend: !options.is_trial };
    let repairs = blocks::read(register.found(), &sources, how, notes, progress)?;
    for source in &sources {
        register.put_read(source.volume.config.number)?;
    }
    let number = |at: usize| sources.get(at).map(|it| it.volume.config.number);
    let mended: Vec<i64> = repairs.mended().filter_map(number).collect();
    let rows = volume_rows(&sources, &repairs.index_lens, &away);
    let scanned = repairs.scanned.clone();
    progress.check()?;
    progress.set_phase("committing");
    register.doubt(&mended)?;
    repairs.commit(&sources, notes);
    let mut summary = Summary { volumes_missing: away.len() as u64, ..Summary::default() };
    register.change(&rows, options.is_trial, |register, changed| {
        summary.changed = *changed;
        for (source, scanned) in sources.iter().zip(&scanned) {
            let config = &source.volume.config;
            let old = known.iter().find(|it| it.uuid == config.uuid);
            summary.volumes.push(OfVolume {
                uuid: config.uuid.clone(),
                path: config.path.clone(),
                was: old.filter(|it| it.path != config.path).map(|it| it.path.clone()),
                is_new: old.is_none(),
                is_mended: mended.contains(&config.number),
                copies: register.copies_of(config.number)?,
                scanned: *scanned,
            });
        }
        let mut told = NumberSet::default();
        for source in &sources {
            let config = &source.volume.config;
            report_missing(register, config, &mut told, (&mut summary, &mut *notes), lost)?;
        }
        Ok(())
    })?;
    Ok(summary)
}

/// Opens the volumes that were named: those of the catalog that are elsewhere, and such as it has
/// lost, if its own runs show that they are its own.
fn given(options: &Options, known: &[VolumeConfig], reader: &Reader) -> Result<Vec<VolumeConfig>> {
    let mut configs: Vec<VolumeConfig> = Vec::new();
    for dir in &options.volumes {
        let failed = |e| Error::io(format!("volume {}", quoted(dir)), e);
        let path = dir.canonicalize().map_err(failed)?;
        let manifest = VolumeManifest::read(&path)?;
        if let Some(other) = configs.iter().find(|it| it.uuid == manifest.uuid) {
            let (one, two) = (quoted(&other.path), quoted(&path));
            let message = format!("{one} and {two} are the same volume, or copies: give one");
            return Err(Error::usage(message));
        }
        let refuse = |why: &str| {
            let message = format!("the volume {} at {} {why}", manifest.uuid, quoted(&path));
            Err(Error::usage(message))
        };
        let config = match known.iter().find(|it| it.uuid == manifest.uuid) {
            Some(config) => {
                let is_there = VolumeManifest::read(&config.path);
                if config.path != path && is_there.is_ok_and(|it| it.uuid == config.uuid) {
                    let message = format!("is at {} too: one is a copy", quoted(&config.path));
                    return refuse(&message);
                }
                VolumeConfig { path, ..config.clone() }
            }
            None if manifest.other("retired").is_some() => return refuse("was retired"),
            None => {
                let number = manifest.facts.as_ref().map(|it| it.number);
                let is_taken = |it: &i64| known.iter().any(|other| other.number == *it);
                let Some(number) = number.filter(|it| !is_taken(it)) else {
                    return refuse("is not the catalog's, which has another one of its number");
                };
                if !newest_known(&path, reader)? {
                    return refuse("has no run of this catalog: nothing shows that it is its own");
                }
                VolumeConfig {
                    number,
                    uuid: manifest.uuid,
                    path,
                    status: manifest.status,
                    reserve_percent: manifest.reserve_percent,
                }
            }
        };
        configs.push(config);
    }
    Ok(configs)
}

/// Opens all volumes; gives those that are there and those that are not.
fn open(
    known: &[VolumeConfig],
    given: &[VolumeConfig],
    is_trial: bool,
    notes: &mut Notes<'_>,
) -> Result<(Vec<Source>, Vec<VolumeConfig>)> {
    let (mut sources, mut away) = (Vec::new(), Vec::new());
    let is_given = |it: &&VolumeConfig| given.iter().all(|other| other.uuid != it.uuid);
    for config in given.iter().chain(known.iter().filter(is_given)) {
        // One that was made halfway is finished by who opens it, but not for a trial.
        let is_whole = match is_trial {
            true => VolumeManifest::read(&config.path).map(drop),
            false => Ok(()),
        };
        let opened = is_whole
            .and_then(|()| Volume::open(config.clone()))
            .and_then(|it| Ok((VolumeManifest::read(&config.path)?, it)));
        match opened {
            Ok((manifest, mut volume)) => {
                volume.config.status = match manifest.status {
                    Status::Missing => Status::Active,
                    status => status,
                };
                sources.push(Source { volume, manifest, is_used: true, is_unnamed: false });
            }
            Err(e) if e.is_shortage() => return Err(e),
            Err(e) => {
                notes.add(&config.path, &e);
                let is_away = e.kind() == ErrorKind::Offline;
                let status = if is_away { Status::Missing } else { config.status };
                away.push(VolumeConfig { status, ..config.clone() });
            }
        }
    }
    sources.sort_by_key(|it: &Source| it.volume.config.number);
    Ok((sources, away))
}

/// Names what a volume should have and has not; and, once for all volumes, all that those reach
/// that no volume has.
fn report_missing(
    register: &Register,
    config: &VolumeConfig,
    told: &mut NumberSet,
    (summary, notes): (&mut Summary, &mut Notes<'_>),
    lost: &mut Lacking<'_>,
) -> Result<()> {
    let mut after = 0;
    loop {
        let page = register.missing_on(config.number, after, PAGE_BLOCKS)?;
        let Some(last) = page.last() else { return Ok(()) };
        after = last.0;
        for (block, id, is_elsewhere) in page {
            notes.progress.check()?;
            let message = match is_elsewhere {
                true => format!("block {id} is not there; another volume has it"),
                false => format!("block {id} is not there, nor on another volume"),
            };
            notes.add(&config.path, &Error::corrupt(message));
            if is_elsewhere || told.contains(block) {
                continue;
            }
            told.insert(block);
            summary.blocks_lost += 1;
            summary.files_lost += tell_files(register.reader(), (block, &id), lost)?;
        }
    }
}
