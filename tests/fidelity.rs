//! Nothing of a file is lost: the torture tree on several file systems, by mount and by restore.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use raidtape::catalog::Reader;
use serde_json::{Value, json};

use crate::common::torture::{self, BTRFS, Disk, EXT4, Kind, XFS};
use crate::common::{
    NOBODY, RAIDTAPE, Sandbox, Tree, args, assert_same, mount, name_of, need_root, need_tool, run,
    tool,
};

/// rsync finds nothing to do, comparing contents, but for the files that it would read for hours.
#[track_caller]
fn assert_rsync_quiet(from: &Path, to: &Path) {
    let mut line = args!["-naAXHic", "--delete", "--numeric-ids", "--modify-window=-1"].to_vec();
    line.extend(args!["--exclude=*.large", from.join(""), to.join("")]);
    assert_eq!(tool("rsync", line).text(), "", "rsync from {from:?} to {to:?}");
}

/// The torture tree on a disk of this kind, with a sandbox whose source it is.
fn tortured(kind: &Kind) -> (Sandbox, Disk) {
    let mut sandbox = Sandbox::new();
    let disk = Disk::new(&sandbox, "disk", kind);
    sandbox.source = disk.point.join("source");
    let outside = disk.point.join("outside");
    fs::create_dir(&sandbox.source).unwrap();
    fs::create_dir(&outside).unwrap();
    torture::build(&sandbox.source, &outside, kind);
    (sandbox, disk)
}

#[track_caller]
fn assert_torture_comes_back(kind: &Kind) {
    let (sandbox, disk) = tortured(kind);
    let source = Tree::of(&sandbox.source);
    let said = sandbox.backup();
    assert_eq!(said["problems"], 0, "{said}");
    let mount = sandbox.mount();
    assert_same(&source, &Tree::of(&mount.run(1)));
    let room = fs::metadata(mount.run(1).join("contents/tebibyte of hole.large")).unwrap();
    assert_eq!((room.len(), room.blocks()), (1 << 40, 0));

    let out = sandbox.revert(1, "disk/out");
    let mut restored = source.clone();
    // The name that it had outside is not made again.
    let lone = restored.0.get_mut(&b"links/one/with a name outside"[..]).unwrap();
    (lone.links, lone.first_name) = (1, None);
    assert_same(&restored, &Tree::of(&out));
    assert_rsync_quiet(&sandbox.source, &mount.run(1));
    assert_rsync_quiet(&sandbox.source, &out);
    sandbox.assert_valid();
    // Another look finds nothing new, and what was read is as it was.
    let again = sandbox.backup();
    assert_eq!(
        (&again["added"], &again["modified"], &again["bytes_stored"]),
        (&json!(0), &json!(0), &json!(0))
    );
    assert_same(&source, &Tree::of(&sandbox.source));
    mount.end();
    drop(disk);
}

#[test]
fn the_torture_tree_on_ext4() {
    assert_torture_comes_back(&EXT4);
}

#[test]
fn the_torture_tree_on_xfs() {
    assert_torture_comes_back(&XFS);
}

#[test]
fn the_torture_tree_on_btrfs() {
    assert_torture_comes_back(&BTRFS);
}

/// A command of the program with no more than this many files open, by force.
fn with_files(sandbox: &Sandbox, files: u32) -> Command {
    need_tool("prlimit");
    let mut command = Command::new("prlimit");
    command.arg(format!("--nofile={files}:{files}")).arg("--").arg(RAIDTAPE);
    command.arg("--catalog").arg(&sandbox.catalog);
    command
}

