//! What tests are made of: a store in a directory of its own, and the programs that work on it.
//!
//! Invariant: every test has its own directory, whose parts go away with the [`Sandbox`], and ends
//! only processes that it started.

pub mod data;
pub mod disk;
pub mod faultdrive;
pub mod faultfs;
pub mod mirror;
pub mod mount;
pub mod program;
pub mod simstore;
pub mod tape;
pub mod tapeworld;
pub mod terminal;
pub mod torture;
pub mod tree;
pub mod verbs;
pub mod world;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::Value;
use tempfile::TempDir;

pub use mount::Mount;
pub use tree::{Tree, assert_same};

/// The program under test.
pub const RAIDTAPE: &str = env!("CARGO_BIN_EXE_raidtape");
/// Somebody who is not root.
pub const NOBODY: u32 = 65534;
/// How long anything may take that only has to happen at all.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Arguments of different types as one list.
macro_rules! args {
    ($($it:expr),* $(,)?) => { [$(std::ffi::OsString::from($it)),*] };
}
pub(crate) use args;

/// A catalog, its volumes, and a source, in a directory of their own.
pub struct Sandbox {
    dir: TempDir,
    /// The catalog file.
    pub catalog: PathBuf,
    /// The directory to back up.
    pub source: PathBuf,
    /// Who runs the program; this process's user when `None`.
    user: Option<u32>,
}

impl Sandbox {
    /// A catalog with one volume that may be filled up, and an empty source.
    pub fn new() -> Sandbox {
        Sandbox::with(&[])
    }

    /// The same, with options of `init`.
    pub fn with(init: &[&str]) -> Sandbox {
        let sandbox = Sandbox::bare();
        sandbox.init(init);
        sandbox.add_volume("volume");
        sandbox
    }

    /// Everything of which is done by somebody who is not root.
    pub fn of_nobody() -> Sandbox {
        Sandbox::of_nobody_with(&[])
    }

    /// The same, with options of `init`.
    pub fn of_nobody_with(init: &[&str]) -> Sandbox {
        let mut sandbox = Sandbox::bare();
        if is_root() {
            sandbox.user = Some(NOBODY);
            for path in [sandbox.dir.path(), &sandbox.source] {
                std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
            }
            // The build's directory may be closed to others. Not copied by this process: a child
            // that another test starts meanwhile would hold the copy open, and it could not run.
            tool("cp", args![RAIDTAPE, &sandbox.path("raidtape")]);
        }
        sandbox.init(init);
        sandbox.add_volume("volume");
        sandbox
    }

    /// Only the directories.
    pub fn bare() -> Sandbox {
        let dir = tempfile::Builder::new().prefix("raidtape-test-").tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let base = dir.path().canonicalize().unwrap();
        let sandbox =
            Sandbox { catalog: base.join("catalog"), source: base.join("source"), dir, user: None };
        fs::create_dir(&sandbox.source).unwrap();
        sandbox
    }

    /// A path in the sandbox.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    /// Makes the catalog. Nothing is left free unless `options` say so: a test's disk may be full.
    pub fn init(&self, options: &[&str]) {
        let mut line = vec!["init"];
        if !options.contains(&"--reserve") {
            line.extend(["--reserve", "0"]);
        }
        line.extend(options);
        self.ok(line);
    }

    /// Adds a volume with this name in the sandbox; gives its path.
    pub fn add_volume(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        self.ok(args!["add-volume", &path]);
        path
    }

    /// The program, working on the catalog.
    pub fn program(&self) -> Command {
        let mut command = match self.user {
            Some(user) => {
                let mut command = Command::new(self.path("raidtape"));
                command.uid(user).gid(user);
                command
            }
            None => Command::new(RAIDTAPE),
        };
        command.arg("--catalog").arg(&self.catalog);
        command.env_remove("RAIDTAPE_CATALOG").env_remove("RAIDTAPE_LOG");
        command.env("T0P_ROOT", self.path("t0p"));
        command.stdin(Stdio::null()).current_dir(self.dir.path());
        command
    }

