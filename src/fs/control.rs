//! Control files: `/.ctl/backup`, `/.ctl/status` and `/.ctl/jobs/<id>/…`.
//!
//! A line written to a verb's file is answered at once: taken, or refused with `EINVAL`
//! (malformed), `EACCES` (not the mount's owner) or `EBUSY` (too many wait). The same open file
//! then tells of the job that it has asked for, and `fsync` on it waits for that job; another one
//! tells of the last job. Contents are made when they are read: a file has no size of its own.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use serde_json::json;

use super::errno::{Errno, FsResult};
use super::node::{JOB_FILES, JobFile, Node};
use super::session::Mode;
use super::tree::{Item, Tree};
use crate::error::Quoted;
use crate::job::{Job, JobId, Queue, grammar};
use crate::snapshot::Snapshots;
use crate::sys::{Stat, c, quoted};

/// Handles of control files that may be open at once.
const HANDLES_MAX: usize = 1024;

/// The control files of a mount.
pub struct Control {
    queue: Arc<Queue>,
    snapshots: Arc<Snapshots>,
    ingest_dir: PathBuf,
    mountpoint: PathBuf,
    mode: Arc<OnceLock<Mode>>,
    handles: Mutex<Handles>,
}

#[derive(Default)]
struct Handles {
    last: u64,
    open: HashMap<u64, Handle>,
}

#[derive(Default)]
struct Handle {
    /// The job that was asked for through this handle.
    job: Option<Arc<Job>>,
    /// What is being read, made at offset 0, so that a reader in pieces sees one text.
    text: Option<Arc<Vec<u8>>>,
}

impl Control {
    /// Control files over a queue.
    pub fn new(
        queue: Arc<Queue>,
        snapshots: Arc<Snapshots>,
        ingest_dir: &Path,
        mountpoint: &Path,
        mode: Arc<OnceLock<Mode>>,
    ) -> Control {
        Control {
            queue,
            snapshots,
            ingest_dir: ingest_dir.to_path_buf(),
            mountpoint: mountpoint.to_path_buf(),
            mode,
            handles: Mutex::default(),
        }
    }

    /// Attributes of a control file or a directory of control files.
    pub fn stat(&self, tree: &Tree, node: Node) -> FsResult<Stat> {
        match node {
            Node::Ctl | Node::Jobs => tree.own_dir(node),
            Node::Job(id) => self.job(id).and_then(|_| tree.own_dir(node)),
            Node::CtlBackup => tree.own(node, c::S_IFREG | 0o600),
            Node::CtlStatus => tree.own(node, c::S_IFREG | 0o444),
            Node::JobFile(id, file) => {
                self.job(id)?;
                let mode = if file == JobFile::Cancel { 0o200 } else { 0o444 };
                tree.own(node, c::S_IFREG | mode)
            }
            _ => Err(Errno(c::ENOENT)),
        }
    }

    /// What a directory of control files holds.
    pub fn list(&self, tree: &Tree, node: Node) -> FsResult<Vec<Item>> {
        let names: Vec<(String, Node)> = match node {
            Node::Ctl => vec![
                ("backup".to_owned(), Node::CtlBackup),
                ("jobs".to_owned(), Node::Jobs),
                ("status".to_owned(), Node::CtlStatus),
            ],
            Node::Jobs => {
                let ids = self.queue.ids().into_iter();
                ids.map(|id| (id.to_string(), Node::Job(id))).collect()
            }
            Node::Job(id) => {
                self.job(id)?;
                let files = JOB_FILES.iter();
                files.map(|it| (it.1.to_owned(), Node::JobFile(id, it.0))).collect()
            }
            _ => return Err(Errno(c::ENOTDIR)),
        };
        let item = |(name, node): (String, Node)| {
            Ok(Item { name: name.into(), stat: self.stat(tree, node)? })
        };
        names.into_iter().map(item).collect()
    }

    /// Looks a name up.
    pub fn lookup(&self, tree: &Tree, dir: Node, name: &OsStr) -> FsResult<Stat> {
        let items = self.list(tree, dir)?;
        let found = items.into_iter().find(|it| it.name == name);
        found.map(|it| it.stat).ok_or(Errno(c::ENOENT))
    }

    fn job(&self, id: JobId) -> FsResult<Arc<Job>> {
        self.queue.get(id).ok_or(Errno(c::ENOENT))
    }

