//! Runs on tape and back: blocks recalled, tapes verified, a catalog from tapes alone.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use raidtape::catalog::tapes::{Item, Tapes};
use raidtape::catalog::{BadCopies, Reader, RunBlocks};
use raidtape::error::{Error, ErrorKind, Result};
use raidtape::progress::Progress;
use raidtape::tape::changer::{Changer, Library};
use raidtape::tape::drive::{Access, Read, Wrote};
use raidtape::tape::image::Image;
use raidtape::tape::label::Label;
use raidtape::tape::loaded::Loaded;
use raidtape::tape::medium::Medium;
use raidtape::tape::runs::gather::{self, From};
use raidtape::tape::runs::recall::{self, Recalled, Source};
use raidtape::tape::runs::shelf::Shelf;
use raidtape::tape::runs::verify::{self, Verified};
use raidtape::tape::runs::{Archived, Means, Options, archive};
use raidtape::tape::write::{NextTape, Settings, Wanted};

use crate::common::disk::Disk;
use crate::common::faultdrive::{FaultDrive, Plan, Trouble};
use crate::common::tape::{scratch, vm};
use crate::common::tapeworld::TapeWorld;
use crate::common::tree::{Tree, assert_same};
use crate::common::{Sandbox, args, data, tool};
use crate::tape_commands::unpack_by_hand;

/// A store, and tapes beside it.
pub struct Scene {
    /// The store.
    pub sandbox: Sandbox,
    /// The tapes.
    pub world: TapeWorld,
    _dir: tempfile::TempDir,
}

impl Scene {
    /// A store with one run, and blank tapes of this capacity.
    pub fn new(tapes: &[&str], capacity: Option<u64>) -> Scene {
        let sandbox = Sandbox::with(&["--block-size", "1MiB"]);
        data::mixed_tree(&sandbox.source, 7, 40);
        data::noise_file(&sandbox.source.join("large"), 8, 5 << 20);
        sandbox.backup();
        let dir = scratch();
        let world = TapeWorld::new(dir.path());
        let medium = Medium { capacity, early_warning: 64 << 10, ..Medium::default() };
        for tape in tapes {
            world.add_tape(tape, &medium);
        }
        world.insert(tapes[0]);
        Scene { sandbox, world, _dir: dir }
    }

    pub fn catalog(&self) -> &Path {
        &self.sandbox.catalog
    }

    pub fn archive(&self, copies: u64) -> Archived {
        self.archive_in(copies, 2 << 20)
    }

    /// Where nobody brings another tape than the one in the drive.
    pub fn archive_alone(&self, copies: u64) -> Result<Archived> {
        self.archive_with(copies, 2 << 20, &mut |_, _| Ok(None))
    }

    /// With batches of so many bytes.
    fn archive_in(&self, copies: u64, batch_bytes: u64) -> Archived {
        let device = self.world.spool().drive(None).unwrap().device().unwrap();
        let mut next_tape = |loaded: Loaded, wanted: &Wanted| {
            let Some(label) = wanted.labels.first() else { return Ok(None) };
            loaded.close()?;
            self.world.insert(std::str::from_utf8(label).unwrap());
            Loaded::open(&device, Access::Write).map(Some)
        };
        self.archive_with(copies, batch_bytes, &mut next_tape).unwrap()
    }

    fn archive_with(
        &self,
        copies: u64,
        batch_bytes: u64,
        next_tape: &mut NextTape<'_>,
    ) -> Result<Archived> {
        let spool = self.world.spool();
        let drive = spool.drive(None).unwrap();
        let taken = drive.take().unwrap();
        let device = drive.device().unwrap();
        let loaded = Loaded::open(&device, Access::Write).unwrap();
        let run = Reader::open(self.catalog()).unwrap().latest(None).unwrap().unwrap().id;
        let options = Options { run, pool: "any".to_owned(), copies, batch_bytes };
        let means = Means {
            spool: &spool,
            drive: &taken,
            settings: Settings { block_bytes: Some(32 << 10), ..Settings::default() },
            tell: &mut |_| {},
            next_tape,
        };
        archive(self.catalog(), &options, means, loaded, &Progress::default())
    }

    pub fn tapes(&self) -> Tapes {
        Tapes::look(self.catalog()).unwrap().unwrap()
    }

