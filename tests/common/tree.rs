//! Trees as values: everything that a backup has to keep, so that two of them can be compared.
//!
//! Invariant: walked by open directories, so that neither a path's length nor a link leads astray.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};

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
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

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
        walk.dir(&fd, b"");
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
    fn dir(&mut self, fd: &OwnedFd, path: &[u8]) {
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
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(fd, OsStr::from_bytes(name), flags, Mode::empty());
                let fd = fd.unwrap_or_else(|e| panic!("opening {:?}: {e}", shown(&below)));
                self.dir(&fd, &below);
            } else if node.links > 1 {
                self.links.entry((stat.st_dev, stat.st_ino)).or_default().push(below.clone());
            }
            let old = self.nodes.insert(below.clone(), node);
            assert!(old.is_none(), "{:?} is listed twice", shown(&below));
        }
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
        let content = match kind {
            "file" => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(dir, os_name, flags, Mode::empty());
                hash(File::from(file.unwrap_or_else(|e| panic!("opening {os_name:?}: {e}"))))
            }
            "symlink" => rustix::fs::readlinkat(dir, os_name, Vec::new()).unwrap().into_bytes(),
            _ => Vec::new(),
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
            xattrs: xattrs(dir, os_name),
        }
    }
}

fn hash(mut file: File) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 17];
    loop {
        match file.read(&mut buffer).unwrap_or_else(|e| panic!("reading {file:?}: {e}")) {
            0 => return hasher.finalize().as_bytes().to_vec(),
            len => hasher.update(&buffer[..len]),
        };
    }
}

fn xattrs(dir: &OwnedFd, name: &OsStr) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut path = std::ffi::OsString::from(format!("/proc/self/fd/{}/", dir.as_fd().as_raw_fd()));
    path.push(name);
    let path = Path::new(&path);
    let mut names = vec![0; 1 << 16];
    let len = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(len) => len,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(e) => panic!("listing attributes of {name:?}: {e}"),
    };
    let names = names[..len].split(|byte| *byte == 0).filter(|it| !it.is_empty());
    names
        .map(|key| {
            let mut value = vec![0; 1 << 16];
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
