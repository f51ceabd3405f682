//! Metas read back, from a volume that may be damaged or somebody else's.
//!
//! A meta is read as a stream: what it says of its block is kept, within limits, and each of its
//! mappings is given out as it comes.

use std::collections::HashMap;
use std::fmt;
use std::io::{BufReader, Read};
use std::marker::PhantomData;
use std::path::Path;

use rusqlite::Connection;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::history::{name_from, open_document, text_of, time_from};
use super::read::{EntryRow, Reader, in_order};
use super::run::{DirId, RunId};
use super::{Content, Extent, OPEN, meta, sql};
use crate::chunk::frame::{FRAME_PLAIN_BYTES_MAX, Frame};
use crate::chunk::{ChunkRef, Digest};
use crate::entry::{Kind, split_path};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::{Time, quoted};
use crate::volume::{BlockId, BlockIndex, Volume};

/// Longest text of a meta that is read.
const TEXT_BYTES_MAX: u64 = 64 << 30;
/// Most frames and chunks that a block can have.
const FRAMES_MAX: usize = 1 << 20;
const CHUNKS_MAX: usize = 1 << 22;
/// Directories that are remembered while metas are compared.
const DIRS_MAX: usize = 1 << 14;

/// A stretch of a file that a meta says lies in its block.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// Name of its source, and its path below that.
    pub place: (Vec<u8>, Vec<u8>),
    /// Which extent of the file it is.
    pub seq: usize,
    /// Where it begins in the block's plain content.
    pub at: u64,
    /// How long it is.
    pub len: u64,
    /// Where it begins in the file.
    pub offset: u64,
    /// Length of the whole file.
    pub size: u64,
    /// Hash of the whole file.
    pub hash: Digest,
    /// Last change of the file.
    pub mtime: Time,
    /// First and last run that have it, as far as was known.
    pub runs: (RunId, Option<RunId>),
}

#[derive(Deserialize)]
struct RawMapping {
    source: Option<String>,
    source_b64: Option<String>,
    path: Option<String>,
    path_b64: Option<String>,
    seq: u64,
    at: u64,
    len: u64,
    offset: u64,
    size: u64,
    hash: String,
    mtime: (i64, u32),
    runs: (RunId, Option<RunId>),
}

impl RawMapping {
    fn check(&self) -> Result<Mapping> {
        let source = name_from(self.source.as_deref(), self.source_b64.as_deref(), "source")?;
        let path = name_from(self.path.as_deref(), self.path_b64.as_deref(), "path")?;
        Ok(Mapping {
            place: (source, path),
            seq: usize::try_from(self.seq).unwrap_or(usize::MAX),
            at: self.at,
            len: self.len,
            offset: self.offset,
            size: self.size,
            hash: self.hash.parse()?,
            mtime: time_from(self.mtime)?,
            runs: self.runs,
        })
    }
}

/// A list of at most `N` items.
struct Capped<T, const N: usize>(Vec<T>);

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for Capped<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Items<T, const N: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for Items<T, N> {
            type Value = Capped<T, N>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {N} items")
            }
            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut seq: A,
            ) -> std::result::Result<Self::Value, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    if items.len() >= N {
                        return Err(serde::de::Error::invalid_length(N + 1, &self));
                    }
                    items.push(item);
                }
                Ok(Capped(items))
            }
        }
        deserializer.deserialize_seq(Items(PhantomData))
    }
}

type Each<'a> = &'a mut dyn FnMut(Mapping) -> Result<()>;

/// What is gathered of a meta.
struct Gather<'a> {
    head: &'a mut Option<Result<BlockIndex>>,
    each: Option<Each<'a>>,
    failed: &'a mut Option<Error>,
}

struct Mappings<'a, 'b> {
    each: &'b mut Each<'a>,
    failed: &'b mut Option<Error>,
}

impl<'de> DeserializeSeed<'de> for Mappings<'_, '_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Mappings<'_, '_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of mappings")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<(), A::Error> {
        while let Some(raw) = seq.next_element::<RawMapping>()? {
            if let Err(e) = raw.check().and_then(|it| (self.each)(it)) {
                *self.failed = Some(e);
                return Err(serde::de::Error::custom("given up"));
            }
        }
        Ok(())
    }
}

