//! Random programs on a real mount against a reference tree, in every way of mounting, and random
//! changes in `/ingest` against a model.
//!
//! The programs are those that the unit tests of the room `fs` play without a kernel. A failure
//! tells its seed: `RAIDTAPE_MODEL_SEED=N` plays it again.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RawDir, SeekFrom, Timespec, Timestamps, UTIME_NOW,
    XattrFlags,
};

use crate::common::mount::MODES;
use crate::common::program::{self, Answer, Change, Facts, Files, Listed, Reference};
use crate::common::world::{EXCLUDED, Links, World, op};
use crate::common::{Mount, Sandbox, assert_same, need_root, path_of};
use crate::model::plain;

/// The snapshots of a mount, by system calls.
struct Calls<'a>(&'a Mount);

fn answer<T>(result: io::Result<T>) -> Answer<T> {
    result.map_err(|e| e.raw_os_error().unwrap())
}

fn of_rustix<T>(result: rustix::io::Result<T>) -> Answer<T> {
    result.map_err(rustix::io::Errno::raw_os_error)
}

fn facts(stat: &fs::Metadata) -> Facts {
    let kind = match stat.file_type() {
        it if it.is_dir() => "dir",
        it if it.is_symlink() => "symlink",
        it if it.is_fifo() => "fifo",
        it if it.is_file() => "file",
        other => panic!("{other:?}"),
    };
    Facts {
        ino: stat.ino(),
        kind,
        mode: stat.mode() & 0o7777,
        owner: (stat.uid(), stat.gid()),
        mtime: (stat.mtime(), stat.mtime_nsec() as u64),
        atime: (stat.atime(), stat.atime_nsec() as u64),
        size: stat.size(),
        links: stat.nlink(),
        rdev: stat.rdev(),
        blocks: stat.blocks(),
    }
}

fn open_path(path: &Path) -> Answer<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    of_rustix(rustix::fs::open(path, flags, Mode::empty()))
}

impl Files for Calls<'_> {
    type Node = PathBuf;
    type File = File;
    type Dir = OwnedFd;
    const KERNEL: bool = true;

    fn node(&self, run: usize, path: &[u8]) -> Answer<PathBuf> {
        let path = self.0.run(run as i64 + 1).join(path_of(path));
        answer(fs::symlink_metadata(&path)).map(|_| path)
    }

    fn stat(&self, node: &PathBuf) -> Answer<Facts> {
        answer(fs::symlink_metadata(node)).map(|it| facts(&it))
    }

    fn lookup(&self, dir: &PathBuf, name: &[u8]) -> Answer<Facts> {
        let (dir, name) = (open_path(dir)?, OsStr::from_bytes(name));
        // By an open file: `name` may be `..`, which a path would take away.
        let found = rustix::fs::openat(
            &dir,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        );
        answer(File::from(of_rustix(found)?).metadata()).map(|it| facts(&it))
    }

    fn readlink(&self, node: &PathBuf) -> Answer<Vec<u8>> {
        answer(fs::read_link(node)).map(|it| it.into_os_string().into_vec())
    }

    fn xattr(&self, node: &PathBuf, key: &[u8]) -> Answer<Vec<u8>> {
        let mut value = vec![0; (1 << 16) + 1];
        let len = of_rustix(rustix::fs::lgetxattr(node, OsStr::from_bytes(key), &mut value[..]))?;
        value.truncate(len);
        Ok(value)
    }

    fn xattrs(&self, node: &PathBuf) -> Answer<Vec<Vec<u8>>> {
        let mut names = vec![0; (1 << 16) + 1];
        let len = of_rustix(rustix::fs::llistxattr(node, &mut names[..]))?;
        let names = names[..len].split(|it| *it == 0).filter(|it| !it.is_empty());
        Ok(names.map(<[u8]>::to_vec).collect())
    }

    fn space(&self, node: &PathBuf) -> Answer<u64> {
        of_rustix(rustix::fs::fstatvfs(open_path(node)?)).map(|it| it.f_blocks)
    }

    fn open(&self, node: &PathBuf) -> Answer<File> {
        answer(File::open(node))
    }

    fn read(&self, file: &File, offset: u64, len: usize) -> Answer<Vec<u8>> {
        let mut bytes = vec![0xaa; len];
        let mut done = 0;
        while done < len {
            match answer(file.read_at(&mut bytes[done..], offset + done as u64))? {
                0 => break,
                more => done += more,
            }
        }
        bytes.truncate(done);
        Ok(bytes)
    }

    fn seek(&self, file: &File, offset: u64, data: bool) -> Answer<u64> {
        let to = if data { SeekFrom::Data(offset) } else { SeekFrom::Hole(offset) };
        of_rustix(rustix::fs::seek(file, to))
    }

    fn close(&self, _file: File) {}

    fn opendir(&self, node: &PathBuf) -> Answer<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        of_rustix(rustix::fs::open(node, flags, Mode::empty()))
    }

    fn list(&self, dir: &OwnedFd, offset: u64, count: usize) -> Answer<Vec<Listed>> {
        of_rustix(rustix::fs::seek(dir, SeekFrom::Start(offset)))?;
        // Room for the longest name, and hardly more if few are asked for.
        let mut buffer = Vec::with_capacity(280 + 32 * (count - 1));
        let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
        let mut listed = Vec::new();
        while let Some(entry) = entries.next() {
            let entry = of_rustix(entry)?;
            listed.push(Listed {
                name: entry.file_name().to_bytes().to_vec(),
                ino: entry.ino(),
                next: entry.next_entry_cookie(),
                facts: None,
            });
            if entries.is_buffer_empty() {
                break;
            }
        }
        Ok(listed)
    }

    fn closedir(&self, _dir: OwnedFd) {}

    fn change(&self, node: &PathBuf, is_dir: bool, name: &[u8], how: Change) -> Answer<()> {
        let name = OsStr::from_bytes(name);
        let is_link = answer(fs::symlink_metadata(node))?.is_symlink();
        let rw = Mode::from_raw_mode(0o644);
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: now, last_modification: now };
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        // Links have no mode that could be changed.
        let how = if is_link && how == Change::Mode { Change::Owner } else { how };
        let dir = if is_dir { open_path(node)? } else { open_path(node.parent().unwrap())? };
        let one = rustix::fs::Uid::from_raw(1);
        of_rustix(match how {
            Change::Mode => rustix::fs::chmodat(CWD, node, rw, AtFlags::empty()),
            Change::Owner => rustix::fs::chownat(CWD, node, Some(one), None, nofollow),
            Change::Times => rustix::fs::utimensat(CWD, node, &times, nofollow),
            Change::Size => {
                return answer(OpenOptions::new().write(true).truncate(true).open(node)).map(drop);
            }
            Change::Write => {
                return answer(OpenOptions::new().read(true).write(true).open(node)).map(drop);
            }
            Change::SetXattr => rustix::fs::lsetxattr(node, "trusted.x", b"x", XattrFlags::empty()),
            Change::RemoveXattr => rustix::fs::lremovexattr(node, "trusted.x"),
            Change::Link => rustix::fs::linkat(CWD, node, &dir, name, AtFlags::empty()),
            Change::Create => {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                rustix::fs::openat(&dir, name, flags, rw).map(drop)
            }
            Change::MakeDir => rustix::fs::mkdirat(&dir, name, rw),
            Change::Pipe => rustix::fs::mknodat(&dir, name, FileType::Fifo, rw, 0),
            Change::Symlink => rustix::fs::symlinkat("target", &dir, name),
            Change::Remove => rustix::fs::unlinkat(&dir, name, AtFlags::empty()),
            Change::RemoveDir => rustix::fs::unlinkat(&dir, name, AtFlags::REMOVEDIR),
            Change::Rename => rustix::fs::renameat(&dir, name, &dir, "renamed"),
        })
    }
}

