//! Numbers and byte strings as our binary formats hold them, and a reader that cannot be fooled.
//!
//! Numbers are LEB128 varints (seven bits a byte, lowest first, at most ten bytes) unless a format
//! says otherwise; byte strings are a varint length and the bytes. Signed numbers are zigzag
//! encoded. The reader checks every length against what is left, so no input makes it allocate
//! more than the input's own size, and every decoder ends with [`Reader::finish`].

use crate::error::{Error, Result};

/// Appends a number.
pub fn put_u64(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(low_byte(value) | 0x80);
        value >>= 7;
    }
    out.push(low_byte(value));
}

fn low_byte(value: u64) -> u8 {
    let [low, ..] = value.to_le_bytes();
    low
}

/// Appends a signed number.
pub fn put_i64(out: &mut Vec<u8>, value: i64) {
    put_u64(out, ((value << 1) ^ (value >> 63)).cast_unsigned());
}

/// Appends a byte string.
pub fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_u64(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Reads what the `put_` functions wrote.
pub struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    /// A reader over `bytes`; `what` names the structure in error messages.
    pub fn new(bytes: &'a [u8], what: &'static str) -> Reader<'a> {
        Reader { rest: bytes, what }
    }

    /// A number.
    pub fn u64(&mut self) -> Result<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.rest.split_first().ok_or_else(|| self.cut_short())?;
            self.rest = rest;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Error::corrupt(format!("{}: number too long", self.what)))
    }

    /// A number that has to fit 32 bits.
    pub fn u32(&mut self) -> Result<u32> {
        u32::try_from(self.u64()?)
            .map_err(|_| Error::corrupt(format!("{}: number out of range", self.what)))
    }

    /// A signed number.
    pub fn i64(&mut self) -> Result<i64> {
        let raw = self.u64()?;
        Ok((raw >> 1).cast_signed() ^ -(raw & 1).cast_signed())
    }

    /// Exactly `len` bytes.
    pub fn take(&mut self, len: u64) -> Result<&'a [u8]> {
        let cut = usize::try_from(len).ok().and_then(|len| self.rest.split_at_checked(len));
        let (bytes, rest) = cut.ok_or_else(|| self.cut_short())?;
        self.rest = rest;
        Ok(bytes)
    }

    /// An array of `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or_else(|| self.cut_short())?;
        self.rest = rest;
        Ok(*bytes)
    }

    /// A byte string.
    pub fn bytes(&mut self) -> Result<&'a [u8]> {
        let len = self.u64()?;
        self.take(len)
    }

    /// How many items follow, each of at least `item_bytes_min` bytes: refused when they cannot all
    /// be there, so that the count may be used to reserve memory.
    pub fn count(&mut self, item_bytes_min: usize) -> Result<usize> {
        let count = usize::try_from(self.u64()?).map_err(|_| self.cut_short())?;
        match count.checked_mul(item_bytes_min) {
            Some(bytes) if bytes <= self.rest.len() => Ok(count),
            _ => Err(self.cut_short()),
        }
    }

    /// Whether everything has been read.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Ends the reading; bytes left over are an error.
    pub fn finish(self) -> Result<()> {
        match self.rest.len() {
            0 => Ok(()),
            n => Err(Error::corrupt(format!("{}: {n} bytes too many", self.what))),
        }
    }

    fn cut_short(&self) -> Error {
        Error::corrupt(format!("{}: cut short", self.what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_and_strings_come_back(a: u64, b: i64, c: Vec<u8>) {
            let mut out = Vec::new();
            put_u64(&mut out, a);
            put_i64(&mut out, b);
            put_bytes(&mut out, &c);
            let mut reader = Reader::new(&out, "test");
            prop_assert_eq!(reader.u64()?, a);
            prop_assert_eq!(reader.i64()?, b);
            prop_assert_eq!(reader.bytes()?, &c[..]);
            reader.finish()?;
        }

        #[test]
        fn any_input_is_read_or_refused(bytes: Vec<u8>) {
            let mut reader = Reader::new(&bytes, "test");
            let _ = reader.count(1).map(|n| assert!(n <= bytes.len()));
            let mut reader = Reader::new(&bytes, "test");
            while !reader.is_empty() && reader.bytes().is_ok() {}
        }
    }

    #[test]
    fn eleven_byte_numbers_are_refused() {
        let mut reader = Reader::new(&[0xff; 11], "test");
        assert!(reader.u64().is_err());
    }
}
