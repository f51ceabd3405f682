//! A tree as a tar archive: all but sockets, which tar has no form for, and file flags, for which
//! GNU tar has none.
//!
//! Names are below the directory that was asked for (`./a/b`), as `tar -C DIR -c .` makes them; a
//! single file has its own name. The first name of a file carries its content, further ones are
//! links to it. A file that is damaged and small is left out and told; a long one has begun to go
//! out when that shows, so the archive ends there, without the mark of its end.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::Write;

use tar::EntryType;

use super::header::{BLOCK_BYTES, Member, padding, sparse_map};
use super::{PIECE_BYTES, content_map, copy_content, failed};
use crate::catalog::{EntryRow, Listing, Run, VersionId};
use crate::chunk::HashAlgo;
use crate::entry::{Extra, Kind};
use crate::error::{Error, Problem, Quoted, Result};
use crate::snapshot::{Found, Snapshots};

/// Problems that are kept with their texts; more are only counted.
const PROBLEMS_MAX: usize = 10_000;

/// What went into an archive.
#[derive(Debug, Default)]
pub struct Summary {
    /// Members.
    pub entries: u64,
    /// Sockets, which tar has no form for.
    pub sockets: u64,
    /// What was left out, the first of it with the reason.
    pub problems: Vec<Problem>,
    /// How much was left out.
    pub problem_count: u64,
}

/// Writes what was found as a tar archive.
pub fn tar(snapshots: &Snapshots, found: &Found, out: &mut dyn Write) -> Result<Summary> {
    let mut archive = Archive {
        snapshots,
        run: &found.run,
        hash: snapshots.settings()?.hash,
        out,
        users: HashMap::new(),
        groups: HashMap::new(),
        links: HashMap::new(),
        summary: Summary::default(),
    };
    match found.entry.child {
        Some(_) => archive.walk(&found.entry)?,
        None => archive.leaf(&found.entry.name, &found.entry)?,
    }
    archive
        .out
        .write_all(&[0; 2 * BLOCK_BYTES])
        .and_then(|()| archive.out.flush())
        .map_err(failed)?;
    Ok(archive.summary)
}

struct Archive<'a> {
    snapshots: &'a Snapshots,
    run: &'a Run,
    hash: HashAlgo,
    out: &'a mut dyn Write,
    users: HashMap<u32, Vec<u8>>,
    groups: HashMap<u32, Vec<u8>>,
    /// Files with several names, of which not all have been met: the first one, and how many are
    /// still to come.
    links: HashMap<VersionId, (Vec<u8>, u64)>,
    summary: Summary,
}

/// What a member is made of besides its name and its metadata.
struct Form<'a> {
    kind: EntryType,
    target: &'a [u8],
    extra: &'a Extra,
    size: u64,
    is_sparse: bool,
}

impl Form<'_> {
    fn new(kind: EntryType, extra: &Extra) -> Form<'_> {
        Form { kind, target: &[], extra, size: 0, is_sparse: false }
    }
}

