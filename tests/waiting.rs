//! Those who wait for jobs, and jobs that wait for others: logs, fsync, poll, signals, locks.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use raidtape::sys::wait_readable;
use rustix::fs::FlockOperation;
use rustix::process::Signal;

use crate::common::{
    Mount, NOBODY, PATIENCE, Sandbox, data, errno, kill, need_root, run, wait_for,
};

/// The writer's lock of a catalog, held as another process would.
struct Held(File);

impl Held {
    fn of(sandbox: &Sandbox) -> Held {
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .open(sandbox.path("catalog.lock"))
            .unwrap();
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
        file.write_all(b"pid 4711").unwrap();
        Held(file)
    }

    fn release(self) {
        rustix::fs::flock(&self.0, FlockOperation::Unlock).unwrap();
    }
}

fn ask(mount: &Mount, sandbox: &Sandbox) -> u64 {
    let mut file = OpenOptions::new().read(true).write(true).open(mount.ctl("backup")).unwrap();
    file.write_all(format!("{}\n", sandbox.source.display()).as_bytes()).unwrap();
    let text = fs::read_to_string(mount.ctl("backup")).unwrap();
    text.lines().next().unwrap().strip_prefix("job ").unwrap().parse().unwrap()
}

fn state(mount: &Mount, job: u64) -> String {
    mount.job(job)["state"].as_str().unwrap().to_owned()
}

/// A job that waits for somebody else's lock.
fn waiting_job(sandbox: &Sandbox, mount: &Mount) -> u64 {
    let job = ask(mount, sandbox);
    wait_for("the job to wait", || state(mount, job) == "waiting");
    job
}

fn tool(name: &str, path: std::path::PathBuf) -> Child {
    let mut command = Command::new(name);
    command.arg(path).env("LC_ALL", "C").stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Waits until a process waits in the kernel.
fn wait_until_it_sleeps(child: &Child, call: &str) {
    let path = format!("/proc/{}/stack", child.id());
    wait_for(call, || fs::read_to_string(&path).unwrap_or_default().contains(call));
}

#[test]
fn a_log_is_followed_to_the_end_of_its_job() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    let mount = sandbox.mount();
    let lock = Held::of(&sandbox);
    let job = waiting_job(&sandbox, &mount);
    let mut child = tool("cat", mount.ctl(&format!("jobs/{job}/log")));
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || lines.next().map(|it| it.unwrap().split_once(' ').unwrap().1.to_owned());
    assert!(next().unwrap().starts_with("asked for by user"));
    assert_eq!(next().unwrap(), "preparing");
    assert_eq!(next().unwrap(), "waiting for lock held by pid 4711");
    // There is no more now, and no end.
    let mut options = OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    let mut file = options.read(true).open(mount.ctl(&format!("jobs/{job}/log"))).unwrap();
    assert!(file.read(&mut [0; 4096]).unwrap() > 0);
    assert_eq!(errno(file.read(&mut [0; 4096])), libc::EAGAIN);
    lock.release();
    let rest: Vec<String> = std::iter::from_fn(next).collect();
    assert_eq!(rest[0], "backing up", "{rest:?}");
    assert!(rest.last().unwrap().starts_with("done: run 1 of "), "{rest:?}");
    assert!(child.wait().unwrap().success());
    assert_eq!(state(&mount, job), "done");
}

#[test]
fn who_waits_can_be_stopped_while_the_job_goes_on() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let lock = Held::of(&sandbox);
    let job = waiting_job(&sandbox, &mount);
    // Others who wait for the same hold up nobody.
    let mut others: Vec<Child> =
        ["backup", &format!("jobs/{job}/status")].map(|path| tool("sync", mount.ctl(path))).into();
    others.iter().for_each(|it| wait_until_it_sleeps(it, "fuse"));
    for signal in [Signal::INT, Signal::KILL, Signal::TERM] {
        for (name, path) in [
            ("cat", format!("jobs/{job}/log")),
            ("sync", "backup".to_owned()),
            ("sync", format!("jobs/{job}/status")),
        ] {
            let mut child = tool(name, mount.ctl(&path));
            wait_until_it_sleeps(&child, "fuse");
            kill(child.id(), signal);
            // It ends: nothing else would let this return.
            let status = child.wait().unwrap();
            let by = std::os::unix::process::ExitStatusExt::signal(&status);
            assert_eq!(by, Some(signal.as_raw()), "{name}");
        }
    }
    assert_eq!(state(&mount, job), "waiting");
    lock.release();
    assert_eq!(mount.wait_for_job(job)["state"], "done");
    others.iter_mut().for_each(|it| assert!(it.wait().unwrap().success()));
}

