//! Rules of the house, checked on the sources.
//!
//! Invariant: what is checked is text, so a rule can be read here and nowhere else is needed.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Characters beyond ASCII that diagrams in comments are drawn with.
const DRAWN: &str = "\u{2500}\u{2514}\u{2518}\u{2550}\u{25b6}\u{2026}";
/// Longest line, in characters.
const COLUMNS_MAX: usize = 100;
/// Most lines of a file, its tests at the end not counted.
const LINES_MAX: usize = 600;
/// Files that may be longer, and why.
const LONG_FILES: &[(&str, &str)] = &[
    ("src/fs/fuse.rs", "one method for each request of the kernel"),
    ("src/fs/ingest/tests.rs", "tests only"),
];
/// What may be used where. A place that ends in a slash is a directory.
const CONFINED: &[(&str, &[&str])] = &[
    ("unsafe ", &["src/sys/"]),
    ("libc::", &["src/sys/"]),
    ("rustix::", &["src/sys/"]),
    ("rusqlite::", &["src/catalog/"]),
    ("fuser::", &["src/fs/backing.rs", "src/fs/fuse.rs", "src/fs/kernel.rs", "src/fs/session.rs"]),
    ("clap::", &["src/cli/", "src/job/grammar.rs", "src/job/grammar/"]),
    ("println!", &["src/cli/", "src/main.rs"]),
    ("print!", &["src/cli/", "src/main.rs"]),
];

/// A source file: its path from the root of the project, and its text.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// The lines without comments, with their numbers.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.text.lines()).map(|(number, line)| {
            let line = line.find("// ").map_or(line, |at| &line[..at]);
            let is_comment = line.trim_start().starts_with("//");
            (number, if is_comment { "" } else { line })
        })
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(dirs: &[&str]) -> Vec<Source> {
    let found = texts(dirs, "rs");
    assert!(found.len() >= 10, "where are the sources?");
    found
}

/// The files with this extension below these directories.
fn texts(dirs: &[&str], extension: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut left: Vec<PathBuf> = dirs.iter().map(|it| root().join(it)).collect();
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|it| it == extension) {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                found.push(Source { path: name, text: fs::read_to_string(&path).unwrap() });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn all() -> Vec<Source> {
    sources(&["src", "mountctl/src", "mountctl/tests", "tests", "benches"])
}

#[track_caller]
fn assert_none(rule: &str, faults: &[String]) {
    assert!(faults.is_empty(), "{rule}:\n{}", faults.join("\n"));
}

/// The rooms of the library in their order.
fn rooms() -> Vec<String> {
    let text = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let names = text.lines().filter_map(|it| it.strip_prefix("pub mod ")?.strip_suffix(';'));
    names.map(str::to_owned).collect()
}

/// The first names after `crate::` in a text, also those of a group in braces.
fn uses(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        let before = text[..at].chars().next_back();
        if before.is_some_and(|it| it.is_alphanumeric() || it == '_' || it == '$') {
            continue;
        }
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut start = true;
            let mut name = String::new();
            for c in group.chars() {
                match c {
                    '}' if depth == 0 => break,
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 0 => start = true,
                    c if depth == 0 && start && (c.is_alphanumeric() || c == '_') => name.push(c),
                    _ if !name.is_empty() => start = false,
                    _ => {}
                }
                if (!start || c == ',') && !name.is_empty() {
                    found.insert(std::mem::take(&mut name));
                }
            }
            found.extend((!name.is_empty()).then_some(name));
        } else {
            found
                .insert(rest.chars().take_while(|it| it.is_alphanumeric() || *it == '_').collect());
        }
    }
    found
}

#[test]
fn uses_are_found() {
    let text = "use crate::one::{x, y};\nuse crate::{two, three::{a, b}, four as f};\n\
                let it = crate::five(mycrate::six);";
    assert_eq!(uses(text), ["one", "two", "three", "four", "five"].map(str::to_owned).into());
}

#[test]
fn rooms_use_only_rooms_before_them() {
    let rooms = rooms();
    assert!(rooms.len() >= 10, "{rooms:?}");
    let mut faults = Vec::new();
    for source in sources(&["src"]) {
        let name = source.path["src/".len()..].split(['/', '.']).next().unwrap().to_owned();
        let Some(own) = rooms.iter().position(|it| *it == name) else {
            assert!(matches!(&*name, "lib" | "main"), "{} is no room in lib.rs", source.path);
            continue;
        };
        let code: Vec<&str> = source.code().map(|it| it.1).collect();
        for used in uses(&code.join("\n")) {
            match rooms.iter().position(|it| *it == used) {
                Some(at) if at <= own => {}
                _ => faults.push(format!("{}: crate::{used}", source.path)),
            }
        }
    }
    assert_none("a room uses only rooms listed before it in lib.rs", &faults);
}

#[test]
fn every_file_says_what_it_is() {
    let is_silent =
        |it: &Source| !it.text.starts_with("//! ") && !it.text.starts_with("#![doc = include_str!");
    let faults: Vec<_> = all().into_iter().filter(is_silent).map(|it| it.path).collect();
    assert_none("a file begins with //! and what it is for", &faults);
}

