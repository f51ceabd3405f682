//! The torture tree: one of every kind of entry, name, time, attribute and flag that a file system
//! can hold, and small disks of several file systems to make it on.
//!
//! Invariant: what a file system does not have is listed in its [`Disk`], and everything else is
//! made or the test fails; nothing is left out in silence.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, XattrFlags};

use super::data::Seeded;
use super::{Sandbox, args, mount, need_root, path_of, tool};

/// A file system and what it can hold.
pub struct Kind {
    pub mkfs: &'static str,
    options: &'static [&'static str],
    mib: u64,
    /// Longest value of an attribute beside others.
    xattr_bytes: usize,
    link_bytes: usize,
    /// Highest number of a device.
    device: (u32, u32),
    /// Seconds of the earliest and the latest time.
    times: (i64, i64),
    /// Letters for `chattr` on a file, and on a directory.
    file_flags: &'static str,
    dir_flags: &'static str,
}

/// With large attributes.
pub const EXT4: Kind = Kind {
    mkfs: "mkfs.ext4",
    options: &["-q", "-F", "-m", "0", "-b", "4096", "-O", "ea_inode"],
    mib: 256,
    xattr_bytes: 65_536,
    link_bytes: 4095,
    device: (4095, (1 << 20) - 1),
    times: (-(1 << 31), (1 << 34) - (1 << 31) - 1),
    file_flags: "iadSA",
    dir_flags: "iadSADT",
};

pub const XFS: Kind = Kind {
    mkfs: "mkfs.xfs",
    options: &["-q", "-f"],
    mib: 512,
    xattr_bytes: 65_536,
    link_bytes: 1023,
    device: (511, (1 << 18) - 1),
    times: (-(1 << 31), 16_299_260_424),
    file_flags: "iadSA",
    dir_flags: "iadSA",
};

pub const BTRFS: Kind = Kind {
    mkfs: "mkfs.btrfs",
    options: &["-q", "-f"],
    mib: 512,
    xattr_bytes: 15_000,
    link_bytes: 3_800,
    device: (4095, (1 << 20) - 1),
    times: (-(1 << 50), 1 << 50),
    file_flags: "iadSACc",
    dir_flags: "iadSACc",
};

/// Inodes of 128 bytes, whose clock ticks in whole seconds.
pub const EXT4_OF_SECONDS: Kind = Kind {
    options: &["-q", "-F", "-m", "0", "-b", "4096", "-I", "128"],
    xattr_bytes: 3_000,
    times: (-(1 << 31), (1 << 31) - 1),
    ..EXT4
};

/// A small file system of its own, mounted in a sandbox. Declared after the sandbox, it goes
/// before.
pub struct Disk {
    pub point: PathBuf,
}

impl Disk {
    pub fn new(sandbox: &Sandbox, name: &str, kind: &Kind) -> Disk {
        Disk::with(sandbox, name, kind, "loop")
    }

    /// With these options of mount, of which `loop` is one.
    pub fn with(sandbox: &Sandbox, name: &str, kind: &Kind, options: &str) -> Disk {
        need_root("it mounts small file systems");
        let (image, point) = (sandbox.path(&format!("{name}.img")), sandbox.path(name));
        File::create(&image).unwrap().set_len(kind.mib << 20).unwrap();
        tool(kind.mkfs, kind.options.iter().map(OsStr::new).chain([image.as_os_str()]));
        fs::create_dir(&point).unwrap();
        let disk = Disk { point };
        tool("mount", args!["-o", options, &image, &disk.point]);
        disk
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The loop device was made by mount and goes with the mount.
        let flags = rustix::mount::UnmountFlags::empty();
        if rustix::mount::unmount(&self.point, flags).is_err() {
            mount::detach(&self.point);
        }
    }
}

fn set_xattr(path: &Path, key: &[u8], value: &[u8]) {
    rustix::fs::lsetxattr(path, OsStr::from_bytes(key), value, XattrFlags::empty())
        .unwrap_or_else(|e| panic!("attribute of {} bytes of {path:?}: {e}", value.len()));
}

/// Sets mtime, which has to be kept exactly.
pub fn set_mtime(path: &Path, secs: i64, nanos: i64) {
    let time = Timespec { tv_sec: secs, tv_nsec: nanos };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    let stat = rustix::fs::lstat(path).unwrap();
    assert_eq!((stat.st_mtime, stat.st_mtime_nsec as i64), (secs, nanos), "{path:?}");
}

