//! Labels: the first block of a tape, by which it is known.
//!
//! A label is [`LABEL_BYTES`] long: lines `key:value`, then zeros. A first block that is no label
//! of ours still tells its tape from others, by its hash. What is read comes back byte for byte
//! when it is written again: further fields keep their order.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Quoted, Result};

/// Length of a label on tape, and how much of any first block is hashed.
pub const LABEL_BYTES: usize = 32_768;
/// Most fields that a label may have besides its first two.
pub const FIELDS_MAX: usize = 1000;
/// What every label begins with.
const VERSION: &[u8] = b"t0version:1\n";
const ANY_VERSION: &[u8] = b"t0version:";
const LABEL: &[u8] = b"label:";

/// A tape's label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    text: Vec<u8>,
    fields: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Longest blocks that every adapter moves at once, in bytes, as far as is known.
const READ_BYTES: u32 = 1 << 20;

/// How to read any tape file without this program, for whoever has only the label: the value of
/// its field `read`. Of blocks that are longer than `block_bytes`, and than what any adapter moves
/// at once, nothing is read so. What `cpio` leaves in the pipe is taken from it, or else `dd` dies
/// before the filemark.
pub fn how_to_read(block_bytes: Option<u32>) -> String {
    let bytes = block_bytes.unwrap_or(0).max(READ_BYTES);
    format!(
        "mt -f /dev/nst0 rewind; mt -f /dev/nst0 fsf FILE; dd if=/dev/nst0 bs={bytes} | \
         (cpio -idmv --no-absolute-filenames; cat >/dev/null)"
    )
}

/// What the first block of a tape is; or what its first blocks are, where they are short.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FirstBlock {
    /// A label, and the hash of its block.
    Labelled(Label, LabelHash),
    /// A block that is no label.
    Other(LabelHash),
    /// What is too short to be hashed as a label; this many bytes.
    Short(usize),
}

/// SHA-256 of the first [`LABEL_BYTES`] of a tape.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct LabelHash([u8; 32]);

impl LabelHash {
    /// The hash of a tape's first block, which must have [`LABEL_BYTES`] at least.
    pub fn of(block: &[u8]) -> Option<LabelHash> {
        block.get(..LABEL_BYTES).map(|it| LabelHash(Sha256::digest(it).into()))
    }

    /// Its bytes.
    pub fn bytes(self) -> [u8; 32] {
        self.0
    }

    /// Reads 64 hex digits.
    pub fn parse(text: &str) -> Result<LabelHash> {
        let mut hash = [0; 32];
        match hex::decode_to_slice(text, &mut hash) {
            Ok(()) => Ok(LabelHash(hash)),
            Err(_) => Err(Error::usage(format!(
                "{} is no hash of a label: it takes 64 hex digits",
                Quoted(text.as_bytes())
            ))),
        }
    }
}

impl fmt::Display for LabelHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for LabelHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Label {
    /// A label with this text and no further fields.
    pub fn new(text: impl Into<Vec<u8>>) -> Result<Label> {
        let text = text.into();
        if text.is_empty() || text.iter().any(|it| matches!(it, b'\n' | 0)) {
            let shown = Quoted(&text);
            let message = format!("{shown} is no label: it is empty, or has a newline or a NUL");
            return Err(Error::usage(message));
        }
        let label = Label { text, fields: Vec::new() };
        label.check_len()?;
        Ok(label)
    }

