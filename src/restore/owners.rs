//! Whose restored things are: numbers of the snapshot's machine told by name to this one.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use parking_lot::Mutex;

use crate::catalog::RunId;
use crate::entry::Metadata;
use crate::error::Result;
use crate::snapshot::Snapshots;
use crate::sys::{Stat, c};

/// What becomes of owners and groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Owners {
    /// A name that this machine knows counts, whatever its number here; else the number.
    #[default]
    ByName,
    /// Numbers count as they are.
    ByNumber,
    /// Things belong to who restores.
    Leave,
}

/// Numbers here of numbers there.
pub struct OwnerMap<'a> {
    snapshots: &'a Snapshots,
    run: RunId,
    owners: Owners,
    /// By kind (whether it is a group) and number.
    known: Mutex<HashMap<(bool, u32), u32>>,
}

impl<'a> OwnerMap<'a> {
    pub fn new(snapshots: &'a Snapshots, run: RunId, owners: Owners) -> OwnerMap<'a> {
        OwnerMap { snapshots, run, owners, known: Mutex::default() }
    }

    /// The metadata that something gets which is `now` what it is.
    pub fn of(&self, meta: &Metadata, now: &Stat) -> Result<Metadata> {
        let mut meta = *meta;
        match self.owners {
            Owners::ByNumber => {}
            Owners::ByName => {
                meta.uid = self.number(false, meta.uid)?;
                meta.gid = self.number(true, meta.gid)?;
            }
            Owners::Leave => {
                // These bits are rights of an owner, and this may be another one.
                if (now.uid, now.gid) != (meta.uid, meta.gid) {
                    meta.mode &= !(c::S_ISUID | c::S_ISGID);
                }
                (meta.uid, meta.gid) = (now.uid, now.gid);
            }
        }
        Ok(meta)
    }

    fn number(&self, is_group: bool, id: u32) -> Result<u32> {
        if let Some(here) = self.known.lock().get(&(is_group, id)) {
            return Ok(*here);
        }
        let kind = if is_group { "group" } else { "user" };
        let name = self.snapshots.with_reader(|it| it.owner_name(kind, id, self.run))?;
        let here = name.and_then(|name| match is_group {
            true => uzers::get_group_by_name(OsStr::from_bytes(&name)).map(|it| it.gid()),
            false => uzers::get_user_by_name(OsStr::from_bytes(&name)).map(|it| it.uid()),
        });
        let here = here.unwrap_or(id);
        self.known.lock().insert((is_group, id), here);
        Ok(here)
    }
}
