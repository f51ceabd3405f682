//! The writable tree of a mount.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::backup_restore::assert_rsync_quiet;
use crate::common::{Mount, Sandbox, Tree, args, assert_same, data, is_root, run, tool};

/// A source with one of everything that any user can make.
fn varied_tree(dir: &Path) {
    data::mixed_tree(dir, 70, 120);
    fs::hard_link(dir.join("d0/e0/f0"), dir.join("second name")).unwrap();
    std::os::unix::fs::symlink("d0/e0", dir.join("link")).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.join("dangling")).unwrap();
    fs::set_permissions(dir.join("d1"), fs::Permissions::from_mode(0o2750)).unwrap();
    fs::set_permissions(dir.join("d2/e2"), fs::Permissions::from_mode(0o500)).unwrap();
    tool("mkfifo", args!["-m", "0604", &dir.join("fifo")]);
    rustix::fs::setxattr(dir.join("d1"), "user.k", b"v", rustix::fs::XattrFlags::empty()).unwrap();
    let holes = File::create(dir.join("holes")).unwrap();
    holes.write_all_at(b"end", 5 << 20).unwrap();
    if is_root() {
        std::os::unix::fs::lchown(dir.join("link"), Some(33), Some(44)).unwrap();
        std::os::unix::fs::chown(dir.join("d3"), Some(33), Some(44)).unwrap();
        tool("setfacl", args!["-m", "u:1234:r", &dir.join("holes")]);
    }
}

/// Asks for a run of what was put in, and waits for its end in `fsync`.
fn ingest(mount: &Mount, line: &str) -> u64 {
    let mut control = OpenOptions::new().read(true).write(true).open(mount.ctl("backup")).unwrap();
    control.write_all(line.as_bytes()).unwrap();
    control.sync_all().unwrap();
    // The same open file tells of the job that was asked for.
    let mut text = String::new();
    control.seek(SeekFrom::Start(0)).unwrap();
    control.read_to_string(&mut text).unwrap();
    let job = text.lines().next().and_then(|it| it.strip_prefix("job ")).unwrap();
    assert!(text.contains("\nstate done\n"), "{text}");
    job.parse().unwrap()
}

#[test]
fn what_is_put_in_becomes_a_run_while_an_old_one_is_read() {
    let sandbox = Sandbox::new();
    varied_tree(&sandbox.source);
    sandbox.backup();
    let source = Tree::of(&sandbox.source);
    let mount = sandbox.mount();
    let latest = mount.point.join("snapshots/latest");
    assert_eq!(fs::read_link(&latest).unwrap().to_str(), Some("1"));
    let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_same(&source, &Tree::of(&mount.run(1)));
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        });
        // The reader must end even if something fails here.
        let result = std::panic::catch_unwind(|| {
            let inside = mount.point.join("ingest/tree");
            tool("cp", args!["-a", &sandbox.source, &inside]);
            assert_same(&source, &Tree::of(&inside));
            let job = ingest(&mount, "ingest --tag fed\n");
            let said = mount.job(job);
            assert_eq!((said["state"].as_str(), said["run"].as_i64()), (Some("done"), Some(2)));
            assert_eq!(said["exit_code"], 0, "{said}");
            assert_eq!(said["problems"], 0, "{said}");
            // The bytes were there already.
            assert_eq!(said["bytes_stored"], 0, "{said}");
            assert_eq!(fs::read_link(&latest).unwrap().to_str(), Some("2"));
            assert_same(&source, &Tree::of(&mount.run(2).join("tree")));
            assert_same(&source, &Tree::of(&latest.join("tree")));
            assert_rsync_quiet(&sandbox.source, &mount.run(2).join("tree"));
        });
        done.store(true, Ordering::Relaxed);
        result.unwrap_or_else(|e| std::panic::resume_unwind(e));
    });
    assert!(rounds.into_inner() > 0);
    mount.end();

    let mount = sandbox.mount();
    assert_same(&source, &Tree::of(&mount.point.join("ingest/tree")));
    fs::write(mount.point.join("ingest/tree/more"), "more").unwrap();
    fs::remove_file(mount.point.join("ingest/tree/holes")).unwrap();
    let said = mount.job(ingest(&mount, "ingest"));
    let counts = ["added", "deleted", "run"].map(|it| said[it].as_i64());
    assert_eq!(counts, [Some(1), Some(1), Some(3)], "{said}");
    assert_same(&source, &Tree::of(&mount.run(2).join("tree")));
    assert_eq!(fs::read(mount.run(3).join("tree/more")).unwrap(), b"more");
    let runs = sandbox.ok(["runs", "--json"]).json();
    assert_eq!(
        (&runs[1]["source"], &runs[1]["tags"]),
        (&"ingest".into(), &serde_json::json!(["fed"]))
    );
    sandbox.assert_valid();
}

