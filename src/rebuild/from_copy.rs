//! `catalog-restore`: the newest good copy of the catalog, and the runs that came after it.
//!
//! Nothing is believed of a copy because it is the newest: one that is damaged, of another catalog,
//! or of another history than the manifests of the volumes is named, and the next older one is
//! tried, on whatever volume. What volumes and blocks there are is read from the volumes anew. The
//! catalog that was there, however damaged, is kept under another name.

use std::path::{Path, PathBuf};

use super::runs::{self, Base};
use super::{Filled, Lacking, Notes, Source, Summary, fill, note_left_out, noting, said_settings};
use crate::catalog::history::NUMBER_MAX;
use crate::catalog::replay::Place;
use crate::catalog::{Reader, Run, RunId, Tapes, VersionId, copy};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::sys::quoted;
use crate::volume::VolumeConfig;

/// What to restore from.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Directories of volumes, in any order; if none, those that the old catalog still names.
    pub volumes: Vec<PathBuf>,
    /// Whether to go on without runs that are lost, and without those that are changes of them.
    pub allow_gaps: bool,
    /// Runs that tapes say are the catalog's: number and name. None if there are no tapes.
    pub known: Vec<(RunId, String)>,
}

/// What came of it.
#[derive(Debug)]
pub struct Restored {
    /// The copy that was taken.
    pub copy: PathBuf,
    /// The run after which it was made.
    pub after: RunId,
    /// The runs that were replayed after it.
    pub replayed: Vec<RunId>,
    /// Where the catalog is now that was there before.
    pub kept: Option<PathBuf>,
    /// What is back, and what is missing.
    pub summary: Summary,
}

/// A copy on a volume.
struct Candidate {
    run: RunId,
    path: PathBuf,
    /// Where the volume is, and its name.
    dir: PathBuf,
    volume: String,
}

/// What a copy says of the whole catalog.
struct Opened {
    base: Base,
    volumes: Vec<VolumeConfig>,
}

/// How many refused copies an error names.
const NAMED_MAX: usize = 5;

/// Restores the catalog `catalog`. `lacking` is called with every file that needs a block of which
/// no volume is known that has it.
pub fn run(
    catalog: &Path,
    options: &Options,
    progress: &Progress,
    lacking: &mut Lacking<'_>,
) -> Result<Restored> {
    let work = |notes: &mut Notes<'_>| take(catalog, options, notes, lacking);
    let (mut restored, (problems, problem_count)) = noting(catalog, progress, work)?;
    restored.summary = Summary { problems, problem_count, ..restored.summary };
    Ok(restored)
}

fn take(
    catalog: &Path,
    options: &Options,
    notes: &mut Notes<'_>,
    lacking: &mut Lacking<'_>,
) -> Result<Restored> {
    let progress = notes.progress;
    progress.set_phase("looking for copies");
    let (dirs, had) = what_was(catalog, options, notes)?;
    let mut sources = super::volumes::open(&dirs, progress)?;
    let candidates = candidates(&sources, notes);
    if candidates.is_empty() {
        let message = "none of these volumes has a copy of the catalog: raidtape rebuildmeta, with \
                       a new --catalog and all --volumes, makes one from the volumes alone";
        return Err(Error::new(ErrorKind::NotFound, message));
    }
    for candidate in &candidates {
        progress.check()?;
        let mut own = Notes::new(progress);
        match try_one(catalog, candidate, (&mut sources, had.as_ref()), options, &mut own) {
            Ok(tried) => {
                notes.append(own);
                if let Some(lost) = had.filter(|_| !tried.has_had) {
                    let message = format!(
                        "its newest run was {} ({}), of which these volumes know nothing; the \
                         restored one ends with run {}. If a volume that has it comes back, give \
                         it to catalog-restore before the next backup",
                        lost.run, lost.uuid, tried.newest
                    );
                    notes.add(catalog, &Error::corrupt(message));
                }
                // A block that is on a tape is not missing.
                return finish((tried, Tapes::look(catalog)?), candidate, &sources, notes, lacking);
            }
            Err(Refused::Copy(e)) => notes.add(&candidate.path, &e),
            Err(Refused::All(e)) => return Err(e),
        }
    }
    Err(none_is_good(notes))
}

/// Why a copy was not restored.
enum Refused {
    /// It is not good, or does not fit what came after it.
    Copy(Error),
    /// No other one will do either.
    All(Error),
}

