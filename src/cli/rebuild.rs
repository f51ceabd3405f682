//! `rebuildmeta` and `catalog-restore`: a catalog from its volumes.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{bar, exit, show};
use crate::error::Result;
use crate::progress::Progress;
use crate::rebuild::{self, Options, Summary, from_copy};
use crate::sys::quoted;
use crate::tape::runs::gather;

/// Everything comes back: runs, files, history, tags, problems, owners, volumes, settings. The new
/// catalog is at --catalog, where nothing may be yet. Whatever does not fit is named.
#[derive(clap::Args)]
pub struct Rebuildmeta {
    /// Directories of all volumes, in any order
    #[arg(long, required_unless_present = "tapes", num_args = 1.., value_name = "DIR")]
    volumes: Vec<PathBuf>,
    /// No volumes but tapes, in any order: images, directories of images, or drives, where further
    /// ones are asked for; without any, those of a drive of the spool and its changer
    #[arg(long, num_args = 0.., value_name = "PATH", conflicts_with = "volumes", requires = "into")]
    tapes: Option<Vec<PathBuf>>,
    /// With --tapes: the drive of the spool [default: its default one]
    #[arg(long, value_name = "DRIVE", requires = "tapes")]
    drive: Option<OsString>,
    /// With --tapes: a new directory, which becomes the volume that tape recall brings blocks to
    #[arg(long, value_name = "DIR", requires = "tapes")]
    into: Option<PathBuf>,
    /// Go on without runs whose manifests are lost, and without those that are changes of them
    #[arg(long)]
    allow_gaps: bool,
    /// Print the result as JSON, after a line for each file that lacks blocks
    #[arg(long)]
    json: bool,
}

/// The newest good copy on any of the volumes is taken, and the runs that came after it are
/// replayed from their manifests. A catalog that is at --catalog is kept under another name, and
/// what does not fit is named. End mounts of the catalog before.
#[derive(clap::Args)]
pub struct CatalogRestore {
    /// Directories of all volumes, in any order [default: those that the old catalog still names]
    #[arg(long, num_args = 1.., value_name = "DIR")]
    volumes: Vec<PathBuf>,
    /// Go on without runs whose manifests are lost, and without those that are changes of them
    #[arg(long)]
    allow_gaps: bool,
    /// Print the result as JSON, after a line for each file that lacks blocks
    #[arg(long)]
    json: bool,
}

pub fn rebuildmeta(catalog: &Path, args: &Rebuildmeta) -> Result<u8> {
    if let Some(into) = &args.into {
        return from_tapes(catalog, into, args);
    }
    let progress = Progress::default();
    let options = Options { volumes: args.volumes.clone(), allow_gaps: args.allow_gaps };
    let mut out = show::Out::new();
    let summary = bar::with_bar(&progress, || {
        rebuild::run(catalog, &options, &progress, &mut |block, file| {
            show::say_lacking(&mut out, block, &file, args.json)
        })
    })?;
    show::print_problems(&summary.problems, summary.problem_count);
    if args.json {
        out.json(&Value::Object(summary_json(&summary)))?;
    } else {
        out.line(&format!(
            "rebuilt {} runs from {} volumes, {} blocks",
            summary.runs, summary.volumes, summary.blocks
        ))?;
        say_missing(&mut out, &summary)?;
    }
    out.finish()?;
    Ok(exit_code(&summary))
}

