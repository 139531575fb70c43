//! Filesystems under load: points are made while files come and go and a database commits.
//! Every point must pass the filesystem's checker and the database's, and hold all that
//! was synced before it; the last, made after unmounting, must be the device itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::stage::{
    Bank, Daemon, LoopDevice, MIB, Mount, Place, Volume, assert_restores, check_filesystem,
    restore, run,
};

/// What was durable when a point was asked for.
struct Synced {
    point: String,
    transactions: u64,
    files: BTreeMap<String, Vec<u8>>,
}

fn content(round: usize, file: usize) -> Vec<u8> {
    let len = 1000 + (round * 7919 + file * 104_729) % 200_000;
    let seed = (round * 31 + file * 17) as u8;
    (0..len).map(|i| seed.wrapping_add((i / 3) as u8)).collect()
}

/// Writes a round's files and removes some of the round before it.
fn churn(folder: &Path, round: usize, files: &mut BTreeMap<String, Vec<u8>>) {
    for file in 0..40 {
        let (name, data) = (format!("r{round}-{file}"), content(round, file));
        fs::write(folder.join(&name), &data).unwrap();
        files.insert(name, data);
        if let Some(before) = round.checked_sub(1).filter(|_| file % 3 == 0) {
            let name = format!("r{before}-{file}");
            fs::remove_file(folder.join(&name)).unwrap();
            files.remove(&name);
        }
    }
}

fn points_under_load(kind: &str, bytes: u64) {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", bytes);
    let mount = Mount::make(kind, disk.path(), &place.at("mnt"));
    let mut daemon = Daemon::start(&place);
    let bank = Bank::open(mount.path());
    let options = ["--every", "5s"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });

    let mut files = BTreeMap::new();
    let mut synced = Vec::new();
    for round in 0..4 {
        churn(mount.path(), round, &mut files);
        mount.sync();
        let transactions = bank.acknowledged();
        let point = daemon.point("v", &["--label", &format!("round {round}")]);
        synced.push(Synced {
            point,
            transactions,
            files: files.clone(),
        });
    }
    let total = bank.close();
    assert!(
        total > synced[0].transactions,
        "the load went on while points were made"
    );

    mount.unmount();
    let last = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &last, disk.path());
    daemon.assert_no_resync("v");

    let points = daemon.replica(&["points", "v", "--json"]).json();
    for Synced { point, .. } in &synced {
        let listed = points["points"]
            .as_array()
            .unwrap()
            .iter()
            .find(|p| p["id"] == **point);
        assert_eq!(listed.unwrap()["consistency"], "filesystem");
    }
    daemon.unprotect("v");
    drop(disk);
    if kind == "btrfs" {
        run("btrfs", ["device", "scan", "--forget"]);
    }

    for Synced {
        point,
        transactions,
        files,
    } in synced
    {
        let image = restore(&place, &store, "v", &point);
        check_filesystem(kind, &image, &place, |mounted| {
            for (name, data) in &files {
                assert!(
                    fs::read(mounted.join(name)).unwrap() == *data,
                    "{name} at {point}"
                );
            }
            let restored = Bank::check(mounted, &place);
            assert!(
                restored >= transactions,
                "{restored} of {transactions} transactions"
            );
        });
        fs::remove_file(image).unwrap();
    }
}

#[test]
fn ext4() {
    points_under_load("ext4", 400 * MIB);
}

#[test]
fn xfs() {
    points_under_load("xfs", 400 * MIB);
}

#[test]
fn btrfs() {
    points_under_load("btrfs", 400 * MIB);
}
