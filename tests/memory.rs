//! How much memory the program takes.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::common::{Mount, Sandbox, data, number_from_env, run, tool};

const MIB: u64 = 1 << 20;

/// The most memory that a process has had so far, or nothing once it has ended.
fn peak(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|it| it.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib << 10)
}

/// Waits for a process; gives the most memory that it has had. The number only grows, so looking
/// often is enough.
fn peak_until_end(mut child: Child) -> u64 {
    let mut most = 0;
    loop {
        most = most.max(peak(child.id()).unwrap_or(0));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{status}");
            return most;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[track_caller]
fn assert_peak(sandbox: &Sandbox, limit: u64, line: &[&str]) {
    let mut command = sandbox.program();
    command.args(line).stdout(Stdio::null());
    let most = peak_until_end(command.spawn().unwrap());
    assert!(most > MIB, "the memory of {line:?} was not seen");
    assert!(most < limit, "{line:?} took {} MiB of memory", most / MIB);
    println!("{}: {} MiB", line[0], most / MIB);
}

/// Walks everything as programs do that search and pack.
fn walk(dir: &Path) {
    tool("find", [dir.as_os_str(), "-printf".as_ref(), "%i %s %T@\\n".as_ref()]);
    // Told that its output is nothing, tar would not read the files.
    let mut command = Command::new("sh");
    command.args(["-c", "tar -C \"$1\" -cf - . | cat > /dev/null", "sh"]);
    run(command.arg(dir)).code(0);
}

#[test]
fn a_large_file_takes_little_memory() {
    let sandbox = Sandbox::new();
    let bytes = number_from_env("RAIDTAPE_TEST_GIB", 1) << 30;
    data::noise_file(&sandbox.source.join("large"), 120, bytes);
    let source = sandbox.source.to_str().unwrap().to_owned();
    assert_peak(&sandbox, 256 * MIB, &["backup", &source]);
    let out = sandbox.path("out");
    let out_name = out.to_str().unwrap().to_owned();
    assert_peak(&sandbox, 256 * MIB, &["restore", "large", &out_name]);
    tool("cmp", [sandbox.source.join("large"), out.clone()]);
    fs::remove_file(&out).unwrap();
    assert_peak(&sandbox, 256 * MIB, &["validate"]);
    let mount = Mount::start(&sandbox, &["--cache-size", "64MiB"]);
    walk(&mount.run(1));
    let most = peak(mount.pid()).unwrap();
    assert!(most < (128 + 64) * MIB, "the mount took {} MiB", most / MIB);
}

/// What is set lower than anything can be is no reason to fail: one worker remains.
#[test]
fn little_memory_slows_a_run_down() {
    let sandbox = Sandbox::new();
    let mut seeded = data::Seeded::new(122);
    for number in 0..200 {
        fs::write(sandbox.source.join(format!("f{number}")), seeded.noise(100_000)).unwrap();
    }
    let source = sandbox.source.to_str().unwrap().to_owned();
    assert_peak(&sandbox, 64 * MIB, &["backup", &source, "--memory-limit", "1MiB"]);
    sandbox.assert_valid();
    sandbox.run(["backup", &source, "--memory-limit", "much"]).code(2);
}

/// Files with further names in the tree are forgotten when all names have been met.
#[test]
fn many_links_take_little_memory() {
    let sandbox = Sandbox::new();
    let files = number_from_env("RAIDTAPE_TEST_FILES", 8_000);
    for dir in ["a", "b"] {
        fs::create_dir(sandbox.source.join(dir)).unwrap();
    }
    for number in 0..files {
        let [first, second] = ["a", "b"].map(|dir| sandbox.source.join(format!("{dir}/{number}")));
        fs::write(&first, number.to_string()).unwrap();
        fs::hard_link(first, second).unwrap();
    }
    let source = sandbox.source.to_str().unwrap().to_owned();
    assert_peak(&sandbox, 96 * MIB, &["backup", &source]);
    sandbox.assert_valid();
}

#[test]
fn many_files_take_little_memory() {
    let sandbox = Sandbox::new();
    let files = number_from_env("RAIDTAPE_TEST_FILES", 8_000);
    let mut seeded = data::Seeded::new(121);
    for number in 0..files {
        let dir = sandbox.source.join(format!("a directory of many {}", number / 2_000));
        if number % 2_000 == 0 {
            fs::create_dir(&dir).unwrap();
        }
        let name = format!("a file with a name that is not short, number {number}");
        let len = seeded.below(700) as usize;
        fs::write(dir.join(name), seeded.noise(len)).unwrap();
    }
    let source = sandbox.source.to_str().unwrap().to_owned();
    assert_peak(&sandbox, 256 * MIB, &["backup", &source]);
    assert_peak(&sandbox, 256 * MIB, &["backup", &source]);
    let mount = Mount::start(&sandbox, &["--cache-size", "64MiB"]);
    walk(&mount.point.join("snapshots"));
    let most = peak(mount.pid()).unwrap();
    assert!(most < (128 + 64) * MIB, "the mount took {} MiB", most / MIB);
    let out = sandbox.path("out").to_str().unwrap().to_owned();
    assert_peak(&sandbox, 256 * MIB, &["revert-to-run", "2", &out]);
}
