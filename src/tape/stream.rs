//! A stream of blocks for a drive, which a thread of its own writes.
//!
//! A drive that has to wait for data stops, goes back and starts again. So what is written goes
//! into memory first, up to a budget. The drive starts when part of that is full; what comes faster
//! than it writes fills the rest meanwhile. Each time that it has run empty it waits for twice as
//! much as the time before, up to half of all: where too little comes it stops seldom, and what is
//! short does not wait for what never comes. Blocks go to the drive in their order, and the first
//! that it does not take is the last that it is given.
//!
//! Nothing is safe before the filemark, which is the caller's to write.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::drive::{Why, Wrote};
use super::loaded::Loaded;
use crate::error::{Error, ErrorKind, Result};

/// What pieces begin at in memory, so that the kernel does not copy them.
const PAGE: usize = 4096;
/// Longest piece of memory for blocks, unless one block is longer. The kernel gives it in large
/// pages: 256 MiB in small ones cost an emulated processor a second.
const PIECE_BYTES: u64 = 4 << 20;
/// Least number of pieces of a buffer that is not a few blocks only.
const PIECES_MIN: u64 = 32;
/// How much is held in memory for a drive, if nobody says otherwise.
pub const BUFFER_BYTES: u64 = 256 << 20;

/// The part of it that is full when the drive starts: one of so many.
const START_PART: usize = 8;

/// How a stream is written.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Length of each block.
    pub block_bytes: u32,
    /// Most memory that is taken; that for two blocks is, whatever this says.
    pub buffer_bytes: u64,
    /// The end of the tape is known to be near: its warning ends nothing.
    pub is_past_warning: bool,
}

/// What became of a stream.
pub struct Ended {
    /// The tape, which stands behind the last block that is written.
    pub loaded: Loaded,
    /// Blocks that are wholly written.
    pub blocks: u64,
    /// Why the drive has taken no more.
    pub why: Option<Why>,
    /// What has gone wrong in the drive.
    pub error: Option<Error>,
    /// How often the drive has had nothing to write.
    pub underruns: u64,
}

/// Takes bytes for a drive.
pub struct Stream {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Ended>>,
    block_bytes: usize,
    piece_bytes: usize,
    pieces_max: usize,
    filling: Option<Piece>,
}

/// Tells how far the drive is.
#[derive(Clone)]
pub struct Counter(Arc<Shared>);

impl Counter {
    /// Blocks that the drive has written so far.
    pub fn blocks(&self) -> u64 {
        self.0.state.lock().blocks
    }
}

/// Memory for some blocks.
struct Piece {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Piece {
    fn new(piece_bytes: usize) -> Piece {
        let spare = Piece::spare(piece_bytes);
        let memory = vec![0; piece_bytes + spare];
        // It is at most a page, but for machines that nobody has.
        let start = memory.as_ptr().align_offset(PAGE).min(spare);
        Piece { memory, start, len: 0 }
    }

    /// What is taken beside the blocks, so that the first can begin where a page does. The kernel
    /// copies those that are shorter than a page anyway.
    fn spare(piece_bytes: usize) -> usize {
        if piece_bytes < PAGE { 0 } else { PAGE }
    }

    fn rest(&mut self, piece_bytes: usize) -> &mut [u8] {
        let range = self.start + self.len..self.start + piece_bytes;
        self.memory.get_mut(range).unwrap_or_default()
    }

    fn bytes(&self) -> &[u8] {
        self.memory.get(self.start..self.start + self.len).unwrap_or_default()
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Something was added, or nothing more will be.
    added: Condvar,
    /// There is room again, or the drive takes no more.
    freed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Piece>,
    free: Vec<Piece>,
    /// Pieces there are.
    made: usize,
    /// Pieces in the queue that the drive waits for.
    wanted: usize,
    /// How many it waited for last when it was empty.
    waited_for: usize,
    /// Nothing more comes.
    is_closed: bool,
    /// Nothing more is to be written.
    is_stopped: bool,
    /// The drive takes no more.
    is_over: bool,
    blocks: u64,
    underruns: u64,
}

impl Stream {
    /// Begins to write where the tape stands.
    pub fn start(loaded: Loaded, options: &Options) -> Result<Stream> {
        let block_bytes = usize::try_from(options.block_bytes).unwrap_or(usize::MAX);
        if block_bytes == 0 {
            return Err(Error::usage("blocks cannot have 0 bytes"));
        }
        let piece = PIECE_BYTES.min(options.buffer_bytes / PIECES_MIN);
        let blocks = usize::try_from(piece).unwrap_or(usize::MAX) / block_bytes;
        let piece_bytes = block_bytes * blocks.max(1);
        let each = piece_bytes + Piece::spare(piece_bytes);
        let pieces = options.buffer_bytes / each as u64;
        let pieces_max = usize::try_from(pieces).unwrap_or(usize::MAX).max(2);
        let shared = Arc::new(Shared::default());
        {
            let mut state = shared.state.lock();
            state.wanted = (pieces_max / START_PART).max(1);
            state.waited_for = state.wanted;
        }
        let work = Worker {
            shared: shared.clone(),
            block_bytes,
            most: pieces_max / 2,
            is_past_warning: options.is_past_warning,
        };
        let thread = std::thread::Builder::new()
            .name("tape".into())
            .spawn(move || work.run(loaded))
            .map_err(|e| Error::io("starting a thread for the tape", e))?;
        let thread = Some(thread);
        Ok(Stream { shared, thread, block_bytes, piece_bytes, pieces_max, filling: None })
    }

