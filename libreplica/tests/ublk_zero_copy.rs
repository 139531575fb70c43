//! The ublk front where the kernel lends it the pages of requests (6.16): what is not recorded
//! is not copied, and is on the disk all the same; what is recorded is copied, whatever the mode
//! was when it was asked for. On the test bench only (`scripts/vm-test`), on a kernel that can.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod devices;
#[path = "rig/runner.rs"]
mod runner;
mod ublk_rig;

use std::fs::{self, File, OpenOptions};
use std::io::IoSlice;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use devices::{Loop, MIB, StopAtEnd, cases, open_direct, run};
use libreplica::capture::inline::{Blocks, Moment, Service};
use libreplica::capture::ublk::{Copying, How, Started, Uncopied};
use libreplica::geometry::BlockNumber;
use libreplica::policy::Mode;
use libreplica::sys::memory::AlignedMemory;
use ublk_rig::{Fio, Front, climb, content, flushes, next_cut, replay, take_all, wait};

fn main() -> ExitCode {
    runner::run_on_the_bench(&[
        (
            "what_is_not_recorded_is_not_copied",
            what_is_not_recorded_is_not_copied,
        ),
        (
            "each_write_that_is_not_copied_ends_as_it_was_asked_for",
            each_write_that_is_not_copied_ends_as_it_was_asked_for,
        ),
        (
            "who_takes_a_device_over_chooses_anew",
            who_takes_a_device_over_chooses_anew,
        ),
        (
            "a_thread_that_fails_with_pages_in_hand_is_replaced",
            a_thread_that_fails_with_pages_in_hand_is_replaced,
        ),
        (
            "the_stream_lacks_nothing_while_modes_change_under_load",
            the_stream_lacks_nothing_while_modes_change_under_load,
        ),
        (
            "pages_that_the_disk_does_not_take_are_copied",
            pages_that_the_disk_does_not_take_are_copied,
        ),
    ])
}

/// Over a disk, in bitmap mode, with the driver loaded.
fn marking(disk: &Path, copying: Copying) -> Front {
    run("modprobe", &["ublk_drv"]);
    Front::marking(disk, copying)
}

fn uncopied(front: &Front) -> Uncopied {
    front.device().status().uncopied
}

fn fio(node: &Path, arguments: &[&str]) {
    let mut child = Fio::new(node, arguments).spawn();
    assert!(wait(&mut child, Duration::from_secs(120)).success());
}

/// Mixed sizes, at any sector, with memory at any.
const MIXED: [&str; 6] = [
    "--rw=randwrite",
    "--bsrange=512-192k",
    "--blockalign=512",
    "--iomem_align=512",
    "--iodepth=16",
    "--size=12m",
];

fn what_is_not_recorded_is_not_copied() {
    for copying in [Copying::WhereNeeded, Copying::Always] {
        let spared = copying == Copying::WhereNeeded;
        let disk = Loop::new(16 * MIB);
        let front = marking(&disk.path, copying);
        let node = front.node();
        assert_eq!(front.device().status().has_zero_copy(), spared);
        fio(node, &MIXED);
        let marked = uncopied(&front);
        assert_eq!(marked.reads > 0 && marked.writes > 0, spared, "{marked:?}");
        assert_eq!(marked.refused, 0);
        let image = content(&disk.path);
        assert!(image == content(node), "users read something else");
        for (number, block) in image.chunks(4096).enumerate() {
            let written = block.iter().any(|byte| *byte != 0);
            let dirty = front.service().pending();
            assert!(!written || dirty.test(BlockNumber::new(number as u64)));
        }

        climb(front.service());
        let before = uncopied(&front);
        fio(node, &MIXED);
        let after = uncopied(&front);
        assert_eq!(after.writes, before.writes, "what is recorded is copied");
        assert_eq!(after.reads > before.reads, spared);
        let mut recorded = image;
        replay(&mut recorded, &take_all(front.service()));
        assert!(recorded == content(&disk.path));

        front.service().give_up("so that nothing is recorded");
        fio(node, &MIXED);
        assert_eq!(uncopied(&front).writes > after.writes, spared);
        assert!(content(&disk.path) == content(node));
        assert_eq!(front.device().status().failures, 0);
    }
}

fn aligned(fill: u8, len: usize) -> AlignedMemory {
    let mut memory = AlignedMemory::new(len).unwrap();
    memory.as_mut_slice().fill(fill);
    memory
}

