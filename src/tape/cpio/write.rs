//! Writing an archive.
//!
//! One file's trouble is an [`Added::Failed`] and the archive goes on; an error of the one who
//! takes the bytes ends it. What a header says is what follows it: a file that shrinks while it is
//! read is filled up with zeros, one that grows is cut, and both have failed.
//!
//! Hard links: the content goes with every name, as GNU cpio and bsdcpio do it, so each member
//! stands for itself. Device and inode numbers are ours: no two files of an archive have the same,
//! however many there are.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::header::{self, Header, ODC_6_MAX, ODC_11_MAX};
use super::{NAME_BYTES_MAX, TRAILER};
use crate::error::{Error, Result};
use crate::sys::{self, c};
use crate::tape::sums::{Sum, SumThread, Summer};

/// Owner of what belongs to somebody with a number that odc cannot hold.
const NOBODY: u32 = 65_534;
/// Files with several names whose numbers are remembered; those beyond become files of their own.
const LINKS_MAX: usize = 1 << 18;
/// How much is read of a file at once.
const COPY_BYTES: usize = 256 << 10;
/// Length of a content that is worth waiting for another thread.
const THREAD_BYTES_MIN: u64 = 1 << 20;
/// Numbers that dev and ino hold together.
const IDS_MAX: u64 = (ODC_6_MAX + 1) * (ODC_6_MAX + 1);

/// What an archive does not say of a member, or not to everybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// It has afio's large header, which GNU cpio passes over.
    Large,
    /// Its time of change is before 1970 or after 2242; the archive has the nearest there is.
    Mtime,
    /// Its owner or group is over 262143; the archive has 65534, and no setuid and setgid bits.
    Owner,
    /// It has other names, and the archive may not say that they are one file: there are too many.
    Links,
}

impl Note {
    /// The word for it in a list of results.
    pub fn as_str(self) -> &'static str {
        match self {
            Note::Large => "large",
            Note::Mtime => "mtime",
            Note::Owner => "owner",
            Note::Links => "links",
        }
    }
}

/// What became of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Added {
    /// It is in the archive.
    Whole {
        /// Where its header begins.
        position: u64,
        /// What the archive does not say of it.
        notes: Vec<Note>,
    },
    /// It is not, or what is there is not as the file is.
    Failed {
        /// Why, as an error number. `ESTALE`: the file changed its length while it was read.
        errno: i32,
    },
}

/// Writes an archive.
pub struct Archive<W> {
    out: W,
    position: u64,
    next_id: u64,
    /// Files with several names: the number of each, and how many names are still to come.
    links: HashMap<(u64, u64), (u64, u64)>,
    buffer: Vec<u8>,
    /// Whether contents are summed up, and the sum of the last one.
    has_sums: bool,
    sum: Option<Sum>,
    thread: Option<SumThread>,
}

/// How the content at hand is summed up.
enum Summing {
    No,
    Here(Summer),
    There(SumThread),
}

impl<W: Write> Archive<W> {
    /// Begins an archive; whatever it consists of goes to `out`.
    pub fn new(out: W) -> Archive<W> {
        Archive {
            out,
            position: 0,
            next_id: 1,
            links: HashMap::new(),
            buffer: Vec::new(),
            has_sums: false,
            sum: None,
            thread: None,
        }
    }

    /// The same, and sums up every content on its way: see [`Archive::sum`].
    pub fn with_sums(out: W) -> Archive<W> {
        Archive { has_sums: true, ..Archive::new(out) }
    }

    /// Goes on with an archive that was cut behind a member: there its position was this, and
    /// [`Archive::ids`] was that. Links to members before it become files of their own.
    pub fn resume(out: W, position: u64, ids: u64) -> Archive<W> {
        Archive { position, next_id: ids, ..Archive::new(out) }
    }

    /// The number that the next file will get.
    pub fn ids(&self) -> u64 {
        self.next_id
    }

    /// The sum of the content of the member that was added last, if it is whole, and a regular
    /// file's.
    pub fn sum(&self) -> Option<Sum> {
        self.sum
    }

