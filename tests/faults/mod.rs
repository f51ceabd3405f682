//! Faults at every operation: kills, errors, power cuts. Nothing acknowledged is ever lost.

/// Errors of every kind at every operation.
mod errors;
/// A store on a disk that fails, and the check after each trial.
mod scene;
/// Processes killed and power cut at every operation.
mod stops;

use scene::{Base, Verb};

/// The commands that are tried, one line each: name, what it begins with, its line, what it stores.
const VERBS: &[Verb] = &[
    Verb {
        name: "init",
        base: Base::Nothing,
        line: &["init", "--reserve", "0", "--block-size", "1MiB"],
        stores: None,
    },
    Verb {
        name: "add-volume",
        base: Base::Catalog,
        line: &["add-volume", "/store/v1"],
        stores: None,
    },
    Verb {
        name: "first backup",
        base: Base::Volumes,
        line: &["backup", "/one", "--as", "source", "--comment", "one", "--single-threaded"],
        stores: Some("one"),
    },
    Verb {
        name: "next backup",
        base: Base::Run,
        line: &["backup", "/two", "--as", "source", "--comment", "two", "--single-threaded"],
        stores: Some("two"),
    },
    Verb { name: "genmeta", base: Base::Bare, line: &["genmeta"], stores: None },
];

fn verb(name: &str) -> &'static Verb {
    VERBS.iter().find(|it| it.name == name).unwrap()
}
