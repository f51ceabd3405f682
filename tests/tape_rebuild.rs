//! A catalog from tapes of which some are damaged, or somebody else's: they cost what they have,
//! and nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use raidtape::error::Result;
use raidtape::progress::Progress;
use raidtape::rebuild::Summary;
use raidtape::tape::drive::Access;
use raidtape::tape::image::Image;
use raidtape::tape::label::Label;
use raidtape::tape::loaded::Loaded;
use raidtape::tape::medium::Medium;
use raidtape::tape::runs::gather::{self, From, Gathered};

use crate::tape_recall::Scene;

/// Makes a catalog of these images, in this order.
fn rebuild(catalog: &Path, into: &Path, images: &[PathBuf]) -> Result<(Gathered, Summary)> {
    let (gathered, made) = try_rebuild(catalog, into, images);
    Ok((gathered, made?))
}

fn try_rebuild(catalog: &Path, into: &Path, images: &[PathBuf]) -> (Gathered, Result<Summary>) {
    let mut left = images.iter();
    let mut next = || left.next().map(|it| Loaded::open(it, Access::Read)).transpose();
    let from = From { into, next: &mut next, allow_gaps: false };
    gather::rebuild(catalog, from, &Progress::default(), &mut |_, _| Ok(()))
}

/// Marks a block of the first archive of an image as one that could not be read.
fn spoil(image: &Path, number: usize) {
    spoil_in(image, 1, number);
}

/// The same in a tape file.
fn spoil_in(image: &Path, filenum: u64, number: usize) {
    const BAD: u32 = 0x8000_0000;
    let mut bytes = fs::read(image).unwrap();
    let (mut at, mut blocks, mut marks) = (0, 0, 0);
    loop {
        let len = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        if len == 0 {
            (at, marks) = (at + 4, marks + 1);
            continue;
        }
        let end = at + 8 + (len as usize).next_multiple_of(2);
        if marks == filenum && blocks == number {
            bytes[at..at + 4].copy_from_slice(&(len | BAD).to_le_bytes());
            bytes[end - 4..end].copy_from_slice(&(len | BAD).to_le_bytes());
            return fs::write(image, bytes).unwrap();
        }
        blocks += usize::from(marks == filenum);
        at = end;
    }
}

/// Changes a byte of the content of every member whose name begins so and whose content is short.
fn rot(image: &Path, name: &[u8]) {
    let mut bytes = fs::read(image).unwrap();
    let mut count = 0;
    for at in 0..bytes.len() - 200 {
        if bytes[at..].starts_with(name) && bytes[at - 76..].starts_with(b"070707") {
            let len = bytes[at..].iter().position(|it| *it == 0).unwrap();
            bytes[at + len + 40] ^= 0x55;
            count += 1;
        }
    }
    assert!(count > 0);
    fs::write(image, bytes).unwrap();
}

/// Changes a byte: the `at`th behind where these bytes come first.
fn flip(image: &Path, bytes: &[u8], at: usize) {
    let mut all = fs::read(image).unwrap();
    let found = all.windows(bytes.len()).position(|it| it == bytes).unwrap();
    all[found + at] ^= 1;
    fs::write(image, all).unwrap();
}

/// Sees to it that the catalog that was made brings back all that this run had.
fn assert_comes_back(scene: &Scene, new: &Path, run: u64, to: &Path) {
    assert_eq!(scene.recall(new, 1).missing, 0);
    let mut command = Command::new(scene.sandbox.program().get_program());
    command.arg("--catalog").arg(new).args(["revert-to-run", &run.to_string()]).arg(to);
    crate::common::run(&mut command).code(0);
    let tree = crate::common::tree::Tree::of;
    crate::common::tree::assert_same(&tree(&scene.sandbox.source), &tree(to));
}

fn tapes_of(catalog: &Path) -> Vec<(Vec<u8>, u64, u64)> {
    let tapes = raidtape::catalog::tapes::Tapes::look(catalog).unwrap().unwrap();
    let all = tapes.tapes().unwrap().into_iter();
    all.map(|it| (it.tape.label, it.files, it.blocks)).collect()
}

