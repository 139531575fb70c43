//! What the activity log costs: 4 KiB writes at random over a part of a device, 32 under way;
//! how many transactions that makes, and what one takes, which is a durable write of 4 KiB to
//! the state folder. The device is a loop device over memory, so that the log is seen at its
//! worst; the state folder is on a disk, in `REPLICA_TMP` or /var/tmp. As root.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a bench that cannot run shall say so and end"
)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libreplica::capture::inline::{
    Budget, Cookie, Durability, Event, InlineSpec, Lane, Limits, Request, Service,
};
use libreplica::device::BlockDevice;
use libreplica::id::VolumeId;
use libreplica::sys::memory::AlignedMemory;
use libreplica::sys::uring::Part;
use libreplica::units::{BlockSize, ByteLen, ByteOffset, Extent};
use replica_bench::Numbers;

const GIB: u64 = 1 << 30;
const SIZE: u64 = 16 * GIB;
const DEPTH: u64 = 32;
const TIME: Duration = Duration::from_secs(5);

/// A loop device over a file in memory, detached when dropped.
struct Disk(String);

impl Disk {
    fn new(folder: &Path) -> Self {
        let file = folder.join("disk");
        File::create(&file).unwrap().set_len(SIZE).unwrap();
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show"]).arg(file);
        let output = losetup.output().unwrap();
        assert!(output.status.success(), "losetup: run this as root");
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

fn main() {
    let parent = std::env::var_os("REPLICA_TMP").unwrap_or_else(|| "/var/tmp".into());
    let folder = tempfile::tempdir_in(parent).unwrap();
    println!(
        "a durable write of 4 KiB: {} us (median)",
        one_write(folder.path())
    );
    println!(
        "over, GiB | writes/s | transactions/s | writes for a transaction | writes that waited"
    );
    for over in [1, 4, 5, 8, 16] {
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let disk = Disk::new(memory.path());
        let state = tempfile::tempdir_in(folder.path()).unwrap();
        measure(&disk, state.path(), over);
    }
}

/// What a transaction does.
fn one_write(folder: &Path) -> u128 {
    let file = File::create(folder.join("one")).unwrap();
    file.write_all_at(&[0; 8192], 0).unwrap();
    file.sync_all().unwrap();
    let mut took: Vec<_> = (0..201_u64)
        .map(|n| {
            let began = Instant::now();
            file.write_all_at(&[n as u8; 4096], n % 2 * 4096).unwrap();
            file.sync_data().unwrap();
            began.elapsed().as_micros()
        })
        .collect();
    took.sort_unstable();
    took[took.len() / 2]
}

fn measure(disk: &Disk, state: &Path, over: u64) {
    let bytes = ByteLen::new(1 << 20);
    let spec = InlineSpec {
        folder: state.to_owned(),
        volume: VolumeId::from_bytes([7; 16]),
        disk: BlockDevice::open(&disk.0).unwrap(),
        block: BlockSize::MIN,
        limits: Limits {
            bytes,
            extents: 1000,
            shared: Arc::new(Budget::new(bytes)),
        },
    };
    let (service, _) = Service::start(&spec).unwrap();
    let mut lane = service.lane(DEPTH as u32).unwrap();
    let mut numbers = Numbers::default();
    for _ in 0..DEPTH {
        begin(&mut lane, &mut numbers, over);
    }
    // The first second fills the log; it is not counted.
    run(&mut lane, &mut numbers, over, Duration::from_secs(1));
    let (before, began) = (service.counters(), Instant::now());
    run(&mut lane, &mut numbers, over, TIME);
    let (after, took) = (service.counters(), began.elapsed().as_secs_f64());
    let writes = (after.changes - before.changes) as f64;
    let transactions = (after.transactions - before.transactions) as f64;
    println!(
        "{over:9} | {:8.0} | {:14.1} | {:24.0} | {:.1} %",
        writes / took,
        transactions / took,
        writes / transactions,
        100.0 * (after.waited - before.waited) as f64 / writes,
    );
    drop(lane);
    service.stop();
}

fn run(lane: &mut Lane, numbers: &mut Numbers, over: u64, time: Duration) {
    let began = Instant::now();
    while began.elapsed() < time {
        lane.turn().unwrap();
        while let Some(event) = lane.event() {
            let Event::Done(done) = event else {
                continue;
            };
            done.result.unwrap();
            begin(lane, numbers, over);
        }
    }
}

fn begin(lane: &mut Lane, numbers: &mut Numbers, over: u64) {
    let memory = AlignedMemory::new(4096).unwrap();
    let block = (numbers.next().unwrap() >> 8) % (over * GIB / 4096);
    let extent = Extent::new(ByteOffset::new(block * 4096), ByteLen::new(4096)).unwrap();
    let request = Request::Write {
        from: Part::first(memory, 4096),
        extent,
        durability: Durability::Cached,
    };
    lane.begin(Cookie(1), request);
}
