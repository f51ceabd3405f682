//! Files that change, vanish or fail while they are read, and changes that look like none.
//!
//! Nothing here waits for a race to happen: a file system of the test's own does what is to happen
//! between two given calls of the program.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FileType, Mode, XattrFlags};
use serde_json::{Value, json};

use crate::common::mirror::{Mirror, Op};
use crate::common::torture::{Disk, EXT4_OF_SECONDS};
use crate::common::{Sandbox, Tree, args, assert_same, data, mount, name_of, tool};

const EIO: i32 = 5;
const EACCES: i32 = 13;

/// A sandbox whose source is a mirror of the directory `behind`.
struct Scene {
    sandbox: Sandbox,
    behind: PathBuf,
}

impl Scene {
    fn new() -> Scene {
        let sandbox = Sandbox::new();
        let behind = sandbox.path("behind");
        fs::create_dir(&behind).unwrap();
        Scene { sandbox, behind }
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.behind.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// Backs the mirror up while `hook` does its work; gives the exit code's meaning and what was
    /// said. One thread, so that everything happens in one order.
    fn backup(
        &self,
        code: i32,
        hook: impl Fn(Op, &str, u32) -> Option<i32> + Send + Sync + 'static,
    ) -> Value {
        let point = self.sandbox.path("mirror");
        let mirror = Mirror::new(&self.behind, &point, Box::new(hook));
        let line = args!["backup", &mirror.point, "--single-threaded", "--json"];
        let said = self.sandbox.run(line).code(code).json();
        drop(mirror);
        fs::remove_dir(&point).unwrap();
        said
    }

    /// What a run has, restored.
    fn out(&self, run: i64) -> PathBuf {
        self.sandbox.assert_valid();
        self.sandbox.revert(run, &format!("out{run}"))
    }
}

/// What was named, and the words for it.
fn problems(said: &Value) -> BTreeMap<String, String> {
    let list = said["problem_list"].as_array().unwrap();
    assert_eq!(said["problems"], list.len(), "{said}");
    let one = |it: &Value| {
        let path = String::from_utf8(name_of(it, "path")).unwrap();
        (path, it["message"].as_str().unwrap().to_owned())
    };
    list.iter().map(one).collect()
}

#[track_caller]
fn assert_named(said: &Value, expected: &[(&str, &str)]) {
    let found = problems(said);
    let names: Vec<_> = found.keys().map(String::as_str).collect();
    let wanted: BTreeSet<_> = expected.iter().map(|it| it.0).collect();
    assert_eq!(names, wanted.into_iter().collect::<Vec<_>>(), "{said}");
    for (name, words) in expected {
        assert!(found[*name].contains(words), "{name}: {:?} should say {words:?}", found[*name]);
    }
}

fn files(dir: &Path) -> BTreeSet<String> {
    let paths = Tree::of(dir).0.into_keys().filter(|it| !it.is_empty());
    paths.map(|it| String::from_utf8(it).unwrap()).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|it| (*it).to_owned()).collect()
}

#[test]
fn a_file_that_changes_once_is_read_again_and_no_trouble() {
    let scene = Scene::new();
    scene.write("a", vec![1; 400_000]);
    let path = scene.behind.join("a");
    let said = scene.backup(0, move |op, name, _| {
        // Only once: the second reading comes after 400,000 bytes of the first.
        if (op, name) == (Op::Read(0), "a") && fs::read(&path).unwrap()[0] == 1 {
            return None;
        }
        if matches!(op, Op::Read(at) if at > 0) && fs::read(&path).unwrap()[0] == 1 {
            fs::write(&path, vec![2; 400_000]).unwrap();
        }
        None
    });
    assert_eq!(said["problems"], 0);
    assert_eq!(fs::read(scene.out(1).join("a")).unwrap(), vec![2; 400_000]);
}

