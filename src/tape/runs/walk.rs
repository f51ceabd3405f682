//! Going over a whole tape, member by member, and proving each block by its name.
//!
//! Invariant: damage costs the members that it is in, also where an archive begins. For whoever
//! does not know where the others are the next one behind it is looked for: a header whose name is
//! one that a volume has. What looks like one by chance, or is in what is stored, is no harm: a
//! block counts by its hash.

use std::io::Read;

use super::Kind;
use crate::chunk::HashAlgo;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::tape::cpio::{Member, Reader};
use crate::tape::drive::Moved;
use crate::tape::loaded::Loaded;
use crate::tape::read::{Content, Head, Own, TapeFile, Visit};
use crate::tape::verify::unwrapped;
use crate::volume::BlockId;

/// What a header begins with.
const MAGIC: &[u8] = b"070707";
/// How much is looked at at once behind damage.
const SCAN_BYTES: usize = 64 << 10;
/// Blocks that cannot be read, one after another, before a tape file is given up.
const UNREADABLE_MAX: u32 = 64;

/// A tape file that is begun.
pub struct File<'a> {
    /// Its number on the tape.
    pub filenum: u64,
    /// The drive's number of its first block.
    pub position: u64,
    /// Length of its blocks.
    pub block_bytes: usize,
    /// What it says of its job and its batch; with what is wrong with that.
    pub head: &'a Head,
}

/// Is told what a tape holds.
pub trait Visitor {
    /// An archive begins. `false`: it is passed over.
    fn begin(&mut self, file: &File<'_>) -> Result<bool>;
    /// A member of the job's own, behind the head, with its content.
    fn own(&mut self, _own: Own<'_>, _content: &mut dyn Read) -> Result<()> {
        Ok(())
    }
    /// A member, with its content; `at` is where that begins in the tape file.
    fn member(&mut self, member: &Member, at: u64, content: &mut dyn Read) -> Result<()>;
    /// Whether to go on behind damage, with the next member that can be found. Then an archive
    /// begins also if its head is damaged.
    fn goes_on(&self) -> bool;
    /// The archive has ended after so many bytes; or it was broken at a byte, by an error. Who goes
    /// on is told the first of those in it.
    fn end(&mut self, bytes: u64, error: Option<(u64, Error)>) -> Result<()>;
}

/// Goes over all archives of a tape, from its beginning. What is no archive of a job is passed over
/// by `other`, which is told its number.
pub fn walk(
    loaded: &mut Loaded,
    visitor: &mut dyn Visitor,
    other: &mut dyn FnMut(u64, Option<Error>) -> Result<()>,
    progress: &Progress,
) -> Result<()> {
    let drive = loaded.drive();
    drive.rewind()?;
    if drive.space_files(1)? != Moved::There {
        return Ok(());
    }
    let mut visit = Visit::new(drive, 1);
    while let Some(mut file) = visit.next_file()? {
        progress.check()?;
        let (filenum, position, mut block_bytes) =
            (file.filenum(), file.position(), file.block_bytes());
        if file.end().is_some() {
            continue;
        }
        let mut members = Reader::new(&mut file);
        let mut next = None;
        let mut head = match Head::read(&mut members) {
            Ok(head) if head.job.is_some() => head,
            Err(e) if is_of_all(&e) => return Err(e),
            Ok(_) => match visitor.goes_on().then(|| second_head(&mut members)).flatten() {
                Some(head) => head,
                None => {
                    other(filenum, None)?;
                    continue;
                }
            },
            Err(e) => {
                // It may be no archive at all, but somebody else's.
                let is_archive = e.kind() != ErrorKind::Corrupt || members.position() > 0;
                let found = match visitor.goes_on() {
                    true => Behind::find(members, progress)?,
                    false => None,
                };
                let Some(behind) = found else {
                    other(filenum, is_archive.then_some(e))?;
                    continue;
                };
                (members, next, block_bytes) = (behind.members, behind.next, behind.block_bytes);
                Head { damage: Some(e), ..behind.head }
            }
        };
        if !visitor.begin(&File { filenum, position, block_bytes, head: &head })? {
            continue;
        }
        let mut next = next.or(head.member.take().map(Ok));
        let mut error = None;
        loop {
            progress.check()?;
            let member = match next.take().map_or_else(|| members.next_member(), |it| it.map(Some))
            {
                Ok(Some(member)) => member,
                Ok(None) => break,
                Err(e) if is_of_all(&e) => return Err(e),
                Err(e) => {
                    error.get_or_insert((members.position(), e));
                    if !visitor.goes_on() {
                        break;
                    }
                    let damage_at = members.position();
                    let file = members.into_inner();
                    let found = find_member(file, damage_at + 1, progress)?;
                    members = Reader::at(file, found.unwrap_or(damage_at));
                    match found {
                        Some(_) => continue,
                        None => break,
                    }
                }
            };
            let at = members.position();
            let mut content = Content(&mut members);
            if let Some(own) = Own::of(&member.name) {
                visitor.own(own, &mut content)?;
                continue;
            }
            visitor.member(&member, at, &mut content)?;
            Progress::add(&progress.entries, 1);
            Progress::add(&progress.bytes, member.header.size);
        }
        visitor.end(members.position(), error)?;
    }
    Ok(())
}

/// Whether every other tape file would fail in the same way.
fn is_of_all(error: &Error) -> bool {
    error.is_shortage() || error.kind() == ErrorKind::Interrupted
}

/// What an archive says behind its first member, which has a name that no batch has.
fn second_head(members: &mut Reader<&mut TapeFile<'_, '_>>) -> Option<Head> {
    let head = Head::read(members).ok().filter(|it| it.fields.get("job").is_some())?;
    let damage = Error::corrupt("its first member is not a batch: the name of that is damaged");
    Some(Head { damage: Some(damage), ..head })
}

/// An archive whose head cannot be read, from the first member that can be found.
struct Behind<'f, 'v, 'd> {
    members: Reader<&'f mut TapeFile<'v, 'd>>,
    /// What else of the head can be read.
    head: Head,
    /// What comes next, if it is known.
    next: Option<Result<Member>>,
    block_bytes: usize,
}