    fn needed(&self, catalog: &Path) -> RunBlocks {
        let reader = Reader::open(catalog).unwrap();
        let run = reader.latest(None).unwrap().unwrap();
        reader.blocks_of_run(&run).unwrap()
    }

    /// A drive that has any tape.
    fn any_tape(&self) -> Source<'_> {
        let dir = self.world.base.join("tapes");
        Source { has: None, get: Box::new(move |label: &[u8]| open(&dir, label).map(Some)) }
    }

    pub fn recall(&self, catalog: &Path, drives: usize) -> Recalled {
        let drives = (0..drives).map(|_| self.any_tape()).collect();
        self.recall_by(catalog, drives).unwrap()
    }

    pub fn recall_by(&self, catalog: &Path, drives: Vec<Source<'_>>) -> Result<Recalled> {
        let (needed, progress) = (self.needed(catalog), Progress::default());
        let plan = recall::plan(catalog, &needed, &progress).unwrap();
        recall::recall(catalog, (&needed, plan), drives, &progress)
    }

    pub fn verify(&self, label: &str) -> Result<Verified> {
        let mut loaded = Loaded::open(&self.world.image(label), Access::Read).unwrap();
        verify::verify(self.catalog(), &mut loaded, &Progress::default())
    }

    /// How many members of a tape are known to be bad.
    pub fn bad(&self, label: &str) -> u64 {
        self.tapes().tape(label.as_bytes()).unwrap().unwrap().bad
    }

    pub fn lose_blocks(&self) -> usize {
        let blocks = self.sandbox.blocks("volume");
        blocks.iter().for_each(|it| fs::remove_file(&it.0).unwrap());
        blocks.len()
    }

    pub fn assert_restores(&self, name: &str) {
        let found = self.sandbox.revert(1, name);
        assert_same(&Tree::of(&self.sandbox.source), &Tree::of(&found));
    }
}

pub fn open(dir: &Path, label: &[u8]) -> Result<Loaded> {
    let path = dir.join(format!("{}.tap", std::str::from_utf8(label).unwrap()));
    Loaded::open(&path, Access::Read)
}

pub fn from<'a>(into: &'a Path, next: &'a mut dyn FnMut() -> Result<Option<Loaded>>) -> From<'a> {
    From { into, next, allow_gaps: false }
}

/// Marks an object of an image, counted from 0, as a block that could not be read.
pub fn spoil(image: &Path, number: u64) {
    let mut bytes = fs::read(image).unwrap();
    let word = |bytes: &[u8], at: usize| {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    };
    let mut at = 0;
    for _ in 0..number {
        at += match word(&bytes, at) {
            0 => 4,
            len => 8 + len.next_multiple_of(2),
        };
    }
    let len = word(&bytes, at);
    assert!(len > 0 && word(&bytes, at + 4 + len) == len, "no block of even length");
    bytes[at + 3] |= 0x80;
    bytes[at + 4 + len + 3] |= 0x80;
    fs::write(image, bytes).unwrap();
}

fn image(scene: &Scene, label: &str) -> PathBuf {
    scene.world.image(label)
}

#[test]
fn blocks_that_are_lost_come_back_from_tape() {
    let scene = Scene::new(&["T0"], None);
    let done = scene.archive(1);
    assert!(done.tally.batches > 3 && done.tally.errors == 0, "{done:?}");
    let count = scene.lose_blocks();
    let plan = recall::plan(scene.catalog(), &scene.needed(scene.catalog()), &Progress::default());
    let plan = plan.unwrap();
    assert_eq!((plan.tapes.len(), plan.blocks(), plan.blocks_here), (1, count as u64, 0));
    let done = scene.recall(scene.catalog(), 1);
    assert_eq!((done.blocks, done.missing), (count as u64, 0), "{done:?}");
    scene.sandbox.assert_valid();
    scene.assert_restores("restored");
    let again = scene.recall(scene.catalog(), 1);
    assert_eq!((again.blocks, again.missing), (0, 0));
}

