//! A drive of the spool and the tape in it: bringing a tape in, giving it out, naming a new one.
//!
//! Invariant: what the spool says of the tape in a drive is what the tape's first block said when
//! it was read last. A tape with something on it gets another label only by force, and then what
//! the spool knows of its files is set aside.

use std::path::Path;
use std::time::{Duration, Instant};

use super::changer::{Changer, Library};
use super::drive::{Access, Read, Why};
use super::image;
use super::label::Label;
use super::loaded::{First, Loaded};
use super::spool::Spool;
use super::spool::drive::{Drive, TakenDrive};
use super::spool::tape::{GONE, Tape, WORM, notable_name};
use super::spool::text::Fields;
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::{self, c, quoted};

/// How long a drive may take until a tape that was put into it is ready.
const READY_WITHIN: Duration = Duration::from_secs(300);
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);

/// A drive that is taken, and the tape in it.
pub struct Station {
    /// The tape. Before the drive, so that the device is closed when others may take it.
    pub loaded: Loaded,
    /// The drive.
    pub taken: TakenDrive,
}

impl Station {
    /// Takes a drive and reads the first block of the tape in it. The tape is noted as the one that
    /// is in the drive if the spool knows it.
    ///
    /// [`ErrorKind::WrongTape`] if there is none in it.
    pub fn open(spool: &Spool, drive: &Drive, access: Access) -> Result<Station> {
        Station::of(spool, drive.take()?, access)
    }

    /// The same for a drive that is taken.
    pub fn of(spool: &Spool, taken: TakenDrive, access: Access) -> Result<Station> {
        let loaded = open_noted(spool, &taken, access)?;
        Ok(Station { loaded, taken })
    }

    /// The tape as the spool knows it.
    pub fn tape(&self, spool: &Spool) -> Result<Option<Tape>> {
        known(spool, &self.loaded)
    }
}

/// The tape in a drive as the spool knows it, which may also know another one by its name.
fn known(spool: &Spool, loaded: &Loaded) -> Result<Option<Tape>> {
    let Some(label) = loaded.label() else { return Ok(None) };
    let Some(tape) = spool.tape(label.text())? else { return Ok(None) };
    Ok(if tape.is_other(label)? { None } else { Some(tape) })
}

/// Opens a taken drive, and notes in the spool what is in it, if the spool knows it.
///
/// [`ErrorKind::WrongTape`] if there is no tape in it.
pub fn open_noted(spool: &Spool, taken: &TakenDrive, access: Access) -> Result<Loaded> {
    let loaded = match Loaded::open(&taken.device()?, access) {
        Err(e) if e.kind() == ErrorKind::WrongTape => {
            taken.unload()?;
            return Err(e);
        }
        opened => opened?,
    };
    note(taken, known(spool, &loaded)?.as_ref())?;
    Ok(loaded)
}

/// Notes which tape is in a drive, unless that is known already.
pub(super) fn note(taken: &TakenDrive, tape: Option<&Tape>) -> Result<()> {
    let known = taken.tape()?;
    if let Some(tape) = tape
        && tape.is_gone().unwrap_or(false)
    {
        // Whoever was about to write another label has not come to it.
        tape.set_gone(None)?;
    }
    match tape {
        Some(tape) if known.is_some_and(|it| it.dir() == tape.dir()) => Ok(()),
        Some(tape) => taken.load(tape),
        None => taken.unload(),
    }
}

/// The changer of a drive, and the drive's number in it.
fn changer_of(spool: &Spool, drive: &Drive) -> Result<Option<(Changer, u32)>> {
    let Some((path, number)) = drive.changer()? else { return Ok(None) };
    let what =
        format!("the changer {} of drive {}", quoted(&path), quoted(Path::new(drive.name())));
    match sys::stat(&path).map_err(|e| Error::io(what.clone(), e))?.mode & c::S_IFMT {
        c::S_IFCHR => return Ok(Some((Changer::Library(Library::new(path)), number))),
        c::S_IFDIR => {}
        _ => return Err(Error::usage(format!("{what} is no device and no directory of images"))),
    }
    // Every drive that is served from this shelf, so that no tape is in two of them.
    let (mut drives, mut own) = (Vec::new(), 0);
    for other in spool.drives()? {
        if other.changer()?.is_some_and(|it| it.0 == path) {
            if other.dir() == drive.dir() {
                own = u32::try_from(drives.len()).unwrap_or(u32::MAX);
            }
            drives.push(other.device()?);
        }
    }
    Ok(Some((Changer::Shelf { dir: path, drives }, own)))
}

