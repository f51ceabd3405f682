//! Stores that earlier programs wrote, and that this one opens, reads and goes on with.
//!
//! Invariant: a fixture is never written to and never made again; every test works on a copy.
//! `scripts/make-fixture` says how they are made and what the listing beside each one means.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;
use sha2::Digest;

use crate::common::tree::Node;
use crate::common::{
    RAIDTAPE, Sandbox, Tree, args, assert_same, name_of, need_root, path_of, run, tool,
};

/// Names of all fixtures.
fn fixtures() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(data())
        .unwrap()
        .filter_map(|it| {
            let name = it.unwrap().file_name().into_string().unwrap();
            name.strip_suffix(".tar.gz").map(str::to_owned)
        })
        .collect();
    names.sort();
    assert!(names.iter().any(|it| it == "schema-1"), "{names:?}");
    names
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// A copy of a fixture. Its volume is where the catalog expects it only after [`find_volume`].
fn unpack(name: &str) -> Sandbox {
    let sandbox = Sandbox::bare();
    let archive = data().join(format!("{name}.tar.gz"));
    tool("tar", args!["--no-same-owner", "-xpzf", &archive, "-C", &sandbox.path("")]);
    // A reader takes it as it is.
    sandbox.ok(["runs"]);
    sandbox
}

/// Tells the catalog where its volume is now.
fn find_volume(sandbox: &Sandbox) {
    sandbox.ok(args!["volumes", "--readopt", sandbox.path("volume")]);
}

/// The trees of all runs of a fixture, as the script that made it has written them down. Instead of
/// their content files have its SHA-256.
fn expected(name: &str) -> Vec<Tree> {
    let text = fs::read_to_string(data().join(format!("{name}.jsonl"))).unwrap();
    let mut trees: Vec<BTreeMap<Vec<u8>, Node>> = Vec::new();
    for line in text.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        let run = row["run"].as_u64().unwrap() as usize;
        trees.resize_with(trees.len().max(run), BTreeMap::new);
        let old = trees[run - 1].insert(bytes(&row["path_b64"]), node(&row));
        assert!(old.is_none(), "{line}");
    }
    assert!(trees.len() >= 2 && trees.iter().all(|it| it.len() > 30));
    trees.into_iter().map(Tree).collect()
}

fn bytes(value: &Value) -> Vec<u8> {
    BASE64.decode(value.as_str().unwrap()).unwrap()
}

fn node(row: &Value) -> Node {
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{row}"));
    let kind = ["file", "dir", "symlink", "fifo", "socket", "char", "block"]
        .into_iter()
        .find(|it| *it == row["kind"])
        .unwrap();
    let content = match kind {
        "file" => hex::decode(row["sha256"].as_str().unwrap()).unwrap(),
        "symlink" => bytes(&row["target_b64"]),
        _ => Vec::new(),
    };
    let size = match kind {
        "file" => number(&row["size"]),
        "symlink" => content.len() as u64,
        _ => 0,
    };
    let device = row["device"]
        .as_array()
        .map_or(0, |it| rustix::fs::makedev(number(&it[0]) as u32, number(&it[1]) as u32));
    let no_xattrs = serde_json::Map::new();
    let xattrs = row["xattrs_b64"].as_object().unwrap_or(&no_xattrs);
    Node {
        kind,
        mode: number(&row["mode"]) as u32,
        owner: (number(&row["owner"][0]) as u32, number(&row["owner"][1]) as u32),
        mtime: (row["mtime"][0].as_i64().unwrap(), number(&row["mtime"][1])),
        size,
        rdev: device,
        links: row["links"].as_u64().unwrap_or(1),
        first_name: row["first_name_b64"].is_string().then(|| bytes(&row["first_name_b64"])),
        content,
        data: Vec::new(),
        xattrs: xattrs.iter().map(|it| (it.0.as_bytes().to_vec(), bytes(it.1))).collect(),
        flags: 0,
    }
}

