//! Processes that die: in the middle of a backup, or while they serve a mount.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::common::{
    Mount, PATIENCE, RAIDTAPE, Sandbox, Tree, assert_same, data, errno, mount, mountctl, run,
    wait_for,
};

/// New data for the next run: large files and small ones, none of which compresses.
fn add_data(sandbox: &Sandbox, number: u64) {
    let dir = sandbox.source.join(format!("new{number}"));
    fs::create_dir(&dir).unwrap();
    data::noise_file(&dir.join("large"), 1_000 + number, 9 << 20);
    let mut seeded = data::Seeded::new(2_000 + number);
    for name in 0..40 {
        fs::write(dir.join(name.to_string()), seeded.noise(60_000)).unwrap();
    }
}

fn count_runs(sandbox: &Sandbox) -> usize {
    sandbox.ok(["runs", "--json"]).json().as_array().unwrap().len()
}

/// Starts a backup, and ends it with SIGKILL when `due` says so. Whether it was still at work then.
fn kill_backup(sandbox: &Sandbox, mut due: impl FnMut() -> bool) -> bool {
    let mut command = sandbox.program();
    command.arg("backup").arg(&sandbox.source).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    while !due() && child.try_wait().unwrap().is_none() {
        std::hint::spin_loop();
    }
    // Not waited for yet, unless it has ended, and then this does nothing.
    child.kill().unwrap();
    child.wait().unwrap().signal() == Some(9)
}

#[test]
fn a_backup_may_die_at_any_moment() {
    let sandbox = Sandbox::with(&["--block-size", "1MiB", "--chunk-size", "16KiB"]);
    let mut seeded = data::Seeded::new(90);
    let mut states = Vec::new();
    let mut died = 0;
    let mut span = Duration::ZERO;
    for moment in 0..20 {
        add_data(&sandbox, moment);
        if moment == 0 {
            let start = Instant::now();
            sandbox.backup();
            span = start.elapsed();
            states.push(Tree::of(&sandbox.source));
            add_data(&sandbox, 100);
        }
        let before = count_runs(&sandbox);
        // One moment in each twentieth of the time that it takes.
        let part = span / 20;
        let wait = part * moment as u32 + part * seeded.below(100) as u32 / 100;
        let start = Instant::now();
        let killed = kill_backup(&sandbox, || start.elapsed() >= wait);
        died += u32::from(killed);
        let runs = count_runs(&sandbox);
        assert!(runs == before || runs == before + 1, "{before} runs became {runs}");
        assert!(killed || runs == before + 1);
        if runs > before {
            states.push(Tree::of(&sandbox.source));
        }
        // All that was there is there, whole.
        sandbox.assert_valid();
        let start = Instant::now();
        let said = sandbox.backup();
        if killed && said["bytes_adopted"] == 0 {
            // How long it takes now: this machine may have other things to do.
            span = start.elapsed();
        }
        assert_eq!(said["run"].as_u64(), Some(runs as u64 + 1));
        assert_eq!(fs::read_dir(sandbox.path("volume/tmp")).unwrap().count(), 0);
        states.push(Tree::of(&sandbox.source));
    }
    assert!(died >= 5, "only {died} of 20 backups were still at work when they were killed");
    sandbox.assert_valid();
    let mount = sandbox.mount();
    for (run, state) in (1..).zip(&states) {
        assert_same(state, &Tree::of(&mount.run(run)));
    }
    let last = states.len() as i64;
    for run in [1, last / 2, last] {
        let out = sandbox.revert(run, &format!("out{run}"));
        assert_same(&states[run as usize - 1], &Tree::of(&out));
    }
}

#[test]
fn what_a_killed_backup_has_stored_is_used_by_the_next() {
    let sandbox = Sandbox::with(&["--block-size", "1MiB", "--chunk-size", "16KiB"]);
    let index = sandbox.path("volume/.rt_volume_index");
    let len = || fs::metadata(&index).unwrap().len();
    let mut adopted = 0;
    for attempt in 0..20 {
        add_data(&sandbox, attempt);
        let before = len();
        // Blocks are in the index, the run is not in the catalog yet.
        let killed = kill_backup(&sandbox, || len() > before);
        let blocks = sandbox.stored("volume");
        let said = sandbox.backup();
        adopted = said["bytes_adopted"].as_u64().unwrap();
        if adopted == 0 {
            // It was quicker than this process, or the index's record was torn.
            continue;
        }
        assert!(killed);
        let stored = said["bytes_stored"].as_u64().unwrap();
        let new = sandbox.stored("volume") - blocks;
        assert!(stored < adopted && new < adopted, "{adopted} adopted, {new} new: {said}");
        break;
    }
    assert!(adopted > 0, "no backup died between its last block and its end");
    sandbox.assert_valid();
    let runs = count_runs(&sandbox) as i64;
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&sandbox.revert(runs, "out")));
}

