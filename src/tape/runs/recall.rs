//! Bringing blocks back from tape to volumes.
//!
//! First a plan: what is on no volume that is there, and the fewest tapes that have it. Then each
//! tape once, forwards. A block counts when all of its bytes have had the hash that is its name and
//! its file is durable; then it gets its meta, its record and its row, as any further copy does.
//! Whatever ends it, what has come back stays, and the next time only the rest is planned.
//!
//! A copy on tape is noted as bad for what the tape gave twice: another hash, an end that comes too
//! early, or nothing, from a drive that still reads the label of that tape. A disk that fails ends
//! the recall, and says nothing of any tape.

use std::collections::{BTreeSet, VecDeque};
use std::io::Read;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};

use parking_lot::Mutex;

use super::PROBLEMS_MAX;
use super::shelf::expect_known;
use super::targets::{Fetched, Into, Targets};
use crate::catalog::tapes::{Cover, OfTape, Piece, Tapes};
use crate::catalog::{Health, Reader, RunBlocks};
use crate::chunk::HashAlgo;
use crate::copies::Store;
use crate::error::{Error, ErrorKind, Problem, Quoted, Result};
use crate::progress::Progress;
use crate::tape::drive::Moved;
use crate::tape::loaded::Loaded;
use crate::tape::read::{TapeFile, Visit};
use crate::tape::verify::unwrapped;
use crate::volume::{BlockId, Volumes};

/// Blocks taken from the catalog at a time.
const PAGE_BLOCKS: u64 = 1024;
/// Pieces of a tape taken from the plan at a time.
const PAGE_PIECES: u64 = 1024;
/// Blocks that wait to be made durable, for each drive.
const WAITING: usize = 2;
/// A gap on a tape up to this many bytes is read over; a longer one is gone over by the drive.
const GAP_BYTES: u64 = 64 << 20;
/// Blocks that a drive fails to read one after another, before it is given up with this tape.
const FAILURES_MAX: usize = 1000;
/// Blocks that are named of those that are nowhere.
const NAMED_MAX: usize = 5;
/// What a drive is reckoned to read in a second, and how long another tape takes: for an estimate.
const RATE: u64 = 120_000_000;
const CHANGE_SECS: u64 = 120;

/// What is to be done.
#[derive(Debug)]
pub struct Plan {
    /// The tapes, in the order in which they are read.
    pub tapes: Vec<OfTape>,
    /// Blocks that are on a volume that is there.
    pub blocks_here: u64,
    /// Blocks that are on no such volume and on no tape.
    pub blocks_lost: u64,
    /// The first of them.
    pub lost: Vec<BlockId>,
    /// Tapes on which some of those were found bad: they may be read once more.
    pub bad_on: BTreeSet<Vec<u8>>,
    /// What is to be read of each tape.
    cover: Cover,
}

impl Plan {
    /// Blocks that are to be brought back.
    pub fn blocks(&self) -> u64 {
        self.tapes.iter().map(|it| it.blocks).sum()
    }

    /// Their bytes.
    pub fn bytes(&self) -> u64 {
        self.tapes.iter().map(|it| it.bytes).sum()
    }

    /// How long it may take with one drive, in seconds: an estimate for tapes of the last years.
    pub fn seconds(&self) -> u64 {
        self.bytes() / RATE + self.tapes.len() as u64 * CHANGE_SECS
    }
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Recalled {
    /// Blocks that are back.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blocks that are still missing.
    pub missing: u64,
    /// The first of those that are on no tape that is known to be good.
    pub lost: Vec<BlockId>,
    /// Tapes on which some of those were found bad.
    pub bad_on: BTreeSet<Vec<u8>>,
    /// What went wrong, each named; at most a thousand.
    pub problems: Vec<Problem>,
    /// How much of it there was.
    pub problem_count: u64,
    /// Whether there was a tape that could not be had.
    pub is_tape_missing: bool,
}

impl Recalled {
    pub(super) fn note(&mut self, problem: Problem) {
        log::warn!("{problem}");
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }
}

/// Brings a tape into a drive; `None` if it cannot be had.
pub type GetTape<'a> = Box<dyn FnMut(&[u8]) -> Result<Option<Loaded>> + Send + 'a>;

/// What reads tapes.
pub struct Source<'a> {
    /// The label of the tape that is in it: no other source is to wait for that.
    pub has: Option<Vec<u8>>,
    /// Brings another one.
    pub get: GetTape<'a>,
}

