//! Tapes and pools, as the spool has them.

use std::ffi::OsStr;
use std::io::BufRead;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::lock;
use super::log::{self, LogWriter, TapeFile};
use super::text::{self, Fields, Sections};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::{self, quoted};
use crate::tape::label::{LABEL_BYTES, Label};

/// Where a tape is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TapeStatus {
    /// At hand, in no drive.
    Offline,
    /// In a drive.
    Loaded,
    /// In a drive that works with it.
    Busy,
    /// Somewhere else.
    Offsite,
}

impl TapeStatus {
    /// The name of its marker, without the `@`.
    pub fn as_str(self) -> &'static str {
        match self {
            TapeStatus::Offline => "offline",
            TapeStatus::Loaded => "loaded",
            TapeStatus::Busy => "busy",
            TapeStatus::Offsite => "offsite",
        }
    }
}

const STATUSES: &[(&str, TapeStatus)] = &[
    ("busy", TapeStatus::Busy),
    ("loaded", TapeStatus::Loaded),
    ("offsite", TapeStatus::Offsite),
    ("offline", TapeStatus::Offline),
];

/// A tape that the spool knows.
#[derive(Clone, Debug)]
pub struct Tape {
    root: PathBuf,
    dir: PathBuf,
}

impl Tape {
    pub(super) fn in_dir(root: &Path, dir: PathBuf) -> Result<Tape> {
        if !dir.is_dir() {
            let message = format!("there is no tape {}", quoted(&dir));
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        Ok(Tape { root: root.to_path_buf(), dir })
    }

    /// Where it is in the spool.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it is called: the text of its label, or the name of its directory if the spool has no
    /// copy of the label.
    pub fn name(&self) -> Vec<u8> {
        match self.label() {
            Ok(Some(label)) => label.text().to_vec(),
            _ => self.dir.file_name().unwrap_or_default().as_bytes().to_vec(),
        }
    }

    /// The copy of its label.
    pub fn label(&self) -> Result<Option<Label>> {
        let path = self.dir.join("label");
        if !lock::exists(&path)? {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        let mut input = std::io::Read::take(text::open(&path)?, LABEL_BYTES as u64 + 1);
        std::io::Read::read_to_end(&mut input, &mut bytes)
            .map_err(|e| Error::io(format!("reading {}", quoted(&path)), e))?;
        Label::parse(&bytes).map(Some).map_err(|e| e.context(quoted(&path)))
    }

    /// Where it is. One that a drive had when it was taken away from the spool is offline, and one
    /// whose drive nobody works with is not busy.
    pub fn status(&self) -> Result<TapeStatus> {
        let status = lock::marker(&self.dir, STATUSES)?.unwrap_or(TapeStatus::Offline);
        if !matches!(status, TapeStatus::Loaded | TapeStatus::Busy) {
            return Ok(status);
        }
        Ok(match self.drive_dir()? {
            None => TapeStatus::Offline,
            Some(dir) if !lock::is_believed(&dir) => TapeStatus::Loaded,
            Some(_) => status,
        })
    }

    /// The directory of the drive that it is in.
    fn drive_dir(&self) -> Result<Option<PathBuf>> {
        let drives = self.root.join("drive");
        for name in lock::names_in(&drives)? {
            let dir = drives.join(name);
            let link = std::fs::read_link(dir.join("tape"));
            if link.is_ok_and(|it| it.file_name() == self.dir.file_name()) {
                return Ok(Some(dir));
            }
        }
        Ok(None)
    }

    /// Its log.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    pub(super) fn set_status(&self, status: TapeStatus) -> Result<()> {
        lock::set_marker(&self.dir, STATUSES, Some(status.as_str()))
    }

    /// Notes that it has been taken away, or brought back.
    pub fn move_offsite(&self, is_offsite: bool) -> Result<()> {
        match self.status()? {
            TapeStatus::Loaded | TapeStatus::Busy => {
                let shown = Quoted(&self.name()).to_string();
                Err(Error::new(ErrorKind::Locked, format!("tape {shown} is in a drive")))
            }
            _ if is_offsite => self.set_status(TapeStatus::Offsite),
            _ => self.set_status(TapeStatus::Offline),
        }
    }

    /// What is known of it: `blocksize`, `maxblocks` and whatever else.
    pub fn metrics(&self) -> Result<Fields> {
        let path = self.dir.join("metrics");
        if !lock::exists(&path)? {
            return Ok(Fields::default());
        }
        // Fields without a section of their own.
        let input = std::io::Read::chain(&b"%metrics\n"[..], text::open(&path)?);
        let mut sections = Sections::new(input);
        sections.next_section()?;
        sections.fields().map_err(|e| e.context(quoted(&path)))
    }

    /// Notes what is known of it. Only for who has the drive that it is in.
    pub fn set_metrics(&self, metrics: &Fields) -> Result<()> {
        sys::replace_file(&self.dir.join("metrics"), &metrics.to_text())
    }

    /// Whether what was on it is gone, with its name, because its cartridge has got another label.
    pub fn is_gone(&self) -> Result<bool> {
        Ok(self.metrics()?.get(GONE).is_some())
    }

    /// Whether it is known that it can only be appended to.
    pub fn is_worm(&self) -> Result<bool> {
        Ok(self.metrics()?.get(WORM).is_some())
    }

    /// Notes that its cartridge gets another label, at this time; with `None`, that it is there
    /// after all. Only for who has the drive that it is in.
    pub fn set_gone(&self, time: Option<i64>) -> Result<()> {
        let mut metrics = self.metrics()?;
        match time {
            Some(time) => metrics.set(GONE, time.to_string())?,
            None if metrics.get(GONE).is_none() => return Ok(()),
            None => metrics.remove(GONE),
        }
        self.set_metrics(&metrics)
    }

    /// Whether this is the label of another tape that has the same name: it was made at another
    /// time.
    pub fn is_other(&self, label: &Label) -> Result<bool> {
        let known = self.label()?;
        let known = known.as_ref().and_then(|it| it.get(b"created"));
        Ok(known.is_some() && label.get(b"created").is_some_and(|it| Some(it) != known))
    }

    /// Calls `each` with every file of its log.
    pub fn files(&self, each: &mut dyn FnMut(TapeFile) -> Result<()>) -> Result<()> {
        log::each_line(&self.log_path(), &mut |line| {
            TapeFile::parse(line).map_or(Ok(()), &mut *each)
        })
    }

    /// Whether a batch that was begun at this time is gone, because the tape has got its label
    /// since. What its log has, which is set aside with a label, is there, whatever clocks say.
    pub fn has_lost(&self, filenum: u64, job: &str, batch: u64, begun: i64) -> Result<bool> {
        // A copy of a label that is damaged says nothing; checking the tape tells of it.
        let label = self.label().ok().flatten();
        let created = label.and_then(|it| text::parse_number(it.get(b"created")?));
        if created.is_none_or(|it: i64| it <= begun) && !self.is_gone()? {
            return Ok(false);
        }
        let mut is_there = false;
        self.files(&mut |it| {
            is_there |= (it.filenum, &*it.job, it.batch) == (filenum, job, batch);
            Ok(())
        })?;
        Ok(!is_there)
    }

    /// Puts the log aside, as `log.<time>`: what it tells of has been written over.
    pub fn set_log_aside(&self, now: i64) -> Result<()> {
        let log = self.log_path();
        if !lock::exists(&log)? {
            return Ok(());
        }
        sys::rename_durable(&log, &self.dir.join(format!("log.{now}")))
    }

    /// Whether a log that was put aside has a file like this, and the log of now has none.
    pub fn has_put_aside(&self, is_it: &dyn Fn(&TapeFile) -> bool) -> Result<bool> {
        let has = |name: &OsStr| {
            let mut found = false;
            log::each_line(&self.dir.join(name), &mut |line| {
                found |= TapeFile::parse(line).is_some_and(|it| is_it(&it));
                Ok(())
            })?;
            Ok::<_, Error>(found)
        };
        let mut is_aside = false;
        for name in lock::names_in(&self.dir)? {
            is_aside = is_aside || name.as_bytes().starts_with(b"log.") && has(&name)?;
        }
        Ok(is_aside && !has(OsStr::new("log"))?)
    }

    /// Notes what a file of the tape is; on return that lasts. Only for who has the drive that it
    /// is in.
    pub fn add_file(&self, file: &TapeFile) -> Result<()> {
        let mut log = LogWriter::open(&self.log_path())?;
        log.put(&file.to_line())?;
        log.sync()
    }
}

/// What the metrics of a tape have from the time on when its cartridge gets another label.
pub const GONE: &str = "gone";

/// What the metrics of a tape have that can only be appended to: not everybody is told by a drive.
pub const WORM: &str = "worm";

/// The name of a tape's directory: its label, if that can be the name of one. Otherwise what stands
/// in the way is written as `%XX`.
pub fn dir_name(label: &[u8]) -> Vec<u8> {
    let mut name = Vec::new();
    for (at, byte) in label.iter().enumerate() {
        match byte {
            b'/' | b'%' => name.extend(format!("%{byte:02X}").into_bytes()),
            b'.' if at == 0 => name.extend(b"%2E"),
            byte => name.push(*byte),
        }
    }
    name
}

/// Longest name that a file system takes.
const NAME_BYTES_MAX: usize = 255;

/// The name that the directory of a tape gets. [`ErrorKind::Usage`] if none can have it.
///
/// [`ErrorKind::Usage`]: crate::error::ErrorKind::Usage
pub fn notable_name(label: &[u8]) -> Result<Vec<u8>> {
    let name = dir_name(label);
    if name.len() <= NAME_BYTES_MAX {
        return Ok(name);
    }
    let what = format!("label {} is too long to be noted in the spool", Quoted(label));
    Err(Error::usage(format!("{what}: at most {NAME_BYTES_MAX} bytes")))
}

/// Notes a tape, with a copy of its label.
pub(super) fn register(root: &Path, label: &Label) -> Result<Tape> {
    if let Some(tape) = find(root, label.text())? {
        sys::replace_file(&tape.dir.join("label"), &label.to_text())?;
        // Who noted it first may have died before it lasted.
        sys::sync_dir(&root.join("tape"))?;
        return Ok(tape);
    }
    let name = notable_name(label.text())?;
    let tapes = root.join("tape");
    let (new, dir) = (tapes.join(".new"), tapes.join(OsStr::from_bytes(&name)));
    clear_new(&new)?;
    let failed = |e| Error::io(format!("creating {}", quoted(&new)), e);
    sys::make_private_dir(&new).map_err(failed)?;
    sys::replace_file(&new.join("label"), &label.to_text())?;
    lock::set_marker(&new, STATUSES, Some(TapeStatus::Offline.as_str()))?;
    sys::rename_durable(&new, &dir)?;
    Tape::in_dir(root, dir)
}

/// Removes what somebody left who died while he made something new.
pub(super) fn clear_new(new: &Path) -> Result<()> {
    match std::fs::remove_dir_all(new) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("removing {}", quoted(new)), e))
        }
        _ => Ok(()),
    }
}

