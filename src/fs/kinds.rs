//! Which kinds of extended attributes no file of the store has.
//!
//! `ls -l` asks each file for a label and an ACL, and stops asking a device that says that it has
//! none at all; that is nine tenths of what a long listing costs. It is said only while it is true
//! of every finished run. Versions are numbered upwards, so what was found true holds for all
//! versions that there were then.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use crate::catalog::{AttributeKind, VersionId};
use crate::error::Result;
use crate::snapshot::Snapshots;

/// What is known of each kind.
#[derive(Debug, Default)]
pub struct Kinds {
    acl: Known,
    label: Known,
}

#[derive(Debug, Default)]
struct Known {
    /// Whether some version may have it; then it stays so.
    used: AtomicBool,
    /// None before this version has it.
    unused_before: AtomicI64,
}

impl Kinds {
    /// Whether no version has an attribute of this kind; `version` is one that is asked for.
    pub fn is_unused(
        &self,
        snapshots: &Snapshots,
        kind: AttributeKind,
        version: VersionId,
    ) -> Result<bool> {
        let known = self.known(kind);
        if known.used.load(Ordering::Relaxed) {
            return Ok(false);
        }
        if version < known.unused_before.load(Ordering::Relaxed) {
            return Ok(true);
        }
        // In this order: a run that ends in between makes the second answer too careful.
        let (last, used) =
            snapshots.with_reader(|reader| Ok((reader.last_version()?, reader.may_have(kind)?)))?;
        match used {
            true => known.used.store(true, Ordering::Relaxed),
            false => {
                let next = last.max(version).saturating_add(1);
                known.unused_before.fetch_max(next, Ordering::Relaxed);
            }
        }
        Ok(!used)
    }

    /// Says that a version has an attribute of this kind.
    pub fn found(&self, kind: AttributeKind) {
        self.known(kind).used.store(true, Ordering::Relaxed);
    }

    fn known(&self, kind: AttributeKind) -> &Known {
        match kind {
            AttributeKind::Acl => &self.acl,
            AttributeKind::Label => &self.label,
        }
    }
}
