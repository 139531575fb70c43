//! Digests, beside a copy of the same bytes: a leaf without and with a key, and the root of
//! a whole volume, streamed as a restore streams it.

#![allow(
    clippy::unwrap_used,
    reason = "a bench that cannot run shall say so and end"
)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use libreplica::digest::{LeafFunction, RootBuilder};
use libreplica::geometry::{BlockNumber, Geometry};
use libreplica::units::{BlockSize, ByteLen, SectorSize, VolumeSize};
use replica_bench::noise;

fn leaves(c: &mut Criterion) {
    let mut group = c.benchmark_group("digest of a block");
    for size in [4 << 10, 64 << 10] {
        let data = noise(size);
        // Not a multiple of a page away from the data, or the processor takes the one for
        // the other and the copy runs at a tenth of its speed.
        let mut copy = vec![0; size + 320];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::new("memcpy", size), |b| {
            b.iter(|| copy[320..].copy_from_slice(black_box(&data)));
        });
        let functions = [
            ("plain", LeafFunction::plain()),
            ("keyed", LeafFunction::keyed(&[7; 32])),
        ];
        for (name, function) in functions {
            group.bench_function(BenchmarkId::new(name, size), |b| {
                b.iter(|| function.leaf(BlockNumber::new(1), black_box(&data)));
            });
        }
    }
    group.finish();
}

fn root(c: &mut Criterion) {
    const SIZE: usize = 256 << 20;
    let mut group = c.benchmark_group("root of a volume");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(SIZE as u64));
    let geometry = Geometry {
        size: VolumeSize::new(SIZE as u64),
        block: BlockSize::MIN,
        sector: SectorSize::B512,
    };
    let data = noise(1 << 20);
    let mut copy = vec![0; 1 << 20];
    group.bench_function("memcpy", |b| {
        b.iter(|| (0..SIZE >> 20).for_each(|_| copy.copy_from_slice(black_box(&data))));
    });
    group.bench_function("data", |b| {
        b.iter(|| {
            let mut builder = RootBuilder::new(geometry, LeafFunction::plain());
            (0..SIZE >> 20).for_each(|_| builder.data(black_box(&data)).unwrap());
            builder.finish().unwrap()
        });
    });
    group.bench_function("zeroes", |b| {
        b.iter(|| {
            let mut builder = RootBuilder::new(geometry, LeafFunction::plain());
            builder.zeroes(ByteLen::new(SIZE as u64)).unwrap();
            builder.finish().unwrap()
        });
    });
    group.finish();
}

criterion_group!(benches, leaves, root);
criterion_main!(benches);
