//! Reading an archive, member by member.
//!
//! An archive is anybody's: every length is checked before it is believed, and memory does not grow
//! with what a header claims. Names and targets of links are given as they are, also `../x` and
//! `/x`: who makes files of them has to see where they lead. Nothing is searched for after damage:
//! the first error is the last, and [`Reader::position`] then says where the damage begins.

use std::io::{self, Read};

use super::header::{self, Format, Header};
use super::{NAME_BYTES_MAX, TRAILER};
use crate::error::{Error, Quoted, Result};

/// How much content is skipped at once.
const SKIP_BYTES: usize = 64 << 10;

/// A member of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name, without the NUL.
    pub name: Vec<u8>,
    /// Its metadata.
    pub header: Header,
    /// The format of its header.
    pub format: Format,
    /// Where its header begins: bytes from the archive's beginning.
    pub position: u64,
}

/// Reads an archive.
pub struct Reader<R> {
    input: R,
    position: u64,
    /// Content of the member at hand that has not been read, and what pads it.
    left: u64,
    padding: u64,
    content_at: u64,
    sum: u32,
    wanted_sum: Option<u32>,
    end: End,
}

/// Whether there is anything left to be read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    NotYet,
    Trailer,
    Damage,
}

impl<R: Read> Reader<R> {
    /// Reads an archive from its beginning.
    pub fn new(input: R) -> Reader<R> {
        Reader::at(input, 0)
    }

    /// Reads an archive from one of its members on; the input is at that position already.
    pub fn at(input: R, position: u64) -> Reader<R> {
        Reader {
            input,
            position,
            left: 0,
            padding: 0,
            content_at: position,
            sum: 0,
            wanted_sum: None,
            end: End::NotYet,
        }
    }

    /// How far the archive has been read. After the end this is what follows the trailer; after an
    /// error it is where the damage begins.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The input, which may have been read further only by what it buffers itself.
    pub fn into_inner(self) -> R {
        self.input
    }

    /// The next member; what is left of the former one's content is read and checked first. `None`
    /// at the trailer.
    pub fn next_member(&mut self) -> Result<Option<Member>> {
        self.check_end()?;
        if self.end == End::Trailer {
            return Ok(None);
        }
        let found = self.advance();
        self.end = match found {
            Ok(Some(_)) => End::NotYet,
            Ok(None) => End::Trailer,
            Err(_) => End::Damage,
        };
        found
    }

    fn check_end(&self) -> Result<()> {
        match self.end {
            End::NotYet | End::Trailer => Ok(()),
            End::Damage => Err(Error::corrupt(format!(
                "nothing is read of a cpio archive behind an error, which was at byte {}",
                self.position
            ))),
        }
    }

    fn advance(&mut self) -> Result<Option<Member>> {
        self.skip_content()?;
        let position = self.position;
        self.read_header().map_err(|e| {
            // Whatever a bad header says of lengths means nothing.
            self.position = position;
            e.context(format_args!("cpio archive at byte {position}"))
        })
    }

    fn read_header(&mut self) -> Result<Option<Member>> {
        let position = self.position;
        let head = header::decode(&mut |bytes| self.fill(bytes))?;
        let name = self.read_name(head.name_len)?;
        self.skip(head.extra)?;
        self.pad(position, head.align)?;
        if name == TRAILER {
            // afio says here how much it pads the archive.
            return Ok(None);
        }
        let header = head.header;
        if self.position.checked_add(header.size).is_none() {
            return Err(Error::corrupt("a member with an impossible length"));
        }
        if header.size > 0 && !header.may_have_content() {
            // Some programs would read it as content, others as the next header.
            return Err(Error::corrupt("a member has content and is neither file nor link"));
        }
        self.left = header.size;
        self.padding = (head.align - header.size % head.align) % head.align;
        self.content_at = self.position;
        self.sum = 0;
        self.wanted_sum = head.sum;
        Ok(Some(Member { name, header, format: head.format, position }))
    }

    fn read_name(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut name = vec![0; len.min(NAME_BYTES_MAX)];
        self.fill(&mut name)?;
        let has_end = name.pop() == Some(0);
        if !has_end || name.is_empty() || name.contains(&0) {
            let shown = Quoted(name.get(..200).unwrap_or(&name));
            return Err(Error::corrupt(format!("a bad name of a member: {shown}")));
        }
        Ok(name)
    }

    /// Reads some of the content of the member at hand; 0 at its end.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.check_end()?;
        let read = self.read_content(buffer);
        if read.is_err() {
            self.end = End::Damage;
        }
        read
    }

    fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let len = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let Some(buffer) = buffer.get_mut(..len).filter(|it| !it.is_empty()) else { return Ok(0) };
        let failed = |e| Error::io(format!("reading a cpio archive at byte {}", self.position), e);
        let read = loop {
            match self.input.read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                read => break read.map_err(failed)?,
            }
        };
        if read == 0 {
            return Err(self.cut_off());
        }
        if self.wanted_sum.is_some() {
            let read = buffer.get(..read).unwrap_or_default();
            self.sum = read.iter().fold(self.sum, |sum, it| sum.wrapping_add((*it).into()));
        }
        self.position += read as u64;
        self.left -= read as u64;
        if self.left == 0 && self.wanted_sum.is_some_and(|it| it != self.sum) {
            self.position = self.content_at;
            return Err(Error::corrupt(format!(
                "cpio archive at byte {}: the content of a member has not the sum that its header \
                 says",
                self.content_at
            )));
        }
        Ok(read)
    }

    /// Reads all of the content of the member at hand, which must not be longer than `limit`: the
    /// target of a link, or a list.
    pub fn read_all(&mut self, limit: usize) -> Result<Vec<u8>> {
        if self.left > limit as u64 {
            let len = self.left;
            return Err(Error::corrupt(format!("a member of {len} bytes: {limit} at most")));
        }
        let mut content = vec![0; usize::try_from(self.left).unwrap_or(limit).min(limit)];
        let mut at = 0;
        while let Some(rest) = content.get_mut(at..).filter(|it| !it.is_empty()) {
            match self.read(rest)? {
                0 => break,
                read => at += read,
            }
        }
        content.truncate(at);
        Ok(content)
    }

    fn skip_content(&mut self) -> Result<()> {
        if self.left > 0 {
            let mut buffer = [0; SKIP_BYTES];
            while self.left > 0 {
                self.read_content(&mut buffer)?;
            }
        }
        let padding = std::mem::take(&mut self.padding);
        self.skip(padding)
    }

    /// Skips what aligns the position, counted from `start`.
    fn pad(&mut self, start: u64, align: u64) -> Result<()> {
        self.skip((align - (self.position - start) % align) % align)
    }

    fn skip(&mut self, mut len: u64) -> Result<()> {
        let mut buffer = [0; 512];
        while len > 0 {
            let part = usize::try_from(len).unwrap_or(usize::MAX).min(buffer.len());
            self.fill(buffer.get_mut(..part).unwrap_or_default())?;
            len -= part as u64;
        }
        Ok(())
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        match self.input.read_exact(buffer) {
            Ok(()) => {
                self.position += buffer.len() as u64;
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(self.cut_off()),
            Err(e) => Err(Error::io("reading a cpio archive", e)),
        }
    }

    fn cut_off(&self) -> Error {
        Error::corrupt(format!(
            "the cpio archive is cut off at byte {} or soon after",
            self.position
        ))
    }
}
