//! What is known of a catalog's tapes, made anew from the results in the spool.
//!
//! Invariant: a tape file counts if the log of its tape has it too. What a tape held before it was
//! written from its beginning is in results still, and on no tape.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{Members, Noter, is_of};
use crate::error::{ErrorKind, Quoted, Result};
use crate::progress::Progress;
use crate::tape::spool::Spool;
use crate::tape::spool::batch::BatchStatus;
use crate::tape::spool::job::JobKind;
use crate::tape::spool::log::TapeFile;
use crate::tape::write::Written;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Indexed {
    /// Tapes of this catalog that the spool knows.
    pub tapes: u64,
    /// Tape files on them.
    pub files: u64,
    /// Tapes of which the spool's results tell nothing: what was known of them is kept.
    pub kept: u64,
    /// Tape files in results that are on no tape any more.
    pub gone: u64,
}

impl Indexed {
    /// What was found, in a line.
    pub fn line(&self) -> String {
        let Indexed { tapes, files, kept, gone } = self;
        let mut line = format!("{files} tape files on {tapes} tapes");
        if *kept > 0 {
            line.push_str(&format!("; kept what was known of {kept} other tapes"));
        }
        if *gone > 0 {
            line.push_str(&format!("; {gone} tape files were overwritten since"));
        }
        line
    }
}

/// Makes it anew, beside what is there, which is replaced when all of it is found.
pub fn index(catalog: &Path, spool: &Spool, progress: &Progress) -> Result<Indexed> {
    progress.set_phase("reading results");
    match super::note_written_over(spool, catalog) {
        // That is what it is made anew for.
        Err(e) if e.kind() == ErrorKind::Corrupt => {}
        noted => noted?,
    }
    let members = Members::open(catalog)?;
    let mut written = Vec::new();
    for uuid in spool.jobs(true)? {
        let job = spool.job(&uuid)?;
        if job.kind() != JobKind::Write || !is_of(&job, catalog, members.reader())? {
            continue;
        }
        for id in job.batches()?.into_iter().filter(|it| it.status != BatchStatus::Pending) {
            progress.check()?;
            written.extend(Written::of(&job, id)?);
        }
    }
    // In the order in which they came to their tapes.
    written.sort_by_key(|it| (it.end, it.tape.clone(), it.filenum));
    let mut noter = Noter::anew(catalog, &members)?;
    let mut logs: BTreeMap<Vec<u8>, BTreeSet<TapeKey>> = BTreeMap::new();
    let mut indexed = Indexed::default();
    for it in &written {
        progress.check()?;
        if !logs.contains_key(&it.tape) {
            logs.insert(it.tape.clone(), log_of(spool, &it.tape)?);
        }
        let key = (it.filenum, it.position, it.job.clone(), it.batch);
        if !logs.get(&it.tape).is_some_and(|log| log.contains(&key)) {
            log::info!("file {} of tape {} is gone", it.filenum, Quoted(&it.tape));
            indexed.gone += 1;
            continue;
        }
        noter.put(spool, &spool.job(&it.job)?, it, BTreeMap::new())?;
        indexed.files += 1;
        Progress::add(&progress.entries, 1);
    }
    (indexed.tapes, indexed.kept) = noter.replace(spool)?;
    progress.set_phase("done");
    Ok(indexed)
}

/// A file of a tape: number, position, job and batch.
type TapeKey = (u64, u64, String, u64);

/// What the log of a tape has.
fn log_of(spool: &Spool, label: &[u8]) -> Result<BTreeSet<TapeKey>> {
    let mut found = BTreeSet::new();
    let Some(tape) = spool.tape(label)? else { return Ok(found) };
    if tape.label()?.is_some() {
        tape.files(&mut |TapeFile { filenum, position, job, batch }| {
            found.insert((filenum, position, job, batch));
            Ok(())
        })?;
    }
    Ok(found)
}
