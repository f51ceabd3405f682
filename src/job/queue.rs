//! The queue of a mount: jobs come, get durable numbers, are done one by one, and are kept.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use parking_lot::{Condvar, Mutex};

use super::{Bell, Job, Known, Outcome, Prepare, Request, Site, State, Verb, work};
use crate::catalog::jobs::{Access, Asked, JobId, JobStore};
use crate::error::{Error, ErrorKind, Result};

/// Jobs that wait at most; one more is refused.
pub const WAITING_MAX: usize = 16;
/// Ended jobs that are remembered beside the file that keeps them.
const ENDED_MAX: usize = 8;
/// Those that could not be kept.
const UNKEPT_MAX: usize = 100;
/// Why jobs end with their mount.
const MOUNT_ENDED: &str = "the mount ended";

/// How many jobs there are, by where they stand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tallies {
    /// Waiting.
    pub queued: usize,
    /// Being done.
    pub running: usize,
    /// Ended, and still remembered.
    pub finished: usize,
}

/// The jobs of a mount.
pub struct Queue {
    catalog: PathBuf,
    site: Site,
    prepare: OnceLock<Prepare>,
    /// The exit code table of the command line, so that there is one.
    exit_code: fn(&Outcome) -> u8,
    store: JobStore,
    bell: Arc<Bell>,
    /// Held while jobs are taken, so that numbers come in order.
    taking: Mutex<()>,
    jobs: Mutex<Jobs>,
    came: Condvar,
}

#[derive(Default)]
struct Jobs {
    here: VecDeque<Arc<Job>>,
    closed: bool,
}

impl Queue {
    /// A queue that works on the catalog at `catalog`.
    pub fn open(catalog: &Path, site: Site, exit_code: fn(&Outcome) -> u8) -> Result<Queue> {
        Ok(Queue {
            catalog: catalog.to_path_buf(),
            site,
            prepare: OnceLock::new(),
            exit_code,
            store: JobStore::open(catalog)?,
            bell: Arc::default(),
            taking: Mutex::default(),
            jobs: Mutex::default(),
            came: Condvar::new(),
        })
    }

    /// What the words of a line mean here.
    pub fn site(&self) -> &Site {
        &self.site
    }

    /// Gives the queue the means to clear what has been put into the mount; only once.
    pub fn clear_with(&self, prepare: Prepare) {
        let _ = self.prepare.set(prepare);
    }

    /// Rings whenever a job has something new to tell.
    pub fn bell(&self) -> &Arc<Bell> {
        &self.bell
    }

    /// Takes jobs for a user, all or none: too many is [`ErrorKind::Locked`].
    pub fn submit(
        &self,
        verb: Verb,
        uid: u32,
        asked: Vec<(Vec<u8>, Request)>,
    ) -> Result<Vec<Arc<Job>>> {
        let _taking = self.taking.lock();
        let waiting = {
            let jobs = self.jobs.lock();
            if jobs.closed {
                return Err(Error::new(ErrorKind::Locked, "the mount is ending"));
            }
            jobs.here.iter().filter(|job| job.state() == State::Queued).count()
        };
        if waiting + asked.len() > WAITING_MAX {
            let message = format!("{waiting} jobs are waiting, and {WAITING_MAX} may");
            return Err(Error::new(ErrorKind::Locked, message));
        }
        let rows = asked.iter().map(|it| Asked { verb: verb.as_str(), line: &it.0, uid });
        let ids = self.store.ask(&rows.collect::<Vec<_>>())?;
        let mut taken = Vec::new();
        for (id, (line, request)) in ids.into_iter().zip(asked) {
            taken.push(Arc::new(Job::new(id, verb, (line, uid), request, self.bell.clone())));
        }
        let mut jobs = self.jobs.lock();
        jobs.here.extend(taken.iter().cloned());
        let is_closed = jobs.closed;
        drop(jobs);
        if is_closed {
            taken.iter().for_each(|job| self.cancel_job(job, MOUNT_ENDED));
        }
        self.came.notify_all();
        self.bell.ring();
        Ok(taken)
    }

