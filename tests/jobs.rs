//! Jobs by control file: taken, refused, watched, cancelled.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::common::{
    Mount, NOBODY, Sandbox, Tree, assert_same, data, errno, mountctl, need_root, run, wait_for,
};

fn ask(mount: &Mount, line: &str) -> std::io::Result<()> {
    OpenOptions::new().write(true).open(mount.ctl("backup"))?.write_all(line.as_bytes())
}

#[test]
fn a_line_is_a_command_line() {
    let mut sandbox = Sandbox::new();
    sandbox.source = sandbox.path("a 'quoted' source");
    fs::create_dir(&sandbox.source).unwrap();
    data::mixed_tree(&sandbox.source, 80, 40);
    fs::write(sandbox.source.join("left.out"), "x").unwrap();
    let mount = sandbox.mount();
    assert!(fs::read_to_string(mount.ctl("backup")).unwrap().starts_with("no job yet"));
    let quoted =
        format!("\"{}\" --tag 'two words' --exclude '*.out' --as mine\n", sandbox.source.display());
    ask(&mount, &quoted).unwrap();
    let said = mount.wait_for_job(1);
    assert_eq!((said["state"].as_str(), said["exit_code"].as_u64()), (Some("done"), Some(0)));
    let expected = Tree::of(&sandbox.source).without(|path, _| path == b"left.out");
    assert_same(&expected, &Tree::of(&mount.run(1)));
    let runs = sandbox.ok(["runs", "--json"]).json();
    assert_eq!(
        (&runs[0]["source"], &runs[0]["tags"]),
        (&"mine".into(), &serde_json::json!(["two words"]))
    );

    // Everything that tells of the job.
    let mut names: Vec<_> =
        fs::read_dir(mount.ctl("jobs/1")).unwrap().map(|it| it.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["cancel", "command", "log", "progress.json", "status"]);
    let status = fs::read_to_string(mount.ctl("jobs/1/status")).unwrap();
    for line in ["job 1", "state done", "run 1", "exit_code 0"] {
        assert!(status.lines().any(|it| it == line), "{line:?} in {status}");
    }
    assert_eq!(fs::read_to_string(mount.ctl("backup")).unwrap(), status);
    let log = fs::read_to_string(mount.ctl("jobs/1/log")).unwrap();
    let said: Vec<&str> = log.lines().map(|it| it.split_once(' ').unwrap().1).collect();
    assert!(said[0].starts_with("asked for by user"), "{log}");
    assert!(said.contains(&"backing up") && said.last().unwrap().starts_with("done: "), "{log}");
    let said = mount.job(1);
    for key in
        ["added", "modified", "deleted", "unchanged", "bytes_read", "files_done", "bytes_done"]
    {
        assert!(said[key].is_u64(), "{key} in {said}");
    }
    assert_eq!(said["bytes_read"], runs[0]["bytes_read"]);
    assert_eq!(errno(fs::read_to_string(mount.ctl("jobs/2/status"))), libc::ENOENT);
    let status: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(mount.ctl("status")).unwrap()).unwrap();
    assert_eq!(status["jobs"]["finished"], 1, "{status}");
}

#[test]
fn malformed_lines_are_refused_at_once() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    for line in [
        "",
        " ",
        "--tag",
        "relative",
        "/a /b",
        "'/a",
        "/a --nonsense",
        "ingest extra",
        "/a\0b",
        "--help",
        "/a --max-workers 0",
    ] {
        assert_eq!(errno(ask(&mount, &format!("{line}\n"))), libc::EINVAL, "{line:?}");
        // Without its newline a line ends where it is synced.
        let mut file = OpenOptions::new().write(true).open(mount.ctl("backup")).unwrap();
        if file.write_all(line.as_bytes()).is_ok() && !line.is_empty() {
            assert_eq!(errno(file.sync_all()), libc::EINVAL, "{line:?}");
        }
    }
    assert_eq!(fs::read_dir(mount.ctl("jobs")).unwrap().count(), 0);
    assert_eq!(errno(fs::write(mount.ctl("status"), "x")), libc::EACCES);
}

