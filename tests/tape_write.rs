//! Writing jobs to tape: what is on the tape, the end of tapes, names and files that fail.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use raidtape::error::ErrorKind;
use raidtape::tape::changer::{Changer, Library};
use raidtape::tape::drive::{Access, Moved};
use raidtape::tape::medium::Medium;
use raidtape::tape::spool::job::JobStatus;
use raidtape::tape::write::Settings;

use crate::common::tape::{scratch, vm, vtl};
use crate::common::tapeworld::{BLOCK, TapeWorld, content};
use crate::common::verbs::Place;

const A: &str = "28970c2a-8eea-4060-8fc9-574e562fda12";
const B: &str = "7a5ea04c-f6e5-41a3-895d-2ce6706aa1c6";

const ESTALE: i32 = 116;
const EFBIG: i32 = 27;
const ENOENT: i32 = 2;
const EINVAL: i32 = 22;
const ENOTDIR: i32 = 20;

/// Runs a program on these bytes in a directory; gives what it prints.
fn run(dir: &Path, line: &[&str], input: &[u8]) -> String {
    let path = dir.join(".input");
    fs::write(&path, input).unwrap();
    let mut command = Command::new(line[0]);
    command.args(&line[1..]).current_dir(dir).stdin(fs::File::open(&path).unwrap());
    let output = command.stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{line:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn all_ok(found: &BTreeMap<String, Vec<Option<i32>>>, names: &[&str]) {
    let expected: BTreeMap<_, _> = names.iter().map(|it| (it.to_string(), vec![None])).collect();
    assert_eq!(*found, expected);
}

#[test]
fn jobs_are_written_and_other_programs_read_them() {
    let dir = scratch();
    let world = TapeWorld::new(dir.path());
    world.add_tape("T0", &Medium::default());
    world.insert("T0");
    for (name, len) in
        [("a", 0), ("b c", 700), ("d/e", 5000), ("d/back\\slash", 3), ("big", 300_000)]
    {
        world.add_file(name, len);
    }
    symlink("b c", dir.path().join("src/link")).unwrap();
    let receipts = dir.path().join("receipts");
    let receipt = [("receipt", receipts.to_str().unwrap())];
    world.add_job(A, &receipt, &[&["a", "b c", "d", "d/e", "d/back\\slash"], &["big"]]);
    world.add_job(B, &receipt, &[&["big"]]);
    // Links and directories have no sums.
    fs::write(dir.path().join("src/plain"), "x").unwrap();
    let done = world.write(None);
    done.result.unwrap();
    assert_eq!((done.tally.jobs, done.tally.batches, done.tally.files), (2, 3, 7));
    world.assert_done();
    let told: Vec<_> = done.told.iter().map(|it| (&*it.job, it.batch, it.filenum)).collect();
    assert_eq!(told, [(A, 0, 1), (A, 1, 2), (B, 0, 3)]);
    let files = world.tape_files("T0");
    assert_eq!(files.len(), 4);
    assert!(files[0].starts_with(b"t0version:1\nlabel:T0\n"));
    for (file, names) in
        files[1..].iter().zip([&["a", "b c", "d", "d/e", "d/back\\slash"][..], &["big"], &["big"]])
    {
        let listed = run(dir.path(), &["cpio", "-t", "--quiet"], file);
        let lines: Vec<_> = listed.lines().collect();
        assert_eq!(lines[2..lines.len() - 1], *names);
        assert!(lines[0].ends_with("/@0") || lines[0].ends_with("/@1"), "{lines:?}");
        assert_eq!(lines[lines.len() - 1], format!("{}.sha256", lines[0]));
        let to = dir.path().join("out");
        fs::create_dir(&to).unwrap();
        let options = ["cpio", "-idm", "--quiet", "--no-absolute-filenames"];
        run(&to, &options, file);
        for name in names.iter().filter(|it| **it != "d") {
            let path = dir.path().join("src").join(name);
            assert!(fs::read(path).unwrap() == fs::read(to.join(name)).unwrap(), "{name}");
        }
        let sums = format!(".{}.sha256", lines[0]);
        run(&to, &["sha256sum", "--check", "--quiet", "--strict", &sums], b"");
        fs::remove_dir_all(&to).unwrap();
        let bsd = run(dir.path(), &["bsdcpio", "-t", "--quiet"], file);
        assert_eq!(bsd.lines().count(), lines.len());
    }
    let log = fs::read_to_string(dir.path().join("t0p/job/archive").join(B).join("log")).unwrap();
    let place = |at: usize| done.told[at].position;
    let position = world.spool().job(B).unwrap();
    let batch = position.batches().unwrap()[0];
    let mut batch = position.batch(batch).unwrap();
    let Some(raidtape::tape::spool::batch::Outcome::Ok(at, _)) = batch.next_result().unwrap()
    else {
        panic!()
    };
    assert_eq!(
        log,
        format!(
            "J {B} begin 1007\nT T0 filenum 3 position {}\nB 0 begin 1008 files 1\n\
             F {at} big\nB 0 end 1009 errors 0\nJ {B} end 1010\n",
            place(2)
        )
    );
    let log = fs::read_to_string(dir.path().join("t0p/tape/T0/log")).unwrap();
    let line =
        |at: usize, job: &str, batch: u64| format!("{} {} {job} {batch}\n", at + 1, place(at));
    assert_eq!(log, line(0, A, 0) + &line(1, A, 1) + &line(2, B, 0));
}

#[test]
fn a_batch_that_was_read_back_before_its_receipt_could_be_written_gets_it_all_the_same() {
    let dir = scratch();
    let world = TapeWorld::new(dir.path());
    world.add_tape("T0", &Medium::default());
    world.insert("T0");
    world.add_file("a", 700);
    let receipts = dir.path().join("none/receipts");
    world.add_job(A, &[("receipt", receipts.to_str().unwrap())], &[&["a"]]);
    world.write(None).result.unwrap_err();
    let job = dir.path().join("t0p/job").join(A);
    fs::rename(job.join("w0"), job.join("r0")).unwrap();
    fs::create_dir(dir.path().join("none")).unwrap();
    let done = world.write(None);
    done.result.unwrap();
    assert_eq!((done.told.len(), done.tally.jobs), (1, 1));
    let text = fs::read_to_string(&receipts).unwrap();
    assert!(text.contains(&format!("batch {A}/0\n")) && text.contains(" a\n"), "{text}");
}

#[test]
fn what_is_acknowledged_is_there() {
    let dir = scratch();
    let world = TapeWorld::new(dir.path());
    world.add_tape("T0", &Medium::default());
    world.insert("T0");
    let receipts = dir.path().join("receipts");
    world.add_file("a", 700);
    world.add_file("b", 5000);
    world.add_job(A, &[("receipt", receipts.to_str().unwrap())], &[&["a"], &["b"]]);
    world.write(None).result.unwrap();
    all_ok(&world.check(Some(&receipts)), &["a", "b"]);
    // Nothing is left to do, and nothing is done.
    let before = world.objects("T0");
    let done = world.write(None);
    done.result.unwrap();
    assert_eq!((done.tally.jobs, world.objects("T0")), (0, before));
}

/// A job over two tapes, the first of which ends after `capacity` bytes of its image.
fn over_two_tapes(capacity: u64, early_warning: u64) -> u64 {
    let dir = scratch();
    let world = TapeWorld::new(dir.path());
    let medium = Medium { capacity: Some(capacity), early_warning, ..Medium::default() };
    world.add_tape("T0", &medium);
    world.add_tape("T1", &Medium::default());
    world.insert("T0");
    let receipts = dir.path().join("receipts");
    let names: Vec<String> = (0..24).map(|it| format!("file{it}")).collect();
    let names: Vec<&str> = names.iter().map(|it| &**it).collect();
    for (at, name) in names.iter().enumerate() {
        world.add_file(name, [0, 10, 3000, 513, 80, 1][at % 6]);
    }
    let receipt = [("receipt", receipts.to_str().unwrap())];
    world.add_job(A, &receipt, &[&names[..4], &names[4..20], &names[20..]]);
    let done = world.write(None);
    done.result.unwrap_or_else(|e| panic!("{capacity} {early_warning}: {e}"));
    world.assert_done();
    all_ok(&world.check(Some(&receipts)), &names);
    let last = world.tape_files("T0").pop().unwrap();
    if done.tally.batches > 3 {
        let listed = run(dir.path(), &["cpio", "-t", "--quiet"], &last);
        assert!(listed.lines().last().unwrap().ends_with(".sha256"), "{listed}");
        let split = done.told.iter().find(|it| it.batch == 3).unwrap();
        let archived = dir.path().join("t0p/job/archive").join(A);
        let text = fs::read_to_string(archived.join(split.path.file_name().unwrap())).unwrap();
        assert!(text.contains("\ncomment continues "), "{text}");
        assert!(
            world.spool().tape(b"T0").unwrap().unwrap().metrics().unwrap().get("full").is_some()
        );
    }
    done.tally.batches
}

#[test]
fn a_batch_that_meets_the_end_of_the_tape_goes_on_on_the_next_one() {
    let label = 32_768 + 12;
    let mut splits = 0;
    for early_warning in [0, 1, 2000] {
        for capacity in (label + 600..label + 34_000).step_by(773) {
            splits += u64::from(over_two_tapes(capacity, early_warning) > 3);
        }
    }
    assert!(splits > 40, "{splits}");
}

#[test]
fn a_file_that_is_longer_than_a_tape_fails_and_the_others_do_not() {
    let dir = scratch();
    let world = TapeWorld::new(dir.path());
    for label in ["T0", "T1", "T2"] {
        let medium = Medium { capacity: Some(60_000), early_warning: 600, ..Medium::default() };
        world.add_tape(label, &medium);
    }
    world.insert("T0");
    for (name, len) in [("a", 100), ("long", 40_000), ("b", 200), ("longer", 100_000), ("c", 300)] {
        world.add_file(name, len);
    }
    world.add_job(A, &[], &[&["a", "long", "b", "longer", "c"]]);
    let done = world.write(None);
    done.result.unwrap();
    let found = world.check(None);
    let errors: BTreeMap<_, _> = found.iter().map(|it| (&**it.0, it.1[0])).collect();
    let expected = [("a", None), ("b", None), ("c", None)].into_iter();
    let long = [("long", Some(EFBIG)), ("longer", Some(EFBIG))];
    assert_eq!(errors, expected.chain(long).collect());
    world.assert_done();
}

#[test]
fn what_cannot_be_written_fails_and_the_rest_goes_on() {
    let dir = scratch();
    let world = TapeWorld::new(dir.path());
    world.add_tape("T0", &Medium::default());
    world.insert("T0");
    for (name, len) in [("a", 2000), ("gone", 1500), ("z", 10), ("TRAILER!!!", 10)] {
        world.add_file(name, len);
    }
    let receipts = dir.path().join("r");
    // Of two files the kernel says another length than they have.
    let (longer, shorter) = ("/proc/self/status", "/sys/kernel/mm/transparent_hugepage/enabled");
    let names = ["a", "TRAILER!!!", "none", longer, "nul\0", shorter, "gone", "a/b", "z"];
    world.add_job(A, &[("receipt", receipts.to_str().unwrap())], &[&names]);
    let gone = dir.path().join("src/gone");
    let done = world.write_with(None, Settings::default(), &mut |name| {
        if name == b"gone" {
            fs::remove_file(&gone).unwrap();
        }
    });
    done.result.unwrap();
    assert_eq!((done.tally.files, done.tally.errors), (2, 7));
    let job = world.spool().job(A).unwrap();
    let text = fs::read_to_string(job.dir().join("w0")).unwrap();
    for (errno, name) in [
        (EINVAL, "TRAILER!!!"),
        (ENOENT, "none"),
        (ESTALE, longer),
        (EINVAL, "nul\0"),
        (ESTALE, shorter),
        (ENOENT, "gone"),
        (ENOTDIR, "a/b"),
    ] {
        assert!(text.contains(&format!("\nfail {errno} {name}\n")), "{errno} {name}: {text}");
    }
    // What is there of them is told, and has no sum.
    for name in [longer, shorter] {
        assert!(text.contains(&format!("\nnote partial {name}\n")), "{text}");
    }
    assert!(text.contains("\nerrors 7\nnotes 2\n"), "{text}");
    let file = &world.tape_files("T0")[1];
    let listed = run(dir.path(), &["cpio", "-t", "--quiet"], file);
    let listed: Vec<_> = listed.lines().skip(2).take(4).collect();
    assert_eq!(listed, ["a", longer, shorter, "z"]);
    let sums = fs::read_to_string(job.dir().join("sums0")).unwrap();
    let sums: Vec<_> = sums.lines().map(|it| &it[66..]).collect();
    assert_eq!(sums, ["a", "z"]);
    world.check(Some(&receipts));
    world.assert_done();
}

#[test]
fn only_a_tape_that_may_be_written_is() {
    let dir = scratch();
    let world = TapeWorld::new(dir.path());
    world.add_file("a", 10);
    world.add_tape("T0", &Medium { write_protected: true, ..Medium::default() });
    world.add_tape("T1", &Medium::default());
    world.add_tape("T2", &Medium::default());
    world.add_job(A, &[("pool", "full")], &[&["a"]]);
    let spool = world.spool();
    spool.set_in_pool(b"full", b"T9", true).unwrap();
    let refused = |settings: Settings, what: &str| {
        let error = world.write_with(None, settings, &mut |_| {}).result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WrongTape, "{error}");
        assert!(error.to_string().contains(what), "{error}");
        assert_eq!(spool.job(A).unwrap().status().unwrap(), Some(JobStatus::Ready));
    };
    let settings = Settings::default();
    refused(settings.clone(), "there is no tape");
    world.insert("T1");
    refused(settings.clone(), "tape T1 is not of pool full");
    let wanted = Settings { tape: Some(b"T2".to_vec()), ..settings.clone() };
    refused(wanted, "wanted is tape T2");
    spool.set_in_pool(b"full", b"T0", true).unwrap();
    world.insert("T0");
    refused(settings.clone(), "is write-protected");
    // The drive is known to have another one.
    spool.set_in_pool(b"full", b"T1", true).unwrap();
    let drive = spool.drive(None).unwrap();
    drive.take().unwrap().load(&spool.tape(b"T2").unwrap().unwrap()).unwrap();
    world.insert("T1");
    refused(settings.clone(), "wanted is tape T2");
    drive.take().unwrap().unload().unwrap();
    let before = world.objects("T1");
    let tape = spool.tape(b"T1").unwrap().unwrap();
    let mut metrics = tape.metrics().unwrap();
    metrics.set("full", "1").unwrap();
    tape.set_metrics(&metrics).unwrap();
    spool.set_in_pool(b"full", b"T0", false).unwrap();
    refused(settings.clone(), "tape T1 is full");
    metrics.remove("full");
    tape.set_metrics(&metrics).unwrap();
    fs::write(tape.dir().join("log"), format!("7 9000 {B} 0\n")).unwrap();
    refused(settings.clone(), "it was overwritten");
    assert_eq!(world.objects("T1"), before);
    fs::remove_file(tape.dir().join("log")).unwrap();
    world.write(None).result.unwrap();
    assert_eq!(world.check(None).len(), 1);
    assert_eq!(BLOCK, world.objects("T1")[2].as_ref().unwrap().len());
}

/// Two jobs over two cartridges of a library, and what other programs read of them: for the machine
/// with real drives.
pub fn over_two_cartridges() {
    let place = Place::new();
    let (device, library) = (vm("TAPE"), vm("CHANGER"));
    place.ok(&["t0p", "init", "-d", "d0", "--changer", &library, &device]);
    let changer = Changer::Library(Library::new(library));
    for label in ["TVM004L8", "TVM003L8"] {
        changer.load(label.as_bytes(), 0).unwrap();
        place.ok(&["t0label", "-w", "-f", label]);
    }
    // Each of four files has twenty names: more than the 64 MiB of a cartridge.
    let src = place.base.join("src");
    fs::create_dir(&src).unwrap();
    let name = |it: usize| format!("file{it}");
    for at in 0..80 {
        match at < 4 {
            true => fs::write(src.join(name(at)), content(&name(at), (1 << 20) - at)).unwrap(),
            false => fs::hard_link(src.join(name(at % 4)), src.join(name(at))).unwrap(),
        }
    }
    let receipts = place.base.join("receipts");
    let root = format!("root={}", src.display());
    for range in [0..10, 10..80] {
        let job = place.ok(&["t0job", "-c", "-p", &root]);
        let names: String = range.map(|it| name(it) + "\n").collect();
        assert_eq!(place.feed(&["t0job", "-a", &job], &names).0, 0);
        place.ok(&["t0queue", "-a", &job]);
    }
    // An error of the medium on the way costs a tape file, and nothing else.
    vtl("fault 0 0a 90 1 3 0c 00");
    let buffer = ["--buffer", "8M", "-b", "256k"];
    let line = ["t0write", "-a", "-t", "TVM003L8", "-y", receipts.to_str().unwrap()];
    place.ok(&[&line[..], &buffer].concat());
    assert_eq!(place.ok(&["t0job", "-l"]), "");
    let inventory = changer.inventory().unwrap();
    assert_eq!(inventory.drives[0].tape.as_deref(), Some(&b"TVM004L8"[..]));

    let spool = place.spool();
    let (mut tapes, mut found) = (BTreeSet::new(), Vec::new());
    let out = place.base.join("out");
    fs::create_dir(&out).unwrap();
    for uuid in spool.jobs(true).unwrap() {
        let job = spool.job(&uuid).unwrap();
        for id in job.batches().unwrap() {
            let summary = job.batch(id).unwrap().summary().unwrap().unwrap();
            let tape = summary.get("tape").unwrap().to_vec();
            changer.load(&tape, 0).unwrap();
            tapes.insert(tape);
            let mut drive = raidtape::tape::open(Path::new(&device), Access::Read).unwrap();
            let position = summary.number("position").unwrap();
            assert_eq!(drive.locate(position).unwrap(), Moved::There);
            drive.close().unwrap();
            let to_cpio = format!(
                "dd if={device} of=archive bs=256k && cpio -t --quiet <archive && \
                 cpio -idm --quiet --no-absolute-filenames <archive && rm archive"
            );
            let listed = run(&out, &["bash", "-o", "pipefail", "-c", &to_cpio], b"");
            for line in listed.lines().filter(|it| it.starts_with("file")) {
                let read = fs::read(out.join(line)).unwrap();
                assert!(read == fs::read(src.join(line)).unwrap(), "{line}");
                fs::remove_file(out.join(line)).unwrap();
                found.push(line.to_owned());
            }
        }
    }
    assert_eq!(tapes.len(), 2, "the end of the tape was in the middle");
    found.sort();
    let mut expected: Vec<String> = (0..80).map(name).collect();
    expected.sort();
    assert_eq!(found, expected);
    let text = fs::read_to_string(&receipts).unwrap();
    assert_eq!(text.matches("\nok ").count(), 80);
    assert!(text.matches("%receipt").count() == 3, "{text}");
}
