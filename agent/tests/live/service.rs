//! The daemon as systemd runs it: it says when it is ready and when it ends; and it goes on
//! from an older copy of its state folder that somebody has put back.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use crate::stage::{Daemon, LoopDevice, MIB, Place, Volume, assert_restores, run, write_random};

#[test]
fn it_says_when_it_is_ready_and_when_it_ends() {
    let place = Place::new();
    let path = place.at("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let said = || {
        let mut buffer = [0; 4096];
        let len = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..len]).into_owned()
    };
    let variable = format!("NOTIFY_SOCKET={}", path.display());
    let mut daemon = Daemon::start_within(&place, &["env", &variable]);
    assert!(said().lines().any(|line| line == "READY=1"));
    assert!(daemon.terminate().success());
    assert!(said().lines().any(|line| line == "STOPPING=1"));
}

fn copy(from: &Path, to: &Path) {
    let _ = fs::remove_dir_all(to);
    run("cp", ["-a", from.to_str().unwrap(), to.to_str().unwrap()]);
}

/// The copy does not know of a loss of tracking that the kernel has forgotten since.
#[test]
fn a_copy_of_the_state_folder_from_before_a_loss() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    let state = daemon.state().to_owned();
    let id = daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1h"],
    });
    daemon.terminate();
    let older = place.at("older");
    copy(&state, &older);
    fs::remove_dir_all(Path::new("/sys/fs/bpf/replica").join(&id)).unwrap();
    write_random(disk.path(), 2, 1);
    // Tracked anew; the loss is noted, and nothing can be compared.
    fs::rename(&store, place.at("away")).unwrap();
    fs::create_dir(&store).unwrap();
    run(
        "cp",
        [
            "-a",
            &format!("{}/.", place.at("away").display()),
            store.to_str().unwrap(),
        ],
    );
    daemon.start_again();
    daemon.kill();
    copy(&older, &state);
    // The store, too, as it was before the comparison.
    fs::remove_dir_all(&store).unwrap();
    fs::rename(place.at("away"), &store).unwrap();
    daemon.start_again();
    let status = daemon.until("it is compared", "v", |status| {
        status["state"] == "replicating" && !status["last_resync"].is_null()
    });
    let cause = status["last_resync"]["cause"].as_str().unwrap();
    assert!(cause.contains("older"), "{status}");
    let point = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &point, disk.path());
}

/// Its tree, its settings and its history are older than what the store and the kernel know.
#[test]
fn an_older_copy_of_the_state_folder() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    write_random(disk.path(), 0, 64);
    let mut daemon = Daemon::start(&place);
    let state = daemon.state().to_owned();
    let [early, late] = ["early", "late"].map(|name| place.at(name));
    // As it is during the first copy.
    let volume = Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1h"],
    };
    daemon.try_protect(&volume).ok();
    copy(&state, &early);
    daemon.until("it is copied", "v", |status| {
        status["state"] == "replicating" && !status["last_point"].is_null()
    });
    daemon.terminate();
    copy(&state, &late);

    for (at, older) in [(2, &late), (20, &early)] {
        daemon.start_again();
        write_random(disk.path(), at, 2);
        let point = daemon.point("v", &[]);
        daemon.terminate();
        // Nobody ships these; the kernel has them.
        write_random(disk.path(), at + 8, 1);
        copy(older, &state);
        daemon.start_again();
        let status = daemon.until("it goes on", "v", |status| status["state"] == "replicating");
        let after = daemon.point("v", &[]);
        assert_ne!(point, after);
        assert_restores(&place, &store, "v", &after, disk.path());
        daemon.replica(&["verify", "v"]).ok();
        crate::stage::restore(&place, &store, "v", &point);
        if older == &late {
            assert_eq!(status["counters"]["widened"], 0, "{status}");
            assert!(status["last_resync"].is_null(), "{status}");
        }
        daemon.terminate();
    }
    daemon.start_again();
}
