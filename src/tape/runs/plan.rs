//! What of a run has to go to tape, as a job with its batches.
//!
//! Nothing is remembered from one time to the next but what is on tapes: what a pool has, it does
//! not get again. Blocks go in the order of their numbers, which is the order in which they were
//! stored: recall of a run goes forwards. The last batch has what makes them a store again.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{GUIDE_NAME, GUIDES, Kind, Members, block_name, is_of};
use crate::catalog::tapes::{Place, Tapes};
use crate::catalog::{NumberSet, Reader, Run, RunId, copy, manifest, meta};
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::sys::{Time, quoted};
use crate::tape::spool::Spool;
use crate::tape::spool::job::{Job, JobKind, JobStatus, OpenJob};
use crate::tape::spool::text::Fields;
use crate::volume::BlockId;

/// The phase in which a plan is made.
const LOOKING: &str = "looking for what is on no tape";
/// Bytes of blocks in a batch, if nobody says otherwise.
pub const BATCH_BYTES: u64 = 4 << 30;
/// A field of a job: whether all of it is planned. Until then it lacks batches, and tapes to avoid.
const PLAN: &str = "plan";
const BEGUN: &[u8] = b"begun";
const WHOLE: &[u8] = b"whole";
/// Blocks taken from the catalog at a time.
const PAGE_BLOCKS: u64 = 1024;
/// Most blocks of a batch: their names are all that is in memory.
const BATCH_BLOCKS_MAX: usize = 1 << 16;

/// What to archive.
#[derive(Clone, Debug)]
pub struct Options {
    /// The run.
    pub run: RunId,
    /// The pool of tapes.
    pub pool: String,
    /// On how many tapes of the pool each block is to be.
    pub copies: u64,
    /// Bytes of blocks in a batch.
    pub batch_bytes: u64,
}

/// A job that has been made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Planned {
    /// Its name.
    pub job: String,
    /// Blocks in it.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Other documents than metas.
    pub documents: u64,
    /// Batches.
    pub batches: u64,
}

/// The jobs that archive runs of this catalog to this pool and are not done: what was stopped, or
/// waits for a tape. A pool must not get twice what they have.
pub fn unfinished(spool: &Spool, catalog: &Path, pool: &str) -> Result<Vec<String>> {
    jobs_of(spool, catalog, pool, false)
}

/// Whether a job is being planned, or was when whoever did it died: it is not for writing.
pub(super) fn is_begun(job: &Job) -> bool {
    job.fields().get(PLAN) == Some(BEGUN)
}