#[test]
fn files_that_never_hold_still_are_stored_as_read_and_named() {
    let scene = Scene::new();
    for name in ["grows", "shrinks", "edited", "moded"] {
        scene.write(name, data::Seeded::new(1).noise(600_000));
    }
    // One that has blocks of its own.
    scene.write("large", data::Seeded::new(2).noise(9 << 20));
    scene.write("still", "x");
    let behind = scene.behind.clone();
    let said = scene.backup(3, move |op, name, _| {
        let path = behind.join(name);
        match (op, name) {
            (Op::Read(0), "grows" | "large") => {
                let mut file = OpenOptions::new().append(true).open(&path).unwrap();
                file.write_all(&[7; 1_000]).unwrap();
            }
            (Op::Open, "shrinks") => fs::write(&path, vec![5; 600_000]).unwrap(),
            (Op::Read(at), "shrinks") if at > 200_000 => {
                File::options().write(true).open(&path).unwrap().set_len(150_000).unwrap();
            }
            (Op::Read(at), "edited") if at > 0 => {
                let file = File::options().write(true).open(&path).unwrap();
                file.write_all_at(&at.to_le_bytes(), 0).unwrap();
            }
            (Op::Read(at), "moded") => {
                let mode = 0o600 | (at / 4096 % 8) as u32;
                fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            }
            _ => {}
        }
        None
    });
    let how = "it changed while it was read: stored as it was read";
    let named = ["grows", "shrinks", "edited", "moded", "large"].map(|it| (it, how));
    assert_named(&said, &named);
    // Size, hash and extents are of the same bytes: the restore checks them against each other.
    let out = scene.out(1);
    let len = |name: &str| fs::metadata(out.join(name)).unwrap().len();
    assert_eq!((len("grows"), len("large")), (602_000, (9 << 20) + 2_000));
    assert!(len("shrinks") < 600_000 && len("edited") == 600_000);
    let listed = scene.sandbox.ok(["ls", "1", "--json"]).json_lines();
    for line in listed {
        let name = line["path"].as_str().unwrap();
        assert_eq!(line["size"].as_u64(), Some(len(name)), "{name}");
    }
    // The next run has them as they are now.
    let said = scene.backup(0, |_, _, _| None);
    assert_eq!(said["problems"], 0);
    assert_same(&Tree::of(&scene.behind), &Tree::of(&scene.out(2)));
}

#[test]
fn a_file_that_grows_as_fast_as_it_is_read_ends() {
    let scene = Scene::new();
    scene.write("endless", "x");
    scene.write("other", "x");
    let path = scene.behind.join("endless");
    let said = scene.backup(3, move |op, name, _| {
        if let (Op::Read(at), "endless") = (op, name) {
            let file = File::options().write(true).open(&path).unwrap();
            file.set_len(at + (4 << 20)).unwrap();
        }
        None
    });
    assert_named(&said, &[("endless", "it changed while it was read")]);
    let len = fs::metadata(scene.out(1).join("endless")).unwrap().len();
    assert!(len < 100 << 20, "{len} bytes");
}

#[test]
fn what_vanishes_or_turns_into_something_else_is_named_and_never_waited_for() {
    let scene = Scene::new();
    let kinds = ["vanishes", "fifo", "socket", "symlink", "device", "dir"];
    for name in kinds {
        scene.write(name, name);
    }
    scene.write("renamed over", "old content");
    scene.write("still", "x");
    scene.write("new", "content that is new");
    scene.write("dir that vanishes/file", "x");
    scene.write("dir that is a fifo/file", "x");
    let behind = scene.behind.clone();
    let node = |path: &Path, kind| {
        rustix::fs::mknodat(rustix::fs::CWD, path, kind, Mode::RUSR, 0).unwrap();
    };
    let said = scene.backup(3, move |op, name, before| {
        // Looked at first, opened next.
        if op != Op::Lookup || before != 1 {
            return None;
        }
        let path = behind.join(name);
        let remove = || match path.is_dir() {
            true => fs::remove_dir_all(&path).unwrap(),
            false => fs::remove_file(&path).unwrap(),
        };
        match name {
            "vanishes" | "dir that vanishes" => remove(),
            "fifo" | "dir that is a fifo" => {
                remove();
                node(&path, FileType::Fifo);
            }
            "socket" => {
                remove();
                node(&path, FileType::Socket);
            }
            "device" => {
                remove();
                node(&path, FileType::CharacterDevice);
            }
            "symlink" => {
                remove();
                symlink("still", &path).unwrap();
            }
            "dir" => {
                remove();
                fs::create_dir(&path).unwrap();
            }
            "renamed over" => fs::rename(behind.join("new"), &path).unwrap(),
            _ => {}
        }
        None
    });
    // "new" went as well, before it was read: it has another name now, which has been read.
    let found = problems(&said);
    let names: BTreeSet<_> = found.keys().cloned().collect();
    let mut expected = set(&kinds);
    expected.extend(set(&["new", "dir that is a fifo"]));
    assert_eq!(names, expected, "{said}");
    assert!(found["vanishes"].contains("vanished") && found["new"].contains("vanished"));
    let out = scene.out(1);
    assert_eq!(files(&out), set(&["dir that is a fifo", "renamed over", "still"]));
    assert_eq!(fs::read(out.join("renamed over")).unwrap(), b"content that is new");
}

