//! Several copies of each block: made by runs and later, on volumes that fill up, go and come back.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use raidtape::chunk::frame::{Compression, Encoder};
use raidtape::chunk::{ChunkRef, HashAlgo};
use raidtape::error::{Error, ErrorKind, Result};
use raidtape::sys::Space;
use raidtape::volume::store::{BlockStore, DirStore, PendingBlock};
use raidtape::volume::{Batch, BlockId, Facts, Status, Volume, VolumeConfig, Volumes, Writer};
use serde_json::Value;

use crate::common::disk::Disk;
use crate::common::{Sandbox, Tree, args, assert_same, data};
use crate::rebuild::on;

/// Names of all blocks of a volume.
fn names(sandbox: &Sandbox, volume: &str) -> Vec<String> {
    let name = |it: &(PathBuf, u64)| it.0.file_name().unwrap().to_str().unwrap().to_owned();
    sandbox.blocks(volume).iter().map(name).collect()
}

/// A catalog with these volumes and options, and a tree of some files.
fn store(options: &[&str], volumes: &[&str]) -> Sandbox {
    let sandbox = Sandbox::bare();
    let mut line = vec!["--block-size", "1MiB"];
    line.extend(options);
    sandbox.init(&line);
    volumes.iter().for_each(|it| drop(sandbox.add_volume(it)));
    data::mixed_tree(&sandbox.source, 300, 60);
    data::noise_file(&sandbox.source.join("large"), 301, 9 << 20);
    sandbox
}

/// All runs come back, byte by byte, and everything validates.
fn assert_whole(sandbox: &Sandbox, trees: &[Tree], name: &str) {
    sandbox.assert_valid();
    assert_readable(sandbox, trees, name);
}

fn assert_readable(sandbox: &Sandbox, trees: &[Tree], name: &str) {
    for (run, tree) in (1..).zip(trees) {
        let out = sandbox.revert(run, &format!("{name}{run}"));
        assert_same(tree, &Tree::of(&out));
        fs::remove_dir_all(out).unwrap();
    }
}

/// What `coverage` says of the loss of a volume.
fn survives(sandbox: &Sandbox, volume: &str) -> Value {
    let said = sandbox.ok(["coverage", "--json"]).json();
    let path = sandbox.path(volume);
    let losses = said["losses"].as_array().unwrap().iter();
    let of = |it: &&Value| {
        let volumes = it["volumes"].as_array().unwrap();
        volumes.len() == 1 && volumes[0]["path"] == path.to_str().unwrap()
    };
    losses.clone().find(of).unwrap_or_else(|| panic!("{said}")).clone()
}

fn take_away(sandbox: &Sandbox, volume: &str) -> PathBuf {
    let away = sandbox.path(&format!("{volume}.away"));
    fs::rename(sandbox.path(volume), &away).unwrap();
    away
}

fn put_back(sandbox: &Sandbox, volume: &str) {
    fs::rename(sandbox.path(&format!("{volume}.away")), sandbox.path(volume)).unwrap();
}

#[test]
fn each_block_is_on_as_many_volumes_as_wanted() {
    for copies in ["2", "3"] {
        let sandbox = store(&["--copies", copies], &["a", "b", "c"]);
        let said = sandbox.backup();
        assert_eq!(said["copies"]["wanted"].to_string(), copies);
        assert_eq!(said["copies"]["blocks_lacking"], 0, "{said}");
        // Directories of one file system, and that is said.
        assert_eq!(said["copies"]["together"][0].as_array().unwrap().len(), 3);
        let tree = Tree::of(&sandbox.source);
        let count = names(&sandbox, "a").len();
        assert!(count > 5);
        assert_eq!(names(&sandbox, "b"), names(&sandbox, "a"));
        assert_eq!(names(&sandbox, "c").len(), if copies == "3" { count } else { 0 });
        for volume in ["a", "b"] {
            let metas = fs::read_dir(sandbox.path(volume).join("meta")).unwrap();
            let is_meta = |it: &fs::DirEntry| it.path().extension().is_some_and(|it| it == "zst");
            let metas = metas.map(|it| it.unwrap()).filter(is_meta).count();
            assert_eq!(metas, count, "metas on {volume}");
        }
        assert_whole(&sandbox, std::slice::from_ref(&tree), "all");
        // Any one may go, and all is read from another.
        for volume in ["a", "b"] {
            assert_eq!(survives(&sandbox, volume)["survives"], true);
            take_away(&sandbox, volume);
            assert_readable(&sandbox, std::slice::from_ref(&tree), "less");
            put_back(&sandbox, volume);
        }
        let said = sandbox.ok(["replicate"]).text();
        assert!(said.starts_with(&format!("every block is on {copies} volumes\n")), "{said}");
    }
}

