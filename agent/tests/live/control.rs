//! The control socket under clients that misbehave, and requests that last longer than the
//! daemon, or than their clients' patience.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::stage::{Daemon, LoopDevice, MIB, Place, Reply, Volume, replica, run, until};

#[test]
fn waiters_that_hang_up_are_forgotten() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &["--every", "1h"],
    });
    // Without its store the resync cannot end, and is tried again for some seconds.
    fs::rename(&store, place.at("away")).unwrap();
    daemon.replica(&["resync", "v"]).ok();
    let wait = || {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        stream
            .write_all(b"{\"request\":\"wait\",\"volume\":\"v\"}\n")
            .unwrap();
        stream
    };
    let waiting: Vec<UnixStream> = (0..70).map(|_| wait()).collect();
    daemon.replica(&["status"]).ok();
    let threads = || {
        let folder = format!("/proc/{}/task", daemon.pid());
        fs::read_dir(folder).unwrap().count()
    };
    until("all of them wait", Duration::from_secs(10), || {
        (threads() > 70).then_some(())
    });
    drop(waiting);
    until("they are forgotten", Duration::from_secs(10), || {
        (threads() < 40).then_some(())
    });
    daemon.replica(&["status"]).ok();
}

/// A daemon with one volume, and one hook that notes its phase and then runs `body`.
struct Quiesced {
    daemon: Daemon,
    notes: PathBuf,
    hook: PathBuf,
    place: Place,
    _disk: LoopDevice,
}

impl Quiesced {
    fn new(body: &str) -> Self {
        let place = Place::new();
        let store = place.folder("store");
        let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
        let (notes, hook) = (place.at("notes"), place.folder("hooks.d").join("app"));
        let script = format!("#!/bin/sh\necho $1 >> {}\n{body}\n", notes.display());
        let written = place.at("script");
        fs::write(&written, script).unwrap();
        // By another process: one of ours that has just forked would hold it open for writing.
        run(
            "install",
            ["-m755", written.to_str().unwrap(), hook.to_str().unwrap()],
        );
        let config = format!("hooks_dir = {:?}\n", place.at("hooks.d"));
        fs::write(place.at("agent.toml"), config).unwrap();
        let mut daemon = Daemon::start(&place);
        daemon.protect(&Volume {
            device: disk.path(),
            store: &store,
            name: "v",
            options: &["--every", "1h"],
        });
        Self {
            daemon,
            notes,
            hook,
            place,
            _disk: disk,
        }
    }

    /// Asks for a point in a thread of its own; returns when `pre` runs.
    fn begin_point(&self) -> std::thread::JoinHandle<Reply> {
        let socket = self.daemon.socket().to_str().unwrap().to_owned();
        let point = std::thread::spawn(move || {
            replica(&[
                "point",
                "v",
                "--consistency",
                "application",
                "--socket",
                &socket,
            ])
        });
        until("`pre` runs", Duration::from_secs(20), || {
            (self.notes() == "pre\n").then_some(())
        });
        point
    }

    fn notes(&self) -> String {
        fs::read_to_string(&self.notes).unwrap_or_default()
    }

    fn marks(&self) -> usize {
        let entries = fs::read_dir(self.place.path()).unwrap().flatten();
        entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("hooks-"))
            .count()
    }
}

#[test]
fn a_slow_hook_does_not_outlast_the_points_time() {
    let stage = Quiesced::new("[ $1 = post ] || sleep 60");
    let asked = Instant::now();
    let reply = stage.daemon.replica(&[
        "point",
        "v",
        "--consistency",
        "application",
        "--timeout",
        "2s",
    ]);
    reply.fails(1, &[stage.hook.to_str().unwrap(), "pre"]);
    assert!(
        asked.elapsed() < Duration::from_secs(5),
        "{:?}",
        asked.elapsed()
    );
    assert_eq!(stage.notes(), "pre\npost\n");
}

#[test]
fn ended_in_the_middle_of_a_point() {
    let mut stage = Quiesced::new("[ $1 = post ] || sleep 2");
    let point = stage.begin_point();
    assert!(stage.daemon.terminate().success());
    point.join().unwrap().ok();
    assert_eq!(stage.notes(), "pre\npost\n");
    assert_eq!(stage.marks(), 0);
}

#[test]
fn killed_in_the_middle_of_a_point() {
    let mut stage = Quiesced::new("[ $1 = post ] || sleep 2");
    let point = stage.begin_point();
    assert_eq!(stage.marks(), 1);
    stage.daemon.kill();
    point.join().unwrap().fails(1, &[]);
    assert_eq!(stage.notes(), "pre\n");
    stage.daemon.start_again();
    assert_eq!(stage.notes(), "pre\npost\n");
    assert_eq!(stage.marks(), 0);
    stage.daemon.point("v", &["--consistency", "application"]);
}

#[test]
fn a_daemon_that_says_nothing() {
    let place = Place::new();
    let socket = place.at("deaf.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let deaf = std::thread::spawn(move || {
        listener.accept().map(|it| {
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_secs(6));
                drop(it);
            })
        })
    });
    let asked = Instant::now();
    let args = [
        "point",
        "v",
        "--timeout",
        "1s",
        "--socket",
        socket.to_str().unwrap(),
    ];
    replica(&args).fails(1, &["did not answer", "replica status"]);
    assert!(asked.elapsed() < Duration::from_secs(5));
    drop(deaf.join());
}
