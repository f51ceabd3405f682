//! Restoring onto what is there: overwriting, deleting, parts, owners, hostile targets.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, RenameFlags, XattrFlags};
use serde_json::Value;

use crate::common::disk::Disk;
use crate::common::{
    NOBODY, Sandbox, Tree, args, assert_same, data, kill, need_root, number_from_env, path_of, run,
    tool, wait_for,
};

fn mode_of(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Restores the whole source of the newest run to `dest`; gives what was said.
fn restore(sandbox: &Sandbox, dest: &Path, options: &[&str]) -> Value {
    let mut line = args!["restore-folder", ".", dest, "--json"].to_vec();
    line.extend(options.iter().map(Into::into));
    sandbox.ok(line).json()
}

/// Sets the time of change of a file, `secs` after 1970.
fn set_time(path: &Path, secs: i64) {
    let time = rustix::fs::Timespec { tv_sec: secs, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, flags).unwrap();
}

/// Paths below a directory, sorted.
fn paths(dir: &Path) -> Vec<String> {
    Tree::of(dir).0.into_keys().map(|it| String::from_utf8(it).unwrap()).collect()
}

#[test]
fn a_run_is_meant_by_number_by_name_or_by_time() {
    let sandbox = Sandbox::new();
    let out = sandbox.path("out");
    for text in ["first", "second"] {
        fs::write(sandbox.source.join("file"), text).unwrap();
        sandbox.backup();
        std::thread::sleep(Duration::from_millis(20));
    }
    let other = sandbox.path("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("file"), "of another source").unwrap();
    sandbox.ok(args!["backup", &other]);
    let runs = sandbox.ok(["runs", "--json"]).json();
    let finished = |run: usize| runs[run - 1]["finished"].as_str().unwrap().to_owned();
    let expect = |wish: &str, path: &Path, text: &str| {
        sandbox.ok(args!["restore", path, &out, "--run", wish]);
        assert_eq!(read(&out), text, "--run {wish}");
    };
    let file = Path::new("file");
    expect("1", file, "first");
    expect("latest", file, "of another source");
    expect("latest", &sandbox.source.join("file"), "second");
    expect(&finished(1), file, "first");
    expect(&finished(2), file, "second");
    // No run of another source is meant by a path that names its own.
    expect(&finished(3), &sandbox.source.join("file"), "second");
    expect("2999-01-01", &sandbox.source.join("file"), "second");
    expect("2999-01-01T12:00", &other.join("file"), "of another source");
    let folder = sandbox.path("folder");
    sandbox.ok(args!["restore-folder", &sandbox.source, &folder, "--run", &finished(1)]);
    assert_eq!(read(&folder.join("file")), "first");
    let reverted = sandbox.path("reverted");
    sandbox.ok(args!["revert-to-run", &finished(2), &reverted]);
    assert_eq!(read(&reverted.join("file")), "second");
    sandbox.run(args!["restore", "file", &out, "--run", "1999-12-31"]).code(1);
    sandbox.run(args!["restore", "file", &out, "--run", "yesterday"]).code(2);
    sandbox.run(args!["restore", "file", &out, "--run", "9"]).code(1);
}

#[test]
fn parts_of_a_tree_are_chosen_by_patterns() {
    let sandbox = Sandbox::new();
    for name in ["a/b/x.rs", "a/b/x.o", "a/y.rs", "doc/z.md", "doc/deep/w.rs", "top.rs", "top.o"] {
        let path = sandbox.source.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name).unwrap();
    }
    fs::write(sandbox.source.join("a").join(OsStr::from_bytes(b"\xff.o")), "bytes").unwrap();
    set_mode(&sandbox.source.join("a/b"), 0o750);
    set_time(&sandbox.source.join("a/b"), 1_000_000);
    sandbox.backup();
    let restored = |name: &str, options: &[&str]| {
        let out = sandbox.path(name);
        restore(&sandbox, &out, options);
        paths(&out)
    };
    assert_eq!(
        restored("one", &["--include", "*.rs"]),
        ["", "a", "a/b", "a/b/x.rs", "a/y.rs", "doc", "doc/deep", "doc/deep/w.rs", "top.rs"]
    );
    // A directory on the way to what is wanted is as it was.
    let way = fs::metadata(sandbox.path("one/a/b")).unwrap();
    assert_eq!((way.mode() & 0o7777, way.mtime()), (0o750, 1_000_000));
    assert_eq!(
        restored("two", &["--exclude", "*.o", "--exclude", "/doc"]),
        ["", "a", "a/b", "a/b/x.rs", "a/y.rs", "top.rs"]
    );
    assert_eq!(
        restored("three", &["--include", "/a/b/", "--include", "*.md", "--exclude", "*.o"]),
        ["", "a", "a/b", "a/b/x.rs", "doc", "doc/z.md"]
    );
    // Patterns are for the path in the snapshot, whatever folder is restored.
    let out = sandbox.path("four");
    sandbox.ok(args!["restore-folder", "a/b", &out, "--include", "/a/b/*.o"]);
    assert_eq!(paths(&out), ["", "x.o"]);
    let ran = sandbox.run(args!["restore-folder", ".", &out, "--include", "{a"]).code(2);
    assert!(ran.errors().contains("{a"), "{}", ran.errors());
}

/// A tree with things of every kind, under names of every sort.
fn varied_tree(dir: &Path) {
    data::mixed_tree(dir, 401, 60);
    fs::create_dir_all(dir.join("closed/inner")).unwrap();
    fs::write(dir.join("closed/inner/file"), "behind a closed door").unwrap();
    fs::hard_link(dir.join("d0/e0/f0"), dir.join("linked")).unwrap();
    fs::hard_link(dir.join("d0/e0/f0"), dir.join("closed/linked too")).unwrap();
    symlink("d0", dir.join("link")).unwrap();
    symlink("nowhere", dir.join("closed/dangling")).unwrap();
    fs::write(dir.join(OsStr::from_bytes(b"\xff\xfe\n")), "bytes").unwrap();
    let sparse = File::create(dir.join("sparse")).unwrap();
    sparse.set_len(3 << 20).unwrap();
    sparse.write_all_at(&data::Seeded::new(402).noise(9_000), 1 << 20).unwrap();
    data::noise_file(&dir.join("large"), 403, 3 << 20);
    tool("mkfifo", args![&dir.join("fifo")]);
    set_mode(&dir.join("closed/inner"), 0o500);
    set_mode(&dir.join("closed"), 0o555);
}

#[test]
fn a_second_restore_finds_nothing_to_do() {
    let sandbox = Sandbox::new();
    varied_tree(&sandbox.source);
    sandbox.backup();
    let (source, out) = (Tree::of(&sandbox.source), sandbox.path("out"));
    let first = restore(&sandbox, &out, &["--verify"]);
    assert_same(&source, &Tree::of(&out));
    let files = source.0.values().filter(|it| it.kind == "file").count() as u64;
    // Two of them are further names of one.
    assert_eq!(first["verified"].as_u64().unwrap() + 2, files, "{first}");
    assert_eq!(first["unchanged"], 0);
    for overwrite in ["always", "if-changed"] {
        let again = restore(&sandbox, &out, &["--overwrite", overwrite, "--delete"]);
        assert_same(&source, &Tree::of(&out));
        let rewritten = again["entries"].as_u64().unwrap();
        // The file with three names is never written in place, and a FIFO is quickly made.
        assert!(rewritten <= if overwrite == "always" { 6 } else { 0 }, "{again}");
        assert_eq!(again["deleted"], 0);
    }
}

#[test]
fn a_dry_run_says_what_is_done_then_and_does_nothing() {
    let sandbox = Sandbox::new();
    varied_tree(&sandbox.source);
    sandbox.backup();
    let out = sandbox.path("out");
    let said = sandbox.ok(args!["restore-folder", ".", &out, "--dry-run"]).text();
    assert!(said.lines().any(|it| it == "+ d0/e0/f0"), "{said}");
    assert!(!out.exists());
    fs::create_dir_all(out.join("d0/mine")).unwrap();
    fs::create_dir_all(out.join("link")).unwrap();
    fs::write(out.join("d0/e0"), "a file where a directory goes").unwrap();
    fs::write(out.join("large"), "short").unwrap();
    fs::write(out.join("d0/mine/file"), "mine").unwrap();
    set_time(&out.join("large"), 2_000_000_000);
    set_time(&out.join("d0/e0"), 5);
    for overwrite in ["always", "if-changed", "if-newer"] {
        let before = Tree::of(&out);
        let line = ["restore-folder", ".", "out", "--delete", "--overwrite", overwrite, "--json"];
        let ran = sandbox.ok(line.iter().copied().chain(["--dry-run"]));
        assert_same(&before, &Tree::of(&out));
        let mut foretold = ran.json_lines();
        let summary = foretold.pop().unwrap();
        assert_eq!(summary["dry_run"], true);
        let would = |what: &str| -> BTreeSet<Vec<u8>> {
            let those = foretold.iter().filter(|it| it["would"] == what);
            those.map(|it| crate::common::name_of(it, "path")).collect()
        };
        let copy = sandbox.path(&format!("copy {overwrite}"));
        tool("cp", args!["-a", &out, &copy]);
        let copy_name = copy.to_str().unwrap();
        let line =
            ["restore-folder", ".", copy_name, "--delete", "--overwrite", overwrite, "--json"];
        let done = sandbox.ok(line).json();
        for key in ["entries", "dirs", "kept", "unchanged", "deleted"] {
            assert_eq!(summary[key], done[key], "{key} with {overwrite}");
        }
        let after = Tree::of(&copy);
        let made: BTreeSet<_> =
            after.0.keys().filter(|it| !before.0.contains_key(*it)).cloned().collect();
        let replaced = would("replace");
        let expected: BTreeSet<_> = would("create").into_iter().collect();
        assert_eq!(made, expected, "{overwrite}");
        let gone: BTreeSet<_> =
            before.0.keys().filter(|it| !after.0.contains_key(*it)).cloned().collect();
        // A link takes the place of a directory that goes.
        let mut deleted = would("delete");
        if overwrite != "if-newer" {
            assert!(deleted.remove(&b"link"[..]), "{overwrite}");
        }
        assert_eq!(deleted, gone, "{overwrite}");
        assert_eq!(replaced.contains(&b"large"[..]), overwrite != "if-newer");
    }
    let file = sandbox.ok(args!["restore", "large", &out, "--dry-run"]).text();
    assert!(file.starts_with("M large\nwould restore 1 entries"), "{file}");
    assert_eq!(read(&out.join("large")), "short");
}

#[test]
fn what_is_there_is_overwritten_as_it_was_asked_for() {
    let sandbox = Sandbox::new();
    let source = |name: &str| sandbox.source.join(name);
    for name in ["same", "edited", "sneaky", "newer", "older", "gone", "type"] {
        fs::write(source(name), "as backed up").unwrap();
        set_time(&source(name), 1_000_000);
    }
    sandbox.backup();
    // What is left of each in the target, after each way of overwriting.
    let cases: [(&str, &[&str]); 4] = [
        ("always", &[]),
        ("if-changed", &["sneaky"]),
        ("if-newer", &["sneaky", "edited", "newer", "type"]),
        ("never", &["sneaky", "edited", "newer", "older", "type"]),
    ];
    for (overwrite, stay) in cases {
        let out = sandbox.path(overwrite);
        restore(&sandbox, &out, &[]);
        let here = |name: &str| out.join(name);
        for (name, text, time) in [
            ("edited", "edited since", 1_000_000 + 7),
            ("sneaky", "AS BACKED UP", 1_000_000),
            ("newer", "changed later", 1_000_001),
            ("older", "changed earlier", 999_999),
        ] {
            fs::write(here(name), text).unwrap();
            set_time(&here(name), time);
        }
        fs::remove_file(here("gone")).unwrap();
        fs::remove_file(here("type")).unwrap();
        symlink("elsewhere", here("type")).unwrap();
        set_time(&here("type"), 2_000_000);
        let before = Tree::of(&out);
        let said = restore(&sandbox, &out, &["--overwrite", overwrite]);
        let (source, after) = (Tree::of(&sandbox.source), Tree::of(&out));
        for (path, node) in &after.0 {
            let name = std::str::from_utf8(path).unwrap();
            let expected = if stay.contains(&name) { &before } else { &source };
            let root_stays = name.is_empty() && overwrite == "never";
            assert!(root_stays || Some(node) == expected.0.get(path), "{name}, {overwrite}");
        }
        assert_eq!(after.0.len(), source.0.len());
        let kept = if overwrite == "if-changed" { 0 } else { stay.len() };
        // What is the same is kept too, where nothing is looked at.
        let same = usize::from(["if-newer", "never"].contains(&overwrite));
        assert_eq!(said["kept"].as_u64(), Some((kept + same) as u64), "{overwrite}: {said}");
    }
}

#[test]
fn only_parts_that_differ_are_written() {
    let sandbox = Sandbox::new();
    let name = "large";
    let size = 6 << 20;
    data::noise_file(&sandbox.source.join(name), 410, size);
    set_mode(&sandbox.source.join(name), 0o640);
    sandbox.backup();
    let (source, out) = (Tree::of(&sandbox.source), sandbox.path("out"));
    restore(&sandbox, &out, &[]);
    let here = out.join(name);
    let file = || File::options().write(true).open(&here).unwrap();
    let again = |most: u64, unchanged: u64| {
        let inode = fs::metadata(&here).unwrap().ino();
        let said = restore(&sandbox, &out, &["--verify"]);
        assert_same(&source, &Tree::of(&out));
        assert_eq!(said["unchanged"], unchanged, "{said}");
        let written = said["bytes_written"].as_u64().unwrap();
        assert!(written <= most && (written > 0 || most == 0), "{said}");
        assert_eq!(said["verified"], 1);
        inode == fs::metadata(&here).unwrap().ino()
    };
    // The time alone, or the mode alone, is not content.
    set_time(&here, 5);
    assert!(again(0, 0));
    set_mode(&here, 0o600);
    assert!(again(0, 0));
    assert!(again(0, 1));
    for at in [0, 1_234_567, size - 1] {
        file().write_all_at(b"\x00!", at).unwrap();
    }
    assert!(again(20_000, 0));
    file().set_len(size / 2).unwrap();
    assert!(again(size / 2 + 8_192, 0));
    file().write_all_at(b"more", size + 100).unwrap();
    // Only its length is too much.
    let said = restore(&sandbox, &out, &[]);
    assert_eq!((said["entries"].as_u64(), said["bytes_written"].as_u64()), (Some(1), Some(0)));
    assert_same(&source, &Tree::of(&out));
    // A further name outside of what is restored keeps what it has.
    let other = sandbox.path("other name");
    fs::hard_link(&here, &other).unwrap();
    file().write_all_at(b"both", 100).unwrap();
    let both = fs::read(&other).unwrap();
    assert!(!again(size, 0));
    assert!(fs::read(&other).unwrap() == both);
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1, "something was left behind");
}

