//! What programs do with the files of a mount: map, run, lock, watch, copy, and be interrupted.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use rustix::fs::{FlockOperation, SeekFrom, inotify};

use crate::common::mount::MODES;
use crate::common::{Mount, Sandbox, Tree, args, assert_same, data, errno, run, tool};

fn python(script: &str, path: &Path) -> String {
    tool("python3", args!["-c", script, path]).text()
}

#[test]
fn files_can_be_mapped_and_run() {
    for (_, options) in MODES {
        let sandbox = Sandbox::new();
        data::noise_file(&sandbox.source.join("file"), 210, 5_000_001);
        fs::copy("/bin/cat", sandbox.source.join("cat")).unwrap();
        let script = sandbox.source.join("script");
        fs::write(&script, "#!/bin/sh\necho ran \"$1\"\n").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        sandbox.backup();
        let mount = Mount::start(&sandbox, options);
        let at = |name: &str| mount.run(1).join(name);
        // From the last page, beyond which there is nothing, to the first; and as a private copy.
        let script = "import mmap, sys, hashlib\n\
                      f = open(sys.argv[1], 'rb')\n\
                      m = mmap.mmap(f.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)\n\
                      last = m[5000000]\n\
                      c = mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE, \
                      mmap.PROT_READ | mmap.PROT_WRITE)\n\
                      c[4096] = (m[4096] + 1) % 256\n\
                      try: mmap.mmap(f.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_WRITE)\n\
                      except OSError as e: print(e.errno)\n\
                      print(hashlib.sha256(m).hexdigest())";
        let said = python(script, &at("file"));
        let sum = tool("sha256sum", args![&sandbox.source.join("file")]).text();
        let sum = sum.split(' ').next().unwrap().to_owned();
        assert_eq!(said, format!("{}\n{sum}\n", libc::EACCES));
        let ran = run(Command::new(at("cat")).arg(at("cat"))).code(0);
        assert!(ran.bytes() == fs::read("/bin/cat").unwrap());
        assert_eq!(run(Command::new(at("script")).arg("it")).code(0).text(), "ran it\n");
        mount.end();
    }
}

#[test]
fn a_reader_that_is_interrupted_reads_right() {
    let sandbox = Sandbox::new();
    data::noise_file(&sandbox.source.join("file"), 211, 24 << 20);
    sandbox.backup();
    let sum = tool("sha256sum", args![&sandbox.source.join("file")]).text();
    for (_, options) in MODES {
        let mount = Mount::start(&sandbox, options);
        let script = "import signal, sys, os, hashlib\n\
                      seen = 0\n\
                      def note(*_):\n\
                      \x20   global seen\n\
                      \x20   seen += 1\n\
                      signal.signal(signal.SIGALRM, note)\n\
                      signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)\n\
                      h = hashlib.sha256()\n\
                      f = os.open(sys.argv[1], os.O_RDONLY)\n\
                      while True:\n\
                      \x20   b = os.read(f, 1 << 20)\n\
                      \x20   if not b: break\n\
                      \x20   h.update(b)\n\
                      os.listdir(os.path.dirname(sys.argv[1]))\n\
                      signal.setitimer(signal.ITIMER_REAL, 0)\n\
                      print(h.hexdigest(), seen > 5)";
        let said = python(script, &mount.run(1).join("file"));
        assert_eq!(said, format!("{} True\n", sum.split(' ').next().unwrap()));
    }
}

