//! Damage to any file of a store: found, and never read as if it were right.
//!
//! Invariant: whatever is damaged, what is read under a name of a run is what that run stored under
//! it, or an error; and `validate` finds all that changes anything of a run. Of which files it has
//! to find every damage, the table says.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Instant;

use raidtape::volume::VolumeManifest;

use super::scene::{Base, Findings, Scene, tell};
use super::{chance, numbers, seed, verb};
use crate::common::faultfs::{Cut, Image};

/// A kind of file: which they are, and what is demanded.
struct Kind {
    name: &'static str,
    is: fn(&str) -> bool,
    demand: Demand,
}

/// Which damage to a file `validate` has to find.
#[derive(Clone, Copy, PartialEq)]
enum Demand {
    /// Every one.
    All,
    /// Every one that leaves something of the file: another volume has it too, or nobody needs it.
    AllButMissing,
    /// That after which anything of a run is there no more, or is something else: names, metadata,
    /// contents. A database has bytes that say nothing.
    Effects,
}

const KINDS: &[Kind] = &[
    Kind { name: "blocks", is: |it| it.contains("/chunks/"), demand: Demand::All },
    Kind { name: "volume index", is: |it| it.ends_with("_index"), demand: Demand::All },
    Kind { name: "volume manifest", is: |it| it.ends_with("manifest"), demand: Demand::All },
    // Without it, metas are compared with nothing taken for granted.
    Kind { name: "note", is: |it| it.ends_with("/.complete"), demand: Demand::Effects },
    Kind { name: "metas", is: |it| it.contains("/meta/"), demand: Demand::All },
    Kind {
        name: "run manifests",
        is: |it| it.contains("/manifests/"),
        demand: Demand::AllButMissing,
    },
    Kind {
        name: "copies of the catalog",
        is: |it| it.contains("/catalog/"),
        demand: Demand::AllButMissing,
    },
    Kind {
        name: "guide",
        is: |it| it.contains("/RESTORE") || it.ends_with(".sh"),
        demand: Demand::Effects,
    },
    Kind { name: "catalog", is: |it| it.ends_with("c/catalog"), demand: Demand::Effects },
    Kind { name: "catalog's log", is: |it| it.ends_with("-wal"), demand: Demand::Effects },
    Kind { name: "jobs", is: |it| it.contains(".jobs"), demand: Demand::Effects },
    Kind { name: "health", is: |it| it.contains(".health"), demand: Demand::Effects },
];

/// What is done to a file.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Flip(u64),
    /// Only so many bytes are left.
    Cut(u64),
    /// This sector is zeros.
    Zeros(u64),
    /// It is another file of its kind.
    Swap,
    Missing,
}

/// Figures of one kind.
#[derive(Default)]
struct Tally {
    tried: u64,
    found: u64,
    harmless: u64,
}

fn damaged(bytes: &[u8], damage: Damage, other: Option<&Vec<u8>>) -> Option<Vec<u8>> {
    let mut bytes = bytes.to_vec();
    match damage {
        Damage::Flip(bit) => {
            let at = (bit / 8) as usize % bytes.len();
            bytes[at] ^= 1 << (bit % 8);
        }
        Damage::Cut(len) => bytes.truncate(len as usize % bytes.len()),
        Damage::Zeros(sector) => {
            let start = (sector as usize % bytes.len().div_ceil(512)) * 512;
            let end = bytes.len().min(start + 512);
            bytes[start..end].fill(0);
        }
        Damage::Swap => bytes = other?.clone(),
        Damage::Missing => return None,
    }
    Some(bytes)
}

/// The files of an image by kind, with what is in them.
fn by_kind(image: &Image) -> BTreeMap<usize, Vec<(String, Vec<u8>)>> {
    let mut found: BTreeMap<usize, Vec<_>> = BTreeMap::new();
    for (path, bytes) in image.files() {
        let kind = KINDS.iter().position(|it| (it.is)(&path));
        if let Some(kind) = kind.filter(|_| !bytes.is_empty()) {
            found.entry(kind).or_default().push((path, bytes));
        }
    }
    found
}

