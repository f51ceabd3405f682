//! Odd names, kinds, times and attributes.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, XattrFlags};

use crate::common::{
    Sandbox, Tree, assert_same, bytes_of, data, is_root, name_of, need_root, path_of, tool,
    tree::data_ranges,
};

/// Backs the source up and checks that mount and restore give it back; the trees are the same.
#[track_caller]
fn assert_comes_back(sandbox: &Sandbox) {
    sandbox.backup();
    let source = Tree::of(&sandbox.source);
    let mount = sandbox.mount();
    assert_same(&source, &Tree::of(&mount.run(1)));
    assert_same(&source, &Tree::of(&sandbox.revert(1, "out")));
    sandbox.assert_valid();
    mount.end();
}

#[test]
fn every_byte_that_a_name_can_have() {
    let sandbox = Sandbox::new();
    let mut names: BTreeSet<Vec<u8>> = (1..=255).map(|it| vec![it]).collect();
    names.remove(&b"/"[..]);
    names.remove(&b"."[..]);
    names.extend([
        vec![0xff; 255],
        vec![b'\n'; 255],
        "\u{20ac}".repeat(85).into_bytes(),
        b"...".to_vec(),
        b"-rf".to_vec(),
        b"new\nline".to_vec(),
        b"quote'\"`$(x)\\".to_vec(),
        b" space at both ends ".to_vec(),
        b"half a char \xe2\x82".to_vec(),
        b"\xed\xa0\x80 surrogate".to_vec(),
        "e\u{301} and \u{e9}".as_bytes().to_vec(),
        b"\x1b[31mred".to_vec(),
        b"latest".to_vec(),
    ]);
    for name in &names {
        fs::write(sandbox.source.join(path_of(name)), name).unwrap();
    }
    let dir = sandbox.source.join(path_of(b"dir \xff\n"));
    fs::create_dir(&dir).unwrap();
    names.insert(b"dir \xff\n".to_vec());
    std::os::unix::fs::symlink(OsStr::from_bytes(b"to \xfe\n"), dir.join("link")).unwrap();
    assert_comes_back(&sandbox);
    let listed = sandbox.ok(["ls", "1", "--json"]).json_lines();
    let listed: BTreeSet<Vec<u8>> = listed.iter().map(|it| name_of(it, "path")).collect();
    assert_eq!(listed, names);
    let changed = sandbox.ok(["list-changes", "1", "--json"]).json_lines();
    let changed: BTreeSet<Vec<u8>> = changed.iter().map(|it| name_of(it, "path")).collect();
    names.extend([Vec::new(), b"dir \xff\n/link".to_vec()]);
    assert_eq!(changed, names);
    // For people each is one line, and nothing drives their terminal.
    let shown = sandbox.ok(["list-changes", "1"]);
    let lines = shown.text();
    assert_eq!(lines.lines().count(), names.len() + 3);
    assert!(lines.chars().all(|it| it == '\n' || !it.is_control()), "{lines:?}");
    // One by one by its name.
    let out = sandbox.path("one");
    fs::create_dir(&out).unwrap();
    for name in [&b"\xff"[..], b"new\nline", b"-"] {
        let line = [OsStr::new("restore"), OsStr::new("--"), OsStr::from_bytes(name)];
        sandbox.ok(line.into_iter().chain([out.as_os_str()]));
        assert_eq!(fs::read(out.join(path_of(name))).unwrap(), name);
    }
}

#[test]
fn a_source_may_have_an_odd_name_itself() {
    let mut sandbox = Sandbox::bare();
    sandbox.source = sandbox.path("").join(path_of(b"source \xff\n"));
    fs::create_dir(&sandbox.source).unwrap();
    fs::write(sandbox.source.join("file"), "x").unwrap();
    sandbox.init(&[]);
    sandbox.add_volume("volume");
    let said = sandbox.backup();
    assert_eq!(name_of(&said, "source"), bytes_of(&sandbox.source));
    let runs = sandbox.ok(["runs", "--json"]).json();
    assert_eq!(name_of(&runs[0], "source"), bytes_of(&sandbox.source));
    assert_eq!(sandbox.backup()["unchanged"], 1);
    assert_eq!(sandbox.ok(["runs"]).text().lines().count(), 3);
}

