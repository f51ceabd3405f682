//! What recovery says and leaves behind: remedies that work, trials that change nothing, and what
//! is not believed.
//!
//! Invariant: what is compared is bytes of files, the logical dump, and what a later command does.

use std::fs;
use std::path::{Path, PathBuf};

use raidtape::catalog::copy;
use raidtape::progress::Progress;
use raidtape::snapshot::Snapshots;
use raidtape::validate::{self, Options};
use rusqlite::Connection;

use crate::common::{Ran, Sandbox, args, data};
use crate::rebuild::{assert_dumps, dump, manifest, on, seal};

/// Two volumes, of which the second has the last run.
fn store() -> (Sandbox, [PathBuf; 2]) {
    let sandbox = Sandbox::with(&["--block-size", "1MiB"]);
    data::mixed_tree(&sandbox.source, 1, 10);
    sandbox.backup();
    let second = sandbox.add_volume("second");
    seal(&sandbox, 1);
    data::noise_file(&sandbox.source.join("late"), 3, 50_000);
    sandbox.backup();
    let first = sandbox.path("volume");
    (sandbox, [first, second])
}

fn edit(catalog: &Path, statements: &str) {
    let conn = Connection::open(catalog).unwrap();
    conn.pragma_update(None, "foreign_keys", false).unwrap();
    conn.execute_batch(statements).unwrap();
}

/// Every file of a directory, by name.
fn files_of(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(dir).unwrap().map(|it| it.unwrap().path());
    let mut files: Vec<_> =
        entries.filter(|it| it.is_file()).map(|it| (it.clone(), fs::read(&it).unwrap())).collect();
    files.sort();
    files
}

fn problems(ran: &Ran) -> String {
    ran.json_lines().pop().unwrap()["problem_list"].to_string()
}

#[test]
fn blocks_of_a_volume_that_was_away_are_taken_in_as_is_said() {
    let (sandbox, [first, second]) = store();
    let before = dump(&sandbox.catalog);
    let new = sandbox.path("new");
    fs::rename(&second, sandbox.path("away")).unwrap();
    // The first one alone knows the second run, whose manifest is on both, and not its blocks.
    fs::copy(manifest(&sandbox.path("away"), 2), manifest(&first, 2)).unwrap();
    let ran = on(&new, args!["rebuildmeta", "--json", "--volumes", &first]).code(3);
    assert!(problems(&ran).contains("raidtape rebuild-catalog --volumes"), "{}", problems(&ran));
    let ran = on(&new, args!["dump", "2", "late"]);
    let said = ran.errors();
    assert!(said.contains("rebuild-catalog --volumes"), "{said}");
    fs::rename(sandbox.path("away"), &second).unwrap();
    on(&new, args!["rebuild-catalog", "--volumes", &second]).code(0);
    assert_dumps(&before, &dump(&new));
    on(&new, args!["validate"]).code(0);
    // With all volumes there, what is on none is lost, and nothing will bring it back.
    let [(block, _)] = &sandbox.blocks("second")[..] else { panic!() };
    fs::remove_file(block).unwrap();
    fs::write(second.join(".rt_volume_index"), "").unwrap();
    let line = args!["rebuildmeta", "--json", "--volumes", &first, &second];
    let ran = on(&sandbox.path("lost"), line).code(3);
    assert!(problems(&ran).contains("they are lost"), "{}", problems(&ran));
}

#[test]
fn a_copy_of_before_what_is_lost_is_no_remedy() {
    let (sandbox, [first, second]) = store();
    for run in 3..5u8 {
        fs::write(sandbox.source.join("more"), [run; 9]).unwrap();
        sandbox.backup_with(&["--no-catalog-copy"]);
    }
    // Every manifest of a run away, and what is said then.
    let without = |run: u64| {
        let here = [&first, &second].into_iter().filter(|it| manifest(it, run).exists());
        let here: Vec<_> = here.collect();
        let kept: Vec<_> = here.iter().map(|it| fs::read(manifest(it, run)).unwrap()).collect();
        here.iter().for_each(|it| fs::remove_file(manifest(it, run)).unwrap());
        let line = args!["rebuildmeta", "--volumes", &first, &second];
        let said = on(&sandbox.path("new"), line).code(5).errors();
        let back = here.iter().zip(kept);
        back.for_each(|(it, kept)| fs::write(manifest(it, run), kept).unwrap());
        said
    };
    let said = without(3);
    assert!(said.contains("run 3") && !said.contains("catalog-restore"), "{said}");
    let said = without(2);
    assert!(said.contains("after run 2: raidtape catalog-restore"), "{said}");
}

