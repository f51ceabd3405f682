//! The script on every volume: any file of any run comes back without the program.
//!
//! Invariant: the script runs with no more than the tools that it says it needs, each a link in a
//! directory that is its whole PATH.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{AtFlags, Timespec, Timestamps};

use crate::common::data::{self, Seeded};
use crate::common::disk::Disk;
use crate::common::{Ran, Sandbox, Tree, args, assert_same, need_root, need_tool, path_of, run};

/// What RESTORE.txt asks for: a shell, jq, zstd, and programs of coreutils.
const TOOLS: [&str; 25] = [
    "sh",
    "jq",
    "zstd",
    "base64",
    "cat",
    "chmod",
    "chown",
    "dd",
    "head",
    "id",
    "ln",
    "mkdir",
    "mkfifo",
    "mknod",
    "mktemp",
    "readlink",
    "rm",
    "sha256sum",
    "sort",
    "stat",
    "tac",
    "tail",
    "touch",
    "truncate",
    "wc",
];

/// Runs the script of a volume, which has nothing else than [`TOOLS`].
fn script(sandbox: &Sandbox, volume: &Path, line: &[OsString]) -> Ran {
    let bin = sandbox.path("bin");
    if !bin.exists() {
        fs::create_dir(&bin).unwrap();
        let path = std::env::var_os("PATH").unwrap();
        for name in TOOLS {
            need_tool(name);
            let found = std::env::split_paths(&path).map(|it| it.join(name));
            symlink(found.into_iter().find(|it| it.exists()).unwrap(), bin.join(name)).unwrap();
        }
        fs::create_dir(sandbox.path("temporary")).unwrap();
    }
    let mut command = Command::new(bin.join("sh"));
    command.arg(volume.join("restore.sh")).args(line).current_dir(sandbox.path(""));
    command.env_clear().env("PATH", &bin).env("TMPDIR", sandbox.path("temporary"));
    let ran = run(&mut command);
    assert_eq!(fs::read_dir(sandbox.path("temporary")).unwrap().count(), 0, "waste in TMPDIR");
    ran
}

/// What the script says that it does not restore: attributes, flags, sockets.
fn without_extras(tree: Tree) -> Tree {
    tree.without(|_, node| node.kind == "socket").with(|node| {
        node.xattrs.clear();
        node.flags = 0;
        // Where there is data inside a block of the file system is that one's own business.
        node.data.clear();
    })
}

fn set_mtime(path: &Path, secs: i64, nanos: i64) {
    let time = Timespec { tv_sec: secs, tv_nsec: nanos as _ };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn holed(path: &Path, size: u64, data: &[(u64, usize)]) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for (at, len) in data {
        file.write_all_at(&Seeded::new(*at).noise(*len), *at).unwrap();
    }
    file.sync_all().unwrap();
}

/// Names that a shell, a line, or text would break on.
fn odd_names() -> Vec<Vec<u8>> {
    let low = (1..128).filter(|it| *it != b'/').collect();
    let high = (128..=255).collect();
    let texts =
        ["-r", " ", "a  b ", "tab\t", "end\n", "\n", "'\"$x`y`*?[", "\\0101\\", "%41%s", "..."];
    let mut names = vec![low, high, b"\xff".to_vec(), "\u{e4}\u{20ac}\u{1f600}".into()];
    names.extend(texts.map(|it| it.as_bytes().to_vec()));
    names
}