#[test]
fn holes_are_made_again_in_what_is_there() {
    let sandbox = Sandbox::new();
    let size = (8 << 20) + 77;
    let file = File::create(sandbox.source.join("sparse")).unwrap();
    file.set_len(size).unwrap();
    let bytes = data::Seeded::new(411).noise(1 << 20);
    file.write_all_at(&bytes, 1 << 20).unwrap();
    file.write_all_at(&bytes, 5 << 20).unwrap();
    sandbox.backup();
    let (source, out) = (Tree::of(&sandbox.source), sandbox.path("out"));
    let blocks = |dir: &Path| fs::metadata(dir.join("sparse")).unwrap().blocks();
    restore(&sandbox, &out, &[]);
    let here = File::options().write(true).open(out.join("sparse")).unwrap();
    here.write_all_at(&bytes, 3 << 20).unwrap();
    here.write_all_at(b"somewhere", 0).unwrap();
    here.write_all_at(b"at the end", size - 10).unwrap();
    here.write_all_at(b"amid", (5 << 20) + 500).unwrap();
    assert!(blocks(&out) > blocks(&sandbox.source) + 1_500);
    let said = restore(&sandbox, &out, &[]);
    assert_same(&source, &Tree::of(&out));
    assert!(blocks(&out) <= blocks(&sandbox.source) + 16);
    assert!(said["bytes_written"].as_u64().unwrap() <= 8_192, "{said}");
}

