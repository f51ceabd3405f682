//! What a backup leaves out, and what it would do: filters, dry runs, comments.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::{
    Mount, Sandbox, Tree, args, assert_same, data, errno, name_of, need_root, tool,
};

const SIGNATURE: &str = "Signature: 8a477f597d28d172789f06886806bc55";

/// Makes files, and the directories above them; each holds its own name.
fn grow(base: &Path, files: &[&str]) {
    for file in files {
        let path = base.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, file).unwrap();
    }
}

/// The paths of a run, directories with a slash.
fn paths(sandbox: &Sandbox, run: i64) -> BTreeSet<String> {
    let out = sandbox.path(&format!("paths of {run}"));
    sandbox.ok(args!["revert-to-run", &run.to_string(), &out]);
    let found = tool("find", args![&out, "-mindepth", "1", "-printf", "%P%y\n"]).text();
    let shown = |line: &str| match line.strip_suffix('d') {
        Some(dir) => format!("{dir}/"),
        None => line[..line.len() - 1].to_owned(),
    };
    found.lines().map(shown).collect()
}

#[track_caller]
fn assert_paths(sandbox: &Sandbox, run: i64, expected: &[&str]) {
    let expected: BTreeSet<String> = expected.iter().map(|it| (*it).to_owned()).collect();
    assert_eq!(paths(sandbox, run), expected);
}

#[test]
fn the_last_pattern_that_matches_counts() {
    let sandbox = Sandbox::new();
    grow(&sandbox.source, &["a.log", "keep.log", "b", "deep/c.log", "deep/keep.log", "#note"]);
    sandbox.backup_with(&["--exclude", "*.log", "--include", "keep.log", "--exclude", "#note"]);
    assert_paths(&sandbox, 1, &["keep.log", "b", "deep/", "deep/keep.log"]);
    sandbox.backup_with(&["--include", "keep.log", "--exclude", "*.log", "--exclude=/deep"]);
    assert_paths(&sandbox, 2, &["b", "#note"]);
    // A file of patterns stands where it was named, and reads as a .gitignore does.
    let file = sandbox.path("patterns");
    fs::write(&file, "\u{feff}# a comment\r\n\n*.log\n!/keep.log\n/deep/\n").unwrap();
    let file = file.to_str().unwrap();
    sandbox.backup_with(&["--exclude-from", file, "--include", "a.log"]);
    assert_paths(&sandbox, 3, &["keep.log", "a.log", "b", "#note"]);
    sandbox.backup_with(&["--include", "a.log", "--exclude-from", file]);
    assert_paths(&sandbox, 4, &["keep.log", "b", "#note"]);
    sandbox.assert_valid();
}

#[test]
fn an_include_brings_the_directories_on_its_way() {
    let sandbox = Sandbox::new();
    let files = ["home/me/docs/x", "home/me/docs/sub/y", "home/me/t", "home/u/t", "z"];
    grow(&sandbox.source, &files);
    sandbox.backup_with(&["--exclude", "/home", "--include", "/home/me/docs"]);
    let kept = [
        "home/",
        "home/me/",
        "home/me/docs/",
        "home/me/docs/x",
        "home/me/docs/sub/",
        "home/me/docs/sub/y",
        "z",
    ];
    assert_paths(&sandbox, 1, &kept);
    // What was there as a whole shrinks to the way, and grows again.
    sandbox.backup();
    let said = sandbox.backup_with(&["--exclude", "/home", "--include", "/home/me/docs"]);
    assert_eq!((&said["deleted"], &said["dirs"]["deleted"]), (&2.into(), &1.into()));
    assert_paths(&sandbox, 3, &kept);
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&sandbox.revert(2, "whole")));
    sandbox.assert_valid();
}

#[test]
fn what_is_left_out_is_not_entered() {
    let sandbox = Sandbox::of_nobody();
    grow(&sandbox.source, &["in/file", "closed/secret"]);
    let closed = sandbox.source.join("closed");
    // Root may enter anything, and the program does not run as root here.
    tool("chmod", args!["-R", "a+rX", &sandbox.source]);
    tool("chmod", args!["0", &closed]);
    let listing = sandbox.run(args!["backup", &sandbox.source]).code(3).errors();
    assert!(listing.contains("closed"), "{listing}");
    sandbox.ok(args!["backup", &sandbox.source, "--exclude", "closed"]);
    sandbox.ok(args!["backup", &sandbox.source, "--exclude", "*", "--include", "/in"]);
    tool("chmod", args!["755", &closed]);
}

