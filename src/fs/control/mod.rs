//! Control files: a file for each verb, `status`, `version`, and `jobs/<id>/…`.
//!
//! A line written to a verb's file is the argument line of the command of that name. It is taken
//! or refused where it ends, all lines of a write or none: at the write that has its newline, or
//! where its writer closes, syncs or reads the file. The same open file then tells what came of
//! it, and `fsync` on it waits for the job; another one tells what came last. Contents are made
//! when they are read: a file has no size of its own. Nothing here waits for a job, see `waiters`.

mod access;
mod handles;
mod lines;
mod status;
mod waiters;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;

use super::disks::Disks;
use super::errno::{Errno, FsResult};
use super::ingest::SetAttr;
use super::node::{JOB_FILES, JobFile, Node};
use super::own_dir;
use super::tree::{Add, Tree};
use crate::error::{Error, Quoted};
use crate::job::grammar::{self, LINE_BYTES_MAX};
use crate::job::{Job, JobId, Known, Queue, VERBS, Verb};
use crate::snapshot::Snapshots;
use crate::sys::{Stat, Time, c, process};

pub use access::Who;
pub use status::Manner;
pub use waiters::{Reply, Waiters, Wake};

use access::{File, Guard, Rights};
use handles::{Handle, Handles, SharedAsked};
use lines::Bad;
use waiters::{Seen, Watch, What, progress_text};

/// Jobs of one open file after which it is looked which of them have ended.
const ASKED_MAX: usize = 32;
/// Users of a verb whose last jobs are remembered, for all verbs together.
const ASKING_MAX: usize = 256;
/// Most of a refused line that the log of the mount shows, in bytes.
const SHOWN_BYTES_MAX: usize = 200;

/// The control files of a mount.
pub struct Control {
    queue: Arc<Queue>,
    snapshots: Arc<Snapshots>,
    disks: Arc<Disks>,
    waiters: Arc<Waiters>,
    guard: Guard,
    manner: Manner,
    started: Time,
    handles: Mutex<Handles>,
    /// What came last of each verb's file.
    last: Mutex<HashMap<Verb, Answer>>,
    /// What each user has asked for last by each verb's file.
    asked: Mutex<HashMap<(Verb, u32), SharedAsked>>,
}

/// What came of a line.
#[derive(Clone)]
enum Answer {
    Taken(Vec<JobId>),
    Refused(Errno, String),
}

/// The name of an error number that a writer may get.
fn name_of(errno: Errno) -> String {
    match errno.0 {
        c::EINVAL => "EINVAL".to_owned(),
        c::EBUSY => "EBUSY".to_owned(),
        c::E2BIG => "E2BIG".to_owned(),
        c::EACCES => "EACCES".to_owned(),
        c::ENOSPC => "ENOSPC".to_owned(),
        other => format!("error {other}"),
    }
}

impl Control {
    /// Control files over a queue, for a mount of `tree`.
    pub fn new(
        queue: Arc<Queue>,
        snapshots: Arc<Snapshots>,
        waiters: Arc<Waiters>,
        tree: &Tree,
        manner: Manner,
    ) -> Control {
        tree.disks().ring(queue.bell());
        Control {
            guard: Guard::new(tree.owners(), &queue),
            queue,
            snapshots,
            disks: tree.disks().clone(),
            waiters,
            manner,
            started: Time::now(),
            handles: Mutex::default(),
            last: Mutex::default(),
            asked: Mutex::default(),
        }
    }

    /// Attributes of a control file or a directory of control files.
    pub fn stat(&self, tree: &Tree, node: Node) -> FsResult<Stat> {
        match node {
            Node::Ctl | Node::Jobs => tree.own_dir(node),
            Node::Job(id) => self.job(id).and_then(|_| tree.own_dir(node)),
            _ => {
                let rights = self.rights(node)?;
                let stat = tree.own(node, c::S_IFREG | rights.mode)?;
                Ok(Stat { uid: rights.uid, gid: rights.gid, ..stat })
            }
        }
    }

    fn rights(&self, node: Node) -> FsResult<Rights> {
        if let Some(file) = file_of(node) {
            return Ok(self.guard.of(file));
        }
        let Node::JobFile(id, file, _) = node else { return Err(Errno(c::ENOENT)) };
        let rights = self.guard.of_verb(self.job(id)?.verb());
        Ok(match file {
            JobFile::Cancel => rights.to_cancel(),
            _ => rights.to_watch(),
        })
    }

