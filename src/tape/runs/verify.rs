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

/// What the walk has found out of a tape file, and what it has left.
#[derive(Default)]
struct Rest {
    /// Places of blocks that are right.
    good: BTreeSet<u64>,
    /// Places of members that are bad.
    bad: BTreeSet<u64>,
    /// Metas that are.
    metas: Vec<(u64, BlockId)>,
    /// Its sums were read, and tell of all metas.
    is_whole: bool,
}

/// What was met in a tape file.
#[derive(Default)]
struct Found {
    /// The blocks that are right, and where they are.
    good: BTreeSet<(u64, BlockId)>,
    /// Their bytes.
    bytes: u64,
    /// Places of blocks that are not.
    wrong: BTreeSet<u64>,
    /// Documents whose sums have not come: where they are, and what they are.
    documents: BTreeMap<Vec<u8>, (u64, Sum)>,
    /// Documents that are not what was written, with their places, or that are not there.
    bad: Vec<(Option<u64>, Vec<u8>)>,
    /// The list of sums was read to its end.
    has_sums: bool,
    /// What the archive begins with is damaged.
    is_head_bad: bool,
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
    fn settle(&mut self, filenum: u64, rest: &Rest) -> Result<()> {
        let bad: Vec<u64> = rest.bad.iter().copied().collect();
        let found = (&*bad, &*rest.metas);
        self.tapes.note_read((&self.label, filenum), found, rest.is_whole, Time::now())
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
            let (good, bad) = (&rest.good, &mut rest.bad);
            let (hash, progress) = (self.hash, self.progress);
            let (done, label) = (&mut self.done, &self.label);
            self.tapes.members((label, filenum), &mut |it| {
                progress.check()?;
                if good.contains(&it.at) || bad.contains(&it.at) {
                    return Ok(());
                }
                if let Item::Document(name, _) = &it.item
                    && let Kind::Meta(_) = Kind::of(name)
                {
                    return Ok(());
                }
                let Some(file) = &mut file else {
                    bad.insert(it.at);
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
                        bad.insert(it.at);
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
        let kind = Kind::of(&name);
        let (at, what) = match self.found.documents.remove(&name) {
            Some((_, found)) if found == sum => return Ok(()),
            Some((at, _)) => (Some(at), "it is not what was written"),
            // Blocks are known by their places.
            None if matches!(kind, Kind::Block(_) | Kind::Other) => return Ok(()),
            None => (None, "it is not there, and was written"),
        };
        self.note_file_member(&name, &Error::corrupt(what));
        self.found.bad.push((at, name));
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
        if let Some(e) = &file.head.damage {
            self.note_file(file.filenum, e);
            self.found.is_head_bad = true;
        }
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
                Err(e) => drop(self.failed.get_or_insert(e)),
            }
            return Ok(());
        };
        match prove(Kind::Block(id), self.hash, content) {
            Ok(true) => {
                self.found.good.insert((at, id));
                self.found.bytes += member.header.size;
            }
            Ok(false) => {
                let error = Error::corrupt("its bytes have another hash");
                self.note_file_member(&member.name, &error);
                self.found.wrong.insert(at);
            }
            // The archive is broken there, and says so.
            Err(e) => drop(self.failed.get_or_insert(e)),
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
                Ok(0) => {
                    self.found.has_sums = true;
                    return Ok(());
                }
                Ok(_) => {}
                Err(e) => {
                    self.failed.get_or_insert(unwrapped(e));
                    return Ok(());
                }
            }
            if let Err(e) = self.compare(line.strip_suffix(b"\n").unwrap_or(&line)) {
                self.note_file(self.filenum, &e);
                return Ok(());
            }
        }
    }

    /// What is known is read by itself; but the sums tell which metas there should be.
    fn goes_on(&self) -> bool {
        true
    }

    fn end(&mut self, _bytes: u64, error: Option<(u64, Error)>) -> Result<()> {
        let (filenum, found) = (self.filenum, std::mem::take(&mut self.found));
        self.done.blocks += found.good.len() as u64;
        self.done.bytes += found.bytes;
        let error = match error.map(|(at, e)| (at, self.failed.take().unwrap_or(e))) {
            Some((_, e)) if is_of_all(&e) => return Err(e),
            error => error,
        };
        let Some(known) = self.files.get(&filenum) else {
            if let Some((_, e)) = error {
                self.note_file(filenum, &e);
            }
            return Ok(());
        };
        // A tape that can only be appended to has an archive without an end, where it was full.
        let is_cut = error.as_ref().is_some_and(|it| it.0 >= known.bytes);
        let is_broken = found.is_head_bad || error.is_some() && !is_cut;
        let is_whole = found.has_sums && error.is_none() && !is_broken;
        let mut rest = Rest { bad: found.wrong.clone(), is_whole, ..Rest::default() };
        let lacking: BTreeSet<&[u8]> = found.bad.iter().map(|it| &*it.1).collect();
        let mut is_another = false;
        self.tapes.members((&self.label, filenum), &mut |it| {
            match &it.item {
                Item::Block(id) if found.good.contains(&(it.at, *id)) => {
                    rest.good.insert(it.at);
                }
                Item::Block(_) if !is_broken => {
                    is_another |= rest.bad.insert(it.at);
                }
                Item::Document(name, _) if lacking.contains(&**name) => {
                    rest.bad.insert(it.at);
                }
                _ => {}
            }
            Ok(())
        })?;
        // Those that are not there have places that no other member has.
        let mut nowhere = i64::MAX.cast_unsigned();
        for (at, name) in &found.bad {
            if let Kind::Meta(id) = Kind::of(name) {
                rest.metas.push((at.unwrap_or(nowhere), id));
                nowhere -= 1;
            }
        }
        match error {
            Some((_, e)) if is_cut => log::info!("tape file {filenum} has no end: {e}"),
            Some((_, e)) => self.note_file(filenum, &e),
            None => {}
        }
        if is_broken {
            self.rest.insert(filenum, rest);
            return Ok(());
        }
        if is_another {
            let what = "it is another archive than the one that is known";
            self.note_file(filenum, &Error::corrupt(what));
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