#[test]
fn what_a_pool_has_does_not_go_there_again() {
    let scene = Scene::new(&["T0"], None);
    let first = scene.archive(1);
    let second = scene.archive(1);
    assert_eq!((second.planned.len(), second.tally.batches), (0, 0), "{second:?}");
    data::noise_file(&scene.sandbox.source.join("more"), 9, 1 << 20);
    scene.sandbox.backup();
    let third = scene.archive(1);
    let blocks = |it: &Archived| it.planned.iter().map(|it| it.blocks).sum::<u64>();
    assert!(blocks(&third) > 0 && blocks(&third) < blocks(&first) / 2, "{third:?}");
    let reader = Reader::open(scene.catalog()).unwrap();
    let coverage =
        reader.coverage(None, (&[1], &BadCopies::default(), 1), Some(&scene.tapes())).unwrap();
    assert_eq!(coverage.by_tapes.keys().collect::<Vec<_>>(), [&1]);
}

#[test]
fn copies_go_to_tapes_of_their_own_and_the_end_of_a_tape_is_no_end() {
    let names = ["T0", "T1", "T2", "T3", "T4", "T5"];
    let scene = Scene::new(&names, Some(5 << 20));
    let done = scene.archive(2);
    assert!(done.tally.errors == 0 && done.planned.len() == 2, "{done:?}");
    let tapes = scene.tapes();
    let reader = Reader::open(scene.catalog()).unwrap();
    for number in reader.block_numbers(0, 1000).unwrap() {
        let id = reader.block(number).unwrap().id;
        let places = tapes.places(&id).unwrap();
        let labels: BTreeSet<_> = places.iter().map(|it| &it.label).collect();
        assert_eq!(labels.len(), 2, "{places:?}");
    }
    // One tape is away: two drives bring everything back all the same.
    let count = scene.lose_blocks() as u64;
    let first = tapes.tapes().unwrap().remove(0).tape.label;
    fs::remove_file(image(&scene, std::str::from_utf8(&first).unwrap())).unwrap();
    let done = scene.recall(scene.catalog(), 2);
    assert!(done.problems.iter().any(|it| it.to_string().contains("T0")), "{done:?}");
    assert_eq!((done.blocks, done.missing), (count, 0), "{done:?}");
    scene.sandbox.assert_valid();
}

#[test]
fn a_damaged_block_is_taken_from_another_tape() {
    let scene = Scene::new(&["T0", "T1"], None);
    scene.archive(2);
    let count = scene.lose_blocks() as u64;
    let path = image(&scene, "T0");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let mut loaded = Loaded::open(&path, Access::Read).unwrap();
    let found = verify::verify(scene.catalog(), &mut loaded, &Progress::default()).unwrap();
    assert_eq!((found.blocks, found.problems.len()), (count - 1, 1), "{found:?}");
    drop(loaded);
    assert_eq!(scene.tapes().tape(b"T0").unwrap().unwrap().bad, 1);
    let done = scene.recall(scene.catalog(), 1);
    assert_eq!((done.blocks, done.missing), (count, 0), "{done:?}");
    scene.sandbox.assert_valid();
}

#[test]
fn behind_a_block_of_tape_that_cannot_be_read_all_else_is_read() {
    let scene = Scene::new(&["T0"], None);
    scene.archive_in(1, 64 << 20);
    let tapes = scene.tapes();
    let file = tapes.files(b"T0").unwrap().remove(0);
    let mut blocks = Vec::new();
    let mut each = |it: raidtape::catalog::tapes::Member| {
        if matches!(it.item, Item::Block(_)) {
            blocks.push((it.at, it.len));
        }
        Ok(())
    };
    tapes.members((b"T0", file.filenum), &mut each).unwrap();
    let (at, len) = blocks[1];
    assert!(blocks.len() > 4 && len > 256 << 10, "{blocks:?}");
    spoil(&image(&scene, "T0"), file.position + (at + len / 2) / (32 << 10));
    let count = scene.lose_blocks() as u64;
    assert_eq!(count, blocks.len() as u64);
    let done = scene.recall(scene.catalog(), 1);
    assert_eq!((done.blocks, done.missing, scene.bad("T0")), (count - 1, 1, 1), "{done:?}");
    assert_eq!((done.problems.len(), done.problem_count), (1, 1));
    for _ in 0..2 {
        let found = scene.verify("T0").unwrap();
        assert_eq!((found.blocks, scene.bad("T0")), (count - 1, 1), "{found:?}");
        // The tape file, and the block.
        assert_eq!((found.problems.len(), found.problem_count), (2, 2), "{found:?}");
    }
    // The very first block of the tape file: it is no archive that can be told.
    spoil(&image(&scene, "T0"), file.position);
    assert_eq!(scene.verify("T0").unwrap().blocks, count - 1);
}

