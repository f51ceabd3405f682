//! A stream of blocks for a drive, which a thread of its own writes.
//!
//! A drive that has to wait for data stops, goes back and starts again. So what is written goes
//! into memory first, up to a budget. The drive starts when part of that is full; what comes faster
//! than it writes fills the rest meanwhile. When it has run empty it waits until half is full.
//! Blocks go to the drive in their order, and the first that it does not take is the last that it
//! is given.
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

/// What blocks begin at in memory, so that the kernel does not copy them.
const PAGE: usize = 4096;
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
    buffers_max: usize,
    filling: Option<Buffer>,
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

/// Memory for one block.
struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    fn new(block_bytes: usize) -> Buffer {
        let spare = Buffer::spare(block_bytes);
        let memory = vec![0; block_bytes + spare];
        // It is at most a page, but for machines that nobody has.
        let start = memory.as_ptr().align_offset(PAGE).min(spare);
        Buffer { memory, start, len: 0 }
    }

    /// What is taken beside the block, so that it can begin where a page does. The kernel copies
    /// those that are shorter than a page anyway.
    fn spare(block_bytes: usize) -> usize {
        if block_bytes < PAGE { 0 } else { PAGE }
    }

    fn rest(&mut self, block_bytes: usize) -> &mut [u8] {
        let range = self.start + self.len..self.start + block_bytes;
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
    /// There is a buffer again, or the drive takes no more.
    freed: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Buffer>,
    free: Vec<Buffer>,
    /// Buffers there are.
    made: usize,
    /// Blocks in the queue that the drive waits for.
    wanted: usize,
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
        let each = block_bytes + Buffer::spare(block_bytes);
        let buffers = options.buffer_bytes / each as u64;
        let buffers_max = usize::try_from(buffers).unwrap_or(usize::MAX).max(2);
        let shared = Arc::new(Shared::default());
        shared.state.lock().wanted = (buffers_max / START_PART).max(1);
        let work = Worker {
            shared: shared.clone(),
            enough: buffers_max / 2,
            is_past_warning: options.is_past_warning,
        };
        let thread = std::thread::Builder::new()
            .name("tape".into())
            .spawn(move || work.run(loaded))
            .map_err(|e| Error::io("starting a thread for the tape", e))?;
        Ok(Stream { shared, thread: Some(thread), block_bytes, buffers_max, filling: None })
    }

    /// What tells how far the drive is.
    pub fn counter(&self) -> Counter {
        Counter(self.shared.clone())
    }

    /// Waits until all is written; what is no whole block is filled up with zeros.
    pub fn finish(mut self) -> Result<Ended> {
        if let Some(mut last) = self.filling.take().filter(|it| it.len > 0) {
            last.rest(self.block_bytes).fill(0);
            last.len = self.block_bytes;
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

    fn push(&self, buffer: Buffer) {
        let mut state = self.shared.state.lock();
        state.queue.push_back(buffer);
        if state.queue.len() >= state.wanted {
            self.shared.added.notify_one();
        }
    }

    /// An empty buffer; `None` if the drive takes no more.
    fn buffer(&self) -> Option<Buffer> {
        let mut state = self.shared.state.lock();
        loop {
            if state.is_over {
                return None;
            }
            if let Some(buffer) = state.free.pop() {
                return Some(Buffer { len: 0, ..buffer });
            }
            if state.made < self.buffers_max {
                state.made += 1;
                drop(state);
                return Some(Buffer::new(self.block_bytes));
            }
            self.shared.freed.wait(&mut state);
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let filling = match self.filling.take() {
            Some(filling) => Some(filling),
            None => self.buffer(),
        };
        let Some(mut buffer) = filling else {
            return Err(io::Error::other("the drive takes no more"));
        };
        let room = buffer.rest(self.block_bytes);
        let len = room.len().min(bytes.len());
        if let (Some(to), Some(from)) = (room.get_mut(..len), bytes.get(..len)) {
            to.copy_from_slice(from);
        }
        buffer.len += len;
        match buffer.len == self.block_bytes {
            true => self.push(buffer),
            false => self.filling = Some(buffer),
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
    /// Blocks that it waits for when it has run empty.
    enough: usize,
    is_past_warning: bool,
}

impl Worker {
    fn run(self, mut loaded: Loaded) -> Ended {
        let (mut why, mut error) = (None, None);
        while let Some(buffer) = self.next() {
            match self.write(&mut loaded, buffer.bytes()) {
                Ok(Wrote::Whole) => {
                    let mut state = self.shared.state.lock();
                    state.blocks += 1;
                    state.free.push(buffer);
                    self.shared.freed.notify_one();
                }
                Ok(Wrote::NotWritten(it)) => {
                    why = Some(it);
                    break;
                }
                Err(it) => {
                    error = Some(it);
                    break;
                }
            }
        }
        let mut state = self.shared.state.lock();
        state.is_over = true;
        self.shared.freed.notify_one();
        let (blocks, underruns) = (state.blocks, state.underruns);
        drop(state);
        Ended { loaded, blocks, why, error, underruns }
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

    /// The next block; `None` when there is none to come.
    fn next(&self) -> Option<Buffer> {
        let mut state = self.shared.state.lock();
        if state.queue.is_empty() && !state.is_closed && state.wanted <= 1 {
            state.underruns += 1;
            state.wanted = self.enough;
        }
        while state.queue.len() < state.wanted && !state.is_closed {
            self.shared.added.wait(&mut state);
        }
        state.wanted = 1;
        if state.is_stopped { None } else { state.queue.pop_front() }
    }
}
