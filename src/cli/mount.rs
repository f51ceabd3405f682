//! `mount` and `umount`.
//!
//! Without `--foreground` this process starts itself anew in the background and waits until that
//! one says that the mount answers, so that a failure is told where the command was given.
//!
//! SIGINT, SIGTERM and SIGHUP take the mount away at once, cancel jobs, and end the process with
//! code 0: what has files open keeps them until then. A second signal does not wait for jobs.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::{args, exit, notify, place};
use crate::error::{Error, ErrorKind, Result};
use crate::fs::{self, Stop};
use crate::sys::{self, c, quoted};

/// The signals that end a mount.
const ENDING: [i32; 3] = [SIGINT, SIGTERM, SIGHUP];
/// How long `umount` waits for the mount to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(30);
/// How long the second signal lets the mount be taken away, if that was not done yet.
const DETACHED_WITHIN: Duration = Duration::from_secs(2);
/// A log that was longer begins anew with the next mount, in bytes.
const LOG_KEPT_MAX: u64 = 1 << 20;
/// Most of the log that is shown when the background process fails, in bytes.
const LOG_SHOWN_MAX: u64 = 64 << 10;
/// How the line begins that says that the mount answers.
const MOUNTED: &str = "mounted ";

pub fn mount(catalog: &Path, args: &args::Mount) -> Result<u8> {
    match args.foreground {
        true => serve(catalog, args),
        false => start(catalog, args),
    }
}

fn serve(catalog: &Path, args: &args::Mount) -> Result<u8> {
    sys::process::give_back_memory();
    let signals = Signals::watch()?;
    let mountpoint = place::resolve(&args.mountpoint)?;
    let turn = place::turn(&mountpoint)?;
    if place::make_way(&mountpoint)? {
        tell(&format!("took away the dead mount on {}", quoted(&mountpoint)));
    }
    let options = fs::Options {
        catalog: catalog.to_path_buf(),
        mountpoint,
        allow_other: args.allow_other,
        cache_bytes: args.cache_size,
        reads: args.reads(),
        one_session: args.one_session,
        flags: args.flags(),
        exit_code: super::exit_code_of_job,
        stopping: || notify::tell("STOPPING=1\n"),
    };
    fs::serve(&options, |stop| {
        drop(turn);
        signals.go_to(stop);
        tell(&format!("{MOUNTED}{}", quoted(&args.mountpoint)));
        notify::tell(&format!("READY=1\nSTATUS=mounted on {}\n", quoted(&options.mountpoint)));
        Ok(())
    })?;
    Ok(exit::DONE)
}

