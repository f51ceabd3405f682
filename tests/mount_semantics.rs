//! What a mount shows: the paragraphs of `docs/semantics.md` about trees, attributes and names.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::mem::MaybeUninit;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, RawDir, SeekFrom, Timespec, Timestamps};

use crate::common::tree::data_ranges;
use crate::common::{
    Mount, Sandbox, Tree, args, assert_same, data, errno, need_root, tool, wait_for,
};

/// All paths below a directory, without the links' targets.
fn below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            found.extend(below(&path));
        }
        found.push(path);
    }
    found
}

fn inode(path: &Path) -> u64 {
    fs::symlink_metadata(path).unwrap().ino()
}

#[test]
fn inode_numbers_say_what_is_the_same_file() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 200, 40);
    fs::hard_link(sandbox.source.join("d0/e0/f0"), sandbox.source.join("linked")).unwrap();
    std::os::unix::fs::symlink("d0", sandbox.source.join("link")).unwrap();
    sandbox.backup();
    fs::write(sandbox.source.join("d1/e1/f1"), "changed").unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let mut seen: BTreeMap<u64, BTreeSet<PathBuf>> = BTreeMap::new();
    let mut before = BTreeMap::new();
    for run in [1, 2] {
        let root = mount.run(run);
        let device = fs::metadata(&root).unwrap().dev();
        for path in below(&root) {
            let stat = fs::symlink_metadata(&path).unwrap();
            assert_eq!(stat.dev(), device);
            let inside = path.strip_prefix(&root).unwrap().to_path_buf();
            // A directory has a number in each run: what is in it may be different.
            let who = if stat.is_dir() { root.join(&inside) } else { inside.clone() };
            seen.entry(stat.ino()).or_default().insert(who);
            before.insert((run, inside), stat.ino());
        }
    }
    let pair = |one: &str, other: &str| [one, other].map(PathBuf::from).into();
    for names in seen.values().filter(|it| it.len() > 1) {
        assert_eq!(*names, pair("d0/e0/f0", "linked"));
    }
    let mut same = 0;
    for ((run, inside), ino) in &before {
        if *run == 1 && !mount.run(1).join(inside).is_dir() {
            let is_same = before[&(2, inside.clone())] == *ino;
            assert_eq!(is_same, inside != Path::new("d1/e1/f1"), "{inside:?}");
            same += u32::from(is_same);
        }
    }
    assert!(same > 30);
    mount.end();
    // They are the same after another mount.
    let mount = sandbox.mount();
    for ((run, inside), ino) in before {
        assert_eq!(inode(&mount.run(run).join(inside)), ino);
    }
}

#[test]
fn the_directories_of_the_mount_belong_to_who_mounted() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    fs::set_permissions(&sandbox.source, fs::Permissions::from_mode(0o751)).unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let me = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let look = |path: &Path| {
        let stat = fs::metadata(path).unwrap();
        ((stat.uid(), stat.gid()), stat.mode() & 0o7777, stat.is_dir())
    };
    for name in ["", "snapshots", ".ctl"] {
        assert_eq!(look(&mount.point.join(name)), (me, 0o755, true), "{name:?}");
    }
    assert_eq!(look(&mount.point.join("ingest")), (me, 0o700, true));
    // The root of a run is the source's own directory.
    assert_eq!(look(&mount.run(1)), (me, 0o751, true));
    let own = fs::metadata(&sandbox.source).unwrap();
    assert_eq!(fs::metadata(mount.run(1)).unwrap().mtime_nsec(), own.mtime_nsec());
}