    /// Adds a field behind the others.
    pub fn add(&mut self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Result<()> {
        let (key, value) = (key.into(), value.into());
        let is_bad_key = key.is_empty() || key.iter().any(|it| matches!(it, b'\n' | 0 | b':'));
        if is_bad_key || matches!(&*key, b"t0version" | b"label") {
            let message = format!("{} cannot be a field of a label", Quoted(&key));
            return Err(Error::usage(message));
        }
        if value.iter().any(|it| matches!(it, b'\n' | 0)) {
            let message = format!("field {} of a label has a newline or a NUL", Quoted(&key));
            return Err(Error::usage(message));
        }
        if self.fields.len() == FIELDS_MAX {
            return Err(Error::usage(format!("a label has at most {FIELDS_MAX} further fields")));
        }
        self.fields.push((key, value));
        self.check_len().inspect_err(|_| {
            self.fields.pop();
        })
    }

    /// The label itself: any bytes but newline and NUL.
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    /// The first value of a field, also of `label`.
    pub fn get(&self, key: &[u8]) -> Option<&[u8]> {
        if key == b"label" {
            return Some(&self.text);
        }
        self.fields.iter().find(|it| it.0 == key).map(|it| &*it.1)
    }

    /// The longest blocks that can be read by what its field `read` says, if it says so.
    pub fn readable_bytes(&self) -> Option<u32> {
        let how = std::str::from_utf8(self.get(b"read")?).ok()?;
        how.split(' ').find_map(|it| it.strip_prefix("bs="))?.parse().ok()
    }

    /// Every further field, in its order.
    pub fn fields(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.fields.iter().map(|(key, value)| (&**key, &**value))
    }

    /// The lines of the label, as they are on tape and in the spool's copy of them.
    pub fn to_text(&self) -> Vec<u8> {
        let mut text = VERSION.to_vec();
        let line = |text: &mut Vec<u8>, parts: [&[u8]; 3]| text.extend(parts.concat());
        line(&mut text, [LABEL, &self.text, b"\n"]);
        for (key, value) in &self.fields {
            text.extend([key, &b":"[..], value, b"\n"].concat());
        }
        text
    }

    /// The block that goes onto the tape.
    pub fn to_block(&self) -> Vec<u8> {
        let mut block = self.to_text();
        block.resize(LABEL_BYTES, 0);
        block
    }

    fn check_len(&self) -> Result<()> {
        let fields: usize = self.fields.iter().map(|it| it.0.len() + it.1.len() + 2).sum();
        let len = VERSION.len() + LABEL.len() + self.text.len() + 1 + fields;
        if len <= LABEL_BYTES {
            return Ok(());
        }
        Err(Error::usage(format!("a label of {len} bytes: it has room for {LABEL_BYTES}")))
    }

    /// Reads the lines of a label, with or without the zeros behind them.
    ///
    /// [`ErrorKind::Version`] for a label of a version that is not known.
    pub fn parse(bytes: &[u8]) -> Result<Label> {
        let damaged = |what: &str| Error::corrupt(format!("label: {what}"));
        let len = bytes.iter().position(|it| *it == 0).unwrap_or(bytes.len());
        let (text, padding) = bytes.split_at_checked(len).unwrap_or((bytes, &[]));
        if len > LABEL_BYTES || padding.iter().any(|it| *it != 0) {
            return Err(damaged("there is something behind its text"));
        }
        let Some(text) = text.strip_prefix(VERSION) else {
            if let Some(version) = text.strip_prefix(ANY_VERSION)
                && let Some(line) = version.split(|it| *it == b'\n').next()
                && line != b"1"
            {
                let line = line.get(..20).unwrap_or(line);
                let message = format!("a label of version {}: this is for 1", Quoted(line));
                return Err(Error::new(ErrorKind::Version, message));
            }
            return Err(damaged("it does not begin with t0version:1"));
        };
        let text = text.strip_suffix(b"\n").ok_or_else(|| damaged("its last line has no end"))?;
        let mut lines = text.split(|it| *it == b'\n');
        let first = lines.next().and_then(|it| it.strip_prefix(LABEL));
        let mut label = match first {
            Some(text) if !text.is_empty() => Label { text: text.to_vec(), fields: Vec::new() },
            _ => return Err(damaged("its second line is not label:")),
        };
        for line in lines {
            let at = line.iter().position(|it| *it == b':').filter(|it| *it > 0);
            let at = at.ok_or_else(|| damaged("a line is not key:value"))?;
            let (key, value) = line.split_at(at);
            if matches!(key, b"t0version" | b"label") {
                return Err(damaged("two lines say its name"));
            }
            if label.fields.len() == FIELDS_MAX {
                return Err(damaged("it has too many fields"));
            }
            label.fields.push((key.to_vec(), value.get(1..).unwrap_or_default().to_vec()));
        }
        Ok(label)
    }
}

impl FirstBlock {
    /// Tells what the first block of a tape is. A block that looks like a label and is none is
    /// told by its hash like any other: its tape belongs to somebody.
    pub fn of(block: &[u8]) -> FirstBlock {
        let Some(hash) = LabelHash::of(block) else { return FirstBlock::Short(block.len()) };
        match Label::parse(block) {
            Ok(label) => FirstBlock::Labelled(label, hash),
            Err(_) => FirstBlock::Other(hash),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_block_is_as_the_document_has_it() {
        let mut label = Label::new("T 1").unwrap();
        label.add("created", "1455999395").unwrap();
        label.add("x", "a:b").unwrap();
        let block = label.to_block();
        assert_eq!(block.len(), 32_768);
        assert!(block.starts_with(b"t0version:1\nlabel:T 1\ncreated:1455999395\nx:a:b\n\0\0"));
        assert!(block[47..].iter().all(|it| *it == 0));
        let FirstBlock::Labelled(read, hash) = FirstBlock::of(&block) else { panic!() };
        assert_eq!(read, label);
        assert_eq!(read.get(b"x"), Some(&b"a:b"[..]));
        assert_eq!(read.get(b"label"), Some(&b"T 1"[..]));
        assert_eq!(LabelHash::parse(&hash.to_string()).unwrap(), hash);
    }

    #[test]
    fn a_label_says_how_long_blocks_it_tells_to_read() {
        for (asked, bytes) in [(None, 1 << 20), (Some(512), 1 << 20), (Some(4 << 20), 4 << 20)] {
            let mut label = Label::new("x").unwrap();
            assert_eq!(label.readable_bytes(), None);
            label.add("read", how_to_read(asked)).unwrap();
            assert_eq!(label.readable_bytes(), Some(bytes));
        }
        let mut label = Label::new("x").unwrap();
        label.add("read", "dd bs=1M").unwrap();
        assert_eq!(label.readable_bytes(), None, "somebody else's words");
    }

    #[test]
    fn the_hash_is_of_the_first_32768_bytes() {
        // By `head -c 32768 /dev/zero | sha256sum`.
        let zeros = "c35020473aed1b4642cd726cad727b63fff2824ad68cedd7ffb73c7cbd890479";
        assert_eq!(FirstBlock::of(&[0; 32_768]).hash().unwrap().to_string(), zeros);
        assert_eq!(FirstBlock::of(&[0; 65_536]).hash().unwrap().to_string(), zeros);
        assert_eq!(FirstBlock::of(&[0; 32_767]), FirstBlock::Short(32_767));
        assert_eq!(FirstBlock::of(b""), FirstBlock::Short(0));
        // With `-b` the original program wrote labels into longer blocks.
        let mut long = Label::new("x").unwrap().to_block();
        long.push(0);
        assert!(matches!(FirstBlock::of(&long), FirstBlock::Labelled(..)));
        long.push(1);
        assert!(matches!(FirstBlock::of(&long), FirstBlock::Other(_)));
    }

    #[test]
    fn what_is_no_label_is_refused() {
        let bad: &[&[u8]] = &[
            b"",
            b"t0version:1",
            b"t0version:1\n",
            b"t0version:1\nlabel:",
            b"t0version:1\nlabel:\n",
            b"t0version:1\nlabel:x",
            b"label:x\nt0version:1\n",
            b"t0version:1\nlabel:x\ny\n",
            b"t0version:1\nlabel:x\n:y\n",
            b"t0version:1\nlabel:x\n\n",
            b"t0version:1\nlabel:x\nlabel:y\n",
            b"t0version:1\nlabel:x\nt0version:1\n",
            b"t0version:1\nlabel:x\n\0y",
            b"t0version:1\nlabel:x\0\n",
            b"\0t0version:1\nlabel:x\n",
        ];
        for bytes in bad {
            let kind = Label::parse(bytes).unwrap_err().kind();
            assert_eq!(kind, ErrorKind::Corrupt, "{}", Quoted(bytes));
        }
        let kind = Label::parse(b"t0version:2\nlabel:x\n").unwrap_err().kind();
        assert_eq!(kind, ErrorKind::Version);
    }

    #[test]
    fn what_would_not_be_read_is_not_written() {
        for text in ["", "a\nb", "a\0b"] {
            assert_eq!(Label::new(text).unwrap_err().kind(), ErrorKind::Usage);
        }
        let room = LABEL_BYTES - VERSION.len() - LABEL.len() - 1;
        let mut label = Label::new(vec![b'x'; room]).unwrap();
        assert_eq!(Label::parse(&label.to_block()).unwrap(), label);
        assert!(Label::new(vec![b'x'; room + 1]).is_err());
        assert!(label.add("a", "").is_err());
        let mut label = Label::new(vec![b'x'; room - 2]).unwrap();
        label.add("a", "").unwrap_err();
        assert_eq!(label.fields().count(), 0);
        for key in ["", "label", "t0version", "a:b", "a\n", "\0"] {
            assert!(label.add(key, "x").is_err(), "{key:?}");
        }
    }

    proptest! {
        #[test]
        fn a_label_comes_back(
            text in prop::collection::vec(any::<u8>(), 1..300),
            fields in prop::collection::vec((any::<Vec<u8>>(), any::<Vec<u8>>()), 0..5),
        ) {
            let Ok(mut label) = Label::new(text) else { return Ok(()) };
            for (key, value) in fields {
                let _ = label.add(key, value);
            }
            prop_assert_eq!(&Label::parse(&label.to_text()).unwrap(), &label);
            let block = label.to_block();
            prop_assert_eq!(&Label::parse(&block).unwrap(), &label);
            prop_assert_eq!(Label::parse(&block).unwrap().to_block(), block);
        }
    }

    impl FirstBlock {
        fn hash(&self) -> Option<LabelHash> {
            match self {
                FirstBlock::Labelled(_, hash) | FirstBlock::Other(hash) => Some(*hash),
                FirstBlock::Short(_) => None,
            }
        }
    }
}
