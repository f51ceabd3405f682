//! Proving what is said to be in a block by its bytes, and giving an index its records back.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::PathBuf;

use super::block::{BlockIndex, encode_old_record, encode_record};
use super::{INDEX_NAME, Volume};
use crate::chunk::HashAlgo;
use crate::error::{Error, Result};
use crate::sys::{self, quoted};

/// Checks what is said of a block against its bytes: its name, each frame, each chunk.
pub fn prove(volume: &Volume, index: &BlockIndex, hash: HashAlgo) -> Result<()> {
    index.check()?;
    if volume.store.len_of(&index.id)? != Some(index.stored_len()) {
        return Err(Error::corrupt("the block is not there, or has another length"));
    }
    let (mut block, mut at) = (hash.hasher(), 0u64);
    let mut chunks = index.chunks.iter();
    let mut chunk = chunks.next();
    let (mut hasher, mut left) = (hash.hasher(), chunk.map_or(0, |it| it.len as usize));
    let (mut stored, mut plain) = (Vec::new(), Vec::new());
    for frame in &index.frames {
        stored.resize(frame.stored_len as usize, 0);
        volume.store.read_at(&index.id, at, &mut stored)?;
        at += u64::from(frame.stored_len);
        block.update(&stored);
        plain.clear();
        frame.decode(&stored, &mut plain)?;
        let mut rest = &*plain;
        while !rest.is_empty() {
            let (part, later) = rest.split_at(left.min(rest.len()));
            hasher.update(part);
            left -= part.len();
            rest = later;
            while left == 0 {
                let Some(done) = chunk else { break };
                if std::mem::replace(&mut hasher, hash.hasher()).finish() != done.id {
                    return Err(Error::corrupt(format!("it does not have chunk {}", done.id)));
                }
                chunk = chunks.next();
                let Some(next) = chunk else { break };
                left = next.len as usize;
            }
            if chunk.is_none() && !rest.is_empty() {
                return Err(Error::corrupt("it has more than its chunks"));
            }
        }
    }
    match chunk.is_none() && block.finish() == index.id {
        true => Ok(()),
        false => Err(Error::corrupt("its bytes do not have the hash that is its name")),
    }
}

/// An index that is being written anew: the part of the old one that is good, and more records. It
/// takes the old one's place as a whole.
pub struct IndexMender {
    new: PathBuf,
    path: PathBuf,
    out: BufWriter<File>,
    len: u64,
}

impl IndexMender {
    /// Begins with the first `valid` bytes of a volume's index.
    pub fn new(volume: &Volume, valid: u64) -> Result<IndexMender> {
        let path = volume.config.path.join(INDEX_NAME);
        let new = volume.config.path.join(format!("{INDEX_NAME}.new"));
        let failed = |e| Error::io(format!("writing {}", quoted(&new)), e);
        let mut options = sys::private_file();
        let file = options.write(true).create(true).truncate(true).open(&new).map_err(failed)?;
        let mut out = BufWriter::new(file);
        if valid > 0 {
            let old = File::open(&path).map_err(failed)?;
            std::io::copy(&mut old.take(valid), &mut out).map_err(failed)?;
        }
        Ok(IndexMender { new, path, out, len: valid })
    }

    /// How long it is by now, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a record; gives where it begins. The number that the block has in its catalog is
    /// said if it is known.
    pub fn append(&mut self, index: &BlockIndex, number: Option<u64>) -> Result<u64> {
        let record = number.map_or_else(|| encode_old_record(index), |it| encode_record(it, index));
        let written = self.out.write_all(&record);
        written.map_err(|e| Error::io(format!("writing {}", quoted(&self.new)), e))?;
        let at = self.len;
        self.len += record.len() as u64;
        Ok(at)
    }

    /// Puts it in the place of the old one, durably.
    pub fn commit(mut self) -> Result<()> {
        let failed = |e| Error::io(format!("writing {}", quoted(&self.new)), e);
        self.out.flush().map_err(failed)?;
        self.out.get_ref().sync_all().map_err(failed)?;
        sys::rename_durable(&self.new, &self.path)
    }
}

impl Drop for IndexMender {
    fn drop(&mut self) {
        // After a commit there is none; a stray that stays is overwritten by the next one.
        let _ = std::fs::remove_file(&self.new);
    }
}