#[test]
fn the_tools_that_move_trees_work_on_it() {
    let sandbox = Sandbox::new();
    varied_tree(&sandbox.source);
    let source = Tree::of(&sandbox.source);
    let mount = sandbox.mount();
    let at = |name: &str| mount.point.join("ingest").join(name);
    let trailing = |path: &Path| format!("{}/", path.display());
    // Without the window rsync takes times of one second for the same.
    let rsync = |from: &Path, to: &Path| {
        tool("rsync", ["-aHAX", "--modify-window=-1", &trailing(from), &trailing(to)]);
    };
    rsync(&sandbox.source, &at("rsync"));
    let packed = sandbox.path("packed.tar");
    tool(
        "tar",
        args!["--format=posix", "--xattrs", "--acls", "-cf", &packed, "-C", &sandbox.source, "."],
    );
    fs::create_dir(at("tar")).unwrap();
    tool(
        "tar",
        args!["--xattrs", "--acls", "--xattrs-include=*", "-xpf", &packed, "-C", &at("tar")],
    );
    // These tools write holes out.
    let filled = |tree: Tree| tree.with(|node| node.data.clear());
    for dir in ["rsync", "tar"] {
        assert_same(&filled(source.clone()), &filled(Tree::of(&at(dir))));
    }

    let git = |dir: &Path, line: &[&str]| {
        crate::common::need_tool("git");
        let mut command = Command::new("git");
        command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_SYSTEM", "/dev/null");
        command.args(["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "gc.auto=0"]);
        run(command.arg("-C").arg(dir).args(line)).code(0).text()
    };
    let repository = sandbox.path("repository");
    fs::create_dir(&repository).unwrap();
    data::mixed_tree(&repository, 71, 80);
    git(&repository, &["init", "--quiet"]);
    git(&repository, &["add", "."]);
    git(&repository, &["commit", "--quiet", "-m", "all"]);
    let (from, to) = (repository.to_str().unwrap(), at("clone"));
    git(&mount.point, &["clone", "--quiet", "--no-local", from, to.to_str().unwrap()]);
    assert_eq!(git(&to, &["status", "--porcelain"]), "");
    git(&to, &["fsck", "--strict"]);

    let before = Tree::of(&mount.point.join("ingest"));
    ingest(&mount, "ingest");
    assert_same(&before, &Tree::of(&mount.run(1)));
    let log = git(&mount.run(1).join("clone"), &["log", "--format=%s"]);
    assert_eq!(log.trim(), "all");
    // As it was, and as it can be taken out.
    rsync(&mount.run(1).join("rsync"), &sandbox.path("out"));
    assert_same(&filled(source), &filled(Tree::of(&sandbox.path("out"))));
    // Who is not root may not take anything out of a directory that is closed to writing.
    tool("chmod", args!["-R", "u+w", &at("")]);
    tool("rm", args!["-rf", &at("rsync"), &at("tar"), &at("clone")]);
    assert_eq!(fs::read_dir(at("")).unwrap().count(), 0);
}

/// Does the same odd things in any directory.
fn do_odd_things(dir: &Path, seed: u64) {
    let mut seeded = data::Seeded::new(seed);
    let at = |name: &str| dir.join(name);
    for step in 0..400 {
        let name = format!("f{}", seeded.below(12));
        let other = format!("f{}", seeded.below(12));
        let len = seeded.below(20_000);
        // What fails has to fail alike: the trees are compared afterwards.
        let _ = match seeded.below(12) {
            0 => fs::write(at(&name), seeded.noise(len as usize)),
            1 => OpenOptions::new()
                .append(true)
                .open(at(&name))
                .and_then(|mut it| it.write_all(&seeded.noise(100))),
            2 => OpenOptions::new().write(true).open(at(&name)).and_then(|it| it.set_len(len)),
            3 => OpenOptions::new()
                .write(true)
                .open(at(&name))
                .and_then(|it| it.write_all_at(b"in the middle", len)),
            4 => fs::rename(at(&name), at(&other)),
            5 => fs::remove_file(at(&name)),
            6 => fs::hard_link(at(&name), at(&other)),
            7 => fs::create_dir(at(&name)),
            8 => fs::remove_dir(at(&name)),
            9 => std::os::unix::fs::symlink(&other, at(&name)),
            10 => fs::write(at(&name).join("in"), format!("{step}")),
            _ => fs::set_permissions(
                at(&name),
                fs::Permissions::from_mode(0o700 | (seeded.below(512) as u32)),
            ),
        };
    }
    // A file that has no name any more is a file as long as it is open.
    let mut file =
        OpenOptions::new().read(true).write(true).create_new(true).open(at("unnamed")).unwrap();
    fs::remove_file(at("unnamed")).unwrap();
    file.write_all(b"still here").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
    // Nor does a directory stop to be one when it moves under an open one.
    fs::create_dir_all(at("x/y")).unwrap();
    let open = File::open(at("x/y")).unwrap();
    fs::rename(at("x"), at("z")).unwrap();
    rustix::fs::mkdirat(&open, "below", rustix::fs::Mode::RWXU).unwrap();
    assert!(at("z/y/below").is_dir());
}

#[test]
fn it_does_what_any_directory_does() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    for seed in 0..4 {
        let plain = sandbox.path(&format!("plain{seed}"));
        let inside = mount.point.join(format!("ingest/{seed}"));
        for dir in [&plain, &inside] {
            fs::create_dir(dir).unwrap();
            do_odd_things(dir, seed);
        }
        let timeless = |dir| Tree::of(dir).with(|node| node.mtime = (0, 0));
        assert_same(&timeless(&plain), &timeless(&inside));
    }
    ingest(&mount, "ingest");
    assert_same(&Tree::of(&mount.point.join("ingest")), &Tree::of(&mount.run(1)));
}

#[test]
fn several_writers_at_once_do_not_hinder_each_other() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    std::thread::scope(|scope| {
        for writer in 0..6 {
            let dir = mount.point.join(format!("ingest/w{writer}"));
            scope.spawn(move || {
                fs::create_dir(&dir).unwrap();
                data::mixed_tree(&dir, writer, 60);
            });
        }
    });
    ingest(&mount, "ingest");
    for writer in 0..6 {
        let plain = sandbox.path(&format!("w{writer}"));
        fs::create_dir(&plain).unwrap();
        data::mixed_tree(&plain, writer, 60);
        let timeless = |dir: &Path| Tree::of(dir).with(|node| node.mtime = (0, 0));
        assert_same(&timeless(&plain), &timeless(&mount.run(1).join(format!("w{writer}"))));
    }
}

