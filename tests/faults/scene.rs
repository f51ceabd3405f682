//! A store on a disk that fails, the commands that work on it, and the one question after each
//! trial: is everything there that was acknowledged, and does the next command just work?
//!
//! Invariant: what a run must hold is known from its source, not from a run; and the store is asked
//! by a new process's means, with nothing that the trial left in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use raidtape::backup::{self, Options};
use raidtape::catalog::{Settings, Writer};
use raidtape::chunk::HashAlgo;
use raidtape::chunk::frame::Compression;
use raidtape::chunk::split::Chunking;
use raidtape::error::{Error, ErrorKind};
use raidtape::progress::Progress;
use raidtape::snapshot::{Snapshots, resolve};
use raidtape::{dump, genmeta, validate};
use tempfile::TempDir;

use crate::common::data::{Seeded, noise_file};
use crate::common::faultfs::disk::Disk;
use crate::common::faultfs::{FaultFs, Image, Moment, Rules};
use crate::common::{RAIDTAPE, bytes_of, mount};

/// The states of the source, each in a directory of its own and told from the others by the comment
/// of its runs.
pub const STATES: [&str; 3] = ["one", "two", "three"];
pub const CACHE_BYTES: u64 = 4 << 20;
/// How often `validate` is asked again that could not judge.
const LOOKS_MAX: u32 = 100;

/// Files by name, with the hashes of what is in them.
pub type Contents = BTreeMap<Vec<u8>, [u8; 32]>;

/// A place for trials, of one thread.
pub struct Scene {
    /// Unmounted before the directory goes.
    pub fs: FaultFs,
    dir: TempDir,
    pub contents: BTreeMap<&'static str, Contents>,
    /// What the catalog has said that is lost in `Base::Uncatalogued`.
    pub lost_dump: Mutex<String>,
    plain: Mutex<u64>,
    checked: Mutex<BTreeSet<[u8; 32]>>,
}

/// A command on a store.
#[derive(Clone, Copy)]
pub struct Verb {
    pub name: &'static str,
    /// The state of the store that it begins with.
    pub base: Base,
    /// Its line; a word that begins with `/` is a place in the scene.
    pub line: &'static [&'static str],
    /// The state that it has stored if it says so.
    pub stores: Option<&'static str>,
}

/// What a trial begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// Not even a catalog.
    Nothing,
    /// A catalog without a volume.
    Catalog,
    /// One with two volumes, and no run.
    Volumes,
    /// The state `one` stored.
    Run,
    /// The same, with metas and manifests gone.
    Bare,
    /// The same, and each block is to be on two volumes from now on.
    Lacking,
    /// The same, and they are; but a copy is damaged, and the indexes of the volumes.
    Damaged,
    /// The states `one` and `two` stored, and no catalog.
    Uncatalogued,
    /// The same, with a catalog that does not know which chunks there are.
    Doubtful,
}

impl Base {
    /// Whether the state `one` is stored.
    fn has_run(self) -> bool {
        !matches!(self, Base::Nothing | Base::Catalog | Base::Volumes)
    }

    /// Whether the command keeps where it has found the volumes.
    pub fn keeps_places(self) -> bool {
        matches!(self, Base::Nothing | Base::Catalog | Base::Uncatalogued)
    }
}

/// What a command has said of its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// Not that it was done.
    Nothing,
    Done,
    /// That it was done but for some problems.
    Problems,
}

impl Said {
    pub fn when(done: bool) -> Said {
        if done { Said::Done } else { Said::Nothing }
    }
}

/// What came of a command.
pub struct Done {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub said: String,
    /// The same as it came.
    pub bytes: Vec<u8>,
    pub errors: String,
    pub disk: Arc<Mutex<Disk>>,
}

