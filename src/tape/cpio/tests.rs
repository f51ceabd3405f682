//! Archives written and read back, and archives that nobody should have written.

#![allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::cast_sign_loss)]

use std::io::{self, Read};

use proptest::prelude::*;

use super::header::{ODC_6_MAX, ODC_11_MAX};
use super::*;
use crate::error::ErrorKind;
use crate::sys::c;

fn file(size: usize) -> Header {
    Header { mode: c::S_IFREG | 0o644, nlink: 1, size: size as u64, ..Header::default() }
}

/// Every member with its content.
fn read(archive: &[u8]) -> crate::error::Result<Vec<(Member, Vec<u8>)>> {
    let mut reader = Reader::new(archive);
    let mut members = Vec::new();
    while let Some(member) = reader.next_member()? {
        members.push((member, reader.read_all(1 << 20)?));
    }
    Ok(members)
}

fn whole(added: Added) -> (u64, Vec<Note>) {
    match added {
        Added::Whole { position, notes } => (position, notes),
        Added::Failed { errno } => panic!("{errno}"),
    }
}

prop_compose! {
    fn any_header()(
        mode: u32, uid: u32, gid: u32, nlink in 0u64..5, rdev: u32, mtime: i64, ino in 0u64..4,
        small: bool, kind in 0usize..7,
    ) -> Header {
        let kinds = [
            c::S_IFREG, c::S_IFLNK, c::S_IFIFO, c::S_IFSOCK, c::S_IFCHR, c::S_IFBLK, c::S_IFREG,
        ];
        let mode = mode & 0o7777 | kinds[kind];
        let (uid, gid, mtime) = match small {
            true => (uid & 0xffff, gid & 0xffff, mtime & 0x7fff_ffff),
            false => (uid, gid, mtime),
        };
        let rdev = if small { rdev & 0xffff } else { rdev };
        Header { dev: 7, ino, mode, uid, gid, nlink, rdev: rdev.into(), mtime, size: 0 }
    }
}

