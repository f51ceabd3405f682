//! The sessions of a mount: what must hold in each way of mounting.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::XattrFlags;

use crate::common::wait_for;
use crate::common::{Mount, Sandbox, Tree, args, assert_same, data, errno, mount, run, tool};

/// Every way, with the number of sessions and the reading that status tells of.
const WAYS: [(&[&str], u64, &str); 5] = [
    (&[], 2, "zero-message"),
    (&["--one-session"], 1, "ordinary"),
    (&["--reads", "passthrough"], 2, "passthrough"),
    (&["--reads", "passthrough", "--one-session"], 1, "passthrough"),
    (&["--allow-other"], 2, "zero-message"),
];

fn status(mount: &Mount) -> serde_json::Value {
    serde_json::from_str(&fs::read_to_string(mount.ctl("status")).unwrap()).unwrap()
}

#[test]
fn every_way_shows_the_same_tree() {
    let sandbox = Sandbox::with(&["--compression", "none"]);
    let noise = data::Seeded::new(9).noise(3 << 20);
    fs::write(sandbox.source.join("raw"), &noise).unwrap();
    // The only file of its run, so it is a block by itself.
    sandbox.backup();
    data::mixed_tree(&sandbox.source, 40, 60);
    fs::write(sandbox.source.join("same"), &noise).unwrap();
    fs::copy("/bin/cat", sandbox.source.join("program")).unwrap();
    sandbox.backup();
    let source = Tree::of(&sandbox.source);
    for (options, sessions, reads) in WAYS {
        let mount = Mount::start(&sandbox, options);
        let said = status(&mount);
        assert_eq!(said["mount"]["sessions"], sessions, "{options:?}");
        assert_eq!(said["mount"]["reads"], reads, "{options:?}");
        // Read by the kernel or by the program.
        let frames = |mount: &Mount| {
            let cache = &status(mount)["cache"];
            cache["hits"].as_u64().unwrap() + cache["misses"].as_u64().unwrap()
        };
        assert!(fs::read(mount.run(2).join("raw")).unwrap() == noise, "{options:?}");
        assert_eq!(frames(&mount) == 0, reads == "passthrough", "{options:?}");
        assert_same(&source, &Tree::of(&mount.run(2)));
        // One inode opened many times, by two names, and mapped.
        let raw = mount.run(2).join("raw");
        let open: Vec<File> = (0..4).map(|_| File::open(&raw).unwrap()).collect();
        for (at, file) in (0u64..).zip(&open) {
            let mut part = vec![0; 100_000];
            file.read_exact_at(&mut part, at * 700_000).unwrap();
            let from = at as usize * 700_000;
            assert!(part == noise[from..from + part.len()], "{options:?}");
        }
        assert!(fs::read(mount.run(2).join("same")).unwrap() == noise, "{options:?}");
        drop(open);
        assert!(fs::read(&raw).unwrap() == noise, "{options:?}");
        let ran = run(std::process::Command::new(mount.run(2).join("program")).arg(&raw)).code(0);
        assert!(ran.bytes() == noise, "{options:?}");
        mount.end();
    }
}

#[test]
fn a_new_run_is_seen_at_once_also_from_within_the_directory() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "1").unwrap();
    sandbox.backup();
    for (options, ..) in WAYS {
        let mount = Mount::start(&sandbox, options);
        let snapshots = mount.point.join("snapshots");
        let sits = File::open(&snapshots).unwrap();
        let names = || -> BTreeSet<String> {
            let list = rustix::fs::Dir::read_from(&sits).unwrap();
            let names = list.map(|it| it.unwrap().file_name().to_str().unwrap().to_owned());
            names.filter(|it| !it.starts_with('.')).collect()
        };
        let before = names();
        // Listed again, from what the kernel has kept.
        assert_eq!(names(), before);
        let text = format!("run {}", before.len());
        fs::write(sandbox.source.join("file"), &text).unwrap();
        sandbox.backup();
        let newest = before.len();
        let mut expected = before.clone();
        expected.insert(newest.to_string());
        assert_eq!(names(), expected, "{options:?}");
        let list = fs::read_dir(&snapshots).unwrap().count();
        assert_eq!(list, expected.len(), "{options:?}");
        let latest = snapshots.join("latest");
        assert_eq!(fs::read_link(&latest).unwrap().to_str(), Some(&*newest.to_string()));
        assert_eq!(fs::read_to_string(latest.join("file")).unwrap(), text);
        drop(sits);
        mount.end();
    }
}

