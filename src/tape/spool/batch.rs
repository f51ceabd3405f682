//! Batches: what is to be written together, and what became of it.
//!
//! A batch file is read from its beginning to its end, in the order of its sections, and never held
//! in memory: neither its list of files nor its results.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use super::text::{self, Fields, Lines, NewFile, Sections, parse_number, split_word};
use crate::error::{Error, Result};
use crate::sys::quoted;

/// How far a batch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BatchStatus {
    /// It has not been completed: `b`.
    Pending,
    /// It has been written to tape: `w`.
    Written,
    /// It has been read from tape: `r`.
    Read,
}

impl BatchStatus {
    /// The letter that begins the name of its file.
    pub fn letter(self) -> char {
        match self {
            BatchStatus::Pending => 'b',
            BatchStatus::Written => 'w',
            BatchStatus::Read => 'r',
        }
    }
}

/// A batch of a job: its number within it, and how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BatchId {
    /// Counted from 0.
    pub number: u64,
    /// What the name of its file says.
    pub status: BatchStatus,
}

impl BatchId {
    /// The name of its file.
    pub fn file_name(self) -> String {
        format!("{}{}", self.status.letter(), self.number)
    }

    /// Reads the name of a batch file. `@N` is what the original program had in hand when it died:
    /// it is pending.
    pub fn parse(name: &[u8]) -> Option<BatchId> {
        let (letter, digits) = name.split_first()?;
        let status = match letter {
            b'b' | b'@' => BatchStatus::Pending,
            b'w' => BatchStatus::Written,
            b'r' => BatchStatus::Read,
            _ => return None,
        };
        let has_zeros = digits.len() > 1 && digits.starts_with(b"0");
        let number = parse_number(digits).filter(|_| !has_zeros)?;
        Some(BatchId { number, status })
    }
}

/// What became of one file of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// It is in the archive at this position.
    Ok(u64, &'a [u8]),
    /// It is not, for the reason that has this error number.
    Fail(i32, &'a [u8]),
    /// It is, and the archive does not say all of it; the word tells what.
    Note(&'a [u8], &'a [u8]),
    /// A line of another kind.
    Other(&'a [u8]),
}

impl<'a> Outcome<'a> {
    /// Reads a line of the results; `None` if it begins as a known one and does not go on so.
    pub fn parse(line: &'a [u8]) -> Option<Outcome<'a>> {
        let (kind, rest) = split_word(line);
        let (value, path) = split_word(rest);
        let has_path = !path.is_empty();
        Some(match kind {
            b"ok" => Outcome::Ok(parse_number(value).filter(|_| has_path)?, path),
            b"fail" => Outcome::Fail(parse_number(value).filter(|_| has_path)?, path),
            b"note" if has_path => Outcome::Note(value, path),
            b"note" => return None,
            _ => Outcome::Other(line),
        })
    }
}

/// Reads a batch.
pub struct Batch<R> {
    sections: Sections<R>,
    fields: Fields,
    at: At,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd)]
enum At {
    Files,
    Beyond,
    Results,
    End,
}

impl Batch<BufReader<File>> {
    /// Opens a batch file.
    pub fn open(path: &Path) -> Result<Batch<BufReader<File>>> {
        Batch::read(text::open(path)?).map_err(|e| e.context(quoted(path)))
    }
}

impl<R: BufRead> Batch<R> {
    /// Reads a batch up to its list of files.
    pub fn read(input: R) -> Result<Batch<R>> {
        let mut sections = Sections::new(input);
        if sections.next_section()?.as_deref() != Some(b"batch") {
            return Err(Error::corrupt("a batch does not begin with %batch"));
        }
        let fields = sections.fields()?;
        if sections.next_section()?.as_deref() != Some(b"files") {
            return Err(Error::corrupt("a batch has no %files behind %batch"));
        }
        Ok(Batch { sections, fields, at: At::Files })
    }

    /// The fields of `%batch`.
    pub fn fields(&self) -> &Fields {
        &self.fields
    }

    /// The next file of the list.
    pub fn next_file(&mut self) -> Result<Option<&[u8]>> {
        match self.at {
            At::Files => self.sections.next_line(),
            _ => Ok(None),
        }
    }

    /// The summary, once; nothing before it is read after this.
    pub fn summary(&mut self) -> Result<Option<Fields>> {
        if self.at >= At::Results || !self.find(b"summary")? {
            return Ok(None);
        }
        self.sections.fields().map(Some)
    }

    /// The next result; nothing before the results is read after this.
    pub fn next_result(&mut self) -> Result<Option<Outcome<'_>>> {
        if self.at < At::Results {
            self.at = if self.find(b"results")? { At::Results } else { At::End };
        }
        if self.at != At::Results {
            return Ok(None);
        }
        let is_bad = match self.sections.next_line()? {
            Some(line) => Outcome::parse(line).is_none(),
            None => return Ok(None),
        };
        if is_bad {
            return Err(self.sections.error("is no result"));
        }
        Ok(Outcome::parse(self.sections.line()))
    }

    fn find(&mut self, name: &[u8]) -> Result<bool> {
        self.at = At::Beyond;
        while let Some(found) = self.sections.next_section()? {
            if found == name {
                return Ok(true);
            }
            if name == b"summary" && found == b"results" {
                return Err(Error::corrupt("a batch has %results and no %summary before it"));
            }
        }
        Ok(false)
    }
}

/// What became of a batch, as far as it is the same for all files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// When it was begun and when it ended.
    pub begin: i64,
    /// See `begin`.
    pub end: i64,
    /// The tape.
    pub tape: Vec<u8>,
    /// Number of the file on the tape.
    pub filenum: u64,
}

