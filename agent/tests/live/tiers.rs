//! Retention by tiers on a live volume: points are thinned out while others are made, by a daemon
//! that is killed now and then, and each that is left is what the disk was, byte for byte. And
//! a store that runs full: first what has expired makes room; then the volume waits, says who
//! holds the room, and goes on by itself when it is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::stage::{
    Daemon, LoopDevice, MIB, Mount, Place, Volume, assert_restores, replica, until, write_random,
};

/// The points of `v`, oldest first: id, and when they were, in milliseconds since 1970.
fn points(daemon: &Daemon) -> Vec<(String, u64)> {
    let listing = daemon.replica(&["points", "v", "--json"]).json();
    let points = listing["points"].as_array().unwrap().iter();
    points
        .map(|point| {
            let id = point["id"].as_str().unwrap().to_owned();
            let time = time_of(&id);
            (id, time)
        })
        .collect()
}

/// A point's id begins with its time.
fn time_of(id: &str) -> u64 {
    u64::from_str_radix(&id[..12], 16).unwrap()
}

fn copy_of(place: &Place, disk: &LoopDevice, name: &str) -> PathBuf {
    let copy = place.at(name);
    let mut device = File::open(disk.path()).unwrap();
    std::io::copy(&mut device, &mut File::create(&copy).unwrap()).unwrap();
    copy
}

#[test]
fn points_are_thinned_out_and_each_that_is_left_restores() {
    const ALL: u64 = 4_000;
    const INTERVAL: u64 = 3_000;
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 8 * MIB);
    write_random(disk.path(), 0, 8);
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1h", "--retain", "4s, 3s:60s"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    assert_eq!(daemon.status("v")["retain"], "all:4s,3s:1m");
    let mut copies = BTreeMap::new();
    for round in 0..24 {
        let began = Instant::now();
        write_random(disk.path(), round % 7, 2);
        let id = daemon.point("v", &[]);
        let copy = copy_of(&place, &disk, &format!("{id}.copy"));
        copies.insert(id, copy);
        if round % 8 == 5 {
            daemon.kill();
            daemon.start_again();
        }
        std::thread::sleep(Duration::from_millis(700).saturating_sub(began.elapsed()));
    }
    // Those that are past four seconds are one of their interval, the newest aside.
    let left = until("they are thinned out", Duration::from_secs(30), || {
        let left = points(&daemon);
        let newest = left.last().unwrap().1;
        let mut intervals = BTreeSet::new();
        let old = left.iter().filter(|(_, time)| time + ALL < newest);
        let mut old = old.map(|(_, time)| time / INTERVAL);
        old.all(|interval| intervals.insert(interval))
            .then_some(left)
    });
    let status = daemon.status("v");
    assert!(status["space"]["base_bytes"].as_u64() > Some(0), "{status}");
    daemon.unprotect("v");
    // Every interval in which a point was made has one still.
    let newest = left.last().unwrap().1;
    let covered: BTreeSet<u64> = left.iter().map(|(_, time)| time / INTERVAL).collect();
    for id in copies.keys() {
        let time = time_of(id);
        let is_covered = covered.contains(&(time / INTERVAL));
        assert!(is_covered || time + 55_000 < newest, "{id}: {left:?}");
    }
    let known = left.iter().filter(|(id, _)| copies.contains_key(id));
    // A daemon that was started again makes one of its own.
    assert!(known.clone().count() * 2 >= left.len(), "{left:?}");
    for (id, _) in known {
        assert_restores(&place, &store, "v", id, &copies[id]);
    }
    replica(&["store", "check", store.to_str().unwrap()]).ok();
}

/// Somebody who holds a point, as a reader does.
struct Reader(Child);

impl Reader {
    fn of(store: &Path, volume: &str, point: &str) -> Self {
        let lease = store
            .join("volumes")
            .join(volume)
            .join("leases")
            .join(point);
        let mut command = Command::new("flock");
        command.args(["--shared", "--no-fork"]).arg(lease);
        Self(command.args(["sleep", "600"]).spawn().unwrap())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn is_full(status: &Value) -> bool {
    status["state"] == "degraded" && status["last_error"]["kind"] == "full"
}

fn is_home(status: &Value) -> bool {
    status["state"] == "replicating" && status["dirty_bytes"] == 0
}

#[test]
fn a_full_store_is_pruned_by_policy_and_names_who_holds_its_room() {
    let place = Place::new();
    let store_disk = LoopDevice::new(&place, "store.img", 64 * MIB);
    let mount = Mount::make("ext4", store_disk.path(), &place.at("mnt"));
    let store = mount.at("store");
    let disk = LoopDevice::new(&place, "disk.img", 20 * MIB);
    write_random(disk.path(), 0, 20);
    let mut daemon = Daemon::start(&place);
    let id = daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1s", "--retain", "all:8s"],
    });
    // The image, and a log; another has no room before the first point expires.
    write_random(disk.path(), 0, 20);
    daemon.until("it is shipped", "v", is_home);
    write_random(disk.path(), 0, 20);
    daemon.until("it runs full", "v", is_full);
    daemon.until("expired points make room", "v", is_home);

    let held = daemon.point("v", &["--timeout", "60s"]);
    let copy = copy_of(&place, &disk, "held.copy");
    let reader = Reader::of(&store, &id, &held);
    daemon.until("the others are folded", "v", |status| {
        let oldest = &points(&daemon)[0].0;
        *oldest == held && status["space"]["log_bytes"].as_u64() < Some(MIB)
    });
    write_random(disk.path(), 0, 20);
    daemon.until("it is shipped", "v", is_home);
    write_random(disk.path(), 0, 20);
    let full = daemon.until("it runs full again", "v", |status| {
        is_full(status) && status["state_cause"].as_str().unwrap().contains(&held)
    });
    std::thread::sleep(Duration::from_secs(9));
    let full_still = daemon.status("v");
    assert_eq!(full_still["state"], "degraded", "{full}, {full_still}");
    // What is held is whole, and listed with who holds it.
    let by = daemon.replica(&["points", "v", "--json"]).json()["space"]["held"].clone();
    assert_eq!(by[0]["point"], held, "{by}");
    assert!(by[0]["by"].as_str().unwrap().contains("(sleep)"), "{by}");
    assert_restores(&place, &store, "v", &held, &copy);
    drop(reader);
    daemon.until("there is room again", "v", is_home);
    let point = daemon.point("v", &["--timeout", "60s"]);
    assert_restores(&place, &store, "v", &point, disk.path());
    daemon.assert_no_resync("v");
    replica(&["store", "check", store.to_str().unwrap()]).ok();
    daemon.unprotect("v");
    mount.unmount();
}
