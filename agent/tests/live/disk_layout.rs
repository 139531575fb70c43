//! A disk as machines have it: an EFI partition (vfat, which cannot be frozen), a root
//! filesystem, and a swap partition in use, which is left out but for its header.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::stage::{
    Bank, Daemon, LoopDevice, MIB, Mount, Place, Volume, check_filesystem, check_vfat, restore, run,
};

/// Swap that is on, until dropped.
struct Swap(PathBuf);

impl Swap {
    fn on(device: &Path) -> Self {
        run("mkswap", [device]);
        run("swapon", [device]);
        Self(device.to_owned())
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        run("swapoff", [&self.0]);
    }
}

/// Whether this kernel mounts vfat; not every small kernel does.
fn mounts_vfat() -> bool {
    let _ = Command::new("modprobe").args(["--quiet", "vfat"]).status();
    fs::read_to_string("/proc/filesystems")
        .unwrap()
        .contains("vfat")
}

/// The partition of an image as a file of its own.
fn cut_out(image: &Path, place: &Place, start: u64, len: u64) -> PathBuf {
    let part = place.at("part.img");
    let (input, output) = (
        format!("if={}", image.display()),
        format!("of={}", part.display()),
    );
    let (skip, count) = (format!("skip={start}"), format!("count={len}"));
    run(
        "dd",
        [
            &input,
            &output,
            "bs=1M",
            &skip,
            &count,
            "conv=sparse",
            "status=none",
        ],
    );
    part
}

#[test]
fn efi_root_and_active_swap() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 400 * MIB);
    let sectors = |mib: u64| mib * 2048;
    let efi = disk.add_partition(1, sectors(1), sectors(40));
    let root = disk.add_partition(2, sectors(50), sectors(250));
    let swap = disk.add_partition(3, sectors(310), sectors(80));

    run("mkfs.vfat", [&efi]);
    let efi_mount = mounts_vfat().then(|| Mount::new(&efi, &place.at("efi"), "defaults"));
    // Where the kernel has no vfat, a write to the partition stands for the file.
    let write_efi = |text: &str| match &efi_mount {
        Some(mount) => fs::write(mount.at("grub.cfg"), text).unwrap(),
        None => {
            let file = fs::OpenOptions::new().write(true).open(&efi).unwrap();
            file.write_all_at(text.as_bytes(), 30 * MIB).unwrap();
        }
    };
    let root = Mount::make("ext4", &root, &place.at("root"));
    let swap = Swap::on(&swap);
    write_efi("set timeout=1\n");
    let mut daemon = Daemon::start(&place);
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "sda",
        options: &[],
    });

    let bank = Bank::open(root.path());
    write_efi("set timeout=5\n");
    let transactions = bank.acknowledged();
    let point = daemon.point("sda", &["--consistency", "filesystem"]);
    bank.close();
    daemon.unprotect("sda");
    drop(swap);
    let with_file = efi_mount.is_some();
    drop(efi_mount);
    root.unmount();
    drop(disk);

    let image = restore(&place, &store, "sda", &point);
    let part = cut_out(&image, &place, 1, 40);
    check_vfat(&part);
    let text = "set timeout=5\n".as_bytes();
    if with_file {
        check_filesystem("vfat", &part, &place, |mounted| {
            assert_eq!(fs::read(mounted.join("grub.cfg")).unwrap(), text);
        });
    } else {
        assert!(fs::read(&part).unwrap()[30 * MIB as usize..].starts_with(text));
    }
    let part = cut_out(&image, &place, 50, 250);
    check_filesystem("ext4", &part, &place, |mounted| {
        assert!(Bank::check(mounted, &place) >= transactions);
    });
    // A swap area that swapon would take.
    let part = cut_out(&image, &place, 310, 80);
    let kind = run(
        "blkid",
        ["-p", "-s", "TYPE", "-o", "value", part.to_str().unwrap()],
    );
    assert_eq!(kind.trim(), "swap");
}
