//! Frames of blocks, from the cache or from the volumes.
//!
//! Whatever leaves here has been checked: a frame's bytes against its own check when it is read.
//! A copy of a block that cannot be read, or is not as written, is passed over for the next one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;

use super::buffers::{Buffer, Buffers};
use super::cache::FrameCache;
use super::due::Due;
use super::pool::Pool;
use super::weighed::Weighed;
use crate::catalog::Reader;
use crate::catalog::tapes::OnTape;
use crate::chunk::frame::{Codec, Frame};
use crate::error::{Error, ErrorKind, Result};
use crate::volume::{BlockId, Volume, Volumes};

/// Memory for the frame tables of blocks. One of a full block is seldom more than 100 KiB.
const MAPS_BYTES_MAX: usize = 6 << 20;

/// Plain bytes that must be left of a frame for it to be decompressed in part: zstd does whole
/// pieces of at most 128 KiB.
const SAVES_MIN: usize = 64 << 10;

/// A block's frames with their positions.
pub struct BlockMap {
    pub number: u64,
    pub id: BlockId,
    /// Numbers of the volumes that have it.
    pub volumes: Vec<i64>,
    pub frames: Vec<FramePlace>,
    pub stored_len: u64,
}

/// A frame and where it begins.
#[derive(Clone, Copy)]
pub struct FramePlace {
    pub plain_at: u64,
    pub stored_at: u64,
    pub frame: Frame,
}

/// How readers of the catalog are opened.
pub type OpenReader = fn(&Path) -> Result<Reader>;

/// The blocks of a catalog.
pub struct Blocks {
    pub path: PathBuf,
    open: OpenReader,
    readers: Pool<Reader>,
    volumes: RwLock<Arc<Volumes>>,
    pub frames: FrameCache,
    pub buffers: Arc<Buffers>,
    maps: Weighed<u64, BlockMap>,
    pub on_tape: OnTape,
    /// Its thread ends with this.
    _due: Arc<Due>,
}

impl Blocks {
    pub fn open(path: &Path, cache_bytes: u64, open: OpenReader) -> Result<Blocks> {
        let reader = open(path)?;
        let due = Arc::new(Due::new(path));
        let volumes = Volumes::open(reader.volumes()?).with_faults(Arc::new(due.faults()));
        let readers = Pool::new();
        readers.put(reader);
        Ok(Blocks {
            path: path.to_path_buf(),
            open,
            readers,
            volumes: RwLock::new(Arc::new(volumes)),
            frames: FrameCache::new(cache_bytes),
            buffers: Arc::default(),
            maps: Weighed::new(MAPS_BYTES_MAX),
            on_tape: OnTape::new(path),
            _due: due,
        })
    }

    pub fn with_reader<T>(&self, read: impl FnOnce(&Reader) -> Result<T>) -> Result<T> {
        let reader = match self.readers.take() {
            Some(reader) => reader,
            None => (self.open)(&self.path)?,
        };
        let result = read(&reader);
        self.readers.put(reader);
        result
    }

    pub fn volumes(&self) -> Arc<Volumes> {
        self.volumes.read().clone()
    }

    /// The frames of a block that is to be read.
    pub fn map(&self, number: u64) -> Result<Arc<BlockMap>> {
        let map = self.map_in_catalog(number)?;
        if self.volumes().first_present(&map.volumes).is_none() {
            // A volume may have been added, or mounted, since this was opened.
            let volumes = self.with_reader(Reader::volumes)?;
            let volumes = self.volumes().open_missing(volumes);
            *self.volumes.write() = Arc::new(volumes);
        }
        Ok(map)
    }

    /// The frames of a block. No volume is looked at, so that none can keep who asks.
    pub fn map_in_catalog(&self, number: u64) -> Result<Arc<BlockMap>> {
        if let Some(map) = self.maps.get(&number) {
            return Ok(map);
        }
        let row = self.with_reader(|reader| reader.block(number))?;
        let (mut plain_at, mut stored_at) = (0, 0);
        let frames = row.frames.into_iter().map(|frame| {
            let place = FramePlace { plain_at, stored_at, frame };
            plain_at += u64::from(frame.plain_len);
            stored_at += u64::from(frame.stored_len);
            place
        });
        let frames = frames.collect::<Vec<FramePlace>>();
        let map = Arc::new(BlockMap {
            number,
            id: row.id,
            volumes: row.volumes,
            frames,
            stored_len: stored_at,
        });
        if self.volumes().first_present(&map.volumes).is_some() {
            let bytes = size_of::<BlockMap>() + map.frames.len() * size_of::<FramePlace>();
            self.maps.put(number, map.clone(), bytes);
        }
        Ok(map)
    }

