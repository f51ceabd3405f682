//! A catalog made anew from its volumes alone.
//!
//! ```text
//! volume manifests ─▶ volumes    run manifests ─▶ chain ─▶ runs
//! indexes, or metas, or block files ─▶ blocks    metas ─▶ compared with what came of it
//! ```
//!
//! Everything that is read may be damaged or forged: what two places say differently is named, and
//! settled by what proves itself (a chain, a hash) or not at all. The catalog has its name only
//! when it is whole; volumes are changed in one case alone, to give a damaged index its records
//! back.

mod blocks;
mod bytes;
pub mod doubted;
pub mod from_copy;
mod metas;
mod runs;
mod unnamed;
mod volumes;

use std::path::{Path, PathBuf};

use crate::catalog::history::{self, Around, Lines};
use crate::catalog::replay::{Built, Rebuild};
use crate::catalog::{Damage, DamagedFile, Reader, Settings, Tapes, full_disk};
use crate::chunk::HashAlgo;
use crate::chunk::frame::Compression;
use crate::chunk::split::Chunking;
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::progress::Progress;
use crate::volume::{BlockId, Volume, VolumeConfig, VolumeManifest};

use blocks::{How, Repairs};
use runs::{Chosen, History};

/// What to rebuild from.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Directories of the volumes, in any order.
    pub volumes: Vec<PathBuf>,
    /// Whether to go on without runs that are lost, and without those that are changes of them.
    pub allow_gaps: bool,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Summary {
    /// Runs that are back.
    pub runs: u64,
    /// Runs that are lost, or left out because of those.
    pub runs_lost: u64,
    /// Volumes that were read.
    pub volumes: u64,
    /// Volumes that were not given.
    pub volumes_missing: u64,
    /// Those of them that nothing needs any more, for tapes have it all.
    pub volumes_gone: Vec<VolumeConfig>,
    /// Blocks that are back.
    pub blocks: u64,
    /// Blocks that files need and no volume has.
    pub blocks_lacking: u64,
    /// Files that need them, each once.
    pub files_lacking: u64,
    /// What did not fit or could not be read, each named; at most a thousand.
    pub problems: Vec<Problem>,
    /// How much of it there was.
    pub problem_count: u64,
}

/// Problems that are kept with their texts; more are counted.
const PROBLEMS_MAX: usize = 1000;

/// A volume that is read.
struct Source {
    volume: Volume,
    manifest: VolumeManifest,
    /// Whether the catalog will have it: not if it has been emptied and put away.
    is_used: bool,
    /// Whether its own manifest could not be read, and others say which one it is.
    is_unnamed: bool,
}

/// Problems as they come.
struct Notes<'a> {
    progress: &'a Progress,
    problems: Vec<Problem>,
    count: u64,
}

impl<'a> Notes<'a> {
    fn new(progress: &'a Progress) -> Notes<'a> {
        Notes { progress, problems: Vec::new(), count: 0 }
    }

    /// Takes what others have noted, who have told it already.
    fn append(&mut self, other: Notes<'_>) {
        self.count += other.count;
        let room = PROBLEMS_MAX.saturating_sub(self.problems.len());
        self.problems.extend(other.problems.into_iter().take(room));
    }

    fn add(&mut self, path: &Path, error: &Error) {
        let bytes = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str());
        self.put(Problem::new(bytes, error));
    }

    fn put(&mut self, problem: Problem) {
        log::warn!("{problem}");
        self.progress.note(&problem);
        self.count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }
}

/// Called with every file that lacks a block, and with the name of that.
pub type Lacking<'a> = dyn FnMut(&BlockId, DamagedFile) -> Result<()> + 'a;

/// Makes the catalog `catalog`, which must not exist, from volumes. `lacking` is called with every
/// file that needs a block that no volume has.
pub fn run(
    catalog: &Path,
    options: &Options,
    progress: &Progress,
    lacking: &mut Lacking<'_>,
) -> Result<Summary> {
    let work = |notes: &mut Notes<'_>| make(catalog, options, notes, lacking);
    let (summary, (problems, problem_count)) = noting(catalog, progress, work)?;
    Ok(Summary { problems, problem_count, ..summary })
}

