//! The commands that restore: what they are asked, and what they say they did.

use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use parking_lot::Mutex;
use serde_json::{Map, Value};

use super::args::{OverwriteWhen, RestoreHow, RestoreWhich};
use super::commands::CACHE_BYTES;
use super::{args, bar, exit, show};
use crate::catalog::{Run, RunId};
use crate::error::{Error, Quoted, Result};
use crate::progress::Progress;
use crate::restore::{self, Options, Overwrite, Owners, Step, Summary, Work};
use crate::snapshot::{Snapshots, Wish, choose_run, resolve_wish};

pub fn restore(catalog: &Path, args: &args::Restore) -> Result<u8> {
    let snapshots = Snapshots::open(catalog, CACHE_BYTES)?;
    let path = args.src_file.as_os_str().as_bytes();
    let found = resolve_wish(&snapshots, path, args.run.as_ref())?;
    with_work(&snapshots, &args.how, None, found.run.id, |work| {
        restore::restore_file(work, &found, &args.dest)
    })
}

pub fn restore_folder(catalog: &Path, args: &args::RestoreFolder) -> Result<u8> {
    let snapshots = Snapshots::open(catalog, CACHE_BYTES)?;
    let path = args.src_folder.as_os_str().as_bytes();
    let found = resolve_wish(&snapshots, path, args.run.as_ref())?;
    if args.which.delete && !args.how.dry_run && !found.with_source {
        check_meant(&snapshots, args.run.as_ref(), &found.run)?;
    }
    with_work(&snapshots, &args.how, Some(&args.which), found.run.id, |work| {
        restore::restore_folder(work, &found, &args.dest_dir)
    })
}

pub fn revert_to_run(catalog: &Path, args: &args::RevertToRun) -> Result<u8> {
    let snapshots = Snapshots::open(catalog, CACHE_BYTES)?;
    let run = snapshots.with_reader(|reader| choose_run(reader, &args.run, b""))?;
    if args.which.delete && !args.how.dry_run {
        check_meant(&snapshots, Some(&args.run), &run)?;
    }
    with_work(&snapshots, &args.how, Some(&args.which), run.id, |work| {
        restore::revert_to_run(work, &run, &args.dest)
    })
}

/// Refuses to delete by a run that may be of another source than the user has in mind.
fn check_meant(snapshots: &Snapshots, wish: Option<&Wish>, run: &Run) -> Result<()> {
    if matches!(wish, Some(Wish::Number(_))) {
        return Ok(());
    }
    let runs = snapshots.with_reader(|reader| reader.runs())?;
    if runs.iter().all(|it| it.source == run.source) {
        return Ok(());
    }
    Err(Error::usage(format!(
        "--delete, and there are runs of several sources: this would be run {} of '{}'; name the \
         run by its number, or the path with its source",
        run.id,
        Quoted(&run.source)
    )))
}

fn options(how: &RestoreHow, which: Option<&RestoreWhich>) -> Options {
    Options {
        include: which.map(|it| it.include.clone()).unwrap_or_default(),
        exclude: which.map(|it| it.exclude.clone()).unwrap_or_default(),
        delete: which.is_some_and(|it| it.delete),
        dry_run: how.dry_run,
        overwrite: match how.overwrite {
            OverwriteWhen::Always => Overwrite::Always,
            OverwriteWhen::IfChanged => Overwrite::IfChanged,
            OverwriteWhen::IfNewer => Overwrite::IfNewer,
            OverwriteWhen::Never => Overwrite::Never,
        },
        verify: how.verify,
        owners: match (how.no_owner, how.numeric_owner) {
            (true, _) => Owners::Leave,
            (_, true) => Owners::ByNumber,
            _ => Owners::ByName,
        },
    }
}