#[test]
fn a_trial_changes_no_byte_and_leaves_no_file() {
    let (sandbox, volumes) = store();
    // Of an earlier schema, with a block that is lost, and a log that a killed process has left.
    let statements = "DELETE FROM chunks; DROP TABLE attribute_kinds; DELETE FROM blocks; \
                      PRAGMA user_version = 2";
    let dir = sandbox.path("cold");
    fs::create_dir(&dir).unwrap();
    let catalog = dir.join("catalog");
    let conn = Connection::open(&sandbox.catalog).unwrap();
    conn.pragma_update(None, "foreign_keys", false).unwrap();
    conn.execute_batch(statements).unwrap();
    for suffix in ["", "-wal", "-shm"] {
        let name = format!("catalog{suffix}");
        fs::copy(sandbox.path(&name), dir.join(&name)).unwrap();
    }
    drop(conn);
    assert!(fs::metadata(dir.join("catalog-wal")).unwrap().len() > 0);
    fs::write(dir.join("catalog.lock"), "").unwrap();
    let outside = |files: Vec<(PathBuf, Vec<u8>)>| {
        // The lock says who had it; shared memory has nothing that is not in the log.
        let is_state = |it: &PathBuf| !it.ends_with("catalog.lock") && !it.ends_with("catalog-shm");
        files.into_iter().filter(|it| is_state(&it.0)).collect::<Vec<_>>()
    };
    let names = |files: &[(PathBuf, Vec<u8>)]| -> Vec<PathBuf> {
        files.iter().map(|it| it.0.clone()).collect()
    };
    let before = files_of(&dir);
    let lie: Vec<_> = volumes.iter().map(|it| files_of(it)).collect();
    for options in [&["--dry-run"][..], &["--dry-run", "--scan"]] {
        let line = args!["rebuild-catalog", "--json"].into_iter();
        let said = on(&catalog, line.chain(options.iter().map(Into::into))).code(0);
        assert_ne!(said.json_lines().pop().unwrap()["blocks_added"], 0);
        let after = files_of(&dir);
        assert_eq!(names(&before), names(&after));
        assert!(outside(before.clone()) == outside(after));
        assert!(lie.iter().zip(&volumes).all(|(was, it)| *was == files_of(it)));
    }
    let out = sandbox.path("out");
    for line in [
        args!["backup", "--dry-run", &sandbox.source].to_vec(),
        args!["revert-to-run", "--dry-run", "latest", &out].to_vec(),
    ] {
        on(&catalog, line).code(0);
        assert!(outside(before.clone()) == outside(files_of(&dir)));
    }
    assert!(!out.exists());
    // One that was killed is in nobody's way.
    fs::write(dir.join("catalog.rebuilding"), "half").unwrap();
    on(&catalog, args!["rebuild-catalog", "--dry-run"]).code(0);
    assert!(!dir.join("catalog.rebuilding").exists());
    // Without a log none comes, nor is one left.
    on(&catalog, args!["rebuild-catalog"]).code(0);
    let clean = files_of(&dir);
    on(&catalog, args!["rebuild-catalog", "--dry-run"]).code(0);
    assert_eq!(names(&clean), names(&files_of(&dir)));
    assert!(outside(clean) == outside(files_of(&dir)));
}

