//! The arguments of every command.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::{query, rebuild, register, tape};
use crate::catalog::COPIES_MAX;
use crate::error::{Error, ErrorKind, Result};
use crate::fs;
use crate::job::BackupArgs;
use crate::job::grammar::genmeta::GenmetaArgs;
use crate::job::grammar::restore::{RestoreArgs, RestoreFolderArgs, RevertToRunArgs};
use crate::job::grammar::size;
use crate::job::grammar::validate::ValidateArgs;
use crate::sys::quoted;

/// Deduplicating backup with every run browsable through a mount
#[derive(Parser)]
#[command(name = "raidtape", version, arg_required_else_help = true)]
pub struct Args {
    /// Catalog file
    #[arg(long, global = true, env = "RAIDTAPE_CATALOG", value_name = "FILE")]
    catalog: Option<PathBuf>,
    /// Say more about what happens (twice: everything)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    #[command(subcommand)]
    pub command: Command,
}

impl Args {
    /// The catalog's absolute path; an empty one for commands that do without.
    pub fn catalog(&self) -> Result<PathBuf> {
        use Command::{Completions, Man, Umount};
        if matches!(self.command, Umount(_) | Completions(_) | Man(_)) {
            return Ok(PathBuf::new());
        }
        let Some(path) = &self.catalog else {
            return Err(Error::usage("which catalog? Give --catalog FILE or set RAIDTAPE_CATALOG"));
        };
        if path.is_dir() {
            return Err(Error::usage(format!("the catalog {} is a directory", quoted(path))));
        }
        let failed = |e| Error::io(format!("catalog {}", quoted(path)), e);
        let path = std::path::absolute(path).map_err(failed)?;
        // Links are resolved now, so that the lock and the files beside the catalog are the same
        // ones by whatever name it is called.
        match path.canonicalize() {
            Ok(path) => Ok(path),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(path),
            Err(e) => Err(Error::with_source(
                ErrorKind::NoCatalog,
                format!("catalog {}", quoted(&path)),
                e,
            )),
        }
    }
}

#[derive(Subcommand)]
pub enum Command {
    /// Make a new catalog
    Init(Init),
    /// Make a volume of a directory and add it to the catalog
    AddVolume(AddVolume),
    /// Settle on how many volumes each block is to be
    SetCopies(SetCopies),
    /// Back up a directory, or a stream
    Backup(Backup),
    /// Show what a run added, modified and deleted
    ListChanges(ListChanges),
    /// Show what differs between two runs
    Diff(query::Diff),
    /// Find files by name in all runs
    Find(query::Find),
    /// Show how much is stored, and in how little
    Stats(query::Stats),
    /// Write a file, or a folder as a tar archive, to standard output
    Dump(query::Dump),
    /// Write what the catalog knows to standard output, as JSON lines
    DumpCatalog(query::DumpCatalog),
    /// Check every stored byte and the catalog
    Validate(Validate),
    /// Make anew what is missing or out of date beside the blocks: metas and manifests
    Genmeta(Genmeta),
    /// Copy blocks to further volumes, until each is on as many as init or set-copies has asked for
    Replicate(Replicate),
    /// Show how many copies there are, and which volumes may fail
    Coverage(Coverage),
    /// Make a catalog anew from its volumes alone, when it is lost
    Rebuildmeta(rebuild::Rebuildmeta),
    /// Take the catalog back from its newest good copy on the volumes
    CatalogRestore(rebuild::CatalogRestore),
    /// Hold a doubtful catalog against its volumes: register volumes, blocks and chunks anew
    RebuildCatalog(register::RebuildCatalog),
    /// Restore one file
    Restore(Restore),
    /// Restore a folder
    RestoreFolder(RestoreFolder),
    /// Restore a whole run into an empty directory
    RevertToRun(RevertToRun),
    /// List all runs
    Runs(Runs),
    /// List all volumes; take one up where it is now, or retire one
    Volumes(Volumes),
    /// List a directory of a run
    Ls(Ls),
    /// Archive runs to tape, and tell what is there
    Tape(tape::Tape),
    /// Mount all runs
    Mount(Mount),
    /// Unmount, also what is in use: open files stay open until the mount's process has ended
    Umount(Umount),
    /// Print a script by which a shell completes this program's arguments
    Completions(Completions),
    /// Print the manual page, or write the pages of all commands into a directory
    Man(Man),
}

#[derive(clap::Args)]
pub struct Init {
    /// Part of each volume's file system to leave free, in percent
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u8).range(0..=99))]
    pub reserve: u8,
    /// Hash that names chunks, blocks and files: blake3 or sha256
    #[arg(long, default_value = "blake3")]
    pub hash_algo: String,
    /// How files are split: fastcdc (by content) or fixed
    #[arg(long, default_value = "fastcdc")]
    pub chunking: String,
    /// Chunk size: the average for fastcdc [default: 64KiB, or 128MiB for fixed]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub chunk_size: Option<u64>,
    /// Largest block
    #[arg(long, value_name = "SIZE", default_value = "128MiB", value_parser = size)]
    pub block_size: u64,
    /// Compression: zstd, zstd:N or none
    #[arg(long, default_value = "zstd")]
    pub compression: String,
    /// Volumes that each block is written to
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = copies())]
    pub copies: u8,
}

/// A number of copies.
fn copies() -> clap::builder::RangedI64ValueParser<u8> {
    clap::value_parser!(u8).range(1..=i64::from(COPIES_MAX))
}

#[derive(clap::Args)]
pub struct SetCopies {
    /// How many
    #[arg(value_parser = copies())]
    pub copies: u8,
}

