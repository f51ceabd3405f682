//! Tapes that somebody has at hand: images, directories of images, drives, and what a drive's
//! changer holds. With their labels, where these can be read without loading anything.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::catalog::tapes::{KnownTape, Tapes};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::{self, c, quoted};
use crate::tape::drive::{Access, Moved, Read};
use crate::tape::image::LOADED;
use crate::tape::label::LabelHash;
use crate::tape::load;
use crate::tape::loaded::Loaded;
use crate::tape::spool::Spool;
use crate::tape::spool::drive::TakenDrive;

/// Most images that are taken of one directory.
const IMAGES_MAX: usize = 1 << 16;

/// Asks a person for a tape: the one with this label, or any further one. `false`: there is none.
pub type Ask<'a> = dyn FnMut(Option<&[u8]>, &Path) -> Result<bool> + Send + 'a;

/// Images of tapes, and drives whose tapes a person changes.
#[derive(Debug, Default)]
pub struct Shelf {
    /// Images, and directories of them.
    places: Vec<PathBuf>,
    drives: Vec<PathBuf>,
    /// The labels of images that were opened once, `None` for one that has none.
    labels: BTreeMap<PathBuf, Option<Vec<u8>>>,
    /// The catalog whose tapes are wanted: what is known of them tells two of one label apart.
    catalog: Option<PathBuf>,
}

/// A tape that is looked for.
struct Wanted<'a> {
    label: &'a [u8],
    known: Option<KnownTape>,
    /// Where its last tape file begins that is known.
    last: Option<u64>,
}

/// How well an image fits that has the wanted label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    /// It is another tape.
    Other,
    /// It ends before what is known to be on the tape, like a copy of before.
    Short,
    /// It is what was wanted.
    Whole,
}

impl Wanted<'_> {
    fn fit(&self, loaded: &mut Loaded) -> Fit {
        if expect_known(loaded, self.known.as_ref()).is_err() {
            return Fit::Other;
        }
        let Some(last) = self.last else { return Fit::Whole };
        let drive = loaded.drive();
        let is_there = match drive.locate(last) {
            Ok(Moved::There) => {
                // A block that is too long or cannot be read is one none the less.
                !matches!(drive.read(&mut [0; 1]), Ok(Read::EndOfData | Read::Filemark))
            }
            _ => false,
        };
        if is_there { Fit::Whole } else { Fit::Short }
    }
}

impl Shelf {
    /// What is at these paths: images of tapes, directories of images, devices.
    pub fn of(paths: &[PathBuf]) -> Result<Shelf> {
        let mut shelf = Shelf::default();
        for path in paths {
            let stat = sys::stat(path).map_err(|e| failed(path, e))?;
            let is_image = match stat.mode & c::S_IFMT {
                c::S_IFREG => true,
                c::S_IFDIR if sys::lstat(&path.join(LOADED)).is_err() => {
                    if images_in(path)?.is_empty() {
                        let what = format!("{} has no image (NAME.tap)", quoted(path));
                        return Err(Error::new(ErrorKind::NotFound, what));
                    }
                    true
                }
                _ => false,
            };
            if is_image { &mut shelf.places } else { &mut shelf.drives }.push(path.clone());
        }
        Ok(shelf)
    }

    /// Prefers, of two images of one label, the tape that the catalog at `catalog` knows.
    pub fn for_catalog(self, catalog: &Path) -> Shelf {
        Shelf { catalog: Some(catalog.to_path_buf()), ..self }
    }

