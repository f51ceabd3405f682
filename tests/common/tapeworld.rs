//! A spool with a drive of images: tapes, jobs, and what is on the tapes in the end.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Cursor;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use raidtape::error::Result;
use raidtape::progress::Progress;
use raidtape::tape::cpio::{Reader, TRAILER};
use raidtape::tape::drive::{Access, Drive, Read};
use raidtape::tape::image::Image;
use raidtape::tape::label::Label;
use raidtape::tape::loaded::Loaded;
use raidtape::tape::medium::Medium;
use raidtape::tape::spool::Spool;
use raidtape::tape::spool::batch::{BatchStatus, Outcome};
use raidtape::tape::spool::job::{JobKind, JobStatus};
use raidtape::tape::spool::receipt::{Receipt, Receipts};
use raidtape::tape::spool::text::Fields;
use raidtape::tape::sums;
use raidtape::tape::write::{Files, Settings, Tally, Work, Writer, Written};

use super::faultdrive::{Counter, FaultDrive, Plan};

/// Length of the blocks of these tapes.
pub const BLOCK: usize = 512;

/// What a tape has: blocks, and `None` for a filemark.
pub type Objects = Vec<Option<Vec<u8>>>;

/// A spool below `base`, and tapes.
pub struct TapeWorld {
    pub base: PathBuf,
}

/// What a write came to.
pub struct Done {
    pub result: Result<()>,
    pub tally: Tally,
    pub told: Vec<Written>,
    /// Operations of all drives, and how many met with trouble.
    pub operations: u64,
    pub hits: u64,
}

/// Trouble that goes on when the tape is changed.
struct Faults {
    plan: Option<Plan>,
    counters: RefCell<Vec<Counter>>,
}

impl Faults {
    fn open(&self, path: &Path) -> Box<dyn Drive> {
        let before: u64 = self.counters.borrow().iter().map(Counter::operations).sum();
        // What is over does not come again.
        let plan = self.plan.filter(|it| it.for_ever || it.at > before);
        let plan = plan.map(|it| Plan { at: it.at.saturating_sub(before).max(1), ..it });
        let (drive, counter) = FaultDrive::open(path, plan);
        self.counters.borrow_mut().push(counter);
        drive
    }
}

impl TapeWorld {
    pub fn new(base: &Path) -> TapeWorld {
        let world = TapeWorld { base: base.to_path_buf() };
        for name in ["tapes", "drive", "src"] {
            fs::create_dir(base.join(name)).unwrap();
        }
        let spool = Spool::create(&base.join("t0p")).unwrap();
        spool.add_drive(OsStr::new("d0"), Path::new("../../../drive")).unwrap();
        world
    }

    /// One that is there already.
    pub fn at(base: &Path) -> TapeWorld {
        TapeWorld { base: base.to_path_buf() }
    }

    pub fn spool(&self) -> Spool {
        Spool::open(&self.base.join("t0p")).unwrap()
    }

    pub fn image(&self, label: &str) -> PathBuf {
        self.base.join("tapes").join(format!("{label}.tap"))
    }

    /// A new tape with a label, known to the spool.
    pub fn add_tape(&self, label: &str, medium: &Medium) {
        let path = self.image(label);
        Image::create(&path, &Medium::default()).unwrap();
        let mut loaded = Loaded::open(&path, Access::Write).unwrap();
        let label = Label::new(label).unwrap();
        loaded.write_label(&label).unwrap();
        loaded.close().unwrap();
        medium.write(&path).unwrap();
        let tape = self.spool().add_tape(&label).unwrap();
        let mut metrics = Fields::default();
        metrics.set("blocksize", BLOCK.to_string()).unwrap();
        tape.set_metrics(&metrics).unwrap();
    }

    /// Puts a tape into the drive.
    pub fn insert(&self, label: &str) {
        let link = self.base.join("drive/loaded");
        let _ = fs::remove_file(&link);
        symlink(Path::new("../tapes").join(format!("{label}.tap")), link).unwrap();
    }

