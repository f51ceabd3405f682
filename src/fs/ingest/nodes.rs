//! The node table of the ingest tree: what the kernel knows by number, under which names it is
//! found on disk, and the bounded set of `O_PATH` handles kept on it.
//!
//! Invariants: a node is here exactly as long as the kernel references it, something pins it or
//! another node is named in it; a node is in `idle` exactly when its handle may be closed. The lock
//! is never held during a call into the kernel: handles to be closed are carried out of it first,
//! because closing the last one of a removed file frees the file.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use crate::fs::errno::{Errno, FsResult};
use crate::sys::{self, Stat, at, c};

/// Names remembered of one node: enough to find a file again of which some were removed behind our
/// back, little enough that a thousand hard links do not fill the memory.
const MAX_PLACES: usize = 8;

/// Attempts to find a node whose names change while it is looked for.
const MAX_TRIES: usize = 100;

/// Node numbers stay below, so that the adapter has bits of its own.
const INO_END: u64 = 1 << 60;

/// A name of a node.
#[derive(Clone)]
struct Place {
    parent: u64,
    name: Box<OsStr>,
}

impl Place {
    fn is(&self, parent: u64, name: &OsStr) -> bool {
        self.parent == parent && *self.name == *name
    }
}

/// One step down a path: the inode that has to stand there, and its name.
type Step = (u64, Box<OsStr>);

/// What is known of one inode.
#[derive(Default)]
struct Node {
    /// Some living names, the newest last. A directory has one at most.
    places: Vec<Place>,
    /// References that the kernel holds.
    refs: u64,
    /// Open handles and operations at work that need the handle to stay.
    pins: u64,
    /// Places of other nodes that name this one as their parent.
    children: u64,
    /// Removed from disk for good: only the handle still leads to it.
    orphan: bool,
    fd: Option<Arc<OwnedFd>>,
}

/// The nodes of one tree.
pub(super) struct Nodes {
    root: u64,
    dev: u64,
    table: Mutex<Table>,
}

struct Table {
    root: u64,
    limit: usize,
    /// Descriptors that idle handles, and those in use, may take together.
    descriptors: usize,
    /// Nodes that are pinned.
    pinned: usize,
    nodes: HashMap<u64, Node>,
    /// Nodes whose handle may be closed, in the order of their last use.
    idle: LruCache<u64, ()>,
    /// Counts changes of names, so that a search that failed knows whether to try again.
    moves: u64,
    /// Handles to close once the lock is released.
    closing: Vec<Arc<OwnedFd>>,
}

/// Keeps a node and its handle in the table.
pub(super) struct Pinned {
    nodes: Arc<Nodes>,
    ino: u64,
    fd: Arc<OwnedFd>,
}

impl Pinned {
    /// The node's handle.
    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// The node's number.
    pub(super) fn node(&self) -> u64 {
        self.ino
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.nodes.with(|table| table.unpin(self.ino));
    }
}

impl Nodes {
    /// A table with nothing but the root, of which at most `limit` idle handles are kept.
    pub(super) fn new(root: Arc<OwnedFd>, stat: &Stat, limit: usize) -> FsResult<Nodes> {
        let node = Node { pins: 1, fd: Some(root), ..Node::default() };
        let nodes = Nodes {
            root: stat.ino,
            dev: stat.dev,
            table: Mutex::new(Table {
                root: stat.ino,
                limit,
                descriptors: usize::try_from(sys::open_files_limit() / 4 * 3).unwrap_or(usize::MAX),
                pinned: 1,
                nodes: HashMap::from([(stat.ino, node)]),
                idle: LruCache::unbounded(),
                moves: 0,
                closing: Vec::new(),
            }),
        };
        nodes.check(stat)?;
        Ok(nodes)
    }

    /// The number of the root.
    pub(super) fn root(&self) -> u64 {
        self.root
    }

    /// Runs `change` under the lock, and closes what it let go of after.
    fn with<T>(&self, change: impl FnOnce(&mut Table) -> T) -> T {
        let (result, closing) = {
            let mut table = self.table.lock();
            let result = change(&mut table);
            (result, std::mem::take(&mut table.closing))
        };
        drop(closing);
        result
    }

