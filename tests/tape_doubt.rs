//! What reading tapes finds out, and what then counts: bad copies, faults that pass, tapes that
//! were labelled anew or cannot be had.

use std::fs;
use std::path::Path;

use raidtape::catalog::tapes::Item;
use raidtape::error::ErrorKind;
use raidtape::progress::Progress;
use raidtape::tape::drive::Access;
use raidtape::tape::label::Label;
use raidtape::tape::load::{self, Station};
use raidtape::tape::loaded::Loaded;
use raidtape::tape::runs::gather;
use raidtape::tape::runs::note_written_over;
use raidtape::tape::runs::recall::Source;
use raidtape::tape::spool::text::Fields;

use crate::common::args;
use crate::common::disk::Disk;
use crate::common::faultdrive::{FaultDrive, Plan, Trouble};
use crate::tape_recall::{Scene, from, open};

/// The records of an image: where the bytes of each block are.
fn records(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let (mut at, mut found) = (0, Vec::new());
    while let Some(word) = bytes.get(at..at + 4) {
        let len = u32::from_le_bytes(word.try_into().unwrap()) as usize;
        if len > 0 && len < 1 << 24 {
            found.push(at + 4..at + 4 + len);
            at += 4 + len.next_multiple_of(2);
        }
        at += 4;
    }
    found
}

/// What of a member is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Header,
    Name,
    Content,
}

/// Changes a byte of the content of the first member whose name begins so.
fn flip(image: &Path, prefix: &[u8]) -> Vec<u8> {
    flip_part(image, prefix, Part::Content)
}

/// Changes a byte of the first member whose name begins so, and of which enough is in one block;
/// gives its name.
fn flip_part(image: &Path, prefix: &[u8], part: Part) -> Vec<u8> {
    const AHEAD: usize = 30;
    let mut bytes = fs::read(image).unwrap();
    for record in records(&bytes) {
        let block = &bytes[record.clone()];
        // Behind a header of 76 digits, whose first are these.
        let found = block
            .windows(prefix.len())
            .enumerate()
            .find(|(at, it)| *it == prefix && *at >= 76 && block[at - 76..].starts_with(b"070707"));
        let Some((at, _)) = found else { continue };
        let Some(len) = block[at..].iter().position(|it| *it == 0) else { continue };
        if at + len + AHEAD < block.len() {
            let name = block[at..at + len].to_vec();
            let changed = match part {
                Part::Header => at - 76,
                Part::Name => at + len - 1,
                Part::Content => at + len + AHEAD,
            };
            bytes[record.start + changed] ^= 1;
            fs::write(image, bytes).unwrap();
            return name;
        }
    }
    panic!("no member {}", String::from_utf8_lossy(prefix));
}

/// Puts a tape into the drive, and says so.
fn swap(scene: &Scene, label: &str) {
    scene.world.insert(label);
    scene.world.spool().drive(None).unwrap().take().unwrap().unload().unwrap();
}

#[test]
fn documents_of_a_tape_are_proved_and_bad_ones_go_to_tape_again() {
    let parts = [
        (&b"meta/"[..], Part::Content),
        (b"meta/", Part::Name),
        (b"meta/", Part::Header),
        (b"manifests/", Part::Content),
        (b"manifests/", Part::Header),
        (b"catalog/", Part::Content),
    ];
    for (prefix, part) in parts {
        let scene = Scene::new(&["T0", "T1"], None);
        scene.archive(1);
        assert_eq!(scene.archive(1).tally.batches, 0);
        assert_eq!(scene.verify("T0").unwrap().problem_count, 0);
        let name = flip_part(&scene.world.image("T0"), prefix, part);
        let found = scene.verify("T0").unwrap();
        let told = found.problems.iter().map(|it| it.to_string()).collect::<Vec<_>>();
        let text = String::from_utf8_lossy(&name).into_owned();
        assert!(told.iter().any(|it| it.contains(&text)), "{part:?} of {text}: {told:?}");
        assert!(part != Part::Content || found.problem_count == 1, "{told:?}");
        assert_eq!(scene.bad("T0"), 1, "{part:?} of {text}: {told:?}");
        let verified = |label: &[u8]| {
            scene.tapes().files(label).unwrap().iter().filter(|it| it.verified.is_some()).count()
        };
        assert_eq!(verified(b"T0") + 1, scene.tapes().files(b"T0").unwrap().len());
        if part == Part::Content {
            // It may be the tape that has the bad one.
            assert!(scene.archive(1).tally.batches > 0, "{text} has no good copy");
            assert_eq!(scene.archive(1).tally.batches, 0, "{text}");
            continue;
        }
        // The block of a bad meta can be had all the same.
        swap(&scene, "T1");
        assert!(scene.archive(1).tally.batches > 0, "{text} has no good copy");
        assert_eq!(scene.verify("T1").unwrap().problem_count, 0);
        assert_eq!(scene.archive(1).tally.batches, 0);
        let count = scene.lose_blocks() as u64;
        let done = scene.recall(scene.catalog(), 1);
        assert_eq!((done.blocks, done.missing), (count, 0), "{done:?}");
    }
}

