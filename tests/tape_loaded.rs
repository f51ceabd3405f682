//! A tape is known by its first block, and one that is not as the spool knows it is not written.

use raidtape::error::ErrorKind;
use raidtape::tape::drive::Wrote;
use raidtape::tape::label::{Label, LabelHash};
use raidtape::tape::loaded::{First, Loaded, Start};
use raidtape::tape::medium::Medium;
use raidtape::tape::spool::Spool;
use raidtape::tape::spool::log::TapeFile;

use crate::common::faultdrive::{FaultDrive, Plan, Trouble};
use crate::common::tape::{blank, open_image, scratch, spoil_first_block};

const JOB: &str = "5e9916c8-c5ce-4bb0-a2fb-ccea03a5e3d6";

#[test]
fn a_tape_is_known_by_its_first_block() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let mut loaded = Loaded::with(open_image(&path), &path).unwrap();
    assert_eq!(loaded.first(), &First::Blank);
    assert_eq!(loaded.expect_label(b"T1").unwrap_err().kind(), ErrorKind::WrongTape);

    let mut label = Label::new("T1").unwrap();
    label.add("created", "1455999395").unwrap();
    loaded.write_label(&label).unwrap();
    loaded.expect_label(b"T1").unwrap();
    assert_eq!(loaded.expect_label(b"T").unwrap_err().kind(), ErrorKind::WrongTape);
    loaded.close().unwrap();

    let mut loaded = Loaded::with(open_image(&path), &path).unwrap();
    assert_eq!(loaded.label(), Some(&label));
    loaded.expect_hash(LabelHash::of(&label.to_block()).unwrap()).unwrap();
    let other = LabelHash::of(&[0; 32_768]).unwrap();
    assert_eq!(loaded.expect_hash(other).unwrap_err().kind(), ErrorKind::WrongTape);

    // Somebody changes the tape behind our back.
    loaded.drive().rewind().unwrap();
    let other = Label::new("T2").unwrap();
    assert_eq!(loaded.drive().write(&other.to_block()).unwrap(), Wrote::Whole);
    let refused = loaded.again().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::WrongTape);
    assert!(refused.to_string().contains("T1") && refused.to_string().contains("T2"), "{refused}");
    loaded.expect_label(b"T1").unwrap();
}

#[test]
fn first_blocks_of_every_kind_are_told_apart() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let mut drive = open_image(&path);
    drive.write_filemarks(1).unwrap();
    drive.write(b"x").unwrap();
    let loaded = Loaded::with(drive, &path).unwrap();
    assert_eq!(loaded.first(), &First::Filemark);

    for len in [1, 32_767, 32_768, 300_000, 2 << 20] {
        let dir = scratch();
        let path = blank(&dir, &Medium::default());
        let mut drive = open_image(&path);
        drive.write(&vec![7; len]).unwrap();
        let loaded = Loaded::with(drive, &path).unwrap();
        let hash = (len >= 32_768).then(|| LabelHash::of(&[7; 32_768]).unwrap());
        assert_eq!(loaded.hash(), hash, "{len}");
        assert!(matches!(loaded.first(), First::Block(_)), "{len}");
    }
}

#[test]
fn what_is_appended_goes_behind_all_that_is_known() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let spool = Spool::create(&dir.path().join("spool")).unwrap();
    let label = Label::new("T1").unwrap();
    let tape = spool.add_tape(&label).unwrap();
    let mut loaded = Loaded::with(open_image(&path), &path).unwrap();
    loaded.write_label(&label).unwrap();
    assert_eq!(loaded.to_end(&tape).unwrap(), Start { filenum: 1, position: 2 });

    for filenum in 1..4 {
        let start = loaded.to_end(&tape).unwrap();
        assert_eq!(start.filenum, filenum);
        let file = TapeFile { filenum, position: start.position, job: JOB.into(), batch: 0 };
        tape.add_file(&file).unwrap();
        loaded.drive().write(&[1; 100]).unwrap();
        loaded.drive().write_filemarks(1).unwrap();
    }
    // Overwritten from the second file on: as long as its place is there again, nobody can tell.
    loaded.drive().locate(4).unwrap();
    loaded.drive().write(&[2; 100]).unwrap();
    loaded.drive().write_filemarks(1).unwrap();
    let refused = loaded.to_end(&tape).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::WrongTape);
    assert!(refused.to_string().contains("file 3 at position 6"), "{refused}");
}

