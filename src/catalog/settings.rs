//! What is settled for a catalog when it is made.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension};

use super::sql;
use crate::chunk::HashAlgo;
use crate::chunk::frame::Compression;
use crate::chunk::split::Chunking;
use crate::error::{Error, Result};

/// Smallest and largest `--block-size`, in bytes.
const BLOCK_BYTES: std::ops::RangeInclusive<u64> = (1 << 20)..=(1 << 30);

/// The settings of a catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Names chunks, blocks and files.
    pub hash: HashAlgo,
    /// How content is split.
    pub chunking: Chunking,
    /// Whether and how hard frames are compressed.
    pub compression: Compression,
    /// Most stored bytes of a block.
    pub block_bytes: u64,
    /// Reserve of volumes that do not say otherwise, in percent.
    pub reserve_percent: u8,
    /// Volumes that each block is to be on.
    pub copies: u8,
}

/// Most copies of a block that can be asked for.
pub const COPIES_MAX: u8 = 16;

impl Settings {
    /// Checks that the parts fit together.
    pub fn check(&self) -> Result<()> {
        if !BLOCK_BYTES.contains(&self.block_bytes) {
            return Err(Error::usage("the block size must be 1 MiB to 1 GiB"));
        }
        if self.chunking.chunk_bytes_max() > self.block_bytes {
            let message = format!(
                "chunks of up to {} bytes do not fit a block of {}: choose a larger \
                 --block-size or a smaller --chunk-size",
                self.chunking.chunk_bytes_max(),
                self.block_bytes
            );
            return Err(Error::usage(message));
        }
        if self.reserve_percent > 99 {
            return Err(Error::usage("the reserve must be 0 to 99 percent"));
        }
        if !(1..=COPIES_MAX).contains(&self.copies) {
            return Err(Error::usage(format!("there can be 1 to {COPIES_MAX} copies")));
        }
        Ok(())
    }

    /// Writes the settings of a new catalog.
    pub fn write(&self, conn: &Connection) -> Result<()> {
        let put = |k: &str, v: String| {
            conn.execute("INSERT INTO settings (k, v) VALUES (?1, ?2)", (k, v)).map_err(sql)
        };
        put("hash_algo", self.hash.as_str().to_owned())?;
        put("chunking", self.chunking.as_str().to_owned())?;
        put("chunk_bytes", self.chunking.size().to_string())?;
        put("compression", self.compression.to_word())?;
        put("block_bytes", self.block_bytes.to_string())?;
        put("reserve_percent", self.reserve_percent.to_string())?;
        if self.copies != 1 {
            put("copies", self.copies.to_string())?;
        }
        put("catalog_id", uuid::Uuid::new_v4().to_string())?;
        Ok(())
    }

    /// Reads the settings of a catalog.
    pub fn read(conn: &Connection) -> Result<Settings> {
        let find = |k: &str| -> Result<Option<String>> {
            conn.query_row("SELECT v FROM settings WHERE k = ?1", [k], |row| row.get(0))
                .optional()
                .map_err(sql)
        };
        let get = |k: &str| -> Result<String> {
            find(k)?.ok_or_else(|| Error::corrupt(format!("catalog: setting {k} is missing")))
        };
        let number = |k: &str| -> Result<u64> {
            let text = get(k)?;
            text.parse().map_err(|_| Error::corrupt(format!("catalog: setting {k} is {text:?}")))
        };
        let bad = |e: Error| Error::corrupt(format!("catalog: {e}"));
        let settings = Settings {
            hash: get("hash_algo")?.parse().map_err(bad)?,
            chunking: Chunking::new(&get("chunking")?, number("chunk_bytes")?).map_err(bad)?,
            compression: get("compression")?.parse().map_err(bad)?,
            block_bytes: number("block_bytes")?,
            reserve_percent: u8::try_from(number("reserve_percent")?)
                .map_err(|_| Error::corrupt("catalog: reserve out of range"))?,
            // A catalog of before has none: one copy was all there was.
            copies: match find("copies")? {
                None => 1,
                Some(text) => text
                    .parse()
                    .map_err(|_| Error::corrupt(format!("catalog: setting copies is {text:?}")))?,
            },
        };
        settings.check().map_err(bad)?;
        Ok(settings)
    }
}

