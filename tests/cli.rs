//! The command line: exit codes, JSON, refusals, hostile targets.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::process::{Command, Stdio};

use rustix::fs::FlockOperation;
use serde_json::Value;

use crate::common::{RAIDTAPE, Sandbox, Tree, args, assert_same, data, errno, kill, run, wait_for};

/// A store with one run of two files.
fn small_store() -> Sandbox {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.source.join("dir")).unwrap();
    fs::write(sandbox.source.join("dir/file"), "in a directory").unwrap();
    fs::write(sandbox.source.join("top"), "at the top").unwrap();
    sandbox.backup();
    sandbox
}

#[test]
fn help_and_version_are_no_errors() {
    for line in [&["--help"][..], &["--version"], &["backup", "--help"], &["help", "mount"]] {
        let ran = run(Command::new(RAIDTAPE).args(line)).code(0);
        assert!(ran.text().contains("raidtape"), "{}", ran.text());
        assert_eq!(ran.errors(), "");
    }
}

/// Nothing new would be stored, but the run would leave no trace on any volume.
#[test]
fn a_run_without_any_volume_there_is_4() {
    let sandbox = small_store();
    fs::rename(sandbox.path("volume"), sandbox.path("away")).unwrap();
    let source = sandbox.source.to_str().unwrap().to_owned();
    let ran = sandbox.run(["backup", &source]).code(4);
    assert!(ran.errors().contains("volume"), "{}", ran.errors());
    fs::rename(sandbox.path("away"), sandbox.path("volume")).unwrap();
    sandbox.run(["backup", &source]).code(0);
}

#[test]
fn what_makes_no_sense_is_2() {
    let sandbox = small_store();
    for line in [
        &[][..],
        &["nonsense"],
        &["backup"],
        &["ls", "x"],
        &["backup", "/tmp", "--max-workers", "0"],
        &["ls", "1", "../top"],
        &["restore", "../top", "out"],
        &["backup", "/", "--exclude", "a[z-a"],
        &["add-volume", "other", "--reserve", "100"],
    ] {
        let ran = sandbox.run(line).code(2);
        assert!(!ran.errors().is_empty(), "{line:?}");
    }
    let new = sandbox.path("new");
    for options in [
        &["--hash-algo", "md5"][..],
        &["--chunking", "none"],
        &["--chunk-size", "1"],
        &["--compression", "gzip"],
        &["--block-size", "1KiB"],
        &["--block-size", "2GiB"],
        &["--chunk-size", "4MiB", "--block-size", "1MiB"],
        &["--reserve", "100"],
    ] {
        run(Command::new(RAIDTAPE).arg("--catalog").arg(&new).arg("init").args(options)).code(2);
        assert!(!new.exists(), "{options:?}");
    }
    run(Command::new(RAIDTAPE).arg("runs").env_remove("RAIDTAPE_CATALOG")).code(2);
    run(Command::new(RAIDTAPE).arg("runs").arg("--catalog").arg(&sandbox.source)).code(2);
}

#[test]
fn the_catalog_may_be_named_by_the_environment() {
    let sandbox = small_store();
    let name = sandbox.catalog.file_name().unwrap();
    let mut command = Command::new(RAIDTAPE);
    command.arg("runs").env("RAIDTAPE_CATALOG", name).current_dir(sandbox.path(""));
    assert_eq!(run(&mut command).code(0).text().lines().count(), 2);
}

#[test]
fn what_exists_is_not_made_again() {
    let sandbox = small_store();
    let before = fs::read(&sandbox.catalog).unwrap();
    sandbox.run(["init"]).code(2);
    sandbox.run(args!["add-volume", &sandbox.path("volume")]).code(2);
    // Another catalog's volume neither.
    let other = sandbox.path("other");
    let at_other =
        |line: &[&str]| run(Command::new(RAIDTAPE).arg("--catalog").arg(&other).args(line));
    at_other(&["init"]).code(0);
    at_other(&["add-volume", sandbox.path("volume").to_str().unwrap()]).code(2);
    fs::write(sandbox.path("a file"), "x").unwrap();
    let catalog = sandbox.path("a file");
    run(Command::new(RAIDTAPE).arg("--catalog").arg(&catalog).arg("init")).code(2);
    assert_eq!(fs::read(&catalog).unwrap(), b"x");
    assert_eq!(fs::read(&sandbox.catalog).unwrap(), before);
    sandbox.assert_valid();
}

