//! The main job on a virtio disk, on a kernel that a distribution ships: protect a disk in
//! use, make a point, restore it, compare. On the test bench only: `scripts/vm-test` boots
//! that kernel, with an empty disk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(dead_code, reason = "the stories beside use the rest of the stage")]

#[path = "../../libreplica/tests/rig/runner.rs"]
mod runner;
#[path = "live/stage/mod.rs"]
#[allow(unused_imports, reason = "as above")]
mod stage;

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use stage::{
    Bank, Daemon, Fio, LoopDevice, Mount, Place, Volume, assert_restores, check_filesystem, number,
    restore, until, write_random,
};

fn main() -> ExitCode {
    runner::run_on_the_bench(&[
        ("ext4_on_a_virtio_disk", ext4_on_a_virtio_disk),
        ("ext4_on_a_ublk_device", ext4_on_a_ublk_device),
        (
            "killed_under_load_a_ublk_device_loses_nothing",
            killed_under_load_a_ublk_device_loses_nothing,
        ),
        (
            "removed_under_load_a_ublk_device_leaves_nobody_waiting",
            removed_under_load_a_ublk_device_leaves_nobody_waiting,
        ),
    ])
}

/// Protects the virtio disk as `v` behind a ublk device; that device.
fn protect_by_ublk(daemon: &Daemon, store: &Path) -> String {
    stage::run("modprobe", ["ublk_drv"]);
    let to = store.to_str().unwrap();
    let what = ["protect", "/dev/vda", "--to", to, "--name", "v", "--wait"];
    let how = ["--capture", "ublk", "--every", "1s"];
    let device = daemon.replica(&[&what[..], &how].concat()).ok().to_owned();
    assert!(device.starts_with("/dev/ublkb"), "{device}");
    device
}

/// fio in a folder, every kind of write at once, each verified: small, of many sizes, not
/// aligned to anything and through the page cache, and forced to the disk one by one.
fn fio_mix(place: &Place, folder: &Path) -> Fio {
    let jobs = format!(
        "[global]
         directory={}\nrw=randwrite\nrandrepeat=0\nthread=1\nsize=3000k\nrate=256k
         verify=crc32c\nverify_backlog=16\nverify_fatal=1\nverify_state_save=0
         time_based=1\nruntime=600
         [small]\nbs=4k\ndirect=1\nioengine=libaio\niodepth=16
         [mixed]\nbsrange=4k-64k\ndirect=1\nioengine=libaio\niodepth=8\nserialize_overlap=1
         [unaligned]\nbs=3000\nioengine=psync\nfsync=8
         [forced]\nbs=8k\ndirect=1\nsync=dsync\nioengine=psync\n",
        folder.display()
    );
    Fio::run(place, &jobs)
}

/// Makes and removes files until told to stop, on a filesystem that discards what is freed.
fn churn(folder: &Path, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    let (file, stop) = (folder.join("churned"), Arc::clone(stop));
    std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            fs::write(&file, vec![9; 1 << 20]).unwrap();
            fs::File::open(&file).unwrap().sync_all().unwrap();
            fs::remove_file(&file).unwrap();
            std::thread::sleep(Duration::from_millis(500));
        }
    })
}

/// A random time up to `most`.
fn moment(most: Duration) -> Duration {
    let text = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
    most.mul_f64(f64::from(u32::from_str_radix(&text[..8], 16).unwrap()) / f64::from(u32::MAX))
}

/// The agent is killed again and again: its users wait for the next one, and lose nothing.
fn killed_under_load_a_ublk_device_loses_nothing() {
    let disk = Path::new("/dev/vda");
    let place = Place::new();
    let store = place.folder("store");
    let mut daemon = Daemon::start(&place);
    let device = protect_by_ublk(&daemon, &store);
    let mount = Mount::make("ext4", Path::new(&device), &place.at("mnt"));
    mount.remount("discard");
    // What the agent itself needs may not depend on it.
    let other = LoopDevice::new(&place, "other.img", 16 << 20);
    let behind = mount.at("store");
    let (other, behind) = (other.path().to_str().unwrap(), behind.to_str().unwrap());
    let refused = daemon.replica(&["protect", other, "--to", behind]);
    refused.fails(1, &["the store", "this agent serves", &device]);
    let stop = Arc::default();
    let churning = churn(mount.path(), &stop);
    let bank = Bank::open(mount.path());
    let mut fio = fio_mix(&place, mount.path());
    for kill in 1..=number("REPLICA_KILLS", 3) {
        let wait = moment(Duration::from_secs(3));
        println!("kill {kill} after {wait:?}");
        std::thread::sleep(wait);
        daemon.kill();
        std::thread::sleep(moment(Duration::from_millis(500)));
        let before = bank.acknowledged();
        daemon.start_again();
        until("I/O goes on", Duration::from_secs(120), || {
            (bank.acknowledged() > before).then_some(())
        });
        fio.assert_running();
    }
    daemon.until("it replicates", "v", |status| status["mode"] == "data");
    fio.stop();
    stop.store(true, Ordering::Relaxed);
    churning.join().unwrap();
    let transactions = bank.close();
    mount.unmount();
    let at_rest = daemon.point("v", &[]);
    daemon.assert_no_resync("v");
    assert_eq!(daemon.status("v")["address"], device.as_str());
    daemon.replica(&["unprotect", "v"]).ok();
    drop(daemon);

    let image = restore(&place, &store, "v", &at_rest);
    stage::run("cmp", [disk, &image]);
    check_filesystem("ext4", &image, &place, |mounted| {
        assert_eq!(Bank::check(mounted, &place), transactions);
    });
}