#[test]
fn a_thousand_levels_with_few_descriptors() {
    let sandbox = Sandbox::new();
    // Beside the chain, so that there is something to go back to.
    for name in ["a first", "z last"] {
        fs::write(sandbox.source.join(name), name).unwrap();
    }
    torture::chain(&sandbox.source, 1_000, "directory");
    let source = Tree::of(&sandbox.source);
    assert!(source.0.keys().any(|path| path.len() > 10_000));
    let backup = |sandbox: &Sandbox, files| {
        let mut command = with_files(sandbox, files);
        run(command.arg("backup").arg(&sandbox.source).arg("--json")).code(0).json()
    };
    let said = backup(&sandbox, 256);
    assert_eq!((&said["added"], &said["dirs"]["added"]), (&json!(12), &json!(1_001)));
    let said = backup(&sandbox, 256);
    assert_eq!((&said["unchanged"], &said["dirs"]["unchanged"]), (&json!(12), &json!(1_001)));
    let listed = sandbox.ok(["list-changes", "1", "--json"]).json_lines();
    let longest = listed.iter().map(|it| name_of(it, "path").len()).max().unwrap();
    assert_eq!(longest, 1_000 * 10 + "zfile".len());

    let mount = sandbox.mount();
    assert_same(&source, &Tree::of(&mount.run(1)));
    mount.end();
    let out = sandbox.path("out");
    let mut command = with_files(&sandbox, 1_024);
    run(command.arg("revert-to-run").arg("1").arg(&out)).code(0);
    assert_same(&source, &Tree::of(&out));
    torture::remove(&out);
    // All of it goes at once.
    torture::remove(&sandbox.source.join("directory"));
    let said = backup(&sandbox, 256);
    assert_eq!((&said["deleted"], &said["dirs"]["deleted"]), (&json!(10), &json!(1_000)));
    sandbox.assert_valid();
}

#[test]
fn a_deep_tree_that_is_moved_away_meanwhile_is_told_and_the_rest_goes_on() {
    use crate::common::mirror::{Mirror, Op};
    let mut sandbox = Sandbox::new();
    let behind = sandbox.path("behind");
    fs::create_dir_all(&behind).unwrap();
    torture::chain(&behind, 60, "d");
    for dir in ["", "d/", "d/d/"] {
        fs::write(behind.join(dir).join("zz last"), "x").unwrap();
    }
    let deepest = ["d"; 60].join("/");
    let (from, to) = (behind.join("d/d"), behind.join("moved"));
    let hook = move |op, path: &str, _| {
        if op == Op::List && path == deepest {
            // The way back is not the way that led here any more.
            fs::rename(&from, &to).unwrap();
            fs::create_dir(&from).unwrap();
        }
        None
    };
    let mirror = Mirror::new(&behind, &sandbox.path("mirror"), Box::new(hook));
    sandbox.source = mirror.point.clone();
    let ran = sandbox.run(args!["backup", &sandbox.source, "--json"]).code(3);
    let said = ran.json();
    let problems = said["problem_list"].as_array().unwrap();
    let told = |it: &Value| it["message"].as_str().unwrap().starts_with("going back to it");
    assert!(problems.iter().any(told), "{said}");
    let listed = sandbox.ok(["list-changes", "1", "--json"]).json_lines();
    let added: Vec<_> = listed.iter().map(|it| name_of(it, "path")).collect();
    assert!(added.contains(&b"zz last".to_vec()) && added.contains(&b"d/zz last".to_vec()));
}

#[test]
fn reading_leaves_no_trace_in_times_of_access() {
    need_root("who owns nothing may not read without a trace");
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.source.join("dir")).unwrap();
    for name in ["dir/file", "large"] {
        fs::write(sandbox.source.join(name), vec![7; 9 << 20]).unwrap();
    }
    let paths = ["dir/file", "large", "dir", ""].map(|it| sandbox.source.join(it));
    for path in &paths {
        tool("touch", args!["-a", "-d", "2001-01-01", path]);
    }
    // A read with a trace would be seen here.
    fs::write(sandbox.path("probe"), "x").unwrap();
    tool("touch", args!["-a", "-d", "2001-01-01", sandbox.path("probe")]);
    let atime = |path: &Path| fs::metadata(path).unwrap().atime();
    let before = paths.clone().map(|it| atime(&it));
    fs::read(sandbox.path("probe")).unwrap();
    assert_ne!(atime(&sandbox.path("probe")), before[0], "the file system here keeps no atime");
    sandbox.backup();
    assert_eq!(paths.map(|it| atime(&it)), before);
}

