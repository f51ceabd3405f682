//! The commands of t0p: `t0p VERB`, and each as `t0VERB`.
//!
//! They work on the spool at `$T0P_ROOT` and know nothing of a catalog. What a script may have
//! relied on stays: `t0job -c` prints the new job's name and nothing else.

mod drive;
mod jobs;
mod label;
mod read;
mod tapes;
mod watch;
pub(super) mod write;

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};

use super::exit;
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::quoted;
use crate::tape::drive::Access;
use crate::tape::load::Station;
use crate::tape::loaded::Loaded;
use crate::tape::spool::drive::Drive;
use crate::tape::spool::{Spool, root};

#[derive(Parser)]
#[command(name = "t0p", version, about = "Archives files to tape: jobs, queues, tapes")]
struct T0p {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make the spool at $T0P_ROOT, or a drive in it
    Init(Init),
    /// Make, change and list jobs
    Job(jobs::JobArgs),
    /// Put jobs into the queue of a drive, and list them
    Queue(jobs::QueueArgs),
    /// Show, check and write the label of the tape in a drive
    Label(label::LabelArgs),
    /// Tell which tapes hold a file
    Find(tapes::FindArgs),
    /// List the tapes
    Tapes(tapes::TapesArgs),
    /// Note that tapes have been taken away, or brought back
    Move(tapes::MoveArgs),
    /// Write jobs to tape
    Write(write::WriteArgs),
    /// Read batches back: whole jobs, single files, or what a job for reading lists
    Read(read::ReadArgs),
    /// Check a whole tape
    Ck(read::CkArgs),
    /// List the files of a tape: number, position, job, batch and count
    Scan(drive::ScanArgs),
    /// Go to a tape file
    Seek(drive::SeekArgs),
    /// Tell where a drive stands
    Tell(drive::DeviceArgs),
    /// Tell how a drive is
    Stat(drive::DeviceArgs),
    /// Clear what a dead worker has left, and rewind
    Reset(drive::DeviceArgs),
    /// Bring a tape into a drive
    Load(drive::LoadArgs),
    /// Give the tape out of a drive
    Eject(drive::DeviceArgs),
    /// Follow what a drive does
    Watch(watch::WatchArgs),
}

#[derive(Args)]
struct Init {
    /// The drive to make
    #[arg(short = 'd', value_name = "DRIVE", requires = "device")]
    drive: Option<OsString>,
    /// Its device
    #[arg(requires = "drive")]
    device: Option<PathBuf>,
    /// The changer that serves it: a device as /dev/sg3, or a directory of images
    #[arg(long, value_name = "PATH", requires = "device")]
    changer: Option<PathBuf>,
    /// The number of the drive in its changer
    #[arg(long, value_name = "N", requires = "changer", default_value_t = 0)]
    changer_drive: u32,
}

/// Which drive and which queue.
#[derive(Args)]
struct Place {
    /// The drive; the default one if there is none
    #[arg(short = 'd', value_name = "DRIVE")]
    drive: Option<OsString>,
    /// A queue of the drive that has a name
    #[arg(short = 'q', value_name = "QUEUE")]
    queue: Option<OsString>,
}

impl Place {
    fn drive(&self, spool: &Spool) -> Result<Drive> {
        spool.drive(self.drive.as_deref())
    }
}

/// Which drive, and the tape in it.
#[derive(Args)]
struct Device {
    /// The drive; the default one if there is none
    #[arg(short = 'd', value_name = "DRIVE")]
    drive: Option<OsString>,
    /// The tape that has to be in it
    #[arg(short = 't', value_name = "TAPE")]
    tape: Option<OsString>,
    /// Length of the blocks that will be written to a tape which gets its label, in bytes, as in
    /// 262144 or 256k. What reads takes blocks of any length, whatever is said here
    #[arg(short = 'b', value_name = "BYTES", value_parser = block_bytes)]
    block_size: Option<u32>,
    /// Say more
    #[arg(short = 'v', long)]
    verbose: bool,
    /// Change nothing and move no tape, and say what would be done
    #[arg(short = 'n', long = "dry-run")]
    is_dry: bool,
}

impl Device {
    fn drive(&self, spool: &Spool) -> Result<Drive> {
        spool.drive(self.drive.as_deref())
    }

    /// Takes the drive and looks at the tape in it.
    fn open(&self, spool: &Spool, access: Access) -> Result<Station> {
        let station = Station::open(spool, &self.drive(spool)?, access)?;
        self.expect(&station.loaded)?;
        Ok(station)
    }

    /// Refuses any tape but the one that has to be in the drive.
    fn expect(&self, loaded: &Loaded) -> Result<()> {
        match &self.tape {
            Some(tape) => loaded.expect_label(tape.as_bytes()),
            None => Ok(()),
        }
    }