#[test]
fn a_job_that_fails_says_why() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    ask(&mount, "/there/is/no/such/directory").unwrap();
    let said = mount.wait_for_job(1);
    assert_eq!((said["state"].as_str(), said["exit_code"].as_u64()), (Some("failed"), Some(1)));
    assert!(said["error"].as_str().unwrap().contains("/there/is/no/such"), "{said}");
    let log = fs::read_to_string(mount.ctl("jobs/1/log")).unwrap();
    assert!(log.contains("/there/is/no/such"), "{log}");
    // What is inside the mount cannot be a source.
    ask(&mount, mount.point.join("snapshots").to_str().unwrap()).unwrap();
    assert_eq!(mount.wait_for_job(2)["exit_code"], 2);
}

#[test]
fn jobs_wait_for_their_turn_and_can_be_cancelled() {
    let sandbox = Sandbox::new();
    data::noise_file(&sandbox.source.join("large"), 81, 160 << 20);
    let small = sandbox.path("small");
    fs::create_dir(&small).unwrap();
    fs::write(small.join("file"), "x").unwrap();
    let mount = sandbox.mount();
    let (large, small) = (sandbox.source.to_str().unwrap(), small.to_str().unwrap());
    let cancel = |job| fs::write(mount.ctl(&format!("jobs/{job}/cancel")), "x\n").unwrap();
    for line in [large, small, small] {
        ask(&mount, line).unwrap();
    }
    wait_for("the first job to run", || mount.job(1)["state"] == "running");
    assert_eq!(mount.job(2)["state"], "queued");
    cancel(2);
    assert_eq!(mount.job(2)["state"], "cancelled");
    cancel(1);
    let said = mount.wait_for_job(1);
    assert_eq!(
        (said["state"].as_str(), said["exit_code"].as_u64()),
        (Some("cancelled"), Some(130))
    );
    let said = mount.wait_for_job(3);
    assert_eq!((said["state"].as_str(), said["run"].as_i64()), (Some("done"), Some(1)));
    assert_eq!(fs::read_dir(mount.ctl("jobs")).unwrap().count(), 3);
    assert_eq!(sandbox.ok(["runs", "--json"]).json().as_array().unwrap().len(), 1);
    // No strays, and the next run of the large one is complete.
    assert_eq!(fs::read_dir(sandbox.path("volume/tmp")).unwrap().count(), 0);
    ask(&mount, large).unwrap();
    assert_eq!(mount.wait_for_job(4)["state"], "done");
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&mount.run(2)));
    sandbox.assert_valid();
}

#[test]
fn a_mount_that_ends_takes_its_jobs_along() {
    let sandbox = Sandbox::new();
    data::noise_file(&sandbox.source.join("large"), 82, 100 << 20);
    let mount = sandbox.mount();
    ask(&mount, sandbox.source.to_str().unwrap()).unwrap();
    wait_for("the job to run", || mount.job(1)["state"] == "running");
    mount.end();
    assert_eq!(sandbox.ok(["runs", "--json"]).json(), serde_json::json!([]));
    sandbox.backup();
    sandbox.assert_valid();
}

#[test]
fn only_the_owner_asks_for_jobs() {
    need_root("it becomes another user");
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("open"), "x").unwrap();
    fs::write(sandbox.source.join("private"), "x").unwrap();
    fs::set_permissions(sandbox.source.join("private"), fs::Permissions::from_mode(0o600)).unwrap();
    sandbox.backup();
    let as_nobody = |line: &str, path: &std::path::Path| {
        let mut command = Command::new("sh");
        command.args(["-c", line, "sh"]).arg(path).env("LC_ALL", "C").uid(NOBODY).gid(NOBODY);
        run(command.current_dir("/"))
    };
    let denied = |line: &str, path: &std::path::Path| {
        let ran = as_nobody(line, path);
        // The words of EACCES.
        assert!(ran.errors().contains("Permission denied"), "{line}: {}", ran.errors());
        assert_eq!(ran.text(), "", "{line}");
    };
    let mount = Mount::start(&sandbox, &["--allow-other"]);
    denied("echo ingest > \"$1\"", &mount.ctl("backup"));
    denied("cat < \"$1\"", &mount.run(1).join("private"));
    denied("echo x > \"$1\"", &mount.point.join("ingest/file"));
    assert_eq!(as_nobody("cat < \"$1\"", &mount.run(1).join("open")).code(0).text(), "x");
    as_nobody("cat < \"$1\"", &mount.ctl("status")).code(0);
    // Not even through a file that the owner has opened.
    let open = OpenOptions::new().write(true).open(mount.ctl("backup")).unwrap();
    let mut command = Command::new("echo");
    command.arg("ingest").env("LC_ALL", "C").uid(NOBODY).stdout(open);
    let output = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let output = output.wait_with_output().unwrap();
    // It holds the file open still, and so the mount.
    drop(command);
    assert!(String::from_utf8_lossy(&output.stderr).contains("Permission denied"), "{output:?}");
    assert_eq!(fs::read_dir(mount.ctl("jobs")).unwrap().count(), 0);
    // A job is watched and cancelled by who may ask for it.
    ask(&mount, "ingest").unwrap();
    mount.wait_for_job(1);
    denied("cat < \"$1\"", &mount.ctl("jobs/1/status"));
    denied("cat < \"$1\"", &mount.ctl("jobs/1/log"));
    denied("echo x > \"$1\"", &mount.ctl("jobs/1/cancel"));
    mount.end();
    // Without the option nobody else comes in at all.
    let mount = sandbox.mount();
    denied("cat < \"$1\"", &mount.run(1).join("open"));
}

