//! A target that is slow, stalled or dead, while the device's users go on: none of their
//! writes waits for it. What memory has no room for goes to the spool; then capture knows less
//! and less, says so, and climbs back by itself. The image is equal in the end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::inline::{protect, qemu_io, restore};
use crate::stage::{Daemon, LoopDevice, MIB, Mount, Place, replica, until};

/// A volume of 64 MiB behind the NBD server of an agent that keeps at most 4 MiB in memory,
/// and its store on a filesystem that can be stalled.
struct Stage {
    daemon: Daemon,
    target: Mount,
    disk: LoopDevice,
    uri: String,
    place: Place,
    _target_disk: LoopDevice,
}

impl Drop for Stage {
    fn drop(&mut self) {
        // A daemon whose store is stalled cannot even be killed.
        self.target.thaw();
    }
}

impl Stage {
    fn new(options: &[&str]) -> Self {
        let place = Place::new();
        fs::write(place.at("agent.toml"), "buffer = \"4MiB\"\n").unwrap();
        let target_disk = LoopDevice::new(&place, "target.img", 1024 * MIB);
        let target = Mount::make("ext4", target_disk.path(), &place.at("target"));
        fs::create_dir(target.at("store")).unwrap();
        let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
        let mut daemon = Daemon::start(&place);
        let options = [&["--every", "1h"][..], options].concat();
        let uri = protect(&mut daemon, &disk, &target.at("store"), &options);
        daemon.until("it records data", "v", |status| status["mode"] == "data");
        Self {
            daemon,
            target,
            disk,
            uri,
            place,
            _target_disk: target_disk,
        }
    }

    fn store(&self) -> PathBuf {
        self.target.at("store")
    }

    /// Writes `count` blocks of 4 KiB, each `step` bytes behind the one before.
    #[track_caller]
    fn write(&self, from: u64, count: u64, step: u64) {
        self.write_numbers(from, 0..count, step);
    }

    #[track_caller]
    fn write_numbers(&self, from: u64, numbers: std::ops::Range<u64>, step: u64) {
        let commands: Vec<String> = numbers
            .map(|n| format!("write -q -P {} {} 4k", n % 251 + 1, from + n * step))
            .collect();
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        qemu_io(&self.uri, &commands);
    }

    /// The same, no faster than the spool takes it, however busy the machine is.
    #[track_caller]
    fn write_at_ease(&self, from: u64, count: u64, step: u64) {
        for first in (0..count).step_by(300) {
            self.write_numbers(from, first..(first + 300).min(count), step);
            self.daemon.until("it is spooled", "v", |status| {
                status["buffered_bytes"].as_u64() <= Some(5 << 19)
            });
        }
    }

    /// The modes that capture has been in, and why.
    fn modes(&self) -> Vec<(String, String)> {
        let status = self.daemon.status("v");
        let changes = status["mode_changes"].as_array().unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        changes
            .iter()
            .map(|change| (text(&change["mode"]), text(&change["cause"])))
            .collect()
    }

    /// Nothing is missing, and everything up to now is in the store.
    #[track_caller]
    fn assert_equal_in_the_end(&self) -> Value {
        let status = self.daemon.until("it has caught up", "v", |status| {
            status["mode"] == "data"
                && status["state"] == "replicating"
                && status["spooled_bytes"] == 0
        });
        self.daemon
            .replica(&["point", "v", "--timeout", "60s"])
            .ok();
        self.daemon.replica(&["verify", "v"]).ok();
        let image = restore(&self.store(), "latest", &self.place.at("restored.img"));
        assert!(image == fs::read(self.disk.file()).unwrap());
        replica(&["store", "check", self.store().to_str().unwrap()]).ok();
        status
    }
}

/// How many threads of a process cannot be woken: they wait for a disk.
fn stuck_threads(pid: i32) -> usize {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let stats = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
    stats
        .filter(|stat| {
            stat.rsplit_once(") ")
                .is_some_and(|(_, rest)| rest.starts_with('D'))
        })
        .count()
}

#[test]
fn a_stalled_target_stalls_nobody_and_its_spool_brings_every_moment() {
    let mut stage = Stage::new(&[]);
    stage.target.freeze();
    // Five times the memory.
    stage.write_at_ease(0, 5000, 8192);
    let after = now();
    std::thread::sleep(Duration::from_millis(20));
    let status = stage.daemon.until("it spools", "v", |status| {
        status["spooled_bytes"].as_u64() > Some(8 << 20)
    });
    assert_eq!(status["mode"], "data", "{status}");
    assert!(status["buffered_bytes"].as_u64().unwrap() <= 4 << 20);
    // The volume's own thread waits for the target, and nobody else.
    let stuck = stuck_threads(stage.daemon.pid().as_raw());
    assert!(stuck <= 1, "{stuck} threads wait for the target");
    let spool = stage.daemon.state().join("spool");
    let spool = fs::read_dir(&spool)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    assert!(fs::read_dir(&spool).unwrap().count() > 2);

    stage.write_at_ease(MIB, 1000, 4096);
    stage.target.thaw();
    let status = stage.assert_equal_in_the_end();
    assert_eq!(status["counters"]["resyncs"], 0);
    assert_eq!(fs::read_dir(&spool).unwrap().count(), 0);
    // It was data mode all the time: each moment comes back.
    let windows = stage.daemon.replica(&["points", "v", "--json"]).json();
    assert_eq!(windows["windows"].as_array().unwrap().len(), 1, "{windows}");
    let image = restore(&stage.store(), &after, &stage.place.at("then.img"));
    for n in 0..5000_u64 {
        let byte = image[(n * 8192) as usize];
        assert_eq!(u64::from(byte), n % 251 + 1, "block {n}");
    }
    assert!(
        image[MIB as usize + 4096..][..4096]
            .iter()
            .all(|byte| *byte == 0)
    );
    stage.daemon.terminate();
    assert!(!spool.exists(), "the spool is left behind");
}

