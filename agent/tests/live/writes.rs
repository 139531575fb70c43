//! The kinds of writes that trackers are known to miss: through a partition, single
//! sectors, discards, zeroing, memory maps, the volume's odd tail. After each, a point must
//! restore to what the device holds.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::stage::{
    Daemon, LoopDevice, MIB, Mount, Place, Volume, Zram, assert_restores, check_filesystem,
    restore, run,
};

const O_DIRECT: i32 = 0o40000;

/// A volume of random bytes, protected, and its daemon.
struct Stage {
    place: Place,
    store: std::path::PathBuf,
    daemon: Daemon,
}

impl Stage {
    fn protect(device: &Path, place: Place) -> Self {
        fill(device);
        let store = place.folder("store");
        let mut daemon = Daemon::start(&place);
        let options = ["--every", "1h"];
        daemon.protect(&Volume {
            device,
            store: &store,
            name: "v",
            options: &options,
        });
        Self {
            place,
            store,
            daemon,
        }
    }

    /// A point now restores to what the device holds now.
    #[track_caller]
    fn assert_captured(&self, device: &Path) {
        let point = self.daemon.point("v", &[]);
        assert_restores(&self.place, &self.store, "v", &point, device);
        self.daemon.assert_no_resync("v");
    }
}

fn fill(device: &Path) {
    let output = format!("of={}", device.display());
    let random = [
        "if=/dev/urandom",
        &output,
        "bs=1M",
        "oflag=direct,nonblock",
        "status=none",
    ];
    // dd fails at the device's end, which is where it shall stop.
    let _ = std::process::Command::new("dd")
        .args(random)
        .stderr(std::process::Stdio::null())
        .status();
}

/// Writes `len` bytes at `at`, around all caches. The memory must be aligned: whole pages
/// of it are taken, and the part in the middle used.
fn write_direct(device: &Path, at: u64, len: usize, seed: u8) {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(O_DIRECT)
        .open(device)
        .unwrap();
    let buffer = vec![seed; len + 4096];
    let aligned = buffer.as_ptr().align_offset(4096);
    file.write_all_at(&buffer[aligned..aligned + len], at)
        .unwrap();
}

#[test]
fn through_a_partition() {
    let place = Place::new();
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let partition = disk.add_partition(1, 2048, 65536);
    let stage = Stage::protect(disk.path(), place);
    write_direct(&partition, 0, 4096, 1);
    write_direct(&partition, 7 * MIB + 4096, 65536, 2);
    stage.assert_captured(disk.path());
    fs::write(&partition, vec![3; 100_000]).unwrap();
    run("sync", [&partition]);
    stage.assert_captured(disk.path());
    disk.delete_partition(1);
}

#[test]
fn single_sectors_and_the_odd_tail() {
    let place = Place::new();
    let size = 48 * MIB + 7 * 512;
    let disk = LoopDevice::new(&place, "disk.img", size);
    let stage = Stage::protect(disk.path(), place);
    for sector in [0, 1, 7, 8, 4095, size / 512 - 1] {
        write_direct(disk.path(), sector * 512, 512, sector as u8 | 1);
    }
    stage.assert_captured(disk.path());
    write_direct(disk.path(), size - 3 * 512, 3 * 512, 9);
    stage.assert_captured(disk.path());
}

#[test]
fn sectors_of_4096_bytes() {
    let place = Place::new();
    let disk = LoopDevice::with(&place, "disk.img", 48 * MIB, &["--sector-size", "4096"]);
    let stage = Stage::protect(disk.path(), place);
    write_direct(disk.path(), 5 * 4096, 4096, 1);
    write_direct(disk.path(), 48 * MIB - 4096, 4096, 2);
    stage.assert_captured(disk.path());
}

#[test]
fn discards_and_zeroes() {
    let place = Place::new();
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let stage = Stage::protect(disk.path(), place);
    let path = disk.path().to_str().unwrap();
    run(
        "blkdiscard",
        ["--offset", "4194304", "--length", "8388608", path],
    );
    stage.assert_captured(disk.path());
    run(
        "blkdiscard",
        ["-z", "--offset", "20975616", "--length", "1052672", path],
    );
    stage.assert_captured(disk.path());
    // As mkfs does: all of it, in one request.
    run("blkdiscard", [path]);
    write_direct(disk.path(), 30 * MIB, 4096, 7);
    stage.assert_captured(disk.path());
}

#[test]
fn through_a_memory_map() {
    let place = Place::new();
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mount = Mount::make("ext4", disk.path(), &place.at("mnt"));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(mount.at("mapped"))
        .unwrap();
    file.set_len(8 * MIB).unwrap();
    // SAFETY: only this test has the file, and it keeps its length while mapped.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
    map.fill(1);
    map.flush().unwrap();
    let store = place.folder("store");
    let mut daemon = Daemon::start(&place);
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &[],
    });

    // Dirty pages that nobody syncs: the freeze must bring them down.
    for page in (0..map.len()).step_by(3 * 4096) {
        map[page] = 2;
    }
    let expected = map.to_vec();
    let point = daemon.point("v", &[]);
    drop((map, file));
    daemon.unprotect("v");
    mount.unmount();
    drop(disk);
    let image = restore(&place, &store, "v", &point);
    check_filesystem("ext4", &image, &place, |mounted| {
        assert!(
            fs::read(mounted.join("mapped")).unwrap() == expected,
            "the mapped file differs"
        );
    });
}

#[test]
fn on_a_device_that_completes_bios() {
    let place = Place::new();
    let zram = Zram::new(64 * MIB);
    let device = zram.path();
    let stage = Stage::protect(&device, place);
    write_direct(&device, 3 * 4096, 4096, 1);
    write_direct(&device, 50 * MIB, 1 << 20, 2);
    run(
        "blkdiscard",
        [
            "--offset",
            "8388608",
            "--length",
            "4194304",
            device.to_str().unwrap(),
        ],
    );
    stage.assert_captured(&device);
}

#[test]
fn on_a_filesystem_in_memory() {
    let place = Place::new();
    let zram = Zram::new(128 * MIB);
    let mount = Mount::make("ext4", &zram.path(), &place.at("mnt"));
    let store = place.folder("store");
    let mut daemon = Daemon::start(&place);
    daemon.protect(&Volume {
        device: &zram.path(),
        store: &store,
        name: "v",
        options: &[],
    });
    for file in 0..50 {
        fs::write(mount.at(&format!("file-{file}")), vec![file; 100_000]).unwrap();
    }
    let point = daemon.point("v", &[]);
    mount.unmount();
    let last = daemon.point("v", &[]);
    assert_restores(&place, &store, "v", &last, &zram.path());
    let image = restore(&place, &store, "v", &point);
    daemon.unprotect("v");
    check_filesystem("ext4", &image, &place, |mounted| {
        for file in 0..50 {
            let data = fs::read(mounted.join(format!("file-{file}"))).unwrap();
            assert!(data == vec![file; 100_000], "file {file} differs");
        }
    });
}
