//! Asking the runs: diff, find, stats, dump.
//!
//! Invariant: what is expected is worked out from the source as it was at each backup, never from
//! what the program says elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, FileType, Mode, Timespec, Timestamps, XattrFlags};
use serde_json::Value;

use crate::common::tree::Node;
use crate::common::{
    Mount, Sandbox, Tree, args, assert_same, bytes_of, data, name_of, need_root, path_of, run, tool,
};

/// Runs of two sources, taken in turns while both change, and what each of them was.
struct History {
    sandbox: Sandbox,
    /// By run, from 1: source, and the tree.
    runs: Vec<(PathBuf, Tree)>,
}

const NAMES: [&[u8]; 7] = [b"a", b"b.txt", b"c\xff", b"\xfe\n", b"dir", b"E", b"a-b"];

impl History {
    fn new(seed: u64, steps: usize) -> History {
        let sandbox = Sandbox::new();
        let other = sandbox.path("other");
        let stash = sandbox.path("stash");
        fs::create_dir(&other).unwrap();
        fs::create_dir(&stash).unwrap();
        let mut seeded = data::Seeded::new(seed);
        let mut runs = Vec::new();
        for step in 0..steps {
            let source = if step % 3 == 2 { &other } else { &sandbox.source };
            for _ in 0..if step < 2 { 60 } else { 12 } {
                change(source, &stash, &mut seeded);
            }
            sandbox.ok(args!["backup", source]);
            runs.push((source.clone(), Tree::of(source)));
        }
        History { sandbox, runs }
    }

    fn run(&self, number: usize) -> &(PathBuf, Tree) {
        &self.runs[number - 1]
    }
}

fn pick(seeded: &mut data::Seeded) -> &'static OsStr {
    OsStr::from_bytes(NAMES[seeded.below(NAMES.len() as u64) as usize])
}

/// One change of a tree: whatever can happen to a path, also that it goes away and comes back.
fn change(source: &Path, stash: &Path, seeded: &mut data::Seeded) {
    let mut dir = source.to_owned();
    while seeded.below(3) > 0 {
        let below = dir.join(pick(seeded));
        match below.symlink_metadata() {
            Ok(it) if it.is_dir() => dir = below,
            _ => break,
        }
    }
    let path = dir.join(pick(seeded));
    let found = path.symlink_metadata().ok();
    let is_dir = found.as_ref().is_some_and(|it| it.is_dir());
    let is_file = found.as_ref().is_some_and(|it| it.is_file());
    let remove = |path: &Path| match path.symlink_metadata() {
        Ok(it) if it.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    };
    let kept = stash.join(pick(seeded));
    match seeded.below(12) {
        0 if found.is_some() => remove(&path),
        1 if found.is_some() => {
            remove(&kept);
            fs::rename(&path, &kept).unwrap();
        }
        1 | 2 if kept.symlink_metadata().is_ok() => {
            remove(&path);
            fs::rename(&kept, &path).unwrap();
        }
        3 if is_file => {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600 + seeded.below(8) as u32))
                .unwrap();
        }
        4 if found.as_ref().is_some_and(|it| !it.is_symlink()) => {
            let value = seeded.noise(3);
            rustix::fs::setxattr(&path, "user.test", &value, XattrFlags::empty()).unwrap();
        }
        5 => {
            remove(&path);
            symlink(pick(seeded), &path).unwrap();
        }
        6 if is_file => {
            let to = source.join(pick(seeded));
            remove(&to);
            if path.exists() {
                fs::hard_link(&path, &to).unwrap();
            }
        }
        7 if found.is_some() => {
            let to = source.join(pick(seeded));
            if !to.starts_with(&path) && !path.starts_with(&to) {
                remove(&to);
                fs::rename(&path, &to).unwrap();
            }
        }
        8 if is_file => {
            let time = SystemTime::UNIX_EPOCH + Duration::new(seeded.below(1 << 31), 5);
            OpenOptions::new().write(true).open(&path).unwrap().set_modified(time).unwrap();
        }
        9 | 10 if !is_dir => {
            remove(&path);
            fs::create_dir(&path).unwrap();
        }
        _ if !is_dir => {
            let len = seeded.below(5_000) as usize;
            remove(&path);
            fs::write(&path, seeded.noise(len)).unwrap();
        }
        _ => {}
    }
}

