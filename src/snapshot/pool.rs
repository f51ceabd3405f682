//! Things that one thread uses at a time, kept for the next one.

use parking_lot::Mutex;

/// Things kept at most. Each reader of a catalog has a cache of its own; that many threads ask the
/// catalog at one time only for moments.
const KEPT_MAX: usize = 4;

/// A pool. Taking from an empty one gives `None`, and the caller makes a new thing.
pub struct Pool<T>(Mutex<Vec<T>>);

impl<T> Pool<T> {
    /// An empty pool.
    pub fn new() -> Pool<T> {
        Pool(Mutex::new(Vec::new()))
    }

    /// Takes a thing out.
    pub fn take(&self) -> Option<T> {
        self.0.lock().pop()
    }

    /// Puts a thing in for others.
    pub fn put(&self, thing: T) {
        let mut kept = self.0.lock();
        if kept.len() < KEPT_MAX {
            kept.push(thing);
        }
    }
}
