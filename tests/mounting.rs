//! Mounting and unmounting: options, dead mounts, signals, systemd, mount(8).

use std::fs::{self, File};
use std::io::Read;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;

use crate::common::{
    NOBODY, PATIENCE, RAIDTAPE, Sandbox, args, data, errno, kill, mount, mountctl, need_root,
    need_tool, run, tool, wait_for,
};

/// A store with one run that holds `file`, and a directory to mount it on.
fn store() -> (Sandbox, PathBuf) {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    fs::copy("/bin/true", sandbox.source.join("program")).unwrap();
    sandbox.backup();
    let point = sandbox.path("point");
    fs::create_dir(&point).unwrap();
    (sandbox, point)
}

/// How many mounts are on a path.
fn mounts_on(point: &Path) -> usize {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let point = point.to_str().unwrap();
    table.lines().filter(|it| it.split(' ').nth(4) == Some(point)).count()
}

fn pid_of(point: &Path) -> u32 {
    let text = fs::read_to_string(point.join(".ctl/status")).unwrap();
    let status: serde_json::Value = serde_json::from_str(&text).unwrap();
    u32::try_from(status["pid"].as_u64().unwrap()).unwrap()
}

/// Kills the process behind a mount that is no child of ours, and waits until the kernel knows.
fn kill_behind(point: &Path) {
    kill(pid_of(point), Signal::KILL);
    let status = point.join(".ctl/status");
    wait_for("the mount to be dead", || errno(File::open(&status)) == libc::ENOTCONN);
}

#[test]
fn what_the_options_say_is_what_the_kernel_does() {
    let (sandbox, point) = store();
    let _clear = mount::Clear(point.clone());
    run(mountctl().arg("mount").arg(&sandbox.catalog).arg(&point).args(["-o", "ro,user"])).code(0);
    let shown = tool("findmnt", args!["-no", "SOURCE,FSTYPE,OPTIONS", &point]).text();
    let fields: Vec<&str> = shown.split_whitespace().collect();
    assert_eq!(fields[..2], [sandbox.catalog.to_str().unwrap(), "fuse.raidtape"]);
    for word in ["ro", "noexec", "nosuid", "nodev"] {
        assert!(fields[2].split(',').any(|it| it == word), "{word} in {shown}");
    }
    let snapshot = point.join("snapshots/1");
    assert_eq!(fs::read(snapshot.join("file")).unwrap(), b"x");
    let started = Command::new(snapshot.join("program")).status();
    assert_eq!(started.unwrap_err().raw_os_error(), Some(libc::EACCES));
    let opened = File::options().write(true).open(point.join(".ctl/backup"));
    assert_eq!(errno(opened), libc::EROFS);
    assert_eq!(errno(fs::write(point.join("ingest/new"), "x")), libc::EROFS);
    assert_eq!(errno(fs::create_dir(point.join("ingest/dir"))), libc::EROFS);
    let ran = run(mountctl().args(["backup", "--mount"]).arg(&point).arg(&sandbox.source)).code(1);
    assert!(ran.errors().contains("read-only"), "{}", ran.errors());
    let status = run(mountctl().args(["status", "--json"]).arg(&point)).code(0).json();
    assert_eq!((&status[0]["read_only"], &status[0]["state"]), (&true.into(), &"ok".into()));
    assert!(status[0]["uptime_seconds"].is_u64(), "{status}");
    // Nothing is null that the mount tells.
    let null = status[0].as_object().unwrap().iter().find(|it| it.1.is_null());
    assert_eq!(null, None, "{status}");
    assert_eq!((&status[0]["sessions"], &status[0]["reads"]), (&2.into(), &"zero-message".into()));
    let table = run(mountctl().arg("status").arg(&point)).code(0).text();
    assert!(table.contains(" zero-message ") && table.contains(" ok, ro "), "{table}");
    run(mountctl().arg("umount").arg(&point)).code(0);
    // The program's own option, with the opposite behind it.
    let line = args!["mount", &point, "-o", "ro,noexec,rw", "-o", "exec"];
    sandbox.ok(line);
    fs::write(point.join("ingest/new"), "x").unwrap();
    assert!(Command::new(snapshot.join("program")).status().unwrap().success());
    run(Command::new(RAIDTAPE).arg("umount").arg(&point)).code(0);
    sandbox.run(args!["mount", &point, "-o", "bogus"]).code(2);
}

