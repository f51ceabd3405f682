//! The arguments of `genmeta`, on the command line and in control files.

use std::ffi::OsString;

use clap::{Args, Parser};

use super::refused;
use crate::error::Result;
use crate::genmeta::Options;

/// The arguments of `genmeta`.
#[derive(Args, Clone, Copy, Debug, Default)]
pub struct GenmetaArgs {
    /// Compare every meta and manifest with the catalog, not only what has changed or is missing
    #[arg(long)]
    all: bool,
}

#[derive(Parser)]
#[command(name = "genmeta", no_binary_name = true, disable_help_flag = true)]
struct GenmetaLine {
    #[command(flatten)]
    args: GenmetaArgs,
}

impl GenmetaArgs {
    /// What has to be done.
    pub fn options(&self) -> Options {
        Options { all: self.all }
    }
}

/// Reads the words of a line.
pub fn parse(words: Vec<OsString>) -> Result<Options> {
    Ok(GenmetaLine::try_parse_from(words).map_err(refused)?.args.options())
}
