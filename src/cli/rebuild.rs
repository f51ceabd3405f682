//! `rebuildmeta`: a catalog from its volumes.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{bar, exit, show};
use crate::error::{Quoted, Result};
use crate::progress::Progress;
use crate::rebuild::{self, Options};

/// Everything comes back: runs, files, history, tags, problems, owners, volumes, settings. The new
/// catalog is at --catalog, where nothing may be yet. Whatever does not fit is named.
#[derive(clap::Args)]
pub struct Rebuildmeta {
    /// Directories of all volumes, in any order
    #[arg(long, required = true, num_args = 1.., value_name = "DIR")]
    volumes: Vec<PathBuf>,
    /// Go on without runs whose manifests are lost, and without those that are changes of them
    #[arg(long)]
    allow_gaps: bool,
    /// Print the result as JSON, after a line for each file that lacks blocks
    #[arg(long)]
    json: bool,
}

pub fn rebuildmeta(catalog: &Path, args: &Rebuildmeta) -> Result<u8> {
    let progress = Progress::default();
    let options = Options { volumes: args.volumes.clone(), allow_gaps: args.allow_gaps };
    let mut out = show::Out::new();
    let summary = bar::with_bar(&progress, || {
        rebuild::run(catalog, &options, &progress, &mut |block, file| {
            if !args.json {
                let runs: Vec<String> = file.runs.iter().map(i64::to_string).collect();
                return out.line(&format!(
                    "lacks block {block}: {} of {}, runs {}",
                    Quoted(&file.path),
                    Quoted(&file.source),
                    runs.join(", ")
                ));
            }
            let mut map = Map::new();
            map.insert("lacks".into(), block.to_string().into());
            show::put_name(&mut map, "source", &file.source);
            show::put_name(&mut map, "path", &file.path);
            map.insert("runs".into(), file.runs.into());
            out.json(&Value::Object(map))
        })
    })?;
    show::print_problems(&summary.problems, summary.problem_count);
    if args.json {
        let counts = [
            ("runs", summary.runs),
            ("runs_lost", summary.runs_lost),
            ("volumes", summary.volumes),
            ("volumes_missing", summary.volumes_missing),
            ("blocks", summary.blocks),
            ("blocks_lacking", summary.blocks_lacking),
            ("files_lacking", summary.files_lacking),
            ("problems", summary.problem_count),
        ];
        let counts = counts.into_iter().map(|(key, count)| (key.to_owned(), count.into()));
        let mut map: Map<String, Value> = counts.collect();
        map.insert("problem_list".into(), show::problems_json(&summary.problems));
        out.json(&Value::Object(map))?;
    } else {
        out.line(&format!(
            "rebuilt {} runs from {} volumes, {} blocks",
            summary.runs, summary.volumes, summary.blocks
        ))?;
        if summary.blocks_lacking > 0 {
            out.line(&format!(
                "  {} blocks are on none of them, which {} files need; named above",
                summary.blocks_lacking, summary.files_lacking
            ))?;
        }
        if summary.runs_lost > 0 {
            out.line(&format!("  {} runs are lost, named above", summary.runs_lost))?;
        }
        if summary.problem_count > 0 {
            out.line(&format!("  {} things did not fit, named above", summary.problem_count))?;
        }
    }
    out.finish()?;
    // The catalog is there, whatever is wrong with the volumes.
    Ok(if summary.problem_count > 0 { exit::PROBLEMS } else { exit::DONE })
}
