//! A mount that goes away with its test, however that ends.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{PATIENCE, RAIDTAPE, Sandbox, is_root, kill, run, wait_for};

/// The ways of mounting, by name and by options of `mount`: what holds of reading holds in each.
pub const MODES: &[(&str, &[&str])] = &[
    ("as it comes", &[]),
    ("by one session", &["--one-session"]),
    ("without messages for opens", &["--reads", "zero-message"]),
    ("with passthrough", &["--reads", "passthrough"]),
    ("with passthrough by one session", &["--reads", "passthrough", "--one-session"]),
    ("with a small cache", &["--cache-size", "1MiB"]),
    ("for all users", &["--allow-other"]),
];

/// A mounted catalog, and the process that serves it.
pub struct Mount {
    /// Where it is mounted.
    pub point: PathBuf,
    daemon: Child,
    log: PathBuf,
}

impl Mount {
    /// Mounts a sandbox's catalog on a new directory beside it and waits until that answers.
    pub fn start(sandbox: &Sandbox, options: &[&str]) -> Mount {
        File::options().read(true).write(true).open("/dev/fuse").unwrap_or_else(|e| {
            panic!(
                "this test needs /dev/fuse: {e}. Install the package fuse3, load the module fuse, \
                 and for other users than root give the device the mode 666"
            )
        });
        let number = (0..).find(|it| !sandbox.path(&format!("mount{it}")).exists()).unwrap();
        let point = sandbox.path(&format!("mount{number}"));
        fs::create_dir(&point).unwrap();
        let log = sandbox.path(&format!("mount{number}.log"));
        let mut command = sandbox.program();
        command.arg("mount").arg(&point).arg("--foreground").args(options);
        command.stdout(Stdio::piped()).stderr(File::create(&log).unwrap());
        let mut daemon = command.spawn().unwrap();
        let out = daemon.stdout.take().unwrap();
        let mount = Mount { point, daemon, log };
        let (said, heard) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            // Nobody waits any more if the test has given up.
            let _ = BufReader::new(out).read_line(&mut line).map(|_| said.send(line));
        });
        let line = heard.recv_timeout(PATIENCE).unwrap_or_default();
        assert!(line.starts_with("mounted "), "{line:?} from the mount: {}", mount.log());
        mount
    }

    /// The process that serves it.
    pub fn pid(&self) -> u32 {
        self.daemon.id()
    }

    /// What the process has written to its log.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The tree of a run.
    pub fn run(&self, run: i64) -> PathBuf {
        self.point.join("snapshots").join(run.to_string())
    }

    /// A control file.
    pub fn ctl(&self, name: &str) -> PathBuf {
        self.point.join(".ctl").join(name)
    }

    /// What a job says of itself.
    pub fn job(&self, job: u64) -> Value {
        let text = fs::read_to_string(self.ctl(&format!("jobs/{job}/progress.json"))).unwrap();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text:?}"))
    }

    /// Waits for the end of a job; gives its last words.
    pub fn wait_for_job(&self, job: u64) -> Value {
        let mut last = Value::Null;
        wait_for("a job to end", || {
            last = self.job(job);
            !matches!(last["state"].as_str(), Some("queued" | "waiting" | "running"))
        });
        last
    }

    /// Unmounts as a user would; the process must end well.
    pub fn end(mut self) {
        run(Command::new(RAIDTAPE).arg("umount").arg(&self.point)).code(0);
        let status = self.wait();
        assert_eq!(status.and_then(|it| it.code()), Some(0), "{}", self.log());
        assert!(!is_mount_point(&self.point));
    }

    /// Waits for the process to end by itself; gives its exit code.
    pub fn wait_for_end(mut self) -> Option<i32> {
        self.wait().expect("the process of the mount goes on").code()
    }

    /// Kills the process; the mount stays, dead.
    pub fn kill(&mut self) {
        kill(self.pid(), rustix::process::Signal::KILL);
        self.daemon.wait().unwrap();
    }

    /// Whether the process is gone.
    pub fn has_ended(&mut self) -> bool {
        self.daemon.try_wait().unwrap().is_some()
    }

    fn wait(&mut self) -> Option<ExitStatus> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.daemon.try_wait() {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if is_mount_point(&self.point) {
            detach(&self.point);
        }
        if self.wait().is_none() {
            // It is a child of ours and not waited for, so its number is still its own.
            let _ = self.daemon.kill();
            let _ = self.daemon.wait();
        }
        if std::thread::panicking() {
            eprintln!("the log of the mount:\n{}", self.log());
        }
    }
}

/// Takes away, at the end of a test, what that has mounted on a directory by other means.
pub struct Clear(pub PathBuf);

impl Drop for Clear {
    fn drop(&mut self) {
        while is_mount_point(&self.0) {
            detach(&self.0);
        }
    }
}

/// Takes a mount away, dead or alive, as far as that is possible.
pub fn detach(point: &Path) {
    if is_root() {
        let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
    } else {
        let mut command = Command::new("fusermount3");
        let _ = command.args(["-u", "-z", "--"]).arg(point).stderr(Stdio::null()).status();
    }
}

/// Whether something is mounted on a path that needs no quoting in the mount table.
pub fn is_mount_point(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().any(|line| line.split(' ').nth(4).is_some_and(|it| Path::new(it) == path))
}
