//! Reading tapes: what was written comes back, wherever it came from, and damage is told.

use std::io::Read as _;
use std::path::Path;

use raidtape::error::ErrorKind;
use raidtape::tape::cpio::{Archive, Header, Reader};
use raidtape::tape::drive::Wrote;
use raidtape::tape::label::Label;
use raidtape::tape::loaded::Loaded;
use raidtape::tape::medium::Medium;
use raidtape::tape::read::{End, Head, Own, Visit, What, scan};

use crate::common::faultdrive::{FaultDrive, Plan, Trouble};
use crate::common::tape::{blank, open_image, scratch};

const A: &str = "28970c2a-8eea-4060-8fc9-574e562fda12";
const B: &str = "7a5ea04c-f6e5-41a3-895d-2ce6706aa1c6";

fn file(size: u64) -> Header {
    Header { mode: 0o100_644, nlink: 1, size, mtime: 1_455_999_395, ..Header::default() }
}

/// The archive of a batch, with these members behind its own.
fn archive(job: &str, number: u64, files: &[(&str, &[u8])]) -> Vec<u8> {
    let count = files.len();
    let batch = format!("%batch\nnumber {number}\ncount {count}\n\n%files\n");
    let batch = files.iter().fold(batch, |it, file| format!("{it}{}\n", file.0));
    let wjob = format!("%job\njob {job}\nroot /r\ntype w\n\n%batches\n{number} count {count}\n");
    let mut archive = Archive::new(Vec::new());
    let own =
        [(format!("/t0p/job/{job}/@{number}"), batch), (format!("/t0p/job/{job}/wjob"), wjob)];
    for (name, text) in &own {
        archive.add(&file(text.len() as u64), name.as_bytes(), &mut text.as_bytes()).unwrap();
    }
    for (name, content) in files {
        let mut content = *content;
        archive.add(&file(content.len() as u64), name.as_bytes(), &mut content).unwrap();
    }
    archive.finish(512).unwrap()
}

/// Writes tape files, each in blocks of this many bytes; `None` for one without a filemark.
fn write(path: &Path, files: &[(&[u8], usize)]) {
    let mut drive = open_image(path);
    drive.to_end_of_data().unwrap();
    for (bytes, block) in files {
        for block in bytes.chunks(*block) {
            assert_eq!(drive.write(block).unwrap(), Wrote::Whole);
        }
        assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
    }
    drive.close().unwrap();
}

#[test]
fn every_tape_file_is_a_stream_and_none_is_missed() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let long: Vec<u8> = (0..3_000_000u32).map(|it| (it / 7) as u8).collect();
    let label = Label::new("T").unwrap().to_block();
    // One block is longer than is usual.
    write(&path, &[(&label, 32_768), (&long, 10_000), (b"", 1), (&long, 2_500_000), (b"x", 1)]);
    let mut drive = open_image(&path);
    for read_all in [true, false] {
        drive.rewind().unwrap();
        let mut visit = Visit::new(&mut *drive, 0);
        let mut lens = Vec::new();
        while let Some(mut file) = visit.next_file().unwrap() {
            let (number, position) = (file.filenum(), file.position());
            let mut bytes = vec![0; if read_all { 4_000_000 } else { 10 }];
            let mut len = 0;
            while len < bytes.len() {
                match file.read(&mut bytes[len..]).unwrap() {
                    0 => break,
                    read => len += read,
                }
            }
            assert_eq!(file.offset(), len as u64);
            assert_eq!(file.end(), (len < bytes.len()).then_some(End::Filemark));
            if number == 1 || number == 3 {
                assert_eq!(bytes[..len], long[..len]);
            }
            lens.push((number, position, len, file.block_bytes()));
        }
        assert!(visit.next_file().unwrap().is_none());
        let (all, few) = (long.len(), 10);
        let expected = match read_all {
            true => [(0, 0, 32_768), (1, 2, all), (2, 303, 0), (3, 304, all), (4, 307, 1)],
            false => [(0, 0, few), (1, 2, few), (2, 303, 0), (3, 304, few), (4, 307, 1)],
        };
        let blocks = [32_768, 10_000, 0, 2_500_000, 1];
        let expected = expected.iter().zip(blocks).map(|(it, block)| (it.0, it.1, it.2, block));
        assert_eq!(lens, expected.collect::<Vec<_>>());
    }
    // From any byte of a file on.
    drive.locate(2).unwrap();
    let mut visit = Visit::new(&mut *drive, 1);
    let mut file = visit.next_file().unwrap().unwrap();
    for at in [2_999_999u64, 0, 9_999, 10_000, 10_001, 5, 2_990_000, 1_234_567, 1_234_568] {
        file.seek_to(at).unwrap();
        let mut byte = [0; 3];
        let len = file.read(&mut byte).unwrap();
        assert!(len > 0, "{at}");
        assert_eq!(byte[..len], long[at as usize..][..len], "{at}");
        assert_eq!(file.offset(), at + len as u64);
    }
    assert_eq!(file.seek_to(3_000_000).unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(file.seek_to(u64::MAX).unwrap_err().kind(), ErrorKind::Corrupt);
    file.seek_to(2_990_000).unwrap();
    assert_eq!(file.drain().unwrap(), (10_000, false));
    // Wherever it was, the next one follows.
    let file = visit.next_file().unwrap().unwrap();
    assert_eq!((file.filenum(), file.position(), file.end()), (2, 303, Some(End::Filemark)));
}