    fn wanted<'a>(&self, label: &'a [u8]) -> Result<Wanted<'a>> {
        let tapes = self.catalog.as_deref().map_or(Ok(None), Tapes::look)?;
        let Some(tapes) = tapes else { return Ok(Wanted { label, known: None, last: None }) };
        let last = tapes.files(label)?.pop().map(|it| it.position);
        Ok(Wanted { label, known: tapes.tape(label)?, last })
    }

    /// A drive, and no images.
    fn of_drive(device: PathBuf) -> Shelf {
        Shelf { drives: vec![device], ..Shelf::default() }
    }

    /// The images that are there now, in order.
    fn images(&self) -> Result<Vec<PathBuf>> {
        let mut images = Vec::new();
        for place in &self.places {
            match sys::stat(place).map_err(|e| failed(place, e))?.mode & c::S_IFMT {
                c::S_IFDIR => images.extend(images_in(place)?),
                _ => images.push(place.clone()),
            }
        }
        images.sort();
        Ok(images)
    }

    /// The tape with this label; `None` if it is not there. A person is asked to put it into the
    /// first drive, when none has it.
    pub fn get(&mut self, label: &[u8], ask: &mut Ask<'_>) -> Result<Option<Loaded>> {
        match self.wanted(label).and_then(|it| self.image(&it)) {
            Ok(None) => {}
            Err(e) if !self.drives.is_empty() && !e.is_shortage() => {
                log::warn!("tape {} is looked for in drives: {e}", Quoted(label));
            }
            found => return found,
        }
        loop {
            let mut first = None;
            for (number, device) in self.drives.iter().enumerate() {
                match Loaded::open(device, Access::Read) {
                    Ok(it) if it.label().is_some_and(|it| it.text() == label) => {
                        return Ok(Some(it));
                    }
                    Ok(it) => {
                        log::info!("{} is in {}", it.describe(), quoted(device));
                        match number {
                            0 => first = Some(it),
                            _ => it.close()?,
                        }
                    }
                    Err(e) if e.kind() == ErrorKind::WrongTape => {}
                    Err(e) if number == 0 || e.is_shortage() => return Err(e),
                    Err(e) => log::warn!("{}: {e}", quoted(device)),
                }
            }
            if let Some(mut it) = first {
                it.drive().unload()?;
                it.close()?;
            }
            let Some(device) = self.drives.first() else { return Ok(None) };
            if !ask(Some(label), device)? {
                return Ok(None);
            }
        }
    }

    /// The image that is wanted, or else one with its label that fits best, so that it can be said
    /// what is wrong with that.
    fn image(&mut self, wanted: &Wanted<'_>) -> Result<Option<Loaded>> {
        let is_it = |it: &Option<Vec<u8>>| it.as_deref() == Some(wanted.label);
        let mut images = self.images()?;
        // Those that had the label come first, then those that are not known; of the others one may
        // have another label by now.
        images.sort_by_key(|it| match self.labels.get(it) {
            Some(known) if is_it(known) => 0,
            None => 1,
            Some(_) => 2,
        });
        let (mut best, mut failed): (Option<(Fit, Loaded)>, _) = (None, None);
        for path in images {
            let mut loaded = match Loaded::open(&path, Access::Read).and_then(Loaded::readable) {
                Ok(loaded) => loaded,
                Err(e) if e.is_shortage() => return Err(e),
                Err(e) => {
                    // It may be in another one.
                    failed.get_or_insert(e);
                    self.labels.remove(&path);
                    continue;
                }
            };
            let found = loaded.label().map(|it| it.text().to_vec());
            let has_label = is_it(&found);
            self.labels.insert(path, found);
            if !has_label {
                continue;
            }
            let fit = wanted.fit(&mut loaded);
            if fit == Fit::Whole {
                return Ok(Some(loaded));
            }
            log::info!("{} is no whole tape of that label: {fit:?}", quoted(loaded.name()));
            if best.as_ref().is_none_or(|it| it.0 < fit) {
                best = Some((fit, loaded));
            }
        }
        match best {
            Some((_, loaded)) => Ok(Some(loaded)),
            None => failed.map_or(Ok(None), Err),
        }
    }

    /// Gives all tapes, one after another.
    pub fn into_all(self) -> Result<All> {
        let images = self.images()?.into();
        Ok(All { images, drives: self.drives.into(), is_first: true })
    }
}

/// Refuses a tape that has the label of one that is known, and is another one.
pub fn expect_known(loaded: &Loaded, known: Option<&KnownTape>) -> Result<()> {
    let (Some(label), Some(hash), Some(known)) = (loaded.label(), loaded.hash(), known) else {
        return Ok(());
    };
    // The spool may have a label that says the same in other words.
    let same = [Some(hash), LabelHash::of(&label.to_block())];
    if same.into_iter().flatten().any(|it| it.bytes() == known.tape.hash) {
        return Ok(());
    }
    let shown = Quoted(label.text());
    let message = format!(
        "{} has another tape than the one that is known by the label {shown}: look for that one; \
         if it was labelled anew, what was on it is gone: raidtape tape forget {shown}",
        quoted(loaded.name())
    );
    Err(Error::new(ErrorKind::WrongTape, message))
}

