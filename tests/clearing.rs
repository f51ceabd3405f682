//! `ingest --clear`: what a run has stored goes, and nothing else ever does.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::common::{Mount, Sandbox, Tree, assert_same, data, tool, wait_for};

/// Writes a line to the control file, waits for the job and gives its last words and its log.
pub fn job(mount: &Mount, line: &str) -> (Value, String) {
    let mut control = OpenOptions::new().read(true).write(true).open(mount.ctl("backup")).unwrap();
    control.write_all(format!("{line}\n").as_bytes()).unwrap();
    // The answer is in the job's status.
    let _ = control.sync_all();
    let mut text = String::new();
    control.seek(SeekFrom::Start(0)).unwrap();
    control.read_to_string(&mut text).unwrap();
    let id = text.lines().next().and_then(|it| it.strip_prefix("job ")).unwrap().parse().unwrap();
    let log = fs::read_to_string(mount.ctl(&format!("jobs/{id}/log"))).unwrap();
    let said = mount.wait_for_job(id);
    assert_eq!(said["state"], "done", "{said} {log}");
    (said, log)
}

fn names(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|it| it.unwrap().file_name());
    let mut names: Vec<String> = names.map(|it| it.to_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

#[test]
fn what_is_stored_goes_and_comes_back_by_cp() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 80, 60);
    fs::hard_link(sandbox.source.join("d0/e0/f0"), sandbox.source.join("second name")).unwrap();
    std::os::unix::fs::symlink("nowhere", sandbox.source.join("link")).unwrap();
    tool("mkfifo", [sandbox.source.join("fifo")]);
    fs::create_dir(sandbox.source.join("empty")).unwrap();
    let source = Tree::of(&sandbox.source);
    let mount = sandbox.mount();
    let inside = mount.point.join("ingest");
    tool("cp", [OsStr::new("-a"), sandbox.source.as_os_str(), inside.join("tree").as_os_str()]);
    // Known to the kernel, which has to forget them.
    assert_same(&source, &Tree::of(&inside.join("tree")));
    let (said, log) = job(&mount, "ingest --clear --tag fed");
    assert!(said["stayed"] == 0 && !log.contains("stay"), "{said} {log}");
    assert_eq!(said["cleared"].as_u64(), Some(source.0.len() as u64), "{said}");
    assert!(names(&inside).is_empty());
    assert!(fs::symlink_metadata(inside.join("tree")).is_err());
    assert_same(&source, &Tree::of(&mount.run(1).join("tree")));
    // Again: there is nothing, and the place is free.
    tool("cp", [OsStr::new("-a"), mount.run(1).join("tree").as_os_str(), inside.as_os_str()]);
    assert_same(&source, &Tree::of(&inside.join("tree")));
    let (said, _) = job(&mount, "ingest");
    assert!(said["cleared"].is_null());
    assert_same(&source, &Tree::of(&inside.join("tree")));
    mount.end();
    sandbox.assert_valid();
}

#[test]
fn what_somebody_has_open_for_writing_stays() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let at = |name: &str| mount.point.join("ingest").join(name);
    fs::create_dir(at("d")).unwrap();
    for name in ["d/open", "d/closed", "read"] {
        fs::write(at(name), "text").unwrap();
    }
    let open = OpenOptions::new().write(true).open(at("d/open")).unwrap();
    let mut read = File::open(at("read")).unwrap();
    let (said, log) = job(&mount, "ingest --clear");
    assert_eq!((&said["cleared"], &said["stayed"]), (&2.into(), &1.into()), "{said} {log}");
    assert!(log.contains("d/open stays: "), "{log}");
    assert_eq!((names(&at("")), names(&at("d"))), (vec!["d".to_owned()], vec!["open".to_owned()]));
    // Who was reading reads on.
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(text, "text");
    open.write_all_at(b"more", 4).unwrap();
    drop(open);
    assert_eq!(fs::read(at("d/open")).unwrap(), b"textmore");
    // The directory has changed since that run, not since this one.
    let (said, log) = job(&mount, "ingest --clear");
    assert_eq!((&said["cleared"], &said["stayed"]), (&2.into(), &0.into()), "{said} {log}");
    assert_eq!(fs::read(mount.run(2).join("d/open")).unwrap(), b"textmore");
}