fn said(gathered: &Gathered) -> String {
    gathered.problems.iter().map(|it| format!("{it}\n")).collect()
}

/// Makes an image of another tape that has the label `T0`.
fn make_namesake(path: &Path) {
    Image::create(path, &Medium::default()).unwrap();
    let mut label = Label::new("T0").unwrap();
    label.add("owner", "somebody else").unwrap();
    let mut loaded = Loaded::open(path, Access::Write).unwrap();
    loaded.write_label(&label).unwrap();
    loaded.close().unwrap();
}

#[test]
fn a_block_of_the_tape_that_cannot_be_read_costs_what_is_in_it() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    let count = scene.sandbox.blocks("volume").len() as u64;
    fs::remove_dir_all(scene.sandbox.path("volume")).unwrap();
    let image = scene.world.image("T0");
    // In the first block of the store that is on it.
    spoil(&image, 12);
    let (new, into) = (scene.sandbox.path("anew"), scene.sandbox.path("into"));
    let (gathered, summary) = rebuild(&new, &into, &[image]).unwrap();
    assert_eq!((gathered.blocks, summary.runs), (count - 1, 1), "{}", said(&gathered));
    assert!(said(&gathered).contains("tape T0, file 1"), "{}", said(&gathered));
    let done = scene.recall(&new, 1);
    assert_eq!((done.blocks, done.missing), (count - 1, 1), "{done:?}");
}

#[test]
fn what_is_damaged_or_of_others_takes_the_place_of_nothing() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    let count = scene.sandbox.blocks("volume").len() as u64;
    let good = scene.world.image("T0");
    let dir = scene.sandbox.path("box");
    fs::create_dir(&dir).unwrap();
    // The same tape, copied by somebody whose memory is bad.
    let rotten = dir.join("rotten.tap");
    fs::copy(&good, &rotten).unwrap();
    rot(&rotten, b"manifests/");
    rot(&rotten, b"meta/");
    let garbage = dir.join("garbage.tap");
    fs::write(&garbage, "no image at all").unwrap();
    // Another tape that has the same label, and one of another catalog.
    let namesake = dir.join("namesake.tap");
    make_namesake(&namesake);
    let others = Scene::new(&["T9"], None);
    others.archive(1);
    let other = others.world.image("T9");
    let orders = [
        vec![&garbage, &rotten, &good, &namesake, &other],
        vec![&good, &namesake, &rotten, &other, &garbage],
    ];
    for (number, order) in orders.into_iter().enumerate() {
        let name = |it: &str| scene.sandbox.path(&format!("{it}{number}"));
        let (new, into) = (name("anew"), name("into"));
        let images: Vec<PathBuf> = order.into_iter().cloned().collect();
        let (gathered, summary) = rebuild(&new, &into, &images).unwrap();
        let told = said(&gathered);
        for part in ["garbage.tap", "tape T0, file ", "manifests/", "meta/", "another catalog"] {
            assert!(told.contains(part), "{part}: {told}");
        }
        assert_eq!((summary.runs, summary.blocks_lacking), (1, 0), "{summary:?}");
        let tapes = raidtape::catalog::tapes::Tapes::look(&new).unwrap().unwrap();
        assert_eq!(tapes.tape(b"T0").unwrap().unwrap().blocks, count);
        assert_comes_back(&scene, &new, 1, &name("restored"));
    }
}

