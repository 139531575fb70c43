//! A group of which one member cannot take part: paused, compared anew, or its device gone.
//! The others go on shipping, say why there is no point, and have common points again as
//! soon as there can be one. And each keeps its own points by its own policy.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::inline::{protect_as, qemu_io};
use crate::stage::{
    Daemon, LoopDevice, MIB, Mount, Place, Volume, assert_restores, replica, write_random,
};

/// Protects `disks` as `a` and `b` in one group, each with its own interval.
fn group(daemon: &mut Daemon, place: &Place, disks: [&LoopDevice; 2], every: [&str; 2]) {
    for ((name, disk), every) in ["a", "b"].into_iter().zip(disks).zip(every) {
        daemon.protect(&Volume {
            device: disk.path(),
            store: &place.folder(name),
            name,
            options: &["--group", "g", "--every", every, "--retain", "#3"],
        });
    }
}

fn number_of_points(daemon: &Daemon, name: &str) -> usize {
    let points = daemon.replica(&["points", name, "--json"]).json();
    points["points"].as_array().unwrap().len()
}

/// Whether all is shipped and `words` say why there is no point.
fn ships_without_points(status: &Value, words: &[&str]) -> bool {
    let says = |text: &Value| {
        let text = text.as_str().unwrap_or_default();
        words.iter().all(|word| text.contains(word))
    };
    status["state"] == "replicating"
        && status["dirty_bytes"] == 0
        && says(&status["state_cause"])
        && says(&status["last_error"]["message"])
        && status["counters"]["points_failed"].as_u64() > Some(0)
}

fn is_well(status: &Value) -> bool {
    status["state"] == "replicating" && status["state_cause"].is_null()
}

#[test]
fn each_member_keeps_points_by_its_own_policy() {
    let place = Place::new();
    let disks = ["a.img", "b.img"].map(|name| LoopDevice::new(&place, name, 16 * MIB));
    let mut daemon = Daemon::start(&place);
    group(&mut daemon, &place, [&disks[0], &disks[1]], ["1s", "1h"]);
    daemon.until("the first makes the points", "b", |status| {
        status["counters"]["points_made"].as_u64() >= Some(6)
    });
    for name in ["a", "b"] {
        daemon.until("expired points are dropped", name, |_| {
            number_of_points(&daemon, name) <= 3
        });
    }
}

#[test]
fn one_that_is_paused() {
    let place = Place::new();
    let disks = ["a.img", "b.img"].map(|name| LoopDevice::new(&place, name, 16 * MIB));
    let mut daemon = Daemon::start(&place);
    group(&mut daemon, &place, [&disks[0], &disks[1]], ["1s", "1h"]);
    daemon.replica(&["pause", "b"]).ok();
    let before = daemon.status("a");
    for disk in &disks {
        write_random(disk.path(), 0, 2);
    }
    daemon.until("the first ships without it", "a", |status| {
        status["epoch"].as_u64() > before["epoch"].as_u64()
            && ships_without_points(status, &["b is paused", "resume"])
    });
    let paused = daemon.status("b");
    assert_eq!(paused["state"], "paused", "{paused}");
    assert!(
        paused["dirty_bytes"].as_u64().unwrap() >= 2 * MIB,
        "{paused}"
    );
    assert_eq!(paused["counters"]["points_failed"], 0, "{paused}");
    let asked = daemon.replica(&["point", "a"]);
    asked.fails(1, &["b is paused"]);

    daemon.replica(&["resume", "b"]).ok();
    for (name, disk) in ["a", "b"].iter().zip(&disks) {
        daemon.until("they have common points again", name, is_well);
        let store = place.at(name);
        assert_restores(&place, &store, name, "latest", disk.path());
    }
}