#[test]
fn one_name_that_goes_does_not_take_the_others_along() {
    let scene = Scene::new();
    for name in ["gone", "over", "all", "large"] {
        let len = if name == "large" { 9 << 20 } else { 1_000 };
        scene.write(&format!("{name}/1"), data::Seeded::new(len as u64).noise(len));
        for number in ["2", "3"] {
            let path = scene.behind.join(name).join(number);
            fs::hard_link(scene.behind.join(name).join("1"), path).unwrap();
        }
    }
    scene.write("spare", "another file");
    let before = Tree::of(&scene.behind);
    let behind = scene.behind.clone();
    let said = scene.backup(3, move |op, name, before| {
        let path = behind.join(name);
        match (op, name, before) {
            (Op::Lookup, "gone/1" | "large/1", 1) => fs::remove_file(&path).unwrap(),
            (Op::Lookup, "over/1", 1) => fs::rename(behind.join("spare"), &path).unwrap(),
            (Op::Lookup, "all/1", 1) => {
                for number in ["1", "2", "3"] {
                    fs::remove_file(behind.join("all").join(number)).unwrap();
                }
            }
            _ => {}
        }
        None
    });
    let gone = ["all/1", "all/2", "all/3", "gone/1", "large/1", "spare"];
    assert_named(&said, &gone.map(|it| (it, "it vanished before it could be read")));
    let out = Tree::of(&scene.out(1));
    for name in ["gone/2", "gone/3", "over/2", "over/3", "large/2", "large/3"] {
        let (old, new) = (&before.0[name.as_bytes()], &out.0[name.as_bytes()]);
        assert_eq!(new.content, old.content, "{name}");
        let first = format!("{}/2", name.split('/').next().unwrap());
        assert_eq!(new.first_name.as_deref(), Some(first.as_bytes()), "{name}");
    }
    let over = scene.sandbox.path("out1").join("over/1");
    assert_eq!(fs::read(&over).unwrap(), b"another file");
    assert_eq!(fs::metadata(&over).unwrap().nlink(), 1);
    let said = scene.backup(0, |_, _, _| None);
    assert_eq!(said["problems"], 0);
    assert_same(&Tree::of(&scene.behind), &Tree::of(&scene.out(2)));
}

#[test]
fn an_error_at_one_entry_is_named_and_the_rest_is_kept() {
    let scene = Scene::new();
    for name in ["looked at", "opened", "read", "attributes", "ok", "closed/file", "last"] {
        scene.write(name, vec![3; 300_000]);
    }
    symlink("x", scene.behind.join("link")).unwrap();
    scene.backup(0, |_, _, _| None);
    fs::write(scene.behind.join("changed"), "x").unwrap();
    for name in ["opened", "read", "attributes"] {
        fs::write(scene.behind.join(name), vec![4; 300_000]).unwrap();
    }
    fs::remove_file(scene.behind.join("link")).unwrap();
    symlink("y", scene.behind.join("link")).unwrap();
    let said = scene.backup(3, |op, name, _| match (op, name) {
        (Op::Lookup, "looked at") => Some(EIO),
        (Op::Open, "opened") => Some(EACCES),
        (Op::Read(at), "read") if at >= 131_072 => Some(EIO),
        (Op::Xattrs, "attributes") => Some(EIO),
        (Op::ReadLink, "link") => Some(EIO),
        (Op::List, "closed") => Some(EIO),
        _ => None,
    });
    assert_named(
        &said,
        &[
            ("attributes", "reading its attributes"),
            ("closed", "listing it"),
            ("link", "reading its metadata"),
            ("looked at", "looking at it"),
            ("opened", "opening it"),
            ("read", "reading it"),
        ],
    );
    let out = scene.out(2);
    assert_eq!(files(&out), set(&["changed", "closed", "last", "ok"]));
    // What could not be read is in the run before, and in the next.
    assert!(files(&scene.out(1)).contains("closed/file"));
    scene.backup(0, |_, _, _| None);
    assert_same(&Tree::of(&scene.behind), &Tree::of(&scene.out(3)));
}

