//! Readers of a mount while it has other things to do, and while its process dies.
//!
//! Invariant: each of a hundred readers checks the hash of a file of its own again and again, and
//! stops the test at the first wrong byte.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use rustix::fs::Advice;

use crate::common::{Mount, Sandbox, data, kill, mount, mountctl, program, run, wait_for};
use crate::mount::is_running;

/// How many read at once.
const READERS: u64 = 100;
/// Errors that a reader may get while the process is dead or the place is not mounted.
const DEAD: [i32; 4] = [libc::ENOTCONN, libc::ECONNABORTED, libc::ENOENT, libc::EIO];

/// A source with a file for each reader, and a run of it.
fn store(seed: u64) -> (Sandbox, Vec<blake3::Hash>) {
    let sandbox = Sandbox::with(&["--block-size", "4MiB"]);
    let mut seeded = data::Seeded::new(seed);
    let mut hashes = Vec::new();
    for number in 0..READERS {
        let len = match number {
            0 => 6 << 20,
            _ => seeded.below(150_000) as usize,
        };
        let bytes = if number % 2 == 0 { seeded.noise(len) } else { seeded.text(len) };
        fs::write(sandbox.source.join(number.to_string()), &bytes).unwrap();
        hashes.push(blake3::hash(&bytes));
    }
    sandbox.backup();
    (sandbox, hashes)
}

fn hash(path: &Path) -> io::Result<blake3::Hash> {
    let mut file = File::open(path)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    // The next one shall ask the daemon again.
    let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
    Ok(blake3::hash(&bytes))
}

/// Lets all readers read while `work` is done, and until each has read to its end once more after
/// that. Errors of [`DEAD`] are allowed if `may_fail`. Gives how many reads went well.
fn while_reading(
    root: &PathBuf,
    hashes: &[blake3::Hash],
    may_fail: bool,
    work: impl FnOnce(&AtomicU64),
) -> u64 {
    let (done, read) = (AtomicBool::new(false), AtomicU64::new(0));
    let one = |number: usize| {
        let path = root.join(number.to_string());
        loop {
            let is_last = done.load(Ordering::Acquire);
            match hash(&path) {
                Ok(hash) => {
                    assert_eq!(hash, hashes[number], "file {number}");
                    read.fetch_add(1, Ordering::Relaxed);
                }
                Err(e) => {
                    let is_dead = e.raw_os_error().is_some_and(|it| DEAD.contains(&it));
                    assert!(may_fail && is_dead && !is_last, "file {number}: {e}");
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            }
            if is_last {
                break;
            }
        }
    };
    let list = || loop {
        let is_last = done.load(Ordering::Acquire);
        let names = fs::read_dir(root).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        match names {
            Ok(names) => assert_eq!(names.len(), hashes.len()),
            Err(e) => assert!(may_fail && !is_last, "listing: {e}"),
        }
        if is_last {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    };
    std::thread::scope(|scope| {
        let (one, list) = (&one, &list);
        let readers: Vec<_> =
            (0..hashes.len()).map(|number| scope.spawn(move || one(number))).collect();
        let lister = scope.spawn(list);
        // They must end even if something fails here.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&read)));
        done.store(true, Ordering::Release);
        readers.into_iter().for_each(|it| it.join().unwrap());
        lister.join().unwrap();
        result.unwrap_or_else(|e| std::panic::resume_unwind(e));
    });
    read.into_inner()
}

#[test]
fn a_hundred_readers_read_right_while_jobs_run() {
    let seed = program::seed();
    let start = Instant::now();
    let (sandbox, hashes) = store(seed);
    let other = sandbox.path("other");
    data::mixed_tree(&other, seed, 150);
    // Much smaller than what is read.
    let mount = Mount::start(&sandbox, &["--cache-size", "2MiB"]);
    let read = while_reading(&mount.run(1), &hashes, false, |read| {
        let said = sandbox.backup_with(&["--as", "again", "--force-read"]);
        assert_eq!(said["run"], 2);
        fs::write(mount.ctl("backup"), format!("{} --force-read", other.display())).unwrap();
        let inside = mount.point.join("ingest/tree");
        data::mixed_tree(&inside, seed + 1, 60);
        assert_eq!(mount.wait_for_job(1)["state"], "done");
        fs::write(mount.ctl("backup"), "ingest").unwrap();
        assert_eq!(mount.wait_for_job(2)["state"], "done");
        let before = read.load(Ordering::Relaxed);
        wait_for("readers", || read.load(Ordering::Relaxed) > before + READERS);
    });
    assert!(fs::read_link(mount.point.join("snapshots/latest")).unwrap() == Path::new("4"));
    eprintln!("mount_busy: seed {seed}: {read} files in {:?}", start.elapsed());
    mount.end();
    sandbox.assert_valid();
}

#[test]
fn a_hundred_readers_get_an_error_or_right_bytes_while_the_process_is_killed() {
    let seed = program::seed();
    let (sandbox, hashes) = store(seed);
    let mut mount = sandbox.mount();
    let _clear = mount::Clear(mount.point.clone());
    let (point, root) = (mount.point.clone(), mount.run(1));
    let again = || run(mountctl().arg("mount").arg(&sandbox.catalog).arg(&point)).code(0);
    let pid = || {
        let text = fs::read_to_string(point.join(".ctl/status")).unwrap();
        let status: serde_json::Value = serde_json::from_str(&text).unwrap();
        status["pid"].as_u64().unwrap() as u32
    };
    let read = while_reading(&root, &hashes, true, |read| {
        let some = || {
            let before = read.load(Ordering::Relaxed);
            wait_for("readers", || read.load(Ordering::Relaxed) > before + READERS / 2);
        };
        some();
        mount.kill();
        again();
        some();
        // While something is written, too.
        data::mixed_tree(&point.join("ingest"), seed, 20);
        fs::write(point.join(".ctl/backup"), "ingest").unwrap();
        let second = pid();
        kill(second, rustix::process::Signal::KILL);
        wait_for("the process to be gone", || !is_running(second));
        again();
        some();
    });
    eprintln!("mount_busy: seed {seed}: {read} files");
    run(mountctl().arg("umount").arg(&point)).code(0);
    sandbox.assert_valid();
}
