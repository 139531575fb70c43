//! Capture on disks that a small kernel does not have: mappings of dm, NVMe behind two
//! controllers, memory disks. Each is tracked, to the block, or refused by name. On the test
//! bench only: `scripts/vm-test` boots a kernel that has them, and makes the NVMe disk.

#![allow(clippy::unwrap_used, clippy::panic)]

mod devices;
#[path = "rig/runner.rs"]
mod runner;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use devices::load::load;
use devices::{
    Copy, Loop, MIB, Pinned, StopAtEnd, cases, drain, run, wait_until_settled, write_buffered,
    write_direct,
};
use libreplica::ErrorKind;
use libreplica::capture::Tracker;
use libreplica::device::{BlockDevice, Queue};

const SECTOR: u64 = 512;

fn main() -> ExitCode {
    runner::run_on_the_bench(&[
        (
            "a_write_across_two_targets_is_tracked_to_the_block",
            a_write_across_two_targets_is_tracked_to_the_block,
        ),
        (
            "a_mapping_is_followed_under_load",
            a_mapping_is_followed_under_load,
        ),
        (
            "writes_through_a_mapping_are_writes_to_the_disk_below",
            writes_through_a_mapping_are_writes_to_the_disk_below,
        ),
        (
            "what_a_mapping_loses_is_tracked_as_written",
            what_a_mapping_loses_is_tracked_as_written,
        ),
        (
            "a_multipath_disk_is_tracked_and_its_paths_are_refused",
            a_multipath_disk_is_tracked_and_its_paths_are_refused,
        ),
        (
            "a_namespace_with_two_controllers_is_tracked",
            a_namespace_with_two_controllers_is_tracked,
        ),
        (
            "each_of_two_disks_that_are_one_namespace_is_refused",
            each_of_two_disks_that_are_one_namespace_is_refused,
        ),
        (
            "a_memory_disk_is_tracked_or_refused_by_name",
            a_memory_disk_is_tracked_or_refused_by_name,
        ),
    ])
}

/// It is to make the nodes itself: there is no udev on the test bench.
fn dmsetup() -> Command {
    let mut command = Command::new("dmsetup");
    command.env("DM_DISABLE_UDEV", "1");
    command
}

/// A mapping of dm, removed at the end.
struct Mapping {
    name: String,
    path: PathBuf,
}

impl Mapping {
    /// `lines`: the targets, as `dmsetup` takes them.
    fn new(name: &str, lines: &[String]) -> Self {
        Self::with(name, lines, &[])
    }

    fn with(name: &str, lines: &[String], options: &[&str]) -> Self {
        Self::load(&[&["create", name], options].concat(), lines);
        Self {
            name: name.to_owned(),
            path: PathBuf::from(format!("/dev/mapper/{name}")),
        }
    }

    /// Other targets from now on, while it is in use.
    fn becomes(&self, lines: &[String]) {
        Self::load(&["reload", &self.name], lines);
        assert!(
            dmsetup()
                .args(["resume", &self.name])
                .status()
                .unwrap()
                .success()
        );
    }

    fn load(arguments: &[&str], lines: &[String]) {
        let mut child = dmsetup()
            .args(arguments)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let table = lines.join("\n");
        let mut input = child.stdin.take().unwrap();
        input.write_all(table.as_bytes()).unwrap();
        drop(input);
        assert!(child.wait().unwrap().success(), "{table}");
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let _ = dmsetup().args(["remove", "--retry", &self.name]).status();
    }
}

/// A line for `len` bytes at `start` that lie on `disk` from `offset` on.
fn linear(start: u64, len: u64, disk: &Path, offset: u64) -> String {
    let [start, len, offset] = [start, len, offset].map(|bytes| bytes / SECTOR);
    format!("{start} {len} linear {} {offset}", disk.display())
}

/// Two disks, one behind the other; the seam is at 16 MiB.
fn two_in_a_row(name: &str) -> (Mapping, [Loop; 2]) {
    let disks = [Loop::new(17 * MIB), Loop::new(16 * MIB)];
    let lines = [
        linear(0, 16 * MIB, &disks[0].path, MIB),
        linear(16 * MIB, 16 * MIB, &disks[1].path, 0),
    ];
    (Mapping::new(name, &lines), disks)
}

/// Both halves' data and nothing else is in the next round, nothing stays in flight, and
/// nothing comes after.
fn assert_round(tracker: &mut Tracker, wanted: &[(u64, u64)]) {
    wait_until_settled(tracker);
    let (report, runs) = drain(tracker);
    assert_eq!(runs, wanted);
    assert_eq!(report.widened, None);
    assert_eq!(drain(tracker).1, []);
}

