//! The frame cache: plain bytes of frames, least recently used ones dropped, bounded in bytes.
//!
//! Two threads that want one frame at the same time cause one load; a load that fails is told to
//! all who waited for it and is not remembered. The lock is never held while a frame is loaded.
//! Frames that are read ahead of their use take at most a part of the cache, so that none drops
//! another before it was used; what fails ahead is told to nobody.
//!
//! A frame may be there with its start alone. Who needs more of it has it loaded again.

use std::sync::Arc;

use lru::LruCache;
use parking_lot::{Condvar, Mutex};

use super::buffers::Buffer;
use crate::error::{Error, ErrorKind, Result};

/// Block number and number of the frame in it.
pub type Key = (u64, usize);

/// The part of the cache that frames may take which nobody has asked for yet: one in this many.
pub const AHEAD_PART: u64 = 4;

/// How the cache fares.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheStats {
    /// Bytes held.
    pub bytes: u64,
    /// Most bytes it may hold.
    pub limit_bytes: u64,
    /// Frames found.
    pub hits: u64,
    /// Frames loaded for who asked for them.
    pub misses: u64,
    /// Frames loaded ahead of being asked for.
    pub ahead: u64,
    /// Those of them that were asked for later.
    pub ahead_used: u64,
    /// Bytes held that were loaded ahead and not asked for yet.
    pub ahead_bytes: u64,
}

/// The cache.
pub struct FrameCache {
    state: Mutex<State>,
}

struct State {
    frames: LruCache<Key, Slot>,
    stats: CacheStats,
}

/// A frame that is there or on its way. `is_ahead` as long as nobody has asked for it.
struct Slot {
    is_ahead: bool,
    content: Slotted,
}

impl Slot {
    /// Whether it gives, or may give when it is loaded, `len` bytes.
    fn may_give(&self, len: usize) -> bool {
        match &self.content {
            Slotted::Ready(frame) => frame.len() >= len,
            Slotted::Loading(_) => true,
        }
    }
}

enum Slotted {
    Ready(Arc<Buffer>),
    Loading(Arc<Flight>),
}

/// A load under way.
#[derive(Default)]
struct Flight {
    /// Whether it began ahead.
    is_ahead: bool,
    outcome: Mutex<Option<Outcome>>,
    landed: Condvar,
}

#[derive(Clone)]
enum Outcome {
    Loaded(Arc<Buffer>),
    Failed(ErrorKind, String),
}

impl Outcome {
    fn into_result(self) -> Result<Arc<Buffer>> {
        match self {
            Outcome::Loaded(frame) => Ok(frame),
            Outcome::Failed(kind, message) => Err(Error::new(kind, message)),
        }
    }
}

/// What somebody who asks for a frame meets.
enum Met {
    Ready(Arc<Buffer>),
    /// Somebody else is loading it.
    Loading(Arc<Flight>),
    /// Nobody is: it is his to load.
    Nobody(Arc<Flight>),
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

    /// The first `len` bytes at least of the frame `key`, loaded by `load` if nobody has them. It
    /// is told whether there were fewer, and so, that this is not the only use of the frame.
    pub fn get_or_load(
        &self,
        key: Key,
        len: usize,
        load: impl FnOnce(bool) -> Result<Buffer>,
    ) -> Result<Arc<Buffer>> {
        let mut was_short = false;
        loop {
            match self.meet(key, len, &mut was_short) {
                Met::Ready(frame) => return Ok(frame),
                Met::Nobody(flight) => return self.load(key, &flight, || load(was_short)),
                Met::Loading(flight) => match flight.wait() {
                    Ok(frame) if frame.len() < len => {}
                    // What went wrong before anybody asked is found again by who asks.
                    Err(_) if flight.is_ahead => {}
                    result => return result,
                },
            }
        }
    }

    /// The first `len` bytes at least of the frame `key`, if they are there or on their way.
    pub fn get(&self, key: Key, len: usize) -> Option<Arc<Buffer>> {
        let flight = {
            let mut state = self.state.lock();
            match state.ask(key, len)? {
                Met::Ready(frame) => return Some(frame),
                Met::Loading(flight) | Met::Nobody(flight) => flight,
            }
        };
        flight.wait().ok().filter(|it| it.len() >= len)
    }

    /// Loads the frame `key` of `len` bytes ahead of being asked for it, if nobody has it or is
    /// loading it.
    pub fn load_ahead(&self, key: Key, len: usize, load: impl FnOnce() -> Result<Buffer>) {
        let flight = Arc::new(Flight { is_ahead: true, ..Flight::default() });
        {
            let mut state = self.state.lock();
            if state.has(key, len) {
                return;
            }
            state.forget(key);
            state.stats.ahead += 1;
            let content = Slotted::Loading(flight.clone());
            state.frames.put(key, Slot { is_ahead: true, content });
        }
        // Who needs the frame finds out himself what is wrong with it.
        let _ = self.load(key, &flight, load);
    }

