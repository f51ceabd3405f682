//! Which runs there were: the manifests of all volumes, and the chain that they make.
//!
//! No copy wins because it came first. From the newest run on, each manifest says which one comes
//! before it; what does not fit that is named and left out, and where nothing decides between two
//! that are whole, nobody guesses.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{Notes, Source};
use crate::catalog::history::{self, Around, Survey};
use crate::catalog::manifest::{self, Previous};
use crate::catalog::{Reader, RunId, VersionId, copy};
use crate::chunk::{Digest, HashAlgo};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::progress::Progress;
use crate::sys::quoted;
use crate::volume::Described;

/// A manifest that is whole.
#[derive(Clone)]
struct Copy {
    path: PathBuf,
    uuid: String,
    digest: Digest,
    source: Vec<u8>,
    hash: HashAlgo,
    /// What comes before it, as format 2 says; `None` in format 1.
    links: Option<Links>,
}

#[derive(Clone, PartialEq)]
struct Links {
    previous: Option<Previous>,
    basis: Option<(RunId, String)>,
}

/// A run that can be rebuilt.
pub struct Chosen {
    pub run: RunId,
    pub uuid: String,
    pub path: PathBuf,
    pub digest: Digest,
    pub is_old: bool,
    hash: HashAlgo,
    basis: Option<Option<(RunId, String)>>,
}

/// A run of which no manifest is left.
pub struct Gap {
    pub run: RunId,
    pub uuid: Option<String>,
}

/// All runs that there were.
pub struct History {
    /// Those that can be rebuilt, oldest first.
    pub runs: Vec<Chosen>,
    /// Those that cannot, because what they are changes of is lost.
    pub left_out: Vec<Chosen>,
    /// Those that are lost.
    pub gaps: Vec<Gap>,
    /// What the newest manifest says of the catalog around it.
    pub newest: Option<Around>,
    /// The manifest of the newest run, if it is of format 2.
    pub newest_manifest: Option<Previous>,
    /// The hash that names blocks, if there is any run.
    pub hash: Option<HashAlgo>,
    /// The highest numbers of a run and of a version that are known to have been given otherwise.
    pub numbers: (RunId, VersionId),
}

/// A state of the catalog that is there already, of after a run.
pub struct Base {
    pub run: RunId,
    pub uuid: String,
    /// The manifest of that run, as it was then.
    pub digest: Option<Digest>,
    /// All runs that it has.
    pub runs: Vec<(RunId, String)>,
}

/// A volume, and the run that it knows to have been finished.
type Mark = (PathBuf, Described);

/// What the next older run has to be.
enum Expected {
    /// Anything: nothing newer says what comes before it.
    Any,
    /// This one.
    This(Previous),
    /// The run of this number, whatever its name: numbers have no holes.
    Number(RunId),
    /// There is none.
    None,
}

impl Expected {
    /// The expected run, if there is nothing of it from this one on.
    fn gap_above(&self, run: RunId) -> Option<Gap> {
        let gap = match self {
            Expected::This(it) => Gap { run: it.run, uuid: Some(it.uuid.clone()) },
            Expected::Number(it) => Gap { run: *it, uuid: None },
            Expected::Any | Expected::None => return None,
        };
        Some(gap).filter(|it| it.run > run)
    }
}

/// Reads all manifests and puts them in order; those that follow `base`, if there is one.
pub fn read(
    sources: &[Source],
    base: Option<&Base>,
    notes: &mut Notes<'_>,
    progress: &Progress,
) -> Result<History> {
    let mut found: BTreeMap<RunId, Vec<Copy>> = BTreeMap::new();
    let first = base.map_or(0, |it| it.run);
    for source in sources {
        for (run, path) in list(&source.volume.config.path)?.into_iter().filter(|it| it.0 >= first)
        {
            progress.check()?;
            let copies = found.entry(run).or_default();
            match history::survey(&path, &|| progress.check()) {
                Ok(survey) if survey.head.run == run => copies.push(copy_of(path, survey)),
                Ok(survey) => {
                    let message = format!("it is the manifest of run {}", survey.head.run);
                    notes.add(&path, &Error::corrupt(message));
                }
                Err(e) => {
                    progress.check()?;
                    notes.add(&path, &e);
                }
            }
            Progress::add(&progress.entries, 1);
        }
    }
    let noted = |it: &Source| Some((it.volume.config.path.clone(), it.volume.described()?));
    let marks: Vec<Mark> = sources.iter().filter_map(noted).collect();
    let mut history = choose(found, (base, &marks), notes)?;
    let newest = history.runs.last().map_or(first, |it| it.run);
    let newest = history.gaps.iter().map(|it| it.run).fold(newest, RunId::max);
    let mut newest_known = None;
    for source in sources {
        newest_known = newest_known.max(finished_after(source, newest, notes, progress)?);
    }
    history.gaps.extend(newest_known.map(|(run, uuid)| Gap { run, uuid }));
    if let Some(last) = history.runs.last() {
        history.newest = history::survey(&last.path, &|| progress.check())?.head.around;
        let (run, uuid) = (last.run, last.uuid.clone());
        let previous = Previous { run, uuid, digest: Some(last.digest) };
        history.newest_manifest = (!last.is_old).then_some(previous);
    }
    leave_out(&mut history, base);
    Ok(history)
}