/// Makes the torture tree in directory `root`, of a disk of this kind. `outside` is a directory of
/// the same disk that is not backed up.
pub fn build(root: &Path, outside: &Path, kind: &Kind) {
    names(&root.join("names"));
    contents(&root.join("contents"));
    kinds(&root.join("kinds"), kind);
    links(&root.join("links"), outside);
    modes(&root.join("modes"));
    attributes(&root.join("attributes"), kind);
    times(&root.join("times"), kind);
    // Last, for nothing can be done to what is immutable.
    flags(&root.join("flags"), kind);
}

fn names(dir: &Path) {
    fs::create_dir(dir).unwrap();
    let mut names: Vec<Vec<u8>> = (1..=255).map(|it| vec![it]).collect();
    names.retain(|it| !matches!(it[0], b'/' | b'.'));
    names.extend([vec![0xff; 255], vec![b'\n'; 255], "\u{20ac}".repeat(85).into_bytes()]);
    names.extend(
        [
            &b"..."[..],
            b".. ",
            b"-rf",
            b"--help",
            b" both ends ",
            b"new\nline",
            b"tab\tcr\resc\x1b[31m",
            b"quote'\"`$(x)\\",
            b"TRAILER!!!",
            b"half a char \xe2\x82",
            b"Twin",
            b"tWIN",
            "e\u{301}".as_bytes(),
            "\u{e9}".as_bytes(),
        ]
        .map(<[u8]>::to_vec),
    );
    for name in names {
        fs::write(dir.join(path_of(&name)), name).unwrap();
    }
}

fn contents(dir: &Path) {
    fs::create_dir(dir).unwrap();
    // Around pages, sectors, chunks and the size from which a file has blocks of its own.
    let mut sizes = vec![0, 1, 2];
    for edge in [4096, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20] {
        sizes.extend([edge - 1, edge, edge + 1]);
    }
    for size in sizes {
        let bytes = Seeded::new(size as u64).noise(size);
        fs::write(dir.join(format!("of {size}")), bytes).unwrap();
    }
    let sparse = |name: &str, size: u64, data: &[(u64, usize)]| {
        let file = File::create(dir.join(name)).unwrap();
        file.set_len(size).unwrap();
        for (at, len) in data {
            file.write_all_at(&Seeded::new(*at).noise(*len), *at).unwrap();
        }
        // Where data lies is settled when it is on the disk.
        file.sync_all().unwrap();
    };
    sparse("leading hole", 3 << 20, &[(2 << 20, 1 << 20)]);
    sparse("trailing hole", 3 << 20, &[(0, 1 << 20)]);
    sparse("holes between", 20 << 20, &[(0, 4096), (5 << 20, 1 << 20), (19 << 20, 1 << 20)]);
    sparse("all hole", 5 << 20, &[]);
    sparse("hole and odd end", (1 << 20) + 77, &[]);
    sparse("tebibyte of hole.large", 1 << 40, &[]);
    sparse("last byte.large", 1 << 40, &[((1 << 40) - 1, 1)]);
    fs::write(dir.join("zeros"), vec![0; 300_000]).unwrap();
    File::open(dir.join("zeros")).unwrap().sync_all().unwrap();
}

fn kinds(dir: &Path, kind: &Kind) {
    fs::create_dir(dir).unwrap();
    let fd = File::open(dir).unwrap();
    let node = |name: &str, kind, rdev| {
        rustix::fs::mknodat(&fd, name, kind, Mode::from_raw_mode(0o640), rdev).unwrap();
    };
    node("fifo", FileType::Fifo, 0);
    node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    node("0:0", FileType::CharacterDevice, 0);
    node("high", FileType::CharacterDevice, rustix::fs::makedev(kind.device.0, kind.device.1));
    node("disk", FileType::BlockDevice, rustix::fs::makedev(8, 257));
    drop(UnixListener::bind(dir.join("socket")).unwrap());
    for (target, name) in [
        (&b"nowhere"[..], "dangling"),
        (b"loop", "loop"),
        (b"/", "absolute"),
        (b"..", "up"),
        (b"\xff\n", "odd"),
        (b"a//b/./c/", "not tidy"),
        (&vec![b'x'; kind.link_bytes], "long"),
    ] {
        symlink(OsStr::from_bytes(target), dir.join(name)).unwrap();
    }
    fs::create_dir(dir.join("empty dir")).unwrap();
}

