//! The command line as others script against it: exit codes, fields, what is printed where,
//! what works without a daemon.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::stage::{
    Daemon, LoopDevice, MIB, Mount, Place, Volume, assert_restores, replica, run, until,
};

fn has_fields(value: &Value, fields: &[&str]) {
    for field in fields {
        assert!(value.get(field).is_some(), "`{field}` is missing: {value}");
    }
}

#[test]
fn usage_errors_exit_with_2() {
    replica(&[]).fails(2, &[]);
    replica(&["frobnicate"]).fails(2, &["frobnicate"]);
    replica(&["point"]).fails(2, &[]);
    replica(&["protect", "/dev/loop0", "--to", "/x", "--every", "soon"]).fails(2, &["soon"]);
    assert_eq!(replica(&["--help"]).code, 0);
    assert_eq!(replica(&["--version"]).code, 0);
}

#[test]
fn nonsense_is_told_before_a_daemon_is_asked() {
    let protect = |option: &str, value: &str, word: &str| {
        let store = if option == "--to" { value } else { "/x" };
        let mut args = vec!["protect", "/dev/loop0", "--to", store];
        args.extend([option, value].iter().filter(|_| option != "--to"));
        replica(&args).fails(2, &[option, word]);
    };
    protect("--retain", "bogus", "bogus");
    protect("--retain", "#0", "#0");
    protect("--name", "", "1 to 255 bytes");
    protect("--name", "a/b", "a/b");
    protect("--to", "", "no name");
    protect("--to", "file:///a%2", "%");
    protect("--to", "file://elsewhere/a", "another machine");
    replica(&["points", "--store", ""]).fails(2, &["--store"]);
    let long = "x".repeat(1025);
    for (label, word) in [(long.as_str(), "1024"), ("a\x1b[2J", "control")] {
        replica(&["point", "v", "--label", label]).fails(2, &["--label", word]);
    }
}

#[test]
fn a_configuration_that_makes_no_sense() {
    let place = Place::new();
    let (config, state) = (place.at("replica.toml"), place.at("state"));
    let (config, state) = (config.to_str().unwrap(), state.to_str().unwrap());
    for (text, words) in [
        (
            "log = \"info\"\nfreeze_limit = \"x\"\n",
            ["line 2", "freeze_limit: `x` is not a duration"],
        ),
        ("freeze_limits = \"2s\"\n", ["line 1", "freeze_limits"]),
        ("hooks_dir = 5\n", ["line 1", "hooks_dir"]),
        ("= \n", ["line 1", ""]),
    ] {
        fs::write(config, text).unwrap();
        let reply = replica(&["run", "--config", config, "--state-dir", state]);
        reply.fails(2, &words);
        reply.fails(2, &[config]);
    }
}

#[test]
fn what_is_hidden_or_set_elsewhere_is_not_asked_for() {
    let place = Place::new();
    let daemon = Daemon::start(&place);
    for args in [
        &["frobnicate"][..],
        &["point"],
        &["restore", "v"],
        &["log", "frobnicate"],
    ] {
        let reply = daemon.replica(args);
        reply.fails(2, &["Usage"]);
        for word in ["watchdog", "--socket", "--state-dir"] {
            assert!(!reply.stderr.contains(word), "{word}: {}", reply.stderr);
        }
    }
    for args in [&[][..], &["--help"], &["--json"]] {
        assert!(!format!("{:?}", daemon.replica(args)).contains("watchdog"));
    }
}

#[test]
fn without_a_daemon() {
    let place = Place::new();
    let socket = place.at("no.sock");
    let socket = socket.to_str().unwrap();
    replica(&["status", "--socket", socket]).fails(1, &[socket, "replica run"]);
}

