//! The commands of t0p, as `t0p VERB` and under their own names.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use raidtape::tape::drive::Access;
use raidtape::tape::image::Image;
use raidtape::tape::label::Label;
use raidtape::tape::loaded::Loaded;
use raidtape::tape::medium::Medium;

use crate::common::RAIDTAPE;
use crate::common::verbs::Place;

#[test]
fn jobs_are_made_queued_and_listed() {
    let place = Place::new();
    assert_eq!(place.code(&["t0job", "-l"]), 1, "there is no spool");
    assert_eq!(place.code(&["t0p", "nonsense"]), 2);
    place.ok(&["t0p", "init", "-d", "d0", "/dev/nst7"]);
    let root = place.base.join("spool");
    assert_eq!(fs::read_link(root.join("drive/d0/device")).unwrap(), Path::new("/dev/nst7"));
    let job = place.ok(&["t0job", "-c", "-p", "root=/etc", "-p", "comment=a=b c"]);
    assert_eq!(job.len(), 36);
    assert_eq!(place.ok(&["t0p", "job", "-l"]), format!("n w {job}"));
    place.ok(&["t0job", "-a", "-p", "comment=first", &job, "passwd", "group"]);
    let (code, said) = place.feed(&["t0job", "-a", &job], "/etc/hostname\n/etc/%odd name\n");
    assert_eq!(code, 0, "{said}");
    let files = fs::read_to_string(root.join("job").join(&job).join("b1")).unwrap();
    assert!(files.ends_with("\n%files\n/etc/hostname\n/etc/%odd name\n"), "{files}");
    assert_eq!(place.feed(&["t0job", "-a", &job], "").0, 2, "no files");
    place.ok(&["t0job", "-p", "comment=other", &job]);
    let shown = place.ok(&["t0job", &job]);
    assert!(shown.contains("comment other\n") && shown.contains("\nb0 count 2 size "), "{shown}");
    place.ok(&["t0queue", "-a", &job]);
    assert_eq!(place.ok(&["t0queue", "-l"]), job);
    assert_eq!(place.ok(&["t0queue"]), job);
    assert_eq!(place.ok(&["t0p", "queue", "-d", "d0", "-q", "night"]), "");
    assert_eq!(place.code(&["t0queue", "-d", "none"]), 1);
    assert_eq!(place.ok(&["t0job", "-l"]), format!("r w {job}"));
    let clone = place.ok(&["t0job", "--clone", &format!("/any/where/{job}")]);
    assert_ne!(clone, job);
    assert_eq!(place.ok(&["t0queue"]), "");
    place.ok(&["t0job", "--revoke", &clone]);
    place.ok(&["t0job", "--redo", &clone]);
    place.ok(&["t0queue", "-a", &clone]);
    assert_eq!(place.ok(&["t0queue"]), clone);
    assert_eq!(place.ok(&["t0job", "--tail", &clone]), "");
    // What makes no sense.
    for line in [
        &["t0job"][..],
        &["t0job", "-c", "word"],
        &["t0job", "-p", "novalue", &job],
        &["t0job", "-a"],
        &["t0job", "-c", "-l"],
        &["t0job", "--revoke", "no-job"],
        &["t0queue", "-a"],
        &["t0queue", "job"],
    ] {
        assert_eq!(place.code(line), 2, "{line:?}");
    }
    // The same program by its own name.
    let output =
        Command::new(RAIDTAPE).args(["t0p", "queue"]).env("T0P_ROOT", &root).output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), clone);
}

