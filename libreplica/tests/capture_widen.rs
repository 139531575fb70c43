//! What cannot be known exactly makes the whole volume dirty, with its cause: once, and
//! counted. Where this kernel's devices cannot be made to misbehave, the words that the
//! tracker compares are changed behind its back.

#![allow(clippy::unwrap_used, clippy::panic)]

mod devices;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use std::os::fd::AsFd;

use devices::load::load;
use devices::{
    Loop, MIB, Pinned, StopAtEnd, Zram, detach, drain, wait_until_settled, write_direct,
};
use libreplica::capture::{Tracker, WidenCause};
use libreplica::sys::bpf;
use libreplica::sys::memory::SharedWords;

/// The words of `struct state` in track.bpf.c that are tampered with.
const NOTED_MISSES: usize = 26;
const SURPLUS_BOUND: usize = 47;

fn state_of(pinned: &Pinned) -> Arc<SharedWords> {
    let pin = pinned.spec.pin_folder().join("map_state");
    Arc::new(SharedWords::map(bpf::open_pin(&pin).unwrap().as_fd(), 88).unwrap())
}

/// The next round is the whole volume because of `cause`, the one behind it is not.
fn assert_widens_once(tracker: &mut Tracker, cause: WidenCause) {
    let blocks = tracker.geometry().blocks();
    let (report, runs) = drain(tracker);
    assert_eq!(report.widened, Some(cause));
    assert_eq!(runs, [(0, blocks)]);
    assert_eq!(tracker.dirty_blocks(), blocks);
    tracker.acknowledge().unwrap();
    let (report, runs) = drain(tracker);
    assert_eq!(report.widened, None);
    assert_eq!(runs, []);
    assert!(tracker.counters().unwrap().widened.contains(&(cause, 1)));
}

/// Swaps before and after the second in which the kernel has surely counted what was seen.
fn come_to_rest(tracker: &mut Tracker) {
    for _ in 0..2 {
        assert_eq!(drain(tracker).0.widened, None);
        std::thread::sleep(Duration::from_millis(1050));
    }
    assert_eq!(drain(tracker).0.widened, None);
}

#[test]
fn events_that_the_kernel_skipped() {
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    let state = state_of(&pinned);
    for program in 0..3 {
        state.words()[NOTED_MISSES + program].fetch_add(1, Ordering::Relaxed);
        let (report, _) = drain(&mut tracker);
        assert_eq!(report.widened, Some(WidenCause::MissedEvents));
    }
    assert_eq!(
        tracker.counters().unwrap().widened,
        [(WidenCause::MissedEvents, 3)]
    );
}

#[test]
fn sectors_that_only_the_kernel_counted() {
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    write_direct(&disk.path, 0, 4096, 1);
    assert_eq!(drain(&mut tracker).1, [(0, 1)]);
    come_to_rest(&mut tracker);
    state_of(&pinned).words()[SURPLUS_BOUND].fetch_sub(8, Ordering::Relaxed);
    assert_widens_once(&mut tracker, WidenCause::StatsDiffer);
    // Whoever stops the kernel's counting takes the comparison away, and no more.
    let switch = format!("/sys/block/{}/queue/iostats", pinned.spec.disk.name());
    std::fs::write(&switch, "0").unwrap();
    write_direct(&disk.path, 4096, 4096, 1);
    let (report, runs) = drain(&mut tracker);
    assert_eq!((report.widened, runs), (None, vec![(1, 2)]));
    std::fs::write(&switch, "1").unwrap();
    assert_eq!(drain(&mut tracker).0.widened, None);
}

#[test]
fn sectors_that_the_kernel_did_not_count() {
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    come_to_rest(&mut tracker);
    // Off and on again between two swaps.
    let switch = format!("/sys/block/{}/queue/iostats", pinned.spec.disk.name());
    std::fs::write(&switch, "0").unwrap();
    write_direct(&disk.path, 8192, 4096, 1);
    std::fs::write(&switch, "1").unwrap();
    assert_eq!(drain(&mut tracker).0.widened, None);
    // The bound has come down with the surplus: a single sector is told.
    come_to_rest(&mut tracker);
    state_of(&pinned).words()[SURPLUS_BOUND].fetch_sub(1, Ordering::Relaxed);
    assert_widens_once(&mut tracker, WidenCause::StatsDiffer);
}

