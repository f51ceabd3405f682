//! Full volumes.

use std::fs;

use crate::common::disk::Disk;
use crate::common::{Sandbox, Tree, args, assert_same, data};

fn statuses(sandbox: &Sandbox) -> Vec<String> {
    let volumes = sandbox.ok(["volumes", "--json"]).json();
    let volumes = volumes.as_array().unwrap();
    volumes.iter().map(|it| it["status"].as_str().unwrap().to_owned()).collect()
}

fn add_noise(sandbox: &Sandbox, name: &str, files: u64, bytes: u64) {
    let dir = sandbox.source.join(name);
    fs::create_dir(&dir).unwrap();
    for number in 0..files {
        let seed = bytes_seed(name) + number;
        data::noise_file(&dir.join(number.to_string()), seed, bytes);
    }
}

fn bytes_seed(name: &str) -> u64 {
    name.bytes().fold(7, |sum, byte| sum * 31 + u64::from(byte))
}

/// The whole story, with this much of each disk left free.
fn fill_disks(reserve: u8, small_files: bool) {
    let sandbox = Sandbox::bare();
    let disks = [Disk::ext4(&sandbox, "disk1", 48), Disk::ext4(&sandbox, "disk2", 48)];
    sandbox.init(&[
        "--block-size",
        "4MiB",
        "--compression",
        "none",
        "--reserve",
        &reserve.to_string(),
    ]);
    sandbox.add_volume("disk1/volume");
    sandbox.add_volume("disk2/volume");
    // Large ones have blocks of their own, small ones share.
    let add = |name: &str, mib: u64| match small_files {
        true => add_noise(&sandbox, name, mib * 4, 256 << 10),
        false => add_noise(&sandbox, name, mib / 10, 10 << 20),
    };
    let mut trees = Vec::new();
    add("one", 20);
    sandbox.backup();
    trees.push(Tree::of(&sandbox.source));
    assert_eq!(statuses(&sandbox), ["active", "active"]);
    assert!(sandbox.blocks("disk2/volume").is_empty());

    add("two", 30);
    sandbox.backup();
    trees.push(Tree::of(&sandbox.source));
    assert_eq!(statuses(&sandbox), ["sealed", "active"]);
    assert!(sandbox.stored("disk1/volume") > 25 << 20);
    assert!(sandbox.stored("disk2/volume") > 5 << 20);
    let total = 48 << 20;
    let left = disks[0].free();
    // Metas are written after the blocks; they may take a little of what is left.
    assert!(left + (2 << 20) >= total / 100 * u64::from(reserve), "{left} bytes left");
    let manifest = fs::read_to_string(sandbox.path("disk1/volume/.rt_volume_manifest")).unwrap();
    assert!(manifest.contains("status=sealed"), "{manifest}");

    add("three", 40);
    let ran = sandbox.run(args!["backup", &sandbox.source]).code(6);
    assert!(ran.errors().contains("add-volume"), "{}", ran.errors());
    assert_eq!(sandbox.ok(["runs", "--json"]).json().as_array().unwrap().len(), 2);
    sandbox.assert_valid();
    for (run, tree) in (1..).zip(&trees) {
        assert_same(tree, &Tree::of(&sandbox.revert(run, &format!("before{run}"))));
    }

    let _third = Disk::ext4(&sandbox, "disk3", 96);
    sandbox.add_volume("disk3/volume");
    sandbox.backup();
    trees.push(Tree::of(&sandbox.source));
    assert_eq!(statuses(&sandbox), ["sealed", "sealed", "active"]);
    sandbox.assert_valid();
    for (run, tree) in (1..).zip(&trees) {
        assert_same(tree, &Tree::of(&sandbox.revert(run, &format!("after{run}"))));
    }
}

#[test]
fn large_files_go_on_the_next_volume_at_the_reserve() {
    fill_disks(10, false);
}

#[test]
fn small_files_go_on_the_next_volume_at_the_reserve() {
    fill_disks(10, true);
}

#[test]
fn a_disk_that_is_really_full_is_no_worse() {
    fill_disks(0, true);
}

#[test]
fn without_a_volume_there_is_no_room() {
    let sandbox = Sandbox::bare();
    sandbox.init(&[]);
    fs::write(sandbox.source.join("file"), "x").unwrap();
    let ran = sandbox.run(args!["backup", &sandbox.source]).code(6);
    assert!(ran.errors().contains("add-volume"), "{}", ran.errors());
    sandbox.add_volume("volume");
    sandbox.backup();
}
