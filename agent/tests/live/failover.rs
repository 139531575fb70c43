//! The commands of failover, as an operator gives them on the machine that takes over: a second
//! daemon with a state folder of its own, that has nothing of the source but the store.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::inline::{protect, protect_as, qemu_io, restore};
use crate::stage::{Daemon, LoopDevice, MIB, Mount, Place, Reply, Volume, replica};

const EVERY: [&str; 2] = ["--every", "1h"];

/// Where the volume is taken over.
struct OtherSide {
    place: Place,
    daemon: Daemon,
}

impl OtherSide {
    fn new(store: &Path) -> Self {
        let place = Place::new();
        let daemon = Daemon::start(&place);
        let adopted = daemon.replica(&["adopt", store.to_str().unwrap()]);
        assert!(adopted.ok().ends_with("  v"), "{adopted:?}");
        Self { place, daemon }
    }

    fn socket(&self, name: &str) -> String {
        format!("unix:{}", self.place.at(name).display())
    }

    fn failover(&self, args: &[&str]) -> Reply {
        let socket = self.socket("v.sock");
        let args = [&["failover", "v", "--nbd", &socket], args].concat();
        self.daemon.replica(&args)
    }

    fn adopted(&self) -> Value {
        let status = self.daemon.replica(&["status", "v", "--json"]).json();
        status["adopted"][0].clone()
    }

    /// The first new point whose content is what is waited for.
    fn point_behind(&self, store: &Path, is_it: impl Fn(&[u8]) -> bool) -> String {
        let limit = std::time::Duration::from_secs(30);
        crate::stage::until("a point of what was written", limit, || {
            let points = self.daemon.replica(&["points", "v", "--json"]).json();
            let newest = points["points"].as_array().unwrap().last()?["id"].clone();
            let newest = newest.as_str()?.to_owned();
            let out = self.place.at("newest.img");
            let _ = std::fs::remove_file(&out);
            is_it(&restore(store, &newest, &out)).then_some(newest)
        })
    }

    fn daemon_is_away(&mut self, meanwhile: impl FnOnce()) {
        self.daemon.terminate();
        meanwhile();
        self.daemon.start_again();
    }

    fn state(&self) -> Value {
        self.adopted()["state"].clone()
    }
}

struct FirstSide {
    place: Place,
    store: PathBuf,
    disk: LoopDevice,
    daemon: Daemon,
    uri: String,
    /// A point of which all is 1, and one of which the first half is 2.
    points: [String; 2],
}

impl FirstSide {
    fn new(options: &[&str]) -> Self {
        let place = Place::new();
        let store = place.folder("store");
        let disk = LoopDevice::of_its_own(&place, "disk.img", 16 * MIB);
        let mut daemon = Daemon::start(&place);
        let uri = protect(&mut daemon, &disk, &store, &[&EVERY[..], options].concat());
        qemu_io(&uri, &["write -P 1 0 16M"]);
        let first = daemon.point("v", &[]);
        qemu_io(&uri, &["write -P 2 0 8M"]);
        let second = daemon.point("v", &[]);
        Self {
            place,
            store,
            disk,
            daemon,
            uri,
            points: [first, second],
        }
    }
}

#[test]
fn a_drill_disturbs_nothing_and_leaves_nothing() {
    let a = FirstSide::new(&[]);
    let b = OtherSide::new(&a.store);
    assert_eq!(b.state(), "replicating");
    let drill = b.failover(&["--test", "--point", &a.points[0]]);
    let uri = drill.ok().to_owned();
    assert_eq!(uri.lines().count(), 1, "{uri}");
    qemu_io(&uri, &["read -P 1 0 16M", "write -P 9 0 1M", "flush"]);
    assert_eq!(b.state(), "test_failover");
    b.failover(&["--test"]).fails(1, &["a drill is open"]);

    // Replication goes on, and a restart serves the drill again.
    let (mut b, mut a) = (b, a);
    qemu_io(&a.uri, &["write -P 3 8M 8M"]);
    let third = a.daemon.point("v", &[]);
    b.daemon.kill();
    b.daemon.start_again();
    qemu_io(&uri, &["read -P 9 0 1M", "read -P 1 1M 15M"]);
    b.daemon.replica(&["failover", "v", "--cleanup"]).ok();
    assert_eq!(b.state(), "replicating");
    b.daemon
        .replica(&["failover", "v", "--cleanup"])
        .fails(1, &["no drill is open"]);
    let image = restore(&a.store, &third, &a.place.at("out.img"));
    assert!(image[..8 << 20].iter().all(|&byte| byte == 2));
    assert!(image[8 << 20..].iter().all(|&byte| byte == 3));
    a.daemon.terminate();
}