#[test]
fn a_disk_or_a_drive_that_fails_makes_no_tape_bad() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    let count = scene.lose_blocks() as u64;
    let tmp = scene.sandbox.path("volume/tmp");
    let path = image(&scene, "T0");
    let get = |_: &[u8]| {
        fs::remove_dir_all(&tmp).unwrap();
        fs::write(&tmp, "no directory").unwrap();
        Loaded::open(&path, Access::Read).map(Some)
    };
    let source = Source { has: None, get: Box::new(get) };
    let error = scene.recall_by(scene.catalog(), vec![source]).unwrap_err();
    assert!(error.to_string().contains("volume/tmp"), "{error}");
    assert_eq!(scene.bad("T0"), 0);
    fs::remove_file(&tmp).unwrap();
    // It fails amid a tape, and then whatever is asked of it.
    let get = |_: &[u8]| {
        let plan = Plan { trouble: Trouble::Medium, at: 60, for_ever: true };
        Loaded::with(FaultDrive::open(&path, Some(plan)).0, &path).map(Some)
    };
    let source = Source { has: None, get: Box::new(get) };
    let done = scene.recall_by(scene.catalog(), vec![source]).unwrap();
    assert!(done.blocks > 0 && done.missing == count - done.blocks, "{done:?}");
    assert_eq!(scene.bad("T0"), 0);
    let done = scene.recall(scene.catalog(), 1);
    assert_eq!((done.missing, done.problem_count), (0, 0), "{done:?}");
    scene.sandbox.assert_valid();
}

#[test]
fn another_tape_of_the_same_label_is_not_taken_for_it() {
    let scene = Scene::new(&["T0", "T1"], None);
    scene.archive(1);
    scene.lose_blocks();
    let (path, aside) = (image(&scene, "T0"), scene.world.base.join("aside.tap"));
    fs::rename(&path, &aside).unwrap();
    Image::create(&path, &Medium::default()).unwrap();
    let mut loaded = Loaded::open(&path, Access::Write).unwrap();
    let mut label = Label::new("T0").unwrap();
    label.add("comment", "of somebody else").unwrap();
    loaded.write_label(&label).unwrap();
    loaded.close().unwrap();
    let error = scene.verify("T0").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongTape);
    assert!(error.to_string().contains("tape forget T0"), "{error}");
    let done = scene.recall(scene.catalog(), 1);
    assert!(done.blocks == 0 && done.is_tape_missing, "{done:?}");
    assert_eq!(scene.bad("T0"), 0);
    fs::rename(&aside, &path).unwrap();
    assert_eq!(scene.verify("T0").unwrap().problem_count, 0);
    assert_eq!(scene.recall(scene.catalog(), 1).missing, 0);
}

#[test]
fn a_copy_on_disk_that_was_found_bad_comes_back_from_tape() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    let (block, len) = scene.sandbox.blocks("volume").remove(0);
    fs::write(&block, vec![7; usize::try_from(len).unwrap()]).unwrap();
    // Nobody has looked yet.
    assert_eq!(scene.recall(scene.catalog(), 1).blocks, 0);
    let aside = scene.sandbox.path("aside");
    fs::rename(&scene.sandbox.source, &aside).unwrap();
    let ran = scene.sandbox.run(["validate", "--repair"]).code(4);
    let said = ran.text() + &ran.errors();
    assert!(said.contains("raidtape tape recall"), "{said}");
    fs::rename(&aside, &scene.sandbox.source).unwrap();
    let done = scene.recall(scene.catalog(), 1);
    assert_eq!((done.blocks, done.missing), (1, 0), "{done:?}");
    scene.sandbox.assert_valid();
    scene.assert_restores("restored");
    assert_eq!(scene.recall(scene.catalog(), 1).blocks, 0);
}

