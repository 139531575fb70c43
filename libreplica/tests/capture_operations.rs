//! Every way in which a disk's data can change is seen, with its place: through the page
//! cache and around it, in sectors, through a partition, a file system or a mapping, by
//! discards and zeroing.

#![allow(clippy::unwrap_used, clippy::panic)]

mod devices;

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;

use devices::{
    Copy, Loop, MIB, Mounted, Pinned, Slow, drain, extent, run, write_buffered, write_direct,
};
use libreplica::capture::{Tracker, WidenCause};
use libreplica::units::BlockSize;

/// The device, its tracker, and a copy that starts equal.
struct Rig {
    copy: Copy,
    tracker: Tracker,
    pinned: Pinned,
    disk: Loop,
}

fn rig(bytes: u64) -> Rig {
    let disk = Loop::new(bytes);
    let pinned = Pinned::new(&disk.path);
    let mut copy = Copy::new(&pinned.spec);
    let tracker = Tracker::attach(&pinned.spec).unwrap();
    copy.read([pinned.spec.disk.size().extent()]);
    Rig {
        copy,
        tracker,
        pinned,
        disk,
    }
}

impl Rig {
    /// Reads what the tracker says has changed; then the copy must equal the device.
    fn assert_followed(&mut self) {
        for _ in 0..3 {
            let report = self.copy.round(&mut self.tracker);
            assert_eq!(report.widened, None);
        }
        assert_eq!(self.tracker.pending().count(), 0);
        self.copy.assert_same(&self.disk.path);
    }
}

#[test]
fn writes_through_the_page_cache_and_around_it() {
    let mut rig = rig(32 * MIB);
    let path = rig.disk.path.clone();
    write_buffered(&path, 5000, 10_000, 1);
    write_buffered(&path, 32 * MIB - 1, 1, 2);
    write_direct(&path, 8 * MIB, MIB as usize, 3);
    // Sectors, across the edge of a block.
    write_direct(&path, 20 * 4096 - 512, 1024, 4);
    write_direct(&path, 24 * 4096 + 1536, 512, 5);
    let mib = MIB / 4096;
    let runs = drain(&mut rig.tracker).1;
    assert_eq!(
        runs,
        [
            (1, 4),
            (19, 21),
            (24, 25),
            (8 * mib, 9 * mib),
            (32 * mib - 1, 32 * mib)
        ]
    );
    rig.tracker.reclaim();
    rig.assert_followed();
}

#[test]
fn a_write_to_a_partition_is_a_write_to_its_disk() {
    let mut rig = rig(32 * MIB);
    let name = rig.disk.name().to_owned();
    // 8192 sectors from sector 2049: no multiple of a block.
    run("addpart", &[&name, "1", "2049", "8192"]);
    let partition = format!("{name}p1");
    write_direct(Path::new(&partition), 0, 512, 7);
    write_buffered(Path::new(&partition), 4 * MIB - 512, 512, 8);
    let first = 2049 * 512 / 4096;
    let last = (2049 + 8192 - 1) * 512 / 4096;
    // The page cache writes whole pages of the partition.
    let page = ((2049 * 512 + 4 * MIB - 4096) / 4096, last + 1);
    assert_eq!(drain(&mut rig.tracker).1, [(first, first + 1), page]);
    rig.tracker.reclaim();
    rig.assert_followed();
}

#[test]
fn discards_and_zeroes() {
    let mut rig = rig(64 * MIB);
    let path = rig.disk.path.clone();
    let name = rig.disk.name().to_owned();
    write_direct(&path, 0, 32 << 20, 9);
    let copy = &mut rig.copy;
    copy.round(&mut rig.tracker);
    run(
        "blkdiscard",
        &["--offset", "1048576", "--length", "65536", &name],
    );
    run(
        "blkdiscard",
        &[
            "--zeroout",
            "--offset",
            "2097152",
            "--length",
            "8192",
            &name,
        ],
    );
    assert_eq!(drain(&mut rig.tracker).1, [(256, 272), (512, 514)]);
    rig.tracker.reclaim();
    rig.assert_followed();
}

