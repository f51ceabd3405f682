//! Which lots are of one catalog, and of which one a catalog is made.
//!
//! Invariant: what is made does not depend on the order of the tapes, but for which of two catalogs
//! it is.

use std::collections::BTreeSet;

use super::Gather;
use super::lot::{Lot, Relation};
use crate::error::{Error, ErrorKind, Quoted, Result};

/// Problems that are named in the error that says that nothing was found.
const NAMED_MAX: usize = 5;

impl Gather<'_> {
    /// Makes one of all lots that something links to the one at hand; gives which one it is then.
    pub(super) fn link(&mut self, number: u64) -> Result<u64> {
        let mut number = number;
        loop {
            let Some(lot) = self.lots.get(&number) else { return Ok(number) };
            let is_same =
                |it: &(&u64, &Lot)| *it.0 != number && lot.relation(it.1) == Relation::Same;
            let Some(other) = self.lots.iter().find(is_same).map(|it| *it.0) else {
                return Ok(number);
            };
            let (first, second) = (number.min(other), number.max(other));
            if let Some(second) = self.lots.remove(&second)
                && let Some(first) = self.lots.get_mut(&first)
            {
                first.join(second, self.progress)?;
            }
            number = first;
        }
    }

    /// The catalog that is made: the one of the first tape that says which one it is of. Tapes of
    /// others are named.
    pub(super) fn choose(&mut self) -> Result<Lot> {
        let mut lots = std::mem::take(&mut self.lots);
        let said = lots.iter().find(|it| !it.1.runs.is_empty()).map(|it| *it.0);
        let number = said.or_else(|| lots.keys().next().copied()).unwrap_or_default();
        let Some(mut chosen) = lots.remove(&number) else {
            let mut what =
                "no tape has an archive of a run: nothing to make a catalog of".to_owned();
            for problem in self.done.problems.iter().take(NAMED_MAX) {
                what.push_str(&format!("; {problem}"));
            }
            return Err(Error::new(ErrorKind::NotFound, what));
        };
        for lot in lots.into_values() {
            let is_near = lot.runs.is_empty() || !lot.catalogs.is_disjoint(&chosen.catalogs);
            if chosen.relation(&lot) == Relation::Unknown && is_near {
                chosen.join(lot, self.progress)?;
                continue;
            }
            self.pass_over(&lot)?;
        }
        for (label, filenum) in &chosen.files {
            self.done.files += 1;
            self.tapes.members((label, *filenum), &mut |it| {
                self.done.blocks += 1;
                self.done.bytes += it.len;
                Ok(())
            })?;
        }
        self.done.documents = chosen.documents;
        Ok(chosen)
    }

    /// Names the tapes of another catalog, and forgets what they have of it.
    fn pass_over(&mut self, lot: &Lot) -> Result<()> {
        let places: Vec<String> = lot.catalogs.iter().map(|it| Quoted(it).to_string()).collect();
        let run = lot.runs.last_key_value();
        let run = run.map(|it| format!(", run {} is {}", it.0, it.1)).unwrap_or_default();
        let error = Error::new(
            ErrorKind::WrongTape,
            format!(
                "it is of another catalog than the first tape (it was at {}{run}) and is passed \
                 over: give its tapes alone, with another --catalog and --into",
                places.join(", ")
            ),
        );
        let labels: BTreeSet<&Vec<u8>> = lot.files.iter().map(|it| &it.0).collect();
        for label in labels {
            let mut numbers = Vec::new();
            for (_, filenum) in lot.files.iter().filter(|it| it.0 == *label) {
                numbers.push(filenum.to_string());
                self.tapes.forget_file(label, *filenum)?;
            }
            if self.tapes.files(label)?.is_empty() {
                self.tapes.forget(label)?;
            }
            let name = format!("tape {}, file {}", Quoted(label), numbers.join(", "));
            self.done.note(self.progress, name, &error);
        }
        Ok(())
    }
}
