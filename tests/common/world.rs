//! A tree on disk and the same tree as plain values, changed together by random operations.
//!
//! Invariant: what a [`World`] does to its directory it does to its model, so the model says what a
//! backup has to give back, without asking the disk. Times are the model's too: all that was
//! touched gets its times at the end of a step.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use super::data::Seeded;
use super::path_of;
use super::tree::{Node, Tree};

/// What is left out of backups, as `--exclude` has it.
pub const EXCLUDED: &str = "*.skip";

/// Few names, so that they come again: odd ones, and ones that are left out.
const NAMES: [&[u8]; 20] = [
    b"a",
    b"b",
    b"c",
    b"d",
    b"A",
    b"new\nline",
    b" blank ",
    b"\xff\xfe",
    b"half \xe2\x82",
    b"gr\xc3\xbcn",
    b"-rf",
    b"*?[a]\\",
    b"...",
    b".hidden",
    b"latest",
    b"1",
    b"x.skip",
    b"y.skip",
    b"z.skip.not",
    &[b'n'; 255],
];
const TARGETS: [&[u8]; 5] = [b"a", b"../b", b"/nowhere/at all", b"\xff\n", b"."];
const OWNERS: [u32; 5] = [0, 1, 1_000, 65_534, 4_000_000_000];
const SECONDS: [i64; 6] = [0, -1, -2_000_000_000, 1_700_000_000, 2_147_483_648, 5_000_000_000];
/// Directories are not nested deeper.
const DEPTH_MAX: usize = 5;
/// No file becomes longer, and all together do not.
const FILE_BYTES_MAX: usize = 3 << 20;
const ALL_BYTES_MAX: usize = 10 << 20;

/// Bytes to write.
#[derive(Clone, Debug)]
pub enum Data {
    Noise { seed: u8, len: u32 },
    Text { seed: u8, len: u32 },
    Zeros { len: u32 },
}

impl Data {
    fn bytes(&self) -> Vec<u8> {
        match *self {
            Data::Noise { seed, len } => Seeded::new(seed.into()).noise(len as usize),
            Data::Text { seed, len } => Seeded::new(seed.into()).text(len as usize),
            Data::Zeros { len } => vec![0; len as usize],
        }
    }
}

/// One change. Numbers choose among what there is when its turn comes, so that every list of
/// operations means something, and a part of it too.
#[derive(Clone, Debug)]
pub enum Op {
    /// A new file, directory, link or pipe.
    Create {
        dir: u16,
        name: u8,
        data: Data,
    },
    MakeDir {
        dir: u16,
        name: u8,
    },
    Symlink {
        dir: u16,
        name: u8,
        target: u8,
    },
    Pipe {
        dir: u16,
        name: u8,
    },
    /// The content of a file in a new one.
    Copy {
        file: u16,
        dir: u16,
        name: u8,
    },
    /// The same with something inserted, so that all after it is shifted.
    CopyShifted {
        file: u16,
        at: u32,
        insert: Data,
        dir: u16,
        name: u8,
    },
    /// Overwrites, from within the file.
    Edit {
        file: u16,
        at: u32,
        data: Data,
    },
    Append {
        file: u16,
        data: Data,
    },
    /// Writes beyond the end: what is between is a hole.
    Beyond {
        file: u16,
        gap: u32,
        data: Data,
    },
    Truncate {
        file: u16,
        len: u32,
    },
    /// As editors do: a new file, renamed over the old one.
    Save {
        file: u16,
        data: Data,
    },
    /// Two entries change names.
    Swap {
        one: u16,
        other: u16,
    },
    Delete {
        entry: u16,
    },
    Rename {
        entry: u16,
        dir: u16,
        name: u8,
    },
    /// Something of another kind under the name.
    Turn {
        entry: u16,
        kind: u8,
    },
    Link {
        entry: u16,
        dir: u16,
        name: u8,
    },
    Mode {
        entry: u16,
        mode: u16,
    },
    Owner {
        entry: u16,
        uid: u8,
        gid: u8,
    },
    /// Only times.
    Touch {
        entry: u16,
    },
    Xattr {
        entry: u16,
        key: u8,
        value: Option<Vec<u8>>,
    },
}