    /// What a directory of control files holds: a key, a name and the node. Of jobs those after the
    /// one with the number `after`.
    fn entries(&self, dir: Node, after: u64) -> FsResult<Vec<(u64, String, Node)>> {
        let fixed = match dir {
            Node::Ctl => {
                let mut names = vec![
                    ("jobs", Node::Jobs),
                    ("status", Node::CtlStatus),
                    ("version", Node::CtlVersion),
                ];
                names.extend(VERBS.map(|it| (it.as_str(), Node::Verb(it, 0))));
                names
            }
            Node::Jobs => {
                let ids = self.queue.ids().map_err(|e| failed(&e))?.into_iter();
                let ids = ids.filter(|it| *it > after);
                return Ok(ids.map(|id| (id, id.to_string(), Node::Job(id))).collect());
            }
            Node::Job(id) => JOB_FILES.map(|it| (it.1, Node::JobFile(id, it.0, 0))).to_vec(),
            _ => return Err(Errno(c::ENOTDIR)),
        };
        let keyed = (1..).zip(fixed).map(|(key, (name, node))| (key, name.to_owned(), node));
        Ok(keyed.collect())
    }

    /// Gives out a directory of control files from `offset` on until `add` says that it is full.
    pub fn read_dir(&self, tree: &Tree, dir: Node, offset: u64, add: Add<'_>) -> FsResult<()> {
        let entries = self.entries(dir, own_dir::key_before(offset))?;
        let items = entries.into_iter().map(|(key, name, node)| {
            let stat = match node {
                // It was there just now.
                Node::Job(_) => tree.own_dir(node)?,
                node => self.stat(tree, self.handles.lock().free(node))?,
            };
            Ok((key, name, stat))
        });
        own_dir::give_out(dir, items, offset, add)
    }

    /// Looks a name up.
    pub fn lookup(&self, tree: &Tree, dir: Node, name: &OsStr) -> FsResult<Stat> {
        let node = match dir {
            Node::Jobs => {
                let id: JobId = name.to_str().and_then(|it| it.parse().ok()).unwrap_or_default();
                // One name a job.
                Some(Node::Job(id)).filter(|_| id.to_string().as_str() == name)
            }
            dir => self.entries(dir, 0)?.into_iter().find(|it| *it.1 == *name).map(|it| it.2),
        };
        let node = self.handles.lock().free(node.ok_or(Errno(c::ENOENT))?);
        self.stat(tree, node)
    }

    fn job(&self, id: JobId) -> FsResult<Known> {
        self.queue.get(id).map_err(|e| failed(&e))?.ok_or(Errno(c::ENOENT))
    }

    /// Changes attributes, as far as whoever asks may. Times and sizes are not kept.
    pub fn setattr(&self, node: Node, who: &Who, change: &SetAttr) -> FsResult<()> {
        if change.mode.is_some() || change.uid.is_some() || change.gid.is_some() {
            let file = file_of(node).ok_or(Errno(c::EPERM))?;
            return self.guard.change(&self.queue, file, who, change);
        }
        match change.size.is_some() {
            // `echo line > file` truncates first.
            true => self.rights(node)?.check(who, 2),
            false => Ok(()),
        }
    }

    /// Opens a control file.
    pub fn open(&self, node: Node, flags: i32, who: &Who) -> FsResult<u64> {
        let (reads, writes) = match flags & c::O_ACCMODE {
            c::O_RDONLY => (4, 0),
            c::O_WRONLY => (0, 2),
            _ => (4, 2),
        };
        let is_cancel = matches!(node, Node::JobFile(_, JobFile::Cancel, _));
        if writes != 0 && !is_cancel && !matches!(node, Node::Verb(..)) || reads != 0 && is_cancel {
            return Err(Errno(c::EACCES));
        }
        self.rights(node)?.check(who, reads | writes)?;
        if process::is_own(who.pid) {
            // A job of this mount that read its own log would wait for itself.
            return Err(Errno(c::EDEADLK));
        }
        self.handles.lock().open(node, who)
    }

    /// Closes a control file. What was begun on it has ended with the last flush.
    pub fn release(&self, handle: u64) {
        self.handles.lock().close(handle);
        self.waiters.forget(handle);
    }

