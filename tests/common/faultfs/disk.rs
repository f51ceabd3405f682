//! A disk in memory with two layers: what programs see, and what a power cut would leave for sure.
//!
//! Invariant: the durable layer changes only by a sync. Syncing a file makes its bytes and length
//! durable, not its name; syncing a directory makes durable what has happened to its names, and
//! what happened before to the same names. A rename is one change: it lasts whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use super::data::Data;
use super::fault::{Fault, Op, Rules, Verdict};
use super::image::{Image, Moment};

pub type Ino = u64;
pub const ROOT: Ino = 1;
pub type Nodes = BTreeMap<Ino, Arc<Node>>;
pub type Names = BTreeMap<Vec<u8>, Ino>;
pub type Result<T> = std::result::Result<T, i32>;

pub const ENOENT: i32 = 2;
pub const EIO: i32 = 5;
pub const EEXIST: i32 = 17;
pub const ENOTDIR: i32 = 20;
pub const EINVAL: i32 = 22;
pub const ENOTEMPTY: i32 = 39;

/// What a node is.
#[derive(Clone)]
pub enum Body {
    File(Arc<Data>),
    Dir(Arc<Names>),
    Link(Vec<u8>),
    /// A device, FIFO or socket: type bits and device number.
    Other(u32, u32),
}

/// A file, directory or something else.
#[derive(Clone)]
pub struct Node {
    pub body: Body,
    pub perm: u32,
    pub uid: u32,
    pub gid: u32,
    pub atime: SystemTime,
    pub mtime: SystemTime,
    pub ctime: SystemTime,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Node {
    pub fn new(body: Body, perm: u32) -> Node {
        let now = SystemTime::now();
        let (atime, mtime, ctime) = (now, now, now);
        Node { body, perm, uid: 0, gid: 0, atime, mtime, ctime, xattrs: BTreeMap::new() }
    }

    pub fn names(&self) -> Result<&Names> {
        match &self.body {
            Body::Dir(names) => Ok(names),
            _ => Err(ENOTDIR),
        }
    }

    pub fn data(&self) -> Result<&Arc<Data>> {
        match &self.body {
            Body::File(data) => Ok(data),
            _ => Err(EINVAL),
        }
    }
}

/// What happened to names, all at once: each has this node now, or none.
pub struct Change(pub Vec<(Ino, Vec<u8>, Option<Ino>)>);

impl Change {
    /// Applies it to directories; one that is not there yet begins empty.
    pub fn apply(&self, nodes: &mut Nodes) {
        for (dir, name, ino) in &self.0 {
            let empty = || Arc::new(Node::new(Body::Dir(Arc::default()), 0o700));
            let node = Arc::make_mut(nodes.entry(*dir).or_insert_with(empty));
            let Body::Dir(names) = &mut node.body else { continue };
            match ino {
                Some(ino) => Arc::make_mut(names).insert(name.clone(), *ino),
                None => Arc::make_mut(names).remove(name),
            };
        }
    }
}

/// The disk.
pub struct Disk {
    /// What programs see. Nodes without a name stay: they may be open, or come back by a cut.
    pub nodes: Nodes,
    /// What has been synced.
    pub durable: Nodes,
    /// What happened to names since.
    pub pending: Vec<Arc<Change>>,
    /// What a sync has failed to write: the kernel tells of it once, and does not try again.
    pub forgotten: BTreeMap<Ino, Arc<Data>>,
    pub rules: Rules,
    /// The states after each operation, if they are kept.
    pub moments: Option<Vec<Moment>>,
    next: Ino,
}

impl Disk {
    /// A disk on which an image lies, all of it durable.
    pub fn new(image: &Image, rules: Rules) -> Disk {
        let nodes = image.nodes.clone();
        let next = nodes.keys().next_back().map_or(ROOT, |it| *it) + 1;
        let durable = nodes.clone();
        let (pending, forgotten) = (Vec::new(), BTreeMap::new());
        Disk { nodes, durable, pending, forgotten, rules, moments: None, next }
    }

    /// A disk as it was at a moment, with all that was not durable then.
    pub fn resume(moment: &Moment) -> Disk {
        let mut disk = Disk::new(&Image { nodes: moment.nodes.clone() }, Rules::default());
        (disk.durable, disk.pending) = (moment.durable.clone(), moment.pending.clone());
        disk.forgotten = moment.forgotten.clone();
        disk
    }

    /// Begins to keep the state after each operation; the first is the one now.
    pub fn record(&mut self) {
        self.moments = Some(vec![self.moment(None, String::new())]);
    }

    pub fn moment(&self, op: Option<Op>, what: String) -> Moment {
        let (nodes, durable) = (self.nodes.clone(), self.durable.clone());
        let (pending, forgotten) = (self.pending.clone(), self.forgotten.clone());
        Moment { op, what, nodes, durable, pending, forgotten }
    }

    pub fn node(&self, ino: Ino) -> Result<&Arc<Node>> {
        self.nodes.get(&ino).ok_or(ENOENT)
    }

