//! A doubtful catalog held against its volumes.
//!
//! Invariant: what was there before is the measure, by the logical dump; runs and files are never
//! touched, and what has vanished is named with all that it reaches.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rusqlite::Connection;
use serde_json::{Value, json};

use crate::common::{RAIDTAPE, Ran, Sandbox, args, data, need_tool, run};
use crate::rebuild::{assert_dumps, dump, seal};

/// Two volumes; the first has all of the first run, the second the rest.
fn store() -> (Sandbox, [PathBuf; 2]) {
    let sandbox = Sandbox::with(&["--block-size", "1MiB"]);
    data::mixed_tree(&sandbox.source, 1, 12);
    data::noise_file(&sandbox.source.join("large"), 2, 3 << 20);
    sandbox.backup();
    let second = sandbox.add_volume("second");
    seal(&sandbox, 1);
    data::noise_file(&sandbox.source.join("late"), 3, 50_000);
    sandbox.backup();
    data::noise_file(&sandbox.source.join("later"), 4, 60_000);
    sandbox.backup();
    let first = sandbox.path("volume");
    (sandbox, [first, second])
}

fn register(sandbox: &Sandbox, options: &[&str]) -> Ran {
    sandbox.run(["rebuild-catalog", "--json"].iter().chain(options))
}

fn summary(ran: &Ran) -> Value {
    ran.json_lines().pop().unwrap()
}

fn edit(sandbox: &Sandbox, statements: &str) {
    let conn = Connection::open(&sandbox.catalog).unwrap();
    conn.pragma_update(None, "foreign_keys", false).unwrap();
    conn.execute_batch(statements).unwrap();
}

/// The rows that say where what is, but for places in indexes.
fn rows(catalog: &Path) -> Vec<String> {
    let conn = Connection::open(catalog).unwrap();
    let mut found = Vec::new();
    for query in [
        "SELECT number || ' ' || hex(id) || ' ' || hex(frames) FROM blocks ORDER BY number",
        "SELECT block || ' on ' || volume FROM block_copies ORDER BY block, volume",
        "SELECT hex(id) || ' ' || block || ' ' || at || ' ' || len FROM chunks ORDER BY id",
        "SELECT k || '=' || v FROM settings ORDER BY k",
    ] {
        let mut statement = conn.prepare(query).unwrap();
        let rows = statement.query_map([], |row| row.get(0)).unwrap();
        found.extend(rows.map(|it| it.unwrap()));
    }
    found
}

#[test]
fn a_good_catalog_is_left_as_it_is() {
    let (sandbox, _) = store();
    let (before, all) = (dump(&sandbox.catalog), rows(&sandbox.catalog));
    for options in [&[][..], &["--scan"], &["--dry-run"], &["--scan", "--dry-run"]] {
        let said = summary(&register(&sandbox, options).code(0));
        for key in ["blocks_added", "blocks_changed", "chunks_added", "chunks_changed"] {
            assert_eq!(said[key], 0, "{said}");
        }
        for key in ["chunks_removed", "records_moved", "problems"] {
            assert_eq!(said[key], 0, "{said}");
        }
        for volume in said["volumes"].as_array().unwrap() {
            assert_eq!(volume["added"], 0, "{said}");
            let is_scan = options.contains(&"--scan");
            assert_eq!(volume["scanned"].as_u64().unwrap() > 0, is_scan, "{said}");
        }
        assert_eq!(rows(&sandbox.catalog), all);
        assert_dumps(&before, &dump(&sandbox.catalog));
    }
    assert!(!sandbox.path("catalog.rebuilding-scratch").exists());
    sandbox.assert_valid();
}

