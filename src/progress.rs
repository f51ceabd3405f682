//! What a long piece of work shows while it runs, and the wish that it stop.
//!
//! Counters: whoever wants to draw them reads them. Phases and problems are also told to a
//! listener, as they come. A work calls [`Progress::check`] often enough that a user who cancels
//! does not wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Problem, Result};

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
    /// Bytes of new content that was not known before, as read.
    pub bytes_new: AtomicU64,
    /// Bytes that new blocks take.
    pub bytes_stored: AtomicU64,
    /// Problems met.
    pub problems: AtomicU64,
    phase: Mutex<&'static str>,
    cancelled: Arc<AtomicBool>,
    listener: Option<Listener>,
}

/// What a work tells while it goes on.
pub enum Said<'a> {
    /// What it is at now.
    Phase(&'static str),
    /// A problem that it has met.
    Problem(&'a Problem),
}

/// Who is told. Called from any of the work's threads, and must not keep them waiting.
pub type Listener = Box<dyn Fn(Said<'_>) + Send + Sync>;

/// The counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Entries dealt with.
    pub entries: u64,
    /// Entries there are, never fewer than are dealt with; `None` when that is not known.
    pub entries_total: Option<u64>,
    /// Bytes dealt with, unchanged ones included.
    pub bytes: u64,
    /// Bytes there are, never fewer than are dealt with; `None` when that is not known.
    pub bytes_total: Option<u64>,
    /// Bytes read from source or store.
    pub bytes_read: u64,
    /// Bytes of new content that was not known before, as read.
    pub bytes_new: u64,
    /// Bytes that new blocks take.
    pub bytes_stored: u64,
    /// Problems met.
    pub problems: u64,
}

impl Counters {
    /// How many times the bytes that were read the new ones among them are; `None` before any.
    pub fn dedup_ratio(&self) -> Option<f64> {
        ratio(self.bytes_read, self.bytes_new)
    }

    /// How many times the bytes that are stored the new ones are; `None` before any.
    pub fn compression_ratio(&self) -> Option<f64> {
        ratio(self.bytes_new, self.bytes_stored)
    }
}

#[allow(clippy::cast_precision_loss)]
fn ratio(of: u64, to: u64) -> Option<f64> {
    (of > 0 && to > 0).then(|| of as f64 / to as f64)
}

impl Progress {
    /// Counters whose work is listened to.
    pub fn with_listener(listener: Listener) -> Progress {
        Progress { listener: Some(listener), ..Progress::default() }
    }

    /// The counters as they stand. A total is an estimate, from the run before; one that has been
    /// passed is no total any more.
    pub fn counters(&self) -> Counters {
        let get = Progress::get;
        let total = |done: u64, total: u64| (total > 0 && total >= done).then_some(total);
        let (entries, bytes) = (get(&self.entries), get(&self.bytes));
        Counters {
            entries,
            entries_total: total(entries, get(&self.entries_total)),
            bytes,
            bytes_total: total(bytes, get(&self.bytes_total)),
            bytes_read: get(&self.bytes_read),
            bytes_new: get(&self.bytes_new),
            bytes_stored: get(&self.bytes_stored),
            problems: get(&self.problems),
        }
    }

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
        if let Some(listener) = &self.listener {
            listener(Said::Phase(phase));
        }
    }

    /// Counts a problem and tells of it.
    pub fn note(&self, problem: &Problem) {
        Progress::add(&self.problems, 1);
        if let Some(listener) = &self.listener {
            listener(Said::Problem(problem));
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_that_has_been_passed_is_none() {
        let progress = Progress::default();
        assert_eq!(progress.counters(), Counters::default());
        Progress::add(&progress.bytes_total, 100);
        Progress::add(&progress.entries_total, 2);
        Progress::add(&progress.bytes, 100);
        let counters = progress.counters();
        assert_eq!((counters.bytes_total, counters.entries_total), (Some(100), Some(2)));
        Progress::add(&progress.bytes, 1);
        let counters = progress.counters();
        assert_eq!((counters.bytes, counters.bytes_total), (101, None));
        assert_eq!(counters.entries_total, Some(2));
    }

    #[test]
    fn ratios_begin_with_the_first_bytes() {
        let mut counters = Counters::default();
        assert_eq!((counters.dedup_ratio(), counters.compression_ratio()), (None, None));
        counters.bytes_read = 300;
        assert_eq!(counters.dedup_ratio(), None);
        (counters.bytes_new, counters.bytes_stored) = (200, 50);
        assert_eq!(counters.dedup_ratio(), Some(1.5));
        assert_eq!(counters.compression_ratio(), Some(4.0));
    }
}
