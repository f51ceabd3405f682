//! What a tape file that has been written holds, noted beside the catalog.
//!
//! The spool's results are durable before; what is noted here comes from them, so it can be noted
//! again after a crash, and made anew from the spool.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::{Kind, Members, is_of};
use crate::catalog::tapes::{Item, Member, Tape, TapeFile, Tapes};
use crate::chunk::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{Time, c};
use crate::tape::cpio::Header;
use crate::tape::label::LabelHash;
use crate::tape::spool::Spool;
use crate::tape::spool::batch::{Batch, Outcome};
use crate::tape::spool::job::{Job, JobStatus};
use crate::tape::spool::log::{self as spool_log, each_line};
use crate::tape::sums;
use crate::tape::write::Written;

/// Notes tape files of one catalog.
pub struct Noter<'a> {
    members: &'a Members,
    tapes: Tapes,
    catalog: PathBuf,
}

impl<'a> Noter<'a> {
    /// Opens what is known of tapes beside the catalog at `catalog`.
    pub fn open(catalog: &Path, members: &'a Members) -> Result<Noter<'a>> {
        Ok(Noter { members, tapes: Tapes::open(catalog)?, catalog: catalog.to_path_buf() })
    }

    /// Begins to note everything anew, beside what is there.
    pub(super) fn anew(catalog: &Path, members: &'a Members) -> Result<Noter<'a>> {
        Ok(Noter { members, tapes: Tapes::anew(catalog)?, catalog: catalog.to_path_buf() })
    }

    /// What was noted anew takes the place of what was there: see [`Tapes::replace`]. Gives the
    /// number of tapes noted, and of those that are kept.
    pub(super) fn replace(self, spool: &Spool) -> Result<(u64, u64)> {
        let noted = self.tapes.tapes()?.len() as u64;
        // By its label it is another tape now, or is written from its beginning.
        let is_gone = |tape: &Tape| {
            Ok(label_hash(spool, &tape.label)?.is_some_and(|it| it.bytes() != tape.hash))
        };
        let kept = self.tapes.replace(&self.catalog, &is_gone)?;
        Ok((noted, kept))
    }

    /// Notes a tape file of which a writer tells, if its job is of this catalog; gives how many
    /// blocks are in it. One that was written earlier is told once more, and noted if it was not.
    pub fn note(&mut self, spool: &Spool, written: &Written) -> Result<u64> {
        let digests = self.members.take_digests();
        let job = spool.job(&written.job)?;
        if !self.is_ours(&job)? {
            return Ok(0);
        }
        // A job is busy from its first batch of this time on.
        let is_new = job.status()? == Some(JobStatus::Busy);
        if !is_new && !self.is_left(spool, written)? {
            return Ok(0);
        }
        if is_new
            && let Some(known) = self.tapes.tape(&written.tape)?.filter(|it| it.is_lost)
            && label_hash(spool, &written.tape)?.is_some_and(|it| it.bytes() == known.tape.hash)
        {
            // It is in the drive.
            self.tapes.set_lost(&written.tape, false)?;
        }
        self.put(spool, &job, written, digests)
    }

    fn is_ours(&self, job: &Job) -> Result<bool> {
        is_of(job, &self.catalog, self.members.reader())
    }

    /// Whether somebody has died between the results of a tape file and the note of it. Else it is
    /// noted, and what was found out of it since counts; or it was written over; or its tape,
    /// which has earlier files of this catalog, was forgotten.
    fn is_left(&self, spool: &Spool, it: &Written) -> Result<bool> {
        if self.tapes.has_file(&it.tape, it.filenum, &it.job, it.batch)? {
            return Ok(false);
        }
        let Some(tape) = spool.tape(&it.tape)? else { return Ok(false) };
        let is_known = self.tapes.tape(&it.tape)?.is_some();
        let (mut is_there, mut earlier) = (false, BTreeSet::new());
        tape.files(&mut |file: spool_log::TapeFile| {
            let found = (file.filenum, file.position, &*file.job, file.batch);
            match found == (it.filenum, it.position, &*it.job, it.batch) {
                true => is_there = true,
                false if !is_known && !is_there => drop(earlier.insert(file.job)),
                false => {}
            }
            Ok(())
        })?;
        for uuid in earlier.iter().filter(|_| is_there) {
            // One that is not there any more tells nothing.
            if let Ok(job) = spool.job(uuid)
                && self.is_ours(&job)?
            {
                return Ok(false);
            }
        }
        Ok(is_there)
    }

    /// Notes a tape file of a job of this catalog, whatever was noted of it.
    pub(super) fn put(
        &mut self,
        spool: &Spool,
        job: &Job,
        written: &Written,
        mut digests: BTreeMap<Vec<u8>, (Digest, u64)>,
    ) -> Result<u64> {
        let pool = job.fields().get("pool").unwrap_or(b"any");
        let tape = tape_of(spool, &written.tape, pool, written.block_bytes)?;
        self.tapes.put_tape(&tape)?;
        let mut batch = Batch::open(&written.path)?;
        let file = TapeFile {
            filenum: written.filenum,
            position: written.position,
            bytes: written.bytes,
            job: written.job.clone(),
            batch: written.batch,
            ended: Time { secs: written.end, nanos: 0 },
            verified: None,
        };
        self.add_digests(job, written, &mut digests)?;
        let mut noting = self.tapes.begin(&written.tape, &file)?;
        let mut blocks = 0;
        while let Some(result) = batch.next_result()? {
            let Outcome::Ok(position, name) = result else { continue };
            let (item, len) = match Kind::of(name) {
                Kind::Block(id) => {
                    let Some(number) = self.members.reader().numbers_of(&id)?.first().copied()
                    else {
                        continue;
                    };
                    blocks += 1;
                    (Item::Block(id), self.members.reader().block(number)?.stored_len)
                }
                Kind::Manifest | Kind::Catalog | Kind::Guide => match digests.get(name) {
                    // It has changed since, and goes to tape once more.
                    None => continue,
                    Some((digest, len)) => (Item::Document(name.to_vec(), *digest), *len),
                },
                Kind::Meta(_) | Kind::Other => continue,
            };
            let at = position + header_len(name, len)?;
            noting.add(&Member { at, len, item })?;
        }
        noting.finish().map(|()| blocks)
    }

    /// Finds the digests that nobody has kept, as after a crash, of documents that are still as
    /// they were written: the sums of the batch say what that was.
    fn add_digests(
        &self,
        job: &Job,
        written: &Written,
        digests: &mut BTreeMap<Vec<u8>, (Digest, u64)>,
    ) -> Result<()> {
        let mut batch = Batch::open(&written.path)?;
        let mut lacks = BTreeSet::new();
        while let Some(result) = batch.next_result()? {
            if let Outcome::Ok(_, name) = result
                && matches!(Kind::of(name), Kind::Manifest | Kind::Catalog | Kind::Guide)
                && !digests.contains_key(name)
            {
                lacks.insert(name.to_vec());
            }
        }
        if lacks.is_empty() {
            return Ok(());
        }
        let path = job.dir().join(format!("sums{}", written.batch));
        each_line(&path, &mut |line| {
            let (sum, name) = sums::parse(line)?;
            if lacks.contains(&name)
                && let Some(found) = self.members.digest_of(&name, &sum)?
            {
                digests.insert(name, found);
            }
            Ok(())
        })
    }
}

/// A tape as it is noted beside a catalog.
fn tape_of(spool: &Spool, label: &[u8], pool: &[u8], block_bytes: u64) -> Result<Tape> {
    let hash = label_hash(spool, label)?.ok_or_else(|| {
        let shown = crate::error::Quoted(label);
        Error::new(ErrorKind::NotFound, format!("the spool has no label of tape {shown}"))
    })?;
    let block_bytes = u32::try_from(block_bytes).ok().filter(|it| *it > 0);
    Ok(Tape {
        label: label.to_vec(),
        hash: hash.bytes(),
        pool: String::from_utf8_lossy(pool).into_owned(),
        block_bytes: block_bytes.unwrap_or(crate::tape::write::BLOCK_BYTES),
    })
}

/// What the spool says of the label block of a tape.
fn label_hash(spool: &Spool, label: &[u8]) -> Result<Option<LabelHash>> {
    let noted = spool.tape(label)?.map_or(Ok(None), |it| it.label())?;
    Ok(noted.and_then(|it| LabelHash::of(&it.to_block())))
}

/// How long the header of a member is that an archive writes: its content begins behind it.
fn header_len(name: &[u8], size: u64) -> Result<u64> {
    let header = Header { mode: c::S_IFREG, nlink: 1, size, ..Header::default() };
    Ok(header.encode(name)?.len() as u64)
}
