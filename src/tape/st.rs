//! A real drive: a device of the kernel's `st` driver, as in `/dev/nst0`.
//!
//! Invariant: the device is never written where this has not counted it to be. What `st` says with
//! one error number for many things is told apart by asking where the drive stands:
//!
//! - A write after the early warning fails every other time, and has then written nothing. It is
//!   told once; later ones are tried twice, and what fails twice has met the end.
//! - A read at the end of data is an error like a bad block, unless a filemark is before it. At the
//!   end of data, going there moves nothing.
//! - A drive that was reset is at the beginning. On Linux 6.1 nothing but one error tells so, and
//!   even closing or rewinding then writes a filemark there, because `st` believes that it is still
//!   writing. Any operation that is not a motion makes it forget that.
//!
//! Positions are those of the drive, which count filemarks; the file and block numbers of `st` are
//! lost at the first error.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use super::drive::{Access, BlockSize, Drive, Moved, Read, State, Why, Wrote};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::tape::{self, Op};
use crate::sys::{c, quoted};

/// What begins at a multiple of this goes to the drive without being copied by the kernel, and so
/// its error comes with it and not with the next one.
const PAGE: usize = 4096;
/// What every drive and adapter moves at once.
const TRANSFER_MIN: usize = 64 << 10;
/// Most filemarks at once.
const FILEMARKS_MAX: u32 = 1000;

/// An open device.
pub struct St {
    path: PathBuf,
    /// `None` without a tape.
    file: Option<File>,
    access: Access,
    is_protected: bool,
    is_worm: Option<bool>,
    block_size: BlockSize,
    /// Where the drive should stand. `None` when that is lost.
    expected: Option<u64>,
    is_at_end: bool,
    /// Blocks were written and no filemark after them.
    is_unmarked: bool,
    /// The end was said to be near.
    is_warned: bool,
    /// Bytes that the drive and its adapter move at once, as far as was found out.
    transfer_max: usize,
    /// Blocks that do not begin at a page.
    aligned: Vec<u8>,
}

impl St {
    /// Opens a device. It stays where it stands. Without a tape in it this does not wait.
    pub fn open(path: &Path, access: Access) -> Result<St> {
        let mut drive = St {
            path: path.to_path_buf(),
            file: None,
            access,
            is_protected: false,
            is_worm: None,
            block_size: BlockSize::Variable,
            expected: None,
            is_at_end: false,
            is_unmarked: false,
            is_warned: false,
            transfer_max: usize::MAX,
            aligned: Vec::new(),
        };
        // Opening an empty drive takes two minutes otherwise.
        let look = tape::open(path, false, true).map_err(|e| drive.opening(e))?;
        let status = tape::status(&look).map_err(|e| drive.opening(e))?;
        drop(look);
        if !status.is_online {
            return Ok(drive);
        }
        let file = match tape::open(path, access == Access::Write, false) {
            Err(e) if e.raw_os_error() == Some(c::EROFS) => {
                drive.is_protected = true;
                tape::open(path, false, false)
            }
            opened => opened,
        };
        let file = match file {
            Err(e) if e.raw_os_error() == Some(c::ENOMEDIUM) => return Ok(drive),
            opened => opened.map_err(|e| drive.opening(e))?,
        };
        // What is opened to be read tells it here.
        drive.is_protected |= tape::status(&file).map_err(|e| drive.opening(e))?.is_protected;
        drive.is_worm = tape::is_worm(&file);
        drive.file = Some(file);
        if let Err(e) = drive.apply_block_size() {
            // Linux from 6.12 on takes nothing but this from a drive that was reset.
            if e.kind() != ErrorKind::Io || drive.operate(Op::Rewind, 1).is_err() {
                return Err(e);
            }
            drive.apply_block_size()?;
        }
        drive.expected = drive.asked();
        Ok(drive)
    }

    fn opening(&self, error: io::Error) -> Error {
        let path = quoted(&self.path);
        match error.raw_os_error() {
            Some(c::EBUSY) => {
                let what = format!("the drive {path} is in use by another process");
                Error::new(ErrorKind::Locked, what)
            }
            _ => Error::io(format!("opening the drive {path}"), error),
        }
    }

