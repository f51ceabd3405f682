//! Jobs of the other verbs: restores, validation, metas and manifests made anew.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use raidtape::catalog::{Reader, Spool};
use raidtape::chunk::HashAlgo;
use raidtape::error::{Error, ErrorKind};
use serde_json::Value;

use crate::common::{Mount, Sandbox, Tree, assert_same, data, errno, need_root};

/// Asks for a job by a control file; gives what came of it.
pub fn ask(mount: &Mount, verb: &str, line: &str) -> Value {
    let mut file = OpenOptions::new().read(true).write(true).open(mount.ctl(verb)).unwrap();
    file.write_all(format!("{line}\n").as_bytes()).unwrap();
    let text = fs::read_to_string(mount.ctl(verb)).unwrap();
    let job = text.lines().next().unwrap().strip_prefix("job ").unwrap().parse().unwrap();
    mount.wait_for_job(job)
}

#[test]
fn restores_are_jobs_too() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 85, 30);
    fs::create_dir(sandbox.source.join("docs")).unwrap();
    fs::write(sandbox.source.join("docs/readme"), "hello").unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let dest = |name: &str| sandbox.path(name).to_str().unwrap().to_owned();
    let said = ask(&mount, "revert-to-run", &format!("latest {} --verify", dest("whole")));
    assert_eq!(
        (&said["state"], &said["run"], &said["exit_code"]),
        (&"done".into(), &1.into(), &0.into())
    );
    assert!(said["summary"].as_str().unwrap().starts_with("restored "), "{said}");
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&sandbox.path("whole")));
    let said = ask(&mount, "restore-folder", &format!("docs '{}' --run 1", dest("a/b c")));
    assert_eq!(said["state"], "done", "{said}");
    assert_eq!(fs::read(sandbox.path("a/b c/readme")).unwrap(), b"hello");
    let mode = |it: &Path| std::os::unix::fs::MetadataExt::mode(&fs::metadata(it).unwrap());
    assert_eq!(mode(&sandbox.path("a")) & 0o777, 0o755);
    let said = ask(&mount, "restore", &format!("docs/readme {}", dest("file")));
    assert_eq!(said["state"], "done", "{said}");
    assert_eq!(fs::read(sandbox.path("file")).unwrap(), b"hello");
    let said = ask(&mount, "restore", &format!("docs/nothing {}", dest("file")));
    assert_eq!((&said["state"], &said["exit_code"]), (&"failed".into(), &1.into()), "{said}");
    // The mount is no target, by its name or by another.
    let inside = mount.point.join("ingest/x").to_str().unwrap().to_owned();
    for dest in ["relative", &inside] {
        let line = format!("docs {dest}\n");
        assert_eq!(errno(fs::write(mount.ctl("restore-folder"), line)), libc::EINVAL, "{dest}");
    }
    std::os::unix::fs::symlink(mount.point.join("ingest"), sandbox.path("link")).unwrap();
    let said = ask(&mount, "restore-folder", &format!("docs {}/x", dest("link")));
    assert_eq!((&said["state"], &said["exit_code"]), (&"failed".into(), &2.into()), "{said}");
    assert!(!mount.point.join("ingest/x").exists());
}

#[test]
fn a_validation_that_finds_damage_has_failed() {
    let sandbox = Sandbox::new();
    data::noise_file(&sandbox.source.join("file"), 86, 100_000);
    sandbox.backup();
    let mount = sandbox.mount();
    let said = ask(&mount, "validate", "");
    assert_eq!((&said["state"], &said["exit_code"]), (&"done".into(), &0.into()), "{said}");
    let block = sandbox.blocks("volume").remove(0).0;
    let mut bytes = fs::read(&block).unwrap();
    bytes[5000] ^= 1;
    fs::write(&block, bytes).unwrap();
    let said = ask(&mount, "validate", "");
    assert_eq!((&said["state"], &said["exit_code"]), (&"failed".into(), &5.into()), "{said}");
    let log = fs::read_to_string(mount.ctl("jobs/2/log")).unwrap();
    assert!(log.contains(" ! block ") && log.contains(" damaged: file of "), "{log}");
}

