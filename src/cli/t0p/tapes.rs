//! `t0find`, `t0tapes` and `t0move`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use clap::{Args, ValueEnum};
use globset::GlobMatcher;

use super::read::pattern;
use crate::cli::{exit, show};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::tape::spool::Spool;
use crate::tape::spool::tape::{GONE, Tape};

#[derive(Args)]
pub struct FindArgs {
    /// Paths; one with `*`, `?` or `[` is a pattern too, of which `*` also stands for slashes
    #[arg(required = true)]
    paths: Vec<OsString>,
}

#[derive(Args)]
pub struct TapesArgs {
    /// Also how many files are on each, and what else is known
    #[arg(short = 'v', long)]
    verbose: bool,
    /// Only those of a pool
    #[arg(long, value_name = "POOL")]
    pool: Option<OsString>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Where {
    Onsite,
    Offsite,
}

#[derive(Args)]
pub struct MoveArgs {
    /// Where they are now
    place: Where,
    /// Their labels
    #[arg(required = true)]
    tapes: Vec<OsString>,
}

pub fn find(spool: &Spool, args: &FindArgs) -> Result<u8> {
    let wanted: Vec<_> = args.paths.iter().map(|it| (it.as_bytes(), pattern(it))).collect();
    let is_wanted = |path: &[u8]| {
        let is_match = |it: &GlobMatcher| it.is_match(Path::new(OsStr::from_bytes(path)));
        wanted.iter().any(|(word, pattern)| *word == path || pattern.as_ref().is_some_and(is_match))
    };
    let mut out = show::Out::new();
    let mut has_found = false;
    spool.find(&is_wanted, &mut |it| {
        has_found = true;
        let (tape, path) = (Quoted(&it.tape), Quoted(&it.path));
        out.line(&format!("{tape} {} {} {}/{} {path}", it.filenum, it.position, it.job, it.batch))
    })?;
    out.finish()?;
    Ok(if has_found { exit::DONE } else { exit::FAILED })
}

fn named(spool: &Spool, label: &[u8]) -> Result<Tape> {
    let missing = || Error::new(ErrorKind::NotFound, format!("there is no tape {}", Quoted(label)));
    spool.tape(label)?.ok_or_else(missing)
}

pub fn tapes(spool: &Spool, args: &TapesArgs) -> Result<u8> {
    let mut out = show::Out::new();
    let mut tapes = Vec::new();
    match &args.pool {
        None => tapes = spool.tapes()?,
        Some(pool) => {
            for label in spool.pool(pool.as_bytes())? {
                match spool.tape(&label)? {
                    Some(tape) => tapes.push(tape),
                    // Its label will be written when it is needed, perhaps.
                    None => out.line(&format!("unknown {}", Quoted(&label)))?,
                }
            }
        }
    }
    for tape in tapes {
        let status = match tape.is_gone() {
            Ok(true) => GONE,
            _ => tape.status()?.as_str(),
        };
        let name = tape.name();
        out.line(&format!("{status} {}", Quoted(&name)))?;
        if args.verbose {
            let mut files = 0u64;
            tape.files(&mut |_| {
                files += 1;
                Ok(())
            })?;
            out.line(&format!("  files {files}"))?;
            for (key, value) in tape.metrics()?.iter() {
                out.line(&format!("  {} {}", Quoted(key), Quoted(value)))?;
            }
        }
    }
    out.finish()?;
    Ok(exit::DONE)
}

pub fn move_tapes(spool: &Spool, args: &MoveArgs) -> Result<u8> {
    let is_offsite = matches!(args.place, Where::Offsite);
    let tapes = args.tapes.iter().map(|it| named(spool, it.as_bytes()));
    let tapes = tapes.collect::<Result<Vec<_>>>()?;
    tapes.iter().try_for_each(|it| it.move_offsite(is_offsite))?;
    Ok(exit::DONE)
}