#[test]
fn more_than_may_wait_are_told_so() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let lock = Held::of(&sandbox);
    let job = waiting_job(&sandbox, &mount);
    let path = mount.ctl(&format!("jobs/{job}/log"));
    let (said, heard) = std::sync::mpsc::channel();
    let read = || {
        let mut file = File::open(&path).unwrap();
        let mut text = Vec::new();
        let result = file.read_to_end(&mut text);
        said.send(result.map_err(|e| e.raw_os_error())).unwrap();
    };
    std::thread::scope(|scope| {
        for _ in 0..256 + 10 {
            scope.spawn(read);
        }
        for _ in 0..10 {
            let first = heard.recv_timeout(PATIENCE).unwrap();
            assert_eq!(first, Err(Some(libc::EAGAIN)));
        }
        // All else goes on meanwhile.
        assert_eq!(state(&mount, job), "waiting");
        assert_eq!(fs::read_dir(mount.point.join("snapshots")).unwrap().count(), 0);
        lock.release();
        for _ in 0..256 {
            assert!(heard.recv_timeout(PATIENCE).unwrap().is_ok());
        }
    });
    assert_eq!(mount.wait_for_job(job)["state"], "done");
}

#[test]
fn fsync_tells_of_what_was_asked_for_by_this_descriptor_or_user() {
    need_root("it becomes another user");
    let sandbox = Sandbox::new();
    let mount = Mount::start(&sandbox, &["--allow-other"]);
    fs::set_permissions(mount.ctl("backup"), Permissions::from_mode(0o666)).unwrap();
    let open = || OpenOptions::new().write(true).open(mount.ctl("backup")).unwrap();
    let sync = || File::open(mount.ctl("backup")).unwrap().sync_all();
    let good = format!("{}\n", sandbox.source.display());
    // Nobody has asked for anything.
    sync().unwrap();
    let (mut first, mut second) = (open(), open());
    first.write_all(good.as_bytes()).unwrap();
    // A refusal is that descriptor's own.
    assert_eq!(errno(second.write_all(b"relative\n")), libc::EINVAL);
    assert_eq!(errno(second.sync_all()), libc::EINVAL);
    first.sync_all().unwrap();
    sync().unwrap();
    // Each job since the last time counts, also one that ended long before.
    first.write_all(b"/there/is/none\n").unwrap();
    for _ in 0..40 {
        first.write_all(good.as_bytes()).unwrap();
        let last = fs::read_dir(mount.ctl("jobs")).unwrap().count() as u64;
        assert_eq!(mount.wait_for_job(last)["state"], "done");
    }
    assert_eq!(errno(sync()), libc::EIO, "what the user has asked for last");
    assert_eq!(errno(first.sync_all()), libc::EIO);
    first.write_all(good.as_bytes()).unwrap();
    first.sync_all().unwrap();
    // Another user's jobs are another matter.
    let line = "echo /there/is/none > \"$1\"; sync \"$1\"";
    let mut command = Command::new("sh");
    command.args(["-c", line, "sh"]).arg(mount.ctl("backup")).current_dir("/");
    let ran = run(command.env("LC_ALL", "C").uid(NOBODY).gid(NOBODY)).code(1);
    assert!(ran.errors().contains("Input/output error"), "{}", ran.errors());
    sync().unwrap();
    // What was opened by another way than its name is the same inode, and works.
    let again = OpenOptions::new().write(true).open(format!("/proc/self/fd/{}", first.as_raw_fd()));
    again.unwrap().write_all(good.as_bytes()).unwrap();
}

#[test]
fn fsync_waits_and_tells_how_it_went() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let lock = Held::of(&sandbox);
    let job = waiting_job(&sandbox, &mount);
    let mut held = OpenOptions::new().write(true).open(mount.ctl("backup")).unwrap();
    let mut waiting = tool("sync", mount.ctl("backup"));
    let mut by_number = tool("sync", mount.ctl(&format!("jobs/{job}/status")));
    wait_until_it_sleeps(&waiting, "fsync");
    wait_until_it_sleeps(&by_number, "fsync");
    // Others go on writing meanwhile, also those who had it open before.
    assert_eq!(errno(held.write_all(b"relative\n")), libc::EINVAL);
    let second = ask(&mount, &sandbox);
    fs::write(mount.ctl("backup"), "relative").unwrap();
    assert_eq!(state(&mount, second), "queued");
    assert!(waiting.try_wait().unwrap().is_none() && by_number.try_wait().unwrap().is_none());
    lock.release();
    assert!(waiting.wait().unwrap().success() && by_number.wait().unwrap().success());
    assert_eq!(mount.wait_for_job(second)["state"], "done");
    File::open(mount.ctl("backup")).unwrap().sync_all().unwrap();
    // A job that fails, and one that is cancelled, by handle and by name.
    let open = || OpenOptions::new().write(true).open(mount.ctl("backup")).unwrap();
    let mut file = open();
    file.write_all(b"/there/is/no/such\n").unwrap();
    assert_eq!(errno(file.sync_all()), libc::EIO);
    assert_eq!(errno(File::open(mount.ctl("backup")).unwrap().sync_all()), libc::EIO);
    let lock = Held::of(&sandbox);
    let job = waiting_job(&sandbox, &mount);
    let path = mount.ctl(&format!("jobs/{job}/cancel"));
    let mut waiting = tool("sync", mount.ctl("backup"));
    wait_until_it_sleeps(&waiting, "fsync");
    fs::write(path, "x").unwrap();
    assert_eq!(waiting.wait().unwrap().code(), Some(1));
    let mut errors = String::new();
    waiting.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    assert!(errors.contains("Input/output error"), "{errors}");
    let said = mount.wait_for_job(job);
    assert_eq!(
        (said["state"].as_str(), said["exit_code"].as_u64()),
        (Some("cancelled"), Some(130))
    );
    lock.release();
}

