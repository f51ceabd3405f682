//! A stage for the program: a catalog, a mount point, and a daemon made of a few shell lines.
//!
//! Invariant: whatever a daemon of the stage started is ended with the stage, and every stage has
//! a directory of its own, so that tests can run side by side.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Puts a usable status in place and says so, then stays.
pub const GOOD: &str = "mkdir \"$4/.ctl\"\n\
    echo '{\"pid\": 1}' > \"$4/.ctl/status\"\n\
    echo \"mounted $4\"\n\
    exec sleep 60\n";

pub struct Scene {
    pub directory: TempDir,
    pub catalog: PathBuf,
    pub mountpoint: PathBuf,
    pub daemon: PathBuf,
}

impl Scene {
    /// `script` runs with the arguments of the daemon; its process id is noted first.
    pub fn new(script: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("a b").tempdir().unwrap();
        let base = fs::canonicalize(directory.path()).unwrap();
        let scene = Self {
            catalog: base.join("cat alog"),
            mountpoint: base.join("mount point"),
            daemon: base.join("daemon"),
            directory,
        };
        fs::write(&scene.catalog, "").unwrap();
        fs::create_dir(&scene.mountpoint).unwrap();
        let prelude = "#!/bin/sh\n\
            base=$(dirname \"$0\")\n\
            for word; do echo \"$word\"; done > \"$base/arguments\"\n\
            echo $$ > \"$base/pid.new\" && mv \"$base/pid.new\" \"$base/pid\"\n";
        write_program(&scene.daemon, &format!("{prelude}{script}"));
        scene
    }

    pub fn path(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.directory.path()).unwrap().join(name)
    }

    /// The program in its `mountctl` form.
    pub fn mountctl(&self) -> Command {
        self.called("mountctl")
    }

    /// The program under another name.
    pub fn called(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mountctl"));
        command
            .arg0(name)
            .env("RAIDTAPE_BIN", &self.daemon)
            .current_dir(self.directory.path())
            .stdin(Stdio::null());
        command
    }

    pub fn mount(&self, options: &str) -> Output {
        let mut command = self.mountctl();
        command.arg("mount").arg(&self.catalog);
        command.arg(&self.mountpoint).args(["-o", options]);
        command.output().unwrap()
    }

    pub fn helper<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Output {
        let mut command = self.called("/sbin/mount.raidtape");
        command.args(arguments).output().unwrap()
    }

    /// The process id of the daemon, once it runs.
    pub fn daemon_pid(&self) -> u32 {
        let path = self.path("pid");
        wait_for("the daemon to start", || path.exists());
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }

    pub fn daemon_runs(&self) -> bool {
        is_running(self.daemon_pid())
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let Ok(text) = fs::read_to_string(self.directory.path().join("pid")) else {
            return;
        };
        if let Ok(pid) = text.trim().parse::<u32>()
            && is_running(pid)
        {
            signal("-KILL", &format!("-{pid}"));
        }
    }
}

pub fn signal(name: &str, target: &str) {
    let mut command = Command::new("kill");
    command.args([name, "--", target]).stderr(Stdio::null());
    command.status().unwrap();
}

pub fn is_running(pid: u32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => !stat.rsplit(") ").next().unwrap().starts_with('Z'),
        Err(_) => false,
    }
}

pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Another process does the writing: were the file open for writing here, a child which another
/// test starts at that moment would hold it open too, and running it would fail as busy.
fn write_program(path: &Path, text: &str) {
    let mut writer = Command::new("sh")
        .args(["-c", "cat > \"$1\" && chmod +x \"$1\"", "sh"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = writer.stdin.take().unwrap();
    pipe.write_all(text.as_bytes()).unwrap();
    drop(pipe);
    assert!(writer.wait().unwrap().success());
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Compares the exit code, and shows what was said if it is another.
pub fn assert_code(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{}", stderr(output));
}
