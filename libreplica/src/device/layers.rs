//! What lies over a disk: its partitions, the devices stacked on them (dm, md, bcache),
//! the filesystems on all of these, the loop devices over files of those filesystems, and
//! so on up. Found by going up until nothing new appears; the round in which a filesystem
//! is last found is its level, and higher levels are frozen first.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use crate::device::loops::{self, Base, Loop};
use crate::device::mountinfo::{self, Mount};
use crate::device::{BlockDevice, DevNo, Filesystem, boot, sysfs};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::btrfs;

/// What lies over one or several disks, at the moment it was looked for.
#[derive(Debug)]
pub struct Layers {
    devices: BTreeSet<DevNo>,
    filesystems: Vec<Filesystem>,
    mounts: Vec<Mount>,
}

impl Layers {
    /// What lies over these disks together.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if /proc cannot be read.
    pub fn above(disks: &[&BlockDevice]) -> Result<Self> {
        let numbers: Vec<DevNo> = disks.iter().map(|disk| disk.devno()).collect();
        Self::above_numbers(&numbers)
    }

    /// As [`Layers::above`], by device numbers; a partition's works too.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if /proc cannot be read.
    pub fn above_numbers(numbers: &[DevNo]) -> Result<Self> {
        let mounts = mountinfo::all()?;
        let candidates = on_block_devices(&mounts);
        let loops = loops::attached(&mounts);
        let (devices, levels) = climb(numbers, &candidates, &loops);
        let mut filesystems: Vec<Filesystem> = candidates
            .into_iter()
            .filter_map(|mut filesystem| {
                filesystem.level = *levels.get(&filesystem.superblock())?;
                Some(filesystem)
            })
            .collect();
        filesystems.sort_by_key(|fs| std::cmp::Reverse((fs.level, fs.depth(), fs.superblock())));
        Ok(Self {
            devices,
            filesystems,
            mounts,
        })
    }

    /// All filesystems that are mounted from block devices, wherever.
    pub(super) fn mounted_filesystems() -> Result<Vec<Filesystem>> {
        Ok(on_block_devices(&mountinfo::all()?))
    }

    /// The filesystems, innermost first: one within a file of another comes before it.
    pub fn filesystems(&self) -> &[Filesystem] {
        &self.filesystems
    }

    /// The disks themselves, and every block device over them.
    pub fn devices(&self) -> impl Iterator<Item = DevNo> + '_ {
        self.devices.iter().copied()
    }

    /// Whether the device is one of the disks or lies over them.
    pub fn has_device(&self, device: DevNo) -> bool {
        self.devices.contains(&device)
    }

    /// Whether a file at `path`, there or yet to be made, lies on these disks, or is one of
    /// their device nodes.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if the path cannot be followed.
    pub fn hold(&self, path: &Path) -> Result<bool> {
        const OPERATION: &str = "find the disk of a path";
        let path = std::path::absolute(path).at(OPERATION, path)?;
        if let Ok(meta) = fs::metadata(&path)
            && meta.file_type().is_block_device()
        {
            return Ok(self.has_device(DevNo::from_stat(meta.rdev())));
        }
        let superblock = self.superblock_of(&path).ok_or_else(|| {
            Error::new(ErrorKind::Io, OPERATION)
                .path(&path)
                .detail("no mount holds it")
        })?;
        Ok(self
            .filesystems
            .iter()
            .any(|filesystem| filesystem.superblock() == superblock))
    }

    pub(super) fn superblock_of(&self, path: &Path) -> Option<DevNo> {
        loops::superblock_of(path, &self.mounts)
    }
}

/// The superblock that a file at `path`, there or yet to be made, lies on.
///
/// # Errors
/// [`ErrorKind::Io`] if the path cannot be followed.
pub fn superblock_of(path: &Path) -> Result<DevNo> {
    loops::superblock_of(path, &mountinfo::own()?).ok_or_else(|| {
        Error::new(ErrorKind::Io, "find the filesystem of a path")
            .path(path)
            .detail("no mount holds it")
    })
}

impl Filesystem {
    /// The filesystem of this superblock; `None` if it is mounted nowhere, or on no block
    /// device.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if /proc cannot be read.
    pub fn mounted(superblock: DevNo) -> Result<Option<Self>> {
        let mounts = mountinfo::all()?;
        let found = on_block_devices(&mounts);
        Ok(found.into_iter().find(|fs| fs.superblock() == superblock))
    }
}