fn a_write_across_two_targets_is_tracked_to_the_block() {
    let (mapping, _disks) = two_in_a_row("two-targets");
    let pinned = Pinned::new(&mapping.path);
    assert_eq!(pinned.spec.disk.queue(), Queue::Bios);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    let seam = 16 * MIB / 4096;
    // One bio, of which dm makes two; it reports only the last part's end.
    write_direct(&mapping.path, 16 * MIB - (32 << 10), 64 << 10, 1);
    assert_round(&mut tracker, &[(seam - 8, seam + 8)]);
    write_direct(&mapping.path, 16 * MIB - 512, 1024, 2);
    assert_round(&mut tracker, &[(seam - 1, seam + 1)]);
    write_buffered(&mapping.path, 16 * MIB - 4096, 8192, 3);
    assert_round(&mut tracker, &[(seam - 1, seam + 1)]);
    let name = mapping.path.to_str().unwrap();
    let (offset, length) = ((14 * MIB).to_string(), (4 * MIB).to_string());
    for how in ["--zeroout", "--force"] {
        run("blkdiscard", &[how, "-o", &offset, "-l", &length, name]);
        assert_round(&mut tracker, &[(seam - 512, seam + 512)]);
    }
    assert_eq!(tracker.counters().unwrap().widened, []);
}

fn a_mapping_is_followed_under_load() {
    let (mapping, _disks) = two_in_a_row("under-load");
    let pinned = Pinned::new(&mapping.path);
    let mut copy = Copy::new(&pinned.spec);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stopped = StopAtEnd(&stop);
        for seed in 1..=2 {
            let (path, stop) = (&mapping.path, &stop);
            scope.spawn(move || load(path, SECTOR, seed, stop));
        }
        copy.read([pinned.spec.disk.size().extent()]);
        for round in 0..cases(20) {
            let report = copy.round(&mut tracker);
            assert_eq!(report.widened, None, "round {round}");
        }
    });
    fs::File::open(&mapping.path).unwrap().sync_all().unwrap();
    wait_until_settled(&tracker);
    copy.round(&mut tracker);
    assert_eq!(tracker.pending().count(), 0);
    copy.assert_same(&mapping.path);
}

