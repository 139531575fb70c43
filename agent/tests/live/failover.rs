//! The commands of failover, as an operator gives them on the machine that takes over: a second
//! daemon with a state folder of its own, that has nothing of the source but the store.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::inline::{protect, protect_as, qemu_io, restore};
use crate::stage::{Daemon, LoopDevice, MIB, Place, Reply, replica};

pub const EVERY: [&str; 2] = ["--every", "1h"];

/// Where the volume is taken over.
pub struct OtherSide {
    pub place: Place,
    pub daemon: Daemon,
}

impl OtherSide {
    pub fn new(store: &Path) -> Self {
        let place = Place::new();
        let daemon = Daemon::start(&place);
        let adopted = daemon.replica(&["adopt", store.to_str().unwrap()]);
        assert!(adopted.ok().ends_with("  v"), "{adopted:?}");
        Self { place, daemon }
    }

    pub fn socket(&self, name: &str) -> String {
        format!("unix:{}", self.place.at(name).display())
    }

    pub fn failover(&self, args: &[&str]) -> Reply {
        let socket = self.socket("v.sock");
        let args = [&["failover", "v", "--nbd", &socket], args].concat();
        self.daemon.replica(&args)
    }

    pub fn adopted(&self) -> Value {
        let status = self.daemon.replica(&["status", "v", "--json"]).json();
        status["adopted"][0].clone()
    }

    /// The first new point whose content is what is waited for.
    pub fn point_behind(&self, store: &Path, is_it: impl Fn(&[u8]) -> bool) -> String {
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

    pub fn daemon_is_away(&mut self, meanwhile: impl FnOnce()) {
        self.daemon.terminate();
        meanwhile();
        self.daemon.start_again();
    }

    pub fn state(&self) -> Value {
        self.adopted()["state"].clone()
    }
}

pub struct FirstSide {
    pub place: Place,
    pub store: PathBuf,
    pub disk: LoopDevice,
    pub daemon: Daemon,
    pub uri: String,
    /// A point of which all is 1, and one of which the first half is 2.
    points: [String; 2],
}

impl FirstSide {
    pub fn new(options: &[&str]) -> Self {
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
