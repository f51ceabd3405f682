//! `t0label`, and the tape that a drive of the spool has: what is written over, and what is not.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use raidtape::tape::drive::Wrote;
use raidtape::tape::image::Image;
use raidtape::tape::label::{Label, LabelHash};
use raidtape::tape::medium::Medium;
use raidtape::tape::spool::log::TapeFile;
use raidtape::tape::spool::tape::TapeStatus;

use crate::common::tape::{open_image, rest, spoil_first_block};
use crate::common::verbs::Place;

/// Puts an image into the drive by hand, as a person does.
fn put_in(place: &Place, name: &str) {
    let link = place.base.join("drive/loaded");
    let _ = fs::remove_file(&link);
    symlink(place.image(name), &link).unwrap();
}

/// Writes these blocks, and a filemark, to an image.
fn fill(place: &Place, name: &str, blocks: &[&[u8]]) {
    let mut drive = open_image(&place.image(name));
    drive.to_end_of_data().unwrap();
    for block in blocks {
        assert_eq!(drive.write(block).unwrap(), Wrote::Whole);
    }
    assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
    drive.close().unwrap();
}

fn contents(place: &Place, name: &str) -> Vec<Option<Vec<u8>>> {
    let mut drive = open_image(&place.image(name));
    let found = rest(&mut *drive);
    drive.close().unwrap();
    found
}

#[test]
fn a_label_is_written_shown_and_checked() {
    let place = Place::with_drive();
    let said = place.fails(7, &["t0label"]);
    assert!(said.contains("there is no tape"), "{said}");
    assert_eq!(place.code(&["t0label", "-k", "T1"]), 7);
    put_in(&place, "A");
    assert!(place.fails(7, &["t0label"]).contains("a blank tape"));
    assert!(place.fails(7, &["t0label", "-r", "-h"]).contains("a blank tape"));
    assert!(place.ok(&["t0label", "-n", "-w", "T1"]).contains("would be written"));
    assert_eq!(contents(&place, "A"), []);
    place.ok(&["t0label", "-w", "-b", "65536", "-p", "owner=me: you", "-p", "created=7", "T1"]);
    assert_eq!(place.ok(&["t0label"]), "T1");
    let shown = place.ok(&["t0p", "label", "-r", "-v"]);
    assert!(shown.starts_with("T1\nprogram:raidtape ") && shown.contains("\nblocksize:65536\n"));
    assert!(shown.contains("\nowner:me: you\n") && shown.contains("\ncreated:7\n"), "{shown}");
    let written = contents(&place, "A");
    let [Some(block), None] = &written[..] else { panic!("{}", written.len()) };
    assert_eq!(Label::parse(block).unwrap().text(), b"T1");
    let hash = place.ok(&["t0label", "-r", "-h"]);
    assert_eq!(hash, LabelHash::of(block).unwrap().to_string());
    // As the document has it.
    assert_eq!(place.ok(&["t0label", "-k", "T1"]), "");
    place.ok(&["t0label", "-k"]);
    place.ok(&["t0label", "-k", "-h", &hash]);
    let said = place.fails(7, &["t0label", "-k", "T2"]);
    assert!(said.contains("tape T1") && said.contains("T2"), "{said}");
    assert_eq!(place.code(&["t0label", "-k", "-h", &"0".repeat(64)]), 7);
    assert_eq!(place.code(&["t0label", "-t", "T2"]), 7);
    // What the spool knows.
    let (spool, drive) = (place.spool(), place.spool().drive(None).unwrap());
    let tape = drive.tape().unwrap().unwrap();
    assert_eq!((tape.name(), tape.status().unwrap()), (b"T1".to_vec(), TapeStatus::Loaded));
    assert_eq!(tape.label().unwrap().unwrap(), Label::parse(block).unwrap());
    assert_eq!(tape.metrics().unwrap().number("blocksize"), Some(65_536u64));
    put_in(&place, "B");
    assert_eq!(place.code(&["t0label", "-k"]), 7, "another tape than the one that was there");
    assert!(drive.tape().unwrap().is_none());
    assert_eq!(spool.tape(b"T1").unwrap().unwrap().status().unwrap(), TapeStatus::Offline);
    // What makes no sense.
    for line in [
        &["t0label", "-k", "-w", "T1"][..],
        &["t0label", "-w"],
        &["t0label", "-f", "T1"],
        &["t0label", "T1"],
        &["t0label", "-p", "a=b"],
        &["t0label", "-w", "-p", "label=b", "T9"],
        &["t0label", "-k", "-h", "xyz"],
        &["t0label", "-k", "-h"],
    ] {
        assert_eq!(place.code(line), 2, "{line:?}");
    }
}