/// A tree on a disk or in a mount, files by their SHA-256.
fn tree(root: &Path) -> Tree {
    let mut tree = Tree::of(root);
    for (path, node) in &mut tree.0 {
        // Where the holes are is looked at apart.
        node.data.clear();
        if node.kind == "file" {
            let mut hasher = sha2::Sha256::new();
            let mut file = File::open(root.join(path_of(path))).unwrap();
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut file, &mut content).unwrap();
            hasher.update(&content);
            node.content = hasher.finalize().to_vec();
        }
    }
    tree
}

#[test]
fn a_fixture_comes_back_by_mount_and_restore() {
    need_root("fixtures have owners and device nodes");
    for name in fixtures() {
        let sandbox = unpack(&name);
        find_volume(&sandbox);
        let trees = expected(&name);
        let runs = sandbox.ok(["runs", "--json"]).json();
        let tags: Vec<&Value> = runs.as_array().unwrap().iter().map(|it| &it["tags"][0]).collect();
        assert_eq!(tags, ["first", "second"], "{name}");
        assert!(runs.as_array().unwrap().iter().all(|it| it["source"] == "fixture"));
        sandbox.assert_valid();
        let mount = sandbox.mount();
        for (run, expected) in (1..).zip(&trees) {
            assert_same(expected, &tree(&mount.run(run)));
            let restored = sandbox.revert(run, &format!("{name}-{run}"));
            assert_same(expected, &tree(&restored));
            // Its holes are still holes.
            let sparse = fs::metadata(restored.join("sparse")).unwrap();
            assert!(std::os::unix::fs::MetadataExt::blocks(&sparse) * 512 < sparse.len() / 4);
        }
        mount.end();
        let lines = sandbox.ok(["list-changes", "2", "--json"]).json_lines();
        let told =
            lines.iter().map(|it| (name_of(it, "path"), it["change"].as_str().unwrap().to_owned()));
        let told: BTreeMap<Vec<u8>, String> = told.collect();
        assert_eq!(told, differences(&trees[0], &trees[1]), "{name}");
        assert!(["added", "modified", "deleted"].iter().all(|it| told.values().any(|w| w == it)));
    }
}

/// What became of the entries of one tree in another. In a fixture nothing was touched without a
/// trace.
fn differences(old: &Tree, new: &Tree) -> BTreeMap<Vec<u8>, String> {
    let mut found = BTreeMap::new();
    for path in old.0.keys().chain(new.0.keys()) {
        let word = match (old.0.get(path), new.0.get(path)) {
            (Some(old), Some(new)) if old == new => continue,
            (Some(_), Some(_)) => "modified",
            (None, _) => "added",
            (_, None) => "deleted",
        };
        found.insert(path.clone(), word.to_owned());
    }
    assert!(found.len() < new.0.len());
    found
}

#[test]
fn a_run_goes_on_from_a_fixture() {
    need_root("fixtures have owners and device nodes");
    for name in fixtures() {
        let mut sandbox = unpack(&name);
        find_volume(&sandbox);
        let trees = expected(&name);
        let before = sandbox.stored("volume");
        // The last tree again, elsewhere: all its content is known.
        sandbox.source = sandbox.revert(2, "source again");
        let said = sandbox.backup_with(&["--as", "fixture"]);
        assert_eq!((said["run"].as_u64(), said["deleted"].as_u64()), (Some(3), Some(0)), "{said}");
        assert_eq!((said["added"].as_u64(), &said["dirs"]["added"]), (Some(0), &0.into()));
        assert_eq!(sandbox.stored("volume"), before, "{name}: known content was stored again");
        fs::write(sandbox.source.join("new"), "new in run 4").unwrap();
        let said = sandbox.backup_with(&["--as", "fixture"]);
        assert_eq!((said["run"].as_u64(), said["added"].as_u64()), (Some(4), Some(1)), "{said}");
        assert!(sandbox.stored("volume") > before);
        sandbox.assert_valid();
        let mount = sandbox.mount();
        let after = tree(&sandbox.source);
        let [first, second] = [&trees[0], &trees[1]];
        for (run, expected) in (1..).zip([first, second, second, &after]) {
            assert_same(expected, &tree(&mount.run(run)));
        }
        mount.end();
        assert_same(&after, &tree(&sandbox.revert(4, "out")));
    }
}