fn links(dir: &Path, outside: &Path) {
    fs::create_dir_all(dir.join("one/deep")).unwrap();
    fs::create_dir_all(dir.join("two")).unwrap();
    let link = |from: &str, to: &str| fs::hard_link(dir.join(from), dir.join(to)).unwrap();
    fs::write(dir.join("one/file"), "three names in three directories").unwrap();
    link("one/file", "one/deep/file");
    link("one/file", "two/file");
    symlink("target", dir.join("two/sym")).unwrap();
    link("two/sym", "one/sym");
    let fd = File::open(dir).unwrap();
    rustix::fs::mknodat(&fd, "one/fifo", FileType::Fifo, Mode::RUSR, 0).unwrap();
    link("one/fifo", "two/fifo");
    let rdev = rustix::fs::makedev(1, 5);
    rustix::fs::mknodat(&fd, "two/zero", FileType::CharacterDevice, Mode::RUSR, rdev).unwrap();
    link("two/zero", "one/deep/zero");
    drop(UnixListener::bind(dir.join("one/socket")).unwrap());
    link("one/socket", "two/socket");
    fs::write(dir.join("one/empty"), "").unwrap();
    link("one/empty", "two/empty");
    fs::write(dir.join("one/large"), Seeded::new(9).noise(9 << 20)).unwrap();
    link("one/large", "two/large");
    fs::write(dir.join("one/with a name outside"), "x").unwrap();
    fs::hard_link(dir.join("one/with a name outside"), outside.join("name")).unwrap();
}