    /// Where the next member will begin.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Adds the file `name`, which is looked up from `root` unless it is absolute. Directories are
    /// added without what is in them.
    pub fn add_file(&mut self, root: impl AsFd, name: &[u8]) -> Result<Added> {
        let failed = |e: &io::Error| Ok(Added::Failed { errno: header::errno(e) });
        self.sum = None;
        if let Some(errno) = refusal(name) {
            return Ok(Added::Failed { errno });
        }
        let path = OsStr::from_bytes(name);
        let stat = match sys::at::stat(&root, path) {
            Ok(stat) => stat,
            Err(e) => return failed(&e),
        };
        match stat.mode & c::S_IFMT {
            c::S_IFREG => {
                // Between the two the name may have become another's.
                let opened = sys::at::open_read(&root, path);
                let opened = opened.and_then(|it| Ok((sys::fstat(&it)?, it)));
                match opened {
                    Ok((stat, mut file)) if stat.is_file() => {
                        sys::advise_sequential(&file);
                        self.add(&Header::of(&stat), name, &mut file)
                    }
                    Ok(_) => Ok(Added::Failed { errno: c::ESTALE }),
                    Err(e) => failed(&e),
                }
            }
            c::S_IFLNK => match sys::at::readlink(&root, path) {
                Ok(target) => {
                    let target = target.into_vec();
                    let header = Header { size: target.len() as u64, ..Header::of(&stat) };
                    self.add(&header, name, &mut &*target)
                }
                Err(e) => failed(&e),
            },
            _ => self.add(&Header::of(&stat), name, &mut io::empty()),
        }
    }

    /// Adds a member with this metadata and content.
    pub fn add(&mut self, header: &Header, name: &[u8], content: &mut dyn Read) -> Result<Added> {
        self.sum = None;
        if let Some(errno) = refusal(name) {
            return Ok(Added::Failed { errno });
        }
        if header.size > 0 && !header.may_have_content() {
            return Ok(Added::Failed { errno: c::EINVAL });
        }
        let (header, notes) = self.adapt(header)?;
        let Ok(bytes) = header.encode(name) else {
            return Ok(Added::Failed { errno: c::EOVERFLOW });
        };
        let position = self.position;
        self.put(&bytes)?;
        let is_summed = self.has_sums && header.mode & c::S_IFMT == c::S_IFREG;
        let mut summing = match self.thread.take() {
            _ if !is_summed => Summing::No,
            _ if header.size < THREAD_BYTES_MIN => Summing::Here(Summer::default()),
            Some(thread) => Summing::There(thread),
            None => Summing::There(SumThread::start()?),
        };
        let errno = self.copy(content, header.size, &mut summing)?;
        let sum = match summing {
            Summing::No => None,
            Summing::Here(summer) => Some(summer.sum()),
            Summing::There(mut thread) => {
                let sum = thread.sum()?;
                self.thread = Some(thread);
                Some(sum)
            }
        };
        match errno {
            None => {
                self.sum = sum;
                Ok(Added::Whole { position, notes })
            }
            Some(errno) => Ok(Added::Failed { errno }),
        }
    }

    /// Ends the archive, filled up with zeros to whole blocks, and gives back who took it.
    pub fn finish(mut self, block_bytes: u32) -> Result<W> {
        self.put(&Header::trailer()?)?;
        let block = u64::from(block_bytes.max(1));
        self.put_zeros((block - self.position % block) % block)?;
        self.out.flush().map_err(|e| Error::io("writing a cpio archive", e))?;
        Ok(self.out)
    }

