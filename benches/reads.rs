//! Reading snapshots without a kernel in between: in order, at random, raw and compressed.
//!
//! `cargo bench --bench reads` runs all. The store lies in a temporary directory (`TMPDIR` chooses
//! the disk) and in the system's cache. The frame cache is smaller than the files, as it is for
//! most; each piece is as long as what a mount is asked for.

#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use raidtape::backup::{self, Options};
use raidtape::catalog::{Settings, Writer};
use raidtape::chunk::HashAlgo;
use raidtape::chunk::frame::Compression;
use raidtape::chunk::split::Chunking;
use raidtape::progress::Progress;
use raidtape::snapshot::{FileMap, Snapshots};

const FILE_BYTES: u64 = 96 << 20;
const CACHE_BYTES: u64 = 32 << 20;
const SMALL_FILES: usize = 2000;

struct Store {
    snapshots: Snapshots,
    _dir: tempfile::TempDir,
}

impl Store {
    fn new() -> Store {
        let dir = tempfile::tempdir().unwrap();
        let (catalog, source) = (dir.path().join("catalog"), dir.path().join("source"));
        std::fs::create_dir(&source).unwrap();
        let mut noise = vec![0; usize::try_from(FILE_BYTES).unwrap()];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        std::fs::write(source.join("raw"), &noise).unwrap();
        std::fs::write(source.join("text"), text(&noise)).unwrap();
        for (number, part) in noise.chunks(5000).take(SMALL_FILES).enumerate() {
            std::fs::write(source.join(format!("small {number:04}")), text(part)).unwrap();
        }
        let settings = Settings {
            hash: HashAlgo::Blake3,
            chunking: Chunking::FastCdc { average: 64 << 10 },
            compression: Compression::Zstd(3),
            block_bytes: 32 << 20,
            reserve_percent: 0,
            copies: 1,
        };
        let mut writer = Writer::create(&catalog, &settings).unwrap();
        writer.add_volume(&dir.path().join("volume"), 0).unwrap();
        drop(writer);
        back_up(&catalog, source);
        Store { snapshots: Snapshots::open(&catalog, CACHE_BYTES).unwrap(), _dir: dir }
    }

    fn file(&self, name: &str) -> Arc<FileMap> {
        let run = self.snapshots.latest().unwrap().unwrap();
        let root = self.snapshots.root(&run).unwrap().child.unwrap();
        let entry = self.snapshots.lookup(run.id, root, name.as_bytes()).unwrap().unwrap();
        self.snapshots.file(entry.version).unwrap()
    }
}

fn back_up(catalog: &std::path::Path, source: PathBuf) {
    let options = Options { source, ..Options::default() };
    backup::run(catalog, &options, &Progress::default()).unwrap();
}

/// Words by the bytes of `picks`, as long as it is.
fn text(picks: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(picks.len() + 40);
    for pick in picks {
        bytes.extend(format!("{:x} block_{} ", pick / 3, pick % 64).bytes());
        if bytes.len() >= picks.len() {
            break;
        }
    }
    bytes.truncate(picks.len());
    bytes
}

fn in_order(group: &mut BenchmarkGroup<'_, WallTime>, store: &Store, name: &str) {
    let file = store.file(name);
    group.throughput(Throughput::Bytes(FILE_BYTES));
    for piece in [128 << 10, 1 << 20] {
        group.bench_function(format!("{name} in order, {} KiB", piece >> 10), |b| {
            b.iter(|| {
                let mut at = 0;
                while at < FILE_BYTES {
                    at += store.snapshots.read_data(&file, at, piece).unwrap().len() as u64;
                }
            });
        });
    }
}

fn at_random(group: &mut BenchmarkGroup<'_, WallTime>, store: &Store, name: &str) {
    let file = store.file(name);
    group.throughput(Throughput::Elements(1));
    for piece in [4 << 10, 64 << 10] {
        let mut state = 1u64;
        group.bench_function(format!("{name} at random, {} KiB", piece >> 10), |b| {
            b.iter(|| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (state >> 33) % (FILE_BYTES / piece) * piece;
                let len = usize::try_from(piece).unwrap();
                black_box(store.snapshots.read_data(&file, at, len).unwrap().len())
            });
        });
    }
}

/// Every small file once, each by its version, as a mount asks for them that was just made.
fn small(group: &mut BenchmarkGroup<'_, WallTime>, store: &Store) {
    let run = store.snapshots.latest().unwrap().unwrap();
    let root = store.snapshots.root(&run).unwrap().child.unwrap();
    let entries = store.snapshots.list(run.id, root, Some(b"s"), SMALL_FILES).unwrap();
    assert_eq!(entries.len(), SMALL_FILES);
    group.throughput(Throughput::Elements(SMALL_FILES as u64));
    let open = || Snapshots::open(store.snapshots.catalog(), CACHE_BYTES).unwrap();
    let read_all = |snapshots: Snapshots| {
        for entry in &entries {
            let file = snapshots.file(entry.version).unwrap();
            black_box(snapshots.read_data(&file, 0, 128 << 10).unwrap().len());
        }
        snapshots
    };
    group.bench_function("small files in order", |b| {
        b.iter_batched(open, read_all, BatchSize::PerIteration);
    });
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let store = Store::new();
    let mut group = criterion.benchmark_group("reads");
    for name in ["text", "raw"] {
        in_order(&mut group, &store, name);
        at_random(&mut group, &store, name);
    }
    small(&mut group, &store);
    group.finish();
    let stats = store.snapshots.cache_stats();
    println!("{stats:?}");
    criterion.final_summary();
}
