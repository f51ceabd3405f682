//! Tape images: against a plain model of a tape, after a crash, and as others write them.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use proptest::prelude::*;
use raidtape::error::ErrorKind;
use raidtape::tape::drive::{Access, BlockSize, Drive, Moved, Read, State, Why, Wrote};
use raidtape::tape::image::Image;
use raidtape::tape::medium::Medium;
use tempfile::TempDir;

use crate::common::Sandbox;
use crate::common::disk::Disk;
use crate::common::tape::{Model, Stand, blank, open_image as open, rest, scratch, steps};

/// What is found after a crash now: a copy of the file, cut and filled up with zeros behind what
/// was synced.
fn check_crash(model: &Model, dir: &Path, path: &Path, cut: u64) {
    let copy = dir.join("copy.tap");
    let expected = &model.objects[..model.safe];
    let lengths = expected.iter().map(|it| match it {
        Some(block) => 8 + (block.len() as u64).next_multiple_of(2),
        None => 4,
    });
    // Behind it is the mark that the tape ends, as soon as anything was written.
    let safe: u64 = lengths.sum::<u64>() + if model.is_written { 4 } else { 0 };
    for is_filled in [false, true] {
        fs::copy(path, &copy).unwrap();
        let file = fs::File::options().write(true).open(&copy).unwrap();
        let size = file.metadata().unwrap().len();
        file.set_len(safe + cut.min(size.saturating_sub(safe))).unwrap();
        if is_filled {
            file.set_len(size).unwrap();
        }
        let mut drive = open(&copy);
        assert_eq!(rest(&mut *drive), expected);
        assert_eq!(drive.write(b"more").unwrap(), Wrote::Whole);
        drive.rewind().unwrap();
        let found = rest(&mut *drive);
        assert_eq!(found[..model.safe], *expected);
        assert_eq!(found[model.safe..], [Some(b"more".to_vec()), None]);
    }
}

proptest! {
    #[test]
    fn an_image_is_a_tape(steps in steps(), cut in 0u64..400) {
        let dir = scratch();
        let path = blank(&dir, &Medium::default());
        let reopened = path.clone();
        let mut stand = Stand::new(Box::new(move || open(&reopened)), false);
        let mut model = Model::default();
        for (number, step) in steps.iter().enumerate() {
            model.take(&mut stand, step, number);
            check_crash(&model, dir.path(), &path, cut);
        }
        model.begin_motion();
        stand.drive().rewind().unwrap();
        prop_assert_eq!(rest(stand.drive()), model.objects);
    }

    #[test]
    fn any_bytes_are_read_or_refused(
        bytes: Vec<u8>, words in prop::collection::vec(word(), 0..12)
    ) {
        let dir = scratch();
        let path = dir.path().join("a.tap");
        let all: Vec<u8> = words.iter().flat_map(|it| it.to_le_bytes()).collect();
        for bytes in [bytes, all] {
            fs::write(&path, &bytes).unwrap();
            let mut drive = open(&path);
            let mut buffer = vec![0; 1000];
            for _ in 0..20 {
                if !matches!(drive.read(&mut buffer), Ok(it) if it != Read::EndOfData) {
                    break;
                }
            }
            let _ = drive.to_end_of_data();
        }
    }
}

/// Words that mean something, and some that do not.
fn word() -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(0),
        Just(0xFFFF_FFFF),
        Just(0xFFFF_FFFE),
        Just(0xFFFE_FFFF),
        0u32..12,
        (0u32..16, 0u32..6).prop_map(|it| it.0 << 28 | it.1),
        0xFFFE_0000u32..
    ]
}

/// A tape written by hand from the published format: what an object of each class is.
struct ByHand(Vec<u8>);

impl ByHand {
    fn word(mut self, word: u32) -> ByHand {
        self.0.extend(word.to_le_bytes());
        self
    }

    fn record(self, class: u32, data: &[u8]) -> ByHand {
        let word = class << 28 | data.len() as u32;
        let mut all = self.word(word);
        all.0.extend(data);
        all.0.extend((data.len() % 2 == 1).then_some(0));
        all.word(word)
    }

    fn open(&self, dir: &TempDir) -> Box<dyn Drive> {
        let path = dir.path().join("hand.tap");
        fs::write(&path, &self.0).unwrap();
        open(&path)
    }
}

