//! The volume manifest: a small text file that says which volume a directory is.
//!
//! Format 1: lines `key=value`; `format`, `volume_id`, `status`, `reserve_percent` and `hash_algo`
//! are required, other keys are kept as they are. What the catalog says of the volume and of itself
//! is for who has lost it. Replaced as a whole, never edited in place.

use std::path::{Path, PathBuf};

use super::{Status, VolumeConfig};
use crate::chunk::HashAlgo;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{self, c, quoted};

const NAME: &str = ".rt_volume_manifest";
/// Largest manifest that is read, in bytes.
const BYTES_MAX: u64 = 64 << 10;
const FORMAT: &str = "1";

/// What a volume says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeManifest {
    /// The volume's own name.
    pub uuid: String,
    /// Whether it takes new blocks.
    pub status: Status,
    /// Part of its file system that is left free, in percent.
    pub reserve_percent: u8,
    /// The hash that names its blocks and chunks.
    pub hash: HashAlgo,
    /// What its catalog says; nothing where an earlier program wrote it.
    pub facts: Option<Facts>,
    /// Keys that this program does not know, kept as they are.
    pub other: Vec<(String, String)>,
}

/// What a catalog says of a volume, and of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The volume's number.
    pub number: i64,
    /// When it was made, in seconds since 1970.
    pub created: i64,
    /// The settings that a rebuilt catalog has to have too, sorted by their keys.
    pub settings: Vec<(String, String)>,
}

/// The key of a setting begins so.
const SETTING: &str = "setting.";

/// Where the manifest of the volume at `volume` lies.
pub fn path_in(volume: &Path) -> PathBuf {
    volume.join(NAME)
}

impl VolumeManifest {
    /// The manifest of a volume that the catalog describes so.
    pub fn of(config: &VolumeConfig, hash: HashAlgo) -> VolumeManifest {
        VolumeManifest {
            uuid: config.uuid.clone(),
            status: config.status,
            reserve_percent: config.reserve_percent,
            hash,
            facts: None,
            other: Vec::new(),
        }
    }

    /// The value of a key that this program does not know.
    pub fn other(&self, key: &str) -> Option<&str> {
        self.other.iter().find(|it| it.0 == key).map(|it| &*it.1)
    }

    /// Reads the manifest of the volume at `volume`; none there means that the volume is offline.
    pub fn read(volume: &Path) -> Result<VolumeManifest> {
        Self::read_at(&path_in(volume), volume)
    }

    fn read_at(path: &Path, volume: &Path) -> Result<VolumeManifest> {
        let read = || -> std::io::Result<String> {
            let len = std::fs::metadata(path)?.len();
            if len > BYTES_MAX {
                return Err(std::io::Error::other("larger than any volume manifest"));
            }
            std::fs::read_to_string(path)
        };
        let text = read().map_err(|e| match e.raw_os_error() {
            // That says nothing of the disk.
            Some(c::EMFILE | c::ENFILE) => Error::io(format!("opening {}", quoted(path)), e),
            _ => {
                let message = format!("no volume at {}", quoted(volume));
                Error::with_source(ErrorKind::Offline, message, e)
            }
        })?;
        Self::parse(&text).map_err(|e| e.context(quoted(path)))
    }

    /// Reads the text of a manifest.
    pub fn parse(text: &str) -> Result<VolumeManifest> {
        let pairs: Vec<(&str, &str)> = text.lines().filter_map(|it| it.split_once('=')).collect();
        let get = |key: &str| {
            let pair = pairs.iter().find(|it| it.0 == key);
            pair.map(|it| it.1).ok_or_else(|| Error::corrupt(format!("no line '{key}='")))
        };
        match get("format")? {
            FORMAT => {}
            other => {
                let message = format!("volume format {other:?} is not known to this program");
                return Err(Error::new(ErrorKind::Version, message));
            }
        }
        let reserve = get("reserve_percent")?.parse().ok().filter(|it| *it <= 100);
        let known =
            ["format", "volume_id", "status", "reserve_percent", "hash_algo", "number", "created"];
        let is_other = |key: &str| !known.contains(&key) && !key.starts_with(SETTING);
        let other = pairs.iter().filter(|it| is_other(it.0));
        let number = |key: &str, min: i64| {
            let text = get(key)?;
            let number = text.parse().ok().filter(|it| (min..1 << 48).contains(it));
            number.ok_or_else(|| Error::corrupt(format!("bad {key}")))
        };
        let facts = match get("number") {
            Err(_) => None,
            Ok(_) => {
                let mut settings: Vec<(String, String)> = pairs
                    .iter()
                    .filter_map(|it| {
                        Some((it.0.strip_prefix(SETTING)?.to_owned(), it.1.to_owned()))
                    })
                    .collect();
                settings.sort();
                let created = number("created", i64::MIN)?;
                Some(Facts { number: number("number", 1)?, created, settings })
            }
        };
        Ok(VolumeManifest {
            uuid: get("volume_id")?.to_owned(),
            status: get("status")?.parse()?,
            reserve_percent: reserve.ok_or_else(|| Error::corrupt("bad reserve_percent"))?,
            hash: get("hash_algo")?.parse()?,
            facts,
            other: other.map(|it| (it.0.to_owned(), it.1.to_owned())).collect(),
        })
    }

