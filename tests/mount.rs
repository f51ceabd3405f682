//! The mount: an ordinary tree under ordinary tools.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use crate::common::{
    Mount, RAIDTAPE, Sandbox, Tree, args, assert_same, data, errno, mount, mountctl, run, tool,
    wait_for,
};

#[test]
fn the_root_has_what_it_should() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let names = |dir: &std::path::Path| -> BTreeSet<String> {
        let list = fs::read_dir(dir).unwrap();
        list.map(|it| it.unwrap().file_name().into_string().unwrap()).collect()
    };
    let set = |list: &[&str]| list.iter().map(|it| (*it).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(names(&mount.point), set(&["snapshots", "ingest", ".ctl"]));
    assert_eq!(names(&mount.point.join("snapshots")), set(&[]));
    assert_eq!(
        names(&mount.ctl("")),
        set(&[
            "backup",
            "genmeta",
            "replicate",
            "jobs",
            "restore",
            "restore-folder",
            "revert-to-run",
            "status",
            "tape",
            "validate",
            "version",
        ])
    );
    fs::write(sandbox.source.join("file"), "x").unwrap();
    // A run of another process shows up without a remount.
    sandbox.backup();
    assert_eq!(names(&mount.point.join("snapshots")), set(&["1", "latest"]));
    let latest = mount.point.join("snapshots/latest");
    assert_eq!(fs::read_link(&latest).unwrap().to_str(), Some("1"));
    assert_eq!(fs::read(latest.join("file")).unwrap(), b"x");
    sandbox.backup();
    assert_eq!(names(&mount.point.join("snapshots")), set(&["1", "2", "latest"]));
    assert_eq!(fs::read_link(&latest).unwrap().to_str(), Some("2"));
    for name in ["0", "3", "01", "+1", "-1", "x"] {
        assert_eq!(errno(fs::metadata(mount.point.join("snapshots").join(name))), libc::ENOENT);
    }
    mount.end();
}

#[test]
fn the_status_file_tells_of_the_mount() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let text = fs::read_to_string(mount.ctl("status")).unwrap();
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(status["pid"], mount.pid());
    assert_eq!(status["catalog"], sandbox.catalog.to_str().unwrap());
    assert_eq!(status["mountpoint"], mount.point.to_str().unwrap());
    let list = run(mountctl().args(["status", "--json"]).arg(&mount.point)).code(0).json();
    assert!(list.to_string().contains(mount.point.to_str().unwrap()), "{list}");
}

#[test]
fn reads_at_any_place_by_any_number_of_readers_are_right() {
    for compression in ["zstd", "none"] {
        let sandbox = Sandbox::with(&["--compression", compression, "--block-size", "4MiB"]);
        let mut seeded = data::Seeded::new(50);
        let mut bytes = seeded.noise(7 << 20);
        bytes.extend(seeded.text(7 << 20));
        fs::write(sandbox.source.join("file"), &bytes).unwrap();
        sandbox.backup();
        let mount = Mount::start(&sandbox, &["--cache-size", "2MiB"]);
        let file = File::open(mount.run(1).join("file")).unwrap();
        std::thread::scope(|scope| {
            for reader in 0..4 {
                let (file, bytes) = (&file, &bytes);
                scope.spawn(move || {
                    let mut seeded = data::Seeded::new(reader);
                    for _ in 0..60 {
                        let at = seeded.below(bytes.len() as u64 + 1000);
                        let len = seeded.below(200_000) as usize;
                        let mut buffer = vec![0; len];
                        let got = file.read_at(&mut buffer, at).unwrap();
                        let from = (at as usize).min(bytes.len());
                        let expected = &bytes[from..(from + len).min(bytes.len())];
                        assert!(got == expected.len() && buffer[..got] == *expected, "at {at}");
                    }
                });
            }
        });
    }
}

#[test]
fn a_directory_of_many_names_is_listed_once_each() {
    let sandbox = Sandbox::new();
    let mut names = BTreeSet::new();
    for number in 0..3_000 {
        let name = format!("{:0width$}", number, width = 4 + number % 200);
        fs::write(sandbox.source.join(&name), "").unwrap();
        names.insert(name);
    }
    sandbox.backup();
    let mount = sandbox.mount();
    let list: Vec<String> = fs::read_dir(mount.run(1))
        .unwrap()
        .map(|it| String::from_utf8(it.unwrap().file_name().into_vec()).unwrap())
        .collect();
    assert_eq!(list.len(), names.len());
    assert_eq!(list.into_iter().collect::<BTreeSet<_>>(), names);
    // Rewound in the middle, it starts again.
    let fd = File::open(mount.run(1)).unwrap();
    let mut dir = rustix::fs::Dir::read_from(&fd).unwrap();
    let first: Vec<_> =
        dir.by_ref().take(700).map(|it| it.unwrap().file_name().to_owned()).collect();
    dir.rewind();
    let again: Vec<_> =
        dir.by_ref().take(700).map(|it| it.unwrap().file_name().to_owned()).collect();
    assert_eq!(first, again);
    assert_eq!(dir.count(), names.len() + 2 - 700);
    assert_eq!(tool("find", args![&mount.run(1)]).text().lines().count(), names.len() + 1);
}

