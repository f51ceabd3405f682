//! What is on a tape comes back as it was, or it is said what is not: `t0read` and `t0ck`.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use raidtape::error::{Error, ErrorKind, Result};
use raidtape::progress::Progress;
use raidtape::tape::check::{self, Checked, Said};
use raidtape::tape::cpio::{Archive, Header, Reader};
use raidtape::tape::drive::{Access, BlockSize, Drive, Moved, Read, State, Wrote};
use raidtape::tape::image::Image;
use raidtape::tape::label::Label;
use raidtape::tape::loaded::Loaded;
use raidtape::tape::medium::Medium;
use raidtape::tape::readback::{Reading, Tally};
use raidtape::tape::spool::Spool;
use raidtape::tape::spool::batch::BatchStatus;
use raidtape::tape::spool::job::JobKind;
use raidtape::tape::write::Settings;

use crate::common::faultdrive::{FaultDrive, Plan, Trouble};
use crate::common::tape::{open_image, scratch};
use crate::common::tapeworld::TapeWorld;
use crate::common::verbs::Place;

const A: &str = "28970c2a-8eea-4060-8fc9-574e562fda12";

/// What is below a directory: a line for each name.
fn tree(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut ids: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut left = vec![PathBuf::new()];
    while let Some(dir) = left.pop() {
        let mut entries: Vec<_> =
            fs::read_dir(root.join(&dir)).unwrap().map(|it| it.unwrap().file_name()).collect();
        entries.sort();
        for name in entries {
            let path = dir.join(name);
            let full = root.join(&path);
            let meta = fs::symlink_metadata(&full).unwrap();
            let kind = meta.file_type();
            let what = if kind.is_dir() {
                left.push(path.clone());
                "dir".to_owned()
            } else if kind.is_symlink() {
                format!("-> {}", fs::read_link(&full).unwrap().display())
            } else if kind.is_file() {
                let first = ids.entry(meta.ino()).or_insert_with(|| path.clone()).clone();
                let name =
                    if meta.nlink() > 1 { first.display().to_string() } else { String::new() };
                format!("file {:?} {name}", blake3::hash(&fs::read(&full).unwrap()).to_hex())
            } else if kind.is_fifo() {
                "fifo".to_owned()
            } else {
                format!("device {}", meta.rdev())
            };
            let mode = if kind.is_symlink() { 0 } else { meta.mode() & 0o7777 };
            let line = format!("{what} {mode:o} {}:{} {}", meta.uid(), meta.gid(), meta.mtime());
            found.insert(path, line);
        }
    }
    found
}

/// A tree with everything that an archive can hold.
fn make_tree(root: &Path) {
    fs::create_dir_all(root.join("docs/old")).unwrap();
    for (name, len) in [("docs/a", 10), ("docs/b c", 100_000), ("docs/old/empty", 0), ("z", 70_000)]
    {
        let content: Vec<u8> = (0..len as u32).map(|it| (it * 7 / 3) as u8).collect();
        fs::write(root.join(name), content).unwrap();
    }
    fs::hard_link(root.join("z"), root.join("docs/z2")).unwrap();
    fs::hard_link(root.join("docs/old/empty"), root.join("empty2")).unwrap();
    symlink("../nowhere", root.join("docs/link")).unwrap();
    fs::write(root.join("back\\slash"), "x").unwrap();
    run("mkfifo", &[], &root.join("fifo"));
    run("mknod", &[], &root.join("null"));
    fs::set_permissions(root.join("docs/a"), fs::Permissions::from_mode(0o4751)).unwrap();
    std::os::unix::fs::chown(root.join("docs/b c"), Some(1234), Some(4321)).unwrap();
    fs::set_permissions(root.join("docs/old"), fs::Permissions::from_mode(0o550)).unwrap();
    for name in
        ["docs/a", "docs/b c", "docs/old/empty", "z", "docs/link", "docs/old", "docs", "fifo"]
    {
        run("touch", &["-h", "-d", "@1455999395"], &root.join(name));
    }
}

fn run(program: &str, args: &[&str], path: &Path) {
    let mut command = Command::new(program);
    command.args(args).arg(path);
    if program == "mknod" {
        command.args(["c", "1", "3"]);
    }
    assert!(command.status().unwrap().success(), "{program} {}", path.display());
}

/// All names below a directory, directories first.
pub fn names(root: &Path) -> String {
    tree(root).keys().map(|it| format!("{}\n", it.display())).collect()
}

/// A place with a tape T1 in the drive and a tree in `src`.
fn world() -> (Place, PathBuf) {
    let place = Place::with_drive();
    place.ok(&["t0load", place.image("A").to_str().unwrap()]);
    place.ok(&["t0label", "-w", "T1"]);
    let src = place.base.join("src");
    fs::create_dir(&src).unwrap();
    make_tree(&src);
    (place, src)
}

/// A written job of all of `src`.
fn write_job(place: &Place, src: &Path) -> String {
    let job = place.ok(&["t0job", "-c", "-p", &format!("root={}", src.display())]);
    let (code, said) = place.feed(&["t0job", "-a", &job], &names(src));
    assert_eq!(code, 0, "{said}");
    place.ok(&["t0queue", "-a", &job]);
    place.ok(&["t0write", "-a"]);
    job
}

pub fn out(place: &Place, name: &str) -> (PathBuf, String) {
    let dir = place.base.join(name);
    fs::create_dir(&dir).unwrap();
    (dir.clone(), dir.to_str().unwrap().to_owned())
}

/// Checks an image by itself or with a spool: what was wrong.
pub fn check(image: &Path, spool: Option<&Spool>) -> (Checked, Vec<String>) {
    let mut loaded = Loaded::open(image, Access::Read).unwrap();
    let mut wrong = Vec::new();
    let checked = check::check(&mut loaded, spool, &Progress::default(), &mut |said| {
        if let Said::Wrong(filenum, what) = said {
            wrong.push(format!("{filenum:?} {what}"));
        }
        Ok(())
    });
    let checked = checked.unwrap();
    assert_eq!(checked.findings, wrong.len() as u64);
    (checked, wrong)
}

fn write_files(path: &Path, files: &[&[u8]]) {
    let mut drive = open_image(path);
    drive.to_end_of_data().unwrap();
    for bytes in files {
        for block in bytes.chunks(10_240) {
            assert_eq!(drive.write(block).unwrap(), Wrote::Whole);
        }
        assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
    }
    drive.close().unwrap();
}

