//! What is on a disk at a moment, and what a power cut at that moment may leave of it.
//!
//! Invariant: whatever is chosen, what was synced is there. Of the rest, each change of names is
//! there or not, whatever came before or after it; a file that was not synced has its old bytes or
//! its new ones or any mixture of sectors, at any of its lengths.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use super::data::{Data, SECTOR};
use super::disk::{Body, Change, Ino, Node, Nodes, ROOT};
use super::fault::Op;
use crate::common::data::Seeded;

/// A whole tree.
#[derive(Clone)]
pub struct Image {
    pub nodes: Nodes,
}

/// A disk as it was after an operation.
#[derive(Clone)]
pub struct Moment {
    /// None for the first.
    pub op: Option<Op>,
    /// What it was done to.
    pub what: String,
    pub nodes: Nodes,
    pub durable: Nodes,
    pub pending: Vec<Arc<Change>>,
    pub forgotten: BTreeMap<Ino, Arc<Data>>,
}

/// What becomes of that which is not durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All of it is lost.
    Lost,
    /// None is: no cut at all, but the end of the process.
    Kept,
    /// Names are kept, the bytes of files are lost, as many file systems have it.
    Empty,
    /// Bytes are kept, what happened to names is lost.
    Nameless,
    /// Any part of it is, by this seed.
    Some(u64),
}

impl Default for Image {
    fn default() -> Image {
        let root = Arc::new(Node::new(Body::Dir(Arc::default()), 0o755));
        Image { nodes: Nodes::from([(ROOT, root)]) }
    }
}

impl Moment {
    /// What is on the disk after a cut.
    pub fn cut(&self, cut: Cut) -> Image {
        if cut == Cut::Kept {
            return Image { nodes: self.nodes.clone() }.reachable();
        }
        let mut seeded = Seeded::new(if let Cut::Some(seed) = cut { seed } else { 0 });
        let odds = [10, 50, 90][seeded.below(3) as usize];
        let mut keeps = |part| match cut {
            Cut::Empty => part == Part::Names,
            Cut::Nameless => part == Part::Bytes,
            Cut::Some(_) => seeded.below(100) < odds,
            _ => false,
        };
        let mut nodes = Nodes::new();
        for (ino, node) in &self.nodes {
            let synced = self.durable.get(ino);
            let body = match &node.body {
                Body::Dir(_) => match synced.map(|it| &it.body) {
                    Some(body @ Body::Dir(_)) => body.clone(),
                    _ => Body::Dir(Arc::default()),
                },
                Body::File(new) => {
                    let old = synced.and_then(|it| it.data().ok()).cloned().unwrap_or_default();
                    Body::File(torn(&old, new, cut, &mut keeps))
                }
                other => other.clone(),
            };
            nodes.insert(*ino, Arc::new(Node { body, ..(**node).clone() }));
        }
        for change in &self.pending {
            if keeps(Part::Names) {
                change.apply(&mut nodes);
            }
        }
        Image { nodes }.reachable()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Names,
    Bytes,
}

fn torn(
    old: &Arc<Data>,
    new: &Arc<Data>,
    cut: Cut,
    keeps: &mut impl FnMut(Part) -> bool,
) -> Arc<Data> {
    if Arc::ptr_eq(old, new) {
        return old.clone();
    }
    let Cut::Some(seed) = cut else {
        return if keeps(Part::Bytes) { new.clone() } else { old.clone() };
    };
    let mut seeded = Seeded::new(seed ^ new.len() ^ old.len() << 20);
    match seeded.below(5) {
        0 => old.clone(),
        1 => new.clone(),
        // The length is there and the bytes are not, or the other way round.
        2 => Arc::new(old.mixed(new, new.len(), |_| false)),
        3 => Arc::new(old.mixed(new, old.len(), |_| keeps(Part::Bytes))),
        _ => {
            let (short, long) = (old.len().min(new.len()), old.len().max(new.len()));
            let sectors = (long - short).div_ceil(SECTOR as u64);
            let len = (short + SECTOR as u64 * seeded.below(sectors + 1)).min(long);
            Arc::new(old.mixed(new, len, |_| keeps(Part::Bytes)))
        }
    }
}

impl Image {
    /// Without what no name leads to.
    fn reachable(mut self) -> Image {
        let mut found = BTreeSet::new();
        let mut left = vec![ROOT];
        while let Some(ino) = left.pop() {
            if let Some(node) = self.nodes.get(&ino).filter(|_| found.insert(ino)) {
                left.extend(node.names().into_iter().flat_map(|it| it.values()));
            }
        }
        self.nodes.retain(|ino, _| found.contains(ino));
        self
    }

