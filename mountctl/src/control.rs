//! Hands a job to the daemon through the control file of its mount.
//!
//! Invariant: a job is written as one line in one call, and its number is read back through the
//! very same open file, so that two callers cannot get each other's answer.

use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::failure::{Class, Failure};
use crate::mounts::MountTable;
use crate::probe::{self, Answer};
use crate::shown::{shown, shown_bytes};

/// The answer is a few lines of `key value`.
const MAX_ANSWER: u64 = 1 << 16;

/// The mount meant by the user: the named one, or the only one there is.
pub fn find_mount(named: Option<&Path>) -> Result<PathBuf, Failure> {
    let table = MountTable::current()?;
    if let Some(named) = named {
        return table.resolve(named);
    }
    only_mount(&table)
}

fn only_mount(table: &MountTable) -> Result<PathBuf, Failure> {
    let points: Vec<&Path> = table.ours().map(|mount| mount.point.as_path()).collect();
    match points.as_slice() {
        [] => Err(Failure::failed(
            "no catalog is mounted; use `mountctl mount` first, or name the mount with --mount",
        )),
        [point] => Ok(point.to_path_buf()),
        _ => {
            let lines: String =
                points.iter().map(|point| format!("\n  {}", shown(*point))).collect();
            Err(Failure::usage(format!(
                "several catalogs are mounted; choose one with --mount:{lines}"
            )))
        }
    }
}

/// The words of a job as one line. `directory` is where relative names of the user start; the
/// daemon has another working directory.
pub fn control_line(words: &[OsString], directory: &Path) -> Result<Vec<u8>, Failure> {
    let Some((first, rest)) = words.split_first() else {
        return Err(Failure::usage("name what to back up"));
    };
    if first.as_bytes().starts_with(b"-") {
        // Which options take a value only the daemon knows, so behind an option nobody here can
        // tell the source from such a value.
        return Err(Failure::usage(format!(
            "name the source before the options of the backup, not {} first",
            shown(first)
        )));
    }
    let source = match first.as_bytes() {
        b"ingest" => first.clone(),
        _ => absolute(first, directory),
    };
    let mut line = quote(&source);
    for word in rest {
        line.push(b' ');
        line.extend(quote(word));
    }
    if line.contains(&b'\n') {
        return Err(Failure::usage(
            "a job cannot have an argument with a line break in it; use `raidtape backup` instead",
        ));
    }
    line.push(b'\n');
    Ok(line)
}

fn absolute(given: &OsStr, directory: &Path) -> OsString {
    // Collecting the components drops every `.`, which would look odd in the list of runs.
    let mut path: PathBuf = directory.join(given).components().collect();
    if given.as_bytes().ends_with(b"/") {
        // The slash decides whether a symbolic link is followed.
        path.push("");
    }
    path.into_os_string()
}

/// Quotes a word as a shell would read it.
fn quote(word: &OsStr) -> Vec<u8> {
    if let Some(text) = word.to_str() {
        return shell_words::quote(text).as_bytes().to_vec();
    }
    let mut quoted = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend_from_slice(b"'\\''"),
            other => quoted.push(*other),
        }
    }
    quoted.push(b'\'');
    quoted
}

/// Gives a line to the daemon behind `point` and returns the number of the job.
pub fn submit(point: &Path, line: &[u8]) -> Result<u64, Failure> {
    // An unanswered open could not even be interrupted.
    match probe::ask(point, probe::LIMIT) {
        Answer::Status(_) => {}
        Answer::Absent => {
            return Err(Failure::failed(format!("{} is not a mounted catalog", shown(point))));
        }
        other => {
            return Err(Failure::failed(format!("{} {}", shown(point), other.clause())));
        }
    }
    let path = point.join(".ctl/backup");
    let opened = OpenOptions::new().read(true).write(true).open(&path);
    let mut file = opened.map_err(|error| refusal(&path, &error, None))?;
    exchange(&mut file, line).map_err(|error| {
        let reason = answer(&mut file).ok().and_then(|text| reason(&text));
        refusal(&path, &error, reason)
    })
}

fn exchange<F: Read + Write + Seek>(file: &mut F, line: &[u8]) -> io::Result<u64> {
    let written = loop {
        match file.write(line) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => break result?,
        }
    };
    if written != line.len() {
        return Err(io::Error::new(io::ErrorKind::WriteZero, "the line was taken in part only"));
    }
    let answer = answer(file)?;
    job_number(&answer).ok_or_else(|| {
        let text = format!("the answer names no job: {}", shown_bytes(&answer));
        io::Error::new(io::ErrorKind::InvalidData, text)
    })
}

/// What the daemon says of the line that was written last.
fn answer<F: Read + Seek>(file: &mut F) -> io::Result<Vec<u8>> {
    file.seek(SeekFrom::Start(0))?;
    let mut answer = Vec::new();
    file.take(MAX_ANSWER).read_to_end(&mut answer)?;
    Ok(answer)
}

/// Why a line was refused, out of `refused EINVAL: why`.
fn reason(answer: &[u8]) -> Option<String> {
    let said = answer.strip_prefix(b"refused ")?;
    let at = said.iter().position(|byte| *byte == b' ')?;
    said.get(at + 1..).map(|it| shown_bytes(it.trim_ascii()))
}

fn job_number(answer: &[u8]) -> Option<u64> {
    let first = answer.split(|byte| *byte == b'\n').next()?;
    std::str::from_utf8(first.strip_prefix(b"job ")?).ok()?.trim_ascii().parse().ok()
}

