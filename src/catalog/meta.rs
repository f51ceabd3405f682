//! Metas: one JSON document a block, for people and for rebuilding, beside the blocks.
//!
//! The format is in FORMAT.md. Written as a stream, because a block may be used by any number of
//! files.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

use rusqlite::Connection;

use super::extent::{self, Extent};
use super::json::Object;
use super::read::{ENTRY_COLUMNS, EntryRow, entry_from};
use super::run::{DirId, VersionId};
use super::write::RunWriter;
use super::{OPEN, manifest, sql};
use crate::chunk::{Digest, HashAlgo};
use crate::entry::{Kind, join};
use crate::error::{Error, Result};
use crate::volume::{BlockId, BlockIndex};

/// Version of the meta format. Version 1 was the same text, not compressed.
const VERSION: u32 = 2;

/// Paths of directories that are remembered while metas are written.
const PATHS_MAX: usize = 10_000;

/// Name of a block's meta, relative to the volume.
pub fn document_name(block: &BlockId) -> String {
    format!("meta/{block}.meta.json.zst")
}

/// Name that a block's meta had while metas were not compressed (format 1); what replaces it
/// removes it.
pub fn former_name(block: &BlockId) -> String {
    format!("meta/{block}.meta.json")
}

/// A block whose meta has to be written: its number, a volume that holds it, and where its record
/// is in that volume's index.
#[derive(Clone, Copy, Debug)]
pub struct Due {
    /// The block's number.
    pub block: u64,
    /// Number of the volume.
    pub volume: i64,
    /// Where the record begins, in bytes.
    pub record_at: u64,
}

/// Source and path of directories.
#[derive(Default)]
pub struct DirNames(BTreeMap<DirId, (Vec<u8>, Vec<u8>)>);

impl RunWriter<'_> {
    /// The blocks whose metas this run makes out of date: those that its new versions use. Fails if
    /// one of them is not stored.
    pub fn metas_due(&self, first_version: VersionId) -> Result<Vec<Due>> {
        let mut blocks = BTreeSet::new();
        let query = "SELECT extents FROM versions WHERE version >= ?1 AND extents IS NOT NULL";
        let mut statement = self.conn().prepare(query).map_err(sql)?;
        let mut rows = statement.query([first_version]).map_err(sql)?;
        while let Some(row) = rows.next().map_err(sql)? {
            let extents: Vec<u8> = row.get(0).map_err(sql)?;
            for extent in extent::decode(&extents)? {
                if let Extent::Data { block, .. } = extent {
                    blocks.insert(block);
                }
            }
        }
        let query = "SELECT volume, record_at FROM block_copies WHERE block = ?1";
        let mut statement = self.conn().prepare(query).map_err(sql)?;
        let mut due = Vec::new();
        for block in blocks {
            let rows = statement
                .query_map([block], |row| {
                    Ok(Due { block, volume: row.get(0)?, record_at: row.get(1)? })
                })
                .map_err(sql)?;
            let before = due.len();
            for row in rows {
                due.push(row.map_err(sql)?);
            }
            if due.len() == before {
                // Never by way of `Stored`; looked at once more before the run becomes visible.
                let message = format!("a version of this run names block {block}, not stored");
                return Err(Error::corrupt(message));
            }
        }
        Ok(due)
    }

    /// Writes the meta of a block.
    pub fn write_meta(
        &self,
        index: &BlockIndex,
        hash: HashAlgo,
        names: &mut DirNames,
        out: &mut dyn Write,
    ) -> Result<()> {
        write_meta(self.conn(), index, hash, names, out)
    }
}