    /// The text of the manifest.
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "format={FORMAT}\nvolume_id={}\nstatus={}\nreserve_percent={}\nhash_algo={}\n",
            self.uuid,
            self.status.as_str(),
            self.reserve_percent,
            self.hash.as_str()
        );
        if let Some(Facts { number, created, settings }) = &self.facts {
            text.push_str(&format!("number={number}\ncreated={created}\n"));
            for (key, value) in settings {
                text.push_str(&format!("{SETTING}{key}={value}\n"));
            }
        }
        for (key, value) in &self.other {
            text.push_str(&format!("{key}={value}\n"));
        }
        text
    }

    /// Writes the manifest of what is to become a volume, under another name.
    pub fn prepare(&self, volume: &Path) -> Result<()> {
        sys::prepare_file(&path_in(volume), self.to_text().as_bytes())?;
        sys::sync_dir(volume)
    }

    /// The manifest that was prepared at `volume` and has not got its name; none where there is one
    /// that has.
    pub fn prepared(volume: &Path) -> Option<VolumeManifest> {
        let path = path_in(volume);
        let there = path.symlink_metadata();
        there.is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound).then_some(())?;
        Self::read_at(&sys::new_name(&path), volume).ok()
    }

    /// Gives a prepared manifest its name, which makes a volume of `volume`.
    pub fn settle(volume: &Path) -> Result<()> {
        let path = path_in(volume);
        sys::rename_durable(&sys::new_name(&path), &path)
    }

    /// Writes the manifest of the volume at `volume`.
    pub fn write(&self, volume: &Path) -> Result<()> {
        sys::replace_file(&path_in(volume), self.to_text().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_manifest_comes_back(
            uuid in "[ -~]{0,40}",
            sealed: bool,
            sha: bool,
            reserve_percent in 0u8..=100,
            other in prop::collection::vec(("[a-c]{6,9}", "[ -~]{0,20}"), 0..4),
            numbers in prop::option::of((1i64..9000, -9000i64..9000)),
            settings in prop::collection::btree_map("[a-c]{6,9}", "[ -~]{0,20}", 0..4),
        ) {
            let facts = numbers.map(|(number, created)| {
                let settings = settings.into_iter().collect();
                Facts { number, created, settings }
            });
            let status = if sealed { Status::Sealed } else { Status::Active };
            let hash = if sha { HashAlgo::Sha256 } else { HashAlgo::Blake3 };
            let manifest = VolumeManifest { uuid, status, reserve_percent, hash, facts, other };
            prop_assert_eq!(VolumeManifest::parse(&manifest.to_text())?, manifest);
        }

        #[test]
        fn any_text_is_read_or_refused(
            text: String,
            line in "(format|status|volume_id)=[1-9a-z]*",
        ) {
            let _ = VolumeManifest::parse(&text);
            let _ = VolumeManifest::parse(&format!("format=1\n{line}\n{text}"));
        }
    }

    #[test]
    fn every_status_has_its_word() {
        for status in [Status::Active, Status::Sealed, Status::Missing] {
            assert_eq!(status.as_str().parse::<Status>().unwrap(), status);
        }
        assert!("open".parse::<Status>().is_err());
    }

    #[test]
    fn manifests_come_back_with_keys_of_later_versions() {
        let manifest = VolumeManifest {
            uuid: "0d8a".to_owned(),
            status: Status::Sealed,
            reserve_percent: 7,
            hash: HashAlgo::Sha256,
            facts: None,
            other: vec![("colour".to_owned(), "blue=ish".to_owned())],
        };
        assert_eq!(VolumeManifest::parse(&manifest.to_text()).unwrap(), manifest);
    }

    #[test]
    fn what_is_not_format_1_is_refused() {
        let text = "format=2\nvolume_id=x\n";
        assert_eq!(VolumeManifest::parse(text).unwrap_err().kind(), ErrorKind::Version);
        assert_eq!(VolumeManifest::parse("").unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
