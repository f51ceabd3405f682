//! Receipts: what the user of a job gets to know of each batch.
//!
//! A receipt's lines may come in any order, and there may be as many as a batch has files: they are
//! told one by one. A receipt of ours says how many files it is of, so one that was cut short is
//! known as such.

use std::fs::File;
use std::io::{BufRead, Seek, SeekFrom, Write};
use std::path::Path;

use super::batch::{Batch, Outcome};
use super::lock::LONG_PATIENCE;
use super::text::{self, Fields, Lines, parse_number, split_word};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock::LockedFile;
use crate::sys::{self, quoted};

/// What a file of receipts has, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Receipt<'a> {
    /// A receipt begins.
    Begin,
    /// A line `key value`.
    Field(&'a [u8], &'a [u8]),
    /// A file is in the archive at this position.
    Ok(u64, &'a [u8]),
    /// A file is not.
    Fail(&'a [u8]),
    /// The receipt ends.
    End {
        /// Whether it is of as many files as it says; `None` if it does not say.
        is_whole: Option<bool>,
    },
}

/// Reads receipts.
pub struct Receipts<R> {
    lines: Lines<R>,
    state: State,
    files: u64,
    wanted: Option<u64>,
    is_cut: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Between,
    /// A line has been read that is the first of a receipt, and has to be told yet.
    First,
    Inside,
    /// In a section of another kind: the original program adds the job and its log.
    Passing,
    /// The last line was the last.
    Over,
}

impl<R: BufRead> Receipts<R> {
    /// The receipts of `input`.
    pub fn new(input: R) -> Receipts<R> {
        Receipts {
            lines: Lines::new(input),
            state: State::Between,
            files: 0,
            wanted: None,
            is_cut: false,
        }
    }

    /// What comes next.
    pub fn next_part(&mut self) -> Result<Option<Receipt<'_>>> {
        loop {
            if self.state != State::First && !self.advance()? {
                if self.state != State::Inside {
                    self.state = State::Over;
                    return Ok(None);
                }
                self.state = State::Over;
                return Ok(Some(self.end()));
            }
            let is_blank = self.lines.line().is_empty();
            match self.state {
                State::Inside if is_blank => {
                    self.state = State::Between;
                    return Ok(Some(self.end()));
                }
                State::Between if !is_blank => {
                    (self.files, self.wanted, self.is_cut) = (0, None, false);
                    self.state = match self.lines.line() {
                        b"%receipt" => State::Inside,
                        line if line.starts_with(b"%") => State::Passing,
                        _ => State::First,
                    };
                    if self.state != State::Passing {
                        return Ok(Some(Receipt::Begin));
                    }
                }
                State::First | State::Inside => {
                    self.state = State::Inside;
                    return self.line().map(Some);
                }
                State::Passing if is_blank => self.state = State::Between,
                State::Passing | State::Between | State::Over => {}
            }
        }
    }

    fn advance(&mut self) -> Result<bool> {
        Ok(self.state != State::Over && self.lines.advance()?)
    }

    fn end(&self) -> Receipt<'static> {
        let is_cut = self.is_cut || !self.lines.has_end();
        Receipt::End { is_whole: self.wanted.map(|it| it == self.files && !is_cut) }
    }

    fn line(&mut self) -> Result<Receipt<'_>> {
        let (key, value) = split_word(self.lines.line());
        match key {
            b"ok" | b"fail" => self.files += 1,
            b"files" => self.wanted = parse_number(value),
            b"cut" => self.is_cut = true,
            _ => {}
        }
        let (key, value) = split_word(self.lines.line());
        let (position, path) = split_word(value);
        match key {
            b"ok" if path.is_empty() => Err(self.lines.error("names no position or no file")),
            b"ok" => match parse_number(position) {
                Some(position) => Ok(Receipt::Ok(position, path)),
                None => Err(self.lines.error("has no position")),
            },
            b"fail" if value.is_empty() => Err(self.lines.error("names no file")),
            b"fail" => Ok(Receipt::Fail(value)),
            _ => Ok(Receipt::Field(key, value)),
        }
    }
}

fn open_to_append(path: &Path) -> Result<File> {
    let mut options = sys::private_file();
    let file = options.read(true).append(true).create(true).open(path);
    file.map_err(|e| Error::io(format!("writing {}", quoted(path)), e))
}

/// Refuses a path at which no receipts can be written. Makes the file if it is not there.
pub fn try_open(path: &Path) -> Result<()> {
    open_to_append(path).map(drop)
}

