//! Where a file's content lies: extents of blocks' plain content, and holes.

use crate::chunk::Digest;
use crate::entry::Extra;
use crate::error::{Error, Result};
use crate::wire::{self, Reader};

/// One stretch of a file's content, in file order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Bytes of a block.
    Data {
        /// The block's number in the catalog.
        block: u64,
        /// Where they start in the block's plain content.
        offset: u64,
        /// How many they are.
        len: u64,
    },
    /// Zeros that are not stored.
    Hole {
        /// How many.
        len: u64,
    },
}

impl Extent {
    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Extent::Data { len, .. } | Extent::Hole { len } => *len,
        }
    }

    /// Whether it is empty, which no stored extent is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Appends an extent to a list, joining it with the last one where they touch.
pub fn push(extents: &mut Vec<Extent>, next: Extent) {
    let joined = match (extents.last_mut(), next) {
        (
            Some(Extent::Data { block, offset, len }),
            Extent::Data { block: next_block, offset: next_offset, len: next_len },
        ) if *block == next_block && *offset + *len == next_offset => {
            *len += next_len;
            true
        }
        (Some(Extent::Hole { len }), Extent::Hole { len: next_len }) => {
            *len += next_len;
            true
        }
        _ => false,
    };
    if !joined && !next.is_empty() {
        extents.push(next);
    }
}

/// The catalog's form: for each extent `len * 2 + 1` for a hole, or `len * 2`, block number and
/// offset.
pub fn encode(extents: &[Extent]) -> Vec<u8> {
    let mut out = Vec::new();
    for extent in extents {
        match *extent {
            Extent::Hole { len } => wire::put_u64(&mut out, len << 1 | 1),
            Extent::Data { block, offset, len } => {
                wire::put_u64(&mut out, len << 1);
                wire::put_u64(&mut out, block);
                wire::put_u64(&mut out, offset);
            }
        }
    }
    out
}

/// Reads what [`encode`] wrote.
pub fn decode(bytes: &[u8]) -> Result<Vec<Extent>> {
    let mut reader = Reader::new(bytes, "extents");
    let mut extents = Vec::new();
    let mut total = 0u64;
    while !reader.is_empty() {
        let head = reader.u64()?;
        let len = head >> 1;
        extents.push(match head & 1 {
            1 => Extent::Hole { len },
            _ => Extent::Data { block: reader.u64()?, offset: reader.u64()?, len },
        });
        total = total
            .checked_add(len)
            .filter(|total| len > 0 && i64::try_from(*total).is_ok())
            .ok_or_else(|| Error::corrupt("extents: impossible length"))?;
    }
    Ok(extents)
}

/// What a version has besides its metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// Hash of a file's whole content, holes as zeros. `None` for what is not a file.
    pub hash: Option<Digest>,
    /// Where a file's content lies; covers its size exactly.
    pub extents: Vec<Extent>,
    /// Link target and extended attributes.
    pub extra: Extra,
}

impl Content {
    /// Bytes that are not holes, if there are holes.
    pub fn data_len(&self) -> Option<u64> {
        let is_hole = |it: &&Extent| matches!(it, Extent::Hole { .. });
        let holes: u64 = self.extents.iter().filter(is_hole).map(Extent::len).sum();
        let all: u64 = self.extents.iter().map(Extent::len).sum();
        (holes > 0).then_some(all - holes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn extents() -> impl Strategy<Value = Vec<Extent>> {
        let one = (any::<bool>(), 1u64..1 << 40, 0u64..1 << 30, 0u64..1 << 40).prop_map(
            |(hole, len, block, offset)| match hole {
                true => Extent::Hole { len },
                false => Extent::Data { block, offset, len },
            },
        );
        prop::collection::vec(one, 0..50)
    }

    proptest! {
        #[test]
        fn extents_come_back(extents in extents()) {
            prop_assert_eq!(decode(&encode(&extents))?, extents);
        }

        #[test]
        fn any_extents_are_read_or_refused(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }

    #[test]
    fn neighbours_are_joined() {
        let mut list = Vec::new();
        push(&mut list, Extent::Data { block: 1, offset: 0, len: 10 });
        push(&mut list, Extent::Data { block: 1, offset: 10, len: 5 });
        push(&mut list, Extent::Hole { len: 3 });
        push(&mut list, Extent::Hole { len: 4 });
        push(&mut list, Extent::Data { block: 2, offset: 15, len: 1 });
        let joined = [
            Extent::Data { block: 1, offset: 0, len: 15 },
            Extent::Hole { len: 7 },
            Extent::Data { block: 2, offset: 15, len: 1 },
        ];
        assert_eq!(list, joined);
    }
}
