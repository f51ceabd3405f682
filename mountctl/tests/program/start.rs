//! Starting the daemon, with a few shell lines in its place.
//!
//! Invariant: every test runs the program itself, so what is checked is what a caller sees.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::scene::{GOOD, Scene, assert_code, is_running, signal, stderr, wait_for};

#[test]
fn a_daemon_that_mounts_is_left_running_on_its_own() {
    let scene = Scene::new(GOOD);
    let output = scene.mount("rw,allow_other,cache_size=8M");
    assert_code(&output, 0);
    assert_eq!((output.stdout.len(), output.stderr.len()), (0, 0));
    let pid = scene.daemon_pid();
    assert!(scene.daemon_runs());
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    assert_eq!(fields[2], pid.to_string(), "the process group");
    let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}")).unwrap();
    assert_eq!(link("cwd"), Path::new("/"));
    assert_eq!(link("fd/0"), Path::new("/dev/null"));
    assert_eq!(link("fd/2"), scene.path("cat alog.mount.log"));
    let expected = format!(
        "--catalog\n{}\nmount\n{}\n--foreground\n--allow-other\n--cache-size\n8M\n",
        scene.catalog.display(),
        scene.mountpoint.display()
    );
    assert_eq!(fs::read_to_string(scene.path("arguments")).unwrap(), expected);
}

#[test]
fn relative_paths_are_made_absolute_for_the_daemon() {
    let scene = Scene::new(GOOD);
    let mut command = scene.mountctl();
    command.args(["mount", "./cat alog", "mount point/"]);
    assert_code(&command.output().unwrap(), 0);
    let arguments = fs::read_to_string(scene.path("arguments")).unwrap();
    let lines: Vec<&str> = arguments.lines().collect();
    assert_eq!(Path::new(lines[1]), scene.catalog);
    assert_eq!(Path::new(lines[3]), scene.mountpoint);
}

#[test]
fn the_callers_pipe_is_not_kept_open_by_the_daemon() {
    let scene = Scene::new(GOOD);
    let mut command = scene.mountctl();
    command.arg("mount").args([&scene.catalog, &scene.mountpoint]);
    // `output` returns when both pipes are closed by all who have them.
    let begin = Instant::now();
    assert_code(&command.output().unwrap(), 0);
    assert!(begin.elapsed() < Duration::from_secs(30));
    assert!(scene.daemon_runs());
}

#[test]
fn other_lines_before_the_right_one_do_no_harm() {
    let scene = Scene::new(&format!("echo unmounted x\necho mounting\nsleep 0.3\n{GOOD}"));
    assert_code(&scene.mount("rw"), 0);
}

#[test]
fn saying_mounted_is_not_enough() {
    let scene = Scene::new("echo mounted\necho \"mounted $4\"\nexec sleep 60\n");
    let output = scene.mount("rw");
    assert_code(&output, 1);
    let text = stderr(&output);
    assert!(text.contains("has no .ctl/status"), "{text}");
    assert!(!scene.daemon_runs());
}

#[test]
fn a_status_that_never_comes_is_not_waited_for() {
    let scene = Scene::new(
        "mkdir \"$4/.ctl\"\nmkfifo \"$4/.ctl/status\"\necho \"mounted $4\"\nexec sleep 60\n",
    );
    let output = scene.mount("timeout=1");
    assert_code(&output, 1);
    let text = stderr(&output);
    assert!(text.contains("is not answering"), "{text}");
    assert!(!scene.daemon_runs());
}

#[test]
fn the_message_and_the_code_of_a_failing_daemon_are_passed_on() {
    let scene = Scene::new(
        "echo 'raidtape: the catalog is locked by process 7' >&2\n\
         printf 'second\\033[1m line\\n' >&2\nexit 11\n",
    );
    fs::write(scene.path("cat alog.mount.log"), "of an earlier start\n").unwrap();
    let output = scene.mount("rw");
    assert_code(&output, 11);
    let text = stderr(&output);
    assert!(text.starts_with("mountctl: cannot mount "), "{text}");
    assert!(text.contains("exit code 11"), "{text}");
    assert!(text.contains("\nraidtape: the catalog is locked by process 7\n"), "{text}");
    assert!(text.contains("\nsecond\\u{1b}[1m line\n"), "{text}");
    assert!(!text.contains("earlier"), "{text}");
}