impl Refused {
    fn from(error: Error) -> Refused {
        match error.kind() {
            ErrorKind::Corrupt | ErrorKind::Version | ErrorKind::Denied | ErrorKind::NotFound => {
                Refused::Copy(error)
            }
            // A disk that cannot read says so; one that cannot be written is told apart above.
            ErrorKind::Io => Refused::Copy(error),
            _ => Refused::All(error),
        }
    }
}

/// The newest run that the old catalog knows.
struct Had {
    run: RunId,
    uuid: String,
    /// The highest version of which it has a name.
    version: VersionId,
}

impl Had {
    /// As far as it can be read, and is possible.
    fn of(old: &Reader) -> Option<Had> {
        let newest = old.latest(None).ok()??;
        let version = old.last_version().ok()?;
        let is_possible = newest.id < NUMBER_MAX && version < NUMBER_MAX;
        is_possible.then_some(Had { run: newest.id, uuid: newest.uuid, version })
    }
}

/// The directories of the volumes, and what the old catalog knows if it can be read.
fn what_was(
    catalog: &Path,
    options: &Options,
    notes: &mut Notes<'_>,
) -> Result<(Vec<PathBuf>, Option<Had>)> {
    let old = Reader::open_as_it_lies(catalog);
    let newest = old.as_ref().ok().and_then(Had::of);
    if !options.volumes.is_empty() {
        return Ok((options.volumes.clone(), newest));
    }
    let known = old.and_then(|it| it.volumes());
    let mut dirs = Vec::new();
    for volume in known.as_deref().unwrap_or_default() {
        match crate::volume::VolumeManifest::read(&volume.path) {
            Ok(it) if it.uuid == volume.uuid => dirs.push(volume.path.clone()),
            Ok(_) => {
                let message = "another volume is there than the old catalog says";
                notes.add(&volume.path, &Error::new(ErrorKind::Offline, message));
            }
            Err(e) => notes.add(&volume.path, &e),
        }
    }
    match dirs.is_empty() {
        false => Ok((dirs, newest)),
        true => {
            let why = known.err().map(|e| format!(" ({e})")).unwrap_or_default();
            let message = format!(
                "{} does not say where a volume is that is there{why}: name the volumes with \
                 --volumes",
                quoted(catalog)
            );
            Err(Error::usage(message))
        }
    }
}

/// All copies, newest first.
fn candidates(sources: &[Source], notes: &mut Notes<'_>) -> Vec<Candidate> {
    let mut found = Vec::new();
    for source in sources {
        let volume = &source.volume.config;
        match copy::list(&volume.path) {
            Ok(runs) => found.extend(runs.into_iter().map(|run| Candidate {
                run,
                path: volume.path.join(copy::document_name(run)),
                dir: volume.path.clone(),
                volume: volume.uuid.clone(),
            })),
            Err(e) => notes.add(&volume.path, &e),
        }
    }
    found.sort_by_key(|it| std::cmp::Reverse(it.run));
    found
}

/// A catalog that was built from a copy.
struct Tried {
    filled: Filled,
    summary: Summary,
    replayed: Vec<RunId>,
    newest: RunId,
    /// Whether it has the newest run of the old catalog, if that is known.
    has_had: bool,
}

fn try_one(
    catalog: &Path,
    candidate: &Candidate,
    (sources, had): (&mut [Source], Option<&Had>),
    options: &Options,
    notes: &mut Notes<'_>,
) -> std::result::Result<Tried, Refused> {
    let progress = notes.progress;
    let place = Place::take(catalog).map_err(Refused::All)?;
    progress.set_phase("unpacking the catalog");
    let known = &options.known;
    let opened = unpack(&place, (candidate, known), sources, progress).map_err(Refused::from)?;
    progress.set_phase("reading manifests");
    let base = &opened.base;
    // Perhaps it is only the copy that is not what it should be.
    one_history(&base.runs, sources).map_err(Refused::Copy)?;
    let mut history = runs::read(sources, Some(base), notes, progress).map_err(Refused::from)?;
    let mut all = base.runs.clone();
    all.extend(history.runs.iter().map(|it| (it.run, it.uuid.clone())));
    one_history(&all, sources).map_err(Refused::All)?;
    if !history.gaps.is_empty() && !options.allow_gaps {
        return Err(Refused::All(history.refusal(sources, Some(base), progress)));
    }
    note_left_out(&history, notes);
    let has_had = had.is_none_or(|had| all.iter().any(|it| (it.0, &it.1) == (had.run, &had.uuid)));
    if let Some(had) = had.filter(|_| !has_had) {
        // Its manifest may be somewhere: a run of the same number would take its place.
        history.numbers = (had.run, had.version);
    }
    let work = || -> Result<Tried> {
        let rebuild = place.resume()?;
        let rows = said_settings(sources, &history).cloned().unwrap_or_default();
        let settings = rebuild.change_settings(&rows)?;
        let newest = history.newest.as_ref().map(|it| it.volumes.clone());
        let known = newest.unwrap_or_else(|| opened.volumes.clone());
        let how = (&history, &*known, !options.known.is_empty());
        let filled = fill(rebuild, sources, how, settings.hash, notes)?;
        let mut summary = filled.summary(sources, &history);
        let replayed: Vec<RunId> = history.runs.iter().map(|it| it.run).collect();
        summary.runs = (base.runs.len() + replayed.len()) as u64;
        let newest = replayed.last().copied().unwrap_or(base.run);
        Ok(Tried { filled, summary, replayed, newest, has_had })
    };
    work().map_err(Refused::from)
}