/// Plans the recall of these blocks.
pub fn plan(catalog: &Path, needed: &RunBlocks, progress: &Progress) -> Result<Plan> {
    plan_without(catalog, needed, &BTreeSet::new(), progress)
}

/// The same without the tapes that cannot be had.
fn plan_without(
    catalog: &Path,
    needed: &RunBlocks,
    away: &BTreeSet<Vec<u8>>,
    progress: &Progress,
) -> Result<Plan> {
    progress.set_phase("looking for tapes");
    let reader = Reader::open(catalog)?;
    let volumes = Volumes::open(reader.volumes()?);
    let tapes = Tapes::look(catalog)?;
    let health = Health::open(catalog);
    let mut plan = Plan {
        tapes: Vec::new(),
        blocks_here: 0,
        blocks_lost: 0,
        lost: Vec::new(),
        bad_on: BTreeSet::new(),
        cover: Cover::new()?,
    };
    let mut after = 0;
    loop {
        progress.check()?;
        let page = reader.block_numbers(after, PAGE_BLOCKS)?;
        let Some(last) = page.last() else { break };
        after = *last;
        for number in page.into_iter().filter(|it| needed.has(*it)) {
            let row = reader.block(number)?;
            // Only what somebody has found bad is known to be bad: a plan reads no block.
            let has = |number: &i64| {
                volumes.get(*number).is_some_and(|it| {
                    let len = it.store.len_of(&row.id);
                    matches!(len, Ok(Some(len)) if len == row.stored_len)
                        && !health.is_bad(&it.config.uuid, &row.id)
                })
            };
            if row.volumes.iter().any(has) {
                plan.blocks_here += 1;
                continue;
            }
            let mut places = tapes.as_ref().map_or(Ok(Vec::new()), |it| it.places(&row.id))?;
            places.retain(|it| !away.contains(&it.label));
            if places.is_empty() {
                plan.blocks_lost += 1;
                if plan.lost.len() < NAMED_MAX {
                    let bad_on = tapes.as_ref().map(|it| it.labels_bad(&row.id)).transpose()?;
                    plan.bad_on.extend(bad_on.unwrap_or_default());
                    plan.lost.push(row.id);
                }
                continue;
            }
            plan.cover.add(number, &row.id, &places)?;
        }
    }
    while let Some(of) = plan.cover.take()? {
        progress.check()?;
        plan.tapes.push(of);
    }
    Ok(plan)
}

/// The pieces of a tape, forwards. Of those only a page is in memory.
struct Pieces<'a> {
    cover: &'a Mutex<Cover>,
    of: &'a OfTape,
    page: VecDeque<Piece>,
}

impl<'a> Pieces<'a> {
    fn new(cover: &'a Mutex<Cover>, of: &'a OfTape) -> Result<Pieces<'a>> {
        let page = cover.lock().pieces(of, None, PAGE_PIECES)?.into();
        Ok(Pieces { cover, of, page })
    }

    /// The next one, of this tape file or of any.
    fn next(&mut self, filenum: Option<u64>) -> Result<Option<Piece>> {
        let is_wanted = |it: &Piece| filenum.is_none_or(|filenum| filenum == it.filenum);
        if !self.page.front().is_some_and(is_wanted) {
            return Ok(None);
        }
        let next = self.page.pop_front();
        if self.page.is_empty() {
            self.page = self.cover.lock().pieces(self.of, next.as_ref(), PAGE_PIECES)?.into();
        }
        Ok(next)
    }
}