/// Writes a manifest of what is in a spool.
pub(super) fn write_manifest(
    conn: &Connection,
    spool: &mut manifest::Spool,
    (header, end): (&manifest::Header<'_>, &manifest::End<'_>),
    out: &mut dyn Write,
) -> Result<Digest> {
    let mut names: BTreeMap<u64, BlockId> = BTreeMap::new();
    let mut block_name = |number: u64| -> Result<BlockId> {
        if let Some(name) = names.get(&number) {
            return Ok(*name);
        }
        let query = "SELECT id FROM blocks WHERE number = ?1";
        let mut statement = conn.prepare_cached(query).map_err(sql)?;
        let id: Vec<u8> = statement.query_row([number], |row| row.get(0)).map_err(sql)?;
        let name = Digest::from_slice(&id)?;
        if names.len() >= PATHS_MAX {
            names.clear();
        }
        names.insert(number, name);
        Ok(name)
    };
    spool.write_manifest(header, end, &mut block_name, out)
}

/// Writes the meta of a block, compressed.
pub(super) fn write_meta(
    conn: &Connection,
    index: &BlockIndex,
    hash: HashAlgo,
    names: &mut DirNames,
    out: &mut dyn Write,
) -> Result<()> {
    let failed = |e| Error::io("writing a meta", e);
    let mut out = manifest::compressed(out).map_err(failed)?;
    write_meta_text(conn, index, hash, names, &mut out)?;
    out.finish().map_err(failed)?.flush().map_err(failed)
}

/// How a block's meta begins: all that it says of the block itself.
pub fn head_text(index: &BlockIndex, hash: HashAlgo) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    write_head(index, hash, &mut text).map_err(|e| Error::io("writing a meta", e))?;
    Ok(text)
}

/// The text of a block's meta.
pub(super) fn write_meta_text(
    conn: &Connection,
    index: &BlockIndex,
    hash: HashAlgo,
    names: &mut DirNames,
    out: &mut dyn Write,
) -> Result<()> {
    let failed = |e| Error::io("writing a meta", e);
    write_head(index, hash, out).map_err(failed)?;
    // A block that was lost and stored again has two numbers and one name.
    let query = "SELECT u.version, v.extents, v.hash, u.block FROM uses u \
                 JOIN versions v ON v.version = u.version \
                 WHERE u.block IN (SELECT number FROM blocks WHERE id = ?1)";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    let mut rows = statement.query([&index.id.0[..]]).map_err(sql)?;
    let (mut separator, mut text) = (&b"\n"[..], Vec::new());
    while let Some(row) = rows.next().map_err(sql)? {
        let version: VersionId = row.get(0).map_err(sql)?;
        let extents: Vec<u8> = row.get(1).map_err(sql)?;
        let file_hash: Vec<u8> = row.get(2).map_err(sql)?;
        let number: u64 = row.get(3).map_err(sql)?;
        let file_hash = Digest::from_slice(&file_hash)?;
        let pieces = pieces_in(&extent::decode(&extents)?, number);
        each_name(conn, version, &mut |entry| {
            let (source, dir) = dir_name(conn, entry.dir, names)?;
            let path = join(dir, &entry.name);
            text.clear();
            for piece in &pieces {
                text.extend_from_slice(separator);
                separator = b",\n";
                put_mapping(&mut text, (source, &path), &entry, piece, &file_hash);
            }
            out.write_all(&text).map_err(failed)
        })?;
    }
    out.write_all(b"\n]\n}\n").map_err(failed)
}

fn each_name(
    conn: &Connection,
    version: VersionId,
    each: &mut dyn FnMut(EntryRow) -> Result<()>,
) -> Result<()> {
    let query = format!("SELECT {ENTRY_COLUMNS} FROM entries WHERE version = ?1");
    let mut statement = conn.prepare_cached(&query).map_err(sql)?;
    let mut rows = statement.query([version]).map_err(sql)?;
    while let Some(row) = rows.next().map_err(sql)? {
        let entry = entry_from(row)?;
        if entry.meta.kind == Kind::File {
            each(entry)?;
        }
    }
    Ok(())
}