#[test]
fn progress_is_polled() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let lock = Held::of(&sandbox);
    let job = waiting_job(&sandbox, &mount);
    let long = Duration::from_secs(60);
    let file = File::open(mount.ctl(&format!("jobs/{job}/progress.json"))).unwrap();
    let read = |file: &File| -> serde_json::Value {
        let mut text = vec![0; 1 << 16];
        let len = std::os::unix::fs::FileExt::read_at(file, &mut text, 0).unwrap();
        serde_json::from_slice(&text[..len]).unwrap()
    };
    assert!(wait_readable(&file, Duration::ZERO).unwrap(), "never read yet");
    assert_eq!(read(&file)["state"], "waiting");
    assert!(!wait_readable(&file, Duration::from_millis(300)).unwrap(), "nothing new");
    let mut log = File::open(mount.ctl(&format!("jobs/{job}/log"))).unwrap();
    assert!(wait_readable(&log, Duration::ZERO).unwrap(), "never read yet");
    assert!(log.read(&mut [0; 1 << 16]).unwrap() > 0);
    assert!(!wait_readable(&log, Duration::from_millis(300)).unwrap(), "nothing new");
    lock.release();
    while {
        assert!(wait_readable(&file, long).unwrap());
        read(&file)["state"] != "done"
    } {}
    // After the end there is no waiting any more.
    assert!(wait_readable(&file, Duration::ZERO).unwrap());
    assert!(wait_readable(&log, long).unwrap());
    // And no other file makes a poller wait.
    for name in ["status", "backup", "../snapshots/1/x"] {
        fs::write(sandbox.source.join("x"), "x").unwrap();
        if let Ok(other) = File::open(mount.ctl(name)) {
            assert!(wait_readable(&other, Duration::ZERO).unwrap(), "{name}");
        }
    }
    // A running job wakes its pollers although nothing has changed that it counts, each of them.
    data::noise_file(&sandbox.source.join("large"), 83, 60 << 20);
    let job = ask(&mount, &sandbox);
    let watch = || {
        let file = File::open(mount.ctl(&format!("jobs/{job}/progress.json"))).unwrap();
        let mut seen = Vec::new();
        while seen.last().is_none_or(|it| it != "done") {
            assert!(wait_readable(&file, long).unwrap());
            seen.push(read(&file)["state"].as_str().unwrap().to_owned());
        }
        seen
    };
    std::thread::scope(|scope| {
        let pollers: Vec<_> = (0..3).map(|_| scope.spawn(watch)).collect();
        for poller in pollers {
            let seen = poller.join().unwrap();
            assert!(seen.iter().any(|it| it == "running"), "{seen:?}");
        }
    });
}

#[test]
fn the_catalogs_lock_is_waited_for_and_kept() {
    let sandbox = Sandbox::new();
    data::noise_file(&sandbox.source.join("large"), 84, 120 << 20);
    let mount = sandbox.mount();
    let lock = Held::of(&sandbox);
    let job = waiting_job(&sandbox, &mount);
    let status = fs::read_to_string(mount.ctl(&format!("jobs/{job}/status"))).unwrap();
    assert!(status.contains("\nstate waiting\nwaiting_for lock held by pid 4711\n"), "{status}");
    let text = fs::read_to_string(mount.ctl("status")).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["jobs"]["running"], 1);
    // It can be cancelled while it waits, and the next one takes its turn.
    fs::write(mount.ctl(&format!("jobs/{job}/cancel")), "x").unwrap();
    assert_eq!(mount.wait_for_job(job)["state"], "cancelled");
    let job = waiting_job(&sandbox, &mount);
    lock.release();
    wait_for("the job to run", || state(&mount, job) == "running");
    wait_for("the job to back up", || mount.job(job)["phase"] == "backing up");
    // It stands still for as long as the other one waits.
    kill(mount.pid(), Signal::STOP);
    let refused = sandbox.run(["backup", sandbox.source.to_str().unwrap()]);
    kill(mount.pid(), Signal::CONT);
    let refused = refused.code(11);
    assert!(refused.errors().contains(&format!("pid {}", mount.pid())), "{}", refused.errors());
    let said = mount.wait_for_job(job);
    assert_eq!((said["state"].as_str(), said["run"].as_u64()), (Some("done"), Some(1)));
    // Run and job in turn, many times: none is lost.
    for turn in 0..5 {
        let mut line = vec!["backup", "--json"];
        let path = sandbox.source.to_str().unwrap();
        line.push(path);
        let job = ask(&mount, &sandbox);
        let ran = sandbox.run(&line);
        let said = mount.wait_for_job(job);
        assert_eq!(said["state"], "done", "turn {turn}: {said}");
        assert!(ran.errors().is_empty() || ran.errors().contains("is being written"));
    }
    sandbox.assert_valid();
}

