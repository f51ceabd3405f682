//! A catalog taken back from its copies on the volumes, and what came after them replayed.
//!
//! Invariant: what comes back is compared by the logical dump with what was there, and what was
//! there is kept, byte for byte.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use raidtape::catalog::{WriteLock, copy};
use serde_json::{Value, json};

use crate::common::{RAIDTAPE, Ran, Sandbox, args, data, need_tool, run};
use crate::rebuild::{any_history, assert_dumps, dump, forge, manifest, seal};

/// Three volumes of which the middle one is left by the first runs; a run after each change.
fn store() -> (Sandbox, Vec<PathBuf>) {
    let sandbox = Sandbox::with(&["--block-size", "1MiB"]);
    data::mixed_tree(&sandbox.source, 1, 12);
    sandbox.backup_with(&["--tag", "first"]);
    let second = sandbox.add_volume("second");
    data::noise_file(&sandbox.source.join("large"), 2, 3 << 20);
    sandbox.backup();
    seal(&sandbox, 1);
    data::noise_file(&sandbox.source.join("late"), 3, 50_000);
    sandbox.backup();
    fs::remove_file(sandbox.source.join("large")).unwrap();
    sandbox.backup();
    let first = sandbox.path("volume");
    (sandbox, vec![first, second])
}

fn copy_on(volume: &Path, run: i64) -> PathBuf {
    volume.join(copy::document_name(run))
}

/// Restores the sandbox's catalog from these volumes.
fn restore(sandbox: &Sandbox, volumes: &[PathBuf], options: &[&str]) -> Ran {
    let mut line = args!["catalog-restore", "--json"].to_vec();
    line.extend(options.iter().map(OsString::from));
    if !volumes.is_empty() {
        line.push("--volumes".into());
        line.extend(volumes.iter().map(OsString::from));
    }
    sandbox.run(line)
}

fn summary(ran: &Ran) -> Value {
    ran.json_lines().pop().unwrap()
}

/// The catalog is gone, and what belongs to it.
fn burn(sandbox: &Sandbox) {
    for suffix in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(sandbox.path(&format!("catalog{suffix}")));
    }
}

#[test]
fn the_newest_copy_comes_back_and_what_follows_is_replayed() {
    let (sandbox, volumes) = store();
    let before = dump(&sandbox.catalog);
    // Copies of different ages: run 2 on both, runs 3 and 4 on the second one.
    assert_eq!(copy::list(&volumes[0]).unwrap(), [2, 1]);
    assert_eq!(copy::list(&volumes[1]).unwrap(), [4, 3, 2]);
    let check = |volumes: &[PathBuf], code: i32, after: i64, replayed: &[i64]| {
        burn(&sandbox);
        let said = summary(&restore(&sandbox, volumes, &[]).code(code));
        assert_eq!(
            (&said["after"], &said["replayed"]),
            (&json!(after), &json!(replayed)),
            "{said}"
        );
        assert_eq!(said.get("kept"), None);
        assert_dumps(&before, &dump(&sandbox.catalog));
        match code {
            0 => sandbox.assert_valid(),
            _ => {
                let report = sandbox.run(["validate", "--json"]).code(5).json();
                let faults = report["faults"].as_array().unwrap();
                assert!(!faults.is_empty() && faults.iter().all(|it| it["part"] == "copy"));
            }
        }
        said
    };
    check(&volumes, 0, 4, &[]);
    fs::remove_file(copy_on(&volumes[1], 4)).unwrap();
    // That there was a copy of after run 4 is not known any more.
    check(&volumes, 0, 3, &[4]);
    // Damaged ones are named, and the next older is taken, also of another volume.
    let mut bytes = fs::read(copy_on(&volumes[1], 3)).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(copy_on(&volumes[1], 3), &bytes).unwrap();
    fs::write(copy_on(&volumes[1], 2), "nonsense").unwrap();
    let said = check(&volumes, 3, 2, &[3, 4]);
    let copy = copy_on(&volumes[0], 2);
    assert_eq!(said["copy"], copy.to_str().unwrap());
    let reversed: Vec<PathBuf> = volumes.iter().rev().cloned().collect();
    let said = check(&reversed, 3, 2, &[3, 4]);
    let problems = said["problem_list"].to_string();
    for run in [2, 3] {
        assert!(problems.contains(copy_on(&volumes[1], run).to_str().unwrap()), "{problems}");
    }
    // It goes on where it was.
    data::noise_file(&sandbox.source.join("more"), 9, 20_000);
    let said = sandbox.backup();
    assert_eq!((&said["run"], &said["added"]), (&json!(5), &json!(1)), "{said}");
    // The damaged copies go when there is a good one.
    sandbox.ok(["validate", "--repair"]);
    assert_eq!(copy::list(&volumes[1]).unwrap(), [5]);
    let newest = copy_on(&volumes[1], 5);
    fs::write(&newest, "nonsense").unwrap();
    sandbox.ok(["validate", "--repair"]);
    sandbox.assert_valid();
    assert!(fs::metadata(newest).unwrap().len() > 1000);
}

