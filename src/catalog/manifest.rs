//! Run manifests: everything that a run added, changed or deleted, as JSON lines in zstd.
//!
//! Replayed in the order of their numbers, the manifests are the history of all sources; the format
//! is in FORMAT.md. While a run is under way its changes go into a [`Spool`], an unnamed temporary
//! file, because the names of its blocks are known only at its end.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value, json};

use super::extent;
use super::run::{RunId, VersionId};
use super::{Content, Extent};
use crate::chunk::{Digest, HashAlgo};
use crate::entry::{Extra, Kind, Metadata};
use crate::error::{Error, Result};
use crate::sys::{Time, quoted};
use crate::volume::BlockId;
use crate::wire::{self, Reader};

/// Version of the manifest format.
const VERSION: u32 = 1;
/// Level for manifests: they are written once and small.
const ZSTD_LEVEL: i32 = 6;

/// Name of a run's manifest, relative to the volume.
pub fn document_name(run: RunId) -> String {
    format!("manifests/run-{run:08}.jsonl.zst")
}

/// The changes of a run that is under way.
pub struct Spool {
    file: BufWriter<File>,
    record: Vec<u8>,
}

const OP_PUT: u64 = 1;
const OP_DELETE: u64 = 2;
const OP_LINK: u64 = 3;
const OP_EMPTY: u64 = 4;

impl Spool {
    /// An empty spool, whose file lies in `dir` and is gone when the process ends.
    pub fn new(dir: &Path) -> Result<Spool> {
        let file = tempfile::tempfile_in(dir)
            .map_err(|e| Error::io(format!("making a temporary file in {}", quoted(dir)), e))?;
        Ok(Spool { file: BufWriter::with_capacity(1 << 16, file), record: Vec::new() })
    }

    /// Notes an entry that is new or changed.
    pub fn put(
        &mut self,
        path: &[u8],
        version: VersionId,
        meta: &Metadata,
        content: &Content,
    ) -> Result<()> {
        let out = &mut self.record;
        out.clear();
        wire::put_u64(out, OP_PUT);
        wire::put_bytes(out, path);
        wire::put_i64(out, version);
        wire::put_u64(out, meta.kind as u64);
        for number in [meta.mode.into(), meta.uid.into(), meta.gid.into(), meta.size] {
            wire::put_u64(out, number);
        }
        for time in [meta.mtime, meta.ctime] {
            wire::put_i64(out, time.secs);
            wire::put_u64(out, time.nanos.into());
        }
        for number in [meta.ino, meta.nlink, meta.rdev] {
            wire::put_u64(out, number);
        }
        wire::put_bytes(out, content.hash.as_ref().map_or(&[], |it| &it.0[..]));
        wire::put_bytes(out, &extent::encode(&content.extents));
        wire::put_bytes(out, &content.extra.encode());
        self.write()
    }

    /// Notes a further name of a version that this or an earlier run put.
    pub fn link(&mut self, path: &[u8], version: VersionId) -> Result<()> {
        self.record.clear();
        wire::put_u64(&mut self.record, OP_LINK);
        wire::put_bytes(&mut self.record, path);
        wire::put_i64(&mut self.record, version);
        self.write()
    }

    /// Notes an entry that is gone, with everything below it.
    pub fn delete(&mut self, path: &[u8]) -> Result<()> {
        self.record.clear();
        wire::put_u64(&mut self.record, OP_DELETE);
        wire::put_bytes(&mut self.record, path);
        self.write()
    }

    /// Notes a directory that stays while everything below it is gone.
    pub fn empty(&mut self, path: &[u8]) -> Result<()> {
        self.record.clear();
        wire::put_u64(&mut self.record, OP_EMPTY);
        wire::put_bytes(&mut self.record, path);
        self.write()
    }

    fn write(&mut self) -> Result<()> {
        let failed = |e| Error::io("writing the temporary file of the run", e);
        let len = u32::try_from(self.record.len()).unwrap_or(u32::MAX);
        self.file.write_all(&len.to_le_bytes()).map_err(failed)?;
        self.file.write_all(&self.record).map_err(failed)
    }

