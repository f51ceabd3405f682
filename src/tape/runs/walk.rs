//! Going over a whole tape, member by member, and proving each: a block by its name, anything else
//! by the sums of its archive.

use std::io::Read;

use super::Kind;
use crate::chunk::HashAlgo;
use crate::error::{Error, ErrorKind, Result};
use crate::progress::Progress;
use crate::tape::cpio::{Member, Reader};
use crate::tape::drive::Moved;
use crate::tape::loaded::Loaded;
use crate::tape::read::{Content, Head, Own, Visit};

/// A tape file that is begun.
pub struct File<'a> {
    /// Its number on the tape.
    pub filenum: u64,
    /// The drive's number of its first block.
    pub position: u64,
    /// Length of its blocks.
    pub block_bytes: usize,
    /// What it says of its job and its batch.
    pub head: &'a Head,
}

/// Is told what a tape holds.
pub trait Visitor {
    /// An archive begins. `false`: it is passed over.
    fn begin(&mut self, file: &File<'_>) -> Result<bool>;
    /// A member, with its content; `at` is where that begins in the tape file.
    fn member(&mut self, member: &Member, at: u64, content: &mut dyn Read) -> Result<()>;
    /// The archive has ended after so many bytes; or broken off, if there is an error.
    fn end(&mut self, bytes: u64, error: Option<Error>) -> Result<()>;
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
        let (filenum, position, block_bytes) =
            (file.filenum(), file.position(), file.block_bytes());
        if file.end().is_some() {
            continue;
        }
        let mut members = Reader::new(&mut file);
        let head = match Head::read(&mut members) {
            Ok(head) if head.job.is_some() => head,
            Ok(_) => {
                other(filenum, None)?;
                continue;
            }
            // No archive at all: somebody else's.
            Err(e) if e.kind() == ErrorKind::Corrupt && members.position() == 0 => {
                other(filenum, None)?;
                continue;
            }
            Err(e) => {
                other(filenum, Some(e))?;
                continue;
            }
        };
        if !visitor.begin(&File { filenum, position, block_bytes, head: &head })? {
            continue;
        }
        let mut next = head.member.map(Ok);
        let error = loop {
            progress.check()?;
            let member = match next.take().map_or_else(|| members.next_member(), |it| it.map(Some))
            {
                Ok(Some(member)) => member,
                Ok(None) => break None,
                Err(e) => break Some(e),
            };
            if Own::of(&member.name).is_some() {
                continue;
            }
            let at = members.position();
            let mut content = Content(&mut members);
            visitor.member(&member, at, &mut content)?;
            Progress::add(&progress.entries, 1);
            Progress::add(&progress.bytes, member.header.size);
        };
        if let Some(e) = &error
            && (e.is_shortage() || e.kind() == ErrorKind::Interrupted)
        {
            progress.check()?;
        }
        visitor.end(members.position(), error)?;
    }
    Ok(())
}

/// Reads the content of a member to its end; whether it is the block that its name says.
pub fn prove(kind: Kind, hash: HashAlgo, content: &mut dyn Read) -> Result<bool> {
    let mut hasher = hash.hasher();
    let mut buffer = vec![0; 256 << 10];
    loop {
        let len = match content.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => len,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::io("reading a member", e)),
        };
        hasher.update(buffer.get(..len).unwrap_or_default());
    }
    Ok(match kind {
        Kind::Block(id) => hasher.finish() == id,
        _ => true,
    })
}