impl Archive<'_> {
    fn walk(&mut self, root: &EntryRow) -> Result<()> {
        let mut path = b"./".to_vec();
        self.dir(&path, root)?;
        let mut levels = vec![(path.len(), Listing::new(self.run.id, root.child, 0))];
        while let Some((len, listing)) = levels.last_mut() {
            path.truncate(*len);
            let Some(entry) = self.snapshots.with_reader(|reader| listing.next(reader))? else {
                levels.pop();
                continue;
            };
            path.extend_from_slice(&entry.name);
            if entry.meta.kind == Kind::Dir {
                path.push(b'/');
                self.dir(&path, &entry)?;
                let depth = levels.len();
                levels.push((path.len(), Listing::new(self.run.id, entry.child, depth)));
            } else {
                self.leaf(&path, &entry)?;
            }
        }
        Ok(())
    }

    fn dir(&mut self, name: &[u8], entry: &EntryRow) -> Result<()> {
        match self.extra(entry) {
            Ok(extra) => self.head(name, entry, Form::new(EntryType::Directory, &extra)),
            Err(e) => {
                // What is in it does not depend on its attributes.
                self.problem(name, &e);
                self.head(name, entry, Form::new(EntryType::Directory, &Extra::default()))
            }
        }
    }

    fn leaf(&mut self, name: &[u8], entry: &EntryRow) -> Result<()> {
        let meta = &entry.meta;
        if meta.nlink > 1
            && let Some((first, left)) = self.links.get_mut(&entry.version)
        {
            let first = first.clone();
            *left -= 1;
            if *left == 0 {
                self.links.remove(&entry.version);
            }
            let extra = Extra::default();
            let form = Form { target: &first, ..Form::new(EntryType::Link, &extra) };
            return self.head(name, entry, form);
        }
        let is_written = match meta.kind {
            Kind::File => self.file(name, entry)?,
            Kind::Socket => {
                self.summary.sockets += 1;
                log::info!("{}: a socket is left out", Quoted(name));
                false
            }
            _ => self.special(name, entry)?,
        };
        if is_written && meta.nlink > 1 {
            self.links.insert(entry.version, (name.to_vec(), meta.nlink - 1));
        }
        Ok(())
    }

    /// A link, a pipe or a device; says whether it could be written.
    fn special(&mut self, name: &[u8], entry: &EntryRow) -> Result<bool> {
        let kind = match entry.meta.kind {
            Kind::Symlink => EntryType::Symlink,
            Kind::Fifo => EntryType::Fifo,
            Kind::CharDevice => EntryType::Char,
            _ => EntryType::Block,
        };
        let extra = match self.extra(entry) {
            Ok(extra) if kind == EntryType::Symlink && extra.target.is_none() => {
                Err(Error::corrupt("the link has no target"))
            }
            other => other,
        };
        match extra {
            Ok(extra) => {
                let target = extra.target.as_deref().unwrap_or_default();
                self.head(name, entry, Form { target, ..Form::new(kind, &extra) })?;
                Ok(true)
            }
            Err(e) => {
                self.problem(name, &e);
                Ok(false)
            }
        }
    }

    /// A regular file; says whether it could be written.
    fn file(&mut self, name: &[u8], entry: &EntryRow) -> Result<bool> {
        let map = match content_map(self.snapshots, entry) {
            Ok(map) => map,
            Err(e) => {
                self.problem(name, &e);
                return Ok(false);
            }
        };
        let is_sparse = map.has_holes();
        let segments = map.segments();
        let data_len: u64 = segments.iter().map(|it| it.1 - it.0).sum();
        let mut small = Vec::new();
        let is_small = data_len <= PIECE_BYTES as u64;
        if is_small && let Err(e) = copy_content(self.snapshots, &map, self.hash, false, &mut small)
        {
            self.problem(name, &e);
            return Ok(false);
        }
        let sparse = if is_sparse { sparse_map(&segments, map.size()) } else { Vec::new() };
        let size = sparse.len() as u64 + data_len;
        let form = Form::new(EntryType::Regular, &map.content.extra);
        self.head(name, entry, Form { size, is_sparse, ..form })?;
        self.out.write_all(&sparse).map_err(failed)?;
        match is_small {
            true => self.out.write_all(&small).map_err(failed)?,
            false => {
                let copied = copy_content(self.snapshots, &map, self.hash, false, self.out);
                copied.map_err(|e| {
                    let context = "the archive ends here, restore-folder gets the rest";
                    e.context(format!("{}: {context}", Quoted(name)))
                })?;
            }
        }
        self.out.write_all(padding(size)).map_err(failed)?;
        Ok(true)
    }

    fn head(&mut self, name: &[u8], entry: &EntryRow, form: Form<'_>) -> Result<()> {
        let meta = &entry.meta;
        learn_name(&mut self.users, self.snapshots, "user", meta.uid, self.run)?;
        learn_name(&mut self.groups, self.snapshots, "group", meta.gid, self.run)?;
        let none = Vec::new();
        let member = Member {
            name,
            kind: form.kind,
            target: form.target,
            meta,
            size: form.size,
            user: self.users.get(&meta.uid).unwrap_or(&none),
            group: self.groups.get(&meta.gid).unwrap_or(&none),
            xattrs: &form.extra.xattrs,
            is_sparse: form.is_sparse,
        };
        self.summary.entries += 1;
        member.write(self.out).map_err(failed)
    }

    fn extra(&self, entry: &EntryRow) -> Result<Extra> {
        Ok(self.snapshots.file(entry.version)?.content.extra.clone())
    }

    fn problem(&mut self, path: &[u8], error: &Error) {
        let problem = Problem::new(path, error);
        log::warn!("{problem}");
        self.summary.problem_count += 1;
        if self.summary.problems.len() < PROBLEMS_MAX {
            self.summary.problems.push(problem);
        }
    }
}

/// Finds the name of an owner's or group's number at a run, once.
fn learn_name(
    known: &mut HashMap<u32, Vec<u8>>,
    snapshots: &Snapshots,
    kind: &str,
    id: u32,
    run: &Run,
) -> Result<()> {
    if let Entry::Vacant(slot) = known.entry(id) {
        let name = snapshots.with_reader(|reader| reader.owner_name(kind, id, run.id))?;
        slot.insert(name.unwrap_or_default());
    }
    Ok(())
}
