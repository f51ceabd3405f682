//! `coverage`: how many copies there are, and which volumes may fail.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{args, exit, show, tape};
use crate::catalog::{Amount, Health, Loss, Reader};
use crate::error::{Quoted, Result};
use crate::sys::quoted;
use crate::volume::{Status, Volumes};

/// What a loss is of: volumes by number, and their paths.
struct Case {
    lost: Vec<i64>,
    paths: Vec<std::path::PathBuf>,
    loss: Loss,
}

pub fn coverage(catalog: &Path, args: &args::Coverage) -> Result<u8> {
    let reader = Reader::open(catalog)?;
    let run = args.run.map(|it| it.find(&reader)).transpose()?;
    let blocks = run.as_ref().map(|it| reader.blocks_of_run(it)).transpose()?;
    let of = run.as_ref().zip(blocks.as_ref());
    let wanted = reader.settings()?.copies;
    let configs = reader.volumes()?;
    let volumes = Volumes::open(configs.clone());
    let here: Vec<i64> = volumes.present().iter().map(|it| it.config.number).collect();
    let tapes = tape::known_now(catalog)?;
    let health = Health::open(catalog);
    // A disk that does not say so has none of them.
    let bad = reader.bad_copies(&here, &mut |number, id, len| {
        let volume = volumes.get(number).filter(|it| {
            it.store.len_of(id).is_ok_and(|it| it == Some(len))
                && !health.is_bad(&it.config.uuid, id)
        });
        Ok(volume.is_none())
    })?;
    let coverage = reader.coverage(blocks.as_ref(), (&here, &bad, wanted), tapes.as_ref())?;
    let mut cases = Vec::new();
    for config in &configs {
        let lost = vec![config.number];
        let loss = reader.loss(&lost, (&here, &bad), of, tapes.as_ref())?;
        cases.push(Case { lost, paths: vec![config.path.clone()], loss });
    }
    let together = volumes.on_one_device();
    for paths in &together {
        let of_disk = configs.iter().filter(|it| paths.contains(&it.path)).map(|it| it.number);
        let lost: Vec<i64> = of_disk.collect();
        let loss = reader.loss(&lost, (&here, &bad), of, tapes.as_ref())?;
        cases.push(Case { lost, paths: paths.clone(), loss });
    }
    let mut out = show::Out::new();
    if args.json {
        let by_copies = coverage.by_copies.iter().map(
            |(copies, it)| json!({ "copies": copies, "blocks": it.blocks, "bytes": it.bytes }),
        );
        let by_tapes = coverage
            .by_tapes
            .iter()
            .map(|(tapes, it)| json!({ "tapes": tapes, "blocks": it.blocks, "bytes": it.bytes }));
        let by_volume = configs.iter().map(|config| {
            let it = coverage.by_volume.get(&config.number).copied().unwrap_or_default();
            let mut map = Map::new();
            map.insert("uuid".into(), config.uuid.clone().into());
            show::put_name(&mut map, "path", config.path.as_os_str().as_bytes());
            map.insert("is_there".into(), here.contains(&config.number).into());
            map.insert("blocks".into(), it.blocks.into());
            map.insert("bytes".into(), it.bytes.into());
            Value::Object(map)
        });
        out.json(&json!({
            "run": run.as_ref().map(|it| it.id),
            "wanted": wanted,
            "by_copies": by_copies.collect::<Value>(),
            "by_tapes": by_tapes.collect::<Value>(),
            "blocks_lacking": coverage.lacking.blocks,
            "bytes_lacking": coverage.lacking.bytes,
            "volumes": by_volume.collect::<Value>(),
            "losses": cases.iter().map(case_json).collect::<Value>(),
        }))?;
        out.finish()?;
        return Ok(exit::DONE);
    }
    let of = run
        .as_ref()
        .map_or("everything".to_owned(), |it| format!("run {} of {}", it.id, Quoted(&it.source)));
    out.line(&format!("coverage of {of}: {wanted} copies wanted"))?;
    out.line(&format!("{:>8} {:>8} {:>10}", "copies", "blocks", "stored"))?;
    for (copies, it) in &coverage.by_copies {
        out.line(&format!("{copies:>8} {:>8} {:>10}", it.blocks, show::bytes(it.bytes)))?;
    }
    if coverage.lacking.blocks > 0 {
        let (blocks, size) = (coverage.lacking.blocks, show::bytes(coverage.lacking.bytes));
        let what = "raidtape replicate makes them";
        out.line(&format!("{blocks} blocks lack copies, {size} in all: {what}"))?;
    }
    if tapes.is_some() {
        out.line("")?;
        out.line(&format!("{:>8} {:>8} {:>10}", "tapes", "blocks", "stored"))?;
        for (tapes, it) in &coverage.by_tapes {
            out.line(&format!("{tapes:>8} {:>8} {:>10}", it.blocks, show::bytes(it.bytes)))?;
        }
    }
    out.line("")?;
    out.line(&format!("{:<8} {:>8} {:>10}  {}", "status", "blocks", "stored", "volume"))?;
    for config in &configs {
        let it = coverage.by_volume.get(&config.number).copied().unwrap_or_default();
        let is_here = here.contains(&config.number);
        let status = if is_here { config.status } else { Status::Missing };
        out.line(&format!(
            "{:<8} {:>8} {:>10}  {}",
            status.as_str(),
            it.blocks,
            show::bytes(it.bytes),
            quoted(&config.path)
        ))?;
    }
    out.line("")?;
    for case in &cases {
        case_lines(&mut out, case)?;
    }
    out.finish()?;
    Ok(exit::DONE)
}