#[test]
fn tapes_are_listed_and_moved_and_files_found() {
    let place = Place::new();
    place.ok(&["t0p", "init"]);
    for label in ["T0", "T 1"] {
        place.spool().add_tape(&Label::new(label).unwrap()).unwrap();
    }
    place.spool().set_in_pool(b"full", b"T0", true).unwrap();
    assert_eq!(place.ok(&["t0tapes"]), "offline T 1\noffline T0");
    place.ok(&["t0move", "offsite", "T0"]);
    assert_eq!(place.ok(&["t0tapes", "--pool", "full", "-v"]), "offsite T0\n  files 0");
    place.ok(&["t0move", "onsite", "T0", "T 1"]);
    assert_eq!(place.code(&["t0move", "offsite", "T0", "none"]), 1);
    assert_eq!(place.ok(&["t0tapes", "--pool", "full"]), "offline T0", "all or none");
    let job = place.ok(&["t0job", "-c"]);
    let dir = place.base.join("spool/job").join(&job);
    let log =
        "T T 1 filenum 4 position 9\nB 3 begin 1 files 3\nF 512 /home/a/x.txt\nF 600 /home/b\n";
    fs::write(dir.join("log"), log).unwrap();
    let line = |position: u32, path: &str| format!("T 1 4 {position} {job}/3 {path}");
    assert_eq!(place.ok(&["t0find", "/home/b"]), line(600, "/home/b"));
    assert_eq!(place.ok(&["t0find", "/home/*.txt"]), line(512, "/home/a/x.txt"));
    assert_eq!(place.feed(&["t0find", "/home"], ""), (1, String::new()));
    // Names may have anything in them.
    assert_eq!(place.code(&["t0find", "/home/[x"]), 1);
    fs::write(dir.join("log"), log.replace("/home/b", "/home/[x") + "F 700 /home/p[1]\n").unwrap();
    assert_eq!(place.ok(&["t0find", "/home/[x"]), line(600, "/home/[x"));
    assert_eq!(place.ok(&["t0find", "/home/p[1]"]), line(700, "/home/p[1]"));
}

#[test]
fn jobs_are_written_to_the_tape_in_the_drive() {
    let place = Place::new();
    let image = place.base.join("T3.tap");
    Image::create(&image, &Medium::default()).unwrap();
    place.ok(&["t0p", "init", "-d", "d0", image.to_str().unwrap()]);
    fs::write(place.base.join("one"), "first").unwrap();
    let root = format!("root={}", place.base.display());
    let job = place.ok(&["t0job", "-c", "-p", &root]);
    place.feed(&["t0job", "-a", &job], "one\nnone\n");
    place.ok(&["t0queue", "-a", &job]);
    assert_eq!(place.ok(&["t0write", "-a", "-n"]), format!("{job} b0 count 2 size 5"));
    let (code, said) = place.feed(&["t0write", "-a"], "");
    assert_eq!(code, 7, "{said}");
    assert!(said.contains("a blank tape is in the drive"), "{said}");
    let mut loaded = Loaded::open(&image, Access::Write).unwrap();
    loaded.write_label(&Label::new("T3").unwrap()).unwrap();
    loaded.close().unwrap();
    assert_eq!(place.code(&["t0write", "-a", "-t", "T4"]), 7);
    assert_eq!(place.code(&["t0write"]), 2);
    assert_eq!(place.code(&["t0write", "-a", "-b", "100"]), 2);
    let receipts = place.base.join("receipts");
    let line = ["t0write", "-v", "-t", "T3", "-b", "4k", "-y", receipts.to_str().unwrap(), &job];
    let (code, said) = place.feed(&line, "");
    assert_eq!(code, 3, "one file has failed: {said}");
    assert!(said.contains(&format!("{job}/0 is file 1 of tape T3")), "{said}");
    assert!(said.contains("none: reading it: No such file"), "{said}");
    let text = fs::read_to_string(&receipts).unwrap();
    for part in [" one\n", "\nfail none\n", "\ntape T3\nfilenum 1\nerrors 1\n"] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(place.ok(&["t0write", "-a"]), "", "nothing is left");
    let found = place.ok(&["t0find", place.base.join("one").to_str().unwrap()]);
    assert!(found.starts_with("T3 1 "), "{found}");
}

