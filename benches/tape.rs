//! How fast a tape drive is written and read, and a job written to it, beside `dd` with the same
//! bytes and blocks.
//!
//!     cargo bench --bench tape -- [DRIVE [MIB [ROUNDS]]]
//!
//! DRIVE is a device, whose tape is written over, or the name of an image to be made; without it
//! the image is a temporary one. The two take turns, and the ratios are taken within a round.
//!
//! With an image it ends with what a drive that cannot wait would meet: one of 250 MiB/s, fed by a
//! volume of 400 MiB/s that gives nothing for a while after every 512 MiB.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation
)]

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use raidtape::error::Result;

use raidtape::progress::Progress;
use raidtape::tape::cpio::Header;
use raidtape::tape::drive::{Access, BlockSize, Drive, Moved, Read, State, Wrote};
use raidtape::tape::image::Image;
use raidtape::tape::label::Label;
use raidtape::tape::loaded::Loaded;
use raidtape::tape::medium::Medium;
use raidtape::tape::spool::Spool;
use raidtape::tape::spool::job::JobKind;
use raidtape::tape::spool::text::Fields;
use raidtape::tape::write::{Add, Files, Settings, Work, Writer};

const BLOCK: usize = 256 << 10;
const NAMES: [&str; 3] = ["write", "read", "job"];

/// What is done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Write,
    Read,
    /// Written as a job of one file, with all that belongs to it.
    Job,
}

/// What is measured: who, to or from where.
struct Place {
    source: PathBuf,
    drive: PathBuf,
    /// Where `dd` writes.
    plain: PathBuf,
    is_device: bool,
}

fn main() {
    // Cargo adds an argument of its own.
    let args: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    let number = |at: usize, default| args.get(at).map_or(default, |it| it.parse().unwrap());
    let (mib, rounds) = (number(1, 1024), number(2, 5));
    let dir = tempfile::Builder::new().prefix("raidtape-bench-").tempdir().unwrap();
    let memory = tempfile::Builder::new().prefix("raidtape-bench-").tempdir_in("/dev/shm").unwrap();
    let source = memory.path().join("source");
    let mut random = File::open("/dev/urandom").unwrap().take(mib << 20);
    std::io::copy(&mut random, &mut File::create(&source).unwrap()).unwrap();
    let drive = args.first().map_or_else(|| dir.path().join("a.tap"), PathBuf::from);
    let is_device = drive.starts_with("/dev/") && drive.exists();
    let plain = if is_device { drive.clone() } else { drive.with_extension("plain") };
    let place = Place { source, drive, plain, is_device };
    let mut ratios = [Vec::new(), Vec::new(), Vec::new()];
    for round in 0..rounds {
        // What is measured, what ours took and what the other took, in seconds.
        let mut times = [[0.0; 2]; 3];
        for turn in 0..2 {
            let is_ours = (turn + round) % 2 == 0;
            let run = if is_ours { Place::ours } else { Place::dd };
            for (times, what) in times.iter_mut().zip([What::Write, What::Read, What::Job]) {
                place.prepare(what);
                let begun = Instant::now();
                run(&place, what);
                times[usize::from(!is_ours)] = begun.elapsed().as_secs_f64();
            }
        }
        for ((name, times), ratios) in NAMES.iter().zip(times).zip(&mut ratios) {
            let [ours, theirs] = times.map(|it| mib as f64 / it);
            println!("{name}: {ours:.0} MiB/s, dd {theirs:.0} MiB/s");
            ratios.push(ours / theirs);
        }
    }
    if !is_device {
        for stall in [0.0, 0.5, 0.9, 2.0] {
            place.prepare(What::Job);
            place.stalled(stall);
        }
    }
    for (name, mut ratios) in NAMES.iter().zip(ratios) {
        ratios.sort_by(f64::total_cmp);
        println!("{name}: {:.2} of dd, the median of {rounds}", ratios[ratios.len() / 2]);
    }
}

