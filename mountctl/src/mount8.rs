//! The `mount.raidtape` and `umount.raidtape` forms, as mount(8) and umount(8) call them.
//!
//! Invariant: the exit codes are those of mount(8), whatever happens, a defect of this program
//! included.

use std::ffi::OsString;
use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};

use crate::cli::parse_error;
use crate::daemon;
use crate::failure::Failure;
use crate::options::{self, Options, Unknown};
use crate::shown::shown;
use crate::target::Target;
use crate::unmount::{self, Outcome};

/// Exit code of mount(8) for wrong usage.
const USAGE: u8 = 1;

/// Exit code of mount(8) for an internal bug.
const BUG: u8 = 4;

/// How long umount(8) waits for the mount to be gone and its daemon to have ended.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(30);

/// The name of a helper's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Mount,
    Umount,
}

impl Form {
    /// The form that goes with the name by which this program was called, if any. The type that
    /// the kernel lists, `fuse.raidtape`, is the one that umount(8) looks for.
    pub fn of(program: Option<&OsString>) -> Option<Self> {
        match Path::new(program?).file_name()?.to_str()? {
            "mount.raidtape" | "mount.fuse.raidtape" => Some(Self::Mount),
            "umount.raidtape" | "umount.fuse.raidtape" => Some(Self::Umount),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Mount => "mount.raidtape",
            Self::Umount => "umount.raidtape",
        }
    }

    fn warn(self, text: &str) {
        // With stderr gone nobody is left to be told.
        let _ = writeln!(io::stderr(), "{}: {text}", self.name());
    }

    /// What help and the manual page are made of.
    pub fn definition(self) -> clap::Command {
        match self {
            Self::Mount => MountHelper::command().after_help(options::help()),
            Self::Umount => UmountHelper::command(),
        }
    }
}

/// Mounts a RaidTape catalog; called by mount(8)
#[derive(Debug, Parser)]
#[command(name = "mount.raidtape", version)]
struct MountHelper {
    /// The catalog
    catalog: PathBuf,
    /// The directory to mount it on
    mountpoint: PathBuf,
    /// Accept options that are not known
    #[arg(short)]
    sloppy: bool,
    /// Check only, mount nothing
    #[arg(short)]
    fake: bool,
    /// Accepted for mount(8): there is no mtab to leave alone
    #[arg(short)]
    no_mtab: bool,
    /// Tell what is done
    #[arg(short)]
    verbose: bool,
    /// The same as the option ro behind all others
    #[arg(short, overrides_with = "write")]
    read_only: bool,
    /// The same as the option rw behind all others
    #[arg(short, overrides_with = "read_only")]
    write: bool,
    /// Refused: the programs of another namespace are not to be trusted
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<PathBuf>,
    /// Comma list of options, see below; may be given several times
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<OsString>,
    /// The type: raidtape or fuse.raidtape, which is known anyway
    #[arg(short = 't', value_name = "TYPE")]
    kind: Option<String>,
}

/// Unmounts a RaidTape catalog; called by umount(8)
#[derive(Debug, Parser)]
#[command(name = "umount.raidtape", version)]
struct UmountHelper {
    /// The directory it is mounted on
    mountpoint: PathBuf,
    /// Take the mount away although it is in use, and do not wait for its process
    #[arg(short)]
    lazy: bool,
    /// The same as -l
    #[arg(short)]
    force: bool,
    /// Accepted for umount(8): there is no mtab to leave alone
    #[arg(short)]
    no_mtab: bool,
    /// Accepted for umount(8): what is busy is not made read-only instead
    #[arg(short)]
    read_only: bool,
    /// Tell what is done
    #[arg(short)]
    verbose: bool,
    /// Refused: the programs of another namespace are not to be trusted
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<PathBuf>,
    /// The type: raidtape or fuse.raidtape, which is known anyway
    #[arg(short = 't', value_name = "TYPE")]
    kind: Option<String>,
}

pub fn main(form: Form, arguments: Vec<OsString>) -> ExitCode {
    let parsed = form.definition().try_get_matches_from(arguments);
    let matches = match parsed {
        Ok(matches) => matches,
        Err(error) => return parse_error(&error, USAGE),
    };
    // The default code of a panic means nothing to mount(8). Nothing is used after one.
    let result = panic::catch_unwind(AssertUnwindSafe(|| match form {
        Form::Mount => run(&read(&matches)?),
        Form::Umount => run_umount(&read(&matches)?),
    }));
    match result {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => {
            form.warn(&failure.message);
            ExitCode::from(failure.mount8_code())
        }
        Err(_) => ExitCode::from(BUG),
    }
}

fn read<H: clap::FromArgMatches>(matches: &clap::ArgMatches) -> Result<H, Failure> {
    H::from_arg_matches(matches).map_err(|error| Failure::usage(error.to_string()))
}

fn run(helper: &MountHelper) -> Result<(), Failure> {
    let unknown = match helper.sloppy {
        true => Unknown::Tolerate,
        false => Unknown::Refuse,
    };
    let mut lists = helper.options.clone();
    let last = [(helper.read_only, "ro"), (helper.write, "rw")];
    lists.extend(last.into_iter().filter(|it| it.0).map(|it| it.1.into()));
    let options = Options::parse(&lists, unknown)?;
    check_kind(helper.kind.as_deref())?;
    refuse_namespace(helper.namespace.as_deref())?;
    let target = Target::resolve(&helper.catalog, &helper.mountpoint)?;
    let mut tell = |text: &str| {
        if helper.verbose {
            Form::Mount.warn(text);
        }
    };
    if helper.fake {
        tell(&format!("would mount {} on {}", shown(&target.catalog), shown(&target.mountpoint)));
        return Ok(());
    }
    daemon::mount(&target, &options, &mut |text| Form::Mount.warn(text), &mut tell)
}

