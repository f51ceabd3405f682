//! Runs after the first: what they store, report and share.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use crate::backup_restore::assert_rsync_quiet;
use crate::common::{Sandbox, Tree, args, assert_same, data, name_of, tool};

/// What `list-changes` says of a run, as (change, path).
fn changes(sandbox: &Sandbox, run: i64) -> BTreeSet<(String, String)> {
    let lines = sandbox.ok(["list-changes", &run.to_string(), "--json"]).json_lines();
    let all: Vec<_> = lines
        .iter()
        .map(|line| {
            let path = String::from_utf8(name_of(line, "path")).unwrap();
            (line["change"].as_str().unwrap().to_owned(), path)
        })
        .collect();
    let set: BTreeSet<_> = all.iter().cloned().collect();
    assert_eq!(set.len(), all.len(), "something is reported twice: {all:?}");
    set
}

fn expected(list: &[(&str, &[&str])]) -> BTreeSet<(String, String)> {
    let one = |(change, paths): &(&str, &[&str])| {
        let change = (*change).to_owned();
        paths.iter().map(move |path| (change.clone(), (*path).to_owned())).collect::<Vec<_>>()
    };
    list.iter().flat_map(one).collect()
}

#[test]
fn a_changed_tree_is_told_exactly_and_both_runs_stay_exact() {
    let sandbox = Sandbox::with(&["--compression", "none"]);
    let at = |name: &str| sandbox.source.join(name);
    for dir in ["edit", "same", "gone", "gone/sub", "was_dir", "moved_dir", "links"] {
        fs::create_dir(at(dir)).unwrap();
    }
    data::noise_file(&at("edit/large"), 1, 12 << 20);
    data::noise_file(&at("edit/appended"), 2, 1 << 20);
    data::noise_file(&at("edit/small"), 3, 3_000);
    data::noise_file(&at("same/untouched"), 4, 100_000);
    data::noise_file(&at("same/moded"), 5, 2 << 20);
    data::noise_file(&at("same/renamed"), 6, 2 << 20);
    data::noise_file(&at("gone/file"), 7, 100_000);
    data::noise_file(&at("gone/sub/file"), 8, 1_000);
    data::noise_file(&at("was_file"), 9, 5_000);
    data::noise_file(&at("was_dir/inner"), 10, 5_000);
    data::noise_file(&at("moved_dir/inner"), 11, 5_000);
    data::noise_file(&at("links/one"), 12, 5_000);
    std::os::unix::fs::symlink("one", at("links/sym")).unwrap();
    let first = sandbox.backup();
    assert_eq!((first["added"].as_u64(), first["dirs"]["added"].as_u64()), (Some(12 + 1), Some(8)));
    assert_eq!(changes(&sandbox, 1).len(), 13 + 8);
    let saved = sandbox.path("saved");
    tool("cp", args!["-a", &sandbox.source, &saved]);

    let large = OpenOptions::new().write(true).open(at("edit/large")).unwrap();
    large.write_all_at(b"edited", 6 << 20).unwrap();
    let mut file = OpenOptions::new().append(true).open(at("edit/appended")).unwrap();
    file.write_all(&data::Seeded::new(20).noise(10_000)).unwrap();
    fs::write(at("edit/small"), data::Seeded::new(21).noise(3_000)).unwrap();
    fs::set_permissions(at("same/moded"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(at("same/renamed"), at("same/new name")).unwrap();
    fs::remove_dir_all(at("gone")).unwrap();
    fs::remove_file(at("was_file")).unwrap();
    fs::create_dir(at("was_file")).unwrap();
    data::noise_file(&at("was_file/inner"), 22, 5_000);
    fs::remove_dir_all(at("was_dir")).unwrap();
    data::noise_file(&at("was_dir"), 23, 5_000);
    fs::rename(at("moved_dir"), at("other_dir")).unwrap();
    fs::hard_link(at("links/one"), at("links/two")).unwrap();
    fs::remove_file(at("links/sym")).unwrap();
    std::os::unix::fs::symlink("two", at("links/sym")).unwrap();
    data::noise_file(&at("added"), 24, 5_000);

    let before = sandbox.stored("volume");
    let second = sandbox.backup();
    let stored = sandbox.stored("volume") - before;
    assert_eq!(second["bytes_stored"].as_u64(), Some(stored));
    // Each edit costs at most the longest chunks around it, of 256 KiB each.
    assert!((28_000..1_500_000).contains(&stored), "{stored} bytes stored");
    let told = expected(&[
        ("added", &["same/new name", "was_file/inner", "other_dir", "other_dir/inner"]),
        ("added", &["links/two", "added"]),
        ("modified", &["", "edit/large", "edit/appended", "edit/small", "same/moded", "same"]),
        ("modified", &["was_file", "was_dir", "links", "links/one", "links/sym"]),
        ("deleted", &["same/renamed", "gone", "gone/file", "gone/sub", "gone/sub/file"]),
        ("deleted", &["was_dir/inner", "moved_dir", "moved_dir/inner"]),
    ]);
    assert_eq!(changes(&sandbox, 2), told);

    let (then, now) = (Tree::of(&saved), Tree::of(&sandbox.source));
    assert_same(&then, &Tree::of(&sandbox.revert(1, "first")));
    assert_same(&now, &Tree::of(&sandbox.revert(2, "second")));
    let mount = sandbox.mount();
    assert_same(&then, &Tree::of(&mount.run(1)));
    assert_same(&now, &Tree::of(&mount.run(2)));
    assert_rsync_quiet(&saved, &mount.run(1));
    assert_rsync_quiet(&sandbox.source, &mount.run(2));
    let ino = |run, name: &str| fs::symlink_metadata(mount.run(run).join(name)).unwrap().ino();
    assert_eq!(ino(1, "same/untouched"), ino(2, "same/untouched"));
    assert_ne!(ino(1, "edit/small"), ino(2, "edit/small"));
    assert_eq!(ino(2, "links/one"), ino(2, "links/two"));
    sandbox.assert_valid();
}

#[test]
fn a_run_without_changes_stores_and_reports_nothing() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 30, 300);
    std::os::unix::fs::symlink("nowhere", sandbox.source.join("link")).unwrap();
    let first = sandbox.backup();
    let before = sandbox.stored("volume");
    for options in [&[][..], &["--force-read"], &["--single-threaded"]] {
        let again = sandbox.backup_with(options);
        assert_eq!(again["unchanged"], first["added"], "{again}");
        for what in ["added", "modified", "deleted", "bytes_stored"] {
            assert_eq!(again[what], 0, "{what} in {again}");
        }
        assert_eq!(again["dirs"]["unchanged"], first["dirs"]["added"]);
        assert_eq!(changes(&sandbox, again["run"].as_i64().unwrap()), BTreeSet::new());
    }
    assert_eq!(sandbox.stored("volume"), before);
    let again = sandbox.backup_with(&["--force-read"]);
    assert_eq!(again["bytes_read"], first["bytes"]);
}