#[test]
fn times_are_those_of_the_source_and_reading_changes_none() {
    let sandbox = Sandbox::new();
    let times = [(-1, 500_000_000), (0, 0), (2_147_483_648, 999_999_999), (5_000_000_000, 1)];
    for (number, (tv_sec, tv_nsec)) in times.into_iter().enumerate() {
        let path = sandbox.source.join(number.to_string());
        fs::write(&path, "x").unwrap();
        let old = Timespec { tv_sec: 1_000_000, tv_nsec: 7 };
        let last_modification = Timespec { tv_sec, tv_nsec };
        let times = Timestamps { last_access: old, last_modification };
        rustix::fs::utimensat(CWD, &path, &times, AtFlags::empty()).unwrap();
    }
    sandbox.backup();
    let mount = sandbox.mount();
    for (number, (secs, nanos)) in times.into_iter().enumerate() {
        let (path, source) = (mount.run(1).join(number.to_string()), &sandbox.source);
        fs::read(&path).unwrap();
        let (stat, own) = (fs::metadata(&path), fs::metadata(source.join(number.to_string())));
        let (stat, own) = (stat.unwrap(), own.unwrap());
        assert_eq!((stat.mtime(), stat.mtime_nsec()), (secs, nanos));
        assert_eq!((stat.atime(), stat.atime_nsec()), (secs, nanos));
        assert_eq!((stat.ctime(), stat.ctime_nsec()), (own.ctime(), own.ctime_nsec()));
        assert!(stat.created().is_err());
    }
}

#[test]
fn sizes_room_and_links_are_counted_truly() {
    let sandbox = Sandbox::new();
    let at = |name: &str| sandbox.source.join(name);
    for len in [0u64, 1, 4_096, 4_097, 100_000] {
        data::noise_file(&at(&len.to_string()), len, len);
    }
    let sparse = File::create(at("sparse")).unwrap();
    sparse.set_len(10 << 20).unwrap();
    sparse.write_all_at(&[1; 8_192], 4 << 20).unwrap();
    sparse.sync_all().unwrap();
    std::os::unix::fs::symlink("target", at("link")).unwrap();
    fs::create_dir(at("dir")).unwrap();
    fs::hard_link(at("1"), at("dir/second")).unwrap();
    fs::hard_link(at("1"), sandbox.path("outside")).unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let look = |name: &str| fs::symlink_metadata(mount.run(1).join(name)).unwrap();
    for len in [0u64, 1, 4_096, 4_097, 100_000] {
        let stat = look(&len.to_string());
        assert_eq!((stat.size(), stat.blocks()), (len, len.div_ceil(4096) * 8));
        assert_eq!(stat.blksize(), 4096);
    }
    assert_eq!((look("sparse").size(), look("sparse").blocks()), (10 << 20, 16));
    assert_eq!((look("link").size(), look("link").blocks()), (6, 0));
    assert_eq!((look("dir").size(), look("dir").blocks()), (4096, 0));
    // Also names that are not in the snapshot were counted.
    assert_eq!((look("1").nlink(), look("dir/second").nlink()), (3, 3));
    assert_eq!(look("1").ino(), look("dir/second").ino());
    // What a directory counts is not known, which 1 says.
    for name in ["", "dir"] {
        assert_eq!(look(name).nlink(), 1);
    }
}

#[test]
fn holes_are_holes() {
    let sandbox = Sandbox::new();
    let path = sandbox.source.join("sparse");
    let file = File::create(&path).unwrap();
    file.set_len(9 << 20).unwrap();
    for at in [1 << 20, 3 << 20, (3 << 20) + 4096] {
        file.write_all_at(&[7; 4096], at).unwrap();
    }
    file.sync_all().unwrap();
    File::create(sandbox.source.join("only a hole")).unwrap().set_len(1 << 20).unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let ranges = vec![(1 << 20, (1 << 20) + 4096), (3 << 20, (3 << 20) + 8192)];
    let shown = mount.run(1).join("sparse");
    assert_eq!(data_ranges(&file), ranges);
    assert_eq!(data_ranges(&File::open(&shown).unwrap()), ranges);
    assert_eq!(data_ranges(&File::open(mount.run(1).join("only a hole")).unwrap()), []);
    assert!(fs::read(&shown).unwrap() == fs::read(&path).unwrap());
    // `cp` keeps them, by its own choice.
    let out = sandbox.path("out");
    tool("cp", args!["--sparse=auto", &shown, &out]);
    assert_eq!(data_ranges(&File::open(out).unwrap()), ranges);
}

