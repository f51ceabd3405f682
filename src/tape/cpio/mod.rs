//! Archives: cpio, as GNU cpio, bsdcpio and afio read and write it.
//!
//! What is written is odc (magic 070707), and afio's large header (070727) only for what odc cannot
//! say and no substitute could; every change that had to be made to a member's metadata is told.
//! Positions are byte offsets from the beginning of the archive and are exact: reading can begin at
//! any member.

mod header;
mod read;
#[cfg(test)]
mod tests;
mod write;

pub use header::{Format, Header};
pub use read::{Member, Reader};
pub use write::{Added, Archive, Note};

/// The name of the member that ends every archive.
pub const TRAILER: &[u8] = b"TRAILER!!!";
/// Longest name of a member, in bytes, the NUL at its end included.
pub const NAME_BYTES_MAX: usize = 65_535;
