//! Making files of an archive's members, below one directory and nowhere else.
//!
//! Invariant: whatever an archive says, nothing outside of the directory is made, changed or
//! followed. Names are walked one component at a time by open directories and through no link; `..`
//! is refused, and what begins at the root begins at the directory. A file gets its name when it is
//! complete. What has the name already stays, unless the caller says otherwise. Files are linked to
//! each other only within one archive.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use super::cpio::{Header, Member};
use super::spill::Spill;
use super::sums::{Sum, Summer};
use crate::entry::{self, Applied, Extra, Kind, Metadata};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::at::DirReader;
use crate::sys::{self, Time, at, c, process, quoted, target};

/// Files with several names that are remembered; those beyond become files of their own.
const LINKS_MAX: usize = 1 << 18;
/// Most bytes of their names.
const LINK_BYTES_MAX: usize = 64 << 20;
/// Longest target of a link: longer ones the kernel does not take.
const TARGET_BYTES_MAX: u64 = 4096;
const COPY_BYTES: usize = 256 << 10;
/// What is behind the name of a file that has turned out to be damaged.
const DAMAGED: &[u8] = b".damaged";
/// Such names that are tried for one file, with a number behind.
const DAMAGED_MAX: u32 = 1000;
/// Begins the names of what is being made; the process and a number follow.
const TEMP_PREFIX: &str = ".raidtape-reading-";
/// Directories in which what dead readers have left was looked for, of which that is remembered. In
/// those beyond it is not looked for.
const LOOKED_MAX: usize = 1 << 16;

/// A directory that members are written below.
pub struct Target {
    root: OwnedFd,
    may_replace: bool,
    /// The directory that was last written in: its path below the root.
    parent: Option<(Vec<u8>, OwnedFd)>,
    /// Of the archive at hand: the first name of each file that has others, and the sum of its
    /// content.
    links: HashMap<(u64, u64), Linked>,
    link_bytes: usize,
    /// Directories, which get their metadata when nothing more is made in them.
    dirs: Spill,
    buffer: Vec<u8>,
    number: u64,
    /// Hashes of the paths of directories that have nothing of dead readers.
    looked: HashSet<u64>,
}

struct Linked {
    path: Vec<u8>,
    size: u64,
    sum: Sum,
    id: (u64, u64),
}

fn refused(what: &str) -> Error {
    Error::new(ErrorKind::Denied, what)
}

fn making(e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::AlreadyExists => Error::io("what is there stays without -f", e),
        _ => Error::io("creating it", e),
    }
}

/// The process that uses the name of something that is being made, if it is one.
fn temp_owner(name: &OsStr) -> Option<u32> {
    let (process, number) = name.to_str()?.strip_prefix(TEMP_PREFIX)?.split_once('-')?;
    number.parse::<u64>().ok()?;
    process.parse().ok()
}

/// Removes what readers that have died were making in a directory. Nothing is being made there now
/// by this one: what has its number was another's.
fn clear_left(dir: &OwnedFd) -> io::Result<()> {
    let mut reader = DirReader::new(at::open_dir_to_list(dir, OsStr::new("."))?)?;
    while let Some(item) = reader.next_item() {
        let name = item?.name;
        let is_dead = |it: u32| it == std::process::id() || !process::is_alive(it);
        if temp_owner(&name).is_some_and(is_dead) {
            at::unlink(dir, &name)?;
        }
    }
    Ok(())
}

/// The components of a member's name below the target.
fn components(name: &[u8]) -> Result<Vec<&[u8]>> {
    let parts = name.split(|it| *it == b'/').filter(|it| !matches!(*it, b"" | b"."));
    let parts: Vec<&[u8]> = parts.collect();
    if parts.contains(&&b".."[..]) {
        return Err(refused("its name leads out of the directory: it has .. in it"));
    }
    if name.contains(&0) {
        return Err(refused("its name has a NUL in it"));
    }
    Ok(parts)
}

