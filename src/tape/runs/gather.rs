//! A catalog from tapes alone.
//!
//! All tapes are read once, in any order: what explains blocks becomes a volume that has no blocks
//! yet, and where the blocks are is noted beside the catalog. Then the catalog is made of that
//! volume as of any other, or where manifests are lost of a copy of the catalog that a tape has.
//! Recall brings the blocks to it, where the catalog expects them.
//!
//! Invariant: nothing is a volume, and there is no catalog, before all of that is there and lasts;
//! until then it can be begun again with the same directory. What is damaged or of another catalog
//! takes the place of nothing, and of two readings of a tape file the better one counts.

mod choose;
mod lot;
mod made;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use lot::{Lot, Relation, Sign};

use super::walk::{self, Visitor, prove, proved_by, walk};
use super::{GUIDE_NAME, Kind, PROBLEMS_MAX};
use crate::catalog::tapes::{Item, Member as Noted, Tape, TapeFile, Tapes};
use crate::catalog::{RunId, copy};
use crate::chunk::HashAlgo;
use crate::error::{Error, ErrorKind, Problem, Quoted, Result};
use crate::progress::Progress;
use crate::rebuild;
use crate::sys::{self, Time, quoted};
use crate::tape::cpio::Member;
use crate::tape::loaded::Loaded;
use crate::tape::read::Own;
use crate::volume::VolumeManifest;

/// Longest volume manifest, in bytes.
const MANIFEST_BYTES_MAX: u64 = 64 << 10;
/// Where documents are until all tapes are read, in the directory that becomes the volume.
const STAGING: &str = ".gathering";

/// What came of reading tapes.
#[derive(Debug, Default)]
pub struct Gathered {
    /// Tapes that were read.
    pub tapes: u64,
    /// Tape files with members of a catalog.
    pub files: u64,
    /// Blocks that are right, each as often as it is on a tape.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Metas and manifests.
    pub documents: u64,
    /// The run after which the copy of the catalog was made that the catalog comes from, if
    /// manifests are lost that it makes up for.
    pub copy: Option<RunId>,
    /// What could not be read or is not right, each named; at most a thousand.
    pub problems: Vec<Problem>,
    /// How much of it there was.
    pub problem_count: u64,
}

impl Gathered {
    fn note(&mut self, progress: &Progress, name: String, error: &Error) {
        let problem = Problem::new(name, error);
        log::warn!("{problem}");
        progress.note(&problem);
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }
}

/// What to make a catalog of.
pub struct From<'a> {
    /// An empty or missing directory, which becomes its volume.
    pub into: &'a Path,
    /// Gives the tapes.
    pub next: &'a mut dyn FnMut() -> Result<Option<Loaded>>,
    /// Whether to go on without runs that are lost, and without those that are changes of them.
    pub allow_gaps: bool,
}

/// Makes the catalog `catalog`, which must not exist, of tapes. `lacking` is called with every file
/// that needs a block of which nothing says what is in it. What was read is told however it ends.
pub fn rebuild(
    catalog: &Path,
    from: From<'_>,
    progress: &Progress,
    lacking: &mut rebuild::Lacking<'_>,
) -> (Gathered, Result<rebuild::Summary>) {
    let mut done = Gathered::default();
    let made = gather(catalog, from, (&mut done, progress), lacking);
    (done, made)
}

