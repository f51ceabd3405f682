//! Tapes: a plain model of one, a place to try drives, and the machine that has real ones.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use raidtape::tape::drive::{Access, Drive, Moved, Read, Wrote};
use raidtape::tape::image::Image;
use raidtape::tape::medium::Medium;
use tempfile::TempDir;

/// In memory: every filemark syncs.
pub fn scratch() -> TempDir {
    tempfile::Builder::new().prefix("raidtape-tape-").tempdir_in("/dev/shm").unwrap()
}

/// The image of a blank tape with these properties.
pub fn blank(dir: &TempDir, medium: &Medium) -> PathBuf {
    let path = dir.path().join("a.tap");
    Image::create(&path, medium).unwrap();
    path
}

/// Opens an image to be written.
pub fn open_image(path: &Path) -> Box<dyn Drive> {
    Box::new(Image::open(path, Access::Write).unwrap())
}

/// Has the first block of an image be one that could not be read well.
pub fn spoil_first_block(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let len = u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize;
    for word in [0, 4 + len.next_multiple_of(2)] {
        bytes[word + 3] |= 0x80;
    }
    fs::write(path, bytes).unwrap();
}

/// Everything from here to the end of data: blocks, and `None` for a filemark.
pub fn rest(drive: &mut dyn Drive) -> Vec<Option<Vec<u8>>> {
    let mut buffer = vec![0; 1 << 20];
    let mut found = Vec::new();
    loop {
        match drive.read(&mut buffer).unwrap() {
            Read::Block(len) => found.push(Some(buffer[..len].to_vec())),
            Read::Filemark => found.push(None),
            Read::EndOfData => return found,
            Read::TooLong => panic!("a block of over 1 MiB"),
        }
    }
}

/// A drive that can be closed and opened again.
pub struct Stand {
    open: Box<dyn Fn() -> Box<dyn Drive>>,
    drive: Option<Box<dyn Drive>>,
    /// It stands after opening where it stood before.
    keeps_place: bool,
}

impl Stand {
    pub fn new(open: Box<dyn Fn() -> Box<dyn Drive>>, keeps_place: bool) -> Stand {
        let drive = Some(open());
        Stand { open, drive, keeps_place }
    }

    pub fn drive(&mut self) -> &mut dyn Drive {
        self.drive.as_deref_mut().unwrap()
    }

    /// Closes the drive, which must go well, and opens it again.
    pub fn reopen(&mut self) {
        self.drive.take().unwrap().close().unwrap();
        self.drive = Some((self.open)());
    }
}

/// What a tape is: its objects, and where the drive stands.
#[derive(Clone, Default)]
pub struct Model {
    /// Blocks, and `None` for a filemark.
    pub objects: Vec<Option<Vec<u8>>>,
    /// Objects before the place where the drive stands.
    pub at: usize,
    is_unmarked: bool,
    /// Objects that a crash leaves.
    pub safe: usize,
    /// Anything was written.
    pub is_written: bool,
}

/// Something that is done with a drive.
#[derive(Clone, Debug)]
pub enum Step {
    Write(usize),
    Filemarks(u32),
    Read(usize),
    Locate(u64),
    Rewind,
    ToEnd,
    Space(i64),
    Reopen,
}

/// Random programs.
pub fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (1usize..300).prop_map(Step::Write),
        3 => (0u32..3).prop_map(Step::Filemarks),
        4 => (1usize..400).prop_map(Step::Read),
        2 => (0u64..30).prop_map(Step::Locate),
        1 => Just(Step::Rewind),
        2 => Just(Step::ToEnd),
        2 => (-4i64..4).prop_map(Step::Space),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..50)
}

impl Model {
    fn mark(&mut self, count: u32) {
        self.objects.truncate(self.at);
        self.objects.extend((0..count).map(|_| None));
        self.at = self.objects.len();
        self.is_unmarked = false;
        self.safe = self.at;
        self.is_written = true;
    }

    /// What is written gets its filemark.
    pub fn begin_motion(&mut self) {
        if self.is_unmarked {
            self.mark(1);
        }
    }

    fn files(&self) -> usize {
        self.objects[..self.at].iter().filter(|it| it.is_none()).count()
    }