#[test]
fn attributes_are_all_listed() {
    need_root("attributes of the system and of links are set");
    let sandbox = Sandbox::new();
    let at = |name: &str| sandbox.source.join(name);
    fs::write(at("file"), "x").unwrap();
    fs::create_dir(at("dir")).unwrap();
    std::os::unix::fs::symlink("file", at("link")).unwrap();
    let set = |name: &str, key: &str, value: &[u8]| {
        rustix::fs::lsetxattr(at(name), key, value, rustix::fs::XattrFlags::empty()).unwrap();
    };
    set("file", "user.empty", b"");
    set("file", "user.binary", b"\0\xff\n");
    set("file", "trusted.t", b"t");
    set("link", "trusted.of a link", b"t");
    set("dir", "user.long", &[b'l'; 3_000]);
    tool("setfacl", args!["-m", "u:1234:r", &at("file")]);
    tool("setfacl", args!["-d", "-m", "g:77:rwx", &at("dir")]);
    tool("chattr", args!["+d", &at("file")]);
    sandbox.backup();
    let mount = sandbox.mount();
    let source = Tree::of(&sandbox.source);
    assert!(source.0[&b"file"[..]].xattrs.contains_key(&b"system.posix_acl_access"[..]));
    assert_same(&source, &Tree::of(&mount.run(1)));
    let path = mount.run(1).join("dir");
    let short = rustix::fs::lgetxattr(&path, "user.long", &mut [0; 10][..]);
    assert_eq!(short, Err(rustix::io::Errno::RANGE));
    let none = rustix::fs::lgetxattr(&path, "user.none", &mut [0; 10][..]);
    assert_eq!(none, Err(rustix::io::Errno::NODATA));
}

#[test]
fn what_no_file_has_is_not_supported() {
    need_root("attributes of the system are set");
    use rustix::io::Errno;
    const ACL: &str = "system.posix_acl_access";
    const LABEL: &str = "security.selinux";
    let sandbox = Sandbox::new();
    let at = |name: &str| sandbox.source.join(name);
    fs::write(at("first"), "1").unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let ask = |run, name: &str, key| {
        let mut value = [0; 100];
        rustix::fs::lgetxattr(mount.run(run).join(name), key, &mut value[..])
    };
    for key in [ACL, LABEL] {
        assert_eq!(ask(1, "first", key), Err(Errno::NOTSUP), "{key}");
        // What is written there can have them.
        let other = rustix::fs::lgetxattr(mount.point.join("ingest"), key, &mut [0; 100][..]);
        assert_eq!(other, Err(Errno::NODATA), "{key}");
    }
    assert_eq!(ask(1, "first", "user.x"), Err(Errno::NODATA));
    assert!(ask(1, "first", "user.raidtape.hash").is_ok());
    fs::write(at("second"), "2").unwrap();
    let label = b"system_u:object_r:etc_t:s0\0";
    rustix::fs::lsetxattr(at("second"), LABEL, label, rustix::fs::XattrFlags::empty()).unwrap();
    sandbox.backup();
    assert_eq!(ask(2, "second", LABEL), Ok(label.len()));
    assert_eq!(ask(2, "first", LABEL), Err(Errno::NODATA));
    assert_eq!(ask(2, "second", ACL), Err(Errno::NOTSUP));
    tool("setfacl", args!["-m", "u:1234:r", &at("second")]);
    sandbox.backup();
    assert!(ask(3, "second", ACL).is_ok());
    assert_eq!(ask(3, "first", ACL), Err(Errno::NODATA));
}

