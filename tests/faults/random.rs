//! Faults by chance, several at a time, and in runs larger than can be enumerated.
//!
//! A few in each run of the tests, so that this keeps working; scripts/judge-faults tries
//! thousands.

use std::time::Instant;

use super::errors::judge;
use super::scene::{Said, Scene, Verb, tell};
use super::{VERBS, chance, numbers, seed, verb};
use crate::common::faultfs::disk::EIO;
use crate::common::faultfs::fault::{EDQUOT, ENOSPC};
use crate::common::faultfs::{Cut, Fault, Lasting, Rules};

/// A larger run, with as many threads as it likes: its files are larger than a block.
const LARGE: Verb = Verb {
    name: "a large backup",
    line: &["backup", "/large", "--as", "source", "--comment", "large"],
    stores: Some("large"),
    ..VERBS[3]
};

#[test]
fn kills_and_cuts_by_chance() {
    let start = Instant::now();
    let mut scene = Scene::new();
    scene.make_large();
    let base = scene.base(LARGE.base);
    let whole = scene.run(&LARGE, &base, Rules::default(), false);
    assert_eq!(whole.code, Some(0), "{}", whole.errors);
    let ops = whole.disk.lock().unwrap().rules.changes;
    let all = numbers("KILLS", 20);
    let (count, from) = (all.end - all.start, all.start);
    let (mut killed, mut cut) = (0, 0);
    for number in all {
        let mut seeded = chance(number);
        let (at, is_done) = (1 + seeded.below(ops), seeded.below(2) == 0);
        let rules = Rules::with(&[(at, Fault::Kill(is_done), Lasting::Once)]);
        let done = scene.run(&LARGE, &base, rules, false);
        let how = if number % 2 == 0 { Cut::Kept } else { Cut::Some(seeded.next()) };
        killed += u64::from(done.signal == Some(9));
        cut += u64::from(how != Cut::Kept);
        let moment = done.disk.lock().unwrap().moment(None, String::new());
        let result = scene.check(&LARGE, &moment.cut(how), Said::when(done.code == Some(0)));
        if let Err(e) = result {
            panic!(
                "killed at {at} ({is_done}) and {how:?} (number {number}, seed {}): {e}",
                seed()
            );
        }
    }
    assert!(killed * 10 > count * 8, "only {killed} of {count} were killed");
    let time = start.elapsed().as_secs_f64();
    let seed = seed();
    tell(&format!(
        "kills: {count} from {from}, of large runs of {ops} operations: {killed} killed, {cut} \
         with a power cut, 0 lost, {time:.1} s, seed {seed}"
    ));
}

#[test]
fn pairs_of_errors_by_chance() {
    let start = Instant::now();
    let scene = Scene::new();
    let verb = verb("next backup");
    let base = scene.base(verb.base);
    let ops = scene.trace(verb, &base, false).len() as u64 - 1;
    let all = numbers("PAIRS", 60);
    let (count, from) = (all.end - all.start, all.start);
    let mut both = 0;
    for number in all {
        let mut seeded = chance(number);
        let mut fault = || {
            let fault = match seeded.below(4) {
                0 => Fault::Errno(ENOSPC),
                1 => Fault::Errno(EDQUOT),
                2 => Fault::Errno(EIO),
                _ => Fault::Short,
            };
            let lasting =
                [Lasting::Once, Lasting::Once, Lasting::ForEver][seeded.below(3) as usize];
            (1 + seeded.below(ops), fault, lasting)
        };
        let faults = [fault(), fault()];
        let done = scene.run(verb, &base, Rules::with(&faults), false);
        both += u64::from(done.disk.lock().unwrap().rules.hits > 1);
        // Either may be the one that ends it; a short write may be called anything.
        if let Err(e) = judge(&scene, verb, &done, (Fault::Short, Lasting::Once)) {
            panic!("{faults:?} (number {number}, seed {}): {e}", seed());
        }
    }
    let time = start.elapsed().as_secs_f64();
    let seed = seed();
    tell(&format!(
        "pairs: {count} from {from}, {both} met both errors, 0 lost, {time:.1} s, seed {seed}"
    ));
}

#[test]
fn power_cuts_by_chance() {
    let start = Instant::now();
    let all = numbers("CUTS", 200);
    let (count, from, mut stores) = (all.end - all.start, all.start, 0);
    let verbs = ["first backup", "next backup", "genmeta"].map(verb);
    for (part, verb) in verbs.into_iter().enumerate() {
        let scene = Scene::new();
        let moments = scene.trace(verb, &scene.base(verb.base), false);
        for number in all.clone().filter(|it| *it as usize % 3 == part) {
            let mut seeded = chance(number);
            let at = seeded.below(moments.len() as u64) as usize;
            let cut = Cut::Some(seeded.next());
            let checked =
                scene.check(verb, &moments[at].cut(cut), Said::when(at == moments.len() - 1));
            stores += u32::from(checked.unwrap_or_else(|e| {
                panic!("{}: {cut:?} at {at} (number {number}, seed {}): {e}", verb.name, seed())
            }));
        }
    }
    let time = start.elapsed().as_secs_f64();
    let seed = seed();
    tell(&format!("cuts: {count} from {from}, {stores} states, 0 lost, {time:.1} s, seed {seed}"));
}