#[test]
fn a_job_that_is_refused_is_refused_with_the_reason() {
    let (sandbox, _) = store();
    let mount = sandbox.mount();
    let backup = |line: &[&str]| {
        let mut command = mountctl();
        command.args(["backup", "--mount"]).arg(&mount.point).arg(&sandbox.source).args(line);
        run(&mut command)
    };
    let ran = backup(&["--bogus"]).code(2);
    assert!(
        ran.errors().contains("was refused: unexpected argument '--bogus'"),
        "{}",
        ran.errors()
    );
    let ran = backup(&["--tag", "nightly"]).code(0);
    assert!(ran.text().starts_with("run 2: added 0,"), "{}", ran.text());
    mount.end();
}

#[test]
fn a_dead_mount_is_taken_away_by_the_next_with_all_that_is_on_it() {
    let (sandbox, point) = store();
    let (other, _) = store();
    let inner = point.join("ingest/inner");
    let _clear = mount::Clear(point.clone());
    for helper in [false, true] {
        sandbox.ok(args!["mount", &point]);
        fs::create_dir_all(&inner).unwrap();
        other.ok(args!["mount", &inner]);
        kill_behind(&inner);
        kill_behind(&point);
        let said = match helper {
            true => run(mountctl().arg("mount").arg(&sandbox.catalog).arg(&point)).code(0).errors(),
            false => sandbox.ok(args!["mount", &point]).text(),
        };
        assert!(said.contains("took away the dead mount"), "{said}");
        assert_eq!((mounts_on(&point), mounts_on(&inner)), (1, 0));
        assert_eq!(fs::read(point.join("snapshots/1/file")).unwrap(), b"x");
        // Alive, the inner one keeps the other in use, which only `raidtape umount` does not mind.
        other.ok(args!["mount", &inner]);
        if helper {
            let ran = run(mountctl().arg("umount").arg(&point)).code(1);
            assert!(ran.errors().contains("EBUSY"), "{}", ran.errors());
            assert_eq!((mounts_on(&point), mounts_on(&inner)), (1, 1));
            run(mountctl().arg("umount").arg(&inner)).code(0);
            run(mountctl().arg("umount").arg(&point)).code(0);
        } else {
            run(Command::new(RAIDTAPE).arg("umount").arg(&point)).code(0);
        }
        assert_eq!((mounts_on(&point), mounts_on(&inner)), (0, 0));
    }
}

#[test]
fn what_a_mount_hides_is_there_again_after_it() {
    let (sandbox, point) = store();
    let _clear = mount::Clear(point.clone());
    // One where the other has a part, and one beside.
    let below: Vec<(Sandbox, PathBuf)> = ["snapshots", "beside"]
        .map(|name| {
            let (hidden, _) = store();
            fs::create_dir(point.join(name)).unwrap();
            hidden.ok(args!["mount", &point.join(name)]);
            (hidden, point.join(name))
        })
        .into();
    let _clear_below: Vec<_> = below.iter().map(|it| mount::Clear(it.1.clone())).collect();
    let all_there = || {
        for (_, path) in &below {
            assert_eq!(mounts_on(path), 1, "{path:?}");
            assert_eq!(fs::read(path.join("snapshots/1/file")).unwrap(), b"x");
        }
    };
    for helper in [false, true] {
        let end = |point: &Path| match helper {
            true => run(mountctl().arg("umount").arg(point)).code(0),
            false => run(Command::new(RAIDTAPE).arg("umount").arg(point)).code(0),
        };
        // Alive, ended by a signal, and dead.
        sandbox.ok(args!["mount", &point]);
        assert_eq!(mounts_on(&point.join("snapshots")), 2);
        end(&point);
        all_there();
        sandbox.ok(args!["mount", &point]);
        kill(pid_of(&point), Signal::TERM);
        wait_for("the mount to be gone", || mounts_on(&point) == 0);
        all_there();
        sandbox.ok(args!["mount", &point]);
        kill_behind(&point);
        sandbox.ok(args!["mount", &point]);
        kill_behind(&point);
        end(&point);
        all_there();
    }
}

