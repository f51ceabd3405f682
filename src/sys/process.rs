//! Processes: what `/proc` tells of another one, how a child is ended, and how this one keeps its
//! memory.
//!
//! What is told of another is a thread's, by its number, as the kernel names the one that has asked
//! the mount.

use std::io;
use std::path::Path;

/// What is known of a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Its groups, without the one that it acts with.
    pub groups: Vec<u32>,
    /// Whether a signal waits for it that it has neither blocked nor ignored.
    pub has_signal: bool,
}

/// From how many bytes on memory is given back to the kernel as soon as it is freed.
#[cfg(target_env = "gnu")]
const LARGE_BYTES: i32 = 128 << 10;

/// Has the allocator give back large pieces of memory when they are freed. glibc's otherwise keeps
/// more and more of them, in every thread's arena: for what runs for days that is most of its size.
pub fn give_back_memory() {
    // SAFETY: sets a number of the allocator's, under its own lock; no memory is touched.
    #[cfg(target_env = "gnu")]
    #[allow(unsafe_code)]
    let _ = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES) };
}

/// Looks at a thread. Fails if it is gone, or in a namespace that cannot be seen from here.
pub fn status(thread: u32) -> io::Result<Status> {
    let text = std::fs::read_to_string(format!("/proc/{thread}/status"))?;
    Ok(parse(&text))
}

/// Whether a thread is one of this process.
pub fn is_own(thread: u32) -> bool {
    Path::new(&format!("/proc/self/task/{thread}")).exists()
}

/// Whether a process is there, as far as can be seen from here.
pub fn is_alive(process: u32) -> bool {
    process == std::process::id() || Path::new("/proc").join(process.to_string()).exists()
}

fn parse(text: &str) -> Status {
    let value = |key: &str| {
        let mut values = text.lines().filter_map(|it| it.strip_prefix(key)?.strip_prefix(':'));
        values.next().unwrap_or_default().trim()
    };
    let set = |key: &str| u64::from_str_radix(value(key), 16).unwrap_or(0);
    // Nothing holds up SIGKILL, and the kernel never says that something does.
    let pending = (set("SigPnd") | set("ShdPnd")) & !set("SigBlk") & !set("SigIgn");
    Status {
        groups: value("Groups").split_ascii_whitespace().filter_map(|it| it.parse().ok()).collect(),
        has_signal: pending != 0,
    }
}

/// What tells a process from every other one that has run or will run on this machine, whatever
/// number it has. `None` if there is no such process.
pub fn mark(pid: u32) -> Option<String> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name is in parentheses and may hold anything; the start is the 20th word behind it.
    let started = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?;
    Some(format!("{} {pid} {started}", boot.trim()))
}

/// Asks a child to end. It must not have been waited for: its number could be another's then.
pub fn terminate(child: u32) {
    let pid = i32::try_from(child).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        // One that has ended already needs no asking.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_count_unless_they_are_blocked_or_ignored() {
        let text = |shared: u64, own: u64, blocked: u64, ignored: u64| {
            format!(
                "Name:\tx\nGroups:\t4 24 1000 \nSigQ:\t0/1\nSigPnd:\t{own:016x}\n\
                 ShdPnd:\t{shared:016x}\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\n"
            )
        };
        let has = |it: String| parse(&it).has_signal;
        assert!(!has(text(0, 0, 0, 0)));
        assert!(has(text(2, 0, 0, 0)));
        assert!(has(text(0, 0x100, 0, 0)));
        assert!(!has(text(2, 0, 2, 0)));
        assert!(!has(text(0, 2, 0, 2)));
        assert!(has(text(6, 0, 2, 0)));
        assert_eq!(parse(&text(0, 0, 0, 0)).groups, [4, 24, 1000]);
        assert_eq!(parse("nothing of it"), Status::default());
    }

    #[test]
    fn this_process_is_known_and_one_that_is_none_is_not() {
        let own = mark(std::process::id()).unwrap();
        assert_eq!(mark(std::process::id()).unwrap(), own);
        assert_ne!(mark(1).unwrap(), own);
        assert_eq!(mark(u32::MAX), None);
        assert!(status(std::process::id()).is_ok());
        assert!(status(u32::MAX).is_err());
        let thread = || is_own(rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned());
        assert!(std::thread::spawn(thread).join().unwrap());
        assert!(is_own(std::process::id()) && !is_own(u32::MAX) && !is_own(1));
    }
}
