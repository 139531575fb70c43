//! What a store does in the background: logs that no point needs are folded into the image,
//! those between two points are merged, and one of which much became useless is written anew.
//! Each is beside a copy of the same files in the same folder, read, written and synced, in the
//! same round: the least that touching those bytes costs. Medians of five rounds; everything is in the
//! page cache when it is read, and on the medium when it ends.

#![allow(
    clippy::unwrap_used,
    reason = "a bench that cannot run shall say so and end"
)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hrl_format::VolumeKey;
use hrl_format::id::PointId;
use hrl_format::record::{Consistency, Record, Tag};
use hrl_format::units::{
    BlockSize, ByteLen, ByteOffset, Extent, SectorSize, Timestamp, VolumeSize,
};
use libreplica::geometry::Geometry;
use libreplica::store::{FoldStep, Store, VolumeSpec, VolumeWriter};
use replica_bench::{Numbers, noise};

const SIZE: u64 = 512 << 20;
const EPOCHS: u64 = 8;
const EPOCH: u64 = 24 << 20;
const ROUNDS: usize = 5;

/// What of the store is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Into the image.
    Fold,
    /// Of neighbours between two points.
    Merge,
    /// The same without the key of an encrypted volume.
    MergeWithoutKey,
}

struct Case {
    name: &'static str,
    work: Work,
    key: Option<VolumeKey>,
    /// Bytes of one write.
    record: u64,
}

/// Bytes, and how long the store and the copy took.
struct Round {
    bytes: u64,
    ours: Duration,
    copy: Duration,
}

fn main() {
    let key = || Some(VolumeKey::from_bytes([7; 32]));
    let case = |name, work, key, record| Case {
        name,
        work,
        key,
        record,
    };
    let cases = [
        case("fold, 64 KiB writes", Work::Fold, None, 64 << 10),
        case("fold, 4 KiB writes", Work::Fold, None, 4 << 10),
        case("merge, 64 KiB writes", Work::Merge, None, 64 << 10),
        case("merge, 4 KiB writes", Work::Merge, None, 4 << 10),
        case("merge, encrypted, 64 KiB", Work::Merge, key(), 64 << 10),
        case(
            "merge, encrypted, without the key",
            Work::MergeWithoutKey,
            key(),
            64 << 10,
        ),
    ];
    println!("| work | MiB | ours | copy of the same bytes | ratio |");
    println!("| --- | --- | --- | --- | --- |");
    for case in cases {
        let rounds: Vec<Round> = (0..ROUNDS).map(|_| round(&case)).collect();
        let (ours, copy) = (
            median(rounds.iter().map(|round| round.ours)),
            median(rounds.iter().map(|round| round.copy)),
        );
        println!(
            "| {} | {} | {} ms | {} ms | {:.2} |",
            case.name,
            rounds[0].bytes >> 20,
            ours.as_millis(),
            copy.as_millis(),
            copy.as_secs_f64() / ours.as_secs_f64()
        );
    }
}

fn median(times: impl Iterator<Item = Duration>) -> Duration {
    let mut times: Vec<Duration> = times.collect();
    times.sort_unstable();
    times[times.len() / 2]
}

fn round(case: &Case) -> Round {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let (store, mut writer) = filled(folder.path(), case);
    let points: Vec<PointId> = writer.catalogue().points.iter().map(|p| p.id).collect();
    // Folding needs none but the last, merging the first, too.
    let first = usize::from(case.work != Work::Fold);
    for &id in &points[first..points.len() - 1] {
        writer.drop_point(id).unwrap();
    }
    let logs = logs(folder.path());
    let bytes = logs.iter().map(|log| log.metadata().unwrap().len()).sum();
    if case.work == Work::MergeWithoutKey {
        let id = writer.catalogue().volume;
        drop(writer);
        writer = store.volume_keeper(id).unwrap();
    }
    let copy = copied(&logs, folder.path());
    let began = Instant::now();
    let mut done = 0;
    loop {
        match writer.fold_step().unwrap() {
            FoldStep::Nothing => break,
            FoldStep::Folded { bytes, .. } | FoldStep::Merged { bytes, .. } => done += bytes.get(),
            FoldStep::Compacted { .. } | FoldStep::Indexed => {}
        }
    }
    let ours = began.elapsed();
    assert!(done * 10 >= bytes * 8, "{done} of {bytes} bytes");
    Round { bytes, ours, copy }
}

