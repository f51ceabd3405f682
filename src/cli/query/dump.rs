//! `dump`: a file's bytes or a tar archive on standard output.

use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::RunArg;
use crate::cli::{exit, show};
use crate::error::{Error, Result};
use crate::snapshot::{Snapshots, resolve};

/// Memory for decompressed data.
const CACHE_BYTES: u64 = 32 << 20;

/// Every file's hash is checked on the way; what does not match is named, and the exit code says
/// so.
#[derive(clap::Args)]
pub struct Dump {
    /// Number of the run, or latest
    run: RunArg,
    /// File or folder in it, relative to the source or with the source's path before it
    path: PathBuf,
    /// Form of the output: tar, with names below the folder [default: the bytes of the file]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    /// A tar archive, PAX format
    Tar,
}

pub fn dump(catalog: &Path, args: &Dump) -> Result<u8> {
    let snapshots = Snapshots::open(catalog, CACHE_BYTES)?;
    let run = snapshots.with_reader(|reader| args.run.find(reader))?;
    let found = resolve(&snapshots, args.path.as_os_str().as_bytes(), Some(run.id))?;
    let Some(Format::Tar) = args.format else {
        crate::dump::file(&snapshots, &found, &mut show::Out::new())?;
        return Ok(exit::DONE);
    };
    if std::io::stdout().is_terminal() {
        let message = "an archive is not for a terminal: redirect it, or pipe it to tar";
        return Err(Error::usage(message));
    }
    let summary = crate::dump::tar(&snapshots, &found, &mut show::Out::new())?;
    show::print_problems(&summary.problems, summary.problem_count);
    if summary.sockets > 0 {
        let count = summary.sockets;
        show::note(format_args!("{count} sockets left out: tar has no form for them"));
    }
    Ok(exit::of_problems(&summary.problems, summary.problem_count))
}