/// How two states of a path differ, in the program's words.
fn difference(old: Option<&Node>, new: Option<&Node>) -> Option<&'static str> {
    let (old, new) = match (old, new) {
        (None, None) => return None,
        (None, Some(_)) => return Some("added"),
        (Some(_), None) => return Some("deleted"),
        (Some(old), Some(new)) => (old, new),
    };
    if old.kind != new.kind {
        return Some("type");
    }
    if (&old.content, &old.data, old.rdev) != (&new.content, &new.data, new.rdev) {
        return Some("content");
    }
    let metadata = |it: &Node| (it.mode, it.owner, it.mtime, it.xattrs.clone(), it.flags);
    (metadata(old) != metadata(new)).then_some("metadata")
}

type Differences = BTreeSet<(Vec<u8>, String)>;

fn expected(old: &Tree, new: &Tree, below: &[u8]) -> Differences {
    let paths: BTreeSet<&Vec<u8>> = old.0.keys().chain(new.0.keys()).collect();
    let is_below = |path: &[u8]| match path.strip_prefix(below) {
        Some(rest) => below.is_empty() || rest.is_empty() || rest[0] == b'/',
        None => false,
    };
    let paths = paths.into_iter().filter(|it| is_below(it));
    paths
        .filter_map(|path| {
            let word = difference(old.0.get(path), new.0.get(path))?;
            Some((path.clone(), word.to_owned()))
        })
        .collect()
}

fn told(lines: &[Value]) -> Differences {
    let one = |line: &Value| {
        let word = line["what"].as_str().or(line["change"].as_str()).unwrap();
        (name_of(line, "path"), word.to_owned())
    };
    let set: Differences = lines.iter().map(one).collect();
    assert_eq!(set.len(), lines.len(), "something is told twice: {lines:?}");
    set
}

#[test]
fn diff_tells_what_two_runs_have_differently() {
    let history = History::new(70, 9);
    let sandbox = &history.sandbox;
    let count = history.runs.len();
    let mut seen = BTreeSet::new();
    for from in 1..=count {
        for to in 1..=count {
            let lines = sandbox.ok(["diff", &from.to_string(), &to.to_string(), "--json"]);
            let found = told(&lines.json_lines());
            let wanted = expected(&history.run(from).1, &history.run(to).1, b"");
            assert_eq!(found, wanted, "from {from} to {to}");
            let is_same_source = history.run(from).0 == history.run(to).0;
            seen.extend(found.into_iter().map(|it| (is_same_source, it.1)));
        }
    }
    // Nothing of this holds by being absent.
    for is_same in [false, true] {
        for word in ["added", "deleted", "type", "content", "metadata"] {
            assert!(seen.contains(&(is_same, word.to_owned())), "{is_same} {word}");
        }
    }
}

