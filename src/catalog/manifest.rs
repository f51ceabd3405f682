//! Run manifests: everything that a run added, changed or deleted, as JSON lines in zstd.
//!
//! Replayed in the order of their numbers, the manifests are the history of all sources; the format
//! is in FORMAT.md. While a run is under way its changes go into a [`Spool`], an unnamed temporary
//! file, because the names of its blocks are known only at its end.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::extent;
use super::json::Object;
use super::run::{Counts, RunId, VersionId};
use super::{Content, Extent};
use crate::chunk::{Digest, HashAlgo};
use crate::entry::{Extra, Kind, Metadata, flag_letters};
use crate::error::{Error, Result};
use crate::sys::{Time, quoted};
use crate::volume::{BlockId, VolumeConfig};
use crate::wire::{self, Reader};

/// Version of the manifest format.
pub(super) const VERSION: u32 = 2;
/// Level for manifests and metas. Half of one is hashes in hex, which only entropy coding makes
/// smaller: the lowest level does that best (2.01 MB of 12.0 for 30,000 files, level 6 gives 2.14).
pub(super) const ZSTD_LEVEL: i32 = 1;

/// Folder of a volume that has manifests.
pub const DIR: &str = "manifests";

/// Name of a run's manifest, relative to the volume.
pub fn document_name(run: RunId) -> String {
    format!("{DIR}/run-{run:08}.jsonl.zst")
}

/// The run that a file of the folder [`DIR`] is the manifest of, by its name.
pub fn run_of(name: &str) -> Option<RunId> {
    let run = name.strip_prefix("run-")?.strip_suffix(".jsonl.zst")?.parse().ok()?;
    (document_name(run).strip_prefix(DIR)?.strip_prefix('/')? == name).then_some(run)
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
const OP_USER: u64 = 5;
const OP_GROUP: u64 = 6;
const OP_PROBLEM: u64 = 7;

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

    /// Notes the name that an owner (`user`) or group (`group`) number stands for.
    pub fn owner(&mut self, kind: &str, id: u32, name: &[u8]) -> Result<()> {
        self.record.clear();
        wire::put_u64(&mut self.record, if kind == "user" { OP_USER } else { OP_GROUP });
        wire::put_bytes(&mut self.record, name);
        wire::put_u64(&mut self.record, id.into());
        self.write()
    }

    /// Notes what could not be read; comes after all that was.
    pub fn problem(&mut self, path: &[u8], kind: &str, message: &str) -> Result<()> {
        self.record.clear();
        wire::put_u64(&mut self.record, OP_PROBLEM);
        wire::put_bytes(&mut self.record, path);
        wire::put_bytes(&mut self.record, kind.as_bytes());
        wire::put_bytes(&mut self.record, message.as_bytes());
        self.write()
    }

    fn write(&mut self) -> Result<()> {
        let failed = |e| Error::io("writing the temporary file of the run", e);
        let len = u32::try_from(self.record.len()).unwrap_or(u32::MAX);
        self.file.write_all(&len.to_le_bytes()).map_err(failed)?;
        self.file.write_all(&self.record).map_err(failed)
    }

    /// Writes the manifest: header, a line for each change, footer. Gives its digest.
    pub fn write_manifest(
        &mut self,
        header: &Header<'_>,
        end: &End<'_>,
        block_name: &mut dyn FnMut(u64) -> Result<BlockId>,
        out: &mut dyn Write,
    ) -> Result<Digest> {
        let failed = |e| Error::io("writing a manifest", e);
        self.file.flush().map_err(failed)?;
        let mut file = self.file.get_ref();
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let mut spool = BufReader::with_capacity(1 << 16, file);
        let mut out = compressed(out).map_err(failed)?;
        let (mut line, mut hasher) = (Vec::new(), DIGEST.hasher());
        header.put(&mut line)?;
        let (mut count, mut record) = (0u64, Vec::new());
        loop {
            line.push(b'\n');
            hasher.update(&line);
            out.write_all(&line).map_err(failed)?;
            line.clear();
            if spool.fill_buf().map_err(failed)?.is_empty() {
                break;
            }
            let mut len = [0; 4];
            spool.read_exact(&mut len).map_err(failed)?;
            record.clear();
            let len = u64::from(u32::from_le_bytes(len));
            spool.by_ref().take(len).read_to_end(&mut record).map_err(failed)?;
            put_change(&mut line, &record, block_name)?;
            count += 1;
        }
        let digest = hasher.finish();
        end.put(&mut line, count, &digest);
        line.push(b'\n');
        out.write_all(&line).map_err(failed)?;
        out.finish().map_err(failed)?.flush().map_err(failed)?;
        Ok(digest)
    }
}

