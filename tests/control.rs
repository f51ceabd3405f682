//! What is written to control files: lines of every shape, refusals, who may.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::common::{Mount, NOBODY, Ran, Sandbox, errno, kill, need_root, run, wait_for};

/// A sandbox whose source is a file, and its mount.
fn mounted() -> (Sandbox, Mount) {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    let mount = sandbox.mount();
    (sandbox, mount)
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// What the control file answers through this handle.
fn answer(file: &File) -> String {
    let mut text = vec![0; 1 << 16];
    let len = file.read_at(&mut text, 0).unwrap();
    String::from_utf8(text[..len].to_vec()).unwrap()
}

fn jobs(mount: &Mount) -> usize {
    fs::read_dir(mount.ctl("jobs")).unwrap().count()
}

/// Runs a shell on a path, as `$1`, and a second one, as `$2`.
fn shell(line: &str, path: &Path, more: &Path) -> Ran {
    let mut command = Command::new("bash");
    run(command.args(["-c", line, "bash"]).arg(path).arg(more).env("LC_ALL", "C"))
}

#[test]
fn every_tool_that_writes_a_line_asks_for_its_job() {
    let (sandbox, mount) = mounted();
    let lines = sandbox.path("lines");
    let source = sandbox.source.to_str().unwrap();
    fs::write(&lines, format!("{source} --tag a\n{source} --tag b\n")).unwrap();
    let one = format!("{source} --tag one");
    let line = |text: &str| text.replace("LINE", &one);
    let mut known = 0;
    for (how, count) in [
        ("echo LINE > \"$1\"", 1),
        ("echo -n LINE > \"$1\"", 1),
        ("echo LINE >> \"$1\"", 1),
        ("printf 'LINE\\nLINE\\n' > \"$1\"", 2),
        ("printf 'LINE\\nLINE' > \"$1\"", 2),
        ("echo LINE | tee \"$1\"", 1),
        ("cat \"$2\" > \"$1\"", 2),
        ("cp \"$2\" \"$1\"", 2),
        ("dd if=\"$2\" of=\"$1\" bs=1 2>&1", 2),
        ("dd if=\"$2\" of=\"$1\" bs=7 conv=notrunc 2>&1", 2),
        ("dd if=\"$2\" of=\"$1\" bs=1M 2>&1", 2),
        ("echo -n LINE | dd of=\"$1\" bs=1 2>&1", 1),
        ("exec 5> \"$1\"; echo -n LINE >&5; echo ' --tag more' >&5; echo LINE >&5", 2),
    ] {
        shell(&line(how), &mount.ctl("backup"), &lines).code(0);
        for job in known + 1..=known + count {
            let said = mount.wait_for_job(job);
            assert_eq!(said["state"], "done", "{how}: {said}");
            assert_eq!(said["command"].as_str().unwrap().matches(source).count(), 1, "{how}");
        }
        known += count;
        assert_eq!(jobs(&mount), known as usize, "{how}");
    }
    // A line of no words is a job where the command takes none.
    shell("echo > \"$1\"", &mount.ctl("validate"), &lines).code(0);
    assert_eq!(mount.wait_for_job(known + 1)["state"], "done");
    shell(": > \"$1\"", &mount.ctl("validate"), &lines).code(0);
    assert_eq!(jobs(&mount), known as usize + 1);
}

#[test]
fn a_refusal_can_be_read_back() {
    let (sandbox, mount) = mounted();
    let path = mount.ctl("backup");
    let (mut file, other) = (open(&path), open(&path));
    let source = sandbox.source.to_str().unwrap();
    let text = format!("{source}\nrelative\n{source}\n");
    assert_eq!(errno(file.write_all(text.as_bytes())), libc::EINVAL);
    assert_eq!(jobs(&mount), 0, "all lines of a write or none");
    for handle in [&file, &other] {
        let said = answer(handle);
        assert!(said.starts_with("refused EINVAL: line 2: "), "{said}");
        assert!(said.contains("absolute"), "{said}");
    }
    assert!(mount.log().contains("refused EINVAL"), "{}", mount.log());
    assert_eq!(errno(file.sync_all()), libc::EINVAL);
    // The handle is as good as before.
    file.write_all(format!("{source}\n").as_bytes()).unwrap();
    assert!(answer(&file).starts_with("job 1\n"));
    file.sync_all().unwrap();
    assert!(answer(&file).contains("\nstate done\n"));
    // Where a tool closes what it wrote without newline, it is told.
    let ran = shell("echo -n relative | dd of=\"$1\" bs=1M", &path, &path).code(1);
    assert!(ran.errors().contains("Invalid argument"), "{}", ran.errors());
    assert!(answer(&other).starts_with("refused EINVAL: "), "the last word of all");
    assert!(answer(&file).contains("\nstate done\n"), "this one's own");
    // Reading ends a line too.
    file.write_all(b"relative").unwrap();
    assert!(answer(&file).starts_with("refused EINVAL: "));
}

#[test]
fn garbage_is_refused_in_every_shape() {
    let (sandbox, mount) = mounted();
    let path = mount.ctl("backup");
    let mebibyte = vec![b'x'; 1 << 20];
    assert_eq!(errno(open(&path).write_all(&mebibyte)), libc::E2BIG);
    assert_eq!(errno(open(&path).write_all(&b"x\n".repeat(1 << 19))), libc::E2BIG);
    let mut file = open(&path);
    let mut taken = 0;
    let refused = loop {
        match file.write(&mebibyte[..4096]) {
            Ok(len) => taken += len,
            Err(e) => break e.raw_os_error(),
        }
    };
    assert_eq!((refused, taken), (Some(libc::E2BIG), 64 << 10));
    // The end of a line that was refused is not taken for a line.
    let source = sandbox.source.to_str().unwrap();
    assert_eq!(errno(file.write_all(format!("{source}\n").as_bytes())), libc::E2BIG);
    assert!(answer(&file).starts_with("refused E2BIG: "), "{}", answer(&file));
    file.write_all(format!("{source}\n").as_bytes()).unwrap();
    for garbage in [&b"/a\0b\n"[..], b"\0", b"\xff\xfe\n", b"--tag \xff /a\n", b"\n\n"] {
        assert_eq!(errno(open(&path).write_all(garbage)), libc::EINVAL, "{garbage:?}");
    }
    // A path may have any bytes, and the job says that there is no such thing.
    open(&path).write_all(b"/\xff\n").unwrap();
    let said = mount.wait_for_job(2);
    assert_eq!((said["state"].as_str(), jobs(&mount)), (Some("failed"), 2));
    let command = fs::read_to_string(mount.ctl("jobs/2/command")).unwrap();
    assert_eq!(command, "backup /\\xff\n");
}

#[test]
fn a_file_held_open_works_again_and_again() {
    let (sandbox, mount) = mounted();
    let fds = || fs::read_dir(format!("/proc/{}/fd", mount.pid())).unwrap().count();
    let mut file = open(&mount.ctl("backup"));
    let line = format!("{}\n", sandbox.source.display());
    let mut before = 0;
    for turn in 1..=30 {
        file.write_all(line.as_bytes()).unwrap();
        file.sync_all().unwrap();
        assert!(answer(&file).starts_with(&format!("job {turn}\nstate done\n")));
        assert_eq!(errno(file.write_all(b"relative\n")), libc::EINVAL);
        assert!(answer(&file).starts_with("refused EINVAL"));
        if turn == 10 {
            before = fds();
        }
    }
    assert!(fds() <= before + 2, "{} descriptors, {before} before", fds());
}

#[test]
fn writers_do_not_mix() {
    let (sandbox, mount) = mounted();
    let source = sandbox.source.to_str().unwrap();
    let path = mount.ctl("backup");
    let lines = |writer: usize| -> Vec<String> {
        (0..4).map(|n| format!("{source} --tag from-{writer}-{n}")).collect()
    };
    // In pieces, on descriptors of their own.
    std::thread::scope(|scope| {
        for writer in 0..2 {
            let (path, lines) = (&path, lines(writer));
            scope.spawn(move || {
                let mut file = open(path);
                for byte in lines.join("\n").into_bytes().chunks(3) {
                    file.write_all(byte).unwrap();
                }
                file.write_all(b"\n").unwrap();
            });
        }
    });
    // In pieces, through one descriptor, from two processes.
    let shared = open(&path);
    let mut children: Vec<_> = (2..4)
        .map(|writer| {
            let mut command = Command::new("dd");
            command.args(["bs=5", "status=none"]).stdin(Stdio::piped());
            let mut child = command.stdout(shared.try_clone().unwrap()).spawn().unwrap();
            let mut input = child.stdin.take().unwrap();
            input.write_all(format!("{}\n", lines(writer).join("\n")).as_bytes()).unwrap();
            child
        })
        .collect();
    for child in &mut children {
        assert!(child.wait().unwrap().success());
    }
    let mut found = Vec::new();
    for job in 1..=jobs(&mount) as u64 {
        let command = fs::read_to_string(mount.ctl(&format!("jobs/{job}/command"))).unwrap();
        found.push(command.trim_end().strip_prefix("backup ").unwrap().to_owned());
        mount.wait_for_job(job);
    }
    let mut expected: Vec<String> = (0..4).flat_map(lines).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
}

/// Runs a shell on a path as another user, in these groups.
fn as_user(line: &str, path: &Path, groups: &str) -> Ran {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", &format!("--groups={groups}"), "--"]);
    run(command.args(["sh", "-c", line, "sh"]).arg(path).env("LC_ALL", "C").current_dir("/"))
}

#[test]
fn modes_delegate_and_last() {
    need_root("it becomes another user");
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    let line = format!("echo {} > \"$1\"", sandbox.source.display());
    let mount = Mount::start(&sandbox, &["--allow-other"]);
    let path = mount.ctl("backup");
    let denied = |ran: Ran| assert!(ran.errors().contains("denied"), "{}", ran.errors());
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    denied(as_user(&line, &path, "4242"));
    assert_eq!(
        errno(fs::set_permissions(mount.ctl("jobs"), Permissions::from_mode(0o777))),
        libc::EROFS
    );
    chown(&path, None, Some(4242)).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o660)).unwrap();
    assert_eq!(mode(&path), 0o660);
    as_user(&line, &path, "4242").code(0);
    denied(as_user(&line, &path, "4243"));
    let said = mount.wait_for_job(1);
    assert_eq!((said["state"].as_str(), said["asked_by"].as_u64()), (Some("done"), Some(65534)));
    let log = fs::read_to_string(mount.ctl("jobs/1/log")).unwrap();
    assert!(log.contains("asked for by user 65534"), "{log}");
    // Who may ask may watch and cancel.
    assert_eq!(mode(&mount.ctl("jobs/1/log")), 0o440);
    assert_eq!(mode(&mount.ctl("jobs/1/cancel")), 0o220);
    as_user("cat \"$1\"", &mount.ctl("jobs/1/log"), "4242").code(0);
    denied(as_user("cat \"$1\"", &mount.ctl("jobs/1/log"), "4243"));
    assert_eq!(
        errno(fs::set_permissions(mount.ctl("jobs/1/log"), Permissions::from_mode(0o444))),
        libc::EPERM
    );
    // Only the owner gives rights away.
    let ran = as_user("chmod 666 \"$1\"", &path, "4242");
    assert!(ran.errors().contains("not permitted"), "{}", ran.errors());
    // Others' verbs are as they were; other verbs too.
    denied(as_user("echo > \"$1\"", &mount.ctl("validate"), "4242"));
    // A descriptor that was opened while it was allowed is worth nothing afterwards.
    let file = open(&path);
    let hand_on = |file: &File| {
        let mut command = Command::new("echo");
        command.arg("ingest").env("LC_ALL", "C").uid(NOBODY).gid(NOBODY);
        command.stdout(file.try_clone().unwrap()).stderr(Stdio::piped());
        let output = command.spawn().unwrap().wait_with_output().unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(hand_on(&file).contains("Permission denied"), "its group is another");
    chown(&path, Some(NOBODY), None).unwrap();
    assert_eq!(hand_on(&file), "");
    fs::set_permissions(&path, Permissions::from_mode(0o060)).unwrap();
    assert!(hand_on(&file).contains("Permission denied"));
    drop(file);
    mount.end();
    let mount = Mount::start(&sandbox, &["--allow-other"]);
    let stat = fs::metadata(mount.ctl("backup")).unwrap();
    assert_eq!((stat.mode() & 0o7777, stat.uid(), stat.gid()), (0o060, NOBODY, 4242));
    denied(as_user(&line, &mount.ctl("backup"), "4242"));
    chown(mount.ctl("backup"), Some(0), None).unwrap();
    as_user(&line, &mount.ctl("backup"), "4242").code(0);
}