#[test]
fn a_changer_brings_the_next_tape() {
    let place = Place::new();
    for name in ["drive", "shelf"] {
        fs::create_dir(place.base.join(name)).unwrap();
    }
    let (drive, shelf) = (place.base.join("drive"), place.base.join("shelf"));
    let words = [drive.to_str().unwrap(), "--changer", shelf.to_str().unwrap()];
    place.ok(&[&["t0p", "init", "-d", "d0"], &words[..]].concat());
    let medium = Medium { capacity: Some(150_000), ..Medium::default() };
    for name in ["A", "B", "C"] {
        let image = place.image(name);
        Image::create(&image, &Medium::default()).unwrap();
        let mut loaded = Loaded::open(&image, Access::Write).unwrap();
        loaded.write_label(&Label::new(name).unwrap()).unwrap();
        loaded.close().unwrap();
        if name != "B" {
            medium.write(&image).unwrap();
        }
        place.spool().add_tape(&Label::new(name).unwrap()).unwrap();
    }
    for name in ["A", "C"] {
        place.spool().set_in_pool(b"two", name.as_bytes(), true).unwrap();
    }
    fs::write(place.base.join("file"), vec![7; 40_000]).unwrap();
    let root = format!("root={}", place.base.display());
    let job = place.ok(&["t0job", "-c", "-p", &root, "-p", "pool=two"]);
    place.feed(&["t0job", "-a", &job], &"file\n".repeat(4));
    place.ok(&["t0queue", "-a", &job]);
    place.ok(&["t0write", "-a", "-t", "A", "-b", "4k"]);
    let listed = place.ok(&["t0tapes", "-v"]);
    assert!(listed.contains("loaded C\n  files 1"), "{listed}");
    assert_eq!(listed.matches("\n  full ").count(), 1, "{listed}");
    // There is no third one in the pool.
    let job = place.ok(&["t0job", "--clone", &job]);
    place.ok(&["t0queue", "-a", &job]);
    let (code, said) = place.feed(&["t0write", "-a"], "");
    assert_eq!(code, 7, "{said}");
    assert!(said.contains("put in a tape of pool two that has room"), "{said}");
    assert_eq!(place.ok(&["t0job", "-l"]), format!("r w {job}"));
    place.spool().set_in_pool(b"two", b"B", true).unwrap();
    place.ok(&["t0write", "-a", "-t", "B"]);
    assert_eq!(place.ok(&["t0job", "-l"]), "");
}

/// A place with a changer, and tapes of these names in its shelf.
fn with_changer(tapes: &[&str]) -> Place {
    let place = Place::new();
    for name in ["drive", "shelf"] {
        fs::create_dir(place.base.join(name)).unwrap();
    }
    let (drive, shelf) = (place.base.join("drive"), place.base.join("shelf"));
    let words = [drive.to_str().unwrap(), "--changer", shelf.to_str().unwrap()];
    place.ok(&[&["t0p", "init", "-d", "d0"], &words[..]].concat());
    for name in tapes {
        Image::create(&place.image(name), &Medium::default()).unwrap();
    }
    place
}

/// A queued job of these files of a directory below the place.
fn queued(place: &Place, dir: &str, pool: &str, files: &str) -> String {
    let root = format!("root={}", place.base.join(dir).display());
    let job = place.ok(&["t0job", "-c", "-p", &root, "-p", &format!("pool={pool}")]);
    assert_eq!(place.feed(&["t0job", "-a", &job], files).0, 0);
    place.ok(&["t0queue", "-a", &job]);
    job
}

