//! `t0scan`, `t0seek`, `t0tell`, `t0stat`, `t0reset`, `t0load`, `t0eject` and `t0watch`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::Device;
use super::read::ask;
use crate::cli::{exit, show, terminal};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::quoted;
use crate::tape::drive::{Access, BlockSize, Drive};
use crate::tape::load::{self, AskFor};
use crate::tape::read::{What, scan as scan_tape};
use crate::tape::recorded::place_of;
use crate::tape::seek;
use crate::tape::spool::Spool;
use crate::tape::spool::drive::DriveStatus;
use crate::tape::spool::job::JobStatus;
use crate::tape::spool::log;
use crate::tape::spool::tape::Tape;

#[derive(Args)]
pub struct ScanArgs {
    /// The tape file to begin with
    #[arg(long, value_name = "N", default_value_t = 0)]
    from: u64,
    #[command(flatten)]
    device: Device,
}

#[derive(Args)]
pub struct SeekArgs {
    #[command(flatten)]
    device: Device,
    /// A tape file by its number, `+N` or `-N` from where the drive stands, `end`, or JOB/BATCH
    #[arg(allow_negative_numbers = true)]
    to: OsString,
}

#[derive(Args)]
pub struct DeviceArgs {
    #[command(flatten)]
    device: Device,
}

#[derive(Args)]
pub struct LoadArgs {
    #[command(flatten)]
    device: Device,
    /// The tape's label, or what the changer knows it by; or an image, for a drive that takes them.
    /// Without it the tape that is in the drive is noted
    name: Option<OsString>,
}

#[derive(Args)]
pub struct WatchArgs {
    #[command(flatten)]
    device: Device,
    /// Seconds between two looks
    #[arg(long, default_value_t = 1.0)]
    interval: f64,
}

pub fn scan(spool: &Spool, args: &ScanArgs) -> Result<u8> {
    let mut station = args.device.open(spool, Access::Read)?;
    let tape = station.tape(spool)?;
    let known = match &tape {
        Some(tape) => seek::known_file(tape, args.from)?.map(|it| it.position),
        None => None,
    };
    let has_label = station.loaded.label().is_some();
    let described = station.loaded.describe();
    let mut out = show::Out::new();
    seek::to_file(station.loaded.drive(), args.from, known)?;
    let mut is_bad = false;
    scan_tape(station.loaded.drive(), args.from, &mut |seen| {
        let (filenum, position) = (seen.filenum, seen.position);
        let what = match &seen.what {
            _ if filenum == 0 && has_label => described.clone(),
            What::Empty => "empty".to_owned(),
            What::Other => "no archive".to_owned(),
            What::Unreadable(e) => {
                is_bad = true;
                format!("unreadable: {e}")
            }
            What::Archive(head) => match &head.job {
                Some((job, batch)) => {
                    let count = head.count().map(|it| format!(" {it}")).unwrap_or_default();
                    format!("{job} {batch}{count}")
                }
                None => "an archive of no job".to_owned(),
            },
        };
        out.line(&format!("{filenum} {position} {what}"))?;
        Ok(true)
    })?;
    out.finish()?;
    station.loaded.close()?;
    Ok(if is_bad { exit::DAMAGED } else { exit::DONE })
}

/// Where a drive stands, in words.
fn place(drive: &mut dyn Drive, tape: Option<&Tape>) -> Result<String> {
    let position = drive.position()?;
    let file = seek::current_file(drive, tape)?;
    let file = file.map_or("unknown".to_owned(), |it| it.to_string());
    Ok(format!("file {file} position {position}"))
}

