//! Reading an archive on tape and proving it: every member, every recorded position, every sum.
//!
//! Invariant: what is wrong is told and reading goes on wherever a recorded position says where.
//! Memory grows neither with the archive nor with its damage: what has to be remembered until the
//! sums come, at the end, is on disk.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};

use super::cpio::{Member, Reader};
use super::read::{Content, End, Head, Own, TapeFile};
use super::recorded::Cut;
use super::spill::{Spill, Spilled};
use super::spool::text::{self, Lines};
use super::sums::{self, Sum, Summer};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::c;

/// Files among which the one of a sum is looked for, and most bytes of their names.
const WINDOW: usize = 4096;
const WINDOW_BYTES: usize = 4 << 20;
/// Recorded positions that are tried one after another behind damage.
const TRIES_MAX: u32 = 100;
/// Sums without a file that are told one by one.
const TOLD_MAX: u64 = 1000;

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// The archive.
    Archive,
    /// A file that is not there, or that cannot be read.
    Lost,
    /// A file whose content is not what its sum says.
    Sum,
    /// A file that has failed when it was written, and is not in the archive as it should be. The
    /// tape is none the worse for it.
    Partial,
}

/// Something that is wrong.
#[derive(Debug)]
pub struct Finding {
    /// What it is about.
    pub about: About,
    /// The byte of the tape file: of a file of the archive, where its header should be.
    pub at: u64,
    /// The file of the archive that is concerned, if it is one.
    pub path: Option<Vec<u8>>,
    /// What it is.
    pub error: Error,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "byte {}: ", self.at)?;
        if let Some(path) = &self.path {
            write!(f, "{}: ", Quoted(path))?;
        }
        write!(f, "{}", self.error)
    }
}

/// Gives what the spool has recorded of an archive: positions and names, in their order.
pub type Recorded<'a> = dyn FnMut() -> Result<Option<(u64, Vec<u8>)>> + 'a;

/// Is told whose archive it is, as far as that is known.
pub type Begun<'a> = dyn FnMut(Option<&(String, u64)>) -> Result<()> + 'a;

/// What is done with an archive.
pub struct Work<'a> {
    /// The job and batch that it has to be of.
    pub job: Option<(String, u64)>,
    /// What the spool knows of it.
    pub recorded: Option<&'a mut Recorded<'a>>,
    /// What is recorded is every file that is right: another one has failed when it was written,
    /// and `take` does not get it.
    pub has_all: bool,
    /// Where it ends, if it could not be closed.
    pub cut: Option<Cut>,
    /// Is told whose archive it is, as far as its beginning says, before anything else.
    pub begun: &'a mut Begun<'a>,
    /// Gets every file. What it leaves of the content is read all the same.
    pub take: &'a mut dyn FnMut(&Member, &mut dyn Read) -> Result<()>,
    /// Is told what is wrong.
    pub tell: &'a mut dyn FnMut(Finding) -> Result<()>,
}

/// What an archive came to.
#[derive(Debug, Default)]
pub struct Walked {
    /// Whose it is.
    pub job: Option<(String, u64)>,
    /// Files in it.
    pub files: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Files that are as their sums say.
    pub summed: u64,
    /// Whether it has sums.
    pub has_sums: bool,
    /// Whether files were compared with what the spool knows.
    pub is_recorded: bool,
    /// What was wrong.
    pub findings: u64,
}

/// Whether two names are one, as programs write it.
pub fn is_same_name(a: &[u8], b: &[u8]) -> bool {
    fn plain(name: &[u8]) -> &[u8] {
        let mut name = name;
        while let Some(rest) = name.strip_prefix(b"/").or_else(|| name.strip_prefix(b"./")) {
            name = rest;
        }
        name
    }
    plain(a) == plain(b)
}

/// Content that is summed up on its way.
struct Summing<R> {
    input: R,
    summer: Summer,
    bytes: u64,
}

impl<R: Read> Read for Summing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.input.read(buffer)?;
        self.summer.add(buffer.get(..len).unwrap_or_default());
        self.bytes += len as u64;
        Ok(len)
    }
}

