//! Random programs on the operations of the mount, without a kernel, against a reference tree; and
//! requests that no kernel would make.
//!
//! The programs and the trees are those of `tests/common`, where `tests/mount_model.rs` plays them
//! on a real mount. `RAIDTAPE_MODEL_SEED=N` plays a failed seed again.

#![allow(
    dead_code,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss
)]

#[path = "../../tests/common/data.rs"]
mod data;
#[path = "../../tests/common/program/mod.rs"]
mod program;
#[path = "../../tests/common/tree.rs"]
mod tree;
#[path = "../../tests/common/world.rs"]
mod world;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use super::control::{Control, Manner, Waiters, Who};
use super::errno::{Errno, FsResult};
use super::ingest::{Caller, Ingest, SetAttr};
use super::mounted::Mounted;
use super::tree::{ItemStat, Tree};
use crate::backup::{self, Rule, Rules};
use crate::catalog::{Settings, Writer};
use crate::chunk::HashAlgo;
use crate::chunk::frame::Compression;
use crate::chunk::split::Chunking;
use crate::job::{Queue, Site};
use crate::progress::Progress;
use crate::snapshot::Snapshots;
use crate::sys::{Stat, c};
use program::{Answer, Change, Facts, Files, Listed, Reference};

/// Number of the root, as the kernel has it.
const ROOT: u64 = 1;

fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes.to_vec()))
}

/// A catalog with runs of random trees, and the file system over it.
struct Direct {
    mounted: Mounted,
    reference: Reference,
    _dir: tempfile::TempDir,
}

impl Direct {
    /// Three runs, stored in blocks of 1 MiB so that files reach over their borders.
    fn new(seed: u64, chunking: Chunking, compression: Compression) -> Direct {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (catalog, source) = (at("catalog"), at("source"));
        let settings = Settings {
            hash: HashAlgo::Blake3,
            chunking,
            compression,
            block_bytes: 1 << 20,
            reserve_percent: 0,
            copies: 1,
        };
        std::fs::create_dir(&source).unwrap();
        std::fs::create_dir(at("volume")).unwrap();
        let mut writer = Writer::create(&catalog, &settings).unwrap();
        writer.add_volume(&at("volume"), 0).unwrap();
        drop(writer);
        let rules = vec![Rule::Exclude(world::EXCLUDED.into())];
        let options = backup::Options {
            source: source.clone(),
            rules: Rules { rules, ..Rules::default() },
            ..backup::Options::default()
        };
        let reference = Reference::make(&source, seed, 3, || {
            let summary = backup::run(&catalog, &options, &Progress::default()).unwrap();
            assert!(summary.problems.is_empty(), "{:?}", summary.problems);
        });
        Direct { mounted: mounted(&catalog, &at("ingest")), reference, _dir: dir }
    }
}

fn mounted(catalog: &Path, ingest: &Path) -> Mounted {
    // Smaller than the data, so that frames are dropped and loaded again.
    let snapshots = Arc::new(Snapshots::open(catalog, 1 << 20).unwrap());
    let site = Site { ingest_dir: ingest.to_path_buf(), mountpoint: "/nowhere".into() };
    let queue = Arc::new(Queue::open(catalog, site, |_| 0).unwrap());
    let waiters = Arc::new(Waiters::new(queue.bell().clone()));
    let tree = Tree::new(snapshots.clone());
    let manner = Manner { allow_other: false, mode: Arc::default(), kernel: Arc::default() };
    let control = Control::new(queue, snapshots, waiters, &tree, manner);
    Mounted::new(tree, Arc::new(control), Ingest::new(ingest).unwrap().into())
}

fn answer<T>(result: FsResult<T>) -> Answer<T> {
    result.map_err(|e| e.0)
}

fn facts(stat: &Stat) -> Facts {
    let kind = match stat.mode & c::S_IFMT {
        c::S_IFREG => "file",
        c::S_IFDIR => "dir",
        c::S_IFLNK => "symlink",
        c::S_IFIFO => "fifo",
        other => panic!("type {other:o}"),
    };
    Facts {
        ino: stat.ino,
        kind,
        mode: stat.mode & 0o7777,
        owner: (stat.uid, stat.gid),
        mtime: (stat.mtime.secs, stat.mtime.nanos.into()),
        atime: (stat.atime.secs, stat.atime.nanos.into()),
        size: stat.size,
        links: stat.nlink,
        rdev: stat.rdev,
        blocks: stat.blocks,
    }
}

const WHO: Who = Who { uid: 0, gid: 0, pid: 0 };
const CALLER: Caller = Caller { uid: 0, gid: 0, umask: 0o022 };

impl Files for Mounted {
    type Node = u64;
    /// Inode number and handle.
    type File = (u64, u64);
    type Dir = (u64, u64);
    const KERNEL: bool = false;

