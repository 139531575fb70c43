//! Loop devices and what they stand on: a file of some filesystem, or a block device. A
//! filesystem within a file must be frozen before the one that holds the file.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::device::filesystem::mount_id;
use crate::device::mountinfo::Mount;
use crate::device::reach::FileId;
use crate::device::{DevNo, sysfs};
use crate::sys::blkdev::{self, LoopBacking};

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
    /// The file it stands on, if it is one that this kernel tells.
    pub file: Option<FileId>,
}

/// All attached loop devices whose base can be told.
pub(super) fn attached(mounts: &[Mount]) -> Vec<Loop> {
    let block = Path::new("/sys/block");
    sysfs::names(block)
        .iter()
        .map(|name| block.join(name))
        .filter_map(|folder| {
            let path = PathBuf::from(sysfs::text(&folder, "loop/backing_file")?);
            let node = Path::new("/dev").join(sysfs::device_name(&folder));
            let backing = File::open(node)
                .ok()
                .and_then(|device| blkdev::loop_backing(device).ok());
            Some(Loop {
                device: sysfs::devno(&folder)?,
                base: base(backing.as_ref(), &path, mounts)?,
                file: file_of(backing.as_ref(), &path),
            })
        })
        .collect()
}

/// Without its node the loop device is asked by the path that sysfs has.
fn file_of(backing: Option<&LoopBacking>, path: &Path) -> Option<FileId> {
    match backing {
        Some(backing) if backing.rdevice == 0 => Some(FileId {
            device: backing.device,
            inode: backing.inode,
        }),
        Some(_) => None,
        None => {
            let meta = path.metadata().ok()?;
            meta.is_file().then(|| FileId {
                device: meta.dev(),
                inode: meta.ino(),
            })
        }
    }
}

fn base(backing: Option<&LoopBacking>, path: &Path, mounts: &[Mount]) -> Option<Base> {
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

/// The kernel stacks no more than two, one on the other (`FILESYSTEM_MAX_STACK_DEPTH`).
const OVERLAYS: usize = 2;

/// The superblock that holds `path`, or would if it existed; overlays are followed to
/// where their changes go.
pub(super) fn superblock_of(path: &Path, mounts: &[Mount]) -> Option<DevNo> {
    let place = path.ancestors().find_map(place)?;
    followed(superblock_at(&place, mounts)?, mounts)
}

fn place(path: &Path) -> Option<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path)
        .ok()
}

fn superblock_at(place: &File, mounts: &[Mount]) -> Option<DevNo> {
    let by_mount = mount_id(place).and_then(|id| mounts.iter().find(|mount| mount.id == id));
    match by_mount {
        Some(mount) => Some(mount.superblock),
        None => Some(DevNo::from_stat(place.metadata().ok()?.dev())),
    }
}

/// Where an overlay's changes go, as far down as it can be seen. In a container, and where
/// the root folder is an overlay made at boot, the folder that takes them has no name; then
/// the overlay itself is all that can be told.
fn followed(mut superblock: DevNo, mounts: &[Mount]) -> Option<DevNo> {
    for _ in 0..OVERLAYS {
        let overlay = mounts
            .iter()
            .find(|mount| mount.superblock == superblock && mount.kind == "overlay");
        let Some(upper) = overlay.and_then(|mount| mount.option("upperdir")) else {
            break;
        };
        let Some(upper) = place(Path::new(upper)) else {
            break;
        };
        superblock = superblock_at(&upper, mounts)?;
    }
    Some(superblock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::mountinfo;

    #[test]
    fn an_overlay_whose_upper_folder_has_no_name_is_its_own_place() {
        let mut mounts = mountinfo::own().unwrap();
        let id = mount_id(&place(Path::new("/")).unwrap());
        let root = mounts
            .iter_mut()
            .find(|mount| Some(mount.id) == id)
            .unwrap();
        root.kind = "overlay".into();
        let superblock = root.superblock;
        // Nowhere; and a name that now means something else, within the overlay itself.
        for upper in ["/no/such/upper", "/"] {
            let root = mounts
                .iter_mut()
                .find(|mount| Some(mount.id) == id)
                .unwrap();
            root.options = format!("rw,lowerdir=/no/such/lower,upperdir={upper}");
            assert_eq!(superblock_of(Path::new("/"), &mounts), Some(superblock));
        }
    }
}