#[test]
fn nobody_holds_up_what_root_mounts() {
    need_root("others' mounts take another turn");
    let (sandbox, point) = store();
    let _clear = mount::Clear(point.clone());
    // Whoever may read a directory may lock it.
    let above = File::open(point.parent().unwrap()).unwrap();
    above.lock().unwrap();
    sandbox.ok(args!["mount", &point]);
    kill_behind(&point);
    run(mountctl().arg("umount").arg(&point)).code(0);
    sandbox.ok(args!["mount", &point]);
    run(Command::new(RAIDTAPE).arg("umount").arg(&point)).code(0);
    let turns = fs::metadata("/run/raidtape").unwrap();
    assert_eq!((turns.uid(), turns.mode() & 0o7777), (0, 0o700));
}

#[test]
fn a_mount_that_is_refused_leaves_the_log_of_the_one_that_runs() {
    let (sandbox, point) = store();
    let _clear = mount::Clear(point.clone());
    sandbox.ok(args!["mount", &point]);
    let log = sandbox.path("catalog.mount.log");
    let said = "said by the one that runs\n";
    fs::write(&log, said).unwrap();
    let elsewhere = sandbox.path("volume");
    for (refused, code) in [(&point, 1), (&elsewhere, 2)] {
        sandbox.run(args!["mount", refused]).code(2);
        assert!(fs::read_to_string(&log).unwrap().starts_with(said));
        let ran = run(mountctl().arg("mount").arg(&sandbox.catalog).arg(refused)).code(code);
        assert!(!ran.errors().contains(said.trim()), "{}", ran.errors());
        assert!(fs::read_to_string(&log).unwrap().starts_with(said));
    }
    // Nor is anything but a log of one's own written to.
    run(mountctl().arg("umount").arg(&point)).code(0);
    fs::write(sandbox.path("precious"), "mine").unwrap();
    fs::remove_file(&log).unwrap();
    fs::hard_link(sandbox.path("precious"), &log).unwrap();
    let ran = sandbox.run(args!["mount", &point]).code(1);
    assert!(ran.errors().contains("catalog.mount.log"), "{}", ran.errors());
    assert_eq!(fs::read_to_string(sandbox.path("precious")).unwrap(), "mine");
}

#[test]
fn a_mount_that_only_hangs_is_left_alone() {
    let (sandbox, point) = store();
    let mount = sandbox.mount();
    kill(mount.pid(), Signal::STOP);
    let ran = sandbox.run(args!["mount", &mount.point]).code(2);
    assert!(ran.errors().contains("does not answer"), "{}", ran.errors());
    let ran = run(mountctl().arg("mount").arg(&sandbox.catalog).arg(&mount.point)).code(1);
    assert!(ran.errors().contains("is not answering"), "{}", ran.errors());
    // Others are listed all the same.
    sandbox.ok(args!["mount", &point]);
    let _clear = mount::Clear(point.clone());
    let list = run(mountctl().args(["status", "--json"])).code(0).json();
    let state = |point: &Path| {
        let point = point.to_str();
        let found = list.as_array().unwrap().iter().find(|it| it["mountpoint"].as_str() == point);
        found.unwrap()["state"].clone()
    };
    assert_eq!((state(&mount.point), state(&point)), ("not answering".into(), "ok".into()));
    kill(mount.pid(), Signal::CONT);
    assert_eq!(mounts_on(&mount.point), 1);
    assert_eq!(fs::read(mount.run(1).join("file")).unwrap(), b"x");
    run(mountctl().arg("umount").arg(&point)).code(0);
    mount.end();
}

