//! Text files of the spool: lines and sections, fields, and files that are replaced whole.
//!
//! Lines are bytes. No list is held in memory: lines are read one by one, and what is rewritten is
//! copied. What is not known is kept as it stands.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Quoted, Result};
use crate::sys::{self, quoted};

/// Longest line, in bytes: a path of the longest kind and what stands before it.
pub const LINE_BYTES_MAX: usize = 64 << 10;
/// Most fields of a section.
pub const FIELDS_MAX: usize = 10_000;
/// Most bytes in them.
pub const FIELDS_BYTES_MAX: usize = 1 << 20;

/// Reads lines.
pub struct Lines<R> {
    input: R,
    line: Vec<u8>,
    number: u64,
    has_end: bool,
    offset: u64,
}

impl<R: BufRead> Lines<R> {
    /// The lines of `input`.
    pub fn new(input: R) -> Lines<R> {
        Lines { input, line: Vec::new(), number: 0, has_end: true, offset: 0 }
    }

    /// Reads the next line; `false` at the end.
    pub fn advance(&mut self) -> Result<bool> {
        self.line.clear();
        let limit = LINE_BYTES_MAX as u64 + 2;
        let failed = |e| Error::io("reading", e);
        let read = (&mut self.input).take(limit).read_until(b'\n', &mut self.line);
        let read = read.map_err(failed)?;
        if read == 0 {
            return Ok(false);
        }
        self.number += 1;
        self.has_end = self.line.pop_if(|it| *it == b'\n').is_some();
        if self.line.len() > LINE_BYTES_MAX {
            return Err(self.error("is too long"));
        }
        self.offset += read as u64;
        Ok(true)
    }

    /// The line that was read.
    pub fn line(&self) -> &[u8] {
        &self.line
    }

    /// Whether a newline ends it. Where lines are only added, one without was being written when
    /// its writer died.
    pub fn has_end(&self) -> bool {
        self.has_end
    }

    /// Bytes read with the lines so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// An error that names the line.
    pub fn error(&self, what: &str) -> Error {
        let start = self.line.get(..80).unwrap_or(&self.line);
        Error::corrupt(format!("line {} {what}: {}", self.number, Quoted(start)))
    }
}

/// Reads sections: `%name`, lines, and a blank line between two of them. A line that begins with
/// `%` inside of a section is a line of it.
pub struct Sections<R> {
    lines: Lines<R>,
    /// Within a section, and so neither before the first nor behind a blank line.
    is_inside: bool,
}

impl<R: BufRead> Sections<R> {
    /// The sections of `input`.
    pub fn new(input: R) -> Sections<R> {
        Sections { lines: Lines::new(input), is_inside: false }
    }

    /// The name of the next section; what is left of this one is passed over.
    pub fn next_section(&mut self) -> Result<Option<Vec<u8>>> {
        while self.next_line()?.is_some() {}
        while self.lines.advance()? {
            let line = self.lines.line();
            if let Some(name) = line.strip_prefix(b"%") {
                let name = name.to_vec();
                self.is_inside = true;
                return Ok(Some(name));
            }
            if !line.is_empty() {
                return Err(self.lines.error("is in no section"));
            }
        }
        Ok(None)
    }

    /// The next line of this section.
    pub fn next_line(&mut self) -> Result<Option<&[u8]>> {
        self.is_inside = self.is_inside && self.lines.advance()? && !self.lines.line().is_empty();
        Ok(self.is_inside.then(|| self.lines.line()))
    }

    /// The line that was read last.
    pub fn line(&self) -> &[u8] {
        self.lines.line()
    }

    /// The rest of this section, as fields.
    pub fn fields(&mut self) -> Result<Fields> {
        let mut fields = Fields::default();
        while let Some(line) = self.next_line()? {
            if !fields.add_line(line.to_vec()) {
                return Err(self.lines.error("is one too many"));
            }
        }
        Ok(fields)
    }

    /// An error that names the line that was read last.
    pub fn error(&self, what: &str) -> Error {
        self.lines.error(what)
    }
}

/// Lines `key value` in their order; a value may be empty. Lines that begin with `#` are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    lines: Vec<Vec<u8>>,
    bytes: usize,
}

impl Fields {
    fn add_line(&mut self, line: Vec<u8>) -> bool {
        self.bytes += line.len();
        self.lines.push(line);
        self.lines.len() <= FIELDS_MAX && self.bytes <= FIELDS_BYTES_MAX
    }

    /// The value of a key; of the last one, if there are several.
    pub fn get(&self, key: &str) -> Option<&[u8]> {
        self.iter().filter(|it| it.0 == key.as_bytes()).last().map(|it| it.1)
    }

    /// The value of a key as a number.
    pub fn number<N: std::str::FromStr>(&self, key: &str) -> Option<N> {
        parse_number(self.get(key)?)
    }

