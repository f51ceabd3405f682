//! The `mountctl` form of the command line.
//!
//! Invariant: results go to stdout and everything else to stderr, each message under the name of
//! the program; the exit code is 0, 1 or 2, or the daemon's own.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;

use crate::backup::{self, BackupArgs};
use crate::daemon;
use crate::failure::Failure;
use crate::options::{self, Options, Unknown};
use crate::pages;
use crate::status;
use crate::target::Target;
use crate::unmount::{self, Outcome};

/// Mounts RaidTape catalogs and runs jobs on them
#[derive(Debug, Parser)]
#[command(name = "mountctl", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Mount a catalog on a directory
    Mount {
        /// The catalog
        catalog: PathBuf,
        /// The directory to mount it on
        mountpoint: PathBuf,
        /// Comma list of options, see below; may be given several times
        #[arg(short = 'o', value_name = "OPTIONS")]
        options: Vec<OsString>,
        /// Tell what is done
        #[arg(short, long)]
        verbose: bool,
    },
    /// Unmount a catalog and wait until its daemon has ended
    Umount {
        /// The directory it is mounted on
        mountpoint: PathBuf,
        /// How long to wait
        #[arg(long, value_name = "SECONDS", default_value_t = 30)]
        timeout: u32,
        /// Take the mount away although it is in use, and do not wait for the daemon
        #[arg(long)]
        lazy: bool,
    },
    /// List the mounted catalogs
    Status {
        /// Only the mount on this directory
        mountpoint: Option<PathBuf>,
        /// Print an array of objects
        #[arg(long)]
        json: bool,
    },
    /// Run a backup on a mounted catalog
    Backup(BackupArgs),
    /// Print a script by which a shell completes the arguments of mountctl
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page, or write all pages into a directory
    Man {
        /// Where to write the pages
        directory: Option<PathBuf>,
    },
}

/// What help, completions and pages are made of.
pub fn definition() -> clap::Command {
    Cli::command().mut_subcommand("mount", |it| it.after_help(options::help()))
}

pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let parsed = definition().try_get_matches_from(arguments);
    let cli = match parsed.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => cli,
        Err(error) => return parse_error(&error, 2),
    };
    match run(cli.command) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            warn(&failure.message);
            ExitCode::from(failure.code())
        }
    }
}

fn run(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Mount { catalog, mountpoint, options, verbose } => {
            let options = Options::parse(&options, Unknown::Refuse)?;
            let target = Target::resolve(&catalog, &mountpoint)?;
            daemon::mount(&target, &options, &mut warn, &mut |text| {
                if verbose {
                    warn(text);
                }
            })?;
        }
        Command::Umount { mountpoint, timeout, lazy } => {
            let limit = Duration::from_secs(u64::from(timeout));
            let outcome = unmount::unmount(&mountpoint, limit, lazy)?;
            if let Some(text) = unmount::remark(&outcome, mountpoint.as_os_str()) {
                warn(&text);
            }
            // The catalog is not free yet, which is what was asked for.
            return Ok(u8::from(matches!(outcome, Outcome::StillRuns(_))));
        }
        Command::Status { mountpoint, json } => {
            print(&status::list(mountpoint.as_deref(), json)?)?;
        }
        Command::Completions { shell } => pages::completions(definition(), shell)?,
        Command::Man { directory } => pages::man(definition(), directory.as_deref())?,
        Command::Backup(arguments) => return backup::run(&arguments),
    }
    Ok(0)
}

/// Prints what clap has to say: help and versions are no errors.
pub fn parse_error(error: &clap::Error, code: u8) -> ExitCode {
    // There is no better place to tell that the terminal is gone.
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(code) } else { ExitCode::SUCCESS }
}

/// A result. Whoever closed the pipe has read enough.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::system(format!("cannot write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}

/// A message.
pub fn warn(text: &str) {
    // With stderr gone nobody is left to be told.
    let _ = writeln!(io::stderr(), "mountctl: {text}");
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        definition().debug_assert();
    }

    #[test]
    fn options_may_be_repeated() {
        let line = ["mountctl", "mount", "-o", "rw", "c", "m", "-o", "timeout=1"];
        let Command::Mount { options, .. } = Cli::try_parse_from(line).unwrap().command else {
            panic!("not a mount");
        };
        assert_eq!(options, ["rw", "timeout=1"]);
    }

    #[test]
    fn umount_waits_half_a_minute_unless_told() {
        let Command::Umount { timeout, lazy, .. } =
            Cli::try_parse_from(["mountctl", "umount", "m"]).unwrap().command
        else {
            panic!("not an umount");
        };
        assert_eq!((timeout, lazy), (30, false));
    }

    #[test]
    fn words_of_a_backup_are_left_to_the_daemon() {
        for line in [
            ["mountctl", "backup", "--detach", "/a", "--tag", "--quiet"].as_slice(),
            ["mountctl", "backup", "--detach", "--", "/a", "--tag", "--quiet"].as_slice(),
        ] {
            let cli = Cli::try_parse_from(line).unwrap();
            let text = format!("{:?}", cli.command);
            assert!(text.contains(r#"words: ["/a", "--tag", "--quiet"]"#), "{text}");
            assert!(text.contains("detach: true"), "{text}");
            assert!(text.contains("quiet: false"), "{text}");
        }
        assert!(Cli::try_parse_from(["mountctl", "backup"]).is_err());
    }
}
