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
    runner::run_on_the_bench(&[("ext4_on_a_virtio_disk", ext4_on_a_virtio_disk)])
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
