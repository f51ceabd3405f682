//! Batches that do not fit onto a tape: what is left of one goes into another.

use super::batch::{BatchId, BatchStatus};
use super::job::{BatchLine, OWN_KEYS, OpenJob};
use super::text::{self, NewFile, Sections};
use crate::error::Result;

impl OpenJob {
    /// Takes all but the first `kept` files out of a pending batch, into a new one. That one is
    /// there first: after a crash in between, files are in both, and none is in neither.
    pub fn split(&mut self, id: BatchId, kept: u64, added: i64) -> Result<BatchId> {
        let mut batch = self.batch(id)?;
        // Whatever another program has written stays as it is.
        let mut properties = batch.fields().clone();
        OWN_KEYS.iter().for_each(|it| properties.remove(it));
        properties.set("comment", format!("continues {}", id.number))?;
        for _ in 0..kept {
            batch.next_file()?;
        }
        let rest =
            std::iter::from_fn(|| batch.next_file().map(|it| it.map(<[u8]>::to_vec)).transpose());
        let new = self.put_batch(added, &properties, rest)?;
        let (whole, rest) = (self.line(id)?, self.line(new)?);
        let size = whole.size.saturating_sub(rest.size);
        self.shorten(id, BatchLine { number: id.number, count: kept, size })?;
        Ok(new)
    }

    /// Cuts the list of a pending batch.
    fn shorten(&mut self, id: BatchId, line: BatchLine) -> Result<()> {
        let path = self.batch_path(id)?;
        let pending = BatchId { status: BatchStatus::Pending, ..id };
        let to = self.dir().join(pending.file_name());
        let mut new = NewFile::create(&to)?;
        let mut sections = Sections::new(text::open(&path)?);
        let mut is_first = true;
        while let Some(name) = sections.next_section()? {
            if !is_first {
                new.put(b"\n")?;
            }
            is_first = false;
            new.put_line(&[b"%", &name])?;
            if name == b"batch" {
                let mut fields = sections.fields()?;
                fields.set("count", line.count.to_string())?;
                fields.set("size", line.size.to_string())?;
                new.put(&fields.to_text())?;
            }
            let mut left = if name == b"files" { line.count } else { u64::MAX };
            while left > 0
                && let Some(line) = sections.next_line()?
            {
                new.put_line(&[line])?;
                left -= 1;
            }
        }
        new.commit(&to)?;
        self.rewrite(&[line])
    }
}