#[test]
fn every_kind_of_entry() {
    need_root("it makes device nodes");
    let sandbox = Sandbox::new();
    let dir = File::open(&sandbox.source).unwrap();
    let mode = Mode::from_raw_mode(0o640);
    rustix::fs::mknodat(&dir, "fifo", FileType::Fifo, mode, 0).unwrap();
    rustix::fs::mknodat(&dir, "socket", FileType::Socket, mode, 0).unwrap();
    let rdev = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(&dir, "null", FileType::CharacterDevice, mode, rdev).unwrap();
    let rdev = rustix::fs::makedev(4_000, 1_000_000);
    rustix::fs::mknodat(&dir, "disk", FileType::BlockDevice, mode, rdev).unwrap();
    let link = |target: &[u8], name: &str| {
        std::os::unix::fs::symlink(OsStr::from_bytes(target), sandbox.source.join(name)).unwrap();
    };
    link(b"nowhere", "dangling");
    link(b"loop", "loop");
    link(b"/", "root");
    link(b"..", "up");
    link(&[b'x'; 4095], "long");
    link(b"\xff\n", "odd");
    fs::write(sandbox.source.join("empty"), "").unwrap();
    fs::create_dir(sandbox.source.join("empty dir")).unwrap();
    // Two names of one that is no file.
    let (from, to) = (sandbox.source.join("fifo"), sandbox.source.join("fifo again"));
    fs::hard_link(from, to).unwrap();
    assert_comes_back(&sandbox);
    assert_eq!(sandbox.backup()["unchanged"], 13 - 1);
}