#[test]
fn what_is_left_out_now_counts_as_deleted() {
    let sandbox = Sandbox::new();
    grow(&sandbox.source, &["a/b/c", "a/d", "e"]);
    sandbox.backup();
    let said = sandbox.backup_with(&["--exclude", "a"]);
    assert_eq!((&said["deleted"], &said["dirs"]["deleted"]), (&2.into(), &2.into()));
    let lines = sandbox.ok(["list-changes", "2"]).text();
    for line in ["- a/", "- a/b/", "- a/b/c", "- a/d"] {
        assert!(lines.lines().any(|it| it == line), "{line:?} in {lines}");
    }
    let said = sandbox.backup();
    assert_eq!((&said["added"], &said["bytes_stored"]), (&2.into(), &0.into()));
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&sandbox.revert(3, "out")));
}

#[test]
fn caches_and_marked_directories_keep_only_their_marks() {
    let sandbox = Sandbox::new();
    let base = &sandbox.source;
    let files = ["c/data/x", "c/y", "fake/y", "link/y", "m/data/x", "m/y", "d/.skip/x", "d/y", "z"];
    grow(base, &files);
    fs::write(base.join("c/CACHEDIR.TAG"), format!("{SIGNATURE}\n# made by a test\n")).unwrap();
    fs::write(base.join("fake/CACHEDIR.TAG"), SIGNATURE.replace("8a", "8b")).unwrap();
    // A tag has to be a file of its own.
    std::os::unix::fs::symlink("../c/CACHEDIR.TAG", base.join("link/CACHEDIR.TAG")).unwrap();
    fs::create_dir(base.join("pipe")).unwrap();
    tool("mkfifo", args![base.join("pipe/CACHEDIR.TAG")]);
    fs::write(base.join("m/.skip"), "").unwrap();
    let usual = [
        "fake/",
        "fake/y",
        "fake/CACHEDIR.TAG",
        "link/",
        "link/y",
        "link/CACHEDIR.TAG",
        "pipe/",
        "pipe/CACHEDIR.TAG",
    ];
    let with = |more: &[&'static str]| [&usual[..], &["z"], more].concat();
    sandbox.backup_with(&["--exclude-caches"]);
    let rest =
        ["m/", "m/.skip", "m/data/", "m/data/x", "m/y", "d/", "d/.skip/", "d/.skip/x", "d/y"];
    assert_paths(&sandbox, 1, &with(&[&rest[..], &["c/", "c/CACHEDIR.TAG"]].concat()));
    sandbox.backup_with(&["--exclude-caches", "--exclude-if-present", ".skip"]);
    assert_paths(&sandbox, 2, &with(&["c/", "c/CACHEDIR.TAG", "m/", "m/.skip", "d/"]));
    sandbox.backup_with(&["--exclude-if-present", ".skip", "--exclude-if-present", "y"]);
    let rest = ["c/", "c/y", "m/", "m/.skip", "m/y", "d/", "d/y", "z"];
    let marked = ["fake/", "fake/y", "link/", "link/y", "pipe/", "pipe/CACHEDIR.TAG"];
    assert_paths(&sandbox, 3, &[&rest[..], &marked].concat());
    sandbox.assert_valid();
}

#[test]
fn large_files_are_left_out() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("small"), vec![1; 1000]).unwrap();
    fs::write(sandbox.source.join("large"), vec![2; 1001]).unwrap();
    fs::create_dir(sandbox.source.join("dir")).unwrap();
    fs::hard_link(sandbox.source.join("large"), sandbox.source.join("dir/large")).unwrap();
    // Size is what a program reads, holes included.
    File::create(sandbox.source.join("sparse")).unwrap().set_len(1 << 40).unwrap();
    sandbox.backup_with(&["--exclude-larger-than", "1kB"]);
    assert_paths(&sandbox, 1, &["small", "dir/"]);
    sandbox.backup_with(&["--exclude-larger-than", "1KiB"]);
    assert_paths(&sandbox, 2, &["small", "large", "dir/", "dir/large"]);
}

#[test]
fn one_file_system_is_one() {
    need_root("it mounts a tmpfs");
    let sandbox = Sandbox::new();
    grow(&sandbox.source, &["here", "other/below"]);
    let point = sandbox.source.join("other");
    tool("mount", args!["-t", "tmpfs", "none", &point]);
    let _clear = crate::common::mount::Clear(point.clone());
    fs::write(point.join("there"), "x").unwrap();
    sandbox.backup_with(&["--one-file-system"]);
    sandbox.backup();
    assert_paths(&sandbox, 1, &["here", "other/"]);
    assert_paths(&sandbox, 2, &["here", "other/", "other/there"]);
}