/// Compresses a document, with a checksum: what no digest covers, as a last line, has that.
pub(super) fn compressed<W: Write>(out: W) -> io::Result<zstd::Encoder<'static, W>> {
    let mut out = zstd::Encoder::new(out, ZSTD_LEVEL)?;
    out.include_checksum(true)?;
    Ok(out)
}

/// The hash by which one manifest names another, whatever names the blocks.
pub(super) const DIGEST: HashAlgo = HashAlgo::Blake3;

/// An earlier run, as a manifest names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Previous {
    /// Its number.
    pub run: RunId,
    /// Its name.
    pub uuid: String,
    /// Digest of its manifest; `None` where that is of format 1, or not known.
    pub digest: Option<Digest>,
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
    /// Its comment.
    pub comment: &'a str,
    /// Where the source lay.
    pub path: &'a [u8],
    /// Name of the machine.
    pub host: &'a [u8],
    /// The program that made the run, with its version.
    pub program: &'a str,
    /// The catalog's settings.
    pub settings: Vec<(String, String)>,
    /// The catalog's volumes.
    pub volumes: Vec<VolumeConfig>,
    /// The newest earlier run of all.
    pub previous: Option<Previous>,
    /// Number and name of the newest earlier run of the same source: what the changes are changes
    /// of.
    pub basis: Option<(RunId, String)>,
}

impl Header<'_> {
    fn put(&self, out: &mut Vec<u8>) -> Result<()> {
        let mut line = Object::begin(out);
        line.plain("op", "run");
        line.number("format", VERSION);
        line.number("run", self.run);
        line.plain("uuid", self.uuid);
        line.name("source", self.source);
        line.time("started", self.started);
        line.plain("hash_algo", self.hash.as_str());
        serde_json::to_writer(line.key("tags"), self.tags)
            .map_err(|e| Error::io("writing a manifest", e.into()))?;
        line.text("comment", self.comment);
        line.name("path", self.path);
        line.name("host", self.host);
        line.text("program", self.program);
        let mut settings = Object::begin(line.key("settings"));
        self.settings.iter().for_each(|(key, value)| settings.text(key, value));
        settings.end();
        let out = line.key("volumes");
        out.push(b'[');
        for (n, volume) in self.volumes.iter().enumerate() {
            if n > 0 {
                out.push(b',');
            }
            put_volume(out, volume);
        }
        out.push(b']');
        match &self.previous {
            None => line.number("previous", "null"),
            Some(it) => put_run(line.key("previous"), it.run, &it.uuid, Some(&it.digest)),
        }
        match &self.basis {
            None => line.number("basis", "null"),
            Some((run, uuid)) => put_run(line.key("basis"), *run, uuid, None),
        }
        line.end();
        Ok(())
    }
}

fn put_volume(out: &mut Vec<u8>, volume: &VolumeConfig) {
    let mut object = Object::begin(out);
    object.number("number", volume.number);
    object.text("uuid", &volume.uuid);
    object.name("path", volume.path.as_os_str().as_bytes());
    object.plain("status", volume.status.as_str());
    object.number("reserve_percent", volume.reserve_percent);
    object.end();
}

fn put_run(out: &mut Vec<u8>, run: RunId, uuid: &str, digest: Option<&Option<Digest>>) {
    let mut object = Object::begin(out);
    object.number("run", run);
    object.text("uuid", uuid);
    match digest {
        None => {}
        Some(None) => object.number("digest", "null"),
        Some(Some(digest)) => object.plain("digest", digest),
    }
    object.end();
}

/// What a manifest's last line says besides what it says of the manifest.
pub struct End<'a> {
    /// When the run ended.
    pub finished: Time,
    /// What it counted.
    pub counts: &'a Counts,
}

impl End<'_> {
    fn put(&self, out: &mut Vec<u8>, changes: u64, digest: &Digest) {
        let mut line = Object::begin(out);
        line.plain("op", "end");
        line.time("finished", self.finished);
        for (key, value) in COUNTS.iter().zip(self.counts.columns()) {
            line.number(key, value);
        }
        line.number("changes", changes);
        line.plain("digest", digest);
        line.end();
    }
}

/// What runs count, as the columns of `runs` and the keys of a manifest's last line are called.
pub(super) const COUNTS: [&str; 13] = [
    "added",
    "modified",
    "deleted",
    "unchanged",
    "dirs_added",
    "dirs_modified",
    "dirs_deleted",
    "dirs_unchanged",
    "files",
    "bytes",
    "bytes_read",
    "bytes_stored",
    "problems",
];