fn data() -> impl Strategy<Value = Data> {
    let len = prop_oneof![
        2 => Just(0u32),
        6 => 1u32..200,
        8 => 200u32..20_000,
        3 => 20_000u32..200_000,
        2 => 200_000u32..1_500_000,
    ];
    (0u8..3, 0u8..12, len).prop_map(|(kind, seed, len)| match kind {
        0 => Data::Noise { seed, len },
        1 => Data::Text { seed, len },
        _ => Data::Zeros { len },
    })
}

/// Any operation, with the choice of times that goes with it.
pub fn op() -> impl Strategy<Value = (Op, u8)> {
    let (n, m) = (any::<u16>, || 0u8..NAMES.len() as u8);
    let op = prop_oneof![
        14 => (n(), m(), data()).prop_map(|(dir, name, data)| Op::Create { dir, name, data }),
        9 => (n(), m()).prop_map(|(dir, name)| Op::MakeDir { dir, name }),
        2 => (n(), m(), any::<u8>())
            .prop_map(|(dir, name, target)| Op::Symlink { dir, name, target }),
        1 => (n(), m()).prop_map(|(dir, name)| Op::Pipe { dir, name }),
        2 => (n(), n(), m()).prop_map(|(file, dir, name)| Op::Copy { file, dir, name }),
        2 => (n(), any::<u32>(), data(), n(), m()).prop_map(|(file, at, insert, dir, name)| {
            Op::CopyShifted { file, at, insert, dir, name }
        }),
        5 => (n(), any::<u32>(), data()).prop_map(|(file, at, data)| Op::Edit { file, at, data }),
        3 => (n(), data()).prop_map(|(file, data)| Op::Append { file, data }),
        2 => (n(), 0u32..1_000_000, data())
            .prop_map(|(file, gap, data)| Op::Beyond { file, gap, data }),
        2 => (n(), any::<u32>()).prop_map(|(file, len)| Op::Truncate { file, len }),
        2 => (n(), data()).prop_map(|(file, data)| Op::Save { file, data }),
        2 => (n(), n()).prop_map(|(one, other)| Op::Swap { one, other }),
        3 => n().prop_map(|entry| Op::Delete { entry }),
        5 => (n(), n(), m()).prop_map(|(entry, dir, name)| Op::Rename { entry, dir, name }),
        2 => (n(), any::<u8>()).prop_map(|(entry, kind)| Op::Turn { entry, kind }),
        4 => (n(), n(), m()).prop_map(|(entry, dir, name)| Op::Link { entry, dir, name }),
        2 => (n(), 0u16..0o10000).prop_map(|(entry, mode)| Op::Mode { entry, mode }),
        2 => (n(), any::<u8>(), any::<u8>())
            .prop_map(|(entry, uid, gid)| Op::Owner { entry, uid, gid }),
        2 => n().prop_map(|entry| Op::Touch { entry }),
        3 => (n(), 0u8..3, prop::option::of(prop::collection::vec(any::<u8>(), 0..300)))
            .prop_map(|(entry, key, value)| Op::Xattr { entry, key, value }),
    ];
    (op, any::<u8>())
}

/// What an inode is, with what it holds.
#[derive(Clone)]
enum Kind {
    File(Content),
    Dir,
    Symlink(Vec<u8>),
    Pipe,
}

/// A file's bytes, and their hash.
#[derive(Clone)]
struct Content {
    bytes: Rc<Vec<u8>>,
    hash: Rc<Vec<u8>>,
}

impl Content {
    fn new(bytes: Vec<u8>) -> Content {
        let hash = Rc::new(blake3::hash(&bytes).as_bytes().to_vec());
        Content { bytes: Rc::new(bytes), hash }
    }
}

#[derive(Clone)]
struct Inode {
    kind: Kind,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, u64),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