#[test]
fn jobs_are_kept_over_unmounts_and_kills() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    let mount = sandbox.mount();
    let first = ask(&mount, &sandbox);
    mount.wait_for_job(first);
    let files = ["command", "status", "progress.json", "log"];
    let read = |mount: &Mount, job: u64| {
        files.map(|it| fs::read_to_string(mount.ctl(&format!("jobs/{job}/{it}"))).unwrap())
    };
    let before = read(&mount, first);
    // One runs, two wait, and the mount ends.
    let lock = Held::of(&sandbox);
    let waiting = waiting_job(&sandbox, &mount);
    let (queued, last) = (ask(&mount, &sandbox), ask(&mount, &sandbox));
    mount.end();
    let mut mount = sandbox.mount();
    assert_eq!(read(&mount, first), before);
    for (job, why) in [(waiting, "the mount ended"), (queued, "the mount ended before it began")] {
        let said = mount.job(job);
        assert_eq!(
            (said["state"].as_str(), said["error"].as_str()),
            (Some("cancelled"), Some(why))
        );
        let log = fs::read_to_string(mount.ctl(&format!("jobs/{job}/log"))).unwrap();
        assert!(log.trim_end().ends_with(&format!("cancelled: {why}")), "{log}");
    }
    let answer = fs::read_to_string(mount.ctl("backup")).unwrap();
    assert!(answer.starts_with(&format!("job {last}\nstate cancelled\n")), "{answer}");
    // One waits, and the mount's process is killed.
    let lost = waiting_job(&sandbox, &mount);
    assert_eq!(lost, last + 1);
    mount.kill();
    crate::common::mount::detach(&mount.point);
    let mount = sandbox.mount();
    let said = mount.job(lost);
    assert_eq!((said["state"].as_str(), said["exit_code"].as_u64()), (Some("failed"), Some(1)));
    assert!(said["error"].as_str().unwrap().starts_with("lost: "), "{said}");
    lock.release();
    let next = ask(&mount, &sandbox);
    assert_eq!(next, lost + 1);
    mount.wait_for_job(next);
    // A file of kept jobs that is damaged is set aside, and no number comes twice.
    mount.end();
    fs::write(sandbox.path("catalog.jobs"), "this is no database, whatever it may be").unwrap();
    let mount = sandbox.mount();
    assert_eq!(fs::read_dir(mount.ctl("jobs")).unwrap().count(), 0);
    assert!(mount.log().contains("set aside"), "{}", mount.log());
    assert!(ask(&mount, &sandbox) > next);
}

#[test]
fn too_many_jobs_are_refused_all_or_none() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let lock = Held::of(&sandbox);
    waiting_job(&sandbox, &mount);
    let line = format!("{}\n", sandbox.source.display());
    let mut file = OpenOptions::new().read(true).write(true).open(mount.ctl("backup")).unwrap();
    assert_eq!(errno(file.write_all(line.repeat(17).as_bytes())), libc::EBUSY);
    file.write_all(line.repeat(15).as_bytes()).unwrap();
    assert_eq!(errno(file.write_all(line.repeat(2).as_bytes())), libc::EBUSY);
    let mut text = vec![0; 100];
    std::os::unix::fs::FileExt::read_at(&file, &mut text, 0).unwrap();
    assert!(text.starts_with(b"refused EBUSY: 15 jobs are waiting"));
    file.write_all(line.as_bytes()).unwrap();
    assert_eq!(fs::read_dir(mount.ctl("jobs")).unwrap().count(), 17);
    lock.release();
    file.sync_all().unwrap();
    assert_eq!(state(&mount, 17), "done");
    for job in 2..17 {
        assert_eq!(state(&mount, job), "done");
    }
}
