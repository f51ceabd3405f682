//! Tape: labels, archives, the spool of jobs and batches, and the drives that they are written to.
//!
//! A tape is a label, then one cpio archive a batch, each closed by a filemark. The spool says what
//! is to be written and what has been. Every format is in [`format`]; whatever comes from a tape
//! or from the spool is read within limits, and is an error when it is not as it should be.

pub mod cpio;
pub mod label;
pub mod spool;

#[doc = include_str!("FORMAT.md")]
pub mod format {}
