//! Sums: what each file of an archive was when it was written, as a list that `sha256sum` checks.
//!
//! The list is the last member of an archive. A file that is not in it is not in the archive as it
//! should be, whatever member has its name.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Quoted, Result};

/// Hex digits of a sum.
const DIGITS: usize = 64;

/// SHA-256 of a file's content.
pub type Sum = [u8; 32];

/// The sum of what comes in parts.
#[derive(Clone, Default)]
pub struct Summer(Sha256);

impl Summer {
    /// Adds a part.
    pub fn add(&mut self, part: &[u8]) {
        self.0.update(part);
    }

    /// The sum of all of them.
    pub fn sum(self) -> Sum {
        self.0.finalize().into()
    }
}

/// Buffers that a thread has at most, beside the one that is being filled.
const BUFFERS_MAX: usize = 4;

/// Sums up on a thread of its own. A processor without instructions for it sums up about as fast as
/// a drive writes, and would have nothing left for reading files.
pub struct SumThread {
    parts: Option<Sender<Part>>,
    used: Receiver<Vec<u8>>,
    sums: Receiver<Sum>,
    thread: Option<JoinHandle<()>>,
    /// Buffers that it has, or has given back.
    given: usize,
}

enum Part {
    Bytes(Vec<u8>, usize),
    End,
}

impl SumThread {
    /// Starts it.
    pub fn start() -> Result<SumThread> {
        let (parts, to_sum) = channel();
        let (give_back, used) = channel();
        let (tell, sums) = channel();
        let work = move || {
            let mut summer = Summer::default();
            for part in to_sum {
                // Nobody waits for what cannot be sent.
                let _ = match part {
                    Part::Bytes(buffer, len) => {
                        summer.add(buffer.get(..len).unwrap_or_default());
                        give_back.send(buffer).is_ok()
                    }
                    Part::End => tell.send(std::mem::take(&mut summer).sum()).is_ok(),
                };
            }
        };
        let thread = std::thread::Builder::new().name("sums".into()).spawn(work);
        let thread = thread.map_err(|e| Error::io("starting a thread for sums", e))?;
        Ok(SumThread { parts: Some(parts), used, sums, thread: Some(thread), given: 0 })
    }

    /// Adds the first `len` bytes of a buffer, which becomes another one of its size.
    pub fn add(&mut self, buffer: &mut Vec<u8>, len: usize) -> Result<()> {
        let other = if self.given < BUFFERS_MAX {
            self.given += 1;
            vec![0; buffer.len()]
        } else {
            self.used.recv().map_err(|_| failed())?
        };
        self.send(Part::Bytes(std::mem::replace(buffer, other), len))
    }

    /// The sum of all that was added since the last one.
    pub fn sum(&mut self) -> Result<Sum> {
        self.send(Part::End)?;
        self.sums.recv().map_err(|_| failed())
    }

    fn send(&self, part: Part) -> Result<()> {
        let sent = self.parts.as_ref().map(|it| it.send(part));
        if matches!(sent, Some(Ok(()))) { Ok(()) } else { Err(failed()) }
    }
}

impl Drop for SumThread {
    fn drop(&mut self) {
        self.parts = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn failed() -> Error {
    Error::new(ErrorKind::Io, "the thread that makes sums has failed")
}

/// The line of a file, with its newline. As `sha256sum` has it: a name with a backslash is written
/// with two for each, and the line begins with one.
pub fn line(sum: &Sum, name: &[u8]) -> Vec<u8> {
    let is_escaped = name.contains(&b'\\');
    let mut line = if is_escaped { b"\\".to_vec() } else { Vec::new() };
    line.extend(hex::encode(sum).into_bytes());
    line.extend(b"  ");
    for byte in name {
        line.extend((*byte == b'\\').then_some(b'\\'));
        line.push(*byte);
    }
    line.push(b'\n');
    line
}

/// Reads a line, without its newline: the sum, and the name.
pub fn parse(line: &[u8]) -> Result<(Sum, Vec<u8>)> {
    let bad = || {
        let start = line.get(..100).unwrap_or(line);
        Error::corrupt(format!("{} is no sum of a file", Quoted(start)))
    };
    let (is_escaped, rest) = match line.strip_prefix(b"\\") {
        Some(rest) => (true, rest),
        None => (false, line),
    };
    let (digits, rest) = rest.split_at_checked(DIGITS).ok_or_else(bad)?;
    let mut sum = [0; 32];
    hex::decode_to_slice(digits, &mut sum).map_err(|_| bad())?;
    // The second of the two says how the file was read, which makes no difference here.
    let name = rest.strip_prefix(b"  ").or_else(|| rest.strip_prefix(b" *")).ok_or_else(bad)?;
    if name.is_empty() {
        return Err(bad());
    }
    if !is_escaped {
        return Ok((sum, name.to_vec()));
    }
    let mut plain = Vec::with_capacity(name.len());
    let mut bytes = name.iter();
    while let Some(byte) = bytes.next() {
        plain.push(match byte {
            b'\\' => match bytes.next() {
                Some(b'\\') => b'\\',
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                _ => return Err(bad()),
            },
            byte => *byte,
        });
    }
    Ok((sum, plain))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_line_comes_back(sum: Sum, name in prop::collection::vec(any::<u8>(), 1..50)) {
            if name.contains(&b'\n') {
                return Ok(());
            }
            let line = line(&sum, &name);
            prop_assert_eq!(parse(line.strip_suffix(b"\n").unwrap()).unwrap(), (sum, name));
        }

        #[test]
        fn any_line_is_read_or_refused(bytes: Vec<u8>, text in "[\\\\ 0-9a-f*]{60,80}") {
            let _ = parse(&bytes);
            let _ = parse(text.as_bytes());
        }
    }

    #[test]
    fn a_thread_makes_the_same_sums() {
        let mut thread = SumThread::start().unwrap();
        for parts in [0, 1, 3, 20] {
            let mut summer = Summer::default();
            let mut buffer = vec![0; 1000];
            for part in 0..parts {
                let len = 1000 - usize::from(part) * 7;
                buffer.fill(part);
                summer.add(&buffer[..len]);
                thread.add(&mut buffer, len).unwrap();
                assert_eq!(buffer.len(), 1000);
            }
            assert_eq!(thread.sum().unwrap(), summer.sum(), "{parts} parts");
        }
    }

    #[test]
    fn lines_are_those_of_sha256sum() {
        let empty = Summer::default().sum();
        let digits = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(line(&empty, b"a b"), format!("{digits}  a b\n").into_bytes());
        assert_eq!(line(&empty, b"a\\b"), format!("\\{digits}  a\\\\b\n").into_bytes());
        assert_eq!(parse(format!("{digits} *x").as_bytes()).unwrap(), (empty, b"x".to_vec()));
        for bad in [format!("{digits}  "), format!("{digits} x"), format!("\\{digits}  \\x")] {
            parse(bad.as_bytes()).unwrap_err();
        }
    }
}
