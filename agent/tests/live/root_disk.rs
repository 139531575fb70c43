//! A root disk: the filesystem that holds the agent's state folder, socket and log is on
//! the volume that it protects. Nothing may be written there while it is frozen, and the
//! agent's own small writes must not keep the rounds from ending.

use std::fs;
use std::time::{Duration, Instant};

use crate::stage::{
    Bank, Daemon, LoopDevice, MIB, Mount, Place, Volume, check_filesystem, restore,
};

#[test]
fn the_state_folder_is_on_the_protected_disk() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 300 * MIB);
    let mount = Mount::make("ext4", disk.path(), &place.at("mnt"));
    let state = mount.at("var-lib-replica");
    fs::create_dir(&state).unwrap();
    let mut daemon = Daemon::start_with(&state, &mount.at("agent.sock"), &mount.at("agent.log"));
    let bank = Bank::open(mount.path());
    let options = ["--every", "2s"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "root",
        options: &options,
    });

    let started = Instant::now();
    let mut points = Vec::new();
    for _ in 0..4 {
        let transactions = bank.acknowledged();
        points.push((daemon.point("root", &[]), transactions));
    }
    assert!(
        started.elapsed() < Duration::from_secs(60),
        "points took {:?}",
        started.elapsed()
    );
    let status = daemon.status("root");
    assert!(
        status["counters"]["freeze_ms_max"].as_u64().unwrap() < 2000,
        "{status}"
    );
    assert_eq!(status["counters"]["points_failed"], 0, "{status}");
    daemon.kill();
    daemon.start_again();
    daemon.assert_no_resync("root");
    let transactions = bank.acknowledged();
    points.push((daemon.point("root", &[]), transactions));
    bank.close();

    daemon.unprotect("root");
    drop(daemon);
    mount.unmount();
    drop(disk);
    for (point, transactions) in points {
        let image = restore(&place, &store, "root", &point);
        check_filesystem("ext4", &image, &place, |mounted| {
            assert!(mounted.join("var-lib-replica").is_dir());
            let restored = Bank::check(mounted, &place);
            assert!(restored >= transactions, "{restored} of {transactions}");
        });
        fs::remove_file(image).unwrap();
    }
}

#[test]
fn a_store_on_the_protected_disk_is_refused() {
    let place = Place::new();
    let disk = LoopDevice::new(&place, "disk.img", 100 * MIB);
    let mount = Mount::make("ext4", disk.path(), &place.at("mnt"));
    let store = mount.at("store");
    fs::create_dir(&store).unwrap();
    let mut daemon = Daemon::start(&place);
    let volume = Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &[],
    };
    daemon
        .try_protect(&volume)
        .fails(1, &[store.to_str().unwrap()]);
    assert_eq!(
        daemon.replica(&["status", "--json"]).json()["volumes"],
        serde_json::json!([])
    );
    // Nothing may be left that keeps the disk from being protected elsewhere.
    let elsewhere = place.folder("elsewhere");
    daemon.protect(&Volume {
        store: &elsewhere,
        ..volume
    });
}
