//! One whole disk: found by any path to it, described by what sysfs says, and recognised
//! again later. It holds no descriptor, so that the disk can be detached under us and we
//! notice, instead of keeping it half alive.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hrl_format::units::{ByteOffset, Extent, SectorSize, VolumeSize};

use crate::device::{DevNo, DiskSeq, DiskStats, IoStats, refuse, stats, sysfs};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::blkdev;

/// sysfs counts sizes and starts in sectors of 512 bytes, whatever the disk's own.
const SYSFS_SECTOR: u64 = 512;

/// How the disk takes requests; it decides where completions are seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// Through request queues (SCSI, NVMe, virtio, loop): completions are requests.
    Requests,
    /// Bio by bio (dm, md, zram): completions are bios.
    Bios,
}

/// What the device node is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenFor {
    /// Reading past the page cache (`O_DIRECT`).
    DirectRead,
    /// Reading through the page cache.
    BufferedRead,
    /// Reading and writing past the page cache, with nobody else who claims the disk: no
    /// mount, no holder, no other exclusive user (`O_EXCL`).
    Ownership,
}

/// A partition of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// As in /dev, without the folder: `sda1`.
    pub name: String,
    /// Its number in the table, from 1.
    pub number: u64,
    /// Its own device number.
    pub devno: DevNo,
    /// Where it lies on the disk, in bytes.
    pub extent: Extent,
}

/// A whole disk in use or not.
///
/// ```no_run
/// # fn main() -> libreplica::Result<()> {
/// use libreplica::device::{BlockDevice, Layers};
/// let disk = BlockDevice::open("/dev/disk/by-id/virtio-data")?;
/// for filesystem in Layers::above(&[&disk])?.filesystems() {
///     println!("{}: {}", filesystem.mount_point().display(), filesystem.kind());
/// }
/// disk.still_there()?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct BlockDevice {
    path: PathBuf,
    node: PathBuf,
    name: String,
    folder: PathBuf,
    devno: DevNo,
    diskseq: DiskSeq,
    size: VolumeSize,
    logical: SectorSize,
    physical: SectorSize,
    queue: Queue,
}