    /// Refuses what cannot be a node: objects of another file system have numbers of their own.
    fn check(&self, stat: &Stat) -> FsResult<()> {
        if stat.dev != self.dev {
            return Err(Errno(c::EXDEV));
        }
        if stat.ino >= INO_END {
            return Err(Errno(c::EIO));
        }
        Ok(())
    }

    /// A handle on what `name` in `dir` is on disk now.
    pub(super) fn find(&self, dir: &OwnedFd, name: &OsStr) -> FsResult<(Arc<OwnedFd>, Stat)> {
        let fd = at::open_path(dir, name)?;
        let stat = sys::fstat(&fd)?;
        self.check(&stat)?;
        Ok((Arc::new(fd), stat))
    }

    /// A handle on an open file.
    pub(super) fn handle_of(&self, file: &File) -> FsResult<(Arc<OwnedFd>, Stat)> {
        let stat = sys::fstat(file)?;
        self.check(&stat)?;
        Ok((Arc::new(at::path_handle(file)?), stat))
    }

    /// Notes that the kernel is told of `name` in `parent`, which is `stat`: one more reference.
    pub(super) fn admit(&self, parent: u64, name: &OsStr, fd: Arc<OwnedFd>, stat: &Stat) {
        self.with(|table| table.admit(parent, name, fd, stat));
    }

    /// Like `admit`, and pins the node.
    pub(super) fn admit_pinned(
        self: &Arc<Nodes>,
        parent: u64,
        name: &OsStr,
        fd: Arc<OwnedFd>,
        stat: &Stat,
    ) -> Pinned {
        self.with(|table| {
            table.pin(stat.ino, &fd, true);
            table.admit(parent, name, Arc::clone(&fd), stat);
        });
        Pinned { nodes: Arc::clone(self), ino: stat.ino, fd }
    }

    /// Undoes `count` references.
    pub(super) fn forget(&self, ino: u64, count: u64) {
        self.with(|table| {
            if let Some(node) = table.nodes.get_mut(&ino) {
                node.refs = node.refs.saturating_sub(count);
                table.settle(ino);
            }
        });
    }

    /// Pins a node.
    pub(super) fn pin(self: &Arc<Nodes>, ino: u64) -> FsResult<Pinned> {
        let fd = self.get(ino)?;
        match self.with(|table| table.pin(ino, &fd, false)) {
            true => Ok(Pinned { nodes: Arc::clone(self), ino, fd }),
            false => Err(Errno(c::ESTALE)),
        }
    }

    /// Pins the node that `fd` stands for, before a name of it changes on disk: while the change is
    /// under way neither the old nor the new name can be relied on. `None` if nobody knows it.
    pub(super) fn pin_known(self: &Arc<Nodes>, ino: u64, fd: &Arc<OwnedFd>) -> Option<Pinned> {
        let known = self.with(|table| {
            table.moves += 1;
            table.pin(ino, fd, false)
        });
        known.then(|| Pinned { nodes: Arc::clone(self), ino, fd: Arc::clone(fd) })
    }

    /// Notes that a name of a node was removed; `gone` when that was the last one on disk.
    pub(super) fn unnamed(&self, ino: u64, parent: u64, name: &OsStr, gone: bool) {
        self.with(|table| {
            table.moves += 1;
            table.forget_places(ino, |place| gone || place.is(parent, name));
            if let Some(node) = table.nodes.get_mut(&ino) {
                node.orphan |= gone;
            }
            table.settle(ino);
        });
    }

    /// Notes that a name of a node became another one.
    pub(super) fn renamed(
        &self,
        stat: &Stat,
        (parent, name): (u64, &OsStr),
        (new_parent, new_name): (u64, &OsStr),
    ) {
        self.with(|table| {
            table.moves += 1;
            // The new name first: it may be what keeps a parent in the table.
            table.add_place(stat, new_parent, new_name);
            table.forget_places(stat.ino, |place| place.is(parent, name));
            table.settle(stat.ino);
        });
    }

