//! The commands of t0p, run as a person does.

use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use raidtape::tape::image::Image;
use raidtape::tape::medium::Medium;
use raidtape::tape::spool::Spool;
use tempfile::TempDir;

use super::RAIDTAPE;

/// A directory with a spool, and links to the program by its names.
pub struct Place {
    _dir: TempDir,
    pub base: PathBuf,
}

impl Place {
    pub fn new() -> Place {
        let dir = tempfile::Builder::new().prefix("raidtape-test-").tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        Place { _dir: dir, base }
    }

    /// One with a spool, a drive `d0`, and blank images `shelf/A.tap` and `shelf/B.tap`.
    pub fn with_drive() -> Place {
        let place = Place::new();
        std::fs::create_dir(place.base.join("drive")).unwrap();
        std::fs::create_dir(place.base.join("shelf")).unwrap();
        for name in ["A", "B"] {
            Image::create(&place.image(name), &Medium::default()).unwrap();
        }
        let drive = place.base.join("drive");
        place.ok(&["t0p", "init", "-d", "d0", drive.to_str().unwrap()]);
        place
    }

    /// An image of the shelf.
    pub fn image(&self, name: &str) -> PathBuf {
        self.base.join("shelf").join(format!("{name}.tap"))
    }

    /// The program under one of its names.
    pub fn program(&self, name: &str) -> PathBuf {
        let program = self.base.join(name);
        match symlink(RAIDTAPE, &program) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => panic!("{e}"),
            _ => program,
        }
    }

    /// A line that is to be run.
    pub fn command(&self, line: &[&str]) -> Command {
        let mut command = Command::new(self.program(line[0]));
        command.args(&line[1..]).env("T0P_ROOT", self.base.join("spool"));
        command
    }

    /// Runs a line with this standard input; gives the exit code and what is printed.
    pub fn feed(&self, line: &[&str], input: &str) -> (i32, String) {
        self.feed_in(&self.base, line, input)
    }

    /// The same in another directory.
    pub fn feed_in(&self, dir: &Path, line: &[&str], input: &str) -> (i32, String) {
        let mut command = self.command(line);
        command.current_dir(dir);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // Who refuses the line does not read.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        let printed = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8(printed).unwrap())
    }

    #[track_caller]
    pub fn ok(&self, line: &[&str]) -> String {
        let (code, printed) = self.feed(line, "");
        assert_eq!(code, 0, "{line:?}: {printed}");
        printed.trim_end().to_owned()
    }

    /// Runs a line that has to end with this code; gives what is printed.
    #[track_caller]
    pub fn fails(&self, wanted: i32, line: &[&str]) -> String {
        let (code, printed) = self.feed(line, "");
        assert_eq!(code, wanted, "{line:?}: {printed}");
        printed.trim_end().to_owned()
    }

    pub fn code(&self, line: &[&str]) -> i32 {
        self.feed(line, "").0
    }

    pub fn spool(&self) -> Spool {
        Spool::open(&self.base.join("spool")).unwrap()
    }
}