    /// Runs the program.
    pub fn run(&self, line: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ran {
        run(self.program().args(line))
    }

    /// Runs the program, which must end well.
    pub fn ok(&self, line: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ran {
        self.run(line).code(0)
    }

    /// Backs the source up, which must go without a problem; gives what was said as JSON.
    pub fn backup(&self) -> Value {
        self.backup_with(&[])
    }

    /// The same, with options.
    pub fn backup_with(&self, options: &[&str]) -> Value {
        let mut line = args!["backup", &self.source, "--json"].to_vec();
        line.extend(options.iter().map(OsString::from));
        self.ok(line).json()
    }

    /// Restores a whole run to a new directory of the sandbox.
    pub fn revert(&self, run: i64, name: &str) -> PathBuf {
        let dest = self.path(name);
        self.ok(args!["revert-to-run", &run.to_string(), &dest]);
        dest
    }

    /// Mounts the catalog.
    pub fn mount(&self) -> Mount {
        Mount::start(self, &[])
    }

    /// Everything validates.
    pub fn assert_valid(&self) {
        let report = self.ok(["validate", "--json"]).json();
        assert_eq!(report["clean"], true, "{report}");
    }

    /// Paths and lengths of all block files of a volume of the sandbox.
    pub fn blocks(&self, volume: &str) -> Vec<(PathBuf, u64)> {
        let mut found = Vec::new();
        let mut dirs = vec![self.path(volume).join("chunks")];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                match entry.metadata().unwrap() {
                    it if it.is_dir() => dirs.push(entry.path()),
                    it => found.push((entry.path(), it.size())),
                }
            }
        }
        found.sort();
        found
    }

    /// Bytes in all block files of a volume.
    pub fn stored(&self, volume: &str) -> u64 {
        self.blocks(volume).iter().map(|it| it.1).sum()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if !is_root() {
            // Or else what is closed to its own owner would stay behind.
            let mut command = Command::new("chmod");
            let command = command.args(["-R", "u+rwX"]).arg(self.dir.path());
            let _ = command.stderr(Stdio::null()).status();
        }
    }
}

/// What came of running a program.
pub struct Ran {
    line: String,
    output: Output,
}

impl Ran {
    /// Checks the exit code.
    #[track_caller]
    pub fn code(self, code: i32) -> Ran {
        assert_eq!(
            self.output.status.code(),
            Some(code),
            "exit code of {} (signal {:?})\n{}{}",
            self.line,
            self.output.status.signal(),
            String::from_utf8_lossy(&self.output.stdout),
            self.errors()
        );
        self
    }

    /// The exit code, if it was no signal that ended it.
    pub fn exit_code(&self) -> Option<i32> {
        self.output.status.code()
    }

    /// What it printed.
    pub fn text(&self) -> String {
        String::from_utf8(self.output.stdout.clone()).unwrap()
    }

    /// What it printed, as bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.output.stdout
    }

    /// What it complained of.
    pub fn errors(&self) -> String {
        String::from_utf8(self.output.stderr.clone()).unwrap()
    }

    /// What it printed, as one JSON value.
    pub fn json(&self) -> Value {
        let text = self.text();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}: {text}", self.line))
    }

    /// What it printed, as JSON lines.
    pub fn json_lines(&self) -> Vec<Value> {
        let text = self.text();
        text.lines()
            .map(|it| serde_json::from_str(it).unwrap_or_else(|e| panic!("{e}: {it}")))
            .collect()
    }
}

/// Runs a command to its end.
#[track_caller]
pub fn run(command: &mut Command) -> Ran {
    let line = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("starting {line}: {e}"));
    Ran { line, output }
}