#[test]
fn a_scan_tells_what_each_tape_file_is() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let label = Label::new("T").unwrap().to_block();
    let first = archive(A, 3, &[("a", b"1"), ("b", b"22")]);
    let second = archive(B, 0, &[]);
    let mut foreign = Archive::new(Vec::new());
    foreign.add(&file(1), b"x", &mut &b"1"[..]).unwrap();
    let foreign = foreign.finish(512).unwrap();
    let junk = vec![b'j'; 1000];
    let cut = &first[..200];
    let files: [&[u8]; 7] = [&label, &first, b"", &second, &foreign, &junk, cut];
    let files = files.map(|it| (it, 512));
    write(&path, &files);
    let mut loaded = Loaded::with(open_image(&path), &path).unwrap();
    let mut seen = Vec::new();
    loaded.drive().rewind().unwrap();
    scan(loaded.drive(), 0, &mut |it| {
        seen.push(match &it.what {
            What::Archive(head) => format!(
                "{} {} {:?} {:?} {:?}{}",
                it.filenum,
                it.position,
                head.job.as_ref().map(|it| (&it.0[..2], it.1)),
                head.count(),
                head.member.as_ref().map(|it| String::from_utf8_lossy(&it.name).into_owned()),
                if head.damage.is_some() { " damaged" } else { "" }
            ),
            What::Unreadable(e) => format!("{} unreadable {:?}", it.filenum, e.kind()),
            what => format!("{} {what:?}", it.filenum),
        });
        Ok(true)
    })
    .unwrap();
    let blocks = (first.len().div_ceil(512) + 1) as u64;
    let third = 65 + blocks + 1;
    let foreign_at = third + second.len().div_ceil(512) as u64 + 1;
    let cut_at = foreign_at + foreign.len().div_ceil(512) as u64 + 1 + 3;
    let expected = [
        "0 Other".to_owned(),
        "1 65 Some((\"28\", 3)) Some(2) None".to_owned(),
        "2 Empty".to_owned(),
        format!("3 {third} Some((\"7a\", 0)) Some(0) None"),
        format!("4 {foreign_at} None None Some(\"x\")"),
        "5 Other".to_owned(),
        // Cut off in its head, which says so far whose it is.
        format!("6 {cut_at} Some((\"28\", 3)) Some(2) None damaged"),
    ];
    assert_eq!(seen, expected);
    // One that nobody has closed, and nothing at all.
    loaded.drive().rewind().unwrap();
    let mut count = 0;
    scan(loaded.drive(), 0, &mut |_| {
        count += 1;
        Ok(count < 3)
    })
    .unwrap();
    assert_eq!(count, 3);
}

#[test]
fn the_head_leaves_the_rest_to_be_read() {
    let bytes = archive(A, 7, &[("a", b"12345"), ("b", b"")]);
    let mut members = Reader::new(&*bytes);
    let head = Head::read(&mut members).unwrap();
    assert_eq!(head.job, Some((A.to_owned(), 7)));
    assert_eq!(head.fields.get("root"), Some(&b"/r"[..]));
    assert!(head.damage.is_none() && head.member.is_none());
    let member = members.next_member().unwrap().unwrap();
    assert_eq!((&*member.name, members.read_all(10).unwrap()), (&b"a"[..], b"12345".to_vec()));
    assert_eq!(Own::of(format!("job/{A}/@0").as_bytes()), Some(Own::Batch(A, 0)));
    assert_eq!(Own::of(format!("/x/{A}/@12.sha256").as_bytes()), Some(Own::Sums(A, 12)));
    for name in ["@0", "job/x/@0", &format!("{A}/@x"), &format!("{A}/@"), &format!("{A}/wjob2")] {
        assert_eq!(Own::of(name.as_bytes()), None, "{name}");
    }
    // A batch file that is no batch is told, and the files are there all the same.
    let mut archive = Archive::new(Vec::new());
    let name = format!("job/{A}/@1");
    archive.add(&file(3), name.as_bytes(), &mut &b"%no"[..]).unwrap();
    archive.add(&file(1), b"c", &mut &b"c"[..]).unwrap();
    let bytes = archive.finish(512).unwrap();
    let mut members = Reader::new(&*bytes);
    let head = Head::read(&mut members).unwrap();
    assert!(head.damage.is_some_and(|it| it.kind() == ErrorKind::Corrupt));
    assert_eq!(head.member.map(|it| it.name), Some(b"c".to_vec()));
    assert_eq!(members.read_all(1).unwrap(), b"c");
}

#[test]
fn an_error_in_one_tape_file_does_not_hide_the_next() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let bytes = vec![7; 5000];
    write(&path, &[(&bytes, 1000), (&bytes, 1000), (&bytes, 1000)]);
    let expected = [5000u64; 3];
    for trouble in [Trouble::Medium, Trouble::Reset] {
        // Whatever read fails.
        for at in 1..=18 {
            let plan = Plan { trouble, at, for_ever: false };
            let (mut drive, counter) = FaultDrive::open(&path, Some(plan));
            let mut visit = Visit::new(&mut *drive, 0);
            let (mut found, mut errors) = (Vec::new(), 0);
            while let Some(mut file) = visit.next_file().unwrap() {
                assert_eq!(file.position(), file.filenum() * 6);
                match file.drain() {
                    Ok((len, is_zero)) => found.push((file.filenum(), len, is_zero)),
                    Err(_) => {
                        errors += 1;
                        assert!(file.drain().is_err(), "what follows is not taken for the rest");
                    }
                }
            }
            assert_eq!((found.len(), errors, counter.hits()), (2, 1, 1), "{trouble:?} {at}");
            assert!(found.iter().all(|it| it.1 == expected[0] && !it.2));
        }
    }
}