#[test]
fn what_the_run_does_not_have_stays() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let at = |name: &str| mount.point.join("ingest").join(name);
    fs::create_dir_all(at("d/e")).unwrap();
    for name in ["d/e/keep.o", "d/e/take", "d/take", "linked"] {
        fs::write(at(name), name).unwrap();
    }
    fs::hard_link(at("linked"), at("second")).unwrap();
    fs::hard_link(at("linked"), at("d/third.o")).unwrap();
    let (said, log) = job(&mount, "ingest --clear --exclude '*.o'");
    // A name of the file stays, because the run does not have that.
    assert_eq!((&said["cleared"], &said["stayed"]), (&4.into(), &2.into()), "{said} {log}");
    for dir in ["d/e", "d"] {
        assert!(log.contains(&format!(" {dir}: 1 entry that is not in the run stay")), "{log}");
    }
    assert_eq!(
        (names(&at("")), names(&at("d"))),
        (vec!["d".into()], vec!["e".into(), "third.o".into()])
    );
    assert_eq!(fs::read(at("d/third.o")).unwrap(), b"linked");
    assert_eq!(fs::read(mount.run(1).join("second")).unwrap(), b"linked");

    // No other source is ever changed.
    let source = sandbox.source.to_str().unwrap();
    let mut control = OpenOptions::new().write(true).open(mount.ctl("backup")).unwrap();
    let refused = control.write_all(format!("{source} --clear\n").as_bytes());
    assert_eq!(crate::common::errno(refused), 22);
}

/// What a file of a racing writer says in the end, and what it may have said before.
fn line(name: &str, step: u64) -> String {
    format!("{name} at step {step:08}\n")
}

#[test]
fn writers_that_race_lose_nothing() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let inside = mount.point.join("ingest");
    let done = AtomicBool::new(false);
    let runs = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|writer| {
                let (inside, done) = (&inside, &done);
                scope.spawn(move || write_until(inside, writer, done))
            })
            .collect();
        // The writers must end even if something fails here.
        let cleared = std::panic::catch_unwind(|| {
            let clear = |_| job(&mount, "ingest --clear").0["cleared"].as_u64().unwrap();
            (0..12).map(clear).sum::<u64>()
        });
        done.store(true, Ordering::Relaxed);
        let last: BTreeMap<String, Option<String>> =
            writers.into_iter().flat_map(|it| it.join().unwrap()).collect();
        let cleared = cleared.unwrap_or_else(|e| std::panic::resume_unwind(e));
        assert!(cleared > 0);
        last
    });
    job(&mount, "ingest");
    let all: Vec<String> = names(&mount.point.join("snapshots"));
    for (name, text) in runs {
        let Some(text) = text else {
            assert!(!inside.join(&name).exists(), "{name} was removed");
            continue;
        };
        let is_there = |dir: &Path| fs::read(dir.join(&name)).is_ok_and(|it| it == text.as_bytes());
        let found = all.iter().any(|run| is_there(&mount.point.join("snapshots").join(run)));
        assert!(found, "{name} is in no run as it was left: {text}");
        // What is there is the last state of it.
        assert!(is_there(&inside) || !inside.join(&name).exists(), "{name} is an old one");
    }
    mount.end();
    sandbox.assert_valid();
}

/// Changes files in all the ways there are; what each of them holds in the end.
fn write_until(dir: &Path, writer: u64, done: &AtomicBool) -> BTreeMap<String, Option<String>> {
    let mut seeded = data::Seeded::new(writer);
    let mut last: BTreeMap<String, Option<String>> = BTreeMap::new();
    let mut step = 0;
    while !done.load(Ordering::Relaxed) || step < 200 {
        step += 1;
        let name = format!("w{writer}-{}", seeded.below(8));
        let (path, text) = (dir.join(&name), line(&name, step));
        match seeded.below(6) {
            // A new file, or a new content.
            0 => fs::write(&path, &text).unwrap(),
            // In place: size and name stay.
            1 | 2 => match OpenOptions::new().write(true).open(&path) {
                Ok(file) => file.write_all_at(text.as_bytes(), 0).unwrap(),
                Err(_) => continue,
            },
            // Complete beside, then into its place.
            3 => {
                let aside = dir.join(format!("{name}.new"));
                fs::write(&aside, &text).unwrap();
                if fs::rename(&aside, &path).is_err() {
                    // Taken away before it could be renamed: a run has it under that name.
                    continue;
                }
            }
            4 => {
                // Whoever has taken it has stored it as it was.
                let _ = fs::remove_file(&path);
                last.insert(name, None);
                continue;
            }
            _ => {
                let Ok(file) = OpenOptions::new().write(true).open(&path) else { continue };
                file.set_len(0).unwrap();
                file.write_all_at(text.as_bytes(), 0).unwrap();
                file.sync_all().unwrap();
            }
        }
        last.insert(name, Some(text));
    }
    last
}

