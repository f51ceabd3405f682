//! The words in which work is asked for: the same on the command line and in a control file.
//!
//! A control file takes the argument line of the command, quoted as for a POSIX shell. Bytes that
//! are not UTF-8 are allowed wherever the command line allows them.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clap::{Args, Parser};

use crate::backup;
use crate::error::{Error, Result};

/// Longest line that a control file takes, in bytes.
pub const LINE_BYTES_MAX: usize = 64 << 10;

/// The source name of what is put into a mount's `/ingest`.
pub const INGEST: &str = "ingest";

/// The arguments of `backup`.
#[derive(Args, Clone, Debug)]
pub struct BackupArgs {
    /// Directory to back up
    pub source: PathBuf,
    /// Name of the source; runs of one name follow one another [default: the absolute path]
    #[arg(long = "as", value_name = "NAME")]
    pub name: Option<OsString>,
    /// Threads that read, hash and compress
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub max_workers: Option<u16>,
    /// Threads that append to blocks at one time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub max_write_workers: Option<u16>,
    /// Do everything in one thread
    #[arg(long)]
    pub single_threaded: bool,
    /// Leave out what matches, as in a .gitignore; may be given several times
    #[arg(long, value_name = "GLOB")]
    pub exclude: Vec<String>,
    /// Stay on the file system of the source
    #[arg(long)]
    pub one_file_system: bool,
    /// Read files that look unchanged too
    #[arg(long)]
    pub force_read: bool,
    /// Tag the run; may be given several times
    #[arg(long = "tag", value_name = "T")]
    pub tags: Vec<String>,
}

impl BackupArgs {
    /// What the backup has to do.
    pub fn options(&self) -> backup::Options {
        backup::Options {
            source: self.source.clone(),
            name: self.name.as_ref().map(|it| it.as_bytes().to_vec()),
            max_workers: self.max_workers.map(usize::from),
            max_write_workers: self.max_write_workers.map(usize::from),
            single_threaded: self.single_threaded,
            exclude: self.exclude.clone(),
            one_file_system: self.one_file_system,
            force_read: self.force_read,
            tags: self.tags.clone(),
        }
    }
}

/// Work that can be asked for through a control file.
#[derive(Clone, Debug)]
pub enum Request {
    /// Back up a source.
    Backup(Box<BackupArgs>),
}

#[derive(Parser)]
#[command(name = "backup", no_binary_name = true, disable_help_flag = true)]
struct BackupLine {
    #[command(flatten)]
    args: BackupArgs,
}

/// Reads a line written to `.ctl/backup`: the arguments of `backup`, or `ingest` with options. What
/// has been put into the mount lies in `ingest_dir`.
pub fn parse_backup(line: &[u8], ingest_dir: &Path) -> Result<Request> {
    if line.len() > LINE_BYTES_MAX {
        return Err(Error::usage("the line is too long"));
    }
    let words = split_words(line)?;
    if words.is_empty() {
        return Err(Error::usage("the line is empty"));
    }
    let parsed = BackupLine::try_parse_from(words);
    let mut args = parsed.map_err(|e| Error::usage(e.kind().to_string()))?.args;
    if args.source.as_os_str() == INGEST {
        args.source = ingest_dir.to_path_buf();
        args.name.get_or_insert_with(|| INGEST.into());
    }
    if !args.source.is_absolute() {
        return Err(Error::usage("the source must be an absolute path, or 'ingest'"));
    }
    Ok(Request::Backup(Box::new(args)))
}

/// Splits a line as a shell would. The splitter knows text only; every byte is made the character
/// of its number and back again, which changes nothing that quoting is made of.
fn split_words(line: &[u8]) -> Result<Vec<OsString>> {
    if line.contains(&0) {
        return Err(Error::usage("the line has a zero byte"));
    }
    let text: String = line.iter().map(|byte| char::from(*byte)).collect();
    let words = shell_words::split(&text).map_err(|e| Error::usage(e.to_string()))?;
    let back = |word: String| -> Vec<u8> {
        word.chars().filter_map(|c| u8::try_from(u32::from(c)).ok()).collect()
    };
    Ok(words.into_iter().map(|word| OsString::from_vec(back(word))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &[u8]) -> Result<BackupArgs> {
        parse_backup(line, Path::new("/c.ingest")).map(|Request::Backup(args)| *args)
    }

    #[test]
    fn a_line_is_the_argument_line_of_the_command() {
        let args = parse(b"/home/me/stuff --tag nightly --exclude '*.o'\n").unwrap();
        assert_eq!(args.source, Path::new("/home/me/stuff"));
        assert_eq!(args.tags, ["nightly"]);
        assert_eq!(args.exclude, ["*.o"]);
        let args = parse(b"'/with space/\xff'").unwrap();
        assert_eq!(args.source.as_os_str().as_bytes(), b"/with space/\xff");
    }

    #[test]
    fn ingest_stands_for_what_was_put_into_the_mount() {
        let args = parse(b"ingest --tag x").unwrap();
        assert_eq!(args.source, Path::new("/c.ingest"));
        assert_eq!(args.name.unwrap(), INGEST);
    }

    #[test]
    fn malformed_lines_are_refused() {
        for line in
            [&b""[..], b"\n", b"--tag", b"relative", b"/a /b", b"'/a", b"/a --nonsense", b"/a\0"]
        {
            let refused = parse(line).unwrap_err();
            assert_eq!(refused.kind(), crate::error::ErrorKind::Usage, "{line:?}");
        }
    }
}
