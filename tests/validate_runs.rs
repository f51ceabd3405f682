//! Validation of runs: what the volumes know of them against what the catalog says, and what is
//! done where the catalog has lost one.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use raidtape::catalog::WriteLock;
use raidtape::progress::Progress;
use raidtape::snapshot::Snapshots;
use raidtape::validate::{self, Options, Part, Report};
use rusqlite::Connection;

use crate::common::{Sandbox, data};
use crate::damage::flip;

fn check_with(sandbox: &Sandbox, options: &Options) -> Report {
    let snapshots = Snapshots::open(&sandbox.catalog, 1 << 20).unwrap();
    validate::run(&snapshots, options, &Progress::default()).unwrap()
}

fn check(sandbox: &Sandbox) -> Report {
    check_with(sandbox, &Options::default())
}

fn texts(report: &Report) -> Vec<String> {
    report.faults.items.iter().map(|it| it.message.clone()).collect()
}

/// A store with two runs, links and attributes among their files.
fn store() -> Sandbox {
    let sandbox = Sandbox::with(&["--block-size", "1MiB"]);
    let at = |name: &str| sandbox.source.join(name);
    data::mixed_tree(&sandbox.source, 310, 30);
    fs::create_dir_all(at("dir/below")).unwrap();
    fs::write(at("dir/below/file"), "one").unwrap();
    fs::write(at("dir/old"), "goes").unwrap();
    fs::write(at("linked"), "two names").unwrap();
    fs::hard_link(at("linked"), at("dir/link")).unwrap();
    std::os::unix::fs::symlink("dir/below", at("to")).unwrap();
    sandbox.backup();
    fs::write(at("dir/below/file"), "another").unwrap();
    fs::remove_file(at("dir/old")).unwrap();
    fs::hard_link(at("linked"), at("third")).unwrap();
    sandbox.backup();
    sandbox
}

/// The catalog as it is, as one file.
fn keep(sandbox: &Sandbox) -> Vec<u8> {
    let conn = Connection::open(&sandbox.catalog).unwrap();
    conn.pragma_update(None, "journal_mode", "DELETE").unwrap();
    drop(conn);
    fs::read(&sandbox.catalog).unwrap()
}

fn put_back(sandbox: &Sandbox, bytes: &[u8]) {
    for suffix in ["-wal", "-shm"] {
        let _ = fs::remove_file(PathBuf::from(format!("{}{suffix}", sandbox.catalog.display())));
    }
    fs::write(&sandbox.catalog, bytes).unwrap();
}