    /// Whether `len` bytes of the frame `key` are there, or any on their way. Not a use of them.
    pub fn has(&self, key: Key, len: usize) -> bool {
        self.state.lock().has(key, len)
    }

    fn meet(&self, key: Key, len: usize, was_short: &mut bool) -> Met {
        let mut state = self.state.lock();
        if let Some(met) = state.ask(key, len) {
            return met;
        }
        *was_short |= state.forget(key);
        state.stats.misses += 1;
        let flight = Arc::new(Flight::default());
        let content = Slotted::Loading(flight.clone());
        state.frames.put(key, Slot { is_ahead: false, content });
        Met::Nobody(flight)
    }

    fn load(
        &self,
        key: Key,
        flight: &Flight,
        load: impl FnOnce() -> Result<Buffer>,
    ) -> Result<Arc<Buffer>> {
        // Whatever happens in between, those who wait are told.
        let landing = Landing { cache: self, key, flight };
        let outcome = match load() {
            Ok(frame) => Outcome::Loaded(Arc::new(frame)),
            Err(e) => Outcome::Failed(e.kind(), e.to_string()),
        };
        landing.land(outcome.clone());
        outcome.into_result()
    }

    fn settle(&self, key: Key, outcome: &Outcome) {
        let mut state = self.state.lock();
        let is_ahead = state.frames.pop(&key).is_some_and(|it| it.is_ahead);
        if let Outcome::Loaded(frame) = outcome {
            state.stats.bytes += frame.weight();
            state.stats.ahead_bytes += if is_ahead { frame.weight() } else { 0 };
            state.frames.put(key, Slot { is_ahead, content: Slotted::Ready(frame.clone()) });
            state.shrink();
        }
    }
}

impl State {
    fn has(&self, key: Key, len: usize) -> bool {
        self.frames.peek(&key).is_some_and(|it| it.may_give(len))
    }

    /// Drops what is there of a frame that is not on its way; whether there was something.
    fn forget(&mut self, key: Key) -> bool {
        match self.frames.pop(&key) {
            Some(Slot { is_ahead, content: Slotted::Ready(frame) }) => {
                self.stats.bytes -= frame.weight();
                self.stats.ahead_bytes -= if is_ahead { frame.weight() } else { 0 };
                true
            }
            _ => false,
        }
    }

    /// What somebody who asks for `len` bytes of a frame meets, if they are there or any on their
    /// way.
    fn ask(&mut self, key: Key, len: usize) -> Option<Met> {
        let slot = self.frames.get_mut(&key).filter(|it| it.may_give(len))?;
        let was_ahead = std::mem::take(&mut slot.is_ahead);
        self.stats.hits += 1;
        self.stats.ahead_used += u64::from(was_ahead);
        Some(match &slot.content {
            Slotted::Ready(frame) => {
                self.stats.ahead_bytes -= if was_ahead { frame.weight() } else { 0 };
                Met::Ready(frame.clone())
            }
            Slotted::Loading(flight) => Met::Loading(flight.clone()),
        })
    }

    /// Drops the frames that were used longest ago until the rest fits. Loads under way stay.
    fn shrink(&mut self) {
        let mut loading = Vec::new();
        while self.stats.bytes > self.stats.limit_bytes {
            match self.frames.pop_lru() {
                Some((_, Slot { is_ahead, content: Slotted::Ready(frame) })) => {
                    self.stats.bytes -= frame.weight();
                    self.stats.ahead_bytes -= if is_ahead { frame.weight() } else { 0 };
                }
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
    fn wait(&self) -> Result<Arc<Buffer>> {
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

    fn bytes(value: u8, len: usize) -> Buffer {
        vec![value; len].into()
    }

    #[test]
    fn stays_within_its_bytes() {
        let cache = FrameCache::new(1000);
        for n in 0..50 {
            cache.get_or_load((1, n), 1, |_| Ok(bytes(0, 300))).unwrap();
            assert!(cache.stats().bytes <= 1000);
        }
        assert_eq!(cache.stats().misses, 50);
        cache.get_or_load((1, 49), 1, |_| panic!("was just there")).unwrap();
        assert_eq!(cache.stats().hits, 1);
    }

    #[test]
    fn a_frame_larger_than_the_cache_is_served_and_not_kept() {
        let cache = FrameCache::new(100);
        assert_eq!(cache.get_or_load((1, 1), 1, |_| Ok(bytes(7, 300))).unwrap().len(), 300);
        assert_eq!(cache.stats().bytes, 0);
    }

    #[test]
    fn one_load_for_all_who_ask_at_once() {
        let (cache, loads) = (FrameCache::new(1 << 20), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let frame = cache.get_or_load((1, 1), 1, |_| {
                        loads.fetch_add(1, Ordering::SeqCst);
                        std::thread::sleep(std::time::Duration::from_millis(30));
                        Ok(vec![1, 2, 3].into())
                    });
                    assert_eq!(**frame.unwrap(), [1, 2, 3]);
                });
            }
        });
        assert_eq!(loads.into_inner(), 1);
    }

