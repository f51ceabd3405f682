//! A tape library for tests: drives that behave like LTO's, and a changer.
//!
//! It serves the kernel through TCMU (target_core_user), and tcm_loop shows it to the real `st`,
//! `sg` and `ch` drivers. Standard library only; `build` compiles it. What it answers follows SSC
//! and SMC. Left out: partitions, encryption, compression, buffering (so there are no true deferred
//! errors), times of motion, log pages.
//!
//! A cartridge warns early when a 32nd of its capacity is left, and at least 1 MiB.
//!
//! Lines for the pipe `$TAPE_CTL` (what came of them is in /run/tapevm/vtl.log):
//!
//! ```text
//! fault DEVICE OPCODE SKIP COUNT KEY ASC ASCQ [FLAGS]
//!     DEVICE: the drives from 0 on, then the changer; hexadecimal but for SKIP and COUNT
//!     fault 0 08 2 1 3 11 00      the third READ from now: medium error
//!     fault 0 0a 0 1 4 44 00      the next WRITE: hardware error (10 filemark, 2b locate)
//!     fault 2 a5 0 1 4 15 01      the next move of a cartridge, with two drives
//!     with key 1, a recovered error, the command is carried out
//! clear                           no faults any more
//! reset DRIVE                     as after a loss of its power
//! protect BARCODE, unprotect BARCODE
//! import BARCODE MIB [worm]       a new cartridge in a mail slot
//! export BARCODE
//! trace [off]                     every command in vtl.log
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{fence, Ordering};

extern "C" {
    fn mmap(addr: *mut u8, len: usize, prot: i32, flags: i32, fd: i32, off: i64) -> *mut u8;
    fn poll(fds: *mut PollFd, n: u64, timeout: i32) -> i32;
}
#[repr(C)]
struct PollFd {
    fd: i32,
    events: i16,
    revents: i16,
}

// ---------------------------------------------------------------- sense data
#[derive(Clone, Copy)]
struct Sense {
    key: u8,
    asc: u8,
    ascq: u8,
    flags: u8, // 0x80 filemark, 0x40 EOM, 0x20 ILI
    info: Option<i32>,
}
const fn sense(key: u8, asc: u8, ascq: u8) -> Sense {
    Sense { key, asc, ascq, flags: 0, info: None }
}
impl Sense {
    fn flag(mut self, f: u8) -> Self {
        self.flags |= f;
        self
    }
    fn info(mut self, v: i64) -> Self {
        self.info = Some(v as i32);
        self
    }
    fn bytes(&self) -> [u8; 18] {
        let mut b = [0u8; 18];
        b[0] = 0x70 | if self.info.is_some() { 0x80 } else { 0 };
        b[2] = self.flags | self.key;
        b[3..7].copy_from_slice(&self.info.unwrap_or(0).to_be_bytes());
        b[7] = 10;
        b[12] = self.asc;
        b[13] = self.ascq;
        b
    }
}
const FM: u8 = 0x80;
const EOM: u8 = 0x40;
const ILI: u8 = 0x20;
const INVALID_OP: Sense = sense(5, 0x20, 0);
const INVALID_FIELD: Sense = sense(5, 0x24, 0);
const NO_MEDIUM: Sense = sense(2, 0x3a, 0);
const WRITE_PROTECTED: Sense = sense(7, 0x27, 0);
const NOT_APPENDABLE: Sense = sense(7, 0x30, 0x0c); // WORM: overwrite attempted

// ------------------------------------------------------------- one SCSI command
struct Cmd<'a> {
    cdb: &'a [u8],
    iov: Vec<(*mut u8, usize)>,
}
impl Cmd<'_> {
    fn be16(&self, o: usize) -> usize {
        (self.cdb[o] as usize) << 8 | self.cdb[o + 1] as usize
    }
    fn be24(&self, o: usize) -> usize {
        (self.cdb[o] as usize) << 16 | self.be16(o + 1)
    }
    fn be32(&self, o: usize) -> usize {
        self.be16(o) << 16 | self.be16(o + 2)
    }
    fn be64(&self, o: usize) -> u64 {
        (self.be32(o) as u64) << 32 | self.be32(o + 4) as u64
    }
    fn len(&self) -> usize {
        self.iov.iter().map(|v| v.1).sum()
    }
    /// the parts of the data buffer that cover `off..off+len`
    fn parts(&self, mut off: usize, mut len: usize) -> Vec<(*mut u8, usize)> {
        let mut r = Vec::new();
        for &(p, n) in &self.iov {
            if len == 0 {
                break;
            }
            if off >= n {
                off -= n;
                continue;
            }
            let k = (n - off).min(len);
            // SAFETY: within the buffer that the kernel described
            r.push((unsafe { p.add(off) }, k));
            len -= k;
            off = 0;
        }
        r
    }
    fn data_out(&self, len: usize) -> Vec<u8> {
        let mut v = Vec::with_capacity(len);
        for (p, n) in self.parts(0, len) {
            // SAFETY: see parts()
            v.extend_from_slice(unsafe { std::slice::from_raw_parts(p, n) });
        }
        v
    }
    fn data_in(&self, d: &[u8], alloc: usize) -> Reply {
        let n = d.len().min(alloc).min(self.len());
        let mut o = 0;
        for (p, k) in self.parts(0, n) {
            // SAFETY: see parts()
            unsafe { std::slice::from_raw_parts_mut(p, k) }.copy_from_slice(&d[o..o + k]);
            o += k;
        }
        Reply { status: 0, sense: None, read_len: n }
    }
}
struct Reply {
    status: u8,
    sense: Option<Sense>,
    read_len: usize,
}
fn good() -> Reply {
    Reply { status: 0, sense: None, read_len: 0 }
}
fn check(s: Sense) -> Reply {
    Reply { status: 2, sense: Some(s), read_len: 0 }
}
impl From<Result<(), Sense>> for Reply {
    fn from(r: Result<(), Sense>) -> Reply {
        match r {
            Ok(()) => good(),
            Err(s) => check(s),
        }
    }
}

