//! A catalog made anew from its volumes alone: the same as before, whatever has become of a part.
//!
//! Invariant: what comes back is compared as a whole, by the logical dump, and what cannot come
//! back is named; nothing is compared with what the rebuilding itself says.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use raidtape::catalog::Reader;
use raidtape::chunk::HashAlgo;
use serde_json::Value;

use crate::common::data;
use crate::common::world::{World, op};
use crate::common::{RAIDTAPE, Ran, Sandbox, Tree, args, assert_same, need_root, run, tool};

pub fn dump(catalog: &Path) -> String {
    let mut out = Vec::new();
    Reader::open(catalog).unwrap().write_logical_dump(&mut out).unwrap();
    String::from_utf8(out).unwrap()
}

/// The lines in which two dumps differ.
#[track_caller]
pub fn assert_dumps(before: &str, after: &str) {
    if before != after {
        let (old, new): (Vec<&str>, Vec<&str>) =
            (before.lines().collect(), after.lines().collect());
        let lost: Vec<_> = old.iter().filter(|it| !new.contains(it)).take(10).collect();
        let made: Vec<_> = new.iter().filter(|it| !old.contains(it)).take(10).collect();
        panic!("lost: {lost:#?}\nmade: {made:#?}");
    }
}

pub fn on(catalog: &Path, line: impl IntoIterator<Item = OsString>) -> Ran {
    let mut command = Command::new(RAIDTAPE);
    command.env_remove("RAIDTAPE_CATALOG").env_remove("RAIDTAPE_LOG").stdin(Stdio::null());
    run(command.arg("--catalog").arg(catalog).args(line))
}

/// Rebuilds into `name`; gives the new catalog and what the program said.
fn rebuild(sandbox: &Sandbox, name: &str, volumes: &[PathBuf], options: &[&str]) -> (PathBuf, Ran) {
    let catalog = sandbox.path(name);
    let line = args!["rebuildmeta", "--json", "--volumes"].into_iter();
    let line = line.chain(volumes.iter().map(OsString::from));
    let ran = on(&catalog, line.chain(options.iter().map(OsString::from)));
    (catalog, ran)
}

/// What the program said last.
fn summary(ran: &Ran) -> Value {
    ran.json_lines().pop().unwrap()
}

/// Two volumes; two runs on the first one and two on the second, of two sources.
fn store() -> (Sandbox, [PathBuf; 2]) {
    let sandbox = Sandbox::with(&["--block-size", "1MiB"]);
    data::mixed_tree(&sandbox.source, 1, 12);
    sandbox.backup_with(&["--tag", "first", "--comment", "a \"word\""]);
    fs::create_dir(sandbox.source.join("dir")).unwrap();
    data::noise_file(&sandbox.source.join("dir/large"), 2, 3 << 20);
    sandbox.backup();
    let second = sandbox.add_volume("second");
    seal(&sandbox, 1);
    let other = sandbox.path("other");
    fs::create_dir(&other).unwrap();
    data::noise_file(&other.join("only here"), 3, 100_000);
    sandbox.ok(args!["backup", &other]);
    fs::remove_dir_all(sandbox.source.join("dir")).unwrap();
    data::noise_file(&sandbox.source.join("late"), 4, 50_000);
    sandbox.backup();
    let first = sandbox.path("volume");
    (sandbox, [first, second])
}

pub fn seal(sandbox: &Sandbox, volume: i64) {
    let conn = rusqlite::Connection::open(&sandbox.catalog).unwrap();
    conn.execute("UPDATE volumes SET status = 'sealed' WHERE number = ?1", [volume]).unwrap();
}

pub fn manifest(volume: &Path, run: u64) -> PathBuf {
    volume.join(format!("manifests/run-{run:08}.jsonl.zst"))
}

