//! Which tape is written: the one in the drive if it will do, or another one.

use std::path::Path;

use super::{
    BLOCK_BYTES, BLOCK_BYTES_MAX, NextTape, Place, TAPES_MAX, Wanted, Writer, check_block_bytes,
};
use crate::error::{Error, ErrorKind, Quoted, Result};
use crate::sys::quoted;
use crate::tape::drive::{Access, Why};
use crate::tape::load;
use crate::tape::loaded::Loaded;
use crate::tape::spool::Spool;
use crate::tape::spool::drive::TakenDrive;
use crate::tape::spool::job::Job;
use crate::tape::spool::tape::{GONE, Tape, TapeStatus, WORM};
use crate::tape::spool::text::Fields;

impl Writer<'_> {
    /// Has a tape in the drive that a job can be written to, at its end of data.
    pub(super) fn ready(&mut self, job: &Job) -> Result<()> {
        for _ in 0..TAPES_MAX {
            let unfit = match &self.place {
                Some(place) => unfit(self.work.spool, (&place.tape, &place.label), job)?,
                None => self.look(job)?,
            };
            if let Some(why) = unfit {
                self.change(job, why)?;
                continue;
            }
            if let (Some(place), Some(loaded)) = (&mut self.place, &mut self.loaded)
                && place.start.is_none()
            {
                let start = loaded.to_end(&place.tape)?;
                place.is_empty |= start.filenum <= 1;
                place.start = Some(start);
            }
            return Ok(());
        }
        Err(Error::new(ErrorKind::WrongTape, "no tape that was put in can be written"))
    }

    /// Looks at the tape that has come into the drive; says why it cannot be written, if so.
    fn look(&mut self, job: &Job) -> Result<Option<String>> {
        let Some(loaded) = &mut self.loaded else {
            return Err(Error::new(ErrorKind::WrongTape, "there is no tape in the drive"));
        };
        if std::mem::take(&mut self.is_first_tape) {
            let noted = self.work.drive.tape()?.map(|it| it.name());
            if let Some(wanted) = self.work.settings.tape.as_ref().or(noted.as_ref()) {
                loaded.expect_label(wanted)?;
            }
        }
        let Some(label) = loaded.label().cloned() else {
            return Ok(Some(format!("{} is in the drive", loaded.describe())));
        };
        let text = label.text().to_vec();
        let tape = match self.work.spool.tape(&text)? {
            Some(tape) => tape,
            None => self.work.spool.add_tape(&label)?,
        };
        if tape.is_other(&label)? {
            let name = Quoted(&text);
            self.refused.insert(text.clone());
            return Ok(Some(format!("tape {name} is not the one of this name that is known")));
        }
        let state = loaded.drive().state()?;
        if state.write_protected {
            self.refused.insert(text);
            return Ok(Some(loaded.refused(Why::Protected).to_string()));
        }
        if let Some(why) = unfit(self.work.spool, (&tape, &text), job)? {
            return Ok(Some(why));
        }
        load::note(self.work.drive, Some(&tape))?;
        let metrics = tape.metrics()?;
        let is_known_worm = tape.is_worm()?;
        if state.worm == Some(true) && !is_known_worm {
            set_metric(&tape, WORM, 1)?;
        }
        // Whoever has only the label can read no longer ones.
        let longest = label.readable_bytes().unwrap_or(BLOCK_BYTES_MAX);
        let block_bytes = match self.work.settings.block_bytes {
            Some(bytes) if bytes > longest => {
                let name = Quoted(&text);
                let message = format!(
                    "blocks of {bytes} bytes: the label of tape {name} says how to read up to \
                     {longest}; write shorter ones, or label it with -b {bytes} first"
                );
                return Err(Error::usage(message));
            }
            Some(bytes) => bytes,
            None => metrics.number("blocksize").unwrap_or(BLOCK_BYTES).min(longest),
        };
        check_block_bytes(block_bytes)?;
        self.place = Some(Place {
            tape,
            label: text,
            block_bytes,
            worm: state.worm.or(is_known_worm.then_some(true)),
            start: None,
            is_empty: false,
            too_large: None,
        });
        Ok(None)
    }

    /// Has another tape put into the drive.
    fn change(&mut self, job: &Job, why: String) -> Result<()> {
        let Some(loaded) = self.loaded.take() else {
            return Err(Error::new(ErrorKind::WrongTape, why));
        };
        self.place = None;
        let now = loaded.label().map(|it| it.text().to_vec());
        let mut wanted = Wanted::of(self.work.spool, job, why)?;
        wanted.labels.retain(|it| Some(it) != now.as_ref() && !self.refused.contains(it));
        // Said before it is so: what the spool does not know is looked at.
        self.work.drive.unload()?;
        self.loaded = (self.work.next_tape)(loaded, &wanted)?;
        match self.loaded {
            Some(_) => Ok(()),
            None => Err(wanted.missing()),
        }
    }

    /// The tape takes no more.
    pub(super) fn set_full(&mut self) -> Result<()> {
        let now = (self.work.now)();
        match &mut self.place {
            Some(place) => {
                place.start = None;
                set_metric(&place.tape, "full", now.unsigned_abs())
            }
            None => Ok(()),
        }
    }
}

impl Wanted {
    /// A tape for a job.
    fn of(spool: &Spool, job: &Job, why: String) -> Result<Wanted> {
        let mut wanted = Wanted::of_pool(spool, pool_of(job), why)?;
        wanted.labels.retain(|it| !is_avoided(job, it));
        Ok(wanted)
    }

    /// A tape of a pool, or any.
    fn of_pool(spool: &Spool, pool: Option<&[u8]>, why: String) -> Result<Wanted> {
        let labels = with_room(spool, pool)?;
        Ok(Wanted { why, pool: pool.map(<[u8]>::to_vec), labels })
    }

