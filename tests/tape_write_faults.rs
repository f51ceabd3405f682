//! Writing to tape that is ended at each step, by a drive or by a crash: what was acknowledged is
//! on the tape, what is on the tape stays, and the next write does the rest.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use raidtape::error::ErrorKind;
use raidtape::tape::drive::{Access, Why};
use raidtape::tape::loaded::Loaded;
use raidtape::tape::medium::Medium;
use raidtape::tape::stream::{Counter, Options, Stream};
use raidtape::tape::write::Settings;

use crate::common::faultdrive::{FaultDrive, Plan, Trouble};
use crate::common::faultfs::disk::Disk;
use crate::common::faultfs::{Cut, FaultFs, Image, Rules};
use crate::common::tape::scratch;
use crate::common::tapeworld::{BLOCK, Done, Objects, TapeWorld};

const A: &str = "28970c2a-8eea-4060-8fc9-574e562fda12";
const B: &str = "7a5ea04c-f6e5-41a3-895d-2ce6706aa1c6";
/// The files of the jobs, and their lengths.
const FILES: [(&str, usize); 7] =
    [("z", 300), ("a", 900), ("b", 0), ("c", 1200), ("d", 40), ("e", 700), ("f", 10)];
const TAPES: [&str; 4] = ["T0", "T1", "T2", "T3"];

/// Job B is on the tape already. Job A has two batches; with a `capacity` the tape ends in the
/// second one.
fn scene(base: &Path, capacity: Option<u64>, worm: bool) -> TapeWorld {
    let world = TapeWorld::new(base);
    let medium = Medium { capacity, worm, ..Medium::default() };
    world.add_tape("T0", &medium);
    world.add_tape("T1", &Medium::default());
    world.insert("T0");
    FILES.iter().for_each(|(name, len)| world.add_file(name, *len));
    world.add_job(B, &[], &[&["z"]]);
    write(&world, None).result.unwrap();
    world.add_job(A, &[], &[&["a", "b"], &["c", "d", "e", "f"]]);
    world
}

fn write(world: &TapeWorld, plan: Option<Plan>) -> Done {
    let receipt = Some(world.base.join("receipts"));
    world.write_with(plan, Settings { receipt, ..Settings::default() }, &mut |_| {})
}

/// Bytes of the first tape's image at which it ends within the second batch.
fn capacity() -> u64 {
    let dir = scratch();
    let world = scene(dir.path(), None, false);
    write(&world, None).result.unwrap();
    fs::metadata(world.image("T0")).unwrap().len() - 1700
}

fn tapes(world: &TapeWorld) -> BTreeMap<&'static str, Objects> {
    let there = TAPES.into_iter().filter(|it| world.image(it).exists());
    there.map(|it| (it, world.objects(it))).collect()
}

#[track_caller]
fn assert_grown(before: &BTreeMap<&str, Objects>, after: &BTreeMap<&str, Objects>, what: &str) {
    for (label, objects) in before {
        assert!(after[label].starts_with(objects), "{what}: {label} was overwritten");
    }
}

/// Writes what is left, on another tape if none has room, and looks at everything.
fn finish(world: &TapeWorld, what: &str) {
    let before = tapes(world);
    for spare in ["T2", "T3"] {
        match write(world, None).result {
            Ok(()) => break,
            Err(e) if e.kind() == ErrorKind::WrongTape => {
                // Nothing is in the drive, or what is there was said to be full.
                world.add_tape(spare, &Medium::default());
                world.insert(spare);
                let drive = world.spool().drive(None).unwrap();
                drive.take().unwrap().unload().unwrap();
            }
            Err(e) => panic!("{what}: {e}"),
        }
    }
    write(world, None).result.unwrap_or_else(|e| panic!("{what}: {e}"));
    world.assert_done();
    let after = tapes(world);
    assert_grown(&before, &after, what);
    let ends = |it: &Objects| it.last() == Some(&None);
    assert!(after.values().all(ends), "{what}: a tape file is not closed");
    let found = world.check(Some(&world.base.join("receipts")));
    for (name, _) in FILES {
        let results = found.get(name).unwrap_or_else(|| panic!("{what}: {name} is nowhere"));
        assert!(results.iter().all(Option::is_none), "{what}: {name}: {results:?}");
    }
    assert_eq!(found.len(), FILES.len(), "{what}");
}

