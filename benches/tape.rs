//! How fast a tape drive is written and read, and a job written to it, beside `dd` with the same
//! bytes and blocks.
//!
//!     cargo bench --bench tape -- [DRIVE [MIB [ROUNDS]]]
//!
//! DRIVE is a device, whose tape is written over, or the name of an image to be made; without it
//! the image is a temporary one. The two take turns, and the ratios are taken within a round.

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
use std::time::Instant;

use raidtape::progress::Progress;
use raidtape::tape::drive::{Access, Read, Wrote};
use raidtape::tape::image::Image;
use raidtape::tape::label::Label;
use raidtape::tape::loaded::Loaded;
use raidtape::tape::medium::Medium;
use raidtape::tape::spool::Spool;
use raidtape::tape::spool::job::JobKind;
use raidtape::tape::spool::text::Fields;
use raidtape::tape::write::{Files, Settings, Work, Writer};

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
        let dir = tempfile::Builder::new().prefix("raidtape-bench-").tempdir().unwrap();
        let spool = Spool::create(dir.path()).unwrap();
        let drive = spool.add_drive(OsStr::new("d"), &self.drive).unwrap();
        let uuid = "28970c2a-8eea-4060-8fc9-574e562fda12";
        spool.create_job(uuid, JobKind::Write, 1, &Fields::default()).unwrap();
        let name = self.source.to_str().unwrap().as_bytes().to_vec();
        let names = std::iter::once(Ok(name));
        spool.take_job(uuid).unwrap().add_batch(1, &Fields::default(), names).unwrap();
        let taken = drive.take().unwrap();
        let loaded = Loaded::open(&self.drive, Access::Write).unwrap();
        let mut files = Files::default();
        let settings = Settings { block_bytes: Some(BLOCK as u32), ..Settings::default() };
        let work = Work {
            spool: &spool,
            drive: &taken,
            settings,
            progress: &Progress::default(),
            now: &|| 1,
            add: &mut |job, archive, name| files.add(job, archive, name),
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
