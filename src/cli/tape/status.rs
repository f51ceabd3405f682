//! `tape status`.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::archive::{waiting_json, waiting_line};
use super::{Status, known_now, open_spool};
use crate::catalog::{Amount, BadCopies, Reader, Run};
use crate::cli::{exit, show};
use crate::error::{ErrorKind, Quoted, Result};
use crate::sys::quoted;
use crate::tape::runs::waiting;
use crate::tape::spool::Spool;
use crate::tape::spool::drive::{Drive, DriveStatus};

/// A run, its blocks, and those of them that are on no tape.
struct Newest {
    run: Run,
    all: Amount,
    lacking: Amount,
}

fn newest(catalog: &Path) -> Result<Option<Newest>> {
    let reader = Reader::open(catalog)?;
    let Some(run) = reader.latest(None)? else { return Ok(None) };
    let blocks = reader.blocks_of_run(&run)?;
    let tapes = known_now(catalog)?;
    let coverage =
        reader.coverage(Some(&blocks), (&[], &BadCopies::default(), 1), tapes.as_ref())?;
    let mut all = Amount::default();
    for it in coverage.by_tapes.values() {
        all.blocks += it.blocks;
        all.bytes += it.bytes;
    }
    let lacking = coverage.by_tapes.get(&0).copied().unwrap_or_default();
    Ok(Some(Newest { run, all, lacking }))
}

pub fn status(catalog: &Path, args: &Status) -> Result<u8> {
    let newest = newest(catalog)?;
    let spool = match open_spool() {
        Ok(spool) => Some(spool),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            show::note(format_args!("{e}"));
            None
        }
        Err(e) => return Err(e),
    };
    let drives = spool.as_ref().map(Spool::drives).transpose()?.unwrap_or_default();
    let jobs = spool.as_ref().map(|it| waiting(it, catalog)).transpose()?.unwrap_or_default();
    let mut out = show::Out::new();
    if args.json {
        let drives = drives.iter().map(drive_json).collect::<Result<Value>>()?;
        out.json(&json!({
            "drives": drives,
            "waiting": jobs.iter().map(waiting_json).collect::<Value>(),
            "newest": newest.as_ref().map(newest_json),
        }))?;
        out.finish()?;
        return Ok(exit::DONE);
    }
    for drive in &drives {
        let tape = drive.tape()?.map(|it| Quoted(&it.name()).to_string());
        out.line(&format!(
            "drive {} {}: {}, at {}",
            Quoted(drive.name().as_bytes()),
            word(drive.status()?),
            tape.map_or("no tape".to_owned(), |it| format!("tape {it}")),
            quoted(&drive.device()?)
        ))?;
    }
    for it in &jobs {
        out.line(&format!("waiting: {}", waiting_line(it)))?;
    }
    if let Some(Newest { run, all, lacking }) = &newest {
        let what = match lacking.blocks {
            0 => "all on tape".to_owned(),
            n => format!("{n} of them, {}, on no tape", show::bytes(lacking.bytes)),
        };
        let (blocks, size) = (all.blocks, show::bytes(all.bytes));
        let source = Quoted(&run.source);
        out.line(&format!("run {} of {source}: {blocks} blocks, {size}; {what}", run.id))?;
    }
    out.finish()?;
    Ok(exit::DONE)
}

fn word(status: DriveStatus) -> &'static str {
    match status {
        DriveStatus::Idle => "idle",
        DriveStatus::Busy => "busy",
    }
}

fn drive_json(drive: &Drive) -> Result<Value> {
    let mut map = Map::new();
    show::put_name(&mut map, "drive", drive.name().as_bytes());
    show::put_name(&mut map, "device", drive.device()?.as_os_str().as_bytes());
    map.insert("state".into(), word(drive.status()?).into());
    match drive.tape()? {
        Some(tape) => show::put_name(&mut map, "tape", &tape.name()),
        None => drop(map.insert("tape".into(), Value::Null)),
    }
    Ok(Value::Object(map))
}

fn newest_json(newest: &Newest) -> Value {
    json!({
        "run": newest.run.id,
        "blocks": newest.all.blocks,
        "bytes": newest.all.bytes,
        "blocks_lacking": newest.lacking.blocks,
        "bytes_lacking": newest.lacking.bytes,
    })
}