impl Place {
    /// A device is at the beginning of its tape; for a job there is a label.
    fn prepare(&self, what: What) {
        if what == What::Job {
            if !self.is_device {
                let _ = std::fs::remove_file(&self.drive);
                Image::create(&self.drive, &Medium::default()).unwrap();
            }
            let mut loaded = Loaded::open(&self.drive, Access::Write).unwrap();
            loaded.write_label(&Label::new("bench").unwrap()).unwrap();
            loaded.close().unwrap();
        }
        if self.is_device {
            let mut drive = raidtape::tape::open(&self.drive, Access::Read).unwrap();
            drive.rewind().unwrap();
            drive.close().unwrap();
        }
    }

    fn ours(&self, what: What) {
        let is_write = what == What::Write;
        if what == What::Job {
            return self.job();
        }
        // As that of `dd`, which a device can take as it is.
        let mut memory = vec![0; BLOCK + 4096];
        let start = memory.as_ptr().align_offset(4096);
        let buffer = &mut memory[start..start + BLOCK];
        if !is_write {
            let mut drive = raidtape::tape::open(&self.drive, Access::Read).unwrap();
            while matches!(drive.read(buffer).unwrap(), Read::Block(_)) {}
            return drive.close().unwrap();
        }
        if !self.is_device {
            // As `dd` does it, the old one goes.
            let _ = std::fs::remove_file(&self.drive);
            Image::create(&self.drive, &Medium::default()).unwrap();
        }
        let mut source = File::open(&self.source).unwrap();
        let mut drive = raidtape::tape::open(&self.drive, Access::Write).unwrap();
        loop {
            let len = source.read(buffer).unwrap();
            if len == 0 {
                break;
            }
            assert_eq!(drive.write(&buffer[..len]).unwrap(), Wrote::Whole);
        }
        assert_eq!(drive.write_filemarks(1).unwrap(), Wrote::Whole);
        drive.close().unwrap();
    }

    /// Everything from a labelled tape in the drive to a finished job.
    fn job(&self) {
        let mut files = Files::default();
        let loaded = Loaded::open(&self.drive, Access::Write).unwrap();
        self.job_with(loaded, &mut |job, archive, name| files.add(job, archive, name));
    }

    /// What a drive that cannot wait meets when the volume stops for so many seconds.
    fn stalled(&self, stall: f64) {
        let gaps = Arc::new(Mutex::new(Gaps::default()));
        let inner = raidtape::tape::open(&self.drive, Access::Write).unwrap();
        let drive = Paced { inner, ready: None, gaps: gaps.clone() };
        let loaded = Loaded::with(Box::new(drive), &self.drive).unwrap();
        let header = Header { mode: 0o100_644, nlink: 1, size: STALLED_BYTES, ..Header::default() };
        let source = &self.source;
        self.job_with(loaded, &mut |_, archive, name| {
            let file = File::open(source).unwrap();
            let mut content = Stalling { file, given: 0, begun: Instant::now(), stall };
            archive.add(&header, name, &mut content)
        });
        let Gaps { count, longest, .. } = *gaps.lock();
        println!("stops of {stall} s: the drive waited {count} times, at most {longest:.2} s");
    }

    fn job_with(&self, loaded: Loaded, add: &mut Add<'_>) {
        let dir = tempfile::Builder::new().prefix("raidtape-bench-").tempdir().unwrap();
        let spool = Spool::create(dir.path()).unwrap();
        let drive = spool.add_drive(OsStr::new("d"), &self.drive).unwrap();
        let uuid = "28970c2a-8eea-4060-8fc9-574e562fda12";
        spool.create_job(uuid, JobKind::Write, 1, &Fields::default()).unwrap();
        let name = self.source.to_str().unwrap().as_bytes().to_vec();
        let names = std::iter::once(Ok(name));
        spool.take_job(uuid).unwrap().add_batch(1, &Fields::default(), names).unwrap();
        let taken = drive.take().unwrap();
        let settings = Settings { block_bytes: Some(BLOCK as u32), ..Settings::default() };
        let work = Work {
            spool: &spool,
            drive: &taken,
            settings,
            progress: &Progress::default(),
            now: &|| 1,
            add,
            tell: &mut |_| Ok(()),
            next_tape: &mut |_, _| Ok(None),
        };
        let mut writer = Writer::new(work, loaded);
        writer.job(spool.take_job(uuid).unwrap()).unwrap();
        assert_eq!(writer.tally().files, 1);
        writer.close().unwrap();
    }

