//! Contents of files against their hashes: that the catalog puts the right bytes together.
//!
//! Blocks can all be as they were written and a file be wrong all the same, if the catalog says
//! something else of where its bytes lie. Versions are read in the order of their numbers, which is
//! about that in which they were stored.

use std::sync::atomic::Ordering;

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::Work;
use super::report::{BadFile, Kept};
use crate::catalog::{Reader, VersionId};
use crate::chunk::file_hash::FileHash;
use crate::error::{Error, ErrorKind, Problem, Result};
use crate::progress::Progress;
use crate::snapshot::FileMap;

/// Versions taken from the catalog at a time.
const PAGE_VERSIONS: usize = 1024;
/// Bytes read at a time.
const PIECE_BYTES: usize = 1 << 20;

impl Work<'_> {
    /// Reads every file, or those of the run that this is about.
    pub(super) fn files(&self) -> Result<()> {
        let mut after: VersionId = 0;
        loop {
            let page: Vec<VersionId> = match &self.needed {
                Some(needed) => {
                    let rest = needed.files.iter_from(after.cast_unsigned() + 1);
                    rest.take(PAGE_VERSIONS).map(u64::cast_signed).collect()
                }
                None => {
                    let page = |reader: &Reader| reader.file_versions(after, PAGE_VERSIONS);
                    self.snapshots.with_reader(page)?
                }
            };
            let Some(last) = page.last() else { return Ok(()) };
            after = *last;
            page.into_par_iter().try_for_each(|version| self.file(version))?;
        }
    }

    fn file(&self, version: VersionId) -> Result<()> {
        let result = self.snapshots.file(version).and_then(|file| {
            let hash = self.file_hash(&file)?;
            match file.content.hash == Some(hash) {
                true => Ok(()),
                false => Err(Error::corrupt(format!("its bytes have the hash {hash}"))),
            }
        });
        self.report.lock().files += 1;
        let error = match result {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == ErrorKind::Interrupted => return Err(e),
            Err(e) => e,
        };
        let mut files = Kept::default();
        let result = self.snapshots.with_reader(|reader| {
            reader.names_of(version, &mut |file| {
                self.report.lock().keep_file(&mut files, file);
                Ok(())
            })
        });
        if let Err(e) = result {
            // Its names cannot be had; that has been told of the catalog.
            log::debug!("{e}");
        }
        let (kind, reason) = (error.kind(), error.to_string());
        let path = files.items.first().map(|it| it.path.clone()).unwrap_or_default();
        self.progress.note(&Problem { path, kind, message: reason.clone() });
        self.report.lock().add_bad_file(BadFile { version, reason, kind, files });
        Ok(())
    }

    fn file_hash(&self, file: &FileMap) -> Result<crate::chunk::Digest> {
        let algo = self.settings.hash;
        let has_holes = file.has_holes();
        let mut hash = match has_holes {
            true => FileHash::of_segments(algo),
            false => FileHash::of_content(algo),
        };
        for (start, end) in file.segments() {
            if has_holes {
                hash.begin_segment(start, end - start);
            }
            let mut at = start;
            while at < end {
                self.progress.check()?;
                let here = usize::try_from(end - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
                let data = self.snapshots.read_data(file, at, here)?;
                if data.is_empty() {
                    return Err(Error::corrupt("its extents end before it"));
                }
                hash.add_bytes(&data);
                at += data.len() as u64;
                self.progress.bytes_read.fetch_add(data.len() as u64, Ordering::Relaxed);
            }
        }
        Progress::add(&self.progress.entries, 1);
        Ok(match has_holes {
            true => hash.finish_segments(file.size()),
            false => hash.finish(),
        })
    }
}