    fn failed(&self, what: impl std::fmt::Display, error: io::Error) -> Error {
        if error.raw_os_error() == Some(c::ENOMEDIUM) {
            return self.no_tape();
        }
        let mut what = format!("drive {}: {what}", quoted(&self.path));
        if error.raw_os_error() == Some(c::EIO) {
            what += ": the tape, the drive or its cable is bad; the kernel's log says which";
        }
        Error::io(what, error)
    }

    fn no_tape(&self) -> Error {
        let what = format!("there is no tape in the drive {}: load one", quoted(&self.path));
        Error::new(ErrorKind::WrongTape, what)
    }

    fn file(&self) -> Result<&File> {
        self.file.as_ref().ok_or_else(|| self.no_tape())
    }

    /// Where the drive says it stands.
    fn asked(&self) -> Option<u64> {
        tape::position(self.file.as_ref()?).ok()
    }

    /// The place where the drive should stand, if that is known.
    fn known(&self) -> Result<u64> {
        self.file()?;
        self.expected.ok_or_else(|| {
            let why = "it was reset, or another tape is in it: rewind it, and read the label";
            let what = format!("the drive {} has lost its place: {why}", quoted(&self.path));
            Error::new(ErrorKind::Io, what)
        })
    }

    /// Nothing is known of where the drive stands any more.
    fn lose(&mut self) {
        self.expected = None;
        self.is_at_end = false;
        self.disarm();
    }

    /// Has `st` forget that it was writing, so that it puts no filemark of its own anywhere.
    fn disarm(&self) {
        // It is for what this does in passing. The door is not locked; what it says is no matter.
        let _ = self.operate(Op::Unlock, 0);
    }

    /// After an error: the drive still stands where it should, or its place is lost.
    fn verify(&mut self, at: u64) -> Result<()> {
        if self.asked() == Some(at) {
            return Ok(());
        }
        self.lose();
        self.known().map(|_| ())
    }

    fn operate(&self, op: Op, count: i32) -> io::Result<()> {
        let file = self.file.as_ref().ok_or_else(|| io::Error::from_raw_os_error(c::ENOMEDIUM))?;
        tape::operate(file, op, count)
    }

    fn apply_block_size(&self) -> Result<()> {
        let bytes = match self.block_size {
            BlockSize::Variable => 0,
            BlockSize::Fixed(bytes) => bytes,
        };
        let count = i32::try_from(bytes).unwrap_or(i32::MAX);
        self.operate(Op::SetBlockSize, count).map_err(|e| match e.raw_os_error() {
            Some(c::EINVAL) => Error::usage(format!(
                "the drive {} takes no blocks of {bytes} bytes",
                quoted(&self.path)
            )),
            _ => self.failed("setting the size of blocks", e),
        })
    }

    /// Before each motion: what was written gets its filemark, and blocks their size.
    fn begin_motion(&mut self) -> Result<()> {
        self.file()?;
        // The place that is lost has to be left by a way that does not depend on it.
        let finished = if self.expected.is_some() { self.finish() } else { self.rewind_only() };
        self.is_unmarked = false;
        self.is_warned = false;
        self.is_at_end = false;
        if finished.is_err() {
            self.lose();
        }
        finished?;
        self.apply_block_size()
    }

    fn rewind_only(&mut self) -> Result<()> {
        self.operate(Op::Rewind, 1).map_err(|e| self.failed("rewinding", e))?;
        self.expected = Some(0);
        Ok(())
    }

    /// After a motion: the drive is where it says.
    fn arrive(&mut self) -> Result<u64> {
        self.expected = self.asked();
        self.known()
    }

    /// Whether this is the end of data: going there moves nothing. If it does, the drive is brought
    /// back.
    fn is_end_of_data(&mut self, at: u64) -> Result<bool> {
        let gone = self.operate(Op::EndOfData, 1);
        if gone.is_ok() && self.asked() == Some(at) {
            self.is_at_end = true;
            return Ok(true);
        }
        let place = i32::try_from(at).unwrap_or(i32::MAX);
        let _ = self.operate(Op::Seek, place);
        self.verify(at)?;
        Ok(false)
    }

