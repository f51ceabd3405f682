//! Random programs against the snapshots of a mount, judged step by step by a reference tree.
//!
//! A program asks what a reader may ask, in any order and also wrongly; [`Machine`] plays it on a
//! [`Files`], which is either the operations themselves (unit tests of the room `fs`) or system
//! calls on a real mount. `RAIDTAPE_MODEL_PROGRAMS=1000` plays more of them.
//!
//! Invariant: what is expected comes from the model that made the source, or from an earlier answer
//! that must not change; never from the side under test alone.

mod machine;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::rc::Rc;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use super::path_of;
use super::tree::Tree;
use super::world::{Links, Op, World, op};
use machine::Machine;

/// An answer, or an error number.
pub type Answer<T> = Result<T, i32>;

/// What is known of an entry by asking for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    pub ino: u64,
    pub kind: &'static str,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, u64),
    pub atime: (i64, u64),
    pub size: u64,
    pub links: u64,
    pub rdev: u64,
    pub blocks: u64,
}

/// A name in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub name: Vec<u8>,
    pub ino: u64,
    /// Where the listing goes on after it.
    pub next: u64,
    /// All about it, where the listing tells that.
    pub facts: Option<Facts>,
}

/// Something that shows snapshots.
pub trait Files {
    /// An entry.
    type Node: Clone;
    /// An open file.
    type File;
    /// An open directory.
    type Dir;
    /// Whether a kernel is in between, which answers some things by itself.
    const KERNEL: bool;

    /// The entry at a path of a run.
    fn node(&self, run: usize, path: &[u8]) -> Answer<Self::Node>;
    fn stat(&self, node: &Self::Node) -> Answer<Facts>;
    fn lookup(&self, dir: &Self::Node, name: &[u8]) -> Answer<Facts>;
    fn readlink(&self, node: &Self::Node) -> Answer<Vec<u8>>;
    fn xattr(&self, node: &Self::Node, key: &[u8]) -> Answer<Vec<u8>>;
    fn xattrs(&self, node: &Self::Node) -> Answer<Vec<Vec<u8>>>;
    fn space(&self, node: &Self::Node) -> Answer<u64>;
    fn open(&self, node: &Self::Node) -> Answer<Self::File>;
    fn read(&self, file: &Self::File, offset: u64, len: usize) -> Answer<Vec<u8>>;
    /// Data from `offset` on, or a hole.
    fn seek(&self, file: &Self::File, offset: u64, data: bool) -> Answer<u64>;
    fn close(&self, file: Self::File);
    fn opendir(&self, node: &Self::Node) -> Answer<Self::Dir>;
    /// At most `count` names from `offset` on; none at the end.
    fn list(&self, dir: &Self::Dir, offset: u64, count: usize) -> Answer<Vec<Listed>>;
    fn closedir(&self, dir: Self::Dir);
    /// Tries to change something in one of [`CHANGES`] ways.
    fn change(&self, node: &Self::Node, is_dir: bool, name: &[u8], how: Change) -> Answer<()>;
}

/// Ways of changing something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Mode,
    Owner,
    Size,
    Times,
    Write,
    SetXattr,
    RemoveXattr,
    Link,
    /// In a directory, from here on.
    Create,
    MakeDir,
    Pipe,
    Symlink,
    Remove,
    RemoveDir,
    Rename,
}

/// All of them.
pub const CHANGES: [Change; 15] = [
    Change::Mode,
    Change::Owner,
    Change::Size,
    Change::Times,
    Change::Write,
    Change::SetXattr,
    Change::RemoveXattr,
    Change::Link,
    Change::Create,
    Change::MakeDir,
    Change::Pipe,
    Change::Symlink,
    Change::Remove,
    Change::RemoveDir,
    Change::Rename,
];

/// A name to look up.
#[derive(Clone, Debug)]
pub enum Name {
    /// One that is there.
    Child(u16),
    /// One that is there, and a byte.
    Longer(u16),
    /// One that is there, without its last byte.
    Shorter(u16),
    Empty,
    Dot,
    DotDot,
    /// As many bytes of one letter.
    Long(u8, usize),
    Any(Vec<u8>),
}

/// One step of a program. Numbers choose among what there is.
#[derive(Clone, Debug)]
pub enum Step {
    Stat { entry: u16 },
    Lookup { dir: u16, name: Name },
    ReadLink { entry: u16 },
    Xattr { entry: u16, key: u16 },
    Xattrs { entry: u16 },
    Space { entry: u16 },
    Open { entry: u16 },
    Read { file: u16, at: u16, off: i16, len: u32 },
    Seek { file: u16, at: u16, off: i16, data: bool },
    Close { file: u16 },
    OpenDir { entry: u16 },
    List { dir: u16, from: u16, count: usize },
    CloseDir { dir: u16 },
    Change { entry: u16, name: Name, how: u16 },
}