#[test]
fn a_run_that_only_the_log_of_the_old_catalog_has_keeps_its_number() {
    let (sandbox, volumes) = store();
    let dir = sandbox.path("cold");
    fs::create_dir(&dir).unwrap();
    let catalog = dir.join("catalog");
    let names = ["catalog", "catalog-wal", "catalog-shm"];
    // Somebody has the catalog open, so that the log is not emptied when the backup ends.
    let open = Connection::open(&sandbox.catalog).unwrap();
    open.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    let all =
        volumes.clone().map(|it| (it.clone(), sandbox.path("kept").join(it.file_name().unwrap())));
    fs::create_dir(sandbox.path("kept")).unwrap();
    for (from, to) in &all {
        crate::common::tool("cp", args!["-a", from, to]);
    }
    fs::write(sandbox.source.join("third"), "third").unwrap();
    assert_eq!(sandbox.backup()["run"], 3);
    for name in names {
        fs::copy(sandbox.path(name), dir.join(name)).unwrap();
    }
    drop(open);
    let log = fs::read(dir.join("catalog-wal")).unwrap();
    // Volumes that know nothing of that run: put back from before it.
    for (from, to) in &all {
        fs::remove_dir_all(from).unwrap();
        fs::rename(to, from).unwrap();
    }
    let ran = on(&catalog, args!["catalog-restore", "--json"]).code(3);
    let said = ran.json_lines().pop().unwrap();
    assert!(problems(&ran).contains("newest run was 3"), "{}", problems(&ran));
    let kept = format!("{}-wal", said["kept"].as_str().unwrap());
    assert!(fs::read(kept).unwrap() == log);
    let run = on(&catalog, args!["backup", &sandbox.source, "--json"]).code(0).json();
    assert_eq!(run["run"], 4, "{run}");
    on(&catalog, args!["validate"]).code(0);
}

#[test]
fn strange_runs_and_copies_are_counted_and_few_kept() {
    let (sandbox, [first, _]) = store();
    let path = manifest(&first, 1);
    let text = zstd::decode_all(&*fs::read(&path).unwrap()).unwrap();
    let text = String::from_utf8(text).unwrap();
    let (before, last) = text.trim_end().rsplit_once('\n').unwrap();
    for run in 100..1150u64 {
        let before = before.replacen("\"run\":1,", &format!("\"run\":{run},"), 1) + "\n";
        let mut last: serde_json::Value = serde_json::from_str(last).unwrap();
        let hash = raidtape::chunk::HashAlgo::Blake3;
        last["digest"] = hash.hash(before.as_bytes()).to_string().into();
        let text = format!("{before}{last}\n");
        fs::write(manifest(&first, run), zstd::encode_all(text.as_bytes(), 1).unwrap()).unwrap();
    }
    let snapshots = Snapshots::open(&sandbox.catalog, 1 << 20).unwrap();
    let report = validate::run(&snapshots, &Options::default(), &Progress::default()).unwrap();
    assert!(report.is_clean(), "{:?}", report.faults);
    let runs: Vec<i64> = report.strangers.items.iter().map(|it| it.run).collect();
    assert_eq!((runs.len(), report.strangers.count), (1000, 1050));
    assert_eq!((runs.first(), runs.last()), (Some(&100), Some(&1099)));
    let text = sandbox.ok(["validate"]).text();
    assert!(text.contains("and 50 more runs that are not in the catalog"), "{text}");
    let said = sandbox.ok(["validate", "--json"]).json();
    assert_eq!(said["stranger_count"], 1050);
    assert_eq!(said["strangers"].as_array().unwrap().len(), 1000);
}

#[test]
fn a_copy_of_another_catalog_is_named_and_never_taken() {
    let (sandbox, volumes) = store();
    let before = dump(&sandbox.catalog);
    let other = Sandbox::new();
    data::mixed_tree(&other.source, 5, 3);
    other.backup();
    let foreign = other.path("volume").join(copy::document_name(1));
    // As of a run that is there, and of one that nobody knows.
    for (volume, run) in [(&volumes[1], 2), (&volumes[0], 90)] {
        fs::create_dir_all(volume.join("catalog")).unwrap();
        fs::copy(&foreign, volume.join(copy::document_name(run))).unwrap();
    }
    let said = sandbox.ok(["validate", "--json"]).json();
    assert_eq!(said["foreign_copy_count"], 2, "{said}");
    let text = sandbox.ok(["validate"]).text();
    assert!(text.contains("run-00000090.sqlite.zst is a copy of another catalog"), "{text}");
    let line = args!["rebuildmeta", "--json", "--volumes", &volumes[0], &volumes[1]];
    let new = sandbox.path("new");
    let ran = on(&new, line).code(3);
    assert!(problems(&ran).contains("a copy of another catalog"), "{}", problems(&ran));
    assert_dumps(&before, &dump(&new));
    let ran = sandbox.run(["catalog-restore", "--json"]).code(3);
    assert!(problems(&ran).contains("another catalog"), "{}", problems(&ran));
    assert_dumps(&before, &dump(&sandbox.catalog));
    // A catalog that was rebuilt has another id, and its volumes copies of both: none is strange.
    fs::remove_file(volumes[0].join(copy::document_name(90))).unwrap();
    fs::remove_file(volumes[1].join(copy::document_name(2))).unwrap();
    fs::write(sandbox.source.join("more"), "more").unwrap();
    on(&new, args!["backup", &sandbox.source]).code(0);
    let said = on(&new, args!["validate", "--json"]).code(0).json();
    assert_eq!(said["foreign_copy_count"], 0, "{said}");
}

