//! Which versions have nothing beside their content, so that a question for their attributes needs
//! no look at the catalog. Programs ask that of every file they list.
//!
//! Versions are numbered upwards, so a version that a finished run has means that all before it
//! are as they will stay. What is kept is bounded; what was dropped is read again.

use std::num::NonZeroUsize;

use lru::LruCache;
use parking_lot::Mutex;

use crate::catalog::VersionId;
use crate::error::Result;
use crate::snapshot::Snapshots;

/// Versions that are asked for at a time.
const STRETCH: i64 = 1024;
/// Stretches that are known at most; one takes about 150 bytes.
const STRETCHES_MAX: usize = 2048;

/// What is known.
pub struct Bare(Mutex<LruCache<i64, Stretch>>);

struct Stretch {
    /// Up to which version this is known.
    last: VersionId,
    /// Offsets of the versions that have something, in order.
    laden: Vec<u16>,
}

impl Bare {
    /// Nothing known yet.
    pub fn new() -> Bare {
        let most = NonZeroUsize::new(STRETCHES_MAX).unwrap_or(NonZeroUsize::MIN);
        Bare(Mutex::new(LruCache::new(most)))
    }

    /// Whether `version`, which a finished run has, has no attributes, no target and no flags.
    pub fn is_bare(&self, snapshots: &Snapshots, version: VersionId) -> Result<bool> {
        let number = version.div_euclid(STRETCH);
        let first = number * STRETCH;
        let offset = u16::try_from(version - first).unwrap_or(u16::MAX);
        if let Some(known) = self.0.lock().get(&number)
            && version <= known.last
        {
            return Ok(known.laden.binary_search(&offset).is_err());
        }
        let laden = snapshots.with_reader(|reader| {
            reader.versions_with_extra(first, first.saturating_add(STRETCH))
        })?;
        let laden: Vec<u16> =
            laden.iter().filter_map(|it| u16::try_from(it - first).ok()).collect();
        let is_bare = laden.binary_search(&offset).is_err();
        // A later version may have been on its way when this was read.
        let last = laden.last().map_or(version, |it| version.max(first + i64::from(*it)));
        self.0.lock().put(number, Stretch { last, laden });
        Ok(is_bare)
    }
}