    fn dd(&self, what: What) {
        let is_write = what != What::Read;
        let (from, to) = match is_write {
            true => (&*self.source, &*self.plain),
            false => (&*self.plain, Path::new("/dev/null")),
        };
        let mut command = Command::new("dd");
        command.arg(format!("if={}", from.display())).arg(format!("of={}", to.display()));
        command.arg(format!("bs={BLOCK}")).stderr(Stdio::null());
        if is_write && !self.is_device {
            let _ = std::fs::remove_file(to);
            command.arg("conv=fdatasync");
        }
        assert!(command.status().unwrap().success());
    }
}

/// What the drive writes in a second, and the volume gives.
const DRIVE_RATE: f64 = 250.0 * 1048576.0;
const VOLUME_RATE: f64 = 400.0 * 1048576.0;
/// How much the volume gives between two stops, and in all.
const BETWEEN: u64 = 512 << 20;
const STALLED_BYTES: u64 = 2048 << 20;
/// What is shorter is no wait: the drive has a memory of its own.
const GAP: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Gaps {
    count: u64,
    longest: f64,
}

/// A drive that takes blocks at its own pace, and sees how long it has none.
struct Paced {
    inner: Box<dyn Drive>,
    /// When it is done with the blocks that it has.
    ready: Option<Instant>,
    gaps: Arc<Mutex<Gaps>>,
}

impl Drive for Paced {
    fn write(&mut self, block: &[u8]) -> Result<Wrote> {
        // Longer blocks are those of the job: the label is one of 32 KiB.
        if block.len() < BLOCK {
            return self.inner.write(block);
        }
        let now = Instant::now();
        let ready = self.ready.unwrap_or(now);
        let gap = now.saturating_duration_since(ready);
        if gap > GAP {
            let mut gaps = self.gaps.lock();
            gaps.count += 1;
            gaps.longest = gaps.longest.max(gap.as_secs_f64());
        }
        let done = ready.max(now) + Duration::from_secs_f64(block.len() as f64 / DRIVE_RATE);
        let wrote = self.inner.write(block);
        std::thread::sleep(done.saturating_duration_since(Instant::now()));
        // The image may take longer, which is nobody's wait.
        self.ready = Some(done.max(Instant::now()));
        wrote
    }

    fn state(&mut self) -> Result<State> {
        self.inner.state()
    }

    fn set_block_size(&mut self, size: BlockSize) -> Result<()> {
        self.inner.set_block_size(size)
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<Read> {
        self.inner.read(buffer)
    }

    fn write_filemarks(&mut self, count: u32) -> Result<Wrote> {
        self.inner.write_filemarks(count)
    }

    fn position(&mut self) -> Result<u64> {
        self.inner.position()
    }

    fn locate(&mut self, position: u64) -> Result<Moved> {
        self.inner.locate(position)
    }

    fn rewind(&mut self) -> Result<()> {
        self.inner.rewind()
    }

    fn to_end_of_data(&mut self) -> Result<()> {
        self.inner.to_end_of_data()
    }

    fn space_files(&mut self, count: i64) -> Result<Moved> {
        self.inner.space_files(count)
    }

    fn unload(&mut self) -> Result<()> {
        self.inner.unload()
    }

    fn close(self: Box<Self>) -> Result<()> {
        self.inner.close()
    }
}

/// A volume that stops now and then.
struct Stalling {
    file: File,
    given: u64,
    begun: Instant,
    stall: f64,
}

impl std::io::Read for Stalling {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let left = STALLED_BYTES - self.given;
        let len = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let mut read = self.file.read(&mut buffer[..len])?;
        if read == 0 && len > 0 {
            std::io::Seek::rewind(&mut self.file)?;
            read = self.file.read(&mut buffer[..len])?;
        }
        let before = self.given;
        self.given += read as u64;
        let stops = (before / BETWEEN) as f64;
        let due = self.given as f64 / VOLUME_RATE + stops * self.stall;
        let due = self.begun + Duration::from_secs_f64(due);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        Ok(read)
    }
}
