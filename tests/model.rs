//! Random trees and random changes, each step backed up, against a plain model in memory.
//!
//! After every step every run so far is read again, through the library and through one mount that
//! was there from the beginning, and compared with what the model was then; some backups are killed
//! before. A failure is made as short as the time allows and told with its seed:
//! `RAIDTAPE_MODEL_SEED=N RAIDTAPE_MODEL_CASES=1` plays it again, `RAIDTAPE_MODEL_CASES=500` looks
//! for more.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use raidtape::catalog::{ChangeKind, DirId, EntryRow, Run, VersionId};
use raidtape::chunk::HashAlgo;
use raidtape::entry::Kind;
use raidtape::snapshot::{FileMap, Snapshots, resolve};
use serde_json::Value;

use crate::common::data::Seeded;
use crate::common::tree::Node;
use crate::common::world::{EXCLUDED, Links, Model, Op, Told, World, op};
use crate::common::{Mount, Sandbox, Tree, assert_same, need_root, number_from_env, path_of};

/// Cases of an ordinary run: each way of storing comes twice.
const CASES: u64 = 12;
/// Ways of storing, by the options of `init`.
const STORES: [&[&str]; 6] = [
    &["--block-size", "1MiB", "--chunk-size", "4KiB"],
    &["--block-size", "1MiB", "--chunk-size", "4KiB", "--chunking", "fixed"],
    &["--block-size", "1MiB", "--chunk-size", "4KiB", "--compression", "none"],
    &["--block-size", "1MiB", "--chunk-size", "64KiB", "--hash-algo", "sha256"],
    &["--block-size", "1MiB", "--chunk-size", "1MiB", "--chunking", "fixed"],
    &[],
];
/// Ways of running a backup.
const WAYS: [&[&str]; 5] = [
    &[],
    &["--single-threaded"],
    &["--max-workers", "1"],
    &["--max-workers", "5", "--max-write-workers", "1"],
    &["--force-read"],
];

/// What is done between two backups, and how the next one is made.
#[derive(Clone, Debug)]
struct Step {
    ops: Vec<(Op, u8)>,
    way: u8,
    /// Kills a backup before the one that counts, after so many tenths of a millisecond.
    kill: Option<u16>,
}

fn step(ops: std::ops::Range<usize>) -> impl Strategy<Value = Step> {
    let kill = prop::option::weighted(0.4, 0u16..300);
    (prop::collection::vec(op(), ops), any::<u8>(), kill).prop_map(|(ops, way, kill)| Step {
        ops,
        way,
        kill,
    })
}

/// A tree to begin with, and changes.
fn plan() -> impl Strategy<Value = Vec<Step>> {
    (step(20..120), prop::collection::vec(step(0..25), 2..8)).prop_map(|(first, rest)| {
        let mut steps = vec![first];
        steps.extend(rest);
        steps
    })
}

#[test]
fn every_run_stays_what_the_model_was() {
    need_root("owners, pipes and attributes of links are changed");
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let first = number_from_env("RAIDTAPE_MODEL_SEED", now.as_secs());
    let count = number_from_env("RAIDTAPE_MODEL_CASES", CASES);
    for case in 0..count {
        let seed = first + case;
        let start = Instant::now();
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        let config = Config {
            cases: 1,
            failure_persistence: None,
            max_shrink_iters: 300,
            max_shrink_time: 90_000,
            ..Config::default()
        };
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
        let mut runner = TestRunner::new_with_rng(config, rng);
        let store = STORES[(seed % STORES.len() as u64) as usize];
        let told = Cell::new(String::new());
        let result = runner.run(&plan(), |steps| {
            told.set(Play::new(store, seed).all(&steps));
            Ok(())
        });
        match result {
            Ok(()) => {}
            Err(TestError::Fail(why, steps)) => {
                panic!("RAIDTAPE_MODEL_SEED={seed} (init {store:?}): {why}\nwith {steps:?}")
            }
            Err(e) => panic!("RAIDTAPE_MODEL_SEED={seed}: {e}"),
        }
        if count > CASES {
            let seconds = start.elapsed().as_secs_f64();
            eprintln!("model: seed {seed}: {seconds:.1} s, {}", told.take());
        }
    }
}