    /// A file of this length, whose bytes say which it is.
    pub fn add_file(&self, name: &str, len: usize) {
        let path = self.base.join("src").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content(name, len)).unwrap();
    }

    /// A queued job with these batches.
    pub fn add_job(&self, uuid: &str, properties: &[(&str, &str)], batches: &[&[&str]]) {
        let spool = self.spool();
        let mut fields = Fields::default();
        fields.set("root", self.base.join("src").as_os_str().as_bytes()).unwrap();
        properties.iter().for_each(|(key, value)| fields.set(key, value).unwrap());
        spool.create_job(uuid, JobKind::Write, 1, &fields).unwrap();
        for files in batches {
            let names = files.iter().map(|it| Ok(it.as_bytes().to_vec()));
            spool.take_job(uuid).unwrap().add_batch(1, &Fields::default(), names).unwrap();
        }
        spool.queue(&spool.drive(None).unwrap(), None).unwrap().add(uuid).unwrap();
    }

    /// Writes all of the queue with small buffers; full tapes are followed by the next that has
    /// room.
    pub fn write(&self, plan: Option<Plan>) -> Done {
        self.write_with(plan, Settings::default(), &mut |_| {})
    }

    /// The same; `before` is called with the name of each file before it is added.
    pub fn write_with(
        &self,
        plan: Option<Plan>,
        settings: Settings,
        before: &mut dyn FnMut(&[u8]),
    ) -> Done {
        let mut told = Vec::new();
        let mut tally = Tally::default();
        let faults = Faults { plan, counters: RefCell::default() };
        let result = self.try_write(&faults, settings, before, &mut told, &mut tally);
        let counters = faults.counters.into_inner();
        Done {
            result,
            tally,
            told,
            operations: counters.iter().map(Counter::operations).sum(),
            hits: counters.iter().map(Counter::hits).sum(),
        }
    }

    fn try_write(
        &self,
        faults: &Faults,
        settings: Settings,
        before: &mut dyn FnMut(&[u8]),
        told: &mut Vec<Written>,
        tally: &mut Tally,
    ) -> Result<()> {
        let spool = self.spool();
        let drive = spool.drive(None)?;
        let taken = drive.take()?;
        let device = drive.device()?;
        let loaded = Loaded::with(faults.open(&device), &device)?;
        let buffer_bytes = settings.buffer_bytes.min(8 * BLOCK as u64);
        let (mut files, time) = (Files::default(), Cell::new(1000));
        let progress = Progress::default();
        let work = Work {
            spool: &spool,
            drive: &taken,
            settings: Settings { buffer_bytes, ..settings },
            progress: &progress,
            now: &|| {
                time.set(time.get() + 1);
                time.get()
            },
            add: &mut |job, archive, name| {
                before(name);
                files.add(job, archive, name)
            },
            tell: &mut |it| {
                told.push(it.clone());
                Ok(())
            },
            next_tape: &mut |mut loaded, wanted| {
                let Some(label) = wanted.labels.first() else { return Ok(None) };
                loaded.drive().unload()?;
                loaded.close()?;
                self.insert(std::str::from_utf8(label).unwrap());
                Loaded::with(faults.open(&device), &device).map(Some)
            },
        };
        let mut writer = Writer::new(work, loaded);
        let mut failed = None;
        let result = writer.queue(&spool.queue(&drive, None)?, &mut |e| {
            failed.get_or_insert(e);
        });
        let result = result.and(failed.map_or(Ok(()), Err));
        *tally = writer.tally();
        result.and(writer.close())
    }

    /// Everything on a tape.
    pub fn objects(&self, label: &str) -> Objects {
        objects(&self.image(label))
    }

    /// The tape files of a tape, each as one.
    pub fn tape_files(&self, label: &str) -> Vec<Vec<u8>> {
        let objects = self.objects(label);
        let mut files = vec![Vec::new()];
        for object in &objects {
            match object {
                Some(block) => files.last_mut().unwrap().extend(block),
                None => files.push(Vec::new()),
            }
        }
        // What is behind the last filemark is nobody's.
        files.pop();
        files
    }

    /// What holds of every job: each file that is acknowledged is on its tape where the results say
    /// so, byte for byte; each receipt says the same; all other files are pending still. Gives the
    /// files that are acknowledged and those that have failed.
    pub fn check(&self, receipts: Option<&Path>) -> BTreeMap<String, Vec<Option<i32>>> {
        let spool = self.spool();
        let mut found: BTreeMap<String, Vec<Option<i32>>> = BTreeMap::new();
        let mut expected_receipts = Vec::new();
        for uuid in spool.jobs(true).unwrap() {
            let job = spool.job(&uuid).unwrap();
            for id in job.batches().unwrap() {
                if id.status != BatchStatus::Written {
                    continue;
                }
                let mut batch = job.batch(id).unwrap();
                let mut names = Vec::new();
                while let Some(name) = batch.next_file().unwrap() {
                    names.push(name.to_vec());
                }
                let summary = batch.summary().unwrap().unwrap();
                let tape = String::from_utf8(summary.get("tape").unwrap().to_vec()).unwrap();
                let filenum: usize = summary.number("filenum").unwrap();
                let what = format!("{uuid}/{} on {tape}, file {filenum}", id.number);
                let files = self.tape_files(&tape);
                let file = files.get(filenum).unwrap_or_else(|| panic!("{what}: not there"));
                let sums = self.sums(file, &what, summary.get("incomplete").is_some());
                let at: usize = summary.number("position").unwrap();
                assert_eq!(place_of(&self.objects(&tape), filenum), at, "{what}");
                let mut receipt = vec![format!("tape {tape}"), format!("filenum {filenum}")];
                let mut ended = names.iter();
                while let Some(result) = batch.next_result().unwrap() {
                    match result {
                        Outcome::Ok(position, path) => {
                            assert_eq!(ended.next().unwrap(), path, "{what}");
                            let name = String::from_utf8(path.to_vec()).unwrap();
                            self.check_file(file, position, &name, &sums, &what);
                            receipt.push(format!("ok {position} {name}"));
                            found.entry(name).or_default().push(None);
                        }
                        Outcome::Fail(errno, path) => {
                            assert_eq!(ended.next().unwrap(), path, "{what}");
                            let name = String::from_utf8_lossy(path).into_owned();
                            receipt.push(format!("fail {name}"));
                            found.entry(name).or_default().push(Some(errno));
                        }
                        Outcome::Note(..) => {}
                        Outcome::Other(line) => panic!("{line:?}"),
                    }
                }
                assert_eq!(ended.next(), None, "{what}");
                expected_receipts.push((format!("{uuid}/{}", id.number), receipt));
            }
        }
        if let Some(path) = receipts {
            expected_receipts.sort();
            assert_eq!(read_receipts(path), expected_receipts);
        }
        found
    }

    fn check_file(
        &self,
        file: &[u8],
        position: u64,
        name: &str,
        sums: &BTreeMap<Vec<u8>, sums::Sum>,
        what: &str,
    ) {
        let mut reader = Reader::at(Cursor::new(&file[position as usize..]), position);
        let member = reader.next_member().unwrap().unwrap();
        assert_eq!((member.name, member.position), (name.as_bytes().to_vec(), position), "{what}");
        let content = reader.read_all(1 << 24).unwrap();
        let path = self.base.join("src").join(name);
        assert!(fs::read(&path).unwrap() == content, "{what}: {name} has another content");
        let mut summer = sums::Summer::default();
        summer.add(&content);
        assert_eq!(sums.get(name.as_bytes()), Some(&summer.sum()), "{what}: {name}");
    }

    /// The last member of an archive: sums. One that has no end has none, and then the spool's are
    /// as good.
    fn sums(&self, file: &[u8], what: &str, is_cut: bool) -> BTreeMap<Vec<u8>, sums::Sum> {
        let mut reader = Reader::new(Cursor::new(file));
        let (mut last, mut own) = (None, Vec::new());
        loop {
            match reader.next_member() {
                Ok(Some(member)) => {
                    if own.len() < 2 {
                        own.push(member.name.clone());
                    }
                    last = Some((member.name, reader.read_all(1 << 24).unwrap_or_default()));
                }
                Ok(None) => break,
                Err(e) => {
                    assert!(is_cut, "{what}: {e}");
                    break;
                }
            }
        }
        assert_ne!(own[0], TRAILER);
        assert!(own[1].ends_with(b"/wjob"), "{what}: {own:?}");
        let (name, mut content) = last.unwrap();
        if is_cut {
            let (dir, number) = own[0].split_at(own[0].iter().rposition(|it| *it == b'@').unwrap());
            let name = format!("sums{}", String::from_utf8_lossy(&number[1..]));
            let uuid = Path::new(OsStr::from_bytes(dir)).file_name().unwrap();
            let spool = self.spool();
            let job = spool.job(uuid.to_str().unwrap()).unwrap();
            content = fs::read(job.dir().join(name)).unwrap();
        } else {
            assert_eq!(name, [&*own[0], b".sha256"].concat(), "{what}");
            let rest = &file[reader.position() as usize..];
            assert!(rest.len() < BLOCK && rest.iter().all(|it| *it == 0), "{what}");
        }
        let lines = content.split_inclusive(|it| *it == b'\n');
        lines
            .map(|it| {
                let (sum, name) = sums::parse(it.strip_suffix(b"\n").unwrap()).unwrap();
                (name, sum)
            })
            .collect()
    }

    /// All jobs are done and out of the queue.
    pub fn assert_done(&self) {
        let spool = self.spool();
        for uuid in spool.jobs(true).unwrap() {
            let job = spool.job(&uuid).unwrap();
            assert_eq!(job.status().unwrap(), Some(JobStatus::Done), "{uuid}");
            assert!(!spool.is_queued(&uuid).unwrap(), "{uuid}");
            assert!(job.pending().unwrap().is_empty());
        }
    }
}

