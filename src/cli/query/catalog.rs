//! `dump-catalog`: everything that a catalog knows, on standard output.

use std::path::Path;

use crate::catalog::Reader;
use crate::cli::{exit, show};
use crate::error::Result;

/// Two catalogs that know the same give the same lines: so what was known before a loss is compared
/// with what is known after a rebuild. A dump without its last line, "op":"end", is not whole.
#[derive(clap::Args)]
pub struct DumpCatalog {}

pub fn dump_catalog(catalog: &Path) -> Result<u8> {
    let mut out = show::Out::new();
    Reader::open(catalog)?.write_logical_dump(&mut out)?;
    out.finish()?;
    Ok(exit::DONE)
}
