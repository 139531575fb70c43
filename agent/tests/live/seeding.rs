//! `protect --force` on a name that the store has: the image is gone on with, by whatever
//! state folder, if it is the device's; and what a `protect` that fails leaves behind.

use std::fs;
use std::path::{Path, PathBuf};

use crate::stage::{
    Daemon, LoopDevice, MIB, Mount, Place, Volume, assert_restores, replica, write_random,
};

/// The pins of a volume, whoever has them.
fn pins(id: &str) -> Vec<PathBuf> {
    let all = fs::read_dir("/sys/fs/bpf/replica").unwrap().flatten();
    let of_it = all.filter(|pin| pin.file_name().to_string_lossy().starts_with(id));
    of_it.map(|pin| pin.path()).collect()
}

fn volumes(store: &Path) -> usize {
    fs::read_dir(store.join("volumes")).map_or(0, Iterator::count)
}

#[test]
fn pins_of_another_state_folder_are_not_in_the_way() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 32 * MIB);
    write_random(disk.path(), 0, 32);
    let (folder, log) = (place.folder("first"), place.at("first.log"));
    let mut first = Daemon::start_with(&folder, &place.at("first.sock"), &log);
    let volume = Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1h"],
    };
    let id = first.protect(&volume);
    // A living owner is no reason to refuse, but holds the image.
    let mut daemon = Daemon::start(&place);
    let force = Volume {
        options: &["--every", "1h", "--force"],
        ..volume
    };
    daemon.try_protect(&force).fails(1, &[&id]);
    first.terminate();
    assert_eq!(pins(&id).len(), 1, "tracking goes on without the daemon");
    write_random(disk.path(), 4, 1);

    assert_eq!(daemon.protect(&force), id, "it goes on with the image");
    assert_eq!(pins(&id).len(), 2);
    let status = daemon.status("v");
    let bytes = status["last_resync"]["bytes"].as_u64().unwrap();
    assert!(
        (MIB..2 * MIB).contains(&bytes),
        "only what differs: {status}"
    );
    // Both go on, and neither takes the other's.
    daemon.kill();
    write_random(disk.path(), 8, 1);
    daemon.start_again();
    let removed = daemon.replica(&["unprotect", "--stale"]);
    assert!(removed.ok().contains(&id), "{removed:?}");
    assert_eq!(pins(&id).len(), 1);
    let point = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &point, disk.path());
    assert_eq!(daemon.status("v")["counters"]["resyncs"], 1);
    daemon.unprotect("v");
    assert_eq!(pins(&id), Vec::<PathBuf>::new());
}

#[test]
fn the_image_of_another_disk() {
    let place = Place::new();
    let store = place.folder("store");
    let disks = ["first.img", "second.img"].map(|name| LoopDevice::new(&place, name, 16 * MIB));
    for disk in &disks {
        write_random(disk.path(), 0, 16);
    }
    let mut daemon = Daemon::start(&place);
    let volume = Volume {
        device: disks[0].path(),
        store: &store,
        name: "v",
        options: &["--every", "1h"],
    };
    let id = daemon.protect(&volume);
    let point = daemon.point("v", &[]);
    daemon.unprotect("v");
    let other = Volume {
        device: disks[1].path(),
        options: &["--force"],
        ..volume
    };
    let device = disks[1].path().to_str().unwrap();
    daemon
        .try_protect(&other)
        .fails(1, &[device, "another disk", "--name"]);
    assert_eq!(pins(&id), Vec::<PathBuf>::new());
    let all = daemon.replica(&["status", "--json"]).json();
    assert_eq!(all["volumes"], serde_json::json!([]));
    assert_restores(&place, &store, "v", &point, disks[0].path());
}

#[test]
fn a_failed_protect_leaves_nothing_in_the_store() {
    let place = Place::new();
    let store = place.folder("store");
    let state = Mount::memory(&place.at("memory"), MIB);
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let (socket, log) = (place.at("agent.sock"), place.at("agent.log"));
    let mut daemon = Daemon::start_with(&state.at("state"), &socket, &log);
    let filler = state.at("filler");
    fs::write(&filler, vec![1; 2 << 20]).unwrap_err();
    let volume = Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1h"],
    };
    daemon.try_protect(&volume).fails(1, &["No space left"]);
    assert_eq!(volumes(&store), 0, "{}", daemon.log_text());
    fs::remove_file(&filler).unwrap();
    // A start would find pins that were left, and say so.
    daemon.terminate();
    daemon.start_again();
    let log = daemon.log_text();
    assert!(!log.contains("tracking of no known volume"), "{log}");
    daemon.protect(&volume);
    assert_eq!(volumes(&store), 1);
    replica(&["store", "check", store.to_str().unwrap()]).ok();
}
