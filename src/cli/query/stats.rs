//! `stats`: how much is stored, and in how little.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::catalog::{Health, Reader, Run};
use crate::cli::volumes::VolumeUse;
use crate::cli::{exit, report, show};
use crate::error::{Quoted, Result};
use crate::sys::quoted;
use crate::validate::Coverage;

/// Everything is in the catalog already; no block is read.
#[derive(clap::Args)]
pub struct Stats {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What all runs of a source come to.
struct Source<'a> {
    latest: &'a Run,
    runs: u64,
    bytes: u64,
    new_bytes: u64,
}

pub fn stats(catalog: &Path, args: &Stats) -> Result<u8> {
    let reader = Reader::open(catalog)?;
    let stats = reader.stats()?;
    let runs = reader.runs()?;
    let mut sources: BTreeMap<&[u8], Source<'_>> = BTreeMap::new();
    for run in &runs {
        let of = sources.entry(&run.source);
        let of = of.or_insert(Source { latest: run, runs: 0, bytes: 0, new_bytes: 0 });
        of.latest = run;
        of.runs += 1;
        of.bytes = of.bytes.saturating_add(run.counts.bytes);
        of.new_bytes += run.counts.bytes_stored;
    }
    let logical = sources.values().fold(0u64, |sum, it| sum.saturating_add(it.bytes));
    let volumes = VolumeUse::of_all(&reader)?;
    let ratios = [
        ("deduplication", ratio(logical, stats.plain_bytes)),
        ("compression", ratio(stats.plain_bytes, stats.stored_bytes)),
        ("together", ratio(logical, stats.stored_bytes)),
    ];
    let coverage = Coverage::of(&reader, &Health::open(catalog))?;
    let mut out = show::Out::new();
    if args.json {
        let mut map = Map::new();
        map.insert("runs_count".into(), runs.len().into());
        map.insert("logical_bytes".into(), logical.into());
        map.insert("unique_bytes".into(), stats.plain_bytes.into());
        map.insert("stored_bytes".into(), stats.stored_bytes.into());
        for (key, value) in [("dedup_ratio", 0), ("compression_ratio", 1), ("total_ratio", 2)] {
            map.insert(key.into(), json!(ratios.get(value).and_then(|it| it.1)));
        }
        map.insert("blocks".into(), stats.blocks.into());
        map.insert("chunks".into(), stats.chunks.into());
        map.insert("versions".into(), stats.versions.into());
        map.insert("entries".into(), stats.entries.into());
        map.insert("catalog_bytes".into(), stats.catalog_bytes.into());
        map.insert("verified".into(), report::coverage_json(&coverage));
        map.insert("sources".into(), sources.iter().map(source_json).collect());
        map.insert("runs".into(), runs.iter().map(run_json).collect());
        map.insert("volumes".into(), volumes.iter().map(volume_json).collect());
        out.json(&Value::Object(map))?;
        out.finish()?;
        return Ok(exit::DONE);
    }
    let bytes = show::bytes;
    out.line(&format!("all runs     {} in {} runs", bytes(logical), runs.len()))?;
    out.line(&format!("different    {} in {} chunks", bytes(stats.plain_bytes), stats.chunks))?;
    out.line(&format!("stored       {} in {} blocks", bytes(stats.stored_bytes), stats.blocks))?;
    let shown: Vec<String> = ratios
        .iter()
        .map(|(word, ratio)| match ratio {
            Some(ratio) => format!("{word} {ratio:.2}"),
            None => format!("{word} -"),
        })
        .collect();
    out.line(&format!("ratios       {}", shown.join(", ")))?;
    out.line(&format!(
        "catalog      {}, {} names, {} versions",
        bytes(stats.catalog_bytes),
        stats.entries,
        stats.versions
    ))?;
    out.line(&report::coverage_line(&coverage).replacen("verified: ", "verified     ", 1))?;
    out.line("")?;
    out.line(&format!(
        "{:>5} {:>6}  {:>9} {:>10} {:>10} {:>10}  {}",
        "runs", "newest", "files", "size", "all runs", "new", "source"
    ))?;
    for (name, it) in &sources {
        let counts = &it.latest.counts;
        out.line(&format!(
            "{:>5} {:>6}  {:>9} {:>10} {:>10} {:>10}  {}",
            it.runs,
            it.latest.id,
            counts.files,
            bytes(counts.bytes),
            bytes(it.bytes),
            bytes(it.new_bytes),
            Quoted(name)
        ))?;
    }
    out.line("")?;
    let head = ["run", "files", "size", "read", "new"];
    let [run, files, size, read, new] = head;
    out.line(&format!("{run:>5}  {files:>9} {size:>10} {read:>10} {new:>10}  source"))?;
    for run in &runs {
        let counts = &run.counts;
        out.line(&format!(
            "{:>5}  {:>9} {:>10} {:>10} {:>10}  {}",
            run.id,
            counts.files,
            bytes(counts.bytes),
            bytes(counts.bytes_read),
            bytes(counts.bytes_stored),
            Quoted(&run.source)
        ))?;
    }
    out.line("")?;
    let head = ["status", "blocks", "stored", "free", "reserve"];
    let [status, blocks, stored, free, reserve] = head;
    out.line(&format!("{status:<8} {blocks:>8} {stored:>10} {free:>10} {reserve:>10}  volume"))?;
    for it in &volumes {
        let known = |n: Option<u64>| n.map_or_else(|| "-".to_owned(), bytes);
        out.line(&format!(
            "{:<8} {:>8} {:>10} {:>10} {:>10}  {}",
            it.status.as_str(),
            it.totals.blocks,
            bytes(it.totals.stored_bytes),
            known(it.space.map(|it| it.free_bytes)),
            known(it.reserve_bytes()),
            quoted(&it.config.path)
        ))?;
    }
    out.finish()?;
    Ok(exit::DONE)
}