#[test]
fn a_job_comes_back_whole_and_by_file() {
    let (place, src) = world();
    let job = write_job(&place, &src);
    let dir = place.spool().job(&job).unwrap().dir().to_path_buf();
    let (whole, whole_name) = out(&place, "whole");
    assert!(place.ok(&["t0read", "-n", &job]).contains("T1 1"));
    assert!(dir.join("w0").exists());
    place.ok(&["t0read", "-C", &whole_name, &job]);
    assert_eq!(tree(&whole), tree(&src));
    // It was read whole, and is as it was written.
    assert!(dir.join("r0").exists() && !dir.join("w0").exists());
    let text = fs::read_to_string(dir.join("r0")).unwrap();
    assert!(text.contains("\n%read-summary\n") && text.contains("\n%read-results\nok "), "{text}");
    let said = place.ok(&["t0read", "-v", &job]);
    assert!(said.contains(" 0 without sums; 0 errors; 1 whole batches"), "{said}");
    // What is there stays.
    assert_eq!(place.code(&["t0read", "-C", &whole_name, &job]), 3);
    assert_eq!(tree(&whole), tree(&src));
    fs::write(whole.join("z"), "other").unwrap();
    place.ok(&["t0read", "-f", "-C", &whole_name, &job, "z"]);
    assert_eq!(fs::read(whole.join("z")).unwrap(), fs::read(src.join("z")).unwrap());
    // Some files: a directory, a pattern, one by one.
    let (some, some_name) = out(&place, "some");
    place.ok(&["t0read", "-C", &some_name, &format!("{job}/0"), "docs/old", "*/old/*", "/z"]);
    assert_eq!(names(&some), "docs\ndocs/old\ndocs/old/empty\nz\n");
    assert_eq!(fs::read(some.join("z")).unwrap(), fs::read(src.join("z")).unwrap());
    assert_eq!(place.code(&["t0read", &job, "none"]), 1);
    // Without the spool: only the tape.
    let (bare, bare_name) = out(&place, "bare");
    place.ok(&["t0read", "--file", "1", "-C", &bare_name]);
    assert_eq!(tree(&bare), tree(&src));
    let listed = place.ok(&["t0read", "--file", "1", "-l", "docs/*"]);
    assert!(listed.lines().any(|it| it.ends_with(" 100000 docs/b c")), "{listed}");
    assert!(place.ok(&["t0ck"]).contains("of them by their sums: 0 errors"));
    let line = place.ok(&["t0ck", "-v"]);
    assert!(line.contains(&format!("{job}/0, 12 files")) && line.contains("with sums"), "{line}");
    // What makes no sense.
    for line in [
        &["t0read"][..],
        &["t0read", "-a", "x"],
        &["t0read", "-f", &job],
        &["t0read", "-l", &job],
        &["t0read", "-a", "--file", "1"],
        &["t0read", "nonsense"],
    ] {
        assert_eq!(place.code(line), 2, "{line:?}");
    }
    assert_eq!(place.code(&["t0read", "--file", "9"]), 1);
    assert_eq!(place.code(&["t0read", "-t", "T9", &job]), 7);
    place.ok(&["t0eject"]);
    let said = place.fails(7, &["t0read", &job]);
    assert!(said.contains("T1") && said.contains("put it in"), "{said}");
}

#[test]
fn archives_of_other_programs_are_read() {
    let place = Place::with_drive();
    let src = place.base.join("src");
    fs::create_dir(&src).unwrap();
    make_tree(&src);
    let all = names(&src);
    let lines: [(&str, &[&str]); 7] = [
        ("cpio", &["-o", "-H", "odc", "--quiet"]),
        ("cpio", &["-o", "-H", "newc", "--quiet"]),
        ("cpio", &["-o", "-H", "crc", "--quiet"]),
        ("cpio", &["-o", "--quiet"]),
        ("bsdcpio", &["-o", "-H", "odc", "--quiet"]),
        ("bsdcpio", &["-o", "-H", "newc", "--quiet"]),
        ("afio", &["-o", "-A", "-b", "32768", "-"]),
    ];
    let mut archives = Vec::new();
    for (program, args) in lines {
        let mut command = Command::new(program);
        command.args(args).current_dir(&src).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut input, all.as_bytes()).unwrap();
        drop(input);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{program} {args:?}");
        archives.push(output.stdout);
    }
    let files: Vec<&[u8]> = archives.iter().map(|it| &**it).collect();
    write_files(&place.image("A"), &files);
    place.ok(&["t0load", place.image("A").to_str().unwrap()]);
    for (number, (program, args)) in lines.iter().enumerate() {
        let (dir, name) = out(&place, &format!("out{number}"));
        let number = number.to_string();
        place.ok(&["t0read", "--file", &number, "-C", &name]);
        let (mut found, mut expected) = (tree(&dir), tree(&src));
        // The old binary format has 16 bits for a device, and a link has no names there.
        for tree in [&mut found, &mut expected] {
            tree.retain(|path, _| path != Path::new("null"));
        }
        assert_eq!(found, expected, "{program} {args:?}");
    }
    let said = place.ok(&["t0ck", "-v"]);
    assert!(said.contains("no label") || said.contains("without a label"), "{said}");
    assert_eq!(said.matches("without sums").count(), 7, "{said}");
    let scanned = place.ok(&["t0scan"]);
    assert_eq!(scanned.matches("an archive of no job").count(), 7, "{scanned}");
}

fn entry(mode: u32, size: u64) -> Header {
    Header { mode, nlink: 1, size, ..Header::default() }
}

#[test]
fn no_archive_writes_outside_of_the_directory() {
    let place = Place::with_drive();
    let outside = place.base.join("outside");
    fs::create_dir(&outside).unwrap();
    let target = outside.to_str().unwrap();
    let mut archive = Archive::new(Vec::new());
    let mut add = |mode: u32, name: &str, content: &[u8]| {
        let mut content = content;
        let size = content.len() as u64;
        archive.add(&entry(mode, size), name.as_bytes(), &mut content).unwrap();
    };
    let evil = format!("{target}/evil");
    add(0o100_644, "../outside/evil", b"x");
    add(0o100_644, "a/../../outside/evil", b"x");
    add(0o100_644, "..", b"x");
    add(0o100_644, &evil, b"x");
    add(0o120_777, "link", target.as_bytes());
    add(0o100_644, "link/evil", b"x");
    add(0o040_755, "link", b"");
    add(0o100_644, "link/evil2", b"x");
    add(0o120_777, "deep/er/link", b"../../../outside");
    add(0o100_644, "deep/er/link/evil", b"x");
    add(0o120_777, "file", format!("{target}/evil").as_bytes());
    add(0o100_644, "file", b"x");
    add(0o040_755, "link/evil3", b"");
    add(0o100_644, "good", b"good");
    add(0o040_755, "dir", b"");
    add(0o120_777, "dir", target.as_bytes());
    add(0o100_644, "dir/inside", b"x");
    let archive = archive.finish(512).unwrap();
    write_files(&place.image("A"), &[&archive]);
    place.ok(&["t0load", place.image("A").to_str().unwrap()]);
    for force in [false, true] {
        let (dir, name) = out(&place, if force { "forced" } else { "plain" });
        let mut line = vec!["t0read", "--file", "0", "-C", &name];
        line.extend(force.then_some("-f"));
        assert_eq!(place.code(&line), 3);
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        assert_eq!(fs::read(dir.join("good")).unwrap(), b"good");
        assert_eq!(fs::read(dir.join("dir/inside")).unwrap(), b"x");
        let relative = evil.trim_start_matches('/');
        assert_eq!(fs::read(dir.join(relative)).unwrap(), b"x", "an absolute name begins there");
        let is_link = fs::symlink_metadata(dir.join("file")).unwrap().is_symlink();
        assert_eq!(is_link, !force);
        let left = tree(&dir).into_keys().filter(|it| it.to_string_lossy().contains("reading-"));
        assert_eq!(left.count(), 0);
    }
}

