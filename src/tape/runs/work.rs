//! Archiving a run: what a pool lacks is planned as a job, written, and noted.
//!
//! A job that an earlier archive has left is written first; so whatever ends it, saying the same
//! once more goes on where it was.

use std::path::Path;

use super::plan::{Options, Planned, plan, revoke_begun, unfinished};
use super::{Members, Noter};
use crate::error::Result;
use crate::progress::Progress;
use crate::sys::Time;
use crate::tape::loaded::Loaded;
use crate::tape::spool::Spool;
use crate::tape::spool::drive::TakenDrive;
use crate::tape::write::{NextTape, Settings, Tally, Work, Writer, Written};

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
    let mut writer = Writer::new(work, loaded);
    let mut done = Archived::default();
    let result = write_all(catalog, &members, spool, options, &mut writer, &mut done, progress);
    done.tally = writer.tally();
    let closed = writer.close();
    result.and(closed)?;
    done.blocks = blocks;
    progress.set_phase("done");
    Ok(done)
}

fn write_all(
    catalog: &Path,
    members: &Members,
    spool: &Spool,
    options: &Options,
    writer: &mut Writer<'_>,
    done: &mut Archived,
    progress: &Progress,
) -> Result<()> {
    revoke_begun(spool, catalog, &options.pool)?;
    for uuid in unfinished(spool, catalog, &options.pool)? {
        progress.set_phase("writing");
        writer.job(spool.take_job(&uuid)?)?;
        done.resumed.push(uuid);
    }
    for wanted in 1..=options.copies {
        let Some(planned) = plan((catalog, members), spool, options, wanted, progress)? else {
            continue;
        };
        Progress::add(&progress.bytes_total, planned.bytes);
        progress.set_phase("writing");
        let uuid = planned.job.clone();
        done.planned.push(planned);
        writer.job(spool.take_job(&uuid)?)?;
    }
    Ok(())
}
