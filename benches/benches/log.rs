//! A log in memory: appending and reading back, beside a copy of the same bytes. Without
//! compression it should be near the copy (checksums run at memory speed); LZ4 and AES-GCM
//! are what they are.

#![allow(
    clippy::unwrap_used,
    reason = "a bench that cannot run shall say so and end"
)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hrl_format::id::VolumeId;
use hrl_format::record::Record;
use hrl_format::units::{ByteLen, ByteOffset, Epoch, Extent, Timestamp, VolumeSize};
use hrl_format::{Compression, FrameBuffer, Log, LogHeader, LogOptions, LogWriter, VolumeKey};
use replica_bench::{noise, prose};

const TOTAL: usize = 32 << 20;

/// One way to write a log.
struct Flavour {
    name: &'static str,
    compression: Compression,
    key: Option<VolumeKey>,
    data: Vec<u8>,
}

fn flavours() -> [Flavour; 4] {
    let flavour = |name, compression, key: Option<u8>, data| Flavour {
        name,
        compression,
        key: key.map(|byte| VolumeKey::from_bytes([byte; 32])),
        data,
    };
    [
        flavour("plain", Compression::None, None, noise(TOTAL)),
        flavour("lz4, noise", Compression::Lz4, None, noise(TOTAL)),
        flavour("lz4, prose", Compression::Lz4, None, prose(TOTAL)),
        flavour("encrypted", Compression::None, Some(7), noise(TOTAL)),
    ]
}

/// Writes the flavour's data in records of `record` bytes.
fn write(flavour: &Flavour, record: usize, out: Vec<u8>) -> Vec<u8> {
    let volume = VolumeId::random().unwrap();
    let header = LogHeader::new(volume, VolumeSize::new(TOTAL as u64), Epoch::new(1)).unwrap();
    let options = LogOptions {
        compression: flavour.compression,
    };
    let mut writer = LogWriter::create(out, header, &options, flavour.key.as_ref()).unwrap();
    for (number, data) in flavour.data.chunks(record).enumerate() {
        let offset = ByteOffset::new((number * record) as u64);
        let extent = Extent::new(offset, ByteLen::new(data.len() as u64)).unwrap();
        let record = Record::Write { extent, data };
        writer.append(&record, Timestamp::from_nanos(1)).unwrap();
    }
    writer.seal().unwrap().0
}

fn append(c: &mut Criterion) {
    let mut group = c.benchmark_group("log append");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(TOTAL as u64));
    let data = noise(TOTAL);
    let mut copy = vec![0; TOTAL];
    group.bench_function("memcpy", |b| {
        b.iter(|| copy.copy_from_slice(black_box(&data)))
    });
    for flavour in flavours() {
        for record in [4 << 10, 64 << 10] {
            let mut memory = Vec::with_capacity(TOTAL + (TOTAL >> 3));
            group.bench_function(BenchmarkId::new(flavour.name, record), |b| {
                b.iter(|| {
                    memory.clear();
                    memory = write(&flavour, record, std::mem::take(&mut memory));
                });
            });
        }
    }
    group.finish();
}

fn read(c: &mut Criterion) {
    let mut group = c.benchmark_group("log read");
    group.sample_size(10);
    group.throughput(Throughput::Bytes(TOTAL as u64));
    let mut out = vec![0; TOTAL];
    let data = noise(TOTAL);
    group.bench_function("memcpy", |b| {
        b.iter(|| out.copy_from_slice(black_box(&data)))
    });
    for flavour in flavours() {
        let file = write(&flavour, 64 << 10, Vec::new());
        let log = Log::open(&file, flavour.key.as_ref()).unwrap();
        group.bench_function(flavour.name, |b| b.iter(|| copy_out(&log, &mut out)));
        assert!(out == flavour.data, "{} comes back", flavour.name);
    }
    group.finish();
}

/// Reads all of the log in order of the volume, as a restore does.
fn copy_out(log: &Log<&Vec<u8>>, out: &mut [u8]) {
    let mut buffer = FrameBuffer::new();
    let mut loaded = None;
    for entry in log.index() {
        let entry = entry.unwrap();
        if loaded != Some(entry.frame) {
            log.read_frame(entry.frame, &mut buffer).unwrap();
            loaded = Some(entry.frame);
        }
        let range = entry.extent.offset().get() as usize..entry.extent.end().get() as usize;
        out[range].copy_from_slice(buffer.slice(entry.at, entry.extent.len()).unwrap());
    }
}

criterion_group!(benches, append, read);
criterion_main!(benches);
