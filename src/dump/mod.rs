//! Writing files and trees of a run to one stream: a file's bytes, or a tar archive.
//!
//! Every file's hash is checked as its bytes go by. What has gone out cannot be taken back, so a
//! stream that turns out to be wrong ends early and with an error, never as if it were whole.
//! Memory does not grow with the tree: a page of each directory on the way down, a piece of one
//! file, and the first names of files with several.

mod header;
mod tar;

use std::io::Write;

use crate::catalog::EntryRow;
use crate::chunk::HashAlgo;
use crate::chunk::file_hash::FileHash;
use crate::entry::Kind;
use crate::error::{Error, Quoted, Result};
use crate::snapshot::{FileMap, Found, Snapshots};

pub use tar::{Summary, tar};

/// Bytes of a file that are in memory at a time. A file that is not longer is checked before any
/// byte of it is written.
const PIECE_BYTES: usize = 1 << 20;

/// Writes the content of a regular file.
pub fn file(snapshots: &Snapshots, found: &Found, out: &mut dyn Write) -> Result<()> {
    let path = Quoted(&found.path);
    match found.entry.meta.kind {
        Kind::File => {}
        Kind::Dir => {
            let message = format!("'{path}' is a directory: ask for --format tar");
            return Err(Error::usage(message));
        }
        kind => {
            let kind = kind.as_str();
            let message = format!("'{path}' is a {kind} and has no content: ask for --format tar");
            return Err(Error::usage(message));
        }
    }
    let hash = snapshots.settings()?.hash;
    let mut copy = || -> Result<()> {
        let map = content_map(snapshots, &found.entry)?;
        copy_content(snapshots, &map, hash, true, out)?;
        out.flush().map_err(failed)
    };
    copy().map_err(|e| e.context(path.to_string()))
}

fn failed(e: std::io::Error) -> Error {
    Error::io("writing what is dumped", e)
}

/// Where a file's content lies; it covers the file's size.
fn content_map(snapshots: &Snapshots, entry: &EntryRow) -> Result<std::sync::Arc<FileMap>> {
    let map = snapshots.file(entry.version)?;
    match map.size() == entry.meta.size {
        true => Ok(map),
        false => Err(Error::corrupt("its extents do not cover its size")),
    }
}

/// Writes a file's content, its holes as zeros or not at all, and checks its hash.
fn copy_content(
    snapshots: &Snapshots,
    map: &FileMap,
    algo: HashAlgo,
    with_holes: bool,
    out: &mut dyn Write,
) -> Result<()> {
    let is_sparse = map.has_holes();
    let mut hash = match is_sparse {
        true => FileHash::of_segments(algo),
        false => FileHash::of_content(algo),
    };
    let longest = usize::try_from(map.size()).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
    let mut buffer = vec![0; longest];
    let mut at = 0;
    for (start, end) in map.segments() {
        if with_holes {
            zeros(start - at, out)?;
        }
        if is_sparse {
            hash.begin_segment(start, end - start);
        }
        at = start;
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let piece = buffer.get_mut(..len).unwrap_or_default();
            snapshots.read(map, at, piece)?;
            hash.add_bytes(piece);
            out.write_all(piece).map_err(failed)?;
            at += len as u64;
        }
    }
    if with_holes {
        zeros(map.size() - at, out)?;
    }
    let found = match is_sparse {
        true => hash.finish_segments(map.size()),
        false => hash.finish(),
    };
    match map.content.hash == Some(found) {
        true => Ok(()),
        false => Err(Error::corrupt("its content does not match its hash")),
    }
}

fn zeros(len: u64, out: &mut dyn Write) -> Result<()> {
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0), len), out).map_err(failed)?;
    Ok(())
}
