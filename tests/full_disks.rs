//! Real disks that are full: of data or of files, a volume's, the catalog's, the writable tree's.
//!
//! Whatever is left on them, a command is done or says that there is no room; with room all earlier
//! runs are whole, and the next backup works.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::common::disk::Disk;
use crate::common::{Mount, Sandbox, Tree, args, assert_same, data, number_from_env};

/// How many sizes of each kind; more of them if somebody asks for it.
fn sizes() -> u64 {
    number_from_env("RAIDTAPE_FULL_SIZES", 20) / 5
}

/// A disk on which something has been left free.
struct Filled {
    fillers: Vec<PathBuf>,
}

impl Filled {
    /// Leaves so many bytes.
    fn data(disk: &Disk, left: u64) -> Filled {
        let path = disk.point.join("filler");
        let file = File::create(&path).unwrap();
        let mut len = disk.free().saturating_sub(left);
        // The file's own tables take some of what is free.
        let flags = rustix::fs::FallocateFlags::empty();
        while len > 0 && rustix::fs::fallocate(&file, flags, 0, len).is_err() {
            len = len.saturating_sub(8 << 10);
        }
        Filled { fillers: vec![path] }
    }

    /// Leaves so many files.
    fn files(disk: &Disk, left: u64) -> Filled {
        let free = rustix::fs::statvfs(&disk.point).unwrap().f_favail;
        let paths = (left..free).map(|it| disk.point.join(format!("filler{it}")));
        Filled { fillers: paths.inspect(|it| drop(File::create(it).unwrap())).collect() }
    }

    fn empty(&self) {
        self.fillers.iter().for_each(|it| fs::remove_file(it).unwrap());
    }
}

/// A new store: the catalog here, the volumes there, and one run of a small tree.
fn store(sandbox: &mut Sandbox, catalog: &Path, volumes: &[&Path]) -> Tree {
    sandbox.catalog = catalog.join("catalog");
    let _ = fs::remove_dir_all(&sandbox.source);
    fs::create_dir(&sandbox.source).unwrap();
    data::mixed_tree(&sandbox.source, 300, 20);
    sandbox.init(&["--block-size", "1MiB", "--compression", "none"]);
    for volume in volumes {
        sandbox.ok(args!["add-volume", volume]);
    }
    sandbox.backup();
    Tree::of(&sandbox.source)
}

/// Backs up on a disk without much room; gives whether there was enough. Then `make_room`.
#[track_caller]
fn try_backup(sandbox: &Sandbox, first: &Tree, make_room: impl FnOnce(bool)) -> bool {
    let ran = sandbox.run(args!["backup", &sandbox.source, "--json"]);
    let errors = ran.errors();
    // Done, too, where there was only no room for the metas: that is told.
    let is_done = matches!(ran.exit_code(), Some(0 | 3));
    if ran.exit_code() == Some(3) {
        assert!(errors.contains("metas were not written") && errors.contains("No space left"));
    }
    if !is_done {
        let ran = ran.code(6);
        assert!(ran.errors().starts_with("raidtape: "), "{errors}");
    }
    // While the disk is as full as it is. Readers of a catalog need a little room beside it, too.
    let look = sandbox.run(["validate", "--json"]);
    match look.exit_code() {
        Some(0) => assert_eq!(look.json()["clean"], true),
        _ => assert!(look.code(6).errors().contains("No space left")),
    }
    make_room(is_done);
    sandbox.assert_valid();
    let runs = sandbox.ok(["runs", "--json"]).json().as_array().unwrap().len();
    assert_eq!(runs, 1 + usize::from(is_done), "{errors}");
    sandbox.backup();
    sandbox.assert_valid();
    for (run, tree) in [(1, first.clone()), (runs as i64 + 1, Tree::of(&sandbox.source))] {
        let out = sandbox.revert(run, "out");
        assert_same(&tree, &Tree::of(&out));
        fs::remove_dir_all(out).unwrap();
    }
    is_done
}

/// Tries all sizes; some must have been enough, and some not.
fn try_sizes(what: &str, mut each: impl FnMut(u64, u64) -> bool) {
    let count = sizes().max(2);
    let done: Vec<bool> = (0..count).map(|number| each(number, count)).collect();
    assert!(done.contains(&true) && done.contains(&false), "{done:?}");
    tell(count, what, done.iter().filter(|it| **it).count());
}

fn tell(count: u64, what: &str, enough: usize) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "sizes: {count} of {what}, {enough} enough, 0 lost");
}

fn add_large(sandbox: &Sandbox) {
    for number in 0..8 {
        data::noise_file(&sandbox.source.join(format!("new{number}")), 310 + number, 900_000);
    }
}