#[test]
fn status_and_points_have_their_fields() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    assert_eq!(
        daemon.replica(&["status", "--json"]).json(),
        json!({ "volumes": [], "open": [], "adopted": [] })
    );
    daemon.replica(&["status", "nobody"]).fails(1, &["nobody"]);
    let id = daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &[],
    });

    let status = daemon.status("v");
    has_fields(
        &status,
        &[
            "id",
            "name",
            "device",
            "size_bytes",
            "state",
            "state_cause",
            "mode",
            "mode_cause",
            "capture",
            "generation",
            "epoch",
            "dirty_bytes",
            "lag_seconds",
            "last_point",
            "resync",
            "last_resync",
            "last_error",
            "counters",
        ],
    );
    let counters = [
        "writes_seen",
        "widened",
        "resyncs",
        "points_failed",
        "freeze_ms_max",
    ];
    has_fields(&status["counters"], &counters);
    has_fields(&status["compaction_waits"], &["logs", "bytes"]);
    assert_eq!(status["size_bytes"], 16 * MIB);
    assert_eq!(
        (&status["capture"], &status["mode"]),
        (&json!("ebpf"), &json!("bitmap"))
    );
    assert_eq!(daemon.status(&id)["name"], "v");
    assert!(!id.contains(':'));

    let made = daemon
        .replica(&["point", "v", "--label", "by hand", "--json"])
        .json();
    has_fields(
        &made,
        &[
            "id",
            "epoch",
            "time",
            "consistency",
            "label",
            "bytes",
            "proof",
        ],
    );
    assert_eq!(made["consistency"], "crash");
    assert_eq!(made["proof"], "root");
    assert!(made["time"].as_str().unwrap().ends_with('Z'), "{made}");
    let points = daemon.replica(&["points", "v", "--json"]).json();
    let mut listed = points["points"].as_array().unwrap().clone();
    assert_eq!(listed.len(), 2, "the baseline's end, and ours: {points}");
    for point in &mut listed {
        // Only a listing has it.
        let proven = point.as_object_mut().unwrap().remove("proven");
        assert_eq!(proven, Some(Value::Null), "never drilled: {points}");
    }
    assert_eq!(
        listed.iter().find(|point| point["id"] == made["id"]),
        Some(&made)
    );
    let refused = daemon.replica(&["point", "v", "--consistency", "filesystem"]);
    refused.fails(1, &["mounted"]);

    let store_text = store.to_str().unwrap();
    let all = replica(&["points", "--store", store_text, "--json"]).json();
    assert_eq!(all["volumes"][0]["id"], *id);
    assert_eq!(all["volumes"][0]["name"], "v");
    assert_eq!(all["volumes"][0]["points"], points["points"]);
    let url = format!("file://{store_text}");
    let one = replica(&["points", "v", "--store", &url, "--json"]).json();
    assert_eq!(one["points"], points["points"]);
}

#[test]
fn restore_chooses_its_point_and_its_target() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1h"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    fs::write(disk.path(), b"first").unwrap();
    let first = daemon.replica(&["point", "v", "--json"]).json();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    fs::write(disk.path(), b"second").unwrap();
    daemon.point("v", &[]);
    assert_restores(&place, &store, "v", "latest", disk.path());

    let starts = |point: &str, word: &[u8]| {
        let output = place.at("out.img");
        let (to, from) = (output.to_str().unwrap(), store.to_str().unwrap());
        let args = [
            "restore", "v", "--point", point, "--output", to, "--store", from, "--force",
        ];
        replica(&args).ok();
        assert!(fs::read(&output).unwrap().starts_with(word), "{point}");
    };
    starts(first["id"].as_str().unwrap(), b"first");
    starts(first["time"].as_str().unwrap(), b"first");
    starts("2100-01-01T00:00:00Z", b"second");

    let output = place.at("out.img");
    let (to, from) = (output.to_str().unwrap(), store.to_str().unwrap());
    let restore = |point: &str, to: &str, extra: &[&str]| {
        let mut args = vec![
            "restore", "v", "--point", point, "--output", to, "--store", from,
        ];
        args.extend(extra);
        replica(&args)
    };
    restore("latest", to, &[]).fails(1, &[to, "--force"]);
    restore("2001-01-01T00:00:00Z", to, &["--force"]).fails(1, &["2001-01-01"]);
    restore(&"0".repeat(32), to, &["--force"]).fails(1, &[]);
    daemon
        .replica(&[
            "restore",
            "v",
            "--point",
            "latest",
            "--output",
            disk.path().to_str().unwrap(),
            "--force",
        ])
        .fails(1, &[disk.name()]);

    // The store and the state folder are never overwritten, nor is anything put among their files.
    let id = daemon.status("v")["id"].as_str().unwrap().to_owned();
    let base = format!("volumes/{id}/base.img");
    for within in ["replica-store.json", &base, "x"] {
        let path = store.join(within);
        restore("latest", path.to_str().unwrap(), &["--force"]).fails(1, &["store", "outside"]);
    }
    assert!(!store.join("x").exists());
    let state = daemon.state().join("state.json");
    restore("latest", state.to_str().unwrap(), &["--force"]).fails(1, &["state folder"]);
    replica(&["store", "check", from]).ok();

    // To a device that holds something else: zeroes must be written, too.
    let target = LoopDevice::new(&place, "target.img", 16 * MIB);
    run(
        "dd",
        [
            "if=/dev/urandom",
            &format!("of={}", target.path().display()),
            "bs=1M",
            "count=16",
        ],
    );
    restore("latest", target.path().to_str().unwrap(), &[]).fails(1, &["--force"]);
    restore("latest", target.path().to_str().unwrap(), &["--force"]).ok();
    assert_restores(&place, &store, "v", "latest", target.path());
}