#[test]
fn of_several_mounts_at_once_one_wins() {
    let (sandbox, point) = store();
    let _clear = mount::Clear(point.clone());
    for round in 0..3 {
        let start = |helper: bool| -> Child {
            let mut command = match helper {
                true => mountctl(),
                false => sandbox.program(),
            };
            command.arg("mount");
            if helper {
                command.arg(&sandbox.catalog);
            }
            command.arg(&point).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let children: Vec<Child> = [false, true, false, true].map(start).into();
        let outputs: Vec<_> =
            children.into_iter().map(|it| it.wait_with_output().unwrap()).collect();
        let winners = outputs.iter().filter(|it| it.status.success()).count();
        assert_eq!((winners, mounts_on(&point)), (1, 1), "{round}: {outputs:?}");
        for lost in outputs.iter().filter(|it| !it.status.success()) {
            let said = String::from_utf8_lossy(&lost.stderr).into_owned();
            assert!(said.contains("already"), "{said}");
        }
        assert_eq!(fs::read(point.join("snapshots/1/file")).unwrap(), b"x");
        // The next round begins with a dead one.
        kill_behind(&point);
    }
}

#[test]
fn signals_end_a_mount_that_is_being_read_and_backs_up() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let sandbox = Sandbox::new();
        data::noise_file(&sandbox.source.join("large"), 71, 80 << 20);
        sandbox.backup();
        let mount = sandbox.mount();
        let large = mount.run(1).join("large");
        // One reader that waits with its file open, and one that goes on reading.
        let mut open = File::open(&large).unwrap();
        open.read_exact(&mut [0; 100]).unwrap();
        let mut busy = Command::new("sh")
            .args(["-c", "while cat \"$1\"; do :; done", "sh"])
            .arg(&large)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let job = format!("{} --as again --force-read", sandbox.source.display());
        fs::write(mount.ctl("backup"), job).unwrap();
        wait_for("the job to run", || mount.job(1)["state"] == "running");
        kill(mount.pid(), signal);
        let point = mount.point.clone();
        assert_eq!(mount.wait_for_end(), Some(0), "after {signal:?}");
        assert_eq!(mounts_on(&point), 0);
        assert_eq!(fs::read_dir(&point).unwrap().count(), 0);
        // The reader gets the rest or an error, and the other one ends.
        let mut rest = Vec::new();
        let code = open.read_to_end(&mut rest).map_or_else(|e| e.raw_os_error(), |_| None);
        let expected = [None, Some(libc::ENOTCONN), Some(libc::ECONNABORTED)];
        assert!(expected.contains(&code), "{code:?}");
        wait_for("the reader to end", || busy.try_wait().unwrap().is_some());
        // As a kill would leave it: nothing strange, and the next run takes it on.
        sandbox.assert_valid();
        sandbox.backup();
        sandbox.assert_valid();
    }
}

#[test]
fn a_second_signal_does_not_wait_for_jobs() {
    let (sandbox, _) = store();
    let mount = sandbox.mount();
    // Whoever holds the catalog's lock holds up the job, and the first signal with it.
    let catalog = rusqlite::Connection::open(&sandbox.catalog).unwrap();
    catalog.execute_batch("BEGIN IMMEDIATE").unwrap();
    fs::write(mount.ctl("backup"), sandbox.source.to_str().unwrap()).unwrap();
    wait_for("the job to run", || mount.job(1)["state"] == "running");
    kill(mount.pid(), Signal::TERM);
    wait_for("the mount to be gone", || !mount::is_mount_point(&mount.point));
    kill(mount.pid(), Signal::TERM);
    assert_eq!(mount.wait_for_end(), Some(130));
    drop(catalog);
    sandbox.assert_valid();
}

#[test]
fn an_interrupted_start_leaves_no_mount_behind() {
    need_root("the turn of root is taken");
    let (sandbox, point) = store();
    let _clear = mount::Clear(point.clone());
    // The process in the background waits for its turn.
    sandbox.ok(args!["mount", &point]);
    sandbox.ok(args!["umount", &point]);
    let name = blake3::hash(point.as_os_str().as_bytes()).to_string();
    let turn = File::open(Path::new("/run/raidtape").join(name)).unwrap();
    turn.lock().unwrap();
    let mut starter = sandbox.program().arg("mount").arg(&point).spawn().unwrap();
    let children = format!("/proc/{0}/task/{0}/children", starter.id());
    let child = || fs::read_to_string(&children).ok()?.trim().parse::<u32>().ok();
    wait_for("the process in the background", || child().is_some_and(has_signal_handlers));
    let daemon = child().unwrap();
    kill(starter.id(), Signal::INT);
    turn.unlock().unwrap();
    assert_eq!(starter.wait().unwrap().code(), Some(130));
    assert!(!crate::mount::is_running(daemon));
    assert_eq!(mounts_on(&point), 0);
}

