//! The one error type of the engine, the problems that do not end a run, and the quoting of names.
//!
//! An [`Error`] ends an operation; its closed [`ErrorKind`] decides errno (table in `fs`) and exit
//! code (table in `cli`). A [`Problem`] is one file's trouble: it is collected, counted and named,
//! and the work goes on. Messages are lower case, name the thing concerned and say what to do.

use std::fmt;
use std::io;

const ENOMEM: i32 = 12;
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;

/// Result of everything in the engine.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as far as a caller has to tell it apart.
///
/// Exhaustive on purpose: a new kind breaks the errno and the exit code table until both name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The caller asked for something that makes no sense.
    Usage,
    /// A named run, path, volume or job does not exist.
    NotFound,
    /// There is no catalog where one was expected.
    NoCatalog,
    /// Somebody else holds the writer's lock.
    Locked,
    /// Data exists, but not on a disk that is reachable now.
    Offline,
    /// Data exists, but only on tape.
    OnTape,
    /// Stored data or a stored structure is not what was written.
    Corrupt,
    /// No volume has room left.
    NoSpace,
    /// The tape in the drive is missing or not the wanted one.
    WrongTape,
    /// A format version that this program does not know.
    Version,
    /// The user asked to stop.
    Interrupted,
    /// The operating system refused for lack of permission.
    Denied,
    /// Any other failure of the operating system.
    Io,
}

impl ErrorKind {
    /// The word that stands for this kind in JSON output and in the catalog.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorKind::Usage => "usage",
            ErrorKind::NotFound => "not-found",
            ErrorKind::NoCatalog => "no-catalog",
            ErrorKind::Locked => "locked",
            ErrorKind::Offline => "offline",
            ErrorKind::OnTape => "on-tape",
            ErrorKind::Corrupt => "corrupt",
            ErrorKind::NoSpace => "no-space",
            ErrorKind::WrongTape => "wrong-tape",
            ErrorKind::Version => "version",
            ErrorKind::Interrupted => "interrupted",
            ErrorKind::Denied => "denied",
            ErrorKind::Io => "io",
        }
    }
}

/// An error that ends the operation at hand.
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with a message and no deeper cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Error {
        Error { kind, message: message.into(), source: None }
    }

    /// An error that wraps another library's, keeping it as the cause.
    pub fn with_source(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Error {
        Error { kind, message: message.into(), source: Some(Box::new(source)) }
    }

    /// An operating system error while doing `what` (which names the path).
    ///
    /// The kind follows from the errno: a full disk or quota is [`ErrorKind::NoSpace`].
    pub fn io(what: impl Into<String>, source: io::Error) -> Error {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::Denied,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            io::ErrorKind::Interrupted => ErrorKind::Interrupted,
            _ => ErrorKind::Io,
        };
        Error::with_source(kind, what, source)
    }

    /// A usage error.
    pub fn usage(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Usage, message)
    }

    /// Damaged data or structure.
    pub fn corrupt(message: impl Into<String>) -> Error {
        Error::new(ErrorKind::Corrupt, message)
    }

    /// The closed kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The operating system's error number, where one is the cause.
    pub fn errno(&self) -> Option<i32> {
        self.source.as_ref()?.downcast_ref::<io::Error>()?.raw_os_error()
    }

    /// Whether the machine ran out of memory or of open files. What was asked for may be as it
    /// should be, so nobody concludes from this that it is damaged or away.
    pub fn is_shortage(&self) -> bool {
        matches!(self.errno(), Some(ENOMEM | ENFILE | EMFILE))
    }

    /// The same error, told from further out: `context: message`.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Error {
        self.message = format!("{context}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        let mut cause = self.source.as_ref().map(|it| it.as_ref() as &dyn std::error::Error);
        while let Some(it) = cause {
            write!(f, ": {it}")?;
            cause = it.source();
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {self}", self.kind.as_str())
    }
}

impl std::error::Error for Error {}

/// One file's trouble: the run goes on, the user is told, the exit code says so.
#[derive(Debug)]
pub struct Problem {
    /// The path concerned, as bytes.
    pub path: Vec<u8>,
    /// What kind of trouble.
    pub kind: ErrorKind,
    /// The full text, without the path.
    pub message: String,
}