/// The newest run after `run` that a volume knows to have been finished, with its name as far as it
/// says it.
fn finished_after(
    source: &Source,
    run: RunId,
    notes: &mut Notes<'_>,
    progress: &Progress,
) -> Result<Option<(RunId, Option<String>)>> {
    let noted = source.volume.described().filter(|it| it.run > run);
    let copied = newest_copy_on(source, run, progress, &mut |path| {
        let message = "it is a copy of another catalog, which does not know its volume: it does \
                       not count";
        notes.add(path, &Error::corrupt(message));
    })?;
    Ok(copied.map(|it| (it, None)).max(noted.map(|it| (it.run, Some(it.uuid)))))
}

/// The newest copy of after a later run than `run` on a volume. One that is damaged may have been
/// what its name says; one of another catalog is `foreign`.
fn newest_copy_on(
    source: &Source,
    run: RunId,
    progress: &Progress,
    foreign: &mut dyn FnMut(&Path),
) -> Result<Option<RunId>> {
    let volume = &source.volume.config;
    // What cannot be listed says nothing.
    let copies = copy::list(&volume.path).unwrap_or_default();
    for copied in copies.into_iter().take_while(|it| *it > run) {
        let path = volume.path.join(copy::document_name(copied));
        match copy::verify(&path, None, &volume.uuid, &|| progress.check()) {
            Ok(false) => foreign(&path),
            Err(e) if e.kind() == ErrorKind::Interrupted => return Err(e),
            _ => return Ok(Some(copied)),
        }
    }
    Ok(None)
}

/// Whether a volume has the manifest of a run that a catalog has too.
pub fn newest_known(volume: &Path, reader: &Reader) -> Result<bool> {
    for (run, path) in list(volume)?.into_iter().rev() {
        let (Ok(survey), Ok(known)) = (history::survey(&path, &|| Ok(())), reader.run(run)) else {
            continue;
        };
        return Ok(survey.head.uuid == known.uuid);
    }
    Ok(false)
}

/// The manifests of a volume by the numbers in their names.
pub fn list(volume: &Path) -> Result<Vec<(RunId, PathBuf)>> {
    let dir = volume.join(manifest::DIR);
    let failed = |e| Error::io(format!("listing {}", quoted(&dir)), e);
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        let number = name.to_str().and_then(manifest::run_of);
        found.extend(number.filter(|it| *it > 0).map(|it| (it, dir.join(&name))));
    }
    found.sort();
    Ok(found)
}

fn copy_of(path: PathBuf, survey: Survey) -> Copy {
    let Survey { head, digest, .. } = survey;
    let links = head.around.map(|it| Links { previous: it.previous, basis: it.basis });
    Copy { path, uuid: head.uuid, digest, source: head.source, hash: head.hash, links }
}