/// A line for whoever started us. That nobody reads it is no reason to stop.
fn tell(line: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

/// What ends a mount by signals.
struct Signals(Arc<Mutex<Heard>>);

#[derive(Default)]
struct Heard {
    count: u32,
    stop: Option<Stop>,
}

impl Signals {
    /// From now on none of them ends this process by itself.
    fn watch() -> Result<Signals> {
        let signals = signal_hook::iterator::Signals::new(ENDING);
        let mut signals = signals.map_err(|e| Error::io("watching for signals", e))?;
        let heard = Arc::new(Mutex::new(Heard::default()));
        let shared = heard.clone();
        std::thread::spawn(move || {
            for _ in signals.forever() {
                let mut heard = shared.lock();
                heard.count += 1;
                match (heard.count, heard.stop.clone()) {
                    (1, Some(stop)) => stop.ask(),
                    // The mount is about to answer, and ends then.
                    (1, None) => {}
                    (_, stop) => end_now(stop),
                }
            }
        });
        Ok(Signals(heard))
    }

    /// What a signal stops from now on.
    fn go_to(&self, stop: Stop) {
        let mut heard = self.0.lock();
        if heard.count > 0 {
            stop.ask();
        }
        heard.stop = Some(stop);
    }
}

/// Ends the process, and leaves no dead mount if that can be helped.
fn end_now(stop: Option<Stop>) {
    let (done, wait) = mpsc::channel();
    std::thread::spawn(move || {
        let result = stop.map_or(Ok(()), |it| it.detach());
        // Whoever waited may have ended everything by now.
        let _ = done.send(result);
    });
    if let Ok(Err(e)) = wait.recv_timeout(DETACHED_WITHIN) {
        eprintln!("raidtape: {e}");
    }
    std::process::exit(exit::of_kind(ErrorKind::Interrupted).into());
}

/// Where the background process writes its log.
fn log_path(catalog: &Path) -> PathBuf {
    let mut name = catalog.file_name().unwrap_or_default().to_os_string();
    name.push(".mount.log");
    catalog.with_file_name(name)
}

/// Opens a log behind what is in it: it may be that of a mount that runs. Gives its length too.
fn open_log(path: &Path) -> Result<(File, u64)> {
    let failed = |e| Error::io(format!("log {}", quoted(path)), e);
    let mut options = sys::private_file();
    // A pipe in its place must not keep us.
    options.append(true).create(true).custom_flags(c::O_NOFOLLOW | c::O_NONBLOCK);
    let log = options.open(path).map_err(failed)?;
    let found = log.metadata().map_err(failed)?;
    // The directory may be another user's, who could have put a name of another file there.
    if !found.is_file() || found.nlink() != 1 || found.uid() != sys::effective_uid() {
        let message = format!("{} is no log of this user's: remove it", quoted(path));
        return Err(Error::new(ErrorKind::Io, message));
    }
    Ok((log, found.len()))
}

fn start(catalog: &Path, args: &args::Mount) -> Result<u8> {
    let failed = |e| Error::io("starting the mount in the background", e);
    let log_path = log_path(catalog);
    let (log, before) = open_log(&log_path)?;
    let mountpoint = std::path::absolute(&args.mountpoint).map_err(failed)?;
    let mut command = Command::new(std::env::current_exe().map_err(failed)?);
    command.arg("--catalog").arg(catalog).arg("mount").arg(&mountpoint).arg("--foreground");
    command.args(args.options());
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(log.try_clone().map_err(failed)?);
    // A service manager listens to the process that it has started, and only to that.
    command.env_remove("NOTIFY_SOCKET");
    // A group of its own: an interrupt typed at the terminal later is not meant for it.
    command.current_dir("/").process_group(0);
    // Until it has mounted, it is.
    let mut signals = signal_hook::iterator::Signals::new(ENDING).map_err(failed)?;
    let mut child = command.spawn().map_err(failed)?;
    let (handle, pid) = (signals.handle(), child.id());
    let passing_on = std::thread::spawn(move || {
        signals.forever().map(|_| sys::process::terminate(pid)).count() > 0
    });
    let mut mounted = None;
    for line in child.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines) {
        let line = line.map_err(failed)?;
        if line.starts_with(MOUNTED) {
            mounted = Some(line);
            break;
        }
        tell(&line);
    }
    handle.close();
    // A panic is no interrupt.
    let is_interrupted = passing_on.join().unwrap_or(false);
    if let Some(line) = mounted.filter(|_| !is_interrupted) {
        tell(&line);
        if before > LOG_KEPT_MAX {
            // Only now it is sure that another mount begins. Where the log may only grow, it does.
            let _ = log.set_len(0);
        }
        return Ok(exit::DONE);
    }
    let status = child.wait().map_err(failed)?;
    let mut text = Vec::new();
    let read = File::open(&log_path).and_then(|mut log| {
        log.seek(SeekFrom::Start(before))?;
        log.take(LOG_SHOWN_MAX).read_to_end(&mut text)
    });
    // The exit code says it all if the log cannot be read.
    let _ = read.and_then(|_| std::io::stderr().write_all(&text));
    if is_interrupted {
        return Ok(exit::of_kind(ErrorKind::Interrupted));
    }
    Ok(status.code().and_then(|it| u8::try_from(it).ok()).unwrap_or(exit::FAILED))
}

pub fn umount(args: &args::Umount) -> Result<u8> {
    let mountpoint = place::resolve(&args.mountpoint)?;
    let _turn = place::turn(&mountpoint)?;
    if !fs::is_mounted(&mountpoint)? {
        let message = format!("no catalog is mounted on {}", quoted(&mountpoint));
        return Err(Error::new(ErrorKind::NotFound, message));
    }
    let deadline = Instant::now() + GONE_WITHIN;
    fs::unmount(&mountpoint)?;
    while fs::is_mounted(&mountpoint)? {
        if Instant::now() > deadline {
            let message = format!("{} is still mounted", quoted(&mountpoint));
            return Err(Error::new(ErrorKind::Io, message));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(exit::DONE)
}
