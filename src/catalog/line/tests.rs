//! Lines as they are written, and with every bit of them changed.

use super::*;
use crate::catalog::history::{Survey, survey_text};
use crate::catalog::manifest::{End, Header, Previous, Spool};
use crate::catalog::run::{Counts, Tally};
use crate::catalog::tests::{any_content, any_metadata};
use crate::catalog::told::Told;
use crate::catalog::{Content, Extent};
use crate::chunk::HashAlgo;
use crate::sys::Time;
use crate::volume::{Status, VolumeConfig};
use proptest::prelude::*;

fn block(number: u64) -> BlockId {
    Digest([u8::try_from(number % 251).unwrap() ^ 0xaf; 32])
}

/// The text of a manifest that says all that manifests say.
fn text_of(spool: &mut Spool, run: i64, previous: Option<Previous>) -> Vec<u8> {
    let tags = ["nightly".to_owned(), "with \"quotes\"".to_owned()];
    let volume = VolumeConfig {
        number: 1,
        uuid: "6f9619ff-8b86".to_owned(),
        path: "/mnt/disk 1".into(),
        status: Status::Active,
        reserve_percent: 10,
    };
    let header = Header {
        run,
        uuid: "3ba7ce1d-9b92",
        source: b"/home/\xff",
        started: Time { secs: 1_790_000_000, nanos: 20 },
        hash: HashAlgo::Blake3,
        tags: &tags,
        comment: "before\u{1b} the move",
        path: b"/home/me",
        host: b"host",
        program: "raidtape 1",
        settings: vec![("chunking".to_owned(), "fastcdc".to_owned())],
        volumes: vec![volume],
        basis: previous.as_ref().map(|it| (it.run, it.uuid.clone())),
        previous,
    };
    let entries = Tally { added: 10, modified: 2, deleted: 1, unchanged: 100 };
    let dirs = Tally { added: 1, modified: 0, deleted: 0, unchanged: 30 };
    let (files, bytes) = (110, 1_048_576);
    let counts =
        Counts { entries, dirs, files, bytes, bytes_read: 70, bytes_stored: 60, problems: 1 };
    let end = End { finished: Time { secs: 1_790_000_100, nanos: 0 }, counts: &counts };
    let mut out = Vec::new();
    spool.write_manifest(&header, &end, &mut |it| Ok(block(it)), &mut out).unwrap();
    zstd::decode_all(&out[..]).unwrap()
}

fn meta(kind: Kind, size: u64) -> Metadata {
    let time = |secs| Time { secs, nanos: 123_456_700 };
    let (mode, uid, gid, ino) = (0o750, 1000, 100, 70_010);
    let (mtime, ctime) = (time(-5), time(1_700_000_000));
    Metadata { kind, mode, uid, gid, size, mtime, ctime, ino, nlink: 2, rdev: 0 }
}

/// Manifests of two runs: directories, files with holes and without bytes, links of both kinds,
/// attributes, flags, devices, owners, names that are no UTF-8, problems, and what has gone.
fn two_runs() -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let mut spool = Spool::new(dir.path()).unwrap();
    let put = |spool: &mut Spool, path: &[u8], version, meta: Metadata, content: Content| {
        spool.put(path, version, &meta, &content).unwrap();
    };
    put(&mut spool, b"", 1, meta(Kind::Dir, 0), Content::default());
    let key = |it: &[u8]| (it.to_vec(), vec![0, 0xff, 7, 0x20]);
    let xattrs = vec![key(b"user.a"), key(b"user.\xfe\n")];
    let content = Content {
        hash: Some(Digest([0xcd; 32])),
        extents: vec![
            Extent::Data { block: 3, offset: 0, len: 100 },
            Extent::Hole { len: 4096 },
            Extent::Data { block: 77, offset: 1050, len: 10 },
        ],
        extra: Extra { target: None, xattrs, flags: 0x50 },
    };
    put(&mut spool, b"dir/a \"name\"", 2, meta(Kind::File, 4206), content);
    spool.link(b"dir/link", 2).unwrap();
    let hash = Some(Digest([0xe3; 32]));
    put(&mut spool, b"empty", 3, meta(Kind::File, 0), Content { hash, ..Content::default() });
    let to = |it: &[u8]| Extra { target: Some(it.to_vec()), ..Extra::default() };
    let links: [(&[u8], &[u8]); 2] = [(b"to", b"dir/\x1b"), (b"t\xc3\xb6", b"\xff\xfe")];
    for (n, (path, target)) in (4..).zip(links) {
        let content = Content { extra: to(target), ..Content::default() };
        put(&mut spool, path, n, meta(Kind::Symlink, 5), content);
    }
    let device = Metadata { rdev: 0x801, ..meta(Kind::BlockDevice, 0) };
    put(&mut spool, b"disk", 6, device, Content::default());
    spool.owner("user", 1000, b"me").unwrap();
    spool.owner("group", 100, b"us\xffers").unwrap();
    spool.problem(b"dir/secret", "denied", "cannot be read: \"EACCES\"\n").unwrap();
    let first = text_of(&mut spool, 1, None);
    let digest = Some(survey(&first).unwrap().digest);
    let previous = Previous { run: 1, uuid: "3ba7ce1d-9b92".to_owned(), digest };
    let mut spool = Spool::new(dir.path()).unwrap();
    spool.delete(b"to").unwrap();
    spool.empty(b"dir").unwrap();
    spool.link(b"late\xff", 3).unwrap();
    put(&mut spool, b"", 7, meta(Kind::Dir, 0), Content::default());
    vec![first, text_of(&mut spool, 2, Some(previous))]
}

