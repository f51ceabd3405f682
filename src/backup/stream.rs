//! A run of one file that comes through a pipe: standard input, or what a command prints.
//!
//! Read once, from start to end, and never held as a whole. Nothing half read is ever kept: a
//! stream that breaks, and a command that does not end well, end the run. Whoever waits for the
//! stream looks up often enough that a user who cancels does not wait.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::scan::{Numbers, Sink, tell};
use super::{Change, EntryPlace, Item, Unchanged, Unit};
use crate::catalog::{Content, DirId, Reader, Run, VersionId};
use crate::entry::{Kind, Metadata, check_name};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::{self, Time};

/// How long a silent stream is waited for before the reader looks up.
const LOOK_UP_EVERY: Duration = Duration::from_millis(100);
/// How long a command is given between two looks at whether it has ended.
const END_POLL: Duration = Duration::from_millis(5);
/// Entries that a page of the catalog's listing holds.
const PAGE_ENTRIES: usize = 512;

/// Where a stream comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Standard input.
    Stdin,
    /// The standard output of this command; the first word is the program.
    Command(Vec<OsString>),
}

/// A stream to back up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The file that it becomes in the snapshot, relative to the root.
    pub file: OsString,
    /// Where it comes from.
    pub input: Input,
}

impl Stream {
    /// Checks the file's name: a name, or names with a slash between.
    pub fn check(&self) -> Result<()> {
        match self.names().all(|name| check_name(name).is_ok()) {
            true => Ok(()),
            false => Err(Error::usage(format!(
                "--name '{}': give a plain name, or a relative path without '.' and '..'",
                Quoted(self.file.as_bytes())
            ))),
        }
    }

    fn names(&self) -> impl Iterator<Item = &[u8]> {
        self.file.as_bytes().split(|byte| *byte == b'/')
    }
}

/// A stream on its way to a worker.
pub struct StreamJob {
    /// Where the file belongs.
    pub place: EntryPlace,
    /// Its metadata; the size is known at its end.
    pub meta: Metadata,
    /// Number of the version it becomes.
    pub version: VersionId,
    /// What is read.
    pub source: Source,
}

/// An open stream. A command that is still running when this is dropped is ended.
pub struct Source {
    pipe: Option<File>,
    child: Option<Child>,
    /// What it is called in messages.
    shown: String,
}

impl Source {
    /// Opens a stream; starts the command.
    pub fn open(input: &Input) -> Result<Source> {
        let words = match input {
            Input::Stdin => {
                let shown = "standard input".to_owned();
                let pipe = io::stdin().as_fd().try_clone_to_owned();
                let pipe = pipe.map_err(|e| Error::io(&*shown, e))?;
                return Ok(Source { pipe: Some(File::from(pipe)), child: None, shown });
            }
            Input::Command(words) => words,
        };
        let Some((program, arguments)) = words.split_first() else {
            return Err(Error::usage("which command? Give it after --"));
        };
        let shown = format!("the command '{}'", Quoted(program.as_bytes()));
        let mut command = Command::new(program);
        command.args(arguments).stdout(Stdio::piped());
        let child = command.spawn();
        let mut child = child.map_err(|e| Error::io(format!("starting {shown}"), e))?;
        let pipe = child.stdout.take().map(|it| File::from(std::os::fd::OwnedFd::from(it)));
        Ok(Source { pipe, child: Some(child), shown })
    }

    /// The stream as something to read, which fails once `check` does.
    pub fn reader<'a>(&'a mut self, check: &'a dyn Fn() -> Result<()>) -> impl Read + 'a {
        Watched { pipe: self.pipe.as_mut(), check }
    }

    /// The error that reading has met: that of `check` if it was the reader who gave up.
    pub fn failed(&self, error: io::Error, check: &dyn Fn() -> Result<()>) -> Error {
        match check() {
            Ok(()) => Error::io(format!("reading {}", self.shown), error),
            Err(reason) => reason,
        }
    }

    /// After the end of the stream: whether that was a good end.
    pub fn finish(&mut self, check: &dyn Fn() -> Result<()>) -> Result<()> {
        self.pipe = None;
        let Some(child) = &mut self.child else { return check() };
        let status = loop {
            check()?;
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => std::thread::sleep(END_POLL),
                Err(e) => return Err(Error::io(format!("waiting for {}", self.shown), e)),
            }
        };
        self.child = None;
        match status.success() {
            true => Ok(()),
            false => {
                let message = format!("{} failed ({status}): nothing was kept", self.shown);
                Err(Error::new(ErrorKind::Io, message))
            }
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // Most commands end by themselves when nobody reads any more, but not all write.
        self.pipe = None;
        if let Some(child) = &mut self.child {
            // It may have ended meanwhile; it has not been waited for, so the number is its own.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

struct Watched<'a> {
    pipe: Option<&'a mut File>,
    check: &'a dyn Fn() -> Result<()>,
}

impl Read for Watched<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let Some(pipe) = &mut self.pipe else { return Ok(0) };
        loop {
            (self.check)().map_err(io::Error::other)?;
            if sys::wait_readable(&**pipe, LOOK_UP_EVERY)? {
                return pipe.read(out);
            }
        }
    }
}

