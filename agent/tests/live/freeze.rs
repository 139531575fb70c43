//! Freezes that go wrong: a mount that somebody else has frozen, and an agent that dies,
//! with its whole cgroup, while it holds a filesystem frozen. The machine must go on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::stage::{
    Bank, Daemon, LoopDevice, MIB, Mount, Place, Volume, assert_restores, check_filesystem, number,
    restore, until,
};

#[test]
fn a_mount_that_somebody_else_froze() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 100 * MIB);
    let mount = Mount::make("ext4", disk.path(), &place.at("mnt"));
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1h"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });

    fs::write(mount.at("file"), "before").unwrap();
    mount.sync();
    mount.freeze();
    let at = mount.path().to_str().unwrap();
    daemon
        .replica(&["point", "v", "--timeout", "20s"])
        .fails(1, &["frozen", at]);
    let status = daemon.status("v");
    assert!(
        status["counters"]["points_failed"].as_u64().unwrap() >= 1,
        "{status}"
    );
    assert!(
        status["last_error"]["message"]
            .as_str()
            .unwrap()
            .contains(at),
        "{status}"
    );
    assert!(mount.thaw(), "it was not ours to thaw");

    daemon.until("it recovers", "v", |status| {
        status["state"] == "replicating"
    });
    let point = daemon.point("v", &[]);
    daemon.unprotect("v");
    mount.unmount();
    drop(disk);
    let image = restore(&place, &store, "v", &point);
    check_filesystem("ext4", &image, &place, |mounted| {
        assert_eq!(fs::read_to_string(mounted.join("file")).unwrap(), "before");
    });
}

/// A control group of our own; its processes are killed all at once.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(place: &Place) -> Self {
        let unified = Path::new("/sys/fs/cgroup/unified");
        let top = if unified.exists() {
            unified
        } else {
            Path::new("/sys/fs/cgroup")
        };
        let group = top.join(place.path().file_name().unwrap());
        fs::create_dir(&group).unwrap();
        Self(group)
    }

    fn add(&self, pid: nix::unistd::Pid) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    fn kill(&self) {
        fs::write(self.0.join("cgroup.kill"), "1").unwrap();
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// Whether a write to the mount gets through within `limit`. A frozen mount blocks its
/// writer, so the write is another process's.
fn writable(mount: &Mount, limit: Duration) -> bool {
    let file = mount.at("probe");
    let limit = format!("{}", limit.as_secs_f64());
    let write = ["--signal=KILL", &limit, "touch", file.to_str().unwrap()];
    Command::new("timeout")
        .args(write)
        .status()
        .unwrap()
        .success()
}

#[test]
fn the_whole_cgroup_is_killed_during_a_freeze() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 200 * MIB);
    let mount = Mount::make("ext4", disk.path(), &place.at("mnt"));
    let cgroup = Cgroup::new(&place);
    let mut daemon = Daemon::start(&place);
    cgroup.add(daemon.pid());
    let options = ["--every", "1h"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    let bank = Bank::open(mount.path());

    let (mut frozen, mut tried) = (0, 0);
    let wanted = number("REPLICA_KILLS", 3).div_ceil(3);
    while frozen < wanted {
        tried += 1;
        assert!(
            tried <= 20 * wanted,
            "in {tried} points, {frozen} kills hit a freeze"
        );
        if killed_in_a_freeze(&mut daemon, &cgroup) {
            frozen += 1;
        }
        let limit = Duration::from_secs(10);
        until("the mount takes writes", limit, || {
            writable(&mount, Duration::from_secs(1)).then_some(())
        });
        daemon.start_again();
        cgroup.add(daemon.pid());
        daemon.until("it replicates", "v", |status| {
            status["state"] == "replicating"
        });
        daemon.assert_no_resync("v");
    }
    println!("{frozen} of {tried} kills hit a freeze");
    bank.close();
    mount.unmount();
    let last = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &last, disk.path());
}

/// Asks for a point and kills the daemon's cgroup as soon as a freeze is marked; whether
/// the mount was frozen then. The watchdog, which is not of that cgroup, says so when it
/// has thawed it.
fn killed_in_a_freeze(daemon: &mut Daemon, cgroup: &Cgroup) -> bool {
    let thawed = |daemon: &Daemon| daemon.log_text().matches("died during a freeze").count();
    let before = thawed(daemon);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asked: &Daemon = daemon;
        scope.spawn(|| {
            // It fails if the daemon dies under it; both are well.
            asked.replica(&["point", "v", "--timeout", "20s"]);
            over.store(true, Ordering::SeqCst);
        });
        let started = Instant::now();
        while !over.load(Ordering::SeqCst) && started.elapsed() < Duration::from_secs(20) {
            if freeze_is_marked(asked) {
                break;
            }
        }
        cgroup.kill();
    });
    daemon.died();
    let killed = Instant::now();
    while thawed(daemon) == before && killed.elapsed() < Duration::from_millis(500) {
        std::thread::sleep(Duration::from_millis(10));
    }
    thawed(daemon) > before
}

/// Whether the daemon has left word beside its socket that it holds a mount frozen.
fn freeze_is_marked(daemon: &Daemon) -> bool {
    let mark = format!("frozen-{}-", daemon.pid());
    let marks = fs::read_dir(daemon.socket().parent().unwrap()).unwrap();
    marks.flatten().any(|entry| {
        entry.file_name().to_string_lossy().starts_with(&mark)
            && entry.metadata().is_ok_and(|meta| meta.len() > 0)
    })
}
