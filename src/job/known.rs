//! A job as it can be read: one of this mount, or one that is kept from before.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::log::part;
use super::{Job, State, log};
use crate::catalog::jobs::{JobId, KeptJob};
use crate::error::Quoted;

/// A job that is known.
#[derive(Clone)]
pub enum Known {
    /// This mount has it.
    Here(Arc<Job>),
    /// It is in the file of kept jobs.
    Kept(Arc<KeptJob>),
}

impl Known {
    /// Its number.
    pub fn id(&self) -> JobId {
        match self {
            Known::Here(job) => job.id,
            Known::Kept(job) => job.id,
        }
    }

    /// The word for what was asked for.
    pub fn verb(&self) -> &str {
        match self {
            Known::Here(job) => job.verb.as_str(),
            Known::Kept(job) => &job.verb,
        }
    }

    /// Whether nothing more is heard of it here.
    pub fn has_ended(&self) -> bool {
        match self {
            Known::Here(job) => job.state().has_ended(),
            Known::Kept(_) => true,
        }
    }

    /// Whether it has been done.
    pub fn is_done(&self) -> bool {
        match self {
            Known::Here(job) => job.state() == State::Done,
            Known::Kept(job) => job.state.as_deref() == Some("done"),
        }
    }

    /// The command, as one could type it.
    pub fn command(&self) -> Vec<u8> {
        let line = match self {
            Known::Here(job) => &job.line,
            Known::Kept(job) => &job.line,
        };
        let mut command = [self.verb().as_bytes(), b" ", line].concat();
        command.truncate(command.trim_ascii_end().len());
        command.push(b'\n');
        command
    }

    /// What programs read.
    pub fn progress_json(&self) -> Value {
        match self {
            Known::Here(job) => job.progress_json(),
            Known::Kept(job) => match serde_json::from_str(&job.status) {
                Ok(Value::Object(map)) => Value::Object(map),
                _ => without_end(job),
            },
        }
    }

    /// What people read: `key value` lines, the first of which is `job N`.
    pub fn status_text(&self) -> String {
        let Value::Object(map) = self.progress_json() else { return String::new() };
        let mut text = String::new();
        for (key, value) in map {
            match value {
                Value::Null => {}
                Value::String(word) if word.is_empty() => {}
                Value::String(word) => text.push_str(&format!("{key} {word}\n")),
                other => text.push_str(&format!("{key} {other}\n")),
            }
        }
        text
    }

    /// At most `size` bytes of its log from `offset` on; none where there are none yet.
    pub fn read_log(&self, offset: u64, size: usize) -> Vec<u8> {
        match self {
            Known::Here(job) => job.shared.log.read(offset, size),
            Known::Kept(job) => part(job.log.as_bytes(), offset, size),
        }
    }

    /// How long its log is.
    pub fn log_len(&self) -> u64 {
        match self {
            Known::Here(job) => job.shared.log.len(),
            Known::Kept(job) => job.log.len() as u64,
        }
    }
}

/// The status of a job that has left none.
fn without_end(job: &KeptJob) -> Value {
    let (state, error) = match (job.is_lost, &job.state) {
        (true, _) => ("failed", "lost: the mount's process ended before the job did"),
        (false, None) => ("running", "another mount of this catalog has it"),
        (false, Some(state)) => (&**state, "its status is lost"),
    };
    let mut map = Map::new();
    for (key, value) in [
        ("job", json!(job.id)),
        ("state", json!(state)),
        ("verb", json!(job.verb)),
        ("command", json!(super::cut(&format!("{} {}", job.verb, Quoted(&job.line))))),
        ("asked", json!(log::clock(job.asked))),
        ("asked_by", json!(job.uid)),
        ("error", json!(error)),
        ("exit_code", if state == "running" { Value::Null } else { json!(1) }),
    ] {
        map.insert(key.to_owned(), value);
    }
    Value::Object(map)
}