/// One case as it is played.
struct Play {
    sandbox: Sandbox,
    mount: Mount,
    snapshots: Snapshots,
    world: World,
    /// What each run has to be, from the first on.
    runs: Vec<Model>,
    seeded: Seeded,
    /// Backups that did not come to their end.
    killed: u32,
}

impl Play {
    fn new(store: &[&str], seed: u64) -> Play {
        let sandbox = Sandbox::with(store);
        // Before there is any run: all of them have to turn up in it.
        let mount = sandbox.mount();
        Play {
            // Smaller than the data, so that it is read again and again.
            snapshots: Snapshots::open(&sandbox.catalog, 1 << 20).unwrap(),
            world: World::new(&sandbox.source),
            mount,
            sandbox,
            runs: Vec::new(),
            seeded: Seeded::new(seed),
            killed: 0,
        }
    }

    /// Plays all steps; gives a word about what there was.
    fn all(mut self, steps: &[Step]) -> String {
        for step in steps {
            for (op, when) in &step.ops {
                self.world.apply(op, *when);
            }
            self.world.settle();
            if let Some(tenths) = step.kill {
                self.kill_backup(Duration::from_micros(100) * u32::from(tenths));
            }
            self.back_up(WAYS[usize::from(step.way) % WAYS.len()]);
            self.compare_all();
        }
        self.sandbox.assert_valid();
        let last = self.runs.len();
        let other = 1 + self.seeded.below(last as u64) as usize;
        for run in [last, other] {
            let out = self.sandbox.revert(run as i64, &format!("out{run}-{}", self.seeded.next()));
            assert_same(&self.runs[run - 1].tree(Links::OfSnapshot), &plain(&out));
        }
        self.mount.end();
        let entries = self.runs[last - 1].tree(Links::OfSnapshot).0.len();
        let blocks = self.sandbox.blocks("volume").len();
        format!("{last} runs, {} killed, {entries} entries, {blocks} blocks", self.killed)
    }

    /// Starts a backup and kills it. It may have come to its end before.
    fn kill_backup(&mut self, wait: Duration) {
        let mut command = self.sandbox.program();
        command.arg("backup").arg(&self.sandbox.source).args(["--exclude", EXCLUDED]);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(wait);
        // Not waited for yet: if it has ended, this does nothing.
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert!(status.success() || status.signal() == Some(9), "{status}");
        let count = self.snapshots.runs().unwrap().len();
        match count - self.runs.len() {
            0 => {
                assert!(!status.success(), "a run that ended is not there");
                self.killed += 1;
            }
            1 => self.note_run(None),
            more => panic!("{more} runs from one backup"),
        }
        self.sandbox.assert_valid();
    }

    fn back_up(&mut self, way: &[&str]) {
        let mut options = vec!["--exclude", EXCLUDED];
        options.extend(way);
        let said = self.sandbox.backup_with(&options);
        self.note_run(Some(&said));
    }

