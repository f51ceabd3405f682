//! Reading a tape, file after file, each as a stream of bytes; and what a tape file begins with.
//!
//! Invariant: what is read of a tape file is of this file alone, and an error in one is no reason
//! not to come to the next. Nothing is held but one block.
//!
//! A [`Visit`] goes over the tape files from a place on and gives each as a [`TapeFile`], which is
//! read like any file and can also be read from any of its bytes on. [`Head`] tells whose archive
//! it is:
//!
//! ```text
//! while let Some(mut file) = visit.next_file()? {
//!     let mut members = cpio::Reader::new(&mut file);
//!     let head = Head::read(&mut members)?;
//!     // head.job, head.member, then members.next_member() ...
//! }
//! ```

use std::io::{self, BufReader};

use super::cpio::{Member, Reader};
use super::drive::{Drive, Moved, Read};
use super::loaded::BLOCK_BYTES_MAX;
use super::spool::batch::Batch;
use super::spool::job::{JobFile, is_uuid};
use super::spool::text::{Fields, parse_number};
use crate::error::{Error, ErrorKind, Result};

/// A buffer for the blocks that are usual. It grows when one is longer.
const BUFFER_BYTES: usize = 1 << 20;
/// Blocks behind a first one that cannot be read that are tried for their length.
const LEARNT_MAX: u64 = 8;

/// What a tape file ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A filemark, as it should.
    Filemark,
    /// The end of data: it was never closed.
    EndOfData,
}

/// Goes over the files of a tape.
pub struct Visit<'d> {
    drive: &'d mut dyn Drive,
    buffer: Vec<u8>,
    filenum: u64,
    /// The drive's number of the first block of this file.
    position: u64,
    is_begun: bool,
    /// It was gone to somewhere in this file, or what should be in it.
    is_moved: bool,
    /// Of the block in the buffer: its length, and how much of it was read.
    len: usize,
    used: usize,
    /// Where the byte that is read next is in the file.
    offset: u64,
    /// The drive's number of the block behind the one in the buffer.
    next: u64,
    /// Length of the first block; others are as long, but for the last.
    block_bytes: usize,
    end: Option<End>,
    /// What stands in the way of reading on, and whether that was told.
    failure: Option<Failure>,
}

enum Failure {
    Untold(Error),
    Told,
}

