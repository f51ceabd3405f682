//! `t0scan`, `t0seek`, `t0tell`, `t0stat`, `t0reset`, `t0load` and `t0eject`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::Args;

use super::read::ask;
use super::{Device, noted};
use crate::cli::{exit, show, terminal};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::quoted;
use crate::tape::drive::{Access, BlockSize, Drive};
use crate::tape::load::{self, AskFor};
use crate::tape::read::{What, scan as scan_tape};
use crate::tape::recorded::{Place, place_of};
use crate::tape::seek;
use crate::tape::spool::Spool;
use crate::tape::spool::drive::{Drive as SpoolDrive, DriveStatus};
use crate::tape::spool::job::JobStatus;
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

pub fn scan(spool: &Spool, args: &ScanArgs) -> Result<u8> {
    if args.device.is_dry {
        let drive = args.device.drive(spool)?;
        args.device.expect_noted(&drive)?;
        let tape = noted(&drive)?;
        show::say(format_args!("{tape} would be looked at from file {} on", args.from));
        return Ok(exit::DONE);
    }
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
                    let damage = head.damage.as_ref().map(|it| format!(": {it}"));
                    format!("{job} {batch}{count}{}", damage.unwrap_or_default())
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

/// A place of a tape.
enum To {
    End,
    /// So many tape files from where the drive stands.
    By(i64),
    File(u64),
    Batch(Place),
}

impl To {
    fn parse(spool: &Spool, text: &str) -> Result<To> {
        let bad = || Error::usage(format!("'{text}' is no place of a tape"));
        if text == "end" {
            return Ok(To::End);
        }
        if text.starts_with(['+', '-']) {
            return text.parse().map(To::By).map_err(|_| bad());
        }
        if let Ok(filenum) = text.parse() {
            return Ok(To::File(filenum));
        }
        let (job, number) = text.rsplit_once('/').ok_or_else(bad)?;
        let number: u64 = number.trim_start_matches(['w', 'r']).parse().map_err(|_| bad())?;
        let job = spool.job(job.rsplit('/').next().unwrap_or(job))?;
        let id = job.batches()?.into_iter().find(|it| it.number == number);
        place_of(spool, &job, id.ok_or_else(bad)?).map(To::Batch)
    }
}

impl std::fmt::Display for To {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            To::End => write!(f, "the end of data"),
            To::By(count) => write!(f, "{count:+} tape files from where it stands"),
            To::File(filenum) => write!(f, "file {filenum}"),
            To::Batch(it) => write!(f, "file {} of tape {}", it.filenum, Quoted(&it.tape)),
        }
    }
}

