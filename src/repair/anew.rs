//! Content that cannot be stored as it was: the same plain bytes as a block of another name.
//!
//! A later compressor makes other bytes of the same content. The block keeps its number and what
//! lies where in it; its name, its frames and its copies are new. They are durable before the
//! catalog names them, and manifests that name the old one are written again.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::block::{Patient, Place};
use super::{From, Healed, Work};
use crate::catalog::{Spool, manifest, meta};
use crate::chunk::frame::Encoder;
use crate::error::{Error, Result};
use crate::sys::quoted;
use crate::volume::{BlockIndex, Volume, Writer as BlockWriter};

impl Work<'_> {
    /// Stores a block anew of which all plain bytes are known.
    pub fn store_anew(&mut self, patient: &Patient<'_>, plain: &File) -> Result<()> {
        let old = patient.index.id;
        let Some((first, rest)) = patient.bad.split_first() else { return Ok(()) };
        let (pending, index) = self.write_anew(patient, plain, first)?;
        self.publish(first, pending, &index.id)?;
        let mut on: Vec<&Volume> = vec![first];
        for to in rest {
            let check = |_| self.progress.check();
            match self.copy(first, to, &index, &check)? {
                Ok(()) => on.push(to),
                // It has fewer copies now, which replicate makes.
                Err(e) => self.note(&to.config.path, &e),
            }
        }
        let lens = self.store.index_lens().to_vec();
        let writer = BlockWriter::new(
            self.volumes,
            self.store.settings.hash,
            self.store.settings.block_bytes,
            self.store.writer.next_block()?,
            lens,
        );
        let number = patient.numbers.last().copied().unwrap_or_default();
        let mut copies = Vec::new();
        for volume in &on {
            copies.push(writer.add_record(volume.config.number, number, &index)?);
        }
        let lens = writer.index_lens();
        let numbers = self.volumes.present().iter().map(|it| it.config.number);
        let known: Vec<(i64, u64)> =
            numbers.zip(&lens).filter_map(|(it, len)| Some((it, (*len)?))).collect();
        drop(writer);
        self.store.writer.rename_block(&patient.numbers, &index, &copies, &known)?;
        self.store.set_index_lens(lens);
        for number in &patient.numbers {
            self.renamed_in.extend(self.store.reader.runs_that_name(*number)?);
        }
        for (at, volume) in self.volumes.present().iter().enumerate() {
            // Two records of one number would leave a rebuild in doubt.
            if patient.bad.iter().any(|it| it.config.number == volume.config.number)
                && let Err(e) = self.write_index(at, volume)
            {
                self.note(&volume.config.path, &e.context("its index"));
            }
        }
        for volume in &patient.bad {
            self.store.health.forget(&[(&volume.config.uuid, old)]);
            // Nothing names it any more, and its good frames may be of use to somebody.
            let result = volume
                .keep_damaged(&old)
                .and_then(|()| volume.store.remove(&old))
                .and_then(|()| volume.remove_document(&meta::document_name(&old)));
            if let Err(e) = result {
                self.note(&volume.config.path, &e);
            }
        }
        for volume in on {
            let (path, now) = (volume.config.path.clone(), index.id);
            self.done.heal(Healed { block: old, volume: path, from: From::Anew, now });
        }
        Ok(())
    }

    fn write_anew(
        &self,
        patient: &Patient<'_>,
        plain: &File,
        to: &Volume,
    ) -> Result<(Box<dyn crate::volume::store::PendingBlock>, BlockIndex)> {
        let mut encoder = Encoder::new(self.store.settings.compression)?;
        let mut pending = to.store.begin()?;
        let mut hasher = self.store.settings.hash.hasher();
        let mut index = BlockIndex { frames: Vec::new(), ..patient.index.clone() };
        for (at, place) in patient.frames.iter().zip(&patient.places) {
            self.progress.check()?;
            if let Place::On(_) = place {
                let bytes = self.frame_bytes(patient, at, *place, plain)?;
                hasher.update(&bytes);
                pending.append(&bytes)?;
                index.frames.push(at.frame);
                continue;
            }
            let mut bytes = vec![0; at.frame.plain_len as usize];
            let failed = |e| Error::io("what was brought back", e);
            plain.read_exact_at(&mut bytes, at.plain_at).map_err(failed)?;
            let (frame, stored) = encoder.encode(&bytes)?;
            hasher.update(stored);
            pending.append(stored)?;
            index.frames.push(frame);
        }
        index.id = hasher.finish();
        index.check()?;
        Ok((pending, index))
    }

    /// Writes the manifests again that name a block by its old name.
    pub fn manifests(&mut self) -> Result<()> {
        for run in std::mem::take(&mut self.renamed_in) {
            let run = self.store.reader.run(run)?;
            let name = manifest::document_name(run.id);
            for volume in self.volumes.present() {
                let (reader, hash) = (&self.store.reader, self.store.settings.hash);
                let check = || self.progress.check();
                let mut documents = volume.documents();
                let written = documents.add(&name, |out| {
                    let mut spool = Spool::new(self.dir())?;
                    // What follows in their chain is made anew by `genmeta`.
                    let of = (&run, None);
                    reader.write_manifest(of, hash, &mut spool, out, &check).map(|_| ())
                });
                if let Err(e) = written.and_then(|()| documents.finish()) {
                    let what = format!("the manifest of run {} on it", run.id);
                    self.note(&volume.config.path, &e.context(what));
                } else {
                    self.done.documents += 1;
                    log::debug!("manifest {name} on {}", quoted(&volume.config.path));
                }
            }
        }
        Ok(())
    }
}
