//! Tape drives as the kernel's `st` driver has them, and the calls that tape images need.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// `struct mtop` of linux/mtio.h.
#[repr(C)]
struct Operation {
    op: libc::c_short,
    count: libc::c_int,
}

/// `struct mtget`.
#[repr(C)]
#[derive(Default)]
struct Get {
    kind: libc::c_long,
    residue: libc::c_long,
    registers: libc::c_long,
    status: libc::c_long,
    error: libc::c_long,
    file: libc::c_int,
    block: libc::c_int,
}

/// `struct mtpos`.
#[repr(C)]
#[derive(Default)]
struct Position {
    block: libc::c_long,
}

/// `struct sg_io_hdr` of scsi/sg.h.
#[repr(C)]
struct ScsiRequest {
    interface: libc::c_int,
    direction: libc::c_int,
    command_len: libc::c_uchar,
    sense_len_max: libc::c_uchar,
    iovec_count: libc::c_ushort,
    data_len: libc::c_uint,
    data: *mut libc::c_void,
    command: *const libc::c_uchar,
    sense: *mut libc::c_uchar,
    timeout_ms: libc::c_uint,
    flags: libc::c_uint,
    pack_id: libc::c_int,
    user: *mut libc::c_void,
    status: libc::c_uchar,
    masked_status: libc::c_uchar,
    message_status: libc::c_uchar,
    sense_len: libc::c_uchar,
    host_status: libc::c_ushort,
    driver_status: libc::c_ushort,
    residue: libc::c_int,
    duration_ms: libc::c_uint,
    info: libc::c_uint,
}

const MTIOCTOP: libc::Ioctl = libc::_IOW::<Operation>(b'm' as u32, 1);
const MTIOCGET: libc::Ioctl = libc::_IOR::<Get>(b'm' as u32, 2);
const MTIOCPOS: libc::Ioctl = libc::_IOR::<Position>(b'm' as u32, 3);
const SG_IO: libc::Ioctl = 0x2285;
const SG_DXFER_FROM_DEV: libc::c_int = -3;

/// What a drive can be told to do, by the numbers of linux/mtio.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Goes forward to behind as many filemarks.
    ForwardFiles = 1,
    /// Writes filemarks.
    WriteFilemarks = 5,
    /// Goes to the beginning.
    Rewind = 6,
    /// Goes to the beginning and gives the tape out.
    Unload = 7,
    /// Goes back to behind as many filemarks, less one.
    BackFilesBehind = 10,
    /// Goes to the end of data.
    EndOfData = 12,
    /// Sets the size of blocks; 0 is a variable one.
    SetBlockSize = 20,
    /// Goes to a position.
    Seek = 22,
    /// Lets the tape be taken out by hand. Moves nothing, and has the driver forget that it was
    /// writing.
    Unlock = 29,
}

/// What a drive tells without moving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// There is a tape in it.
    pub is_online: bool,
    /// The tape may not be written.
    pub is_protected: bool,
    /// It stands at the end of data.
    pub is_at_end_of_data: bool,
    /// Filemarks before this place, where the driver knows.
    pub file: Option<u64>,
}

/// Opens a drive. `is_look`: only to be asked; with a tape or without, that does not wait.
pub fn open(path: &Path, is_written: bool, is_look: bool) -> io::Result<File> {
    let flags = if is_look { libc::O_NONBLOCK } else { 0 };
    File::options().read(true).write(is_written).custom_flags(flags).open(path)
}

/// Closes a drive and tells whether that went well.
pub fn close(file: File) -> io::Result<()> {
    // SAFETY: the descriptor was this file's alone, and is not used after.
    #[allow(unsafe_code)]
    let result = unsafe { libc::close(file.into_raw_fd()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has a drive do something.
pub fn operate(file: &File, op: Op, count: i32) -> io::Result<()> {
    let operation = Operation { op: op as libc::c_short, count };
    // SAFETY: the kernel reads one `struct mtop`, which outlives the call.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), MTIOCTOP, &raw const operation) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Asks a drive how it is.
pub fn status(file: &File) -> io::Result<Status> {
    let mut get = Get::default();
    // SAFETY: the kernel writes one `struct mtget`, which outlives the call.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), MTIOCGET, &raw mut get) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let has = |bit: libc::c_long| get.status & bit != 0;
    Ok(Status {
        is_online: has(0x0100_0000) && !has(0x0004_0000),
        is_protected: has(0x0400_0000),
        is_at_end_of_data: has(0x0800_0000),
        file: u64::try_from(get.file).ok(),
    })
}

/// Asks a drive where it stands.
pub fn position(file: &File) -> io::Result<u64> {
    let mut position = Position::default();
    // SAFETY: the kernel writes one `struct mtpos`, which outlives the call.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), MTIOCPOS, &raw mut position) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    u64::try_from(position.block).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Whether the tape can only be appended to, where the drive tells: the mode page "medium
/// configuration", for which the driver has no call of its own.
pub fn is_worm(file: &File) -> Option<bool> {
    const PAGE: u8 = 0x1d;
    let mut data = [0u8; 64];
    let mut sense = [0u8; 32];
    // MODE SENSE(6) without a block descriptor: a head of four bytes, then the page.
    let command = [0x1a, 0x08, PAGE, 0, 64, 0];
    let mut request = ScsiRequest {
        interface: i32::from(b'S'),
        direction: SG_DXFER_FROM_DEV,
        command_len: 6,
        sense_len_max: 32,
        iovec_count: 0,
        data_len: 64,
        data: data.as_mut_ptr().cast(),
        command: command.as_ptr(),
        sense: sense.as_mut_ptr(),
        timeout_ms: 30_000,
        flags: 0,
        pack_id: 0,
        user: std::ptr::null_mut(),
        status: 0,
        masked_status: 0,
        message_status: 0,
        sense_len: 0,
        host_status: 0,
        driver_status: 0,
        residue: 0,
        duration_ms: 0,
        info: 0,
    };
    // SAFETY: the lengths are those of the three arrays, which outlive the call.
    #[allow(unsafe_code)]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), SG_IO, &raw mut request) };
    if result != 0 || request.status != 0 || request.host_status != 0 {
        return None;
    }
    let [_, _, _, descriptors, rest @ ..] = data;
    let page = rest.get(usize::from(descriptors)..)?;
    match page {
        [code, length, flags, ..] if code & 0x3f == PAGE && *length > 0 => Some(flags & 1 == 1),
        _ => None,
    }
}

/// Writes all of `pieces` at `offset`, one after another.
pub fn write_all_at(file: &File, pieces: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
    let mut left = pieces;
    let mut at = offset;
    // Drops the empty ones, which would be taken for no progress.
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        match rustix::io::pwritev(file, left, at) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                at += count as u64;
                IoSlice::advance_slices(&mut left, count);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Fills all of `pieces` from `offset` on, one after another, up to the end of the file; gives how
/// many bytes that were.
pub fn read_at(file: &File, pieces: &mut [IoSliceMut<'_>], offset: u64) -> io::Result<usize> {
    let mut left = pieces;
    let mut done = 0;
    IoSliceMut::advance_slices(&mut left, 0);
    while !left.is_empty() {
        match rustix::io::preadv(file, left, offset + done as u64) {
            Ok(0) => break,
            Ok(count) => {
                done += count;
                IoSliceMut::advance_slices(&mut left, count);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(done)
}