#[test]
fn what_is_on_a_tape_stays_unless_by_force() {
    let place = Place::with_drive();
    let block = vec![1; 40_000];
    fill(&place, "A", &[&block]);
    put_in(&place, "A");
    let hash = LabelHash::of(&block).unwrap();
    // Somebody else's tape is known by its hash.
    assert_eq!(place.ok(&["t0label", "-r", "-h"]), hash.to_string());
    place.ok(&["t0label", "-k", "-h", &hash.to_string()]);
    let said = place.fails(7, &["t0label", "-w", "T1"]);
    assert!(said.contains("-f") && said.contains(&hash.to_string()), "{said}");
    fill(&place, "B", &[b"short"]);
    put_in(&place, "B");
    assert_eq!(place.code(&["t0label", "-w", "T1"]), 7);
    assert_eq!(contents(&place, "A"), [Some(block), None]);
    assert_eq!(contents(&place, "B"), [Some(b"short".to_vec()), None]);
    place.ok(&["t0label", "-w", "-f", "T1"]);
    assert_eq!(contents(&place, "B").len(), 2);
    // A label again, with what the spool knows.
    let tape = place.spool().tape(b"T1").unwrap().unwrap();
    let file = TapeFile { filenum: 1, position: 2, job: "j".to_owned(), batch: 0 };
    tape.add_file(&file).unwrap();
    assert_eq!(place.code(&["t0label", "-w", "T1"]), 7);
    assert_eq!(place.code(&["t0label", "-w", "T2"]), 7);
    assert!(tape.dir().join("log").exists());
    place.ok(&["t0label", "-w", "-f", "T2"]);
    assert!(!tape.dir().join("log").exists(), "what was on it is gone");
    let aside = fs::read_dir(tape.dir()).unwrap().map(|it| it.unwrap().file_name());
    assert_eq!(aside.filter(|it| it.to_string_lossy().starts_with("log.")).count(), 1);
    assert_eq!(place.ok(&["t0label"]), "T2");
    // A blank tape gets no name that is taken.
    Image::create(&place.image("C"), &Medium::default()).unwrap();
    put_in(&place, "C");
    assert!(place.fails(7, &["t0label", "-w", "T2"]).contains("knows a tape T2"));
    place.ok(&["t0label", "-w", "T3"]);
}

#[test]
fn a_filemark_at_the_beginning_does_not_make_a_tape_blank() {
    let place = Place::with_drive();
    fill(&place, "A", &[]);
    fill(&place, "B", &[]);
    fill(&place, "B", &[b"data"]);
    put_in(&place, "B");
    assert_eq!(place.code(&["t0label", "-w", "T1"]), 7);
    assert_eq!(contents(&place, "B"), [None, Some(b"data".to_vec()), None]);
    put_in(&place, "A");
    place.ok(&["t0label", "-w", "T1"]);
    let medium = Medium { write_protected: true, ..Medium::default() };
    Image::create(&place.image("P"), &medium).unwrap();
    put_in(&place, "P");
    let said = place.fails(7, &["t0label", "-w", "T5"]);
    assert!(said.contains("write-protected"), "{said}");
}