    #[test]
    fn a_failed_load_is_told_and_forgotten() {
        let cache = FrameCache::new(1 << 20);
        let error = cache.get_or_load((1, 1), 1, |_| Err(Error::corrupt("x"))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        cache.get_or_load((1, 1), 1, |_| Ok(bytes(1, 1))).unwrap();
    }

    #[test]
    fn a_load_that_panics_leaves_nobody_waiting() {
        let cache = FrameCache::new(1 << 20);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = cache.get_or_load((1, 1), 1, |_| panic!("on purpose"));
        }));
        assert!(panicked.is_err());
        cache.get_or_load((1, 1), 1, |_| Ok(bytes(1, 1))).unwrap();
    }

    #[test]
    fn what_was_read_ahead_is_counted_until_it_is_used_or_dropped() {
        let cache = FrameCache::new(1000);
        for n in 0..3 {
            cache.load_ahead((1, n), 1, || Ok(bytes(0, 300)));
            cache.load_ahead((1, n), 1, || panic!("is there"));
        }
        assert_eq!((cache.stats().ahead, cache.stats().ahead_bytes), (3, 900));
        cache.get_or_load((1, 2), 1, |_| panic!("is there")).unwrap();
        assert!(cache.get((1, 2), 300).is_some() && cache.get((1, 7), 1).is_none());
        let stats = cache.stats();
        assert_eq!((stats.ahead_used, stats.ahead_bytes, stats.misses), (1, 600, 0));
        for n in 10..20 {
            cache.get_or_load((1, n), 1, |_| Ok(bytes(0, 300))).unwrap();
        }
        let stats = cache.stats();
        assert_eq!((stats.ahead_used, stats.ahead_bytes, stats.bytes), (1, 0, 900));
    }

    #[test]
    fn who_needs_a_frame_waits_for_the_one_that_loads_it_ahead() {
        let cache = FrameCache::new(1 << 20);
        let (begun, begins) = std::sync::mpsc::channel();
        let (go, goes) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let cache = &cache;
            scope.spawn(move || {
                cache.load_ahead((1, 1), 1, || {
                    begun.send(()).unwrap();
                    goes.recv().unwrap();
                    Ok(bytes(5, 10))
                });
            });
            begins.recv().unwrap();
            let reader = scope.spawn(|| cache.get_or_load((1, 1), 1, |_| panic!("is on its way")));
            while cache.stats().hits == 0 {
                std::thread::yield_now();
            }
            go.send(()).unwrap();
            assert_eq!(**reader.join().unwrap().unwrap(), [5; 10]);
        });
        let stats = cache.stats();
        assert_eq!((stats.ahead, stats.ahead_used, stats.ahead_bytes), (1, 1, 0));
    }

    #[test]
    fn what_fails_ahead_is_found_by_who_needs_it() {
        let cache = FrameCache::new(1 << 20);
        cache.load_ahead((1, 1), 1, || Err(Error::corrupt("ahead")));
        assert!(!cache.has((1, 1), 1));
        let error = cache.get_or_load((1, 1), 1, |_| Err(Error::corrupt("own"))).unwrap_err();
        assert_eq!(error.to_string(), "own");
        let (begun, begins) = std::sync::mpsc::channel();
        let (go, goes) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let cache = &cache;
            scope.spawn(move || {
                cache.load_ahead((1, 2), 1, || {
                    begun.send(()).unwrap();
                    goes.recv().unwrap();
                    Err(Error::corrupt("ahead"))
                });
            });
            begins.recv().unwrap();
            let reader = scope.spawn(|| cache.get_or_load((1, 2), 1, |_| Ok(bytes(1, 1))));
            while cache.stats().hits == 0 {
                std::thread::yield_now();
            }
            go.send(()).unwrap();
            reader.join().unwrap().unwrap();
        });
        assert_eq!(cache.stats().ahead_bytes, 0);
    }

    #[test]
    fn the_start_of_a_frame_serves_who_needs_no_more() {
        let cache = FrameCache::new(1000);
        let load = |cache: &FrameCache, len, short| {
            let load = |was_short| {
                assert_eq!(was_short, short);
                Ok(bytes(3, len))
            };
            assert_eq!(cache.get_or_load((1, 1), len, load).unwrap().len(), len);
        };
        load(&cache, 100, false);
        cache.get_or_load((1, 1), 70, |_| panic!("is there")).unwrap();
        assert!(cache.get((1, 1), 100).is_some() && cache.get((1, 1), 101).is_none());
        assert_eq!(cache.stats().bytes, 100);
        load(&cache, 300, true);
        assert_eq!(cache.stats().bytes, 300);
        load(&FrameCache::new(0), 100, false);
        // What is read ahead is whole.
        cache.get_or_load((2, 1), 10, |_| Ok(bytes(1, 10))).unwrap();
        cache.load_ahead((2, 1), 200, || Ok(bytes(1, 200)));
        cache.load_ahead((2, 1), 200, || panic!("is there"));
        let stats = cache.stats();
        assert_eq!((stats.bytes, stats.ahead_bytes), (500, 200));
    }
}