/// A volume whose image is allocated, with epochs of scattered writes, each with a point.
fn filled(folder: &Path, case: &Case) -> (Store, VolumeWriter) {
    let store = Store::create(&folder.join("store")).unwrap();
    let geometry = Geometry {
        size: VolumeSize::new(SIZE),
        block: BlockSize::MIN,
        sector: SectorSize::B512,
    };
    let mut spec = VolumeSpec::new("bench", geometry).unwrap();
    spec.key = case.key.as_ref().map(VolumeKey::key_id);
    let id = store.create_volume(spec).unwrap();
    let mut writer = store.volume_writer(id, case.key.clone()).unwrap();
    let data = noise(1 << 20);
    let mut baseline = writer.begin_baseline().unwrap();
    let baseline_bytes = if case.work == Work::Fold {
        SIZE
    } else {
        1 << 20
    };
    for at in (0..baseline_bytes).step_by(1 << 20) {
        baseline.write(ByteOffset::new(at), &data).unwrap();
    }
    baseline.finish().unwrap();
    let mut numbers = Numbers::default();
    point(&mut writer, |_| ());
    for _ in 0..EPOCHS {
        point(&mut writer, |append| {
            for _ in 0..EPOCH / case.record {
                let slot = numbers.next().unwrap() % (SIZE / case.record);
                append(slot * case.record, &data[..case.record as usize]);
            }
        });
    }
    (store, writer)
}

/// An epoch of writes that ends in a point.
fn point(writer: &mut VolumeWriter, write: impl FnOnce(&mut dyn FnMut(u64, &[u8]))) {
    let mut epoch = writer.begin_epoch().unwrap();
    let time = Timestamp::now();
    write(&mut |at, data| {
        let len = ByteLen::new(data.len() as u64);
        let extent = Extent::new(ByteOffset::new(at), len).unwrap();
        epoch.append(&Record::Write { extent, data }, time).unwrap();
    });
    let tag = Tag {
        id: PointId::at(time).unwrap(),
        time,
        consistency: Consistency::Crash,
        label: String::new(),
        group: None,
        root: None,
    };
    epoch.append(&Record::Tag(tag), time).unwrap();
    writer.commit(epoch).unwrap();
}

/// The logs of the epochs: all but the small ones.
fn logs(folder: &Path) -> Vec<File> {
    let volumes = folder.join("store/volumes");
    let volume = fs::read_dir(volumes).unwrap().next().unwrap().unwrap();
    let logs = fs::read_dir(volume.path().join("logs")).unwrap();
    let logs = logs.map(|log| log.unwrap().path());
    let large = |path: &PathBuf| path.metadata().unwrap().len() > 4 << 20;
    logs.filter(large)
        .map(|path| File::open(path).unwrap())
        .collect()
}

/// How long a copy of these files takes, as one file that is synced.
fn copied(logs: &[File], folder: &Path) -> Duration {
    let path = folder.join("copy");
    let began = Instant::now();
    let mut copy = File::create(&path).unwrap();
    let mut buffer = vec![0; 1 << 20];
    for mut log in logs {
        loop {
            let read = std::io::Read::read(&mut log, &mut buffer).unwrap();
            if read == 0 {
                break;
            }
            std::io::Write::write_all(&mut copy, &buffer[..read]).unwrap();
        }
    }
    copy.sync_data().unwrap();
    let took = began.elapsed();
    fs::remove_file(path).unwrap();
    took
}