/// Changes the text of a manifest; its last line says what fits the rest.
pub fn forge(path: &Path, change: impl FnOnce(String) -> String) {
    let text = String::from_utf8(zstd::decode_all(&*fs::read(path).unwrap()).unwrap()).unwrap();
    let (before, last) = text.trim_end().rsplit_once('\n').unwrap();
    let before = change(format!("{before}\n"));
    let mut last: Value = serde_json::from_str(last).unwrap();
    last["changes"] = (before.lines().count() - 1).into();
    last["digest"] = HashAlgo::Blake3.hash(before.as_bytes()).to_string().into();
    let text = format!("{before}{last}\n");
    fs::write(path, zstd::encode_all(text.as_bytes(), 1).unwrap()).unwrap();
}

#[test]
fn all_comes_back_and_goes_on() {
    let (sandbox, [first, second]) = store();
    let before = dump(&sandbox.catalog);
    for (name, volumes) in
        [("one", [first.clone(), second.clone()]), ("two", [second.clone(), first.clone()])]
    {
        let (new, ran) = rebuild(&sandbox, name, &volumes, &[]);
        let said = summary(&ran.code(0));
        assert_eq!((&said["runs"], &said["problems"]), (&4.into(), &0.into()), "{said}");
        assert_dumps(&before, &dump(&new));
    }
    let new = sandbox.path("one");
    on(&new, args!["validate"]).code(0);
    for run in 1..=4i64 {
        let out = sandbox.path(&format!("out {run}"));
        on(&new, args!["revert-to-run", run.to_string(), &out]).code(0);
        let before = sandbox.revert(run, &format!("before {run}"));
        assert_same(&Tree::of(&before), &Tree::of(&out));
    }
    // The next run finds all that is known, and is known by the next rebuilding.
    let said = on(&new, args!["backup", &sandbox.source, "--json"]).code(0).json();
    assert_eq!((&said["run"], &said["bytes_stored"]), (&5.into(), &0.into()), "{said}");
    assert_eq!((&said["added"], &said["modified"]), (&0.into(), &0.into()), "{said}");
    let (again, ran) = rebuild(&sandbox, "again", &[first, second], &[]);
    ran.code(0);
    assert_dumps(&dump(&new), &dump(&again));
    // The second volume came later: two of before are copied to it, and none is made anew.
    assert_eq!(on(&new, args!["genmeta", "--json"]).code(0).json()["manifests_written"], 2);
}

/// Plays random histories of two sources, on volumes that are sealed one after the other, and has
/// each looked at. `options` are those of a run, by its number and a coin.
pub fn any_history(
    options: impl Fn(usize, bool) -> Vec<OsString>,
    look: impl Fn(&Sandbox, Vec<PathBuf>),
) {
    need_root("owners, pipes and attributes of links are changed");
    let ops = prop::collection::vec(op(), 5..40);
    // Whether it is the other source that changes, how, and the coin.
    let steps = prop::collection::vec((any::<bool>(), ops, any::<bool>()), 2..7);
    let config = Config { cases: 8, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&steps, |steps| {
        let sandbox = Sandbox::with(&["--block-size", "1MiB", "--chunk-size", "4KiB"]);
        let other = sandbox.path("other");
        fs::create_dir(&other).unwrap();
        let mut worlds = [World::new(&sandbox.source), World::new(&other)];
        let mut volumes = vec![sandbox.path("volume")];
        for (n, (is_other, ops, coin)) in steps.iter().enumerate() {
            let world = &mut worlds[usize::from(*is_other)];
            ops.iter().for_each(|(op, when)| world.apply(op, *when));
            world.settle();
            if n % 2 == 1 {
                seal(&sandbox, volumes.len() as i64);
                volumes.push(sandbox.add_volume(&format!("volume {n}")));
            }
            let source = if *is_other { &other } else { &sandbox.source };
            let mut line = args!["backup", source, "--tag", format!("t{n}")].to_vec();
            line.extend(options(n, *coin));
            sandbox.ok(line);
        }
        look(&sandbox, volumes);
        Ok(())
    });
    result.unwrap();
}

