//! Asks a mount for its status without ever waiting for it longer than told.
//!
//! Invariant: the asking is done by a child process. A file request which the daemon has accepted
//! and does not answer can be ended by no signal; a thread in that state would keep this whole
//! process from exiting, while a child can be left behind.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::shown::shown;

/// How long a mount may take to tell its status.
pub const LIMIT: Duration = Duration::from_secs(2);

/// The name by which the child knows its task.
pub const NAME: &str = "mountctl-probe";

/// A status is some hundred bytes; more than this is not one.
const MAX_STATUS: u64 = 1 << 20;

const CODE_OTHER: u8 = 10;
const CODE_DEAD: u8 = 11;
const CODE_DENIED: u8 = 12;
const CODE_ABSENT: u8 = 13;

/// What came of asking.
#[derive(Debug)]
pub enum Answer {
    Status(Value),
    /// The daemon is gone, the mount point is still occupied.
    Dead,
    /// The mount belongs to another user.
    Denied,
    /// There are no control files.
    Absent,
    /// The limit passed.
    Silent,
    Broken(String),
}

impl Answer {
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Status(status) => u32::try_from(status.get("pid")?.as_u64()?).ok(),
            _ => None,
        }
    }

    /// One clause for a message, to follow the path of the mount.
    pub fn clause(&self) -> String {
        match self {
            Self::Status(_) => "answers".to_owned(),
            Self::Dead => "is dead: its daemon has ended".to_owned(),
            Self::Denied => "belongs to another user".to_owned(),
            Self::Absent => "has no .ctl/status".to_owned(),
            Self::Silent => "is not answering".to_owned(),
            Self::Broken(reason) => format!("gives no usable .ctl/status: {reason}"),
        }
    }
}

/// A question under way.
pub struct Pending {
    child: Option<(Child, Receiver<Vec<u8>>)>,
    trouble: String,
}

/// Asks and waits.
pub fn ask(point: &Path, limit: Duration) -> Answer {
    start(point).finish(Instant::now() + limit)
}

/// Begins to ask, so that many mounts can be asked at once.
pub fn start(point: &Path) -> Pending {
    let spawned = Command::new("/proc/self/exe")
        .arg0(NAME)
        .arg(point)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // A child left behind must not hold a pipe our caller waits on.
        .stderr(Stdio::null())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            return Pending {
                child: None,
                trouble: format!("cannot start /proc/self/exe: {error}"),
            };
        }
    };
    let (sender, receiver) = mpsc::channel();
    if let Some(mut pipe) = child.stdout.take() {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            if pipe.read_to_end(&mut bytes).is_ok() {
                // Nobody listens any more once the limit has passed.
                let _ = sender.send(bytes);
            }
        });
    }
    Pending { child: Some((child, receiver)), trouble: String::new() }
}

impl Pending {
    pub fn finish(self, deadline: Instant) -> Answer {
        let Some((mut child, receiver)) = self.child else {
            return Answer::Broken(self.trouble);
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(bytes) = receiver.recv_timeout(left) else {
            // It may be beyond reach of a signal, so it is not waited for.
            let _ = child.kill();
            return Answer::Silent;
        };
        match child.wait() {
            Ok(status) => understand(status.code(), &bytes),
            Err(error) => Answer::Broken(error.to_string()),
        }
    }
}

fn understand(code: Option<i32>, output: &[u8]) -> Answer {
    match code.and_then(|code| u8::try_from(code).ok()) {
        Some(0) => match serde_json::from_slice(output) {
            Ok(Value::Object(fields)) => Answer::Status(Value::Object(fields)),
            Ok(_) => Answer::Broken("it is not a JSON object".to_owned()),
            Err(error) => Answer::Broken(error.to_string()),
        },
        Some(CODE_DEAD) => Answer::Dead,
        Some(CODE_DENIED) => Answer::Denied,
        Some(CODE_ABSENT) => Answer::Absent,
        _ => Answer::Broken(String::from_utf8_lossy(output).into_owned()),
    }
}

/// The child's side: the status on stdout and exit code 0, or one of the codes above.
pub fn answer(point: &Path) -> ExitCode {
    let (code, output) = match read_status(point) {
        Ok(bytes) => (0, bytes),
        Err((path, error)) => {
            (code_of(&error), format!("cannot read {}: {error}", shown(&path)).into_bytes())
        }
    };
    match io::stdout().write_all(&output) {
        Ok(()) => ExitCode::from(code),
        Err(_) => ExitCode::from(CODE_OTHER),
    }
}

fn read_status(point: &Path) -> Result<Vec<u8>, (PathBuf, io::Error)> {
    fs::metadata(point).map_err(|error| (point.to_owned(), error))?;
    // The attributes of the root may be cached; opening a file always needs the daemon.
    let path = point.join(".ctl/status");
    let mut bytes = Vec::new();
    fs::File::open(&path)
        .and_then(|file| file.take(MAX_STATUS).read_to_end(&mut bytes))
        .map_err(|error| (path, error))?;
    Ok(bytes)
}

fn code_of(error: &io::Error) -> u8 {
    match error.kind() {
        // The second is what requests get that were under way when the daemon ended.
        io::ErrorKind::NotConnected | io::ErrorKind::ConnectionAborted => CODE_DEAD,
        io::ErrorKind::PermissionDenied => CODE_DENIED,
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => CODE_ABSENT,
        _ => CODE_OTHER,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

    use super::*;

    #[test]
    fn exit_codes_carry_the_kind_of_error() {
        let dead = io::Error::from(io::ErrorKind::NotConnected);
        let code = i32::from(code_of(&dead));
        assert!(matches!(understand(Some(code), b""), Answer::Dead));
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let code = i32::from(code_of(&denied));
        assert!(matches!(understand(Some(code), b""), Answer::Denied));
        assert!(matches!(understand(None, b"x"), Answer::Broken(text) if text == "x"));
    }

    #[test]
    fn a_status_is_a_json_object() {
        let answer = understand(Some(0), br#"{"pid":12,"version":"1"}"#);
        assert_eq!(answer.pid(), Some(12));
        assert!(matches!(understand(Some(0), b"[]"), Answer::Broken(_)));
        assert!(matches!(understand(Some(0), b"{"), Answer::Broken(_)));
        assert_eq!(understand(Some(0), br#"{"pid":-1}"#).pid(), None);
    }

    #[test]
    fn reading_a_plain_tree_tells_absent_from_present() {
        let directory = tempfile::tempdir().unwrap();
        let (_, error) = read_status(directory.path()).unwrap_err();
        assert_eq!(code_of(&error), CODE_ABSENT);
        fs::create_dir(directory.path().join(".ctl")).unwrap();
        fs::write(directory.path().join(".ctl/status"), "{}").unwrap();
        assert_eq!(read_status(directory.path()).unwrap(), b"{}");
    }
}
