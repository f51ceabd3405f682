//! What of a tree is left out.
//!
//! Patterns are those of a `.gitignore` in the source's root, in the order in which they were
//! given: the last one that matches an entry decides. A directory that is left out is not entered,
//! with one exception, because it is what people mean: an include names the directories on its
//! way. With `--exclude /a --include /a/b/c` the directories `a` and `a/b` are kept with nothing
//! else in them. The way ends at a `**`, and an include without a slash in it has none, so no tree
//! that is left out is searched.
//!
//! The pattern language is the `ignore` crate's, and its patterns are UTF-8; names are any bytes,
//! and a `?` matches each one of them. A pattern that is not UTF-8 is refused: one that matched
//! more than it says would lose files.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ignore::gitignore::{Gitignore, GitignoreBuilder};

use super::ahead::Name;
use crate::entry::check_name;
use crate::error::{Error, Quoted, Result};
use crate::sys::{self, Stat, at, quoted};

/// Longest file of patterns, in bytes: patterns become one automaton, which is held in memory.
const PATTERN_FILE_BYTES_MAX: u64 = 1 << 20;
/// The name and the first bytes of a cache directory's tag (<https://bford.info/cachedir/>).
const CACHE_TAG: &str = "CACHEDIR.TAG";
const CACHE_SIGNATURE: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";

/// One word about what to leave out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Leave out what matches; with a `!` before it, what matches stays.
    Exclude(OsString),
    /// What matches stays.
    Include(OsString),
    /// The lines of this file, which is written like a `.gitignore`.
    ExcludeFrom(PathBuf),
}

/// All words about what to leave out.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// In the order in which they were given.
    pub rules: Vec<Rule>,
    /// Whether files of patterns have to be regular ones of a disk: a queue must not wait for who
    /// writes into a pipe or a log.
    pub only_plain_files: bool,
    /// Whether to leave out the contents of directories with a `CACHEDIR.TAG`.
    pub caches: bool,
    /// Leave out the contents of directories in which one of these names is.
    pub if_present: Vec<OsString>,
    /// Leave out files of more bytes than this.
    pub larger_than: Option<u64>,
}

impl Rules {
    /// Refuses what makes no sense, as far as that can be told without reading files.
    pub fn check(&self) -> Result<()> {
        let mut words = self.clone();
        words.rules.retain(|it| !matches!(it, Rule::ExcludeFrom(_)));
        Filter::new(&words).map(|_| ())
    }

    /// Whether nothing is left out.
    pub fn is_empty(&self) -> bool {
        let Rules { rules, only_plain_files: _, caches, if_present, larger_than } = self;
        rules.is_empty() && !caches && if_present.is_empty() && larger_than.is_none()
    }
}

/// What becomes of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is in, with what is below it.
    In,
    /// It is a directory on the way to something that is in; nothing else of it is.
    Way,
    /// It is left out.
    Out,
}

/// Rules, made ready to be asked about every entry.
pub struct Filter {
    patterns: Gitignore,
    /// The same patterns, and after each include the directories on its way.
    ways: Gitignore,
    caches: bool,
    if_present: Vec<OsString>,
    larger_than: Option<u64>,
}

impl Filter {
    /// Reads the rules, and the files that they name.
    pub fn new(rules: &Rules) -> Result<Filter> {
        let mut patterns = Patterns::new();
        for rule in &rules.rules {
            match rule {
                Rule::Exclude(pattern) => patterns.add_word("exclude", pattern)?,
                Rule::Include(pattern) => patterns.add_word("include", pattern)?,
                Rule::ExcludeFrom(path) => patterns.add_file(path, rules.only_plain_files)?,
            }
        }
        for name in &rules.if_present {
            if check_name(name.as_bytes()).is_err() {
                let name = Quoted(name.as_bytes());
                let message = format!("--exclude-if-present '{name}' is not the name of a file");
                return Err(Error::usage(message));
            }
        }
        let (patterns, ways) = patterns.build()?;
        let (caches, if_present) = (rules.caches, rules.if_present.clone());
        Ok(Filter { patterns, ways, caches, if_present, larger_than: rules.larger_than })
    }

    /// What becomes of the entry at `path`, which is relative to the source's root; `parent` is
    /// what became of the directory it is in.
    pub fn judge(&self, path: &[u8], stat: &Stat, parent: Verdict) -> Verdict {
        if stat.is_file() && self.larger_than.is_some_and(|most| stat.size > most) {
            return Verdict::Out;
        }
        self.judge_path(sys::path_from(path), stat.is_dir(), parent)
    }

