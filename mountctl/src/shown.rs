//! Text for people out of bytes which need not be text.
//!
//! Invariant: nothing returned here holds a control character or a byte that is not UTF-8, so a
//! file name can neither move the cursor nor break a line. The result is for display only.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;

/// A file name or path for a message.
pub fn shown<S: AsRef<OsStr> + ?Sized>(name: &S) -> String {
    shown_bytes(name.as_ref().as_bytes())
}

/// Arbitrary bytes for a message.
pub fn shown_bytes(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character.is_control() {
                text.extend(character.escape_default());
            } else {
                text.push(character);
            }
        }
        for byte in chunk.invalid() {
            // Writing into a String has no way to fail.
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// A name for JSON output, which escapes control characters by itself but has no bytes.
pub fn json_text(name: &OsStr) -> String {
    match name.to_str() {
        Some(text) => text.to_owned(),
        None => shown(name),
    }
}

/// A size with one decimal in binary units.
pub fn shown_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut divisor: u128 = 1024;
    let mut name = "KiB";
    for unit in UNITS.into_iter().skip(1) {
        if u128::from(bytes) < divisor * 1024 {
            break;
        }
        divisor *= 1024;
        name = unit;
    }
    let tenths = (u128::from(bytes) * 10 + divisor / 2) / divisor;
    format!("{}.{} {name}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_and_stray_bytes_are_escaped() {
        assert_eq!(shown_bytes(b"a\nb\x1b[0m"), "a\\nb\\u{1b}[0m");
        assert_eq!(shown_bytes(b"a\xffb"), "a\\xffb");
        assert_eq!(shown_bytes("gr\u{fc}n".as_bytes()), "gr\u{fc}n");
    }

    #[test]
    fn sizes_have_one_decimal() {
        assert_eq!(shown_size(0), "0 B");
        assert_eq!(shown_size(1023), "1023 B");
        assert_eq!(shown_size(1024), "1.0 KiB");
        assert_eq!(shown_size(12_897_485), "12.3 MiB");
        assert_eq!(shown_size(u64::MAX), "16.0 EiB");
    }
}
