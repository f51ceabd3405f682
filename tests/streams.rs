//! Backups of what comes through a pipe.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::SystemTime;

use serde_json::Value;

use crate::common::{Sandbox, args, data, kill, tool, wait_for};

/// The program, backing up what `input` gives.
fn start(sandbox: &Sandbox, options: &[&str], input: Stdio) -> Child {
    let mut command = sandbox.program();
    command.args(["backup", "--json"]).args(options).stdin(input);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[track_caller]
fn end(child: Child, code: i32) -> (String, String) {
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (said, errors) = (text(output.stdout), text(output.stderr));
    assert_eq!(output.status.code(), Some(code), "{said}{errors}");
    (said, errors)
}

/// Backs a file up through a pipe.
#[track_caller]
fn pipe(sandbox: &Sandbox, file: &Path, options: &[&str]) -> Value {
    let mut child = start(sandbox, options, Stdio::piped());
    let mut input = child.stdin.take().unwrap();
    std::io::copy(&mut File::open(file).unwrap(), &mut input).unwrap();
    drop(input);
    serde_json::from_str(&end(child, 0).0).unwrap()
}

fn runs(sandbox: &Sandbox) -> Vec<Value> {
    sandbox.ok(["runs", "--json"]).json().as_array().unwrap().clone()
}

#[test]
fn a_stream_becomes_a_file() {
    for init in [
        &[][..],
        &["--chunking", "fixed", "--chunk-size", "32MiB"],
        &["--chunking", "fixed", "--chunk-size", "1MiB"],
    ] {
        let sandbox = Sandbox::with(init);
        let file = sandbox.path("stream");
        data::noise_file(&file, 150, (70 << 20) + 12345);
        let began = SystemTime::now();
        let said = pipe(&sandbox, &file, &["--stdin", "--name", "db/dump.sql", "--tag", "t"]);
        assert_eq!((&said["source"], &said["added"]), (&"stdin".into(), &1.into()));
        assert_eq!(said["bytes"], (70 << 20) + 12345);
        let out = sandbox.revert(1, "out");
        tool("cmp", args![&file, &out.join("db/dump.sql")]);
        let stat = fs::metadata(out.join("db/dump.sql")).unwrap();
        assert_eq!((stat.permissions().mode() & 0o7777, stat.nlink()), (0o600, 1));
        assert!(stat.modified().unwrap() >= began && stat.modified().unwrap() <= SystemTime::now());
        assert_eq!(fs::metadata(out.join("db")).unwrap().permissions().mode() & 0o7777, 0o700);
        // The same again costs nothing, and a file of the same bytes finds them too.
        let said = pipe(&sandbox, &file, &["--stdin", "--name", "db/dump.sql"]);
        assert_eq!((&said["modified"], &said["bytes_stored"]), (&1.into(), &0.into()));
        assert_eq!((&said["dirs"]["unchanged"], &said["dirs"]["modified"]), (&2.into(), &0.into()));
        if init.last() != Some(&"32MiB") {
            fs::rename(&file, sandbox.source.join("file")).unwrap();
            assert_eq!(sandbox.backup()["bytes_stored"], 0);
        }
        sandbox.assert_valid();
    }
}

#[test]
fn a_stream_takes_little_memory() {
    let sandbox = Sandbox::new();
    let file = sandbox.path("stream");
    data::noise_file(&file, 151, 200 << 20);
    let mut command = sandbox.program();
    command
        .args(["backup", "--stdin", "--name", "x"])
        .stdin(Stdio::from(File::open(&file).unwrap()));
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let (status, mut most) = (format!("/proc/{}/status", child.id()), 0);
    while child.try_wait().unwrap().is_none() {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find(|it| it.starts_with("VmHWM:")).unwrap_or("VmHWM: 0 kB");
        most = most.max(line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10);
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    assert!((1..150).contains(&most), "{most} MiB for 200 MiB");
    let out = sandbox.path("out");
    sandbox.ok(args!["restore", "x", &out]);
    tool("cmp", args![&file, &out]);
}

#[test]
fn the_snapshot_of_a_stream_has_one_file() {
    let sandbox = Sandbox::new();
    let file = sandbox.path("stream");
    fs::write(&file, "").unwrap();
    pipe(&sandbox, &file, &["--stdin", "--name", "a/b", "--as", "mine", "--comment", "empty"]);
    fs::write(&file, "now a file").unwrap();
    let said = pipe(&sandbox, &file, &["--stdin", "--name", "a", "--as", "mine"]);
    assert_eq!((&said["modified"], &said["deleted"]), (&1.into(), &1.into()));
    let said = pipe(&sandbox, &file, &["--stdin", "--name", "c", "--as", "mine"]);
    assert_eq!((&said["added"], &said["deleted"]), (&1.into(), &1.into()));
    assert_eq!(fs::read(sandbox.revert(1, "one").join("a/b")).unwrap(), b"");
    assert_eq!(fs::read(sandbox.revert(2, "two").join("a")).unwrap(), b"now a file");
    let listed = sandbox.ok(["ls", "3", "--json"]).json_lines();
    assert_eq!((listed.len(), &listed[0]["path"]), (1, &"c".into()));
    let runs = runs(&sandbox);
    assert_eq!((&runs[0]["source"], &runs[0]["path"]), (&"mine".into(), &"-".into()));
    assert_eq!(runs[0]["comment"], "empty");
    // A source that was a directory: what was in it is gone in this run.
    data::mixed_tree(&sandbox.source, 152, 10);
    sandbox.backup();
    let name = sandbox.source.to_str().unwrap();
    let said = pipe(&sandbox, &file, &["--stdin", "--name", "d0/x", "--as", name]);
    assert_eq!((&said["added"], &said["deleted"]), (&1.into(), &10.into()));
    sandbox.assert_valid();
}

#[test]
fn what_a_command_prints_becomes_a_file() {
    let sandbox = Sandbox::new();
    let script = "echo to the user >&2; cat; seq 100000";
    let line = ["--stdin-from-command", "--name", "numbers", "--", "sh", "-c", script];
    let (said, errors) = end(start(&sandbox, &line, Stdio::null()), 0);
    assert_eq!(errors, "to the user\n");
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["source"], "stdin");
    let expected: String = (1..=100_000).map(|it| format!("{it}\n")).collect();
    let out = sandbox.revert(1, "out").join("numbers");
    assert_eq!(fs::read_to_string(out).unwrap(), expected);
    sandbox.assert_valid();
}

#[test]
fn a_command_that_fails_fails_the_run() {
    let sandbox = Sandbox::new();
    for (script, word) in [
        ("seq 100000; exit 3", "exit status: 3"),
        ("seq 100000; kill -9 $$", "signal: 9"),
        ("exit 1", "exit status: 1"),
        // Its last words come after it has closed its output.
        ("seq 10; exec >&-; sleep 0.2; exit 4", "exit status: 4"),
    ] {
        for options in [&[][..], &["--single-threaded"]] {
            let line = ["--stdin-from-command", "--name", "x", "--", "sh", "-c", script];
            let line = [options, &line].concat();
            let (said, errors) = end(start(&sandbox, &line, Stdio::null()), 1);
            assert_eq!(said, "");
            assert!(errors.contains("'sh'") && errors.contains(word), "{errors}");
        }
    }
    let line = ["--stdin-from-command", "--name", "x", "--", "/no/such/command"];
    let (_, errors) = end(start(&sandbox, &line, Stdio::null()), 1);
    assert!(errors.contains("/no/such/command"), "{errors}");
    // A stream that cannot be read to its end.
    let dir = File::open(&sandbox.source).unwrap();
    let (_, errors) = end(start(&sandbox, &["--stdin", "--name", "x"], dir.into()), 1);
    assert!(errors.contains("standard input"), "{errors}");
    assert!(runs(&sandbox).is_empty());
    sandbox.backup();
    sandbox.assert_valid();
}

#[test]
fn a_silent_stream_can_be_given_up() {
    let sandbox = Sandbox::new();
    let pid_file = sandbox.path("pid");
    let script = format!("echo $$ > '{}'; seq 10; exec sleep 600", pid_file.display());
    let from_command = ["--stdin-from-command", "--name", "x", "--", "sh", "-c", &script];
    for line in [&["--stdin", "--name", "x"][..], &from_command] {
        let mut child = start(&sandbox, line, Stdio::piped());
        let mut input = child.stdin.take().unwrap();
        input.write_all(b"something").unwrap();
        let tmp = sandbox.path("volume/tmp");
        wait_for("the run to begin", || {
            let locked = fs::read_to_string(sandbox.path("catalog.lock")).unwrap();
            locked == format!("pid {}", child.id()) && (line.len() < 4 || pid_file.exists())
        });
        kill(child.id(), rustix::process::Signal::TERM);
        let (_, errors) = end(child, 130);
        assert!(errors.contains("stopped on request"), "{errors}");
        drop(input);
        assert_eq!(fs::read_dir(tmp).unwrap().count(), 0);
    }
    // Nothing of it runs on.
    let pid = fs::read_to_string(&pid_file).unwrap();
    assert!(!Path::new("/proc").join(pid.trim()).exists());
    assert!(runs(&sandbox).is_empty());
}

#[test]
fn what_makes_no_sense_is_refused() {
    let sandbox = Sandbox::new();
    let source = sandbox.source.to_str().unwrap();
    for line in [
        &["--stdin"][..],
        &["--stdin", "--name", "../x"],
        &["--stdin", "--name", "x", source],
        &["--stdin", "--name", "x", "--dry-run"],
        &["--stdin", "--name", "x", "--exclude-caches"],
        &["--stdin-from-command", "--name", "x"],
        &[source, "--name", "x"],
        &[source, "--", "more"],
    ] {
        end(start(&sandbox, line, Stdio::null()), 2);
    }
    assert!(runs(&sandbox).is_empty());
    // A source whose name begins with a dash still stands after two of them.
    fs::create_dir(sandbox.path("-dir")).unwrap();
    let mut command = sandbox.program();
    command.current_dir(sandbox.path("")).args(["backup", "--", "-dir"]);
    crate::common::run(&mut command).code(0);
}