#[test]
fn where_runs_are_lost_what_was_read_is_not_read_again() {
    let scene = Scene::new(&["T0", "T1"], None);
    scene.archive(1);
    fs::write(scene.sandbox.source.join("added"), "new").unwrap();
    scene.sandbox.backup();
    scene.world.spool().drive(None).unwrap().take().unwrap().unload().unwrap();
    scene.world.insert("T1");
    scene.archive(1);
    let image = scene.world.image("T1");
    // The copy of the catalog knows the first run, and where its blocks were.
    let (new, into) = (scene.sandbox.path("copied"), scene.sandbox.path("copied-into"));
    let (gathered, summary) = rebuild(&new, &into, std::slice::from_ref(&image)).unwrap();
    assert_eq!((gathered.copy, summary.runs, summary.volumes_missing), (Some(2), 2, 1));
    assert!(summary.problem_count > 0, "{summary:?}");
    rot(&image, b"catalog/");
    let (new, into) = (scene.sandbox.path("anew"), scene.sandbox.path("into"));
    let error = rebuild(&new, &into, std::slice::from_ref(&image)).unwrap_err().to_string();
    assert!(error.contains("--allow-gaps") && error.contains("is made"), "{error}");
    let again = rebuild(&new, &into, &[image]).unwrap_err().to_string();
    assert!(again.contains("rebuildmeta --volumes"), "{again}");
    let mut command = Command::new(scene.sandbox.program().get_program());
    command
        .arg("--catalog")
        .arg(&new)
        .args(["rebuildmeta", "--allow-gaps", "--volumes"])
        .arg(&into);
    crate::common::run(&mut command).code(3);
}

/// Another run, which has so much more.
fn add_run(scene: &Scene, name: &str, len: u64) {
    crate::common::data::noise_file(&scene.sandbox.source.join(name), len, len);
    scene.sandbox.backup();
}

#[test]
fn of_two_readings_of_a_tape_the_better_one_counts() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    let dir = scene.sandbox.path("box");
    fs::create_dir(&dir).unwrap();
    let older = dir.join("older.tap");
    let good = scene.world.image("T0");
    fs::copy(&good, &older).unwrap();
    add_run(&scene, "more", 3 << 20);
    scene.archive(1);
    let known = tapes_of(scene.catalog());
    let (files, blocks) = (known[0].1, known[0].2);
    // Each is damaged elsewhere, so that both together are whole.
    let damaged = ["one.tap", "two.tap"].map(|it| dir.join(it));
    for (image, filenum) in damaged.iter().zip([1, 2]) {
        fs::copy(&good, image).unwrap();
        spoil_in(image, filenum, 12);
    }
    let orders = [
        vec![&good, &older],
        vec![&older, &good],
        vec![&good, &damaged[0]],
        vec![&damaged[0], &good],
        vec![&damaged[0], &older, &damaged[1]],
    ];
    for (number, order) in orders.into_iter().enumerate() {
        let name = |it: &str| scene.sandbox.path(&format!("{it}{number}"));
        let (new, into) = (name("anew"), name("into"));
        let images: Vec<PathBuf> = order.into_iter().cloned().collect();
        let (gathered, summary) = rebuild(&new, &into, &images).unwrap();
        assert_eq!(tapes_of(&new), [(b"T0".to_vec(), files, blocks)], "order {number}");
        assert_eq!((gathered.files, gathered.blocks), (files, blocks), "order {number}");
        assert_eq!(summary.runs, 2);
        assert_comes_back(&scene, &new, 2, &name("restored"));
    }
}

#[test]
fn archives_of_one_catalog_are_its_own_in_any_order() {
    let scene = Scene::new(&["T0", "T1"], None);
    scene.archive(1);
    add_run(&scene, "more", 2 << 20);
    scene.world.spool().drive(None).unwrap().take().unwrap().unload().unwrap();
    scene.world.insert("T1");
    scene.archive(1);
    let known = tapes_of(scene.catalog());
    let images = ["T0", "T1"].map(|it| scene.world.image(it));
    for order in [[0, 1], [1, 0]] {
        let name = |it: &str| scene.sandbox.path(&format!("{it}{}", order[0]));
        let (new, into) = (name("anew"), name("into"));
        let (gathered, summary) =
            rebuild(&new, &into, &order.map(|it| images[it].clone())).unwrap();
        assert_eq!((gathered.problem_count, summary.problem_count), (0, 0), "{}", said(&gathered));
        assert_eq!((summary.runs, tapes_of(&new)), (2, known.clone()));
        assert!(!into.join(".gathering").exists());
        assert_comes_back(&scene, &new, 2, &name("restored"));
    }
}

