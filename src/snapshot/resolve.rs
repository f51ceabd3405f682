//! Finding what a user means by a run and by a path.

use std::str::FromStr;

use super::{Snapshots, not_in_run};
use crate::catalog::{EntryRow, Reader, Run, RunId, WholeRuns};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::Time;

/// A path that was found.
#[derive(Debug)]
pub struct Found {
    /// The run it was found in.
    pub run: Run,
    /// The entry.
    pub entry: EntryRow,
    /// Its path below the source's root; empty for the root.
    pub path: Vec<u8>,
    /// Whether it was asked for with the name of the run's source.
    pub with_source: bool,
}

/// A run, as a user asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// The run with this number.
    Number(RunId),
    /// The newest one.
    Latest,
    /// The newest one that had finished at this moment.
    At(Time),
}

impl FromStr for Wish {
    type Err = Error;

    /// Reads `7`, `latest`, or a time: `2026-11-20T10:00` in the local time zone, the same with an
    /// offset (RFC 3339), or `2026-11-20`, which means the end of that day.
    fn from_str(text: &str) -> Result<Wish> {
        if text == "latest" {
            return Ok(Wish::Latest);
        }
        if let Ok(number) = text.parse() {
            return Ok(Wish::Number(number));
        }
        let time = parse_time(text).ok_or_else(|| {
            Error::usage(format!(
                "no run is meant by {text:?}: give its number, 'latest', or a time such as \
                 2026-11-20, 2026-11-20T10:00 or 2026-11-20T10:00:00Z"
            ))
        })?;
        Ok(Wish::At(time))
    }
}

fn parse_time(text: &str) -> Option<Time> {
    let zone = jiff::tz::TimeZone::system();
    // A day without a time would be its midnight to the parser of times, so it comes first; and
    // that one would drop an offset, so what has one comes before it.
    let time = match (text.len(), text.parse::<jiff::civil::Date>()) {
        (..=10, Ok(day)) => {
            // The moment before the next day: what finished on that day had finished by then.
            let next = day.tomorrow().ok()?.to_zoned(zone).ok()?.timestamp();
            next.checked_sub(jiff::SignedDuration::from_nanos(1)).ok()?
        }
        _ => match (text.parse::<jiff::Timestamp>(), text.parse::<jiff::Zoned>()) {
            (Ok(time), _) => time,
            (_, Ok(time)) => time.timestamp(),
            _ => text.parse::<jiff::civil::DateTime>().ok()?.to_zoned(zone).ok()?.timestamp(),
        },
    };
    // Nanoseconds count away from 1970 there, and forward from the second here.
    let nanos = i64::from(time.subsec_nanosecond());
    let secs = time.as_second() + nanos.div_euclid(1_000_000_000);
    Some(Time { secs, nanos: u32::try_from(nanos.rem_euclid(1_000_000_000)).ok()? })
}

/// The run that is wished for. Where `path` begins with the name of a source, runs of other sources
/// do not count for `latest` and times.
pub fn choose_run(reader: &Reader, wish: &Wish, path: &[u8]) -> Result<Run> {
    let until = match wish {
        Wish::Number(number) => return reader.run(*number),
        Wish::Latest => None,
        Wish::At(time) => Some(*time),
    };
    let whole = reader.whole_runs()?;
    let mut runs: Vec<&Run> = whole.runs.iter().collect();
    if runs.is_empty() {
        whole.refuse_doubt(0..RunId::MAX)?;
        return Err(Error::new(ErrorKind::NotFound, "there is no run yet"));
    }
    if runs.iter().any(|run| below(path, run).is_some()) {
        runs.retain(|run| below(path, run).is_some());
    }
    let first = runs.first().map(|run| run.id);
    runs.retain(|run| until.is_none_or(|time| run.finished <= time));
    // By the time they ended: numbers may belong to a clock that was set back.
    let newest = runs.into_iter().max_by_key(|run| match until {
        Some(_) => (run.finished, run.id),
        None => (Time::default(), run.id),
    });
    let begin = newest.as_ref().map_or(0, |it| it.id);
    let is_later = |it: &&Run| it.id > begin && until.is_some_and(|time| it.finished > time);
    let end = whole.runs.iter().find(is_later).map_or(RunId::MAX, |it| it.id);
    whole.refuse_doubt(begin..end)?;
    newest.cloned().ok_or_else(|| {
        let first = first.unwrap_or_default();
        let message = format!("no run had finished by then: the first one is run {first}");
        Error::new(ErrorKind::NotFound, message)
    })
}

