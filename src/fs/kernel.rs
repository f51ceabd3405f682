//! What this program asks of the kernel beside its answers: to forget what it remembers of the
//! writable tree, and to read and write the files of that tree by itself.
//!
//! Invariant: once the kernel has refused to pass a file, it is asked for none any more.

use std::ffi::OsStr;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use fuser::{BackingId, INodeNo, InitFlags, KernelConfig, Notifier};

use super::backing::{Opens, Way};

/// The kernel's side of the session that has the writable tree.
#[derive(Debug, Default)]
pub struct Kernel {
    notifier: OnceLock<Notifier>,
    passes: AtomicBool,
    passed: AtomicU64,
    opens: Opens,
}

impl Kernel {
    /// Asks, at the start of the session, for leave to have files read and written past us.
    pub fn negotiate(&self, config: &mut KernelConfig) {
        if crate::sys::effective_uid() != 0 {
            return;
        }
        let asked = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH);
        // One level: the files must not lie on a file system that is stacked on another.
        self.passes
            .store(asked.is_ok() && config.set_max_stack_depth(1).is_ok(), Ordering::Relaxed);
    }

    /// From now on the kernel can be told things.
    pub fn attach(&self, notifier: Notifier) {
        // There is one session with a writable tree.
        let _ = self.notifier.set(notifier);
    }

    /// Has the kernel forget a name. Not to be called while a request is being answered.
    pub fn forget_name(&self, parent: u64, name: &OsStr) {
        if let Some(notifier) = self.notifier.get() {
            // What it does not know it has not to forget.
            let _ = notifier.inval_entry(INodeNo(parent), name);
        }
    }

    /// Has the kernel ask for a file's attributes: it has not seen all that changes them when the
    /// file is written to past us, through mapped memory.
    fn forget_attributes(&self, ino: u64) {
        if let Some(notifier) = self.notifier.get() {
            let _ = notifier.inval_inode(INodeNo(ino), -1, 0);
        }
    }

    /// Files that were opened past this program since the start: 0 where that is not possible.
    pub fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }

    /// Counts a handle that is opened on `ino`. Its backing id, if it goes past this program;
    /// `make` makes one. Each call is followed by one of [`Kernel::closed`].
    pub fn opened(&self, ino: u64, make: impl FnOnce() -> io::Result<BackingId>) -> Way {
        let way = self.opens.opened(ino, || {
            let made = self.passes.load(Ordering::Relaxed).then(make)?;
            made.map(Arc::new)
                .inspect_err(|e| {
                    // No privilege, or the wrong file system: it will not be better next time.
                    if self.passes.swap(false, Ordering::Relaxed) {
                        log::info!("files of ingest are read and written by this program: {e}");
                    }
                })
                .ok()
        });
        if way.is_some() {
            self.passed.fetch_add(1, Ordering::Relaxed);
        }
        way
    }

    /// A handle may have been written to: what is told of the file from now on is right.
    pub fn wrote(&self, ino: u64) {
        if self.opens.passes(ino) {
            self.forget_attributes(ino);
        }
    }

    /// A handle that was counted is closed.
    pub fn closed(&self, ino: u64) {
        self.opens.closed(ino);
    }
}