#[test]
fn what_finds_data_damaged_or_out_of_reach_has_failed() {
    let sandbox = Sandbox::new();
    data::noise_file(&sandbox.source.join("file"), 88, 100_000);
    fs::write(sandbox.source.join("empty"), "").unwrap();
    sandbox.backup();
    let mount = sandbox.mount();
    let block = sandbox.blocks("volume").remove(0).0;
    let whole = fs::read(&block).unwrap();
    let mut bytes = whole.clone();
    bytes[5000] ^= 1;
    fs::write(&block, bytes).unwrap();
    let sync = |verb: &str| File::open(mount.ctl(verb)).unwrap().sync_all();
    // It restores all it can, and says so.
    let said = ask(&mount, "revert-to-run", &format!("1 {}", sandbox.path("back").display()));
    assert_eq!((&said["state"], &said["exit_code"]), (&"failed".into(), &5.into()), "{said}");
    assert!(sandbox.path("back/empty").exists());
    assert_eq!((&said["run"], &said["error"]), (&1.into(), &said["summary"]), "{said}");
    assert_eq!(errno(sync("revert-to-run")), libc::EIO);
    let log = fs::read_to_string(mount.ctl("jobs/1/log")).unwrap();
    assert!(log.contains(" ! ") && log.contains(" failed: restored "), "{log}");
    fs::write(&block, whole).unwrap();
    let later = sandbox.add_volume("later");
    fs::rename(&later, sandbox.path("away")).unwrap();
    let said = ask(&mount, "genmeta", "");
    assert_eq!((&said["state"], &said["exit_code"]), (&"failed".into(), &4.into()), "{said}");
    assert_eq!(errno(sync("genmeta")), libc::EIO);
    fs::rename(sandbox.path("away"), &later).unwrap();
    assert_eq!(ask(&mount, "genmeta", "")["state"], "done");
    sync("genmeta").unwrap();
}

#[test]
fn a_manifest_that_is_not_wanted_any_more_is_given_up() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 89, 20);
    sandbox.backup();
    let reader = Reader::open(&sandbox.catalog).unwrap();
    let (run, hash) = (reader.runs().unwrap().remove(0), HashAlgo::Blake3);
    let write = |most: u64| {
        let (asked, mut out) = (AtomicU64::new(0), Vec::new());
        let mut spool = Spool::new(&sandbox.path("")).unwrap();
        let result =
            reader.write_manifest((&run, None), hash, &mut spool, &mut out, &|| match asked
                .fetch_add(1, Ordering::Relaxed)
                < most
            {
                true => Ok(()),
                false => Err(Error::new(ErrorKind::Interrupted, "enough")),
            });
        (result.map_err(|e| e.kind()), out.len(), asked.into_inner())
    };
    let (result, len, asked) = write(u64::MAX);
    assert!(result.is_ok() && len > 0 && asked >= 20, "{asked}");
    assert_eq!(write(7), (Err(ErrorKind::Interrupted), 0, 8));
}

fn documents(volume: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for dir in ["meta", "manifests"] {
        for entry in fs::read_dir(volume.join(dir)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|it| it == "zst") {
                found.insert(path.clone(), fs::read(path).unwrap());
            }
        }
    }
    found
}

/// The hash of a manifest's text before its last line.
fn digest_of(bytes: &[u8]) -> String {
    let text = String::from_utf8(zstd::decode_all(bytes).unwrap()).unwrap();
    let (before, _) = text.trim_end().rsplit_once('\n').unwrap();
    HashAlgo::Blake3.hash(format!("{before}\n").as_bytes()).to_string()
}

/// The lines of a manifest, decoded.
fn lines(bytes: &[u8]) -> Vec<Value> {
    let text = zstd::decode_all(bytes).unwrap();
    let lines = text.split(|it| *it == b'\n').filter(|it| !it.is_empty());
    lines.map(|it| serde_json::from_slice(it).unwrap()).collect()
}

/// What a chain of manifests leads to: the line of each path.
fn replay(manifests: &[Vec<Value>]) -> BTreeMap<String, Value> {
    let (mut tree, mut versions) = (BTreeMap::new(), BTreeMap::new());
    for line in manifests.iter().flatten() {
        let path = line["path"].as_str().unwrap_or_default().to_owned();
        let below = format!("{path}/");
        match line["op"].as_str().unwrap() {
            "put" => {
                let mut entry = line.clone();
                entry.as_object_mut().unwrap().remove("path");
                entry.as_object_mut().unwrap().remove("op");
                versions.insert(line["version"].as_i64().unwrap(), entry.clone());
                tree.insert(path, entry);
            }
            "link" => {
                let entry = versions[&line["version"].as_i64().unwrap()].clone();
                tree.insert(path, entry);
            }
            "delete" => tree.retain(|it, _| *it != path && !it.starts_with(&below)),
            "empty" => tree.retain(|it, _| path.is_empty() || !it.starts_with(&below)),
            _ => {}
        }
    }
    tree
}