#[test]
fn a_volume_without_room() {
    let mut sandbox = Sandbox::bare();
    let disk = Disk::ext4(&sandbox, "disk", 40);
    try_sizes("a volume's disk", |number, count| {
        let dir = sandbox.path(&format!("c{number}"));
        fs::create_dir(&dir).unwrap();
        let volume = disk.point.join(format!("v{number}"));
        let first = store(&mut sandbox, &dir, &[&volume]);
        add_large(&sandbox);
        let filled = Filled::data(&disk, number * (16 << 20) / (count - 1));
        let done = try_backup(&sandbox, &first, |is_done| {
            filled.empty();
            if !is_done {
                // A volume that was full takes no more, and the program has said what to do.
                sandbox.ok(args!["add-volume", &disk.point.join(format!("w{number}"))]);
            }
        });
        fs::remove_dir_all(&volume).unwrap();
        let _ = fs::remove_dir_all(disk.point.join(format!("w{number}")));
        done
    });
}

#[test]
fn a_volume_without_files_left() {
    let mut sandbox = Sandbox::bare();
    let make = ["mkfs.ext4", "-q", "-F", "-m", "0", "-N", "256"];
    let disk = Disk::new(&sandbox, "disk", 64, &make);
    try_sizes("a volume's files", |number, count| {
        let dir = sandbox.path(&format!("c{number}"));
        fs::create_dir(&dir).unwrap();
        let volume = disk.point.join(format!("v{number}"));
        let first = store(&mut sandbox, &dir, &[&volume]);
        add_large(&sandbox);
        let filled = Filled::files(&disk, number * 60 / (count - 1));
        let done = try_backup(&sandbox, &first, |is_done| {
            filled.empty();
            if !is_done {
                sandbox.ok(args!["add-volume", &disk.point.join(format!("w{number}"))]);
            }
        });
        fs::remove_dir_all(&volume).unwrap();
        let _ = fs::remove_dir_all(disk.point.join(format!("w{number}")));
        done
    });
}

#[test]
fn one_of_two_volumes_without_room() {
    let mut sandbox = Sandbox::bare();
    let disk = Disk::ext4(&sandbox, "disk", 40);
    let count = sizes().max(2);
    for number in 0..count {
        let dir = sandbox.path(&format!("c{number}"));
        fs::create_dir(&dir).unwrap();
        let volumes = [disk.point.join(format!("v{number}")), dir.join("other")];
        let first = store(&mut sandbox, &dir, &[&volumes[0], &volumes[1]]);
        add_large(&sandbox);
        let filled = Filled::data(&disk, number * (12 << 20) / (count - 1));
        let done = try_backup(&sandbox, &first, |_| filled.empty());
        assert!(done, "there was room on the other one: size {number}");
        fs::remove_dir_all(&volumes[0]).unwrap();
    }
    tell(count, "one of two volumes", count as usize);
}

#[test]
fn the_catalog_without_room() {
    let mut sandbox = Sandbox::bare();
    let disk = Disk::ext4(&sandbox, "disk", 40);
    let volume = sandbox.path("volumes");
    fs::create_dir(&volume).unwrap();
    try_sizes("the catalog's disk", |number, count| {
        let dir = disk.point.join(format!("c{number}"));
        fs::create_dir(&dir).unwrap();
        let first = store(&mut sandbox, &dir, &[&volume.join(number.to_string())]);
        for number in 0..3_000 {
            fs::write(sandbox.source.join(format!("small{number}")), number.to_string()).unwrap();
        }
        let filled = Filled::data(&disk, number * (16 << 20) / (count - 1));
        let done = try_backup(&sandbox, &first, |_| filled.empty());
        fs::remove_dir_all(&dir).unwrap();
        done
    });
}

#[test]
fn the_writable_tree_without_room() {
    let mut sandbox = Sandbox::bare();
    let disk = Disk::ext4(&sandbox, "disk", 24);
    let volume = sandbox.path("volume");
    let first = store(&mut sandbox, &disk.point.clone(), &[&volume]);
    let (count, mut enough) = (sizes().max(2), 0);
    for number in 0..count {
        let filled = Filled::data(&disk, number * (4 << 20) / (count - 1));
        let name = format!("file{number}");
        let bytes = data::Seeded::new(number).noise(3 << 20);
        // A disk may be too full to mount what lies on it; then that is said, and no more.
        let mut whole = false;
        let probe = sandbox.run(["runs"]);
        if number > 0 {
            assert_eq!(probe.exit_code(), Some(0));
            let mount = Mount::start(&sandbox, &[]);
            let path = mount.point.join("ingest").join(&name);
            whole =
                fs::write(&path, &bytes).is_ok() && File::open(&path).unwrap().sync_all().is_ok();
            mount.end();
        }
        filled.empty();
        let mount = Mount::start(&sandbox, &[]);
        let path = mount.point.join("ingest").join(&name);
        assert!(!whole || fs::read(&path).unwrap() == bytes);
        fs::write(&path, &bytes).unwrap();
        assert!(fs::read(&path).unwrap() == bytes);
        fs::remove_file(&path).unwrap();
        mount.end();
        enough += usize::from(whole);
    }
    tell(count, "the writable tree", enough);
    sandbox.assert_valid();
    assert_same(&first, &Tree::of(&sandbox.revert(1, "out")));
}
