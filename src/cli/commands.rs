//! One function a command: arguments in, calls of the other rooms, output and exit code out.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{args, bar, exit, repair, report, show};
use crate::backup::{Options, Planned};
use crate::catalog::{EntryRow, Reader, Settings, WholeRuns, Writer};
use crate::chunk::split::Chunking;
use crate::entry::Kind;
use crate::error::{Error, Quoted, Result};
use crate::progress::Progress;
use crate::snapshot::{Snapshots, resolve};
use crate::sys::{self, quoted};

/// Memory for decompressed data of one-shot commands.
pub const CACHE_BYTES: u64 = 32 << 20;
/// Default of `--chunk-size`.
const FASTCDC_AVERAGE: u64 = 64 << 10;
const FIXED_SIZE: u64 = 128 << 20;
/// Entries listed at a time.
const PAGE_ENTRIES: usize = 1024;

pub fn init(catalog: &Path, args: &args::Init) -> Result<u8> {
    let default = if args.chunking == "fixed" { FIXED_SIZE } else { FASTCDC_AVERAGE };
    let settings = Settings {
        hash: args.hash_algo.parse()?,
        chunking: Chunking::new(&args.chunking, args.chunk_size.unwrap_or(default))?,
        compression: args.compression.parse()?,
        block_bytes: args.block_size,
        reserve_percent: args.reserve,
        copies: args.copies,
    };
    if let Some(dir) = catalog.parent() {
        sys::make_private_dirs(dir).map_err(|e| Error::io(quoted(dir).to_string(), e))?;
    }
    Writer::create(catalog, &settings)?;
    show::say(format_args!("made catalog {}", quoted(catalog)));
    Ok(exit::DONE)
}

pub fn add_volume(catalog: &Path, args: &args::AddVolume) -> Result<u8> {
    let mut writer = Writer::open(catalog)?;
    let reserve = args.reserve.map_or_else(|| Ok(writer.settings()?.reserve_percent), Ok)?;
    let failed = |e| Error::io(format!("volume {}", quoted(&args.path)), e);
    sys::make_private_dirs(&args.path).map_err(failed)?;
    let path = args.path.canonicalize().map_err(failed)?;
    let config = writer.add_volume(&path, reserve)?;
    show::say(format_args!(
        "added volume {} at {}, reserve {reserve}%",
        config.uuid,
        quoted(&path)
    ));
    Ok(exit::DONE)
}

pub fn backup(catalog: &Path, args: &args::Backup, verbose: bool) -> Result<u8> {
    let progress = Progress::default();
    let options = args.args.options()?;
    if args.args.is_dry_run() {
        return dry_run(catalog, &options, args.json, verbose);
    }
    let summary = bar::with_bar(&progress, || crate::backup::run(catalog, &options, &progress))?;
    let counts = &summary.counts;
    show::print_problems(&summary.problems, counts.problems);
    if args.json {
        let mut map = Map::new();
        map.insert("run".into(), summary.run.into());
        show::put_name(&mut map, "source", &summary.source);
        map.extend(show::counts_json(counts));
        map.insert("bytes_adopted".into(), summary.bytes_adopted.into());
        map.insert("copies".into(), show::copies_json(&summary.copies));
        map.insert("problem_list".into(), show::problems_json(&summary.problems));
        let warnings: Vec<String> = summary.warnings.iter().map(ToString::to_string).collect();
        map.insert("warnings".into(), warnings.into());
        show::say(format_args!("{}", Value::Object(map)));
    } else {
        show::say(format_args!("run {} of {}", summary.run, Quoted(&summary.source)));
        show::say(format_args!("  entries: {}", show::tally(&counts.entries)));
        show::say(format_args!("  directories: {}", show::tally(&counts.dirs)));
        show::say(format_args!(
            "  {} files, {}; read {}, stored {} new",
            counts.files,
            show::bytes(counts.bytes),
            show::bytes(counts.bytes_read),
            show::bytes(counts.bytes_stored)
        ));
        if summary.bytes_adopted > 0 {
            let adopted = show::bytes(summary.bytes_adopted);
            show::say(format_args!(
                "  took over {adopted} that a run which did not end had stored"
            ));
        }
        show::say_copies(&summary.copies);
        if counts.problems > 0 {
            show::say(format_args!("  {} problems, named above", counts.problems));
        }
        show::print_warnings(&summary.warnings);
    }
    Ok(exit::of_problems(&summary.problems, counts.problems))
}