#[test]
fn what_is_lost_beside_the_blocks_is_made_anew() {
    let sandbox = Sandbox::new();
    let source = &sandbox.source;
    data::mixed_tree(source, 87, 40);
    fs::create_dir_all(source.join("dir/below")).unwrap();
    fs::write(source.join("dir/below/file"), "one").unwrap();
    fs::write(source.join("one"), "linked").unwrap();
    fs::hard_link(source.join("one"), source.join("two")).unwrap();
    sandbox.backup_with(&["--tag", "t", "--comment", "first"]);
    // A directory becomes a file, a file goes, a further name comes.
    fs::remove_dir_all(source.join("dir")).unwrap();
    fs::write(source.join("dir"), "a file now").unwrap();
    fs::hard_link(source.join("one"), source.join("three")).unwrap();
    fs::remove_file(source.join("two")).unwrap();
    sandbox.backup();
    fs::remove_file(source.join("dir")).unwrap();
    sandbox.backup();
    let volume = sandbox.path("volume");
    let line = sandbox.ok(["genmeta"]).text();
    assert!(line.contains("0 of 3 manifests"), "{line}");
    let before = documents(&volume);
    let said = sandbox.ok(["genmeta", "--json"]).json();
    assert_eq!((&said["metas_written"], &said["manifests_written"]), (&0.into(), &0.into()));
    assert_eq!(documents(&volume), before, "a second time writes nothing");
    // Gone, cut short, of another run, not of this format.
    let names: Vec<&PathBuf> = before.keys().collect();
    let metas: Vec<_> =
        names.iter().filter(|it| it.to_str().unwrap().contains("/meta/")).copied().collect();
    fs::remove_file(metas[0]).unwrap();
    for meta in &metas[1..] {
        fs::write(meta, "nonsense").unwrap();
    }
    let manifest = |run: u64| volume.join(format!("manifests/run-{run:08}.jsonl.zst"));
    fs::remove_file(manifest(1)).unwrap();
    let whole = &before[&manifest(2)];
    fs::write(manifest(2), &whole[..whole.len() - 9]).unwrap();
    fs::write(manifest(3), whole).unwrap();
    let mount = sandbox.mount();
    let said = ask(&mount, "genmeta", "--all");
    let summary = format!("wrote {0} of {0} metas, 3 of 3 manifests", metas.len());
    assert_eq!((&said["state"], &said["summary"]), (&"done".into(), &summary.into()), "{said}");
    let after = documents(&volume);
    assert_eq!(after.keys().collect::<Vec<_>>(), names, "and nothing else");
    for meta in metas {
        assert_eq!(after[meta], before[meta]);
    }
    let read = |all: &BTreeMap<PathBuf, Vec<u8>>| [1, 2, 3].map(|run| lines(&all[&manifest(run)]));
    let (old, new) = (read(&before), read(&after));
    for run in 0..3 {
        // The manifest before it is another one now.
        let mut header = old[run][0].clone();
        header["previous"] = new[run][0]["previous"].clone();
        assert_eq!(header, new[run][0], "the same header");
        let said = new[run].last().unwrap();
        assert_eq!(said["finished"], old[run].last().unwrap()["finished"]);
        assert_eq!(said["bytes_stored"], old[run].last().unwrap()["bytes_stored"]);
        let digest = digest_of(&after[&manifest(run as u64 + 1)]);
        assert_eq!(said["digest"], digest);
        if let Some(next) = new.get(run + 1) {
            assert_eq!(next[0]["previous"]["digest"], digest, "run {}", run + 2);
        }
        assert_eq!(replay(&old[..=run]), replay(&new[..=run]), "run {}", run + 1);
    }
    let owners = |all: &[Vec<Value>; 3]| {
        let lines = all.iter().flatten().filter(|it| it["op"] == "owner");
        let mut lines: Vec<String> = lines.map(Value::to_string).collect();
        lines.sort();
        lines
    };
    assert_eq!(owners(&old), owners(&new));
    // A volume that came later gets its manifests from the one before.
    let later = sandbox.add_volume("later");
    let said = sandbox.ok(["genmeta", "--json"]).json();
    assert_eq!((&said["metas_written"], &said["manifests_written"]), (&0.into(), &3.into()));
    for run in 1..=3 {
        let name = format!("manifests/run-{run:08}.jsonl.zst");
        assert_eq!(fs::read(later.join(&name)).unwrap(), after[&volume.join(&name)]);
    }
    sandbox.assert_valid();
}

