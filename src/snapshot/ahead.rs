//! Reading ahead: who reads in order finds the next frames decompressed.
//!
//! The kernel may read a file without ever opening it here, from several threads, a little out of
//! order. So what counts as a reader is a [`Stream`]: reads that touch each other and leave no
//! gaps, in a file, or in a block for files that lie there in one piece. Such files follow each
//! other in the order of the scan, and a program that walks a tree reads frame after frame of it.
//! Readers that jump make no stream. What is ahead is bounded in bytes, for each stream and for
//! all, and what fails there is told to nobody: who needs the frame will find out.

use std::cmp::Reverse;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use super::FileMap;
use super::blocks::{BlockMap, Blocks};
use super::cache::AHEAD_PART;
use crate::catalog::{Extent, VersionId};
use crate::chunk::frame::Codec;

/// Streams that are known at a time; the one that was longest without a read is forgotten.
const STREAMS_MAX: usize = 32;
/// Reads that must have gone on where the one before ended until anything is read ahead.
const STEPS_MIN: u32 = 3;
/// A row of reads is at least that long: the pieces of a file that is read here and there lie side
/// by side now and then.
const ROW_BYTES_MIN: u64 = 256 << 10;
/// How far behind the end of its stream a read may be that was overtaken by others.
const LATE_BYTES: u64 = 4 << 20;
/// How far beyond the end of its stream a read may be that has overtaken others.
const EARLY_BYTES: u64 = 2 << 20;
/// Of how much of a stream is remembered whether it had gaps.
const SPAN_BYTES_MAX: u64 = 8 << 20;
/// What is read ahead for one stream, for each thread that does it.
const WINDOW_BYTES_PER_WORKER: u64 = 2 << 20;
/// A smaller window than this is not worth its trouble.
const WINDOW_BYTES_MIN: u64 = 256 << 10;
/// Threads that read ahead at most.
const WORKERS_MAX: usize = 8;
/// Things to read ahead that wait for a thread.
const JOBS_MAX: usize = 256;

/// What the positions of a stream are counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Track {
    /// A file whose parts lie here and there.
    File(VersionId),
    /// A block's plain content.
    Block(u64),
}

/// Reads that go on from each other.
#[derive(Debug)]
struct Stream {
    track: Track,
    start: u64,
    end: u64,
    /// Bytes from start to end that were read.
    read: u64,
    steps: u32,
    /// To where it has been read ahead.
    planned: u64,
    /// When it was last gone on with.
    used: u64,
}

struct Streams {
    known: Vec<Stream>,
    clock: u64,
    window_max: u64,
}

impl Stream {
    fn new(track: Track, from: u64, to: u64) -> Stream {
        Stream { track, start: from, end: to, read: to - from, steps: 0, planned: to, used: 0 }
    }

    /// Whether a read from `from` on may belong to it.
    fn takes(&self, track: Track, from: u64) -> bool {
        self.track == track
            && from >= self.start
            && from.saturating_add(LATE_BYTES) >= self.end
            && from <= self.end.saturating_add(EARLY_BYTES)
    }

    /// Goes on with a read; whether the reads are a row by now.
    fn go_on(&mut self, from: u64, to: u64) -> bool {
        if to > self.end {
            self.end = to;
            self.steps += 1;
        }
        let span = self.end - self.start;
        self.read = (self.read + (to - from)).min(span);
        let missing = span - self.read;
        // Besides a quarter, one that was overtaken.
        if missing > span / 4 + (to - from) {
            *self = Stream::new(self.track, from, to);
            return false;
        }
        if span > SPAN_BYTES_MAX {
            self.start += span / 2;
            self.read /= 2;
        }
        self.steps >= STEPS_MIN && span >= ROW_BYTES_MIN
    }

    /// What to read ahead now.
    fn next(&mut self, window_max: u64) -> Option<(u64, u64)> {
        let window = (self.end - self.start).min(window_max);
        let planned = self.planned.max(self.end);
        if planned >= self.end.saturating_add(window / 2) {
            return None;
        }
        self.planned = self.end.saturating_add(window);
        Some((planned, self.planned))
    }
}

impl Streams {
    /// Takes note of a read; gives whether it is one of a row, and what to read ahead for it.
    fn note(&mut self, track: Track, from: u64, to: u64) -> (bool, Option<(u64, u64)>) {
        self.clock += 1;
        let takes = self.known.iter_mut().filter(|it| it.takes(track, from));
        // The longest, or what was overtaken would begin a second one beside it.
        let nearest = |it: &&mut Stream| (it.steps, Reverse(it.end.abs_diff(from)));
        if let Some(stream) = takes.max_by_key(nearest) {
            stream.used = self.clock;
            let in_row = stream.go_on(from, to);
            return (in_row, in_row.then(|| stream.next(self.window_max)).flatten());
        }
        let stream = Stream { used: self.clock, ..Stream::new(track, from, to) };
        match self.known.len() < STREAMS_MAX {
            true => self.known.push(stream),
            false => {
                if let Some(oldest) = self.known.iter_mut().min_by_key(|it| it.used) {
                    *oldest = stream;
                }
            }
        }
        (false, None)
    }
}