#[test]
fn one_volume_is_not_two() {
    let sandbox = store(&["--copies", "2"], &["a"]);
    let ran = sandbox.run(args!["backup", &sandbox.source]).code(3);
    assert!(ran.text().contains("fewer than 2 volumes"), "{}", ran.text());
    assert!(ran.errors().contains("run raidtape replicate"), "{}", ran.errors());
    let trees = [Tree::of(&sandbox.source)];
    let lost = survives(&sandbox, "a");
    assert_eq!(lost["survives"], false);
    let files = trees[0].0.values().filter(|it| it.kind == "file" && !it.content.is_empty());
    assert!(lost["files"].as_u64().unwrap() >= files.count() as u64 / 2, "{lost}");
    assert_eq!(lost["runs"], 1);
    sandbox.run(["replicate"]).code(6);
    sandbox.add_volume("b");
    let said = sandbox.ok(["replicate", "--json"]).json();
    assert_eq!(said["copies"].as_u64().unwrap(), names(&sandbox, "a").len() as u64);
    assert_eq!(said["blocks_lacking"], 0);
    assert_eq!(names(&sandbox, "b"), names(&sandbox, "a"));
    // With all that a volume has beside its blocks.
    for dir in ["meta", "manifests"] {
        let count = |it: &str| fs::read_dir(sandbox.path(it).join(dir)).unwrap().count();
        assert_eq!(count("b"), count("a"), "{dir}");
    }
    assert_whole(&sandbox, &trees, "both");
    take_away(&sandbox, "a");
    assert_readable(&sandbox, &trees, "b only");
    assert_eq!(survives(&sandbox, "b")["survives"], false);
}

#[test]
fn old_blocks_get_their_copies_later() {
    let sandbox = store(&[], &["a", "b"]);
    sandbox.backup();
    assert!(names(&sandbox, "b").is_empty());
    let said = sandbox.ok(["set-copies", "2"]).text();
    assert!(said.contains("raidtape replicate"), "{said}");
    data::noise_file(&sandbox.source.join("more"), 302, 3 << 20);
    let mut trees = vec![Tree::of(&sandbox.source)];
    sandbox.backup();
    let before = names(&sandbox, "b");
    assert!(!before.is_empty() && before.len() < names(&sandbox, "a").len());
    sandbox.ok(["replicate"]);
    assert_eq!(names(&sandbox, "b"), names(&sandbox, "a"));
    trees.insert(0, Tree::of(&sandbox.revert(1, "first")));
    assert_whole(&sandbox, &trees, "both");
    // Down again: nothing is taken away, and nothing more is made.
    sandbox.ok(["set-copies", "1"]);
    sandbox.ok(["replicate"]);
    sandbox.run(["set-copies", "0"]).code(2);
    sandbox.run(["set-copies", "17"]).code(2);
    assert_eq!(names(&sandbox, "b"), names(&sandbox, "a"));
    sandbox.assert_valid();
}