/// Gives a file's content to `take` and reads what that leaves: sum and length.
pub fn take_content<R: Read>(
    reader: &mut Reader<R>,
    member: &Member,
    take: &mut dyn FnMut(&Member, &mut dyn Read) -> Result<()>,
) -> Result<std::result::Result<(Sum, u64), Error>> {
    let mut content = Summing { input: Content(reader), summer: Summer::default(), bytes: 0 };
    take(member, &mut content)?;
    let mut buffer = [0; 64 << 10];
    loop {
        match content.read(&mut buffer) {
            Ok(0) => return Ok(Ok((content.summer.sum(), content.bytes))),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Ok(Err(unwrapped(e))),
        }
    }
}

/// The error that a stream of ours has given.
pub fn unwrapped(error: io::Error) -> Error {
    match error.downcast::<Error>() {
        Ok(own) => own,
        Err(other) => Error::io("reading an archive", other),
    }
}

/// Reads an archive from its beginning to its filemark.
pub fn walk(file: &mut TapeFile<'_, '_>, work: Work<'_>) -> Result<Walked> {
    let walked = Walked { is_recorded: work.recorded.is_some(), ..Walked::default() };
    let mut walk = Walk { work, walked, next: None, files: Some(Spill::new()), tries: 0 };
    walk.advance()?;
    let mut from = 0;
    while let Some(next) = walk.read_from(file, from)? {
        from = next;
    }
    while let Some((at, path)) = walk.next.take() {
        walk.missing(at, path)?;
        walk.advance()?;
    }
    Ok(walk.walked)
}

struct Walk<'a> {
    work: Work<'a>,
    walked: Walked,
    /// The next one that is recorded.
    next: Option<(u64, Vec<u8>)>,
    /// Every regular file that was read and can have a sum: position, sum of its content, name.
    files: Option<Spill>,
    tries: u32,
}

