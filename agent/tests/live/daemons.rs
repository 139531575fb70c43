//! More than one: daemons on one state folder or one socket, a device protected twice, pins
//! that another state folder left, names that are taken. Each is refused by name, or does
//! not matter.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::stage::{Daemon, LoopDevice, MIB, Place, Volume, assert_restores};

/// A second daemon that must not start.
fn second(state: &Path, socket: &Path) -> Output {
    Command::new("timeout")
        .args(["10", env!("CARGO_BIN_EXE_replica"), "run"])
        .env("REPLICA_STATE_DIR", state)
        .env("REPLICA_SOCKET", socket)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[track_caller]
fn assert_refused(output: &Output, names: &Path) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(names.to_str().unwrap()), "{said}");
}

#[test]
fn two_on_one_state_folder_or_socket() {
    let place = Place::new();
    let daemon = Daemon::start(&place);
    assert_refused(
        &second(daemon.state(), &place.at("other.sock")),
        daemon.state(),
    );
    assert_refused(
        &second(&place.folder("other"), daemon.socket()),
        daemon.socket(),
    );
    daemon.replica(&["status"]).ok();
}

#[test]
fn a_stale_socket_file_is_replaced() {
    let place = Place::new();
    let mut daemon = Daemon::start(&place);
    daemon.kill();
    assert!(daemon.socket().exists());
    daemon.start_again();
    daemon.replica(&["status"]).ok();
    use std::os::unix::fs::PermissionsExt;
    let mode = fs::metadata(daemon.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "the socket is root's alone");
}

#[test]
fn a_device_or_a_name_twice() {
    let place = Place::new();
    let store = place.folder("store");
    let disks = ["a", "b"].map(|name| LoopDevice::new(&place, name, 16 * MIB));
    let mut daemon = Daemon::start(&place);
    let volume = Volume {
        device: disks[0].path(),
        store: &store,
        name: "v",
        options: &[],
    };
    daemon.protect(&volume);
    daemon
        .try_protect(&Volume {
            name: "w",
            ..volume
        })
        .fails(1, &[disks[0].name()]);
    daemon
        .try_protect(&Volume {
            device: disks[1].path(),
            ..volume
        })
        .fails(1, &["v"]);
    daemon.protect(&Volume {
        device: disks[1].path(),
        name: "w",
        ..volume
    });
    // Another daemon, another state folder: the device may be protected there, too; only
    // the name in this store belongs to another id.
    let folder = place.folder("second");
    let (socket, log) = (place.at("second.sock"), place.at("second.log"));
    let mut second = Daemon::start_with(&folder, &socket, &log);
    second.try_protect(&volume).fails(1, &["v"]);
    let elsewhere = place.folder("elsewhere");
    second.protect(&Volume {
        store: &elsewhere,
        ..volume
    });
    for (daemon, store) in [(&daemon, &store), (&second, &elsewhere)] {
        fs::write(disks[0].path(), b"seen by both").unwrap();
        let point = daemon.point("v", &[]);
        assert_restores(&place, store, "v", &point, disks[0].path());
    }
}

#[test]
fn pins_of_a_dead_daemon_with_another_state_folder() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let (folder, log) = (place.folder("first"), place.at("first.log"));
    let mut first = Daemon::start_with(&folder, &place.at("first.sock"), &log);
    let volume = Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &[],
    };
    let id = first.protect(&volume);
    let pins = Path::new("/sys/fs/bpf/replica").join(&id);
    assert!(pins.is_dir());
    first.kill();
    assert!(pins.is_dir(), "tracking goes on without the daemon");

    let mut daemon = Daemon::start(&place);
    assert!(
        daemon.log_text().contains(&id),
        "it reports them: {}",
        daemon.log_text()
    );
    let elsewhere = place.folder("elsewhere");
    daemon.protect(&Volume {
        store: &elsewhere,
        ..volume
    });
    assert!(pins.is_dir(), "they are not its to remove unasked");
    daemon.replica(&["unprotect", "--stale"]).ok();
    assert!(!pins.exists());
    daemon.point("v", &[]);
}

#[test]
fn unprotect_leaves_nothing_in_the_kernel() {
    let place = Place::new();
    let store = place.folder("store");
    let mut disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    let volume = Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &[],
    };
    let id = daemon.protect(&volume);
    daemon.unprotect("v");
    assert!(!Path::new("/sys/fs/bpf/replica").join(id).exists());
    // With no descriptor left, the device goes at once.
    disk.detach();
    assert!(
        !Path::new("/sys/block")
            .join(disk.name())
            .join("loop")
            .exists()
    );
}

#[test]
fn a_state_folder_that_is_none() {
    let place = Place::new();
    let state = place.folder("state");
    let mut daemon = Daemon::start(&place);
    daemon.terminate();
    for entry in fs::read_dir(&state).unwrap().flatten() {
        if entry.path().is_file() {
            fs::write(entry.path(), "not what it was").unwrap();
        }
    }
    let output = second(&state, &place.at("other.sock"));
    assert_refused(&output, &state);
}
