//! Data of any size from a seed.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// Numbers that look random and are the same every time (SplitMix64).
pub struct Seeded(u64);

impl Seeded {
    pub fn new(seed: u64) -> Seeded {
        Seeded(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut it = self.0;
        it = (it ^ (it >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        it = (it ^ (it >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        it ^ (it >> 31)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Bytes that do not compress.
    pub fn noise(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend(self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }

    /// Words, which compress well.
    pub fn text(&mut self, len: usize) -> Vec<u8> {
        let words = ["tape", "disk", "mount", "block", "chunk", "frame", "volume", "snapshot"];
        let mut bytes = Vec::with_capacity(len + 20);
        while bytes.len() < len {
            let word = words[self.below(words.len() as u64) as usize];
            bytes.extend(format!("{word}{} ", self.below(100)).bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// Writes a file of noise, whatever its length.
pub fn noise_file(path: &Path, seed: u64, len: u64) {
    let mut seeded = Seeded::new(seed);
    let mut file = File::create(path).unwrap();
    let mut left = len;
    while left > 0 {
        let piece = left.min(1 << 20);
        file.write_all(&seeded.noise(piece as usize)).unwrap();
        left -= piece;
    }
}

/// Fills a directory with files of many sizes in nested directories: noise, text and empty ones.
pub fn mixed_tree(dir: &Path, seed: u64, files: u64) {
    let mut seeded = Seeded::new(seed);
    for number in 0..files {
        let sub = dir.join(format!("d{}", number % 7)).join(format!("e{}", number % 3));
        fs::create_dir_all(&sub).unwrap();
        let len = match seeded.below(10) {
            0 => 0,
            1..7 => seeded.below(4_000),
            7..9 => seeded.below(60_000),
            _ => seeded.below(600_000),
        } as usize;
        let bytes = if number % 2 == 0 { seeded.noise(len) } else { seeded.text(len) };
        fs::write(sub.join(format!("f{number}")), bytes).unwrap();
    }
}
