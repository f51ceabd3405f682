//! x
use std::path::Path;
use super::args;
use crate::error::Result;
pub fn mount(_c: &Path, _a: &args::Mount) -> Result<u8> { Ok(1) }
pub fn umount(_a: &args::Umount) -> Result<u8> { Ok(1) }