fn modes(dir: &Path) {
    fs::create_dir(dir).unwrap();
    for mode in [0, 0o111, 0o222, 0o400, 0o444, 0o777, 0o4755, 0o2755, 0o6711, 0o1644, 0o7777] {
        let (file, sub) = (dir.join(format!("file {mode:o}")), dir.join(format!("dir {mode:o}")));
        fs::write(&file, format!("{mode:o}")).unwrap();
        fs::create_dir(&sub).unwrap();
        fs::write(sub.join("inside"), "x").unwrap();
        for path in [file, sub] {
            chown(&path, Some(mode), Some(mode + 1)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
    }
    for (name, uid, gid) in [("root", 0, 0), ("nobody", 65534, 65534), ("odd", 4_294_967_294, 9)] {
        fs::write(dir.join(name), "x").unwrap();
        chown(dir.join(name), Some(uid), Some(gid)).unwrap();
    }
    symlink("x", dir.join("link")).unwrap();
    lchown(dir.join("link"), Some(1), Some(4_294_967_294)).unwrap();
}

fn attributes(dir: &Path, kind: &Kind) {
    fs::create_dir_all(dir.join("acl dir/sub")).unwrap();
    let at = |name: &str| dir.join(name);
    for name in ["small", "many", "large", "capable", "acl", "acl dir/file"] {
        fs::write(at(name), name).unwrap();
    }
    set_xattr(&at("small"), b"user.empty", b"");
    set_xattr(&at("small"), b"user.bytes \xff\n", &[0, 255, 10, 13]);
    set_xattr(&at("small"), &[b"user.".to_vec(), vec![b'k'; 250]].concat(), b"longest key");
    for number in 0..30 {
        set_xattr(&at("many"), format!("user.number{number}").as_bytes(), &[number; 50]);
    }
    set_xattr(&at("large"), b"user.large", &Seeded::new(5).noise(kind.xattr_bytes));
    set_xattr(dir, b"user.dir", b"of a directory");
    set_xattr(dir, b"trusted.dir", b"for root");
    symlink("small", at("link")).unwrap();
    set_xattr(&at("link"), b"trusted.link", b"of the link itself");
    let fd = File::open(dir).unwrap();
    rustix::fs::mknodat(&fd, "fifo", FileType::Fifo, Mode::RUSR, 0).unwrap();
    set_xattr(&at("fifo"), b"trusted.fifo", b"of a fifo");
    chown(at("capable"), Some(1), Some(1)).unwrap();
    // cap_net_raw+ep.
    let mut capability = [0; 20];
    capability[..6].copy_from_slice(&[1, 0, 0, 2, 0, 32]);
    set_xattr(&at("capable"), b"security.capability", &capability);
    tool("setfacl", args!["-m", "u:1234:rw,u:0:---,g:99:r,m:rwx", &at("acl")]);
    tool("setfacl", args!["-m", "u:4321:rwx,g:98:---", &at("acl dir")]);
    tool("setfacl", args!["-d", "-m", "u:1234:rwx,o::---", &at("acl dir")]);
    tool("setfacl", args!["-d", "-m", "g:7:r", &at("acl dir/sub")]);
}

fn times(dir: &Path, kind: &Kind) {
    fs::create_dir(dir).unwrap();
    let (first, last) = kind.times;
    for (secs, nanos) in [
        // At its limits a file system keeps no nanoseconds.
        (first, 0),
        (first + 1, 1),
        (-1, 0),
        (-1, 999_999_999),
        (-86_400 * 365, 5),
        (0, 0),
        (0, 1),
        (1_700_000_000, 123_456_789),
        ((1 << 31) - 1, 999_999_999),
        (1 << 31, 0),
        (1 << 32, 1),
        (13_000_000_000, 500_000_000),
        (last - 1, 999_999_999),
        (last, 0),
    ] {
        let name = |what: &str| dir.join(format!("{what} {secs}.{nanos}"));
        fs::write(name("file"), "x").unwrap();
        fs::create_dir(name("dir")).unwrap();
        fs::write(name("dir").join("inside"), "x").unwrap();
        symlink("x", name("link")).unwrap();
        for what in ["file", "dir", "link"] {
            set_mtime(&name(what), secs, nanos);
        }
    }
}

/// Letters that a file may keep while it is written to come first.
fn flags(dir: &Path, kind: &Kind) {
    fs::create_dir(dir).unwrap();
    let set = |flags: &str, path: &Path| {
        tool("chattr", args![format!("+{flags}"), path]);
    };
    for flag in kind.file_flags.chars() {
        let file = dir.join(format!("file {flag}"));
        fs::write(&file, "").unwrap();
        if matches!(flag, 'C' | 'c') {
            // These are for what is written after them.
            set(&flag.to_string(), &file);
        }
        fs::write(&file, Seeded::new(3).text(20_000)).unwrap();
        File::open(&file).unwrap().sync_all().unwrap();
        set(&flag.to_string(), &file);
    }
    let both = dir.join("two names");
    fs::write(&both, "immutable, and known by two names").unwrap();
    fs::create_dir(dir.join("other")).unwrap();
    fs::hard_link(&both, dir.join("other/name")).unwrap();
    fs::write(dir.join("all"), "").unwrap();
    set("dSA", &dir.join("all"));
    set("i", &both);
    set("a", &dir.join("all"));
    for flag in kind.dir_flags.chars() {
        let sub = dir.join(format!("dir {flag}"));
        fs::create_dir_all(sub.join("sub")).unwrap();
        fs::write(sub.join("inside"), "x").unwrap();
        fs::write(sub.join("sub/deeper"), "x").unwrap();
        set(&flag.to_string(), &sub);
    }
}

/// Makes a chain of directories, with a file in every hundredth and in the last.
pub fn chain(root: &Path, levels: usize, name: &str) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut fd: OwnedFd = File::open(root).unwrap().into();
    for level in 1..=levels {
        rustix::fs::mkdirat(&fd, name, Mode::from_raw_mode(0o755)).unwrap();
        fd = rustix::fs::openat(&fd, name, flags, Mode::empty()).unwrap();
        if level % 100 == 0 || level == levels {
            let create = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&fd, "zfile", create, Mode::RUSR).unwrap();
            File::from(file).write_all_at(format!("{level}").as_bytes(), 0).unwrap();
        }
    }
}

/// Removes a tree of any depth, with two directories open at a time.
pub fn remove(root: &Path) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut fd = rustix::fs::open(root, flags, Mode::empty()).unwrap();
    let mut names: Vec<Vec<u8>> = Vec::new();
    loop {
        let listing = rustix::fs::Dir::read_from(&fd).unwrap().map(Result::unwrap);
        let items: Vec<_> = listing.map(|it| it.file_name().to_owned()).collect();
        let mut below = None;
        for name in items.iter().filter(|it| !matches!(it.to_bytes(), b"." | b"..")) {
            let stat = rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW).unwrap();
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => below = Some(name.to_bytes().to_vec()),
                _ => rustix::fs::unlinkat(&fd, name, AtFlags::empty()).unwrap(),
            }
        }
        if let Some(name) = below {
            fd = rustix::fs::openat(&fd, OsStr::from_bytes(&name), flags, Mode::empty()).unwrap();
            names.push(name);
            continue;
        }
        let Some(name) = names.pop() else { break };
        fd = rustix::fs::openat(&fd, "..", flags, Mode::empty()).unwrap();
        rustix::fs::unlinkat(&fd, OsStr::from_bytes(&name), AtFlags::REMOVEDIR).unwrap();
    }
    fs::remove_dir(root).unwrap();
}
