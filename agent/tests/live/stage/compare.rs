//! Judges what came back: byte for byte against the device, and by the filesystem's own
//! checker.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::daemon::replica;
use super::device::{LoopDevice, Mount};
use super::place::{Place, run};

/// Restores a point from the store alone, without a daemon, to a new file in `place`.
#[track_caller]
pub fn restore(place: &Place, store: &Path, volume: &str, point: &str) -> PathBuf {
    let output = place.at(&format!("restored-{point}.img"));
    let (to, from) = (output.to_str().unwrap(), store.to_str().unwrap());
    let _ = fs::remove_file(&output);
    replica(&[
        "restore", volume, "--point", point, "--output", to, "--store", from,
    ])
    .ok();
    output
}

/// Restores the point, which must be what the device holds now.
#[track_caller]
pub fn assert_restores(place: &Place, store: &Path, volume: &str, point: &str, device: &Path) {
    let image = restore(place, store, volume, point);
    assert_same_bytes(device, &image);
    fs::remove_file(image).unwrap();
}

/// The two must hold the same bytes; says where they do not.
#[track_caller]
pub fn assert_same_bytes(device: &Path, image: &Path) {
    if !device.is_file() {
        // A filesystem writes around the device's own cache: what is cached may be old.
        run("blockdev", ["--flushbufs", device.to_str().unwrap()]);
    }
    let mut files = [device, image].map(|path| File::open(path).unwrap());
    let mut buffers = [vec![0; 1 << 20], vec![0; 1 << 20]];
    let mut at = 0;
    loop {
        let mut lens = [0; 2];
        for ((file, buffer), len) in files.iter_mut().zip(&mut buffers).zip(&mut lens) {
            *len = fill(file, buffer);
        }
        let [a, b] = [&buffers[0][..lens[0]], &buffers[1][..lens[1]]];
        if let Some(first) = a.iter().zip(b).position(|(a, b)| a != b) {
            let blocks = a
                .chunks(4096)
                .zip(b.chunks(4096))
                .filter(|(a, b)| a != b)
                .count();
            panic!(
                "{} and {} differ at byte {}, and in {blocks} blocks of that mebibyte",
                device.display(),
                image.display(),
                at + first
            );
        }
        assert_eq!(
            lens[0], lens[1],
            "of different length, same up to byte {at}"
        );
        if lens[0] == 0 {
            return;
        }
        at += lens[0];
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> usize {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]).unwrap() {
            0 => break,
            n => filled += n,
        }
    }
    filled
}

/// The image must hold a filesystem `kind` that its checker finds nothing wrong with, and
/// that mounts; `look` sees it mounted. The original must not be attached any more: two
/// filesystems with one UUID do not go together.
#[track_caller]
pub fn check_filesystem(kind: &str, image: &Path, place: &Place, look: impl FnOnce(&Path)) {
    let path = image.to_str().unwrap();
    match kind {
        "ext4" => drop(run("e2fsck", ["-fn", path])),
        "btrfs" => drop(run("btrfs", ["check", "--readonly", path])),
        "vfat" => check_vfat(image),
        _ => {}
    }
    let device = LoopDevice::over(image, &[]);
    let mount = Mount::new(device.path(), &place.at("checked"), "defaults");
    look(mount.path());
    mount.unmount();
    if kind == "xfs" {
        // A frozen xfs leaves a log to replay, for unlinked files that are open; the mount
        // above has replayed it.
        run("xfs_repair", ["-n", path]);
    }
    drop(device);
    if kind == "btrfs" {
        run("btrfs", ["device", "scan", "--forget"]);
    }
    let _ = fs::remove_dir(place.at("checked"));
}

/// The image must hold a vfat that its checker finds nothing wrong with, but for the mark of
/// one that is mounted: it cannot be frozen, and has the mark until it is unmounted.
#[track_caller]
pub fn check_vfat(image: &Path) {
    let output = Command::new("fsck.vfat").arg("-n").arg(image).output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    let harmless = [
        "fsck.fat ",
        "Dirty bit is set.",
        " Automatically removing dirty bit.",
        "Leaving filesystem unchanged.",
    ];
    let wrong = text.lines().find(|line| {
        let harmless = harmless.iter().any(|start| line.starts_with(start));
        !harmless && !line.is_empty() && !line.ends_with(" clusters")
    });
    assert_eq!(wrong, None, "{text}");
    assert!(text.trim_end().ends_with(" clusters"), "{text}");
}
