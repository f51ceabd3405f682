//! Tests of the program as a whole.
//!
//! Invariant: they run it as a caller would, and share one stage for it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod forms;
mod scene;
mod start;
