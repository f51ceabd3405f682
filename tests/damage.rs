//! Damaged blocks: what is named, what still reads.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::common::{Mount, Sandbox, Tree, args, assert_same, data, errno, name_of, path_of};

/// Files that damage reaches, each with the runs in which it does.
pub type Affected = BTreeMap<Vec<u8>, BTreeSet<i64>>;

/// A store with two runs, and what is in them.
pub struct Store {
    pub sandbox: Sandbox,
    pub runs: BTreeMap<i64, Tree>,
}

impl Store {
    pub fn new(init: &[&str]) -> Store {
        let mut line = vec!["--block-size", "1MiB"];
        line.extend(init);
        let sandbox = Sandbox::with(&line);
        let at = |name: &str| sandbox.source.join(name);
        data::mixed_tree(&sandbox.source, 110, 80);
        data::noise_file(&at("large"), 111, 9 << 20);
        fs::write(at("text"), data::Seeded::new(112).text(3 << 20)).unwrap();
        fs::copy(at("d1/e1/f1"), at("the same again")).unwrap();
        fs::hard_link(at("d2/e2/f2"), at("linked")).unwrap();
        sandbox.backup();
        let mut runs = BTreeMap::from([(1, Tree::of(&sandbox.source))]);
        fs::remove_file(at("d3/e0/f3")).unwrap();
        fs::rename(at("d4/e1/f4"), at("renamed")).unwrap();
        let mut text = fs::read(at("text")).unwrap();
        text.splice(1 << 20..1 << 20, b"put in here".iter().copied());
        fs::write(at("text"), text).unwrap();
        fs::write(at("d5/e2/f5"), data::Seeded::new(113).noise(40_000)).unwrap();
        sandbox.backup();
        runs.insert(2, Tree::of(&sandbox.source));
        sandbox.assert_valid();
        Store { sandbox, runs }
    }

    fn meta(&self, block: &Path) -> Value {
        let name = format!("meta/{}.meta.json.zst", block.file_name().unwrap().to_str().unwrap());
        let file = fs::File::open(self.sandbox.path("volume").join(name)).unwrap();
        serde_json::from_reader(zstd::Decoder::new(file).unwrap()).unwrap()
    }

    /// What the loss of stored bytes from `start` to `end` of a block means, by its meta alone for
    /// where files lie, and by the trees for the runs that have them.
    pub fn affected(&self, block: &Path, start: u64, end: u64) -> Affected {
        let meta = self.meta(block);
        let (mut stored, mut plain) = (0, 0);
        let mut lost = Vec::new();
        for frame in meta["frames"].as_array().unwrap() {
            let [stored_len, plain_len] = [1, 2].map(|it: usize| frame[it].as_u64().unwrap());
            if stored < end && start < stored + stored_len {
                lost.push((plain, plain + plain_len));
            }
            stored += stored_len;
            plain += plain_len;
        }
        let mut affected = Affected::new();
        for mapping in meta["mappings"].as_array().unwrap() {
            let number = |key: &str| mapping[key].as_u64().unwrap();
            let (from, to) = (number("at"), number("at") + number("len"));
            if !lost.iter().any(|it| it.0 < to && from < it.1) {
                continue;
            }
            let path = name_of(mapping, "path");
            let hash = mapping["hash"].as_str().unwrap();
            for (run, tree) in &self.runs {
                let node = tree.0.get(&path).filter(|it| it.kind == "file");
                if node.is_some_and(|it| hex::encode(&it.content) == hash) {
                    affected.entry(path.clone()).or_default().insert(*run);
                }
            }
        }
        affected
    }

