//! What commands say: lines for people and JSON for programs.
//!
//! Names in lines are quoted so that none can drive a terminal or fake a line; in JSON a name that
//! is not UTF-8 gets the key `KEY_b64`.

use std::io::{self, Write};
use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytesize::ByteSize;
use serde_json::{Map, Value, json};

use crate::backup::{Copies, Planned};
use crate::catalog::{Change, ChangeKind, Counts, DamagedFile, EntryRow, Run, Tally};
use crate::entry::Kind;
use crate::error::{Error, Problem, Quoted, Result};
use crate::sys::{Time, quoted};
use crate::volume::BlockId;

/// Standard output, buffered. A reader that goes away ends the output, not the command.
pub struct Out(io::BufWriter<io::StdoutLock<'static>>);

impl Out {
    pub fn new() -> Out {
        Out(io::BufWriter::with_capacity(1 << 16, io::stdout().lock()))
    }

    pub fn line(&mut self, text: &str) -> Result<()> {
        self.0.write_all(text.as_bytes()).and_then(|()| self.0.write_all(b"\n")).map_err(failed)
    }

    pub fn json(&mut self, value: &Value) -> Result<()> {
        self.line(&value.to_string())
    }

    pub fn finish(mut self) -> Result<()> {
        self.0.flush().map_err(failed)
    }
}

/// The same for bytes of any kind.
impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(end_on_closed_pipe)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(end_on_closed_pipe)
    }
}

fn failed(e: io::Error) -> Error {
    Error::io("writing to standard output", end_on_closed_pipe(e))
}

fn end_on_closed_pipe(e: io::Error) -> io::Error {
    if e.kind() == io::ErrorKind::BrokenPipe {
        // As `ls | head` does.
        std::process::exit(0);
    }
    e
}

/// Says a line on standard output. What a command came to does not depend on whether anybody still
/// listens.
pub fn say(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// Says a line on standard error, beside output that has to stay clean.
pub fn note(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "raidtape: {line}");
}

/// Inserts a name that may be any bytes.
pub fn put_name(map: &mut Map<String, Value>, key: &str, name: &[u8]) {
    match std::str::from_utf8(name) {
        Ok(text) => map.insert(key.to_owned(), text.into()),
        Err(_) => map.insert(format!("{key}_b64"), BASE64.encode(name).into()),
    };
}

/// Adds numbers under their keys.
pub fn put_counts(map: &mut Map<String, Value>, counts: &[(&str, u64)]) {
    map.extend(counts.iter().map(|(key, count)| ((*key).to_owned(), Value::from(*count))));
}

/// A size for people.
pub fn bytes(n: u64) -> String {
    ByteSize(n).to_string()
}

/// A time for people, in the local time zone.
pub fn time(time: Time) -> String {
    let zone = jiff::tz::TimeZone::system();
    match jiff::Timestamp::new(time.secs, 0) {
        Ok(stamp) => stamp.to_zoned(zone).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        Err(_) => format!("@{}", time.secs),
    }
}

pub fn time_json(time: Time) -> Value {
    // Nanoseconds never exceed i32.
    let nanos = i32::try_from(time.nanos).unwrap_or_default();
    match jiff::Timestamp::new(time.secs, nanos) {
        Ok(stamp) => stamp.to_string().into(),
        Err(_) => format!("@{}.{:09}", time.secs, time.nanos).into(),
    }
}

/// `added 3, modified 1, deleted 0, unchanged 99`.
pub fn tally(tally: &Tally) -> String {
    format!(
        "added {}, modified {}, deleted {}, unchanged {}",
        tally.added, tally.modified, tally.deleted, tally.unchanged
    )
}

fn tally_json(tally: &Tally) -> Value {
    json!({
        "added": tally.added,
        "modified": tally.modified,
        "deleted": tally.deleted,
        "unchanged": tally.unchanged,
    })
}

/// What a run counted, as JSON.
pub fn counts_json(counts: &Counts) -> Map<String, Value> {
    let mut map = Map::new();
    if let Value::Object(entries) = tally_json(&counts.entries) {
        map.extend(entries);
    }
    map.insert("dirs".into(), tally_json(&counts.dirs));
    map.insert("files".into(), counts.files.into());
    map.insert("bytes".into(), counts.bytes.into());
    map.insert("bytes_read".into(), counts.bytes_read.into());
    map.insert("bytes_stored".into(), counts.bytes_stored.into());
    map.insert("problems".into(), counts.problems.into());
    map
}