impl<'f, 'v, 'd> Behind<'f, 'v, 'd> {
    /// Looks for it where reading has failed.
    fn find(
        members: Reader<&'f mut TapeFile<'v, 'd>>,
        progress: &Progress,
    ) -> Result<Option<Behind<'f, 'v, 'd>>> {
        let damage_at = members.position();
        let file = members.into_inner();
        // The name of the batch may be right where its content is not.
        let first = file.seek_to(0).and_then(|()| Reader::at(&mut *file, 0).next_member());
        let job = first.ok().flatten().and_then(|it| match Own::of(&it.name) {
            Some(Own::Batch(job, number)) => Some((job.to_owned(), number)),
            _ => None,
        });
        let Some(at) = find_member(file, damage_at + 1, progress)? else { return Ok(None) };
        let block_bytes = file.block_bytes();
        let mut members = Reader::at(file, at);
        let (head, next) = match Head::read(&mut members) {
            Ok(head) => (head, None),
            Err(e) if is_of_all(&e) => return Err(e),
            Err(e) => (Head::default(), Some(Err(e))),
        };
        let head = Head { job: job.or(head.job), ..head };
        Ok(Some(Behind { members, head, next, block_bytes }))
    }
}

/// Goes to the next member behind damage, from this byte on; gives where it begins.
fn find_member(file: &mut TapeFile<'_, '_>, from: u64, progress: &Progress) -> Result<Option<u64>> {
    if file.block_bytes() == 0 {
        // The first block cannot be read. Going anywhere tells how long the next one is.
        let _ = file.seek_to(0);
    }
    let block_bytes = file.block_bytes() as u64;
    let mut buffer = vec![0; SCAN_BYTES];
    let (mut at, mut unreadable) = (from, 0);
    while unreadable < UNREADABLE_MAX && block_bytes > 0 {
        let found =
            file.seek_to(at).and_then(|()| find_magic(file, &mut at, &mut buffer, progress));
        match found {
            Ok(false) => return Ok(None),
            Ok(true) if is_member(file, at) => return file.seek_to(at).map(|()| Some(at)),
            Ok(true) => (at, unreadable) = (at + 1, 0),
            Err(_) if file.end().is_some() => return Ok(None),
            Err(_) => {
                progress.check()?;
                // One block after another, so that the end of the file is met.
                let bad = file.offset().max(at);
                (at, unreadable) = ((bad / block_bytes + 1) * block_bytes, unreadable + 1);
            }
        }
    }
    Ok(None)
}

/// Reads from `at`, where the file is, to the next bytes that a header begins with, and sets `at`
/// to there; `false` if the file ends before.
fn find_magic(
    file: &mut TapeFile<'_, '_>,
    at: &mut u64,
    buffer: &mut [u8],
    progress: &Progress,
) -> Result<bool> {
    // Bytes that have been looked at, and may begin what follows.
    let mut held = 0;
    loop {
        progress.check()?;
        let read = file.read(buffer.get_mut(held..).unwrap_or_default());
        let len = match read.map_err(|e| Error::io("reading the tape", e))? {
            0 => return Ok(false),
            len => len,
        };
        let end = held + len;
        let bytes = buffer.get(..end).unwrap_or_default();
        if let Some(found) = bytes.windows(MAGIC.len()).position(|it| it == MAGIC) {
            *at += found as u64;
            return Ok(true);
        }
        held = end.min(MAGIC.len() - 1);
        buffer.copy_within(end - held..end, 0);
        *at += (end - held) as u64;
    }
}

/// Whether a member of ours begins at this byte.
fn is_member(file: &mut TapeFile<'_, '_>, at: u64) -> bool {
    let found = file.seek_to(at).and_then(|()| Reader::at(&mut *file, at).next_member());
    let is_ours = |it: Member| Own::of(&it.name).is_some() || Kind::of(&it.name) != Kind::Other;
    found.is_ok_and(|it| it.is_some_and(is_ours))
}

/// Reads the content of a member to its end; whether it is the block that its name says.
pub fn prove(kind: Kind, hash: HashAlgo, content: &mut dyn Read) -> Result<bool> {
    let mut hasher = hash.hasher();
    read_whole(content, &mut |bytes| hasher.update(bytes))?;
    Ok(match kind {
        Kind::Block(id) => hasher.finish() == id,
        _ => true,
    })
}

/// The same for a block of which it is not known what names it: by which hash it is this one.
pub fn proved_by(id: &BlockId, content: &mut dyn Read) -> Result<Option<HashAlgo>> {
    let mut hashers = [HashAlgo::Blake3, HashAlgo::Sha256].map(|it| (it, it.hasher()));
    read_whole(content, &mut |bytes| hashers.iter_mut().for_each(|it| it.1.update(bytes)))?;
    Ok(hashers.into_iter().find_map(|(hash, it)| (it.finish() == *id).then_some(hash)))
}

/// Gives all bytes of a content; fails with what its drive or its archive has to say.
pub fn read_whole(content: &mut dyn Read, each: &mut dyn FnMut(&[u8])) -> Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        match content.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => each(buffer.get(..len).unwrap_or_default()),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(unwrapped(e)),
        }
    }
}
