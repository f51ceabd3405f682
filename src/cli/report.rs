//! What a validation has found, for people and for programs.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::show::{self, Out};
use crate::catalog::DamagedFile;
use crate::error::{Quoted, Result};
use crate::sys::quoted;
use crate::validate::{
    BadBlock, BadFile, CATALOG_REMEDY, Coverage, Fault, Kept, Part, Report, Stranger,
};

/// Chunks of a block that are named to people.
const CHUNKS_SHOWN: usize = 4;

/// A report as lines.
pub fn print(out: &mut Out, report: &Report) -> Result<()> {
    for fault in &report.faults.items {
        let place = match (fault.part, fault.volume.as_os_str().is_empty()) {
            (_, true) => String::new(),
            (Part::Index, _) => format!("index of {}: ", quoted(&fault.volume)),
            _ => format!("{}: ", quoted(&fault.volume)),
        };
        out.line(&format!("{place}{}", Quoted(fault.message.as_bytes())))?;
    }
    more(out, report.faults.left_out(), "faults")?;
    for block in &report.bad_blocks.items {
        let on = match block.volume.as_os_str().is_empty() {
            true => String::new(),
            false => format!(" on {}", quoted(&block.volume)),
        };
        out.line(&format!("block {}{on}: {}", block.id, Quoted(block.reason.as_bytes())))?;
        let shown = block.chunks.items.iter().take(CHUNKS_SHOWN);
        for chunk in shown.clone() {
            out.line(&format!("    chunk {chunk}"))?;
        }
        more(out, block.chunks.count.saturating_sub(shown.len() as u64), "    chunks")?;
        files(out, &block.files)?;
    }
    more(out, report.bad_blocks.left_out(), "blocks")?;
    for file in &report.bad_files.items {
        out.line(&format!("version {}: {}", file.version, Quoted(file.reason.as_bytes())))?;
        files(out, &file.files)?;
    }
    more(out, report.bad_files.left_out(), "files")?;
    let (blocks, size) = (report.blocks, show::bytes(report.bytes));
    let read = match report.files {
        0 => String::new(),
        n => format!(", {n} files read"),
    };
    out.line(&match report.is_clean() {
        true => format!("Solid: {blocks} blocks, {size}{read}, all as written."),
        false => format!(
            "Damage: {} of {blocks} blocks ({size} in all{read}), {} files and {} other faults.",
            report.bad_blocks.count, report.bad_files.count, report.faults.count
        ),
    })?;
    notes(out, report)
}

fn files(out: &mut Out, files: &Kept<DamagedFile>) -> Result<()> {
    for file in &files.items {
        let (source, path) = (Quoted(&file.source), Quoted(&file.path));
        out.line(&format!("    {} of {source}: {path}", show::runs(&file.runs)))?;
    }
    more(out, files.left_out(), "    files")
}

/// Says how many there were that are not named.
fn more(out: &mut Out, count: u64, of: &str) -> Result<()> {
    match count {
        0 => Ok(()),
        n => {
            let (indent, of) = of.split_at(of.len() - of.trim_start().len());
            out.line(&format!("{indent}and {n} more {of}"))
        }
    }
}

/// What is no fault and worth to know.
fn notes(out: &mut Out, report: &Report) -> Result<()> {
    if report.known_bad > 0 {
        let n = report.known_bad;
        out.line(&format!("{n} more are known to be bad and were not looked at again"))?;
    }
    if let Some(sample) = report.sample {
        out.line(&format!(
            "a sample of {}%: --seed {} is the same one",
            sample.percent, sample.seed
        ))?;
    }
    if report.is_cut_short {
        out.line("the time was over: the next call goes on from here")?;
    }
    let is_partial = report.is_timed || report.coverage.never() > 0;
    if report.coverage.copies > 0 && is_partial {
        out.line(&coverage_line(&report.coverage))?;
    }
    if report.due > 0 {
        let n = report.due;
        out.line(&format!(
            "{n} documents beside the blocks are not up to date: genmeta writes them"
        ))?;
    }
    if report.unjudged > 0 {
        let n = report.unjudged;
        out.line(&format!("{n} documents could not be judged: another process is writing"))?;
    }
    for it in &report.strangers.items {
        let (run, source, path) = (it.run, Quoted(&it.source), quoted(&it.path));
        out.line(&format!(
            "run {run} of {source} is on a volume and not in the catalog ({path}): either it was \
             never acknowledged, or the catalog has lost it; if it came after the newest copy of \
             the catalog, catalog-restore takes it in"
        ))?;
    }
    more(out, report.strangers.left_out(), "runs that are not in the catalog")?;
    for path in &report.foreign_copies.items {
        let path = quoted(path);
        out.line(&format!("{path} is a copy of another catalog: nothing here takes it"))?;
    }
    more(out, report.foreign_copies.left_out(), "copies of other catalogs")?;
    if let Some(then) = report.catalog_checked {
        let then = show::time(then);
        out.line(&format!(
            "the catalog was found right {then}; it is next when each block has had its turn"
        ))?;
    }
    if report.faults_of(Part::Catalog).next().is_some() {
        out.line(CATALOG_REMEDY)?;
    }
    if !report.waste.is_empty() {
        let (n, size) = (report.waste.count, show::bytes(report.waste_bytes));
        out.line(&format!(
            "{n} block files, {size}, are not in the catalog: of a run that goes on, or was killed"
        ))?;
    }
    Ok(())
}