#[test]
fn a_half_written_index_record_is_no_trouble() {
    let sandbox = Sandbox::new();
    data::mixed_tree(&sandbox.source, 91, 30);
    sandbox.backup();
    let index = sandbox.path("volume/.rt_volume_index");
    for tail in [&[0u8; 5][..], &[0xff; 40], &data::Seeded::new(1).noise(3_000)] {
        let mut bytes = fs::read(&index).unwrap();
        bytes.extend(tail);
        fs::write(&index, bytes).unwrap();
        fs::write(sandbox.path("volume/tmp/1-0.part"), tail).unwrap();
        data::noise_file(&sandbox.source.join(tail.len().to_string()), tail.len() as u64, 50_000);
        sandbox.backup();
        sandbox.assert_valid();
    }
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&sandbox.revert(4, "out")));
}

/// A mount whose process has died, with one run in it.
fn dead_mount(sandbox: &Sandbox) -> Mount {
    data::noise_file(&sandbox.source.join("file"), 92, 4 << 20);
    sandbox.backup();
    let mut mount = sandbox.mount();
    let mut open = File::open(mount.run(1).join("file")).unwrap();
    open.read_exact(&mut [0; 100]).unwrap();
    mount.kill();
    // Readers get an error at once; nothing looks empty.
    let (done, finished) = mpsc::channel();
    let (point, file) = (mount.point.clone(), mount.run(1).join("file"));
    std::thread::spawn(move || {
        let mut rest = Vec::new();
        let codes = [
            errno(open.read_to_end(&mut rest)),
            errno(fs::read_dir(&point)),
            errno(fs::read_dir(point.join("snapshots/1"))),
            errno(fs::read(&file)),
            errno(fs::write(point.join("ingest/new"), "x")),
        ];
        // The test has given up if nobody listens.
        let _ = done.send(codes);
    });
    let codes = finished.recv_timeout(PATIENCE).expect("a reader of a dead mount hangs");
    assert!(codes.iter().all(|it| [libc::ENOTCONN, libc::ECONNABORTED].contains(it)), "{codes:?}");
    mount
}

#[test]
fn a_dead_mount_is_an_error_and_the_program_clears_it() {
    let sandbox = Sandbox::new();
    let mount = dead_mount(&sandbox);
    run(Command::new(RAIDTAPE).arg("umount").arg(&mount.point)).code(0);
    assert!(!mount::is_mount_point(&mount.point));
    assert_eq!(fs::read_dir(&mount.point).unwrap().count(), 0);
    // And all goes on.
    let again = sandbox.mount();
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&again.run(1)));
    sandbox.assert_valid();
}

#[test]
fn a_dead_mount_is_cleared_by_the_helper_too() {
    let sandbox = Sandbox::new();
    let mount = dead_mount(&sandbox);
    run(mountctl().args(["status"]).arg(&mount.point));
    run(mountctl().arg("umount").arg(&mount.point)).code(0);
    assert!(!mount::is_mount_point(&mount.point));
    let again = sandbox.mount();
    assert_same(&Tree::of(&sandbox.source), &Tree::of(&again.run(1)));
}

#[test]
fn a_daemon_that_dies_in_a_job_loses_nothing_that_was_put_in() {
    let sandbox = Sandbox::new();
    let mut mount = sandbox.mount();
    data::noise_file(&mount.point.join("ingest/large"), 93, 100 << 20);
    data::mixed_tree(&mount.point.join("ingest"), 94, 50);
    let before = Tree::of(&mount.point.join("ingest"));
    fs::write(mount.ctl("backup"), "ingest").unwrap();
    wait_for("the job to run", || mount.job(1)["state"] == "running");
    mount.kill();
    run(Command::new(RAIDTAPE).arg("umount").arg(&mount.point)).code(0);
    sandbox.assert_valid();
    let mount = sandbox.mount();
    assert_same(&before, &Tree::of(&mount.point.join("ingest")));
    fs::write(mount.ctl("backup"), "ingest").unwrap();
    // The first one is remembered, as one that failed.
    assert_eq!(mount.wait_for_job(2)["state"], "done");
    assert_same(&before, &Tree::of(&mount.point.join("snapshots/latest")));
    mount.end();
}