/// Problems as JSON.
pub fn problems_json(problems: &[Problem]) -> Value {
    let one = |it: &Problem| {
        let mut map = Map::new();
        put_name(&mut map, "path", &it.path);
        map.insert("kind".into(), it.kind.as_str().into());
        map.insert("message".into(), it.message.clone().into());
        Value::Object(map)
    };
    problems.iter().map(one).collect()
}

/// Names every problem on standard error.
pub fn print_problems(problems: &[Problem], count: u64) {
    for problem in problems {
        eprintln!("raidtape: {problem}");
    }
    let more = count.saturating_sub(problems.len() as u64);
    if more > 0 {
        eprintln!("raidtape: and {more} more");
    }
}

/// Says on standard error what could not be done beside the work.
pub fn print_warnings(warnings: &[Error]) {
    for warning in warnings {
        eprintln!("raidtape: warning: {warning}");
    }
}

/// A file that damage or a loss reaches, as JSON.
pub fn damaged_file_json(file: &DamagedFile) -> Value {
    let mut map = Map::new();
    put_damaged_file(&mut map, file);
    Value::Object(map)
}

fn put_damaged_file(map: &mut Map<String, Value>, file: &DamagedFile) {
    put_name(map, "source", &file.source);
    put_name(map, "path", &file.path);
    map.insert("runs".into(), json!(file.runs));
}

/// Says that a file lacks a block.
pub fn say_lacking(
    out: &mut Out,
    block: &BlockId,
    file: &DamagedFile,
    is_json: bool,
) -> Result<()> {
    if !is_json {
        let runs: Vec<String> = file.runs.iter().map(i64::to_string).collect();
        return out.line(&format!(
            "lacks block {block}: {} of {}, runs {}",
            Quoted(&file.path),
            Quoted(&file.source),
            runs.join(", ")
        ));
    }
    let mut map = Map::new();
    map.insert("lacks".into(), block.to_string().into());
    put_damaged_file(&mut map, file);
    out.json(&Value::Object(map))
}

/// A run as JSON.
pub fn run_json(run: &Run) -> Value {
    let mut map = Map::new();
    map.insert("run".into(), run.id.into());
    map.insert("uuid".into(), run.uuid.clone().into());
    put_name(&mut map, "source", &run.source);
    put_name(&mut map, "path", std::os::unix::ffi::OsStrExt::as_bytes(run.path.as_os_str()));
    map.insert("started".into(), time_json(run.started));
    map.insert("finished".into(), time_json(run.finished));
    map.extend(counts_json(&run.counts));
    put_name(&mut map, "host", &run.host);
    map.insert("tags".into(), json!(run.tags));
    map.insert("comment".into(), run.comment.clone().into());
    Value::Object(map)
}

/// An entry as JSON, under `path`.
pub fn entry_json(path: &[u8], entry: &EntryRow) -> Map<String, Value> {
    let meta = &entry.meta;
    let mut map = Map::new();
    put_name(&mut map, "path", path);
    map.insert("kind".into(), meta.kind.as_str().into());
    map.insert("mode".into(), format!("{:04o}", meta.mode).into());
    map.insert("uid".into(), meta.uid.into());
    map.insert("gid".into(), meta.gid.into());
    map.insert("size".into(), meta.size.into());
    map.insert("mtime".into(), time_json(meta.mtime));
    map.insert("first_run".into(), entry.first_run.into());
    map
}

/// An entry as `ls -l` shows it.
pub fn entry_line(entry: &EntryRow, target: Option<&[u8]>, owner: &str, group: &str) -> String {
    let meta = &entry.meta;
    let mut line = format!(
        "{} {owner:<8} {group:<8} {:>12} {} {}",
        mode_text(meta.kind, meta.mode),
        meta.size,
        time(meta.mtime),
        Quoted(&entry.name)
    );
    if let Some(target) = target {
        line.push_str(&format!(" -> {}", Quoted(target)));
    }
    line
}