fn failed(path: &Path, error: std::io::Error) -> Error {
    Error::io(format!("tapes at {}", quoted(path)), error)
}

fn images_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut images = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| failed(dir, e))? {
        let image = entry.map_err(|e| failed(dir, e))?.path();
        if image.as_os_str().as_bytes().ends_with(b".tap") {
            images.push(image);
        }
        if images.len() > IMAGES_MAX {
            return Err(Error::usage(format!("{} has too many images", quoted(dir))));
        }
    }
    Ok(images)
}

/// All tapes of a shelf.
pub struct All {
    images: VecDeque<PathBuf>,
    drives: VecDeque<PathBuf>,
    is_first: bool,
}

impl All {
    /// The next tape. Of a drive first the one that is in it, then those that a person puts in.
    pub fn next_tape(&mut self, ask: &mut Ask<'_>) -> Result<Option<Loaded>> {
        if let Some(path) = self.images.pop_front() {
            return Loaded::open(&path, Access::Read).map(Some);
        }
        while let Some(device) = self.drives.front().cloned() {
            if std::mem::take(&mut self.is_first) {
                match Loaded::open(&device, Access::Read) {
                    Err(e) if e.kind() == ErrorKind::WrongTape => {}
                    loaded => return loaded.map(Some),
                }
            } else if let Ok(mut last) = Loaded::open(&device, Access::Read) {
                last.drive().unload()?;
                last.close()?;
            }
            if ask(None, &device)? {
                return Loaded::open(&device, Access::Read).map(Some);
            }
            self.drives.pop_front();
            self.is_first = true;
        }
        Ok(None)
    }
}

/// Cleaning cartridges have barcodes that begin so.
const CLEANING: &[u8] = b"CLN";

/// All tapes that the changer of a drive holds, or if it has none those that a person puts in.
pub struct Magazine<'a> {
    spool: &'a Spool,
    taken: &'a TakenDrive,
    names: Option<VecDeque<Vec<u8>>>,
    by_hand: All,
}

impl<'a> Magazine<'a> {
    /// The tapes of a taken drive of the spool.
    pub fn of(spool: &'a Spool, taken: &'a TakenDrive) -> Result<Magazine<'a>> {
        let mut names = load::tapes_of_changer(spool, taken)?;
        if let Some(names) = &mut names {
            names.retain(|it| !it.starts_with(CLEANING));
            names.sort();
        }
        let by_hand = Shelf::of_drive(taken.device()?).into_all()?;
        Ok(Magazine { spool, taken, names: names.map(Into::into), by_hand })
    }

    /// The next tape. Behind an error, which is one of a tape, there may be others.
    pub fn next_tape(&mut self, ask: &mut Ask<'_>) -> Result<Option<Loaded>> {
        let Some(names) = &mut self.names else { return self.by_hand.next_tape(ask) };
        let Some(name) = names.pop_front() else { return Ok(None) };
        let loaded = load::load(self.spool, self.taken, &name, None, Access::Read);
        loaded.map(Some).map_err(|e| e.context(format!("tape {}", Quoted(&name))))
    }
}

/// The tape with this label in a drive of the spool: brought by its changer, or by a person, if
/// one is there to be asked.
pub fn in_drive(
    spool: &Spool,
    taken: &TakenDrive,
    label: &[u8],
    ask: Option<&mut Ask<'_>>,
) -> Result<Option<Loaded>> {
    let device = taken.device()?;
    let mut failed = None;
    let loaded = match ask {
        None => load::load(spool, taken, label, None, Access::Read),
        Some(ask) => {
            let mut ask_for = |tape: &[u8]| match ask(Some(tape), &device) {
                Ok(answer) => answer,
                Err(e) => {
                    failed = Some(e);
                    false
                }
            };
            load::load(spool, taken, label, Some(&mut ask_for), Access::Read)
        }
    };
    if let Some(e) = failed {
        return Err(e);
    }
    match loaded {
        Err(e) if e.kind() == ErrorKind::WrongTape => {
            log::warn!("tape {}: {e}", Quoted(label));
            Ok(None)
        }
        loaded => loaded.map(Some),
    }
}