#[test]
fn what_cannot_be_read_is_named_and_the_rest_is_kept() {
    let sandbox = Sandbox::of_nobody();
    let at = |name: &str| sandbox.source.join(name);
    fs::create_dir(at("dir")).unwrap();
    fs::create_dir(at("closed")).unwrap();
    for name in ["first", "dir/secret", "dir/open", "closed/inside", "last"] {
        fs::write(at(name), name).unwrap();
    }
    fs::set_permissions(at("dir/secret"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(at("closed"), fs::Permissions::from_mode(0o000)).unwrap();
    let line = [OsStr::new("backup"), sandbox.source.as_os_str(), OsStr::new("--json")];
    let ran = sandbox.run(line).code(3);
    let errors = ran.errors();
    assert!(errors.contains("dir/secret") && errors.contains("closed"), "{errors}");
    let said = ran.json();
    assert_eq!(said["problems"], 2, "{said}");
    let named: BTreeSet<_> =
        said["problem_list"].as_array().unwrap().iter().map(|it| name_of(it, "path")).collect();
    assert_eq!(named, [b"dir/secret".to_vec(), b"closed".to_vec()].into());
    // Later, too.
    let changes = sandbox.ok(["list-changes", "1", "--json"]).json_lines();
    let problems = changes.iter().filter(|it| it["change"] == "problem");
    assert_eq!(problems.map(|it| name_of(it, "path")).collect::<BTreeSet<_>>(), named);
    let runs = sandbox.ok(["runs", "--json"]).json();
    assert_eq!(runs[0]["problems"], 2);

    let out = sandbox.path("out");
    // Who may not make the directory in the sandbox restores into one that is there.
    fs::create_dir(&out).unwrap();
    if is_root() {
        std::os::unix::fs::chown(&out, Some(crate::common::NOBODY), None).unwrap();
    }
    let revert = [OsStr::new("revert-to-run"), OsStr::new("1"), out.as_os_str()];
    sandbox.ok(revert);
    let found: BTreeSet<_> = Tree::of_readable(&out).0.into_keys().collect();
    let expected = ["", "first", "last", "dir", "dir/open", "closed"];
    assert_eq!(found, expected.iter().map(|it| it.as_bytes().to_vec()).collect());
    for name in ["first", "dir/open", "last"] {
        assert_eq!(fs::read_to_string(out.join(name)).unwrap(), name);
    }
    // Once it can be read, the next run has it.
    for (name, mode) in [("dir/secret", 0o644), ("closed", 0o755)] {
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        fs::set_permissions(out.join("closed"), fs::Permissions::from_mode(0o700)).unwrap();
    }
    let said = sandbox.backup();
    assert_eq!((said["problems"].as_u64(), said["added"].as_u64()), (Some(0), Some(2)), "{said}");
}

#[test]
fn holes_stay_holes() {
    let sandbox = Sandbox::new();
    let make = |name: &str, size: u64, data: &[(u64, usize)]| {
        let file = File::create(sandbox.source.join(name)).unwrap();
        file.set_len(size).unwrap();
        for (at, len) in data {
            file.write_all_at(&data::Seeded::new(*at).noise(*len), *at).unwrap();
        }
    };
    make("all hole", 1 << 40, &[]);
    make("between", 40 << 20, &[(0, 4096), (10 << 20, 3 << 20), (39 << 20, 1 << 20)]);
    make("at the end", 3_000_000, &[(0, 8192)]);
    make("at the start", 30 << 20, &[(20 << 20, 10 << 20)]);
    make("odd end", (5 << 20) + 17, &[(5 << 20, 17)]);
    make("small", 100_000, &[(40_960, 100)]);
    let said = sandbox.backup();
    assert!(said["bytes_read"].as_u64().unwrap() < 20 << 20, "holes were read: {said}");
    let mount = sandbox.mount();
    let out = sandbox.revert(1, "out");
    for name in ["all hole", "between", "at the end", "at the start", "odd end", "small"] {
        let open = |dir: &Path| File::open(dir.join(name)).unwrap();
        let (source, shown, back) = (open(&sandbox.source), open(&mount.run(1)), open(&out));
        let ranges = data_ranges(&source);
        assert_eq!(data_ranges(&shown), ranges, "{name} on the mount");
        assert_eq!(data_ranges(&back), ranges, "{name} restored");
        let blocks = |file: &File| file.metadata().unwrap().blocks();
        assert!(blocks(&shown) <= blocks(&source) + 16, "{name} on the mount");
        assert!(blocks(&back) <= blocks(&source) + 16, "{name}");
        let lens = [&source, &shown, &back].map(|it| it.metadata().unwrap().len());
        assert!(lens.iter().all(|it| *it == lens[0]), "{name}: {lens:?}");
        // What lies around the edges of data, and the end.
        for at in ranges.iter().flat_map(|it| [it.0, it.1]).chain([lens[0]]) {
            let from = at.saturating_sub(5_000);
            let read = |file: &File| {
                let mut bytes = vec![0; 10_000];
                let got = file.read_at(&mut bytes, from).unwrap();
                bytes.truncate(got);
                bytes
            };
            assert!(read(&source) == read(&shown), "{name} around {at}, on the mount");
            assert!(read(&source) == read(&back), "{name} around {at}, restored");
        }
    }
    // cp finds the holes too.
    let copy = sandbox.path("copy");
    tool("cp", crate::common::args!["--sparse=auto", &mount.run(1).join("between"), &copy]);
    let room = fs::metadata(&copy).unwrap().blocks() * 512;
    assert!(room < 5 << 20, "{room} bytes of disk for the copy");
    assert_eq!(sandbox.backup()["unchanged"], 6);
}

#[test]
fn attributes_lists_and_links() {
    need_root("it sets attributes that only root may set");
    let sandbox = Sandbox::new();
    let at = |name: &str| sandbox.source.join(name);
    fs::create_dir_all(at("dir/deeper")).unwrap();
    for name in ["plain", "many", "capable", "dir/listed"] {
        fs::write(at(name), name).unwrap();
    }
    std::os::unix::fs::symlink("plain", at("link")).unwrap();
    let set = |name: &str, key: &[u8], value: &[u8]| {
        rustix::fs::lsetxattr(at(name), OsStr::from_bytes(key), value, XattrFlags::empty())
            .unwrap();
    };
    set("plain", b"user.empty", b"");
    set("plain", b"user.bytes \xff", &[0, 255, 10, 13]);
    for number in 0..20 {
        set("many", format!("user.number{number}").as_bytes(), &[number; 50]);
    }
    set("dir", b"user.dir", b"d");
    set("dir", b"trusted.dir", b"root only");
    set("link", b"trusted.link", b"of the link itself");
    // cap_net_raw+ep.
    set(
        "capable",
        b"security.capability",
        &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    let listed = at("dir/listed");
    tool("setfacl", crate::common::args!["-m", "u:1234:rw,g:99:r,m:rw", &listed]);
    tool("setfacl", crate::common::args!["-d", "-m", "u:1234:rwx", &at("dir")]);
    // Files of several names, in several directories, and one with a name outside.
    fs::hard_link(at("plain"), at("dir/deeper/plain")).unwrap();
    fs::hard_link(at("plain"), at("zz plain")).unwrap();
    fs::hard_link(at("many"), at("dir/many")).unwrap();
    for (name, mode) in
        [("plain", 0o4755), ("many", 0o2711), ("dir/deeper", 0o7777), ("dir", 0o500)]
    {
        fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    std::os::unix::fs::lchown(at("link"), Some(7), Some(8)).unwrap();
    std::os::unix::fs::lchown(at("dir"), Some(u32::MAX - 2), Some(100_000)).unwrap();
    assert_comes_back(&sandbox);
    // A changed attribute alone is a change.
    set("plain", b"user.empty", b"not any more");
    assert_eq!(sandbox.backup()["modified"], 3);
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&sandbox.revert(2, "second")));
}

#[test]
fn a_name_outside_the_source_is_no_trouble() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("inside"), "x").unwrap();
    fs::hard_link(sandbox.source.join("inside"), sandbox.path("outside")).unwrap();
    sandbox.backup();
    let out = sandbox.revert(1, "out");
    assert_eq!(fs::read(out.join("inside")).unwrap(), b"x");
    assert_eq!(fs::metadata(out.join("inside")).unwrap().nlink(), 1);
}

