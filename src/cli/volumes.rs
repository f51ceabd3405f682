//! Volumes and copies: what there is, what is to be, and what is moved.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{args, bar, exit, show};
use crate::catalog::{Reader, Totals, Writer};
use crate::copies;
use crate::error::{ErrorKind, Result};
use crate::progress::Progress;
use crate::sys::{Space, quoted};
use crate::volume::{Status, Volume, VolumeConfig};

/// A volume, and what is on it.
pub(super) struct VolumeUse {
    pub config: VolumeConfig,
    /// What it is now, whatever the catalog says.
    pub status: Status,
    pub totals: Totals,
    /// Of its file system, if it is there.
    pub space: Option<Space>,
}

impl VolumeUse {
    /// All volumes of a catalog.
    pub fn of_all(reader: &Reader) -> Result<Vec<VolumeUse>> {
        let mut all = Vec::new();
        for config in reader.volumes()? {
            let totals = reader.stored_bytes_of(config.number)?;
            let opened = Volume::open(config.clone());
            let status = if opened.is_ok() { config.status } else { Status::Missing };
            let space = opened.and_then(|it| it.store.space()).ok();
            all.push(VolumeUse { config, status, totals, space });
        }
        Ok(all)
    }

    /// Bytes of its file system that stay free.
    pub fn reserve_bytes(&self) -> Option<u64> {
        let percent = u64::from(self.config.reserve_percent);
        self.space.map(|it| it.total_bytes / 100 * percent)
    }
}

pub fn set_copies(catalog: &Path, args: &args::SetCopies) -> Result<u8> {
    Writer::open(catalog)?.set_copies(args.copies)?;
    let (lacking, bytes) = Reader::open(catalog)?.lacking(args.copies)?;
    let copies = args.copies;
    show::say(format_args!("each block is to be on {copies} volumes from now on"));
    if lacking > 0 {
        let bytes = show::bytes(bytes);
        show::say(format_args!(
            "{lacking} blocks lack copies, {bytes} in all: raidtape replicate makes them"
        ));
    }
    Ok(exit::DONE)
}

pub fn replicate(catalog: &Path, args: &args::Replicate) -> Result<u8> {
    let progress = Progress::default();
    let done = bar::with_bar(&progress, || copies::replicate(catalog, &progress))?;
    show::print_problems(&done.problems.list, done.problems.count);
    match args.json {
        true => show::say(format_args!(
            "{}",
            json!({
                "wanted": done.wanted,
                "copies": done.copies,
                "bytes": done.bytes,
                "blocks_lacking": done.blocks_lacking,
                "bytes_lacking": done.bytes_lacking,
                "together": show::together_json(&done.together),
                "problems": done.problems.count,
                "problem_list": show::problems_json(&done.problems.list),
            })
        )),
        false => {
            show::say(format_args!("{}", done.line()));
            if done.wanted > 1 {
                show::say_together(&done.together);
            }
        }
    }
    Ok(exit::of_replicated(&done))
}

fn readopt(catalog: &Path, path: &Path, json: bool) -> Result<u8> {
    let progress = Progress::default();
    let done = bar::with_bar(&progress, || copies::readopt(catalog, path, &progress))?;
    if json {
        let mut map = Map::new();
        map.insert("uuid".into(), done.uuid.into());
        show::put_name(&mut map, "was", done.was.as_os_str().as_bytes());
        show::put_name(&mut map, "path", done.path.as_os_str().as_bytes());
        map.insert("status".into(), done.status.as_str().into());
        map.insert("found".into(), done.found.into());
        map.insert("lost".into(), done.lost.into());
        show::say(format_args!("{}", Value::Object(map)));
        return Ok(exit::DONE);
    }
    let (uuid, status) = (&done.uuid, done.status.as_str());
    show::say(format_args!("volume {uuid} is at {} now, {status}", quoted(&done.path)));
    if done.found > 0 {
        show::say(format_args!("  {} blocks on it were not in the catalog", done.found));
    }
    Ok(exit::DONE)
}