/// A store in a directory that is put right again after each trial.
struct Place<'a> {
    scene: &'a Scene,
    dir: PathBuf,
    image: &'a Image,
}

impl Place<'_> {
    /// Puts back what was damaged, and what is written by those who only look.
    fn put_right(&self, touched: &str) {
        let is_own = |it: &str| it.starts_with("/c/") || it.ends_with("manifest") || it == touched;
        for entry in fs::read_dir(self.dir.join("c")).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                fs::remove_file(path).unwrap();
            }
        }
        for (path, bytes) in self.image.files().iter().filter(|it| is_own(&it.0)) {
            fs::write(self.dir.join(&path[1..]), bytes).unwrap();
        }
    }

    fn look(&self) -> Result<Findings, String> {
        let look = catch_unwind(AssertUnwindSafe(|| self.scene.read_all()));
        look.map_err(|_| "it panicked".to_owned())
    }
}

/// What is wrong with what was found, if anything is; else how it counts.
fn judge(
    (kind, damage, is_same): (&Kind, Damage, bool),
    read: &Findings,
    whole: &Findings,
    tally: &mut Tally,
) -> Result<(), String> {
    let mut is_short = false;
    for (state, expected) in &whole.runs {
        let Some(found) = read.runs.get(state) else {
            is_short = true;
            continue;
        };
        for (name, hash) in found {
            match expected.get(name) {
                Some(it) if it == hash => {}
                Some(_) => return Err(format!("wrong bytes in {}", name.escape_ascii())),
                None if !read.is_clean => is_short = true,
                None => return Err(format!("no such name: {}", name.escape_ascii())),
            }
        }
        is_short |= found.len() < expected.len();
    }
    if !read.is_clean {
        tally.found += 1;
        return Ok(());
    }
    if is_short || read.archives != whole.archives {
        let told = !read.problems.is_empty();
        return Err(format!("it is not what it was, and validate finds nothing; told: {told}"));
    }
    match (kind.demand, damage) {
        _ if is_same => {
            tally.harmless += 1;
            Ok(())
        }
        (Demand::All, _) => Err("validate has not found it".to_owned()),
        (Demand::AllButMissing, it) if !matches!(it, Damage::Missing) => {
            Err("validate has not found it".to_owned())
        }
        _ => {
            tally.harmless += 1;
            Ok(())
        }
    }
}

/// Whether a file says what it said: some bits of compressed data mean nothing, nor does the last
/// line's end.
fn says_the_same(path: &str, now: &[u8], before: &[u8]) -> bool {
    if path.ends_with(".zst") {
        return zstd::decode_all(now).is_ok_and(|it| it == zstd::decode_all(before).unwrap());
    }
    let manifest = |it: &[u8]| VolumeManifest::parse(std::str::from_utf8(it).ok()?).ok();
    path.ends_with("manifest") && manifest(now).is_some() && manifest(now) == manifest(before)
}

/// Where the text of a compressed file is another one: what a failure is understood by.
fn difference(path: &str, file: &Path, before: &[u8]) -> String {
    let Some(now) = path.ends_with(".zst").then(|| fs::read(file).ok()).flatten() else {
        return String::new();
    };
    let (Ok(now), Ok(before)) = (zstd::decode_all(&now[..]), zstd::decode_all(before)) else {
        return "it does not decompress".to_owned();
    };
    let at = now.iter().zip(&before).position(|(a, b)| a != b).unwrap_or(0);
    let near =
        |it: &[u8]| it[at.saturating_sub(80)..it.len().min(at + 80)].escape_ascii().to_string();
    format!("at {at} of {}: {} was {}", before.len(), near(&now), near(&before))
}

