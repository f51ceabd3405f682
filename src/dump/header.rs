//! The heads of tar members: a ustar header, and before it what that has no room for.
//!
//! Long values, times finer than a second, large numbers, extended attributes and the map of a
//! sparse file go into a PAX header (POSIX.1-2001, with the keys that GNU tar, libarchive and star
//! share). PAX text is UTF-8, so a long name that is not goes into a GNU long-name member instead:
//! both readers put its bytes on the disk as they are.

use std::io::{self, Write};

use tar::{EntryType, Header};

use crate::entry::{Metadata, Xattr};
use crate::sys::{self, Time};

/// Everything in an archive begins at a multiple of this.
pub const BLOCK_BYTES: usize = 512;
/// Room for a name, and for a link's target, in the header.
const NAME_BYTES: usize = 100;
/// Room for the name of an owner, which ends with a zero.
const OWNER_BYTES: usize = 31;
/// Largest numbers in octal digits: of an owner or device, of a size, of a time.
const OWNER_MAX: u64 = 0o777_7777;
const SIZE_MAX: u64 = 0o777_7777_7777;
/// Attributes in which Linux keeps access control lists, and the keys for their text.
const ACLS: [(&[u8], &str); 2] = [
    (b"system.posix_acl_access", "SCHILY.acl.access"),
    (b"system.posix_acl_default", "SCHILY.acl.default"),
];

/// What a member is, apart from its content.
pub struct Member<'a> {
    /// Its name; that of a directory ends with a slash.
    pub name: &'a [u8],
    /// What it is.
    pub kind: EntryType,
    /// Target of a symbolic link; name of the member that it is another name of.
    pub target: &'a [u8],
    /// Its metadata.
    pub meta: &'a Metadata,
    /// Bytes of content that follow.
    pub size: u64,
    /// Name of its owner; empty if that is not known.
    pub user: &'a [u8],
    /// Name of its group.
    pub group: &'a [u8],
    /// Extended attributes.
    pub xattrs: &'a [Xattr],
    /// Whether its content is a map and data without the holes.
    pub is_sparse: bool,
}

impl Member<'_> {
    /// Writes the head.
    pub fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let header = self.header()?;
        let records = self.records();
        if !records.is_empty() {
            write_extra(EntryType::XHeader, b"././@PaxHeader", &records, out)?;
        }
        for (kind, value) in
            [(EntryType::GNULongLink, self.target), (EntryType::GNULongName, self.name)]
        {
            if value.len() > NAME_BYTES && std::str::from_utf8(value).is_err() {
                write_extra(kind, b"././@LongLink", &[value, b"\0"].concat(), out)?;
            }
        }
        out.write_all(header.as_bytes())
    }

    fn header(&self) -> io::Result<Header> {
        let meta = self.meta;
        let small = |n: u32| if u64::from(n) <= OWNER_MAX { u64::from(n) } else { 0 };
        let mut header = Header::new_ustar();
        header.set_entry_type(self.kind);
        header.set_mode(meta.mode);
        header.set_uid(small(meta.uid));
        header.set_gid(small(meta.gid));
        header.set_size(self.size);
        header.set_mtime(plain_seconds(meta.mtime).unwrap_or(0));
        if matches!(self.kind, EntryType::Char | EntryType::Block) {
            let (major, minor) = sys::device_parts(meta.rdev);
            if u64::from(major.max(minor)) > OWNER_MAX {
                return Err(io::Error::other("tar has no room for its device number"));
            }
            header.set_device_major(major)?;
            header.set_device_minor(minor)?;
        }
        if let Some(ustar) = header.as_ustar_mut() {
            put(&mut ustar.name, self.name);
            put(&mut ustar.linkname, self.target);
            put(&mut ustar.uname, self.user.get(..OWNER_BYTES).unwrap_or(self.user));
            put(&mut ustar.gname, self.group.get(..OWNER_BYTES).unwrap_or(self.group));
        }
        header.set_cksum();
        Ok(header)
    }

    /// The records of the PAX header; none if there is nothing to say.
    fn records(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let meta = self.meta;
        for (key, value, room) in [
            ("path", self.name, NAME_BYTES),
            ("linkpath", self.target, NAME_BYTES),
            ("uname", self.user, OWNER_BYTES),
            ("gname", self.group, OWNER_BYTES),
        ] {
            if value.len() > room && std::str::from_utf8(value).is_ok() {
                put_record(&mut out, key.as_bytes(), value);
            }
        }
        if plain_seconds(meta.mtime).is_none() {
            put_record(&mut out, b"mtime", decimal(meta.mtime).as_bytes());
        }
        for (key, value, most) in [
            ("uid", u64::from(meta.uid), OWNER_MAX),
            ("gid", u64::from(meta.gid), OWNER_MAX),
            ("size", self.size, SIZE_MAX),
        ] {
            if value > most {
                put_record(&mut out, key.as_bytes(), value.to_string().as_bytes());
            }
        }
        if self.is_sparse {
            put_record(&mut out, b"GNU.sparse.major", b"1");
            put_record(&mut out, b"GNU.sparse.minor", b"0");
            put_record(&mut out, b"GNU.sparse.name", self.name);
            put_record(&mut out, b"GNU.sparse.realsize", meta.size.to_string().as_bytes());
        }
        for (key, value) in self.xattrs {
            // GNU tar takes a key up to the first equals sign, so one that has it is written with
            // that sign as %3D and a percent sign as %25, as GNU tar does.
            let mut escaped = b"SCHILY.xattr.".to_vec();
            for byte in key {
                match byte {
                    b'%' => escaped.extend_from_slice(b"%25"),
                    b'=' => escaped.extend_from_slice(b"%3D"),
                    byte => escaped.push(*byte),
                }
            }
            put_record(&mut out, &escaped, value);
            let acl = ACLS.iter().find(|it| it.0 == key);
            if let Some((_, text_key)) = acl
                && let Some(text) = acl_text(value)
            {
                put_record(&mut out, text_key.as_bytes(), text.as_bytes());
            }
        }
        out
    }
}