#[test]
fn a_damaged_block_leaves_a_file_as_it_is() {
    let sandbox = Sandbox::with(&["--compression", "none"]);
    data::noise_file(&sandbox.source.join("large"), 412, 5 << 20);
    sandbox.backup();
    let out = sandbox.path("out");
    restore(&sandbox, &out, &[]);
    let here = File::options().write(true).open(out.join("large")).unwrap();
    here.write_all_at(b"at the front", 0).unwrap();
    let before = Tree::of(&out);
    let (block, len) = sandbox.blocks("volume").pop().unwrap();
    let mut bytes = fs::read(&block).unwrap();
    bytes[len as usize - 5] ^= 1;
    fs::write(&block, bytes).unwrap();
    let ran = sandbox.run(args!["restore", "large", &out]).code(5);
    assert!(ran.errors().contains("large: "), "{}", ran.errors());
    assert_same(&before, &Tree::of(&out));
}

#[test]
fn what_the_snapshot_does_not_have_is_deleted_and_nothing_else() {
    need_root("it mounts a directory on another");
    let sandbox = Sandbox::new();
    varied_tree(&sandbox.source);
    sandbox.backup();
    let (source, out) = (Tree::of(&sandbox.source), sandbox.path("out"));
    restore(&sandbox, &out, &[]);
    let outside = sandbox.path("outside");
    fs::create_dir_all(outside.join("deep")).unwrap();
    fs::write(outside.join("deep/file"), "mine").unwrap();
    let untouched = Tree::of(&outside);
    let here = |name: &str| out.join(name);
    fs::create_dir_all(here("extra/more/and more")).unwrap();
    fs::write(here("extra/more/file"), "x").unwrap();
    fs::write(here("d0/extra"), "x").unwrap();
    fs::write(here("d1").join(OsStr::from_bytes(b"\xfe extra")), "x").unwrap();
    symlink(&outside, here("extra/link")).unwrap();
    symlink(&outside, here("d2/link")).unwrap();
    fs::hard_link(outside.join("deep/file"), here("extra/hard")).unwrap();
    // Without the option nothing goes.
    let with_extras = paths_count(&out);
    restore(&sandbox, &out, &[]);
    assert_eq!(paths_count(&out), with_extras);
    let said = restore(&sandbox, &out, &["--delete"]);
    assert_eq!(said["deleted"], 9, "{said}");
    assert_same(&source, &Tree::of(&out));
    assert_same(&untouched, &Tree::of(&outside));

    // What is excluded stays, and the directories it is in.
    fs::create_dir_all(here("extra/sub")).unwrap();
    for name in ["extra/keep.txt", "extra/sub/keep.txt", "extra/sub/go", "keep.txt", "go"] {
        fs::write(here(name), "x").unwrap();
    }
    restore(&sandbox, &out, &["--delete", "--exclude", "keep.txt"]);
    let left: Vec<_> = paths_of(&out).difference(&paths_of(&sandbox.source)).cloned().collect();
    assert_eq!(
        left.iter().map(|it| String::from_utf8_lossy(it)).collect::<Vec<_>>(),
        ["extra", "extra/keep.txt", "extra/sub", "extra/sub/keep.txt", "keep.txt"]
    );
    // With patterns of what to include, nothing else goes.
    fs::write(here("go"), "x").unwrap();
    restore(&sandbox, &out, &["--delete", "--include", "/extra"]);
    assert!(here("go").exists() && !here("extra").exists());
    restore(&sandbox, &out, &["--delete"]);
    assert_same(&source, &Tree::of(&out));

    // A mounted directory is not gone into.
    fs::create_dir_all(here("extra/mounted")).unwrap();
    tool("mount", args!["--bind", &outside, &here("extra/mounted")]);
    let ran = sandbox.run(args!["restore-folder", ".", &out, "--delete"]);
    tool("umount", args![&here("extra/mounted")]);
    assert!(ran.code(3).errors().contains("extra/mounted: something is mounted there"));
    assert_same(&untouched, &Tree::of(&outside));
    restore(&sandbox, &out, &["--delete"]);
    assert_same(&source, &Tree::of(&out));
}

