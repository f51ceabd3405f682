//! Runs that are archived to tape, and what is known of them.
//!
//! Invariant: whatever was noted of a tape is on it, byte for byte, at the place that was noted.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use raidtape::catalog::Tapes;
use raidtape::catalog::tapes::{Item, KnownTape, Member, Tape, TapeFile};
use raidtape::chunk::{Digest, HashAlgo};
use raidtape::error::{Error, ErrorKind, Result};
use raidtape::progress::Progress;
use raidtape::sys::Time;
use raidtape::tape::cpio::{Added, Archive};
use raidtape::tape::drive::Access;
use raidtape::tape::label::Label;
use raidtape::tape::loaded::Loaded;
use raidtape::tape::medium::Medium;
use raidtape::tape::runs::{self, Archived, Means, Members, Noter, Options, archive};
use raidtape::tape::spool::job::JobStatus;
use raidtape::tape::spool::text::Fields;
use raidtape::tape::write::{Settings, Work, Writer, Written};
use serde_json::Value;

use crate::common::faultdrive::{FaultDrive, Plan, Trouble};
use crate::common::tapeworld::TapeWorld;
use crate::common::{Sandbox, args, data, tool, wait_for};

/// Length of the blocks of these tapes.
const BLOCK: u32 = 16 << 10;

/// A store, and tapes.
struct Shelf {
    sandbox: Sandbox,
    world: TapeWorld,
}

/// What is known of tapes: each, its files, and their members.
type Known = Vec<(KnownTape, Vec<(TapeFile, Vec<Member>)>)>;

/// What an archive came to.
struct Done {
    result: Result<Archived>,
    told: Vec<Written>,
    /// Whether anything has gone wrong in the drive.
    is_hit: bool,
}

impl Done {
    /// The tape files that were written: tape and number.
    fn files(&self) -> Vec<(String, u64)> {
        let name = |it: &Written| String::from_utf8(it.tape.clone()).unwrap();
        self.told.iter().map(|it| (name(it), it.filenum)).collect()
    }
}

fn options(pool: &str, copies: u64) -> Options {
    Options { run: 1, pool: pool.to_owned(), copies, batch_bytes: 2 << 20 }
}

impl Shelf {
    /// A store of some MiB with a run, and these tapes in the spool.
    fn new(init: &[&str], tapes: &[&str]) -> Shelf {
        let sandbox = Sandbox::with(&[&["--block-size", "1MiB"], init].concat());
        if init.contains(&"--copies") {
            sandbox.add_volume("second");
        }
        data::mixed_tree(&sandbox.source, 31, 40);
        data::noise_file(&sandbox.source.join("large"), 32, 3 << 20);
        sandbox.backup();
        let world = TapeWorld::new(&sandbox.path(""));
        let shelf = Shelf { sandbox, world };
        tapes.iter().for_each(|it| shelf.add_tape(it, &Medium::default()));
        shelf
    }

    fn add_tape(&self, label: &str, medium: &Medium) {
        self.world.add_tape(label, medium);
        let mut metrics = Fields::default();
        metrics.set("blocksize", BLOCK.to_string()).unwrap();
        let tape = self.world.spool().tape(label.as_bytes()).unwrap().unwrap();
        tape.set_metrics(&metrics).unwrap();
    }

    /// Archives; full tapes are followed by others, if that is so.
    fn archive(&self, options: &Options, changes: bool, plan: Option<Plan>) -> Done {
        let (spool, progress) = (self.world.spool(), Progress::default());
        let drive = spool.drive(None).unwrap();
        let taken = drive.take().unwrap();
        let device = drive.device().unwrap();
        let (opened, counter) = FaultDrive::open(&device, plan);
        let mut told = Vec::new();
        let result = Loaded::with(opened, &device).and_then(|loaded| {
            let means = Means {
                spool: &spool,
                drive: &taken,
                settings: Settings { buffer_bytes: 8 * u64::from(BLOCK), ..Settings::default() },
                tell: &mut |it| told.push(it.clone()),
                next_tape: &mut |mut loaded, wanted| {
                    let label = wanted.labels.first().filter(|_| changes);
                    let Some(label) = label else { return loaded.close().map(|()| None) };
                    loaded.drive().unload()?;
                    loaded.close()?;
                    self.world.insert(std::str::from_utf8(label).unwrap());
                    Loaded::open(&device, Access::Write).map(Some)
                },
            };
            archive(&self.sandbox.catalog, options, means, loaded, &progress)
        });
        Done { result, told, is_hit: counter.hits() > 0 }
    }

    fn tapes(&self) -> Tapes {
        Tapes::look(&self.sandbox.catalog).unwrap().unwrap()
    }

    /// All that is known.
    fn known(&self) -> Known {
        let tapes = self.tapes();
        let mut found = Vec::new();
        for tape in tapes.tapes().unwrap() {
            let label = tape.tape.label.clone();
            let mut files = Vec::new();
            for file in tapes.files(&label).unwrap() {
                let mut members = Vec::new();
                let mut each = |it| {
                    members.push(it);
                    Ok(())
                };
                tapes.members((&label, file.filenum), &mut each).unwrap();
                files.push((file, members));
            }
            found.push((tape, files));
        }
        found
    }