    /// The frames of a block, if no catalog has to be asked for them.
    pub fn known_map(&self, number: u64) -> Option<Arc<BlockMap>> {
        self.maps.get(&number)
    }

    /// One frame's plain bytes, from the cache or from a volume.
    pub fn frame(&self, map: &BlockMap, number: usize, place: &FramePlace) -> Result<Arc<Buffer>> {
        self.start_of_frame(map, number, place, place.len())
    }

    /// The first `len` plain bytes of a frame at least. Where no more are wanted often, what comes
    /// after them need not be decompressed.
    pub fn start_of_frame(
        &self,
        map: &BlockMap,
        number: usize,
        place: &FramePlace,
        len: usize,
    ) -> Result<Arc<Buffer>> {
        let saves = place.len().saturating_sub(len) >= SAVES_MIN;
        self.frames.get_or_load((map.number, number), len, |was_short| {
            let all = was_short || !saves || place.frame.codec == Codec::Raw;
            self.load(map, place, if all { place.len() } else { len })
        })
    }

    /// Loads a frame for who will ask for it.
    pub fn load_ahead(&self, map: &BlockMap, number: usize) {
        if let Some(place) = map.frames.get(number) {
            let key = (map.number, number);
            self.frames.load_ahead(key, place.len(), || self.load(map, place, place.len()));
        }
    }

    fn load(&self, map: &BlockMap, place: &FramePlace, len: usize) -> Result<Buffer> {
        let mut plain = self.buffers.take(len);
        if place.frame.codec == Codec::Raw {
            self.read_raw(map, place, &mut plain)?;
            return Ok(plain);
        }
        let mut stored = self.buffers.take(place.frame.stored_len as usize);
        self.read_copy(map, |volume| {
            volume.store.read_at(&map.id, place.stored_at, &mut stored)?;
            let decoded = match len == place.len() {
                true => place.frame.decode_to(&stored, &mut plain),
                false => place.frame.decode_start(&stored, &mut plain),
            };
            decoded.map_err(|e| e.context(place.name_in(map)))
        })?;
        Ok(plain)
    }

    /// Calls `read` with the volumes that have a block. Where that fails, there may be copies that
    /// were made, or volumes that came back, since the block was looked up.
    pub fn read_copy<T>(
        &self,
        map: &BlockMap,
        read: impl FnMut(&Volume) -> Result<T>,
    ) -> Result<T> {
        self.read_from_disk(map, read).map_err(|e| self.on_tape.explain(&map.id, e))
    }

    fn read_from_disk<T>(
        &self,
        map: &BlockMap,
        mut read: impl FnMut(&Volume) -> Result<T>,
    ) -> Result<T> {
        let error = match self.volumes().from_copies(&map.volumes, &map.id, &mut read) {
            Err(e) => e,
            ok => return ok,
        };
        let Ok(row) = self.with_reader(|reader| reader.block(map.number)) else {
            return Err(error);
        };
        let (volumes, row_volumes) = (self.volumes(), row.volumes);
        if row.id != map.id || row_volumes != map.volumes {
            self.maps.forget(&map.number);
        }
        let is_there = |it: &i64| volumes.get(*it).is_some();
        if row.id != map.id || row_volumes.iter().all(|it| map.volumes.contains(it)) {
            return Err(error);
        }
        let volumes = match row_volumes.iter().all(is_there) {
            true => volumes,
            false => {
                let configs = self.with_reader(Reader::volumes)?;
                let volumes = Arc::new(self.volumes().open_missing(configs));
                *self.volumes.write() = volumes.clone();
                volumes
            }
        };
        let others: Vec<i64> =
            row_volumes.iter().copied().filter(|it| !map.volumes.contains(it)).collect();
        volumes.from_copies(&others, &map.id, read).map_err(|_| error)
    }