/// Has the drive fail at each of its operations.
fn at_every_operation(trouble: Trouble, capacity: Option<u64>, worm: bool) {
    let seed = scratch();
    scene(seed.path(), capacity, worm);
    let mut met = 0;
    for for_ever in [false, true] {
        for at in 1.. {
            let dir = scratch();
            copy(seed.path(), dir.path());
            let world = TapeWorld::at(dir.path());
            let before = tapes(&world);
            let done = write(&world, Some(Plan { trouble, at, for_ever }));
            let what = format!("{trouble:?} at {at}, for ever {for_ever}: {:?}", done.result);
            assert_grown(&before, &tapes(&world), &what);
            // What is acknowledged is there, whatever else.
            world.check(Some(&dir.path().join("receipts")));
            met += done.hits;
            if done.result.is_ok() {
                world.assert_done();
            }
            finish(&world, &what);
            if done.operations < at {
                assert!(at > 15, "{what}: where are the operations?");
                break;
            }
        }
    }
    assert!(met > 20, "{trouble:?}: {met}");
}

/// Copies a tree of plain files, directories and links.
fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (kind, to) = (entry.file_type().unwrap(), to.join(entry.file_name()));
        if kind.is_dir() {
            fs::create_dir(&to).unwrap();
            copy(&entry.path(), &to);
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path()).unwrap(), to).unwrap();
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[test]
fn a_medium_error_at_every_operation_loses_nothing() {
    at_every_operation(Trouble::Medium, Some(capacity()), false);
}

#[test]
fn a_reset_at_every_operation_loses_nothing() {
    at_every_operation(Trouble::Reset, Some(capacity()), false);
    at_every_operation(Trouble::Reset, None, false);
}

#[test]
fn a_kill_at_every_operation_loses_nothing() {
    at_every_operation(Trouble::Stop, Some(capacity()), false);
}

#[test]
fn an_end_of_the_tape_at_every_operation_loses_nothing() {
    at_every_operation(Trouble::Refused(Why::EarlyWarning), None, false);
    at_every_operation(Trouble::Refused(Why::Physical), Some(capacity()), false);
}

#[test]
fn a_protected_tape_at_every_operation_loses_nothing() {
    at_every_operation(Trouble::Refused(Why::Protected), Some(capacity()), false);
}

#[test]
fn a_tape_that_can_only_be_appended_to_loses_nothing() {
    at_every_operation(Trouble::Medium, Some(capacity()), true);
    at_every_operation(Trouble::Refused(Why::Physical), None, true);
}

#[test]
fn a_worm_tape_of_which_the_drive_does_not_say_so_is_not_burnt() {
    let names: Vec<String> = (0..30).map(|it| format!("file{it}")).collect();
    let names: Vec<&str> = names.iter().map(|it| &**it).collect();
    let plan = Plan { trouble: Trouble::HiddenWorm, at: 1, for_ever: true };
    for is_known in [false, true] {
        let dir = scratch();
        let world = TapeWorld::new(dir.path());
        let medium = Medium { capacity: Some(53_000), worm: true, ..Medium::default() };
        world.add_tape("T0", &medium);
        world.add_tape("T1", &Medium::default());
        world.insert("T0");
        names.iter().for_each(|it| world.add_file(it, 700));
        let tape = world.spool().tape(b"T0").unwrap().unwrap();
        if is_known {
            // Whoever is told notes it for the others, and then it is not even tried.
            world.add_job(B, &[], &[&["file0"]]);
            write(&world, None).result.unwrap();
        }
        assert_eq!(tape.is_worm().unwrap(), is_known);
        world.add_job(A, &[], &[&names]);
        let done = write(&world, Some(plan));
        done.result.unwrap();
        assert_eq!(done.hits, u64::from(!is_known), "writing over something is tried once");
        world.assert_done();
        assert_eq!(world.check(Some(&dir.path().join("receipts"))).len(), names.len());
        // The first part is there, without an end.
        let on: Vec<_> = done.told.iter().map(|it| (&*it.tape, it.batch)).collect();
        assert_eq!(on, [(&b"T0"[..], 0), (b"T1", 1)]);
        let text = fs::read_to_string(world.spool().job(A).unwrap().dir().join("w0")).unwrap();
        assert!(text.contains("\nincomplete "), "{text}");
    }
}

