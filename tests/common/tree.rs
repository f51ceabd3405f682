//! Trees as values: everything that a backup has to keep, so that two of them can be compared.
//!
//! Invariant: walked by open directories, two at a time, so that neither a path's length, nor the
//! depth of the tree, nor a link leads astray.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, SeekFrom};

/// A tree: path below its root, and what is there. The root has the empty path.
#[derive(Clone, PartialEq, Eq)]
pub struct Tree(pub BTreeMap<Vec<u8>, Node>);

/// All that is kept of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub kind: &'static str,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, u64),
    pub size: u64,
    pub rdev: u64,
    pub links: u64,
    /// The first of its names, if it has several.
    pub first_name: Option<Vec<u8>>,
    /// Hash of a file's content, or the target of a link.
    pub content: Vec<u8>,
    /// Where a file has data; around it are holes.
    pub data: Vec<(u64, u64)>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// File flags that a user can set.
    pub flags: u32,
}

/// Of the flags that `FS_IOC_GETFLAGS` tells, those that a user sets.
const USER_FLAGS: u32 = 0x2283_c4ff;

impl Tree {
    /// Reads a tree.
    #[track_caller]
    pub fn of(root: &Path) -> Tree {
        Tree::read(root, false)
    }

    /// Reads a tree, going into no directory that its mode closes to its owner.
    #[track_caller]
    pub fn of_readable(root: &Path) -> Tree {
        Tree::read(root, true)
    }

    #[track_caller]
    fn read(root: &Path, passes_closed: bool) -> Tree {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(root, flags, Mode::empty())
            .unwrap_or_else(|e| panic!("opening {}: {e}", root.display()));
        let mut walk = Walk { nodes: BTreeMap::new(), links: BTreeMap::new(), passes_closed };
        let stat = rustix::fs::fstat(&fd).unwrap();
        let node = walk.node(&fd, b".", &stat);
        walk.nodes.insert(Vec::new(), node);
        walk.tree(fd);
        for paths in walk.links.into_values() {
            let first = paths.iter().min().unwrap().clone();
            for path in paths {
                walk.nodes.get_mut(&path).unwrap().first_name = Some(first.clone());
            }
        }
        Tree(walk.nodes)
    }

    /// The same without what `gone` says of path and node.
    #[must_use]
    pub fn without(mut self, gone: impl Fn(&[u8], &Node) -> bool) -> Tree {
        self.0.retain(|path, node| !gone(path, node));
        self
    }

    /// The same with every node seen through `change`.
    #[must_use]
    pub fn with(mut self, change: impl Fn(&mut Node)) -> Tree {
        self.0.values_mut().for_each(change);
        self
    }
}

struct Walk {
    nodes: BTreeMap<Vec<u8>, Node>,
    links: BTreeMap<(u64, u64), Vec<Vec<u8>>>,
    passes_closed: bool,
}

impl Walk {
    /// Everything below the directory `fd`, with no more than two directories open.
    fn tree(&mut self, mut fd: OwnedFd) {
        // For each directory on the way down: its path's length, who it is, and what is to come.
        let mut path = Vec::new();
        let dirs = self.dir(&fd, &path);
        let mut levels = vec![(0, id(&fd), dirs)];
        while let Some((_, _, dirs)) = levels.last_mut() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            if let Some(name) = dirs.pop() {
                let name = OsStr::from_bytes(&name);
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend(name.as_bytes());
                fd = rustix::fs::openat(&fd, name, flags, Mode::empty())
                    .unwrap_or_else(|e| panic!("opening {:?}: {e}", shown(&path)));
                let dirs = self.dir(&fd, &path);
                levels.push((path.len(), id(&fd), dirs));
                continue;
            }
            levels.pop();
            let Some((len, id_above, _)) = levels.last() else { return };
            path.truncate(*len);
            fd = rustix::fs::openat(&fd, "..", flags, Mode::empty()).unwrap();
            assert_eq!(id(&fd), *id_above, "{:?} was moved", shown(&path));
        }
    }

    /// Everything in one directory; gives the directories in it.
    fn dir(&mut self, fd: &OwnedFd, path: &[u8]) -> Vec<Vec<u8>> {
        let mut dirs = Vec::new();
        let listing = rustix::fs::Dir::read_from(fd);
        let listing = listing.unwrap_or_else(|e| panic!("listing {:?}: {e}", shown(path)));
        for entry in listing {
            let entry = entry.unwrap_or_else(|e| panic!("listing {:?}: {e}", shown(path)));
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let below = if path.is_empty() { name.to_vec() } else { [path, b"/", name].concat() };
            let stat = rustix::fs::statat(fd, OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW)
                .unwrap_or_else(|e| panic!("stat of {:?}: {e}", shown(&below)));
            let node = self.node(fd, name, &stat);
            if node.kind == "dir" && self.passes_closed && node.mode & 0o400 == 0 {
                // Known to be there, and no more.
            } else if node.kind == "dir" {
                dirs.push(name.to_vec());
            } else if node.links > 1 {
                self.links.entry((stat.st_dev, stat.st_ino)).or_default().push(below.clone());
            }
            let old = self.nodes.insert(below.clone(), node);
            assert!(old.is_none(), "{:?} is listed twice", shown(&below));
        }
        dirs
    }

    fn node(&self, dir: &OwnedFd, name: &[u8], stat: &rustix::fs::Stat) -> Node {
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => "file",
            FileType::Directory => "dir",
            FileType::Symlink => "symlink",
            FileType::Fifo => "fifo",
            FileType::Socket => "socket",
            FileType::CharacterDevice => "char",
            FileType::BlockDevice => "block",
            FileType::Unknown => "unknown",
        };
        let os_name = OsStr::from_bytes(name);
        let open = || {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(dir, os_name, flags, Mode::empty());
            File::from(file.unwrap_or_else(|e| panic!("opening {os_name:?}: {e}")))
        };
        let (content, data, flags) = match kind {
            "file" => {
                let file = open();
                let data = data_ranges(&file);
                (hash(&file, &data), data, user_flags(&file))
            }
            "symlink" => {
                let target = rustix::fs::readlinkat(dir, os_name, Vec::new()).unwrap();
                (target.into_bytes(), Vec::new(), 0)
            }
            // Who may not list a directory sees no flags of it either.
            "dir" if self.passes_closed && stat.st_mode & 0o400 == 0 => Default::default(),
            "dir" => (Vec::new(), Vec::new(), user_flags(&open())),
            _ => Default::default(),
        };
        let is_device = matches!(kind, "char" | "block");
        let is_dir = kind == "dir";
        Node {
            kind,
            mode: stat.st_mode & 0o7777,
            owner: (stat.st_uid, stat.st_gid),
            mtime: (stat.st_mtime, stat.st_mtime_nsec),
            size: if matches!(kind, "file" | "symlink") { stat.st_size as u64 } else { 0 },
            rdev: if is_device { stat.st_rdev } else { 0 },
            links: if is_dir { 1 } else { stat.st_nlink },
            first_name: None,
            content,
            data,
            flags,
            xattrs: xattrs(dir, os_name),
        }
    }
}