#[test]
fn a_daemon_that_ends_without_a_word_is_a_failure() {
    let scene = Scene::new("exit 0\n");
    let output = scene.mount("rw");
    assert_code(&output, 1);
    assert!(stderr(&output).contains("exit code 0 and no message"));
}

#[test]
fn a_daemon_killed_by_a_signal_is_a_failure() {
    let scene = Scene::new("kill -9 $$\n");
    let output = scene.mount("rw");
    assert_code(&output, 1);
    assert!(stderr(&output).contains("signal 9"));
}

#[test]
fn a_daemon_that_takes_too_long_is_stopped() {
    let scene = Scene::new("sleep 60 &\necho $! > \"$base/child\"\nwait\n");
    let begin = Instant::now();
    let output = scene.mount("timeout=1");
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert_code(&output, 1);
    let text = stderr(&output);
    assert!(text.contains("did not answer within 1 s"), "{text}");
    assert!(text.contains("the daemon was stopped"), "{text}");
    assert!(!scene.daemon_runs());
    let child: u32 = fs::read_to_string(scene.path("child")).unwrap().trim().parse().unwrap();
    wait_for("the child of the daemon to end", || !is_running(child));
}

#[test]
fn an_interrupted_start_leaves_no_daemon() {
    for (helper, name, code) in [(false, "-INT", 130), (true, "-TERM", 8)] {
        let scene = Scene::new("exec sleep 60\n");
        let mut command = match helper {
            true => scene.called("mount.raidtape"),
            false => scene.mountctl(),
        };
        if !helper {
            command.arg("mount");
        }
        let child = command
            .args([&scene.catalog, &scene.mountpoint])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        assert!(scene.daemon_runs());
        signal(name, &child.id().to_string());
        let output = child.wait_with_output().unwrap();
        assert_code(&output, code);
        assert!(stderr(&output).contains("interrupted"));
        assert!(!scene.daemon_runs());
    }
}

#[test]
fn the_daemon_is_found_beside_the_program_even_through_a_link() {
    let scene = Scene::new(GOOD);
    let copy = scene.path("mountctl");
    let copied =
        Command::new("cp").arg(env!("CARGO_BIN_EXE_mountctl")).arg(&copy).status().unwrap();
    assert!(copied.success());
    fs::rename(&scene.daemon, scene.path("raidtape")).unwrap();
    fs::create_dir(scene.path("sbin")).unwrap();
    let link = scene.path("sbin/mount.raidtape");
    std::os::unix::fs::symlink(&copy, &link).unwrap();
    let output = Command::new(&link)
        .args([&scene.catalog, &scene.mountpoint])
        .env_remove("RAIDTAPE_BIN")
        .output()
        .unwrap();
    assert_code(&output, 0);
    assert!(scene.daemon_runs());
}

#[test]
fn a_missing_daemon_program_is_named() {
    let scene = Scene::new(GOOD);
    fs::remove_file(&scene.daemon).unwrap();
    let output = scene.mount("rw");
    assert_code(&output, 1);
    let text = stderr(&output);
    assert!(text.contains("daemon: No such file"), "{text}");
    assert!(text.contains("RAIDTAPE_BIN"), "{text}");
}

#[test]
fn a_missing_catalog_leaves_no_log_behind() {
    let scene = Scene::new(GOOD);
    fs::remove_file(&scene.catalog).unwrap();
    let output = scene.mount("rw");
    assert_code(&output, 10);
    assert!(stderr(&output).contains("no such catalog"));
    assert!(!scene.path("cat alog.mount.log").exists());
    assert!(!scene.path("pid").exists());
}

#[test]
fn what_else_is_mounted_is_left_alone() {
    let scene = Scene::new(GOOD);
    let mut command = scene.mountctl();
    command.arg("mount").arg(&scene.catalog).arg("/proc");
    let output = command.output().unwrap();
    assert_code(&output, 1);
    assert!(stderr(&output).contains("type proc"), "{}", stderr(&output));
    assert!(!scene.path("pid").exists());
}
