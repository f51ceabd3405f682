//! A file that behaves like a tape. Its format is SIMH's: see FORMAT.md, "Images".
//!
//! Invariant: behind what is safe the disk has a mark that the tape ends. What is written goes
//! behind that mark, and takes its place when it is on the disk itself, with a filemark or without.
//! So a crash leaves the tape as it was then, whatever the disk has kept of the rest, and a block
//! that is not whole is always damage. Damage is an error, and nothing is appended behind it.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::drive::{Access, BlockSize, Drive, Moved, Read, State, Why, Wrote};
use super::medium::Medium;
use super::tap::{self, Index, Kind, Place, WORD};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock::{LockedFile, PATIENCE};
use crate::sys::{self, c, quoted};

/// The name, in the directory of an image drive, of the link to the image that is loaded.
pub const LOADED: &str = "loaded";
/// Room that blocks leave at the end, for filemarks.
const RESERVE: u64 = 2 * WORD;
/// Most filemarks at once.
const FILEMARKS_MAX: u32 = 1000;
/// After so many bytes the kernel starts to write them out, so that a filemark waits for few.
const WRITEBACK_BYTES: u64 = 8 << 20;

/// Whether the drive that is this directory has an image, be it one that is there or not.
pub fn is_loaded(drive: &Path) -> bool {
    drive.is_dir() && sys::lstat(&drive.join(LOADED)).is_ok()
}

/// Takes the image out of the drive that is this directory, without a look at it; whether there
/// was one.
pub fn take_out(drive: &Path) -> Result<bool> {
    if !is_loaded(drive) {
        return Ok(false);
    }
    let link = drive.join(LOADED);
    let failed = |e| Error::io(format!("taking the tape out of {}", quoted(&link)), e);
    std::fs::remove_file(&link).map_err(failed)?;
    Ok(true)
}

/// A drive, and the image that is its tape.
pub struct Image {
    path: PathBuf,
    tape: Option<Tape>,
    /// The link that has brought the tape into the drive.
    link: Option<PathBuf>,
    block_size: BlockSize,
}

/// An open image.
struct Tape {
    file: LockedFile,
    medium: Medium,
    access: Access,
    is_protected: bool,
    size: u64,
    here: Place,
    is_at_end: bool,
    index: Index,
    /// What begins at a byte, where it was read together with what is before.
    ahead: Option<(u64, u32)>,
    /// Where there is, instead of this word, a mark that the tape ends.
    pending: Option<(u64, u32)>,
    /// Where the disk has a mark that the tape ends.
    ends_at: Option<u64>,
    /// Blocks were written and no filemark after them.
    is_unmarked: bool,
    warning: Warning,
    /// Up to where the kernel was told to write out what it has.
    written_out: u64,
    /// The file could not be written or synced: what is in it is not known any more.
    has_failed: bool,
}

/// What was said of the end that is near.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Warning {
    Unneeded,
    Due,
    Told,
}

impl Image {
    /// Opens an image, or the drive that is a directory: its tape is the image that the link
    /// [`LOADED`] in it names, if there is one.
    pub fn open(path: &Path, access: Access) -> Result<Image> {
        let stat =
            sys::stat(path).map_err(|e| Error::io(format!("looking at {}", quoted(path)), e));
        let (block_size, link) = (BlockSize::Variable, path.join(LOADED));
        if !stat?.is_dir() {
            let (path, tape) = (path.to_path_buf(), Some(Tape::open(path, access)?));
            return Ok(Image { path, tape, link: None, block_size });
        }
        if !is_loaded(path) {
            return Ok(Image { path: link.clone(), tape: None, link: Some(link), block_size });
        }
        // Messages name the image itself.
        let target = std::fs::read_link(&link).map(|it| path.join(it));
        let image = target.unwrap_or_else(|_| link.clone());
        let tape = Tape::open(&image, access).map_err(|e| match e.kind() {
            ErrorKind::Locked => e,
            _ => e.context(format!("{} is loaded (t0eject takes it out)", quoted(&image))),
        });
        Ok(Image { path: image, tape: Some(tape?), link: Some(link), block_size })
    }