/// Revokes the jobs of this catalog and pool whose planning has come to no end.
pub(super) fn revoke_begun(spool: &Spool, catalog: &Path, pool: &str) -> Result<()> {
    for uuid in jobs_of(spool, catalog, pool, true)? {
        match spool.take_job(&uuid) {
            // It may be whole by now.
            Ok(mut job) if is_begun(&job) => job.set_status(Some(JobStatus::Revoked))?,
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::Locked => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn jobs_of(spool: &Spool, catalog: &Path, pool: &str, begun: bool) -> Result<Vec<String>> {
    let reader = Reader::open(catalog)?;
    let mut found = Vec::new();
    for uuid in spool.jobs(false)? {
        let job = spool.job(&uuid)?;
        let is_ours = job.fields().get("pool") == Some(pool.as_bytes())
            && job.fields().get("run").is_some()
            && is_of(&job, catalog, &reader)?;
        let is_off = matches!(job.status()?, Some(JobStatus::Revoked | JobStatus::Cloned));
        if is_ours && !is_off && job.kind() == JobKind::Write && is_begun(&job) == begun {
            found.push(uuid);
        }
    }
    Ok(found)
}

fn bytes_of(path: &Path) -> &[u8] {
    std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str())
}

/// Makes the job that brings a run one more copy in the pool, of what has fewer than are wanted;
/// `None` if there is nothing. `wanted` counts up to [`Options::copies`]: each copy is a job of its
/// own, for no tape has two.
pub fn plan(
    (catalog, members): (&Path, &Members),
    spool: &Spool,
    options: &Options,
    wanted: u64,
    progress: &Progress,
) -> Result<Option<Planned>> {
    progress.set_phase(LOOKING);
    // Those that wait for a tape are written when there is one.
    let waiting = Waiting::of(spool, catalog, &options.pool)?;
    let mut job = Plan::new((catalog, members), spool, options, wanted, waiting)?;
    job.is_made = true;
    match job.make(progress) {
        Ok(()) => job.finish(),
        Err(e) => {
            job.withdraw();
            Err(e)
        }
    }
}

/// What [`plan`] would have archived, once the jobs are done that an earlier archive has left.
/// Makes nothing; of a run that is all on tape, no batch is counted.
pub fn count(
    (catalog, members): (&Path, &Members),
    spool: &Spool,
    options: &Options,
    progress: &Progress,
) -> Result<Planned> {
    progress.set_phase(LOOKING);
    let mut waiting = Waiting::of(spool, catalog, &options.pool)?;
    let mut all = Planned::default();
    for wanted in 1..=options.copies {
        let mut job = Plan::new((catalog, members), spool, options, wanted, waiting)?;
        job.make(progress)?;
        let Planned { blocks, bytes, documents, batches, .. } = job.planned;
        all.blocks += blocks;
        all.bytes += bytes;
        all.documents += documents;
        all.batches += batches;
        waiting = job.waiting;
    }
    Ok(all)
}

/// Whether [`plan`] would archive anything; looks no further than to the first of it.
pub fn lacks_any(
    (catalog, members): (&Path, &Members),
    spool: &Spool,
    options: &Options,
    progress: &Progress,
) -> Result<bool> {
    progress.set_phase(LOOKING);
    // Of what has all copies nothing is lacking, whichever is counted.
    let waiting = Waiting::default();
    let mut job = Plan::new((catalog, members), spool, options, options.copies, waiting)?;
    job.only_first = true;
    job.make(progress)?;
    Ok(job.planned.batches > 0)
}

/// What jobs will bring to tape that are there already, each a copy.
#[derive(Default)]
struct Waiting(Vec<Brings>);

/// What a job will bring.
#[derive(Default)]
struct Brings {
    /// Numbers of blocks.
    blocks: NumberSet,
    documents: BTreeSet<Vec<u8>>,
}

impl Waiting {
    /// What the jobs of a pool bring that are not done.
    fn of(spool: &Spool, catalog: &Path, pool: &str) -> Result<Waiting> {
        let reader = Reader::open(catalog)?;
        let mut waiting = Waiting::default();
        for uuid in unfinished(spool, catalog, pool)? {
            waiting.add(&spool.job(&uuid)?, &reader)?;
        }
        Ok(waiting)
    }

    fn add(&mut self, job: &Job, reader: &Reader) -> Result<()> {
        let mut brings = Brings::default();
        for id in job.pending()? {
            let mut batch = job.batch(id)?;
            while let Some(name) = batch.next_file()? {
                match Kind::of(name) {
                    Kind::Block(id) => {
                        reader.numbers_of(&id)?.into_iter().for_each(|it| brings.blocks.insert(it));
                    }
                    Kind::Meta(_) | Kind::Other => {}
                    _ => drop(brings.documents.insert(name.to_vec())),
                }
            }
        }
        self.0.push(brings);
        Ok(())
    }

    /// Copies of a block.
    fn of_block(&self, number: u64) -> u64 {
        self.0.iter().filter(|it| it.blocks.contains(number)).count() as u64
    }

    /// Copies of a document.
    fn of_document(&self, name: &[u8]) -> u64 {
        self.0.iter().filter(|it| it.documents.contains(name)).count() as u64
    }
}

struct Plan<'a> {
    spool: &'a Spool,
    /// Whether the job is made; or it is only counted.
    is_made: bool,
    /// Labels that the spool's list of the pool has.
    pool: BTreeSet<Vec<u8>>,
    waiting: Waiting,
    options: &'a Options,
    catalog: &'a Path,
    wanted: u64,
    members: &'a Members,
    reader: Reader,
    tapes: Option<Tapes>,
    job: Option<OpenJob>,
    /// Labels of tapes that have some of it already.
    avoid: BTreeSet<Vec<u8>>,
    planned: Planned,
    /// Whether it ends with the first that is lacking.
    only_first: bool,
}

impl<'a> Plan<'a> {
    /// One that is only counted.
    fn new(
        (catalog, members): (&'a Path, &'a Members),
        spool: &'a Spool,
        options: &'a Options,
        wanted: u64,
        waiting: Waiting,
    ) -> Result<Plan<'a>> {
        Ok(Plan {
            spool,
            is_made: false,
            pool: spool.pool(options.pool.as_bytes())?.into_iter().collect(),
            waiting,
            options,
            catalog,
            wanted,
            members,
            reader: Reader::open(catalog)?,
            tapes: Tapes::look(catalog)?,
            job: None,
            avoid: BTreeSet::new(),
            planned: Planned::default(),
            only_first: false,
        })
    }

    fn make(&mut self, progress: &Progress) -> Result<()> {
        let run = self.reader.run(self.options.run)?;
        let needed = self.reader.blocks_of_run(&run)?;
        let mut after = 0;
        let (mut batch, mut bytes) = (Vec::new(), 0);
        loop {
            progress.check()?;
            let page = self.reader.block_numbers(after, PAGE_BLOCKS)?;
            let Some(last) = page.last() else { break };
            after = *last;
            for number in page.into_iter().filter(|it| needed.has(*it)) {
                let row = self.reader.block(number)?;
                let coming = self.waiting.of_block(number);
                if self.copies(&row.id)? + coming >= self.wanted {
                    continue;
                }
                if self.only_first {
                    self.planned.batches = 1;
                    return Ok(());
                }
                let is_full = bytes + row.stored_len > self.options.batch_bytes;
                if !batch.is_empty() && (is_full || batch.len() == BATCH_BLOCKS_MAX) {
                    self.put_blocks(&std::mem::take(&mut batch))?;
                    bytes = 0;
                }
                bytes += row.stored_len;
                self.planned.bytes += row.stored_len;
                batch.push(row.id);
            }
        }
        if !batch.is_empty() {
            self.put_blocks(&batch)?;
        }
        self.put_documents(&run, progress)
    }

    /// On how many tapes of the pool a block is; they are noted, if it is to be on further ones.
    fn copies(&mut self, id: &BlockId) -> Result<u64> {
        let Some(tapes) = &self.tapes else { return Ok(0) };
        let places = tapes.places_with_meta(id)?;
        Ok(self.count(places))
    }

    /// The tapes among these that are of the pool: by the spool, which may have one in several, or
    /// because they were written as such.
    fn count(&mut self, places: Vec<Place>) -> u64 {
        let is_in = |it: &&Place| it.pool == self.options.pool || self.pool.contains(&it.label);
        let labels: BTreeSet<&[u8]> = places.iter().filter(is_in).map(|it| &*it.label).collect();
        let copies = labels.len() as u64;
        if (1..self.wanted).contains(&copies) {
            self.avoid.extend(places.into_iter().map(|it| it.label));
        }
        copies
    }

    /// A batch of blocks, before them what is in each.
    fn put_blocks(&mut self, blocks: &[BlockId]) -> Result<()> {
        let guides = match self.planned.batches {
            0 => self.members.guides(),
            _ => Vec::new(),
        };
        let metas = blocks.iter().map(|it| meta::document_name(it).into_bytes());
        let blocks_names = blocks.iter().map(|it| block_name(it).into_bytes());
        let names: Vec<Vec<u8>> = guides.into_iter().chain(metas).chain(blocks_names).collect();
        self.planned.blocks += blocks.len() as u64;
        self.put(&names)
    }

    /// The last batch: the manifests of all runs, without which this one cannot be told, and a copy
    /// of the catalog.
    fn put_documents(&mut self, run: &Run, progress: &Progress) -> Result<()> {
        let mut names: Vec<Vec<u8>> = Vec::new();
        let has_blocks = self.planned.blocks > 0;
        for other in self.reader.runs()?.iter().filter(|it| it.id <= run.id) {
            progress.check()?;
            let name = manifest::document_name(other.id).into_bytes();
            if self.is_wanted(&name)? {
                names.push(name);
            }
        }
        let copies = self.members.catalog_copies()?;
        let newest = copies.iter().find(|it| **it >= run.id).or(copies.first());
        if let Some(name) = newest.map(|it| copy::document_name(*it).into_bytes())
            && self.is_wanted(&name)?
        {
            names.push(name);
        }
        if names.is_empty() && !has_blocks {
            return Ok(());
        }
        let guides = self.members.guides();
        self.planned.documents = (names.len() + guides.len()) as u64;
        names.extend(guides);
        self.put(&names)
    }

    /// Whether a document is on too few tapes, as it is now. A manifest that no volume has right is
    /// too: whoever adds it names it.
    fn is_wanted(&mut self, name: &[u8]) -> Result<bool> {
        let Some(digest) = self.members.digest(name)? else {
            return Ok(Kind::of(name) == Kind::Manifest);
        };
        let coming = self.waiting.of_document(name);
        let Some(tapes) = &self.tapes else { return Ok(coming < self.wanted) };
        let places = tapes.places_of_document(name, &digest)?;
        Ok(self.count(places) + coming < self.wanted)
    }

    fn put(&mut self, names: &[Vec<u8>]) -> Result<()> {
        let now = Time::now().secs;
        self.planned.batches += 1;
        if !self.is_made {
            return Ok(());
        }
        let job = match &mut self.job {
            Some(job) => job,
            none => {
                let uuid = uuid::Uuid::new_v4().to_string();
                let mut fields = Fields::default();
                fields.set("root", bytes_of(&self.members.root()?))?;
                fields.set("catalog", bytes_of(self.catalog))?;
                fields.set("pool", &self.options.pool)?;
                fields.set("run", self.options.run.to_string())?;
                fields.set("run-uuid", self.reader.run(self.options.run)?.uuid)?;
                fields.set("hash", self.reader.settings()?.hash.as_str())?;
                fields.set(PLAN, BEGUN)?;
                self.spool.create_job(&uuid, JobKind::Write, now, &fields)?;
                self.planned.job.clone_from(&uuid);
                none.insert(self.spool.take_job(&uuid)?)
            }
        };
        job.add_batch(now, &Fields::default(), names.iter().map(|it| Ok(it.clone())))?;
        Ok(())
    }

    fn finish(mut self) -> Result<Option<Planned>> {
        if let Some(job) = &mut self.job {
            for (number, label) in self.avoid.iter().enumerate() {
                job.set(&format!("avoid-{number}"), label)?;
            }
            job.set(PLAN, WHOLE)?;
        }
        Ok(self.job.is_some().then_some(self.planned))
    }

    /// What was not planned to its end is not written.
    fn withdraw(mut self) {
        if let Some(job) = self.job.take() {
            let uuid = job.uuid().to_owned();
            drop(job);
            if let Err(e) = self.spool.revoke(&uuid) {
                log::warn!("{e}: job {uuid} is not whole and should be revoked");
            }
        }
    }
}

impl Members {
    /// Names of the texts for people, and of what says what a volume is, as far as they are there.
    fn guides(&self) -> Vec<Vec<u8>> {
        let names = GUIDES.iter().map(|it| it.as_bytes().to_vec());
        names.filter(|it| it == GUIDE_NAME || self.has(it)).collect()
    }

    /// The runs after which copies of the catalog were made, the newest first.
    fn catalog_copies(&self) -> Result<Vec<RunId>> {
        let mut runs = BTreeSet::new();
        for volume in self.volumes().present() {
            runs.extend(copy::list(&volume.config.path)?);
        }
        Ok(runs.into_iter().rev().collect())
    }

    /// The directory from which names are looked up by whoever knows nothing of catalogs.
    fn root(&self) -> Result<PathBuf> {
        match self.volumes().present().first() {
            Some(it) => Ok(it.config.path.clone()),
            None => Err(match self.volumes().missing().first() {
                Some((config, e)) => {
                    let message = format!("volume {}: {e}", quoted(&config.path));
                    Error::new(ErrorKind::Offline, message)
                }
                None => Error::usage("the catalog has no volume"),
            }),
        }
    }
}
