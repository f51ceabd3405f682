//! What tapes have of one catalog, as far as it is known to be of one.
//!
//! Which catalog an archive is of shows only in the course of reading: by its job, by the name of
//! its run, by the runs that manifests name, and by the volumes. So each archive begins a lot
//! unless it is known to belong to one, and lots become one as soon as something links them.
//!
//! Invariant: two runs of one number and different names are never in one lot, and nothing that is
//! damaged takes the place of anything.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::catalog::history::{self, Head};
use crate::catalog::{RunId, copy, manifest, meta_read};
use crate::chunk::HashAlgo;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::sys::{self, quoted};
use crate::tape::runs::Kind;
use crate::tape::spool::text::Fields;
use crate::volume::VolumeManifest;

/// Directories of a volume that documents are put into.
const DIRS: [&str; 2] = ["meta", manifest::DIR];

/// What an archive says of the catalog that it is of.
#[derive(Clone, Debug, Default)]
pub struct Sign {
    /// The job that wrote it.
    pub job: Option<String>,
    /// The run that was archived.
    pub run: Option<(RunId, String)>,
    /// Where the catalog was.
    pub catalog: Option<Vec<u8>>,
}

impl Sign {
    /// What a job says in its fields.
    pub fn of(fields: &Fields) -> Sign {
        let text = |key| Some(std::str::from_utf8(fields.get(key)?).ok()?.to_owned());
        Sign {
            job: text("job"),
            run: fields.number("run").zip(text("run-uuid")),
            catalog: fields.get("catalog").map(<[u8]>::to_vec),
        }
    }
}

/// How two lots, or a lot and an archive, stand to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    /// They are of one catalog.
    Same,
    /// They are of two: a run of the same number is another one.
    Other,
    /// Nothing says.
    Unknown,
}

/// Documents and archives of one catalog.
#[derive(Debug)]
pub struct Lot {
    /// Where its documents are.
    dir: PathBuf,
    /// Its runs, by number.
    pub runs: BTreeMap<RunId, String>,
    jobs: BTreeSet<String>,
    volumes: BTreeSet<String>,
    /// Where its catalog was.
    pub catalogs: BTreeSet<Vec<u8>>,
    /// What names its blocks, as an archive has said.
    pub hash: Option<HashAlgo>,
    /// What a volume of it has said of itself.
    pub said: Option<VolumeManifest>,
    /// The tape files that are of it: label and number.
    pub files: BTreeSet<(Vec<u8>, u64)>,
    /// Metas and manifests.
    pub documents: u64,
    /// The run after which its newest copy of the catalog was made that is whole.
    pub copy: Option<RunId>,
}

impl Lot {
    /// A lot that has nothing, with its documents in the directory `dir`.
    pub fn new(dir: PathBuf) -> Result<Lot> {
        for sub in DIRS {
            let failed = |e| Error::io(format!("creating {}", quoted(&dir)), e);
            sys::make_private_dirs(&dir.join(sub)).map_err(failed)?;
        }
        Ok(Lot {
            dir,
            runs: BTreeMap::new(),
            jobs: BTreeSet::new(),
            volumes: BTreeSet::new(),
            catalogs: BTreeSet::new(),
            hash: None,
            said: None,
            files: BTreeSet::new(),
            documents: 0,
            copy: None,
        })
    }

    /// How an archive stands to it.
    pub fn relation_to(&self, sign: &Sign) -> Relation {
        let known = sign.run.as_ref().and_then(|it| Some((self.runs.get(&it.0)?, &it.1)));
        match known {
            Some((known, name)) if known != name => Relation::Other,
            Some(_) => Relation::Same,
            None if sign.job.as_ref().is_some_and(|it| self.jobs.contains(it)) => Relation::Same,
            None => Relation::Unknown,
        }
    }

    /// How another lot stands to it.
    pub fn relation(&self, other: &Lot) -> Relation {
        let known = |it: (&RunId, &String)| self.runs.get(it.0).map(|name| name == it.1);
        let runs = || other.runs.iter().filter_map(known);
        if runs().any(|it| !it) {
            return Relation::Other;
        }
        let is_same = runs().next().is_some()
            || !self.jobs.is_disjoint(&other.jobs)
            || !self.volumes.is_disjoint(&other.volumes);
        if is_same { Relation::Same } else { Relation::Unknown }
    }

    /// Learns what an archive says that is of it.
    pub fn take(&mut self, sign: Sign) {
        self.runs.extend(sign.run);
        self.jobs.extend(sign.job);
        self.catalogs.extend(sign.catalog);
    }

    /// Learns what a volume of it says of itself.
    pub fn take_volume(&mut self, said: VolumeManifest) {
        self.volumes.insert(said.uuid.clone());
        self.said = Some(said);
    }

    /// Learns what a manifest says that is of it; refuses one that is of another catalog.
    fn take_manifest(&mut self, head: &Head) -> Result<()> {
        if let Some(known) = self.runs.get(&head.run).filter(|it| **it != head.uuid) {
            let what = format!(
                "it is of another catalog than the tapes before it, whose run {} is {known}: give \
                 only tapes of one catalog",
                head.run
            );
            return Err(Error::corrupt(what));
        }
        self.runs.insert(head.run, head.uuid.clone());
        let Some(around) = &head.around else { return Ok(()) };
        self.volumes.extend(around.volumes.iter().map(|it| it.uuid.clone()));
        let previous = around.previous.iter().map(|it| (it.run, it.uuid.clone()));
        for (run, uuid) in previous.chain(around.basis.clone()) {
            self.runs.entry(run).or_insert(uuid);
        }
        Ok(())
    }

