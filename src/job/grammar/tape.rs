//! The arguments of `tape archive`, on the command line and in control files.

use std::ffi::OsString;

use clap::{Args, Parser, Subcommand};

use super::{refused, size};
use crate::error::Result;
use crate::job::Archiving;
use crate::snapshot::Wish;

/// The arguments of `tape archive`.
#[derive(Args, Clone, Debug)]
pub struct ArchiveArgs {
    /// The run: its number, 'latest', or a time, as in --run of restore
    #[arg(value_name = "N|latest|TIME")]
    run: Wish,
    /// The pool whose tapes are to have it
    #[arg(long, value_name = "POOL", default_value = "any")]
    pool: String,
    /// The drive; the spool's default one if there is none
    #[arg(long, value_name = "DRIVE")]
    drive: Option<OsString>,
    /// On how many tapes of the pool each block is to be
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u64).range(1..=99))]
    copies: u64,
    /// How much of blocks is in one tape file
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = size)]
    batch_size: u64,
    /// Most memory for what waits for the drive
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size)]
    buffer: u64,
}

#[derive(Parser)]
#[command(name = "tape", no_binary_name = true, disable_help_flag = true)]
#[command(disable_help_subcommand = true)]
struct TapeLine {
    #[command(subcommand)]
    work: Work,
}

#[derive(Subcommand)]
enum Work {
    #[command(disable_help_flag = true)]
    Archive(ArchiveArgs),
}

impl ArchiveArgs {
    /// What has to be done.
    pub fn archiving(&self) -> Archiving {
        Archiving {
            wish: self.run.clone(),
            pool: self.pool.clone(),
            drive: self.drive.clone(),
            copies: self.copies,
            batch_bytes: self.batch_size,
            buffer_bytes: self.buffer,
        }
    }
}

/// Reads the words of a line.
pub fn parse(words: Vec<OsString>) -> Result<Archiving> {
    let Work::Archive(args) = TapeLine::try_parse_from(words).map_err(refused)?.work;
    Ok(args.archiving())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn read(line: &str) -> Result<Archiving> {
        parse(line.split_whitespace().map(OsString::from).collect())
    }

    #[test]
    fn a_line_is_that_of_the_command() {
        let plain = read("archive latest").unwrap();
        assert_eq!((&plain.wish, &*plain.pool, plain.copies), (&Wish::Latest, "any", 1));
        assert_eq!(
            (plain.drive, plain.batch_bytes, plain.buffer_bytes),
            (None, 4 << 30, 256 << 20)
        );
        let full = read("archive 7 --pool full --drive d1 --copies 2 --batch-size 1GiB").unwrap();
        assert_eq!((full.wish, &*full.pool, full.copies), (Wish::Number(7), "full", 2));
        assert_eq!((full.drive, full.batch_bytes), (Some("d1".into()), 1 << 30));
    }

    #[test]
    fn what_a_mount_cannot_do_is_refused_in_a_line() {
        for line in [
            "",
            "archive",
            "archive never",
            "archive 1 --copies 0",
            "archive 1 --dry-run",
            "archive 1 --json",
            "archive 1 --help",
            "archive 1 2",
            "list",
            "help",
            "--help",
        ] {
            let refused = read(line).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Usage, "{line}");
            assert!(!refused.to_string().contains('\n'), "{line}: {refused}");
        }
    }
}
