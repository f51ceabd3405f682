//! Files that were not whole when they were written, archives that nobody was told of, reads that
//! were killed or that meet a bad block: each is told from what is right, and leaves that alone.

use std::fs;
use std::path::Path;

use raidtape::tape::cpio::{Archive, Header};

use crate::common::tape::open_image;
use crate::common::verbs::Place;
use crate::tape_readback::{add_job, add_reading, check, names, out, small_world, spoil};

/// A file whose length is not what it says.
const PARTIAL: &str = "/sys/kernel/uevent_seqnum";
const BLOCK: usize = 32_768;

#[test]
fn what_was_not_whole_when_it_was_written_is_not_given_out() {
    let (place, src) = small_world(&["a", "b"]);
    let job = place.ok(&["t0job", "-c", "-p", &format!("root={}", src.display())]);
    place.feed(&["t0job", "-a", &job], &format!("a\n{PARTIAL}\nb\n{PARTIAL}\n"));
    place.ok(&["t0queue", "-a", &job]);
    assert_eq!(place.code(&["t0write", "-a"]), 3);
    let w0 = place.spool().job(&job).unwrap().dir().join("w0");
    let text = fs::read_to_string(&w0).unwrap();
    assert_eq!(text.matches(&format!("\nnote partial {PARTIAL}\n")).count(), 2, "{text}");
    // The tape has what was written.
    let said = place.ok(&["t0ck"]);
    assert!(said.contains("2 of them by their sums: 0 errors"), "{said}");
    let was = format!("{PARTIAL}: it was not whole when it was written");
    assert_eq!(said.matches(&was).count(), 2, "{said}");
    let (checked, wrong) = check(&place.image("A"), None);
    assert_eq!((checked.summed, wrong), (2, Vec::new()));
    // Neither with what the spool knows nor without it.
    let (dir, name) = out(&place, "alone");
    let said = place.fails(3, &["t0read", "-v", "--file", "1", "-C", &name]);
    assert_eq!(said.matches(&was).count(), 2, "{said}");
    let other = format!("{}.damaged", &PARTIAL[1..]);
    assert!(dir.join(&other).exists() && !dir.join(&PARTIAL[1..]).exists(), "{said}");
    assert_eq!(fs::read(dir.join("b")).unwrap(), b"content of b");
    let (dir, name) = out(&place, "out");
    let mine = dir.join(&PARTIAL[1..]);
    fs::create_dir_all(mine.parent().unwrap()).unwrap();
    fs::write(&mine, "mine").unwrap();
    let said = place.fails(3, &["t0read", "-v", "-f", "-C", &name, &job]);
    assert_eq!(said.matches(&was).count(), 2, "{said}");
    assert!(said.contains("2 files, ") && said.contains("2 errors; 1 whole batches"), "{said}");
    assert_eq!(fs::read(&mine).unwrap(), b"mine");
    assert_eq!(names(&dir), "a\nb\nsys\nsys/kernel\nsys/kernel/uevent_seqnum\n");
    // All that was promised is right.
    let text = fs::read_to_string(w0.with_file_name("r0")).unwrap();
    let (_, results) = text.split_once("\n%read-results\n").unwrap();
    assert_eq!(results.matches("ok ").count(), 2, "{text}");
    assert_eq!(results.matches(&format!("fail 116 {PARTIAL}\n")).count(), 2, "{text}");
    // A bad one is still bad.
    spoil(&place.image("A"), "content of b", 0);
    let said = place.fails(5, &["t0read", &job]);
    assert!(said.contains("b: its content is not what was written"), "{said}");
    let wrong = check(&place.image("A"), None).1;
    assert!(wrong.len() == 1 && wrong[0].contains("b: its content is not"), "{wrong:?}");
}

/// Marks a block of the first tape file of an image as one that cannot be read.
fn scratch_block(image: &Path, number: usize) {
    let mut bytes = fs::read(image).unwrap();
    let at = 8 + BLOCK + 4 + number * (BLOCK + 8);
    for word in [at, at + 4 + BLOCK] {
        assert_eq!(bytes[word..word + 4], (BLOCK as u32).to_le_bytes());
        bytes[word + 3] |= 0x80;
    }
    fs::write(image, bytes).unwrap();
}

#[test]
fn a_file_behind_a_bad_block_of_another_is_read() {
    let (place, src) = small_world(&["a", "c"]);
    fs::write(src.join("b"), vec![7; 200_000]).unwrap();
    let job = add_job(&place, &src, &[&["a", "b", "c"]]);
    place.ok(&["t0write", "-a"]);
    scratch_block(&place.image("A"), 3);
    let (dir, name) = out(&place, "out");
    place.ok(&["t0read", "-C", &name, &job, "a", "c"]);
    assert_eq!(names(&dir), "a\nc\n");
    assert_eq!(fs::read(dir.join("c")).unwrap(), b"content of c");
    let reading = add_reading(&place, &src, &["a", "c"]);
    place.ok(&["t0read", &reading]);
    let (dir, name) = out(&place, "all");
    place.fails(5, &["t0read", "-C", &name, &job]);
    assert_eq!(names(&dir), "a\nc\n");
}

