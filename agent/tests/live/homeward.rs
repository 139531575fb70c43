//! The way home after a failover: to the device that the volume was on, reached through the agent
//! or mounted past it; to a blank disk; and of two disks that belong together.

use serde_json::json;

use crate::failover::{EVERY, FirstSide, OtherSide, qemu_nbd_client};
use crate::inline::{protect_as, qemu_io, restore};
use crate::stage::{Daemon, LoopDevice, MIB, Mount, Place, Volume, replica};

#[test]
fn over_and_home_again() {
    let mut a = FirstSide::new(&[]);
    let mut b = OtherSide::new(&a.store);
    a.daemon.kill();
    let uri = b.failover(&["--unplanned"]).ok().to_owned();
    qemu_io(&uri, &["write -P 5 4M 1M", "flush"]);
    b.daemon
        .replica(&["reprotect", "v"])
        .fails(1, &["not committed"]);
    b.daemon.replica(&["commit", "v", "--yes"]).ok();
    let reprotect = [
        "reprotect",
        "v",
        "--every",
        "1s",
        "--to",
        a.store.to_str().unwrap(),
    ];
    b.daemon.replica(&reprotect).ok();
    qemu_io(&uri, &["write -P 6 5M 1M", "flush"]);
    // What is written there becomes points of the volume.
    let newest = b.point_behind(&a.store, |image| image[5 << 20] == 6);
    assert_eq!(b.state(), "reversing");

    b.daemon_is_away(|| {
        let store = a.store.to_str().unwrap();
        let device = a.disk.path().to_str().unwrap();
        let home = [
            "failback", "v", "--store", store, "--device", device, "--force",
        ];
        let nowhere = ["--socket", "/nonexistent/replica.sock"];
        replica(&[&nowhere[..], &home].concat()).fails(1, &["nobody serves"]);
    });

    // The first side is there again, and its users wrote where nobody looked.
    a.daemon.start_again();
    a.daemon
        .until("it is fenced", "v", |v| v["state"] == "failed_over");
    std::fs::OpenOptions::new()
        .write(true)
        .open(a.disk.path())
        .and_then(|disk| std::os::unix::fs::FileExt::write_all_at(&disk, &[9; 65536], 12 << 20))
        .unwrap();
    let client = qemu_nbd_client(&uri);
    a.daemon
        .replica(&["failback", "v"])
        .fails(1, &["clients are connected"]);
    drop(client);
    // Nothing came of it: the other side goes on.
    qemu_io(&uri, &["write -P 7 6M 1M", "flush"]);
    let home = a.daemon.replica(&["failback", "v", "--json"]).json();
    assert_eq!(home["device"], a.disk.path().to_str().unwrap());
    // 1 MiB was written at rest, and less than all of it before.
    assert!(home["bytes_before"].as_u64().unwrap() < 4 << 20, "{home}");
    assert!(home["bytes_at_rest"].as_u64().unwrap() <= 2 << 20, "{home}");

    let status = a
        .daemon
        .until("it is home", "v", |v| v["state"] == "replicating");
    assert_eq!(status["last_resync"]["bytes"], 0, "{status}");
    let expected = |image: &[u8]| {
        let all = |range: std::ops::Range<usize>, byte: u8| {
            image[range.start << 20..range.end << 20]
                .iter()
                .all(|&b| b == byte)
        };
        all(0..4, 2)
            && all(4..5, 5)
            && all(5..6, 6)
            && all(6..7, 7)
            && all(7..8, 2)
            && all(8..16, 1)
    };
    assert!(expected(&std::fs::read(a.disk.path()).unwrap()));
    let refused = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "read 0 4k", &uri])
        .output()
        .unwrap();
    assert!(!refused.status.success(), "the other side still serves it");
    let adopted = b.adopted();
    assert_eq!(
        (&adopted["state"], &adopted["generation"]),
        (&json!("replicating"), &json!(3))
    );
    // Nothing of it is left there, so that it holds no room.
    let open = b.daemon.replica(&["status", "--json"]).json()["open"].clone();
    assert_eq!(open, json!([]));
    let listed = b.daemon.replica(&["points", "v", "--json"]).json();
    assert_eq!(listed["branches"], json!([]));

    // Protection runs in the first direction again, and the other side's points are there.
    qemu_io(&a.uri, &["read -P 7 6M 1M", "write -P 8 15M 1M", "flush"]);
    let point = a.daemon.point("v", &[]);
    let image = restore(&a.store, &point, &a.place.at("home.img"));
    assert!(image == std::fs::read(a.disk.path()).unwrap());
    let image = restore(&a.store, &newest, &a.place.at("there.img"));
    assert!(image[5 << 20] == 6 && image[6 << 20] == 2);
    replica(&["store", "check", a.store.to_str().unwrap()]).ok();
    // And over once more, as planned.
    let again = b.failover(&["--planned"]);
    qemu_io(again.ok(), &["read -P 8 15M 1M", "read -P 7 6M 1M"]);
}