#[test]
fn rows_that_were_lost_or_changed_come_back() {
    let (sandbox, _) = store();
    let (before, all) = (dump(&sandbox.catalog), rows(&sandbox.catalog));
    let cases = [
        ("DELETE FROM blocks WHERE number = 2", "blocks_added", 1),
        ("DELETE FROM blocks; DELETE FROM block_copies; DELETE FROM chunks", "blocks_added", 0),
        ("DELETE FROM chunks", "chunks_added", 0),
        ("DELETE FROM chunks WHERE rowid IS NULL OR block = 1", "chunks_added", 0),
        ("UPDATE chunks SET at = at + 1", "chunks_changed", 0),
        ("UPDATE chunks SET block = 77 WHERE block = 2", "chunks_changed", 0),
        ("UPDATE chunks SET id = randomblob(32) WHERE block = 1", "chunks_removed", 0),
        ("UPDATE blocks SET stored_len = 5, plain_len = 6 WHERE number = 1", "blocks_changed", 1),
        ("UPDATE block_copies SET record_at = record_at + 1", "records_moved", 0),
        ("DELETE FROM block_copies WHERE volume = 2", "blocks_added", 0),
        ("UPDATE volumes SET index_len = 3, status = 'missing'", "blocks_added", 0),
    ];
    for (statements, key, count) in cases {
        edit(&sandbox, &statements.replace("rowid IS NULL OR ", ""));
        let doubtful = rows(&sandbox.catalog);
        let trial = summary(&register(&sandbox, &["--dry-run"]).code(0));
        assert_eq!(rows(&sandbox.catalog), doubtful, "{statements}");
        let said = summary(&register(&sandbox, &[]).code(0));
        assert_eq!(said[key], trial[key], "{statements}: {said}");
        if count > 0 {
            assert_eq!(said[key], count, "{statements}: {said}");
        } else if key != "blocks_added" {
            assert!(said[key].as_u64().unwrap() > 0, "{statements}: {said}");
        }
        assert_eq!(rows(&sandbox.catalog), all, "{statements}");
        assert_dumps(&before, &dump(&sandbox.catalog));
        sandbox.assert_valid();
    }
    data::noise_file(&sandbox.source.join("more"), 9, 20_000);
    assert_eq!(sandbox.backup()["run"], 4);
    sandbox.assert_valid();
}

#[test]
fn a_lost_block_never_gets_the_number_of_another() {
    let (sandbox, [_, second]) = store();
    let conn = Connection::open(&sandbox.catalog).unwrap();
    let query = "SELECT min(block) FROM block_copies WHERE volume = 2";
    let other: i64 = conn.query_row(query, [], |row| row.get(0)).unwrap();
    let query = "SELECT hex(id) FROM blocks WHERE number = 1";
    let id: String = conn.query_row(query, [], |row| row.get(0)).unwrap();
    drop(conn);
    // A chunk of block 1 is said to be in a block that is lost too, and whose volume is away.
    edit(
        &sandbox,
        &format!(
            "DELETE FROM blocks WHERE number IN (1, {other}); \
             DELETE FROM block_copies WHERE block IN (1, {other}); \
             UPDATE chunks SET block = {other} WHERE block = 1 AND at = 0; \
             UPDATE chunks SET block = 1 WHERE id = \
                 (SELECT max(id) FROM chunks WHERE block = {other} AND at > 0)"
        ),
    );
    fs::rename(&second, sandbox.path("away")).unwrap();
    register(&sandbox, &[]);
    let conn = Connection::open(&sandbox.catalog).unwrap();
    let query = "SELECT number FROM blocks WHERE hex(id) = ?1";
    let number: i64 = conn.query_row(query, [id], |row| row.get(0)).unwrap();
    assert_ne!(number, other);
}