#[test]
fn an_empty_drive_gets_a_tape_for_the_first_job() {
    let place = with_changer(&["one", "two", "three"]);
    for (barcode, label) in [("one", "A"), ("two", "B"), ("three", "C")] {
        place.ok(&["t0load", barcode]);
        place.ok(&["t0label", "-w", label]);
    }
    place.ok(&["t0eject"]);
    // A tape is known to the changer by another name than its label.
    assert_eq!(place.ok(&["t0load", "B"]), "tape B");
    place.ok(&["t0eject"]);
    fs::write(place.base.join("file"), "content").unwrap();
    let job = queued(&place, ".", "mine", "file\n");
    fs::write(place.base.join("spool/pool/mine"), "").unwrap();
    let said = place.fails(7, &["t0write", "-a"]);
    let wanted =
        "there is no tape in drive d0: put in a tape of pool mine that has room, and write";
    assert!(said.contains(wanted), "{said}");
    fs::write(place.base.join("spool/pool/mine"), "none\nC\nB\n").unwrap();
    place.ok(&["t0write", &job]);
    assert_eq!(place.ok(&["t0tapes"]), "offline A\noffline B\nloaded C");
    // Without a pool any will do that is at hand.
    place.ok(&["t0eject"]);
    place.ok(&["t0move", "offsite", "A", "C"]);
    queued(&place, ".", "", "file\n");
    place.ok(&["t0write", "-a"]);
    assert_eq!(place.ok(&["t0tapes"]), "offsite A\nloaded B\noffsite C");
}

#[test]
fn an_empty_drive_without_a_changer_says_what_it_wants() {
    let place = Place::with_drive();
    fs::write(place.base.join("file"), "content").unwrap();
    let job = queued(&place, ".", "mine", "file\n");
    place.spool().add_tape(&Label::new("T7").unwrap()).unwrap();
    fs::write(place.base.join("spool/pool/mine"), "T7\n").unwrap();
    let wanted = ": put in a tape of pool mine that has room, as T7, and write again";
    assert!(place.fails(7, &["t0write", "-a"]).ends_with(wanted));
    let said = place.fails(7, &["t0write", "-t", "T8", &job]);
    assert!(said.ends_with(": put in a tape that has room, as T8, and write again"), "{said}");
    assert_eq!(place.ok(&["t0job", "-l"]), format!("r w {job}"));
}

#[test]
fn a_job_that_cannot_be_written_does_not_stop_the_others() {
    let place = with_changer(&["A"]);
    place.ok(&["t0load", "A"]);
    place.ok(&["t0label", "-w", "A"]);
    for dir in ["one", "two", "three"] {
        fs::create_dir(place.base.join(dir)).unwrap();
        fs::write(place.base.join(dir).join(dir), dir).unwrap();
    }
    let jobs: Vec<String> = ["one", "two", "three"]
        .iter()
        .map(|it| queued(&place, it, "", &format!("{it}\n")))
        .collect();
    fs::rename(place.base.join("two"), place.base.join("gone")).unwrap();
    let receipts = place.base.join("no/such/place");
    let bad = ["t0job", "-p", &format!("receipt={}", receipts.display()), &jobs[2]];
    place.ok(&bad);
    let last = queued(&place, "one", "", "one\n");
    let said = place.fails(1, &["t0write", "-a"]);
    for job in &jobs[1..] {
        assert_eq!(said.matches(&**job).count(), 1, "{said}");
        assert!(place.ok(&["t0job", "-l"]).contains(&format!("r w {job}")), "{said}");
    }
    assert!(said.contains("opening the root") && said.contains("it stays in the queue"), "{said}");
    for job in [&jobs[0], &last] {
        assert!(!place.ok(&["t0job", "-l"]).contains(&**job), "{said}");
    }
    // Once more, when they can be.
    fs::rename(place.base.join("gone"), place.base.join("two")).unwrap();
    fs::create_dir_all(receipts.parent().unwrap()).unwrap();
    place.ok(&["t0write", "-a"]);
    assert_eq!(place.ok(&["t0job", "-l"]), "");
    assert!(place.ok(&["t0ck"]).ends_with("0 errors"), "the tape has nothing else");
    // For want of a tape all ends, and the first error is not told twice.
    place.ok(&["t0eject"]);
    fs::write(place.base.join("spool/pool/mine"), "").unwrap();
    let jobs = [queued(&place, "one", "mine", "one\n"), queued(&place, "one", "", "one\n")];
    let said = place.fails(7, &["t0write", "-a"]);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(place.ok(&["t0job", "-l"]).lines().count(), 2, "{jobs:?}");
}