    /// Opens a control file; `uid` is the caller.
    pub fn open(&self, tree: &Tree, node: Node, flags: i32, uid: u32) -> FsResult<u64> {
        let writes = flags & c::O_ACCMODE != c::O_RDONLY;
        let is_writable = matches!(node, Node::CtlBackup | Node::JobFile(_, JobFile::Cancel));
        if writes && !is_writable {
            return Err(Errno(c::EACCES));
        }
        if writes && uid != 0 && uid != tree.owner() {
            return Err(Errno(c::EACCES));
        }
        self.stat(tree, node)?;
        let mut handles = self.handles.lock();
        if handles.open.len() >= HANDLES_MAX {
            return Err(Errno(c::EMFILE));
        }
        handles.last += 1;
        let number = handles.last;
        handles.open.insert(number, Handle::default());
        Ok(number)
    }

    /// Closes a control file.
    pub fn release(&self, handle: u64) {
        self.handles.lock().open.remove(&handle);
    }

    /// Takes a written line.
    pub fn write(
        &self,
        tree: &Tree,
        node: Node,
        handle: u64,
        uid: u32,
        data: &[u8],
    ) -> FsResult<()> {
        // Whoever was given an open file by the owner is still not the owner.
        if uid != 0 && uid != tree.owner() {
            return Err(Errno(c::EACCES));
        }
        match node {
            Node::JobFile(id, JobFile::Cancel) => {
                self.job(id)?.cancel();
                Ok(())
            }
            Node::CtlBackup => {
                let line = data.trim_ascii();
                let request = grammar::parse_backup(line, &self.ingest_dir).map_err(|e| {
                    log::warn!("backup: '{}': {e}", Quoted(line));
                    Errno::from(&e)
                })?;
                let job = self.queue.submit(line, request).map_err(|e| {
                    log::warn!("backup: '{}': {e}", Quoted(line));
                    Errno::from(&e)
                })?;
                if let Some(handle) = self.handles.lock().open.get_mut(&handle) {
                    *handle = Handle { job: Some(job), text: None };
                }
                Ok(())
            }
            _ => Err(Errno(c::EACCES)),
        }
    }

    /// Reads from `offset` of a control file; empty at its end.
    pub fn read(&self, node: Node, handle: u64, offset: u64, size: usize) -> FsResult<Vec<u8>> {
        let known = {
            let handles = self.handles.lock();
            let handle = handles.open.get(&handle).ok_or(Errno(c::EBADF))?;
            (handle.job.clone(), handle.text.clone().filter(|_| offset > 0))
        };
        let text = match known {
            (_, Some(text)) => text,
            (job, None) => {
                let text = Arc::new(self.text(node, job)?);
                if let Some(handle) = self.handles.lock().open.get_mut(&handle) {
                    handle.text = Some(text.clone());
                }
                text
            }
        };
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
        let to = from.saturating_add(size).min(text.len());
        Ok(text.get(from..to).unwrap_or_default().to_vec())
    }

    fn text(&self, node: Node, job: Option<Arc<Job>>) -> FsResult<Vec<u8>> {
        let text = match node {
            Node::CtlBackup => match job.or_else(|| self.queue.last()) {
                Some(job) => job.status_text(),
                None => "no job yet: write 'SOURCE [options]' or 'ingest'\n".to_owned(),
            },
            Node::CtlStatus => self.status(),
            Node::JobFile(id, JobFile::Status) => self.job(id)?.status_text(),
            Node::JobFile(id, JobFile::Log) => self.job(id)?.log_text(),
            Node::JobFile(id, JobFile::Progress) => {
                format!("{}\n", self.job(id)?.progress_json())
            }
            _ => return Err(Errno(c::EACCES)),
        };
        Ok(text.into_bytes())
    }

    fn status(&self) -> String {
        let cache = self.snapshots.cache_stats();
        let jobs = self.queue.tallies();
        let status = json!({
            "catalog": quoted(self.snapshots.catalog()).to_string(),
            "pid": std::process::id(),
            "version": env!("CARGO_PKG_VERSION"),
            "mountpoint": quoted(&self.mountpoint).to_string(),
            "sessions": self.mode.get().map(|it| it.sessions),
            "reads": self.mode.get().map(|it| it.reads.name()),
            "cache": {
                "bytes": cache.bytes,
                "limit_bytes": cache.limit_bytes,
                "hits": cache.hits,
                "misses": cache.misses,
            },
            "jobs": {
                "queued": jobs.queued,
                "running": jobs.running,
                "finished": jobs.finished,
            },
        });
        format!("{status}\n")
    }

    /// The job that `fsync` on this handle has to wait for: its own, or else the last one, so that
    /// `sync FILE` waits too.
    pub fn job_of(&self, node: Node, handle: u64) -> Option<Arc<Job>> {
        match node {
            Node::CtlBackup => {
                let handles = self.handles.lock();
                let own = handles.open.get(&handle).and_then(|it| it.job.clone());
                own.or_else(|| self.queue.last())
            }
            Node::JobFile(id, _) => self.queue.get(id),
            _ => None,
        }
    }
}