impl Problem {
    /// The problem that `error` is for `path`.
    pub fn new(path: impl Into<Vec<u8>>, error: &Error) -> Problem {
        Problem { path: path.into(), kind: error.kind(), message: error.to_string() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.path {
            [] => f.write_str(&self.message),
            path => write!(f, "{}: {}", Quoted(path), self.message),
        }
    }
}

/// Shows a name made of any bytes on one line: what is not printable UTF-8 is written as `\xNN`,
/// `\n` and the like, and a backslash is doubled, so two names never look the same and none of
/// them drives the terminal.
pub struct Quoted<'a>(pub &'a [u8]);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in self.0.utf8_chunks() {
            for c in part.valid().chars() {
                match c {
                    '\\' => f.write_str("\\\\")?,
                    c if c.is_control() || is_format_char(c) => {
                        write!(f, "{}", c.escape_default())?
                    }
                    c => fmt::Write::write_char(f, c)?,
                }
            }
            for byte in part.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// Characters that print as nothing but reorder or hide what stands around them.
fn is_format_char(c: char) -> bool {
    [
        '\u{200b}'..='\u{200f}',
        '\u{2028}'..='\u{202e}',
        '\u{2060}'..='\u{2069}',
        '\u{feff}'..='\u{feff}',
    ]
    .iter()
    .any(|range| range.contains(&c))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Undoes [`Quoted`].
    fn unquoted(text: &str) -> Vec<u8> {
        let mut out = Vec::new();
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            rest = &rest[c.len_utf8()..];
            if c != '\\' {
                out.extend(c.to_string().bytes());
                continue;
            }
            let (kind, after) = rest.split_at(1);
            rest = after;
            match kind {
                "\\" => out.push(b'\\'),
                "n" => out.push(b'\n'),
                "r" => out.push(b'\r'),
                "t" => out.push(b'\t'),
                "x" => {
                    out.push(u8::from_str_radix(&rest[..2], 16).unwrap());
                    rest = &rest[2..];
                }
                _ => {
                    let (number, after) = rest[1..].split_once('}').unwrap();
                    let number = u32::from_str_radix(number, 16).unwrap();
                    out.extend(char::from_u32(number).unwrap().to_string().bytes());
                    rest = after;
                }
            }
        }
        out
    }

    proptest! {
        #[test]
        fn every_name_can_be_told_from_its_quoted_form(bytes: Vec<u8>, text: String) {
            for name in [bytes, text.into_bytes()] {
                let shown = Quoted(&name).to_string();
                prop_assert_eq!(unquoted(&shown), name);
                prop_assert!(!shown.chars().any(|c| c.is_control() || is_format_char(c)));
            }
        }
    }

    #[test]
    fn quoting_is_one_line_and_unambiguous() {
        let cases: &[(&[u8], &str)] = &[
            (b"plain", "plain"),
            (b"a\nb", "a\\nb"),
            (b"\x1b[31m", "\\u{1b}[31m"),
            (b"back\\slash", "back\\\\slash"),
            (b"\xff\xfe", "\\xff\\xfe"),
            ("gr\u{fc}n".as_bytes(), "gr\u{fc}n"),
        ];
        for (name, shown) in cases {
            assert_eq!(Quoted(name).to_string(), *shown);
        }
    }

    #[test]
    fn what_the_machine_lacks_is_told_apart() {
        for (errno, is) in [(ENOMEM, true), (ENFILE, true), (EMFILE, true), (5, false)] {
            let error = Error::io("opening x", io::Error::from_raw_os_error(errno));
            assert_eq!((error.is_shortage(), error.kind()), (is, ErrorKind::Io));
            assert_eq!(error.context("y").is_shortage(), is);
        }
        assert!(!Error::usage("x").is_shortage());
    }

    #[test]
    fn a_full_disk_is_told_apart() {
        let error = Error::io("writing x", io::Error::from_raw_os_error(28));
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.errno(), Some(28));
    }
}
