//! The tape that an archive begins with.

use super::plan::Options;
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::quoted;
use crate::tape::drive::Access;
use crate::tape::load::open_noted;
use crate::tape::loaded::Loaded;
use crate::tape::spool::Spool;
use crate::tape::spool::drive::TakenDrive;
use crate::tape::write::{by_changer, with_room};

/// The tape that is in a drive, or one that its changer brings.
///
/// [`ErrorKind::WrongTape`] if there is none.
pub fn first_tape(spool: &Spool, taken: &TakenDrive, options: &Options) -> Result<Loaded> {
    let device = taken.device()?;
    // Whoever has put in another one by hand has not told the spool.
    let empty = match open_noted(spool, taken, Access::Write) {
        Err(e) if e.kind() == ErrorKind::WrongTape => e,
        opened => return opened,
    };
    let labels = with_room(spool, Some(options.pool.as_bytes()))?;
    if let Some(loaded) = by_changer(spool, taken, &labels)? {
        return Ok(loaded);
    }
    let such = labels.first().map_or(String::new(), |it| format!(", as {}", Quoted(it)));
    let message = format!(
        "{empty}: put a tape of pool {} that has room{such} into {}, and ask for the same again",
        Quoted(options.pool.as_bytes()),
        quoted(&device)
    );
    Err(Error::new(ErrorKind::WrongTape, message))
}