#[test]
fn another_tape_of_the_same_name_is_not_taken_for_the_one_that_is_known() {
    let place = Place::with_drive();
    put_in(&place, "A");
    place.ok(&["t0label", "-w", "-p", "created=7", "T1"]);
    let mut other = Label::new("T1").unwrap();
    other.add("created", "8").unwrap();
    fill(&place, "B", &[&other.to_block()]);
    put_in(&place, "B");
    let (spool, drive) = (place.spool(), place.spool().drive(None).unwrap());
    let said = place.fails(7, &["t0load", "T1"]);
    assert!(said.contains("another tape T1"), "{said}");
    assert!(drive.tape().unwrap().is_none(), "it is none that is known");
    let known = spool.tape(b"T1").unwrap().unwrap().label().unwrap().unwrap();
    assert_eq!(known.get(b"created"), Some(&b"7"[..]));
    fs::write(place.base.join("one"), "first").unwrap();
    let job = place.ok(&["t0job", "-c", "-p", &format!("root={}", place.base.display())]);
    place.feed(&["t0job", "-a", &job], "one\n");
    place.ok(&["t0queue", "-a", &job]);
    assert_eq!(place.code(&["t0write", "-a"]), 7);
    assert_eq!(contents(&place, "B"), [Some(other.to_block().to_vec()), None]);
    // It gets another name, and the log of the one that is known stays.
    let tape = spool.tape(b"T1").unwrap().unwrap();
    tape.add_file(&TapeFile { filenum: 1, position: 2, job: "j".to_owned(), batch: 0 }).unwrap();
    place.ok(&["t0label", "-w", "-f", "T2"]);
    assert!(tape.dir().join("log").exists());
    put_in(&place, "A");
    assert_eq!(place.code(&["t0label", "-k", "T1"]), 0);
}

#[test]
fn a_label_that_cannot_be_written_leaves_what_is_known() {
    let place = Place::with_drive();
    put_in(&place, "A");
    place.ok(&["t0label", "-w", "T1"]);
    let tape = place.spool().tape(b"T1").unwrap().unwrap();
    tape.add_file(&TapeFile { filenum: 1, position: 2, job: "j".to_owned(), batch: 0 }).unwrap();
    fs::set_permissions(place.image("A"), fs::Permissions::from_mode(0o444)).unwrap();
    let said = place.fails(7, &["t0label", "-w", "-f", "T2"]);
    assert!(said.contains("write-protected"), "{said}");
    assert!(tape.dir().join("log").exists());
    assert!(place.spool().tape(b"T2").unwrap().is_none());
}

#[test]
fn a_tape_that_the_spool_has_forgotten_is_in_no_drive() {
    let place = Place::with_drive();
    put_in(&place, "A");
    place.ok(&["t0label", "-w", "T1"]);
    fs::remove_dir_all(place.spool().tape(b"T1").unwrap().unwrap().dir()).unwrap();
    place.ok(&["t0stat"]);
    place.ok(&["t0reset"]);
    place.ok(&["t0load", "T1"]);
    assert!(place.spool().tape(b"T1").unwrap().is_some());
    fs::remove_dir_all(place.spool().tape(b"T1").unwrap().unwrap().dir()).unwrap();
    place.ok(&["t0eject"]);
}

