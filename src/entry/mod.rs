//! Entries: what a tree is made of, with all metadata that is kept.
//!
//! [`capture`] takes metadata off a tree, [`apply`] puts it on one; they stand beside each other in
//! `metadata.rs` so that both cover the same fields. A name is exactly one component
//! ([`check_name`]): no stored structure can make a restore leave its target. Where content lies is
//! not known here.

pub mod acl;
mod flags;
mod made;
mod metadata;

pub use flags::{apply_flags, flag_letters, flags_from_letters, prepare};
pub use made::{apply_handle, apply_made, has_xattrs, remove_other_xattrs};
pub use metadata::{Applied, apply, apply_fd, capture, capture_file};

use std::str::FromStr;

use crate::error::{Error, Quoted, Result};
use crate::sys::{Stat, Time, c};
use crate::wire::{self, Reader};

/// What an entry is. The numbers are part of the catalog's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Regular file.
    File = 1,
    /// Directory.
    Dir = 2,
    /// Symbolic link.
    Symlink = 3,
    /// Named pipe.
    Fifo = 4,
    /// Unix socket.
    Socket = 5,
    /// Character device.
    CharDevice = 6,
    /// Block device.
    BlockDevice = 7,
}

const KINDS: [(Kind, &str, u32); 7] = [
    (Kind::File, "file", c::S_IFREG),
    (Kind::Dir, "dir", c::S_IFDIR),
    (Kind::Symlink, "symlink", c::S_IFLNK),
    (Kind::Fifo, "fifo", c::S_IFIFO),
    (Kind::Socket, "socket", c::S_IFSOCK),
    (Kind::CharDevice, "char-device", c::S_IFCHR),
    (Kind::BlockDevice, "block-device", c::S_IFBLK),
];

impl Kind {
    /// The kind that a mode's type bits stand for.
    pub fn from_mode(mode: u32) -> Option<Kind> {
        KINDS.iter().find(|row| row.2 == mode & c::S_IFMT).map(|row| row.0)
    }

    /// The kind with this number in the catalog.
    pub fn from_number(number: u8) -> Option<Kind> {
        KINDS.iter().find(|row| row.0 as u8 == number).map(|row| row.0)
    }

    /// The type bits of a mode.
    pub fn type_bits(self) -> u32 {
        KINDS.iter().find(|row| row.0 == self).map_or(0, |row| row.2)
    }

    /// The word for it in manifests and listings.
    pub fn as_str(self) -> &'static str {
        KINDS.iter().find(|row| row.0 == self).map_or("unknown", |row| row.1)
    }
}

impl FromStr for Kind {
    type Err = Error;

    fn from_str(word: &str) -> Result<Kind> {
        let row = KINDS.iter().find(|row| row.1 == word);
        row.map(|row| row.0)
            .ok_or_else(|| Error::corrupt(format!("unknown kind of entry {word:?}")))
    }
}

/// The metadata that `stat` gives and that is kept with every entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// What it is.
    pub kind: Kind,
    /// Permission bits, setuid, setgid and sticky included (12 bits).
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// For a file, the number of content bytes that are kept; for a link, the target's length.
    pub size: u64,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of content or metadata, at the source.
    pub ctime: Time,
    /// Inode number at the source.
    pub ino: u64,
    /// Number of names at the source.
    pub nlink: u64,
    /// Device number of a device node, else 0.
    pub rdev: u64,
}

impl Metadata {
    /// What `stat` says, or `None` for a file type that Linux does not have.
    pub fn from_stat(stat: &Stat) -> Option<Metadata> {
        let kind = Kind::from_mode(stat.mode)?;
        let has_size = matches!(kind, Kind::File | Kind::Symlink);
        let is_device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
        Some(Metadata {
            kind,
            mode: stat.mode & 0o7777,
            uid: stat.uid,
            gid: stat.gid,
            size: if has_size { stat.size } else { 0 },
            mtime: stat.mtime,
            ctime: stat.ctime,
            ino: stat.ino,
            nlink: stat.nlink,
            rdev: if is_device { stat.rdev } else { 0 },
        })
    }

    /// Whether nothing has happened to the file since `basis` was taken: size, times of change and
    /// inode number are what they were. The time of change of the inode cannot be set by a user,
    /// so a restored mtime does not hide an edit.
    pub fn is_unchanged_since(&self, basis: &Metadata) -> bool {
        self == basis
    }
}