fn name() -> impl Strategy<Value = Name> {
    prop_oneof![
        6 => any::<u16>().prop_map(Name::Child),
        1 => any::<u16>().prop_map(Name::Longer),
        1 => any::<u16>().prop_map(Name::Shorter),
        1 => Just(Name::Empty),
        1 => Just(Name::Dot),
        1 => Just(Name::DotDot),
        2 => (any::<u8>(), 254usize..=256).prop_map(|(byte, len)| Name::Long(byte, len)),
        1 => Just(Name::Long(b'n', 5_000)),
        2 => prop::collection::vec(any::<u8>(), 0..20).prop_map(Name::Any),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let n = any::<u16>;
    let len = prop_oneof![
        1 => Just(0u32),
        3 => 1u32..100,
        3 => prop::sample::select(vec![4_095u32, 4_096, 4_097, 65_536, 131_072]),
        3 => 100u32..300_000,
        1 => Just(2 << 20),
    ];
    // Near the beginning or the end of something, or anywhere.
    let off = prop_oneof![4 => -3i16..=3, 1 => any::<i16>()];
    let count = prop_oneof![3 => Just(1usize), 3 => 2usize..5, 1 => Just(1_000usize)];
    prop_oneof![
        6 => n().prop_map(|entry| Step::Stat { entry }),
        6 => (n(), name()).prop_map(|(dir, name)| Step::Lookup { dir, name }),
        2 => n().prop_map(|entry| Step::ReadLink { entry }),
        3 => (n(), n()).prop_map(|(entry, key)| Step::Xattr { entry, key }),
        2 => n().prop_map(|entry| Step::Xattrs { entry }),
        1 => n().prop_map(|entry| Step::Space { entry }),
        8 => n().prop_map(|entry| Step::Open { entry }),
        12 => (n(), n(), off.clone(), len)
            .prop_map(|(file, at, off, len)| Step::Read { file, at, off, len }),
        5 => (n(), n(), off, any::<bool>())
            .prop_map(|(file, at, off, data)| Step::Seek { file, at, off, data }),
        3 => n().prop_map(|file| Step::Close { file }),
        5 => n().prop_map(|entry| Step::OpenDir { entry }),
        12 => (n(), n(), count).prop_map(|(dir, from, count)| Step::List { dir, from, count }),
        2 => n().prop_map(|dir| Step::CloseDir { dir }),
        6 => (n(), name(), n()).prop_map(|(entry, name, how)| Step::Change { entry, name, how }),
    ]
}

/// A whole program.
pub fn program() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..90)
}

/// A run as it has to be.
pub struct Run {
    tree: Tree,
    bytes: BTreeMap<Vec<u8>, Rc<Vec<u8>>>,
    /// Who each entry was in the source: its inode number, and when that last changed.
    ids: BTreeMap<Vec<u8>, (u64, i64, i64)>,
    /// Names in each directory.
    children: BTreeMap<Vec<u8>, Vec<Vec<u8>>>,
}

/// All runs as they have to be, the first one first.
pub struct Reference {
    runs: Vec<Run>,
    entries: Vec<(usize, Vec<u8>)>,
}

impl Reference {
    /// Makes random trees in `source`, one after another, and calls `back_up` for each.
    pub fn make(source: &Path, seed: u64, runs: usize, mut back_up: impl FnMut()) -> Reference {
        let mut runner = TestRunner::new_with_rng(Config::default(), rng(seed));
        let mut world = World::new(source);
        let mut reference = Reference { runs: Vec::new(), entries: Vec::new() };
        for number in 0..runs {
            let len = if number == 0 { 60..120 } else { 3..25 };
            let ops = prop::collection::vec(op(), len).new_tree(&mut runner).unwrap().current();
            let ops: Vec<(Op, u8)> = ops;
            for (op, when) in &ops {
                world.apply(op, *when);
            }
            world.settle();
            back_up();
            let model = world.model();
            let tree = model.tree(Links::OfSource);
            let mut run = Run {
                bytes: BTreeMap::new(),
                ids: BTreeMap::new(),
                children: BTreeMap::new(),
                tree,
            };
            for (path, node) in &run.tree.0 {
                let stat = fs::symlink_metadata(source.join(path_of(path))).unwrap();
                run.ids.insert(path.clone(), (stat.ino(), stat.ctime(), stat.ctime_nsec()));
                if node.kind == "file" {
                    run.bytes.insert(path.clone(), Rc::new(model.bytes(path).to_vec()));
                }
                if node.kind == "dir" {
                    run.children.entry(path.clone()).or_default();
                }
                if let Some((dir, name)) = split(path) {
                    run.children.entry(dir.to_vec()).or_default().push(name.to_vec());
                }
                reference.entries.push((number, path.clone()));
            }
            reference.runs.push(run);
        }
        reference
    }

    /// Plays random programs on `files`. A failure is told with its seed and made short.
    pub fn play(&self, files: &impl Files, seed: u64, programs: u32) {
        let more = std::env::var("RAIDTAPE_MODEL_PROGRAMS").ok();
        let config = Config {
            cases: more.map_or(programs, |it| it.parse().unwrap()),
            failure_persistence: None,
            max_shrink_iters: 300,
            max_shrink_time: 30_000,
            ..Config::default()
        };
        let mut runner = TestRunner::new_with_rng(config, rng(seed));
        let result = runner.run(&program(), |steps| {
            let mut machine = Machine::new(self, files);
            let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                steps.iter().for_each(|step| machine.step(step));
            }));
            machine.end();
            played.unwrap_or_else(|e| std::panic::resume_unwind(e));
            Ok(())
        });
        match result {
            Ok(()) => {}
            Err(TestError::Fail(why, steps)) => {
                panic!("RAIDTAPE_MODEL_SEED={seed}: {why}\nwith {steps:#?}")
            }
            Err(e) => panic!("RAIDTAPE_MODEL_SEED={seed}: {e}"),
        }
    }
}

/// The seed to play with: that of the environment, or another one each time.
pub fn seed() -> u64 {
    match std::env::var("RAIDTAPE_MODEL_SEED") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.unwrap().as_nanos() as u64
        }
    }
}

/// What a seed stands for.
pub fn rng(seed: u64) -> TestRng {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    TestRng::from_seed(RngAlgorithm::ChaCha, &bytes)
}

/// Directory and name of a path that is not the root's.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    match path.iter().rposition(|it| *it == b'/') {
        Some(at) => Some((&path[..at], &path[at + 1..])),
        None => (!path.is_empty()).then_some((&path[..0], path)),
    }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_vec() } else { [dir, b"/", name].concat() }
}

fn shown(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}
