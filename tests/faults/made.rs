//! Stores that need a repair or a catalog, and what must have become of them.
//!
//! Invariant: what is damaged here is whole elsewhere in the store, so a repair brings all of it
//! back, and a rebuilt catalog says all that the old one did.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use raidtape::catalog::Reader;
use raidtape::copies;
use raidtape::error::Error;
use raidtape::progress::Progress;
use raidtape::repair;
use raidtape::snapshot::Snapshots;
use raidtape::validate;

use super::scene::{CACHE_BYTES, Said, Scene, Verb};

const INDEX: &str = ".rt_volume_index";

/// Another bit, at so many bytes from the beginning, or with a negative number from the end.
fn flip(path: &Path, at: isize) {
    let mut bytes = fs::read(path).unwrap();
    let at = if at < 0 { bytes.len() as isize + at } else { at };
    bytes[at as usize] ^= 4;
    fs::write(path, bytes).unwrap();
}

impl Scene {
    /// Damages a store of which each block is to be on two volumes: a copy of a block, and both
    /// indexes. What one of them has twice a repair leaves out, so that its records move.
    pub fn damage(&self) -> Result<(), Error> {
        let replicate = || copies::replicate(&self.catalog(), &Progress::default()).map(drop);
        replicate()?;
        let (first, second) = (self.path("store/v1"), self.path("store/v2"));
        let bytes = fs::read(first.join(INDEX)).unwrap();
        fs::write(first.join(INDEX), [&bytes[..], &bytes[..]].concat()).unwrap();
        // This takes the records up as they are now.
        replicate()?;
        flip(&first.join(INDEX), -5);
        flip(&second.join(INDEX), 20);
        let mut dir = second.join("chunks");
        while dir.is_dir() {
            dir = fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
        }
        flip(&dir, 10);
        Ok(())
    }

    /// Nothing is lost before a repair that was not done, and the next one does it.
    pub fn repair_again(&self, must: &BTreeSet<&str>, done: Said) -> Result<(), String> {
        if done == Said::Done {
            return Ok(());
        }
        let read = self.read_all();
        for state in must {
            if read.runs.get(*state) != self.contents.get(*state) {
                return Err(format!("{state:?} cannot be read: {:?}", read.problems));
            }
        }
        let told = |e: Error| format!("the repair again: {e}");
        let suspects: Vec<_> = {
            let snapshots = Snapshots::open(&self.catalog(), CACHE_BYTES).map_err(told)?;
            let options = validate::Options::default();
            let report = validate::run(&snapshots, &options, &Progress::default()).map_err(told)?;
            if report.is_clean() {
                return Ok(());
            }
            report.bad_blocks.items.iter().map(|it| it.id).collect()
        };
        let again = repair::run(&self.catalog(), &suspects, &Progress::default());
        match again.map_err(told)? {
            it if it.worst().is_some() => Err(format!("the repair again: {it:?}")),
            _ => Ok(()),
        }
    }

    /// After a repair every volume takes blocks as before: nobody has to say so.
    pub fn check_all_take_blocks(&self) -> Result<(), String> {
        let volumes = Reader::open(&self.catalog()).and_then(|it| it.volumes());
        let volumes = volumes.map_err(|e| e.to_string())?;
        match volumes.iter().all(|it| it.status == raidtape::volume::Status::Active) {
            true => Ok(()),
            false => Err(format!("a volume takes no blocks: {volumes:?}")),
        }
    }

    /// All that the catalog says, with the volumes where they always are.
    pub fn dump(&self) -> String {
        let mut out = Vec::new();
        Reader::open(&self.catalog()).unwrap().write_logical_dump(&mut out).unwrap();
        let mut text = String::from_utf8(out).unwrap();
        for place in [self.path("store"), self.fs.point.join("disk")] {
            text = text.replace(place.to_str().unwrap(), "");
        }
        text
    }

    /// The catalog says what the lost one said.
    pub fn check_dump(&self, verb: &Verb) -> Result<(), String> {
        let (is, was) = (self.dump(), self.lost_dump.lock().unwrap().clone());
        let differs = || is.lines().zip(was.lines()).find(|it| it.0 != it.1);
        match is == was {
            true => Ok(()),
            false => Err(format!("{}: the catalog is another: {:?}", verb.name, differs())),
        }
    }
}
