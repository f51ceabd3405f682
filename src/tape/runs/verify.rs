//! Proving a tape: every block by its name, every archive to its end. What is found is noted beside
//! the catalog, so that a bad copy no longer counts.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

use super::Kind;
use super::walk::{self, Visitor, prove, walk};
use crate::catalog::Reader;
use crate::catalog::tapes::{Item, Tapes};
use crate::chunk::HashAlgo;
use crate::error::{Error, ErrorKind, Problem, Quoted, Result};
use crate::progress::Progress;
use crate::sys::Time;
use crate::tape::cpio::Member;
use crate::tape::loaded::Loaded;

/// What came of it.
#[derive(Debug, Default)]
pub struct Verified {
    /// Tape files that were read.
    pub files: u64,
    /// Blocks that are right.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What is not right, each named.
    pub problems: Vec<Problem>,
}

/// Reads the tape in a drive whole.
pub fn verify(catalog: &Path, loaded: &mut Loaded, progress: &Progress) -> Result<Verified> {
    let label = match loaded.label() {
        Some(label) => label.text().to_vec(),
        None => {
            let what = format!("{} is in the drive: it has no label of ours", loaded.describe());
            return Err(Error::new(ErrorKind::WrongTape, what));
        }
    };
    let hash = Reader::open(catalog)?.settings()?.hash;
    let mut work = Verify {
        tapes: Tapes::open(catalog)?,
        label,
        hash,
        filenum: 0,
        found: BTreeSet::new(),
        seen: BTreeSet::new(),
        done: Verified::default(),
    };
    progress.set_phase("reading the tape");
    let mut others = Vec::new();
    walk(
        loaded,
        &mut work,
        &mut |filenum, error| {
            if let Some(e) = error {
                others.push((filenum, e));
            }
            Ok(())
        },
        progress,
    )?;
    for (filenum, e) in others {
        work.note(format!("file {filenum}"), &e);
    }
    // What should be there and was not come to.
    for file in work.tapes.files(&work.label)? {
        if !work.seen.contains(&file.filenum) {
            let error = Error::corrupt("the tape has no such archive");
            work.note(format!("file {}", file.filenum), &error);
            work.settle(file.filenum, &BTreeSet::new())?;
        }
    }
    progress.set_phase("done");
    Ok(work.done)
}

struct Verify {
    tapes: Tapes,
    label: Vec<u8>,
    hash: HashAlgo,
    filenum: u64,
    /// Where the blocks are that are right.
    found: BTreeSet<u64>,
    seen: BTreeSet<u64>,
    done: Verified,
}

impl Verify {
    fn note(&mut self, what: String, error: &Error) {
        let problem = Problem::new(format!("tape {}, {what}", Quoted(&self.label)), error);
        log::warn!("{problem}");
        self.done.problems.push(problem);
    }

    /// Notes which blocks of a tape file are right: `good` by their places.
    fn settle(&mut self, filenum: u64, good: &BTreeSet<u64>) -> Result<()> {
        let mut bad = Vec::new();
        self.tapes.members((&self.label, filenum), &mut |it| {
            if matches!(it.item, Item::Block(_)) && !good.contains(&it.at) {
                bad.push(it.at);
            }
            Ok(())
        })?;
        match self.tapes.note_read((&self.label, filenum), &bad, Time::now()) {
            // Not of this catalog.
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            noted => noted,
        }
    }
}

impl Visitor for Verify {
    fn begin(&mut self, file: &walk::File<'_>) -> Result<bool> {
        self.filenum = file.filenum;
        self.found.clear();
        self.seen.insert(file.filenum);
        self.done.files += 1;
        Ok(true)
    }

    fn member(&mut self, member: &Member, at: u64, content: &mut dyn Read) -> Result<()> {
        let kind = Kind::of(&member.name);
        match (kind, prove(kind, self.hash, content)) {
            (Kind::Block(_), Ok(true)) => {
                self.found.insert(at);
                self.done.blocks += 1;
                self.done.bytes += member.header.size;
            }
            (Kind::Block(id), Ok(false)) => {
                let error = Error::corrupt("its bytes have another hash");
                self.note(format!("file {}: block {id}", self.filenum), &error);
            }
            // The archive ends there, and says so.
            (_, Err(e)) => log::debug!("{e}"),
            (_, Ok(_)) => {}
        }
        Ok(())
    }

    fn end(&mut self, _bytes: u64, error: Option<Error>) -> Result<()> {
        let found = std::mem::take(&mut self.found);
        if let Some(e) = error {
            self.note(format!("file {}", self.filenum), &e);
        }
        self.settle(self.filenum, &found)
    }
}
