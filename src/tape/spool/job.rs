//! Jobs: a directory with the job file, the batches and a log.
//!
//! A batch's file is there before the job file names it, and what a completed batch has become is
//! there before what it was is taken away. Whoever takes a job's lock first puts right what a crash
//! left between two such steps, so nothing else has to know of them.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Deref;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::batch::{self, Batch, BatchId, BatchStatus, Results, Summary};
use super::lock::{self, Lock};
use super::log::LogWriter;
use super::text::{self, Fields, NewFile, Sections, parse_number, split_word};
use crate::error::{Error, Quoted, Result};
use crate::sys::{self, quoted};

/// What a batch says of itself, and nobody else.
pub(super) const OWN_KEYS: [&str; 4] = ["number", "added", "count", "size"];
/// Most batches that a job may have.
pub const BATCHES_MAX: usize = 1_000_000;

/// What a job is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// To write files to tape.
    Write,
    /// To read them back.
    Read,
}

impl JobKind {
    /// The letter that begins the name of the job file, and the value of its `type`.
    pub fn letter(self) -> &'static str {
        match self {
            JobKind::Write => "w",
            JobKind::Read => "r",
        }
    }

    fn file_name(self) -> &'static str {
        match self {
            JobKind::Write => "wjob",
            JobKind::Read => "rjob",
        }
    }
}

/// How far a job is. A job that has never been queued has no status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobStatus {
    /// In a queue.
    Ready,
    /// Being worked on; or its worker has died.
    Busy,
    /// All of it has been done.
    Done,
    /// Not to be done after all.
    Revoked,
    /// Another job has taken its place.
    Cloned,
}

impl JobStatus {
    /// The name of its marker, without the `@`.
    pub fn as_str(self) -> &'static str {
        match self {
            JobStatus::Ready => "ready",
            JobStatus::Busy => "busy",
            JobStatus::Done => "done",
            JobStatus::Revoked => "revoked",
            JobStatus::Cloned => "cloned",
        }
    }
}

/// Every status; one that is nearer to the job's end counts more.
const STATUSES: &[(&str, JobStatus)] = &[
    ("done", JobStatus::Done),
    ("revoked", JobStatus::Revoked),
    ("cloned", JobStatus::Cloned),
    ("busy", JobStatus::Busy),
    ("ready", JobStatus::Ready),
];

/// A line of `%batches`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLine {
    /// The batch's number.
    pub number: u64,
    /// Files in it.
    pub count: u64,
    /// Bytes in them.
    pub size: u64,
}

impl BatchLine {
    /// Reads `<number> count <files> size <bytes>`.
    pub fn parse(line: &[u8]) -> Option<BatchLine> {
        let (number, mut rest) = split_word(line);
        let mut it = BatchLine { number: parse_number(number)?, count: 0, size: 0 };
        while !rest.is_empty() {
            let (key, behind) = split_word(rest);
            let (value, next) = split_word(behind);
            match key {
                b"count" => it.count = parse_number(value)?,
                b"size" => it.size = parse_number(value)?,
                _ => {}
            }
            rest = next;
        }
        Some(it)
    }

    /// The line, without its newline.
    pub fn to_line(self) -> Vec<u8> {
        format!("{} count {} size {}", self.number, self.count, self.size).into_bytes()
    }
}

/// Reads a job file.
pub struct JobFile<R> {
    sections: Sections<R>,
    fields: Fields,
    has_batches: bool,
}

impl<R: BufRead> JobFile<R> {
    /// Reads the first section.
    pub fn read(input: R) -> Result<JobFile<R>> {
        let mut sections = Sections::new(input);
        if sections.next_section()?.as_deref() != Some(b"job") {
            return Err(Error::corrupt("a job file does not begin with %job"));
        }
        let fields = sections.fields()?;
        Ok(JobFile { sections, fields, has_batches: false })
    }

    /// The fields of `%job`.
    pub fn fields(&self) -> &Fields {
        &self.fields
    }