#[test]
fn images_of_others_are_read() {
    let dir = scratch();
    let hand = ByHand(Vec::new())
        .record(0xE, b"a description")
        .record(0, &[7; 32768])
        .word(0)
        // A gap of which a block of 6 bytes has taken half a marker.
        .record(0, b"abcdef")
        .record(3, b"private")
        .word(0x7000_0001)
        .word(0xFFFF_FFFE);
    let mut hand = hand.word(0xFFFF_FFFE).record(0, b"odd");
    hand.0.extend([0xFF, 0xFF]);
    let hand = hand
        .word(0xFFFF_FFFE)
        .word(0xFFFF_FFFE)
        .record(0xB, b"reserved")
        .word(0xF123_4567)
        .word(0)
        .word(0)
        .word(0xFFFF_FFFF)
        .record(0, b"behind the end");
    let mut drive = hand.open(&dir);
    let block = |it: &[u8]| Some(it.to_vec());
    let all = [block(&[7; 32768]), None, block(b"abcdef"), block(b"odd"), None, None];
    assert_eq!(rest(&mut *drive), all);
    assert_eq!(drive.position().unwrap(), 6);
    // Appended at its end; what was behind it is gone.
    assert_eq!(drive.write(b"new").unwrap(), Wrote::Whole);
    drive.close().unwrap();
    let mut drive = open(&dir.path().join("hand.tap"));
    assert_eq!(rest(&mut *drive), [&all[..], &[block(b"new"), None]].concat());
    assert_eq!(drive.locate(3).unwrap(), Moved::There);
    assert_eq!(rest(&mut *drive)[0], block(b"odd"));
}

#[test]
fn records_that_were_read_badly_are_errors_and_are_passed() {
    let dir = scratch();
    let hand = ByHand(Vec::new()).record(0, b"ab").record(8, b"cd").record(8, b"").record(0, b"ef");
    let mut drive = hand.open(&dir);
    let mut buffer = [0; 10];
    assert_eq!(drive.read(&mut buffer).unwrap(), Read::Block(2));
    for position in 2..4 {
        assert_eq!(drive.read(&mut buffer).unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(drive.position().unwrap(), position);
    }
    assert_eq!(rest(&mut *drive), [Some(b"ef".to_vec())]);
}

#[test]
fn damage_names_the_byte_and_nothing_is_appended_behind_it() {
    let dir = scratch();
    let good = || ByHand(Vec::new()).record(0, b"abcd").word(0);
    let cases: Vec<(ByHand, &str)> = vec![
        (good().word(0x00FF_FFFF).word(1), "byte 16:"),
        (good().word(0x0FFF_FFFF), "byte 16:"),
        (good().word(4).word(0).word(5), "byte 16:"),
        (good().word(0xFFFE_0001), "byte 16:"),
        (good().word(0xFFFF_0000), "byte 16:"),
        (good().word(0x9000_0010), "byte 16:"),
        (ByHand([&good().0[..], &[1, 0, 0]].concat()), "byte 16:"),
    ];
    for (hand, place) in cases {
        let mut drive = hand.open(&dir);
        let mut buffer = [0; 10];
        assert_eq!(drive.read(&mut buffer).unwrap(), Read::Block(4));
        assert_eq!(drive.read(&mut buffer).unwrap(), Read::Filemark);
        for _ in 0..2 {
            let error = drive.read(&mut buffer).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.to_string().contains(place), "{error}");
            assert_eq!(drive.position().unwrap(), 2);
        }
        assert_eq!(drive.to_end_of_data().unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(drive.locate(9).unwrap_err().kind(), ErrorKind::Corrupt);
        drop(drive);
        assert_eq!(fs::read(dir.path().join("hand.tap")).unwrap(), hand.0);
    }
}

#[test]
fn what_is_written_is_the_published_format() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let mut drive = open(&path);
    for block in [&b"even"[..], b"odd"] {
        assert_eq!(drive.write(block).unwrap(), Wrote::Whole);
    }
    assert_eq!(drive.write_filemarks(2).unwrap(), Wrote::Whole);
    assert_eq!(drive.write(b"x").unwrap(), Wrote::Whole);
    drive.close().unwrap();
    let hand = ByHand(Vec::new()).record(0, b"even").record(0, b"odd").word(0).word(0);
    assert_eq!(fs::read(&path).unwrap(), hand.record(0, b"x").word(0).word(0xFFFF_FFFF).0);
}