#[test]
fn what_is_dangerous_stays_in_its_place() {
    let mut faults = Vec::new();
    for source in sources(&["src"]) {
        for (number, line) in source.code() {
            for (word, places) in CONFINED {
                let is_place = |it: &&&str| match it.ends_with('/') {
                    true => source.path.starts_with(**it),
                    false => source.path == **it,
                };
                // Also as `use libc;` and the like.
                let name = word.strip_suffix("::");
                let imported = name.is_some_and(|it| line.trim() == format!("use {it};"));
                if (line.contains(word) || imported) && places.iter().find(is_place).is_none() {
                    faults.push(format!("{}:{number}: {word}", source.path));
                }
            }
        }
    }
    assert_none("these words have a place of their own", &faults);
}

#[test]
fn nothing_is_left_unfinished_or_switched_off() {
    // Not written out, or this file would be the first to be found.
    let words = [
        concat!("d", "bg!("),
        concat!("to", "do!("),
        concat!("un", "implemented!("),
        concat!("FIX", "ME"),
        concat!("TO", "DO"),
        concat!("XX", "X"),
        concat!("#[ign", "ore"),
    ];
    let mut faults = Vec::new();
    for source in all() {
        for (number, line) in (1..).zip(source.text.lines()) {
            for word in words.iter().filter(|it| line.contains(**it)) {
                faults.push(format!("{}:{number}: {word}", source.path));
            }
        }
    }
    assert_none("nothing is left for later", &faults);
}

#[test]
fn lines_are_plain_and_short() {
    let mut faults = Vec::new();
    for source in all() {
        for (number, line) in (1..).zip(source.text.lines()) {
            let at = format!("{}:{number}", source.path);
            let is_comment = line.trim_start().starts_with("//");
            let odd = |it: &char| !(it.is_ascii() || is_comment && DRAWN.contains(*it));
            if let Some(c) = line.chars().find(odd) {
                faults.push(format!("{at}: {c:?} (U+{:04x})", u32::from(c)));
            }
            let columns = line.chars().count();
            if columns > COLUMNS_MAX {
                faults.push(format!("{at}: {columns} columns"));
            }
            if line.contains('\t') || line.ends_with(' ') {
                faults.push(format!("{at}: a tab, or a space at its end"));
            }
        }
        if !source.text.ends_with('\n') {
            faults.push(format!("{}: no newline at its end", source.path));
        }
    }
    assert_none("lines are plain ASCII and at most 100 columns wide", &faults);
}

#[test]
fn files_are_short_enough_to_be_read() {
    let mut faults = Vec::new();
    for source in sources(&["src", "mountctl/src"]) {
        let body = source.text.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
        let lines = body.lines().count();
        let may = LONG_FILES.iter().any(|it| it.0 == source.path);
        if lines > LINES_MAX && !may {
            faults.push(format!("{}: {lines} lines", source.path));
        }
        if lines <= LINES_MAX && may {
            faults.push(format!("{}: {lines} lines, no exception any more", source.path));
        }
    }
    assert_none("a file has at most 600 lines without its tests", &faults);
}

#[test]
fn samples_in_documents_end() {
    let mut documents = texts(&["src", "docs"], "md");
    for name in ["README.md", "CHANGELOG.md"] {
        let text = fs::read_to_string(root().join(name)).unwrap();
        documents.push(Source { path: name.to_owned(), text });
    }
    let mut faults = Vec::new();
    for document in documents {
        let mut begun = None;
        let fences =
            document.text.lines().zip(1..).filter_map(|(line, number)| {
                Some((line.trim_start().strip_prefix("```")?, number))
            });
        // What begins a sample says its language, so what does not must end one.
        for (language, number) in fences {
            if language.is_empty() == begun.is_none() {
                faults.push(format!("{}: line {number}", document.path));
            }
            begun = (!language.is_empty()).then_some(number);
        }
        faults.extend(begun.map(|it| format!("{}: line {it}", document.path)));
    }
    assert_none("a sample names its language and ends before the next begins", &faults);
}

/// The exit codes that the program's table gives.
fn exit_codes() -> BTreeSet<u8> {
    let text = fs::read_to_string(root().join("src/cli/exit.rs")).unwrap();
    let mut codes = BTreeSet::new();
    for line in text.lines() {
        let line = line.trim().trim_end_matches([',', ';']);
        let number = match line.starts_with("pub const ") {
            true => line.rsplit("u8 = ").next(),
            false => line.split_once(" => ").map(|it| it.1),
        };
        codes.extend(number.and_then(|it| it.parse::<u8>().ok()));
    }
    codes
}

#[test]
fn the_readme_lists_the_exit_codes() {
    let codes = exit_codes();
    assert!(codes.is_superset(&[0, 1, 2, 3, 4, 5, 6, 8, 10, 11, 130].into()), "{codes:?}");
    let text = fs::read_to_string(root().join("README.md"));
    let text = text.expect("README.md, which has to list the exit codes");
    let lines: Vec<&str> = text.lines().collect();
    let code_of = |line: &str| -> Option<u8> {
        let cell = line.strip_prefix('|')?.split('|').next()?;
        cell.trim().trim_matches('`').parse().ok()
    };
    let mut tables = lines.split(|line| !line.starts_with('|'));
    let listed = tables
        .find(|table| table.iter().any(|line| code_of(line) == Some(130)))
        .expect("README.md has no table with the exit code 130");
    let listed: BTreeSet<u8> = listed.iter().filter_map(|line| code_of(line)).collect();
    assert_eq!(listed, codes, "exit codes in README.md, and in src/cli/exit.rs");
}