    /// Takes what process `owner` writes.
    pub fn write(
        &self,
        node: Node,
        handle: u64,
        (who, owner): (&Who, u64),
        data: &[u8],
    ) -> FsResult<()> {
        // Whoever was given an open file by somebody who may is still nobody who may.
        self.rights(node)?.check(who, 2)?;
        let verb = match node {
            Node::JobFile(id, JobFile::Cancel, _) => {
                log::info!("job {id} is cancelled by user {}", who.uid);
                self.queue.cancel(id);
                return Ok(());
            }
            Node::Verb(verb, _) => verb,
            _ => return Err(Errno(c::EACCES)),
        };
        let lines = self.with_handle(handle, |it| it.lines.take(owner, data))?;
        let result = lines.map_err(refusal).and_then(|lines| self.submit(verb, who.uid, lines));
        if let Err((errno, _)) = &result
            && *errno != Errno(c::E2BIG)
        {
            self.with_handle(handle, |it| it.lines.refuse(owner, data, Bad::Malformed))?;
        }
        self.settle(verb, handle, who, data, result)
    }

    /// Asks for the jobs of some lines: all or none.
    fn submit(
        &self,
        verb: Verb,
        uid: u32,
        lines: Vec<Vec<u8>>,
    ) -> Result<Vec<Arc<Job>>, (Errno, String)> {
        let (count, mut asked) = (lines.len(), Vec::new());
        for (number, line) in (1..).zip(lines) {
            let line = line.trim_ascii().to_vec();
            let request = grammar::parse(verb, &line, self.queue.site()).map_err(|e| {
                let why = match count {
                    1 => e.to_string(),
                    _ => format!("line {number}: {e}; no line was taken"),
                };
                (Errno::from(&e), why)
            })?;
            asked.push((line, request));
        }
        if asked.is_empty() {
            return Ok(Vec::new());
        }
        let taken = self.queue.submit(verb, uid, asked);
        taken.map_err(|e| (Errno::from(&e), e.to_string()))
    }

    /// Keeps what came of a line, for whoever reads, and answers.
    fn settle(
        &self,
        verb: Verb,
        handle: u64,
        who: &Who,
        data: &[u8],
        result: Result<Vec<Arc<Job>>, (Errno, String)>,
    ) -> FsResult<()> {
        let answer = match result {
            Ok(jobs) if jobs.is_empty() => return Ok(()),
            Ok(jobs) => {
                for job in &jobs {
                    let (uid, pid, line) = (who.uid, who.pid, Quoted(&job.line));
                    log::info!(
                        "job {} for user {uid} (pid {pid}): {} {line}",
                        job.id,
                        verb.as_str()
                    );
                }
                Answer::Taken(jobs.iter().map(|it| it.id).collect())
            }
            Err((errno, why)) => {
                let shown = data.get(..SHOWN_BYTES_MAX).unwrap_or(data).trim_ascii();
                let (verb, name) = (verb.as_str(), name_of(errno));
                let user = who.uid;
                log::warn!("{verb}: refused {name} for user {user}: '{}': {why}", Quoted(shown));
                Answer::Refused(errno, why)
            }
        };
        self.last.lock().insert(verb, answer.clone());
        // A handle that is closed meanwhile needs no answer.
        let _ = self.with_handle(handle, |it| {
            it.text = None;
            it.answer = Some(answer.clone());
        });
        match answer {
            Answer::Refused(errno, _) => Err(errno),
            Answer::Taken(jobs) => {
                self.note_asked((verb, who.uid), handle, &jobs);
                Ok(())
            }
        }
    }

    /// Notes jobs for whoever syncs: this handle, or another one of the same user.
    fn note_asked(&self, (verb, uid): (Verb, u32), handle: u64, jobs: &[JobId]) {
        // Where it is closed meanwhile, nobody syncs it.
        let Ok(now) = self.with_handle(handle, |it| Arc::clone(&it.asked)) else { return };
        let before = now.lock().jobs.clone();
        let mut ended = Vec::new();
        if before.len() > ASKED_MAX {
            let known = before.into_iter().filter_map(|id| self.queue.get(id).ok()?);
            let known = known.filter(Known::has_ended).map(|it| (it.id(), it.is_done()));
            ended.extend(known);
        }
        {
            let mut now = now.lock();
            ended.iter().for_each(|(id, is_done)| now.settle(*id, *is_done));
            now.add(jobs);
        }
        let mut asked = self.asked.lock();
        asked.insert((verb, uid), now);
        let oldest = asked.iter().min_by_key(|it| it.1.lock().jobs.last().copied());
        let oldest = oldest.map(|it| *it.0);
        if let Some(oldest) = oldest.filter(|_| asked.len() > ASKING_MAX) {
            asked.remove(&oldest);
        }
    }