/// Writes a member that says something about the one that follows.
fn write_extra(kind: EntryType, name: &[u8], body: &[u8], out: &mut dyn Write) -> io::Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(body.len() as u64);
    if let Some(ustar) = header.as_ustar_mut() {
        put(&mut ustar.name, name);
    }
    header.set_cksum();
    out.write_all(header.as_bytes())?;
    out.write_all(body)?;
    out.write_all(padding(body.len() as u64))
}

/// The zeros after content of this length.
pub fn padding(len: u64) -> &'static [u8] {
    const ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
    let over = usize::try_from(len % BLOCK_BYTES as u64).unwrap_or(0);
    let missing = (BLOCK_BYTES - over) % BLOCK_BYTES;
    ZEROS.get(..missing).unwrap_or_default()
}

/// The map of a sparse file (PAX format 1.0): how many stretches of data, where each begins and how
/// long it is, a line each, padded.
pub fn sparse_map(segments: &[(u64, u64)], size: u64) -> Vec<u8> {
    let mut stretches: Vec<(u64, u64)> = segments.iter().map(|it| (it.0, it.1 - it.0)).collect();
    if segments.last().is_none_or(|it| it.1 < size) {
        // A stretch of nothing says where the last hole ends.
        stretches.push((size, 0));
    }
    let mut map = format!("{}\n", stretches.len()).into_bytes();
    for (start, len) in stretches {
        map.extend_from_slice(format!("{start}\n{len}\n").as_bytes());
    }
    map.extend_from_slice(padding(map.len() as u64));
    map
}

fn put(field: &mut [u8], value: &[u8]) {
    for (to, from) in field.iter_mut().zip(value) {
        *to = *from;
    }
}

/// A record: its own length in decimal, a space, `key=value`, a newline.
fn put_record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    out.extend_from_slice(format!("{len} ").as_bytes());
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

/// A time that the header itself can hold.
fn plain_seconds(time: Time) -> Option<u64> {
    u64::try_from(time.secs).ok().filter(|secs| *secs <= SIZE_MAX && time.nanos == 0)
}

/// Seconds in decimal with nine places, also before 1970: -1 s and 250 ms is -0.75 s.
fn decimal(time: Time) -> String {
    let (mut secs, mut nanos) = (i128::from(time.secs), time.nanos);
    let sign = if secs < 0 { "-" } else { "" };
    if secs < 0 && nanos > 0 {
        secs += 1;
        nanos = 1_000_000_000 - nanos;
    }
    format!("{sign}{}.{nanos:09}", secs.abs())
}

