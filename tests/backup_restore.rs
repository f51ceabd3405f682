//! What is backed up comes back, by every way out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{Sandbox, Tree, args, assert_same, data, number_from_env, run, tool};

/// Directories of real files that most machines where this is built have.
fn real_places() -> Vec<PathBuf> {
    let cargo = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo = cargo.or_else(|| std::env::home_dir().map(|it| it.join(".cargo")));
    let mut places = Vec::new();
    for index in fs::read_dir(cargo.unwrap_or_default().join("registry/src")).into_iter().flatten()
    {
        places.extend(fs::read_dir(index.unwrap().path()).unwrap().map(|it| it.unwrap().path()));
    }
    places.extend(fs::read_dir("/usr/share").unwrap().map(|it| it.unwrap().path()));
    places.sort();
    places.into_iter().filter(|it| it.is_dir() && !it.is_symlink()).collect()
}

fn count_files(dir: &Path) -> u64 {
    let mut count = 0;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(it) if it.is_dir() => count += count_files(&entry.path()),
            _ => count += 1,
        }
    }
    count
}

/// Fills `dest` with copies of real directories until it has about `wanted` files.
pub fn real_tree(dest: &Path, wanted: u64) -> u64 {
    let mut count = 0;
    for place in real_places() {
        let here = count_files(&place);
        // One huge directory must not take all the room.
        if here == 0 || here > wanted.div_ceil(2) {
            continue;
        }
        tool("cp", args!["-a", &place, dest]);
        count += here;
        if count >= wanted {
            break;
        }
    }
    assert!(
        count * 4 >= wanted,
        "only {count} of {wanted} files in the cargo registry and /usr/share"
    );
    count
}

/// rsync finds nothing to do, comparing contents.
#[track_caller]
pub fn assert_rsync_quiet(from: &Path, to: &Path) {
    let slash = |path: &Path| {
        let mut path = path.as_os_str().to_os_string();
        path.push("/");
        path
    };
    let options = ["-naAXHic", "--delete", "--numeric-ids", "--modify-window=-1"];
    let ran = tool("rsync", options.iter().map(Into::into).chain([slash(from), slash(to)]));
    assert_eq!(ran.text(), "", "rsync from {} to {}", from.display(), to.display());
}

#[track_caller]
fn assert_diff_quiet(from: &Path, to: &Path) {
    let ran = tool("diff", args!["-r", "--no-dereference", from, to]);
    assert_eq!(ran.text(), "");
}

#[test]
fn a_real_tree_comes_back_by_every_way_out() {
    let sandbox = Sandbox::new();
    let files = real_tree(&sandbox.source, number_from_env("RAIDTAPE_TEST_FILES", 8_000));
    let said = sandbox.backup();
    assert_eq!(said["problems"], 0);
    assert_eq!(said["added"].as_u64(), Some(files));

    let mount = sandbox.mount();
    let snapshot = mount.run(1);
    assert_diff_quiet(&sandbox.source, &snapshot);
    assert_rsync_quiet(&sandbox.source, &snapshot);
    let copy = sandbox.path("copy");
    tool("cp", args!["-a", &snapshot, &copy]);
    assert_rsync_quiet(&sandbox.source, &copy);
    fs::remove_dir_all(&copy).unwrap();

    let source = Tree::of(&sandbox.source);
    let reverted = sandbox.revert(1, "reverted");
    assert_same(&source, &Tree::of(&reverted));
    fs::remove_dir_all(&reverted).unwrap();
    let folder = sandbox.path("folder");
    sandbox.ok(args!["restore-folder", &sandbox.source, &folder]);
    assert_same(&source, &Tree::of(&folder));
    mount.end();
}

