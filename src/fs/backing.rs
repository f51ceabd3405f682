//! Files that the kernel reads by itself: one backing id for each block, shared by all files that
//! are this block.
//!
//! The kernel refuses, with `EIO`, an inode that is open by two backing ids at once, or by one and
//! without. So how an inode is opened is settled by its first open, and holds until the last of
//! them is closed. Ids of blocks that were read lately are kept, up to a number.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::Arc;

use fuser::{BackingId, ReplyOpen};
use lru::LruCache;
use parking_lot::Mutex;

use crate::snapshot::{Checked, WholeBlock};

/// Ids that are kept though no file is open. Each keeps a block's file open in the kernel.
const KEPT_MAX: usize = 256;

/// How an inode is opened; `None` is by messages.
pub type Way = Option<Arc<BackingId>>;

/// The ids of a session.
pub struct Backings(Mutex<State>);

struct State {
    open: HashMap<u64, Open>,
    /// By block, with the file that the id stands for: a block that is put back is another file.
    kept: LruCache<u64, (Checked, Arc<BackingId>)>,
}

struct Open {
    way: Way,
    count: u64,
}

impl Backings {
    /// None yet.
    pub fn new() -> Backings {
        let most = NonZeroUsize::new(KEPT_MAX).unwrap_or(NonZeroUsize::MIN);
        Backings(Mutex::new(State { open: HashMap::new(), kept: LruCache::new(most) }))
    }

    /// Counts an open of `ino` and tells how it is done. `find` looks for its block, if this is not
    /// settled yet.
    pub fn open(
        &self,
        ino: u64,
        reply: &ReplyOpen,
        find: impl FnOnce() -> Option<WholeBlock>,
    ) -> Way {
        if let Some(open) = self.0.lock().open.get_mut(&ino) {
            open.count += 1;
            return open.way.clone();
        }
        // Without the lock: the block may have to be read.
        let way = find().and_then(|whole| self.id_of(&whole, reply));
        let mut state = self.0.lock();
        let open = state.open.entry(ino).or_insert(Open { way, count: 0 });
        open.count += 1;
        open.way.clone()
    }

    fn id_of(&self, whole: &WholeBlock, reply: &ReplyOpen) -> Way {
        if let Some((checked, id)) = self.0.lock().kept.get(&whole.number)
            && *checked == whole.checked
        {
            return Some(id.clone());
        }
        match reply.open_backing(&whole.file) {
            Ok(id) => {
                let id = Arc::new(id);
                self.0.lock().kept.put(whole.number, (whole.checked, id.clone()));
                Some(id)
            }
            Err(e) => {
                log::debug!("the kernel does not read block {} by itself: {e}", whole.number);
                None
            }
        }
    }

    /// Counts a close of `ino`.
    pub fn release(&self, ino: u64) {
        let mut state = self.0.lock();
        if let Some(open) = state.open.get_mut(&ino) {
            open.count -= 1;
            if open.count == 0 {
                state.open.remove(&ino);
            }
        }
    }
}
