//! Turning changed files into chunks in blocks.
//!
//! Small files come in packs: their new chunks share a frame in the block that all workers share. A
//! large file gets blocks of its own, closed at its end, so that incompressible content lies in a
//! block byte for byte. A chunk that is known is never compressed. Size, hash and extents always
//! describe the bytes that were read, whatever happens to the file meanwhile.

mod long;
mod stream;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

use super::index::{ChunkIndex, Claim};
use super::layout::{Layout, Part, Range};
use super::{Change, EntryPlace, FileJob, Unit, is_out_of_files, out_of_files};
use crate::catalog::{Content, Extent, Settings};
use crate::chunk::file_hash::FileHash;
use crate::chunk::frame::{Encoder, FRAME_PLAIN_BYTES_MAX};
use crate::chunk::split::{Chunking, Splitter};
use crate::chunk::{ChunkId, ChunkRef, Digest, HashAlgo};
use crate::entry::{self, Metadata};
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::progress::Progress;
use crate::sys::{self, at};
use crate::volume::{Batch, OpenBlock, Place, Writer};

/// Plain bytes of a frame of a large file. Smaller than a frame may be: large files are read at
/// random places, and each costs a frame.
const LARGE_FRAME_BYTES: usize = 256 << 10;
/// Fixed chunks longer than this are not held in memory; they are read twice if they are new.
const CHUNK_IN_MEMORY_MAX: u64 = 16 << 20;
/// How often a file that changes while it is read is read again before it is taken as it is.
const READ_TRIES: u32 = 2;

/// Files of a pack that are open, and being read by the kernel, before their turn comes.
const AHEAD_FILES_MAX: usize = 16;
/// What is read of a file that says it has no length: of one that never ends, no more.
const UNSIZED_MAX: u64 = 32 << 20;

type Sink<'a> = &'a mut dyn FnMut(Change) -> Result<()>;

/// Where the chunks of a file go.
enum Target {
    /// Into the block that all workers share.
    Shared,
    /// Into blocks of the file's own; the one being written, if any.
    Own(Box<Option<OpenBlock>>),
}

/// A file that has been read, waiting for its last frame.
struct Done {
    place: EntryPlace,
    meta: Metadata,
    version: i64,
    hash: Digest,
    content: Layout,
    extra: entry::Extra,
    changed: Option<String>,
    linked: bool,
}

/// Why a file is not in the snapshot, or why the run ends.
enum Stop {
    /// The file's own trouble.
    File(&'static str, io::Error),
    /// It vanished, or its name is another file's by now while it has further names.
    Gone,
    /// The store's or the run's.
    Run(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        Stop::Run(error)
    }
}

fn open(job: &FileJob) -> io::Result<File> {
    at::open_read(&job.parent, &job.place.name)
}

/// Opens a file and has the kernel start reading it, so that the disk has many requests at a time
/// and nobody waits for each. What cannot be opened now is tried, and told of, when its turn comes.
fn open_ahead(job: FileJob) -> (FileJob, Option<File>) {
    let file = open(&job).ok();
    if let Some(file) = &file {
        sys::advise_will_need(file);
    }
    (job, file)
}

/// What is told of a file that is not there any more.
pub fn vanished() -> Error {
    Error::new(ErrorKind::NotFound, "it vanished before it could be read")
}

/// One worker, with its buffers.
pub struct Worker<'a, 'c> {
    chunking: Chunking,
    hash: HashAlgo,
    chunks: &'a ChunkIndex<'c>,
    blocks: &'a Writer<'a>,
    progress: &'a Progress,
    splitter: Splitter,
    encoder: Encoder,
    frame: Frame,
    batch: Batch,
    /// Files of the pack at hand that are read.
    done: Vec<Done>,
}

/// Chunks that are collected to be compressed together.
#[derive(Default)]
struct Frame {
    plain: Vec<u8>,
    chunks: Vec<ChunkRef>,
    offsets: HashMap<ChunkId, u64>,
}

impl<'a, 'c> Worker<'a, 'c> {
    /// A worker of a run.
    pub fn new(
        settings: &Settings,
        chunks: &'a ChunkIndex<'c>,
        blocks: &'a Writer<'a>,
        progress: &'a Progress,
    ) -> Result<Worker<'a, 'c>> {
        Ok(Worker {
            chunking: settings.chunking,
            hash: settings.hash,
            chunks,
            blocks,
            progress,
            splitter: Splitter::new(settings.chunking),
            encoder: Encoder::new(settings.compression)?,
            frame: Frame::default(),
            batch: Batch::default(),
            done: Vec::new(),
        })
    }