impl BlockDevice {
    /// The disk that `path` names, through whatever links.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is nothing, or no medium; [`ErrorKind::Invalid`] if
    /// it is no block device, a partition, or one path of a multipath disk;
    /// [`ErrorKind::Kernel`] or [`ErrorKind::Unsupported`] if writes to it cannot all be
    /// seen (page I/O before kernel 6.3, DAX). Each says what to name or do instead.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let device = Self::describe(path.as_ref())?;
        refuse::unseen_writes(&device)?;
        Ok(device)
    }

    fn describe(path: &Path) -> Result<Self> {
        const OPERATION: &str = "open the device";
        let node = fs::canonicalize(path).at(OPERATION, path)?;
        let meta = fs::metadata(&node).at(OPERATION, path)?;
        if !meta.file_type().is_block_device() {
            return Err(refuse::not_a_block_device(path, &meta));
        }
        let devno = DevNo::from_stat(meta.rdev());
        let folder = sysfs::folder(devno)?;
        refuse::partition(path, &folder)?;
        let size = VolumeSize::new(sysfs::number(&folder, "size")? * SYSFS_SECTOR);
        if size == VolumeSize::default() {
            return Err(Error::new(ErrorKind::NotFound, OPERATION)
                .path(path)
                .detail("it has no medium: its size is 0")
                .advice("attach or initialise it first"));
        }
        let queue = folder.join("queue");
        Ok(Self {
            path: path.to_owned(),
            node,
            name: sysfs::device_name(&folder),
            devno,
            diskseq: read_diskseq(&folder),
            size,
            logical: sector_size(&queue, "logical_block_size")?,
            physical: sector_size(&queue, "physical_block_size")?,
            queue: if folder.join("mq").is_dir() {
                Queue::Requests
            } else {
                Queue::Bios
            },
            folder,
        })
    }

    /// As it was given: the name to keep, for links in /dev/disk outlive a reboot.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The device node behind the path.
    pub fn node(&self) -> &Path {
        &self.node
    }

    /// As in /dev, without the folder: `sda`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its folder in sysfs.
    pub fn sysfs(&self) -> &Path {
        &self.folder
    }

    /// Its device number.
    pub const fn devno(&self) -> DevNo {
        self.devno
    }

    /// Which disk under that number.
    pub const fn diskseq(&self) -> DiskSeq {
        self.diskseq
    }

    /// Its size when it was opened; [`BlockDevice::still_there`] compares.
    pub const fn size(&self) -> VolumeSize {
        self.size
    }

    /// The unit it is read and written in.
    pub const fn logical_sector(&self) -> SectorSize {
        self.logical
    }

    /// The unit it writes without reading first.
    pub const fn physical_sector(&self) -> SectorSize {
        self.physical
    }

    /// How it takes requests.
    pub const fn queue(&self) -> Queue {
        self.queue
    }

    /// Whether seeks cost.
    pub fn is_rotational(&self) -> bool {
        sysfs::text(&self.folder, "queue/rotational").as_deref() == Some("1")
    }

    /// Whether ranges of it can be given up.
    pub fn can_discard(&self) -> bool {
        self.queue_limit("discard_max_bytes")
            .is_some_and(|bytes| bytes > 0)
    }

    /// A limit of its queue by the name that it has in sysfs (`queue/NAME`), if it says.
    pub fn queue_limit(&self, name: &str) -> Option<u64> {
        sysfs::number(&self.folder.join("queue"), name).ok()
    }

    /// What tells this disk from others for good, if it says: serial number, WWID, or the
    /// UUID of a dm or md device.
    pub fn serial(&self) -> Option<String> {
        const ATTRIBUTES: [&str; 6] = [
            "serial",
            "device/serial",
            "wwid",
            "device/wwid",
            "dm/uuid",
            "md/uuid",
        ];
        ATTRIBUTES
            .iter()
            .filter_map(|name| sysfs::text(&self.folder, name))
            .find(|text| !text.is_empty())
    }

    /// The file behind a loop device, as the kernel names it; `None` for other disks.
    pub fn backing_file(&self) -> Option<PathBuf> {
        sysfs::text(&self.folder, "loop/backing_file").map(PathBuf::from)
    }

    /// Its partitions, in the order of their place on the disk.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if sysfs cannot be read.
    pub fn partitions(&self) -> Result<Vec<Partition>> {
        let mut partitions = Vec::new();
        for folder in sysfs::partition_folders(&self.folder) {
            partitions.push(read_partition(&folder)?);
        }
        partitions.sort_by_key(|partition| (partition.extent.offset(), partition.number));
        Ok(partitions)
    }

    /// The devices stacked on the disk or its partitions (dm, md, bcache), one level up.
    pub fn holders(&self) -> Vec<DevNo> {
        let mut holders = sysfs::holders(&self.folder);
        for partition in sysfs::partition_folders(&self.folder) {
            holders.extend(sysfs::holders(&partition));
        }
        holders.sort();
        holders.dedup();
        holders
    }

    /// The kernel's counters.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if the disk is gone.
    pub fn stats(&self) -> Result<DiskStats> {
        stats::read(&self.folder)
    }

    /// Whether those counters are kept.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if the disk is gone.
    pub fn io_stats(&self) -> Result<IoStats> {
        match sysfs::number(&self.folder, "queue/iostats") {
            Ok(0) => Ok(IoStats::Off),
            Ok(_) => Ok(IoStats::Kept),
            Err(error) => Err(self.or_gone(error)),
        }
    }

    /// Whether they also count commands sent past the block layer
    /// (`queue/iostats_passthrough`, since Linux 6.13).
    pub fn counts_commands(&self) -> bool {
        sysfs::text(&self.folder, "queue/iostats_passthrough").is_some_and(|on| on == "1")
    }

    /// How many writes the kernel has in flight on it now.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if the disk is gone.
    pub fn writes_in_flight(&self) -> Result<u64> {
        stats::writes_in_flight(&self.folder)
    }

    /// Which disk has its number now.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if none has.
    pub fn diskseq_now(&self) -> Result<DiskSeq> {
        let folder = sysfs::folder(self.devno)?;
        Ok(read_diskseq(&folder))
    }

    fn or_gone(&self, error: Error) -> Error {
        match error.kind() {
            ErrorKind::NotFound => Error::new(ErrorKind::Vanished, "look at the device")
                .path(&self.path)
                .source(error),
            _ => error,
        }
    }

    /// Checks that this is the disk it was, and as long.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if it is gone or another took its number;
    /// [`ErrorKind::Resized`] if its size changed, both sizes named.
    pub fn still_there(&self) -> Result<()> {
        const OPERATION: &str = "check the device";
        let folder = sysfs::folder(self.devno).map_err(|error| {
            Error::new(error.kind(), OPERATION)
                .path(&self.path)
                .source(error)
        })?;
        let diskseq = read_diskseq(&folder);
        if diskseq != self.diskseq {
            return Err(Error::new(ErrorKind::Vanished, OPERATION)
                .path(&self.path)
                .detail(format!(
                    "another disk has its number {}: diskseq {diskseq}, was {}",
                    self.devno, self.diskseq
                )));
        }
        let size = sysfs::number(&folder, "size")? * SYSFS_SECTOR;
        match size {
            0 => Err(Error::new(ErrorKind::Vanished, OPERATION)
                .path(&self.path)
                .detail("its medium is gone")),
            _ if size != self.size.get() => Err(Error::new(ErrorKind::Resized, OPERATION)
                .path(&self.path)
                .detail(format!("it has {size} bytes, and had {}", self.size))
                .advice("give it its size back; or unprotect the volume and protect it anew")),
            _ => Ok(()),
        }
    }

    /// Opens the device node and makes sure that it is this disk.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if the node is another disk by now; [`ErrorKind::Busy`] for
    /// ownership of a disk that is mounted or held; else as open(2).
    pub fn open_node(&self, purpose: OpenFor) -> Result<File> {
        const OPERATION: &str = "open the device's node";
        let flags = match purpose {
            OpenFor::DirectRead => libc::O_DIRECT,
            OpenFor::BufferedRead => 0,
            OpenFor::Ownership => libc::O_DIRECT | libc::O_EXCL,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(purpose == OpenFor::Ownership)
            .custom_flags(flags)
            .open(&self.node)
            .at(OPERATION, &self.node)?;
        let rdev = file.metadata().at(OPERATION, &self.node)?.rdev();
        let diskseq = blkdev::diskseq(file.as_fd()).unwrap_or(0);
        if DevNo::from_stat(rdev) != self.devno || DiskSeq::new(diskseq) != self.diskseq {
            return Err(Error::new(ErrorKind::Vanished, OPERATION)
                .path(&self.node)
                .detail("it is another disk now"));
        }
        Ok(file)
    }
}

pub(super) fn read_diskseq(folder: &Path) -> DiskSeq {
    DiskSeq::new(sysfs::number(folder, "diskseq").unwrap_or(0))
}

fn sector_size(queue: &Path, name: &str) -> Result<SectorSize> {
    let bytes = sysfs::number(queue, name)?;
    u32::try_from(bytes)
        .ok()
        .and_then(SectorSize::new)
        .ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, "read the device's sector size")
                .path(queue.join(name))
                .detail(format!("{bytes} bytes"))
        })
}

fn read_partition(folder: &Path) -> Result<Partition> {
    let start = sysfs::number(folder, "start")?.saturating_mul(SYSFS_SECTOR);
    let len = sysfs::number(folder, "size")?.saturating_mul(SYSFS_SECTOR);
    Ok(Partition {
        name: sysfs::device_name(folder),
        number: sysfs::number(folder, "partition")?,
        devno: sysfs::devno(folder).ok_or_else(|| {
            Error::new(ErrorKind::Vanished, "read the partition's number").path(folder)
        })?,
        extent: Extent::between(
            ByteOffset::new(start),
            ByteOffset::new(start.saturating_add(len)),
        ),
    })
}
