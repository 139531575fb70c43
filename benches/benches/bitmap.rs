//! The dirty bitmap at its largest, 16 TiB in blocks of 64 KiB: marks, and finding what is
//! marked. The limit to compare with is a plain copy of the bitmap's own memory, which is
//! what a search without the upper levels would have to read.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use libreplica::bitmap::Bitmap;
use libreplica::geometry::{BlockNumber, Run};
use replica_bench::Numbers;

const BLOCKS: u64 = (16 << 40) / (64 << 10);
const MARKS: u64 = 100_000;

fn scattered() -> impl Iterator<Item = BlockNumber> {
    Numbers::default().map(|n| BlockNumber::new(n % BLOCKS))
}

fn marks(c: &mut Criterion) {
    let mut group = c.benchmark_group("bitmap marks");
    group.throughput(Throughput::Elements(MARKS));
    let blocks: Vec<_> = scattered().take(MARKS as usize).collect();
    let bitmap = Bitmap::new(BLOCKS);
    group.bench_function("scattered blocks", |b| {
        b.iter(|| blocks.iter().for_each(|block| bitmap.set(*block)));
    });
    let run = Run {
        start: BlockNumber::new(12_345),
        end: BlockNumber::new(12_345 + MARKS),
    };
    group.bench_function("one run", |b| b.iter(|| bitmap.set_run(black_box(run))));
    group.finish();
}

fn runs(c: &mut Criterion) {
    let mut group = c.benchmark_group("bitmap runs");
    group.sample_size(30);
    let words = vec![0_u64; BLOCKS as usize / 64];
    let mut copy = vec![1_u64; words.len()];
    group.bench_function("memcpy of its memory", |b| {
        b.iter(|| copy.copy_from_slice(black_box(&words)));
    });
    for (name, count) in [("of none", 0), ("of 1000", 1000), ("of 100000", 100_000)] {
        let bitmap = Bitmap::new(BLOCKS);
        scattered().take(count).for_each(|block| bitmap.set(block));
        group.bench_function(name, |b| b.iter(|| bitmap.runs().count()));
    }
    let bitmap = Bitmap::new(BLOCKS);
    bitmap.set_all();
    group.bench_function("of one, all dirty", |b| b.iter(|| bitmap.runs().count()));
    group.finish();
}

criterion_group!(benches, marks, runs);
criterion_main!(benches);