#[derive(clap::Args)]
pub struct Replicate {
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct Coverage {
    /// Of one run: its number, or latest [default: everything]
    pub run: Option<query::RunArg>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct AddVolume {
    /// Directory of the volume; made if it is missing
    pub path: PathBuf,
    /// Part of its file system to leave free, in percent [default: the catalog's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=99))]
    pub reserve: Option<u8>,
}

#[derive(clap::Args)]
pub struct Backup {
    #[command(flatten)]
    pub args: BackupArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct ListChanges {
    /// Number of the run
    pub run: i64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct Validate {
    #[command(flatten)]
    pub args: ValidateArgs,
    /// Make what is bad good again: from other copies, or from the files that were backed up where
    /// they are unchanged
    #[arg(long)]
    pub repair: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct Genmeta {
    #[command(flatten)]
    pub args: GenmetaArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct Restore {
    #[command(flatten)]
    pub args: RestoreArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct RestoreFolder {
    #[command(flatten)]
    pub args: RestoreFolderArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct RevertToRun {
    #[command(flatten)]
    pub args: RevertToRunArgs,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct Runs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct Volumes {
    /// A volume of this catalog is at PATH now: note that, and take up what the catalog does not
    /// know of it
    #[arg(long, value_name = "PATH")]
    pub readopt: Option<PathBuf>,
    /// Copy what only this volume has to others, then forget it; nothing on it is deleted
    #[arg(long, value_name = "ID|PATH", conflicts_with = "readopt")]
    pub retire: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct Ls {
    /// Number of the run
    pub run: i64,
    /// Directory or file in it [default: its root]
    #[arg(default_value = ".")]
    pub path: PathBuf,
    /// Print JSON, a line an entry
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct Mount {
    /// Directory to mount on
    pub mountpoint: PathBuf,
    /// Stay in the foreground; prints a line when the mount answers
    #[arg(long)]
    pub foreground: bool,
    /// Let other users in; the kernel checks permissions
    #[arg(long)]
    pub allow_other: bool,
    /// Memory for decompressed data
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = size)]
    pub cache_size: u64,
    /// How files of snapshots are opened and read
    #[arg(long, value_enum, value_name = "HOW", default_value = "auto")]
    pub reads: Reads,
    /// One session with the kernel for all, where the snapshots could have one of their own
    #[arg(long)]
    pub one_session: bool,
    /// What the kernel refuses or checks: a list with commas, of which the last word on a thing
    /// counts; may be given several times
    #[arg(short = 'o', value_enum, value_name = "OPTIONS", value_delimiter = ',')]
    pub words: Vec<MountWord>,
}

/// How files of snapshots are opened and read.
#[derive(Clone, Copy, clap::ValueEnum)]
pub enum Reads {
    /// As is best for most stores
    Auto,
    /// Without a message for each open: best for small files
    ZeroMessage,
    /// By the kernel alone, for files that are one block which is not compressed
    Passthrough,
}

/// A word of `mount -o`, as mount(8) has it.
#[derive(Clone, Copy, clap::ValueEnum)]
#[value(rename_all = "lower")]
pub enum MountWord {
    /// No change through the mount, to control files neither
    Ro,
    /// Changes (the default)
    Rw,
    /// Programs run from the mount (the default)
    Exec,
    /// No program runs from the mount
    NoExec,
    /// Set-user-ID bits count (the default for root; others cannot have it)
    Suid,
    /// Set-user-ID bits do not count
    NoSuid,
    /// Devices can be opened (the default for root; others cannot have it)
    Dev,
    /// Devices cannot be opened
    NoDev,
    /// The kernel checks permissions, as it does with --allow-other
    #[value(name = "default_permissions")]
    DefaultPermissions,
}

impl Mount {
    /// How files of snapshots are to be read, if that is not left to the program.
    pub fn reads(&self) -> Option<fs::Reads> {
        match self.reads {
            Reads::Auto => None,
            Reads::ZeroMessage => Some(fs::Reads::ZeroMessage),
            Reads::Passthrough => Some(fs::Reads::Passthrough),
        }
    }

    /// What the kernel refuses or checks.
    pub fn flags(&self) -> fs::Flags {
        let mut flags = fs::Flags::default();
        for word in &self.words {
            match word {
                MountWord::Ro => flags.read_only = true,
                MountWord::Rw => flags.read_only = false,
                MountWord::NoExec => flags.no_exec = true,
                MountWord::Exec => flags.no_exec = false,
                MountWord::NoSuid => flags.no_suid = true,
                MountWord::Suid => flags.no_suid = false,
                MountWord::NoDev => flags.no_dev = true,
                MountWord::Dev => flags.no_dev = false,
                MountWord::DefaultPermissions => flags.default_permissions = true,
            }
        }
        flags
    }

    /// All options once more, for the process in the background.
    pub fn options(&self) -> Vec<String> {
        let mut line = vec!["--cache-size".to_owned(), self.cache_size.to_string()];
        if self.allow_other {
            line.push("--allow-other".to_owned());
        }
        let reads = self.reads().map(|it| ["--reads", it.name()]);
        let one = self.one_session.then_some("--one-session");
        line.extend(reads.into_iter().flatten().chain(one).map(str::to_owned));
        for word in self.words.iter().filter_map(clap::ValueEnum::to_possible_value) {
            line.extend(["-o".to_owned(), word.get_name().to_owned()]);
        }
        line
    }
}

#[derive(clap::Args)]
pub struct Umount {
    /// Directory that is mounted on
    pub mountpoint: PathBuf,
}

#[derive(clap::Args)]
pub struct Completions {
    /// The shell
    pub shell: clap_complete::Shell,
}

#[derive(clap::Args)]
pub struct Man {
    /// Where to write the pages [default: the program's own page goes to standard output]
    pub dir: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Args::command().debug_assert();
    }
}