    /// What a worker takes of memory, in bytes: the splitter's buffer, the frame being filled, what
    /// it compresses to, and the compressor's tables.
    pub fn memory_bytes(settings: &Settings) -> u64 {
        let longest = settings.chunking.chunk_bytes_max().min(CHUNK_IN_MEMORY_MAX);
        let frame = longest.max(FRAME_PLAIN_BYTES_MAX.into());
        frame * 4 + settings.compression.memory_bytes()
    }

    /// Does one unit and tells `sink` what came of it.
    pub fn work(&mut self, unit: Unit, sink: Sink<'_>) -> Result<()> {
        match unit {
            Unit::Pack(files) => {
                let mut ahead = VecDeque::with_capacity(AHEAD_FILES_MAX);
                let mut files = files.into_iter();
                loop {
                    let room = AHEAD_FILES_MAX - ahead.len();
                    ahead.extend(files.by_ref().take(room).map(open_ahead));
                    let Some((job, file)) = ahead.pop_front() else { break };
                    self.progress.check()?;
                    self.file(job, file, &mut Target::Shared, sink)?;
                }
                self.flush(None, &mut Target::Shared)?;
            }
            Unit::Large(file) => {
                let mut target = Target::Own(Box::new(None));
                self.file(*file, None, &mut target, sink)?;
                self.flush(None, &mut target)?;
                if let Target::Own(block) = &mut target {
                    self.blocks.close(block)?;
                }
            }
            Unit::Stream(job) => self.stream(*job)?,
        }
        for done in std::mem::take(&mut self.done) {
            self.report(done, sink)?;
        }
        Ok(())
    }

    fn file(
        &mut self,
        job: FileJob,
        opened: Option<File>,
        target: &mut Target,
        sink: Sink<'_>,
    ) -> Result<()> {
        match self.read_file(&job, opened, target) {
            Ok((meta, hash, content, extra, changed)) => {
                let linked = job.meta.nlink > 1;
                let FileJob { place, version, .. } = job;
                let done = Done { place, meta, version, hash, content, extra, changed, linked };
                self.done.push(done);
                Ok(())
            }
            Err(Stop::Gone) if job.meta.nlink > 1 => {
                sink(Change::Astray { place: job.place, version: job.version })
            }
            Err(Stop::Gone) => {
                let problem = Problem::new(&*job.place.path, &vanished());
                sink(Change::Failed { place: job.place, version: Some(job.version), problem })
            }
            Err(Stop::File(_, error)) if is_out_of_files(&error) => Err(out_of_files(error)),
            Err(Stop::File(what, error)) => {
                let problem = Problem::new(&*job.place.path, &Error::io(what, error));
                sink(Change::Failed { place: job.place, version: Some(job.version), problem })
            }
            Err(Stop::Run(error)) => Err(error),
        }
    }

    fn report(&mut self, done: Done, sink: Sink<'_>) -> Result<()> {
        let Done { place, meta, version, hash, content, extra, changed, linked } = done;
        if let Some(how) = changed {
            let error = Error::new(ErrorKind::Io, how + ": stored as it was read");
            sink(Change::Noted(Problem::new(&*place.path, &error)))?;
        }
        if let Some(old) = &place.old
            && meta.is_unchanged_since(&old.meta)
            && self.chunks.has_sound(old.version, &hash, &extra)?
        {
            return sink(Change::Same { old: old.clone(), version, linked });
        }
        let content = Content { hash: Some(hash), extents: content.extents, extra };
        sink(Change::Put { place, meta, version, child: None, content, linked })
    }

