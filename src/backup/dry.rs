//! What a run would do, without doing it.
//!
//! The tree is walked and compared as for a run, but no content is read and nothing is written:
//! not the catalog, not a volume, and no lock is taken. What is found is told at once, so memory
//! does not grow with it. A file is judged by its metadata: one that a run would read and find
//! unchanged counts as unchanged here if its metadata is, and else as modified.

use std::path::Path;

use super::ahead::Ahead;
use super::filter::Filter;
use super::scan::{Numbers, Scanner};
use super::{
    Change, EntryPlace, FileJob, Item, Options, PROBLEMS_MAX, Target, Unit, check_options,
    expect_as_much, overlap, source_and_name,
};
use crate::catalog::{ChangeKind, Counts, DirId, Reader, RunId, Tally};
use crate::entry::{Kind, Metadata};
use crate::error::{Error, Problem, Result};
use crate::progress::Progress;
use crate::sys::{self, Time};

/// Entries that a page of the catalog's listing holds.
const PAGE_ENTRIES: usize = 512;

/// Something that a run would change.
pub struct Planned<'a> {
    /// In what way.
    pub kind: ChangeKind,
    /// Its path below the source's root; empty for the root itself.
    pub path: &'a [u8],
    /// Its metadata, or what it was before.
    pub meta: &'a Metadata,
}

/// What a run would come to.
#[derive(Debug)]
pub struct Plan {
    /// Name of the source.
    pub source: Vec<u8>,
    /// What the run would count; `bytes_read` is what it would have to read.
    pub counts: Counts,
    /// The first problems, at most [`PROBLEMS_MAX`].
    pub problems: Vec<Problem>,
}

/// Finds out what [`super::run`] would do, and calls `each` for everything that it would change.
pub fn dry_run(
    catalog: &Path,
    options: &Options,
    progress: &Progress,
    each: &mut dyn FnMut(Planned<'_>) -> Result<()>,
) -> Result<Plan> {
    if options.stream.is_some() {
        return Err(Error::usage("a stream can be read once only: there is no --dry-run of it"));
    }
    progress.set_phase("looking");
    sys::raise_open_files_limit();
    let started = Time::now();
    let (source, name) = source_and_name(options)?;
    check_options(options)?;
    let filter = Filter::new(&options.rules)?;
    let reader = Reader::open_untouched(catalog)?;
    let own = overlap::check(&source, catalog, &reader.volumes()?, options, &filter)?;
    let basis = reader.latest(Some(&name))?;
    expect_as_much(basis.as_ref(), progress);
    let (counts, run) = (Counts::default(), basis.as_ref().map_or(0, |it| it.id));
    let mut planner = Planner { reader, run, counts, problems: Vec::new(), progress, each };
    let (source, filter, problems) = (&*source, &filter, Vec::new());
    let target = Target { catalog, source, name: &name, basis, own, filter, started, problems };
    let ahead = Ahead::new(false);
    let mut scanner = Scanner::new(target, options, Numbers::dry(), &ahead, progress)?;
    scanner.run(&mut |item| planner.take(item))?;
    progress.set_phase("done");
    let Planner { counts, problems, .. } = planner;
    Ok(Plan { source: name, counts, problems })
}

/// Counts what a committer would do.
struct Planner<'a, 'e> {
    reader: Reader,
    /// The run before.
    run: RunId,
    counts: Counts,
    problems: Vec<Problem>,
    progress: &'a Progress,
    each: &'e mut dyn FnMut(Planned<'_>) -> Result<()>,
}

impl Planner<'_, '_> {
    fn take(&mut self, item: Item) -> Result<()> {
        self.progress.check()?;
        match item {
            Item::Unit(Unit::Pack(files)) => files.into_iter().try_for_each(|it| self.file(&it)),
            Item::Unit(Unit::Large(file)) => self.file(&file),
            Item::Unit(Unit::Stream(_)) => Ok(()),
            Item::Change(change) => self.change(change),
        }
    }