#[test]
fn resuming_one_makes_the_groups_point_at_once() {
    let place = Place::new();
    let disks = ["a.img", "b.img"].map(|name| LoopDevice::new(&place, name, 16 * MIB));
    let mut daemon = Daemon::start(&place);
    group(&mut daemon, &place, [&disks[0], &disks[1]], ["1h", "1h"]);
    daemon.replica(&["pause", "b"]).ok();
    write_random(disks[0].path(), 0, 2);
    daemon
        .replica(&["point", "a"])
        .fails(1, &["b is paused", "resume"]);
    let status = daemon.status("a");
    assert!(ships_without_points(&status, &["b is paused"]), "{status}");
    let made = status["counters"]["points_made"].as_u64();
    daemon.replica(&["resume", "b"]).ok();
    for name in ["a", "b"] {
        daemon.until("a point of both", name, |status| {
            is_well(status) && status["counters"]["points_made"].as_u64() > made.min(Some(1))
        });
    }
    let groups = ["a", "b"].map(|name| daemon.status(name)["last_point"]["group"].clone());
    assert!(groups[0].is_string());
    assert_eq!(groups[0], groups[1]);
}

#[test]
fn one_whose_device_is_gone() {
    let place = Place::new();
    let mut gone = LoopDevice::of_its_own(&place, "b.img", 16 * MIB);
    let stays = LoopDevice::new(&place, "a.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    group(&mut daemon, &place, [&stays, &gone], ["1s", "1s"]);
    gone.detach();
    daemon.until("it is seen to be gone", "b", |status| {
        status["state"] == "degraded"
    });
    let before = daemon.status("a");
    write_random(stays.path(), 0, 2);
    daemon.until("the other ships without it", "a", |status| {
        assert_ne!(status["state"], "degraded", "{status}");
        status["epoch"].as_u64() > before["epoch"].as_u64()
            && ships_without_points(status, &["the group: b is degraded", gone.name()])
    });
    gone.attach_again();
    for (name, disk) in [("a", &stays), ("b", &gone)] {
        daemon.until("they have common points again", name, is_well);
        assert_restores(&place, &place.at(name), name, "latest", disk.path());
    }
}

#[test]
fn one_that_is_being_compared() {
    let place = Place::new();
    let disks = ["a.img", "b.img"].map(|name| LoopDevice::new(&place, name, 16 * MIB));
    let mut daemon = Daemon::start(&place);
    group(&mut daemon, &place, [&disks[0], &disks[1]], ["1s", "1h"]);
    // Without its store the comparison cannot end.
    fs::rename(place.at("b"), place.at("away")).unwrap();
    daemon.replica(&["resync", "b"]).ok();
    for command in ["point", "verify"] {
        daemon.replica(&[command, "b"]).fails(3, &["resync"]);
    }
    let before = daemon.status("a");
    write_random(disks[0].path(), 0, 2);
    let status = daemon.until("the other ships without it", "a", |status| {
        status["epoch"].as_u64() > before["epoch"].as_u64()
            && ships_without_points(status, &["b is being resynced"])
    });
    // At its interval, not as fast as it can.
    std::thread::sleep(std::time::Duration::from_secs(2));
    let failed = |status: &Value| status["counters"]["points_failed"].as_u64().unwrap();
    assert!(failed(&daemon.status("a")) <= failed(&status) + 4);
    daemon.replica(&["point", "a"]).fails(3, &["b is being"]);
    fs::rename(place.at("away"), place.at("b")).unwrap();
    for name in ["a", "b"] {
        daemon.until("they have common points again", name, is_well);
    }
}

#[test]
fn one_whose_store_is_full() {
    let place = Place::new();
    let memory = Mount::memory(&place.at("b"), 24 * MIB);
    let disks = ["a.img", "b.img"].map(|name| LoopDevice::new(&place, name, 64 * MIB));
    let mut daemon = Daemon::start(&place);
    group(&mut daemon, &place, [&disks[0], &disks[1]], ["1h", "1h"]);
    for disk in &disks {
        write_random(disk.path(), 0, 40);
    }
    daemon.replica(&["point", "a"]).fails(1, &["b"]);
    let status = daemon.status("a");
    assert!(
        ships_without_points(&status, &["the group: b failed", "No space left"]),
        "{status}"
    );
    assert_eq!(daemon.status("b")["state"], "degraded");
    memory.remount("size=200m");
    for (name, disk) in ["a", "b"].iter().zip(&disks) {
        daemon.until("they have common points again", name, is_well);
        assert_restores(&place, &place.at(name), name, "latest", disk.path());
    }
}

/// The points that a volume has, by what tells those of one group's moment.
fn groups_points(daemon: &Daemon, name: &str) -> HashMap<String, String> {
    let points = daemon.replica(&["points", name, "--json"]).json();
    let points = points["points"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    points
        .filter(|point| point["group"].is_string())
        .map(|point| (text(&point["time"]), text(&point["id"])))
        .collect()
}

/// The first byte of volume `name` at a point.
fn first_byte(store: &Path, name: &str, point: &str, to: &Path) -> u8 {
    let (store, output) = (store.to_str().unwrap(), to.to_str().unwrap());
    let args = ["restore", name, "--store", store, "--point", point];
    replica(&[&args[..], &["--output", output, "--force"]].concat()).ok();
    fs::read(to).unwrap()[0]
}

/// A moment of one volume is an end in its stream, of the other the blocks that changed while
/// its stream was given up; it is the same moment.
#[test]
fn one_in_a_gap_of_its_stream() {
    let place = Place::new();
    fs::write(place.at("agent.toml"), "buffer = \"4MiB\"\n").unwrap();
    let full = Mount::memory(&place.at("full"), 8 * MIB);
    fs::write(full.at("filler"), vec![1; 8 << 20]).unwrap();
    let disks = ["a.img", "b.img"].map(|name| LoopDevice::new(&place, name, 64 * MIB));
    let daemon = Daemon::start(&place);
    let stores = ["a", "b"].map(|name| place.folder(name));
    let spool = full.path().to_str().unwrap();
    let options = ["--group", "g", "--every", "1h", "--spool", spool];
    let uris = [0, 1].map(|n| {
        let name = ["a", "b"][n];
        protect_as(name, &daemon, &disks[n], &stores[n], &options)
    });
    for name in ["a", "b"] {
        daemon.until("it records data", name, |status| status["mode"] == "data");
    }
    daemon.replica(&["pause", "b"]).ok();
    let commands: Vec<String> = (1..32).map(|n| format!("write -q -P 7 {n}M 1M")).collect();
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    qemu_io(&uris[1], &commands);
    assert_ne!(daemon.status("b")["mode"], "data");
    assert_eq!(daemon.status("a")["mode"], "data");

    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Always in the first before it is in the second.
        scope.spawn(|| {
            for n in 1..250 {
                let write = format!("write -q -P {n} 0 4k");
                uris.iter().for_each(|uri| qemu_io(uri, &[&write]));
                if stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        std::thread::sleep(std::time::Duration::from_millis(200));
        daemon.replica(&["resume", "b"]).ok();
        daemon.until("b has climbed", "b", |status| {
            status["mode"] == "data" && is_well(status)
        });
        daemon.point("a", &[]);
        stop.store(true, Ordering::Relaxed);
    });
    daemon.point("a", &[]);
    let [a, b] = ["a", "b"].map(|name| groups_points(&daemon, name));
    let mut common = 0;
    for (time, id) in &a {
        let Some(other) = b.get(time) else { continue };
        common += 1;
        let restored = place.at("restored.img");
        let a = first_byte(&stores[0], "a", id, &restored);
        let b = first_byte(&stores[1], "b", other, &restored);
        assert!(b <= a && a <= b + 1, "{a} beside {b} at {time}");
    }
    assert!(common >= 3, "{a:?} {b:?}");
    for (name, disk) in ["a", "b"].into_iter().zip(&disks) {
        let latest = daemon.point(name, &[]);
        let store = place.at(name);
        assert_restores(&place, &store, name, &latest, disk.path());
    }
}