fn each_write_that_is_not_copied_ends_as_it_was_asked_for() {
    let disk = Loop::new(16 * MIB);
    let front = marking(&disk.path, Copying::WhereNeeded);
    let before = flushes(&disk.path);
    let plain = open_direct(front.node());
    let cached = aligned(1, 8192);
    plain.write_all_at(cached.as_slice(), 4096).unwrap();
    assert_eq!(flushes(&disk.path), before, "nobody asked for a flush");
    let mut options = OpenOptions::new();
    let options = options
        .write(true)
        .custom_flags(libc::O_DIRECT | libc::O_DSYNC);
    let forced = options.open(front.node()).unwrap();
    let durable = aligned(2, 4096);
    forced.write_all_at(durable.as_slice(), 65536).unwrap();
    let after_forced = flushes(&disk.path);
    assert!(after_forced > before, "a forced write is one for the disk");
    plain.sync_all().unwrap();
    assert!(flushes(&disk.path) > after_forced, "a flush is one, too");
    assert_eq!(uncopied(&front).writes, 2);
    let image = content(&disk.path);
    assert_eq!(image[4096..12288], [1; 8192]);
    assert_eq!(image[65536..69632], [2; 4096]);
    // What the disk says reaches whoever asked.
    let node = front.node().to_str().unwrap();
    run("blkdiscard", &["-o", "0", "-l", "1048576", node]);
    assert!(content(&disk.path)[..MIB as usize].iter().all(|b| *b == 0));
}

fn who_takes_a_device_over_chooses_anew() {
    use Copying::{Always, WhereNeeded};
    // Added so, then served so; whether the kernel still lends pages then.
    let cases = [
        (WhereNeeded, Always, false),
        (WhereNeeded, WhereNeeded, true),
        (Always, WhereNeeded, false),
    ];
    for (added, served, spared) in cases {
        let disk = Loop::new(16 * MIB);
        let mut front = marking(&disk.path, added);
        front.device().stop(How::Detach).unwrap();
        let node = front.node().to_owned();
        let waits = std::thread::spawn(move || fio(&node, &MIXED));
        std::thread::sleep(Duration::from_millis(100));
        front.serve_again_and(served);
        assert_eq!(front.device().started(), Started::TakenOver);
        waits.join().unwrap();
        let Uncopied { reads, writes, .. } = uncopied(&front);
        assert_eq!((reads > 0, writes > 0), (spared, spared));
        assert!(content(&disk.path) == content(front.node()));
    }
}

fn a_thread_that_fails_with_pages_in_hand_is_replaced() {
    let disk = Loop::new(32 * MIB);
    let front = marking(&disk.path, Copying::WhereNeeded);
    let arguments = ["--rw=randrw", "--bs=4k", "--iodepth=32", "--size=16m"];
    let mut load = Fio::new(front.node(), &arguments).spawn();
    for failures in 1..=3 {
        std::thread::sleep(Duration::from_millis(300));
        front.device().fail_a_thread();
        front.wait_until_served_after(failures);
    }
    assert!(wait(&mut load, Duration::from_secs(120)).success());
    let counted = uncopied(&front);
    assert!(counted.reads > 0 && counted.writes > 0, "{counted:?}");
    assert!(content(&disk.path) == content(front.node()));
}

/// A writer's numbers, one after the other, each in its slot after the one before has ended:
/// at every moment the slots hold all numbers up to one.
fn count_up(node: &Path, writer: u64, slots: u64, stop: &AtomicBool, last: &AtomicU64) {
    let device = open_direct(node);
    let mut block = aligned(0, 4096);
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        block.as_mut_slice()[..8].copy_from_slice(&number.to_le_bytes());
        let at = (writer * slots + number % slots) * 4096;
        device.write_all_at(block.as_slice(), at).unwrap();
        last.store(number, Ordering::Release);
    }
}

/// The last number of each writer in an image, checked to be of one moment.
fn last_numbers(image: &[u8], writers: u64, slots: u64) -> Vec<u64> {
    let number = |at: u64| {
        let start = (at * 4096) as usize;
        u64::from_le_bytes(image[start..start + 8].try_into().unwrap())
    };
    let one = |writer: u64| {
        let found: Vec<u64> = (0..slots).map(|n| number(writer * slots + n)).collect();
        let last = *found.iter().max().unwrap();
        let oldest = (last + 1).saturating_sub(slots);
        for n in oldest.max(1)..=last {
            let slot = n % slots;
            assert_eq!(found[slot as usize], n, "writer {writer}: up to {last}");
        }
        last
    };
    (0..writers).map(one).collect()
}