#[test]
fn jobs_that_are_named_do_not_stop_each_other() {
    let place = with_changer(&["A"]);
    place.ok(&["t0load", "A"]);
    place.ok(&["t0label", "-w", "A"]);
    for dir in ["one", "two"] {
        fs::create_dir(place.base.join(dir)).unwrap();
        fs::write(place.base.join(dir).join(dir), dir).unwrap();
    }
    let gone = queued(&place, "one", "", "one\n");
    let good = queued(&place, "two", "", "two\n");
    let reads = place.ok(&["t0job", "-c", "-r"]);
    place.ok(&["t0job", "-a", &reads, "/etc/passwd"]);
    fs::remove_dir_all(place.base.join("one")).unwrap();
    let unknown = "28970c2a-8eea-4060-8fc9-574e562fda12";
    let said = place.fails(1, &["t0write", unknown, &gone, &reads, &good]);
    for (job, why) in
        [(unknown, "there is no job"), (&gone, "opening the root"), (&reads, "is one that reads")]
    {
        let line = said.lines().find(|it| it.contains(job));
        assert!(line.is_some_and(|it| it.contains(why)), "{job}: {said}");
    }
    let left = place.ok(&["t0job", "-l"]);
    assert!(left.contains(&format!("r w {gone}")) && !left.contains(&good), "{left}");
    assert!(place.ok(&["t0ck"]).starts_with("tape A"));
    assert!(place.ok(&["t0find", place.base.join("two/two").to_str().unwrap()]).starts_with("A 1"));
}

#[test]
fn a_job_that_cannot_be_read_does_not_stop_the_others() {
    let place = with_changer(&["one", "two"]);
    for (barcode, label) in [("two", "T2"), ("one", "T1")] {
        place.ok(&["t0load", barcode]);
        place.ok(&["t0label", "-w", label]);
        fs::write(place.base.join(format!("on {label}")), label).unwrap();
        queued(&place, ".", "", &format!("on {label}\n"));
        place.ok(&["t0write", "-a"]);
    }
    let image = place.image("two");
    fs::rename(&image, place.base.join("away.tap")).unwrap();
    let root = format!("root={}", place.base.join(".").display());
    let reads = |batches: &[&str]| {
        let job = place.ok(&["t0job", "-c", "-r", "-p", &root]);
        batches.iter().for_each(|it| drop(place.ok(&["t0job", "-a", &job, it])));
        place.ok(&["t0queue", "-a", &job]);
        job
    };
    // Links are in the order of their times.
    let away = reads(&["on T2"]);
    let both = reads(&["on T2", "on T1"]);
    let here = reads(&["on T1"]);
    let out = place.base.join("out");
    fs::create_dir(&out).unwrap();
    let line = ["t0read", "-a", "-f", "-C", out.to_str().unwrap()];
    let said = place.fails(7, &line);
    assert_eq!(said.matches("it stays in the queue").count(), 2, "{said}");
    assert!(out.join("on T1").exists() && !out.join("on T2").exists(), "{said}");
    assert_eq!(place.ok(&["t0queue"]), format!("{away}\n{both}"));
    let (both, here) = (place.spool().job(&both).unwrap(), place.spool().job(&here).unwrap());
    assert!(here.is_archived() && !both.is_archived());
    assert!(both.dir().join("r1").exists() && both.dir().join("b0").exists());
    fs::rename(place.base.join("away.tap"), &image).unwrap();
    place.ok(&line);
    assert_eq!(fs::read(out.join("on T2")).unwrap(), b"T2");
    assert_eq!(place.ok(&["t0queue"]), "");
}

