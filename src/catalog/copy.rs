//! Copies of the catalog for other places: written whole, and opened only if they are good.
//!
//! A copy is a consistent state of the database, of after a run. On a volume it is compressed, with
//! zstd's checksum over all of it. Nothing is believed of a copy before that, the database's own
//! check and the rows that say what it is have been looked at.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, OpenFlags};

use super::Checking;
use super::chain::LAST_MANIFEST;
use super::history::text_of;
use super::read::Reader;
use super::run::{Run, RunId};
use super::{schema, sql};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, quoted};

/// Folder of a volume that has copies.
pub const DIR: &str = "catalog";
/// Level of zstd: a database shrinks hardly further by more work.
const ZSTD_LEVEL: i32 = 1;
/// Pages that are copied at a time.
const STEP_PAGES: std::ffi::c_int = 4096;
/// How long the copy waits if somebody holds the database.
const PAUSE: Duration = Duration::from_millis(20);
/// Bytes moved at a time.
const PIECE_BYTES: usize = 1 << 17;

/// Name of the copy of after a run, relative to a volume.
pub fn document_name(run: RunId) -> String {
    format!("{DIR}/run-{run:08}.sqlite.zst")
}

/// The run that a file of the folder [`DIR`] is a copy of after, by its name.
pub fn run_of(name: &str) -> Option<RunId> {
    let digits = name.strip_prefix("run-")?.strip_suffix(".sqlite.zst")?;
    let run = digits.parse().ok()?;
    (document_name(run).strip_prefix(DIR)?.strip_prefix('/')? == name).then_some(run)
}

/// The copies in a volume's folder, newest first; none if it has no such folder.
pub fn list(volume: &Path) -> Result<Vec<RunId>> {
    let dir = volume.join(DIR);
    let failed = |e| Error::io(format!("listing {}", quoted(&dir)), e);
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    let mut runs = Vec::new();
    for entry in entries {
        runs.extend(entry.map_err(failed)?.file_name().to_str().and_then(run_of));
    }
    runs.sort_unstable_by(|a, b| b.cmp(a));
    Ok(runs)
}

/// A copy on its way to volumes, as a file beside the catalog. Gone when this is dropped; what a
/// crash leaves is overwritten by the next one.
pub struct Copy {
    path: PathBuf,
}

impl Copy {
    /// Copies the catalog at `catalog` as it is now. Only for who holds the writer's lock. `check`
    /// is asked now and then; what it fails with ends the work.
    pub fn new(catalog: &Path, check: &dyn Fn() -> Result<()>) -> Result<Copy> {
        let copy = Copy { path: path_beside(catalog) };
        copy_to(&Reader::open(catalog)?, &copy.path, check)?;
        Ok(copy)
    }

