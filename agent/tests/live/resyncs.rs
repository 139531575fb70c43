//! When tracking is lost, source and image are compared by checksums, only what differs is
//! shipped, the points before it stay, and status says why it was done. Verify compares and
//! ships nothing.

use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};

use crate::stage::{
    Daemon, Fio, LoopDevice, MIB, Place, Volume, assert_restores, restore, run, write_random,
};

#[test]
fn lost_pins_are_noticed_and_healed() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 128 * MIB);
    write_random(disk.path(), 0, 100);
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1h"];
    let volume = Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    };
    let id = daemon.protect(&volume);
    let before = daemon.point("v", &[]);
    let image = place.at("before.img");
    fs::rename(restore(&place, &store, "v", &before), &image).unwrap();
    daemon.kill();
    fs::remove_dir_all(Path::new("/sys/fs/bpf/replica").join(&id)).unwrap();
    write_random(disk.path(), 50, 2);
    daemon.start_again();

    let status = daemon.until("it is compared", "v", |status| {
        status["state"] == "replicating" && !status["last_resync"].is_null()
    });
    let resync = &status["last_resync"];
    assert!(!resync["cause"].as_str().unwrap().is_empty(), "{status}");
    assert_eq!(status["counters"]["resyncs"], 1, "{status}");
    // Only what differs is shipped.
    let bytes = resync["bytes"].as_u64().unwrap();
    assert!((2 * MIB..4 * MIB).contains(&bytes), "{bytes} bytes shipped");
    let after = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &after, disk.path());
    let again = restore(&place, &store, "v", &before);
    assert!(
        fs::read(again).unwrap() == fs::read(image).unwrap(),
        "the point before it stays"
    );
}

#[test]
fn asked_for_under_load() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1h"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    let fio = Fio::start(&place, disk.path(), 64 * MIB, 8);
    daemon.replica(&["resync", "v", "--wait"]).ok();
    assert!(!daemon.status("v")["last_resync"].is_null());
    let verified = daemon.replica(&["verify", "v"]);
    verified.ok();
    fio.stop();
    let point = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &point, disk.path());
}

#[test]
fn verify_tells_when_the_image_differs() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 32 * MIB);
    write_random(disk.path(), 0, 32);
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1h"];
    let volume = Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    };
    let id = daemon.protect(&volume);
    daemon.replica(&["verify", "v"]).ok();

    // A write to the file under the device, which no tracepoint sees.
    let file = OpenOptions::new().write(true).open(disk.file()).unwrap();
    file.write_all_at(b"not through the device", 9 * MIB + 100)
        .unwrap();
    run("blockdev", ["--flushbufs", disk.path().to_str().unwrap()]);
    let verified = daemon.replica(&["verify", "v", "--json"]);
    assert_eq!(verified.code, 3, "{}{}", verified.stdout, verified.stderr);
    serde_json::from_str::<serde_json::Value>(&verified.stdout).unwrap();
    daemon.replica(&["resync", "v", "--wait"]).ok();
    daemon.replica(&["verify", "v"]).ok();
    let point = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &point, disk.path());
    drop(id);
}

/// Thousands of blocks that really differ are looked at again together, not one by one.
#[test]
fn verify_of_an_image_that_differs_everywhere_ends() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 128 * MIB);
    write_random(disk.path(), 0, 128);
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1h", "--block-size", "4096"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    // Past every tracepoint, as above: every other block, and a run of blocks.
    let file = OpenOptions::new().write(true).open(disk.file()).unwrap();
    let alone = (0..128 * MIB).step_by(8192);
    let together = (64 * MIB..72 * MIB).step_by(4096);
    let differing: HashSet<u64> = alone.chain(together).collect();
    for at in &differing {
        file.write_all_at(b"past the device", *at).unwrap();
    }
    run("blockdev", ["--flushbufs", disk.path().to_str().unwrap()]);
    let begun = Instant::now();
    let verified = daemon.replica(&["verify", "v", "--json"]);
    let took = begun.elapsed();
    assert_eq!(verified.code, 3, "{}{}", verified.stdout, verified.stderr);
    let report: serde_json::Value = serde_json::from_str(&verified.stdout).unwrap();
    assert_eq!(report["bytes_differing"], 4096 * differing.len());
    assert_eq!(report["bytes_in_motion"], 0);
    assert_eq!(report["differing"].as_array().unwrap().len(), 1000);
    // One by one they took a quarter of an hour.
    assert!(took < Duration::from_secs(60), "{took:?}");
}

