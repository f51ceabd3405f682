//! A catalog from tapes alone.
//!
//! All tapes are read once, in any order: what explains blocks becomes a volume that has no blocks
//! yet, and where the blocks are is noted beside the catalog. Then the catalog is made of that
//! volume as of any other. Recall brings the blocks to it, where the catalog expects them.
//!
//! Invariant: nothing is a volume, and there is no catalog, before all of that is there and lasts;
//! until then it can be begun again with the same directory. What is damaged or of another catalog
//! takes the place of nothing.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::walk::{self, Visitor, prove, walk};
use super::{GUIDE_NAME, Kind, PROBLEMS_MAX};
use crate::catalog::tapes::{Item, Member as Noted, Tape, TapeFile, Tapes};
use crate::catalog::{history, manifest, meta_read};
use crate::chunk::HashAlgo;
use crate::error::{Error, ErrorKind, Problem, Quoted, Result};
use crate::progress::Progress;
use crate::rebuild;
use crate::sys::{self, Time, quoted};
use crate::tape::cpio::Member;
use crate::tape::loaded::Loaded;
use crate::volume::{Facts, IndexMender, Status, Volume, VolumeConfig, VolumeManifest};

/// Longest volume manifest, in bytes.
const MANIFEST_BYTES_MAX: u64 = 64 << 10;
/// Part of the file system that the new volume leaves free, in percent, if no tape says.
const RESERVE_PERCENT: u8 = 10;

/// What came of reading tapes.
#[derive(Debug, Default)]
pub struct Gathered {
    /// Tapes that were read.
    pub tapes: u64,
    /// Tape files with members of a catalog.
    pub files: u64,
    /// Blocks that are right, each as often as it is on a tape.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Metas and manifests.
    pub documents: u64,
    /// What could not be read or is not right, each named; at most a thousand.
    pub problems: Vec<Problem>,
    /// How much of it there was.
    pub problem_count: u64,
}

impl Gathered {
    fn note(&mut self, progress: &Progress, name: String, error: &Error) {
        let problem = Problem::new(name, error);
        log::warn!("{problem}");
        progress.note(&problem);
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }
}

/// What to make a catalog of.
pub struct From<'a> {
    /// An empty or missing directory, which becomes its volume.
    pub into: &'a Path,
    /// Gives the tapes.
    pub next: &'a mut dyn FnMut() -> Result<Option<Loaded>>,
    /// Whether to go on without runs that are lost, and without those that are changes of them.
    pub allow_gaps: bool,
}

/// Makes the catalog `catalog`, which must not exist, of tapes. `lacking` is called with every file
/// that needs a block of which nothing says what is in it.
pub fn rebuild(
    catalog: &Path,
    from: From<'_>,
    progress: &Progress,
    lacking: &mut rebuild::Lacking<'_>,
) -> Result<(Gathered, rebuild::Summary)> {
    let From { into, next, allow_gaps } = from;
    if catalog.symlink_metadata().is_ok() {
        let what = format!("there is a catalog at {} already: give a new name", quoted(catalog));
        return Err(Error::usage(what));
    }
    if into.join(".rt_volume_manifest").symlink_metadata().is_ok() {
        let what = format!(
            "{} is a volume already: give a new directory, or make the catalog of what it has with \
             rebuildmeta --volumes",
            quoted(into)
        );
        return Err(Error::usage(what));
    }
    let failed = |e| Error::io(format!("creating {}", quoted(into)), e);
    sys::make_private_dirs(into).map_err(failed)?;
    for dir in ["meta", manifest::DIR] {
        sys::make_private_dir(&into.join(dir)).map_err(failed)?;
    }
    let mut work = Gather {
        into,
        tapes: Tapes::open(catalog)?,
        progress,
        done: Gathered::default(),
        said: None,
        read: BTreeMap::new(),
        tape: None,
        is_put: false,
        file: None,
        is_right: true,
        hash: HashAlgo::Blake3,
        members: Vec::new(),
    };
    progress.set_phase("reading tapes");
    loop {
        progress.check()?;
        match next() {
            Ok(Some(mut loaded)) => {
                work.take(&mut loaded)?;
                loaded.close()?;
            }
            Ok(None) => break,
            Err(e) if is_of_disk(&e) => return Err(e),
            Err(e) => work.done.note(progress, "a tape".to_owned(), &e),
        }
    }
    work.make_volume()?;
    let done = work.done;
    let volumes = vec![into.to_path_buf()];
    let options = rebuild::Options { volumes, allow_gaps };
    let made = rebuild::run(catalog, &options, progress, lacking);
    // The tapes need not be read once more for that.
    let made = made.map_err(|e| {
        e.context(format!("the volume {} is made, but no catalog of it", quoted(into)))
    });
    Ok((done, made?))
}