/// Whether a process has got so far that it catches SIGTERM.
fn has_signal_handlers(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|it| it.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|it| u64::from_str_radix(it.trim(), 16).ok());
    caught.is_some_and(|it| it & (1 << (libc::SIGTERM - 1)) != 0)
}

#[test]
fn a_mount_in_use_is_busy_unless_it_is_detached() {
    let (sandbox, _) = store();
    let mount = sandbox.mount();
    let file = mount.run(1).join("file");
    let stay = |dir: &Path| {
        Command::new("sleep").arg("1000").current_dir(dir).stdout(Stdio::null()).spawn().unwrap()
    };
    let mut inside = stay(&mount.point);
    let ran = run(mountctl().arg("umount").arg(&mount.point)).code(1);
    assert!(ran.errors().contains("EBUSY"), "{}", ran.errors());
    assert_eq!(fs::read(&file).unwrap(), b"x");
    let mut open = File::open(&file).unwrap();
    let ran = run(mountctl().args(["umount", "--lazy"]).arg(&mount.point)).code(0);
    assert!(ran.errors().contains(&mount.pid().to_string()), "{}", ran.errors());
    assert_eq!(mounts_on(&mount.point), 0);
    // What is open goes on, and the process ends with the last of it.
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text, "x");
    drop(open);
    inside.kill().unwrap();
    inside.wait().unwrap();
    assert_eq!(mount.wait_for_end(), Some(0));
    // The program's own `umount` always detaches.
    let mount = sandbox.mount();
    let mut inside = stay(&mount.run(1));
    run(Command::new(RAIDTAPE).arg("umount").arg(&mount.point)).code(0);
    assert_eq!(mounts_on(&mount.point), 0);
    inside.kill().unwrap();
    inside.wait().unwrap();
    assert_eq!(mount.wait_for_end(), Some(0));
}

#[test]
fn a_signal_to_a_detached_mount_leaves_the_next_one_alone() {
    let (sandbox, _) = store();
    let first = sandbox.mount();
    let point = first.point.clone();
    let open = File::open(first.run(1).join("file")).unwrap();
    run(mountctl().args(["umount", "--lazy"]).arg(&point)).code(0);
    sandbox.ok(args!["mount", &point]);
    let _clear = mount::Clear(point.clone());
    kill(first.pid(), Signal::TERM);
    let pid = first.pid();
    wait_for("the first process to end", || !crate::mount::is_running(pid));
    drop(open);
    assert_eq!(mounts_on(&point), 1);
    assert_eq!(fs::read(point.join("snapshots/1/file")).unwrap(), b"x");
    run(mountctl().arg("umount").arg(&point)).code(0);
    assert_eq!(first.wait_for_end(), Some(0));
}

/// The words of the next message to a service manager.
fn message(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 4096];
    let len = socket.recv(&mut buffer).expect("a message to the service manager");
    String::from_utf8(buffer[..len].to_vec()).unwrap()
}

