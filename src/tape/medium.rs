//! What a tape image pretends of its medium: a small file of text beside it.
//!
//! Invariant: an image without it is as good a tape, which is only longer: it ends where the disk
//! is full. Nothing that is needed to read a tape is here.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::sys::{self, quoted};

/// Largest file of this kind.
const BYTES_MAX: u64 = 4096;

/// The properties of a tape.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Medium {
    /// Bytes of the image at which the tape ends; `None` where the disk does.
    pub capacity: Option<u64>,
    /// How far before that the drive begins to warn, in bytes.
    pub early_warning: u64,
    /// It may not be written.
    pub write_protected: bool,
    /// It can only be appended to.
    pub worm: bool,
}

impl Medium {
    /// The file beside an image.
    pub fn path(image: &Path) -> PathBuf {
        let mut name = image.as_os_str().to_owned();
        name.push(".medium");
        PathBuf::from(name)
    }

    /// Reads that of an image.
    pub fn read(image: &Path) -> Result<Medium> {
        // Beside the image itself, not the link that leads to it.
        let image = image.canonicalize().unwrap_or_else(|_| image.to_path_buf());
        let path = Medium::path(&image);
        let failed = |e| Error::io(format!("reading {}", quoted(&path)), e);
        let text = match sys::read_small(&path, BYTES_MAX) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Medium::default()),
            read => read.map_err(failed)?,
        };
        Medium::parse(&text).map_err(|e| e.context(quoted(&path)))
    }

    /// Writes that of an image, durably. An image that is open does not notice.
    pub fn write(&self, image: &Path) -> Result<()> {
        let path = Medium::path(image);
        if *self == Medium::default() && sys::lstat(&path).is_err() {
            return Ok(());
        }
        sys::replace_file(&path, self.to_text().as_bytes())
    }

    fn to_text(&self) -> String {
        let mut text = String::new();
        if let Some(capacity) = self.capacity {
            text += &format!("capacity {capacity}\n");
        }
        text += &format!("early-warning {}\n", self.early_warning);
        for (is, word) in [(self.write_protected, "write-protected"), (self.worm, "worm")] {
            text += if is { word } else { "" };
            text += if is { "\n" } else { "" };
        }
        text
    }

    fn parse(text: &[u8]) -> Result<Medium> {
        let mut medium = Medium::default();
        for line in text.split(|it| *it == b'\n').filter(|it| !it.is_empty()) {
            let line = String::from_utf8_lossy(line);
            let number = |text: &str| {
                text.parse::<u64>()
                    .map_err(|_| Error::corrupt(format!("'{line}' has no number of bytes")))
            };
            match line.split_once(' ') {
                Some(("capacity", text)) => medium.capacity = Some(number(text)?),
                Some(("early-warning", text)) => medium.early_warning = number(text)?,
                None if line == "write-protected" => medium.write_protected = true,
                None if line == "worm" => medium.worm = true,
                _ => {
                    let what = format!("'{}' is no property of a tape", line.escape_default());
                    return Err(Error::corrupt(what));
                }
            }
        }
        Ok(medium)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(
            capacity: Option<u64>, early_warning: u64, write_protected: bool, worm: bool
        ) {
            let medium = Medium { capacity, early_warning, write_protected, worm };
            prop_assert_eq!(Medium::parse(medium.to_text().as_bytes()).unwrap(), medium);
        }

        #[test]
        fn any_text_is_read_or_refused(bytes: Vec<u8>, text in "[a-z0-9 \n-]{0,40}") {
            let _ = Medium::parse(&bytes);
            let _ = Medium::parse(text.as_bytes());
        }
    }

    #[test]
    fn what_it_does_not_know_is_named() {
        for text in ["capacity\n", "capacity x\n", "capacity -1\n", "wurm\n"] {
            Medium::parse(text.as_bytes()).unwrap_err();
        }
    }
}
