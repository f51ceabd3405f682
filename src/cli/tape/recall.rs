//! `tape recall`, `tape verify`, and tapes for `rebuildmeta`.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::open_spool;
use crate::catalog::{Reader, RunBlocks, RunId, manifest};
use crate::cli::commands::CACHE_BYTES;
use crate::cli::{bar, exit, show, terminal};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::progress::Progress;
use crate::snapshot::{Snapshots, Wish, choose_run, resolve_wish};
use crate::sys::quoted;
use crate::tape::loaded::Loaded;
use crate::tape::runs::recall::{self, Plan, Recalled, Source};
use crate::tape::runs::shelf::{Ask, Magazine, Shelf, in_drive};
use crate::tape::runs::verify;
use crate::volume::BlockId;

/// Where tapes are read.
#[derive(clap::Args)]
pub struct From {
    /// A drive of the spool; several recall in parallel [default: the spool's default one]
    #[arg(long, value_name = "DRIVE")]
    drive: Vec<OsString>,
    /// Images of tapes, directories of images, or devices, instead of a drive of the spool
    #[arg(long, value_name = "PATH", num_args = 1.., conflicts_with = "drive")]
    tapes: Vec<PathBuf>,
}

/// What is on no volume that is there comes back from tape: first the plan, then each tape once,
/// forwards.
#[derive(clap::Args)]
pub struct Recall {
    /// The run: its number, 'latest', or a time, as in --run of restore
    #[arg(value_name = "N|latest|TIME")]
    run: Wish,
    /// Only this file or folder of it
    path: Option<PathBuf>,
    #[command(flatten)]
    from: From,
    /// Only say which tapes would be read, and how much
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Reads whole tapes and proves every block by its name. What is bad no longer counts.
#[derive(clap::Args)]
pub struct Verify {
    /// Labels of tapes, or a run (its number, or latest): all tapes that hold something of it
    #[arg(required = true, value_name = "TAPE|N|latest")]
    what: Vec<OsString>,
    #[command(flatten)]
    from: From,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Asks for a tape, where there is a terminal.
fn ask(label: Option<&[u8]>, device: &Path) -> Result<bool> {
    let device = quoted(device);
    match label {
        Some(label) => terminal::ask(
            format_args!("put tape {} into {device}", Quoted(label)),
            "type q to go on without it",
        ),
        None => terminal::ask(format_args!("put the next tape into {device}"), "q at the end"),
    }
}

impl From {
    /// Has `work` done with the drives, for the tapes of a catalog.
    fn with_drives<T>(
        &self,
        catalog: &Path,
        work: impl FnOnce(Vec<Source<'_>>) -> Result<T>,
    ) -> Result<T> {
        if !self.tapes.is_empty() {
            let mut shelf = Shelf::of(&self.tapes)?.for_catalog(catalog);
            let get = Box::new(move |label: &[u8]| shelf.get(label, &mut ask));
            return work(vec![Source { has: None, get }]);
        }
        let spool = open_spool()?;
        let names: Vec<Option<&OsString>> = match self.drive.is_empty() {
            true => vec![None],
            false => self.drive.iter().map(Some).collect(),
        };
        let mut taken = Vec::new();
        for name in names {
            taken.push(spool.drive(name.map(|it| &**it))?.take()?);
        }
        let spool = &spool;
        let mut drives = Vec::new();
        for taken in &taken {
            let has = taken.tape()?.map(|it| it.name());
            let get = Box::new(move |label: &[u8]| {
                let mut ask = ask;
                let ask: Option<&mut Ask<'_>> = match terminal::is_there() {
                    true => Some(&mut ask),
                    false => None,
                };
                in_drive(spool, taken, label, ask)
            });
            drives.push(Source { has, get });
        }
        work(drives)
    }
}

/// The blocks that are wanted, and of which run.
fn wanted(catalog: &Path, wish: &Wish, path: Option<&Path>) -> Result<(RunId, RunBlocks)> {
    let reader = Reader::open(catalog)?;
    let Some(path) = path else {
        let run = choose_run(&reader, wish, b"")?;
        return Ok((run.id, reader.blocks_of_run(&run)?));
    };
    let snapshots = Snapshots::open(catalog, CACHE_BYTES)?;
    let found = resolve_wish(&snapshots, path.as_os_str().as_bytes(), Some(wish))?;
    Ok((found.run.id, reader.blocks_of_entry(found.run.id, &found.entry)?))
}

pub fn recall(catalog: &Path, args: &Recall) -> Result<u8> {
    let progress = Progress::default();
    let (run, needed) = wanted(catalog, &args.run, args.path.as_deref())?;
    if args.dry_run {
        let plan = bar::with_bar(&progress, || recall::plan(catalog, &needed, &progress))?;
        say_plan(run, &plan, args.json)?;
        return Ok(if plan.blocks_lost > 0 { exit::PROBLEMS } else { exit::DONE });
    }
    // No drive is taken if there is nothing to do. It is interrupted by itself.
    let planning = Progress::default();
    let plan = bar::with_bar(&planning, || recall::plan(catalog, &needed, &planning))?;
    let here = plan.blocks_here;
    if plan.tapes.is_empty() {
        let Plan { blocks_lost, lost, bad_on, .. } = plan;
        let done = Recalled { missing: blocks_lost, lost, bad_on, ..Recalled::default() };
        say_recalled(run, here, &done, args.json)?;
        return Ok(if blocks_lost > 0 { exit::PROBLEMS } else { exit::DONE });
    }
    let done = args.from.with_drives(catalog, |drives| {
        bar::with_bar(&progress, || recall::recall(catalog, (&needed, plan), drives, &progress))
    })?;
    show::print_problems(&done.problems, done.problem_count);
    say_recalled(run, here, &done, args.json)?;
    Ok(match done.missing {
        0 => exit::DONE,
        _ if done.is_tape_missing => exit::of_kind(ErrorKind::WrongTape),
        _ => exit::PROBLEMS,
    })
}

fn say_plan(run: RunId, plan: &Plan, as_json: bool) -> Result<()> {
    let mut out = show::Out::new();
    if as_json {
        let tapes: Vec<Value> = plan
            .tapes
            .iter()
            .map(|it| {
                let mut map = serde_json::Map::new();
                show::put_name(&mut map, "tape", &it.label);
                let counts = [("tape_files", it.files), ("blocks", it.blocks), ("bytes", it.bytes)];
                show::put_counts(&mut map, &counts);
                Value::Object(map)
            })
            .collect();
        out.json(&json!({
            "dry_run": true,
            "run": run,
            "tapes": tapes,
            "blocks": plan.blocks(),
            "bytes": plan.bytes(),
            "seconds": plan.seconds(),
            "blocks_here": plan.blocks_here,
            "blocks_lost": plan.blocks_lost,
        }))?;
        return out.finish();
    }
    out.line(&format!(
        "run {run}: {} blocks are on volumes; {} of {} come from {} tapes",
        plan.blocks_here,
        plan.blocks(),
        show::bytes(plan.bytes()),
        plan.tapes.len()
    ))?;
    for it in &plan.tapes {
        out.line(&format!(
            "  tape {}: {} blocks in {} tape files, {}",
            Quoted(&it.label),
            it.blocks,
            it.files,
            show::bytes(it.bytes)
        ))?;
    }
    if !plan.tapes.is_empty() {
        let minutes = plan.seconds().div_ceil(60);
        out.line(&format!("  about {minutes} minutes with one drive, reckoned at 120 MB/s"))?;
    }
    if plan.blocks_lost > 0 {
        out.line(&format!(
            "  {} blocks are on no volume that is here and on no tape known to be good: {}",
            plan.blocks_lost,
            names(&plan.lost)
        ))?;
        say_bad(&mut out, &plan.bad_on)?;
    }
    out.finish()
}

fn say_recalled(run: RunId, blocks_here: u64, done: &Recalled, as_json: bool) -> Result<()> {
    let mut out = show::Out::new();
    if as_json {
        out.json(&json!({
            "run": run,
            "blocks": done.blocks,
            "bytes": done.bytes,
            "blocks_here": blocks_here,
            "missing": done.missing,
            "missing_list": done.lost.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "problems": done.problem_count,
            "problem_list": show::problems_json(&done.problems),
        }))?;
        return out.finish();
    }
    if done.blocks == 0 && done.missing == 0 {
        out.line(&format!("run {run}: everything is on volumes already"))?;
    } else {
        let bytes = show::bytes(done.bytes);
        out.line(&format!("run {run}: {} blocks of {bytes} are back", done.blocks))?;
    }
    if done.missing > 0 {
        let lost = match &*done.lost {
            [] => String::new(),
            lost => format!("; on no tape known to be good: {}", names(lost)),
        };
        out.line(&format!("  {} blocks are still missing{lost}", done.missing))?;
        say_bad(&mut out, &done.bad_on)?;
    }
    out.finish()
}

fn names(blocks: &[BlockId]) -> String {
    blocks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Says what may be tried with blocks that were found bad on tape.
fn say_bad(out: &mut show::Out, bad_on: &BTreeSet<Vec<u8>>) -> Result<()> {
    for label in bad_on {
        let tape = Quoted(label);
        out.line(&format!(
            "  tape {tape} has some of them, found bad: tape verify {tape} reads it once more"
        ))?;
    }
    Ok(())
}

pub fn verify(catalog: &Path, args: &Verify) -> Result<u8> {
    if args.from.drive.len() > 1 {
        return Err(Error::usage("a tape is verified in one drive: give --drive once"));
    }
    let labels = labels(catalog, &args.what)?;
    let mut out = show::Out::new();
    let mut all = Vec::new();
    let (mut is_bad, mut is_away, mut failed) = (false, false, None);
    args.from.with_drives(catalog, |mut drives| {
        let missing = || Error::usage("there is no drive");
        let get = &mut drives.first_mut().ok_or_else(missing)?.get;
        for label in &labels {
            let found = match get(label).and_then(|it| verify_one(catalog, it)) {
                Ok(Some(found)) => {
                    is_bad |= found.problem_count > 0;
                    found
                }
                Ok(None) => {
                    is_away = true;
                    show::note(format_args!("tape {} could not be had", Quoted(label)));
                    continue;
                }
                Err(e) if is_of_all(&e) => return Err(e),
                // The others may well be read.
                Err(e) => {
                    let mut found = verify::Verified::default();
                    found.note(format!("tape {}", Quoted(label)), &e);
                    failed.get_or_insert(e.kind());
                    found
                }
            };
            show::print_problems(&found.problems, found.problem_count);
            if args.json {
                let mut map = serde_json::Map::new();
                show::put_name(&mut map, "tape", label);
                let counts =
                    [("tape_files", found.files), ("blocks", found.blocks), ("bytes", found.bytes)];
                show::put_counts(&mut map, &counts);
                map.insert("problems".into(), found.problem_count.into());
                map.insert("problem_list".into(), show::problems_json(&found.problems));
                all.push(Value::Object(map));
            } else {
                out.line(&format!(
                    "tape {}: {} tape files, {} blocks of {} are right; {} problems",
                    Quoted(label),
                    found.files,
                    found.blocks,
                    show::bytes(found.bytes),
                    found.problem_count
                ))?;
            }
        }
        Ok(())
    })?;
    if args.json {
        out.json(&Value::Array(all))?;
    }
    out.finish()?;
    Ok(match (is_bad, failed, is_away) {
        (true, ..) => exit::of_kind(ErrorKind::Corrupt),
        (false, Some(kind), _) => exit::of_kind(kind),
        (false, None, true) => exit::of_kind(ErrorKind::WrongTape),
        (false, None, false) => exit::DONE,
    })
}

/// Verifies a tape, if it was to be had.
fn verify_one(catalog: &Path, loaded: Option<Loaded>) -> Result<Option<verify::Verified>> {
    let Some(mut loaded) = loaded else { return Ok(None) };
    // With two bars of one progress an interrupt would count twice, and end the process.
    let progress = Progress::default();
    let found = bar::with_bar(&progress, || verify::verify(catalog, &mut loaded, &progress))?;
    loaded.close()?;
    Ok(Some(found))
}

/// Whether every other tape would fail in the same way.
fn is_of_all(error: &Error) -> bool {
    error.is_shortage() || matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Interrupted)
}

/// The tapes that are meant: labels that are known, and the tapes of runs.
fn labels(catalog: &Path, words: &[OsString]) -> Result<Vec<Vec<u8>>> {
    let missing = || Error::new(ErrorKind::NotFound, "nothing is known of any tape");
    let tapes = super::known_now(catalog)?.ok_or_else(missing)?;
    let mut labels = BTreeSet::new();
    for word in words {
        if tapes.tape(word.as_bytes())?.is_some() {
            labels.insert(word.as_bytes().to_vec());
            continue;
        }
        let wish: Option<Wish> = word.to_str().and_then(|it| it.parse().ok());
        let Some(wish) = wish else {
            let shown = Quoted(word.as_bytes()).to_string();
            let what = format!("there is no tape {shown}: see raidtape tape list");
            return Err(Error::new(ErrorKind::NotFound, what));
        };
        let (run, needed) = wanted(catalog, &wish, None)?;
        let reader = Reader::open(catalog)?;
        // Without the manifests of it and of those before it nobody makes it of tapes.
        for other in reader.runs()?.iter().filter(|it| it.id <= run) {
            let name = manifest::document_name(other.id);
            labels.extend(tapes.labels_with_document(name.as_bytes())?);
        }
        let mut after = 0;
        loop {
            let page = reader.block_numbers(after, 1024)?;
            let Some(last) = page.last() else { break };
            after = *last;
            for number in page.into_iter().filter(|it| needed.has(*it)) {
                labels.extend(tapes.labels_with(&reader.block_id(number)?)?);
            }
        }
        if labels.is_empty() {
            let what = format!("nothing of run {run} is on any tape: see raidtape tape list");
            return Err(Error::new(ErrorKind::NotFound, what));
        }
    }
    Ok(labels.into_iter().collect())
}

/// Has `work` done with tape after tape: those at `paths`, or else those of a drive of the spool.
pub fn with_all_tapes<T>(
    paths: &[PathBuf],
    drive: Option<&OsStr>,
    work: impl FnOnce(&mut dyn FnMut() -> Result<Option<Loaded>>) -> Result<T>,
) -> Result<T> {
    if !paths.is_empty() {
        let mut all = Shelf::of(paths)?.into_all()?;
        return work(&mut || all.next_tape(&mut ask));
    }
    let spool = open_spool()?;
    let taken = spool.drive(drive)?.take()?;
    let mut magazine = Magazine::of(&spool, &taken)?;
    work(&mut || magazine.next_tape(&mut ask))
}