    /// The next line of `%batches`.
    pub fn next_batch(&mut self) -> Result<Option<BatchLine>> {
        while !self.has_batches {
            match self.sections.next_section()? {
                Some(name) => self.has_batches = name == b"batches",
                None => return Ok(None),
            }
        }
        match self.sections.next_line()?.map(BatchLine::parse) {
            Some(None) => Err(self.sections.error("names no batch")),
            Some(found) => Ok(found),
            None => Ok(None),
        }
    }
}

/// A job.
#[derive(Clone, Debug)]
pub struct Job {
    dir: PathBuf,
    uuid: String,
    kind: JobKind,
    fields: Fields,
}

impl Job {
    /// Reads the job in `dir`.
    pub(super) fn open(dir: &Path) -> Result<Job> {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let kind = match lock::exists(&dir.join(JobKind::Read.file_name()))? {
            true => JobKind::Read,
            false => JobKind::Write,
        };
        let path = dir.join(kind.file_name());
        let file = JobFile::read(text::open(&path)?).map_err(|e| e.context(quoted(&path)))?;
        Ok(Job { dir: dir.to_path_buf(), uuid: name.into_owned(), kind, fields: file.fields })
    }

    /// Its name.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it is for.
    pub fn kind(&self) -> JobKind {
        self.kind
    }

    /// The job file.
    pub fn path(&self) -> PathBuf {
        self.dir.join(self.kind.file_name())
    }

    /// The fields of `%job`.
    pub fn fields(&self) -> &Fields {
        &self.fields
    }

    /// The directory that relative names of files are looked up from.
    pub fn root(&self) -> Option<&[u8]> {
        self.fields.get("root").filter(|it| !it.is_empty())
    }

    /// The directory that the names of its files are looked up from.
    pub fn lookup_root(&self) -> PathBuf {
        self.root().map_or_else(|| PathBuf::from("/"), |it| std::ffi::OsStr::from_bytes(it).into())
    }

    /// How far it is.
    pub fn status(&self) -> Result<Option<JobStatus>> {
        lock::marker(&self.dir, STATUSES)
    }

    /// Whether it is among the finished ones.
    pub fn is_archived(&self) -> bool {
        self.dir.parent().and_then(Path::file_name).is_some_and(|it| it == "archive")
    }

    /// Its log.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// The file with the sums of a batch's files.
    pub fn sums_path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("sums{number}"))
    }

    /// Its batches by number. Of two files of one number the further one counts.
    pub fn batches(&self) -> Result<Vec<BatchId>> {
        let names = lock::names_in(&self.dir)?;
        let mut found: Vec<BatchId> =
            names.iter().filter_map(|it| BatchId::parse(it.as_bytes())).collect();
        if found.len() > BATCHES_MAX {
            let dir = quoted(&self.dir);
            return Err(Error::corrupt(format!("{dir} has more than {BATCHES_MAX} batches")));
        }
        found.sort_by_key(|it| (it.number, std::cmp::Reverse(it.status)));
        found.dedup_by_key(|it| it.number);
        Ok(found)
    }

    /// The batches that have not been completed.
    pub fn pending(&self) -> Result<Vec<BatchId>> {
        let mut batches = self.batches()?;
        batches.retain(|it| it.status == BatchStatus::Pending);
        Ok(batches)
    }

    /// The file of a batch.
    pub fn batch_path(&self, id: BatchId) -> Result<PathBuf> {
        let path = self.dir.join(id.file_name());
        let other = self.dir.join(format!("@{}", id.number));
        let is_other = id.status == BatchStatus::Pending && !lock::exists(&path)?;
        Ok(if is_other && lock::exists(&other)? { other } else { path })
    }

    /// Opens a batch.
    pub fn batch(&self, id: BatchId) -> Result<Batch<BufReader<File>>> {
        Batch::open(&self.batch_path(id)?)
    }

    /// What the job file says of a batch.
    pub(super) fn line(&self, id: BatchId) -> Result<BatchLine> {
        let batch = self.batch(id)?;
        let number = |key| batch.fields().number(key).unwrap_or(0);
        Ok(BatchLine { number: id.number, count: number("count"), size: number("size") })
    }

    /// The name that the archive of a batch gives its first member, by which a tape file is known;
    /// the job file follows.
    pub fn member_name(&self, number: u64) -> Vec<u8> {
        [self.dir.as_os_str().as_bytes(), format!("/@{number}").as_bytes()].concat()
    }
}