impl<'d> Visit<'d> {
    /// Goes on from where the drive stands: the beginning of the tape file of this number. The
    /// drive has to take blocks of any size.
    pub fn new(drive: &'d mut dyn Drive, filenum: u64) -> Visit<'d> {
        Visit {
            drive,
            buffer: Vec::new(),
            filenum,
            position: 0,
            is_begun: false,
            is_moved: false,
            len: 0,
            used: 0,
            offset: 0,
            next: 0,
            block_bytes: 0,
            end: None,
            failure: None,
        }
    }

    /// The next tape file; `None` at the end of data. What was not read of the one before is
    /// passed over.
    pub fn next_file(&mut self) -> Result<Option<TapeFile<'_, 'd>>> {
        if self.is_begun && !self.pass()? {
            return Ok(None);
        }
        self.is_begun = true;
        self.position = self.drive.position()?;
        (self.len, self.used, self.offset, self.block_bytes) = (0, 0, 0, 0);
        (self.next, self.end, self.failure) = (self.position, None, None);
        self.is_moved = false;
        // Whether there is a file at all is known when something of it was read.
        match self.fill() {
            Ok(()) if self.end == Some(End::EndOfData) => return Ok(None),
            Ok(()) => self.block_bytes = self.len,
            Err(e) => self.failure = Some(Failure::Untold(e)),
        }
        Ok(Some(TapeFile { visit: self }))
    }

    /// Goes behind the filemark of the file at hand; `false` if there is none.
    fn pass(&mut self) -> Result<bool> {
        match self.end {
            Some(End::EndOfData) if !self.is_moved => return Ok(false),
            Some(End::Filemark) if !self.is_moved => {}
            _ => {
                if self.is_moved || self.failure.is_some() && self.drive.state()?.lost {
                    self.go(self.position)?;
                }
                if self.drive.space_files(1)? != Moved::There {
                    self.end = Some(End::EndOfData);
                    return Ok(false);
                }
                if self.drive.position()? <= self.position {
                    let what = "the drive does not get behind a tape file";
                    return Err(Error::new(ErrorKind::Io, what));
                }
            }
        }
        self.filenum += 1;
        Ok(true)
    }

    fn go(&mut self, position: u64) -> Result<()> {
        match self.drive.locate(position)? {
            Moved::There => Ok(()),
            _ => Err(Error::corrupt(format!("the tape ends before position {position}"))),
        }
    }

    /// Reads a block into the buffer, or the end.
    fn fill(&mut self) -> Result<()> {
        if self.buffer.is_empty() {
            self.buffer.resize(BUFFER_BYTES, 0);
        }
        (self.len, self.used) = (0, 0);
        loop {
            match self.drive.read(&mut self.buffer)? {
                Read::Block(len) => {
                    self.len = len;
                    self.next += 1;
                }
                Read::TooLong if self.buffer.len() < BLOCK_BYTES_MAX => {
                    let len = (self.buffer.len() * 4).min(BLOCK_BYTES_MAX);
                    self.buffer.resize(len, 0);
                    self.go(self.next)?;
                    continue;
                }
                Read::TooLong => {
                    let at = self.next;
                    return Err(Error::corrupt(format!(
                        "the block at position {at} has more than {BLOCK_BYTES_MAX} bytes"
                    )));
                }
                Read::Filemark => self.end = Some(End::Filemark),
                Read::EndOfData => self.end = Some(End::EndOfData),
            }
            return Ok(());
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        match self.failure.replace(Failure::Told) {
            Some(Failure::Untold(e)) => return Err(e),
            Some(Failure::Told) => {
                let what = "nothing is read of a tape file behind an error";
                return Err(Error::new(ErrorKind::Io, what));
            }
            None => self.failure = None,
        }
        if self.used == self.len && self.end.is_none() && !buffer.is_empty() {
            let filled = self.fill();
            if filled.is_err() {
                self.failure = Some(Failure::Told);
            }
            filled?;
        }
        let block = self.buffer.get(self.used..self.len).unwrap_or_default();
        let len = block.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..len), block.get(..len)) {
            to.copy_from_slice(from);
        }
        self.used += len;
        self.offset += len as u64;
        Ok(len)
    }

    /// The first block cannot be read: the next one that can is as long.
    fn learn_block_bytes(&mut self) -> Result<()> {
        self.is_moved = true;
        let mut number = 1;
        loop {
            let position = self.position + number;
            self.go(position)?;
            (self.next, self.end, self.failure) = (position, None, None);
            match self.fill() {
                Ok(()) => {
                    self.block_bytes = self.len;
                    return Ok(());
                }
                Err(e) => {
                    self.failure = Some(Failure::Told);
                    if number == LEARNT_MAX || e.is_shortage() {
                        return Err(e);
                    }
                }
            }
            number += 1;
        }
    }

    fn seek_to(&mut self, offset: u64) -> Result<()> {
        let cut_off = || Error::corrupt(format!("the tape file has no byte {offset}"));
        if self.block_bytes == 0 && self.failure.is_some() {
            self.learn_block_bytes()?;
        }
        let block_bytes = self.block_bytes as u64;
        let number = offset.checked_div(block_bytes).ok_or_else(cut_off)?;
        let within = usize::try_from(offset - number * block_bytes).map_err(|_| cut_off())?;
        let position = self.position.checked_add(number).ok_or_else(cut_off)?;
        let is_here = self.len > 0 && position + 1 == self.next && self.failure.is_none();
        if !is_here {
            let is_next = position == self.next && self.failure.is_none() && self.end.is_none();
            if !is_next {
                self.is_moved = true;
                self.go(position)?;
            }
            (self.next, self.end, self.failure) = (position, None, None);
            let filled = self.fill();
            if filled.is_err() {
                self.failure = Some(Failure::Told);
            }
            filled?;
        }
        if within >= self.len {
            return Err(cut_off());
        }
        (self.used, self.offset) = (within, offset);
        Ok(())
    }
}

