//! What has become of the files of a batch that is read: kept on disk until it is known of all.
//!
//! That a content is not what was written is known when the sums come, behind all files; so no
//! verdict is given before.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use super::spill::{Spill, Spilled};
use super::spool::text::{self, Lines};
use super::sums::{self, Sum};
use super::verify::is_same_name;
use crate::error::Result;
use crate::sys::c;

/// Is told of each file: position, error number or 0, name.
pub type Each<'a> = dyn FnMut(u64, i32, &[u8]) -> Result<()> + 'a;

/// What became of files, in the order of their positions.
#[derive(Default)]
pub struct Outcomes {
    /// Files that were met: error number, 0 for none, and name.
    pub met: Spill,
    /// Files that are not there or not whole.
    pub lost: Spill,
    /// Files with a wrong sum.
    pub bad: Spill,
}

impl Outcomes {
    /// Adds a file that was met.
    pub fn meet(&mut self, at: u64, errno: i32, name: &[u8]) -> Result<()> {
        self.met.put(at, &[&errno.to_le_bytes(), name].concat())
    }

    /// Calls `each` with every file: position, error number, name. Before, `made_bad` gets the
    /// names of those that were made, and are not what was written.
    pub fn merge(self, made_bad: &mut dyn FnMut(&[u8]), each: &mut Each<'_>) -> Result<()> {
        let mut met = self.met.read()?;
        let mut lost = Told::of(self.lost)?;
        let mut bad = Told::of(self.bad)?;
        while let Some((at, item)) = met.next_item()? {
            let Some((errno, name)) = item.split_first_chunk() else { continue };
            let errno = i32::from_le_bytes(*errno);
            let is_lost = lost.pass(at, name, each)?;
            let is_bad = bad.pass(at, name, each)?;
            if errno == 0 && is_bad {
                made_bad(name);
            }
            let errno = if errno == 0 && (is_lost || is_bad) { c::EIO } else { errno };
            each(at, errno, name)?;
        }
        lost.pass(u64::MAX, b"", each)?;
        bad.pass(u64::MAX, b"", each)?;
        Ok(())
    }
}

/// Files of which something was told, in the order of their positions.
struct Told {
    list: Spilled,
    next: Option<(u64, Vec<u8>)>,
}

impl Told {
    fn of(list: Spill) -> Result<Told> {
        let mut list = list.read()?;
        Ok(Told { next: list.next_item()?, list })
    }

    /// Passes over those before a place, which were never met; whether one at it has this name.
    fn pass(&mut self, at: u64, name: &[u8], each: &mut Each<'_>) -> Result<bool> {
        while let Some((position, path)) = self.next.take_if(|it| it.0 <= at) {
            self.next = self.list.next_item()?;
            if position == at && is_same_name(&path, name) {
                return Ok(true);
            }
            each(position, c::EIO, &path)?;
        }
        Ok(false)
    }
}

/// The sums that the spool has kept of a batch.
pub struct Sums(Option<Lines<BufReader<File>>>);

impl Sums {
    /// Opens them, if they are there.
    pub fn open(path: &Path) -> Sums {
        Sums(text::open(path).ok().map(Lines::new))
    }

    /// The sum of a file; those before it are passed over.
    pub fn of(&mut self, name: &[u8]) -> Option<Sum> {
        let lines = self.0.as_mut()?;
        while let Ok(true) = lines.advance() {
            let (sum, found) = sums::parse(lines.line()).ok()?;
            if found == name {
                return Some(sum);
            }
        }
        self.0 = None;
        None
    }
}