    /// Everything that is known of tapes is on them. Gives, for each tape, the number of blocks.
    #[track_caller]
    fn check(&self) -> BTreeMap<String, usize> {
        let paths: BTreeMap<String, _> = self.blocks().into_iter().collect();
        let mut found = BTreeMap::new();
        for (tape, files) in self.known() {
            let label = String::from_utf8(tape.tape.label).unwrap();
            let (objects, archives) = (self.world.objects(&label), self.world.tape_files(&label));
            let mut blocks = 0;
            for (file, members) in files {
                let what = format!("file {} of {label}", file.filenum);
                let marks = objects[..file.position as usize].iter().filter(|it| it.is_none());
                assert_eq!(marks.count() as u64, file.filenum, "{what}");
                assert_eq!(objects[file.position as usize - 1], None, "{what}");
                let archive = &archives[file.filenum as usize];
                assert!(archive.len() as u64 >= file.bytes, "{what}");
                for member in members {
                    let bytes = &archive[member.at as usize..][..member.len as usize];
                    match member.item {
                        Item::Block(id) => {
                            let stored = fs::read(&paths[&id.to_string()]).unwrap();
                            assert!(bytes == stored, "{what}: block {id}");
                            blocks += 1;
                        }
                        Item::Document(name, digest) => {
                            let mut hasher = HashAlgo::Blake3.hasher();
                            hasher.update(bytes);
                            let name = String::from_utf8_lossy(&name).into_owned();
                            assert_eq!(hasher.finish(), digest, "{what}: {name}");
                        }
                    }
                }
            }
            found.insert(label, blocks);
        }
        found
    }

    /// Names and paths of all blocks, the second volume's if there is one.
    fn blocks(&self) -> Vec<(String, std::path::PathBuf)> {
        let volume = if self.sandbox.path("second").exists() { "second" } else { "volume" };
        let blocks = self.sandbox.blocks(volume).into_iter().map(|it| it.0);
        blocks.map(|it| (it.file_name().unwrap().to_str().unwrap().to_owned(), it)).collect()
    }

    /// Blocks that are on fewer tapes of a pool.
    fn lacking(&self, pool: &str, copies: u64) -> usize {
        let tapes = self.tapes();
        let on = |name: &str| tapes.copies(&name.parse::<Digest>().unwrap(), Some(pool)).unwrap();
        self.blocks().iter().filter(|it| on(&it.0) < copies).count()
    }

    /// Writes nonsense into the middle of a block.
    fn damage(&self, volume: &str) -> String {
        let (path, len) = self.sandbox.blocks(volume).remove(0);
        let mut bytes = fs::read(&path).unwrap();
        bytes[len as usize / 2] ^= 1;
        fs::write(&path, bytes).unwrap();
        path.file_name().unwrap().to_str().unwrap().to_owned()
    }

    fn json(&self, line: &[&str]) -> Value {
        self.sandbox.ok([&["tape"], line, &["--json"]].concat()).json()
    }
}

#[test]
fn a_second_archive_writes_only_what_is_new() {
    let shelf = Shelf::new(&[], &["T0"]);
    shelf.world.insert("T0");
    let done = shelf.archive(&options("any", 1), false, None);
    let all = shelf.blocks().len();
    let first = done.result.as_ref().unwrap();
    assert_eq!((first.planned[0].blocks as usize, first.blocks as usize), (all, all));
    assert!(first.planned[0].batches >= 3, "{first:?}");
    let files = done.files();
    assert_eq!(files.len() as u64, first.tally.batches);
    assert_eq!(shelf.check(), BTreeMap::from([("T0".to_owned(), all)]));
    assert_eq!(shelf.lacking("any", 1), 0);
    // The same once more is nothing.
    let done = shelf.archive(&options("any", 1), false, None);
    assert_eq!((done.result.unwrap().tally.batches, done.told.len()), (0, 0));
    data::noise_file(&shelf.sandbox.source.join("new"), 33, 1 << 20);
    shelf.sandbox.backup();
    let now = shelf.blocks().len();
    let done = shelf.archive(&Options { run: 2, ..options("any", 1) }, false, None);
    assert_eq!(done.result.as_ref().unwrap().planned[0].blocks as usize, now - all);
    assert_eq!(done.files().last(), Some(&("T0".to_owned(), shelf.known()[0].1.len() as u64)));
    assert_eq!(shelf.check(), BTreeMap::from([("T0".to_owned(), now)]));
    // What is with it: the metas first, so that whoever looks for them reads the heads only.
    let file = &shelf.world.tape_files("T0")[1];
    let list = cpio(&shelf.sandbox.path(""), &["-t", "--quiet"], file);
    let at = |it: &str| list.lines().position(|line| line.starts_with(it));
    assert!(at("restore.sh").unwrap() < at("meta/").unwrap(), "{list}");
    let (meta, block) = (list.lines().filter(|it| it.starts_with("meta/")).count(), at("chunks/"));
    assert_eq!(at("meta/").unwrap() + meta, block.unwrap(), "{list}");
    let last = shelf.known()[0].1.last().unwrap().1.clone();
    let name = |it: &Member| match &it.item {
        Item::Document(name, _) => String::from_utf8(name.clone()).unwrap(),
        Item::Block(id) => id.to_string(),
    };
    let names: Vec<String> = last.iter().map(name).collect();
    for wanted in
        ["manifests/run-00000002.jsonl.zst", "catalog/run-00000002.sqlite.zst", "restore.sh"]
    {
        assert!(names.iter().any(|it| it == wanted), "{wanted}: {names:?}");
    }
}