#[test]
fn behind_damage_only_what_is_recorded_there_is_believed() {
    let (place, src) = small_world(&["a", "b", "c"]);
    let job = add_job(&place, &src, &[&["a", "b", "c"]]);
    place.ok(&["t0write", "-a"]);
    // The header of `a`: its magic, which is before 70 digits and the name.
    spoil(&place.image("A"), "content of a", 78);
    let w0 = place.spool().job(&job).unwrap().dir().join("w0");
    let text = fs::read_to_string(&w0).unwrap();
    fs::write(&w0, text.replace(" b\n", " x\n")).unwrap();
    let (dir, name) = out(&place, "out");
    let said = place.fails(5, &["t0read", "-C", &name, &job]);
    for lost in ["a", "x"] {
        let what = format!("t0p: {lost}: it is not there, where it was written");
        assert_eq!(said.lines().filter(|it| *it == what).count(), 1, "{said}");
    }
    assert_eq!(names(&dir), "c\n", "{said}");
}

/// What the archive of a pending batch begins with: its head, and files of this length.
fn begun(place: &Place, job: &str, len: usize) -> Vec<u8> {
    let job = place.spool().job(job).unwrap();
    let mut archive = Archive::with_sums(Vec::new());
    let mut add = |name: &[u8], content: &[u8]| {
        let size = content.len() as u64;
        let header = Header { mode: 0o100_644, nlink: 1, size, ..Header::default() };
        let mut content = content;
        archive.add(&header, name, &mut content).unwrap();
    };
    let batch = fs::read(job.dir().join("b0")).unwrap();
    add(&job.member_name(0), &batch);
    add(job.path().to_str().unwrap().as_bytes(), &fs::read(job.path()).unwrap());
    add(b"a", &vec![1; len]);
    archive.finish(1).unwrap()
}

#[test]
fn an_archive_that_nobody_was_told_of_is_no_error_of_the_tape() {
    let (place, src) = small_world(&["a"]);
    add_job(&place, &src, &[&["a"]]);
    place.ok(&["t0write", "-a"]);
    let job = add_job(&place, &src, &[&["a"]]);
    // Two writers that were killed, and a tape that had no room for a head.
    let archive = begun(&place, &job, 200_000);
    let mut drive = open_image(&place.image("A"));
    drive.to_end_of_data().unwrap();
    for bytes in [&archive[..3 * BLOCK], &archive[..512], &archive[..5 * BLOCK]] {
        for block in bytes.chunks(BLOCK) {
            drive.write(block).unwrap();
        }
        drive.write_filemarks(1).unwrap();
    }
    drive.close().unwrap();
    let not = format!("batch 0 of job {job} was not acknowledged here");
    let said = place.ok(&["t0ck"]);
    assert_eq!(said.matches(&not).count(), 3, "{said}");
    assert!(said.contains("cut off") && said.ends_with("0 errors"), "{said}");
    // Nor is it when the batch is somewhere else.
    place.ok(&["t0write", "-a"]);
    let said = place.ok(&["t0scan"]);
    let of_job = said.lines().filter(|it| it.contains(&job)).count();
    assert!(said.contains("\n5 ") && of_job == 4, "{said}");
    let said = place.ok(&["t0ck"]);
    assert_eq!(said.matches(&not).count(), 3, "{said}");
    // What was acknowledged is missed, and of what nobody knows nothing is excused.
    spoil(&place.image("A"), "content of a", 0);
    assert!(place.fails(5, &["t0ck"]).ends_with("1 errors"));
    spoil(&place.image("A"), "bontent of a", 0);
    assert!(place.ok(&["t0ck"]).ends_with("0 errors"));
    let dir = place.spool().job(&job).unwrap().dir().to_path_buf();
    fs::rename(&dir, place.base.join("away")).unwrap();
    place.fails(5, &["t0ck"]);
}

#[test]
fn what_a_killed_read_has_left_goes_and_what_is_there_is_told_of() {
    let (place, src) = small_world(&["a", "b"]);
    fs::create_dir(src.join("d")).unwrap();
    fs::write(src.join("d/e"), "content of e").unwrap();
    let job = add_job(&place, &src, &[&["a", "d", "d/e", "b"]]);
    place.ok(&["t0write", "-a"]);
    let (dir, name) = out(&place, "out");
    fs::create_dir(dir.join("d")).unwrap();
    // No process has so high a number. This one is alive.
    let alive = format!(".raidtape-reading-{}-1", std::process::id());
    for dead in ["", "d/"] {
        fs::write(dir.join(format!("{dead}.raidtape-reading-4194305-7")), "half").unwrap();
        fs::write(dir.join(format!("{dead}.raidtape-reading-me")), "mine").unwrap();
    }
    fs::write(dir.join(&alive), "half").unwrap();
    place.ok(&["t0read", "-C", &name, &job]);
    let expected = format!("{alive}\n.raidtape-reading-me\na\nb\nd\nd/.raidtape-reading-me\nd/e\n");
    assert_eq!(names(&dir), expected);
    let said = place.fails(3, &["t0read", "-C", &name, &job]);
    assert!(said.contains("a: what is there stays without -f: File exists"), "{said}");
    place.ok(&["t0read", "-f", "-C", &name, &job]);
}