    /// Takes a step, and the drive with it.
    pub fn take(&mut self, stand: &mut Stand, step: &Step, number: usize) {
        let drive = stand.drive();
        match *step {
            Step::Write(len) => {
                let block = vec![number as u8; len];
                assert_eq!(drive.write(&block).unwrap(), Wrote::Whole);
                self.objects.truncate(self.at);
                self.safe = self.safe.min(self.at);
                self.objects.push(Some(block));
                self.at += 1;
                self.is_unmarked = true;
                self.is_written = true;
            }
            Step::Filemarks(count) => {
                assert_eq!(drive.write_filemarks(count).unwrap(), Wrote::Whole);
                match count {
                    0 if self.is_unmarked => self.safe = self.at,
                    0 => {}
                    count => self.mark(count),
                }
            }
            Step::Read(len) => {
                let mut buffer = vec![0; len];
                let read = drive.read(&mut buffer).unwrap();
                let expected = match self.objects.get(self.at) {
                    None => Read::EndOfData,
                    Some(None) => Read::Filemark,
                    Some(Some(block)) if block.len() > len => Read::TooLong,
                    Some(Some(block)) => {
                        assert_eq!(&buffer[..block.len()], block);
                        Read::Block(block.len())
                    }
                };
                assert_eq!(read, expected);
                self.at += usize::from(read != Read::EndOfData);
            }
            Step::Locate(position) => {
                self.begin_motion();
                let is_there = position as usize <= self.objects.len();
                let moved = if is_there { Moved::There } else { Moved::EndOfData };
                assert_eq!(drive.locate(position).unwrap(), moved);
                self.at = self.objects.len().min(position as usize);
            }
            Step::Rewind => {
                self.begin_motion();
                drive.rewind().unwrap();
                self.at = 0;
            }
            Step::ToEnd => {
                self.begin_motion();
                drive.to_end_of_data().unwrap();
                assert!(drive.state().unwrap().at_end_of_data);
                self.at = self.objects.len();
            }
            Step::Space(count) => {
                self.begin_motion();
                let file = self.files() as i64 + count;
                let mut marks = self.objects.iter().enumerate().filter(|it| it.1.is_none());
                let (moved, at) = match usize::try_from(file - 1).map(|it| marks.nth(it)) {
                    Err(_) => (Moved::Beginning, 0),
                    Ok(None) => (Moved::EndOfData, self.objects.len()),
                    Ok(Some((mark, _))) => (Moved::There, mark + 1),
                };
                assert_eq!(drive.space_files(count).unwrap(), moved);
                self.at = at;
            }
            Step::Reopen => {
                self.begin_motion();
                stand.reopen();
                self.at = if stand.keeps_place { self.at } else { 0 };
            }
        }
        let drive = stand.drive();
        let state = drive.state().unwrap();
        assert_eq!(drive.position().unwrap(), self.at as u64);
        assert!(state.file.is_none_or(|it| it == self.files() as u64), "{state:?}");
        assert_eq!((state.at_beginning, state.online, state.lost), (self.at == 0, true, false));
    }
}

/// What tells a test that it is in the machine with the real drives.
const IN_VM: &str = "RAIDTAPE_TEST_IN_TAPE_VM";

/// Has a test run in the machine with the real drives, unless it is there already. `true` if so:
/// then the test does what it has to.
#[track_caller]
pub fn in_vm(test: &str) -> bool {
    if std::env::var_os(IN_VM).is_some() {
        return true;
    }
    super::need_root("it boots a machine that sees this one's files");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tape-vm");
    let mut command = Command::new(root.join("scripts/tape-vm/run"));
    command.arg("--cache").arg(cache).arg(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    command.env(IN_VM, "1").env("RUSTC", Path::new(env!("CARGO")).with_file_name("rustc"));
    // What is said here is shown if the test fails.
    let output = command.output().unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    println!("{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{test} in the machine with tape drives: {}", output.status);
    let ran = String::from_utf8_lossy(&output.stdout).contains("1 passed");
    assert!(ran, "the machine has not run {test}");
    false
}

/// A variable of the machine's.
pub fn vm(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("the machine has no {name}"))
}

/// Has the library of the machine fail, reset or protect something: see scripts/tape-vm/vtl.rs.
pub fn vtl(line: &str) {
    let log = || fs::read_to_string("/run/tapevm/vtl.log").unwrap().matches("control '").count();
    let before = log();
    let mut pipe = fs::File::options().write(true).open(vm("TAPE_CTL")).unwrap();
    pipe.write_all(format!("{line}\n").as_bytes()).unwrap();
    super::wait_for("the tape library", || log() > before);
    let said = fs::read_to_string("/run/tapevm/vtl.log").unwrap();
    assert!(!said.contains("REFUSED"), "{line}: {said}");
}