    fn with_handle<T>(&self, handle: u64, work: impl FnOnce(&mut Handle) -> T) -> FsResult<T> {
        self.handles.lock().get(handle).map(work)
    }

    fn text_of(&self, answer: &Answer) -> String {
        match answer {
            Answer::Taken(jobs) => {
                let jobs = jobs.iter().filter_map(|id| self.queue.get(*id).ok()?);
                jobs.map(|it| it.status_text()).collect::<Vec<_>>().join("\n")
            }
            Answer::Refused(errno, why) => format!("refused {}: {why}\n", name_of(*errno)),
        }
    }

    /// Ends the lines that have been begun: those of one process, or of all.
    fn end_lines(&self, node: Node, handle: u64, who: &Who, owner: Option<u64>) -> FsResult<()> {
        let Node::Verb(verb, _) = node else { return Ok(()) };
        let lines = self.with_handle(handle, |it| match owner {
            Some(owner) => it.lines.end(owner).into_iter().collect(),
            None => it.lines.end_all(),
        })?;
        if lines.is_empty() {
            return Ok(());
        }
        let data = lines.join(&b'\n');
        let result = match self.guard.of(File::Verb(verb)).check(who, 2) {
            Ok(()) => self.submit(verb, who.uid, lines),
            Err(errno) => Err((errno, "it may not write here any more".to_owned())),
        };
        self.settle(verb, handle, who, &data, result)
    }

    /// A process closes one of its descriptors of an open file: its line ends here.
    pub fn flush(&self, node: Node, handle: u64, (who, owner): (&Who, u64)) -> FsResult<()> {
        self.end_lines(node, handle, who, Some(owner))
    }

    /// Reads at most `size` bytes from `offset`, and answers at once or later.
    pub fn read(
        self: &Arc<Control>,
        node: Node,
        handle: u64,
        who: &Who,
        (offset, size): (u64, usize),
        may_wait: bool,
        reply: Reply,
    ) {
        if node == Node::CtlStatus && offset == 0 && may_wait {
            if let Err(e) = self.disks.begin(&self.snapshots) {
                log::warn!("status: {e}");
            }
            let (control, asker) = (self.clone(), *who);
            let answer = move |_| reply(control.read_now(node, handle, &asker, offset, size));
            let what = What::Disks(self.disks.clone());
            return self.waiters.wait(what, who, Box::new(answer));
        }
        let Node::JobFile(id, JobFile::Log, _) = node else {
            return reply(self.read_now(node, handle, who, offset, size));
        };
        let what = match self.job(id) {
            Ok(job) => What::Log(job, offset, size),
            Err(errno) => return reply(Err(errno)),
        };
        if what.answer().is_none() && !may_wait {
            return reply(Err(Errno(c::EAGAIN)));
        }
        let read = match self.with_handle(handle, |it| it.log_read.clone()) {
            Ok(read) => read,
            Err(errno) => return reply(Err(errno)),
        };
        let note = move |result: FsResult<Vec<u8>>| {
            if let Ok(text) = &result {
                read.fetch_max(offset.saturating_add(text.len() as u64), Ordering::Relaxed);
            }
            reply(result);
        };
        self.waiters.wait(what, who, Box::new(note));
    }

    fn read_now(
        &self,
        node: Node,
        handle: u64,
        who: &Who,
        offset: u64,
        size: usize,
    ) -> FsResult<Vec<u8>> {
        // Why a line was refused is what the reader gets to know.
        let _ = self.end_lines(node, handle, who, None);
        let (answer, text, seen) = self.with_handle(handle, |it| {
            (it.answer.clone(), it.text.clone().filter(|_| offset > 0), it.seen.clone())
        })?;
        let text = match text {
            Some(text) => text,
            None => {
                let text = self.text(node, answer, &seen)?.into_bytes();
                let text = Arc::new(text);
                self.with_handle(handle, |it| it.text = Some(text.clone()))?;
                text
            }
        };
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
        let to = from.saturating_add(size).min(text.len());
        Ok(text.get(from..to).unwrap_or_default().to_vec())
    }

