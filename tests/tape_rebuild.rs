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
    let mut left = images.iter();
    let mut next = || left.next().map(|it| Loaded::open(it, Access::Read)).transpose();
    let from = From { into, next: &mut next, allow_gaps: false };
    gather::rebuild(catalog, from, &Progress::default(), &mut |_, _| Ok(()))
}

/// Marks a block of an image as one that could not be read: the `number`th behind the first
/// filemark.
fn spoil(image: &Path, number: usize) {
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
        if marks == 1 && blocks == number {
            bytes[at..at + 4].copy_from_slice(&(len | BAD).to_le_bytes());
            bytes[end - 4..end].copy_from_slice(&(len | BAD).to_le_bytes());
            return fs::write(image, bytes).unwrap();
        }
        blocks += usize::from(marks == 1);
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

fn said(gathered: &Gathered) -> String {
    gathered.problems.iter().map(|it| format!("{it}\n")).collect()
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
    Image::create(&namesake, &Medium::default()).unwrap();
    let mut label = Label::new("T0").unwrap();
    label.add("owner", "somebody else").unwrap();
    let mut loaded = Loaded::open(&namesake, Access::Write).unwrap();
    loaded.write_label(&label).unwrap();
    loaded.close().unwrap();
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
        assert_eq!(scene.recall(&new, 1).missing, 0);
        let restored = name("restored");
        let mut command = Command::new(scene.sandbox.program().get_program());
        command.arg("--catalog").arg(&new).args(["revert-to-run", "1"]).arg(&restored);
        crate::common::run(&mut command).code(0);
        let tree = crate::common::tree::Tree::of;
        crate::common::tree::assert_same(&tree(&scene.sandbox.source), &tree(&restored));
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
    let (new, into) = (scene.sandbox.path("anew"), scene.sandbox.path("into"));
    let error = rebuild(&new, &into, &[scene.world.image("T1")]).unwrap_err().to_string();
    assert!(error.contains("--allow-gaps") && error.contains("is made"), "{error}");
    let again = rebuild(&new, &into, &[scene.world.image("T1")]).unwrap_err().to_string();
    assert!(again.contains("rebuildmeta --volumes"), "{again}");
    let mut command = Command::new(scene.sandbox.program().get_program());
    command
        .arg("--catalog")
        .arg(&new)
        .args(["rebuildmeta", "--allow-gaps", "--volumes"])
        .arg(&into);
    crate::common::run(&mut command).code(3);
}