    /// Judges an entry by its path below the source's root and by what was said of its parent.
    pub fn judge_path(&self, path: &Path, is_dir: bool, parent: Verdict) -> Verdict {
        if self.patterns.is_empty() {
            return parent;
        }
        let found = self.patterns.matched(path, is_dir);
        let is_out = found.is_ignore() || (found.is_none() && parent != Verdict::In);
        match is_out {
            false => Verdict::In,
            true if is_dir && self.ways.matched(path, true).is_whitelist() => Verdict::Way,
            true => Verdict::Out,
        }
    }

    /// Whether the directory at `path`, relative to the source's root, is not entered.
    pub fn covers(&self, path: &Path) -> bool {
        let mut above: Vec<&Path> = path.ancestors().collect();
        above.retain(|it| !it.as_os_str().is_empty());
        let judge = |parent, path: &&Path| match parent {
            Verdict::Out => Verdict::Out,
            parent => self.judge_path(path, true, parent),
        };
        above.iter().rev().fold(Verdict::In, judge) == Verdict::Out
    }

    /// Takes away all names of a directory but those that mark it as one whose contents are left
    /// out, if there are any.
    pub fn leave_marks(&self, dir: &OwnedFd, names: &mut Vec<Name>) {
        if !self.caches && self.if_present.is_empty() {
            return;
        }
        let is_mark = |name: &&OsString| {
            self.if_present.contains(name)
                || (self.caches && *name == CACHE_TAG && has_cache_signature(dir))
        };
        let names_only = names.iter().map(|it| &it.name);
        let marks: HashSet<OsString> = names_only.filter(is_mark).cloned().collect();
        if marks.is_empty() {
            return;
        }
        // A directory can be a mark, but what is in it is contents like any other.
        let is_dir = |name: &OsStr| at::stat(dir, name).is_ok_and(|it| it.is_dir());
        names.retain(|it| marks.contains(&it.name) && !is_dir(&it.name));
    }
}

/// Whether a directory's tag is a real one. One that cannot be read proves nothing, and leaving
/// too little out is the lesser evil.
fn has_cache_signature(dir: &OwnedFd) -> bool {
    let read = || -> std::io::Result<bool> {
        let tag = OsStr::new(CACHE_TAG);
        // Looked at before, so that no device or FIFO is opened, and after, for it may change.
        if !at::stat(dir, tag)?.is_file() {
            return Ok(false);
        }
        let file = at::open_read(dir, tag)?;
        if !sys::fstat(&file)?.is_file() {
            return Ok(false);
        }
        let mut start = Vec::new();
        file.take(CACHE_SIGNATURE.len() as u64).read_to_end(&mut start)?;
        Ok(start == CACHE_SIGNATURE)
    };
    read().unwrap_or(false)
}

/// Patterns being collected.
struct Patterns {
    patterns: GitignoreBuilder,
    ways: GitignoreBuilder,
}

impl Patterns {
    fn new() -> Patterns {
        // Matched against paths below the source's root.
        Patterns { patterns: GitignoreBuilder::new(""), ways: GitignoreBuilder::new("") }
    }

    /// Adds a pattern of the command line. Unlike a line of a file it is what it is, also if it
    /// begins with a `#` or ends with a space.
    fn add_word(&mut self, option: &str, pattern: &OsStr) -> Result<()> {
        let refused = |why: &dyn std::fmt::Display| {
            Error::usage(format!("--{option} '{}': {why}", Quoted(pattern.as_bytes())))
        };
        let Some(text) = pattern.to_str() else {
            return Err(refused(&"a pattern has to be UTF-8; a ? stands for any one byte"));
        };
        let is_include = option == "include";
        if text.is_empty() || text == "!" {
            return Err(refused(&"an empty pattern"));
        }
        if is_include && text.starts_with('!') {
            return Err(refused(&"say --exclude, or \\! if the name begins with a !"));
        }
        let mut line = match (is_include, text.starts_with('#')) {
            (true, _) => format!("!{text}"),
            (false, true) => format!("\\{text}"),
            (false, false) => text.to_owned(),
        };
        if let Some(last) = line.pop() {
            match last.is_whitespace() && !line.ends_with('\\') {
                true => line.push_str(&format!("{{{last}}}")),
                false => line.push(last),
            }
        }
        self.add_line(&line).map_err(|e| refused(&e))
    }