    fn file(&mut self, job: &FileJob) -> Result<()> {
        self.counts.bytes_read += job.meta.size;
        self.leaf(&job.place, &job.meta)
    }

    /// What a run would look at again, or link to what it has looked at.
    fn leaf(&mut self, place: &EntryPlace, meta: &Metadata) -> Result<()> {
        match &place.old {
            Some(old) if meta.is_unchanged_since(&old.meta) => {
                self.tally(meta.kind).unchanged += 1;
                self.count_file(meta);
                Ok(())
            }
            _ => self.put(place, meta),
        }
    }

    fn change(&mut self, change: Change) -> Result<()> {
        match change {
            Change::Unchanged(unchanged) => {
                unchanged.count(&mut self.counts, self.progress);
                Ok(())
            }
            Change::Put { place, meta, .. } => self.put(&place, &meta),
            Change::Link { place, meta, .. } => self.leaf(&place, &meta),
            Change::Gone { row, path } => {
                self.count(ChangeKind::Deleted, &path, &row.meta)?;
                row.child.map_or(Ok(()), |dir| self.below(dir, path))
            }
            Change::Emptied { dir, path } => self.below(dir, path),
            Change::Failed { place, problem, .. } => {
                self.note(problem);
                let dir = place.old.as_ref().and_then(|old| old.child);
                dir.map_or(Ok(()), |dir| self.below(dir, place.path))
            }
            Change::Noted(problem) => {
                self.note(problem);
                Ok(())
            }
            Change::Same { old, .. } => {
                self.tally(old.meta.kind).unchanged += 1;
                self.count_file(&old.meta);
                Ok(())
            }
            // Only workers say so, and there is none.
            Change::Astray { .. } => Ok(()),
        }
    }

    fn put(&mut self, place: &EntryPlace, meta: &Metadata) -> Result<()> {
        let kind = match place.old {
            Some(_) => ChangeKind::Modified,
            None => ChangeKind::Added,
        };
        self.count(kind, &place.path, meta)?;
        self.count_file(meta);
        let dir = place.old.as_ref().and_then(|old| old.child);
        match dir.filter(|_| meta.kind != Kind::Dir) {
            Some(dir) => self.below(dir, place.path.clone()),
            None => Ok(()),
        }
    }

    /// Everything below a directory of the run before is gone.
    fn below(&mut self, dir: DirId, path: Vec<u8>) -> Result<()> {
        let mut dirs = vec![(dir, path)];
        while let Some((dir, path)) = dirs.pop() {
            let mut last: Option<Vec<u8>> = None;
            loop {
                self.progress.check()?;
                let page = self.reader.list(self.run, dir, last.as_deref(), PAGE_ENTRIES)?;
                let Some(end) = page.last() else { break };
                last = Some(end.name.clone());
                for row in page {
                    let path = match path.is_empty() {
                        true => row.name,
                        false => [&*path, b"/", &row.name].concat(),
                    };
                    self.count(ChangeKind::Deleted, &path, &row.meta)?;
                    dirs.extend(row.child.map(|child| (child, path)));
                }
            }
        }
        Ok(())
    }

    fn count(&mut self, kind: ChangeKind, path: &[u8], meta: &Metadata) -> Result<()> {
        let tally = self.tally(meta.kind);
        match kind {
            ChangeKind::Added => tally.added += 1,
            ChangeKind::Modified => tally.modified += 1,
            ChangeKind::Deleted => tally.deleted += 1,
        }
        (self.each)(Planned { kind, path, meta })
    }

    fn tally(&mut self, kind: Kind) -> &mut Tally {
        Progress::add(&self.progress.entries, u64::from(kind != Kind::Dir));
        self.counts.tally(kind)
    }

    fn count_file(&mut self, meta: &Metadata) {
        if meta.kind == Kind::File {
            self.counts.files += 1;
            self.counts.bytes += meta.size;
            Progress::add(&self.progress.bytes, meta.size);
        }
    }

    fn note(&mut self, problem: Problem) {
        self.counts.problems += 1;
        Progress::add(&self.progress.problems, 1);
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }
}