fn now() -> String {
    let output = Command::new("date")
        .args(["-u", "+%Y-%m-%dT%H:%M:%S.%NZ"])
        .output();
    String::from_utf8(output.unwrap().stdout)
        .unwrap()
        .trim()
        .to_owned()
}

#[test]
fn without_a_spool_capture_falls_to_extents_and_climbs_back() {
    let place = Place::new();
    // A spool without room: nothing is written to one whose file system is nearly full.
    let full = Mount::memory(&place.at("full"), 8 * MIB);
    fs::write(full.at("filler"), vec![1; 8 << 20]).unwrap();
    let stage = Stage::new(&["--spool", full.path().to_str().unwrap()]);
    stage.target.freeze();
    stage.write(0, 5000, 8192);
    let status = stage.daemon.status("v");
    assert_eq!(status["mode"], "metadata", "{status}");
    let cause = status["mode_cause"].as_str().unwrap();
    assert!(cause.contains("buffer is full"), "{cause}");
    assert!(cause.contains("the spool cannot be used"), "{cause}");
    stage.target.thaw();
    let status = stage.assert_equal_in_the_end();
    assert_eq!(status["counters"]["resyncs"], 0);
    let modes = stage.modes();
    let modes: Vec<&str> = modes
        .iter()
        .rev()
        .take(2)
        .map(|(mode, _)| mode.as_str())
        .collect();
    assert_eq!(modes, ["data", "metadata"]);
    let log = stage.daemon.log_text();
    assert!(log.contains("capture falls to metadata mode"), "{log}");
    // What came before the gap can be gone back to, and what came after.
    let windows = stage.daemon.replica(&["points", "v", "--json"]).json();
    assert!(
        windows["windows"].as_array().unwrap().len() > 1,
        "{windows}"
    );
    drop(stage);
    drop(full);
}

#[test]
fn a_spool_of_half_the_volume_ends_in_a_resync() {
    let stage = Stage::new(&[]);
    stage.target.freeze();
    // More than once: 80 MiB in all.
    for _ in 0..5 {
        stage.write_at_ease(0, 4096, 4096);
    }
    let status = stage.daemon.until("the spool is given up", "v", |status| {
        status["mode"] == "bitmap"
    });
    let cause = status["mode_cause"].as_str().unwrap();
    assert!(cause.contains("half of the volume"), "{cause}");
    assert_eq!(status["spooled_bytes"], 0);
    stage.target.thaw();
    let status = stage.assert_equal_in_the_end();
    assert_eq!(status["counters"]["resyncs"], 1);
    let cause = status["last_resync"]["cause"].as_str().unwrap();
    assert!(cause.contains("half of the volume"), "{cause}");
}

#[test]
fn a_target_that_dies_and_comes_back_lacks_nothing_of_the_stream() {
    let stage = Stage::new(&[]);
    stage.write_at_ease(0, 100, 8192);
    let away = stage.target.at("away");
    fs::rename(stage.store(), &away).unwrap();
    stage.write_at_ease(MIB, 3000, 8192);
    stage.daemon.until("it is degraded", "v", |status| {
        status["state"] == "degraded"
    });
    stage.write_at_ease(MIB + 4096, 3000, 8192);
    let status = stage.daemon.until("it spools", "v", |status| {
        status["spooled_bytes"].as_u64() > Some(8 << 20)
    });
    assert_eq!(status["mode"], "data", "{status}");
    fs::rename(&away, stage.store()).unwrap();
    let status = stage.assert_equal_in_the_end();
    assert_eq!(status["counters"]["resyncs"], 0);
    let windows = stage.daemon.replica(&["points", "v", "--json"]).json();
    assert_eq!(windows["windows"].as_array().unwrap().len(), 1, "{windows}");
}