    /// `validate` finds this one block and these files.
    #[track_caller]
    fn assert_named(&self, block: &Path, affected: &Affected) {
        let report = self.sandbox.run(["validate", "--json"]).code(5).json();
        let name = block.file_name().unwrap().to_str().unwrap();
        assert_eq!(report["clean"], false);
        assert_eq!(report["catalog_faults"], serde_json::json!([]));
        let bad = report["bad_blocks"].as_array().unwrap();
        assert_eq!(bad.len(), 1, "{report}");
        assert_eq!(bad[0]["block"], name);
        assert_eq!(bad[0]["volume"], self.sandbox.path("volume").to_str().unwrap());
        let mut named = Affected::new();
        for file in bad[0]["files"].as_array().unwrap() {
            assert_eq!(file["source"], self.sandbox.source.to_str().unwrap());
            let runs = file["runs"].as_array().unwrap();
            let runs: BTreeSet<i64> = runs.iter().map(|it| it.as_i64().unwrap()).collect();
            assert!(!runs.is_empty());
            // A path may have held several damaged versions, one after another.
            named.entry(name_of(file, "path")).or_default().extend(runs);
        }
        assert_eq!(&named, affected, "files of block {name}");
        let text = self.sandbox.run(["validate"]).code(5).text();
        assert!(text.contains(name), "{text}");
    }

    /// Through the mount and by restore, just these files are lost.
    fn assert_rest_reads(&self, affected: &Affected) {
        let mount = Mount::start(&self.sandbox, &["--cache-size", "1MiB"]);
        for (run, tree) in &self.runs {
            let is_lost = |path: &[u8]| affected.get(path).is_some_and(|it| it.contains(run));
            let mut lost = 0;
            for (path, node) in tree.0.iter().filter(|it| it.1.kind == "file") {
                let read = fs::read(mount.run(*run).join(path_of(path)));
                if is_lost(path) {
                    assert_eq!(errno(read), libc::EIO, "{:?} of run {run}", path_of(path));
                    lost += 1;
                } else {
                    let bytes = read.unwrap_or_else(|e| panic!("{:?}: {e}", path_of(path)));
                    assert!(blake3::hash(&bytes).as_bytes()[..] == node.content[..]);
                }
            }
            let out = self.sandbox.path(&format!("out{run}"));
            let line = args!["revert-to-run", &run.to_string(), &out];
            let ran = self.sandbox.run(line).code(if lost > 0 { 5 } else { 0 });
            let errors = ran.errors();
            assert_eq!(errors.lines().count(), lost, "{errors}");
            for path in affected.iter().filter(|it| it.1.contains(run)).map(|it| it.0) {
                let named = format!("raidtape: {}: ", String::from_utf8(path.clone()).unwrap());
                assert!(errors.lines().any(|it| it.starts_with(&named)), "{named}: {errors}");
            }
            // Names of one file share its fate, so what is left has as many names as before.
            let expected = tree.clone().without(|path, _| is_lost(path));
            assert_same(&expected, &Tree::of(&out));
            fs::remove_dir_all(&out).unwrap();
        }
        mount.end();
    }

    pub fn block(&self, number: usize) -> (PathBuf, u64) {
        let blocks = self.sandbox.blocks("volume");
        assert!(blocks.len() > 4, "too few blocks for this test");
        blocks[number % blocks.len()].clone()
    }
}

/// Turns some bits of one byte over.
pub fn flip(block: &Path, at: u64) {
    let mut bytes = fs::read(block).unwrap();
    bytes[at as usize] ^= 0x41;
    fs::write(block, bytes).unwrap();
}

fn flips(init: &[&str]) {
    let store = Store::new(init);
    let mut seeded = data::Seeded::new(114);
    let mut most = Affected::new();
    let mut worst = None;
    for number in 0..store.sandbox.blocks("volume").len().min(12) {
        let (block, len) = store.block(number);
        let at = seeded.below(len);
        let affected = store.affected(&block, at, at + 1);
        flip(&block, at);
        store.assert_named(&block, &affected);
        flip(&block, at);
        if affected.len() > most.len() {
            (most, worst) = (affected, Some((block, at)));
        }
    }
    store.sandbox.assert_valid();
    let (block, at) = worst.expect("a flipped byte that some file needs");
    flip(&block, at);
    store.assert_rest_reads(&most);
}

#[test]
fn a_flipped_byte_is_found_and_its_files_named_zstd() {
    flips(&[]);
}

