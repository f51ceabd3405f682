//! Proving a tape: every block by its name, every archive to its end. What is found is noted beside
//! the catalog, so that a bad copy no longer counts.
//!
//! Invariant: a member is bad if it was read and is not what it should be, or cannot be read by a
//! drive that still reads the label of the tape. What stands behind damage is gone to by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;

use super::shelf::expect_known;
use super::walk::{self, Visitor, prove, walk};
use super::{Kind, PROBLEMS_MAX};
use crate::catalog::Reader;
use crate::catalog::tapes::{Item, Member as Noted, TapeFile as Known, Tapes};
use crate::chunk::HashAlgo;
use crate::error::{Error, ErrorKind, Problem, Quoted, Result};
use crate::progress::Progress;
use crate::sys::Time;
use crate::tape::cpio::Member;
use crate::tape::drive::Moved;
use crate::tape::loaded::Loaded;
use crate::tape::read::{TapeFile, Visit};
use crate::tape::verify::unwrapped;
use crate::volume::BlockId;

/// What came of it.
#[derive(Debug, Default)]
pub struct Verified {
    /// Tape files that were read.
    pub files: u64,
    /// Blocks that are right.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What is not right, each named; at most a thousand.
    pub problems: Vec<Problem>,
    /// How much of it there is.
    pub problem_count: u64,
}

impl Verified {
    /// Notes what is not right.
    pub fn note(&mut self, name: impl Into<Vec<u8>>, error: &Error) {
        let problem = Problem::new(name, error);
        log::warn!("{problem}");
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }
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
    let tapes = Tapes::open(catalog)?;
    expect_known(loaded, tapes.tape(&label)?.as_ref())?;
    let files = tapes.files(&label)?.into_iter().map(|it| (it.filenum, it)).collect();
    let mut work = Verify {
        tapes,
        label,
        hash,
        files,
        filenum: 0,
        found: BTreeSet::new(),
        wrong: 0,
        failed: None,
        rest: BTreeMap::new(),
        done: Verified::default(),
        progress,
    };
    // Of what is not come to, everything is left to be looked for.
    let whole = |it: &u64| (*it, Rest::default());
    work.rest = work.files.keys().map(whole).collect();
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
        work.note_file(filenum, &e);
    }
    work.read_rest(loaded)?;
    progress.set_phase("done");
    Ok(work.done)
}

/// What the walk has left of a tape file.
#[derive(Default)]
struct Rest {
    /// The byte at which it was broken off; `None` if it was not come to at all.
    from: Option<u64>,
    /// Members before it that are bad, by their places.
    bad: Vec<u64>,
}

struct Verify<'a> {
    tapes: Tapes,
    label: Vec<u8>,
    hash: HashAlgo,
    /// The tape files that are known.
    files: BTreeMap<u64, Known>,
    filenum: u64,
    /// The blocks that are right, and where they are.
    found: BTreeSet<(u64, BlockId)>,
    /// How many of this tape file are not.
    wrong: usize,
    /// What has broken off the archive, if that was in the content of a member.
    failed: Option<Error>,
    /// Tape files that are not settled.
    rest: BTreeMap<u64, Rest>,
    done: Verified,
    progress: &'a Progress,
}

impl Verify<'_> {
    fn note(&mut self, what: &str, error: &Error) {
        self.done.note(format!("tape {}, {what}", Quoted(&self.label)), error);
    }

    /// Notes what is wrong with a tape file. Of one that is not known, like what a writer that was
    /// killed has left, nobody misses anything.
    fn note_file(&mut self, filenum: u64, error: &Error) {
        match self.files.contains_key(&filenum) {
            true => self.note(&format!("file {filenum}"), error),
            false => {
                let label = Quoted(&self.label);
                log::warn!("tape {label}, file {filenum}, which nobody knows of: {error}");
            }
        }
    }

    /// Notes which members of a tape file are bad.
    fn settle(&mut self, filenum: u64, bad: &[u64]) -> Result<()> {
        self.tapes.note_read((&self.label, filenum), bad, Time::now())
    }

    /// Reads the known members that the walk has not come to.
    fn read_rest(&mut self, loaded: &mut Loaded) -> Result<()> {
        while let Some((filenum, Rest { from, mut bad })) = self.rest.pop_first() {
            let Some(known) = self.files.remove(&filenum) else { continue };
            let mut is_doubtful = false;
            let drive = loaded.drive();
            let is_there = drive.locate(known.position)? == Moved::There;
            let mut visit = Visit::new(drive, filenum);
            let mut file = if is_there { visit.next_file()? } else { None };
            if file.as_ref().is_none_or(|it| it.end().is_some()) {
                let error = Error::corrupt("the tape has no such archive");
                self.note(&format!("file {filenum}"), &error);
                file = None;
            }
            let (hash, progress) = (self.hash, self.progress);
            let (done, label) = (&mut self.done, &self.label);
            self.tapes.members((label, filenum), &mut |it| {
                progress.check()?;
                if from.is_some_and(|from| it.at.saturating_add(it.len) <= from) {
                    return Ok(());
                }
                let Some(file) = &mut file else {
                    bad.push(it.at);
                    return Ok(());
                };
                let name = match &it.item {
                    Item::Block(id) => format!("block {id}"),
                    Item::Document(name, _) => Quoted(name).to_string(),
                };
                match prove_at(file, &it, hash) {
                    Ok(()) => {
                        if let Item::Block(_) = it.item {
                            done.blocks += 1;
                            done.bytes += it.len;
                        }
                    }
                    Err(e) if is_of_all(&e) => return Err(e),
                    Err(e) => {
                        is_doubtful |= e.kind() != ErrorKind::Corrupt;
                        bad.push(it.at);
                        done.note(format!("tape {}, file {filenum}: {name}", Quoted(label)), &e);
                    }
                }
                Progress::add(&progress.bytes, it.len);
                Ok(())
            })?;
            if is_doubtful {
                // A drive that reads nothing any more says nothing of the tape.
                loaded.again()?;
            }
            self.settle(filenum, &bad)?;
        }
        Ok(())
    }
}

