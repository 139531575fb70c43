//! Swap in use on real loop devices: its bytes on the disk are known, or it is data. Needs
//! root.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use libreplica::device::{BlockDevice, Freezing, Layers, Swap, SwapArea};
use rig::{LoopDisk, MIB, Mounted, Swapping, mkfs, mkfs_that_cannot_freeze, run};
use tempfile::TempDir;

const FILE: u64 = 8 * MIB;

/// The machine has one list of swap: what a test sees of another's may just be going.
static ALONE: Mutex<()> = Mutex::new(());

fn folder() -> TempDir {
    tempfile::Builder::new()
        .prefix("replica-swap.")
        .tempdir()
        .unwrap()
}

/// A file to swap to, with a mark in each of its 1 MiB pieces by which it is found again.
fn swap_file(folder: &Path) -> PathBuf {
    let path = folder.join("swap file");
    let file = fs::File::create(&path).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o600))
        .unwrap();
    // Before it has blocks; other filesystems do not know the attribute.
    let _ = std::process::Command::new("chattr")
        .arg("+C")
        .arg(&path)
        .output();
    file.write_all_at(&vec![0; FILE as usize], 0).unwrap();
    for n in 0..FILE / MIB {
        file.write_all_at(&mark(n), (n + 1) * MIB - 4096).unwrap();
    }
    file.sync_all().unwrap();
    path
}

fn mark(n: u64) -> Vec<u8> {
    (0..512_u64)
        .flat_map(|i| (i ^ (n << 32) ^ 0xa5a5_5a5a_1234_9876).to_le_bytes())
        .collect()
}

fn area<'a>(swap: &'a Swap, path: &Path) -> &'a SwapArea {
    let found = swap.areas().iter().find(|area| area.path == path);
    assert!(found.is_some(), "{} is not in {swap:?}", path.display());
    found.unwrap()
}

fn total(extents: impl IntoIterator<Item = libreplica::units::Extent>) -> u64 {
    extents.into_iter().map(|extent| extent.len().get()).sum()
}

/// The bytes of the disk in the area's order are the file's: its header, and every mark.
fn assert_is_the_file(disk: &LoopDisk, area: &SwapArea) {
    assert_eq!(total(area.extents.iter().copied()), FILE);
    assert_eq!(total(area.body()), FILE - 4096);
    let bytes = fs::File::open(&disk.file).unwrap();
    let mut content = Vec::new();
    for extent in &area.extents {
        let mut part = vec![0; extent.len().get() as usize];
        bytes
            .read_exact_at(&mut part, extent.offset().get())
            .unwrap();
        content.extend(part);
    }
    assert!(content[..4096].ends_with(b"SWAPSPACE2"));
    for n in 0..FILE / MIB {
        let at = ((n + 1) * MIB - 4096) as usize;
        assert!(content[at..at + 4096] == mark(n), "piece {n} is elsewhere");
    }
}

#[test]
fn a_disk_with_efi_partition_root_and_swap_is_understood() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = folder();
    let mut disk = LoopDisk::new(folder.path(), "disk", 256 * MIB);
    let efi = disk.add_partition(1, MIB, 32 * MIB);
    let partition = disk.add_partition(2, 40 * MIB, 16 * MIB);
    let root = disk.add_partition(3, 64 * MIB, 190 * MIB);
    let kind = mkfs_that_cannot_freeze(&efi);
    mkfs("ext4", &root);
    let root = Mounted::new(&root, &folder.path().join("root"));
    let efi = Mounted::new(&efi, &root.point.join("boot/efi"));
    let file = swap_file(&root.point);
    let _partition = Swapping::on(&partition);
    let _file = Swapping::on(&file);

    let device = BlockDevice::open(&disk.path).unwrap();
    let layers = Layers::above(&[&device]).unwrap();
    let found: Vec<_> = layers
        .filesystems()
        .iter()
        .map(|fs| (fs.mount_point(), fs.kind(), fs.freezing()))
        .collect();
    let expected = [
        (efi.point.as_path(), kind, Freezing::SyncOnly),
        (root.point.as_path(), "ext4", Freezing::Freezes),
    ];
    assert_eq!(found, expected);
    for filesystem in layers.filesystems() {
        filesystem.sync().unwrap();
    }

    let swap = Swap::on(&device).unwrap();
    assert!(swap.unplaced().is_empty(), "{swap:?}");
    let of_partition = area(&swap, &partition);
    assert_eq!(of_partition.header.offset().get(), 40 * MIB);
    let body: Vec<_> = of_partition.body().collect();
    assert_eq!(body.len(), 1);
    assert_eq!(body[0].offset().get(), 40 * MIB + 4096);
    assert_eq!(body[0].end().get(), 56 * MIB);
    assert_is_the_file(&disk, area(&swap, &file));

    // A copy without the areas' bodies is still known as swap, by the same UUID.
    let copy = folder.path().join("copy");
    fs::copy(&disk.file, &copy).unwrap();
    let bytes = fs::File::options().write(true).open(&copy).unwrap();
    for body in swap.bodies() {
        let zeroes = vec![0; body.len().get() as usize];
        bytes.write_all_at(&zeroes, body.offset().get()).unwrap();
    }
    let says = |file: &Path| {
        let offset = format!("--offset={}", 40 * MIB);
        let size = format!("--size={}", 16 * MIB);
        let file = file.to_str().unwrap();
        run("blkid", &["--probe", &offset, &size, "-o", "export", file]).replace(file, "")
    };
    assert!(says(&copy).contains("TYPE=swap"));
    assert_eq!(says(&copy), says(&disk.file));
}

