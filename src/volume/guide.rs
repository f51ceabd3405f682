//! How to get files back without this program: a text and a script, on every volume.
//!
//! They are written when a volume is made and kept up to date by whoever writes to it. A newer
//! program's are left alone: it may have changed the formats that they explain.

use std::io::Read;
use std::path::Path;

use crate::error::Result;
use crate::sys;

/// The files, by name.
const FILES: [(&str, &[u8]); 2] =
    [("RESTORE.txt", include_bytes!("RESTORE.txt")), ("restore.sh", include_bytes!("restore.sh"))];

/// Longest file that is read to compare it, in bytes.
const BYTES_MAX: u64 = 1 << 20;
/// The version is said so early.
const HEAD_BYTES: usize = 200;

/// Makes the files in the volume at `volume` that are missing, damaged or older, each replaced as a
/// whole. Costs two reads if there is nothing to do.
pub fn refresh(volume: &Path) -> Result<()> {
    for (name, content) in FILES {
        let path = volume.join(name);
        if !is_current(&path, content) {
            sys::replace_file(&path, content)?;
        }
    }
    Ok(())
}

/// The names of the files that [`refresh`] would make, and whether each is damaged: of this
/// version, and not what this version has written.
pub fn faults(volume: &Path) -> Vec<(&'static str, bool)> {
    let mut found = Vec::new();
    for (name, content) in FILES {
        let path = volume.join(name);
        if !is_current(&path, content) {
            let version = read(&path).and_then(|it| version_of(&it));
            found.push((name, version.is_some() && version == version_of(content)));
        }
    }
    found
}

/// Whether a file is this program's, or a newer one's.
fn is_current(path: &Path, content: &[u8]) -> bool {
    let there = read(path);
    let is_newer = |it: &Vec<u8>| version_of(it) > version_of(content);
    there.as_deref() == Some(content) || there.is_some_and(|it| is_newer(&it))
}

/// A file's content, if there is a file that can be read.
fn read(path: &Path) -> Option<Vec<u8>> {
    // Whatever else is there could keep its reader waiting.
    std::fs::symlink_metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    let file = sys::private_file().read(true).open(path).ok()?;
    let mut content = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut content).ok()?;
    Some(content)
}

/// The number that follows the first `version` of a file's head.
fn version_of(content: &[u8]) -> Option<u32> {
    let head = content.get(..HEAD_BYTES).unwrap_or(content);
    let head = String::from_utf8_lossy(head);
    let (_, after) = head.split_once(" version ")?;
    let digits = after.split(|it: char| !it.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn what_is_older_is_replaced_and_what_is_newer_stays() {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in FILES {
            assert!(version_of(content).is_some(), "{name} does not say its version");
            let path = dir.path().join(name);
            let is_ours = || fs::read(&path).unwrap() == content;
            refresh(dir.path()).unwrap();
            assert!(is_ours());
            let number = |it: &Path| fs::metadata(it).unwrap().ino();
            let before = number(&path);
            refresh(dir.path()).unwrap();
            assert_eq!(number(&path), before, "{name} was written for nothing");

            let text = String::from_utf8(content.to_vec()).unwrap();
            let newer = text.replacen(" version ", " version 9", 1);
            fs::write(&path, &newer).unwrap();
            refresh(dir.path()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), newer);

            let older = text.replacen(" version ", " version 0.", 1);
            for other in [&older[..], &text[..300], "", "an earlier version of this had no number"]
            {
                fs::write(&path, other).unwrap();
                refresh(dir.path()).unwrap();
                assert!(is_ours(), "{name} after {other:?}");
            }
            fs::remove_file(&path).unwrap();
            std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
            refresh(dir.path()).unwrap();
            assert!(is_ours() && !path.is_symlink());
        }
    }
}
