//! How far the metas of a volume are up to date: a note beside them, `meta/.complete`.
//!
//! It says of every block of the volume that its meta is there and says what was so after a run.
//! It is taken away, durably, before metas are written that a run may yet take back, and written
//! when they hold. So a note that is there is true; where none is, everything has to be looked at.
//! It goes with the directory that it speaks of.

use std::path::Path;

use super::Volume;
use crate::error::{Error, Result};
use crate::sys::{self, quoted};

/// Where it lies, relative to the volume.
const NAME: &str = "meta/.complete";
const DIR: &str = "meta";
const FORMAT: &str = "1";
/// Largest note that is read, in bytes.
const BYTES_MAX: u64 = 1000;

/// The run after which the metas of a volume were all up to date.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// Its number; 0 before any.
    pub run: i64,
    /// Its name, unlike any other run's.
    pub uuid: String,
}

impl Described {
    /// A volume that has no blocks yet lacks no metas.
    pub fn nothing() -> Described {
        Described { run: 0, uuid: String::new() }
    }

    /// Reads the note of the volume at `volume`; none if it cannot be read, or is none of ours.
    pub(super) fn read(volume: &Path) -> Option<Described> {
        let path = volume.join(NAME);
        let metadata = std::fs::symlink_metadata(&path).ok()?;
        if !metadata.is_file() || metadata.len() > BYTES_MAX {
            return None;
        }
        Self::parse(&std::fs::read_to_string(&path).ok()?)
    }

    fn parse(text: &str) -> Option<Described> {
        let get = |key: &str| {
            let mut pairs = text.lines().filter_map(|it| it.split_once('='));
            pairs.find(|it| it.0 == key).map(|it| it.1)
        };
        let run = get("run")?.parse().ok().filter(|it| *it >= 0)?;
        let described = Described { run, uuid: get("uuid")?.to_owned() };
        // Byte for byte as it was written: it has no check of its own, and costs little.
        (described.to_text() == text).then_some(described)
    }

    fn to_text(&self) -> String {
        let text = format!("format={FORMAT}\nrun={}\nuuid={}\n", self.run, self.uuid);
        format!("{text}check={:016x}\n", xxhash_rust::xxh3::xxh3_64(text.as_bytes()))
    }

    pub(super) fn write(&self, volume: &Path) -> Result<()> {
        sys::replace_file(&volume.join(NAME), self.to_text().as_bytes())
    }
}

impl Volume {
    /// Makes the names of the documents last that are there, and of the volume's own files.
    pub fn sync_folders(&self) -> Result<()> {
        for name in ["meta", "manifests", "catalog", "damaged"] {
            let path = self.config.path.join(name);
            if path.is_dir() {
                sys::sync_dir(&path)?;
            }
        }
        sys::sync_dir(&self.config.path)
    }

    /// How far its metas are up to date, as far as that is known.
    pub fn described(&self) -> Option<Described> {
        Described::read(&self.config.path)
    }

    /// Notes that all its metas are up to date after a run. Only for who holds the writer's lock.
    pub fn set_described(&self, described: &Described) -> Result<()> {
        match self.described().as_ref() == Some(described) {
            true => Ok(()),
            false => {
                self.make_folder(DIR)?;
                described.write(&self.config.path)
            }
        }
    }

    /// Takes the note away: metas that it does not speak of may be written when this returns.
    pub fn forget_described(&self) -> Result<()> {
        let path = self.config.path.join(NAME);
        match std::fs::remove_file(&path) {
            Ok(()) => sys::sync_dir(path.parent().unwrap_or(&path)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::io(format!("removing {}", quoted(&path)), e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_note_comes_back_and_no_other_does(
            run in 0i64..,
            uuid in "[0-9a-f-]{0,36}",
            at: prop::sample::Index,
            bit in 0u8..7,
        ) {
            let note = Described { run, uuid };
            let text = note.to_text();
            prop_assert_eq!(Described::parse(&text), Some(note));
            let mut bytes = text.into_bytes();
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(Described::parse(&String::from_utf8(bytes).unwrap()), None);
        }

        #[test]
        fn any_text_is_read_or_not(text: String) {
            let _ = Described::parse(&text);
        }
    }

    #[test]
    fn what_is_no_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("meta")).unwrap();
        assert_eq!(Described::read(dir.path()), None);
        Described::nothing().write(dir.path()).unwrap();
        assert_eq!(Described::read(dir.path()), Some(Described::nothing()));
        std::fs::remove_file(dir.path().join(NAME)).unwrap();
        std::os::unix::fs::symlink("/dev/zero", dir.path().join(NAME)).unwrap();
        assert_eq!(Described::read(dir.path()), None);
    }
}