#[test]
fn a_device_that_its_users_have_without_us() {
    let place = Place::new();
    let folder = place.folder("store");
    let disk = LoopDevice::of_its_own(&place, "disk.img", 32 * MIB);
    let mut a = Daemon::start(&place);
    a.protect(&Volume {
        device: disk.path(),
        store: &folder,
        name: "v",
        options: &EVERY,
    });
    let mount = Mount::make("ext4", disk.path(), &place.at("mnt"));
    std::fs::write(mount.at("before"), "it was here").unwrap();
    let b = OtherSide::new(&folder);
    b.failover(&["--planned", "--limit", "20s"])
        .fails(1, &["is mounted"]);
    mount.unmount();
    let uri = b.failover(&["--planned"]).ok().to_owned();
    b.daemon.replica(&["commit", "v", "--yes"]).ok();
    b.daemon.replica(&["reprotect", "v", "--every", "1s"]).ok();
    qemu_io(&uri, &["write -P 5 30M 1M", "flush"]);
    a.until("it is fenced", "v", |v| v["state"] == "failed_over");
    // Behind our back, and it is found all the same.
    let image = std::fs::OpenOptions::new().write(true).open(disk.file());
    std::os::unix::fs::FileExt::write_all_at(&image.unwrap(), &[9; 65536], 28 << 20).unwrap();
    a.kill();
    a.start_again();
    a.replica(&["failback", "v"]).ok();
    a.until("it is home", "v", |v| v["state"] == "replicating");
    let mount = Mount::new(disk.path(), &place.at("mnt"), "rw");
    let read = std::fs::read_to_string(mount.at("before")).unwrap();
    assert_eq!(read, "it was here");
    std::fs::write(mount.at("after"), "and is again").unwrap();
    a.point("v", &[]);
    a.replica(&["verify", "v"]).ok();
    let device = std::fs::read(disk.path()).unwrap();
    assert!(device[30 << 20..31 << 20].iter().all(|&byte| byte == 5));
    mount.unmount();
}

#[test]
fn home_to_a_blank_disk() {
    let mut a = FirstSide::new(&[]);
    let b = OtherSide::new(&a.store);
    a.daemon.kill();
    let uri = b.failover(&["--unplanned", "--point", "latest-processed"]);
    let uri = uri.ok().to_owned();
    b.daemon.replica(&["commit", "v", "--yes"]).ok();
    b.daemon.replica(&["reprotect", "v", "--every", "1s"]).ok();
    qemu_io(&uri, &["write -P 6 5M 1M", "discard 9M 1M", "flush"]);

    let place = Place::new();
    let disk = LoopDevice::of_its_own(&place, "blank.img", 16 * MIB);
    let mut c = Daemon::start(&place);
    let device = disk.path().to_str().unwrap();
    let store = a.store.to_str().unwrap();
    let at = ["failback", "v", "--store", store, "--device", device];
    c.replica(&at).fails(2, &["--force"]);
    let home = c.replica(&[&at[..], &["--force"]].concat());
    home.ok();
    assert!(home.stderr.contains("replica protect"), "{home:?}");
    let device = std::fs::read(disk.path()).unwrap();
    let all = |range: std::ops::Range<usize>, byte: u8| {
        device[range.start << 20..range.end << 20]
            .iter()
            .all(|&b| b == byte)
    };
    assert!(all(0..5, 2) && all(5..6, 6) && all(6..8, 2) && all(8..9, 1));
    assert!(all(9..10, 0) && all(10..16, 1));

    c.protect(&Volume {
        device: disk.path(),
        store: &a.store,
        name: "v",
        options: &["--every", "1h", "--force"],
    });
    c.until("it goes on", "v", |v| v["state"] == "replicating");
    let point = c.point("v", &[]);
    crate::stage::assert_restores(&place, &a.store, "v", &point, disk.path());
    // Whoever was first is not it any more.
    a.daemon.start_again();
    a.daemon
        .until("it is fenced", "v", |v| v["state"] == "failed_over");
}

