//! `t0label`.

use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::{ArgAction, ArgGroup, Args};

use super::Device;
use crate::cli::{exit, show};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::Time;
use crate::tape::drive::Access;
use crate::tape::label::{Label, LabelHash, how_to_read};
use crate::tape::load::{self, Station};
use crate::tape::spool::Spool;
use crate::tape::spool::text::Fields;
use crate::tape::write::check_block_bytes;

#[derive(Args)]
#[command(disable_help_flag = true)]
#[command(group = ArgGroup::new("what").multiple(false))]
pub struct LabelArgs {
    /// Show the label; this is what is done if nothing else is asked for
    #[arg(short = 'r', group = "what")]
    read: bool,
    /// Check that the tape has this label; without one, that it is the tape which was there last
    #[arg(short = 'k', group = "what")]
    check: bool,
    /// Write this label, to a tape that is blank
    #[arg(short = 'w', group = "what", requires = "label")]
    write: bool,
    /// Write it also over what is on the tape, and also if a tape is called so
    #[arg(short = 'f', requires = "write")]
    force: bool,
    /// The hash of the first 32,768 bytes instead of the label
    #[arg(short = 'h', conflicts_with = "write")]
    hash: bool,
    /// A further field of the label
    #[arg(short = 'p', value_name = "KEY=VALUE", requires = "write")]
    property: Vec<OsString>,
    #[command(flatten)]
    device: Device,
    /// Print help
    #[arg(long, action = ArgAction::Help)]
    help: Option<bool>,
    /// The label, or the hash
    label: Option<OsString>,
}

pub fn label(spool: &Spool, args: &LabelArgs) -> Result<u8> {
    match (args.write, args.check) {
        (true, _) => write(spool, args),
        (_, true) => check(spool, args),
        _ if args.label.is_some() => Err(Error::usage("a label goes with -k or -w")),
        _ => show(spool, args),
    }
}

fn show(spool: &Spool, args: &LabelArgs) -> Result<u8> {
    let station = args.device.open(spool, Access::Read)?;
    let loaded = &station.loaded;
    let none = || {
        let found = loaded.describe();
        Err(Error::new(ErrorKind::WrongTape, format!("there is no label: it is {found}")))
    };
    if args.hash {
        let Some(hash) = loaded.hash() else { return none() };
        show::say(format_args!("{hash}"));
        return Ok(exit::DONE);
    }
    let Some(label) = loaded.label() else { return none() };
    match std::io::stdout().is_terminal() {
        true => show::say(format_args!("{}", Quoted(label.text()))),
        // As `t0label -k` takes it.
        false => {
            let mut out = show::Out::new();
            out.write_all(&[label.text(), b"\n"].concat())
                .map_err(|e| Error::io("writing to standard output", e))?;
            out.finish()?;
        }
    }
    if args.device.verbose {
        for (key, value) in label.fields() {
            show::say(format_args!("{}:{}", Quoted(key), Quoted(value)));
        }
        if let Some(hash) = loaded.hash() {
            show::say(format_args!("hash:{hash}"));
        }
    }
    Ok(exit::DONE)
}

fn check(spool: &Spool, args: &LabelArgs) -> Result<u8> {
    let known = match &args.label {
        Some(_) => None,
        // What was there before the drive is looked into.
        None => args.device.drive(spool)?.tape()?.map(|it| it.name()),
    };
    let hash = match (&args.label, args.hash) {
        (Some(text), true) => Some(LabelHash::parse(&text.to_string_lossy())?),
        (None, true) => return Err(Error::usage("name the hash")),
        _ => None,
    };
    let station = args.device.open(spool, Access::Read)?;
    let label = args.label.as_deref().map(OsStr::as_bytes).or(known.as_deref());
    match (hash, label) {
        (Some(hash), _) => station.loaded.expect_hash(hash)?,
        (None, Some(label)) => station.loaded.expect_label(label)?,
        (None, None) => {
            let message = "the spool knows of no tape in this drive: name the label";
            return Err(Error::new(ErrorKind::WrongTape, message));
        }
    }
    if args.device.verbose {
        show::say(format_args!("{}", station.loaded.describe()));
    }
    Ok(exit::DONE)
}

/// The label that a line asks for.
fn wanted(args: &LabelArgs, text: Vec<u8>, now: i64) -> Result<Label> {
    let mut label = Label::new(text)?;
    let given = super::jobs::pairs(&args.property)?;
    let has = |key: &str| given.iter().any(|it| it.0 == key.as_bytes());
    let program = format!("raidtape {}", env!("CARGO_PKG_VERSION"));
    let size = args.device.block_size.map(|it| it.to_string());
    let own = [
        ("created", Some(now.to_string())),
        ("program", Some(program)),
        ("blocksize", size),
        ("read", Some(how_to_read(args.device.block_size))),
    ];
    for (key, value) in own {
        if let Some(value) = value.filter(|_| !has(key)) {
            label.add(key, value)?;
        }
    }
    given.into_iter().try_for_each(|(key, value)| label.add(key, value))?;
    Ok(label)
}

fn write(spool: &Spool, args: &LabelArgs) -> Result<u8> {
    args.device.block_size.map_or(Ok(()), check_block_bytes)?;
    let now = Time::now().secs;
    let label = wanted(args, args.label.clone().unwrap_or_default().into_vec(), now)?;
    let mut station: Station = args.device.open(spool, Access::Write)?;
    if let Some(why) = load::obstacle(spool, &mut station.loaded, &label)? {
        if !args.force {
            let shown = Quoted(label.text());
            let message = format!("the tape does not get label {shown}: {why}; -f writes it all");
            return Err(Error::new(ErrorKind::WrongTape, format!("{message} the same")));
        }
        if args.device.verbose {
            show::say(format_args!("{why}"));
        }
    }
    if args.device.is_dry {
        show::say(format_args!("{} would be written", Quoted(label.text())));
        return Ok(exit::DONE);
    }
    let mut metrics = Fields::default();
    if let Some(size) = args.device.block_size {
        metrics.set("blocksize", size.to_string())?;
    }
    load::write_label(spool, &mut station, &label, &metrics, now)?;
    station.loaded.close()?;
    if args.device.verbose {
        show::say(format_args!("tape {}", Quoted(label.text())));
    }
    Ok(exit::DONE)
}