/// A file of a tape, from its first block to its filemark, as a stream.
///
/// What a read fails with has an [`Error`] inside. Behind an error nothing is read but from a byte
/// that [`TapeFile::seek_to`] goes to.
pub struct TapeFile<'v, 'd> {
    visit: &'v mut Visit<'d>,
}

impl TapeFile<'_, '_> {
    /// Its number: filemarks before it.
    pub fn filenum(&self) -> u64 {
        self.visit.filenum
    }

    /// The drive's number of its first block.
    pub fn position(&self) -> u64 {
        self.visit.position
    }

    /// Bytes of it that are before what is read next.
    pub fn offset(&self) -> u64 {
        self.visit.offset
    }

    /// Length of its first block; 0 if it has none, or if that could not be read.
    pub fn block_bytes(&self) -> usize {
        self.visit.block_bytes
    }

    /// What it ends with, when it was read so far.
    pub fn end(&self) -> Option<End> {
        self.visit.end
    }

    /// Goes on from this byte, by going straight to its block. Blocks of a tape file are of one
    /// length, but for the last: where others are, this is another byte, and what is read has to be
    /// looked at.
    pub fn seek_to(&mut self, offset: u64) -> Result<()> {
        self.visit.seek_to(offset)
    }

    /// Reads to the end. How many bytes that were, and whether all of them are zeros.
    pub fn drain(&mut self) -> Result<(u64, bool)> {
        let (mut count, mut is_zero) = (0, true);
        let mut buffer = vec![0; 64 << 10];
        loop {
            let len = self.visit.read(&mut buffer)?;
            if len == 0 {
                return Ok((count, is_zero));
            }
            count += len as u64;
            is_zero &= buffer.get(..len).unwrap_or_default().iter().all(|it| *it == 0);
        }
    }
}

impl io::Read for TapeFile<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.visit.read(buffer).map_err(io::Error::other)
    }
}

/// The content of an archive's member, as a stream.
pub struct Content<'a, R>(pub &'a mut Reader<R>);

impl<R: io::Read> io::Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(io::Error::other)
    }
}

/// What an archive begins with: the batch and the job, if it is one of ours or of the original
/// program.
#[derive(Debug, Default)]
pub struct Head {
    /// The job's name, and the batch's number within it.
    pub job: Option<(String, u64)>,
    /// The fields of `%batch`.
    pub batch: Fields,
    /// The fields of `%job`.
    pub fields: Fields,
    /// A member that was met and is neither; its content was not read.
    pub member: Option<Member>,
    /// What is wrong with the text of the batch or of the job.
    pub damage: Option<Error>,
}