fn damage_all(scene: &Scene, image: &Image, name: &str, all: Range<u64>) {
    let start = Instant::now();
    let place = Place { scene, dir: scene.lay_out(image), image };
    let whole = place.look().unwrap();
    assert!(whole.is_clean && whole.problems.is_empty(), "{:?}", whole.problems);
    let files = by_kind(image);
    let (count, from) = (all.end - all.start, all.start);
    let mut tallies: BTreeMap<usize, Tally> = BTreeMap::new();
    for number in all {
        let mut seeded = chance(number);
        // The same share for each kind, however many bytes it has.
        let kind = *files.keys().nth(number as usize % files.len()).unwrap();
        let list = &files[&kind];
        let at = seeded.below(list.len() as u64) as usize;
        let (path, bytes) = &list[at];
        let damage = match seeded.below(10) {
            0..5 => Damage::Flip(seeded.next() >> 8),
            5..7 => Damage::Cut(seeded.next()),
            7 => Damage::Zeros(seeded.next()),
            8 => Damage::Swap,
            _ => Damage::Missing,
        };
        let other = list.get((at + 1) % list.len()).map(|it| &it.1);
        let new = damaged(bytes, damage, other);
        if new.as_ref() == Some(bytes) {
            continue;
        }
        let is_same = new.as_ref().is_some_and(|it| says_the_same(path, it, bytes));
        let file = place.dir.join(&path[1..]);
        match new {
            Some(new) => fs::write(&file, new).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
        let tally = tallies.entry(kind).or_default();
        tally.tried += 1;
        let result = place.look().and_then(|read| {
            let said = format!("{:?} {}", read.problems, difference(path, &file, bytes));
            judge((&KINDS[kind], damage, is_same), &read, &whole, tally)
                .map_err(|e| format!("{e} {said}"))
        });
        if let Err(e) = result {
            let seed = seed();
            panic!("{} {path}: {damage:?} (number {number}, seed {seed}): {e}", KINDS[kind].name);
        }
        place.put_right(path);
    }
    let time = start.elapsed().as_secs_f64();
    let mut line = format!("damages: {count} from {from} to {name}, {time:.1} s, seed {}", seed());
    line.push_str("; tried, found, harmless of each kind");
    for (kind, it) in &tallies {
        let Tally { tried, found, harmless } = it;
        let name = KINDS[*kind].name;
        line.push_str(&format!("; {name} {tried} {found} {harmless}"));
    }
    tell(&line);
    let again = place.look().unwrap();
    assert!(again.is_clean && again.runs == whole.runs, "not put right");
}

#[test]
fn damage_is_found_and_never_read() {
    let scene = Scene::new();
    let image = scene.two_runs();
    damage_all(&scene, &image, "a store", numbers("DAMAGES", 8_000));
}

/// A catalog whose writer was killed after its commit: most of it is in the log.
#[test]
fn damage_is_never_read_from_a_log() {
    let scene = Scene::new();
    let verb = verb("next backup");
    let moments = scene.trace(verb, &scene.base(Base::Run), false);
    let log = |it: &Image| {
        let files = it.files();
        files.iter().find(|it| it.0.ends_with("catalog-wal")).map_or(0, |it| it.1.len())
    };
    let is_committed = |it: &Image| {
        let dir = scene.lay_out(it);
        let read = scene.read_all();
        fs::remove_dir_all(dir).unwrap();
        read.runs.contains_key("two")
    };
    // The run is finished, as its volumes know by now, and still in the log.
    let is_noted = |it: &Image| {
        let is_note = |path: &str| path.ends_with("/.complete");
        let of_two = |it: &[u8]| String::from_utf8_lossy(it).contains("run=2\n");
        it.files().iter().any(|it| is_note(&it.0) && of_two(&it.1))
    };
    let mut images = moments.iter().map(|it| it.cut(Cut::Kept));
    let image = images.find(|it| log(it) > 10_000 && is_noted(it) && is_committed(it)).unwrap();
    let all = numbers("DAMAGES", 8_000);
    damage_all(&scene, &image, "a store with a log", all.start / 4..all.end / 4);
}
