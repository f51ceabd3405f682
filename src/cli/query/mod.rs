//! Commands that ask what the runs hold: `diff`, `find`, `stats`, `dump`, `dump-catalog`.
//!
//! None of them changes anything. Each has a file with its arguments and what it prints.

mod catalog;
mod diff;
mod dump;
mod find;
mod stats;

pub use catalog::{DumpCatalog, dump_catalog};
pub use diff::{Diff, diff};
pub use dump::{Dump, dump};
pub use find::{Find, find};
pub use stats::{Stats, stats};

use std::str::FromStr;

use crate::catalog::{Reader, Run, RunId};
use crate::error::{Error, ErrorKind, Result};

/// Which run is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunArg {
    /// The one with this number.
    Number(RunId),
    /// The newest of all.
    Latest,
}

impl FromStr for RunArg {
    type Err = String;

    fn from_str(word: &str) -> std::result::Result<RunArg, String> {
        match (word, word.parse()) {
            ("latest", _) => Ok(RunArg::Latest),
            (_, Ok(number)) => Ok(RunArg::Number(number)),
            _ => Err("give the number of a run, or latest".to_owned()),
        }
    }
}

impl RunArg {
    /// The run that is meant.
    pub fn find(self, reader: &Reader) -> Result<Run> {
        match self {
            RunArg::Number(number) => reader.run(number),
            RunArg::Latest => {
                let missing = || Error::new(ErrorKind::NotFound, "there is no run yet");
                reader.latest(None)?.ok_or_else(missing)
            }
        }
    }
}