/// Does the work that `call` asks for, and says what came of it.
fn with_work(
    snapshots: &Snapshots,
    how: &RestoreHow,
    which: Option<&RestoreWhich>,
    run: RunId,
    call: impl FnOnce(&Work<'_>) -> Result<Summary>,
) -> Result<u8> {
    let options = options(how, which);
    let progress = Progress::default();
    // A listener that goes away does not change what a dry run finds.
    let out = Mutex::new(io::BufWriter::new(io::stdout()));
    let tell = |step: Step, path: &[u8]| {
        let line = match how.json {
            true => step_json(step, path).to_string(),
            false => step_line(step, path),
        };
        let _ = writeln!(out.lock(), "{line}");
    };
    let work = Work { snapshots, options: &options, progress: &progress, tell: &tell };
    let summary = bar::with_bar(&progress, || call(&work));
    let _ = out.lock().flush();
    let mut summary = summary?;
    if let Some(error) = summary.ended_by.take() {
        // What has been left half done is told in any case.
        show::print_problems(&summary.problems, summary.problem_count);
        return Err(error);
    }
    Ok(print(&summary, run, how))
}

fn step_line(step: Step, path: &[u8]) -> String {
    let sign = match step {
        Step::Create => '+',
        Step::Replace => 'M',
        Step::Delete => '-',
    };
    format!("{sign} {}", if path.is_empty() { ".".to_owned() } else { Quoted(path).to_string() })
}

fn step_json(step: Step, path: &[u8]) -> Value {
    let word = match step {
        Step::Create => "create",
        Step::Replace => "replace",
        Step::Delete => "delete",
    };
    let mut map = Map::new();
    map.insert("would".into(), word.into());
    show::put_name(&mut map, "path", path);
    Value::Object(map)
}

fn print(summary: &Summary, run: RunId, how: &RestoreHow) -> u8 {
    show::print_problems(&summary.problems, summary.problem_count);
    if how.json {
        show::say(format_args!("{}", summary_json(summary, run, how.dry_run)));
    } else {
        print_lines(summary, run, how);
    }
    exit::of_problems(&summary.problems, summary.problem_count)
}

fn summary_json(summary: &Summary, run: RunId, dry_run: bool) -> Value {
    let mut map = Map::new();
    map.insert("run".into(), run.into());
    map.insert("dry_run".into(), dry_run.into());
    for (key, number) in [
        ("entries", summary.entries),
        ("dirs", summary.dirs),
        ("bytes", summary.bytes),
        ("bytes_written", summary.bytes_written),
        ("bytes_shared", summary.bytes_shared),
        ("unchanged", summary.unchanged),
        ("kept", summary.kept),
        ("deleted", summary.deleted),
        ("verified", summary.verified),
        ("owners_skipped", summary.owners_skipped),
        ("problems", summary.problem_count),
    ] {
        map.insert(key.into(), number.into());
    }
    map.insert("problem_list".into(), show::problems_json(&summary.problems));
    Value::Object(map)
}

fn print_lines(summary: &Summary, run: RunId, how: &RestoreHow) {
    show::say(format_args!(
        "{} {} entries, {} directories, {} from run {run}",
        if how.dry_run { "would restore" } else { "restored" },
        summary.entries,
        summary.dirs,
        show::bytes(summary.bytes)
    ));
    let mut more = Vec::new();
    for (number, what) in [
        (summary.unchanged, "were as they should be"),
        (summary.kept, "not overwritten"),
        (summary.deleted, if how.dry_run { "would be deleted" } else { "deleted" }),
        (summary.verified, "read back and right"),
    ] {
        if number > 0 {
            more.push(format!("{number} {what}"));
        }
    }
    if summary.bytes_shared > 0 {
        more.push(format!("{} shared with the volume", show::bytes(summary.bytes_shared)));
    }
    if !more.is_empty() {
        show::say(format_args!("  {}", more.join(", ")));
    }
    if summary.owners_skipped > 0 {
        show::say(format_args!(
            "  {} entries are yours now: only root may set owners, set-user-ID bits of others and \
             some attributes",
            summary.owners_skipped
        ));
    }
    if summary.problem_count > 0 {
        show::say(format_args!("  {} problems, named above", summary.problem_count));
    }
}
