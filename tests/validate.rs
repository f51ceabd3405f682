//! Validation: what is planted is found and named, by the options that look at it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use raidtape::catalog::{Health, Reader};
use raidtape::progress::Progress;
use raidtape::snapshot::Snapshots;
use raidtape::validate::{self, Options, Part, Report, Sample};
use rusqlite::Connection;
use serde_json::Value;

use crate::common::{Sandbox, args, data};
use crate::damage::flip;

/// A store with two runs: blocks of their own, shared ones, holes, links and empty files.
fn store() -> Sandbox {
    let sandbox = Sandbox::with(&["--block-size", "1MiB"]);
    let at = |name: &str| sandbox.source.join(name);
    data::mixed_tree(&sandbox.source, 210, 40);
    data::noise_file(&at("large"), 211, 9 << 20);
    data::noise_file(&at("twin a"), 212, 5000);
    data::noise_file(&at("twin b"), 213, 5000);
    let sparse = fs::File::create(at("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"data", 8 << 20).unwrap();
    sparse.set_len(16 << 20).unwrap();
    fs::create_dir_all(at("dir/below")).unwrap();
    fs::write(at("dir/below/file"), "one").unwrap();
    sandbox.backup();
    data::noise_file(&at("later"), 214, 3 << 20);
    fs::write(at("dir/below/file"), "another").unwrap();
    sandbox.backup();
    sandbox
}

fn check(sandbox: &Sandbox, options: &Options) -> Report {
    let snapshots = Snapshots::open(&sandbox.catalog, 1 << 20).unwrap();
    validate::run(&snapshots, options, &Progress::default()).unwrap()
}

fn all() -> Options {
    Options::default()
}

fn files() -> Options {
    Options { files: true, ..Options::default() }
}

fn of_run(run: i64) -> Options {
    Options { run: Some(run), ..Options::default() }
}

fn in_time(secs: u64) -> Options {
    Options { max_duration: Some(Duration::from_secs(secs)), ..Options::default() }
}

/// The texts of all faults.
fn texts(report: &Report) -> Vec<String> {
    report.faults.items.iter().map(|it| it.message.clone()).collect()
}

/// Changes the catalog, looks at it, and changes it back.
fn with_sql(sandbox: &Sandbox, sql: &str, look: impl FnOnce()) {
    let connect = || Connection::open(&sandbox.catalog).unwrap();
    // One file, with nothing in its log.
    connect().pragma_update(None, "journal_mode", "DELETE").unwrap();
    let before = fs::read(&sandbox.catalog).unwrap();
    let conn = connect();
    conn.execute_batch("PRAGMA foreign_keys = OFF; PRAGMA ignore_check_constraints = ON").unwrap();
    let changes = conn.total_changes();
    conn.execute_batch(sql).unwrap();
    assert!(conn.total_changes() > changes, "{sql}");
    drop(conn);
    look();
    for suffix in ["-wal", "-shm"] {
        let mut name = sandbox.catalog.clone().into_os_string();
        name.push(suffix);
        let _ = fs::remove_file(name);
    }
    fs::write(&sandbox.catalog, before).unwrap();
}

#[test]
fn faults_of_the_catalog_are_named() {
    let sandbox = store();
    let valid = check(&sandbox, &files());
    assert!(valid.is_clean() && valid.files > 40, "{valid:?}");
    let used = "(SELECT version FROM uses LIMIT 1)";
    let file = "(SELECT child FROM entries WHERE name = CAST('below' AS BLOB))";
    let mut missed = Vec::new();
    for (sql, words) in [
        ("DELETE FROM uses WHERE version = (SELECT min(version) FROM uses)", "is not noted"),
        ("INSERT INTO uses VALUES ((SELECT max(number) FROM blocks), 999999)", "and does not"),
        ("INSERT INTO versions VALUES (999999, zeroblob(32), x'', NULL)", "belongs to no entry"),
        (&format!("UPDATE entries SET child = 99999 WHERE child = {file}"), "is not there"),
        (
            &format!("UPDATE entries SET last_run = 1 WHERE child = {file}"),
            "its directory does not",
        ),
        ("UPDATE entries SET last_run = 2 WHERE last_run = 1 AND child IS NULL", "lives twice"),
        ("UPDATE entries SET data_len = data_len + 1 WHERE data_len > 0", "data_len"),
        ("UPDATE entries SET data_len = 1 WHERE name = CAST('large' AS BLOB)", "data_len"),
        ("UPDATE entries SET size = size + 1 WHERE name = CAST('large' AS BLOB)", "cover its size"),
        ("UPDATE entries SET first_run = 7 WHERE name = CAST('later' AS BLOB)", "there are not"),
        ("UPDATE entries SET mode = 65536 WHERE name = CAST('large' AS BLOB)", "impossible mode"),
        ("UPDATE blocks SET plain_len = plain_len + 1 WHERE number = 1", "those of its frames"),
        ("UPDATE blocks SET frames = x'05' WHERE number = 1", "block 1"),
        ("DELETE FROM blocks WHERE number = 1", "beyond block 1"),
        ("UPDATE chunks SET at = at + 1 WHERE id = (SELECT min(id) FROM chunks)", "it is at"),
        ("DELETE FROM chunks WHERE id = (SELECT min(id) FROM chunks)", "is not in the catalog"),
        ("INSERT INTO chunks VALUES (randomblob(32), 1, 0, 1)", "1 chunks are in no volume's"),
        (
            "UPDATE chunks SET len = 1 << 40 WHERE id = (SELECT min(id) FROM chunks)",
            "reaches beyond",
        ),
        ("UPDATE block_copies SET record_at = record_at + 1 WHERE block = 1", "has no record"),
        ("UPDATE volumes SET index_len = index_len + 1", "damaged at byte"),
        (
            &format!(
                "UPDATE versions SET extra = \
                 CAST(x'0210' || 'security.selinux' || x'0178' AS BLOB) WHERE version = {used}"
            ),
            "of a kind that is said not to be there",
        ),
        (
            "UPDATE versions SET extra = x'ff' WHERE version = (SELECT min(version) FROM uses)",
            "extra",
        ),
        ("UPDATE settings SET v = 'x' WHERE k = 'last_dir'", "last_dir"),
    ] {
        with_sql(&sandbox, sql, || {
            let report = check(&sandbox, &all());
            let texts = texts(&report);
            if !texts.iter().any(|it| it.contains(words)) {
                missed.push(format!("{sql}: not {words:?} but {texts:#?}"));
            }
        });
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
    with_sql(&sandbox, "DELETE FROM block_copies WHERE block = 1", || {
        let report = check(&sandbox, &all());
        let bad = &report.bad_blocks.items[0];
        assert!(bad.reason.contains("no known volume") && bad.files.count > 0, "{report:?}");
    });
    assert!(check(&sandbox, &all()).is_clean());
}

#[test]
fn a_file_of_the_wrong_bytes_is_found_by_reading_files() {
    let sandbox = store();
    let version =
        |name: &str| format!("(SELECT version FROM entries WHERE name = CAST('{name}' AS BLOB))");
    let (a, b) = (version("twin a"), version("twin b"));
    // Both say what is there, and the other's bytes.
    let sql = format!(
        "CREATE TEMP TABLE t AS SELECT version, extents FROM versions WHERE version IN ({a}, {b});
         UPDATE versions SET extents = (SELECT extents FROM t WHERE t.version <> versions.version)
         WHERE version IN ({a}, {b})"
    );
    with_sql(&sandbox, &sql, || {
        let report = check(&sandbox, &all());
        assert!(report.bad_files.is_empty() && report.bad_blocks.is_empty());
        let names = |report: &Report| {
            let names = report.bad_files.items.iter().flat_map(|it| &it.files.items);
            let mut names: Vec<Vec<u8>> = names.map(|it| it.path.clone()).collect();
            names.sort();
            names
        };
        for options in [files(), Options { files: true, ..of_run(1) }] {
            let report = check(&sandbox, &options);
            assert_eq!(names(&report), [b"twin a".to_vec(), b"twin b".to_vec()]);
        }
    });
}

/// All ways to change a file a little, at `count` places.
fn flips(path: &Path, count: usize, mut look: impl FnMut(usize)) {
    let whole = fs::read(path).unwrap();
    let step = (whole.len() / count).max(1);
    for at in (0..whole.len()).step_by(step) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x41;
        fs::write(path, bytes).unwrap();
        look(at);
    }
    fs::write(path, whole).unwrap();
}

fn files_in(dir: PathBuf, end: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(dir).unwrap().map(|it| it.unwrap().path());
    let mut files: Vec<PathBuf> = files.filter(|it| it.to_str().unwrap().ends_with(end)).collect();
    files.sort();
    files
}

#[test]
fn a_flipped_byte_beside_the_blocks_is_found_where_it_is() {
    let sandbox = store();
    let volume = sandbox.path("volume");
    let only = |report: &Report, part: Part, what: &str| {
        let parts: Vec<Part> = report.faults.items.iter().map(|it| it.part).collect();
        assert!(!parts.is_empty() && parts.iter().all(|it| *it == part), "{what}: {report:?}");
        assert!(report.bad_blocks.is_empty(), "{what}: {report:?}");
    };
    let meta = files_in(volume.join("meta"), ".zst").remove(0);
    let text = zstd::decode_all(&fs::read(&meta).unwrap()[..]).unwrap();
    let mut found = 0;
    flips(&meta, 60, |at| {
        let report = check(&sandbox, &all());
        // Some bits of compressed data mean nothing.
        let same = zstd::decode_all(&fs::read(&meta).unwrap()[..]).is_ok_and(|it| it == text);
        match same {
            true => assert!(report.is_clean(), "meta at {at}: {report:?}"),
            false => only(&report, Part::Meta, &format!("meta at {at}")),
        }
        found += u32::from(!same);
    });
    assert!(found > 30);
    flips(&volume.join(".rt_volume_index"), 60, |at| {
        only(&check(&sandbox, &all()), Part::Index, &format!("index at {at}"));
    });
    for name in ["restore.sh", "RESTORE.txt"] {
        let mut damaged = fs::read(volume.join(name)).unwrap();
        let whole = damaged.clone();
        let at = damaged.len() - 20;
        damaged[at] ^= 1;
        fs::write(volume.join(name), damaged).unwrap();
        only(&check(&sandbox, &all()), Part::Volume, name);
        fs::write(volume.join(name), whole).unwrap();
    }
    let manifest = files_in(volume.join("manifests"), ".zst").remove(1);
    let whole = fs::read(&manifest).unwrap();
    let other = fs::read(files_in(volume.join("manifests"), ".zst").remove(0)).unwrap();
    for bytes in [&whole[..whole.len() - 3], &whole[..40], &b"x"[..], &other] {
        fs::write(&manifest, bytes).unwrap();
        only(&check(&sandbox, &all()), Part::Manifest, "manifest");
        only(&check(&sandbox, &of_run(2)), Part::Manifest, "manifest of run 2");
        assert!(check(&sandbox, &of_run(1)).is_clean());
    }
    fs::remove_file(&manifest).unwrap();
    assert!(texts(&check(&sandbox, &all()))[0].contains("is missing"));
    fs::write(&manifest, whole).unwrap();
    let whole = fs::read(&meta).unwrap();
    fs::remove_file(&meta).unwrap();
    assert!(texts(&check(&sandbox, &all()))[0].ends_with("it is missing"));
    fs::write(&meta, whole).unwrap();
    sandbox.assert_valid();
}

#[test]
fn what_no_run_knows_is_waste_and_no_fault() {
    let sandbox = store();
    let dir = sandbox.path("volume/chunks/ab/cd");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join(format!("abcd{}", "0".repeat(60))), "left").unwrap();
    let report = check(&sandbox, &all());
    assert!(report.is_clean());
    assert_eq!((report.waste.count, report.waste_bytes), (1, 4));
    let text = sandbox.ok(["validate"]).text();
    assert!(text.contains("1 block files, 4 B, are not in the catalog"), "{text}");
}

/// The blocks with their runs, by what metas say.
fn blocks_by_last_use(sandbox: &Sandbox) -> BTreeMap<i64, Vec<PathBuf>> {
    let mut found: BTreeMap<i64, Vec<PathBuf>> = BTreeMap::new();
    for (block, _) in sandbox.blocks("volume") {
        let name = format!("{}.meta.json.zst", block.file_name().unwrap().to_str().unwrap());
        let meta = fs::File::open(sandbox.path("volume/meta").join(name)).unwrap();
        let meta: Value = serde_json::from_reader(zstd::Decoder::new(meta).unwrap()).unwrap();
        let first = meta["mappings"].as_array().unwrap().iter().map(|it| &it["runs"][0]);
        found.entry(first.map(|it| it.as_i64().unwrap()).min().unwrap()).or_default().push(block);
    }
    found
}

#[test]
fn a_run_is_looked_at_alone() {
    let sandbox = store();
    let blocks = blocks_by_last_use(&sandbox);
    let (older, newer) = (&blocks[&1], &blocks[&2][0]);
    let reports = [of_run(1), of_run(2)].map(|it| check(&sandbox, &it));
    assert!(reports.iter().all(Report::is_clean));
    assert_eq!(reports[0].blocks, older.len() as u64);
    flip(newer, 100);
    assert!(check(&sandbox, &of_run(1)).is_clean());
    let report = check(&sandbox, &of_run(2));
    assert_eq!(report.bad_blocks.count, 1);
    let bad = &report.bad_blocks.items[0];
    assert_eq!(bad.files.items[0].runs, [2]);
    assert!(bad.chunks.count > 0);
    let line = ["validate", "--run", "2"];
    let text = sandbox.run(line).code(5).text();
    assert!(text.contains(&format!("    chunk {}", bad.chunks.items[0])), "{text}");
    sandbox.run(["validate", "--run", "9"]).code(1);
    sandbox.run(["validate", "--run", "1", "--max-duration", "1s"]).code(2);
}

#[test]
fn a_sample_is_a_part_and_can_be_taken_again() {
    let sandbox = store();
    let count = sandbox.blocks("volume").len() as u64;
    let part = |percent, seed| {
        let sample = Some(Sample { percent, seed });
        check(&sandbox, &Options { sample, ..Options::default() }).blocks
    };
    assert_eq!(part(100.0, 1), count);
    let parts: Vec<u64> = (0..20).map(|seed| part(50.0, seed)).collect();
    assert!(parts.iter().any(|it| *it > 0) && parts.iter().any(|it| *it < count), "{parts:?}");
    assert_eq!(part(50.0, 7), parts[7]);
    // A block is in the sample, or its damage is not found.
    flip(&sandbox.blocks("volume")[0].0, 50);
    let found = (0..20).filter(|seed| {
        let sample = Some(Sample { percent: 50.0, seed: *seed });
        !check(&sandbox, &Options { sample, ..Options::default() }).is_clean()
    });
    assert!((1..20).contains(&found.count()));
    let said = sandbox.run(["validate", "--sample", "100%", "--json"]).code(5).json();
    let seed = said["seed"].as_u64().unwrap().to_string();
    sandbox.run(["validate", "--sample", "100", "--seed", &seed]).code(5);
    sandbox.run(["validate", "--sample", "0%"]).code(2);
}

#[test]
fn step_by_step_everything_is_verified_and_the_oldest_first() {
    let sandbox = store();
    let count = sandbox.blocks("volume").len() as u64;
    for n in 1..=count {
        let report = check(&sandbox, &in_time(0));
        assert!(report.is_clean());
        let coverage = report.coverage;
        assert_eq!((report.blocks, coverage.verified, coverage.copies), (1, n, count));
        assert_eq!(coverage.never(), count - n);
        assert!(report.is_cut_short || n == count);
    }
    // As if one had been verified long ago, and the others later, but not today.
    let health = sandbox.path("catalog.health");
    let conn = Connection::open(&health).unwrap();
    let sql = "UPDATE copies SET verified_s = 2000;
               UPDATE copies SET verified_s = 1000 WHERE block = (SELECT max(block) FROM copies)";
    conn.execute_batch(sql).unwrap();
    let oldest = || check(&sandbox, &in_time(0)).coverage.oldest.unwrap().secs;
    assert_eq!(oldest(), 2000);
    for _ in 2..count {
        assert_eq!(oldest(), 2000);
    }
    assert!(oldest() > 2000);
    let text = sandbox.ok(["validate", "--max-duration", "1h"]).text();
    assert!(text.starts_with("Solid: "), "{text}");
    drop(conn);
    // Known to be bad, it stays a fault, and does not keep the others from their turn.
    let block = sandbox.blocks("volume")[1].0.clone();
    flip(&block, 60);
    Connection::open(&health).unwrap().execute("UPDATE copies SET verified_s = 7", []).unwrap();
    let reports: Vec<Report> = (0..count).map(|_| check(&sandbox, &in_time(0))).collect();
    let found = reports.iter().position(|it| !it.is_clean()).unwrap();
    assert!(reports[found..].iter().all(|it| !it.is_clean()));
    assert_eq!(reports[found].bad_blocks.count, 1);
    let last = &reports[count as usize - 1];
    let coverage = last.coverage;
    assert_eq!((coverage.verified, coverage.bad, coverage.never()), (count - 1, 1, 0));
    let bad = Health::open(&sandbox.catalog).bad(None, 9);
    assert_eq!(bad.len(), 1);
    assert_eq!(bad[0].block.to_string(), block.file_name().unwrap().to_str().unwrap());
    assert!(bad[0].reason.contains("hash"));
    flip(&block, 60);
    let report = check(&sandbox, &in_time(3600));
    assert!(report.is_clean() && report.coverage.bad == 0, "{report:?}");
}

#[test]
fn a_volume_that_is_not_there_is_no_damage() {
    let sandbox = store();
    let count = sandbox.blocks("volume").len() as u64;
    fs::rename(sandbox.path("volume"), sandbox.path("away")).unwrap();
    let report = sandbox.run(["validate", "--json"]).code(4).json();
    assert_eq!(report["bad_block_count"], count, "{report}");
    assert_eq!(report["faults"][0]["part"], "volume", "{report}");
    // What was not looked at is neither good nor bad.
    assert_eq!(report["coverage"]["never"], count, "{report}");
    fs::rename(sandbox.path("away"), sandbox.path("volume")).unwrap();
    sandbox.assert_valid();
}

#[test]
fn many_faults_are_counted_and_few_kept() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 220, 1500);
    sandbox.backup();
    with_sql(&sandbox, "UPDATE entries SET size = size + 1 WHERE kind = 1", || {
        let report = check(&sandbox, &all());
        assert_eq!(report.faults.items.len(), 1000);
        assert!(report.faults.count >= 1500, "{}", report.faults.count);
        let text = sandbox.run(["validate"]).code(5).text();
        assert!(text.contains(" more faults"), "{text}");
    });
}

#[test]
fn a_job_takes_the_same_options() {
    let sandbox = store();
    let mount = sandbox.mount();
    let ask = |line: &str| crate::genmeta::ask(&mount, "validate", line);
    let said = ask("--run 1");
    assert_eq!(said["state"], "done", "{said}");
    let blocks = format!("solid: {} blocks", blocks_by_last_use(&sandbox)[&1].len());
    assert!(said["summary"].as_str().unwrap().starts_with(&blocks), "{said}");
    let said = ask("--max-duration 0s");
    assert!(said["summary"].as_str().unwrap().ends_with("the time was over"), "{said}");
    assert_eq!(ask("--run 77")["state"], "failed");
    let line = args!["validate", "--seed", "1"];
    sandbox.run(line).code(2);
    drop(Reader::open(&sandbox.catalog).unwrap());
}
