//! Inline capture of a device that cannot be read in one place: nobody waits for that place,
//! no moment is taken until it is known, and it is known once it was written over.
//!
//! A loop device fails to read what lies behind the end of its file: the file is cut short. It
//! fails to write what its file system has no room for.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod devices;
mod lanes;

use std::fs::OpenOptions;
use std::time::{Duration, Instant};

use devices::small::Small;
use devices::{Loop, extent};
use lanes::*;
use libreplica::ErrorKind;
use libreplica::capture::inline::{Change, Lane, Service};

const VOLUME: u64 = 256 * MIB;
/// Where it cannot be read.
const BAD: u64 = 200 * MIB;

fn cut_to(disk: &Loop, len: u64) {
    let file = OpenOptions::new().write(true).open(&disk.file).unwrap();
    file.set_len(len).unwrap();
}

/// Two writes that fail, where it cannot be read back what they have left.
fn leave_unknown(disk: &Loop, small: &Small, service: &Service, lane: &mut Lane) {
    cut_to(disk, MIB);
    small.fill();
    for (offset, len) in [(BAD + 512, 3584), (BAD + 16384, 512)] {
        assert!(write(lane, offset, &vec![1; len]).is_err());
    }
    small.empty();
    wait_for(|| service.trouble().is_some());
}

fn wait_for(is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn no_writer_waits_for_what_cannot_be_read() {
    let small = Small::tmpfs(16 * MIB);
    let disk = Loop::inside(small.path(), VOLUME);
    let folder = tempfile::tempdir().unwrap();
    let (service, _) = Service::start(&spec(&disk, folder.path(), 64 * MIB)).unwrap();
    climb(&service);
    let mut lane = service.lane(8).unwrap();
    leave_unknown(&disk, &small, &service, &mut lane);
    let before = Instant::now();
    // Each in a region of its own, which the activity log has to have first.
    for region in 0..40 {
        write(&mut lane, region * 4 * MIB, &[1; 4096]).unwrap();
    }
    let took = before.elapsed();
    assert!(took < Duration::from_secs(8), "{took:?}");
    let trouble = service.trouble().unwrap();
    assert!(trouble.contains("read the device"), "{trouble}");
    let refused = Service::moment(&[&service]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::State);
    cut_to(&disk, VOLUME);
    let entries = next_cut(&service);
    assert_eq!(service.trouble(), None);
    let read_back = |at: u64, len: u64| {
        let mut found = entries
            .iter()
            .filter(|entry| entry.extent == extent(at, len));
        found.any(|entry| matches!(entry.change, Change::Write(_)))
    };
    assert!(read_back(BAD + 512, 3584) && read_back(BAD + 16384, 512));
    let mut image = vec![9; VOLUME as usize];
    replay(&mut image, &entries);
    // Nothing but what was to be written was read back.
    let around = &image[BAD as usize..][..20480];
    let is = |range: std::ops::Range<usize>, byte| around[range].iter().all(|b| *b == byte);
    assert!(is(0..512, 9) && is(512..4096, 0) && is(4096..16384, 9) && is(16384..16896, 0));
}

#[test]
fn what_was_written_over_is_known() {
    let small = Small::tmpfs(16 * MIB);
    let disk = Loop::inside(small.path(), VOLUME);
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(&disk, folder.path(), 64 * MIB);
    let (service, _) = Service::start(&spec).unwrap();
    climb(&service);
    let mut lane = service.lane(8).unwrap();
    leave_unknown(&disk, &small, &service, &mut lane);
    // Both; the second is still behind the file's end.
    write(&mut lane, BAD + 512, &[5; 3584]).unwrap();
    assert!(Service::moment(&[&service]).is_err());
    write(&mut lane, BAD + 16384, &[6; 512]).unwrap();
    let entries = next_cut(&service);
    assert_eq!(service.trouble(), None);
    let mut image = vec![9; VOLUME as usize];
    replay(&mut image, &entries);
    assert!(image[BAD as usize + 512..][..3584].iter().all(|b| *b == 5));
    assert!(image[BAD as usize + 16384..][..512].iter().all(|b| *b == 6));

    service.acknowledge();
    // It is dirty if the service ends before, which does not wait for it.
    leave_unknown(&disk, &small, &service, &mut lane);
    drop(lane);
    let before = Instant::now();
    service.stop();
    assert!(before.elapsed() < Duration::from_secs(5));
    drop(service);
    let (service, _) = Service::start(&spec).unwrap();
    let dirty = |at: u64| {
        let block = libreplica::geometry::BlockNumber::new(at / 4096);
        service.pending().test(block)
    };
    assert!(dirty(BAD) && dirty(BAD + 16384));
}