/// Source and path of a directory, remembering those of the directories above it.
pub(super) fn dir_name<'n>(
    conn: &Connection,
    dir: DirId,
    names: &'n mut DirNames,
) -> Result<(&'n [u8], &'n [u8])> {
    if names.0.len() >= PATHS_MAX {
        names.0.clear();
    }
    let mut missing = Vec::new();
    let mut at = dir;
    while !names.0.contains_key(&at) {
        let query = "SELECT dir, name FROM entries WHERE child = ?1 LIMIT 1";
        let mut statement = conn.prepare_cached(query).map_err(sql)?;
        let (parent, name): (DirId, Vec<u8>) =
            statement.query_row([at], |row| Ok((row.get(0)?, row.get(1)?))).map_err(sql)?;
        if parent == 0 {
            names.0.insert(at, (name, Vec::new()));
            break;
        }
        if parent >= at {
            return Err(Error::corrupt(format!("catalog: directory {at} is below itself")));
        }
        missing.push((at, parent, name));
        at = parent;
    }
    for (at, parent, name) in missing.into_iter().rev() {
        let Some((source, path)) = names.0.get(&parent) else { continue };
        let row = (source.clone(), join(path, &name));
        names.0.insert(at, row);
    }
    match names.0.get(&dir) {
        Some((source, path)) => Ok((source, path)),
        None => Err(Error::corrupt(format!("catalog: directory {dir} has no entry"))),
    }
}

fn write_head(index: &BlockIndex, hash: HashAlgo, out: &mut dyn Write) -> std::io::Result<()> {
    writeln!(out, "{{\n\"format\": \"raidtape-meta\",\n\"version\": {VERSION},")?;
    writeln!(out, "\"block\": \"{}\",\n\"hash_algo\": \"{}\",", index.id, hash.as_str())?;
    writeln!(out, "\"stored_len\": {},", index.stored_len())?;
    writeln!(out, "\"plain_len\": {},", index.plain_len())?;
    write!(out, "\"frames\": [")?;
    for (n, frame) in index.frames.iter().enumerate() {
        let separator = if n == 0 { "\n" } else { ",\n" };
        let codec = frame.codec.as_str();
        let (stored, plain, check) = (frame.stored_len, frame.plain_len, frame.check);
        write!(out, "{separator}[\"{codec}\",{stored},{plain},\"{check:016x}\"]")?;
    }
    write!(out, "\n],\n\"chunks\": [")?;
    for (n, chunk) in index.chunks.iter().enumerate() {
        let separator = if n == 0 { "\n" } else { ",\n" };
        write!(out, "{separator}[\"{}\",{}]", chunk.id, chunk.len)?;
    }
    write!(out, "\n],\n\"mappings\": [")
}

/// A stretch of a file that lies in one block.
struct Piece {
    seq: u64,
    at: u64,
    len: u64,
    offset: u64,
}

fn pieces_in(extents: &[Extent], number: u64) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut offset = 0;
    for (seq, extent) in (0..).zip(extents) {
        match *extent {
            Extent::Data { block, offset: at, len } if block == number => {
                pieces.push(Piece { seq, at, len, offset });
            }
            _ => {}
        }
        offset += extent.len();
    }
    pieces
}

fn put_mapping(
    out: &mut Vec<u8>,
    (source, path): (&[u8], &[u8]),
    entry: &EntryRow,
    piece: &Piece,
    hash: &Digest,
) {
    let mut mapping = Object::begin(out);
    mapping.name("source", source);
    mapping.name("path", path);
    mapping.number("seq", piece.seq);
    mapping.number("at", piece.at);
    mapping.number("len", piece.len);
    mapping.number("offset", piece.offset);
    mapping.number("size", entry.meta.size);
    mapping.time("mtime", entry.meta.mtime);
    mapping.plain("hash", hash);
    match entry.last_run {
        OPEN => mapping.number("runs", format_args!("[{},null]", entry.first_run)),
        last => mapping.number("runs", format_args!("[{},{last}]", entry.first_run)),
    }
    mapping.end();
}

#[cfg(test)]
mod tests {
    use super::super::tests::any_metadata;
    use super::*;
    use crate::chunk::ChunkRef;
    use crate::chunk::frame::{Codec, Frame};
    use base64::Engine;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn digest(value: &Value) -> Digest {
        value.as_str().unwrap().parse().unwrap()
    }

