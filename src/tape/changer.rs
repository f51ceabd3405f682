//! Changers: what brings a tape into a drive, be it a library or a shelf of images.
//!
//! Invariant: a tape is moved only from where it was seen at that moment, and a drive that holds
//! another one is emptied first, to the place where that came from.
//!
//! A library is moved by the program `mtx`. Nothing of what it prints is trusted to be short or of
//! the form that is known. Before a tape is taken out of a real drive, [`Drive::unload`] should
//! have rewound it: many libraries refuse otherwise.
//!
//! [`Drive::unload`]: super::drive::Drive::unload

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use super::image::LOADED;
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::{self, quoted};

/// Most that is read of what `mtx` prints.
const OUTPUT_BYTES_MAX: u64 = 4 << 20;
/// How long a command of `mtx` may take: a large library that has just been opened looks at all of
/// its places first.
const LIMIT: Duration = Duration::from_secs(600);
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);
/// Most places of a changer.
const PLACES_MAX: usize = 1 << 16;

/// What moves tapes.
pub enum Changer {
    /// A library.
    Library(Library),
    /// A directory of images whose names end in `.tap`, and drives that are directories.
    Shelf {
        /// The directory.
        dir: PathBuf,
        /// The drives, by number.
        drives: Vec<PathBuf>,
    },
}

/// A library, moved by `mtx`.
#[derive(Clone, Debug)]
pub struct Library {
    /// Usually `mtx`.
    pub program: PathBuf,
    /// The changer's device, as in `/dev/sg3`.
    pub device: PathBuf,
    /// How long a command may take. Then the program is killed, and is not waited for if the kernel
    /// holds it.
    pub limit: Duration,
}

impl Library {
    /// The library whose changer is this device.
    pub fn new(device: impl Into<PathBuf>) -> Library {
        Library { program: "mtx".into(), device: device.into(), limit: LIMIT }
    }
}

/// What a changer holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    /// The drives.
    pub drives: Vec<Place>,
    /// The slots.
    pub slots: Vec<Place>,
}

/// A place for a tape.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Its number.
    pub number: u32,
    /// Through it tapes come into the library and leave it.
    pub is_mail: bool,
    /// There is a tape in it.
    pub is_full: bool,
    /// The tape's barcode, where it has one; of an image its name without `.tap`.
    pub tape: Option<Vec<u8>>,
    /// Of a drive: the slot from which the tape came, if that is known.
    pub from: Option<u32>,
}

impl Place {
    /// Whether this tape is in it.
    pub fn holds(&self, tape: &[u8]) -> bool {
        self.is_full && self.tape.as_deref() == Some(tape)
    }
}

impl Inventory {
    /// The drive of a number.
    pub fn drive(&self, number: u32) -> Result<&Place> {
        let found = self.drives.iter().find(|it| it.number == number);
        found.ok_or_else(|| {
            let count = self.drives.len();
            Error::new(ErrorKind::NotFound, format!("no drive {number}: the changer has {count}"))
        })
    }

    /// The slot of a tape. [`ErrorKind::Locked`] if it is in a drive, and
    /// [`ErrorKind::WrongTape`] if it is nowhere.
    pub fn slot_of(&self, tape: &[u8]) -> Result<u32> {
        if let Some(slot) = self.slots.iter().find(|it| it.holds(tape)) {
            return Ok(slot.number);
        }
        let tape_name = Quoted(tape);
        Err(match self.drives.iter().find(|it| it.holds(tape)) {
            Some(drive) => {
                let what = format!("the tape {tape_name} is in drive {}", drive.number);
                Error::new(ErrorKind::Locked, what)
            }
            None => {
                let what = format!("the changer has no tape {tape_name}: put it in");
                Error::new(ErrorKind::WrongTape, what)
            }
        })
    }

    /// Where the tape of a drive goes.
    fn home_of(&self, drive: &Place) -> Result<u32> {
        let is_free = |it: &&Place| !it.is_full;
        let own = self.slots.iter().filter(is_free).find(|it| Some(it.number) == drive.from);
        let any = || self.slots.iter().find(|it| !it.is_full && !it.is_mail);
        own.or_else(any).map(|it| it.number).ok_or_else(|| {
            let what = format!("no free slot for the tape in drive {}: take one out", drive.number);
            Error::new(ErrorKind::NoSpace, what)
        })
    }
}