#[test]
fn the_state_of_the_mount_is_for_programs() {
    let (sandbox, mount) = mounted();
    sandbox.backup();
    let read = |name: &str| fs::read_to_string(mount.ctl(name)).unwrap();
    assert_eq!(read("version"), concat!("raidtape ", env!("CARGO_PKG_VERSION"), "\n"));
    let status: serde_json::Value = serde_json::from_str(&read("status")).unwrap();
    assert_eq!(status["format"], 1);
    assert_eq!(status["pid"], mount.pid());
    assert_eq!(status["catalog"].as_str(), sandbox.catalog.to_str());
    assert_eq!(status["mountpoint"].as_str(), mount.point.to_str());
    let how = &status["mount"];
    assert_eq!(how["allow_other"], false);
    assert!(how["sessions"].is_u64() && how["reads"].is_string(), "{status}");
    assert_eq!(status["runs"], serde_json::json!({ "count": 1, "latest": 1 }));
    let volume = &status["volumes"][0];
    assert_eq!((&volume["present"], &volume["status"]), (&true.into(), &"active".into()));
    assert!(volume["free_bytes"].as_u64() <= volume["total_bytes"].as_u64(), "{volume}");
    assert!(volume["age_seconds"].is_u64(), "{volume}");
    for key in ["bytes", "limit_bytes", "hits", "misses", "ahead", "ahead_used", "ahead_bytes"] {
        assert!(status["cache"][key].is_u64(), "{key} in {status}");
    }
    fs::rename(sandbox.path("volume"), sandbox.path("away")).unwrap();
    let status: serde_json::Value = serde_json::from_str(&read("status")).unwrap();
    assert_eq!(status["volumes"][0]["present"], false);
    assert_eq!(status["jobs"], serde_json::json!({ "queued": 0, "running": 0, "finished": 0 }));
    // A reader in pieces sees one text.
    let mut file = File::open(mount.ctl("status")).unwrap();
    let (mut pieces, mut piece) = (Vec::new(), [0; 17]);
    while let len @ 1.. = file.read(&mut piece).unwrap() {
        pieces.extend_from_slice(&piece[..len]);
        wait_for("nothing", || true);
    }
    serde_json::from_slice::<serde_json::Value>(&pieces).unwrap();
}

#[test]
fn a_disk_that_hangs_does_not_hold_up_the_status() {
    let (sandbox, other) = (Sandbox::new(), Sandbox::bare());
    other.init(&[]);
    // A disk that can be made to hang: another mount.
    let disk = sandbox.mount();
    let path = disk.point.join("ingest/volume");
    other.ok([OsStr::new("add-volume"), path.as_os_str()]);
    let mount = other.mount();
    let volume = || {
        let text = fs::read_to_string(mount.ctl("status")).unwrap();
        let status: serde_json::Value = serde_json::from_str(&text).unwrap();
        status["volumes"][0].clone()
    };
    let before = volume();
    assert_eq!(before["present"], true, "{before}");
    kill(disk.pid(), Signal::STOP);
    wait_for("old figures", || {
        let told = volume();
        assert_eq!(
            (&told["present"], &told["total_bytes"]),
            (&true.into(), &before["total_bytes"])
        );
        told["age_seconds"].as_u64().unwrap() > 0
    });
    kill(disk.pid(), Signal::CONT);
    wait_for("new figures", || volume()["age_seconds"] == 0);
}