#[test]
fn what_a_run_has_not_stored_is_found() {
    let sandbox = store();
    assert!(check(&sandbox).is_clean(), "{:?}", check(&sandbox));
    let whole = keep(&sandbox);
    let file = "name = CAST('file' AS BLOB) AND first_run = 2";
    let mut missed = Vec::new();
    for (sql, words) in [
        (format!("UPDATE entries SET mtime_s = mtime_s + 1 WHERE {file}"), "'dir/below/file'"),
        (format!("UPDATE entries SET uid = 1234567 WHERE {file}"), "metadata or contents"),
        (format!("UPDATE entries SET ino = ino + 1 WHERE {file}"), "run 2: metadata"),
        (format!("UPDATE entries SET name = CAST('eile' AS BLOB) WHERE {file}"), "run 2: names"),
        (
            "UPDATE entries SET version = version + 1000000 WHERE name = CAST('third' AS BLOB)"
                .to_owned(),
            "'third'",
        ),
        (
            "UPDATE entries SET last_run = 9223372036854775807 \
             WHERE name = CAST('old' AS BLOB)"
                .to_owned(),
            "and has counted",
        ),
        (
            "UPDATE entries SET last_run = 1 WHERE name = CAST('to' AS BLOB)".to_owned(),
            "and has counted",
        ),
        (
            "UPDATE versions SET extra = CAST(x'0109' || 'dir/belov' AS BLOB) \
             WHERE version = (SELECT version FROM entries WHERE name = CAST('to' AS BLOB))"
                .to_owned(),
            "'to'",
        ),
        (
            "UPDATE versions SET hash = zeroblob(32) WHERE version = \
             (SELECT max(version) FROM uses)"
                .to_owned(),
            "metadata or contents",
        ),
        ("UPDATE owners SET name = CAST('x' AS BLOB)".to_owned(), "run 1: owners"),
        ("INSERT INTO run_problems VALUES (2, 0, x'61', 'io', 'none')".to_owned(), "problems"),
        ("UPDATE runs SET files = files + 1 WHERE run = 1".to_owned(), "and has counted"),
    ] {
        let conn = Connection::open(&sandbox.catalog).unwrap();
        assert!(conn.execute(&sql, []).unwrap() > 0, "{sql}");
        drop(conn);
        let texts = texts(&check(&sandbox));
        if !texts.iter().any(|it| it.contains(words)) {
            missed.push(format!("{sql}: not {words:?} but {texts:#?}"));
        }
        put_back(&sandbox, &whole);
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
    sandbox.assert_valid();
}

#[test]
fn a_catalog_that_has_lost_a_finished_run_is_found_and_not_written() {
    let sandbox = store();
    let before = keep(&sandbox);
    fs::write(sandbox.source.join("new"), "later").unwrap();
    sandbox.backup();
    let after = keep(&sandbox);
    put_back(&sandbox, &before);
    let text = sandbox.run(["validate"]).code(5).text();
    assert!(text.contains("it has lost run 3") && text.contains("catalog-restore"), "{text}");
    let source = sandbox.source.to_str().unwrap();
    for line in [vec!["backup", source], vec!["genmeta"], vec!["replicate"]] {
        let errors = sandbox.run(&line).code(5).errors();
        assert!(errors.contains("run 3") && errors.contains("catalog-restore"), "{errors}");
    }
    // Each of the two marks says enough.
    fs::remove_file(sandbox.path("volume/meta/.complete")).unwrap();
    assert!(texts(&check(&sandbox)).iter().any(|it| it.contains("has lost run 3")));
    put_back(&sandbox, &after);
    sandbox.backup();
    sandbox.assert_valid();
}

#[test]
fn a_run_of_which_nobody_can_say_whether_it_was_finished_is_no_fault() {
    let sandbox = store();
    let before = keep(&sandbox);
    fs::write(sandbox.source.join("new"), "later").unwrap();
    sandbox.backup_with(&["--no-meta", "--no-catalog-copy"]);
    put_back(&sandbox, &before);
    let report = check(&sandbox);
    assert!(report.is_clean(), "{report:?}");
    let runs: Vec<i64> = report.strangers.items.iter().map(|it| it.run).collect();
    assert_eq!(runs, [3]);
    let text = sandbox.ok(["validate"]).text();
    assert!(text.contains("either it was never acknowledged"), "{text}");
    assert_eq!(sandbox.ok(["validate", "--json"]).json()["strangers"][0]["run"], 3);
    // As after a kill before the commit: nothing has to be done.
    sandbox.backup();
    assert!(check(&sandbox).strangers.is_empty());
}

#[test]
fn a_copy_of_the_catalog_that_is_damaged_is_named() {
    let sandbox = store();
    let at = |run: i64| sandbox.path(&format!("volume/catalog/run-{run:08}.sqlite.zst"));
    let len = fs::metadata(at(2)).unwrap().len() as usize;
    for place in [0, 5, len / 3, len / 2, len - 1] {
        flip(&at(2), place as u64);
        let report = check(&sandbox);
        let parts: Vec<Part> = report.faults.items.iter().map(|it| it.part).collect();
        assert_eq!(parts, [Part::Copy], "{place}: {report:?}");
        flip(&at(2), place as u64);
    }
    let whole = fs::read(at(2)).unwrap();
    fs::copy(at(1), at(2)).unwrap();
    assert!(texts(&check(&sandbox))[0].contains("not of after its run"));
    fs::write(at(2), &whole[..len / 2]).unwrap();
    assert!(!check(&sandbox).is_clean());
    // Of what is gone nothing is wrong.
    fs::remove_file(at(2)).unwrap();
    sandbox.assert_valid();
}

#[test]
fn with_a_limit_of_time_the_catalog_has_its_turn() {
    let sandbox = store();
    let in_time = Options { max_duration: Some(Duration::from_secs(0)), ..Options::default() };
    let is_skipped = || check_with(&sandbox, &in_time).catalog_checked.is_some();
    let health = sandbox.path("catalog.health");
    let set = |sql: &str| {
        assert!(Connection::open(&health).unwrap().execute(sql, []).unwrap() > 0, "{sql}");
    };
    assert!(!is_skipped(), "it was never checked");
    assert!(is_skipped());
    set("UPDATE copies SET verified_s = verified_s - 100");
    set("UPDATE copies SET verified_s = verified_s - 1 WHERE volume = 'catalog'");
    assert!(!is_skipped(), "each copy was verified since");
    // Without a limit it is checked always; what is wrong makes its turn come.
    let whole = keep(&sandbox);
    let conn = Connection::open(&sandbox.catalog).unwrap();
    conn.execute("UPDATE runs SET files = files + 1", []).unwrap();
    drop(conn);
    assert!(!check(&sandbox).is_clean());
    assert!(!is_skipped());
    put_back(&sandbox, &whole);
    assert!(!is_skipped() && is_skipped());
}

#[test]
fn who_asks_for_the_lock_does_not_have_it() {
    let sandbox = store();
    assert!(!WriteLock::is_held(&sandbox.catalog).unwrap());
    let lock = WriteLock::take(&sandbox.catalog).unwrap();
    assert!(WriteLock::is_held(&sandbox.catalog).unwrap());
    drop(lock);
    // Somebody asks all the time, and who writes gets it all the same.
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = WriteLock::is_held(&sandbox.catalog);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        for _ in 0..200 {
            drop(WriteLock::take(&sandbox.catalog).unwrap());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn a_job_repairs_what_it_has_found() {
    let sandbox = store();
    let mount = sandbox.mount();
    let meta = fs::read_dir(sandbox.path("volume/meta")).unwrap();
    let is_meta = |it: &PathBuf| it.extension().is_some_and(|it| it == "zst");
    let meta = meta.map(|it| it.unwrap().path()).find(is_meta).unwrap();
    fs::write(&meta, "damaged").unwrap();
    let said = crate::genmeta::ask(&mount, "validate", "--repair");
    assert_eq!(said["state"], "done", "{said}");
    assert!(said["summary"].as_str().unwrap().starts_with("repair: 0 copies"), "{said}");
    drop(mount);
    sandbox.assert_valid();
}