#[test]
fn a_full_second_disk_costs_copies_and_no_data() {
    let sandbox = Sandbox::bare();
    let _disks = [Disk::ext4(&sandbox, "d1", 96), Disk::ext4(&sandbox, "d2", 24)];
    sandbox.init(&["--block-size", "2MiB", "--compression", "none", "--copies", "2"]);
    for volume in ["d1/v", "d2/v"] {
        sandbox.add_volume(volume);
    }
    for n in 0..12 {
        data::noise_file(&sandbox.source.join(n.to_string()), 310 + n, 3 << 20);
    }
    let ran = sandbox.run(args!["backup", &sandbox.source, "--json"]).code(3);
    let said = ran.json();
    assert!(said["copies"]["blocks_lacking"].as_u64().unwrap() > 3, "{said}");
    assert_eq!(said["copies"]["together"], serde_json::json!([]));
    assert_eq!(said["problem_list"][0]["kind"], "no-space");
    let trees = [Tree::of(&sandbox.source)];
    let all = names(&sandbox, "d1/v").len();
    let some = names(&sandbox, "d2/v").len();
    assert!(some > 3 && some < all - 3, "{some} of {all}");
    let volumes = sandbox.ok(["volumes", "--json"]).json();
    assert_eq!([&volumes[0]["status"], &volumes[1]["status"]], ["active", "sealed"]);
    assert_whole(&sandbox, &trees, "lacking");
    sandbox.run(["replicate"]).code(6);
    let _third = Disk::ext4(&sandbox, "d3", 96);
    sandbox.add_volume("d3/v");
    sandbox.ok(["replicate"]);
    assert_eq!(names(&sandbox, "d3/v").len() + names(&sandbox, "d2/v").len(), all);
    assert_whole(&sandbox, &trees, "later");
    for volume in ["d1/v", "d2/v", "d3/v"] {
        assert_eq!(survives(&sandbox, volume)["survives"], true, "{volume}");
    }
}

#[test]
fn another_disk_is_better_than_the_same() {
    let sandbox = Sandbox::bare();
    let _disk = Disk::ext4(&sandbox, "d1", 64);
    sandbox.init(&["--copies", "2"]);
    for volume in ["a", "b", "d1/v"] {
        sandbox.add_volume(volume);
    }
    data::mixed_tree(&sandbox.source, 303, 20);
    let said = sandbox.backup();
    assert_eq!(names(&sandbox, "d1/v"), names(&sandbox, "a"));
    assert!(names(&sandbox, "b").is_empty());
    assert_eq!(said["copies"]["together"].as_array().unwrap().len(), 1);
}

#[test]
fn a_volume_that_is_away_is_marked_and_found_again_elsewhere() {
    let sandbox = store(&[], &["a", "b"]);
    sandbox.backup();
    let trees = [Tree::of(&sandbox.source)];
    let away = take_away(&sandbox, "a");
    let status = |n: usize| {
        let said = sandbox.ok(["volumes", "--json"]).json();
        said[n]["status"].as_str().unwrap().to_owned()
    };
    assert_eq!(status(0), "missing");
    let out = sandbox.path("out");
    let ran = sandbox.run(args!["revert-to-run", "1", &out]).code(4);
    let errors = ran.errors();
    assert!(errors.contains(sandbox.path("a").to_str().unwrap()), "{errors}");
    assert!(errors.contains("volumes --readopt"), "{errors}");
    // Back at its place, it is what it says of itself.
    put_back(&sandbox, "a");
    assert_eq!(status(0), "active");
    let away = {
        fs::rename(sandbox.path("a"), &away).unwrap();
        away
    };
    assert_eq!(status(0), "missing");
    fs::write(sandbox.source.join("more"), "more").unwrap();
    sandbox.backup();
    let said = sandbox.ok(args!["volumes", "--readopt", &away]).text();
    assert!(said.contains("is at"), "{said}");
    assert_eq!(status(0), "active");
    assert_whole(&sandbox, &trees, "found");
    // Nobody's volume, a stranger's, and one of which there are two.
    sandbox.run(args!["volumes", "--readopt", &sandbox.source]).code(4);
    let other = store(&[], &["x"]);
    sandbox.run(args!["volumes", "--readopt", &other.path("x")]).code(1);
    let copy = sandbox.path("copy");
    crate::common::tool("cp", args!["-a", &away, &copy]);
    let ran = sandbox.run(args!["volumes", "--readopt", &copy]).code(2);
    assert!(ran.errors().contains("one of the two is a copy"), "{}", ran.errors());
}