impl Scene {
    pub fn new() -> Scene {
        // Small stores: what threads cost is more than they give. A thread that is in a pool stays
        // in it, and a test has one thread.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build();
        let _ = pool.map(std::mem::forget);
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
        let dir = tempfile::Builder::new().prefix("raidtape-faults-").tempdir_in(parent).unwrap();
        let fs = FaultFs::new(&dir.path().join("fs"));
        let mut scene = Scene {
            dir,
            fs,
            contents: BTreeMap::new(),
            lost_dump: Mutex::default(),
            plain: Mutex::default(),
            checked: Mutex::default(),
        };
        scene.make_sources();
        scene
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn catalog(&self) -> PathBuf {
        self.path("store/c/catalog")
    }

    /// Small files, of which each state has some that the one before did not have.
    fn make_sources(&mut self) {
        for (number, state) in STATES.into_iter().enumerate() {
            let dir = self.path(state);
            fs::create_dir_all(dir.join("sub")).unwrap();
            let mut seeded = Seeded::new(40 + number as u64);
            fs::write(dir.join("empty"), "").unwrap();
            fs::write(dir.join("same"), Seeded::new(7).text(3_000)).unwrap();
            fs::write(dir.join("sub/changed"), seeded.text(5_000)).unwrap();
            noise_file(&dir.join(format!("sub/noise of {state}")), seeded.next(), 20_000);
            std::os::unix::fs::symlink("same", dir.join("link")).unwrap();
            let mut contents = Contents::new();
            for name in ["empty", "same", "sub/changed", &format!("sub/noise of {state}")] {
                let bytes = fs::read(dir.join(name)).unwrap();
                contents.insert(name.into(), *blake3::hash(&bytes).as_bytes());
            }
            self.contents.insert(state, contents);
        }
    }

    /// A state that takes some blocks on both volumes: small files, and one with blocks of its own.
    pub fn make_large(&mut self) {
        let dir = self.path("large");
        fs::create_dir(&dir).unwrap();
        let mut seeded = Seeded::new(50);
        let mut contents = Contents::new();
        for number in 0..60 {
            let (name, len) = (format!("f{number}"), seeded.below(40_000) as usize);
            fs::write(dir.join(&name), seeded.noise(len)).unwrap();
            contents.insert(name.into(), [0; 32]);
        }
        noise_file(&dir.join("long"), 51, 9 << 20);
        contents.insert("long".into(), [0; 32]);
        for (name, hash) in &mut contents {
            let bytes = fs::read(dir.join(std::str::from_utf8(name).unwrap())).unwrap();
            *hash = *blake3::hash(&bytes).as_bytes();
        }
        self.contents.insert("large", contents);
    }

    /// Has `store` be this directory.
    fn point_at(&self, dir: &Path) {
        let (link, new) = (self.path("store"), self.path("store.new"));
        std::os::unix::fs::symlink(dir, &new).unwrap();
        fs::rename(new, link).unwrap();
    }

    /// Makes a store in a directory; gives what is in it.
    pub fn base(&self, base: Base) -> Image {
        let dir = self.new_dir();
        fs::create_dir(&dir).unwrap();
        self.point_at(&dir);
        self.make_base(base).unwrap();
        if matches!(base, Base::Uncatalogued | Base::Doubtful) {
            *self.lost_dump.lock().unwrap() = self.dump();
        }
        if base == Base::Doubtful {
            let conn = rusqlite::Connection::open(self.catalog()).unwrap();
            conn.execute("DELETE FROM chunks", []).unwrap();
        }
        if base == Base::Uncatalogued {
            fs::remove_dir_all(dir.join("c")).unwrap();
            fs::create_dir(dir.join("c")).unwrap();
        }
        if base == Base::Bare {
            for volume in ["v1", "v2"] {
                for kind in ["meta", "manifests"] {
                    for entry in fs::read_dir(dir.join(volume).join(kind)).unwrap() {
                        fs::remove_file(entry.unwrap().path()).unwrap();
                    }
                }
            }
        }
        let image = Image::of_dir(&dir);
        fs::remove_dir_all(&dir).unwrap();
        image
    }

    fn make_base(&self, base: Base) -> Result<(), Error> {
        if base == Base::Nothing {
            return Ok(());
        }
        fs::create_dir(self.path("store/c")).unwrap();
        let settings = Settings {
            hash: HashAlgo::Blake3,
            chunking: Chunking::new("fastcdc", 16 << 10)?,
            compression: Compression::Zstd(1),
            block_bytes: 1 << 20,
            reserve_percent: 0,
            copies: 1,
        };
        let mut writer = Writer::create(&self.catalog(), &settings)?;
        if base != Base::Catalog {
            // Not through the program, which would keep where the link leads now.
            writer.add_volume(&self.path("store/v1"), 0)?;
            writer.add_volume(&self.path("store/v2"), 0)?;
        }
        drop(writer);
        if base.has_run() {
            self.back_up("one")?;
        }
        match base {
            Base::Lacking | Base::Damaged => {
                Writer::open(&self.catalog())?.set_copies(2)?;
            }
            Base::Uncatalogued | Base::Doubtful => drop(self.back_up("two")?),
            _ => {}
        }
        if base == Base::Damaged { self.damage() } else { Ok(()) }
    }

    pub fn back_up(&self, state: &str) -> Result<i64, Error> {
        let options = Options {
            source: self.path(state),
            name: Some(b"source".to_vec()),
            single_threaded: true,
            comment: state.to_owned(),
            ..Options::default()
        };
        let summary = backup::run(&self.catalog(), &options, &Progress::default())?;
        // Volumes may have been full; the run is whole.
        match summary.problems.iter().find(|it| it.path != b"copies") {
            Some(problem) => Err(Error::corrupt(format!("a problem: {problem}"))),
            None => Ok(summary.run),
        }
    }

    fn new_dir(&self) -> PathBuf {
        let mut number = self.plain.lock().unwrap();
        *number += 1;
        self.path(&format!("plain{number}"))
    }

    /// Runs a command on a disk with these rules.
    pub fn run(&self, verb: &Verb, base: &Image, rules: Rules, record: bool) -> Done {
        let mut disk = Disk::new(base, rules);
        if record {
            disk.record();
        }
        self.run_on(verb, disk)
    }

    /// Has the store be on a disk.
    pub fn put(&self, disk: Disk) -> Arc<Mutex<Disk>> {
        let (place, disk) = self.fs.put("disk", disk);
        self.point_at(&place);
        disk
    }

    /// Runs a command on a disk.
    pub fn run_on(&self, verb: &Verb, disk: Disk) -> Done {
        let disk = self.put(disk);
        let mut command = Command::new(RAIDTAPE);
        command.arg("--catalog").arg(self.catalog());
        for word in verb.line {
            match word.strip_prefix('/') {
                Some(place) => command.arg(self.path(place)),
                None => command.arg(word),
            };
        }
        command.env_remove("RAIDTAPE_CATALOG").env_remove("RAIDTAPE_LOG").env("TMPDIR", "/tmp");
        if verb.base == Base::Damaged {
            // So that the operations come in the same order each time.
            command.env("RAYON_NUM_THREADS", "1");
        }
        let output = command.stdin(Stdio::null()).output().unwrap();
        Done {
            code: output.status.code(),
            signal: output.status.signal(),
            said: String::from_utf8_lossy(&output.stdout).into_owned(),
            bytes: output.stdout,
            errors: String::from_utf8(output.stderr).unwrap(),
            disk,
        }
    }

    /// All states of the disk while a command ran, which must end well.
    pub fn trace(&self, verb: &Verb, base: &Image, is_sync_off: bool) -> Vec<Moment> {
        let rules = Rules { is_sync_off, ..Rules::default() };
        let done = self.run(verb, base, rules, true);
        assert_eq!(done.code, Some(0), "{}: {}{}", verb.name, done.said, done.errors);
        let moments = done.disk.lock().unwrap().moments.take().unwrap();
        assert!(moments.len() > 5, "{}: only {} operations", verb.name, moments.len());
        moments
    }

    /// Checks a store that is on no disk that fails; what has been checked is not checked again.
    /// `done`: whether the verb had said that it was done.
    pub fn check(&self, verb: &Verb, image: &Image, done: Said) -> Result<bool, String> {
        let mut digest = image.digest();
        digest[0] = done as u8;
        if !self.checked.lock().unwrap().insert(digest) {
            return Ok(false);
        }
        // What the program has been told of places is kept as it was then.
        if verb.base.keeps_places() {
            return self.check_in_place(verb, image, done).map(|()| true);
        }
        let dir = self.new_dir();
        image.write_to(&dir);
        self.point_at(&dir);
        let result = self.check_here(verb, done);
        if result.is_ok() || std::env::var_os("RAIDTAPE_KEEP").is_none() {
            fs::remove_dir_all(&dir).unwrap();
        } else {
            eprintln!("kept: {}", dir.display());
        }
        result.map(|()| true)
    }

    /// The same, with the store where the program saw it. Not on the mount itself: this process
    /// serves that, and must not wait for itself if it is killed.
    fn check_in_place(&self, verb: &Verb, image: &Image, done: Said) -> Result<(), String> {
        let dir = self.new_dir();
        fs::create_dir(&dir).unwrap();
        image.write_to(&dir.join("disk"));
        rustix::mount::mount_bind(&dir, &self.fs.point).unwrap();
        self.point_at(&self.fs.point.join("disk"));
        let result = self.check_here(verb, done);
        mount::detach(&self.fs.point);
        fs::remove_dir_all(&dir).unwrap();
        result
    }

    fn check_here(&self, verb: &Verb, done: Said) -> Result<(), String> {
        let mut must = BTreeSet::new();
        if verb.base.has_run() {
            must.insert("one");
        }
        must.extend(verb.stores.filter(|_| done != Said::Nothing));
        if matches!(verb.base, Base::Uncatalogued | Base::Doubtful) {
            must.insert("two");
        }
        if verb.base.keeps_places() || verb.base == Base::Doubtful {
            self.make_ready(verb, done)?;
        }
        if verb.base == Base::Damaged {
            self.repair_again(&must, done)?;
            self.check_all_take_blocks()?;
        }
        if matches!(verb.base, Base::Uncatalogued | Base::Doubtful) {
            self.check_dump(verb)?;
        }
        if verb.base == Base::Bare || done == Said::Problems {
            // What was missing before is missing still, and what could not be written was told.
            let again =
                genmeta::run(&self.catalog(), &genmeta::Options::default(), &Progress::default());
            again.map_err(|e| format!("genmeta again: {e}"))?;
        }
        self.check_names(&must).map_err(|e| format!("before: {e}"))?;
        let next = self.back_up("three").or_else(|e| match e.kind() {
            // All volumes were full, or one was to be retired and the other was full.
            ErrorKind::NoSpace => {
                let mut writer = Writer::open(&self.catalog())?;
                writer.add_volume(&self.path("store/v3"), 0)?;
                drop(writer);
                self.back_up("three")
            }
            _ => Err(e),
        });
        next.map_err(|e| format!("the next backup: {e}"))?;
        must.insert("three");
        self.check_runs(&must).map_err(|e| format!("after the next backup: {e}"))
    }

    /// The same command once more, where it was not said to be done, and what has to follow it.
    fn make_ready(&self, verb: &Verb, done: Said) -> Result<(), String> {
        let again = |line: &[&str], may_be: &[i32]| {
            let mut command = Command::new(RAIDTAPE);
            command.arg("--catalog").arg(self.catalog()).arg(line[0]);
            command.args(line[1..].iter().map(|it| match it.strip_prefix('/') {
                Some(place) => self.path(place),
                None => it.into(),
            }));
            let output = command.env_remove("RAIDTAPE_CATALOG").output().unwrap();
            let errors = String::from_utf8_lossy(&output.stderr).into_owned();
            let code = output.status.code();
            match code.is_some_and(|it| may_be.contains(&it)) {
                true => Ok(()),
                false => Err(format!("{line:?} again: code {code:?}: {errors}")),
            }
        };
        if done == Said::Nothing {
            // What is there already is refused, but only if it really is there.
            again(verb.line, &[0, 2])?;
        }
        again(&["volumes"], &[0])?;
        if verb.base == Base::Nothing {
            again(&["add-volume", "/store/v1"], &[0])?;
        }
        Ok(())
    }

    /// Everything validates, and these states are there. What they hold is read after the next
    /// run, which changes none of it.
    fn check_names(&self, must: &BTreeSet<&str>) -> Result<(), String> {
        let look = || -> Result<(Findings, BTreeSet<String>), Error> {
            let mut read = Findings::default();
            let snapshots = Snapshots::open(&self.catalog(), CACHE_BYTES)?;
            validate_into(&snapshots, &mut read)?;
            Ok((read, snapshots.runs()?.into_iter().map(|it| it.comment).collect()))
        };
        let (read, runs) = look().map_err(|e| e.to_string())?;
        if !read.is_clean {
            return Err(format!("validate found {:?}", read.problems));
        }
        match must.iter().find(|it| !runs.contains(**it)) {
            Some(lost) => Err(format!("the run of state {lost:?} is lost")),
            None => Ok(()),
        }
    }

    /// Everything validates, these states are there, and each run holds what its state does.
    fn check_runs(&self, must: &BTreeSet<&str>) -> Result<(), String> {
        let read = self.read_all();
        if !read.is_clean || !read.problems.is_empty() {
            return Err(format!("validate or a reader found {:?}", read.problems));
        }
        for (state, found) in &read.runs {
            let expected = self.contents.get(&**state);
            let expected = expected.ok_or_else(|| format!("who made {state:?}?"))?;
            if found != expected {
                return Err(format!("a run does not hold its state {state:?}"));
            }
        }
        match must.iter().find(|it| !read.runs.contains_key(**it)) {
            Some(lost) => Err(format!("the run of state {lost:?} is lost")),
            None => Ok(()),
        }
    }

    /// Validates the store and reads all of it. Two runs of one state have to be the same.
    pub fn read_all(&self) -> Findings {
        let mut read = Findings::default();
        let result = self.read_into(&mut read);
        if let Err(e) = result {
            read.problems.push(e.to_string());
            read.is_clean = false;
        }
        read
    }

    fn read_into(&self, read: &mut Findings) -> Result<(), Error> {
        let snapshots = Snapshots::open(&self.catalog(), CACHE_BYTES)?;
        validate_into(&snapshots, read)?;
        for run in snapshots.runs()? {
            let mut archive = Vec::new();
            let found = resolve(&snapshots, b".", Some(run.id));
            match found.and_then(|it| dump::tar(&snapshots, &it, &mut archive)) {
                Ok(summary) => {
                    read.problems.extend(summary.problems.iter().map(ToString::to_string));
                }
                Err(e) => read.problems.push(format!("run {}: {e}", run.id)),
            }
            read.archives.insert(run.id, *blake3::hash(&archive).as_bytes());
            let contents = contents_of(&archive);
            let known = read.runs.entry(run.comment).or_insert_with(|| contents.clone());
            known.retain(|name, hash| contents.get(name) == Some(hash));
        }
        Ok(())
    }

    /// Has a store lie in a directory of its own.
    pub fn lay_out(&self, image: &Image) -> PathBuf {
        let dir = self.new_dir();
        image.write_to(&dir);
        self.point_at(&dir);
        dir
    }

    /// A store with two runs.
    pub fn two_runs(&self) -> Image {
        let dir = self.new_dir();
        fs::create_dir(&dir).unwrap();
        self.point_at(&dir);
        self.make_base(Base::Run).unwrap();
        self.back_up("two").unwrap();
        let image = Image::of_dir(&dir);
        fs::remove_dir_all(&dir).unwrap();
        image
    }
}

fn validate_into(snapshots: &Snapshots, read: &mut Findings) -> Result<(), Error> {
    let look = || validate::run(snapshots, &validate::Options::default(), &Progress::default());
    let mut report = look()?;
    // A process that another test starts has the catalog's lock open until it runs its program, and
    // `validate` says that somebody writes.
    for _ in 0..LOOKS_MAX {
        if report.unjudged == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
        report = look()?;
    }
    assert_eq!(report.unjudged, 0, "somebody has the lock");
    read.is_clean = report.is_clean();
    if !read.is_clean {
        read.problems.push(format!("{report:?}"));
    }
    Ok(())
}

/// What reading a store gave.
#[derive(Debug, Default)]
pub struct Findings {
    /// Whether `validate` found nothing.
    pub is_clean: bool,
    /// The files of each state that could be read.
    pub runs: BTreeMap<String, Contents>,
    /// Hash of the archive of each run, which has names, metadata and contents.
    pub archives: BTreeMap<i64, [u8; 32]>,
    /// What `validate` and the readers had to say.
    pub problems: Vec<String>,
}

/// The files of an archive.
pub fn contents_of(archive: &[u8]) -> Contents {
    let mut contents = Contents::new();
    for entry in tar::Archive::new(archive).entries().unwrap() {
        // An archive that has ended early says so by that.
        let Ok(mut entry) = entry else { break };
        if entry.header().entry_type().is_file() {
            let mut bytes = Vec::new();
            if entry.read_to_end(&mut bytes).is_err() {
                break;
            }
            let name = entry.path().unwrap();
            let name = bytes_of(name.strip_prefix("./").unwrap_or(&name)).to_vec();
            contents.insert(name, *blake3::hash(&bytes).as_bytes());
        }
    }
    contents
}

/// Prints a line of figures where somebody wants to see them.
pub fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