#[test]
fn a_tape_stays_in_its_drive_when_more_is_wanted_of_it() {
    let scene = Scene::new(&["T0", "T1", "T2"], None);
    scene.archive(2);
    let count = scene.lose_blocks() as u64;
    let path = image(&scene, "T0");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    // Each drive gets only the tape that is in it.
    let tapes = scene.world.base.join("tapes");
    let drive = |has: &'static str| {
        let tapes = tapes.clone();
        let get = move |label: &[u8]| match label == has.as_bytes() {
            true => open(&tapes, label).map(Some),
            false => Err(Error::new(ErrorKind::WrongTape, "it is in another drive")),
        };
        Source { has: Some(has.into()), get: Box::new(get) }
    };
    let drives = ["T2", "T0", "T1"].map(drive);
    let done = scene.recall_by(scene.catalog(), drives.into()).unwrap();
    assert_eq!((done.blocks, done.missing, done.problem_count), (count, 0, 1), "{done:?}");
}

#[test]
fn what_has_come_back_takes_room_once() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    let blocks = scene.sandbox.blocks("volume");
    let bytes: u64 = blocks.iter().map(|it| it.1).sum();
    fs::remove_dir_all(scene.sandbox.path("volume")).unwrap();
    let disk = Disk::ext4(&scene.sandbox, "disk", 64);
    scene.sandbox.ok(args!["add-volume", &disk.point]);
    // What a volume leaves free for its tables, and half as much again as comes back.
    let left = (4 << 20) + bytes + bytes / 2;
    let filler = fs::File::create(disk.point.join("filler")).unwrap();
    let flags = rustix::fs::FallocateFlags::empty();
    rustix::fs::fallocate(&filler, flags, 0, disk.free() - left).unwrap();
    let done = scene.recall(scene.catalog(), 1);
    assert_eq!((done.blocks, done.missing), (blocks.len() as u64, 0), "{done:?}");
}

#[test]
fn one_tape_that_cannot_be_read_leaves_the_others_alone() {
    let scene = Scene::new(&["T0", "T1"], None);
    scene.archive(2);
    fs::write(image(&scene, "T0"), "no image").unwrap();
    let tapes = scene.world.base.join("tapes");
    let line = args!["tape", "verify", "T0", "T1", "--json", "--tapes", &tapes];
    let ran = scene.sandbox.run(line);
    assert_eq!(ran.exit_code(), Some(5), "{}", ran.errors());
    let told = ran.json();
    assert_eq!((&told[0]["tape"], &told[0]["problems"]), (&"T0".into(), &1.into()), "{told}");
    let count = scene.lose_blocks() as u64;
    assert_eq!((&told[1]["blocks"], &told[1]["problems"]), (&count.into(), &0.into()), "{told}");
    scene.sandbox.run(args!["tape", "recall", "latest", "--tapes", &tapes]).code(0);
    scene.sandbox.assert_valid();
    // A second drive, which has the tape that is wanted.
    let mut drives = Vec::new();
    for (name, label) in [("e0", "none"), ("e1", "T1")] {
        let drive = scene.sandbox.path(name);
        fs::create_dir(&drive).unwrap();
        std::os::unix::fs::symlink(image(&scene, label), drive.join("loaded")).unwrap();
        drives.push(drive);
    }
    scene.world.add_tape("none", &Medium::default());
    let mut shelf = Shelf::of(&drives).unwrap();
    let found = shelf.get(b"T1", &mut |_, _| Ok(false)).unwrap();
    assert_eq!(found.unwrap().name(), drives[1]);
}

#[test]
fn what_a_killed_writer_has_left_is_no_fault_of_a_tape() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    let count = scene.sandbox.blocks("volume").len() as u64;
    let mut loaded = Loaded::open(&image(&scene, "T0"), Access::Write).unwrap();
    let drive = loaded.drive();
    drive.locate(scene.tapes().files(b"T0").unwrap()[0].position).unwrap();
    let mut block = vec![0; 64 << 10];
    let Read::Block(len) = drive.read(&mut block).unwrap() else { panic!("no block") };
    drive.to_end_of_data().unwrap();
    assert_eq!(drive.write(&block[..len]).unwrap(), Wrote::Whole);
    assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
    loaded.close().unwrap();
    let found = scene.verify("T0").unwrap();
    assert_eq!((found.blocks, found.problem_count), (count, 0), "{found:?}");
    // An archive that is known is missed.
    let mut tapes = Tapes::open(scene.catalog()).unwrap();
    let last = tapes.files(b"T0").unwrap().pop().unwrap();
    let (filenum, position) = (last.filenum + 1, last.position + 1000);
    let gone = raidtape::catalog::tapes::TapeFile { filenum: filenum + 1, position, ..last };
    tapes.begin(b"T0", &gone).unwrap().finish().unwrap();
    assert_eq!(scene.verify("T0").unwrap().problem_count, 1);
}