/// Adds the receipt of a completed batch, whose ID this is and which `open` opens, to the file of
/// receipts at `path`, unless it is there whole: so this can be done again after a crash. The lock
/// of the job is held.
pub fn append<R: BufRead>(
    path: &Path,
    id: &str,
    open: &mut dyn FnMut() -> Result<Batch<R>>,
) -> Result<()> {
    let failed = |e| Error::io(format!("writing {}", quoted(path)), e);
    let mut batch = open()?;
    let Some(summary) = batch.summary()? else {
        return Err(Error::usage(format!("batch {id} has not been completed: it has no receipt")));
    };
    let file = open_to_append(path)?;
    // Other drives may have the same file for their receipts.
    let Some(file) = LockedFile::within(file, LONG_PATIENCE).map_err(failed)? else {
        let what = format!("another process writes {} and does not come to its end", quoted(path));
        return Err(Error::new(ErrorKind::Locked, what));
    };
    if has_receipt(text::open(path)?, id, &summary)? {
        return Ok(());
    }
    // What others say of how many there are need not be so.
    let (mut files, mut counted) = (0u64, open()?);
    while let Some(result) = counted.next_result()? {
        files += u64::from(matches!(result, Outcome::Ok(..) | Outcome::Fail(..)));
    }
    let len = (&*file).seek(SeekFrom::End(0)).map_err(failed)?;
    // Whatever is there ends with a blank line, also if its writer died.
    let mut out = std::io::BufWriter::with_capacity(64 << 10, &*file);
    let mut put =
        |parts: &[&[u8]]| parts.iter().try_for_each(|it| out.write_all(it)).map_err(failed);
    let separator = separator(path, len)?;
    put(&[separator, b"%receipt\nbatch ", id.as_bytes(), b"\n"])?;
    put(&[b"files ", files.to_string().as_bytes(), b"\n"])?;
    for (key, value) in summary.iter() {
        put(&[key, b" ", value, b"\n"])?;
    }
    while let Some(result) = batch.next_result()? {
        match result {
            Outcome::Ok(position, path) => {
                put(&[b"ok ", position.to_string().as_bytes(), b" ", path, b"\n"])?;
            }
            Outcome::Fail(_, path) => put(&[b"fail ", path, b"\n"])?,
            Outcome::Note(..) | Outcome::Other(_) => {}
        }
    }
    put(&[b"\n"])?;
    out.flush().map_err(failed)?;
    drop(out);
    file.sync_all().map_err(failed)?;
    match path.parent().filter(|it| !it.as_os_str().is_empty()) {
        Some(dir) if len == 0 => sys::sync_dir(dir),
        _ => Ok(()),
    }
}

fn separator(path: &Path, len: u64) -> Result<&'static [u8]> {
    use std::os::unix::fs::FileExt;
    let mut tail = [b'\n'; 2];
    let at = len.saturating_sub(2);
    let part = usize::try_from(len - at).unwrap_or(0);
    let file = text::open(path)?.into_inner();
    let end = tail.get_mut(2 - part..).unwrap_or_default();
    file.read_exact_at(end, at).map_err(|e| Error::io(format!("reading {}", quoted(path)), e))?;
    Ok(match tail {
        [b'\n', b'\n'] => b"",
        [_, b'\n'] => b"\n",
        // Half a line: who reads the receipt that it belongs to must not take it for a whole one.
        _ => b"\ncut short\n\n",
    })
}

/// Whether there is a whole receipt of this batch on this file of this tape.
fn has_receipt(input: impl BufRead, id: &str, summary: &Fields) -> Result<bool> {
    let mut receipts = Receipts::new(input);
    let wanted = [Some(id.as_bytes()), summary.get("tape"), summary.get("filenum")];
    let (mut found, mut is_bad) = ([false; 3], false);
    loop {
        let part = match receipts.next_part() {
            Ok(Some(part)) => part,
            Ok(None) => return Ok(false),
            // A line that was cut short: its receipt does not count, and the next ones do.
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                is_bad = true;
                continue;
            }
            Err(e) => return Err(e),
        };
        match part {
            Receipt::Begin => (found, is_bad) = ([false; 3], false),
            Receipt::Field(key, value) => {
                for ((name, is), wanted) in
                    ["batch", "tape", "filenum"].iter().zip(&mut found).zip(wanted)
                {
                    *is |= key == name.as_bytes() && Some(value) == wanted;
                }
            }
            Receipt::End { is_whole } => {
                if found == [true; 3] && is_whole != Some(false) && !is_bad {
                    return Ok(true);
                }
            }
            Receipt::Ok(..) | Receipt::Fail(_) => {}
        }
    }
}