    /// Reads a file, which may have been opened already; again if it changes meanwhile.
    fn read_file(
        &mut self,
        job: &FileJob,
        mut opened: Option<File>,
        target: &mut Target,
    ) -> std::result::Result<(Metadata, Digest, Layout, entry::Extra, Option<String>), Stop> {
        let mut tries = 0;
        loop {
            tries += 1;
            let file = match opened.take() {
                Some(file) => file,
                None => open(job).map_err(|e| match e.kind() {
                    io::ErrorKind::NotFound => Stop::Gone,
                    _ => Stop::File("opening it", e),
                })?,
            };
            let stat = sys::fstat(&file).map_err(|e| Stop::File("looking at it", e))?;
            let meta = Metadata::from_stat(&stat).filter(|_| stat.is_file());
            if job.meta.nlink > 1 && meta.is_none_or(|it| it.ino != job.meta.ino) {
                // Other names will be linked to what is read here, and they name another file.
                return Err(Stop::Gone);
            }
            let Some(mut meta) = meta else {
                let error = io::Error::other("replaced by something that is not a file");
                return Err(Stop::File("reading it", error));
            };
            if stat.blocks == 0 && stat.size > UNSIZED_MAX && sys::is_proc(&file) {
                let error = io::Error::other("it is a view of this machine's memory, not a file");
                return Err(Stop::File("reading it", error));
            }
            let sparse = stat.blocks.saturating_mul(512) < stat.size;
            let (hash, content) = self.read_content(&file, meta.size, sparse, target)?;
            let extra = entry::capture_file(file.as_fd());
            let after = sys::fstat(&file).map_err(|e| Stop::File("looking at it", e))?;
            let stayed = Metadata::from_stat(&after).is_some_and(|it| it == meta);
            if !stayed && tries < READ_TRIES {
                // What has been stored of it is found again as known chunks.
                continue;
            }
            let extra = extra.map_err(|e| Stop::File("reading its attributes", e))?;
            let changed = match stayed {
                false => Some("it changed while it was read".to_owned()),
                // Files of the kernel say any size and give another, however often they are read.
                true if content.size != meta.size => {
                    let cut = meta.size == 0 && content.size >= UNSIZED_MAX;
                    Some(format!(
                        "it says that it has {} bytes and gave {}{}",
                        meta.size,
                        content.size,
                        if cut { " or more, cut there" } else { "" }
                    ))
                }
                true => None,
            };
            meta.size = content.size;
            return Ok((meta, hash, content, extra, changed));
        }
    }

    fn read_content(
        &mut self,
        file: &File,
        size: u64,
        sparse: bool,
        target: &mut Target,
    ) -> std::result::Result<(Digest, Layout), Stop> {
        let mut content = Layout::default();
        if matches!(target, Target::Own(_)) {
            sys::advise_sequential(file);
        }
        if !sparse {
            let mut hash = FileHash::of_content(self.hash);
            // Without the read that finds the end: if the file has grown, its length tells. What
            // has no length, as in procfs, is read to where it ends.
            let end = if size > 0 { size } else { UNSIZED_MAX };
            self.read_data(file, 0, end, &mut content, &mut hash, target)?;
            return Ok((hash.finish(), content));
        }
        // Holes are a part of what is kept, so they are a part of the hash: see FORMAT.md.
        let mut hash = FileHash::of_segments(self.hash);
        let mut has_holes = false;
        loop {
            let next = sys::next_data(file, content.size, size);
            let next = next.map_err(|e| Stop::File("looking for its holes", e))?;
            let start = next.map_or(size, |it| it.0);
            if start > content.size {
                content.add(Part::At(Extent::Hole { len: start - content.size }));
                content.size = start;
                has_holes = true;
            }
            let Some((start, end)) = next else { break };
            if !has_holes && end == size {
                // It takes little room for another reason: it is compressed, or nobody counts.
                return self.read_content(file, size, false, target);
            }
            hash.begin_segment(start, end - start);
            self.read_data(file, start, end, &mut content, &mut hash, target)?;
            if content.size < end {
                // It shrank under our hands; the second try, or the flag, tells.
                break;
            }
        }
        match has_holes {
            true => Ok((hash.finish_segments(content.size), content)),
            // It shrank before its first hole.
            false => self.read_content(file, size, false, target),
        }
    }

    /// Reads from `start` to `end`, or to the end of the file if that comes first.
    fn read_data(
        &mut self,
        file: &File,
        start: u64,
        end: u64,
        content: &mut Layout,
        hash: &mut FileHash,
        target: &mut Target,
    ) -> std::result::Result<(), Stop> {
        let mut reader = Range { file, at: start, end };
        let is_long = self.chunking.chunk_bytes_max() > CHUNK_IN_MEMORY_MAX;
        match target {
            Target::Own(_) if is_long => self.read_long_chunks(&mut reader, content, hash, target),
            _ => self.read_in_order(&mut reader, content, hash, target),
        }
    }

