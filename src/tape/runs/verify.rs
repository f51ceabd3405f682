//! Proving a tape: every block by its name, every document by the sums that its archive ends with,
//! every archive to its end. What is found is noted beside the catalog, so that a bad copy no
//! longer counts.
//!
//! Invariant: a member is bad if it was read and is not what it should be, or cannot be read by a
//! drive that still reads the label of the tape. What stands behind damage is gone to by itself.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use super::shelf::expect_known;
use super::walk::{self, Visitor, prove, read_whole, walk};
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
use crate::tape::read::{Own, TapeFile, Visit};
use crate::tape::sums::{self, Sum, Summer};
use crate::tape::verify::unwrapped;
use crate::volume::BlockId;

/// Documents of one archive that are held until its sums come: more than a batch of ours has.
const DOCUMENTS_MAX: usize = 1 << 18;
/// Longest line of a list of sums, in bytes.
const SUMS_LINE_MAX: u64 = 16 << 10;

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
        found: Found::default(),
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
    let walked = walk(
        loaded,
        &mut work,
        &mut |filenum, error| {
            if let Some(e) = error {
                others.push((filenum, e));
            }
            Ok(())
        },
        progress,
    );
    match walked {
        Err(e) if is_of_all(&e) => return Err(e),
        // What is known of the rest of the tape is gone to by itself.
        Err(e) => work.done.note(format!("tape {}", Quoted(&work.label)), &e),
        Ok(()) => {}
    }
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
    /// Metas that are.
    metas: Vec<(u64, BlockId)>,
}

/// What was met in a tape file.
#[derive(Default)]
struct Found {
    /// The blocks that are right, and where they are.
    good: BTreeSet<(u64, BlockId)>,
    /// Their bytes.
    bytes: u64,
    /// How many blocks are not.
    wrong: usize,
    /// Documents whose sums have not come: where they are, and what they are.
    documents: BTreeMap<Vec<u8>, (u64, Sum)>,
    /// Documents that are not what was written, and where.
    bad: Vec<(u64, Vec<u8>)>,
}

