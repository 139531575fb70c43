//! `--force` overwrites what is there, and never what is protected or mounted: whichever
//! way to its bytes is named, and whether or not its daemon runs.

use std::fs;
use std::path::Path;

use crate::stage::{Daemon, LoopDevice, MIB, Mount, Place, Reply, Volume, replica, write_random};

fn restore(store: &Path, to: &Path, socket: &Path) -> Reply {
    replica(&[
        "restore",
        "v",
        "--point",
        "latest",
        "--output",
        to.to_str().unwrap(),
        "--store",
        store.to_str().unwrap(),
        "--force",
        "--socket",
        socket.to_str().unwrap(),
    ])
}

#[test]
fn a_protected_device_by_any_way_to_it() {
    let place = Place::new();
    let store = place.folder("store");
    let small = LoopDevice::new(&place, "small.img", 4 * MIB);
    let disk = LoopDevice::new(&place, "disk.img", 32 * MIB);
    write_random(disk.path(), 0, 32);
    let partition = disk.add_partition(1, 2048, 8 * MIB / 512);
    let mut daemon = Daemon::start(&place);
    for (device, name) in [(&small, "v"), (&disk, "disk")] {
        daemon.protect(&Volume {
            device: device.path(),
            store: &store,
            name,
            options: &["--every", "1h"],
        });
    }
    let over = LoopDevice::over(disk.path(), &[]);
    let second = LoopDevice::over(disk.file(), &[]);
    let link = place.at("link.img");
    fs::hard_link(disk.file(), &link).unwrap();
    let before = fs::read(disk.file()).unwrap();
    let refused = |daemon: &Daemon| {
        let socket = daemon.socket();
        for to in [disk.path(), &partition, over.path(), second.path()] {
            restore(&store, to, socket).fails(1, &[to.to_str().unwrap(), "protected"]);
        }
        for file in [disk.file(), &link] {
            restore(&store, file, socket).fails(1, &[file.to_str().unwrap()]);
        }
        assert!(
            fs::read(disk.file()).unwrap() == before,
            "it was overwritten"
        );
    };
    refused(&daemon);
    // Tracking goes on without the daemon; so does what it stands for.
    daemon.terminate();
    refused(&daemon);
    daemon.start_again();
    daemon.unprotect("disk");
    restore(&store, &partition, daemon.socket()).ok();
}

#[test]
fn a_mounted_device_by_another_way_to_it() {
    let place = Place::new();
    let store = place.folder("store");
    let small = LoopDevice::new(&place, "small.img", 4 * MIB);
    let mut daemon = Daemon::start(&place);
    daemon.protect(&Volume {
        device: small.path(),
        store: &store,
        name: "v",
        options: &["--every", "1h"],
    });
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mount = Mount::make("ext4", disk.path(), &place.at("mounted"));
    let second = LoopDevice::over(disk.file(), &[]);
    let at = mount.path().to_str().unwrap();
    restore(&store, second.path(), daemon.socket()).fails(1, &[at]);
    restore(&store, disk.path(), daemon.socket()).fails(1, &["mounted"]);
    // A file on it is a file like others.
    restore(&store, &mount.at("out.img"), daemon.socket()).ok();
}