fn dry_run(catalog: &Path, options: &Options, json: bool, verbose: bool) -> Result<u8> {
    let progress = Progress::default();
    let mut out = show::Out::new();
    let mut each = |it: Planned<'_>| match (verbose, json) {
        (false, _) => Ok(()),
        (true, false) => out.line(&show::change_text(it.kind, it.path, it.meta.kind)),
        (true, true) => out.json(&show::planned_json(&it)),
    };
    let mut look = || crate::backup::dry_run(catalog, options, &progress, &mut each);
    // Lines for people and a bar would run into each other.
    let plan = if verbose { look() } else { bar::with_bar(&progress, look) }?;
    let counts = &plan.counts;
    show::print_problems(&plan.problems, counts.problems);
    if json {
        let mut map = Map::new();
        map.insert("dry_run".into(), true.into());
        show::put_name(&mut map, "source", &plan.source);
        map.extend(show::counts_json(counts));
        map.insert("problem_list".into(), show::problems_json(&plan.problems));
        out.json(&Value::Object(map))?;
    } else {
        out.line(&format!("dry run of {}: nothing was written", Quoted(&plan.source)))?;
        out.line(&format!("  entries: {}", show::tally(&counts.entries)))?;
        out.line(&format!("  directories: {}", show::tally(&counts.dirs)))?;
        let (bytes, to_read) = (show::bytes(counts.bytes), show::bytes(counts.bytes_read));
        out.line(&format!("  {} files, {bytes}; {to_read} to read", counts.files))?;
    }
    out.finish()?;
    Ok(exit::of_problems(&plan.problems, counts.problems))
}

pub fn list_changes(catalog: &Path, args: &args::ListChanges) -> Result<u8> {
    let reader = Reader::open(catalog)?;
    let run = reader.run(args.run)?;
    let problems = reader.problems(run.id)?;
    let mut out = show::Out::new();
    if !args.json {
        out.line(&format!("run {} of {}", run.id, Quoted(&run.source)))?;
        if !run.comment.is_empty() {
            out.line(&format!("  comment: {}", Quoted(run.comment.as_bytes())))?;
        }
        out.line(&format!("  entries: {}", show::tally(&run.counts.entries)))?;
        out.line(&format!("  directories: {}", show::tally(&run.counts.dirs)))?;
    }
    reader.changes(&run, &mut |change| {
        if !args.json {
            return out.line(&show::change_line(&change));
        }
        let mut map = Map::new();
        map.insert("change".into(), change.kind.as_str().into());
        map.extend(show::entry_json(&change.path, &change.entry));
        out.json(&Value::Object(map))
    })?;
    for (path, kind, message) in problems {
        if args.json {
            let mut map = Map::new();
            map.insert("change".into(), "problem".into());
            show::put_name(&mut map, "path", &path);
            map.insert("kind".into(), kind.into());
            map.insert("message".into(), message.into());
            out.json(&Value::Object(map))?;
        } else {
            out.line(&format!("! {}: {message}", Quoted(&path)))?;
        }
    }
    out.finish()?;
    Ok(exit::DONE)
}

pub fn validate(catalog: &Path, args: &args::Validate) -> Result<u8> {
    let options = args.args.options()?;
    let snapshots = Snapshots::open(catalog, CACHE_BYTES)?;
    let progress = Progress::default();
    let report =
        bar::with_bar(&progress, || crate::validate::run(&snapshots, &options, &progress))?;
    let mut out = show::Out::new();
    let mut value = if args.json { report::to_json(&report) } else { Value::Null };
    if !args.json {
        report::print(&mut out, &report)?;
    }
    let mut code = report.worst().map_or(exit::DONE, exit::of_kind);
    if args.repair && !report.is_clean() {
        let done = repair::repair(catalog, &report)?;
        code = exit::of_repaired(&report, &done);
        match value.as_object_mut() {
            Some(map) => drop(map.insert("repair".to_owned(), repair::to_json(&done))),
            None => repair::print(&mut out, &done)?,
        }
    }
    if args.json {
        out.json(&value)?;
    }
    out.finish()?;
    Ok(code)
}