impl Target {
    /// Begins to write below a directory, which has to be there. `may_replace`: also over what has
    /// a name already, but for directories.
    pub fn open(dir: &Path, may_replace: bool) -> Result<Target> {
        let failed = |e| Error::io(format!("opening {}", quoted(dir)), e);
        // The directory itself may be reached through a link: the user has named it.
        let root = dir.canonicalize().and_then(|it| sys::open_dir(&it)).map_err(failed)?;
        Ok(Target {
            root,
            may_replace,
            parent: None,
            links: HashMap::new(),
            link_bytes: 0,
            dirs: Spill::new(),
            buffer: Vec::new(),
            number: 0,
            looked: HashSet::new(),
        })
    }

    /// Begins with another archive, in which the same numbers are other files.
    pub fn begin_archive(&mut self) {
        self.links.clear();
        self.link_bytes = 0;
    }

    /// Whether a file that was made is empty, and has fewer names than it had: some programs write
    /// the content of a file with only one of its names, which may be one that was not made.
    pub fn lacks_content(&mut self, name: &[u8], nlink: u64) -> bool {
        let mut look = || {
            let parts = components(name)?;
            let Some((name, dirs)) = parts.split_last() else { return Ok(false) };
            self.enter(dirs)?;
            let now = at::stat(self.parent_fd()?, OsStr::from_bytes(name)).map_err(making)?;
            Ok::<bool, Error>(now.is_file() && now.size == 0 && now.nlink < nlink)
        };
        look().unwrap_or(false)
    }

    /// Makes what a member is. What fails is this file's trouble, unless the disk is full.
    pub fn put(&mut self, member: &Member, content: &mut dyn Read) -> Result<()> {
        let parts = components(&member.name)?;
        let Some((name, dirs)) = parts.split_last() else { return Ok(()) };
        let path = parts.join(&b'/');
        let name = OsStr::from_bytes(name);
        match member.header.mode & c::S_IFMT {
            c::S_IFDIR => self.put_dir(&path, &member.header),
            c::S_IFREG => self.put_file(dirs, name, &path, &member.header, content),
            c::S_IFLNK => {
                let mut link = Vec::new();
                let mut limited = content.take(TARGET_BYTES_MAX);
                limited.read_to_end(&mut link).map_err(|e| Error::io("reading its target", e))?;
                if link.len() as u64 == TARGET_BYTES_MAX || link.is_empty() || link.contains(&0) {
                    return Err(Error::corrupt("its target is none that a link can have"));
                }
                self.put_node(dirs, name, &member.header, Some(OsString::from_vec(link)))
            }
            c::S_IFIFO | c::S_IFSOCK | c::S_IFCHR | c::S_IFBLK => {
                self.put_node(dirs, name, &member.header, None)
            }
            _ => Err(Error::corrupt("it is of a kind that there is not")),
        }
    }