    /// Makes the image of a blank tape.
    pub fn create(path: &Path, medium: &Medium) -> Result<()> {
        let failed = |e| Error::io(format!("making the tape image {}", quoted(path)), e);
        medium.write(path)?;
        let file = sys::private_file().write(true).create_new(true).open(path).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        sys::sync_dir(path.parent().filter(|it| *it != Path::new("")).unwrap_or(Path::new(".")))
    }

    /// Does something with the tape.
    fn with<T>(&mut self, act: impl FnOnce(&mut Tape) -> Result<T>) -> Result<T> {
        let Some(tape) = &mut self.tape else {
            let what = format!("there is no tape in {}: load one", quoted(&self.path));
            return Err(Error::new(ErrorKind::WrongTape, what));
        };
        act(tape).map_err(|e| e.context(format!("tape image {}", quoted(&self.path))))
    }
}

impl Drive for Image {
    fn state(&mut self) -> Result<State> {
        let block_size = self.block_size;
        let Some(tape) = &self.tape else { return Ok(State { block_size, ..State::default() }) };
        Ok(State {
            online: true,
            write_protected: tape.is_protected,
            worm: Some(tape.medium.worm),
            at_beginning: tape.here.position == 0,
            at_end_of_data: tape.is_at_end,
            lost: false,
            block_size,
            file: Some(tape.here.files),
        })
    }

    fn set_block_size(&mut self, size: BlockSize) -> Result<()> {
        if size == BlockSize::Fixed(0) {
            return Err(Error::usage("blocks cannot have 0 bytes"));
        }
        self.block_size = size;
        self.with(|_| Ok(()))
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<Read> {
        let size = self.block_size;
        self.with(|tape| tape.read(buffer, size))
    }

    fn write(&mut self, block: &[u8]) -> Result<Wrote> {
        let size = self.block_size;
        self.with(|tape| tape.write(block, size))
    }

    fn write_filemarks(&mut self, count: u32) -> Result<Wrote> {
        self.with(|tape| tape.write_filemarks(count))
    }

    fn position(&mut self) -> Result<u64> {
        self.with(|tape| Ok(tape.here.position))
    }

    fn locate(&mut self, position: u64) -> Result<Moved> {
        self.with(|tape| {
            tape.begin_motion()?;
            let from = tape.nearest(|it| it.position <= position);
            tape.go(from, |it| it.position >= position)
        })
    }

    fn rewind(&mut self) -> Result<()> {
        self.with(Tape::rewind)
    }

    fn to_end_of_data(&mut self) -> Result<()> {
        self.with(|tape| {
            tape.begin_motion()?;
            let from = tape.nearest(|_| true);
            tape.go(from, |_| false).map(|_| ())
        })
    }

    fn space_files(&mut self, count: i64) -> Result<Moved> {
        self.with(|tape| {
            tape.begin_motion()?;
            let file = tape.here.files.saturating_add_signed(count);
            if file == 0 {
                tape.rewind()?;
                return Ok(Moved::Beginning);
            }
            // The place is behind a filemark: one that has as many before it may be farther on.
            let is_before = |it: &Place| it.files < file;
            let from = tape.nearest(is_before);
            tape.go(from, |it| it.files >= file)
        })
    }

    fn unload(&mut self) -> Result<()> {
        self.with(Tape::rewind)?;
        self.tape = None;
        let Some(link) = &self.link else { return Ok(()) };
        let failed = |e| Error::io(format!("taking the tape out of {}", quoted(link)), e);
        std::fs::remove_file(link).map_err(failed)
    }

    fn close(mut self: Box<Self>) -> Result<()> {
        if self.tape.is_none() {
            return Ok(());
        }
        self.with(Tape::finish)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.tape.as_ref().is_some_and(|it| !it.has_failed)
            && let Err(e) = self.with(Tape::finish)
        {
            log::warn!("{e}");
        }
    }
}

impl Tape {
    fn open(path: &Path, access: Access) -> Result<Tape> {
        let failed = |e| Error::io(format!("opening the tape image {}", quoted(path)), e);
        let medium = Medium::read(path)?;
        let stat = sys::stat(path).map_err(failed)?;
        if !stat.is_file() {
            let what = "is neither a tape device nor a tape image nor a directory with one";
            return Err(Error::usage(format!("{} {what}", quoted(path))));
        }
        // Root may write what nobody may.
        let mut is_protected = medium.write_protected || stat.mode & 0o222 == 0;
        let for_reading = || File::options().read(true).open(path).map_err(failed);
        let file = if access == Access::Write && !is_protected {
            match File::options().read(true).write(true).open(path) {
                Err(e) if matches!(e.raw_os_error(), Some(c::EACCES | c::EROFS | c::EPERM)) => {
                    is_protected = true;
                    for_reading()?
                }
                opened => opened.map_err(failed)?,
            }
        } else {
            for_reading()?
        };
        let Some(file) = LockedFile::within(file, PATIENCE).map_err(failed)? else {
            let what = format!("the tape image {} is in use by another process", quoted(path));
            return Err(Error::new(ErrorKind::Locked, what));
        };
        Ok(Tape {
            size: sys::fstat(&*file).map_err(failed)?.size,
            file,
            medium,
            access,
            is_protected,
            here: Place::default(),
            is_at_end: false,
            index: Index::new(),
            ahead: None,
            pending: None,
            ends_at: None,
            is_unmarked: false,
            warning: Warning::Unneeded,
            written_out: 0,
            has_failed: false,
        })
    }

