//! What wakes whoever waits for any of the jobs: a change rings, whoever may be waiting.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// A bell.
#[derive(Default)]
pub struct Bell {
    rung: Mutex<u64>,
    changed: Condvar,
}

impl Bell {
    /// Something has changed.
    pub fn ring(&self) {
        *self.rung.lock() += 1;
        self.changed.notify_all();
    }

    /// How often it has rung.
    pub fn count(&self) -> u64 {
        *self.rung.lock()
    }

    /// Waits until it has rung more often than `heard` times, at most for `limit`; gives how often
    /// it has.
    pub fn wait(&self, heard: u64, limit: Option<Duration>) -> u64 {
        let mut rung = self.rung.lock();
        match limit {
            None => self.changed.wait_while(&mut rung, |it| *it == heard),
            Some(limit) => {
                self.changed.wait_while_for(&mut rung, |it| *it == heard, limit);
            }
        }
        *rung
    }
}