/// The names by which the changer of a drive knows its tapes; `None` if there is no changer.
pub fn tapes_of_changer(spool: &Spool, drive: &Drive) -> Result<Option<Vec<Vec<u8>>>> {
    let Some((changer, _)) = changer_of(spool, drive)? else { return Ok(None) };
    let inventory = changer.inventory()?;
    let places = inventory.slots.into_iter().chain(inventory.drives);
    Ok(Some(places.filter(|it| it.is_full).filter_map(|it| it.tape).collect()))
}

/// The name by which the changer of a drive knows the tape in it.
fn barcode_in(spool: &Spool, drive: &Drive) -> Result<Option<Vec<u8>>> {
    let Some((changer, number)) = changer_of(spool, drive)? else { return Ok(None) };
    let drives = changer.inventory()?.drives;
    Ok(drives.into_iter().find(|it| it.number == number).and_then(|it| it.tape))
}

/// Asks a person to put the tape with this label into the drive; whether that is done.
pub type AskFor<'a> = dyn FnMut(&[u8]) -> bool + 'a;

/// Brings a tape into a taken drive whose device is closed: the one with this label, or what its
/// changer knows by this name. A person is asked if there is no changer, and `None` if nobody is
/// there. A tape with a label is noted, also if the spool has not known it. What is in the drive
/// stays there unless the wanted one can come.
///
/// [`ErrorKind::WrongTape`] if nobody brings it, or if what was brought is another one.
pub fn load(
    spool: &Spool,
    taken: &TakenDrive,
    name: &[u8],
    ask: Option<&mut AskFor<'_>>,
    access: Access,
) -> Result<Loaded> {
    let known = spool.tape(name)?;
    let inside = match open_noted(spool, taken, access) {
        Ok(loaded) if is_wanted(&loaded, name, known.as_ref())? => {
            return adopt(spool, taken, loaded);
        }
        Ok(loaded) => Ok(Some(loaded)),
        Err(e) if e.kind() == ErrorKind::WrongTape => Ok(None),
        Err(e) if e.kind() == ErrorKind::Locked || e.is_shortage() => return Err(e),
        Err(e) if e.kind() == ErrorKind::NotFound && !image::is_loaded(&taken.device()?) => {
            return Err(e);
        }
        // One that cannot be looked at makes room as well.
        Err(e) => Err(e),
    };
    let barcode = match &known {
        Some(tape) if tape.is_gone()? => {
            let what = format!("tape {} is gone: its cartridge has got another", Quoted(name));
            return Err(Error::new(ErrorKind::WrongTape, format!("{what} label since")));
        }
        Some(tape) => tape.metrics()?.get("barcode").unwrap_or(name).to_vec(),
        None => name.to_vec(),
    };
    let changer = changer_of(spool, taken)?;
    let has_changer = changer.is_some();
    let loaded = match (changer, ask) {
        (Some((changer, number)), _) => {
            by_changer(spool, taken, inside, (&changer, number), (name, &barcode), access)?
        }
        (None, ask) => {
            let missing = not_here(taken, inside.as_ref().ok().and_then(Option::as_ref), name);
            let Some(ask) = ask else { return Err(inside.err().unwrap_or(missing)) };
            let inside = inside.unwrap_or_default();
            give_out(taken, inside)?;
            if !ask(name) {
                return Err(missing);
            }
            open_ready(spool, taken, access)?
        }
    };
    if known.is_some() || !has_changer {
        loaded.expect_label(name)?;
    }
    let loaded = adopt(spool, taken, loaded)?;
    if has_changer
        && let Some(tape) = taken.tape()?
        && tape.name() != barcode
    {
        let mut metrics = tape.metrics()?;
        if metrics.get("barcode") != Some(&barcode) {
            metrics.set("barcode", &barcode)?;
            tape.set_metrics(&metrics)?;
        }
    }
    Ok(loaded)
}

/// Whether the tape in a drive is the wanted one, and no other of its name.
fn is_wanted(loaded: &Loaded, name: &[u8], known: Option<&Tape>) -> Result<bool> {
    match (loaded.label(), known) {
        (Some(label), Some(tape)) if label.text() == name => Ok(!tape.is_other(label)?),
        (Some(label), _) => Ok(label.text() == name),
        (None, _) => Ok(false),
    }
}

/// What to say if nobody brings a tape.
fn not_here(taken: &TakenDrive, inside: Option<&Loaded>, name: &[u8]) -> Error {
    let (drive, shown) = (quoted(Path::new(taken.name())), Quoted(name));
    let found = match inside {
        None => String::new(),
        Some(it) if it.label().is_some_and(|it| it.text() == name) => {
            format!(", which has another tape {shown}")
        }
        Some(it) => format!(", which has {}", it.describe()),
    };
    let what = format!("tape {shown} is not in drive {drive}{found}: put it in, then t0load");
    Error::new(ErrorKind::WrongTape, format!("{what}, and try again"))
}