#[test]
fn relative_paths_are_of_who_gives_them() {
    let place = Place::new();
    for dir in ["a/data", "b/data"] {
        fs::create_dir_all(place.base.join(dir)).unwrap();
        fs::write(place.base.join(dir).join("f"), dir).unwrap();
    }
    let (a, b) = (place.base.join("a"), place.base.join("b"));
    let within = |dir: &Path, line: &[&str], input: &str| {
        let (code, said) = place.feed_in(dir, line, input);
        assert_eq!(code, 0, "{line:?}: {said}");
        said.trim_end().to_owned()
    };
    // A drive and its changer.
    fs::create_dir(a.join("drive")).unwrap();
    fs::create_dir(a.join("shelf")).unwrap();
    Image::create(&a.join("shelf/one.tap"), &Medium::default()).unwrap();
    within(&a, &["t0p", "init", "-d", "d0", "drive", "--changer", "shelf"], "");
    within(&b, &["t0load", "one"], "");
    within(&b, &["t0label", "-w", "T1"], "");
    // Root and receipt, of a new job and of one that is there.
    let one = within(&a, &["t0job", "-c", "-p", "root=data", "-p", "receipt=receipts"], "");
    let two = within(&b, &["t0job", "-c"], "");
    within(&a, &["t0job", "-p", "root=./data", "-p", "receipt=receipts", &two], "");
    for job in [&one, &two] {
        within(&a, &["t0job", "-a", job], "f\n");
        within(&a, &["t0queue", "-a", job], "");
    }
    within(&b, &["t0write", "-a"], "");
    let found = within(&b, &["t0find", a.join("data/f").to_str().unwrap()], "");
    assert_eq!(found.lines().count(), 2, "{found}");
    let receipts = fs::read_to_string(a.join("receipts")).unwrap();
    assert_eq!(receipts.matches("%receipt\n").count(), 2, "{receipts}");
    let out = place.base.join("out");
    fs::create_dir(&out).unwrap();
    within(&b, &["t0read", "-C", "../out", &one], "");
    assert_eq!(fs::read(out.join("f")).unwrap(), b"a/data");
    // One that somebody else has written into the job file.
    let job = within(&a, &["t0job", "-c", "-p", "root=data"], "");
    within(&a, &["t0job", "-a", &job], "f\n");
    let wjob = place.base.join("spool/job").join(&job).join("wjob");
    let text = fs::read_to_string(&wjob).unwrap();
    let root = format!("root {}", a.join("data").display());
    fs::write(&wjob, text.replace(&root, "root data")).unwrap();
    let (code, said) = place.feed_in(&b, &["t0write", &job], "");
    assert!(code == 2 && said.contains("its root data is relative to nothing"), "{code} {said}");
}