pub fn mode_text(kind: Kind, mode: u32) -> String {
    let kind = match kind {
        Kind::File => '-',
        Kind::Dir => 'd',
        Kind::Symlink => 'l',
        Kind::Fifo => 'p',
        Kind::Socket => 's',
        Kind::CharDevice => 'c',
        Kind::BlockDevice => 'b',
    };
    let mut text = String::from(kind);
    // (bits of a class, the special bit that replaces its x, its letters with and without x)
    for (shift, special, with, without) in
        [(6, 0o4000, 's', 'S'), (3, 0o2000, 's', 'S'), (0, 0o1000, 't', 'T')]
    {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (true, true) => with,
            (true, false) => without,
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// A change as a line: `+`, `M` or `-` and the path, a directory with a slash.
pub fn change_line(change: &Change) -> String {
    change_text(change.kind, &change.path, change.entry.meta.kind)
}

/// The same from its parts.
pub fn change_text(change: ChangeKind, path: &[u8], kind: Kind) -> String {
    let sign = match change {
        ChangeKind::Added => '+',
        ChangeKind::Modified => 'M',
        ChangeKind::Deleted => '-',
    };
    let slash = if kind == Kind::Dir { "/" } else { "" };
    format!("{sign} {}{slash}", Quoted(path))
}

/// What a run would change, as JSON.
pub fn planned_json(planned: &Planned<'_>) -> Value {
    let mut map = Map::new();
    map.insert("change".into(), planned.kind.as_str().into());
    put_name(&mut map, "path", planned.path);
    map.insert("kind".into(), planned.meta.kind.as_str().into());
    map.insert("size".into(), planned.meta.size.into());
    Value::Object(map)
}

/// What lacks of the copies that a run should have made, and what they have in common.
pub fn say_copies(copies: &Copies) {
    if copies.blocks_lacking > 0 {
        let (blocks, size) = (copies.blocks_lacking, bytes(copies.bytes_lacking));
        say(format_args!(
            "  {blocks} blocks, {size}, are on fewer than {} volumes: raidtape coverage says more",
            copies.wanted
        ));
    }
    if copies.wanted > 1 {
        say_together(&copies.together);
    }
}

/// Warns of volumes that fail together.
pub fn say_together(together: &[Vec<PathBuf>]) {
    for paths in together {
        let paths: Vec<String> = paths.iter().map(|it| quoted(it).to_string()).collect();
        say(format_args!(
            "  warning: on one file system, whose loss is the loss of all: {}",
            paths.join(", ")
        ));
    }
}

/// The same as JSON.
pub fn copies_json(copies: &Copies) -> Value {
    json!({
        "wanted": copies.wanted,
        "blocks_lacking": copies.blocks_lacking,
        "bytes_lacking": copies.bytes_lacking,
        "together": together_json(&copies.together),
    })
}

/// Groups of paths as JSON: lists of objects with a path.
pub fn together_json(together: &[Vec<PathBuf>]) -> Value {
    let path = |it: &PathBuf| {
        let mut map = Map::new();
        put_name(&mut map, "path", std::os::unix::ffi::OsStrExt::as_bytes(it.as_os_str()));
        Value::Object(map)
    };
    together.iter().map(|group| group.iter().map(path).collect::<Value>()).collect()
}

/// `run 3`, `runs 1-4, 7`.
pub fn runs(runs: &[i64]) -> String {
    let mut ranges: Vec<(i64, i64)> = Vec::new();
    for run in runs {
        match ranges.last_mut() {
            Some(last) if last.1 + 1 == *run => last.1 = *run,
            _ => ranges.push((*run, *run)),
        }
    }
    let words = ranges.iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    let word = if runs.len() == 1 { "run" } else { "runs" };
    format!("{word} {}", words.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn names_come_back_from_json(bytes: Vec<u8>, text: String) {
            for name in [bytes, text.into_bytes()] {
                let mut map = Map::new();
                put_name(&mut map, "name", &name);
                let line = Value::Object(map).to_string();
                prop_assert!(!line.contains('\n'));
                let value: Value = serde_json::from_str(&line)?;
                let back = match (value["name"].as_str(), value["name_b64"].as_str()) {
                    (Some(text), None) => text.as_bytes().to_vec(),
                    (None, Some(text)) => BASE64.decode(text)?,
                    _ => panic!("{line}"),
                };
                prop_assert_eq!(back, name);
            }
        }
    }
}