struct Verify<'a> {
    tapes: Tapes,
    label: Vec<u8>,
    hash: HashAlgo,
    /// The tape files that are known.
    files: BTreeMap<u64, Known>,
    filenum: u64,
    found: Found,
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
    fn settle(&mut self, filenum: u64, Rest { bad, metas, .. }: &Rest) -> Result<()> {
        self.tapes.note_read((&self.label, filenum), bad, metas, Time::now())
    }

    /// Reads the known members that the walk has not come to.
    fn read_rest(&mut self, loaded: &mut Loaded) -> Result<()> {
        while let Some((filenum, mut rest)) = self.rest.pop_first() {
            let Some(known) = self.files.remove(&filenum) else { continue };
            let mut is_doubtful = false;
            let drive = loaded.drive();
            let gone = drive.locate(known.position);
            let mut visit = Visit::new(drive, filenum);
            let file = match gone {
                Ok(Moved::There) => visit.next_file(),
                Ok(_) => Ok(None),
                Err(e) => Err(e),
            };
            let missing = || Error::corrupt("the tape has no such archive");
            let file = file.and_then(|it| it.filter(|it| it.end().is_none()).ok_or_else(missing));
            let mut file = match file {
                Ok(file) => Some(file),
                Err(e) if is_of_all(&e) => return Err(e),
                Err(e) => {
                    is_doubtful |= e.kind() != ErrorKind::Corrupt;
                    self.note(&format!("file {filenum}"), &e);
                    None
                }
            };
            let (from, bad) = (rest.from, &mut rest.bad);
            let (hash, progress) = (self.hash, self.progress);
            let (done, label) = (&mut self.done, &self.label);
            self.tapes.members((label, filenum), &mut |it| {
                progress.check()?;
                // Documents have met no sums.
                let is_block = matches!(it.item, Item::Block(_));
                if is_block && from.is_some_and(|from| it.at.saturating_add(it.len) <= from) {
                    return Ok(());
                }
                if let Item::Document(name, _) = &it.item
                    && let Kind::Meta(_) = Kind::of(name)
                {
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
            self.settle(filenum, &rest)?;
        }
        Ok(())
    }

    /// Looks at what the archive at hand says of a document, in a line of its sums.
    fn compare(&mut self, line: &[u8]) -> Result<()> {
        let (sum, name) = sums::parse(line)?;
        if let Some((at, found)) = self.found.documents.remove(&name)
            && found != sum
        {
            let error = Error::corrupt("it is not what was written");
            self.note_file_member(&name, &error);
            self.found.bad.push((at, name));
        }
        Ok(())
    }

    fn note_file_member(&mut self, name: &[u8], error: &Error) {
        let what = format!("{}: {error}", Quoted(name));
        self.note_file(self.filenum, &Error::new(error.kind(), what));
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
    let mut left = member.len;
    read_whole(&mut Read::take(&mut *file, left), &mut |bytes| {
        hasher.update(bytes);
        left -= bytes.len() as u64;
    })?;
    if left > 0 {
        return Err(Error::corrupt("the tape file ends in the middle of it"));
    }
    match hasher.finish() == *wanted {
        true => Ok(()),
        false => Err(Error::corrupt("its bytes have another hash")),
    }
}

impl Visitor for Verify<'_> {
    fn begin(&mut self, file: &walk::File<'_>) -> Result<bool> {
        self.filenum = file.filenum;
        self.found = Found::default();
        self.failed = None;
        self.done.files += 1;
        Ok(true)
    }

    fn member(&mut self, member: &Member, at: u64, content: &mut dyn Read) -> Result<()> {
        let Kind::Block(id) = Kind::of(&member.name) else {
            match sum_of(content) {
                Ok(sum) if self.found.documents.len() < DOCUMENTS_MAX => {
                    self.found.documents.insert(member.name.clone(), (at, sum));
                }
                Ok(_) => {
                    let error = Error::corrupt("there are too many documents to compare this one");
                    self.note_file_member(&member.name, &error);
                }
                Err(e) => self.failed = Some(e),
            }
            return Ok(());
        };
        match prove(Kind::Block(id), self.hash, content) {
            Ok(true) => {
                self.found.good.insert((at, id));
                self.found.bytes += member.header.size;
            }
            Ok(false) => {
                self.note_file_member(&member.name, &Error::corrupt("its bytes have another hash"));
                self.found.wrong += 1;
            }
            // The archive ends there, and says so.
            Err(e) => self.failed = Some(e),
        }
        Ok(())
    }

    fn own(&mut self, own: Own<'_>, content: &mut dyn Read) -> Result<()> {
        if !matches!(own, Own::Sums(..)) {
            return Ok(());
        }
        let mut lines = BufReader::new(content);
        let mut line = Vec::new();
        loop {
            line.clear();
            match (&mut lines).take(SUMS_LINE_MAX).read_until(b'\n', &mut line) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(e) => {
                    self.failed = Some(unwrapped(e));
                    return Ok(());
                }
            }
            if let Err(e) = self.compare(line.strip_suffix(b"\n").unwrap_or(&line)) {
                self.note_file(self.filenum, &e);
                return Ok(());
            }
        }
    }

    /// What is known is read by itself then.
    fn goes_on(&self) -> bool {
        false
    }

    fn end(&mut self, bytes: u64, error: Option<Error>) -> Result<()> {
        let (filenum, found) = (self.filenum, std::mem::take(&mut self.found));
        self.done.blocks += found.good.len() as u64;
        self.done.bytes += found.bytes;
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
        let mut rest = Rest { from: error.as_ref().map(|_| bytes), ..Rest::default() };
        self.tapes.members((&self.label, filenum), &mut |it| {
            if let Item::Block(id) = it.item
                && rest.from.is_none_or(|from| it.at.saturating_add(it.len) <= from)
                && !found.good.contains(&(it.at, id))
            {
                rest.bad.push(it.at);
            }
            Ok(())
        })?;
        let is_another = rest.bad.len() > found.wrong;
        for (at, name) in found.bad {
            match Kind::of(&name) {
                Kind::Meta(id) => rest.metas.push((at, id)),
                _ => rest.bad.push(at),
            }
        }
        match error {
            Some(e) if is_cut => log::info!("tape file {filenum} has no end: {e}"),
            Some(e) => {
                self.note_file(filenum, &e);
                self.rest.insert(filenum, rest);
                return Ok(());
            }
            None if is_another => {
                let what = "it is another archive than the one that is known";
                self.note_file(filenum, &Error::corrupt(what));
            }
            None => {}
        }
        self.rest.remove(&filenum);
        self.settle(filenum, &rest)
    }
}

/// The sum of a content.
fn sum_of(content: &mut dyn Read) -> Result<Sum> {
    let mut summer = Summer::default();
    read_whole(content, &mut |bytes| summer.add(bytes))?;
    Ok(summer.sum())
}