/// A small generator of numbers.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn every_changed_byte_of_a_content_is_found() {
    let (place, src) = world();
    let job = write_job(&place, &src);
    let image = place.image("A");
    let spool = place.spool();
    place.ok(&["t0eject"]);
    assert_eq!(check(&image, Some(&spool)).1, [""; 0]);
    let bytes = fs::read(&image).unwrap();
    // Where contents are: the archive begins behind the label, and blocks have lengths around them.
    let mut drive = open_image(&image);
    drive.space_files(1).unwrap();
    let mut archive = Vec::new();
    let mut block = vec![0; 1 << 20];
    let mut lens = Vec::new();
    while let Read::Block(len) = drive.read(&mut block).unwrap() {
        archive.extend(&block[..len]);
        lens.push(len);
    }
    drive.close().unwrap();
    let begin = 8 + 32_768 + 4;
    assert!(lens.iter().all(|it| *it == 32_768));
    let offset = |at: usize| begin + at / 32_768 * (32_768 + 8) + 4 + at % 32_768;
    let mut reader = Reader::new(&*archive);
    let mut contents = Vec::new();
    while let Some(member) = reader.next_member().unwrap() {
        let start = reader.position() as usize;
        let is_own = member.name.windows(36).any(|it| it == job.as_bytes());
        if member.header.mode & 0o170_000 == 0o100_000 && member.header.size > 0 && !is_own {
            contents.push((start, member.header.size as usize, member.name));
        }
    }
    assert!(contents.len() >= 5);
    let mut state = 0x1234_5678_9abc_def1;
    let damaged = place.base.join("damaged.tap");
    for (start, len, name) in &contents {
        for _ in 0..8 {
            let at = start + random(&mut state) as usize % len;
            let mut bytes = bytes.clone();
            bytes[offset(at)] ^= 1 << (random(&mut state) % 8);
            fs::write(&damaged, &bytes).unwrap();
            let name = String::from_utf8_lossy(name).replace('\\', "\\\\");
            for spool in [Some(&spool), None] {
                let wrong = check(&damaged, spool).1;
                assert_eq!(wrong.len(), 1, "{wrong:?}");
                let what = ": its content is not what was written";
                assert!(wrong[0].contains(&format!(": {name}{what}")), "{wrong:?}");
            }
        }
    }
    // Anywhere else: it is read or refused, and never more is taken for good than is there.
    for _ in 0..150 {
        let mut bytes = bytes.clone();
        let at = random(&mut state) as usize % bytes.len();
        bytes[at] ^= 1 << (random(&mut state) % 8);
        fs::write(&damaged, &bytes).unwrap();
        if let Ok(mut loaded) = Loaded::open(&damaged, Access::Read) {
            let _ = check::check(&mut loaded, Some(&spool), &Progress::default(), &mut |_| Ok(()));
        }
    }
    // The program says so, and gives what is damaged another name.
    let (start, _, name) = &contents[1];
    let mut bytes = bytes.clone();
    bytes[offset(*start)] ^= 1;
    fs::write(&image, &bytes).unwrap();
    place.ok(&["t0load", image.to_str().unwrap()]);
    let name = String::from_utf8(name.clone()).unwrap();
    let said = place.fails(5, &["t0ck"]);
    assert!(said.contains(&name) && said.contains(" 1 errors"), "{said}");
    let (dir, dir_name) = out(&place, "out");
    let said = place.fails(5, &["t0read", "-C", &dir_name, &job]);
    assert!(said.contains(&name), "{said}");
    assert!(!dir.join(&name).exists() && dir.join(format!("{name}.damaged")).exists());
    let job_dir = place.spool().job(&job).unwrap().dir().to_path_buf();
    assert!(job_dir.join("w0").exists(), "it was not read as it should be");
    let (dir, dir_name) = out(&place, "one");
    assert_eq!(place.code(&["t0read", "-C", &dir_name, &job, &name]), 5);
    assert!(!dir.join(&name).exists());
}

#[test]
fn what_does_not_belong_together_is_told() {
    let (place, src) = world();
    let job = write_job(&place, &src);
    write_job(&place, &src);
    let (spool, image) = (place.spool(), place.image("A"));
    place.ok(&["t0eject"]);
    assert_eq!(check(&image, Some(&spool)).1, [""; 0]);
    let log = spool.tape(b"T1").unwrap().unwrap().dir().join("log");
    let lines = fs::read_to_string(&log).unwrap();
    let [first, second] = lines.lines().collect::<Vec<_>>()[..] else { panic!("{lines}") };
    let with = |text: String, expected: &[&str]| {
        fs::write(&log, text).unwrap();
        let wrong = check(&image, Some(&spool)).1;
        assert_eq!(wrong.len(), expected.len(), "{wrong:?}");
        for (wrong, expected) in wrong.iter().zip(expected) {
            assert!(wrong.contains(expected), "{wrong} {expected}");
        }
    };
    with(format!("{first}\n"), &["Some(2) the log of the tape has not"]);
    let moved = second.replacen("2 ", "2 1", 1);
    with(format!("{first}\n{moved}\n"), &["it begins at position"]);
    with(format!("{first}\n{second}\n3 999 {A} 0\n"), &["Some(3) batch 0 of job"]);
    let swapped = second.replace(second.split(' ').nth(2).unwrap(), &job);
    with(format!("{first}\n{swapped}\n"), &["Some(2) the tape file is batch 0 of job"]);
    with(lines.clone(), &[]);
    // A file that the results have and the archive has not, one at another place, one more.
    let w0 = spool.job(&job).unwrap().dir().join("w0");
    let text = fs::read_to_string(&w0).unwrap();
    fs::write(&w0, text.replace(" docs/a\n", " docs/other\n")).unwrap();
    let wrong = check(&image, Some(&spool)).1;
    assert!(wrong.iter().any(|it| it.contains("docs/other: another one is there: docs/a")));
    fs::write(&w0, text).unwrap();
    // The label is not what it was.
    let label = spool.tape(b"T1").unwrap().unwrap().dir().join("label");
    fs::write(&label, "t0version:1\nlabel:T1\n").unwrap();
    let wrong = check(&image, Some(&spool)).1;
    assert!(wrong[0].contains("not the one that the spool has a copy of"), "{wrong:?}");
    // The tape is short.
    let bytes = fs::read(&image).unwrap();
    fs::write(&image, &bytes[..8 + 32_768 + 4]).unwrap();
    let wrong = check(&image, Some(&spool)).1;
    assert!(wrong.iter().filter(|it| it.contains("is not on the tape")).count() == 2, "{wrong:?}");
}

#[test]
fn behind_a_bad_block_reading_goes_on() {
    let (place, src) = world();
    let job = write_job(&place, &src);
    place.ok(&["t0eject"]);
    let spool = place.spool();
    let drive = spool.drive(None).unwrap();
    let image = place.image("A");
    // Every read of a block of the archive in turn, by a bad block and by a reset.
    for trouble in [Trouble::Medium, Trouble::Reset] {
        for at in 3..9 {
            let taken = drive.take().unwrap();
            let plan = Plan { trouble, at, for_ever: false };
            let (faulty, counter) = FaultDrive::open(&image, Some(plan));
            let loaded = Loaded::with(faulty, &image).unwrap();
            let progress = Progress::default();
            let mut reading = Reading {
                spool: &spool,
                taken: &taken,
                loaded: Some(loaded),
                ask: None,
                target: None,
                progress: &progress,
                tally: Tally::default(),
            };
            let mut taken_job = spool.take_job(&job).unwrap();
            let id = taken_job.batches().unwrap()[0];
            let done = reading.batch(&mut taken_job, id, None);
            assert_eq!(counter.hits(), 1);
            let tally = reading.tally;
            match done {
                // The first block of all, or a motion.
                Err(_) => assert_eq!(tally.batches, 0),
                Ok(()) => {
                    assert!(tally.errors > 0 && tally.files >= 3, "{at} {trouble:?} {tally:?}");
                    assert_eq!(taken_job.batches().unwrap()[0].status, BatchStatus::Written);
                }
            }
        }
    }
}