/// Locks, holes, maps, direct writes, modes, owners, lists and listings: the same answers in both.
#[test]
fn programs_get_the_answers_that_any_disk_gives() {
    let sandbox = Sandbox::new();
    let options: &[&str] = if is_root() { &["--allow-other"] } else { &[] };
    let mount = Mount::start(&sandbox, options);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/posix.py");
    let inside = mount.point.join("ingest");
    fs::set_permissions(&inside, fs::Permissions::from_mode(0o777)).unwrap();
    crate::common::need_tool("python3");
    let answers = |dir: &Path| {
        fs::create_dir(dir).unwrap();
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
        let mut python = Command::new("python3");
        run(python.current_dir(dir).arg("-B").arg(&script)).code(0).text()
    };
    let expected = answers(&sandbox.path("plain"));
    let found = answers(&inside.join("tree"));
    assert!(expected.lines().count() > 50);
    for (expected, found) in expected.lines().zip(found.lines()) {
        assert_eq!(expected, found);
    }
    assert_eq!(expected, found);
    // What came of it is a source like any other.
    ingest(&mount, "ingest");
    let before = Tree::of(&inside);
    assert_same(&before, &Tree::of(&mount.run(1)));
}

#[test]
fn many_may_be_open_at_once() {
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let process = Path::new("/proc").join(mount.pid().to_string());
    let dirs = mount.point.join("ingest/dirs");
    let opened = || fs::read_dir(process.join("fd")).unwrap().count();
    fs::create_dir(&dirs).unwrap();
    for n in 0..200 {
        fs::create_dir(dirs.join(n.to_string())).unwrap();
    }
    let before = opened();
    let held: Vec<File> = (0..200).map(|n| File::open(dirs.join(n.to_string())).unwrap()).collect();
    // What is only known had a descriptor already.
    let after = opened();
    assert!(after <= before + if is_root() { 20 } else { 220 }, "{before} became {after}");
    drop(held);
}
