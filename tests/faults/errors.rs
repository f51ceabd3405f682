//! Each operation of a command fails, once or from then on, in each way that a disk has.
//!
//! A command that says that it is done has to be right, and what it has done has to last. One that
//! fails says why, and leaves a store on which the next one works.

use std::time::Instant;

use super::scene::{Base, Done, Said, Scene, Verb, contents_of, tell};
use super::{seed, trials, verb};
use crate::common::data::Seeded;
use crate::common::faultfs::disk::{Disk, EIO};
use crate::common::faultfs::fault::{EDQUOT, EMFILE, ENOSPC};
use crate::common::faultfs::{Cut, Fault, Lasting, Op, Rules};

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
    let end = match code {
        0 => Said::Done,
        3 => Said::Problems,
        _ => Said::Nothing,
    };
    // SQLite knows no quotas, and tells of a file that it cannot make for want of room in other
    // words; whether the disk is full is asked then, and it may not be any more.
    let expected: &[i32] = match fault {
        Fault::Errno(ENOSPC) if lasting == Lasting::ForEver => &[6],
        Fault::Errno(ENOSPC | EDQUOT) | Fault::Short => &[6, 1],
        _ => &[1],
    };
    // What is not repaired is damaged still.
    let is_damaged = verb.base == Base::Damaged && code == 5;
    if !is_done && !is_damaged && !expected.contains(&code) {
        return Err(format!("exit code {code}: {said}"));
    }
    if code != 0 && said.trim().is_empty() {
        return Err(format!("code {code} and no word of why: {said}"));
    }
    let (hits, last) = {
        let disk = done.disk.lock().unwrap();
        (disk.rules.hits, disk.moment(None, String::new()))
    };
    if hits == 0 && code != 0 {
        return Err(format!("code {code}, and nothing went wrong: {said}"));
    }
    scene.check(verb, &last.cut(Cut::Kept), end).map_err(|e| format!("code {code}: {e}"))?;
    if is_done {
        // What was acknowledged lasts, whatever went wrong on the way.
        let lost = scene.check(verb, &last.cut(Cut::Lost), end);
        lost.map_err(|e| format!("code {code}, then a power cut: {e}"))?;
    }
    Ok(())
}

/// What is tried for ever only at some points, unless all are asked for: it hardly differs from
/// another that is tried at all.
fn is_rare(fault: Fault) -> bool {
    matches!(fault, Fault::Errno(EDQUOT | EMFILE) | Fault::Short)
}

