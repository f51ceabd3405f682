//! A disk that does not answer, under a mount: who does not need it does not notice.
//!
//! The disk is the writable tree of another mount, whose process is stopped for a while.

use std::fs;
use std::path::Path;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::common::{Mount, PATIENCE, Sandbox, args, data, kill, need_root};

/// A process that is stopped, until this is dropped.
struct Stopped(u32);

impl Stopped {
    fn new(mount: &Mount) -> Stopped {
        let stopped = Stopped(mount.pid());
        kill(stopped.0, Signal::STOP);
        // Each thread stops when it next looks at its signals, and may have answered until then.
        let start = Instant::now();
        while !stopped.is_whole() {
            assert!(start.elapsed() < PATIENCE, "the host of the disk does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
        stopped
    }

    /// Whether all its threads are stopped.
    fn is_whole(&self) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.0)).unwrap();
        tasks.map(|it| it.unwrap().path().join("stat")).all(|stat| {
            // The state follows the name, which may hold anything but ends with the last ')'.
            let Ok(text) = fs::read_to_string(stat) else { return true };
            text.rsplit_once(") ").is_some_and(|it| it.1.starts_with('T'))
        })
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        kill(self.0, Signal::CONT);
    }
}

/// Does `work`; a test that would hang with it fails.
#[track_caller]
fn in_time<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (said, heard) = mpsc::channel();
    // Nobody listens any more if the test has given up.
    std::thread::spawn(move || said.send(work()));
    heard.recv_timeout(PATIENCE).unwrap_or_else(|e| panic!("{what}: {e}"))
}

fn answers(mount: &Mount) -> Vec<bool> {
    let path = mount.ctl("status");
    let status = in_time("status", move || fs::read_to_string(path).unwrap());
    let status: Value = serde_json::from_str(&status).unwrap();
    let volumes = status["volumes"].as_array().unwrap();
    volumes.iter().map(|it| it["answers"].as_bool().unwrap()).collect()
}

fn hashes(dir: &Path, names: &[String]) -> Vec<blake3::Hash> {
    names.iter().map(|it| blake3::hash(&fs::read(dir.join(it)).unwrap())).collect()
}

#[test]
fn a_disk_that_hangs_keeps_only_those_who_read_from_it() {
    need_root("one of its mounts is stopped, and others must be able to go");
    let host = Sandbox::new();
    let disk = host.mount();
    let sandbox = Sandbox::bare();
    sandbox.init(&["--compression", "none"]);
    sandbox.ok(args!["add-volume", disk.point.join("ingest/volume")]);
    // Each has a run of its own, so that it is a block of its own.
    let add = |name: &str, seed| {
        data::noise_file(&sandbox.source.join(name), seed, 700_000);
        sandbox.backup();
        name.to_owned()
    };
    // More of them than the kernel has requests under way at a time, if it is not told otherwise.
    let small: Vec<String> = (0..100).map(|it| format!("small/{it}")).collect();
    fs::create_dir(sandbox.source.join("small")).unwrap();
    for (seed, name) in (900..).zip(&small) {
        data::noise_file(&sandbox.source.join(name), seed, 10_000);
    }
    let hung = ["a", "b", "c"].map(|it| add(it, 400 + u64::from(it.as_bytes()[0])));
    let conn = rusqlite::Connection::open(&sandbox.catalog).unwrap();
    conn.execute("UPDATE volumes SET status = 'sealed'", []).unwrap();
    drop(conn);
    sandbox.add_volume("volume");
    let others = ["x", "y", "z"].map(|it| add(it, 400 + u64::from(it.as_bytes()[0])));
    assert_eq!(sandbox.blocks("volume").len(), others.len());
    let (of_hung, of_others) = (hashes(&sandbox.source, &hung), hashes(&sandbox.source, &others));

    for options in [
        &[][..],
        &["--one-session"],
        &["--reads", "passthrough"],
        &["--reads", "passthrough", "--one-session"],
    ] {
        let mount = Mount::start(&sandbox, options);
        let dir = mount.run(6);
        let stopped = Stopped::new(&disk);
        let readers: Vec<JoinHandle<_>> = (0..12)
            .map(|number| {
                let path = dir.join(&hung[number % hung.len()]);
                std::thread::spawn(move || blake3::hash(&fs::read(path).unwrap()))
            })
            .collect();
        let small_readers: Vec<JoinHandle<_>> = small
            .iter()
            .map(|name| {
                let path = dir.join(name);
                std::thread::spawn(move || fs::read(path).unwrap().len())
            })
            .collect();
        for _ in 0..3 {
            let dir = dir.clone();
            let names = in_time("a listing", move || {
                let entries = fs::read_dir(dir).unwrap().map(|it| it.unwrap());
                let files = entries.map(|it| it.metadata().unwrap()).filter(|it| it.is_file());
                files.map(|it| it.len()).collect::<Vec<_>>()
            });
            assert_eq!(names, [700_000; 6], "{options:?}");
            assert_eq!(answers(&mount), [false, true], "{options:?}");
        }
        for name in &others {
            let file = dir.join(name);
            let space = in_time("df", move || rustix::fs::statvfs(file).unwrap());
            assert!(space.f_blocks > 0 && space.f_bavail <= space.f_blocks);
        }
        let (names, from) = (others.clone(), dir.clone());
        let read = in_time("reading from another disk", move || hashes(&from, &names));
        assert_eq!(read, of_others, "{options:?}");
        assert!(readers.iter().all(|it| !it.is_finished()), "{options:?}");
        assert!(small_readers.iter().all(|it| !it.is_finished()), "{options:?}");
        // It answers again, and all get what they wait for.
        drop(stopped);
        for (number, reader) in readers.into_iter().enumerate() {
            let read = in_time("reading from the disk that hung", move || reader.join().unwrap());
            assert_eq!(read, of_hung[number % hung.len()], "{options:?}");
        }
        for reader in small_readers {
            assert_eq!(in_time("a small file", move || reader.join().unwrap()), 10_000);
        }
        assert_eq!(answers(&mount), [true, true], "{options:?}");
        mount.end();
    }
}
