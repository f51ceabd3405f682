//! `diff`: what leads from one run to another.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::RunArg;
use crate::catalog::{DiffKind, Difference, Reader, Run};
use crate::cli::{exit, show};
use crate::entry::Kind;
use crate::error::{Error, Quoted, Result};

/// The arguments of `diff`.
#[derive(clap::Args)]
#[command(after_help = "Lines begin with + (added), - (deleted), M (content changed), U (only \
                        metadata changed) or T (another kind of thing).")]
pub struct Diff {
    /// Number of a run, or latest
    #[arg(value_name = "RUN1")]
    from: RunArg,
    /// Number of the run to compare it with, or latest; may be of another source
    #[arg(value_name = "RUN2")]
    to: RunArg,
    /// Only this file, or this folder and what is below it
    #[arg(default_value = ".")]
    path: PathBuf,
    /// Print only how much differs
    #[arg(long)]
    stat: bool,
    /// Print JSON, a line a difference
    #[arg(long)]
    json: bool,
}

pub fn diff(catalog: &Path, args: &Diff) -> Result<u8> {
    let reader = Reader::open(catalog)?;
    let (from, to) = (args.from.find(&reader)?, args.to.find(&reader)?);
    let path = path_below(args.path.as_os_str().as_bytes(), &from, &to)?;
    let mut out = show::Out::new();
    if !args.json {
        let (old, new) = (Quoted(&from.source), Quoted(&to.source));
        out.line(&match from.source == to.source {
            true => format!("from run {} to run {} of {new}", from.id, to.id),
            false => format!("from run {} of {old} to run {} of {new}", from.id, to.id),
        })?;
    }
    let mut sums = Sums::default();
    reader.diff(&from, &to, &path, &mut |it| {
        sums.add(&it);
        match (args.stat, args.json) {
            (true, _) => Ok(()),
            (false, true) => out.json(&difference_json(&it)),
            (false, false) => out.line(&line(&it)),
        }
    })?;
    match (args.stat, args.json) {
        (true, true) => out.json(&sums.json(&from, &to))?,
        (false, true) => {}
        (_, false) => {
            out.line(&format!("  entries: {}", sums.entries.text()))?;
            let dirs = &sums.dirs;
            out.line(&format!(
                "  directories: added {}, deleted {}, metadata changed {}",
                dirs.added, dirs.deleted, dirs.metadata
            ))?;
        }
    }
    out.finish()?;
    Ok(exit::DONE)
}

/// A path below the sources' roots: relative, or with the name of either source before it.
fn path_below(path: &[u8], from: &Run, to: &Run) -> Result<Vec<u8>> {
    let rest = [from, to].into_iter().find_map(|run| {
        let rest = path.strip_prefix(&*run.source)?;
        // "/home/me" is no prefix of "/home/menu".
        (rest.is_empty() || rest.starts_with(b"/")).then_some(rest)
    });
    let mut names = Vec::new();
    for name in rest.unwrap_or(path).split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err(Error::usage("'..' in a path of a snapshot")),
            name => names.push(name),
        }
    }
    Ok(names.join(&b'/'))
}

fn is_dir(it: &Difference) -> bool {
    let is_dir = |it: &crate::catalog::EntryRow| it.meta.kind == Kind::Dir;
    it.new.as_ref().or(it.old.as_ref()).is_some_and(is_dir)
}

fn line(it: &Difference) -> String {
    let sign = match it.kind {
        DiffKind::Added => '+',
        DiffKind::Deleted => '-',
        DiffKind::Type => 'T',
        DiffKind::Content => 'M',
        DiffKind::Metadata => 'U',
    };
    let slash = if is_dir(it) { "/" } else { "" };
    format!("{sign} {}{slash}", Quoted(&it.path))
}

fn difference_json(it: &Difference) -> Value {
    let mut map = Map::new();
    let (change, what) = match it.kind {
        DiffKind::Added => ("added", None),
        DiffKind::Deleted => ("deleted", None),
        DiffKind::Type => ("modified", Some("type")),
        DiffKind::Content => ("modified", Some("content")),
        DiffKind::Metadata => ("modified", Some("metadata")),
    };
    map.insert("change".into(), change.into());
    if let Some(what) = what {
        map.insert("what".into(), what.into());
    }
    if let Some(entry) = it.new.as_ref().or(it.old.as_ref()) {
        map.extend(show::entry_json(&it.path, entry));
    }
    if let (Some(old), Some(_)) = (&it.old, &it.new) {
        let mut was = show::entry_json(&it.path, old);
        was.shift_remove("path");
        was.shift_remove("path_b64");
        map.insert("was".into(), was.into());
    }
    Value::Object(map)
}

/// How much differs.
#[derive(Default)]
struct Sums {
    entries: Sum,
    dirs: Sum,
}

#[derive(Default)]
struct Sum {
    added: u64,
    added_bytes: u64,
    deleted: u64,
    deleted_bytes: u64,
    content: u64,
    metadata: u64,
    kind: u64,
}

impl Sums {
    fn add(&mut self, it: &Difference) {
        // What was a directory and is none, or the other way round, counts as an entry.
        let sum = match it.kind != DiffKind::Type && is_dir(it) {
            true => &mut self.dirs,
            false => &mut self.entries,
        };
        let size = |it: &Option<crate::catalog::EntryRow>| match it {
            Some(it) if it.meta.kind == Kind::File => it.meta.size,
            _ => 0,
        };
        match it.kind {
            DiffKind::Added => {
                sum.added += 1;
                sum.added_bytes += size(&it.new);
            }
            DiffKind::Deleted => {
                sum.deleted += 1;
                sum.deleted_bytes += size(&it.old);
            }
            DiffKind::Type => sum.kind += 1,
            DiffKind::Content => sum.content += 1,
            DiffKind::Metadata => sum.metadata += 1,
        }
    }

    fn json(&self, from: &Run, to: &Run) -> Value {
        let mut map = Map::new();
        map.insert("from".into(), from.id.into());
        map.insert("to".into(), to.id.into());
        map.extend(self.entries.json());
        map.insert("dirs".into(), self.dirs.json().into());
        Value::Object(map)
    }
}

impl Sum {
    fn text(&self) -> String {
        format!(
            "added {} ({}), deleted {} ({}), content changed {}, metadata changed {}, \
             type changed {}",
            self.added,
            show::bytes(self.added_bytes),
            self.deleted,
            show::bytes(self.deleted_bytes),
            self.content,
            self.metadata,
            self.kind
        )
    }

    fn json(&self) -> Map<String, Value> {
        let value = json!({
            "added": self.added,
            "added_bytes": self.added_bytes,
            "deleted": self.deleted,
            "deleted_bytes": self.deleted_bytes,
            "content": self.content,
            "metadata": self.metadata,
            "type": self.kind,
        });
        match value {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }
}
