//! What a person at the terminal is asked.
//!
//! Invariant: one question at a time, though several drives want a tape, and nothing is drawn over
//! it.

use std::fmt::Arguments;
use std::io::{BufRead, IsTerminal, Write};

use parking_lot::Mutex;

use crate::error::{Error, Result};

/// Who has it may ask.
static TURN: Mutex<()> = Mutex::new(());

/// Whether somebody is there who can see a question and answer it.
pub fn is_there() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Draws on the terminal, but while somebody is asked there.
pub fn unless_asking(draw: impl FnOnce()) {
    if let Some(_turn) = TURN.try_lock() {
        draw();
    }
}

/// Asks for something to be done; whether it was. `otherwise` says what `q` does. Nobody there has
/// done nothing.
pub fn ask(what: Arguments<'_>, otherwise: &str) -> Result<bool> {
    if !is_there() {
        return Ok(false);
    }
    let _turn = TURN.lock();
    let failed = |e| Error::io("asking for a tape", e);
    let mut terminal = std::io::stderr();
    write!(terminal, "\n{what} and press Enter, or {otherwise}: ").map_err(failed)?;
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer).map_err(failed)?;
    Ok(read > 0 && answer.trim() != "q")
}