#[test]
fn names_of_any_bytes_are_matched() {
    let sandbox = Sandbox::new();
    for name in [&b"a\xff.o"[..], b"a\xfe.c", b"\xfd"] {
        fs::write(sandbox.source.join(OsStr::from_bytes(name)), "x").unwrap();
    }
    let marked = sandbox.source.join("marked");
    fs::create_dir(&marked).unwrap();
    grow(&marked, &["x"]);
    fs::write(marked.join(OsStr::from_bytes(b"\xfc")), "").unwrap();
    let mut line =
        args!["backup", &sandbox.source, "--exclude", "*.o", "--exclude", "a?.c"].to_vec();
    line.extend(args!["--exclude-if-present", OsStr::from_bytes(b"\xfc")]);
    sandbox.ok(line);
    let listed = |path: &str| -> Vec<Vec<u8>> {
        let lines = sandbox.ok(["ls", "1", path, "--json"]).json_lines();
        lines.iter().map(|it| name_of(it, "path")).collect()
    };
    assert_eq!(listed("."), [&b"marked"[..], b"\xfd"]);
    assert_eq!(listed("marked"), [&b"marked/\xfc"[..]]);
    // The pattern itself cannot be of any bytes, and says so.
    let pattern = OsStr::from_bytes(b"caf\xe9");
    let file = sandbox.path("patterns");
    fs::write(&file, b"fine\ncaf\xe9\n").unwrap();
    for (option, word, shown) in [
        ("--exclude", pattern, "'caf\\xe9'"),
        ("--include", pattern, "'caf\\xe9'"),
        ("--exclude-from", file.as_os_str(), "line 2"),
    ] {
        let said = sandbox.run(args!["backup", &sandbox.source, option, word]).code(2).errors();
        assert!(said.contains("UTF-8") && said.contains(shown), "{said}");
    }
    for option in ["--tag", "--comment"] {
        sandbox.run(args!["backup", &sandbox.source, option, pattern]).code(2);
    }
    assert_eq!(sandbox.ok(["runs", "--json"]).json().as_array().unwrap().len(), 1);
}

#[test]
fn nonsense_is_refused_before_anything_is_done() {
    let sandbox = Sandbox::new();
    let (file, long) = (sandbox.path("patterns"), sandbox.path("long"));
    fs::write(&file, "good\n[z-a]\n").unwrap();
    fs::write(&long, vec![b'x'; (1 << 20) + 1]).unwrap();
    for (option, word) in [
        ("--exclude", OsString::new()),
        ("--exclude", "[z-a]".into()),
        ("--include", "!x".into()),
        ("--exclude-if-present", "a/b".into()),
        ("--exclude-if-present", "".into()),
        ("--exclude-larger-than", "big".into()),
        ("--exclude-from", file.into()),
        ("--exclude-from", long.into()),
        ("--comment", "x".repeat((64 << 10) + 1).into()),
    ] {
        let ran = sandbox.run(args!["backup", &sandbox.source, option, &word]).code(2);
        assert!(ran.errors().contains(&option[2..9]), "{option}: {}", ran.errors());
    }
    let none = sandbox.path("none");
    let said = sandbox.run(args!["backup", &sandbox.source, "--exclude-from", &none]).code(1);
    assert!(said.errors().contains("none"), "{}", said.errors());
    assert_eq!(sandbox.ok(["runs", "--json"]).json(), serde_json::json!([]));
}

/// Everything that a store consists of, with bytes and times.
fn store(sandbox: &Sandbox) -> Vec<(PathBuf, std::time::SystemTime, Vec<u8>)> {
    let mut found = Vec::new();
    let mut left =
        vec![sandbox.path("volume"), sandbox.path("catalog"), sandbox.path("catalog.lock")];
    while let Some(path) = left.pop() {
        let stat = fs::metadata(&path).unwrap();
        let mut bytes = Vec::new();
        match stat.is_dir() {
            true => left.extend(fs::read_dir(&path).unwrap().map(|it| it.unwrap().path())),
            false => bytes = fs::read(&path).unwrap(),
        }
        found.push((path, stat.modified().unwrap(), bytes));
    }
    found.sort();
    found
}

