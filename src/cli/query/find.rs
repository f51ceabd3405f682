//! `find`: entries of all runs by name.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use serde_json::{Map, Value};

use super::RunArg;
use crate::catalog::{Conditions, Hit, Pattern, Reader};
use crate::cli::{exit, show};
use crate::entry::Kind;
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::job::grammar::size;
use crate::sys::Time;

/// The arguments of `find`.
#[derive(clap::Args)]
#[command(after_help = "Prints kind and mode, size, time of change, the first and the last run \
                        that have the file in this state, and its path.")]
pub struct Find {
    /// Shell pattern for the name; with a slash in it for the path below the source, where `*`
    /// stays within a folder and `**` does not; with a slash first for source and path
    pattern: OsString,
    /// Only in this run (a number, or latest)
    #[arg(long, value_name = "RUN")]
    run: Option<RunArg>,
    /// Only in runs of this source
    #[arg(long, value_name = "NAME")]
    source: Option<OsString>,
    /// Take a-z and A-Z for the same
    #[arg(short, long)]
    ignore_case: bool,
    /// Only this kind: f (file), d (directory), l (link), p (pipe), s (socket), c or b (device)
    #[arg(long = "type", value_name = "KIND", value_parser = kind)]
    kind: Option<Kind>,
    /// Only what has more bytes
    #[arg(long, value_name = "SIZE", value_parser = size)]
    larger_than: Option<u64>,
    /// Only what has fewer bytes
    #[arg(long, value_name = "SIZE", value_parser = size)]
    smaller_than: Option<u64>,
    /// Only what was changed after: 2026-01-31, '2026-01-31 18:00', or ago: 3d, 2h, 1w
    #[arg(long, value_name = "TIME", value_parser = moment)]
    newer_than: Option<Time>,
    /// Only what was changed before
    #[arg(long, value_name = "TIME", value_parser = moment)]
    older_than: Option<Time>,
    /// Stop after so many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Print JSON, a line each
    #[arg(long)]
    json: bool,
}

pub fn find(catalog: &Path, args: &Find) -> Result<u8> {
    let reader = Reader::open(catalog)?;
    let pattern = Pattern::new(args.pattern.as_bytes(), args.ignore_case)?;
    let source = args.source.clone().map(OsStringExt::into_vec);
    if let Some(source) = &source
        && !reader.has_source(source)?
    {
        let message = format!("there is no source '{}': see runs", Quoted(source));
        return Err(Error::new(ErrorKind::NotFound, message));
    }
    let conditions = Conditions {
        run: args.run.map(|it| it.find(&reader)).transpose()?,
        source,
        kind: args.kind,
        larger_than: args.larger_than,
        smaller_than: args.smaller_than,
        newer_than: args.newer_than,
        older_than: args.older_than,
    };
    let mut out = show::Out::new();
    let mut left = args.limit.unwrap_or(u64::MAX);
    reader.find(&pattern, &conditions, &mut |hit| {
        match args.json {
            true => out.json(&hit_json(&hit))?,
            false => out.line(&line(&hit))?,
        }
        left -= 1;
        Ok(left > 0)
    })?;
    out.finish()?;
    Ok(exit::DONE)
}

fn line(hit: &Hit) -> String {
    let meta = &hit.entry.meta;
    let (first, last) = (hit.entry.first_run, hit.last_run);
    let runs = if first == last { first.to_string() } else { format!("{first}-{last}") };
    let slash = if meta.kind == Kind::Dir { "/" } else { "" };
    format!(
        "{} {:>12} {} {runs:>9}  {}{slash}",
        show::mode_text(meta.kind, meta.mode),
        meta.size,
        show::time(meta.mtime),
        Quoted(&[&hit.source, &b"/"[..], &hit.path].concat())
    )
}

fn hit_json(hit: &Hit) -> Value {
    let mut map = Map::new();
    show::put_name(&mut map, "source", &hit.source);
    map.extend(show::entry_json(&hit.path, &hit.entry));
    map.insert("last_run".into(), hit.last_run.into());
    map.insert("runs".into(), hit.runs.into());
    map.insert("in_newest".into(), hit.lives.into());
    Value::Object(map)
}

fn kind(letter: &str) -> std::result::Result<Kind, String> {
    Ok(match letter {
        "f" => Kind::File,
        "d" => Kind::Dir,
        "l" => Kind::Symlink,
        "p" => Kind::Fifo,
        "s" => Kind::Socket,
        "c" => Kind::CharDevice,
        "b" => Kind::BlockDevice,
        _ => return Err("give one of f, d, l, p, s, c, b".to_owned()),
    })
}

/// A moment: a date, a date and time, with or without a zone, or how long ago it was.
fn moment(text: &str) -> std::result::Result<Time, String> {
    let now = jiff::Zoned::now();
    let zoned = || -> std::result::Result<jiff::Timestamp, jiff::Error> {
        if let Ok(stamp) = text.parse::<jiff::Timestamp>() {
            return Ok(stamp);
        }
        if let Ok(local) = text.parse::<jiff::civil::DateTime>() {
            return Ok(local.to_zoned(now.time_zone().clone())?.timestamp());
        }
        let span: jiff::Span = text.trim_end_matches(" ago").parse()?;
        Ok(now.checked_sub(span.abs())?.timestamp())
    };
    match zoned() {
        Ok(stamp) => {
            // Of one sign in jiff, of a second that has begun here.
            let nanos = stamp.as_nanosecond();
            let secs = i64::try_from(nanos.div_euclid(1_000_000_000)).unwrap_or_default();
            let nanos = u32::try_from(nanos.rem_euclid(1_000_000_000)).unwrap_or_default();
            Ok(Time { secs, nanos })
        }
        Err(_) => {
            Err("give a date (2026-01-31), a date and time (2026-01-31T18:00, with Z or +01:00 \
                       for a zone), or how long ago (3d, 2h, 1w)"
                .to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_have_several_forms() {
        let secs = |text: &str| moment(text).map(|it| it.secs);
        assert_eq!(secs("2026-01-31T18:00:00Z"), Ok(1_769_882_400));
        assert_eq!(secs("2026-01-31 18:00:00+01:00"), Ok(1_769_878_800));
        assert_eq!(moment("1969-12-31T23:59:59.5Z"), Ok(Time { secs: -1, nanos: 500_000_000 }));
        assert!(secs("2026-01-31").unwrap().abs_diff(1_769_817_600) <= 14 * 3_600);
        assert!(secs("2026-01-31 18:00").is_ok());
        let now = Time::now().secs;
        for (text, ago) in [("3d", 3 * 86_400), ("2h", 7_200), ("1w", 604_800), ("90s ago", 90)] {
            // A day of a zone may have 23 or 25 hours.
            assert!(secs(text).unwrap().abs_diff(now - ago) < 3_700, "{text}");
        }
        for bad in ["", "yesterday", "3", "2026-13-01"] {
            assert!(secs(bad).is_err(), "{bad:?}");
        }
    }
}