#[test]
fn the_old_catalog_is_kept_and_names_its_volumes() {
    let (sandbox, volumes) = store();
    let before = dump(&sandbox.catalog);
    let kept_of = |said: &Value| PathBuf::from(said["kept"].as_str().unwrap());
    // Still good: it says where its volumes are.
    let said = summary(&restore(&sandbox, &[], &[]).code(0));
    let kept = kept_of(&said);
    assert_dumps(&before, &dump(&kept));
    assert_dumps(&before, &dump(&sandbox.catalog));
    // Damaged, with a log that the new one must not take for its own.
    let damaged = vec![7; 50_000];
    fs::write(&sandbox.catalog, &damaged).unwrap();
    fs::write(sandbox.path("catalog-wal"), "a log").unwrap();
    let ran = restore(&sandbox, &[], &[]).code(2);
    assert!(ran.errors().contains("--volumes"), "{}", ran.errors());
    let said = summary(&restore(&sandbox, &volumes, &[]).code(0));
    let kept = kept_of(&said);
    assert_eq!(fs::read(&kept).unwrap(), damaged);
    assert_eq!(fs::read(format!("{}-wal", kept.display())).unwrap(), b"a log");
    assert_dumps(&before, &dump(&sandbox.catalog));
    sandbox.assert_valid();
    assert!(!sandbox.path("catalog.rebuilding").exists());
    // Somebody writes it.
    let lock = WriteLock::take(&sandbox.catalog).unwrap();
    restore(&sandbox, &volumes, &[]).code(11);
    drop(lock);
    // What a killed one has left is in nobody's way.
    fs::write(sandbox.path("catalog.rebuilding"), "half").unwrap();
    fs::write(sandbox.path("catalog.rebuilding-wal"), "half").unwrap();
    fs::write(sandbox.path("catalog.rebuilding-scratch"), "half").unwrap();
    restore(&sandbox, &volumes, &[]).code(0);
    assert_dumps(&before, &dump(&sandbox.catalog));
}

#[test]
fn without_a_good_copy_nothing_is_touched() {
    let (sandbox, volumes) = store();
    let other = Sandbox::new();
    data::mixed_tree(&other.source, 5, 3);
    other.backup();
    for volume in &volumes {
        fs::rename(volume.join("catalog"), volume.join("away")).unwrap();
    }
    let old = fs::read(&sandbox.catalog).unwrap();
    let ran = restore(&sandbox, &volumes, &[]).code(1);
    assert!(ran.errors().contains("rebuildmeta"), "{}", ran.errors());
    // One of another catalog, and one that is not of the run that its name says.
    fs::create_dir(volumes[0].join("catalog")).unwrap();
    fs::copy(copy_on(&other.path("volume"), 1), copy_on(&volumes[0], 1)).unwrap();
    fs::copy(volumes[1].join("away/run-00000003.sqlite.zst"), copy_on(&volumes[0], 4)).unwrap();
    let ran = restore(&sandbox, &volumes, &[]).code(5);
    let said = ran.errors();
    assert!(said.contains("rebuildmeta") && said.contains("another catalog"), "{said}");
    assert!(said.contains("a catalog of after run 3"), "{said}");
    assert_eq!(fs::read(&sandbox.catalog).unwrap(), old);
    assert!(
        !fs::read_dir(sandbox.path(""))
            .unwrap()
            .any(|it| { it.unwrap().file_name().to_str().unwrap().contains(".replaced-") })
    );
}