#[test]
fn a_job_that_reads_takes_each_tape_once() {
    let place = Place::with_drive();
    let shelf = place.base.join("shelf");
    let drive = place.base.join("drive");
    place.ok(&[
        "t0p",
        "init",
        "-d",
        "d0",
        drive.to_str().unwrap(),
        "--changer",
        shelf.to_str().unwrap(),
    ]);
    let src = place.base.join("src");
    fs::create_dir(&src).unwrap();
    make_tree(&src);
    for (image, label) in [("A", "T1"), ("B", "T2")] {
        place.ok(&["t0load", image]);
        place.ok(&["t0label", "-w", label]);
        // By its label from now on: the barcode is another.
        assert!(place.ok(&["t0load", image]).contains(label));
        write_job(&place, &src);
        fs::write(src.join("docs/a"), format!("as of {label}")).unwrap();
        fs::write(src.join(format!("only {label}")), label).unwrap();
    }
    fs::write(src.join("never written"), "x").unwrap();
    let reads = place.ok(&["t0job", "-c", "-r", "-p", &format!("root={}", src.display())]);
    place.ok(&["t0job", "-a", &reads, "docs/a", "z", "only T1", "never written"]);
    place.ok(&["t0queue", "-a", &reads]);
    assert_eq!(place.ok(&["t0read", "-n", "-a"]), reads);
    assert_eq!(place.ok(&["t0stat"]).lines().filter(|it| *it == "tape T2").count(), 1);
    let (dir, name) = out(&place, "out");
    let said = place.fails(3, &["t0read", "-a", "-C", &name]);
    assert!(said.contains("never written") && said.contains("no tape that is known"), "{said}");
    assert_eq!(fs::read_to_string(dir.join("docs/a")).unwrap(), "as of T1", "the later one");
    assert_eq!(fs::read(dir.join("z")).unwrap(), fs::read(src.join("z")).unwrap());
    let job = place.spool().job(&reads).unwrap();
    assert!(job.is_archived() && job.kind() == JobKind::Read);
    let text = fs::read_to_string(job.dir().join("r0")).unwrap();
    assert!(text.contains("\nfail 2 never written\n") && text.contains("errors 1\n"), "{text}");
    assert_eq!(text.matches("\nok ").count(), 3);
    // It is no place where files are.
    assert_eq!(place.ok(&["t0find", src.join("only T1").to_str().unwrap()]).lines().count(), 1);
    assert_eq!(place.code(&["t0load", "T9"]), 7, "the changer has none");
}

/// A spool and a tape as the original program has left them: no results, no sums, afio.
fn original(place: &Place, src: &Path) -> String {
    let root = place.base.join("spool");
    let dir = root.join("job/archive").join(A);
    fs::create_dir_all(dir.join("@done")).unwrap();
    let all = names(src);
    let count = all.lines().count();
    let batch = format!("%batch\nnumber 0\ncreated 1455999395\ncount {count}\n\n%files\n{all}\n");
    fs::write(dir.join("w0"), &batch).unwrap();
    let source = src.display();
    let wjob =
        format!("%job\njob {A}\nroot {source}\ntype w\n\n%batches\n0 count {count} size 9\n");
    fs::write(dir.join("wjob"), &wjob).unwrap();
    // It archives the batch while that is called @0, in the directory of a job that is not done.
    let own = root.join("job").join(A);
    fs::create_dir_all(&own).unwrap();
    fs::write(own.join("@0"), &batch).unwrap();
    fs::write(own.join("wjob"), &wjob).unwrap();
    let list = format!("{}\n{}\n{all}", own.join("@0").display(), own.join("wjob").display());
    let archive = place.base.join("archive");
    let mut command = Command::new("afio");
    command.args(["-o", "-A", "-b", "32768", archive.to_str().unwrap()]);
    command.current_dir(src).stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), list.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    fs::remove_dir_all(&own).unwrap();
    let bytes = fs::read(&archive).unwrap();
    let label = "t0version:1\nlabel:OLD\ncreated:1455999395\n";
    let mut drive = open_image(&place.image("A"));
    let mut block = label.as_bytes().to_vec();
    block.resize(32_768, 0);
    assert_eq!(drive.write(&block).unwrap(), Wrote::Whole);
    assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
    for block in bytes.chunks(32_768) {
        assert_eq!(drive.write(block).unwrap(), Wrote::Whole);
    }
    assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
    drive.close().unwrap();
    let mut log = format!("J {A} begin 1\nT OLD filenum 1 position 2\nB 0 begin 1 files {count}\n");
    let mut reader = Reader::new(&*bytes);
    while let Some(member) = reader.next_member().unwrap() {
        log += &format!("F {} {}\n", member.position, String::from_utf8_lossy(&member.name));
    }
    log += "* afio: done\nB 0 end 2 errors 0\n";
    fs::write(dir.join("log"), log).unwrap();
    let tape = root.join("tape/OLD");
    fs::create_dir_all(tape.join("@offline")).unwrap();
    fs::write(tape.join("label"), label).unwrap();
    fs::write(tape.join("metrics"), "blocksize 32768\n").unwrap();
    fs::write(tape.join("log"), format!("1 2 {A} 0\n")).unwrap();
    label.to_owned()
}

#[test]
fn what_the_original_program_wrote_is_read() {
    let place = Place::with_drive();
    let src = place.base.join("src");
    fs::create_dir(&src).unwrap();
    make_tree(&src);
    original(&place, &src);
    place.ok(&["t0load", place.image("A").to_str().unwrap()]);
    place.ok(&["t0label", "-k", "OLD"]);
    let said = place.ok(&["t0ck", "-v"]);
    assert!(said.contains(&format!("{A}/0, 12 files")) && said.contains("without sums"), "{said}");
    assert!(place.ok(&["t0scan"]).contains(&format!("\n1 2 {A} 0 12")));
    let (whole, name) = out(&place, "whole");
    place.ok(&["t0read", "-C", &name, A]);
    assert_eq!(tree(&whole), tree(&src));
    let dir = place.base.join("spool/job/archive").join(A);
    assert!(dir.join("r0").exists() && !dir.join("w0").exists());
    let (some, name) = out(&place, "some");
    place.ok(&["t0read", "-C", &name, A, "docs/b c", "docs/link"]);
    assert_eq!(names(&some), "docs\ndocs/b c\ndocs/link\n");
    // Written on by this program.
    let job = write_job(&place, &src);
    let (again, name) = out(&place, "again");
    place.ok(&["t0read", "-C", &name, &job]);
    assert_eq!(tree(&again), tree(&src));
    assert_eq!(place.code(&["t0ck"]), 0);
}