fn case_lines(out: &mut show::Out, case: &Case) -> Result<()> {
    let paths: Vec<String> = case.paths.iter().map(|it| quoted(it).to_string()).collect();
    let what = match case.lost.len() {
        1 => format!("volume {}", paths.join(", ")),
        _ => format!("the disk of volumes {}", paths.join(", ")),
    };
    let loss = &case.loss;
    if loss.is_none() {
        let from_tape = match loss.on_tape {
            Amount { blocks: 0, .. } => String::new(),
            Amount { blocks, bytes } => {
                format!(", with {blocks} blocks of {} from tape", show::bytes(bytes))
            }
        };
        return out.line(&format!("survives the loss of {what}: yes{from_tape}"));
    }
    let (files, runs) = (loss.files, loss.runs);
    let (blocks, size) = (loss.amount.blocks, show::bytes(loss.amount.bytes));
    out.line(&format!(
        "survives the loss of {what}: no ({files} files of {runs} runs, {blocks} blocks of {size})"
    ))?;
    for file in &loss.first {
        let (source, path) = (Quoted(&file.source), Quoted(&file.path));
        out.line(&format!("    {} of {source}: {path}", show::runs(&file.runs)))?;
    }
    match files - loss.first.len() as u64 {
        0 => Ok(()),
        more => out.line(&format!("    and {more} more")),
    }
}

fn case_json(case: &Case) -> Value {
    let path = |it: &std::path::PathBuf| {
        let mut map = Map::new();
        show::put_name(&mut map, "path", it.as_os_str().as_bytes());
        Value::Object(map)
    };
    json!({
        "volumes": case.paths.iter().map(path).collect::<Value>(),
        "survives": case.loss.is_none(),
        "blocks_from_tape": case.loss.on_tape.blocks,
        "bytes_from_tape": case.loss.on_tape.bytes,
        "blocks": case.loss.amount.blocks,
        "bytes": case.loss.amount.bytes,
        "files": case.loss.files,
        "runs": case.loss.runs,
        "first": case.loss.first.iter().map(show::damaged_file_json).collect::<Value>(),
    })
}