#[test]
fn any_history_comes_back() {
    any_history(
        |_, _| args!["--comment", "\u{20ac}\n"].to_vec(),
        |sandbox, mut volumes| {
            volumes.reverse();
            let (new, ran) = rebuild(sandbox, "new", &volumes, &[]);
            ran.code(0);
            assert_dumps(&dump(&sandbox.catalog), &dump(&new));
            on(&new, args!["validate"]).code(0);
            // What genmeta makes anew leads to the same.
            for volume in &volumes {
                fs::remove_dir_all(volume.join("manifests")).unwrap();
                fs::create_dir(volume.join("manifests")).unwrap();
            }
            sandbox.ok(["genmeta"]);
            let (new, ran) = rebuild(sandbox, "after genmeta", &volumes, &[]);
            ran.code(0);
            assert_dumps(&dump(&sandbox.catalog), &dump(&new));
            let said = on(&new, args!["backup", &sandbox.source, "--json"]).code(0).json();
            let same = sandbox.ok(args!["backup", &sandbox.source, "--json", "--dry-run"]).json();
            assert_eq!(said["dirs"], same["dirs"], "{said}");
        },
    );
}

#[test]
fn a_volume_that_is_away_is_missed_by_every_file() {
    let (sandbox, [first, second]) = store();
    // The second volume came later: now it has the manifests of before too.
    sandbox.ok(["genmeta"]);
    let (new, ran) = rebuild(&sandbox, "new", std::slice::from_ref(&second), &[]);
    let ran = ran.code(3);
    let said = summary(&ran);
    assert_eq!((&said["runs"], &said["volumes_missing"]), (&4.into(), &1.into()), "{said}");
    let lines = ran.json_lines();
    let lacks = |path: &str| lines.iter().find(|it| it["path"] == path);
    assert_eq!(lacks("dir/large").unwrap()["runs"], serde_json::json!([2]));
    assert!(lacks("only here").is_none() && lacks("late").is_none());
    let away = sandbox.path("away");
    fs::rename(&first, &away).unwrap();
    let volumes = on(&new, args!["volumes", "--json"]).code(0).json();
    assert_eq!(
        (&volumes[0]["status"], &volumes[0]["path"]),
        (&"missing".into(), &first.to_str().unwrap().into())
    );
    let ran = on(&new, args!["restore", "dir/large", sandbox.path("x"), "--run", "2"]).code(4);
    assert!(ran.errors().contains("its volume was not there"), "{}", ran.errors());
    let ran = on(&new, args!["validate"]).code(4);
    assert!(ran.text().contains("dir/large"), "{}", ran.text());
    on(&new, args!["restore", "late", sandbox.path("late"), "--run", "4"]).code(0);
    // Nothing is lost when it is back.
    fs::rename(&away, &first).unwrap();
    let (whole, ran) = rebuild(&sandbox, "whole", &[first, second], &[]);
    ran.code(0);
    assert_dumps(&dump(&sandbox.catalog), &dump(&whole));
}

#[test]
fn metas_and_indexes_stand_in_for_each_other() {
    let (sandbox, volumes) = store();
    let before = dump(&sandbox.catalog);
    for (n, volume) in volumes.iter().enumerate() {
        let meta = volume.join("meta");
        tool("cp", args!["-a", &meta, sandbox.path(&format!("metas {n}"))]);
        fs::remove_dir_all(&meta).unwrap();
        fs::create_dir(&meta).unwrap();
    }
    let (new, ran) = rebuild(&sandbox, "without metas", &volumes, &[]);
    ran.code(0);
    assert_dumps(&before, &dump(&new));
    for (n, volume) in volumes.iter().enumerate() {
        fs::remove_dir(volume.join("meta")).unwrap();
        tool("cp", args!["-a", sandbox.path(&format!("metas {n}")), volume.join("meta")]);
        let index = volume.join(".rt_volume_index");
        // One is gone, one is damaged at its second record.
        if n == 0 {
            fs::remove_file(&index).unwrap();
        } else {
            let mut bytes = fs::read(&index).unwrap();
            let len = u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize;
            bytes[12 + len + 30] ^= 1;
            fs::write(&index, bytes).unwrap();
        }
    }
    let (new, ran) = rebuild(&sandbox, "without indexes", &volumes, &[]);
    let said = summary(&ran.code(3));
    assert!(said["problem_list"].to_string().contains("index"), "{said}");
    assert_dumps(&before, &dump(&new));
    on(&new, args!["validate"]).code(0);
    // The indexes have their records again.
    let (again, ran) = rebuild(&sandbox, "again", &volumes, &[]);
    ran.code(0);
    assert_dumps(&before, &dump(&again));
    data::noise_file(&sandbox.source.join("more"), 9, 10_000);
    on(&new, args!["backup", &sandbox.source]).code(0);
    on(&new, args!["validate"]).code(0);
}

