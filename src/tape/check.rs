//! Checking a whole tape: label, marks, every archive, every position that the spool has recorded.
//!
//! Invariant: whatever is wrong is told, once, and the check goes on with the next tape file that
//! it gets to. What it has not got to is not called missing. What nobody was promised is noted, and
//! is not wrong. What is remembered is one line for each tape file.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use super::cpio::Member;
use super::drive::{Drive, Moved, Read as Block};
use super::label::LABEL_BYTES;
use super::loaded::{First, Loaded};
use super::read::{End, TapeFile, Visit};
use super::recorded::{Cut, Place, Recorded, place_of};
use super::spool::Spool;
use super::spool::batch::{BatchId, BatchStatus};
use super::spool::job::JobKind;
use super::spool::log::TapeFile as Logged;
use super::spool::tape::Tape;
use super::verify::{self, About, Finding, Walked, Work, walk};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;

/// Most tape files of a tape.
const FILES_MAX: usize = 1 << 20;

/// What a check says.
pub enum Said<'a> {
    /// What the tape begins with.
    Tape(String),
    /// A tape file: its number, where it begins, and what it came to; `None` if it is empty.
    File(u64, u64, Option<&'a Walked>),
    /// Something is wrong; with a tape file, if it is with one.
    Wrong(Option<u64>, String),
    /// Something is not as one might expect in a tape file, and nothing is wrong with the tape.
    Note(u64, String),
}

/// What a check came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Tape files behind the label.
    pub tape_files: u64,
    /// Files in archives.
    pub files: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Files whose content is what their sums say.
    pub summed: u64,
    /// What was wrong.
    pub findings: u64,
}

struct Check<'a> {
    spool: Option<&'a Spool>,
    progress: &'a Progress,
    say: &'a mut dyn FnMut(Said<'_>) -> Result<()>,
    checked: Checked,
    /// The label's text.
    label: Option<Vec<u8>>,
    /// The log of the tape, but for the files that were met: of two lines with a number the later
    /// one.
    logged: BTreeMap<u64, Logged>,
    /// Number of the last tape file that was met, or gone to.
    last: u64,
    /// Files of the log that were not got to.
    unreached: BTreeSet<u64>,
    /// Whether the end of data was met.
    is_ended: bool,
}