#[test]
fn an_unplanned_failover_takes_what_there_is_and_may_change_its_mind() {
    let mut a = FirstSide::new(&[]);
    let b = OtherSide::new(&a.store);
    qemu_io(&a.uri, &["write -P 4 15M 1M", "flush"]);
    let third = a.daemon.point("v", &[]);
    a.daemon.kill();

    let failover = b.failover(&["--unplanned", "--json"]);
    let line: Value = serde_json::from_str(failover.ok()).unwrap();
    assert_eq!(
        (&line["how"], &line["point"]),
        (&json!("unplanned"), &json!(third))
    );
    let uri = line["uri"].as_str().unwrap().to_owned();
    qemu_io(&uri, &["read -P 4 15M 1M", "write -P 5 0 1M", "flush"]);
    let adopted = b.adopted();
    assert_eq!(
        (&adopted["state"], &adopted["generation"]),
        (&json!("failed_over"), &json!(2))
    );
    for args in [&["--test"][..], &["--planned"], &["--unplanned"]] {
        if args == ["--planned"] {
            let args = ["failover", "v", "--planned", "--nbd", &b.socket("w.sock")];
            b.daemon.replica(&args).fails(1, &["in use here"]);
        } else {
            b.failover(args).fails(1, &["in use here"]);
        }
    }
    // What the volume is now is not thrown away by a slip.
    let branch = line["branch"].as_str().unwrap();
    b.daemon
        .replica(&["close", branch])
        .fails(1, &["failed over to"]);
    qemu_io(&uri, &["read -P 5 0 1M"]);

    let args = ["change-point", "v", "--point", &a.points[0]];
    let changed = b.daemon.replica(&args);
    assert_eq!(changed.ok(), uri);
    assert!(changed.stderr.contains("left out"), "{}", changed.stderr);
    qemu_io(&uri, &["read -P 1 0 16M", "write -P 6 1M 1M", "flush"]);
    // Any moment will do, too: nothing that was written on the other choice is there.
    let args = [
        "change-point",
        "v",
        "--point",
        &moment_before(&b, &a.points[1]),
    ];
    assert_eq!(b.daemon.replica(&args).ok(), uri);
    qemu_io(
        &uri,
        &[
            "read -P 2 0 64k",
            "read -P 1 8M 8M",
            "write -P 6 9M 1M",
            "flush",
        ],
    );
    b.daemon
        .replica(&["commit", "v"])
        .fails(2, &["3 other recovery points", "--yes"]);
    let committed = b.daemon.replica(&["commit", "v", "--yes"]);
    committed.ok();
    assert!(
        committed.stderr.contains("3 points were dropped"),
        "{committed:?}"
    );
    assert_eq!(b.state(), "committed");
    b.daemon
        .replica(&["change-point", "v", "--point", "latest"])
        .fails(1, &["committed"]);
    qemu_io(
        &uri,
        &["read -P 2 0 64k", "read -P 6 9M 1M", "read -P 1 10M 6M"],
    );

    // The old primary comes back, and serves nobody.
    a.daemon.start_again();
    let status = a
        .daemon
        .until("it is fenced", "v", |v| v["state"] == "failed_over");
    let why = status["state_cause"].as_str().unwrap();
    assert!(why.contains("replica reprotect"), "{why}");
}

