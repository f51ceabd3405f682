//! What a worker does with a stream: reads it to its end, once.
//!
//! Trouble with a stream is the run's, unlike a file's: what cannot be read again must not be left
//! out quietly.

use std::io;

use super::{Done, Stop, Target, Worker};
use crate::backup::layout::Layout;
use crate::backup::stream::StreamJob;
use crate::chunk::file_hash::FileHash;
use crate::entry;
use crate::error::Result;

impl Worker<'_, '_> {
    /// Backs a stream up, in blocks of its own.
    pub(super) fn stream(&mut self, job: StreamJob) -> Result<()> {
        let mut target = Target::Own(Box::new(None));
        let done = self.read_stream(job, &mut target)?;
        self.done.push(done);
        self.flush(None, &mut target)?;
        match &mut target {
            Target::Own(block) => self.blocks.close(block),
            Target::Shared => Ok(()),
        }
    }

    /// Reads a stream, and asks its source whether that was a good end.
    fn read_stream(&mut self, mut job: StreamJob, target: &mut Target) -> Result<Done> {
        let (progress, chunks) = (self.progress, self.chunks);
        let check = || progress.check().and_then(|()| chunks.check());
        let mut content = Layout::default();
        let mut hash = FileHash::of_content(self.hash);
        let read = {
            let mut reader = job.source.reader(&check);
            self.read_in_order(&mut reader, &mut content, &mut hash, target)
        };
        match read {
            Ok(()) => {}
            Err(Stop::Run(error)) => return Err(error),
            Err(Stop::File(_, error)) => return Err(job.source.failed(error, &check)),
            Err(Stop::Gone) => return Err(job.source.failed(io::Error::other("gone"), &check)),
        }
        job.source.finish(&check)?;
        let StreamJob { place, mut meta, version, .. } = job;
        meta.size = content.size;
        let (hash, extra) = (hash.finish(), entry::Extra::default());
        Ok(Done { place, meta, version, hash, content, extra, changed: None, linked: false })
    }
}