/// Runs GNU cpio on an archive in a directory; gives what it prints.
fn cpio(dir: &Path, line: &[&str], archive: &[u8]) -> String {
    let mut command = Command::new("cpio");
    command.args(line).current_dir(dir).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let archive = archive.to_vec();
    // It stops reading at the archive's end; what fills the last block is not for it.
    let writer = std::thread::spawn(move || drop(input.write_all(&archive)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success(), "cpio {line:?}: {}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_archive_goes_on_on_another_tape_at_once_or_later() {
    for changes in [true, false] {
        let shelf = Shelf::new(&[], &["T1"]);
        let medium =
            Medium { capacity: Some(2_500_000), early_warning: 100_000, ..Medium::default() };
        shelf.add_tape("T0", &medium);
        shelf.world.insert("T0");
        let done = shelf.archive(&options("any", 1), changes, None);
        let mut told = done.told;
        if !changes {
            let error = done.result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::WrongTape);
            let said = error.to_string();
            assert!(said.contains("put in a tape of pool any that has room, as T1"), "{said}");
            shelf.check();
            assert!(shelf.lacking("any", 1) > 0);
            shelf.world.insert("T1");
            let done = shelf.archive(&options("any", 1), false, None);
            assert_eq!(done.result.unwrap().resumed.len(), 1);
            told.extend(done.told);
        } else {
            done.result.unwrap();
        }
        let on = |label: &[u8]| told.iter().filter(|it| it.tape == label).count();
        assert!(on(b"T0") >= 1 && on(b"T1") >= 1, "{told:?}");
        assert_eq!(shelf.lacking("any", 1), 0);
        let found = shelf.check();
        assert_eq!(found.values().sum::<usize>(), shelf.blocks().len(), "{found:?}");
    }
}

#[test]
fn going_on_brings_back_nothing_that_was_said_of_a_tape() {
    for what in ["lost", "bad", "forgotten", "labelled anew"] {
        let shelf = Shelf::new(&[], &["T1"]);
        data::noise_file(&shelf.sandbox.source.join("more"), 35, 2 << 20);
        shelf.sandbox.backup();
        let options = Options { run: 2, ..options("any", 1) };
        let medium =
            Medium { capacity: Some(3_500_000), early_warning: 100_000, ..Medium::default() };
        shelf.add_tape("T0", &medium);
        shelf.world.insert("T0");
        let error = shelf.archive(&options, false, None).result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WrongTape, "{error}");
        let mut tapes = Tapes::open(&shelf.sandbox.catalog).unwrap();
        // The tape is full in the middle of a batch, of which perhaps nothing had room.
        let known = shelf.known().remove(0).1;
        let file = known.into_iter().rev().find(|it| !it.1.is_empty()).unwrap();
        assert!(file.0.filenum > 1, "{file:?}");
        match what {
            "lost" => tapes.set_lost(b"T0", true).unwrap(),
            "bad" => {
                let at = file.1[0].at;
                tapes.note_read((b"T0", 1), (&[], &[]), true, Time { secs: 9, nanos: 0 }).unwrap();
                tapes.note_bad((b"T0", file.0.filenum), at).unwrap();
            }
            "forgotten" => tapes.forget(b"T0").unwrap(),
            _ => {
                tapes.forget(b"T0").unwrap();
                let tape = shelf.world.spool().tape(b"T0").unwrap().unwrap();
                tape.set_log_aside(7).unwrap();
                fs::remove_file(shelf.world.image("T0")).unwrap();
                shelf.add_tape("T0", &medium);
            }
        }
        drop(tapes);
        let on =
            |label: &str| shelf.known().into_iter().find(|it| it.0.tape.label == label.as_bytes());
        let before = on("T0");
        shelf.world.insert("T1");
        let done = shelf.archive(&options, false, None);
        assert_eq!(done.result.unwrap().resumed.len(), 1, "{what}");
        assert_eq!(on("T0"), before, "{what}");
        assert!(on("T1").is_some(), "{what}");
    }
}

#[test]
fn a_lost_tape_that_is_written_is_there_again() {
    let shelf = Shelf::new(&[], &["T0"]);
    shelf.world.insert("T0");
    shelf.archive(&options("any", 1), false, None).result.unwrap();
    Tapes::open(&shelf.sandbox.catalog).unwrap().set_lost(b"T0", true).unwrap();
    shelf.archive(&options("any", 1), false, None).result.unwrap();
    assert!(!shelf.known()[0].0.is_lost);
}

#[test]
fn a_bad_block_is_not_written_and_a_good_copy_of_it_is() {
    let shelf = Shelf::new(&[], &["T0"]);
    shelf.world.insert("T0");
    let bad = shelf.damage("volume");
    let done = shelf.archive(&options("any", 1), false, None);
    let done = done.result.unwrap();
    assert_eq!((done.tally.errors, done.blocks + 1), (1, shelf.blocks().len() as u64));
    assert_eq!(shelf.lacking("any", 1), 1);
    let copies = shelf.tapes().copies(&bad.parse::<Digest>().unwrap(), None).unwrap();
    assert_eq!(copies, 0);
    shelf.check();
    // It is tried again each time, and the exit code says that it is not there.
    let ran = shelf.sandbox.run(["tape", "archive", "latest"]).code(3);
    assert!(ran.text().contains("1 members could not be read"), "{}", ran.text());
    assert!(ran.errors().contains(&bad), "{}", ran.errors());

    let shelf = Shelf::new(&["--copies", "2"], &["T0"]);
    shelf.world.insert("T0");
    shelf.damage("volume");
    let done = shelf.archive(&options("any", 1), false, None);
    assert_eq!(done.result.unwrap().tally.errors, 0);
    assert_eq!(shelf.lacking("any", 1), 0);
    shelf.check();
}