#[test]
fn every_setting_of_init_keeps_the_bytes() {
    for init in [
        &["--hash-algo", "sha256"][..],
        &["--compression", "none"],
        &["--compression", "zstd:19"],
        &["--chunking", "fixed", "--chunk-size", "4KiB", "--block-size", "1MiB"],
        &["--chunk-size", "4KiB", "--block-size", "1MiB", "--compression", "none"],
        &["--chunking", "fixed", "--block-size", "128MiB"],
    ] {
        let sandbox = Sandbox::with(init);
        data::mixed_tree(&sandbox.source, 7, 60);
        data::noise_file(&sandbox.source.join("large"), 8, 9 << 20);
        fs::write(sandbox.source.join("zeros"), vec![0; 9 << 20]).unwrap();
        sandbox.backup();
        let source = Tree::of(&sandbox.source);
        assert_same(&source, &Tree::of(&sandbox.revert(1, "reverted")));
        sandbox.assert_valid();
        let mount = sandbox.mount();
        assert_same(&source, &Tree::of(&mount.run(1)));
    }
}

#[test]
fn one_thread_and_many_keep_the_same_tree() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 3, 200);
    data::noise_file(&sandbox.source.join("large"), 4, 20 << 20);
    let alone = sandbox.backup_with(&["--as", "alone", "--single-threaded"]);
    let many =
        sandbox.backup_with(&["--as", "many", "--max-workers", "16", "--max-write-workers", "2"]);
    assert_eq!(many["bytes_stored"], 0, "the second copy of the same data");
    assert_eq!(alone["files"], many["files"]);
    let source = Tree::of(&sandbox.source);
    assert_same(&source, &Tree::of(&sandbox.revert(1, "one")));
    assert_same(&source, &Tree::of(&sandbox.revert(2, "two")));
}

#[test]
fn the_same_bytes_are_stored_once() {
    let sandbox = Sandbox::new();
    data::noise_file(&sandbox.source.join("one"), 5, 10 << 20);
    fs::copy(sandbox.source.join("one"), sandbox.source.join("two")).unwrap();
    let shifted = [b"in front".to_vec(), fs::read(sandbox.source.join("one")).unwrap()].concat();
    fs::write(sandbox.source.join("shifted"), shifted).unwrap();
    sandbox.backup();
    let stored = sandbox.stored("volume");
    assert!(stored < 11 << 20, "{stored} bytes for three times the same 10 MiB");
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&sandbox.revert(1, "out")));
}

#[test]
fn what_is_left_out_is_left_out() {
    let sandbox = Sandbox::new();
    for dir in ["keep", "cache", "keep/cache"] {
        fs::create_dir_all(sandbox.source.join(dir)).unwrap();
        fs::write(sandbox.source.join(dir).join("a.txt"), dir).unwrap();
        fs::write(sandbox.source.join(dir).join("a.o"), dir).unwrap();
    }
    sandbox.backup_with(&["--exclude", "*.o", "--exclude", "/cache"]);
    let expected = Tree::of(&sandbox.source)
        .without(|path, _| path.ends_with(b".o") || path.starts_with(b"cache"));
    assert_same(&expected, &Tree::of(&sandbox.revert(1, "out")));
}

#[test]
fn the_store_is_left_out_of_a_source_around_it() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.path("beside"), "x").unwrap();
    let base = sandbox.path("");
    sandbox.ok(args!["backup", &base]);
    let listed = sandbox.ok(["ls", "1", "--json"]).json_lines();
    let names: Vec<&str> = listed.iter().map(|it| it["path"].as_str().unwrap()).collect();
    assert_eq!(names, ["beside", "source"]);
    let inside = sandbox.path("volume").join("meta");
    run(sandbox.program().arg("backup").arg(inside)).code(2);
}

