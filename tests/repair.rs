//! Repair: from other copies, from parts of several, from the source; reads meanwhile go on.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::{Mount, Sandbox, Tree, args, assert_same, data, path_of};
use crate::damage::flip;

/// A store of two volumes that have the same, with one run, and its tree.
fn twins(options: &[&str]) -> (Sandbox, Tree) {
    let sandbox = Sandbox::bare();
    let mut line = vec!["--copies", "2"];
    line.extend(options);
    if !options.contains(&"--block-size") {
        line.extend(["--block-size", "1MiB"]);
    }
    sandbox.init(&line);
    sandbox.add_volume("a");
    sandbox.add_volume("b");
    fill(&sandbox);
    sandbox.backup();
    let tree = Tree::of(&sandbox.source);
    (sandbox, tree)
}

fn fill(sandbox: &Sandbox) {
    data::mixed_tree(&sandbox.source, 400, 60);
    data::noise_file(&sandbox.source.join("large"), 401, 5 << 20);
    let text = data::Seeded::new(402).text(3 << 20);
    fs::write(sandbox.source.join("text"), text).unwrap();
}

fn repair(sandbox: &Sandbox, code: i32) -> Value {
    let said = sandbox.run(["validate", "--repair", "--json"]).code(code).json();
    assert_ne!(said["repair"], Value::Null, "{said}");
    said["repair"].clone()
}

fn assert_whole(sandbox: &Sandbox, tree: &Tree) {
    sandbox.assert_valid();
    let out = sandbox.revert(1, "whole");
    assert_same(tree, &Tree::of(&out));
    fs::remove_dir_all(out).unwrap();
}

/// The copy of a block on another volume.
fn twin(sandbox: &Sandbox, block: &Path, volume: &str) -> PathBuf {
    let root = block.ancestors().nth(4).unwrap();
    sandbox.path(volume).join(block.strip_prefix(root).unwrap())
}

/// Breaks a block in one of several ways.
fn harm(sandbox: &Sandbox, block: &Path, how: usize) {
    let len = fs::metadata(block).unwrap().len();
    match how % 6 {
        0 => flip(block, len / 3),
        1 => fs::remove_file(block).unwrap(),
        2 => fs::File::options().write(true).open(block).unwrap().set_len(len / 2).unwrap(),
        3 => fs::write(block, b"").unwrap(),
        4 => fs::write(block, [&fs::read(block).unwrap()[..], b"more"].concat()).unwrap(),
        _ => {
            let all = sandbox.blocks("a");
            let other = all.iter().find(|it| it.0.file_name() != block.file_name()).unwrap();
            fs::copy(&other.0, block).unwrap();
        }
    }
}

#[test]
fn each_bad_copy_is_made_good_from_the_other() {
    let (sandbox, tree) = twins(&[]);
    let blocks = sandbox.blocks("a");
    let originals: Vec<Vec<u8>> = blocks.iter().map(|it| fs::read(&it.0).unwrap()).collect();
    assert!(blocks.len() >= 6);
    for (how, (block, _)) in blocks.iter().enumerate() {
        // Now on one volume, now on the other.
        let block = twin(&sandbox, block, if how % 2 == 0 { "a" } else { "b" });
        harm(&sandbox, &block, how);
    }
    // Nothing is lost meanwhile, and every block is named.
    let out = sandbox.revert(1, "meanwhile");
    assert_same(&tree, &Tree::of(&out));
    let said = repair(&sandbox, 0);
    assert_eq!(said["healed_count"].as_u64().unwrap(), blocks.len() as u64, "{said}");
    assert!(said["healed"].as_array().unwrap().iter().all(|it| it["from"] == "copy"));
    for ((block, _), original) in blocks.iter().zip(&originals) {
        for volume in ["a", "b"] {
            assert_eq!(&fs::read(twin(&sandbox, block, volume)).unwrap(), original);
        }
    }
    assert_whole(&sandbox, &tree);
    // Nothing is done for nothing.
    let said = sandbox.ok(["validate", "--repair", "--json"]).json();
    assert_eq!(said.get("repair"), None);
}