#[test]
fn what_is_not_there_is_1_or_10() {
    let sandbox = small_store();
    let out = sandbox.path("out");
    for line in [
        &args!["ls", "2"][..],
        &args!["ls", "1", "none"],
        &args!["list-changes", "7"],
        &args!["revert-to-run", "7", &out],
        &args!["restore", "none", &out],
        &args!["restore", "top", &out, "--run", "2"],
        &args!["backup", "/there/is/nothing"],
        &args!["umount", &sandbox.source],
    ] {
        sandbox.run(line).code(1);
    }
    assert!(!out.exists());
    let none = sandbox.path("none");
    for line in [
        &["runs"][..],
        &["volumes"],
        &["ls", "1"],
        &["list-changes", "1"],
        &["validate"],
        &["backup", "/usr"],
        &["restore", "top", "out"],
        &["revert-to-run", "1", "out"],
        &["restore-folder", "dir", "out"],
        &["add-volume", "volume"],
        &["mount", "."],
    ] {
        let mut command = Command::new(RAIDTAPE);
        command.arg("--catalog").arg(&none).args(line).current_dir(sandbox.path(""));
        let ran = run(&mut command).code(10);
        assert!(ran.errors().contains("init"), "{}", ran.errors());
        assert!(!none.exists());
    }
}

#[test]
fn a_volume_that_is_away_is_4() {
    let sandbox = small_store();
    let second = sandbox.add_volume("second");
    let (volume, away) = (sandbox.path("volume"), sandbox.path("away"));
    let mount = sandbox.mount();
    fs::rename(&volume, &away).unwrap();
    let out = sandbox.path("out");
    let ran = sandbox.run(["validate", "--json"]).code(4);
    let report = ran.json();
    assert_eq!(report["bad_blocks"][0]["kind"], "offline", "{report}");
    for line in [
        &args!["restore", "top", &out][..],
        &args!["restore-folder", "dir", &out],
        &args!["revert-to-run", "1", &sandbox.path("reverted")],
    ] {
        let ran = sandbox.run(line).code(4);
        let errors = ran.errors();
        assert!(errors.contains(volume.to_str().unwrap()), "the volume is not named: {errors}");
    }
    // What needs no block still works, the mount says that it cannot read, and a run goes on.
    sandbox.ok(["runs"]);
    sandbox.ok(["ls", "1"]);
    let fresh = sandbox.mount();
    assert_eq!(errno(fs::read(fresh.run(1).join("top"))), libc::EIO);
    let volumes = sandbox.ok(["volumes", "--json"]).json();
    assert_eq!(
        (&volumes[0]["status"], &volumes[1]["status"]),
        (&"missing".into(), &"active".into())
    );
    data::noise_file(&sandbox.source.join("new"), 130, 100_000);
    sandbox.backup();
    assert!(!sandbox.blocks("second").is_empty());
    // Another volume in its place is not taken for it.
    fs::rename(&second, &volume).unwrap();
    sandbox.run(["validate"]).code(4);
    fs::rename(&volume, &second).unwrap();
    fs::rename(&away, &volume).unwrap();
    sandbox.assert_valid();
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&sandbox.revert(2, "back")));
    drop(mount);
    let again = sandbox.mount();
    assert_eq!(fs::read(again.run(1).join("top")).unwrap(), b"at the top");
}

#[test]
fn later_formats_are_8_and_left_alone() {
    let sandbox = small_store();
    // The schema's version stands in the header of a SQLite file, from byte 60.
    let file = File::options().read(true).write(true).open(&sandbox.catalog).unwrap();
    let mut version = [0; 4];
    file.read_exact_at(&mut version, 60).unwrap();
    let later = (u32::from_be_bytes(version) + 1).to_be_bytes();
    file.write_all_at(&later, 60).unwrap();
    let before = fs::read(&sandbox.catalog).unwrap();
    let out = sandbox.path("out");
    for line in [
        &args!["runs"][..],
        &args!["volumes"],
        &args!["validate"],
        &args!["ls", "1"],
        &args!["backup", &sandbox.source],
        &args!["add-volume", &sandbox.path("more")],
        &args!["restore", "top", &out],
        &args!["revert-to-run", "1", &out],
    ] {
        let ran = sandbox.run(line).code(8);
        assert!(ran.errors().contains("version"), "{}", ran.errors());
    }
    fs::create_dir(sandbox.path("point")).unwrap();
    sandbox.run(args!["mount", &sandbox.path("point")]).code(8);
    assert_eq!(fs::read(&sandbox.catalog).unwrap(), before);
    file.write_all_at(&version, 60).unwrap();
    sandbox.assert_valid();
}