    /// Writes the manifest: header, a line for each change, footer.
    pub fn write_manifest(
        &mut self,
        header: &Header<'_>,
        block_name: &mut dyn FnMut(u64) -> Result<BlockId>,
        out: &mut dyn Write,
    ) -> Result<()> {
        let failed = |e| Error::io("writing a manifest", e);
        self.file.flush().map_err(failed)?;
        let mut file = self.file.get_ref();
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let mut spool = BufReader::with_capacity(1 << 16, file);
        let mut out = zstd::Encoder::new(out, ZSTD_LEVEL).map_err(failed)?;
        let mut line = |value: &Value| -> Result<()> {
            serde_json::to_writer(&mut out, value)
                .map_err(|e| Error::io("writing a manifest", e.into()))?;
            out.write_all(b"\n").map_err(failed)
        };
        line(&header.to_json())?;
        let mut count = 0u64;
        let mut record = Vec::new();
        while !spool.fill_buf().map_err(failed)?.is_empty() {
            let mut len = [0; 4];
            spool.read_exact(&mut len).map_err(failed)?;
            record.clear();
            let len = u64::from(u32::from_le_bytes(len));
            spool.by_ref().take(len).read_to_end(&mut record).map_err(failed)?;
            line(&record_to_json(&record, block_name)?)?;
            count += 1;
        }
        line(&json!({ "op": "end", "changes": count }))?;
        out.finish().map_err(failed)?.flush().map_err(failed)
    }
}

/// What a manifest's first line says.
pub struct Header<'a> {
    /// Number of the run.
    pub run: RunId,
    /// Its name.
    pub uuid: &'a str,
    /// Name of its source.
    pub source: &'a [u8],
    /// When it began.
    pub started: Time,
    /// The hash that names chunks, blocks and files.
    pub hash: HashAlgo,
    /// Its tags.
    pub tags: &'a [String],
}

impl Header<'_> {
    fn to_json(&self) -> Value {
        let mut map = Map::new();
        map.insert("op".into(), "run".into());
        map.insert("format".into(), VERSION.into());
        map.insert("run".into(), self.run.into());
        map.insert("uuid".into(), self.uuid.into());
        put_name(&mut map, "source", self.source);
        map.insert("started".into(), time_to_json(self.started));
        map.insert("hash_algo".into(), self.hash.as_str().into());
        map.insert("tags".into(), json!(self.tags));
        Value::Object(map)
    }
}

/// Names are bytes and JSON is Unicode: a name that is not UTF-8 gets the key `KEY_b64` and base64.
pub(super) fn put_name(map: &mut Map<String, Value>, key: &str, name: &[u8]) {
    match std::str::from_utf8(name) {
        Ok(text) => map.insert(key.to_owned(), text.into()),
        Err(_) => map.insert(format!("{key}_b64"), BASE64.encode(name).into()),
    };
}

pub(super) fn time_to_json(time: Time) -> Value {
    json!([time.secs, time.nanos])
}