    /// Adds the lines of a file. What they say is not repeated in errors: those of a job are read
    /// by more people than the file may be.
    fn add_file(&mut self, path: &Path, only_plain: bool) -> Result<()> {
        let failed = |e| Error::io(format!("--exclude-from {}", quoted(path)), e);
        let refused = |why: &str| Error::usage(format!("--exclude-from {}: {why}", quoted(path)));
        let is_plain = |stat: Stat| stat.is_file() || !only_plain;
        // Looked at before, so that no device is opened, and after, for it may change. There are
        // regular files too that keep a reader waiting: logs that grow, and what the kernel tells.
        if !is_plain(sys::stat(path).map_err(failed)?) {
            return Err(refused("not a regular file"));
        }
        let mut options = File::options();
        if only_plain {
            options.custom_flags(sys::c::O_NONBLOCK);
        }
        let file = options.read(true).open(path).map_err(failed)?;
        if !is_plain(sys::fstat(&file).map_err(failed)?) || only_plain && sys::is_proc(&file) {
            return Err(refused("not a regular file of a disk"));
        }
        let mut text = Vec::new();
        file.take(PATTERN_FILE_BYTES_MAX + 1).read_to_end(&mut text).map_err(failed)?;
        if text.len() as u64 > PATTERN_FILE_BYTES_MAX {
            return Err(refused("longer than 1 MiB"));
        }
        let text = text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&text);
        for (number, line) in (1..).zip(text.split(|byte| *byte == b'\n')) {
            let Ok(line) = std::str::from_utf8(line) else {
                let why = "a pattern has to be UTF-8; a ? stands for any one byte";
                return Err(refused(&format!("line {number}: {why}")));
            };
            self.add_line(line).map_err(|e| refused(&format!("line {number}: {e}")))?;
        }
        Ok(())
    }

    fn add_line(&mut self, line: &str) -> std::result::Result<(), String> {
        for builder in [&mut self.patterns, &mut self.ways] {
            builder.add_line(None, line).map_err(|e| cause(&e))?;
        }
        for way in line.strip_prefix('!').map(ways_to).unwrap_or_default() {
            // A piece of a pattern may be none, as of `{a/b,c}`; then there is no way.
            let _ = self.ways.add_line(None, &way);
        }
        Ok(())
    }

    fn build(self) -> Result<(Gitignore, Gitignore)> {
        let failed = |e| Error::usage(format!("the patterns of what to leave out: {}", cause(&e)));
        Ok((self.patterns.build().map_err(failed)?, self.ways.build().map_err(failed)?))
    }
}

/// Why a pattern is none, without the pattern.
fn cause(error: &ignore::Error) -> String {
    match error {
        ignore::Error::Glob { err, .. } => err.clone(),
        other => other.to_string(),
    }
}

