//! The `mount.raidtape` form, as mount(8) calls it for an fstab line or for `mount -t raidtape`.
//!
//! Invariant: the exit codes are those of mount(8), whatever happens, a defect of this program
//! included.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::cli::parse_error;
use crate::daemon;
use crate::failure::{Class, Failure};
use crate::options::{Options, Unknown};
use crate::shown::shown;
use crate::target::Target;

const NAME: &str = "mount.raidtape";

/// Exit code of mount(8) for wrong usage.
const USAGE: u8 = 1;

/// Exit code of mount(8) for an internal bug.
const BUG: u8 = 4;

#[derive(Debug, Parser)]
#[command(name = NAME, version, about = "Mounts a RaidTape catalog; called by mount(8)")]
struct Helper {
    catalog: PathBuf,
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
    /// Mount in the mount namespace of this process or file
    #[arg(short = 'N', value_name = "NAMESPACE")]
    namespace: Option<PathBuf>,
    /// Comma list of allow_other, cache_size=SIZE, timeout=SECONDS
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<OsString>,
    /// The type, which is known anyway
    #[arg(short = 't', value_name = "TYPE")]
    kind: Option<String>,
}

/// True when the program was called under the name by which mount(8) knows it.
pub fn is_called_so(program: Option<&OsString>) -> bool {
    program.is_some_and(|path| Path::new(path).file_name().is_some_and(|name| name == NAME))
}

pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let helper = match Helper::try_parse_from(arguments) {
        Ok(helper) => helper,
        Err(error) => return parse_error(&error, USAGE),
    };
    // The default code of a panic means nothing to mount(8). Nothing is used after one.
    let result = panic::catch_unwind(AssertUnwindSafe(|| run(&helper)));
    match result {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => {
            warn(&failure.message);
            ExitCode::from(failure.mount8_code())
        }
        Err(_) => ExitCode::from(BUG),
    }
}

fn run(helper: &Helper) -> Result<(), Failure> {
    let unknown = match helper.sloppy {
        true => Unknown::Tolerate,
        false => Unknown::Refuse,
    };
    let options = Options::parse(&helper.options, unknown)?;
    check_kind(helper.kind.as_deref())?;
    if let Some(namespace) = &helper.namespace {
        enter(namespace)?;
    }
    let target = Target::resolve(&helper.catalog, &helper.mountpoint)?;
    let mut tell = |text: &str| {
        if helper.verbose {
            warn(text);
        }
    };
    if helper.fake {
        tell(&format!("would mount {} on {}", shown(&target.catalog), shown(&target.mountpoint)));
        return Ok(());
    }
    target.make_way(&mut warn)?;
    daemon::start(&target, &options, &mut tell)
}

fn check_kind(kind: Option<&str>) -> Result<(), Failure> {
    match kind {
        None | Some("raidtape" | "fuse.raidtape") => Ok(()),
        Some(other) => {
            Err(Failure::usage(format!("cannot mount type {}, only raidtape", shown(other))))
        }
    }
}

/// Moves this process into another mount namespace. It must not have any other thread yet.
fn enter(namespace: &Path) -> Result<(), Failure> {
    let path = match namespace.to_str().map(str::parse::<u32>) {
        Some(Ok(process)) => PathBuf::from(format!("/proc/{process}/ns/mnt")),
        _ => namespace.to_owned(),
    };
    let denied = |error: io::Error| {
        let class = match error.kind() {
            io::ErrorKind::PermissionDenied => Class::Permission,
            _ => Class::System,
        };
        Failure::new(class, format!("cannot enter the namespace {}: {error}", shown(&path)))
    };
    let file = File::open(&path).map_err(denied)?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Mount))
        .map_err(|error| denied(error.into()))
}

fn warn(text: &str) {
    // With stderr gone nobody is left to be told.
    let _ = writeln!(io::stderr(), "{NAME}: {text}");
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

    use super::*;

    fn parse(line: &[&str]) -> Helper {
        Helper::try_parse_from([&["/sbin/mount.raidtape"], line].concat()).unwrap()
    }

    #[test]
    fn the_name_decides_the_form() {
        let called = |name: &str| is_called_so(Some(&OsString::from(name)));
        assert!(called("mount.raidtape"));
        assert!(called("/sbin/mount.raidtape"));
        assert!(!called("/mount.raidtape/mountctl"));
        assert!(!called("mount.raidtape2"));
        assert!(!is_called_so(None));
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
    fn a_namespace_that_is_none_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let failure = enter(&directory.path().join("absent")).unwrap_err();
        assert_eq!(failure.class, Class::System);
        let file = directory.path().join("plain");
        std::fs::write(&file, "").unwrap();
        assert!(enter(&file).is_err());
    }
}