#[test]
fn runs_after_the_copy_are_chosen_as_in_a_rebuilding() {
    let (sandbox, volumes) = store();
    let before = dump(&sandbox.catalog);
    fs::remove_file(copy_on(&volumes[1], 4)).unwrap();
    fs::remove_file(copy_on(&volumes[1], 3)).unwrap();
    let newest = manifest(&volumes[1], 4);
    let good = fs::read(&newest).unwrap();
    let same = |code: i32, words: &[&str]| {
        let said = summary(&restore(&sandbox, &volumes, &[]).code(code));
        let problems = said["problem_list"].to_string();
        words.iter().for_each(|it| assert!(problems.contains(it), "{it}: {problems}"));
        assert_eq!(said["replayed"], json!([3, 4]));
        assert_dumps(&before, &dump(&sandbox.catalog));
    };
    // Damaged on one volume; run 3 forged on one, which run 4 knows better.
    fs::write(&newest, &good[..good.len() / 2]).unwrap();
    same(3, &[newest.to_str().unwrap()]);
    fs::write(&newest, &good).unwrap();
    let third = manifest(&volumes[0], 3);
    let good_third = fs::read(&third).unwrap();
    forge(&third, |text| text.replacen("\"uid\":", "\"uid\":7", 1));
    same(3, &[third.to_str().unwrap()]);
    fs::write(&third, &good_third).unwrap();
    // What nothing decides.
    forge(&newest, |text| text.replacen("\"comment\":\"\"", "\"comment\":\"x\"", 1));
    let ran = restore(&sandbox, &volumes, &[]).code(5);
    assert!(ran.errors().contains("run 4"), "{}", ran.errors());
    fs::write(&newest, &good).unwrap();
    same(0, &[]);
    // A lost one, and what builds on it.
    for volume in &volumes {
        fs::remove_file(manifest(volume, 3)).unwrap();
    }
    let ran = restore(&sandbox, &volumes, &[]).code(5);
    let said = ran.errors();
    assert!(said.contains("manifest of run 3") && said.contains("--allow-gaps"), "{said}");
    assert!(!said.contains("catalog-restore"), "{said}");
    let said = summary(&restore(&sandbox, &volumes, &["--allow-gaps"]).code(3));
    assert_eq!((&said["runs"], &said["runs_lost"]), (&json!(2), &json!(2)), "{said}");
    assert_eq!(sandbox.backup()["run"], 5);
}

#[test]
fn a_copy_of_another_history_is_not_gone_on_from() {
    let (sandbox, volumes) = store();
    let before = dump(&sandbox.catalog);
    // The second volume's copy of after run 3 has another run 3 than the manifests.
    let from = copy_on(&volumes[1], 3);
    let path = sandbox.path("unpacked");
    drop(copy::unpack(&from, &path, &|| Ok(())).unwrap());
    let conn = rusqlite::Connection::open(&path).unwrap();
    conn.execute("UPDATE runs SET uuid = 'another' WHERE run = 3", []).unwrap();
    conn.pragma_update(None, "journal_mode", "DELETE").unwrap();
    drop(conn);
    let bytes = fs::read(&path).unwrap();
    fs::write(&from, zstd::encode_all(&bytes[..], 1).unwrap()).unwrap();
    fs::remove_file(copy_on(&volumes[1], 4)).unwrap();
    let said = summary(&restore(&sandbox, &volumes, &[]).code(3));
    assert_eq!((&said["after"], &said["replayed"]), (&json!(2), &json!([3, 4])), "{said}");
    assert!(said["problem_list"].to_string().contains("two histories"), "{said}");
    assert_dumps(&before, &dump(&sandbox.catalog));
}

#[test]
fn volumes_are_where_they_are_now_and_a_missing_one_is_known_by_its_blocks() {
    let (sandbox, volumes) = store();
    let before = dump(&sandbox.catalog);
    let moved = sandbox.path("moved");
    fs::rename(&volumes[0], &moved).unwrap();
    burn(&sandbox);
    restore(&sandbox, &[moved.clone(), volumes[1].clone()], &[]).code(0);
    let path = |it: &Path| format!("\"path\":\"{}\"", it.to_str().unwrap());
    let now = before.replace(&path(&volumes[0]), &path(&moved));
    assert_dumps(&now, &dump(&sandbox.catalog));
    sandbox.assert_valid();
    // Away: its blocks are known all the same, and are there when it is.
    let said = summary(&restore(&sandbox, &volumes[1..], &[]).code(3));
    assert_eq!((&said["volumes_missing"], &said["blocks_lacking"]), (&json!(1), &json!(0)));
    let status = sandbox.ok(["volumes", "--json"]).json();
    assert_eq!(status[0]["status"], "missing");
    sandbox.ok(args!["volumes", "--readopt", &moved]);
    assert_dumps(&now, &dump(&sandbox.catalog));
    sandbox.assert_valid();
}

#[test]
fn any_history_comes_back() {
    let options = |n, has_copy: bool| match has_copy || n == 0 {
        true => Vec::new(),
        false => args!["--no-catalog-copy"].to_vec(),
    };
    any_history(options, |sandbox, volumes| {
        let before = dump(&sandbox.catalog);
        loop {
            // With each copy that there is, from the newest to the oldest.
            let newest =
                volumes.iter().filter_map(|it| copy::list(it).unwrap().first().copied()).max();
            let Some(run) = newest else { break };
            let said = summary(&restore(sandbox, &volumes, &[]).code(0));
            assert_eq!(said["after"], run);
            assert_dumps(&before, &dump(&sandbox.catalog));
            sandbox.assert_valid();
            for volume in &volumes {
                let _ = fs::remove_file(copy_on(volume, run));
            }
        }
        let said = sandbox.backup();
        let same = sandbox.ok(args!["backup", &sandbox.source, "--json", "--dry-run"]).json();
        assert_eq!((&same["added"], &same["modified"]), (&json!(0), &json!(0)), "{said} {same}");
    });
}