// ------------------------------------------------------------------ cartridge
// File: 64-byte head, then records: kind u8 ('D' or 'F'), 3 bytes 0, length
// u32 LE, data. The end of the file is the end of data.
const HEAD: u64 = 64;
const REC: u64 = 8;
struct Rec {
    off: u64, // of the data
    len: u32,
    fm: bool,
}
struct Cart {
    barcode: String,
    file: File,
    recs: Vec<Rec>,
    end: u64,
    capacity: u64, // bytes that fit, records' heads not counted
    used: u64,     // up to the end of data
    early: u64,    // distance of the early warning from the end
    protect: bool,
    worm: bool,
}
impl Cart {
    fn create(path: &Path, mib: u64, worm: bool) -> std::io::Result<()> {
        let mut h = [0u8; HEAD as usize];
        h[..8].copy_from_slice(b"VTLCART1");
        h[8..16].copy_from_slice(&(mib << 20).to_le_bytes());
        h[16] = worm as u8 * 2;
        fs::write(path, h)
    }
    fn load(path: &Path) -> std::io::Result<Cart> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut h = [0u8; HEAD as usize];
        file.read_exact_at(&mut h, 0)?;
        if &h[..8] != b"VTLCART1" {
            return Err(std::io::Error::other("not a cartridge"));
        }
        let capacity = u64::from_le_bytes(h[8..16].try_into().unwrap());
        let mut c = Cart {
            barcode: path.file_name().unwrap().to_string_lossy().into_owned(),
            recs: Vec::new(),
            end: HEAD,
            capacity,
            used: 0,
            early: (capacity / 32).clamp(1 << 20, 256 << 20).min(capacity / 2),
            protect: h[16] & 1 != 0,
            worm: h[16] & 2 != 0,
            file,
        };
        let size = c.file.metadata()?.len();
        let mut r = [0u8; REC as usize];
        while c.end + REC <= size && c.file.read_exact_at(&mut r, c.end).is_ok() {
            let len = u32::from_le_bytes(r[4..8].try_into().unwrap());
            if (r[0] != b'D' && r[0] != b'F') || c.end + REC + len as u64 > size {
                break;
            }
            c.recs.push(Rec { off: c.end + REC, len, fm: r[0] == b'F' });
            c.used += len as u64;
            c.end += REC + len as u64;
        }
        Ok(c)
    }
    fn save_flags(&self) {
        let _ = self.file.write_all_at(&[self.protect as u8 | (self.worm as u8) << 1], 16);
    }
    fn truncate(&mut self, pos: usize) {
        if pos < self.recs.len() {
            self.end = self.recs[pos].off - REC;
            self.used -= self.recs[pos..].iter().map(|r| r.len as u64).sum::<u64>();
            self.recs.truncate(pos);
            let _ = self.file.set_len(self.end);
        }
    }
    fn append(&mut self, parts: &[(*mut u8, usize)], fm: bool) -> std::io::Result<()> {
        let len: usize = parts.iter().map(|p| p.1).sum();
        let mut h = [0u8; REC as usize];
        h[0] = if fm { b'F' } else { b'D' };
        h[4..8].copy_from_slice(&(len as u32).to_le_bytes());
        let mut o = self.end + REC;
        for &(p, n) in parts {
            // SAFETY: see Cmd::parts()
            self.file.write_all_at(unsafe { std::slice::from_raw_parts(p, n) }, o)?;
            o += n as u64;
        }
        self.file.write_all_at(&h, self.end)?; // last: a cut leaves no half record
        self.recs.push(Rec { off: self.end + REC, len: len as u32, fm });
        self.used += len as u64;
        self.end = o;
        Ok(())
    }
    fn near_end(&self) -> bool {
        self.used + self.early >= self.capacity
    }
}

// ---------------------------------------------------------------------- faults
struct Fault {
    drive: usize,
    op: u8,
    skip: u64,
    count: u64,
    sense: Sense,
}

// ----------------------------------------------------------------------- drive
struct Drive {
    nr: usize,
    cart: Option<Cart>,
    ejected: bool, // the cartridge sits in the mouth of the drive
    pos: usize,
    block: u32,
    density: u8,
    compress: bool,
    prevent: bool,
    buffered: u8,
    ua: Vec<Sense>,
    last_sense: Option<Sense>,
}
const DENSITY: u8 = 0x5e; // LTO-8
const MAX_BLOCK: usize = 8 << 20;