    fn node(&self, run: usize, path: &[u8]) -> Answer<u64> {
        let number = (run + 1).to_string();
        let below = path.split(|it| *it == b'/').filter(|it| !it.is_empty());
        let mut names = [&b"snapshots"[..], number.as_bytes()].into_iter().chain(below);
        names.try_fold(ROOT, |dir, name| {
            let found = answer(Mounted::lookup(self, dir, OsStr::from_bytes(name)))?;
            found.map(|it| it.ino).ok_or(c::ENOENT)
        })
    }

    fn stat(&self, node: &u64) -> Answer<Facts> {
        answer(self.getattr(*node, None)).map(|it| facts(&it))
    }

    fn lookup(&self, dir: &u64, name: &[u8]) -> Answer<Facts> {
        let found = answer(Mounted::lookup(self, *dir, OsStr::from_bytes(name)))?;
        found.map(|it| facts(&it)).ok_or(c::ENOENT)
    }

    fn readlink(&self, node: &u64) -> Answer<Vec<u8>> {
        answer(Mounted::readlink(self, *node))
    }

    fn xattr(&self, node: &u64, key: &[u8]) -> Answer<Vec<u8>> {
        answer(self.getxattr(*node, OsStr::from_bytes(key)))
    }

    fn xattrs(&self, node: &u64) -> Answer<Vec<Vec<u8>>> {
        let names = answer(self.listxattr(*node))?;
        let names = names.split(|it| *it == 0).filter(|it| !it.is_empty());
        Ok(names.map(<[u8]>::to_vec).collect())
    }

    fn space(&self, node: &u64) -> Answer<u64> {
        answer(self.statfs(*node)).map(|it| it.total_bytes)
    }

    fn open(&self, node: &u64) -> Answer<(u64, u64)> {
        answer(Mounted::open(self, &WHO, *node, c::O_RDONLY)).map(|it| (*node, it.handle))
    }

    fn read(&self, file: &(u64, u64), offset: u64, len: usize) -> Answer<Vec<u8>> {
        let len = u32::try_from(len).unwrap();
        answer(Mounted::read(self, file.0, file.1, offset, len)).map(|it| it.to_vec())
    }

    fn seek(&self, file: &(u64, u64), offset: u64, data: bool) -> Answer<u64> {
        let whence = if data { c::SEEK_DATA } else { c::SEEK_HOLE };
        answer(self.lseek(file.0, file.1, offset.cast_signed(), whence))
    }

    fn close(&self, file: (u64, u64)) {
        self.release(file.0, file.1).unwrap();
    }

    fn opendir(&self, node: &u64) -> Answer<(u64, u64)> {
        answer(Mounted::opendir(self, *node)).map(|it| (*node, it.0))
    }

    fn list(&self, dir: &(u64, u64), offset: u64, count: usize) -> Answer<Vec<Listed>> {
        let mut listed = Vec::new();
        // As a kernel's buffer: what does not fit any more is refused, and asked for again.
        let mut add = |name: &OsStr, next: u64, stat: ItemStat| {
            if listed.len() == count {
                return true;
            }
            let (ino, facts) = match stat {
                ItemStat::Dot(ino) => (ino, None),
                ItemStat::Known(stat) => (stat.ino, Some(facts(&stat))),
                ItemStat::Ingest { ino, .. } => (ino, None),
            };
            listed.push(Listed { name: name.as_bytes().to_vec(), ino, next, facts });
            false
        };
        answer(self.readdir(dir.0, dir.1, offset, &mut add))?;
        Ok(listed)
    }

    fn closedir(&self, dir: (u64, u64)) {
        self.releasedir(dir.1);
        // Number 0 is of what needs nothing to be remembered.
        if dir.1 != 0 {
            let after = self.readdir(dir.0, dir.1, 0, &mut |_, _, _| true);
            assert_eq!(after, Err(Errno(c::EBADF)), "a closed directory holds memory");
        }
    }

    fn change(&self, node: &u64, _is_dir: bool, name: &[u8], how: Change) -> Answer<()> {
        let (node, name) = (*node, OsStr::from_bytes(name));
        let set = |change: SetAttr| self.setattr(&WHO, node, None, &change).map(drop);
        answer(match how {
            Change::Mode => set(SetAttr { mode: Some(0o644), ..SetAttr::default() }),
            Change::Owner => set(SetAttr { uid: Some(1), gid: Some(1), ..SetAttr::default() }),
            Change::Size => set(SetAttr { size: Some(1), ..SetAttr::default() }),
            Change::Times => {
                let now = Some(super::ingest::SetTime::Now);
                set(SetAttr { atime: now, mtime: now, ..SetAttr::default() })
            }
            Change::Write => {
                for flags in [c::O_RDWR, c::O_WRONLY | c::O_TRUNC] {
                    match Mounted::open(self, &WHO, node, flags).map(drop) {
                        Err(Errno(c::EROFS | c::EISDIR)) => {}
                        other => return answer(other),
                    }
                }
                self.write((&WHO, 0), node, 0, 0, b"x").map(drop)
            }
            Change::SetXattr => self.setxattr(node, OsStr::new("user.x"), b"x", 0),
            Change::RemoveXattr => self.removexattr(node, OsStr::new("user.x")),
            Change::Link => self.link(node, node, name).map(drop),
            Change::Create => {
                self.create(&CALLER, node, name, 0o644, c::O_RDWR | c::O_CREAT).map(drop)
            }
            Change::MakeDir => self.mkdir(&CALLER, node, name, 0o755).map(drop),
            Change::Pipe => self.mknod(&CALLER, node, name, c::S_IFIFO | 0o644, 0).map(drop),
            Change::Symlink => self.symlink(&CALLER, node, name, OsStr::new("target")).map(drop),
            Change::Remove => self.unlink(node, name),
            Change::RemoveDir => self.rmdir(node, name),
            Change::Rename => self.rename((node, name), (node, OsStr::new("renamed")), 0),
        })
    }
}