#[test]
fn killed_anywhere_it_is_done_again() {
    need_tool("strace");
    let (sandbox, volumes) = store();
    let before = dump(&sandbox.catalog);
    fs::remove_file(copy_on(&volumes[1], 4)).unwrap();
    fs::remove_file(copy_on(&volumes[1], 3)).unwrap();
    // One of the indexes has to be written anew too.
    let index = volumes[0].join(".rt_volume_index");
    let good = fs::read(&index).unwrap();
    let mut killed = 0;
    for call in ["rename", "linkat", "fsync", "unlink"] {
        for n in 1..40 {
            fs::write(&index, &good[..good.len() / 2]).unwrap();
            let mut command = Command::new("strace");
            let inject = format!("--inject={call}:signal=KILL:when={n}");
            let trace = format!("trace={call}");
            command.args(["-f", "-qq", "-o", "/dev/null", "-e", &trace, &inject]).arg(RAIDTAPE);
            command.arg("--catalog").arg(&sandbox.catalog).arg("catalog-restore");
            command.arg("--volumes").args(&volumes).stdin(Stdio::null());
            let ran = run(&mut command);
            if ran.exit_code() == Some(3) {
                break;
            }
            assert_eq!(ran.exit_code(), None, "{}", ran.errors());
            killed += 1;
            restore(&sandbox, &volumes, &[]);
            assert_dumps(&before, &dump(&sandbox.catalog));
            sandbox.assert_valid();
        }
    }
    assert!(killed > 10, "{killed}");
}

#[test]
fn two_histories_are_not_mixed() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 881, 10);
    sandbox.add_volume("second");
    let at = |name: &str| sandbox.path(name);
    sandbox.backup();
    // The second volume is away, its catalog lives on, and so does another one on the first.
    fs::copy(&sandbox.catalog, at("other")).unwrap();
    fs::write(sandbox.source.join("here"), "here").unwrap();
    let line = |catalog: &str| args!["backup", &sandbox.source, "--catalog", &at(catalog)];
    fs::rename(at("second"), at("away")).unwrap();
    sandbox.backup();
    fs::rename(at("away"), at("second")).unwrap();
    fs::rename(at("volume"), at("away")).unwrap();
    fs::write(sandbox.source.join("there"), "there").unwrap();
    sandbox.ok(line("other"));
    fs::write(sandbox.source.join("more"), "more").unwrap();
    sandbox.ok(line("other"));
    fs::rename(at("away"), at("volume")).unwrap();
    // Each of them has acknowledged a run 2, and none may go.
    let refused = sandbox.run(line("other")).code(5);
    assert!(refused.errors().contains("two histories"), "{}", refused.errors());
    sandbox.run(line("catalog")).code(5);
    let before = dump(&sandbox.catalog);
    let all = [at("volume"), at("second")];
    let refused = restore(&sandbox, &all, &[]).code(5);
    assert!(refused.errors().contains("two histories"), "{}", refused.errors());
    assert_dumps(&before, &dump(&sandbox.catalog));
    for (catalog, volume, runs) in [("new 1", "volume", 2), ("new 2", "second", 3)] {
        let line = args!["rebuildmeta", "--catalog", &at(catalog), "--volumes", &at(volume)];
        // What lies on the other one is named.
        sandbox.run(line);
        let listed = sandbox.ok(args!["runs", "--json", "--catalog", &at(catalog)]).json();
        assert_eq!(listed.as_array().unwrap().len(), runs);
    }
}

#[test]
fn a_log_of_a_catalog_that_is_gone_is_nobodys() {
    let (sandbox, volumes) = store();
    let before = dump(&sandbox.catalog);
    burn(&sandbox);
    fs::write(sandbox.path("catalog-wal"), "a log").unwrap();
    sandbox.run(args!["init"]).code(2);
    let line = args!["rebuildmeta", "--volumes"].into_iter();
    sandbox.ok(line.chain(volumes.iter().map(|it| it.clone().into_os_string())));
    assert_dumps(&before, &dump(&sandbox.catalog));
    sandbox.assert_valid();
}

#[test]
fn a_run_that_only_the_note_knows_is_a_gap_and_its_number_stays_its_own() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 882, 10);
    sandbox.backup();
    fs::write(sandbox.source.join("more"), "more").unwrap();
    sandbox.backup_with(&["--no-catalog-copy"]);
    let volume = sandbox.path("volume");
    fs::remove_file(volume.join("manifests/run-00000002.jsonl.zst")).unwrap();
    burn(&sandbox);
    let volumes = [volume];
    restore(&sandbox, &volumes, &[]).code(5);
    restore(&sandbox, &volumes, &["--allow-gaps"]).code(3);
    let said = sandbox.backup();
    assert_eq!(said["run"], 3, "{said}");
    sandbox.assert_valid();
}
