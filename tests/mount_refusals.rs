//! Every call that would change a snapshot is refused, and changes nothing.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, IFlags, Mode, OFlags, RenameFlags, Timespec, Timestamps,
    UTIME_NOW, Uid, XattrFlags,
};

use crate::common::mount::MODES;
use crate::common::{Mount, Sandbox, Tree, assert_same, errno, need_root, tool};

/// Calls of the system that are to fail, each with its error number.
struct Refused(Vec<(&'static str, i32)>);

impl Refused {
    fn std<T>(&mut self, what: &'static str, result: std::io::Result<T>) {
        self.0.push((what, result.err().map_or(0, |e| e.raw_os_error().unwrap_or(-1))));
    }

    fn sys<T>(&mut self, what: &'static str, result: rustix::io::Result<T>) {
        self.0.push((what, result.err().map_or(0, |e| e.raw_os_error())));
    }
}

/// All that can be tried on a directory with `file`, `dir`, `empty`, `link` and `full/file` in it.
fn try_everything(root: &Path) -> Vec<(&'static str, i32)> {
    let at = |name: &str| root.join(name);
    let (rw, none) = (Mode::from_raw_mode(0o644), AtFlags::empty());
    let nofollow = AtFlags::SYMLINK_NOFOLLOW;
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    let set = XattrFlags::empty();
    let one = Some(Uid::from_raw(1));
    let file = File::open(at("file")).unwrap();
    let dir = File::open(at("dir")).unwrap();
    let mut it = Refused(Vec::new());
    it.std("open for writing", OpenOptions::new().write(true).open(at("file")));
    it.std("open for both", OpenOptions::new().read(true).write(true).open(at("file")));
    it.std("open for appending", OpenOptions::new().append(true).open(at("file")));
    it.std("open, cut off", OpenOptions::new().write(true).truncate(true).open(at("file")));
    let mut cut = OpenOptions::new();
    it.std("cut off, reading", cut.read(true).custom_flags(libc::O_TRUNC).open(at("file")));
    let mut either = OpenOptions::new();
    either.write(true).create(true).truncate(false);
    it.std("open or create", either.open(at("new")));
    it.std("create", OpenOptions::new().write(true).create_new(true).open(at("dir/new")));
    let unnamed = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    it.sys("a file without a name", rustix::fs::open(at("dir"), unnamed, rw).map(drop));
    it.std("mkdir", fs::create_dir(at("new")));
    it.sys("mknod", rustix::fs::mknodat(CWD, at("new"), FileType::RegularFile, rw, 0));
    it.sys("mkfifo", rustix::fs::mknodat(CWD, at("new"), FileType::Fifo, rw, 0));
    let null = rustix::fs::makedev(1, 3);
    it.sys("device", rustix::fs::mknodat(CWD, at("new"), FileType::CharacterDevice, rw, null));
    it.std("bind a socket", UnixListener::bind(at("new")));
    it.std("symlink", std::os::unix::fs::symlink("target", at("new")));
    it.std("link", fs::hard_link(at("file"), at("new")));
    it.sys("link a link", rustix::fs::linkat(CWD, at("link"), CWD, at("new"), none));
    it.std("unlink", fs::remove_file(at("file")));
    it.std("unlink a link", fs::remove_file(at("link")));
    it.std("rmdir", fs::remove_dir(at("empty")));
    it.std("rmdir, not empty", fs::remove_dir(at("full")));
    it.std("rename", fs::rename(at("file"), at("new")));
    it.std("rename a directory", fs::rename(at("dir"), at("new")));
    it.std("rename over", fs::rename(at("file"), at("other")));
    it.std("rename below", fs::rename(at("file"), at("dir/new")));
    let swap = RenameFlags::EXCHANGE;
    it.sys("exchange", rustix::fs::renameat_with(CWD, at("file"), CWD, at("other"), swap));
    let keep = RenameFlags::NOREPLACE;
    it.sys("rename, no over", rustix::fs::renameat_with(CWD, at("file"), CWD, at("new"), keep));
    it.sys("chmod", rustix::fs::chmodat(CWD, at("file"), rw, none));
    it.sys("chmod as it is", rustix::fs::chmodat(CWD, at("dir"), Mode::from_raw_mode(0o755), none));
    it.sys("fchmod", rustix::fs::fchmod(&file, rw));
    it.sys("chown", rustix::fs::chownat(CWD, at("file"), one, None, none));
    let group = Some(Gid::from_raw(1));
    it.sys("lchown", rustix::fs::chownat(CWD, at("link"), None, group, nofollow));
    it.sys("fchown", rustix::fs::fchown(&file, one, None));
    it.sys("utimensat", rustix::fs::utimensat(CWD, at("file"), &times, none));
    it.sys("times of a link", rustix::fs::utimensat(CWD, at("link"), &times, nofollow));
    it.sys("futimens", rustix::fs::futimens(&dir, &times));
    it.sys("setxattr", rustix::fs::setxattr(at("file"), "user.x", b"x", set));
    it.sys("lsetxattr", rustix::fs::lsetxattr(at("link"), "trusted.x", b"x", set));
    it.sys("fsetxattr", rustix::fs::fsetxattr(&dir, "user.x", b"x", set));
    it.sys("removexattr", rustix::fs::removexattr(at("file"), "user.there"));
    it.sys("lremovexattr", rustix::fs::lremovexattr(at("file"), "user.there"));
    it.sys("fremovexattr", rustix::fs::fremovexattr(&file, "user.there"));
    it.sys("flags", rustix::fs::ioctl_setflags(&file, IFlags::NOATIME));
    it.sys("flags of a directory", rustix::fs::ioctl_setflags(&dir, IFlags::NOATIME));
    // What has no call of its own in Rust.
    let script = "import os, sys\n\
                  try: os.truncate(sys.argv[1], 1)\n\
                  except OSError as e: print(e.errno)";
    let said = tool("python3", ["-c", script, at("file").to_str().unwrap()]).text();
    it.0.push(("truncate", said.trim().parse().unwrap_or(0)));
    it.0
}

#[test]
fn every_change_of_a_snapshot_is_erofs() {
    need_root("otherwise the permissions refuse it before");
    let sandbox = Sandbox::new();
    let at = |name: &str| sandbox.source.join(name);
    for name in ["dir", "empty", "full"] {
        fs::create_dir(at(name)).unwrap();
    }
    for name in ["file", "other", "full/file"] {
        fs::write(at(name), name).unwrap();
    }
    std::os::unix::fs::symlink("file", at("link")).unwrap();
    rustix::fs::setxattr(at("file"), "user.there", b"v", XattrFlags::empty()).unwrap();
    sandbox.backup();
    let before = Tree::of(&sandbox.source);
    for (mode, options) in MODES {
        let mount = Mount::start(&sandbox, options);
        let run = mount.run(1);
        let tried = try_everything(&run);
        assert!(tried.len() >= 44);
        // What the kernel passes on to no file system of this kind, or in no form that could be
        // answered, it refuses in words of its own.
        let fits = |what: &str, code: i32| match what {
            "a file without a name" => matches!(code, libc::EROFS | libc::EOPNOTSUPP),
            "flags" | "flags of a directory" => matches!(code, libc::EROFS | libc::ENOTTY),
            _ => code == libc::EROFS,
        };
        let wrong: Vec<_> = tried.iter().filter(|(what, code)| !fits(what, *code)).collect();
        assert!(wrong.is_empty(), "mounted {mode}: {wrong:?}");
        // Beside the runs, and in the root.
        let snapshots = mount.point.join("snapshots");
        for (what, code) in [
            ("remove a run", errno(fs::remove_dir(&run))),
            ("remove the link", errno(fs::remove_file(snapshots.join("latest")))),
            ("rename a run", errno(fs::rename(&run, snapshots.join("9")))),
            ("make a run", errno(fs::create_dir(snapshots.join("9")))),
            ("link another latest", errno(std::os::unix::fs::symlink("1", snapshots.join("x")))),
            ("a file in the root", errno(File::create(mount.point.join("new")))),
            ("a directory in the root", errno(fs::create_dir(mount.point.join("new")))),
        ] {
            assert_eq!(code, libc::EROFS, "{what}, mounted {mode}");
        }
        // Out of it and into it, there is no way but copying.
        let (ingest, disk) = (mount.point.join("ingest/x"), sandbox.path("x"));
        for (what, code) in [
            ("rename out", errno(fs::rename(run.join("file"), &disk))),
            ("link out", errno(fs::hard_link(run.join("file"), &disk))),
            ("link into ingest", errno(fs::hard_link(run.join("file"), &ingest))),
            ("rename to ingest", errno(fs::rename(run.join("file"), &ingest))),
        ] {
            assert!(matches!(code, libc::EXDEV | libc::EROFS), "{what}, {mode}: {code}");
        }
        assert_same(&before, &Tree::of(&run));
        mount.end();
    }
}
