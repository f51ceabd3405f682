//! Repairs that are due: what readers find bad is noted beside the catalog, by a thread of its own.
//!
//! Who reads never waits for that. What cannot be noted is in the log all the same.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use parking_lot::Mutex;

use crate::catalog::health::Health;
use crate::error::Error;
use crate::sys::{Time, quoted};
use crate::volume::{BlockId, Faults, VolumeConfig, VolumeManifest};

/// Notes that wait for the thread at most; what is beyond that is only logged.
const WAITING_MAX: usize = 1024;
/// How long the end of a reader waits for its last notes.
const LAST_WITHIN: Duration = Duration::from_secs(1);

struct Note {
    volume: VolumeConfig,
    block: BlockId,
    reason: String,
}

/// The notes of one reader.
pub struct Due {
    catalog: PathBuf,
    /// Where notes go, and where the thread says that it has ended; none before the first note.
    thread: Mutex<Option<(SyncSender<Note>, Receiver<()>)>>,
}

impl Due {
    /// For readers of the catalog at `catalog`.
    pub fn new(catalog: &Path) -> Due {
        Due { catalog: catalog.to_path_buf(), thread: Mutex::new(None) }
    }

    /// What is told of bad copies.
    pub fn faults(self: &std::sync::Arc<Due>) -> Faults {
        let due = std::sync::Arc::downgrade(self);
        Faults::new(Box::new(move |volume, block, error| {
            log::warn!("{error}: noted for validate --repair");
            if let Some(due) = due.upgrade() {
                due.note(volume, block, error);
            }
        }))
    }

    fn note(&self, volume: &VolumeConfig, block: &BlockId, error: &Error) {
        let note = Note { volume: volume.clone(), block: *block, reason: error.to_string() };
        let mut thread = self.thread.lock();
        let (notes, _) = thread.get_or_insert_with(|| start(&self.catalog));
        if notes.try_send(note).is_err() {
            log::warn!("block {block} is not noted as bad: too many are");
        }
    }
}

impl Drop for Due {
    fn drop(&mut self) {
        if let Some((notes, ended)) = self.thread.lock().take() {
            drop(notes);
            // Either it has ended, or nobody waits any longer.
            let _ = ended.recv_timeout(LAST_WITHIN);
        }
    }
}

fn start(catalog: &Path) -> (SyncSender<Note>, Receiver<()>) {
    let (notes, take) = sync_channel::<Note>(WAITING_MAX);
    let (end, ended) = sync_channel(1);
    let catalog = catalog.to_path_buf();
    std::thread::spawn(move || {
        let health = Health::open(&catalog);
        for note in take {
            let Note { volume, block, reason } = note;
            // A volume that has gone as a whole has no bad blocks.
            match VolumeManifest::read(&volume.path) {
                Ok(it) if it.uuid == volume.uuid => {
                    health.note_bad(&volume.uuid, &block, &reason, Time::now());
                }
                _ => log::warn!("volume {} is not there any more", quoted(&volume.path)),
            }
        }
        let _ = end.send(());
    });
    (notes, ended)
}
