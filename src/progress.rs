//! What a long piece of work shows while it runs, and the wish that it stop.
//!
//! Counters only: whoever wants to draw them reads them. A work calls [`Progress::check`] often
//! enough that a user who cancels does not wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};

/// Counters of one piece of work.
#[derive(Default)]
pub struct Progress {
    /// Entries dealt with.
    pub entries: AtomicU64,
    /// Entries there are, as far as known; 0 when not.
    pub entries_total: AtomicU64,
    /// Bytes dealt with, unchanged ones included.
    pub bytes: AtomicU64,
    /// Bytes there are, as far as known; 0 when not.
    pub bytes_total: AtomicU64,
    /// Bytes read from source or store.
    pub bytes_read: AtomicU64,
    /// Bytes that new blocks take.
    pub bytes_stored: AtomicU64,
    /// Problems met.
    pub problems: AtomicU64,
    phase: Mutex<&'static str>,
    cancelled: Arc<AtomicBool>,
}

impl Progress {
    /// Asks the work to stop.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// The flag that [`Progress::cancel`] sets, for a signal handler.
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        self.cancelled.clone()
    }

    /// Fails once somebody has asked the work to stop.
    pub fn check(&self) -> Result<()> {
        match self.cancelled.load(Ordering::Relaxed) {
            true => Err(Error::new(ErrorKind::Interrupted, "stopped on request")),
            false => Ok(()),
        }
    }

    /// What the work is at, in a word or two.
    pub fn phase(&self) -> &'static str {
        *self.phase.lock()
    }

    /// Says what the work is at.
    pub fn set_phase(&self, phase: &'static str) {
        *self.phase.lock() = phase;
    }

    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }

    /// Reads a counter.
    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}