#[test]
fn a_length_of_blocks_that_a_drive_does_not_take_spoils_no_tape() {
    let dir = scratch();
    let world = scene(dir.path(), None, false);
    let tape = world.spool().tape(b"T0").unwrap().unwrap();
    let mut metrics = tape.metrics().unwrap();
    metrics.remove("blocksize");
    tape.set_metrics(&metrics).unwrap();
    let before = tapes(&world);
    let plan = Plan { trouble: Trouble::Longer(32_768), at: 1, for_ever: true };
    let long = Settings { block_bytes: Some(65_536), ..Settings::default() };
    let done = world.write_with(Some(plan), long, &mut |_| {});
    assert_eq!(done.result.unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(done.hits, 1, "it is not tried twice");
    assert!(tapes(&world) == before && tape.metrics().unwrap().get("blocksize").is_none());
    write(&world, Some(plan)).result.unwrap();
    assert_eq!(tape.metrics().unwrap().number("blocksize"), Some(32_768u64));
}

#[test]
fn another_tape_after_an_error_is_left_alone() {
    let seed = scratch();
    scene(seed.path(), None, false);
    for at in 1..40 {
        let dir = scratch();
        copy(seed.path(), dir.path());
        let world = TapeWorld::at(dir.path());
        let before = tapes(&world);
        // The drive is reset, and what is under its head then is another tape.
        let plan = Plan { trouble: Trouble::Swap, at, for_ever: false };
        let done = write(&world, Some(plan));
        let what = format!("at {at}: {:?}", done.result);
        assert_eq!(before["T1"], world.objects("T1"), "{what}");
        if done.hits > 0 {
            let error = done.result.unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::WrongTape | ErrorKind::Io), "{what}");
        }
        world.insert("T0");
        finish(&world, &what);
    }
}

#[test]
fn a_kill_and_a_power_cut_at_every_step_of_the_spool_lose_nothing() {
    let dir = scratch();
    let base = dir.path();
    fs::create_dir(base.join("seed")).unwrap();
    scene(&base.join("seed"), Some(capacity()), false);
    let image = Image::of_dir(&base.join("seed"));
    let fault = FaultFs::new(&base.join("fs"));
    let mut disk = Disk::new(&image, Rules::default());
    disk.record();
    let (path, disk) = fault.put("world", disk);
    let world = TapeWorld::at(&path);
    write(&world, None).result.unwrap();
    world.assert_done();
    let moments = disk.lock().unwrap().moments.take().unwrap();
    assert!(moments.len() > 100, "{}", moments.len());
    let mut seen = std::collections::BTreeSet::new();
    for (number, moment) in moments.iter().enumerate() {
        let cuts = [Cut::Kept, Cut::Lost, Cut::Some(number as u64)];
        for cut in cuts {
            let image = moment.cut(cut);
            if !seen.insert(image.digest()) {
                continue;
            }
            let what = format!("{cut:?} after {number} ({:?} {})", moment.op, moment.what);
            let after = base.join("after");
            image.write_to(&after);
            finish(&TapeWorld::at(&after), &what);
            fs::remove_dir_all(&after).unwrap();
        }
    }
}

fn stream(path: &Path, plan: Option<Plan>, buffer_blocks: usize) -> Stream {
    let (drive, _) = FaultDrive::open(path, plan);
    let mut loaded = Loaded::with(drive, path).unwrap();
    loaded.drive().to_end_of_data().unwrap();
    let (block_bytes, buffer_bytes) = (BLOCK as u32, (buffer_blocks * BLOCK) as u64);
    let options = Options { block_bytes, buffer_bytes, is_past_warning: false };
    Stream::start(loaded, &options).unwrap()
}