    /// A run has ended: what it tells of the step has to be right.
    fn note_run(&mut self, said: Option<&Value>) {
        let model = self.world.model();
        let touched = self.world.take_touched();
        let number = self.runs.len() as i64 + 1;
        let run = self.snapshots.run(number).unwrap();
        if let Some(said) = said {
            assert_eq!((said["run"].as_i64(), &said["problems"]), (Some(number), &0.into()));
        }
        let expected = model.changes_since(self.runs.last(), &touched);
        let mut told: BTreeMap<Vec<u8>, (ChangeKind, bool)> = BTreeMap::new();
        let each = &mut |change: raidtape::catalog::Change| {
            let is_dir = change.entry.meta.kind == Kind::Dir;
            let old = told.insert(change.path.clone(), (change.kind, is_dir));
            assert!(old.is_none(), "run {number} tells of {:?} twice", change.path);
            Ok(())
        };
        self.snapshots.with_reader(|reader| reader.changes(&run, each)).unwrap();
        for (path, (kind, _)) in &told {
            let fits = matches!(
                (kind, expected.get(path)),
                (ChangeKind::Added, Some(Told::Added))
                    | (ChangeKind::Deleted, Some(Told::Deleted))
                    | (ChangeKind::Modified, Some(Told::Modified | Told::MaybeModified))
            );
            assert!(
                fits,
                "run {number} says {kind:?} of {}, not {:?}; before {:?}, now {:?}",
                shown(path),
                expected.get(path),
                self.row(number - 1, path),
                self.row(number, path)
            );
        }
        for (path, how) in &expected {
            let is_told = told.contains_key(path) || *how == Told::MaybeModified;
            assert!(is_told, "run {number} does not say {how:?} of {}", shown(path));
        }
        self.check_counts(&run, &model, &told);
        self.runs.push(model);
    }

    /// What the catalog has of a path at a run.
    fn row(&self, run: i64, path: &[u8]) -> Option<EntryRow> {
        resolve(&self.snapshots, path, Some(run)).ok().map(|it| it.entry)
    }

    fn check_counts(&self, run: &Run, model: &Model, told: &BTreeMap<Vec<u8>, (ChangeKind, bool)>) {
        let counts = &run.counts;
        let tree = model.tree(Links::OfSource);
        for (tally, dirs) in [(&counts.entries, false), (&counts.dirs, true)] {
            let of = |kind| told.values().filter(|it| **it == (kind, dirs)).count() as u64;
            let there = tree.0.values().filter(|it| (it.kind == "dir") == dirs).count() as u64;
            let (added, modified) = (of(ChangeKind::Added), of(ChangeKind::Modified));
            assert_eq!((tally.added, tally.modified), (added, modified), "run {}", run.id);
            assert_eq!(tally.deleted, of(ChangeKind::Deleted), "run {}", run.id);
            assert_eq!(tally.unchanged, there - added - modified, "run {}", run.id);
        }
        assert_eq!((counts.files, counts.bytes), model.files(), "run {}", run.id);
    }

    /// Reads all runs again.
    fn compare_all(&mut self) {
        let hash = self.snapshots.settings().unwrap().hash;
        let runs = self.snapshots.runs().unwrap();
        assert_eq!(runs.len(), self.runs.len());
        for (run, model) in runs.iter().zip(&self.runs) {
            let expected = model.tree(Links::OfSource);
            assert_same(&expected, &plain(&self.mount.run(run.id)));
            let seeded = &mut self.seeded;
            let mut walk = Walk {
                snapshots: &self.snapshots,
                run,
                model,
                hash,
                seeded,
                nodes: BTreeMap::new(),
                links: BTreeMap::new(),
            };
            walk.start();
            assert_same(&expected, &walk.finish());
        }
    }
}

/// A run as the library gives it, put together to a tree.
struct Walk<'a> {
    snapshots: &'a Snapshots,
    run: &'a Run,
    model: &'a Model,
    hash: HashAlgo,
    seeded: &'a mut Seeded,
    nodes: BTreeMap<Vec<u8>, Node>,
    links: BTreeMap<VersionId, Vec<Vec<u8>>>,
}

