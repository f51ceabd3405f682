//! The bytes of a file, in pages that copies of it share.
//!
//! Invariant: what lies beyond the length is zero in every page, so a file that grows again shows
//! zeros there, as it must.

use std::sync::Arc;

const PAGE: usize = 4096;
/// What a disk writes whole or not at all, in bytes.
pub const SECTOR: usize = 512;

type Page = [u8; PAGE];

/// A file's bytes; a copy costs a pointer a page.
#[derive(Clone, Default)]
pub struct Data {
    len: u64,
    pages: Vec<Option<Arc<Page>>>,
}

impl Data {
    pub fn of(bytes: &[u8]) -> Data {
        let mut data = Data::default();
        data.write(0, bytes);
        data
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    /// Up to `size` bytes from `offset` on.
    pub fn read(&self, offset: u64, size: usize) -> Vec<u8> {
        let end = self.len.min(offset.saturating_add(size as u64));
        let mut bytes = Vec::with_capacity(end.saturating_sub(offset) as usize);
        let mut at = offset;
        while at < end {
            let (number, start) = (at as usize / PAGE, at as usize % PAGE);
            let stop = PAGE.min(start + (end - at) as usize);
            match self.pages.get(number) {
                Some(Some(page)) => bytes.extend_from_slice(&page[start..stop]),
                _ => bytes.resize(bytes.len() + stop - start, 0),
            }
            at += (stop - start) as u64;
        }
        bytes
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.read(0, self.len as usize)
    }

    pub fn write(&mut self, offset: u64, mut bytes: &[u8]) {
        let mut at = offset;
        while !bytes.is_empty() {
            let (number, start) = (at as usize / PAGE, at as usize % PAGE);
            let (piece, rest) = bytes.split_at(bytes.len().min(PAGE - start));
            if self.pages.len() <= number {
                self.pages.resize(number + 1, None);
            }
            let page = self.pages[number].get_or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[start..start + piece.len()].copy_from_slice(piece);
            (at, bytes) = (at + piece.len() as u64, rest);
        }
        self.len = self.len.max(at);
    }

    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.clear(len, self.len);
            self.pages.truncate((len as usize).div_ceil(PAGE));
        }
        self.len = len;
    }

    /// Makes a range zeros.
    pub fn clear(&mut self, start: u64, end: u64) {
        let zeros = vec![0; (end.min(self.len).saturating_sub(start)) as usize];
        self.write(start, &zeros);
    }

    pub fn sector(&self, number: usize) -> &[u8] {
        const ZEROS: [u8; SECTOR] = [0; SECTOR];
        match self.pages.get(number * SECTOR / PAGE) {
            Some(Some(page)) => &page[number * SECTOR % PAGE..][..SECTOR],
            _ => &ZEROS,
        }
    }

    /// `len` bytes of which each sector is of `self` or, where `is_new` says so, of `new`.
    pub fn mixed(&self, new: &Data, len: u64, mut is_new: impl FnMut(usize) -> bool) -> Data {
        let mut mixed = Data::default();
        for number in 0..(len as usize).div_ceil(SECTOR) {
            let sector = if is_new(number) { new.sector(number) } else { self.sector(number) };
            mixed.write((number * SECTOR) as u64, sector);
        }
        mixed.set_len(len);
        mixed
    }
}
