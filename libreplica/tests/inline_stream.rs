//! The stream of inline capture when the store is behind, or fails: nothing of it is lost while
//! there is room, and what there is no room for is known as well as can be.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod devices;
mod lanes;
#[path = "rig/reboot.rs"]
mod reboot;

use std::time::{Duration, Instant};

use devices::{Loop, extent};
use lanes::{MIB, climb, one, replay, spec, take_all, write};
use libreplica::capture::inline::{Moment, Read, Request, Resumed, Service};
use libreplica::geometry::BlockNumber;
use libreplica::policy::Mode;
use libreplica::units::{ByteLen, Sequence, Timestamp};

#[test]
fn a_full_buffer_ends_the_stream_in_a_gap_and_no_write_waits_for_the_shipper() {
    let disk = Loop::new(64 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let (service, _) = Service::start(&spec(&disk, folder.path(), MIB)).unwrap();
    climb(&service);
    let mut image = std::fs::read(&disk.file).unwrap();
    let mut lane = service.lane(8).unwrap();
    service.mode_changes();
    let began = Instant::now();
    // The stream, then a gap of extents, then one of blocks: so many that are not one.
    let mut modes = Vec::new();
    for n in 0..2500 {
        write(&mut lane, n * 8192 + 512, &[n as u8; 512]).unwrap();
        modes.push(service.waiting().mode);
    }
    assert!(began.elapsed() < Duration::from_secs(60));
    modes.dedup();
    assert_eq!(modes, [Mode::Data, Mode::Metadata]);
    let refused = Service::moment(&[&service]).unwrap_err();
    assert_eq!(refused.kind(), libreplica::ErrorKind::State);
    // What came before the gap is there; the gap has the rest, to the sector.
    let before = take_all(&service);
    replay(&mut image, &before);
    let (_, moments) = Service::moment(&[&service]).unwrap();
    let Moment::Blocks(blocks) = &moments[0] else {
        panic!("in data mode")
    };
    let now = std::fs::read(&disk.file).unwrap();
    let mut at = BlockNumber::new(0);
    let mut parts = 0;
    while let Some(run) = blocks.next_run(at, 1) {
        for part in blocks.parts(service.geometry().extent_of(run)) {
            let range = part.offset().get() as usize..part.end().get() as usize;
            assert_eq!(range.len(), 512);
            image[range.clone()].copy_from_slice(&now[range]);
            parts += 1;
        }
        at = run.end;
    }
    assert_eq!(parts + before.len(), 2500);
    assert!(image == now, "something is in neither");
    service.end_moment();
    service.moment_is_stored();
    service.acknowledge();
    assert_eq!(service.dirty_blocks(), 0);

    for n in 0..5000 {
        write(&mut lane, n * 8192, &[n as u8; 512]).unwrap();
    }
    let modes = service.mode_changes();
    let modes: Vec<_> = modes.iter().map(|change| change.mode).collect();
    assert_eq!(
        modes,
        [Mode::Metadata, Mode::Data, Mode::Metadata, Mode::Bitmap]
    );
    assert_eq!(service.dirty_blocks(), 5000);
    take_all(&service);
    climb(&service);
    write(&mut lane, 0, &[5; 512]).unwrap();
    assert_eq!(take_all(&service).len(), 1);
}

#[test]
fn a_store_that_fails_costs_nothing_of_the_stream() {
    let disk = Loop::new(16 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let (service, _) = Service::start(&spec(&disk, folder.path(), 64 * MIB)).unwrap();
    climb(&service);
    let mut lane = service.lane(8).unwrap();
    for n in 0..10 {
        write(&mut lane, n * 4096, &[n as u8; 4096]).unwrap();
    }
    let read = |bytes| match service.read(&service.end_now(), ByteLen::new(bytes)) {
        Read::Changes(entries) => entries,
        other => panic!("{other:?}"),
    };
    let first = read(1);
    assert_eq!(first.len(), 1);
    service.stored(&service.end_now().at(Sequence::new(1)));
    assert_eq!(read(u64::MAX).len(), 9);
    service.reclaim("the store failed");
    assert_eq!(service.waiting().mode, Mode::Data);
    assert_eq!(service.dirty_blocks(), 10);
    let again = take_all(&service);
    let numbers: Vec<_> = again
        .iter()
        .map(|it| it.extent.offset().get() / 4096)
        .collect();
    assert_eq!(numbers, (1..10).collect::<Vec<_>>());

    // Where the store did not get the moment that the stream goes on from, that is of no use.
    service.give_up("for the test");
    let (_, moments) = Service::moment(&[&service]).unwrap();
    assert!(matches!(moments[0], Moment::Blocks(_)));
    write(&mut lane, 0, &[1; 4096]).unwrap();
    service.reclaim("the store failed");
    assert_eq!(service.waiting().mode, Mode::Bitmap);
    let (_, moments) = Service::moment(&[&service]).unwrap();
    let Moment::Blocks(blocks) = &moments[0] else {
        panic!("in data mode")
    };
    assert_eq!(
        blocks.next_run(BlockNumber::new(0), 100).unwrap().count(),
        10
    );
    service.end_moment();
}

/// What a time means stays clear when the clock is set back; where it was wrong by hours it
/// counts again once it is right.
#[test]
fn what_is_recorded_is_not_older_than_what_the_store_has() {
    let disk = Loop::new(16 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let (service, _) = Service::start(&spec(&disk, folder.path(), 64 * MIB)).unwrap();
    climb(&service);
    let mut lane = service.lane(8).unwrap();
    let mut recorded = || {
        write(&mut lane, 0, &[1; 4096]).unwrap();
        take_all(&service)[0].time
    };
    let in_minutes = |minutes: i64| {
        let ahead = minutes * 60 * 1_000_000_000;
        Timestamp::from_nanos(Timestamp::now().as_nanos() + ahead)
    };
    let wrong = in_minutes(120);
    service.goes_on_from(wrong);
    assert!(recorded() < wrong);
    let newest = in_minutes(30);
    service.goes_on_from(newest);
    assert_eq!(recorded(), newest);
}

#[test]
fn what_was_discarded_is_undefined_after_a_loss_of_power_but_where_it_was_being_written() {
    let disk = Loop::new(64 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(&disk, folder.path(), MIB);
    let log = folder.path().join("activity");
    let discard = |service: &Service, at: u64| {
        let mut lane = service.lane(8).unwrap();
        let extent = extent(at, 8192);
        one(&mut lane, Request::Discard { extent }).result.unwrap();
    };
    let (service, _) = Service::start(&spec).unwrap();
    discard(&service, 20 * MIB);
    drop(service);
    let (service, _) = Service::start(&spec).unwrap();
    discard(&service, 4096);
    let active = std::fs::read(&log).unwrap();
    drop(service);
    std::fs::write(&log, active).unwrap();
    reboot::happened(folder.path());
    let (service, resumed) = Service::start(&spec).unwrap();
    let Resumed::AfterRestart { compared, .. } = resumed else {
        panic!("{resumed:?}");
    };
    assert_eq!(compared.get(), 4 * MIB);
    let is_undefined = |at: u64| service.is_undefined(BlockNumber::new(at / 4096));
    assert!(is_undefined(20 * MIB) && is_undefined(20 * MIB + 4096));
    assert!(!is_undefined(4096) && !is_undefined(8192));
    // Somebody else may have written there.
    service.forget_undefined();
    assert!(!is_undefined(20 * MIB));
}
