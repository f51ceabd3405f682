//! The arguments of the commands that restore, on the command line and in control files.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use clap::{Args, Parser, ValueEnum};

use super::{Verb, refused};
use crate::error::{Error, Result};
use crate::restore::{Options, Overwrite, Owners};
use crate::snapshot::Wish;
use crate::sys::quoted;

/// The arguments of `restore`.
#[derive(Args, Clone, Debug)]
#[allow(missing_docs, reason = "what is flattened has its own")]
pub struct RestoreArgs {
    /// File in the snapshot, relative to the source or with the source's path before it
    pub src_file: PathBuf,
    /// Where to write it: a file name, or a directory to put it into
    pub dest: PathBuf,
    /// Run to restore from: its number, 'latest', or a time, which means the newest run that had
    /// finished by then, such as 2026-11-20, 2026-11-20T10:00 or 2026-11-20T10:00:00Z (a day alone
    /// means its end) [default: the newest that has the file]
    #[arg(long, value_name = "N|latest|TIME")]
    pub run: Option<Wish>,
    #[command(flatten)]
    pub how: RestoreHow,
}

/// The arguments of `restore-folder`.
#[derive(Args, Clone, Debug)]
#[allow(missing_docs, reason = "what is flattened has its own")]
pub struct RestoreFolderArgs {
    /// Folder in the snapshot, relative to the source or with the source's path before it
    pub src_folder: PathBuf,
    /// Directory that gets the folder's contents
    pub dest_dir: PathBuf,
    /// Run to restore from: its number, 'latest', or a time, which means the newest run that had
    /// finished by then, such as 2026-11-20, 2026-11-20T10:00 or 2026-11-20T10:00:00Z (a day alone
    /// means its end) [default: the newest that has the folder]
    #[arg(long, value_name = "N|latest|TIME")]
    pub run: Option<Wish>,
    #[command(flatten)]
    pub which: RestoreWhich,
    #[command(flatten)]
    pub how: RestoreHow,
}

/// The arguments of `revert-to-run`.
#[derive(Args, Clone, Debug)]
#[allow(missing_docs, reason = "what is flattened has its own")]
pub struct RevertToRunArgs {
    /// The run: its number, 'latest', or a time, as in --run of restore
    #[arg(value_name = "N|latest|TIME")]
    pub run: Wish,
    /// An empty or new directory; with --delete, any
    pub dest: PathBuf,
    #[command(flatten)]
    pub which: RestoreWhich,
    #[command(flatten)]
    pub how: RestoreHow,
}

/// What of a tree is restored.
#[derive(Args, Clone, Debug, Default)]
pub struct RestoreWhich {
    /// Restore only what matches, as in a .gitignore, on the path in the snapshot; may be given
    /// several times
    #[arg(long, value_name = "GLOB")]
    pub include: Vec<String>,
    /// Leave out what matches; may be given several times
    #[arg(long, value_name = "GLOB")]
    pub exclude: Vec<String>,
    /// Remove in the target what the snapshot's folder does not have
    #[arg(long)]
    pub delete: bool,
}

/// How things are restored.
#[derive(Args, Clone, Debug)]
pub struct RestoreHow {
    /// When to replace what is there: 'if-changed' takes a file of the same type, size and time for
    /// the same; 'if-newer' keeps what was changed later
    #[arg(long, value_enum, value_name = "WHEN", default_value = "always")]
    pub overwrite: OverwriteWhen,
    /// Only say what would be done: + made, M replaced or brought up to date, - removed
    #[arg(long)]
    pub dry_run: bool,
    /// Read every file back from the disk that was written, and compare it with its hash
    #[arg(long)]
    pub verify: bool,
    /// Leave owners as they come; no set-user-ID of another owner is restored then
    #[arg(long, conflicts_with = "numeric_owner")]
    pub no_owner: bool,
    /// Restore owners by number [default: by name, where root restores and knows the name here]
    #[arg(long)]
    pub numeric_owner: bool,
}

/// The words for [`Overwrite`].
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum OverwriteWhen {
    /// Everything becomes as in the snapshot.
    Always,
    /// Unless type, size and time agree.
    IfChanged,
    /// Unless what is there was changed later.
    IfNewer,
    /// What is there stays.
    Never,
}

/// What is restored, and to where.
#[derive(Clone, Debug)]
pub enum What {
    /// One file.
    File(PathBuf, Option<Wish>),
    /// The contents of a folder.
    Folder(PathBuf, Option<Wish>),
    /// A whole run.
    Run(Wish),
}

/// A restore that is asked for.
#[derive(Clone, Debug)]
pub struct Restoring {
    /// What.
    pub what: What,
    /// Where to.
    pub dest: PathBuf,
    /// How.
    pub options: Options,
}

impl From<&RestoreArgs> for Restoring {
    fn from(args: &RestoreArgs) -> Restoring {
        Restoring {
            what: What::File(args.src_file.clone(), args.run.clone()),
            dest: args.dest.clone(),
            options: options(&args.how, None),
        }
    }
}