/// A job that nobody else works on.
#[derive(Debug)]
pub struct OpenJob {
    job: Job,
    _lock: Lock,
}

impl Deref for OpenJob {
    type Target = Job;

    fn deref(&self) -> &Job {
        &self.job
    }
}

impl OpenJob {
    /// Takes the lock of the job in `dir`, and puts right what a crash left.
    pub(super) fn take(dir: &Path) -> Result<OpenJob> {
        let lock = Lock::take(dir)?;
        // Names that somebody saw, who died before they lasted: what is done now relies on them.
        sys::sync_dir(dir)?;
        sys::sync_dir(dir.parent().unwrap_or(dir))?;
        let mut open = OpenJob { job: Job::open(dir)?, _lock: lock };
        open.put_right()?;
        Ok(open)
    }

    fn put_right(&mut self) -> Result<()> {
        let names = lock::names_in(&self.dir)?;
        for name in &names {
            let path = self.dir.join(name);
            let bytes = name.as_bytes();
            if bytes.ends_with(b".new") {
                lock::remove_entry(&path)?;
            }
        }
        for id in self.batches()? {
            let path = self.dir.join(id.file_name());
            let begun = self.dir.join(format!("@{}", id.number));
            if id.status == BatchStatus::Pending && !lock::exists(&path)? {
                sys::rename_durable(&begun, &path)?;
            }
            let earlier = [BatchStatus::Pending, BatchStatus::Written].into_iter();
            for status in earlier.filter(|it| *it < id.status) {
                lock::remove_entry(&self.dir.join(BatchId { status, ..id }.file_name()))?;
            }
            if id.status != BatchStatus::Pending {
                lock::remove_entry(&begun)?;
            }
        }
        let missing = self.unnamed_batches()?;
        if missing.is_empty() { Ok(()) } else { self.rewrite(&missing) }
    }

    /// Batches that are there and not named in the job file.
    fn unnamed_batches(&self) -> Result<Vec<BatchLine>> {
        let mut ids = self.batches()?;
        let mut file = JobFile::read(text::open(&self.path())?)?;
        while let Some(line) = file.next_batch()? {
            if let Ok(at) = ids.binary_search_by_key(&line.number, |it| it.number) {
                ids.remove(at);
            }
        }
        ids.into_iter().map(|it| self.line(it)).collect()
    }

    /// Writes the job file anew. A batch that it names gets the line that is given here; others are
    /// added.
    pub(super) fn rewrite(&self, lines: &[BatchLine]) -> Result<()> {
        let mut added = lines.to_vec();
        let path = self.path();
        let mut new = NewFile::create(&path)?;
        new.put_line(&[b"%job"])?;
        new.put(&self.fields.to_text())?;
        new.put_line(&[b"\n%batches"])?;
        let mut sections = Sections::new(text::open(&path)?);
        while let Some(name) = sections.next_section()? {
            while name == b"batches"
                && let Some(line) = sections.next_line()?
            {
                let number = BatchLine::parse(line).map(|it| it.number);
                match added.iter().position(|it| Some(it.number) == number) {
                    Some(at) => new.put_line(&[&added.remove(at).to_line()])?,
                    None => new.put_line(&[line])?,
                }
            }
        }
        added.iter().try_for_each(|it| new.put_line(&[&it.to_line()]))?;
        let mut others = Sections::new(text::open(&path)?);
        while let Some(name) = others.next_section()? {
            if name == b"job" || name == b"batches" {
                continue;
            }
            new.put_line(&[b"\n%", &name])?;
            while let Some(line) = others.next_line()? {
                new.put_line(&[line])?;
            }
        }
        new.commit(&path)
    }