fn inquiry_data(ty: u8, product: &str) -> Vec<u8> {
    let mut d = vec![0u8; 64];
    d[0] = ty;
    d[1] = 0x80;
    d[2] = 6; // SPC-4
    d[3] = 2;
    d[4] = d.len() as u8 - 5;
    d[7] = 2;
    d[8..36].copy_from_slice(format!("{:<8}{:<16}{:<4}", "TESTVTL", product, "0001").as_bytes());
    d
}
fn inquiry(c: &Cmd, ty: u8, product: &str, serial: &str) -> Reply {
    let alloc = c.be16(3);
    if c.cdb[1] & 1 == 0 {
        return if c.cdb[2] != 0 {
            check(INVALID_FIELD)
        } else {
            c.data_in(&inquiry_data(ty, product), alloc)
        };
    }
    let page: Vec<u8> = match c.cdb[2] {
        0x00 => {
            let mut p = vec![0x00, 0x80, 0x83];
            if ty == 1 {
                p.push(0xb0);
            }
            p
        }
        0x80 => serial.into(),
        0x83 => {
            let id = format!("{:<8}{:<16}{}", "TESTVTL", product, serial);
            let mut p = vec![2, 1, 0, id.len() as u8];
            p.extend_from_slice(id.as_bytes());
            p
        }
        0xb0 if ty == 1 => vec![1, 0], // WORM capable
        _ => return check(INVALID_FIELD),
    };
    let mut d = vec![ty, c.cdb[2], (page.len() >> 8) as u8, page.len() as u8];
    d.extend(page);
    c.data_in(&d, alloc)
}
fn mode_reply(c: &Cmd, mut dev_specific: u8, block_desc: &[u8], pages: &[(u8, Vec<u8>)]) -> Reply {
    let (want, dbd, ten) = (c.cdb[2] & 0x3f, c.cdb[1] & 8 != 0, c.cdb[0] == 0x5a);
    if c.cdb[2] >> 6 == 3 {
        return check(sense(5, 0x39, 0)); // saved values
    }
    if c.cdb[3] != 0 {
        return check(INVALID_FIELD);
    }
    let mut body = Vec::new();
    let mut found = want == 0 || want == 0x3f;
    for (code, p) in pages {
        if want == 0x3f || want == *code {
            found = true;
            body.push(*code);
            body.push(p.len() as u8);
            if c.cdb[2] >> 6 == 1 {
                body.extend(p.iter().map(|_| 0)); // changeable: says none
            } else {
                body.extend(p);
            }
        }
    }
    if !found {
        return check(INVALID_FIELD);
    }
    let bd: &[u8] = if dbd { &[] } else { block_desc };
    if block_desc.is_empty() {
        dev_specific = 0;
    }
    let mut d = Vec::new();
    if ten {
        let n = 6 + bd.len() + body.len();
        d.extend([(n >> 8) as u8, n as u8, 0, dev_specific, 0, 0, 0, bd.len() as u8]);
    } else {
        d.extend([(3 + bd.len() + body.len()) as u8, 0, dev_specific, bd.len() as u8]);
    }
    d.extend(bd);
    d.extend(body);
    c.data_in(&d, if ten { c.be16(7) } else { c.cdb[4] as usize })
}

impl Drive {
    fn new(nr: usize) -> Drive {
        Drive {
            nr,
            cart: None,
            ejected: false,
            pos: 0,
            block: 0,
            density: DENSITY,
            compress: true,
            prevent: false,
            buffered: 1,
            ua: vec![sense(6, 0x29, 0)],
            last_sense: None,
        }
    }
    fn insert(&mut self, c: Cart) {
        self.cart = Some(c);
        self.ejected = false;
        self.pos = 0;
        self.ua = vec![sense(6, 0x28, 0)];
    }
    fn medium(&mut self) -> Result<&mut Cart, Sense> {
        if self.ejected {
            return Err(NO_MEDIUM);
        }
        self.cart.as_mut().ok_or(NO_MEDIUM)
    }
    fn writable(&mut self) -> Result<(), Sense> {
        let pos = self.pos;
        let c = self.medium()?;
        if c.protect {
            return Err(WRITE_PROTECTED);
        }
        if c.worm && pos < c.recs.len() {
            return Err(NOT_APPENDABLE);
        }
        c.truncate(pos);
        Ok(())
    }