/// Appends the line of one change.
fn put_change(
    out: &mut Vec<u8>,
    record: &[u8],
    block_name: &mut dyn FnMut(u64) -> Result<BlockId>,
) -> Result<()> {
    let mut reader = Reader::new(record, "temporary file of the run");
    let op = reader.u64()?;
    let mut line = Object::begin(out);
    line.plain(
        "op",
        match op {
            OP_DELETE => "delete",
            OP_EMPTY => "empty",
            OP_LINK => "link",
            OP_USER | OP_GROUP => "owner",
            OP_PROBLEM => "problem",
            _ => "put",
        },
    );
    let of = if matches!(op, OP_USER | OP_GROUP) { "name" } else { "path" };
    line.name(of, reader.bytes()?);
    match op {
        OP_DELETE | OP_EMPTY => {}
        OP_USER | OP_GROUP => {
            line.plain("kind", if op == OP_USER { "user" } else { "group" });
            line.number("id", reader.u64()?);
        }
        OP_LINK => line.number("version", reader.i64()?),
        OP_PROBLEM => {
            for key in ["kind", "message"] {
                line.text(key, &String::from_utf8_lossy(reader.bytes()?));
            }
        }
        _ => put_entry(&mut line, &mut reader, block_name)?,
    }
    line.end();
    Ok(())
}

fn put_entry(
    line: &mut Object<'_>,
    reader: &mut Reader<'_>,
    block_name: &mut dyn FnMut(u64) -> Result<BlockId>,
) -> Result<()> {
    let version = reader.i64()?;
    let kind = u8::try_from(reader.u64()?).ok().and_then(Kind::from_number);
    let kind = kind.ok_or_else(|| Error::corrupt("unknown kind of entry"))?;
    line.plain("kind", kind.as_str());
    line.number("version", version);
    for key in ["mode", "uid", "gid", "size"] {
        line.number(key, reader.u64()?);
    }
    for key in ["mtime", "ctime"] {
        line.time(key, Time { secs: reader.i64()?, nanos: reader.u32()? });
    }
    for key in ["ino", "nlink", "rdev"] {
        line.number(key, reader.u64()?);
    }
    let (hash, extents, extra) = (reader.bytes()?, reader.bytes()?, reader.bytes()?);
    if !hash.is_empty() {
        line.plain("hash", Digest::from_slice(hash)?);
    }
    if kind == Kind::File {
        put_extents(line.key("extents"), &extent::decode(extents)?, block_name)?;
    }
    put_extra(line, &Extra::decode(extra)?);
    Ok(())
}

pub(super) fn put_extents(
    out: &mut Vec<u8>,
    extents: &[Extent],
    block_name: &mut dyn FnMut(u64) -> Result<BlockId>,
) -> Result<()> {
    let failed = |e| Error::io("writing a manifest", e);
    out.push(b'[');
    for (n, extent) in extents.iter().enumerate() {
        if n > 0 {
            out.push(b',');
        }
        match *extent {
            Extent::Hole { len } => write!(out, "[null,0,{len}]").map_err(failed)?,
            Extent::Data { block, offset, len } => {
                let name = block_name(block)?;
                write!(out, "[\"{name}\",{offset},{len}]").map_err(failed)?;
            }
        }
    }
    out.push(b']');
    Ok(())
}

pub(super) fn put_extra(line: &mut Object<'_>, extra: &Extra) {
    if let Some(target) = &extra.target {
        line.name("target", target);
    }
    if extra.flags != 0 {
        line.plain("flags", flag_letters(extra.flags));
    }
    if extra.xattrs.is_empty() {
        return;
    }
    let out = line.key("xattrs");
    let mut separator = b'[';
    for (key, value) in &extra.xattrs {
        out.push(separator);
        separator = b',';
        let mut pair = Object::begin(out);
        pair.name("key", key);
        pair.base64("value_b64", value);
        pair.end();
    }
    out.push(b']');
}

#[cfg(test)]
mod tests {
    use super::super::tests::{any_content, any_metadata};
    use super::*;
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD as BASE64;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// Reads back what [`put_name`] wrote.
    fn name_of(value: &Value, key: &str) -> Vec<u8> {
        match (value[key].as_str(), value[format!("{key}_b64")].as_str()) {
            (Some(text), None) => text.as_bytes().to_vec(),
            (None, Some(text)) => BASE64.decode(text).unwrap(),
            _ => panic!("no {key} in {value}"),
        }
    }

    /// Blocks are named by their numbers here.
    fn name_of_block(number: u64) -> BlockId {
        let mut name = [0; 32];
        name[..8].copy_from_slice(&number.to_le_bytes());
        Digest(name)
    }

