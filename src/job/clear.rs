//! What a job does before and after its run when it has to clear what it has stored.
//!
//! Only the mount knows who is using its files, so it gives the means; a queue without a mount has
//! none and refuses.

use crate::backup::Summary;
use crate::error::Result;
use crate::progress::Progress;

/// What was taken out of the source after a run.
#[derive(Clone, Debug, Default)]
pub struct Cleared {
    /// Names of anything but directories that were removed.
    pub files: u64,
    /// Directories that were removed.
    pub dirs: u64,
    /// Entries that are still there.
    pub stayed: u64,
    /// Which these are, and why.
    pub lines: Vec<String>,
}

/// Clears what a run has stored; made before that run begins.
pub type Clear = Box<dyn FnOnce(&Summary, &Progress) -> Cleared>;
/// Prepares for clearing.
pub type Prepare = Box<dyn Fn() -> Result<Clear> + Send + Sync>;
