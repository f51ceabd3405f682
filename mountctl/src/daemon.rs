//! Starts the daemon and waits until its mount answers.
//!
//! Invariant: after a failure no process started here is left running, and a mount point which a
//! stopped daemon left dead is cleared; after success the daemon is on its own.

use std::env;
use std::ffi::OsString;
use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process_group};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::failure::{Class, Failure};
use crate::mounts::MountTable;
use crate::options::Options;
use crate::probe::{self, Answer};
use crate::shown::{shown, shown_bytes};
use crate::target::Target;
use crate::unmount;

/// What a daemon says once its mount answers.
const READY: &[u8] = b"mounted ";

/// How often the wait looks at the daemon and at signals.
const PAUSE: Duration = Duration::from_millis(50);

/// How long a daemon told to end may take to unmount before it is killed.
const GRACE: Duration = Duration::from_secs(3);

/// A log that was longer begins anew with the next mount.
const LOG_KEPT: u64 = 1 << 20;

/// How much of the end of the log is repeated in an error.
const LOG_TAIL: u64 = 8192;

/// The longest line worth keeping of a daemon's output.
const MAX_LINE: u64 = 1 << 16;

/// Mounts a target. `warn` is told what everybody should know, `tell` what is done.
pub fn mount(
    target: &Target,
    options: &Options,
    warn: &mut dyn FnMut(&str),
    tell: &mut dyn FnMut(&str),
) -> Result<(), Failure> {
    let was_dead = target.has_dead_mount()?;
    start(target, options, tell)?;
    if was_dead {
        warn(&format!("took away the dead mount at {}", shown(&target.mountpoint)));
    }
    Ok(())
}

fn start(target: &Target, options: &Options, tell: &mut dyn FnMut(&str)) -> Result<(), Failure> {
    let interrupted = watch_signals()?;
    let log = Log::open(&target.catalog)?;
    let stderr = log.file.try_clone().map_err(|error| log_failure(&error))?;
    let program = program();
    let mut command = Command::new(&program);
    command
        .args(arguments(target, options))
        .current_dir("/")
        // A service manager listens to the process that it has started, and only to that.
        .env_remove("NOTIFY_SOCKET")
        // A group of its own keeps the terminal's signals away from the daemon.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(stderr);
    tell(&format!("starting {}; its log is {}", shown(&program), shown(&log.path)));
    let deadline = Instant::now() + options.timeout;
    let mut child = command.spawn().map_err(|error| {
        Failure::system(format!(
            "cannot start {}: {error}; set RAIDTAPE_BIN to the raidtape program",
            shown(&program)
        ))
    })?;
    let ended = wait_until_mounted(&mut child, deadline, &interrupted);
    let reason = match ended {
        Ok(()) => match check(target, deadline, &interrupted) {
            Ok(()) => {
                log.begin();
                return Ok(());
            }
            Err(failure) => failure,
        },
        Err(End::Exited(status)) => return Err(exit_failure(target, status, log)),
        Err(End::TimedOut) => Failure::failed(format!(
            "the mount at {} did not answer within {} s; use `-o timeout=SECONDS` for longer",
            shown(&target.mountpoint),
            options.timeout.as_secs()
        )),
        Err(End::Interrupted) => Failure::new(Class::Interrupted, "interrupted"),
        Err(End::Lost(error)) => {
            Failure::system(format!("cannot wait for {}: {error}", shown(&program)))
        }
    };
    stop(&mut child);
    clear_dead(&target.mountpoint);
    Err(Failure::new(
        reason.class,
        format!("{}; the daemon was stopped (log: {})", reason.message, shown(&log.path)),
    ))
}

/// The signals that end a program must not do so between the start of a daemon and its stop.
fn watch_signals() -> Result<Arc<AtomicBool>, Failure> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&flag))
            .map_err(|error| Failure::system(format!("cannot watch for signals: {error}")))?;
    }
    Ok(flag)
}

/// The daemon's program: told by the environment, else beside this one, else on the PATH.
fn program() -> PathBuf {
    if let Some(named) = env::var_os("RAIDTAPE_BIN").filter(|value| !value.is_empty()) {
        let named = PathBuf::from(named);
        // A bare name means a search of the PATH; anything else must survive `cwd = /`.
        if named.components().count() > 1 {
            return std::path::absolute(&named).unwrap_or(named);
        }
        return named;
    }
    let beside = env::current_exe()
        .and_then(|own| own.canonicalize())
        .map(|own| own.with_file_name("raidtape"));
    match beside {
        Ok(path) if path.is_file() => path,
        _ => PathBuf::from("raidtape"),
    }
}

