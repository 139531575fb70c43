//! When points are made, and when not: a freeze that fails is not repeated before the
//! interval has passed, long freezes stretch the interval, and who waits for the first point
//! is told whether there is one.

use std::fs;
use std::io::{Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::stage::{Daemon, LoopDevice, MIB, Mount, Place, Volume, assert_restores, write_random};

/// A mounted disk, and a daemon that allows a freeze next to no time.
fn with_freezes_too_long(place: &Place) -> (LoopDevice, Mount, Daemon) {
    fs::write(place.at("agent.toml"), "freeze_limit = \"1ms\"\n").unwrap();
    let disk = LoopDevice::new(place, "disk.img", 64 * MIB);
    let mount = Mount::make("ext4", disk.path(), &place.at("mnt"));
    (disk, mount, Daemon::start(place))
}

fn counter(status: &Value, name: &str) -> u64 {
    status["counters"][name].as_u64().unwrap()
}

#[test]
fn a_freeze_that_fails_waits_for_the_interval() {
    let place = Place::new();
    let store = place.folder("store");
    let (disk, mount, mut daemon) = with_freezes_too_long(&place);
    let volume = Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1h", "--wait"],
    };
    // Copied, and no first point: who waits for it is told.
    let waited = daemon.try_protect(&volume);
    waited.fails(1, &["freeze the filesystems"]);
    let before = daemon.status("v");
    assert_eq!(before["state"], "replicating", "{before}");
    assert!(counter(&before, "points_failed") >= 3, "{before}");
    // Writers were blocked all the same, and it is said how long.
    assert!(counter(&before, "freeze_ms_max") >= 1, "{before}");
    std::thread::sleep(Duration::from_secs(7));
    let after = daemon.status("v");
    assert!(
        counter(&after, "points_failed") <= counter(&before, "points_failed") + 1,
        "{after}"
    );
    // The operator's is tried at once.
    daemon.replica(&["point", "v"]).fails(1, &["freeze"]);
    daemon.unprotect("v");
    mount.unmount();
}

#[test]
fn long_freezes_stretch_the_interval() {
    let place = Place::new();
    let store = place.folder("store");
    let (disk, mount, mut daemon) = with_freezes_too_long(&place);
    daemon
        .try_protect(&Volume {
            device: disk.path(),
            store: &store,
            name: "v",
            options: &["--every", "1s"],
        })
        .ok();
    let says = |status: &Value| {
        let cause = status["state_cause"].as_str().unwrap_or_default();
        cause.contains("16 times less often") && cause.contains("of at most 1 ms")
    };
    let slow = daemon.until("it makes them less often", "v", says);
    let failed = counter(&slow, "points_failed");
    std::thread::sleep(Duration::from_secs(5));
    let later = daemon.status("v");
    assert!(counter(&later, "points_failed") <= failed + 1, "{later}");
    daemon.replica(&["point", "v"]);
    let asked = daemon.status("v");
    assert!(says(&asked), "the operator's point is no news: {asked}");

    // With nothing left to freeze nobody is blocked, and there is nothing to spare.
    mount.unmount();
    let made = counter(&asked, "points_made");
    daemon.point("v", &[]);
    let status = daemon.until("they come as often as asked", "v", |status| {
        counter(status, "points_made") >= made + 3
    });
    assert!(status["state_cause"].is_null(), "{status}");
}

#[test]
fn who_waits_learns_that_no_point_can_be_made() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mount = Mount::make("ext4", disk.path(), &place.at("mnt"));
    mount.freeze();
    let mut daemon = Daemon::start(&place);
    let at = mount.path().to_str().unwrap();
    daemon
        .try_protect(&Volume {
            device: disk.path(),
            store: &store,
            name: "v",
            options: &["--every", "1h", "--wait"],
        })
        .fails(1, &["frozen by somebody else", at]);
    daemon
        .replica(&["resync", "v", "--wait"])
        .fails(1, &["frozen by somebody else", at]);
    assert!(mount.thaw());
    daemon.replica(&["resync", "v", "--wait"]).ok();
    assert!(daemon.status("v")["last_point"].is_object());
    daemon.unprotect("v");
    mount.unmount();
}

/// Writes to a raw device without a pause.
struct Restless {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Restless {
    fn start(device: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..8).map(|number: u64| {
            let (device, stop) = (PathBuf::from(device), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut options = fs::OpenOptions::new();
                let mut file = options
                    .write(true)
                    .custom_flags(nix::libc::O_DSYNC)
                    .open(device)
                    .unwrap();
                let mut round = number;
                while !stop.load(Ordering::Relaxed) {
                    round += 8;
                    let at = round % 256 * 65536;
                    file.seek(std::io::SeekFrom::Start(at)).unwrap();
                    file.write_all(&[round.to_le_bytes()[0]; 65536]).unwrap();
                }
            })
        });
        let threads = threads.collect();
        Self { stop, threads }
    }
}

impl Drop for Restless {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[test]
fn a_raw_device_without_a_quiet_moment() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 32 * MIB);
    let load = Restless::start(disk.path());
    let mut daemon = Daemon::start(&place);
    let waited = daemon.try_protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1h", "--wait"],
    });
    waited.ok();
    for word in ["warning", "no recovery point", "no moment without writes"] {
        assert!(waited.stderr.contains(word), "{word}: {}", waited.stderr);
    }
    let again = daemon.replica(&["resync", "v", "--wait"]);
    again.ok();
    assert!(again.stderr.contains("no recovery point"), "{again:?}");
    drop(load);
    let point = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &point, disk.path());
    let status = daemon.status("v");
    assert!(status["state_cause"].is_null(), "{status}");
}

#[test]
fn a_store_that_stays_full_does_not_repeat_freezes() {
    let place = Place::new();
    let memory = Mount::memory(&place.at("memory"), 24 * MIB);
    let store = memory.at("store");
    fs::create_dir(&store).unwrap();
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mount = Mount::make("ext4", disk.path(), &place.at("mnt"));
    let mut daemon = Daemon::start(&place);
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1s"],
    });
    write_random(&mount.at("file"), 0, 40);
    daemon.until("it is degraded", "v", |status| {
        status["state"] == "degraded"
    });
    let failed = counter(&daemon.status("v"), "points_failed");
    std::thread::sleep(Duration::from_secs(4));
    // It is shipping that is tried again; the freeze comes when that has worked.
    let status = daemon.status("v");
    assert_eq!(counter(&status, "points_failed"), failed, "{status}");
    memory.remount("size=200m");
    daemon.until("it recovers", "v", |status| {
        status["state"] == "replicating" && status["state_cause"].is_null()
    });
    mount.unmount();
    daemon.point("v", &[]);
    assert_restores(&place, &store, "v", "latest", disk.path());
}