/// Waits until so many blocks are written.
fn reaches(counter: &Counter, blocks: u64) {
    let begun = Instant::now();
    while counter.blocks() < blocks {
        assert!(begun.elapsed() < Duration::from_secs(60), "{} blocks", counter.blocks());
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_stream_starts_when_part_of_its_buffer_is_full_and_says_what_is_written() {
    let dir = scratch();
    let world = TapeWorld::new(dir.path());
    world.add_tape("T0", &Medium::default());
    let path = world.image("T0");
    let bytes: Vec<u8> = (0..100 * BLOCK + 7).map(|it| (it % 251) as u8).collect();
    let mut to_tape = stream(&path, None, 80);
    let counter = to_tape.counter();
    to_tape.write_all(&bytes[..9 * BLOCK + 100]).unwrap();
    assert_eq!(counter.blocks(), 0, "an eighth of the buffer is not full");
    to_tape.write_all(&bytes[9 * BLOCK + 100..10 * BLOCK]).unwrap();
    reaches(&counter, 10);
    to_tape.write_all(&bytes[10 * BLOCK..]).unwrap();
    let mut ended = to_tape.finish().unwrap();
    assert_eq!((ended.blocks, ended.why, counter.blocks()), (101, None, 101));
    assert!(ended.error.is_none());
    ended.loaded.drive().write_filemarks(1).unwrap();
    ended.loaded.close().unwrap();
    let mut file = world.tape_files("T0").pop().unwrap();
    assert!(file.split_off(bytes.len()).iter().all(|it| *it == 0));
    assert!(file == bytes);

    // A single block is room enough for none to wait, and so are two.
    for blocks in 0..3 {
        let mut to_tape = stream(&path, None, blocks);
        to_tape.write_all(&bytes).unwrap();
        let mut ended = to_tape.finish().unwrap();
        assert_eq!(ended.blocks, 101);
        ended.loaded.drive().write_filemarks(1).unwrap();
        ended.loaded.close().unwrap();
    }

    // What is not to be written any more is not waited for.
    let mut to_tape = stream(&path, None, 1000);
    to_tape.write_all(&bytes).unwrap();
    assert_eq!(to_tape.stop().unwrap().blocks, 0);
    drop(stream(&path, None, 1000));
}

#[test]
fn a_stream_ends_at_the_first_block_that_is_not_taken() {
    let bytes = vec![5; 50 * BLOCK];
    let troubles = [
        (Trouble::Medium, None),
        (Trouble::Reset, None),
        (Trouble::Refused(Why::EarlyWarning), Some(Why::EarlyWarning)),
        (Trouble::Refused(Why::Physical), Some(Why::Physical)),
        (Trouble::Refused(Why::Protected), Some(Why::Protected)),
    ];
    for (trouble, why) in troubles {
        let dir = scratch();
        let world = TapeWorld::new(dir.path());
        world.add_tape("T0", &Medium::default());
        let path = world.image("T0");
        // Rewinding, reading the label and going to the end come before.
        let plan = Plan { trouble, at: 3 + 8, for_ever: false };
        let mut to_tape = stream(&path, Some(plan), 4);
        let written = to_tape.write_all(&bytes);
        assert!(written.is_err(), "nobody waits for a drive that takes no more");
        let ended = to_tape.finish().unwrap();
        assert_eq!((ended.blocks, ended.why), (7, why), "{trouble:?}");
        assert_eq!(ended.error.map(|it| it.kind()), why.is_none().then_some(ErrorKind::Io));
        drop(ended.loaded);
        let mut loaded = Loaded::open(&path, Access::Write).unwrap();
        let tape = world.spool().tape(b"T0").unwrap().unwrap();
        assert_eq!(loaded.to_end(&tape).unwrap().filenum, 2);
    }
}