/// What is in the midst of writing gets errors, and ends.
fn removed_under_load_a_ublk_device_leaves_nobody_waiting() {
    let place = Place::new();
    let store = place.folder("store");
    let daemon = Daemon::start(&place);
    let device = protect_by_ublk(&daemon, &store);
    let load = |name: &str, how: &[&str]| {
        let mut fio = Command::new("fio");
        fio.args(["--rw=randrw", "--bs=4k", "--time_based", "--runtime=600"]);
        fio.args([&format!("--name={name}"), &format!("--filename={device}")]);
        fio.args(["--size=64m", "--allow_file_create=0"]).args(how);
        fio.stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        fio.spawn().unwrap()
    };
    let direct = ["--direct=1", "--ioengine=libaio", "--iodepth=32"];
    let mut running = [
        load("direct", &direct),
        load(
            "cached",
            &["--ioengine=psync", "--fsync=16", "--offset=64m"],
        ),
    ];
    let stat = format!("/sys/block/{}/stat", device.rsplit('/').next().unwrap());
    let written = || -> u64 {
        let stat = fs::read_to_string(&stat).unwrap();
        stat.split_whitespace().nth(4).unwrap().parse().unwrap()
    };
    until("the loads write", Duration::from_secs(60), || {
        (written() > 500).then_some(())
    });
    daemon.replica(&["unprotect", "v"]).ok();
    for fio in &mut running {
        let ended = until("the load ends", Duration::from_secs(60), || {
            fio.try_wait().unwrap()
        });
        assert!(!ended.success(), "it has noticed nothing");
    }
    assert!(!Path::new(&device).exists(), "{device} is left behind");
    let stuck = || -> Vec<String> {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let stats =
            processes.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
        let stuck = stats.filter(|stat| stat.contains(") D "));
        stuck.map(|stat| stat.chars().take(40).collect()).collect()
    };
    until(
        &format!("nobody waits: {:?}", stuck()),
        Duration::from_secs(20),
        || stuck().is_empty().then_some(()),
    );
    // The disk is free again, and whole.
    fs::File::options().write(true).open("/dev/vda").unwrap();
    write_random(Path::new("/dev/vda"), 1, 4);
}

/// The device's users go through the agent, which is killed under them, and stopped.
fn ext4_on_a_ublk_device() {
    let disk = Path::new("/dev/vda");
    let place = Place::new();
    let store = place.folder("store");
    let mut daemon = Daemon::start(&place);
    let device = protect_by_ublk(&daemon, &store);
    let mount = Mount::make("ext4", Path::new(&device), &place.at("mnt"));
    let bank = Bank::open(mount.path());
    let point = daemon.point("v", &["--consistency", "filesystem"]);
    let before = bank.acknowledged();
    daemon.kill();
    daemon.start_again();
    let after = bank.acknowledged();
    // Users waited, and go on.
    stage::until(
        "transactions go on",
        std::time::Duration::from_secs(60),
        || (bank.acknowledged() > after.max(before)).then_some(()),
    );
    daemon.until("it replicates", "v", |status| status["mode"] == "data");
    let status = daemon.status("v");
    assert_eq!(status["ublk"]["state"], "serving", "{status}");
    let granted = status["ublk"]["granted"].as_array().unwrap();
    assert!(
        granted.contains(&"user-recovery-reissue".into()),
        "{status}"
    );
    assert_eq!(status["address"], device.as_str());
    assert_eq!(status["counters"]["resyncs"], 0, "{status}");
    daemon.replica(&["unprotect", "v"]).fails(1, &["unmount"]);
    let under_load = daemon.point("v", &["--consistency", "crash"]);
    let transactions = bank.close();
    mount.unmount();
    let at_rest = daemon.point("v", &[]);
    daemon.replica(&["verify", "v"]).ok();
    daemon.terminate();
    daemon.start_again();
    daemon.until("it replicates", "v", |status| status["mode"] == "data");
    daemon.replica(&["unprotect", "v"]).ok();
    assert!(!Path::new(&device).exists(), "{device} is left behind");
    drop(daemon);

    assert_restores(&place, &store, "v", &at_rest, disk);
    for point in [point, under_load, at_rest] {
        let image = restore(&place, &store, "v", &point);
        check_filesystem("ext4", &image, &place, |mounted| {
            assert!(Bank::check(mounted, &place) <= transactions);
        });
    }
}

fn ext4_on_a_virtio_disk() {
    let disk = Path::new("/dev/vda");
    let place = Place::new();
    let store = place.folder("store");
    let mount = Mount::make("ext4", disk, &place.at("mnt"));
    let mut daemon = Daemon::start(&place);
    daemon.protect(&Volume {
        device: disk,
        store: &store,
        name: "vda",
        options: &[],
    });
    let bank = Bank::open(mount.path());
    let transactions = bank.acknowledged();
    let under_load = daemon.point("vda", &["--consistency", "filesystem"]);
    bank.close();
    mount.unmount();
    write_random(disk, 1, 40);
    let at_rest = daemon.point("vda", &[]);
    daemon.assert_no_resync("vda");
    daemon.unprotect("vda");
    drop(daemon);

    assert_restores(&place, &store, "vda", &at_rest, disk);
    let image = restore(&place, &store, "vda", &under_load);
    check_filesystem("ext4", &image, &place, |mounted| {
        assert!(Bank::check(mounted, &place) >= transactions);
    });
}
