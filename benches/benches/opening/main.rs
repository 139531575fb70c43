//! Opening a point of a store with many logs, and reading through it. The store is made as
//! docs/store.md describes it, log by log with the format's own writer, and the catalogue as text:
//! committing each would measure something else. From then on everything is the store's own: the
//! writer makes the levels, and each opening is a process of its own, so that its memory is known.
//!
//! The store is sparse. Most extents are zeroes, which have no data; their frames become holes once
//! the log is sealed, and so do the indexes of logs and the levels that none of the measured points
//! is read through, once longer levels were made of them. Whoever read one of those would be told
//! that it is damaged: so it is also seen that opening a point reads nothing else.
//!
//! `REPLICA_OPENING_LOGS` and `REPLICA_OPENING_EXTENTS` (for each log) say how large the store is;
//! 10000 of each take some 5 GB in `REPLICA_OPENING_DIR` (else /var/tmp) and some ten minutes.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a bench that cannot run shall say so and end"
)]

mod making;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use hrl_format::units::{ByteOffset, Timestamp};
use libreplica::store::{PointReader, PointSelector, Store};
use replica_bench::Numbers;

use making::{NAME, RADIX, Shape, make, point_time, volume_of};

/// The process that opens one point: store, then which of them.
const OPEN: &str = "--open-point";

fn main() {
    let mut args = std::env::args().skip(1);
    if args.next().as_deref() == Some(OPEN) {
        let (store, which) = (args.next().unwrap(), args.next().unwrap());
        open(Path::new(&store), which.parse().unwrap());
        return;
    }
    let folder = std::env::var_os("REPLICA_OPENING_DIR").map_or("/var/tmp".into(), PathBuf::from);
    opening(&folder);
    reading(&folder);
}

fn number(name: &str, otherwise: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or(otherwise, |text| text.parse().unwrap())
}

/// Time and memory of opening points of stores of more and more logs.
fn opening(folder: &Path) {
    let most = number("REPLICA_OPENING_LOGS", 1000);
    let extents = number("REPLICA_OPENING_EXTENTS", 1000);
    for logs in [1, 100, most] {
        // The newest, the one that takes the most files, the middle and the first.
        let worst = (logs / RADIX / RADIX * RADIX * RADIX).saturating_sub(1);
        let mut measured = vec![logs, worst.max(logs * 4 / 5 / RADIX * RADIX), logs / 2, 2];
        measured.retain(|&count| (1..=logs).contains(&count));
        measured.dedup();
        let shape = Shape {
            size: 1 << 40,
            logs,
            extents,
            extent: 4096,
            data_in: 1024,
            base: 1 << 20,
            measured,
        };
        let scratch = tempfile::tempdir_in(folder).unwrap();
        let path = scratch.path().join("store");
        let started = Instant::now();
        let longest = make(&path, &shape);
        println!(
            "{logs} logs, {} extents, made with levels in {:.0?}, the longest step {longest:.0?}; \
             logs take {} MiB, levels {} MiB",
            logs * extents,
            started.elapsed(),
            taken(&volume_of(&path).join("logs")) >> 20,
            taken(&volume_of(&path).join("levels")) >> 20,
        );
        points(&path, &shape.measured);
    }
}

/// Opens the points that end so many logs.
fn points(store: &Path, measured: &[u64]) {
    for logs in measured {
        for state in ["warm", "cold"] {
            let mut runs: Vec<Opened> = (0..7)
                .map(|_| open_elsewhere(store, *logs, state))
                .collect();
            runs.sort_by_key(|run| run.open);
            let Opened {
                find,
                open,
                first,
                each,
                memory,
                later,
            } = runs[runs.len() / 2];
            println!(
                "  the point on {logs}, {state}: {open} us to open ({find} us of it to find the \
                 volume), {first} us with the first read, {memory} KiB; then {each} us a random read \
                 of 4 KiB, {later} KiB"
            );
        }
    }
}

/// Microseconds, and KiB.
struct Opened {
    find: u64,
    open: u64,
    first: u64,
    each: u64,
    memory: u64,
    later: u64,
}