#[test]
fn damage_at_the_head_of_an_archive_costs_no_block_behind_it() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    let known = tapes_of(scene.catalog());
    let good = scene.world.image("T0");
    let image = scene.sandbox.path("damaged.tap");
    let damages: [(&str, &dyn Fn()); 8] = [
        ("%batch", &|| flip(&image, b"%batch\n", 2)),
        ("%job", &|| flip(&image, b"%job\n", 2)),
        ("catalog", &|| flip(&image, b"\ncatalog /", 3)),
        ("hash", &|| flip(&image, b"\nhash blake3", 2)),
        ("first header", &|| flip(&image, b"070707", 3)),
        ("name of the batch", &|| flip(&image, b"/@0\0", 1)),
        ("name of the job file", &|| flip(&image, b"/wjob\0", 2)),
        ("first block", &|| spoil(&image, 0)),
    ];
    for (number, (what, damage)) in damages.into_iter().enumerate() {
        fs::copy(&good, &image).unwrap();
        damage();
        let name = |it: &str| scene.sandbox.path(&format!("{it}{number}"));
        let (new, into) = (name("anew"), name("into"));
        let (gathered, made) = try_rebuild(&new, &into, std::slice::from_ref(&image));
        let summary = made.unwrap_or_else(|e| panic!("{what}: {e}: {}", said(&gathered)));
        assert_eq!(tapes_of(&new), known, "{what}: {}", said(&gathered));
        assert_eq!(summary.runs, 1, "{what}");
        // A word that is lost says nothing of itself.
        if !["catalog", "hash"].contains(&what) {
            assert!(said(&gathered).contains("tape T0, file 1: "), "{what}: {}", said(&gathered));
        }
        let tapes = raidtape::catalog::tapes::Tapes::look(&new).unwrap().unwrap();
        let files = tapes.files(b"T0").unwrap();
        let said = raidtape::catalog::tapes::Tapes::look(scene.catalog()).unwrap().unwrap();
        let job = |it: &raidtape::catalog::tapes::TapeFile| (it.job.clone(), it.batch);
        assert_eq!(job(&files[0]), job(&said.files(b"T0").unwrap()[0]), "{what}");
        assert_comes_back(&scene, &new, 1, &name("restored"));
    }
}

#[test]
fn tapes_of_two_catalogs_make_the_catalog_of_the_first() {
    let one = Scene::new(&["T0"], None);
    one.archive(1);
    let two = Scene::new(&["T9"], None);
    add_run(&two, "more", 1 << 20);
    add_run(&two, "and more", 2 << 20);
    two.archive(1);
    let images = [one.world.image("T0"), two.world.image("T9")];
    for (first, second) in [(0, 1), (1, 0)] {
        let (scene, runs, label) = [(&one, 1, "T9"), (&two, 3, "T0")][first];
        let name = |it: &str| scene.sandbox.path(&format!("{it}{first}"));
        let (new, into) = (name("anew"), name("into"));
        let order = [images[first].clone(), images[second].clone()];
        let (gathered, summary) = rebuild(&new, &into, &order).unwrap();
        let told = said(&gathered);
        assert!(told.contains(&format!("tape {label}, file 1")), "{told}");
        assert!(told.contains("of another catalog"), "{told}");
        assert_eq!((summary.runs, summary.problem_count), (runs, 0), "{summary:?}");
        assert_eq!(tapes_of(&new), tapes_of(scene.catalog()));
        let metas = fs::read_dir(into.join("meta")).unwrap().map(|it| it.unwrap().file_name());
        let metas = metas.filter(|it| it.to_str().unwrap().ends_with(".meta.json.zst")).count();
        assert_eq!(metas, scene.sandbox.blocks("volume").len());
        assert_comes_back(scene, &new, runs, &name("restored"));
    }
}