#[test]
fn a_planned_failover_loses_nothing() {
    let mut a = FirstSide::new(&[]);
    let b = OtherSide::new(&a.store);
    let client = qemu_nbd_client(&a.uri);
    b.failover(&["--planned", "--limit", "20s"])
        .fails(1, &["clients are connected"]);
    drop(client);
    qemu_io(&a.uri, &["write -P 7 3M 1M"]);
    let failover = b.failover(&["--planned"]);
    let uri = failover.ok().to_owned();
    assert!(failover.stderr.contains("nothing is lost"), "{failover:?}");
    qemu_io(
        &uri,
        &["read -P 7 3M 1M", "read -P 2 0 3M", "read -P 1 8M 8M"],
    );
    a.daemon
        .until("it is fenced", "v", |v| v["state"] == "failed_over");
    a.daemon.terminate();
    let device = std::fs::read(a.disk.path()).unwrap();
    assert!(device[3 << 20..4 << 20].iter().all(|&byte| byte == 7));
}

/// The moment after the first write of the log that ends in a point.
fn moment_before(b: &OtherSide, point: &str) -> String {
    let points = b.daemon.replica(&["points", "v", "--json"]).json();
    let mut points = points["points"].as_array().unwrap().iter();
    let point = points.find(|listed| listed["id"] == point).unwrap();
    format!("{}:0", point["epoch"])
}

/// A client that stays connected until it is dropped.
pub fn qemu_nbd_client(uri: &str) -> impl Drop {
    struct Client(std::process::Child);
    impl Drop for Client {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let mut child = std::process::Command::new("qemu-io")
        .args(["-f", "raw", uri])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    use std::io::{Read, Write};
    let stdin = child.stdin.as_mut().unwrap();
    stdin.write_all(b"read 0 512\n").unwrap();
    stdin.flush().unwrap();
    let mut said = [0; 32];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut said)
        .unwrap();
    Client(child)
}

#[test]
fn without_a_daemon_the_command_serves_it() {
    let mut a = FirstSide::new(&[]);
    a.daemon.kill();
    let socket = a.place.at("f.sock");
    let nbd = format!("unix:{}", socket.display());
    let store = a.store.to_str().unwrap();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_replica"))
        .args(["--socket", "/nonexistent/s", "failover", "v", "--unplanned"])
        .args([
            "--point",
            "latest-processed",
            "--store",
            store,
            "--nbd",
            &nbd,
        ])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut uri = String::new();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut out, &mut uri).unwrap();
    let uri = uri.trim_end();
    qemu_io(uri, &["read -P 2 0 8M", "write -P 8 0 1M", "flush"]);
    child.kill().unwrap();
    child.wait().unwrap();
    // What was flushed is there, and the daemon serves it from then on.
    let b = OtherSide::new(&a.store);
    let branch = b.adopted()["branch"].as_str().unwrap().to_owned();
    let again = [
        "open",
        "v",
        "--branch",
        &branch,
        "--nbd",
        &b.socket("v.sock"),
    ];
    let uri = b.daemon.replica(&again).ok().to_owned();
    qemu_io(&uri, &["read -P 8 0 1M", "read -P 2 1M 7M"]);
    let listed = replica(&["points", "v", "--store", store, "--json"]).json();
    assert_eq!(listed["branches"][0]["purpose"], "failover", "{listed}");
    assert_eq!(listed["branches"][0]["in_use"], true, "{listed}");
}

#[test]
fn a_volume_of_another_store_is_not_adopted_by_the_name_alone() {
    let place = Place::new();
    let daemon = Daemon::start(&place);
    let empty = place.folder("empty");
    daemon
        .replica(&["adopt", empty.to_str().unwrap()])
        .fails(1, &["no store"]);
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 4 * MIB);
    let mut source = Daemon::start_with(
        &place.folder("source"),
        &place.at("source.sock"),
        &place.at("source.log"),
    );
    protect_as("v", &source, &disk, &store, &EVERY);
    daemon
        .replica(&["adopt", store.to_str().unwrap(), "w"])
        .fails(1, &["w"]);
    daemon
        .replica(&["adopt", store.to_str().unwrap(), "v"])
        .ok();
    daemon.replica(&["points", "v"]).ok();
    daemon.replica(&["unprotect", "v"]).ok();
    daemon
        .replica(&["points", "v"])
        .fails(1, &["neither protected nor adopted"]);
    source.terminate();
}

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
