//! The lines of a manifest between its first and its last, for everybody who reads them.
//!
//! A line has the keys of its kind and no others, and what they say is possible by itself: names,
//! numbers, and pieces that are as long as the file. What no program writes is refused, so whoever
//! compares a manifest and whoever replays it see the same.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::history::{check_version, name_from, time_from};
use super::run::VersionId;
use crate::chunk::Digest;
use crate::entry::{Extra, Kind, Metadata, flags_from_letters};
use crate::error::{Error, Result};
use crate::volume::BlockId;

/// Farthest end of a piece in the plain content of a block.
const PLACE_MAX: u64 = 1 << 62;

/// A line, of which the keys have been read; the methods of what is in it check what they say.
/// What is never escaped is borrowed.
pub enum Line<'a> {
    /// An entry that is new or changed.
    Put(Put<'a>),
    /// A further name of a version.
    Link(Link<'a>),
    /// An entry that is gone, with everything below it.
    Delete(Gone<'a>),
    /// A directory that stays while everything below it is gone.
    Empty(Gone<'a>),
    /// The name of a user or group number.
    Owner(Owner<'a>),
    /// What could not be read.
    Problem(Problem<'a>),
    /// The last line, which [`super::history::survey`] reads.
    End,
}

/// Text that is borrowed if nothing in it was escaped.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// A line of an entry.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Put<'a> {
    #[serde(borrow)]
    path: Option<Text<'a>>,
    path_b64: Option<&'a str>,
    /// Its kind.
    #[serde(deserialize_with = "word")]
    pub kind: Kind,
    version: VersionId,
    mode: u32,
    uid: u32,
    gid: u32,
    size: u64,
    mtime: (i64, u32),
    ctime: (i64, u32),
    ino: u64,
    nlink: u64,
    rdev: u64,
    hash: Option<&'a str>,
    #[serde(default, borrow)]
    extents: Vec<(Option<&'a str>, u64, u64)>,
    #[serde(borrow)]
    target: Option<Text<'a>>,
    target_b64: Option<&'a str>,
    #[serde(default, borrow)]
    xattrs: Vec<Attribute<'a>>,
    flags: Option<&'a str>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Attribute<'a> {
    #[serde(borrow)]
    key: Option<Text<'a>>,
    key_b64: Option<&'a str>,
    value_b64: &'a str,
}

/// A line of a further name.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link<'a> {
    #[serde(borrow)]
    path: Option<Text<'a>>,
    path_b64: Option<&'a str>,
    version: VersionId,
}

/// A line of what has gone.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gone<'a> {
    #[serde(borrow)]
    path: Option<Text<'a>>,
    path_b64: Option<&'a str>,
}

/// A line of an owner.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner<'a> {
    #[serde(borrow)]
    name: Option<Text<'a>>,
    name_b64: Option<&'a str>,
    kind: &'a str,
    /// The number.
    pub id: u32,
}

/// A line of a problem.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Problem<'a> {
    #[serde(borrow)]
    path: Option<Text<'a>>,
    path_b64: Option<&'a str>,
    /// The word for its kind.
    pub kind: &'a str,
    #[serde(borrow)]
    message: Text<'a>,
}

/// What a line says of an entry, but for the pieces of its content.
pub struct Said {
    /// Where.
    pub path: Vec<u8>,
    /// Its version.
    pub version: VersionId,
    /// Its metadata.
    pub meta: Metadata,
    /// The hash of a file.
    pub hash: Option<Digest>,
    /// Target, attributes and flags.
    pub extra: Extra,
}

/// A piece of a file: its block, or none for a hole, where it begins in there, and its length.
pub type Piece = (Option<BlockId>, u64, u64);

fn bad(what: impl fmt::Display) -> Error {
    Error::corrupt(what.to_string())
}

/// What stands for itself as a word.
fn word<'de, D, T>(from: D) -> std::result::Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: FromStr<Err = Error>,
{
    <&str>::deserialize(from)?.parse().map_err(D::Error::custom)
}

fn name(text: Option<&Text<'_>>, base64: Option<&str>, key: &str) -> Result<Vec<u8>> {
    name_from(text.map(|it| &*it.0), base64, key)
}

impl<'a> Line<'a> {
    /// Reads a line.
    pub fn parse(line: &'a [u8]) -> Result<Line<'a>> {
        serde_json::from_slice(line).map_err(bad)
    }
}

impl<'de> Deserialize<'de> for Line<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> std::result::Result<Line<'de>, D::Error> {
        from.deserialize_map(ByOp)
    }
}

/// Reads the keys that belong to a line's first one.
struct ByOp;

impl<'de> Visitor<'de> for ByOp {
    type Value = Line<'de>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a line of a manifest")
    }

    fn visit_map<A>(self, mut keys: A) -> std::result::Result<Line<'de>, A::Error>
    where
        A: MapAccess<'de>,
    {
        if keys.next_key::<&str>()? != Some("op") {
            return Err(A::Error::custom("the first key is not op"));
        }
        let op: &str = keys.next_value()?;
        let rest = MapAccessDeserializer::new(keys);
        match op {
            "put" => Put::deserialize(rest).map(Line::Put),
            "link" => Link::deserialize(rest).map(Line::Link),
            "delete" => Gone::deserialize(rest).map(Line::Delete),
            "empty" => Gone::deserialize(rest).map(Line::Empty),
            "owner" => Owner::deserialize(rest).map(Line::Owner),
            "problem" => Problem::deserialize(rest).map(Line::Problem),
            "end" => IgnoredAny::deserialize(rest).map(|_| Line::End),
            _ => Err(A::Error::custom(format_args!("unknown line {op:.50?}"))),
        }
    }
}