#[test]
fn a_position_in_a_directory_holds_for_whoever_comes_with_it() {
    let sandbox = Sandbox::new();
    for number in 0..1_500 {
        fs::write(sandbox.source.join(format!("{number:05}")), "").unwrap();
    }
    sandbox.backup();
    for (options, ..) in WAYS {
        let mount = Mount::start(&sandbox, options);
        // Names with the position after each.
        let list = |from: u64| -> Vec<(String, u64)> {
            let dir = File::open(mount.run(1)).unwrap();
            rustix::fs::seek(&dir, rustix::fs::SeekFrom::Start(from)).unwrap();
            let mut buffer = [std::mem::MaybeUninit::uninit(); 3_000];
            let mut entries = rustix::fs::RawDir::new(&dir, &mut buffer);
            let mut names = Vec::new();
            while let Some(entry) = entries.next() {
                let entry = entry.unwrap();
                let name = entry.file_name().to_str().unwrap().to_owned();
                names.push((name, entry.next_entry_cookie()));
            }
            names
        };
        let all = list(0);
        assert_eq!(all.len(), 1_502, "{options:?}");
        for at in [0, 1, 2, 255, 256, 257, 258, 259, 700, 1_499, 1_501] {
            assert_eq!(list(all[at].1), all[at + 1..], "{options:?} after {at}");
        }
        assert_eq!(list(1 << 40), [], "{options:?}");
        mount.end();
    }
}

#[test]
fn attributes_tell_where_a_file_comes_from() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    fs::write(sandbox.source.join("with"), "x").unwrap();
    fs::write(sandbox.source.join("empty"), "").unwrap();
    fs::create_dir(sandbox.source.join("dir")).unwrap();
    let own = XattrFlags::empty();
    rustix::fs::setxattr(sandbox.source.join("with"), "user.own", b"mine", own).unwrap();
    sandbox.backup();
    fs::write(sandbox.source.join("new"), "y").unwrap();
    sandbox.backup();
    for (options, ..) in WAYS {
        let mount = Mount::start(&sandbox, options);
        let get = |path: &Path, key: &str| -> io::Result<String> {
            let mut value = [0; 4096];
            let len = rustix::fs::getxattr(path, key, &mut value)?;
            Ok(String::from_utf8(value[..len].to_vec()).unwrap())
        };
        let of = |name: &str, key: &str| get(&mount.run(2).join(name), key);
        let hash = blake3::hash(b"x").to_hex();
        assert_eq!(of("file", "user.raidtape.hash").unwrap(), hash.as_str());
        assert_eq!(of("file", "user.raidtape.run").unwrap(), "1");
        assert_eq!(of("new", "user.raidtape.run").unwrap(), "2");
        assert_eq!(of("dir", "user.raidtape.run").unwrap(), "2");
        let (a, b) = (of("file", "user.raidtape.version"), of("new", "user.raidtape.version"));
        assert!(a.unwrap().parse::<u64>().unwrap() < b.unwrap().parse().unwrap());
        let blocks = of("file", "user.raidtape.blocks").unwrap();
        let names: Vec<&str> = blocks.lines().collect();
        assert!(names.len() == 1 && names[0].len() == 64, "{blocks:?}");
        assert_eq!(errno(of("empty", "user.raidtape.blocks")), libc::ENODATA);
        assert_eq!(errno(of("dir", "user.raidtape.hash")), libc::ENODATA);
        assert_eq!(errno(of("file", "user.raidtape.what")), libc::ENODATA);
        // They are not listed, so no copy takes them along.
        assert_eq!(of("with", "user.own").unwrap(), "mine");
        let mut list = [0; 100];
        let names = |name: &str, list: &mut [u8]| {
            rustix::fs::listxattr(mount.run(2).join(name), list).unwrap()
        };
        assert_eq!(names("file", &mut list), 0);
        let len = names("with", &mut list);
        assert_eq!(&list[..len], b"user.own\0");
        mount.end();
    }
}

#[test]
fn directories_do_not_count_what_is_in_them() {
    let sandbox = Sandbox::new();
    fs::create_dir_all(sandbox.source.join("a/b/c")).unwrap();
    fs::write(sandbox.source.join("a/b/c/file"), "x").unwrap();
    sandbox.ok(args!["backup", &sandbox.source, "--exclude", "/a/none"]);
    let mount = sandbox.mount();
    for name in ["", "a", "a/b", "a/b/c"] {
        assert_eq!(fs::metadata(mount.run(1).join(name)).unwrap().nlink(), 1, "{name:?}");
    }
    assert_eq!(tool("find", args![&mount.run(1)]).text().lines().count(), 5);
    // A mount of its own: who stays on one file system does not enter it.
    let dev = |path: &Path| fs::metadata(path).unwrap().dev();
    assert_ne!(dev(&mount.point), dev(&mount.point.join("snapshots")));
    assert_eq!(dev(&mount.run(1)), dev(&mount.run(1).join("a/b")));
}

#[test]
fn a_mount_goes_whole_and_outlives_the_loss_of_its_second_session() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    sandbox.backup();
    for half in ["", "snapshots"] {
        let mount = sandbox.mount();
        let snapshots = mount.point.join("snapshots");
        assert!(mount::is_mount_point(&snapshots));
        mount::detach(&mount.point.join(half));
        if half == "snapshots" {
            assert!(!mount::is_mount_point(&snapshots));
            assert_eq!(fs::read(mount.run(1).join("file")).unwrap(), b"x");
            mount::detach(&mount.point);
        }
        wait_for("all to be gone", || {
            !mount::is_mount_point(&mount.point) && !mount::is_mount_point(&snapshots)
        });
        wait_for("the process to end", || !crate::mount::is_running(mount.pid()));
        assert_eq!(fs::read_dir(&mount.point).unwrap().count(), 0, "{half:?}");
    }
}