fn paths_of(dir: &Path) -> BTreeSet<Vec<u8>> {
    Tree::of(dir).0.into_keys().collect()
}

fn paths_count(dir: &Path) -> usize {
    paths_of(dir).len()
}

#[test]
fn what_a_run_could_not_read_is_not_deleted() {
    let sandbox = Sandbox::of_nobody();
    let at = |name: &str| sandbox.source.join(name);
    fs::create_dir(at("closed")).unwrap();
    for name in ["open", "secret", "closed/inside"] {
        fs::write(at(name), name).unwrap();
    }
    // A copy from the time when all could be read.
    let out = sandbox.path("out");
    tool("cp", args!["-a", &sandbox.source, &out]);
    if crate::common::is_root() {
        tool("chown", args!["-R", &NOBODY.to_string(), &out, &sandbox.source]);
    }
    fs::write(out.join("extra"), "x").unwrap();
    set_mode(&at("secret"), 0);
    set_mode(&at("closed"), 0);
    sandbox.run(args!["backup", &sandbox.source]).code(3);
    sandbox.ok(args!["restore-folder", ".", &out, "--delete"]);
    set_mode(&out.join("closed"), 0o700);
    assert_eq!(paths(&out), ["", "closed", "closed/inside", "open", "secret"]);
}

#[test]
fn the_store_itself_is_neither_deleted_nor_overwritten() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    fs::write(sandbox.source.join("catalog"), "not a catalog").unwrap();
    sandbox.backup();
    // The sandbox holds catalog, volume and source.
    let dest = sandbox.path(".");
    fs::write(dest.join("extra"), "x").unwrap();
    let ran = sandbox.run(args!["revert-to-run", "1", &dest, "--delete"]).code(3);
    let errors = ran.errors();
    for name in ["volume", "catalog"] {
        let line = format!("{name}: what is there belongs to the store itself");
        assert!(errors.contains(&line), "{errors}");
    }
    assert!(!dest.join("extra").exists() && !dest.join("source").exists());
    assert_eq!(read(&dest.join("file")), "x");
    sandbox.assert_valid();
    assert_eq!(paths(&sandbox.revert(1, "again")), ["", "catalog", "file"]);
}

#[test]
fn a_mount_on_a_directory_of_the_snapshot_keeps_what_is_in_it() {
    need_root("it mounts a directory on another");
    let sandbox = Sandbox::new();
    for name in ["data/inner/file", "data/in the way", "other/file"] {
        let path = sandbox.source.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name).unwrap();
    }
    sandbox.backup();
    let (out, outside) = (sandbox.path("out"), sandbox.path("outside"));
    restore(&sandbox, &out, &[]);
    let mine = ["mine", "inner/mine", "deep/mine", "in the way/mine"];
    for name in mine {
        fs::create_dir_all(outside.join(name).parent().unwrap()).unwrap();
        fs::write(outside.join(name), "mine").unwrap();
    }
    fs::write(out.join("other/extra"), "x").unwrap();
    tool("mount", args!["--bind", &outside, &out.join("data")]);
    let line = args!["restore-folder", ".", &out, "--delete"];
    let foretold = sandbox.run(line.iter().chain(&args!["--dry-run"]));
    let ran = sandbox.run(line);
    tool("umount", args![&out.join("data")]);
    assert!(!foretold.text().contains("mine"), "{}", foretold.text());
    assert!(ran.code(3).errors().contains("data/in the way: a directory that is not empty"));
    for name in mine {
        assert_eq!(read(&outside.join(name)), "mine", "{name}");
    }
    assert_eq!(read(&outside.join("inner/file")), "data/inner/file");
    assert!(!out.join("other/extra").exists());
}