    fn node_mut(&mut self, ino: Ino) -> Result<&mut Node> {
        self.nodes.get_mut(&ino).map(Arc::make_mut).ok_or(ENOENT)
    }

    pub fn lookup(&self, dir: Ino, name: &[u8]) -> Result<Ino> {
        self.node(dir)?.names()?.get(name).copied().ok_or(ENOENT)
    }

    /// How many names a node has.
    pub fn links(&self, ino: Ino) -> u32 {
        match self.nodes.get(&ino).map(|it| &it.body) {
            Some(Body::Dir(_)) => 2,
            _ => {
                let dirs = self.nodes.values().filter_map(|it| it.names().ok());
                dirs.flat_map(|it| it.values()).filter(|it| **it == ino).count() as u32
            }
        }
    }

    /// The path of a node, for messages: by any of its names.
    fn path(&self, ino: Ino) -> String {
        let dirs = self.nodes.iter().filter_map(|(dir, it)| Some((*dir, it.names().ok()?)));
        let mut found = dirs.flat_map(|(dir, names)| names.iter().map(move |it| (dir, it)));
        match found.find(|(_, (_, it))| **it == ino) {
            _ if ino == ROOT => String::new(),
            Some((dir, (name, _))) => {
                format!("{}/{}", self.path(dir), String::from_utf8_lossy(name))
            }
            None => format!("/#{ino}"),
        }
    }

    /// Asks the rules and does a change of the state, or half of it, or nothing of it.
    fn change<T>(
        &mut self,
        (op, pid): (Op, u32),
        what: String,
        work: impl FnOnce(&mut Disk, bool) -> Result<T>,
    ) -> Result<T> {
        let result = match self.rules.judge(op, pid) {
            Verdict::Do => work(self, false),
            Verdict::Fail(errno) => return Err(errno),
            Verdict::Short => work(self, true),
            Verdict::DoAndDie => {
                let _ = work(self, false);
                Err(EIO)
            }
        };
        let moment = self.moments.is_some().then(|| self.moment(Some(op), what));
        if let Some(moments) = &mut self.moments {
            moments.extend(moment);
        }
        result
    }

    /// Where a name is or will be, for the record.
    fn at(&self, dir: Ino, name: &[u8]) -> String {
        match self.moments.is_some() {
            true => format!("{}/{}", self.path(dir), String::from_utf8_lossy(name)),
            false => String::new(),
        }
    }

    fn of(&self, ino: Ino) -> String {
        if self.moments.is_some() { self.path(ino) } else { String::new() }
    }

    fn set_names(&mut self, change: Change) {
        change.apply(&mut self.nodes);
        let now = SystemTime::now();
        for (dir, _, _) in &change.0 {
            let node = Arc::make_mut(self.nodes.get_mut(dir).unwrap());
            (node.mtime, node.ctime) = (now, now);
        }
        self.pending.push(Arc::new(change));
    }

    pub fn make(&mut self, by: (Op, u32), dir: Ino, name: &[u8], node: Node) -> Result<Ino> {
        let at = self.at(dir, name);
        self.change(by, at, |disk, _| {
            if disk.lookup(dir, name).is_ok() {
                return Err(EEXIST);
            }
            let ino = disk.next;
            disk.next += 1;
            disk.nodes.insert(ino, Arc::new(node));
            disk.set_names(Change(vec![(dir, name.to_vec(), Some(ino))]));
            Ok(ino)
        })
    }

    pub fn link(&mut self, pid: u32, ino: Ino, dir: Ino, name: &[u8]) -> Result<()> {
        let at = self.at(dir, name);
        self.change((Op::Link, pid), at, |disk, _| {
            if disk.lookup(dir, name).is_ok() {
                return Err(EEXIST);
            }
            disk.set_names(Change(vec![(dir, name.to_vec(), Some(ino))]));
            Ok(())
        })
    }

    pub fn remove(&mut self, by: (Op, u32), dir: Ino, name: &[u8]) -> Result<()> {
        let ino = self.lookup(dir, name)?;
        if self.node(ino)?.names().is_ok_and(|names| !names.is_empty()) {
            return Err(ENOTEMPTY);
        }
        let at = self.at(dir, name);
        self.change(by, at, |disk, _| {
            disk.set_names(Change(vec![(dir, name.to_vec(), None)]));
            Ok(())
        })
    }

    pub fn rename(
        &mut self,
        pid: u32,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        (keep, swap): (bool, bool),
    ) -> Result<()> {
        let ino = self.lookup(from.0, from.1)?;
        let there = self.lookup(to.0, to.1).ok();
        match there {
            Some(_) if keep => return Err(EEXIST),
            None if swap => return Err(ENOENT),
            Some(it) if it == ino => return Ok(()),
            Some(it) if !swap && self.node(it)?.names().is_ok_and(|it| !it.is_empty()) => {
                return Err(ENOTEMPTY);
            }
            _ => {}
        }
        let what = format!("{} to {}", self.at(from.0, from.1), self.at(to.0, to.1));
        self.change((Op::Rename, pid), what, |disk, _| {
            let left = there.filter(|_| swap);
            let sets = vec![(from.0, from.1.to_vec(), left), (to.0, to.1.to_vec(), Some(ino))];
            disk.set_names(Change(sets));
            Ok(())
        })
    }

