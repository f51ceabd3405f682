//! Reading batches back: whole or some files of them, into a directory or only to prove them.
//!
//! Invariant: a batch is noted as read when all of it was read and nothing was wrong with it, and
//! what was written below the directory is on the disk by then. A file that turns out not to be
//! what was written is told, and loses its name.

use std::io::{self, Read};

use super::cpio::{Member, Reader};
use super::drive::Access;
use super::extract::Target;
use super::load::{self, AskFor};
use super::loaded::Loaded;
use super::outcomes::{Each, Outcomes, Sums};
use super::read::{TapeFile, Visit};
use super::recorded::{Cut, Place, Recorded, place_of};
use super::seek;
use super::spill::Spill;
use super::spool::Spool;
use super::spool::batch::{BatchId, BatchStatus, Results, Summary};
use super::spool::drive::TakenDrive;
use super::spool::job::OpenJob;
use super::verify::{self, About, Finding, is_same_name, take_content, walk};
use crate::error::{Error, ErrorKind, Problem, Quoted, Result};
use crate::progress::Progress;
use crate::sys::{Time, c};

/// What is read over to get to a file. Beyond it the drive goes there.
const SKIP_BYTES: u64 = 64 << 20;

/// What was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Batches that were read whole and are as they were written.
    pub batches: u64,
    /// Files that are as they were written.
    pub files: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Files that have failed, and whatever else was wrong.
    pub errors: u64,
    /// Of the errors, files that were not whole when they were written: what is on tape of them is
    /// as it was written, and is not given out as the file.
    pub partial: u64,
    /// Of the files, those for which there are no sums: only their lengths are known to be right.
    pub unsummed: u64,
}

/// Whether a file is wanted, by its name.
pub type IsWanted<'a> = dyn Fn(&[u8]) -> bool + 'a;

/// Reads batches.
pub struct Reading<'a> {
    /// The spool.
    pub spool: &'a Spool,
    /// The drive.
    pub taken: &'a TakenDrive,
    /// The tape in it, when it has been looked at.
    pub loaded: Option<Loaded>,
    /// Asks a person for a tape, where there is no changer.
    pub ask: Option<&'a mut AskFor<'a>>,
    /// Where files go.
    pub target: Option<Target>,
    /// The wish to stop; problems.
    pub progress: &'a Progress,
    /// What was read.
    pub tally: Tally,
}

pub(super) fn errno_of(error: &Error) -> i32 {
    error.errno().unwrap_or(match error.kind() {
        ErrorKind::Denied => c::EACCES,
        ErrorKind::NotFound => c::ENOENT,
        ErrorKind::WrongTape => c::ENOMEDIUM,
        _ => c::EIO,
    })
}

/// Whether what has failed for one batch fails for the others too.
pub fn ends_all(error: &Error) -> bool {
    error.is_shortage() || matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Interrupted)
}

/// Writes a file below the directory, if there is one. Inside, what has gone wrong with it.
fn put(
    target: &mut Option<Target>,
    member: &Member,
    content: &mut dyn Read,
) -> Result<std::result::Result<(), Error>> {
    match target.as_mut().map_or(Ok(()), |it| it.put(member, content)) {
        // All others would fail as well.
        Err(e) if e.kind() == ErrorKind::NoSpace => Err(e),
        done => Ok(done),
    }
}

/// Takes its name from a file that was made, and is not what was written.
fn set_aside(target: &mut Option<Target>, progress: &Progress, name: &[u8]) {
    if let Some(target) = target
        && let Err(e) = target.set_damaged(name)
    {
        progress.note(&Problem::new(name, &e));
    }
}

/// Refuses a file of which only a name was made.
fn look_for_content(target: &mut Option<Target>, name: &[u8], nlink: u64) -> Result<()> {
    if nlink < 2 || !target.as_mut().is_some_and(|it| it.lacks_content(name, nlink)) {
        return Ok(());
    }
    let what = "it is empty, and its content may be with another name: read the batch as a whole";
    Err(Error::new(ErrorKind::Io, what))
}

/// What the spool knows of an archive.
#[derive(Default)]
struct Known<'a> {
    job: Option<(String, u64)>,
    recorded: Option<&'a mut verify::Recorded<'a>>,
    has_all: bool,
    cut: Option<Cut>,
}