    fn number_of_block(value: &Value) -> u64 {
        let name: Digest = value.as_str().unwrap().parse().unwrap();
        u64::from_le_bytes(name.0[..8].try_into().unwrap())
    }

    /// File flags from their letters.
    fn flags_of(letters: &str) -> u32 {
        let bits = (0..32).map(|bit| 1u32 << bit);
        let is_in = |bit: &u32| {
            let letter = flag_letters(*bit);
            !letter.is_empty() && letters.contains(&letter)
        };
        bits.filter(is_in).sum()
    }

    /// The metadata and content that a line of the manifest says.
    fn entry_of(line: &Value) -> (Metadata, Content) {
        let number = |key: &str| line[key].as_u64().unwrap();
        let small = |key: &str| u32::try_from(number(key)).unwrap();
        let time = |key: &str| Time {
            secs: line[key][0].as_i64().unwrap(),
            nanos: u32::try_from(line[key][1].as_u64().unwrap()).unwrap(),
        };
        let meta = Metadata {
            kind: line["kind"].as_str().unwrap().parse().unwrap(),
            mode: small("mode"),
            uid: small("uid"),
            gid: small("gid"),
            size: number("size"),
            mtime: time("mtime"),
            ctime: time("ctime"),
            ino: number("ino"),
            nlink: number("nlink"),
            rdev: number("rdev"),
        };
        let list = |key: &str| line[key].as_array().cloned().unwrap_or_default();
        let extent = |it: &Value| {
            let len = it[2].as_u64().unwrap();
            match it[0].is_null() {
                true => Extent::Hole { len },
                false => {
                    let (block, offset) = (number_of_block(&it[0]), it[1].as_u64().unwrap());
                    Extent::Data { block, offset, len }
                }
            }
        };
        let xattr = |it: &Value| {
            (name_of(it, "key"), BASE64.decode(it["value_b64"].as_str().unwrap()).unwrap())
        };
        let has_target = line.get("target").is_some() || line.get("target_b64").is_some();
        let content = Content {
            hash: line["hash"].as_str().map(|it| it.parse().unwrap()),
            extents: list("extents").iter().map(extent).collect(),
            extra: Extra {
                target: has_target.then(|| name_of(line, "target")),
                xattrs: list("xattrs").iter().map(xattr).collect(),
                flags: flags_of(line["flags"].as_str().unwrap_or_default()),
            },
        };
        (meta, content)
    }