#[test]
fn manifests_that_are_damaged_or_forged_are_named_and_do_not_count() {
    let (sandbox, [first, second]) = store();
    let before = dump(&sandbox.catalog);
    let volumes = [first.clone(), second.clone()];
    let mut n = 0;
    let mut named = |what: &Path| {
        n += 1;
        let (new, ran) = rebuild(&sandbox, &format!("new {n}"), &volumes, &[]);
        let said = summary(&ran.code(3));
        assert!(said["problem_list"].to_string().contains(what.to_str().unwrap()), "{said}");
        assert_dumps(&before, &dump(&new));
    };
    // Run 4 is on both; what is wrong on one is taken from the other.
    let path = manifest(&first, 4);
    let good = fs::read(&path).unwrap();
    fs::write(&path, &good[..good.len() - 5]).unwrap();
    named(&path);
    fs::write(&path, &good).unwrap();
    // Run 3 is on both too, and run 4 says which is right.
    let path = manifest(&second, 3);
    let good = fs::read(&path).unwrap();
    forge(&path, |text| text.replacen("\"uid\":", "\"uid\":7", 1));
    named(&path);
    forge(&path, |text| {
        let uuid = serde_json::from_str::<Value>(text.lines().next().unwrap()).unwrap();
        let uuid = uuid["uuid"].as_str().unwrap().to_owned();
        text.replace(&uuid, "00000000-0000-4000-8000-000000000000")
    });
    named(&path);
    fs::write(&path, &good).unwrap();
    // A meta that says more.
    let meta = fs::read_dir(second.join("meta")).unwrap().next().unwrap().unwrap().path();
    let good = fs::read(&meta).unwrap();
    let text = String::from_utf8(zstd::decode_all(&*good).unwrap()).unwrap();
    let text = text.replacen("\"size\":", "\"size\":1", 1);
    fs::write(&meta, zstd::encode_all(text.as_bytes(), 1).unwrap()).unwrap();
    named(&meta);
    fs::write(&meta, "nonsense").unwrap();
    named(&meta);
    fs::write(&meta, &good).unwrap();
    // A block that is described otherwise: the bytes decide.
    let text = String::from_utf8(zstd::decode_all(&*good).unwrap()).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    let chunk = value["chunks"][0][0].as_str().unwrap().to_owned();
    fs::write(
        &meta,
        zstd::encode_all(text.replace(&chunk, &"0".repeat(64)).as_bytes(), 1).unwrap(),
    )
    .unwrap();
    named(&second);
}

