//! Everything that fuzzing has found worth keeping, read once more.
//!
//! `scripts/fuzz` grows the corpus; a target that panics or hangs on any of it fails here.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::Path;

#[path = "../fuzz/src/targets.rs"]
mod targets;

use targets::TARGETS;

fn inputs(target: &str) -> Vec<Vec<u8>> {
    let path = format!("{}/fuzz/corpus/{target}.tar.zst", env!("CARGO_MANIFEST_DIR"));
    let file = fs::File::open(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let mut archive = tar::Archive::new(zstd::Decoder::new(file).unwrap());
    let mut inputs = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.header().entry_type().is_file() {
            let mut input = Vec::new();
            entry.read_to_end(&mut input).unwrap();
            inputs.push(input);
        }
    }
    inputs
}

#[test]
fn what_fuzzing_has_kept_is_read_or_refused() {
    for (name, target) in TARGETS {
        let inputs = inputs(name);
        assert!(inputs.len() >= 5, "{name} has no corpus: run scripts/fuzz {name}");
        inputs.iter().for_each(|it| target(it));
    }
}

#[test]
fn every_corpus_has_a_target() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let files = fs::read_dir(dir).unwrap().map(|it| it.unwrap().file_name());
    let found: BTreeSet<String> = files.map(|it| it.into_string().unwrap()).collect();
    let names: BTreeSet<String> = TARGETS.iter().map(|it| format!("{}.tar.zst", it.0)).collect();
    assert_eq!(found, names);
}