#[test]
fn the_service_manager_hears_when_the_mount_answers_and_when_it_ends() {
    let (sandbox, point) = store();
    let path = sandbox.path("notify");
    let name = format!("raidtape-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    for (socket, variable) in [
        (UnixDatagram::bind(&path).unwrap(), path.to_str().unwrap().to_owned()),
        (UnixDatagram::bind_addr(&address).unwrap(), format!("@{name}")),
    ] {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        // One that cannot mount never says that it is ready.
        let ran = run(sandbox
            .program()
            .args(args!["mount", &sandbox.path("volume"), "--foreground"])
            .env("NOTIFY_SOCKET", &variable));
        ran.code(2);
        socket.set_nonblocking(true).unwrap();
        assert_eq!(errno(socket.recv(&mut [0; 10])), libc::EAGAIN);
        socket.set_nonblocking(false).unwrap();
        let mut daemon = sandbox
            .program()
            .args(args!["mount", &point, "--foreground"])
            .env("NOTIFY_SOCKET", &variable)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let _clear = mount::Clear(point.clone());
        let said = message(&socket);
        // No waiting: by now it has to answer.
        assert_eq!(pid_of(&point), daemon.id());
        assert!(said.lines().any(|it| it == "READY=1"), "{said}");
        assert!(said.contains("STATUS=mounted on "), "{said}");
        kill(daemon.id(), Signal::TERM);
        assert_eq!(message(&socket), "STOPPING=1\n");
        assert!(daemon.wait().unwrap().success());
    }
    // A process in the background is not the one that a service manager listens to.
    let socket = UnixDatagram::bind(sandbox.path("again")).unwrap();
    socket.set_nonblocking(true).unwrap();
    let mut command = sandbox.program();
    run(command.arg("mount").arg(&point).env("NOTIFY_SOCKET", sandbox.path("again"))).code(0);
    run(mountctl().arg("umount").arg(&point)).code(0);
    assert_eq!(errno(socket.recv(&mut [0; 10])), libc::EAGAIN);
}

/// Runs lines of a shell where mount(8) finds our helpers, an fstab of its own and a /dev/fuse for
/// everybody; nothing of it is seen outside.
fn with_mount8(sandbox: &Sandbox, fstab: &str, lines: &str) -> crate::common::Ran {
    need_root("a mount namespace");
    need_tool("findmnt");
    let sbin = sandbox.path("sbin");
    fs::create_dir(&sbin).unwrap();
    fs::set_permissions(&sbin, fs::Permissions::from_mode(0o755)).unwrap();
    let helper = mountctl().get_program().to_owned();
    for (from, to) in [(helper.as_os_str(), "mountctl"), (RAIDTAPE.as_ref(), "raidtape")] {
        // Not copied by this process, as in `Sandbox::of_nobody`.
        tool("cp", args![from, &sbin.join(to)]);
    }
    for name in ["mount.raidtape", "umount.raidtape", "mount.fuse.raidtape"] {
        symlink("mountctl", sbin.join(name)).unwrap();
    }
    symlink("mountctl", sbin.join("umount.fuse.raidtape")).unwrap();
    fs::write(sandbox.path("fstab"), fstab).unwrap();
    let script = "set -e\n\
        mount -t tmpfs -o mode=755 none /run\n\
        mknod -m 666 /run/fuse c 10 229\n\
        mount --bind /run/fuse /dev/fuse\n\
        mount --bind \"$1/fstab\" /etc/fstab\n\
        sbin=$(readlink -f /sbin)\n\
        mount --bind \"$1/sbin\" \"$sbin\"\n\
        cd \"$1\"\n\
        trap 'umount -i -l point 2> said || true' EXIT\n";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c"]);
    command.arg(format!("{script}{lines}")).arg("sh").arg(sandbox.path(""));
    command.env("LC_ALL", "C").env_remove("RAIDTAPE_BIN").stdin(Stdio::null());
    run(&mut command)
}

