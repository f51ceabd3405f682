//! The frame cache: plain bytes of frames, least recently used ones dropped, bounded in bytes.
//!
//! Two threads that want one frame at the same time cause one load; a load that fails is told to
//! all who waited for it and is not remembered. The lock is never held while a frame is loaded.

use std::sync::Arc;

use lru::LruCache;
use parking_lot::{Condvar, Mutex};

use crate::error::{Error, ErrorKind, Result};

/// Block number and number of the frame in it.
pub type Key = (u64, usize);

/// How the cache fares.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheStats {
    /// Bytes held.
    pub bytes: u64,
    /// Most bytes it may hold.
    pub limit_bytes: u64,
    /// Frames found.
    pub hits: u64,
    /// Frames loaded.
    pub misses: u64,
}

/// The cache.
pub struct FrameCache {
    state: Mutex<State>,
}

struct State {
    frames: LruCache<Key, Slot>,
    stats: CacheStats,
}

enum Slot {
    Ready(Arc<Vec<u8>>),
    Loading(Arc<Flight>),
}

/// A load under way.
#[derive(Default)]
struct Flight {
    outcome: Mutex<Option<Outcome>>,
    landed: Condvar,
}

#[derive(Clone)]
enum Outcome {
    Loaded(Arc<Vec<u8>>),
    Failed(ErrorKind, String),
}

impl Outcome {
    fn into_result(self) -> Result<Arc<Vec<u8>>> {
        match self {
            Outcome::Loaded(frame) => Ok(frame),
            Outcome::Failed(kind, message) => Err(Error::new(kind, message)),
        }
    }
}

impl FrameCache {
    /// A cache of at most `limit_bytes`.
    pub fn new(limit_bytes: u64) -> FrameCache {
        let stats = CacheStats { limit_bytes, ..CacheStats::default() };
        FrameCache { state: Mutex::new(State { frames: LruCache::unbounded(), stats }) }
    }

    /// How it fares.
    pub fn stats(&self) -> CacheStats {
        self.state.lock().stats
    }

    /// The frame `key`, loaded by `load` if nobody has it.
    pub fn get_or_load(
        &self,
        key: Key,
        load: impl FnOnce() -> Result<Vec<u8>>,
    ) -> Result<Arc<Vec<u8>>> {
        let flight = {
            let mut state = self.state.lock();
            match state.frames.get(&key) {
                Some(Slot::Ready(frame)) => {
                    let frame = frame.clone();
                    state.stats.hits += 1;
                    return Ok(frame);
                }
                Some(Slot::Loading(flight)) => Some(flight.clone()),
                None => None,
            }
        };
        match flight {
            Some(flight) => flight.wait(),
            None => self.load(key, load),
        }
    }

    fn load(&self, key: Key, load: impl FnOnce() -> Result<Vec<u8>>) -> Result<Arc<Vec<u8>>> {
        let flight = Arc::new(Flight::default());
        {
            let mut state = self.state.lock();
            match state.frames.get(&key) {
                Some(Slot::Ready(frame)) => return Ok(frame.clone()),
                Some(Slot::Loading(other)) => {
                    let other = other.clone();
                    drop(state);
                    return other.wait();
                }
                None => {}
            }
            state.stats.misses += 1;
            state.frames.put(key, Slot::Loading(flight.clone()));
        }
        // Whatever happens in between, those who wait are told.
        let landing = Landing { cache: self, key, flight: &flight };
        let outcome = match load() {
            Ok(frame) => Outcome::Loaded(Arc::new(frame)),
            Err(e) => Outcome::Failed(e.kind(), e.to_string()),
        };
        landing.land(outcome.clone());
        outcome.into_result()
    }

    fn settle(&self, key: Key, outcome: &Outcome) {
        let mut state = self.state.lock();
        match outcome {
            Outcome::Failed(..) => {
                state.frames.pop(&key);
            }
            Outcome::Loaded(frame) => {
                state.stats.bytes += frame.len() as u64;
                state.frames.put(key, Slot::Ready(frame.clone()));
                state.shrink();
            }
        }
    }
}

impl State {
    /// Drops the frames that were used longest ago until the rest fits. Loads under way stay.
    fn shrink(&mut self) {
        let mut loading = Vec::new();
        while self.stats.bytes > self.stats.limit_bytes {
            match self.frames.pop_lru() {
                Some((_, Slot::Ready(frame))) => self.stats.bytes -= frame.len() as u64,
                Some((key, slot)) => loading.push((key, slot)),
                None => break,
            }
        }
        for (key, slot) in loading {
            self.frames.put(key, slot);
        }
    }
}

struct Landing<'a> {
    cache: &'a FrameCache,
    key: Key,
    flight: &'a Flight,
}

impl Landing<'_> {
    fn land(&self, outcome: Outcome) {
        self.cache.settle(self.key, &outcome);
        *self.flight.outcome.lock() = Some(outcome);
        self.flight.landed.notify_all();
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        if self.flight.outcome.lock().is_none() {
            self.land(Outcome::Failed(ErrorKind::Io, "a load has panicked".to_owned()));
        }
    }
}

impl Flight {
    fn wait(&self) -> Result<Arc<Vec<u8>>> {
        let mut outcome = self.outcome.lock();
        loop {
            match &*outcome {
                Some(outcome) => return outcome.clone().into_result(),
                None => self.landed.wait(&mut outcome),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn stays_within_its_bytes() {
        let cache = FrameCache::new(1000);
        for n in 0..50 {
            cache.get_or_load((1, n), || Ok(vec![0; 300])).unwrap();
            assert!(cache.stats().bytes <= 1000);
        }
        assert_eq!(cache.stats().misses, 50);
        cache.get_or_load((1, 49), || panic!("was just there")).unwrap();
        assert_eq!(cache.stats().hits, 1);
    }

    #[test]
    fn a_frame_larger_than_the_cache_is_served_and_not_kept() {
        let cache = FrameCache::new(100);
        assert_eq!(cache.get_or_load((1, 1), || Ok(vec![7; 300])).unwrap().len(), 300);
        assert_eq!(cache.stats().bytes, 0);
    }

    #[test]
    fn one_load_for_all_who_ask_at_once() {
        let (cache, loads) = (FrameCache::new(1 << 20), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let frame = cache.get_or_load((1, 1), || {
                        loads.fetch_add(1, Ordering::SeqCst);
                        std::thread::sleep(std::time::Duration::from_millis(30));
                        Ok(vec![1, 2, 3])
                    });
                    assert_eq!(*frame.unwrap(), [1, 2, 3]);
                });
            }
        });
        assert_eq!(loads.into_inner(), 1);
    }

    #[test]
    fn a_failed_load_is_told_and_forgotten() {
        let cache = FrameCache::new(1 << 20);
        let error = cache.get_or_load((1, 1), || Err(Error::corrupt("x"))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        cache.get_or_load((1, 1), || Ok(vec![1])).unwrap();
    }

    #[test]
    fn a_load_that_panics_leaves_nobody_waiting() {
        let cache = FrameCache::new(1 << 20);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = cache.get_or_load((1, 1), || panic!("on purpose"));
        }));
        assert!(panicked.is_err());
        cache.get_or_load((1, 1), || Ok(vec![1])).unwrap();
    }
}