/// Checks the tape in a drive, from its beginning to its end.
pub fn check(
    loaded: &mut Loaded,
    spool: Option<&Spool>,
    progress: &Progress,
    say: &mut dyn FnMut(Said<'_>) -> Result<()>,
) -> Result<Checked> {
    let mut check = Check {
        spool,
        progress,
        say,
        checked: Checked::default(),
        label: loaded.label().map(|it| it.text().to_vec()),
        logged: BTreeMap::new(),
        last: 0,
        unreached: BTreeSet::new(),
        is_ended: true,
    };
    let hash = loaded.hash().map(|it| format!(", hash {it}")).unwrap_or_default();
    let has_label = loaded.label().is_some();
    let hash = if has_label { hash } else { String::new() };
    (check.say)(Said::Tape(format!("{}{hash}", loaded.describe())))?;
    let tape = check.known_tape()?;
    if let Some(tape) = &tape {
        check.compare_label(loaded, tape)?;
        check.read_log(tape)?;
    }
    if *loaded.first() == First::Blank {
        return check.finish();
    }
    let is_bad_label = match loaded.first() {
        First::Unreadable(_) => is_one_block(loaded.drive()),
        _ => false,
    };
    if let (true, First::Unreadable(why)) = (is_bad_label, loaded.first()) {
        let what = format!("what has the place of the label cannot be read: {why}");
        check.wrong(Some(0), what)?;
    }
    // A tape without a label may begin with an archive.
    let first = if has_label || is_bad_label { 1 } else { 0 };
    let drive = loaded.drive();
    drive.rewind()?;
    if has_label {
        check.look_behind_label(loaded)?;
    }
    if first == 1 {
        let drive = loaded.drive();
        drive.rewind()?;
        if drive.space_files(1)? != Moved::There {
            return check.finish();
        }
    }
    let mut from = Some(first);
    while let Some(filenum) = from {
        let done = check.files(loaded.drive(), filenum)?;
        check.is_ended = done.is_ok();
        from = match done {
            Ok(()) => None,
            Err(e) => check.resume(loaded.drive(), &e)?,
        };
    }
    check.finish()
}

/// Whether the first tape file has one block, as that of a label has.
fn is_one_block(drive: &mut dyn Drive) -> bool {
    let is_behind = matches!(drive.locate(1), Ok(Moved::There));
    is_behind && matches!(drive.read(&mut [0; 1]), Ok(Block::Filemark))
}

impl Check<'_> {
    fn wrong(&mut self, filenum: Option<u64>, what: String) -> Result<()> {
        self.checked.findings += 1;
        (self.say)(Said::Wrong(filenum, what))
    }

    fn known_tape(&self) -> Result<Option<Tape>> {
        match (self.spool, &self.label) {
            (Some(spool), Some(label)) => spool.tape(label),
            _ => Ok(None),
        }
    }

    fn compare_label(&mut self, loaded: &Loaded, tape: &Tape) -> Result<()> {
        let known = match tape.label() {
            Ok(known) => known,
            Err(e) => return self.wrong(None, format!("the spool's copy of the label: {e}")),
        };
        match known {
            Some(known) if Some(&known) != loaded.label() => {
                self.wrong(None, "the label is not the one that the spool has a copy of".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn read_log(&mut self, tape: &Tape) -> Result<()> {
        let logged = &mut self.logged;
        tape.files(&mut |it| {
            logged.insert(it.filenum, it);
            match logged.len() > FILES_MAX {
                true => Err(Error::corrupt(format!("more than {FILES_MAX} files of one tape"))),
                false => Ok(()),
            }
        })
    }

    /// The label is one block, or several short ones, and a filemark.
    fn look_behind_label(&mut self, loaded: &mut Loaded) -> Result<()> {
        let mut visit = Visit::new(loaded.drive(), 0);
        let Some(mut file) = visit.next_file()? else { return Ok(()) };
        let block = file.block_bytes().max(LABEL_BYTES) as u64;
        let what = match file.drain() {
            Ok((len, _)) if len != block => {
                format!("{} bytes follow the label", len.saturating_sub(block))
            }
            Ok(_) if file.end() != Some(End::Filemark) => {
                "there is no filemark behind the label".to_owned()
            }
            Ok(_) => return Ok(()),
            Err(e) => e.to_string(),
        };
        self.wrong(Some(0), what)
    }

    /// Checks all tape files from where the drive stands. Inside, why it does not get on.
    fn files(
        &mut self,
        drive: &mut dyn Drive,
        filenum: u64,
    ) -> Result<std::result::Result<(), Error>> {
        let mut visit = Visit::new(drive, filenum);
        loop {
            match visit.next_file() {
                Ok(Some(mut file)) => self.file(&mut file)?,
                Ok(None) => return Ok(Ok(())),
                Err(e) if e.kind() == ErrorKind::Interrupted => return Err(e),
                Err(e) => return Ok(Err(e)),
            }
        }
    }

    /// Goes to the next tape file whose position the log has.
    fn resume(&mut self, drive: &mut dyn Drive, error: &Error) -> Result<Option<u64>> {
        self.wrong(None, format!("the tape cannot be read on behind file {}: {error}", self.last))?;
        for (filenum, logged) in self.logged.range(self.last + 1..) {
            self.unreached.insert(*filenum);
            match drive.locate(logged.position) {
                Ok(Moved::There) => {
                    self.last = *filenum;
                    return Ok(Some(*filenum));
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => return Err(e),
                _ => {}
            }
        }
        Ok(None)
    }

    fn file(&mut self, file: &mut TapeFile<'_, '_>) -> Result<()> {
        self.progress.check()?;
        let (filenum, position) = (file.filenum(), file.position());
        self.last = filenum;
        self.checked.tape_files += 1;
        let logged = self.logged.remove(&filenum);
        self.unreached.remove(&filenum);
        if let Some(logged) = logged.as_ref().filter(|it| it.position != position) {
            let what = format!("it begins at position {position}, and the log has {}", {
                logged.position
            });
            self.wrong(Some(filenum), what)?;
        }
        if file.end().is_some() {
            if logged.is_some() {
                self.wrong(Some(filenum), "it is empty, and the log has a batch".to_owned())?;
            }
            return (self.say)(Said::File(filenum, position, None));
        }
        let known = match &logged {
            Some(logged) => self.recorded(logged)?,
            None => None,
        };
        let (known, cut) = known.unzip();
        let told = std::cell::RefCell::new((&mut self.say, 0));
        let is_nobodys = std::cell::Cell::new(false);
        let (spool, label) = (self.spool, self.label.as_deref());
        let mut begun = |job: Option<&(String, u64)>| {
            let (Some(spool), Some(label), Some(job), None) = (spool, label, job, &logged) else {
                return Ok(());
            };
            if !was_nobody_told(spool, label, filenum, job) {
                return Ok(());
            }
            is_nobodys.set(true);
            let what = format!(
                "batch {} of job {} was not acknowledged here, as its writer died or the tape was \
                 full: it does not count",
                job.1, job.0
            );
            (told.borrow_mut().0)(Said::Note(filenum, what))
        };
        let progress = self.progress;
        let mut take = |member: &Member, _: &mut dyn Read| {
            Progress::add(&progress.bytes, member.header.size);
            Progress::add(&progress.entries, 1);
            progress.check()
        };
        let mut tell = |finding: Finding| {
            let mut told = told.borrow_mut();
            let what = finding.to_string();
            if finding.about == About::Partial || is_nobodys.get() {
                return (told.0)(Said::Note(filenum, what));
            }
            told.1 += 1;
            (told.0)(Said::Wrong(Some(filenum), what))
        };
        let job = logged.as_ref().map(|it| (it.job.clone(), it.batch));
        let has_all = known.as_ref().is_some_and(Recorded::has_all);
        let mut next = known.map(|mut it| move || it.next_file());
        let recorded = next.as_mut().map(|it| it as &mut verify::Recorded<'_>);
        let cut = cut.flatten();
        let (take, tell, begun) = (&mut take, &mut tell, &mut begun);
        let walked = walk(file, Work { job, recorded, has_all, cut, begun, take, tell });
        self.checked.findings += told.into_inner().1;
        let walked = match walked {
            // Another batch than it should be, or damage in the spool.
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                return self.wrong(Some(filenum), e.to_string());
            }
            walked => walked?,
        };
        if logged.is_none() {
            self.look_for_job(filenum, &walked)?;
        }
        self.checked.files += walked.files;
        self.checked.bytes += walked.bytes;
        self.checked.summed += walked.summed;
        (self.say)(Said::File(filenum, position, Some(&walked)))
    }

    /// What the spool has recorded of a batch that the tape's log has.
    fn recorded(&mut self, logged: &Logged) -> Result<Option<(Recorded, Option<Cut>)>> {
        let Some(spool) = self.spool else { return Ok(None) };
        let filenum = Some(logged.filenum);
        let opened = || -> Result<Option<(Recorded, Option<Cut>)>> {
            let job = match spool.job(&logged.job) {
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
                job => job?,
            };
            let id = job.batches()?.into_iter().find(|it| it.number == logged.batch);
            let Some(id) = id.filter(|it| it.status != BatchStatus::Pending) else {
                return Ok(None);
            };
            let here = Place {
                tape: self.label.clone().unwrap_or_default(),
                filenum: logged.filenum,
                position: None,
            };
            // It may have been written once more since, and be somewhere else.
            let place = place_of(spool, &job, id)?;
            if (&place.tape, place.filenum) != (&here.tape, here.filenum) {
                return Ok(None);
            }
            let cut = Cut::of(&job, id)?;
            Ok(Recorded::open(&job, id, &here)?.map(|it| (it, cut)))
        };
        match opened() {
            Ok(found) => Ok(found),
            Err(e) => {
                self.wrong(filenum, format!("what the spool has of it: {e}"))?;
                Ok(None)
            }
        }
    }

    /// A batch that the tape's log has not, though the spool has it as one that is here.
    fn look_for_job(&mut self, filenum: u64, walked: &Walked) -> Result<()> {
        if self.label.is_some()
            && let (Some(spool), Some((job, number))) = (self.spool, &walked.job)
            && self.known_tape()?.is_some()
            && let Ok(job) = spool.job(job)
        {
            let status = BatchStatus::Pending;
            let id = job.batches()?.into_iter().find(|it| it.number == *number);
            let id = id.unwrap_or(BatchId { number: *number, status });
            if id.status != status
                && let Ok(place) = place_of(spool, &job, id)
                && Some(&place.tape) == self.label.as_ref()
                && place.filenum == filenum
            {
                let name = format!("batch {number} of job {}", job.uuid());
                return self.wrong(Some(filenum), format!("the log of the tape has not {name}"));
            }
        }
        Ok(())
    }

    /// What should have been met, and was not.
    fn finish(mut self) -> Result<Checked> {
        let left = std::mem::take(&mut self.logged);
        for (filenum, logged) in &left {
            let what = match self.unreached.contains(filenum) {
                true => "could not be got to",
                false => "is not on the tape, though its log has it",
            };
            let name = format!("batch {} of job {}", logged.batch, logged.job);
            self.wrong(Some(*filenum), format!("{name} {what}"))?;
        }
        let tape = self.known_tape()?;
        let (Some(spool), Some(label)) = (self.spool, self.label.clone()) else {
            return Ok(self.checked);
        };
        for uuid in spool.jobs(true)? {
            let job = match spool.job(&uuid) {
                Ok(job) if job.kind() == JobKind::Write => job,
                Ok(_) => continue,
                Err(e) => {
                    self.wrong(None, format!("job {uuid}: {e}"))?;
                    continue;
                }
            };
            for id in job.batches()? {
                self.progress.check()?;
                let summary = match job.batch(id).and_then(|mut it| it.summary()) {
                    Ok(summary) => summary,
                    Err(e) => {
                        self.wrong(None, format!("job {uuid}: {e}"))?;
                        continue;
                    }
                };
                let Some(summary) = summary else { continue };
                let filenum = summary.number("filenum").unwrap_or(0u64);
                let is_told = left
                    .get(&filenum)
                    .is_some_and(|it| (&*it.job, it.batch) == (&*uuid, id.number));
                if summary.get("tape") != Some(&*label) || filenum <= self.last || is_told {
                    continue;
                }
                let begun = summary.number("begin").unwrap_or(0);
                let is_gone = tape
                    .as_ref()
                    .map_or(Ok(false), |it| it.has_lost(filenum, &uuid, id.number, begun));
                if !is_gone? {
                    let what = match self.is_ended {
                        true => "the tape ends before",
                        false => "could not be got to",
                    };
                    let name = format!("batch {} of job {uuid}", id.number);
                    self.wrong(Some(filenum), format!("{name} should be here, and {what}"))?;
                }
            }
        }
        Ok(self.checked)
    }
}

/// Whether a batch of the spool, which the log of the tape has not, was never said to be in this
/// tape file: it is pending, or somewhere else. Of what the spool does not know nothing is said;
/// what it cannot read is told with the other jobs.
fn was_nobody_told(spool: &Spool, label: &[u8], filenum: u64, batch: &(String, u64)) -> bool {
    let look = || -> Result<bool> {
        let job = spool.job(&batch.0)?;
        let id = job.batches()?.into_iter().find(|it| it.number == batch.1);
        let Some(id) = id else { return Ok(false) };
        if id.status == BatchStatus::Pending {
            return Ok(true);
        }
        let place = place_of(spool, &job, id)?;
        Ok((&*place.tape, place.filenum) != (label, filenum))
    };
    spool.tape(label).is_ok_and(|it| it.is_some()) && look().unwrap_or(false)
}
