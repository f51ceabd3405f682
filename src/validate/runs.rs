//! The runs, as the manifests and copies of the catalog on the volumes know them, held against the
//! catalog.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::Work;
use super::report::{Fault, Part, STRANGERS_MAX, Stranger};
use crate::catalog::history::{self, Head, Survey};
use crate::catalog::told::{History, told_by};
use crate::catalog::{Reader, Run, RunId, copy, finished_on, manifest};
use crate::chunk::Digest;
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::quoted;

impl Work<'_> {
    /// The manifests of runs, on every volume, from the newest on: each names the one before it.
    pub(super) fn manifests(&self, runs: &[Run]) -> Result<()> {
        let mut wanted = match self.options.run {
            Some(_) => None,
            None => self.snapshots.with_reader(Reader::last_manifest)?,
        };
        wanted = wanted.filter(|it| runs.last().is_some_and(|run| run.uuid == it.uuid));
        for run in runs.iter().rev() {
            let name = manifest::document_name(run.id);
            let digest = wanted.take().and_then(|it| it.digest);
            let (mut right, mut absent) = (None::<(Survey, PathBuf)>, Vec::new());
            for volume in self.volumes.present() {
                self.progress.check()?;
                self.report.lock().documents += 1;
                let path = volume.document_path(&name);
                if path.symlink_metadata().is_err() {
                    absent.push(volume.config.path.clone());
                    continue;
                }
                let digest = digest.or(right.as_ref().map(|it| it.0.digest));
                let look = || match self.manifest(&path, run, digest) {
                    Err(e) if e.kind() == ErrorKind::Interrupted => Err(e),
                    result => Ok(result),
                };
                let mut result = Some(look()?);
                if matches!(result, Some(Err(_))) {
                    // Whoever writes now may just have been at it.
                    result = self.settled(look)?;
                }
                match result {
                    None => self.report.lock().unjudged += 1,
                    Some(Ok(Some(survey))) => right = right.or(Some((survey, path))),
                    // A run that did not end has left it, and this one could not replace it.
                    Some(Ok(None)) => absent.push(volume.config.path.clone()),
                    Some(Err(e)) => {
                        let path = volume.config.path.clone();
                        self.fault(Fault::new(Part::Manifest, path, format!("{name}: {e}")));
                    }
                }
            }
            // A volume that came later gets them with the next genmeta.
            if right.is_some() || !self.volumes.missing().is_empty() {
                self.report.lock().due += absent.len() as u64;
            } else {
                for path in absent {
                    let message = format!("{name} is missing, or another run's");
                    self.fault(Fault::new(Part::Manifest, path, message));
                }
            }
            if let Some((survey, path)) = right {
                if survey.tail.is_some() && !is_of(&survey.head, run) {
                    let message = "what is said of it as a whole differs from its manifest";
                    let message = format!("catalog: run {}: {message}", run.id);
                    self.fault(Fault::of_catalog(message));
                }
                if survey.tail.is_some() && self.options.run.is_none() {
                    let told = told_by(&path, &|| self.progress.check());
                    match told {
                        Ok(told) => self.told.lock().push((run.id, path, told)),
                        Err(e) if e.kind() == ErrorKind::Interrupted => return Err(e),
                        Err(e) => {
                            let message = e.to_string();
                            self.fault(Fault::new(Part::Manifest, PathBuf::new(), message));
                        }
                    }
                }
                wanted = survey.head.around.and_then(|it| it.previous);
            }
        }
        Ok(())
    }

    /// Reads the manifest of a run; `None` if it is another run's.
    fn manifest(&self, path: &Path, run: &Run, wanted: Option<Digest>) -> Result<Option<Survey>> {
        let survey = history::survey(path, &|| self.progress.check())?;
        let head = &survey.head;
        if head.run != run.id {
            return Err(Error::corrupt(format!("it is that of run {}", head.run)));
        }
        if head.uuid != run.uuid {
            return Ok(None);
        }
        // Format 1 has no more to say.
        let Some(tail) = &survey.tail else { return Ok(Some(survey)) };
        if tail.counts != run.counts || tail.finished != run.finished {
            return Err(Error::corrupt("it does not say what the catalog says"));
        }
        match wanted.is_none_or(|it| it == survey.digest) {
            true => Ok(Some(survey)),
            false => Err(Error::corrupt("it is not the one that was written")),
        }
    }

    /// Compares what the manifests have told with what the catalog says of each run.
    pub(super) fn compare(&self, here: &History) -> Result<()> {
        let all = std::mem::take(&mut *self.told.lock());
        for (run, path, said) in all {
            self.progress.check()?;
            let here = here.get(&run).copied().unwrap_or_default();
            if said == here {
                continue;
            }
            let check = || self.progress.check();
            let found = self.settled(|| {
                self.snapshots
                    .with_reader(|reader| reader.difference(run, (&said, &here), &path, &check))
            })?;
            match found {
                None => self.report.lock().unjudged += 1,
                Some(found) => found.into_iter().for_each(|it| self.fault(Fault::of_catalog(it))),
            }
        }
        Ok(())
    }

    /// Runs that volumes know and the catalog does not.
    pub(super) fn strangers(&self) -> Result<()> {
        // A file costs its name only: of many strange ones the first runs are looked at.
        let mut paths: BTreeMap<RunId, PathBuf> = BTreeMap::new();
        let (mut finished, mut left_out) = (0, 0);
        for volume in self.volumes.present() {
            if let Some(lost) = self.snapshots.with_reader(|reader| reader.lost_on(volume))? {
                self.fault(Fault::of_catalog(format!("catalog: {lost}")));
            }
            finished = finished.max(finished_on(volume));
            let dir = volume.config.path.join(manifest::DIR);
            let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
            let runs = names.filter_map(|it| manifest::run_of(it.file_name().to_str()?));
            for run in runs {
                self.progress.check()?;
                if paths.contains_key(&run)
                    || self.snapshots.with_reader(|reader| reader.run(run)).is_ok()
                {
                    continue;
                }
                paths.insert(run, volume.document_path(&manifest::document_name(run)));
                if paths.len() > STRANGERS_MAX {
                    left_out += u64::from(paths.pop_last().is_some());
                }
            }
        }
        self.report.lock().strangers.count += left_out;
        for (run, path) in paths {
            self.progress.check()?;
            let Some(survey) = self.stranger(run, &path)? else { continue };
            let last = self.snapshots.with_reader(Reader::last_run_given)?;
            let (uuid, source) = (survey.head.uuid, survey.head.source);
            if last < run && run <= finished {
                self.fault(Fault::of_catalog(format!(
                    "catalog: it has lost run {run} ({uuid}) of '{}', whose manifest is {}: \
                     raidtape catalog-restore brings it back",
                    Quoted(&source),
                    quoted(&path)
                )));
            } else {
                self.report.lock().add_stranger(Stranger { run, uuid, source, path });
            }
        }
        Ok(())
    }

    /// The manifest of a run that the catalog does not know, if it is one.
    fn stranger(&self, run: RunId, path: &Path) -> Result<Option<Survey>> {
        match history::survey(path, &|| self.progress.check()) {
            Ok(survey) if survey.head.run == run => Ok(Some(survey)),
            Err(e) if e.kind() == ErrorKind::Interrupted => Err(e),
            // Neither a run nor a fault of one.
            _ => Ok(None),
        }
    }

    /// The copies of the catalog on the volumes.
    pub(super) fn copies_of_catalog(&self) -> Result<()> {
        for volume in self.volumes.present() {
            let path = &volume.config.path;
            let runs = match copy::list(path) {
                Ok(runs) => runs,
                Err(e) => {
                    self.fault(Fault::new(Part::Copy, path.clone(), e.to_string()));
                    continue;
                }
            };
            for number in runs {
                let name = copy::document_name(number);
                // Of a later run, or of one that was left out, nobody can say what it should be.
                let run = self.snapshots.with_reader(|reader| reader.run(number)).ok();
                let check = || self.progress.check();
                let uuid = &volume.config.uuid;
                let result = copy::verify(&path.join(&name), run.as_ref(), uuid, &check);
                self.report.lock().documents += 1;
                match result {
                    Ok(true) => {}
                    Ok(false) => self.report.lock().add_foreign_copy(path.join(&name)),
                    Err(e) if e.kind() == ErrorKind::Interrupted => return Err(e),
                    // An older one goes when a new one comes.
                    Err(_) if !path.join(&name).exists() => {}
                    Err(e) => {
                        let message = format!("{name}: {e}");
                        self.fault(Fault::new(Part::Copy, path.clone(), message));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Whether a manifest's first line says what the catalog says of the run.
fn is_of(head: &Head, run: &Run) -> bool {
    let mut tags = head.tags.clone();
    tags.sort_unstable();
    tags.dedup();
    let around = head.around.as_ref();
    (head.started, &head.source, &tags, &head.comment)
        == (run.started, &run.source, &run.tags, &run.comment)
        && around.is_none_or(|it| it.host == run.host && it.path == run.path.as_os_str().as_bytes())
}