/// Has a changer bring a tape, of this name and barcode, into a drive that has `inside` in it. What
/// is in there stays unless that can come.
fn by_changer(
    spool: &Spool,
    taken: &TakenDrive,
    inside: Result<Option<Loaded>>,
    (changer, number): (&Changer, u32),
    (name, barcode): (&[u8], &[u8]),
    access: Access,
) -> Result<Loaded> {
    let inventory = changer.inventory()?;
    match (inventory.drive(number)?.holds(barcode), inside) {
        (true, Ok(Some(loaded))) => return Ok(loaded),
        (true, Err(e)) if !image::is_loaded(&taken.device()?) => return Err(e),
        // Unloaded, and left where it was: the drive takes it in again when it is moved.
        (true, _) => {
            taken.unload()?;
            changer.unload(number)?;
        }
        (false, inside) => {
            match inventory.slot_of(barcode) {
                Err(e)
                    if e.kind() == ErrorKind::Locked && give_out_elsewhere(spool, taken, name)? => {
                }
                slot => drop(slot?),
            }
            give_out(taken, inside.unwrap_or_default())?;
        }
    }
    changer.load(barcode, number)?;
    open_ready(spool, taken, access)
}

/// Gives a tape out of another drive of the spool, if it is in one that nobody works with.
fn give_out_elsewhere(spool: &Spool, taken: &TakenDrive, name: &[u8]) -> Result<bool> {
    for other in spool.drives()? {
        if other.dir() == taken.dir() || other.tape()?.is_none_or(|it| it.name() != name) {
            continue;
        }
        return match other.take() {
            Ok(other) => eject(spool, &other).map(|()| true),
            Err(e) if e.kind() == ErrorKind::Locked => Ok(false),
            Err(e) => Err(e),
        };
    }
    Ok(false)
}

/// Notes the tape that is in a drive, also if the spool has not known it.
///
/// [`ErrorKind::WrongTape`] if the spool knows another one by this name.
pub fn adopt(spool: &Spool, taken: &TakenDrive, loaded: Loaded) -> Result<Loaded> {
    let tape = match loaded.label() {
        Some(label) => {
            refuse_other(spool, label)?;
            Some(match spool.tape(label.text())? {
                Some(tape) if tape.label()?.as_ref() == Some(label) => tape,
                _ => spool.add_tape(label)?,
            })
        }
        None => None,
    };
    note(taken, tape.as_ref())?;
    Ok(loaded)
}

/// Fails if the spool knows another tape by the name on this label.
fn refuse_other(spool: &Spool, label: &Label) -> Result<()> {
    let known = spool.tape(label.text())?;
    if !known.map_or(Ok(false), |it| it.is_other(label))? {
        return Ok(());
    }
    let message = format!(
        "the spool knows another tape {}, which was labelled at another time: give one of them a \
         new name (t0label -w -f), or use a spool of its own",
        Quoted(label.text())
    );
    Err(Error::new(ErrorKind::WrongTape, message))
}

/// Opens a drive whose tape was just put in, and waits until that is ready.
fn open_ready(spool: &Spool, taken: &TakenDrive, access: Access) -> Result<Loaded> {
    let begin = Instant::now();
    loop {
        match open_noted(spool, taken, access) {
            Err(e) if e.kind() == ErrorKind::WrongTape && begin.elapsed() < READY_WITHIN => {
                // An image is there at once, or it is not.
                if taken.device()?.is_dir() {
                    return Err(e);
                }
                std::thread::sleep(BETWEEN_LOOKS);
            }
            opened => return opened,
        }
    }
}

/// Gives out what is in a drive, be it a tape that can be read or an image that cannot be opened.
fn give_out(taken: &TakenDrive, inside: Option<Loaded>) -> Result<()> {
    match inside {
        Some(loaded) => {
            let mut drive = loaded.into_drive();
            drive.unload()?;
            drive.close()?;
        }
        None => drop(image::take_out(&taken.device()?)?),
    }
    taken.unload()
}

/// Gives the tape out of a taken drive whose device is closed, and has its changer put it away. An
/// image that cannot be opened goes, too.
pub fn eject(spool: &Spool, taken: &TakenDrive) -> Result<()> {
    let device = taken.device()?;
    match super::open(&device, Access::Read) {
        Ok(mut drive) => {
            if drive.state()?.online {
                drive.unload()?;
            }
            drive.close()?;
        }
        Err(e) if e.kind() == ErrorKind::Locked || e.is_shortage() => return Err(e),
        Err(e) => match image::take_out(&device)? {
            true => log::warn!("{e}: it is taken out of the drive"),
            false => return Err(e),
        },
    }
    taken.unload()?;
    if device.is_dir() {
        // An image is where it always was.
        return Ok(());
    }
    match changer_of(spool, taken)? {
        Some((changer, number)) => changer.unload(number),
        None => Ok(()),
    }
}

