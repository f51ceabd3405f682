//! What a tape drive does, whatever it is: a kernel's device or a file.
//!
//! Invariant: an end, a filemark, a block that is too long, a tape that may not be written are
//! values. An error means that the drive or the tape is not as it should be, and nothing of the
//! kind is passed over in silence.
//!
//! A position is the number of blocks and filemarks before it. Each drive counts along, and after
//! any error compares its own count with what the device says. If they differ, or the device cannot
//! be asked, the place is lost: nothing is read or written until [`Drive::rewind`],
//! [`Drive::locate`] or [`Drive::to_end_of_data`] has found one again. A drive that was reset is at
//! the beginning of the tape without a word, and the next write would take everything from it.
//! After an error whoever writes should also read the label again: it may be another tape.
//!
//! What is written is safe after a filemark, and only then. Blocks that have none behind them get
//! one before the drive moves and when it is closed, as the kernel's driver does it.

use crate::error::Result;

/// What a drive is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To be read.
    Read,
    /// To be read and written. A tape that may not be written opens all the same: see
    /// [`State::write_protected`].
    Write,
}

/// How long blocks are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BlockSize {
    /// Each as long as it is.
    #[default]
    Variable,
    /// All of this many bytes.
    Fixed(u32),
}

/// What was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// A block, of this many bytes.
    Block(usize),
    /// A block that is longer than the buffer. The drive stands behind it.
    TooLong,
    /// A filemark. The drive stands behind it.
    Filemark,
    /// Nothing was written from here on. A blank tape answers so at its beginning.
    EndOfData,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrote {
    /// All of it is written.
    Whole,
    /// Nothing of it is.
    NotWritten(Why),
}

/// Why nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// The end is near. This is said once until the drive is moved, and what is tried after it is
    /// written as long as there is room: that is for what closes an archive.
    EarlyWarning,
    /// There is no room left. Usually told after a warning, but not always.
    Physical,
    /// The tape is write-protected.
    Protected,
    /// The tape can only be appended to, and the drive does not stand at its end of data.
    Worm,
}

/// Where a motion has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// Where it should.
    There,
    /// At the end of data, which comes before.
    EndOfData,
    /// At the beginning of the tape, which comes before.
    Beginning,
}

/// What can be said of a drive without moving it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// There is a tape in it.
    pub online: bool,
    /// The tape may not be written.
    pub write_protected: bool,
    /// Whether the tape can only be appended to, where the drive tells.
    pub worm: Option<bool>,
    /// It stands at the beginning of the tape.
    pub at_beginning: bool,
    /// It is known to stand at the end of data.
    pub at_end_of_data: bool,
    /// It has lost its place: see the room's rule.
    pub lost: bool,
    /// How long blocks are.
    pub block_size: BlockSize,
    /// Filemarks before the place where it stands, where the drive knows.
    pub file: Option<u64>,
}

/// A tape drive.
pub trait Drive: Send {
    /// Looks at the drive.
    fn state(&mut self) -> Result<State>;

    /// Says how long blocks are. It is variable after opening.
    fn set_block_size(&mut self, size: BlockSize) -> Result<()>;

    /// Reads the next block into the start of `buffer`. After an error that is not a lost place,
    /// the drive stands before or behind the block, as [`Drive::position`] tells.
    fn read(&mut self, buffer: &mut [u8]) -> Result<Read>;

    /// Writes one block. Everything behind it is gone.
    fn write(&mut self, block: &[u8]) -> Result<Wrote>;

    /// Writes filemarks and makes everything before them last; without any, only that.
    fn write_filemarks(&mut self, count: u32) -> Result<Wrote>;

    /// Blocks and filemarks before the place where the drive stands.
    fn position(&mut self) -> Result<u64>;

    /// Goes to a position: there, or to the end of data if that comes first.
    fn locate(&mut self, position: u64) -> Result<Moved>;

    /// Goes to the beginning of the tape.
    fn rewind(&mut self) -> Result<()>;

    /// Goes to where the next block would be appended.
    fn to_end_of_data(&mut self) -> Result<()>;

    /// Goes to the beginning of the tape file that is `count` after this one, or before it if that
    /// is negative; 0 is this one's. A tape file begins behind a filemark: for the first of the
    /// tape there is none, and the answer is [`Moved::Beginning`].
    fn space_files(&mut self, count: i64) -> Result<Moved>;

    /// Rewinds the tape and gives it out.
    fn unload(&mut self) -> Result<()>;

    /// Closes the drive. Only dropped, it is closed too, but nobody hears whether what was written
    /// last is safe. Where it stands when it is opened again differs: go somewhere first.
    fn close(self: Box<Self>) -> Result<()>;
}
