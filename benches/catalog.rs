//! The catalog at work: a first run, an unchanged one, and what a mount asks of it.
//!
//! `cargo bench --bench catalog` runs all. A tree of tiny files and its store lie in a temporary
//! directory (`TMPDIR` chooses the disk); caches are warm. What a command takes as a whole is
//! `scripts/bench`'s business.

#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput};
use raidtape::backup::{self, Options};
use raidtape::catalog::{Counts, EntryRow, NewEntry, Settings, Writer};
use raidtape::chunk::HashAlgo;
use raidtape::chunk::frame::Compression;
use raidtape::chunk::split::Chunking;
use raidtape::entry::{Kind, Metadata};
use raidtape::progress::Progress;
use raidtape::snapshot::Snapshots;
use raidtape::sys::Time;

const DIRS: usize = 20;
const FILES_PER_DIR: usize = 250;
const FILES: u64 = (DIRS * FILES_PER_DIR) as u64;

/// A tree and a catalog with one volume.
struct Store {
    catalog: PathBuf,
    source: PathBuf,
    _dir: tempfile::TempDir,
}

impl Store {
    fn new() -> Store {
        let dir = tempfile::tempdir().unwrap();
        let (catalog, source) = (dir.path().join("catalog"), dir.path().join("source"));
        for number in 0..DIRS {
            let sub = source.join(format!("directory {number}"));
            std::fs::create_dir_all(&sub).unwrap();
            for file in 0..FILES_PER_DIR {
                let content = format!("{number} {file} ").repeat(file % 200);
                std::fs::write(sub.join(format!("some file {file}")), content).unwrap();
            }
        }
        make_catalog(&catalog, &dir.path().join("volume"));
        Store { catalog, source, _dir: dir }
    }

    fn back_up(&self) {
        let options = Options { source: self.source.clone(), ..Options::default() };
        backup::run(&self.catalog, &options, &Progress::default()).unwrap();
    }
}

fn make_catalog(catalog: &Path, volume: &Path) {
    let settings = Settings {
        hash: HashAlgo::Blake3,
        chunking: Chunking::FastCdc { average: 64 << 10 },
        compression: Compression::Zstd(3),
        block_bytes: 128 << 20,
        reserve_percent: 0,
        copies: 1,
    };
    let mut writer = Writer::create(catalog, &settings).unwrap();
    writer.add_volume(volume, 0).unwrap();
}

/// A first run of everything, and runs that find nothing changed.
fn runs(c: &mut Criterion) {
    let store = Store::new();
    let mut group = c.benchmark_group("run");
    group.throughput(Throughput::Elements(FILES));
    group.bench_function("first", |b| {
        let made = || {
            let dir = tempfile::tempdir().unwrap();
            let catalog = dir.path().join("catalog");
            make_catalog(&catalog, &dir.path().join("volume"));
            (dir, catalog)
        };
        b.iter_batched(
            made,
            |(dir, catalog)| {
                let options = Options { source: store.source.clone(), ..Options::default() };
                backup::run(&catalog, &options, &Progress::default()).unwrap();
                dir
            },
            BatchSize::PerIteration,
        );
    });
    store.back_up();
    group.bench_function("unchanged", |b| b.iter(|| store.back_up()));
    group.finish();
}

/// Rows into the catalog, up to its commit.
fn commit(c: &mut Criterion) {
    let dir = tempfile::tempdir().unwrap();
    let catalog = dir.path().join("catalog");
    make_catalog(&catalog, &dir.path().join("volume"));
    let mut writer = Writer::open(&catalog).unwrap();
    let mut group = c.benchmark_group("catalog");
    group.throughput(Throughput::Elements(FILES));
    let mut ino = 0;
    group.bench_function("put and commit", |b| {
        b.iter(|| {
            let now = Time::now();
            let mut run = writer.begin_run(b"source", Path::new("/source"), now).unwrap();
            let parent = run.new_dir();
            for number in 0..FILES {
                ino += 1;
                let meta = Metadata {
                    kind: Kind::Fifo,
                    mode: 0o644,
                    uid: 1000,
                    gid: 1000,
                    size: 0,
                    mtime: now,
                    ctime: now,
                    ino,
                    nlink: 1,
                    rdev: 0,
                };
                let name = format!("some file {number}");
                let version = run.new_version();
                run.put_entry(&NewEntry {
                    dir: parent,
                    name: name.as_bytes(),
                    version,
                    child: None,
                    meta: &meta,
                    data_len: None,
                })
                .unwrap();
            }
            run.commit(&Counts::default(), (&[], ""), &[], now).unwrap()
        });
    });
    group.finish();
}

/// What a mount asks: directories, names, and the bytes of small files.
fn reading(c: &mut Criterion) {
    let store = Store::new();
    store.back_up();
    let snapshots = Snapshots::open(&store.catalog, 64 << 20).unwrap();
    let run = snapshots.latest().unwrap().unwrap();
    let root = snapshots.root(&run).unwrap();
    let list = |dir: &EntryRow| snapshots.list(run.id, dir.child.unwrap(), None, 1 << 20).unwrap();
    let dirs = list(&root);
    let files: Vec<EntryRow> = dirs.iter().flat_map(list).collect();
    assert_eq!(files.len() as u64, FILES);

    let mut group = c.benchmark_group("snapshot");
    group.throughput(Throughput::Elements(FILES_PER_DIR as u64));
    let mut turn = dirs.iter().cycle();
    group.bench_function("list a directory", |b| b.iter(|| list(turn.next().unwrap()).len()));
    group.throughput(Throughput::Elements(1));
    let mut turn = files.iter().cycle();
    group.bench_function("look a name up", |b| {
        b.iter(|| {
            let file = turn.next().unwrap();
            snapshots.lookup(run.id, file.dir, black_box(&file.name)).unwrap()
        });
    });
    let mut turn = files.iter().cycle();
    let mut buffer = vec![0; 1 << 16];
    group.bench_function("read a small file", |b| {
        b.iter(|| {
            let file = snapshots.file(turn.next().unwrap().version).unwrap();
            snapshots.read(&file, 0, &mut buffer).unwrap()
        });
    });
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(5))
        .configure_from_args();
    runs(&mut criterion);
    commit(&mut criterion);
    reading(&mut criterion);
    criterion.final_summary();
}
