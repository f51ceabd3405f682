//! Headers of members, in every format: what they say, as bytes and as numbers.
//!
//! Nothing is cut to fit: what a field cannot hold is an error of the one who encodes, and what is
//! no number where one has to be is an error of the archive.

use std::io;

use super::{NAME_BYTES_MAX, TRAILER};
use crate::error::{Error, Result};
use crate::sys::{self, Stat, c};

/// What an odc field of six octal digits holds at most, and one of eleven.
pub const ODC_6_MAX: u64 = (1 << 18) - 1;
pub const ODC_11_MAX: u64 = (1 << 33) - 1;
/// Length of every magic number but that of the old binary format, and of what follows it.
const MAGIC_BYTES: usize = 6;

/// The format of a member's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// 070707: the portable ASCII format.
    Odc,
    /// 070717: afio's with a longer inode number.
    Extended,
    /// 070727: afio's for what is too large for the others.
    Large,
    /// 070701.
    Newc,
    /// 070702: with a sum of the content's bytes.
    NewcSummed,
    /// 070707 as a 16-bit number, of either byte order.
    Binary {
        /// Whether the high byte of a number comes first.
        is_big_endian: bool,
    },
}

/// The metadata of a member.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Device and inode number: members that have both in common are one file.
    pub dev: u64,
    /// See `dev`.
    pub ino: u64,
    /// File type and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names.
    pub nlink: u64,
    /// The number of a device node.
    pub rdev: u64,
    /// Last change of the content, in seconds since 1970.
    pub mtime: i64,
    /// Length of the content in bytes; of a symbolic link the length of its target.
    pub size: u64,
}

impl Header {
    /// The header of a file. Its size is that of its content: none, but for regular files and
    /// symbolic links.
    pub fn of(stat: &Stat) -> Header {
        let has_content = matches!(stat.mode & c::S_IFMT, c::S_IFREG | c::S_IFLNK);
        Header {
            dev: stat.dev,
            ino: stat.ino,
            mode: stat.mode,
            uid: stat.uid,
            gid: stat.gid,
            nlink: stat.nlink,
            rdev: stat.rdev,
            mtime: stat.mtime.secs,
            size: if has_content { stat.size } else { 0 },
        }
    }

    /// Whether a file of this kind has content in an archive.
    pub fn may_have_content(&self) -> bool {
        matches!(self.mode & c::S_IFMT, c::S_IFREG | c::S_IFLNK)
    }

    /// Whether this is a device node.
    pub fn is_device(&self) -> bool {
        matches!(self.mode & c::S_IFMT, c::S_IFCHR | c::S_IFBLK)
    }

    /// The number of a device node. afio says one that is too long for `rdev` in `dev` and `ino`,
    /// and 0 in `rdev`.
    pub fn device(&self) -> u64 {
        match self.rdev {
            0 => self.dev.wrapping_shl(16) | (self.ino & 0xffff),
            rdev => rdev,
        }
    }

    /// Whether odc can say all of this.
    pub fn fits_odc(&self) -> bool {
        let small = [self.dev, self.ino, self.mode.into(), self.uid.into(), self.gid.into()];
        small.iter().chain([&self.nlink, &self.rdev]).all(|it| *it <= ODC_6_MAX)
            && u64::try_from(self.mtime).is_ok_and(|it| it <= ODC_11_MAX)
            && self.size <= ODC_11_MAX
    }

    /// Whether afio's large header can.
    pub fn fits_large(&self) -> bool {
        let max = u64::from(u32::MAX);
        [self.dev, self.nlink, self.rdev].iter().all(|it| *it <= max)
            && u64::from(self.mode) <= ODC_6_MAX
    }