/// Runs a tool of the system, which must end well.
#[track_caller]
pub fn tool(name: &str, line: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ran {
    need_tool(name);
    run(Command::new(name).args(line).env("LC_ALL", "C")).code(0)
}

/// The name that stands under `key` in JSON, or in base64 under `KEY_b64`.
pub fn name_of(value: &Value, key: &str) -> Vec<u8> {
    match (value[key].as_str(), value[format!("{key}_b64")].as_str()) {
        (Some(text), None) => text.as_bytes().to_vec(),
        (None, Some(text)) => BASE64.decode(text).unwrap(),
        _ => panic!("no {key} in {value}"),
    }
}

/// A path of any bytes.
pub fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes.to_vec()))
}

/// The bytes of a path.
pub fn bytes_of(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

/// Whether root runs the tests.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Ends the test with a clear word when it is not root who runs it.
#[track_caller]
pub fn need_root(why: &str) {
    assert!(is_root(), "this test needs root: {why}. Run the tests as root.");
}

/// Packages of tools, under their names in Debian.
const PACKAGES: &[(&str, &str)] = &[
    ("rsync", "rsync"),
    ("setfacl", "acl"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("mount", "mount"),
    ("umount", "mount"),
    ("losetup", "mount"),
    ("findmnt", "util-linux"),
    ("fusermount3", "fuse3"),
    ("chattr", "e2fsprogs"),
    ("mkfs.xfs", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("prlimit", "util-linux"),
    ("git", "git"),
    ("strace", "strace"),
    ("python3", "python3"),
    ("tar", "tar"),
    ("cpio", "cpio"),
    ("bsdcpio", "libarchive-tools"),
    ("afio", "afio"),
    ("diff", "diffutils"),
    ("cp", "coreutils"),
    ("find", "findutils"),
    ("unshare", "util-linux"),
    ("findmnt", "util-linux"),
    ("setpriv", "util-linux"),
    ("bash", "bash"),
    ("sh", "dash"),
];

/// Ends the test with a clear word when a tool is missing.
#[track_caller]
pub fn need_tool(name: &str) {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&dirs).collect();
    dirs.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let package = PACKAGES.iter().find(|it| it.0 == name).map_or(name, |it| it.1);
    let found = dirs.iter().any(|it| it.join(name).exists());
    assert!(found, "this test needs {name}: install the package {package}");
}

/// The mount helper, which is built beside the program. Where cargo was asked for the tests of this
/// package alone, it has not built the helper, which is done now.
pub fn mountctl() -> Command {
    static BUILT: OnceLock<()> = OnceLock::new();
    let path = Path::new(RAIDTAPE).with_file_name("mountctl");
    BUILT.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let time = |path: &Path| fs::metadata(path).and_then(|it| it.modified()).ok();
        let sources = fs::read_dir(root.join("mountctl/src")).unwrap();
        let newest = sources.map(|it| time(&it.unwrap().path()).unwrap()).max();
        // Not there if the test program was started by something else.
        if let Some(cargo) = std::env::var_os("CARGO").filter(|_| time(&path) < newest) {
            let mut command = Command::new(cargo);
            command.args(["build", "--quiet", "--package", "mountctl", "--target-dir"]);
            command.arg(Path::new(RAIDTAPE).ancestors().nth(2).unwrap()).current_dir(root);
            command.args((!cfg!(debug_assertions)).then_some("--release"));
            assert!(command.status().unwrap().success(), "mountctl cannot be built");
        }
        let what = "missing: build it first with cargo build --workspace";
        assert!(path.exists(), "{} is {what}", path.display());
    });
    let mut command = Command::new(path);
    command.env("RAIDTAPE_BIN", RAIDTAPE).stdin(Stdio::null());
    command
}

/// Waits until something holds.
#[track_caller]
pub fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Sends a signal to a process that this test started.
pub fn kill(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// A number from the environment.
pub fn number_from_env(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is no number")),
        Err(_) => default,
    }
}

/// The error number of a failed operation.
#[track_caller]
pub fn errno<T>(result: std::io::Result<T>) -> i32 {
    match result {
        Ok(_) => panic!("it should have failed"),
        Err(e) => e.raw_os_error().unwrap_or_else(|| panic!("no errno: {e}")),
    }
}