    /// Says by its name that a file that was made is not what was written. What is called so
    /// already stays.
    pub fn set_damaged(&mut self, name: &[u8]) -> Result<()> {
        let parts = components(name)?;
        let Some((name, dirs)) = parts.split_last() else { return Ok(()) };
        self.enter(dirs)?;
        let mut number = 1;
        loop {
            let mut new = [name, DAMAGED].concat();
            if number > 1 {
                new.extend(format!(".{number}").into_bytes());
            }
            match self.rename(OsStr::from_bytes(name), OsStr::from_bytes(&new), false) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && number < DAMAGED_MAX => {
                    number += 1;
                }
                done => {
                    return done.map_err(|e| Error::io("renaming it, since it is damaged", e));
                }
            }
        }
    }

    /// Gives directories their metadata, and waits until all is on the disk. `tell` gets what
    /// could not be done.
    pub fn finish(mut self, tell: &mut dyn FnMut(&[u8], Error)) -> Result<()> {
        let dirs = std::mem::take(&mut self.dirs);
        dirs.read_back(&mut |_, bytes| {
            let Some((header, path)) = decode(bytes) else { return Ok(()) };
            let done = self.enter(&components(path)?).and_then(|()| {
                let fd = self.parent_fd()?;
                let now = sys::fstat(fd).map_err(|e| Error::io("looking at it", e))?;
                let meta = metadata(&header).ok_or_else(|| Error::corrupt("it is no directory"))?;
                all(entry::apply_made(fd.as_fd(), &now, &meta, &Extra::default()))
            });
            if let Err(e) = done {
                tell(path, e);
            }
            Ok(())
        })?;
        self.sync()
    }

    /// Waits until what was written is on the disk.
    pub fn sync(&self) -> Result<()> {
        target::sync_file_system(&self.root).map_err(|e| Error::io("syncing what was written", e))
    }

    /// Opens the directory of these components, and makes what is missing of it.
    fn enter(&mut self, parts: &[&[u8]]) -> Result<()> {
        let path = parts.join(&b'/');
        if self.parent.as_ref().is_some_and(|it| it.0 == path) {
            return Ok(());
        }
        let failed = |e: io::Error| match e.raw_os_error() {
            Some(c::ENOTDIR | c::ELOOP) => {
                refused("a link or a file is in the place of a directory above it")
            }
            _ => Error::io("opening the directory above it", e),
        };
        let mut dir = self.root.try_clone().map_err(failed)?;
        let mut is_new = false;
        for part in parts {
            let part = OsStr::from_bytes(part);
            dir = match at::open_dir(&dir, part) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    is_new = true;
                    match at::mkdir(&dir, part, 0o755) {
                        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                            return Err(failed(e));
                        }
                        _ => at::open_dir(&dir, part).map_err(failed)?,
                    }
                }
                opened => opened.map_err(failed)?,
            };
        }
        let mut hasher = DefaultHasher::new();
        path.hash(&mut hasher);
        let is_unknown = self.looked.len() < LOOKED_MAX && self.looked.insert(hasher.finish());
        // It is in nobody's way where it cannot be removed.
        if is_unknown
            && !is_new
            && let Err(e) = clear_left(&dir)
        {
            log::debug!("what dead readers have left stays: {e}");
        }
        self.parent = Some((path, dir));
        Ok(())
    }

    fn parent_fd(&self) -> Result<&OwnedFd> {
        self.parent.as_ref().map(|it| &it.1).ok_or_else(|| Error::usage("no directory is open"))
    }

    fn temp_name(&mut self) -> OsString {
        self.number += 1;
        OsString::from(format!("{TEMP_PREFIX}{}-{}", std::process::id(), self.number))
    }

    /// Refuses early what would be refused at the end.
    fn look(&self, name: &OsStr) -> Result<()> {
        if self.may_replace {
            return Ok(());
        }
        match at::stat(self.parent_fd()?, name) {
            Ok(_) => Err(making(io::Error::from_raw_os_error(c::EEXIST))),
            Err(_) => Ok(()),
        }
    }

    /// Gives what was made its name.
    fn settle(&self, temp: &OsStr, name: &OsStr) -> Result<()> {
        self.rename(temp, name, self.may_replace).map_err(making)?;
        // Two names of one file are not renamed over each other.
        if self.may_replace {
            let _ = at::unlink(self.parent_fd()?, temp);
        }
        Ok(())
    }

    /// Renames something in the directory at hand.
    fn rename(&self, from: &OsStr, to: &OsStr, may_replace: bool) -> io::Result<()> {
        let Some((_, dir)) = &self.parent else { return Err(io::ErrorKind::NotFound.into()) };
        let flags = if may_replace { 0 } else { c::RENAME_NOREPLACE };
        match at::rename(dir, from, dir, to, flags) {
            // Not every file system can do that: NFS cannot.
            Err(e) if !may_replace && e.raw_os_error() == Some(c::EINVAL) => {
                at::link(dir, from, dir, to).and_then(|()| at::unlink(dir, from))
            }
            done => done,
        }
    }

    fn put_dir(&mut self, path: &[u8], header: &Header) -> Result<()> {
        self.enter(&components(path)?)?;
        self.dirs.put(0, &encode(header, path))
    }

    fn put_node(
        &mut self,
        dirs: &[&[u8]],
        name: &OsStr,
        header: &Header,
        link: Option<OsString>,
    ) -> Result<()> {
        self.enter(dirs)?;
        self.look(name)?;
        let meta = metadata(header).ok_or_else(|| Error::corrupt("it is of no known kind"))?;
        let temp = self.temp_name();
        let dir = self.parent_fd()?;
        match &link {
            Some(link) => at::symlink(link, dir, &temp),
            None => at::mknod(dir, &temp, header.mode & c::S_IFMT | 0o600, meta.rdev),
        }
        .map_err(making)?;
        let finish = || {
            let handle = at::open_path(dir, &temp).map_err(making)?;
            let now = sys::fstat(&handle).map_err(making)?;
            all(entry::apply_handle(handle.as_fd(), &now, &meta, &Extra::default()))?;
            self.settle(&temp, name)
        };
        finish().inspect_err(|_| drop(at::unlink(dir, &temp)))
    }

    fn put_file(
        &mut self,
        dirs: &[&[u8]],
        name: &OsStr,
        path: &[u8],
        header: &Header,
        content: &mut dyn Read,
    ) -> Result<()> {
        self.enter(dirs)?;
        self.look(name)?;
        let temp = self.temp_name();
        let file = target::create_unfinished(self.parent_fd()?, &temp).map_err(making)?;
        let done = self.fill(file, &temp, name, path, header, content);
        if done.is_err()
            && let Ok(dir) = self.parent_fd()
        {
            let _ = at::unlink(dir, &temp);
        }
        done
    }

    fn fill(
        &mut self,
        mut file: std::fs::File,
        temp: &OsStr,
        name: &OsStr,
        path: &[u8],
        header: &Header,
        content: &mut dyn Read,
    ) -> Result<()> {
        let sum = self.copy(content, &mut file)?;
        let key = (header.dev, header.ino);
        let is_linked = header.nlink > 1;
        let first = if is_linked { self.links.remove(&key) } else { None };
        if let Some(mut first) = first {
            // One content goes with all names, with the first of them or with the last.
            let is_one = header.size == 0 || first.size > 0 && first.sum == sum;
            let linked = match is_one {
                true => self.link(&first, name),
                false if first.size == 0 => self
                    .move_into(&mut file, &mut first, sum, header)
                    .and_then(|is_done| if is_done { self.link(&first, name) } else { Ok(false) }),
                false => Ok(false),
            };
            self.links.insert(key, first);
            if linked? {
                let _ = at::unlink(self.parent_fd()?, temp);
                return Ok(());
            }
        }
        let now = sys::fstat(&file).map_err(making)?;
        let meta = metadata(header).ok_or_else(|| Error::corrupt("it is of no known kind"))?;
        all(entry::apply_made(file.as_fd(), &now, &meta, &Extra::default()))?;
        self.settle(temp, name)?;
        let has_room = self.links.len() < LINKS_MAX && self.link_bytes < LINK_BYTES_MAX;
        if is_linked && has_room && !self.links.contains_key(&key) {
            self.link_bytes += path.len();
            let id = (now.dev, now.ino);
            self.links.insert(key, Linked { path: path.to_vec(), size: header.size, sum, id });
        }
        Ok(())
    }

    fn copy(&mut self, content: &mut dyn Read, file: &mut std::fs::File) -> Result<Sum> {
        let mut summer = Summer::default();
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(COPY_BYTES, 0);
        let done = loop {
            match content.read(&mut buffer) {
                Ok(0) => break Ok(()),
                Ok(len) => {
                    let part = buffer.get(..len).unwrap_or_default();
                    summer.add(part);
                    if let Err(e) = file.write_all(part) {
                        break Err(Error::io("writing it", e));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => break Err(Error::io("reading its content", e)),
            }
        };
        self.buffer = buffer;
        done.map(|()| summer.sum())
    }

    /// Opens the first name of a file, if that is still the one.
    fn open_first(&self, first: &Linked) -> Result<Option<(OwnedFd, OsString)>> {
        let parts = components(&first.path)?;
        let Some((name, dirs)) = parts.split_last() else { return Ok(None) };
        let mut dir = self.root.try_clone().map_err(making)?;
        for part in dirs {
            match at::open_dir(&dir, OsStr::from_bytes(part)) {
                Ok(next) => dir = next,
                Err(_) => return Ok(None),
            }
        }
        let name = OsStr::from_bytes(name).to_os_string();
        let is_it = at::stat(&dir, &name).is_ok_and(|it| (it.dev, it.ino) == first.id);
        Ok(is_it.then_some((dir, name)))
    }

    /// Gives a file that was made a further name; `false` if it has become another's.
    fn link(&mut self, first: &Linked, name: &OsStr) -> Result<bool> {
        let Some((dir, first_name)) = self.open_first(first)? else { return Ok(false) };
        let temp = self.temp_name();
        let here = self.parent_fd()?;
        at::link(&dir, &first_name, here, &temp).map_err(making)?;
        self.settle(&temp, name).inspect_err(|_| drop(at::unlink(here, &temp)))?;
        Ok(true)
    }

    /// Puts content that came with a later name into the file that the first name has.
    fn move_into(
        &mut self,
        file: &mut std::fs::File,
        first: &mut Linked,
        sum: Sum,
        header: &Header,
    ) -> Result<bool> {
        let Some((dir, name)) = self.open_first(first)? else { return Ok(false) };
        // It is closed to its owner, perhaps: only what cannot be opened stays by itself.
        let Ok(mut to) = target::open_in_place(&dir, &name) else { return Ok(false) };
        let now = sys::fstat(&to).map_err(making)?;
        if (now.dev, now.ino) != first.id || now.size != 0 {
            return Ok(false);
        }
        io::Seek::rewind(file).map_err(making)?;
        io::copy(file, &mut to).map_err(|e| Error::io("writing it", e))?;
        let now = sys::fstat(&to).map_err(making)?;
        let meta = metadata(header).ok_or_else(|| Error::corrupt("it is of no known kind"))?;
        all(entry::apply_made(to.as_fd(), &now, &meta, &Extra::default()))?;
        (first.size, first.sum) = (header.size, sum);
        Ok(true)
    }
}

/// What of its metadata could not be put on a file is its trouble. That it belongs to who reads,
/// where only root may say otherwise, is not.
fn all(applied: Applied) -> Result<()> {
    match applied.failed.into_iter().next() {
        Some((what, e)) => Err(Error::io(format!("setting its {what}"), e)),
        None => Ok(()),
    }
}

fn metadata(header: &Header) -> Option<Metadata> {
    let mtime = Time { secs: header.mtime, nanos: 0 };
    Some(Metadata {
        kind: Kind::from_mode(header.mode)?,
        mode: header.mode & 0o7777,
        uid: header.uid,
        gid: header.gid,
        size: header.size,
        mtime,
        ctime: mtime,
        ino: 0,
        nlink: 1,
        rdev: if header.is_device() { header.device() } else { 0 },
    })
}

/// What is remembered of a directory.
fn encode(header: &Header, path: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(path.len() + 20);
    for number in [header.mode, header.uid, header.gid] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(header.mtime.to_le_bytes());
    bytes.extend(path);
    bytes
}

fn decode(bytes: &[u8]) -> Option<(Header, &[u8])> {
    let (mode, rest) = bytes.split_first_chunk()?;
    let (uid, rest) = rest.split_first_chunk()?;
    let (gid, rest) = rest.split_first_chunk()?;
    let (mtime, path) = rest.split_first_chunk()?;
    let [mode, uid, gid] = [mode, uid, gid].map(|it| u32::from_le_bytes(*it));
    let mtime = i64::from_le_bytes(*mtime);
    Some((Header { mode, uid, gid, mtime, ..Header::default() }, path))
}