type Id = u64;

/// Whose links a tree counts.
#[derive(Clone, Copy)]
pub enum Links {
    /// Those of the source: also names that are left out.
    OfSource,
    /// Those of a restored tree.
    OfSnapshot,
}

/// All that is in a tree at one moment.
#[derive(Clone)]
pub struct Model {
    names: BTreeMap<Vec<u8>, Id>,
    inodes: BTreeMap<Id, Inode>,
}

/// How a run must tell of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Added,
    Modified,
    Deleted,
    /// It looks the same, but something was done to it: modified or not.
    MaybeModified,
}

impl Model {
    /// Whether a path is in a backup.
    fn is_kept(path: &[u8]) -> bool {
        !path.split(|byte| *byte == b'/').any(|name| name.ends_with(b".skip"))
    }

    /// Paths and inodes that are in a backup.
    fn kept(&self) -> impl Iterator<Item = (&Vec<u8>, Id)> {
        self.names.iter().filter(|it| Model::is_kept(it.0)).map(|(path, id)| (path, *id))
    }

    fn paths_of(&self, id: Id) -> Vec<&Vec<u8>> {
        self.names.iter().filter(|it| *it.1 == id).map(|it| it.0).collect()
    }

    /// The tree as it must come back.
    pub fn tree(&self, count: Links) -> Tree {
        let mut links: BTreeMap<Id, (u64, Option<&Vec<u8>>)> = BTreeMap::new();
        for (path, id) in &self.names {
            let is_kept = Model::is_kept(path);
            let (links, first) = links.entry(*id).or_default();
            if is_kept || matches!(count, Links::OfSource) {
                *links += 1;
            }
            if is_kept {
                first.get_or_insert(path);
            }
        }
        let node = |id: Id| {
            let inode = &self.inodes[&id];
            let (kind, size, content, is_dir) = match &inode.kind {
                Kind::File(it) => ("file", it.bytes.len(), (*it.hash).clone(), false),
                Kind::Dir => ("dir", 0, Vec::new(), true),
                Kind::Symlink(target) => ("symlink", target.len(), target.clone(), false),
                Kind::Pipe => ("fifo", 0, Vec::new(), false),
            };
            let links = if is_dir { (1, None) } else { links[&id] };
            Node {
                kind,
                mode: inode.mode,
                owner: inode.owner,
                mtime: inode.mtime,
                size: size as u64,
                rdev: 0,
                links: links.0,
                first_name: links.1.filter(|_| links.0 > 1).cloned(),
                content,
                // Holes are zeros here: where they are is the file system's choice.
                data: Vec::new(),
                xattrs: inode.xattrs.clone(),
                flags: 0,
            }
        };
        Tree(self.kept().map(|(path, id)| (path.clone(), node(id))).collect())
    }

    /// The bytes of a file.
    pub fn bytes(&self, path: &[u8]) -> &[u8] {
        match &self.inodes[&self.names[path]].kind {
            Kind::File(content) => &content.bytes,
            _ => panic!("{path:?} is no file"),
        }
    }

    /// Number of files in a backup, and of their bytes.
    pub fn files(&self) -> (u64, u64) {
        let len = |id: Id| match &self.inodes[&id].kind {
            Kind::File(content) => Some(content.bytes.len() as u64),
            _ => None,
        };
        self.kept().filter_map(|it| len(it.1)).fold((0, 0), |sum, len| (sum.0 + 1, sum.1 + len))
    }