#[test]
fn who_mounts_without_being_root_owns_the_mount() {
    let sandbox = Sandbox::of_nobody();
    crate::common::need_tool("fusermount3");
    let (file, point) = (sandbox.source.join("file"), sandbox.path("point"));
    fs::write(&file, "x").unwrap();
    fs::create_dir(&point).unwrap();
    // Root tries this in a mount namespace of its own, where anybody may open /dev/fuse, as is
    // usual, but not everywhere so.
    let mut command = match crate::common::is_root() {
        true => Command::new("unshare"),
        false => Command::new("sh"),
    };
    if crate::common::is_root() {
        for path in [&file, &point] {
            std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let open = "set -e; cp -a /dev/fuse \"$1\"; chmod 666 \"$1\"; \
                    mount --bind \"$1\" /dev/fuse; shift; \
                    exec setpriv --reuid 65534 --regid 65534 --clear-groups -- \"$@\"";
        command.args(["--mount", "--propagation", "private", "sh", "-c", open, "sh"]);
        command.arg(sandbox.path("fuse")).arg("sh");
    }
    let line = "set -e; \"$1\" --catalog \"$2\" mount \"$3\"; trap '\"$1\" umount \"$3\"' EXIT; \
                cp \"$4\" \"$3/ingest/\"; printf ingest > \"$3/.ctl/backup\"; \
                while grep -q -e '^state [qrw]' \"$3/.ctl/jobs/1/status\"; \
                do sleep 0.05; done; cat \"$3/snapshots/latest/file\"";
    command.args(["-c", line, "sh"]).arg(sandbox.program().get_program());
    command.arg(&sandbox.catalog).arg(&point).arg(&file).current_dir("/");
    let said = run(&mut command).code(0).text();
    assert_eq!(said, format!("mounted {}\nx", point.display()));
    let runs = sandbox.ok(["runs", "--json"]).json();
    assert_eq!((&runs[0]["source"], &runs[0]["files"]), (&"ingest".into(), &1.into()));
}

#[test]
fn the_helper_runs_jobs_to_their_end() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    let mount = sandbox.mount();
    let helper = |words: &[&str]| {
        let mut command = mountctl();
        run(command.arg("backup").arg("--mount").arg(&mount.point).args(words))
    };
    let source = sandbox.source.to_str().unwrap();
    helper(&[source, "--tag", "by helper"]).code(0);
    assert_eq!(fs::read(mount.run(1).join("file")).unwrap(), b"x");
    fs::write(mount.point.join("ingest/file"), "y").unwrap();
    helper(&["--quiet", "ingest"]).code(0);
    assert_eq!(fs::read(mount.run(2).join("file")).unwrap(), b"y");
    helper(&["/there/is/no/such/directory"]).code(1);
    helper(&["ingest", "--nonsense"]).code(2);
    let said = helper(&["--detach", source]).code(0).text();
    let job = said.trim().strip_prefix("job ").unwrap().parse().unwrap();
    assert_eq!(mount.wait_for_job(job)["state"], "done");
    drop(File::open(mount.ctl("status")).unwrap());
    run(mountctl().arg("umount").arg(&mount.point)).code(0);
}
