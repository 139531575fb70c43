//! The agent is killed with SIGKILL, again and again, at random moments, while fio writes
//! and verifies: tracking goes on in the kernel, so nothing is lost and nothing has to be
//! compared. `REPLICA_KILLS` says how often.

use std::time::Duration;

use crate::stage::{
    Daemon, Fio, LoopDevice, MIB, Place, Volume, assert_restores, number, replica, run,
};

const SIZE: u64 = 128 * MIB;

/// A random time up to `most`.
fn moment(most: Duration) -> Duration {
    let bytes = std::fs::read("/proc/sys/kernel/random/uuid").unwrap();
    let text = String::from_utf8_lossy(&bytes[..8]).into_owned();
    let fraction = f64::from(u32::from_str_radix(&text, 16).unwrap()) / f64::from(u32::MAX);
    most.mul_f64(fraction)
}

#[test]
fn killed_under_load_nothing_is_lost() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", SIZE);
    let mut daemon = Daemon::start(&place);
    let mut fio = Fio::start(&place, disk.path(), SIZE, 8);
    let options = ["--every", "1s"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    for kill in 1..=number("REPLICA_KILLS", 3) {
        let wait = moment(Duration::from_millis(2500));
        println!("kill {kill} after {wait:?}");
        std::thread::sleep(wait);
        daemon.kill();
        // Writes that no agent sees.
        std::thread::sleep(moment(Duration::from_millis(500)));
        daemon.start_again();
        daemon.until("it replicates", "v", |status| {
            status["state"] == "replicating"
        });
        daemon.assert_no_resync("v");
        fio.assert_running();
    }
    fio.stop();
    let last = daemon.point("v", &["--timeout", "60s"]);
    assert_restores(&place, &store, "v", &last, disk.path());
    daemon.assert_no_resync("v");
    replica(&["store", "check", store.to_str().unwrap()]).ok();
    daemon.replica(&["verify", "v"]).ok();
}

#[test]
fn stopped_for_an_upgrade_nothing_is_lost() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mut daemon = Daemon::start(&place);
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &[],
    });
    assert!(daemon.terminate().success());
    let output = format!("of={}", disk.path().display());
    run(
        "dd",
        [
            "if=/dev/urandom",
            &output,
            "bs=1M",
            "count=5",
            "seek=11",
            "oflag=direct",
        ],
    );
    daemon.start_again();
    let point = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &point, disk.path());
    daemon.assert_no_resync("v");
}
