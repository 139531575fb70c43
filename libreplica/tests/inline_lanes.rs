//! Inline capture on real loop devices: what several lanes write together is on the device,
//! in the backlog in an order that replays to the same bytes, and in the ledger; a moment is
//! one, while writes go on.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod devices;
mod lanes;

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use devices::{Loop, Random, StopAtEnd, cases, extent, open_direct};
use lanes::*;
use libreplica::capture::inline::{
    Change, Cookie, Durability, Entrance, Errno, Event, Moment, Request, Resumed, Room, Service,
};
use libreplica::geometry::BlockNumber;
use libreplica::sys::memory::AlignedMemory;
#[test]
fn each_request_does_what_it_says() {
    let disk = Loop::new(16 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let (service, resumed) = Service::start(&spec(&disk, folder.path(), 64 * MIB)).unwrap();
    assert_eq!(resumed, Resumed::Begun);
    climb(&service);
    let mut lane = service.lane(8).unwrap();
    write(&mut lane, 4096, &[1; 8192]).unwrap();
    write(&mut lane, 512, &[2; 512]).unwrap();
    let flush = one(&mut lane, Request::Flush);
    assert_eq!(flush.result, Ok(()));
    let zeroes = Request::Zeroes {
        extent: extent(8192, 4096),
        room: Room::Kept,
        durability: Durability::Durable,
    };
    assert_eq!(one(&mut lane, zeroes).result, Ok(()));
    assert_eq!(discard(&mut lane, MIB, MIB), Ok(()));
    let read = Request::Read {
        to: part(&[9; 16384]),
        extent: extent(0, 16384),
    };
    let read = one(&mut lane, read);
    let part_read = read.part.unwrap();
    let bytes = part_read.bytes();
    assert!(bytes[512..1024].iter().all(|byte| *byte == 2));
    assert!(bytes[4096..8192].iter().all(|byte| *byte == 1));
    assert!(bytes[8192..].iter().all(|byte| *byte == 0));
    let kinds: Vec<_> = take_all(&service)
        .iter()
        .map(|entry| {
            (
                entry.extent.offset().get(),
                std::mem::discriminant(&entry.change),
            )
        })
        .collect();
    let write = std::mem::discriminant(&Change::Write(bytes::Bytes::new()));
    let expected = [
        (4096, write),
        (512, write),
        (8192, std::mem::discriminant(&Change::Zeroes)),
        (MIB, std::mem::discriminant(&Change::Discard)),
    ];
    assert_eq!(kinds, expected);
    // 0 to 3, and the second MiB.
    assert_eq!(service.dirty_blocks(), 3 + MIB / 4096);
}

#[test]
fn a_discard_leaves_blocks_undefined_and_its_edges_are_zeroed() {
    let disk = Loop::new(16 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let (service, _) = Service::start(&spec(&disk, folder.path(), 64 * MIB)).unwrap();
    let mut lane = service.lane(8).unwrap();
    write(&mut lane, 0, &[3; 64 << 10]).unwrap();
    climb(&service);
    assert_eq!(discard(&mut lane, 512, 16384), Ok(()));
    let undefined = || -> Vec<u64> {
        let all = (0..16).filter(|n| service.is_undefined(BlockNumber::new(*n)));
        all.collect()
    };
    assert_eq!(undefined(), [1, 2, 3]);
    write(&mut lane, 8192, &[4; 512]).unwrap();
    assert_eq!(undefined(), [1, 3]);
    let entries = next_cut(&service);
    // Nothing had to be read back.
    assert_eq!(entries.len(), 2);
    let mut image = vec![3; 16 * MIB as usize];
    image[64 << 10..].fill(0);
    replay(&mut image, &entries);
    let device = content(&disk);
    for n in (0..4096).filter(|n| ![1, 3].contains(n)) {
        let block = n * 4096..(n + 1) * 4096;
        assert!(image[block.clone()] == device[block], "block {n}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_nothing_else_happens() {
    let disk = Loop::new(MIB);
    let folder = tempfile::tempdir().unwrap();
    let (service, _) = Service::start(&spec(&disk, folder.path(), MIB)).unwrap();
    let mut lane = service.lane(8).unwrap();
    assert_eq!(write(&mut lane, MIB, &[1; 512]), Err(Errno(libc::ENOSPC)));
    assert_eq!(write(&mut lane, 100, &[1; 512]), Err(Errno(libc::EINVAL)));
    assert_eq!(write(&mut lane, 512, &[1; 100]), Err(Errno(libc::EINVAL)));
    assert_eq!(write(&mut lane, 512, &[]), Err(Errno(libc::EINVAL)));
    let short = Request::Write {
        from: part(&[1; 512]),
        extent: extent(0, 1024),
        durability: Durability::Cached,
    };
    assert_eq!(one(&mut lane, short).result, Err(Errno(libc::EINVAL)));
    assert_eq!(lane.requests(), 0);
    assert_eq!(service.dirty_blocks(), 0);
    assert!(content(&disk).iter().all(|byte| *byte == 0));
    // A second owner is refused while this one is there.
    let second = Service::start(&spec(&disk, folder.path(), MIB)).unwrap_err();
    assert_eq!(second.kind(), libreplica::ErrorKind::Busy);
}

/// Writes at random places until told to stop; half of all are of whole blocks.
fn scribble(entrance: &Entrance, seed: u64, size: u64, stop: &AtomicBool) {
    let mut lane = entrance.lane(32).unwrap();
    let mut random = Random(seed * 77 + 1);
    let mut started = 0_u64;
    while !stop.load(Ordering::Relaxed) || lane.requests() > 0 {
        while lane.requests() < 16 && !stop.load(Ordering::Relaxed) {
            started += 1;
            let sectors = 1 + random.below(24);
            let offset = random.below(size / 512 - sectors) * 512;
            let extent = extent(offset, sectors * 512);
            let cookie = Cookie(started);
            match random.below(20) {
                0 => lane.begin(cookie, Request::Discard { extent }),
                1 => {
                    let (room, durability) = (Room::MayBeFreed, Durability::Cached);
                    let zeroes = Request::Zeroes {
                        extent,
                        room,
                        durability,
                    };
                    lane.begin(cookie, zeroes);
                }
                2 => lane.begin(cookie, Request::Flush),
                n => {
                    let fill = vec![random.below(255) as u8 + 1; (sectors * 512) as usize];
                    let durability = if n == 3 {
                        Durability::Durable
                    } else {
                        Durability::Cached
                    };
                    let from = part(&fill);
                    let write = Request::Write {
                        from,
                        extent,
                        durability,
                    };
                    lane.begin(cookie, write);
                }
            }
        }
        lane.turn().unwrap();
        while let Some(event) = lane.event() {
            match event {
                Event::Done(done) => assert_eq!(done.result, Ok(())),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn overlapping_writes_of_several_lanes_replay_to_the_device() {
    let size = MIB;
    for seed in 0..cases(3) {
        let disk = Loop::new(size);
        let folder = tempfile::tempdir().unwrap();
        let (service, _) = Service::start(&spec(&disk, folder.path(), 512 * MIB)).unwrap();
        climb(&service);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for lane in 0..3 {
                let (entrance, stop) = (service.entrance(), &stop);
                scope.spawn(move || scribble(&entrance, seed * 10 + lane, size, stop));
            }
            std::thread::sleep(Duration::from_millis(300));
            stop.store(true, Ordering::Relaxed);
        });
        let entries = next_cut(&service);
        assert!(entries.is_sorted_by_key(|entry| entry.time));
        let counters = service.counters();
        assert_eq!(counters.changes, entries.len() as u64);
        assert!(counters.waited > 0, "some overlapped: {counters:?}");
        let mut image = vec![0; size as usize];
        replay(&mut image, &entries);
        assert!(image == content(&disk), "seed {seed}");
        // Every changed block is dirty.
        for entry in &entries {
            let first = entry.extent.offset().get() / 4096;
            assert!(service.round().test(BlockNumber::new(first)));
        }
    }
}

/// Each of several writers writes its numbers one after the other, each write after the end
/// of the one before: so any moment holds all numbers up to one of each writer.
fn count_up(entrance: &Entrance, writer: u64, slots: u64, stop: &AtomicBool, last: &AtomicU64) {
    let mut lane = entrance.lane(4).unwrap();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let at = (writer * slots + number % slots) * 4096;
        let mut data = vec![0; 4096];
        data[..8].copy_from_slice(&number.to_le_bytes());
        write(&mut lane, at, &data).unwrap();
        last.store(number, Ordering::Release);
    }
}

/// The numbers in an image, checked to be those of one moment: the last of each writer.
fn last_numbers(image: &[u8], writers: u64, slots: u64) -> Vec<u64> {
    let number = |at: u64| {
        let start = (at * 4096) as usize;
        u64::from_le_bytes(image[start..start + 8].try_into().unwrap())
    };
    let one = |writer: u64| {
        let numbers: HashMap<u64, u64> = (0..slots)
            .map(|slot| (slot, number(writer * slots + slot)))
            .collect();
        let last = *numbers.values().max().unwrap();
        for (slot, number) in numbers {
            // The newest number up to `last` that goes to this slot.
            let newest = (last + slots - slot) / slots * slots + slot;
            let expected = if newest > last {
                newest.saturating_sub(slots)
            } else {
                newest
            };
            assert_eq!(
                number, expected,
                "writer {writer}, slot {slot}, last {last}"
            );
        }
        last
    };
    (0..writers).map(one).collect()
}

#[test]
fn a_moment_is_one_while_writes_go_on() {
    const WRITERS: u64 = 3;
    // So few that writers come back to blocks that are still to be read.
    let slots = 29;
    let size = WRITERS * slots * 4096;
    let disk = Loop::new(size);
    let folder = tempfile::tempdir().unwrap();
    let (service, _) = Service::start(&spec(&disk, folder.path(), 64 * MIB)).unwrap();
    let stop = AtomicBool::new(false);
    let last: Vec<_> = (0..WRITERS).map(|_| AtomicU64::new(0)).collect();
    let mut image = vec![0; size as usize];
    let mut saved = 0;
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (entrance, stop, last) = (service.entrance(), &stop, &last[writer as usize]);
            scope.spawn(move || count_up(&entrance, writer, slots, stop, last));
        }
        let _stop = StopAtEnd(&stop);
        let device = open_direct(&disk.path);
        for round in 0..cases(30) {
            std::thread::sleep(Duration::from_millis(5));
            let before: Vec<_> = last.iter().map(|n| n.load(Ordering::Acquire)).collect();
            // Data mode would be an end in the stream: begin each round without it.
            service.give_up("another round begins");
            let (_, moments) = Service::moment(&[&service]).unwrap();
            let Moment::Blocks(moment) = &moments[0] else {
                panic!("in data mode")
            };
            let after: Vec<_> = last.iter().map(|n| n.load(Ordering::Acquire)).collect();
            let mut blocks = Vec::new();
            while let Some(run) = moment.next_run(
                BlockNumber::new(blocks.last().map_or(0, |n| n + 1)),
                u64::MAX >> 1,
            ) {
                blocks.extend(run.range());
            }
            // From the end, so that many are written before they are read.
            for n in blocks.into_iter().rev() {
                let block = &mut image[n as usize * 4096..][..4096];
                std::thread::sleep(Duration::from_micros(100));
                read_direct(&device, n * 4096, block);
                service.take_block(BlockNumber::new(n), block).unwrap();
            }
            service.end_moment();
            service.moment_is_stored();
            service.acknowledge();
            let found = last_numbers(&image, WRITERS, slots);
            for (writer, number) in found.iter().enumerate() {
                // Nothing older than what had ended, nothing newer than could have begun.
                assert!(*number >= before[writer], "round {round}");
                assert!(*number <= after[writer] + 1, "round {round}");
            }
            // The stream goes on from the moment.
            std::thread::sleep(Duration::from_millis(2));
            let entries = next_cut(&service);
            replay(&mut image, &entries);
            last_numbers(&image, WRITERS, slots);
            service.acknowledge();
        }
        saved += service.counters().copied_out_of_turn;
    });
    assert!(saved > 0, "no writer ever came before the reader");
}

fn read_direct(device: &File, offset: u64, to: &mut [u8]) {
    let mut memory = AlignedMemory::new(to.len()).unwrap();
    let len = to.len();
    let buffer = &mut memory.as_mut_slice()[..len];
    device.read_exact_at(buffer, offset).unwrap();
    to.copy_from_slice(buffer);
}

/// Also while the stream is given up: what a disk makes of a discarded range is its own affair.
#[test]
fn what_was_discarded_in_a_gap_is_restored_as_zeroes() {
    let disk = Loop::new(16 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let (service, _) = Service::start(&spec(&disk, folder.path(), 64 * MIB)).unwrap();
    let mut lane = service.lane(8).unwrap();
    climb(&service);
    service.give_up("a gap begins");
    for offset in [4096, 8192, 12288, 16384] {
        write(&mut lane, offset, &[3; 4096]).unwrap();
    }
    discard(&mut lane, 4096, 12288).unwrap();
    write(&mut lane, 8192, &[4; 4096]).unwrap();
    let (_, moments) = Service::moment(&[&service]).unwrap();
    assert!(matches!(moments[0], Moment::Blocks(_)));
    // Behind the moment: neither waits for it to be read, nor changes what it is.
    let copied = service.counters().copied_out_of_turn;
    write(&mut lane, 4096, &[5; 4096]).unwrap();
    assert_eq!(service.counters().copied_out_of_turn, copied);
    discard(&mut lane, 8192, 4096).unwrap();
    let moment = [1, 2, 3, 4].map(|n| {
        // What this disk could answer.
        let mut bytes = [0xEE; 4096];
        if n == 4 {
            bytes = [3; 4096];
        }
        service.take_block(BlockNumber::new(n), &mut bytes).unwrap();
        bytes[0]
    });
    assert_eq!(moment, [0, 4, 0, 3]);
    service.end_moment();
}

#[test]
fn what_was_dirty_is_after_a_restart_too() {
    let disk = Loop::new(64 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(&disk, folder.path(), MIB);
    let (service, _) = Service::start(&spec).unwrap();
    let mut lane = service.lane(8).unwrap();
    write(&mut lane, 8192, &[1; 512]).unwrap();
    write(&mut lane, 20 * MIB, &[1; 8192]).unwrap();
    let (_, _) = Service::moment(&[&service]).unwrap();
    write(&mut lane, 40 * MIB, &[1; 4096]).unwrap();
    drop(lane);
    drop(service);
    let (service, resumed) = Service::start(&spec).unwrap();
    assert_eq!(resumed, Resumed::Unbroken);
    assert_eq!(service.dirty_blocks(), 4);
    let runs: Vec<_> = service
        .pending()
        .runs()
        .map(|run| run.start.get())
        .collect();
    assert_eq!(runs, [2, 20 * MIB / 4096, 40 * MIB / 4096]);
}

#[test]
fn a_lane_goes_whose_change_waits_for_one_of_the_same_thread() {
    let disk = Loop::new(16 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let (service, _) = Service::start(&spec(&disk, folder.path(), 64 * MIB)).unwrap();
    climb(&service);
    let [mut stays, mut goes] = [0; 2].map(|_| service.lane(8).unwrap());
    // Its region is active from now on.
    write(&mut stays, 0, &[1; 8192]).unwrap();
    let request = |fill: u8, offset: u64| Request::Write {
        from: part(&[fill; 8192]),
        extent: extent(offset, 8192),
        durability: Durability::Cached,
    };
    stays.begin(Cookie(1), request(2, 0));
    goes.begin(Cookie(1), request(3, 4096));
    stays.begin(Cookie(2), request(4, 8192));
    drop(goes);
    assert!(finish(&mut stays, 2).iter().all(|done| done.result.is_ok()));
    let entries = take_all(&service);
    assert_eq!(entries.len(), 3, "{entries:?}");
    let image = content(&disk);
    assert!(image[..8192].iter().all(|byte| *byte == 2));
    assert!(image[8192..16384].iter().all(|byte| *byte == 4));
    drop(stays);
    service.stop();
}

#[test]
fn a_lane_that_goes_leaves_nothing_behind() {
    let disk = Loop::new(16 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let (service, _) = Service::start(&spec(&disk, folder.path(), 64 * MIB)).unwrap();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut before = 0;
    for n in 0..200_u64 {
        let mut lane = service.lane(8).unwrap();
        // The second waits for the first, the third is an errand.
        for cookie in 0..2 {
            let request = Request::Write {
                from: part(&[n as u8; 4096]),
                extent: extent(0, 4096),
                durability: Durability::Cached,
            };
            lane.begin(Cookie(cookie), request);
        }
        let extent = extent(MIB, 8192);
        lane.begin(Cookie(2), Request::Discard { extent });
        drop(lane);
        if n == 50 {
            before = descriptors();
        }
    }
    // Other tests open some at the same time.
    assert!(descriptors() < before + 100, "they grow with the lanes");
    // What had not begun was given up, and none of it failed.
    let counters = service.counters();
    assert!(
        counters.changes <= 600 && counters.failed == 0,
        "{counters:?}"
    );
    let mut lane = service.lane(8).unwrap();
    write(&mut lane, 0, &[1; 4096]).unwrap();
    let entrance = service.entrance();
    let stopping = std::thread::spawn(move || service.stop());
    while !matches!(lane.event(), Some(Event::Stop)) {
        lane.turn().unwrap();
    }
    assert_eq!(
        entrance.lane(8).unwrap_err().kind(),
        libreplica::ErrorKind::State
    );
    drop((lane, entrance));
    stopping.join().unwrap();
}

#[test]
fn what_waits_at_a_moment_is_dirty_after_it() {
    let disk = Loop::new(16 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let (service, _) = Service::start(&spec(&disk, folder.path(), 64 * MIB)).unwrap();
    climb(&service);
    let (mut first, mut second) = (service.lane(8).unwrap(), service.lane(8).unwrap());
    // The region is active from now on.
    write(&mut first, 8 * 4096, &[1; 4096]).unwrap();
    let request = |blocks: u64| Request::Write {
        from: part(&vec![2; blocks as usize * 4096]),
        extent: extent(0, blocks * 4096),
        durability: Durability::Cached,
    };
    // One is under way, and the other waits for it.
    first.begin(Cookie(1), request(1));
    second.begin(Cookie(2), request(2));
    let (_, moments) = Service::moment(&[&service]).unwrap();
    assert!(matches!(moments[0], Moment::Stream(_)));
    service.acknowledge();
    // Before they have reached the device: nobody may be there any more when they do.
    let dirty = service.dirty_blocks();
    finish(&mut first, 1);
    finish(&mut second, 1);
    assert_eq!(dirty, 2);
    service.give_up("for the test");
    let still = |n| service.pending().test(BlockNumber::new(n));
    assert!(
        still(0) && still(1),
        "the backlog that knew of them is gone"
    );
}
