//! The list of mounts, for people and for programs.
//!
//! Invariant: the list is complete and comes within the time limit of a single mount, however
//! many of them do not answer. What a daemon does not tell is null or a dash, never an error: it
//! may be of another version.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::failure::Failure;
use crate::mounts::{Mount, MountTable};
use crate::probe::{self, Answer};
use crate::shown::{json_text, shown, shown_bytes, shown_size};
use crate::unmount;

/// What the JSON passes on as it is: its key, and where the daemon tells it. `catalog` and `pid`
/// have a place of their own.
const PASSED_ON: [(&str, &str); 9] = [
    ("version", "/version"),
    ("allow_other", "/mount/allow_other"),
    ("sessions", "/mount/sessions"),
    ("reads", "/mount/reads"),
    ("ingest", "/ingest"),
    ("cache", "/cache"),
    ("runs", "/runs"),
    ("volumes", "/volumes"),
    ("jobs", "/jobs"),
];

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

/// How long the daemon has been running.
fn uptime(answer: &Answer) -> Option<Duration> {
    unmount::age(answer.pid()?)
}

fn object(mount: &Mount, answer: &Answer) -> Value {
    let catalog = field(answer, "/catalog").cloned();
    let mut object = json!({
        "catalog": catalog.unwrap_or_else(|| json_text(&mount.source).into()),
        "mountpoint": json_text(mount.point.as_os_str()),
        "state": state(answer),
        "read_only": mount.is_read_only(),
        "pid": field(answer, "/pid"),
        "uptime_seconds": uptime(answer).map(|it| it.as_secs()),
    });
    if let Some(map) = object.as_object_mut() {
        for (key, place) in PASSED_ON {
            map.insert(key.to_owned(), field(answer, place).cloned().unwrap_or(Value::Null));
        }
    }
    object
}

const TITLES: [&str; 10] = [
    "CATALOG",
    "MOUNT POINT",
    "STATE",
    "PID",
    "VERSION",
    "UPTIME",
    "READS",
    "CACHE",
    "RUNNING",
    "QUEUED",
];

type Row = [String; TITLES.len()];

fn row(mount: &Mount, answer: &Answer) -> Row {
    let dash = || "-".to_owned();
    let number = |pointer: &str| field(answer, pointer).and_then(Value::as_u64);
    let text = |value: Option<u64>| value.map_or_else(dash, |n| n.to_string());
    let word = |pointer: &str| {
        field(answer, pointer).and_then(Value::as_str).map(|it| shown_bytes(it.as_bytes()))
    };
    let cache = match (number("/cache/bytes"), number("/cache/limit_bytes")) {
        (Some(used), Some(limit)) => format!("{} of {}", shown_size(used), shown_size(limit)),
        _ => dash(),
    };
    let state = match (answer, mount.is_read_only()) {
        (Answer::Status(_), true) => "ok, ro".to_owned(),
        _ => state(answer).to_owned(),
    };
    [
        word("/catalog").unwrap_or_else(|| shown(&mount.source)),
        shown(&mount.point),
        state,
        text(number("/pid")),
        word("/version").unwrap_or_else(dash),
        uptime(answer).map_or_else(dash, shown_duration),
        word("/mount/reads").unwrap_or_else(dash),
        cache,
        text(number("/jobs/running")),
        text(number("/jobs/queued")),
    ]
}

fn shown_duration(time: Duration) -> String {
    let minutes = time.as_secs() / 60;
    match (minutes / 60 / 24, minutes / 60 % 24, minutes % 60) {
        (0, 0, 0) => format!("{}s", time.as_secs()),
        (0, 0, minutes) => format!("{minutes}m"),
        (0, hours, minutes) => format!("{hours}h{minutes:02}m"),
        (days, hours, _) => format!("{days}d{hours:02}h"),
    }
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
            parent: 0,
            root: "/".into(),
            point: "/mnt/a\nb".into(),
            options: "rw,nosuid".into(),
            kind: "fuse.raidtape".into(),
            source: "/source".into(),
        }
    }

    fn answer() -> Answer {
        Answer::Status(json!({
            "catalog": "/told", "pid": u32::MAX, "version": "1", "mountpoint": "/mnt",
            "cache": {"bytes": 1536, "limit_bytes": 2048, "hits": 1, "misses": 2},
            "jobs": {"queued": 3, "running": 1, "finished": 9},
            "mount": {"allow_other": false, "sessions": 2, "reads": "zero-message"},
        }))
    }

    #[test]
    fn a_mount_that_answers_fills_its_row() {
        let text = layout(&[row(&mount(), &answer())]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        let cells: Vec<&str> = lines[1].split("  ").map(str::trim).collect();
        let cells: Vec<&str> = cells.into_iter().filter(|it| !it.is_empty()).collect();
        let expected = [
            "/told",
            "/mnt/a\\nb",
            "ok",
            "4294967295",
            "1",
            "-",
            "zero-message",
            "1.5 KiB of 2.0 KiB",
            "1",
            "3",
        ];
        assert_eq!(cells, expected);
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
    fn json_passes_on_what_the_daemon_told_and_always_has_the_same_keys() {
        let told = object(&mount(), &answer());
        assert_eq!(told["catalog"], "/told");
        assert_eq!(told["cache"]["hits"], 1);
        assert_eq!(told["jobs"]["finished"], 9);
        assert_eq!(told["sessions"], 2);
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let bare = object(&mount(), &Answer::Status(json!({})));
        assert_eq!(keys(&told), keys(&bare));
        assert_eq!(bare["version"], Value::Null);
        assert_eq!(bare["read_only"], false);
    }

    #[test]
    fn times_are_short() {
        let shown = |seconds| shown_duration(Duration::from_secs(seconds));
        assert_eq!([shown(59), shown(61), shown(3_660)], ["59s", "1m", "1h01m"]);
        assert_eq!(shown(90_000), "1d01h");
    }

    #[test]
    fn a_plain_directory_is_not_a_mount() {
        let directory = tempfile::tempdir().unwrap();
        assert!(list(Some(directory.path()), true).is_err());
    }
}