/// What a file has in it.
pub fn content(name: &str, len: usize) -> Vec<u8> {
    let seed = name.bytes().fold(7u32, |seed, it| seed.wrapping_mul(31) + u32::from(it));
    (0..len as u32)
        .map(|it| (it.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8)
        .collect()
}

/// Everything on the tape of an image.
pub fn objects(path: &Path) -> Objects {
    let mut drive = Image::open(path, Access::Read).unwrap();
    let mut buffer = vec![0; 1 << 20];
    let mut found = Vec::new();
    loop {
        match drive.read(&mut buffer).unwrap() {
            Read::Block(len) => found.push(Some(buffer[..len].to_vec())),
            Read::Filemark => found.push(None),
            Read::EndOfData => return found,
            Read::TooLong => panic!("a long block"),
        }
    }
}

/// Where a tape file begins.
fn place_of(objects: &Objects, filenum: usize) -> usize {
    let mut marks = objects.iter().enumerate().filter(|it| it.1.is_none()).map(|it| it.0 + 1);
    match filenum {
        0 => 0,
        _ => marks.nth(filenum - 1).unwrap(),
    }
}

/// The whole receipts of a file, sorted: batch and lines.
fn read_receipts(path: &Path) -> Vec<(String, Vec<String>)> {
    let text = fs::read(path).unwrap_or_default();
    let mut receipts = Receipts::new(&*text);
    let mut found = Vec::new();
    let mut now: (String, Vec<String>) = Default::default();
    let string = |it: &[u8]| String::from_utf8_lossy(it).into_owned();
    loop {
        match receipts.next_part() {
            Ok(Some(Receipt::Begin)) => now = Default::default(),
            Ok(Some(Receipt::Field(b"batch", it))) => now.0 = string(it),
            Ok(Some(Receipt::Field(key @ (b"tape" | b"filenum"), it))) => {
                now.1.push(format!("{} {}", string(key), string(it)));
            }
            Ok(Some(Receipt::Ok(at, path))) => now.1.push(format!("ok {at} {}", string(path))),
            Ok(Some(Receipt::Fail(path))) => now.1.push(format!("fail {}", string(path))),
            Ok(Some(Receipt::End { is_whole })) => {
                if is_whole == Some(true) {
                    found.push(std::mem::take(&mut now));
                }
            }
            Ok(Some(Receipt::Field(..))) => {}
            Ok(None) => break,
            Err(_) => {}
        }
    }
    found.sort();
    found
}
