//! A tape in a drive, known by its first block.
//!
//! Invariant: nothing is appended to a tape whose first block has not been read since the drive was
//! opened, or since the last error. A drive that was reset, or a person at it, may have put
//! another tape, or another place of it, under the head.

use std::path::{Path, PathBuf};

use super::drive::{Access, BlockSize, Drive, Moved, Read, Why, Wrote};
use super::label::{FirstBlock, LABEL_BYTES, Label, LabelHash};
use super::spool::tape::Tape;
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::quoted;

/// Longest block of a tape that is read, in bytes: what the kernel's driver allows.
pub const BLOCK_BYTES_MAX: usize = 16 << 20;

/// What a tape begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum First {
    /// Nothing was ever written to it.
    Blank,
    /// A filemark: there may be something behind it.
    Filemark,
    /// A block longer than any that is read.
    TooLong,
    /// What cannot be read, and why. There may be something behind it.
    Unreadable(String),
    /// A block, which may be a label.
    Block(FirstBlock),
}

/// Where a tape file begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Number of the file: filemarks before it. The label is file 0.
    pub filenum: u64,
    /// The drive's number of its first block.
    pub position: u64,
}

/// A drive with a tape in it.
pub struct Loaded {
    drive: Box<dyn Drive>,
    name: PathBuf,
    first: First,
}

impl Loaded {
    /// Opens the drive at a path and reads the first block of its tape.
    ///
    /// [`ErrorKind::WrongTape`] if there is no tape in it.
    pub fn open(path: &Path, access: Access) -> Result<Loaded> {
        Loaded::with(super::open(path, access)?, path)
    }

    /// The same for a drive that is open.
    pub fn with(mut drive: Box<dyn Drive>, name: &Path) -> Result<Loaded> {
        let first = read_first(&mut *drive)?;
        Ok(Loaded { drive, name: name.to_path_buf(), first })
    }

    /// What the tape begins with.
    pub fn first(&self) -> &First {
        &self.first
    }

    /// Refuses a tape whose beginning cannot be read.
    pub fn readable(self) -> Result<Loaded> {
        match &self.first {
            First::Unreadable(why) => Err(Error::new(ErrorKind::Io, why.clone())),
            _ => Ok(self),
        }
    }

    /// Its label, if it has one of ours.
    pub fn label(&self) -> Option<&Label> {
        match &self.first {
            First::Block(FirstBlock::Labelled(label, _)) => Some(label),
            _ => None,
        }
    }

    /// The hash by which it is known, with a label or without.
    pub fn hash(&self) -> Option<LabelHash> {
        match &self.first {
            First::Block(FirstBlock::Labelled(_, hash) | FirstBlock::Other(hash)) => Some(*hash),
            _ => None,
        }
    }

    /// What a person would call it.
    pub fn describe(&self) -> String {
        match &self.first {
            First::Blank => "a blank tape".to_owned(),
            First::Filemark => "a tape that begins with a filemark".to_owned(),
            First::TooLong => "a tape that begins with a very long block".to_owned(),
            First::Unreadable(why) => format!("a tape whose beginning cannot be read ({why})"),
            First::Block(FirstBlock::Labelled(label, _)) => {
                format!("tape {}", Quoted(label.text()))
            }
            First::Block(FirstBlock::Other(hash)) => {
                format!("a tape without a label that is known (hash {hash})")
            }
            First::Block(FirstBlock::Short(len)) => {
                format!("a tape without a label: its first file has {len} bytes")
            }
        }
    }

    fn wrong(&self, wanted: impl std::fmt::Display) -> Error {
        let (name, found) = (quoted(&self.name), self.describe());
        let message = format!("drive {name} has {found}, wanted is {wanted}");
        Error::new(ErrorKind::WrongTape, message)
    }

    /// Refuses any tape but the one with this label, by [`ErrorKind::WrongTape`].
    pub fn expect_label(&self, label: &[u8]) -> Result<()> {
        match self.label() {
            Some(found) if found.text() == label => Ok(()),
            _ => Err(self.wrong(format_args!("tape {}", Quoted(label)))),
        }
    }

    /// Refuses any tape but the one whose first block has this hash, by [`ErrorKind::WrongTape`].
    pub fn expect_hash(&self, hash: LabelHash) -> Result<()> {
        match self.hash() {
            Some(found) if found == hash => Ok(()),
            _ => Err(self.wrong(format_args!("the one whose first block has hash {hash}"))),
        }
    }

    /// After any error of the drive: goes back to the beginning and looks whether it is the same
    /// tape, which it must be before anything is written again.
    pub fn again(&mut self) -> Result<()> {
        let found = read_first(&mut *self.drive)?;
        if let First::Unreadable(why) = found {
            let message = format!("it is not known which tape is in the drive: {why}");
            return Err(Error::new(ErrorKind::Io, message));
        }
        if found == self.first {
            return Ok(());
        }
        let was = std::mem::replace(&mut self.first, found);
        let now = self.describe();
        self.first = was;
        let (name, was) = (quoted(&self.name), self.describe());
        let message = format!("drive {name} had {was} and now has {now}: nothing more is written");
        Err(Error::new(ErrorKind::WrongTape, message))
    }