fn run_umount(helper: &UmountHelper) -> Result<(), Failure> {
    check_kind(helper.kind.as_deref())?;
    refuse_namespace(helper.namespace.as_deref())?;
    let lazy = helper.lazy || helper.force;
    let outcome = unmount::unmount(&helper.mountpoint, UNMOUNT_LIMIT, lazy)?;
    // That a job is still ending is no failure of umount(8), whose work is done.
    let is_news = helper.verbose || matches!(outcome, Outcome::StillRuns(_));
    match unmount::remark(&outcome, helper.mountpoint.as_os_str()).filter(|_| is_news) {
        Some(text) => Form::Umount.warn(&text),
        None if helper.verbose => {
            Form::Umount.warn(&format!("{} unmounted", shown(&helper.mountpoint)));
        }
        None => {}
    }
    Ok(())
}

fn check_kind(kind: Option<&str>) -> Result<(), Failure> {
    match kind {
        None | Some("raidtape" | "fuse.raidtape") => Ok(()),
        Some(other) => {
            Err(Failure::usage(format!("cannot mount type {}, only raidtape", shown(other))))
        }
    }
}

/// Another namespace has programs and libraries of its own, which whoever made it has chosen: none
/// of them is to be run with our rights.
fn refuse_namespace(namespace: Option<&Path>) -> Result<(), Failure> {
    match namespace {
        None => Ok(()),
        Some(_) => Err(Failure::usage(
            "-N is not supported, since the mount's programs would be those of the namespace: if \
             you trust these, run all of mount or umount there, by nsenter(1)",
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

    use super::*;
    use crate::failure::Class;

    fn parse(line: &[&str]) -> MountHelper {
        MountHelper::try_parse_from([&["/sbin/mount.raidtape"], line].concat()).unwrap()
    }

    #[test]
    fn the_name_decides_the_form() {
        let called = |name: &str| Form::of(Some(&OsString::from(name)));
        assert_eq!(called("mount.raidtape"), Some(Form::Mount));
        assert_eq!(called("/sbin/mount.fuse.raidtape"), Some(Form::Mount));
        assert_eq!(called("/sbin/umount.fuse.raidtape"), Some(Form::Umount));
        assert_eq!(called("umount.raidtape"), Some(Form::Umount));
        assert_eq!(called("/mount.raidtape/mountctl"), None);
        assert_eq!(called("mount.raidtape2"), None);
        assert_eq!(Form::of(None), None);
    }

    #[test]
    fn the_last_of_read_and_write_counts() {
        let helper = parse(&["c", "m", "-r", "-w"]);
        assert!(helper.write && !helper.read_only);
        let helper = parse(&["c", "m", "-w", "-r", "-o", "rw"]);
        assert!(helper.read_only && !helper.write);
    }

    #[test]
    fn options_stand_before_between_or_behind_the_paths() {
        for line in [
            ["c", "m", "-v", "-o", "rw,timeout=3"].as_slice(),
            &["-v", "-o", "rw,timeout=3", "c", "m"],
            &["c", "-vo", "rw,timeout=3", "m"],
        ] {
            let helper = parse(line);
            assert_eq!(helper.catalog, Path::new("c"));
            assert_eq!(helper.mountpoint, Path::new("m"));
            assert!(helper.verbose && !helper.fake);
            assert_eq!(helper.options, ["rw,timeout=3"]);
        }
        let helper = parse(&["-sfnv", "c", "m", "-t", "fuse.raidtape", "-N", "/proc/1/ns/mnt"]);
        assert!(helper.sloppy && helper.fake && helper.no_mtab && helper.verbose);
        assert!(check_kind(helper.kind.as_deref()).is_ok());
        assert_eq!(helper.namespace.unwrap(), Path::new("/proc/1/ns/mnt"));
    }

    #[test]
    fn another_type_is_wrong_usage() {
        assert_eq!(check_kind(Some("ext4")).unwrap_err().mount8_code(), USAGE);
    }

    #[test]
    fn codes_are_those_of_mount8() {
        let code = |class: Class| Failure::new(class, "").mount8_code();
        assert_eq!(code(Class::Usage), 1);
        assert_eq!(code(Class::Permission), 1);
        assert_eq!(code(Class::System), 2);
        assert_eq!(code(Class::Interrupted), 8);
        assert_eq!(code(Class::Failed), 32);
        assert_eq!(code(Class::Daemon(11)), 32);
    }

    #[test]
    fn another_namespace_is_wrong_usage() {
        let helper = parse(&["c", "m", "-N", "/proc/1/ns/mnt"]);
        let failure = refuse_namespace(helper.namespace.as_deref()).unwrap_err();
        assert_eq!(failure.mount8_code(), USAGE);
        assert!(failure.message.contains("nsenter"), "{failure:?}");
        assert!(refuse_namespace(None).is_ok());
    }
}