    /// The nearest known place from which it goes forward to what is wanted: the last one of which
    /// this holds.
    fn nearest(&self, holds: impl Fn(&Place) -> bool) -> Place {
        let known = self.index.last(&holds);
        if holds(&self.here) && self.here.position > known.position { self.here } else { known }
    }

    /// Goes on from a place until `is_there`, or to the end of data.
    fn go(&mut self, from: Place, is_there: impl Fn(&Place) -> bool) -> Result<Moved> {
        let mut place = from;
        while !is_there(&place) {
            let object = tap::next(&self.file, self.size, place.offset)?;
            place = place.behind(&object);
            if object.kind == Kind::EndOfData {
                self.here = place;
                self.is_at_end = true;
                return Ok(Moved::EndOfData);
            }
            self.index.note(place);
        }
        self.here = place;
        Ok(Moved::There)
    }

    fn begin_motion(&mut self) -> Result<()> {
        // What could not be written was told when that happened, and is not on the tape.
        if !self.has_failed {
            self.finish()?;
        }
        self.is_at_end = false;
        self.warning = Warning::Unneeded;
        Ok(())
    }

    fn rewind(&mut self) -> Result<()> {
        self.begin_motion()?;
        self.here = Place::default();
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8], size: BlockSize) -> Result<Read> {
        let position = self.here.position;
        if size == BlockSize::Variable {
            let at = self.here.offset;
            let word = self.ahead.take().filter(|it| it.0 == at).map(|it| it.1);
            if let Some(it) = tap::read_swiftly(&self.file, self.size, at, word, buffer)? {
                self.ahead = it.ahead.map(|word| (it.end, word));
                self.here = Place { position: position + 1, offset: it.end, ..self.here };
                self.index.note(self.here);
                return Ok(Read::Block(it.len as usize));
            }
        }
        let object = tap::next(&self.file, self.size, self.here.offset)?;
        let place = self.here.behind(&object);
        let read = match object.kind {
            Kind::EndOfData => {
                self.is_at_end = true;
                Read::EndOfData
            }
            Kind::Filemark => Read::Filemark,
            Kind::Block { len, .. } if matches!(size, BlockSize::Fixed(it) if it != len) => {
                // A real drive steps back as well.
                let what = format!("block {position} has {len} bytes, and another size is set");
                return Err(Error::new(ErrorKind::Io, what));
            }
            Kind::Block { data, len, is_bad } => {
                let part = usize::try_from(len).ok().and_then(|it| buffer.get_mut(..it));
                let read = match part {
                    Some(part) => {
                        tap::read_at(&self.file, part, data)?;
                        Read::Block(part.len())
                    }
                    None => Read::TooLong,
                };
                if is_bad {
                    self.here = place;
                    let what = format!("block {position} is marked as one that could not be read");
                    return Err(Error::new(ErrorKind::Io, what));
                }
                read
            }
        };
        self.here = place;
        self.index.note(place);
        Ok(read)
    }