#[test]
fn a_tape_that_was_labelled_anew_is_not_asked_for_by_its_old_name() {
    let place = Place::with_drive();
    put_in(&place, "A");
    place.ok(&["t0label", "-w", "OLD"]);
    place.ok(&["t0label", "-w", "-f", "NEW"]);
    assert_eq!(place.ok(&["t0tapes"]), "loaded NEW\ngone OLD");
    let spool = place.spool();
    let old = spool.tape(b"OLD").unwrap().unwrap();
    assert!(old.is_gone().unwrap() && !spool.tape(b"NEW").unwrap().unwrap().is_gone().unwrap());
    place.ok(&["t0eject"]);
    spool.tape(b"NEW").unwrap().unwrap().move_offsite(true).unwrap();
    fs::write(place.base.join("one"), "first").unwrap();
    let job = place.ok(&["t0job", "-c", "-p", &format!("root={}", place.base.display())]);
    place.feed(&["t0job", "-a", &job], "one\n");
    place.ok(&["t0queue", "-a", &job]);
    let said = place.fails(7, &["t0write", "-a"]);
    assert!(said.ends_with(": put in a tape that has room, and write again"), "{said}");
    // Another tape gets the name, and one whose label was not written after all has kept its own.
    put_in(&place, "B");
    place.ok(&["t0label", "-w", "-f", "OLD"]);
    assert!(!old.is_gone().unwrap());
    old.set_gone(Some(7)).unwrap();
    place.ok(&["t0load", "OLD"]);
    assert_eq!(place.ok(&["t0tapes"]), "offsite NEW\nloaded OLD");
}

#[test]
fn a_label_that_is_refused_leaves_what_is_known() {
    let place = Place::with_drive();
    Medium { worm: true, ..Medium::default() }.write(&place.image("A")).unwrap();
    put_in(&place, "A");
    place.ok(&["t0label", "-w", "W"]);
    let tape = place.spool().tape(b"W").unwrap().unwrap();
    tape.add_file(&TapeFile { filenum: 1, position: 2, job: "j".to_owned(), batch: 0 }).unwrap();
    let said = place.fails(7, &["t0label", "-w", "-f", "W2"]);
    assert!(said.contains("can only be appended to"), "{said}");
    assert!(tape.dir().join("log").exists());
    assert_eq!(place.ok(&["t0tapes"]), "loaded W");
    // One that the spool cannot note is not on the tape either.
    put_in(&place, "B");
    let long = "x".repeat(256);
    for line in [&["t0label", "-w", &long][..], &["t0label", "-n", "-w", &long]] {
        let said = place.fails(2, line);
        assert!(said.contains("too long to be noted in the spool"), "{said}");
    }
    assert_eq!(contents(&place, "B"), []);
    place.ok(&["t0label", "-w", &long[..255]]);
}

/// Makes a job of this file of the place, with its name as content, and queues it.
fn queue_file(place: &Place, name: &str) -> String {
    fs::write(place.base.join(name), name).unwrap();
    let job = place.ok(&["t0job", "-c", "-p", &format!("root={}", place.base.display())]);
    assert_eq!(place.feed(&["t0job", "-a", &job], &format!("{name}\n")).0, 0);
    place.ok(&["t0queue", "-a", &job]);
    job
}

#[test]
fn a_label_that_cannot_be_read_leaves_the_rest_of_its_tape() {
    let place = Place::with_drive();
    put_in(&place, "A");
    place.ok(&["t0label", "-w", "T1"]);
    let job = queue_file(&place, "one");
    place.ok(&["t0write", "-a"]);
    spoil_first_block(&place.image("A"));
    let bytes = fs::read(place.image("A")).unwrap();
    assert!(place.fails(7, &["t0label"]).contains("cannot be read"));
    let said = place.fails(5, &["t0scan"]);
    assert!(said.starts_with("0 0 unreadable: "), "{said}");
    assert!(said.ends_with(&format!("1 2 {job} 0 1")), "{said}");
    assert_eq!(place.ok(&["t0scan", "--from", "1"]), format!("1 2 {job} 0 1"));
    let said = place.fails(5, &["t0ck"]);
    assert!(said.contains("\nfile 0: what has the place of the label"), "{said}");
    assert!(said.ends_with("1 tape files, 1 files, 1 of them by their sums: 1 errors"), "{said}");
    assert_eq!(place.ok(&["t0seek", "-v", "1"]), "file 1 position 2");
    let out = place.base.join("out");
    fs::create_dir(&out).unwrap();
    place.ok(&["t0read", "--file", "1", "-C", out.to_str().unwrap()]);
    assert_eq!(fs::read(out.join("one")).unwrap(), b"one");
    assert!(place.ok(&["t0load"]).contains("block 0"));
    place.ok(&["t0eject"]);
    assert!(place.ok(&["t0load", place.image("A").to_str().unwrap()]).contains("block 0"));
    // Nothing is appended to it, and by force it gets a label.
    queue_file(&place, "two");
    assert!(place.fails(7, &["t0write", "-a"]).contains("cannot be read"));
    assert_eq!(place.code(&["t0label", "-w", "T2"]), 7);
    assert!(fs::read(place.image("A")).unwrap() == bytes);
    place.ok(&["t0label", "-w", "-f", "T2"]);
    place.ok(&["t0write", "-a"]);
    // Of an archive without a label only the block is lost.
    fill(&place, "B", &[&[1; 600], &[2; 600]]);
    spoil_first_block(&place.image("B"));
    put_in(&place, "B");
    let said = place.fails(5, &["t0ck"]);
    assert!(!said.contains("the place of the label"), "{said}");
}