#[test]
fn a_changed_flag_alone_is_a_change() {
    let mut sandbox = Sandbox::new();
    let disk = Disk::new(&sandbox, "disk", &EXT4);
    sandbox.source = disk.point.join("source");
    fs::create_dir_all(sandbox.source.join("dir")).unwrap();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    sandbox.backup();
    for name in ["file", "dir"] {
        tool("chattr", args!["+dA", sandbox.source.join(name)]);
    }
    let said = sandbox.backup();
    assert_eq!((&said["modified"], &said["dirs"]["modified"]), (&json!(1), &json!(1)), "{said}");
    let out = sandbox.revert(2, "disk/out");
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&out));
    let mount = sandbox.mount();
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&mount.run(2)));
    let shown = tool("lsattr", args!["-d", mount.run(2).join("file"), mount.run(2).join("dir")]);
    assert_eq!(shown.text().lines().filter(|it| it.starts_with("------dA---")).count(), 2);
    mount.end();
    // A single file has its flags too, though it had other names.
    fs::hard_link(sandbox.source.join("file"), sandbox.source.join("other")).unwrap();
    sandbox.backup();
    sandbox.ok(args!["restore", "other", disk.point.join("single")]);
    let single = tool("lsattr", args!["-d", disk.point.join("single")]);
    assert!(single.text().starts_with("------dA---"), "{}", single.text());
}

#[test]
fn flags_that_cannot_be_set_are_named() {
    let mut sandbox = Sandbox::new();
    let disk = Disk::new(&sandbox, "disk", &EXT4);
    sandbox.source = disk.point.join("source");
    fs::create_dir(&sandbox.source).unwrap();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    fs::write(sandbox.source.join("plain"), "x").unwrap();
    tool("chattr", args!["+iA", sandbox.source.join("file")]);
    sandbox.backup();
    // A file system without flags.
    let ram = sandbox.path("ram");
    fs::create_dir(&ram).unwrap();
    tool("mount", args!["-t", "ramfs", "none", &ram]);
    let _clear = mount::Clear(ram.clone());
    let ran = sandbox.run(args!["revert-to-run", "1", ram.join("out")]).code(3);
    let errors = ran.errors();
    assert!(errors.contains("file flags") && errors.contains("Ai"), "{errors}");
    assert_eq!(fs::read(ram.join("out/file")).unwrap(), b"x");
}

#[test]
fn an_ordinary_user_restores_what_is_permitted_and_is_told_the_rest() {
    need_root("it makes a file immutable");
    let sandbox = Sandbox::of_nobody();
    let file = sandbox.source.join("file");
    fs::write(&file, "x").unwrap();
    chown(&file, Some(NOBODY), Some(NOBODY)).unwrap();
    tool("chattr", args!["+idA", &file]);
    let said = sandbox.run(args!["backup", &sandbox.source, "--json"]).code(0).json();
    tool("chattr", args!["-i", &file]);
    assert_eq!(said["problems"], 0);
    let out = sandbox.path("out");
    fs::create_dir(&out).unwrap();
    chown(&out, Some(NOBODY), Some(NOBODY)).unwrap();
    let ran = sandbox.run(args!["restore", "file", out.join("file")]).code(3);
    assert!(ran.errors().contains("file flags"), "{}", ran.errors());
    let flags = tool("lsattr", args!["-d", out.join("file")]).text();
    assert!(flags.starts_with("------dA---"), "{flags}");
}

/// The lines of a run's manifest.
fn manifest(sandbox: &Sandbox, run: i64) -> Vec<Value> {
    let path = sandbox.path("volume").join(format!("manifests/run-{run:08}.jsonl.zst"));
    let text = zstd::decode_all(File::open(path).unwrap()).unwrap();
    let text = String::from_utf8(text).unwrap();
    text.lines().map(|it| serde_json::from_str(it).unwrap()).collect()
}

