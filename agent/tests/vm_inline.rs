//! Disks that fail, that are several, that have several ways to them, and that somebody else
//! mounts: behind the agent, which serves them, each does what is promised or is refused by
//! name. On the test bench only (`scripts/vm-test`), whose kernel has such disks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(dead_code, reason = "the stories use a part of the stage")]

#[path = "inline_rig/behind.rs"]
mod behind;
#[path = "inline_rig/faults.rs"]
mod faults;
#[path = "inline_rig/kernel_nbd.rs"]
mod kernel_nbd;
#[path = "inline_rig/mapping.rs"]
mod mapping;
#[path = "../../libreplica/tests/rig/runner.rs"]
mod runner;
#[path = "inline_rig/served.rs"]
mod served;
#[path = "live/stage/mod.rs"]
#[allow(unused_imports, reason = "as above")]
mod stage;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use mapping::{Mapping, linear};
use served::{Direct, Served, arguments};
use stage::{Daemon, LoopDevice, MIB, Place, assert_restores, run, until};

fn main() -> ExitCode {
    runner::run_on_the_bench(&[
        (
            "what_a_disk_refuses_reaches_the_writer_and_no_log_by_ublk",
            || faults::what_a_disk_refuses_reaches_the_writer_and_no_log("ublk"),
        ),
        (
            "what_a_disk_refuses_reaches_the_writer_and_no_log_by_nbd",
            || faults::what_a_disk_refuses_reaches_the_writer_and_no_log("nbd"),
        ),
        (
            "a_mapping_over_two_disks_is_protected_in_each_way",
            a_mapping_over_two_disks_is_protected_in_each_way,
        ),
        (
            "a_namespace_with_two_controllers_is_protected_in_each_way",
            a_namespace_with_two_controllers_is_protected_in_each_way,
        ),
        (
            "two_disks_that_are_one_namespace_are_refused_in_each_way",
            two_disks_that_are_one_namespace_are_refused_in_each_way,
        ),
        (
            "a_disk_that_somebody_mounts_is_served_when_it_is_free_and_compared",
            behind::a_disk_that_somebody_mounts_is_served_when_it_is_free_and_compared,
        ),
        (
            "a_volume_whose_disk_is_gone_can_be_given_up",
            behind::a_volume_whose_disk_is_gone_can_be_given_up,
        ),
        (
            "what_somebody_writes_while_nobody_serves_is_noticed",
            behind::what_somebody_writes_while_nobody_serves_is_noticed,
        ),
    ])
}

const WAYS: [&str; 3] = ["ebpf", "nbd", "ublk"];

/// Protects `disk` by `capture`, lets `write` change it, and restores what it then has.
fn protect_and_restore(disk: &Path, capture: &str, write: impl FnOnce(&Direct)) {
    let place = Place::new();
    let store = place.folder("store");
    let daemon = Daemon::start(&place);
    let served = Served::protect(&daemon, disk, &store, capture);
    let device = Direct::open(served.path());
    write(&device);
    device.sync().unwrap();
    drop(device);
    let point = daemon.point("v", &[]);
    let status = daemon.status("v");
    assert_eq!(status["counters"]["resyncs"], 0, "{status}");
    drop(served);
    daemon.unprotect("v");
    drop(daemon);
    assert_restores(&place, &store, "v", &point, disk);
}

/// A write that dm cuts in two, each half for another disk.
fn a_mapping_over_two_disks_is_protected_in_each_way() {
    for capture in WAYS {
        let place = Place::new();
        let first = LoopDevice::new(&place, "first.img", 9 * MIB);
        let second = LoopDevice::new(&place, "second.img", 8 * MIB);
        let lines = [
            linear(0, 8 * MIB, first.path(), MIB),
            linear(8 * MIB, 8 * MIB, second.path(), 0),
        ];
        let mapping = Mapping::new("two-disks", &lines);
        protect_and_restore(mapping.path(), capture, |device| {
            let seam = 8 * MIB;
            device.write(1, seam - (32 << 10), 64 << 10).unwrap();
            // The kernel gives some of these up half done, for who passes them on to begin anew.
            for fill in 0..200 {
                device.write(fill, seam - 512, 1024).unwrap();
            }
            device.write(3, seam - 4 * MIB, 6 << 20).unwrap();
            device.write(4, seam - 4096, 8192).unwrap();
        });
    }
}

/// The disks of the test bench's namespace: one with multipath, two without.
fn namespace(multipath: &str) -> Vec<PathBuf> {
    let _ = Command::new("modprobe")
        .args(["-ra", "nvme", "nvme_core"])
        .status();
    run("modprobe", ["nvme_core", &format!("multipath={multipath}")]);
    run("modprobe", ["nvme"]);
    let wanted = if multipath == "Y" { 1 } else { 2 };
    until("the namespace is there", Duration::from_secs(20), || {
        let names = fs::read_dir("/sys/block").unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        // Not nvme0c0n1, which is a path and has no node.
        let disks: Vec<PathBuf> = names
            .filter(|name| name.starts_with("nvme") && !name.contains('c'))
            .map(|name| Path::new("/dev").join(name))
            .filter(|path| path.exists())
            .collect();
        let controllers = fs::read_dir("/sys/class/nvme").ok()?;
        let live = controllers.filter(|entry| {
            let state = entry.as_ref().unwrap().path().join("state");
            fs::read_to_string(state).is_ok_and(|state| state.trim() == "live")
        });
        (disks.len() == wanted && live.count() == 2).then_some(disks)
    })
}

fn a_namespace_with_two_controllers_is_protected_in_each_way() {
    let disk = namespace("Y").remove(0);
    for (n, capture) in WAYS.iter().enumerate() {
        let fill = 3 * n as u8 + 1;
        protect_and_restore(&disk, capture, |device| {
            device.write(fill, 40960, 8192).unwrap();
            for (more, controller) in ["nvme0", "nvme1"].iter().enumerate() {
                let reset = format!("/sys/class/nvme/{controller}/reset_controller");
                fs::write(reset, "1").unwrap();
                let more = more as u64 + 1;
                device
                    .write(fill + more as u8, 4 * more * MIB, 1 << 20)
                    .unwrap();
            }
        });
    }
}

/// Without the kernel's multipath a write to one is not seen on the other.
fn two_disks_that_are_one_namespace_are_refused_in_each_way() {
    let place = Place::new();
    let store = place.folder("store");
    let daemon = Daemon::start(&place);
    for disk in namespace("N") {
        for capture in WAYS {
            let reply = daemon.replica(&arguments(&disk, &store, capture));
            reply.fails(1, &[disk.to_str().unwrap(), "multipath"]);
        }
    }
    let status = daemon.replica(&["status", "--json"]).json();
    assert_eq!(status["volumes"], serde_json::json!([]));
}