    /// Sets a property.
    pub fn set(&mut self, key: &str, value: &[u8]) -> Result<()> {
        if matches!(key, "job" | "type") {
            return Err(Error::usage(format!("{key} of a job cannot be changed")));
        }
        self.job.fields.set(key, value)?;
        self.rewrite(&[])
    }

    /// Adds a batch of these files. Each must be absolute unless the job has a root.
    pub fn add_batch(
        &mut self,
        added: i64,
        properties: &Fields,
        files: impl Iterator<Item = Result<Vec<u8>>>,
    ) -> Result<BatchId> {
        if let Some(key) = OWN_KEYS.iter().find(|it| properties.get(it).is_some()) {
            return Err(Error::usage(format!("{key} of a batch cannot be set")));
        }
        let has_root = self.root().is_some();
        let check = |it: Vec<u8>| check_name(&it, has_root).map(|()| it);
        self.put_batch(added, properties, files.map(|it| it.and_then(check)))
    }

    /// The same without a look at what is given.
    pub(super) fn put_batch(
        &mut self,
        added: i64,
        properties: &Fields,
        files: impl Iterator<Item = Result<Vec<u8>>>,
    ) -> Result<BatchId> {
        let number = self.next_number()?;
        let id = BatchId { number, status: BatchStatus::Pending };
        let path = self.dir.join(id.file_name());
        let mut list = NewFile::create(&self.dir.join("files"))?;
        let root = sys::open_dir(&self.lookup_root());
        let (mut count, mut size) = (0u64, 0u64);
        for file in files {
            let file = file?;
            count += 1;
            let stat = root
                .as_ref()
                .ok()
                .and_then(|root| sys::at::stat(root, std::ffi::OsStr::from_bytes(&file)).ok());
            size += stat.filter(sys::Stat::is_file).map_or(0, |it| it.size);
            list.put_line(&[&file])?;
        }
        if count == 0 {
            return Err(Error::usage(format!("a batch of no files for job {}", self.uuid)));
        }
        let mut fields = Fields::default();
        fields.set("number", number.to_string())?;
        fields.set("added", added.to_string())?;
        fields.set("count", count.to_string())?;
        fields.set("size", size.to_string())?;
        fields.extend(properties)?;
        let (mut lines, _kept) = list.reread()?;
        let mut new = NewFile::create(&path)?;
        new.put_line(&[b"%batch"])?;
        new.put(&fields.to_text())?;
        new.put_line(&[b"\n%files"])?;
        loop {
            let part = lines.fill_buf().map_err(|e| Error::io("reading a list of files", e))?;
            if part.is_empty() {
                break;
            }
            new.put(part)?;
            let len = part.len();
            lines.consume(len);
        }
        new.commit(&path)?;
        self.rewrite(&[BatchLine { number, count, size }])?;
        Ok(id)
    }

    fn next_number(&self) -> Result<u64> {
        let mut next = self.batches()?.last().map_or(0, |it| it.number.saturating_add(1));
        let mut file = JobFile::read(text::open(&self.path())?)?;
        while let Some(line) = file.next_batch()? {
            next = next.max(line.number.saturating_add(1));
        }
        Ok(next)
    }

    /// Begins the results of a batch.
    pub fn begin_results(&self) -> Result<Results> {
        Results::create(&self.dir.join("results"))
    }

    /// A batch has been written, or read back. On return that lasts.
    pub fn complete(
        &mut self,
        id: BatchId,
        results: Results,
        summary: &Summary,
        status: BatchStatus,
    ) -> Result<BatchId> {
        let done = BatchId { status, ..id };
        // What has been written and is read back for comparison has both.
        let is_reread = self.kind == JobKind::Write && status == BatchStatus::Read;
        let (from, to) = (self.batch_path(id)?, self.dir.join(done.file_name()));
        results.complete(&from, &to, summary, if is_reread { "read-" } else { "" })?;
        if from != to {
            lock::remove_entry(&from)?;
            sys::sync_dir(&self.dir)?;
        }
        Ok(done)
    }