/// What the names of a catalog's files have after its own: database, lock, a copy under way, kept
/// jobs, health, what is on tapes, what a mount has to say, and what is being built.
const OWN_SUFFIXES: [&str; 10] = [
    "",
    ".lock",
    ".copy",
    ".new",
    ".jobs",
    ".health",
    ".tapes",
    ".mount.log",
    ".rebuilding",
    ".rebuilding-scratch",
];
/// What SQLite has beside each, and what is not complete yet.
const BESIDE_EACH: [&str; 6] = ["", "-wal", "-shm", "-journal", ".new", ".new-journal"];
/// What was put aside has a number of seconds after this.
const ASIDE: [&str; 3] = [".replaced-", ".jobs.damaged-", ".health.damaged-"];

/// The files that a catalog consists of, and those that the program leaves beside it, whether they
/// are there or not.
pub fn own_files(catalog: &Path) -> Vec<PathBuf> {
    let base = catalog.file_name().unwrap_or_default();
    let beside = |suffix: &str, more: &str| {
        let mut name = base.to_os_string();
        name.push(suffix);
        name.push(more);
        catalog.with_file_name(name)
    };
    let all = OWN_SUFFIXES.iter().flat_map(|it| BESIDE_EACH.iter().map(|more| beside(it, more)));
    let mut files: Vec<PathBuf> = all.collect();
    let dir = catalog.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let is_aside = |name: &OsStr| {
        let rest = name.as_bytes().strip_prefix(base.as_bytes());
        rest.and_then(|it| std::str::from_utf8(it).ok()).is_some_and(was_put_aside)
    };
    files.extend(entries.map(|it| it.file_name()).filter(|it| is_aside(it)).map(|it| dir.join(it)));
    files
}

/// Whether a name, after that of the catalog, is one that the program gives to what it puts aside.
fn was_put_aside(suffix: &str) -> bool {
    let Some(rest) = ASIDE.iter().find_map(|it| suffix.strip_prefix(it)) else { return false };
    let number = BESIDE_EACH.iter().find_map(|it| match it.is_empty() {
        true => None,
        false => rest.strip_suffix(it),
    });
    let mut parts = number.unwrap_or(rest).split('.');
    let is_number = |it: &str| !it.is_empty() && it.bytes().all(|it| it.is_ascii_digit());
    parts.next().is_some_and(is_number) && parts.next().is_none_or(is_number) && parts.count() == 0
}

/// The directory that holds what users put into the mount's `/ingest`: beside the catalog.
pub fn ingest_dir(catalog: &Path) -> PathBuf {
    let mut name = catalog.file_name().unwrap_or_default().to_os_string();
    name.push(".ingest");
    catalog.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_beside_a_catalog_is_known_and_nothing_else_is() {
        let own = ["c.replaced-1795359102", "c.replaced-1.2-wal", "c.jobs.damaged-7", "c.copy"];
        let own = own.into_iter().chain(["c.rebuilding-wal", "c.rebuilding-scratch-journal"]);
        let own = own.chain(["c.mount.log"]);
        let own = own.chain(["c", "c.new", "c-journal", "c.replaced-5-shm", "c.health.damaged-1"]);
        let others = ["c.replaced-", "c.replaced-by me", "c.replaced-1.2.3", "c.replaced-1.", "d"];
        let others = others.into_iter().chain(["d.replaced-1", "c.damaged-1", "c.txt", "ab"]);
        let dir = tempfile::tempdir().unwrap();
        for name in own.clone().chain(others.clone()) {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let known = own_files(&dir.path().join("c"));
        for name in own {
            assert!(known.contains(&dir.path().join(name)), "{name}");
        }
        for name in others {
            assert!(!known.contains(&dir.path().join(name)), "{name}");
        }
    }
}