    /// What tells how far the drive is.
    pub fn counter(&self) -> Counter {
        Counter(self.shared.clone())
    }

    /// Waits until all is written; what is no whole block is filled up with zeros.
    pub fn finish(mut self) -> Result<Ended> {
        if let Some(mut last) = self.filling.take().filter(|it| it.len > 0) {
            let missing = last.len.next_multiple_of(self.block_bytes) - last.len;
            // It may have had other blocks before.
            last.rest(self.piece_bytes).get_mut(..missing).unwrap_or_default().fill(0);
            last.len += missing;
            self.push(last);
        }
        self.end(false)
    }

    /// Waits until the drive is done with the block at hand; the rest is forgotten.
    pub fn stop(mut self) -> Result<Ended> {
        self.end(true)
    }

    fn end(&mut self, is_stopped: bool) -> Result<Ended> {
        {
            let mut state = self.shared.state.lock();
            state.is_closed = true;
            state.is_stopped |= is_stopped;
            self.shared.added.notify_one();
        }
        let ended = self.thread.take().and_then(|it| it.join().ok());
        ended.ok_or_else(|| Error::new(ErrorKind::Io, "the thread that writes a tape has failed"))
    }

    fn push(&self, piece: Piece) {
        let mut state = self.shared.state.lock();
        state.queue.push_back(piece);
        if state.queue.len() >= state.wanted {
            self.shared.added.notify_one();
        }
    }

    /// An empty piece; `None` if the drive takes no more.
    fn piece(&self) -> Option<Piece> {
        let mut state = self.shared.state.lock();
        loop {
            if state.is_over {
                return None;
            }
            if let Some(piece) = state.free.pop() {
                return Some(Piece { len: 0, ..piece });
            }
            if state.made < self.pieces_max {
                state.made += 1;
                drop(state);
                return Some(Piece::new(self.piece_bytes));
            }
            self.shared.freed.wait(&mut state);
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let filling = match self.filling.take() {
            Some(filling) => Some(filling),
            None => self.piece(),
        };
        let Some(mut piece) = filling else {
            return Err(io::Error::other("the drive takes no more"));
        };
        let room = piece.rest(self.piece_bytes);
        let len = room.len().min(bytes.len());
        if let (Some(to), Some(from)) = (room.get_mut(..len), bytes.get(..len)) {
            to.copy_from_slice(from);
        }
        piece.len += len;
        match piece.len == self.piece_bytes {
            true => self.push(piece),
            false => self.filling = Some(piece),
        }
        Ok(len)
    }

    /// Nothing waits for the drive but [`Stream::finish`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.thread.is_some() {
            let _ = self.end(true);
        }
    }
}

/// The thread that has the drive.
struct Worker {
    shared: Arc<Shared>,
    block_bytes: usize,
    /// Most pieces that it waits for when it has run empty.
    most: usize,
    is_past_warning: bool,
}

impl Worker {
    fn run(self, mut loaded: Loaded) -> Ended {
        let (mut why, mut error) = (None, None);
        while let Some(piece) = self.next() {
            match self.write_piece(&mut loaded, &piece) {
                Ok(None) => {
                    self.shared.state.lock().free.push(piece);
                    self.shared.freed.notify_one();
                    continue;
                }
                Ok(not_taken) => why = not_taken,
                Err(it) => error = Some(it),
            }
            break;
        }
        let mut state = self.shared.state.lock();
        state.is_over = true;
        self.shared.freed.notify_one();
        let (blocks, underruns) = (state.blocks, state.underruns);
        drop(state);
        Ended { loaded, blocks, why, error, underruns }
    }

    /// Writes the blocks of a piece; why the drive has not taken one, if so.
    fn write_piece(&self, loaded: &mut Loaded, piece: &Piece) -> Result<Option<Why>> {
        for block in piece.bytes().chunks(self.block_bytes) {
            if let Wrote::NotWritten(why) = self.write(loaded, block)? {
                return Ok(Some(why));
            }
            let mut state = self.shared.state.lock();
            state.blocks += 1;
            if state.is_stopped {
                break;
            }
        }
        Ok(None)
    }

    fn write(&self, loaded: &mut Loaded, block: &[u8]) -> Result<Wrote> {
        let wrote = loaded.drive().write(block)?;
        match wrote {
            // It is said once.
            Wrote::NotWritten(Why::EarlyWarning) if self.is_past_warning => {
                loaded.drive().write(block)
            }
            wrote => Ok(wrote),
        }
    }

    /// The next piece; `None` when there is none to come.
    fn next(&self) -> Option<Piece> {
        let mut state = self.shared.state.lock();
        if state.queue.is_empty() && !state.is_closed && state.wanted <= 1 {
            state.underruns += 1;
            state.waited_for = (state.waited_for * 2).min(self.most);
            state.wanted = state.waited_for;
        }
        while state.queue.len() < state.wanted && !state.is_closed {
            self.shared.added.wait(&mut state);
        }
        state.wanted = 1;
        if state.is_stopped { None } else { state.queue.pop_front() }
    }
}