/// One filesystem a superblock, of those that lie on block devices.
fn on_block_devices(mounts: &[Mount]) -> Vec<Filesystem> {
    let mut by_superblock: BTreeMap<DevNo, Vec<&Mount>> = BTreeMap::new();
    for mount in mounts {
        let list = by_superblock.entry(mount.superblock).or_default();
        list.push(mount);
    }
    by_superblock
        .values()
        .filter_map(|mounts| {
            let mut filesystem = Filesystem::of(mounts, Vec::new())?;
            filesystem.devices = block_devices(&filesystem, mounts);
            (!filesystem.devices.is_empty()).then_some(filesystem)
        })
        .collect()
}

fn block_devices(filesystem: &Filesystem, mounts: &[&Mount]) -> Vec<DevNo> {
    let named = |path: &Path| {
        let meta = fs::metadata(path).ok()?;
        let is_block = meta.file_type().is_block_device();
        is_block.then(|| DevNo::from_stat(meta.rdev()))
    };
    let source = filesystem.source().to_string_lossy().into_owned();
    let mut devices: Vec<DevNo> = match filesystem.kind() {
        "btrfs" => btrfs_devices(filesystem)
            .unwrap_or_else(|| named(filesystem.source()).into_iter().collect()),
        "bcachefs" => source
            .split(':')
            .filter_map(|part| named(Path::new(part)))
            .collect(),
        _ if filesystem.superblock().major != 0 => vec![filesystem.superblock()],
        _ => Vec::new(),
    };
    for option in ["logdev", "rtdev"] {
        let paths = mounts.iter().filter_map(|mount| mount.option(option));
        devices.extend(paths.filter_map(|path| named(Path::new(path))));
    }
    devices.sort();
    devices.dedup();
    devices
}

fn btrfs_devices(filesystem: &Filesystem) -> Option<Vec<DevNo>> {
    let mount = filesystem.open().ok()?;
    let id = boot::uuid_text(&btrfs::filesystem_id(mount).ok()?);
    let list = Path::new("/sys/fs/btrfs").join(id).join("devices");
    let devices: Vec<DevNo> = sysfs::names(&list)
        .iter()
        .filter_map(|name| sysfs::devno(&list.join(name)))
        .collect();
    (!devices.is_empty()).then_some(devices)
}

/// All devices over `base`, and the level of each superblock on them.
fn climb(
    base: &[DevNo],
    candidates: &[Filesystem],
    loops: &[Loop],
) -> (BTreeSet<DevNo>, BTreeMap<DevNo, usize>) {
    let mut devices = BTreeSet::new();
    let mut levels = BTreeMap::new();
    let mut next = base.to_vec();
    // A loop device cannot lie over itself, so there are no more rounds than loop devices.
    for level in 0..=loops.len() {
        let round = stacked_on(&next);
        let found: BTreeSet<DevNo> = candidates
            .iter()
            .filter(|fs| fs.devices().iter().any(|device| round.contains(device)))
            .map(Filesystem::superblock)
            .collect();
        levels.extend(found.iter().map(|&superblock| (superblock, level)));
        next = loops
            .iter()
            .filter(|entry| match entry.base {
                Base::Superblock(superblock) => found.contains(&superblock),
                Base::Device(device) => round.contains(&device),
            })
            .map(|entry| entry.device)
            .collect();
        devices.extend(round);
        if next.is_empty() {
            break;
        }
    }
    (devices, levels)
}

/// `base`, its partitions, and whatever dm, md or bcache stack on them.
pub(super) fn stacked_on(base: &[DevNo]) -> BTreeSet<DevNo> {
    let mut all = BTreeSet::new();
    let mut open = base.to_vec();
    while let Some(device) = open.pop() {
        if !all.insert(device) {
            continue;
        }
        let Ok(folder) = sysfs::folder(device) else {
            continue;
        };
        open.extend(sysfs::holders(&folder));
        let partitions = sysfs::partition_folders(&folder);
        open.extend(partitions.iter().filter_map(|part| sysfs::devno(part)));
    }
    all
}
