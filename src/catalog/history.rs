//! Manifests read back: from a volume that may be damaged, or somebody else's.
//!
//! Nothing is believed: lines, names, counts and numbers have limits, and what does not fit is an
//! error that says which line. [`survey`] looks at a whole manifest and gives its first and last
//! line; only then [`Lines`] gives the lines between, one at a time.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;

use super::manifest::{COUNTS, DIGEST, Previous, VERSION};
use super::run::{COMMENT_BYTES_MAX, Counts, RunId, Tally};
use crate::chunk::{Digest, HashAlgo};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, Time, path_from, quoted};
use crate::volume::VolumeConfig;

/// Longest line that is read. Those of files have their extents, about 85 bytes each.
const LINE_BYTES_MAX: u64 = 256 << 20;
/// Longest first line: tags, a comment, settings and volumes are in it.
const HEADER_BYTES_MAX: u64 = 4 << 20;
/// Longest last line.
const END_BYTES_MAX: usize = 4096;
/// Greatest number of a run or a version: others have to follow it.
pub const NUMBER_MAX: i64 = 1 << 48;
/// Most memory for decompressing, as the power of two that zstd wants: 32 MiB.
const WINDOW_LOG_MAX: u32 = 25;
/// Longest value of a setting, and longest name of a volume or a run.
const WORD_BYTES_MAX: usize = 200;

/// What a manifest says in its first line.
#[derive(Clone, Debug)]
pub struct Head {
    /// Version of its format.
    pub format: u32,
    /// Number of the run.
    pub run: RunId,
    /// Its name.
    pub uuid: String,
    /// Name of its source.
    pub source: Vec<u8>,
    /// When it began.
    pub started: Time,
    /// The hash that names chunks, blocks and files.
    pub hash: HashAlgo,
    /// Its tags.
    pub tags: Vec<String>,
    /// Its comment.
    pub comment: String,
    /// What only format 2 says.
    pub around: Option<Around>,
}

/// The catalog around a run.
#[derive(Clone, Debug)]
pub struct Around {
    /// Where the source lay.
    pub path: Vec<u8>,
    /// Name of the machine.
    pub host: Vec<u8>,
    /// The program that made the run.
    pub program: String,
    /// The catalog's settings.
    pub settings: Vec<(String, String)>,
    /// The catalog's volumes.
    pub volumes: Vec<VolumeConfig>,
    /// The newest earlier run of all.
    pub previous: Option<Previous>,
    /// The newest earlier run of the same source.
    pub basis: Option<(RunId, String)>,
}

/// What a manifest says in its last line; nothing but its lines in format 1.
#[derive(Clone, Copy, Debug)]
pub struct Tail {
    /// When the run ended.
    pub finished: Time,
    /// What it counted.
    pub counts: Counts,
}

/// A whole manifest.
#[derive(Clone, Debug)]
pub struct Survey {
    /// Its first line.
    pub head: Head,
    /// Its last line; `None` in format 1.
    pub tail: Option<Tail>,
    /// Hash of all before the last line.
    pub digest: Digest,
}

#[derive(Deserialize)]
struct RawHead<'a> {
    #[serde(borrow)]
    op: Cow<'a, str>,
    format: u32,
    run: RunId,
    uuid: String,
    source: Option<String>,
    source_b64: Option<String>,
    started: (i64, u32),
    hash_algo: String,
    #[serde(default)]
    tags: Vec<String>,
    #[serde(default)]
    comment: String,
    path: Option<String>,
    path_b64: Option<String>,
    host: Option<String>,
    host_b64: Option<String>,
    program: Option<String>,
    settings: Option<std::collections::BTreeMap<String, String>>,
    volumes: Option<Vec<RawVolume>>,
    previous: Option<RawRun>,
    basis: Option<RawRun>,
}

#[derive(Deserialize)]
struct RawVolume {
    number: i64,
    uuid: String,
    path: Option<String>,
    path_b64: Option<String>,
    status: String,
    reserve_percent: u8,
}