fn arguments(target: &Target, options: &Options) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec![
        "--catalog".into(),
        target.catalog.clone().into(),
        "mount".into(),
        target.mountpoint.clone().into(),
        "--foreground".into(),
    ];
    arguments.extend(options.arguments());
    arguments
}

/// Whether this can only be a log that we have written before, or a new one.
fn is_own_log(file: &Metadata) -> bool {
    file.is_file() && file.nlink() == 1 && file.uid() == rustix::process::geteuid().as_raw()
}

/// Where a daemon writes what it has to say.
struct Log {
    path: PathBuf,
    file: File,
    /// How long it was before.
    before: u64,
}

impl Log {
    /// Opens the log beside the catalog behind what is in it, which may be that of a daemon that
    /// runs; or a new one among the temporary files, if that cannot be.
    fn open(catalog: &Path) -> Result<Self, Failure> {
        let mut name = catalog.as_os_str().to_owned();
        name.push(".mount.log");
        let path = PathBuf::from(name);
        // The log names files, so it is for its owner only. The directory may be another user's,
        // who could have put a link or a name of another file there.
        let no_link = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).bits().cast_signed();
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true).mode(0o600).custom_flags(no_link);
        if let Ok(file) = options.open(&path)
            && let Ok(found) = file.metadata()
            && is_own_log(&found)
            && file.set_permissions(Permissions::from_mode(0o600)).is_ok()
        {
            return Ok(Self { path, file, before: found.len() });
        }
        for attempt in 0..100 {
            let name = format!("raidtape-{}-{attempt}.mount.log", std::process::id());
            let path = env::temp_dir().join(name);
            // In a directory everybody writes to, only a new file is surely our own.
            let opened =
                OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(&path);
            match opened {
                Ok(file) => return Ok(Self { path, file, before: 0 }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(log_failure(&error)),
            }
        }
        Err(log_failure(&io::ErrorKind::AlreadyExists.into()))
    }

    /// A mount has begun: what was said before is dropped if it is long.
    fn begin(&self) {
        if self.before > LOG_KEPT {
            // Where it may only grow, it does.
            let _ = self.file.set_len(0);
        }
    }

    /// The end of what this daemon has said.
    fn tail(mut self) -> io::Result<Vec<u8>> {
        let length = self.file.metadata()?.len();
        self.file.seek(SeekFrom::Start(self.before.max(length.saturating_sub(LOG_TAIL))))?;
        let mut text = Vec::new();
        self.file.take(LOG_TAIL).read_to_end(&mut text)?;
        Ok(text)
    }
}

fn log_failure(error: &io::Error) -> Failure {
    Failure::system(format!(
        "cannot create a log file beside the catalog or in {}: {error}",
        shown(&env::temp_dir())
    ))
}

/// Why the wait was over without a mount.
enum End {
    Exited(ExitStatus),
    TimedOut,
    Interrupted,
    Lost(io::Error),
}

fn wait_until_mounted(
    child: &mut Child,
    deadline: Instant,
    interrupted: &AtomicBool,
) -> Result<(), End> {
    let ready = watch_output(child.stdout.take());
    loop {
        match ready.recv_timeout(PAUSE) {
            Ok(()) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {}
            // The output is closed; the process itself still decides what that means.
            Err(RecvTimeoutError::Disconnected) => thread::sleep(PAUSE),
        }
        match child.try_wait() {
            Ok(None) => {}
            Ok(Some(status)) => return Err(End::Exited(status)),
            Err(error) => return Err(End::Lost(error)),
        }
        if interrupted.load(Ordering::Relaxed) {
            return Err(End::Interrupted);
        }
        if Instant::now() >= deadline {
            return Err(End::TimedOut);
        }
    }
}

/// Reports the line by which the daemon says that it is ready.
fn watch_output(output: Option<ChildStdout>) -> Receiver<()> {
    let (sender, receiver) = mpsc::channel();
    if let Some(output) = output {
        thread::spawn(move || {
            let mut reader = BufReader::new(output);
            let mut line = Vec::new();
            loop {
                line.clear();
                match reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
                    Ok(0) | Err(_) => return,
                    Ok(_) if line.starts_with(READY) => {
                        let _ = sender.send(());
                        return;
                    }
                    Ok(_) => {}
                }
            }
        });
    }
    receiver
}

