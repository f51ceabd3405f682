//! What is known of tapes: `tape list`, `tape find`.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::{Map, Value};

use super::{Find, List, known_now};
use crate::catalog::tapes::KnownTape;
use crate::catalog::{Extent, Reader};
use crate::cli::commands::CACHE_BYTES;
use crate::cli::{exit, show};
use crate::entry::Kind;
use crate::error::{Error, Quoted, Result};
use crate::snapshot::{Snapshots, resolve_wish};
use crate::sys::Time;

/// A tape, and how far it was read and found right.
struct Line {
    known: KnownTape,
    /// Tape files that were.
    verified: u64,
    /// When that was, of the one where it was longest ago, if all of them were.
    since: Option<Time>,
}

pub fn list(catalog: &Path, args: &List) -> Result<u8> {
    // A catalog that is none is not one without tapes.
    Reader::open(catalog)?;
    let mut lines = Vec::new();
    if let Some(tapes) = known_now(catalog)? {
        for known in tapes.tapes()? {
            let files = tapes.files(&known.tape.label)?;
            let times: Vec<Time> = files.iter().filter_map(|it| it.verified).collect();
            let verified = times.len() as u64;
            let since = times.into_iter().min().filter(|_| verified == files.len() as u64);
            lines.push(Line { known, verified, since });
        }
    }
    let mut out = show::Out::new();
    if args.json {
        out.json(&lines.iter().map(tape_json).collect())?;
        out.finish()?;
        return Ok(exit::DONE);
    }
    out.line(&format!(
        "{:<16} {:<8} {:>6} {:>10} {:>8}  {}",
        "tape", "pool", "files", "size", "blocks", "verified"
    ))?;
    for line in &lines {
        let KnownTape { tape, is_lost, files, bytes, blocks, bad } = &line.known;
        let verified = match (line.verified, line.since) {
            (_, Some(since)) => show::time(since),
            (0, None) => "never".to_owned(),
            (some, None) => format!("{some} of {files} files"),
        };
        let bad = if *bad > 0 { format!(", {bad} members are bad") } else { String::new() };
        out.line(&format!(
            "{:<16} {:<8} {files:>6} {:>10} {blocks:>8}  {verified}{bad}{}",
            Quoted(&tape.label).to_string(),
            Quoted(tape.pool.as_bytes()).to_string(),
            show::bytes(*bytes),
            if *is_lost { ", lost" } else { "" }
        ))?;
    }
    out.finish()?;
    Ok(exit::DONE)
}

fn tape_json(line: &Line) -> Value {
    let KnownTape { tape, is_lost, files, bytes, blocks, bad } = &line.known;
    let mut map = Map::new();
    show::put_name(&mut map, "tape", &tape.label);
    map.insert("pool".into(), tape.pool.clone().into());
    map.insert("block_bytes".into(), tape.block_bytes.into());
    let counts = [
        ("files", *files),
        ("bytes", *bytes),
        ("blocks", *blocks),
        ("bad", *bad),
        ("files_verified", line.verified),
    ];
    show::put_counts(&mut map, &counts);
    map.insert("verified".into(), line.since.map_or(Value::Null, show::time_json));
    map.insert("lost".into(), (*is_lost).into());
    Value::Object(map)
}

pub fn find(catalog: &Path, args: &Find) -> Result<u8> {
    let snapshots = Snapshots::open(catalog, CACHE_BYTES)?;
    let found = resolve_wish(&snapshots, args.file.as_os_str().as_bytes(), args.run.as_ref())?;
    if found.entry.meta.kind != Kind::File {
        let path = Quoted(&found.path);
        return Err(Error::usage(format!("{path} is no file: only files have content on tapes")));
    }
    let file = snapshots.file(found.entry.version)?;
    let mut blocks: BTreeMap<u64, u64> = BTreeMap::new();
    for extent in &file.content.extents {
        if let Extent::Data { block, len, .. } = extent {
            *blocks.entry(*block).or_default() += len;
        }
    }
    let tapes = known_now(catalog)?;
    let (mut on_tape, mut lacking) = (0, 0);
    let mut places: BTreeMap<(Vec<u8>, u64), u64> = BTreeMap::new();
    for (number, bytes) in blocks {
        let id = snapshots.with_reader(|reader| reader.block(number))?.id;
        let known = tapes.as_ref().map(|it| it.places(&id)).transpose()?.unwrap_or_default();
        match known.is_empty() {
            true => lacking += bytes,
            false => on_tape += bytes,
        }
        // Twice in one tape file is once.
        let known: BTreeSet<_> = known.into_iter().map(|it| (it.label, it.filenum)).collect();
        for place in known {
            *places.entry(place).or_default() += bytes;
        }
    }
    let mut out = show::Out::new();
    if args.json {
        let place = |((label, filenum), bytes): (&(Vec<u8>, u64), &u64)| {
            let mut map = Map::new();
            show::put_name(&mut map, "tape", label);
            show::put_counts(&mut map, &[("filenum", *filenum), ("bytes", *bytes)]);
            Value::Object(map)
        };
        let mut map = Map::new();
        map.insert("run".into(), found.run.id.into());
        show::put_name(&mut map, "path", &found.path);
        show::put_counts(&mut map, &[("bytes_on_tape", on_tape), ("bytes_lacking", lacking)]);
        map.insert("places".into(), places.iter().map(place).collect());
        out.json(&Value::Object(map))?;
    } else {
        for ((label, filenum), bytes) in &places {
            out.line(&format!("{} {filenum} {bytes}", Quoted(label)))?;
        }
    }
    out.finish()?;
    if lacking > 0 && !args.json {
        let all = on_tape + lacking;
        show::note(format_args!("{lacking} of its {all} bytes are on no tape"));
    }
    Ok(match (on_tape, lacking) {
        (_, 0) => exit::DONE,
        (0, _) => exit::FAILED,
        _ => exit::PROBLEMS,
    })
}