    /// The header and the name, as they are in an archive; odc if that can say all of it.
    pub fn encode(&self, name: &[u8]) -> Result<Vec<u8>> {
        let len = name.len() + 1;
        if len > NAME_BYTES_MAX {
            return Err(Error::usage(format!("the name of a member has {len} bytes")));
        }
        let Header { dev, ino, mode, uid, gid, nlink, rdev, mtime, size } = self;
        let mut bytes = if self.fits_odc() {
            format!(
                "070707{dev:06o}{ino:06o}{mode:06o}{uid:06o}{gid:06o}{nlink:06o}{rdev:06o}\
                 {mtime:011o}{len:06o}{size:011o}"
            )
        } else if self.fits_large() {
            format!(
                "070727{dev:08X}{ino:016X}m{mode:06o}{uid:08X}{gid:08X}{nlink:08X}{rdev:08X}\
                 {mtime:016X}n{len:04X}00000000s{size:016X}:"
            )
        } else {
            return Err(Error::usage("no cpio header can hold the metadata of a member"));
        }
        .into_bytes();
        bytes.extend_from_slice(name);
        bytes.push(0);
        Ok(bytes)
    }

    /// The trailer of an archive.
    pub fn trailer() -> Result<Vec<u8>> {
        Header { nlink: 1, ..Header::default() }.encode(TRAILER)
    }
}

/// What a header says besides metadata.
pub struct Head {
    pub header: Header,
    pub format: Format,
    /// Length of the name, the NUL included.
    pub name_len: usize,
    /// Bytes after the name that do not matter.
    pub extra: u64,
    /// What the bytes of the content add up to.
    pub sum: Option<u32>,
    /// What the name is padded to, the header included, and the content.
    pub align: u64,
}

/// Reads a header: `fill` gives exactly the bytes asked for, or fails.
pub fn decode(fill: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<Head> {
    let mut magic = [0; MAGIC_BYTES];
    fill(&mut magic)?;
    let head = match &magic {
        b"070707" => decode_octal(fill, Format::Odc)?,
        b"070717" => decode_octal(fill, Format::Extended)?,
        b"070727" => decode_large(fill)?,
        b"070701" => decode_new(fill, Format::Newc)?,
        b"070702" => decode_new(fill, Format::NewcSummed)?,
        [0xc7, 0x71, ..] => decode_binary(fill, magic, false)?,
        [0x71, 0xc7, ..] => decode_binary(fill, magic, true)?,
        _ => return Err(Error::corrupt("no header of a cpio member")),
    };
    if head.header.size > i64::MAX.cast_unsigned() || head.name_len == 0 {
        return Err(Error::corrupt("a cpio header with an impossible length"));
    }
    if head.name_len > NAME_BYTES_MAX {
        return Err(Error::corrupt(format!("a member with a name of {} bytes", head.name_len)));
    }
    Ok(head)
}

/// Takes numbers from a header of fixed fields, one after another.
struct Fields<'a> {
    rest: &'a [u8],
}

impl Fields<'_> {
    fn number(&mut self, digits: usize, radix: u32) -> Result<u64> {
        let bad = || Error::corrupt("a field of a cpio header is no number");
        let (field, rest) = self.rest.split_at_checked(digits).ok_or_else(bad)?;
        self.rest = rest;
        let mut value = 0u64;
        for byte in field {
            let digit = char::from(*byte).to_digit(radix).ok_or_else(bad)?;
            value = value.wrapping_mul(radix.into()) + u64::from(digit);
        }
        Ok(value)
    }

    fn octal(&mut self, digits: usize) -> Result<u64> {
        self.number(digits, 8)
    }

    fn hex(&mut self, digits: usize) -> Result<u64> {
        self.number(digits, 16)
    }

    fn narrow(value: u64) -> Result<u32> {
        u32::try_from(value).map_err(|_| Error::corrupt("a field of a cpio header is too large"))
    }

    fn mark(&mut self, mark: u8) -> Result<()> {
        match self.rest.split_first() {
            Some((first, rest)) if *first == mark => {
                self.rest = rest;
                Ok(())
            }
            _ => Err(Error::corrupt("a mark in a large cpio header is missing")),
        }
    }
}

