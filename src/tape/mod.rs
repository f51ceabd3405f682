//! Tape: labels, archives, the spool of jobs and batches, and the drives that they are written to.
//!
//! A tape is a label, then one cpio archive a batch, each closed by a filemark. The spool says what
//! is to be written and what has been. Every format is in [`format`]; whatever comes from a tape
//! or from the spool is read within limits, and is an error when it is not as it should be.

pub mod changer;
pub mod check;
pub mod cpio;
pub mod drive;
pub mod extract;
pub mod image;
pub mod label;
mod listed;
pub mod load;
pub mod loaded;
pub mod medium;
mod outcomes;
pub mod read;
pub mod readback;
pub mod recorded;
pub mod runs;
pub mod seek;
pub mod spill;
pub mod spool;
pub mod st;
pub mod stream;
pub mod sums;
pub mod tap;
pub mod verify;
pub mod write;

use std::path::Path;

use crate::error::{Error, Result};
use crate::sys::{self, c, quoted};
use drive::{Access, Drive};

#[doc = include_str!("FORMAT.md")]
pub mod format {}

/// Opens the drive at a path: a device of the kernel, a tape image, or a directory whose link
/// `loaded` names one.
pub fn open(path: &Path, access: Access) -> Result<Box<dyn Drive>> {
    let failed = |e| Error::io(format!("looking at the drive {}", quoted(path)), e);
    match sys::stat(path).map_err(failed)?.mode & c::S_IFMT {
        c::S_IFCHR => Ok(Box::new(st::St::open(path, access)?)),
        _ => Ok(Box::new(image::Image::open(path, access)?)),
    }
}
