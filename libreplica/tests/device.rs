//! What the kernel says about disks, asked of real loop devices. Needs root.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::fs;
use std::path::Path;
use std::sync::{PoisonError, RwLock};

use libreplica::ErrorKind;
use libreplica::device::{BlockDevice, DevNo, DiskSeq, Freezing, Layers, OpenFor, Queue, Reach};
use rig::{LoopDisk, MIB, Mounted, mkfs, mkfs_that_cannot_freeze, mount_in_other_namespace, run};
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::Builder::new()
        .prefix("replica-device.")
        .tempdir()
        .unwrap()
}

/// A new mount namespace has a copy of every mount. Who makes one writes; who would be
/// misled by a copy of its mounts reads.
static NAMESPACES: RwLock<()> = RwLock::new(());

fn mount_points(layers: &Layers) -> Vec<&Path> {
    layers
        .filesystems()
        .iter()
        .map(|fs| fs.mount_point())
        .collect()
}

#[test]
fn a_loop_device_is_described_and_recognised() {
    let folder = folder();
    let disk = LoopDisk::new(folder.path(), "disk", 16 * MIB);
    let link = folder.path().join("by-id");
    std::os::unix::fs::symlink(&disk.path, &link).unwrap();
    let device = BlockDevice::open(&link).unwrap();
    assert_eq!(device.path(), link);
    assert_eq!(device.node(), disk.path);
    assert_eq!(Path::new("/dev").join(device.name()), disk.path);
    assert_eq!(device.size().get(), 16 * MIB);
    assert_eq!(device.logical_sector().get(), 512);
    assert_eq!(device.queue(), Queue::Requests);
    assert_eq!(device.backing_file().unwrap(), disk.file);
    assert_ne!(device.diskseq().get(), 0);
    assert!(device.holders().is_empty());
    device.still_there().unwrap();

    let before = device.stats().unwrap();
    run(
        "dd",
        &[
            "if=/dev/zero",
            &format!("of={}", disk.path.display()),
            "bs=4096",
            "count=3",
            "oflag=direct",
            "status=none",
        ],
    );
    let after = device.stats().unwrap();
    assert_eq!(after.write_sectors - before.write_sectors, 24);
    device.open_node(OpenFor::DirectRead).unwrap();
}

#[test]
fn a_resized_disk_and_another_under_its_number_are_told_apart() {
    let folder = folder();
    let mut disk = LoopDisk::of_its_own(folder.path(), "disk", 16 * MIB);
    let device = BlockDevice::open(&disk.path).unwrap();
    fs::File::options()
        .write(true)
        .open(&disk.file)
        .unwrap()
        .set_len(24 * MIB)
        .unwrap();
    run("losetup", &[Path::new("--set-capacity"), &disk.path]);
    let error = device.still_there().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Resized);
    assert!(
        error
            .to_string()
            .contains("25165824 bytes, and had 16777216"),
        "{error}"
    );

    disk.detach();
    assert_eq!(
        device.still_there().unwrap_err().kind(),
        ErrorKind::Vanished
    );
    disk.attach_again();
    assert_eq!(
        device.still_there().unwrap_err().kind(),
        ErrorKind::Vanished
    );
    assert_eq!(
        device.open_node(OpenFor::BufferedRead).unwrap_err().kind(),
        ErrorKind::Vanished
    );
}

#[test]
fn what_cannot_be_protected_is_refused_by_name() {
    let folder = folder();
    let mut disk = LoopDisk::new(folder.path(), "disk", 16 * MIB);
    let partition = disk.add_partition(1, MIB, 4 * MIB);
    let refused = |path: &Path, says: &str| {
        let error = BlockDevice::open(path).unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        error.kind()
    };
    assert_eq!(
        refused(
            &partition,
            &format!("name the whole disk, {}", disk.path.display())
        ),
        ErrorKind::Invalid
    );
    assert_eq!(refused(&disk.file, "losetup"), ErrorKind::Invalid);
    assert_eq!(
        refused(Path::new("/dev/null"), "not a block device"),
        ErrorKind::Invalid
    );
    assert_eq!(
        refused(Path::new("/dev/no-such-disk"), "/dev/no-such-disk"),
        ErrorKind::NotFound
    );
    let mut empty = LoopDisk::of_its_own(folder.path(), "empty", MIB);
    empty.detach();
    assert_eq!(refused(&empty.path, "no medium"), ErrorKind::NotFound);
}

