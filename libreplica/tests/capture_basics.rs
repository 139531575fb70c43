//! A tracker's life on a real loop device: attach, rounds, epochs, adoption, refusals.

#![allow(clippy::unwrap_used, clippy::panic)]

mod devices;

use devices::{Loop, MIB, Pinned, drain, write_direct};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use libreplica::ErrorKind;
use libreplica::capture::{FolderId, Tracker, WidenCause, list_pins, remove_pins};
use libreplica::sys::bpf;
use libreplica::sys::memory::SharedWords;
use libreplica::units::BlockSize;

#[test]
fn rounds_have_what_was_written_and_nothing_else() {
    let disk = Loop::new(64 * MIB);
    let pinned = Pinned::new(&disk.path);
    write_direct(&disk.path, 0, 4096, 1);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    assert_eq!(drain(&mut tracker).1, []);
    write_direct(&disk.path, 8192, 4096, 2);
    write_direct(&disk.path, 3 * MIB + 512, 512, 3);
    write_direct(&disk.path, 64 * MIB - 8192, 8192, 4);
    let block = 3 * MIB / 4096;
    let (report, runs) = drain(&mut tracker);
    assert_eq!(runs, [(2, 3), (block, block + 1), (16382, 16384)]);
    assert_eq!(report.widened, None);
    assert_eq!(drain(&mut tracker).1, []);
    assert!(tracker.in_flight().unwrap().is_none());
    let counters = tracker.counters().unwrap();
    assert_eq!(counters.submitted, 3);
    assert_eq!(counters.submitted_sectors, 8 + 1 + 16);
    assert_eq!(counters.completed_sectors, counters.request_sectors);
    assert_eq!(counters.widened, []);
    tracker.detach().unwrap();
    assert_eq!(list_pins(&pinned.spec.pins).unwrap(), []);
}

#[test]
fn an_epoch_is_kept_until_acknowledged() {
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    write_direct(&disk.path, 0, 4096, 1);
    assert_eq!(drain(&mut tracker).1, [(0, 1)]);
    write_direct(&disk.path, 40960, 4096, 1);
    assert_eq!(drain(&mut tracker).1, [(10, 11)]);
    assert_eq!(tracker.dirty_blocks(), 2);
    // The target never got it.
    tracker.reclaim();
    assert_eq!(tracker.dirty_blocks(), 2);
    let report = tracker.swap().unwrap();
    assert_eq!(report.blocks, 2);
    assert_eq!(tracker.acknowledge().unwrap_err().kind(), ErrorKind::State);
    assert_eq!(tracker.swap().unwrap_err().kind(), ErrorKind::State);
    tracker.finish_round();
    tracker.acknowledge().unwrap();
    assert_eq!(tracker.dirty_blocks(), 0);
    tracker.reclaim();
    assert_eq!(drain(&mut tracker).1, []);
    // What the caller marks, and why.
    tracker.mark(devices::extent(4095, 2));
    assert_eq!(drain(&mut tracker).1, [(0, 2)]);
    tracker.mark_all(WidenCause::Asked);
    assert_eq!(drain(&mut tracker).1, [(0, 4096)]);
    assert_eq!(
        tracker.counters().unwrap().widened,
        [(WidenCause::Asked, 1)]
    );
}

