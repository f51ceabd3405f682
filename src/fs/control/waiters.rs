//! Those who wait: readers at the end of a log or of `status`, callers of `fsync`, and pollers.
//!
//! The kernel does not tell that a caller has been interrupted (fuser answers `FUSE_INTERRUPT` with
//! "not supported"), and then cannot even kill it. So one thread looks, some times a second,
//! whether a signal waits for any of those who wait, and answers `EINTR`. No thread but that one
//! waits, and the number of those who wait is bounded.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::super::disks::Disks;
use super::super::errno::{Errno, FsResult};
use super::access::{Shares, Who};
use crate::job::{Bell, Known};
use crate::sys::{c, process};

/// Callers that may wait at a time; one more is told to come again.
const SHARES: Shares = Shares { all: 256, others: 192, each: 64 };
/// How often it is looked whether they have been interrupted.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long somebody waits at most who cannot be looked at. Most programs try again.
const UNSEEN_FOR: Duration = Duration::from_secs(3);
/// How often a poller is woken at most, and at least while a job runs.
const POLL_PAUSE: Duration = Duration::from_millis(200);
const POLL_EVERY: Duration = Duration::from_secs(1);

/// An answer that may come later.
pub type Reply = Box<dyn FnOnce(FsResult<Vec<u8>>) + Send>;
/// What wakes a poller.
pub type Wake = Box<dyn FnOnce() + Send>;

/// What somebody waits for.
pub enum What {
    /// The end of all these jobs, of which another one may have failed already.
    End(Vec<Known>, bool),
    /// More of a log, from this offset on, so many bytes at most.
    Log(Known, u64, usize),
    /// What the volumes' disks say, as far as they say something soon.
    Disks(Arc<Disks>),
}

impl What {
    /// The answer, if there is one already.
    pub fn answer(&self) -> Option<FsResult<Vec<u8>>> {
        match self {
            What::Disks(disks) => disks.are_seen().then_some(Ok(Vec::new())),
            What::End(jobs, _) if !jobs.iter().all(Known::has_ended) => None,
            What::End(jobs, failed) => Some(match !failed && jobs.iter().all(Known::is_done) {
                true => Ok(Vec::new()),
                false => Err(Errno(c::EIO)),
            }),
            What::Log(job, offset, size) => {
                // In this order, or the last lines could be missed.
                let has_ended = job.has_ended();
                let text = job.read_log(*offset, *size);
                (has_ended || !text.is_empty()).then_some(Ok(text))
            }
        }
    }
}

struct Waiter {
    what: What,
    who: Who,
    since: Instant,
    reply: Reply,
}

/// What a poller looks at, and what has been read of it.
#[derive(Clone)]
pub enum Watch {
    /// `progress.json`.
    Progress(Known, Arc<Seen>),
    /// `log`, and how much of it has been read.
    Log(Known, u64),
}

/// What was last read of a job's progress.
#[derive(Default)]
pub struct Seen(Mutex<Option<(Instant, String)>>);

impl Seen {
    /// Notes what is read now.
    pub fn note(&self, text: &str) {
        *self.0.lock() = Some((Instant::now(), text.to_owned()));
    }

    fn is_old(&self, job: &Known) -> bool {
        let seen = self.0.lock();
        let Some((when, text)) = &*seen else { return true };
        if job.has_ended() {
            return true;
        }
        let age = when.elapsed();
        let is_running = || job.progress_json().get("state").is_some_and(|it| it == "running");
        age >= POLL_EVERY && is_running() || age >= POLL_PAUSE && *text != progress_text(job)
    }
}

/// What `progress.json` has.
pub fn progress_text(job: &Known) -> String {
    format!("{}\n", job.progress_json())
}

impl Watch {
    /// Whether there is something to read.
    pub fn is_ready(&self) -> bool {
        match self {
            Watch::Progress(job, seen) => seen.is_old(job),
            Watch::Log(job, read) => job.has_ended() || job.log_len() > *read,
        }
    }
}