    /// Goes to the end of data, where the next tape file begins.
    ///
    /// A tape file that was never closed, as its writer died, is closed: it stays one that nobody
    /// knows. [`ErrorKind::WrongTape`] for a tape that ends before what its log in the spool has:
    /// then somebody has overwritten it, and its log would tell lies.
    pub fn to_end(&mut self, tape: &Tape) -> Result<Start> {
        self.drive.to_end_of_data()?;
        let mut position = self.drive.position()?;
        if position > 0 && self.is_open_before(position)? {
            log::warn!("{}: its last tape file was not closed, and is now", self.describe());
            self.drive.to_end_of_data()?;
            self.mark()?;
            position = self.drive.position()?;
        }
        let filenum = match self.drive.state()?.file {
            Some(filenum) => filenum,
            None => self.count_files()?,
        };
        let mut known = Ok(());
        tape.files(&mut |it| {
            if it.position >= position {
                known = Err(it);
            }
            Ok(())
        })?;
        if let Err(it) = known {
            let message = format!(
                "{} in drive {} ends at position {position}, but its log has file {} at position \
                 {}: it was overwritten; its log is {}",
                self.describe(),
                quoted(&self.name),
                it.filenum,
                it.position,
                quoted(&tape.dir().join("log"))
            );
            return Err(Error::new(ErrorKind::WrongTape, message));
        }
        Ok(Start { filenum, position })
    }

    /// Whether what stands before the end of data is no filemark. Leaves the drive at the end.
    fn is_open_before(&mut self, end: u64) -> Result<bool> {
        if self.drive.locate(end - 1)? != Moved::There {
            return Err(Error::corrupt(format!(
                "drive {} does not find the end of data that it has just been at",
                quoted(&self.name)
            )));
        }
        // Whatever it is: a block that is longer than this is none the less no filemark.
        let read = self.drive.read(&mut [0; 1])?;
        self.drive.to_end_of_data()?;
        Ok(read != Read::Filemark)
    }

    fn count_files(&mut self) -> Result<u64> {
        self.drive.rewind()?;
        let mut count = 0;
        while self.drive.space_files(1)? == Moved::There {
            count += 1;
        }
        self.drive.to_end_of_data()?;
        Ok(count)
    }

    fn mark(&mut self) -> Result<()> {
        match self.drive.write_filemarks(1)? {
            Wrote::Whole => Ok(()),
            Wrote::NotWritten(why) => Err(self.refused(why)),
        }
    }

    /// What to say of a tape that takes nothing.
    pub fn refused(&self, why: Why) -> Error {
        let why = match why {
            Why::EarlyWarning | Why::Physical => "has no room left",
            Why::Protected => "is write-protected",
            Why::Worm => "can only be appended to",
        };
        let message = format!("{} in drive {} {why}", self.describe(), quoted(&self.name));
        Error::new(ErrorKind::WrongTape, message)
    }

    /// Writes a label over whatever the tape has, and reads it again. Whether that may be is for
    /// the caller to know.
    pub fn write_label(&mut self, label: &Label) -> Result<()> {
        self.drive.set_block_size(BlockSize::Variable)?;
        self.drive.rewind()?;
        match self.drive.write(&label.to_block())? {
            Wrote::Whole => {}
            Wrote::NotWritten(why) => return Err(self.refused(why)),
        }
        self.mark()?;
        self.first = read_first(&mut *self.drive)?;
        match self.label() {
            Some(found) if found == label => Ok(()),
            _ => Err(Error::corrupt(format!(
                "the label that was written to drive {} does not come back: it has {}",
                quoted(&self.name),
                self.describe()
            ))),
        }
    }

    /// The drive, to be moved and read. Where it stands is behind the first block at the start.
    pub fn drive(&mut self) -> &mut dyn Drive {
        &mut *self.drive
    }

    /// What the drive was opened as.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// The drive alone.
    pub fn into_drive(self) -> Box<dyn Drive> {
        self.drive
    }

    /// Closes the drive: an error here means that what was written last may not be safe.
    pub fn close(self) -> Result<()> {
        self.drive.close()
    }
}

fn read_first(drive: &mut dyn Drive) -> Result<First> {
    drive.set_block_size(BlockSize::Variable)?;
    // Longer than any label, so that hardly a tape is read twice.
    for room in [256 << 10, BLOCK_BYTES_MAX] {
        drive.rewind()?;
        if let Some(first) = read_first_within(drive, room)? {
            return Ok(first);
        }
    }
    Ok(First::TooLong)
}

/// What the first file begins with, of which shorter blocks than a label are put together. `None`
/// if it does not fit into so many bytes.
fn read_first_within(drive: &mut dyn Drive, room: usize) -> Result<Option<First>> {
    let mut buffer = vec![0; room];
    let mut len = 0;
    while len < LABEL_BYTES {
        match drive.read(buffer.get_mut(len..).unwrap_or_default()) {
            Ok(Read::Block(more)) => len += more,
            Ok(Read::TooLong) => return Ok(None),
            Ok(Read::EndOfData) if len == 0 => return Ok(Some(First::Blank)),
            Ok(Read::Filemark) if len == 0 => return Ok(Some(First::Filemark)),
            Ok(Read::EndOfData | Read::Filemark) => break,
            // Behind a bad block there may be good ones, as long as the drive knows its place.
            Err(e) if e.kind() == ErrorKind::Io && !e.is_shortage() && !drive.state()?.lost => {
                return Ok(Some(First::Unreadable(e.to_string())));
            }
            Err(e) => return Err(e),
        }
    }
    Ok(Some(First::Block(FirstBlock::of(buffer.get(..len).unwrap_or_default()))))
}