#[test]
fn what_went_and_came_back_is_compared_by_its_path() {
    let sandbox = Sandbox::new();
    let at = |name: &str| sandbox.source.join(name);
    fs::create_dir_all(at("moved/sub/deep")).unwrap();
    fs::create_dir_all(at("turned/sub")).unwrap();
    for file in ["moved/same", "moved/sub/deep/same", "moved/sub/edited", "turned/sub/gone"] {
        fs::write(at(file), file).unwrap();
    }
    sandbox.backup();
    let first = Tree::of(&sandbox.source);
    fs::rename(at("moved"), sandbox.path("away")).unwrap();
    fs::rename(at("turned"), sandbox.path("turned")).unwrap();
    fs::write(at("turned"), "a file for once").unwrap();
    sandbox.backup();
    fs::rename(sandbox.path("away"), at("moved")).unwrap();
    fs::remove_file(at("turned")).unwrap();
    fs::rename(sandbox.path("turned"), at("turned")).unwrap();
    fs::write(at("moved/sub/edited"), "another").unwrap();
    fs::remove_file(at("turned/sub/gone")).unwrap();
    fs::write(at("turned/sub/new"), "new").unwrap();
    sandbox.backup();
    let last = Tree::of(&sandbox.source);
    let forth = told(&sandbox.ok(["diff", "1", "3", "--json"]).json_lines());
    assert_eq!(forth, expected(&first, &last, b""));
    let word = |path: &str| {
        let of = |it: &&(Vec<u8>, String)| it.0 == path.as_bytes();
        forth.iter().find(of).map(|it| it.1.as_str())
    };
    assert_eq!((word("moved/same"), word("moved/sub/deep/same")), (None, None));
    assert_eq!(word("moved/sub/edited"), Some("content"));
    assert_eq!((word("turned"), word("turned/sub")), (None, Some("metadata")));
    assert_eq!((word("turned/sub/gone"), word("turned/sub/new")), (Some("deleted"), Some("added")));
    let back = told(&sandbox.ok(["diff", "3", "1", "--json"]).json_lines());
    assert_eq!(back, expected(&last, &first, b""));
}

#[test]
fn diff_of_a_part_and_in_numbers() {
    let history = History::new(71, 6);
    let sandbox = &history.sandbox;
    let (first, last) = (1, history.runs.len() - 1);
    let (old, new) = (&history.run(first).1, &history.run(last).1);
    let mut tried = 0;
    for path in old.0.keys().chain(new.0.keys()) {
        let path = path_of(if path.is_empty() { b"." } else { path });
        let line = args!["diff", &first.to_string(), &last.to_string(), "--json", "--", &path];
        let below = if bytes_of(&path) == b"." { b"" } else { bytes_of(&path) };
        assert_eq!(told(&sandbox.ok(line).json_lines()), expected(old, new, below), "{path:?}");
        tried += 1;
        if tried > 25 {
            break;
        }
    }
    let all = expected(old, new, b"");
    let (one, other) = (first.to_string(), last.to_string());
    let stat = sandbox.ok(["diff", &one, &other, "--stat", "--json"]).json();
    let sum = |key: &str| stat[key].as_u64().unwrap() + stat["dirs"][key].as_u64().unwrap();
    for word in ["added", "deleted", "type", "content", "metadata"] {
        assert_eq!(sum(word), all.iter().filter(|it| it.1 == word).count() as u64, "{word}");
    }
    // For people: a line each, between the head and the sums.
    let text = sandbox.ok(["diff", &one, &other]).text();
    assert_eq!(text.lines().count(), all.len() + 3);
    assert_eq!(sandbox.ok(["diff", &one, &other, "--stat"]).text().lines().count(), 3);
    let whole = history.run(first).0.join("no such file");
    sandbox.run(args!["diff", &one, &other, &whole]).code(1);
    sandbox.run(["diff", &one, &other, "../a"]).code(2);
    sandbox.run(["diff", &one, "99"]).code(1);
    sandbox.run(["diff", &one, "soon"]).code(2);
    let latest = history.runs.len().to_string();
    let lines = sandbox.ok(["diff", "latest", &latest, "--json"]);
    assert_eq!(lines.text(), "");
}

