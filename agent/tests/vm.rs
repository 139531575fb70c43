//! The main job on a virtio disk, on a kernel that a distribution ships: protect a disk in
//! use, make a point, restore it, compare. On the test bench only: `scripts/vm-test` boots
//! that kernel, with an empty disk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(dead_code, reason = "the stories beside use the rest of the stage")]

#[path = "../../libreplica/tests/rig/runner.rs"]
mod runner;
#[path = "live/stage/mod.rs"]
#[allow(unused_imports, reason = "as above")]
mod stage;

use std::path::Path;
use std::process::ExitCode;

use stage::{
    Bank, Daemon, Mount, Place, Volume, assert_restores, check_filesystem, restore, write_random,
};

fn main() -> ExitCode {
    runner::run_on_the_bench(&[
        ("ext4_on_a_virtio_disk", ext4_on_a_virtio_disk),
        ("ext4_on_a_ublk_device", ext4_on_a_ublk_device),
    ])
}

/// The device's users go through the agent, which is killed under them, and stopped.
fn ext4_on_a_ublk_device() {
    let disk = Path::new("/dev/vda");
    let place = Place::new();
    let store = place.folder("store");
    stage::run("modprobe", ["ublk_drv"]);
    let mut daemon = Daemon::start(&place);
    let to = store.to_str().unwrap();
    let protect = [
        "protect",
        "/dev/vda",
        "--to",
        to,
        "--name",
        "v",
        "--capture",
        "ublk",
        "--wait",
    ];
    let device = daemon.replica(&protect).ok().to_owned();
    assert!(device.starts_with("/dev/ublkb"), "{device}");
    let mount = Mount::make("ext4", Path::new(&device), &place.at("mnt"));
    let bank = Bank::open(mount.path());
    let point = daemon.point("v", &["--consistency", "filesystem"]);
    let before = bank.acknowledged();
    daemon.kill();
    daemon.start_again();
    let after = bank.acknowledged();
    // Users waited, and go on.
    stage::until(
        "transactions go on",
        std::time::Duration::from_secs(60),
        || (bank.acknowledged() > after.max(before)).then_some(()),
    );
    daemon.until("it replicates", "v", |status| status["mode"] == "data");
    let status = daemon.status("v");
    assert_eq!(status["address"], device.as_str());
    assert_eq!(status["counters"]["resyncs"], 0, "{status}");
    daemon.replica(&["unprotect", "v"]).fails(1, &["unmount"]);
    let under_load = daemon.point("v", &["--consistency", "crash"]);
    let transactions = bank.close();
    mount.unmount();
    let at_rest = daemon.point("v", &[]);
    daemon.replica(&["verify", "v"]).ok();
    daemon.terminate();
    daemon.start_again();
    daemon.until("it replicates", "v", |status| status["mode"] == "data");
    daemon.replica(&["unprotect", "v"]).ok();
    assert!(!Path::new(&device).exists(), "{device} is left behind");
    drop(daemon);

    assert_restores(&place, &store, "v", &at_rest, disk);
    for point in [point, under_load, at_rest] {
        let image = restore(&place, &store, "v", &point);
        check_filesystem("ext4", &image, &place, |mounted| {
            assert!(Bank::check(mounted, &place) <= transactions);
        });
    }
}

fn ext4_on_a_virtio_disk() {
    let disk = Path::new("/dev/vda");
    let place = Place::new();
    let store = place.folder("store");
    let mount = Mount::make("ext4", disk, &place.at("mnt"));
    let mut daemon = Daemon::start(&place);
    daemon.protect(&Volume {
        device: disk,
        store: &store,
        name: "vda",
        options: &[],
    });
    let bank = Bank::open(mount.path());
    let transactions = bank.acknowledged();
    let under_load = daemon.point("vda", &["--consistency", "filesystem"]);
    bank.close();
    mount.unmount();
    write_random(disk, 1, 40);
    let at_rest = daemon.point("vda", &[]);
    daemon.assert_no_resync("vda");
    daemon.unprotect("vda");
    drop(daemon);

    assert_restores(&place, &store, "vda", &at_rest, disk);
    let image = restore(&place, &store, "vda", &under_load);
    check_filesystem("ext4", &image, &place, |mounted| {
        assert!(Bank::check(mounted, &place) >= transactions);
    });
}