    /// Every key and value, in their order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let lines = self.lines.iter().filter(|it| !it.starts_with(b"#"));
        lines.map(|it| split_word(it))
    }

    /// Sets a key where it stands, or adds it at the end.
    pub fn set(&mut self, key: &str, value: impl AsRef<[u8]>) -> Result<()> {
        let value = value.as_ref();
        let is_bad_key = key.is_empty() || key.starts_with(['%', '#']);
        if is_bad_key || key.contains(char::is_whitespace) || value.contains(&b'\n') {
            let shown = Quoted(key.as_bytes());
            return Err(Error::usage(format!(
                "{shown} cannot be set: a key has no blanks and no % or # first, a value no newline"
            )));
        }
        let line = [key.as_bytes(), b" ", value].concat();
        if line.len() > LINE_BYTES_MAX || self.bytes + line.len() > FIELDS_BYTES_MAX {
            return Err(Error::usage(format!("the value of {key} is too long")));
        }
        let count = self.lines.len();
        let found = self.lines.iter_mut().rev().find(|it| split_word(it).0 == key.as_bytes());
        match found {
            Some(found) => {
                self.bytes = self.bytes - found.len() + line.len();
                *found = line;
            }
            None if count == FIELDS_MAX => {
                return Err(Error::usage(format!("there are {FIELDS_MAX} keys already")));
            }
            None => {
                self.bytes += line.len();
                self.lines.push(line);
            }
        }
        Ok(())
    }

    /// Adds the lines of others as they are.
    pub fn extend(&mut self, others: &Fields) -> Result<()> {
        match others.lines.iter().all(|it| self.add_line(it.clone())) {
            true => Ok(()),
            false => Err(Error::usage("there are too many keys and values")),
        }
    }

    /// Takes a key away.
    pub fn remove(&mut self, key: &str) {
        self.lines.retain(|it| split_word(it).0 != key.as_bytes());
        self.bytes = self.lines.iter().map(Vec::len).sum();
    }

    /// Every line with its newline.
    pub fn to_text(&self) -> Vec<u8> {
        self.lines.iter().flat_map(|it| [&**it, b"\n"]).collect::<Vec<_>>().concat()
    }
}

/// A line's first word, and what follows the blank behind it.
pub fn split_word(line: &[u8]) -> (&[u8], &[u8]) {
    match line.iter().position(|it| *it == b' ') {
        Some(at) => {
            let (word, rest) = line.split_at(at);
            (word, rest.get(1..).unwrap_or_default())
        }
        None => (line, b""),
    }
}

/// A number in decimal digits and nothing else.
pub fn parse_number<N: std::str::FromStr>(text: &[u8]) -> Option<N> {
    let is_number = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| is_number)?.parse().ok()
}

/// Opens a file of the spool to be read.
pub fn open(path: &Path) -> Result<BufReader<File>> {
    let what = || format!("opening {}", quoted(path));
    let mut options = File::options();
    options.read(true).custom_flags(sys::c::O_NOFOLLOW | sys::c::O_NONBLOCK);
    let file = options.open(path).map_err(|e| Error::io(what(), e))?;
    let stat = sys::fstat(&file).map_err(|e| Error::io(what(), e))?;
    if !stat.is_file() {
        return Err(Error::corrupt(format!("{} is no regular file", quoted(path))));
    }
    Ok(BufReader::with_capacity(64 << 10, file))
}

/// A file that is being written and gets its name when it is whole.
pub struct NewFile {
    path: PathBuf,
    out: Option<BufWriter<File>>,
    bytes: u64,
}

impl NewFile {
    /// Begins what will be named `path` or otherwise.
    pub fn create(path: &Path) -> Result<NewFile> {
        let path = sys::new_name(path);
        let mut options = sys::private_file();
        options.read(true).write(true).create(true).truncate(true);
        let file = options.open(&path);
        let file = file.map_err(|e| Error::io(format!("creating {}", quoted(&path)), e))?;
        Ok(NewFile { path, out: Some(BufWriter::with_capacity(64 << 10, file)), bytes: 0 })
    }

    /// Adds these bytes.
    pub fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(out) = &mut self.out else { return Err(Error::usage("the file is finished")) };
        self.bytes += bytes.len() as u64;
        out.write_all(bytes).map_err(|e| Error::io(format!("writing {}", quoted(&self.path)), e))
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes away what is behind so many bytes.
    pub fn cut(&mut self, bytes: u64) -> Result<()> {
        let Some(out) = &mut self.out else { return Err(Error::usage("the file is finished")) };
        let cut = out.seek(SeekFrom::Start(bytes)).and_then(|_| out.get_ref().set_len(bytes));
        self.bytes = bytes;
        cut.map_err(|e| Error::io(format!("cutting {}", quoted(&self.path)), e))
    }

    /// Opens what was written so far, to be read beside.
    pub fn look(&mut self) -> Result<BufReader<File>> {
        let Some(out) = &mut self.out else { return Err(Error::usage("the file is finished")) };
        out.flush().map_err(|e| Error::io(format!("writing {}", quoted(&self.path)), e))?;
        open(&self.path)
    }

    /// Adds a line.
    pub fn put_line(&mut self, parts: &[&[u8]]) -> Result<()> {
        parts.iter().try_for_each(|it| self.put(it))?;
        self.put(b"\n")
    }

    /// Gives what was written back, to be read.
    pub fn reread(mut self) -> Result<(BufReader<File>, NewFile)> {
        let failed = |e| Error::io(format!("writing {}", quoted(&self.path)), e);
        let Some(out) = self.out.take() else { return Err(Error::usage("the file is finished")) };
        let mut file = out.into_inner().map_err(|e| failed(e.into_error()))?;
        file.rewind().map_err(failed)?;
        Ok((BufReader::with_capacity(64 << 10, file), self))
    }

    /// Makes what was written last, under the name `to`.
    pub fn commit(mut self, to: &Path) -> Result<()> {
        let failed = |e| Error::io(format!("writing {}", quoted(&self.path)), e);
        let Some(out) = self.out.take() else { return Err(Error::usage("the file is finished")) };
        let file = out.into_inner().map_err(|e| failed(e.into_error()))?;
        file.sync_all().map_err(failed)?;
        sys::rename_durable(&self.path, to)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // After a commit nothing has this name; what cannot be removed is overwritten next time.
        let _ = std::fs::remove_file(&self.path);
    }
}