#[test]
fn two_bad_copies_make_a_good_one() {
    let (sandbox, tree) = twins(&["--compression", "none", "--block-size", "4MiB"]);
    let frames = |it: &PathBuf| meta_of(&sandbox, it)["frames"].as_array().unwrap().len();
    let mut blocks = sandbox.blocks("a").into_iter().map(|it| it.0);
    let block = blocks.find(|it| frames(it) > 2).expect("a block of several frames");
    let other = twin(&sandbox, &block, "b");
    let len = fs::metadata(&block).unwrap().len();
    let original = fs::read(&block).unwrap();
    flip(&block, 5);
    flip(&other, len - 5);
    // Frame by frame every file still reads, through the mount too.
    let mount = Mount::start(&sandbox, &["--cache-size", "1MiB"]);
    for (path, node) in tree.0.iter().filter(|it| it.1.kind == "file") {
        let bytes = fs::read(mount.run(1).join(path_of(path))).unwrap();
        assert!(blake3::hash(&bytes).as_bytes()[..] == node.content[..], "{:?}", path_of(path));
    }
    // Which copy is asked first depends on what the kernel reads ahead.
    let log = mount.log();
    assert!(log.contains("noted for validate --repair"), "{log}");
    mount.end();
    fs::rename(&sandbox.source, sandbox.path("source.away")).unwrap();
    let said = repair(&sandbox, 0);
    assert_eq!(said["healed_count"], 2, "{said}");
    assert_eq!(said["healed"][0]["from"], "frames");
    for path in [&block, &other] {
        assert_eq!(fs::read(path).unwrap(), original);
    }
    assert_whole(&sandbox, &tree);
}

/// What a block's meta says.
fn meta_of(sandbox: &Sandbox, block: &Path) -> Value {
    let name = block.file_name().unwrap().to_str().unwrap();
    let path = sandbox.path("a/meta").join(format!("{name}.meta.json.zst"));
    let file = fs::File::open(path).unwrap();
    serde_json::from_reader(zstd::Decoder::new(file).unwrap()).unwrap()
}

#[test]
fn what_readers_find_is_repaired_without_a_search() {
    let (sandbox, tree) = twins(&[]);
    let (block, len) = sandbox.blocks("a")[0].clone();
    flip(&block, len / 2);
    let out = sandbox.revert(1, "out");
    assert_same(&tree, &Tree::of(&out));
    // It may not be written: nobody is worse off.
    let health = sandbox.path("catalog.health");
    assert!(health.exists());
    let said = repair(&sandbox, 0);
    assert_eq!(said["healed_count"], 1, "{said}");
    let report = sandbox.ok(["validate", "--json"]).json();
    assert_eq!(report["clean"], true);
    fs::remove_file(&health).unwrap();
    for suffix in ["-wal", "-shm"] {
        let _ = fs::remove_file(sandbox.path(&format!("catalog.health{suffix}")));
    }
    fs::create_dir(&health).unwrap();
    flip(&block, len / 2);
    let out = sandbox.revert(1, "again");
    assert_same(&tree, &Tree::of(&out));
    fs::remove_dir(&health).unwrap();
}

#[test]
fn the_source_gives_back_what_no_copy_has() {
    for options in
        [&[][..], &["--compression", "none"], &["--chunking", "fixed", "--chunk-size", "8KiB"]]
    {
        let sandbox = Sandbox::bare();
        let mut line = vec!["--block-size", "1MiB"];
        line.extend(options);
        sandbox.init(&line);
        sandbox.add_volume("a");
        fill(&sandbox);
        sandbox.backup();
        let tree = Tree::of(&sandbox.source);
        let blocks = sandbox.blocks("a");
        let originals: Vec<Vec<u8>> = blocks.iter().map(|it| fs::read(&it.0).unwrap()).collect();
        for (how, (block, _)) in blocks.iter().enumerate() {
            harm(&sandbox, block, how);
        }
        let said = repair(&sandbox, 0);
        let count = said["healed_count"].as_u64().unwrap();
        assert_eq!(count, blocks.len() as u64, "{said}");
        for ((block, _), original) in blocks.iter().zip(&originals) {
            assert_eq!(&fs::read(block).unwrap(), original, "the very same bytes");
        }
        assert_whole(&sandbox, &tree);
    }
}