/// The results of a batch as they come in; they go to disk, not into memory.
pub struct Results {
    file: NewFile,
    counts: Counts,
    more: Fields,
}

/// How many there are.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    errors: u64,
    count: u64,
    notes: u64,
}

/// A place in the results, to which they can be cut.
#[derive(Clone, Copy, Debug)]
pub struct ResultsMark {
    bytes: u64,
    counts: Counts,
}

impl Results {
    pub(super) fn create(path: &Path) -> Result<Results> {
        let (file, counts) = (NewFile::create(path)?, Counts::default());
        Ok(Results { file, counts, more: Fields::default() })
    }

    /// A file is in the archive.
    pub fn ok(&mut self, position: u64, path: &[u8]) -> Result<()> {
        self.counts.count += 1;
        self.put(&[b"ok ", position.to_string().as_bytes(), b" ", path])
    }

    /// A file is not in the archive as it should be.
    pub fn fail(&mut self, errno: i32, path: &[u8]) -> Result<()> {
        self.counts.errors += 1;
        self.counts.count += 1;
        self.put(&[b"fail ", errno.unsigned_abs().to_string().as_bytes(), b" ", path])
    }

    /// The archive does not say all of a file.
    pub fn note(&mut self, what: &str, path: &[u8]) -> Result<()> {
        self.counts.notes += 1;
        self.put(&[b"note ", what.as_bytes(), b" ", path])
    }

    /// Files that have failed.
    pub fn errors(&self) -> u64 {
        self.counts.errors
    }

    /// Files, those that have failed too.
    pub fn count(&self) -> u64 {
        self.counts.count
    }

    /// Adds a field to the summary, behind those that each has.
    pub fn set(&mut self, key: &str, value: impl AsRef<[u8]>) -> Result<()> {
        self.more.set(key, value)
    }

    /// This place.
    pub fn mark(&self) -> ResultsMark {
        ResultsMark { bytes: self.file.bytes(), counts: self.counts }
    }

    /// Takes away what came after a place.
    pub fn cut(&mut self, mark: ResultsMark) -> Result<()> {
        self.counts = mark.counts;
        self.file.cut(mark.bytes)
    }

    /// Calls `each` with every result so far.
    pub fn each(&mut self, each: &mut dyn FnMut(Outcome<'_>) -> Result<()>) -> Result<()> {
        let mut lines = Lines::new(self.file.look()?);
        while lines.advance()? {
            match Outcome::parse(lines.line()) {
                Some(outcome) => each(outcome)?,
                None => return Err(lines.error("is no result")),
            }
        }
        Ok(())
    }

    fn put(&mut self, parts: &[&[u8]]) -> Result<()> {
        if parts.last().is_none_or(|it| it.is_empty() || it.contains(&b'\n')) {
            // No list has such a name, so none can come from one.
            return Err(Error::usage("a result of a file without a name, or with a newline in it"));
        }
        self.file.put_line(parts)
    }

    /// Writes the completed batch `to`: what is in `from`, this summary and these results. With a
    /// prefix they have sections of their own, and the earlier ones stay.
    pub(super) fn complete(
        self,
        from: &Path,
        to: &Path,
        summary: &Summary,
        prefix: &str,
    ) -> Result<()> {
        let names = ["summary", "results"].map(|it| format!("{prefix}{it}").into_bytes());
        let (errors, notes) = (self.counts.errors.to_string(), self.counts.notes);
        let mut fields = Fields::default();
        fields.set("begin", summary.begin.to_string())?;
        fields.set("end", summary.end.to_string())?;
        fields.set("tape", &summary.tape)?;
        fields.set("filenum", summary.filenum.to_string())?;
        fields.set("errors", errors)?;
        if notes > 0 {
            fields.set("notes", notes.to_string())?;
        }
        for (key, value) in self.more.iter() {
            fields.set(&String::from_utf8_lossy(key), value)?;
        }
        let (mut lines, _kept) = self.file.reread()?;
        let mut new = NewFile::create(to)?;
        let [summary, results] = &names;
        copy_sections(from, &mut new, &[summary, results])?;
        new.put_line(&[b"\n%", summary])?;
        new.put(&fields.to_text())?;
        new.put_line(&[b"\n%", results])?;
        loop {
            let part = lines.fill_buf().map_err(|e| Error::io("reading results", e))?;
            if part.is_empty() {
                break;
            }
            new.put(part)?;
            let len = part.len();
            lines.consume(len);
        }
        new.commit(to)
    }
}

/// Copies every section but these; a blank line is between two.
pub(super) fn copy_sections(from: &Path, to: &mut NewFile, but: &[&[u8]]) -> Result<()> {
    let mut sections = Sections::new(text::open(from)?);
    let mut is_first = true;
    while let Some(name) = sections.next_section()? {
        if but.contains(&&*name) {
            continue;
        }
        if !is_first {
            to.put(b"\n")?;
        }
        is_first = false;
        to.put_line(&[b"%", &name])?;
        while let Some(line) = sections.next_line()? {
            to.put_line(&[line])?;
        }
    }
    Ok(())
}