impl Reading<'_> {
    pub(super) fn problem(&self, path: &[u8], error: &Error) {
        self.progress.note(&Problem::new(path, error));
    }

    /// Brings a tape into the drive, if it is not there.
    pub(super) fn need(&mut self, tape: &[u8]) -> Result<()> {
        if let Some(loaded) = self.loaded.take() {
            if loaded.label().is_some_and(|it| it.text() == tape) {
                self.loaded = Some(loaded);
                return Ok(());
            }
            loaded.close()?;
        }
        let ask = self.ask.as_deref_mut();
        let loaded = load::load(self.spool, self.taken, tape, ask, Access::Read)?;
        self.loaded = Some(loaded);
        Ok(())
    }

    /// Does something with a tape file, which is told what to call it.
    pub(super) fn with_file<T>(
        &mut self,
        filenum: u64,
        position: Option<u64>,
        act: impl FnOnce(&mut Self, &mut TapeFile<'_, '_>, &str) -> Result<T>,
    ) -> Result<T> {
        let mut loaded = match self.loaded.take() {
            Some(loaded) => loaded,
            None => load::open_noted(self.spool, self.taken, Access::Read)?,
        };
        if let Some(target) = &mut self.target {
            target.begin_archive();
        }
        let name = format!("{} file {filenum}", loaded.describe());
        let drive = loaded.drive();
        let done = seek::to_file(drive, filenum, position).and_then(|()| {
            let mut visit = Visit::new(drive, filenum);
            let file = visit.next_file()?;
            let missing = || Error::new(ErrorKind::NotFound, "the tape ends before it");
            let mut file = file.ok_or_else(missing)?;
            act(self, &mut file, &name)
        });
        self.loaded = Some(loaded);
        done.map_err(|e| e.context(name))
    }

    /// Reads a tape file of which nothing is known; all of it, or the files that are wanted.
    pub fn tape_file(&mut self, filenum: u64, is_wanted: Option<&IsWanted<'_>>) -> Result<()> {
        let outcomes = self.with_file(filenum, None, |this, file, name| {
            this.walk_file(file, name, Known::default(), is_wanted)
        })?;
        self.count(outcomes, is_wanted, &mut |_, _, _| Ok(()))
    }

    /// Reads a batch of a job that was written; all of it, or the files that are wanted.
    pub fn batch(
        &mut self,
        job: &mut OpenJob,
        id: BatchId,
        is_wanted: Option<&IsWanted<'_>>,
    ) -> Result<()> {
        let begin = Time::now().secs;
        let place = place_of(self.spool, job, id)?;
        self.need(&place.tape)?;
        let before = self.tally;
        let mut recorded = Recorded::open(job, id, &place)?;
        let key = (job.uuid().to_owned(), id.number);
        let outcomes = match (&mut recorded, is_wanted) {
            (Some(recorded), Some(is_wanted)) => {
                let mut sums = Sums::open(&job.sums_path(id.number));
                let mut next = || loop {
                    match recorded.next_file()? {
                        Some(file) if !is_wanted(&file.1) => {}
                        found => return Ok(found),
                    }
                };
                self.with_file(place.filenum, place.position, |this, file, _| {
                    this.pick(file, &mut next, &mut sums)
                })?
            }
            (recorded, _) => {
                let has_all = recorded.as_ref().is_some_and(Recorded::has_all);
                let mut next = recorded.as_mut().map(|it| move || it.next_file());
                let recorded = next.as_mut().map(|it| it as &mut verify::Recorded<'_>);
                let cut = Cut::of(job, id)?;
                let known = Known { job: Some(key), recorded, has_all, cut };
                self.with_file(place.filenum, place.position, |this, file, name| {
                    this.walk_file(file, name, known, is_wanted)
                })?
            }
        };
        if is_wanted.is_some() {
            return self.count(outcomes, is_wanted, &mut |_, _, _| Ok(()));
        }
        let mut results = job.begin_results()?;
        self.count(outcomes, None, &mut |at, errno, name| note(&mut results, at, errno, name))?;
        let errors = self.tally.errors - before.errors;
        let mut log = job.log()?;
        let files = self.tally.files - before.files;
        let tape = Quoted(&place.tape);
        let line = format!(
            "* batch {} was read from tape {tape} filenum {}: files {files} errors {errors}",
            id.number, place.filenum
        );
        log.put(line.as_bytes())?;
        log.sync()?;
        // Nothing better comes of reading once more what was never whole.
        if errors > self.tally.partial - before.partial {
            return Ok(());
        }
        self.tally.batches += 1;
        if id.status == BatchStatus::Read {
            return Ok(());
        }
        self.sync()?;
        let Place { tape, filenum, .. } = place;
        let summary = Summary { begin, end: Time::now().secs, tape, filenum };
        job.complete(id, results, &summary, BatchStatus::Read)?;
        Ok(())
    }

    /// Has what was written below the directory last.
    pub(super) fn sync(&mut self) -> Result<()> {
        self.target.as_ref().map_or(Ok(()), Target::sync)
    }

    /// Counts what files have come to, and tells it.
    fn count(
        &mut self,
        outcomes: Outcomes,
        is_wanted: Option<&IsWanted<'_>>,
        each: &mut Each<'_>,
    ) -> Result<()> {
        let Reading { target, progress, tally, .. } = self;
        outcomes.merge(&mut |name| set_aside(target, progress, name), &mut |at, errno, name| {
            if is_wanted.is_some_and(|it| !it(name)) {
                return Ok(());
            }
            match errno {
                0 => tally.files += 1,
                _ => tally.errors += 1,
            }
            each(at, errno, name)
        })
    }

    /// Reads an archive as a whole.
    fn walk_file(
        &mut self,
        file: &mut TapeFile<'_, '_>,
        called: &str,
        known: Known<'_>,
        is_wanted: Option<&IsWanted<'_>>,
    ) -> Result<Outcomes> {
        let outcomes = std::cell::RefCell::new(Outcomes::default());
        let progress = self.progress;
        let mut target = self.target.take();
        // Files whose contents may be with other names.
        let mut empty = Spill::new();
        let (mut errors, mut partial) = (0, 0);
        let mut bytes = 0;
        let mut take = |member: &Member, content: &mut dyn Read| {
            progress.check()?;
            if is_wanted.is_some_and(|it| !it(&member.name)) {
                return Ok(());
            }
            let errno = match put(&mut target, member, content)? {
                Ok(()) => {
                    let nlink = member.header.nlink;
                    if is_wanted.is_some() && nlink > 1 && member.header.size == 0 {
                        empty.put(
                            member.position,
                            &[&nlink.to_le_bytes(), &*member.name].concat(),
                        )?;
                    }
                    0
                }
                Err(e) => {
                    progress.note(&Problem::new(&*member.name, &e));
                    errno_of(&e)
                }
            };
            Progress::add(&progress.bytes, member.header.size);
            Progress::add(&progress.entries, 1);
            bytes += member.header.size;
            outcomes.borrow_mut().meet(member.position, errno, &member.name)
        };
        let Known { job, recorded, has_all, cut } = known;
        let mut tell = |finding: Finding| {
            let Finding { about, at, path, error } = finding;
            let path = path.unwrap_or_else(|| called.as_bytes().to_vec());
            if is_wanted.is_some_and(|it| about != About::Archive && !it(&path)) {
                return Ok(());
            }
            progress.note(&Problem::new(&*path, &error));
            match about {
                About::Archive => errors += 1,
                About::Lost => outcomes.borrow_mut().lost.put(at, &path)?,
                About::Sum => outcomes.borrow_mut().bad.put(at, &path)?,
                About::Partial => {
                    partial += 1;
                    match has_all {
                        // It was not taken.
                        true => outcomes.borrow_mut().meet(at, c::ESTALE, &path)?,
                        false => outcomes.borrow_mut().bad.put(at, &path)?,
                    }
                }
            }
            Ok(())
        };
        let mut begun = |_: Option<&(String, u64)>| Ok(());
        let mut next = recorded.map(|it| move || it());
        let recorded = next.as_mut().map(|it| it as &mut verify::Recorded<'_>);
        let (take, tell, begun) = (&mut take, &mut tell, &mut begun);
        let work = verify::Work { job, recorded, has_all, cut, begun, take, tell };
        let walked = walk(file, work);
        self.target = target;
        let walked = walked?;
        self.tally.errors += errors;
        self.tally.partial += partial;
        self.tally.bytes += bytes;
        let mut outcomes = outcomes.into_inner();
        // Where there are sums, each name has the whole content.
        if !walked.has_sums {
            self.tally.unsummed += outcomes.met.count();
            let mut empty = empty.read()?;
            while let Some((at, item)) = empty.next_item()? {
                let Some((nlink, name)) = item.split_first_chunk() else { continue };
                if let Err(e) = look_for_content(&mut self.target, name, u64::from_le_bytes(*nlink))
                {
                    self.problem(name, &e);
                    outcomes.bad.put(at, name)?;
                }
            }
        }
        Ok(outcomes)
    }

    /// Reads files at positions that are known.
    pub(super) fn pick(
        &mut self,
        file: &mut TapeFile<'_, '_>,
        next: &mut verify::Recorded<'_>,
        sums: &mut Sums,
    ) -> Result<Outcomes> {
        let mut outcomes = Outcomes::default();
        let mut target = self.target.take();
        let mut is_behind_error = false;
        let mut done = || -> Result<()> {
            while let Some((at, path)) = next()? {
                self.progress.check()?;
                let picked = self.pick_one(file, at, &path, sums, is_behind_error, &mut target)?;
                is_behind_error = picked.is_err();
                let errno = match picked {
                    Ok(()) => 0,
                    Err(e) => {
                        self.problem(&path, &e);
                        errno_of(&e)
                    }
                };
                outcomes.meet(at, errno, &path)?;
            }
            Ok(())
        };
        let done = done();
        self.target = target;
        done.map(|()| outcomes)
    }

    fn pick_one(
        &mut self,
        file: &mut TapeFile<'_, '_>,
        at: u64,
        path: &[u8],
        sums: &mut Sums,
        is_behind_error: bool,
        target: &mut Option<Target>,
    ) -> Result<std::result::Result<(), Error>> {
        let offset = file.offset();
        let is_there = match at.checked_sub(offset) {
            Some(ahead) if ahead <= SKIP_BYTES && !is_behind_error => {
                let skipped = io::copy(&mut Read::take(&mut *file, ahead), &mut io::sink());
                skipped.is_ok_and(|it| it == ahead)
            }
            _ => false,
        };
        // What lies before it may be damaged, and need not be read.
        if !is_there && let Err(e) = file.seek_to(at) {
            return Ok(Err(e));
        }
        let mut reader = Reader::at(file, at);
        let member = match reader.next_member() {
            Ok(Some(member)) => member,
            Ok(None) => return Ok(Err(Error::corrupt("the archive ends where it should be"))),
            Err(e) => return Ok(Err(e)),
        };
        if !is_named(path, &member.name) {
            let found = Quoted(&member.name);
            return Ok(Err(Error::corrupt(format!("another one is in its place: {found}"))));
        }
        let mut made = Ok(());
        let taken = take_content(&mut reader, &member, &mut |member, content| {
            made = put(target, member, content)?;
            Ok(())
        })?;
        let (sum, bytes) = match taken {
            Ok(it) => it,
            Err(e) => return Ok(Err(e)),
        };
        if let Err(e) = made {
            return Ok(Err(e));
        }
        self.tally.bytes += bytes;
        Progress::add(&self.progress.bytes, bytes);
        Progress::add(&self.progress.entries, 1);
        let is_regular = member.header.mode & c::S_IFMT == c::S_IFREG;
        // Nothing else has one, and to look for one is to pass over all others.
        let wanted = if is_regular { sums.of(&member.name) } else { None };
        let proved = match wanted {
            Some(wanted) if wanted != sum => {
                Err(Error::corrupt("its content is not what was written"))
            }
            Some(_) => Ok(()),
            None => {
                self.tally.unsummed += 1;
                look_for_content(target, &member.name, member.header.nlink)
            }
        };
        if proved.is_err() {
            set_aside(target, self.progress, &member.name);
        }
        Ok(proved)
    }

    /// Gives directories their metadata; what was written lasts then.
    pub fn finish(&mut self) -> Result<()> {
        let Some(target) = self.target.take() else { return Ok(()) };
        let (progress, errors) = (self.progress, &mut self.tally.errors);
        target.finish(&mut |path, e| {
            *errors += 1;
            progress.note(&Problem::new(path, &e));
        })
    }
}

/// Whether a member's name is what a path of the spool stands for, which has the job's root before
/// it.
fn is_named(path: &[u8], name: &[u8]) -> bool {
    let ends_so = || path.strip_suffix(name).is_some_and(|it| it.ends_with(b"/"));
    is_same_name(path, name) || ends_so()
}

pub(super) fn note(results: &mut Results, at: u64, errno: i32, name: &[u8]) -> Result<()> {
    // No list has such a name.
    if name.is_empty() || name.contains(&b'\n') {
        return Ok(());
    }
    match errno {
        0 => results.ok(at, name),
        errno => results.fail(errno, name),
    }
}