#[test]
fn what_is_only_tried_does_nothing_and_another_tape_is_refused() {
    let place = with_changer(&["T1", "T2"]);
    for label in ["T2", "T1"] {
        place.ok(&["t0load", label]);
        place.ok(&["t0label", "-w", label]);
    }
    fs::write(place.base.join("file"), "content").unwrap();
    let job = queued(&place, ".", "", "file\n");
    place.ok(&["t0write", "-a"]);
    let batch = format!("{job}/0");
    let spool = place.base.join("spool");
    let dead = place.ok(&["t0job", "-c"]);
    fs::create_dir(spool.join("job").join(&dead).join("@busy")).unwrap();
    // Nothing in the drive is moved or noted, which the times of its directory would tell.
    let changed = || fs::metadata(spool.join("drive/d0")).unwrap().modified().unwrap();
    let before = changed();
    for (line, said) in [
        (&["t0seek", "-n", "2"][..], "drive d0 would go to file 2"),
        (&["t0seek", "-n", "-1"], "drive d0 would go to -1 tape files from where it stands"),
        (&["t0seek", "-n", "-t", "T1", &batch], "drive d0 would go to file 1 of tape T1"),
        (&["t0scan", "-n"], "tape T1 would be looked at from file 0 on"),
        (&["t0ck", "-n"], "tape T1 would be read from its beginning to its end"),
        (&["t0read", "-n", "--file", "3"], "file 3 of tape T1"),
        (&["t0load", "-n"], "the tape that is in the drive would be noted"),
        (&["t0load", "-n", "T2"], "T2 would be loaded"),
        (&["t0eject", "-n"], "tape T1 would be given out"),
        (&["t0watch", "-n"], "idle T1"),
    ] {
        assert_eq!(place.ok(line), said, "{line:?}");
    }
    let said = place.ok(&["t0reset", "-n", "-t", "T1"]);
    assert!(said.starts_with(&format!("job {dead} would not be busy")), "{said}");
    assert_eq!(changed(), before);
    for verb in ["t0tell", "t0stat", "t0reset", "t0scan", "t0ck", "t0eject", "t0watch", "t0label"] {
        for dry in [&[][..], &["-n"]] {
            let line = [&[verb, "-t", "T2"], dry].concat();
            let said = place.fails(7, &line);
            assert!(said.contains("wanted is tape T2"), "{line:?}: {said}");
        }
        assert!(spool.join("job").join(&dead).join("@busy").exists(), "{verb}");
    }
    assert_eq!(place.code(&["t0seek", "-n", "-t", "T2", "1"]), 7);
    assert!(place.fails(7, &["t0load", "-t", "T2", "T1"]).ends_with("wanted is tape T2"));
    place.ok(&["t0load", "-t", "T1", "T1"]);
    for verb in ["t0tell", "t0stat", "t0reset", "t0eject"] {
        place.ok(&[verb, "-t", "T1"]);
    }
}

#[test]
fn a_receipt_that_cannot_be_written_is_told_before_anything_is() {
    let place = with_changer(&["T1"]);
    place.ok(&["t0load", "T1"]);
    // Scripts get labels as they are.
    let label = "a\\b";
    place.ok(&["t0label", "-w", label]);
    assert_eq!(place.ok(&["t0label"]), label);
    place.ok(&["t0label", "-k", &place.ok(&["t0label"])]);
    fs::write(place.base.join("file"), "content").unwrap();
    let job = queued(&place, ".", "", "file\n");
    let said = place.fails(1, &["t0write", "-a", "-y", "/no/such/file"]);
    assert!(said.contains("writing /no/such/file"), "{said}");
    assert_eq!(place.ok(&["t0job", "-l"]), format!("r w {job}"));
    assert_eq!(place.ok(&["t0scan"]).lines().count(), 1);
    // A pool names tapes that are still to come.
    fs::write(place.base.join("spool/pool/mine"), format!("T9\n{label}\n")).unwrap();
    assert_eq!(place.ok(&["t0tapes", "--pool", "mine"]), "unknown T9\nloaded a\\\\b");
}

/// What the drive of a place has in it.
fn inside(place: &Place) -> Option<PathBuf> {
    fs::read_link(place.base.join("drive/loaded")).ok()
}