#[test]
fn the_end_is_near_and_then_reached() {
    let dir = scratch();
    let medium = Medium { capacity: Some(10_000), early_warning: 3_000, ..Medium::default() };
    let path = blank(&dir, &medium);
    let mut drive = open(&path);
    let mut told = Vec::new();
    while told.len() < 2 {
        match drive.write(&[1; 992]).unwrap() {
            Wrote::Whole => {}
            Wrote::NotWritten(why) => told.push((why, drive.position().unwrap())),
        }
    }
    // The seventh block reaches into the last 3,000 bytes; the tenth would leave no room for two
    // filemarks.
    assert_eq!(told, [(Why::EarlyWarning, 7), (Why::Physical, 9)]);
    assert_eq!(drive.write(&[1; 100]).unwrap(), Wrote::Whole);
    assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
    assert_eq!(drive.write(&[1; 992]).unwrap(), Wrote::NotWritten(Why::Physical));
    drive.rewind().unwrap();
    assert_eq!(rest(&mut *drive).len(), 11);
    drive.close().unwrap();
    assert!(fs::metadata(&path).unwrap().len() <= 10_000);
}

#[test]
fn protected_tapes_stay_as_they_are() {
    let dir = scratch();
    for way in ["medium", "mode"] {
        let medium = Medium { write_protected: way == "medium", ..Medium::default() };
        let path = dir.path().join(format!("{way}.tap"));
        Image::create(&path, &medium).unwrap();
        fs::write(&path, ByHand(Vec::new()).record(0, b"abcd").word(0).0).unwrap();
        if way == "mode" {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
        }
        let before = fs::read(&path).unwrap();
        let mut drive = open(&path);
        assert!(drive.state().unwrap().write_protected);
        assert_eq!(drive.write(b"x").unwrap(), Wrote::NotWritten(Why::Protected));
        assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::NotWritten(Why::Protected));
        assert_eq!(rest(&mut *drive).len(), 2);
        drive.close().unwrap();
        assert_eq!(fs::read(&path).unwrap(), before);
    }
    let path = blank(&dir, &Medium::default());
    let mut drive = Image::open(&path, Access::Read).unwrap();
    assert_eq!(drive.write(b"x").unwrap_err().kind(), ErrorKind::Usage);
}

#[test]
fn a_worm_tape_is_only_appended_to() {
    let dir = scratch();
    let path = blank(&dir, &Medium { worm: true, ..Medium::default() });
    let mut drive = open(&path);
    for block in [&b"one"[..], b"two"] {
        assert_eq!(drive.write(block).unwrap(), Wrote::Whole);
    }
    drive.rewind().unwrap();
    assert_eq!(drive.state().unwrap().worm, Some(true));
    assert_eq!(drive.write(b"x").unwrap(), Wrote::NotWritten(Why::Worm));
    assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::NotWritten(Why::Worm));
    drive.to_end_of_data().unwrap();
    assert_eq!(drive.write(b"three").unwrap(), Wrote::Whole);
    drive.rewind().unwrap();
    assert_eq!(rest(&mut *drive).len(), 5);
}

