//! Loop devices and what they stand on: a file of some filesystem, or a block device. A
//! filesystem within a file must be frozen before the one that holds the file.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::device::filesystem::mount_id;
use crate::device::mountinfo::Mount;
use crate::device::{DevNo, sysfs};
use crate::sys::blkdev;

/// What a loop device stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Base {
    /// A file of this superblock.
    Superblock(DevNo),
    /// A disk or partition.
    Device(DevNo),
}

/// An attached loop device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loop {
    pub device: DevNo,
    pub base: Base,
}

/// All attached loop devices whose base can be told.
pub(super) fn attached(mounts: &[Mount]) -> Vec<Loop> {
    let block = Path::new("/sys/block");
    sysfs::names(block)
        .iter()
        .map(|name| block.join(name))
        .filter_map(|folder| {
            let path = PathBuf::from(sysfs::text(&folder, "loop/backing_file")?);
            Some(Loop {
                device: sysfs::devno(&folder)?,
                base: base(&folder, &path, mounts)?,
            })
        })
        .collect()
}

fn base(folder: &Path, path: &Path, mounts: &[Mount]) -> Option<Base> {
    let node = Path::new("/dev").join(sysfs::device_name(folder));
    let backing = File::open(node)
        .ok()
        .and_then(|device| blkdev::loop_backing(device).ok());
    if let Some(backing) = backing {
        if backing.rdevice != 0 {
            return Some(Base::Device(DevNo::from_stat(backing.rdevice)));
        }
        let superblock = DevNo::from_stat(backing.device);
        if mounts.iter().any(|mount| mount.superblock == superblock) {
            return followed(superblock, mounts).map(Base::Superblock);
        }
    }
    // A btrfs subvolume's number is no mount's: go by the path.
    superblock_of(path, mounts).map(Base::Superblock)
}

/// The superblock that holds `path`, or would if it existed; overlays are followed to
/// where their changes go.
pub(super) fn superblock_of(path: &Path, mounts: &[Mount]) -> Option<DevNo> {
    let place = path.ancestors().find_map(|ancestor| {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(ancestor)
            .ok()
    })?;
    let by_mount = mount_id(&place).and_then(|id| mounts.iter().find(|mount| mount.id == id));
    let superblock = match by_mount {
        Some(mount) => mount.superblock,
        None => DevNo::from_stat(place.metadata().ok()?.dev()),
    };
    followed(superblock, mounts)
}

fn followed(superblock: DevNo, mounts: &[Mount]) -> Option<DevNo> {
    let overlay = mounts
        .iter()
        .find(|mount| mount.superblock == superblock && mount.kind == "overlay");
    match overlay.and_then(|mount| mount.option("upperdir")) {
        Some(upper) => superblock_of(Path::new(upper), mounts),
        None => Some(superblock),
    }
}