#[test]
fn blocks_that_the_catalog_lost_are_taken_up_from_the_index() {
    let sandbox = store(&[], &["a"]);
    sandbox.backup();
    let old = fs::read(&sandbox.catalog).unwrap();
    data::noise_file(&sandbox.source.join("more"), 304, 3 << 20);
    // Nothing on the volume says that this run was finished: the catalog counts.
    sandbox.backup_with(&["--no-meta", "--no-catalog-copy"]);
    let all = names(&sandbox, "a").len() as u64;
    fs::write(&sandbox.catalog, old).unwrap();
    let said = sandbox.ok(args!["volumes", "--readopt", &sandbox.path("a"), "--json"]).json();
    assert_eq!(said["lost"], 0);
    let volumes = sandbox.ok(["volumes", "--json"]).json();
    assert_eq!(volumes[0]["blocks"].as_u64().unwrap(), all);
    let said = sandbox.backup();
    assert_eq!(said["bytes_stored"], 0);
    sandbox.assert_valid();
}

#[test]
fn a_volume_is_emptied_before_it_is_retired() {
    let sandbox = store(&[], &["a", "b"]);
    sandbox.backup();
    let trees = [Tree::of(&sandbox.source)];
    let blocks = names(&sandbox, "a");
    let said = sandbox.ok(args!["volumes", "--retire", &sandbox.path("a"), "--json"]).json();
    assert_eq!(said["blocks"].as_u64().unwrap(), blocks.len() as u64);
    assert_eq!(said["copies"], said["blocks"]);
    assert_eq!(names(&sandbox, "b"), blocks);
    // What was on it stays, and it says what became of it.
    assert_eq!(names(&sandbox, "a"), blocks);
    let manifest = fs::read_to_string(sandbox.path("a/.rt_volume_manifest")).unwrap();
    assert!(manifest.contains("status=sealed") && manifest.contains("retired=20"), "{manifest}");
    assert_eq!(sandbox.ok(["volumes", "--json"]).json().as_array().unwrap().len(), 1);
    fs::rename(sandbox.path("a"), sandbox.path("a.gone")).unwrap();
    assert_whole(&sandbox, &trees, "b");
    let ran = sandbox.run(args!["volumes", "--readopt", &sandbox.path("a.gone")]).code(1);
    assert!(ran.errors().contains("was retired on"), "{}", ran.errors());
    // The last one stays.
    sandbox.run(args!["volumes", "--retire", &sandbox.path("b")]).code(6);
    sandbox.run(args!["volumes", "--retire", &sandbox.path("nothing")]).code(1);
    sandbox.backup();
}

/// Manifests of runs name volumes by number, also those that are gone.
#[test]
fn the_number_of_a_retired_volume_is_not_given_again() {
    let sandbox = store(&[], &["a", "b"]);
    sandbox.backup();
    let number = |it: &Sandbox, path: &str| {
        let manifest = fs::read_to_string(it.path(path).join(".rt_volume_manifest")).unwrap();
        let line = manifest.lines().find_map(|it| it.strip_prefix("number="));
        line.unwrap().parse::<u64>().unwrap()
    };
    sandbox.ok(args!["volumes", "--retire", &sandbox.path("b")]);
    // Nor by a catalog that knows no more than what is left.
    let again = sandbox.path("again");
    // The one that is gone is missed still: the newest run was before it went.
    on(&again, args!["rebuildmeta", "--volumes", &sandbox.path("a")]).code(3);
    on(&again, args!["add-volume", &sandbox.path("d")]).code(0);
    assert_eq!(number(&sandbox, "d"), 3);
    sandbox.add_volume("c");
    assert_eq!(number(&sandbox, "c"), 3);
    sandbox.ok(args!["volumes", "--retire", &sandbox.path("a")]);
    sandbox.add_volume("e");
    assert_eq!(number(&sandbox, "e"), 4);
    sandbox.backup();
    sandbox.assert_valid();
}