#[test]
fn a_flipped_byte_is_found_and_its_files_named_uncompressed() {
    flips(&["--compression", "none", "--chunk-size", "8KiB"]);
}

#[test]
fn a_flipped_byte_is_found_and_its_files_named_fixed_zstd() {
    flips(&["--chunking", "fixed", "--chunk-size", "4KiB"]);
}

#[test]
fn a_flipped_byte_is_found_and_its_files_named_fixed_uncompressed() {
    flips(&["--chunking", "fixed", "--chunk-size", "64KiB", "--compression", "none"]);
}

#[test]
fn a_cut_block_loses_what_was_cut_off() {
    let store = Store::new(&[]);
    for number in [0, 3] {
        let (block, len) = store.block(number);
        let whole = fs::read(&block).unwrap();
        for cut in [len / 2, len - 1, 0] {
            fs::write(&block, &whole[..cut as usize]).unwrap();
            let affected = store.affected(&block, cut, len);
            store.assert_named(&block, &affected);
            if cut == len / 2 {
                store.assert_rest_reads(&affected);
            }
        }
        // Longer than it was: a fault, but nothing is lost.
        fs::write(&block, [&whole[..], b"x"].concat()).unwrap();
        store.assert_named(&block, &Affected::new());
        fs::write(&block, &whole).unwrap();
    }
    store.sandbox.assert_valid();
}

#[test]
fn a_missing_block_loses_all_of_it() {
    let store = Store::new(&[]);
    let (block, len) = store.block(2);
    let away = store.sandbox.path("away");
    fs::rename(&block, &away).unwrap();
    let affected = store.affected(&block, 0, len);
    store.assert_named(&block, &affected);
    store.assert_rest_reads(&affected);
    fs::rename(&away, &block).unwrap();
    store.sandbox.assert_valid();
}

#[test]
fn a_new_run_does_not_build_on_a_lost_or_cut_block() {
    for cut in [None, Some(1)] {
        let store = Store::new(&[]);
        let (block, len) = store.block(1);
        match cut {
            None => fs::remove_file(&block).unwrap(),
            Some(cut) => fs::write(&block, vec![0; (len - cut) as usize]).unwrap(),
        }
        // What the catalog calls known is not there, so it is stored again.
        let said = store.sandbox.backup_with(&["--as", "anew"]);
        assert!(said["bytes_stored"].as_u64().unwrap() > 0, "{said}");
        let out = store.sandbox.path("out");
        store.sandbox.run(args!["revert-to-run", &said["run"].to_string(), &out]).code(0);
        let report = store.sandbox.run(["validate", "--json"]).json();
        for bad in report["bad_blocks"].as_array().unwrap() {
            let files = bad["files"].as_array().unwrap();
            assert!(files.iter().all(|it| it["source"] != "anew"), "{report}");
        }
    }
}

#[test]
fn a_damaged_catalog_is_not_believed() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 115, 400);
    sandbox.backup();
    let whole = fs::read(&sandbox.catalog).unwrap();
    let mut seeded = data::Seeded::new(116);
    for _ in 0..12 {
        let mut bytes = whole.clone();
        let at = 4096 + seeded.below(bytes.len() as u64 - 8192) as usize;
        bytes[at..at + 4000].copy_from_slice(&seeded.noise(4000));
        fs::write(&sandbox.catalog, &bytes).unwrap();
        for line in [&["validate"][..], &["ls", "1"], &["runs"], &["list-changes", "1"]] {
            let mut command = sandbox.program();
            let output = command.args(line).output().unwrap();
            let code = output.status.code().expect("it must not die of a signal");
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!errors.contains("panicked"), "{line:?}: {errors}");
            // Only the command that looks at all of it has to notice.
            let may_be_right = line[0] != "validate";
            assert!(code == 5 || may_be_right && code <= 5, "{line:?}: code {code}: {errors}");
        }
    }
    fs::write(&sandbox.catalog, "this is no catalog at all, but a file of some length").unwrap();
    sandbox.run(["runs"]).code(5);
}