#[test]
fn trouble_with_the_store_ends_the_run() {
    for what in ["removed", "read-only"] {
        let scene = Scene::new();
        scene.write("a", data::Seeded::new(1).noise(300_000));
        scene.backup(0, |_, _, _| None);
        scene.write("a", data::Seeded::new(2).noise(300_000));
        scene.write("b", "x");
        let volume = scene.sandbox.path("volume");
        let away = scene.sandbox.path("away");
        let _clear = mount::Clear(volume.clone());
        let hook = {
            let (volume, away) = (volume.clone(), away.clone());
            move |op, name: &str, before| {
                if (op, name, before) == (Op::Read(0), "a", 0) {
                    match what {
                        "removed" => fs::rename(&volume, &away).unwrap(),
                        _ => {
                            tool("mount", args!["--bind", &volume, &volume]);
                            tool("mount", args!["-o", "remount,bind,ro", &volume]);
                        }
                    }
                }
                None
            }
        };
        let point = scene.sandbox.path("mirror");
        let mirror = Mirror::new(&scene.behind, &point, Box::new(hook));
        let line = args!["backup", &mirror.point, "--single-threaded"];
        let errors = scene.sandbox.run(line).code(1).errors();
        assert!(errors.contains("volume"), "{what}: {errors}");
        drop(mirror);
        fs::remove_dir(&point).unwrap();
        // No run came of it, and the next one has everything.
        let runs = scene.sandbox.ok(["runs", "--json"]).json();
        assert_eq!(runs.as_array().unwrap().len(), 1, "{what}");
        match what {
            "removed" => fs::rename(&away, &volume).unwrap(),
            _ => mount::detach(&volume),
        }
        scene.backup(0, |_, _, _| None);
        assert_same(&Tree::of(&scene.behind), &Tree::of(&scene.out(2)));
    }
}

#[test]
fn an_edit_during_the_run_is_in_the_next_one() {
    let scene = Scene::new();
    scene.write("a", "first state");
    scene.write("b", "x");
    let path = scene.behind.join("a");
    let stamp = scene.sandbox.path("stamp");
    tool("cp", args!["-p", &path, &stamp]);
    std::thread::sleep(Duration::from_millis(50));
    let said = scene.backup(0, move |op, name, before| {
        // "a" has been read by then. Its size and mtime stay what they were.
        if (op, name, before) == (Op::Open, "b", 0) {
            fs::write(&path, "other state").unwrap();
            tool("touch", args!["-r", &stamp, &path]);
        }
        None
    });
    assert_eq!(said["problems"], 0);
    assert_eq!(fs::read(scene.out(1).join("a")).unwrap(), b"first state");
    scene.backup(0, |_, _, _| None);
    assert_eq!(fs::read(scene.out(2).join("a")).unwrap(), b"other state");
}

#[test]
fn files_of_the_kernel_are_bounded_and_consistent() {
    let sandbox = Sandbox::new();
    let backup = |source: &str, name: &str, options: &[&str]| {
        let mut line = args!["backup", source, "--as", name, "--json"].to_vec();
        line.extend(options.iter().map(OsString::from));
        let ran = sandbox.run(line).code(3);
        (problems(&ran.json()), ran.json())
    };
    // Of itself, so that nothing else of the machine gets into a test.
    let own = format!("/proc/{}", std::process::id());
    let inner = ["--exclude", "/task", "--exclude", "/map_files", "--exclude", "/fd*"];
    let (named, said) = backup(&own, "own", &inner);
    assert!(named["status"].starts_with("it says that it has 0 bytes and gave "), "{named:?}");
    assert!(said["bytes_read"].as_u64().unwrap() < 1 << 30, "{said}");
    sandbox.ok(args!["restore", "status", sandbox.path("status"), "--run", "1"]);
    let status = fs::read_to_string(sandbox.path("status")).unwrap();
    assert!(status.starts_with("Name:") && status.ends_with('\n'), "{status:?}");

    // Sizes that promise more than there is.
    let (named, _) = backup("/sys/kernel/mm/transparent_hugepage", "sys", &[]);
    assert!(named["enabled"].starts_with("it says that it has 4096 bytes and gave "), "{named:?}");
    // As long as the memory that a machine could have.
    let only = ["--exclude", "/*", "--exclude", "!/kcore", "--exclude", "!/version"];
    let (named, said) = backup("/proc", "proc", &only);
    assert!(named["kcore"].contains("memory"), "{named:?}");
    assert_eq!(said["files"], 1, "{said}");
    sandbox.assert_valid();
}

