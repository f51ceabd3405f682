//! Archiving a run: what a pool lacks is planned as a job, written, and noted.
//!
//! A job that an earlier archive has left is written first; so whatever ends it, saying the same
//! once more goes on where it was. One for which there is no tape comes last: it keeps nothing else
//! from those that are there.

use std::path::Path;

use super::plan::{Options, Planned, plan, revoke_begun, unfinished};
use super::{Members, Noter};
use crate::error::{ErrorKind, Result};
use crate::progress::Progress;
use crate::sys::Time;
use crate::tape::loaded::Loaded;
use crate::tape::spool::Spool;
use crate::tape::spool::drive::TakenDrive;
use crate::tape::write::{NextTape, Settings, Tally, Work, Writer, Written, has_tape_for};

/// What writes to tape.
pub struct Means<'a> {
    /// The spool.
    pub spool: &'a Spool,
    /// A drive of it.
    pub drive: &'a TakenDrive,
    /// How it is written.
    pub settings: Settings,
    /// Is told of each tape file that lasts.
    pub tell: &'a mut dyn FnMut(&Written),
    /// Puts another tape into the drive.
    pub next_tape: &'a mut NextTape<'a>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Archived {
    /// Jobs that were left by an earlier archive, and are done now.
    pub resumed: Vec<String>,
    /// Jobs that were made.
    pub planned: Vec<Planned>,
    /// Blocks that were noted: those that are on tape now and were not known to be.
    pub blocks: u64,
    /// What was written.
    pub tally: Tally,
}

impl Archived {
    /// What came of it, in a line.
    pub fn line(&self) -> String {
        if self.tally.batches == 0 {
            return "nothing to write: the pool has all of it".to_owned();
        }
        let Tally { batches, bytes, errors, .. } = self.tally;
        let blocks = self.blocks;
        let mut line = format!("wrote {batches} tape files, {bytes} bytes, {blocks} new blocks");
        if !self.resumed.is_empty() {
            line.push_str(&format!("; finished {} earlier jobs", self.resumed.len()));
        }
        if errors > 0 {
            line.push_str(&format!("; {errors} members could not be read and are not on tape"));
        }
        line
    }
}

/// Archives a run to the pool, beginning with the tape that is in the drive.
pub fn archive(
    catalog: &Path,
    options: &Options,
    means: Means<'_>,
    loaded: Loaded,
    progress: &Progress,
) -> Result<Archived> {
    let members = Members::open(catalog)?;
    let (mut noter, mut blocks) = (Noter::open(catalog, &members)?, 0);
    let Means { spool, drive, settings, tell, next_tape } = means;
    let work = Work {
        spool,
        drive,
        settings,
        progress,
        now: &|| Time::now().secs,
        add: &mut |_, archive, name| members.add(archive, name, progress),
        tell: &mut |it| {
            blocks += noter.note(spool, it)?;
            tell(it);
            Ok(())
        },
        next_tape,
    };
    let in_drive = loaded.label().map(|it| it.text().to_vec());
    let mut writer = Writer::new(work, loaded);
    let mut done = Archived::default();
    let mut all = All { catalog, members: &members, spool, options, done: &mut done, progress };
    let result = all.write(&mut writer, in_drive.as_deref());
    done.tally = writer.tally();
    let closed = writer.close();
    result.and(closed)?;
    done.blocks = blocks;
    progress.set_phase("done");
    Ok(done)
}

/// All that is to be written.
struct All<'a> {
    catalog: &'a Path,
    members: &'a Members,
    spool: &'a Spool,
    options: &'a Options,
    done: &'a mut Archived,
    progress: &'a Progress,
}

impl All<'_> {
    fn write(&mut self, writer: &mut Writer<'_>, in_drive: Option<&[u8]>) -> Result<()> {
        let (spool, options) = (self.spool, self.options);
        revoke_begun(spool, self.catalog, &options.pool)?;
        let mut last = Vec::new();
        for uuid in unfinished(spool, self.catalog, &options.pool)? {
            if !has_tape_for(spool, &spool.job(&uuid)?, in_drive)? {
                last.push(uuid);
                continue;
            }
            self.resume(writer, uuid)?;
        }
        for wanted in 1..=options.copies {
            let from = (self.catalog, self.members);
            let Some(planned) = plan(from, spool, options, wanted, self.progress)? else {
                continue;
            };
            Progress::add(&self.progress.bytes_total, planned.bytes);
            self.progress.set_phase("writing");
            let uuid = planned.job.clone();
            self.done.planned.push(planned);
            writer.job(spool.take_job(&uuid)?)?;
        }
        last.into_iter().try_for_each(|it| self.resume(writer, it))
    }

    fn resume(&mut self, writer: &mut Writer<'_>, uuid: String) -> Result<()> {
        self.progress.set_phase("writing");
        let written = writer.job(self.spool.take_job(&uuid)?);
        written.map_err(|e| match e.kind() {
            ErrorKind::WrongTape => {
                e.context(format!("left by an earlier archive (t0job --revoke {uuid} gives it up)"))
            }
            _ => e,
        })?;
        self.done.resumed.push(uuid);
        Ok(())
    }
}
