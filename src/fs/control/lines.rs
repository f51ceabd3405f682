//! Gathering lines from writes of any size.
//!
//! A line ends with its newline, or when its writer closes, syncs or reads the file. What comes
//! without an end is held for the process that wrote it, so two writers never mix, not even through
//! one descriptor. After a refusal the rest of that line is refused too: half a line is never taken
//! for a whole one.

use std::collections::HashMap;

use crate::job::grammar::LINE_BYTES_MAX;

/// Processes that may have half a line in one open file, at most 64 KiB together.
const OWNERS_MAX: usize = 16;

/// What is being written through one open file.
#[derive(Default)]
pub struct Lines {
    pieces: HashMap<u64, Piece>,
}

enum Piece {
    /// The beginning of a line.
    Held(Vec<u8>),
    /// The beginning of a line that has been refused.
    Refused(Bad),
}

/// Why a write is refused before anybody reads the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// It or its line is too long.
    TooLong,
    /// It has a zero byte in this line of it, from 1.
    Zero(usize),
    /// Its line was refused by what it said.
    Malformed,
    /// Too many processes hold half a line.
    TooMany,
}

impl Lines {
    /// Takes what process `owner` writes; gives the lines that are complete by that.
    pub fn take(&mut self, owner: u64, data: &[u8]) -> Result<Vec<Vec<u8>>, Bad> {
        let held = match self.pieces.remove(&owner) {
            Some(Piece::Refused(bad)) => {
                self.refuse(owner, data, bad);
                return Err(bad);
            }
            Some(Piece::Held(held)) => held,
            None => Vec::new(),
        };
        let result = self.split(owner, held, data);
        if let Err(bad) = result {
            self.refuse(owner, data, bad);
        }
        result
    }

    fn split(&mut self, owner: u64, mut held: Vec<u8>, data: &[u8]) -> Result<Vec<Vec<u8>>, Bad> {
        if data.len() > LINE_BYTES_MAX {
            return Err(Bad::TooLong);
        }
        held.extend_from_slice(data);
        let mut lines: Vec<Vec<u8>> = held.split(|it| *it == b'\n').map(<[u8]>::to_vec).collect();
        let rest = lines.pop().unwrap_or_default();
        for (number, line) in (1..).zip(lines.iter().chain([&rest])) {
            if line.len() > LINE_BYTES_MAX {
                return Err(Bad::TooLong);
            }
            if line.contains(&0) {
                return Err(Bad::Zero(number));
            }
        }
        if !rest.is_empty() {
            let held = self.pieces.values().map(|it| match it {
                Piece::Held(line) => line.len(),
                Piece::Refused(_) => 0,
            });
            let is_full = held.sum::<usize>() + rest.len() > LINE_BYTES_MAX;
            if is_full || self.pieces.len() >= OWNERS_MAX {
                return Err(Bad::TooMany);
            }
            self.pieces.insert(owner, Piece::Held(rest));
        }
        Ok(lines)
    }

    /// Notes that a write has been refused: what it left of a line is not waited for.
    pub fn refuse(&mut self, owner: u64, data: &[u8], bad: Bad) {
        self.pieces.remove(&owner);
        if !data.ends_with(b"\n") && self.pieces.len() < OWNERS_MAX {
            self.pieces.insert(owner, Piece::Refused(bad));
        }
    }

    /// The line that `owner` has begun, which ends here.
    pub fn end(&mut self, owner: u64) -> Option<Vec<u8>> {
        match self.pieces.remove(&owner) {
            Some(Piece::Held(line)) => Some(line),
            _ => None,
        }
    }