/// Whether every other member would fail in the same way.
fn is_of_all(error: &Error) -> bool {
    error.is_shortage() || error.kind() == ErrorKind::Interrupted
}

/// Reads a member that is known, by itself, and compares it with its name.
fn prove_at(file: &mut TapeFile<'_, '_>, member: &Noted, hash: HashAlgo) -> Result<()> {
    file.seek_to(member.at)?;
    let (mut hasher, wanted) = match &member.item {
        Item::Block(id) => (hash.hasher(), id),
        Item::Document(_, digest) => (HashAlgo::Blake3.hasher(), digest),
    };
    let mut buffer = vec![0; 256 << 10];
    let mut left = member.len;
    while left > 0 {
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let len = match file.read(buffer.get_mut(..len).unwrap_or_default()) {
            Ok(0) => return Err(Error::corrupt("the tape file ends in the middle of it")),
            Ok(len) => len,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(unwrapped(e)),
        };
        hasher.update(buffer.get(..len).unwrap_or_default());
        left -= len as u64;
    }
    match hasher.finish() == *wanted {
        true => Ok(()),
        false => Err(Error::corrupt("its bytes have another hash")),
    }
}

impl Visitor for Verify<'_> {
    fn begin(&mut self, file: &walk::File<'_>) -> Result<bool> {
        self.filenum = file.filenum;
        self.found.clear();
        (self.wrong, self.failed) = (0, None);
        self.done.files += 1;
        Ok(true)
    }

    fn member(&mut self, member: &Member, at: u64, content: &mut dyn Read) -> Result<()> {
        let kind = Kind::of(&member.name);
        match (kind, prove(kind, self.hash, content)) {
            (Kind::Block(id), Ok(true)) => {
                self.found.insert((at, id));
                self.done.blocks += 1;
                self.done.bytes += member.header.size;
            }
            (Kind::Block(id), Ok(false)) => {
                let error = Error::corrupt(format!("block {id}: its bytes have another hash"));
                self.note_file(self.filenum, &error);
                self.wrong += 1;
            }
            // The archive ends there, and says so.
            (_, Err(e)) => self.failed = Some(e),
            (_, Ok(_)) => {}
        }
        Ok(())
    }

    /// What is known is read by itself then.
    fn goes_on(&self) -> bool {
        false
    }

    fn end(&mut self, bytes: u64, error: Option<Error>) -> Result<()> {
        let (filenum, found) = (self.filenum, std::mem::take(&mut self.found));
        let error = match error.map(|it| self.failed.take().unwrap_or(it)) {
            Some(e) if is_of_all(&e) => return Err(e),
            error => error,
        };
        let Some(known) = self.files.get(&filenum) else {
            if let Some(e) = error {
                self.note_file(filenum, &e);
            }
            return Ok(());
        };
        // A tape that can only be appended to has an archive without an end, where it was full.
        let is_cut = error.is_some() && bytes >= known.bytes;
        let mut rest = Rest { from: error.as_ref().map(|_| bytes), bad: Vec::new() };
        self.tapes.members((&self.label, filenum), &mut |it| {
            if let Item::Block(id) = it.item
                && rest.from.is_none_or(|from| it.at.saturating_add(it.len) <= from)
                && !found.contains(&(it.at, id))
            {
                rest.bad.push(it.at);
            }
            Ok(())
        })?;
        match error {
            Some(e) if is_cut => log::info!("tape file {filenum} has no end: {e}"),
            Some(e) => {
                self.note_file(filenum, &e);
                self.rest.insert(filenum, rest);
                return Ok(());
            }
            None if rest.bad.len() > self.wrong => {
                let what = "it is another archive than the one that is known";
                self.note_file(filenum, &Error::corrupt(what));
            }
            None => {}
        }
        self.rest.remove(&filenum);
        self.settle(filenum, &rest.bad)
    }
}