#[test]
fn mount8_and_umount8_work_by_type_by_fstab_and_by_directory() {
    let (sandbox, point) = store();
    let options = "noauto,nofail,nodev,cache_size=8MiB,comment=\"a,ro\",x-systemd.automount";
    let fstab =
        format!("{} {} raidtape {options} 0 0\n", sandbox.catalog.display(), point.display());
    let lines = "mount -t raidtape catalog point -o ro -o noexec,atime\n\
        findmnt -no SOURCE,FSTYPE,OPTIONS point\n\
        cat point/snapshots/1/file; echo\n\
        umount point\n\
        ! findmnt point\n\
        mount point\n\
        findmnt -no OPTIONS point\n\
        echo put > point/ingest/put\n\
        for it in 'mount -o remount,ro point' 'mount -t raidtape catalog point' \\\n\
            'mount -t raidtape catalog point -o bogus' 'mount -t raidtape none point'; do\n\
            code=0; $it 2> said || code=$?; echo \"code $code: $(cat said)\"\n\
        done\n\
        umount point\n\
        mount -f -t fuse.raidtape catalog point; ! findmnt point\n\
        echo end\n";
    let said = with_mount8(&sandbox, &fstab, lines).code(0).text();
    let lines: Vec<&str> = said.lines().collect();
    let catalog = sandbox.catalog.to_str().unwrap();
    assert!(lines[0].starts_with(catalog) && lines[0].contains(" fuse.raidtape "), "{said}");
    assert!(lines[0].contains("ro,") && lines[0].contains("noexec"), "{said}");
    assert_eq!(lines[1], "x");
    assert!(lines[2].starts_with("rw,") && lines[2].contains("nodev"), "{said}");
    assert!(lines[3].starts_with("code 1: ") && said.contains("mount it anew"), "{said}");
    assert!(said.contains("code 32: mount.raidtape: ") && said.contains("already"), "{said}");
    assert!(said.contains("code 1: mount.raidtape: unknown option `bogus`"), "{said}");
    assert_eq!(lines.last(), Some(&"end"), "{said}");
}

#[test]
fn an_ordinary_user_mounts_by_fstab_recovers_and_unmounts() {
    let sandbox = Sandbox::of_nobody();
    sandbox.backup();
    fs::create_dir(sandbox.path("point")).unwrap();
    std::os::unix::fs::chown(sandbox.path("point"), Some(NOBODY), Some(NOBODY)).unwrap();
    let fstab = format!(
        "{} {} raidtape noauto,user 0 0\n",
        sandbox.catalog.display(),
        sandbox.path("point").display()
    );
    let lines = "as() { setpriv --reuid=65534 --regid=65534 --clear-groups \"$@\"; }\n\
        pid() { as sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/' point/.ctl/status; }\n\
        as mount point\n\
        as findmnt -no FSTYPE,OPTIONS point\n\
        as ls point/snapshots\n\
        kill -9 $(pid)\n\
        while as cat point/.ctl/status 2>/dev/null; do :; done\n\
        as mount point\n\
        as ls point/snapshots\n\
        as mountctl umount point\n\
        as raidtape --catalog catalog mount point\n\
        pid=$(pid); kill -9 $pid\n\
        while as cat point/.ctl/status 2>/dev/null; do :; done\n\
        as raidtape --catalog catalog mount point\n\
        as umount point\n\
        ! findmnt point\n\
        mkdir /run/user; mkdir -m 700 /run/user/65534; chown 65534:65534 /run/user/65534\n\
        as raidtape --catalog catalog mount point\n\
        as raidtape umount point\n\
        ls -ld /run/user/65534/raidtape\n\
        refused() { ! as raidtape --catalog catalog mount point 2>&1; }\n\
        chmod 600 /run/fuse; refused; chmod 666 /run/fuse\n\
        : > /run/none; mount --bind /run/none $(readlink -f $(which fusermount3)); refused\n\
        echo end\n";
    let ran = with_mount8(&sandbox, &fstab, &format!("PATH=$1/sbin:$PATH\n{lines}")).code(0);
    let said = ran.text();
    let first = said.lines().next().unwrap();
    assert!(first.starts_with("fuse.raidtape ") && first.contains("user_id=65534"), "{said}");
    assert!(first.contains("noexec"), "{said}");
    assert_eq!(said.matches("latest").count(), 2, "{said}");
    assert_eq!(said.matches("took away the dead mount").count(), 1, "{said}");
    assert!(ran.errors().contains("took away the dead mount"), "{}", ran.errors());
    assert!(said.contains("drwx------ 2 nobody nogroup "), "{said}");
    assert!(said.contains("/dev/fuse cannot be opened") && said.contains("666"), "{said}");
    assert!(said.contains("need the program fusermount3, of the package fuse3"), "{said}");
    assert_eq!(said.lines().last(), Some("end"), "{said}");
}