fn open_elsewhere(store: &Path, logs: u64, state: &str) -> Opened {
    if state == "cold" {
        forget(&volume_of(store));
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([OPEN, store.to_str().unwrap(), &logs.to_string()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let output = String::from_utf8(output.stdout).unwrap();
    let numbers: Vec<u64> = output
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    let [find, open, first, each, memory, later] = numbers[..] else {
        panic!("{output}");
    };
    Opened {
        find,
        open,
        first,
        each,
        memory,
        later,
    }
}

/// In a process of its own: opens a point, reads from it, and says how long that took.
fn open(path: &Path, which: usize) {
    let before = memory("VmRSS");
    let started = Instant::now();
    let store = Store::open(path).unwrap();
    let volume = store.volume(store.find(NAME).unwrap(), None).unwrap();
    let found = started.elapsed();
    let time = Timestamp::from_nanos(point_time(which as u64));
    let point = volume.point(PointSelector::AtOrBefore(time)).unwrap();
    let mut reader = volume.open_point(point.id).unwrap();
    let opened = started.elapsed();
    let mut block = vec![0; 4096];
    reader
        .read_at(ByteOffset::new(1 << 30), &mut block)
        .unwrap();
    let read = started.elapsed();
    let used = memory("VmHWM") - before;
    let places: Vec<u64> = Numbers::default()
        .take(1000)
        .map(|n| (n % (1 << 28)) << 12)
        .collect();
    let random = Instant::now();
    for place in &places {
        reader.read_at(ByteOffset::new(*place), &mut block).unwrap();
    }
    println!(
        "{} {} {} {} {} {}",
        found.as_micros(),
        opened.as_micros(),
        read.as_micros(),
        random.elapsed().as_micros() / places.len() as u128,
        used,
        memory("VmHWM") - before,
    );
}

/// In KiB.
fn memory(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Reading all of a volume, and here and there, beside its base.
fn reading(folder: &Path) {
    const SIZE: u64 = 256 << 20;
    for (extent, logs) in [64 << 10, 4 << 10]
        .into_iter()
        .flat_map(|e| [1, 100, 10_000].map(|l| (e, l)))
    {
        let scratch = tempfile::tempdir_in(folder).unwrap();
        let path = scratch.path().join("store");
        // Half as many blocks as the volume has, wherever they fall.
        let shape = Shape {
            size: SIZE,
            logs,
            extents: (SIZE / extent / 2 / logs).max(1),
            extent,
            data_in: 1,
            base: SIZE as usize,
            measured: (1..=logs).collect(),
        };
        make(&path, &shape);
        let store = Store::open(&path).unwrap();
        let volume = store.volume(store.find(NAME).unwrap(), None).unwrap();
        let newest = volume.point(PointSelector::Latest).unwrap();
        let base = fs::File::open(volume_of(&path).join("base.img")).unwrap();
        let mut reader = volume.open_point(newest.id).unwrap();
        for (what, len, places) in [
            (
                "all in order, 1 MiB",
                1 << 20,
                (0..SIZE >> 20).map(|n| n << 20).collect(),
            ),
            ("at random, 64 KiB", 64 << 10, at_random(SIZE, 64 << 10)),
            ("at random, 4 KiB", 4 << 10, at_random(SIZE, 4 << 10)),
        ] {
            for state in ["warm", "cold"] {
                let prepare = || {
                    if state == "cold" {
                        forget(&volume_of(&path));
                    }
                };
                let through = median(|| {
                    prepare();
                    read_point(&mut reader, len, &places)
                });
                let alone = median(|| {
                    prepare();
                    read_base(&base, len, &places)
                });
                println!(
                    "{logs} logs of {} extents of {} KiB, {what}, {state}: {through:.0} MiB/s, the base alone {alone:.0} MiB/s, \
                     ratio {:.2}",
                    shape.extents,
                    extent >> 10,
                    through / alone
                );
            }
        }
    }
}

fn at_random(size: u64, len: u64) -> Vec<u64> {
    let places = Numbers::default().map(|n| n % (size / len) * len);
    places.take(2000).collect()
}

/// Of five, in MiB/s.
fn median(mut measure: impl FnMut() -> f64) -> f64 {
    // Once for the page cache.
    measure();
    let mut rates: Vec<f64> = (0..5).map(|_| measure()).collect();
    rates.sort_by(f64::total_cmp);
    rates[2]
}

fn read_point(reader: &mut PointReader, len: usize, places: &[u64]) -> f64 {
    let mut buffer = vec![0; len];
    let started = Instant::now();
    for place in places {
        reader
            .read_at(ByteOffset::new(*place), &mut buffer)
            .unwrap();
    }
    rate(len, places, started)
}

fn read_base(base: &fs::File, len: usize, places: &[u64]) -> f64 {
    let mut buffer = vec![0; len];
    let started = Instant::now();
    for place in places {
        base.read_exact_at(&mut buffer, *place).unwrap();
    }
    rate(len, places, started)
}

fn rate(len: usize, places: &[u64], started: Instant) -> f64 {
    (len * places.len()) as f64 / f64::from(1 << 20) / started.elapsed().as_secs_f64()
}

/// Takes the files out of the page cache.
fn forget(folder: &Path) {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            forget(&path);
            continue;
        }
        let file = fs::File::open(&path).unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    }
}

/// How many bytes the files of a folder take, holes aside.
fn taken(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).unwrap();
    let blocks = files.map(|entry| entry.unwrap().metadata().unwrap().blocks());
    blocks.sum::<u64>() * 512
}
