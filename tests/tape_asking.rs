//! Questions to who sits at the terminal, and what comes of the answers.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use raidtape::tape::medium::Medium;

use crate::common::tape::scratch;
use crate::common::tapeworld::TapeWorld;
use crate::common::terminal::Terminal;
use crate::common::verbs::Place;
use crate::common::{RAIDTAPE, Sandbox};

const ENTER: &str = "and press Enter, or type q to stop: ";

/// Puts an image into the empty drive of a place, as a person does.
fn put_in(drive: &Path, image: &Path) {
    symlink(image, drive.join("loaded")).unwrap();
}

/// A place with tapes T1, which is short and in the drive, and T2.
fn two_tapes() -> Place {
    let place = Place::with_drive();
    for (image, label) in [("B", "T2"), ("A", "T1")] {
        place.ok(&["t0load", place.image(image).to_str().unwrap()]);
        place.ok(&["t0label", "-w", label]);
    }
    let medium = Medium { capacity: Some(150_000), ..Medium::default() };
    medium.write(&place.image("A")).unwrap();
    place
}

fn add_job(place: &Place, files: u64) -> String {
    fs::write(place.base.join("file"), vec![7; 40_000]).unwrap();
    let job = place.ok(&["t0job", "-c", "-p", &format!("root={}", place.base.display())]);
    place.feed(&["t0job", "-a", &job], &"file\n".repeat(files as usize));
    place.ok(&["t0queue", "-a", &job]);
    job
}

fn start(place: &Place, words: &[&str]) -> Terminal {
    Terminal::start(&place.program(words[0]), &words[1..], &place.base.join("spool"))
}

#[test]
fn the_next_tape_is_asked_for() {
    let place = two_tapes();
    add_job(&place, 5);
    let drive = place.base.join("drive");
    let mut terminal = start(&place, &["t0write", "-v", "-a", "-b", "4k"]);
    terminal.wait_for(ENTER, 1);
    let said = terminal.seen();
    assert!(said.contains("tape T1 is full"), "{said}");
    assert!(said.contains("put another tape (T2) into") && said.ends_with(ENTER), "{said}");
    assert!(!drive.join("loaded").exists(), "it was given out");
    // Nothing is drawn over the question while it stands there.
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert_eq!(terminal.seen(), said);
    // Nobody has put one in.
    terminal.type_line("");
    terminal.wait_for(ENTER, 2);
    assert!(terminal.seen().contains("there is no tape in"), "{}", terminal.seen());
    put_in(&drive, &place.image("B"));
    terminal.type_line("");
    let (code, said) = terminal.end();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("of tape T1") && said.contains("is file 1 of tape T2"), "{said}");
    assert_eq!(place.ok(&["t0job", "-l"]), "");
    assert!(place.ok(&["t0ck"]).ends_with("0 errors"));
}

#[test]
fn who_types_q_is_not_asked_again() {
    let place = two_tapes();
    let job = add_job(&place, 5);
    let mut terminal = start(&place, &["t0write", "-b", "4k", &job]);
    terminal.wait_for(ENTER, 1);
    terminal.type_line("q");
    let (code, said) = terminal.end();
    assert_eq!(code, 7, "{said}");
    assert!(said.contains("put in a tape that has room, as T2, and write again"), "{said}");
    assert_eq!(place.ok(&["t0job", "-l"]), format!("r w {job}"));
    // The drive is empty now, and that is asked for at first.
    let mut terminal = start(&place, &["t0write", "-b", "4k", &job]);
    terminal.wait_for(ENTER, 1);
    assert!(terminal.seen().contains("there is no tape in drive d0"), "{}", terminal.seen());
    put_in(&place.base.join("drive"), &place.image("B"));
    terminal.type_line("");
    assert_eq!(terminal.end().0, 0);
    // What was split is on both: one is in the drive, and the other one is asked for.
    let mut terminal = start(&place, &["t0read", "-v", &job]);
    terminal.wait_for("put tape T1 into the drive and press Enter", 1);
    put_in(&place.base.join("drive"), &place.image("A"));
    terminal.type_line("");
    let (code, said) = terminal.end();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("5 files") && said.contains("2 whole batches"), "{said}");
}

#[test]
fn an_archive_asks_for_its_first_tape() {
    let dir = scratch();
    let sandbox = Sandbox::with(&["--block-size", "1MiB"]);
    fs::write(sandbox.source.join("file"), vec![3; 100_000]).unwrap();
    sandbox.backup();
    let world = TapeWorld::new(dir.path());
    world.add_tape("T0", &Medium::default());
    let catalog = sandbox.catalog.to_str().unwrap();
    let words = ["--catalog", catalog, "tape", "archive", "latest"];
    let start = || Terminal::start(Path::new(RAIDTAPE), &words, &dir.path().join("t0p"));
    let mut terminal = start();
    terminal.wait_for(ENTER, 1);
    terminal.type_line("q");
    let (code, said) = terminal.end();
    assert_eq!(code, 7, "{said}");
    assert!(said.contains("put in a tape of pool any that has room, as T0"), "{said}");
    let mut terminal = start();
    terminal.wait_for(ENTER, 1);
    assert!(terminal.seen().contains("put another tape (T0) into"), "{}", terminal.seen());
    world.insert("T0");
    terminal.type_line("");
    let (code, said) = terminal.end();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("wrote 2 tape files"), "{said}");
}