#[test]
fn a_drive_is_moved_and_asked() {
    let (place, src) = world();
    let first = write_job(&place, &src);
    let second = write_job(&place, &src);
    let scanned = place.ok(&["t0scan"]);
    let lines: Vec<&str> = scanned.lines().collect();
    assert!(lines[0].starts_with("0 0 tape T1"), "{scanned}");
    assert!(lines[1].starts_with("1 2 ") && lines[1].ends_with(&format!("{first} 0 12")));
    assert!(lines[2].ends_with(&format!("{second} 0 12")));
    assert_eq!(place.ok(&["t0scan", "--from", "2"]), lines[2]);
    let position = lines[2].split(' ').nth(1).unwrap();
    let there = format!("file 2 position {position}");
    assert_eq!(place.ok(&["t0seek", "-v", "2"]), there);
    assert_eq!(place.ok(&["t0seek", "-v", &format!("{second}/0")]), there);
    assert_eq!(place.ok(&["t0seek", "-v", "0"]), "file 0 position 0");
    assert!(place.ok(&["t0seek", "-v", "end"]).starts_with("file 3 "));
    // An image is at its beginning when it is opened.
    assert_eq!(place.ok(&["t0seek", "-v", "+1"]), "file 1 position 2");
    assert_eq!(place.code(&["t0seek", "-1"]), 2);
    assert_eq!(place.code(&["t0seek", "9"]), 1);
    assert_eq!(place.code(&["t0seek", "nowhere"]), 2);
    assert_eq!(place.ok(&["t0tell"]), "file 0 position 0");
    let said = place.ok(&["t0stat"]);
    assert!(said.contains("tape T1\n") && said.contains("\nonline\n"), "{said}");
    assert!(said.contains("at the beginning") && !said.contains("write-protected"), "{said}");
    // Somebody has died.
    let drive = place.base.join("spool/drive/d0");
    fs::rename(drive.join("@idle"), drive.join("@busy")).unwrap();
    let job = place.ok(&["t0job", "-c"]);
    place.ok(&["t0job", "-a", &job, "/etc/passwd"]);
    let dir = place.base.join("spool/job").join(&job);
    fs::create_dir(dir.join("@busy")).unwrap();
    assert_eq!(place.ok(&["t0watch", "--interval", "0.05"]), "idle T1");
    assert_eq!(place.ok(&["t0job", "-l"]), format!("n w {job}"));
    assert_eq!(place.ok(&["t0tapes"]), "loaded T1");
    assert_eq!(
        place.ok(&["t0reset", "-n"]),
        format!("job {job} would not be busy any more\ndrive d0 would be rewound")
    );
    assert!(dir.join("@busy").exists() && drive.join("@busy").exists());
    assert!(place.ok(&["t0reset"]).contains(&job));
    assert!(!dir.join("@busy").exists() && drive.join("@idle").exists());
    assert_eq!(place.ok(&["t0watch", "--interval", "0.05"]), "idle T1");
    // Somebody is alive.
    let spool = place.spool();
    let taken = spool.drive(None).unwrap().take().unwrap();
    for verb in ["t0reset", "t0tell", "t0scan", "t0ck", "t0eject", "t0label"] {
        assert_eq!(place.code(&[verb]), 11, "{verb}");
    }
    assert!(place.ok(&["t0stat"]).ends_with("busy"));
    drop(taken);
    assert_eq!(place.code(&["t0eject", "-t", "T2"]), 7);
    place.ok(&["t0eject"]);
    assert_eq!(place.code(&["t0tell"]), 7);
    assert!(place.ok(&["t0stat"]).contains("no tape"));
    assert_eq!(place.ok(&["t0tapes"]), "offline T1");
    // Nobody sits at a terminal.
    assert!(place.fails(7, &["t0load", "T1"]).contains("put it in"));
    let blank = place.image("B");
    assert!(place.ok(&["t0load", blank.to_str().unwrap()]).contains("blank"));
    place.ok(&["t0load", place.image("A").to_str().unwrap()]);
    assert_eq!(place.ok(&["t0load"]), "tape T1");
    let text = place.base.join("text.tap");
    fs::write(&text, "no tape at all").unwrap();
    assert_eq!(place.code(&["t0load", text.to_str().unwrap()]), 5);
    let label = Label::new("T1").unwrap();
    assert_eq!(label.text(), b"T1");
    let created = Image::create(&place.image("A"), &Medium::default());
    assert!(created.is_err(), "what is there stays");
}

/// A job of these batches, queued.
pub fn add_job(place: &Place, root: &Path, batches: &[&[&str]]) -> String {
    let job = place.ok(&["t0job", "-c", "-p", &format!("root={}", root.display())]);
    for files in batches {
        place.ok(&[&["t0job", "-a", &job], *files].concat());
    }
    place.ok(&["t0queue", "-a", &job]);
    job
}

/// A job that reads these files, queued.
pub fn add_reading(place: &Place, root: &Path, files: &[&str]) -> String {
    let job = place.ok(&["t0job", "-c", "-r", "-p", &format!("root={}", root.display())]);
    place.ok(&[&["t0job", "-a", &job], files].concat());
    place.ok(&["t0queue", "-a", &job]);
    job
}

/// A place with a tape T1 in the drive, and files whose contents are their names and this.
pub fn small_world(files: &[&str]) -> (Place, PathBuf) {
    let place = Place::with_drive();
    place.ok(&["t0load", place.image("A").to_str().unwrap()]);
    place.ok(&["t0label", "-w", "T1"]);
    let src = place.base.join("src");
    fs::create_dir(&src).unwrap();
    files.iter().for_each(|it| fs::write(src.join(it), format!("content of {it}")).unwrap());
    (place, src)
}

/// Changes a byte of an image, so many before this text.
pub fn spoil(image: &Path, text: &str, before: usize) {
    let mut bytes = fs::read(image).unwrap();
    let at = bytes.windows(text.len()).position(|it| it == text.as_bytes()).unwrap();
    bytes[at - before] ^= 1;
    fs::write(image, bytes).unwrap();
}

#[test]
fn files_of_two_archives_are_not_linked() {
    let (place, src) = small_world(&["a", "c"]);
    fs::write(src.join("b"), "").unwrap();
    for name in ["a", "b", "c"] {
        fs::hard_link(src.join(name), src.join(format!("{name}2"))).unwrap();
    }
    // The first file of each archive has the same number in it.
    let job = add_job(&place, &src, &[&["a", "a2"], &["b", "b2"], &["c", "c2"]]);
    place.ok(&["t0write", "-a"]);
    let (dir, name) = out(&place, "out");
    place.ok(&["t0read", "-C", &name, &job]);
    assert_eq!(tree(&dir), tree(&src));
    let reading = add_reading(&place, &src, &["a", "b", "c", "c2"]);
    let (dir, name) = out(&place, "listed");
    place.ok(&["t0read", "-C", &name, &reading]);
    assert_eq!(fs::read(dir.join("b")).unwrap(), b"");
    assert_eq!(fs::read(dir.join("c2")).unwrap(), b"content of c");
    assert_eq!(fs::metadata(dir.join("c")).unwrap().nlink(), 2);
}