#[test]
fn nobody_writes_into_a_snapshot() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    fs::create_dir(sandbox.source.join("dir")).unwrap();
    sandbox.backup();
    let before = Tree::of(&sandbox.source);
    let mount = sandbox.mount();
    let at = |name: &str| mount.run(1).join(name);
    let refused = |code: i32| matches!(code, libc::EROFS | libc::EACCES | libc::EPERM);
    for (what, code) in [
        ("create", errno(fs::write(at("new"), "y"))),
        ("write", errno(fs::OpenOptions::new().write(true).open(at("file")))),
        ("truncate", errno(fs::OpenOptions::new().write(true).truncate(true).open(at("file")))),
        ("remove", errno(fs::remove_file(at("file")))),
        ("rmdir", errno(fs::remove_dir(at("dir")))),
        ("mkdir", errno(fs::create_dir(at("new")))),
        ("rename", errno(fs::rename(at("file"), at("new")))),
        ("link", errno(fs::hard_link(at("file"), at("new")))),
        ("symlink", errno(std::os::unix::fs::symlink("file", at("new")))),
        ("chown", errno(std::os::unix::fs::chown(at("file"), Some(1), None))),
        ("rmdir of a run", errno(fs::remove_dir(mount.run(1)))),
        ("mkdir beside runs", errno(fs::create_dir(mount.run(7)))),
        ("mkdir in the root", errno(fs::create_dir(mount.point.join("new")))),
        ("remove a control file", errno(fs::remove_file(mount.ctl("status")))),
    ] {
        assert!(refused(code), "{what}: errno {code}");
    }
    // Out of a snapshot by rename or link leads nowhere either.
    assert_eq!(errno(fs::hard_link(at("file"), sandbox.path("out"))), libc::EXDEV);
    assert_same(&before, &Tree::of(&mount.run(1)));
}

#[test]
fn ordinary_programs_run_on_a_snapshot() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 60, 100);
    fs::copy("/bin/cat", sandbox.source.join("program")).unwrap();
    fs::hard_link(sandbox.source.join("program"), sandbox.source.join("again")).unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let snapshot = mount.run(1);
    // Run from it, mapped into memory.
    let ran = run(Command::new(snapshot.join("program")).arg(snapshot.join("program"))).code(0);
    assert_eq!(ran.bytes(), fs::read("/bin/cat").unwrap());
    // Packed and unpacked.
    let (packed, out) = (sandbox.path("packed.tar"), sandbox.path("out"));
    fs::create_dir(&out).unwrap();
    tool("tar", args!["--format=posix", "-cf", &packed, "-C", &snapshot, "."]);
    tool("tar", args!["-xpf", &packed, "-C", &out]);
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&out));
    // Asked for its size and its room.
    let du = |path| tool("du", args!["-sb", "--apparent-size", path]).text();
    let size = |text: String| text.split('\t').next().unwrap().parse::<u64>().unwrap();
    assert_eq!(size(du(&snapshot)), size(du(&out)));
    let space = rustix::fs::statvfs(&snapshot).unwrap();
    assert!(space.f_blocks > 0 && space.f_namemax == 255);
    // `..` leads back, also from a directory that was opened long ago.
    let up = snapshot.join("d0/e0/../..").canonicalize().unwrap();
    assert_eq!(fs::metadata(up).unwrap().ino(), fs::metadata(&snapshot).unwrap().ino());
}

#[test]
fn a_mount_ends_in_every_way_it_can_be_asked_to() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    sandbox.backup();
    let point = sandbox.path("point");
    fs::create_dir(&point).unwrap();
    let _clear = mount::Clear(point.clone());
    let status = || -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(point.join(".ctl/status")).unwrap()).unwrap()
    };
    let ended = |pid: u64| {
        wait_for("the mount to be gone", || !mount::is_mount_point(&point));
        wait_for("the daemon to end", || !is_running(pid as u32));
        assert_eq!(fs::read_dir(&point).unwrap().count(), 0);
    };
    // In the background, and again; a second mount on top is refused.
    for _ in 0..2 {
        run(sandbox.program().arg("mount").arg(&point)).code(0);
        assert_eq!(fs::read(point.join("snapshots/1/file")).unwrap(), b"x");
        run(sandbox.program().arg("mount").arg(&point)).code(2);
        let pid = status()["pid"].as_u64().unwrap();
        run(Command::new(RAIDTAPE).arg("umount").arg(&point)).code(0);
        ended(pid);
    }
    run(Command::new(RAIDTAPE).arg("umount").arg(&point)).code(1);
    // By the helper, and by a signal.
    run(mountctl().arg("mount").arg(&sandbox.catalog).arg(&point)).code(0);
    let pid = status()["pid"].as_u64().unwrap();
    run(mountctl().arg("umount").arg(&point)).code(0);
    ended(pid);
    let mount = sandbox.mount();
    crate::common::kill(mount.pid(), rustix::process::Signal::TERM);
    wait_for("the mount to be gone", || !mount::is_mount_point(&mount.point));
}

/// Whether a process is there and not only waiting to be noticed.
pub fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|it| !it.is_empty() && !it.starts_with('Z'))
}

#[test]
fn a_mount_point_that_overlaps_the_store_is_refused() {
    let sandbox = Sandbox::new();
    for point in [sandbox.path(""), sandbox.path("volume"), sandbox.path("volume/meta")] {
        run(sandbox.program().arg("mount").arg(&point)).code(2);
    }
    run(sandbox.program().arg("mount").arg(sandbox.path("none"))).code(1);
    // A source that reaches into a mount is refused, and may be had around it.
    let mount = sandbox.mount();
    run(sandbox.program().arg("backup").arg(&mount.point)).code(2);
    run(sandbox.program().arg("backup").arg(sandbox.path(""))).code(2);
    sandbox.ok(args!["backup", &sandbox.path(""), "--one-file-system"]);
}