struct Gather<'a> {
    into: &'a Path,
    tapes: Tapes,
    progress: &'a Progress,
    done: Gathered,
    /// What a volume of the catalog has said of itself.
    said: Option<VolumeManifest>,
    /// The tapes that have something of a catalog: by their labels, with the hashes of those.
    read: BTreeMap<Vec<u8>, [u8; 32]>,
    tape: Option<Tape>,
    /// Whether it is noted: it has something of a catalog.
    is_put: bool,
    file: Option<TapeFile>,
    /// Nothing of the file at hand is wrong so far.
    is_right: bool,
    hash: HashAlgo,
    members: Vec<Noted>,
}

impl Gather<'_> {
    /// Reads a tape. Its trouble is told, and the next one is read none the less.
    fn take(&mut self, loaded: &mut Loaded) -> Result<()> {
        let described = loaded.describe();
        let (Some(label), Some(hash)) = (loaded.label().cloned(), loaded.hash()) else {
            let error = Error::new(ErrorKind::WrongTape, "it has no label of ours");
            self.done.note(self.progress, described, &error);
            return Ok(());
        };
        let tape = Tape {
            label: label.text().to_vec(),
            hash: hash.bytes(),
            pool: "any".to_owned(),
            block_bytes: crate::tape::write::BLOCK_BYTES,
        };
        (self.tape, self.is_put) = (Some(tape), false);
        self.done.tapes += 1;
        let mut others = Vec::new();
        let progress = self.progress;
        let walked = walk(
            loaded,
            self,
            &mut |filenum, error| {
                others.push((filenum, error));
                Ok(())
            },
            progress,
        );
        for (filenum, error) in others {
            let name = format!("{described}, file {filenum}");
            match error {
                Some(error) => self.done.note(progress, name, &error),
                None => log::info!("{name}: no archive of a job, passed over"),
            }
        }
        progress.check()?;
        match walked {
            Err(e) if is_of_disk(&e) => Err(e),
            Err(e) => {
                self.done.note(progress, described, &e);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn put_document(&mut self, kind: Kind, member: &Member, content: &mut dyn Read) -> Result<()> {
        let path = self.into.join(OsStr::from_bytes(&member.name));
        let new = sys::new_name(&path);
        let failed = |e| Error::io(format!("writing {}", quoted(&path)), e);
        let mut options = sys::private_file();
        let file = options.write(true).create(true).truncate(true).open(&new);
        let mut file = file.map_err(failed)?;
        copy_content(content, &mut file, &path)?;
        drop(file);
        let is_better = self.is_better(kind, &new, &path);
        if !matches!(is_better, Ok(true)) {
            std::fs::remove_file(&new).map_err(failed)?;
            return is_better.map(|_| ());
        }
        std::fs::rename(&new, &path).map_err(failed)?;
        self.done.documents += 1;
        Ok(())
    }

    /// Whether a document is right, and not one that is there already, under the name `path`.
    fn is_better(&self, kind: Kind, new: &Path, path: &Path) -> Result<bool> {
        let is_there = path.symlink_metadata().is_ok();
        if let Kind::Meta(id) = kind {
            let index = meta_read::read_meta(new, &mut |_| Ok(()))?;
            if index.id != id {
                return Err(Error::corrupt("it is of another block"));
            }
            let len = |it: &Path| it.metadata().map_or(0, |it| it.len());
            // Of two metas of a block the longer one knows of more files.
            return Ok(len(new) > len(path));
        }
        let check = || self.progress.check();
        let survey = history::survey(new, &check)?;
        if !is_there {
            return Ok(true);
        }
        let there = history::survey(path, &check)?;
        if there.head.uuid != survey.head.uuid {
            let what = format!(
                "it is of another catalog than the tapes before it, whose run {} is {}: give only \
                 tapes of one catalog",
                there.head.run, there.head.uuid
            );
            return Err(Error::corrupt(what));
        }
        Ok(survey.head.format > there.head.format)
    }

    /// Notes the tape at hand, before the first of its files; `false` if that cannot be.
    fn put_tape(&mut self, tape: &Tape) -> Result<bool> {
        if self.read.get(&tape.label).is_some_and(|it| *it != tape.hash) {
            let error = Error::new(ErrorKind::WrongTape, "another tape has the same label");
            self.done.note(self.progress, format!("tape {}", Quoted(&tape.label)), &error);
            return Ok(false);
        }
        if !self.is_put {
            // What was noted of it before may be of an attempt that was stopped.
            self.tapes.forget(&tape.label)?;
        }
        match self.tapes.put_tape(tape) {
            Err(e) if e.kind() == ErrorKind::Usage => {
                self.done.note(self.progress, format!("tape {}", Quoted(&tape.label)), &e);
                return Ok(false);
            }
            put => put?,
        }
        self.read.insert(tape.label.clone(), tape.hash);
        self.is_put = true;
        Ok(true)
    }

    /// What a volume says of itself tells the settings of its catalog.
    fn put_guide(&mut self, member: &Member, content: &mut dyn Read) -> Result<()> {
        if member.name != b".rt_volume_manifest" || member.header.size > MANIFEST_BYTES_MAX {
            return Ok(());
        }
        let mut text = Vec::new();
        let read = content.take(MANIFEST_BYTES_MAX).read_to_end(&mut text);
        read.map_err(|e| Error::io("reading a volume manifest", e))?;
        match VolumeManifest::parse(&String::from_utf8_lossy(&text)) {
            Ok(said) => self.said = Some(said),
            Err(e) => self.done.note(self.progress, "a volume manifest".to_owned(), &e),
        }
        Ok(())
    }

    /// Makes a volume of what has been gathered.
    fn make_volume(&mut self) -> Result<()> {
        self.progress.set_phase("making a volume");
        if self.done.files == 0 {
            let what = "no tape has an archive of a run: nothing to make a catalog of";
            return Err(Error::new(ErrorKind::NotFound, what));
        }
        let said = self.said.take();
        let settings = said.as_ref().and_then(|it| it.facts.clone()).map(|it| it.settings);
        let config = VolumeConfig {
            number: self.free_number()?,
            uuid: uuid::Uuid::new_v4().to_string(),
            path: self.into.to_path_buf(),
            status: Status::Active,
            reserve_percent: said.as_ref().map_or(RESERVE_PERCENT, |it| it.reserve_percent),
        };
        let facts = Facts {
            number: config.number,
            created: Time::now().secs,
            settings: settings.unwrap_or_default(),
        };
        let hash = said.map_or(self.hash, |it| it.hash);
        let into = self.into;
        // All documents at once, before they are a volume's.
        let synced = File::open(into).and_then(sys::target::sync_file_system);
        synced.map_err(|e| Error::io(format!("syncing {}", quoted(into)), e))?;
        Volume::create(into, &config, hash, facts, || make_index(into, &config, self.progress))
    }

    /// A number that none of the catalog's volumes has.
    fn free_number(&self) -> Result<i64> {
        let dir = self.into.join(manifest::DIR);
        let failed = |e| Error::io(format!("listing {}", quoted(&dir)), e);
        let mut newest = None;
        for entry in std::fs::read_dir(&dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            newest = newest.max(name.to_str().and_then(manifest::run_of));
        }
        let Some(run) = newest else { return Ok(1) };
        let path = self.into.join(manifest::document_name(run));
        // A damaged one is named when the catalog is made.
        let survey = history::survey(&path, &|| self.progress.check());
        let around = survey.ok().and_then(|it| it.head.around);
        let numbers = around.iter().flat_map(|it| &it.volumes).map(|it| it.number);
        Ok(numbers.max().unwrap_or(0).saturating_add(1))
    }
}

/// Writes the index of a volume as its metas have it.
fn make_index(into: &Path, config: &VolumeConfig, progress: &Progress) -> Result<()> {
    let store = std::sync::Arc::new(crate::volume::store::DirStore::new(into.to_path_buf()));
    let volume = Volume { config: config.clone(), store };
    let mut mender = IndexMender::new(&volume, 0)?;
    let dir = into.join("meta");
    let failed = |e| Error::io(format!("listing {}", quoted(&dir)), e);
    for entry in std::fs::read_dir(&dir).map_err(failed)? {
        progress.check()?;
        let name = entry.map_err(failed)?.file_name();
        let name = [b"meta/", name.as_bytes()].concat();
        if let Kind::Meta(id) = Kind::of(&name)
            && let Some(index) = meta_read::read_head(&volume, &id)
        {
            mender.append(&index, None)?;
        }
    }
    mender.commit()
}

/// Whether the disk is at fault that takes what is read, or the wish to stop.
fn is_of_disk(error: &Error) -> bool {
    error.is_shortage() || matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Interrupted)
}

fn copy_content(content: &mut dyn Read, file: &mut File, path: &Path) -> Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        let len = match content.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::io("reading a member", e)),
        };
        let written = file.write_all(buffer.get(..len).unwrap_or_default());
        written.map_err(|e| Error::io(format!("writing {}", quoted(path)), e))?;
    }
}