/// Two files of one size and one mtime, and more beside them, long enough ago that times prove
/// something.
fn settled() -> Sandbox {
    let sandbox = Sandbox::new();
    let at = |name: &str| sandbox.source.join(name);
    fs::create_dir_all(at("one")).unwrap();
    fs::create_dir_all(at("two")).unwrap();
    for (name, content) in
        [("a", "first"), ("b", "other"), ("one/in", "1-1-1"), ("two/in", "2-2-2"), ("l", "names")]
    {
        fs::write(at(name), content).unwrap();
        tool("touch", args!["-d", "2020-02-02 02:02:02.5", at(name)]);
    }
    fs::hard_link(at("l"), sandbox.path("outside")).unwrap();
    symlink("there", at("sym")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    fs::write(at("block"), vec![9; 8192]).unwrap();
    std::thread::sleep(Duration::from_millis(60));
    sandbox.backup();
    sandbox
}

/// Does something to a settled tree and checks that the next run has it.
#[track_caller]
fn assert_seen(what: &str, edit: impl Fn(&Sandbox, &dyn Fn(&str) -> PathBuf)) {
    let sandbox = settled();
    let untouched = sandbox.backup();
    assert_eq!(untouched["bytes_read"], 0, "{what}: nothing is trusted, nothing is tested");
    let before = Tree::of(&sandbox.source);
    edit(&sandbox, &|name| sandbox.source.join(name));
    let after = Tree::of(&sandbox.source);
    assert!(before != after, "{what}: that was no change");
    sandbox.backup();
    let out = sandbox.revert(3, "out");
    // A name outside the source is not made again.
    let lone = |tree: Tree| tree.with(|node| (node.links, node.first_name) = (1, None));
    assert_same(&lone(after), &lone(Tree::of(&out)));
    let old = sandbox.revert(1, "old");
    assert_same(&lone(before), &lone(Tree::of(&old)));
}

#[test]
fn no_change_looks_like_none() {
    let keep_time = |sandbox: &Sandbox, path: &Path, edit: &dyn Fn()| {
        let stamp = sandbox.path("stamp");
        tool("cp", args!["-p", path, &stamp]);
        edit();
        tool("touch", args!["-r", &stamp, path]);
    };
    assert_seen("an edit whose mtime is reset", |sandbox, at| {
        keep_time(sandbox, &at("a"), &|| fs::write(at("a"), "FIRST").unwrap());
    });
    assert_seen("an edit by a name outside", |sandbox, at| {
        keep_time(sandbox, &at("l"), &|| fs::write(sandbox.path("outside"), "NAMES").unwrap());
    });
    assert_seen("two files that change places", |_, at| {
        fs::rename(at("a"), at("t")).unwrap();
        fs::rename(at("b"), at("a")).unwrap();
        fs::rename(at("t"), at("b")).unwrap();
    });
    assert_seen("two directories that change places", |_, at| {
        fs::rename(at("one"), at("t")).unwrap();
        fs::rename(at("two"), at("one")).unwrap();
        fs::rename(at("t"), at("two")).unwrap();
    });
    assert_seen("a rename over it", |_, at| fs::rename(at("b"), at("a")).unwrap());
    assert_seen("deleted and made again, with the same number perhaps", |sandbox, at| {
        let stamp = sandbox.path("stamp");
        tool("cp", args!["-p", at("a"), &stamp]);
        fs::remove_file(at("a")).unwrap();
        fs::write(at("a"), "FIRST").unwrap();
        tool("touch", args!["-r", &stamp, at("a")]);
    });
    assert_seen("a link to elsewhere, as far away", |_, at| {
        fs::remove_file(at("sym")).unwrap();
        symlink("where", at("sym")).unwrap();
    });
    assert_seen("content that becomes a hole", |sandbox, at| {
        keep_time(sandbox, &at("block"), &|| {
            let file = File::options().write(true).open(at("block")).unwrap();
            let mode =
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, mode, 0, 4096).unwrap();
        });
    });
    assert_seen("attributes of every kind of entry", |_, at| {
        for name in ["a", "one", "fifo", "sym"] {
            let key = "trusted.note";
            rustix::fs::lsetxattr(at(name), key, b"x", XattrFlags::empty()).unwrap();
        }
        tool("setfacl", args!["-m", "u:77:r", at("b")]);
        tool("setfacl", args!["-d", "-m", "u:77:r", at("two")]);
    });
    assert_seen("modes and owners", |_, at| {
        fs::set_permissions(at("a"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::set_permissions(at("one"), fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::lchown(at("sym"), Some(3), Some(4)).unwrap();
        std::os::unix::fs::chown(at("fifo"), Some(3), Some(4)).unwrap();
    });
    assert_seen("a device in place of a fifo", |_, at| {
        fs::remove_file(at("fifo")).unwrap();
        let rdev = rustix::fs::makedev(1, 3);
        let kind = FileType::CharacterDevice;
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), kind, Mode::RUSR, rdev).unwrap();
    });
}

#[test]
fn an_edit_within_the_same_tick_of_a_slow_clock_is_seen() {
    let mut sandbox = Sandbox::new();
    let disk = Disk::new(&sandbox, "disk", &EXT4_OF_SECONDS);
    sandbox.source = disk.point.clone();
    let at = |name: &str| sandbox.source.join(name);
    fs::create_dir(at("dir")).unwrap();
    let note = |name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(at(name), "trusted.note", value, XattrFlags::empty()).unwrap();
    };
    let ctimes = || ["file", "sym", "dir"].map(|it| fs::symlink_metadata(at(it)).unwrap().ctime());
    let mut run = 0;
    // A second may end at the wrong moment, but not every time.
    for attempt in 0..20u8 {
        // From the beginning of a second, so that most of it is left.
        let clock = || std::time::UNIX_EPOCH.elapsed().unwrap();
        while clock().subsec_millis() > 100 {
            std::thread::sleep(Duration::from_millis(20));
        }
        let state = |version: u8| {
            fs::write(at("file"), [attempt, version]).unwrap();
            let _ = fs::remove_file(at("sym"));
            symlink(format!("to {attempt:03} {version}"), at("sym")).unwrap();
            note("file", &[attempt, version]);
            note("dir", &[attempt, version]);
        };
        state(1);
        let first = ctimes();
        sandbox.backup();
        state(2);
        run += 2;
        sandbox.backup();
        let same_tick = ctimes() == first;
        let out = sandbox.revert(run, &format!("out{run}"));
        let strip = |tree: Tree| tree.without(|path, _| path.starts_with(b"lost+found"));
        assert_same(&strip(Tree::of(&sandbox.source)), &strip(Tree::of(&out)));
        if same_tick {
            return;
        }
    }
    panic!("never were two runs within a second");
}