/// Finds `path` in run `run`, or in the newest run that has it. A path is relative
/// to the source's root; an absolute one may also begin with the source's name.
pub fn resolve(snapshots: &Snapshots, path: &[u8], run: Option<RunId>) -> Result<Found> {
    resolve_wish(snapshots, path, run.map(Wish::Number).as_ref())
}

/// The same for a run that is wished for in any way.
pub fn resolve_wish(snapshots: &Snapshots, path: &[u8], wish: Option<&Wish>) -> Result<Found> {
    snapshots.with_reader(|reader| {
        let whole = match wish {
            Some(wish) => {
                WholeRuns { runs: vec![choose_run(reader, wish, path)?], damaged: Vec::new() }
            }
            None => reader.whole_runs()?,
        };
        // A path that names a source is meant for that one before any other.
        let of = |is_named| {
            let newest_first = whole.runs.iter().rev();
            newest_first.filter(move |run| below(path, run).is_some() == is_named)
        };
        for run in of(true).chain(of(false)) {
            if let Some(found) = find(reader, run, path)? {
                whole.refuse_doubt(run.id..RunId::MAX)?;
                return Ok(found);
            }
        }
        Err(match whole.runs.as_slice() {
            [] => Error::new(ErrorKind::NotFound, "there is no run yet"),
            [run] => not_in_run(path, run),
            _ => {
                let message = format!("no run has '{}'", Quoted(path));
                Error::new(ErrorKind::NotFound, message)
            }
        })
    })
}

/// What of `path` follows the name of the run's source.
fn below<'a>(path: &'a [u8], run: &Run) -> Option<&'a [u8]> {
    // "/home/me" is no prefix of "/home/menu".
    let rest = path.strip_prefix(&*run.source)?;
    let is_whole = rest.is_empty() || rest.starts_with(b"/") || run.source.ends_with(b"/");
    is_whole.then_some(rest)
}

fn find(reader: &Reader, run: &Run, path: &[u8]) -> Result<Option<Found>> {
    let rest = below(path, run);
    for path in rest.into_iter().chain([path]) {
        if let Some((entry, path)) = walk(reader, run, path)? {
            let with_source = rest.is_some();
            return Ok(Some(Found { run: run.clone(), entry, path, with_source }));
        }
    }
    Ok(None)
}

fn walk(reader: &Reader, run: &Run, path: &[u8]) -> Result<Option<(EntryRow, Vec<u8>)>> {
    let mut entry = reader.root(run)?;
    let mut walked: Vec<&[u8]> = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => continue,
            b".." => return Err(Error::usage("'..' in a path of a snapshot")),
            _ => {}
        }
        let Some(dir) = entry.child else { return Ok(None) };
        match reader.lookup(run.id, dir, name)? {
            Some(next) => entry = next,
            None => return Ok(None),
        }
        walked.push(name);
    }
    Ok(Some((entry, walked.join(&b'/'))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Time {
        match text.parse().unwrap() {
            Wish::At(time) => time,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn runs_are_wished_for_by_number_name_and_time() {
        assert_eq!("12".parse::<Wish>().unwrap(), Wish::Number(12));
        assert_eq!("latest".parse::<Wish>().unwrap(), Wish::Latest);
        assert_eq!(at("1970-01-02T00:00:01Z"), Time { secs: 86_401, nanos: 0 });
        assert_eq!(at("1970-01-02T01:00:01.5+01:00"), Time { secs: 86_401, nanos: 500_000_000 });
        assert_eq!(at("1969-12-31T23:59:59.25Z"), Time { secs: -1, nanos: 250_000_000 });
        for bad in ["", "newest", "yesterday", "2026-13-01", "1.5", "2026-11-20T25:00"] {
            let refused = bad.parse::<Wish>().unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Usage, "{bad:?}");
        }
    }

    #[test]
    fn a_day_ends_before_the_next_one_begins() {
        let next = at("2026-11-21T00:00");
        assert_eq!(at("2026-11-20"), Time { secs: next.secs - 1, nanos: 999_999_999 });
        assert_eq!(at("2026-11-20T00:00:00").secs, next.secs - 86_400);
        assert!(at("2026-11-20T10:00") < at("2026-11-20T10:00:01"));
    }
}