#[test]
fn times_of_all_ages() {
    let sandbox = Sandbox::new();
    let times = [
        ("1901", -2_147_483_647, 999_999_999),
        ("before 1970", -2, 500_000_000),
        ("just before 1970", -1, 1),
        ("1970", 0, 0),
        ("nanoseconds", 1_700_000_000, 123_456_789),
        ("after 2038", 2_147_483_648, 1),
        ("2300", 10_413_792_000, 987_654_321),
    ];
    let dir = File::open(&sandbox.source).unwrap();
    for (name, _, _) in times {
        fs::write(sandbox.source.join(name), name).unwrap();
        fs::create_dir(sandbox.source.join(format!("{name} dir"))).unwrap();
        std::os::unix::fs::symlink("x", sandbox.source.join(format!("{name} link"))).unwrap();
    }
    for (name, secs, nanos) in times {
        let time = Timespec { tv_sec: secs, tv_nsec: nanos };
        let times = Timestamps { last_access: time, last_modification: time };
        for name in [name.to_owned(), format!("{name} dir"), format!("{name} link")] {
            rustix::fs::utimensat(&dir, &*name, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
            let stat = fs::symlink_metadata(sandbox.source.join(&name)).unwrap();
            let kept = (stat.mtime(), stat.mtime_nsec());
            assert_eq!(kept, (secs, nanos), "the file system here does not keep {name}");
        }
    }
    assert_comes_back(&sandbox);
    let listed = sandbox.ok(["ls", "1", "--json"]).json_lines();
    let find = |name: &str| listed.iter().find(|it| it["path"] == name).unwrap()["mtime"].clone();
    assert_eq!(find("before 1970"), "1969-12-31T23:59:58.5Z");
    assert_eq!(find("2300"), "2300-01-01T00:00:00.987654321Z");
}

#[test]
fn directories_deeper_than_any_path() {
    let sandbox = Sandbox::new();
    let name = "d".repeat(200);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut fd: OwnedFd = File::open(&sandbox.source).unwrap().into();
    for level in 0..60 {
        rustix::fs::mkdirat(&fd, &*name, Mode::from_raw_mode(0o755)).unwrap();
        fd = rustix::fs::openat(&fd, &*name, flags, Mode::empty()).unwrap();
        if level % 20 == 19 {
            let create = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&fd, "file", create, Mode::RUSR | Mode::WUSR).unwrap();
            std::io::Write::write_all(&mut File::from(file), format!("{level}").as_bytes())
                .unwrap();
        }
    }
    assert_comes_back(&sandbox);
    let changes = sandbox.ok(["list-changes", "1", "--json"]).json_lines();
    let longest = changes.iter().map(|it| name_of(it, "path").len()).max().unwrap();
    assert_eq!(longest, 60 * 201 + 4);
}