#[derive(Deserialize)]
struct RawRun {
    run: RunId,
    uuid: String,
    digest: Option<String>,
}

#[derive(Deserialize)]
struct RawTail<'a> {
    #[serde(borrow)]
    op: Cow<'a, str>,
    changes: u64,
    finished: Option<(i64, u32)>,
    digest: Option<String>,
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::corrupt(what.to_string())
}

/// A name from its key or from the key of its base64.
pub(super) fn name_from(text: Option<&str>, base64: Option<&str>, key: &str) -> Result<Vec<u8>> {
    match (text, base64) {
        (Some(text), None) => Ok(text.as_bytes().to_vec()),
        (None, Some(code)) => BASE64.decode(code).map_err(|_| bad(format!("{key}_b64 is none"))),
        _ => Err(bad(format!("no {key}"))),
    }
}

pub(super) fn time_from((secs, nanos): (i64, u32)) -> Result<Time> {
    match nanos < 1_000_000_000 {
        true => Ok(Time { secs, nanos }),
        false => Err(bad("impossible time")),
    }
}

fn check_number(number: i64, what: &str) -> Result<i64> {
    match (1..=NUMBER_MAX).contains(&number) {
        true => Ok(number),
        false => Err(bad(format!("impossible number of a {what}: {number}"))),
    }
}

/// A number that a version may have.
pub(super) fn check_version(version: i64) -> Result<i64> {
    check_number(version, "version")
}

/// A name that somebody gave to a run or a volume: it may end up in file names and listings.
fn check_word(word: &str) -> Result<()> {
    let is_plain = |it: char| it.is_ascii_alphanumeric() || "-_.".contains(it);
    match !word.is_empty() && word.len() <= WORD_BYTES_MAX && word.chars().all(is_plain) {
        true => Ok(()),
        false => Err(bad(format!("{word:.200?} is no name of a run or a volume"))),
    }
}

impl RawRun {
    fn check(self) -> Result<Previous> {
        check_word(&self.uuid)?;
        let digest = self.digest.map(|it| it.parse()).transpose()?;
        Ok(Previous { run: check_number(self.run, "run")?, uuid: self.uuid, digest })
    }
}

impl RawVolume {
    fn check(self) -> Result<VolumeConfig> {
        check_word(&self.uuid)?;
        let path = name_from(self.path.as_deref(), self.path_b64.as_deref(), "path")?;
        if self.reserve_percent > 100 {
            return Err(bad("impossible reserve"));
        }
        Ok(VolumeConfig {
            number: check_number(self.number, "volume")?,
            uuid: self.uuid,
            path: path_from(&path).to_path_buf(),
            status: self.status.parse()?,
            reserve_percent: self.reserve_percent,
        })
    }
}