    /// Closes what was written with a filemark.
    fn finish(&mut self) -> Result<()> {
        if !self.is_unmarked {
            return Ok(());
        }
        match self.write_filemarks(1)? {
            Wrote::Whole => Ok(()),
            Wrote::NotWritten(_) => {
                let what = "there is no room for the filemark behind the last block";
                let what = format!("drive {}: {what}", quoted(&self.path));
                Err(Error::new(ErrorKind::NoSpace, what))
            }
        }
    }

    /// Why nothing can be written here, if so.
    fn refusal(&self) -> Result<Option<Why>> {
        self.file()?;
        if self.is_protected {
            return Ok(Some(Why::Protected));
        }
        if self.access == Access::Read {
            let what = format!("the drive {} was opened to be read", quoted(&self.path));
            return Err(Error::usage(what));
        }
        Ok(None)
    }

    /// What a failed write or filemark means; the drive stands at `at` if all is well.
    fn refused(&mut self, what: &str, at: u64, error: io::Error) -> Result<Wrote> {
        // The filemark behind what is on the tape is for `finish`.
        self.disarm();
        match error.raw_os_error() {
            Some(c::EROFS | c::EACCES) => {
                self.verify(at)?;
                self.is_protected = true;
                return Ok(Wrote::NotWritten(Why::Protected));
            }
            // It may only be appended to, and the drive is not at the end.
            Some(c::EIO) if self.is_worm == Some(true) => {
                self.verify(at)?;
                if !self.is_end_of_data(at)? {
                    return Ok(Wrote::NotWritten(Why::Worm));
                }
            }
            _ => {}
        }
        let error = self.failed(format!("{what} at position {at}"), error);
        // Says that the place is lost as well, if it is.
        match self.verify(at) {
            Ok(()) => Err(error),
            Err(lost) => Err(lost.context(error)),
        }
    }

    /// Writes one block, from memory that begins at a page.
    fn put(&mut self, block: &[u8]) -> io::Result<usize> {
        let Some(file) = &mut self.file else {
            return Err(io::Error::from_raw_os_error(c::ENOMEDIUM));
        };
        if block.as_ptr().align_offset(PAGE) == 0 {
            return file.write(block);
        }
        if self.aligned.len() < block.len() + PAGE {
            self.aligned = vec![0; block.len() + PAGE];
        }
        let start = self.aligned.as_ptr().align_offset(PAGE);
        let place = self.aligned.get_mut(start..).and_then(|it| it.get_mut(..block.len()));
        let Some(place) = place else { return file.write(block) };
        place.copy_from_slice(block);
        file.write(place)
    }
}

impl Drive for St {
    fn state(&mut self) -> Result<State> {
        let block_size = self.block_size;
        let Some(file) = &self.file else { return Ok(State { block_size, ..State::default() }) };
        let status = tape::status(file).map_err(|e| self.failed("asking how it is", e))?;
        Ok(State {
            online: status.is_online,
            write_protected: self.is_protected,
            worm: self.is_worm,
            at_beginning: self.expected == Some(0),
            at_end_of_data: self.is_at_end,
            lost: self.expected.is_none(),
            block_size,
            file: status.file.filter(|_| self.expected.is_some()),
        })
    }