#[test]
fn a_dry_run_says_what_a_run_would_do_and_does_nothing() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 140, 40);
    grow(&sandbox.source, &["old/a", "old/b/c", "turns/x", "edited", "linked"]);
    fs::hard_link(sandbox.source.join("linked"), sandbox.source.join("linked too")).unwrap();
    let look = |line: &[&str]| {
        let mut all = args!["backup", &sandbox.source, "--dry-run"].to_vec();
        all.extend(line.iter().map(OsString::from));
        sandbox.ok(all)
    };
    let lines_of = |text: &str| -> BTreeSet<String> {
        text.lines().filter(|it| !it.starts_with([' ', 'd', 'r'])).map(str::to_owned).collect()
    };
    let keys = ["added", "modified", "deleted", "unchanged", "dirs", "files", "bytes", "problems"];
    let of = |said: &Value| keys.map(|key| said[key].clone());

    // Before the first run, then before one that finds changes of every kind, then before one with
    // options that leave something out.
    let before = store(&sandbox);
    let planned = (look(&["--json"]).json(), look(&["-v"]).text());
    assert_eq!(store(&sandbox), before);
    assert_eq!(of(&sandbox.backup()), of(&planned.0));
    assert_eq!(planned.0["bytes_read"], planned.0["bytes"].as_u64().unwrap() - 6);
    assert_eq!(lines_of(&sandbox.ok(["list-changes", "1"]).text()), lines_of(&planned.1));

    fs::remove_dir_all(sandbox.source.join("old")).unwrap();
    fs::remove_dir_all(sandbox.source.join("turns")).unwrap();
    fs::write(sandbox.source.join("turns"), "into a file").unwrap();
    fs::write(sandbox.source.join("edited"), "anew").unwrap();
    fs::write(sandbox.source.join("new"), "new").unwrap();
    for (run, options) in [("2", &[][..]), ("3", &["--exclude", "d*", "--include", "/d1/e1"])] {
        let before = store(&sandbox);
        let (summary, verbose) = (look(options).text(), look(&[options, &["-v"]].concat()).text());
        let said = look(&[options, &["--json"]].concat()).json();
        let each = look(&[options, &["--json", "-v"]].concat()).json_lines();
        assert_eq!(store(&sandbox), before);
        assert!(summary.starts_with("dry run of /") && summary.contains(" to read"), "{summary}");
        assert!(verbose.ends_with(&summary), "{verbose}");
        assert_eq!((&said["dry_run"], each.last()), (&true.into(), Some(&said)));
        let real = sandbox.backup_with(options);
        assert_eq!(of(&real), of(&said));
        let lines = lines_of(&verbose);
        assert_eq!(lines_of(&sandbox.ok(["list-changes", run]).text()), lines);
        assert_eq!(each.len() - 1, lines.len());
    }
    // While somebody writes the catalog too.
    let lock = File::options().read(true).write(true).open(sandbox.path("catalog.lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    look(&[]);
    sandbox.run(args!["backup", &sandbox.source]).code(11);
}

#[test]
fn a_dry_run_reads_no_content() {
    let sandbox = Sandbox::of_nobody();
    fs::write(sandbox.source.join("closed"), "x").unwrap();
    tool("chmod", args!["0", sandbox.source.join("closed")]);
    let said = sandbox.ok(args!["backup", &sandbox.source, "--dry-run", "--json"]).json();
    assert_eq!((&said["added"], &said["problems"]), (&1.into(), &0.into()));
    sandbox.run(args!["backup", &sandbox.source]).code(3);
}

/// The first line of a run's manifest on a volume of the sandbox.
fn manifest_header(sandbox: &Sandbox, run: i64) -> Value {
    let path = sandbox.path("volume/manifests").join(format!("run-{run:08}.jsonl.zst"));
    let text = zstd::decode_all(File::open(path).unwrap()).unwrap();
    let end = text.iter().position(|byte| *byte == b'\n').unwrap();
    serde_json::from_slice(&text[..end]).unwrap()
}

#[test]
fn comments_and_tags_stay_with_their_run() {
    let sandbox = Sandbox::new();
    grow(&sandbox.source, &["a"]);
    let text = "before \"the\" move\n\u{e4}\u{1b}[31m";
    sandbox.backup_with(&["--comment", text, "--tag", "b", "--tag", "a"]);
    sandbox.backup();
    let runs = sandbox.ok(["runs", "--json"]).json();
    assert_eq!((&runs[0]["comment"], &runs[1]["comment"]), (&text.into(), &"".into()));
    assert_eq!(runs[0]["tags"], serde_json::json!(["a", "b"]));
    let shown = "before \"the\" move\\n\u{e4}\\u{1b}[31m";
    let table = sandbox.ok(["runs"]).text();
    assert!(table.contains(&format!("[a, b]  \"{shown}\"\n")), "{table}");
    let changes = sandbox.ok(["list-changes", "1"]).text();
    assert!(changes.contains(&format!("  comment: {shown}\n")), "{changes}");
    assert!(!sandbox.ok(["list-changes", "2"]).text().contains("comment"));
    let headers = [1, 2].map(|run| manifest_header(&sandbox, run));
    assert_eq!((&headers[0]["comment"], &headers[1]["comment"]), (&text.into(), &"".into()));
    // As much as there may be, and no more: see what is refused.
    sandbox.backup_with(&["--comment", &"x".repeat(64 << 10)]);
    assert_eq!(sandbox.ok(["runs", "--json"]).json()[2]["comment"].as_str().unwrap().len(), 65536);
}

#[test]
fn a_control_file_takes_the_same_words() {
    let sandbox = Sandbox::new();
    let tagged = ["cache/x", "cache/CACHEDIR.TAG", "skip/no", "skip/y"];
    grow(&sandbox.source, &[&["a.o", "b.o", "big", "c"][..], &tagged].concat());
    fs::write(sandbox.source.join("cache/CACHEDIR.TAG"), SIGNATURE).unwrap();
    fs::write(sandbox.source.join("big"), vec![0; 4096]).unwrap();
    let patterns = sandbox.path("patterns");
    fs::write(&patterns, "*.o\n").unwrap();
    let mount = Mount::start(&sandbox, &[]);
    let ask = |line: &str| {
        let mut file = File::options().write(true).open(mount.ctl("backup")).unwrap();
        file.write_all(format!("{line}\n").as_bytes())
    };
    let (source, from) = (sandbox.source.display(), patterns.display());
    ask(&format!(
        "{source} --exclude-from {from} --include a.o --exclude-caches --exclude-if-present no \
         --exclude-larger-than 4kB --one-file-system --comment 'two words' --tag t"
    ))
    .unwrap();
    assert_eq!(mount.wait_for_job(1)["exit_code"], 0);
    assert_paths(&sandbox, 1, &["a.o", "c", "cache/", "cache/CACHEDIR.TAG", "skip/", "skip/no"]);
    assert_eq!(sandbox.ok(["runs", "--json"]).json()[0]["comment"], "two words");
    for line in [
        "--stdin --name x",
        "--stdin-from-command --name x -- true",
        &format!("{source} --dry-run"),
        &format!("{source} --exclude-from patterns"),
        &format!("{source} --exclude-larger-than x"),
    ] {
        assert_eq!(errno(ask(line)), libc::EINVAL, "{line}");
    }
    assert!(mount.log().contains("no standard input"), "{}", mount.log());
    assert!(mount.log().contains("absolute"), "{}", mount.log());
    // What only shows when the job's turn comes: the file may lie in the mount, a pipe would stop
    // the queue, and what is in the file is not for all who may read the job.
    fs::write(mount.point.join("ingest/patterns"), "*.o\nc\n").unwrap();
    let inside = mount.point.join("ingest/patterns");
    ask(&format!("{source} --exclude-from {}", inside.display())).unwrap();
    assert_eq!(mount.wait_for_job(2)["exit_code"], 0);
    assert!(!paths(&sandbox, 2).contains("c"));
    tool("mkfifo", args![sandbox.path("pipe")]);
    fs::write(&patterns, "secret[z-a]\n").unwrap();
    for (job, name, word) in [(3, "pipe", "regular"), (4, "patterns", "line 1"), (5, "no", "no")] {
        ask(&format!("{source} --exclude-from {}", sandbox.path(name).display())).unwrap();
        let said = mount.wait_for_job(job);
        assert_eq!(said["state"], "failed", "{said}");
        let error = said["error"].as_str().unwrap();
        assert!(error.contains(word) && !error.contains("secret"), "{error}");
    }
    // Files that are regular, and would keep the queue waiting: what the kernel has to say, and
    // the log of the very job.
    let own = mount.ctl("jobs/7/log");
    for (job, path) in [(6, Path::new("/proc/kmsg")), (7, &own)] {
        ask(&format!("{source} --exclude-from {}", path.display())).unwrap();
        let said = mount.wait_for_job(job);
        let error = said["error"].as_str().unwrap();
        assert!(error.contains(path.to_str().unwrap()), "{said}");
    }
}
