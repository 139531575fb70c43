//! `replica migrate`: a device with users moves to another daemon. What was written before, during and at
//! the last moment is there afterwards, the old device is read-only, and a command that is killed
//! anywhere is given again until it is done.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use crate::failover::qemu_nbd_client;
use crate::inline::qemu_io;
use crate::stage::{Daemon, LoopDevice, MIB, Place, Reply, run, until};

struct Site {
    place: Place,
    disk: LoopDevice,
    source: Daemon,
    target: Daemon,
    store: PathBuf,
}

impl Site {
    fn new() -> Self {
        let place = Place::new();
        let disk = LoopDevice::of_its_own(&place, "disk.img", 16 * MIB);
        fs::write(disk.path(), vec![1; 16 << 20]).unwrap();
        let source = Daemon::start(&place);
        let at = |name: &str| place.at(&format!("target.{name}"));
        let target = Daemon::start_with(&place.folder("target"), &at("sock"), &at("log"));
        Self {
            store: place.folder("store"),
            place,
            disk,
            source,
            target,
        }
    }

    fn args(&self, more: &[&str]) -> Vec<String> {
        let nbd = format!("unix:{}", self.place.at("moved.nbd").display());
        let words = [
            "migrate",
            self.disk.path().to_str().unwrap(),
            "--to",
            self.store.to_str().unwrap(),
            "--name",
            "v",
            "--nbd",
            &nbd,
            "--target-socket",
            self.target.socket().to_str().unwrap(),
            "--json",
        ];
        let words = words.iter().chain(more);
        words.map(|&word| word.to_owned()).collect()
    }

    fn migrate(&self, more: &[&str]) -> Reply {
        let args = self.args(more);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.source.replica(&args)
    }

    fn uri(&self) -> String {
        let socket = self.place.at("moved.nbd");
        format!("nbd+unix:///?socket={}", socket.display())
    }

    /// The target has the volume for good, the source nothing of it.
    #[track_caller]
    fn assert_moved(&self) {
        let status = self.target.replica(&["status", "v", "--json"]).json();
        let adopted = &status["adopted"][0];
        assert_eq!(
            (&adopted["state"], &adopted["generation"]),
            (&json!("committed"), &json!(2)),
            "{status}"
        );
        let status = self.source.replica(&["status", "--json"]).json();
        assert_eq!(status["volumes"], json!([]), "{status}");
        let access = run("blockdev", ["--getro", self.disk.path().to_str().unwrap()]);
        assert_eq!(access.trim(), "1", "the old device can be written to");
    }
}

#[test]
fn a_served_device_moves_with_all_that_its_users_wrote() {
    let site = Site::new();
    let nbd = ["--capture", "nbd"];
    // The first time somebody uses it: all but the last step is done.
    let limit = Duration::from_secs(60);
    let mut first = site.source.command(&[]);
    first.args(site.args(&nbd));
    let first = first.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut first = first.spawn().unwrap();
    let uri = until("it is served", limit, || {
        let status = site.source.replica(&["status", "--json"]).json();
        status["volumes"][0]["address"].as_str().map(str::to_owned)
    });
    let client = qemu_nbd_client(&uri);
    let status = first.wait().unwrap();
    if status.success() {
        panic!("it was taken from its users");
    }
    let said = std::io::read_to_string(first.stderr.take().unwrap()).unwrap();
    assert!(said.contains("clients are connected"), "{said}");
    qemu_io(&uri, &["write -P 2 4M 1M", "write -P 3 9M 512"]);
    drop(client);
    qemu_io(&uri, &["write -P 4 12M 64k"]);

    let moved = site.migrate(&nbd);
    let line: Value = serde_json::from_str(moved.ok()).unwrap();
    assert_eq!(
        (&line["uri"], &line["lost_bytes"]),
        (&json!(site.uri()), &json!(0))
    );
    let downtime = line["downtime_seconds"].as_f64().unwrap();
    assert!(downtime > 0.0 && downtime < 30.0, "{line}");
    assert!(moved.stderr.contains("downtime: "), "{moved:?}");
    eprintln!("downtime of 16 MiB: {downtime:.3} s");
    site.assert_moved();
    let read = [
        "read -P 1 0 4M",
        "read -P 2 4M 1M",
        "read -P 3 9M 512",
        "read -P 4 12M 64k",
        "write -P 5 15M 1M",
        "flush",
    ];
    qemu_io(&site.uri(), &read);

    let again = site.migrate(&nbd).json();
    assert_eq!(again["downtime_seconds"], Value::Null, "{again}");
    site.assert_moved();
    qemu_io(&site.uri(), &["read -P 5 15M 1M"]);
}

#[test]
fn a_device_that_is_watched_from_beside_moves_and_is_read_only_then() {
    let site = Site::new();
    let moved = site.migrate(&[]);
    let line: Value = serde_json::from_str(moved.ok()).unwrap();
    assert_eq!(line["lost_bytes"], 0, "{line}");
    site.assert_moved();
    qemu_io(&site.uri(), &["read -P 1 0 16M"]);
    let disk = fs::OpenOptions::new().write(true).open(site.disk.path());
    let written = disk.and_then(|disk| disk.write_all_at(&[9; 4096], 0));
    assert!(written.is_err(), "the old device can be written to");
    assert!(
        fs::read(site.disk.path())
            .unwrap()
            .iter()
            .all(|&byte| byte == 1)
    );
}

#[test]
fn killed_anywhere_it_is_given_again_until_it_is_done() {
    let site = Site::new();
    let mut kills = 0;
    for pause in (50..).step_by(150) {
        let mut command = site.source.command(&[]);
        command.args(site.args(&["--capture", "nbd"]));
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(pause));
        if let Some(status) = child.try_wait().unwrap() {
            if status.success() {
                break;
            }
            // The source was at what the one before had asked it.
            continue;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        assert!(kills < 100, "it never comes to its end");
    }
    assert!(kills > 2, "it was never killed in between");
    site.assert_moved();
    qemu_io(&site.uri(), &["read -P 1 0 16M"]);
}

#[test]
fn a_name_or_a_socket_that_is_taken_is_told_first() {
    let site = Site::new();
    let other = LoopDevice::new(&site.place, "other.img", 4 * MIB);
    let store = site.store.to_str().unwrap().to_owned();
    let protect = |name: &str| {
        let device = other.path().to_str().unwrap();
        let args = ["protect", device, "--to", &store, "--name", name, "--wait"];
        site.source
            .replica(&[&args[..], &["--capture", "nbd"]].concat())
            .ok();
    };
    protect("v");
    site.migrate(&[])
        .fails(1, &["the volume v is", "another --name"]);
    site.source.replica(&["unprotect", "v"]).ok();
    protect("w");
    let nbd = format!("unix:{}", site.place.at("moved.nbd").display());
    let open = [
        "open", "w", "--point", "latest", "--store", &store, "--nbd", &nbd,
    ];
    site.target.replica(&open).ok();
    site.migrate(&[]).fails(1, &["w is served there"]);
}
