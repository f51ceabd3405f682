//! Directories that are opened, listed and looked over before the scan comes to them.
//!
//! Looking at a name that is not in the kernel's cache waits for the disk, and a scan that looks at
//! one after another waits for each. So threads of their own go ahead into the directories that
//! come next. What the scanner gets is what it would have seen by itself a moment later; whatever
//! they have not done, it does itself. At most [`READY_DIRS_MAX`] directories are held ahead, each
//! with at most [`STATS_MAX`] metadata, so memory does not grow with the tree.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::sys::{self, Stat, at, c};

/// Directories that are ready and not yet wanted at most: each is held open.
const READY_DIRS_MAX: usize = 32;
/// Directories that wait to be listed at most: each may hold its parent open.
const WAITING_DIRS_MAX: usize = 64;
/// Names of a directory that are looked at ahead at most; the rest are looked at in their turn.
const STATS_MAX: usize = 4096;

/// A name in a directory, and what was seen of it if it was looked at.
pub struct Name {
    /// The name.
    pub name: OsString,
    /// Whether the listing says that it is a directory.
    pub is_dir: bool,
    /// Its metadata.
    pub stat: Option<Stat>,
}

/// A directory that has been opened and listed.
pub struct Listing {
    /// The directory.
    pub fd: Arc<OwnedFd>,
    /// Its own metadata.
    pub stat: Stat,
    /// What is in it, last name first; an error if it could not be listed.
    pub names: io::Result<Vec<Name>>,
}

impl Listing {
    /// Opens and lists `name` in `dir`; a directory that is not on `only_dev` counts as empty.
    pub fn open(dir: &OwnedFd, name: &OsStr, only_dev: Option<u64>) -> io::Result<Listing> {
        Listing::of(at::open_dir(dir, name)?, only_dev)
    }

    /// Lists a directory that is open.
    pub fn of(fd: OwnedFd, only_dev: Option<u64>) -> io::Result<Listing> {
        // The directory that was opened is the one that counts.
        let stat = sys::fstat(&fd)?;
        let names = match only_dev.is_none_or(|dev| dev == stat.dev) {
            true => list(&fd),
            false => Ok(Vec::new()),
        };
        Ok(Listing { stat, names, fd: Arc::new(fd) })
    }

    /// Looks at the names that come first.
    fn look(&mut self) {
        for it in self.names.iter_mut().flatten().rev().take(STATS_MAX) {
            // Whoever comes to it looks again, and tells of the error if it is still one.
            it.stat = at::stat(&self.fd, &it.name).ok();
        }
    }
}

fn list(fd: &OwnedFd) -> io::Result<Vec<Name>> {
    let mut reader = at::DirReader::new(at::open_dir_to_list(fd, OsStr::new("."))?)?;
    let mut names = Vec::new();
    while let Some(item) = reader.next_item() {
        let item = item?;
        if item.name != "." && item.name != ".." {
            let is_dir = item.kind == c::S_IFDIR;
            names.push(Name { name: item.name, is_dir, stat: None });
        }
    }
    names.sort_unstable_by(|a, b| b.name.as_bytes().cmp(a.name.as_bytes()));
    // A directory that changes while it is listed may give a name twice.
    names.dedup_by(|a, b| a.name == b.name);
    Ok(names)
}

enum Slot {
    Waiting { dir: Arc<OwnedFd>, name: OsString },
    Working,
    Ready(io::Result<Listing>),
}

#[derive(Default)]
struct State {
    /// By path below the source.
    slots: HashMap<Vec<u8>, Slot>,
    /// What waits, what is wanted soonest last. May name what has been taken meanwhile.
    order: Vec<Vec<u8>>,
    ready: usize,
    only_dev: Option<u64>,
    closed: bool,
}

/// What the scanner and the threads ahead of it share.
pub struct Ahead {
    is_on: bool,
    state: Mutex<State>,
    /// Something waits, or there is room for what is ready, or it is all over.
    more: Condvar,
    /// Something is ready.
    done: Condvar,
}

impl Ahead {
    /// For a scan with such threads, or without; then it does nothing.
    pub fn new(is_on: bool) -> Ahead {
        let (state, more, done) = Default::default();
        Ahead { is_on, state, more, done }
    }

    /// Leaves what is not on this device to the scanner.
    pub fn stay_on(&self, dev: u64) {
        self.state.lock().only_dev = Some(dev);
    }

    /// Has directories listed; `dirs` are path and name, the one that is wanted first comes first.
    pub fn want(&self, dir: &Arc<OwnedFd>, dirs: Vec<(Vec<u8>, OsString)>) {
        if !self.is_on || dirs.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        for (path, name) in dirs.into_iter().rev() {
            if state.order.len() >= WAITING_DIRS_MAX {
                // What is wanted last; the scanner will do it.
                let last = state.order.remove(0);
                if matches!(state.slots.get(&last), Some(Slot::Waiting { .. })) {
                    state.slots.remove(&last);
                }
            }
            state.slots.insert(path.clone(), Slot::Waiting { dir: dir.clone(), name });
            state.order.push(path);
        }
        drop(state);
        self.more.notify_all();
    }

    /// The directory at `path`, if it has been or is being listed. What went wrong ahead of its
    /// turn may go right in it.
    pub fn take(&self, path: &[u8]) -> Option<Listing> {
        let mut state = self.state.lock();
        loop {
            match state.slots.get(path)? {
                Slot::Working => self.done.wait(&mut state),
                Slot::Waiting { .. } => {
                    state.slots.remove(path);
                    return None;
                }
                Slot::Ready(_) => {
                    let Some(Slot::Ready(listing)) = state.slots.remove(path) else { return None };
                    state.ready -= 1;
                    let was_full = state.ready + 1 == READY_DIRS_MAX;
                    drop(state);
                    if was_full {
                        self.more.notify_one();
                    }
                    return listing.ok().filter(|it| it.names.is_ok());
                }
            }
        }
    }

    /// Lists until [`Ahead::close`] is called. Run by the threads ahead.
    pub fn work(&self) {
        let mut state = self.state.lock();
        loop {
            if state.closed {
                return;
            }
            let next = match state.ready < READY_DIRS_MAX {
                true => state.order.pop(),
                false => None,
            };
            let Some(path) = next else {
                self.more.wait(&mut state);
                continue;
            };
            let Some(slot) = state.slots.get_mut(&path) else { continue };
            if !matches!(slot, Slot::Waiting { .. }) {
                continue;
            }
            let Slot::Waiting { dir, name } = std::mem::replace(slot, Slot::Working) else {
                continue;
            };
            state.ready += 1;
            let only_dev = state.only_dev;
            drop(state);
            // Whatever happens here, the scanner must not wait for ever.
            let listing = std::panic::catch_unwind(|| {
                let mut listing = Listing::open(&dir, &name, only_dev)?;
                listing.look();
                Ok(listing)
            });
            let panicked = |_| Err(io::Error::other("a thread of the scan has panicked"));
            let listing = listing.unwrap_or_else(panicked);
            state = self.state.lock();
            state.slots.insert(path, Slot::Ready(listing));
            self.done.notify_all();
        }
    }

    /// Sends the threads home.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.more.notify_all();
    }
}