#[test]
fn what_is_in_a_drive_stays_unless_the_wanted_tape_can_come() {
    let place = with_changer(&["one", "two"]);
    place.ok(&["t0load", "one"]);
    place.ok(&["t0label", "-w", "A"]);
    fs::write(place.base.join("file"), "content").unwrap();
    queued(&place, ".", "", "file\n");
    for line in [&["t0load", "TYPO"][..], &["t0write", "-a", "-t", "TYPO"]] {
        assert!(place.fails(7, line).contains("has no tape TYPO"));
        assert_eq!(inside(&place), Some(place.image("one")), "{line:?}");
        assert_eq!(place.ok(&["t0tapes"]), "loaded A");
    }
    assert_eq!(place.ok(&["t0load", "one"]), "tape A", "by its other name");
    place.ok(&["t0write", "-a", "-t", "A"]);
    // Without a changer, and nobody who could be asked.
    let place = Place::with_drive();
    place.ok(&["t0load", place.image("A").to_str().unwrap()]);
    place.ok(&["t0label", "-w", "T1"]);
    place.spool().add_tape(&Label::new("T2").unwrap()).unwrap();
    let said = place.fails(7, &["t0load", "T2"]);
    assert!(said.contains("tape T2 is not in drive d0, which has tape T1: put it in"), "{said}");
    assert_eq!(inside(&place), Some(place.image("A")));
    let other = place.base.join("other.tap");
    fs::write(&other, "no tape at all").unwrap();
    assert_ne!(place.code(&["t0load", other.to_str().unwrap()]), 0);
    assert_eq!(inside(&place), Some(place.image("A")));
    assert_eq!(place.ok(&["t0tapes"]), "loaded T1\noffline T2");
}

#[test]
fn another_tape_of_the_name_makes_room_for_the_right_one() {
    let place = with_changer(&["one", "two"]);
    let device = place.base.join("drive/loaded");
    for (barcode, created) in [("two", "created=8"), ("one", "created=7")] {
        place.ok(&["t0load", barcode]);
        place.ok(&["t0label", "-w", "-f", "-p", created, "T1"]);
    }
    place.ok(&["t0eject"]);
    std::os::unix::fs::symlink(place.image("two"), &device).unwrap();
    assert_eq!(place.ok(&["t0load", "T1"]), "tape T1");
    assert_eq!(inside(&place), Some(place.image("one")));
}

#[test]
fn an_image_that_does_not_open_is_taken_out() {
    let place = with_changer(&["one", "two"]);
    place.ok(&["t0load", "one"]);
    place.ok(&["t0label", "-w", "A"]);
    let away = place.base.join("away.tap");
    fs::rename(place.image("one"), &away).unwrap();
    let image = place.image("one").display().to_string();
    for verb in ["t0stat", "t0tell"] {
        assert!(place.fails(1, &[verb]).contains(&image), "{verb}");
    }
    assert_eq!(place.ok(&["t0load", "two"]), "a blank tape");
    assert_eq!(inside(&place), Some(place.image("two")));
    fs::write(place.base.join("shelf/two.tap.medium"), "capacity 99k\n").unwrap();
    let said = place.fails(5, &["t0load", "two"]);
    assert!(said.contains("two.tap.medium") && said.contains("t0eject"), "{said}");
    place.ok(&["t0eject"]);
    assert_eq!(inside(&place), None);
    fs::rename(&away, place.image("one")).unwrap();
    assert_eq!(place.ok(&["t0load", "A"]), "tape A");
    // Neither is it stuck where no changer is.
    let place = Place::with_drive();
    place.ok(&["t0load", place.image("A").to_str().unwrap()]);
    fs::remove_file(place.image("A")).unwrap();
    place.ok(&["t0load", place.image("B").to_str().unwrap()]);
    fs::remove_file(place.image("B")).unwrap();
    place.ok(&["t0eject"]);
    assert!(place.ok(&["t0stat"]).contains("no tape"));
}

#[test]
fn a_shelf_that_is_not_there_is_no_library() {
    let place = with_changer(&["one"]);
    fs::rename(place.base.join("shelf"), place.base.join("unmounted")).unwrap();
    let said = place.fails(1, &["t0load", "one"]);
    assert!(said.contains(place.base.join("shelf").to_str().unwrap()), "{said}");
    assert!(!said.contains("mtx"), "{said}");
    fs::write(place.base.join("shelf"), "").unwrap();
    let said = place.fails(2, &["t0load", "one"]);
    assert!(said.contains("is no device and no directory of images"), "{said}");
}
