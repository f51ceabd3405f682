//! Faults at every operation: kills, errors, power cuts. Nothing acknowledged is ever lost.

/// Damage to any file of a store.
mod damage;
/// Errors of every kind at every operation.
mod errors;
/// The writable tree of a mount.
mod ingest;
/// Faults by chance, many at a time, in larger runs.
mod random;
/// Stores that need a repair or a catalog.
mod made;
/// A store on a disk that fails, and the check after each trial.
mod scene;
/// Processes killed and power cut at every operation.
mod stops;

use scene::{Base, Verb};

use crate::common::data::Seeded;
use crate::common::number_from_env;

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
    Verb {
        name: "backup of two copies",
        base: Base::Lacking,
        line: &["backup", "/two", "--as", "source", "--comment", "two", "--single-threaded"],
        stores: Some("two"),
    },
    Verb { name: "replicate", base: Base::Lacking, line: &["replicate"], stores: None },
    Verb {
        name: "retire",
        base: Base::Run,
        line: &["volumes", "--retire", "/store/v1"],
        stores: None,
    },
    Verb { name: "repair", base: Base::Damaged, line: &["validate", "--repair"], stores: None },
    Verb {
        name: "rebuildmeta",
        base: Base::Uncatalogued,
        line: &["rebuildmeta", "--volumes", "/store/v1", "/store/v2"],
        stores: None,
    },
    Verb {
        name: "catalog-restore",
        base: Base::Uncatalogued,
        line: &["catalog-restore", "--volumes", "/store/v1", "/store/v2"],
        stores: None,
    },
    Verb {
        name: "rebuild-catalog",
        base: Base::Doubtful,
        line: &["rebuild-catalog"],
        stores: None,
    },
];

fn verb(name: &str) -> &'static Verb {
    VERBS.iter().find(|it| it.name == name).unwrap()
}

/// How many trials of a kind; scripts/judge-faults asks for more.
fn trials(kind: &str, default: u64) -> u64 {
    number_from_env(&format!("RAIDTAPE_FAULT_{kind}"), default)
}

/// Numbers of the trials of a kind: a run of them can be done in parts.
fn numbers(kind: &str, default: u64) -> std::ops::Range<u64> {
    let from = number_from_env("RAIDTAPE_FAULT_FROM", 0);
    from..from + trials(kind, default)
}

/// All that is left to chance in a trial, whichever came before.
fn chance(number: u64) -> Seeded {
    let (seed, number) = (Seeded::new(seed()).next(), Seeded::new(number).next());
    Seeded::new(seed.wrapping_add(number))
}

/// What decides all that is left to chance.
fn seed() -> u64 {
    number_from_env("RAIDTAPE_FAULT_SEED", 1)
}