    /// What the archive can say of a file, and what not.
    fn adapt(&mut self, given: &Header) -> Result<(Header, Vec<Note>)> {
        let mut notes = Vec::new();
        let mut it = given.clone();
        let (id, is_known) = self.id(given);
        if !is_known {
            notes.push(Note::Links);
        }
        let id = id.ok_or_else(|| Error::usage(format!("an archive of {IDS_MAX} members")))?;
        (it.dev, it.ino) = (id >> 18, id & ODC_6_MAX);
        it.nlink = given.nlink.clamp(1, ODC_6_MAX);
        if !given.is_device() {
            it.rdev = 0;
        } else if given.rdev == 0 {
            // afio would take dev and ino for the number of the device.
            (it.dev, it.ino, it.nlink) = (0, 0, 1);
        }
        let mtime_max = ODC_11_MAX.cast_signed();
        if !(0..=mtime_max).contains(&given.mtime) {
            it.mtime = given.mtime.clamp(0, mtime_max);
            notes.push(Note::Mtime);
        }
        // GNU cpio would take 262144 for root.
        let is_over = [given.uid, given.gid].map(|it| u64::from(it) > ODC_6_MAX);
        if is_over != [false; 2] {
            let [uid_is_over, gid_is_over] = is_over;
            it.uid = if uid_is_over { NOBODY } else { given.uid };
            it.gid = if gid_is_over { NOBODY } else { given.gid };
            it.mode &= !(c::S_ISUID | c::S_ISGID);
            notes.push(Note::Owner);
        }
        if !it.fits_odc() && it.fits_large() {
            notes.push(Note::Large);
        }
        Ok((it, notes))
    }

    /// The number of a file, and whether it is the same as that of its other names.
    fn id(&mut self, file: &Header) -> (Option<u64>, bool) {
        let key = (file.dev, file.ino);
        let is_linked = file.nlink > 1 && file.mode & c::S_IFMT != c::S_IFDIR;
        if is_linked && let Some((id, left)) = self.links.get_mut(&key) {
            let id = *id;
            *left -= 1;
            if *left == 0 {
                self.links.remove(&key);
            }
            return (Some(id), true);
        }
        if self.next_id >= IDS_MAX {
            return (None, true);
        }
        let id = self.next_id;
        self.next_id += 1;
        let has_room = self.links.len() < LINKS_MAX;
        if is_linked && has_room {
            self.links.insert(key, (id, file.nlink - 1));
        }
        (Some(id), !is_linked || has_room)
    }

    /// Copies `size` bytes; gives an error number if the content was shorter, longer or unreadable.
    fn copy(
        &mut self,
        content: &mut dyn Read,
        size: u64,
        summing: &mut Summing,
    ) -> Result<Option<i32>> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(COPY_BYTES, 0);
        let copied = self.copy_with(&mut buffer, content, size, summing);
        self.buffer = buffer;
        copied
    }

    fn copy_with(
        &mut self,
        buffer: &mut Vec<u8>,
        content: &mut dyn Read,
        size: u64,
        summing: &mut Summing,
    ) -> Result<Option<i32>> {
        let mut left = size;
        while left > 0 {
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            let part = buffer.get_mut(..len).unwrap_or_default();
            let errno = match content.read(part) {
                Ok(0) => c::ESTALE,
                Ok(read) => {
                    let part = part.get(..read).unwrap_or_default();
                    self.put(part)?;
                    match summing {
                        Summing::No => {}
                        Summing::Here(summer) => summer.add(part),
                        Summing::There(thread) => thread.add(buffer, read)?,
                    }
                    left -= read as u64;
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => header::errno(&e),
            };
            self.put_zeros(left)?;
            return Ok(Some(errno));
        }
        loop {
            match content.read(buffer.get_mut(..1).unwrap_or_default()) {
                Ok(0) => return Ok(None),
                Ok(_) => return Ok(Some(c::ESTALE)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Ok(Some(header::errno(&e))),
            }
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| Error::io("writing a cpio archive", e))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn put_zeros(&mut self, mut len: u64) -> Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while len > 0 {
            let part = usize::try_from(len).unwrap_or(usize::MAX).min(ZEROS.len());
            self.put(ZEROS.get(..part).unwrap_or_default())?;
            len -= part as u64;
        }
        Ok(())
    }
}

/// Why a name cannot be in an archive, or in a list of names, as an error number.
fn refusal(name: &[u8]) -> Option<i32> {
    match name {
        _ if name.is_empty() || name == TRAILER => Some(c::EINVAL),
        _ if name.iter().any(|it| matches!(it, b'\n' | 0)) => Some(c::EINVAL),
        _ if name.len() >= NAME_BYTES_MAX => Some(c::ENAMETOOLONG),
        _ => None,
    }
}