impl Changer {
    /// What is where.
    pub fn inventory(&self) -> Result<Inventory> {
        match self {
            Changer::Library(library) => library.inventory(),
            Changer::Shelf { dir, drives } => inventory_of_shelf(dir, drives),
        }
    }

    /// Brings a tape into a drive; one that is there already stays.
    pub fn load(&self, tape: &[u8], drive: u32) -> Result<()> {
        let inventory = self.inventory()?;
        let there = inventory.drive(drive)?;
        if there.holds(tape) {
            return Ok(());
        }
        let slot = inventory.slot_of(tape)?;
        if there.is_full {
            self.give_back(&inventory, there)?;
        }
        match self {
            Changer::Library(library) => library.move_tape("load", slot, drive),
            Changer::Shelf { dir, drives } => {
                let mut name = tape.to_vec();
                name.extend(b".tap");
                let image = dir.join(OsStr::from_bytes(&name));
                let image = image.canonicalize().unwrap_or(image);
                let link = link_of(drives, drive)?;
                std::os::unix::fs::symlink(&image, &link)
                    .map_err(|e| Error::io(format!("loading {}", quoted(&image)), e))
            }
        }
    }

    /// Takes the tape out of a drive, if there is one.
    pub fn unload(&self, drive: u32) -> Result<()> {
        let inventory = self.inventory()?;
        let there = inventory.drive(drive)?;
        if there.is_full { self.give_back(&inventory, there) } else { Ok(()) }
    }

    fn give_back(&self, inventory: &Inventory, drive: &Place) -> Result<()> {
        match self {
            Changer::Library(library) => {
                let slot = inventory.home_of(drive)?;
                library.move_tape("unload", slot, drive.number)
            }
            Changer::Shelf { drives, .. } => {
                let link = link_of(drives, drive.number)?;
                std::fs::remove_file(&link)
                    .map_err(|e| Error::io(format!("removing {}", quoted(&link)), e))
            }
        }
    }
}

// --- Images -------------------------------------------------------------------------------------

fn link_of(drives: &[PathBuf], number: u32) -> Result<PathBuf> {
    let drive = usize::try_from(number).ok().and_then(|it| drives.get(it));
    let drive = drive.ok_or_else(|| Error::usage(format!("no drive {number}")))?;
    Ok(drive.join(LOADED))
}

fn inventory_of_shelf(dir: &Path, drives: &[PathBuf]) -> Result<Inventory> {
    let failed = |e| Error::io(format!("listing {}", quoted(dir)), e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().into_vec();
        names.extend(name.strip_suffix(b".tap").filter(|it| !it.is_empty()).map(<[u8]>::to_vec));
        if names.len() > PLACES_MAX {
            let what = format!("{} has more than {PLACES_MAX} images", quoted(dir));
            return Err(Error::usage(what));
        }
    }
    names.sort();
    let mut inventory = Inventory::default();
    for (number, drive) in (0..).zip(drives) {
        let link = drive.join(LOADED);
        let target = std::fs::read_link(&link).ok();
        let name = target.as_ref().and_then(|it| it.file_name()).map(OsStr::as_bytes);
        inventory.drives.push(Place {
            number,
            is_full: target.is_some() || sys::lstat(&link).is_ok(),
            tape: name.map(|it| it.strip_suffix(b".tap").unwrap_or(it).to_vec()),
            ..Place::default()
        });
    }
    for (number, tape) in (1..).zip(names) {
        let is_full = !inventory.drives.iter().any(|it| it.holds(&tape));
        let tape = is_full.then_some(tape);
        inventory.slots.push(Place { number, is_full, tape, ..Place::default() });
    }
    Ok(inventory)
}

// --- Libraries ----------------------------------------------------------------------------------

impl Library {
    fn inventory(&self) -> Result<Inventory> {
        let begin = Instant::now();
        let output = match self.run(&["status"]) {
            // The first command after somebody has opened the door is refused.
            Err(_) if begin.elapsed() < self.limit => self.run(&["status"]),
            output => output,
        };
        let read = |output: &[u8]| {
            parse(output).map_err(|e| e.context(format!("the changer {}", quoted(&self.device))))
        };
        let inventory = read(&output?)?;
        let all = || inventory.slots.iter().chain(&inventory.drives);
        // After a change of the library mtx asks without barcodes where it was refused with them.
        match all().any(|it| it.is_full) && all().all(|it| it.tape.is_none()) {
            true => read(&self.run(&["status"])?),
            false => Ok(inventory),
        }
    }