/// Fails if a volume knows a finished run as another one than `runs` does, which a catalog would
/// have: one of the two would be lost.
fn one_history(runs: &[(RunId, String)], sources: &[Source]) -> Result<()> {
    for source in sources {
        let Some(noted) = source.volume.described() else { continue };
        let known = runs.iter().find(|it| it.0 == noted.run);
        if let Some((run, uuid)) = known.filter(|it| it.1 != noted.uuid) {
            return Err(Error::corrupt(format!(
                "run {run} is {uuid}, and volume {} knows it as {}, which was finished: these are \
                 two histories. Nothing was changed: give the volumes of one history with \
                 --volumes; the others make a catalog of their own, under another name",
                quoted(&source.volume.config.path),
                noted.uuid
            )));
        }
    }
    Ok(())
}

/// Unpacks a copy and checks that it is what it should be.
fn unpack(
    place: &Place,
    (candidate, known): (&Candidate, &[(RunId, String)]),
    sources: &[Source],
    progress: &Progress,
) -> Result<Opened> {
    let reader = place.unpack(&candidate.path, &|| progress.check())?;
    let had = reader.runs()?;
    let Some(newest) = had.last().filter(|it| it.id == candidate.run) else {
        let found = had.last().map_or(0, |it| it.id);
        return Err(Error::corrupt(format!("it is a catalog of after run {found}")));
    };
    let volumes = reader.volumes()?;
    // One that tapes had lies on a volume that was made after it; its runs say whose it is.
    let has_known = || had.iter().any(|run| known.iter().any(|it| is_run(it, run)));
    if volumes.iter().all(|it| it.uuid != candidate.volume)
        && !has_known()
        && !runs::newest_known(&candidate.dir, &reader)?
    {
        let what = "it is of another catalog: it does not know its own volume, nor the newest run \
                    of which that has a manifest";
        return Err(Error::corrupt(what));
    }
    let hash = reader.settings()?.hash;
    if sources.iter().any(|it| it.manifest.hash != hash) {
        return Err(Error::corrupt("it is of another catalog: its hash is another one"));
    }
    let last = reader.last_manifest()?.filter(|it| (it.run, &it.uuid) == (newest.id, &newest.uuid));
    let base = Base {
        run: newest.id,
        uuid: newest.uuid.clone(),
        digest: last.and_then(|it| it.digest),
        runs: had.into_iter().map(|it| (it.id, it.uuid)).collect(),
    };
    Ok(Opened { base, volumes })
}

fn is_run((number, name): &(RunId, String), run: &Run) -> bool {
    (*number, name) == (run.id, &run.uuid)
}

/// Says what is missing, and gives the catalog its name.
fn finish(
    (tried, tapes): (Tried, Option<Tapes>),
    candidate: &Candidate,
    sources: &[Source],
    notes: &mut Notes<'_>,
    lacking: &mut Lacking<'_>,
) -> Result<Restored> {
    let Tried { filled, mut summary, replayed, .. } = tried;
    let reader = filled.catalog.open()?;
    let kept = filled.commit((reader, tapes), sources, &mut summary, notes, lacking)?.replace()?;
    let (copy, after) = (candidate.path.clone(), candidate.run);
    Ok(Restored { copy, after, replayed, kept, summary })
}

fn none_is_good(notes: &Notes<'_>) -> Error {
    let named: Vec<String> =
        notes.problems.iter().take(NAMED_MAX).map(ToString::to_string).collect();
    Error::corrupt(format!(
        "no copy of the catalog is good: raidtape rebuildmeta, with a new --catalog and all \
         --volumes, makes one from the volumes alone. {}",
        named.join("; ")
    ))
}