pub fn seek(spool: &Spool, args: &SeekArgs) -> Result<u8> {
    let to = To::parse(spool, &args.to.to_string_lossy())?;
    if matches!(to, To::By(_)) && args.device.tape.is_some() {
        return Err(Error::usage("-t does not go with a relative place"));
    }
    let drive = args.device.drive(spool)?;
    if args.device.is_dry {
        args.device.expect_noted(&drive)?;
        show::say(format_args!("drive {} would go to {to}", quoted(Path::new(drive.name()))));
        return Ok(exit::DONE);
    }
    let taken = drive.take()?;
    let mut open = match to {
        // Begins where the drive stands, so nothing may be read before it.
        To::By(_) => crate::tape::open(&taken.device()?, Access::Read)?,
        _ => {
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
    match to {
        To::End => open.to_end_of_data()?,
        To::By(count) => {
            let current = seek::current_file(&mut *open, tape.as_ref())?;
            let current = current.ok_or_else(|| {
                let what = "it is not known in which tape file the drive stands: seek to a number";
                Error::usage(what)
            })?;
            let filenum = current.checked_add_signed(count).ok_or_else(|| {
                Error::usage(format!("there is no tape file {count:+} from file {current}"))
            })?;
            seek::to_file(&mut *open, filenum, known(filenum)?)?;
        }
        To::File(filenum) => seek::to_file(&mut *open, filenum, known(filenum)?)?,
        To::Batch(place) => {
            if tape.as_ref().map(Tape::name).as_ref() != Some(&place.tape) {
                let message = format!("it is on tape {}, which is not here", Quoted(&place.tape));
                return Err(Error::new(ErrorKind::WrongTape, message));
            }
            seek::to_file(&mut *open, place.filenum, place.position)?;
        }
    }
    if args.device.verbose {
        show::say(format_args!("{}", place(&mut *open, tape.as_ref())?));
    }
    open.close()?;
    Ok(exit::DONE)
}

pub fn tell(spool: &Spool, args: &DeviceArgs) -> Result<u8> {
    let drive = args.device.drive(spool)?;
    // To read the label would be to leave the place that is asked for.
    args.device.expect_noted(&drive)?;
    let taken = drive.take()?;
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
    args.device.expect_noted(&drive)?;
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
    let drive = args.device.drive(spool)?;
    if args.device.is_dry {
        return dry_reset(spool, args, &drive);
    }
    // Whoever has a lock is alive, and keeps it.
    let taken = drive.take()?;
    if args.device.tape.is_some() {
        let loaded = load::open_noted(spool, &taken, Access::Read)?;
        args.device.expect(&loaded)?;
        loaded.close()?;
    }
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

fn dry_reset(spool: &Spool, args: &DeviceArgs, drive: &SpoolDrive) -> Result<u8> {
    args.device.expect_noted(drive)?;
    let name = quoted(Path::new(drive.name())).to_string();
    if drive.status()? == DriveStatus::Busy {
        let what = format!("drive {name} is in use by another process");
        return Err(Error::new(ErrorKind::Locked, what));
    }
    for uuid in spool.jobs(true)? {
        let job = spool.job(&uuid)?;
        let is_dead = spool.status_of(&job)? != Some(JobStatus::Busy);
        if is_dead && job.status()? == Some(JobStatus::Busy) {
            show::say(format_args!("job {uuid} would not be busy any more"));
        }
    }
    show::say(format_args!("drive {name} would be rewound"));
    Ok(exit::DONE)
}

pub fn load(spool: &Spool, args: &LoadArgs) -> Result<u8> {
    // What is no label may be what the changer knows it by, or an image: that is seen later.
    if let (Some(name), Some(tape)) = (&args.name, &args.device.tape)
        && name != tape
        && spool.tape(name.as_bytes())?.is_some()
    {
        let (name, tape) = (Quoted(name.as_bytes()), Quoted(tape.as_bytes()));
        let what = format!("tape {name} is to be loaded, wanted is tape {tape}");
        return Err(Error::new(ErrorKind::WrongTape, what));
    }
    let word = args.name.as_ref().or(args.device.tape.as_ref());
    let drive = args.device.drive(spool)?;
    if args.device.is_dry {
        match word {
            Some(word) => show::say(format_args!("{} would be loaded", Quoted(word.as_bytes()))),
            None => show::say(format_args!("the tape that is in the drive would be noted")),
        }
        return Ok(exit::DONE);
    }
    let taken = drive.take()?;
    let Some(word) = word else {
        let loaded = load::open_noted(spool, &taken, Access::Read)?;
        let loaded = load::adopt(spool, &taken, loaded)?;
        show::say(format_args!("{}", loaded.describe()));
        loaded.close()?;
        return Ok(exit::DONE);
    };
    let image = PathBuf::from(word);
    let is_image = taken.device()?.is_dir() && word.as_bytes().ends_with(b".tap");
    let loaded = match is_image && image.is_file() {
        true => {
            let wanted = args.device.tape.as_ref().map(|it| it.as_bytes());
            load::load_image(spool, &taken, &image, wanted)?
        }
        false => {
            let mut ask = ask;
            let ask: Option<&mut AskFor<'_>> =
                if terminal::is_there() { Some(&mut ask) } else { None };
            load::load(spool, &taken, word.as_bytes(), ask, Access::Read)?
        }
    };
    args.device.expect(&loaded)?;
    show::say(format_args!("{}", loaded.describe()));
    loaded.close()?;
    Ok(exit::DONE)
}

pub fn eject(spool: &Spool, args: &DeviceArgs) -> Result<u8> {
    let drive = args.device.drive(spool)?;
    if args.device.is_dry {
        args.device.expect_noted(&drive)?;
        show::say(format_args!("{} would be given out", noted(&drive)?));
        return Ok(exit::DONE);
    }
    let taken = drive.take()?;
    if args.device.tape.is_some() {
        let loaded = load::open_noted(spool, &taken, Access::Read)?;
        args.device.expect(&loaded)?;
        loaded.close()?;
    }
    load::eject(spool, &taken)?;
    Ok(exit::DONE)
}
