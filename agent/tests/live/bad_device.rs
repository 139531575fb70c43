//! Bad luck with the device: it vanishes, comes back as another, grows, or fails to read.
//! No panic, no hang; the state says what it is, and the points before it stay.

use std::fs::OpenOptions;

use crate::stage::{
    Daemon, LoopDevice, MIB, Place, Volume, assert_restores, replica, restore, run, write_random,
};

/// A protected disk with a point.
fn protected(place: &Place, every: &str) -> (LoopDevice, Daemon, String) {
    let disk = LoopDevice::of_its_own(place, "disk.img", 64 * MIB);
    write_random(disk.path(), 0, 8);
    let mut daemon = Daemon::start(place);
    let store = place.folder("store");
    let options = ["--every", every];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    write_random(disk.path(), 4, 8);
    let point = daemon.point("v", &[]);
    (disk, daemon, point)
}

#[test]
fn a_device_that_vanishes_and_comes_back_as_another() {
    let place = Place::new();
    let (mut disk, mut daemon, point) = protected(&place, "1s");
    daemon.terminate();
    disk.detach();
    daemon.start_again();
    let status = daemon.until("it is seen to be gone", "v", |status| {
        status["state"] == "degraded" && status["last_error"]["kind"] == "vanished"
    });
    assert!(
        status["last_error"]["message"]
            .as_str()
            .unwrap()
            .contains(disk.name()),
        "{status}"
    );
    daemon
        .replica(&["point", "v", "--timeout", "3s"])
        .fails(1, &[disk.name()]);
    restore(&place, &place.at("store"), "v", &point);

    // The same file under the same name is a new disk: it may have been written elsewhere.
    write_random(disk.file(), 30, 1);
    disk.attach_again();
    let status = daemon.until("it is compared", "v", |status| {
        status["state"] == "replicating" && !status["last_resync"].is_null()
    });
    assert!(
        !status["last_resync"]["cause"].as_str().unwrap().is_empty(),
        "{status}"
    );
    let after = daemon.point("v", &[]);
    assert_restores(&place, &place.at("store"), "v", &after, disk.path());
    restore(&place, &place.at("store"), "v", &point);
}

#[test]
fn a_device_that_is_pulled_under_the_agent() {
    let place = Place::new();
    let (mut disk, daemon, point) = protected(&place, "1s");
    disk.detach();
    daemon.until("it is seen to be gone", "v", |status| {
        status["state"] == "degraded"
    });
    restore(&place, &place.at("store"), "v", &point);
    daemon.unprotect("v");
}

#[test]
fn a_device_that_grows() {
    let place = Place::new();
    let (disk, daemon, point) = protected(&place, "1s");
    disk.resize(96 * MIB);
    write_random(disk.path(), 50, 4);
    let store = place.at("store");
    let status = daemon.until("it is seen", "v", |status| {
        status["state"] == "degraded" && status["last_error"]["kind"] == "resized"
    });
    let message = status["last_error"]["message"].as_str().unwrap();
    for word in [disk.name(), "100663296", "67108864", "unprotect"] {
        assert!(message.contains(word), "{word}: {message}");
    }
    daemon
        .replica(&["point", "v", "--timeout", "3s"])
        .fails(1, &[disk.name()]);
    restore(&place, &store, "v", &point);

    // Given its size back it goes on, with what was written meanwhile, and no resync.
    disk.resize(64 * MIB);
    daemon.until("it goes on", "v", |status| status["state"] == "replicating");
    let after = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &after, disk.path());
    daemon.assert_no_resync("v");
}

#[test]
fn a_device_that_fails_to_read() {
    let place = Place::new();
    let (disk, daemon, _) = protected(&place, "1h");
    // Past the end of its file a loop device fails to read.
    write_random(disk.path(), 40, 4);
    OpenOptions::new()
        .write(true)
        .open(disk.file())
        .unwrap()
        .set_len(32 * MIB)
        .unwrap();
    daemon
        .replica(&["point", "v", "--timeout", "10s"])
        .fails(1, &[disk.name(), "Input/output error"]);
    let status = daemon.status("v");
    assert_eq!(status["last_error"]["kind"], "io", "{status}");

    OpenOptions::new()
        .write(true)
        .open(disk.file())
        .unwrap()
        .set_len(64 * MIB)
        .unwrap();
    run("blockdev", ["--flushbufs", disk.path().to_str().unwrap()]);
    let point = daemon.point("v", &["--timeout", "60s"]);
    let image = restore(&place, &place.at("store"), "v", &point);
    // What the cut took is zeroes now, in no write that anybody saw below byte 40 MiB.
    drop(image);
    replica(&["store", "check", place.at("store").to_str().unwrap()]).ok();
}