/// Patterns of the directories on the way to what `pattern` includes, outermost first.
fn ways_to(pattern: &str) -> Vec<String> {
    let pattern = pattern.trim_end().trim_end_matches('/');
    if !pattern.contains('/') {
        return Vec::new();
    }
    let names: Vec<&str> = pattern.trim_start_matches('/').split('/').collect();
    let (mut ways, mut way) = (Vec::new(), String::from("!"));
    for name in names.iter().take(names.len() - 1).take_while(|it| !it.contains("**")) {
        way.push('/');
        way.push_str(name);
        ways.push(format!("{way}/"));
    }
    ways
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_word_is_taken_or_refused(
            word in "[-!/\\\\#*?\\[\\]{},ab \t\u{e4}\u{a0}]{0,9}",
            path in "[ab!#\u{e4}][ab/ ]{0,7}",
        ) {
            for prefix in ["", "+", "!"] {
                if let Ok(filter) = filter(&[&format!("{prefix}{word}")]) {
                    for is_dir in [false, true] {
                        filter.judge_path(Path::new(&path), is_dir, Verdict::In);
                    }
                    filter.covers(Path::new(&path));
                }
            }
        }
    }

    fn filter(words: &[&str]) -> Result<Filter> {
        let rule = |word: &&str| match word.strip_prefix('+') {
            Some(word) => Rule::Include(word.into()),
            None => Rule::Exclude(word.into()),
        };
        Filter::new(&Rules { rules: words.iter().map(rule).collect(), ..Rules::default() })
    }

    /// What is in of a tree in which `files` are, as a walk finds it.
    fn walk(words: &[&str], files: &[&str]) -> Vec<String> {
        let filter = filter(words).unwrap();
        let mut found = Vec::new();
        for file in files {
            let mut verdict = Verdict::In;
            let mut path: Vec<&Path> = Path::new(file).ancestors().collect();
            path.retain(|it| !it.as_os_str().is_empty());
            for (left, part) in (0..path.len()).rev().zip(path.iter().rev()) {
                verdict = filter.judge_path(part, left > 0, verdict);
                if verdict == Verdict::Out {
                    break;
                }
                let name = part.to_str().unwrap().to_owned();
                if !found.contains(&name) {
                    found.push(name);
                }
            }
        }
        found
    }

    #[test]
    fn the_last_pattern_that_matches_decides() {
        let files = ["a.o", "b.o", "c"];
        assert_eq!(walk(&["*.o", "+a.o"], &files), ["a.o", "c"]);
        assert_eq!(walk(&["+a.o", "*.o"], &files), ["c"]);
        assert_eq!(walk(&["*.o", "!a.o", "+b.o", "a.o"], &files), ["b.o", "c"]);
    }

    #[test]
    fn an_include_brings_the_directories_on_its_way() {
        let files = ["a/b/c/x/y", "a/b/z", "a/q/r", "a/t", "u"];
        assert_eq!(
            walk(&["/a", "+/a/b/c"], &files),
            ["a", "a/b", "a/b/c", "a/b/c/x", "a/b/c/x/y", "u"]
        );
        assert_eq!(walk(&["/a", "+a/b/c/"], &files), walk(&["/a", "+/a/b/c"], &files));
        assert_eq!(walk(&["/a", "+/a/*/r"], &files), ["a", "a/b", "a/q", "a/q/r", "u"]);
        assert_eq!(
            walk(&["/a", "+/a/b/**"], &files),
            ["a", "a/b", "a/b/c", "a/b/c/x", "a/b/c/x/y", "a/b/z", "u"]
        );
        // Later words count, on the way too.
        assert_eq!(walk(&["+/a/b/c", "/a"], &files), ["u"]);
        assert_eq!(walk(&["/a", "+/a/b/c", "/a/b"], &files), ["a", "u"]);
        assert_eq!(walk(&["/a", "+/a/b/c", "/a/b/c/x"], &files), ["a", "a/b", "a/b/c", "u"]);
        // Nothing is searched for.
        assert_eq!(walk(&["/a", "+z"], &files), ["u"]);
        assert_eq!(walk(&["/a", "+**/z"], &files), ["u"]);
    }

    #[test]
    fn words_are_what_they_are() {
        assert_eq!(walk(&["#a", "b "], &["#a", "a", "b", "b "]), ["a", "b"]);
        assert_eq!(walk(&["b\\ ", "\\!c"], &["b", "b ", "!c", "c"]), ["b", "c"]);
        assert_eq!(walk(&["*", "+\\!c"], &["!c", "c"]), ["!c"]);
        for word in ["", "!", "+", "+!a", "[z-a]", "{a"] {
            let refused = filter(&[word]).err().unwrap();
            assert_eq!(refused.kind(), crate::error::ErrorKind::Usage, "{word}");
        }
        let latin = OsStr::from_bytes(b"\xff").to_os_string();
        let rules = Rules { rules: vec![Rule::Exclude(latin)], ..Rules::default() };
        let refused = Filter::new(&rules).err().unwrap().to_string();
        assert!(refused.contains("'\\xff'") && refused.contains("UTF-8"), "{refused}");
    }

    #[test]
    fn names_are_bytes() {
        let filter = filter(&["a?b", "*.o"]).unwrap();
        for (name, verdict) in [
            (&b"a\xffb"[..], Verdict::Out),
            (b"\xfe\xff.o", Verdict::Out),
            (b"d\xff/a\xfeb", Verdict::Out),
            (b"a\xff\xffb", Verdict::In),
        ] {
            assert_eq!(filter.judge_path(sys::path_from(name), false, Verdict::In), verdict);
        }
    }

    #[test]
    fn what_covers_a_directory_lies_above_it_too() {
        let filter = filter(&["/a", "+/a/b/c"]).unwrap();
        let covers = |path| filter.covers(Path::new(path));
        assert!(covers("a/x") && covers("a/b/x/y"));
        assert!(!covers("a") && !covers("a/b/c/x") && !covers("x"));
    }
}