    /// Writes it compressed.
    pub fn write_to(&self, out: &mut dyn Write, check: &dyn Fn() -> Result<()>) -> Result<()> {
        let failed = |e| Error::io(format!("copying {}", quoted(&self.path)), e);
        let mut file = File::open(&self.path).map_err(failed)?;
        let mut out = zstd::Encoder::new(out, ZSTD_LEVEL).map_err(failed)?;
        out.include_checksum(true).map_err(failed)?;
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            check()?;
            let len = file.read(&mut piece).map_err(failed)?;
            let Some(bytes) = piece.get(..len).filter(|it| !it.is_empty()) else { break };
            out.write_all(bytes).map_err(failed)?;
        }
        out.finish().map_err(failed)?.flush().map_err(failed)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // The next one overwrites what stays.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Copies a catalog into the file `to`. `check` is asked now and then.
pub(super) fn copy_to(from: &Reader, to: &Path, check: &dyn Fn() -> Result<()>) -> Result<()> {
    let failed = |e| Error::io(format!("writing {}", quoted(to)), e);
    sys::private_file().write(true).create(true).truncate(true).open(to).map_err(failed)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut dest = Connection::open_with_flags(to, flags).map_err(sql)?;
    // It need not survive a crash.
    for (pragma, value) in [("journal_mode", "OFF"), ("synchronous", "OFF")] {
        dest.pragma_update(None, pragma, value).map_err(sql)?;
    }
    let backup = Backup::new(from.conn(), &mut dest).map_err(sql)?;
    loop {
        check()?;
        match backup.step(STEP_PAGES).map_err(sql)? {
            StepResult::Done => break,
            StepResult::More => {}
            _ => std::thread::sleep(PAUSE),
        }
    }
    drop(backup);
    dest.close().map_err(|(_, e)| sql(e))
}

fn path_beside(catalog: &Path) -> PathBuf {
    let mut name = catalog.file_name().unwrap_or_default().to_os_string();
    name.push(".copy");
    catalog.with_file_name(name)
}

/// Unpacks the copy at `from` into the file `to`, which must not exist, and opens it, if it is
/// whole and a catalog that this program knows. On failure `to` may be left, of no use.
pub fn unpack(from: &Path, to: &Path, check: &dyn Fn() -> Result<()>) -> Result<Reader> {
    let damaged = |e| {
        let message = format!("the copy {} is damaged", quoted(from));
        Error::with_source(ErrorKind::Corrupt, message, e)
    };
    let failed = |e| Error::io(format!("writing {}", quoted(to)), e);
    let mut text = text_of(from)?;
    let mut out = sys::private_file().write(true).create_new(true).open(to).map_err(failed)?;
    let mut piece = vec![0; PIECE_BYTES];
    let (mut said, mut len) = (None, 0u64);
    loop {
        check()?;
        let read = text.read(&mut piece).map_err(damaged)?;
        let Some(bytes) = piece.get(..read).filter(|it| !it.is_empty()) else { break };
        len += read as u64;
        // A forged copy must not fill the disk.
        if len > *said.get_or_insert_with(|| said_len(bytes).unwrap_or_default()) {
            let message = format!("the copy {} is longer than it says", quoted(from));
            return Err(Error::corrupt(message));
        }
        out.write_all(bytes).map_err(failed)?;
    }
    drop(out);
    let reader = Reader::open(to).map_err(|e| e.context(quoted(from)))?;
    let mut faults = Vec::new();
    let mut found = |fault| {
        if faults.len() < FAULTS_MAX {
            faults.push(fault);
        }
    };
    reader.check(&mut Checking::new(&mut found, check))?;
    match faults.is_empty() {
        true => Ok(reader),
        false => {
            let message = format!("the copy {} is damaged: {}", quoted(from), faults.join("; "));
            Err(Error::corrupt(message))
        }
    }
}

/// Faults of a copy that are told.
const FAULTS_MAX: usize = 3;

/// What a SQLite file begins with.
const MAGIC: &[u8] = b"SQLite format 3\0";
/// Length of what a SQLite file says of itself at its beginning.
const HEADER_BYTES: usize = 100;
/// So much from the beginning on is searched for the settings, whose table is the first of all.
const HEAD_BYTES: usize = 1 << 16;

/// Reads the copy at `from` to its end without keeping it: its bytes are those that zstd's checksum
/// is of, it is as long as it says, a catalog that this program knows, and of after `run`.
/// [`unpack`] goes deeper.
///
/// Says whether it is of the catalog that the volume named `volume` belongs to: each copy knows the
/// volume that it was made for. (`catalog_id` does not say it: a catalog that was rebuilt has a new
/// one, and goes on.) Of another catalog's copy nothing more is asked.
pub fn verify(
    from: &Path,
    run: Option<&Run>,
    volume: &str,
    check: &dyn Fn() -> Result<()>,
) -> Result<bool> {
    let damaged = |e| Error::with_source(ErrorKind::Corrupt, "it is damaged", e);
    let mut text = text_of(from)?;
    let (mut head, mut len) = (Vec::new(), 0u64);
    let mut piece = vec![0; PIECE_BYTES];
    let mut search = Search::new(volume.as_bytes());
    loop {
        check()?;
        let read = text.read(&mut piece).map_err(damaged)?;
        let Some(bytes) = piece.get(..read).filter(|it| !it.is_empty()) else { break };
        let room = HEAD_BYTES.saturating_sub(head.len()).min(bytes.len());
        head.extend_from_slice(bytes.get(..room).unwrap_or_default());
        search.look(bytes);
        len += bytes.len() as u64;
    }
    let (id, version) = (number_at(&head, 68), number_at(&head, 60));
    if !head.starts_with(MAGIC) || id != Some(schema::APPLICATION_ID.cast_unsigned()) {
        return Err(Error::corrupt("it is no catalog"));
    }
    if version.is_none_or(|it| it == 0 || it > schema::VERSION.cast_unsigned()) {
        let message = "it is of a version that this program does not know";
        return Err(Error::new(ErrorKind::Version, message));
    }
    if said_len(&head) != Some(len) {
        return Err(Error::corrupt("it is not as long as it says"));
    }
    if !search.is_found {
        return Ok(false);
    }
    // Key and value of a setting lie side by side.
    let key = LAST_MANIFEST.as_bytes();
    let mut found = (0..head.len()).filter_map(|at| head.get(at..)?.strip_prefix(key)).peekable();
    let newest = run.map(|it| format!("{} {} ", it.id, it.uuid));
    let is_of = |it: &[u8]| newest.as_ref().is_none_or(|newest| it.starts_with(newest.as_bytes()));
    match found.peek().is_none() || found.any(is_of) {
        true => Ok(true),
        false => Err(Error::corrupt("it is not of after its run")),
    }
}

/// Looks for a word in bytes that come piece by piece.
struct Search<'a> {
    word: &'a [u8],
    /// The end of what came before, shorter than the word.
    rest: Vec<u8>,
    is_found: bool,
}