/// SIGTERM is heeded while blocks that differ are looked at again.
#[test]
fn verify_ends_when_the_agent_is_told_to() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 2048 * MIB);
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1h", "--block-size", "4096"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    // In each slice something differs, and is waited for.
    let file = OpenOptions::new().write(true).open(disk.file()).unwrap();
    for at in (0..2048 * MIB).step_by(256 << 10) {
        file.write_all_at(b"past the device", at).unwrap();
    }
    run("blockdev", ["--flushbufs", disk.path().to_str().unwrap()]);
    let verified = std::thread::scope(|scope| {
        let verify = scope.spawn(|| daemon.replica(&["verify", "v"]));
        std::thread::sleep(Duration::from_millis(300));
        kill(daemon.pid(), Signal::SIGTERM).unwrap();
        verify.join().unwrap()
    });
    let status = daemon.terminate();
    assert!(status.success(), "{status}");
    assert_eq!(verified.code, 1, "{}{}", verified.stdout, verified.stderr);
}

/// The store is put back to what it was before an epoch that it had acknowledged.
fn put_back(capture: &str, write: impl Fn(&str, &Path, u64)) {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1h", "--capture", capture];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    let address = daemon.status("v")["address"]
        .as_str()
        .unwrap_or("")
        .to_owned();
    write(&address, disk.path(), 1);
    let kept = daemon.point("v", &[]);
    daemon.terminate();
    let (old, away) = (place.at("old"), place.at("away"));
    run("cp", ["-a", store.to_str().unwrap(), old.to_str().unwrap()]);
    daemon.start_again();
    write(&address, disk.path(), 2);
    daemon.point("v", &[]);
    daemon.terminate();
    fs::rename(&store, &away).unwrap();
    fs::rename(&old, &store).unwrap();
    daemon.start_again();
    let status = daemon.until("it is compared", "v", |status| {
        status["state"] == "replicating" && !status["last_resync"].is_null()
    });
    let cause = status["last_resync"]["cause"].as_str().unwrap();
    assert!(cause.contains("an older copy"), "{cause}");
    write(&address, disk.path(), 3);
    let point = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &point, disk.path());
    restore(&place, &store, "v", &kept);
}

#[test]
fn a_store_that_was_put_back_is_noticed() {
    put_back("ebpf", |_, disk, at| write_random(disk, at, 1));
    put_back("nbd", |uri, _, at| {
        crate::inline::qemu_io(uri, &[&format!("write -P {at} {at}M 1M")]);
    });
}

/// The same while the daemon runs, and somebody asks for a point before its thread has looked.
#[test]
fn a_store_that_was_put_back_gives_no_false_point() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mut daemon = Daemon::start(&place);
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1h", "--capture", "nbd"],
    });
    let uri = daemon.status("v")["address"].as_str().unwrap().to_owned();
    let write = |at: u64| crate::inline::qemu_io(&uri, &[&format!("write -P {at} {at}M 1M")]);
    let (old, away) = (place.at("old"), place.at("away"));
    run("cp", ["-a", store.to_str().unwrap(), old.to_str().unwrap()]);
    write(1);
    daemon.point("v", &[]);
    fs::rename(&store, &away).unwrap();
    write(2);
    daemon
        .replica(&["point", "v", "--timeout", "3s"])
        .fails(1, &[]);
    fs::rename(&old, &store).unwrap();
    // Refused, or of what the device holds.
    let point = next_point(&daemon);
    assert_restores(&place, &store, "v", &point, disk.path());
    let status = daemon.status("v");
    assert_eq!(status["counters"]["resyncs"], 1, "{status}");
}

fn next_point(daemon: &Daemon) -> String {
    crate::stage::until(
        "there is a point",
        std::time::Duration::from_secs(60),
        || {
            let reply = daemon.replica(&["point", "v", "--timeout", "10s"]);
            (reply.code == 0).then(|| reply.ok().to_owned())
        },
    )
}