impl Visitor for Gather<'_> {
    fn begin(&mut self, file: &walk::File<'_>) -> Result<bool> {
        let fields = &file.head.fields;
        if fields.get("catalog").is_none() || fields.get("run").is_none() {
            return Ok(false);
        }
        let word = |key| fields.get(key).and_then(|it| std::str::from_utf8(it).ok());
        if let Some(hash) = word("hash").and_then(|it| it.parse().ok()) {
            self.hash = hash;
        }
        let Some(mut tape) = self.tape.take() else { return Ok(false) };
        tape.pool = word("pool").unwrap_or("any").to_owned();
        tape.block_bytes = u32::try_from(file.block_bytes).unwrap_or(u32::MAX).max(1);
        let is_put = self.put_tape(&tape)?;
        // Of one that is passed over no other file is looked at.
        self.tape = Some(tape).filter(|_| is_put);
        if !is_put {
            return Ok(false);
        }
        let (job, batch) = file.head.job.clone().unwrap_or_default();
        self.file = Some(TapeFile {
            filenum: file.filenum,
            position: file.position,
            bytes: 0,
            job,
            batch,
            ended: Time { secs: file.head.batch.number("added").unwrap_or(0), nanos: 0 },
            verified: None,
        });
        self.members.clear();
        self.is_right = true;
        Ok(true)
    }

    fn member(&mut self, member: &Member, at: u64, content: &mut dyn Read) -> Result<()> {
        let kind = Kind::of(&member.name);
        match kind {
            Kind::Block(id) => match prove(kind, self.hash, content) {
                Ok(true) => {
                    let (len, item) = (member.header.size, Item::Block(id));
                    self.members.push(Noted { at, len, item });
                    self.done.blocks += 1;
                    self.done.bytes += len;
                }
                Ok(false) => self.bad(member, &Error::corrupt("its bytes have another hash")),
                Err(e) => self.bad(member, &e),
            },
            Kind::Guide if member.name == GUIDE_NAME => {}
            Kind::Guide => self.put_guide(member, content)?,
            // It is of a catalog that has other volumes; what it knows is in the manifests too.
            Kind::Catalog => {}
            Kind::Meta(_) | Kind::Manifest => match self.put_document(kind, member, content) {
                Err(e) if is_of_disk(&e) => return Err(e),
                Err(e) => self.bad(member, &e),
                Ok(()) => {}
            },
            Kind::Other => self.bad(member, &Error::corrupt("it is nothing of a catalog")),
        }
        Ok(())
    }

    fn goes_on(&self) -> bool {
        true
    }

    fn end(&mut self, bytes: u64, error: Option<Error>) -> Result<()> {
        let (Some(tape), Some(file)) = (&self.tape, self.file.take()) else { return Ok(()) };
        if let Some(e) = error {
            let name = format!("tape {}, file {}", Quoted(&tape.label), file.filenum);
            self.done.note(self.progress, name, &e);
            self.is_right = false;
        }
        let verified = self.is_right.then(Time::now);
        let mut noting = self.tapes.begin(&tape.label, &TapeFile { bytes, verified, ..file })?;
        self.members.iter().try_for_each(|it| noting.add(it))?;
        noting.finish()?;
        self.members.clear();
        self.done.files += 1;
        Ok(())
    }
}

impl Gather<'_> {
    fn bad(&mut self, member: &Member, error: &Error) {
        self.is_right = false;
        self.done.note(self.progress, self.name_of(member), error);
    }

    fn name_of(&self, member: &Member) -> String {
        let label = self.tape.as_ref().map(|it| Quoted(&it.label).to_string()).unwrap_or_default();
        let file = self.file.as_ref().map_or(0, |it| it.filenum);
        format!("tape {label}, file {file}: {}", Quoted(&member.name))
    }
}