#[test]
fn locks_hold_among_the_programs_of_this_machine() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    fs::write(sandbox.source.join("other"), "x").unwrap();
    sandbox.backup();
    fs::write(sandbox.source.join("other"), "changed").unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let open = |run: i64, name: &str| File::open(mount.run(run).join(name)).unwrap();
    let lock = |file: &File, how| rustix::fs::flock(file, how);
    let (one, same, changed) = (open(1, "file"), open(2, "file"), open(2, "other"));
    lock(&one, FlockOperation::NonBlockingLockExclusive).unwrap();
    // An unchanged file is one file, whatever run it is opened in.
    let held = lock(&same, FlockOperation::NonBlockingLockShared);
    assert_eq!(held, Err(rustix::io::Errno::WOULDBLOCK));
    lock(&changed, FlockOperation::NonBlockingLockExclusive).unwrap();
    lock(&open(1, "other"), FlockOperation::NonBlockingLockExclusive).unwrap();
    drop(one);
    lock(&same, FlockOperation::NonBlockingLockShared).unwrap();
    // The other kind: for reading, as always, on a file that is open for reading.
    let record = |how| rustix::fs::fcntl_lock(&same, how);
    assert_eq!(record(FlockOperation::NonBlockingLockShared), Ok(()));
    let written = record(FlockOperation::NonBlockingLockExclusive);
    assert_eq!(written, Err(rustix::io::Errno::BADF));
}

#[test]
fn watches_see_ingest_and_no_new_runs() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
    let watch = |path: &Path, what| {
        let fd = inotify::init(flags).unwrap();
        inotify::add_watch(&fd, path, what).unwrap();
        fd
    };
    let made = inotify::WatchFlags::CREATE | inotify::WatchFlags::MODIFY;
    let runs = watch(&mount.point.join("snapshots"), made);
    let file = watch(&mount.run(1).join("file"), inotify::WatchFlags::OPEN);
    let ingest = watch(&mount.point.join("ingest"), made);
    let seen = |fd: &std::os::fd::OwnedFd| rustix::io::read(fd, &mut [0; 4096]);
    sandbox.backup();
    assert_eq!(fs::read_dir(mount.point.join("snapshots")).unwrap().count(), 3);
    assert_eq!(seen(&runs), Err(rustix::io::Errno::AGAIN));
    assert_eq!(seen(&file), Err(rustix::io::Errno::AGAIN));
    fs::read(mount.run(2).join("file")).unwrap();
    assert!(seen(&file).unwrap() > 0);
    fs::write(mount.point.join("ingest/new"), "x").unwrap();
    assert!(seen(&ingest).unwrap() > 0);
}

#[test]
fn copies_are_plain_copies() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 212, 30);
    data::noise_file(&sandbox.source.join("large"), 213, 3 << 20);
    sandbox.backup();
    let mount = sandbox.mount();
    let (from, out) = (mount.run(1).join("large"), sandbox.path("out"));
    // Nothing can be shared with a file system that is no disk.
    let (source, dest) = (File::open(&from).unwrap(), File::create(&out).unwrap());
    let cloned = rustix::fs::ioctl_ficlone(&dest, &source).map_err(io::Error::from);
    let code = errno(cloned);
    assert!(matches!(code, libc::EXDEV | libc::EOPNOTSUPP | libc::EINVAL), "{code}");
    run(Command::new("cp").arg("--reflink=always").arg(&from).arg(&out)).code(1);
    // Whoever copies in the kernel is told to do it by reading, or it works.
    match rustix::fs::copy_file_range(&source, None, &dest, None, 1 << 20) {
        Ok(len) => assert!(len > 0),
        Err(e) => assert!([rustix::io::Errno::XDEV, rustix::io::Errno::OPNOTSUPP].contains(&e)),
    }
    rustix::fs::seek(&source, SeekFrom::Start(0)).unwrap();
    dest.set_len(0).unwrap();
    rustix::fs::seek(&dest, SeekFrom::Start(0)).unwrap();
    let mut left = 3 << 20;
    while left > 0 {
        left -= rustix::fs::sendfile(&dest, &source, None, left).unwrap();
    }
    assert!(fs::read(&out).unwrap() == fs::read(&from).unwrap());
    // The tools do it right by themselves, also into the mount's own ingest.
    for to in [sandbox.path("tree"), mount.point.join("ingest/tree")] {
        tool("cp", args!["-a", "--reflink=auto", &mount.run(1), &to]);
        assert_same(&Tree::of(&sandbox.source), &Tree::of(&to));
    }
}