#[test]
fn copies_go_to_different_tapes_of_the_pool() {
    let shelf = Shelf::new(&[], &["T0", "T1", "T2", "T3"]);
    let spool = shelf.world.spool();
    for label in ["T1", "T3"] {
        spool.set_in_pool(b"full", label.as_bytes(), true).unwrap();
    }
    shelf.world.insert("T0");
    let done = shelf.archive(&options("full", 1), false, None);
    let error = done.result.unwrap_err();
    assert!(error.to_string().contains("T0 is not of pool full"), "{error}");
    shelf.world.insert("T0");
    let done = shelf.archive(&options("full", 2), true, None);
    done.result.unwrap();
    let all = shelf.blocks().len();
    let expected = [("T1".to_owned(), all), ("T3".to_owned(), all)];
    assert_eq!(shelf.check(), BTreeMap::from(expected));
    assert_eq!((shelf.lacking("full", 2), shelf.lacking("any", 1)), (0, all));
    // A third tape is wanted, and the pool has none.
    let error = shelf.archive(&options("full", 3), true, None).result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongTape);
    assert!(error.to_string().contains("has a copy of some of it already"), "{error}");
    // One that is lost does not count.
    Tapes::open(&shelf.sandbox.catalog).unwrap().set_lost(b"T1", true).unwrap();
    assert_eq!(shelf.lacking("full", 2), all);
}

/// Takes an archive; with the first of it the file at `path` becomes another.
struct Spoiler {
    path: std::path::PathBuf,
    is_done: bool,
}