#[test]
fn dying_in_the_middle_of_clearing_loses_nothing() {
    let sandbox = Sandbox::new();
    let mut mount = sandbox.mount();
    let inside = mount.point.join("ingest");
    let backing = sandbox.path("catalog.ingest");
    let count: u64 = 1500;
    for dir in 0..15 {
        fs::create_dir(inside.join(format!("d{dir}"))).unwrap();
        for name in 0..count / 15 {
            fs::write(inside.join(format!("d{dir}/{name}")), format!("{dir} {name}")).unwrap();
        }
    }
    let source = Tree::of(&inside);
    let mut control = OpenOptions::new().write(true).open(mount.ctl("backup")).unwrap();
    control.write_all(b"ingest --clear\n").unwrap();
    wait_for("the first directory to go", || fs::read_dir(&backing).unwrap().count() < 15);
    mount.kill();
    drop(control);
    let left = Tree::of(&backing);
    assert!(left.0.len() < source.0.len());
    crate::common::mount::detach(&mount.point);

    let mount = sandbox.mount();
    assert_same(&left, &Tree::of(&mount.point.join("ingest")));
    assert_same(&source, &Tree::of(&mount.run(1)));
    let (said, log) = job(&mount, "ingest --clear");
    assert_eq!(said["stayed"], 0, "{log}");
    assert!(names(&mount.point.join("ingest")).is_empty());
    sandbox.assert_valid();
}

#[test]
fn a_file_that_the_run_could_not_read_in_one_piece_stays() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let at = |name: &str| mount.point.join("ingest").join(name);
    data::noise_file(&at("large"), 81, 24 << 20);
    fs::write(at("still"), "text").unwrap();
    let done = AtomicBool::new(false);
    let said = std::thread::scope(|scope| {
        scope.spawn(|| {
            // Not open while nothing is written: only the times tell.
            let mut step = 0u64;
            while !done.load(Ordering::Relaxed) {
                let file = OpenOptions::new().write(true).open(at("large")).unwrap();
                file.write_all_at(&step.to_le_bytes(), step % (24 << 20)).unwrap();
                step += 4096;
            }
        });
        let said = std::panic::catch_unwind(|| job(&mount, "ingest --clear"));
        done.store(true, Ordering::Relaxed);
        said.unwrap_or_else(|e| std::panic::resume_unwind(e))
    });
    let (said, log) = said;
    assert_eq!(said["exit_code"], 3, "{said} {log}");
    assert!(log.contains("large: it changed while it was read"), "{log}");
    assert_eq!((&said["cleared"], &said["stayed"]), (&1.into(), &1.into()), "{said} {log}");
    assert_eq!(names(&at("")), ["large"]);
    let (said, log) = job(&mount, "ingest --clear");
    assert_eq!((&said["cleared"], &said["stayed"]), (&1.into(), &0.into()), "{said} {log}");
}

#[test]
fn what_a_process_from_before_has_mapped_or_open_is_not_lost() {
    // Past the mount, as somebody whose mount has died may still have it.
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let at = |name: &str| mount.point.join("ingest").join(name);
    fs::write(at("f"), "text").unwrap();
    let backing = sandbox.path("catalog.ingest");
    let writer = OpenOptions::new().write(true).open(backing.join("f")).unwrap();
    let (said, log) = job(&mount, "ingest --clear");
    assert_eq!((&said["cleared"], &said["stayed"]), (&0.into(), &1.into()), "{said} {log}");
    assert!(log.contains("f stays: it is open for writing\n"), "{log}");
    drop(writer);
    let (said, log) = job(&mount, "ingest --clear");
    assert_eq!((&said["cleared"], &said["stayed"]), (&1.into(), &0.into()), "{said} {log}");
}

#[test]
fn changes_of_anything_but_the_content_are_changes() {
    type Step = fn(&Path) -> std::io::Result<()>;
    let steps: [(&str, Step); 5] = [
        ("mode", |it| fs::set_permissions(it, PermissionsExt::from_mode(0o600))),
        ("size", |it| File::options().write(true).open(it)?.set_len(1)),
        ("time", |it| File::open(it)?.set_modified(std::time::UNIX_EPOCH)),
        ("name", |it| fs::rename(it, it.with_extension("new"))),
        ("attribute", |it| {
            let flags = rustix::fs::XattrFlags::empty();
            Ok(rustix::fs::setxattr(it, "user.k", b"v", flags)?)
        }),
    ];
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let at = |name: &str| mount.point.join("ingest").join(name);
    for (name, _) in &steps {
        fs::write(at(name), "text").unwrap();
    }
    fs::write(at("none"), "text").unwrap();
    // Takes long enough to be read that the others can be changed meanwhile.
    data::noise_file(&at("zlong"), 82, 48 << 20);
    let mut control = OpenOptions::new().read(true).write(true).open(mount.ctl("backup")).unwrap();
    control.write_all(b"ingest --clear\n").unwrap();
    wait_for("the run", || {
        let said = mount.job(1);
        said["files_done"].as_u64() > Some(0) || said["state"] == "done"
    });
    let changed = steps.iter().filter(|(name, step)| step(&at(name)).is_ok());
    let changed: Vec<&str> = changed.map(|it| it.0).collect();
    let said = mount.wait_for_job(1);
    assert_eq!(said["state"], "done", "{said}");
    for name in changed {
        let path = at(name);
        assert!(path.exists() || path.with_extension("new").exists(), "{name} went: {said}");
    }
    assert!(!at("none").exists());
}