/// Takes away the programs that see requests end and bios begin.
fn blind(pinned: &Pinned, tracker: &Tracker) {
    for program in ["rq_complete", "bio_queue"] {
        detach(pinned, program);
    }
    let began = Instant::now();
    let seen = || {
        let counters = tracker.counters().unwrap();
        (counters.requests, counters.submitted)
    };
    // The kernel does it in its own time; until then, they see.
    loop {
        let before = seen();
        write_direct(pinned.spec.disk.path(), 0, 4096, 1);
        if seen() == before {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn programs_that_are_gone() {
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    come_to_rest(&mut tracker);
    blind(&pinned, &tracker);
    wait_until_settled(&tracker);
    let (report, runs) = drain(&mut tracker);
    assert_eq!(report.widened, Some(WidenCause::StatsDiffer));
    assert_eq!(runs, [(0, tracker.geometry().blocks())]);
    come_to_rest(&mut tracker);
    for _ in 0..3 {
        write_direct(&disk.path, 0, 512, 1);
        let (report, _) = drain(&mut tracker);
        assert_eq!(report.widened, Some(WidenCause::StatsDiffer));
        assert_eq!(drain(&mut tracker).0.widened, None);
    }
    let counters = tracker.counters().unwrap();
    assert_eq!(counters.widened, [(WidenCause::StatsDiffer, 4)]);
}

#[test]
fn programs_that_are_gone_from_a_disk_that_never_rests() {
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        scope.spawn(|| load(&disk.path, 512, 1, &stop));
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(3) {
            assert_eq!(drain(&mut tracker).0.widened, None);
            std::thread::sleep(Duration::from_millis(100));
        }
        for program in ["rq_complete", "bio_queue"] {
            detach(&pinned, program);
        }
        let began = Instant::now();
        while drain(&mut tracker).0.widened != Some(WidenCause::StatsDiffer) {
            assert!(began.elapsed() < Duration::from_secs(60), "nothing is told");
            std::thread::sleep(Duration::from_millis(100));
        }
    });
}

#[test]
fn causes_outlive_whoever_did_not_get_to_note_them() {
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    drop(Tracker::attach(&pinned.spec).unwrap());
    state_of(&pinned).words()[NOTED_MISSES].fetch_add(1, Ordering::Relaxed);
    let mut tracker = Tracker::adopt(&pinned.spec).unwrap();
    assert_widens_once(&mut tracker, WidenCause::MissedEvents);
}

/// A disk of bios has no request that could mark what was not noted: its end is recognised
/// as one without a beginning.
#[test]
fn a_full_table_on_a_disk_of_bios() {
    let disk = Zram::new(64 * MIB);
    let mut pinned = Pinned::new(&disk.path);
    pinned.spec.in_flight = 1;
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    let stop = AtomicBool::new(false);
    let mut seen = Vec::new();
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        for i in 0..4 {
            let (path, stop) = (&disk.path, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    write_direct(path, i << 24, 1 << 20, i as u8);
                }
            });
        }
        let began = Instant::now();
        while seen.len() < 2 && began.elapsed() < Duration::from_secs(30) {
            let (report, runs) = drain(&mut tracker);
            if report.widened.is_some() {
                assert_eq!(runs, [(0, tracker.geometry().blocks())]);
            }
            seen = tracker.counters().unwrap().widened;
        }
    });
    let causes: Vec<_> = seen.iter().map(|(cause, _)| *cause).collect();
    assert_eq!(causes, [WidenCause::TableFull, WidenCause::Unmatched]);
    drain(&mut tracker);
    assert!(tracker.in_flight().unwrap().is_none());
    assert_eq!(drain(&mut tracker).0.widened, None);
}