    /// Why nothing can be written here, if so.
    fn refusal(&mut self) -> Result<Option<Why>> {
        if self.is_protected {
            return Ok(Some(Why::Protected));
        }
        if self.access == Access::Read {
            return Err(Error::usage("it was opened to be read"));
        }
        if self.has_failed {
            let what = "writing to it has failed: open it again, and read what is on it";
            return Err(Error::new(ErrorKind::Io, what));
        }
        if self.medium.worm && !self.is_unmarked {
            let object = tap::next(&self.file, self.size, self.here.offset)?;
            if object.kind != Kind::EndOfData {
                return Ok(Some(Why::Worm));
            }
        }
        Ok(None)
    }

    fn write(&mut self, block: &[u8], size: BlockSize) -> Result<Wrote> {
        let len = block.len() as u64;
        if len == 0 || len > tap::BLOCK_BYTES_MAX {
            let max = tap::BLOCK_BYTES_MAX;
            return Err(Error::usage(format!("a block of {len} bytes: 1 to {max} are possible")));
        }
        if matches!(size, BlockSize::Fixed(it) if u64::from(it) != len) {
            return Err(Error::usage(format!("a block of {len} bytes: another size is set")));
        }
        if let Some(why) = self.refusal()? {
            return Ok(Wrote::NotWritten(why));
        }
        if self.warning == Warning::Due {
            self.warning = Warning::Told;
            return Ok(Wrote::NotWritten(Why::EarlyWarning));
        }
        let end = self.here.offset + tap::block_bytes(len);
        let capacity = self.medium.capacity.unwrap_or(u64::MAX);
        if end.saturating_add(RESERVE) > capacity {
            return Ok(Wrote::NotWritten(Why::Physical));
        }
        // It is at most 24 bits.
        let word = u32::try_from(len).unwrap_or_default();
        let (tail, tail_len) = tap::block_tail(word);
        if !self.append(word, &[block, tail.get(..tail_len).unwrap_or_default()])? {
            if self.warning == Warning::Told {
                return Ok(Wrote::NotWritten(Why::Physical));
            }
            // The disk is full. What closes an archive may still find room where this has found
            // none.
            self.warning = Warning::Told;
            return Ok(Wrote::NotWritten(Why::EarlyWarning));
        }
        self.is_unmarked = true;
        self.advance(Place { offset: end, position: self.here.position + 1, ..self.here });
        if end.saturating_add(self.medium.early_warning) >= capacity
            && self.warning == Warning::Unneeded
        {
            self.warning = Warning::Due;
        }
        Ok(Wrote::Whole)
    }

    fn write_filemarks(&mut self, count: u32) -> Result<Wrote> {
        if count == 0 {
            return self.seal().map(|()| Wrote::Whole);
        }
        if count > FILEMARKS_MAX {
            return Err(Error::usage(format!(
                "{count} filemarks: at most {FILEMARKS_MAX} at once"
            )));
        }
        if let Some(why) = self.refusal()? {
            return Ok(Wrote::NotWritten(why));
        }
        let marks = vec![0; (count as usize - 1) * 4];
        let end = self.here.offset + u64::from(count) * WORD;
        let is_room = self.medium.capacity.is_none_or(|it| end <= it);
        if !(is_room && self.append(tap::FILEMARK, &[&marks])?) {
            return Ok(Wrote::NotWritten(Why::Physical));
        }
        for mark in 1..=u64::from(count) {
            let offset = end - (u64::from(count) - mark) * WORD;
            let (position, files) = (self.here.position + 1, self.here.files + 1);
            self.advance(Place { position, files, offset });
        }
        self.seal()?;
        self.is_unmarked = false;
        Ok(Wrote::Whole)
    }