    /// What to say if nobody has put one in.
    fn missing(&self) -> Error {
        let of = match &self.pool {
            Some(pool) => format!(" of pool {}", Quoted(pool)),
            None => String::new(),
        };
        let next = self.labels.first();
        let such = next.map_or(String::new(), |it| format!(", as {}", Quoted(it)));
        let why = &self.why;
        let what = format!("{why}: put in a tape{of} that has room{such}, and write again");
        Error::new(ErrorKind::WrongTape, what)
    }
}

/// Whose tape an empty drive gets.
pub enum For<'a> {
    /// A job's.
    Job(&'a Job),
    /// One of a pool.
    Pool(&'a [u8]),
    /// The one with this label.
    Label(&'a [u8]),
}

/// Has a tape put into a drive that has none: by its changer if it has one, or else by whoever
/// `ask` asks.
///
/// [`ErrorKind::WrongTape`] if there is none.
pub fn first_tape(
    spool: &Spool,
    taken: &TakenDrive,
    whose: &For<'_>,
    ask: &mut dyn FnMut(&Wanted) -> Result<Option<Loaded>>,
) -> Result<Loaded> {
    let why = format!("there is no tape in drive {}", quoted(Path::new(taken.name())));
    let wanted = match *whose {
        For::Job(job) => Wanted::of(spool, job, why)?,
        For::Pool(pool) => Wanted::of_pool(spool, Some(pool), why)?,
        For::Label(label) => Wanted { why, pool: None, labels: vec![label.to_vec()] },
    };
    // Whoever has taken it out by hand has not told the spool.
    taken.unload()?;
    let loaded = match taken.changer()? {
        Some(_) => by_changer(spool, taken, &wanted.labels)?,
        None => ask(&wanted)?,
    };
    loaded.ok_or_else(|| wanted.missing())
}

/// Puts another tape into a drive: by its changer if it has one, or else whoever `ask` asks does.
/// `None` if there is none.
pub fn next_tape(
    spool: &Spool,
    taken: &TakenDrive,
    loaded: Loaded,
    wanted: &Wanted,
    ask: &mut NextTape<'_>,
) -> Result<Option<Loaded>> {
    if taken.changer()?.is_none() {
        return ask(loaded, wanted);
    }
    loaded.close()?;
    by_changer(spool, taken, &wanted.labels)
}

/// Has the changer of a drive put in the first of these tapes that it has. `None` if it has none.
fn by_changer(spool: &Spool, taken: &TakenDrive, labels: &[Vec<u8>]) -> Result<Option<Loaded>> {
    for label in labels {
        match load::load(spool, taken, label, None, Access::Write) {
            Ok(loaded) => return Ok(Some(loaded)),
            // It is somewhere else, or not what it is said to be.
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WrongTape | ErrorKind::Locked | ErrorKind::NotFound
                ) =>
            {
                log::warn!("tape {} is not taken: {e}", Quoted(label));
            }
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

/// The labels of the tapes of a pool, or of all, that have room and are at hand.
fn with_room(spool: &Spool, pool: Option<&[u8]>) -> Result<Vec<Vec<u8>>> {
    let tapes = match pool {
        None => spool.tapes()?,
        Some(pool) => {
            let labels = spool.pool(pool)?;
            let found = labels.iter().map(|it| spool.tape(it)).collect::<Result<Vec<_>>>()?;
            found.into_iter().flatten().collect()
        }
    };
    let mut labels = Vec::new();
    for tape in tapes {
        let label = tape.name();
        let metrics = tape.metrics()?;
        let has_room = metrics.get("full").is_none() && metrics.get(GONE).is_none();
        if has_room && tape.status()? == TapeStatus::Offline {
            labels.push(label);
        }
    }
    Ok(labels)
}

/// Whether there is a tape for a job, as far as the spool knows: the one with this label, which is
/// in the drive, or one that is at hand.
pub fn has_tape_for(spool: &Spool, job: &Job, in_drive: Option<&[u8]>) -> Result<bool> {
    if let Some(label) = in_drive
        && let Some(tape) = spool.tape(label)?
        && unfit(spool, (&tape, label), job)?.is_none()
    {
        return Ok(true);
    }
    Ok(!Wanted::of(spool, job, String::new())?.labels.is_empty())
}

/// Why a tape, which has this label, cannot be written for a job, as far as the spool knows.
fn unfit(spool: &Spool, (tape, label): (&Tape, &[u8]), job: &Job) -> Result<Option<String>> {
    let name = Quoted(label);
    if tape.metrics()?.get("full").is_some() {
        return Ok(Some(format!("tape {name} is full")));
    }
    if is_avoided(job, label) {
        return Ok(Some(format!("tape {name} has a copy of some of it already")));
    }
    if let Some(pool) = pool_of(job)
        && !spool.pool(pool)?.iter().any(|it| it == label)
    {
        return Ok(Some(format!("tape {name} is not of pool {}", Quoted(pool))));
    }
    Ok(None)
}

/// Whether a job is not to go to the tape with this label.
fn is_avoided(job: &Job, label: &[u8]) -> bool {
    job.fields().iter().any(|it| it.0.starts_with(b"avoid-") && it.1 == label)
}

fn pool_of(job: &Job) -> Option<&[u8]> {
    job.fields().get("pool").filter(|it| !it.is_empty())
}

pub(super) fn set_metric(tape: &Tape, key: &str, value: u64) -> Result<()> {
    let mut metrics: Fields = tape.metrics()?;
    metrics.set(key, value.to_string())?;
    tape.set_metrics(&metrics)
}
