//! Somebody uses the disk behind the agent's back: mounts it by its UUID, or writes to it,
//! while the agent does not serve it.

use std::path::Path;
use std::time::Duration;

use super::served::{Direct, Served};
use super::stage::{Daemon, LoopDevice, MIB, Mount, Place, assert_restores, run, until};

/// Mounted, it is refused by name, and nothing is touched; free, it is served again, and what
/// was written meanwhile is found.
pub fn a_disk_that_somebody_mounts_is_served_when_it_is_free_and_compared() {
    for capture in ["nbd", "ublk"] {
        let place = Place::new();
        let store = place.folder("store");
        let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
        let mut daemon = Daemon::start(&place);
        let served = Served::protect(&daemon, disk.path(), &store, capture);
        let mount = Mount::make("ext4", served.path(), &place.at("mnt"));
        std::fs::write(mount.at("ours"), vec![1; 100_000]).unwrap();
        mount.unmount();
        daemon.point("v", &[]);
        let source = match &served {
            // As a boot does it. blkid reads every disk, and a ublk device without its server
            // lets it wait.
            Served::Nbd(_) => format!("UUID={}", uuid(disk.path())),
            Served::Node(_) => disk.path().to_str().unwrap().to_owned(),
        };
        // A client of NBD has to come again.
        drop(served);
        assert!(daemon.terminate().success());
        let behind = Mount::new(Path::new(&source), &place.at("behind"), "defaults");
        daemon.start_again();
        let status = daemon.until("it is refused", "v", |status| {
            let cause = status["state_cause"].as_str().unwrap_or_default();
            cause.contains("it is mounted on") && cause.contains("behind")
        });
        assert_eq!(status["state"], "degraded", "{status}");
        std::fs::write(behind.at("theirs"), vec![2; 200_000]).unwrap();
        behind.unmount();
        let status = daemon.until("it is served again", "v", |status| {
            status["state"] == "replicating" && !status["last_resync"].is_null()
        });
        assert_eq!(status["counters"]["resyncs"], 1, "{status}");
        let cause = status["last_resync"]["cause"].as_str().unwrap();
        assert!(cause.contains("written to by somebody else"), "{cause}");
        assert!(status["last_resync"]["bytes"].as_u64().unwrap() >= 200_000);
        let point = daemon.point("v", &[]);
        daemon.unprotect("v");
        drop(daemon);
        assert_restores(&place, &store, "v", &point, disk.path());
    }
}

fn uuid(disk: &Path) -> String {
    let asked = ["-p", "-s", "UUID", "-o", "value", disk.to_str().unwrap()];
    run("blkid", asked).trim().to_owned()
}

/// Its device is removed, too, if it cannot be served any more: not while it is mounted.
pub fn a_volume_whose_disk_is_gone_can_be_given_up() {
    let place = Place::new();
    let store = place.folder("store");
    let mut disk = LoopDevice::of_its_own(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    let served = Served::protect(&daemon, disk.path(), &store, "ublk");
    let node = served.path().to_owned();
    let mount = Mount::make("ext4", &node, &place.at("mnt"));
    daemon.kill();
    disk.detach();
    daemon.start_again();
    daemon.until("it is not served", "v", |status| {
        status["state"] == "degraded"
    });
    let refused = daemon.replica(&["unprotect", "v"]);
    refused.fails(1, &["uses it", "nobody serves it"]);
    assert!(node.exists());
    // What it has to write ends with errors when the device goes.
    let path = mount.path().to_owned();
    let mut unmount = std::process::Command::new("umount")
        .arg("--lazy")
        .arg(&path)
        .spawn()
        .unwrap();
    until("it is not mounted", Duration::from_secs(20), || {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        (!mounts.contains(path.to_str().unwrap())).then_some(())
    });
    daemon.unprotect("v");
    assert!(!node.exists());
    assert!(unmount.wait().unwrap().success());
}

/// After an orderly end, and after a kill; and only then.
pub fn what_somebody_writes_while_nobody_serves_is_noticed() {
    let place = Place::new();
    let store = place.folder("store");
    let mut disk = LoopDevice::of_its_own(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    let served = Served::protect(&daemon, disk.path(), &store, "ublk");
    let node = served.path().to_owned();
    let load = |fill: u8| {
        let device = Direct::open(&node);
        for n in 0..50 {
            device.write(fill, n * 37 % 1000 * 4096, 12288).unwrap();
        }
        device.sync().unwrap();
        drop(device);
        let node = node.to_str().unwrap();
        run("blkdiscard", ["-o", "8388608", "-l", "2097152", node]);
        // Whose ends are within blocks, and are zeroed: each counts as what it is.
        run("blkdiscard", ["-o", "6292992", "-l", "1049088", node]);
        run("blkdiscard", ["-o", "5243392", "-l", "1024", node]);
        run(
            "blkdiscard",
            ["-z", "-o", "12582912", "-l", "1048576", node],
        );
    };
    let theirs = |fill| {
        Direct::open(disk.path())
            .write(fill, 15 * MIB, 512)
            .unwrap()
    };
    let mut resyncs = 0;
    for (fill, is_killed, who) in [
        (1, false, "nobody"),
        (2, true, "nobody"),
        (3, false, "between"),
        (4, true, "between"),
        (5, false, "beside"),
    ] {
        load(fill);
        if who == "beside" {
            theirs(fill);
        }
        if is_killed {
            daemon.kill();
        } else {
            daemon.terminate();
        }
        if who == "between" {
            theirs(fill);
        }
        daemon.start_again();
        resyncs += u64::from(who != "nobody");
        assert_compared(&daemon, resyncs, "written to by somebody else");
    }
    // Another disk may have come back.
    daemon.terminate();
    disk.detach();
    disk.attach_again();
    daemon.start_again();
    assert_compared(&daemon, resyncs + 1, "gone and has come back");
    daemon.point("v", &[]);
    daemon.replica(&["verify", "v"]).ok();
    daemon.unprotect("v");
}

/// It replicates, after so many resyncs, the last one for `cause`.
#[track_caller]
fn assert_compared(daemon: &Daemon, resyncs: u64, cause: &str) {
    let status = daemon.until("it replicates", "v", |status| {
        status["state"] == "replicating" && status["mode"] == "data"
    });
    assert_eq!(
        status["counters"]["resyncs"],
        resyncs,
        "{status}\n{}",
        daemon.log_text()
    );
    if resyncs > 0 {
        let said = status["last_resync"]["cause"].as_str().unwrap();
        assert!(said.contains(cause) || cause.contains("somebody"), "{said}");
    }
}