impl Walk<'_> {
    fn advance(&mut self) -> Result<()> {
        self.next = match &mut self.work.recorded {
            Some(recorded) => recorded()?,
            None => None,
        };
        Ok(())
    }

    fn tell(&mut self, at: u64, path: Option<Vec<u8>>, error: Error) -> Result<()> {
        let about = if path.is_some() { About::Lost } else { About::Archive };
        self.tell_of(about, at, path, error)
    }

    fn tell_of(
        &mut self,
        about: About,
        at: u64,
        path: Option<Vec<u8>>,
        error: Error,
    ) -> Result<()> {
        self.walked.findings += 1;
        (self.work.tell)(Finding { about, at, path, error })
    }

    /// Tells of a file that was not whole when it was written: nothing is wrong with the archive.
    fn partial(&mut self, at: u64, path: Vec<u8>) -> Result<()> {
        let error = Error::new(ErrorKind::Io, "it was not whole when it was written");
        (self.work.tell)(Finding { about: About::Partial, at, path: Some(path), error })
    }

    fn missing(&mut self, at: u64, path: Vec<u8>) -> Result<()> {
        self.tell(at, Some(path), Error::corrupt("it is not there, where it was written"))
    }

    /// Reads from a member on; gives the position of one from which it may go on behind damage.
    fn read_from(&mut self, file: &mut TapeFile<'_, '_>, from: u64) -> Result<Option<u64>> {
        let mut reader = Reader::at(&mut *file, from);
        let found = self.members(&mut reader, from == 0);
        let at = reader.position();
        match found? {
            Ok(()) => {
                match self.work.cut.take() {
                    Some(cut) if at >= cut.at => self.kept_sums(&cut)?,
                    _ => self.end(file)?,
                }
                Ok(None)
            }
            Err(e) => {
                self.tell(at, None, e)?;
                self.resume(file, at)
            }
        }
    }

    /// Where to go on behind damage, and goes there.
    fn resume(&mut self, file: &mut TapeFile<'_, '_>, damage: u64) -> Result<Option<u64>> {
        while let Some((at, path)) = self.next.take() {
            self.tries += 1;
            if at > damage && self.tries <= TRIES_MAX && file.seek_to(at).is_ok() {
                self.next = Some((at, path));
                return Ok(Some(at));
            }
            self.missing(at, path)?;
            self.advance()?;
        }
        Ok(None)
    }

    /// Reads members up to the trailer, or to where there is nothing good any more. Inside, what is
    /// wrong with the archive.
    fn members<R: Read>(
        &mut self,
        reader: &mut Reader<R>,
        is_start: bool,
    ) -> Result<std::result::Result<(), Error>> {
        let mut pending = None;
        if is_start {
            let mut head = Head::default();
            let filled = head.fill(reader);
            (self.work.begun)(head.job.as_ref())?;
            if let Err(e) = filled {
                return Ok(Err(e));
            }
            if let (Some(wanted), Some(found)) = (&self.work.job, &head.job)
                && wanted != found
            {
                let message = format!(
                    "the tape file is batch {} of job {}, not batch {} of job {}",
                    found.1, found.0, wanted.1, wanted.0
                );
                return Err(Error::corrupt(message));
            }
            self.walked.job = head.job.or_else(|| self.work.job.clone());
            if let Some(damage) = head.damage {
                self.tell(0, None, damage)?;
            }
            pending = head.member;
        }
        // The first member behind damage has to be the one that is recorded.
        let mut must_match = !is_start;
        loop {
            let is_cut = self.work.cut.as_ref().is_some_and(|it| reader.position() >= it.at);
            let member = match pending.take() {
                Some(member) => member,
                None if is_cut => return Ok(Ok(())),
                None => match reader.next_member() {
                    Ok(Some(member)) => member,
                    Ok(None) => return Ok(Ok(())),
                    Err(e) => return Ok(Err(e)),
                },
            };
            if self.is_sums(&member, reader)? {
                continue;
            }
            let is_named = self.next.as_ref().is_some_and(|it| is_same_name(&it.1, &member.name));
            if must_match && !is_named {
                return Ok(Err(Error::corrupt("what is recorded here is not here")));
            }
            must_match = false;
            self.compare(&member)?;
            let is_match = self.next.as_ref().is_some_and(|it| it.0 == member.position);
            if is_match {
                self.tries = 0;
                self.advance()?;
            }
            let is_regular = member.header.mode & c::S_IFMT == c::S_IFREG;
            let is_partial = is_regular && !is_match && self.work.has_all;
            if is_partial {
                self.partial(member.position, member.name.clone())?;
            }
            let take = match is_partial {
                true => &mut |_: &Member, _: &mut dyn Read| Ok(()),
                false => &mut *self.work.take,
            };
            match take_content(reader, &member, take)? {
                Ok((sum, bytes)) => {
                    self.walked.files += 1;
                    self.walked.bytes += bytes;
                    let has_sum = is_regular && !is_partial;
                    if let Some(files) = self.files.as_mut().filter(|_| has_sum) {
                        files.put(member.position, &[&sum[..], &member.name].concat())?;
                    }
                }
                Err(e) => {
                    let path = Some(member.name.clone());
                    let damage = Error::new(e.kind(), "its content cannot be read");
                    self.tell(member.position, path, damage)?;
                    return Ok(Err(e));
                }
            }
        }
    }

    /// Compares a member with what is recorded up to its place.
    fn compare(&mut self, member: &Member) -> Result<()> {
        while let Some((at, path)) = self.next.take_if(|it| it.0 < member.position) {
            self.missing(at, path)?;
            self.advance()?;
        }
        if let Some((at, path)) = &self.next
            && *at == member.position
            && !is_same_name(path, &member.name)
        {
            let found = Quoted(&member.name);
            let error = Error::corrupt(format!("another one is there: {found}"));
            let (at, path) = (*at, path.clone());
            self.tell(at, Some(path), error)?;
        }
        Ok(())
    }

    /// Whether a member is the batch's sums, which are compared. What is recorded is a file of the
    /// list, whatever its name.
    fn is_sums<R: Read>(&mut self, member: &Member, reader: &mut Reader<R>) -> Result<bool> {
        let job = self.walked.job.as_ref().or(self.work.job.as_ref());
        let is_own = match (job, Own::of(&member.name)) {
            (Some((uuid, number)), Some(Own::Sums(job, batch))) => job == uuid && batch == *number,
            _ => false,
        };
        if !is_own || self.next.as_ref().is_some_and(|it| it.0 == member.position) {
            return Ok(false);
        }
        if let Some(files) = self.files.take() {
            self.sums(member.position, BufReader::new(Content(reader)), files)?;
        }
        Ok(true)
    }

    /// Compares the sums that the spool has kept of an archive without an end.
    fn kept_sums(&mut self, cut: &Cut) -> Result<()> {
        match (text::open(&cut.sums), self.files.take()) {
            (Ok(input), Some(files)) => self.sums(cut.at, input, files),
            _ => Ok(()),
        }
    }

    /// Compares every sum with the file that was read. Files that have none have failed when they
    /// were written, which is told; the others are in the same order.
    fn sums(&mut self, at: u64, input: impl BufRead, files: Spill) -> Result<()> {
        self.walked.has_sums = true;
        let mut files = Window { files: files.read()?, near: VecDeque::new(), bytes: 0 };
        let mut lines = Lines::new(input);
        let mut told = 0;
        loop {
            let line = match lines.advance() {
                Ok(true) => sums::parse(lines.line()),
                Ok(false) => break,
                Err(e) => Err(e),
            };
            let (sum, name) = match line {
                Ok(it) => it,
                Err(e) => {
                    self.tell(at, None, e.context("the sums of the batch"))?;
                    return Ok(());
                }
            };
            let Some(before) = files.look_for(&name)? else {
                // What is recorded was told.
                told += u64::from(!self.walked.is_recorded);
                if !self.walked.is_recorded && told <= TOLD_MAX {
                    let error = Error::corrupt("the sums have it and the archive has not");
                    self.tell(at, Some(name), error)?;
                }
                continue;
            };
            for _ in 0..before {
                self.without_sum(files.next_file()?)?;
            }
            match files.next_file()? {
                Some(file) if file.sum == sum => self.walked.summed += 1,
                Some(file) => {
                    let error = Error::corrupt("its content is not what was written");
                    self.tell_of(About::Sum, file.at, Some(name), error)?;
                }
                None => {}
            }
        }
        while let Some(file) = files.next_file()? {
            self.without_sum(Some(file))?;
        }
        Ok(())
    }

    /// A file has no sum. One that is recorded has one: then others of its name are lost.
    fn without_sum(&mut self, file: Option<Summed>) -> Result<()> {
        match file {
            Some(file) if !self.work.has_all => self.partial(file.at, file.name),
            _ => Ok(()),
        }
    }

    /// Behind the trailer: zeros, then a filemark.
    fn end(&mut self, file: &mut TapeFile<'_, '_>) -> Result<()> {
        let at = file.offset();
        match file.drain() {
            Ok((_, true)) => {}
            Ok((count, false)) => {
                let what = format!("{count} bytes behind the trailer are not zeros");
                self.tell(at, None, Error::corrupt(what))?;
            }
            Err(e) => self.tell(at, None, e)?,
        }
        if file.end() == Some(End::EndOfData) {
            let what = "the tape ends without the filemark that closes a tape file";
            self.tell(file.offset(), None, Error::corrupt(what))?;
        }
        Ok(())
    }
}

