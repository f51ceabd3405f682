//! Which blocks are looked at, and in which order.

use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_64;

use super::Work;
use crate::catalog::NumberSet;
use crate::catalog::health::VerifiedCopy;
use crate::error::Result;

/// Blocks that are chosen at a time.
const PAGE_BLOCKS: u64 = 1024;

/// Gives the numbers of the blocks to look at, in pages.
pub struct Choice<'w, 'a> {
    work: &'w Work<'a>,
    /// What was given already, where that matters.
    given: Mutex<NumberSet>,
    stage: Stage,
}

enum Stage {
    /// All blocks, or those of a sample, from the number after this one on.
    All(u64),
    /// The blocks that a run needs, after this number.
    Needed(u64),
    /// Those with a copy of which nothing is known, after this number.
    Unseen(u64),
    /// Those that were verified before, the longest ago first.
    Seen(Option<VerifiedCopy>),
    /// Those with a copy that is known to be bad.
    Bad(Option<(String, crate::volume::BlockId)>),
    Done,
}

impl<'w, 'a> Choice<'w, 'a> {
    /// The blocks that the options of the work say.
    pub fn new(work: &'w Work<'a>) -> Choice<'w, 'a> {
        let stage = match (&work.needed, work.options.max_duration) {
            (Some(_), _) => Stage::Needed(0),
            (None, Some(_)) => Stage::Unseen(0),
            (None, None) => Stage::All(0),
        };
        Choice { work, given: Mutex::default(), stage }
    }

    /// The next blocks; `None` after the last.
    pub fn next_page(&mut self) -> Result<Option<Vec<u64>>> {
        loop {
            let page = match std::mem::replace(&mut self.stage, Stage::Done) {
                Stage::Done => return Ok(None),
                Stage::All(after) => {
                    let page = self.numbers(after, Stage::All, Stage::Done)?;
                    page.into_iter().filter(|it| self.is_in_sample(*it)).collect()
                }
                Stage::Needed(after) => self.needed(after),
                Stage::Unseen(after) => {
                    let page = self.numbers(after, Stage::Unseen, Stage::Seen(None))?;
                    self.unseen(page)?
                }
                Stage::Seen(after) => self.seen(after)?,
                Stage::Bad(after) => self.bad(after)?,
            };
            if !page.is_empty() {
                return Ok(Some(page));
            }
        }
    }

    fn numbers(&mut self, after: u64, next: impl Fn(u64) -> Stage, end: Stage) -> Result<Vec<u64>> {
        let snapshots = self.work.snapshots;
        let page = snapshots.with_reader(|reader| reader.block_numbers(after, PAGE_BLOCKS))?;
        self.stage = page.last().map_or(end, |it| next(*it));
        Ok(page)
    }

    fn is_in_sample(&self, number: u64) -> bool {
        let Some(sample) = self.work.options.sample else { return true };
        let bytes = [sample.seed.to_le_bytes(), number.to_le_bytes()].concat();
        // A part of a million is near enough.
        let draw = xxh3_64(&bytes) % 1_000_000;
        (u32::try_from(draw).map(f64::from).unwrap_or_default()) < sample.percent * 10_000.0
    }

    fn needed(&mut self, after: u64) -> Vec<u64> {
        let all = self.work.needed.iter().flat_map(|it| it.blocks.iter_from(after + 1));
        let most = usize::try_from(PAGE_BLOCKS).unwrap_or(usize::MAX);
        let page: Vec<u64> = all.take(most).filter(|it| self.is_in_sample(*it)).collect();
        let all = self.work.needed.iter().flat_map(|it| it.blocks.iter_from(after + 1));
        if let Some(last) = all.take(most).last() {
            self.stage = Stage::Needed(last);
        }
        page
    }

    /// Those of a page with a copy that was neither found right nor found bad.
    fn unseen(&self, page: Vec<u64>) -> Result<Vec<u64>> {
        let mut unseen = Vec::new();
        for number in page {
            let row = self.work.snapshots.with_reader(|reader| reader.block(number))?;
            let copies = row.volumes.iter().filter_map(|it| self.work.volumes.get(*it));
            let health = &self.work.health;
            if copies.into_iter().any(|it| !health.is_known(&it.config.uuid, &row.id)) {
                unseen.push(number);
            }
        }
        unseen.retain(|it| self.give(*it));
        Ok(unseen)
    }

    fn seen(&mut self, after: Option<VerifiedCopy>) -> Result<Vec<u64>> {
        let most = usize::try_from(PAGE_BLOCKS).unwrap_or(usize::MAX);
        let page = self.work.health.verified(self.work.started, after.as_ref(), most);
        let Some(last) = page.last() else {
            self.stage = Stage::Bad(None);
            return Ok(Vec::new());
        };
        self.stage = Stage::Seen(Some(last.clone()));
        self.known(page.iter().map(|it| (&*it.volume, it.block)))
    }

    fn bad(&mut self, after: Option<(String, crate::volume::BlockId)>) -> Result<Vec<u64>> {
        let most = usize::try_from(PAGE_BLOCKS).unwrap_or(usize::MAX);
        let after = after.as_ref().map(|it| (&*it.0, it.1));
        let page = self.work.health.bad(after, most);
        let Some(last) = page.last() else { return Ok(Vec::new()) };
        self.stage = Stage::Bad(Some((last.volume.clone(), last.block)));
        self.known(page.iter().map(|it| (&*it.volume, it.block)))
    }

    /// The blocks of these copies, each once; what the catalog does not have is forgotten.
    fn known<'c>(
        &self,
        copies: impl Iterator<Item = (&'c str, crate::volume::BlockId)>,
    ) -> Result<Vec<u64>> {
        let reachable = self.work.volumes.present().iter().map(|it| &it.config);
        let missing = self.work.volumes.missing().iter().map(|it| &it.0);
        let configs: Vec<_> = reachable.chain(missing).collect();
        let (mut numbers, mut gone) = (Vec::new(), Vec::new());
        for (uuid, block) in copies {
            let config = configs.iter().find(|it| it.uuid == uuid);
            let found = self.work.snapshots.with_reader(|reader| {
                match config.is_some_and(|it| reader.has_copy(&block, it.number).unwrap_or(true)) {
                    true => reader.numbers_of(&block),
                    false => Ok(Vec::new()),
                }
            })?;
            match found.is_empty() {
                true => gone.push((uuid, block)),
                false => numbers.extend(found),
            }
        }
        self.work.health.forget(&gone);
        numbers.retain(|it| self.give(*it));
        Ok(numbers)
    }

    /// Whether a block is given for the first time.
    fn give(&self, number: u64) -> bool {
        let mut given = self.given.lock();
        let is_new = !given.contains(number);
        given.insert(number);
        is_new
    }
}
