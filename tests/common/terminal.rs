//! A program at a terminal, with somebody who reads and types.
//!
//! Invariant: the terminal is a real one, which `script` makes.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;

/// A program that runs, and what it has written so far.
pub struct Terminal {
    child: Child,
    keys: Option<ChildStdin>,
    seen: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Terminal {
    /// Starts a program whose words have no blanks and no quotes, with the spool at `spool`.
    pub fn start(program: &Path, words: &[&str], spool: &Path) -> Terminal {
        let line = format!("{} {}", program.display(), words.join(" "));
        assert!(!line.contains(['\'', '"', '\\', '$']), "{line}");
        let mut command = Command::new("script");
        command.args(["-q", "-e", "-c", &line, "/dev/null"]);
        command.env("T0P_ROOT", spool).env("TERM", "xterm").env_remove("RAIDTAPE_LOG");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (keys, mut output) = (child.stdin.take(), child.stdout.take().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let reader = std::thread::spawn({
            let seen = seen.clone();
            move || {
                let mut buffer = [0; 4096];
                while let Ok(len @ 1..) = output.read(&mut buffer) {
                    seen.lock().extend(&buffer[..len]);
                }
            }
        });
        Terminal { child, keys, seen, reader: Some(reader) }
    }

    /// What it has written so far.
    pub fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock()).into_owned()
    }

    /// Waits until it has written something so many times.
    pub fn wait_for(&mut self, text: &str, times: usize) {
        super::wait_for(text, || {
            let is_over = self.child.try_wait().unwrap().is_some();
            let is_there = self.seen().matches(text).count() >= times;
            assert!(is_there || !is_over, "it has ended without {text}: {}", self.seen());
            is_there
        });
    }

    /// Types a line.
    pub fn type_line(&mut self, line: &str) {
        self.keys.as_mut().unwrap().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Waits for its end; gives the exit code and what it has written.
    pub fn end(mut self) -> (i32, String) {
        let code = self.child.wait().unwrap().code().unwrap();
        self.reader.take().unwrap().join().unwrap();
        (code, self.seen())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