#[test]
fn adoption_finds_what_was_live_in_a_round_and_in_the_epoch() {
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    assert_eq!(
        Tracker::adopt(&pinned.spec).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    assert_eq!(
        Tracker::attach(&pinned.spec).unwrap_err().kind(),
        ErrorKind::Exists
    );
    write_direct(&disk.path, 0, 4096, 1);
    drain(&mut tracker);
    write_direct(&disk.path, 4096, 4096, 1);
    tracker.swap().unwrap();
    write_direct(&disk.path, 8192, 4096, 1);
    drop(tracker);
    write_direct(&disk.path, 12288, 4096, 1);
    let mut tracker = Tracker::adopt(&pinned.spec).unwrap();
    assert_eq!(tracker.dirty_blocks(), 4);
    tracker.reclaim();
    let (report, runs) = drain(&mut tracker);
    assert_eq!(runs, [(0, 4)]);
    assert_eq!(report.widened, None);
    tracker.acknowledge().unwrap();
    assert_eq!(tracker.dirty_blocks(), 0);
}

#[test]
fn pins_of_others_are_refused() {
    let mut disk = Loop::of_its_own(16 * MIB);
    let mut pinned = Pinned::new(&disk.path);
    let tracker = Tracker::attach(&pinned.spec).unwrap();
    drop(tracker);
    let listed = list_pins(&pinned.spec.pins).unwrap();
    let tracked = listed[0].tracked.as_ref().unwrap();
    assert_eq!(listed[0].volume, pinned.spec.volume);
    assert_eq!(tracked.folder, pinned.spec.folder);
    assert_eq!(tracked.name, pinned.spec.disk.name());
    assert_eq!(tracked.diskseq, pinned.spec.disk.diskseq());
    assert_eq!(tracked.geometry, pinned.spec.geometry());
    let kind = |pinned: &Pinned| Tracker::adopt(&pinned.spec).unwrap_err().kind();

    // Those of another state folder are not in the way: its own lie beside them.
    let other = FolderId::from_bytes([9; 16]);
    let folder = std::mem::replace(&mut pinned.spec.folder, other);
    assert_eq!(kind(&pinned), ErrorKind::NotFound);
    let mut beside = Tracker::attach(&pinned.spec).unwrap();
    write_direct(&disk.path, 0, 4096, 1);
    assert_eq!(drain(&mut beside).1, [(0, 1)]);
    let owners = |list: Vec<libreplica::capture::PinInfo>| -> Vec<_> {
        list.iter().map(|pin| pin.owner).collect()
    };
    let all = list_pins(&pinned.spec.pins).unwrap();
    assert_eq!(owners(all), [Some(folder), Some(other)]);
    drop(beside);
    Tracker::adopt(&pinned.spec).unwrap().detach().unwrap();
    let left = list_pins(&pinned.spec.pins).unwrap();
    assert_eq!(owners(left), [Some(folder)]);
    pinned.spec.folder = folder;
    let mut first = Tracker::adopt(&pinned.spec).unwrap();
    assert_eq!(drain(&mut first).1, [(0, 1)]);
    drop(first);
    pinned.spec.block = BlockSize::new(8192).unwrap();
    assert_eq!(kind(&pinned), ErrorKind::Resized);
    pinned.spec.block = BlockSize::MIN;

    // The same file on the same device is another disk: nobody tracked in between.
    let before = pinned.spec.disk.clone();
    let mut tracker = Tracker::adopt(&pinned.spec).unwrap();
    disk.attach_again();
    assert_eq!(tracker.swap().unwrap_err().kind(), ErrorKind::Vanished);
    assert_eq!(kind(&pinned), ErrorKind::Vanished);
    pinned.spec.disk = libreplica::device::BlockDevice::open(&disk.path).unwrap();
    assert_eq!(pinned.spec.disk.devno(), before.devno());
    assert_eq!(kind(&pinned), ErrorKind::Vanished);
    remove_pins(&pinned.spec.pins, pinned.spec.volume, pinned.spec.folder).unwrap();
    let gone = remove_pins(&pinned.spec.pins, pinned.spec.volume, pinned.spec.folder).unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound);
    Tracker::attach(&pinned.spec).unwrap().detach().unwrap();
}

/// As a kill leaves it between attaching and the proof that the disk is seen.
#[test]
fn adoption_makes_up_for_a_proof_that_was_not_made() {
    let disk = Loop::new(16 * MIB);
    let pinned = Pinned::new(&disk.path);
    drop(Tracker::attach(&pinned.spec).unwrap());
    let pin = bpf::open_pin(&pinned.spec.pin_folder().join("map_state")).unwrap();
    let state = SharedWords::map(pin.as_fd(), 88).unwrap();
    let (probing, probed) = (&state.words()[25], &state.words()[80]);
    assert_eq!(probing.load(Ordering::Relaxed), 0);
    let before = probed.load(Ordering::Relaxed);
    probing.store(1, Ordering::Relaxed);
    std::fs::read(&disk.path).unwrap();
    write_direct(&disk.path, 0, 4096, 1);
    let mut tracker = Tracker::adopt(&pinned.spec).unwrap();
    assert_eq!(probing.load(Ordering::Relaxed), 0);
    assert!(probed.load(Ordering::Relaxed) >= before + 8 + 8);
    assert_eq!(drain(&mut tracker).1, [(0, 1)]);
}