/// Does the work on a catalog; gives what came of it, the problems on the way, and their number.
fn noting<T>(
    catalog: &Path,
    progress: &Progress,
    work: impl FnOnce(&mut Notes<'_>) -> Result<T>,
) -> Result<(T, (Vec<Problem>, u64))> {
    let mut notes = Notes::new(progress);
    let done = work(&mut notes).map_err(|e| full_disk(e, catalog))?;
    progress.set_phase("done");
    Ok((done, (notes.problems, notes.count)))
}

fn make(
    catalog: &Path,
    options: &Options,
    notes: &mut Notes<'_>,
    lacking: &mut Lacking<'_>,
) -> Result<Summary> {
    let progress = notes.progress;
    progress.set_phase("reading manifests");
    let mut sources = volumes::open(&options.volumes, progress)?;
    let history = runs::read(&sources, None, notes, progress)?;
    if !history.gaps.is_empty() && !options.allow_gaps {
        return Err(history.refusal(&sources, None, progress));
    }
    note_left_out(&history, notes);
    let rebuild = Rebuild::create(catalog)?;
    let settings = put_settings(&rebuild, &sources, &history, notes)?;
    let known = history.newest.as_ref().map(|it| &*it.volumes).unwrap_or_default();
    let built = fill(rebuild, &mut sources, (&history, known, false), settings.hash, notes)?;
    // A block that is on a tape, as is known beside the catalog, is not missing.
    let tapes = Tapes::look(catalog)?;
    let reader = built.catalog.open()?;
    progress.set_phase("comparing metas");
    metas::compare(&reader, &sources, settings.hash, notes, progress)?;
    let mut summary = built.summary(&sources, &history);
    summary.runs = history.runs.len() as u64;
    built.commit((reader, tapes), &sources, &mut summary, notes, lacking)?.publish()?;
    Ok(summary)
}

/// A catalog that has only to get its name.
struct Filled {
    catalog: Built,
    repairs: Repairs,
    /// Volumes that were not given.
    missing: Vec<VolumeConfig>,
}

impl Filled {
    /// What came of it so far.
    fn summary(&self, sources: &[Source], history: &History) -> Summary {
        Summary {
            runs_lost: (history.gaps.len() + history.left_out.len()) as u64,
            volumes: sources.len() as u64,
            volumes_missing: self.missing.len() as u64,
            ..Summary::default()
        }
    }

    /// Says what is missing and mends the volumes; gives the catalog, which lacks its name only.
    fn commit(
        self,
        (reader, tapes): (Reader, Option<Tapes>),
        sources: &[Source],
        summary: &mut Summary,
        notes: &mut Notes<'_>,
        lacking: &mut Lacking<'_>,
    ) -> Result<Built> {
        let progress = notes.progress;
        progress.set_phase("looking for what is missing");
        let tapes = tapes.filter(|_| !self.missing.is_empty());
        if tapes.is_none() {
            volumes::note_missing(&self.missing, notes);
        }
        report_lacking(&reader, summary, notes, lacking)?;
        if let Some(tapes) = tapes {
            match is_all_there((&reader, &tapes), sources, summary, notes)? {
                true => summary.volumes_gone = self.missing,
                false => volumes::note_missing(&self.missing, notes),
            }
        }
        drop(reader);
        progress.check()?;
        progress.set_phase("committing");
        self.repairs.commit(sources, notes);
        unnamed::name(sources, notes);
        Ok(self.catalog)
    }
}

/// What a catalog is told of its volumes: those that were read, and how far, and those that are
/// away.
fn volume_rows(
    sources: &[Source],
    index_lens: &[u64],
    away: &[VolumeConfig],
) -> Vec<(VolumeConfig, Option<i64>, Option<u64>)> {
    let here = sources.iter().zip(index_lens).filter(|it| it.0.is_used);
    let here = here.map(|(source, len)| {
        let created = source.manifest.facts.as_ref().map(|it| it.created);
        (source.volume.config.clone(), created, Some(*len))
    });
    here.chain(away.iter().map(|it| (it.clone(), None, None))).collect()
}

/// Puts volumes, blocks and runs into a catalog that has its settings. `known` are the volumes as
/// they were known last. With tapes, what a copy of the catalog says of those that are away does
/// not count: what is known to be on them keeps nobody from giving them up.
fn fill(
    mut rebuild: Rebuild,
    sources: &mut [Source],
    (history, known, has_tapes): (&History, &[VolumeConfig], bool),
    hash: HashAlgo,
    notes: &mut Notes<'_>,
) -> Result<Filled> {
    let progress = notes.progress;
    let missing = volumes::settle(sources, known, notes);
    progress.set_phase("reading indexes");
    let how = How { hash, scan: false, mend: true };
    let mut repairs = blocks::read(rebuild.found(), sources, how, notes, progress)?;
    rebuild.put_volumes(&volume_rows(sources, &repairs.index_lens, &missing))?;
    rebuild.settle_blocks()?;
    if has_tapes {
        let away: Vec<i64> = missing.iter().map(|it| it.number).collect();
        rebuild.forget_copies_on(&away)?;
    }
    progress.set_phase("replaying runs");
    for chosen in &history.runs {
        replay(&mut rebuild, chosen, progress)?;
        note_old(chosen, notes);
    }
    keep_numbers(&mut rebuild, history, progress)?;
    bytes::learn(&rebuild, sources, &mut repairs, hash, notes)?;
    progress.set_phase("writing the catalog");
    let mut catalog = rebuild.finish(history.newest_manifest.as_ref())?;
    let (faults, fault_count) = std::mem::take(&mut catalog.faults);
    notes.count += fault_count - faults.len() as u64;
    for fault in faults {
        notes.put(Problem::new("manifests", &Error::corrupt(fault)));
    }
    Ok(Filled { catalog, repairs, missing })
}

/// Says which runs will not be there.
fn note_left_out(history: &History, notes: &mut Notes<'_>) {
    for gap in &history.gaps {
        let name = format!("run {}", gap.run).into_bytes();
        let error = Error::corrupt("its manifest is lost: the run is not in the catalog");
        notes.put(Problem::new(name, &error));
    }
    for run in &history.left_out {
        let error = Error::corrupt("it is changes of a run that is lost: it is not in the catalog");
        notes.add(&run.path, &error);
    }
}

/// Says what a manifest of before does not.
fn note_old(chosen: &Chosen, notes: &mut Notes<'_>) {
    if chosen.is_old {
        let message = "an earlier program wrote it: the end of the run, its machine, its problems, \
                       and what it read and stored are not known";
        notes.add(&chosen.path, &Error::new(ErrorKind::NotFound, message));
    }
}

/// The settings that most catalogs have: those of `init`.
fn usual_settings(hash: HashAlgo, reserve_percent: u8) -> Result<Settings> {
    Ok(Settings {
        hash,
        chunking: Chunking::new("fastcdc", 64 << 10)?,
        compression: Compression::Zstd(3),
        block_bytes: 128 << 20,
        reserve_percent,
        copies: 1,
    })
}

fn put_settings(
    rebuild: &Rebuild,
    sources: &[Source],
    history: &History,
    notes: &mut Notes<'_>,
) -> Result<Settings> {
    let first = sources.first().ok_or_else(|| Error::usage("give at least one volume"))?;
    let hash = history.hash.unwrap_or(first.manifest.hash);
    if let Some(other) = sources.iter().find(|it| it.manifest.hash != hash) {
        let path = crate::sys::quoted(&other.volume.config.path);
        let message = format!("volume {path} is of another store: its hash is another one");
        return Err(Error::corrupt(message));
    }
    let usual = usual_settings(hash, first.manifest.reserve_percent)?;
    match said_settings(sources, history) {
        Some(rows) => {
            let settings = rebuild.put_settings(&usual, rows)?;
            match settings.hash == hash {
                true => Ok(settings),
                false => Err(Error::corrupt("the settings say another hash than the runs")),
            }
        }
        None => {
            let message = "it was written by an earlier program, which did not say the store's \
                           settings: those of init are taken for chunks, blocks, compression";
            notes.add(&first.volume.config.path, &Error::new(ErrorKind::NotFound, message));
            rebuild.put_settings(&usual, &[])
        }
    }
}

/// The settings, as the volumes say them if they all agree, or else the newest run.
fn said_settings<'a>(
    sources: &'a [Source],
    history: &'a History,
) -> Option<&'a Vec<(String, String)>> {
    // Volumes that are up to date say the same, and know what was settled after the last run.
    let mut said = sources
        .iter()
        .filter(|it| it.is_used)
        .map(|it| it.manifest.facts.as_ref().map(|it| &it.settings).filter(|it| !it.is_empty()));
    let one = said.next().flatten().filter(|one| said.all(|it| it == Some(*one)));
    let around: Option<&Around> = history.newest.as_ref();
    one.or(around.map(|it| &it.settings))
}