#[test]
fn what_has_changed_since_is_not_believed() {
    let sandbox = Sandbox::bare();
    sandbox.init(&["--block-size", "4MiB", "--compression", "none"]);
    sandbox.add_volume("a");
    fill(&sandbox);
    sandbox.backup();
    let before = Tree::of(&sandbox.source);
    // One byte in the middle of the large file: its chunk is lost, the others are not.
    let large = sandbox.source.join("large");
    flip(&large, 2_500_000);
    for (block, _) in sandbox.blocks("a") {
        fs::remove_file(block).unwrap();
    }
    let ran = sandbox.run(["validate", "--repair"]).code(5);
    assert!(ran.text().contains("not healed: block "), "{}", ran.text());
    assert!(ran.text().contains("a part of it was brought back"), "{}", ran.text());
    let report = sandbox.run(["validate", "--json"]).code(5).json();
    let bad = report["bad_blocks"].as_array().unwrap();
    assert_eq!(bad.len(), 1, "{report}");
    let named: BTreeSet<&str> =
        bad[0]["files"].as_array().unwrap().iter().map(|it| it["path"].as_str().unwrap()).collect();
    assert_eq!(named, BTreeSet::from(["large"]));
    // All but that chunk reads.
    let out = sandbox.path("out");
    sandbox.run(args!["revert-to-run", "1", &out]).code(5);
    let expected = before.without(|path, _| path == b"large");
    assert_same(&expected, &Tree::of(&out));
    let dump = sandbox.run(args!["dump", "1", "large"]);
    assert!(dump.bytes().len() >= 1 << 20, "{} bytes", dump.bytes().len());
    assert_eq!(dump.bytes(), &fs::read(&large).unwrap()[..dump.bytes().len()]);
    // The file as it was comes back: so does the rest.
    flip(&large, 2_500_000);
    repair(&sandbox, 0);
    sandbox.assert_valid();
}

#[test]
fn the_same_content_is_stored_anew_where_the_same_bytes_cannot_be_made() {
    let sandbox = Sandbox::bare();
    sandbox.init(&["--block-size", "4MiB", "--copies", "2"]);
    sandbox.add_volume("a");
    sandbox.add_volume("b");
    let text = data::Seeded::new(402).text(3 << 20);
    fs::write(sandbox.source.join("text"), text).unwrap();
    sandbox.backup();
    let tree = Tree::of(&sandbox.source);
    // As if another compressor had come: the level that is asked for is another.
    let sql = "UPDATE settings SET v = 'zstd:19' WHERE k = 'compression'";
    let conn = rusqlite::Connection::open(&sandbox.catalog).unwrap();
    assert_eq!(conn.execute(sql, []), Ok(1));
    drop(conn);
    let (block, _) = sandbox.blocks("a")[0].clone();
    assert!(meta_of(&sandbox, &block)["frames"].as_array().unwrap().len() > 1);
    let twin = twin(&sandbox, &block, "b");
    flip(&block, 1000);
    fs::remove_file(&twin).unwrap();
    let said = repair(&sandbox, 0);
    assert_eq!(said["healed_count"], 2, "{said}");
    assert_eq!(said["healed"][0]["from"], "anew");
    assert_ne!(said["healed"][0]["now"], said["healed"][0]["block"]);
    assert!(!block.exists());
    assert_eq!(fs::read_dir(sandbox.path("a/damaged")).unwrap().count(), 1);
    assert_whole(&sandbox, &tree);
    // The manifests name what is there.
    for volume in ["a", "b"] {
        let path = sandbox.path(volume).join("manifests/run-00000001.jsonl.zst");
        let text = zstd::decode_all(fs::File::open(path).unwrap()).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(!text.contains(said["healed"][0]["block"].as_str().unwrap()));
        assert!(text.contains(said["healed"][0]["now"].as_str().unwrap()));
    }
    fs::write(sandbox.source.join("more"), "more").unwrap();
    sandbox.backup();
    assert_whole(&sandbox, &tree);
}

#[test]
fn indexes_metas_and_manifests_are_written_again() {
    let (sandbox, tree) = twins(&[]);
    let index = sandbox.path("a/.rt_volume_index");
    let original = fs::read(&index).unwrap();
    let middle = original.len() as u64 / 2;
    let whole_again = |what: &str| {
        let said = repair(&sandbox, 0);
        assert_eq!(said["indexes"].as_array().unwrap().len(), 1, "{what}: {said}");
        assert_eq!(fs::read(&index).unwrap(), original, "{what}");
        assert_whole(&sandbox, &tree);
    };
    flip(&index, middle);
    whole_again("a flipped byte");
    flip(&index, 2);
    whole_again("the first record");
    fs::write(&index, &original[..middle as usize]).unwrap();
    whole_again("cut off");
    fs::remove_file(&index).unwrap();
    whole_again("gone");
    fs::write(&index, b"").unwrap();
    whole_again("empty");
    // Without the other one too.
    flip(&index, middle);
    fs::write(sandbox.path("b/.rt_volume_index"), b"").unwrap();
    let said = repair(&sandbox, 0);
    assert_eq!(said["indexes"].as_array().unwrap().len(), 2, "{said}");
    assert_whole(&sandbox, &tree);
    // With a block that is bad as well, and the meta that would say what is in it.
    flip(&index, middle);
    let (block, len) = sandbox.blocks("a")[1].clone();
    flip(&block, len / 2);
    fs::remove_dir_all(sandbox.path("a/meta")).unwrap();
    fs::create_dir(sandbox.path("a/meta")).unwrap();
    fs::remove_file(sandbox.path("b/manifests/run-00000001.jsonl.zst")).unwrap();
    let said = repair(&sandbox, 0);
    assert_eq!(said["healed_count"], 1, "{said}");
    assert!(said["documents"].as_u64().unwrap() > sandbox.blocks("a").len() as u64);
    assert_whole(&sandbox, &tree);
    sandbox.backup();
}

