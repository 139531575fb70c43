//! Inline capture: the device's users go through the agent's NBD server, and every write is
//! recorded with its data, in order.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::reboot;
use crate::stage::{Daemon, LoopDevice, MIB, Mount, Place, replica};

/// Carries out qemu-io's commands on an export.
#[track_caller]
pub fn qemu_io(uri: &str, commands: &[&str]) {
    let mut io = Command::new("qemu-io");
    io.args(["-f", "raw", "-t", "none"]);
    for command in commands {
        io.args(["-c", command]);
    }
    let output = io.arg(uri).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{commands:?}: {said}{errors}");
    assert!(!said.contains("failed"), "{commands:?}: {said}");
}

/// Protects `disk` as volume `v` behind an NBD server; the server's URI.
#[track_caller]
pub fn protect(daemon: &mut Daemon, disk: &LoopDevice, store: &Path, options: &[&str]) -> String {
    protect_as("v", daemon, disk, store, options)
}

/// The same of a volume of any name.
#[track_caller]
pub fn protect_as(
    name: &str,
    daemon: &Daemon,
    disk: &LoopDevice,
    store: &Path,
    options: &[&str],
) -> String {
    let device = disk.path().to_str().unwrap();
    let store = store.to_str().unwrap();
    let mut args = vec!["protect", device, "--to", store, "--name", name];
    args.extend(["--capture", "nbd", "--wait"]);
    args.extend(options);
    let reply = daemon.replica(&args);
    let uri = reply.ok().to_owned();
    assert_eq!(uri.lines().count(), 1, "{uri}");
    assert!(uri.starts_with("nbd+unix://"), "{uri}");
    uri
}

pub fn restore(store: &Path, point: &str, to: &Path) -> Vec<u8> {
    let (store, output) = (store.to_str().unwrap(), to.to_str().unwrap());
    let args = ["restore", "v", "--store", store, "--point", point];
    replica(&[&args[..], &["--output", output, "--force"]].concat()).ok();
    fs::read(to).unwrap()
}

#[track_caller]
fn assert_filled(image: &[u8], range: std::ops::Range<u64>, byte: u8) {
    let bytes = &image[range.start as usize..range.end as usize];
    let other = bytes.iter().position(|b| *b != byte);
    assert_eq!(other, None, "{range:?} is not all {byte}");
}

#[test]
fn every_moment_of_a_served_device_comes_back() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mut daemon = Daemon::start(&place);
    let uri = protect(&mut daemon, &disk, &store, &["--every", "1h"]);
    let status = daemon.status("v");
    assert_eq!(status["capture"], "nbd");
    assert_eq!(status["mode"], "data", "{status}");
    assert_eq!(status["address"], uri.as_str());

    qemu_io(&uri, &["write -P 1 0 1M", "write -P 1 4M 512", "flush"]);
    let between = time();
    std::thread::sleep(std::time::Duration::from_millis(20));
    qemu_io(
        &uri,
        &["write -P 2 0 64k", "write -z 512k 64k", "discard 768k 64k"],
    );
    let point = daemon.replica(&["point", "v"]).ok().to_owned();
    qemu_io(&uri, &["write -P 3 0 4k"]);
    let points = daemon.replica(&["points", "v", "--json"]).json();
    let newest = points["points"].as_array().unwrap().last().unwrap().clone();
    assert_eq!(newest["id"], point.as_str());
    assert_eq!(newest["consistency"], "crash");
    let windows = points["windows"].as_array().unwrap();
    assert_eq!(windows.len(), 1, "{points}");

    let output = place.at("restored.img");
    let image = restore(&store, &point, &output);
    assert_filled(&image, 0..65536, 2);
    assert_filled(&image, 512 << 10..576 << 10, 0);
    assert_filled(&image, 768 << 10..832 << 10, 0);
    assert_filled(&image, 832 << 10..1 << 20, 1);
    let image = restore(&store, &between, &output);
    assert_filled(&image, 0..1 << 20, 1);
    assert_filled(&image, 4 << 20..(4 << 20) + 512, 1);
    assert_filled(&image, (4 << 20) + 512..64 << 20, 0);

    daemon.replica(&["point", "v"]).ok();
    daemon.replica(&["verify", "v"]).ok();
    let image = restore(&store, "latest", &output);
    assert_filled(&image, 0..4096, 3);
    daemon.replica(&["unprotect", "v"]).ok();
    let path = uri.split_once("socket=").unwrap().1;
    assert!(!Path::new(path).exists(), "the socket is left behind");
    // Nobody holds the device any more.
    assert!(fs::File::options().write(true).open(disk.path()).is_ok());
}