fn fail_everywhere(verb: &Verb) {
    let start = Instant::now();
    let every = trials("EVERY", 4);
    let scene = Scene::new();
    let base = scene.base(verb.base);
    let done = scene.run(verb, &base, Rules::default(), true);
    let ops: Vec<_> = {
        let disk = done.disk.lock().unwrap();
        let moments = disk.moments.iter().flatten();
        let is_scratch = |op, what: &str| op == Op::Write && what.contains(".rebuilding");
        moments.filter_map(|it| Some((it.op?, is_scratch(it.op?, &it.what)))).collect()
    };
    let opens = done.disk.lock().unwrap().rules.opens;
    let (mut tried, mut met, mut failures) = (0, 0, Vec::new());
    for fault in FAULTS {
        let is_opening = fault == Fault::Errno(EMFILE);
        let last = if is_opening { opens } else { ops.len() as u64 };
        for at in 1..=last {
            for lasting in [Lasting::Once, Lasting::ForEver] {
                // These have many operations, and each of their trials is long.
                let is_long =
                    matches!(verb.base, Base::Damaged | Base::Uncatalogued | Base::Doubtful);
                let is_both = lasting == Lasting::ForEver && is_rare(fault);
                let is_either = lasting == Lasting::ForEver || is_rare(fault);
                if (is_both || is_long && is_either) && at % every != 0 {
                    continue;
                }
                let (op, is_scratch) = ops.get(at as usize - 1).copied().unzip();
                // There are hundreds of one sort, all of them to files that count only as a whole.
                if !is_opening && is_scratch == Some(true) && at % every != 0 {
                    continue;
                }
                let fits = match fault {
                    _ if is_opening || lasting == Lasting::ForEver => true,
                    Fault::Errno(errno) => op.is_some_and(|it: Op| it.can_fail(errno)),
                    _ => op == Some(Op::Write),
                };
                if !fits {
                    continue;
                }
                tried += 1;
                let done = scene.run(verb, &base, Rules::with(&[(at, fault, lasting)]), false);
                met += u32::from(done.disk.lock().unwrap().rules.hits > 0);
                if let Err(e) = judge(&scene, verb, &done, (fault, lasting)) {
                    failures.push(format!("{fault:?} {lasting:?} at {at} ({op:?}): {e}"));
                }
            }
        }
    }
    let time = start.elapsed().as_secs_f64();
    tell(&format!("{}: {tried} trials, {met} met their fault, {time:.1} s", verb.name));
    assert!(met * 10 > tried * 9, "faults that nobody meets prove nothing");
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
fn a_next_backup_may_fail_anywhere() {
    fail_everywhere(verb("next backup"));
}

#[test]
fn genmeta_may_fail_anywhere() {
    fail_everywhere(verb("genmeta"));
}

#[test]
fn replicate_may_fail_anywhere() {
    fail_everywhere(verb("replicate"));
}

#[test]
fn retire_may_fail_anywhere() {
    fail_everywhere(verb("retire"));
}

#[test]
fn a_repair_may_fail_anywhere() {
    fail_everywhere(verb("repair"));
}

#[test]
fn rebuildmeta_may_fail_anywhere() {
    fail_everywhere(verb("rebuildmeta"));
}

#[test]
fn catalog_restore_may_fail_anywhere() {
    fail_everywhere(verb("catalog-restore"));
}

#[test]
fn rebuild_catalog_may_fail_anywhere() {
    fail_everywhere(verb("rebuild-catalog"));
}

/// A sync fails, and what it should have written is never written, though the kernel shows it and
/// later syncs say nothing of it. What a next run acknowledges must not stand on it.
#[test]
fn what_a_failed_sync_has_forgotten_is_not_built_upon() {
    let start = Instant::now();
    let scene = Scene::new();
    let (first, next) = (verb("first backup"), verb("next backup"));
    let base = scene.base(first.base);
    let syncs: Vec<u64> = {
        let moments = scene.trace(first, &base, false);
        let ops = (0..).zip(&moments);
        ops.filter(|it| it.1.op == Some(Op::Fsync)).map(|it| it.0).collect()
    };
    for at in &syncs {
        let fault = (*at, Fault::Errno(EIO), Lasting::Once);
        let failed = scene.run(first, &base, Rules::with(&[fault]), false);
        let moment = failed.disk.lock().unwrap().moment(None, String::new());
        let done = scene.run_on(next, Disk::resume(&moment));
        assert_eq!(done.code, Some(0), "sync {at}: {}{}", done.said, done.errors);
        let last = done.disk.lock().unwrap().moment(None, String::new());
        let wanted = Verb { base: Base::Volumes, ..*next };
        let checked = scene.check(&wanted, &last.cut(Cut::Lost), Said::Done);
        checked.unwrap_or_else(|e| panic!("sync {at} failed, then a run, then a power cut: {e}"));
    }
    tell(&format!("{} syncs that forget, {:.1} s", syncs.len(), start.elapsed().as_secs_f64()));
}

/// A disk that gives another bit once than it has: no reader takes it for what was stored.
#[test]
fn a_bit_that_flips_on_the_way_is_never_believed() {
    let dump = Verb {
        name: "dump",
        base: Base::Run,
        line: &["dump", "latest", ".", "--format", "tar"],
        stores: None,
    };
    let scene = Scene::new();
    let base = scene.base(dump.base);
    let reads = {
        let done = scene.run(&dump, &base, Rules::default(), false);
        assert_eq!(contents_of(&done.bytes), scene.contents["one"]);
        done.disk.lock().unwrap().rules.reads
    };
    let mut seeded = Seeded::new(seed());
    let mut noticed = 0;
    for at in 1..=reads {
        for _ in 0..12 {
            let fault = (at, Fault::Flip(seeded.next() >> 8));
            let rules = Rules { read_fault: Some(fault), ..Rules::default() };
            let done = scene.run(&dump, &base, rules, false);
            assert!(!done.errors.contains("panicked"), "{fault:?}: {}", done.errors);
            assert!(done.code.is_some(), "{fault:?}: signal {:?}", done.signal);
            noticed += u32::from(done.code != Some(0));
            for (name, hash) in contents_of(&done.bytes) {
                // Names are the catalog's, of which a page has no check of its own.
                let expected = scene.contents["one"].get(&name);
                assert!(expected.is_none_or(|it| *it == hash), "{fault:?}: wrong bytes");
            }
        }
    }
    tell(&format!("dump: {reads} reads, {} flips, {noticed} noticed", reads * 12));
}