    fn move_tape(&self, verb: &str, slot: u32, drive: u32) -> Result<()> {
        self.run(&[verb, &slot.to_string(), &drive.to_string()]).map(|_| ())
    }

    /// Runs a command to its end; gives what it printed.
    fn run(&self, words: &[&str]) -> Result<Vec<u8>> {
        let name = quoted(&self.program);
        let mut command = Command::new(&self.program);
        command.arg("-f").arg(&self.device).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => {
                let what = format!("there is no program {name}: install the package mtx");
                Error::with_source(ErrorKind::NotFound, what, e)
            }
            _ => Error::io(format!("starting {name}"), e),
        })?;
        let deadline = Instant::now() + self.limit;
        // It may say much on one of the two while nothing comes on the other. Neither is waited
        // for by a join: whatever it has started may keep them open.
        let (out, complaints) = (listen(child.stdout.take()), listen(child.stderr.take()));
        let status = loop {
            let status =
                child.try_wait().map_err(|e| Error::io(format!("waiting for {name}"), e))?;
            if let Some(status) = status {
                break status;
            }
            if Instant::now() >= deadline {
                // It may be in the kernel, beyond reach.
                let _ = child.kill();
                return Err(self.late(words));
            }
            std::thread::sleep(BETWEEN_LOOKS);
        };
        let heard = |it: &Receiver<io::Result<Vec<u8>>>| {
            let left = deadline.saturating_duration_since(Instant::now());
            it.recv_timeout(left.max(BETWEEN_LOOKS)).map_err(|_| self.late(words))
        };
        let out = heard(&out)?.map_err(|e| Error::io(format!("reading what {name} says"), e))?;
        if out.len() as u64 > OUTPUT_BYTES_MAX {
            return Err(Error::corrupt(format!("{name} says more than {OUTPUT_BYTES_MAX} bytes")));
        }
        if !status.success() {
            let complaints = heard(&complaints)?.unwrap_or_default();
            // Some of its messages are on the one, some on the other.
            let mut lines = complaints.split(|it| *it == b'\n').chain(out.split(|it| *it == b'\n'));
            let said = lines.rfind(|it| !it.trim_ascii().is_empty()).unwrap_or_default();
            let said = said.get(..said.len().min(500)).unwrap_or_default();
            let what = format!("{name} has failed ({status}): {}", Quoted(said.trim_ascii()));
            return Err(Error::new(ErrorKind::Io, what));
        }
        Ok(out)
    }

    fn late(&self, words: &[&str]) -> Error {
        let message = format!(
            "the changer {} has not done '{}' within {} s, and {} is not waited for: look whether \
             the library stands still and where its tapes are, and try again",
            quoted(&self.device),
            words.join(" "),
            self.limit.as_secs(),
            quoted(&self.program)
        );
        Error::new(ErrorKind::Io, message)
    }
}

/// Reads what comes, in a thread of its own.
fn listen(stream: Option<impl Read + Send + 'static>) -> Receiver<io::Result<Vec<u8>>> {
    let (tell, heard) = mpsc::channel();
    std::thread::spawn(move || tell.send(stream.map_or_else(|| Ok(Vec::new()), limited)));
    heard
}