#[test]
fn an_edit_that_hides_behind_its_old_times_is_found() {
    let sandbox = Sandbox::new();
    let file = sandbox.source.join("file");
    fs::write(&file, "before").unwrap();
    let old = fs::metadata(&file).unwrap().modified().unwrap();
    sandbox.backup();
    fs::write(&file, "after!").unwrap();
    OpenOptions::new().write(true).open(&file).unwrap().set_modified(old).unwrap();
    assert_eq!(sandbox.backup()["modified"], 1);
    assert_eq!(fs::read(sandbox.revert(2, "out").join("file")).unwrap(), b"after!");
}

#[test]
fn every_one_of_many_small_steps_stays_as_it_was() {
    let sandbox = Sandbox::new();
    let mut seeded = data::Seeded::new(40);
    data::mixed_tree(&sandbox.source, 41, 60);
    let mut states = Vec::new();
    for step in 0..6 {
        for _ in 0..12 {
            let dir = format!("d{}/e{}", seeded.below(7), seeded.below(3));
            let path = sandbox.source.join(&dir).join(format!("f{}", seeded.below(40)));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match seeded.below(4) {
                0 if path.is_dir() => fs::remove_dir_all(&path).unwrap(),
                0 if path.exists() => fs::remove_file(&path).unwrap(),
                1 if !path.exists() => fs::create_dir(&path).unwrap(),
                _ if path.is_dir() => fs::write(path.join("in"), format!("{step}")).unwrap(),
                _ => {
                    let len = seeded.below(9_000) as usize;
                    fs::write(&path, seeded.noise(len)).unwrap();
                }
            }
        }
        sandbox.backup();
        states.push(Tree::of(&sandbox.source));
    }
    let mount = sandbox.mount();
    for (run, state) in (1..).zip(&states) {
        assert_same(state, &Tree::of(&mount.run(run)));
        assert_same(state, &Tree::of(&sandbox.revert(run, &format!("out{run}"))));
    }
    sandbox.assert_valid();
}

#[test]
fn sources_with_names_of_their_own_do_not_mix() {
    let sandbox = Sandbox::new();
    let other = sandbox.path("other");
    fs::create_dir(&other).unwrap();
    fs::write(sandbox.source.join("file"), "one").unwrap();
    fs::write(other.join("file"), "two").unwrap();
    sandbox.backup_with(&["--as", "thing", "--tag", "weekly"]);
    sandbox.ok(args!["backup", &other]);
    // The same name from elsewhere goes on where the first left off.
    sandbox.ok(args!["backup", &other, "--as", "thing"]);
    assert!(changes(&sandbox, 3).contains(&("modified".to_owned(), "file".to_owned())));
    let runs = sandbox.ok(["runs", "--json"]).json();
    let sources: Vec<_> = runs.as_array().unwrap().iter().map(|it| it["source"].clone()).collect();
    assert_eq!(sources, ["thing", other.to_str().unwrap(), "thing"]);
    assert_eq!(runs[0]["tags"], serde_json::json!(["weekly"]));
    assert_eq!(fs::read(sandbox.revert(1, "out").join("file")).unwrap(), b"one");
}
