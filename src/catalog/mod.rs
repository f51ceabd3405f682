#![doc = include_str!("FORMAT.md")]

mod beside;
mod brief;
pub mod chain;
mod changes;
mod check;
mod check_entries;
mod check_index;
mod check_rows;
mod contents;
mod copies;
pub mod copy;
mod coverage;
mod diff;
mod due;
pub mod extent;
mod find;
pub mod health;
pub mod history;
pub mod jobs;
mod json;
pub mod line;
mod listing;
mod logical;
mod lost;
pub mod manifest;
pub mod meta;
mod number_set;
pub mod meta_read;
mod numbers;
mod read;
pub mod register;
mod remake;
pub mod replay;
mod rows;
mod run;
mod schema;
mod settings;
mod stats;
pub mod tapes;
#[cfg(test)]
mod tests;
pub mod told;
mod write;

pub use brief::AttributeKind;
pub use changes::{Change, ChangeKind};
pub use check::{Damage, DamagedFile};
pub use check_index::add_chunks;
pub use check_rows::{Checking, Needed};
pub use coverage::{Amount, BadCopies, Coverage, Loss, RunBlocks};
pub use diff::{DiffKind, Difference};
pub use extent::{Content, Extent};
pub use find::{Conditions, Hit, Pattern};
pub use health::Health;
pub use listing::Listing;
pub use lost::finished_on;
pub use manifest::Spool;
pub use number_set::NumberSet;
pub use read::{BlockRow, EntryRow, Reader, Totals, WholeRuns};
pub use run::{COMMENT_BYTES_MAX, Counts, DirId, Run, RunId, Tally, VersionId};
pub use schema::full_disk;
pub use settings::{COPIES_MAX, Settings, ingest_dir, own_files};
pub use stats::Stats;
pub use tapes::Tapes;
pub use write::{NewEntry, RunWriter, WriteLock, Writer};

use crate::error::{Error, ErrorKind};

/// `last_run` of an entry that lives.
pub(crate) const OPEN: i64 = i64::MAX;

/// What a SQLite error means to us.
fn sql(error: rusqlite::Error) -> Error {
    use rusqlite::ErrorCode;
    let kind = match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => ErrorKind::NoSpace,
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => ErrorKind::Locked,
        Some(
            ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase | ErrorCode::ConstraintViolation,
        ) => ErrorKind::Corrupt,
        Some(ErrorCode::PermissionDenied | ErrorCode::ReadOnly) => ErrorKind::Denied,
        _ => ErrorKind::Io,
    };
    let kind = match &error {
        rusqlite::Error::InvalidColumnType(..)
        | rusqlite::Error::FromSqlConversionFailure(..)
        | rusqlite::Error::Utf8Error(..)
        | rusqlite::Error::IntegralValueOutOfRange(..)
        // Who asks for a row that may be missing says so.
        | rusqlite::Error::QueryReturnedNoRows => ErrorKind::Corrupt,
        _ => kind,
    };
    Error::with_source(kind, "catalog", error)
}