#[test]
fn a_volume_that_is_away_is_not_repaired_and_named() {
    let (sandbox, tree) = twins(&[]);
    let (block, len) = sandbox.blocks("a")[0].clone();
    fs::rename(sandbox.path("b"), sandbox.path("b.away")).unwrap();
    sandbox.run(["validate", "--repair"]).code(4);
    flip(&block, len / 2);
    fs::rename(&sandbox.source, sandbox.path("source.away")).unwrap();
    let said = repair(&sandbox, 5);
    let reason = said["unhealed"][0]["reason"].as_str().unwrap();
    assert!(reason.contains(sandbox.path("b").to_str().unwrap()), "{reason}");
    fs::rename(sandbox.path("b.away"), sandbox.path("b")).unwrap();
    repair(&sandbox, 0);
    assert_whole(&sandbox, &tree);
}

#[test]
fn a_repair_that_is_killed_anywhere_goes_on() {
    let (sandbox, tree) = twins(&[]);
    let blocks = sandbox.blocks("a");
    for (how, (block, _)) in blocks.iter().enumerate() {
        harm(&sandbox, &twin(&sandbox, block, if how % 3 == 0 { "a" } else { "b" }), how);
        if how % 4 == 1 && how % 3 != 0 {
            harm(&sandbox, &twin(&sandbox, block, "a"), 0);
        }
    }
    flip(&sandbox.path("b/.rt_volume_index"), 40);
    for n in 0..14 {
        let mut child = sandbox.program().args(["validate", "--repair"]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(8 * n));
        let _ = child.kill();
        child.wait().unwrap();
    }
    sandbox.run(["validate", "--repair"]).code(0);
    assert_whole(&sandbox, &tree);
    for (block, len) in blocks {
        for volume in ["a", "b"] {
            let found = fs::metadata(twin(&sandbox, &block, volume)).unwrap();
            assert_eq!(found.size(), len);
        }
    }
    sandbox.backup();
}

#[test]
fn shared_bytes_come_from_the_copy_that_is_good() {
    let sandbox = Sandbox::bare();
    let make = ["mkfs.xfs", "-q", "-m", "reflink=1"];
    let _disk = crate::common::disk::Disk::new(&sandbox, "disk", 320, &make);
    sandbox.init(&["--block-size", "16MiB", "--compression", "none", "--copies", "2"]);
    sandbox.add_volume("disk/a");
    sandbox.add_volume("disk/b");
    data::noise_file(&sandbox.source.join("large"), 403, 9 << 20);
    sandbox.backup();
    let tree = Tree::of(&sandbox.source);
    let (block, _) = sandbox.blocks("disk/a")[0].clone();
    flip(&block, 3_000_000);
    let out = sandbox.path("disk/out");
    sandbox.ok(args!["revert-to-run", "1", &out]);
    assert_same(&tree, &Tree::of(&out));
}

#[test]
fn all_that_stands_beside_the_blocks_comes_back() {
    let sandbox = Sandbox::new();
    sandbox.add_volume("empty");
    data::mixed_tree(&sandbox.source, 871, 30);
    sandbox.backup();
    let before = Tree::of(&sandbox.source);
    for volume in ["volume", "empty"] {
        for folder in ["meta", "manifests", "catalog"] {
            fs::remove_dir_all(sandbox.path(volume).join(folder)).unwrap();
        }
        fs::remove_file(sandbox.path(volume).join(".rt_volume_index")).unwrap();
    }
    sandbox.run(["validate"]).code(5);
    sandbox.ok(["validate", "--repair"]);
    sandbox.assert_valid();
    fs::write(sandbox.source.join("later"), "later").unwrap();
    sandbox.backup();
    sandbox.assert_valid();
    let volumes = args!["--volumes", &sandbox.path("volume"), &sandbox.path("empty")];
    let new = sandbox.path("new");
    let line = args!["rebuildmeta", "--catalog", &new].into_iter().chain(volumes);
    sandbox.ok(line);
    sandbox.ok(args!["revert-to-run", "1", &sandbox.path("back"), "--catalog", &new]);
    assert_same(&before, &Tree::of(&sandbox.path("back")));
}
