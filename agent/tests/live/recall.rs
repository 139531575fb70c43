//! What a daemon knows of its volumes after it was stopped, cut short, or found its state
//! folder damaged; and that a failure shows and heals however long the interval is.

use std::fs;
use std::path::Path;

use crate::stage::{Daemon, LoopDevice, MIB, Mount, Place, Volume, assert_restores, write_random};

fn pins(id: &str) -> std::path::PathBuf {
    Path::new("/sys/fs/bpf/replica").join(id)
}

#[test]
fn status_remembers_over_a_restart() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1h"],
    });
    daemon.replica(&["resync", "v", "--wait"]).ok();
    let refused = daemon.replica(&["point", "v", "--consistency", "application"]);
    refused.fails(1, &[]);
    let before = daemon.status("v");
    assert!(!before["last_resync"].is_null(), "{before}");
    assert!(!before["last_error"].is_null(), "{before}");
    daemon.terminate();
    daemon.start_again();
    // A start makes a point of what waited meanwhile, so only that one may be newer.
    let after = daemon.status("v");
    for known in ["last_resync", "last_error"] {
        assert_eq!(after[known], before[known], "{known}");
    }
    for counter in ["resyncs", "points_failed", "freeze_ms_max"] {
        assert_eq!(
            after["counters"][counter], before["counters"][counter],
            "{counter}"
        );
    }
}

#[test]
fn damaged_settings_are_shown_and_can_be_given_up() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    let volume = Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &[],
    };
    let id = daemon.protect(&volume);
    daemon.terminate();
    let settings = daemon.state().join("volumes").join(&id).join("volume.json");
    fs::write(&settings, b"{ \"name\": \"v").unwrap();
    daemon.start_again();
    let status = daemon.status(&id);
    assert_eq!(status["state"], "degraded", "{status}");
    assert_eq!(status["last_error"]["kind"], "damaged", "{status}");
    let cause = status["state_cause"].as_str().unwrap();
    assert!(cause.contains(settings.to_str().unwrap()), "{cause}");
    assert!(pins(&id).exists(), "tracking goes on until it is given up");
    daemon.replica(&["unprotect", &id]).ok();
    assert!(!pins(&id).exists());
    let all = daemon.replica(&["status", "--json"]).json();
    assert_eq!(all["volumes"], serde_json::json!([]));
}

#[test]
fn tracking_of_a_volume_that_nobody_knows_is_removed() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    let id = daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &[],
    });
    daemon.kill();
    // As a `protect` leaves it that is killed before the settings are written.
    fs::remove_dir_all(daemon.state().join("volumes").join(&id)).unwrap();
    assert!(pins(&id).exists());
    daemon.start_again();
    assert!(!pins(&id).exists());
}

#[test]
fn a_failure_shows_and_heals_however_long_the_interval_is() {
    let place = Place::new();
    let memory = Mount::memory(&place.at("memory"), 24 * MIB);
    let store = memory.at("store");
    fs::create_dir(&store).unwrap();
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mut daemon = Daemon::start(&place);
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1h"],
    });
    write_random(disk.path(), 0, 40);
    daemon
        .replica(&["point", "v", "--timeout", "20s"])
        .fails(1, &["store"]);
    let status = daemon.status("v");
    assert_eq!(status["state"], "degraded", "{status}");
    assert!(
        status["dirty_bytes"].as_u64().unwrap() >= 40 * MIB,
        "{status}"
    );
    assert!(status["lag_seconds"].as_f64().unwrap() > 0.0, "{status}");
    memory.remount("size=200m");
    daemon.until("it recovers", "v", |status| {
        status["state"] == "replicating" && status["dirty_bytes"] == 0
    });
    assert_restores(&place, &store, "v", "latest", disk.path());
    daemon.assert_no_resync("v");
}

#[test]
fn waiting_for_what_cannot_come_ends() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1h"],
    });
    daemon.replica(&["pause", "v"]).ok();
    daemon
        .replica(&["resync", "v", "--wait"])
        .fails(1, &["paused", "replica resume"]);
    daemon.replica(&["resume", "v"]).ok();
    // A sector that only the resync's own point can bring.
    write_random(disk.path(), 0, 1);
    daemon.until("it is compared", "v", |status| {
        status["state"] == "replicating" && !status["last_resync"].is_null()
    });
    write_random(disk.path(), 0, 2);
    daemon.replica(&["resync", "v", "--wait"]).ok();
    assert_restores(&place, &store, "v", "latest", disk.path());
}
