//! Which entries are wanted: patterns as in a .gitignore, on the path in the snapshot.
//!
//! What is excluded is neither restored nor deleted. Where there are patterns of what to include,
//! an entry is wanted if it or a directory above it matches one.

use std::path::Path;

use ignore::Match;
use ignore::gitignore::{Gitignore, GitignoreBuilder};

use crate::error::{Error, Result};
use crate::sys::path_from;

/// The patterns of one restore.
pub struct Filter {
    include: Gitignore,
    exclude: Gitignore,
}

/// What becomes of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// It is restored.
    Wanted,
    /// It is a directory that is restored only if something in it is.
    Perhaps,
    /// It is left out with all below it.
    Left,
}

impl Filter {
    /// The filter of these patterns.
    pub fn new(include: &[String], exclude: &[String]) -> Result<Filter> {
        Ok(Filter { include: build("include", include)?, exclude: build("exclude", exclude)? })
    }

    /// Whether the root of what is restored is wanted without a look at what is in it.
    pub fn root(&self) -> Choice {
        if self.include.is_empty() { Choice::Wanted } else { Choice::Perhaps }
    }

    /// What becomes of `path`, which lies in a directory for which the choice was `above`.
    pub fn choose(&self, path: &[u8], is_dir: bool, above: Choice) -> Choice {
        let path = path_from(path);
        if !self.exclude.is_empty() && self.exclude.matched(path, is_dir).is_ignore() {
            return Choice::Left;
        }
        let is_wanted = match self.include.is_empty() {
            true => true,
            false => match self.include.matched(path, is_dir) {
                Match::Ignore(_) => true,
                Match::Whitelist(_) => false,
                Match::None => above == Choice::Wanted,
            },
        };
        match (is_wanted, is_dir) {
            (true, _) => Choice::Wanted,
            (false, true) => Choice::Perhaps,
            (false, false) => Choice::Left,
        }
    }

    /// The choice for a directory at `path`, from what is said of it and of those above it.
    pub fn choose_deep(&self, path: &[u8]) -> Choice {
        let mut choice = self.root();
        let ends = path.iter().enumerate().filter(|it| *it.1 == b'/').map(|it| it.0);
        for end in ends.chain([path.len()]).filter(|end| *end > 0) {
            choice = self.choose(path.get(..end).unwrap_or_default(), true, choice);
        }
        choice
    }
}

fn build(what: &str, patterns: &[String]) -> Result<Gitignore> {
    let mut builder = GitignoreBuilder::new(Path::new(""));
    for pattern in patterns {
        builder
            .add_line(None, pattern)
            .map_err(|e| Error::usage(format!("{what} pattern {pattern:?}: {e}")))?;
    }
    builder.build().map_err(|e| Error::usage(format!("{what}: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(include: &[&str], exclude: &[&str]) -> Filter {
        let list = |it: &[&str]| it.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
        Filter::new(&list(include), &list(exclude)).unwrap()
    }

    #[test]
    fn patterns_are_those_of_a_gitignore() {
        let it = filter(&[], &["*.o", "!keep.o", "/top", "cache/"]);
        let choose = |path: &[u8], is_dir| it.choose(path, is_dir, Choice::Wanted);
        assert_eq!(choose(b"a/b.o", false), Choice::Left);
        assert_eq!(choose(b"a/\xff.o", false), Choice::Left);
        assert_eq!(choose(b"a/keep.o", false), Choice::Wanted);
        assert_eq!(choose(b"top", false), Choice::Left);
        assert_eq!(choose(b"a/top", false), Choice::Wanted);
        assert_eq!(choose(b"a/cache", true), Choice::Left);
        assert_eq!(choose(b"a/cache", false), Choice::Wanted);
    }

    #[test]
    fn what_is_below_an_included_directory_is_wanted() {
        let it = filter(&["src/", "*.md", "!draft.md"], &["*.o"]);
        assert_eq!(it.root(), Choice::Perhaps);
        assert_eq!(it.choose_deep(b""), Choice::Perhaps);
        assert_eq!(it.choose_deep(b"a/src/b"), Choice::Wanted);
        assert_eq!(it.choose(b"a", true, Choice::Perhaps), Choice::Perhaps);
        assert_eq!(it.choose(b"a/x", false, Choice::Perhaps), Choice::Left);
        assert_eq!(it.choose(b"a/x.md", false, Choice::Perhaps), Choice::Wanted);
        assert_eq!(it.choose(b"a/src", true, Choice::Perhaps), Choice::Wanted);
        assert_eq!(it.choose(b"a/src/x", false, Choice::Wanted), Choice::Wanted);
        assert_eq!(it.choose(b"a/src/x.o", false, Choice::Wanted), Choice::Left);
        assert_eq!(it.choose(b"a/src/draft.md", false, Choice::Wanted), Choice::Left);
    }

    #[test]
    fn a_bad_pattern_is_told() {
        let refused = Filter::new(&["{a".to_owned()], &[]).err().unwrap();
        assert!(refused.to_string().contains("{a"), "{refused}");
    }
}