fn gather(
    catalog: &Path,
    from: From<'_>,
    (done, progress): (&mut Gathered, &Progress),
    lacking: &mut rebuild::Lacking<'_>,
) -> Result<rebuild::Summary> {
    let From { into, next, allow_gaps } = from;
    if catalog.symlink_metadata().is_ok() {
        let what = format!("there is a catalog at {} already: give a new name", quoted(catalog));
        return Err(Error::usage(what));
    }
    if into.join(".rt_volume_manifest").symlink_metadata().is_ok() {
        let what = format!(
            "{} is a volume already: give a new directory, or make the catalog of what it has with \
             rebuildmeta --volumes",
            quoted(into)
        );
        return Err(Error::usage(what));
    }
    let staging = Staging::new(into)?;
    let mut work = Gather {
        staging: &staging,
        tapes: Tapes::open(catalog)?,
        progress,
        done,
        lots: BTreeMap::new(),
        last_lot: 0,
        read: BTreeMap::new(),
        tape: None,
        lot_of_tape: None,
        file: None,
    };
    progress.set_phase("reading tapes");
    loop {
        progress.check()?;
        match next() {
            Ok(Some(mut loaded)) => {
                work.take(&mut loaded)?;
                loaded.close()?;
            }
            Ok(None) => break,
            Err(e) if is_of_disk(&e) => return Err(e),
            Err(e) => work.done.note(progress, "a tape".to_owned(), &e),
        }
    }
    progress.set_phase("making a volume");
    let lot = work.choose()?;
    drop(work);
    made::make((catalog, into, allow_gaps), lot, (done, progress), lacking)
}

/// What is gone at the end, whatever that is.
struct Staging(PathBuf);

impl Staging {
    fn new(into: &Path) -> Result<Staging> {
        let dir = into.join(STAGING);
        let failed = |e| Error::io(format!("creating {}", quoted(&dir)), e);
        // Of an attempt that was killed.
        if dir.symlink_metadata().is_ok() {
            std::fs::remove_dir_all(&dir).map_err(failed)?;
        }
        sys::make_private_dirs(&dir).map_err(failed)?;
        Ok(Staging(dir))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            log::warn!("{} stays: {e}", quoted(&self.0));
        }
    }
}

struct Gather<'a> {
    staging: &'a Staging,
    tapes: Tapes,
    progress: &'a Progress,
    done: &'a mut Gathered,
    /// What belongs together, in the order in which it was met.
    lots: BTreeMap<u64, Lot>,
    last_lot: u64,
    /// The tapes that have something of a catalog: by their labels, with the hashes of those.
    read: BTreeMap<Vec<u8>, [u8; 32]>,
    tape: Option<Tape>,
    /// The lot of the last archive of the tape at hand.
    lot_of_tape: Option<u64>,
    file: Option<Begun>,
}

/// The archive at hand.
struct Begun {
    file: TapeFile,
    tape: Tape,
    sign: Sign,
    /// Whether its job file says that it is of a catalog, and it is known which batch it is.
    is_said: bool,
    has_batch: bool,
    /// The lot that it belongs to, as soon as it is known to be of a catalog.
    lot: Option<u64>,
    /// What names its blocks, if it says that.
    hash: Option<HashAlgo>,
    /// Nothing of it is wrong so far.
    is_right: bool,
    members: Vec<Noted>,
}