#[test]
fn what_nothing_decides_is_refused() {
    let (sandbox, [first, second]) = store();
    let volumes = [first.clone(), second.clone()];
    let refused = |name: &str, code: i32, words: &[&str]| {
        let (new, ran) = rebuild(&sandbox, name, &volumes, &[]);
        let ran = ran.code(code);
        words.iter().for_each(|it| assert!(ran.errors().contains(it), "{it}: {}", ran.errors()));
        assert!(!new.exists());
    };
    let path = manifest(&second, 4);
    let good = fs::read(&path).unwrap();
    forge(&path, |text| text.replacen("\"uid\":", "\"uid\":7", 1));
    refused("contradiction", 5, &["run 4", "move one"]);
    forge(&path, |text| {
        let head: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        text.replace(head["uuid"].as_str().unwrap(), "00000000-0000-4000-8000-000000000000")
    });
    refused("two runs", 5, &["two different runs have the number 4", path.to_str().unwrap()]);
    fs::write(&path, &good).unwrap();
    // A lost run, and what builds on it.
    for volume in &volumes {
        let _ = fs::remove_file(manifest(volume, 2));
    }
    let words = ["manifest of run 2", "Runs 4", "catalog-restore", "--allow-gaps"];
    refused("gap", 5, &words);
    let (new, ran) = rebuild(&sandbox, "gaps", &volumes, &["--allow-gaps"]);
    let said = summary(&ran.code(3));
    assert_eq!((&said["runs"], &said["runs_lost"]), (&2.into(), &2.into()), "{said}");
    let runs = on(&new, args!["runs", "--json"]).code(0).json();
    assert_eq!((&runs[0]["run"], &runs[1]["run"]), (&1.into(), &3.into()));
    // The manifests that were lost leave a chain with a gap: made anew, it is one again.
    on(&new, args!["genmeta"]).code(0);
    on(&new, args!["validate"]).code(0);
    // No number is given twice.
    let said = on(&new, args!["backup", &sandbox.source, "--json"]).code(0).json();
    assert_eq!(said["run"], 5, "{said}");
}

#[test]
fn a_manifest_leads_to_no_other_place() {
    let sandbox = Sandbox::new();
    fs::create_dir(sandbox.source.join("dir")).unwrap();
    fs::write(sandbox.source.join("dir/file"), "x").unwrap();
    fs::write(sandbox.source.join("plain"), "y").unwrap();
    sandbox.backup();
    let volume = sandbox.path("volume");
    let path = manifest(&volume, 1);
    let good = fs::read(&path).unwrap();
    let bad = [
        ("\"path\":\"dir/file\"", "\"path\":\"../file\""),
        ("\"path\":\"dir/file\"", "\"path\":\"dir/..\""),
        ("\"path\":\"dir/file\"", "\"path\":\"dir//file\""),
        ("\"path\":\"dir/file\"", "\"path\":\"/etc/passwd\""),
        ("\"path\":\"dir/file\"", "\"path\":\"dir/\\u0000\""),
        ("\"path\":\"dir/file\"", "\"path\":\"plain/file\""),
        ("\"path\":\"dir/file\"", "\"path\":\"plain\""),
        ("\"path\":\"dir/file\"", "\"path\":\"\""),
        ("\"path\":\"dir/file\"", "\"path_b64\":\"?\""),
        ("\"kind\":\"file\"", "\"kind\":\"thing\""),
        ("\"kind\":\"file\"", "\"kind\":\"symlink\""),
        ("\"op\":\"put\"", "\"op\":\"push\""),
        ("\"mode\":", "\"mode\":99999"),
        ("\"size\":1", "\"size\":2"),
        ("\"version\":", "\"version\":-"),
        ("\"version\":", "\"version\":99999999999999999"),
        ("\"mtime\":[", "\"mtime\":[1,9999999999],\"old\":["),
    ];
    for (n, (from, to)) in bad.iter().enumerate() {
        fs::write(&path, &good).unwrap();
        forge(&path, |text| {
            assert!(text.contains(from), "{from}");
            text.replacen(from, to, 1)
        });
        let (new, ran) = rebuild(&sandbox, &format!("new {n}"), std::slice::from_ref(&volume), &[]);
        let ran = ran.code(5);
        assert!(ran.errors().contains("line "), "{to}: {}", ran.errors());
        assert!(!new.exists());
    }
    let lines = [
        r#"{"op":"delete","path":"nothing"}"#,
        r#"{"op":"link","path":"new","version":900}"#,
        r#"{"op":"owner","kind":"dog","id":1,"name":"x"}"#,
        "nonsense",
    ];
    for (n, line) in lines.iter().enumerate() {
        fs::write(&path, &good).unwrap();
        forge(&path, |text| format!("{text}{line}\n"));
        let name = format!("line {n}");
        let (_, ran) = rebuild(&sandbox, &name, std::slice::from_ref(&volume), &[]);
        ran.code(5);
    }
    fs::write(&path, &good).unwrap();
    // What a killed one has left is in nobody's way, and what is there is not touched.
    let catalog = sandbox.path("new");
    fs::write(sandbox.path("new.rebuilding"), "half").unwrap();
    fs::write(sandbox.path("new.rebuilding-scratch"), "half").unwrap();
    let (_, ran) = rebuild(&sandbox, "new", std::slice::from_ref(&volume), &[]);
    ran.code(0);
    assert!(!sandbox.path("new.rebuilding").exists());
    assert!(!sandbox.path("new.rebuilding-scratch").exists());
    let before = fs::read(&catalog).unwrap();
    let (_, ran) = rebuild(&sandbox, "new", std::slice::from_ref(&volume), &[]);
    ran.code(2);
    assert_eq!(fs::read(&catalog).unwrap(), before);
    let twice = [volume.clone(), volume];
    rebuild(&sandbox, "twice", &twice, &[]).1.code(2);
}