    /// Takes in a document that a tape has, if it is right and better than what is there.
    pub fn put(
        &mut self,
        (kind, name): (Kind, &[u8]),
        content: &mut dyn Read,
        progress: &Progress,
    ) -> Result<()> {
        let path = self.dir.join(OsStr::from_bytes(name));
        let new = sys::new_name(&path);
        write(&new, content)?;
        let failed = |e| Error::io(format!("writing {}", quoted(&path)), e);
        let is_better = self.prove(kind, &new, &path, progress).and_then(|()| outdoes(&new, &path));
        if !matches!(is_better, Ok(true)) {
            std::fs::remove_file(&new).map_err(failed)?;
            return is_better.map(|_| ());
        }
        std::fs::rename(&new, &path).map_err(failed)?;
        self.documents += 1;
        Ok(())
    }

    /// Fails if a document is not right, which is to be at `path`.
    fn prove(&mut self, kind: Kind, new: &Path, path: &Path, progress: &Progress) -> Result<()> {
        if let Kind::Meta(id) = kind {
            return match meta_read::read_meta(new, &mut |_| Ok(()))?.id == id {
                true => Ok(()),
                false => Err(Error::corrupt("it is of another block")),
            };
        }
        let head = history::survey(new, &|| progress.check())?.head;
        match path.file_name().and_then(OsStr::to_str).and_then(manifest::run_of) == Some(head.run)
        {
            true => self.take_manifest(&head),
            false => Err(Error::corrupt(format!("it is the manifest of run {}", head.run))),
        }
    }

    /// Where its copy of the catalog is.
    pub fn copy_path(&self) -> PathBuf {
        self.dir.join("copy")
    }

    /// Takes in a copy of the catalog of after a run, if it is whole; older ones are passed over.
    pub fn put_copy(
        &mut self,
        run: RunId,
        content: &mut dyn Read,
        progress: &Progress,
    ) -> Result<()> {
        if self.copy.is_some_and(|it| it >= run) {
            return Ok(());
        }
        let path = self.copy_path();
        let new = sys::new_name(&path);
        write(&new, content)?;
        // That its runs are ours is looked at when it is needed.
        copy::verify(&new, None, "", &|| progress.check())?;
        let failed = |e| Error::io(format!("writing {}", quoted(&path)), e);
        std::fs::rename(&new, &path).map_err(failed)?;
        self.copy = Some(run);
        Ok(())
    }

    /// Makes another lot of the same catalog a part of this one.
    pub fn join(&mut self, other: Lot, progress: &Progress) -> Result<()> {
        other.move_to(&self.dir, progress)?;
        let failed = |e| Error::io(format!("moving {}", quoted(&other.dir)), e);
        if let Some(run) = other.copy.filter(|it| self.copy.is_none_or(|own| own < *it)) {
            std::fs::rename(other.copy_path(), self.copy_path()).map_err(failed)?;
            self.copy = Some(run);
        }
        std::fs::remove_dir_all(&other.dir).map_err(failed)?;
        self.hash = self.hash.or(other.hash);
        self.documents += other.documents;
        for (run, uuid) in other.runs {
            self.runs.entry(run).or_insert(uuid);
        }
        self.jobs.extend(other.jobs);
        self.volumes.extend(other.volumes);
        self.catalogs.extend(other.catalogs);
        self.files.extend(other.files);
        self.said = self.said.take().or(other.said);
        Ok(())
    }

    /// Moves all documents to the volume that is to be at `to`, or to another lot.
    pub fn move_to(&self, to: &Path, progress: &Progress) -> Result<()> {
        for sub in DIRS {
            let (from, to) = (self.dir.join(sub), to.join(sub));
            let failed = |e| Error::io(format!("moving {}", quoted(&from)), e);
            sys::make_private_dirs(&to).map_err(failed)?;
            // Mostly nothing is there, and all of it is moved at once.
            if std::fs::rename(&from, &to).is_ok() {
                continue;
            }
            for entry in std::fs::read_dir(&from).map_err(failed)? {
                progress.check()?;
                let name = entry.map_err(failed)?.file_name();
                let (new, path) = (from.join(&name), to.join(&name));
                // They were proved when they were put.
                if outdoes(&new, &path)? {
                    std::fs::rename(&new, &path).map_err(failed)?;
                }
            }
        }
        Ok(())
    }
}

/// Whether a document that is right says more than the one that is at `path`, if there is one. Of
/// two metas of a block the longer one knows of more files; of a run the newer format says more.
fn outdoes(new: &Path, path: &Path) -> Result<bool> {
    if path.symlink_metadata().is_err() {
        return Ok(true);
    }
    let is_manifest = path.file_name().and_then(OsStr::to_str).and_then(manifest::run_of).is_some();
    let len = |it: &Path| it.metadata().map_or(0, |it| it.len());
    if !is_manifest {
        return Ok(len(new) > len(path));
    }
    match format_of(path) {
        Ok(had) => Ok(format_of(new)? > had),
        Err(e) if e.is_shortage() => Err(e),
        // An attempt that a power cut has ended may have left one that is not whole.
        Err(_) => Ok(true),
    }
}

fn format_of(manifest: &Path) -> Result<u32> {
    Ok(history::survey(manifest, &|| Ok(()))?.head.format)
}

/// Writes what a tape has into a file.
fn write(path: &Path, content: &mut dyn Read) -> Result<()> {
    let failed = |e| Error::io(format!("writing {}", quoted(path)), e);
    let file = sys::private_file().write(true).create(true).truncate(true).open(path);
    let mut file: File = file.map_err(failed)?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        let len = match content.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(Error::io("reading a member", e)),
        };
        file.write_all(buffer.get(..len).unwrap_or_default()).map_err(failed)?;
    }
}
