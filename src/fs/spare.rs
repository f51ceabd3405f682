//! Threads for reads that would otherwise keep the last session thread from everything else.
//!
//! A read may wait for a disk or decompress, and a session has few threads. All but one of them
//! read by themselves, which costs no wake-up; what comes then is handed over. Each disk has a
//! queue and threads of its own for that, which begin when they are needed and end when they are
//! not. So a disk that does not answer keeps those who read from it, and not the last thread of the
//! session, nor those who read from another disk.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

/// Threads that read from one disk.
const THREADS_MAX: usize = 4;
/// Reads that may wait for them. Each is somebody who waits, so that only a disk that has stopped
/// comes to so many; what comes then is not done, which answers it with `EIO`.
const WAITING_MAX: usize = 4096;
/// How long a thread waits for something to do.
const IDLE: Duration = Duration::from_secs(10);

/// What a read waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Disk {
    /// A volume, by its number.
    Volume(i64),
    /// Several volumes, or one that is not known.
    Any,
    /// Where the writable tree lies.
    Ingest,
}

type Work = Box<dyn FnOnce() + Send>;

/// The threads, and who reads without one.
pub struct Spare {
    /// How many threads the session has.
    session: usize,
    /// How many of them are reading.
    reading: AtomicUsize,
    /// As many as there are volumes, and two.
    queues: Mutex<HashMap<Disk, Arc<Queue>>>,
}

/// The reads that wait for one disk.
#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Work>,
    threads: usize,
    idle: usize,
}

impl Spare {
    /// For a session of `session` threads.
    pub fn new(session: usize) -> Spare {
        Spare { session, reading: AtomicUsize::new(0), queues: Mutex::default() }
    }

    /// Does `work` here or elsewhere. It must not panic. `disk` tells what it waits for, and must
    /// not wait itself.
    pub fn read(&self, disk: impl FnOnce() -> Disk, work: impl FnOnce() + Send + 'static) {
        let before = self.reading.fetch_add(1, Ordering::Relaxed);
        if before + 1 < self.session {
            work();
            self.reading.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        self.reading.fetch_sub(1, Ordering::Relaxed);
        let disk = disk();
        let queue = self.queues.lock().entry(disk).or_default().clone();
        if !queue.put(Box::new(work)) {
            log::error!("too many reads wait for {disk:?}: does that disk answer?");
        }
    }
}

impl Queue {
    /// Has `work` done by a thread; `false` if it is not done.
    fn put(self: &Arc<Queue>, work: Work) -> bool {
        let mut state = self.state.lock();
        if state.waiting.len() >= WAITING_MAX {
            return false;
        }
        state.waiting.push_back(work);
        if state.waiting.len() > state.idle && state.threads < THREADS_MAX {
            let queue = self.clone();
            match std::thread::Builder::new().spawn(move || queue.work()) {
                Ok(_) => state.threads += 1,
                // Those that are there do it.
                Err(_) if state.threads > 0 => {}
                Err(_) => {
                    state.waiting.pop_back();
                    return false;
                }
            }
        }
        self.more.notify_one();
        true
    }

    /// Does what waits, until nothing has come for a while.
    fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(work) = state.waiting.pop_front() {
                MutexGuard::unlocked(&mut state, work);
                continue;
            }
            state.idle += 1;
            let is_over = self.more.wait_for(&mut state, IDLE).timed_out();
            state.idle -= 1;
            if is_over && state.waiting.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// A session of two threads, of which one reads and does not come back until told.
    fn held(spare: &Arc<Spare>) -> (mpsc::Sender<()>, std::thread::JoinHandle<()>) {
        let (go, wait) = mpsc::channel::<()>();
        let (said, heard) = mpsc::channel();
        let spare = spare.clone();
        let reader = std::thread::spawn(move || {
            let work = move || {
                said.send(()).unwrap();
                wait.recv().unwrap();
            };
            spare.read(|| panic!("it reads by itself"), work);
        });
        heard.recv().unwrap();
        (go, reader)
    }

    #[test]
    fn the_last_thread_of_a_session_is_not_kept_by_a_read() {
        let spare = Arc::new(Spare::new(2));
        let (go, first) = held(&spare);
        let (said, heard) = mpsc::channel();
        let here = std::thread::current().id();
        // This one's thread hands its read over and comes back at once.
        let work = move || {
            assert_ne!(std::thread::current().id(), here);
            said.send(()).unwrap();
        };
        spare.read(|| Disk::Volume(1), work);
        heard.recv().unwrap();
        go.send(()).unwrap();
        first.join().unwrap();
    }

    #[test]
    fn a_disk_that_does_not_answer_keeps_nobody_who_reads_from_another() {
        let spare = Arc::new(Spare::new(2));
        let (go, first) = held(&spare);
        let (freed, free) = crossbeam_channel::bounded::<()>(0);
        let done = Arc::new(AtomicUsize::new(0));
        let hang = || {
            let (free, done) = (free.clone(), done.clone());
            move || {
                let _ = free.recv();
                done.fetch_add(1, Ordering::SeqCst);
            }
        };
        // More than there is room for: what is too much is dropped.
        let most = THREADS_MAX + WAITING_MAX;
        for _ in 0..most + 100 {
            spare.read(|| Disk::Volume(1), hang());
        }
        let queue = spare.queues.lock().get(&Disk::Volume(1)).unwrap().clone();
        assert!(queue.state.lock().threads <= THREADS_MAX);
        for disk in [Disk::Volume(2), Disk::Any, Disk::Ingest] {
            let (said, heard) = mpsc::channel();
            spare.read(|| disk, move || said.send(()).unwrap());
            heard.recv().unwrap();
        }
        assert_eq!(done.load(Ordering::SeqCst), 0);
        // It answers after all: all that was taken is done.
        drop(freed);
        while !queue.state.lock().waiting.is_empty() {
            std::thread::yield_now();
        }
        while queue.state.lock().idle < THREADS_MAX {
            std::thread::yield_now();
        }
        let done = done.load(Ordering::SeqCst);
        assert!((WAITING_MAX..=most).contains(&done), "{done}");
        go.send(()).unwrap();
        first.join().unwrap();
    }
}
