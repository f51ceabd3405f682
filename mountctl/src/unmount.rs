//! Takes a mount away and waits until that is really over.
//!
//! Invariant: success without `--lazy` means that the mount has left the mount table and that the
//! daemon which served it has ended, so that its catalog may be opened again.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::failure::{Class, Failure};
use crate::mounts::{Mount, MountTable};
use crate::probe::{self, Answer};
use crate::shown::{shown, shown_bytes};

/// How often the mount table and the process are looked at.
const PAUSE: Duration = Duration::from_millis(50);

/// How long taking away a dead mount may last; no daemon has a part in it.
const DEAD_LIMIT: Duration = Duration::from_secs(10);

/// What became of the mount.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Ended,
    /// The mount had no daemon any more.
    WasDead,
    /// The mount is gone, and the process with this id goes on until its files are closed.
    Lazy(u32),
    /// The mount is gone; its daemon could not be asked for its process id.
    DaemonUnknown,
    /// The mount is gone, and the process with this id still runs after the time limit.
    StillRuns(u32),
}

/// Unmounts what is at `point`, with all its parts.
pub fn unmount(point: &Path, limit: Duration, lazy: bool) -> Result<Outcome, Failure> {
    let deadline = Instant::now() + limit;
    let table = MountTable::current()?;
    let point = table.resolve(point)?;
    let mount = table.ours_at(&point)?;
    // Once the mount is gone there is nobody left to tell the process id.
    let answer = probe::ask(&point, limit.min(probe::LIMIT));
    if matches!(answer, Answer::Dead) && detach_dead(mount)? {
        return Ok(Outcome::WasDead);
    }
    let daemon = answer.pid().and_then(Process::find);
    take_parts_away(mount, lazy, deadline).map_err(|failure| match answer {
        Answer::Status(_) => failure,
        // Asking such a daemon may by itself have left the mount busy.
        ref other => Failure::new(
            failure.class,
            format!("{}; the mount {}", failure.message, other.clause()),
        ),
    })?;
    wait_until_gone(mount, deadline)?;
    match daemon.filter(Process::is_running) {
        Some(process) if lazy => Ok(Outcome::Lazy(process.id)),
        Some(process) => Ok(wait_until_ended(&process, deadline)),
        None if answer.pid().is_some() => Ok(Outcome::Ended),
        None => Ok(Outcome::DaemonUnknown),
    }
}

/// Takes away a mount without a daemon, which is never worth waiting for. False if it is not dead.
pub fn detach_dead(mount: &Mount) -> Result<bool, Failure> {
    let Some(held) = hold(mount) else {
        return Ok(false);
    };
    if !matches!(probe::ask(&mount.point, probe::LIMIT), Answer::Dead) {
        return Ok(false);
    }
    let deadline = Instant::now() + DEAD_LIMIT;
    if rustix::process::geteuid().is_root() {
        // By what is held: the path may lead to the next mount by now.
        let path = format!("/proc/self/fd/{}", held.as_raw_fd());
        match rustix::mount::unmount(path, UnmountFlags::DETACH) {
            // The second is one that somebody else has taken away.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => {
                return Err(Failure::on_path("unmount", &mount.point, &error.into()));
            }
        }
    } else {
        take_parts_away(mount, true, deadline)?;
    }
    wait_until_gone(mount, deadline)?;
    Ok(true)
}

/// The root of a mount, and of no other one that has come to its place since. The daemon is not
/// asked for it.
fn hold(mount: &Mount) -> Option<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(&mount.point, flags, Mode::empty()).ok()?;
    let about = fs::read_to_string(format!("/proc/self/fdinfo/{}", root.as_raw_fd())).ok()?;
    let id = about.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    (id.trim().parse() == Ok(mount.id)).then_some(root)
}

/// Takes away a mount and its parts, the last one first.
fn take_parts_away(mount: &Mount, lazy: bool, deadline: Instant) -> Result<(), Failure> {
    let table = MountTable::current()?;
    for part in table.with_parts(mount).into_iter().rev() {
        let Err(failure) = take_away(&part.point, lazy, deadline) else {
            continue;
        };
        // The daemon may have taken the rest away itself, and a part that cannot be reached any
        // more goes with what it is mounted on.
        if MountTable::current()?.has(part) && (part == mount || !lazy) {
            return Err(failure);
        }
    }
    Ok(())
}