#[test]
fn what_cannot_be_elsewhere_is_not_retired() {
    let sandbox = store(&["--copies", "2"], &["a", "b"]);
    sandbox.backup();
    let trees = [Tree::of(&sandbox.source)];
    let retire = |volume: &str, code: i32| {
        let ran = sandbox.run(args!["volumes", "--retire", &sandbox.path(volume)]).code(code);
        assert_eq!(sandbox.ok(["volumes", "--json"]).json().as_array().unwrap().len(), 2);
        ran.errors()
    };
    assert!(retire("a", 6).contains("1 of 2 copies"));
    // Not even with one copy, if the one that would stay is damaged.
    sandbox.ok(["set-copies", "1"]);
    let (block, _) = sandbox.blocks("b")[2].clone();
    crate::damage::flip(&block, 7);
    assert!(retire("a", 5).contains("validate --repair"));
    crate::damage::flip(&block, 7);
    // A disk that died: what it had is elsewhere.
    fs::rename(sandbox.path("a"), sandbox.path("a.dead")).unwrap();
    sandbox.ok(args!["volumes", "--retire", &sandbox.path("a")]);
    assert_whole(&sandbox, &trees, "b");
    // One that had the only copy of something, and is away.
    sandbox.add_volume("c");
    fs::rename(sandbox.path("b"), sandbox.path("b.away")).unwrap();
    retire("b", 4);
}

#[test]
fn a_small_disk_does_not_take_what_a_large_one_has() {
    let sandbox = Sandbox::bare();
    let _disk = Disk::ext4(&sandbox, "d1", 16);
    sandbox.init(&["--block-size", "1MiB", "--compression", "none"]);
    sandbox.add_volume("a");
    data::noise_file(&sandbox.source.join("large"), 305, 30 << 20);
    sandbox.backup();
    sandbox.add_volume("d1/v");
    let ran = sandbox.run(args!["volumes", "--retire", &sandbox.path("a")]).code(6);
    assert!(ran.errors().contains("31457280 bytes"), "{}", ran.errors());
    assert_eq!(sandbox.ok(["volumes", "--json"]).json()[0]["status"], "active");
}

#[test]
fn replicate_is_a_job_too() {
    let sandbox = store(&[], &["a", "b"]);
    sandbox.backup();
    sandbox.ok(["set-copies", "2"]);
    let mount = sandbox.mount();
    fs::write(mount.ctl("replicate"), "\n").unwrap();
    let said = mount.wait_for_job(1);
    assert_eq!((&said["state"], &said["exit_code"]), (&"done".into(), &0.into()), "{said}");
    assert_eq!(names(&sandbox, "b"), names(&sandbox, "a"));
    sandbox.ok(["set-copies", "3"]);
    fs::write(mount.ctl("replicate"), "\n").unwrap();
    let said = mount.wait_for_job(2);
    assert_eq!((&said["state"], &said["exit_code"]), (&"failed".into(), &6.into()), "{said}");
    mount.end();
}

#[test]
fn coverage_of_a_run_is_that_of_its_blocks() {
    let sandbox = store(&[], &["a", "b"]);
    sandbox.backup();
    sandbox.ok(["set-copies", "2"]);
    let other = sandbox.path("other");
    fs::create_dir(&other).unwrap();
    data::noise_file(&other.join("file"), 306, 2 << 20);
    sandbox.ok(args!["backup", &other]);
    let of = |run: &str| sandbox.ok(["coverage", run, "--json"]).json();
    let (first, second) = (of("1"), of("latest"));
    assert_eq!(first["by_copies"][0]["copies"], 1);
    assert_eq!(second["by_copies"][0]["copies"], 2);
    assert_eq!(second["blocks_lacking"], 0);
    assert!(first["blocks_lacking"].as_u64().unwrap() > 5);
    let all = sandbox.ok(["coverage", "--json"]).json();
    assert_eq!(all["by_copies"].as_array().unwrap().len(), 2);
    assert_eq!(first["losses"][0]["survives"], false);
    assert_eq!(first["losses"][0]["runs"], 1);
    assert_eq!(first["losses"][1]["survives"], true);
    assert_eq!(second["losses"][0]["survives"], true);
    let text = sandbox.ok(["coverage"]).text();
    let yes = format!("survives the loss of volume {}: yes", sandbox.path("b").display());
    assert!(text.contains(&yes), "{text}");
    assert!(text.contains(": no ("), "{text}");
    sandbox.run(["coverage", "9"]).code(1);
}