proptest! {
    #[test]
    fn what_is_written_comes_back(
        files in prop::collection::vec(
            (any_header(), prop::collection::vec(1u8.., 1..50), any::<Vec<u8>>()), 0..20),
        block in 1u32..5000,
    ) {
        let mut archive = Archive::new(Vec::new());
        let mut expected = Vec::new();
        for (header, name, content) in &files {
            let has_content = matches!(header.mode & c::S_IFMT, c::S_IFREG | c::S_IFLNK);
            let content = if has_content { &**content } else { &[] };
            let header = Header { size: content.len() as u64, ..header.clone() };
            let before = archive.position();
            match archive.add(&header, name, &mut &*content).unwrap() {
                Added::Whole { position, notes } => {
                    prop_assert_eq!(position, before);
                    expected.push((position, header, name, content, notes));
                }
                Added::Failed { errno } => {
                    prop_assert_eq!(errno, c::EINVAL);
                    prop_assert!(name.contains(&b'\n'));
                    prop_assert_eq!(archive.position(), before);
                }
            }
        }
        let bytes = archive.finish(block).unwrap();
        prop_assert_eq!(bytes.len() % block as usize, 0);
        let members = read(&bytes).unwrap();
        prop_assert_eq!(members.len(), expected.len());
        for ((member, content), (position, header, name, expected, notes)) in
            members.iter().zip(&expected)
        {
            prop_assert_eq!((&member.name, member.position), (*name, *position));
            prop_assert_eq!(&content[..], *expected);
            let mut reader = Reader::at(&bytes[*position as usize..], *position);
            let again = reader.next_member().unwrap();
            prop_assert_eq!(again.as_ref(), Some(member));
            let (it, given) = (&member.header, header);
            prop_assert_eq!(it.mtime == given.mtime, !notes.contains(&Note::Mtime));
            let owner = |it: &Header| (it.uid, it.gid);
            prop_assert_eq!(owner(it) == owner(given), !notes.contains(&Note::Owner));
            let mode = if notes.contains(&Note::Owner) { given.mode & !0o6000 } else { given.mode };
            prop_assert_eq!(it.mode, mode);
            prop_assert_eq!(it.device(), if given.is_device() { given.rdev } else { it.device() });
            let is_odc = member.format == Format::Odc;
            prop_assert_eq!(is_odc, !notes.contains(&Note::Large));
        }
        // Same number, same file. Devices 0:0 have no numbers.
        for (a, given_a) in members.iter().zip(&expected) {
            for (b, given_b) in members.iter().zip(&expected) {
                let (a, b) = (&a.0, &b.0);
                let may = |it: &Header| it.nlink > 1 && !(it.is_device() && it.rdev == 0);
                if may(&given_a.1) && may(&given_b.1) && a != b {
                    let is_same = (a.header.dev, a.header.ino) == (b.header.dev, b.header.ino);
                    prop_assert!(!is_same || given_a.1.ino == given_b.1.ino);
                }
            }
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes: Vec<u8>, magic in 0usize..6, digits in "[0-7]{0,200}") {
        let magics: [&[u8]; 6] =
            [b"070707", b"070717", b"070727", b"070701", b"070702", b"\xc7\x71"];
        let _ = read(&bytes);
        let _ = read(&[magics[magic], digits.as_bytes(), &bytes].concat());
    }
}

#[test]
fn an_archive_is_read_whole_or_not_at_all() {
    let mut archive = Archive::new(Vec::new());
    for name in ["a", "longer"] {
        whole(archive.add(&file(5), name.as_bytes(), &mut &b"12345"[..]).unwrap());
    }
    let end = archive.position() as usize + 76 + TRAILER.len() + 1;
    let bytes = archive.finish(512).unwrap();
    for len in 0..bytes.len() {
        let result = read(&bytes[..len]);
        assert_eq!(result.is_ok(), len >= end, "{len}");
        if let Err(e) = result {
            assert_eq!(e.kind(), ErrorKind::Corrupt);
        }
    }
    // A changed header is refused, or says something else; it never gives the same members.
    let whole = read(&bytes).unwrap();
    for at in (0..78).chain(83..166) {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x40;
        if let Ok(read) = read(&bytes) {
            assert_ne!(read, whole, "{at}");
        }
    }
}

#[test]
fn damage_is_told_where_it_begins() {
    let mut archive = Archive::new(Vec::new());
    archive.add(&file(5), b"a", &mut &b"12345"[..]).unwrap();
    let second = archive.position();
    archive.add(&file(5), b"b", &mut &b"12345"[..]).unwrap();
    let mut bytes = archive.finish(512).unwrap();
    bytes[second as usize + 3] = b'x';
    let mut reader = Reader::new(&*bytes);
    assert_eq!(reader.next_member().unwrap().unwrap().name, b"a");
    reader.next_member().unwrap_err();
    assert_eq!(reader.position(), second);
    assert!(reader.next_member().is_err() && reader.read(&mut [0]).is_err());
}

#[test]
fn only_files_and_links_have_content() {
    let header = |mode| Header { mode, ..file(5) };
    for mode in [c::S_IFDIR, c::S_IFCHR, c::S_IFIFO, c::S_IFSOCK, 0] {
        let mut archive = Archive::new(Vec::new());
        let added = archive.add(&header(mode), b"a", &mut &b"12345"[..]).unwrap();
        assert_eq!(added, Added::Failed { errno: c::EINVAL });
        let mut bytes = header(mode).encode(b"a").unwrap();
        bytes.extend(b"12345");
        bytes.extend(Header::trailer().unwrap());
        assert_eq!(read(&bytes).unwrap_err().kind(), ErrorKind::Corrupt, "{mode:o}");
    }
}

#[test]
fn every_field_holds_its_last_value_and_no_more() {
    let most = Header {
        dev: ODC_6_MAX,
        ino: ODC_6_MAX,
        mode: ODC_6_MAX as u32,
        uid: ODC_6_MAX as u32,
        gid: ODC_6_MAX as u32,
        nlink: ODC_6_MAX,
        rdev: ODC_6_MAX,
        mtime: ODC_11_MAX as i64,
        size: ODC_11_MAX,
    };
    let decode = |bytes: &[u8]| {
        let mut rest = bytes;
        header::decode(&mut |buffer| {
            rest.read_exact(buffer).unwrap();
            Ok(())
        })
        .unwrap()
    };
    let bytes = most.encode(b"x").unwrap();
    assert!(bytes.starts_with(b"070707777777777777"));
    assert_eq!(decode(&bytes).header, most);
    let over: &[fn(&mut Header)] = &[
        |it| it.dev += 1,
        |it| it.ino += 1,
        |it| it.uid = u32::MAX,
        |it| it.gid += 1,
        |it| it.nlink += 1,
        |it| it.rdev = u32::MAX.into(),
        |it| it.mtime = -1,
        |it| it.mtime = i64::MIN,
        |it| it.mtime += 1,
        |it| it.size = 1 << 33,
        |it| it.size = i64::MAX as u64,
    ];
    for change in over {
        let mut header = most.clone();
        change(&mut header);
        let bytes = header.encode(b"x").unwrap();
        assert!(bytes.starts_with(b"070727"));
        assert_eq!(bytes.len(), 116 + 2);
        let head = decode(&bytes);
        assert_eq!((head.header, head.format, head.name_len), (header, Format::Large, 2));
    }
    for change in [|it: &mut Header| it.rdev = 1 << 32, |it: &mut Header| it.mode = u32::MAX] {
        let mut header = most.clone();
        change(&mut header);
        assert!(header.encode(b"x").is_err());
    }
    assert!(most.encode(&[b'x'; NAME_BYTES_MAX]).is_err());
    assert!(most.encode(&[b'x'; NAME_BYTES_MAX - 1]).is_ok());
}

#[test]
fn names_that_break_an_archive_or_a_list_are_refused() {
    let mut archive = Archive::new(Vec::new());
    let long = vec![b'x'; NAME_BYTES_MAX];
    let cases: &[(&[u8], i32)] = &[
        (b"TRAILER!!!", c::EINVAL),
        (b"a\nb", c::EINVAL),
        (b"a\0b", c::EINVAL),
        (b"", c::EINVAL),
        (&long, c::ENAMETOOLONG),
    ];
    for (name, errno) in cases {
        let added = archive.add(&file(1), name, &mut &b"x"[..]).unwrap();
        assert_eq!(added, Added::Failed { errno: *errno });
    }
    assert_eq!(archive.position(), 0);
    for name in ["/TRAILER!!!", "TRAILER!!", "TRAILER!!!!", "./TRAILER!!!"] {
        whole(archive.add(&file(1), name.as_bytes(), &mut &b"x"[..]).unwrap());
    }
    assert_eq!(read(&archive.finish(1).unwrap()).unwrap().len(), 4);
}

/// Gives some bytes, then an error.
struct Failing(u64, i32);

impl Read for Failing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0 {
            0 => Err(io::Error::from_raw_os_error(self.1)),
            _ => {
                self.0 -= 1;
                buffer[0] = b'x';
                Ok(1)
            }
        }
    }
}