    /// Makes a completed batch pending again; what has become of it stays in the log.
    fn undo(&mut self, id: BatchId) -> Result<()> {
        let pending = BatchId { status: BatchStatus::Pending, ..id };
        let (from, to) = (self.dir.join(id.file_name()), self.dir.join(pending.file_name()));
        copy_pending(&from, &to)?;
        lock::remove_entry(&from)?;
        sys::sync_dir(&self.dir)
    }

    /// Makes every batch pending again.
    pub(super) fn undo_all(&mut self) -> Result<()> {
        for id in self.batches()? {
            if id.status != BatchStatus::Pending {
                self.undo(id)?;
            }
        }
        Ok(())
    }

    /// Says how far it is.
    pub fn set_status(&mut self, status: Option<JobStatus>) -> Result<()> {
        lock::set_marker(&self.dir, STATUSES, status.map(JobStatus::as_str))
    }

    /// Opens its log to add to it.
    pub fn log(&self) -> Result<LogWriter> {
        LogWriter::open(&self.log_path())
    }

    /// Moves it, with everything.
    pub(super) fn move_to(&mut self, dir: &Path) -> Result<()> {
        sys::rename_durable(&self.dir, dir)?;
        self.job.dir = dir.to_path_buf();
        Ok(())
    }
}

fn copy_pending(from: &Path, to: &Path) -> Result<()> {
    let mut new = NewFile::create(to)?;
    let completed: [&[u8]; 4] = [b"summary", b"results", b"read-summary", b"read-results"];
    batch::copy_sections(from, &mut new, &completed)?;
    new.commit(to)
}

/// Makes a job in `dir`, which is there and empty, with the batches of another one if there is one,
/// all of them pending; the caller gives it its name.
pub(super) fn write_new(
    dir: &Path,
    uuid: &str,
    kind: JobKind,
    fields: &Fields,
    batches: Option<&Job>,
) -> Result<()> {
    let mut own = Fields::default();
    own.set("job", uuid)?;
    for (key, value) in fields.iter() {
        own.set(&String::from_utf8_lossy(key), value)?;
    }
    own.set("type", kind.letter())?;
    let path = dir.join(kind.file_name());
    let mut new = NewFile::create(&path)?;
    new.put_line(&[b"%job"])?;
    new.put(&own.to_text())?;
    new.put_line(&[b"\n%batches"])?;
    if let Some(job) = batches {
        for id in job.batches()? {
            let pending = BatchId { status: BatchStatus::Pending, ..id };
            copy_pending(&job.batch_path(id)?, &dir.join(pending.file_name()))?;
            new.put_line(&[&job.line(id)?.to_line()])?;
        }
    }
    new.commit(&path)
}

/// Whether this can be the name of a job: a UUID, as `uuidgen` prints it.
pub(in crate::tape) fn is_uuid(name: &[u8]) -> bool {
    name.len() == 36
        && name.iter().enumerate().all(|(at, it)| match at {
            8 | 13 | 18 | 23 => *it == b'-',
            _ => it.is_ascii_hexdigit(),
        })
}

pub(super) fn check_uuid(name: &str) -> Result<()> {
    if is_uuid(name.as_bytes()) {
        return Ok(());
    }
    Err(Error::usage(format!("{} is no name of a job: they are UUIDs", Quoted(name.as_bytes()))))
}

/// Whether a name can be in the list of files of a batch.
fn check_name(name: &[u8], has_root: bool) -> Result<()> {
    let shown = || Quoted(name.get(..200).unwrap_or(name)).to_string();
    // What is longer is no path of the kernel's, and would not fit into a line of the results.
    if name.is_empty() || name.contains(&b'\n') || name.len() >= text::LINE_BYTES_MAX - 64 {
        let message = format!("{} cannot be in a list of files", shown());
        return Err(Error::usage(format!("{message}: it is empty, too long or has a newline")));
    }
    if !has_root && !name.starts_with(b"/") {
        let message = format!("{} is no absolute path, and the job has no root", shown());
        return Err(Error::usage(message));
    }
    Ok(())
}