/// Saying `mounted` is one thing, answering through the kernel the other.
fn check(target: &Target, deadline: Instant, interrupted: &AtomicBool) -> Result<(), Failure> {
    let left = deadline.saturating_duration_since(Instant::now());
    let answer = probe::ask(&target.mountpoint, left.min(GRACE).max(probe::LIMIT));
    if interrupted.load(Ordering::Relaxed) {
        return Err(Failure::new(Class::Interrupted, "interrupted"));
    }
    match answer {
        Answer::Status(_) => Ok(()),
        other => Err(Failure::failed(format!(
            "the daemon says it is mounted, but {} {}",
            shown(&target.mountpoint),
            other.clause()
        ))),
    }
}

/// Ends the daemon with whatever it started: politely first, so that it can unmount.
fn stop(child: &mut Child) {
    for (signal, limit) in [(Signal::TERM, GRACE), (Signal::KILL, probe::LIMIT)] {
        // Only a child not yet waited for is sure to own its process id.
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        // If the group is gone already there is nothing to end.
        let _ = kill_process_group(Pid::from_child(child), signal);
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A killed daemon may have mounted already, which leaves a directory nobody can use.
fn clear_dead(point: &Path) {
    if let Ok(table) = MountTable::current()
        && let Ok(mount) = table.ours_at(point)
    {
        // The failure that led here is the one to report; the next mount tries again.
        let _ = unmount::detach_dead(mount);
    }
}

/// Passes on what a daemon said before it ended by itself.
fn exit_failure(target: &Target, status: ExitStatus, log: Log) -> Failure {
    clear_dead(&target.mountpoint);
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    let how = match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "no exit code".to_owned(),
    };
    let mut message = format!(
        "cannot mount {} on {}: the daemon ended with {how}",
        shown(&target.catalog),
        shown(&target.mountpoint)
    );
    let log_path = log.path.clone();
    let text = log.tail().unwrap_or_default();
    let text = text.trim_ascii();
    if text.is_empty() {
        message.push_str(&format!(" and no message (log: {})", shown(&log_path)));
    } else {
        for line in text.split(|byte| *byte == b'\n') {
            message.push('\n');
            message.push_str(&shown_bytes(line));
        }
    }
    Failure::new(Class::Daemon(code.unwrap_or(1)), message)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

    use std::fs;
    use std::io::Write;

    use super::*;
    use crate::options::Unknown;

    #[test]
    fn the_command_line_is_the_daemons() {
        let target = Target { catalog: "/c d".into(), mountpoint: "/m".into() };
        let plain = Options::parse(&[], Unknown::Refuse).unwrap();
        assert_eq!(
            arguments(&target, &plain),
            ["--catalog", "/c d", "mount", "/m", "--foreground"]
        );
        let lists = [OsString::from("allow_other,cache_size=64M,ro")];
        let full = Options::parse(&lists, Unknown::Refuse).unwrap();
        assert_eq!(
            arguments(&target, &full)[5..],
            ["--allow-other", "--cache-size", "64M", "-o", "ro"]
        );
    }

    #[test]
    fn a_log_goes_on_behind_what_is_in_it_and_its_end_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = directory.path().join("cat");
        let path = directory.path().join("cat.mount.log");
        fs::write(&path, "old").unwrap();
        let mut log = Log::open(&catalog).unwrap();
        assert_eq!(log.path, path);
        log.file.write_all(b"end").unwrap();
        log.begin();
        assert_eq!(fs::read(&path).unwrap(), b"oldend");
        assert_eq!(log.tail().unwrap(), b"end");
        fs::write(&path, vec![b'a'; 2 << 20]).unwrap();
        let mut log = Log::open(&catalog).unwrap();
        log.file.write_all(&vec![b'b'; 10_000]).unwrap();
        log.begin();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
        log.before = 0;
        log.file.write_all(&vec![b'c'; 10_000]).unwrap();
        assert_eq!(log.tail().unwrap().len(), 8192);
    }

    #[test]
    fn without_a_place_beside_the_catalog_the_log_is_a_new_file_elsewhere() {
        let directory = tempfile::tempdir().unwrap();
        let catalog = directory.path().join("no/such/place");
        let log = Log::open(&catalog).unwrap();
        assert!(log.path.starts_with(env::temp_dir()));
        fs::remove_file(&log.path).unwrap();
    }
}