#[test]
fn a_label_in_short_blocks_is_one() {
    let place = Place::with_drive();
    let label = Label::new("T1").unwrap();
    let block = label.to_block();
    fill(&place, "A", &block.chunks(512).collect::<Vec<_>>());
    put_in(&place, "A");
    assert_eq!(place.ok(&["t0load"]), "tape T1");
    queue_file(&place, "one");
    place.ok(&["t0write", "-a"]);
    assert!(place.ok(&["t0ck"]).ends_with(": 0 errors"));
    // The tape of another program, by what is the same as `head -c 32768 | sha256sum`.
    fill(&place, "B", &[&[5u8; 10_240][..]; 4]);
    put_in(&place, "B");
    let hash = LabelHash::of(&[5; 32_768]).unwrap().to_string();
    assert_eq!(place.ok(&["t0label", "-r", "-h"]), hash);
    place.ok(&["t0label", "-k", "-h", &hash]);
}

#[test]
fn the_length_of_blocks_is_one_that_can_be_written_and_read() {
    let place = Place::with_drive();
    put_in(&place, "A");
    for bytes in ["100", "511", "99999999", "9M", "x"] {
        assert_eq!(place.code(&["t0label", "-w", "-b", bytes, "T1"]), 2, "{bytes}");
    }
    assert_eq!(contents(&place, "A"), []);
    place.ok(&["t0label", "-w", "-b", "256k", "T1"]);
    let tape = place.spool().tape(b"T1").unwrap().unwrap();
    let noted = || tape.metrics().unwrap().number::<u64>("blocksize");
    assert_eq!(noted(), Some(262_144));
    place.ok(&["t0label", "-w", "-f", "T1"]);
    assert_eq!(noted(), None);
    // Nobody could read it by what the label says.
    queue_file(&place, "one");
    let said = place.fails(2, &["t0write", "-a", "-b", "4M"]);
    assert!(said.contains("up to 1048576") && said.contains("-b 4194304"), "{said}");
    assert_eq!((noted(), contents(&place, "A").len()), (None, 2));
    place.ok(&["t0label", "-w", "-f", "-b", "4M", "T1"]);
    place.ok(&["t0write", "-a", "-b", "2M"]);
    assert_eq!(noted(), Some(4 << 20));
    place.ok(&["t0label", "-w", "-f", "T1"]);
    queue_file(&place, "two");
    place.ok(&["t0write", "-a", "-b", "1M"]);
    assert_eq!(noted(), Some(1 << 20));
    // What an earlier version has noted does not count against the label.
    let mut metrics = tape.metrics().unwrap();
    metrics.set("blocksize", "8388608").unwrap();
    tape.set_metrics(&metrics).unwrap();
    queue_file(&place, "three");
    place.ok(&["t0write", "-a"]);
    assert_eq!(contents(&place, "A").iter().flatten().map(Vec::len).max(), Some(1 << 20));
}
