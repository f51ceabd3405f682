//! The hot kernels by themselves: splitting, hashing, packing frames and unpacking them.
//!
//! `cargo bench --bench kernels` runs all, `cargo bench --bench kernels -- split` one group. The
//! data is made from a seed; no disk is touched.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use raidtape::chunk::HashAlgo;
use raidtape::chunk::frame::{Compression, Encoder, FRAME_PLAIN_BYTES_MAX};
use raidtape::chunk::split::{Chunking, Splitter};

/// Bytes that do not compress.
fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// Lines of words, which compress about as well as program sources.
fn text(len: usize) -> Vec<u8> {
    let picks = noise(len);
    let words = ["let", "self", "block", "offset", "return", "struct", "volume", "("];
    let mut bytes = Vec::with_capacity(len + 40);
    for pick in picks.chunks(3) {
        bytes.extend(words[usize::from(pick[0] % 8)].bytes());
        bytes.extend(format!("_{} ", pick[pick.len() - 1] % 64).bytes());
        if pick[0] > 240 {
            bytes.push(b'\n');
        }
        if bytes.len() >= len {
            break;
        }
    }
    bytes.truncate(len);
    bytes
}

fn split(c: &mut Criterion) {
    let mut group = c.benchmark_group("split");
    let data = noise(32 << 20);
    group.throughput(Throughput::Bytes(data.len() as u64));
    for (name, chunking) in [
        ("fastcdc/8KiB", Chunking::FastCdc { average: 8 << 10 }),
        ("fastcdc/64KiB", Chunking::FastCdc { average: 64 << 10 }),
        ("fixed/64KiB", Chunking::Fixed { size: 64 << 10 }),
    ] {
        let mut splitter = Splitter::new(chunking);
        group.bench_function(name, |b| {
            b.iter(|| {
                splitter.restart();
                let mut reader = black_box(&data[..]);
                let mut count = 0;
                while splitter.next(&mut reader).unwrap().is_some() {
                    count += 1;
                }
                count
            });
        });
    }
    group.finish();
}

fn hash(c: &mut Criterion) {
    let mut group = c.benchmark_group("hash");
    let data = noise(1 << 20);
    for algo in [HashAlgo::Blake3, HashAlgo::Sha256] {
        for len in [4 << 10, 64 << 10, 1 << 20] {
            group.throughput(Throughput::Bytes(len as u64));
            let name = format!("{}/{}KiB", algo.as_str(), len >> 10);
            group.bench_function(name, |b| b.iter(|| algo.hash(black_box(&data[..len]))));
        }
    }
    group.finish();
}

fn frame(c: &mut Criterion) {
    let len = FRAME_PLAIN_BYTES_MAX as usize;
    for (group, is_decode) in [("frame encode", false), ("frame decode", true)] {
        let mut group = c.benchmark_group(group);
        group.throughput(Throughput::Bytes(len as u64));
        for (name, data, compression) in [
            ("text/zstd:1", text(len), Compression::Zstd(1)),
            ("text/zstd:3", text(len), Compression::Zstd(3)),
            ("noise/zstd:3", noise(len), Compression::Zstd(3)),
            ("text/none", text(len), Compression::None),
        ] {
            let mut encoder = Encoder::new(compression).unwrap();
            if !is_decode {
                group.bench_function(name, |b| {
                    b.iter(|| encoder.encode(black_box(&data)).unwrap().0);
                });
                continue;
            }
            let (frame, stored) = encoder.encode(&data).unwrap();
            let mut plain = Vec::with_capacity(len);
            group.bench_function(name, |b| {
                b.iter(|| {
                    plain.clear();
                    frame.decode(black_box(stored), &mut plain).unwrap();
                });
            });
        }
        group.finish();
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    split(&mut criterion);
    hash(&mut criterion);
    frame(&mut criterion);
    criterion.final_summary();
}