fn from_tapes(catalog: &Path, into: &Path, args: &Rebuildmeta) -> Result<u8> {
    let progress = Progress::default();
    let mut out = show::Out::new();
    let paths = args.tapes.as_deref().unwrap_or_default();
    let (found, made) = super::tape::with_all_tapes(paths, args.drive.as_deref(), |next| {
        bar::with_bar(&progress, || {
            let from = gather::From { into, next, allow_gaps: args.allow_gaps };
            Ok(gather::rebuild(catalog, from, &progress, &mut |block, file| {
                show::say_lacking(&mut out, block, &file, args.json)
            }))
        })
    })?;
    // They may be why no catalog could be made.
    show::print_problems(&found.problems, found.problem_count);
    let summary = made?;
    show::print_problems(&summary.problems, summary.problem_count);
    if args.json {
        let mut map = summary_json(&summary);
        let counts = [
            ("tapes", found.tapes),
            ("tape_files", found.files),
            ("blocks_on_tape", found.blocks),
            ("bytes_on_tape", found.bytes),
            ("tape_problems", found.problem_count),
        ];
        show::put_counts(&mut map, &counts);
        map.insert("copy_after".into(), found.copy.into());
        map.insert("tape_problem_list".into(), show::problems_json(&found.problems));
        out.json(&Value::Object(map))?;
    } else {
        out.line(&format!(
            "read {} tapes: {} tape files, {} blocks of {}",
            found.tapes,
            found.files,
            found.blocks,
            show::bytes(found.bytes)
        ))?;
        if let Some(run) = found.copy {
            out.line(&format!(
                "manifests are lost: began with the copy of the catalog of after run {run}; \
                 raidtape genmeta makes them anew"
            ))?;
        }
        out.line(&format!("rebuilt {} runs, {} blocks", summary.runs, summary.blocks))?;
        say_missing(&mut out, &summary)?;
        out.line(&format!(
            "  everything can be seen now; raidtape tape recall brings blocks to {}",
            quoted(into)
        ))?;
    }
    out.finish()?;
    Ok(if found.problem_count > 0 { exit::PROBLEMS } else { exit_code(&summary) })
}

pub fn catalog_restore(catalog: &Path, args: &CatalogRestore) -> Result<u8> {
    let progress = Progress::default();
    let options = from_copy::Options {
        volumes: args.volumes.clone(),
        allow_gaps: args.allow_gaps,
        known: Vec::new(),
    };
    let mut out = show::Out::new();
    let done = bar::with_bar(&progress, || {
        from_copy::run(catalog, &options, &progress, &mut |block, file| {
            show::say_lacking(&mut out, block, &file, args.json)
        })
    })?;
    let summary = &done.summary;
    show::print_problems(&summary.problems, summary.problem_count);
    if args.json {
        let mut map = summary_json(summary);
        show::put_name(&mut map, "copy", done.copy.as_os_str().as_bytes());
        map.insert("after".into(), done.after.into());
        map.insert("replayed".into(), done.replayed.clone().into());
        if let Some(kept) = &done.kept {
            show::put_name(&mut map, "kept", kept.as_os_str().as_bytes());
        }
        out.json(&Value::Object(map))?;
    } else {
        let copy = quoted(&done.copy);
        out.line(&format!("restored the copy of after run {}: {copy}", done.after))?;
        match done.replayed.len() {
            0 => out.line("  no run came after it")?,
            _ => out.line(&format!("  replayed {}", show::runs(&done.replayed)))?,
        }
        out.line(&format!(
            "  {} runs, {} volumes, {} blocks",
            summary.runs, summary.volumes, summary.blocks
        ))?;
        say_missing(&mut out, summary)?;
        if let Some(kept) = &done.kept {
            out.line(&format!("  the catalog that was there is {} now", quoted(kept)))?;
        }
    }
    out.finish()?;
    Ok(exit_code(summary))
}

/// The catalog is there, whatever is wrong with the volumes.
fn exit_code(summary: &Summary) -> u8 {
    if summary.problem_count > 0 { exit::PROBLEMS } else { exit::DONE }
}

fn summary_json(summary: &Summary) -> Map<String, Value> {
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
    let mut map = Map::new();
    show::put_counts(&mut map, &counts);
    let gone = summary.volumes_gone.iter().map(|it| it.uuid.clone());
    map.insert("volumes_gone".into(), gone.collect::<Value>());
    map.insert("problem_list".into(), show::problems_json(&summary.problems));
    map
}

fn say_missing(out: &mut show::Out, summary: &Summary) -> Result<()> {
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
    for volume in &summary.volumes_gone {
        out.line(&format!(
            "  volume {} ({}) is not here; its blocks are on tape: retire it with raidtape \
             volumes --retire {}",
            volume.number,
            quoted(&volume.path),
            volume.uuid
        ))?;
    }
    Ok(())
}