pub fn seek(spool: &Spool, args: &SeekArgs) -> Result<u8> {
    let text = args.to.to_string_lossy();
    let drive = args.device.drive(spool)?;
    let taken = drive.take()?;
    let is_relative = text.starts_with(['+', '-']);
    let bad = || Error::usage(format!("'{text}' is no place of a tape"));
    // A relative motion begins where the drive stands, so nothing may be read before it.
    let mut open = match (is_relative, &args.device.tape) {
        (true, None) => crate::tape::open(&taken.device()?, Access::Read)?,
        (true, Some(_)) => return Err(Error::usage("-t does not go with a relative place")),
        (false, _) => {
            let loaded = load::open_noted(spool, &taken, Access::Read)?;
            args.device.expect(&loaded)?;
            loaded.into_drive()
        }
    };
    open.set_block_size(BlockSize::Variable)?;
    // Not before: it may be another one than it was.
    let tape = taken.tape()?;
    let known = |filenum: u64| -> Result<Option<u64>> {
        let found = tape.as_ref().map(|it| seek::known_file(it, filenum)).transpose()?.flatten();
        Ok(found.map(|it| it.position))
    };
    if text == "end" {
        open.to_end_of_data()?;
    } else if is_relative {
        let count: i64 = text.parse().map_err(|_| bad())?;
        let current = seek::current_file(&mut *open, tape.as_ref())?;
        let current = current.ok_or_else(|| {
            Error::usage("it is not known in which tape file the drive stands: seek to a number")
        })?;
        let filenum = current.checked_add_signed(count).ok_or_else(bad)?;
        seek::to_file(&mut *open, filenum, known(filenum)?)?;
    } else if let Ok(filenum) = text.parse::<u64>() {
        seek::to_file(&mut *open, filenum, known(filenum)?)?;
    } else {
        let (job, number) = text.rsplit_once('/').ok_or_else(bad)?;
        let number: u64 = number.trim_start_matches(['w', 'r']).parse().map_err(|_| bad())?;
        let job = spool.job(job.rsplit('/').next().unwrap_or(job))?;
        let id = job.batches()?.into_iter().find(|it| it.number == number);
        let place = place_of(spool, &job, id.ok_or_else(bad)?)?;
        let here = tape.as_ref().map(Tape::name);
        if here.as_deref() != Some(&place.tape) {
            let message = format!("it is on tape {}, which is not here", Quoted(&place.tape));
            return Err(Error::new(ErrorKind::WrongTape, message));
        }
        seek::to_file(&mut *open, place.filenum, place.position)?;
    }
    if args.device.verbose {
        show::say(format_args!("{}", place(&mut *open, tape.as_ref())?));
    }
    open.close()?;
    Ok(exit::DONE)
}

pub fn tell(spool: &Spool, args: &DeviceArgs) -> Result<u8> {
    let taken = args.device.drive(spool)?.take()?;
    let mut open = crate::tape::open(&taken.device()?, Access::Read)?;
    if !open.state()?.online {
        let name = taken.name().to_os_string();
        let what = format!("there is no tape in drive {}", quoted(Path::new(&name)));
        return Err(Error::new(ErrorKind::WrongTape, what));
    }
    let tape = taken.tape()?;
    show::say(format_args!("{}", place(&mut *open, tape.as_ref())?));
    open.close()?;
    Ok(exit::DONE)
}

pub fn stat(spool: &Spool, args: &DeviceArgs) -> Result<u8> {
    let drive = args.device.drive(spool)?;
    let device = drive.device()?;
    let mut lines = vec![
        format!("drive {}", quoted(Path::new(drive.name()))),
        format!("device {}", quoted(&device)),
    ];
    if let Some((changer, number)) = drive.changer()? {
        lines.push(format!("changer {} {number}", quoted(&changer)));
    }
    if let Some(tape) = drive.tape()? {
        lines.push(format!("tape {}", Quoted(&tape.name())));
    }
    lines.push(format!("queue {}", spool.queue(&drive, None)?.list()?.len()));
    match drive.take() {
        Err(e) if e.kind() == ErrorKind::Locked => lines.push("busy".to_owned()),
        Err(e) => return Err(e),
        Ok(_taken) => {
            let mut open = crate::tape::open(&device, Access::Read)?;
            let state = open.state()?;
            lines.push(if state.online { "online".to_owned() } else { "no tape".to_owned() });
            let words = [
                (state.write_protected, "write-protected"),
                (state.worm == Some(true), "worm"),
                (state.at_beginning, "at the beginning"),
                (state.at_end_of_data, "at the end of data"),
            ];
            let words = words.iter().filter(|it| it.0 && state.online);
            lines.extend(words.map(|it| it.1.to_owned()));
            if state.online && !state.lost {
                lines.push(place(&mut *open, drive.tape()?.as_ref())?);
            }
            open.close()?;
        }
    }
    lines.iter().for_each(|it| show::say(format_args!("{it}")));
    Ok(exit::DONE)
}

