//! A set of numbers, of blocks or versions: bits, in pages that are there as far as they are
//! needed.

use std::collections::BTreeMap;

/// Words of a page.
const PAGE_WORDS: usize = 8;
/// Numbers of a page.
const PAGE_NUMBERS: u64 = PAGE_WORDS as u64 * 64;

/// A set of numbers. Those of a catalog lie close together, and take a bit or two each.
#[derive(Clone, Debug, Default)]
pub struct NumberSet {
    pages: BTreeMap<u64, [u64; PAGE_WORDS]>,
    len: u64,
}

impl NumberSet {
    /// Adds a number.
    pub fn insert(&mut self, number: u64) {
        let page = self.pages.entry(number / PAGE_NUMBERS).or_default();
        let (word, bit) = place(number);
        if let Some(word) = page.get_mut(word) {
            self.len += u64::from(*word & bit == 0);
            *word |= bit;
        }
    }

    /// Whether a number is in it.
    pub fn contains(&self, number: u64) -> bool {
        let (word, bit) = place(number);
        let page = self.pages.get(&(number / PAGE_NUMBERS));
        page.and_then(|it| it.get(word)).is_some_and(|it| it & bit != 0)
    }

    /// How many numbers are in it.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All numbers in order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.iter_from(0)
    }

    /// All numbers from `start` on, in order.
    pub fn iter_from(&self, start: u64) -> impl Iterator<Item = u64> + '_ {
        let numbers = self.pages.range(start / PAGE_NUMBERS..).flat_map(|(page, words)| {
            let first = page * PAGE_NUMBERS;
            (0u64..).zip(words).flat_map(move |(at, word)| {
                let bits = (0..64).filter(move |bit| word >> bit & 1 == 1);
                bits.map(move |bit| first + at * 64 + bit)
            })
        });
        numbers.skip_while(move |it| *it < start)
    }
}

fn place(number: u64) -> (usize, u64) {
    let at = number % PAGE_NUMBERS;
    (usize::try_from(at / 64).unwrap_or_default(), 1 << (at % 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_is_a_set(
            numbers in prop::collection::vec(prop_oneof![0u64..2000, any::<u64>()], 0..99),
        ) {
            let mut set = NumberSet::default();
            numbers.iter().for_each(|it| set.insert(*it));
            let expected: BTreeSet<u64> = numbers.into_iter().collect();
            prop_assert_eq!(set.len(), expected.len() as u64);
            prop_assert!(set.iter().eq(expected.iter().copied()));
            prop_assert!(set.iter_from(700).eq(expected.range(700..).copied()));
            prop_assert!((0..2000).all(|it| set.contains(it) == expected.contains(&it)));
        }
    }
}