#[test]
fn a_paused_volume_spools_and_ends_without_its_spool_when_killed() {
    let mut stage = Stage::new(&[]);
    stage.daemon.replica(&["pause", "v"]).ok();
    stage.write(0, 3000, 8192);
    stage.daemon.until("it spools", "v", |status| {
        status["spooled_bytes"].as_u64() > Some(4 << 20)
    });
    // Paused is paused, at the end as well.
    let epoch = stage.daemon.status("v")["epoch"].clone();
    stage.daemon.terminate();
    stage.daemon.start_again();
    assert_eq!(stage.daemon.status("v")["epoch"], epoch);
    stage.write(0, 3000, 8192);
    stage.daemon.kill();
    stage.daemon.start_again();
    let status = stage.daemon.status("v");
    assert_eq!(
        (&status["spooled_bytes"], &status["state"]),
        (&0.into(), &"paused".into())
    );
    stage.write(4096, 100, 8192);
    stage.daemon.replica(&["resume", "v"]).ok();
    let status = stage.assert_equal_in_the_end();
    assert_eq!(status["counters"]["resyncs"], 0, "{status}");
}

#[test]
fn an_encrypted_volume_spools_nothing_that_can_be_read() {
    let key = Place::new();
    fs::write(key.at("key"), [7; 32]).unwrap();
    let stage = Stage::new(&["--key-file", key.at("key").to_str().unwrap()]);
    stage.target.freeze();
    let commands: Vec<String> = (0..3000_u64)
        .map(|n| format!("write -q -P 0x5a {} 4k", n * 8192))
        .collect();
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    qemu_io(&stage.uri, &commands);
    stage.daemon.until("it spools", "v", |status| {
        status["spooled_bytes"].as_u64() > Some(4 << 20)
    });
    for file in fs::read_dir(stage.daemon.state().join("spool")).unwrap() {
        for log in fs::read_dir(file.unwrap().path()).unwrap() {
            let bytes = fs::read(log.unwrap().path()).unwrap();
            assert!(!bytes.windows(64).any(|window| window == [0x5a; 64]));
        }
    }
    stage.target.thaw();
    stage.daemon.until("it has caught up", "v", |status| {
        status["mode"] == "data" && status["spooled_bytes"] == 0
    });
    stage
        .daemon
        .replica(&["point", "v", "--timeout", "60s"])
        .ok();
    stage.daemon.replica(&["verify", "v"]).ok();
}

/// Freezes and thaws a filesystem by turns until dropped.
struct Slow(Child, PathBuf);

impl Slow {
    fn new(at: &Path) -> Self {
        let script =
            "while :; do fsfreeze -f \"$0\"; sleep 0.2; fsfreeze -u \"$0\"; sleep 0.02; done";
        let child = Command::new("sh")
            .arg("-c")
            .arg(script)
            .arg(at)
            .stdin(Stdio::null())
            .spawn();
        Self(child.unwrap(), at.to_owned())
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        // It may have been killed in the middle of a freeze that somebody goes on with.
        until("it thaws", Duration::from_secs(5), || {
            let thawed = Command::new("fsfreeze")
                .arg("-u")
                .arg(&self.1)
                .stderr(Stdio::null())
                .status();
            (!thawed.unwrap().success()).then_some(())
        });
    }
}

#[test]
fn a_slow_target_slows_nobody_down() {
    let stage = Stage::new(&[]);
    let slow = Slow::new(stage.target.path());
    let began = Instant::now();
    for round in 0..4 {
        stage.write(round * 4096, 2000, 16384);
    }
    let took = began.elapsed();
    drop(slow);
    let status = stage.assert_equal_in_the_end();
    // Said, not asserted: a clock does not decide a test.
    eprintln!(
        "8000 writes beside a slow target took {took:?}: {}",
        status["mode_changes"]
    );
}

/// Ended while what waits does not fit into the store: nothing that was read is taken for
/// shipped.
#[test]
fn ended_while_the_store_is_too_small_it_loses_nothing() {
    let place = Place::new();
    let memory = Mount::memory(&place.at("memory"), 100 * MIB);
    let disk = LoopDevice::new(&place, "disk.img", 192 * MIB);
    let mut daemon = Daemon::start(&place);
    let store = memory.at("store");
    let uri = protect(&mut daemon, &disk, &store, &["--every", "1h"]);
    // The end comes while it ships, before the store is full; what it has not read by then
    // would fit into the store.
    for wait in [5, 35, 80] {
        daemon.replica(&["pause", "v"]).ok();
        let commands = (0..124).map(|n| format!("write -q -P {} {n}M 1M", wait % 256));
        let commands: Vec<String> = commands.collect();
        qemu_io(
            &uri,
            &commands.iter().map(String::as_str).collect::<Vec<_>>(),
        );
        daemon.replica(&["resume", "v"]).ok();
        std::thread::sleep(Duration::from_millis(wait));
        daemon.terminate();
        daemon.start_again();
    }
    memory.remount("size=600m");
    daemon.until("it has caught up", "v", |status| {
        status["mode"] == "data" && status["state"] == "replicating" && status["dirty_bytes"] == 0
    });
    daemon.replica(&["point", "v", "--timeout", "60s"]).ok();
    daemon.replica(&["verify", "v"]).ok();
    let image = restore(&store, "latest", &place.at("restored.img"));
    assert!(
        image == fs::read(disk.file()).unwrap(),
        "changes are missing"
    );
    drop(daemon);
}