/// An access control list as `getfacl` writes it, with numbers for names; `None` if it is none.
fn acl_text(value: &[u8]) -> Option<String> {
    let (version, mut rest) = value.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != 2 || rest.len() % 8 != 0 {
        return None;
    }
    let mut words = Vec::new();
    while let Some((item, more)) = rest.split_first_chunk::<8>() {
        let [tag_low, tag_high, perm, _, a, b, c, d] = *item;
        let id = u32::from_le_bytes([a, b, c, d]);
        let who = match u16::from_le_bytes([tag_low, tag_high]) {
            0x01 => "user:".to_owned(),
            0x02 => format!("user:{id}"),
            0x04 => "group:".to_owned(),
            0x08 => format!("group:{id}"),
            0x10 => "mask:".to_owned(),
            0x20 => "other:".to_owned(),
            _ => return None,
        };
        let bit = |bit: u8, letter: char| if perm & bit != 0 { letter } else { '-' };
        words.push(format!("{who}:{}{}{}", bit(4, 'r'), bit(2, 'w'), bit(1, 'x')));
        rest = more;
    }
    Some(words.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_its_own_length() {
        let record = |key: &str, value: &str| {
            let mut out = Vec::new();
            put_record(&mut out, key.as_bytes(), value.as_bytes());
            String::from_utf8(out).unwrap()
        };
        assert_eq!(record("a", "b"), "6 a=b\n");
        for len in 0..2_000 {
            let text = record("path", &"x".repeat(len));
            let (number, _) = text.split_once(' ').unwrap();
            assert_eq!(number.parse::<usize>().unwrap(), text.len());
        }
    }

    #[test]
    fn times_before_1970_count_backwards() {
        let at = |secs, nanos| decimal(Time { secs, nanos });
        assert_eq!(at(1, 500_000_000), "1.500000000");
        assert_eq!(at(-1, 250_000_000), "-0.750000000");
        assert_eq!(at(-2, 0), "-2.000000000");
        assert_eq!(at(i64::MIN, 0), "-9223372036854775808.000000000");
    }

    #[test]
    fn lists_of_access_become_text() {
        let mut value = 2u32.to_le_bytes().to_vec();
        for (tag, perm, id) in
            [(1u16, 6u16, u32::MAX), (2, 4, 1000), (4, 5, u32::MAX), (0x10, 7, 0), (0x20, 0, 0)]
        {
            value.extend(tag.to_le_bytes());
            value.extend(perm.to_le_bytes());
            value.extend(id.to_le_bytes());
        }
        let text = "user::rw-,user:1000:r--,group::r-x,mask::rwx,other::---";
        assert_eq!(acl_text(&value).as_deref(), Some(text));
        for bad in [&b""[..], b"\x02\0\0", b"\x01\0\0\0", &value[..value.len() - 1]] {
            assert_eq!(acl_text(bad), None);
        }
    }

    #[test]
    fn a_map_ends_where_the_file_ends() {
        let map = sparse_map(&[(0, 10), (100, 200)], 1_000);
        assert_eq!(map.len(), BLOCK_BYTES);
        assert!(map.starts_with(b"3\n0\n10\n100\n100\n1000\n0\n\0"));
        assert!(sparse_map(&[(5, 10)], 10).starts_with(b"1\n5\n5\n\0"));
        assert!(sparse_map(&[], 7).starts_with(b"1\n7\n0\n\0"));
    }

    #[test]
    fn what_the_header_has_no_room_for_is_read_from_the_records() {
        let meta = Metadata {
            kind: crate::entry::Kind::File,
            mode: 0o4755,
            uid: u32::MAX - 1,
            gid: 3_000_000,
            size: 9 << 30,
            mtime: Time { secs: 1, nanos: 5 },
            ctime: Time::default(),
            ino: 1,
            nlink: 1,
            rdev: 0,
        };
        let name = "n".repeat(200);
        let xattrs = [(b"user.k=v%".to_vec(), b"\0\xff=".to_vec())];
        let member = Member {
            name: name.as_bytes(),
            kind: EntryType::Regular,
            target: b"",
            meta: &meta,
            size: meta.size,
            user: b"me",
            group: b"us",
            xattrs: &xattrs,
            is_sparse: false,
        };
        let mut bytes = Vec::new();
        member.write(&mut bytes).unwrap();
        let mut archive = tar::Archive::new(&*bytes);
        let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(entry.path_bytes(), name.as_bytes());
        assert_eq!((entry.size(), entry.header().mode().unwrap()), (9 << 30, 0o4755));
        let records: Vec<(String, Vec<u8>)> = entry
            .pax_extensions()
            .unwrap()
            .unwrap()
            .map(|it| it.map(|it| (it.key().unwrap().to_owned(), it.value_bytes().to_vec())))
            .collect::<io::Result<_>>()
            .unwrap();
        let value =
            |key: &str| records.iter().find(|it| it.0 == key).map(|it| it.1.clone()).unwrap();
        assert_eq!(value("uid"), b"4294967294");
        assert_eq!(value("gid"), b"3000000");
        assert_eq!(value("size"), b"9663676416");
        assert_eq!(value("mtime"), b"1.000000005");
        assert_eq!(value("SCHILY.xattr.user.k%3Dv%25"), b"\0\xff=");
    }

    #[test]
    fn padding_fills_the_last_block() {
        assert_eq!([0, 1, 511, 512, 513].map(|it| padding(it).len()), [0, 511, 1, 0, 511]);
    }
}