/// As qemu and databases do; the file below must be able to, or the kernel writes zeroes.
#[test]
fn zeroes_by_fallocate() {
    let disk = Slow::new(16 * MIB);
    write_direct(&disk.path, 0, 4 << 20, 9);
    let pinned = Pinned::new(&disk.path);
    let mut copy = Copy::new(&pinned.spec);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    copy.read([pinned.spec.disk.size().extent()]);
    let file = OpenOptions::new().write(true).open(&disk.path).unwrap();
    for (mode, block) in [
        (libc::FALLOC_FL_ZERO_RANGE, 100),
        (libc::FALLOC_FL_PUNCH_HOLE, 200),
    ] {
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: plain numbers and an open descriptor.
        let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, block * 4096, 8192) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
    assert_eq!(drain(&mut tracker).1, [(100, 102), (200, 202)]);
    tracker.reclaim();
    copy.round(&mut tracker);
    copy.assert_same(&disk.path);
}

#[test]
fn a_discard_of_the_whole_disk_is_one_run() {
    // 8 GiB, so that one bio is longer than one call of the marking loop.
    let disk = Loop::new(8 << 30);
    let pinned = Pinned::new(&disk.path);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    run("blkdiscard", &[disk.name()]);
    let (report, runs) = drain(&mut tracker);
    assert_eq!(report.widened, None);
    assert_eq!(runs, [(0, 8 << 18)]);
    assert_eq!(drain(&mut tracker).1, []);
    // With large blocks and an odd size, too.
    drop((tracker, pinned, disk));
    let disk = Loop::new((1 << 30) + 4096 * 3);
    let pinned = Pinned::with_block(&disk.path, BlockSize::MAX);
    let mut tracker = Tracker::attach(&pinned.spec).unwrap();
    run("blkdiscard", &[disk.name()]);
    assert_eq!(drain(&mut tracker).1, [(0, 1025)]);
}

#[test]
fn mkfs_files_and_mappings_on_ext4() {
    let mut rig = rig(64 * MIB);
    run("mkfs.ext4", &["-q", rig.disk.name()]);
    rig.assert_followed();
    let mounted = Mounted::new(&rig.disk.path);
    for i in 0..40_u8 {
        fs::write(mounted.at.join(format!("file{i}")), vec![i; 100_000]).unwrap();
    }
    let path = mounted.at.join("mapped");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    file.write_all(&vec![1; 1 << 20]).unwrap();
    file.sync_all().unwrap();
    rig.copy.round(&mut rig.tracker);
    // SAFETY: nobody cuts the file shorter while it is mapped.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
    for at in (0..map.len()).step_by(70_000) {
        map[at] = 0xAB;
    }
    map.flush().unwrap();
    for i in 0..20 {
        fs::remove_file(mounted.at.join(format!("file{i}"))).unwrap();
    }
    drop((map, file));
    run("fstrim", &[mounted.at.to_str().unwrap()]);
    drop(mounted);
    rig.assert_followed();
}

#[test]
fn reads_mark_nothing() {
    let mut rig = rig(16 * MIB);
    rig.copy.read([extent(0, 16 * MIB)]);
    fs::read(&rig.disk.path).unwrap();
    assert_eq!(drain(&mut rig.tracker).1, []);
    assert_eq!(rig.tracker.counters().unwrap().submitted, 0);
}

#[test]
fn a_disk_that_grows_is_noticed() {
    let mut rig = rig(16 * MIB);
    OpenOptions::new()
        .write(true)
        .open(&rig.disk.file)
        .unwrap()
        .set_len(32 * MIB)
        .unwrap();
    run("losetup", &["--set-capacity", rig.disk.name()]);
    let error = rig.tracker.swap().unwrap_err();
    assert_eq!(error.kind(), libreplica::ErrorKind::Resized);
    // And should it be back to its size by then, what was written meanwhile still counts.
    write_direct(&rig.disk.path, 24 * MIB, 4096, 1);
    OpenOptions::new()
        .write(true)
        .open(&rig.disk.file)
        .unwrap()
        .set_len(16 * MIB)
        .unwrap();
    run("losetup", &["--set-capacity", rig.disk.name()]);
    let report = rig.tracker.swap().unwrap();
    assert_eq!(report.widened, Some(WidenCause::BeyondEnd));
    assert_eq!(report.blocks, 4096);
    let _ = &rig.pinned;
}
