//! Going to a tape file, by the fewest motions.
//!
//! Where a file begins is in its tape's log, and a drive goes straight there. Without that,
//! filemarks are counted: from where the drive stands, or, if it has to go back more than two
//! thirds of the way, from the beginning.

use super::drive::{Drive, Moved};
use super::spool::log::TapeFile;
use super::spool::tape::Tape;
use crate::error::{Error, ErrorKind, Result};

/// What a tape's log says of a file of it; of two lines the later one counts.
pub fn known_file(tape: &Tape, filenum: u64) -> Result<Option<TapeFile>> {
    let mut found = None;
    tape.files(&mut |it| {
        if it.filenum == filenum {
            found = Some(it);
        }
        Ok(())
    })?;
    Ok(found)
}

/// Goes to the beginning of a tape file; `position` is where it begins, if that is known.
pub fn to_file(drive: &mut dyn Drive, filenum: u64, position: Option<u64>) -> Result<()> {
    let missing = || {
        let what = format!("there is no tape file {filenum}: the tape ends before it");
        Error::new(ErrorKind::NotFound, what)
    };
    if filenum == 0 {
        return drive.rewind();
    }
    if let Some(position) = position {
        return match drive.locate(position)? {
            Moved::There => Ok(()),
            Moved::EndOfData | Moved::Beginning => Err(missing()),
        };
    }
    let state = drive.state()?;
    let current = state.file.filter(|_| !state.lost);
    let from = match current {
        Some(current) if filenum.saturating_mul(3) >= current => current,
        _ => {
            drive.rewind()?;
            0
        }
    };
    let count = i128::from(filenum) - i128::from(from);
    let count = i64::try_from(count).map_err(|_| missing())?;
    match drive.space_files(count)? {
        Moved::There => Ok(()),
        Moved::EndOfData | Moved::Beginning => Err(missing()),
    }
}

/// The tape file that a drive stands in, if the drive or the log of its tape knows.
pub fn current_file(drive: &mut dyn Drive, tape: Option<&Tape>) -> Result<Option<u64>> {
    if let Some(file) = drive.state()?.file {
        return Ok(Some(file));
    }
    let Some(tape) = tape else { return Ok(None) };
    let position = drive.position()?;
    let mut found: Option<TapeFile> = None;
    let mut is_last = true;
    tape.files(&mut |it| {
        is_last = is_last && it.position <= position;
        let is_nearer = found.as_ref().is_none_or(|found| it.position >= found.position);
        if it.position <= position && is_nearer {
            found = Some(it);
        }
        Ok(())
    })?;
    // Behind the last one that is known there may be others.
    Ok(found.filter(|it| !is_last || it.position == position).map(|it| it.filenum))
}