#[test]
fn names_of_owners_are_kept_with_the_run_and_in_its_manifest() {
    need_root("it makes files of other owners");
    let sandbox = Sandbox::new();
    let nobody = tool("id", ["-nu", "65534"]).text().trim().to_owned();
    for (name, uid, gid) in [("root", 0, 0), ("nobody", NOBODY, 1), ("unknown", 4_242_424, 1)] {
        fs::write(sandbox.source.join(name), name).unwrap();
        chown(sandbox.source.join(name), Some(uid), Some(gid)).unwrap();
    }
    sandbox.backup();
    let reader = Reader::open(&sandbox.catalog).unwrap();
    let known = |kind, id, run| {
        let name = reader.owner_name(kind, id, run).unwrap();
        name.map(|it| String::from_utf8(it).unwrap())
    };
    assert_eq!(known("user", 0, 1).as_deref(), Some("root"));
    assert_eq!(known("user", NOBODY, 1), Some(nobody.clone()));
    assert_eq!(known("group", 1, 1).as_deref(), Some("daemon"));
    // One that the system does not know is kept as a number, and comes back.
    assert_eq!(known("user", 4_242_424, 1), None);
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&sandbox.revert(1, "out")));
    let owners = |run| -> BTreeMap<(String, u64), String> {
        let lines = manifest(&sandbox, run);
        let changes = lines.last().unwrap()["changes"].as_u64().unwrap();
        assert_eq!(changes, lines.len() as u64 - 2);
        let owners = lines.iter().filter(|it| it["op"] == "owner");
        owners
            .map(|it| {
                let key = (it["kind"].as_str().unwrap().to_owned(), it["id"].as_u64().unwrap());
                (key, it["name"].as_str().unwrap().to_owned())
            })
            .collect()
    };
    let expected = [("user", 0, "root"), ("user", 65_534, &nobody), ("group", 0, "root")];
    let mut expected: BTreeMap<_, _> =
        expected.map(|(kind, id, name)| ((kind.to_owned(), id), name.to_owned())).into();
    expected.insert(("group".to_owned(), 1), "daemon".to_owned());
    assert_eq!(owners(1), expected);
    // What is known is not said again, and stays known.
    fs::write(sandbox.source.join("root"), "changed").unwrap();
    sandbox.backup();
    assert_eq!(owners(2), BTreeMap::new());
    assert_eq!(known("user", NOBODY, 2), Some(nobody));
}

#[test]
fn flags_are_in_the_manifest() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    tool("chattr", args!["+dA", sandbox.source.join("file")]);
    sandbox.backup();
    let lines = manifest(&sandbox, 1);
    let line = lines.iter().find(|it| it["path"] == "file").unwrap();
    assert_eq!(line["flags"], "dA");
    assert!(lines.iter().filter(|it| it["path"] == "").all(|it| it.get("flags").is_none()));
}

#[test]
fn a_file_system_mounted_inside_is_kept_or_left_out_as_asked() {
    need_root("it mounts a file system");
    let sandbox = Sandbox::new();
    let inner = sandbox.source.join("inner");
    fs::create_dir(&inner).unwrap();
    tool("mount", args!["-t", "tmpfs", "-o", "size=1m,mode=750", "none", &inner]);
    let _clear = mount::Clear(inner.clone());
    fs::create_dir(inner.join("dir")).unwrap();
    fs::write(inner.join("dir/file"), "x").unwrap();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    let whole = Tree::of(&sandbox.source);
    sandbox.backup();
    assert_same(&whole, &Tree::of(&sandbox.revert(1, "whole")));
    sandbox.backup_with(&["--one-file-system"]);
    let outer = whole.without(|path, _| path.starts_with(b"inner/"));
    assert_same(&outer, &Tree::of(&sandbox.revert(2, "outer")));
}

#[test]
fn a_default_acl_of_the_target_is_not_handed_down() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.source.join("dir")).unwrap();
    for name in ["file", "dir/file"] {
        fs::write(sandbox.source.join(name), "x").unwrap();
        fs::set_permissions(sandbox.source.join(name), fs::Permissions::from_mode(0o640)).unwrap();
    }
    sandbox.backup();
    let out = sandbox.path("out");
    fs::create_dir(&out).unwrap();
    tool("setfacl", args!["-d", "-m", "u:1234:rwx", &out]);
    sandbox.ok(args!["revert-to-run", "1", &out]);
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&out));
}