impl Head {
    /// Reads a first line.
    pub fn parse(line: &[u8]) -> Result<Head> {
        let raw: RawHead<'_> = serde_json::from_slice(line).map_err(bad)?;
        if raw.op != "run" {
            return Err(bad("it is no manifest"));
        }
        if raw.format == 0 || raw.format > VERSION {
            let message = format!("format {} is not known to this program", raw.format);
            return Err(Error::new(ErrorKind::Version, message));
        }
        check_word(&raw.uuid)?;
        if raw.comment.len() > COMMENT_BYTES_MAX {
            return Err(bad("its comment is too long"));
        }
        let around = match raw.format {
            1 => None,
            _ => {
                let text = |it: &Option<String>| it.as_deref().map(str::to_owned);
                let name = |it: &Option<String>, code: &Option<String>, key| {
                    name_from(text(it).as_deref(), text(code).as_deref(), key)
                };
                let settings = raw.settings.ok_or_else(|| bad("no settings"))?;
                let volumes = raw.volumes.ok_or_else(|| bad("no volumes"))?;
                let is_long = |it: (&String, &String)| it.0.len().max(it.1.len()) > WORD_BYTES_MAX;
                if settings.iter().any(is_long) {
                    return Err(bad("a setting is too long"));
                }
                let basis = raw.basis.map(RawRun::check).transpose()?;
                Some(Around {
                    path: name(&raw.path, &raw.path_b64, "path")?,
                    host: name(&raw.host, &raw.host_b64, "host")?,
                    program: raw.program.ok_or_else(|| bad("no program"))?,
                    settings: settings.into_iter().collect(),
                    volumes: volumes.into_iter().map(RawVolume::check).collect::<Result<_>>()?,
                    previous: raw.previous.map(RawRun::check).transpose()?,
                    basis: basis.map(|it| (it.run, it.uuid)),
                })
            }
        };
        let head = Head {
            format: raw.format,
            run: check_number(raw.run, "run")?,
            uuid: raw.uuid,
            source: name_from(raw.source.as_deref(), raw.source_b64.as_deref(), "source")?,
            started: time_from(raw.started)?,
            hash: raw.hash_algo.parse().map_err(bad)?,
            tags: raw.tags,
            comment: raw.comment,
            around,
        };
        let is_later = |it: RunId| it >= head.run;
        let named = head.around.as_ref().map(|it| (&it.previous, &it.basis));
        let numbers = named.map(|(previous, basis)| {
            (previous.as_ref().map(|it| it.run), basis.as_ref().map(|it| it.0))
        });
        match numbers {
            Some((previous, basis))
                if previous.is_some_and(is_later)
                    || basis.is_some_and(|it| previous.is_none_or(|last| it > last)) =>
            {
                Err(bad("it names a run as earlier that is not"))
            }
            _ => Ok(head),
        }
    }

    /// The newest earlier run, as far as this one says it.
    pub fn previous(&self) -> Option<&Previous> {
        self.around.as_ref()?.previous.as_ref()
    }
}

impl Tail {
    /// Reads the last line of a manifest of this format with so many lines between, whose text
    /// before it has this digest.
    fn parse(line: &[u8], format: u32, changes: u64, digest: &Digest) -> Result<Option<Tail>> {
        let cut = || bad("it is cut short: it has no last line");
        let raw: RawTail<'_> = serde_json::from_slice(line).map_err(|_| cut())?;
        if raw.op != "end" {
            return Err(cut());
        }
        if raw.changes != changes {
            return Err(bad(format!("it has {changes} lines instead of {}", raw.changes)));
        }
        if format == 1 {
            return Ok(None);
        }
        let said: Option<Digest> = raw.digest.map(|it| it.parse()).transpose()?;
        if said.as_ref() != Some(digest) {
            return Err(bad("it does not have the digest that it says"));
        }
        let all: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(line).map_err(bad)?;
        let mut counts = [0; COUNTS.len()];
        for (key, count) in COUNTS.iter().zip(&mut counts) {
            let found = all.get(*key).and_then(serde_json::Value::as_u64);
            let found = found.filter(|it| i64::try_from(*it).is_ok());
            *count = found.ok_or_else(|| bad(format!("its last line does not say {key}")))?;
        }
        let finished = raw.finished.ok_or_else(|| bad("its last line does not say finished"))?;
        Ok(Some(Tail { finished: time_from(finished)?, counts: Counts::from_columns(counts) }))
    }
}

impl Counts {
    /// From the columns of `runs`.
    fn from_columns(columns: [u64; 13]) -> Counts {
        let [added, modified, deleted, unchanged, a, m, d, u, rest @ ..] = columns;
        let [files, bytes, read, stored, problems] = rest;
        Counts {
            entries: Tally { added, modified, deleted, unchanged },
            dirs: Tally { added: a, modified: m, deleted: d, unchanged: u },
            files,
            bytes,
            bytes_read: read,
            bytes_stored: stored,
            problems,
        }
    }
}

