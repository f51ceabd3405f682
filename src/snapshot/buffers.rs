//! Buffers for plain bytes that are used again instead of given back.
//!
//! A mount reads frames of all lengths on many threads for days. Taken from the allocator one by
//! one, their memory is cleared and mapped for each, and in the end is more than all of them
//! together. Buffers of few sizes go round instead. What a buffer holds when it is taken is left
//! from somebody else: who takes it overwrites all of it.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use parking_lot::Mutex;

/// Sizes of buffers are multiples of this; shorter ones than half of it are not kept.
const STEP_BYTES: usize = 32 << 10;
/// As many sizes are as good as the right one.
const STEPS_NEAR: usize = 3;
/// Most bytes of buffers that wait for their next use; the one that has waited longest goes first.
const FREE_BYTES_MAX: usize = 4 << 20;

/// Where buffers wait for their next use.
#[derive(Default)]
pub struct Buffers(Mutex<Free>);

#[derive(Default)]
struct Free {
    /// In the order in which they came back.
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
}

/// Bytes in a buffer that goes back where it came from.
pub struct Buffer {
    bytes: Vec<u8>,
    len: usize,
    home: Option<Arc<Buffers>>,
}

impl Buffers {
    /// A buffer of `len` bytes, which are any bytes.
    pub fn take(self: &Arc<Buffers>, len: usize) -> Buffer {
        if len < STEP_BYTES / 2 {
            return Buffer::from(vec![0; len]);
        }
        let steps = len.div_ceil(STEP_BYTES);
        let near = steps * STEP_BYTES..(steps + STEPS_NEAR) * STEP_BYTES;
        let used = {
            let mut free = self.0.lock();
            let found = free.waiting.iter().rposition(|it| near.contains(&it.len()));
            let used = found.and_then(|at| free.waiting.remove(at));
            free.bytes -= used.as_ref().map_or(0, Vec::len);
            used
        };
        let bytes = used.unwrap_or_else(|| vec![0; steps * STEP_BYTES]);
        Buffer { bytes, len, home: Some(self.clone()) }
    }

    fn put_back(&self, bytes: Vec<u8>) {
        let mut gone = Vec::new();
        let mut free = self.0.lock();
        free.bytes += bytes.len();
        free.waiting.push_back(bytes);
        while free.bytes > FREE_BYTES_MAX
            && let Some(oldest) = free.waiting.pop_front()
        {
            free.bytes -= oldest.len();
            gone.push(oldest);
        }
        // Giving memory back takes a while.
        drop(free);
    }
}

impl Buffer {
    /// Bytes of memory that it takes.
    pub fn weight(&self) -> u64 {
        self.bytes.len() as u64
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a buffer of {} bytes", self.len)
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Buffer {
        Buffer { len: bytes.len(), bytes, home: None }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..self.len).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            home.put_back(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_go_round_and_no_more_than_few_wait() {
        let buffers = Arc::new(Buffers::default());
        let mut first = buffers.take(200_000);
        first.fill(7);
        assert_eq!((first.len(), first.weight() % STEP_BYTES as u64), (200_000, 0));
        let place = first.as_ptr();
        drop(first);
        let again = buffers.take(199_000);
        assert_eq!((again.as_ptr(), again.len()), (place, 199_000));
        let many: Vec<Buffer> = (0..100).map(|it| buffers.take(1 + it * 10_000)).collect();
        drop(many);
        assert!(buffers.0.lock().bytes <= FREE_BYTES_MAX);
        let waiting: usize = buffers.0.lock().waiting.iter().map(Vec::len).sum();
        assert_eq!(waiting, buffers.0.lock().bytes);
        // What came back last is there, whatever waited before.
        let last = buffers.take(1 << 20);
        let place = last.as_ptr();
        drop(last);
        assert_eq!(buffers.take(1 << 20).as_ptr(), place);
    }

    #[test]
    fn short_and_empty_ones_are_as_long_as_asked_for() {
        let buffers = Arc::new(Buffers::default());
        for len in [0, 1, STEP_BYTES / 2, STEP_BYTES, STEP_BYTES + 1] {
            assert_eq!(buffers.take(len).len(), len);
        }
    }
}
