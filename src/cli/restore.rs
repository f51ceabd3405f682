//! The commands that restore: what they are asked, and what they say they did.

use std::io::{self, Write};
use std::path::Path;

use parking_lot::Mutex;
use serde_json::{Map, Value};

use super::commands::CACHE_BYTES;
use super::{args, bar, exit, show};
use crate::catalog::RunId;
use crate::error::{Quoted, Result};
use crate::job::grammar::Restoring;
use crate::progress::Progress;
use crate::restore::{Step, Summary};

pub fn restore(catalog: &Path, args: &args::Restore) -> Result<u8> {
    run(catalog, &(&args.args).into(), args.json)
}

pub fn restore_folder(catalog: &Path, args: &args::RestoreFolder) -> Result<u8> {
    run(catalog, &(&args.args).into(), args.json)
}

pub fn revert_to_run(catalog: &Path, args: &args::RevertToRun) -> Result<u8> {
    run(catalog, &(&args.args).into(), args.json)
}

/// Restores, and says what came of it.
fn run(catalog: &Path, restoring: &Restoring, json: bool) -> Result<u8> {
    let snapshots = restoring.open(catalog, CACHE_BYTES)?;
    let progress = Progress::default();
    // A listener that goes away does not change what a dry run finds.
    let out = Mutex::new(io::BufWriter::new(io::stdout()));
    let tell = |step: Step, path: &[u8]| {
        let line = match json {
            true => step_json(step, path).to_string(),
            false => step_line(step, path),
        };
        let _ = writeln!(out.lock(), "{line}");
    };
    let done = bar::with_bar(&progress, || restoring.run(&snapshots, &progress, &tell));
    let _ = out.lock().flush();
    let (run, mut summary) = done?;
    if let Some(error) = summary.ended_by.take() {
        // What has been left half done is told in any case.
        show::print_problems(&summary.problems, summary.problem_count);
        return Err(error);
    }
    Ok(print(&summary, run, restoring.options.dry_run, json))
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

fn print(summary: &Summary, run: RunId, dry_run: bool, json: bool) -> u8 {
    show::print_problems(&summary.problems, summary.problem_count);
    if json {
        show::say(format_args!("{}", summary_json(summary, run, dry_run)));
    } else {
        print_lines(summary, run, dry_run);
    }
    exit::of_problems(&summary.problems, summary.problem_count)
}

fn summary_json(summary: &Summary, run: RunId, dry_run: bool) -> Value {
    let mut map = Map::new();
    map.insert("run".into(), run.into());
    map.insert("dry_run".into(), dry_run.into());
    let counts = [
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
    ];
    show::put_counts(&mut map, &counts);
    map.insert("problem_list".into(), show::problems_json(&summary.problems));
    Value::Object(map)
}

fn print_lines(summary: &Summary, run: RunId, dry_run: bool) {
    show::say(format_args!(
        "{} {} entries, {} directories, {} from run {run}",
        if dry_run { "would restore" } else { "restored" },
        summary.entries,
        summary.dirs,
        show::bytes(summary.bytes)
    ));
    let mut more = Vec::new();
    for (number, what) in [
        (summary.unchanged, "were as they should be"),
        (summary.kept, "not overwritten"),
        (summary.deleted, if dry_run { "would be deleted" } else { "deleted" }),
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
