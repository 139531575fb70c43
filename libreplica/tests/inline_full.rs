//! What capture keeps on a file system that has no room left: a capture that finds too
//! little says so and leaves nothing behind, and one that has begun goes on. A missing block
//! would not be an error here, but the end of the test by SIGBUS.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod devices;
mod lanes;

use std::fs::File;
use std::io::Write;

use devices::small::Small;
use devices::{Loop, extent, run};
use lanes::*;
use libreplica::ErrorKind;
use libreplica::capture::inline::{Durability, Request, Resumed, Room, Service};

/// So large that each bitmap has many pages.
const VOLUME: u64 = 16 << 30;

#[test]
fn too_little_room_is_an_error_and_leaves_nothing_behind() {
    let disk = Loop::new(VOLUME);
    for small in [Small::tmpfs(MIB), Small::ext4(8 * MIB)] {
        // All but a few blocks, where that is not so already.
        let ballast = small.path().join("most");
        let free = run(
            "stat",
            &["-f", "-c", "%a %S", small.path().to_str().unwrap()],
        );
        let mut free = free.split(' ').map(|n| n.parse::<u64>().unwrap());
        let free = free.next().unwrap() * free.next().unwrap();
        if free > MIB {
            let mut file = File::create(&ballast).unwrap();
            file.write_all(&vec![7; (free - MIB) as usize]).unwrap();
            file.sync_all().unwrap();
        }
        let error = Service::start(&spec(&disk, small.path(), MIB)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Full, "{error}");
        assert!(error.to_string().contains("dirty"), "{error}");
        let left = ["dirty", "activity", "traffic"];
        assert!(left.iter().all(|name| !small.path().join(name).exists()));
    }
}

#[test]
fn what_has_begun_goes_on_when_the_file_system_is_full() {
    let disk = Loop::new(VOLUME);
    for small in [Small::tmpfs(16 * MIB), Small::ext4(16 * MIB)] {
        let spec = spec(&disk, small.path(), MIB);
        let (service, resumed) = Service::start(&spec).unwrap();
        assert_eq!(resumed, Resumed::Begun);
        small.fill();
        // Every page of every bitmap.
        service.mark(extent(0, VOLUME));
        let mut lane = service.lane(8).unwrap();
        write(&mut lane, 5 << 30, &[1; 8192]).unwrap();
        let (_, moments) = Service::moment(&[&service]).unwrap();
        drop(moments);
        service.give_up("for the test");
        service.mark(extent(0, VOLUME));
        let discard = Request::Discard {
            extent: extent(0, VOLUME),
        };
        one(&mut lane, discard).result.unwrap();
        assert_eq!(service.dirty_blocks(), VOLUME / 4096);
        drop(lane);
        drop(service);
        let (service, resumed) = Service::start(&spec).unwrap();
        assert_eq!(resumed, Resumed::Unbroken);
        assert_eq!(service.dirty_blocks(), VOLUME / 4096);
    }
}

#[test]
fn a_ledger_with_holes_is_refused_when_they_cannot_be_filled() {
    let disk = Loop::new(VOLUME);
    let small = Small::ext4(16 * MIB);
    let spec = spec(&disk, small.path(), MIB);
    drop(Service::start(&spec).unwrap());
    let ledger = small.path().join("dirty");
    let holes = ["--punch-hole", "--offset", "65536", "--length", "1048576"];
    let arguments = [&holes[..], &[ledger.to_str().unwrap()]].concat();
    run("fallocate", &arguments);
    small.fill();
    let error = Service::start(&spec).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    small.empty();
    let (_, resumed) = Service::start(&spec).unwrap();
    assert_eq!(resumed, Resumed::Unbroken);
}

/// What fails may be the flush that goes with it, and that of others.
#[test]
fn a_durable_change_that_fails_leaves_what_was_being_written_in_doubt() {
    let at = extent(32 * MIB, 4096);
    let durability = Durability::Durable;
    let changes = [
        Request::Write {
            from: part(&[2; 4096]),
            extent: at,
            durability,
        },
        Request::Zeroes {
            extent: at,
            room: Room::Kept,
            durability,
        },
    ];
    for change in changes {
        let small = Small::tmpfs(4 * MIB);
        let disk = Loop::inside(small.path(), 64 * MIB);
        let folder = tempfile::tempdir().unwrap();
        let (service, _) = Service::start(&spec(&disk, folder.path(), MIB)).unwrap();
        climb(&service);
        let mut lane = service.lane(8).unwrap();
        write(&mut lane, 0, &[1; 4096]).unwrap();
        assert_eq!(service.dirty_blocks(), 1);
        small.fill();
        assert!(one(&mut lane, change).result.is_err());
        // All of the region that was being written.
        assert!(service.dirty_blocks() > 1024);
    }
}
