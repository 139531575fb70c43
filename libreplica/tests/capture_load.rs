//! Under load, with swaps at random moments: a copy that is brought up to date by rounds
//! alone equals the device once the load has stopped. On a disk of requests, on one of
//! bios, on two at a time, and on one whose writes take their time.

#![allow(clippy::unwrap_used, clippy::panic)]

mod devices;

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use devices::load::load;
use devices::{Copy, Loop, MIB, Pinned, Random, Slow, StopAtEnd, Zram, cases, wait_until_settled};
use libreplica::capture::Tracker;
use libreplica::sys::membarrier;
use libreplica::units::BlockSize;

/// Loads the device from three threads while rounds are made at random moments, then stops
/// and compares.
fn follow(path: &Path, block: BlockSize, rounds: u64, seed: u64) {
    let pinned = Pinned::with_block(path, block);
    let mut copy = Copy::new(&pinned.spec);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    let sector = u64::from(pinned.spec.disk.logical_sector().get());
    let stop = AtomicBool::new(false);
    let mut random = Random(seed);
    std::thread::scope(|scope| {
        let _stopped = StopAtEnd(&stop);
        for thread in 1..=3 {
            let stop = &stop;
            scope.spawn(move || load(path, sector, seed * 10 + thread, stop));
        }
        copy.read([pinned.spec.disk.size().extent()]);
        for round in 0..rounds {
            std::thread::sleep(Duration::from_micros(random.below(8000)));
            assert_eq!(
                copy.round(&mut tracker).widened,
                None,
                "round {round}, seed {seed}"
            );
            match random.below(8) {
                0 => tracker.reclaim(),
                1..4 => tracker.acknowledge().unwrap(),
                _ => {}
            }
        }
    });
    let file = OpenOptions::new().write(true).open(path).unwrap();
    // The first may say what the writers did not ask for any more; see `load`.
    drop(file.sync_all());
    file.sync_all().unwrap();
    wait_until_settled(&tracker);
    copy.round(&mut tracker);
    assert_eq!(tracker.pending().count(), 0);
    copy.assert_same(path);
    let counters = tracker.counters().unwrap();
    assert!(
        counters.submitted > rounds,
        "there was hardly a load: {counters:?}"
    );
    assert_eq!(counters.widened, [], "seed {seed}");
}

#[test]
fn a_disk_of_requests() {
    let disk = Loop::new(24 * MIB);
    for seed in 1..=2 {
        follow(&disk.path, BlockSize::MIN, cases(40), seed);
    }
}

#[test]
fn a_disk_of_4096_byte_sectors_past_the_page_cache_below() {
    let disk = Loop::with(
        24 * MIB + 4096,
        &["--sector-size", "4096", "--direct-io=on"],
    );
    follow(&disk.path, BlockSize::new(16 << 10).unwrap(), cases(40), 3);
}

#[test]
fn a_disk_of_bios() {
    let disk = Zram::new(24 * MIB);
    follow(&disk.path, BlockSize::MIN, cases(40), 4);
}

#[test]
fn two_volumes_at_once() {
    let (first, second) = (Loop::new(16 * MIB), Zram::new(16 * MIB));
    std::thread::scope(|scope| {
        scope.spawn(|| follow(&first.path, BlockSize::MIN, cases(20), 5));
        scope.spawn(|| {
            follow(
                &second.path,
                BlockSize::new(64 << 10).unwrap(),
                cases(20),
                6,
            )
        });
    });
}

#[test]
fn a_disk_whose_writes_take_their_time() {
    let disk = Slow::new(16 * MIB);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _done = StopAtEnd(&done);
        scope.spawn(|| {
            let mut random = Random(77);
            while !done.load(Ordering::Relaxed) {
                disk.frozen(|| std::thread::sleep(Duration::from_millis(random.below(30))));
                std::thread::sleep(Duration::from_millis(random.below(20)));
            }
        });
        follow(&disk.path, BlockSize::MIN, cases(40), 7);
    });
}

/// Runs the rest of its arguments where the kernel has no membarrier: a seccomp filter gives
/// ENOSYS (38) for it and lets all else pass (linux/seccomp.h, linux/filter.h).
const WITHOUT_MEMBARRIER: &str = "
import ctypes, os, platform, struct, sys
number = {'x86_64': 324, 'aarch64': 283}[platform.machine()]
step = lambda code, yes, no, value: struct.pack('HBBI', code, yes, no, value)
steps = (step(0x20, 0, 0, 0) + step(0x15, 0, 1, number)
         + step(0x06, 0, 0, 0x00050000 | 38) + step(0x06, 0, 0, 0x7fff0000))
filter = ctypes.create_string_buffer(steps)
program = ctypes.create_string_buffer(struct.pack('HP', 4, ctypes.addressof(filter)))
libc = ctypes.CDLL(None, use_errno=True)
for call in [(38, 1, 0, 0, 0), (22, 2, program)]:
    if libc.prctl(*call):
        sys.exit(os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])
";
const FENCED: &str = "REPLICA_TEST_FENCED";

#[test]
fn a_kernel_without_membarrier() {
    let status = Command::new("/usr/bin/python3")
        .args(["-c", WITHOUT_MEMBARRIER])
        .arg(std::env::current_exe().unwrap())
        .args(["fenced", "--exact", "--nocapture"])
        .env(FENCED, "1")
        .status();
    assert!(status.unwrap().success());
}

/// What [`a_kernel_without_membarrier`] runs: the swap waits through a map of maps.
#[test]
fn fenced() {
    if std::env::var_os(FENCED).is_none() {
        return;
    }
    assert!(!membarrier::offered(), "the filter is not there");
    let disk = Loop::new(16 * MIB);
    follow(&disk.path, BlockSize::MIN, cases(40), 8);
}