    /// Every line that has been begun.
    pub fn end_all(&mut self) -> Vec<Vec<u8>> {
        let mut pieces: Vec<_> = self.pieces.drain().collect();
        pieces.sort_unstable_by_key(|it| it.0);
        let held = |it: (u64, Piece)| match it.1 {
            Piece::Held(line) => Some(line),
            Piece::Refused(_) => None,
        };
        pieces.into_iter().filter_map(held).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn lines_are_the_same_however_they_are_cut(
            lines in prop::collection::vec("[^\0\n]{0,20}", 0..6),
            ends: bool,
            cuts in prop::collection::vec(1usize..9, 1..40),
        ) {
            let mut text = lines.join("\n").into_bytes();
            if ends && !lines.is_empty() {
                text.push(b'\n');
            }
            let (mut it, mut found) = (Lines::default(), Vec::new());
            let (mut at, mut cuts) = (0, cuts.iter().cycle());
            while at < text.len() {
                let to = (at + cuts.next().unwrap()).min(text.len());
                found.extend(it.take(7, &text[at..to]).unwrap());
                at = to;
            }
            found.extend(it.end(7));
            let mut expected: Vec<&[u8]> = text.split(|it| *it == b'\n').collect();
            // What follows the last newline is a line only if it is something.
            if expected.last().is_some_and(|it| it.is_empty()) {
                expected.pop();
            }
            prop_assert_eq!(found, expected);
            prop_assert!(it.pieces.is_empty());
        }

        #[test]
        fn writers_do_not_mix(writes in prop::collection::vec((0usize..3, "[a-c\n]{0,4}"), 0..40)) {
            let (mut it, mut found) = (Lines::default(), vec![Vec::new(); 3]);
            for (owner, text) in &writes {
                found[*owner].extend(it.take(*owner as u64, text.as_bytes()).unwrap());
            }
            for (owner, found) in found.iter().enumerate() {
                let all: Vec<_> =
                    writes.iter().filter(|it| it.0 == owner).map(|it| &*it.1).collect();
                let all = all.concat().into_bytes();
                let mut lines: Vec<_> = all.split(|it| *it == b'\n').map(<[u8]>::to_vec).collect();
                let rest = lines.pop().unwrap();
                prop_assert_eq!(found, &lines);
                prop_assert_eq!(it.end(owner as u64).unwrap_or_default(), rest);
            }
        }
    }

    #[test]
    fn the_rest_of_a_refused_line_is_refused_too() {
        let mut it = Lines::default();
        assert_eq!(it.take(1, b"a\0b"), Err(Bad::Zero(1)));
        assert_eq!(it.take(1, b"/home"), Err(Bad::Zero(1)));
        assert_eq!(it.take(1, b"/me\n"), Err(Bad::Zero(1)));
        assert_eq!(it.take(1, b"/me\n"), Ok(vec![b"/me".to_vec()]));
        // Another writer is another matter, and closing ends it.
        assert_eq!(it.take(1, b"ok\n\0"), Err(Bad::Zero(2)));
        assert_eq!(it.take(2, b"x\n"), Ok(vec![b"x".to_vec()]));
        assert_eq!(it.end(1), None);
        assert_eq!(it.take(1, b"y\n"), Ok(vec![b"y".to_vec()]));
    }

    #[test]
    fn what_is_too_long_is_refused_whole_and_in_pieces() {
        let (mut it, long) = (Lines::default(), vec![b'x'; LINE_BYTES_MAX + 1]);
        assert_eq!(it.take(1, &long), Err(Bad::TooLong));
        assert_eq!(it.end_all(), Vec::<Vec<u8>>::new());
        assert_eq!(it.take(1, &long[1..]), Ok(vec![]));
        assert_eq!(it.take(1, b"x"), Err(Bad::TooLong));
        assert_eq!(it.take(1, b"x\n"), Err(Bad::TooLong));
        let line = [&long[1..], b"\n"].concat();
        assert_eq!(it.take(1, &line[1..]).unwrap()[0].len(), LINE_BYTES_MAX - 1);
    }

    #[test]
    fn half_lines_are_bounded() {
        let mut it = Lines::default();
        for owner in 0..OWNERS_MAX as u64 {
            assert_eq!(it.take(owner, b"x"), Ok(vec![]));
        }
        assert_eq!(it.take(99, b"x"), Err(Bad::TooMany));
        assert_eq!(it.take(99, b"x\n"), Ok(vec![b"x".to_vec()]));
        assert_eq!(it.end_all().len(), OWNERS_MAX);
    }
}