#[test]
fn a_clock_that_steps_back_hides_nothing() {
    let sandbox = settled();
    let catalog = || rusqlite::Connection::open(&sandbox.catalog).unwrap();
    // As if the run had begun before the file's last change: its clock went wrong.
    let step = "UPDATE runs SET started_s = started_s - 3600";
    assert_eq!(catalog().execute(step, []).unwrap(), 1);
    let path = sandbox.source.join("a");
    fs::write(&path, "FIRST").unwrap();
    // As if the clock had shown the very same moment once more.
    let stat = fs::metadata(&path).unwrap();
    let same = "UPDATE entries SET mtime_s = ?1, mtime_n = ?2, ctime_s = ?3, ctime_n = ?4 \
                WHERE name = ?5";
    let row = (stat.mtime(), stat.mtime_nsec(), stat.ctime(), stat.ctime_nsec(), &b"a"[..]);
    assert_eq!(catalog().execute(same, row).unwrap(), 1);
    let said = sandbox.backup();
    assert_eq!(said["modified"], 1, "{said}");
    assert_eq!(fs::read(sandbox.revert(2, "out").join("a")).unwrap(), b"FIRST");
}

#[test]
fn what_looked_recent_and_is_the_same_is_told_as_unchanged() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.source.join("dir")).unwrap();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    symlink("x", sandbox.source.join("link")).unwrap();
    let first = sandbox.backup();
    let second = sandbox.backup();
    assert_eq!(first["added"], 2);
    assert_eq!((&second["unchanged"], &second["modified"]), (&json!(2), &json!(0)), "{second}");
    assert_eq!(second["dirs"]["unchanged"], 2, "{second}");
}