/// What a drive has to say.
enum Said {
    Block(Fetched),
    /// It could not be read of this tape: then another one is looked for.
    Bad(Vec<u8>, Piece, Error),
    /// A tape that cannot be had, or read any further.
    NoTape(Vec<u8>, Error),
    /// Something that another tape would meet too.
    Ended(Error),
}

/// What is at fault where something does not come back.
enum Fault {
    /// The tape, or the drive.
    Tape(Error),
    /// A disk, or the wish to stop.
    Other(Error),
}

/// What all drives work with.
struct Shared<'a> {
    hash: HashAlgo,
    targets: Targets<'a>,
    rows: Mutex<Reader>,
    tapes: Mutex<Tapes>,
    cover: Mutex<Cover>,
    /// Which tape each drive has, as far as is known.
    held: Mutex<Vec<Option<Vec<u8>>>>,
    progress: &'a Progress,
}

impl Shared<'_> {
    /// Notes which tape a drive has: no other one has that now.
    fn hold(&self, drive: usize, label: &[u8]) {
        for (number, held) in self.held.lock().iter_mut().enumerate() {
            if number == drive {
                *held = Some(label.to_vec());
            } else if held.as_deref() == Some(label) {
                *held = None;
            }
        }
    }
}

/// Brings blocks back as it was planned: `drives` work in parallel, each with a tape of its own.
/// What then is still missing is planned anew.
pub fn recall(
    catalog: &Path,
    (needed, first): (&RunBlocks, Plan),
    mut drives: Vec<Source<'_>>,
    progress: &Progress,
) -> Result<Recalled> {
    let mut done = Recalled::default();
    let mut away: BTreeSet<Vec<u8>> = BTreeSet::new();
    let mut first = Some(first);
    let mut is_worth_it = true;
    loop {
        // A tape that could not be had is asked for once: another one may have the same.
        let plan = match first.take() {
            Some(plan) => plan,
            None => plan_without(catalog, needed, &away, progress)?,
        };
        done.missing = plan.blocks() + plan.blocks_lost;
        (done.lost, done.bad_on) = (plan.lost.clone(), plan.bad_on.clone());
        if plan.tapes.is_empty() || !is_worth_it {
            break;
        }
        let before = away.len();
        Progress::add(&progress.bytes_total, plan.bytes());
        let bad = read_tapes(catalog, plan, &mut drives, &mut away, &mut done, progress)?;
        // There are only so many copies and tapes: this comes to an end.
        is_worth_it = bad || away.len() > before;
    }
    progress.set_phase("done");
    Ok(done)
}

/// Reads the tapes of a plan; whether members were found bad, so that it is worth while to look for
/// other copies of them.
fn read_tapes(
    catalog: &Path,
    plan: Plan,
    drives: &mut [Source<'_>],
    away: &mut BTreeSet<Vec<u8>>,
    done: &mut Recalled,
    progress: &Progress,
) -> Result<bool> {
    let (store, volumes) = Store::open(catalog)?;
    progress.set_phase("reading tapes");
    let shared = Shared {
        hash: store.settings.hash,
        targets: Targets::new(&volumes),
        rows: Mutex::new(Reader::open(catalog)?),
        tapes: Mutex::new(Tapes::open(catalog)?),
        cover: Mutex::new(plan.cover),
        held: Mutex::new(drives.iter_mut().map(|it| it.has.take()).collect()),
        progress,
    };
    let queue = Mutex::new(plan.tapes);
    let mut into = Into::new(store, &volumes, done);
    let mut has_bad = false;
    let (said, heard) = sync_channel::<Said>(WAITING * drives.len().max(1));
    let result = std::thread::scope(|scope| {
        for (drive, source) in drives.iter_mut().enumerate() {
            let get = &mut source.get;
            let (queue, shared, said) = (&queue, &shared, said.clone());
            scope.spawn(move || {
                loop {
                    let next = take_turn(&mut queue.lock(), &shared.held.lock(), drive);
                    let Some(of) = next else { return };
                    let fault = match read_tape(&of, (drive, get), shared, &said) {
                        Ok(()) => continue,
                        Err(Fault::Tape(e)) if !is_of_all(&e) => Said::NoTape(of.label, e),
                        Err(Fault::Tape(e) | Fault::Other(e)) => Said::Ended(e),
                    };
                    if said.send(fault).is_err() {
                        return;
                    }
                }
            });
        }
        drop(said);
        let mut result = Ok(());
        for it in heard {
            result = progress.check().and_then(|()| match it {
                Said::Block(block) => into.take(block),
                Said::Bad(label, piece, error) => {
                    has_bad = true;
                    into.note(format!("block {} on tape {}", piece.id, Quoted(&label)), &error);
                    shared.tapes.lock().note_bad((&label, piece.filenum), piece.at)
                }
                Said::NoTape(label, error) => {
                    into.note_tape(&label, &error);
                    away.insert(label);
                    Ok(())
                }
                Said::Ended(error) => Err(error),
            });
            if result.is_err() {
                // Nobody hears the drives any more, and so they stop.
                break;
            }
        }
        result
    });
    // Also when it was stopped: what was read needs no second time.
    let settled = into.settle();
    for (source, held) in drives.iter_mut().zip(shared.held.into_inner()) {
        source.has = held;
    }
    result.and(settled).map(|()| has_bad)
}

/// Whether every other tape would fail in the same way.
fn is_of_all(error: &Error) -> bool {
    error.is_shortage() || matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Interrupted)
}