    /// The block that a meta describes.
    fn block_of(meta: &Value) -> BlockIndex {
        let number = |it: &Value| u32::try_from(it.as_u64().unwrap()).unwrap();
        let frame = |it: &Value| Frame {
            codec: it[0].as_str().unwrap().parse::<Codec>().unwrap(),
            stored_len: number(&it[1]),
            plain_len: number(&it[2]),
            check: u64::from_str_radix(it[3].as_str().unwrap(), 16).unwrap(),
        };
        let chunk = |it: &Value| ChunkRef { id: digest(&it[0]), len: number(&it[1]) };
        BlockIndex {
            id: digest(&meta["block"]),
            frames: meta["frames"].as_array().unwrap().iter().map(frame).collect(),
            chunks: meta["chunks"].as_array().unwrap().iter().map(chunk).collect(),
        }
    }

    proptest! {
        #[test]
        fn any_block_comes_back_from_its_meta(
            id: [u8; 32],
            frames in prop::collection::vec((any::<bool>(), 1u32.., 1u32.., any::<u64>()), 0..9),
            chunks in prop::collection::vec((any::<[u8; 32]>(), 1u32..), 0..9),
        ) {
            let frame = |(raw, stored_len, plain_len, check)| {
                let codec = if raw { Codec::Raw } else { Codec::Zstd };
                Frame { codec, stored_len, plain_len, check }
            };
            let chunk = |(id, len)| ChunkRef { id: Digest(id), len };
            let block = BlockIndex {
                id: Digest(id),
                frames: frames.into_iter().map(frame).collect(),
                chunks: chunks.into_iter().map(chunk).collect(),
            };
            let mut out = Vec::new();
            write_head(&block, HashAlgo::Sha256, &mut out)?;
            out.extend(b"\n]\n}\n");
            let meta: Value = serde_json::from_slice(&out)?;
            prop_assert_eq!(block_of(&meta), block.clone());
            prop_assert_eq!(meta["stored_len"].as_u64(), Some(block.stored_len()));
            prop_assert_eq!(meta["plain_len"].as_u64(), Some(block.plain_len()));
            prop_assert_eq!(&meta["hash_algo"], "sha256");
        }

        #[test]
        fn any_mapping_comes_back(
            names: [Vec<u8>; 2],
            numbers: [u32; 4],
            hash: [u8; 32],
            runs in (1i64..9, 0i64..9),
            meta in any_metadata(),
        ) {
            let [source, path] = names;
            let [seq, at, len, offset] = numbers.map(u64::from);
            let last_run = if runs.1 == 0 { OPEN } else { runs.0 + runs.1 };
            let entry = EntryRow {
                dir: 1,
                name: path.clone(),
                first_run: runs.0,
                last_run,
                version: 1,
                child: None,
                meta,
                data_len: None,
            };
            let piece = Piece { seq, at, len, offset };
            let mut line = Vec::new();
            put_mapping(&mut line, (&source, &path), &entry, &piece, &Digest(hash));
            let value: Value = serde_json::from_slice(&line)?;
            for (key, name) in [("source", &source), ("path", &path)] {
                let back = match value[key].as_str() {
                    Some(text) => text.as_bytes().to_vec(),
                    None => {
                        let text = value[format!("{key}_b64")].as_str().unwrap();
                        base64::engine::general_purpose::STANDARD.decode(text)?
                    }
                };
                prop_assert_eq!(&back, name);
            }
            for (key, number) in [("seq", seq), ("at", at), ("len", len), ("offset", offset)] {
                prop_assert_eq!(value[key].as_u64(), Some(number));
            }
            prop_assert_eq!(value["size"].as_u64(), Some(meta.size));
            prop_assert_eq!(&value["mtime"], &json!([meta.mtime.secs, meta.mtime.nanos]));
            prop_assert_eq!(digest(&value["hash"]), Digest(hash));
            let last = (last_run != OPEN).then_some(last_run);
            prop_assert_eq!(&value["runs"], &json!([runs.0, last]));
        }
    }
}
