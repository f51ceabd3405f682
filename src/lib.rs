//! RaidTape: deduplicating backup with every run browsable as an ordinary tree.
//!
//! The rooms, in order; a room uses only rooms listed before it, and `tests/tidy.rs` sees to that.
//!
//! ```text
//! write    scan ─▶ backup ─▶ chunk ─▶ volume ══ Stored ══▶ catalog
//! read     catalog + volume ─▶ snapshot ─▶ restore, dump, fs ─▶ kernel
//! ask      command line, control files ─▶ job ─▶ backup, restore, validate, genmeta
//! lost     volume ─▶ rebuild ─▶ catalog
//! ```
//!
//! Write order, from which everything else follows: a block's bytes are synced, then it gets its
//! name, then its directories are synced, then its record is in the volume's index and synced; only
//! then a [`volume::Stored`] value exists. Metas and the run's manifest follow, and last the
//! catalog's transaction commits: the run exists. Reading goes the other way.

pub mod error;
pub mod progress;
pub mod sys;
pub mod wire;
pub mod chunk;
pub mod entry;
pub mod volume;
pub mod catalog;
pub mod snapshot;
pub mod backup;
pub mod restore;
pub mod dump;
pub mod genmeta;
pub mod copies;
pub mod validate;
pub mod repair;
pub mod rebuild;
pub mod tape;
pub mod job;
pub mod fs;
pub mod cli;