#[test]
fn only_what_was_made_is_set_aside() {
    let (place, src) = small_world(&["f", "g"]);
    symlink("f", src.join("e")).unwrap();
    let job = add_job(&place, &src, &[&["e", "f", "g"]]);
    place.ok(&["t0write", "-a"]);
    spoil(&place.image("A"), "content of f", 0);
    let (dir, name) = out(&place, "mine");
    fs::write(dir.join("f"), "mine").unwrap();
    let said = place.fails(5, &["t0read", "-C", &name, &job]);
    assert!(said.contains("f: its content is not what was written"), "{said}");
    assert_eq!(fs::read(dir.join("f")).unwrap(), b"mine");
    assert_eq!(names(&dir), "e\nf\ng\n");
    // What has the other name stays.
    for (at, words) in [&[][..], &["e", "f"]].into_iter().enumerate() {
        let (dir, name) = out(&place, &format!("other{at}"));
        fs::write(dir.join("f.damaged"), "mine").unwrap();
        place.fails(5, &[&["t0read", "-f", "-C", &name, &job], words].concat());
        assert_eq!(fs::read(dir.join("f.damaged")).unwrap(), b"mine");
        assert_eq!(fs::read(dir.join("f.damaged.2")).unwrap(), b"bontent of f");
        assert!(!dir.join("f").exists());
    }
}

#[test]
fn the_newest_copy_is_read_also_of_a_job_that_was_redone() {
    let (place, src) = small_world(&["f", "other"]);
    symlink("old", src.join("l")).unwrap();
    let job = add_job(&place, &src, &[&["f", "l"]]);
    place.ok(&["t0write", "-a"]);
    place.ok(&["t0job", "--redo", &job]);
    fs::write(src.join("f"), "newer").unwrap();
    fs::remove_file(src.join("l")).unwrap();
    symlink("new", src.join("l")).unwrap();
    place.ok(&["t0queue", "-a", &job]);
    place.ok(&["t0write", "-a"]);
    let reading = add_reading(&place, &src, &["f", "l"]);
    let (dir, name) = out(&place, "out");
    place.ok(&["t0read", "-a", "-C", &name]);
    assert_eq!(fs::read(dir.join("f")).unwrap(), b"newer");
    assert_eq!(fs::read_link(dir.join("l")).unwrap(), Path::new("new"));
    let text = fs::read_to_string(place.spool().job(&reading).unwrap().dir().join("r0")).unwrap();
    assert!(text.contains("\nfilenum 2\n"), "{text}");
    // Undone once more, what the log has is all there is.
    place.ok(&["t0job", "--redo", &job]);
    add_reading(&place, &src, &["f"]);
    let (dir, name) = out(&place, "again");
    place.ok(&["t0read", "-a", "-C", &name]);
    assert_eq!(fs::read(dir.join("f")).unwrap(), b"newer");
}

#[test]
fn files_of_a_spool_are_files_as_others() {
    let (place, _) = small_world(&[]);
    let base = place.base.clone();
    fs::create_dir(base.join(A)).unwrap();
    let mut files: Vec<String> = ["wjob", "@0", "@0.sha256"].map(|it| format!("{A}/{it}")).into();
    files.iter().for_each(|it| fs::write(base.join(it), format!("content of {it}")).unwrap());
    let job = place.ok(&["t0job", "-c", "-p", &format!("root={}", base.display())]);
    files.push(format!("spool/job/{job}/wjob"));
    let list: Vec<&str> = files.iter().map(|it| &**it).collect();
    place.ok(&[&["t0job", "-a", &job], &list[..]].concat());
    place.ok(&["t0queue", "-a", &job]);
    let wjob = fs::read(base.join(&files[3])).unwrap();
    place.ok(&["t0write", "-a"]);
    assert!(place.ok(&["t0ck"]).contains(" 4 files, 4 of them by their sums: 0 errors"));
    for (number, words) in
        [&[&*job][..], &[&job, &files[3], A], &["--file", "1"]].into_iter().enumerate()
    {
        let (dir, name) = out(&place, &format!("out{number}"));
        let said = place.ok(&[&["t0read", "-v", "-C", &name], words].concat());
        assert!(said.starts_with("4 files, ") && said.contains(" 0 without sums"), "{said}");
        assert_eq!(fs::read(dir.join(&files[3])).unwrap(), wjob);
        for file in &files[..3] {
            let content = fs::read_to_string(dir.join(file)).unwrap();
            assert_eq!(content, format!("content of {file}"));
        }
    }
    // Without the spool's positions.
    let mut loaded = Loaded::open(&place.image("A"), Access::Read).unwrap();
    let checked = check::check(&mut loaded, None, &Progress::default(), &mut |_| Ok(())).unwrap();
    assert_eq!((checked.findings, checked.summed), (0, 4));
}

#[test]
fn every_word_is_met_or_named() {
    let (place, src) = small_world(&["p[1].jpg", "p1.jpg", "[x", "y"]);
    let job = add_job(&place, &src, &[&["p[1].jpg", "p1.jpg"], &["[x", "y"]]);
    place.ok(&["t0write", "-a"]);
    let (dir, name) = out(&place, "out");
    place.ok(&["t0read", "-C", &name, &job, "p[1].jpg", "[x"]);
    assert_eq!(names(&dir), "[x\np1.jpg\np[1].jpg\n");
    let (dir, name) = out(&place, "some");
    let said = place.fails(1, &["t0read", "-C", &name, &job, "y", "none", "*.none", "p1.jpg"]);
    assert_eq!(said.matches("there is no such file in what was read").count(), 2, "{said}");
    assert!(said.contains("none: ") && said.contains("*.none: "), "{said}");
    assert_eq!(names(&dir), "p1.jpg\ny\n");
    let said = place.fails(1, &["t0read", "--file", "1", "-l", "p1.jpg", "y"]);
    assert!(said.contains(" p1.jpg\n") && said.contains("y: there is no such file"), "{said}");
    assert_eq!(place.code(&["t0read", "--file", "2", "y", "p1.jpg"]), 1);
}

#[test]
fn a_file_whose_content_is_with_another_name_is_not_called_whole() {
    let place = Place::with_drive();
    let src = place.base.join("src");
    fs::create_dir(&src).unwrap();
    make_tree(&src);
    // The content is with the last name, and with the first.
    let mut command = Command::new("cpio");
    command.args(["-o", "-H", "newc", "--quiet"]).current_dir(&src);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let list = names(&src);
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), list.as_bytes()).unwrap();
    let archive = child.wait_with_output().unwrap().stdout;
    write_files(&place.image("B"), &[&archive]);
    original(&place, &src);
    for (image, which, lacks) in [("B", &["--file", "0"][..], "docs/z2"), ("A", &[A], "z")] {
        place.ok(&["t0load", place.image(image).to_str().unwrap()]);
        let (dir, name) = out(&place, image);
        let line = [&["t0read", "-C", &name], which, &[lacks]].concat();
        let said = place.fails(3, &line);
        assert!(said.contains(&format!("{lacks}: it is empty, and its content may be")), "{said}");
        assert!(!dir.join(lacks).exists());
        let (dir, name) = out(&place, &format!("{image} both"));
        place.ok(&[&["t0read", "-C", &name], which, &["z", "docs/z2"]].concat());
        for file in ["z", "docs/z2"] {
            assert_eq!(fs::read(dir.join(file)).unwrap(), fs::read(src.join(file)).unwrap());
        }
    }
    // All names of one that is empty.
    place.ok(&["t0load", place.image("B").to_str().unwrap()]);
    let (dir, name) = out(&place, "empty");
    place.ok(&["t0read", "-C", &name, "--file", "0", "docs/old/empty", "empty2"]);
    assert_eq!(fs::metadata(dir.join("empty2")).unwrap().nlink(), 2);
}