#[test]
fn the_cut_archive_of_a_worm_tape_is_no_fault() {
    let scene = Scene::new(&["T0", "T1"], None);
    let medium = Medium {
        capacity: Some(4 << 20),
        early_warning: 64 << 10,
        worm: true,
        ..Medium::default()
    };
    medium.write(&image(&scene, "T0")).unwrap();
    let done = scene.archive_in(1, 64 << 20);
    assert_eq!(done.tally.errors, 0, "{done:?}");
    let trailer = b"TRAILER!!!";
    let bytes = fs::read(image(&scene, "T0")).unwrap();
    let ends = bytes.windows(trailer.len()).filter(|it| it == trailer).count();
    let known = scene.tapes().tape(b"T0").unwrap().unwrap();
    assert!(known.files > ends as u64 && known.blocks > 0, "{known:?}, {ends} trailers");
    let found = scene.verify("T0").unwrap();
    assert_eq!((found.blocks, found.problem_count), (known.blocks, 0), "{found:?}");
    assert_eq!(scene.bad("T0"), 0);
}

#[test]
fn problems_are_named_up_to_a_limit_and_counted() {
    let mut found = Verified::default();
    (0..1001).for_each(|_| found.note("it", &Error::corrupt("bad")));
    assert_eq!((found.problems.len(), found.problem_count), (1000, 1001));
}

#[test]
fn a_shelf_remembers_labels_and_looks_again_where_they_are_wrong() {
    let dir = scratch();
    let world = TapeWorld::new(dir.path());
    ["T0", "T1"].iter().for_each(|it| world.add_tape(it, &Medium::default()));
    let tapes = world.base.join("tapes");
    let mut shelf = Shelf::of(std::slice::from_ref(&tapes)).unwrap();
    let mut get = |label: &str| {
        let found = shelf.get(label.as_bytes(), &mut |_, _| Ok(false))?;
        Ok(found.map(|it| it.name().file_name().unwrap().to_str().unwrap().to_owned()))
    };
    let at = |name: &str| -> Result<Option<String>> { Ok(Some(name.to_owned())) };
    let same = |found: Result<Option<String>>, expected: Result<Option<String>>| {
        assert_eq!(found.unwrap(), expected.unwrap());
    };
    same(get("T1"), at("T1.tap"));
    // It is not looked for from the beginning.
    fs::copy(world.image("T1"), tapes.join("A.tap")).unwrap();
    same(get("T1"), at("T1.tap"));
    fs::remove_file(tapes.join("A.tap")).unwrap();
    // Changed, added, taken away.
    fs::rename(world.image("T0"), tapes.join("B.tap")).unwrap();
    fs::rename(world.image("T1"), world.image("T0")).unwrap();
    fs::rename(tapes.join("B.tap"), world.image("T1")).unwrap();
    same(get("T1"), at("T0.tap"));
    same(get("T0"), at("T1.tap"));
    world.add_tape("T2", &Medium::default());
    same(get("T2"), at("T2.tap"));
    same(get("T3"), Ok(None));
    fs::remove_file(world.image("T2")).unwrap();
    same(get("T2"), Ok(None));
    // One that is damaged hides no other one, and is told where it may be the one that is wanted.
    fs::write(tapes.join("0.tap"), "no image").unwrap();
    same(get("T1"), at("T0.tap"));
    assert!(get("T2").unwrap_err().to_string().contains("0.tap"));
}

