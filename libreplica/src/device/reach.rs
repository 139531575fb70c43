//! What a write to a file or a device changes besides: the disk of a partition, what a
//! stacked device is made of, the file or device under a loop device; and whatever shows
//! the same bytes: partitions and stacked devices over it, other loop devices over the
//! same file. A restore must spare all of it.
//!
//! A filesystem ends the way down: a file on a protected disk may be written like any other.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::device::block_device::read_diskseq;
use crate::device::layers::{Layers, stacked_on};
use crate::device::loops::{self, Base, Loop};
use crate::device::{DevNo, DiskSeq, Filesystem, beside, mountinfo, sysfs};
use crate::error::{IoContext, Result};

/// The block devices that a write to one file or device changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach(BTreeSet<DevNo>);

/// A file, whatever names it has: device number of its filesystem, inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FileId {
    pub device: u64,
    pub inode: u64,
}

impl Reach {
    /// Of `path`. Nothing that is there yet, or a file that no loop device lies on: no device.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) if path or mounts cannot be looked at.
    pub fn of(path: &Path) -> Result<Self> {
        const OPERATION: &str = "find what a write changes";
        let meta = match fs::metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            meta => meta.at(OPERATION, path)?,
        };
        let loops = loops::attached(&mountinfo::own()?);
        if meta.file_type().is_block_device() {
            let device = DevNo::from_stat(meta.rdev());
            return Ok(Self(devices(&[device], &[], &loops)));
        }
        let file = FileId {
            device: meta.dev(),
            inode: meta.ino(),
        };
        Ok(Self(devices(&[], &[file], &loops)))
    }

    /// Whether a write to the path changes what `device` holds.
    pub fn has(&self, device: DevNo) -> bool {
        self.0.contains(&device)
    }

    /// Whether it changes what `device` holds, and that is still the disk it was.
    pub fn has_disk(&self, device: DevNo, sequence: DiskSeq) -> bool {
        let now = |folder: PathBuf| read_diskseq(&folder);
        self.has(device)
            && sysfs::folder(device)
                .map(now)
                .is_ok_and(|now| now == sequence)
    }

    /// Whether it changes no device.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A filesystem that is mounted from one of the devices, in whatever mount namespace.
    ///
    /// # Errors
    /// [`Io`](crate::ErrorKind::Io) if /proc cannot be read.
    pub fn mounted(&self) -> Result<Option<Filesystem>> {
        if self.is_empty() {
            return Ok(None);
        }
        let found = Layers::mounted_filesystems()?;
        let is_within = |fs: &Filesystem| fs.devices().iter().any(|device| self.has(*device));
        Ok(found.into_iter().find(is_within))
    }
}

/// All devices that a write to `targets` or `files` changes.
fn devices(targets: &[DevNo], files: &[FileId], loops: &[Loop]) -> BTreeSet<DevNo> {
    let (down, mut files) = (descend(targets, loops), files.to_vec());
    files.extend(
        loops
            .iter()
            .filter(|entry| down.contains(&entry.device))
            .filter_map(|entry| entry.file),
    );
    // Other loop devices that show the same bytes; those on the way down are passed through.
    let shows = |entry: &&Loop| {
        let same_file = entry.file.is_some_and(|file| files.contains(&file));
        let over = matches!(entry.base, Base::Device(base) if down.contains(&base));
        (same_file || over) && !down.contains(&entry.device)
    };
    let beside = loops.iter().filter(shows).map(|entry| entry.device);
    let mut all: BTreeSet<DevNo> = ascend(targets.iter().copied().chain(beside), loops);
    all.extend(down);
    all
}

/// `targets` and what is under them.
fn descend(targets: &[DevNo], loops: &[Loop]) -> BTreeSet<DevNo> {
    let mut all = BTreeSet::new();
    let mut open = targets.to_vec();
    while let Some(device) = open.pop() {
        if !all.insert(device) {
            continue;
        }
        open.extend(beside::below(device));
        open.extend(disk_of(device));
        open.extend(loops.iter().filter_map(|entry| match entry.base {
            Base::Device(base) if entry.device == device => Some(base),
            _ => None,
        }));
    }
    all
}

/// `targets` and what is stacked on them, loop devices included.
fn ascend(targets: impl Iterator<Item = DevNo>, loops: &[Loop]) -> BTreeSet<DevNo> {
    let mut all = BTreeSet::new();
    let mut next: Vec<DevNo> = targets.collect();
    while !next.is_empty() {
        let round = stacked_on(&next);
        let over = |entry: &&Loop| matches!(entry.base, Base::Device(base) if round.contains(&base) && !all.contains(&entry.device));
        next = loops
            .iter()
            .filter(over)
            .map(|entry| entry.device)
            .collect();
        all.extend(round);
    }
    all
}

/// The disk that a partition is of.
fn disk_of(device: DevNo) -> Option<DevNo> {
    let folder = sysfs::folder(device).ok()?;
    folder.join("partition").exists().then_some(())?;
    sysfs::devno(folder.parent()?)
}