#[test]
fn programs_find_the_tree_in_every_mode() {
    need_root("owners and attributes of links are set");
    let seed = program::seed();
    for init in [
        &["--block-size", "1MiB", "--chunk-size", "4KiB"][..],
        &["--block-size", "1MiB", "--compression", "none"],
    ] {
        let sandbox = Sandbox::with(init);
        let reference = Reference::make(&sandbox.source, seed, 3, || {
            let said = sandbox.backup_with(&["--exclude", EXCLUDED]);
            assert_eq!(said["problems"], 0, "{said}");
        });
        for (mode, options) in MODES {
            eprintln!("mount_model: seed {seed}, {init:?}, mounted {mode}");
            let mount = Mount::start(&sandbox, options);
            reference.play(&Calls(&mount), seed, 20);
            mount.end();
        }
    }
}

#[test]
fn random_changes_in_ingest_are_those_of_any_tree() {
    need_root("owners and attributes of links are set");
    let seed = program::seed();
    eprintln!("mount_model: seed {seed}");
    let mut runner = TestRunner::new_with_rng(Default::default(), program::rng(seed));
    let sandbox = Sandbox::new();
    let mount = sandbox.mount();
    let root = mount.point.join("ingest/world");
    fs::create_dir(&root).unwrap();
    let mut world = World::new(&root);
    for run in 1..=3 {
        let ops = prop::collection::vec(op(), 60..90).new_tree(&mut runner).unwrap().current();
        for (op, when) in &ops {
            world.apply(op, *when);
        }
        world.settle();
        let expected = world.model().tree(Links::OfSource);
        // What is left out is there, and may be the first name of something.
        let is_kept =
            |path: &[u8]| path.split(|it| *it == b'/').all(|name| !name.ends_with(b".skip"));
        let of_ingest = plain(&root).without(|path, _| !is_kept(path));
        let of_ingest = of_ingest.with(|node| node.first_name = None);
        let nameless = expected.clone().with(|node| node.first_name = None);
        assert_same(&nameless, &of_ingest);
        fs::write(mount.ctl("backup"), format!("ingest --exclude '{EXCLUDED}'")).unwrap();
        assert_eq!(mount.wait_for_job(run)["state"], "done", "seed {seed}");
        assert_same(&expected, &plain(&mount.run(run as i64).join("world")));
    }
    mount.end();
}