/// The next tape for a drive: the one that is in it, or else one that is in no other, for whoever
/// has that reads it.
fn take_turn(queue: &mut Vec<OfTape>, held: &[Option<Vec<u8>>], drive: usize) -> Option<OfTape> {
    let holder = |of: &OfTape| held.iter().position(|it| it.as_ref() == Some(&of.label));
    let own = queue.iter().position(|it| holder(it) == Some(drive));
    let at = own.or_else(|| queue.iter().position(|it| holder(it).is_none()))?;
    Some(queue.remove(at))
}

/// Reads what is wanted of a tape.
fn read_tape(
    of: &OfTape,
    (drive, get): (usize, &mut GetTape<'_>),
    shared: &Shared<'_>,
    said: &SyncSender<Said>,
) -> std::result::Result<(), Fault> {
    let label = &of.label;
    let mut pieces = Pieces::new(&shared.cover, of).map_err(Fault::Other)?;
    let known = shared.tapes.lock().tape(label).map_err(Fault::Other)?;
    let missing = || Error::new(ErrorKind::WrongTape, "it could not be had");
    let loaded = get(label).and_then(|it| it.ok_or_else(missing));
    let mut loaded = loaded.map_err(Fault::Tape)?;
    loaded.expect_label(label).map_err(Fault::Tape)?;
    shared.hold(drive, label);
    expect_known(&loaded, known.as_ref()).map_err(Fault::Tape)?;
    // What could not be read is read once more in the end: it may have been the drive.
    let mut failures: Vec<Piece> = Vec::new();
    while let Some(first) = pieces.next(None).map_err(Fault::Other)? {
        let filenum = first.filenum;
        let mut visit = None;
        let mut file = open_file(&mut loaded, &first, &mut visit);
        let mut next = Some(first);
        while let Some(piece) = next {
            shared.progress.check().map_err(Fault::Other)?;
            let read = match &mut file {
                Ok(file) => seek(file, piece.at)
                    .map_err(Fault::Tape)
                    .and_then(|()| read_block(file, &piece, shared)),
                Err(e) => Err(Fault::Tape(Error::new(e.kind(), e.to_string()))),
            };
            match read {
                Ok(block) => {
                    if said.send(Said::Block(block)).is_err() {
                        // Nobody hears it any more.
                        return Ok(());
                    }
                }
                Err(Fault::Tape(e)) if !is_of_all(&e) && failures.len() < FAILURES_MAX => {
                    log::warn!("block {} on tape {}: {e}", piece.id, Quoted(label));
                    failures.push(piece);
                }
                Err(fault) => return Err(fault),
            }
            next = pieces.next(Some(filenum)).map_err(Fault::Other)?;
        }
    }
    if !failures.is_empty() {
        loaded.again().map_err(Fault::Tape)?;
    }
    let mut bad = Vec::new();
    for piece in failures {
        shared.progress.check().map_err(Fault::Other)?;
        let mut visit = None;
        let read = open_file(&mut loaded, &piece, &mut visit)
            .and_then(|mut file| file.seek_to(piece.at).map(|()| file))
            .map_err(Fault::Tape)
            .and_then(|mut file| read_block(&mut file, &piece, shared));
        match read {
            Ok(block) => {
                if said.send(Said::Block(block)).is_err() {
                    return Ok(());
                }
            }
            Err(Fault::Tape(e)) if !is_of_all(&e) => bad.push((piece, e)),
            Err(fault) => return Err(fault),
        }
    }
    if !bad.is_empty() {
        // A drive that reads nothing any more says nothing of the tape.
        loaded.again().map_err(Fault::Tape)?;
    }
    for (piece, error) in bad {
        if said.send(Said::Bad(label.clone(), piece, error)).is_err() {
            return Ok(());
        }
    }
    loaded.close().map_err(Fault::Tape)
}

/// Opens the tape file of a piece.
fn open_file<'v, 'd>(
    loaded: &'d mut Loaded,
    piece: &Piece,
    visit: &'v mut Option<Visit<'d>>,
) -> Result<TapeFile<'v, 'd>> {
    let drive = loaded.drive();
    let missing = || {
        let what = format!("it has no file {} at {}", piece.filenum, piece.position);
        Error::corrupt(what)
    };
    if drive.locate(piece.position)? != Moved::There {
        return Err(missing());
    }
    visit.insert(Visit::new(drive, piece.filenum)).next_file()?.ok_or_else(missing)
}

/// Goes to a byte of a tape file: over what is between, unless that is much or cannot be read.
fn seek(file: &mut TapeFile<'_, '_>, at: u64) -> Result<()> {
    if let Some(gap @ 1..=GAP_BYTES) = at.checked_sub(file.offset()) {
        let mut between = Read::take(Read::by_ref(file), gap);
        match std::io::copy(&mut between, &mut std::io::sink()) {
            Ok(read) if read == gap => return Ok(()),
            Ok(_) => {}
            Err(e) => log::debug!("before byte {at}: {e}"),
        }
    }
    file.seek_to(at)
}

fn read_block(
    file: &mut dyn Read,
    piece: &Piece,
    shared: &Shared<'_>,
) -> std::result::Result<Fetched, Fault> {
    let corrupt = |what: String| Fault::Tape(Error::corrupt(what));
    let copies = shared.rows.lock().copies_of(piece.number).map_err(Fault::Other)?;
    let (volume, mut coming) = shared.targets.choose(&copies, piece.len).map_err(Fault::Other)?;
    let mut pending = volume.store.begin().map_err(Fault::Other)?;
    let mut hasher = shared.hash.hasher();
    let mut buffer = vec![0; 1 << 20];
    let mut left = piece.len;
    while left > 0 {
        shared.progress.check().map_err(Fault::Other)?;
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let read = file.read(buffer.get_mut(..len).unwrap_or_default());
        let len = match read {
            Ok(0) => return Err(corrupt("the tape file ends in the middle of it".to_owned())),
            Ok(len) => len,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Fault::Tape(unwrapped(e))),
        };
        let bytes = buffer.get(..len).unwrap_or_default();
        hasher.update(bytes);
        pending.append(bytes).map_err(Fault::Other)?;
        coming.written(len as u64);
        left -= len as u64;
        Progress::add(&shared.progress.bytes, len as u64);
    }
    let found = hasher.finish();
    if found != piece.id {
        return Err(corrupt(format!("what the tape has there has the hash {found}")));
    }
    let (number, id, len) = (piece.number, piece.id, piece.len);
    Ok(Fetched { number, id, len, volume, pending })
}
