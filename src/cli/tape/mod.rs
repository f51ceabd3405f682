//! `raidtape tape`: runs on tape.
//!
//! The spool at `$T0P_ROOT` has the drives and the tapes. What is said of tapes comes from what is
//! known beside the catalog: no drive is needed for it.

mod archive;
mod known;
mod recall;
mod status;

pub use recall::with_all_tapes;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::{exit, show};
use crate::catalog::Tapes;
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::job::grammar::tape::ArchiveArgs;
use crate::progress::Progress;
use crate::snapshot::Wish;
use crate::tape::runs;
use crate::tape::spool::{self, Spool};

#[derive(Args)]
pub struct Tape {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Write to tape what a pool lacks of a run; what is left of an earlier time comes first
    Archive(Archive),
    /// Bring blocks back from tape that are on no volume
    Recall(recall::Recall),
    /// Read whole tapes and prove every block
    Verify(recall::Verify),
    /// List the tapes that hold parts of this catalog
    List(List),
    /// Show the drives, the jobs that wait, and what of the newest run is on no tape
    Status(Status),
    /// Tell which tapes hold a file: tape, number of the tape file, bytes of the file in there
    Find(Find),
    /// Say that a tape is gone: nothing on it counts any more
    Lost(Lost),
    /// Forget a tape with all that was on it, as it was or will be written from its beginning
    Forget(Forget),
    /// Make anew what is known of tapes, from the results in the spool
    Index(Index),
}

#[derive(Args)]
struct Archive {
    #[command(flatten)]
    args: ArchiveArgs,
    /// Only say what would be written
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Status {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Find {
    /// File in the snapshot, relative to the source or with the source's path before it
    file: PathBuf,
    /// As it is in this run: its number, 'latest', or a time [default: the newest that has it]
    #[arg(long, value_name = "N|latest|TIME")]
    run: Option<Wish>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Lost {
    /// Its label
    tape: OsString,
    /// It is there again
    #[arg(long)]
    found: bool,
}

#[derive(Args)]
struct Forget {
    /// Its label
    tape: OsString,
}

#[derive(Args)]
struct Index {
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub fn tape(catalog: &Path, args: &Tape, is_verbose: bool) -> Result<u8> {
    match &args.what {
        What::Archive(it) => archive::archive(catalog, it, is_verbose),
        What::Recall(it) => recall::recall(catalog, it),
        What::Verify(it) => recall::verify(catalog, it),
        What::List(it) => known::list(catalog, it),
        What::Status(it) => status::status(catalog, it),
        What::Find(it) => known::find(catalog, it),
        What::Lost(it) => lost(catalog, it),
        What::Forget(it) => forget(catalog, it),
        What::Index(it) => index(catalog, it),
    }
}

fn open_spool() -> Result<Spool> {
    Spool::open(&spool::root())
}

/// What is known of tapes, to be asked. Where there is a spool, tapes that it has labelled anew are
/// noted first as what they are.
pub fn known_now(catalog: &Path) -> Result<Option<Tapes>> {
    if let Ok(spool) = open_spool()
        && let Err(e) = runs::note_written_over(&spool, catalog)
    {
        log::warn!("what the spool knows of tapes that were labelled anew is not noted: {e}");
    }
    Tapes::look(catalog)
}

/// What is known of tapes, to be changed.
fn known(catalog: &Path) -> Result<Tapes> {
    match Tapes::look(catalog)? {
        Some(_) => Tapes::open(catalog),
        None => Err(Error::new(ErrorKind::NotFound, "nothing is known of any tape")),
    }
}

fn lost(catalog: &Path, args: &Lost) -> Result<u8> {
    known(catalog)?.set_lost(args.tape.as_bytes(), !args.found)?;
    let tape = Quoted(args.tape.as_bytes());
    match args.found {
        true => show::say(format_args!("tape {tape} counts again")),
        false => show::say(format_args!(
            "tape {tape} is lost: what only it had goes to another one with tape archive"
        )),
    }
    Ok(exit::DONE)
}

fn forget(catalog: &Path, args: &Forget) -> Result<u8> {
    let mut tapes = known(catalog)?;
    let tape = Quoted(args.tape.as_bytes());
    if tapes.tape(args.tape.as_bytes())?.is_none() {
        let message = format!("there is no tape {tape}: see raidtape tape list");
        return Err(Error::new(ErrorKind::NotFound, message));
    }
    tapes.forget(args.tape.as_bytes())?;
    show::say(format_args!("forgot tape {tape}; nothing on it was changed"));
    Ok(exit::DONE)
}

fn index(catalog: &Path, args: &Index) -> Result<u8> {
    let progress = Progress::default();
    let done = super::bar::with_bar(&progress, || runs::index(catalog, &open_spool()?, &progress))?;
    match args.json {
        true => show::say(format_args!(
            "{}",
            serde_json::json!({
                "tapes": done.tapes,
                "tape_files": done.files,
                "tapes_kept": done.kept,
                "tape_files_gone": done.gone,
            })
        )),
        false => show::say(format_args!("{}", done.line())),
    }
    Ok(exit::DONE)
}
