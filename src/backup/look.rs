//! Looking at entries so that what is seen belongs together.
//!
//! A tree changes while it is looked at; what is taken of an entry is of one entry at one moment,
//! or it is looked at again.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};

use crate::entry::{self, Metadata};
use crate::sys::{Time, at};

/// How often an entry that changes while it is looked at is looked at.
const CAPTURE_TRIES: u32 = 3;
/// A file that changed this shortly before its run began, or later, may have changed once more
/// within the same tick of the file system's clock: its times prove nothing.
const CLOCK_TICK_NANOS: u32 = 20_000_000;

/// Whether what changed at `ctime` had changed for the last time when a run that began at `started`
/// looked at it.
pub fn is_well_before(ctime: Time, started: Time) -> bool {
    // Whole seconds are the sign of a file system whose clock ticks in seconds, or every two.
    let (secs, nanos) = if ctime.nanos == 0 { (2, 0) } else { (0, CLOCK_TICK_NANOS) };
    let borrowed = i64::from(started.nanos < nanos);
    let limit = Time {
        secs: started.secs.saturating_sub(secs + borrowed),
        nanos: started.nanos + if borrowed == 1 { 1_000_000_000 } else { 0 } - nanos,
    };
    ctime < limit
}

/// Link target and attributes of an entry that is not opened, with the metadata that belongs to
/// them: the name may be given to something else between one look and the next.
pub fn capture_steady(
    parent: &OwnedFd,
    name: &OsStr,
    mut meta: Metadata,
) -> std::io::Result<(Metadata, entry::Extra)> {
    for _ in 0..CAPTURE_TRIES {
        let extra = entry::capture(parent.as_fd(), name, meta.kind)?;
        let now = Metadata::from_stat(&at::stat(parent, name)?);
        match now.filter(|now| now.kind == meta.kind && (meta.nlink == 1 || now.ino == meta.ino)) {
            Some(now) if now == meta => return Ok((meta, extra)),
            Some(now) => meta = now,
            None => break,
        }
    }
    Err(std::io::Error::other("it was replaced while it was looked at"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_proves_something_once_its_tick_is_over() {
        let at = |secs, nanos| Time { secs, nanos };
        for (ctime, started, proves) in [
            (at(10, 500_000_000), at(10, 530_000_000), true),
            (at(10, 500_000_000), at(10, 510_000_000), false),
            (at(9, 995_000_000), at(10, 1), false),
            (at(9, 900_000_000), at(10, 1), true),
            // A clock of whole seconds, or of two.
            (at(8, 0), at(10, 1), true),
            (at(9, 0), at(10, 900_000_000), false),
            // From the future.
            (at(11, 1), at(10, 0), false),
        ] {
            assert_eq!(is_well_before(ctime, started), proves, "{ctime:?} {started:?}");
        }
    }
}