/// How many times the first the second is; `None` while nothing is stored.
#[allow(clippy::cast_precision_loss)]
fn ratio(of: u64, to: u64) -> Option<f64> {
    (to > 0).then(|| of as f64 / to as f64)
}

fn source_json((name, it): (&&[u8], &Source<'_>)) -> Value {
    let mut map = Map::new();
    show::put_name(&mut map, "source", name);
    map.insert("runs".into(), it.runs.into());
    map.insert("latest_run".into(), it.latest.id.into());
    map.insert("latest_files".into(), it.latest.counts.files.into());
    map.insert("latest_bytes".into(), it.latest.counts.bytes.into());
    map.insert("logical_bytes".into(), it.bytes.into());
    map.insert("new_bytes".into(), it.new_bytes.into());
    Value::Object(map)
}

fn run_json(run: &Run) -> Value {
    let mut map = Map::new();
    map.insert("run".into(), run.id.into());
    show::put_name(&mut map, "source", &run.source);
    map.insert("files".into(), run.counts.files.into());
    map.insert("bytes".into(), run.counts.bytes.into());
    map.insert("bytes_read".into(), run.counts.bytes_read.into());
    map.insert("new_bytes".into(), run.counts.bytes_stored.into());
    Value::Object(map)
}

fn volume_json(it: &VolumeUse) -> Value {
    let mut map = Map::new();
    map.insert("uuid".into(), it.config.uuid.clone().into());
    show::put_name(&mut map, "path", it.config.path.as_os_str().as_bytes());
    map.insert("status".into(), it.status.as_str().into());
    map.insert("blocks".into(), it.totals.blocks.into());
    map.insert("stored_bytes".into(), it.totals.stored_bytes.into());
    map.insert("free_bytes".into(), json!(it.space.map(|it| it.free_bytes)));
    map.insert("reserve_bytes".into(), json!(it.reserve_bytes()));
    Value::Object(map)
}