fn retire(catalog: &Path, word: &Path, json: bool) -> Result<u8> {
    let progress = Progress::default();
    let done = bar::with_bar(&progress, || copies::retire(catalog, word, &progress))?;
    show::print_problems(&done.problems.list, done.problems.count);
    if json {
        let mut map = Map::new();
        map.insert("uuid".into(), done.uuid.into());
        show::put_name(&mut map, "path", done.path.as_os_str().as_bytes());
        map.insert("blocks".into(), done.blocks.into());
        map.insert("copies".into(), done.copies.into());
        map.insert("bytes".into(), done.bytes.into());
        map.insert("problem_list".into(), show::problems_json(&done.problems.list));
        show::say(format_args!("{}", Value::Object(map)));
    } else {
        let (path, bytes) = (quoted(&done.path), show::bytes(done.bytes));
        show::say(format_args!(
            "retired volume {} at {path}: of its {} blocks {} were copied to others, {bytes}",
            done.uuid, done.blocks, done.copies
        ));
        show::say(format_args!("  nothing on it was deleted"));
    }
    Ok(exit::of_problems(&done.problems.list, done.problems.count))
}

/// Notes in the catalog which volumes are there, if that has changed and can be written.
fn note_presence(catalog: &Path) -> Result<()> {
    let has_changed = |config: &VolumeConfig| {
        let opened = Volume::open(config.clone());
        let is_away = opened.is_err_and(|e| e.kind() == ErrorKind::Offline);
        is_away != (config.status == Status::Missing)
    };
    if !Reader::open(catalog)?.volumes()?.iter().any(has_changed) {
        return Ok(());
    }
    match Writer::open(catalog).and_then(|mut it| it.open_volumes()) {
        Ok(_) => Ok(()),
        // Whoever writes it notes it too; who may only read is told all the same.
        Err(e) if matches!(e.kind(), ErrorKind::Locked | ErrorKind::Denied | ErrorKind::Io) => {
            log::info!("not noted: {e}");
            Ok(())
        }
        Err(e) => Err(e),
    }
}

pub fn volumes(catalog: &Path, args: &args::Volumes) -> Result<u8> {
    if let Some(path) = &args.readopt {
        return readopt(catalog, path, args.json);
    }
    if let Some(word) = &args.retire {
        return retire(catalog, word, args.json);
    }
    note_presence(catalog)?;
    let reader = Reader::open(catalog)?;
    let mut out = show::Out::new();
    let (mut list, mut is_away) = (Vec::new(), false);
    if !args.json {
        out.line(&format!(
            "{:<8} {:>8} {:>10} {:>10} {:>8}  {}",
            "status", "blocks", "stored", "free", "reserve", "path"
        ))?;
    }
    for VolumeUse { config, status, totals, space } in VolumeUse::of_all(&reader)? {
        if args.json {
            let mut map = Map::new();
            map.insert("volume".into(), config.number.into());
            map.insert("uuid".into(), config.uuid.clone().into());
            show::put_name(&mut map, "path", config.path.as_os_str().as_bytes());
            map.insert("status".into(), status.as_str().into());
            map.insert("reserve_percent".into(), config.reserve_percent.into());
            map.insert("blocks".into(), totals.blocks.into());
            map.insert("stored_bytes".into(), totals.stored_bytes.into());
            map.insert("free_bytes".into(), json!(space.map(|it| it.free_bytes)));
            map.insert("total_bytes".into(), json!(space.map(|it| it.total_bytes)));
            list.push(Value::Object(map));
            continue;
        }
        out.line(&format!(
            "{:<8} {:>8} {:>10} {:>10} {:>7}%  {}",
            status.as_str(),
            totals.blocks,
            show::bytes(totals.stored_bytes),
            space.map_or_else(|| "-".to_owned(), |it| show::bytes(it.free_bytes)),
            config.reserve_percent,
            quoted(&config.path)
        ))?;
        is_away |= status == Status::Missing;
    }
    if is_away {
        out.line(
            "a volume that is missing: mount it, say where it is now with volumes --readopt PATH, \
             or give it up with volumes --retire",
        )?;
    }
    if args.json {
        out.json(&Value::Array(list))?;
    }
    out.finish()?;
    Ok(exit::DONE)
}