#[test]
fn a_bad_row_of_a_run_costs_that_run() {
    let (sandbox, _) = store();
    let forged = "INSERT INTO runs SELECT 7, 'forged', source, path, started_s, started_n, \
                  finished_s, finished_n, added, modified, deleted, unchanged, dirs_added, \
                  dirs_modified, dirs_deleted, dirs_unchanged, files, bytes, bytes_read, \
                  bytes_stored, problems, host, program, comment FROM runs WHERE run = 2";
    let good = fs::read(&sandbox.catalog).unwrap();
    let cases = [
        (forged, 7, vec![1, 2]),
        ("UPDATE runs SET started_n = -1 WHERE run = 1", 1, vec![2]),
        ("UPDATE runs SET source = 99 WHERE run = 2", 2, vec![1]),
    ];
    for (statement, bad, whole) in cases {
        edit(&sandbox.catalog, statement);
        let ran = sandbox.run(["runs", "--json"]).code(5);
        let listed: Vec<i64> =
            ran.json().as_array().unwrap().iter().map(|it| it["run"].as_i64().unwrap()).collect();
        assert_eq!(listed, whole, "{statement}");
        assert!(ran.errors().contains(&format!("run {bad} is damaged")), "{}", ran.errors());
        // A good run is restored by its number; what is newest is not guessed.
        let out = sandbox.path(&format!("out {bad}"));
        sandbox.ok(args!["revert-to-run", whole[0].to_string(), &out]);
        let latest = sandbox.path(&format!("latest {bad}"));
        let ran = sandbox.run(args!["restore-folder", "/", &latest, "--run", "latest"]);
        let is_doubtful = bad > *whole.last().unwrap();
        assert_eq!(ran.exit_code(), Some(if is_doubtful { 5 } else { 0 }), "{}", ran.errors());
        assert!(!is_doubtful || ran.errors().contains(&format!("run {bad}")), "{}", ran.errors());
        sandbox.run(["validate"]).code(5);
        sandbox.run(args!["backup", &sandbox.source]);
        fs::write(&sandbox.catalog, &good).unwrap();
        for suffix in ["-wal", "-shm"] {
            let _ = fs::remove_file(sandbox.path(&format!("catalog{suffix}")));
        }
    }
}

#[test]
fn what_the_program_leaves_beside_a_catalog_is_not_backed_up() {
    let sandbox = Sandbox::new();
    let dir = sandbox.path("home");
    fs::create_dir(&dir).unwrap();
    let catalog = dir.join("c");
    let volume = sandbox.path("other volume");
    on(&catalog, args!["init", "--reserve", "0"]).code(0);
    on(&catalog, args!["add-volume", &volume]).code(0);
    fs::write(dir.join("mine"), "mine").unwrap();
    on(&catalog, args!["backup", &dir]).code(0);
    on(&catalog, args!["catalog-restore"]).code(0);
    for name in ["c.rebuilding", "c.rebuilding-scratch", "c.copy"] {
        fs::write(dir.join(name), "half").unwrap();
    }
    let kept = fs::read_dir(&dir).unwrap().map(|it| it.unwrap().file_name());
    assert!(kept.into_iter().any(|it| it.to_str().unwrap().starts_with("c.replaced-")));
    on(&catalog, args!["backup", &dir, "--force-read"]).code(0);
    let listed = on(&catalog, args!["ls", "2", "--json"]).code(0).text();
    assert!(listed.contains("mine"), "{listed}");
    for name in ["c.replaced", "c.rebuilding", "c.copy", "c.lock"] {
        assert!(!listed.contains(name), "{name}: {listed}");
    }
}