/// Puts an image into a drive that is a directory and has no changer. With `wanted` it has to have
/// that label.
pub fn load_image(
    spool: &Spool,
    taken: &TakenDrive,
    image: &Path,
    wanted: Option<&[u8]>,
) -> Result<Loaded> {
    let device = taken.device()?;
    if !device.is_dir() {
        let message = format!("drive {} takes no images", quoted(Path::new(taken.name())));
        return Err(Error::usage(message));
    }
    let failed = |e| Error::io(format!("loading {}", quoted(image)), e);
    let image = image.canonicalize().map_err(failed)?;
    // What is no tape, or not the one that is wanted, does not get into the drive, and what is
    // there stays.
    let loaded = Loaded::open(&image, Access::Read)?;
    if let Some(wanted) = wanted {
        loaded.expect_label(wanted)?;
    }
    if let Some(label) = loaded.label() {
        refuse_other(spool, label)?;
    }
    loaded.close()?;
    image::take_out(&device)?;
    taken.unload()?;
    std::os::unix::fs::symlink(&image, device.join(image::LOADED)).map_err(failed)?;
    adopt(spool, taken, Loaded::open(&device, Access::Read)?)
}

/// Why this label is not written to the tape in a drive unless by force.
pub fn obstacle(spool: &Spool, loaded: &mut Loaded, label: &Label) -> Result<Option<String>> {
    notable_name(label.text())?;
    let is_blank = match loaded.first() {
        First::Blank => true,
        // It may have been erased, which leaves a filemark, and it may not.
        First::Filemark => {
            let drive = loaded.drive();
            drive.rewind()?;
            drive.read(&mut [0; 1])?;
            drive.read(&mut [0; 1])? == Read::EndOfData
        }
        First::TooLong | First::Unreadable(_) | First::Block(_) => false,
    };
    if !is_blank {
        let found = loaded.describe();
        return Ok(Some(format!("there is something on it: it is {found}")));
    }
    // The name of one that is gone is free.
    match spool.tape(label.text())? {
        Some(tape) if !tape.is_gone()? => {
            let shown = Quoted(label.text());
            Ok(Some(format!("the spool knows a tape {shown} already")))
        }
        _ => Ok(None),
    }
}

/// Writes a label to the tape in a drive, whatever is on it, and notes the tape. What the spool
/// knew of files on it, and on another tape that was called so, is set aside; if it had another
/// name, the tape of that name is gone.
pub fn write_label(
    spool: &Spool,
    station: &mut Station,
    label: &Label,
    metrics: &Fields,
    now: i64,
) -> Result<Tape> {
    notable_name(label.text())?;
    let state = station.loaded.drive().state()?;
    if state.write_protected {
        return Err(station.loaded.refused(Why::Protected));
    }
    let before = station.tape(spool)?;
    let is_worm =
        state.worm.map_or_else(|| before.as_ref().map_or(Ok(false), Tape::is_worm), Ok)?;
    if is_worm && *station.loaded.first() != First::Blank {
        return Err(station.loaded.refused(Why::Worm));
    }
    let namesake = spool.tape(label.text())?;
    let renamed = before.as_ref().filter(|it| it.name() != label.text());
    // Noted before it is so: with the new label nobody knows any more which tape it was.
    if let Some(tape) = renamed {
        tape.set_gone(Some(now))?;
    }
    if let Err(e) = station.loaded.write_label(label) {
        // What is still there was not relabelled.
        if let Some(tape) = renamed
            && station.loaded.again().is_ok()
        {
            tape.set_gone(None)?;
        }
        return Err(e);
    }
    for tape in [&before, &namesake].into_iter().flatten() {
        tape.set_log_aside(now)?;
    }
    let tape = spool.add_tape(label)?;
    let mut known = tape.metrics()?;
    // They were of the tape before, or of another one of this name.
    for key in [GONE, "full", "blocksize", WORM] {
        known.remove(key);
    }
    if state.worm == Some(true) {
        known.set(WORM, "1")?;
    }
    for (key, value) in metrics.iter() {
        known.set(&String::from_utf8_lossy(key), value)?;
    }
    match barcode_in(spool, &station.taken) {
        Ok(Some(barcode)) if barcode != label.text() => known.set("barcode", barcode)?,
        Ok(Some(_)) => {
            known.remove("barcode");
        }
        Ok(None) => {}
        // The label is on the tape all the same.
        Err(e) => log::warn!("the changer does not say which tape is in the drive: {e}"),
    }
    if known != tape.metrics()? {
        tape.set_metrics(&known)?;
    }
    note(&station.taken, Some(&tape))?;
    Ok(tape)
}