#[test]
fn a_volume_of_a_later_format_is_not_written_to() {
    let sandbox = small_store();
    let manifest = sandbox.path("volume/.rt_volume_manifest");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("format=1", "format=2")).unwrap();
    let blocks = sandbox.stored("volume");
    data::noise_file(&sandbox.source.join("new"), 131, 100_000);
    let ran = sandbox.run(args!["backup", &sandbox.source]);
    assert!(ran.errors().contains("format"), "{}", ran.errors());
    ran.code(8);
    assert_eq!(sandbox.stored("volume"), blocks);
    sandbox.run(["validate"]).code(8);
}

#[test]
fn one_writer_at_a_time() {
    let sandbox = small_store();
    let mut lock = sandbox.catalog.clone().into_os_string();
    lock.push(".lock");
    let lock = File::options().read(true).write(true).create(true).truncate(false).open(lock);
    let lock = lock.unwrap();
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
    let more = sandbox.path("more");
    for line in [&args!["backup", &sandbox.source][..], &args!["add-volume", &more]] {
        sandbox.run(line).code(11);
    }
    assert!(!more.join(".rt_volume_manifest").exists());
    // Who reads does not wait.
    for line in [&["runs"][..], &["ls", "1"], &["validate"], &["volumes"]] {
        sandbox.ok(line);
    }
    sandbox.revert(1, "out");
    rustix::fs::flock(&lock, FlockOperation::Unlock).unwrap();
    sandbox.backup();
}

/// Starts a backup of something large, and waits until it is at work.
fn long_backup(sandbox: &Sandbox) -> std::process::Child {
    data::noise_file(&sandbox.source.join("large"), 132, 200 << 20);
    let mut command = sandbox.program();
    command.arg("backup").arg(&sandbox.source);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let tmp = sandbox.path("volume/tmp");
    wait_for("a block to be written", || {
        fs::read_dir(&tmp).unwrap().flatten().any(|it| it.metadata().is_ok_and(|it| it.len() > 0))
    });
    child
}

#[test]
fn a_second_backup_is_refused_while_one_runs() {
    let sandbox = small_store();
    let child = long_backup(&sandbox);
    // It stands still for as long as the other one waits.
    kill(child.id(), rustix::process::Signal::STOP);
    let ran = sandbox.run(args!["backup", &sandbox.source]);
    let runs = sandbox.run(["runs"]);
    kill(child.id(), rustix::process::Signal::CONT);
    let ran = ran.code(11);
    assert!(ran.errors().contains(&child.id().to_string()), "{}", ran.errors());
    runs.code(0);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(sandbox.ok(["runs", "--json"]).json().as_array().unwrap().len(), 2);
}

#[test]
fn an_interrupted_backup_is_130_and_leaves_nothing() {
    for signal in [rustix::process::Signal::INT, rustix::process::Signal::TERM] {
        let sandbox = small_store();
        let child = long_backup(&sandbox);
        kill(child.id(), signal);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{signal:?} {output:?}");
        assert_eq!(fs::read_dir(sandbox.path("volume/tmp")).unwrap().count(), 0);
        assert_eq!(sandbox.ok(["runs", "--json"]).json().as_array().unwrap().len(), 1);
        sandbox.assert_valid();
        sandbox.backup();
        assert_same(&Tree::of(&sandbox.source), &Tree::of(&sandbox.revert(2, "out")));
    }
}