impl<'a> Search<'a> {
    fn new(word: &'a [u8]) -> Search<'a> {
        Search { word, rest: Vec::new(), is_found: word.is_empty() }
    }

    fn look(&mut self, bytes: &[u8]) {
        if self.is_found {
            return;
        }
        let most = self.word.len() - 1;
        let has = |it: &[u8]| it.windows(self.word.len()).any(|it| it == self.word);
        self.rest.extend_from_slice(bytes.get(..most.min(bytes.len())).unwrap_or_default());
        self.is_found = has(&self.rest) || has(bytes);
        if bytes.len() >= most {
            self.rest.clear();
            self.rest.extend_from_slice(bytes.get(bytes.len() - most..).unwrap_or_default());
        } else {
            let surplus = self.rest.len().saturating_sub(most);
            self.rest.drain(..surplus);
        }
    }
}

/// A number of the header of a SQLite file.
fn number_at(head: &[u8], at: usize) -> Option<u32> {
    let bytes = head.get(..HEADER_BYTES)?.get(at..at + 4)?;
    bytes.try_into().ok().map(u32::from_be_bytes)
}

/// How long a SQLite file is, as its header says, in bytes.
fn said_len(head: &[u8]) -> Option<u64> {
    // The page size has two bytes, of which 1 stands for 65536.
    let page = match number_at(head, 16)? >> 16 {
        1 => 1 << 16,
        bytes => u64::from(bytes),
    };
    Some(u64::from(number_at(head, 28)?) * page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_over_pieces_of_any_length() {
        let text = b"some text with a word in it";
        for (word, is_there) in [(&b"a word"[..], true), (b"a world", false), (b"it", true)] {
            for len in 1..text.len() {
                let mut search = Search::new(word);
                text.chunks(len).for_each(|it| search.look(it));
                assert_eq!(search.is_found, is_there, "{len}");
            }
        }
    }

    #[test]
    fn names_lead_back_to_runs() {
        for run in [1, 99_999_999, 123_456_789] {
            let name = document_name(run);
            assert_eq!(run_of(name.strip_prefix("catalog/").unwrap()), Some(run));
        }
        for other in ["run-1.sqlite.zst", "run-00000001.sqlite.zst.new", "run-+0000001.sqlite.zst"]
        {
            assert_eq!(run_of(other), None, "{other}");
        }
    }
}