/// Files that were read, of which those next in turn are at hand.
struct Window {
    files: Spilled,
    near: VecDeque<Summed>,
    /// Of their names.
    bytes: usize,
}

/// A file that was read.
struct Summed {
    at: u64,
    sum: Sum,
    name: Vec<u8>,
}

impl Window {
    /// How many files come before the next one of this name, if that is near.
    fn look_for(&mut self, name: &[u8]) -> Result<Option<usize>> {
        let mut at = self.near.iter().position(|it| it.name == name);
        while at.is_none() && self.near.len() < WINDOW && self.bytes < WINDOW_BYTES {
            let Some(file) = self.read()? else { break };
            at = (file.name == name).then_some(self.near.len());
            self.bytes += file.name.len();
            self.near.push_back(file);
        }
        Ok(at)
    }

    /// The next file.
    fn next_file(&mut self) -> Result<Option<Summed>> {
        let Some(file) = self.near.pop_front() else { return self.read() };
        self.bytes -= file.name.len();
        Ok(Some(file))
    }

    fn read(&mut self) -> Result<Option<Summed>> {
        let Some((at, item)) = self.files.next_item()? else { return Ok(None) };
        let bad = || Error::corrupt("a list of files that was written down is not what it was");
        let (sum, name) = item.split_first_chunk().ok_or_else(bad)?;
        Ok(Some(Summed { at, sum: *sum, name: name.to_vec() }))
    }
}
