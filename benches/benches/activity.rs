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
use std::time::{Duration, Instant};

use libreplica::capture::inline::{Cookie, Durability, Event, Lane, Request, Service};
use libreplica::sys::memory::AlignedMemory;
use libreplica::sys::uring::Part;
use libreplica::units::{ByteLen, ByteOffset, Extent};
use replica_bench::Numbers;
use replica_bench::inline::{LoopDevice, spec};

const GIB: u64 = 1 << 30;
const SIZE: u64 = 16 * GIB;
const DEPTH: u64 = 32;
const TIME: Duration = Duration::from_secs(5);

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
        let memory = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        memory.as_file().set_len(SIZE).unwrap();
        let disk = LoopDevice::over(memory.path(), &[]);
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

fn measure(disk: &LoopDevice, state: &Path, over: u64) {
    let spec = spec(disk.path(), state, ByteLen::new(1 << 20));
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