    fn advance(&mut self, place: Place) {
        self.here = place;
        self.is_at_end = true;
        self.index.note(place);
    }

    /// Puts a word and what belongs to it here, and behind it the mark that the tape ends. `false`
    /// if the disk is full: then nothing has changed.
    fn append(&mut self, word: u32, rest: &[&[u8]]) -> Result<bool> {
        let at = self.here.offset;
        self.ahead = None;
        let failed = |e| Error::io(format!("writing at byte {at}"), e);
        if self.pending.is_none() && self.ends_at != Some(at) {
            // Not before this is on the disk may anything follow it: a crash can leave zeros in
            // the place of what was written last, and those are filemarks.
            match self.cut(at).and_then(|()| self.file.sync_data()) {
                Err(e) if is_full(&e) => return Ok(false),
                Err(e) => {
                    self.has_failed = true;
                    return Err(failed(e));
                }
                Ok(()) => self.ends_at = Some(at),
            }
        }
        let head = word.to_le_bytes();
        // The first word stays what it is, until `seal`.
        let skipped = if self.pending.is_none() { head.len() } else { 0 };
        let head = head.get(skipped..).unwrap_or_default();
        let end = tap::END_OF_MEDIUM.to_le_bytes();
        let pieces = [head].into_iter().chain(rest.iter().copied()).chain([&end[..]]);
        let mut pieces: Vec<IoSlice<'_>> = pieces.map(IoSlice::new).collect();
        if let Err(e) = sys::tape::write_all_at(&self.file, &mut pieces, at + skipped as u64) {
            if let Err(e) = self.cut(at) {
                self.has_failed = true;
                return Err(failed(e));
            }
            return if is_full(&e) { Ok(false) } else { Err(failed(e)) };
        }
        self.size = at + 2 * WORD + rest.iter().map(|it| it.len() as u64).sum::<u64>();
        self.pending.get_or_insert((at, word));
        if self.size >= self.written_out + WRITEBACK_BYTES {
            sys::start_writeback(&self.file, self.written_out, self.size - self.written_out);
            self.written_out = self.size;
        }
        Ok(true)
    }

    /// Ends the tape at a byte.
    fn cut(&mut self, at: u64) -> io::Result<()> {
        self.file.write_all_at(&tap::END_OF_MEDIUM.to_le_bytes(), at)?;
        self.size = at + WORD;
        self.file.set_len(self.size)?;
        self.index.cut(self.here.position);
        self.written_out = self.written_out.min(at);
        Ok(())
    }

    /// Makes what was written last, and then valid.
    fn seal(&mut self) -> Result<()> {
        let Some((at, word)) = self.pending else { return Ok(()) };
        let sync = || -> io::Result<()> {
            self.file.sync_data()?;
            self.file.write_all_at(&word.to_le_bytes(), at)?;
            self.file.sync_data()
        };
        let done = sync();
        self.has_failed |= done.is_err();
        done.map_err(|e| Error::io("syncing it", e))?;
        self.pending = None;
        self.ends_at = Some(self.here.offset);
        Ok(())
    }

    /// Closes what was written with a filemark.
    fn finish(&mut self) -> Result<()> {
        if self.has_failed {
            let what = "what was written behind the last filemark is not safe";
            return Err(Error::new(ErrorKind::Io, what));
        }
        if !self.is_unmarked {
            return Ok(());
        }
        match self.write_filemarks(1)? {
            Wrote::Whole => Ok(()),
            Wrote::NotWritten(_) => {
                // It is said once. The blocks are kept all the same.
                self.seal()?;
                self.is_unmarked = false;
                let what = "there is no room for the filemark behind the last block";
                Err(Error::new(ErrorKind::NoSpace, what))
            }
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(c::ENOSPC | c::EDQUOT | c::EFBIG))
}