    /// What a run that saw this has to tell, if the run before saw `before`, and since then
    /// `touched` inodes had something done to them.
    pub fn changes_since(
        &self,
        before: Option<&Model>,
        touched: &BTreeSet<Id>,
    ) -> BTreeMap<Vec<u8>, Told> {
        let mut told = BTreeMap::new();
        let Some(before) = before else {
            return self.kept().map(|it| (it.0.clone(), Told::Added)).collect();
        };
        let (old, new) = (before.tree(Links::OfSource).0, self.tree(Links::OfSource).0);
        for (path, node) in &new {
            let how = match old.get(path) {
                None => Told::Added,
                Some(old) => {
                    // Which of its names is the first is not a matter of the entry itself.
                    let plain = |it: &Node| Node { first_name: None, ..it.clone() };
                    let id = self.names[path];
                    // A name that moved with its directory makes a new version of the inode, which
                    // its other names share.
                    let is_same =
                        before.names[path] == id && before.paths_of(id) == self.paths_of(id);
                    if plain(old) != plain(node) {
                        Told::Modified
                    } else if !is_same || touched.contains(&id) {
                        Told::MaybeModified
                    } else {
                        continue;
                    }
                }
            };
            told.insert(path.clone(), how);
        }
        let gone = old.into_keys().filter(|path| !new.contains_key(path));
        told.extend(gone.map(|path| (path, Told::Deleted)));
        told
    }
}

/// A directory and its model.
pub struct World {
    root: PathBuf,
    model: Model,
    touched: BTreeSet<Id>,
    /// Inodes whose times have to be set.
    stale: BTreeSet<Id>,
    next: Id,
}

impl World {
    /// A world in an empty directory.
    pub fn new(root: &Path) -> World {
        let mut world = World {
            root: root.to_path_buf(),
            model: Model { names: BTreeMap::new(), inodes: BTreeMap::new() },
            touched: BTreeSet::new(),
            stale: BTreeSet::new(),
            next: 0,
        };
        world.add(Vec::new(), Kind::Dir, 1);
        world
    }

    /// What is there now.
    pub fn model(&self) -> Model {
        self.model.clone()
    }

    /// The inodes to which something was done since this was last called.
    pub fn take_touched(&mut self) -> BTreeSet<Id> {
        std::mem::take(&mut self.touched)
    }

    fn real(&self, path: &[u8]) -> PathBuf {
        match path.is_empty() {
            true => self.root.clone(),
            false => self.root.join(path_of(path)),
        }
    }

    fn inode(&mut self, path: &[u8]) -> &mut Inode {
        self.model.inodes.get_mut(&self.model.names[path]).unwrap()
    }

    // --- Choosing -----------------------------------------------------------------------------

    fn choose(&self, number: u16, fits: impl Fn(&[u8], &Inode) -> bool) -> Option<Vec<u8>> {
        let fit = |it: &(&Vec<u8>, &Id)| fits(it.0, &self.model.inodes[it.1]);
        let found: Vec<&Vec<u8>> = self.model.names.iter().filter(fit).map(|it| it.0).collect();
        (!found.is_empty()).then(|| found[usize::from(number) % found.len()].clone())
    }

    fn choose_dir(&self, number: u16) -> Vec<u8> {
        let fits = |path: &[u8], inode: &Inode| {
            matches!(inode.kind, Kind::Dir) && path.split(|it| *it == b'/').count() < DEPTH_MAX
        };
        self.choose(number, fits).unwrap()
    }

    fn choose_file(&self, number: u16) -> Option<Vec<u8>> {
        self.choose(number, |_, inode| matches!(inode.kind, Kind::File(_)))
    }

    /// Any entry but the root.
    fn choose_entry(&self, number: u16) -> Option<Vec<u8>> {
        self.choose(number, |path, _| !path.is_empty())
    }

    fn place(&self, dir: u16, name: u8) -> Vec<u8> {
        join(&self.choose_dir(dir), NAMES[usize::from(name) % NAMES.len()])
    }

    /// The place that is meant, or the next one in its directory that is free.
    fn free_place(&self, dir: u16, name: u8) -> Option<Vec<u8>> {
        let dir = self.choose_dir(dir);
        let (before, after) = NAMES.split_at(usize::from(name) % NAMES.len());
        let mut paths = after.iter().chain(before).map(|name| join(&dir, name));
        paths.find(|path| !self.model.names.contains_key(path))
    }

