//! The manifests on the volumes: each volume has each run's, and each names the one before it.
//!
//! What the chain of digests leads to, from the newest run on, is right; copies that are something
//! else are replaced by it. Where no volume has the right manifest of a run it is made anew, and
//! then it has another digest: so have all that follow it.

use std::io::{self, Write};

use super::{Stopping, Work};
use crate::catalog::history::{self, Survey};
use crate::catalog::manifest::{self, Previous};
use crate::catalog::{Run, Spool, Writer};
use crate::chunk::Digest;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::sys::quoted;
use crate::volume::{Volume, Volumes};

/// A manifest as a volume has it.
#[derive(Clone, PartialEq)]
struct Found {
    digest: Digest,
    previous: Option<Previous>,
}

/// Sees to it that every volume that is there has the right manifest of every run.
pub fn complete(
    work: &mut Work<'_>,
    writer: &mut Writer,
    runs: &[Run],
    volumes: &Volumes,
) -> Result<()> {
    let chosen = choose(work, writer, runs, volumes)?;
    let mut previous: Option<Previous> = None;
    for (run, copies) in runs.iter().zip(chosen) {
        let right = copies.right.filter(|it| it.previous == previous);
        let digest = match &right {
            Some(right) => {
                let has_it = |it: &&Volume| !copies.volumes.contains(&it.config.number);
                let due: Vec<&Volume> = volumes.present().iter().filter(has_it).collect();
                let first = copies.volumes.first().and_then(|it| volumes.get(*it));
                if let Some(from) = first {
                    copy_to(work, run, from, &due)?;
                }
                Some(right.digest)
            }
            None => remake(work, run, previous.as_ref(), volumes)?,
        };
        previous = Some(Previous { run: run.id, uuid: run.uuid.clone(), digest });
        Progress::add(&work.progress.entries, 1);
    }
    match (runs.last(), previous.and_then(|it| it.digest)) {
        (Some(run), Some(digest)) => writer.keep_manifest(run, &digest),
        _ => Ok(()),
    }
}

/// Which manifest of a run is the right one, and the numbers of the volumes that have it.
#[derive(Default)]
struct Copies {
    right: Option<Found>,
    volumes: Vec<i64>,
}

/// For each run what the volumes have of it, chosen from the newest run on.
fn choose(
    work: &mut Work<'_>,
    writer: &Writer,
    runs: &[Run],
    volumes: &Volumes,
) -> Result<Vec<Copies>> {
    let mut chosen = Vec::new();
    let newest = runs.last().map(|it| (it.id, &*it.uuid));
    let kept = writer.last_manifest()?.filter(|it| Some((it.run, &*it.uuid)) == newest);
    let mut wanted = kept.and_then(|it| it.digest);
    for run in runs.iter().rev() {
        let name = manifest::document_name(run.id);
        let mut copies = Copies::default();
        for volume in volumes.present() {
            work.progress.check()?;
            work.summary.manifests += 1;
            let path = volume.document_path(&name);
            let Ok(survey) = history::survey(&path, &|| work.progress.check()) else { continue };
            let Some(found) = found_of(survey, run) else { continue };
            let is_right = match &copies.right {
                Some(right) => *right == found,
                None => wanted.as_ref().is_none_or(|it| *it == found.digest),
            };
            if is_right {
                copies.right = Some(found);
                copies.volumes.push(volume.config.number);
            }
        }
        let previous = copies.right.as_ref().and_then(|it| it.previous.as_ref());
        wanted = previous.and_then(|it| it.digest);
        chosen.push(copies);
    }
    work.progress.check()?;
    chosen.reverse();
    Ok(chosen)
}

/// What a survey found, if it is of this run and of the format that is written now.
fn found_of(survey: Survey, run: &Run) -> Option<Found> {
    let is_of_run = survey.head.run == run.id && survey.head.uuid == run.uuid;
    let tail = survey.tail?;
    if !is_of_run || tail.counts != run.counts || tail.finished != run.finished {
        return None;
    }
    Some(Found { digest: survey.digest, previous: survey.head.around?.previous })
}

/// Copies a manifest to the volumes that do not have it.
fn copy_to(work: &mut Work<'_>, run: &Run, from: &Volume, due: &[&Volume]) -> Result<()> {
    let name = manifest::document_name(run.id);
    let path = from.document_path(&name);
    for volume in due {
        let progress = work.progress;
        write_to(work, volume, &name, |out| {
            let mut out = Stopping { out, progress };
            let mut file = history::open_document(&path)?;
            let result = io::copy(&mut file, &mut out);
            result.map_err(|e| Error::io(format!("copying {}", quoted(&path)), e))?;
            Ok(())
        })?;
    }
    Ok(())
}

/// Makes a manifest anew on all volumes; gives its digest if one of them has taken it.
fn remake(
    work: &mut Work<'_>,
    run: &Run,
    previous: Option<&Previous>,
    volumes: &Volumes,
) -> Result<Option<Digest>> {
    let name = manifest::document_name(run.id);
    let mut digest = None;
    for volume in volumes.present() {
        let (progress, dir, hash) = (work.progress, work.dir, work.hash);
        let mut made = None;
        // Read by the same reader for each: what the catalog says does not change meanwhile.
        let reader = &work.reader;
        let mut documents = volume.documents();
        let result = documents
            .add(&name, |out| {
                let mut out = Stopping { out, progress };
                let (mut spool, check) = (Spool::new(dir)?, || progress.check());
                let of = (run, previous.cloned());
                made = Some(reader.write_manifest(of, hash, &mut spool, &mut out, &check)?);
                Ok(())
            })
            .and_then(|()| documents.finish());
        if result.is_ok() {
            work.summary.manifests_written += 1;
            digest = made;
        }
        work.settle(volume, result)?;
    }
    Ok(digest)
}

fn write_to(
    work: &mut Work<'_>,
    volume: &Volume,
    name: &str,
    fill: impl FnOnce(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    let mut documents = volume.documents();
    let result = documents.add(name, fill).and_then(|()| documents.finish());
    if result.is_ok() {
        work.summary.manifests_written += 1;
    }
    work.settle(volume, result)
}
