//! Lists of any length that are written once and then read: on disk, but for short ones.
//!
//! Invariant: no more than [`MEMORY_BYTES`] of one are in memory, and nothing of it has a name.

use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};

use tempfile::SpooledTempFile;

use crate::error::{Error, Result};

/// What stays in memory of a list.
const MEMORY_BYTES: usize = 1 << 20;

/// A list that is being written.
pub struct Spill {
    out: BufWriter<SpooledTempFile>,
    count: u64,
}

/// A list that is being read.
pub struct Spilled {
    input: BufReader<SpooledTempFile>,
    left: u64,
}

fn failed(e: std::io::Error) -> Error {
    Error::io(format!("a temporary file in {}", std::env::temp_dir().display()), e)
}

impl Spill {
    /// An empty list.
    pub fn new() -> Spill {
        Spill { out: BufWriter::new(SpooledTempFile::new(MEMORY_BYTES)), count: 0 }
    }

    /// Adds an item: a number and bytes.
    pub fn put(&mut self, number: u64, bytes: &[u8]) -> Result<()> {
        let len = u32::try_from(bytes.len()).map_err(|_| Error::usage("an item is too long"))?;
        self.count += 1;
        let parts: [&[u8]; 4] =
            [&number.to_le_bytes(), &len.to_le_bytes(), bytes, &len.to_le_bytes()];
        parts.iter().try_for_each(|it| self.out.write_all(it)).map_err(failed)
    }

    /// How many items there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Ends it, to be read from its beginning.
    pub fn read(self) -> Result<Spilled> {
        let count = self.count;
        let mut file = self.out.into_inner().map_err(|e| failed(e.into_error()))?;
        file.rewind().map_err(failed)?;
        Ok(Spilled { input: BufReader::with_capacity(64 << 10, file), left: count })
    }

    /// Ends it, and calls `each` with every item, the last one first.
    pub fn read_back(self, each: &mut dyn FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let count = self.count;
        let mut file = self.out.into_inner().map_err(|e| failed(e.into_error()))?;
        let mut end = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let mut item = Vec::new();
        for _ in 0..count {
            let mut len = [0; 4];
            end -= 4;
            file.seek(SeekFrom::Start(end)).map_err(failed)?;
            file.read_exact(&mut len).map_err(failed)?;
            item.resize(u32::from_le_bytes(len) as usize + 12, 0);
            end -= item.len() as u64;
            file.seek(SeekFrom::Start(end)).map_err(failed)?;
            file.read_exact(&mut item).map_err(failed)?;
            if let Some((number, rest)) = item.split_first_chunk() {
                each(u64::from_le_bytes(*number), rest.get(4..).unwrap_or_default())?;
            }
        }
        Ok(())
    }
}

impl Default for Spill {
    fn default() -> Spill {
        Spill::new()
    }
}

impl Spilled {
    /// The next item.
    pub fn next_item(&mut self) -> Result<Option<(u64, Vec<u8>)>> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        let (mut number, mut len) = ([0; 8], [0; 4]);
        self.input.read_exact(&mut number).map_err(failed)?;
        self.input.read_exact(&mut len).map_err(failed)?;
        let mut bytes = vec![0; u32::from_le_bytes(len) as usize];
        self.input.read_exact(&mut bytes).map_err(failed)?;
        self.input.read_exact(&mut len).map_err(failed)?;
        Ok(Some((u64::from_le_bytes(number), bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_come_back_from_both_ends() {
        // Fewer than go into memory, and more.
        for count in [0, 3, 5000u64] {
            let fill = || {
                let mut list = Spill::new();
                for n in 0..count {
                    list.put(n, &b"x".repeat((n % 700) as usize)).unwrap();
                }
                list
            };
            let mut list = fill().read().unwrap();
            for n in 0..count {
                assert_eq!(list.next_item().unwrap().unwrap().0, n);
            }
            assert!(list.next_item().unwrap().is_none());
            let mut left = count;
            fill()
                .read_back(&mut |n, bytes| {
                    left -= 1;
                    assert_eq!((n, bytes.len() as u64), (left, left % 700));
                    Ok(())
                })
                .unwrap();
            assert_eq!(left, 0);
        }
    }
}