#[test]
fn blocks_that_nothing_describes_are_read_by_their_bytes() {
    // Compressed, raw, both in one block, over several blocks, with holes; and what looks like
    // frames, and is content.
    let sandbox = Sandbox::with(&["--block-size", "1MiB", "--chunk-size", "16KiB"]);
    data::mixed_tree(&sandbox.source, 1, 20);
    let text = "all work and no play\n".repeat(1000);
    for n in 0..40 {
        fs::write(sandbox.source.join(format!("text {n}")), format!("{n}{text}")).unwrap();
        data::noise_file(&sandbox.source.join(format!("noise {n}")), n, 20_000);
        let frame = zstd::bulk::compress(format!("{text}{n}").as_bytes(), 3).unwrap();
        fs::write(sandbox.source.join(format!("frame {n}.zst")), frame).unwrap();
    }
    data::noise_file(&sandbox.source.join("large noise"), 99, 3 << 20);
    let lines: Vec<String> =
        (0..600_000u64).map(|it| (it * 7919 % 1_000_003).to_string()).collect();
    fs::write(sandbox.source.join("large text"), lines.join("\n")).unwrap();
    let sparse = fs::File::create(sandbox.source.join("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, text.as_bytes(), 1 << 20).unwrap();
    sparse.set_len(3 << 20).unwrap();
    sandbox.backup();
    let before = sandbox.revert(1, "before");
    let volume = sandbox.path("volume");
    fs::remove_dir_all(volume.join("meta")).unwrap();
    fs::create_dir(volume.join("meta")).unwrap();
    fs::remove_dir_all(volume.join("catalog")).unwrap();
    fs::remove_file(volume.join(".rt_volume_index")).unwrap();
    let volumes = [volume];
    let (new, ran) = rebuild(&sandbox, "new", &volumes, &[]);
    let ran = ran.code(3);
    let said = summary(&ran);
    // No wrong byte: what is there is right, and what is not is named.
    let out = sandbox.path("out");
    let restored = on(&new, args!["revert-to-run", "1", &out]);
    if said["blocks_lacking"] == 0 {
        restored.code(0);
        assert_same(&Tree::of(&before), &Tree::of(&out));
        on(&new, args!["validate", "--files"]);
    } else {
        let lines = ran.json_lines();
        let list = tool("find", args![&before, "-type", "f", "-printf", "%P\\n"]).text();
        for path in list.lines().map(PathBuf::from) {
            let is_named = lines.iter().any(|it| it["path"] == path.to_str().unwrap());
            let same = fs::read(before.join(&path)).ok() == fs::read(out.join(&path)).ok();
            assert!(same || is_named, "{}", path.display());
        }
    }
    let found = said["blocks"].as_u64().unwrap();
    assert!(found > said["blocks_lacking"].as_u64().unwrap(), "{said}");
    // What was learned is in the index from then on.
    on(&new, args!["genmeta"]);
    let (_, ran) = rebuild(&sandbox, "again", &volumes, &[]);
    let again = summary(&ran);
    assert_eq!(again["blocks"], said["blocks"], "{again}");
}

#[test]
fn a_volume_without_a_manifest_is_known_by_the_runs_or_refused() {
    let (sandbox, [first, second]) = store();
    // Run manifests of before the second volume came do not name it.
    sandbox.ok(["genmeta"]);
    let before = dump(&sandbox.catalog);
    let volumes = [first.clone(), second.clone()];
    for (n, damage) in [Some("nonsense"), None, Some("format=1\nvolume_id=")].iter().enumerate() {
        let path = second.join(".rt_volume_manifest");
        match damage {
            Some(text) => fs::write(&path, text).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let (new, ran) = rebuild(&sandbox, &format!("new {n}"), &volumes, &[]);
        let said = summary(&ran.code(3));
        assert!(said["problem_list"].to_string().contains("rt_volume_manifest"), "{said}");
        assert_dumps(&before, &dump(&new));
        on(&new, args!["validate"]).code(0);
        let has = |text: &str| {
            let kept = fs::read_dir(&second).unwrap().map(|it| it.unwrap());
            let mut kept = kept.filter(|it| it.file_name().to_str().unwrap().contains(".damaged-"));
            kept.any(|it| fs::read(it.path()).unwrap() == text.as_bytes())
        };
        assert!(damage.is_none_or(has));
        for entry in fs::read_dir(&second).unwrap().map(|it| it.unwrap()) {
            if entry.file_name().to_str().unwrap().contains(".damaged-") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        rebuild(&sandbox, &format!("again {n}"), &volumes, &[]).1.code(0);
    }
    // Both, or one of which no run says anything, or one of another catalog.
    let refused = |name: &str, volumes: &[PathBuf]| {
        let (new, ran) = rebuild(&sandbox, name, volumes, &[]);
        let ran = ran.code(5);
        assert!(ran.errors().contains("cannot be told"), "{}", ran.errors());
        assert!(!new.exists());
    };
    let good = volumes.clone().map(|it| fs::read(it.join(".rt_volume_manifest")).unwrap());
    for volume in &volumes {
        fs::write(volume.join(".rt_volume_manifest"), "").unwrap();
    }
    refused("both", &volumes);
    fs::write(first.join(".rt_volume_manifest"), &good[0]).unwrap();
    let other = Sandbox::new();
    fs::write(other.source.join("f"), "f").unwrap();
    other.backup();
    fs::write(other.path("volume/.rt_volume_manifest"), "").unwrap();
    refused("foreign", &[first.clone(), other.path("volume")]);
    fs::rename(second.join("manifests"), second.join("away")).unwrap();
    fs::create_dir(second.join("manifests")).unwrap();
    refused("no runs", &volumes);
}

#[test]
fn the_programs_name_says_what_it_does() {
    let (sandbox, volumes) = store();
    let link = sandbox.path("raidtape-rebuildmeta");
    std::os::unix::fs::symlink(RAIDTAPE, &link).unwrap();
    let new = sandbox.path("new");
    let mut command = Command::new(&link);
    command.arg("--catalog").arg(&new).arg("--volumes").args(&volumes).stdin(Stdio::null());
    let text = run(&mut command).code(0).text();
    assert!(text.starts_with("rebuilt 4 runs from 2 volumes"), "{text}");
    let link = sandbox.path("raidtape-genmeta");
    std::os::unix::fs::symlink(RAIDTAPE, &link).unwrap();
    let text = run(Command::new(&link).arg("--catalog").arg(&new)).code(0).text();
    assert!(text.contains("0 of 8 manifests") || text.contains("of 8 manifests"), "{text}");
}
