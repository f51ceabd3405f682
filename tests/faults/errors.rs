//! Each operation of a command fails, once or from then on, in each way that a disk has.
//!
//! A command that says that it is done has to be right, and what it has done has to last. One that
//! fails says why, and leaves a store on which the next one works.

use std::time::Instant;

use super::scene::{Done, Scene, Verb, tell};
use super::verb;
use crate::common::faultfs::disk::EIO;
use crate::common::faultfs::fault::{EDQUOT, EMFILE, ENOSPC};
use crate::common::faultfs::{Cut, Fault, Lasting, Rules};

const FAULTS: [Fault; 5] = [
    Fault::Errno(ENOSPC),
    Fault::Errno(EIO),
    Fault::Errno(EDQUOT),
    Fault::Short,
    Fault::Errno(EMFILE),
];

/// Says what is wrong with how a command has ended, if anything is.
pub fn judge(
    scene: &Scene,
    verb: &Verb,
    done: &Done,
    (fault, lasting): (Fault, Lasting),
) -> Result<(), String> {
    let said = format!("{}{}", done.said, done.errors);
    let Some(code) = done.code else { return Err(format!("signal {:?}: {said}", done.signal)) };
    if said.contains("panicked") {
        return Err(format!("it panicked: {said}"));
    }
    let is_done = matches!(code, 0 | 3);
    // SQLite knows no quotas, and tells of a file that it cannot make for want of room in other
    // words; whether the disk is full is asked then, and it may not be any more.
    let expected: &[i32] = match fault {
        Fault::Errno(ENOSPC) if lasting == Lasting::ForEver => &[6],
        Fault::Errno(ENOSPC | EDQUOT) | Fault::Short => &[6, 1],
        _ => &[1],
    };
    if !is_done && !expected.contains(&code) {
        return Err(format!("exit code {code}: {said}"));
    }
    if code != 0 && !done.errors.starts_with("raidtape: ") {
        return Err(format!("code {code} and no word of why: {said}"));
    }
    let (hits, last) = {
        let disk = done.disk.lock().unwrap();
        (disk.rules.hits, disk.moment(None, String::new()))
    };
    if hits == 0 && code != 0 {
        return Err(format!("code {code}, and nothing went wrong: {said}"));
    }
    scene.check(verb, &last.cut(Cut::Kept), is_done).map_err(|e| format!("code {code}: {e}"))?;
    if is_done {
        // What was acknowledged lasts, whatever went wrong on the way.
        let lost = scene.check(verb, &last.cut(Cut::Lost), true);
        lost.map_err(|e| format!("code {code}, then a power cut: {e}"))?;
    }
    Ok(())
}

fn fail_everywhere(verb: &Verb) {
    let start = Instant::now();
    let scene = Scene::new();
    let base = scene.base(verb.base);
    let done = scene.run(verb, &base, Rules::default(), true);
    let ops: Vec<_> = {
        let disk = done.disk.lock().unwrap();
        disk.moments.iter().flatten().filter_map(|it| it.op).collect()
    };
    let opens = done.disk.lock().unwrap().rules.opens;
    let (mut trials, mut met, mut failures) = (0, 0, Vec::new());
    for fault in FAULTS {
        let is_opening = fault == Fault::Errno(EMFILE);
        let last = if is_opening { opens } else { ops.len() as u64 };
        for at in 1..=last {
            for lasting in [Lasting::Once, Lasting::ForEver] {
                let op = ops.get(at as usize - 1);
                let fits = match fault {
                    _ if is_opening || lasting == Lasting::ForEver => true,
                    Fault::Errno(errno) => op.is_some_and(|it| it.can_fail(errno)),
                    _ => op == Some(&crate::common::faultfs::Op::Write),
                };
                if !fits {
                    continue;
                }
                trials += 1;
                let done = scene.run(verb, &base, Rules::with(&[(at, fault, lasting)]), false);
                met += u32::from(done.disk.lock().unwrap().rules.hits > 0);
                if let Err(e) = judge(&scene, verb, &done, (fault, lasting)) {
                    failures.push(format!("{fault:?} {lasting:?} at {at} ({op:?}): {e}"));
                }
            }
        }
    }
    let time = start.elapsed().as_secs_f64();
    tell(&format!("{}: {trials} trials, {met} met their fault, {time:.1} s", verb.name));
    assert!(met * 10 > trials * 9, "faults that nobody meets prove nothing");
    assert!(failures.is_empty(), "{}: {}:\n{}", verb.name, failures.len(), failures.join("\n"));
}

#[test]
fn init_may_fail_anywhere() {
    fail_everywhere(verb("init"));
}

#[test]
fn add_volume_may_fail_anywhere() {
    fail_everywhere(verb("add-volume"));
}

#[test]
fn a_first_backup_may_fail_anywhere() {
    fail_everywhere(verb("first backup"));
}

#[test]
fn a_next_backup_may_fail_anywhere() {
    fail_everywhere(verb("next backup"));
}

#[test]
fn genmeta_may_fail_anywhere() {
    fail_everywhere(verb("genmeta"));
}