fn writes_through_a_mapping_are_writes_to_the_disk_below() {
    let disk = Loop::new(32 * MIB);
    let lines = [
        linear(0, 4 * MIB, &disk.path, 20 * MIB),
        linear(4 * MIB, 4 * MIB, &disk.path, 8 * MIB),
    ];
    let mapping = Mapping::new("over-the-disk", &lines);
    let pinned = Pinned::new(&disk.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    let block = |bytes: u64| bytes / 4096;
    // The last block of the first target, the first of the second.
    write_direct(&mapping.path, 4 * MIB - 4096, 8192, 1);
    let (first, second) = (block(24 * MIB) - 1, block(8 * MIB));
    assert_round(&mut tracker, &[(second, second + 1), (first, first + 1)]);
    run(
        "blkdiscard",
        &["-o", "0", "-l", "65536", mapping.path.to_str().unwrap()],
    );
    assert_round(&mut tracker, &[(block(20 * MIB), block(20 * MIB) + 16)]);
    assert_eq!(tracker.counters().unwrap().widened, []);
}

/// What became of a block whose write failed is not known, so it is read again.
fn what_a_mapping_loses_is_tracked_as_written() {
    let disk = Loop::new(16 * MIB);
    let mapping = Mapping::new("half-broken", &[linear(0, 16 * MIB, &disk.path, 0)]);
    let pinned = Pinned::new(&mapping.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    let sectors = 8 * MIB / SECTOR;
    mapping.becomes(&[
        linear(0, 8 * MIB, &disk.path, 0),
        format!("{sectors} {sectors} error"),
    ]);
    let file = devices::open_direct(&mapping.path);
    let mut memory = libreplica::sys::memory::AlignedMemory::new(8192).unwrap();
    memory.as_mut_slice().fill(1);
    let seam = 8 * MIB / 4096;
    let written = std::os::unix::fs::FileExt::write_at(&file, memory.as_slice(), 8 * MIB - 4096);
    assert!(written.is_err() || written.unwrap() < 8192);
    assert_round(&mut tracker, &[(seam - 1, seam + 1)]);
}

fn a_multipath_disk_is_tracked_and_its_paths_are_refused() {
    run("modprobe", &["-a", "dm-multipath", "dm-round-robin"]);
    let disk = Loop::new(16 * MIB);
    let line = format!(
        "0 {} multipath 0 0 1 1 round-robin 0 1 1 {} 1000",
        16 * MIB / SECTOR,
        disk.path.display()
    );
    let mapping = Mapping::with("one-lun", &[line], &["--uuid", "mpath-one-lun"]);
    let refused = BlockDevice::open(&disk.path).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert!(refused.to_string().contains("one-lun"), "{refused}");
    let pinned = Pinned::new(&mapping.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    write_direct(&mapping.path, 40960, 8192, 1);
    assert_round(&mut tracker, &[(10, 12)]);
    assert_eq!(tracker.counters().unwrap().widened, []);
}

/// The disks of the test bench's namespace: one with multipath, two without.
fn namespace(multipath: &str) -> Vec<PathBuf> {
    let _ = Command::new("modprobe")
        .args(["-ra", "nvme", "nvme_core"])
        .status();
    run(
        "modprobe",
        &["nvme_core", &format!("multipath={multipath}")],
    );
    run("modprobe", &["nvme"]);
    let wanted = if multipath == "Y" { 1 } else { 2 };
    let began = Instant::now();
    loop {
        let disks: Vec<PathBuf> = fs::read_dir("/sys/block")
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            // Not nvme0c0n1, which is a path and has no node.
            .filter(|name| name.starts_with("nvme") && !name.contains('c'))
            .map(|name| Path::new("/dev").join(name))
            .filter(|path| path.exists())
            .collect();
        if disks.len() == wanted && paths_are_live() == 2 {
            return disks;
        }
        let waited = began.elapsed();
        assert!(
            waited < Duration::from_secs(20),
            "{disks:?}: boot with scripts/vm-test"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn paths_are_live() -> usize {
    let controllers = fs::read_dir("/sys/class/nvme").unwrap();
    controllers
        .filter(|entry| {
            let state = entry.as_ref().unwrap().path().join("state");
            fs::read_to_string(state).unwrap().trim() == "live"
        })
        .count()
}

fn on_kernel(series: &str) -> bool {
    std::env::var("REPLICA_VM").unwrap().starts_with(series)
}

/// Its writes end on a hidden disk of one path or the other. On 6.1 no end is seen.
fn a_namespace_with_two_controllers_is_tracked() {
    let disks = namespace("Y");
    let pinned = Pinned::new(&disks[0]);
    let tracker = Tracker::attach(&pinned.spec);
    if on_kernel("6.1.") {
        assert_eq!(tracker.unwrap_err().kind(), ErrorKind::Kernel);
        return;
    }
    let mut tracker = tracker.unwrap();
    write_direct(&disks[0], 40960, 8192, 1);
    assert_round(&mut tracker, &[(10, 12)]);
    run(
        "blkdiscard",
        &["-o", "65536", "-l", "65536", disks[0].to_str().unwrap()],
    );
    assert_round(&mut tracker, &[(16, 32)]);
    // A flush is none of a write: nothing is in flight for ever.
    fs::File::open(&disks[0]).unwrap().sync_all().unwrap();
    assert_round(&mut tracker, &[]);
    // By the path that is left, and by both again.
    let controllers = ["nvme0", "nvme1"];
    for controller in controllers {
        let reset = format!("/sys/class/nvme/{controller}/reset_controller");
        fs::write(reset, "1").unwrap();
        write_direct(&disks[0], 4 * MIB, MIB as usize, 2);
        assert_round(&mut tracker, &[(1024, 1280)]);
    }
    assert_eq!(tracker.counters().unwrap().widened, []);
}

/// Without the kernel's multipath a write to one is not seen on the other.
fn each_of_two_disks_that_are_one_namespace_is_refused() {
    for disk in namespace("N") {
        let refused = BlockDevice::open(&disk).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid);
        assert!(refused.to_string().contains("nvme"), "{refused}");
    }
}

fn a_memory_disk_is_tracked_or_refused_by_name() {
    run("modprobe", &["brd", "rd_nr=1", "rd_size=16384"]);
    let disk = Path::new("/dev/ram0");
    if on_kernel("6.1.") {
        let refused = BlockDevice::open(disk).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Kernel);
        return;
    }
    let pinned = Pinned::new(disk);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    write_buffered(disk, 40960, 8192, 1);
    assert_round(&mut tracker, &[(10, 12)]);
}
