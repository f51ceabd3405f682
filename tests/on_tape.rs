//! Blocks that are on tape and on no disk any more: everything says so, and nothing waits.
//!
//! Invariant: names, metadata and what is on disk stay readable, and whoever asks for the rest
//! hears at once which tapes have it.

use std::fs;
use std::path::{Path, PathBuf};

use raidtape::catalog::Tapes;
use raidtape::catalog::tapes::{Item, Member, Tape, TapeFile};
use raidtape::chunk::Digest;
use raidtape::sys::Time;
use serde_json::Value;

use crate::common::{Sandbox, data, errno};

/// A run whose blocks are all on tape `T0` in file 1, as is noted beside the catalog; and, where
/// they are, names of its blocks.
fn archived() -> (Sandbox, Vec<String>) {
    let sandbox = Sandbox::with(&["--block-size", "1MiB"]);
    data::mixed_tree(&sandbox.source, 7, 40);
    data::noise_file(&sandbox.source.join("large"), 8, 5 << 20);
    sandbox.backup();
    let blocks = sandbox.blocks("volume").into_iter();
    let names: Vec<String> =
        blocks.map(|it| it.0.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    let mut tapes = Tapes::open(&sandbox.catalog).unwrap();
    let label = b"T0".to_vec();
    let tape = Tape { label, hash: [1; 32], pool: "full".to_owned(), block_bytes: 1 << 18 };
    tapes.put_tape(&tape).unwrap();
    let ended = Time { secs: 1, nanos: 0 };
    let job = "j".to_owned();
    let file = TapeFile { filenum: 1, position: 2, bytes: 9, job, batch: 0, ended, verified: None };
    let mut noting = tapes.begin(b"T0", &file).unwrap();
    for (at, name) in (0..).zip(&names) {
        let id: Digest = name.parse().unwrap();
        noting.add(&Member { at, len: 1, item: Item::Block(id) }).unwrap();
    }
    noting.finish().unwrap();
    (sandbox, names)
}

/// Everything in a directory, at any depth.
fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            found.extend(walk(&entry.path()));
        }
        found.push(entry.path());
    }
    found
}

fn take_away(sandbox: &Sandbox) {
    fs::rename(sandbox.path("volume"), sandbox.path("away")).unwrap();
}

#[test]
fn a_mount_shows_it_and_says_at_once_which_tape_it_is_on() {
    let (sandbox, _) = archived();
    let count = |dir: &Path| walk(dir).len();
    let before = count(&sandbox.source);
    take_away(&sandbox);
    let mount = sandbox.mount();
    assert_eq!(count(&mount.run(1)), before);
    assert_eq!(fs::metadata(mount.run(1).join("large")).unwrap().len(), 5 << 20);
    assert_eq!(errno(fs::read(mount.run(1).join("large"))), libc::ENOMEDIUM);
    let log = mount.log();
    assert!(log.contains("only on tape, on T0 (file 1)"), "{log}");
    fs::rename(sandbox.path("away"), sandbox.path("volume")).unwrap();
    assert_eq!(fs::read(mount.run(1).join("large")).unwrap().len(), 5 << 20);
    mount.end();
}

#[test]
fn commands_name_the_tape_too() {
    let (sandbox, names) = archived();
    take_away(&sandbox);
    let target = sandbox.path("out");
    let line = ["revert-to-run", "1", target.to_str().unwrap()];
    let ran = sandbox.run(line).code(4);
    assert!(ran.errors().contains("only on tape, on T0 (file 1)"), "{}", ran.errors());
    let ran = sandbox.run(["validate", "--json"]).code(4);
    let first = &ran.json()["bad_blocks"][0];
    assert!(first["reason"].as_str().unwrap().contains("on T0 (file 1)"), "{first}");
    fs::rename(sandbox.path("away"), sandbox.path("volume")).unwrap();
    // Damage stays damage, whatever is on tape; what a repair cannot bring back it knows where to
    // find.
    fs::remove_dir_all(&sandbox.source).unwrap();
    for (path, _) in sandbox.blocks("volume") {
        fs::remove_file(path).unwrap();
    }
    sandbox.run(["validate"]).code(5);
    let ran = sandbox.run(["validate", "--repair", "--json"]).code(4);
    let unhealed = ran.json()["repair"]["unhealed"].clone();
    let unhealed = unhealed.as_array().unwrap();
    assert_eq!(unhealed.len(), names.len(), "{unhealed:?}");
    for it in unhealed {
        assert!(it["reason"].as_str().unwrap().contains("on T0 (file 1)"), "{it}");
    }
}

#[test]
fn coverage_counts_tapes_beside_volumes() {
    let (sandbox, names) = archived();
    let said = sandbox.ok(["coverage", "--json"]).json();
    assert_eq!(said["by_tapes"][0]["tapes"], 1);
    assert_eq!(said["by_tapes"][0]["blocks"], names.len());
    let loss = &said["losses"][0];
    assert_eq!(loss["survives"], Value::Bool(true));
    assert_eq!(loss["blocks_from_tape"], names.len());
    let text = sandbox.ok(["coverage"]).text();
    assert!(text.contains(&format!("yes, with {} blocks of", names.len())), "{text}");
    let mut tapes = Tapes::open(&sandbox.catalog).unwrap();
    tapes.note_read((b"T0", 1), (&[0], &[]), true, Time { secs: 2, nanos: 0 }).unwrap();
    let said = sandbox.ok(["coverage", "--json"]).json();
    let loss = &said["losses"][0];
    assert_eq!((&loss["survives"], &loss["blocks"]), (&Value::Bool(false), &1.into()));
    assert_eq!(loss["blocks_from_tape"], names.len() - 1);
    tapes.set_lost(b"T0", true).unwrap();
    let said = sandbox.ok(["coverage", "--json"]).json();
    assert_eq!(said["losses"][0]["blocks"], names.len());
}

#[test]
fn coverage_counts_no_copy_that_is_gone_or_known_to_be_bad() {
    let (sandbox, names) = archived();
    let blocks = sandbox.blocks("volume");
    fs::remove_file(&blocks[0].0).unwrap();
    let by_copies = || {
        let said = sandbox.ok(["coverage", "--json"]).json();
        let of = |it: &Value| (it["copies"].as_u64().unwrap(), it["blocks"].as_u64().unwrap());
        let all = said["by_copies"].as_array().unwrap().iter().map(of).collect::<Vec<_>>();
        (all, said["volumes"][0]["blocks"].as_u64().unwrap())
    };
    let count = names.len() as u64;
    assert_eq!(by_copies(), (vec![(0, 1), (1, count - 1)], count - 1));
    let mut bytes = fs::read(&blocks[1].0).unwrap();
    bytes[100] ^= 1;
    fs::set_permissions(&blocks[1].0, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    fs::write(&blocks[1].0, bytes).unwrap();
    // Whoever has read it knows.
    sandbox.run(["validate"]).code(5);
    assert_eq!(by_copies().0[0], (0, 2));
}