pub fn reset(spool: &Spool, args: &DeviceArgs) -> Result<u8> {
    // Whoever has a lock is alive, and keeps it.
    let taken = args.device.drive(spool)?.take()?;
    for name in spool.jobs(true)? {
        if spool.job(&name)?.status()? != Some(JobStatus::Busy) {
            continue;
        }
        match spool.take_job(&name) {
            Ok(_) => show::say(format_args!("job {name} is not busy any more")),
            Err(e) if e.kind() == ErrorKind::Locked => {}
            Err(e) => return Err(e),
        }
    }
    let mut open = crate::tape::open(&taken.device()?, Access::Read)?;
    if open.state()?.online {
        open.rewind()?;
    }
    open.close()?;
    Ok(exit::DONE)
}

pub fn load(spool: &Spool, args: &LoadArgs) -> Result<u8> {
    let taken = args.device.drive(spool)?.take()?;
    let Some(word) = args.name.as_ref().or(args.device.tape.as_ref()) else {
        let loaded = load::open_noted(spool, &taken, Access::Read)?;
        let loaded = load::adopt(spool, &taken, loaded)?;
        show::say(format_args!("{}", loaded.describe()));
        loaded.close()?;
        return Ok(exit::DONE);
    };
    if args.device.is_dry {
        show::say(format_args!("{} would be loaded", Quoted(word.as_bytes())));
        return Ok(exit::DONE);
    }
    let image = PathBuf::from(word);
    let is_image = taken.device()?.is_dir() && word.as_bytes().ends_with(b".tap");
    let loaded = match is_image && image.is_file() {
        true => load::load_image(spool, &taken, &image)?,
        false => {
            let mut ask = ask;
            let ask: Option<&mut AskFor<'_>> =
                if terminal::is_there() { Some(&mut ask) } else { None };
            load::load(spool, &taken, word.as_bytes(), ask, Access::Read)?
        }
    };
    show::say(format_args!("{}", loaded.describe()));
    loaded.close()?;
    Ok(exit::DONE)
}

pub fn eject(spool: &Spool, args: &DeviceArgs) -> Result<u8> {
    let taken = args.device.drive(spool)?.take()?;
    if args.device.tape.is_some() {
        let loaded = load::open_noted(spool, &taken, Access::Read)?;
        args.device.expect(&loaded)?;
        loaded.close()?;
    }
    if !args.device.is_dry {
        load::eject(spool, &taken)?;
    }
    Ok(exit::DONE)
}

/// Follows the logs of the jobs that a drive works on, until it is idle.
pub fn watch(spool: &Spool, args: &WatchArgs) -> Result<u8> {
    let drive = args.device.drive(spool)?;
    let interval = Duration::try_from_secs_f64(args.interval.max(0.01));
    let interval = interval.map_err(|_| Error::usage("that is no number of seconds"))?;
    let mut seen: std::collections::HashMap<String, u64> = std::collections::HashMap::new();
    let mut told = None;
    loop {
        let status = drive.status()?;
        let tape = drive.tape()?.map(|it| Quoted(&it.name()).to_string());
        if told.as_ref() != Some(&(status, tape.clone())) {
            let word = if status == DriveStatus::Busy { "busy" } else { "idle" };
            show::say(format_args!("{word} {}", tape.as_deref().unwrap_or("no tape")));
            told = Some((status, tape));
        }
        let mut is_working = false;
        for name in spool.jobs(false)? {
            let Ok(job) = spool.job(&name) else { continue };
            if job.status()? != Some(JobStatus::Busy) {
                continue;
            }
            is_working = true;
            let before = seen.get(&name).copied().unwrap_or(0);
            let mut count = 0;
            log::each_line(&job.log_path(), &mut |line| {
                count += 1;
                if count > before {
                    show::say(format_args!("{}", Quoted(line)));
                }
                Ok(())
            })?;
            seen.insert(name, count);
        }
        if args.device.is_dry || status == DriveStatus::Idle && !is_working {
            return Ok(exit::DONE);
        }
        std::thread::sleep(interval);
    }
}