/// What `find` said, a path in a run at a time, with kind and size.
fn found(history: &History, options: &[&str]) -> BTreeMap<(usize, Vec<u8>), (String, u64)> {
    let mut all = BTreeMap::new();
    let line = ["find", "--json"].into_iter().chain(options.iter().copied());
    for hit in history.sandbox.ok(line).json_lines() {
        let number = |key: &str| hit[key].as_u64().unwrap() as usize;
        let source = name_of(&hit, "source");
        let mut runs = 0;
        for run in number("first_run")..=number("last_run") {
            if bytes_of(&history.run(run).0) == source {
                let what = (hit["kind"].as_str().unwrap().to_owned(), number("size") as u64);
                let old = all.insert((run, name_of(&hit, "path")), what);
                assert_eq!(old, None, "found twice: {hit}");
                runs += 1;
            }
        }
        assert_eq!(number("runs"), runs, "{hit}");
        let is_of = |run: &usize| bytes_of(&history.run(*run).0) == source;
        assert!(is_of(&number("first_run")) && is_of(&number("last_run")), "{hit}");
        let newest = (1..=history.runs.len()).rfind(is_of);
        assert_eq!(hit["in_newest"], Some(number("last_run")) == newest, "{hit}");
    }
    all
}

/// The same by looking at every tree.
fn searched(
    history: &History,
    wanted: impl Fn(usize, &[u8], &Node) -> bool,
) -> BTreeMap<(usize, Vec<u8>), (String, u64)> {
    let mut all = BTreeMap::new();
    for (run, (_, tree)) in (1..).zip(&history.runs) {
        for (path, node) in tree.0.iter().filter(|it| !it.0.is_empty()) {
            if wanted(run, path, node) {
                all.insert((run, path.clone()), (node.kind.to_owned(), node.size));
            }
        }
    }
    all
}

fn name(path: &[u8]) -> &[u8] {
    path.rsplit(|it| *it == b'/').next().unwrap()
}

#[test]
fn find_gives_every_path_in_every_run_that_has_it() {
    let history = History::new(72, 9);
    let by_name = |glob: &str, wanted: &dyn Fn(&[u8]) -> bool| {
        let all = found(&history, &[glob]);
        assert!(!all.is_empty(), "{glob}");
        assert_eq!(all, searched(&history, |_, path, _| wanted(path)), "{glob}");
    };
    by_name("*", &|_| true);
    by_name("a", &|path| name(path) == b"a");
    by_name("a*", &|path| name(path).starts_with(b"a"));
    by_name("c?", &|path| name(path) == b"c\xff");
    by_name("??", &|path| name(path).len() == 2);
    by_name("[!a-z]", &|path| name(path) == b"E");
    by_name("*/a", &|path| {
        path.len() > 2 && path.iter().filter(|it| **it == b'/').count() == 1 && name(path) == b"a"
    });
    by_name("**/a", &|path| name(path) == b"a");
    by_name("dir/**", &|path| path.starts_with(b"dir/"));
    let source = history.run(1).0.to_str().unwrap();
    let all = found(&history, &[&format!("{source}/**/b.txt")]);
    assert_eq!(
        all,
        searched(&history, |run, path, _| {
            history.run(run).0 == history.run(1).0 && name(path) == b"b.txt"
        })
    );
}

