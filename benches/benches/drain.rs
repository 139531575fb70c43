//! An epoch drained: the dirty blocks of a bitmap are read from the volume, digested,
//! written to a log, and committed durably to a store, as the primary does it. The limit
//! is the first of these alone: reading the same blocks around the page cache.

#![allow(
    clippy::unwrap_used,
    reason = "a bench that cannot run shall say so and end"
)]

use std::path::Path;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use hrl_format::record::Record;
use hrl_format::units::{BlockSize, Extent, SectorSize, Timestamp, VolumeSize};
use libreplica::bitmap::Bitmap;
use libreplica::digest::LeafFunction;
use libreplica::geometry::{BlockNumber, Geometry, Run};
use libreplica::store::{Store, VolumeSpec, VolumeWriter};
use libreplica::sys::reader::{Reader, ReaderOptions};
use replica_bench::{Numbers, noise};

const SIZE: usize = 256 << 20;
const BLOCK: u64 = 4096;

fn geometry() -> Geometry {
    Geometry {
        size: VolumeSize::new(SIZE as u64),
        block: BlockSize::MIN,
        sector: SectorSize::B512,
    }
}

/// A volume with an empty image in a store of its own.
fn image(folder: &Path) -> VolumeWriter {
    let store = Store::open_or_create(folder).unwrap();
    let spec = VolumeSpec::new("bench", geometry()).unwrap();
    let id = store.create_volume(spec).unwrap();
    let mut writer = store.volume_writer(id, None).unwrap();
    writer.begin_baseline().unwrap().finish().unwrap();
    writer
}

/// The extents that are dirty.
fn dirty(bitmap: &Bitmap) -> impl Iterator<Item = Extent> {
    bitmap.runs().map(|run| geometry().extent_of(run))
}

fn drain(bitmap: &Bitmap, reader: &mut Reader, writer: &mut VolumeWriter) {
    let leaves = LeafFunction::plain();
    let mut log = writer.begin_epoch().unwrap();
    let mut pieces = reader.pieces(dirty(bitmap));
    while let Some((extent, data)) = pieces.next().unwrap() {
        let first = extent.offset().get() / BLOCK;
        for (number, block) in (first..).zip(data.chunks(BLOCK as usize)) {
            std::hint::black_box(leaves.leaf(BlockNumber::new(number), block));
        }
        log.append(&Record::Write { extent, data }, Timestamp::now())
            .unwrap();
    }
    writer.commit(log).unwrap();
}

fn epochs(c: &mut Criterion) {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let volume = folder.path().join("volume");
    std::fs::write(&volume, noise(SIZE)).unwrap();
    let mut reader = Reader::open(&volume, SectorSize::B512, ReaderOptions::default()).unwrap();
    let mut stores = 0;
    for (name, blocks, run) in [("4 KiB scattered", 8192, 1), ("1 MiB runs", 8192, 256)] {
        let bitmap = Bitmap::new(SIZE as u64 / BLOCK);
        for at in Numbers::default().take(blocks / run) {
            let start = at % (SIZE as u64 / BLOCK / run as u64) * run as u64;
            let (start, end) = (
                BlockNumber::new(start),
                BlockNumber::new(start + run as u64),
            );
            bitmap.set_run(Run { start, end });
        }
        let bytes: u64 = dirty(&bitmap).map(|extent| extent.len().get()).sum();
        let mut group = c.benchmark_group(format!("epoch drain, {name}"));
        group.sample_size(10);
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function("the reading alone", |b| {
            b.iter(|| {
                let mut pieces = reader.pieces(dirty(&bitmap));
                while pieces.next().unwrap().is_some() {}
            });
        });
        group.bench_function("read, digested, committed", |b| {
            b.iter_batched_ref(
                || {
                    stores += 1;
                    image(&folder.path().join(format!("store-{stores}")))
                },
                |writer| drain(&bitmap, &mut reader, writer),
                BatchSize::PerIteration,
            );
        });
        group.finish();
    }
}

criterion_group!(benches, epochs);
criterion_main!(benches);
