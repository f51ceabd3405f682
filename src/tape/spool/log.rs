//! Logs of jobs and tapes: lines that are only added.
//!
//! A last line without its newline was being written when its writer died. Readers pass over it,
//! and the next writer cuts it off, so no half of a line is ever taken for a whole one.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::text::{self, Lines, parse_number, split_word};
use crate::error::{Error, Result};
use crate::sys::{self, quoted};

/// How much of a log's end is looked at at once.
const TAIL_BYTES: usize = 64 << 10;

/// A line of a job's log.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The lines below say what each number is.
pub enum LogLine<'a> {
    /// `J <job> begin|end <time>`
    Job { job: &'a [u8], is_begin: bool, time: i64 },
    /// `T <tape> filenum <number> position <position>`: what follows goes there.
    Tape { tape: &'a [u8], filenum: u64, position: u64 },
    /// `B <number> begin <time> files <count>`
    BatchBegin { number: u64, time: i64, files: u64 },
    /// `F <position> <path>`: a file is in the archive.
    File { position: u64, path: &'a [u8] },
    /// `E <path>`: a file is not.
    Failed { path: &'a [u8] },
    /// `B <number> end <time> errors <count>`
    BatchEnd { number: u64, time: i64, errors: u64 },
    /// Whatever else: the original program adds what afio says, behind `* `.
    Other(&'a [u8]),
}

impl<'a> LogLine<'a> {
    /// Reads a line.
    pub fn parse(line: &'a [u8]) -> LogLine<'a> {
        LogLine::parse_known(line).unwrap_or(LogLine::Other(line))
    }

    fn parse_known(line: &'a [u8]) -> Option<LogLine<'a>> {
        let (kind, rest) = split_word(line);
        let words: Vec<&[u8]> = rest.splitn(5, |it| *it == b' ').collect();
        Some(match (kind, &*words) {
            (b"J", [job, what @ (b"begin" | b"end"), time]) => {
                let is_begin = *what == b"begin";
                LogLine::Job { job, is_begin, time: parse_number(time)? }
            }
            (b"T", _) => {
                // From its end, because the tape's label may have blanks.
                let mut words = rest.rsplitn(5, |it| *it == b' ');
                let (position, p) = (words.next()?, words.next()?);
                let (filenum, f) = (words.next()?, words.next()?);
                if (f, p) != (b"filenum", b"position") {
                    return None;
                }
                LogLine::Tape {
                    tape: words.next().filter(|it| !it.is_empty())?,
                    filenum: parse_number(filenum)?,
                    position: parse_number(position)?,
                }
            }
            (b"B", [number, b"begin", time, b"files", files]) => LogLine::BatchBegin {
                number: parse_number(number)?,
                time: parse_number(time)?,
                files: parse_number(files)?,
            },
            (b"B", [number, b"end", time, b"errors", errors]) => LogLine::BatchEnd {
                number: parse_number(number)?,
                time: parse_number(time)?,
                errors: parse_number(errors)?,
            },
            (b"F", _) => {
                let (position, path) = split_word(rest);
                let path = Some(path).filter(|it| !it.is_empty())?;
                LogLine::File { position: parse_number(position)?, path }
            }
            (b"E", _) => LogLine::Failed { path: Some(rest).filter(|it| !it.is_empty())? },
            _ => return None,
        })
    }

    /// The line, without its newline.
    pub fn to_line(&self) -> Vec<u8> {
        match self {
            LogLine::Job { job, is_begin, time } => {
                let what = if *is_begin { "begin" } else { "end" };
                [b"J ", *job, format!(" {what} {time}").as_bytes()].concat()
            }
            LogLine::Tape { tape, filenum, position } => {
                [b"T ", *tape, format!(" filenum {filenum} position {position}").as_bytes()]
                    .concat()
            }
            LogLine::BatchBegin { number, time, files } => {
                format!("B {number} begin {time} files {files}").into_bytes()
            }
            LogLine::File { position, path } => {
                [format!("F {position} ").as_bytes(), path].concat()
            }
            LogLine::Failed { path } => [b"E ", *path].concat(),
            LogLine::BatchEnd { number, time, errors } => {
                format!("B {number} end {time} errors {errors}").into_bytes()
            }
            LogLine::Other(line) => line.to_vec(),
        }
    }
}

/// A line of a tape's log: `<filenum> <position> <job> <batch>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapeFile {
    /// Number of the file on the tape.
    pub filenum: u64,
    /// The drive's number of its first block.
    pub position: u64,
    /// The job.
    pub job: String,
    /// The batch's number within it.
    pub batch: u64,
}

impl TapeFile {
    /// Reads a line; `None` if it is none.
    pub fn parse(line: &[u8]) -> Option<TapeFile> {
        let words: Vec<&[u8]> = line.splitn(5, |it| *it == b' ').collect();
        let [filenum, position, job, batch] = &*words else { return None };
        Some(TapeFile {
            filenum: parse_number(filenum)?,
            position: parse_number(position)?,
            job: String::from_utf8(job.to_vec()).ok().filter(|it| !it.is_empty())?,
            batch: parse_number(batch)?,
        })
    }

    /// The line, without its newline.
    pub fn to_line(&self) -> Vec<u8> {
        format!("{} {} {} {}", self.filenum, self.position, self.job, self.batch).into_bytes()
    }
}

/// Calls `each` with every whole line of a log; none if there is no log.
pub fn each_line(path: &Path, each: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    if !super::lock::exists(path)? {
        return Ok(());
    }
    lines_of(text::open(path)?, each).map_err(|e| e.context(quoted(path)))
}

/// Calls `each` with every whole line.
pub fn lines_of(input: impl BufRead, each: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut lines = Lines::new(input);
    while lines.advance()? {
        if lines.has_end() {
            each(lines.line())?;
        }
    }
    Ok(())
}

/// Calls `each` with the whole lines of a log from a byte on that a line begins at, and with the
/// byte behind each; gives that of the last one. A log that is not there has none.
pub fn lines_from(
    path: &Path,
    from: u64,
    each: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> Result<u64> {
    let Some(mut input) = open_to_read(path)? else { return Ok(from) };
    let failed = |e| Error::io(format!("reading {}", quoted(path)), e);
    input.seek(SeekFrom::Start(from)).map_err(failed)?;
    let (mut lines, mut end) = (Lines::new(input), from);
    while lines.advance().map_err(|e| e.context(quoted(path)))? && lines.has_end() {
        end += lines.line().len() as u64 + 1;
        each(end, lines.line())?;
    }
    Ok(end)
}

/// Bytes of the whole lines of a log; 0 if it is not there.
pub fn whole_bytes(path: &Path) -> Result<u64> {
    let Some(input) = open_to_read(path)? else { return Ok(0) };
    let file = input.into_inner();
    let end = file.metadata().and_then(|it| end_of_lines(&file, it.len()));
    end.map_err(|e| Error::io(format!("reading {}", quoted(path)), e))
}

/// Adds to a log. Only for who has the lock of what it belongs to.
pub struct LogWriter {
    path: PathBuf,
    out: BufWriter<File>,
}

impl LogWriter {
    /// Opens a log, which need not be there, and cuts off a line that was never finished.
    pub fn open(path: &Path) -> Result<LogWriter> {
        let failed = |e| Error::io(format!("opening {}", quoted(path)), e);
        let mut options = sys::private_file();
        options.read(true).append(true).create(true);
        let file = options.open(path).map_err(failed)?;
        // Also if it was there: who made it may have died before this.
        sys::sync_dir(path.parent().unwrap_or(Path::new(".")))?;
        let len = file.metadata().map_err(failed)?.len();
        let end = end_of_lines(&file, len).map_err(failed)?;
        if end < len {
            file.set_len(end).map_err(failed)?;
        }
        Ok(LogWriter { path: path.to_path_buf(), out: BufWriter::with_capacity(64 << 10, file) })
    }

    /// Adds a line.
    pub fn put(&mut self, line: &[u8]) -> Result<()> {
        if line.contains(&b'\n') || line.len() > text::LINE_BYTES_MAX {
            return Err(Error::usage("a line of a log has a newline in it, or is too long"));
        }
        let failed = |e| Error::io(format!("writing {}", quoted(&self.path)), e);
        self.out.write_all(line).and_then(|()| self.out.write_all(b"\n")).map_err(failed)
    }

    /// Makes everything that was added last.
    pub fn sync(&mut self) -> Result<()> {
        let synced = self.out.flush().and_then(|()| self.out.get_ref().sync_all());
        synced.map_err(|e| Error::io(format!("writing {}", quoted(&self.path)), e))
    }
}

/// Where the last whole line ends.
fn end_of_lines(file: &File, len: u64) -> std::io::Result<u64> {
    let mut end = len;
    let mut buffer = [0; TAIL_BYTES];
    while end > 0 {
        let start = end.saturating_sub(TAIL_BYTES as u64);
        let part = usize::try_from(end - start).unwrap_or(TAIL_BYTES);
        let part = buffer.get_mut(..part).unwrap_or_default();
        file.read_exact_at(part, start)?;
        if let Some(at) = part.iter().rposition(|it| *it == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// Reads a log that may be there.
pub fn open_to_read(path: &Path) -> Result<Option<BufReader<File>>> {
    if super::lock::exists(path)? { text::open(path).map(Some) } else { Ok(None) }
}