#[test]
fn a_volume_that_was_moved_is_missed_by_name() {
    for name in fixtures() {
        let sandbox = unpack(&name);
        let volumes = sandbox.ok(["volumes", "--json"]).json();
        assert_eq!(volumes[0]["path"], "/tmp/raidtape-fixture/volume");
        // What the catalog knows can be looked at; bytes cannot be had.
        assert!(sandbox.ok(["ls", "1"]).text().contains("noise"));
        let ran = sandbox.run(args!["restore", "noise", &sandbox.path("out")]).code(4);
        assert!(ran.errors().contains("/tmp/raidtape-fixture/volume"), "{}", ran.errors());
        sandbox.run(["validate"]).code(4);
        // Nothing is written into a catalog whose volumes are all away.
        fs::write(sandbox.source.join("file"), "new content").unwrap();
        sandbox.run(args!["backup", &sandbox.source]).code(4);
        assert_eq!(sandbox.ok(["runs", "--json"]).json().as_array().unwrap().len(), 2);
        find_volume(&sandbox);
        sandbox.ok(args!["restore", "noise", &sandbox.path("out")]);
        sandbox.assert_valid();
    }
}

#[test]
fn a_fixture_has_one_dump_before_and_after_it_is_brought_up_to_date() {
    for name in fixtures() {
        let sandbox = unpack(&name);
        let version = || -> i64 {
            let conn = rusqlite::Connection::open(&sandbox.catalog).unwrap();
            conn.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap()
        };
        let old = version();
        let before = sandbox.ok(["dump-catalog"]).text();
        assert_eq!(version(), old, "{name}: a reader has changed it");
        drop(raidtape::catalog::Writer::open(&sandbox.catalog).unwrap());
        assert!(version() > old, "{name}");
        assert!(before.contains("\n{\"op\":\"end\","));
        assert!(sandbox.ok(["dump-catalog"]).text() == before, "{name}");
    }
}

#[test]
fn a_fixture_without_its_catalog_comes_back() {
    need_root("fixtures have owners and device nodes");
    for name in fixtures() {
        let sandbox = unpack(&name);
        find_volume(&sandbox);
        let rebuild = |new: &str| {
            let mut command = std::process::Command::new(RAIDTAPE);
            command.arg("--catalog").arg(sandbox.path(new)).args(["rebuildmeta", "--json"]);
            run(command.arg("--volumes").arg(sandbox.path("volume")))
        };
        // What its program did not write down is said to be missing, and the trees are there.
        let said = rebuild("new").code(3).json_lines().pop().unwrap();
        assert_eq!((&said["runs"], &said["blocks_lacking"]), (&2.into(), &0.into()), "{said}");
        assert!(said["problem_list"].to_string().contains("earlier program"), "{said}");
        for (number, expected) in (1..).zip(expected(&name)) {
            let out = sandbox.path(&format!("{name} {number}"));
            let mut command = std::process::Command::new(RAIDTAPE);
            command.arg("--catalog").arg(sandbox.path("new"));
            run(command.args(args!["revert-to-run", number.to_string(), &out])).code(0);
            assert_same(&expected, &tree(&out));
        }
        // After one genmeta by this program everything comes back.
        sandbox.ok(["genmeta"]);
        let said = rebuild("whole").code(0).json_lines().pop().unwrap();
        assert_eq!(said["problems"], 0, "{said}");
        let dump = |catalog: &Path| {
            let mut out = Vec::new();
            let reader = raidtape::catalog::Reader::open(catalog).unwrap();
            reader.write_logical_dump(&mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        let (before, after) = (dump(&sandbox.catalog), dump(&sandbox.path("whole")));
        assert!(before == after, "{name}: {before}\n{after}");
    }
}