/// Something to read ahead.
enum Job {
    Frame(Arc<BlockMap>, usize),
    /// Plain content of a block whose frames are not known yet.
    Range(u64, u64, u64),
}

/// Reads ahead for all readers of a catalog. Its threads begin with the first need of them.
pub struct Ahead {
    blocks: Arc<Blocks>,
    streams: Mutex<Streams>,
    jobs: OnceLock<Sender<(Job, Room)>>,
    /// Bytes that wait for a thread or are in the hands of one.
    asked: Arc<AtomicU64>,
    workers: usize,
    bytes_max: u64,
}

/// Bytes that count as asked for until this is dropped.
struct Room {
    asked: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.asked.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Ahead {
    /// Reads ahead into the cache of `blocks`, of which it uses a part.
    pub fn new(blocks: Arc<Blocks>) -> Ahead {
        let workers = std::thread::available_parallelism().map_or(1, |it| it.get());
        let workers = workers.min(WORKERS_MAX);
        let bytes_max = blocks.frames.stats().limit_bytes / AHEAD_PART;
        // Two readers at least get all that they can use.
        let window_max = (workers as u64 * WINDOW_BYTES_PER_WORKER).min(bytes_max / 2);
        let streams = Streams { known: Vec::new(), clock: 0, window_max };
        Ahead {
            blocks,
            streams: Mutex::new(streams),
            jobs: OnceLock::new(),
            asked: Arc::default(),
            workers,
            bytes_max,
        }
    }

    /// Takes note of a read of a file, and reads ahead if it is one of a row; whether it is.
    pub fn note(&self, file: &FileMap, offset: u64, len: u64) -> bool {
        if len == 0 {
            return false;
        }
        let (track, from) = match *file.content.extents.as_slice() {
            [Extent::Data { block, offset: at, .. }] => (Track::Block(block), at + offset),
            _ => (Track::File(file.version), offset),
        };
        let (in_row, ahead) = self.streams.lock().note(track, from, from.saturating_add(len));
        match (ahead, track) {
            _ if self.bytes_max / 2 < WINDOW_BYTES_MIN => {}
            (None, _) => {}
            (Some((from, to)), Track::Block(block)) => self.plan(block, from, to),
            (Some((from, to)), Track::File(_)) => self.plan_file(file, from, to),
        }
        in_row
    }

    fn plan_file(&self, file: &FileMap, from: u64, to: u64) {
        let extents = file.content.extents.iter().zip(&file.starts);
        for (extent, start) in extents.skip(file.extent_at(from)) {
            if *start >= to {
                break;
            }
            if let Extent::Data { block, offset, len } = *extent {
                let first = from.max(*start) - start;
                self.plan(block, offset + first, offset + len.min(to - start));
            }
        }
    }

    fn plan(&self, block: u64, from: u64, to: u64) {
        let Some(map) = self.blocks.known_map(block) else {
            self.ask(Job::Range(block, from, to), to.saturating_sub(from));
            return;
        };
        let Some((first, end)) = frames_of(&map, from, to) else { return };
        let mut stored: Option<(u64, u64)> = None;
        for number in first..end {
            let Some(place) = map.frames.get(number) else { break };
            if self.blocks.frames.has((block, number), place.len()) {
                continue;
            }
            let start = stored.map_or(place.stored_at, |it| it.0);
            stored = Some((start, place.stored_end()));
            // Raw bytes cost nothing but the disk's time, and the system keeps them.
            if place.frame.codec != Codec::Raw {
                self.ask(Job::Frame(map.clone(), number), place.frame.plain_len.into());
            }
        }
        if let Some((start, end)) = stored {
            self.blocks.ask_for(&map, start, end - start);
        }
    }

    /// Gives a job to the threads if there is room for what comes of it.
    fn ask(&self, job: Job, bytes: u64) {
        let room = Room { asked: self.asked.clone(), bytes };
        let asked = self.asked.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if asked + self.blocks.frames.stats().ahead_bytes > self.bytes_max {
            return;
        }
        // A full queue is no room either.
        let _ = self.jobs.get_or_init(|| self.start()).try_send((job, room));
    }

    fn start(&self) -> Sender<(Job, Room)> {
        let (sender, jobs) = crossbeam_channel::bounded(JOBS_MAX);
        for number in 0..self.workers {
            let (blocks, jobs) = (self.blocks.clone(), jobs.clone());
            let work = move || work(&blocks, &jobs);
            let thread = std::thread::Builder::new().name(format!("ahead-{number}"));
            if let Err(e) = thread.spawn(work) {
                // Reading works without; it is slower.
                log::warn!("no thread to read ahead: {e}");
            }
        }
        sender
    }
}

/// What a thread does until nobody can ask for anything any more.
fn work(blocks: &Blocks, jobs: &Receiver<(Job, Room)>) {
    for (job, _room) in jobs {
        match job {
            Job::Frame(map, number) => blocks.load_ahead(&map, number),
            Job::Range(block, from, to) => {
                let Ok(map) = blocks.map(block) else { continue };
                let Some((first, end)) = frames_of(&map, from, to) else { continue };
                for number in first..end {
                    let is_raw = |it: &super::blocks::FramePlace| it.frame.codec == Codec::Raw;
                    if !map.frames.get(number).is_some_and(is_raw) {
                        blocks.load_ahead(&map, number);
                    }
                }
            }
        }
    }
}

/// Numbers of the frames that hold a range of a block's plain content.
fn frames_of(map: &BlockMap, from: u64, to: u64) -> Option<(usize, usize)> {
    let end = map.frames.last()?.plain_end();
    (from < to.min(end)).then(|| (map.frame_at(from), map.frame_at(to.min(end) - 1) + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;

    fn streams() -> Streams {
        Streams { known: Vec::new(), clock: 0, window_max: 4 * MIB }
    }

    /// How far is read ahead after reads of `len` bytes at these offsets.
    fn after(reads: impl IntoIterator<Item = u64>, len: u64) -> u64 {
        let mut streams = streams();
        let ahead = reads.into_iter().filter_map(|at| {
            let ahead = streams.note(Track::Block(1), at, at + len).1;
            ahead.inspect(|(from, to)| assert!(from < to))
        });
        ahead.map(|it| it.1).last().unwrap_or(0)
    }

    #[test]
    fn a_reader_in_order_is_read_ahead_for_without_gaps_and_repeats() {
        let mut streams = streams();
        let mut planned = 4 * 128 * KIB;
        for n in 0..1000 {
            let (from, to) = (n * 128 * KIB, (n + 1) * 128 * KIB);
            match streams.note(Track::File(7), from, to).1 {
                Some(ahead) => {
                    assert!(n >= 3);
                    assert_eq!(ahead.0, planned);
                    assert!(ahead.1 <= to + 4 * MIB);
                    planned = ahead.1;
                }
                None => assert!(n < 3 || planned >= to + 128 * KIB, "{n} {planned}"),
            }
        }
        assert!(planned >= 1000 * 128 * KIB + 2 * MIB);
    }

    #[test]
    fn reads_that_overtake_each_other_are_one_stream() {
        // Each pair of requests in the wrong order.
        assert!(after((0..64).map(|n| (n ^ 1) * 128 * KIB), 128 * KIB) > 9 * MIB);
        assert!(after((0..16).map(|n| (n ^ 1) * MIB), MIB) > 18 * MIB);
    }

    #[test]
    fn readers_that_jump_are_not_read_ahead_for() {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state >> 33
        };
        for (len, size) in [(4 * KIB, 4 * MIB), (4 * KIB, 128 * MIB), (64 * KIB, 128 * MIB)] {
            let places = size / len;
            let reads = 0..places / 2;
            assert_eq!(after(reads.map(|_| random() % places * len), len), 0);
        }
        // Backwards, with gaps, and at one place.
        assert_eq!(after((0..1000).rev().map(|n| n * 64 * KIB), 64 * KIB), 0);
        assert_eq!(after((0..1000).map(|n| n * 256 * KIB), 64 * KIB), 0);
        assert_eq!(after((0..1000).map(|_| 5 * MIB), 64 * KIB), 0);
    }

    #[test]
    fn many_readers_have_a_stream_each_and_no_more_are_known() {
        let mut streams = streams();
        let mut ahead = 0;
        for n in 0..20 {
            for reader in 0..16 {
                let from = reader * 500 * MIB + n * 128 * KIB;
                let found = streams.note(Track::Block(reader), from, from + 128 * KIB).1;
                ahead += u32::from(found.is_some());
            }
        }
        assert!(ahead >= 16 * 2);
        for n in 0..1000 {
            streams.note(Track::File(n), 0, 4096);
            assert!(streams.known.len() <= STREAMS_MAX);
        }
    }

    #[test]
    fn a_stream_that_begins_to_jump_is_left() {
        let mut streams = streams();
        for n in 0..100 {
            streams.note(Track::Block(1), n * 64 * KIB, (n + 1) * 64 * KIB);
        }
        let end = 100 * 64 * KIB;
        let mut found = 0;
        for n in 1..100 {
            let from = end + n * 512 * KIB;
            found += u32::from(streams.note(Track::Block(1), from, from + 4 * KIB).1.is_some());
        }
        assert!(found <= 4, "{found}");
    }
}