    /// Whether what is below `from` would lie too deep below `to`: paths have to stay usable.
    fn is_too_deep(&self, from: &[u8], to: &[u8]) -> bool {
        let depth = |path: &[u8]| path.split(|it| *it == b'/').count();
        let prefix = join(from, b"");
        let below = self.model.names.keys().filter(|it| it.starts_with(&prefix));
        let deepest = below.map(|it| depth(it) - depth(from)).max().unwrap_or(0);
        depth(to) + deepest > 2 * DEPTH_MAX
    }

    fn all_bytes(&self) -> usize {
        let len = |it: &Inode| match &it.kind {
            Kind::File(content) => content.bytes.len(),
            _ => 0,
        };
        self.model.inodes.values().map(len).sum()
    }

    // --- Doing --------------------------------------------------------------------------------

    /// Does one operation, if it is possible. `when` chooses times, and whether a change hides
    /// behind the old ones.
    pub fn apply(&mut self, op: &Op, when: u8) {
        match op {
            Op::Create { dir, name, data } => self.create(*dir, *name, data.bytes(), when),
            Op::MakeDir { dir, name } => {
                if let Some(path) = self.free_place(*dir, *name) {
                    self.make(path, Kind::Dir, when);
                }
            }
            Op::Symlink { dir, name, target } => {
                if let Some(path) = self.free_place(*dir, *name) {
                    let target = TARGETS[usize::from(*target) % TARGETS.len()].to_vec();
                    self.make(path, Kind::Symlink(target), when);
                }
            }
            Op::Pipe { dir, name } => {
                if let Some(path) = self.free_place(*dir, *name) {
                    self.make(path, Kind::Pipe, when);
                }
            }
            Op::Copy { file, dir, name } => {
                if let Some(path) = self.choose_file(*file) {
                    self.create(*dir, *name, self.model.bytes(&path).to_vec(), when);
                }
            }
            Op::CopyShifted { file, at, insert, dir, name } => {
                if let Some(path) = self.choose_file(*file) {
                    let mut bytes = self.model.bytes(&path).to_vec();
                    let at = *at as usize % (bytes.len() + 1);
                    bytes.splice(at..at, insert.bytes());
                    self.create(*dir, *name, bytes, when);
                }
            }
            Op::Edit { file, at, data } => {
                if let Some(path) = self.choose_file(*file) {
                    let at = *at as usize % (self.model.bytes(&path).len() + 1);
                    self.write(&path, at, &data.bytes(), when);
                }
            }
            Op::Append { file, data } => {
                if let Some(path) = self.choose_file(*file) {
                    self.write(&path, self.model.bytes(&path).len(), &data.bytes(), when);
                }
            }
            Op::Beyond { file, gap, data } => {
                if let Some(path) = self.choose_file(*file) {
                    let at = self.model.bytes(&path).len() + *gap as usize;
                    self.write(&path, at, &data.bytes(), when);
                }
            }
            Op::Truncate { file, len } => {
                if let Some(path) = self.choose_file(*file) {
                    let len = *len as usize % (self.model.bytes(&path).len() + 1);
                    self.truncate(&path, len, when);
                }
            }
            Op::Save { file, data } => {
                if let Some(path) = self.choose_file(*file) {
                    self.save(&path, data.bytes(), when);
                }
            }
            Op::Swap { one, other } => self.swap(*one, *other, when),
            Op::Delete { entry } => {
                if let Some(path) = self.choose_entry(*entry) {
                    self.remove(&path, when);
                }
            }
            Op::Rename { entry, dir, name } => {
                if let Some(path) = self.choose_entry(*entry) {
                    self.rename(&path, &self.place(*dir, *name), when);
                }
            }
            Op::Turn { entry, kind } => {
                if let Some(path) = self.choose_entry(*entry) {
                    self.remove(&path, when);
                    let kind = match kind % 4 {
                        0 => Kind::File(Content::new(vec![*kind; 100])),
                        1 => Kind::Dir,
                        2 => Kind::Symlink(b"turned".to_vec()),
                        _ => Kind::Pipe,
                    };
                    self.make(path, kind, when);
                }
            }
            Op::Link { entry, dir, name } => self.link(*entry, *dir, *name, when),
            Op::Mode { entry, mode } => self.change(*entry, when, |it| it.mode = (*mode).into()),
            Op::Owner { entry, uid, gid } => {
                let of = |number: u8| OWNERS[usize::from(number) % OWNERS.len()];
                self.change(*entry, when, |it| it.owner = (of(*uid), of(*gid)));
            }
            Op::Touch { entry } => self.change(*entry, when, |_| ()),
            Op::Xattr { entry, key, value } => self.xattr(*entry, *key, value.as_deref(), when),
        }
    }