/// Reads what a moment is made of into `image`, as it was then.
fn read_moment(service: &Service, moment: &Blocks, disk: &File, image: &mut [u8]) {
    let mut from = 0;
    while let Some(run) = moment.next_run(BlockNumber::new(from), u64::MAX >> 1) {
        for n in run.range() {
            let mut memory = AlignedMemory::new(4096).unwrap();
            disk.read_exact_at(memory.as_mut_slice(), n * 4096).unwrap();
            let block = BlockNumber::new(n);
            service.take_block(block, memory.as_mut_slice()).unwrap();
            image[n as usize * 4096..][..4096].copy_from_slice(memory.as_slice());
        }
        from = run.end.get();
    }
    service.end_moment();
    service.moment_is_stored();
    service.acknowledge();
}

fn the_stream_lacks_nothing_while_modes_change_under_load() {
    const WRITERS: u64 = 4;
    let slots = 61;
    let size = WRITERS * slots * 4096;
    let disk = Loop::new(size);
    let front = marking(&disk.path, Copying::WhereNeeded);
    let service = front.service();
    let stop = AtomicBool::new(false);
    let last: Vec<_> = (0..WRITERS).map(|_| AtomicU64::new(0)).collect();
    let now = || -> Vec<u64> { last.iter().map(|n| n.load(Ordering::Acquire)).collect() };
    let mut image = vec![0; size as usize];
    let below = open_direct(&disk.path);
    let (mut lent, mut copied) = (0, 0);
    std::thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (node, stop, last) = (front.node(), &stop, &last[writer as usize]);
            scope.spawn(move || count_up(node, writer, slots, stop, last));
        }
        let _stop = StopAtEnd(&stop);
        for round in 0..cases(20) {
            service.give_up("another round begins");
            let before = uncopied(&front).writes;
            std::thread::sleep(Duration::from_millis(40));
            lent += uncopied(&front).writes - before;
            let began = now();
            let moment = take_moment(service);
            let ended = now();
            read_moment(service, &moment, &below, &mut image);
            for (writer, number) in last_numbers(&image, WRITERS, slots).iter().enumerate() {
                // Nothing older than what had ended, nothing newer than could have begun.
                assert!(*number >= began[writer], "round {round}");
                assert!(*number <= ended[writer] + 1, "round {round}");
            }
            // After every single change: none that had ended before is missing.
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(service.waiting().mode, Mode::Data);
            for entry in next_cut(service) {
                replay(&mut image, std::slice::from_ref(&entry));
                last_numbers(&image, WRITERS, slots);
                copied += 1;
            }
            service.acknowledge();
        }
    });
    assert!(lent > 0 && copied > 0, "{lent} lent, {copied} copied");
    assert_eq!(service.counters().failed, 0);
}

/// The blocks of a moment, which is refused while it cannot be told what is under way.
fn take_moment(service: &Service) -> Blocks {
    let (_, moments) = Service::moment(&[service]).unwrap();
    match moments.into_iter().next() {
        Some(Moment::Blocks(blocks)) => blocks,
        other => panic!("in data mode: {other:?}"),
    }
}

/// A disk that takes no memory with gaps in pages, unlike the device before it.
struct Strict(&'static Path);

impl Strict {
    fn new() -> Self {
        run("modprobe", &["null_blk", "nr_devices=0"]);
        let folder = Path::new("/sys/kernel/config/nullb/strict");
        fs::create_dir(folder).unwrap();
        let strict = Self(folder);
        let settings = [
            ("size", "16"),
            ("memory_backed", "1"),
            ("blocksize", "4096"),
            ("virt_boundary", "1"),
            ("power", "1"),
        ];
        for (name, value) in settings {
            fs::write(folder.join(name), value).unwrap();
        }
        strict
    }
}

impl Drop for Strict {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.0);
    }
}

fn pages_that_the_disk_does_not_take_are_copied() {
    let strict = Strict::new();
    let node = fs::read_to_string(strict.0.join("index")).unwrap();
    let node = format!("/dev/nullb{}", node.trim());
    let node = if Path::new(&node).exists() {
        node
    } else {
        "/dev/strict".to_owned()
    };
    let front = marking(Path::new(&node), Copying::WhereNeeded);
    // Eight parts of a block, each in a page of its own.
    let pages = aligned(7, 8 * 8192);
    let parts: Vec<_> = pages.as_slice().chunks(8192).collect();
    let parts: Vec<_> = parts
        .iter()
        .map(|page| IoSlice::new(&page[512..1024]))
        .collect();
    let device = open_direct(front.node());
    assert_eq!(nix::sys::uio::pwritev(&device, &parts, 8192), Ok(4096));
    let counted = uncopied(&front);
    assert_eq!((counted.writes, counted.refused), (0, 1), "{counted:?}");
    let mut read = AlignedMemory::new(4096).unwrap();
    device.read_exact_at(read.as_mut_slice(), 8192).unwrap();
    assert!(read.as_slice().iter().all(|byte| *byte == 7));
    drop(device);
    drop(front);
    drop(strict);
}
