//! `mount` and `umount`.
//!
//! Without `--foreground` this process starts itself anew in the background and waits until that
//! one says that the mount answers, so that a failure is told where the command was given.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{args, exit};
use crate::error::{Error, ErrorKind, Result};
use crate::fs::{self, Stop};
use crate::sys::{self, quoted};

/// How long `umount` waits for the mount to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(30);
/// Most of the log that is shown when the background process fails, in bytes.
const LOG_SHOWN_MAX: u64 = 64 << 10;

pub fn mount(catalog: &Path, args: &args::Mount) -> Result<u8> {
    match args.foreground {
        true => serve(catalog, args),
        false => start(catalog, args),
    }
}

fn serve(catalog: &Path, args: &args::Mount) -> Result<u8> {
    let options = fs::Options {
        catalog: catalog.to_path_buf(),
        mountpoint: args.mountpoint.clone(),
        allow_other: args.allow_other,
        cache_bytes: args.cache_size,
        reads: args.reads(),
        one_session: args.one_session,
        exit_code: super::exit_code_of_job,
    };
    fs::serve(&options, |stop| {
        stop_on_signals(stop)?;
        // Whoever started us waits for this line; that it may be gone is no reason to stop.
        let mut out = std::io::stdout();
        let _ = writeln!(out, "mounted {}", quoted(&args.mountpoint));
        let _ = out.flush();
        Ok(())
    })?;
    Ok(exit::DONE)
}

fn stop_on_signals(stop: Stop) -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]);
    let mut signals = signals.map_err(|e| Error::io("watching for signals", e))?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            stop.ask();
        }
    });
    Ok(())
}

/// Where the background process writes its log.
fn log_path(catalog: &Path) -> PathBuf {
    let mut name = catalog.file_name().unwrap_or_default().to_os_string();
    name.push(".mount.log");
    catalog.with_file_name(name)
}

fn start(catalog: &Path, args: &args::Mount) -> Result<u8> {
    let failed = |e| Error::io("starting the mount in the background", e);
    let log_path = log_path(catalog);
    let log = sys::private_file()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&log_path)
        .map_err(|e| Error::io(format!("log {}", quoted(&log_path)), e))?;
    let mountpoint = std::path::absolute(&args.mountpoint).map_err(failed)?;
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command.arg("--catalog").arg(catalog).arg("mount").arg(&mountpoint).arg("--foreground");
    if args.allow_other {
        command.arg("--allow-other");
    }
    command.arg("--cache-size").arg(args.cache_size.to_string());
    command.args(args.sessions());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    // A group of its own: an interrupt typed at the terminal later is not meant for it.
    let mut child = command.current_dir("/").process_group(0).spawn().map_err(failed)?;
    let mut line = String::new();
    if let Some(out) = child.stdout.take() {
        BufReader::new(out).read_line(&mut line).map_err(failed)?;
    }
    if line.starts_with("mounted ") {
        print!("{line}");
        return Ok(exit::DONE);
    }
    let status = child.wait().map_err(failed)?;
    let mut text = String::new();
    if let Ok(log) = File::open(&log_path) {
        // The exit code says it all if the log cannot be read.
        let _ = log.take(LOG_SHOWN_MAX).read_to_string(&mut text);
    }
    eprint!("{text}");
    Ok(status.code().and_then(|it| u8::try_from(it).ok()).unwrap_or(exit::FAILED))
}

pub fn umount(args: &args::Umount) -> Result<u8> {
    let mountpoint = resolve_mountpoint(&args.mountpoint)?;
    if !fs::is_mounted(&mountpoint)? {
        let message = format!("no catalog is mounted on {}", quoted(&mountpoint));
        return Err(Error::new(ErrorKind::NotFound, message));
    }
    fs::unmount(&mountpoint)?;
    let deadline = Instant::now() + GONE_WITHIN;
    while fs::is_mounted(&mountpoint)? {
        if Instant::now() > deadline {
            let message = format!("{} is still mounted", quoted(&mountpoint));
            return Err(Error::new(ErrorKind::Io, message));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(exit::DONE)
}

/// The mount point's real path. The mount itself may be dead, so only what is above it is asked.
fn resolve_mountpoint(path: &Path) -> Result<PathBuf> {
    let failed = |e| Error::io(format!("mount point {}", quoted(path)), e);
    let path = std::path::absolute(path).map_err(failed)?;
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize().map_err(failed)?.join(name)),
        _ => Ok(path),
    }
}