    fn header() -> Header<'static> {
        Header {
            run: 4,
            uuid: "u",
            source: b"/home",
            started: Time { secs: 1, nanos: 2 },
            hash: HashAlgo::Blake3,
            tags: &[],
            comment: "before the move",
            path: b"/home",
            host: b"h\xff",
            program: "raidtape 1",
            settings: vec![("chunking".to_owned(), "fixed".to_owned())],
            volumes: vec![VolumeConfig {
                number: 3,
                uuid: "v".to_owned(),
                path: "/disk".into(),
                status: crate::volume::Status::Sealed,
                reserve_percent: 5,
            }],
            previous: None,
            basis: Some((2, "b".to_owned())),
        }
    }

    fn lines_of(spool: &mut Spool) -> Vec<Value> {
        let header = header();
        let end = End { finished: Time::default(), counts: &Counts::default() };
        let mut out = Vec::new();
        spool.write_manifest(&header, &end, &mut |it| Ok(name_of_block(it)), &mut out).unwrap();
        let text = String::from_utf8(zstd::decode_all(&out[..]).unwrap()).unwrap();
        text.lines().map(|it| serde_json::from_str(it).unwrap()).collect()
    }

    proptest! {
        #[test]
        fn any_entry_comes_back_from_a_manifest(
            path: Vec<u8>,
            version: i64,
            meta in any_metadata(),
            content in any_content(),
        ) {
            let dir = tempfile::tempdir()?;
            let mut spool = Spool::new(dir.path())?;
            spool.put(&path, version, &meta, &content)?;
            spool.link(&path, version)?;
            spool.delete(&path)?;
            spool.empty(&path)?;
            spool.owner("group", meta.gid, &path)?;
            spool.problem(&path, "io", "a \"message\"\n")?;
            let lines = lines_of(&mut spool);
            let words: Vec<&str> = lines.iter().filter_map(|it| it["op"].as_str()).collect();
            let expected = ["run", "put", "link", "delete", "empty", "owner", "problem", "end"];
            prop_assert_eq!(words, expected);
            prop_assert_eq!(name_of(&lines[6], "path"), &path[..]);
            prop_assert_eq!(lines[6]["message"].as_str(), Some("a \"message\"\n"));
            for line in &lines[1..5] {
                prop_assert_eq!(name_of(line, "path"), &path[..]);
            }
            prop_assert_eq!(name_of(&lines[5], "name"), &path[..]);
            prop_assert_eq!(lines[5]["id"].as_u64(), Some(meta.gid.into()));
            prop_assert_eq!(lines[1]["version"].as_i64(), Some(version));
            prop_assert_eq!(lines[2]["version"].as_i64(), Some(version));
            let (meta_back, content_back) = entry_of(&lines[1]);
            prop_assert_eq!(meta_back, meta);
            // Only files have extents.
            let is_file = meta.kind == Kind::File;
            let extents = if is_file { content.extents.clone() } else { Vec::new() };
            prop_assert_eq!(content_back, Content { extents, ..content });
        }

        #[test]
        fn any_record_is_read_or_refused(bytes: Vec<u8>, op in 0u8..9) {
            let mut name = |number: u64| Ok(name_of_block(number));
            let _ = put_change(&mut Vec::new(), &bytes, &mut name);
            let _ = put_change(&mut Vec::new(), &[&[op][..], &bytes].concat(), &mut name);
        }
    }

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
            extra: Extra {
                target: None,
                xattrs: vec![(b"user.a".to_vec(), vec![0xff])],
                flags: 0x50,
            },
        };
        spool.put(b"dir/\xff", 77, &meta, &content).unwrap();
        spool.delete(b"old\nname").unwrap();
        spool.owner("group", 100, b"us\xffers").unwrap();
        let previous = Previous { run: 3, uuid: "p".to_owned(), digest: None };
        let tags = ["nightly".to_owned()];
        let header = Header { tags: &tags, previous: Some(previous), ..header() };
        let counts = Counts { bytes_stored: 11, problems: 12, ..Counts::default() };
        let end = End { finished: Time { secs: 3, nanos: 4 }, counts: &counts };
        let mut out = Vec::new();
        let mut name = |_| Ok(Digest([9; 32]));
        let digest = spool.write_manifest(&header, &end, &mut name, &mut out).unwrap();
        let text = String::from_utf8(zstd::decode_all(&out[..]).unwrap()).unwrap();
        let lines: Vec<Value> = text.lines().map(|it| serde_json::from_str(it).unwrap()).collect();
        assert_eq!(lines[0]["run"], 4);
        assert_eq!(lines[0]["comment"], "before the move");
        assert_eq!(lines[1]["path_b64"], BASE64.encode(b"dir/\xff"));
        assert_eq!(lines[1]["mtime"], json!([-5, 7]));
        assert_eq!(lines[1]["extents"], json!([["09".repeat(32), 5, 20], [null, 0, 10]]));
        assert_eq!(lines[1]["xattrs"][0]["value_b64"], "/w==");
        assert_eq!(lines[1]["flags"], "di");
        assert_eq!(lines[2], json!({ "op": "delete", "path": "old\nname" }));
        let name = BASE64.encode(b"us\xffers");
        let owner = json!({ "op": "owner", "name_b64": name, "kind": "group", "id": 100 });
        assert_eq!(lines[3], owner);
        assert_eq!(lines[0]["host_b64"], BASE64.encode(b"h\xff"));
        assert_eq!(lines[0]["settings"], json!({ "chunking": "fixed" }));
        let volume = json!([{ "number": 3, "uuid": "v", "path": "/disk", "status": "sealed",
            "reserve_percent": 5 }]);
        assert_eq!(lines[0]["volumes"], volume);
        assert_eq!(lines[0]["previous"], json!({ "run": 3, "uuid": "p", "digest": null }));
        assert_eq!(lines[0]["basis"], json!({ "run": 2, "uuid": "b" }));
        let last = &lines[4];
        assert_eq!((&last["changes"], &last["finished"]), (&json!(3), &json!([3, 4])));
        assert_eq!((&last["bytes_stored"], &last["problems"]), (&json!(11), &json!(12)));
        assert_eq!(last["digest"], digest.to_string());
        let (before, _) = text.trim_end().rsplit_once('\n').unwrap();
        assert_eq!(HashAlgo::Blake3.hash(format!("{before}\n").as_bytes()), digest);
        for bit in 0..out.len() * 8 {
            out[bit / 8] ^= 1 << (bit % 8);
            let read = zstd::decode_all(&out[..]);
            assert!(read.is_err() || read.is_ok_and(|it| it == text.as_bytes()), "bit {bit}");
            out[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