    fn command(&mut self, c: &Cmd) -> Reply {
        let op = c.cdb[0];
        // INQUIRY, REPORT LUNS and REQUEST SENSE go before a unit attention
        if !matches!(op, 0x12 | 0xa0 | 0x03) && !self.ua.is_empty() {
            let s = self.ua.remove(0);
            return check(s);
        }
        match op {
            0x00 => self.medium().map(|_| ()).into(),
            0x03 => {
                let s = self.last_sense.take().or(self.ua.pop()).unwrap_or(sense(0, 0, 0));
                c.data_in(&s.bytes(), c.cdb[4] as usize)
            }
            0x12 => inquiry(c, 1, "ULTRIUM-TD8", &format!("VTLDRIVE{:02}", self.nr)),
            0x05 => {
                let m = MAX_BLOCK as u32;
                c.data_in(&[0, (m >> 16) as u8, (m >> 8) as u8, m as u8, 0, 1], 6)
            }
            0x1a | 0x5a => {
                let wp = self.cart.as_ref().is_some_and(|k| !self.ejected && k.protect);
                let b = self.block;
                let bd = [self.density, 0, 0, 0, 0, (b >> 16) as u8, (b >> 8) as u8, b as u8];
                let mut comp = vec![0u8; 14];
                comp[0] = 0x40 | (self.compress as u8) << 7;
                comp[1] = 0x80;
                comp[5] = 1;
                comp[9] = 1;
                let mut conf = vec![0u8; 14];
                conf[6] = 0x40; // block identifiers supported
                conf[8] = 0x10; // end of data is defined
                conf[12] = self.compress as u8;
                let pages = [
                    (0x01, vec![0, 8, 0, 0, 0, 0, 8, 0, 0, 0]),
                    (0x02, vec![0; 14]),
                    (0x0a, vec![0; 10]),
                    (0x0f, comp),
                    (0x10, conf),
                    (0x11, vec![0, 0, 0, 3, 9, 0, 0, 0]),
                    // Medium configuration: whether it can only be appended to.
                    (
                        0x1d,
                        [vec![self.cart.as_ref().is_some_and(|k| k.worm) as u8], vec![0; 29]]
                            .concat(),
                    ),
                    (0x1c, vec![8, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                ];
                mode_reply(c, (self.buffered << 4) | if wp { 0x80 } else { 0 }, &bd, &pages)
            }
            0x15 | 0x55 => self.mode_select(c).into(),
            0x01 => {
                let r = self.medium().map(|_| ());
                if r.is_ok() {
                    self.pos = 0;
                }
                r.into()
            }
            0x08 => self.read(c),
            0x0a => self.write(c).into(),
            0x10 => self.write_filemarks(c).into(),
            0x11 => {
                let n = (c.be24(2) as i32) << 8 >> 8;
                self.space(c.cdb[1] & 0xf, n as i64).into()
            }
            0x91 => self.space(c.cdb[1] & 0xf, c.be64(4) as i64).into(),
            0x19 => self.writable().into(),
            0x1b => self.load_unload(c).into(),
            0x1e => {
                self.prevent = c.cdb[4] & 1 != 0;
                good()
            }
            0x2b => self.locate(0, c.be32(3) as u64).into(),
            0x92 => self.locate(c.cdb[1] >> 3 & 7, c.be64(4)).into(),
            0x34 => self.read_position(c),
            0x16 | 0x17 | 0x1d | 0x56 | 0x57 => good(), // RESERVE, RELEASE, SEND DIAGNOSTIC
            _ => check(INVALID_OP),
        }
    }

    fn mode_select(&mut self, c: &Cmd) -> Result<(), Sense> {
        let ten = c.cdb[0] == 0x55;
        let d = c.data_out((if ten { c.be16(7) } else { c.cdb[4] as usize }).min(c.len()));
        let (hl, bl, spec) = if ten {
            if d.len() < 8 {
                return Ok(());
            }
            (8, d[7] as usize, d[3])
        } else {
            if d.len() < 4 {
                return Ok(());
            }
            (4, d[3] as usize, d[2])
        };
        if d.len() < hl + bl {
            return Err(sense(5, 0x1a, 0));
        }
        let mut block = self.block;
        if bl >= 8 {
            let b = &d[hl..hl + 8];
            block = (b[5] as u32) << 16 | (b[6] as u32) << 8 | b[7] as u32;
            if block as usize > MAX_BLOCK {
                return Err(sense(5, 0x26, 0));
            }
            if !matches!(b[0], 0 | 0x7f | DENSITY) {
                return Err(sense(5, 0x26, 0));
            }
        }
        let mut i = hl + bl;
        let mut comp = self.compress;
        while i + 2 <= d.len() {
            let (code, n) = (d[i] & 0x3f, d[i + 1] as usize);
            if i + 2 + n > d.len() {
                return Err(sense(5, 0x1a, 0));
            }
            match code {
                0x0f => comp = d[i + 2] & 0x80 != 0,
                0x10 => comp = d[i + 2 + 12] != 0,
                _ => {}
            }
            i += 2 + n;
        }
        self.buffered = spec >> 4 & 7;
        self.block = block;
        self.compress = comp;
        Ok(())
    }

    fn read(&mut self, c: &Cmd) -> Reply {
        let (fixed, sili) = (c.cdb[1] & 1 != 0, c.cdb[1] & 2 != 0);
        let n = c.be24(2);
        let bs = self.block as usize;
        if fixed && (bs == 0 || sili) {
            return check(INVALID_FIELD);
        }
        let mut pos = self.pos;
        let cart = match self.medium() {
            Ok(k) => k,
            Err(s) => return check(s),
        };
        if n == 0 {
            return good();
        }
        let (count, want) = if fixed { (n, bs) } else { (1, n) };
        let mut done = 0usize;
        let mut out = good();
        for i in 0..count {
            let left = if fixed { count - i } else { want } as i64;
            let Some(r) = cart.recs.get(pos) else {
                out = check(sense(8, 0, 5).info(left));
                break;
            };
            pos += 1;
            if r.fm {
                out = check(sense(0, 0, 1).flag(FM).info(left));
                break;
            }
            let len = r.len as usize;
            let take = len.min(want);
            let mut o = r.off;
            for (p, k) in c.parts(done, take) {
                // SAFETY: see Cmd::parts()
                if cart
                    .file
                    .read_exact_at(unsafe { std::slice::from_raw_parts_mut(p, k) }, o)
                    .is_err()
                {
                    return check(sense(3, 0x11, 0));
                }
                o += k as u64;
            }
            done += take;
            if len != want && !(sili && len < want) {
                let info = if fixed { left } else { want as i64 - len as i64 };
                out = check(sense(0, 0, 0).flag(ILI).info(info));
                break;
            }
        }
        self.pos = pos;
        out.read_len = done;
        out
    }

    fn write(&mut self, c: &Cmd) -> Result<(), Sense> {
        let fixed = c.cdb[1] & 1 != 0;
        let n = c.be24(2);
        let bs = self.block as usize;
        if fixed && bs == 0 {
            return Err(INVALID_FIELD);
        }
        self.medium()?;
        if n == 0 {
            return Ok(());
        }
        self.writable()?;
        let (count, len) = if fixed { (n, bs) } else { (1, n) };
        if c.len() < count * len || len > MAX_BLOCK {
            return Err(INVALID_FIELD);
        }
        let cart = self.cart.as_mut().unwrap();
        for i in 0..count {
            if cart.used + len as u64 > cart.capacity {
                let left = if fixed { count - i } else { len };
                return Err(sense(0xd, 0, 2).flag(EOM).info(left as i64));
            }
            if cart.append(&c.parts(i * len, len), false).is_err() {
                return Err(sense(3, 0x0c, 0).info(if fixed { count - i } else { len } as i64));
            }
            self.pos = cart.recs.len();
        }
        if cart.near_end() {
            return Err(sense(0, 0, 2).flag(EOM).info(0));
        }
        Ok(())
    }

    fn write_filemarks(&mut self, c: &Cmd) -> Result<(), Sense> {
        let n = c.be24(2);
        self.medium()?;
        if n == 0 {
            let _ = self.cart.as_ref().unwrap().file.sync_data();
            return Ok(());
        }
        self.writable()?;
        let cart = self.cart.as_mut().unwrap();
        for _ in 0..n {
            cart.append(&[], true).map_err(|_| sense(3, 0x0c, 0))?;
            self.pos = cart.recs.len();
        }
        if cart.near_end() {
            return Err(sense(0, 0, 2).flag(EOM).info(0));
        }
        Ok(())
    }

    fn space(&mut self, code: u8, n: i64) -> Result<(), Sense> {
        let mut pos = self.pos;
        let cart = self.medium()?;
        let recs = &cart.recs;
        let mut left = n.abs();
        let r = match code {
            0 | 1 => loop {
                if left == 0 {
                    break Ok(());
                }
                if n > 0 {
                    let Some(r) = recs.get(pos) else { break Err(sense(8, 0, 5).info(left)) };
                    pos += 1;
                    if code == 0 && r.fm {
                        break Err(sense(0, 0, 1).flag(FM).info(left));
                    }
                    if code == 0 || r.fm {
                        left -= 1;
                    }
                } else {
                    if pos == 0 {
                        break Err(sense(0, 0, 4).flag(EOM).info(left));
                    }
                    pos -= 1;
                    if code == 0 && recs[pos].fm {
                        break Err(sense(0, 0, 1).flag(FM).info(left));
                    }
                    if code == 0 || recs[pos].fm {
                        left -= 1;
                    }
                }
            },
            3 => {
                pos = recs.len();
                Ok(())
            }
            _ => Err(INVALID_FIELD),
        };
        self.pos = pos;
        r
    }

    fn locate(&mut self, kind: u8, n: u64) -> Result<(), Sense> {
        let cart = self.medium()?;
        let len = cart.recs.len();
        let (pos, ok) = match kind {
            0 => ((n as usize).min(len), n as usize <= len),
            1 if n == 0 => (0, true),
            1 => match cart.recs.iter().enumerate().filter(|(_, r)| r.fm).nth(n as usize - 1) {
                Some((i, _)) => (i + 1, true),
                None => (len, false),
            },
            3 => (len, true),
            _ => return Err(INVALID_FIELD),
        };
        self.pos = pos;
        if ok {
            Ok(())
        } else {
            Err(sense(8, 0, 5))
        }
    }

    fn read_position(&mut self, c: &Cmd) -> Reply {
        let pos = self.pos;
        let cart = match self.medium() {
            Ok(k) => k,
            Err(s) => return check(s),
        };
        let bop = if pos == 0 { 0x80 } else { 0 };
        let eop = if cart.near_end() && pos == cart.recs.len() { 0x40 } else { 0 };
        let mut d;
        match c.cdb[1] & 0x1f {
            0 | 1 => {
                d = vec![0u8; 20];
                d[0] = bop | eop | 0x30; // nothing is known of the buffer
                d[4..8].copy_from_slice(&(pos as u32).to_be_bytes());
                d[8..12].copy_from_slice(&(pos as u32).to_be_bytes());
            }
            6 => {
                d = vec![0u8; 32];
                d[0] = bop | eop;
                d[8..16].copy_from_slice(&(pos as u64).to_be_bytes());
                let files = cart.recs[..pos].iter().filter(|r| r.fm).count() as u64;
                d[16..24].copy_from_slice(&files.to_be_bytes());
            }
            8 => {
                d = vec![0u8; 32];
                d[0] = bop | eop | 0x30;
                d[3] = 28;
                d[8..16].copy_from_slice(&(pos as u64).to_be_bytes());
                d[16..24].copy_from_slice(&(pos as u64).to_be_bytes());
            }
            _ => return check(INVALID_FIELD),
        }
        let n = d.len();
        c.data_in(&d, n)
    }

    fn load_unload(&mut self, c: &Cmd) -> Result<(), Sense> {
        if self.cart.is_none() {
            return Err(NO_MEDIUM);
        }
        if c.cdb[4] & 1 != 0 {
            if self.ejected {
                self.ejected = false;
                self.ua.push(sense(6, 0x28, 0));
            }
        } else {
            if self.prevent {
                return Err(sense(5, 0x53, 2));
            }
            self.ejected = true;
        }
        self.pos = 0;
        Ok(())
    }
}

// ------------------------------------------------------------------- the library
#[derive(Clone, Default)]
struct Element {
    addr: u16,
    kind: u8, // 1 robot, 2 slot, 3 mail slot, 4 drive
    barcode: Option<String>,
    source: u16,
}
struct Library {
    dir: PathBuf,
    drives: Vec<Drive>,
    elements: Vec<Element>,
    ua: Vec<Sense>,
    faults: Vec<Fault>,
    trace: bool,
}
const ROBOT: u16 = 1;
const MAIL: u16 = 16;
const DRIVE: u16 = 256;
const SLOT: u16 = 1000;

impl Library {
    fn state_file(&self) -> PathBuf {
        self.dir.join(".library")
    }
    fn save(&self) {
        let mut s = String::new();
        for e in &self.elements {
            if let Some(b) = &e.barcode {
                s += &format!("{} {} {}\n", e.addr, e.source, b);
            }
        }
        let _ = fs::write(self.state_file(), s);
    }
    fn put(&mut self, i: usize, barcode: String, source: u16) -> Result<(), Sense> {
        if self.elements[i].kind == 4 {
            let cart = Cart::load(&self.dir.join(&barcode)).map_err(|_| sense(4, 0x15, 1))?;
            self.drives[(self.elements[i].addr - DRIVE) as usize].insert(cart);
        }
        self.elements[i].barcode = Some(barcode);
        self.elements[i].source = source;
        Ok(())
    }
    fn index(&self, addr: usize) -> Option<usize> {
        self.elements.iter().position(|e| e.addr as usize == addr)
    }

    fn changer(&mut self, c: &Cmd) -> Reply {
        let op = c.cdb[0];
        if !matches!(op, 0x12 | 0xa0 | 0x03) && !self.ua.is_empty() {
            return check(self.ua.remove(0));
        }
        match op {
            0x00 | 0x07 | 0x37 | 0x16 | 0x17 | 0x1d | 0x1e | 0x2b => good(),
            0x03 => c.data_in(&sense(0, 0, 0).bytes(), c.cdb[4] as usize),
            0x12 => inquiry(c, 8, "VLIB", "VTLCHANGER01"),
            0x1a | 0x5a => {
                let n = |k| self.elements.iter().filter(|e| e.kind == k).count() as u16;
                let mut a = Vec::new();
                for v in [ROBOT, n(1), SLOT, n(2), MAIL, n(3), DRIVE, n(4), 0] {
                    a.extend(v.to_be_bytes());
                }
                let mut caps = vec![0u8; 18];
                caps[0] = 0x0e;
                caps[3..6].copy_from_slice(&[0x0e; 3]);
                mode_reply(c, 0, &[], &[(0x1d, a), (0x1e, vec![0, 0]), (0x1f, caps)])
            }
            0xa5 => self.move_medium(c).into(),
            0xb8 => self.element_status(c),
            _ => check(INVALID_OP),
        }
    }

    fn move_medium(&mut self, c: &Cmd) -> Result<(), Sense> {
        let bad = sense(5, 0x21, 1); // invalid element address
        let (s, d) = (self.index(c.be16(4)).ok_or(bad)?, self.index(c.be16(6)).ok_or(bad)?);
        let Some(barcode) = self.elements[s].barcode.clone() else {
            return Err(sense(5, 0x3b, 0x0e));
        };
        if s == d {
            return Ok(());
        }
        if self.elements[d].barcode.is_some() {
            return Err(sense(5, 0x3b, 0x0d));
        }
        if self.elements[d].kind == 1 {
            return Err(bad);
        }
        let from = self.elements[s].addr;
        let back = self.elements[s].source;
        if self.elements[s].kind == 4 {
            let dr = &mut self.drives[(from - DRIVE) as usize];
            if dr.prevent && !dr.ejected {
                return Err(sense(5, 0x53, 2));
            }
            dr.cart = None;
            dr.ejected = false;
            dr.pos = 0;
        }
        // where it came from: a slot keeps that for as long as it is in a drive
        let source = if self.elements[s].kind == 4 { back } else { from };
        self.elements[s].barcode = None;
        self.elements[s].source = 0;
        let r = self.put(d, barcode, source);
        self.save();
        r
    }

    fn element_status(&self, c: &Cmd) -> Reply {
        let (voltag, kind) = (c.cdb[1] & 0x10 != 0, c.cdb[1] & 0xf);
        let (start, number, dvcid) = (c.be16(2), c.be16(4), c.cdb[6] & 1 != 0);
        let mut pages: Vec<u8> = Vec::new();
        let (mut first, mut total) = (0u16, 0usize);
        for k in [1u8, 2, 3, 4] {
            if kind != 0 && kind != k {
                continue;
            }
            let mut descs = Vec::new();
            let mut size = 0;
            for e in self.elements.iter().filter(|e| e.kind == k && e.addr as usize >= start) {
                if total >= number {
                    break;
                }
                if total == 0 {
                    first = e.addr;
                }
                total += 1;
                let mut d = vec![0u8; 12];
                d[..2].copy_from_slice(&e.addr.to_be_bytes());
                d[2] = e.barcode.is_some() as u8;
                match k {
                    2 => d[2] |= 0x08,
                    3 => d[2] |= 0x38,
                    4 => {
                        let dr = &self.drives[(e.addr - DRIVE) as usize];
                        if e.barcode.is_none() || dr.ejected {
                            d[2] |= 0x08;
                        }
                    }
                    _ => {}
                }
                if e.source != 0 {
                    d[9] = 0x80;
                    d[10..12].copy_from_slice(&e.source.to_be_bytes());
                }
                if voltag {
                    let mut t = format!("{:<32}", e.barcode.as_deref().unwrap_or("")).into_bytes();
                    if e.barcode.is_none() {
                        t.fill(0);
                    }
                    t.resize(36, 0);
                    d.extend(t);
                }
                if dvcid && k == 4 {
                    let id = format!(
                        "{:<8}{:<16}{:<10}",
                        "TESTVTL",
                        "ULTRIUM-TD8",
                        format!("VTLDRIVE{:02}", e.addr - DRIVE)
                    );
                    d.extend([2, 1, 0, id.len() as u8]);
                    d.extend(id.into_bytes());
                } else {
                    d.extend([0; 4]);
                }
                size = d.len();
                descs.extend(d);
            }
            if !descs.is_empty() {
                pages.extend([k, if voltag { 0x80 } else { 0 }, (size >> 8) as u8, size as u8, 0]);
                pages.extend(&(descs.len() as u32).to_be_bytes()[1..]);
                pages.extend(descs);
            }
        }
        let mut d = Vec::new();
        d.extend(first.to_be_bytes());
        d.extend((total as u16).to_be_bytes());
        d.push(0);
        d.extend(&(pages.len() as u32).to_be_bytes()[1..]);
        d.extend(pages);
        c.data_in(&d, c.be24(7))
    }

    /// one command for device `n` (drives first, then the changer)
    fn dispatch(&mut self, n: usize, c: &Cmd) -> Reply {
        if let Some(i) = self.faults.iter().position(|f| f.drive == n && f.op == c.cdb[0]) {
            let f = &mut self.faults[i];
            if f.skip > 0 {
                f.skip -= 1;
            } else {
                let s = f.sense;
                f.count -= 1;
                if f.count == 0 {
                    self.faults.remove(i);
                }
                if s.key != 1 {
                    return check(s);
                }
                // a recovered error: the command was carried out
                let r = self.carry_out(n, c);
                return if r.status == 0 {
                    Reply { status: 2, sense: Some(s), read_len: r.read_len }
                } else {
                    r
                };
            }
        }
        self.carry_out(n, c)
    }
    fn carry_out(&mut self, n: usize, c: &Cmd) -> Reply {
        if n < self.drives.len() {
            self.drives[n].command(c)
        } else {
            self.changer(c)
        }
    }

    /// a line from the control pipe; see README.md
    fn control(&mut self, line: &str) {
        let w: Vec<&str> = line.split_whitespace().collect();
        let hex = |s: &str| u8::from_str_radix(s.trim_start_matches("0x"), 16).ok();
        let done = (|| -> Option<()> {
            match *w.first()? {
                "fault" => {
                    let mut s = sense(hex(w.get(5)?)?, hex(w.get(6)?)?, hex(w.get(7)?)?);
                    s.flags = w.get(8).and_then(|f| hex(f)).unwrap_or(0);
                    self.faults.push(Fault {
                        drive: w.get(1)?.parse().ok()?,
                        op: hex(w.get(2)?)?,
                        skip: w.get(3)?.parse().ok()?,
                        count: w.get(4)?.parse::<u64>().ok()?.max(1),
                        sense: s,
                    });
                }
                "clear" => self.faults.clear(),
                "protect" | "unprotect" => {
                    let on = w[0] == "protect";
                    let b = *w.get(1)?;
                    if let Some(d) = self
                        .drives
                        .iter_mut()
                        .find(|d| d.cart.as_ref().is_some_and(|k| k.barcode == b))
                    {
                        let k = d.cart.as_mut()?;
                        k.protect = on;
                        k.save_flags();
                    } else {
                        let mut k = Cart::load(&self.dir.join(b)).ok()?;
                        k.protect = on;
                        k.save_flags();
                    }
                }
                // reset DRIVE: as after a power cycle of the drive
                "reset" => {
                    let d = self.drives.get_mut(w.get(1)?.parse::<usize>().ok()?)?;
                    d.pos = 0;
                    d.prevent = false;
                    d.block = 0;
                    d.ua = vec![sense(6, 0x29, 1)];
                }
                // import BARCODE MIB [worm]: a new cartridge in the first free mail slot
                "import" => {
                    let b = w.get(1)?.to_string();
                    let p = self.dir.join(&b);
                    if !p.exists() {
                        Cart::create(&p, w.get(2)?.parse().ok()?, w.get(3) == Some(&"worm"))
                            .ok()?;
                    }
                    let i =
                        self.elements.iter().position(|e| e.kind == 3 && e.barcode.is_none())?;
                    self.put(i, b, 0).ok()?;
                    self.ua.push(sense(6, 0x28, 1));
                    self.save();
                }
                // export BARCODE: take a cartridge out of a mail slot
                "export" => {
                    let i = self
                        .elements
                        .iter()
                        .position(|e| e.kind == 3 && e.barcode.as_deref() == w.get(1).copied())?;
                    self.elements[i].barcode = None;
                    self.ua.push(sense(6, 0x28, 1));
                    self.save();
                }
                "trace" => self.trace = w.get(1) != Some(&"off"),
                _ => return None,
            }
            Some(())
        })();
        eprintln!(
            "vtl: control '{}' {}",
            line.trim(),
            if done.is_some() { "done" } else { "REFUSED" }
        );
    }
}

// ------------------------------------------------------------------- TCMU ring
struct Ring {
    file: File,
    map: *mut u8,
}
impl Ring {
    fn open(uio: &str) -> Ring {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/dev/{uio}"))
            .expect("uio device");
        let size =
            fs::read_to_string(format!("/sys/class/uio/{uio}/maps/map0/size")).expect("map size");
        let size =
            usize::from_str_radix(size.trim().trim_start_matches("0x"), 16).expect("map size");
        // SAFETY: a fresh shared mapping of the ring
        let map = unsafe { mmap(std::ptr::null_mut(), size, 3, 1, file.as_raw_fd(), 0) };
        assert!(map as isize != -1, "mmap of the ring");
        Ring { file, map }
    }
    fn u32(&self, off: usize) -> u32 {
        // SAFETY: offsets of the mailbox and of entries that the kernel put in the ring
        unsafe { std::ptr::read_volatile(self.map.add(off) as *const u32) }
    }
    fn set_u32(&self, off: usize, v: u32) {
        // SAFETY: see u32()
        unsafe { std::ptr::write_volatile(self.map.add(off) as *mut u32, v) }
    }
    fn serve(&self, lib: &mut Library, dev: usize) {
        let (cmdr, size) = (self.u32(4) as usize, self.u32(8) as usize);
        let mut any = false;
        loop {
            let (head, tail) = (self.u32(12) as usize, self.u32(64) as usize);
            fence(Ordering::Acquire);
            if head == tail {
                break;
            }
            any = true;
            let e = cmdr + tail;
            let len_op = self.u32(e);
            if len_op & 7 == 1 {
                self.entry(lib, dev, e);
            }
            fence(Ordering::Release);
            self.set_u32(64, ((tail + (len_op & !7) as usize) % size) as u32);
        }
        if any {
            let _ = (&self.file).write_all(&[0; 4]);
        }
    }
    fn entry(&self, lib: &mut Library, dev: usize, e: usize) {
        let cdb_off = self.u32(e + 24) as usize;
        // SAFETY: the kernel leaves a whole CDB there
        let raw = unsafe { std::slice::from_raw_parts(self.map.add(cdb_off), 16) };
        let mut cdb = [0u8; 16];
        cdb.copy_from_slice(raw);
        let n = match cdb[0] >> 5 {
            0 => 6,
            1 | 2 => 10,
            5 => 12,
            _ => 16,
        };
        cdb[n..].fill(0);
        let iov = (0..self.u32(e + 8) as usize)
            .map(|i| {
                let v = e + 48 + 16 * i;
                // SAFETY: offsets into the data area, as the kernel described them
                (unsafe { self.map.add(self.u32(v) as usize) }, self.u32(v + 8) as usize)
            })
            .collect();
        let c = Cmd { cdb: &cdb, iov };
        let r = lib.dispatch(dev, &c);
        if lib.trace {
            let s = r.sense.map_or(String::new(), |s| {
                format!(
                    " sense {:x}/{:02x}/{:02x} flags {:02x} info {:?}",
                    s.key, s.asc, s.ascq, s.flags, s.info
                )
            });
            eprintln!(
                "vtl: dev {dev} {:02x?} data {} -> {} read {}{s}",
                &cdb[..n],
                c.len(),
                r.status,
                r.read_len
            );
        }
        // the answer overlays the request
        let mut rsp = [0u8; 104];
        rsp[0] = r.status;
        rsp[4..8].copy_from_slice(&(r.read_len as u32).to_le_bytes());
        if let Some(s) = r.sense {
            rsp[8..26].copy_from_slice(&s.bytes());
            if let Some(d) = lib.drives.get_mut(dev) {
                d.last_sense = Some(s);
            }
        }
        // SAFETY: inside the entry, which is at least 112 bytes
        unsafe {
            std::ptr::copy_nonoverlapping(rsp.as_ptr(), self.map.add(e + 8), rsp.len());
            let uflags = self.map.add(e + 7);
            *uflags = if r.read_len > 0 { 2 } else { 0 };
        }
    }
}

fn main() {
    let mut o: BTreeMap<String, String> = BTreeMap::new();
    let mut uio = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(a) = args.next() {
        match a.strip_prefix("--") {
            Some(k) => {
                o.insert(k.into(), args.next().unwrap_or_default());
            }
            None => uio.push(a),
        }
    }
    let num = |k: &str, d: u64| o.get(k).and_then(|v| v.parse().ok()).unwrap_or(d);
    let (drives, slots, carts, mib) =
        (num("drives", 2), num("slots", 6), num("cartridges", 4), num("mib", 1024));
    let prefix = o.get("prefix").cloned().unwrap_or("TVM".into());
    let dir = PathBuf::from(o.get("dir").expect("--dir"));
    assert_eq!(
        uio.len() as u64,
        drives + 1,
        "one uio device for each drive and one for the changer"
    );

    let mut lib = Library {
        dir: dir.clone(),
        drives: (0..drives as usize).map(Drive::new).collect(),
        elements: Vec::new(),
        ua: vec![sense(6, 0x29, 0)],
        faults: Vec::new(),
        trace: o.contains_key("trace"),
    };
    for (kind, addr, n) in
        [(1, ROBOT, 1), (3, MAIL, num("mail", 2)), (4, DRIVE, drives), (2, SLOT, slots)]
    {
        lib.elements.extend((0..n as u16).map(|i| Element {
            addr: addr + i,
            kind,
            ..Default::default()
        }));
    }
    // cartridges stay where an earlier run left them; the others go to free slots
    for l in fs::read_to_string(lib.state_file()).unwrap_or_default().lines() {
        let w: Vec<&str> = l.split(' ').collect();
        if let (Some(i), true) = (lib.index(w[0].parse().unwrap_or(0)), dir.join(w[2]).exists()) {
            let _ = lib.put(i, w[2].into(), w[1].parse().unwrap_or(0));
        }
    }
    for i in 1..=carts {
        let b = format!("{prefix}{i:0w$}L8", w = 6usize.saturating_sub(prefix.len()));
        if !dir.join(&b).exists() {
            Cart::create(&dir.join(&b), mib, false).expect("new cartridge");
        }
    }
    let mut names: Vec<String> = fs::read_dir(&dir)
        .expect("--dir")
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    for b in names {
        if b.starts_with('.')
            || b == "lost+found"
            || lib.elements.iter().any(|e| e.barcode.as_ref() == Some(&b))
        {
            continue;
        }
        if let Some(i) = lib.elements.iter().position(|e| e.kind == 2 && e.barcode.is_none()) {
            let _ = lib.put(i, b, 0);
        }
    }
    lib.save();

    let rings: Vec<Ring> = uio.iter().map(|u| Ring::open(u)).collect();
    let mut fds: Vec<PollFd> =
        rings.iter().map(|r| PollFd { fd: r.file.as_raw_fd(), events: 1, revents: 0 }).collect();
    // the control pipe is opened for both sides, so that it never reports an end
    let control = o.get("control").map(|p| {
        OpenOptions::new().read(true).write(true).custom_flags(0o4000).open(p).expect("--control")
    });
    if let Some(f) = &control {
        fds.push(PollFd { fd: f.as_raw_fd(), events: 1, revents: 0 });
    }
    eprintln!("vtl: ready");
    let mut pending = String::new();
    loop {
        // SAFETY: fds is a valid array of that length
        unsafe { poll(fds.as_mut_ptr(), fds.len() as u64, -1) };
        if let (Some(mut f), Some(true)) =
            (control.as_ref(), fds.get(rings.len()).map(|p| p.revents != 0))
        {
            let mut b = [0u8; 4096];
            if let Ok(n) = f.read(&mut b) {
                pending += &String::from_utf8_lossy(&b[..n]);
                while let Some(i) = pending.find('\n') {
                    let l: String = pending.drain(..=i).collect();
                    lib.control(&l);
                }
            }
        }
        for (i, r) in rings.iter().enumerate() {
            if fds[i].revents != 0 {
                let _ = (&r.file).read(&mut [0u8; 4]);
                r.serve(&mut lib, i);
            }
        }
    }
}