#[test]
fn find_takes_conditions() {
    let history = History::new(73, 6);
    let check = |options: &[&str], wanted: &dyn Fn(usize, &[u8], &Node) -> bool| {
        let all = found(&history, options);
        assert!(!all.is_empty(), "{options:?}");
        assert_eq!(all, searched(&history, wanted), "{options:?}");
    };
    check(&["e", "-i"], &|_, path, _| name(path) == b"E");
    check(&["*", "--type", "d"], &|_, _, node| node.kind == "dir");
    check(&["*", "--type", "l"], &|_, _, node| node.kind == "symlink");
    check(&["*", "--larger-than", "2000"], &|_, _, node| node.size > 2_000);
    check(&["*", "--smaller-than", "2kB"], &|_, _, node| node.size < 2_000);
    check(&["*", "--newer-than", "1d"], &|_, _, node| {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        node.mtime.0 > now.as_secs() as i64 - 86_400
    });
    check(&["*", "--older-than", "2020-01-01T00:00:00Z"], &|_, _, node| {
        node.mtime.0 < 1_577_836_800
    });
    let source = history.run(3).0.to_str().unwrap();
    check(&["*", "--source", source], &|run, _, _| run == 3 || run == 6);
    let sandbox = &history.sandbox;
    for run in ["2", "3", "latest"] {
        let number = run.parse().unwrap_or(history.runs.len());
        let said = sandbox.ok(["find", "*", "--json", "--run", run]).json_lines();
        let paths: BTreeSet<Vec<u8>> = said.iter().map(|it| name_of(it, "path")).collect();
        let mut wanted: BTreeSet<Vec<u8>> = history.run(number).1.0.keys().cloned().collect();
        wanted.remove(&b""[..]);
        assert_eq!((said.len(), paths), (wanted.len(), wanted), "run {run}");
    }
    assert_eq!(sandbox.ok(["find", "*", "--limit", "3"]).text().lines().count(), 3);
    assert_eq!(sandbox.ok(["find", "nothing has this name"]).text(), "");
    let shown = sandbox.ok(["find", "*"]).text();
    assert!(shown.chars().all(|it| it == '\n' || !it.is_control()), "{shown:?}");
    let line = args!["find", "*", "--source", "nowhere"];
    sandbox.run(line).code(1);
    for line in [&["a["][..], &["a", "--type", "x"], &["a", "--newer-than", "soon"]] {
        sandbox.run(["find"].iter().chain(line)).code(2);
    }
    sandbox.run([OsStr::new("find"), OsStr::from_bytes(b"\xff")]).code(2);
}

#[test]
fn stats_add_up() {
    let sandbox = Sandbox::new();
    let empty = sandbox.ok(["stats", "--json"]).json();
    assert_eq!((empty["logical_bytes"].as_u64(), empty["dedup_ratio"].is_null()), (Some(0), true));
    sandbox.ok(["stats"]);
    data::mixed_tree(&sandbox.source, 74, 60);
    sandbox.backup();
    data::noise_file(&sandbox.source.join("more"), 75, 100_000);
    sandbox.backup();
    let other = sandbox.path("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("text"), "x".repeat(50_000)).unwrap();
    sandbox.ok(args!["backup", &other, "--as", "thing"]);
    let stats = sandbox.ok(["stats", "--json"]).json();
    let runs = sandbox.ok(["runs", "--json"]).json();
    let number = |value: &Value| value.as_u64().unwrap();
    let logical: u64 = runs.as_array().unwrap().iter().map(|it| number(&it["bytes"])).sum();
    assert_eq!(stats["logical_bytes"], logical);
    assert_eq!(stats["stored_bytes"], sandbox.stored("volume"));
    assert_eq!(stats["blocks"], sandbox.blocks("volume").len());
    // Noise and texts of their own: every byte of the newest runs is there once.
    let unique = number(&runs[1]["bytes"]) + number(&runs[2]["bytes"]);
    assert_eq!(stats["unique_bytes"], unique);
    let ratio = |key: &str| stats[key].as_f64().unwrap();
    let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
    assert!(near(ratio("dedup_ratio"), logical as f64 / unique as f64), "{stats}");
    let together = ratio("dedup_ratio") * ratio("compression_ratio");
    assert!(near(together, ratio("total_ratio")), "{stats}");
    let sources = stats["sources"].as_array().unwrap();
    assert_eq!(sources.len(), 2);
    assert_eq!(name_of(&sources[0], "source"), bytes_of(&sandbox.source));
    assert_eq!((&sources[0]["runs"], &sources[0]["latest_run"]), (&2.into(), &2.into()));
    assert_eq!(sources[0]["latest_bytes"], runs[1]["bytes"]);
    assert_eq!(sources[1]["source"], "thing");
    let new: u64 =
        stats["runs"].as_array().unwrap().iter().map(|it| number(&it["new_bytes"])).sum();
    assert_eq!(new, sandbox.stored("volume"));
    let volume = &stats["volumes"][0];
    assert_eq!((&volume["stored_bytes"], &volume["reserve_bytes"]), (&new.into(), &0.into()));
    assert!(number(&volume["free_bytes"]) > 0 && number(&stats["catalog_bytes"]) > 0);
    assert_eq!(sandbox.ok(["stats"]).text().lines().filter(|it| it.contains("thing")).count(), 2);
}

#[test]
fn dump_gives_a_file_back() {
    let sandbox = Sandbox::new();
    data::noise_file(&sandbox.source.join("long"), 76, 5 << 20);
    let sparse = File::create(sandbox.source.join("sparse")).unwrap();
    sparse.write_all_at(b"middle", 1 << 20).unwrap();
    sparse.set_len(3 << 20).unwrap();
    for name in [&b"odd \xff\n"[..], b"empty"] {
        fs::write(sandbox.source.join(path_of(name)), &name[5..]).unwrap();
    }
    fs::create_dir(sandbox.source.join("dir")).unwrap();
    symlink("long", sandbox.source.join("link")).unwrap();
    sandbox.backup();
    for name in [&b"long"[..], b"sparse", b"odd \xff\n", b"empty"] {
        let path = sandbox.source.join(path_of(name));
        let ran = sandbox.ok(args!["dump", "latest", &path]);
        assert!(ran.bytes() == fs::read(&path).unwrap(), "{path:?}");
    }
    for name in ["dir", "link", "."] {
        let errors = sandbox.run(["dump", "1", name]).code(2).errors();
        assert!(errors.contains("--format tar"), "{errors}");
    }
    sandbox.run(["dump", "1", "nothing"]).code(1);
    // A reader that has seen enough is no error.
    let mut command = sandbox.program();
    command.args(["dump", "1", "long"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut start = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut start).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &*output.stderr), (Some(0), &b""[..]));
}