fn choose(
    mut found: BTreeMap<RunId, Vec<Copy>>,
    (base, marks): (Option<&Base>, &[Mark]),
    notes: &mut Notes<'_>,
) -> Result<History> {
    let of_base = base.and_then(|it| found.remove(&it.run)).unwrap_or_default();
    let mut expected = Expected::Any;
    let (mut runs, mut gaps): (Vec<Chosen>, Vec<Gap>) = (Vec::new(), Vec::new());
    for (run, copies) in found.into_iter().rev() {
        let is_expected = match &expected {
            Expected::Any => true,
            Expected::None => false,
            Expected::This(it) => it.run >= run,
            Expected::Number(it) => *it >= run,
        };
        if !is_expected {
            for copy in &copies {
                let message = "no newer run knows it as an earlier one: it is left out";
                notes.add(&copy.path, &Error::corrupt(message));
            }
            continue;
        }
        if let Some(gap) = expected.gap_above(run) {
            gaps.push(gap);
            expected = Expected::Any;
        }
        let wanted = match &expected {
            Expected::This(it) => Some(it),
            _ => None,
        };
        let Some(copy) = pick(run, copies, (wanted, marks), notes)? else {
            let uuid = wanted.map(|it| it.uuid.clone());
            gaps.push(Gap { run, uuid });
            expected = Expected::Any;
            continue;
        };
        expected = match &copy.links {
            None if run > 1 => Expected::Number(run - 1),
            None => Expected::None,
            Some(links) => links.previous.clone().map_or(Expected::None, Expected::This),
        };
        runs.push(Chosen {
            run,
            uuid: copy.uuid,
            path: copy.path,
            digest: copy.digest,
            is_old: copy.links.is_none(),
            hash: copy.hash,
            basis: copy.links.map(|it| it.basis),
        });
    }
    let first = base.map_or(0, |it| it.run);
    if let Some(gap) = expected.gap_above(first) {
        gaps.push(gap);
        expected = Expected::Any;
    }
    let newest_manifest = match base {
        Some(base) => link(base, &of_base, &expected)?,
        None => None,
    };
    runs.reverse();
    gaps.reverse();
    let hash = runs.last().map(|it| it.hash);
    if let Some(other) = runs.iter().find(|it| Some(it.hash) != hash) {
        let path = quoted(&other.path);
        return Err(Error::corrupt(format!("{path} is of a store with another hash")));
    }
    let left_out = Vec::new();
    Ok(History { runs, left_out, gaps, newest: None, newest_manifest, hash, numbers: (0, 0) })
}

/// Checks that what follows a state of the catalog follows its newest run, of which `copies` are
/// the manifests; gives the right one.
fn link(base: &Base, copies: &[Copy], expected: &Expected) -> Result<Option<Previous>> {
    let other = |what: &str| {
        let run = base.run;
        Err(Error::corrupt(format!("it is of another history: {what} run {run} than it knows")))
    };
    let wanted = match expected {
        Expected::This(it) if (it.run, &it.uuid) != (base.run, &base.uuid) => {
            return other("newer runs follow another");
        }
        Expected::None => return other("newer runs follow another"),
        Expected::This(it) => it.digest,
        _ => None,
    };
    let mut same = copies.iter().filter(|it| it.uuid == base.uuid).peekable();
    if same.peek().is_none() && !copies.is_empty() {
        return other("the manifests are of another");
    }
    let digests: Vec<&Copy> = same.filter(|it| it.links.is_some()).collect();
    let has = |digest: &Digest| digests.iter().any(|it| it.digest == *digest);
    let right = match (wanted, base.digest) {
        // Made anew by genmeta since, where it is there.
        (Some(wanted), Some(known)) if wanted != known && !has(&wanted) => {
            return other("newer runs follow another manifest of");
        }
        (Some(wanted), _) => Some(wanted),
        (None, Some(known)) if has(&known) => Some(known),
        (None, _) => {
            let first = digests.first().map(|it| it.digest);
            first.filter(|first| digests.iter().all(|it| it.digest == *first))
        }
    };
    let previous = |digest| Previous { run: base.run, uuid: base.uuid.clone(), digest };
    Ok(right.map(|digest| previous(Some(digest))))
}