/// A store that fails at its n-th call, with or without effect, and from then on if it is to.
struct Failing {
    inner: DirStore,
    left: Arc<AtomicU64>,
    error: i32,
    for_ever: bool,
}

impl Failing {
    fn check(&self) -> Result<()> {
        let left = self.left.load(Ordering::Relaxed);
        if left > 1 {
            self.left.store(left - 1, Ordering::Relaxed);
        } else if left == 1 {
            self.left.store(u64::from(self.for_ever), Ordering::Relaxed);
            let error = std::io::Error::from_raw_os_error(self.error);
            return Err(Error::io("a store that fails", error));
        }
        Ok(())
    }
}

impl BlockStore for Failing {
    fn begin(&self) -> Result<Box<dyn PendingBlock>> {
        self.check()?;
        self.inner.begin()
    }
    fn publish(&self, blocks: Vec<(Box<dyn PendingBlock>, BlockId)>) -> Result<()> {
        // One may be published, and the rest not.
        for block in blocks {
            self.check()?;
            self.inner.publish(vec![block])?;
        }
        self.check()
    }
    fn read_at(&self, id: &BlockId, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.check()?;
        self.inner.read_at(id, offset, buf)
    }
    fn len_of(&self, id: &BlockId) -> Result<Option<u64>> {
        self.check()?;
        self.inner.len_of(id)
    }
    fn list(&self, each: &mut dyn FnMut(BlockId, u64)) -> Result<()> {
        self.inner.list(each)
    }
    fn remove(&self, id: &BlockId) -> Result<()> {
        self.inner.remove(id)
    }
    fn space(&self) -> Result<Space> {
        self.check()?;
        Ok(Space { total_bytes: 1 << 40, free_bytes: 1 << 40, ..self.inner.space()? })
    }
    fn make_last(&self, id: &BlockId) -> Result<()> {
        self.check()?;
        self.inner.make_last(id)
    }
}