#[test]
fn a_file_that_changes_its_length_has_failed_and_the_archive_goes_on() {
    let mut archive = Archive::new(Vec::new());
    let mut add = |name: &[u8], content: &mut dyn Read| archive.add(&file(5), name, content);
    let failed = |errno| Added::Failed { errno };
    assert_eq!(add(b"short", &mut &b"123"[..]).unwrap(), failed(c::ESTALE));
    assert_eq!(add(b"long", &mut &b"123456"[..]).unwrap(), failed(c::ESTALE));
    assert_eq!(add(b"bad", &mut Failing(2, c::EIO)).unwrap(), failed(c::EIO));
    assert_eq!(add(b"bad end", &mut Failing(5, c::EACCES)).unwrap(), failed(c::EACCES));
    whole(add(b"good", &mut &b"12345"[..]).unwrap());
    let members = read(&archive.finish(512).unwrap()).unwrap();
    let contents: Vec<&[u8]> = members.iter().map(|it| &*it.1).collect();
    assert_eq!(contents, [&b"123\0\0"[..], b"12345", b"xx\0\0\0", b"xxxxx", b"12345"]);
}

/// Takes some bytes, then none.
struct Full(usize);

impl io::Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len().min(self.0);
        self.0 -= len;
        if len == 0 && !bytes.is_empty() {
            return Err(io::Error::from_raw_os_error(c::ENOSPC));
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn who_takes_no_more_ends_the_archive() {
    for room in 0..78 + 5 + 87 {
        let mut archive = Archive::new(Full(room));
        let result = archive
            .add(&file(5), b"a", &mut &b"12345"[..])
            .and_then(|_| archive.finish(1).map(|_| ()));
        assert_eq!(result.unwrap_err().errno(), Some(c::ENOSPC), "{room}");
    }
}

#[test]
fn numbers_stay_apart_when_inode_numbers_are_used_up() {
    let mut archive = Archive::new(io::sink());
    let mut seen = std::collections::HashSet::new();
    let link = |ino| Header { nlink: 2, ino, ..file(0) };
    for n in 0..(1 << 18) + 2 {
        let position = archive.position();
        let (at, notes) = whole(archive.add(&link(n), b"x", &mut io::empty()).unwrap());
        assert_eq!(at, position);
        let is_over = n >= 1 << 18;
        assert_eq!(notes, if is_over { vec![Note::Links] } else { Vec::new() });
    }
    for n in 0..3 {
        // The other names of the first of them.
        assert_eq!(whole(archive.add(&link(n), b"y", &mut io::empty()).unwrap()).1, []);
    }
    let mut ids = Archive::new(Vec::new());
    for n in 0..1000 {
        ids.add(&link(n / 2), b"x", &mut io::empty()).unwrap();
    }
    for (member, _) in read(&ids.finish(1).unwrap()).unwrap() {
        seen.insert((member.header.dev, member.header.ino));
    }
    assert_eq!(seen.len(), 500);
}

#[test]
fn sums_are_checked() {
    let header = |sum: u32| {
        format!(
            "070702{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}\
             {sum:08x}",
            1, 0o100_644, 0, 0, 1, 0, 3, 0, 0, 0, 0, 2
        )
    };
    let trailer = format!("070701{:0>88}{:08x}{:08x}TRAILER!!!\0\0\0\0", 0, 11, 0);
    let archive = |sum| [header(sum).as_bytes(), b"x\0", b"abc\0", trailer.as_bytes()].concat();
    let members = read(&archive(294)).unwrap();
    assert_eq!((&*members[0].0.name, &*members[0].1), (&b"x"[..], &b"abc"[..]));
    assert_eq!(members[0].0.format, Format::NewcSummed);
    let bytes = archive(295);
    let mut reader = Reader::new(&*bytes);
    reader.next_member().unwrap();
    // Also when the content is passed over.
    assert_eq!(reader.next_member().unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(reader.position(), 112);
}

#[test]
fn hostile_lengths_are_refused() {
    let odc = |name: &str, size: &str| format!("070707{:0>59}{name}{size}a\0", 0).into_bytes();
    assert!(read(&odc("000002", "77777777777")).is_err());
    assert!(read(&odc("000000", "00000000000")).is_err());
    assert!(read(&odc("777777", "00000000000")).is_err());
    assert!(read(&odc("00000x", "00000000000")).is_err());
    assert!(read(&odc("-00002", "00000000000")).is_err());
    let large = |size: &str, extra: &str| {
        let (dev, rest) = ("0".repeat(24), "0".repeat(6 + 32 + 16));
        format!("070727{dev}m{rest}n00020000{extra}s{size}:a\0").into_bytes()
    };
    assert!(read(&large("FFFFFFFFFFFFFFFF", "0000")).is_err());
    assert!(read(&large("7FFFFFFFFFFFFFFF", "0000")).is_err());
    assert!(read(&large("0000000000000000", "FFFF")).is_err());
    let mut good = large("0000000000000000", "0003");
    good.extend(b"abc");
    good.extend(Header::trailer().unwrap());
    assert_eq!(read(&good).unwrap().len(), 1);
    // More than is wanted in memory.
    let mut archive = Archive::new(Vec::new());
    archive.add(&file(5), b"a", &mut &b"12345"[..]).unwrap();
    let bytes = archive.finish(1).unwrap();
    let mut reader = Reader::new(&*bytes);
    reader.next_member().unwrap();
    assert!(reader.read_all(4).is_err());
}