impl<'de> Visitor<'de> for Gather<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a meta")
    }
    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> std::result::Result<(), A::Error> {
        type Row = (String, u32, u32, String);
        let (mut block, mut format) = (None::<String>, None::<String>);
        let (mut frames, mut chunks) = (None, None);
        while let Some(key) = map.next_key::<String>()? {
            match &*key {
                "format" => format = Some(map.next_value()?),
                "block" => block = Some(map.next_value()?),
                "frames" => frames = Some(map.next_value::<Capped<Row, FRAMES_MAX>>()?.0),
                "chunks" => {
                    chunks = Some(map.next_value::<Capped<(String, u32), CHUNKS_MAX>>()?.0);
                }
                "mappings" => {
                    *self.head = Some(index_from(&format, &block, frames.take(), chunks.take()));
                    let Some(each) = &mut self.each else {
                        return Err(serde::de::Error::custom("enough"));
                    };
                    map.next_value_seed(Mappings { each, failed: self.failed })?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}

fn index_from(
    format: &Option<String>,
    block: &Option<String>,
    frames: Option<Vec<(String, u32, u32, String)>>,
    chunks: Option<Vec<(String, u32)>>,
) -> Result<BlockIndex> {
    let bad = |what: &str| Error::corrupt(format!("it is no meta: {what}"));
    if format.as_deref() != Some("raidtape-meta") {
        return Err(bad("format"));
    }
    let frame = |(codec, stored_len, plain_len, check): (String, u32, u32, String)| {
        let check = u64::from_str_radix(&check, 16).map_err(|_| bad("check"))?;
        match (1..=FRAME_PLAIN_BYTES_MAX).contains(&plain_len) {
            true => Ok(Frame { codec: codec.parse()?, stored_len, plain_len, check }),
            false => Err(bad("length of a frame")),
        }
    };
    let chunk = |(id, len): (String, u32)| Ok(ChunkRef { id: id.parse()?, len });
    let index = BlockIndex {
        id: block.as_deref().ok_or_else(|| bad("block"))?.parse()?,
        frames: frames
            .ok_or_else(|| bad("frames"))?
            .into_iter()
            .map(frame)
            .collect::<Result<_>>()?,
        chunks: chunks
            .ok_or_else(|| bad("chunks"))?
            .into_iter()
            .map(chunk)
            .collect::<Result<_>>()?,
    };
    index.check()?;
    Ok(index)
}

/// What a volume's meta says is in a block, if the volume has one that can be read so far.
pub fn read_head(volume: &Volume, block: &BlockId) -> Option<BlockIndex> {
    let path = volume.document_path(&meta::document_name(block));
    let former = volume.document_path(&meta::former_name(block));
    let mut head = None;
    let mut failed = None;
    let gather = Gather { head: &mut head, each: None, failed: &mut failed };
    // It ends in the middle, which is an error; what counts is what came before.
    let _ = match text_of(&path) {
        Ok(text) => parse(text, gather),
        Err(_) => parse(BufReader::new(open_document(&former).ok()?), gather),
    };
    head?.ok().filter(|it| it.id == *block)
}

/// Reads the meta at `path`, and calls `each` with its mappings; gives what is in the block.
pub fn read_meta(path: &Path, each: Each<'_>) -> Result<BlockIndex> {
    let is_former = path.extension().is_some_and(|it| it == "json");
    match is_former {
        true => read_text(BufReader::new(open_document(path)?), each),
        false => read_text(text_of(path)?, each),
    }
    .map_err(|e| e.context(format!("the meta {}", quoted(path))))
}

/// Reads the text of a meta, and calls `each` with its mappings; gives what is in the block.
pub fn read_text(text: impl Read, each: Each<'_>) -> Result<BlockIndex> {
    let (mut head, mut failed) = (None, None);
    let result = parse(text, Gather { head: &mut head, each: Some(each), failed: &mut failed });
    if let Some(e) = failed {
        return Err(e);
    }
    result.map_err(|e| Error::with_source(ErrorKind::Corrupt, "it is damaged", e))?;
    head.unwrap_or_else(|| Err(Error::corrupt("it has no mappings")))
}

fn parse(text: impl Read, gather: Gather<'_>) -> serde_json::Result<()> {
    let mut deserializer = serde_json::Deserializer::from_reader(text.take(TEXT_BYTES_MAX));
    deserializer.deserialize_map(gather)?;
    deserializer.end()
}

/// What was looked up last for mappings.
#[derive(Default)]
pub struct Lookups {
    dirs: HashMap<(Vec<u8>, Vec<u8>, RunId), Option<DirId>>,
    content: Option<(i64, Content, Vec<u64>)>,
}

impl Reader {
    /// Whether the catalog says the same as a mapping of a block's meta. Since it was written the
    /// file may have come to its end.
    pub fn has_mapping(
        &self,
        block: &BlockId,
        said: &Mapping,
        known: &mut Lookups,
    ) -> Result<bool> {
        let Some(entry) = self.entry_at(said, known)? else { return Ok(false) };
        let last = (entry.last_run != OPEN).then_some(entry.last_run);
        let is_same = entry.first_run == said.runs.0
            && (said.runs.1.is_none() || said.runs.1 == last)
            && entry.meta.kind == Kind::File
            && (entry.meta.size, entry.meta.mtime) == (said.size, said.mtime);
        if !is_same {
            return Ok(false);
        }
        if known.content.as_ref().is_none_or(|it| it.0 != entry.version) {
            let content = self.content(entry.version)?;
            let starts = content.extents.iter().scan(0u64, |next, it| {
                let start = *next;
                *next = next.saturating_add(it.len());
                Some(start)
            });
            let starts = starts.collect();
            known.content = Some((entry.version, content, starts));
        }
        let Some((_, content, starts)) = &known.content else { return Ok(false) };
        let (Some(Extent::Data { block: number, offset, len }), Some(start)) =
            (content.extents.get(said.seq), starts.get(said.seq))
        else {
            return Ok(false);
        };
        let places_agree = (*offset, *len, *start) == (said.at, said.len, said.offset);
        Ok(places_agree && content.hash == Some(said.hash) && self.is_block(*number, block)?)
    }

    fn is_block(&self, number: u64, block: &BlockId) -> Result<bool> {
        let query = "SELECT EXISTS (SELECT 1 FROM blocks WHERE number = ?1 AND id = ?2)";
        let mut statement = self.conn().prepare_cached(query).map_err(sql)?;
        statement.query_row((number, &block.0[..]), |row| row.get(0)).map_err(sql)
    }

    fn entry_at(&self, said: &Mapping, known: &mut Lookups) -> Result<Option<EntryRow>> {
        let (source, path) = &said.place;
        let run = said.runs.0;
        if path.is_empty() {
            return Ok(None);
        }
        let (dir_path, name) = split_path(path);
        let key = (source.clone(), dir_path.to_vec(), run);
        let dir = match known.dirs.get(&key) {
            Some(dir) => *dir,
            None => {
                let mut dir = self.lookup(run, 0, source)?.and_then(|it| it.child);
                for name in dir_path.split(|it| *it == b'/').filter(|it| !it.is_empty()) {
                    let Some(at) = dir else { break };
                    dir = self.lookup(run, at, name)?.and_then(|it| it.child);
                }
                if known.dirs.len() >= DIRS_MAX {
                    known.dirs.clear();
                }
                known.dirs.insert(key, dir);
                dir
            }
        };
        dir.map_or(Ok(None), |dir| self.lookup(run, dir, name))
    }

    /// Blocks that files need and of which nothing is known but the name: numbers and names, at
    /// most `limit` of them, from the first number greater than `after`.
    pub fn unknown_blocks(&self, after: u64, limit: u64) -> Result<Vec<(u64, BlockId)>> {
        unknown_blocks(self.conn(), after, limit)
    }
}

/// [`Reader::unknown_blocks`], of a catalog that is being built too.
pub(super) fn unknown_blocks(
    conn: &Connection,
    after: u64,
    limit: u64,
) -> Result<Vec<(u64, BlockId)>> {
    let query = "SELECT number, id FROM blocks WHERE number > ?1 AND length(frames) <= 1 \
                 ORDER BY number LIMIT ?2";
    let mut statement = conn.prepare_cached(query).map_err(sql)?;
    let mut rows = statement.query((after, limit)).map_err(sql)?;
    let mut found = Vec::new();
    while let Some(row) = rows.next().map_err(sql)? {
        let id: Vec<u8> = row.get(1).map_err(sql)?;
        found.push((row.get(0).map_err(sql)?, Digest::from_slice(&id)?));
    }
    in_order(std::iter::once(after).chain(found.iter().map(|it: &(u64, _)| it.0)))?;
    Ok(found)
}