/// Everybody who waits.
pub struct Waiters {
    bell: Arc<Bell>,
    parked: Mutex<Parked>,
}

#[derive(Default)]
struct Parked {
    waiters: Vec<Waiter>,
    polls: Vec<(u64, Watch, Wake)>,
    closed: bool,
}

impl Waiters {
    /// Nobody yet.
    pub fn new(bell: Arc<Bell>) -> Waiters {
        Waiters { bell, parked: Mutex::default() }
    }

    /// Answers as soon as there is an answer.
    pub fn wait(&self, what: What, who: &Who, reply: Reply) {
        if let Some(answer) = what.answer() {
            return reply(answer);
        }
        let mut parked = self.parked.lock();
        let uids = parked.waiters.iter().map(|it| it.who.uid);
        if parked.closed || !SHARES.admit(who.uid, uids) {
            drop(parked);
            return reply(Err(Errno(c::EAGAIN)));
        }
        parked.waiters.push(Waiter { what, who: *who, since: Instant::now(), reply });
        drop(parked);
        self.bell.ring();
    }

    /// Wakes a poller as soon as there is something to read. One for each open file.
    pub fn poll(&self, handle: u64, watch: Watch, wake: Wake) {
        let mut parked = self.parked.lock();
        parked.polls.retain(|it| it.0 != handle);
        parked.polls.push((handle, watch, wake));
        drop(parked);
        self.bell.ring();
    }

    /// An open file is closed: nobody polls it any more.
    pub fn forget(&self, handle: u64) {
        self.parked.lock().polls.retain(|it| it.0 != handle);
    }

    /// Lets everybody go, and ends [`Waiters::work`].
    pub fn close(&self) {
        self.parked.lock().closed = true;
        self.bell.ring();
    }

    /// Looks after those who wait until [`Waiters::close`]. For a thread of its own.
    pub fn work(&self) {
        let (mut heard, mut looked) = (self.bell.count(), Instant::now());
        loop {
            let (is_idle, is_over) = {
                let parked = self.parked.lock();
                (parked.waiters.is_empty() && parked.polls.is_empty(), parked.closed)
            };
            if !is_over {
                heard = self.bell.wait(heard, (!is_idle).then_some(LOOK_EVERY));
            }
            let is_due = looked.elapsed() >= LOOK_EVERY;
            if is_due {
                looked = Instant::now();
            }
            self.answer_all(is_due);
            if is_over {
                let left = std::mem::take(&mut self.parked.lock().waiters);
                left.into_iter().for_each(|it| (it.reply)(Err(Errno(c::EINTR))));
                return;
            }
        }
    }

    fn answer_all(&self, look: bool) {
        let mut ready: Vec<Box<dyn FnOnce()>> = Vec::new();
        {
            let mut parked = self.parked.lock();
            let mut left = Vec::new();
            for waiter in std::mem::take(&mut parked.waiters) {
                let interrupted = || look && waiter.is_interrupted();
                let answer = waiter.what.answer();
                match answer.or_else(|| interrupted().then_some(Err(Errno(c::EINTR)))) {
                    Some(answer) => ready.push(Box::new(move || (waiter.reply)(answer))),
                    None => left.push(waiter),
                }
            }
            parked.waiters = left;
            let mut left = Vec::new();
            for (handle, watch, wake) in std::mem::take(&mut parked.polls) {
                match watch.is_ready() {
                    true => ready.push(wake),
                    false => left.push((handle, watch, wake)),
                }
            }
            parked.polls = left;
        }
        // Not while anything is held: an answer is a write to the kernel.
        for answer in ready {
            // One that panics is not sent, which the kernel takes for `EIO`; others still are.
            if catch_unwind(AssertUnwindSafe(answer)).is_err() {
                log::error!("an answer has panicked: this is a bug, please report it");
            }
        }
    }
}

impl Waiter {
    fn is_interrupted(&self) -> bool {
        match process::status(self.who.pid) {
            Ok(status) if self.who.pid != 0 => status.has_signal,
            _ => self.since.elapsed() >= UNSEEN_FOR,
        }
    }
}