fn replay(rebuild: &mut Rebuild, chosen: &Chosen, progress: &Progress) -> Result<()> {
    let survey = history::survey(&chosen.path, &|| progress.check())?;
    if survey.digest != chosen.digest {
        let path = crate::sys::quoted(&chosen.path);
        return Err(Error::corrupt(format!("{path} has changed while it was read")));
    }
    rebuild.begin_run(&survey.head)?;
    for is_first in [true, false] {
        let mut lines = Lines::open(&chosen.path)?;
        let mut count = 0u64;
        loop {
            let Some(line) = lines.next_line()? else { break };
            let taken = match is_first {
                true => rebuild.take_first(line),
                false => rebuild.take_second(line),
            };
            taken.map_err(|e| lines.at(e))?;
            count += 1;
            if count.is_multiple_of(1024) {
                progress.check()?;
            }
        }
        if is_first {
            Progress::add(&progress.entries, count);
        }
    }
    rebuild.end_run(&survey.head, survey.tail.as_ref())
}

/// No number is given again that a run had which is left out.
fn keep_numbers(rebuild: &mut Rebuild, history: &History, progress: &Progress) -> Result<()> {
    let lost = history.gaps.iter().map(|it| it.run);
    let (mut run, mut version) = history.numbers;
    run = run.max(lost.max().unwrap_or_default());
    for chosen in &history.left_out {
        run = run.max(chosen.run);
        let mut lines = Lines::open(&chosen.path)?;
        while let Some(line) = lines.next_line()? {
            progress.check()?;
            let found = Rebuild::version_in(line);
            version = version.max(found.map_err(|e| lines.at(e))?);
        }
    }
    rebuild.keep_numbers(run, version)
}

