//! x
#![allow(missing_docs)]
pub mod error;
pub mod progress;
pub mod sys;
pub mod wire;
pub mod chunk;
pub mod entry;
pub mod volume;
pub mod catalog;
pub mod backup;
pub mod snapshot;
pub mod restore;
pub mod job;
pub mod validate;
pub mod cli;
