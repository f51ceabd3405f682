//! `tape archive`.

use std::path::Path;

use serde_json::{Value, json};

use super::{Archive, open_spool};
use crate::catalog::RunId;
use crate::cli::t0p::write::{ask, ask_for};
use crate::cli::{bar, exit, show};
use crate::error::{Quoted, Result};
use crate::progress::{Progress, Said};
use crate::tape::runs::{Archived, Waiting, waiting};
use crate::tape::write::{Wanted, Written};

pub fn archive(catalog: &Path, args: &Archive, is_verbose: bool) -> Result<u8> {
    if args.dry_run {
        return dry_run(catalog, args);
    }
    let spool = open_spool()?;
    let progress = Progress::with_listener(Box::new(|said: Said<'_>| {
        if let Said::Problem(problem) = said {
            show::note(format_args!("{problem}"));
        }
    }));
    let mut tell = |it: &Written| {
        if is_verbose {
            show::note(format_args!(
                "file {} of tape {}, {}",
                it.filenum,
                Quoted(&it.tape),
                show::bytes(it.bytes)
            ));
        }
    };
    let mut first = |device: &Path, wanted: &Wanted| ask_for(device, wanted);
    let mut next = |loaded, wanted: &Wanted| ask(loaded, wanted);
    let (run, done) = bar::with_bar(&progress, || {
        args.args.archiving().run(catalog, &spool, &progress, &mut tell, &mut first, &mut next)
    })?;
    match args.json {
        true => show::say(format_args!("{}", archived_json(run, &done))),
        false => show::say(format_args!("run {run}: {}", done.line())),
    }
    Ok(exit::of_archived(&done))
}

fn archived_json(run: RunId, done: &Archived) -> Value {
    let job = |job: &crate::tape::runs::Planned| {
        json!({
            "job": job.job,
            "blocks": job.blocks,
            "bytes": job.bytes,
            "documents": job.documents,
            "tape_files": job.batches,
        })
    };
    json!({
        "run": run,
        "resumed": done.resumed,
        "jobs": done.planned.iter().map(job).collect::<Value>(),
        "tape_files": done.tally.batches,
        "blocks": done.blocks,
        "members": done.tally.files,
        "bytes": done.tally.bytes,
        "errors": done.tally.errors,
        "underruns": done.tally.underruns,
    })
}

fn dry_run(catalog: &Path, args: &Archive) -> Result<u8> {
    let (spool, progress) = (open_spool()?, Progress::default());
    let archiving = args.args.archiving();
    let (run, planned) = bar::with_bar(&progress, || archiving.count(catalog, &spool, &progress))?;
    let mut first = waiting(&spool, catalog)?;
    first.retain(|it| it.pool == archiving.pool.as_bytes());
    if args.json {
        show::say(format_args!(
            "{}",
            json!({
                "dry_run": true,
                "run": run,
                "blocks": planned.blocks,
                "bytes": planned.bytes,
                "documents": planned.documents,
                "tape_files": planned.batches,
                "waiting": first.iter().map(waiting_json).collect::<Value>(),
            })
        ));
        return Ok(exit::DONE);
    }
    for it in &first {
        show::say(format_args!("first {}", waiting_line(it)));
    }
    let pool = Quoted(archiving.pool.as_bytes());
    match planned.batches {
        0 => show::say(format_args!("run {run}: pool {pool} has all of it")),
        files => show::say(format_args!(
            "run {run}: {} blocks of {} and {} documents would go to pool {pool}, in {files} tape \
             files; nothing was written",
            planned.blocks,
            show::bytes(planned.bytes),
            planned.documents
        )),
    }
    Ok(exit::DONE)
}

/// A job that waits, in words.
pub fn waiting_line(it: &Waiting) -> String {
    let run = it.run.map_or(String::new(), |run| format!(", run {run}"));
    format!(
        "job {}{run}, pool {}: {} batches with {} files, {}{}",
        it.job,
        Quoted(&it.pool),
        it.batches,
        it.files,
        show::bytes(it.bytes),
        if it.is_busy { ", being written" } else { "" }
    )
}

/// The same for programs.
pub fn waiting_json(it: &Waiting) -> Value {
    let mut map = serde_json::Map::new();
    map.insert("job".into(), it.job.clone().into());
    map.insert("run".into(), json!(it.run));
    show::put_name(&mut map, "pool", &it.pool);
    let counts = [("batches", it.batches), ("files", it.files), ("bytes", it.bytes)];
    show::put_counts(&mut map, &counts);
    map.insert("busy".into(), it.is_busy.into());
    Value::Object(map)
}