#[test]
fn the_store_is_no_target_even_where_the_snapshot_has_such_a_directory() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    fs::create_dir(sandbox.source.join("volume")).unwrap();
    sandbox.backup();
    let volume = sandbox.path("volume");
    let before = Tree::of(&volume);
    for dest in [volume.clone(), volume.join("new/deep"), volume.join("new/../../volume")] {
        for options in [&["--delete"][..], &["--delete", "--dry-run"]] {
            let line = args!["restore-folder", ".", &dest].to_vec();
            let line = line.into_iter().chain(options.iter().map(Into::into));
            let ran = sandbox.run(line).code(2);
            assert!(ran.errors().contains("belongs to the store itself"), "{}", ran.errors());
            let _ = fs::remove_dir(volume.join("new"));
        }
    }
    sandbox.run(args!["restore", "file", &volume]).code(2);
    assert_same(&before.clone().without(|path, _| path.is_empty()), &{
        Tree::of(&volume).without(|path, _| path.is_empty())
    });
    let line = args!["revert-to-run", "1", &sandbox.path("."), "--delete"];
    for options in [&["--dry-run"][..], &[]] {
        let ran = sandbox.run(line.iter().cloned().chain(options.iter().map(Into::into))).code(3);
        let errors = ran.errors();
        assert!(errors.contains("volume: what is there belongs to the store"), "{errors}");
    }
    assert_eq!(read(&sandbox.path("file")), "x");
    sandbox.assert_valid();
}

#[test]
fn nothing_is_deleted_by_a_run_of_another_source() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    sandbox.backup();
    let out = sandbox.path("out");
    restore(&sandbox, &out, &["--delete"]);
    let other = sandbox.path("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("another"), "y").unwrap();
    sandbox.ok(args!["backup", &other]);
    for line in [
        args!["restore-folder", ".", &out, "--delete"].to_vec(),
        args!["restore-folder", ".", &out, "--delete", "--run", "latest"].to_vec(),
        args!["revert-to-run", "latest", &out, "--delete"].to_vec(),
    ] {
        let errors = sandbox.run(line).code(2).errors();
        assert!(errors.contains("name the run by its number"), "{errors}");
    }
    assert_eq!(paths(&out), ["", "file"]);
    sandbox.ok(args!["restore-folder", ".", &out, "--delete", "--dry-run"]);
    sandbox.ok(args!["restore-folder", &sandbox.source, &out, "--delete"]);
    sandbox.ok(args!["restore-folder", ".", &out, "--delete", "--run", "1"]);
    assert_eq!(paths(&out), ["", "file"]);
    sandbox.ok(args!["revert-to-run", "2", &out, "--delete"]);
    assert_eq!(paths(&out), ["", "another"]);
}

#[test]
fn a_directory_that_is_not_empty_is_only_deleted_on_request() {
    let sandbox = Sandbox::new();
    let source = |name: &str| sandbox.source.join(name);
    for name in ["file", "linked", "small/inside", "dir/file"] {
        fs::create_dir_all(source(name).parent().unwrap()).unwrap();
        fs::write(source(name), name).unwrap();
    }
    fs::hard_link(source("linked"), source("linked too")).unwrap();
    symlink("file", source("link")).unwrap();
    sandbox.backup();
    let (wanted, out) = (Tree::of(&sandbox.source), sandbox.path("out"));
    let in_the_way = ["file", "link", "linked", "linked too"];
    let prepare = || {
        let _ = fs::remove_dir_all(&out);
        for name in in_the_way {
            fs::create_dir_all(out.join(name).join("mine")).unwrap();
        }
        fs::write(out.join("small"), "a file where a directory goes").unwrap();
    };
    prepare();
    let ran = sandbox.run(args!["restore-folder", ".", &out]).code(3);
    for name in in_the_way {
        let line = format!("{name}: a directory that is not empty is in the way");
        assert!(ran.errors().contains(&line), "{}", ran.errors());
        assert!(out.join(name).join("mine").is_dir());
    }
    assert_eq!(read(&out.join("small/inside")), "small/inside");
    assert_eq!(read(&out.join("dir/file")), "dir/file");
    assert!(!paths(&out).iter().any(|it| it.contains(".raidtape")), "{:?}", paths(&out));
    // An empty one is in nobody's way.
    prepare();
    for name in in_the_way {
        fs::remove_dir(out.join(name).join("mine")).unwrap();
    }
    restore(&sandbox, &out, &[]);
    assert_same(&wanted, &Tree::of(&out));
    prepare();
    restore(&sandbox, &out, &["--delete"]);
    assert_same(&wanted, &Tree::of(&out));
    // What has to stay is told.
    prepare();
    let line = args!["restore-folder", ".", &out, "--overwrite", "never"];
    let ran = sandbox.run(line).code(3);
    assert!(ran.errors().contains("small: something that is no directory"), "{}", ran.errors());
    assert_eq!(read(&out.join("small")), "a file where a directory goes");
}

#[test]
fn reading_back_finds_what_is_not_as_written() {
    let sandbox = Sandbox::new();
    data::noise_file(&sandbox.source.join("large"), 420, 32 << 20);
    sandbox.backup();
    let out = sandbox.path("out");
    let done = AtomicBool::new(false);
    let ran = std::thread::scope(|scope| {
        let spoil = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if let Ok(file) = File::options().write(true).open(out.join("large")) {
                    let _ = file.write_all_at(b"spoilt", 1000);
                }
            }
        });
        let ran = sandbox.run(args!["restore-folder", ".", &out, "--verify"]);
        done.store(true, Ordering::Relaxed);
        spoil.join().unwrap();
        ran
    });
    let errors = ran.code(3).errors();
    assert!(errors.contains("large: reads back other than it was written"), "{errors}");
    let said = restore(&sandbox, &out, &["--verify"]);
    assert_eq!(said["verified"], 1);
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&out));
}