impl Write for Spoiler {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if !std::mem::replace(&mut self.is_done, true) {
            let mut content = fs::read(&self.path)?;
            *content.last_mut().unwrap() ^= 1;
            fs::write(&self.path, content)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_block_that_becomes_bad_between_two_readings_fails() {
    for hash in ["blake3", "sha256"] {
        let shelf = Shelf::new(&["--hash-algo", hash], &[]);
        let members = Members::open(&shelf.sandbox.catalog).unwrap();
        let (path, progress) = (shelf.sandbox.blocks("volume").remove(0).0, Progress::default());
        let id: Digest = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let name = runs::block_name(&id).into_bytes();
        for (is_done, is_right) in [(true, true), (false, false)] {
            let mut spoiler = Spoiler { path: path.clone(), is_done };
            let mut archive = Archive::new(&mut spoiler as &mut dyn Write);
            let added = members.add(&mut archive, &name, &progress).unwrap();
            assert_eq!(matches!(added, Added::Whole { .. }), is_right, "{hash}: {added:?}");
        }
    }
}

#[test]
fn a_document_goes_to_tape_only_if_it_is_right() {
    let spoil = |shelf: &Shelf, dir: &str, volume: &str| {
        for entry in fs::read_dir(shelf.sandbox.path(volume).join(dir)).unwrap() {
            let path = entry.unwrap().path();
            let mut bytes = fs::read(&path).unwrap();
            bytes.truncate(bytes.len() - 9);
            fs::write(path, bytes).unwrap();
        }
    };
    let shelf = Shelf::new(&[], &["T0"]);
    shelf.world.insert("T0");
    let all = shelf.blocks().len();
    fs::remove_dir_all(shelf.sandbox.path("volume/meta")).unwrap();
    fs::create_dir(shelf.sandbox.path("volume/meta")).unwrap();
    spoil(&shelf, "manifests", "volume");
    for _ in 0..2 {
        let ran = shelf.sandbox.run(["tape", "archive", "latest"]).code(3);
        assert!(ran.errors().contains("raidtape genmeta"), "{}", ran.errors());
        assert!(ran.errors().contains("manifests/run-00000001"), "{}", ran.errors());
        assert_eq!(shelf.lacking("any", 1), all);
    }
    shelf.sandbox.ok(["genmeta", "--all"]);
    shelf.sandbox.ok(["tape", "archive", "latest"]);
    assert_eq!(shelf.check()["T0"], all);
    let text = shelf.sandbox.ok(["tape", "archive", "latest"]).text();
    assert!(text.contains("nothing to write"), "{text}");

    // The other volume has all of it right.
    let shelf = Shelf::new(&["--copies", "2"], &["T0"]);
    shelf.world.insert("T0");
    ["meta", "manifests"].iter().for_each(|it| spoil(&shelf, it, "volume"));
    let done = shelf.archive(&options("any", 1), false, None).result.unwrap();
    assert_eq!((done.tally.errors, shelf.lacking("any", 1)), (0, 0));
    let unpacked = shelf.sandbox.path("unpacked");
    fs::create_dir(&unpacked).unwrap();
    for file in &shelf.world.tape_files("T0")[1..] {
        cpio(&unpacked, &["-idm", "--no-absolute-filenames", "--quiet"], file);
    }
    for dir in ["meta", "manifests"] {
        tool(
            "diff",
            args![
                "-r",
                "-x",
                ".complete",
                shelf.sandbox.path("second").join(dir),
                unpacked.join(dir)
            ],
        );
    }
}

#[test]
fn documents_alone_get_their_second_copy_on_another_tape() {
    let shelf = Shelf::new(&[], &["T0", "T1"]);
    shelf.world.insert("T0");
    shelf.archive(&options("any", 2), true, None).result.unwrap();
    // A run that has nothing new but its documents.
    fs::remove_file(shelf.sandbox.source.join("large")).unwrap();
    shelf.sandbox.backup();
    let newer = Options { run: 2, ..options("any", 2) };
    let done = shelf.archive(&newer, true, None);
    let tapes: Vec<String> = done.files().into_iter().map(|it| it.0).collect();
    assert_eq!(done.result.unwrap().blocks, 0);
    assert_eq!(tapes, ["T1", "T0"]);
    assert_eq!(shelf.archive(&newer, true, None).result.unwrap().tally.batches, 0);
    shelf.check();
}

#[test]
fn a_job_that_was_not_planned_to_its_end_is_not_written() {
    let shelf = Shelf::new(&[], &["T0", "T1"]);
    shelf.world.insert("T0");
    shelf.archive(&options("any", 1), false, None).result.unwrap();
    let (spool, catalog) = (shelf.world.spool(), &shelf.sandbox.catalog);
    let members = Members::open(catalog).unwrap();
    let options = options("any", 2);
    let made = runs::plan((catalog, &members), &spool, &options, 2, &Progress::default());
    let uuid = made.unwrap().unwrap().job;
    // Killed before it was known which tapes it has to avoid.
    let path = spool.job(&uuid).unwrap().path();
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains("avoid-0 T0\n") && text.contains("plan whole\n"), "{text}");
    let text = text.replace("avoid-0 T0\n", "").replace("plan whole\n", "plan begun\n");
    fs::write(&path, text).unwrap();
    assert_eq!(runs::waiting(&spool, catalog).unwrap(), []);
    let done = shelf.archive(&options, true, None).result.unwrap();
    assert_eq!((done.resumed.len(), done.planned.len()), (0, 1));
    assert_eq!(spool.job(&uuid).unwrap().status().unwrap(), Some(JobStatus::Revoked));
    assert_eq!(shelf.lacking("any", 2), 0);
    assert_eq!(shelf.check().len(), 2);
}

#[test]
fn a_tape_that_was_written_for_another_pool_is_of_its_own_still() {
    let shelf = Shelf::new(&[], &["T0"]);
    let spool = shelf.world.spool();
    for pool in ["full", "incr"] {
        spool.set_in_pool(pool.as_bytes(), b"T0", true).unwrap();
    }
    shelf.world.insert("T0");
    shelf.archive(&options("full", 1), false, None).result.unwrap();
    let files = shelf.known()[0].0.files;
    // It is in all three.
    for pool in ["any", "incr", "full"] {
        let done = shelf.archive(&options(pool, 1), false, None).result.unwrap();
        assert_eq!(done.tally.batches, 0, "{pool}");
    }
    data::noise_file(&shelf.sandbox.source.join("new"), 33, 1 << 20);
    shelf.sandbox.backup();
    for pool in ["incr", "full", "any"] {
        let newer = Options { run: 2, ..options(pool, 1) };
        shelf.archive(&newer, false, None).result.unwrap();
        let of = shelf.known()[0].0.clone();
        assert_eq!((&*of.tape.pool, of.files), ("incr", files + 2), "{pool}");
    }
    shelf.check();
}

#[test]
fn what_is_known_is_made_anew_from_the_spool() {
    let shelf = Shelf::new(&[], &["T0", "T1"]);
    shelf.world.insert("T0");
    shelf.archive(&options("any", 2), true, None).result.unwrap();
    data::noise_file(&shelf.sandbox.source.join("new"), 33, 1 << 20);
    shelf.sandbox.backup();
    shelf.archive(&Options { run: 2, ..options("any", 1) }, true, None).result.unwrap();
    let catalog = &shelf.sandbox.catalog;
    let plain = shelf.known();
    let index = || shelf.json(&["index"]);
    let files: u64 = plain.iter().map(|it| it.0.files).sum();
    let said = index();
    assert_eq!((&said["tapes"], &said["tape_files"]), (&2.into(), &files.into()), "{said}");
    assert_eq!(shelf.known(), plain);
    // What was said of tapes, what reading them has told, and what only this knows stays.
    let mut tapes = Tapes::open(catalog).unwrap();
    tapes.set_lost(b"T1", true).unwrap();
    let at = plain[0].1[0].1[0].at;
    tapes.note_read((b"T0", 1), (&[at], &[]), true, Time { secs: 9, nanos: 0 }).unwrap();
    tapes.note_read((b"T0", 2), (&[], &[]), true, Time { secs: 10, nanos: 0 }).unwrap();
    let label = b"elsewhere".to_vec();
    let tape = Tape { label, hash: [1; 32], pool: "full".to_owned(), block_bytes: 512 };
    tapes.put_tape(&tape).unwrap();
    let ended = Time { secs: 1, nanos: 0 };
    let job = "j".to_owned();
    let file = TapeFile { filenum: 1, position: 2, bytes: 9, job, batch: 0, ended, verified: None };
    tapes.begin(b"elsewhere", &file).unwrap().finish().unwrap();
    let before = shelf.known();
    assert_ne!(before, plain);
    let said = index();
    assert_eq!((&said["tapes"], &said["tapes_kept"]), (&2.into(), &1.into()));
    assert_eq!(shelf.known(), before);
    // Who has it open reads on.
    assert_eq!(tapes.tapes().unwrap().len(), 3);
    drop(tapes);
    // A damaged file, and none.
    let path = shelf.tapes().path().to_owned();
    fs::write(&path, [7; 9000]).unwrap();
    shelf.sandbox.run(["tape", "list"]).code(5);
    index();
    assert_eq!(shelf.known(), plain);
    fs::remove_file(&path).unwrap();
    index();
    assert_eq!(shelf.known(), plain);
    // A tape that was written from its beginning has nothing of it any more.
    let tape = shelf.world.spool().tape(b"T1").unwrap().unwrap();
    tape.set_log_aside(7).unwrap();
    let mut label = Label::new("T1").unwrap();
    label.add("created", "7").unwrap();
    shelf.world.spool().add_tape(&label).unwrap();
    let said = index();
    assert_eq!((&said["tapes"], &said["tape_files_gone"]), (&1.into(), &plain[1].0.files.into()));
    assert_eq!(shelf.known(), plain[..1]);
}

#[test]
fn a_catalog_that_was_moved_knows_its_tapes_and_its_jobs() {
    let mut shelf = Shelf::new(&[], &["T0"]);
    shelf.world.insert("T0");
    shelf.archive(&options("any", 1), false, None).result.unwrap();
    let plain = shelf.known();
    data::noise_file(&shelf.sandbox.source.join("new"), 33, 1 << 20);
    shelf.sandbox.backup();
    let spool = shelf.world.spool();
    // A job of before says only where the catalog was.
    let job = spool.job(&spool.jobs(true).unwrap()[0]).unwrap().path();
    let text = fs::read_to_string(&job).unwrap();
    let lines = text.split_inclusive('\n').filter(|it| !it.starts_with("run-uuid"));
    let old: String = lines.collect();
    assert_ne!(old, text);
    fs::write(&job, old).unwrap();
    // One of now waits.
    let members = Members::open(&shelf.sandbox.catalog).unwrap();
    let newer = Options { run: 2, ..options("any", 1) };
    let of = (&*shelf.sandbox.catalog, &members);
    let made = runs::plan(of, &spool, &newer, 1, &Progress::default()).unwrap().unwrap();
    drop(members);
    let moved = shelf.sandbox.path("moved");
    for suffix in ["", "-wal", "-shm", ".tapes", ".tapes-wal", ".tapes-shm"] {
        let name = |it: &Path| format!("{}{suffix}", it.display());
        if Path::new(&name(&shelf.sandbox.catalog)).exists() {
            fs::rename(name(&shelf.sandbox.catalog), name(&moved)).unwrap();
        }
    }
    shelf.sandbox.catalog = moved;
    let index = || shelf.json(&["index"]);
    let said = index();
    assert_eq!((&said["tapes"], &said["tapes_kept"]), (&0.into(), &1.into()), "{said}");
    assert_eq!(shelf.known(), plain);
    let done = shelf.archive(&newer, false, None).result.unwrap();
    assert_eq!((done.resumed, done.planned.len()), (vec![made.job], 0));
    let both = shelf.known();
    assert!(both[0].1.len() > plain[0].1.len(), "{both:?}");
    let said = index();
    assert_eq!((&said["tapes"], &said["tapes_kept"]), (&1.into(), &0.into()), "{said}");
    assert_eq!(shelf.known(), both);
    shelf.check();
    // What all jobs say is enough.
    fs::write(&job, text).unwrap();
    fs::remove_file(shelf.tapes().path()).unwrap();
    index();
    assert_eq!(shelf.known(), both);
}

#[test]
fn what_was_written_before_a_death_is_noted_by_the_next_archive() {
    let shelf = Shelf::new(&[], &["T0"]);
    shelf.world.insert("T0");
    let catalog = &shelf.sandbox.catalog;
    let (spool, progress) = (shelf.world.spool(), Progress::default());
    let members = Members::open(catalog).unwrap();
    let options = options("any", 1);
    let made = runs::plan((catalog, &members), &spool, &options, 1, &progress).unwrap().unwrap();
    // All tape files are written, and the last one is not noted.
    let mut noter = Noter::open(catalog, &members).unwrap();
    let drive = spool.drive(None).unwrap();
    let taken = drive.take().unwrap();
    let (mut left, killed) = (made.batches, || Error::new(ErrorKind::Interrupted, "killed"));
    let work = Work {
        spool: &spool,
        drive: &taken,
        settings: Settings::default(),
        progress: &progress,
        now: &|| 1,
        add: &mut |_, archive, name| members.add(archive, name, &progress),
        tell: &mut |it| {
            left -= 1;
            if left == 0 { Err(killed()) } else { noter.note(&spool, it).map(drop) }
        },
        next_tape: &mut |_, _| Ok(None),
    };
    let loaded = Loaded::open(&drive.device().unwrap(), Access::Write).unwrap();
    let mut writer = Writer::new(work, loaded);
    writer.job(spool.take_job(&made.job).unwrap()).unwrap_err();
    writer.close().unwrap();
    drop((taken, noter));
    let files = || shelf.known().iter().map(|it| it.0.files).sum::<u64>();
    assert_eq!((made.batches > 2, files()), (true, made.batches - 1));
    let done = shelf.archive(&options, false, None);
    let done = done.result.unwrap();
    assert_eq!((done.resumed, done.tally.batches, files()), (vec![made.job], 0, made.batches));
    shelf.check();
}

#[test]
fn an_archive_can_die_at_any_step_of_the_drive() {
    let sandbox = Sandbox::new();
    for (name, seed) in [("a", 1), ("b", 2)] {
        data::noise_file(&sandbox.source.join(name), seed, 150_000);
        sandbox.backup();
    }
    let mut shelf = Shelf { world: TapeWorld::at(&sandbox.path("")), sandbox };
    let options = Options { run: 2, batch_bytes: 1, ..options("any", 1) };
    for at in 1.. {
        for name in ["t0p", "tapes", "drive", "src"] {
            let _ = fs::remove_dir_all(shelf.sandbox.path(name));
        }
        for suffix in ["", "-wal", "-shm"] {
            let _ = fs::remove_file(shelf.sandbox.path(&format!("catalog.tapes{suffix}")));
        }
        shelf.world = TapeWorld::new(&shelf.sandbox.path(""));
        shelf.add_tape("T0", &Medium::default());
        shelf.world.insert("T0");
        let plan = Plan { trouble: Trouble::Stop, at, for_ever: false };
        let done = shelf.archive(&options, false, Some(plan));
        if !done.is_hit {
            done.result.unwrap();
            assert!(at > 30, "{at}");
            return;
        }
        done.result.unwrap_err();
        let before = if Tapes::look(&shelf.sandbox.catalog).unwrap().is_some() {
            shelf.check().values().sum::<usize>()
        } else {
            0
        };
        let again = shelf.archive(&options, false, None);
        let again = again.result.unwrap_or_else(|e| panic!("killed at {at}: {e}"));
        assert_eq!(shelf.lacking("any", 1), 0, "killed at {at}");
        // No block twice: what was noted or told was not written again.
        let found = shelf.check();
        assert_eq!(found["T0"], shelf.blocks().len(), "killed at {at}, {before} before: {again:?}");
    }
}

#[test]
fn the_commands_say_what_is_on_which_tape() {
    let shelf = Shelf::new(&[], &["T0", "T1"]);
    let sandbox = &shelf.sandbox;
    let all = shelf.blocks().len();
    let find = |file: &str| sandbox.run(["tape", "find", file]);
    find("large").code(1);
    assert_eq!(shelf.json(&["list"]), Value::Array(Vec::new()));
    let said = shelf.json(&["status"]);
    assert_eq!(
        (&said["newest"]["blocks"], &said["newest"]["blocks_lacking"]),
        (&all.into(), &all.into())
    );
    // Nobody sits at a terminal, and no tape is in the drive.
    let ran = sandbox.run(["tape", "archive", "latest"]).code(7);
    assert!(
        ran.errors().contains("put in a tape of pool any that has room, as T0"),
        "{}",
        ran.errors()
    );
    let said = shelf.json(&["archive", "latest", "--dry-run"]);
    assert_eq!((&said["run"], &said["blocks"]), (&1.into(), &all.into()));
    assert!(shelf.world.spool().jobs(true).unwrap().is_empty());
    assert!(Tapes::look(&sandbox.catalog).unwrap().is_none());
    shelf.world.insert("T0");
    let line = ["archive", "latest", "--batch-size", "2MiB", "--buffer", "1MiB"];
    let said = shelf.json(&line);
    assert_eq!((&said["run"], &said["errors"]), (&1.into(), &0.into()));
    assert_eq!(said["jobs"][0]["blocks"], all);
    assert_eq!(shelf.check()["T0"], all);
    // Nothing more to do needs no tape.
    fs::remove_file(sandbox.path("drive/loaded")).unwrap();
    let text = sandbox.ok(["tape", "archive", "1"]).text();
    assert!(text.contains("nothing to write"), "{text}");
    let text = sandbox.ok(["tape", "archive", "1", "--dry-run"]).text();
    assert!(text.contains("has all of it"), "{text}");
    let list = shelf.json(&["list"]);
    assert_eq!((&list[0]["tape"], &list[0]["blocks"]), (&"T0".into(), &all.into()));
    let text = find("large").code(0).text();
    let bytes = text.lines().map(|it| it.split(' ').nth(2).unwrap().parse::<u64>().unwrap());
    assert_eq!(bytes.sum::<u64>(), 3 << 20, "{text}");
    assert!(text.lines().all(|it| it.starts_with("T0 ")), "{text}");
    // A file that has grown since.
    let mut file = fs::File::options().append(true).open(sandbox.source.join("large")).unwrap();
    file.write_all(&data::Seeded::new(77).noise(500_000)).unwrap();
    drop(file);
    sandbox.backup();
    find("large").code(3);
    sandbox.ok(["tape", "find", "large", "--run", "1"]);
    find("nothing").code(1);
    find("d1").code(2);
    let text = sandbox.ok(["tape", "status"]).text();
    assert!(text.contains("drive d0 idle: tape T0") && text.contains("on no tape"), "{text}");
    sandbox.ok(["tape", "lost", "T0"]);
    find("large").code(1);
    assert!(sandbox.ok(["tape", "list"]).text().contains("never, lost"));
    sandbox.ok(["tape", "lost", "T0", "--found"]);
    find("large").code(3);
    sandbox.run(["tape", "lost", "T7"]).code(1);
    sandbox.run(["tape", "forget", "T7"]).code(1);
    sandbox.ok(["tape", "forget", "T0"]);
    find("large").code(1);
    sandbox.ok(["tape", "index"]);
    find("large").code(3);
    // What cannot be.
    sandbox.run(["tape", "archive", "latest", "--pool", "none"]).code(1);
    sandbox.run(["tape", "archive", "9"]).code(1);
    sandbox.run(["tape", "archive", "latest", "--drive", "d7"]).code(1);
    sandbox.run(["tape", "archive", "latest", "--copies", "0"]).code(2);
    sandbox.run(["tape"]).code(2);
    assert_eq!(shelf.world.spool().jobs(false).unwrap(), Vec::<String>::new());
    let ran = sandbox.run(["tape", "archive", "latest", "--pool", "full"]).code(7);
    assert!(ran.errors().contains("pool full has no tape"), "{}", ran.errors());
    assert_eq!(shelf.world.spool().jobs(false).unwrap(), Vec::<String>::new());
    // Somebody has changed the tape by hand: whatever may be written is.
    shelf.world.insert("T1");
    sandbox.ok(["tape", "archive", "latest"]);
    find("large").code(0);
    assert_eq!(shelf.check().len(), 2);
    fs::remove_file(&sandbox.catalog).unwrap();
    sandbox.run(["tape", "list"]).code(10);
}

#[test]
fn a_line_in_a_mount_archives_a_run() {
    let shelf = Shelf::new(&[], &["T0", "T1"]);
    shelf.world.spool().set_in_pool(b"full", b"T1", true).unwrap();
    let mount = shelf.sandbox.mount();
    let ctl = mount.ctl("tape");
    assert_eq!(fs::read_to_string(&ctl).unwrap(), "no job yet: write archive RUN [options]\n");
    for line in ["", "archive", "archive latest --dry-run", "list", "archive never"] {
        let error = fs::write(&ctl, format!("{line}\n")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{line}");
    }
    assert!(mount.log().contains("tape: refused EINVAL"), "{}", mount.log());
    shelf.world.insert("T0");
    let ask = |line: &str| crate::genmeta::ask(&mount, "tape", line);
    // The wrong tape: the job waits in the spool, and goes on with the same line.
    let said = ask("archive latest --pool full");
    assert_eq!((&said["state"], &said["exit_code"]), (&"failed".into(), &7.into()), "{said}");
    let error = said["error"].as_str().unwrap();
    assert!(error.contains("put in a tape of pool full that has room, as T1"), "{error}");
    shelf.world.insert("T1");
    let said = ask("archive latest --pool full --buffer 1MiB");
    assert_eq!((&said["state"], &said["exit_code"]), (&"done".into(), &0.into()), "{said}");
    assert_eq!(said["run"], 1);
    let all = shelf.blocks().len();
    assert_eq!(shelf.check(), BTreeMap::from([("T1".to_owned(), all)]));
    let log = fs::read_to_string(mount.ctl(&format!("jobs/{}/log", said["job"]))).unwrap();
    assert!(log.contains("file 1 of tape T1: "), "{log}");
    // Whoever has the drive is waited for, and the job can be cancelled meanwhile.
    data::noise_file(&shelf.sandbox.source.join("more"), 9, 100_000);
    shelf.sandbox.backup();
    let spool = shelf.world.spool();
    let taken = spool.drive(None).unwrap().take().unwrap();
    fs::write(&ctl, "archive latest --pool full\n").unwrap();
    let job = said["job"].as_u64().unwrap() + 1;
    wait_for("the job to wait", || mount.job(job)["state"] == "waiting");
    fs::write(mount.ctl(&format!("jobs/{job}/cancel")), "1\n").unwrap();
    assert_eq!(mount.wait_for_job(job)["state"], "cancelled");
    drop(taken);
    assert_eq!(ask("archive latest --pool full")["state"], "done");
    mount.end();
}

#[test]
fn two_tapes_and_cpio_are_enough() {
    let shelf = Shelf::new(&["--hash-algo", "sha256"], &["T1"]);
    let medium = Medium { capacity: Some(2_500_000), early_warning: 100_000, ..Medium::default() };
    shelf.add_tape("T0", &medium);
    shelf.world.insert("T0");
    shelf.archive(&options("any", 1), true, None).result.unwrap();
    data::noise_file(&shelf.sandbox.source.join("new"), 34, 300_000);
    fs::remove_file(shelf.sandbox.source.join("large")).unwrap();
    shelf.sandbox.backup();
    shelf.archive(&Options { run: 2, ..options("any", 1) }, true, None).result.unwrap();
    let volume = shelf.sandbox.path("unpacked");
    fs::create_dir(&volume).unwrap();
    // As dd reads them, one after another; the tapes in any order.
    for label in ["T1", "T0"] {
        let files = shelf.world.tape_files(label);
        assert!(files.len() >= 2, "{label}");
        for file in &files[1..] {
            cpio(&volume, &["-idmu", "--no-absolute-filenames", "--quiet"], file);
        }
    }
    // Nothing of the store is there any more.
    for name in ["volume", "catalog", "t0p", "tapes"] {
        fs::rename(shelf.sandbox.path(name), shelf.sandbox.path(&format!("{name}.gone"))).unwrap();
    }
    let script = volume.join("restore.sh");
    let list = tool("sh", args![&script, "list"]).text();
    assert_eq!(list.lines().count(), 2, "{list}");
    let dest = shelf.sandbox.path("restored");
    tool("sh", args![&script, "get", "2", "/", &dest]);
    tool("diff", args!["-r", &shelf.sandbox.source, &dest]);
    let old = shelf.sandbox.path("old");
    tool("sh", args![&script, "get", "1", "large", &old]);
    assert_eq!(fs::metadata(&old).unwrap().len(), 3 << 20);
    let guide = fs::read_to_string(volume.join("TAPES.txt")).unwrap();
    assert!(guide.contains("cpio -idmu --no-absolute-filenames"), "{guide}");
}