#[test]
fn where_a_manifest_is_lost_the_copy_of_the_catalog_makes_up_for_it() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    add_run(&scene, "more", 1 << 20);
    scene.archive(1);
    add_run(&scene, "and more", 2 << 20);
    scene.archive(1);
    let blocks = tapes_of(scene.catalog());
    let uuid = |catalog: &Path| {
        let reader = raidtape::catalog::Reader::open(catalog).unwrap();
        reader.runs().unwrap().into_iter().map(|it| (it.id, it.uuid)).collect::<Vec<_>>()
    };
    fs::remove_dir_all(scene.sandbox.path("volume")).unwrap();
    let image = scene.world.image("T0");
    let cases: [(&[&[u8]], i64); 3] = [
        (&[b"manifests/run-00000001"], 3),
        (&[b"manifests/"], 3),
        // What came after it comes from its manifest.
        (&[b"manifests/run-00000002", b"catalog/run-00000003"], 2),
    ];
    for (number, (lost, after)) in cases.into_iter().enumerate() {
        let damaged = scene.sandbox.path("damaged.tap");
        fs::copy(&image, &damaged).unwrap();
        lost.iter().for_each(|it| rot(&damaged, it));
        let name = |it: &str| scene.sandbox.path(&format!("{it}{number}"));
        let (new, into) = (name("anew"), name("into"));
        let (gathered, made) = try_rebuild(&new, &into, &[damaged]);
        let summary = made.unwrap_or_else(|e| panic!("{number}: {e}: {}", said(&gathered)));
        assert!(said(&gathered).contains("manifests/"), "{}", said(&gathered));
        assert_eq!((gathered.copy, summary.runs), (Some(after), 3), "{number}");
        assert_eq!(summary.problem_count, 0, "{number}: {summary:?}");
        // The volume that burnt is not missed.
        assert_eq!(summary.volumes_gone.len(), 1);
        assert_eq!(tapes_of(&new), blocks);
        assert_eq!(uuid(&new), uuid(scene.catalog()));
        assert_eq!(fs::read_dir(into.join("catalog")).unwrap().count(), 0);
        // It can be given up at once, and then nothing is missing.
        let program = |line: &[&str]| {
            let mut command = Command::new(scene.sandbox.program().get_program());
            crate::common::run(command.arg("--catalog").arg(&new).args(line)).code(0);
        };
        program(&["volumes", "--retire", &summary.volumes_gone[0].uuid]);
        assert_comes_back(&scene, &new, 3, &name("restored"));
        program(&["genmeta"]);
        program(&["validate"]);
    }
    // Where no copy is left either, the reason is told.
    rot(&image, b"manifests/run-00000001");
    rot(&image, b"catalog/");
    let (new, into) = (scene.sandbox.path("last"), scene.sandbox.path("last-into"));
    let (gathered, made) = try_rebuild(&new, &into, &[image]);
    let error = made.unwrap_err().to_string();
    assert!(error.contains("the manifest of run 1"), "{error}");
    let told = said(&gathered);
    assert!(told.contains("catalog/run-00000003") && told.contains("manifests/run-"), "{told}");
}

#[test]
fn of_two_images_of_a_label_the_tape_that_is_known_is_taken() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    let shelf = scene.world.base.join("tapes");
    fs::copy(scene.world.image("T0"), shelf.join("B.tap")).unwrap();
    add_run(&scene, "more", 2 << 20);
    scene.archive(1);
    // Another tape, and one of before; both come first by their names.
    let namesake = shelf.join("A.tap");
    make_namesake(&namesake);
    for (path, _) in scene.sandbox.blocks("volume") {
        fs::remove_file(path).unwrap();
    }
    let shelf = shelf.to_str().unwrap();
    scene.sandbox.run(["tape", "recall", "latest", "--tapes", shelf]).code(0);
    scene.sandbox.run(["tape", "verify", "T0", "--tapes", shelf]).code(0);
    scene.sandbox.run(["validate"]).code(0);
}