    /// The same by what the spool has noted, where to look at the tape would move it.
    fn expect_noted(&self, drive: &Drive) -> Result<()> {
        let Some(wanted) = &self.tape else { return Ok(()) };
        match drive.tape()? {
            Some(tape) if tape.name() == wanted.as_bytes() => Ok(()),
            _ => {
                let (name, found) = (quoted(Path::new(drive.name())), noted(drive)?);
                let wanted = Quoted(wanted.as_bytes());
                let what = format!("drive {name} has {found}, wanted is tape {wanted}");
                Err(Error::new(ErrorKind::WrongTape, what))
            }
        }
    }
}

/// What the spool has noted of the tape in a drive, in words.
fn noted(drive: &Drive) -> Result<String> {
    let tape = drive.tape()?.map(|it| format!("tape {}", Quoted(&it.name())));
    Ok(tape.unwrap_or_else(|| "no tape that is known".to_owned()))
}

/// A path as it is for other processes too.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io("finding the current directory", e))
}

/// A number of bytes, which are of 1024 with a letter.
fn buffer_bytes(text: &str) -> std::result::Result<u64, String> {
    let bad = || format!("'{text}' is no number of bytes, as in 32768, 256k or 1M");
    let digits = text.trim_end_matches(|it: char| it.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..).unwrap_or_default() {
        "" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        _ => return Err(bad()),
    };
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number.checked_mul(1 << shift).ok_or_else(bad)
}

fn block_bytes(text: &str) -> std::result::Result<u32, String> {
    let bytes = buffer_bytes(text)?;
    u32::try_from(bytes).map_err(|_| format!("blocks of {bytes} bytes are too long"))
}

/// The words of a line that is for t0p; `None` if it is not.
pub fn words(words: &[OsString]) -> Option<Vec<OsString>> {
    let (program, rest) = words.split_first()?;
    let name = Path::new(program).file_name().and_then(OsStr::to_str)?;
    let line = |own: &[&str], rest: &[OsString]| {
        own.iter().map(OsString::from).chain(rest.iter().cloned()).collect()
    };
    match name.strip_prefix("t0") {
        Some("p") => Some(line(&["t0p"], rest)),
        Some(verb) if !verb.is_empty() => Some(line(&["t0p", verb], rest)),
        _ => match rest.split_first() {
            Some((first, rest)) if first == "t0p" => Some(line(&["t0p"], rest)),
            _ => None,
        },
    }
}

/// Runs a line; gives the exit code.
pub fn main(words: Vec<OsString>) -> u8 {
    let args = match T0p::try_parse_from(words) {
        Ok(args) => args,
        Err(e) => {
            let _ = e.print();
            return if e.use_stderr() { exit::USAGE } else { exit::DONE };
        }
    };
    start_log();
    match run(&args.verb) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("t0p: {e}");
            exit::of_kind(e.kind())
        }
    }
}

/// What a command does in passing is said: a tape that it passes over, say, and why.
fn start_log() {
    let env = env_logger::Env::default().filter_or("RAIDTAPE_LOG", "warn");
    let mut builder = env_logger::Builder::from_env(env);
    builder.format(|out, record| writeln!(out, "t0p: {}", record.args()));
    // It may be that somebody has one already.
    let _ = builder.try_init();
}

fn run(verb: &Verb) -> Result<u8> {
    if let Verb::Init(args) = verb {
        let spool = Spool::create(&root())?;
        if let (Some(drive), Some(device)) = (&args.drive, &args.device) {
            let drive = spool.add_drive(drive, &absolute(device)?)?;
            if let Some(changer) = &args.changer {
                drive.set_changer(&absolute(changer)?, args.changer_drive)?;
            }
        }
        return Ok(exit::DONE);
    }
    let spool = Spool::open(&root())?;
    match verb {
        Verb::Init(_) => Ok(exit::DONE),
        Verb::Job(args) => jobs::job(&spool, args),
        Verb::Queue(args) => jobs::queue(&spool, args),
        Verb::Label(args) => label::label(&spool, args),
        Verb::Find(args) => tapes::find(&spool, args),
        Verb::Tapes(args) => tapes::tapes(&spool, args),
        Verb::Move(args) => tapes::move_tapes(&spool, args),
        Verb::Write(args) => write::write(&spool, args),
        Verb::Read(args) => read::read(&spool, args),
        Verb::Ck(args) => read::ck(&spool, args),
        Verb::Scan(args) => drive::scan(&spool, args),
        Verb::Seek(args) => drive::seek(&spool, args),
        Verb::Tell(args) => drive::tell(&spool, args),
        Verb::Stat(args) => drive::stat(&spool, args),
        Verb::Reset(args) => drive::reset(&spool, args),
        Verb::Load(args) => drive::load(&spool, args),
        Verb::Eject(args) => drive::eject(&spool, args),
        Verb::Watch(args) => watch::watch(&spool, args),
    }
}