#[test]
fn two_disks_of_a_group() {
    let place = Place::new();
    let store = place.folder("store");
    let mut a = Daemon::start(&place);
    let disks = ["v", "w"].map(|name| LoopDevice::of_its_own(&place, name, 16 * MIB));
    let group = ["--every", "1h", "--group", "g"];
    let uris = [0, 1].map(|n| protect_as(["v", "w"][n], &a, &disks[n], &store, &group));
    let b_place = Place::new();
    let b = Daemon::start(&b_place);
    b.replica(&["adopt", store.to_str().unwrap()]).ok();
    let over = || {
        ["v", "w"].map(|volume| {
            let nbd = format!("unix:{}", b_place.at(volume).display());
            let args = ["failover", volume, "--planned", "--nbd", &nbd];
            b.replica(&args).ok().to_owned()
        })
    };
    for round in 1..4_u8 {
        for uri in &uris {
            let write = format!("write -P {round} 0 1M");
            qemu_io(uri, &[&write, "discard 4M 1M", "write -P 7 4M 4k", "flush"]);
        }
        let there = over();
        for (volume, uri) in std::iter::zip(["v", "w"], &there) {
            qemu_io(
                uri,
                &[
                    &format!("read -P {round} 0 1M"),
                    "write -P 9 2M 1M",
                    "flush",
                ],
            );
            b.replica(&["commit", volume, "--yes"]).ok();
            b.replica(&["reprotect", volume, "--every", "1s"]).ok();
        }
        for volume in ["v", "w"] {
            a.until("it is fenced", volume, |v| v["state"] == "failed_over");
            a.replica(&["failback", volume]).ok();
        }
        for (volume, uri) in std::iter::zip(["v", "w"], &uris) {
            a.until("it is home", volume, |v| v["state"] == "replicating");
            qemu_io(uri, &[&format!("read -P {round} 0 1M"), "read -P 9 2M 1M"]);
        }
    }
    a.terminate();
}

#[test]
fn a_group_by_one_word() {
    let place = Place::new();
    let store = place.folder("store");
    let mut a = Daemon::start(&place);
    let disks = ["v", "w"].map(|name| LoopDevice::of_its_own(&place, name, 8 * MIB));
    let group = ["--every", "1h", "--group", "g"];
    let uris = [0, 1].map(|n| protect_as(["v", "w"][n], &a, &disks[n], &store, &group));
    let fill = |byte: u8| {
        for uri in &uris {
            qemu_io(uri, &[&format!("write -P {byte} 0 1M"), "flush"]);
        }
    };
    fill(1);
    let first = a.point("v", &[]);
    fill(2);
    a.point("w", &[]);
    let to = store.to_str().unwrap();

    // Of one of them a point is named; of the other the one of the same moment is taken.
    let out = place.folder("out");
    let output = ["--output", out.to_str().unwrap()];
    let restore = ["restore", "w", "--group", "--point", &first, "--store", to];
    replica(&[&restore[..], &output].concat()).fails(1, &["made together"]);
    let restore = ["restore", "v", "--group", "--point", &first, "--store", to];
    replica(&[&restore[..], &output].concat()).ok();
    for name in ["v.img", "w.img"] {
        let image = std::fs::read(out.join(name)).unwrap();
        assert!(image[..1 << 20].iter().all(|&byte| byte == 1), "{name}");
    }

    let b_place = Place::new();
    let b = Daemon::start(&b_place);
    b.replica(&["adopt", to]).ok();
    let sockets = b_place.folder("sockets");
    let at = ["--nbd", &format!("unix:{}", sockets.display())];
    let over = |how: &[&str]| {
        let args = [&["failover", "v", "--group"][..], &at, how].concat();
        let uris = b.replica(&args).ok().to_owned();
        let uris: Vec<String> = uris.lines().map(str::to_owned).collect();
        assert!(
            uris[0].ends_with("/v.nbd") && uris[1].ends_with("/w.nbd"),
            "{uris:?}"
        );
        uris
    };
    let open = ["open", "v", "--group", "--point", "latest"];
    for uri in b.replica(&[&open[..], &at].concat()).ok().lines() {
        qemu_io(uri, &["read -P 2 0 1M"]);
    }
    for name in ["v", "w"] {
        b.replica(&["close", name]).ok();
    }
    for uri in over(&["--test", "--point", &first]) {
        qemu_io(&uri, &["read -P 1 0 1M", "write -P 5 0 1M", "flush"]);
    }
    b.replica(&["failover", "w", "--group", "--cleanup"]).ok();

    // One of them refuses, and neither is taken over.
    fill(3);
    let client = qemu_nbd_client(&uris[1]);
    let planned = ["failover", "v", "--group", "--planned", "--limit", "20s"];
    b.replica(&[&planned[..], &at].concat())
        .fails(1, &["clients are connected"]);
    drop(client);
    for name in ["v", "w"] {
        a.until("it goes on", name, |v| v["state"] == "replicating");
    }
    fill(4);
    for uri in over(&["--planned"]) {
        qemu_io(&uri, &["read -P 4 0 1M"]);
    }
    a.terminate();
}