#[test]
fn owners_go_by_name_by_number_or_not_at_all() {
    need_root("it gives files away");
    let sandbox = Sandbox::new();
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    // Somebody whom every Debian has, with another number here and on the other machine.
    let line = passwd.lines().find(|it| it.starts_with("games:")).expect("user games");
    let uid: u32 = line.split(':').nth(2).unwrap().parse().unwrap();
    let other = passwd.replace(line, "games:x:4321:4321::/:/bin/false");
    let other_passwd = sandbox.path("passwd");
    fs::write(&other_passwd, other).unwrap();
    let at = |name: &str| sandbox.source.join(name);
    for (name, owner) in [("known", uid), ("unknown", 76_543)] {
        fs::write(at(name), name).unwrap();
        chown(at(name), Some(owner), Some(owner)).unwrap();
        set_mode(&at(name), 0o6755);
    }
    symlink("known", at("link")).unwrap();
    std::os::unix::fs::lchown(at("link"), Some(uid), None).unwrap();
    sandbox.backup();
    let source = Tree::of(&sandbox.source);
    let restored = |name: &str, option: Option<&str>| {
        let out = sandbox.path(name);
        // In a view of the system of its own, in which that user has another number.
        let script = "mount --bind \"$1\" /etc/passwd && shift && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", script, "sh"]).arg(&other_passwd);
        command.arg(crate::common::RAIDTAPE).arg("--catalog").arg(&sandbox.catalog);
        run(command.args(["revert-to-run", "1"]).arg(&out).args(option)).code(0);
        out
    };
    let owner = |path: &Path| {
        let it = fs::symlink_metadata(path).unwrap();
        (it.uid(), it.gid(), it.mode() & 0o7777)
    };
    crate::common::need_tool("unshare");
    let out = restored("by name", None);
    assert_eq!(owner(&out.join("known")), (4321, uid, 0o6755));
    assert_eq!(owner(&out.join("unknown")), (76_543, 76_543, 0o6755));
    assert_eq!(owner(&out.join("link")).0, 4321);
    assert_same(&source, &Tree::of(&restored("by number", Some("--numeric-owner"))));
    let out = restored("not at all", Some("--no-owner"));
    assert_eq!(owner(&out.join("known")), (0, 0, 0o755));
    assert_eq!(owner(&out.join("unknown")), (0, 0, 0o755));
    let line = args!["revert-to-run", "1", "x", "--no-owner", "--numeric-owner"];
    sandbox.run(line).code(2);
}

#[test]
fn an_ordinary_user_restores_what_the_kernel_allows() {
    need_root("it makes files of other owners");
    let sandbox = Sandbox::of_nobody();
    let at = |name: &str| sandbox.source.join(name);
    fs::create_dir_all(at("read-only/deeper")).unwrap();
    for name in ["roots", "own", "read-only/file", "read-only/deeper/file"] {
        fs::write(at(name), name).unwrap();
        set_mode(&at(name), 0o4755);
        chown(at(name), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    for dir in ["read-only/deeper", "read-only"] {
        chown(at(dir), Some(NOBODY), Some(NOBODY)).unwrap();
        set_mode(&at(dir), 0o555);
    }
    chown(at("roots"), Some(0), Some(0)).unwrap();
    for name in ["roots", "own"] {
        set_mode(&at(name), 0o4755);
    }
    sandbox.run(args!["backup", &sandbox.source]).code(0);
    let out = sandbox.path("out");
    fs::create_dir(&out).unwrap();
    chown(&out, Some(NOBODY), Some(NOBODY)).unwrap();
    for _ in 0..2 {
        let said = sandbox.ok(args!["restore-folder", ".", &out]).text();
        assert!(said.contains("\n  1 entries are yours now: only root may"), "{said}");
        let found = Tree::of(&out);
        let expected = Tree::of(&sandbox.source).with(|node| {
            if node.owner == (0, 0) {
                (node.owner, node.mode) = ((NOBODY, NOBODY), 0o755);
            }
        });
        assert_same(&expected, &found);
        // What is in the way of the next round: files to write, directories closed to it.
        fs::write(out.join("read-only/deeper/file"), "edited").unwrap();
        fs::remove_file(out.join("read-only/file")).unwrap();
    }
    // Names that are there already in directories that are closed.
    sandbox.ok(args!["restore-folder", ".", &out, "--overwrite", "never"]);
    assert_eq!(mode_of(&out.join("read-only")), 0o555);
    assert_eq!(read(&out.join("read-only/file")), "read-only/file");
    assert_eq!(read(&out.join("read-only/deeper/file")), "edited");
}

#[test]
fn metadata_survives_the_order_in_which_it_is_put_on() {
    need_root("it sets owners, capabilities and lists");
    let sandbox = Sandbox::new();
    let at = |name: &str| sandbox.source.join(name);
    fs::create_dir_all(at("given/inner")).unwrap();
    for name in ["capable", "setuid", "listed", "given/inner/file"] {
        fs::write(at(name), name).unwrap();
        chown(at(name), Some(1234), Some(2345)).unwrap();
    }
    // cap_net_raw=ep, as setcap writes it.
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    rustix::fs::setxattr(at("capable"), "security.capability", &capability, XattrFlags::empty())
        .unwrap();
    set_mode(&at("setuid"), 0o6751);
    tool("setfacl", args!["-m", "u:1:rw,g:2:r", &at("listed")]);
    tool("setfacl", args!["-d", "-m", "u:1:rwx", &at("given")]);
    chown(at("given/inner"), Some(1234), Some(2345)).unwrap();
    set_mode(&at("given/inner"), 0o2551);
    for (name, time) in [("given/inner/file", 10), ("given/inner", 20), ("given", 30), ("", 40)] {
        set_time(&at(name), time);
    }
    sandbox.backup();
    let source = Tree::of(&sandbox.source);
    assert_same(&source, &Tree::of(&sandbox.revert(1, "out")));
    // Into a directory that gives its own list to whatever is made in it.
    let giving = sandbox.path("giving");
    fs::create_dir(&giving).unwrap();
    tool("setfacl", args!["-d", "-m", "u:3:rwx", &giving]);
    tool("setfacl", args!["-m", "u:4:rwx", &giving]);
    restore(&sandbox, &giving, &[]);
    assert_same(&source, &Tree::of(&giving));
    // Onto files of others with attributes of their own.
    let here = |name: &str| giving.join(name);
    for name in ["capable", "setuid", "listed"] {
        chown(here(name), Some(1), Some(1)).unwrap();
        rustix::fs::setxattr(here(name), "user.extra", b"x", XattrFlags::empty()).unwrap();
    }
    restore(&sandbox, &giving, &[]);
    assert_same(&source, &Tree::of(&giving));
    // The attribute is all that differs.
    rustix::fs::setxattr(here("listed"), "user.extra", b"x", XattrFlags::empty()).unwrap();
    restore(&sandbox, &giving, &[]);
    assert_same(&source, &Tree::of(&giving));
}

#[test]
fn a_restore_that_is_killed_is_done_by_the_next_one() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 430, 1_500);
    data::noise_file(&sandbox.source.join("large"), 431, 24 << 20);
    for path in paths(&sandbox.source) {
        set_time(&sandbox.source.join(path), 1_000_000);
    }
    sandbox.backup();
    let source = Tree::of(&sandbox.source);
    for (round, overwrite) in ["never", "if-changed", "if-newer", "always"].iter().enumerate() {
        let out = sandbox.path(overwrite);
        let mut command = sandbox.program();
        command.arg("restore-folder").arg(".").arg(&out);
        let mut child = command.spawn().unwrap();
        // At another moment each time, but never before something is there.
        let wanted = 50 + 300 * round;
        wait_for("files", || {
            let there = ["d0/e0", "d1/e1", "d2/e2", "d3/e0", "d4/e1", "d5/e2", "d6/e0"];
            let count = |dir: &&str| fs::read_dir(out.join(dir)).map_or(0, Iterator::count);
            there.iter().map(count).sum::<usize>() * 3 >= wanted
        });
        kill(child.id(), rustix::process::Signal::KILL);
        child.wait().unwrap();
        restore(&sandbox, &out, &["--overwrite", overwrite]);
        let is_dir = |_: &[u8], node: &crate::common::tree::Node| node.kind == "dir";
        match *overwrite {
            // Directories that are there are left as they are, too.
            "never" => {
                assert_same(&source.clone().without(is_dir), &Tree::of(&out).without(is_dir))
            }
            _ => assert_same(&source, &Tree::of(&out)),
        }
    }
}