    /// Sets the times of all that was touched: the end of a step.
    pub fn settle(&mut self) {
        let stale = std::mem::take(&mut self.stale);
        for (path, id) in &self.model.names {
            if stale.contains(id) {
                let time = self.model.inodes[id].mtime;
                let time = Timespec { tv_sec: time.0, tv_nsec: time.1 as i64 };
                let times = Timestamps { last_access: time, last_modification: time };
                let flags = AtFlags::SYMLINK_NOFOLLOW;
                rustix::fs::utimensat(CWD, self.real(path), &times, flags).unwrap();
            }
        }
    }

    /// Notes that something was done to an inode, and gives it its time.
    fn touch(&mut self, path: &[u8], when: u8) {
        let Some(id) = self.model.names.get(path).copied() else { return };
        self.touched.insert(id);
        self.stale.insert(id);
        // Every third change leaves the times as if nothing had happened.
        if !when.is_multiple_of(3) {
            let nanos = u64::from(when) * 3_906_250 + u64::from(when % 7);
            let time = (SECONDS[usize::from(when) % SECONDS.len()] + i64::from(when), nanos);
            self.model.inodes.get_mut(&id).unwrap().mtime = time;
        }
    }

    fn touch_parent(&mut self, path: &[u8], when: u8) {
        self.touch(parent(path), when);
    }

    /// A new inode in the model, under a path that is there already.
    fn add(&mut self, path: Vec<u8>, kind: Kind, when: u8) {
        let (mode, owner) = (0o644 | u32::from(when & 0o111), (0, 0));
        let inode = Inode { kind, mode, owner, mtime: (1_000, 1), xattrs: BTreeMap::new() };
        self.next += 1;
        self.model.inodes.insert(self.next, inode);
        self.model.names.insert(path.clone(), self.next);
        self.put_metadata(&path);
        self.touch(&path, when);
        self.touch_parent(&path, when);
    }