/// The tape with this label. The original program uses labels as they are.
pub(super) fn find(root: &Path, label: &[u8]) -> Result<Option<Tape>> {
    let is_plain = !label.contains(&b'/') && !label.starts_with(b".") && !label.is_empty();
    for name in [is_plain.then(|| label.to_vec()), Some(dir_name(label))].into_iter().flatten() {
        let dir = root.join("tape").join(OsStr::from_bytes(&name));
        if name.len() <= NAME_BYTES_MAX && dir.is_dir() {
            return Tape::in_dir(root, dir).map(Some);
        }
    }
    Ok(None)
}

/// The labels that a pool lists, a line each. What the original program left is a directory.
pub(super) fn pool_labels(path: &Path) -> Result<Vec<Vec<u8>>> {
    if path.is_dir() {
        let names = lock::names_in(path)?;
        return Ok(names.into_iter().map(|it| it.as_bytes().to_vec()).collect());
    }
    let mut labels = Vec::new();
    let mut lines = text::Lines::new(std::io::Read::take(text::open(path)?, POOL_BYTES_MAX));
    while lines.advance()? {
        if !lines.line().is_empty() {
            labels.push(lines.line().to_vec());
        }
    }
    Ok(labels)
}

/// Longest list of a pool that is read, in bytes.
const POOL_BYTES_MAX: u64 = 16 << 20;

/// Lines of `input`, each without its newline, as they are given to a batch.
pub fn names_of_files<R: BufRead>(input: R) -> impl Iterator<Item = Result<Vec<u8>>> {
    let mut lines = text::Lines::new(input);
    std::iter::from_fn(move || match lines.advance() {
        Ok(true) => Some(Ok(lines.line().to_vec())),
        Ok(false) => None,
        Err(e) => Some(Err(e)),
    })
}