#[test]
fn what_is_wrong_with_one_batch_leaves_the_others() {
    let (place, src) = small_world(&["a", "b", "c"]);
    let job = add_job(&place, &src, &[&["a"], &["b"]]);
    place.ok(&["t0write", "-a"]);
    let w0 = place.spool().job(&job).unwrap().dir().join("w0");
    let text = fs::read_to_string(&w0).unwrap();
    let lines = [
        ("tape T1\nfilenum 1", "tape T9\nfilenum 1", 7, "T9 is not in drive"),
        ("filenum 1", "filenum 2", 5, "the tape file is batch 1 of job"),
        ("filenum 1", "filenum 9", 3, "the tape ends before it"),
    ];
    for (number, (from, to, code, message)) in lines.into_iter().enumerate() {
        fs::write(&w0, text.replace(from, to)).unwrap();
        place.ok(&["t0load", place.image("A").to_str().unwrap()]);
        let (dir, name) = out(&place, &format!("out{number}"));
        let said = place.fails(code, &["t0read", "-C", &name, &job]);
        assert!(said.contains(&format!("batch 0 of job {job}: ")), "{said}");
        assert!(said.contains(message), "{said}");
        assert_eq!(names(&dir), "b\n", "{said}");
    }
    // A job that reads leaves out what is on a tape that is not here, if there is anything else.
    fs::write(&w0, text.replace(lines[0].0, lines[0].1)).unwrap();
    place.ok(&["t0load", place.image("A").to_str().unwrap()]);
    let alone = add_reading(&place, &src, &["a"]);
    assert!(place.fails(7, &["t0read", &alone]).contains("T9 is not in drive"));
    let pending = place.spool().job(&alone).unwrap().pending().unwrap().len();
    assert_eq!((pending, place.ok(&["t0queue"])), (1, alone));
    place.ok(&["t0load", place.image("A").to_str().unwrap()]);
    let both = add_reading(&place, &src, &["a", "b"]);
    let (dir, name) = out(&place, "both");
    assert!(place.fails(7, &["t0read", "-C", &name, &both]).contains("T9 is not in drive"));
    assert_eq!(names(&dir), "b\n");
    let text = fs::read_to_string(place.spool().job(&both).unwrap().dir().join("r0")).unwrap();
    assert!(text.contains("\nfail 123 a\nok ") && text.contains("errors 1\n"), "{text}");
}

#[test]
fn an_archive_that_could_not_be_closed_is_whole_up_to_there() {
    let dir = scratch();
    let world = TapeWorld::new(dir.path());
    let medium = Medium { capacity: Some(40_000), worm: true, ..Medium::default() };
    world.add_tape("T0", &medium);
    world.add_tape("T1", &Medium::default());
    world.insert("T0");
    let files = ["a", "b", "c", "d", "e"];
    files.iter().for_each(|it| world.add_file(it, 1500));
    world.add_job(A, &[], &[&files]);
    world.write_with(None, Settings::default(), &mut |_| {}).result.unwrap();
    let (spool, image) = (world.spool(), world.image("T0"));
    let job_dir = spool.job(A).unwrap().dir().to_path_buf();
    let text = fs::read_to_string(job_dir.join("w0")).unwrap();
    assert!(text.contains("\nincomplete ") && text.contains("\nok ") && !text.contains(" e\n"));
    let (checked, wrong) = check(&image, Some(&spool));
    assert_eq!(wrong, [""; 0]);
    assert!(checked.summed > 0 && checked.summed == checked.files, "{checked:?}");
    // By the spool's sums.
    let bytes = fs::read(&image).unwrap();
    let last = raidtape::tape::spool::batch::BatchId::parse(b"w0").unwrap();
    let mut changed = bytes.clone();
    let content = crate::common::tapeworld::content("a", 1500);
    let at = bytes.windows(50).position(|it| it == &content[..50]).unwrap();
    changed[at] ^= 1;
    fs::write(&image, changed).unwrap();
    let (_, wrong) = check(&image, Some(&spool));
    assert!(wrong.len() == 1 && wrong[0].contains("a: its content is not"), "{wrong:?}");
    fs::write(&image, bytes).unwrap();
    world.insert("T0");
    let taken = spool.drive(None).unwrap().take().unwrap();
    let mut reading = Reading {
        spool: &spool,
        taken: &taken,
        loaded: None,
        ask: None,
        target: None,
        progress: &Progress::default(),
        tally: Tally::default(),
    };
    reading.batch(&mut spool.take_job(A).unwrap(), last, None).unwrap();
    let Tally { batches, errors, unsummed, .. } = reading.tally;
    assert_eq!((batches, errors, unsummed), (1, 0, 0));
    assert!(job_dir.join("r0").exists());
}

/// A drive whose tape cannot be read or passed over between two positions.
struct Scratched {
    inner: Box<dyn Drive>,
    scratch: Range<u64>,
}

impl Scratched {
    fn look(&mut self) -> Result<()> {
        match self.scratch.contains(&self.inner.position()?) {
            true => Err(Error::new(ErrorKind::Io, "a scratch")),
            false => Ok(()),
        }
    }
}

impl Drive for Scratched {
    fn state(&mut self) -> Result<State> {
        self.inner.state()
    }
    fn set_block_size(&mut self, size: BlockSize) -> Result<()> {
        self.inner.set_block_size(size)
    }
    fn read(&mut self, buffer: &mut [u8]) -> Result<Read> {
        self.look()?;
        self.inner.read(buffer)
    }
    fn write(&mut self, block: &[u8]) -> Result<Wrote> {
        self.inner.write(block)
    }
    fn write_filemarks(&mut self, count: u32) -> Result<Wrote> {
        self.inner.write_filemarks(count)
    }
    fn position(&mut self) -> Result<u64> {
        self.inner.position()
    }
    fn locate(&mut self, position: u64) -> Result<Moved> {
        self.inner.locate(position)
    }
    fn rewind(&mut self) -> Result<()> {
        self.inner.rewind()
    }
    fn to_end_of_data(&mut self) -> Result<()> {
        self.inner.to_end_of_data()
    }
    fn space_files(&mut self, count: i64) -> Result<Moved> {
        self.look()?;
        self.inner.space_files(count)
    }
    fn unload(&mut self) -> Result<()> {
        self.inner.unload()
    }
    fn close(self: Box<Self>) -> Result<()> {
        self.inner.close()
    }
}

