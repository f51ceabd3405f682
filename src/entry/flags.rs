//! File flags: those that are kept, their letters, and putting them on a file.
//!
//! Kept is what a user sets with `chattr`; what a file system notes for itself (extents, hash
//! trees, inline data, encryption, checksums) is not. Flags are set last of all: an immutable file
//! takes no metadata, no name and no link any more.

use std::io;
use std::os::fd::BorrowedFd;

use super::{Applied, Extra};
use crate::error::{Error, Result};
use crate::sys::{c, flags};

/// The kept flags with the letters that `lsattr` has for them. The numbers are the kernel's, and
/// part of the catalog's format. The two that close a file come last, and are set last.
const KEPT: [(u32, char); 16] = [
    (0x0000_0001, 's'),
    (0x0000_0002, 'u'),
    (0x0000_0004, 'c'),
    (0x0000_0008, 'S'),
    (0x0000_0040, 'd'),
    (0x0000_0080, 'A'),
    (0x0000_0400, 'm'),
    (0x0000_4000, 'j'),
    (0x0000_8000, 't'),
    (0x0001_0000, 'D'),
    (0x0002_0000, 'T'),
    (0x0080_0000, 'C'),
    (0x0200_0000, 'x'),
    (0x2000_0000, 'P'),
    (0x0000_0020, 'a'),
    (0x0000_0010, 'i'),
];

/// Flags that say how content is stored: they count for what is written after them, and one of them
/// (`C`) can be set on an empty file only.
const BEFORE_CONTENT: u32 = 0x0080_0404;

fn kept() -> u32 {
    KEPT.iter().fold(0, |sum, it| sum | it.0)
}

/// The kept flags of an open file or directory.
pub(super) fn capture(fd: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(flags::file_flags(fd)?.unwrap_or(0) & kept())
}

/// Refuses flags that are none of the kept ones.
pub(super) fn check(flags: u64) -> Result<u32> {
    match u32::try_from(flags) {
        Ok(flags) if flags & !kept() == 0 => Ok(flags),
        _ => Err(Error::corrupt(format!("extra metadata: unknown file flags {flags:#x}"))),
    }
}

/// The letters that `lsattr` has for these flags.
pub fn flag_letters(flags: u32) -> String {
    KEPT.iter().filter(|it| flags & it.0 != 0).map(|it| it.1).collect()
}

/// The flags that these letters stand for.
pub fn flags_from_letters(letters: &str) -> Result<u32> {
    letters.chars().try_fold(0, |flags, letter| {
        let row = KEPT.iter().find(|it| it.1 == letter);
        let row = row.ok_or_else(|| Error::corrupt(format!("unknown file flag {letter:?}")))?;
        Ok(flags | row.0)
    })
}

/// Gives a file that is still empty the flags that its content depends on. Whatever fails is told
/// by [`apply_flags`], which tries again.
pub fn prepare(fd: BorrowedFd<'_>, extra: &Extra) {
    let wanted = extra.flags & BEFORE_CONTENT;
    if wanted != 0
        && let Ok(Some(now)) = flags::file_flags(fd)
    {
        let _ = flags::set_file_flags(fd, now | wanted);
    }
}

/// Gives an open file or directory its flags; everything else has to be done before. Without flags
/// to give, nothing is asked or set.
pub fn apply_flags(fd: BorrowedFd<'_>, extra: &Extra) -> Applied {
    let mut applied = Applied::default();
    if extra.flags == 0 {
        return applied;
    }
    let result = flags::file_flags(fd).and_then(|now| match now {
        Some(now) => set(fd, now, extra.flags),
        None => {
            let message = format!("{}: this file system has none", flag_letters(extra.flags));
            Err(io::Error::new(io::ErrorKind::Unsupported, message))
        }
    });
    applied.note("file flags", result);
    applied
}

/// Sets `wanted` in place of the kept flags in `now`; flag by flag if not all can be had.
fn set(fd: BorrowedFd<'_>, now: u32, wanted: u32) -> io::Result<()> {
    let other = now & !kept();
    if now == other | wanted || flags::set_file_flags(fd, other | wanted).is_ok() {
        return Ok(());
    }
    let mut now = now;
    let mut refused = 0;
    let mut cause = None;
    for (flag, _) in KEPT {
        if wanted & flag & !now == 0 {
            continue;
        }
        match flags::set_file_flags(fd, now | flag) {
            Ok(()) => now |= flag,
            Err(e) => {
                refused |= flag;
                cause = Some(e);
            }
        }
    }
    match cause {
        None => Ok(()),
        Some(e) => {
            let reason = match e.raw_os_error() {
                Some(c::EOPNOTSUPP | c::EINVAL) => "this file system does not have it".to_owned(),
                _ => e.to_string(),
            };
            Err(io::Error::new(e.kind(), format!("{}: {reason}", flag_letters(refused))))
        }
    }
}