    /// A handle on a node: the one that is kept, or a new one, reached from the root by names.
    pub(super) fn get(&self, ino: u64) -> FsResult<Arc<OwnedFd>> {
        for _ in 0..MAX_TRIES {
            let (kept, places, moves) = self.with(|table| {
                let kept = table.kept(ino);
                let node = table.nodes.get(&ino).filter(|_| kept.is_none());
                let places = node.map(|node| node.places.clone()).unwrap_or_default();
                (kept, places, table.moves)
            });
            if let Some(fd) = kept {
                return Ok(fd);
            }
            for place in places.into_iter().rev() {
                match self.descend(ino, place) {
                    Err(Errno(c::ENOENT | c::ENOTDIR | c::ESTALE)) => {}
                    other => return other,
                }
            }
            // Not there. Unless a rename of ours passed by, the names changed behind our back.
            if self.with(|table| table.moves == moves) {
                break;
            }
        }
        Err(Errno(c::ESTALE))
    }

    /// Opens the way down to `place` from the nearest handle above, and checks every step: what
    /// stands there must be the very inode that the kernel was told of.
    fn descend(&self, ino: u64, place: Place) -> FsResult<Arc<OwnedFd>> {
        let route = self.with(|table| table.route(place.parent));
        let (mut fd, steps) = route.ok_or(Errno(c::ESTALE))?;
        for (ino, name) in steps.into_iter().rev().chain([(ino, place.name)]) {
            let next = at::open_path(&fd, &name)?;
            let stat = sys::fstat(&next)?;
            if stat.dev != self.dev || stat.ino != ino {
                return Err(Errno(c::ESTALE));
            }
            let next = Arc::new(next);
            fd = self.with(|table| table.keep(ino, next));
        }
        Ok(fd)
    }

    /// How many nodes there are, the root included.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.with(|table| table.nodes.len())
    }

    /// How many handles are kept without being pinned.
    #[cfg(test)]
    pub(super) fn idle(&self) -> usize {
        self.with(|table| table.idle.len())
    }

    /// Panics if the table contradicts itself.
    #[cfg(test)]
    pub(super) fn verify(&self) {
        self.with(|table| {
            let mut children = HashMap::<u64, u64>::new();
            for place in table.nodes.values().flat_map(|node| &node.places) {
                assert!(table.nodes.contains_key(&place.parent));
                *children.entry(place.parent).or_default() += 1;
            }
            for (ino, node) in &table.nodes {
                assert_eq!(node.children, children.get(ino).copied().unwrap_or(0));
                assert!(node.refs + node.pins + node.children > 0);
                assert!(node.places.len() <= MAX_PLACES);
                assert!(!node.orphan || (node.places.is_empty() && node.fd.is_some()));
                let idle = node.fd.is_some() && node.pins == 0 && !node.orphan;
                assert_eq!(table.idle.contains(ino), idle);
            }
            assert!(table.idle.len() <= table.limit);
            let pinned = table.nodes.values().filter(|node| node.pins > 0).count();
            assert_eq!(table.pinned, pinned);
        });
    }
}

impl Table {
    fn admit(&mut self, parent: u64, name: &OsStr, fd: Arc<OwnedFd>, stat: &Stat) {
        let node = self.nodes.entry(stat.ino).or_default();
        node.refs += 1;
        self.add_place(stat, parent, name);
        let spare = self.keep(stat.ino, fd);
        self.closing.push(spare);
    }

    /// Remembers a name of a node that is in the table.
    fn add_place(&mut self, stat: &Stat, parent: u64, name: &OsStr) {
        let ino = stat.ino;
        if ino == self.root || ino == parent || !self.nodes.contains_key(&parent) {
            return;
        }
        let Some(node) = self.nodes.get_mut(&ino) else { return };
        node.orphan = false;
        if let Some(at) = node.places.iter().position(|place| place.is(parent, name)) {
            // Seen alive just now: the last to be dropped, the first to be tried.
            node.places.get_mut(at..).unwrap_or_default().rotate_left(1);
            return;
        }
        let keep = if stat.is_dir() { 0 } else { MAX_PLACES - 1 };
        let surplus = node.places.len().saturating_sub(keep);
        let old: Vec<Place> = node.places.drain(..surplus).collect();
        node.places.reserve_exact(1);
        node.places.push(Place { parent, name: name.into() });
        if let Some(node) = self.nodes.get_mut(&parent) {
            node.children += 1;
        }
        self.childless(old);
    }

