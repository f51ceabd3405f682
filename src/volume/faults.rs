//! Copies that readers have found bad: remembered so that they are asked last, and told once.

use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;

use super::{BlockId, Volume, VolumeConfig};
use crate::error::Error;

/// Copies that are remembered; the one that was longest not asked for is forgotten.
const FAULTS_MAX: usize = 4096;

/// Who is told of a bad copy. Called by whoever reads, who must not be kept waiting.
pub type Tell = Box<dyn Fn(&VolumeConfig, &BlockId, &Error) + Send + Sync>;

/// The bad copies that the readers of a catalog have met.
pub struct Faults {
    known: Mutex<LruCache<(i64, BlockId), ()>>,
    tell: Tell,
}

impl Faults {
    /// None yet; `tell` is called once for each.
    pub fn new(tell: Tell) -> Faults {
        let most = NonZeroUsize::new(FAULTS_MAX).unwrap_or(NonZeroUsize::MIN);
        Faults { known: Mutex::new(LruCache::new(most)), tell }
    }

    /// Whether a copy was found bad.
    pub fn has(&self, volume: i64, block: &BlockId) -> bool {
        let mut known = self.known.lock();
        !known.is_empty() && known.get(&(volume, *block)).is_some()
    }

    /// Notes that a copy could not be read as it was written.
    pub(super) fn found(&self, volume: &Volume, block: &BlockId, error: &Error) {
        let is_new = self.known.lock().put((volume.config.number, *block), ()).is_none();
        if is_new {
            (self.tell)(&volume.config, block, error);
        }
    }
}