    /// The job with this number, if it is known.
    pub fn get(&self, id: JobId) -> Result<Option<Known>> {
        let here = self.jobs.lock().here.iter().find(|job| job.id == id).cloned();
        if let Some(job) = here {
            return Ok(Some(Known::Here(job)));
        }
        Ok(self.store.get(id)?.map(|it| Known::Kept(Arc::new(it))))
    }

    /// The newest job of a verb.
    pub fn last(&self, verb: Verb) -> Result<Option<Known>> {
        let here = self.jobs.lock().here.iter().rev().find(|job| job.verb == verb).cloned();
        if let Some(job) = here {
            return Ok(Some(Known::Here(job)));
        }
        match self.store.last(verb.as_str())? {
            Some(id) => self.get(id),
            None => Ok(None),
        }
    }

    /// The numbers of all known jobs, oldest first.
    pub fn ids(&self) -> Result<Vec<JobId>> {
        let mut ids = self.store.ids()?;
        ids.extend(self.jobs.lock().here.iter().map(|job| job.id));
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// How many jobs there are.
    pub fn tallies(&self) -> Result<Tallies> {
        let known = self.ids()?.len();
        let mut tallies = Tallies::default();
        for job in &self.jobs.lock().here {
            match job.state() {
                State::Queued => tallies.queued += 1,
                State::Running | State::Waiting => tallies.running += 1,
                _ => {}
            }
        }
        tallies.finished = known.saturating_sub(tallies.queued + tallies.running);
        Ok(tallies)
    }

    /// Asks a job to stop; one that has ended stays as it is.
    pub fn cancel(&self, id: JobId) {
        let here = self.jobs.lock().here.iter().find(|job| job.id == id).cloned();
        if let Some(job) = here {
            self.cancel_job(&job, "cancelled");
        }
    }

    fn cancel_job(&self, job: &Job, reason: &'static str) {
        if job.cancel(reason) {
            self.keep(job);
        }
        self.bell.ring();
    }

    /// Does jobs until [`Queue::close`]. For a thread of its own.
    pub fn work(&self) {
        while let Some(job) = self.next() {
            if !job.begin() {
                continue;
            }
            self.bell.ring();
            let outcome = work::run(&self.catalog, &self.site, self.prepare.get(), &job);
            job.end(&outcome, (self.exit_code)(&outcome));
            self.keep(&job);
            self.bell.ring();
        }
    }

    /// Keeps the end of a job, and forgets here what is kept.
    fn keep(&self, job: &Job) {
        let status = job.progress_json().to_string();
        let state = job.state().as_str();
        match self.store.end(job.id, state, &status, &job.shared.log.kept()) {
            Ok(()) => job.shared.status.lock().is_kept = true,
            Err(e) => log::warn!("the end of job {} is not kept: {e}", job.id),
        }
        log::info!("job {}: {state}", job.id);
        let mut jobs = self.jobs.lock();
        for max in [ENDED_MAX, UNKEPT_MAX] {
            let is_over = |job: &Arc<Job>| {
                let status = job.shared.status.lock();
                status.state.has_ended() && (status.is_kept || max == UNKEPT_MAX)
            };
            while jobs.here.iter().filter(|it| is_over(it)).count() > max
                && let Some(at) = jobs.here.iter().position(is_over)
            {
                jobs.here.remove(at);
            }
        }
    }

    fn next(&self) -> Option<Arc<Job>> {
        let mut jobs = self.jobs.lock();
        loop {
            if jobs.closed {
                return None;
            }
            if let Some(job) = jobs.here.iter().find(|job| job.state() == State::Queued) {
                return Some(job.clone());
            }
            self.came.wait(&mut jobs);
        }
    }

    /// Cancels all jobs and ends [`Queue::work`].
    pub fn close(&self) {
        let here = {
            let mut jobs = self.jobs.lock();
            jobs.closed = true;
            jobs.here.clone()
        };
        here.iter().filter(|job| !job.state().has_ended()).for_each(|job| {
            self.cancel_job(job, MOUNT_ENDED);
        });
        self.came.notify_all();
    }

    /// How the access to control files has been changed.
    pub fn access(&self) -> Result<Vec<(String, Access)>> {
        self.store.access()
    }

    /// Keeps how the access to a control file is changed.
    pub fn set_access(&self, name: &str, access: Access) -> Result<()> {
        self.store.set_access(name, access)
    }
}