#[test]
fn behind_an_end_that_comes_too_early_nothing_counts() {
    let scene = Scene::new(&["T0", "T1"], None);
    scene.archive(1);
    let all = scene.verify("T0").unwrap();
    let image = scene.world.image("T0");
    let bytes = fs::read(&image).unwrap();
    let records = records(&bytes);
    // Amid a block in the middle of the tape.
    let cut = records[records.len() / 2].start + 100;
    fs::write(&image, &bytes[..cut]).unwrap();
    let found = scene.verify("T0").unwrap();
    assert!(found.problem_count > 0 && found.blocks > 0, "{found:?}");
    assert!(found.blocks < all.blocks && scene.bad("T0") > 0, "{found:?}");
    let mut noted = 0;
    let tapes = scene.tapes();
    for file in tapes.files(b"T0").unwrap() {
        let mut each = |it: raidtape::catalog::tapes::Member| {
            noted += u64::from(matches!(it.item, Item::Block(_)));
            Ok(())
        };
        tapes.members((b"T0", file.filenum), &mut each).unwrap();
    }
    assert_eq!(noted, all.blocks);
    swap(&scene, "T1");
    let again = scene.archive(1);
    assert_eq!(again.blocks, all.blocks - found.blocks);
    scene.lose_blocks();
    let done = scene.recall(scene.catalog(), 1);
    assert_eq!(done.missing, 0, "{done:?}");
    scene.assert_restores("restored");
}

#[test]
fn a_fault_of_a_drive_that_passes_costs_no_copy() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    let path = scene.world.image("T0");
    let with = |plan: Option<Plan>| {
        let count = scene.lose_blocks() as u64;
        let mut counter = None;
        let get = |_: &[u8]| {
            let (drive, told) = FaultDrive::open(&path, plan);
            counter = Some(told);
            Loaded::with(drive, &path).map(Some)
        };
        let source = Source { has: None, get: Box::new(get) };
        let done = scene.recall_by(scene.catalog(), vec![source]).unwrap();
        (count, done, counter.unwrap())
    };
    let (_, done, counter) = with(None);
    assert_eq!(done.missing, 0);
    let (operations, mut hits) = (counter.operations(), 0);
    for trouble in [Trouble::Medium, Trouble::Reset] {
        let mut at = 1;
        while at <= operations {
            let (count, done, counter) = with(Some(Plan { trouble, at, for_ever: false }));
            assert_eq!(scene.bad("T0"), 0, "{trouble:?} at {at}: {done:?}");
            if done.missing > 0 {
                // Nobody knew which tape it is, or it was the last that was done.
                assert!(done.blocks == 0 || at + 3 > operations, "{trouble:?} at {at}: {done:?}");
                assert_eq!(scene.recall(scene.catalog(), 1).missing, 0);
            } else {
                assert_eq!(done.blocks, count);
            }
            hits += counter.hits();
            at += 1 + at / 8;
        }
    }
    assert!(operations > 50 && hits > 30, "{hits} faults in {operations}");
    scene.sandbox.assert_valid();
}

#[test]
fn one_block_that_nobody_can_describe_leaves_the_others_alone() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    let name = flip(&scene.world.image("T0"), b"meta/");
    let (new, into) = (scene.sandbox.path("anew"), scene.sandbox.path("into"));
    fs::remove_dir_all(scene.sandbox.path("volume")).unwrap();
    let dir = scene.world.base.join("tapes");
    let mut labels = [b"T0"].into_iter();
    let mut next = || labels.next().map(|it| open(&dir, it)).transpose();
    let progress = Progress::default();
    let (gathered, made) =
        gather::rebuild(&new, from(&into, &mut next), &progress, &mut |_, _| Ok(()));
    made.unwrap();
    assert!(gathered.problem_count > 0, "{gathered:?}");
    let done = scene.recall(&new, 1);
    assert!(done.missing <= 1 && done.blocks > 0, "{done:?}");
    let id = String::from_utf8(name).unwrap();
    let id = id.trim_start_matches("meta/").trim_end_matches(".meta.json.zst").to_owned();
    let named = done.problems.iter().any(|it| it.to_string().contains(&id));
    assert!(done.missing == 0 || named, "{done:?}");
}