/// A time behind the last write that has reached the store means the state after it, not the
/// recovery point before it; and `restore` says so.
#[test]
fn a_time_behind_the_last_write_means_the_state_after_it() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mut daemon = Daemon::start(&place);
    let uri = protect(&mut daemon, &disk, &store, &["--every", "1h"]);
    qemu_io(&uri, &["write -P 1 0 64k"]);
    let point = daemon.replica(&["point", "v"]).ok().to_owned();
    let behind_the_point = time();
    qemu_io(&uri, &["write -P 2 0 4k"]);
    // Told to end, the agent ships what it has; no point comes of it.
    daemon.terminate();
    let behind_all = time();
    let listed = ["points", "v", "--store", store.to_str().unwrap(), "--json"];
    let listed = replica(&listed).json();
    let newest = listed["points"].as_array().unwrap().last().unwrap();
    assert_eq!(newest["id"], point.as_str());
    let window = listed["windows"].as_array().unwrap().last().unwrap();
    let (to, moment) = (&window["to"], window["to_moment"].as_str().unwrap());
    assert!(to.as_str().unwrap() < behind_all.as_str(), "{listed}");

    let output = place.at("restored.img");
    for (asked, said, byte) in [
        (&behind_the_point, format!("point {point} of "), 1),
        (&behind_all, format!("moment {moment} of "), 2),
    ] {
        let args = ["restore", "v", "--store", store.to_str().unwrap()];
        let to = ["--point", asked, "--output", output.to_str().unwrap()];
        let reply = replica(&[&args[..], &to, &["--force", "--json"]].concat());
        assert_eq!(reply.code, 0, "{}", reply.stderr);
        assert!(reply.stderr.contains(&said), "{said}: {}", reply.stderr);
        assert_filled(&fs::read(&output).unwrap(), 0..4096, byte);
    }
}

/// The map of a context as nbdinfo reads it: the stretches that changed, in bytes.
#[track_caller]
fn changed(uri: &str, point: &str) -> Vec<(u64, u64)> {
    let context = format!("--map=qemu:dirty-bitmap:since-{point}");
    let output = Command::new("nbdinfo")
        .args(["--json", &context, uri])
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let map: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let dirty = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|part| part["type"] == 1);
    dirty
        .map(|part| {
            (
                part["offset"].as_u64().unwrap(),
                part["length"].as_u64().unwrap(),
            )
        })
        .collect()
}

#[test]
fn what_changed_since_a_point_is_read_over_nbd() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mut daemon = Daemon::start(&place);
    let uri = protect(&mut daemon, &disk, &store, &["--every", "1h"]);
    let first = daemon.status("v")["last_point"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(changed(&uri, &first), []);
    qemu_io(&uri, &["write -P 1 1M 64k"]);
    let second = daemon.replica(&["point", "v"]).ok().to_owned();
    // Shipped, and not yet shipped.
    qemu_io(&uri, &["write -P 2 32M 512", "write -P 2 1M 4k"]);
    assert_eq!(changed(&uri, &first), [(1 << 20, 65536), (32 << 20, 4096)]);
    assert_eq!(changed(&uri, &second), [(1 << 20, 4096), (32 << 20, 4096)]);
    let third = daemon.replica(&["point", "v"]).ok().to_owned();
    assert_eq!(changed(&uri, &second), [(1 << 20, 4096), (32 << 20, 4096)]);
    assert_eq!(changed(&uri, &third), []);
    let output = Command::new("nbdinfo")
        .args(["--json", &uri])
        .output()
        .unwrap();
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let contexts = info["exports"][0]["contexts"].as_array().unwrap();
    assert_eq!(contexts.len(), 4, "{info}");
    // Nobody knows while a resync is owed.
    daemon.replica(&["pause", "v"]).ok();
    daemon.replica(&["resync", "v"]).ok();
    assert_eq!(changed(&uri, &third), [(0, 64 << 20)]);
    daemon.replica(&["resume", "v"]).ok();
    daemon.until("it is compared", "v", |status| {
        status["state"] == "replicating" && status["counters"]["resyncs"] == 1
    });
    assert_eq!(changed(&uri, &third), []);
}