impl Gather<'_> {
    /// Reads a tape. Its trouble is told, and the next one is read none the less.
    fn take(&mut self, loaded: &mut Loaded) -> Result<()> {
        let described = loaded.describe();
        let (Some(label), Some(hash)) = (loaded.label().cloned(), loaded.hash()) else {
            let error = Error::new(ErrorKind::WrongTape, "it has no label of ours");
            self.done.note(self.progress, described, &error);
            return Ok(());
        };
        self.tape = Some(Tape {
            label: label.text().to_vec(),
            hash: hash.bytes(),
            pool: "any".to_owned(),
            block_bytes: crate::tape::write::BLOCK_BYTES,
        });
        self.lot_of_tape = None;
        self.done.tapes += 1;
        let mut others = Vec::new();
        let progress = self.progress;
        let walked = walk(
            loaded,
            self,
            &mut |filenum, error| {
                others.push((filenum, error));
                Ok(())
            },
            progress,
        );
        for (filenum, error) in others {
            let name = format!("{described}, file {filenum}");
            match error {
                Some(error) => self.done.note(progress, name, &error),
                None => log::info!("{name}: no archive of a job, passed over"),
            }
        }
        progress.check()?;
        match walked {
            Err(e) if is_of_disk(&e) => Err(e),
            Err(e) => {
                self.done.note(progress, described, &e);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Notes the tape of the archive at hand, and finds the lot of that; `false` if that cannot be.
    fn settle(&mut self) -> Result<bool> {
        let Some(begun) = &self.file else { return Ok(false) };
        if begun.lot.is_some() {
            return Ok(true);
        }
        let (tape, sign) = (begun.tape.clone(), begun.sign.clone());
        if !self.put_tape(&tape)? {
            // Of one that is passed over no other file is looked at.
            (self.tape, self.file) = (None, None);
            return Ok(false);
        }
        let is_same = |it: &(&u64, &Lot)| it.1.relation_to(&sign) == Relation::Same;
        let is_told = sign.job.is_some() || sign.run.is_some();
        let known = self.lots.iter().find(is_same).map(|it| *it.0);
        let number = match known.or(self.lot_of_tape.filter(|_| !is_told)) {
            Some(number) => number,
            None => {
                self.last_lot += 1;
                let dir = self.staging.0.join(self.last_lot.to_string());
                self.lots.insert(self.last_lot, Lot::new(dir)?);
                self.last_lot
            }
        };
        if let (Some(lot), Some(begun)) = (self.lots.get_mut(&number), &mut self.file) {
            lot.hash = begun.hash.or(lot.hash);
            lot.take(sign);
            begun.lot = Some(number);
        }
        self.lot_of_tape = Some(number);
        if self.file.as_ref().is_some_and(|it| !it.is_said && it.is_right) {
            let name = self.name_of(format_args!(""));
            self.note_wrong(name, &Error::corrupt("it has members of a catalog, but no job file"));
        }
        Ok(true)
    }

    /// Notes a tape, before the first of its files; `false` if that cannot be.
    fn put_tape(&mut self, tape: &Tape) -> Result<bool> {
        let known = self.read.get(&tape.label);
        if known.is_some_and(|it| *it != tape.hash) {
            let what = "another tape has the same label, and was read before: give only tapes of \
                        one catalog, or leave that one out";
            let error = Error::new(ErrorKind::WrongTape, what);
            self.done.note(self.progress, format!("tape {}", Quoted(&tape.label)), &error);
            return Ok(false);
        }
        if known.is_none() {
            // What was noted of it before is of an attempt that was stopped. What another reading
            // of this time has found counts as well.
            self.tapes.forget(&tape.label)?;
        }
        match self.tapes.put_tape(tape) {
            Err(e) if e.kind() == ErrorKind::Usage => {
                self.done.note(self.progress, format!("tape {}", Quoted(&tape.label)), &e);
                return Ok(false);
            }
            put => put?,
        }
        self.read.insert(tape.label.clone(), tape.hash);
        Ok(true)
    }

    /// What a volume says of itself tells the settings of its catalog.
    fn put_guide(&mut self, member: &Member, content: &mut dyn Read) -> Result<()> {
        if member.name != b".rt_volume_manifest" || member.header.size > MANIFEST_BYTES_MAX {
            return Ok(());
        }
        let mut text = Vec::new();
        let read = content.take(MANIFEST_BYTES_MAX).read_to_end(&mut text);
        read.map_err(|e| Error::io("reading a volume manifest", e))?;
        match VolumeManifest::parse(&String::from_utf8_lossy(&text)) {
            Ok(said) => {
                if let Some(lot) = self.lot() {
                    lot.take_volume(said);
                }
            }
            Err(e) => self.bad(member, &e),
        }
        Ok(())
    }

    /// The lot of the archive at hand.
    fn lot(&mut self) -> Option<&mut Lot> {
        let number = self.file.as_ref()?.lot?;
        self.lots.get_mut(&number)
    }

    fn put_document(&mut self, kind: Kind, member: &Member, content: &mut dyn Read) -> Result<()> {
        let progress = self.progress;
        let Some(lot) = self.lot() else { return Ok(()) };
        let run = std::str::from_utf8(&member.name).ok().and_then(|it| it.rsplit('/').next());
        match (kind, run.and_then(copy::run_of)) {
            (Kind::Catalog, Some(run)) => lot.put_copy(run, content, progress),
            _ => lot.put((kind, &member.name), content, progress),
        }
    }

    /// Takes together what two readings of a tape file have found; `false` if the first one was
    /// better, and counts alone.
    fn unite(&mut self, begun: &mut Begun) -> Result<bool> {
        let Begun { file, tape, members, .. } = begun;
        let known = self.tapes.files(&tape.label)?;
        let Some(known) = known.into_iter().find(|it| it.filenum == file.filenum) else {
            return Ok(true);
        };
        match (known.verified, file.verified) {
            (Some(_), Some(_)) => return Ok(known.ended < file.ended),
            (Some(_), None) => return Ok(false),
            (None, Some(_)) => return Ok(true),
            (None, None) => {}
        }
        let mut had = Vec::new();
        self.tapes.members((&tape.label, file.filenum), &mut |it| {
            had.push(it);
            Ok(())
        })?;
        let is_said = !known.job.is_empty() && !file.job.is_empty();
        if is_said && (&known.job, known.batch) != (&file.job, file.batch) {
            return Ok(members.len() > had.len());
        }
        let places: BTreeSet<u64> = members.iter().map(|it| it.at).collect();
        members.extend(had.into_iter().filter(|it| !places.contains(&it.at)));
        if file.job.is_empty() {
            (file.job, file.batch, file.ended) = (known.job, known.batch, known.ended);
        }
        file.bytes = file.bytes.max(known.bytes);
        Ok(true)
    }

    fn bad(&mut self, member: &Member, error: &Error) {
        let name = self.name_of(format_args!(": {}", Quoted(&member.name)));
        self.note_wrong(name, error);
    }

    /// Notes what is wrong with the archive at hand.
    fn note_wrong(&mut self, name: String, error: &Error) {
        if let Some(begun) = &mut self.file {
            begun.is_right = false;
        }
        self.done.note(self.progress, name, error);
    }

    fn name_of(&self, what: std::fmt::Arguments<'_>) -> String {
        let Some(Begun { tape, file, .. }) = &self.file else { return format!("a tape{what}") };
        format!("tape {}, file {}{what}", Quoted(&tape.label), file.filenum)
    }
}

/// Whether the disk is at fault that takes what is read, or the wish to stop.
fn is_of_disk(error: &Error) -> bool {
    error.is_shortage() || matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Interrupted)
}

impl Visitor for Gather<'_> {
    fn begin(&mut self, file: &walk::File<'_>) -> Result<bool> {
        let Some(tape) = &self.tape else { return Ok(false) };
        let (head, fields) = (file.head, &file.head.fields);
        let is_ours = ["catalog", "run", "run-uuid"].iter().any(|it| fields.get(it).is_some());
        // Without a job's fields its members say what it is.
        if !is_ours && fields.get("job").is_some() {
            return Ok(false);
        }
        let word = |key| fields.get(key).and_then(|it| std::str::from_utf8(it).ok());
        let mut tape = tape.clone();
        tape.pool = word("pool").unwrap_or("any").to_owned();
        if let Some(len) = u32::try_from(file.block_bytes).ok().filter(|it| *it > 0) {
            tape.block_bytes = len;
        }
        let batch = head.job.as_ref().map(|it| it.1);
        let mut sign = Sign::of(fields);
        sign.job = head.job.as_ref().map(|it| it.0.clone()).or(sign.job);
        self.file = Some(Begun {
            file: TapeFile {
                filenum: file.filenum,
                position: file.position,
                bytes: 0,
                job: sign.job.clone().unwrap_or_default(),
                batch: batch.unwrap_or_default(),
                ended: Time { secs: head.batch.number("added").unwrap_or(0), nanos: 0 },
                verified: None,
            },
            tape,
            sign,
            is_said: is_ours,
            has_batch: batch.is_some(),
            lot: None,
            hash: word("hash").and_then(|it| it.parse().ok()),
            is_right: true,
            members: Vec::new(),
        });
        if let Some(damage) = &head.damage {
            let name = self.name_of(format_args!(""));
            self.note_wrong(name, damage);
        }
        if is_ours { self.settle() } else { Ok(true) }
    }

    fn own(&mut self, own: Own<'_>, _content: &mut dyn Read) -> Result<()> {
        let Some(Begun { file, sign, has_batch, .. }) = &mut self.file else { return Ok(()) };
        if *has_batch {
            return Ok(());
        }
        file.job = own.job().to_owned();
        sign.job = Some(file.job.clone());
        if let Own::Batch(_, number) | Own::Sums(_, number) = own {
            (file.batch, *has_batch) = (number, true);
        }
        Ok(())
    }

    fn member(&mut self, member: &Member, at: u64, content: &mut dyn Read) -> Result<()> {
        let kind = Kind::of(&member.name);
        let is_known = self.file.as_ref().is_some_and(|it| it.lot.is_some());
        if !is_known && (kind == Kind::Other || !self.settle()?) {
            return Ok(());
        }
        let hash = self.file.as_ref().and_then(|it| it.hash);
        match kind {
            Kind::Block(id) => {
                let proved = match hash {
                    Some(hash) => prove(kind, hash, content),
                    None => proved_by(&id, content).map(|found| {
                        if let Some(begun) = &mut self.file {
                            begun.hash = found;
                        }
                        if let Some(lot) = self.lot() {
                            lot.hash = lot.hash.or(found);
                        }
                        found.is_some()
                    }),
                };
                match (proved, &mut self.file) {
                    (Ok(true), Some(begun)) => {
                        let (len, item) = (member.header.size, Item::Block(id));
                        begun.members.push(Noted { at, len, item });
                    }
                    (Err(e), _) => self.bad(member, &e),
                    _ => self.bad(member, &Error::corrupt("its bytes have another hash")),
                }
            }
            Kind::Guide if member.name == GUIDE_NAME => {}
            Kind::Guide => self.put_guide(member, content)?,
            Kind::Catalog | Kind::Meta(_) | Kind::Manifest => {
                match self.put_document(kind, member, content) {
                    Err(e) if is_of_disk(&e) => return Err(e),
                    Err(e) => self.bad(member, &e),
                    Ok(()) => {}
                }
            }
            Kind::Other => self.bad(member, &Error::corrupt("it is nothing of a catalog")),
        }
        Ok(())
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn end(&mut self, bytes: u64, error: Option<(u64, Error)>) -> Result<()> {
        if let Some((_, e)) = error {
            let name = self.name_of(format_args!(""));
            self.note_wrong(name, &e);
        }
        let Some(mut begun) = self.file.take() else { return Ok(()) };
        let Some(lot) = begun.lot else { return Ok(()) };
        begun.file.bytes = bytes;
        begun.file.verified = begun.is_right.then(Time::now);
        if self.unite(&mut begun)? {
            let mut noting = self.tapes.begin(&begun.tape.label, &begun.file)?;
            begun.members.iter().try_for_each(|it| noting.add(it))?;
            noting.finish()?;
        }
        if let Some(lot) = self.lots.get_mut(&lot) {
            lot.take(Sign { job: begun.sign.job, ..Sign::default() });
            lot.files.insert((begun.tape.label, begun.file.filenum));
        }
        self.lot_of_tape = Some(self.link(lot)?);
        Ok(())
    }
}