#[test]
fn a_restore_that_is_killed_while_it_patches_leaves_no_mixture() {
    let sandbox = Sandbox::new();
    data::noise_file(&sandbox.source.join("large"), 432, 48 << 20);
    sandbox.backup();
    let source = Tree::of(&sandbox.source);
    let out = sandbox.path("out");
    let here = out.join("large");
    let mut was_moved = false;
    for _ in 0..20 {
        restore(&sandbox, &out, &[]);
        assert_same(&source, &Tree::of(&out));
        data::noise_file(&here, 433, 48 << 20);
        let old = fs::read(&here).unwrap();
        let mut command = sandbox.program();
        let mut child = command.arg("restore-folder").arg(".").arg(&out).spawn().unwrap();
        let mut ended = false;
        wait_for("the patching", || {
            ended = child.try_wait().unwrap().is_some();
            ended || !here.exists()
        });
        kill_if_there(&mut child, ended);
        match fs::read(&here) {
            Ok(bytes) => {
                let is_new = bytes == fs::read(sandbox.source.join("large")).unwrap();
                assert!(is_new || bytes == old, "a mixture under the old name");
            }
            Err(_) => was_moved = true,
        }
        if was_moved {
            break;
        }
    }
    assert!(was_moved, "never killed at the right moment");
    // The next one takes away what was left.
    assert!(paths(&out).iter().any(|it| it.starts_with(".raidtape-restoring-")));
    restore(&sandbox, &out, &[]);
    assert_same(&source, &Tree::of(&out));
}

fn kill_if_there(child: &mut std::process::Child, ended: bool) {
    if !ended {
        kill(child.id(), rustix::process::Signal::KILL);
        child.wait().unwrap();
    }
}

#[test]
fn nothing_is_written_outside_while_others_swap_directories() {
    let sandbox = Sandbox::new();
    for dir in ["victim", "victim/inner", "other"] {
        fs::create_dir_all(sandbox.source.join(dir)).unwrap();
        for number in 0..12 {
            fs::write(sandbox.source.join(dir).join(format!("f{number}")), "restored").unwrap();
        }
        symlink("f0", sandbox.source.join(dir).join("link")).unwrap();
        fs::hard_link(sandbox.source.join(dir).join("f1"), sandbox.source.join(dir).join("hard"))
            .unwrap();
    }
    sandbox.backup();
    let outside = sandbox.path("outside");
    fs::create_dir_all(outside.join("inner")).unwrap();
    for name in ["f0", "f5", "mine", "inner/f3", "inner/mine"] {
        fs::write(outside.join(name), "mine").unwrap();
    }
    for name in ["f0", "f5", "mine", "inner/f3", "inner/mine", "inner", ""] {
        set_time(&outside.join(name), 1_000);
    }
    let untouched = Tree::of(&outside);
    let out = sandbox.path("out");
    restore(&sandbox, &out, &[]);
    // Beside the directory stands a link out of the target, and the two change places.
    let trap = out.join("other/trap");
    symlink(&outside, &trap).unwrap();
    let (done, made, start) = (AtomicBool::new(false), AtomicU64::new(0), Instant::now());
    let wanted = number_from_env("RAIDTAPE_FAULT_SWAPS", 0);
    let restores = std::thread::scope(|scope| {
        let swapping = scope.spawn(|| {
            let cwd = rustix::fs::CWD;
            while !done.load(Ordering::Relaxed) {
                for (dir, name) in [("", "victim"), ("victim", "inner")] {
                    // Not through the link, or the outside would be changed from here.
                    let how = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW;
                    let dir = out.join(dir).components().collect::<PathBuf>();
                    let Ok(dir) = rustix::fs::open(&dir, how, Mode::empty()) else { continue };
                    let flags = RenameFlags::EXCHANGE;
                    let swap = || rustix::fs::renameat_with(&dir, name, cwd, &trap, flags);
                    let swapped = swap();
                    made.fetch_add(u64::from(swapped.is_ok()), Ordering::Relaxed);
                    std::thread::yield_now();
                    if swapped.is_ok() {
                        let _ = swap();
                    }
                }
                if !trap.is_symlink() {
                    let _ = symlink(&outside, &trap);
                }
            }
        });
        // As many restores as are usual, or as it takes for so many swaps.
        let mut round = 0;
        while round < 40 || made.load(Ordering::Relaxed) < wanted {
            let options: &[&str] = match round % 4 {
                0 => &["--delete"],
                1 => &["--overwrite", "if-newer"],
                2 => &["--verify"],
                _ => &[],
            };
            let mut line = args!["restore-folder", ".", &out].to_vec();
            line.extend(options.iter().map(Into::into));
            let code = sandbox.program().args(line).output().unwrap().status.code();
            assert!(matches!(code, Some(0 | 3)), "exit code {code:?}");
            round += 1;
            if round % 500 == 0 {
                assert_same(&untouched, &Tree::of(&outside));
            }
        }
        done.store(true, Ordering::Relaxed);
        swapping.join().unwrap();
        round
    });
    let swaps = made.into_inner();
    assert!(swaps > 100, "only {swaps} swaps");
    let time = start.elapsed().as_secs_f64();
    let line = format!("swaps: {swaps}, {restores} restores, nothing outside touched, {time:.1} s");
    let _ = writeln!(std::io::stderr(), "{line}");
    assert_same(&untouched, &Tree::of(&outside));
    let _ = fs::remove_file(&trap);
    let leftover = out.join("victim");
    if leftover.is_symlink() {
        fs::remove_file(leftover).unwrap();
    }
    restore(&sandbox, &out, &["--delete"]);
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&out));
    assert_same(&untouched, &Tree::of(&outside));
}

