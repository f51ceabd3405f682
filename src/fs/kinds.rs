//! Which kinds of extended attributes no file of the store has.
//!
//! `ls -l` asks each file for a label and an ACL, and stops asking a device that says that it has
//! none at all; that is nine tenths of what a long listing costs. It is said only while it is true
//! of every finished run, as far as that was known a second ago.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::catalog::{AttributeKind, VersionId};
use crate::error::Result;
use crate::snapshot::Snapshots;

/// How old an answer of the catalog may be.
const HOLDS_FOR: Duration = Duration::from_secs(1);

/// What is known of each kind.
#[derive(Default)]
pub struct Kinds {
    acl: Mutex<Known>,
    label: Mutex<Known>,
}

#[derive(Clone, Copy, Default)]
struct Known {
    /// Whether some version may have it; then it stays so.
    is_used: bool,
    /// When the catalog said that none has it, and which version was the last then: versions are
    /// numbered upwards, and what it says of those that there are holds for ever.
    unused: Option<(Instant, VersionId)>,
}

impl Kinds {
    /// Whether no version has an attribute of this kind; `version` is one that is asked for.
    pub fn is_unused(
        &self,
        snapshots: &Snapshots,
        kind: AttributeKind,
        version: VersionId,
    ) -> Result<bool> {
        let known = *self.known(kind).lock();
        let holds =
            |(asked, last): (Instant, VersionId)| version <= last && asked.elapsed() < HOLDS_FOR;
        if known.is_used || known.unused.is_some_and(holds) {
            return Ok(!known.is_used);
        }
        let asked = Instant::now();
        // In this order: a run that ends in between makes the second answer too careful.
        let (last, is_used) =
            snapshots.with_reader(|reader| Ok((reader.last_version()?, reader.may_have(kind)?)))?;
        match is_used {
            true => self.found(kind),
            false => self.known(kind).lock().unused = Some((asked, last.max(version))),
        }
        Ok(!is_used)
    }

    /// Says that a version has an attribute of this kind.
    pub fn found(&self, kind: AttributeKind) {
        self.known(kind).lock().is_used = true;
    }

    fn known(&self, kind: AttributeKind) -> &Mutex<Known> {
        match kind {
            AttributeKind::Acl => &self.acl,
            AttributeKind::Label => &self.label,
        }
    }
}