/// A tree with everything that the script restores.
fn make(root: &Path) {
    let at = |name: &str| root.join(name);
    fs::create_dir_all(at("small/deep er/x")).unwrap();
    for number in 0..60u64 {
        let text = Seeded::new(number).text(1000 + number as usize * 200);
        fs::write(at(&format!("small/{number}")), text).unwrap();
    }
    // Its frames are raw and compressed in turn, and its blocks are many.
    let mut seeded = Seeded::new(1);
    let mut mixed = File::create(at("mixed")).unwrap();
    for _ in 0..4 {
        mixed.write_all(&seeded.noise(2 << 20)).unwrap();
        mixed.write_all(&seeded.text(2 << 20)).unwrap();
    }
    data::noise_file(&at("noise"), 2, 9 << 20);
    fs::write(at("text"), Seeded::new(3).text(9 << 20)).unwrap();
    for (number, name) in odd_names().into_iter().enumerate() {
        let dir = root.join("odd").join(path_of(&[b"d", &name[..name.len().min(200)]].concat()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(path_of(&name)), format!("{number}")).unwrap();
        symlink(path_of(&name), dir.join("link")).unwrap();
    }
    holed(&at("holes"), 9 << 20, &[(1 << 20, 70_000), (5 << 20, 3 << 20)]);
    holed(&at("only a hole"), 3 << 20, &[]);
    fs::write(at("empty"), "").unwrap();
    fs::hard_link(at("noise"), at("small/deep er/noise too")).unwrap();
    fs::hard_link(at("small/7"), at("small/deep er/x/7")).unwrap();
    symlink("/nowhere", at("dangling")).unwrap();
    symlink("small", at("to a folder")).unwrap();
    let fd = File::open(root).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o640);
    let node = |name, kind, dev| rustix::fs::mknodat(&fd, name, kind, mode, dev).unwrap();
    node("fifo", rustix::fs::FileType::Fifo, 0);
    let high = rustix::fs::makedev(4095, (1 << 20) - 1);
    node("device", rustix::fs::FileType::CharacterDevice, high);
    node("disk", rustix::fs::FileType::BlockDevice, rustix::fs::makedev(8, 257));
    chown(at("small/1"), Some(65534), Some(7)).unwrap();
    lchown(at("dangling"), Some(1), Some(2)).unwrap();
    for (name, mode) in [("small/2", 0o4711), ("small/3", 0), ("small/deep er", 0o2750)] {
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let times = [("small/4", -1, 999_999_999), ("small/5", -7, 1), ("dangling", 1, 5)];
    for (name, secs, nanos) in times.into_iter().chain([("small/deep er/x", 1 << 33, 0)]) {
        set_mtime(&at(name), secs, nanos);
    }
}

/// Later days of the same tree.
fn change(root: &Path, day: u64) {
    let at = |name: &str| root.join(name);
    if day == 1 {
        fs::rename(at("text"), at("small/text, moved")).unwrap();
        fs::remove_file(at("small/8")).unwrap();
        fs::hard_link(at("noise"), at("further name")).unwrap();
        fs::remove_file(at("small/deep er/noise too")).unwrap();
        fs::remove_file(at("empty")).unwrap();
        fs::create_dir(at("empty")).unwrap();
        fs::write(at("empty/no more"), "x").unwrap();
        let file = File::options().write(true).open(at("mixed")).unwrap();
        file.write_all_at(&Seeded::new(8).noise(100_000), 7 << 20).unwrap();
    } else {
        fs::rename(at("small"), at("large")).unwrap();
        fs::remove_dir_all(at("odd").join(path_of(b"d\xff"))).unwrap();
        fs::remove_dir_all(at("empty")).unwrap();
        fs::write(at("empty"), "a file again").unwrap();
        data::noise_file(&at("new"), 9, 12 << 20);
        fs::remove_file(at("to a folder")).unwrap();
        fs::create_dir_all(at("to a folder/not a link")).unwrap();
    }
}

#[test]
fn every_run_comes_back_without_the_program() {
    need_root("owners and devices");
    let sandbox = Sandbox::bare();
    // The first volume is full after a while.
    let _disk = Disk::ext4(&sandbox, "disk", 32);
    sandbox.init(&["--block-size", "4MiB", "--hash-algo", "sha256"]);
    let first = sandbox.add_volume("disk/volume");
    let second = sandbox.add_volume("second");
    make(&sandbox.source);
    let mut trees = Vec::new();
    for day in 1..=3 {
        sandbox.backup();
        trees.push(without_extras(Tree::of(&sandbox.source)));
        // A run of another source between, which is no business of theirs.
        let other = sandbox.path("other");
        fs::create_dir_all(&other).unwrap();
        fs::write(other.join("small"), format!("{day}")).unwrap();
        sandbox.ok(args!["backup", &other]);
        if day < 3 {
            change(&sandbox.source, day);
        }
    }
    assert!(!sandbox.blocks("disk/volume").is_empty() && !sandbox.blocks("second").is_empty());
    fs::rename(&sandbox.catalog, sandbox.path("out of sight")).unwrap();

    for (tree, run) in trees.iter().zip(["1", "3", "5"]) {
        let to = sandbox.path(&format!("all of {run}\n'"));
        let ran = script(&sandbox, &first, &args!["-v", &second, "get", run, "/", &to]).code(0);
        assert!(!ran.errors().contains("not checked"), "{}", ran.errors());
        assert_same(tree, &without_extras(Tree::of(&to)));
        let blocks = |path: &str| fs::metadata(to.join(path)).unwrap().blocks();
        assert!(blocks("only a hole") == 0 && blocks("holes") < 8 << 11, "holes are not holes");
    }
    // Parts, by names of any bytes, and a name that outlived the one that it was stored under.
    let part = |run: &str, path: &[u8], to: &str| {
        let to = sandbox.path(to);
        let line = args!["-v", &first, "get", run, path_of(path).as_os_str(), &to];
        script(&sandbox, &second, &line).code(0);
        to
    };
    for (number, name) in odd_names().into_iter().enumerate() {
        let dir = [b"odd/d", &name[..name.len().min(200)]].concat();
        let to = part("1", &dir, &format!("part{number}"));
        assert_eq!(fs::read(to.join(path_of(&name))).unwrap(), number.to_string().into_bytes());
        assert_eq!(fs::read_link(to.join("link")).unwrap(), path_of(&name));
    }
    let further = part("3", b"further name", "further");
    assert!(fs::read(further).unwrap() == fs::read(sandbox.source.join("noise")).unwrap());
    let absolute = sandbox.source.join("empty/./no more");
    assert_eq!(fs::read(part("3", absolute.as_os_str().as_bytes(), "absolute")).unwrap(), b"x");
    assert_eq!(fs::read(part("latest", b"small", "other one")).unwrap(), b"3");

    let say = |line: &[OsString]| script(&sandbox, &first, line).code(0).text();
    let list = say(&args!["-v", &second, "list"]);
    assert_eq!(list.lines().count(), 6);
    assert!(list.contains(sandbox.source.to_str().unwrap()), "{list}");
    let names = say(&args!["-v", &second, "ls", "1", "odd"]);
    assert_eq!(names.lines().count(), odd_names().len());
    assert!(names.contains("odd/dend\\0012\n") && names.contains("odd/d\\0377\n"), "{names}");
    // As it is printed, it can be asked for.
    let line = args!["ls", "-v", &second, "-e", "1", "odd/d\\0377"];
    assert!(say(&line).contains("odd/d\\0377/\\0377\n"));

    // Nothing is overwritten, and what is not there is said.
    let to = sandbox.path("part0");
    let line = args!["-v", &second, "get", "1", "empty", &to];
    assert!(script(&sandbox, &first, &line).code(2).errors().contains("there already"));
    for line in [["get", "1", "no such"], ["get", "7", "empty"], ["get", "1", "small/../empty"]] {
        let line: Vec<OsString> = line.iter().map(Into::into).chain(["to".into()]).collect();
        let ran = script(&sandbox, &first, &line);
        assert!(ran.errors().contains("restore.sh: "));
        ran.code(if line[2] == "small/../empty" { 2 } else { 1 });
        assert!(!sandbox.path("to").exists());
    }
}

/// A store of one volume, with a run of these files.
fn store(files: &[(&str, Vec<u8>)], options: &[&str]) -> (Sandbox, PathBuf) {
    let sandbox = Sandbox::with(options);
    for (name, content) in files {
        let path = sandbox.source.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    sandbox.backup();
    let volume = sandbox.path("volume");
    (sandbox, volume)
}

fn manifest_lines(volume: &Path) -> (PathBuf, Vec<String>) {
    let path = volume.join("manifests/run-00000001.jsonl.zst");
    let text = zstd::decode_all(File::open(&path).unwrap()).unwrap();
    let text = String::from_utf8(text).unwrap();
    (path, text.lines().map(str::to_owned).collect())
}

fn write_manifest(path: &Path, lines: &[String]) {
    let text = format!("{}\n", lines.join("\n"));
    fs::write(path, zstd::encode_all(text.as_bytes(), 1).unwrap()).unwrap();
}

#[test]
fn a_forged_manifest_leads_nowhere_else() {
    let (sandbox, volume) = store(&[("file", b"content".to_vec())], &[]);
    let outside = sandbox.path("outside");
    fs::create_dir(&outside).unwrap();
    let (path, mut lines) = manifest_lines(&volume);
    let put = lines.iter().find(|it| it.contains("\"path\":\"file\"")).unwrap().clone();
    let link = format!(
        "{{\"op\":\"put\",\"path\":\"link\",\"kind\":\"symlink\",\"version\":90,\"mode\":511,\
         \"uid\":0,\"gid\":0,\"size\":1,\"mtime\":[1,1],\"ctime\":[1,1],\
         \"ino\":1,\"nlink\":1,\"rdev\":0,\"target\":{outside:?}}}"
    );
    let end = lines.pop().unwrap();
    let mut forged = vec![link];
    let evil = outside.join("evil");
    for name in [
        "../outside/evil",
        "link/evil",
        "a/../../outside/evil",
        "/evil",
        "./evil",
        "evil/",
        "..",
        "link/nul\\u0000",
        evil.to_str().unwrap(),
    ] {
        let path = format!("\"path\":\"{name}\"");
        forged.push(put.replace("\"path\":\"file\"", &path));
    }
    // The same in base64: "../outside/evil".
    let base64 = "\"path_b64\":\"Li4vb3V0c2lkZS9ldmls\"";
    forged.push(put.replace("\"path\":\"file\"", base64));
    // A block that is no name of one, and a length that is no number.
    let start = put.find("\"extents\":[[\"").unwrap() + 13;
    let mut block = put.replace("\"path\":\"file\"", "\"path\":\"no block\"");
    let shift = block.len() - put.len();
    block.replace_range(start + shift..start + shift + 64, "../../../../etc/passwd");
    forged.push(block);
    let number = put.replace("\"path\":\"file\"", "\"path\":\"no number\"");
    forged.push(number.replace("\"size\":7", "\"size\":70"));
    lines.extend(forged.iter().cloned());
    let count = lines.len() - 1;
    lines.push(format!("{{\"op\":\"end\",\"changes\":{count}}}"));
    assert!(end.contains("\"end\""));
    write_manifest(&path, &lines);

    let to = sandbox.path("to");
    let ran = script(&sandbox, &volume, &args!["get", "1", "/", &to]).code(1);
    let errors = ran.errors();
    for name in ["../outside/evil", "link/evil", "/evil", "no block", "no number"] {
        assert!(errors.contains(name), "{name}: {errors}");
    }
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert!(!sandbox.path("evil").exists());
    let mut left: Vec<_> = fs::read_dir(&to).unwrap().map(|it| it.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["file", "link"]);
    assert_eq!(fs::read(to.join("file")).unwrap(), b"content");
}

#[test]
fn damaged_and_missing_blocks_are_named_and_the_rest_comes_back() {
    for compression in ["none", "zstd"] {
        let files: Vec<_> = ["damaged", "missing", "whole"]
            .into_iter()
            .zip(1..)
            .map(|(name, seed)| (name, Seeded::new(seed).text(9 << 20)))
            .chain([("small", b"small".to_vec())])
            .collect();
        let options = ["--hash-algo", "sha256", "--compression", compression];
        let (sandbox, volume) = store(&files, &options);
        let (_, lines) = manifest_lines(&volume);
        let block_of = |name: &str| -> String {
            let name = format!("\"path\":\"{name}\"");
            let line = lines.iter().find(|it| it.contains(&name)).unwrap();
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            value["extents"][0][0].as_str().unwrap().to_owned()
        };
        let file_of =
            |block: &str| volume.join(format!("chunks/{}/{}/{block}", &block[..2], &block[2..4]));
        let (damaged, missing) = (block_of("damaged"), block_of("missing"));
        let file = File::options().read(true).write(true).open(file_of(&damaged)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 50_000).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 50_000).unwrap();
        fs::remove_file(file_of(&missing)).unwrap();

        let to = sandbox.path("to");
        let ran = script(&sandbox, &volume, &args!["get", "1", "/", &to]).code(1);
        let errors = ran.errors();
        for what in [&damaged, &missing, "damaged: not restored", "missing: not restored"] {
            assert!(errors.contains(what), "{what}: {errors}");
        }
        for (name, content) in &files {
            match *name {
                "damaged" | "missing" => assert!(!to.join(name).exists()),
                _ => assert!(fs::read(to.join(name)).unwrap() == *content, "{name}"),
            }
        }
        // On demand, what can be had of it.
        let kept = sandbox.path("kept");
        let line = args!["-k", "get", "1", "damaged", &kept];
        assert!(script(&sandbox, &volume, &line).code(1).errors().contains("kept"));
        let (found, content) = (fs::read(kept).unwrap(), &files[0].1);
        assert_eq!(found.len(), content.len());
        let differ = found.iter().zip(content).filter(|it| it.0 != it.1).count();
        assert!(differ > 0 && differ <= 1 << 20, "{differ} bytes differ");

        // A whole copy of it on another volume is used.
        let copy = sandbox.path("copy");
        let place = copy.join(file_of(&damaged).strip_prefix(&volume).unwrap());
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::create_dir(copy.join("manifests")).unwrap();
        fs::copy(file_of(&damaged), &place).unwrap();
        let file = File::options().write(true).open(&place).unwrap();
        file.write_all_at(&byte, 50_000).unwrap();
        let healed = sandbox.path("healed");
        let line = args!["-v", &copy, "get", "1", "damaged", &healed];
        assert!(script(&sandbox, &volume, &line).code(0).errors().contains(&damaged));
        assert!(fs::read(healed).unwrap() == *content);
    }
}

#[test]
fn metas_and_manifests_that_are_missing_are_told() {
    let files = [("text", Seeded::new(1).text(3 << 20)), ("b", b"b".to_vec())];
    let (sandbox, volume) = store(&files, &["--hash-algo", "sha256", "--compression", "none"]);
    fs::write(sandbox.source.join("b"), "b2").unwrap();
    sandbox.backup();
    fs::write(sandbox.source.join("b"), "third").unwrap();
    sandbox.backup();
    for meta in fs::read_dir(volume.join("meta")).unwrap() {
        fs::remove_file(meta.unwrap().path()).unwrap();
    }
    // Raw blocks are what they are, as the hashes show.
    let get =
        |run: &str, to: &str| script(&sandbox, &volume, &args!["get", run, "/", &sandbox.path(to)]);
    let ran = get("3", "one").code(0);
    assert!(ran.errors().contains("has no meta"), "{}", ran.errors());
    assert_same(
        &without_extras(Tree::of(&sandbox.source)),
        &without_extras(Tree::of(&sandbox.path("one"))),
    );

    // A run whose manifest is cut off, or gone.
    let path = volume.join("manifests/run-00000002.jsonl.zst");
    let content = fs::read(&path).unwrap();
    fs::write(&path, &content[..content.len() - 9]).unwrap();
    let ran = get("3", "two").code(1);
    assert!(ran.errors().contains("run 2 "), "{}", ran.errors());
    fs::remove_file(&path).unwrap();
    let ran = get("3", "three").code(1);
    assert!(ran.errors().contains("run 2 has"), "{}", ran.errors());
    assert_eq!(fs::read(sandbox.path("three/b")).unwrap(), b"third");
    get("1", "four").code(0);

    // Two runs of one number.
    let other = sandbox.path("other volume");
    fs::create_dir_all(other.join("chunks")).unwrap();
    fs::create_dir_all(other.join("manifests")).unwrap();
    let (path, mut lines) = manifest_lines(&volume);
    lines[0] = lines[0].replace("\"uuid\":\"", "\"uuid\":\"f");
    write_manifest(&other.join(path.strip_prefix(&volume).unwrap()), &lines);
    let line = args!["-v", &other, "get", "1", "/", &sandbox.path("five")];
    let ran = script(&sandbox, &volume, &line).code(1);
    assert!(ran.errors().contains("two different runs"), "{}", ran.errors());

    // Where a folder's own entry is lost, what is known of its content is not.
    fs::remove_file(&path).unwrap();
    let ran = get("3", "six").code(1);
    assert!(ran.errors().contains("run 1 has"), "{}", ran.errors());
    assert_eq!(fs::read(sandbox.path("six/b")).unwrap(), b"third");
    assert!(!sandbox.path("six/text").exists());
}

#[test]
fn the_next_writer_brings_text_and_script_up_to_date() {
    let sandbox = Sandbox::new();
    let at = |name: &str| sandbox.path("volume").join(name);
    let names = ["RESTORE.txt", "restore.sh"];
    let of_now = names.map(|it| fs::read(at(it)).unwrap());
    assert!(names.iter().all(|it| fs::metadata(at(it)).unwrap().mode() & 0o777 == 0o600));
    for writer in ["backup", "genmeta"] {
        fs::write(at(names[0]), "This directory is a RaidTape volume.").unwrap();
        fs::remove_file(at(names[1])).unwrap();
        match writer {
            "backup" => drop(sandbox.backup()),
            _ => drop(sandbox.ok(["genmeta"])),
        }
        assert!(names.map(|it| fs::read(at(it)).unwrap()) == of_now, "after {writer}");
    }
}