/// An extended attribute: key with its namespace, and value.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// The metadata that only some entries have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extra {
    /// Target of a symbolic link.
    pub target: Option<Vec<u8>>,
    /// Extended attributes, sorted by key. ACLs and capabilities are among them.
    pub xattrs: Vec<Xattr>,
    /// File flags that a user can set, by the kernel's numbers; 0 where there are none.
    pub flags: u32,
}

const EXTRA_TARGET: u64 = 1;
const EXTRA_XATTR: u64 = 2;
const EXTRA_FLAGS: u64 = 3;

impl Extra {
    /// Whether there is nothing to keep.
    pub fn is_empty(&self) -> bool {
        self.target.is_none() && self.xattrs.is_empty() && self.flags == 0
    }

    /// The catalog's form: items of a tag and what belongs to it. Tag 1: link target. Tag 2: key
    /// and value of an attribute. Tag 3: file flags.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        if let Some(target) = &self.target {
            wire::put_u64(&mut out, EXTRA_TARGET);
            wire::put_bytes(&mut out, target);
        }
        for (key, value) in &self.xattrs {
            wire::put_u64(&mut out, EXTRA_XATTR);
            wire::put_bytes(&mut out, key);
            wire::put_bytes(&mut out, value);
        }
        if self.flags != 0 {
            wire::put_u64(&mut out, EXTRA_FLAGS);
            wire::put_u64(&mut out, self.flags.into());
        }
        out
    }

    /// Reads what [`Extra::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Extra> {
        let mut reader = Reader::new(bytes, "extra metadata");
        let mut extra = Extra::default();
        while !reader.is_empty() {
            match reader.u64()? {
                EXTRA_TARGET => extra.target = Some(reader.bytes()?.to_vec()),
                EXTRA_XATTR => {
                    extra.xattrs.push((reader.bytes()?.to_vec(), reader.bytes()?.to_vec()));
                }
                EXTRA_FLAGS => extra.flags = flags::check(reader.u64()?)?,
                tag => return Err(Error::corrupt(format!("extra metadata: unknown tag {tag}"))),
            }
        }
        Ok(extra)
    }
}

/// The directory's path and the name in it.
pub fn split_path(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|it| *it == b'/') {
        Some(at) => (path.get(..at).unwrap_or_default(), path.get(at + 1..).unwrap_or_default()),
        None => (&[], path),
    }
}

/// The path of `name` in the directory at `path`; an empty path is the root.
pub fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    match path.is_empty() {
        true => name.to_vec(),
        false => [path, b"/", name].concat(),
    }
}

/// Checks that `name` is one component of a path and nothing else.
pub fn check_name(name: &[u8]) -> Result<()> {
    let bad = name.is_empty()
        || name == b"."
        || name == b".."
        || name.len() > 255
        || name.iter().any(|byte| matches!(byte, 0 | b'/'));
    match bad {
        true => Err(Error::corrupt(format!("impossible file name '{}'", Quoted(name)))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn extras_come_back(
            target: Option<Vec<u8>>,
            xattrs: Vec<(Vec<u8>, Vec<u8>)>,
            flags: u32,
        ) {
            let extra = Extra { target, xattrs, flags: flags & 0x2283_c4ff };
            prop_assert_eq!(Extra::decode(&extra.encode())?, extra);
        }

        #[test]
        fn any_extra_is_read_or_refused(bytes: Vec<u8>) {
            let _ = Extra::decode(&bytes);
        }
    }

    #[test]
    fn flags_have_letters_and_unknown_ones_are_refused() {
        assert_eq!(flag_letters(0x30), "ai");
        assert_eq!(flag_letters(0x0080_0048), "SdC");
        for (bytes, fits) in [(&[3, 0x30][..], true), (&[3, 0x80, 0x80, 0x20], false)] {
            assert_eq!(Extra::decode(bytes).is_ok(), fits, "{bytes:?}");
        }
        assert!(Extra::decode(&[3, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]).is_err());
    }

    #[test]
    fn names_are_one_component() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"/", b"a\0b", &[b'x'; 256]] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        for good in [&b"a"[..], b"...", b"\xff\n", &[b'x'; 255]] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn every_kind_has_its_number_word_and_mode() {
        for (kind, word, bits) in KINDS {
            assert_eq!(Kind::from_mode(bits | 0o644), Some(kind));
            assert_eq!(Kind::from_number(kind as u8), Some(kind));
            assert_eq!(word.parse::<Kind>().unwrap(), kind);
            assert_eq!(kind.type_bits(), bits);
        }
    }
}