#[test]
fn json_is_json() {
    let sandbox = small_store();
    symlink("top", sandbox.source.join("link")).unwrap();
    let said = sandbox.backup();
    for key in ["run", "added", "modified", "deleted", "unchanged", "files", "bytes"] {
        assert!(said[key].is_u64(), "{key} in {said}");
    }
    let runs = sandbox.ok(["runs", "--json"]).json();
    assert_eq!(runs[1]["run"], 2);
    assert_eq!(runs[1]["path"], sandbox.source.to_str().unwrap());
    let volumes = sandbox.ok(["volumes", "--json"]).json();
    assert_eq!(volumes[0]["blocks"], sandbox.blocks("volume").len());
    assert_eq!(volumes[0]["stored_bytes"], sandbox.stored("volume"));
    let listed = sandbox.ok(["ls", "2", "--json"]).json_lines();
    let paths: Vec<&Value> = listed.iter().map(|it| &it["path"]).collect();
    assert_eq!(paths, ["dir", "link", "top"]);
    assert_eq!(listed[1]["target"], "top");
    let hash = blake3::hash(b"at the top").to_hex().to_string();
    assert_eq!(listed[2]["hash"], hash);
    assert_eq!(
        listed[2]["mode"],
        format!(
            "{:04o}",
            0o7777 & {
                std::os::unix::fs::MetadataExt::mode(
                    &fs::metadata(sandbox.source.join("top")).unwrap(),
                )
            }
        )
    );
    let below = sandbox.ok(["ls", "1", "dir", "--json"]).json_lines();
    assert_eq!((below.len(), &below[0]["path"]), (1, &"dir/file".into()));
    let changed = sandbox.ok(["list-changes", "2", "--json"]).json_lines();
    assert_eq!(changed.len(), 2, "{changed:?}");
    assert_eq!(sandbox.ok(["validate", "--json"]).json()["clean"], true);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let sandbox = Sandbox::new();
    for number in 0..3_000 {
        fs::write(sandbox.source.join(format!("a rather long name {number}")), "").unwrap();
    }
    sandbox.backup();
    let line = "\"$1\" --catalog \"$2\" ls 1 | head -n 1; exit ${PIPESTATUS[0]}";
    let mut command = Command::new("bash");
    let ran = run(command.args(["-c", line, "bash", RAIDTAPE]).arg(&sandbox.catalog)).code(0);
    assert_eq!(ran.errors(), "");
}

#[test]
fn a_whole_run_goes_only_into_an_empty_directory() {
    let sandbox = small_store();
    let dest = sandbox.path("dest");
    fs::create_dir(&dest).unwrap();
    fs::write(dest.join("mine"), "x").unwrap();
    sandbox.run(args!["revert-to-run", "1", &dest]).code(2);
    assert_eq!(fs::read_dir(&dest).unwrap().count(), 1);
    fs::remove_file(dest.join("mine")).unwrap();
    sandbox.ok(args!["revert-to-run", "1", &dest]);
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&dest));
    let file = sandbox.path("file");
    fs::write(&file, "x").unwrap();
    assert!(sandbox.run(args!["revert-to-run", "1", &file]).code(1).errors().contains("file"));
}

#[test]
fn planted_links_lead_nowhere() {
    let sandbox = small_store();
    let (victim, victims) = (sandbox.path("victim"), sandbox.path("victims"));
    let planted = |dest: &std::path::Path| {
        fs::write(&victim, "mine").unwrap();
        let _ = fs::remove_dir_all(&victims);
        fs::create_dir(&victims).unwrap();
        fs::create_dir(dest).unwrap();
        symlink(&victim, dest.join("top")).unwrap();
        symlink(&victims, dest.join("dir")).unwrap();
    };
    let untouched = || {
        assert_eq!(fs::read_to_string(&victim).unwrap(), "mine");
        assert_eq!(fs::read_dir(&victims).unwrap().count(), 0);
    };
    let dest = sandbox.path("folder");
    planted(&dest);
    sandbox.ok(args!["restore-folder", &sandbox.source, &dest]);
    untouched();
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&dest));
    // One file, in place of a link and into a directory that holds one.
    let dest = sandbox.path("one");
    planted(&dest);
    sandbox.ok(args!["restore", "top", &dest.join("top")]);
    untouched();
    assert_eq!(fs::read_link(dest.join("top")).ok(), None);
    assert_eq!(fs::read_to_string(dest.join("top")).unwrap(), "at the top");
    let dest = sandbox.path("into");
    planted(&dest);
    sandbox.ok(args!["restore", "top", &dest]);
    untouched();
    // A hard link is no way either.
    let dest = sandbox.path("linked");
    fs::create_dir(&dest).unwrap();
    fs::hard_link(&victim, dest.join("top")).unwrap();
    sandbox.ok(args!["restore-folder", &sandbox.source, &dest]);
    untouched();
}

#[test]
fn what_is_in_the_way_gives_way_but_no_directory_does() {
    let sandbox = small_store();
    let dest = sandbox.path("dest");
    fs::create_dir_all(dest.join("top/mine")).unwrap();
    fs::write(dest.join("dir"), "a file where a directory goes").unwrap();
    // A directory is never removed for a file: that entry is a problem, the rest is done.
    let ran = sandbox.run(args!["restore-folder", &sandbox.source, &dest]).code(3);
    assert!(ran.errors().contains("top"), "{}", ran.errors());
    assert!(dest.join("top/mine").is_dir());
    assert_eq!(fs::read(dest.join("dir/file")).unwrap(), b"in a directory");
}
