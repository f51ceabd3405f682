//! Files that the kernel reads, or reads and writes, by itself.
//!
//! The kernel refuses, with `EIO`, an inode that is open by two backing ids at once, or by one and
//! without. So how an inode is opened is settled by its first open, and holds until the last of
//! them is closed ([`Opens`]). In snapshots there is one id for each block, shared by all files
//! that are this block; ids of blocks that were read lately are kept, up to a number
//! ([`Backings`]).

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

/// The inodes of a session that are open, and how.
#[derive(Debug, Default)]
pub struct Opens(Mutex<HashMap<u64, Open>>);

#[derive(Debug)]
struct Open {
    way: Way,
    count: u64,
}

impl Opens {
    /// Counts an open of `ino` and tells how it is done. `choose` says it, if it is not settled.
    /// Each call is followed by one of [`Opens::closed`].
    pub fn opened(&self, ino: u64, choose: impl FnOnce() -> Way) -> Way {
        if let Some(open) = self.0.lock().get_mut(&ino) {
            open.count += 1;
            return open.way.clone();
        }
        // Without the lock: a block may have to be read. What loses a race is dropped unused.
        let way = choose();
        let mut opens = self.0.lock();
        let open = opens.entry(ino).or_insert_with(|| Open { way: way.clone(), count: 0 });
        open.count += 1;
        open.way.clone()
    }

    /// Counts a close of `ino`.
    pub fn closed(&self, ino: u64) {
        let gone = {
            let mut opens = self.0.lock();
            match opens.get_mut(&ino) {
                Some(open) if open.count > 1 => {
                    open.count -= 1;
                    None
                }
                _ => opens.remove(&ino),
            }
        };
        // Closing the backing file may free it.
        drop(gone);
    }

    /// Whether `ino` is open past this program.
    pub fn passes(&self, ino: u64) -> bool {
        self.0.lock().get(&ino).is_some_and(|it| it.way.is_some())
    }
}

/// The ids of a session with snapshots.
pub struct Backings {
    opens: Opens,
    /// By block, with the file that the id stands for: a block that is put back is another file.
    kept: Mutex<LruCache<u64, (Checked, Arc<BackingId>)>>,
}

impl Backings {
    /// None yet.
    pub fn new() -> Backings {
        let most = NonZeroUsize::new(KEPT_MAX).unwrap_or(NonZeroUsize::MIN);
        Backings { opens: Opens::default(), kept: Mutex::new(LruCache::new(most)) }
    }

    /// Counts an open of `ino` and tells how it is done. `find` looks for its block, if this is not
    /// settled yet.
    pub fn open(
        &self,
        ino: u64,
        reply: &ReplyOpen,
        find: impl FnOnce() -> Option<WholeBlock>,
    ) -> Way {
        self.opens.opened(ino, || find().and_then(|whole| self.id_of(&whole, reply)))
    }

    fn id_of(&self, whole: &WholeBlock, reply: &ReplyOpen) -> Way {
        if let Some((checked, id)) = self.kept.lock().get(&whole.number)
            && *checked == whole.checked
        {
            return Some(id.clone());
        }
        match reply.open_backing(&whole.file) {
            Ok(id) => {
                let id = Arc::new(id);
                self.kept.lock().put(whole.number, (whole.checked, id.clone()));
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
        self.opens.closed(ino);
    }
}