/// Stores some blocks on two volumes of which one fails at call `at`; gives whether it has.
fn store_with_failure(which: usize, at: u64, error: i32, for_ever: bool) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let left = Arc::new(AtomicU64::new(at));
    let volume = |n: usize| {
        let path = dir.path().join(n.to_string());
        let config = VolumeConfig {
            number: n as i64,
            uuid: n.to_string(),
            path: path.clone(),
            status: Status::Active,
            reserve_percent: 0,
        };
        let facts = Facts { number: config.number, created: 0, settings: Vec::new() };
        Volume::create(&path, &config, HashAlgo::Blake3, facts, || Ok(())).unwrap();
        let inner = DirStore::new(path);
        let left = if n == which { left.clone() } else { Arc::default() };
        Volume { config, store: Arc::new(Failing { inner, left, error, for_ever }) }
    };
    let volumes = Volumes::with_stores(vec![volume(0), volume(1)]);
    let lens = vec![Some(0), Some(0)];
    let writer = Writer::new(&volumes, HashAlgo::Blake3, 1 << 20, 1, lens).with_copies(2);
    let mut encoder = Encoder::new(Compression::None).unwrap();
    let mut wanted: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut stored = Vec::new();
    let mut work = || -> Result<()> {
        for n in 0..3u64 {
            let plain = data::Seeded::new(n).noise(1000);
            let mut batch = Batch::default();
            let (frame, bytes) = encoder.encode(&plain)?;
            batch.push(frame, bytes);
            let id = HashAlgo::Blake3.hash(&plain);
            batch.chunks.push(ChunkRef { id, len: 1000 });
            let mut own = None;
            let place = writer.append(&mut own, &batch)?;
            wanted.insert(place.block, plain.clone());
            writer.close(&mut own)?;
            if n == 1 {
                stored.extend(writer.barrier(false)?);
            }
        }
        stored.extend(writer.barrier(true)?);
        Ok(())
    };
    let result = work();
    let has_failed = left.load(Ordering::Relaxed) <= 1 && at > 0;
    let lacking = writer.take_lacking();
    // Whatever is said to be stored is there, whole, under each of its copies.
    let mut short = 0;
    for it in &stored {
        let plain = &wanted[&it.block()];
        assert!(!it.copies().is_empty());
        short += u64::from(it.copies().len() < 2);
        let mut seen = Vec::new();
        for copy in it.copies() {
            assert!(!seen.contains(&copy.volume), "two copies on one volume");
            seen.push(copy.volume);
            let root = dir.path().join(copy.volume.to_string());
            let path = DirStore::new(root.clone()).path_of(&it.index().id);
            assert_eq!(&fs::read(path).unwrap(), plain);
            let config = volumes.present()[copy.volume as usize].config.clone();
            let real = Volume { config, store: Arc::new(DirStore::new(root)) };
            assert_eq!(&real.index_record(copy.record_at).unwrap(), it.index());
        }
    }
    assert_eq!(short, lacking.blocks);
    match result {
        Ok(()) => assert_eq!(stored.len(), 3),
        // Only the volume that blocks are first written to can end a run.
        Err(e) => assert!(which == 0 && e.kind() != ErrorKind::Corrupt || is_read(&e), "{e}"),
    }
    if which == 1 {
        assert_eq!(stored.len(), 3, "a second disk that fails has cost the first copy");
        let is_full = error == libc::ENOSPC;
        assert_eq!(lacking.failed.is_empty(), is_full || !has_failed || short == 0);
    }
    has_failed
}

/// What the first copy could not be read back with.
fn is_read(error: &Error) -> bool {
    error.to_string().contains("a store that fails")
}

#[test]
fn a_store_that_fails_at_any_call_costs_at_most_copies() {
    for which in [0, 1] {
        for error in [libc::ENOSPC, libc::EIO] {
            for for_ever in [false, true] {
                let mut at = 1;
                while store_with_failure(which, at, error, for_ever) {
                    at += 1;
                }
                assert!(at > 12, "only {at} calls");
            }
        }
    }
}

#[test]
fn a_replication_that_is_killed_anywhere_goes_on() {
    let sandbox = store(&[], &["a", "b"]);
    sandbox.backup();
    let trees = [Tree::of(&sandbox.source)];
    sandbox.ok(["set-copies", "2"]);
    let all = names(&sandbox, "a");
    // As it is left between the steps: a pending file, a named block without record, with a meta, a
    // record without a row.
    let b = sandbox.path("b");
    fs::write(b.join("tmp/1-0.part"), "half").unwrap();
    let (first, _) = sandbox.blocks("a")[0].clone();
    let rest = first.strip_prefix(sandbox.path("a")).unwrap();
    fs::create_dir_all(b.join(rest).parent().unwrap()).unwrap();
    fs::copy(&first, b.join(rest)).unwrap();
    for n in 0..12 {
        let mut child = sandbox.program().arg("replicate").spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(4 * n));
        let _ = child.kill();
        child.wait().unwrap();
        assert_readable(&sandbox, &trees, "killed");
    }
    sandbox.ok(["replicate"]);
    assert_eq!(names(&sandbox, "b"), all);
    assert!(fs::read_dir(b.join("tmp")).unwrap().next().is_none());
    assert_whole(&sandbox, &trees, "all");
    take_away(&sandbox, "a");
    assert_readable(&sandbox, &trees, "b");
}
