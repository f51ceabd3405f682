//! The list of mounts, for people and for programs.
//!
//! Invariant: the list is complete and comes within the time limit of a single mount, however
//! many of them do not answer.

use std::ffi::OsStr;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::failure::Failure;
use crate::mounts::{Mount, MountTable};
use crate::probe::{self, Answer};
use crate::shown::{json_text, shown, shown_size};

/// Every mount of ours, or just the one at `point`, as text to print.
pub fn list(point: Option<&Path>, json: bool) -> Result<String, Failure> {
    let table = MountTable::current()?;
    let mounts: Vec<&Mount> = match point {
        Some(point) => vec![table.ours_at(&table.resolve(point)?)?],
        None => table.ours().collect(),
    };
    let pending: Vec<_> =
        mounts.into_iter().map(|mount| (mount, probe::start(&mount.point))).collect();
    let deadline = Instant::now() + probe::LIMIT;
    let answers: Vec<(&Mount, Answer)> =
        pending.into_iter().map(|(mount, question)| (mount, question.finish(deadline))).collect();
    if json {
        let objects = answers.iter().map(|(mount, answer)| object(mount, answer));
        Ok(format!("{:#}\n", Value::Array(objects.collect())))
    } else {
        Ok(layout(&answers.iter().map(|(mount, answer)| row(mount, answer)).collect::<Vec<_>>()))
    }
}

fn state(answer: &Answer) -> &'static str {
    match answer {
        Answer::Status(_) => "ok",
        Answer::Dead => "dead",
        Answer::Denied => "no access",
        Answer::Absent | Answer::Silent | Answer::Broken(_) => "not answering",
    }
}

fn field<'a>(answer: &'a Answer, pointer: &str) -> Option<&'a Value> {
    match answer {
        Answer::Status(status) => status.pointer(pointer),
        _ => None,
    }
}

fn object(mount: &Mount, answer: &Answer) -> Value {
    let catalog = field(answer, "/catalog").cloned();
    json!({
        "catalog": catalog.unwrap_or_else(|| json_text(&mount.source).into()),
        "mountpoint": json_text(mount.point.as_os_str()),
        "state": state(answer),
        "pid": field(answer, "/pid"),
        "version": field(answer, "/version"),
        "cache": field(answer, "/cache"),
        "jobs": field(answer, "/jobs"),
    })
}

const TITLES: [&str; 7] = ["CATALOG", "MOUNT POINT", "STATE", "PID", "CACHE", "RUNNING", "QUEUED"];

type Row = [String; TITLES.len()];

fn row(mount: &Mount, answer: &Answer) -> Row {
    let number = |pointer: &str| field(answer, pointer).and_then(Value::as_u64);
    let text = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let catalog = match field(answer, "/catalog").and_then(Value::as_str) {
        Some(catalog) => shown(OsStr::new(catalog)),
        None => shown(&mount.source),
    };
    let cache = match (number("/cache/bytes"), number("/cache/limit_bytes")) {
        (Some(used), Some(limit)) => format!("{} of {}", shown_size(used), shown_size(limit)),
        _ => "-".to_owned(),
    };
    [
        catalog,
        shown(&mount.point),
        state(answer).to_owned(),
        text(number("/pid")),
        cache,
        text(number("/jobs/running")),
        text(number("/jobs/queued")),
    ]
}

fn layout(rows: &[Row]) -> String {
    let titles = TITLES.map(str::to_owned);
    let lines: Vec<&Row> = std::iter::once(&titles).chain(rows).collect();
    let mut widths = [0_usize; TITLES.len()];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line.iter()) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> =
            line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

    use super::*;

    fn mount() -> Mount {
        Mount {
            id: 1,
            root: "/".into(),
            point: "/mnt/a\nb".into(),
            kind: "fuse.raidtape".into(),
            source: "/source".into(),
        }
    }

    fn answer() -> Answer {
        Answer::Status(json!({
            "catalog": "/told", "pid": 12, "version": "1", "mountpoint": "/mnt",
            "cache": {"bytes": 1536, "limit_bytes": 2048, "hits": 1, "misses": 2},
            "jobs": {"queued": 3, "running": 1, "finished": 9},
        }))
    }

    #[test]
    fn a_mount_that_answers_fills_its_row() {
        let text = layout(&[row(&mount(), &answer())]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1], "/told    /mnt/a\\nb    ok     12   1.5 KiB of 2.0 KiB  1        3");
    }

    #[test]
    fn a_mount_that_does_not_answer_is_listed_all_the_same() {
        let text = layout(&[row(&mount(), &Answer::Silent)]);
        assert!(text.contains("/source"), "{text}");
        assert!(text.contains("not answering"), "{text}");
        let dead = object(&mount(), &Answer::Dead);
        assert_eq!(dead["state"], "dead");
        assert_eq!(dead["pid"], Value::Null);
        assert_eq!(dead["mountpoint"], "/mnt/a\nb");
    }

    #[test]
    fn json_passes_on_what_the_daemon_told() {
        let object = object(&mount(), &answer());
        assert_eq!(object["catalog"], "/told");
        assert_eq!(object["cache"]["hits"], 1);
        assert_eq!(object["jobs"]["finished"], 9);
    }

    #[test]
    fn a_plain_directory_is_not_a_mount() {
        let directory = tempfile::tempdir().unwrap();
        assert!(list(Some(directory.path()), true).is_err());
    }
}