fn play(chunking: Chunking, compression: Compression) {
    let seed = program::seed();
    let direct = Direct::new(seed, chunking, compression);
    direct.reference.play(&direct.mounted, seed, 60);
}

#[test]
fn programs_find_the_tree_zstd() {
    play(Chunking::FastCdc { average: 4 << 10 }, Compression::Zstd(1));
}

#[test]
fn programs_find_the_tree_uncompressed() {
    play(Chunking::FastCdc { average: 64 << 10 }, Compression::None);
}

#[test]
fn programs_find_the_tree_fixed() {
    play(Chunking::Fixed { size: 4 << 10 }, Compression::Zstd(1));
}

/// Any number, and those that stand for something.
fn stray_ino() -> impl Strategy<Value = u64> {
    let marks = 58u32..64;
    let low = prop_oneof![0u64..20, any::<u64>()];
    prop_oneof![
        any::<u64>(),
        0u64..10,
        (marks, low.clone()).prop_map(|(bit, low)| 1 << bit | low),
        (0u64..5, 0u64..20).prop_map(|(run, dir)| 1 << 63 | run << 38 | dir),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 6,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]
    /// Numbers of nothing, handles of nothing, any offset: an error or a right answer, no panic,
    /// and what is in the snapshots is not changed.
    #[test]
    fn requests_that_no_kernel_makes_are_answered(
        asked in prop::collection::vec((stray_ino(), any::<u64>(), 0u64..4, any::<u32>()), 60),
        names in prop::collection::vec(prop::collection::vec(1u8.., 0..300), 60),
    ) {
        let direct = Direct::new(7, Chunking::Fixed { size: 64 << 10 }, Compression::None);
        let it = &direct.mounted;
        for ((ino, offset, handle, size), name) in asked.into_iter().zip(&names) {
            let name = OsStr::from_bytes(name);
            let is_snapshot = ino >> 62 != 0;
            let size = size >> (size % 32);
            let got = [
                it.lookup(ino, name).map(drop),
                it.getattr(ino, Some(handle)).map(drop),
                it.readlink(ino).map(drop),
                it.open(&WHO, ino, c::O_RDONLY).and_then(|opened| {
                    let read = it.read(ino, opened.handle, offset, size).map(drop);
                    it.release(ino, opened.handle)?;
                    read
                }),
                it.read(ino, handle, offset, size).map(drop),
                it.lseek(ino, handle, offset.cast_signed(), size.cast_signed()).map(drop),
                it.getxattr(ino, name).map(drop),
                it.listxattr(ino).map(drop),
                it.flags(ino).map(drop),
                it.statfs(ino).map(drop),
                it.flush((&WHO, 0), ino, handle),
                it.fsync(ino, handle, true).map(drop),
                it.readdir(ino, handle, offset, &mut |_, _, _| false),
                it.fsyncdir(handle),
                it.poll(ino, handle, None).map(drop),
                it.copy_file_range((ino, handle, offset), (ino, handle, 0), offset).map(drop),
            ];
            // Every error has a number that a caller can do something with.
            prop_assert!(got.iter().all(|it| !matches!(it, Err(Errno(n)) if *n <= 0)));
            // Nobody waits for what is answered later.
            let range = (offset, size as usize);
            it.read_control(&WHO, ino, handle, range, false, Box::new(drop));
            it.fsync_control(&WHO, ino, handle, Box::new(drop));
            if let Ok((handle, _)) = it.opendir(ino) {
                let list = |offset: u64| it.readdir(ino, handle, offset, &mut |_, _, _| false);
                // An offset that was never given out is nothing, or an error.
                let _ = (list(offset), list(0));
                it.releasedir(handle);
            }
            it.forget(ino, offset);
            for how in program::CHANGES {
                let got = Files::change(it, &ino, false, name.as_bytes(), how);
                prop_assert!(!is_snapshot || got == Err(c::EROFS), "{how:?} of {ino:x}: {got:?}");
            }
        }
        direct.reference.play(it, 7, 3);
    }
}