#[test]
fn manifests_are_one_chain_whatever_happens_to_a_part_of_it() {
    need_root("an owner is changed");
    let sandbox = Sandbox::new();
    let (first, second) = (sandbox.path("volume"), sandbox.add_volume("second"));
    for number in 1..=4 {
        fs::write(sandbox.source.join("file"), format!("{number}")).unwrap();
        if number == 3 {
            // A name is told before the entry that has it, and after it when told again.
            std::os::unix::fs::chown(sandbox.source.join("file"), Some(1), None).unwrap();
        }
        sandbox.backup();
    }
    let manifest =
        |volume: &Path, run: u64| volume.join(format!("manifests/run-{run:08}.jsonl.zst"));
    let written = || sandbox.ok(["genmeta", "--json"]).json()["manifests_written"].clone();
    let chain = |volume: &Path| {
        let (mut before, mut all) = (Value::Null, Vec::new());
        for run in 1..=4 {
            let bytes = fs::read(manifest(volume, run)).unwrap();
            let lines = lines(&bytes);
            assert_eq!(lines[0]["previous"], before, "run {run}");
            let digest = digest_of(&bytes);
            before = serde_json::json!({ "run": run, "uuid": lines[0]["uuid"], "digest": digest });
            all.push(digest);
        }
        all
    };
    let all = chain(&first);
    assert_eq!((chain(&second), written()), (all.clone(), 0.into()));
    // One that is lost on one volume comes from the other.
    fs::write(manifest(&first, 2), "nonsense").unwrap();
    assert_eq!((written(), chain(&first)), (1.into(), all.clone()));
    // One that is whole, but not the one that the chain leads to.
    let forged = |volume: &Path| {
        let text = zstd::decode_all(&*fs::read(manifest(volume, 2)).unwrap()).unwrap();
        let text = String::from_utf8(text).unwrap().replacen("\"mode\":", "\"mode\":1", 1);
        let (before, last) = text.trim_end().rsplit_once('\n').unwrap();
        let mut last: Value = serde_json::from_str(last).unwrap();
        last["digest"] = HashAlgo::Blake3.hash(format!("{before}\n").as_bytes()).to_string().into();
        let text = format!("{before}\n{last}\n");
        fs::write(manifest(volume, 2), zstd::encode_all(text.as_bytes(), 1).unwrap()).unwrap();
    };
    forged(&second);
    assert_eq!((written(), chain(&second)), (1.into(), all.clone()));
    // With the right one on no volume, those after it are other ones too, once.
    fs::remove_file(manifest(&first, 3)).unwrap();
    fs::remove_file(manifest(&second, 3)).unwrap();
    assert_eq!(written(), 4);
    let other = chain(&first);
    assert_eq!((chain(&second), written()), (other.clone(), 0.into()));
    assert!(other[..2] == all[..2] && other[2] != all[2] && other[3] != all[3]);
    // And the next run goes on from them.
    fs::write(sandbox.source.join("file"), "5").unwrap();
    sandbox.backup();
    let fifth = lines(&fs::read(manifest(&first, 5)).unwrap());
    assert_eq!(fifth[0]["previous"]["digest"], other[3]);
    assert_eq!((&fifth[0]["basis"]["run"], written()), (&4.into(), 0.into()));
}

/// The note on a volume of the sandbox that says how far its metas are complete.
fn note(sandbox: &Sandbox) -> Option<String> {
    let note = fs::read_to_string(sandbox.path("volume/meta/.complete")).ok()?;
    note.lines().find_map(|it| it.strip_prefix("run=")).map(str::to_owned)
}

/// How many documents a validation finds out of date; nothing is damaged.
fn due(sandbox: &Sandbox) -> u64 {
    sandbox.ok(["validate", "--json"]).json()["due"].as_u64().unwrap()
}

fn written(sandbox: &Sandbox, options: &[&str]) -> u64 {
    let line = ["genmeta", "--json"].iter().chain(options);
    sandbox.ok(line).json()["metas_written"].as_u64().unwrap()
}