#[test]
fn a_swap_file_is_placed_on_each_filesystem() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for (kind, bytes) in [("xfs", 320 * MIB), ("btrfs", 160 * MIB)] {
        let folder = folder();
        let mut disk = LoopDisk::new(folder.path(), "disk", bytes + 8 * MIB);
        let partition = disk.add_partition(1, 4 * MIB, bytes);
        mkfs(kind, &partition);
        let mounted = Mounted::new(&partition, &folder.path().join("m"));
        let file = swap_file(&mounted.point);
        let _on = Swapping::on(&file);
        let device = BlockDevice::open(&disk.path).unwrap();
        let swap = Swap::on(&device).unwrap();
        assert!(swap.unplaced().is_empty(), "{kind}: {swap:?}");
        assert_is_the_file(&disk, area(&swap, &file));
    }
}

#[test]
fn only_what_is_used_of_a_partition_is_swap() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = folder();
    let mut disk = LoopDisk::new(folder.path(), "disk", 32 * MIB);
    let partition = disk.add_partition(1, 8 * MIB, 16 * MIB);
    run(
        "mkswap",
        &[partition.to_str().unwrap(), &(4 * MIB / 1024).to_string()],
    );
    let on = Swapping::over(&partition);
    let device = BlockDevice::open(&disk.path).unwrap();
    let swap = Swap::on(&device).unwrap();
    let bodies = swap.bodies();
    assert_eq!(bodies.len(), 1);
    assert_eq!(bodies[0].offset().get(), 8 * MIB + 4096);
    assert_eq!(bodies[0].end().get(), 12 * MIB);

    // Another disk has none.
    let other = LoopDisk::new(folder.path(), "other", 16 * MIB);
    let other = BlockDevice::open(&other.path).unwrap();
    let of_other = Swap::on(&other).unwrap();
    assert!(of_other.areas().is_empty() && of_other.unplaced().is_empty());

    drop(on);
    assert!(swap.has_changed().unwrap());
    assert!(Swap::on(&device).unwrap().areas().is_empty());
}

#[test]
fn swap_that_cannot_be_placed_is_data() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = folder();
    let disk = LoopDisk::new(folder.path(), "disk", 64 * MIB);
    disk.mkfs("ext4");
    let mounted = Mounted::new(&disk.path, &folder.path().join("m"));
    // The filesystem may move the file under a loop device at any time.
    let inner = LoopDisk::new(&mounted.point, "inner", 16 * MIB);
    let inner_on = Swapping::on(&inner.path);
    let device = BlockDevice::open(&disk.path).unwrap();
    let swap = Swap::on(&device).unwrap();
    assert!(swap.areas().is_empty());
    assert_eq!(swap.unplaced(), std::slice::from_ref(&inner.path));
    // To the inner disk itself it is all there is.
    let of_inner = Swap::on(&BlockDevice::open(&inner.path).unwrap()).unwrap();
    assert_eq!(total(of_inner.bodies()), 16 * MIB - 4096);
    drop(inner_on);

    // A file of the same name hides what the kernel swaps to.
    let file = swap_file(&mounted.point);
    let _on = Swapping::on(&file);
    let decoy = folder.path().join("decoy");
    fs::create_dir(&decoy).unwrap();
    fs::write(decoy.join("swap file"), vec![7; FILE as usize]).unwrap();
    run("mount", &[Path::new("--bind"), &decoy, &mounted.point]);
    let over = Mounted {
        point: mounted.point.clone(),
    };
    assert!(Swap::on(&device).unwrap().areas().is_empty());
    drop(over);
    assert_is_the_file(&disk, area(&Swap::on(&device).unwrap(), &file));
}