    /// Forgets names of a node.
    fn forget_places(&mut self, ino: u64, which: impl Fn(&Place) -> bool) {
        let Some(node) = self.nodes.get_mut(&ino) else { return };
        let old = node.places.extract_if(.., |place| which(place)).collect();
        self.childless(old);
    }

    fn childless(&mut self, old: Vec<Place>) {
        for place in old {
            if let Some(node) = self.nodes.get_mut(&place.parent) {
                node.children = node.children.saturating_sub(1);
            }
            self.settle(place.parent);
        }
    }

    /// Counts a pin, if the node is in the table or to be `made`.
    fn pin(&mut self, ino: u64, fd: &Arc<OwnedFd>, made: bool) -> bool {
        if made {
            self.nodes.entry(ino).or_default();
        }
        let Some(node) = self.nodes.get_mut(&ino) else { return false };
        self.pinned += usize::from(node.pins == 0);
        node.pins += 1;
        node.fd.get_or_insert_with(|| Arc::clone(fd));
        self.idle.pop(&ino);
        true
    }

    fn unpin(&mut self, ino: u64) {
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.pins = node.pins.saturating_sub(1);
            self.pinned -= usize::from(node.pins == 0).min(self.pinned);
            self.settle(ino);
        }
    }

    /// The handle that is kept on a node, which thereby counts as used.
    fn kept(&mut self, ino: u64) -> Option<Arc<OwnedFd>> {
        let fd = self.nodes.get(&ino)?.fd.as_ref().map(Arc::clone)?;
        self.idle.promote(&ino);
        Some(fd)
    }

    /// Keeps `fd` on a node, if it is still wanted and there is none; the one to be used.
    fn keep(&mut self, ino: u64, fd: Arc<OwnedFd>) -> Arc<OwnedFd> {
        let Some(node) = self.nodes.get_mut(&ino) else { return fd };
        let kept = Arc::clone(node.fd.get_or_insert_with(|| Arc::clone(&fd)));
        self.closing.push(fd);
        self.idle.promote(&ino);
        self.settle(ino);
        kept
    }

    /// The way to a directory: the nearest handle at or above it, and from there the numbers and
    /// names of the directories down to it, the lowest first.
    fn route(&mut self, mut ino: u64) -> Option<(Arc<OwnedFd>, Vec<Step>)> {
        let mut steps = Vec::new();
        // Directories moved behind our back can leave names that form a ring.
        while steps.len() < self.nodes.len() {
            if let Some(fd) = self.kept(ino) {
                return Some((fd, steps));
            }
            let place = self.nodes.get(&ino)?.places.last()?;
            steps.push((ino, place.name.clone()));
            ino = place.parent;
        }
        None
    }

    /// Restores the invariants after a change of a node: removes it, and parents that only it held,
    /// when nobody needs it; closes the handles used least recently when there are too many.
    fn settle(&mut self, ino: u64) {
        let mut changed = vec![ino];
        while let Some(ino) = changed.pop() {
            let Some(node) = self.nodes.get_mut(&ino) else { continue };
            if node.refs == 0 && node.pins == 0 && node.children == 0 {
                let node = std::mem::take(node);
                self.nodes.remove(&ino);
                self.idle.pop(&ino);
                self.closing.extend(node.fd);
                for place in node.places {
                    if let Some(parent) = self.nodes.get_mut(&place.parent) {
                        parent.children = parent.children.saturating_sub(1);
                        changed.push(place.parent);
                    }
                }
            } else if node.fd.is_none() || node.pins > 0 || node.orphan {
                self.idle.pop(&ino);
            } else if !self.idle.contains(&ino) {
                self.idle.put(ino, ());
            }
        }
        // What is in use takes a second descriptor where it is a file. Idle ones give way to that.
        let room = self.descriptors.saturating_sub(self.pinned.saturating_mul(2));
        while self.idle.len() > self.limit.min(room) {
            let Some((ino, ())) = self.idle.pop_lru() else { break };
            if let Some(node) = self.nodes.get_mut(&ino) {
                self.closing.extend(node.fd.take());
            }
        }
    }
}