#[test]
fn what_cannot_be_left_out_or_used_is_told() {
    let place = Place::new();
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mount = Mount::make("ext4", disk.path(), &place.at("mounted"));
    let mut daemon = Daemon::start(&place);
    let store = place.at("sp ace");
    let url = format!("file://{}/sp%20ace", place.path().display());
    let spool = mount.at("spool");
    let volume = Volume {
        device: disk.path(),
        store: Path::new(&url),
        name: "v",
        options: &["--exclude", "100+10"],
    };
    daemon
        .try_protect(&volume)
        .fails(1, &["100", "whole block", "4096"]);
    daemon
        .try_protect(&Volume {
            options: &["--spool", spool.to_str().unwrap()],
            ..volume
        })
        .fails(
            1,
            &["the spool", spool.to_str().unwrap(), "this very device"],
        );
    assert!(!store.exists());
    let spool = place.at("spool");
    let made = daemon.try_protect(&Volume {
        options: &["--spool", spool.to_str().unwrap(), "--wait"],
        ..volume
    });
    made.ok();
    for word in ["--spool", "ebpf"] {
        assert!(made.stderr.contains(word), "{}", made.stderr);
    }
    assert!(store.join("replica-store.json").exists());
}

#[test]
fn relative_paths_are_the_clients() {
    let place = Place::new();
    place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let daemon = Daemon::start(&place);
    let run = |args: &[&str]| {
        let status = Command::new(env!("CARGO_BIN_EXE_replica"))
            .args(args)
            .current_dir(place.path())
            .env("REPLICA_STATE_DIR", daemon.state())
            .env("REPLICA_SOCKET", daemon.socket())
            .status();
        assert!(status.unwrap().success(), "{args:?}");
    };
    run(&[
        "protect",
        disk.path().to_str().unwrap(),
        "--to",
        "store",
        "--name",
        "v",
        "--wait",
    ]);
    run(&["restore", "v", "--point", "latest", "--output", "out.img"]);
    run(&["store", "check", "store"]);
    assert_eq!(fs::metadata(place.at("out.img")).unwrap().len(), 16 * MIB);
    run(&["unprotect", "v"]);
}

#[test]
fn before_the_baseline_is_done() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 1024 * MIB);
    run(
        "dd",
        [
            "if=/dev/urandom",
            &format!("of={}", disk.path().display()),
            "bs=1M",
            "count=400",
        ],
    );
    let mut daemon = Daemon::start(&place);
    let volume = Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &[],
    };
    daemon.try_protect(&volume).ok();
    assert_eq!(daemon.status("v")["state"], "baseline");
    daemon.replica(&["point", "v"]).fails(3, &["baseline"]);
    daemon.replica(&["verify", "v"]).fails(3, &["baseline"]);
    daemon.until("it replicates", "v", |status| {
        status["state"] == "replicating"
    });
    let point = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &point, disk.path());
}

#[test]
fn paused_it_tracks_but_does_not_ship() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1s"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    daemon.replica(&["pause", "v"]).ok();
    assert_eq!(daemon.status("v")["state"], "paused");
    fs::write(disk.path(), vec![5; 1 << 20]).unwrap();
    run("sync", [disk.path()]);
    let count = || {
        daemon.replica(&["points", "v", "--json"]).json()["points"]
            .as_array()
            .unwrap()
            .len()
    };
    let before = count();
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert_eq!(count(), before);
    assert!(daemon.status("v")["dirty_bytes"].as_u64().unwrap() >= 1 << 20);
    daemon.replica(&["resume", "v"]).ok();
    let point = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &point, disk.path());
}

#[test]
fn points_come_by_themselves() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1s", "--retain", "#3"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    for round in 0..6_u8 {
        fs::write(disk.path(), vec![round; 200_000]).unwrap();
        run("sync", [disk.path()]);
        std::thread::sleep(std::time::Duration::from_millis(1000));
    }
    // The oldest are dropped in the background.
    let points = until("three points at most", Duration::from_secs(30), || {
        let points = daemon.replica(&["points", "v", "--json"]).json();
        let count = points["points"].as_array().unwrap().len();
        (1..=3).contains(&count).then_some(points)
    });
    assert!(daemon.status("v")["epoch"].as_u64().unwrap() > 3);
    for point in points["points"].as_array().unwrap() {
        crate::stage::restore(&place, &store, "v", point["id"].as_str().unwrap());
    }
    let point = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &point, disk.path());
    replica(&["store", "check", store.to_str().unwrap()]).ok();
}
