//! Several volumes: in one daemon, in one store, and in one group with common points.

use std::fs;

use crate::stage::{
    Bank, Daemon, LoopDevice, MIB, Mount, Place, Volume, assert_restores, replica, write_random,
};

#[test]
fn each_has_its_own_writes() {
    let place = Place::new();
    let store = place.folder("store");
    let disks = ["a", "b", "c"].map(|name| LoopDevice::new(&place, name, 16 * MIB));
    let mut daemon = Daemon::start(&place);
    for (disk, name) in disks.iter().zip(["a", "b", "c"]) {
        let options = ["--every", "1h"];
        daemon.protect(&Volume {
            device: disk.path(),
            store: &store,
            name,
            options: &options,
        });
    }
    fs::write(disks[1].path(), b"only the second").unwrap();
    nix::unistd::sync();
    let seen = |name| daemon.status(name)["dirty_bytes"].as_u64().unwrap();
    assert_eq!((seen("a"), seen("c")), (0, 0));
    assert!(seen("b") > 0);
    for (disk, name) in disks.iter().zip(["a", "b", "c"]) {
        let point = daemon.point(name, &[]);
        assert_restores(&place, &store, name, &point, disk.path());
    }
    let all = replica(&["points", "--store", store.to_str().unwrap(), "--json"]).json();
    assert_eq!(all["volumes"].as_array().unwrap().len(), 3);
    replica(&["store", "check", store.to_str().unwrap()]).ok();
}

#[test]
fn a_group_has_a_point_of_all_or_none() {
    let place = Place::new();
    let memory = Mount::memory(&place.at("memory"), 24 * MIB);
    let stores = [place.folder("store"), memory.at("store")];
    fs::create_dir(&stores[1]).unwrap();
    let disks = ["data", "log"].map(|name| LoopDevice::new(&place, name, 64 * MIB));
    let mut daemon = Daemon::start(&place);
    for ((disk, name), store) in disks.iter().zip(["data", "log"]).zip(&stores) {
        let options = ["--every", "1h", "--group", "database"];
        daemon.protect(&Volume {
            device: disk.path(),
            store,
            name,
            options: &options,
        });
    }
    daemon.point("data", &["--label", "both"]);
    for disk in &disks {
        write_random(disk.path(), 0, 40);
    }
    let asked = ["point", "data", "--label", "half", "--timeout", "20s"];
    daemon.replica(&asked).fails(1, &[]);
    let labels = |name: &str| {
        let points = daemon.replica(&["points", name, "--json"]).json();
        let points = points["points"].as_array().unwrap().clone();
        let label = |point: &serde_json::Value| point["label"].as_str().unwrap().to_owned();
        points.iter().map(label).collect::<Vec<_>>()
    };
    for name in ["data", "log"] {
        let labels = labels(name);
        assert!(labels.contains(&"both".to_owned()), "{name}: {labels:?}");
        assert!(!labels.contains(&"half".to_owned()), "{name}: {labels:?}");
    }

    memory.remount("size=300m");
    for name in ["data", "log"] {
        daemon.until("it recovers", name, |status| {
            status["state"] == "replicating"
        });
    }
    daemon.point("log", &["--label", "again", "--timeout", "60s"]);
    for (disk, (name, store)) in disks.iter().zip(["data", "log"].iter().zip(&stores)) {
        assert!(labels(name).contains(&"again".to_owned()));
        assert_restores(&place, store, name, "latest", disk.path());
    }
}

#[test]
fn a_group_has_common_points() {
    let place = Place::new();
    let store = place.folder("store");
    let disks = ["data", "log"].map(|name| LoopDevice::new(&place, name, 100 * MIB));
    let mounts = [0, 1].map(|i| {
        Mount::make(
            "ext4",
            disks[i].path(),
            &place.at(["mnt-data", "mnt-log"][i]),
        )
    });
    let mut daemon = Daemon::start(&place);
    for (disk, name) in disks.iter().zip(["data", "log"]) {
        let options = ["--every", "1h", "--group", "database"];
        daemon.protect(&Volume {
            device: disk.path(),
            store: &store,
            name,
            options: &options,
        });
    }
    let bank = Bank::open(mounts[0].path());
    let point = daemon.point("data", &["--label", "common"]);
    bank.close();
    let groups = ["data", "log"].map(|name| {
        let points = daemon.replica(&["points", name, "--json"]).json();
        let points = points["points"].as_array().unwrap().clone();
        let common = points.into_iter().find(|point| point["label"] == "common");
        common.unwrap_or_else(|| panic!("{name} has no point of the group"))
    });
    assert_eq!(groups[0]["id"], *point);
    assert!(groups[0]["group"].is_string());
    assert_eq!(groups[0]["group"], groups[1]["group"]);
}