impl Put<'_> {
    /// Its path.
    pub fn path(&self) -> Result<Vec<u8>> {
        name(self.path.as_ref(), self.path_b64, "path")
    }

    /// Its version.
    pub fn version(&self) -> Result<VersionId> {
        check_version(self.version)
    }

    /// All that it says, when its pieces have been checked.
    pub fn read(&self) -> Result<Said> {
        self.check_content()?;
        Ok(Said {
            path: self.path()?,
            version: self.version()?,
            meta: self.metadata()?,
            hash: self.hash.map(str::parse).transpose()?,
            extra: self.extra()?,
        })
    }

    fn metadata(&self) -> Result<Metadata> {
        if self.size > i64::MAX.cast_unsigned() || self.nlink > i64::MAX.cast_unsigned() {
            return Err(bad("an impossible size or number of links"));
        }
        if self.mode > 0o7777 {
            return Err(bad("an impossible mode"));
        }
        Ok(Metadata {
            kind: self.kind,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            size: self.size,
            mtime: time_from(self.mtime)?,
            ctime: time_from(self.ctime)?,
            ino: self.ino,
            nlink: self.nlink,
            rdev: self.rdev,
        })
    }

    fn extra(&self) -> Result<Extra> {
        let has_target = self.target.is_some() || self.target_b64.is_some();
        if has_target && self.kind != Kind::Symlink {
            return Err(bad("a target of what is no link"));
        }
        let target = || name(self.target.as_ref(), self.target_b64, "target");
        Ok(Extra {
            target: has_target.then(target).transpose()?,
            xattrs: self.xattrs.iter().map(Attribute::read).collect::<Result<_>>()?,
            flags: self.flags.map_or(Ok(0), flags_from_letters)?,
        })
    }

    /// Whether its pieces are possible ones, and all of the file.
    fn check_content(&self) -> Result<()> {
        if self.kind != Kind::File {
            return match self.hash.is_none() && self.extents.is_empty() {
                true => Ok(()),
                false => Err(bad("content of what is no file")),
            };
        }
        if self.hash.is_none() {
            return Err(bad("no hash"));
        }
        let (mut total, mut was_hole) = (0u64, false);
        for (block, offset, len) in &self.extents {
            total = total.checked_add(*len).filter(|_| *len > 0).ok_or_else(|| bad("extents"))?;
            let is_hole = block.is_none();
            if std::mem::replace(&mut was_hole, is_hole) && is_hole {
                return Err(bad("a hole after a hole"));
            }
            if is_hole && *offset != 0 {
                return Err(bad("a hole that lies in a block"));
            }
            if offset.checked_add(*len).is_none_or(|it| it > PLACE_MAX) {
                return Err(bad("an impossible place in a block"));
            }
        }
        match total == self.size {
            true => Ok(()),
            false => Err(bad("its pieces are not as long as it is")),
        }
    }

    /// How many pieces its content has.
    pub fn piece_count(&self) -> usize {
        self.extents.len()
    }

    /// The pieces of its content, in order.
    pub fn pieces(&self) -> impl Iterator<Item = Result<Piece>> {
        self.extents.iter().map(|(block, offset, len)| {
            let block = block.map(str::parse).transpose()?;
            Ok((block, *offset, *len))
        })
    }
}

impl Attribute<'_> {
    fn read(&self) -> Result<(Vec<u8>, Vec<u8>)> {
        let key = name(self.key.as_ref(), self.key_b64, "key")?;
        let value = BASE64.decode(self.value_b64).map_err(|_| bad("value_b64 is none"))?;
        match key.is_empty() || key.contains(&0) {
            true => Err(bad("an impossible key of an attribute")),
            false => Ok((key, value)),
        }
    }
}

impl Link<'_> {
    /// Its path.
    pub fn path(&self) -> Result<Vec<u8>> {
        name(self.path.as_ref(), self.path_b64, "path")
    }

    /// The version that it is a name of.
    pub fn version(&self) -> Result<VersionId> {
        check_version(self.version)
    }
}

impl Gone<'_> {
    /// Its path.
    pub fn path(&self) -> Result<Vec<u8>> {
        name(self.path.as_ref(), self.path_b64, "path")
    }
}

impl<'a> Owner<'a> {
    /// Whether a `user` or a `group`.
    pub fn kind(&self) -> Result<&'a str> {
        match self.kind {
            "user" | "group" => Ok(self.kind),
            _ => Err(bad("no owner")),
        }
    }

    /// The name.
    pub fn name(&self) -> Result<Vec<u8>> {
        name(self.name.as_ref(), self.name_b64, "name")
    }
}

impl Problem<'_> {
    /// Where.
    pub fn path(&self) -> Result<Vec<u8>> {
        name(self.path.as_ref(), self.path_b64, "path")
    }

    /// What was said of it.
    pub fn message(&self) -> &str {
        &self.message.0
    }
}

#[cfg(test)]
mod tests;
