//! The ublk front beside the kernel's loop device: both serve the same memory disk, in one run,
//! to the same fio. Ours tracks and records meanwhile: data mode, the backlog taken by a
//! thread. As root, on a kernel with ublk: `scripts/vm-bench ublk` has one.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a bench that cannot run shall say so and end"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use libreplica::capture::inline::Service;
use libreplica::capture::ublk::{How, UblkDevice, UblkSpec};
use libreplica::units::ByteLen;
use replica_bench::inline::{self, LoopDevice};

const MEMORY: &str = "/dev/ram0";
const MEMORY_KIB: u64 = 256 << 10;
const ROUNDS: usize = 5;
const SECONDS: u32 = 3;

/// A name, and what fio is told.
const LOADS: [(&str, [&str; 3]); 4] = [
    (
        "4 KiB random writes, 32 under way",
        ["--rw=randwrite", "--bs=4k", "--iodepth=32"],
    ),
    (
        "4 KiB random writes, 1 under way",
        ["--rw=randwrite", "--bs=4k", "--iodepth=1"],
    ),
    (
        "4 KiB random reads, 32 under way",
        ["--rw=randread", "--bs=4k", "--iodepth=32"],
    ),
    (
        "1 MiB ascending writes, 4 under way",
        ["--rw=write", "--bs=1m", "--iodepth=4"],
    ),
];

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// Requests a second.
fn load(device: &Path, how: &[&str]) -> f64 {
    let (file, time) = (
        format!("--filename={}", device.display()),
        format!("--runtime={SECONDS}"),
    );
    let common = ["--name=load", "--ioengine=io_uring", "--direct=1"];
    let more = ["--time_based", "--randrepeat=0", "--minimal", &file, &time];
    let report = run("fio", &[&common[..], how, &more].concat());
    let fields: Vec<&str> = report.trim().split(';').collect();
    // Terse output, version 3: requests a second of reads, and of writes.
    [7, 48]
        .map(|n| fields[n].parse::<f64>().unwrap())
        .into_iter()
        .sum()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Memory as a disk, without a file system below it; given back when dropped.
struct MemoryDisk;

impl MemoryDisk {
    fn new() -> Self {
        let size = format!("rd_size={MEMORY_KIB}");
        run("modprobe", &["brd", "rd_nr=1", &size]);
        Self
    }
}

impl Drop for MemoryDisk {
    fn drop(&mut self) {
        let _ = Command::new("modprobe").args(["-r", "brd"]).status();
    }
}

fn main() {
    let there = Command::new("modprobe").arg("ublk_drv").output();
    if !there.is_ok_and(|output| output.status.success()) {
        println!("the kernel has no ublk: see the head of benches/benches/ublk.rs");
        return;
    }
    let _memory = MemoryDisk::new();
    let folder = tempfile::tempdir().unwrap();
    let bytes = ByteLen::new(256 << 20);
    println!("| requests a second | loop device | ours, recording | ratio |");
    println!("| --- | --- | --- | --- |");
    let mut found = LOADS.map(|_| [Vec::new(), Vec::new()]);
    for _ in 0..ROUNDS {
        // Ours claims the disk: one after the other.
        let looped = LoopDevice::over(Path::new(MEMORY), &["--direct-io=on"]);
        for ((_, how), found) in LOADS.iter().zip(&mut found) {
            found[0].push(load(looped.path(), how));
        }
        drop(looped);
        let spec = inline::spec(Path::new(MEMORY), folder.path(), bytes);
        let (service, _) = Service::start(&spec).unwrap();
        inline::record(&service);
        let spec = UblkSpec::new(inline::VOLUME);
        let device = UblkDevice::start(service.entrance(), &spec).unwrap();
        let node: PathBuf = device.path().to_owned();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    inline::take(&service);
                }
            });
            for ((_, how), found) in LOADS.iter().zip(&mut found) {
                found[1].push(load(&node, how));
            }
            stop.store(true, Ordering::Relaxed);
        });
        device.stop(How::Remove).unwrap();
        service.stop();
    }
    for ((name, _), [looped, ours]) in LOADS.iter().zip(&mut found) {
        let (looped, ours) = (median(looped), median(ours));
        println!(
            "| {name} | {looped:.0} | {ours:.0} | {:.2} |",
            ours / looped
        );
    }
}
