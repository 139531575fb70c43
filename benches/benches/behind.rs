//! What a stalled target costs the protected machine: the latency of 4 KiB random writes to a
//! volume that the agent serves over NBD, with a healthy store and with one whose filesystem is
//! frozen, by turns in one run. While it is stalled, changes wait in memory and in the spool.
//! Prints medians of the rounds. As root; a release build of the agent (`make build`) must be
//! there, or named by `REPLICA_BIN`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a bench that cannot run shall say so and end"
)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const ROUNDS: usize = 5;
const VOLUME_MIB: u64 = 1024;
const STORE_MIB: u64 = 8192;
/// Writes a second: a busy machine, and not one that does nothing else.
const RATE: u32 = 5000;
const SECONDS: u32 = 5;

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn loop_device(file: &Path, mib: u64) -> String {
    File::create(file).unwrap().set_len(mib << 20).unwrap();
    run("losetup", &["--find", "--show", file.to_str().unwrap()])
}

/// A volume, a store on a filesystem of its own, and a daemon; gone when dropped.
struct Stage {
    folder: tempfile::TempDir,
    devices: Vec<String>,
    daemon: Child,
    uri: String,
}

impl Stage {
    fn new(binary: &Path) -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let at = |name: &str| folder.path().join(name);
        let volume = loop_device(&at("volume.img"), VOLUME_MIB);
        let store = loop_device(&at("store.img"), STORE_MIB);
        run("mkfs.ext4", &["-q", &store]);
        let target = at("target");
        fs::create_dir(&target).unwrap();
        run("mount", &[&store, target.to_str().unwrap()]);
        let log = File::create(at("log")).unwrap();
        let command = |args: &[&str]| {
            let mut command = Command::new(binary);
            command.args(args).stdin(Stdio::null());
            command.env("REPLICA_STATE_DIR", at("state"));
            command.env("REPLICA_SOCKET", at("agent.sock"));
            command
        };
        let daemon = command(&["run"]).stderr(log).spawn().unwrap();
        while !at("agent.sock").exists() {
            std::thread::sleep(Duration::from_millis(20));
        }
        let to = target.join("store");
        let mut protect = command(&["protect", &volume, "--to", to.to_str().unwrap()]);
        protect.args(["--capture", "nbd", "--every", "1h", "--wait"]);
        let output = protect.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        let uri = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        Self {
            folder,
            devices: vec![volume, store],
            daemon,
            uri,
        }
    }

    fn target(&self, freeze_or_thaw: &str) {
        let target = self.folder.path().join("target");
        let args = [freeze_or_thaw, target.to_str().unwrap()];
        let _ = Command::new("fsfreeze")
            .args(args)
            .stderr(Stdio::null())
            .status();
    }

    /// The median and the 99th percentile of the writes' latency, in nanoseconds.
    fn write(&self) -> [u64; 2] {
        let jobs = format!(
            "[writes]\nioengine=nbd\nuri={}\nrw=randwrite\nrandrepeat=0\nbs=4k\niodepth=8\n\
             rate_iops={RATE}\ntime_based=1\nruntime={SECONDS}\nsize={VOLUME_MIB}m\n",
            self.uri
        );
        let file = self.folder.path().join("jobs");
        fs::write(&file, jobs).unwrap();
        let report = run("fio", &["--output-format=json", file.to_str().unwrap()]);
        let percentile = |name: &str| {
            let key = format!("\"{name}\" : ");
            report
                .split(&key)
                .skip(1)
                .map(|rest| rest[..rest.find([',', '\n']).unwrap()].parse().unwrap())
                .max()
                .unwrap()
        };
        ["50.000000", "99.000000"].map(percentile)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.target("--unfreeze");
        let _ = Command::new("kill")
            .arg(self.daemon.id().to_string())
            .status();
        let _ = self.daemon.wait();
        let target = self.folder.path().join("target");
        let _ = Command::new("umount").arg(target).status();
        for device in &self.devices {
            let _ = Command::new("losetup").args(["--detach", device]).status();
        }
    }
}

fn median(values: &mut [u64]) -> f64 {
    values.sort_unstable();
    values[values.len() / 2] as f64 / 1000.0
}

fn main() {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/replica");
    let binary = std::env::var_os("REPLICA_BIN").map_or_else(built, PathBuf::from);
    assert!(
        binary.exists(),
        "there is no {}: `make build`",
        binary.display()
    );
    let stage = Stage::new(&binary);
    let mut found = [[0; 2]; 2].map(|pair| pair.map(|_: u64| Vec::new()));
    for _ in 0..ROUNDS {
        for (of, how) in [(0, "--unfreeze"), (1, "--freeze")] {
            stage.target(how);
            for (values, value) in found[of].iter_mut().zip(stage.write()) {
                values.push(value);
            }
        }
    }
    println!("| a 4 KiB write, 8 under way, {RATE} a second | healthy | stalled | ratio |");
    println!("| --- | --- | --- | --- |");
    let [mut healthy, mut stalled] = found;
    for (n, name) in ["median", "p99"].into_iter().enumerate() {
        let (healthy, stalled) = (median(&mut healthy[n]), median(&mut stalled[n]));
        println!(
            "| {name} | {healthy:.0} µs | {stalled:.0} µs | {:.2} |",
            stalled / healthy
        );
    }
}
