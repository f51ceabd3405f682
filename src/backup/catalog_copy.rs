//! After a run, a copy of the catalog on every volume that takes blocks.
//!
//! The run is finished already, so nothing here can fail it. A new copy is durable before an old or
//! a damaged one goes.

use std::path::Path;

use crate::catalog::{Checking, Reader, RunId, copy};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::sys::quoted;
use crate::volume::{Status, Volume, Volumes};

/// Copies that a volume keeps: the newest may have been written when something was wrong already.
const KEPT: usize = 3;

/// Copies the catalog of after `run` to every active volume that is there; calls `failed` with what
/// could not be done.
pub fn write(
    catalog: &Path,
    volumes: &Volumes,
    run: RunId,
    progress: &Progress,
    failed: &mut dyn FnMut(Error),
) {
    progress.set_phase("copying the catalog");
    let check = || progress.check();
    let copy = match copy::Copy::new(catalog, &check) {
        Ok(copy) => copy,
        Err(e) => return failed(e.context("no copy of the catalog was made")),
    };
    for volume in volumes.present().iter().filter(|it| it.config.status == Status::Active) {
        if let Err(e) = write_to(volume, &copy, run, &check) {
            let path = quoted(&volume.config.path);
            failed(e.context(format!("no copy of the catalog was made on volume {path}")));
        }
    }
}

fn write_to(
    volume: &Volume,
    copy: &copy::Copy,
    run: RunId,
    check: &dyn Fn() -> Result<()>,
) -> Result<()> {
    put(volume, copy, run, check)?;
    // Copies of later runs are of a catalog that has been lost, and may be all there is of it.
    let older = copy::list(&volume.config.path)?.into_iter().filter(|it| *it <= run);
    older.skip(KEPT).try_for_each(|it| volume.remove_document(&copy::document_name(it)))
}

fn put(
    volume: &Volume,
    copy: &copy::Copy,
    run: RunId,
    check: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let mut documents = volume.documents();
    documents.add(&copy::document_name(run), |out| copy.write_to(out, check))?;
    documents.finish()
}

/// Where a volume has damaged copies, makes a good one of after the newest run and removes the
/// damaged ones; gives how many were made. A catalog that is damaged itself replaces nothing. The
/// caller holds the writer's lock. Calls `failed` with what could not be done.
pub fn mend(
    (catalog, reader): (&Path, &Reader),
    volumes: &Volumes,
    progress: &Progress,
    failed: &mut dyn FnMut(&Volume, Error),
) -> Result<u64> {
    let Some(newest) = reader.latest(None)? else { return Ok(0) };
    let check = || progress.check();
    let mut copy = None;
    let mut made = 0;
    for volume in volumes.present() {
        check()?;
        let mut mend_one = || {
            let (mut damaged, mut has_newest) = (Vec::new(), false);
            for number in copy::list(&volume.config.path)? {
                let path = volume.document_path(&copy::document_name(number));
                // One that is whole and of another run may be all that is left of that.
                match copy::verify(&path, None, &volume.config.uuid, &check) {
                    Ok(_) => has_newest |= number == newest.id,
                    Err(e) if e.kind() == ErrorKind::Corrupt => damaged.push(number),
                    Err(e) => return Err(e),
                }
            }
            // So may what there is of a later run.
            damaged.retain(|it| *it <= newest.id);
            if !damaged.is_empty() && !has_newest {
                let copy = match &mut copy {
                    Some(copy) => copy,
                    none => none.insert(sound_copy(catalog, reader, &check)?),
                };
                put(volume, copy, newest.id, &check)?;
                made += 1;
            }
            damaged.retain(|it| *it != newest.id);
            damaged.iter().try_for_each(|it| volume.remove_document(&copy::document_name(*it)))
        };
        match mend_one() {
            Err(e) if e.kind() == ErrorKind::Interrupted => return Err(e),
            Err(e) => failed(volume, e.context("copies of the catalog")),
            Ok(()) => {}
        }
    }
    Ok(made)
}

fn sound_copy(
    catalog: &Path,
    reader: &Reader,
    check: &dyn Fn() -> Result<()>,
) -> Result<copy::Copy> {
    let mut fault = None;
    let mut found = |it| {
        fault.get_or_insert(it);
    };
    reader.check(&mut Checking::new(&mut found, check))?;
    match fault {
        None => copy::Copy::new(catalog, check),
        Some(fault) => {
            let message = format!("the catalog is damaged itself, so no copy is made: {fault}");
            Err(Error::corrupt(message))
        }
    }
}
