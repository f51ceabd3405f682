//! Copies of the catalog on the volumes, after runs.
//!
//! A copy is good if its dump is that of the catalog after its run.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use raidtape::catalog::{Reader, copy};

use crate::common::{Sandbox, args};

fn dump(reader: &Reader) -> String {
    let mut out = Vec::new();
    reader.write_logical_dump(&mut out).unwrap();
    String::from_utf8(out).unwrap()
}

/// The dump of the copy of after a run.
fn dump_of_copy(sandbox: &Sandbox, volume: &Path, run: i64) -> String {
    let to = sandbox.path("unpacked");
    let from = volume.join(copy::document_name(run));
    let dump = dump(&copy::unpack(&from, &to, &|| Ok(())).unwrap());
    fs::remove_file(to).unwrap();
    dump
}

#[test]
fn each_run_with_changes_leaves_a_copy_on_each_volume_that_takes_blocks() {
    let sandbox = Sandbox::new();
    let (one, two) = (sandbox.path("volume"), sandbox.add_volume("two"));
    let mut dumps = vec![String::new()];
    for number in 1..=5 {
        fs::write(sandbox.source.join(format!("f{number}")), [number; 3000]).unwrap();
        let said = sandbox.backup();
        assert_eq!(said["warnings"], serde_json::json!([]));
        dumps.push(dump(&Reader::open(&sandbox.catalog).unwrap()));
    }
    for volume in [&one, &two] {
        assert_eq!(copy::list(volume).unwrap(), [5, 4, 3]);
        for run in 3..=5 {
            let same = dump_of_copy(&sandbox, volume, run) == dumps[usize::try_from(run).unwrap()];
            assert!(same, "run {run}");
        }
        let newest = fs::metadata(volume.join(copy::document_name(5))).unwrap();
        assert_eq!(newest.mode() & 0o777, 0o600);
    }
    // Nothing new, or not wanted.
    sandbox.backup();
    fs::write(sandbox.source.join("g"), "g").unwrap();
    sandbox.backup_with(&["--no-catalog-copy"]);
    assert_eq!(copy::list(&one).unwrap(), [5, 4, 3]);

    let conn = rusqlite::Connection::open(&sandbox.catalog).unwrap();
    conn.execute("UPDATE volumes SET status = 'sealed' WHERE number = 1", []).unwrap();
    drop(conn);
    fs::remove_file(sandbox.source.join("g")).unwrap();
    sandbox.backup();
    assert_eq!(copy::list(&one).unwrap(), [5, 4, 3]);
    assert_eq!(copy::list(&two).unwrap(), [8, 5, 4]);
    assert!(!sandbox.path("catalog.copy").exists());
    sandbox.assert_valid();
}

#[test]
fn copies_of_later_runs_are_not_removed() {
    // As after the catalog has been taken back to an earlier state by hand.
    let sandbox = Sandbox::new();
    let volume = sandbox.path("volume");
    fs::create_dir(volume.join("catalog")).unwrap();
    for run in [1, 2, 3, 90, 91, 92, 93] {
        fs::write(volume.join(copy::document_name(run)), "x").unwrap();
    }
    fs::write(volume.join("catalog/notes"), "x").unwrap();
    fs::write(sandbox.source.join("f"), "f").unwrap();
    sandbox.backup();
    assert_eq!(copy::list(&volume).unwrap(), [93, 92, 91, 90, 3, 2, 1]);
    assert!(volume.join("catalog/notes").exists());
    assert!(!dump_of_copy(&sandbox, &volume, 1).is_empty());
}

#[test]
fn a_copy_that_cannot_be_made_takes_nothing_from_the_run() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("f"), "f").unwrap();
    let in_way = sandbox.path("volume/catalog");
    fs::write(&in_way, "").unwrap();
    let said = sandbox.backup();
    let warning = said["warnings"][0].as_str().unwrap();
    assert!(warning.contains("no copy of the catalog") && warning.contains("volume"), "{warning}");
    fs::write(sandbox.source.join("f"), "g").unwrap();
    let ran = sandbox.ok(args!["backup", &sandbox.source]);
    assert!(ran.errors().contains("warning: no copy of the catalog"), "{}", ran.errors());
    fs::remove_file(in_way).unwrap();
    // What another process has left half done is in nobody's way.
    fs::write(sandbox.path("catalog.copy"), vec![7; 100_000]).unwrap();
    fs::write(sandbox.source.join("f"), "h").unwrap();
    sandbox.backup();
    assert_eq!(copy::list(&sandbox.path("volume")).unwrap(), [3]);
    assert!(!sandbox.path("catalog.copy").exists());
    sandbox.assert_valid();
}

#[test]
fn a_copy_that_is_cut_short_or_changed_is_not_opened() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.source.join("f"), "f").unwrap();
    sandbox.backup();
    let path = sandbox.path("volume").join(copy::document_name(1));
    let good = fs::read(&path).unwrap();
    let (from, to) = (sandbox.path("from"), sandbox.path("to"));
    let is_good = |bytes: &[u8]| {
        let _ = fs::remove_file(&to);
        fs::write(&from, bytes).unwrap();
        copy::unpack(&from, &to, &|| Ok(())).is_ok()
    };
    assert!(is_good(&good));
    for at in (0..good.len()).step_by(good.len() / 60) {
        assert!(!is_good(&good[..at]), "cut at {at}");
        let mut bad = good.clone();
        bad[at] ^= 0x20;
        assert!(!is_good(&bad), "changed at {at}");
    }
    assert!(!is_good(&zstd::encode_all(&b"hello"[..], 1).unwrap()));
}