#[test]
fn fixed_blocks_have_one_size() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let mut drive = open(&path);
    assert_eq!(drive.write(&[1; 512]).unwrap(), Wrote::Whole);
    assert_eq!(drive.write(&[1; 100]).unwrap(), Wrote::Whole);
    drive.rewind().unwrap();
    assert_eq!(drive.set_block_size(BlockSize::Fixed(0)).unwrap_err().kind(), ErrorKind::Usage);
    drive.set_block_size(BlockSize::Fixed(512)).unwrap();
    let mut buffer = [0; 600];
    assert_eq!(drive.read(&mut buffer).unwrap(), Read::Block(512));
    assert_eq!(drive.read(&mut buffer).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(drive.position().unwrap(), 1);
    assert_eq!(drive.write(&[1; 100]).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(drive.write(&[1; 0]).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(drive.write(&[2; 512]).unwrap(), Wrote::Whole);
    drive.rewind().unwrap();
    assert_eq!(rest(&mut *drive), [Some(vec![1; 512]), Some(vec![2; 512]), None]);
}

#[test]
fn one_at_a_time_has_the_tape() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let drive = open(&path);
    let second = Image::open(&path, Access::Read).err().unwrap();
    assert_eq!(second.kind(), ErrorKind::Locked);
    drive.close().unwrap();
    Image::open(&path, Access::Read).unwrap();
}

#[test]
fn a_drive_may_be_empty() {
    let dir = scratch();
    let image = blank(&dir, &Medium::default());
    let bay = dir.path().join("drive");
    fs::create_dir(&bay).unwrap();
    let mut drive = open(&bay);
    assert_eq!(drive.state().unwrap(), State::default());
    let refused = [
        drive.read(&mut [0; 9]).err(),
        drive.write(b"x").err(),
        drive.rewind().err(),
        drive.unload().err(),
        drive.position().err(),
    ];
    for error in refused {
        assert_eq!(error.unwrap().kind(), ErrorKind::WrongTape);
    }
    drive.close().unwrap();
    std::os::unix::fs::symlink(&image, bay.join("loaded")).unwrap();
    let mut drive = open(&bay);
    assert!(drive.state().unwrap().online);
    assert_eq!(drive.write(b"x").unwrap(), Wrote::Whole);
    drive.unload().unwrap();
    assert!(!drive.state().unwrap().online);
    assert!(fs::symlink_metadata(bay.join("loaded")).is_err());
    assert_eq!(rest(&mut *open(&image)), [Some(b"x".to_vec()), None]);
}

#[test]
fn a_full_disk_is_the_end_of_the_tape() {
    let sandbox = Sandbox::bare();
    let disk = Disk::ext4(&sandbox, "small", 8);
    let path = disk.point.join("a.tap");
    Image::create(&path, &Medium::default()).unwrap();
    let mut drive = open(&path);
    let block = vec![1; 1 << 18];
    let mut count = 0;
    while drive.write(&block).unwrap() == Wrote::Whole {
        count += 1;
    }
    assert!(count > 10, "{count}");
    // That was the warning. What closes an archive has room, another large block has not.
    assert_eq!(drive.write(&block).unwrap(), Wrote::NotWritten(Why::Physical));
    assert_eq!(drive.position().unwrap(), count);
    assert_eq!(drive.write(b"the end").unwrap(), Wrote::Whole);
    assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
    drive.close().unwrap();
    let mut drive = open(&path);
    drive.to_end_of_data().unwrap();
    assert_eq!(drive.position().unwrap(), count + 2);
    // What is removed makes room.
    assert_eq!(drive.locate(2).unwrap(), Moved::There);
    assert_eq!(drive.write(&block).unwrap(), Wrote::Whole);
    drive.rewind().unwrap();
    assert_eq!(rest(&mut *drive).len(), 4);
}

#[test]
fn places_on_a_long_tape_are_found() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let mut drive = open(&path);
    // More than are remembered.
    let count = 150_000u32;
    for number in 0..count {
        assert_eq!(drive.write(&number.to_le_bytes()).unwrap(), Wrote::Whole);
        if number % 9_999 == 9_998 {
            assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
        }
    }
    drive.close().unwrap();
    let mut drive = open(&path);
    let mut buffer = [0; 4];
    for wanted in [140_009u32, 3, 9_997, 80_000, 80_001, 12_345, 149_000] {
        assert_eq!(drive.locate(wanted.into()).unwrap(), Moved::There);
        assert_eq!(drive.state().unwrap().file, Some(u64::from(wanted / 10_000)));
        assert_eq!(drive.read(&mut buffer).unwrap(), Read::Block(4));
        assert_eq!(u32::from_le_bytes(buffer), wanted - wanted / 10_000);
    }
    assert_eq!(drive.space_files(-3).unwrap(), Moved::There);
    assert_eq!(drive.position().unwrap(), 110_000);
    drive.to_end_of_data().unwrap();
    assert_eq!(drive.position().unwrap(), u64::from(count + count / 9_999 + 1));
}

#[test]
fn an_image_that_shrinks_under_the_drive_is_an_error() {
    let dir = scratch();
    let path = dir.path().join("a.tap");
    fs::write(&path, ByHand(Vec::new()).record(0, &[1; 1000]).0).unwrap();
    let mut drive = open(&path);
    fs::File::options().write(true).open(&path).unwrap().set_len(500).unwrap();
    let error = drive.read(&mut [0; 2000]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0; 8], 0).unwrap();
}