fn survey(text: &[u8]) -> Result<Survey> {
    survey_text(&mut &*text, &|| Ok(()))
}

fn told(line: &[u8]) -> Result<Told> {
    let mut told = Told::default();
    told.add_line(&Line::parse(line)?, &mut Vec::new())?;
    Ok(told)
}

/// Every bit of these bytes turned over, with its byte and number.
fn flips(bytes: &[u8]) -> impl Iterator<Item = (usize, Vec<u8>)> {
    (0..bytes.len() * 8).map(|bit| {
        let mut flipped = bytes.to_vec();
        flipped[bit / 8] ^= 1 << (bit % 8);
        (bit / 8, flipped)
    })
}

fn shown(line: &[u8], flipped: &[u8], at: usize) -> String {
    let range = at.saturating_sub(20)..(at + 10).min(line.len());
    let [line, flipped] =
        [line, flipped].map(|it| String::from_utf8_lossy(&it[range.clone()]).into_owned());
    format!("{line:?} as {flipped:?}")
}

#[test]
fn no_bit_of_a_manifest_changes_unseen() {
    let (mut unseen, mut count) = (Vec::new(), 0);
    for text in two_runs() {
        let good = survey(&text).unwrap();
        for (at, flipped) in flips(&text) {
            count += 1;
            let Ok(found) = survey(&flipped) else { continue };
            // What a catalog is held against besides the lines.
            let of = |it: &Survey| {
                let tail = it.tail.unwrap();
                (it.digest, it.head.uuid.clone(), tail.counts, tail.finished)
            };
            if of(&good) == of(&found) {
                unseen.push(shown(&text, &flipped, at));
            }
        }
    }
    assert!(unseen.is_empty() && count > 20_000, "{count}: {unseen:#?}");
}

#[test]
fn no_bit_of_a_line_changes_unseen_even_if_the_digest_were_right() {
    let (mut unseen, mut count) = (Vec::new(), 0);
    for text in two_runs() {
        let lines: Vec<&[u8]> = text.split_inclusive(|it| *it == b'\n').collect();
        for line in &lines[1..lines.len() - 1] {
            let good = told(line).unwrap();
            // What has gone leaves nothing to compare: these have to be refused, or say so.
            let path = |line: &[u8]| match Line::parse(line) {
                Ok(Line::Delete(gone)) => gone.path().ok().map(|it| (true, it)),
                Ok(Line::Empty(gone)) => gone.path().ok().map(|it| (false, it)),
                _ => None,
            };
            let gone = path(line);
            for (at, flipped) in flips(line) {
                count += 1;
                if told(&flipped).is_ok_and(|it| it == good && path(&flipped) == gone) {
                    unseen.push(shown(line, &flipped, at));
                }
            }
        }
    }
    // The same byte, which JSON may spell in two ways.
    let is_spelling = |it: &String| it.contains("u001b") && it.contains("u001B");
    assert!(unseen.len() == 1 && unseen.iter().all(is_spelling), "{unseen:#?}");
    assert!(count > 10_000, "{count}");
}

