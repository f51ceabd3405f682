//! Tapes that come into a drive while a run is archived.

use super::plan::Options;
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::quoted;
use crate::tape::drive::Access;
use crate::tape::load;
use crate::tape::loaded::Loaded;
use crate::tape::spool::Spool;
use crate::tape::spool::drive::TakenDrive;
use crate::tape::write::{NextTape, Wanted, with_room};

/// Puts another tape into a drive: by its changer if it has one, or whoever `ask` asks does.
pub fn next_tape(
    spool: &Spool,
    taken: &TakenDrive,
    loaded: Loaded,
    wanted: &Wanted,
    ask: &mut NextTape<'_>,
) -> Result<Option<Loaded>> {
    match taken.changer()? {
        None => ask(loaded, wanted),
        Some(_) => {
            loaded.close()?;
            by_changer(spool, taken, &wanted.labels)
        }
    }
}

/// The tape that is in a drive, or one that its changer brings.
///
/// [`ErrorKind::WrongTape`] if there is none.
pub fn first_tape(spool: &Spool, taken: &TakenDrive, options: &Options) -> Result<Loaded> {
    let device = taken.device()?;
    let empty = match Loaded::open(&device, Access::Write) {
        Err(e) if e.kind() == ErrorKind::WrongTape => e,
        opened => return opened,
    };
    let labels = with_room(spool, Some(options.pool.as_bytes()))?;
    if taken.changer()?.is_some()
        && let Some(loaded) = by_changer(spool, taken, &labels)?
    {
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

/// The first of these that the changer has.
fn by_changer(spool: &Spool, taken: &TakenDrive, labels: &[Vec<u8>]) -> Result<Option<Loaded>> {
    for label in labels {
        match load::load(spool, taken, label, &mut |_| false, Access::Write) {
            Ok(loaded) => return Ok(Some(loaded)),
            Err(e) if matches!(e.kind(), ErrorKind::WrongTape | ErrorKind::NotFound) => {
                log::warn!("tape {} is not taken: {e}", Quoted(label));
            }
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}
