//! `validate --repair`: what was made good, and what is lost.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{bar, show};
use crate::error::{Quoted, Result};
use crate::progress::Progress;
use crate::repair::{self, Repaired};
use crate::sys::quoted;
use crate::validate::Report;

/// Repairs what a validation has found.
pub fn repair(catalog: &Path, report: &Report) -> Result<Repaired> {
    let (suspects, progress) = (report.suspects(), Progress::default());
    bar::with_bar(&progress, || repair::run(catalog, &suspects, &progress))
}

/// As lines.
pub fn print(out: &mut show::Out, done: &Repaired) -> Result<()> {
    for it in &done.healed {
        let mut line =
            format!("healed: block {} on {}, {}", it.block, quoted(&it.volume), it.from.told());
        if it.now != it.block {
            line.push_str(&format!(": {} now", it.now));
        }
        out.line(&line)?;
    }
    for (path, damaged) in &done.indexes {
        let path = quoted(path);
        out.line(&format!("healed: the index of {path}, {damaged} records were damaged"))?;
    }
    for it in &done.unhealed {
        out.line(&format!("not healed: block {}: {}", it.block, it.reason))?;
        if it.is_better {
            out.line("    a part of it was brought back")?;
        }
        for file in &it.files {
            let (source, path) = (Quoted(&file.source), Quoted(&file.path));
            out.line(&format!("    {} of {source}: {path}", show::runs(&file.runs)))?;
        }
    }
    for problem in &done.problems {
        out.line(&format!("! {problem}"))?;
    }
    let (healed, unhealed) = (done.healed_count, done.unhealed_count);
    let (indexes, documents) = (done.indexes.len(), done.documents);
    out.line(&format!(
        "Repair: {healed} copies and {indexes} indexes healed, {documents} documents written, \
         {unhealed} blocks not healed."
    ))
}

/// As JSON.
pub fn to_json(done: &Repaired) -> Value {
    let path = |map: &mut Map<String, Value>, path: &Path| {
        show::put_name(map, "volume", path.as_os_str().as_bytes());
    };
    let healed = done.healed.iter().map(|it| {
        let mut map = Map::new();
        map.insert("block".into(), it.block.to_string().into());
        path(&mut map, &it.volume);
        map.insert("from".into(), it.from.as_str().into());
        map.insert("now".into(), it.now.to_string().into());
        Value::Object(map)
    });
    let unhealed = done.unhealed.iter().map(|it| {
        json!({
            "block": it.block.to_string(),
            "kind": it.kind.as_str(),
            "reason": it.reason,
            "partly": it.is_better,
            "files_count": it.file_count,
            "files": it.files.iter().map(show::damaged_file_json).collect::<Value>(),
        })
    });
    let indexes = done.indexes.iter().map(|it| {
        let mut map = Map::new();
        path(&mut map, &it.0);
        map.insert("records_damaged".into(), it.1.into());
        Value::Object(map)
    });
    json!({
        "healed_count": done.healed_count,
        "healed": healed.collect::<Value>(),
        "unhealed_count": done.unhealed_count,
        "unhealed": unhealed.collect::<Value>(),
        "indexes": indexes.collect::<Value>(),
        "documents": done.documents,
        "problem_list": show::problems_json(&done.problems),
    })
}
