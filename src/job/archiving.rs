//! Archiving a run to tape as it was asked for, by command or by control file.

use std::ffi::OsString;
use std::path::Path;

use crate::catalog::{Reader, RunId};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::progress::Progress;
use crate::snapshot::{Wish, choose_run};
use crate::sys::quoted;
use crate::tape::drive::Access;
use crate::tape::load::open_noted;
use crate::tape::loaded::Loaded;
use crate::tape::runs::{self, Archived, Means, Members, Options, Planned};
use crate::tape::spool::Spool;
use crate::tape::write::{For, NextTape, Settings, Wanted, Written, first_tape, next_tape};

/// Has a tape put into the empty drive that this is; `None` if nobody does.
pub type FirstTape<'a> = dyn FnMut(&Path, &Wanted) -> Result<Option<Loaded>> + 'a;

/// An archive that is asked for.
#[derive(Clone, Debug)]
pub struct Archiving {
    /// The run.
    pub wish: Wish,
    /// The pool of tapes.
    pub pool: String,
    /// The drive; the default one if there is none.
    pub drive: Option<OsString>,
    /// On how many tapes each block is to be.
    pub copies: u64,
    /// Bytes of blocks in a tape file.
    pub batch_bytes: u64,
    /// Most memory for what waits for the drive.
    pub buffer_bytes: u64,
}

impl Archiving {
    fn options(&self, catalog: &Path, spool: &Spool) -> Result<Options> {
        // A job for a pool without tapes could not be written. `any` has every tape that comes.
        if spool.pool(self.pool.as_bytes())?.is_empty() && self.pool != "any" {
            let file = spool.root().join("pool").join(&self.pool);
            let message = format!(
                "pool {} has no tape: write the labels of its tapes into {}, a line each",
                Quoted(self.pool.as_bytes()),
                quoted(&file)
            );
            return Err(Error::new(ErrorKind::WrongTape, message));
        }
        let run = choose_run(&Reader::open(catalog)?, &self.wish, b"")?.id;
        let Archiving { copies, batch_bytes, .. } = *self;
        Ok(Options { run, pool: self.pool.clone(), copies, batch_bytes })
    }

    /// What would be archived, besides what waits; and of which run. Makes no job.
    pub fn count(
        &self,
        catalog: &Path,
        spool: &Spool,
        progress: &Progress,
    ) -> Result<(RunId, Planned)> {
        let options = self.options(catalog, spool)?;
        runs::note_written_over(spool, catalog)?;
        let members = Members::open(catalog)?;
        let planned = runs::count((catalog, &members), spool, &options, progress)?;
        Ok((options.run, planned))
    }

    /// Archives; gives the run. No tape is asked for if there is nothing to write. `tell` is told
    /// of each tape file; `first` has a tape put into an empty drive without a changer, `ask`
    /// another one into a drive that has one.
    pub fn run(
        &self,
        catalog: &Path,
        spool: &Spool,
        progress: &Progress,
        tell: &mut dyn FnMut(&Written),
        first: &mut FirstTape<'_>,
        ask: &mut NextTape<'_>,
    ) -> Result<(RunId, Archived)> {
        let options = self.options(catalog, spool)?;
        runs::note_written_over(spool, catalog)?;
        let drive = spool.drive(self.drive.as_deref())?;
        let is_new = runs::unfinished(spool, catalog, &options.pool)?.is_empty();
        let members = Members::open(catalog)?;
        if is_new && !runs::lacks_any((catalog, &members), spool, &options, progress)? {
            return Ok((options.run, Archived::default()));
        }
        let taken = drive.take()?;
        let loaded = match open_noted(spool, &taken, Access::Write) {
            Err(e) if e.kind() == ErrorKind::WrongTape => {
                let whose = For::Pool(options.pool.as_bytes());
                let device = taken.device()?;
                first_tape(spool, &taken, &whose, &mut |wanted| first(&device, wanted))?
            }
            opened => opened?,
        };
        let mut next = |loaded, wanted: &_| next_tape(spool, &taken, loaded, wanted, ask);
        let means = Means {
            spool,
            drive: &taken,
            settings: Settings { buffer_bytes: self.buffer_bytes, ..Settings::default() },
            tell,
            next_tape: &mut next,
        };
        let done = runs::archive(catalog, &options, means, loaded, progress)?;
        Ok((options.run, done))
    }
}
