//! Bad luck with the store: full, read-only, gone for a while, damaged. The volume is
//! degraded and says why, tracking goes on, and when the cause is gone it recovers by
//! itself, with nothing lost.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::stage::{
    Daemon, LoopDevice, MIB, Mount, Place, Volume, assert_restores, replica, restore, write_random,
};

fn is_degraded(status: &Value) -> bool {
    status["state"] == "degraded" && !status["state_cause"].as_str().unwrap_or("").is_empty()
}

/// Protects a disk with a store in memory of 64 MiB, breaks the store by `break_it` while
/// the disk goes on, mends it, and expects everything back.
fn recovers_by_itself(break_it: impl Fn(&Mount), mend: impl Fn(&Mount), words: &[&str]) {
    let place = Place::new();
    let memory = Mount::memory(&place.at("memory"), 64 * MIB);
    let store = memory.at("store");
    fs::create_dir(&store).unwrap();
    let disk = LoopDevice::new(&place, "disk.img", 100 * MIB);
    write_random(disk.path(), 3, 4);
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1s"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    let good = daemon.point("v", &[]);

    break_it(&memory);
    write_random(disk.path(), 10, 80);
    let status = daemon.until("it is degraded", "v", is_degraded);
    let error = &status["last_error"];
    for word in words {
        assert!(
            error["message"].as_str().unwrap().contains(word),
            "{word}: {error}"
        );
    }
    daemon
        .replica(&["point", "v", "--timeout", "3s"])
        .fails(1, &[]);
    let now = [&store, &memory.at("away")]
        .into_iter()
        .find(|folder| folder.exists())
        .unwrap()
        .clone();
    restore(&place, &now, "v", &good);

    mend(&memory);
    daemon.until("it recovers", "v", |status| {
        status["state"] == "replicating"
    });
    let point = daemon.point("v", &["--timeout", "30s"]);
    assert_restores(&place, &store, "v", &point, disk.path());
    daemon.assert_no_resync("v");
    replica(&["store", "check", store.to_str().unwrap()]).ok();
}

#[test]
fn a_full_store() {
    recovers_by_itself(|_| {}, |memory| memory.remount("size=400m"), &["store"]);
}

#[test]
fn a_store_that_turns_read_only() {
    recovers_by_itself(
        |memory| memory.remount("ro"),
        |memory| memory.remount("rw,size=400m"),
        &["store"],
    );
}

#[test]
fn a_store_that_is_away_for_a_while() {
    recovers_by_itself(
        |memory| fs::rename(memory.at("store"), memory.at("away")).unwrap(),
        |memory| {
            memory.remount("size=400m");
            fs::rename(memory.at("away"), memory.at("store")).unwrap();
        },
        &["store"],
    );
}

/// The newest log below `folder`.
fn newest_log(folder: &Path) -> PathBuf {
    let mut folders = vec![folder.to_owned()];
    let mut logs = Vec::new();
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder)
            .unwrap()
            .flatten()
            .map(|entry| entry.path())
        {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ext| ext == "hrl") {
                logs.push(path);
            }
        }
    }
    logs.sort();
    logs.pop().expect("the store holds logs")
}

#[test]
fn a_damaged_store_names_the_points() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    write_random(disk.path(), 0, 8);
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1h"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    write_random(disk.path(), 4, 8);
    let good = daemon.point("v", &[]);
    write_random(disk.path(), 20, 8);
    let bad = daemon.point("v", &[]);
    daemon.unprotect("v");
    replica(&["store", "check", store.to_str().unwrap()]).ok();

    let log = newest_log(&store);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&log)
        .unwrap();
    let at = fs::metadata(&log).unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();

    let check = replica(&["store", "check", store.to_str().unwrap()]);
    let said = format!("{}{}", check.stdout, check.stderr);
    assert_eq!(check.code, 1, "{said}");
    assert!(
        said.contains(&bad) && !said.contains(&good),
        "{bad} alone: {said}"
    );
    let json = replica(&["store", "check", store.to_str().unwrap(), "--json"]);
    assert_eq!(json.code, 1);
    assert!(
        serde_json::from_str::<Value>(&json.stdout).is_ok(),
        "{}",
        json.stdout
    );

    let output = place.at("bad.img");
    let (to, from) = (output.to_str().unwrap(), store.to_str().unwrap());
    let wanted = [
        "restore", "v", "--point", &bad, "--output", to, "--store", from,
    ];
    replica(&wanted).fails(1, &[log.file_name().unwrap().to_str().unwrap()]);
    restore(&place, &store, "v", &good);
}