#[test]
fn filesystems_of_partitions_and_within_files_are_found_innermost_first() {
    let _alone = NAMESPACES.read().unwrap_or_else(PoisonError::into_inner);
    let folder = folder();
    let mut disk = LoopDisk::new(folder.path(), "disk", 512 * MIB);
    let efi = disk.add_partition(1, MIB, 32 * MIB);
    let root = disk.add_partition(2, 64 * MIB, 440 * MIB);
    mkfs_that_cannot_freeze(&efi);
    mkfs("ext4", &root);
    let root = Mounted::new(&root, &folder.path().join("root"));
    let efi = Mounted::new(&efi, &root.point.join("boot/efi"));
    // Within a file of root, and mounted where only the nesting of files can order it.
    let inner_disk = LoopDisk::new(&root.point, "inner", 128 * MIB);
    inner_disk.mkfs("ext4");
    let inner = Mounted::new(&inner_disk.path, &folder.path().join("i"));
    // A second mount of the same filesystem is not a second filesystem.
    let bind = folder.path().join("bind");
    fs::create_dir(&bind).unwrap();
    run("mount", &[Path::new("--bind"), &root.point, &bind]);
    let _bind = Mounted {
        point: bind.clone(),
    };

    let device = BlockDevice::open(&disk.path).unwrap();
    let partitions = device.partitions().unwrap();
    assert_eq!(partitions.len(), 2);
    assert_eq!(partitions[1].extent.offset().get(), 64 * MIB);
    assert_eq!(partitions[1].extent.len().get(), 440 * MIB);

    let layers = Layers::above(&[&device]).unwrap();
    let points = mount_points(&layers);
    assert_eq!(points.len(), 3, "{points:?}");
    assert_eq!(points[0], inner.point);
    assert_eq!(points[1], efi.point);
    assert!(points[2] == root.point || points[2] == bind);
    assert_eq!(layers.filesystems()[1].freezing(), Freezing::SyncOnly);
    assert_eq!(layers.filesystems()[2].freezing(), Freezing::Freezes);
    assert!(layers.filesystems().iter().all(|fs| fs.open().is_ok()));

    assert!(
        layers
            .hold(&root.point.join("store/not/there/yet"))
            .unwrap()
    );
    assert!(layers.hold(&inner.point).unwrap());
    assert!(layers.hold(&inner_disk.path).unwrap());
    assert!(layers.hold(&disk.path).unwrap());
    assert!(!layers.hold(folder.path()).unwrap());
    assert!(!layers.hold(Path::new("/proc")).unwrap());
}

#[test]
fn a_mount_in_another_namespace_is_found_and_reached() {
    let _alone = NAMESPACES.write().unwrap_or_else(PoisonError::into_inner);
    let folder = folder();
    let disk = LoopDisk::new(folder.path(), "disk", 64 * MIB);
    disk.mkfs("ext4");
    let point = folder.path().join("hidden");
    let _keeper = mount_in_other_namespace(&disk.path, &point);
    let device = BlockDevice::open(&disk.path).unwrap();
    let layers = Layers::above(&[&device]).unwrap();
    assert_eq!(mount_points(&layers), [point.as_path()]);
    assert!(
        !fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .contains("hidden")
    );
    layers.filesystems()[0].open().unwrap();
}

#[test]
fn a_mount_below_another_is_not_taken_for_it() {
    let _alone = NAMESPACES.read().unwrap_or_else(PoisonError::into_inner);
    let folder = folder();
    let disk = LoopDisk::new(folder.path(), "disk", 64 * MIB);
    disk.mkfs("ext4");
    let mounted = Mounted::new(&disk.path, &folder.path().join("m"));
    run(
        "mount",
        &["-t", "tmpfs", "over", mounted.point.to_str().unwrap()],
    );
    let _over = Mounted {
        point: mounted.point.clone(),
    };
    let device = BlockDevice::open(&disk.path).unwrap();
    let layers = Layers::above(&[&device]).unwrap();
    assert_eq!(layers.filesystems().len(), 1);
    let error = layers.filesystems()[0].open().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::State);
    assert!(!layers.hold(&mounted.point).unwrap());
}

#[test]
fn a_btrfs_over_two_disks_is_found_from_either() {
    let folder = folder();
    let first = LoopDisk::new(folder.path(), "first", 128 * MIB);
    let second = LoopDisk::new(folder.path(), "second", 128 * MIB);
    run("mkfs.btrfs", &[Path::new("-f"), &first.path, &second.path]);
    let mounted = Mounted::new(&first.path, &folder.path().join("m"));
    for disk in [&first, &second] {
        let device = BlockDevice::open(&disk.path).unwrap();
        let layers = Layers::above(&[&device]).unwrap();
        assert_eq!(mount_points(&layers), [mounted.point.as_path()]);
        let devices: Vec<DevNo> = layers.filesystems()[0].devices().to_vec();
        assert_eq!(devices.len(), 2, "{devices:?}");
        assert!(layers.hold(&mounted.point.join("sub")).unwrap());
    }
}

#[test]
fn a_write_reaches_the_disk_below_and_what_lies_above_but_not_beside() {
    let folder = folder();
    let mut disk = LoopDisk::new(folder.path(), "disk", 32 * MIB);
    let first = disk.add_partition(1, MIB, 8 * MIB);
    let second = disk.add_partition(2, 16 * MIB, 8 * MIB);
    let over_second = LoopDisk::over(&second);
    let number = |path: &Path| {
        use std::os::unix::fs::MetadataExt;
        DevNo::from_stat(fs::metadata(path).unwrap().rdev())
    };
    let reached = |from: &Path| {
        let reach = Reach::of(from).unwrap();
        [&disk.path, &first, &second, &over_second.path].map(|path| reach.has(number(path)))
    };
    assert_eq!(reached(&disk.path), [true; 4]);
    assert_eq!(reached(&disk.file), [true; 4]);
    assert_eq!(reached(&first), [true, true, false, false]);
    assert_eq!(reached(&second), [true, false, true, true]);
    assert_eq!(reached(&over_second.path), [true, false, true, true]);
    assert!(Reach::of(&folder.path().join("new")).unwrap().is_empty());
    let device = BlockDevice::open(&disk.path).unwrap();
    let reach = Reach::of(&first).unwrap();
    assert!(reach.has_disk(device.devno(), device.diskseq()));
    let another = DiskSeq::new(device.diskseq().get() + 1);
    assert!(!reach.has_disk(device.devno(), another));
}