/// What a member of a job's own is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Own<'a> {
    /// The file of the batch with this number: `.../<uuid>/@<number>`.
    Batch(&'a str, u64),
    /// The job file: `.../<uuid>/wjob`.
    Job(&'a str),
    /// The sums of the batch with this number: `.../<uuid>/@<number>.sha256`.
    Sums(&'a str, u64),
}

impl<'a> Own<'a> {
    /// The job.
    pub fn job(self) -> &'a str {
        match self {
            Own::Batch(job, _) | Own::Job(job) | Own::Sums(job, _) => job,
        }
    }

    /// Tells what a name stands for, if it is one of a job's own.
    pub fn of(name: &'a [u8]) -> Option<Own<'a>> {
        let mut parts = name.rsplit(|it| *it == b'/');
        let (name, job) = (parts.next()?, parts.next()?);
        let job = std::str::from_utf8(job).ok().filter(|it| is_uuid(it.as_bytes()))?;
        match name {
            b"wjob" | b"rjob" => Some(Own::Job(job)),
            _ => {
                let name = name.strip_prefix(b"@")?;
                match name.strip_suffix(b".sha256") {
                    Some(number) => parse_number(number).map(|it| Own::Sums(job, it)),
                    None => parse_number(name).map(|it| Own::Batch(job, it)),
                }
            }
        }
    }
}

impl Head {
    /// Reads the first members of an archive. Its files follow: the first of them is in
    /// [`Head::member`], unless there is none or [`Reader::next_member`] has it.
    pub fn read<R: io::Read>(members: &mut Reader<R>) -> Result<Head> {
        let mut head = Head::default();
        head.fill(members)?;
        Ok(head)
    }

    /// The same for a head that has nothing yet; after an error it has what came before that.
    pub fn fill<R: io::Read>(&mut self, members: &mut Reader<R>) -> Result<()> {
        let head = self;
        let (mut has_batch, mut has_job) = (false, false);
        while !(has_batch && has_job) {
            let Some(member) = members.next_member()? else { break };
            let known = head.job.as_ref().map(|it| it.0.as_str());
            match Own::of(&member.name) {
                Some(Own::Batch(job, number)) if !has_batch && known.is_none_or(|it| it == job) => {
                    has_batch = true;
                    head.job = Some((job.to_owned(), number));
                    let content = BufReader::new(Content(members));
                    match Batch::read(content) {
                        Ok(batch) => head.batch = batch.fields().clone(),
                        Err(e) => head.damage = Some(e.context(format!("batch {job}/{number}"))),
                    }
                }
                Some(Own::Job(job)) if !has_job && known.is_none_or(|it| it == job) => {
                    has_job = true;
                    match JobFile::read(BufReader::new(Content(members))) {
                        Ok(file) => head.fields = file.fields().clone(),
                        Err(e) => head.damage = Some(e.context(format!("job {job}"))),
                    }
                }
                _ => {
                    head.member = Some(member);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Files of the batch, as it says.
    pub fn count(&self) -> Option<u64> {
        self.batch.number("count")
    }
}

/// What a tape file is.
#[derive(Debug)]
pub enum What {
    /// A filemark follows at once.
    Empty,
    /// An archive.
    Archive(Head),
    /// Something else, or an archive whose first header is damaged.
    Other,
    /// It cannot be read.
    Unreadable(Error),
}

/// A tape file that a visit has come to.
#[derive(Debug)]
pub struct Seen {
    /// Its number.
    pub filenum: u64,
    /// The drive's number of its first block.
    pub position: u64,
    /// What it is.
    pub what: What,
}

/// Calls `each` with every tape file from where the drive stands, which is the beginning of the one
/// with this number, to the end of data, or until it gives `false`. Only the beginning of each is
/// read.
pub fn scan(
    drive: &mut dyn Drive,
    filenum: u64,
    each: &mut dyn FnMut(&Seen) -> Result<bool>,
) -> Result<()> {
    let mut visit = Visit::new(drive, filenum);
    while let Some(mut file) = visit.next_file()? {
        let (filenum, position) = (file.filenum(), file.position());
        let what = if file.end().is_some() {
            What::Empty
        } else {
            let mut members = Reader::new(&mut file);
            let mut head = Head::default();
            match head.fill(&mut members) {
                Ok(()) => What::Archive(head),
                // It ends too soon, as a writer that was killed leaves it.
                Err(e) if e.kind() == ErrorKind::Corrupt && head.job.is_some() => {
                    What::Archive(Head { damage: Some(e), ..head })
                }
                Err(e) if e.kind() == ErrorKind::Corrupt && members.position() == 0 => What::Other,
                Err(e) => What::Unreadable(e),
            }
        };
        if !each(&Seen { filenum, position, what })? {
            break;
        }
    }
    Ok(())
}