#[test]
fn an_index_that_is_lost_or_cut_short_has_its_records_again() {
    let (sandbox, volumes) = store();
    let before = dump(&sandbox.catalog);
    let check = |what: &str| {
        let said = summary(&register(&sandbox, &[]).code(3));
        assert!(said["problem_list"].to_string().contains("lost records"), "{what}: {said}");
        assert_dumps(&before, &dump(&sandbox.catalog));
        sandbox.assert_valid();
        register(&sandbox, &["--scan"]).code(0);
    };
    for (n, volume) in volumes.iter().enumerate() {
        let index = volume.join(".rt_volume_index");
        let len = fs::metadata(&index).unwrap().len();
        // In the middle of a record, and between two.
        fs::File::options().write(true).open(&index).unwrap().set_len(len - 5).unwrap();
        check(&format!("cut {n}"));
        fs::write(&index, "").unwrap();
        check(&format!("emptied {n}"));
    }
    // Without metas the catalog itself is what says it.
    let index = volumes[0].join(".rt_volume_index");
    fs::write(&index, "").unwrap();
    fs::remove_dir_all(volumes[0].join("meta")).unwrap();
    fs::create_dir(volumes[0].join("meta")).unwrap();
    let trial = summary(&register(&sandbox, &["--dry-run"]).code(3));
    assert_eq!(fs::read(&index).unwrap(), b"");
    let said = summary(&register(&sandbox, &[]).code(3));
    assert_eq!(said["chunks_changed"], trial["chunks_changed"]);
    assert_dumps(&before, &dump(&sandbox.catalog));
    sandbox.ok(["genmeta"]);
    sandbox.assert_valid();
    data::noise_file(&sandbox.source.join("more"), 9, 20_000);
    sandbox.backup();
    sandbox.assert_valid();
}

#[test]
fn an_index_that_is_gone_is_made_anew() {
    let (sandbox, volumes) = store();
    let before = dump(&sandbox.catalog);
    let remove = |volumes: &[PathBuf]| {
        for volume in volumes {
            fs::remove_file(volume.join(".rt_volume_index")).unwrap();
        }
    };
    let check = |ran: Ran, volumes: &[PathBuf]| {
        let errors = ran.code(3).errors();
        let hint = "/.rt_volume_index, which raidtape validate --repair makes anew: No such file";
        for volume in volumes {
            let path = volume.to_str().unwrap();
            assert!(errors.contains(&format!("{path}{hint}")), "{errors}");
        }
    };
    remove(&volumes);
    check(sandbox.run(args!["rebuild-catalog"]), &volumes);
    assert_dumps(&before, &dump(&sandbox.catalog));
    sandbox.assert_valid();
    // The other one takes what is new, and the repair is what is said of it.
    let [first, _] = &volumes;
    let first = std::slice::from_ref(first);
    remove(first);
    fs::write(sandbox.source.join("more"), "more").unwrap();
    check(sandbox.run(args!["backup", &sandbox.source]), first);
    check(sandbox.run(args!["rebuild-catalog", "--dry-run"]), first);
    sandbox.run(args!["validate", "--repair"]).code(0);
    sandbox.backup();
    sandbox.assert_valid();
}

#[test]
fn a_block_that_has_vanished_keeps_its_rows_and_is_named_with_its_files() {
    let (sandbox, _) = store();
    let (before, all) = (dump(&sandbox.catalog), rows(&sandbox.catalog));
    // The last block of the second volume is of the last run.
    let (path, _) = sandbox.blocks("second").into_iter().find(|(_, len)| *len > 55_000).unwrap();
    let bytes = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    for options in [&[][..], &["--scan"]] {
        let ran = register(&sandbox, options).code(5);
        let lines = ran.json_lines();
        let lacks = lines.iter().find(|it| it["path"] == "later").unwrap();
        assert_eq!(lacks["runs"], json!([3]));
        assert_eq!(lacks["lacks"], path.file_name().unwrap().to_str().unwrap());
        let said = summary(&ran);
        assert_eq!((&said["blocks_lost"], &said["files_lost"]), (&json!(1), &json!(1)), "{said}");
        assert_eq!(said["volumes"][1]["missing"], 1, "{said}");
        assert_eq!(rows(&sandbox.catalog), all);
    }
    // Damaged: found by reading it only.
    let mut bad = bytes.clone();
    bad[1000] ^= 1;
    fs::write(&path, &bad).unwrap();
    register(&sandbox, &[]).code(0);
    let said = summary(&register(&sandbox, &["--scan"]).code(5));
    assert_eq!(said["volumes"][1]["damaged"], 1, "{said}");
    fs::write(&path, &bytes).unwrap();
    assert_dumps(&before, &dump(&sandbox.catalog));
    sandbox.assert_valid();
}