/// The right one of a run's manifests that are whole, if there is one.
fn pick(
    run: RunId,
    copies: Vec<Copy>,
    (wanted, marks): (Option<&Previous>, &[Mark]),
    notes: &mut Notes<'_>,
) -> Result<Option<Copy>> {
    let is_wanted = |it: &Copy| match wanted {
        None => true,
        Some(wanted) => {
            it.uuid == wanted.uuid
                && wanted.digest.as_ref().is_none_or(|digest| *digest == it.digest)
        }
    };
    let (right, wrong): (Vec<Copy>, Vec<Copy>) = copies.into_iter().partition(is_wanted);
    for copy in wrong {
        let is_other = wanted.is_some_and(|it| it.uuid != copy.uuid);
        let message = match (is_other, copy.links.is_none()) {
            (true, _) => "it is another run of this number than the newer runs know",
            (false, true) => "it was written by an earlier program, and has been made anew since",
            (false, false) => {
                "it is whole, but not the one that the newer runs know: it was changed"
            }
        };
        // Those of an earlier program are no fault, as long as the new ones are there.
        if is_other || copy.links.is_some() || right.is_empty() {
            notes.add(&copy.path, &Error::corrupt(format!("{message}; it does not count")));
        }
    }
    // One of format 1 says less, and nothing newer names it.
    let has_new = right.iter().any(|it| it.links.is_some());
    let first_uuid = right.first().map(|it| it.uuid.clone());
    if let Some(other) = right.iter().find(|it| Some(&it.uuid) != first_uuid.as_ref()) {
        let first = right.first().unwrap_or(other);
        return Err(Error::corrupt(format!(
            "two different runs have the number {run}: {} (of {}, name {}) and {} (of {}, name \
             {}). One of them never ended, belongs to another history or store, or is forged. \
             {}Move one of the two files away, and keep it",
            quoted(&first.path),
            Quoted(&first.source),
            first.uuid,
            quoted(&other.path),
            Quoted(&other.source),
            other.uuid,
            said_finished(marks, run, [&first.uuid, &other.uuid])
        )));
    }
    let mut best = right.into_iter().filter(|it| !has_new || it.links.is_some());
    let Some(first) = best.next() else { return Ok(None) };
    if let Some(other) = best.find(|it| it.digest != first.digest) {
        return Err(Error::corrupt(format!(
            "{} and {} are both whole and say different things of run {run}, and no newer run \
             says which is right: move one of the two files away",
            quoted(&first.path),
            quoted(&other.path)
        )));
    }
    Ok(Some(first))
}

/// What marks say of two runs of one number, for the one who has to decide. It is no proof against
/// the one without a mark: a run that was acknowledged may have left none.
fn said_finished(marks: &[Mark], run: RunId, uuids: [&String; 2]) -> String {
    let is_of = |it: &&Mark| it.1.run == run && uuids.contains(&&it.1.uuid);
    match marks.iter().find(is_of) {
        Some((path, noted)) => format!(
            "Volume {} knows that {} was finished; the other one may have been too. ",
            quoted(path),
            noted.uuid
        ),
        None => "Nothing says which. ".to_owned(),
    }
}

/// Takes out the runs whose changes are changes of something that is lost.
fn leave_out(history: &mut History, base: Option<&Base>) {
    if history.gaps.is_empty() {
        return;
    }
    let known = base.map(|it| it.runs.iter().cloned()).into_iter().flatten();
    let mut sound: BTreeMap<RunId, String> = known.collect();
    let first_gap = history.gaps.iter().map(|it| it.run).min().unwrap_or(RunId::MAX);
    for chosen in std::mem::take(&mut history.runs) {
        let is_sound = match &chosen.basis {
            Some(None) => true,
            Some(Some((run, uuid))) => sound.get(run) == Some(uuid),
            // It does not say what came before it.
            None => chosen.run < first_gap,
        };
        if is_sound {
            sound.insert(chosen.run, chosen.uuid.clone());
            history.runs.push(chosen);
        } else {
            history.left_out.push(chosen);
        }
    }
}

impl History {
    /// The error that says what is lost, and what can be done about it.
    pub fn refusal(&self, sources: &[Source], base: Option<&Base>, progress: &Progress) -> Error {
        let mut text = String::new();
        for gap in &self.gaps {
            let uuid = gap.uuid.as_ref().map(|it| format!(" (name {it})")).unwrap_or_default();
            text.push_str(&format!(
                "the manifest of run {}{uuid} is on none of these volumes, or damaged. ",
                gap.run
            ));
        }
        if !self.left_out.is_empty() {
            let runs: Vec<String> =
                self.left_out.iter().take(50).map(|it| it.run.to_string()).collect();
            text.push_str(&format!(
                "Runs {} are changes of what is lost with it and cannot be rebuilt without. ",
                runs.join(", ")
            ));
        }
        text.push_str("Give all volumes with --volumes");
        let first = self.gaps.iter().map(|it| it.run).min().unwrap_or_default();
        // One of before all that is lost would be refused for the same reason.
        let newest = |it| newest_copy_on(it, first - 1, progress, &mut |_| {}).ok().flatten();
        let copies = sources.iter().filter(|_| base.is_none());
        if let Some(run) = copies.filter_map(newest).max() {
            text.push_str(&format!(
                ", or begin with the copy of the catalog of after run {run}: raidtape \
                 catalog-restore, with the same --catalog and --volumes"
            ));
        }
        text.push_str("; --allow-gaps builds a catalog without these runs");
        Error::corrupt(text)
    }
}