fn name_len(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn decode_octal(fill: &mut dyn FnMut(&mut [u8]) -> Result<()>, format: Format) -> Result<Head> {
    let ino_digits = if format == Format::Odc { 6 } else { 11 };
    let mut bytes = [0; 75];
    let bytes = bytes.get_mut(..64 + ino_digits).unwrap_or_default();
    fill(bytes)?;
    let mut it = Fields { rest: bytes };
    let header = Header {
        dev: it.octal(6)?,
        ino: it.octal(ino_digits)?,
        mode: Fields::narrow(it.octal(6)?)?,
        uid: Fields::narrow(it.octal(6)?)?,
        gid: Fields::narrow(it.octal(6)?)?,
        nlink: it.octal(6)?,
        rdev: it.octal(6)?,
        mtime: it.octal(11)?.cast_signed(),
        size: 0,
    };
    let name_len = name_len(it.octal(6)?);
    let header = Header { size: it.octal(11)?, ..header };
    Ok(Head { header, format, name_len, extra: 0, sum: None, align: 1 })
}

fn decode_large(fill: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<Head> {
    let mut bytes = [0; 110];
    fill(&mut bytes)?;
    let mut it = Fields { rest: &bytes };
    let (dev, ino) = (it.hex(8)?, it.hex(16)?);
    it.mark(b'm')?;
    let mut header = Header {
        dev,
        ino,
        mode: Fields::narrow(it.octal(6)?)?,
        uid: Fields::narrow(it.hex(8)?)?,
        gid: Fields::narrow(it.hex(8)?)?,
        nlink: it.hex(8)?,
        rdev: it.hex(8)?,
        mtime: it.hex(16)?.cast_signed(),
        size: 0,
    };
    it.mark(b'n')?;
    let (name_len, _flags, extra) = (name_len(it.hex(4)?), it.hex(4)?, it.hex(4)?);
    it.mark(b's')?;
    header.size = it.hex(16)?;
    it.mark(b':')?;
    Ok(Head { header, format: Format::Large, name_len, extra, sum: None, align: 1 })
}

fn decode_new(fill: &mut dyn FnMut(&mut [u8]) -> Result<()>, format: Format) -> Result<Head> {
    let mut bytes = [0; 104];
    fill(&mut bytes)?;
    let mut it = Fields { rest: &bytes };
    let mut values = [0; 13];
    for value in &mut values {
        *value = Fields::narrow(it.hex(8)?)?;
    }
    let [ino, mode, uid, gid, nlink, mtime, size, major, minor, rmajor, rminor, name, sum] = values;
    let header = Header {
        dev: sys::device_number(major, minor),
        ino: ino.into(),
        mode,
        uid,
        gid,
        nlink: nlink.into(),
        rdev: sys::device_number(rmajor, rminor),
        mtime: mtime.into(),
        size: size.into(),
    };
    let name_len = name_len(name.into());
    let is_file = mode & c::S_IFMT == c::S_IFREG;
    let sum = (format == Format::NewcSummed && is_file && size > 0).then_some(sum);
    Ok(Head { header, format, name_len, extra: 0, sum, align: 4 })
}

fn decode_binary(
    fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    magic: [u8; MAGIC_BYTES],
    is_big_endian: bool,
) -> Result<Head> {
    let mut bytes = [0; 26];
    let (start, rest) = bytes.split_at_mut(MAGIC_BYTES);
    start.copy_from_slice(&magic);
    fill(rest)?;
    let mut words = [0u16; 13];
    for (word, pair) in words.iter_mut().zip(bytes.chunks_exact(2)) {
        let pair = pair.try_into().unwrap_or_default();
        *word = if is_big_endian { u16::from_be_bytes(pair) } else { u16::from_le_bytes(pair) };
    }
    let [_, dev, ino, mode, uid, gid, nlink, rdev, time_1, time_2, name, size_1, size_2] = words;
    let long = |high: u16, low: u16| u32::from(high) << 16 | u32::from(low);
    let header = Header {
        dev: dev.into(),
        ino: ino.into(),
        mode: mode.into(),
        uid: uid.into(),
        gid: gid.into(),
        nlink: nlink.into(),
        rdev: rdev.into(),
        mtime: long(time_1, time_2).into(),
        size: long(size_1, size_2).into(),
    };
    let format = Format::Binary { is_big_endian };
    Ok(Head { header, format, name_len: name.into(), extra: 0, sum: None, align: 2 })
}

/// The error number that stands for an error of the operating system.
pub fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(c::EIO)
}
