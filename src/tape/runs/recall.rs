//! Bringing blocks back from tape to volumes.
//!
//! First a plan: what is on no volume that is there, and the fewest tapes that have it. Then each
//! tape once, forwards. A block counts when all of its bytes have had the hash that is its name and
//! its file is durable; then it gets its meta, its record and its row, as any further copy does.
//! Whatever ends it, what has come back stays, and the next time only the rest is planned.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Read;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};

use parking_lot::Mutex;

use crate::catalog::tapes::{Cover, OfTape, Piece, Tapes};
use crate::catalog::{Reader, RunBlocks, meta};
use crate::chunk::HashAlgo;
use crate::copies::{Store, tables_of, write_metas};
use crate::error::{Error, ErrorKind, Problem, Quoted, Result};
use crate::progress::Progress;
use crate::sys::{Time, quoted};
use crate::tape::drive::Moved;
use crate::tape::loaded::Loaded;
use crate::tape::read::Visit;
use crate::volume::store::PendingBlock;
use crate::volume::{BlockId, BlockIndex, CopyAt, Status, Volume, Volumes, Writer as BlockWriter};

/// Blocks taken from the catalog at a time.
const PAGE_BLOCKS: u64 = 1024;
/// Pieces of a tape taken from the plan at a time.
const PAGE_PIECES: u64 = 1024;
/// Blocks that are made durable together, and their bytes.
const GROUP_BLOCKS: usize = 16;
const GROUP_BYTES: u64 = 256 << 20;
/// Blocks that wait to be made durable, for each drive.
const WAITING: usize = 2;
/// A gap on a tape up to this many bytes is read over; a longer one is gone over by the drive.
const GAP_BYTES: u64 = 64 << 20;
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
    /// What went wrong, each named.
    pub problems: Vec<Problem>,
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
    let mut plan = Plan {
        tapes: Vec::new(),
        blocks_here: 0,
        blocks_lost: 0,
        lost: Vec::new(),
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
            let has = |it: &&i64| {
                let len = volumes.get(**it).map(|it| it.store.len_of(&row.id));
                matches!(len, Some(Ok(Some(len))) if len == row.stored_len)
            };
            if row.volumes.iter().any(|it| has(&it)) {
                plan.blocks_here += 1;
                continue;
            }
            let mut places = tapes.as_ref().map_or(Ok(Vec::new()), |it| it.places(&row.id))?;
            places.retain(|it| !away.contains(&it.label));
            if places.is_empty() {
                plan.blocks_lost += 1;
                if plan.lost.len() < NAMED_MAX {
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

/// A block that has been read and is right, and waits for its name.
struct Fetched {
    number: u64,
    id: BlockId,
    len: u64,
    volume: Volume,
    pending: Box<dyn PendingBlock>,
}

/// What a drive has to say.
enum Said {
    Block(Fetched),
    /// It could not be read of this tape: then another one is looked for.
    Bad(Vec<u8>, Piece, Error),
    /// A tape that cannot be had, or read any further.
    NoTape(Vec<u8>, Error),
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
    loop {
        // A tape that could not be had is asked for once: another one may have the same.
        let plan = match first.take() {
            Some(plan) => plan,
            None => plan_without(catalog, needed, &away, progress)?,
        };
        done.missing = plan.blocks() + plan.blocks_lost;
        if plan.tapes.is_empty() {
            break;
        }
        let before = (done.blocks, away.len());
        Progress::add(&progress.bytes_total, plan.bytes());
        let bad = read_tapes(catalog, plan, &mut drives, &mut away, &mut done, progress)?;
        if !bad && before == (done.blocks, away.len()) {
            break;
        }
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
    let targets = Targets { volumes: &volumes, planned: Mutex::new(BTreeMap::new()) };
    let hash = store.settings.hash;
    let rows = Reader::open(catalog)?;
    let rows = Mutex::new(rows);
    let (queue, cover) = (Mutex::new(plan.tapes), Mutex::new(plan.cover));
    let held: Vec<Option<Vec<u8>>> = drives.iter_mut().map(|it| it.has.take()).collect();
    let held = &held;
    let mut into = Into { store, volumes: &volumes, group: Vec::new(), bytes: 0, done };
    let mut has_bad = false;
    let (said, heard) = sync_channel::<Said>(WAITING * drives.len().max(1));
    let result = std::thread::scope(|scope| {
        for (drive, source) in drives.iter_mut().enumerate() {
            let get = &mut source.get;
            let (queue, cover, said) = (&queue, &cover, said.clone());
            let (targets, rows) = (&targets, &rows);
            scope.spawn(move || {
                loop {
                    let Some(of) = take_turn(&mut queue.lock(), held, drive) else { return };
                    let label = of.label.clone();
                    let pieces = Pieces::new(cover, &of);
                    let read = pieces
                        .and_then(|it| read_tape(it, get, hash, (targets, rows), &said, progress));
                    if let Err(e) = read
                        && said.send(Said::NoTape(label, e)).is_err()
                    {
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
                    Tapes::open(catalog)?.note_bad((&label, piece.filenum), piece.at)
                }
                Said::NoTape(_, error)
                    if error.is_shortage() || error.kind() == ErrorKind::NoSpace =>
                {
                    Err(error)
                }
                Said::NoTape(label, error) => {
                    into.note(format!("tape {}", Quoted(&label)), &error);
                    away.insert(label);
                    Ok(())
                }
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
    result.and(settled).map(|()| has_bad)
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
    mut pieces: Pieces<'_>,
    get: &mut GetTape<'_>,
    hash: HashAlgo,
    (targets, rows): (&Targets<'_>, &Mutex<Reader>),
    said: &SyncSender<Said>,
    progress: &Progress,
) -> Result<()> {
    let label = &pieces.of.label;
    let missing = || Error::new(ErrorKind::WrongTape, "it could not be had");
    let mut loaded = get(label)?.ok_or_else(missing)?;
    loaded.expect_label(label)?;
    while let Some(first) = pieces.next(None)? {
        let drive = loaded.drive();
        if drive.locate(first.position)? != Moved::There {
            let what = format!("it has no file {} at {}", first.filenum, first.position);
            return Err(Error::corrupt(what));
        }
        let mut visit = Visit::new(drive, first.filenum);
        let Some(mut file) = visit.next_file()? else {
            return Err(Error::corrupt(format!("it ends before file {}", first.filenum)));
        };
        let filenum = first.filenum;
        let mut next = Some(first);
        while let Some(piece) = next {
            progress.check()?;
            let read = seek(&mut file, piece.at)
                .and_then(|()| read_block(&mut file, &piece, hash, targets, rows, progress));
            let it = match read {
                Ok(block) => Said::Block(block),
                Err(e) if e.is_shortage() || is_of_target(&e) => return Err(e),
                Err(e) => {
                    progress.check()?;
                    Said::Bad(pieces.of.label.clone(), piece, e)
                }
            };
            if said.send(it).is_err() {
                return Ok(());
            }
            next = pieces.next(Some(filenum))?;
        }
    }
    loaded.close()
}

/// Whether a volume is at fault, and not the tape.
fn is_of_target(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Interrupted | ErrorKind::Offline)
}

fn seek(file: &mut crate::tape::read::TapeFile<'_, '_>, at: u64) -> Result<()> {
    let gap = at.checked_sub(file.offset());
    match gap {
        Some(0) => Ok(()),
        Some(gap) if gap <= GAP_BYTES => {
            let mut between = Read::take(Read::by_ref(file), gap);
            let read = std::io::copy(&mut between, &mut std::io::sink());
            match read.map_err(|e| Error::io("reading the tape", e))? {
                read if read == gap => Ok(()),
                _ => Err(Error::corrupt("the tape file ends before it")),
            }
        }
        _ => file.seek_to(at),
    }
}

fn read_block(
    file: &mut dyn Read,
    piece: &Piece,
    hash: HashAlgo,
    targets: &Targets<'_>,
    rows: &Mutex<Reader>,
    progress: &Progress,
) -> Result<Fetched> {
    let copies = rows.lock().copies_of(piece.number)?;
    let volume = targets.choose(&copies, piece.len)?;
    let mut pending = volume.store.begin()?;
    let mut hasher = hash.hasher();
    let mut buffer = vec![0; 1 << 20];
    let mut left = piece.len;
    while left > 0 {
        progress.check()?;
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let read = file.read(buffer.get_mut(..len).unwrap_or_default());
        let len = match read {
            Ok(0) => return Err(Error::corrupt("the tape file ends in the middle of it")),
            Ok(len) => len,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::io("reading the tape", e)),
        };
        let bytes = buffer.get(..len).unwrap_or_default();
        hasher.update(bytes);
        pending.append(bytes)?;
        left -= len as u64;
        Progress::add(&progress.bytes, len as u64);
    }
    let found = hasher.finish();
    if found != piece.id {
        return Err(Error::corrupt(format!("what the tape has there has the hash {found}")));
    }
    let (number, id, len) = (piece.number, piece.id, piece.len);
    Ok(Fetched { number, id, len, volume, pending })
}

/// The volumes that blocks come to.
struct Targets<'a> {
    volumes: &'a Volumes,
    /// Bytes that are on their way to each.
    planned: Mutex<BTreeMap<i64, u64>>,
}

impl Targets<'_> {
    /// Where a block goes: to where the catalog has it, if that is there, or where there is most
    /// room.
    fn choose(&self, copies: &[CopyAt], len: u64) -> Result<Volume> {
        if let Some(volume) = copies.iter().find_map(|it| self.volumes.get(it.volume)) {
            return Ok(volume.clone());
        }
        let mut planned = self.planned.lock();
        let mut best: Option<(u64, &Volume)> = None;
        for volume in self.volumes.present() {
            if volume.config.status != Status::Active {
                continue;
            }
            let taken = planned.get(&volume.config.number).copied().unwrap_or(0);
            let room = volume.room()?.saturating_sub(taken);
            if room >= len && best.is_none_or(|it| it.0 < room) {
                best = Some((room, volume));
            }
        }
        let Some((_, volume)) = best else {
            let message = format!("no volume has room for {len} bytes: add one with add-volume");
            return Err(Error::new(ErrorKind::NoSpace, message));
        };
        // Only an estimate until the group is durable; a full disk says so itself.
        let entry = planned.entry(volume.config.number).or_default();
        *entry = (*entry + len).min(GROUP_BYTES * 2);
        Ok(volume.clone())
    }
}

/// What takes blocks in.
struct Into<'a> {
    store: Store,
    volumes: &'a Volumes,
    group: Vec<Fetched>,
    bytes: u64,
    done: &'a mut Recalled,
}

impl Into<'_> {
    fn note(&mut self, name: String, error: &Error) {
        let problem = Problem::new(name, error);
        log::warn!("{problem}");
        self.done.problems.push(problem);
    }

    fn take(&mut self, block: Fetched) -> Result<()> {
        self.bytes += block.len;
        self.group.push(block);
        if self.group.len() < GROUP_BLOCKS && self.bytes < GROUP_BYTES {
            return Ok(());
        }
        self.settle()
    }

    /// Makes a group durable and known.
    fn settle(&mut self) -> Result<()> {
        self.bytes = 0;
        let mut by_volume: BTreeMap<i64, Vec<Fetched>> = BTreeMap::new();
        for block in self.group.drain(..) {
            by_volume.entry(block.volume.config.number).or_default().push(block);
        }
        for (number, blocks) in by_volume {
            let Some(volume) = self.volumes.get(number) else { continue };
            let mut pending = Vec::new();
            let mut known = Vec::new();
            for block in blocks {
                known.push((block.number, block.id, block.len));
                pending.push((block.pending, block.id));
            }
            volume.store.publish(pending)?;
            for (block, id, len) in known {
                volume.store.forget(&id);
                self.register(volume, block, &id)?;
                self.done.blocks += 1;
                self.done.bytes += len;
            }
        }
        Ok(())
    }

    /// Notes a block that is durable on a volume.
    fn register(&mut self, volume: &Volume, block: u64, id: &BlockId) -> Result<()> {
        let uuid = &volume.config.uuid;
        let copies = self.store.reader.copies_of(block)?;
        if copies.iter().any(|it| it.volume == volume.config.number) {
            self.store.health.note_healed(uuid, id);
            return Ok(());
        }
        let hash = self.store.settings.hash;
        let index: BlockIndex = tables_of(&self.store.reader, self.volumes, hash, block, &copies)
            .or_else(|_| {
            let mut all = copies.clone();
            // Its record comes only now; its bytes are there.
            let at = i64::MAX.cast_unsigned();
            all.push(CopyAt { volume: volume.config.number, record_at: at });
            tables_of(&self.store.reader, self.volumes, hash, block, &all)
        })?;
        let mut names = meta::DirNames::default();
        write_metas(&self.store.reader, volume, &[&index], hash, &mut names)?;
        let blocks = BlockWriter::new(
            self.volumes,
            hash,
            self.store.settings.block_bytes,
            self.store.writer.next_block()?,
            self.store.index_lens().to_vec(),
        );
        let at = blocks.add_record(volume.config.number, block, &index)?;
        let lens = blocks.index_lens();
        let known: Vec<(i64, u64)> = self
            .volumes
            .present()
            .iter()
            .zip(&lens)
            .filter_map(|(it, len)| Some((it.config.number, (*len)?)))
            .collect();
        self.store.set_index_lens(lens);
        self.store.writer.put_copies(&[(block, at)], &known)?;
        self.store.health.note_good(&[(uuid, *id)], Time::now());
        log::debug!("block {id} is back on {}", quoted(&volume.config.path));
        Ok(())
    }
}