fn report_lacking(
    reader: &Reader,
    summary: &mut Summary,
    notes: &mut Notes<'_>,
    lacking: &mut Lacking<'_>,
) -> Result<()> {
    summary.blocks = reader.totals()?.blocks;
    let mut after = 0;
    loop {
        let page = reader.unknown_blocks(after, 1024)?;
        let Some(last) = page.last() else { break };
        after = last.0;
        for (number, id) in page {
            notes.progress.check()?;
            summary.blocks_lacking += 1;
            summary.blocks -= 1;
            summary.files_lacking += tell_files(reader, (number, &id), lacking)?;
        }
    }
    if summary.blocks_lacking > 0 {
        let lacking = format!("{} blocks are on none of these volumes", summary.blocks_lacking);
        let error = match summary.volumes_missing {
            0 => Error::corrupt(format!("{lacking}, and none is missing: they are lost")),
            _ => Error::new(
                ErrorKind::Offline,
                format!(
                    "{lacking}: when the one that has them is back, raidtape rebuild-catalog \
                     --volumes DIR takes them in"
                ),
            ),
        };
        notes.put(Problem::new("blocks", &error));
    }
    Ok(())
}

/// Whether each block is on a tape or on a volume that was given; says how many are not. Those that
/// are lacking were told before.
fn is_all_there(
    (reader, tapes): (&Reader, &Tapes),
    sources: &[Source],
    summary: &Summary,
    notes: &mut Notes<'_>,
) -> Result<bool> {
    if summary.blocks_lacking > 0 {
        return Ok(false);
    }
    let (mut after, mut nowhere) = (0, 0u64);
    loop {
        notes.progress.check()?;
        let page = reader.block_numbers(after, 1024)?;
        let Some(last) = page.last() else { break };
        after = *last;
        for number in page {
            let row = reader.block(number)?;
            let has = |it: &Source| {
                it.volume.store.len_of(&row.id).is_ok_and(|it| it == Some(row.stored_len))
            };
            let is_there = tapes.copies(&row.id, None)? > 0 || sources.iter().any(has);
            nowhere += u64::from(!is_there);
        }
    }
    if nowhere > 0 {
        let message = format!(
            "{nowhere} blocks are on none of these tapes: if the volume that has them is there, \
             raidtape volumes --readopt PATH takes it up"
        );
        notes.put(Problem::new("blocks", &Error::new(ErrorKind::Offline, message)));
    }
    Ok(nowhere == 0)
}

/// Tells of all files that need a block; gives how many there are.
fn tell_files(
    reader: &Reader,
    (number, id): (u64, &BlockId),
    lacking: &mut Lacking<'_>,
) -> Result<u64> {
    let damage = Damage { block: number, ranges: vec![(0, u64::MAX)] };
    let mut files = 0;
    reader.damaged_files(&damage, &mut |file| {
        files += 1;
        lacking(id, file)
    })?;
    Ok(files)
}