#[test]
fn behind_an_error_of_the_tape_the_check_goes_on() {
    let (place, src) = small_world(&["a", "b", "c"]);
    for name in ["a", "b", "c"] {
        add_job(&place, &src, &[&[name]]);
        place.ok(&["t0write", "-a"]);
    }
    place.ok(&["t0eject"]);
    let (image, spool) = (place.image("A"), place.spool());
    let run = |drive: Box<dyn Drive>| {
        // It may be the label that is not read.
        let Ok(mut loaded) = Loaded::with(drive, &image) else { return None };
        let mut wrong = Vec::new();
        let mut say = |said: Said<'_>| {
            if let Said::Wrong(filenum, what) = said {
                wrong.push(format!("{filenum:?} {what}"));
            }
            Ok(())
        };
        let checked = check::check(&mut loaded, Some(&spool), &Progress::default(), &mut say);
        checked.ok().map(|it| (it, wrong))
    };
    let assert_true = |wrong: &[String], what: &str| {
        let is_untrue = |it: &String| it.contains("is not on the tape") || it.contains("ends");
        assert!(!wrong.iter().any(is_untrue), "{what}: {wrong:?}");
    };
    for trouble in [Trouble::Medium, Trouble::Reset] {
        for at in 1..30 {
            let plan = Plan { trouble, at, for_ever: false };
            let (drive, counter) = FaultDrive::open(&image, Some(plan));
            let Some((checked, wrong)) = run(drive) else { continue };
            let what = format!("{at} {trouble:?}");
            assert_true(&wrong, &what);
            assert_eq!(wrong.is_empty(), counter.hits() == 0, "{what}: {wrong:?}");
            assert!(checked.tape_files >= 3, "{what}: {wrong:?}");
        }
    }
    // All of one tape file is scratched, and its filemark: the next one is gone to.
    let tape = spool.tape(b"T1").unwrap().unwrap();
    let mut begins = Vec::new();
    tape.files(&mut |it| {
        begins.push(it.position);
        Ok(())
    })
    .unwrap();
    let scratch = begins[0]..begins[1];
    let drive = Box::new(Scratched { inner: open_image(&image), scratch });
    let (checked, wrong) = run(drive).unwrap();
    assert_true(&wrong, "scratched");
    assert!(wrong.iter().any(|it| it.contains("cannot be read on behind file 1")), "{wrong:?}");
    assert_eq!((checked.tape_files, checked.summed), (3, 2), "{wrong:?}");
    let scratch = begins[0]..u64::MAX;
    let drive = Box::new(Scratched { inner: open_image(&image), scratch });
    let (checked, wrong) = run(drive).unwrap();
    assert_true(&wrong, "all scratched");
    assert_eq!((checked.tape_files, checked.summed), (3, 0), "{wrong:?}");
    let mut met = 0;
    for at in 5..20 {
        let plan = Plan { trouble: Trouble::Medium, at, for_ever: true };
        let Some((checked, wrong)) = run(FaultDrive::open(&image, Some(plan)).0) else { continue };
        let unreached = wrong.iter().filter(|it| it.contains("could not be got to")).count();
        met += unreached;
        assert!(checked.tape_files + unreached as u64 >= 3, "{at} {wrong:?}");
        assert_true(&wrong, &at.to_string());
    }
    assert!(met > 3, "{met}");
}

#[test]
fn sums_find_their_files_behind_many_that_have_none() {
    let (place, src) = small_world(&["a", "b"]);
    // Its length is not what it says.
    let partial = "/sys/kernel/uevent_seqnum\n";
    let job = place.ok(&["t0job", "-c", "-p", &format!("root={}", src.display())]);
    place.feed(&["t0job", "-a", &job], &format!("a\n{}b\n", partial.repeat(4200)));
    place.ok(&["t0queue", "-a", &job]);
    assert_eq!(place.code(&["t0write", "-a"]), 3);
    let said = place.ok(&["t0ck"]);
    assert!(said.contains(" 4202 files, 2 of them by their sums: 0 errors"), "{said}");
    spoil(&place.image("A"), "content of b", 0);
    let said = place.fails(5, &["t0ck"]);
    assert!(said.contains("b: its content is not what was written"), "{said}");
    assert_eq!(place.code(&["t0read", &job]), 5);
}

#[test]
fn a_tape_that_was_changed_by_hand_is_not_taken_for_the_other() {
    let (place, src) = small_world(&["a", "b"]);
    fs::write(src.join("long"), vec![7; 300_000]).unwrap();
    add_job(&place, &src, &[&["long"], &["a"]]);
    place.ok(&["t0write", "-a"]);
    place.ok(&["t0load", place.image("B").to_str().unwrap()]);
    place.ok(&["t0label", "-w", "T2"]);
    let job = add_job(&place, &src, &[&["a"], &["b"]]);
    place.ok(&["t0write", "-a"]);
    let there = place.ok(&["t0seek", "-v", "2"]);
    place.ok(&["t0load", place.image("A").to_str().unwrap()]);
    let link = place.base.join("drive/loaded");
    for to in ["2", &format!("{job}/1")] {
        fs::remove_file(&link).unwrap();
        symlink(place.image("A"), &link).unwrap();
        assert_eq!(place.ok(&["t0load"]), "tape T1");
        fs::remove_file(&link).unwrap();
        symlink(place.image("B"), &link).unwrap();
        assert_eq!(place.ok(&["t0seek", "-v", to]), there);
    }
}

#[test]
fn what_was_on_a_tape_before_its_label_is_not_looked_for() {
    let (place, src) = small_world(&["a", "b"]);
    add_job(&place, &src, &[&["a"], &["b"]]);
    place.ok(&["t0write", "-a"]);
    let path = src.join("b").to_str().unwrap().to_owned();
    let find = || place.feed(&["t0find", &path], "").1.lines().count();
    assert_eq!(find(), 1);
    // The same label again, later by any clock.
    place.ok(&["t0label", "-w", "-f", "-p", "created=99999999999", "T1"]);
    assert_eq!(find(), 0);
    assert!(place.ok(&["t0ck"]).contains(" 0 errors"));
    let reading = add_reading(&place, &src, &["b"]);
    assert!(place.fails(3, &["t0read", &reading]).contains("no tape that is known has it"));
    // What is written now is there, whatever the clocks say.
    add_job(&place, &src, &[&["b"]]);
    place.ok(&["t0write", "-a"]);
    assert_eq!(find(), 1);
    assert!(place.ok(&["t0ck"]).contains(" 1 of them by their sums: 0 errors"));
    // An older label takes nothing away.
    place.ok(&["t0label", "-w", "-f", "-p", "created=7", "T1"]);
    assert!(find() > 1);
}

#[test]
fn what_is_wrong_with_an_archive_is_told_with_its_tape() {
    let (place, src) = small_world(&["a", "b", "c"]);
    let job = add_job(&place, &src, &[&["a", "b", "c"]]);
    place.ok(&["t0write", "-a"]);
    // The magic of the header of b: 76 bytes, and its name.
    spoil(&place.image("A"), "content of b", 78);
    let said = place.fails(5, &["t0read", &job]);
    assert!(said.contains("t0p: tape T1 file 1: cpio archive at byte "), "{said}");
    assert!(said.contains("b: it is not there, where it was written"), "{said}");
}

#[test]
fn a_revoked_job_reads_nothing() {
    let (place, src) = small_world(&["a"]);
    add_job(&place, &src, &[&["a"]]);
    place.ok(&["t0write", "-a"]);
    for (what, word) in [("--revoke", "revoked"), ("--clone", "cloned")] {
        let reading = add_reading(&place, &src, &["a"]);
        place.ok(&["t0job", what, &reading]);
        let said = place.fails(2, &["t0read", &reading]);
        assert!(said.contains(&format!("job {reading} is {word}")), "{said}");
        assert_eq!(place.spool().job(&reading).unwrap().pending().unwrap().len(), 1);
    }
}
