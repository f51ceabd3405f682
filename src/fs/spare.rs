//! Threads for reads that would otherwise keep the last session thread from everything else.
//!
//! A read may wait for a disk or decompress, and a session has few threads. All but one of them
//! read by themselves, which costs no wake-up; what comes then is handed to a thread here. The
//! queue is bounded: when it is full, the session's thread reads after all.

use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

/// Threads that read.
const THREADS: usize = 4;
/// Reads that may wait for one.
const WAITING_MAX: usize = 1024;

type Work = Box<dyn FnOnce() + Send>;

/// The threads.
pub struct Spare {
    /// How many threads the session has.
    session: usize,
    /// How many of them are reading.
    reading: AtomicUsize,
    queue: Sender<Work>,
}

impl Spare {
    /// For a session of `session` threads.
    pub fn new(session: usize) -> Spare {
        let (queue, work) = bounded::<Work>(WAITING_MAX);
        for _ in 0..THREADS {
            let work: Receiver<Work> = work.clone();
            // They end with the queue.
            std::thread::spawn(move || work.into_iter().for_each(|it| it()));
        }
        Spare { session, reading: AtomicUsize::new(0), queue }
    }

    /// Does `work` here or elsewhere. It must not panic.
    pub fn read(&self, work: impl FnOnce() + Send + 'static) {
        let before = self.reading.fetch_add(1, Ordering::Relaxed);
        if before + 1 < self.session {
            work();
            self.reading.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        self.reading.fetch_sub(1, Ordering::Relaxed);
        match self.queue.try_send(Box::new(work)) {
            Ok(()) => {}
            Err(TrySendError::Full(work) | TrySendError::Disconnected(work)) => work(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, mpsc};

    #[test]
    fn the_last_thread_of_a_session_is_not_kept_by_a_read() {
        let spare = Arc::new(Spare::new(2));
        let (go, wait) = mpsc::channel::<()>();
        let (said, heard) = mpsc::channel();
        // The one that may read here, and does not come back.
        let first = {
            let spare = spare.clone();
            let said = said.clone();
            std::thread::spawn(move || {
                spare.read(move || {
                    said.send("first").unwrap();
                    wait.recv().unwrap();
                });
            })
        };
        assert_eq!(heard.recv().unwrap(), "first");
        let here = std::thread::current().id();
        // The other one's thread hands its read over and comes back at once.
        spare.read(move || {
            assert_ne!(std::thread::current().id(), here);
            said.send("second").unwrap();
        });
        assert_eq!(heard.recv().unwrap(), "second");
        go.send(()).unwrap();
        first.join().unwrap();
    }
}