/// Device and inode number.
fn id(fd: &OwnedFd) -> (u64, u64) {
    let stat = rustix::fs::fstat(fd).unwrap();
    (stat.st_dev, stat.st_ino)
}

fn user_flags(file: &File) -> u32 {
    rustix::fs::ioctl_getflags(file).map_or(0, |it| it.bits() & USER_FLAGS)
}

/// Where a file has data.
pub fn data_ranges(file: &File) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    let mut at = 0;
    loop {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return ranges,
            // A file system that does not know holes.
            Err(_) => return vec![(0, file.metadata().unwrap().len())],
        };
        at = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap();
        ranges.push((start, at));
    }
}

/// Files longer than this are not read in their holes.
const ALL_BYTES_MAX: u64 = 256 << 20;

/// Hash of a file's bytes; of a very long one, of where data is and its bytes.
fn hash(file: &File, ranges: &[(u64, u64)]) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 17];
    let size = file.metadata().unwrap().len();
    let is_long = size > ALL_BYTES_MAX;
    let all = [(0, size)];
    for (start, end) in if is_long { ranges } else { &all } {
        if is_long {
            hasher.update(&start.to_le_bytes());
        }
        let mut at = *start;
        while at < *end {
            let len = buffer.len().min((end - at) as usize);
            let len = file.read_at(&mut buffer[..len], at);
            let len = len.unwrap_or_else(|e| panic!("reading {file:?} at {at}: {e}"));
            assert!(len > 0, "{file:?} ends at {at}, before its size says so");
            hasher.update(&buffer[..len]);
            at += len as u64;
        }
    }
    hasher.finalize().as_bytes().to_vec()
}

fn xattrs(dir: &OwnedFd, name: &OsStr) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut path = std::ffi::OsString::from(format!("/proc/self/fd/{}/", dir.as_fd().as_raw_fd()));
    path.push(name);
    let path = Path::new(&path);
    let mut names = vec![0; (1 << 16) + 1];
    let len = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(len) => len,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(e) => panic!("listing attributes of {name:?}: {e}"),
    };
    let names = names[..len].split(|byte| *byte == 0).filter(|it| !it.is_empty());
    names
        .map(|key| {
            let mut value = vec![0; (1 << 16) + 1];
            let len = rustix::fs::lgetxattr(path, OsStr::from_bytes(key), &mut value[..])
                .unwrap_or_else(|e| panic!("attribute {:?} of {name:?}: {e}", shown(key)));
            value.truncate(len);
            (key.to_vec(), value)
        })
        .collect()
}

fn shown(bytes: &[u8]) -> std::ffi::OsString {
    std::ffi::OsString::from_vec(bytes.to_vec())
}

/// Checks that two trees are the same, and says where they are not.
#[track_caller]
pub fn assert_same(expected: &Tree, found: &Tree) {
    let mut faults = Vec::new();
    for (path, node) in &expected.0 {
        match found.0.get(path) {
            None => faults.push(format!("{:?} is missing", shown(path))),
            Some(it) if it != node => {
                faults.push(format!("{:?}\n  expected {node:?}\n  found    {it:?}", shown(path)));
            }
            Some(_) => {}
        }
    }
    for path in found.0.keys().filter(|it| !expected.0.contains_key(*it)) {
        faults.push(format!("{:?} should not be there", shown(path)));
    }
    let count = faults.len();
    faults.truncate(20);
    assert!(count == 0, "{count} differences:\n{}", faults.join("\n"));
}
