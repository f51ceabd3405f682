//! `/.ctl/status`: what the mount is and how it fares, as one JSON object.
//!
//! The keys are described in docs/control-files.md. Keys are added and never change their meaning
//! within a format.

use std::sync::{Arc, OnceLock};

use serde_json::{Value, json};

use super::super::disks::Seen;
use super::super::kernel::Kernel;
use super::super::session::Mode;
use super::Control;
use crate::job::Tallies;
use crate::sys::quoted;
use crate::volume::Status;

/// Version of the format.
const FORMAT: u32 = 1;

/// How the mount is served.
#[derive(Clone, Debug)]
pub struct Manner {
    /// Whether other users are let in.
    pub allow_other: bool,
    /// The sessions, once they have begun.
    pub mode: Arc<OnceLock<Mode>>,
    /// What is left to the kernel.
    pub kernel: Arc<Kernel>,
}

impl Control {
    /// The text of the file.
    pub(super) fn status(&self) -> String {
        let cache = self.snapshots.cache_stats();
        let known = self.snapshots.with_reader(|reader| {
            let runs = reader.whole_runs()?.runs;
            Ok((runs.len(), runs.last().map(|it| it.id)))
        });
        // What cannot be read now is missing, the rest is told.
        let (runs, latest) = match known {
            Ok((runs, latest)) => (json!(runs), json!(latest)),
            Err(e) => {
                log::warn!("status: {e}");
                (Value::Null, Value::Null)
            }
        };
        let volumes = match self.disks.seen(&self.snapshots) {
            Ok(seen) => seen.into_iter().map(volume).collect(),
            Err(e) => {
                log::warn!("status: {e}");
                Value::Null
            }
        };
        let jobs = self.queue.tallies().unwrap_or_else(|e| {
            log::warn!("status: {e}");
            Tallies::default()
        });
        let mode = self.manner.mode.get();
        let status = json!({
            "format": FORMAT,
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "catalog": quoted(self.snapshots.catalog()).to_string(),
            "mountpoint": quoted(&self.queue.site().mountpoint).to_string(),
            "started": self.started.secs,
            "mount": {
                "allow_other": self.manner.allow_other,
                "sessions": mode.map(|it| it.sessions),
                "reads": mode.map(|it| it.reads.name()),
            },
            // Files of the writable tree that the kernel was left to read and write by itself.
            "ingest": { "passed": self.manner.kernel.passed() },
            "runs": { "count": runs, "latest": latest },
            "volumes": volumes,
            "cache": {
                "bytes": cache.bytes,
                "limit_bytes": cache.limit_bytes,
                "hits": cache.hits,
                "misses": cache.misses,
                "ahead": cache.ahead,
                "ahead_used": cache.ahead_used,
                "ahead_bytes": cache.ahead_bytes,
            },
            "jobs": {
                "queued": jobs.queued,
                "running": jobs.running,
                "finished": jobs.finished,
            },
        });
        format!("{status}\n")
    }
}

fn volume(it: Seen) -> Value {
    let status = if it.present { it.config.status } else { Status::Missing };
    json!({
        "volume": it.config.number,
        "uuid": it.config.uuid,
        "path": quoted(&it.config.path).to_string(),
        "status": status.as_str(),
        "present": it.present,
        "answers": it.answers,
        "age_seconds": it.age.map(|it| it.as_secs()),
        "total_bytes": it.space.map(|it| it.total_bytes),
        "free_bytes": it.space.map(|it| it.free_bytes),
        "reserve_percent": it.config.reserve_percent,
    })
}