#[test]
fn restores_lie_where_they_were_asked_for() {
    let sandbox = Sandbox::new();
    fs::create_dir_all(sandbox.source.join("a/b")).unwrap();
    fs::write(sandbox.source.join("a/b/file"), "first").unwrap();
    sandbox.backup();
    fs::write(sandbox.source.join("a/b/file"), "second").unwrap();
    sandbox.backup();
    let out = sandbox.path("out");
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    // The newest run, to a new name below a directory that is not there yet.
    sandbox.ok(args!["restore", "a/b/file", &out.join("new")]);
    assert_eq!(read(&out.join("new")), "second");
    // An earlier run, into a directory, by the absolute path.
    sandbox.ok(args!["restore", &sandbox.source.join("a/b/file"), &out, "--run", "1"]);
    assert_eq!(read(&out.join("file")), "first");
    // To a relative name, in the directory at hand; over what is there.
    let mut command = Command::new(crate::common::RAIDTAPE);
    command.arg("--catalog").arg(&sandbox.catalog).current_dir(&out);
    run(command.args(["restore", "a/b/file", "file"])).code(0);
    assert_eq!(read(&out.join("file")), "second");
    // A folder, merged into what is there.
    fs::create_dir_all(out.join("folder")).unwrap();
    fs::write(out.join("folder/own"), "stays").unwrap();
    sandbox.ok(args!["restore-folder", "a", &out.join("folder"), "--run", "1"]);
    assert_eq!(read(&out.join("folder/b/file")), "first");
    assert_eq!(read(&out.join("folder/own")), "stays");
    // A file is no folder and the other way round; what is not there is not there.
    sandbox.run(args!["restore", "a", &out]).code(2);
    sandbox.run(args!["restore-folder", "a/b/file", &out]).code(2);
    sandbox.run(args!["restore", "a/none", &out]).code(1);
    sandbox.run(args!["restore", "a/b/file", &out, "--run", "9"]).code(1);
}

#[test]
fn a_changed_setuid_program_comes_back_as_it_was() {
    crate::common::need_root("it makes files of other owners");
    let sandbox = Sandbox::new();
    let program = sandbox.source.join("program");
    fs::copy("/bin/true", &program).unwrap();
    std::os::unix::fs::chown(&program, Some(1234), Some(2345)).unwrap();
    tool("chmod", args!["6755", &program]);
    sandbox.backup();
    let out = sandbox.revert(1, "out");
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&out));
    run(&mut Command::new(out.join("program"))).code(0);
    let mount = sandbox.mount();
    run(&mut Command::new(mount.run(1).join("program"))).code(0);
}

#[test]
fn chunks_too_long_for_memory_are_stored_once_and_come_back() {
    let sandbox = Sandbox::with(&[
        "--chunking",
        "fixed",
        "--chunk-size",
        "20MiB",
        "--block-size",
        "24MiB",
        "--compression",
        "none",
    ]);
    data::noise_file(&sandbox.source.join("long"), 301, 50 << 20);
    fs::copy(sandbox.source.join("long"), sandbox.source.join("same")).unwrap();
    data::noise_file(&sandbox.source.join("medium"), 302, 9 << 20);
    data::mixed_tree(&sandbox.source, 303, 50);
    let said = sandbox.backup();
    let stored = said["bytes_stored"].as_u64().unwrap();
    assert!((59 << 20..70 << 20).contains(&stored), "the copy has to cost nothing: {said}");
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&sandbox.revert(1, "out")));
    // A raw file of its own is its block, byte for byte.
    let medium = fs::read(sandbox.source.join("medium")).unwrap();
    let blocks = sandbox.blocks("volume");
    assert!(blocks.iter().any(|(path, _)| fs::read(path).unwrap() == medium));
    sandbox.assert_valid();
}

#[test]
fn a_restore_that_fails_leaves_what_was_there() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("f"), b"as backed up").unwrap();
    std::os::unix::fs::symlink("f", sandbox.source.join("link")).unwrap();
    sandbox.backup();
    let target = sandbox.path("target");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("f"), b"edited since").unwrap();
    fs::write(target.join("link"), b"a file now").unwrap();
    let volume = sandbox.path("volume");
    let away = sandbox.path("away");
    fs::rename(&volume, &away).unwrap();
    sandbox.run(args!["restore", "f", target.join("f")]).code(4);
    assert_eq!(fs::read(target.join("f")).unwrap(), b"edited since");
    fs::rename(&away, &volume).unwrap();
    sandbox.ok(args!["restore-folder", ".", &target]);
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&target));
}