    /// Makes an entry on disk and in the model.
    fn make(&mut self, path: Vec<u8>, kind: Kind, when: u8) {
        let real = self.real(&path);
        match &kind {
            Kind::File(content) => fs::write(real, &**content.bytes).unwrap(),
            Kind::Dir => fs::create_dir(real).unwrap(),
            Kind::Symlink(target) => {
                std::os::unix::fs::symlink(OsStr::from_bytes(target), real).unwrap();
            }
            Kind::Pipe => {
                rustix::fs::mknodat(CWD, real, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
                    .unwrap();
            }
        }
        let is_link = matches!(kind, Kind::Symlink(_));
        self.add(path.clone(), kind, when);
        if is_link {
            self.inode(&path).mode = 0o777;
        }
    }

    fn create(&mut self, dir: u16, name: u8, mut bytes: Vec<u8>, when: u8) {
        let Some(path) = self.free_place(dir, name) else { return };
        let room = ALL_BYTES_MAX.saturating_sub(self.all_bytes()).min(FILE_BYTES_MAX);
        bytes.truncate(room);
        self.make(path, Kind::File(Content::new(bytes)), when);
    }

    /// Owner and mode as the model has them, after the kernel had a say.
    fn put_metadata(&mut self, path: &[u8]) {
        let real = self.real(path);
        let inode = self.inode(path);
        lchown(&real, Some(inode.owner.0), Some(inode.owner.1)).unwrap();
        if !matches!(inode.kind, Kind::Symlink(_)) {
            fs::set_permissions(&real, Permissions::from_mode(inode.mode)).unwrap();
        }
    }

    fn write(&mut self, path: &[u8], at: usize, data: &[u8], when: u8) {
        let end = at + data.len();
        let grown = end.saturating_sub(self.model.bytes(path).len());
        if end > FILE_BYTES_MAX || self.all_bytes() + grown > ALL_BYTES_MAX || data.is_empty() {
            return;
        }
        let file = OpenOptions::new().write(true).open(self.real(path)).unwrap();
        file.write_all_at(data, at as u64).unwrap();
        self.edit(path, when, |bytes| {
            bytes.resize(bytes.len().max(end), 0);
            bytes[at..end].copy_from_slice(data);
        });
    }

    fn truncate(&mut self, path: &[u8], len: usize, when: u8) {
        File::options().write(true).open(self.real(path)).unwrap().set_len(len as u64).unwrap();
        self.edit(path, when, |bytes| bytes.truncate(len));
    }

    fn edit(&mut self, path: &[u8], when: u8, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = self.model.bytes(path).to_vec();
        change(&mut bytes);
        self.inode(path).kind = Kind::File(Content::new(bytes));
        self.put_metadata(path);
        self.touch(path, when);
    }

    fn save(&mut self, path: &[u8], mut bytes: Vec<u8>, when: u8) {
        bytes.truncate(ALL_BYTES_MAX.saturating_sub(self.all_bytes()));
        let mut inode = self.inode(path).clone();
        inode.kind = Kind::File(Content::new(bytes.clone()));
        inode.xattrs.clear();
        let new = self.root.join("being saved");
        fs::write(&new, bytes).unwrap();
        fs::rename(new, self.real(path)).unwrap();
        self.forget(path, when);
        self.next += 1;
        self.model.inodes.insert(self.next, inode);
        self.model.names.insert(path.to_vec(), self.next);
        self.put_metadata(path);
        self.touch(path, when);
        self.touch_parent(path, when);
        self.touch(b"", when);
    }

    fn swap(&mut self, one: u16, other: u16, when: u8) {
        let (Some(one), Some(other)) = (self.choose_entry(one), self.choose_entry(other)) else {
            return;
        };
        let is_below = |a: &[u8], b: &[u8]| b.starts_with(&join(a, b""));
        let is_same = self.model.names[&one] == self.model.names[&other];
        if is_same || is_below(&one, &other) || is_below(&other, &one) {
            return;
        }
        if self.is_too_deep(&one, &other) || self.is_too_deep(&other, &one) {
            return;
        }
        let (a, b) = (self.real(&one), self.real(&other));
        let flags = rustix::fs::RenameFlags::EXCHANGE;
        rustix::fs::renameat_with(CWD, &a, CWD, &b, flags).unwrap();
        let (first, second) = (self.take_below(&one), self.take_below(&other));
        self.put_below(&other, first);
        self.put_below(&one, second);
        for path in [&one, &other] {
            self.touch(path, when);
            self.touch_parent(path, when);
        }
    }

    fn remove(&mut self, path: &[u8], when: u8) {
        let real = self.real(path);
        match self.inode(path).kind {
            Kind::Dir => fs::remove_dir_all(real).unwrap(),
            _ => fs::remove_file(real).unwrap(),
        }
        self.forget(path, when);
    }

    /// Takes a path and all below it out of the model.
    fn forget(&mut self, path: &[u8], when: u8) {
        for id in self.take_below(path).into_values() {
            match self.model.names.values().any(|it| *it == id) {
                // Another name of it has lost one.
                true => {
                    self.touched.insert(id);
                    self.stale.insert(id);
                }
                false => {
                    self.model.inodes.remove(&id);
                }
            }
        }
        self.touch_parent(path, when);
    }

    /// The names at and below a path, without that, out of the model.
    fn take_below(&mut self, path: &[u8]) -> BTreeMap<Vec<u8>, Id> {
        let prefix = join(path, b"");
        let is_in = |it: &Vec<u8>| it == path || it.starts_with(&prefix);
        let (taken, left) = std::mem::take(&mut self.model.names)
            .into_iter()
            .partition::<BTreeMap<_, _>, _>(|it| is_in(&it.0));
        self.model.names = left;
        taken.into_iter().map(|(name, id)| (name[path.len()..].to_vec(), id)).collect()
    }

    fn put_below(&mut self, path: &[u8], names: BTreeMap<Vec<u8>, Id>) {
        self.model.names.extend(names.into_iter().map(|(name, id)| ([path, &name].concat(), id)));
    }

    fn rename(&mut self, from: &[u8], to: &[u8], when: u8) {
        let is_below = |a: &[u8], b: &[u8]| b.starts_with(&join(a, b""));
        if from == to || is_below(from, to) || is_below(to, from) || self.is_too_deep(from, to) {
            return;
        }
        let is_dir = |world: &mut World, path: &[u8]| matches!(world.inode(path).kind, Kind::Dir);
        if self.model.names.contains_key(to) {
            let prefix = join(to, b"");
            let is_empty = !self.model.names.keys().any(|it| it.starts_with(&prefix));
            let is_same = self.model.names[from] == self.model.names[to];
            let may = is_dir(self, from) == is_dir(self, to) && is_empty && !is_same;
            if !may {
                return;
            }
        }
        fs::rename(self.real(from), self.real(to)).unwrap();
        if self.model.names.contains_key(to) {
            self.forget(to, when);
        }
        let names = self.take_below(from);
        self.put_below(to, names);
        self.touch(to, when);
        self.touch_parent(from, when);
        self.touch_parent(to, when);
    }

    fn link(&mut self, entry: u16, dir: u16, name: u8, when: u8) {
        let is_leaf = |_: &[u8], inode: &Inode| !matches!(inode.kind, Kind::Dir);
        let (Some(path), Some(new)) = (self.choose(entry, is_leaf), self.free_place(dir, name))
        else {
            return;
        };
        fs::hard_link(self.real(&path), self.real(&new)).unwrap();
        self.model.names.insert(new.clone(), self.model.names[&path]);
        self.touch(&new, when);
        self.touch_parent(&new, when);
    }

    /// Changes metadata of any entry, the root included.
    fn change(&mut self, entry: u16, when: u8, change: impl FnOnce(&mut Inode)) {
        let path = self.choose(entry, |_, _| true).unwrap();
        let inode = self.inode(&path);
        let mode = inode.mode;
        change(inode);
        if matches!(inode.kind, Kind::Symlink(_)) {
            inode.mode = mode;
        }
        self.put_metadata(&path);
        self.touch(&path, when);
    }

    fn xattr(&mut self, entry: u16, key: u8, value: Option<&[u8]>, when: u8) {
        let path = self.choose(entry, |_, _| true).unwrap();
        let real = self.real(&path);
        let inode = self.inode(&path);
        // Only files and directories have attributes that are the user's.
        let space = match inode.kind {
            Kind::File(_) | Kind::Dir => "user",
            _ => "trusted",
        };
        let key = format!("{space}.model {key}").into_bytes();
        let name = OsStr::from_bytes(&key);
        match value {
            Some(value) => {
                rustix::fs::lsetxattr(&real, name, value, XattrFlags::empty()).unwrap();
                inode.xattrs.insert(key, value.to_vec());
            }
            None if inode.xattrs.contains_key(&key) => {
                rustix::fs::lremovexattr(&real, name).unwrap();
                inode.xattrs.remove(&key);
            }
            None => return,
        }
        self.touch(&path, when);
    }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    match dir.is_empty() {
        true => name.to_vec(),
        false => [dir, b"/", name].concat(),
    }
}

fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|byte| *byte == b'/').map_or(b"", |at| &path[..at])
}