    /// The same for two images of which no program could tell the difference: who held a lock, and
    /// what was mapped, no program asks, and what a killed one had half written is removed.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        self.visit(ROOT, b"", &mut |path, node| {
            if path.ends_with(b".lock") || path.ends_with(b"-shm") {
                return;
            }
            hasher.update(&(path.len() as u64).to_le_bytes()).update(path);
            if is_unread(path) {
                return;
            }
            match &node.body {
                Body::File(data) => {
                    hasher.update(&data.len().to_le_bytes()).update(&data.bytes());
                }
                Body::Link(target) => {
                    hasher.update(target);
                }
                _ => {}
            }
        });
        *hasher.finalize().as_bytes()
    }

    /// All paths with the lengths of files, but for those that tell of the process or of the time.
    pub fn paths(&self) -> Vec<(String, u64)> {
        let mut paths = Vec::new();
        self.visit(ROOT, b"", &mut |path, node| {
            let path = String::from_utf8_lossy(path).into_owned();
            let len = node.data().map_or(0, |it| it.len());
            let own = ["/tmp/", "/.tmp", ".lock", "-shm", "/meta/", "/manifests/", "/catalog/"];
            if !own.iter().any(|it| path.contains(it)) {
                paths.push((path, len));
            }
        });
        paths
    }

    /// The paths of all files, with what is in them.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        let mut files = Vec::new();
        self.visit(ROOT, b"", &mut |path, node| {
            if let Ok(data) = node.data() {
                files.push((String::from_utf8_lossy(path).into_owned(), data.bytes()));
            }
        });
        files
    }

    fn visit(&self, ino: Ino, path: &[u8], each: &mut impl FnMut(&[u8], &Node)) {
        let Some(node) = self.nodes.get(&ino) else { return };
        each(path, node);
        for (name, child) in node.names().into_iter().flatten() {
            self.visit(*child, &[path, b"/", name].concat(), each);
        }
    }

    /// The tree of a directory.
    pub fn of_dir(dir: &Path) -> Image {
        let mut image = Image::default();
        let mut next = ROOT + 1;
        image.take(dir, ROOT, &mut next);
        image
    }

    fn take(&mut self, dir: &Path, ino: Ino, next: &mut Ino) {
        let mut names = super::disk::Names::new();
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let (path, stat) = (entry.path(), entry.metadata().unwrap());
            let child = *next;
            *next += 1;
            names.insert(entry.file_name().into_vec(), child);
            let body = match stat.file_type() {
                it if it.is_dir() => Body::Dir(Arc::default()),
                it if it.is_symlink() => {
                    Body::Link(fs::read_link(&path).unwrap().into_os_string().into_vec())
                }
                _ => Body::File(Arc::new(Data::of(&fs::read(&path).unwrap()))),
            };
            let mut node = Node::new(body, stat.mode() & 0o7777);
            node.mtime = stat.modified().unwrap();
            self.nodes.insert(child, Arc::new(node));
            if stat.is_dir() {
                self.take(&path, child, next);
            }
        }
        let node = Arc::make_mut(self.nodes.get_mut(&ino).unwrap());
        node.body = Body::Dir(Arc::new(names));
    }

    /// Writes the tree into a directory, which is made.
    pub fn write_to(&self, dir: &Path) {
        self.write_node(ROOT, dir);
    }

    fn write_node(&self, ino: Ino, path: &Path) {
        let Some(node) = self.nodes.get(&ino) else { return };
        match &node.body {
            Body::Dir(names) => {
                fs::DirBuilder::new().mode(0o700).create(path).unwrap();
                for (name, child) in names.iter() {
                    self.write_node(*child, &path.join(std::ffi::OsStr::from_bytes(name)));
                }
            }
            Body::File(data) => {
                let mut options = fs::OpenOptions::new();
                let mut file =
                    options.write(true).create_new(true).mode(node.perm).open(path).unwrap();
                std::io::Write::write_all(&mut file, &data.bytes()).unwrap();
                file.set_modified(node.mtime).unwrap();
            }
            Body::Link(target) => {
                let target = std::ffi::OsStr::from_bytes(target);
                std::os::unix::fs::symlink(target, path).unwrap();
            }
            Body::Other(..) => {}
        }
    }
}

/// Whether a file is removed before anybody reads it: it has not got its name.
fn is_unread(path: &[u8]) -> bool {
    let text = String::from_utf8_lossy(path);
    text.contains("/tmp/") && text.ends_with(".part") || text.contains(".rebuilding")
}