impl Walk<'_> {
    fn start(&mut self) {
        let root = self.snapshots.root(self.run).unwrap();
        self.add(Vec::new(), &root);
        self.dir(root.child.unwrap(), b"");
    }

    fn finish(mut self) -> Tree {
        for paths in self.links.into_values() {
            let first = paths.iter().min().unwrap().clone();
            for path in paths {
                self.nodes.get_mut(&path).unwrap().first_name = Some(first.clone());
            }
        }
        Tree(self.nodes)
    }

    fn dir(&mut self, dir: DirId, path: &[u8]) {
        let mut after: Option<Vec<u8>> = None;
        loop {
            let limit = 1 + self.seeded.below(6) as usize;
            let rows = self.snapshots.list(self.run.id, dir, after.as_deref(), limit).unwrap();
            let Some(last) = rows.last() else { break };
            after = Some(last.name.clone());
            for row in rows {
                let found = self.snapshots.lookup(self.run.id, dir, &row.name).unwrap();
                assert_eq!(found.as_ref(), Some(&row));
                let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
                let below = [path, slash, &row.name].concat();
                self.add(below.clone(), &row);
                if let Some(child) = row.child {
                    self.dir(child, &below);
                }
            }
        }
        let none = self.snapshots.lookup(self.run.id, dir, b"no such name").unwrap();
        assert!(none.is_none());
    }

    fn add(&mut self, path: Vec<u8>, row: &EntryRow) {
        let meta = &row.meta;
        let map = self.snapshots.file(row.version).unwrap();
        let (kind, content) = match meta.kind {
            Kind::File => ("file", self.content(&path, &map)),
            Kind::Dir => ("dir", Vec::new()),
            Kind::Symlink => ("symlink", map.content.extra.target.clone().unwrap()),
            Kind::Fifo => ("fifo", Vec::new()),
            other => panic!("{other:?} is in no model"),
        };
        let links = if meta.kind == Kind::Dir { 1 } else { meta.nlink };
        if links > 1 {
            self.links.entry(row.version).or_default().push(path.clone());
        }
        let node = Node {
            kind,
            mode: meta.mode,
            owner: (meta.uid, meta.gid),
            mtime: (meta.mtime.secs, meta.mtime.nanos.into()),
            size: meta.size,
            rdev: meta.rdev,
            links,
            first_name: None,
            content,
            data: Vec::new(),
            xattrs: map.content.extra.xattrs.iter().cloned().collect(),
            flags: map.content.extra.flags,
        };
        assert!(self.nodes.insert(path, node).is_none());
    }

    /// The hash of a file that was read from its beginning to its end, after a few looks at any
    /// other place.
    fn content(&mut self, path: &[u8], map: &FileMap) -> Vec<u8> {
        let expected = self.model.bytes(path);
        for _ in 0..3 {
            let offset = self.seeded.below(expected.len() as u64 + 10);
            let len = self.seeded.below(100_000) as usize;
            let mut buffer = vec![0xaa; len];
            let got = self.snapshots.read(map, offset, &mut buffer).unwrap();
            let from = expected.len().min(offset as usize);
            let wanted = &expected[from..expected.len().min(from + len)];
            assert!(buffer[..got] == *wanted, "{} at {offset}, {len} bytes", shown(path));
        }
        let mut all = vec![0xaa; expected.len() + 1];
        let got = self.snapshots.read(map, 0, &mut all).unwrap();
        all.truncate(got);
        if !map.has_holes() {
            assert_eq!(map.content.hash, Some(self.hash.hash(&all)), "{}", shown(path));
        }
        for (start, end) in map.segments() {
            assert!(start < end && end <= map.size());
        }
        blake3::hash(&all).as_bytes().to_vec()
    }
}

/// A tree whose holes are zeros, as they are in the model.
pub fn plain(root: &Path) -> Tree {
    let mut tree = Tree::of(root);
    for (path, node) in &mut tree.0 {
        let data = std::mem::take(&mut node.data);
        if node.kind == "file" && data != [(0, node.size)] {
            let bytes = std::fs::read(root.join(path_of(path))).unwrap();
            node.content = blake3::hash(&bytes).as_bytes().to_vec();
        }
    }
    tree
}

fn shown(path: &[u8]) -> String {
    raidtape::error::Quoted(path).to_string()
}