#[test]
fn a_job_that_waits_for_a_tape_keeps_nothing_else_from_those_there_are() {
    let scene = Scene::new(&["T0"], None);
    // The second copy has no tape.
    let error = scene.archive_alone(2).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongTape, "{error}");
    let before = scene.tapes().tape(b"T0").unwrap().unwrap().blocks;
    assert!(before > 0);
    crate::common::data::noise_file(&scene.sandbox.source.join("new"), 99, 1 << 20);
    scene.sandbox.backup();
    let error = scene.archive_alone(1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongTape, "{error}");
    assert!(error.to_string().contains("t0job --revoke"), "{error}");
    assert!(scene.tapes().tape(b"T0").unwrap().unwrap().blocks > before);
    // Nor does it come to be once more.
    let jobs = || scene.world.spool().jobs(false).unwrap().len();
    let before_second = jobs();
    for _ in 0..2 {
        scene.archive_alone(2).unwrap_err();
    }
    let waiting = jobs();
    scene.archive_alone(2).unwrap_err();
    assert_eq!((waiting, jobs()), (before_second + 1, waiting));
    // It is written when there is a tape.
    scene.world.add_tape("T1", &raidtape::tape::medium::Medium::default());
    assert_eq!(scene.archive(1).resumed.len(), 2);
    assert!(scene.tapes().tape(b"T1").unwrap().unwrap().blocks >= before);
    assert_eq!(scene.archive(1).tally.batches, 0);
}

#[test]
fn a_volume_without_room_sends_blocks_to_another() {
    let scene = Scene::new(&["T0"], None);
    let small = Disk::ext4(&scene.sandbox, "small", 64);
    // The blocks of a second file are on this one alone.
    scene.sandbox.ok(args!["add-volume", &small.point]);
    let (volume, aside) = (scene.sandbox.path("volume"), scene.sandbox.path("aside"));
    fs::rename(&volume, &aside).unwrap();
    crate::common::data::noise_file(&scene.sandbox.source.join("new"), 99, 3 << 20);
    scene.sandbox.backup();
    fs::rename(&aside, &volume).unwrap();
    scene.archive(1);
    let lost = scene.sandbox.blocks("small");
    assert!(!lost.is_empty());
    lost.iter().for_each(|it| fs::remove_file(&it.0).unwrap());
    let filler = fs::File::create(small.point.join("filler")).unwrap();
    let flags = rustix::fs::FallocateFlags::empty();
    rustix::fs::fallocate(&filler, flags, 0, small.free() - (64 << 10)).unwrap();
    let done = scene.recall(scene.catalog(), 1);
    assert_eq!((done.blocks, done.missing), (lost.len() as u64, 0), "{done:?}");
}

#[test]
fn what_a_tape_had_before_it_was_labelled_anew_counts_no_more() {
    let scene = Scene::new(&["T0"], None);
    let all = scene.archive(1);
    let (spool, catalog) = (scene.world.spool(), scene.catalog());
    note_written_over(&spool, catalog).unwrap();
    assert!(!scene.tapes().tape(b"T0").unwrap().unwrap().is_lost);
    let drive = spool.drive(None).unwrap();
    let mut station = Station::open(&spool, &drive, Access::Write).unwrap();
    let mut label = Label::new("T0").unwrap();
    label.add("created", "77").unwrap();
    load::write_label(&spool, &mut station, &label, &Fields::default(), 77).unwrap();
    let Station { loaded, taken } = station;
    loaded.close().unwrap();
    drop(taken);
    note_written_over(&spool, catalog).unwrap();
    assert!(scene.tapes().tape(b"T0").unwrap().unwrap().is_lost);
    let again = scene.archive(1);
    assert_eq!(again.blocks, all.blocks);
    assert!(!scene.tapes().tape(b"T0").unwrap().unwrap().is_lost);
    note_written_over(&spool, catalog).unwrap();
    assert!(!scene.tapes().tape(b"T0").unwrap().unwrap().is_lost);
    assert_eq!(scene.verify("T0").unwrap().problem_count, 0);
    assert_eq!(scene.archive(1).tally.batches, 0);
    scene.lose_blocks();
    assert_eq!(scene.recall(catalog, 1).missing, 0);
}

#[test]
fn a_tape_that_is_gone_counts_no_more_whatever_its_log_says() {
    let scene = Scene::new(&["T0", "T1"], None);
    scene.archive(1);
    let spool = scene.world.spool();
    // Whoever labelled it anew has died before he could put its log aside.
    spool.tape(b"T0").unwrap().unwrap().set_gone(Some(7)).unwrap();
    note_written_over(&spool, scene.catalog()).unwrap();
    assert!(scene.tapes().tape(b"T0").unwrap().unwrap().is_lost);
    swap(&scene, "T1");
    assert!(scene.archive(1).blocks > 0);
}

#[test]
fn a_run_that_is_on_no_tape_cannot_be_verified() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    crate::common::data::noise_file(&scene.sandbox.source.join("new"), 99, 1 << 20);
    scene.sandbox.backup();
    let tapes = scene.world.base.join("tapes");
    scene.sandbox.run(args!["tape", "verify", "latest", "--tapes", &tapes]).code(0);
    scene.sandbox.ok(args!["tape", "lost", "T0"]);
    let ran = scene.sandbox.run(args!["tape", "verify", "latest", "--tapes", &tapes]);
    assert_eq!(ran.exit_code(), Some(1), "{}", ran.errors());
    assert!(ran.errors().contains("on any tape"), "{}", ran.errors());
}