fn record_to_json(
    record: &[u8],
    block_name: &mut dyn FnMut(u64) -> Result<BlockId>,
) -> Result<Value> {
    let mut reader = Reader::new(record, "temporary file of the run");
    let mut map = Map::new();
    match reader.u64()? {
        OP_DELETE => {
            map.insert("op".into(), "delete".into());
            put_name(&mut map, "path", reader.bytes()?);
        }
        OP_EMPTY => {
            map.insert("op".into(), "empty".into());
            put_name(&mut map, "path", reader.bytes()?);
        }
        OP_LINK => {
            map.insert("op".into(), "link".into());
            put_name(&mut map, "path", reader.bytes()?);
            map.insert("version".into(), reader.i64()?.into());
        }
        _ => {
            map.insert("op".into(), "put".into());
            put_name(&mut map, "path", reader.bytes()?);
            let version = reader.i64()?;
            let kind = u8::try_from(reader.u64()?).ok().and_then(Kind::from_number);
            let kind = kind.ok_or_else(|| Error::corrupt("unknown kind of entry"))?;
            map.insert("kind".into(), kind.as_str().into());
            map.insert("version".into(), version.into());
            for key in ["mode", "uid", "gid", "size"] {
                map.insert(key.into(), reader.u64()?.into());
            }
            for key in ["mtime", "ctime"] {
                let time = Time { secs: reader.i64()?, nanos: reader.u32()? };
                map.insert(key.into(), time_to_json(time));
            }
            for key in ["ino", "nlink", "rdev"] {
                map.insert(key.into(), reader.u64()?.into());
            }
            let (hash, extents, extra) = (reader.bytes()?, reader.bytes()?, reader.bytes()?);
            if !hash.is_empty() {
                map.insert("hash".into(), Digest::from_slice(hash)?.to_string().into());
            }
            if kind == Kind::File {
                let extents = extent::decode(extents)?;
                map.insert("extents".into(), extents_to_json(&extents, block_name)?);
            }
            put_extra(&mut map, &Extra::decode(extra)?);
        }
    }
    Ok(Value::Object(map))
}

fn extents_to_json(
    extents: &[Extent],
    block_name: &mut dyn FnMut(u64) -> Result<BlockId>,
) -> Result<Value> {
    let mut list = Vec::with_capacity(extents.len());
    for extent in extents {
        list.push(match *extent {
            Extent::Hole { len } => json!([null, 0, len]),
            Extent::Data { block, offset, len } => {
                json!([block_name(block)?.to_string(), offset, len])
            }
        });
    }
    Ok(Value::Array(list))
}

fn put_extra(map: &mut Map<String, Value>, extra: &Extra) {
    if let Some(target) = &extra.target {
        put_name(map, "target", target);
    }
    if !extra.xattrs.is_empty() {
        let pairs = extra.xattrs.iter().map(|(key, value)| {
            let mut pair = Map::new();
            put_name(&mut pair, "key", key);
            pair.insert("value_b64".into(), BASE64.encode(value).into());
            Value::Object(pair)
        });
        map.insert("xattrs".into(), pairs.collect());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_says_what_the_spool_was_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(dir.path()).unwrap();
        let meta = Metadata {
            kind: Kind::File,
            mode: 0o640,
            uid: 1,
            gid: 2,
            size: 30,
            mtime: Time { secs: -5, nanos: 7 },
            ctime: Time { secs: 8, nanos: 9 },
            ino: 10,
            nlink: 1,
            rdev: 0,
        };
        let content = Content {
            hash: Some(Digest([7; 32])),
            extents: vec![Extent::Data { block: 3, offset: 5, len: 20 }, Extent::Hole { len: 10 }],
            extra: Extra { target: None, xattrs: vec![(b"user.a".to_vec(), vec![0xff])] },
        };
        spool.put(b"dir/\xff", 77, &meta, &content).unwrap();
        spool.delete(b"old\nname").unwrap();
        let header = Header {
            run: 4,
            uuid: "u",
            source: b"/home",
            started: Time { secs: 1, nanos: 2 },
            hash: HashAlgo::Blake3,
            tags: &["nightly".to_owned()],
        };
        let mut out = Vec::new();
        spool.write_manifest(&header, &mut |_| Ok(Digest([9; 32])), &mut out).unwrap();
        let text = String::from_utf8(zstd::decode_all(&out[..]).unwrap()).unwrap();
        let lines: Vec<Value> = text.lines().map(|it| serde_json::from_str(it).unwrap()).collect();
        assert_eq!(lines[0]["run"], 4);
        assert_eq!(lines[1]["path_b64"], BASE64.encode(b"dir/\xff"));
        assert_eq!(lines[1]["mtime"], json!([-5, 7]));
        assert_eq!(lines[1]["extents"], json!([["09".repeat(32), 5, 20], [null, 0, 10]]));
        assert_eq!(lines[1]["xattrs"][0]["value_b64"], "/w==");
        assert_eq!(lines[2], json!({ "op": "delete", "path": "old\nname" }));
        assert_eq!(lines[3]["changes"], 2);
    }
}