fn limited(stream: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.take(OUTPUT_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads the output of `mtx status`. Lines of other forms are passed over, but what begins like a
/// place has to be one.
pub fn parse(output: &[u8]) -> Result<Inventory> {
    let mut inventory = Inventory::default();
    for line in output.split(|it| *it == b'\n').map(<[u8]>::trim_ascii) {
        let (places, rest) = if let Some(rest) = line.strip_prefix(b"Data Transfer Element ") {
            (&mut inventory.drives, rest)
        } else if let Some(rest) = line.strip_prefix(b"Storage Element ") {
            (&mut inventory.slots, rest)
        } else {
            continue;
        };
        let unclear = || Error::corrupt(format!("mtx says '{}'", Quoted(line)));
        places.push(parse_place(rest).ok_or_else(unclear)?);
        if places.len() > PLACES_MAX {
            return Err(Error::corrupt(format!("mtx tells of more than {PLACES_MAX} places")));
        }
    }
    if inventory.drives.is_empty() {
        return Err(Error::corrupt("mtx tells of no drive"));
    }
    Ok(inventory)
}

/// Reads `1 IMPORT/EXPORT:Full (Storage Element 5 Loaded):VolumeTag = NAME`.
fn parse_place(text: &[u8]) -> Option<Place> {
    let mut parts = text.split(|it| *it == b':').map(<[u8]>::trim_ascii);
    let mut head = std::str::from_utf8(parts.next()?).ok()?.split(' ');
    let number = head.next()?.parse().ok()?;
    let is_mail = head.next() == Some("IMPORT/EXPORT");
    let state = parts.next()?;
    let is_full = state.starts_with(b"Full");
    if !is_full && !state.starts_with(b"Empty") {
        return None;
    }
    let state = std::str::from_utf8(state).ok()?;
    let from = state.split_once("(Storage Element ").and_then(|it| it.1.split(' ').next());
    let tag = parts.find_map(|it| {
        let tag = it.strip_prefix(b"VolumeTag")?.trim_ascii().strip_prefix(b"=")?.trim_ascii();
        Some(tag.to_vec())
    });
    Some(Place {
        number,
        is_mail,
        is_full,
        tape: tag.filter(|it| is_full && !it.is_empty()),
        from: from.and_then(|it| it.parse().ok()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STATUS: &[u8] = b"  Storage Changer /dev/sg2:2 Drives, 5 Slots ( 1 Import/Export )\n\
        Data Transfer Element 0:Full (Storage Element 3 Loaded):VolumeTag = TVM003L8   \n\
        Data Transfer Element 1:Empty\n\
        \x20     Storage Element 1:Full :VolumeTag=TVM001L8                        \n\
        \x20     Storage Element 2:Full \n\
        \x20     Storage Element 3:Empty:VolumeTag=\n\
        \x20     Storage Element 4:Empty\n\
        \x20     Storage Element 5 IMPORT/EXPORT:Full :VolumeTag=W R1LX:AlternateVolumeTag=Z\n";

    #[test]
    fn the_status_of_mtx_is_read() {
        let inventory = parse(STATUS).unwrap();
        let drive = &inventory.drives[0];
        assert_eq!((drive.number, drive.is_full, drive.from), (0, true, Some(3)));
        assert_eq!(drive.tape.as_deref(), Some(&b"TVM003L8"[..]));
        assert!(!inventory.drives[1].is_full);
        let slots: Vec<_> = inventory.slots.iter().map(|it| (it.number, it.is_full)).collect();
        assert_eq!(slots, [(1, true), (2, true), (3, false), (4, false), (5, true)]);
        assert_eq!(inventory.slots[1].tape, None);
        assert!(inventory.slots[4].is_mail);
        assert_eq!(inventory.slot_of(b"W R1LX").unwrap(), 5);
        assert_eq!(inventory.slot_of(b"TVM003L8").unwrap_err().kind(), ErrorKind::Locked);
        assert_eq!(inventory.slot_of(b"TVM009L8").unwrap_err().kind(), ErrorKind::WrongTape);
        assert_eq!(inventory.home_of(drive).unwrap(), 3);
        assert_eq!(inventory.home_of(&inventory.drives[1]).unwrap(), 3);
        assert_eq!(inventory.drive(2).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_mtx_should_not_say_is_refused() {
        let cases: [&[u8]; 5] = [
            b"",
            b"Data Transfer Element x:Empty",
            b"Data Transfer Element 0:Half",
            b"Data Transfer Element 0",
            b"Data Transfer Element 0:Empty\nStorage Element 99999999999:Full",
        ];
        for output in cases {
            assert_eq!(parse(output).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        let many = b"Data Transfer Element 0:Empty\n".repeat(PLACES_MAX + 1);
        assert_eq!(parse(&many).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    proptest! {
        #[test]
        fn any_output_is_read_or_refused(bytes: Vec<u8>, place in "[ 0-9:()=A-Za-z]{0,40}") {
            let _ = parse(&bytes);
            let _ = parse(format!("Data Transfer Element {place}").as_bytes());
        }
    }
}
