//! Which runs there were: the manifests of all volumes, and the chain that they make.
//!
//! No copy wins because it came first. From the newest run on, each manifest says which one comes
//! before it; what does not fit that is named and left out, and where nothing decides between two
//! that are whole, nobody guesses.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Notes, Source};
use crate::catalog::history::{self, Around, Survey};
use crate::catalog::manifest::{self, Previous};
use crate::catalog::{RunId, copy};
use crate::chunk::{Digest, HashAlgo};
use crate::error::{Error, Quoted, Result};
use crate::progress::Progress;
use crate::sys::quoted;

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
    /// The hash that names blocks, if there is any run.
    pub hash: Option<HashAlgo>,
}

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

/// Reads all manifests and puts them in order.
pub fn read(sources: &[Source], notes: &mut Notes<'_>, progress: &Progress) -> Result<History> {
    let mut found: BTreeMap<RunId, Vec<Copy>> = BTreeMap::new();
    for source in sources {
        for (run, path) in list(&source.volume.config.path)? {
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
    let newest_copy = sources.iter().filter_map(newest_copy_on).max();
    let mut history = choose(found, notes)?;
    let newest = history.runs.last().map_or(0, |it| it.run);
    if let Some(run) = newest_copy.filter(|it| *it > newest)
        && history.gaps.iter().all(|it| it.run < run)
    {
        history.gaps.push(Gap { run, uuid: None });
    }
    if let Some(last) = history.runs.last() {
        history.newest = history::survey(&last.path, &|| progress.check())?.head.around;
    }
    leave_out(&mut history);
    Ok(history)
}

fn newest_copy_on(source: &Source) -> Option<RunId> {
    copy::list(&source.volume.config.path).ok()?.into_iter().max()
}

/// The manifests of a volume by the numbers in their names.
fn list(volume: &Path) -> Result<Vec<(RunId, PathBuf)>> {
    let dir = volume.join("manifests");
    let failed = |e| Error::io(format!("listing {}", quoted(&dir)), e);
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        let number = name.to_str().and_then(|it| {
            let run = it.strip_prefix("run-")?.strip_suffix(".jsonl.zst")?.parse().ok()?;
            (manifest::document_name(run).strip_prefix("manifests/")? == it).then_some(run)
        });
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

fn choose(found: BTreeMap<RunId, Vec<Copy>>, notes: &mut Notes<'_>) -> Result<History> {
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
        match &expected {
            Expected::This(it) if it.run > run => {
                gaps.push(Gap { run: it.run, uuid: Some(it.uuid.clone()) });
                expected = Expected::Any;
            }
            Expected::Number(it) if *it > run => {
                gaps.push(Gap { run: *it, uuid: None });
                expected = Expected::Any;
            }
            _ => {}
        }
        let wanted = match &expected {
            Expected::This(it) => Some(it),
            _ => None,
        };
        let Some(copy) = pick(run, copies, wanted, notes)? else {
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
    match expected {
        Expected::This(it) => gaps.push(Gap { run: it.run, uuid: Some(it.uuid) }),
        Expected::Number(run) => gaps.push(Gap { run, uuid: None }),
        _ => {}
    }
    runs.reverse();
    gaps.reverse();
    let hash = runs.last().map(|it| it.hash);
    if let Some(other) = runs.iter().find(|it| Some(it.hash) != hash) {
        let path = quoted(&other.path);
        return Err(Error::corrupt(format!("{path} is of a store with another hash")));
    }
    Ok(History { runs, left_out: Vec::new(), gaps, newest: None, hash })
}

/// The right one of a run's manifests that are whole, if there is one.
fn pick(
    run: RunId,
    copies: Vec<Copy>,
    wanted: Option<&Previous>,
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
             {}). One of them never ended, belongs to another store, or is forged, and nothing \
             says which: move one of the two files away",
            quoted(&first.path),
            Quoted(&first.source),
            first.uuid,
            quoted(&other.path),
            Quoted(&other.source),
            other.uuid
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

/// Takes out the runs whose changes are changes of something that is lost.
fn leave_out(history: &mut History) {
    if history.gaps.is_empty() {
        return;
    }
    let mut sound: BTreeMap<RunId, String> = BTreeMap::new();
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
    pub fn refusal(&self, sources: &[Source]) -> Error {
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
        let copies = sources.iter().filter_map(|it| Some((newest_copy_on(it)?, it)));
        if let Some((run, source)) = copies.max_by_key(|it| it.0) {
            let path = source.volume.config.path.join(copy::document_name(run));
            let path = Quoted(path.as_os_str().as_bytes()).to_string();
            text.push_str(&format!(
                ", or unpack the copy of the catalog of after run {run}: zstd -d {path} -o CATALOG"
            ));
        }
        text.push_str("; --allow-gaps builds a catalog without these runs");
        Error::corrupt(text)
    }
}
