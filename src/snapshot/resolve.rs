//! Finding what a user means by a path.

use super::{Snapshots, not_in_run};
use crate::catalog::{EntryRow, Reader, Run, RunId};
use crate::error::{Error, ErrorKind, Quoted, Result};

/// A path that was found.
#[derive(Debug)]
pub struct Found {
    /// The run it was found in.
    pub run: Run,
    /// The entry.
    pub entry: EntryRow,
    /// Its path below the source's root; empty for the root.
    pub path: Vec<u8>,
}

/// Finds `path` in run `run`, or in the newest run that has it. A path is relative to the source's
/// root; an absolute one may also begin with the source's name.
pub fn resolve(snapshots: &Snapshots, path: &[u8], run: Option<RunId>) -> Result<Found> {
    snapshots.with_reader(|reader| {
        let runs = match run {
            Some(run) => vec![reader.run(run)?],
            None => reader.runs()?.into_iter().rev().collect(),
        };
        for run in &runs {
            if let Some(found) = find(reader, run, path)? {
                return Ok(found);
            }
        }
        Err(match runs.as_slice() {
            [] => Error::new(ErrorKind::NotFound, "there is no run yet"),
            [run] => not_in_run(path, run),
            _ => {
                let message = format!("no run has '{}'", Quoted(path));
                Error::new(ErrorKind::NotFound, message)
            }
        })
    })
}

fn find(reader: &Reader, run: &Run, path: &[u8]) -> Result<Option<Found>> {
    let below = match path.strip_prefix(&*run.source) {
        // "/home/me" is no prefix of "/home/menu".
        Some(rest) if rest.is_empty() || rest.starts_with(b"/") => Some(rest),
        _ => None,
    };
    for path in below.into_iter().chain([path]) {
        if let Some((entry, path)) = walk(reader, run, path)? {
            return Ok(Some(Found { run: run.clone(), entry, path }));
        }
    }
    Ok(None)
}

fn walk(reader: &Reader, run: &Run, path: &[u8]) -> Result<Option<(EntryRow, Vec<u8>)>> {
    let mut entry = reader.root(run)?;
    let mut walked: Vec<&[u8]> = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => continue,
            b".." => return Err(Error::usage("'..' in a path of a snapshot")),
            _ => {}
        }
        let Some(dir) = entry.child else { return Ok(None) };
        match reader.lookup(run.id, dir, name)? {
            Some(next) => entry = next,
            None => return Ok(None),
        }
        walked.push(name);
    }
    Ok(Some((entry, walked.join(&b'/'))))
}