impl From<&RestoreFolderArgs> for Restoring {
    fn from(args: &RestoreFolderArgs) -> Restoring {
        Restoring {
            what: What::Folder(args.src_folder.clone(), args.run.clone()),
            dest: args.dest_dir.clone(),
            options: options(&args.how, Some(&args.which)),
        }
    }
}

impl From<&RevertToRunArgs> for Restoring {
    fn from(args: &RevertToRunArgs) -> Restoring {
        Restoring {
            what: What::Run(args.run.clone()),
            dest: args.dest.clone(),
            options: options(&args.how, Some(&args.which)),
        }
    }
}

fn options(how: &RestoreHow, which: Option<&RestoreWhich>) -> Options {
    let which = which.cloned().unwrap_or_default();
    Options {
        include: which.include,
        exclude: which.exclude,
        delete: which.delete,
        dry_run: how.dry_run,
        overwrite: match how.overwrite {
            OverwriteWhen::Always => Overwrite::Always,
            OverwriteWhen::IfChanged => Overwrite::IfChanged,
            OverwriteWhen::IfNewer => Overwrite::IfNewer,
            OverwriteWhen::Never => Overwrite::Never,
        },
        verify: how.verify,
        owners: match (how.no_owner, how.numeric_owner) {
            (true, _) => Owners::Leave,
            (_, true) => Owners::ByNumber,
            _ => Owners::ByName,
        },
    }
}

#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct Line<A: Args> {
    #[command(flatten)]
    args: A,
}

/// Reads the words of a line for one of the verbs that restore.
pub(super) fn parse(verb: Verb, words: Vec<OsString>, mountpoint: &Path) -> Result<Restoring> {
    fn read<A: Args>(words: Vec<OsString>) -> Result<Restoring>
    where
        for<'a> Restoring: From<&'a A>,
    {
        Ok((&Line::<A>::try_parse_from(words).map_err(refused)?.args).into())
    }
    let restoring = match verb {
        Verb::RestoreFolder => read::<RestoreFolderArgs>(words)?,
        Verb::RevertToRun => read::<RevertToRunArgs>(words)?,
        _ => read::<RestoreArgs>(words)?,
    };
    let dest = &restoring.dest;
    if !dest.is_absolute() {
        let message = format!("the target {} must be an absolute path", quoted(dest));
        return Err(Error::usage(message));
    }
    // By its words: nothing may be looked up while the mount answers this. What links lead to is
    // seen when the job's turn comes.
    if plain(dest).starts_with(mountpoint) {
        let message = format!("the target {} lies in the mount itself", quoted(dest));
        return Err(Error::usage(message));
    }
    if restoring.options.dry_run {
        let message = format!("a job restores: run raidtape {} --dry-run", verb.as_str());
        return Err(Error::usage(message));
    }
    Ok(restoring)
}

/// An absolute path without `.` and `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => {
                plain.pop();
            }
            _ => {}
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::super::Site;
    use super::*;
    use crate::job::Request;

    fn parse(verb: Verb, line: &str) -> Result<Restoring> {
        let site = Site { ingest_dir: "/c.ingest".into(), mountpoint: "/mnt/point".into() };
        match super::super::parse(verb, line.as_bytes(), &site)? {
            Request::Restore(restoring) => Ok(*restoring),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_verb_takes_the_arguments_of_its_command() {
        let file = parse(Verb::Restore, "'a b' /dest --run 3 --overwrite never").unwrap();
        assert!(matches!(&file.what, What::File(path, Some(Wish::Number(3))) if
            path == Path::new("a b")));
        assert_eq!((&*file.dest, file.options.overwrite), (Path::new("/dest"), Overwrite::Never));
        let folder = parse(Verb::RestoreFolder, "docs /dest --delete --exclude '*.o'").unwrap();
        assert!(matches!(&folder.what, What::Folder(_, None)));
        assert!(folder.options.delete);
        assert_eq!(folder.options.exclude, ["*.o"]);
        let run = parse(Verb::RevertToRun, "latest /dest --numeric-owner --verify").unwrap();
        assert!(matches!(run.what, What::Run(Wish::Latest)));
        assert_eq!((run.options.owners, run.options.verify), (Owners::ByNumber, true));
    }

    #[test]
    fn targets_that_a_daemon_cannot_mean_are_refused() {
        for line in [
            "a",
            "a relative",
            "a ./x",
            "a /mnt/point",
            "a /mnt/point/ingest/x",
            "a /mnt/./other/../point/ingest",
            "a /dest --dry-run",
            "a /dest --json",
            "a /dest --run never",
            "a /dest extra",
        ] {
            let refused = parse(Verb::RestoreFolder, line).unwrap_err();
            assert_eq!(refused.kind(), crate::error::ErrorKind::Usage, "{line}");
        }
        parse(Verb::RestoreFolder, "a /mnt/pointer").unwrap();
        parse(Verb::RestoreFolder, "a /mnt/point/../x").unwrap();
    }
}