#[test]
fn what_no_program_writes_is_refused() {
    let [text, _] = &two_runs()[..] else { panic!() };
    let lines: Vec<&str> = std::str::from_utf8(text).unwrap().lines().collect();
    let said = |line: &str| told(line.as_bytes()).map_err(|it| it.to_string());
    for (from, to, why) in [
        ("{\"op\":\"put\",", "{", "op"),
        ("\"op\":\"put\",", "\"format\":2,\"op\":\"put\",", "op"),
        ("\"op\":\"put\"", "\"op\":\"push\"", "push"),
        ("\"mode\"", "\"mote\"", "mote"),
        ("\"uid\":1000,", "\"uid\":1000,\"uid\":1000,", "duplicate"),
        ("\"uid\":1000,", "", "uid"),
        ("\"hash\":\"cdcd", "\"hash\":\"Cdcd", "lower case"),
        ("[[\"acac", "[[\"aCac", "lower case"),
        ("[null,0,4096]", "[null,4,4096]", "hole"),
        ("[null,0,4096]", "[null,0,4095]", "long"),
        ("[null,0,4096]", "[null,0,4095],[null,0,1]", "hole"),
        (",0,100]", ",18446744073709551615,100]", "place"),
        (",0,100]", ",0,0]", "extents"),
        ("\"kind\":\"file\"", "\"kind\":\"dir\"", "no file"),
        ("\"flags\":", "\"target\":\"x\",\"flags\":", "no link"),
        ("\"mode\":488", "\"mode\":4096", "mode"),
        ("\"nlink\":2", "\"nlink\":9223372036854775808", "links"),
        ("\"version\":2", "\"version\":281474976710657", "version"),
        ("\"key\":\"user.a\"", "\"key\":\"\"", "key"),
        ("\"key\":\"user.a\"", "\"key\":\"user.a\",\"id\":1", "id"),
    ] {
        let line = lines.iter().find(|it| it.contains("\"version\":2,\"mode")).unwrap();
        said(line).unwrap();
        assert!(line.contains(from), "{from}: {line}");
        let error = said(&line.replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(why), "{to}: {error}");
    }
    for (of, from, to) in [
        ("link", "\"version\":2", "\"version\":2,\"mode\":1"),
        ("owner", "\"user\"", "\"dog\""),
        ("problem", "\"kind\":\"denied\",", ""),
    ] {
        let line = lines.iter().find(|it| it.contains(&format!("\"op\":\"{of}\"")));
        assert!(line.unwrap().contains(from), "{line:?}");
        said(&line.unwrap().replacen(from, to, 1)).unwrap_err();
    }
}

proptest! {
    #[test]
    fn what_was_written_is_read(
        path: Vec<u8>,
        version in 1i64..1 << 48,
        mut meta in any_metadata(),
        mut content in any_content(),
    ) {
        let is_file = meta.kind == Kind::File;
        let mut was_hole = false;
        content.extents.retain(|it| {
            let is_hole = matches!(it, Extent::Hole { .. });
            is_file && !(std::mem::replace(&mut was_hole, is_hole) && is_hole)
        });
        let len = |it: &Extent| match it {
            Extent::Hole { len } | Extent::Data { len, .. } => *len,
        };
        if is_file {
            meta.size = content.extents.iter().map(len).sum();
        }
        content.hash = is_file.then(|| content.hash.unwrap_or(Digest([1; 32])));
        content.extra.target.take_if(|_| meta.kind != Kind::Symlink);
        content.extra.xattrs.retain(|it| !it.0.is_empty() && !it.0.contains(&0));
        let dir = tempfile::tempdir()?;
        let mut spool = Spool::new(dir.path())?;
        spool.put(&path, version, &meta, &content)?;
        let text = text_of(&mut spool, 1, None);
        let line = text.split(|it| *it == b'\n').nth(1).unwrap();
        let Line::Put(put) = Line::parse(line)? else { panic!() };
        let said = put.read()?;
        prop_assert_eq!((said.path, said.version, said.meta), (path, version, meta));
        prop_assert_eq!((said.hash, said.extra), (content.hash, content.extra));
        let pieces: Vec<Piece> = put.pieces().collect::<Result<_>>()?;
        let expected: Vec<Piece> = content.extents.iter().map(|it| match *it {
            Extent::Hole { len } => (None, 0, len),
            Extent::Data { block: number, offset, len } => (Some(block(number)), offset, len),
        }).collect();
        prop_assert_eq!(pieces, expected);
    }

    #[test]
    fn any_line_is_read_or_refused(bytes: Vec<u8>, text in "[ -~]{0,60}") {
        let _ = told(&bytes);
        for op in ["put", "link", "delete", "empty", "owner", "problem", "end"] {
            let _ = told(format!("{{\"op\":\"{op}\",{text}}}").as_bytes());
        }
    }
}
