//! JSON objects of metas and manifests, written straight into a buffer.
//!
//! A run of a million files writes millions of these, so no tree of values is built for them. Names
//! are bytes and JSON is Unicode: a name that is not UTF-8 gets the key `KEY_b64` and base64.

use std::fmt::Display;
use std::io::Write;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::sys::Time;

/// One object being written.
pub struct Object<'a> {
    out: &'a mut Vec<u8>,
    is_empty: bool,
}

impl<'a> Object<'a> {
    /// Begins an object at the end of `out`.
    pub fn begin(out: &'a mut Vec<u8>) -> Object<'a> {
        out.push(b'{');
        Object { out, is_empty: true }
    }

    /// Ends it.
    pub fn end(self) {
        self.out.push(b'}');
    }

    /// Writes a key; its value has to follow in the buffer that is given back.
    pub fn key(&mut self, key: &str) -> &mut Vec<u8> {
        if !std::mem::replace(&mut self.is_empty, false) {
            self.out.push(b',');
        }
        put_text(self.out, key);
        self.out.push(b':');
        self.out
    }

    /// Adds a number, or a list of numbers that is formatted already.
    pub fn number(&mut self, key: &str, value: impl Display) {
        put_display(self.key(key), value);
    }

    /// Adds text.
    pub fn text(&mut self, key: &str, value: &str) {
        put_text(self.key(key), value);
    }

    /// Adds what prints as letters and digits only, as hashes do.
    pub fn plain(&mut self, key: &str, value: impl Display) {
        put_plain(self.key(key), value);
    }

    /// Adds bytes as base64.
    pub fn base64(&mut self, key: &str, value: &[u8]) {
        put_plain(self.key(key), BASE64.encode(value));
    }

    /// Adds a name.
    pub fn name(&mut self, key: &str, name: &[u8]) {
        match std::str::from_utf8(name) {
            Ok(text) => self.text(key, text),
            Err(_) => self.base64(&format!("{key}_b64"), name),
        }
    }

    /// Adds a time as `[seconds, nanoseconds]`.
    pub fn time(&mut self, key: &str, time: Time) {
        put_display(self.key(key), format_args!("[{},{}]", time.secs, time.nanos));
    }
}

/// Appends what prints as letters and digits only, in quotes.
pub fn put_plain(out: &mut Vec<u8>, value: impl Display) {
    put_display(out, format_args!("\"{value}\""));
}

fn put_display(out: &mut Vec<u8>, value: impl Display) {
    // A buffer in memory takes everything.
    let _ = write!(out, "{value}");
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    let _ = serde_json::to_writer(out, text);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    proptest! {
        #[test]
        fn any_name_is_written_as_json(name: Vec<u8>, text: String, number: i64) {
            let mut out = Vec::new();
            let mut object = Object::begin(&mut out);
            object.name("path", &name);
            object.text("text", &text);
            object.number("number", number);
            object.time("time", Time { secs: number, nanos: 7 });
            object.end();
            let value: Value = serde_json::from_slice(&out).unwrap();
            let found = match value.get("path_b64") {
                Some(code) => BASE64.decode(code.as_str().unwrap()).unwrap(),
                None => value["path"].as_str().unwrap().as_bytes().to_vec(),
            };
            prop_assert_eq!(found, name);
            prop_assert_eq!(value["text"].as_str(), Some(&*text));
            prop_assert_eq!(value["number"].as_i64(), Some(number));
            prop_assert_eq!(&value["time"], &serde_json::json!([number, 7]));
        }
    }
}