#[test]
fn a_tape_file_that_was_never_closed_is_closed_first() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let spool = Spool::create(&dir.path().join("spool")).unwrap();
    let label = Label::new("T1").unwrap();
    let tape = spool.add_tape(&label).unwrap();
    let mut loaded = Loaded::with(open_image(&path), &path).unwrap();
    loaded.write_label(&label).unwrap();
    loaded.close().unwrap();

    // The power fails: no filemark follows the blocks.
    let (mut drive, _) = FaultDrive::open(&path, None);
    drive.to_end_of_data().unwrap();
    drive.write(&[1; 100]).unwrap();
    drive.write_filemarks(0).unwrap();
    drop(drive);

    let mut bytes = std::fs::read(&path).unwrap();
    let block = [&100u32.to_le_bytes()[..], &[1; 100], &100u32.to_le_bytes()].concat();
    let at = bytes.windows(block.len()).position(|it| it == block).expect("the block is there");
    bytes.truncate(at + block.len());
    let copy = dir.path().join("copy.tap");
    std::fs::write(&copy, bytes).unwrap();
    let mut loaded = Loaded::with(open_image(&copy), &copy).unwrap();
    assert_eq!(loaded.to_end(&tape).unwrap(), Start { filenum: 2, position: 4 });
    assert_eq!(loaded.to_end(&tape).unwrap(), Start { filenum: 2, position: 4 });
}

#[test]
fn a_label_is_written_wholly_or_refused_at_every_fault() {
    for at in 1.. {
        let dir = scratch();
        let path = blank(&dir, &Medium::default());
        let plan = Plan { trouble: Trouble::Medium, at, for_ever: true };
        let (drive, counter) = FaultDrive::open(&path, Some(plan));
        let label = Label::new("T1").unwrap();
        let written = Loaded::with(drive, &path).and_then(|mut it| it.write_label(&label));
        assert_eq!(written.is_err(), counter.hits() > 0, "{at}");
        if written.is_ok() {
            assert!(at > 5, "where are the operations?");
            let loaded = Loaded::with(open_image(&path), &path).unwrap();
            loaded.expect_label(b"T1").unwrap();
            return;
        }
    }
}

#[test]
fn a_tape_whose_first_block_cannot_be_read_is_no_known_one() {
    let dir = scratch();
    let path = blank(&dir, &Medium::default());
    let mut loaded = Loaded::with(open_image(&path), &path).unwrap();
    loaded.write_label(&Label::new("T1").unwrap()).unwrap();
    loaded.again().unwrap();
    loaded.close().unwrap();
    spoil_first_block(&path);
    let mut loaded = Loaded::with(open_image(&path), &path).unwrap();
    let First::Unreadable(why) = loaded.first() else { panic!("{:?}", loaded.first()) };
    assert!(why.contains(path.to_str().unwrap()) && why.contains("block 0"), "{why}");
    assert_eq!((loaded.label(), loaded.hash()), (None, None));
    let refused = loaded.expect_label(b"T1").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::WrongTape);
    assert!(refused.to_string().contains("block 0"), "{refused}");
    // It is not the same as itself.
    assert_eq!(loaded.again().unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(loaded.readable().err().unwrap().kind(), ErrorKind::Io);
}

#[test]
fn short_blocks_of_the_first_file_are_put_together() {
    let block = Label::new("T1").unwrap().to_block();
    let hash = LabelHash::of(&block).unwrap();
    for len in [1, 512, 5120, 10_240, 32_767] {
        let dir = scratch();
        let path = blank(&dir, &Medium::default());
        let mut drive = open_image(&path);
        block.chunks(len).for_each(|it| assert_eq!(drive.write(it).unwrap(), Wrote::Whole));
        let loaded = Loaded::with(drive, &path).unwrap();
        assert_eq!(loaded.hash(), Some(hash), "{len}");
        loaded.expect_label(b"T1").unwrap();
    }
    // As `tar` writes it; and what ends before.
    for (blocks, hash) in [(4, LabelHash::of(&[7; 32_768])), (3, None)] {
        let dir = scratch();
        let path = blank(&dir, &Medium::default());
        let mut drive = open_image(&path);
        for _ in 0..blocks {
            drive.write(&[7; 10_240]).unwrap();
        }
        drive.write_filemarks(1).unwrap();
        drive.write(&[7; 10_240]).unwrap();
        let loaded = Loaded::with(drive, &path).unwrap();
        assert_eq!(loaded.hash(), hash, "{blocks}");
    }
}