#[test]
fn what_the_store_knows_of_a_file_is_told_on_request() {
    let sandbox = Sandbox::new();
    data::noise_file(&sandbox.source.join("file"), 202, 300_000);
    fs::create_dir(sandbox.source.join("dir")).unwrap();
    sandbox.backup();
    fs::write(sandbox.source.join("new"), "new").unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let ask = |run: i64, name: &str, what: &str| {
        let mut value = [0; 1000];
        let key = format!("user.raidtape.{what}");
        let len = rustix::fs::getxattr(mount.run(run).join(name), key, &mut value[..])?;
        Ok::<String, rustix::io::Errno>(String::from_utf8(value[..len].to_vec()).unwrap())
    };
    let hash = blake3::hash(&fs::read(sandbox.source.join("file")).unwrap()).to_string();
    let blocks: Vec<String> = sandbox.blocks("volume").into_iter().map(|it| name(&it.0)).collect();
    for run in [1, 2] {
        assert_eq!(ask(run, "file", "hash"), Ok(hash.clone()));
        // The run that stored it.
        assert_eq!(ask(run, "file", "run").as_deref(), Ok("1"));
        assert_eq!(ask(run, "dir", "run"), Ok(run.to_string()));
        assert_eq!(ask(run, "file", "version"), ask(1, "file", "version"));
        let told = ask(run, "file", "blocks").unwrap();
        assert!(told.lines().count() > 0 && told.lines().all(|it| blocks.iter().any(|b| b == it)));
    }
    assert_eq!(ask(2, "new", "run").as_deref(), Ok("2"));
    assert_ne!(ask(2, "new", "version"), ask(2, "file", "version"));
    for (file, what) in [("dir", "hash"), ("dir", "blocks"), ("file", "none")] {
        assert_eq!(ask(1, file, what), Err(rustix::io::Errno::NODATA));
    }
    let mut names = [0; 1000];
    assert_eq!(rustix::fs::listxattr(mount.run(1).join("file"), &mut names[..]), Ok(0));
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn kinds_of_files_are_shown_and_work() {
    need_root("device nodes are made");
    let sandbox = Sandbox::new();
    let at = |name: &str| sandbox.source.join(name);
    let mode = Mode::from_raw_mode(0o666);
    let null = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(CWD, at("null"), FileType::CharacterDevice, mode, null).unwrap();
    let odd = rustix::fs::makedev(259, 70_000);
    rustix::fs::mknodat(CWD, at("disk"), FileType::BlockDevice, mode, odd).unwrap();
    rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, mode, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let kind = |name: &str| fs::symlink_metadata(mount.run(1).join(name)).unwrap();
    assert!(kind("null").file_type().is_char_device() && kind("null").rdev() == null);
    assert!(kind("disk").file_type().is_block_device() && kind("disk").rdev() == odd);
    assert!(kind("fifo").file_type().is_fifo() && kind("socket").file_type().is_socket());
    // Root has mounted: the device is the device, and a pipe is one of this machine.
    assert_eq!(fs::read(mount.run(1).join("null")).unwrap(), b"");
    let fifo = mount.run(1).join("fifo");
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| fs::read(&fifo).unwrap());
        fs::write(&fifo, "through the pipe").unwrap();
        assert_eq!(reader.join().unwrap(), b"through the pipe");
    });
    // Nobody listens on a socket of the past.
    let failed = std::os::unix::net::UnixStream::connect(mount.run(1).join("socket"));
    assert_eq!(errno(failed), libc::ECONNREFUSED);
}

/// The rest of an open directory from a position on: names, each with the position after it.
fn listed(dir: &File, from: u64) -> Vec<(Vec<u8>, u64)> {
    rustix::fs::seek(dir, SeekFrom::Start(from)).unwrap();
    let mut buffer = [MaybeUninit::uninit(); 400];
    let mut entries = RawDir::new(dir, &mut buffer);
    let mut found = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry.unwrap();
        found.push((entry.file_name().to_bytes().to_vec(), entry.next_entry_cookie()));
    }
    found
}

#[test]
fn positions_in_a_directory_hold() {
    need_root("the kernel is told to forget what it has cached");
    let sandbox = Sandbox::new();
    for number in 0..700 {
        fs::write(sandbox.source.join(format!("name {number}")), "").unwrap();
    }
    sandbox.backup();
    let mount = sandbox.mount();
    let dir = File::open(mount.run(1)).unwrap();
    let all = listed(&dir, 0);
    assert_eq!(all.len(), 702);
    for again in 0..2 {
        if again == 1 {
            fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        }
        let other = File::open(mount.run(1)).unwrap();
        for at in [0, 1, 2, 255, 256, 257, 400, 701] {
            assert_eq!(listed(&dir, all[at].1), all[at + 1..], "after name {at}");
            assert_eq!(listed(&other, all[at].1), all[at + 1..], "after name {at}");
        }
    }
}

