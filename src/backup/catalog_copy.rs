//! After a run, a copy of the catalog on every volume that takes blocks.
//!
//! The run is finished already, so nothing here can fail it. A new copy is durable before an old
//! one goes.

use std::path::Path;

use crate::catalog::{RunId, copy};
use crate::error::{Error, Result};
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
    volume.make_folder(copy::DIR)?;
    let mut documents = volume.documents();
    documents.add(&copy::document_name(run), |out| copy.write_to(out, check))?;
    documents.finish()?;
    // Copies of later runs are of a catalog that has been lost, and may be all there is of it.
    let older = copy::list(&volume.config.path)?.into_iter().filter(|it| *it <= run);
    older.skip(KEPT).try_for_each(|it| volume.remove_document(&copy::document_name(it)))
}