fn time() -> String {
    let output = Command::new("date")
        .args(["-u", "+%Y-%m-%dT%H:%M:%S.%NZ"])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn killed_it_serves_again_and_nothing_is_lost() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mut daemon = Daemon::start(&place);
    let uri = protect(&mut daemon, &disk, &store, &["--every", "1h"]);
    for round in 1..4_u8 {
        let write = format!("write -P {round} {round}M 1M");
        qemu_io(&uri, &[&write, "write -P 9 40M 100k"]);
        daemon.kill();
        daemon.start_again();
        let status = daemon.until("it replicates again", "v", |status| {
            status["state"] == "replicating" && status["dirty_bytes"] == 0
        });
        assert_eq!(status["counters"]["resyncs"], 0, "{status}");
        assert_eq!(status["address"], uri.as_str());
        daemon.replica(&["verify", "v"]).ok();
    }
    // What was in memory is known by its blocks only: the windows have gaps.
    qemu_io(&uri, &["write -P 7 50M 4k"]);
    daemon.replica(&["point", "v"]).ok();
    let windows = daemon.replica(&["points", "v", "--json"]).json();
    assert!(
        windows["windows"].as_array().unwrap().len() <= 4,
        "{windows}"
    );
    let image = restore(&store, "latest", &place.at("restored.img"));
    assert!(image == fs::read(disk.file()).unwrap());
}

/// What the agent has kept looks as if the machine had been restarted since.
fn restart_the_machine(daemon: &Daemon) {
    let volumes = daemon.state().join("volumes");
    let volume = fs::read_dir(volumes).unwrap().next().unwrap().unwrap();
    reboot::happened(&volume.path());
}

/// It is no other disk for what is known to have changed on it.
#[test]
fn a_disk_that_was_written_all_over_is_the_same_disk_after_a_restart() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    fs::write(disk.file(), vec![1; 16 << 20]).unwrap();
    let mut daemon = Daemon::start(&place);
    let uri = protect(&mut daemon, &disk, &store, &["--every", "1h"]);
    daemon.replica(&["pause", "v"]).ok();
    qemu_io(&uri, &["write -P 2 1M 15M"]);
    daemon.terminate();
    restart_the_machine(&daemon);
    daemon.start_again();
    daemon.replica(&["resume", "v"]).ok();
    daemon.until("it goes on", "v", |status| status["state"] == "replicating");
    daemon.replica(&["point", "v"]).ok();
    let image = restore(&store, "latest", &place.at("restored.img"));
    assert!(image == fs::read(disk.file()).unwrap());
}

#[test]
fn a_mounted_device_is_refused() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let daemon = Daemon::start(&place);
    let mount = Mount::make("ext4", disk.path(), &place.folder("mnt"));
    let device = disk.path().to_str().unwrap();
    let args = [
        "protect",
        device,
        "--to",
        store.to_str().unwrap(),
        "--capture",
        "nbd",
    ];
    daemon.replica(&args).fails(1, &["unmount it", device]);
    assert_eq!(
        daemon.replica(&["status", "--json"]).json()["volumes"],
        serde_json::json!([])
    );
    drop(mount);
}

// Opened points are read and written by the same programs.