#[test]
fn what_a_rebuild_has_not_brought_back_counts_as_no_copy() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    let blocks = scene.sandbox.blocks("volume").len();
    let (new, into) = (scene.sandbox.path("anew"), scene.sandbox.path("into"));
    rebuild(&new, &into, &[scene.world.image("T0")]).unwrap();
    let coverage = || {
        let mut command = Command::new(scene.sandbox.program().get_program());
        command.arg("--catalog").arg(&new).args(["coverage", "--json"]);
        crate::common::run(&mut command).code(0).json()
    };
    let said = coverage();
    let first = &said["by_copies"][0];
    assert_eq!(
        (first["copies"].as_u64(), first["blocks"].as_u64()),
        (Some(0), Some(blocks as u64))
    );
    let of_into = |said: &serde_json::Value| {
        let path = into.canonicalize().unwrap();
        let path = path.to_str().unwrap();
        let all = said["losses"].as_array().unwrap().iter();
        let mut found = all.filter(|it| it["volumes"][0]["path"] == path);
        found.next().unwrap()["blocks_from_tape"].clone()
    };
    assert_eq!(of_into(&said), blocks);
    scene.recall(&new, 1);
    assert_eq!(coverage()["by_copies"][0]["copies"], 1);
}

#[test]
fn where_a_copy_of_the_catalog_is_not_enough_it_is_gone_on_with() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    for (name, len) in [("one", 1 << 20), ("two", 2 << 20), ("three", 3 << 20)] {
        add_run(&scene, name, len);
        scene.archive(1);
    }
    let image = scene.world.image("T0");
    // The copy of after run 2 is left, and the manifests of runs 2 and 4.
    for lost in ["manifests/run-00000001", "manifests/run-00000003"] {
        rot(&image, lost.as_bytes());
    }
    for lost in ["catalog/run-00000003", "catalog/run-00000004"] {
        rot(&image, lost.as_bytes());
    }
    let (new, into) = (scene.sandbox.path("anew"), scene.sandbox.path("into"));
    let error = rebuild(&new, &into, &[image]).unwrap_err().to_string();
    for part in ["run 3", "--allow-gaps", "of after run 2", "catalog-restore --volumes"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!new.exists());
    let mut command = Command::new(scene.sandbox.program().get_program());
    command.arg("--catalog").arg(&new);
    command.args(["catalog-restore", "--allow-gaps", "--volumes"]).arg(&into);
    crate::common::run(&mut command).code(3);
    let reader = raidtape::catalog::Reader::open(&new).unwrap();
    let runs: Vec<_> = reader.runs().unwrap().into_iter().map(|it| it.id).collect();
    assert_eq!(runs, [1, 2]);
    assert_eq!(scene.recall(&new, 1).missing, 0);
}

#[test]
fn where_nothing_is_found_the_error_names_what_was_wrong() {
    let dir = crate::common::tape::scratch();
    let (garbage, new) = (dir.path().join("garbage.tap"), dir.path().join("anew"));
    fs::write(&garbage, "no image at all").unwrap();
    let (gathered, made) = try_rebuild(&new, &dir.path().join("into"), &[garbage]);
    let error = made.unwrap_err().to_string();
    assert!(error.contains("no tape has an archive") && error.contains("garbage.tap"), "{error}");
    assert_eq!(gathered.problem_count, 1);
    assert!(!new.exists());
}

#[test]
fn blocks_of_tape_that_cannot_be_read_where_an_archive_begins_cost_no_block_behind_them() {
    let scene = Scene::new(&["T0"], None);
    scene.archive(1);
    let image = scene.world.image("T0");
    [1, 0].into_iter().for_each(|it| spoil(&image, it));
    let (new, into) = (scene.sandbox.path("anew"), scene.sandbox.path("into"));
    let (gathered, made) = try_rebuild(&new, &into, &[image]);
    // Metas are lost with them, and the block that begins there; the others are known.
    assert_eq!(made.unwrap().runs, 1);
    let (found, known) = (tapes_of(&new).remove(0), tapes_of(scene.catalog()).remove(0));
    assert!(found.1 == known.1 && found.2 + 1 >= known.2, "{found:?}: {}", said(&gathered));
    assert!(said(&gathered).contains("tape T0, file 1"), "{}", said(&gathered));
}
