//! Things that were read from the catalog, kept until others need their room.
//!
//! The least recently used are dropped; the bound is in bytes, since how long the list of a file's
//! places is depends on the file.

use std::hash::Hash;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

/// What the bookkeeping of one thing takes, in bytes, about.
const OVERHEAD_BYTES: usize = 128;

/// The things. They are shared with those who use them.
pub struct Weighed<K, V> {
    state: Mutex<State<K, V>>,
    limit_bytes: usize,
}

struct State<K, V> {
    kept: LruCache<K, (Arc<V>, usize)>,
    bytes: usize,
}

impl<K: Hash + Eq, V> Weighed<K, V> {
    /// Keeps at most `limit_bytes`, or one thing if that is larger: it would be read again and
    /// again otherwise.
    pub fn new(limit_bytes: usize) -> Weighed<K, V> {
        let state = State { kept: LruCache::unbounded(), bytes: 0 };
        Weighed { state: Mutex::new(state), limit_bytes }
    }

    /// The thing `key`, if it is kept.
    pub fn get(&self, key: &K) -> Option<Arc<V>> {
        self.state.lock().kept.get(key).map(|it| it.0.clone())
    }

    /// Keeps it no longer.
    pub fn forget(&self, key: &K) {
        let mut state = self.state.lock();
        if let Some((_, bytes)) = state.kept.pop(key) {
            state.bytes -= bytes;
        }
    }

    /// Keeps `thing`, which takes `bytes`.
    pub fn put(&self, key: K, thing: Arc<V>, bytes: usize) {
        let bytes = bytes + OVERHEAD_BYTES;
        let mut state = self.state.lock();
        let before = state.kept.put(key, (thing, bytes));
        state.bytes = state.bytes + bytes - before.map_or(0, |it| it.1);
        while state.bytes > self.limit_bytes && state.kept.len() > 1 {
            let Some((_, (_, dropped))) = state.kept.pop_lru() else { break };
            state.bytes -= dropped;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_within_its_bytes() {
        let kept = Weighed::new(10_000);
        for number in 0..1000 {
            kept.put(number, Arc::new(number), 100 * (number % 7));
            let state = kept.state.lock();
            assert!(state.bytes <= 10_000);
            assert_eq!(state.bytes, state.kept.iter().map(|it| it.1.1).sum::<usize>());
        }
        assert_eq!(kept.get(&999).as_deref(), Some(&999));
        assert!(kept.get(&900).is_none());
        kept.put(999, Arc::new(1), 0);
        assert_eq!(kept.get(&999).as_deref(), Some(&1));
    }

    #[test]
    fn what_is_larger_than_all_is_kept_alone() {
        let kept = Weighed::new(1000);
        kept.put(1, Arc::new(1), 10);
        kept.put(2, Arc::new(2), 5000);
        assert!(kept.get(&1).is_none() && kept.get(&2).is_some());
        kept.put(3, Arc::new(3), 10);
        assert!(kept.get(&2).is_none() && kept.get(&3).is_some());
        assert_eq!(kept.state.lock().bytes, 10 + OVERHEAD_BYTES);
    }
}