    /// Gives how many bytes were written.
    pub fn write(&mut self, pid: u32, ino: Ino, offset: u64, bytes: &[u8]) -> Result<usize> {
        let what = match self.moments.is_some() {
            true => format!("{} {offset}+{}", self.path(ino), bytes.len()),
            false => String::new(),
        };
        self.change((Op::Write, pid), what, |disk, half| {
            let len = if half { bytes.len() / 2 } else { bytes.len() };
            disk.write_back(ino, offset, &bytes[..len])?;
            Ok(len)
        })
    }

    /// Writes what the kernel had in mapped pages: that is no operation of any program's.
    pub fn write_back(&mut self, ino: Ino, offset: u64, bytes: &[u8]) -> Result<()> {
        let node = self.node_mut(ino)?;
        let Body::File(data) = &mut node.body else { return Err(EINVAL) };
        Arc::make_mut(data).write(offset, bytes);
        (node.mtime, node.ctime) = (SystemTime::now(), SystemTime::now());
        if let Some(lost) = self.forgotten.get_mut(&ino) {
            // What is written anew is written at the next sync: it is none of what was lost.
            let others: Vec<u8> = bytes.iter().map(|it| !it).collect();
            Arc::make_mut(lost).write(offset, &others);
        }
        Ok(())
    }

    /// Changes a node's bytes or attributes.
    pub fn edit(
        &mut self,
        by: (Op, u32),
        ino: Ino,
        work: impl FnOnce(&mut Node) -> Result<()>,
    ) -> Result<()> {
        let what = self.of(ino);
        self.change(by, what, |disk, _| {
            if by.0 == Op::Truncate {
                disk.forgotten.remove(&ino);
            }
            let node = disk.node_mut(ino)?;
            node.ctime = SystemTime::now();
            work(node)
        })
    }

    pub fn sync_file(&mut self, pid: u32, ino: Ino) -> Result<()> {
        let what = self.of(ino);
        let result = self.change((Op::Fsync, pid), what, |disk, _| {
            if !disk.rules.is_sync_off {
                let synced = disk.synced(ino)?;
                disk.durable.insert(ino, synced);
            }
            Ok(())
        });
        if result == Err(EIO)
            && let Ok(data) = self.node(ino)?.data().cloned()
        {
            self.forgotten.insert(ino, data);
        }
        result
    }

    /// A node as it is on the disk when it is synced: what was forgotten is not written again.
    fn synced(&self, ino: Ino) -> Result<Arc<Node>> {
        let node = self.node(ino)?;
        let (Some(lost), Ok(new)) = (self.forgotten.get(&ino), node.data()) else {
            return Ok(node.clone());
        };
        let old = self.durable.get(&ino).and_then(|it| it.data().ok()).cloned().unwrap_or_default();
        let is_new = |number| new.sector(number) != lost.sector(number);
        let body = Body::File(Arc::new(old.mixed(new, new.len(), is_new)));
        Ok(Arc::new(Node { body, ..(**node).clone() }))
    }

    pub fn sync_dir(&mut self, pid: u32, dir: Ino) -> Result<()> {
        let what = self.of(dir);
        self.change((Op::FsyncDir, pid), what, |disk, _| {
            if !disk.rules.is_sync_off {
                disk.settle_names(dir);
            }
            Ok(())
        })
    }

    /// Makes durable what happened to the names of a directory.
    fn settle_names(&mut self, dir: Ino) {
        // From the last: what lasts takes along what happened before to the same names.
        let mut keys = BTreeSet::new();
        let mut lasting = Vec::new();
        let mut left = Vec::new();
        for change in self.pending.drain(..).rev() {
            let names = || change.0.iter().map(|it| (it.0, it.1.clone()));
            if change.0.iter().any(|it| it.0 == dir) || names().any(|it| keys.contains(&it)) {
                keys.extend(names());
                lasting.push(change);
            } else {
                left.push(change);
            }
        }
        lasting.iter().rev().for_each(|it| it.apply(&mut self.durable));
        left.reverse();
        self.pending = left;
        self.durable
            .entry(dir)
            .or_insert_with(|| Arc::new(Node::new(Body::Dir(Arc::default()), 0o700)));
    }

    /// Asks whether a file may be opened.
    pub fn open(&mut self, pid: u32) -> Result<()> {
        match self.rules.judge(Op::Open, pid) {
            Verdict::Fail(errno) => Err(errno),
            _ => Ok(()),
        }
    }

    pub fn read(&mut self, ino: Ino, offset: u64, size: usize) -> Result<Vec<u8>> {
        let mut bytes = self.node(ino)?.data()?.read(offset, size);
        self.rules.reads += 1;
        if let Some((at, Fault::Flip(bit))) = self.rules.read_fault
            && at == self.rules.reads
            && !bytes.is_empty()
        {
            let place = (bit / 8) as usize % bytes.len();
            bytes[place] ^= 1 << (bit % 8);
        }
        Ok(bytes)
    }
}