    /// Reads from where the reader stands to its end, every byte once.
    fn read_in_order(
        &mut self,
        reader: &mut impl Read,
        content: &mut Layout,
        hash: &mut FileHash,
        target: &mut Target,
    ) -> std::result::Result<(), Stop> {
        if self.chunking.chunk_bytes_max() > CHUNK_IN_MEMORY_MAX {
            return self.read_whole_chunks(reader, content, hash, target);
        }
        // The splitter's buffer is lent out with each chunk, so it is put aside meanwhile.
        let mut splitter = std::mem::replace(&mut self.splitter, Splitter::new(self.chunking));
        splitter.restart();
        let result = self.read_chunks(&mut splitter, reader, content, hash, target);
        self.splitter = splitter;
        result
    }

    fn read_chunks(
        &mut self,
        splitter: &mut Splitter,
        reader: &mut impl Read,
        content: &mut Layout,
        hash: &mut FileHash,
        target: &mut Target,
    ) -> std::result::Result<(), Stop> {
        while let Some(piece) = splitter.next(reader).map_err(|e| Stop::File("reading it", e))? {
            let id = self.hash.hash(piece.bytes);
            hash.add(piece.bytes, &id, piece.is_last);
            self.add_chunk(piece.bytes, id, content, target)?;
            self.progress.check()?;
        }
        Ok(())
    }

    fn count(&self, len: u64) {
        Progress::add(&self.progress.bytes_read, len);
        Progress::add(&self.progress.bytes, len);
    }

    /// Stores a chunk that is in memory, unless it is known.
    fn add_chunk(
        &mut self,
        bytes: &[u8],
        id: ChunkId,
        content: &mut Layout,
        target: &mut Target,
    ) -> Result<()> {
        let len = bytes.len() as u64;
        self.count(len);
        if let Some(offset) = self.frame.offsets.get(&id) {
            content.size += len;
            content.add(Part::InFrame { offset: *offset, len });
            return Ok(());
        }
        if let Some(place) = self.find_chunk(&id, content, target)? {
            content.add_at(place, len);
            return Ok(());
        }
        let frame_bytes = match target {
            Target::Own(_) => LARGE_FRAME_BYTES,
            Target::Shared => FRAME_PLAIN_BYTES_MAX as usize,
        };
        if !self.frame.plain.is_empty() && self.frame.plain.len() + bytes.len() > frame_bytes {
            self.flush(Some(content), target)?;
        }
        let offset = self.frame.plain.len() as u64;
        content.size += len;
        content.add(Part::InFrame { offset, len });
        self.frame.plain.extend_from_slice(bytes);
        self.frame.offsets.insert(id, offset);
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.frame.chunks.push(ChunkRef { id, len });
        Ok(())
    }

    /// Compresses and appends what the frame holds, and tells its files where that is.
    fn flush(&mut self, current: Option<&mut Layout>, target: &mut Target) -> Result<()> {
        if self.frame.plain.is_empty() {
            return Ok(());
        }
        self.batch.clear();
        // A chunk longer than a frame takes several.
        for part in self.frame.plain.chunks(FRAME_PLAIN_BYTES_MAX as usize) {
            let (frame, stored) = self.encoder.encode(part)?;
            self.batch.push(frame, stored);
        }
        self.batch.chunks.append(&mut self.frame.chunks);
        let place = self.append_batch(target)?;
        self.chunks.place(place, &self.batch.chunks)?;
        self.frame.plain.clear();
        self.frame.offsets.clear();
        for done in &mut self.done {
            done.content.resolve(place);
        }
        if let Some(content) = current {
            content.resolve(place);
        }
        Ok(())
    }

    fn append_batch(&self, target: &mut Target) -> Result<Place> {
        let place = self.chunks.with_permit(|| match target {
            Target::Own(block) => self.blocks.append(block, &self.batch),
            Target::Shared => self.blocks.append_shared(&self.batch),
        })?;
        Progress::add(&self.progress.bytes_stored, self.batch.stored.len() as u64);
        Progress::add(&self.progress.bytes_new, self.batch.plain_len());
        Ok(place)
    }

    /// Where a chunk lies; `None` if it is this worker's to store.
    fn find_chunk(
        &mut self,
        id: &ChunkId,
        content: &mut Layout,
        target: &mut Target,
    ) -> Result<Option<Place>> {
        loop {
            match self.chunks.claim(id)? {
                Claim::Known(place) => return Ok(Some(place)),
                Claim::New => return Ok(None),
                Claim::Busy => {
                    // Nobody may wait for us while we wait.
                    self.flush(Some(content), target)?;
                    if let Some(place) = self.chunks.wait(id)? {
                        return Ok(Some(place));
                    }
                }
            }
        }
    }
}