/// How much was verified since when, as a line.
pub fn coverage_line(coverage: &Coverage) -> String {
    let mut line = format!("verified: {} of {} blocks", coverage.verified, coverage.copies);
    if let Some(oldest) = coverage.oldest {
        line.push_str(&format!(", the longest ago {}", show::time(oldest)));
    }
    if coverage.bad > 0 {
        line.push_str(&format!("; {} bad", coverage.bad));
    }
    if coverage.never() > 0 {
        line.push_str(&format!("; {} never", coverage.never()));
    }
    line
}

/// How much was verified since when, as JSON.
pub fn coverage_json(coverage: &Coverage) -> Value {
    json!({
        "copies": coverage.copies,
        "verified": coverage.verified,
        "bad": coverage.bad,
        "never": coverage.never(),
        "oldest": coverage.oldest.map(show::time_json),
    })
}

/// A report as JSON.
pub fn to_json(report: &Report) -> Value {
    let of_catalog = report.faults_of(Part::Catalog).map(|it| it.message.clone());
    let others = report.faults.items.iter().filter(|it| it.part != Part::Catalog);
    json!({
        "clean": report.is_clean(),
        "blocks": report.blocks,
        "bytes": report.bytes,
        "documents": report.documents,
        "files_read": report.files,
        "catalog_faults": of_catalog.collect::<Vec<_>>(),
        "faults": others.map(fault_json).collect::<Value>(),
        "fault_count": report.faults.count,
        "bad_blocks": report.bad_blocks.items.iter().map(block_json).collect::<Value>(),
        "bad_block_count": report.bad_blocks.count,
        "bad_files": report.bad_files.items.iter().map(bad_file_json).collect::<Value>(),
        "bad_file_count": report.bad_files.count,
        "known_bad": report.known_bad,
        "due": report.due,
        "unjudged": report.unjudged,
        "strangers": report.strangers.items.iter().map(stranger_json).collect::<Value>(),
        "stranger_count": report.strangers.count,
        "foreign_copies":
            report.foreign_copies.items.iter().map(|it| path_json(it)).collect::<Value>(),
        "foreign_copy_count": report.foreign_copies.count,
        "catalog_checked": report.catalog_checked.map(show::time_json),
        "waste": report.waste.items.iter().map(|it| waste_json(&it.0, it.1)).collect::<Value>(),
        "waste_count": report.waste.count,
        "waste_bytes": report.waste_bytes,
        "sample_percent": report.sample.map(|it| it.percent),
        "seed": report.sample.map(|it| it.seed),
        "cut_short": report.is_cut_short,
        "coverage": coverage_json(&report.coverage),
    })
}

fn put_volume(map: &mut Map<String, Value>, volume: &Path) {
    match volume.as_os_str().is_empty() {
        true => map.insert("volume".into(), Value::Null).map_or((), drop),
        false => show::put_name(map, "volume", volume.as_os_str().as_bytes()),
    }
}

fn fault_json(it: &Fault) -> Value {
    let mut map = Map::new();
    map.insert("part".into(), it.part.as_str().into());
    put_volume(&mut map, &it.volume);
    map.insert("kind".into(), it.kind.as_str().into());
    map.insert("message".into(), it.message.clone().into());
    Value::Object(map)
}

fn files_json(files: &Kept<DamagedFile>) -> Value {
    files.items.iter().map(show::damaged_file_json).collect()
}

fn block_json(it: &BadBlock) -> Value {
    let mut map = Map::new();
    map.insert("block".into(), it.id.to_string().into());
    put_volume(&mut map, &it.volume);
    map.insert("kind".into(), it.kind.as_str().into());
    map.insert("reason".into(), it.reason.clone().into());
    let chunks = it.chunks.items.iter().map(|it| Value::from(it.to_string()));
    map.insert("chunks".into(), chunks.collect());
    map.insert("chunk_count".into(), it.chunks.count.into());
    map.insert("files".into(), files_json(&it.files));
    map.insert("file_count".into(), it.files.count.into());
    Value::Object(map)
}

fn bad_file_json(it: &BadFile) -> Value {
    let mut map = Map::new();
    map.insert("version".into(), it.version.into());
    map.insert("kind".into(), it.kind.as_str().into());
    map.insert("reason".into(), it.reason.clone().into());
    map.insert("files".into(), files_json(&it.files));
    map.insert("file_count".into(), it.files.count.into());
    Value::Object(map)
}

fn stranger_json(it: &Stranger) -> Value {
    let mut map = Map::new();
    map.insert("run".into(), it.run.into());
    map.insert("uuid".into(), it.uuid.clone().into());
    show::put_name(&mut map, "source", &it.source);
    show::put_name(&mut map, "path", it.path.as_os_str().as_bytes());
    Value::Object(map)
}

fn path_json(path: &Path) -> Value {
    let mut map = Map::new();
    show::put_name(&mut map, "path", path.as_os_str().as_bytes());
    Value::Object(map)
}

fn waste_json(path: &Path, bytes: u64) -> Value {
    let mut map = Map::new();
    show::put_name(&mut map, "path", path.as_os_str().as_bytes());
    map.insert("bytes".into(), bytes.into());
    Value::Object(map)
}
