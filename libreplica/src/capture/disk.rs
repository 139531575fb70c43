//! The disk under a volume as the kernel shows it in sysfs: what identifies it for as long
//! as it is attached, how it completes writes, and what the kernel itself counts.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::units::{SectorSize, VolumeSize};

/// How a disk tells the block layer that a write has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// Bios are made into requests: most disks.
    ByRequest,
    /// The driver takes bios as they are: zram, dm, md, the heads of NVMe multipath.
    ByBio,
}

/// A whole disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its device file.
    pub path: PathBuf,
    /// Its name in sysfs, such as `sda`.
    pub name: String,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// The kernel's number for this attachment of a disk; never used twice until reboot.
    pub diskseq: u64,
    /// Its size.
    pub size: VolumeSize,
    /// Its logical sector size.
    pub sector: SectorSize,
    /// How it completes writes.
    pub completion: Completion,
}

/// What the kernel has counted since the disk was attached; `None` of it while
/// `queue/iostats` is 0. Reference: Documentation/block/stat.rst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DiskStats {
    /// Writes completed.
    pub writes: u64,
    /// Sectors written, 512 bytes each.
    pub write_sectors: u64,
    /// Discards completed.
    pub discards: u64,
    /// Sectors discarded, 512 bytes each.
    pub discard_sectors: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Requests of any kind in flight.
    pub in_flight: u64,
}

fn word<T: std::str::FromStr>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).at("look at the disk", path)?;
    text.trim().parse().map_err(|_| {
        Error::new(ErrorKind::Kernel, "look at the disk")
            .path(path)
            .detail(format!("`{}` is not what was expected", text.trim()))
    })
}

impl Disk {
    /// The whole disk whose device file is `path`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] for what is no block device or is a
    /// partition; [`ErrorKind::Kernel`] where the kernel gives disks no `diskseq` (before
    /// 5.15).
    pub fn open(path: &Path) -> Result<Self> {
        const OPERATION: &str = "look at the disk";
        let meta = fs::metadata(path).at(OPERATION, path)?;
        let invalid = |what: &str| {
            Error::new(ErrorKind::Invalid, OPERATION)
                .path(path)
                .detail(what)
        };
        if !meta.file_type().is_block_device() {
            return Err(invalid("not a block device"));
        }
        let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
        let sysfs =
            fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).at(OPERATION, path)?;
        if sysfs.join("partition").exists() {
            return Err(invalid("a partition").advice("name the whole disk"));
        }
        let name = sysfs
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let sequence = sysfs.join("diskseq");
        if !sequence.exists() {
            return Err(Error::new(ErrorKind::Kernel, OPERATION)
                .path(path)
                .detail("the kernel gives disks no sequence number (it came with 5.15)")
                .advice("use --capture ublk or --capture nbd"));
        }
        let sectors: u64 = word(&sysfs.join("size"))?;
        let sector = SectorSize::new(word(&sysfs.join("queue/logical_block_size"))?);
        let by_request = sysfs.join("mq").exists();
        Ok(Self {
            path: path.to_owned(),
            name: name.ok_or_else(|| invalid("sysfs has no name for it"))?,
            major,
            minor,
            diskseq: word(&sequence)?,
            size: VolumeSize::new(sectors * 512),
            sector: sector.ok_or_else(|| invalid("its logical sectors have an odd size"))?,
            completion: if by_request {
                Completion::ByRequest
            } else {
                Completion::ByBio
            },
        })
    }

    fn attribute(&self, name: &str) -> PathBuf {
        Path::new("/sys/dev/block")
            .join(format!("{}:{}", self.major, self.minor))
            .join(name)
    }

    /// The sequence number of whatever disk has this device number now.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if there is none.
    pub fn diskseq_now(&self) -> Result<u64> {
        word(&self.attribute("diskseq")).map_err(|error| self.or_gone(error))
    }

    /// Its size now.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if it is gone.
    pub fn size_now(&self) -> Result<VolumeSize> {
        let sectors: u64 = word(&self.attribute("size")).map_err(|error| self.or_gone(error))?;
        Ok(VolumeSize::new(sectors * 512))
    }

    /// Whether the kernel counts this disk's requests.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if the disk is gone.
    pub fn counts_requests(&self) -> Result<bool> {
        let on: u32 =
            word(&self.attribute("queue/iostats")).map_err(|error| self.or_gone(error))?;
        Ok(on == 1)
    }

    /// What the kernel has counted.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if the disk is gone; [`ErrorKind::Kernel`] where the kernel
    /// does not count discards and flushes (before 5.5).
    pub fn stats(&self) -> Result<DiskStats> {
        let path = self.attribute("stat");
        let text = fs::read_to_string(&path)
            .at("read the disk's counters", &path)
            .map_err(|error| self.or_gone(error))?;
        let fields: Vec<u64> = text
            .split_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect();
        let Some(&[.., _]) = fields.get(..17) else {
            return Err(Error::new(ErrorKind::Kernel, "read the disk's counters").path(path));
        };
        Ok(DiskStats {
            writes: fields[4],
            write_sectors: fields[6],
            in_flight: fields[8],
            discards: fields[11],
            discard_sectors: fields[13],
            flushes: fields[15],
        })
    }

    /// How many writes the kernel has in flight on this disk.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if the disk is gone.
    pub fn writes_in_flight(&self) -> Result<u64> {
        let path = self.attribute("inflight");
        let text = fs::read_to_string(&path)
            .at("read the disk's counters", &path)
            .map_err(|error| self.or_gone(error))?;
        let writes = text.split_whitespace().nth(1).and_then(|n| n.parse().ok());
        writes.ok_or_else(|| Error::new(ErrorKind::Kernel, "read the disk's counters").path(path))
    }

    fn or_gone(&self, error: Error) -> Error {
        if error.kind() == ErrorKind::NotFound {
            return Error::new(ErrorKind::Vanished, "look at the disk").path(&self.path);
        }
        error
    }
}