pub fn genmeta(catalog: &Path, args: &args::Genmeta) -> Result<u8> {
    let progress = Progress::default();
    let options = args.args.options();
    let done = bar::with_bar(&progress, || crate::genmeta::run(catalog, &options, &progress))?;
    show::print_problems(&done.problems, done.problem_count);
    match args.json {
        true => show::say(format_args!(
            "{}",
            json!({
                "metas": done.metas,
                "metas_written": done.metas_written,
                "manifests": done.manifests,
                "manifests_written": done.manifests_written,
                "problems": done.problem_count,
                "problem_list": show::problems_json(&done.problems),
            })
        )),
        false => show::say(format_args!("{}", done.line())),
    }
    Ok(exit::of_problems(&done.problems, done.problem_count))
}

pub fn runs(catalog: &Path, args: &args::Runs) -> Result<u8> {
    let WholeRuns { runs, damaged } = Reader::open(catalog)?.whole_runs()?;
    let code = if damaged.is_empty() { exit::DONE } else { exit::DAMAGED };
    for (number, e) in &damaged {
        show::note(format_args!("run {number} is damaged in the catalog, see validate: {e}"));
    }
    let mut out = show::Out::new();
    if args.json {
        out.json(&runs.iter().map(show::run_json).collect())?;
        out.finish()?;
        return Ok(code);
    }
    out.line(&format!(
        "{:>5}  {:<19}  {:>9} {:>10} {:>10}  {}",
        "run", "finished", "files", "size", "new", "source"
    ))?;
    for run in &runs {
        let tags = match run.tags.is_empty() {
            true => String::new(),
            false => format!("  [{}]", Quoted(run.tags.join(", ").as_bytes())),
        };
        let problems = match run.counts.problems {
            0 => String::new(),
            n => format!("  ({n} problems)"),
        };
        let comment = match run.comment.is_empty() {
            true => String::new(),
            false => format!("  \"{}\"", Quoted(run.comment.as_bytes())),
        };
        out.line(&format!(
            "{:>5}  {:<19}  {:>9} {:>10} {:>10}  {}{tags}{comment}{problems}",
            run.id,
            show::time(run.finished),
            run.counts.files,
            show::bytes(run.counts.bytes),
            show::bytes(run.counts.bytes_stored),
            Quoted(&run.source)
        ))?;
    }
    out.finish()?;
    Ok(code)
}

pub fn ls(catalog: &Path, args: &args::Ls) -> Result<u8> {
    let snapshots = Snapshots::open(catalog, CACHE_BYTES)?;
    let found = resolve(&snapshots, args.path.as_os_str().as_bytes(), Some(args.run))?;
    let mut out = show::Out::new();
    let Some(dir) = found.entry.child else {
        ls_entry(&mut out, &snapshots, &found.path, &found.entry, args)?;
        out.finish()?;
        return Ok(exit::DONE);
    };
    let mut after: Option<Vec<u8>> = None;
    loop {
        let page = snapshots.list(found.run.id, dir, after.as_deref(), PAGE_ENTRIES)?;
        let Some(last) = page.last() else { break };
        after = Some(last.name.clone());
        for entry in &page {
            let path = match found.path.is_empty() {
                true => entry.name.clone(),
                false => [&*found.path, b"/", &entry.name].concat(),
            };
            ls_entry(&mut out, &snapshots, &path, entry, args)?;
        }
    }
    out.finish()?;
    Ok(exit::DONE)
}

fn ls_entry(
    out: &mut show::Out,
    snapshots: &Snapshots,
    path: &[u8],
    entry: &EntryRow,
    args: &args::Ls,
) -> Result<()> {
    let needs_content = args.json || entry.meta.kind == Kind::Symlink;
    let file = needs_content.then(|| snapshots.file(entry.version)).transpose()?;
    let target = file.as_ref().and_then(|it| it.content.extra.target.as_deref());
    if args.json {
        let mut map = show::entry_json(path, entry);
        if let Some(target) = target {
            show::put_name(&mut map, "target", target);
        }
        if let Some(hash) = file.as_ref().and_then(|it| it.content.hash) {
            map.insert("hash".into(), hash.to_string().into());
        }
        return out.json(&Value::Object(map));
    }
    let name = |kind: &str, id: u32| -> Result<String> {
        let name = snapshots.with_reader(|reader| reader.owner_name(kind, id, args.run))?;
        Ok(name.map_or_else(|| id.to_string(), |it| Quoted(&it).to_string()))
    };
    let (owner, group) = (name("user", entry.meta.uid)?, name("group", entry.meta.gid)?);
    out.line(&show::entry_line(entry, target, &owner, &group))
}