    /// Fills `out` with a raw frame, past the cache: the system has its bytes cached.
    fn read_raw(&self, map: &BlockMap, place: &FramePlace, out: &mut [u8]) -> Result<()> {
        self.read_copy(map, |volume| {
            volume.store.read_at(&map.id, place.stored_at, out)?;
            place.frame.verify(out).map_err(|e| e.context(place.name_in(map)))
        })
    }

    /// Whether the copy of a block on `volume` is as it was written, where its raw frames cover
    /// `len` bytes from `offset` of the plain content on.
    pub fn is_sound(&self, map: &BlockMap, volume: &Volume, offset: u64, len: u64) -> bool {
        let frames = map.frames.iter().skip(map.frame_at(offset));
        let mut frames = frames.take_while(|it| it.plain_at < offset.saturating_add(len));
        frames.all(|place| {
            if place.frame.codec != Codec::Raw {
                return true;
            }
            let mut bytes = self.buffers.take(place.frame.stored_len as usize);
            let read = volume.store.read_at(&map.id, place.stored_at, &mut bytes);
            read.is_ok() && place.frame.verify(&bytes).is_ok()
        })
    }

    /// Fills `out` from a block's plain content. `in_row` says that more will be wanted.
    pub fn read(&self, map: &BlockMap, offset: u64, out: &mut [u8], in_row: bool) -> Result<()> {
        let mut at = offset;
        let mut out = out;
        let mut next = map.frame_at(offset);
        while !out.is_empty() {
            let place = map.frames.get(next).ok_or_else(|| map.ends())?;
            let rest = place.plain_end().saturating_sub(at);
            let here = usize::try_from(rest).unwrap_or(usize::MAX).min(out.len());
            if here == 0 {
                return Err(map.ends());
            }
            let (part, later) = out.split_at_mut(here);
            let from = place.index(at);
            let len = if in_row { place.len() } else { from + here };
            let plain = match place.is_whole_raw(here) {
                true => self.frames.get((map.number, next), len),
                false => Some(self.start_of_frame(map, next, place, len)?),
            };
            match plain {
                None => self.read_raw(map, place, part)?,
                Some(plain) => {
                    let source = plain.get(from..from + here);
                    part.copy_from_slice(source.ok_or_else(|| map.ends())?);
                }
            }
            out = later;
            at += here as u64;
            next += 1;
        }
        Ok(())
    }

    /// Says that stored bytes of a block will be read soon. Advice only.
    pub fn ask_for(&self, map: &BlockMap, stored_at: u64, len: u64) {
        if let Some(volume) = self.volumes().first_present(&map.volumes) {
            volume.store.will_need(&map.id, stored_at, len);
        }
    }
}

impl BlockMap {
    /// The number of the frame that holds the byte at `offset` of the plain content, or of the
    /// last frame.
    pub fn frame_at(&self, offset: u64) -> usize {
        self.frames.partition_point(|it| it.plain_at <= offset).saturating_sub(1)
    }

    /// The error for what lies beyond the end, or where no frame is known.
    pub fn ends(&self) -> Error {
        if self.frames.is_empty() {
            let message = format!(
                "block {}: its volume was not there when the catalog was rebuilt, so its frames \
                 are not known: connect it, and run raidtape rebuild-catalog --volumes with its \
                 directory",
                self.id
            );
            return Error::new(ErrorKind::Offline, message);
        }
        Error::corrupt(format!("block {}: offset beyond its end", self.id))
    }
}

impl FramePlace {
    pub fn plain_end(&self) -> u64 {
        self.plain_at + u64::from(self.frame.plain_len)
    }

    pub fn stored_end(&self) -> u64 {
        self.stored_at + u64::from(self.frame.stored_len)
    }

    /// Its plain length.
    pub fn len(&self) -> usize {
        self.frame.plain_len as usize
    }

    /// Where in it the byte at `at` of the block's plain content is.
    pub fn index(&self, at: u64) -> usize {
        usize::try_from(at.saturating_sub(self.plain_at)).unwrap_or(usize::MAX)
    }

    /// Whether `len` bytes of it are all of it, and lie on the volume as they are.
    pub fn is_whole_raw(&self, len: usize) -> bool {
        self.frame.codec == Codec::Raw && self.len() == len
    }

    /// Its name, for a message.
    pub fn name_in(&self, map: &BlockMap) -> String {
        format!("block {} at byte {}", map.id, self.stored_at)
    }
}
