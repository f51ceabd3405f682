//! `rebuild-catalog`: what was found of volumes and blocks, and what the catalog had of it.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{bar, exit, show};
use crate::error::Result;
use crate::progress::Progress;
use crate::rebuild::doubted::{self, OfVolume, Options, Summary};
use crate::sys::quoted;

/// Volumes, blocks and chunks are registered anew from the indexes of the volumes. Runs and files
/// stay as they are, and nothing is removed because a block has vanished: it is named, with all
/// files that need it.
#[derive(clap::Args)]
pub struct RebuildCatalog {
    /// Volumes that are elsewhere than the catalog says, or that it has lost
    #[arg(long, num_args = 1.., value_name = "DIR")]
    volumes: Vec<PathBuf>,
    /// Read every block, and believe nothing that its bytes do not prove
    #[arg(long)]
    scan: bool,
    /// Change nothing: only say what would be changed
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON, after a line for each file that lacks blocks
    #[arg(long)]
    json: bool,
}

pub fn rebuild_catalog(catalog: &Path, args: &RebuildCatalog) -> Result<u8> {
    let progress = Progress::default();
    let options =
        Options { volumes: args.volumes.clone(), scan: args.scan, is_trial: args.dry_run };
    let mut out = show::Out::new();
    let summary = bar::with_bar(&progress, || {
        doubted::run(catalog, &options, &progress, &mut |block, file| {
            show::say_lacking(&mut out, block, &file, args.json)
        })
    })?;
    show::print_problems(&summary.problems, summary.problem_count);
    match args.json {
        true => out.json(&to_json(&summary, args.dry_run))?,
        false => print(&mut out, &summary, args.dry_run)?,
    }
    out.finish()?;
    Ok(exit_code(&summary))
}

/// Loss outranks absence outranks what was put right.
fn exit_code(summary: &Summary) -> u8 {
    let is_bad = |it: &OfVolume| it.copies.missing > 0 || it.scanned.1 > 0;
    match summary.volumes.iter().any(is_bad) {
        true => exit::DAMAGED,
        false if summary.volumes_missing > 0 => exit::OFFLINE,
        false if summary.problem_count > 0 => exit::PROBLEMS,
        false => exit::DONE,
    }
}

fn print(out: &mut show::Out, summary: &Summary, is_trial: bool) -> Result<()> {
    for it in &summary.volumes {
        out.line(&format!("volume {} at {}", it.uuid, quoted(&it.path)))?;
        if let Some(was) = &it.was {
            out.line(&format!("  it was at {}", quoted(was)))?;
        }
        if it.is_new {
            out.line("  the catalog did not have it")?;
        }
        if it.is_mended {
            out.line("  its index had lost records, and has them again")?;
        }
        let copies = &it.copies;
        out.line(&format!(
            "  copies of blocks: {} added, {} missing, {} surplus",
            copies.added, copies.missing, copies.surplus
        ))?;
        if it.scanned.0 > 0 {
            let (scanned, damaged) = it.scanned;
            out.line(&format!("  {scanned} blocks were read, {damaged} are damaged"))?;
        }
    }
    let changed = &summary.changed;
    out.line(&format!(
        "{}: blocks {} added, {} changed; chunks {} added, {} changed, {} removed; {} records \
         moved",
        if is_trial { "would change" } else { "changed" },
        changed.blocks_added,
        changed.blocks_changed,
        changed.chunks_added,
        changed.chunks_changed,
        changed.chunks_removed,
        changed.copies_moved
    ))?;
    if summary.volumes_missing > 0 {
        out.line(&format!("  {} volumes are not there", summary.volumes_missing))?;
    }
    if summary.blocks_lost > 0 {
        out.line(&format!(
            "  {} blocks are on no volume, which {} files need; named above",
            summary.blocks_lost, summary.files_lost
        ))?;
    }
    Ok(())
}

fn to_json(summary: &Summary, is_trial: bool) -> Value {
    let changed = &summary.changed;
    let counts = [
        ("volumes_missing", summary.volumes_missing),
        ("blocks_added", changed.blocks_added),
        ("blocks_changed", changed.blocks_changed),
        ("chunks_added", changed.chunks_added),
        ("chunks_changed", changed.chunks_changed),
        ("chunks_removed", changed.chunks_removed),
        ("records_moved", changed.copies_moved),
        ("blocks_lost", summary.blocks_lost),
        ("files_lost", summary.files_lost),
        ("problems", summary.problem_count),
    ];
    let mut map = Map::new();
    show::put_counts(&mut map, &counts);
    map.insert("dry_run".into(), is_trial.into());
    map.insert("volumes".into(), summary.volumes.iter().map(volume_json).collect());
    map.insert("problem_list".into(), show::problems_json(&summary.problems));
    Value::Object(map)
}

fn volume_json(it: &OfVolume) -> Value {
    let mut map = Map::new();
    map.insert("uuid".into(), it.uuid.clone().into());
    show::put_name(&mut map, "path", it.path.as_os_str().as_bytes());
    if let Some(was) = &it.was {
        show::put_name(&mut map, "was", was.as_os_str().as_bytes());
    }
    for (key, is) in [("new", it.is_new), ("index_mended", it.is_mended)] {
        map.insert(key.into(), is.into());
    }
    let counts = [
        ("added", it.copies.added),
        ("missing", it.copies.missing),
        ("surplus", it.copies.surplus),
        ("scanned", it.scanned.0),
        ("damaged", it.scanned.1),
    ];
    show::put_counts(&mut map, &counts);
    Value::Object(map)
}