/// Opens a file of a volume for reading, if it is one: whatever else may lie there would keep its
/// reader waiting.
pub fn open_document(path: &Path) -> Result<File> {
    let failed = |e| Error::io(quoted(path).to_string(), e);
    if !std::fs::symlink_metadata(path).map_err(failed)?.is_file() {
        return Err(Error::corrupt(format!("{} is not a file", quoted(path))));
    }
    sys::private_file().read(true).open(path).map_err(failed)
}

/// The decompressed text of a document.
pub(super) fn text_of(path: &Path) -> Result<impl BufRead + use<>> {
    let failed = |e| Error::io(quoted(path).to_string(), e);
    let mut text = zstd::Decoder::new(open_document(path)?).map_err(failed)?;
    text.window_log_max(WINDOW_LOG_MAX).map_err(failed)?;
    Ok(BufReader::with_capacity(1 << 16, text))
}

/// Reads a manifest from its first line to its last; `check` is asked now and then, and what it
/// fails with ends the work.
pub fn survey(path: &Path, check: &dyn Fn() -> Result<()>) -> Result<Survey> {
    survey_text(&mut text_of(path)?, check).map_err(|e| e.context(quoted(path)))
}

/// Reads the text of a manifest from its first line to its last, as [`survey`] does.
pub fn survey_text(text: &mut impl BufRead, check: &dyn Fn() -> Result<()>) -> Result<Survey> {
    let damaged = |e| Error::with_source(ErrorKind::Corrupt, "it does not decompress", e);
    let mut first = Vec::new();
    text.by_ref().take(HEADER_BYTES_MAX).read_until(b'\n', &mut first).map_err(damaged)?;
    let head = Head::parse(&first)?;
    let mut hasher = DIGEST.hasher();
    hasher.update(&first);
    // The line at hand, as long as it may be the last one, which is not hashed.
    let (mut held, mut is_long, mut is_ended, mut lines) = (Vec::new(), false, false, 0u64);
    loop {
        check()?;
        let buffer = text.fill_buf().map_err(damaged)?;
        if buffer.is_empty() {
            break;
        }
        for part in buffer.split_inclusive(|it| *it == b'\n') {
            if std::mem::replace(&mut is_ended, part.ends_with(b"\n")) {
                hasher.update(&held);
                held.clear();
                is_long = false;
                lines += 1;
            }
            if is_long || held.len() + part.len() > END_BYTES_MAX {
                hasher.update(&held);
                hasher.update(part);
                held.clear();
                is_long = true;
            } else {
                held.extend_from_slice(part);
            }
        }
        let len = buffer.len();
        text.consume(len);
    }
    let digest = hasher.finish();
    let tail = Tail::parse(&held, head.format, lines, &digest)?;
    Ok(Survey { head, tail, digest })
}

/// The lines of a manifest between its first and its last one.
pub struct Lines<R> {
    text: R,
    line: Vec<u8>,
    number: u64,
    path: PathBuf,
}

impl Lines<()> {
    /// The lines of the manifest at `path`, which has been surveyed.
    pub fn open(path: &Path) -> Result<Lines<impl BufRead + use<>>> {
        let mut lines =
            Lines { text: text_of(path)?, line: Vec::new(), number: 0, path: path.to_path_buf() };
        lines.next_line()?;
        Ok(lines)
    }
}

impl<R: BufRead> Lines<R> {
    /// The next line, if there is one.
    pub fn next_line(&mut self) -> Result<Option<&[u8]>> {
        self.line.clear();
        let read = self.text.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut self.line);
        let len = read.map_err(|e| {
            Error::with_source(ErrorKind::Corrupt, quoted(&self.path).to_string(), e)
        })?;
        self.number += 1;
        match len {
            0 => Ok(None),
            _ if len as u64 >= LINE_BYTES_MAX => Err(self.at(bad("the line is too long"))),
            _ => Ok(Some(&self.line)),
        }
    }

    /// The error, with the line at which it was met.
    pub fn at(&self, error: Error) -> Error {
        error.context(format!("{}: line {}", quoted(&self.path), self.number))
    }
}