fn wait_until_gone(mount: &Mount, deadline: Instant) -> Result<(), Failure> {
    while MountTable::current()?.has(mount) {
        if Instant::now() >= deadline {
            return Err(Failure::failed(format!(
                "{} is still mounted after the time limit; use --lazy or a longer --timeout",
                shown(&mount.point)
            )));
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}

fn wait_until_ended(process: &Process, deadline: Instant) -> Outcome {
    while process.is_running() {
        if Instant::now() >= deadline {
            return Outcome::StillRuns(process.id);
        }
        thread::sleep(PAUSE);
    }
    Outcome::Ended
}

/// How one program fared.
enum Attempt {
    Done,
    Busy,
    Refused(String),
}

/// Calls the system's own programs: the fitting one first, then the other, since either may be
/// missing or not be allowed to.
fn take_away(point: &Path, lazy: bool, deadline: Instant) -> Result<(), Failure> {
    // The path is resolved already, and resolving it again would fail on a dead mount. `-i`: this
    // program may be the helper that umount(8) would call.
    let umount: &[&str] = if lazy { &["-i", "-c", "-l"] } else { &["-i", "-c"] };
    let fusermount: &[&str] = if lazy { &["-u", "-z"] } else { &["-u"] };
    let mut programs = [("umount", umount), ("fusermount3", fusermount)];
    if !rustix::process::geteuid().is_root() {
        programs.reverse();
    }
    let mut refusals = Vec::new();
    for (program, options) in programs {
        match attempt(program, options, point, deadline) {
            Attempt::Done => return Ok(()),
            Attempt::Busy => {
                return Err(Failure::failed(format!(
                    "{} is busy (EBUSY): close the files and leave the directories in use below \
                     it, or use --lazy",
                    shown(point)
                )));
            }
            Attempt::Refused(reason) => refusals.push(format!("{program}: {reason}")),
        }
    }
    Err(Failure::new(
        Class::Failed,
        format!("cannot unmount {}: {}", shown(point), refusals.join("; ")),
    ))
}

fn attempt(program: &str, options: &[&str], point: &Path, deadline: Instant) -> Attempt {
    let spawned = Command::new(program)
        .args(options)
        .arg(point)
        .current_dir("/")
        // Whether the mount is busy can only be read from the message.
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return Attempt::Refused(format!("cannot be started: {error}")),
    };
    let (sender, messages) = mpsc::channel();
    if let Some(mut pipe) = child.stderr.take() {
        thread::spawn(move || {
            let mut text = Vec::new();
            let _ = pipe.read_to_end(&mut text);
            let _ = sender.send(text);
        });
    }
    match wait_for(&mut child, deadline) {
        Ok(Some(status)) if status.success() => Attempt::Done,
        Ok(Some(status)) => {
            let text = messages.recv_timeout(PAUSE).unwrap_or_default();
            refusal(status, &text)
        }
        Ok(None) => {
            // It may hang in the kernel, so it is not waited for any longer.
            let _ = child.kill();
            Attempt::Refused("took longer than the time limit".to_owned())
        }
        Err(error) => Attempt::Refused(error.to_string()),
    }
}

fn wait_for(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn refusal(status: ExitStatus, text: &[u8]) -> Attempt {
    let text = text.trim_ascii();
    // Only at the end: the message also holds the path, which may hold any word.
    if text.strip_suffix(b".").unwrap_or(text).ends_with(b"busy") {
        return Attempt::Busy;
    }
    if text.is_empty() {
        return Attempt::Refused(status.to_string());
    }
    let lines: Vec<String> = text.split(|byte| *byte == b'\n').map(shown_bytes).collect();
    Attempt::Refused(lines.join(" "))
}

/// A process, told apart from a later one under the same id by its start time.
#[derive(Debug)]
struct Process {
    id: u32,
    started: Vec<u8>,
}

impl Process {
    fn find(id: u32) -> Option<Self> {
        let started = start_of_running(id)?;
        Some(Self { id, started })
    }

    fn is_running(&self) -> bool {
        start_of_running(self.id).is_some_and(|started| started == self.started)
    }
}

/// The start time of a process that has not ended; a zombie has.
fn start_of_running(id: u32) -> Option<Vec<u8>> {
    let stat = fs::read(Path::new("/proc").join(id.to_string()).join("stat")).ok()?;
    parse_stat(&stat)
}

/// How long a process has been running.
pub fn age(id: u32) -> Option<Duration> {
    let started: f64 = std::str::from_utf8(&start_of_running(id)?).ok()?.parse().ok()?;
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let now: f64 = uptime.split(' ').next()?.parse().ok()?;
    // The kernel tells user space 100 ticks a second, whatever its own clock does.
    Duration::try_from_secs_f64(now - started / 100.0).ok()
}

fn parse_stat(stat: &[u8]) -> Option<Vec<u8>> {
    // The name of the program stands in parentheses and may itself hold blanks and parentheses.
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let (_, rest) = stat.split_at_checked(end + 1)?;
    let mut fields = rest.trim_ascii().split(|byte| *byte == b' ');
    match fields.next()? {
        b"Z" | b"X" => None,
        // The state is field 3, the start time field 22.
        _ => fields.nth(18).map(<[u8]>::to_vec),
    }
}

/// One line for the user about how the unmounting ended, where there is anything to tell.
pub fn remark(outcome: &Outcome, point: &OsStr) -> Option<String> {
    let point = shown(point);
    match outcome {
        Outcome::Ended => None,
        Outcome::WasDead => Some(format!(
            "{point} was a dead mount, its daemon had already ended; it is taken away"
        )),
        Outcome::Lazy(id) => Some(format!(
            "{point} is unmounted; its daemon (process {id}) ends when the files in use are closed"
        )),
        Outcome::StillRuns(id) => Some(format!(
            "{point} is unmounted, but its daemon (process {id}) still runs after the time limit; \
             wait for it before you use the catalog, or use a longer --timeout"
        )),
        Outcome::DaemonUnknown => Some(format!(
            "{point} is unmounted; its daemon did not tell its process id, so it may still run"
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn the_start_time_is_found_behind_an_odd_name() {
        let mut stat = b"7 (a) Z b) S".to_vec();
        for field in 4..=52 {
            stat.extend_from_slice(format!(" {field}").as_bytes());
        }
        assert_eq!(parse_stat(&stat).unwrap(), b"22");
        assert_eq!(parse_stat(b"7 (a) Z 1 2"), None);
        assert_eq!(parse_stat(b"garbage"), None);
    }

    #[test]
    fn an_ended_process_counts_as_ended_even_before_it_is_reaped() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::find(child.id()).unwrap();
        assert!(process.is_running());
        child.kill().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while process.is_running() {
            assert!(Instant::now() < deadline, "a zombie must not count");
            thread::sleep(Duration::from_millis(5));
        }
        child.wait().unwrap();
        assert!(Process::find(child.id()).is_none());
    }

    #[test]
    fn another_process_under_the_same_id_does_not_count() {
        let other = Process { id: std::process::id(), started: b"not this one".to_vec() };
        assert!(!other.is_running());
        assert!(Process::find(std::process::id()).unwrap().is_running());
    }

    #[test]
    fn the_age_of_a_process_is_known() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let own = age(std::process::id()).unwrap();
        assert!(age(child.id()).unwrap() <= own + Duration::from_secs(1));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(age(child.id()), None);
    }

    #[test]
    fn busy_is_told_apart_from_other_refusals() {
        let status = ExitStatus::from_raw(32 << 8);
        let busy = refusal(status, b"umount: /mnt: target is busy.\n");
        assert!(matches!(busy, Attempt::Busy));
        let busy = refusal(status, b"umount: /mnt: Device or resource busy\n");
        assert!(matches!(busy, Attempt::Busy));
        match refusal(status, b"umount: /busy:\nnot permitted.\n") {
            Attempt::Refused(reason) => assert_eq!(reason, "umount: /busy: not permitted."),
            _ => panic!("not a refusal"),
        }
    }

    #[test]
    fn what_is_not_mounted_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let failure = unmount(directory.path(), Duration::from_secs(1), false).unwrap_err();
        assert!(failure.message.contains("is not mounted"), "{failure:?}");
        let failure = unmount(Path::new("/proc"), Duration::from_secs(1), false).unwrap_err();
        assert!(failure.message.contains("type proc"), "{failure:?}");
    }
}
