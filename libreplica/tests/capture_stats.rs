//! The kernel counts a disk's sectors, too, and the tracker compares. However the two are
//! caught while requests end, they never seem to differ when nothing was missed.

#![allow(clippy::unwrap_used, clippy::panic)]

mod devices;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use devices::load::{load, pause_and_write};
use devices::{Loop, MIB, Mounted, Pinned, Random, StopAtEnd, Zram, cases, drain, run};
use libreplica::capture::Tracker;

/// Swaps as fast as it goes, with the tracker dropped and adopted in between, and detached
/// and attached again, while the device is written to in all ways.
fn compare_under_load(path: &Path, swaps: u64, seed: u64) {
    let pinned = Pinned::new(path);
    let sector = u64::from(pinned.spec.disk.logical_sector().get());
    let stop = AtomicBool::new(false);
    let mut random = Random(seed);
    let mut tracker = std::thread::scope(|scope| {
        let _stopped = StopAtEnd(&stop);
        let stop = &stop;
        scope.spawn(move || load(path, sector, seed * 10 + 1, stop));
        for thread in 2..=3 {
            scope.spawn(move || pause_and_write(path, sector, seed * 10 + thread, stop));
        }
        let mut tracker = Tracker::attach(&pinned.spec).unwrap();
        for swap in 0..swaps {
            let (report, _) = drain(&mut tracker);
            assert_eq!(report.widened, None, "swap {swap}, seed {seed}");
            match random.below(32) {
                0 => tracker.acknowledge().unwrap(),
                1 => std::thread::sleep(Duration::from_micros(random.below(3000))),
                2 => {
                    drop(tracker);
                    tracker = Tracker::adopt(&pinned.spec).unwrap();
                }
                3 => {
                    tracker.detach().unwrap();
                    tracker = Tracker::attach(&pinned.spec).unwrap();
                }
                _ => {}
            }
        }
        tracker
    });
    let (report, _) = drain(&mut tracker);
    assert_eq!(report.widened, None, "at rest, seed {seed}");
}

/// Files are written, flushed and removed again in a mounted file system.
fn write_files(folder: &Path, stop: &AtomicBool) {
    let mut random = Random(folder.as_os_str().len() as u64);
    for turn in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let path = folder.join(format!("{}", turn % 16));
        let mut file = File::create(&path).unwrap();
        let bytes = vec![turn as u8; random.below(40 << 10) as usize];
        file.write_all(&bytes).unwrap();
        file.sync_data().unwrap();
        if random.below(4) == 0 {
            fs::remove_file(&path).unwrap();
        }
        std::thread::sleep(Duration::from_micros(random.below(2000)));
    }
}

/// Swaps as fast as it goes under a file system in use, taken over again and again.
fn compare_under_files(device: &Path, swaps: u64) {
    run("mkfs.ext4", &["-q", device.to_str().unwrap()]);
    let mounted = Mounted::with(device, "discard");
    let pinned = Pinned::new(device);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stopped = StopAtEnd(&stop);
        for name in ["a", "bc"] {
            let folder = mounted.at.join(name);
            fs::create_dir(&folder).unwrap();
            let stop = &stop;
            scope.spawn(move || write_files(&folder, stop));
        }
        let mut tracker = Tracker::attach(&pinned.spec).unwrap();
        for swap in 0..swaps {
            assert_eq!(drain(&mut tracker).0.widened, None, "swap {swap}");
            if swap % 16 == 0 {
                drop(tracker);
                tracker = Tracker::adopt(&pinned.spec).unwrap();
            }
            std::thread::sleep(Duration::from_micros(500));
        }
    });
}

#[test]
fn a_disk_of_requests() {
    let disk = Loop::new(24 * MIB);
    for seed in 1..=4 {
        compare_under_load(&disk.path, cases(150), seed);
    }
}

#[test]
fn a_disk_of_bios() {
    let disk = Zram::new(24 * MIB);
    compare_under_load(&disk.path, cases(150), 5);
}

#[test]
fn a_file_system_on_a_disk_of_requests() {
    let disk = Loop::new(64 * MIB);
    compare_under_files(&disk.path, cases(300));
}

#[test]
fn a_file_system_on_a_disk_of_bios() {
    let disk = Zram::new(64 * MIB);
    compare_under_files(&disk.path, cases(300));
}