#[test]
fn names_depths_and_lengths_have_the_limits_of_linux() {
    let sandbox = Sandbox::new();
    let long = "n".repeat(255);
    let mut deep = PathBuf::new();
    for _ in 0..12 {
        deep.push(&long);
    }
    fs::create_dir_all(sandbox.source.join(&deep)).unwrap();
    let odd = OsStr::new("new\nline \u{fffd} 'quote'");
    fs::write(sandbox.source.join(odd), "odd").unwrap();
    let vast = File::create(sandbox.source.join("vast")).unwrap();
    vast.set_len(1 << 40).unwrap();
    vast.write_all_at(b"end", (1 << 40) - 3).unwrap();
    vast.sync_all().unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&mount.run(1)));
    assert_eq!(fs::read(mount.run(1).join(odd)).unwrap(), b"odd");
    let vast = File::open(mount.run(1).join("vast")).unwrap();
    assert_eq!(vast.metadata().unwrap().len(), 1 << 40);
    let mut end = [0; 10];
    assert_eq!(vast.read_at(&mut end, (1 << 40) - 5).unwrap(), 5);
    assert_eq!(&end[..5], b"\0\0end");
    assert_eq!(vast.read_at(&mut end, 1 << 40).unwrap(), 0);
    // Longer names are in no snapshot.
    let longer = errno(fs::symlink_metadata(mount.run(1).join("n".repeat(256))));
    assert!(matches!(longer, libc::ENOENT | libc::ENAMETOOLONG), "{longer}");
}

#[test]
fn free_space_is_that_of_the_volumes() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let disk = rustix::fs::statvfs(sandbox.path("volume")).unwrap();
    for path in [mount.run(1), mount.run(1).join("file"), mount.point.join("ingest")] {
        let shown = rustix::fs::statvfs(&path).unwrap();
        assert_eq!(shown.f_namemax, 255);
        assert_eq!(shown.f_blocks * shown.f_frsize / 4096, disk.f_blocks * disk.f_frsize / 4096);
        // Others write on it meanwhile.
        assert!(shown.f_bavail > 0 && shown.f_bavail <= shown.f_blocks);
        // What is for root alone is not used.
        assert_eq!(shown.f_bfree > shown.f_bavail, disk.f_bfree > disk.f_bavail);
    }
}

#[test]
fn a_new_run_is_there_at_the_next_look() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("file"), "1").unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let snapshots = mount.point.join("snapshots");
    let open = File::open(&snapshots).unwrap();
    let names = |list: Vec<(Vec<u8>, u64)>| -> Vec<String> {
        let mut names: Vec<String> =
            list.into_iter().map(|it| String::from_utf8(it.0).unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names(listed(&open, 0)), [".", "..", "1", "latest"]);
    let old = File::open(snapshots.join("latest/file")).unwrap();
    for run in 2..5 {
        fs::write(sandbox.source.join("file"), run.to_string()).unwrap();
        assert_eq!(errno(fs::metadata(mount.run(run))), libc::ENOENT);
        sandbox.backup();
        // Without a moment's wait, by name and by every link.
        assert_eq!(fs::read_to_string(mount.run(run).join("file")).unwrap(), run.to_string());
        assert_eq!(fs::read_to_string(snapshots.join("latest/file")).unwrap(), run.to_string());
        let found = fs::read_dir(&snapshots).unwrap().count();
        assert_eq!(found, run as usize + 1);
    }
    // What was opened by way of `latest` is still what it was.
    let mut byte = [0];
    assert_eq!((old.read_at(&mut byte, 0).unwrap(), byte), (1, *b"1"));
    assert_eq!(fs::read_to_string(mount.run(1).join("file")).unwrap(), "1");
}

#[test]
fn an_open_file_outlives_the_unmounting() {
    let sandbox = Sandbox::new();
    data::noise_file(&sandbox.source.join("file"), 201, 8 << 20);
    sandbox.backup();
    let mut mount = sandbox.mount();
    let file = File::open(mount.run(1).join("file")).unwrap();
    sandbox.ok(args!["umount", &mount.point]);
    // The place is free at once; who has a file open goes on reading, and then the process ends.
    assert_eq!(fs::read_dir(&mount.point).unwrap().count(), 0);
    let mut bytes = vec![0; 8 << 20];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == fs::read(sandbox.source.join("file")).unwrap());
    drop(file);
    wait_for("the process to end", || mount.has_ended());
    let again = Mount::start(&sandbox, &[]);
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&again.run(1)));
}