    fn set_block_size(&mut self, size: BlockSize) -> Result<()> {
        if size == BlockSize::Fixed(0) {
            return Err(Error::usage("blocks cannot have 0 bytes"));
        }
        self.file()?;
        let before = std::mem::replace(&mut self.block_size, size);
        let applied = match self.expected {
            // It is for the next motion, before which nothing is read or written.
            None => return Ok(()),
            Some(_) => self.apply_block_size(),
        };
        match applied {
            Err(e) if e.kind() == ErrorKind::Io && self.asked().is_none() => {
                self.lose();
                Ok(())
            }
            applied => applied.inspect_err(|_| self.block_size = before),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<Read> {
        let at = self.known()?;
        if self.is_at_end {
            return Ok(Read::EndOfData);
        }
        let len = match self.block_size {
            BlockSize::Variable => buffer.len().min(self.transfer_max),
            BlockSize::Fixed(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX),
        };
        let buffer = buffer.get_mut(..len).filter(|it| !it.is_empty());
        let buffer = buffer.ok_or_else(|| Error::usage("the buffer is too small for any block"))?;
        let Some(file) = &mut self.file else { return Err(self.no_tape()) };
        match file.read(buffer) {
            Ok(0) => {
                let status = tape::status(file).map_err(|e| self.failed("asking how it is", e))?;
                if status.is_at_end_of_data {
                    self.is_at_end = true;
                    return Ok(Read::EndOfData);
                }
                self.expected = Some(at + 1);
                Ok(Read::Filemark)
            }
            Ok(len) => {
                self.expected = Some(at + 1);
                Ok(Read::Block(len))
            }
            Err(e) if e.raw_os_error() == Some(c::ENOMEM) => {
                self.verify(at + 1)?;
                self.expected = Some(at + 1);
                Ok(Read::TooLong)
            }
            // A buffer that is longer than what can be moved at once. No block on this tape is.
            Err(e)
                if matches!(e.raw_os_error(), Some(c::EBUSY | c::EINVAL | c::EOVERFLOW))
                    && self.block_size == BlockSize::Variable
                    && len > TRANSFER_MIN =>
            {
                self.verify(at)?;
                self.transfer_max = (len / 2).max(TRANSFER_MIN);
                self.read(buffer)
            }
            Err(e) => {
                let error = self.failed(format!("reading at position {at}"), e);
                match self.asked() {
                    Some(it) if it == at => match self.is_end_of_data(at) {
                        Ok(true) => Ok(Read::EndOfData),
                        Ok(false) => Err(error),
                        Err(lost) => Err(lost.context(error)),
                    },
                    // It stands behind the bad block.
                    Some(it) if it == at + 1 => {
                        self.expected = Some(it);
                        Err(error)
                    }
                    _ => {
                        self.lose();
                        Err(self.known().err().map_or_else(|| error, |it| it.context("reading")))
                    }
                }
            }
        }
    }

    fn write(&mut self, block: &[u8]) -> Result<Wrote> {
        let at = self.known()?;
        if block.is_empty() {
            return Err(Error::usage("a block of 0 bytes"));
        }
        if matches!(self.block_size, BlockSize::Fixed(it) if it as usize != block.len()) {
            let len = block.len();
            return Err(Error::usage(format!("a block of {len} bytes: another size is set")));
        }
        if let Some(why) = self.refusal()? {
            return Ok(Wrote::NotWritten(why));
        }
        let mut is_tried = false;
        loop {
            match self.put(block) {
                Ok(len) if len == block.len() => {
                    self.expected = Some(at + 1);
                    self.is_unmarked = true;
                    self.is_at_end = true;
                    return Ok(Wrote::Whole);
                }
                Ok(len) => {
                    self.lose();
                    let what =
                        format!("only {len} bytes of the block at position {at} are written");
                    return self.known().map_err(|it| it.context(what)).map(|_| Wrote::Whole);
                }
                Err(e) if e.raw_os_error() == Some(c::ENOSPC) => {
                    self.disarm();
                    self.verify(at)?;
                    if !self.is_warned {
                        self.is_warned = true;
                        return Ok(Wrote::NotWritten(Why::EarlyWarning));
                    }
                    if is_tried {
                        return Ok(Wrote::NotWritten(Why::Physical));
                    }
                    is_tried = true;
                }
                // Longer than the drive or the adapter takes; nothing has been done.
                Err(e) if matches!(e.raw_os_error(), Some(c::EINVAL | c::EBUSY | c::EOVERFLOW)) => {
                    self.disarm();
                    self.verify(at)?;
                    let (len, path) = (block.len(), quoted(&self.path));
                    let what = format!("the drive {path} takes no block of {len} bytes");
                    let what = format!("{what}: say with -b how long they are to be");
                    return Err(Error::with_source(ErrorKind::Usage, what, e));
                }
                Err(e) => return self.refused("writing", at, e),
            }
        }
    }

    fn write_filemarks(&mut self, count: u32) -> Result<Wrote> {
        let at = self.known()?;
        if count > FILEMARKS_MAX {
            return Err(Error::usage(format!(
                "{count} filemarks: at most {FILEMARKS_MAX} at once"
            )));
        }
        if count > 0
            && let Some(why) = self.refusal()?
        {
            return Ok(Wrote::NotWritten(why));
        }
        match self.operate(Op::WriteFilemarks, i32::try_from(count).unwrap_or(i32::MAX)) {
            Ok(()) => {
                self.expected = Some(at + u64::from(count));
                if count > 0 {
                    self.is_unmarked = false;
                    self.is_at_end = true;
                }
                Ok(Wrote::Whole)
            }
            Err(e) if e.raw_os_error() == Some(c::ENOSPC) => {
                self.disarm();
                self.verify(at)?;
                Ok(Wrote::NotWritten(Why::Physical))
            }
            Err(e) => self.refused("writing a filemark", at, e),
        }
    }

    fn position(&mut self) -> Result<u64> {
        let at = self.known()?;
        self.verify(at)?;
        Ok(at)
    }

    fn locate(&mut self, position: u64) -> Result<Moved> {
        let place = i32::try_from(position)
            .map_err(|_| Error::usage(format!("position {position}: there are none so far")))?;
        self.begin_motion()?;
        match self.operate(Op::Seek, place) {
            Ok(()) => {
                self.expected = Some(position);
                self.position()?;
                Ok(Moved::There)
            }
            Err(e) => {
                let error = self.failed(format!("going to position {position}"), e);
                let at = self.asked();
                self.lose();
                match at.filter(|it| *it < position) {
                    Some(at) if self.is_end_of_data(at)? => {
                        self.expected = Some(at);
                        Ok(Moved::EndOfData)
                    }
                    _ => Err(error),
                }
            }
        }
    }

    fn rewind(&mut self) -> Result<()> {
        self.begin_motion()?;
        self.rewind_only().inspect_err(|_| self.lose())
    }

    fn to_end_of_data(&mut self) -> Result<()> {
        self.begin_motion()?;
        let gone = self.operate(Op::EndOfData, 1);
        if let Err(e) = gone {
            self.lose();
            return Err(self.failed("going to the end of data", e));
        }
        self.arrive()?;
        self.is_at_end = true;
        Ok(())
    }

    fn space_files(&mut self, count: i64) -> Result<Moved> {
        self.known()?;
        let (op, files) = match count {
            1.. => (Op::ForwardFiles, Some(count)),
            _ => (Op::BackFilesBehind, 1i64.checked_sub(count)),
        };
        let files = files.and_then(|it| i32::try_from(it).ok());
        let files = files.ok_or_else(|| Error::usage(format!("{count} tape files: too many")))?;
        self.begin_motion()?;
        let Err(e) = self.operate(op, files) else {
            self.arrive()?;
            return Ok(Moved::There);
        };
        let error = self.failed(format!("going by {count} tape files"), e);
        let at = self.asked();
        self.lose();
        match at {
            Some(0) if count <= 0 => {
                self.rewind_only()?;
                Ok(Moved::Beginning)
            }
            Some(at) if count > 0 && self.is_end_of_data(at)? => {
                self.expected = Some(at);
                Ok(Moved::EndOfData)
            }
            _ => Err(error),
        }
    }

    fn unload(&mut self) -> Result<()> {
        self.begin_motion()?;
        self.operate(Op::Unload, 1).map_err(|e| self.failed("unloading", e))?;
        self.lose();
        let Some(file) = self.file.take() else { return Ok(()) };
        tape::close(file).map_err(|e| self.failed("closing", e))
    }

    fn close(mut self: Box<Self>) -> Result<()> {
        let is_lost = self.expected.is_none();
        let is_lacking = is_lost && self.is_unmarked;
        let finished = if is_lacking { self.known().map(|_| ()) } else { self.finish() };
        if finished.is_err() {
            self.lose();
        }
        let Some(file) = self.file.take() else { return Ok(()) };
        match tape::close(file).map_err(|e| self.failed("closing", e)) {
            // All that was written has its filemark. Linux from 6.12 on says this of a drive that
            // was reset.
            Err(e) if is_lost && !is_lacking => log::debug!("{e}"),
            closed => return finished.and(closed),
        }
        finished
    }
}