#[test]
fn volumes_that_are_elsewhere_or_were_lost_are_registered() {
    let (sandbox, volumes) = store();
    let before = dump(&sandbox.catalog);
    let moved = sandbox.path("moved");
    fs::rename(&volumes[0], &moved).unwrap();
    let word = moved.to_str().unwrap();
    let said = summary(&register(&sandbox, &[]).code(4));
    assert_eq!(said["volumes_missing"], 1, "{said}");
    let said = summary(&register(&sandbox, &["--volumes", word]).code(0));
    assert_eq!(said["volumes"][0]["was"], volumes[0].to_str().unwrap(), "{said}");
    let path = |it: &Path| format!("\"path\":\"{}\"", it.to_str().unwrap());
    let now = before.replace(&path(&volumes[0]), &path(&moved));
    assert_dumps(&now, &dump(&sandbox.catalog));
    sandbox.assert_valid();
    edit(
        &sandbox,
        "DELETE FROM block_copies WHERE volume = 1; DELETE FROM volumes WHERE number = 1",
    );
    let said = summary(&register(&sandbox, &["--volumes", word]).code(0));
    assert_eq!(said["volumes"][0]["new"], true, "{said}");
    assert_dumps(&now, &dump(&sandbox.catalog));
    sandbox.assert_valid();
    // One of another catalog is not taken in.
    let other = Sandbox::new();
    data::mixed_tree(&other.source, 5, 3);
    other.backup();
    edit(
        &sandbox,
        "DELETE FROM block_copies WHERE volume = 1; DELETE FROM volumes WHERE number = 1",
    );
    let foreign = other.path("volume");
    register(&sandbox, &["--volumes", foreign.to_str().unwrap()]).code(2);
    register(&sandbox, &["--volumes", word, word]).code(2);
}

#[test]
fn killed_anywhere_it_is_done_again() {
    need_tool("strace");
    let (sandbox, volumes) = store();
    let before = dump(&sandbox.catalog);
    let index = volumes[0].join(".rt_volume_index");
    let mut killed = 0;
    for call in ["rename", "fsync", "fdatasync", "pwrite64"] {
        for n in (1..60).step_by(if call == "pwrite64" { 5 } else { 1 }) {
            let good = fs::read(&index).unwrap();
            fs::write(&index, &good[..good.len() / 2]).unwrap();
            edit(
                &sandbox,
                "DELETE FROM chunks WHERE block = 1; DELETE FROM blocks WHERE number = 3",
            );
            let mut command = Command::new("strace");
            let inject = format!("--inject={call}:signal=KILL:when={n}");
            let trace = format!("trace={call}");
            command.args(["-f", "-qq", "-o", "/dev/null", "-e", &trace, &inject]).arg(RAIDTAPE);
            command.arg("--catalog").arg(&sandbox.catalog).arg("rebuild-catalog");
            let ran = run(command.stdin(Stdio::null()));
            let is_done = ran.exit_code().is_some();
            killed += u32::from(!is_done);
            register(&sandbox, &[]);
            assert_dumps(&before, &dump(&sandbox.catalog));
            sandbox.assert_valid();
            if is_done {
                break;
            }
        }
    }
    assert!(killed > 5, "{killed}");
    data::noise_file(&sandbox.source.join("more"), 9, 20_000);
    sandbox.ok(args!["backup", &sandbox.source]);
    sandbox.assert_valid();
}