/// What stands in for a walk of a tree: the directories above the file, and the file.
pub struct StreamScan<'a, 'c> {
    /// The stream.
    pub stream: &'a Stream,
    /// Name of the source.
    pub name: &'a [u8],
    /// The run before.
    pub basis: Option<Run>,
    /// The catalog.
    pub reader: Reader,
    /// Where new versions and directories get their numbers from.
    pub numbers: Numbers<'a, 'c>,
    /// When the run began.
    pub started: Time,
}

impl StreamScan<'_, '_> {
    /// Gives out what has to be done.
    pub fn run(&mut self, sink: Sink<'_>) -> Result<()> {
        // Before the first byte is asked for: a name that is taken by nothing costs nothing.
        let source = Source::open(&self.stream.input)?;
        let old = match &self.basis {
            Some(run) => self.reader.lookup(run.id, 0, self.name)?,
            None => None,
        };
        let name = OsStr::from_bytes(self.name).to_os_string();
        let mut place = EntryPlace { dir: 0, name, path: Vec::new(), old };
        for name in self.stream.names() {
            let path = match place.path.is_empty() {
                true => name.to_vec(),
                false => [&*place.path, b"/", name].concat(),
            };
            let above = place.path.clone();
            let (dir, basis) = self.put_dir(place, sink)?;
            let mut old = None;
            if let (Some(dir), Some(run)) = (basis, self.basis.as_ref().map(|it| it.id)) {
                old = self.reader.lookup(run, dir, name)?;
                self.send_others_gone(run, dir, name, &above, sink)?;
            }
            let name = OsStr::from_bytes(name).to_os_string();
            place = EntryPlace { dir, name, path, old };
        }
        let (version, meta) = (self.numbers.new_version(), self.meta(Kind::File));
        sink(Item::Unit(Unit::Stream(Box::new(StreamJob { place, meta, version, source }))))
    }

    fn meta(&self, kind: Kind) -> Metadata {
        let (mode, nlink) = if kind == Kind::Dir { (0o700, 2) } else { (0o600, 1) };
        Metadata {
            kind,
            mode,
            uid: sys::effective_uid(),
            gid: sys::effective_gid(),
            size: 0,
            mtime: self.started,
            ctime: self.started,
            ino: 0,
            nlink,
            rdev: 0,
        }
    }

    /// A directory of the stream has no times of its own: one that is there stays as it is.
    fn put_dir(&mut self, place: EntryPlace, sink: Sink<'_>) -> Result<(DirId, Option<DirId>)> {
        if let Some(dir) = place.old.as_ref().and_then(|old| old.child) {
            tell(sink, Change::Unchanged(Unchanged { dirs: 1, ..Unchanged::default() }))?;
            return Ok((dir, Some(dir)));
        }
        let (version, dir) = (self.numbers.new_version(), self.numbers.new_dir());
        let (meta, content) = (self.meta(Kind::Dir), Content::default());
        tell(sink, Change::Put { place, meta, version, child: Some(dir), content, linked: false })?;
        Ok((dir, None))
    }

    /// The snapshot has the stream's file and nothing else.
    fn send_others_gone(
        &self,
        run: i64,
        dir: DirId,
        name: &[u8],
        above: &[u8],
        sink: Sink<'_>,
    ) -> Result<()> {
        let mut last: Option<Vec<u8>> = None;
        loop {
            let page = self.reader.list(run, dir, last.as_deref(), PAGE_ENTRIES)?;
            let Some(end) = page.last() else { return Ok(()) };
            last = Some(end.name.clone());
            for row in page.into_iter().filter(|row| row.name != name) {
                let path = match above.is_empty() {
                    true => row.name.clone(),
                    false => [above, b"/", &row.name].concat(),
                };
                tell(sink, Change::Gone { row, path })?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(words: &[&str]) -> Result<Source> {
        Source::open(&Input::Command(words.iter().map(OsString::from).collect()))
    }

    fn go_on() -> Result<()> {
        Ok(())
    }

    #[test]
    fn names_of_streams_stay_below_the_root() {
        let check = |file: &str| Stream { file: file.into(), input: Input::Stdin }.check().is_ok();
        for good in ["a", "a/b", "...", "a b"] {
            assert!(check(good), "{good}");
        }
        for bad in ["", "/a", "a/", "a//b", ".", "a/../b", "./a"] {
            assert!(!check(bad), "{bad}");
        }
    }

    #[test]
    fn a_command_has_to_end_well() {
        let mut text = String::new();
        let mut good = source(&["printf", "hello"]).unwrap();
        good.reader(&go_on).read_to_string(&mut text).unwrap();
        good.finish(&go_on).unwrap();
        assert_eq!(text, "hello");
        for (script, word) in [("printf x; exit 3", "exit status: 3"), ("kill -9 $$", "signal: 9")]
        {
            let mut bad = source(&["sh", "-c", script]).unwrap();
            bad.reader(&go_on).read_to_string(&mut text).unwrap();
            let error = bad.finish(&go_on).unwrap_err().to_string();
            assert!(error.contains("'sh'") && error.contains(word), "{error}");
        }
        let error = source(&["/there/is/no/such"]).err().unwrap();
        assert!(error.to_string().contains("/there/is/no/such"), "{error}");
    }

    #[test]
    fn who_waits_for_a_silent_stream_can_be_stopped() {
        let mut silent = source(&["sleep", "600"]).unwrap();
        let stop = || Err(Error::new(ErrorKind::Interrupted, "stopped on request"));
        let mut byte = [0];
        assert!(silent.reader(&stop).read(&mut byte).is_err());
        // It would have slept on for ten minutes.
        drop(silent);
    }
}