/// What tar makes of an archive in a new directory.
fn extract(sandbox: &Sandbox, archive: &[u8], name: &str) -> PathBuf {
    let out = sandbox.path(name);
    fs::create_dir(&out).unwrap();
    let file = sandbox.path(&format!("{name}.tar"));
    fs::write(&file, archive).unwrap();
    let options = args!["--xattrs", "--xattrs-include=*", "-xpf", &file, "-C", &out];
    let ran = tool("tar", options);
    assert_eq!(ran.text(), "");
    out
}

fn set_time(path: &Path, secs: i64, nanos: i64) {
    let time = Timespec { tv_sec: secs, tv_nsec: nanos };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

#[test]
fn dump_of_a_folder_is_what_tar_makes_a_tree_of() {
    need_root("it makes device nodes and gives files away");
    let sandbox = Sandbox::new();
    let at = |name: &[u8]| sandbox.source.join(path_of(name));
    data::mixed_tree(&sandbox.source, 77, 60);
    for name in [&b"odd \xff\n"[..], &[0xfe; 200], b"-rf", b" ", "\u{e9}".as_bytes()] {
        fs::write(at(name), name).unwrap();
    }
    fs::write(at("\u{e9}".repeat(120).as_bytes()), "long text").unwrap();
    let mut deep = sandbox.source.clone();
    for level in 0..30 {
        deep.push(path_of(&if level == 20 { vec![0xff; 30] } else { vec![b'd'; 30] }));
        fs::create_dir(&deep).unwrap();
        fs::write(deep.join("file"), format!("{level}")).unwrap();
        symlink(OsStr::from_bytes(&vec![b'x'; 100 * level + 1]), deep.join("link")).unwrap();
    }
    symlink(OsStr::from_bytes(&[0xff; 150]), at(b"odd link")).unwrap();
    fs::hard_link(deep.join("file"), at(b"again")).unwrap();
    fs::hard_link(deep.join("file"), deep.join("once more")).unwrap();
    let dir = File::open(&sandbox.source).unwrap();
    let mode = Mode::from_raw_mode(0o640);
    for (name, kind, rdev) in [
        ("fifo", FileType::Fifo, 0),
        ("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3)),
        ("disk", FileType::BlockDevice, rustix::fs::makedev(4_000, 1_000_000)),
        ("socket", FileType::Socket, 0),
    ] {
        rustix::fs::mknodat(&dir, name, kind, mode, rdev).unwrap();
    }
    fs::hard_link(at(b"fifo"), at(b"fifo again")).unwrap();
    for (name, len, data) in [("sparse", 3 << 20, &[1 << 20][..]), ("all hole", 1 << 20, &[])] {
        let file = File::create(at(name.as_bytes())).unwrap();
        file.set_len(len).unwrap();
        data.iter().for_each(|at| file.write_all_at(b"data", *at).unwrap());
    }
    data::noise_file(&at(b"long"), 78, 3 << 20);
    let set = |name: &[u8], key: &str, value: &[u8]| {
        rustix::fs::lsetxattr(at(name), key, value, XattrFlags::empty()).unwrap();
    };
    set(b"long", "user.key", b"value\0\n=");
    set(b"long", "user.with = and %", &[0xff; 1_000]);
    set(b"d0", "user.dir", b"x");
    set(b"null", "trusted.key", b"y");
    tool("setfacl", args!["-m", "u:1234:rwx,g:77:r", &at(b"d1")]);
    tool("setfacl", args!["-d", "-m", "u:1234:rwx", &at(b"d1")]);
    std::os::unix::fs::lchown(at(b"long"), Some(4_000_000_000), Some(3_000_000)).unwrap();
    std::os::unix::fs::lchown(at(b"odd link"), Some(65534), Some(1)).unwrap();
    fs::set_permissions(at(b"long"), fs::Permissions::from_mode(0o6751)).unwrap();
    fs::set_permissions(at(b"d2"), fs::Permissions::from_mode(0o1500)).unwrap();
    for (name, secs, nanos) in [
        (&b"d0"[..], 1_000_000_000, 123_456_789),
        (b"odd link", 5, 999_999_999),
        (b"long", -5, 250_000_000),
        (b" ", 1 << 33, 1),
        (b"fifo", 0, 0),
        (b"", 77, 7),
    ] {
        set_time(&at(name), secs, nanos);
    }
    sandbox.backup();
    let source = Tree::of(&sandbox.source).without(|_, node| node.kind == "socket");
    let ran = sandbox.ok(["dump", "1", ".", "--format", "tar"]);
    assert!(ran.errors().contains("1 sockets left out"), "{}", ran.errors());
    // Holes stay out of the archive.
    assert!(ran.bytes().len() < 60 << 20, "{} bytes", ran.bytes().len());
    assert_same(&source, &Tree::of(&extract(&sandbox, ran.bytes(), "out")));
    // A part of it, by its own names; a file that has its other names elsewhere is whole.
    let ran = sandbox.ok(args!["dump", "1", &deep, "--format", "tar"]);
    let out = extract(&sandbox, ran.bytes(), "part");
    let unlinked = |it: Tree| it.with(|node| (node.links, node.first_name) = (1, None));
    assert_same(&unlinked(Tree::of(&deep)), &unlinked(Tree::of(&out)));
    let ran = sandbox.ok(["dump", "1", "long", "--format", "tar"]);
    let out = extract(&sandbox, ran.bytes(), "one");
    let found = Tree::of(&out);
    assert_eq!(found.0.keys().map(|it| &**it).collect::<Vec<_>>(), [&b""[..], b"long"]);
    assert_eq!(found.0[&b"long"[..]], source.0[&b"long"[..]]);
}

#[test]
fn dump_keeps_the_holes_of_a_file_longer_than_a_header_can_say() {
    let sandbox = Sandbox::new();
    let len = 20 << 30;
    let file = File::create(sandbox.source.join("huge")).unwrap();
    file.write_all_at(b"the end", len - 7).unwrap();
    file.write_all_at(b"middle", 10 << 30).unwrap();
    sandbox.backup();
    let ran = sandbox.ok(["dump", "1", ".", "--format", "tar"]);
    assert!(ran.bytes().len() < 100_000, "{} bytes", ran.bytes().len());
    let huge = File::open(extract(&sandbox, ran.bytes(), "out").join("huge")).unwrap();
    let found = huge.metadata().unwrap();
    assert!(found.len() == len && found.blocks() < 1_000, "{found:?}");
    for (at, text) in [(len - 7, "the end"), (10 << 30, "middle")] {
        let mut read = vec![0; text.len()];
        huge.read_exact_at(&mut read, at).unwrap();
        assert_eq!(read, text.as_bytes());
    }
}

#[test]
fn dump_never_passes_off_damage_as_content() {
    let sandbox = Sandbox::with(&["--compression", "none"]);
    data::noise_file(&sandbox.source.join("long"), 79, 20 << 20);
    sandbox.backup();
    fs::write(sandbox.source.join("small"), data::Seeded::new(80).noise(1_000)).unwrap();
    fs::write(sandbox.source.join("zz"), "sound").unwrap();
    sandbox.backup();
    let blocks = sandbox.blocks("volume");
    let damage = |len: &dyn Fn(u64) -> bool, at: u64| {
        for (path, _) in blocks.iter().filter(|it| len(it.1)) {
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
            let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[!byte[0]], at).unwrap();
        }
    };
    damage(&|len| len < 1 << 20, 500);
    let ran = sandbox.run(["dump", "2", "small"]).code(5);
    assert!(ran.errors().contains("small") && ran.bytes().is_empty(), "{}", ran.errors());
    // A small file is left out and told; the rest is whole.
    let ran = sandbox.run(["dump", "2", ".", "--format", "tar"]).code(5);
    assert!(ran.errors().contains("small"), "{}", ran.errors());
    let found = Tree::of(&extract(&sandbox, ran.bytes(), "out"));
    let source = Tree::of(&sandbox.source);
    assert!(!found.0.contains_key(&b"small"[..]));
    assert_eq!(found.0[&b"long"[..]], source.0[&b"long"[..]]);
    damage(&|len| len > 1 << 20, 15 << 20);
    let ran = sandbox.run(["dump", "2", "long"]).code(5);
    assert!(ran.bytes().len() < 20 << 20);
    // A long one has begun by then: no reader can take the archive for a whole one.
    let ran = sandbox.run(["dump", "2", ".", "--format", "tar"]).code(5);
    assert!(ran.errors().contains("long"), "{}", ran.errors());
    let file = sandbox.path("cut.tar");
    fs::write(&file, ran.bytes()).unwrap();
    let read = run(std::process::Command::new("tar").arg("-tf").arg(&file));
    read.code(2);
}

#[test]
fn a_job_never_has_done_more_than_there_is() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 81, 40);
    let mount = sandbox.mount();
    let ask = |line: &str| {
        let mut file = OpenOptions::new().write(true).open(mount.ctl("backup")).unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    };
    let line = sandbox.source.to_str().unwrap();
    ask(line);
    check_progress(&mount, 1);
    // Ten times what the run before had.
    data::noise_file(&sandbox.source.join("more"), 82, 40 << 20);
    ask(line);
    let said = check_progress(&mount, 2);
    assert_eq!((&said["bytes_done"], said["state"].as_str()), (&said["bytes_total"], Some("done")));
    let number = |key: &str| said[key].as_u64().unwrap();
    assert!(number("bytes_new") >= 40 << 20 && number("bytes_new") <= number("bytes_read"));
    mount.end();
    let ran = sandbox.ok(args!["backup", &sandbox.source]);
    assert_eq!(ran.errors(), "", "no bar where there is no terminal");
}

/// Watches a job to its end.
fn check_progress(mount: &Mount, job: u64) -> Value {
    loop {
        let said = mount.job(job);
        for (done, total) in [("bytes_done", "bytes_total"), ("files_done", "files_total")] {
            if let Some(total) = said[total].as_u64() {
                assert!(said[done].as_u64().unwrap() <= total, "{said}");
            }
        }
        if !matches!(said["state"].as_str(), Some("queued" | "running")) {
            assert_eq!(said["state"], "done", "{said}");
            return said;
        }
    }
}