fn refusal(path: &Path, error: &io::Error, reason: Option<String>) -> Failure {
    let class = match error.kind() {
        io::ErrorKind::InvalidInput => Class::Usage,
        io::ErrorKind::PermissionDenied => Class::Permission,
        _ => Class::Failed,
    };
    let message = match (reason, error.kind()) {
        (Some(reason), _) => format!("the job was refused: {reason}"),
        (None, io::ErrorKind::PermissionDenied) => {
            format!("{}: its mode does not let this user start jobs (EACCES)", shown(path))
        }
        (None, io::ErrorKind::ReadOnlyFilesystem) => "the catalog is mounted read-only (EROFS), \
             so no job can be started; mount it without the option `ro`"
            .to_owned(),
        _ => format!("cannot start a job with {}: {error}", shown(path)),
    };
    Failure::new(class, message)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

    use std::os::unix::ffi::OsStringExt;

    use super::*;

    fn line(words: &[&str]) -> Result<String, Failure> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        control_line(&words, Path::new("/here")).map(|line| String::from_utf8(line).unwrap())
    }

    /// Imitates the control file: takes a line, then answers from offset 0.
    struct Daemon {
        writes: Vec<Vec<u8>>,
        answer: io::Cursor<Vec<u8>>,
        accepts: usize,
    }

    impl Daemon {
        fn answering(answer: &str) -> Self {
            let mut answer = io::Cursor::new(answer.as_bytes().to_vec());
            // As after a write: without going back to the start there is nothing to read.
            answer.set_position(1000);
            Self { writes: Vec::new(), answer, accepts: usize::MAX }
        }
    }

    impl Write for Daemon {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.writes.push(bytes.to_vec());
            Ok(bytes.len().min(self.accepts))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Read for Daemon {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.answer.read(buffer)
        }
    }

    impl Seek for Daemon {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.answer.seek(to)
        }
    }

    #[test]
    fn words_are_quoted_and_the_source_is_made_absolute() {
        assert_eq!(line(&["/a", "--tag", "n"]).unwrap(), "/a --tag n\n");
        assert_eq!(line(&["a b"]).unwrap(), "'/here/a b'\n");
        assert_eq!(line(&["a", "", "x'y"]).unwrap(), "/here/a '' 'x'\\''y'\n");
        assert_eq!(line(&["ingest"]).unwrap(), "ingest\n");
        assert_eq!(line(&["./ingest"]).unwrap(), "/here/ingest\n");
        assert_eq!(line(&["."]).unwrap(), "/here\n");
        assert_eq!(line(&["../a/"]).unwrap(), "/here/../a/\n");
        let words = shell_words::split(&line(&["it's", "$HOME", "a\\b"]).unwrap()).unwrap();
        assert_eq!(words, ["/here/it's", "$HOME", "a\\b"]);
    }

    #[test]
    fn names_that_are_no_text_keep_their_bytes() {
        let word = OsString::from_vec(b"/\xff'b".to_vec());
        let line = control_line(&[word], Path::new("/here")).unwrap();
        assert_eq!(line, b"'/\xff'\\''b'\n");
    }

    #[test]
    fn what_one_line_cannot_carry_is_refused() {
        assert!(line(&["/a", "b\nc"]).unwrap_err().message.contains("line break"));
        let failure = line(&["--tag", "n", "src"]).unwrap_err();
        assert_eq!(failure.class, Class::Usage);
        assert!(failure.message.contains("--tag"), "{failure:?}");
    }

    #[test]
    fn the_job_is_written_at_once_and_its_number_read_back() {
        let mut daemon = Daemon::answering("job 17\nstate queued\n");
        assert_eq!(exchange(&mut daemon, b"/a --tag n\n").unwrap(), 17);
        assert_eq!(daemon.writes, [b"/a --tag n\n".to_vec()]);
    }

    #[test]
    fn odd_answers_are_errors() {
        for answer in ["", "jobs 1\n", "job x\n", "state queued\njob 1\n"] {
            assert!(exchange(&mut Daemon::answering(answer), b"/a\n").is_err());
        }
        let mut daemon = Daemon::answering("job 1\n");
        daemon.accepts = 2;
        assert!(exchange(&mut daemon, b"/a\n").is_err());
        assert_eq!(daemon.writes.len(), 1, "half a job must not be completed");
    }

    #[test]
    fn refusals_have_the_daemons_words_and_their_own_codes() {
        let refused = |kind: io::ErrorKind, said: &str| {
            refusal(Path::new("/m/.ctl/backup"), &kind.into(), reason(said.as_bytes()))
        };
        let wrong = refused(io::ErrorKind::InvalidInput, "refused EINVAL: no such\n");
        assert_eq!((wrong.code(), &*wrong.message), (2, "the job was refused: no such"));
        let denied = refused(io::ErrorKind::PermissionDenied, "job 1\nstate done\n");
        assert_eq!(denied.class, Class::Permission);
        assert!(denied.message.contains("mode"), "{denied:?}");
        assert_eq!(refused(io::ErrorKind::ResourceBusy, "").code(), 1);
    }

    #[test]
    fn the_only_mount_is_chosen_and_several_are_listed() {
        let one = "40 22 0:50 / /m\\0401 rw - fuse.raidtape /c rw\n";
        let two = "41 22 0:51 / /m2 rw - fuse.raidtape /d rw\n";
        let choose = |text: &str| only_mount(&MountTable::parse(text.as_bytes()));
        assert_eq!(choose(one).unwrap(), Path::new("/m 1"));
        assert!(choose("").unwrap_err().message.contains("mountctl mount"));
        let message = choose(&format!("{one}{two}")).unwrap_err().message;
        assert!(message.contains("/m 1") && message.contains("/m2"), "{message}");
    }
}
