//! The process is killed, or the power fails, after each operation of a command.
//!
//! A killed process leaves what programs see; so the states between two operations are all that a
//! kill can leave, and one run shows them all. What a power cut can leave of each is chosen by
//! seeds.

use std::time::Instant;

use super::scene::{Base, Said, Scene, Verb, tell};
use super::{trials, verb};
use crate::common::faultfs::disk::Disk;
use crate::common::faultfs::{Cut, Fault, Lasting, Rules};

/// Cuts tried at each operation, beside the three extremes.
const SEEDS: u64 = 3;

fn stop_everywhere(verb: &Verb) {
    let start = Instant::now();
    let scene = Scene::new();
    let base = scene.base(verb.base);
    let moments = scene.trace(verb, &base, false);
    let last = moments.len() - 1;
    let (mut stores, mut trials) = (0, 0);
    for (number, moment) in moments.iter().enumerate() {
        let cuts = [Cut::Kept, Cut::Lost, Cut::Empty, Cut::Nameless];
        let seeds = (0..SEEDS).map(|it| Cut::Some(number as u64 * SEEDS + it));
        for cut in cuts.into_iter().chain(seeds) {
            trials += 1;
            let checked = scene.check(verb, &moment.cut(cut), Said::when(number == last));
            stores += u32::from(checked.unwrap_or_else(|e| {
                let (op, what) = (moment.op, &moment.what);
                panic!("{}: {cut:?} after operation {number} ({op:?} {what}): {e}", verb.name)
            }));
        }
    }
    let time = start.elapsed().as_secs_f64();
    tell(&format!(
        "{}: {last} operations, {trials} stops, {stores} states, {time:.1} s",
        verb.name
    ));
}

/// The process is killed, the next command says that it is done, and then the power fails: what
/// the first one left unsynced must not take along what the second one has acknowledged.
fn cut_after_the_next(verb: &Verb) {
    let start = Instant::now();
    let scene = Scene::new();
    let moments = scene.trace(verb, &scene.base(verb.base), false);
    // Of long commands a part, unless all is asked for.
    let is_long = matches!(verb.base, Base::Damaged | Base::Uncatalogued);
    let every = if is_long { trials("EVERY", 4) as usize } else { 1 };
    let is_due = |number: usize| number.is_multiple_of(every) || number + 5 > moments.len();
    for (number, moment) in moments.iter().enumerate().filter(|it| is_due(it.0)) {
        let done = scene.run_on(verb, Disk::resume(moment));
        let (op, what) = (moment.op, &moment.what);
        let at = format!("{}: killed after {number} ({op:?} {what})", verb.name);
        // It may have been done already.
        let is_known = verb.base.keeps_places() && done.code == Some(2);
        assert!(done.code == Some(0) || is_known, "{at}: {}{}", done.said, done.errors);
        let last = done.disk.lock().unwrap().moment(None, String::new());
        for cut in [Cut::Lost, Cut::Some(number as u64)] {
            let checked = scene.check(verb, &last.cut(cut), Said::Done);
            checked.unwrap_or_else(|e| panic!("{at}, then done, then {cut:?}: {e}"));
        }
    }
    let time = start.elapsed().as_secs_f64();
    tell(&format!("{}: {} kills, then power cuts, {time:.1} s", verb.name, moments.len()));
}

#[test]
fn init_after_a_kill_lasts() {
    cut_after_the_next(verb("init"));
}

#[test]
fn add_volume_after_a_kill_lasts() {
    cut_after_the_next(verb("add-volume"));
}

#[test]
fn a_backup_after_a_kill_lasts() {
    cut_after_the_next(verb("next backup"));
}

#[test]
fn a_repair_after_a_kill_lasts() {
    cut_after_the_next(verb("repair"));
}

#[test]
fn rebuildmeta_after_a_kill_lasts() {
    cut_after_the_next(verb("rebuildmeta"));
}

/// Copies of the catalog shrink to different lengths: times and names of runs are in them.
fn stable(mut paths: Vec<(String, u64)>) -> Vec<(String, u64)> {
    for (path, len) in &mut paths {
        if path.contains("/catalog/run-") {
            *len = 0;
        }
    }
    paths
}

/// What is concluded from the states of one run is so: programs that are killed leave these states.
#[test]
fn kills_leave_what_a_trace_shows() {
    let scene = Scene::new();
    let verb = verb("next backup");
    let base = scene.base(verb.base);
    let moments = scene.trace(verb, &base, false);
    for at in (1..moments.len()).step_by(5) {
        for done in [true, false] {
            let rules = Rules::with(&[(at as u64, Fault::Kill(done), Lasting::Once)]);
            let killed = scene.run(verb, &base, rules, false);
            assert_eq!(killed.signal, Some(9), "{}{}", killed.said, killed.errors);
            let left = killed.disk.lock().unwrap().moment(None, String::new()).cut(Cut::Kept);
            let shown = moments[at - usize::from(!done)].cut(Cut::Kept);
            assert_eq!(stable(left.paths()), stable(shown.paths()), "operation {at}");
            scene
                .check(verb, &left, Said::Nothing)
                .unwrap_or_else(|e| panic!("killed at {at}: {e}"));
        }
    }
}

#[test]
fn init_may_stop_anywhere() {
    stop_everywhere(verb("init"));
}

#[test]
fn add_volume_may_stop_anywhere() {
    stop_everywhere(verb("add-volume"));
}

#[test]
fn a_first_backup_may_stop_anywhere() {
    stop_everywhere(verb("first backup"));
}

#[test]
fn a_next_backup_may_stop_anywhere() {
    stop_everywhere(verb("next backup"));
}

#[test]
fn genmeta_may_stop_anywhere() {
    stop_everywhere(verb("genmeta"));
}

#[test]
fn a_backup_of_two_copies_may_stop_anywhere() {
    stop_everywhere(verb("backup of two copies"));
}

#[test]
fn replicate_may_stop_anywhere() {
    stop_everywhere(verb("replicate"));
}

#[test]
fn retire_may_stop_anywhere() {
    stop_everywhere(verb("retire"));
}

#[test]
fn a_repair_may_stop_anywhere() {
    stop_everywhere(verb("repair"));
}

#[test]
fn rebuildmeta_may_stop_anywhere() {
    stop_everywhere(verb("rebuildmeta"));
}

#[test]
fn catalog_restore_may_stop_anywhere() {
    stop_everywhere(verb("catalog-restore"));
}

#[test]
fn rebuild_catalog_may_stop_anywhere() {
    stop_everywhere(verb("rebuild-catalog"));
}

#[test]
fn without_syncs_a_power_cut_loses_what_was_acknowledged() {
    let scene = Scene::new();
    let verb = verb("next backup");
    let base = scene.base(verb.base);
    let moments = scene.trace(verb, &base, true);
    let last = moments.last().unwrap();
    assert!(scene.check(verb, &last.cut(Cut::Kept), Said::Done).unwrap());
    let lost = scene.check(verb, &last.cut(Cut::Lost), Said::Done).unwrap_err();
    assert!(lost.contains("\"two\" is lost"), "{lost}");
    // Half of it is worse: nothing of what was written can be relied on.
    let broken =
        (0..50).filter(|seed| scene.check(verb, &last.cut(Cut::Some(*seed)), Said::Done).is_err());
    assert!(broken.count() > 10);
}