#[test]
fn a_run_brings_metas_up_to_date_and_says_so() {
    let sandbox = Sandbox::with(&["--block-size", "1MiB"]);
    let at = |name: &str| sandbox.source.join(name);
    data::mixed_tree(&sandbox.source, 230, 60);
    data::noise_file(&at("large"), 231, 9 << 20);
    fs::write(at("linked"), "one of two").unwrap();
    assert_eq!(note(&sandbox).as_deref(), Some("0"));
    sandbox.backup();
    assert_eq!(note(&sandbox).as_deref(), Some("1"));
    let changes: [&dyn Fn(); 5] = [
        &|| fs::remove_file(at("large")).unwrap(),
        &|| fs::hard_link(at("linked"), at("again")).unwrap(),
        &|| {},
        &|| fs::remove_dir_all(at("d1")).unwrap(),
        &|| fs::write(at("new"), "new").unwrap(),
    ];
    for (run, change) in (2..).zip(changes) {
        change();
        sandbox.backup();
        assert_eq!(due(&sandbox), 0, "run {run}");
    }
    assert_eq!((note(&sandbox).as_deref(), written(&sandbox, &["--all"])), (Some("6"), 0));
}

#[test]
fn what_a_run_has_left_is_written_later_and_nothing_else() {
    let sandbox = Sandbox::with(&["--block-size", "1MiB"]);
    let at = |name: &str| sandbox.source.join(name);
    sandbox.backup_with(&["--no-meta"]);
    data::noise_file(&at("a"), 232, 9 << 20);
    data::noise_file(&at("b"), 233, 9 << 20);
    sandbox.backup_with(&["--no-meta"]);
    let blocks = sandbox.blocks("volume").len() as u64;
    assert_eq!((due(&sandbox), note(&sandbox).as_deref()), (blocks, Some("0")));
    assert_eq!((written(&sandbox, &[]), due(&sandbox)), (blocks, 0));
    let volume = sandbox.path("volume");
    let before = documents(&volume);
    let changed = |before: &BTreeMap<PathBuf, Vec<u8>>| {
        let now = documents(&volume);
        now.iter().filter(|it| before.get(it.0) != Some(it.1)).count()
    };
    fs::remove_file(at("a")).unwrap();
    sandbox.backup_with(&["--no-meta"]);
    let left = due(&sandbox);
    assert!(left > 0 && left < blocks, "{left} of {blocks}");
    // One that is not due and says something else is left to --all.
    let metas = before.keys().filter(|it| it.to_str().unwrap().ends_with("meta.json.zst"));
    let of_b = metas.filter(|it| {
        let text = zstd::decode_all(&fs::read(it).unwrap()[..]).unwrap();
        String::from_utf8(text).unwrap().contains("\"path\":\"b\"")
    });
    let other = of_b.max().unwrap();
    let text = String::from_utf8(zstd::decode_all(&before[other][..]).unwrap()).unwrap();
    let forged = zstd::encode_all(text.replace("\"b\"", "\"c\"").as_bytes(), 1).unwrap();
    fs::write(other, &forged).unwrap();
    sandbox.run(["validate"]).code(5);
    assert_eq!(written(&sandbox, &[]), left);
    // The manifest of the run is new, too.
    assert_eq!(changed(&before), left as usize + 2);
    assert_eq!(fs::read(other).unwrap(), forged);
    assert_eq!(written(&sandbox, &["--all"]), 1);
    assert_eq!(due(&sandbox), 0);
    // One that is gone is found without it.
    fs::remove_file(other).unwrap();
    assert_eq!(written(&sandbox, &[]), 1);
    assert_eq!(fs::read(other).unwrap(), before[other]);
}

#[test]
fn what_a_run_that_did_not_end_has_written_is_not_believed() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 234, 20);
    sandbox.backup();
    let before = documents(&sandbox.path("volume"));
    let catalog = fs::read(&sandbox.catalog).unwrap();
    fs::write(sandbox.source.join("more"), "more").unwrap();
    sandbox.backup_with(&["--no-catalog-copy"]);
    // As after a crash before the commit: the note was taken away before the first meta.
    for suffix in ["-wal", "-shm"] {
        let _ = fs::remove_file(sandbox.path(&format!("catalog{suffix}")));
    }
    fs::write(&sandbox.catalog, catalog).unwrap();
    fs::remove_file(sandbox.path("volume/meta/.complete")).unwrap();
    sandbox.ok(["genmeta"]);
    assert_eq!((due(&sandbox), note(&sandbox).as_deref()), (0, Some("1")));
    let after = documents(&sandbox.path("volume"));
    for (path, bytes) in &before {
        assert_eq!(after.get(path), Some(bytes), "{path:?}");
    }
}
