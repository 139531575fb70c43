//! Writes of which the kernel shows only the beginning, or only the end: their blocks are
//! marked all the same, nothing stays in flight for ever, and the volume is not widened.

#![allow(clippy::unwrap_used, clippy::panic)]

mod devices;

use std::fs::OpenOptions;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use std::os::fd::AsFd;

use devices::load::pause_and_write;
use devices::{
    Copy, Loop, MIB, Pinned, Random, StopAtEnd, cases, detach, drain, wait_until_settled,
    write_direct,
};
use libreplica::capture::Tracker;
use libreplica::sys::bpf;
use libreplica::sys::memory::SharedWords;

/// Words of `struct state` in track.bpf.c.
const SUBMITTED: usize = 48;
const SUBMITTED_SECTORS: usize = 49;

/// Takes `program` away, and writes until it sees no more.
fn blind(pinned: &Pinned, tracker: &Tracker, program: &str) {
    detach(pinned, program);
    let began = Instant::now();
    let seen = || {
        let counters = tracker.counters().unwrap();
        match program {
            "rq_complete" => counters.requests,
            _ => counters.submitted,
        }
    };
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

/// Swaps before and after the second in which the kernel has surely counted what was seen,
/// so that the least sector missed would be told.
fn come_to_rest(tracker: &mut Tracker) {
    for _ in 0..2 {
        drain(tracker);
        std::thread::sleep(Duration::from_millis(1050));
    }
    drain(tracker);
}

#[test]
fn an_end_that_was_not_seen_is_made_up_for() {
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    come_to_rest(&mut tracker);
    blind(&pinned, &tracker, "rq_complete");
    wait_until_settled(&tracker);
    assert_eq!(drain(&mut tracker).1, [(0, 1)]);
    let stale = tracker.counters().unwrap().stale;
    write_direct(&disk.path, 7 << 12, 4096, 2);
    // It may have been read while it was on its way: it is in this round for its beginning,
    // and in the next for its end.
    assert_eq!(drain(&mut tracker), (drained(1), vec![(7, 8)]));
    wait_until_settled(&tracker);
    assert_eq!(drain(&mut tracker), (drained(1), vec![(7, 8)]));
    assert_eq!(drain(&mut tracker), (drained(0), vec![]));
    let counters = tracker.counters().unwrap();
    assert_eq!(counters.stale, stale + 1);
    assert_eq!(counters.widened, []);
}

fn drained(blocks: u64) -> libreplica::capture::RoundReport {
    libreplica::capture::RoundReport {
        blocks,
        widened: None,
    }
}

#[test]
fn a_beginning_that_was_not_seen_is_not_needed() {
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    come_to_rest(&mut tracker);
    blind(&pinned, &tracker, "bio_queue");
    assert_eq!(drain(&mut tracker), (drained(1), vec![(0, 1)]));
    for block in [7, 9] {
        write_direct(&disk.path, block << 12, 4096, 2);
    }
    assert_eq!(drain(&mut tracker), (drained(2), vec![(7, 8), (9, 10)]));
    assert!(tracker.in_flight().unwrap().is_none());
    assert_eq!(tracker.counters().unwrap().widened, []);
}

/// The ends of all writes go unseen from some moment on, under load: what the rounds bring
/// home is the device all the same.
#[test]
fn a_copy_is_whole_though_no_end_is_seen() {
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    let mut copy = Copy::new(&pinned.spec);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    let stop = AtomicBool::new(false);
    let rounds = cases(60);
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&stop);
        for seed in 1..=3 {
            let (stop, path) = (&stop, &disk.path);
            scope.spawn(move || pause_and_write(path, 512, seed, stop));
        }
        copy.read([pinned.spec.disk.size().extent()]);
        let mut random = Random(5);
        for round in 0..rounds {
            if round == rounds / 3 {
                detach(&pinned, "rq_complete");
            }
            assert_eq!(copy.round(&mut tracker).widened, None);
            std::thread::sleep(Duration::from_micros(random.below(3000)));
        }
    });
    let file = OpenOptions::new().write(true).open(&disk.path).unwrap();
    drop(file.sync_all());
    file.sync_all().unwrap();
    wait_until_settled(&tracker);
    assert_eq!(copy.round(&mut tracker).widened, None);
    copy.assert_same(&disk.path);
    assert!(tracker.counters().unwrap().stale > 0);
}

/// Whoever makes up for an end may be killed before he has counted it.
#[test]
fn counts_that_were_left_undone() {
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    let tracker = Tracker::attach(&pinned.spec).unwrap();
    let pin = pinned.spec.pin_folder().join("map_state");
    let state = SharedWords::map(bpf::open_pin(&pin).unwrap().as_fd(), 88).unwrap();
    state.words()[SUBMITTED].fetch_add(1, Ordering::Relaxed);
    state.words()[SUBMITTED_SECTORS].fetch_add(16, Ordering::Relaxed);
    assert_eq!(tracker.in_flight().unwrap().sectors, 16);
    wait_until_settled(&tracker);
}