#[test]
fn a_box_of_tapes_is_enough() {
    let scene = Scene::new(&["T0", "T1", "T2", "T3"], Some(4 << 20));
    data::noise_file(&scene.sandbox.source.join("more"), 9, 1 << 20);
    scene.sandbox.backup();
    scene.archive(1);
    let used: Vec<Vec<u8>> =
        scene.tapes().tapes().unwrap().into_iter().map(|it| it.tape.label).collect();
    assert!(used.len() > 1, "one tape has held it all");
    // The machine burns: neither catalog nor volume nor spool are left.
    fs::remove_dir_all(scene.sandbox.path("volume")).unwrap();
    let new = scene.sandbox.path("anew");
    let into = scene.sandbox.path("into");
    let dir = scene.world.base.join("tapes");
    let mut labels = used.iter().rev();
    let mut next = || labels.next().map(|it| open(&dir, it)).transpose();
    let (gathered, made) =
        gather::rebuild(&new, from(&into, &mut next), &Progress::default(), &mut |id, file| {
            panic!("{id}: {file:?}")
        });
    let summary = made.unwrap();
    assert_eq!(gathered.problem_count, 0, "{gathered:?}");
    assert_eq!((gathered.tapes, summary.runs), (used.len() as u64, 2), "{summary:?}");
    assert_eq!((summary.problem_count, summary.volumes_gone.len()), (0, 1), "{summary:?}");
    // Everything is there to see, and says where it is.
    let program = |line: &[&str]| {
        let mut command = Command::new(scene.sandbox.program().get_program());
        command.arg("--catalog").arg(&new).args(line);
        crate::common::run(&mut command)
    };
    let ran = program(&["restore", "large", "/dev/null"]);
    assert!(ran.errors().contains("tape"), "{}", ran.errors());
    let done = scene.recall(&new, 2);
    assert_eq!(done.missing, 0, "{done:?}");
    let restored = scene.sandbox.path("restored");
    program(&["revert-to-run", "2", restored.to_str().unwrap()]).code(0);
    assert_same(&Tree::of(&scene.sandbox.source), &Tree::of(&restored));
    // A second attempt with the same names is refused, and nothing is touched.
    let error =
        gather::rebuild(&new, from(&into, &mut || Ok(None)), &Progress::default(), &mut |_, _| {
            Ok(())
        })
        .1
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn a_volume_that_burnt_is_told_and_is_no_problem_if_tapes_have_it_all() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    fs::remove_dir_all(scene.sandbox.path("volume")).unwrap();
    let program = |catalog: &str, line: &[&str]| {
        let mut command = Command::new(scene.sandbox.program().get_program());
        command.arg("--catalog").arg(scene.sandbox.path(catalog)).args(line);
        crate::common::run(&mut command)
    };
    let shelf = scene.world.base.join("tapes");
    let from_tapes = |catalog: &str, more: &[&str]| {
        let into = scene.sandbox.path(&format!("{catalog}-into"));
        let (shelf, into) = (shelf.to_str().unwrap(), into.to_str().unwrap());
        program(catalog, &[&["rebuildmeta", "--tapes", shelf, "--into", into], more].concat())
    };
    let told_json = from_tapes("json", &["--json"]).code(0).json();
    let counts = ["problems", "volumes_missing"].map(|it| told_json[it].as_u64());
    assert_eq!(counts, [Some(0), Some(1)]);
    let ran = from_tapes("anew", &[]).code(0);
    let told = ran.text();
    let line = told.lines().find(|it| it.contains("is not here")).unwrap();
    let said = format!("  volume 1 ({}) is not here;", scene.sandbox.path("volume").display());
    assert!(line.starts_with(&said) && !told.contains("did not fit"), "{told}");
    // What is said is what is to be done, at once or later.
    let words: Vec<&str> = line.split("raidtape ").nth(1).unwrap().split(' ').collect();
    assert_eq!(words[..2], ["volumes", "--retire"]);
    assert_eq!(told_json["volumes_gone"][0], words[2]);
    program("anew", &words).code(0);
    program("anew", &["tape", "recall", "latest", "--tapes", shelf.to_str().unwrap()]).code(0);
    let restored = scene.sandbox.path("restored");
    program("anew", &["revert-to-run", "1", restored.to_str().unwrap()]).code(0);
    assert_same(&Tree::of(&scene.sandbox.source), &Tree::of(&restored));
    // A block that is on no tape may be on that volume.
    let path = image(&scene, "T0");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let ran = from_tapes("other", &[]).code(3);
    let errors = ran.errors();
    assert!(errors.contains("volume 1 (") && errors.contains("was not given"), "{errors}");
    assert!(errors.contains("1 blocks are on none of these tapes"), "{errors}");
    assert!(!ran.text().contains("--retire"), "{}", ran.text());
}

