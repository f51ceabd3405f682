//! Completing what stands beside the blocks: metas and manifests that are missing, damaged or out
//! of date are made anew from the catalog.
//!
//! What is as it should be is read and left alone, so a second time writes nothing. Each document
//! is replaced as a whole. Holds the writer's lock: nothing may change while it is described.

mod manifests;

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::catalog::{Reader, Writer, meta};
use crate::chunk::HashAlgo;
use crate::error::{Error, Problem, Result};
use crate::progress::Progress;
use crate::sys::quoted;
use crate::volume::{BlockIndex, Volume, Volumes};

/// Blocks taken from the catalog at a time.
const PAGE_BLOCKS: u64 = 1024;
/// Problems that are kept with their texts; more are counted.
const PROBLEMS_MAX: usize = 1000;

/// What came of it.
#[derive(Debug, Default)]
pub struct Summary {
    /// Metas that were looked at.
    pub metas: u64,
    /// Metas that were written.
    pub metas_written: u64,
    /// Manifests that were looked at.
    pub manifests: u64,
    /// Manifests that were written.
    pub manifests_written: u64,
    /// What could not be done, each named; at most a thousand.
    pub problems: Vec<Problem>,
    /// How much could not be done.
    pub problem_count: u64,
}

impl Summary {
    /// What came of it, in a line.
    pub fn line(&self) -> String {
        let mut line = format!(
            "wrote {} of {} metas, {} of {} manifests",
            self.metas_written, self.metas, self.manifests_written, self.manifests
        );
        if self.problem_count > 0 {
            line.push_str(&format!("; {} problems", self.problem_count));
        }
        line
    }
}

/// Completes the metas and manifests of every volume that is there.
pub fn run(catalog: &Path, progress: &Progress) -> Result<Summary> {
    progress.set_phase("preparing");
    let mut writer = Writer::open(catalog)?;
    let volumes = Volumes::open(writer.volumes()?);
    let mut work = Work {
        reader: Reader::open(catalog)?,
        hash: writer.settings()?.hash,
        progress,
        dir: catalog.parent().unwrap_or(Path::new("/")),
        summary: Summary::default(),
    };
    for (config, reason) in volumes.missing() {
        let message = format!("volume {}: {reason}", quoted(&config.path));
        work.note(config.path.as_os_str().as_bytes(), &Error::new(reason.kind(), message));
    }
    let runs = work.reader.runs()?;
    let totals = work.reader.totals()?;
    Progress::add(&progress.entries_total, totals.blocks + runs.len() as u64);
    for volume in volumes.present() {
        progress.set_phase("writing metas");
        volume.refresh_guide();
        let facts = writer.facts_of(volume.config.number)?;
        let result = volume.refresh_manifest(facts).and_then(|()| work.metas(volume));
        work.settle(volume, result)?;
    }
    progress.set_phase("writing manifests");
    manifests::complete(&mut work, &mut writer, &runs, &volumes)?;
    progress.set_phase("done");
    Ok(work.summary)
}

struct Work<'a> {
    reader: Reader,
    hash: HashAlgo,
    progress: &'a Progress,
    /// Where temporary files go.
    dir: &'a Path,
    summary: Summary,
}

impl Work<'_> {
    fn note(&mut self, path: &[u8], error: &Error) {
        let problem = Problem::new(path, error);
        log::warn!("{problem}");
        self.progress.note(&problem);
        self.summary.problem_count += 1;
        if self.summary.problems.len() < PROBLEMS_MAX {
            self.summary.problems.push(problem);
        }
    }

    /// A volume's trouble is told, and the others go on; a wish to stop ends everything.
    fn settle(&mut self, volume: &Volume, result: Result<()>) -> Result<()> {
        self.progress.check()?;
        if let Err(e) = result {
            self.note(volume.config.path.as_os_str().as_bytes(), &e);
        }
        Ok(())
    }

    fn metas(&mut self, volume: &Volume) -> Result<()> {
        let mut names = meta::DirNames::default();
        let mut after = 0;
        loop {
            let page = self.reader.copies_on(volume.config.number, after, PAGE_BLOCKS)?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last.block;
            let mut documents = volume.documents();
            let mut written = Vec::new();
            for due in page {
                self.progress.check()?;
                Progress::add(&self.progress.entries, 1);
                self.summary.metas += 1;
                let index = match volume.index_record(due.record_at) {
                    Ok(index) => index,
                    Err(e) => {
                        // One damaged record costs one meta.
                        self.note(volume.config.path.as_os_str().as_bytes(), &e);
                        continue;
                    }
                };
                if self.is_current(volume, &index, &mut names)? {
                    continue;
                }
                let (reader, hash, progress) = (&self.reader, self.hash, self.progress);
                documents.add(&meta::document_name(&index.id), |out| {
                    let mut out = Stopping { out, progress };
                    reader.write_meta(&index, hash, &mut names, &mut out)
                })?;
                written.push(index.id);
            }
            documents.finish()?;
            self.summary.metas_written += written.len() as u64;
            for id in written {
                volume.remove_document(&meta::former_name(&id))?;
            }
        }
    }

    /// Whether a block's meta says what it would say now.
    fn is_current(
        &self,
        volume: &Volume,
        index: &BlockIndex,
        names: &mut meta::DirNames,
    ) -> Result<bool> {
        let path = volume.document_path(&meta::document_name(&index.id));
        let Ok(file) = File::open(path) else { return Ok(false) };
        let Ok(text) = zstd::Decoder::new(file) else { return Ok(false) };
        let mut same = Same { text: BufReader::new(text), differs: false };
        let mut out = Stopping { out: &mut same, progress: self.progress };
        let result = self.reader.write_meta_text(index, self.hash, names, &mut out);
        match result {
            _ if same.differs => Ok(false),
            Err(e) => Err(e),
            Ok(()) => Ok(matches!(same.text.read(&mut [0]), Ok(0))),
        }
    }
}

/// Takes what is written until the work is to stop.
struct Stopping<'a> {
    out: &'a mut dyn Write,
    progress: &'a Progress,
}

impl Write for Stopping<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Not as an interrupted call, which would be made again.
        self.progress.check().map_err(io::Error::other)?;
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Takes what is written only as long as it is what a text has too.
struct Same<R> {
    text: R,
    differs: bool,
}

impl<R: Read> Write for Same<R> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut there = [0; 4096];
        let len = bytes.len().min(there.len());
        let (Some(there), Some(bytes)) = (there.get_mut(..len), bytes.get(..len)) else {
            return Ok(0);
        };
        match self.text.read_exact(there) {
            Ok(()) if there == bytes => Ok(len),
            _ => {
                self.differs = true;
                Err(io::Error::other("it differs"))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_to_stop_is_heard_between_two_writes() {
        let (progress, mut out) = (Progress::default(), Vec::new());
        let mut stopping = Stopping { out: &mut out, progress: &progress };
        stopping.write_all(b"one").unwrap();
        progress.cancel();
        assert!(stopping.write_all(b"two").is_err());
        assert_eq!(out, b"one");
    }
}