    fn text(&self, node: Node, answer: Option<Answer>, seen: &Seen) -> FsResult<String> {
        Ok(match node {
            Node::Verb(verb, _) => match answer.or_else(|| self.last.lock().get(&verb).cloned()) {
                Some(answer) => self.text_of(&answer),
                None => match self.queue.last(verb).map_err(|e| failed(&e))? {
                    Some(job) => job.status_text(),
                    None => format!("no job yet: write {}\n", verb.usage()),
                },
            },
            Node::CtlStatus => self.status(),
            Node::CtlVersion => concat!("raidtape ", env!("CARGO_PKG_VERSION"), "\n").to_owned(),
            Node::JobFile(id, JobFile::Status, _) => self.job(id)?.status_text(),
            Node::JobFile(id, JobFile::Progress, _) => {
                let text = progress_text(&self.job(id)?);
                seen.note(&text);
                text
            }
            // Any bytes, so the text of a line that is no text is shown as it is quoted elsewhere.
            Node::JobFile(id, JobFile::Command, _) => {
                let command = self.job(id)?.command();
                match String::from_utf8(command) {
                    Ok(text) => text,
                    Err(e) => format!("{}\n", Quoted(e.as_bytes().trim_ascii_end())),
                }
            }
            _ => return Err(Errno(c::EACCES)),
        })
    }

    /// Waits for the jobs that were asked for through this handle, or else for those that the user
    /// has asked for last by this file, so that `sync FILE` waits too.
    pub fn fsync(&self, node: Node, handle: u64, who: &Who, reply: Reply) {
        let jobs = match node {
            Node::Verb(verb, _) => self.asked_by(verb, node, handle, who),
            Node::JobFile(id, JobFile::Status, _) => self.job(id).map(|it| (vec![it], false)),
            _ => Ok((Vec::new(), false)),
        };
        match jobs {
            Ok((jobs, has_failed)) => self.waiters.wait(What::End(jobs, has_failed), who, reply),
            Err(errno) => reply(Err(errno)),
        }
    }

    /// The jobs to be waited for, and whether one of them has failed already.
    fn asked_by(
        &self,
        verb: Verb,
        node: Node,
        handle: u64,
        who: &Who,
    ) -> FsResult<(Vec<Known>, bool)> {
        self.end_lines(node, handle, who, None)?;
        let own = self.with_handle(handle, |it| match it.answer {
            Some(Answer::Refused(errno, _)) => Err(errno),
            Some(Answer::Taken(_)) => Ok(Some(it.asked.lock().tell())),
            None => Ok(None),
        })??;
        let last = || self.asked.lock().get(&(verb, who.uid)).map(|it| it.lock().tell());
        let asked = own.or_else(last).unwrap_or_default();
        // One that is not kept any more has ended long ago, well or not.
        let jobs = asked.jobs.iter().filter_map(|id| self.queue.get(*id).transpose());
        let jobs = jobs.collect::<Result<_, _>>().map_err(|e| failed(&e))?;
        Ok((jobs, asked.has_failed))
    }

    /// Whether there is something to read that was not read through this handle. If there is not,
    /// `wake` is called once when there is.
    pub fn poll(&self, node: Node, handle: u64, wake: Option<Wake>) -> FsResult<bool> {
        let watch = match node {
            Node::JobFile(id, JobFile::Progress, _) => {
                let seen = self.with_handle(handle, |it| it.seen.clone())?;
                Watch::Progress(self.job(id)?, seen)
            }
            Node::JobFile(id, JobFile::Log, _) => {
                let read = self.with_handle(handle, |it| it.log_read.load(Ordering::Relaxed))?;
                Watch::Log(self.job(id)?, read)
            }
            _ => return Ok(true),
        };
        let is_ready = watch.is_ready();
        if let Some(wake) = wake.filter(|_| !is_ready) {
            self.waiters.poll(handle, watch, wake);
        }
        Ok(is_ready)
    }
}

/// The file whose rights can be changed, if a node is one.
fn file_of(node: Node) -> Option<File> {
    match node {
        Node::Verb(verb, _) => Some(File::Verb(verb)),
        Node::CtlStatus => Some(File::Status),
        Node::CtlVersion => Some(File::Version),
        _ => None,
    }
}

fn failed(error: &Error) -> Errno {
    log::error!("kept jobs: {error}");
    Errno::from(error)
}

/// What a writer is told of a line that nobody has read.
fn refusal(bad: Bad) -> (Errno, String) {
    match bad {
        Bad::TooLong => {
            (Errno(c::E2BIG), format!("a write and a line have at most {LINE_BYTES_MAX} bytes"))
        }
        Bad::Zero(number) => {
            (Errno(c::EINVAL), format!("line {number} has a zero byte; no line was taken"))
        }
        Bad::Malformed => {
            (Errno(c::EINVAL), "this goes on with a line that was refused".to_owned())
        }
        Bad::TooMany => {
            (Errno(c::EBUSY), "too many processes write half lines into one open file".to_owned())
        }
    }
}