/// A run goes to two cartridges of a library and comes back by two drives; then the machine burns
/// and the cartridges are all that is left. For the machine with real drives.
pub fn on_real_drives() {
    let sandbox = Sandbox::with(&["--block-size", "1MiB"]);
    data::mixed_tree(&sandbox.source, 7, 8);
    data::noise_file(&sandbox.source.join("large"), 8, 5 << 20);
    sandbox.backup();
    let drives: Vec<String> = vm("TAPE_DRIVES").split_whitespace().map(str::to_owned).collect();
    let library = vm("CHANGER");
    let spool = sandbox.path("t0p");
    let program = |line: &[&str]| {
        let mut command = Command::new(sandbox.program().get_program());
        command.env("T0P_ROOT", &spool).current_dir(sandbox.path("")).args(line);
        crate::common::run(&mut command)
    };
    let init = || {
        for (number, device) in drives.iter().enumerate() {
            let (name, number) = (format!("d{number}"), number.to_string());
            let line = ["t0p", "init", "-d", &name, "--changer", &library, "--changer-drive"];
            program(&[&line[..], &[&number, device]].concat()).code(0);
        }
    };
    init();
    let changer = Changer::Library(Library::new(&library));
    changer.unload(0).unwrap();
    changer.unload(1).unwrap();
    for label in ["TVM004L8", "TVM003L8"] {
        changer.load(label.as_bytes(), 0).unwrap();
        program(&["t0p", "label", "-w", "-f", label]).code(0);
    }
    // Only 64 MiB each, of which most is somebody else's.
    let mut drive = raidtape::tape::open(Path::new(&drives[0]), Access::Write).unwrap();
    drive.to_end_of_data().unwrap();
    for _ in 0..59 {
        assert_eq!(drive.write(&vec![7; 1 << 20]).unwrap(), Wrote::Whole);
    }
    assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
    drive.close().unwrap();

    let catalog = sandbox.catalog.to_str().unwrap();
    let line = ["--catalog", catalog, "tape", "archive", "latest", "--batch-size", "2MiB"];
    program(&line).code(0);
    let tapes = Tapes::look(&sandbox.catalog).unwrap().unwrap().tapes().unwrap();
    let blocks: Vec<u64> = tapes.iter().map(|it| it.blocks).collect();
    assert!(blocks.len() == 2 && blocks.iter().all(|it| *it > 0), "{tapes:?}");

    // The first file of the first tape is somebody else's.
    let by_hand = [("TVM003L8", 2), ("TVM004L8", 1)];
    let restored = unpack_by_hand(&changer, &sandbox.path("unpacked"), &by_hand);
    tool("diff", args!["-r", &sandbox.source, &restored]);

    let all = sandbox.blocks("volume");
    all.iter().for_each(|it| fs::remove_file(&it.0).unwrap());
    let recall = ["--catalog", catalog, "tape", "recall", "latest", "--drive", "d0", "--drive"];
    program(&[&recall[..], &["d1"]].concat()).code(0);
    sandbox.assert_valid();
    let line = ["--catalog", catalog, "tape", "verify", "latest"];
    program(&line).code(0);

    fs::remove_dir_all(sandbox.path("volume")).unwrap();
    fs::remove_dir_all(&spool).unwrap();
    init();
    let line = ["--catalog", "new", "rebuildmeta", "--tapes", "--into", "into"];
    // The library has cartridges that are not ours, which is told; the volume that burnt is no
    // problem.
    let said = program(&line).code(3).errors();
    assert!(said.lines().all(|it| it.ends_with("it has no label of ours")), "{said}");
    program(&["--catalog", "new", "tape", "recall", "latest"]).code(0);
    program(&["--catalog", "new", "revert-to-run", "1", "restored"]).code(0);
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&sandbox.path("restored")));
}
