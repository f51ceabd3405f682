//! The mount table of this process, out of /proc/self/mountinfo.
//!
//! Invariant: paths are the bytes the kernel means, with its octal escapes undone; a line that
//! does not follow the format is left out instead of being guessed at.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::failure::Failure;
use crate::shown::shown;

/// The type under which the kernel lists a mount of ours.
const OUR_TYPE: &str = "fuse.raidtape";

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    pub id: u64,
    /// The mount around it.
    pub parent: u64,
    /// What part of the file system is mounted; `/` unless this is a bind mount.
    pub root: PathBuf,
    pub point: PathBuf,
    /// What the kernel allows on it: `rw,nosuid,...`.
    pub options: OsString,
    pub kind: OsString,
    pub source: OsString,
}

impl Mount {
    pub fn is_ours(&self) -> bool {
        self.kind == OUR_TYPE
    }

    pub fn is_read_only(&self) -> bool {
        self.options.as_encoded_bytes().split(|byte| *byte == b',').any(|word| word == b"ro")
    }

    /// A catalog may be mounted in parts: the snapshots by a mount of their own on a directory of
    /// the other. Whatever else lies below is a mount by itself.
    fn is_part_of(&self, outer: &Mount) -> bool {
        self.is_ours()
            && outer.is_ours()
            && self.parent == outer.id
            && self.source == outer.source
            && self.point == outer.point.join("snapshots")
    }
}

/// All mounts, in the order of the kernel: a later one covers an earlier one at the same place.
#[derive(Debug, Default)]
pub struct MountTable(Vec<Mount>);

impl MountTable {
    pub fn current() -> Result<Self, Failure> {
        match fs::read("/proc/self/mountinfo") {
            Ok(text) => Ok(Self::parse(&text)),
            Err(error) => Err(Failure::system(format!(
                "cannot read /proc/self/mountinfo: {error}; is /proc mounted?"
            ))),
        }
    }

    pub fn parse(text: &[u8]) -> Self {
        Self(text.split(|byte| *byte == b'\n').filter_map(parse_line).collect())
    }

    /// The mount one meets at this path.
    pub fn top(&self, point: &Path) -> Option<&Mount> {
        self.0.iter().rev().find(|mount| mount.point == point)
    }

    /// Every whole mount of ours; a bind mount of some directory in it has no control files, and
    /// neither has what is only a part of another mount.
    pub fn ours(&self) -> impl Iterator<Item = &Mount> {
        let is_whole = |mount: &&Mount| mount.is_ours() && mount.root == Path::new("/");
        self.0.iter().filter(is_whole).filter(|mount| !self.is_part(mount))
    }

    fn is_part(&self, mount: &Mount) -> bool {
        self.0.iter().any(|outer| mount.is_part_of(outer))
    }

    /// A mount and its parts, in the order of the kernel; none once it is gone.
    pub fn with_parts(&self, mount: &Mount) -> Vec<&Mount> {
        let from = self.0.iter().skip_while(|it| *it != mount);
        from.filter(|it| *it == mount || it.is_part_of(mount)).collect()
    }

    /// True while this very mount is there, and not just another one at the same place.
    pub fn has(&self, wanted: &Mount) -> bool {
        self.0.contains(wanted)
    }

    /// Makes a path absolute without looking up its last component if something is mounted there:
    /// a dead mount answers with an error to that, and one which hangs does not answer at all.
    pub fn resolve(&self, given: &Path) -> Result<PathBuf, Failure> {
        if let (Some(parent), Some(name)) = (given.parent(), given.file_name()) {
            let parent = match parent.as_os_str().is_empty() {
                true => Path::new("."),
                false => parent,
            };
            let candidate = fs::canonicalize(parent)
                .map_err(|error| Failure::on_path("resolve", given, &error))?
                .join(name);
            if self.top(&candidate).is_some() {
                return Ok(candidate);
            }
        }
        fs::canonicalize(given).map_err(|error| Failure::on_path("resolve", given, &error))
    }

    /// The mount of ours at a path, or an error that says what is there instead.
    pub fn ours_at(&self, point: &Path) -> Result<&Mount, Failure> {
        match self.top(point) {
            Some(mount) if mount.is_ours() => Ok(mount),
            Some(mount) => Err(Failure::failed(format!(
                "{} is a mount of type {}, not of raidtape",
                shown(point),
                shown(&mount.kind)
            ))),
            None => Err(Failure::failed(format!("{} is not mounted", shown(point)))),
        }
    }
}

/// `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG...] - TYPE SOURCE SUPER-OPTIONS`
fn parse_line(line: &[u8]) -> Option<Mount> {
    // Splitting at every single blank keeps an empty source an empty field.
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let parent = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let root = unescape(fields.nth(1)?);
    let point = unescape(fields.next()?);
    // The number of tags is open; the dash ends them.
    let options = OsString::from_vec(fields.next()?.to_vec());
    fields.find(|field| *field == b"-")?;
    let kind = unescape(fields.next()?);
    let source = unescape(fields.next()?);
    Some(Mount { id, parent, root: root.into(), point: point.into(), options, kind, source })
}

fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        match octal(rest) {
            Some((byte, after)) => {
                bytes.push(byte);
                rest = after;
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

/// A backslash with three octal digits at the start, and what follows it.
fn octal(text: &[u8]) -> Option<(u8, &[u8])> {
    let (digits, after) = text.strip_prefix(b"\\")?.split_first_chunk::<3>()?;
    let mut value: u32 = 0;
    for digit in digits {
        value = value * 8 + char::from(*digit).to_digit(8)?;
    }
    Some((u8::try_from(value).ok()?, after))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    use super::*;

    const TABLE: &[u8] = b"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw\n\
        40 22 0:50 / /mnt/a\\040b rw,nosuid shared:2 master:1 - fuse.raidtape /c\\011at\\134 rw\n\
        41 22 0:51 / /mnt/plain rw - fuse.raidtape  rw\n\
        42 41 0:52 / /mnt/plain rw - tmpfs none rw\n\
        43 22 0:50 /sub /mnt/bind rw - fuse.raidtape /c rw\n\
        44 22 0:53 / /mnt/\xff\\999 rw - fuse.raidtape /c rw\n\
        45 22 0:54 / /mnt/noend rw shared:1 fuse.raidtape /c rw\n\
        x 22 0:55 / /mnt/noid rw - fuse.raidtape /c rw\n\
        \n";

    #[test]
    fn escapes_are_undone() {
        let table = MountTable::parse(TABLE);
        let mount = table.top(Path::new("/mnt/a b")).unwrap();
        assert!(mount.is_ours());
        assert_eq!(mount.id, 40);
        assert_eq!(mount.source, "/c\tat\\");
    }

    #[test]
    fn bytes_that_are_no_text_and_no_escape_stay() {
        let table = MountTable::parse(TABLE);
        let point = Path::new(OsStr::from_bytes(b"/mnt/\xff\\999"));
        assert_eq!(table.top(point).unwrap().id, 44);
        assert_eq!(unescape(b"\\777\\04"), "\\777\\04");
    }

    #[test]
    fn the_upper_mount_covers_the_lower() {
        let table = MountTable::parse(TABLE);
        assert_eq!(table.top(Path::new("/mnt/plain")).unwrap().id, 42);
        let failure = table.ours_at(Path::new("/mnt/plain")).unwrap_err();
        assert!(failure.message.contains("tmpfs"), "{failure:?}");
    }

    #[test]
    fn only_whole_mounts_of_ours_are_listed() {
        let table = MountTable::parse(TABLE);
        let ids: Vec<u64> = table.ours().map(|mount| mount.id).collect();
        assert_eq!(ids, [40, 41, 44]);
        assert_eq!(table.ours().nth(1).unwrap().source, "");
    }

    #[test]
    fn a_part_is_listed_with_its_mount_and_not_by_itself() {
        // Another catalog was there before, and the same one is mounted elsewhere in itself.
        let table = MountTable::parse(
            b"38 22 0:48 / /m/snapshots rw - fuse.raidtape /other rw\n\
              39 22 0:49 / /m/x rw - fuse.raidtape /c rw\n\
              40 22 0:50 / /m rw - fuse.raidtape /c rw\n\
              41 40 0:51 / /m/snapshots ro,nodev - fuse.raidtape /c ro\n\
              42 40 0:52 / /m/ingest/t rw - tmpfs none rw\n\
              43 40 0:53 / /m/ingest/o rw - fuse.raidtape /other rw\n\
              44 40 0:54 / /m/ingest/c rw - fuse.raidtape /c rw\n",
        );
        let ids = |mounts: Vec<&Mount>| mounts.iter().map(|it| it.id).collect::<Vec<_>>();
        assert_eq!(ids(table.ours().collect()), [38, 39, 40, 43, 44]);
        let mount = table.top(Path::new("/m")).unwrap();
        assert_eq!(ids(table.with_parts(mount)), [40, 41]);
        assert!(!mount.is_read_only());
        assert!(table.top(Path::new("/m/snapshots")).unwrap().is_read_only());
        let gone = Mount { id: 9, ..mount.clone() };
        assert!(table.with_parts(&gone).is_empty());
    }

    #[test]
    fn broken_lines_are_left_out() {
        let table = MountTable::parse(TABLE);
        assert!(table.top(Path::new("/mnt/noend")).is_none());
        assert!(table.top(Path::new("/mnt/noid")).is_none());
        assert!(table.ours_at(Path::new("/mnt/noid")).is_err());
    }

    #[test]
    fn a_mount_is_gone_when_another_took_its_place() {
        let table = MountTable::parse(TABLE);
        let mut old = table.top(Path::new("/mnt/plain")).unwrap().clone();
        assert!(table.has(&old));
        old.id = 99;
        assert!(!table.has(&old));
    }

    #[test]
    fn resolving_does_not_look_up_a_mounted_component() {
        let directory = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(directory.path()).unwrap();
        symlink(&base, base.join("link")).unwrap();
        // Nothing exists at this name, so only the table can make the resolving succeed.
        let gone = base.join("gone");
        let line = format!("40 22 0:50 / {} rw - fuse.raidtape /c rw\n", gone.display());
        let table = MountTable::parse(line.as_bytes());
        assert_eq!(table.resolve(&base.join("link/gone/")).unwrap(), gone);
        assert_eq!(table.resolve(&base.join("link")).unwrap(), base);
        assert!(table.resolve(&base.join("absent")).is_err());
    }
}
