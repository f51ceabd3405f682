//! Plays a program: what each step has to answer.
//!
//! Invariant: whatever a program opens is closed at its end, also when it fails.

use std::collections::{BTreeSet, HashMap};

use super::super::tree::Node;
use super::{Answer, join, shown, split};
use super::{CHANGES, Change, Facts, Files, Listed, Name, Reference, Step};

/// An open directory, and what has been listed of it.
struct OpenDir<D> {
    dir: D,
    run: usize,
    path: Vec<u8>,
    seen: Vec<Listed>,
}

/// A program at work.
pub(super) struct Machine<'a, F: Files> {
    reference: &'a Reference,
    files: &'a F,
    open: Vec<(F::File, usize, Vec<u8>)>,
    dirs: Vec<OpenDir<F::Dir>>,
    /// The inode number of each entry that was met, which must stay.
    inos: HashMap<(usize, Vec<u8>), u64>,
}

impl<'a, F: Files> Machine<'a, F> {
    pub(super) fn new(reference: &'a Reference, files: &'a F) -> Machine<'a, F> {
        let (open, dirs, inos) = (Vec::new(), Vec::new(), HashMap::new());
        Machine { reference, files, open, dirs, inos }
    }

    pub(super) fn end(&mut self) {
        self.open.drain(..).for_each(|it| self.files.close(it.0));
        self.dirs.drain(..).for_each(|it| self.files.closedir(it.dir));
    }

    fn entry(&self, number: u16) -> (usize, Vec<u8>, &'a Node, F::Node) {
        let entries = &self.reference.entries;
        let (run, path) = entries[usize::from(number) % entries.len()].clone();
        let node = self.files.node(run, &path).unwrap_or_else(|e| {
            panic!("{} of run {} is not there: {e}", shown(&path), run + 1);
        });
        let expected = &self.reference.runs[run].tree.0[&path];
        (run, path, expected, node)
    }

    fn dir(&self, number: u16) -> (usize, Vec<u8>, F::Node) {
        let (mut run, mut path, mut found, mut node) = self.entry(number);
        if found.kind != "dir" {
            let parent = split(&path).unwrap().0.to_vec();
            let entries = &self.reference.entries;
            let at = entries.iter().position(|it| (it.0, &it.1) == (run, &parent)).unwrap();
            (run, path, found, node) = self.entry(at as u16);
        }
        assert_eq!(found.kind, "dir");
        (run, path, node)
    }

    /// The bytes of a name, and the path it leads to where that is in the run.
    fn name(&self, run: usize, dir: &[u8], name: &Name) -> (Vec<u8>, Option<Vec<u8>>) {
        let run = &self.reference.runs[run];
        let none = Vec::new();
        let children = run.children.get(dir).unwrap_or(&none);
        let child = |n: &u16| match children.is_empty() {
            true => b"none".to_vec(),
            false => children[usize::from(*n) % children.len()].clone(),
        };
        let bytes = match name {
            Name::Child(n) => child(n),
            Name::Longer(n) => [child(n), b"x".to_vec()].concat(),
            Name::Shorter(n) => child(n).split_last().unwrap().1.to_vec(),
            Name::Empty => Vec::new(),
            Name::Dot => b".".to_vec(),
            Name::DotDot => b"..".to_vec(),
            Name::Long(0 | b'/', len) => vec![b'n'; *len],
            Name::Long(byte, len) => vec![*byte; *len],
            Name::Any(bytes) => {
                bytes.iter().filter(|it| !matches!(it, 0 | b'/')).copied().collect()
            }
        };
        let path = children.contains(&bytes).then(|| join(dir, &bytes));
        (bytes, path)
    }

    /// What was answered about an entry is as the model has it, and as it was before.
    fn check(&mut self, run: usize, path: &[u8], facts: &Facts) {
        let runs = &self.reference.runs;
        let node = &runs[run].tree.0[path];
        let what = || format!("{} of run {}: {facts:?}, not {node:?}", shown(path), run + 1);
        let is_dir = node.kind == "dir";
        assert!(facts.kind == node.kind && facts.mode == node.mode, "{}", what());
        assert!(facts.owner == node.owner && facts.rdev == node.rdev, "{}", what());
        assert!(facts.mtime == node.mtime && facts.atime == node.mtime, "{}", what());
        assert!(is_dir || (facts.size, facts.links) == (node.size, node.links), "{}", what());
        assert!(!is_dir || facts.size == 4096, "{}", what());
        assert!(facts.blocks * 512 <= facts.size.next_multiple_of(4096), "{}", what());
        // One inode number for an entry, for its other names, and for it in other runs.
        let mut same = vec![(run, path.to_vec())];
        let id = runs[run].ids[path];
        for (other, reference) in runs.iter().enumerate() {
            if !is_dir && other != run && node.links == 1 && reference.ids.get(path) == Some(&id) {
                same.push((other, path.to_vec()));
            }
        }
        if !is_dir && node.links > 1 {
            let names = runs[run].ids.iter().filter(|it| *it.1 == id);
            same.extend(names.map(|it| (run, it.0.clone())));
        }
        for key in same {
            let ino = *self.inos.entry(key.clone()).or_insert(facts.ino);
            assert_eq!(ino, facts.ino, "inode of {} and {key:?}", what());
        }
    }

    pub(super) fn step(&mut self, step: &Step) {
        match step {
            Step::Stat { entry } => {
                let (run, path, _, node) = self.entry(*entry);
                let facts = self.files.stat(&node).unwrap();
                self.check(run, &path, &facts);
                assert_eq!(self.files.stat(&node), Ok(facts));
            }
            Step::Lookup { dir, name } => self.lookup(*dir, name),
            Step::ReadLink { entry } => {
                let (_, path, expected, node) = self.entry(*entry);
                let wanted = match expected.kind {
                    "symlink" => Ok(expected.content.clone()),
                    _ => Err(libc::EINVAL),
                };
                assert_eq!(self.files.readlink(&node), wanted, "{}", shown(&path));
            }
            Step::Xattr { entry, key } => {
                let (_, path, expected, node) = self.entry(*entry);
                let keys: Vec<&Vec<u8>> = expected.xattrs.keys().collect();
                let at = usize::from(*key) % (keys.len() + 1);
                let (key, wanted) = match keys.get(at) {
                    Some(key) => (key.as_slice(), Ok(expected.xattrs[*key].clone())),
                    None => (&b"user.no such key"[..], Err(libc::ENODATA)),
                };
                let got = self.files.xattr(&node, key);
                assert_eq!(got, wanted, "{} of {}", shown(key), shown(&path));
            }
            Step::Xattrs { entry } => {
                let (_, path, expected, node) = self.entry(*entry);
                let mut keys = self.files.xattrs(&node).unwrap();
                keys.sort();
                let wanted: Vec<Vec<u8>> = expected.xattrs.keys().cloned().collect();
                assert_eq!(keys, wanted, "{}", shown(&path));
            }
            Step::Space { entry } => {
                let node = self.entry(*entry).3;
                assert!(self.files.space(&node).unwrap() > 0);
            }
            Step::Open { entry } => {
                let (run, path, expected, node) = self.entry(*entry);
                if expected.kind == "file" {
                    self.open.push((self.files.open(&node).unwrap(), run, path));
                } else if expected.kind == "dir" && !F::KERNEL {
                    assert_eq!(self.files.open(&node).err(), Some(libc::EISDIR));
                }
            }
            Step::Read { file, at, off, len } => self.read(*file, *at, *off, *len as usize),
            Step::Seek { file, at, off, data } => self.seek(*file, *at, *off, *data),
            Step::Close { file } => {
                if !self.open.is_empty() {
                    let at = usize::from(*file) % self.open.len();
                    self.files.close(self.open.swap_remove(at).0);
                }
            }
            Step::OpenDir { entry } => {
                let (run, path, expected, node) = self.entry(*entry);
                let opened = self.files.opendir(&node);
                if expected.kind == "dir" {
                    let dir = opened.unwrap();
                    self.dirs.push(OpenDir { dir, run, path, seen: Vec::new() });
                } else {
                    assert_eq!(opened.err(), Some(libc::ENOTDIR), "{}", shown(&path));
                }
            }
            Step::List { dir, from, count } => self.list(*dir, *from, *count),
            Step::CloseDir { dir } => {
                if !self.dirs.is_empty() {
                    let at = usize::from(*dir) % self.dirs.len();
                    self.files.closedir(self.dirs.swap_remove(at).dir);
                }
            }
            Step::Change { entry, name, how } => self.change(*entry, name, *how),
        }
    }

    fn lookup(&mut self, dir: u16, name: &Name) {
        let (run, path, node) = self.dir(dir);
        let (bytes, leads_to) = self.name(run, &path, name);
        let got = self.files.lookup(&node, &bytes);
        assert_eq!(self.files.lookup(&node, &bytes), got);
        let dots = match &bytes[..] {
            b"." => Some(Some(path.clone())),
            b".." => Some(split(&path).map(|it| it.0.to_vec())),
            _ => None,
        };
        match (leads_to, dots.filter(|_| F::KERNEL)) {
            (Some(path), _) | (None, Some(Some(path))) => self.check(run, &path, &got.unwrap()),
            // Above a run's root is the list of runs.
            (None, Some(None)) => assert_eq!(got.unwrap().kind, "dir"),
            (None, None) => {
                let error = got.expect_err("a name that is not there");
                let fits = match bytes.len() {
                    0..=255 => error == libc::ENOENT,
                    _ => matches!(error, libc::ENOENT | libc::ENAMETOOLONG),
                };
                assert!(fits, "{error} for {}", shown(&bytes));
            }
        }
    }

    /// An offset in a file of this length: any, or near a border of something.
    fn offset(len: u64, at: u16, off: i16) -> u64 {
        let base = match at % 4 {
            0 => 0,
            1 => len,
            2 => (len * u64::from(at) / 65_535).next_multiple_of(4096),
            _ => len * u64::from(at) / 65_535,
        };
        match at {
            7 => (1 << 62) + u64::from(off.unsigned_abs()),
            _ => base.saturating_add_signed(off.into()),
        }
    }

    fn read(&mut self, file: u16, at: u16, off: i16, len: usize) {
        if self.open.is_empty() {
            return;
        }
        let (open, run, path) = &self.open[usize::from(file) % self.open.len()];
        let bytes = &self.reference.runs[*run].bytes[path];
        let offset = Self::offset(bytes.len() as u64, at, off);
        let from = bytes.len().min(usize::try_from(offset).unwrap());
        let wanted = &bytes[from..bytes.len().min(from + len)];
        for _ in 0..2 {
            let got = self.files.read(open, offset, len).unwrap();
            let what = shown(path);
            assert!(got == wanted, "{what}: {len} bytes at {offset}, got {}", got.len());
        }
    }

    fn seek(&mut self, file: u16, at: u16, off: i16, data: bool) {
        if self.open.is_empty() {
            return;
        }
        let (open, run, path) = &self.open[usize::from(file) % self.open.len()];
        let bytes = &self.reference.runs[*run].bytes[path];
        let len = bytes.len() as u64;
        let offset = Self::offset(len, at, off);
        let got = self.files.seek(open, offset, data);
        let what = || format!("{} at {offset} of {len}: {got:?}", shown(path));
        assert_eq!(self.files.seek(open, offset, data), got, "{}", what());
        if offset >= len {
            assert_eq!(got, Err(libc::ENXIO), "{}", what());
        } else if !data {
            let hole = got.unwrap_or_else(|_| panic!("{}", what()));
            assert!((offset..=len).contains(&hole), "{}", what());
            if hole > offset {
                assert_eq!(self.files.seek(open, offset, true), Ok(offset), "{}", what());
            }
        } else {
            // There are only zeros up to the data that was found.
            let end = *got.as_ref().unwrap_or(&len);
            assert!((offset..=len).contains(&end), "{}", what());
            assert!(got.is_ok() || got == Err(libc::ENXIO), "{}", what());
            let passed = &bytes[offset as usize..end as usize];
            assert!(passed.iter().all(|it| *it == 0), "{}", what());
        }
    }

    fn list(&mut self, dir: u16, from: u16, count: usize) {
        if self.dirs.is_empty() {
            return;
        }
        let at = usize::from(dir) % self.dirs.len();
        let open = &mut self.dirs[at];
        if from % 16 == 15 {
            // A position that no listing gave: nothing is there, and that is said at once.
            let beyond = (1 << (17 + from % 45)) + u64::from(from);
            let listed = self.files.list(&open.dir, beyond, count);
            assert!(listed.as_ref().map_or(true, Vec::is_empty), "at {beyond}: {listed:?}");
            return;
        }
        // Mostly onwards; else from where any answer stopped.
        let first = match from % 3 {
            0 => usize::from(from) % (open.seen.len() + 1),
            _ => open.seen.len(),
        };
        let offset = if first == 0 { 0 } else { open.seen[first - 1].next };
        let listed = self.files.list(&open.dir, offset, count).unwrap();
        let names: BTreeSet<&[u8]> = open.seen.iter().map(|it| &*it.name).collect();
        for (number, item) in (first..).zip(&listed) {
            match open.seen.get(number) {
                Some(seen) => assert_eq!(seen, item),
                None => assert!(!names.contains(&*item.name), "{} twice", shown(&item.name)),
            }
        }
        let new = listed.get(open.seen.len() - first..).unwrap_or_default().to_vec();
        open.seen.extend(new);
        let children = &self.reference.runs[open.run].children[&open.path];
        if listed.is_empty() {
            let found: BTreeSet<&[u8]> = open.seen.iter().map(|it| &*it.name).collect();
            let mut wanted: BTreeSet<&[u8]> = children.iter().map(|it| &**it).collect();
            wanted.extend([&b"."[..], b".."]);
            assert_eq!(found, wanted, "in {}", shown(&open.path));
            assert_eq!(open.seen.len(), wanted.len());
        }
        let (run, path) = (open.run, open.path.clone());
        for item in listed {
            if matches!(&item.name[..], b"." | b"..") {
                continue;
            }
            let below = join(&path, &item.name);
            assert!(children.contains(&item.name), "{} in no run", shown(&below));
            let node = self.files.node(run, &below).unwrap();
            let facts = self.files.stat(&node).unwrap();
            assert_eq!(item.ino, facts.ino, "{}", shown(&below));
            self.check(run, &below, &facts);
            if let Some(listed) = item.facts {
                assert_eq!(listed, facts, "{}", shown(&below));
            }
        }
    }

    fn change(&mut self, entry: u16, name: &Name, how: u16) {
        let how = CHANGES[usize::from(how) % CHANGES.len()];
        let of_entry = matches!(
            how,
            Change::Mode
                | Change::Owner
                | Change::Size
                | Change::Times
                | Change::Write
                | Change::SetXattr
                | Change::RemoveXattr
                | Change::Link
        );
        if of_entry {
            let (_, path, expected, node) = self.entry(entry);
            let is_possible = match how {
                Change::Size | Change::Write => expected.kind == "file",
                Change::Link => expected.kind != "dir",
                _ => true,
            };
            if !is_possible {
                return;
            }
            let got = self.files.change(&node, expected.kind == "dir", b"new name", how);
            self.refused(&path, how, got);
            return;
        }
        let (run, path, node) = self.dir(entry);
        let (bytes, leads_to) = self.name(run, &path, name);
        let is_plain = !matches!(&bytes[..], b"" | b"." | b"..") && bytes.len() <= 255;
        // What the kernel knows without asking is told first: what is there, and what is not.
        let makes = !matches!(how, Change::Remove | Change::RemoveDir | Change::Rename);
        if F::KERNEL && (!is_plain || makes == leads_to.is_some()) {
            assert!(self.files.change(&node, true, &bytes, how).is_err());
            return;
        }
        let got = self.files.change(&node, true, &bytes, how);
        let kind = leads_to.map(|it| self.reference.runs[run].tree.0[&it].kind);
        let wrong_kind = matches!(
            (how, kind),
            (Change::Remove, Some("dir")) | (Change::RemoveDir, Some("file" | "symlink" | "fifo"))
        );
        if F::KERNEL && wrong_kind {
            assert!(got.is_err());
        } else {
            self.refused(&path, how, got);
        }
    }

    fn refused(&self, path: &[u8], how: Change, got: Answer<()>) {
        assert_eq!(got, Err(libc::EROFS), "{how:?} of {}", shown(path));
    }
}