/// Volume and target on one file system that can share blocks.
fn shares_blocks(make: &[&str]) {
    let sandbox = Sandbox::bare();
    let disk = Disk::new(&sandbox, "disk", 400, make);
    let fixed = ["--chunking", "fixed", "--chunk-size", "1MiB", "--block-size", "16MiB"];
    sandbox.init(&fixed);
    sandbox.add_volume("disk/volume");
    let size = (40 << 20) + 1234;
    data::noise_file(&sandbox.source.join("noise"), 440, size);
    let text = data::Seeded::new(441).text(3 << 20);
    fs::write(sandbox.source.join("text"), text).unwrap();
    let sparse = File::create(sandbox.source.join("sparse")).unwrap();
    sparse.set_len(20 << 20).unwrap();
    sparse.write_all_at(&data::Seeded::new(442).noise(2 << 20), 8 << 20).unwrap();
    sandbox.backup();
    let source = Tree::of(&sandbox.source);
    let out = disk.point.join("out");
    rustix::fs::syncfs(File::open(&disk.point).unwrap()).unwrap();
    let before = disk.free();
    let said = restore(&sandbox, &out, &["--verify"]);
    assert_same(&source, &Tree::of(&out));
    let shared = said["bytes_shared"].as_u64().unwrap();
    assert!(shared >= size - 4_096, "{said}");
    rustix::fs::syncfs(File::open(&disk.point).unwrap()).unwrap();
    let used = before - disk.free();
    assert!(used < 16 << 20, "{used} bytes used, {said}");
    // Of a file that is there, a copy that shares the rest is patched.
    let here = File::options().write(true).open(out.join("noise")).unwrap();
    let old = fs::metadata(out.join("noise")).unwrap().ino();
    here.write_all_at(b"changed", 20 << 20).unwrap();
    let said = restore(&sandbox, &out, &[]);
    assert_same(&source, &Tree::of(&out));
    assert!(said["bytes_written"].as_u64().unwrap() <= 8_192, "{said}");
    assert_ne!(old, fs::metadata(out.join("noise")).unwrap().ino());
    // What was changed in a restored file is no block of the volume.
    here.write_all_at(b"changed again", 1 << 20).unwrap();
    sandbox.assert_valid();
    // Damage is found in shared blocks as in others.
    let blocks = sandbox.blocks("disk/volume");
    for (block, len) in blocks.iter().filter(|it| it.1 == 16 << 20) {
        let file = File::options().write(true).open(block).unwrap();
        file.write_all_at(b"damaged", len / 2).unwrap();
    }
    let again = disk.point.join("again");
    let ran = sandbox.run(args!["restore-folder", ".", &again]).code(5);
    assert!(ran.errors().contains("noise: "), "{}", ran.errors());
    assert!(!again.join("noise").exists());
}

#[test]
fn raw_blocks_are_shared_on_xfs() {
    shares_blocks(&["mkfs.xfs", "-q", "-m", "reflink=1"]);
}

#[test]
fn raw_blocks_are_shared_on_btrfs() {
    shares_blocks(&["mkfs.btrfs", "-q"]);
}

#[test]
fn a_full_target_ends_a_restore() {
    let sandbox = Sandbox::new();
    for number in 0..30 {
        let name = format!("f{number:02}");
        data::noise_file(&sandbox.source.join(name), 450 + number, 1 << 20);
    }
    sandbox.backup();
    let disk = Disk::ext4(&sandbox, "disk", 16);
    let ran = sandbox.run(args!["restore-folder", ".", &disk.point.join("out")]).code(6);
    assert_eq!(ran.errors().lines().count(), 1, "{}", ran.errors());
    assert!(ran.errors().contains("No space left"), "{}", ran.errors());
    // What is there is whole.
    for entry in fs::read_dir(disk.point.join("out")).unwrap() {
        let entry = entry.unwrap();
        let source = sandbox.source.join(entry.file_name());
        assert!(fs::read(entry.path()).unwrap() == fs::read(source).unwrap());
    }
}

#[test]
fn names_of_any_bytes_are_deleted_and_replaced_too() {
    let sandbox = Sandbox::new();
    let names: [&[u8]; 4] = [b"\xff", b"new\nline", b"-rf", b" "];
    for name in names {
        fs::create_dir(sandbox.source.join(path_of(name))).unwrap();
        fs::write(sandbox.source.join(path_of(name)).join(path_of(name)), name).unwrap();
    }
    sandbox.backup();
    let out = sandbox.path("out");
    for name in names {
        let extra = [name, b"+"].concat();
        fs::create_dir_all(out.join(path_of(&extra)).join(path_of(name))).unwrap();
        fs::write(out.join(path_of(name)), "in the way").unwrap();
    }
    restore(&sandbox, &out, &["--delete"]);
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&out));
}
