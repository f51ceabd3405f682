//! A meta that lies on a volume, held against what it would say if it were written now.
//!
//! Both are streams: nothing is kept of either, however many files use the block.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};

use crate::catalog::{Reader, meta};
use crate::chunk::HashAlgo;
use crate::error::Result;
use crate::progress::Progress;
use crate::volume::{BlockIndex, Volume};

/// Longest meta that is read, in bytes of text.
const TEXT_BYTES_MAX: u64 = 4 << 30;
/// What every meta ends with.
const TAIL: &[u8] = b"\n]\n}\n";

/// What a meta is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaState {
    /// It says what it would say now.
    Current,
    /// It is not there.
    Missing,
    /// It is a meta of the block, and whole, but says something else of the files that use it.
    Differs,
    /// It is no meta of the block, and why.
    Damaged(String),
}

/// Holds the meta of a block on a volume against the catalog.
pub fn compare(
    reader: &Reader,
    hash: HashAlgo,
    (volume, index): (&Volume, &BlockIndex),
    names: &mut meta::DirNames,
    progress: &Progress,
) -> Result<MetaState> {
    let path = volume.document_path(&meta::document_name(&index.id));
    let open = || {
        // Whatever else is there could keep its reader waiting.
        match std::fs::symlink_metadata(&path)?.is_file() {
            true => zstd::Decoder::new(File::open(&path)?),
            false => Err(io::Error::other("it is not a file")),
        }
    };
    let text = match open() {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(MetaState::Missing),
        Err(e) => return Ok(MetaState::Damaged(e.to_string())),
    };
    let mut same = Same { text: BufReader::new(text), differs: false };
    let mut out = Stopping { out: &mut same, progress };
    let result = reader.write_meta_text(index, hash, names, &mut out);
    match result {
        _ if same.differs => {}
        Err(e) => return Err(e),
        Ok(()) if matches!(same.text.read(&mut [0]), Ok(0)) => return Ok(MetaState::Current),
        Ok(()) => {}
    }
    let head = meta::head_text(index, hash)?;
    let result = open().map_err(|e| e.to_string());
    match result.and_then(|text| is_meta_of(text, &head, progress)) {
        Ok(()) => Ok(MetaState::Differs),
        Err(why) => {
            progress.check()?;
            Ok(MetaState::Damaged(why))
        }
    }
}

/// Whether a text begins and ends as the meta of a block does, or why not.
fn is_meta_of(
    text: impl Read,
    head: &[u8],
    progress: &Progress,
) -> std::result::Result<(), String> {
    let mut text = text.take(TEXT_BYTES_MAX);
    let mut begin = vec![0; head.len()];
    text.read_exact(&mut begin).map_err(|e| e.to_string())?;
    if begin != head {
        return Err("it does not describe this block".to_owned());
    }
    let (mut tail, mut piece) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        progress.check().map_err(|e| e.to_string())?;
        let len = text.read(&mut piece).map_err(|e| e.to_string())?;
        let Some(bytes) = piece.get(..len).filter(|it| !it.is_empty()) else { break };
        tail.extend_from_slice(bytes);
        tail.drain(..tail.len().saturating_sub(TAIL.len()));
    }
    match tail == TAIL {
        true => Ok(()),
        false => Err("it does not end as it should".to_owned()),
    }
}

/// Takes what is written until the work is to stop.
pub struct Stopping<'a> {
    /// Where it goes.
    pub out: &'a mut dyn Write,
    /// Who may want it to stop.
    pub progress: &'a Progress,
}

impl Write for Stopping<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Not as an interrupted call, which would be made again.
        self.progress.check().map_err(io::Error::other)?;
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Takes what is written only as long as it is what a text has too.
struct Same<R> {
    text: R,
    differs: bool,
}

impl<R: Read> Write for Same<R> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut there = [0; 4096];
        let len = bytes.len().min(there.len());
        let (Some(there), Some(bytes)) = (there.get_mut(..len), bytes.get(..len)) else {
            return Ok(0);
        };
        match self.text.read_exact(there) {
            Ok(()) if there == bytes => Ok(len),
            _ => {
                self.differs = true;
                Err(io::Error::other("it differs"))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_to_stop_is_heard_between_two_writes() {
        let (progress, mut out) = (Progress::default(), Vec::new());
        let mut stopping = Stopping { out: &mut out, progress: &progress };
        stopping.write_all(b"one").unwrap();
        progress.cancel();
        assert!(stopping.write_all(b"two").is_err());
        assert_eq!(out, b"one");
    }
}
