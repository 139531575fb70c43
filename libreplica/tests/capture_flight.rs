//! Writes on their way: one that is in flight across a swap is marked again when it
//! completes, however long that takes; what cannot be noted widens; what the kernel fails
//! early does not count as in flight for ever.

#![allow(clippy::unwrap_used, clippy::panic)]

mod devices;

use std::fs;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use devices::{MIB, Pinned, Slow, drain, open_direct, write_direct};
use libreplica::capture::{Tracker, WidenCause};
use libreplica::sys::memory::AlignedMemory;

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_write_in_flight_across_swaps_comes_back_when_it_completes() {
    let slow = Slow::new(16 * MIB);
    let pinned = Pinned::new(&slow.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    std::thread::scope(|scope| {
        slow.frozen(|| {
            scope.spawn(|| write_direct(&slow.path, 40960, 8192, 1));
            wait_until("the write begins", || {
                tracker.in_flight().unwrap().sectors == 16
            });
            assert_eq!(tracker.in_flight().unwrap().writes, 1);
            assert_eq!(drain(&mut tracker).1, [(10, 12)]);
            tracker.acknowledge().unwrap();
            // It has not completed: nothing new, and more than one swap passes.
            assert_eq!(drain(&mut tracker).1, []);
            assert_eq!(drain(&mut tracker).1, []);
            assert!(!tracker.in_flight().unwrap().is_none());
        });
    });
    assert!(tracker.in_flight().unwrap().is_none());
    assert_eq!(drain(&mut tracker).1, [(10, 12)]);
    assert_eq!(drain(&mut tracker).1, []);
}

#[test]
fn a_tracker_adopted_while_a_write_is_in_flight_sees_its_end() {
    let slow = Slow::new(16 * MIB);
    let pinned = Pinned::new(&slow.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    std::thread::scope(|scope| {
        slow.frozen(|| {
            scope.spawn(|| write_direct(&slow.path, 0, 4096, 1));
            wait_until("the write begins", || {
                tracker.in_flight().unwrap().writes == 1
            });
            assert_eq!(drain(&mut tracker).1, [(0, 1)]);
            tracker.acknowledge().unwrap();
            drop(tracker);
        });
    });
    let mut tracker = Tracker::adopt(&pinned.spec).unwrap();
    assert_eq!(drain(&mut tracker).1, [(0, 1)]);
    assert!(tracker.in_flight().unwrap().is_none());
}

#[test]
fn a_write_begun_before_the_tracker_is_marked_when_it_completes() {
    let slow = Slow::new(16 * MIB);
    let pinned = Pinned::new(&slow.path);
    std::thread::scope(|scope| {
        // Reads wait behind the frozen write in a loop device, and attaching reads: so the
        // tracker is attached by another thread, and gets through once thawed.
        let tracker = slow.frozen(|| {
            scope.spawn(|| write_direct(&slow.path, 4096, 4096, 1));
            let disk = &pinned.spec.disk;
            wait_until("the write begins", || disk.writes_in_flight().unwrap() > 0);
            let tracker = scope.spawn(|| Tracker::attach(&pinned.spec).unwrap());
            wait_until("the programs are attached", || {
                pinned.spec.pin_folder().exists()
            });
            tracker
        });
        let mut tracker = tracker.join().unwrap();
        wait_until("the write ends", || {
            pinned.spec.disk.writes_in_flight().unwrap() == 0
        });
        assert_eq!(drain(&mut tracker).1, [(1, 2)]);
        assert!(tracker.in_flight().unwrap().is_none());
    });
}

#[test]
fn more_writes_than_can_be_noted_widen() {
    let slow = Slow::new(16 * MIB);
    let mut pinned = Pinned::new(&slow.path);
    pinned.spec.in_flight = 4;
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    std::thread::scope(|scope| {
        slow.frozen(|| {
            for i in 0..12 {
                let path = &slow.path;
                scope.spawn(move || write_direct(path, i * 3 * 4096, 4096, 1));
            }
            wait_until("the table overflows", || {
                let counters = tracker.counters().unwrap();
                counters.submitted == 12
            });
            let (report, runs) = drain(&mut tracker);
            assert_eq!(report.widened, Some(WidenCause::TableFull));
            assert_eq!(runs, [(0, 4096)]);
            tracker.acknowledge().unwrap();
        });
    });
    // The requests have marked those that were not noted.
    let expected: Vec<_> = (0..12).map(|i| (i * 3, i * 3 + 1)).collect();
    let (report, runs) = drain(&mut tracker);
    assert_eq!(report.widened, None);
    assert_eq!(runs, expected);
    assert!(tracker.in_flight().unwrap().is_none());
    assert_eq!(
        tracker.counters().unwrap().widened,
        [(WidenCause::TableFull, 1)]
    );
}

/// Writes that must not wait, more than the queue takes: the kernel fails some of them after
/// announcing them.
#[test]
fn a_write_that_failed_early_is_not_in_flight_for_ever() {
    let slow = Slow::new(16 * MIB);
    let pinned = Pinned::new(&slow.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    let name = pinned.spec.disk.name().to_owned();
    let requests = fs::read_to_string(format!("/sys/block/{name}/queue/nr_requests")).unwrap();
    let requests: u64 = requests.trim().parse().unwrap();
    let refused = std::thread::scope(|scope| {
        slow.frozen(|| {
            for i in 0..requests {
                let path = &slow.path;
                scope.spawn(move || write_direct(path, i * 2 * 4096, 4096, 1));
            }
            wait_until("the queue is full", || {
                tracker.in_flight().unwrap().writes == requests
            });
            let file = open_direct(&slow.path);
            let memory = AlignedMemory::new(4096).unwrap();
            let piece = libc::iovec {
                iov_base: memory.as_slice().as_ptr() as *mut libc::c_void,
                iov_len: 4096,
            };
            let (fd, at) = (file.as_raw_fd(), 8 << 20);
            // SAFETY: one vector over memory that lives across the call.
            let result = unsafe { libc::pwritev2(fd, &raw const piece, 1, at, libc::RWF_NOWAIT) };
            result < 0
        })
    });
    assert!(
        refused,
        "the kernel took a write that it had no request for"
    );
    let in_flight = tracker.in_flight().unwrap();
    assert!(in_flight.is_none(), "{in_flight:?}");
    let counters = tracker.counters().unwrap();
    assert!(
        counters.submitted > requests,
        "the failed write was not announced"
    );
    assert_eq!(counters.submitted, counters.completed);
    assert_eq!(counters.submitted_sectors, counters.completed_sectors);
    assert!(drain(&mut tracker).0.blocks >= requests);
}
